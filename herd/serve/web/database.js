// What the browser keeps: conversations in IndexedDB, preferences in localStorage. Either may be missing (private windows, full disks):
// then the page works on and says that nothing is kept.

const NAME = "herd";
const PREFERENCES = "herd.preferences";

function promised(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

export class Database {
  /** Throws a DOMException where the browser keeps nothing. */
  static async open() {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore("conversations", { keyPath: "id" });
    return new Database(await promised(request));
  }

  constructor(connection) {
    this.connection = connection;
    connection.onversionchange = () => connection.close(); // a newer page in another tab waits for this
  }

  #store(mode) {
    return this.connection.transaction("conversations", mode).objectStore("conversations");
  }

  all() {
    return promised(this.#store("readonly").getAll());
  }

  /** Throws a QuotaExceededError when the browser has no more room. */
  async save(conversation) {
    const store = this.#store("readwrite");
    store.put(conversation);
    await new Promise((resolve, reject) => {
      store.transaction.oncomplete = resolve;
      store.transaction.onabort = () => reject(store.transaction.error);
    });
  }

  async remove(id) {
    await promised(this.#store("readwrite").delete(id));
  }
}

export function readPreferences() {
  try {
    return JSON.parse(localStorage.getItem(PREFERENCES)) ?? {};
  } catch {
    return {};
  }
}

export function writePreferences(preferences) {
  try {
    localStorage.setItem(PREFERENCES, JSON.stringify(preferences));
  } catch {
    // kept until the page closes
  }
}
