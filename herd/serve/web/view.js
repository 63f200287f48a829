// What is on the page: the list of conversations, the messages, the bars. It makes elements from the state and calls no server; what people
// do comes back through `data-act` attributes, which app.js listens to in one place.

import { show } from "./markdown.js";
import { typeset } from "./maths.js";
import { rows, siblings } from "./store.js";

const SVG = "http://www.w3.org/2000/svg";
const bodies = new Map(); // id of a reply: the element of its text, kept while the page is rebuilt around it
const drawn = new Map(); // a line of messages: what it was made of, and its element

export const $ = (id) => document.getElementById(id);

/** An element. Properties that start with `data-` or `aria-`, or hold a dash, become attributes. */
export function el(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === undefined || value === null) continue;
    if (name.includes("-") || name === "role") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const use = document.createElementNS(SVG, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  return svg;
}

function button(act, label, picture, more = {}) {
  return el("button", { type: "button", className: "quiet", "data-act": act, "aria-label": label, title: label, ...more }, icon(picture));
}

/** The list of conversations, newest first; `found` comes from `search`. */
export function showList(found, current, isSearching) {
  const entry = ({ conversation, excerpt }) => {
    const isCurrent = conversation === current;
    const text = [el("span", { className: "name" }, conversation.title || "New chat")];
    if (excerpt) text.push(el("span", { className: "excerpt" }, excerpt));
    const open = { type: "button", className: "open", "data-act": "open", "data-key": `open ${conversation.id}`, "aria-current": isCurrent || null };
    return el(
      "li",
      { "data-id": conversation.id, className: isCurrent ? "current" : "" },
      el("button", open, ...text),
      button("rename", `Rename ${conversation.title}`, "pencil"),
      button("delete", `Delete ${conversation.title}`, "bin"),
    );
  };
  const none = isSearching ? "Nothing found. Enter starts a new chat." : "";
  $("conversations").replaceChildren(...found.map(entry));
  $("none-found").textContent = found.length ? "" : none;
}

/** All messages of a conversation. Lines that are as they were keep their elements, and what is selected or typed in them; focus stays. */
export function showMessages(conversation, { editing, models }) {
  const focused = document.activeElement?.dataset?.key;
  const lines = rows(conversation).filter((row) => row[0]);
  const log = $("log");
  const held = lines.map((row) => keptLine(conversation, row, editing));
  for (const [key, { element }] of drawn) if (!held.includes(element)) drawn.delete(key);
  replace(log, held);
  log.classList.toggle("is-comparing", Boolean(conversation.compare));
  $("welcome").hidden = lines.length > 0;
  $("heading").textContent = conversation.title;
  $("heading").hidden = !lines.length;
  $("welcome-text").textContent = models.length ? `You are talking to ${conversation.settings.model || models[0].id}.` : "";
  for (const id of bodies.keys()) if (!conversation.nodes[id]) bodies.delete(id);
  if (focused) document.querySelector(`[data-key="${CSS.escape(focused)}"]`)?.focus();
}

function keptLine(conversation, row, editing) {
  const key = row.map(({ id }) => id).join(" ");
  const before = drawn.get(key);
  const parts = (node) => [{ ...node, text: "", images: node.images.length }, siblings(conversation, node).map(({ id }) => id), editing === node.id];
  const made = JSON.stringify(row.map(parts)); // without the text: a string is compared with itself at once
  if (before?.made === made && row.every(({ text }, i) => text === before.texts[i])) return before.element;
  const element = line(conversation, row, editing);
  drawn.set(key, { made, texts: row.map(({ text }) => text), element });
  return element;
}

/** Make these the children, touching none that stays: to be taken out and put back costs a node its selection, and the page its layout. */
function replace(parent, children) {
  let at = parent.firstChild;
  for (const child of children) {
    if (child === at) at = at.nextSibling;
    else parent.insertBefore(child, at);
  }
  while (at) {
    const next = at.nextSibling;
    at.remove();
    at = next;
  }
}

function line(conversation, row, editing) {
  if (row[0].role === "user") return said(conversation, row, editing);
  const columns = row.map((node, lane) => reply(conversation, node, { isColumn: row.length > 1, lane }));
  return row.length > 1 ? el("div", { className: "columns" }, ...columns) : columns[0];
}

function said(conversation, row, editing) {
  const [node] = row;
  const images = node.images.map((url, i) => el("img", { src: url, alt: `Picture ${i + 1} of the message` }));
  const attributes = { className: "said", "data-id": node.id, "aria-label": "You said" };
  if (editing === node.id) {
    const field = el("textarea", { value: node.text, rows: Math.min(12, node.text.split("\n").length + 1), id: "edit", "aria-label": "Edit the message" });
    const buttons = el(
      "div",
      { className: "edit-buttons" },
      el("button", { type: "button", "data-act": "cancel-edit" }, "Cancel"),
      el("button", { type: "button", className: "primary", "data-act": "save-edit" }, "Send"),
    );
    return el("article", attributes, el("div", { className: "editing" }, field, buttons));
  }
  const pictures = images.length ? el("div", { className: "pictures" }, images) : null;
  const bubble = el("div", { className: "bubble" }, pictures, el("p", { dir: "auto" }, node.text));
  const bar = el("div", { className: "bar" }, arrows(conversation, node), button("edit", "Edit", "pencil"), button("copy", "Copy", "copy"));
  return el("article", attributes, bubble, bar);
}

function reply(conversation, node, { isColumn, lane }) {
  const isUnderWay = ["waiting", "streaming", "busy"].includes(node.state);
  const attributes = { className: "reply", "data-id": node.id, "data-state": node.state, "aria-label": `Reply of ${node.model}`, "aria-busy": String(isUnderWay) };
  const label = isColumn ? el("header", {}, el("span", { className: `lane lane${lane}` }, "AB"[lane]), node.model) : null;
  const waits = node.state === "waiting" ? waiting(node) : null;
  const bar = el(
    "div",
    { className: "bar" },
    isColumn ? null : arrows(conversation, node),
    button("copy", "Copy", "copy"),
    button("regenerate", "Regenerate", "again", { "data-key": `again ${node.parent} ${lane}` }),
    isColumn ? el("button", { type: "button", className: "quiet text", "data-act": "keep", "data-lane": String(lane) }, "Keep this one") : null,
    el("span", { className: "facts" }, facts(node)),
  );
  return el("article", attributes, label, body(node), waits, notice(node), isUnderWay || (node.error && !node.text) ? null : bar);
}

function waiting(node) {
  const dots = el("p", { className: "waiting", "aria-label": "Waiting for the reply" }, el("i"), el("i"), el("i"));
  if (node.progress) dots.append(el("span", {}, `Reading the prompt: ${Math.round(node.progress * 100)} %`));
  return dots;
}

function body(node) {
  if (!bodies.has(node.id)) bodies.set(node.id, el("div", { className: "prose" }));
  const element = bodies.get(node.id);
  show(element, node.text, document);
  typeset(element);
  return element;
}

/** The text of a reply that grows; the rest of the page stays as it is. */
export function growReply(node) {
  if (bodies.get(node.id)?.isConnected) body(node);
}

function arrows(conversation, node) {
  const all = siblings(conversation, node);
  if (all.length < 2) return null;
  const at = all.indexOf(node);
  const step = (by, label, picture) =>
    button("turn", label, picture, { "data-step": String(by), disabled: !all[at + by], "data-key": `turn ${node.parent} ${node.role} ${by}` });
  const count = el("span", { "aria-label": `Version ${at + 1} of ${all.length}` }, `${at + 1}/${all.length}`);
  return el("span", { className: "arrows" }, step(-1, "Previous version", "left"), count, step(1, "Next version", "right"));
}

function facts(node) {
  const found = [];
  if (node.state === "stopped") found.push("stopped");
  if (node.finish === "length") found.push("cut at the limit of tokens");
  if (node.usage) found.push(`${node.usage.completion_tokens.toLocaleString()} tokens`);
  if (node.rate) found.push(`${node.rate < 10 ? node.rate.toFixed(1) : Math.round(node.rate)} tokens/s`);
  if (node.firstMs) found.push(`first after ${(node.firstMs / 1000).toFixed(node.firstMs < 950 ? 2 : 1)} s`);
  return found.join(" · ");
}

const TITLES = {
  offline: "No connection", key: "An API key is needed", busy: "The server is busy", full: "The context is full", refused: "The server refused this",
  failed: "The reply failed",
};
const ADVICE = {
  full: "Start a new chat, or edit an earlier message: what came after it then no longer counts. A shorter system prompt helps too.",
};

function notice(node) {
  if (!node.error) return null;
  const { kind, message } = node.error;
  const act = (name, label) => el("button", { type: "button", "data-act": name }, label);
  const buttons = kind === "busy" && node.retryAt ? [act("retry", "Try now"), act("stop-one", "Cancel")] : [act("retry", "Try again")];
  if (kind === "key") buttons.unshift(act("settings", "Open settings"));
  if (kind === "full") buttons.unshift(act("new", "New chat"));
  return el(
    "div",
    { className: `notice ${kind}`, role: "alert" },
    el("strong", {}, TITLES[kind] ?? TITLES.failed),
    el("p", {}, message),
    ADVICE[kind] ? el("p", {}, ADVICE[kind]) : null,
    node.retryAt ? el("p", { className: "countdown", "data-until": String(node.retryAt) }, countdown(node.retryAt)) : null,
    el("div", { className: "notice-buttons" }, ...buttons),
  );
}

function countdown(until) {
  return `Trying again in ${Math.max(0, Math.ceil((until - Date.now()) / 1000))} s`;
}

export function tick() {
  for (const element of document.querySelectorAll(".countdown")) element.textContent = countdown(Number(element.dataset.until));
}

/** What scrolls sideways can be reached with the keyboard, and nothing else of a text: not all browsers see to that. */
export function reachScrollers() {
  for (const element of document.querySelectorAll(".prose :is(pre, .table, .maths.display)")) {
    const index = element.scrollWidth > element.clientWidth ? 0 : -1;
    if (element.tabIndex !== index) element.tabIndex = index;
  }
}

/** How much of the context the shown path takes, from the last reply that told; of two lanes, the fuller. */
export function showContext(conversation, models) {
  const last = rows(conversation).findLast((row) => row.some((node) => node?.usage)) ?? [];
  const all = last.filter((node) => node?.usage).map((node) => contextOf(node, models));
  const [fullest] = all.sort((a, b) => b.share - a.share || b.tokens - a.tokens);
  $("context").hidden = !fullest;
  if (!fullest) return;
  const { tokens, length, share } = fullest;
  const left = `${Math.max(0, length - tokens).toLocaleString()} tokens left`;
  const level = share >= 0.98 ? "full" : share > 0.85 ? "low" : "";
  const used = length ? `${tokens.toLocaleString()} of ${length.toLocaleString()} tokens` : `${tokens.toLocaleString()} tokens`;
  $("context-text").textContent = { full: "Context full: start a new chat", low: `Nearly full: ${left}`, "": used }[level];
  $("context").title = length ? `${used} of the context` : "";
  $("context-bar").hidden = !length;
  $("context-bar").value = share;
  $("context").dataset.level = level;
}

function contextOf(node, models) {
  const length = models.find(({ id }) => id === node.model)?.context ?? 0;
  const tokens = node.usage.prompt_tokens + node.usage.completion_tokens;
  return { tokens, length, share: length ? Math.min(1, tokens / length) : 0 };
}

export function showModels(select, models, chosen, isLoading) {
  const names = models.map(({ id }) => id);
  if (chosen && !names.includes(chosen)) names.push(chosen);
  const none = el("option", { value: "" }, isLoading ? "Loading models…" : "No models");
  select.replaceChildren(...names.map((name) => el("option", { value: name, selected: name === chosen }, name)), ...(names.length ? [] : [none]));
  select.disabled = names.length === 0;
}

export function showAttached(images) {
  $("attached").hidden = !images.length;
  $("attached").replaceChildren(
    ...images.map((url, i) =>
      el("figure", {}, el("img", { src: url, alt: `Picture ${i + 1}` }), button("detach", `Remove picture ${i + 1}`, "cross", { "data-index": String(i) })),
    ),
  );
}

let toastTimer;

/** A line at the bottom that goes away by itself, with one thing to do about it. */
export function toast(text, label = "", act = null) {
  clearTimeout(toastTimer);
  const close = () => ($("toast").hidden = true);
  const action = label ? el("button", { type: "button", onclick: () => (close(), act()) }, label) : null;
  $("toast").replaceChildren(el("span", {}, text), ...(action ? [action] : []));
  $("toast").hidden = false;
  toastTimer = setTimeout(close, 8000);
}

/** For those who listen: said once, politely. */
export function announce(text) {
  $("announcer").textContent = text;
}

export async function copy(text) {
  if (navigator.clipboard) {
    await navigator.clipboard.writeText(text);
    return;
  }
  const field = el("textarea", { value: text, className: "unseen" }); // over plain HTTP from another machine there is no clipboard
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
}
