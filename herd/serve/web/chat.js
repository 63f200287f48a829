// Replies under way: from an empty node of the tree to a full one, with stop, retry, and waiting where the server is busy.

import { streamChat } from "./api.js";
import { requestBody } from "./store.js";

const SAVE_MS = 2000;

export class Chat {
  #running = new Map(); // id of a reply: what stops it, and a promise of its end

  /** `grown(conversation, reply)` is called on every piece, `changed(conversation, reply)` when the state of a reply is another. */
  constructor({ key, grown, changed, save }) {
    Object.assign(this, { key, grown, changed, save });
  }

  isRunning(reply) {
    return this.#running.has(reply.id);
  }

  stop(replies) {
    for (const reply of replies) this.#running.get(reply.id)?.controller.abort();
  }

  /** Stop, and wait until it has. */
  async stopped(replies) {
    this.stop(replies);
    await Promise.all(replies.map((reply) => this.#running.get(reply.id)?.done));
  }

  /** Compute a reply, from its beginning. Its settings are copied: they may change while it runs. */
  run(conversation, reply, settings) {
    const controller = new AbortController();
    const running = { controller };
    this.#running.set(reply.id, running);
    running.done = this.#run(conversation, reply, settings, controller);
  }

  async #run(conversation, reply, settings, controller) {
    const body = requestBody(conversation, reply, structuredClone(settings));
    try {
      while (!(await this.#attempt(conversation, reply, body, controller.signal))) {
        // the server was busy and has named a time
      }
    } finally {
      this.#running.delete(reply.id);
      delete reply.retryAt;
      conversation.updated = reply.at = Date.now(); // `at` tells tabs who has the newest of it
      this.changed(conversation, reply);
      await this.save(conversation);
    }
  }

  /** False: wait has been done, try again. */
  async #attempt(conversation, reply, body, signal) {
    Object.assign(reply, { text: "", state: "waiting", finish: "", firstMs: null, rate: null });
    delete reply.error;
    delete reply.usage;
    delete reply.progress;
    this.changed(conversation, reply);
    try {
      await this.#read(conversation, reply, streamChat(body, this.key(), signal));
      reply.state = "done";
    } catch (error) {
      if (signal.aborted) {
        reply.state = "stopped";
      } else if (error.kind === "busy" && !reply.text) {
        return this.#wait(conversation, reply, error, signal);
      } else {
        reply.state = "failed";
        reply.error = { kind: error.kind ?? "failed", message: error.message };
      }
    }
    return true;
  }

  async #read(conversation, reply, events) {
    const started = performance.now();
    let first = null;
    let last = null;
    let saved = started;
    for await (const { progress, text, finish, usage } of events) {
      if (progress) {
        reply.progress = progress;
        this.changed(conversation, reply);
      }
      if (finish) reply.finish = finish;
      if (usage) reply.usage = { prompt_tokens: usage.prompt_tokens, completion_tokens: usage.completion_tokens };
      if (!text) continue;
      last = performance.now();
      first ??= last;
      reply.text += text;
      if (reply.state === "waiting") {
        reply.state = "streaming";
        this.changed(conversation, reply);
      } else {
        this.grown(conversation, reply);
      }
      if (last - saved > SAVE_MS) {
        saved = last;
        reply.at = Date.now();
        this.save(conversation);
      }
    }
    delete reply.progress;
    const tokens = reply.usage?.completion_tokens ?? 0;
    if (first !== null) reply.firstMs = first - started;
    if (tokens > 1 && last - first > 50) reply.rate = ((tokens - 1) * 1000) / (last - first); // tokens per second after the first
  }

  async #wait(conversation, reply, error, signal) {
    reply.state = "busy";
    reply.error = { kind: "busy", message: error.message };
    reply.retryAt = Date.now() + error.afterS * 1000;
    this.changed(conversation, reply);
    await new Promise((resolve) => {
      const timer = setTimeout(resolve, error.afterS * 1000);
      signal.addEventListener("abort", () => (clearTimeout(timer), resolve()), { once: true });
    });
    if (!signal.aborted) return false;
    reply.state = "stopped";
    delete reply.error;
    return true;
  }
}
