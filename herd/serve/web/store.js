// Conversations as trees of messages: pure functions over plain objects, with no browser in them.
//
// A conversation holds all its messages in `nodes`, each with the id of its parent. Nothing is ever overwritten: an edit or a new try is a
// sibling. What is shown is the path from a root to `leaf`. A comparison is a second tip in the same tree, `compare.leaf`: the two paths
// share what was said before they part, and each is an ordinary branch once the comparison ends.

export const FORMAT = "herd-conversations";
export const NO_SETTINGS = {
  model: "", system: "", temperature: null, top_p: null, top_k: null, min_p: null, max_tokens: null, seed: null, stop: [],
};
export const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];

const IMAGE = /^data:image\/(png|jpeg|webp|gif);base64,[A-Za-z0-9+/]+=*$/;
const STATES = ["done", "stopped", "failed"];

/** An id that needs no secure context (crypto.randomUUID does). The letter keeps it from being read as an index of an array. */
export function newId(letter) {
  const bytes = crypto.getRandomValues(new Uint8Array(8));
  return letter + Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

export function newConversation(settings = NO_SETTINGS, now = Date.now()) {
  return { id: newId("c"), title: "", created: now, updated: now, settings: structuredClone(settings), compare: null, leaf: null, nodes: {} };
}

export function add(conversation, message, now = Date.now()) {
  const node = { id: newId("n"), parent: null, role: "user", text: "", images: [], at: now, ...message };
  conversation.nodes[node.id] = node;
  conversation.updated = now;
  return node;
}

/** The messages from the root to this one. */
export function path(conversation, leaf) {
  const found = [];
  for (let node = conversation.nodes[leaf]; node; node = conversation.nodes[node.parent]) found.push(node);
  return found.reverse();
}

/** A message and its alternatives, oldest first. */
export function siblings(conversation, node) {
  return Object.values(conversation.nodes).filter((other) => other.parent === node.parent);
}

/** The newest message below this one, taking the newest branch at every fork. */
export function deepest(conversation, id) {
  const newest = {};
  for (const node of Object.values(conversation.nodes)) newest[node.parent] = node.id;
  while (newest[id]) id = newest[id];
  return id;
}

/** One lane, or two while comparing: its settings and the last message of its path. */
export function lanes(conversation) {
  const first = { settings: conversation.settings, leaf: conversation.leaf };
  return conversation.compare ? [first, conversation.compare] : [first];
}

function setTip(conversation, lane, id) {
  if (lane === 1) conversation.compare.leaf = id;
  else conversation.leaf = id;
}

/** What is shown, line by line: one message, or, where two lanes have parted, one of each. */
export function rows(conversation) {
  const paths = lanes(conversation).map((lane) => path(conversation, lane.leaf));
  const length = Math.max(...paths.map((nodes) => nodes.length));
  return Array.from({ length }, (_, i) => {
    const [first, second] = paths.map((nodes) => nodes[i]);
    return second === undefined || second === first ? [first] : [first, second];
  });
}

/** Say something in every lane. Returns the empty replies, each with its lane. `parents`: after which message, by lane. */
export function ask(conversation, text, images = [], parents = lanes(conversation).map((lane) => lane.leaf), now = Date.now()) {
  if (!Object.keys(conversation.nodes).length && !conversation.title) conversation.title = titleOf(text);
  let user = null;
  return parents.map((parent, lane) => {
    if (!user || user.parent !== parent) user = add(conversation, { parent, text, images: [...images] }, now);
    return answer(conversation, user.id, lane, now);
  });
}

/** Say it differently: `row` is a line of `rows` that holds the user's message. The old wording stays as a sibling. */
export function edit(conversation, row, text, images = []) {
  return ask(conversation, text, images, lanes(conversation).map((_, lane) => (row[lane] ?? row[0]).parent));
}

/** Another try at a reply, in the lane it stands in, or in both where it stands in both. */
export function regenerate(conversation, row, node) {
  const which = row.length === 2 ? [row.indexOf(node)] : lanes(conversation).map((_, lane) => lane);
  return which.map((lane) => answer(conversation, node.parent, lane));
}

function answer(conversation, parent, lane, now = Date.now()) {
  const { model } = lanes(conversation)[lane].settings;
  const node = add(conversation, { parent, role: "assistant", model, state: "waiting" }, now);
  setTip(conversation, lane, node.id);
  return { node, lane };
}

/** Show another alternative of a message, `step` to the right. Lanes that had parted after it meet again. */
export function turn(conversation, node, step) {
  const all = siblings(conversation, node);
  const other = all[all.indexOf(node) + step];
  if (!other) return;
  conversation.leaf = deepest(conversation, other.id);
  if (conversation.compare) conversation.compare.leaf = conversation.leaf;
}

export function startCompare(conversation, model) {
  const settings = { ...structuredClone(conversation.settings), model: model || conversation.settings.model };
  conversation.compare = { settings, leaf: conversation.leaf };
}

/** Go on with one lane alone. The other stays in the tree, beside it. */
export function keep(conversation, lane) {
  const { settings, leaf } = lanes(conversation)[lane];
  Object.assign(conversation, { settings, leaf, compare: null });
}

/** The body of a request for this reply, in the words of OpenAI's API. What is not set is left to the server. */
export function requestBody(conversation, reply, settings) {
  const said = path(conversation, reply.parent).filter((node) => node.text || node.images.length);
  const messages = said.map(({ role, text, images }) => ({ role, content: images.length ? parts(text, images) : text }));
  if (settings.system.trim()) messages.unshift({ role: "system", content: settings.system });
  const body = { model: settings.model, messages, stream: true, stream_options: { include_usage: true }, return_progress: true };
  for (const name of NUMBERS) {
    if (settings[name] !== null) body[name === "max_tokens" ? "max_completion_tokens" : name] = settings[name];
  }
  if (settings.stop.length) body.stop = settings.stop;
  return body;
}

function parts(text, images) {
  const shown = images.map((url) => ({ type: "image_url", image_url: { url } }));
  return text ? [...shown, { type: "text", text }] : shown;
}

export function titleOf(text) {
  const line = text.trim().split("\n")[0].replace(/[*`#]+/g, "").replace(/\s+/g, " ").trim();
  return line.length > 60 ? `${line.slice(0, 57).trimEnd()}…` : line || "An image";
}

/** Conversations that hold every word, newest first, each with the place where it was found. */
export function search(conversations, query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  const newest = [...conversations].sort((a, b) => b.updated - a.updated);
  if (!words.length) return newest.map((conversation) => ({ conversation, excerpt: "" }));
  return newest.flatMap((conversation) => {
    const texts = Object.values(conversation.nodes).map((node) => node.text);
    const all = [conversation.title, ...texts].join("\n").toLowerCase();
    if (!words.every((word) => all.includes(word))) return [];
    const text = texts.find((candidate) => candidate.toLowerCase().includes(words[0])) ?? "";
    const at = Math.max(0, text.toLowerCase().indexOf(words[0]) - 20);
    return [{ conversation, excerpt: text.slice(at, at + 80).replace(/\s+/g, " ") }];
  });
}

export function exported(conversations) {
  return JSON.stringify({ format: FORMAT, version: 1, conversations }, null, 1);
}

/** Read what `exported` wrote. Takes what it knows, field by field, since the file may come from anywhere. Throws an Error in plain words. */
export function imported(text) {
  let data;
  try {
    data = JSON.parse(text);
  } catch {
    throw new Error("The file is not JSON.");
  }
  if (data?.format !== FORMAT || !Array.isArray(data.conversations)) throw new Error("The file holds no conversations of herd.");
  if (data.version !== 1) throw new Error(`The file is of version ${data.version}; this page reads version 1.`);
  return data.conversations.map((found, i) => {
    try {
      return conversationFrom(found);
    } catch (error) {
      throw new Error(`Conversation ${i + 1} of the file is damaged: ${error.message}.`);
    }
  });
}

/** Those of a file that are not here yet. One that has the id of another, but was changed since, comes in beside it. */
export function unknown(found, here) {
  const known = new Map(here.map((conversation) => [conversation.id, conversation]));
  return found
    .filter((one) => known.get(one.id)?.updated !== one.updated)
    .map((one) => (known.has(one.id) ? { ...one, id: newId("c") } : one));
}

/** Take over what another tab has stored of this conversation: messages that are not here, and replies that have grown there since. */
export function merge(conversation, stored) {
  for (const [id, node] of Object.entries(stored.nodes)) {
    const here = conversation.nodes[id];
    if (!here) conversation.nodes[id] = node;
    else if (node.at > here.at) Object.assign(here, node, { error: node.error });
  }
}

/** `merge`, and show what the other tab shows, where that goes on from what is shown here. */
export function follow(conversation, stored) {
  merge(conversation, stored);
  conversation.title = stored.title;
  conversation.updated = stored.updated;
  const goesOn = !conversation.leaf || path(conversation, stored.leaf).some(({ id }) => id === conversation.leaf);
  if (goesOn && !conversation.compare && !stored.compare) conversation.leaf = stored.leaf;
}

/** A stored conversation after the page has gone: replies that were under way have stopped. */
export function settled(conversation) {
  for (const node of Object.values(conversation.nodes)) {
    if (node.role === "assistant" && !STATES.includes(node.state)) node.state = "stopped";
  }
  return conversation;
}

function check(isRight, what) {
  if (!isRight) throw new Error(what);
}

const isId = (value, letter) => typeof value === "string" && new RegExp(`^${letter}[0-9a-f]{16}$`).test(value);
const number = (value, otherwise = null) => (Number.isFinite(value) ? value : otherwise);
const string = (value) => (typeof value === "string" ? value : "");

function conversationFrom(found) {
  check(isId(found?.id, "c"), "it has no id");
  check(typeof found.nodes === "object" && found.nodes, "it has no messages");
  const nodes = {};
  for (const value of Object.values(found.nodes)) {
    const node = nodeFrom(value);
    check(node.parent === null || nodes[node.parent], "a message stands before the one it answers"); // so there is no circle
    nodes[node.id] = node;
  }
  const tip = (id) => (isId(id, "n") && nodes[id] ? id : Object.keys(nodes).at(-1) ?? null);
  const compare = found.compare && { settings: settingsFrom(found.compare.settings), leaf: tip(found.compare.leaf) };
  return {
    id: found.id, title: string(found.title).slice(0, 200), created: number(found.created, 0), updated: number(found.updated, 0),
    settings: settingsFrom(found.settings), compare: compare || null, leaf: tip(found.leaf), nodes,
  };
}

function nodeFrom(found) {
  check(isId(found?.id, "n"), "a message has no id");
  check(found.role === "user" || found.role === "assistant", "a message has no role");
  check(found.parent === null || isId(found.parent, "n"), "a message has no place");
  const images = Array.isArray(found.images) ? found.images : [];
  check(images.every((url) => typeof url === "string" && IMAGE.test(url)), "it has a picture that is none");
  const node = { id: found.id, parent: found.parent, role: found.role, text: string(found.text), images, at: number(found.at, 0) };
  if (node.role === "user") return node;
  const usage = found.usage && { prompt_tokens: number(found.usage.prompt_tokens, 0), completion_tokens: number(found.usage.completion_tokens, 0) };
  return {
    ...node, model: string(found.model), state: STATES.includes(found.state) ? found.state : "stopped", finish: string(found.finish),
    ...(usage && { usage }), firstMs: number(found.firstMs), rate: number(found.rate),
    ...(found.error && { error: { kind: string(found.error.kind), message: string(found.error.message) } }),
  };
}

export function settingsFrom(found) {
  const settings = { ...structuredClone(NO_SETTINGS), model: string(found?.model), system: string(found?.system) };
  for (const name of NUMBERS) settings[name] = number(found?.[name]);
  if (Array.isArray(found?.stop)) settings.stop = found.stop.filter((word) => typeof word === "string" && word);
  return settings;
}
