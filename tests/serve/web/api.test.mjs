import assert from "node:assert/strict";
import { test } from "node:test";

import { events, refusal, streamChat, waitS } from "../../../herd/serve/web/api.js";

const bytes = (text, size) => {
  const all = new TextEncoder().encode(text);
  const pieces = Array.from({ length: Math.ceil(all.length / size) }, (_, i) => all.slice(i * size, (i + 1) * size));
  return new ReadableStream({
    start(controller) {
      for (const piece of pieces) controller.enqueue(piece);
      controller.close();
    },
  });
};
const all = async (items) => {
  const found = [];
  for await (const item of items) found.push(item);
  return found;
};

test("events, however the bytes are cut", async () => {
  for (const size of [1, 2, 3, 1000]) {
    const text = 'data: {"a":"ä🦙"}\n\n: ping\n\ndata: two\r\n\r\ndata: [DONE]\n\n';
    assert.deepEqual(await all(events(bytes(text, size))), ['{"a":"ä🦙"}', "two", "[DONE]"]);
  }
});

async function streamed(text, status = 200) {
  globalThis.fetch = async () => new Response(bytes(text, 7), { status });
  return all(streamChat({}, "", undefined));
}

test("a stream that ends early, or fails, says so", async () => {
  const piece = 'data: {"choices":[{"delta":{"content":"a"}}]}\n\n';
  assert.deepEqual(await streamed(`${piece}data: [DONE]\n\n`), [{ text: "a" }]);
  await assert.rejects(streamed(piece), { kind: "offline", message: /broke off/ });
  await assert.rejects(streamed(`${piece}data: {"error":{"message":"no room"}}\n\n`), { kind: "failed", message: "no room" });
  await assert.rejects(streamed(`${piece}data: {"error":{"message":"long","code":"context_length_exceeded"}}\n\n`), { kind: "full", message: "long" });
  await assert.rejects(streamed('{"error":{"message":"long","code":"context_length_exceeded"}}', 400), { kind: "full", message: "long" });
  globalThis.fetch = async () => {
    throw new TypeError("Failed to fetch");
  };
  await assert.rejects(all(streamChat({}, "", undefined)), { kind: "offline" });
});

test("refusals", async () => {
  const of = (status, text, headers = {}) => refusal(new Response(text, { status, headers }));
  const error = JSON.stringify({ error: { message: "why" } });
  const kinds = [[400, "refused"], [401, "key"], [404, "refused"], [413, "refused"], [429, "busy"], [500, "failed"], [503, "failed"]];
  for (const [status, kind] of kinds) assert.deepEqual({ kind, message: "why" }, pick(await of(status, error)));
  assert.deepEqual([(await of(429, error, { "retry-after": "7" })).afterS, (await of(429, error)).afterS], [7, 5]);
  assert.equal((await of(503, error, { "retry-after": "7" })).kind, "busy");
  assert.match((await of(502, "<html>")).message, /status 502/);
});

const pick = ({ kind, message }) => ({ kind, message });

test("Retry-After", () => {
  const now = Date.parse("2026-01-01T00:00:00Z");
  assert.deepEqual([waitS("0", now), waitS("30", now), waitS("99999", now)], [1, 30, 600]);
  assert.equal(waitS("Thu, 01 Jan 2026 00:00:20 GMT", now), 20);
  assert.deepEqual([waitS(null), waitS("soon")], [null, null]);
});
