import assert from "node:assert/strict";
import { test } from "node:test";

import * as store from "../../../herd/serve/web/store.js";

const PICTURE = "data:image/png;base64,iVBORw0KGgo=";

function talk(...texts) {
  const conversation = store.newConversation({ ...store.NO_SETTINGS, model: "a" }, 1);
  for (const text of texts) finish(store.ask(conversation, text));
  return conversation;
}

function finish(replies) {
  for (const { node } of replies) Object.assign(node, { state: "done", text: `to ${node.parent}` });
  return replies;
}

const shown = (conversation) => store.rows(conversation).map((row) => row.map((node) => (node.role === "user" ? node.text : node.model)));

test("a talk is a path", () => {
  const conversation = talk("one", "two");
  assert.deepEqual(shown(conversation), [["one"], ["a"], ["two"], ["a"]]);
  assert.equal(conversation.title, "one");
});

test("an edit makes a sibling, and arrows lead back to what followed", () => {
  const conversation = talk("one", "two", "three");
  finish(store.edit(conversation, store.rows(conversation)[2], "zwei"));
  assert.deepEqual(shown(conversation), [["one"], ["a"], ["zwei"], ["a"]]);
  const node = store.rows(conversation)[2][0];
  assert.deepEqual(store.siblings(conversation, node).map(({ text }) => text), ["two", "zwei"]);
  store.turn(conversation, node, -1);
  assert.deepEqual(shown(conversation).flat(), ["one", "a", "two", "a", "three", "a"]);
  store.turn(conversation, store.rows(conversation)[2][0], -1); // there is none
  assert.equal(store.rows(conversation)[2][0].text, "two");
  store.turn(conversation, store.rows(conversation)[2][0], 1);
  assert.equal(conversation.leaf, store.deepest(conversation, node.id));
});

test("the first message can be edited", () => {
  const conversation = talk("one");
  finish(store.edit(conversation, store.rows(conversation)[0], "uno", [PICTURE]));
  assert.deepEqual(shown(conversation), [["uno"], ["a"]]);
  assert.equal(store.siblings(conversation, store.rows(conversation)[0][0]).length, 2);
});

test("a reply can be tried again", () => {
  const conversation = talk("one");
  const row = store.rows(conversation)[1];
  const [{ node, lane }] = store.regenerate(conversation, row, row[0]);
  assert.deepEqual([lane, store.siblings(conversation, node).length, conversation.leaf], [0, 2, node.id]);
});

test("a comparison is two paths, each with its own past", () => {
  const conversation = talk("one");
  store.startCompare(conversation, "b");
  finish(store.ask(conversation, "two"));
  const [first, second] = finish(store.ask(conversation, "three"));
  assert.deepEqual(shown(conversation), [["one"], ["a"], ["two"], ["a", "b"], ["three", "three"], ["a", "b"]]);
  const past = (reply) => store.path(conversation, reply.node.parent).filter(({ role }) => role === "assistant").map(({ model }) => model);
  assert.deepEqual([past(first), past(second)], [["a", "a"], ["a", "b"]]);
  const [again] = store.regenerate(conversation, store.rows(conversation)[5], second.node);
  assert.deepEqual([again.lane, again.node.model, again.node.parent], [1, "b", second.node.parent]);
  assert.equal(conversation.leaf, first.node.id);
});

test("an edit while comparing parts where the lanes had parted", () => {
  const conversation = talk("one");
  store.startCompare(conversation, "b");
  finish(store.ask(conversation, "two"));
  finish(store.ask(conversation, "three"));
  finish(store.edit(conversation, store.rows(conversation)[4], "drei"));
  assert.deepEqual(shown(conversation).slice(2), [["two"], ["a", "b"], ["drei", "drei"], ["a", "b"]]);
  finish(store.edit(conversation, store.rows(conversation)[0], "uno"));
  assert.deepEqual(shown(conversation), [["uno"], ["a", "b"]]);
});

test("keeping the second lane goes on from it", () => {
  const conversation = talk("one");
  store.startCompare(conversation, "b");
  finish(store.ask(conversation, "two"));
  store.keep(conversation, 1);
  assert.deepEqual([shown(conversation).at(-1), conversation.settings.model, conversation.compare], [["b"], "b", null]);
});

test("what is sent", () => {
  const conversation = talk("one");
  const [{ node }] = store.ask(conversation, "look", [PICTURE]);
  const settings = { ...store.NO_SETTINGS, model: "m", system: "Be brief.", temperature: 0, max_tokens: 5, stop: ["x"] };
  const body = store.requestBody(conversation, node, settings);
  assert.deepEqual(body.messages.map(({ role }) => role), ["system", "user", "assistant", "user"]);
  assert.deepEqual(body.messages[3].content, [{ type: "image_url", image_url: { url: PICTURE } }, { type: "text", text: "look" }]);
  const { messages, ...rest } = body;
  assert.deepEqual(rest, { model: "m", stream: true, stream_options: { include_usage: true }, return_progress: true, temperature: 0, max_completion_tokens: 5, stop: ["x"] });
});

test("search finds all words, newest first", () => {
  const all = [talk("Cats and rain"), talk("Dogs and rain"), talk("Snow")];
  all.forEach((conversation, i) => (conversation.updated = i));
  const titles = (query) => store.search(all, query).map(({ conversation }) => conversation.title);
  assert.deepEqual(titles(""), ["Snow", "Dogs and rain", "Cats and rain"]);
  assert.deepEqual(titles("RAIN"), ["Dogs and rain", "Cats and rain"]);
  assert.deepEqual(titles("rain cats"), ["Cats and rain"]);
  assert.deepEqual(titles("rain (snow"), []);
});

test("export and import give the same back", () => {
  const conversation = talk("one", "two");
  store.startCompare(conversation, "b");
  finish(store.ask(conversation, "three", [PICTURE]));
  const [back] = store.imported(store.exported([conversation]));
  assert.deepEqual(shown(back), shown(conversation));
  assert.deepEqual(back.settings, conversation.settings);
  assert.deepEqual(store.imported(store.exported([back])), [back]);
  assert.deepEqual(store.unknown([back], [conversation]), []);
  const changed = { ...back, updated: 7 };
  const [beside] = store.unknown([changed], [conversation]);
  assert.notEqual(beside.id, conversation.id);
});

test("a file from elsewhere brings in nothing strange", () => {
  const file = (change) => {
    const data = JSON.parse(store.exported([talk("one")]));
    change(data, data.conversations[0], Object.values(data.conversations[0].nodes));
    return JSON.stringify(data);
  };
  const refused = [
    ["nonsense", /not JSON/],
    ["null", /no conversations/],
    ["[1]", /no conversations/],
    [file((data) => (data.version = 2)), /version 2/],
    [file((data, one) => (one.id = "<img>")), /1 of the file is damaged: it has no id/],
    [file((data, one) => (one.nodes = null)), /no messages/],
    [file((data, one, [user]) => (user.parent = "n0000000000000000")), /before the one it answers/],
    [file((data, one, [user, reply]) => (user.parent = reply.id)), /before the one it answers/],
    [file((data, one, [user]) => (user.role = "system")), /no role/],
    [file((data, one, [user]) => (user.images = ["https://x.org/spy.png"])), /picture that is none/],
    [file((data, one, [user]) => (user.images = ["data:image/svg+xml;base64,PHN2Zz4="])), /picture that is none/],
  ];
  for (const [text, message] of refused) assert.throws(() => store.imported(text), message);
  const odd = file((data, one, [user, reply]) => {
    Object.assign(one, { title: { a: 1 }, leaf: "x", settings: { temperature: "hot", stop: [1, "x"], toString: 1 }, extra: 1 });
    Object.assign(reply, { state: "streaming", onclick: "x", rate: "fast" });
  }).replace('"nodes"', '"__proto__": {"polluted": 1}, "nodes"');
  const [found] = store.imported(odd);
  assert.deepEqual([found.title, found.settings.temperature, found.settings.stop, found.extra], ["", null, ["x"], undefined]);
  const reply = Object.values(found.nodes)[1];
  assert.deepEqual([found.leaf, reply.state, reply.onclick, reply.rate], [reply.id, "stopped", undefined, null]);
  assert.equal({}.polluted ?? found.polluted, undefined);
});

test("replies that were under way have stopped when the page comes back", () => {
  const conversation = talk("one");
  store.ask(conversation, "two")[0].node.state = "streaming";
  store.settled(conversation);
  assert.deepEqual(Object.values(conversation.nodes).map(({ state }) => state), [undefined, "done", undefined, "stopped"]);
});

test("two tabs with one conversation lose nothing of each other", () => {
  const here = store.newConversation();
  const [{ node: first }] = store.ask(here, "first");
  Object.assign(first, { text: "one", state: "done", at: 10 });
  const there = structuredClone(here);
  const [{ node: second }] = store.ask(there, "there");
  store.merge(there, structuredClone(here));
  assert.equal(Object.keys(there.nodes).length, 4);
  assert.equal(there.leaf, second.id);

  const shown = structuredClone(here);
  store.follow(shown, structuredClone(there)); // goes on from what is shown
  assert.equal(shown.leaf, second.id);
  const [{ node: other }] = store.ask(here, "here");
  store.follow(here, structuredClone(there)); // both went on: each keeps what it shows
  assert.equal(here.leaf, other.id);
  assert.equal(Object.keys(here.nodes).length, 6);
});

test("of one reply in two tabs the later state counts", () => {
  const here = store.newConversation();
  const [{ node }] = store.ask(here, "first");
  Object.assign(node, { text: "half", state: "stopped", error: { kind: "failed", message: "x" }, at: 10 });
  const there = structuredClone(here);
  Object.assign(there.nodes[node.id], { text: "half and half", state: "done", at: 20 });
  delete there.nodes[node.id].error;
  store.merge(there, here);
  assert.equal(there.nodes[node.id].text, "half and half");
  store.merge(here, there);
  assert.deepEqual([node.text, node.state, node.error], ["half and half", "done", undefined]);
});
