// Markdown of a model's reply, as nodes of the page. A reply is somebody else's text, so nothing in it is ever read as HTML: the text is
// parsed into plain objects, and `toDom` makes elements of those, from a short list of tags and attributes, with links checked once more.
// Pictures become links: fetching one would tell its server that, and what, the model wrote.
//
// Every search for an end (of emphasis, code, brackets) that failed is remembered, so that no text takes quadratic time.

import { highlight } from "./highlight.js";

const TAGS = new Set(
  "a blockquote br button code del div em figcaption figure h3 h4 h5 h6 hr li ol p pre span strong table tbody td th thead tr ul".split(" "),
);
const ATTRIBUTES = new Set(["class", "href", "start", "title", "type"]);
const MAX_DEPTH = 12;
const MAX_FORMULA = 100; // lines

const h = (tag, attributes, ...children) => ({ tag, attributes: attributes ?? {}, children: children.flat() });

/** The address if it may be followed, else null. Relative ones may not: a reply knows nothing of this page. */
export function safeUrl(url) {
  const plain = url.replace(/[\u0000-\u0020\u007f-\u00a0\u200b-\u200f\u2028-\u202f\ufeff]/g, "");
  return /^(https?:\/\/|mailto:)[^"'<>\\]+$/i.test(plain) ? plain : null;
}

const FENCE = /^( {0,3})(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(\S.*)$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)(.*)$/;
const DIVIDER = /^ {0,3}\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const MATHS_OPEN = /^ {0,3}(\$\$|\\\[)/;

/** The blocks of a text, each with the lines it came from: while a reply grows, only the last ones change. */
export function blocks(text) {
  return parse(text.replace(/\r\n?/g, "\n").replace(/\t/g, "    ").split("\n"), 0);
}

function parse(lines, depth) {
  const found = [];
  for (let i = 0; i < lines.length; ) {
    if (!lines[i].trim()) {
      i += 1;
      continue;
    }
    const start = i;
    let node;
    [node, i] = block(lines, i, depth);
    found.push({ source: lines.slice(start, i).join("\n"), node });
  }
  return found;
}

/** The block that begins at line i, and the line after it. */
function block(lines, i, depth) {
  const line = lines[i];
  let match;
  if ((match = FENCE.exec(line))) return fence(lines, i, match);
  if ((match = HEADING.exec(line))) return [heading(match[1].length, match[2]), i + 1];
  if (RULE.test(line)) return [h("hr"), i + 1];
  if (MATHS_OPEN.test(line)) return maths(lines, i);
  if (depth < MAX_DEPTH && QUOTE.test(line)) return quote(lines, i, depth);
  if (depth < MAX_DEPTH && ITEM.test(line)) return list(lines, i, depth);
  if (line.includes("|") && i + 1 < lines.length && isDivider(lines, i)) return table(lines, i);
  return paragraph(lines, i, depth);
}

function isDivider(lines, i) {
  return lines[i + 1].includes("-") && DIVIDER.test(lines[i + 1]) && cells(lines[i]).length === cells(lines[i + 1]).length;
}

/** Two levels down: the page itself has the first two. */
function heading(level, text) {
  return h(`h${Math.min(level + 2, 6)}`, { class: `level${level}` }, inline(text.trimEnd().replace(/\s#+$/, "")));
}

function fence(lines, i, [, indent, mark, info]) {
  const body = [];
  const isEnd = (line) => line.trim().startsWith(mark) && !line.trim().replaceAll(mark[0], "");
  for (i += 1; i < lines.length && !isEnd(lines[i]); i += 1) {
    body.push(lines[i].startsWith(indent) ? lines[i].slice(indent.length) : lines[i].trimStart());
  }
  return [codeBlock(body.join("\n"), info.trim().split(/\s/)[0].toLowerCase()), i + 1];
}

function codeBlock(code, language) {
  const pieces = highlight(code, language).map(([kind, text]) => (kind ? h("span", { class: `code-${kind}` }, text) : text));
  const bar = h("figcaption", null, h("span", null, language || "text"), h("button", { class: "copy", type: "button" }, "Copy"));
  return h("figure", { class: "code" }, bar, h("pre", null, h("code", null, pieces)));
}

/** A formula of its own. One that is not closed ends with the paragraph, and stays source: it may be growing. */
function maths(lines, i) {
  const [open] = MATHS_OPEN.exec(lines[i]);
  const close = open.trim() === "$$" ? "$$" : "\\]";
  const first = lines[i].slice(open.length);
  const at = lines.slice(i, i + MAX_FORMULA).findIndex((line, n) => (n ? line : first).includes(close));
  const end = at >= 0 ? i + at : lastOfParagraph(lines, i);
  const body = [first, ...lines.slice(i + 1, end + 1)];
  const [last, ...after] = at >= 0 ? body.pop().split(close) : [body.pop()];
  const shown = h("div", { class: at >= 0 ? "maths display" : "maths" }, [...body, last].join("\n").trim());
  const rest = after.join(close).trim();
  return [rest ? h("div", null, shown, h("p", null, inline(rest))) : shown, end + 1];
}

function lastOfParagraph(lines, i) {
  while (lines[i + 1]?.trim()) i += 1;
  return i;
}

function quote(lines, i, depth) {
  const inner = [];
  for (; i < lines.length && QUOTE.test(lines[i]); i += 1) inner.push(lines[i].replace(QUOTE, ""));
  return [h("blockquote", null, nodes(parse(inner, depth + 1))), i];
}

function nodes(found) {
  return found.map(({ node }) => node);
}

function list(lines, i, depth) {
  const [, indent, firstMark] = ITEM.exec(lines[i]);
  const isOrdered = /\d/.test(firstMark);
  const items = [];
  let isLoose = false;
  while (i < lines.length) {
    const match = ITEM.exec(lines[i]);
    if (!match || match[1].length > indent.length + 3 || /\d/.test(match[2]) !== isOrdered || RULE.test(lines[i])) break;
    const width = match[1].length + match[2].length + 1;
    const inner = [match[4]];
    let blank = false;
    for (i += 1; i < lines.length; i += 1) {
      const line = lines[i];
      if (!line.trim()) {
        blank = true;
        inner.push("");
        continue;
      }
      const deep = line.length - line.trimStart().length;
      if (deep < Math.min(width, indent.length + 2) && (blank || ITEM.test(line) || startsBlock(line))) break;
      inner.push(line.slice(Math.min(deep, width)));
      blank = false;
    }
    while (inner.length && !inner.at(-1).trim()) inner.pop();
    isLoose ||= inner.some((line, at) => !line.trim() && inner[at + 1].trim() && !ITEM.test(inner[at + 1]));
    items.push(item(inner, depth));
  }
  const start = Number.parseInt(firstMark, 10);
  const attributes = isOrdered && start !== 1 ? { start: String(start) } : {};
  return [h(isOrdered ? "ol" : "ul", isLoose ? { ...attributes, class: "loose" } : attributes, items), i];
}

function item(lines, depth) {
  const task = /^\[([ xX])\]\s+/.exec(lines[0]);
  if (task) lines[0] = lines[0].slice(task[0].length);
  const inner = nodes(parse(lines, depth + 1));
  if (task) inner.unshift(h("span", { class: "task" }, task[1] === " " ? "☐ " : "☑ "));
  return h("li", task ? { class: "has-task" } : {}, inner);
}

function cells(line) {
  const held = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return held.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function table(lines, i) {
  const sides = cells(lines[i + 1]).map((cell) => (cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : ""));
  const row = (line, tag) => {
    const held = cells(line);
    return h("tr", null, sides.map((side, at) => h(tag, side ? { class: side } : {}, inline(held[at] ?? ""))));
  };
  const head = h("thead", null, row(lines[i], "th"));
  const body = [];
  for (i += 2; i < lines.length && lines[i].includes("|"); i += 1) body.push(row(lines[i], "td"));
  return [h("div", { class: "table" }, h("table", null, head, h("tbody", null, body))), i];
}

function startsBlock(line) {
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || MATHS_OPEN.test(line);
}

function paragraph(lines, i, depth) {
  const held = [lines[i].trim()];
  for (i += 1; i < lines.length; i += 1) {
    const line = lines[i];
    const isItem = depth < MAX_DEPTH && /^ *([-*+]|1[.)]) +\S/.test(line); // as in CommonMark: a line may begin with a year
    const isTable = line.includes("|") && i + 1 < lines.length && isDivider(lines, i);
    if (!line.trim() || startsBlock(line) || isItem || isTable) break;
    held.push(line.trim());
  }
  return [h("p", null, inline(held.join("\n"))), i];
}

/** Text with emphasis, code, links and maths in it, as a list of strings and nodes. */
export function inline(text, depth = 0) {
  const found = [];
  const failed = new Set(); // ends that do not occur from here on
  let plain = "";
  const flush = () => {
    if (plain) found.push(plain);
    plain = "";
  };
  for (let at = 0; at < text.length; ) {
    const rule = RULES[text[at]];
    const hit = rule && depth < MAX_DEPTH ? rule(text, at, depth, failed) : null;
    if (hit) {
      flush();
      found.push(hit.node);
      at = hit.end;
    } else {
      plain += text[at];
      at += 1;
    }
  }
  flush();
  return found;
}

function indexOf(text, mark, from, failed) {
  if (failed.has(mark)) return -1;
  const at = text.indexOf(mark, from);
  if (at < 0) failed.add(mark);
  return at;
}

function escape(text, at, depth, failed) {
  if (text.startsWith("\\(", at)) {
    const end = indexOf(text, "\\)", at + 2, failed);
    if (end > 0) return { node: h("span", { class: "maths inline" }, text.slice(at + 2, end).trim()), end: end + 2 };
  }
  if (text.startsWith("\\[", at)) {
    const end = indexOf(text, "\\]", at + 2, failed);
    if (end > 0) return { node: h("span", { class: "maths display" }, text.slice(at + 2, end).trim()), end: end + 2 };
  }
  return /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "") ? { node: text[at + 1], end: at + 2 } : null;
}

function code(text, at, depth, failed) {
  let run = at;
  while (text[run] === "`") run += 1;
  const mark = text.slice(at, run);
  const skipped = { node: mark, end: run };
  if (failed.has(mark)) return skipped;
  for (let end = text.indexOf(mark, run); end >= 0; ) {
    let after = end;
    while (text[after] === "`") after += 1;
    if (after - end === mark.length) {
      const held = text.slice(run, end).replaceAll("\n", " ");
      return { node: h("code", null, /^ .*[^ ].* $/.test(held) ? held.slice(1, -1) : held), end: after };
    }
    end = text.indexOf(mark, after);
  }
  failed.add(mark);
  return skipped;
}

const isSpace = (character) => character === undefined || /\s/.test(character);
const isWord = (character) => character !== undefined && /[\p{L}\p{N}]/u.test(character);

function emphasis(text, at, depth, failed) {
  const mark = text[at];
  let run = at;
  while (text[run] === mark) run += 1;
  const length = Math.min(run - at, mark === "~" ? 2 : 3);
  const skipped = { node: text.slice(at, run), end: run };
  if (isSpace(text[run]) || (mark === "_" && isWord(text[at - 1])) || (mark === "~" && length < 2)) return skipped;
  const close = mark.repeat(length);
  if (failed.has(close)) return skipped;
  for (let end = text.indexOf(close, run); end >= 0; ) {
    let after = end;
    while (text[after] === mark) after += 1;
    const isClosing = !isSpace(text[end - 1]) && !(mark === "_" && isWord(text[after]));
    // a longer run closes too, if its inner marks close what lies inside: **a *b***
    if (isClosing && (after - end === length || after - end === 3)) {
      const inner = inline(text.slice(at + length, after - length), depth + 1);
      const tags = mark === "~" ? ["del"] : [[], ["em"], ["strong"], ["em", "strong"]][length];
      return { node: tags.reduceRight((held, tag) => [h(tag, null, held)], inner)[0], end: after };
    }
    end = text.indexOf(close, after);
  }
  failed.add(close);
  return skipped;
}

const LINK = /\]\(\s*<?([^\s<>()]*(?:\([^\s<>()]*\)[^\s<>()]*)*)>?(?:\s+"[^"\n]*")?\s*\)/y;

function link(text, at, depth, failed) {
  const isPicture = text[at] === "!";
  if (isPicture && text[at + 1] !== "[") return null;
  if (indexOf(text, "](", at, failed) < 0) return null;
  const open = isPicture ? at + 1 : at;
  let level = 0;
  for (let end = open; end < Math.min(text.length, open + 1000); end += 1) {
    if (text[end] === "\\") end += 1;
    else if (text[end] === "[") level += 1;
    else if (text[end] === "]" && (level -= 1) === 0) {
      LINK.lastIndex = end;
      const match = LINK.exec(text);
      const url = match && safeUrl(match[1]);
      if (!url) return null;
      const label = text.slice(open + 1, end);
      return { node: anchor(url, isPicture ? [`picture: ${label || url}`] : inline(label, MAX_DEPTH - 2)), end: LINK.lastIndex };
    }
  }
  return null;
}

function anchor(url, children) {
  return h("a", { href: url, title: url }, children);
}

const BARE = /https?:\/\/[^\s<>"'`]{1,2000}/iy;

function bare(text, at) {
  if (isWord(text[at - 1])) return null;
  BARE.lastIndex = at;
  let url = BARE.exec(text)?.[0].replace(/[.,:;!?*_~\]]+$/, "");
  if (url?.endsWith(")") && !url.includes("(")) url = url.replace(/\)+[.,:;!?*_~\]]*$/, "");
  return url && safeUrl(url) ? { node: anchor(safeUrl(url), [url]), end: at + url.length } : null;
}

function angle(text, at) {
  const found = bare(text, at + 1);
  return found && text[found.end] === ">" ? { node: found.node, end: found.end + 1 } : null;
}

const PRICE = /^[\d.,]+[kKmMbB]? (?!.*[\\^_={}])[A-Za-z]{2,}/; // as in "$5 or 10$"

/** $x$ is maths where nobody would write it of money or of a shell: no space inside the dollars, no word before, no number or name after. */
function dollar(text, at, depth, failed) {
  const mark = text[at + 1] === "$" ? "$$" : "$";
  const from = at + mark.length;
  if (isSpace(text[from]) || /[A-Za-z0-9]/.test(text[at - 1] ?? "")) return null;
  const end = indexOf(text, mark, from, failed);
  if (end <= from || isSpace(text[end - 1]) || /[\dA-Z_{]/.test(text[end + mark.length] ?? "")) return null;
  const held = text.slice(from, end);
  if (held.includes("\n\n") || PRICE.test(held)) return null;
  return { node: h("span", { class: mark === "$" ? "maths inline" : "maths display" }, held), end: end + mark.length };
}

const RULES = {
  "\\": escape, "`": code, "*": emphasis, _: emphasis, "~": emphasis, "[": link, "!": link, h: bare, H: bare, "<": angle, $: dollar,
  "\n": (text, at) => ({ node: h("br"), end: at + 1 }),
};

/** Elements from parsed nodes; whatever is not on the lists becomes text. */
export function toDom(node, document) {
  if (typeof node === "string") return document.createTextNode(node);
  const element = document.createElement(TAGS.has(node.tag) ? node.tag : "span");
  for (const [name, value] of Object.entries(node.attributes)) {
    if (!ATTRIBUTES.has(name) || (name === "href" && !safeUrl(value))) continue;
    element.setAttribute(name, value);
  }
  if (node.tag === "a") {
    element.setAttribute("target", "_blank");
    element.setAttribute("rel", "noopener noreferrer");
  }
  for (const child of node.children) element.append(toDom(child, document));
  return element;
}

/** Make `container` show the text. Blocks that have not changed since the last call keep their elements, and what is selected in them. */
export function show(container, text, document) {
  const before = container.shownBlocks ?? [];
  const now = blocks(text).map(({ source, node }) => ({ source, node }));
  let same = 0;
  while (same < now.length && same < before.length && before[same].source === now[same].source) same += 1;
  for (const { element } of before.slice(same)) element.remove();
  for (const one of now.slice(same)) {
    one.element = toDom(one.node, document);
    one.element.dir = "auto"; // from right to left where the block begins so
    container.append(one.element);
  }
  container.shownBlocks = [...before.slice(0, same), ...now.slice(same)];
}
