// What the browser keeps: conversations in IndexedDB, preferences in localStorage. Either may be missing (private windows, full disks):
// then the page works on and says that nothing is kept.

import { merge } from "./store.js";

const NAME = "herd";
const PREFERENCES = "herd.preferences";
const DRAFT = "herd.draft";

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

  #tabs = new BroadcastChannel(NAME); // ids of what was stored or deleted, for the other tabs

  constructor(connection) {
    this.connection = connection;
    connection.onversionchange = () => connection.close(); // a newer page in another tab waits for this
  }

  /** `changed(id)` is called when another tab has stored or deleted a conversation. */
  listen(changed) {
    this.#tabs.onmessage = ({ data }) => changed(data);
  }

  #store(mode) {
    return this.connection.transaction("conversations", mode).objectStore("conversations");
  }

  all() {
    return promised(this.#store("readonly").getAll());
  }

  one(id) {
    return promised(this.#store("readonly").get(id));
  }

  /** Store it, with what other tabs have added meanwhile. Throws a QuotaExceededError when the browser has no more room. */
  async save(conversation) {
    const store = this.#store("readwrite");
    const stored = await promised(store.get(conversation.id));
    if (stored) merge(conversation, stored);
    store.put(conversation);
    await new Promise((resolve, reject) => {
      store.transaction.oncomplete = resolve;
      store.transaction.onabort = () => reject(store.transaction.error);
    });
    this.#tabs.postMessage(conversation.id);
  }

  async remove(id) {
    await promised(this.#store("readwrite").delete(id));
    this.#tabs.postMessage(id);
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

/** What is being written, for this tab, through a reload. */
export function readDraft() {
  try {
    return sessionStorage.getItem(DRAFT) ?? "";
  } catch {
    return "";
  }
}

export function writeDraft(text) {
  try {
    sessionStorage.setItem(DRAFT, text);
  } catch {
    // too long, or no storage: it stands in its field
  }
}
