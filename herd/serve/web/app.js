// The page: what there is (the state), what people can do (the actions), and which event does what.

import { listModels } from "./api.js";
import { Chat } from "./chat.js";
import { Database, readDraft, readPreferences, writeDraft, writePreferences } from "./database.js";
import { dataUri, listen } from "./images.js";
import { listenToList } from "./list.js";
import { applyTheme, download, nextTheme, openSettings } from "./settings.js";
import * as store from "./store.js";
import * as view from "./view.js";

const { $ } = view;
const RECONNECT_MS = 5000;

const preferences = readPreferences();
const state = {
  models: [],
  isLoading: true, // the models, for the first time
  conversations: [],
  current: store.newConversation(store.settingsFrom(preferences.settings)),
  images: [], // of the message that is being written
  editing: null, // id of the message that is being edited
  isFollowing: true, // the end of the page, as replies grow
};
let database = null;
let reconnecting = null;

const chat = new Chat({
  key: () => preferences.key,
  grown: (conversation, reply) => {
    if (conversation === state.current) drawSoon(reply);
  },
  changed: (conversation, reply) => {
    if (conversation !== state.current) return;
    showCurrent();
    if (reply.state === "waiting") view.announce("Waiting for the reply.");
    if (reply.state === "done") view.announce(`${reply.model} says: ${reply.text.slice(0, 2000)}`);
    if (reply.state === "stopped") view.announce("Stopped.");
    if (reply.error?.kind === "offline") connect();
  },
  save,
});

// What is shown

const grown = new Map(); // replies that grew since the last frame

function drawSoon(reply) {
  if (!grown.size) {
    requestAnimationFrame(() => {
      for (const one of grown.values()) view.growReply(one);
      grown.clear();
      follow();
    });
  }
  grown.set(reply.id, reply);
}

function follow() {
  const scroll = $("scroll");
  if (state.isFollowing) scroll.scrollTop = scroll.scrollHeight;
  $("latest").hidden = state.isFollowing;
}

function showCurrent() {
  const { current } = state;
  view.showMessages(current, state);
  view.showContext(current, state.models);
  const isUnderWay = underWay().length > 0;
  $("send").hidden = isUnderWay;
  $("stop").hidden = !isUnderWay;
  $("compare").setAttribute("aria-pressed", String(Boolean(current.compare)));
  document.body.classList.toggle("comparing", Boolean(current.compare));
  const isStored = state.conversations.includes(current);
  history.replaceState(null, "", isStored ? `#${current.id}` : location.pathname); // a reload comes back to it
  document.title = current.title ? `${current.title} · herd` : "herd";
  follow();
}

function showModels() {
  store.lanes(state.current).forEach(({ settings }, lane) => {
    if (!settings.model && state.models.length) settings.model = state.models[0].id;
    view.showModels($(`model${lane}`), state.models, settings.model, state.isLoading);
  });
}

function showAll() {
  showModels();
  showCurrent();
  showList();
}

function showList() {
  const query = $("search").value;
  view.showList(store.search(state.conversations, query), state.current, Boolean(query.trim()));
}

function underWay() {
  return Object.values(state.current.nodes).filter((node) => chat.isRunning(node));
}

// What is kept

async function save(conversation) {
  if (!state.conversations.includes(conversation)) return; // deleted meanwhile
  try {
    await database?.save(conversation);
  } catch (error) {
    const why = error.name === "QuotaExceededError" ? "The browser has no more room" : "The browser did not keep this";
    view.toast(`${why}: export the chats you need, and delete some.`);
  }
}

function changedSettings() {
  preferences.settings = { ...state.current.settings, system: "", seed: null };
  writePreferences(preferences);
  save(state.current);
}

async function connect() {
  clearTimeout(reconnecting);
  try {
    state.models = await listModels(preferences.key);
    $("banner").hidden = true;
  } catch (error) {
    $("banner").hidden = false;
    $("banner-text").textContent = error.kind === "key" ? "The server asks for an API key. Put it into the settings." : error.message;
    reconnecting = setTimeout(connect, RECONNECT_MS);
  }
  state.isLoading = false;
  showModels();
  showCurrent();
}

/** Another tab has stored or deleted a conversation. */
async function changedElsewhere(id) {
  const stored = await database.one(id);
  const here = state.conversations.find((conversation) => conversation.id === id);
  if (!stored) state.conversations = state.conversations.filter((conversation) => conversation !== here);
  else if (here) store.follow(here, stored);
  else state.conversations.push(stored);
  showList();
  if (here === state.current) showCurrent();
}

// What people can do

function start(replies) {
  const { current } = state;
  if (!state.conversations.includes(current)) state.conversations.push(current);
  state.isFollowing = true;
  for (const { node, lane } of replies) chat.run(current, node, store.lanes(current)[lane].settings);
  save(current);
  showAll();
}

function send(text, images) {
  if ((!text.trim() && !images.length) || underWay().length) return false;
  start(store.ask(state.current, text.trim(), images));
  return true;
}

/** Start what is said instead of these messages, once the replies under way to them have stopped. */
async function startInstead(messages, make) {
  const { current } = state;
  const isTo = (reply) => store.path(current, reply.id).some((node) => messages.includes(node));
  await chat.stopped(underWay().filter(isTo));
  if (state.current === current) start(make());
}

function open(conversation) {
  state.current = conversation;
  state.editing = null;
  state.isFollowing = true;
  showSidebar(false);
  showAll();
}

function showSidebar(isOpen) {
  document.body.classList.toggle("sidebar-open", isOpen);
  $("menu").setAttribute("aria-expanded", String(isOpen));
}

function openNew() {
  open(store.newConversation(store.settingsFrom(preferences.settings)));
  $("input").focus();
}

function rename(conversation, item) {
  const field = view.el("input", { value: conversation.title, className: "rename", "aria-label": "New name" });
  const done = (isKept) => {
    field.onblur = null;
    if (isKept && field.value.trim()) conversation.title = field.value.trim().slice(0, 200);
    save(conversation);
    showAll();
  };
  field.onblur = () => done(true);
  field.onkeydown = (event) => {
    if (event.key === "Enter" || event.key === "Escape") {
      event.stopPropagation();
      done(event.key === "Enter");
    }
  };
  item.replaceChildren(field);
  field.select();
}

function remove(conversation) {
  chat.stop(Object.values(conversation.nodes));
  state.conversations = state.conversations.filter((other) => other !== conversation);
  database?.remove(conversation.id);
  if (conversation === state.current) openNew();
  else showList();
  view.toast(`Deleted “${conversation.title}”.`, "Undo", () => {
    state.conversations.push(conversation);
    save(conversation);
    showList();
  });
}

async function attach(files) {
  for (const file of files) {
    try {
      state.images.push(await dataUri(file));
    } catch (error) {
      view.toast(error.message);
    }
  }
  view.showAttached(state.images);
  $("input").focus();
}

async function importFile(file) {
  try {
    const found = store.unknown(store.imported(await file.text()), state.conversations);
    state.conversations.push(...found);
    for (const conversation of found) await save(conversation);
    view.toast(found.length === 1 ? "One chat came in." : `${found.length} chats came in.`);
  } catch (error) {
    view.toast(error.message);
  }
  $("settings").close();
  showList();
}

/** The message that a control belongs to, and its line. */
function messageOf(element) {
  const node = state.current.nodes[element.closest("[data-id]")?.dataset.id];
  return { node, row: store.rows(state.current).find((row) => row.includes(node)) };
}

function conversationOf(element) {
  return state.conversations.find(({ id }) => id === element.closest("[data-id]").dataset.id);
}

function edit(id) {
  state.editing = id;
  showCurrent();
  if (id) $("edit").focus();
  else $("input").focus();
}

const actions = {
  new: openNew,
  open: (element) => open(conversationOf(element)),
  rename: (element) => rename(conversationOf(element), element.closest("li")),
  delete: (element) => remove(conversationOf(element)),
  sidebar: () => {
    const isOpen = !document.body.classList.contains("sidebar-open");
    showSidebar(isOpen);
    (isOpen ? $("search") : $("menu")).focus();
  },
  theme: () => {
    preferences.theme = nextTheme(preferences.theme);
    writePreferences(preferences);
    applyTheme(preferences.theme);
  },
  settings: (element) => {
    const lane = Number(element.dataset.lane ?? 0);
    const title = state.current.compare ? `Settings of ${"AB"[lane]}` : "Settings";
    openSettings({ settings: store.lanes(state.current)[lane].settings, preferences, title, changed: changedSettings });
  },
  compare: () => {
    if (state.current.compare) store.keep(state.current, 0);
    else store.startCompare(state.current, state.models.find(({ id }) => id !== state.current.settings.model)?.id);
    save(state.current);
    showAll();
  },
  keep: (element) => {
    store.keep(state.current, Number(element.dataset.lane));
    save(state.current);
    showAll();
  },
  idea: (element) => send(element.textContent, []),
  attach: () => $("files").click(),
  detach: (element) => {
    state.images.splice(Number(element.dataset.index), 1);
    view.showAttached(state.images);
    $("input").focus();
  },
  stop: () => chat.stop(underWay()),
  "stop-one": (element) => chat.stop([messageOf(element).node]),
  latest: () => {
    state.isFollowing = true;
    follow();
  },
  reconnect: connect,
  edit: (element) => edit(messageOf(element).node.id),
  "cancel-edit": () => edit(null),
  "save-edit": (element) => {
    const { node, row } = messageOf(element);
    const text = $("edit").value.trim();
    if (!text && !node.images.length) return;
    state.editing = null;
    startInstead(row, () => store.edit(state.current, row, text, node.images));
  },
  turn: (element) => {
    store.turn(state.current, messageOf(element).node, Number(element.dataset.step));
    state.isFollowing = false;
    save(state.current);
    showCurrent();
  },
  regenerate: (element) => {
    const { node, row } = messageOf(element);
    startInstead([node], () => store.regenerate(state.current, row, node));
  },
  retry: async (element) => {
    const { node, row } = messageOf(element);
    const lane = row.length === 2 ? row.indexOf(node) : 0;
    await chat.stopped([node]);
    start([{ node, lane }]);
  },
  copy: (element) => copyFrom(element, messageOf(element).node.text),
  export: () => download("herd-chats.json", store.exported(state.conversations)),
  "export-one": () => download("herd-chat.json", store.exported([state.current])),
  import: () => $("import-file").click(),
};

async function copyFrom(element, text) {
  await view.copy(text);
  element.classList.add("is-copied");
  view.announce("Copied.");
  setTimeout(() => element.classList.remove("is-copied"), 1500);
}

// Which event does what

document.addEventListener("click", (event) => {
  const code = event.target.closest("button.copy");
  if (code) copyFrom(code, code.closest("figure").querySelector("pre").textContent);
  const element = event.target.closest("[data-act]");
  if (element && !element.disabled) actions[element.dataset.act](element);
});

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (!send($("input").value, state.images)) return;
  $("input").value = "";
  writeDraft("");
  state.images = [];
  view.showAttached([]);
  fit();
});

document.addEventListener("keydown", (event) => {
  const isSend = event.key === "Enter" && !event.shiftKey && !event.isComposing && !matchMedia("(pointer: coarse)").matches;
  if (isSend && event.target === $("input")) {
    event.preventDefault();
    $("composer").requestSubmit();
  } else if (isSend && event.target.id === "edit") {
    event.preventDefault();
    actions["save-edit"](event.target);
  } else if (event.key === "Escape" && !$("settings").open) {
    if (state.editing) edit(null);
    else if (document.body.classList.contains("sidebar-open")) actions.sidebar();
    else actions.stop();
  } else if (event.key.toLowerCase() === "k" && (event.ctrlKey || event.metaKey) && !$("settings").open) {
    event.preventDefault();
    showSidebar(true);
    $("search").select();
  }
});

listenToList({ showList, openNew });

for (const lane of [0, 1]) {
  $(`model${lane}`).addEventListener("change", (event) => {
    store.lanes(state.current)[lane].settings.model = event.target.value;
    changedSettings();
    showCurrent();
  });
}

$("files").addEventListener("change", (event) => (attach([...event.target.files]), (event.target.value = "")));
$("import-file").addEventListener("change", (event) => (importFile(event.target.files[0]), (event.target.value = "")));
$("settings").addEventListener("close", connect); // perhaps with another key

listen(attach);

function fit() {
  const field = $("input");
  field.style.height = "auto";
  field.style.height = `${field.scrollHeight}px`;
}
$("input").addEventListener("input", () => (fit(), writeDraft($("input").value)));

$("scroll").addEventListener("scroll", () => {
  const { scrollTop, scrollHeight, clientHeight } = $("scroll");
  state.isFollowing = scrollHeight - scrollTop - clientHeight < 60;
  $("latest").hidden = state.isFollowing;
});

new ResizeObserver(() => (follow(), view.reachScrollers())).observe($("log")); // pictures and formulas come late

setInterval(view.tick, 500);

async function begin() {
  applyTheme(preferences.theme);
  $("input").value ||= readDraft();
  fit();
  try {
    database = await Database.open();
    database.listen(changedElsewhere);
    state.conversations = (await database.all()).map(store.settled);
  } catch {
    view.toast("This browser keeps nothing here: chats are gone when the page closes.");
  }
  const last = state.conversations.find(({ id }) => `#${id}` === location.hash);
  if (last) state.current = last;
  showAll();
  await connect();
  document.body.dataset.ready = "";
}

begin();
