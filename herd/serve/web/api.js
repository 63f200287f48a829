// The server, as any client sees it: /v1/models and /v1/chat/completions. Addresses are relative, so that a proxy may add a prefix.

const FULL = "context_length_exceeded";

/** A request that failed. `kind`: offline, key, busy, full (the context), refused, failed; `afterS`: seconds to wait before trying again, where one is told. */
export class ApiError extends Error {
  constructor(kind, message, afterS = null) {
    super(message);
    this.kind = kind;
    this.afterS = afterS;
  }
}

async function request(path, key, options = {}) {
  const headers = { ...options.headers, ...(key && { authorization: `Bearer ${key}` }) };
  let reply;
  try {
    reply = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("offline", "The server cannot be reached.");
  }
  if (!reply.ok) throw await refusal(reply);
  return reply;
}

export async function refusal(reply) {
  const text = await reply.text().catch(() => "");
  let message = "";
  let code = "";
  try {
    ({ message = "", code = "" } = JSON.parse(text).error ?? {});
  } catch {
    // a proxy's page, of which the status says enough
  }
  if (code === FULL) return new ApiError("full", message);
  message ||= `The server answered with status ${reply.status}.`;
  if (reply.status === 401 || reply.status === 403) return new ApiError("key", message);
  const after = waitS(reply.headers.get("retry-after"));
  if (reply.status === 429 || (reply.status === 503 && after !== null)) return new ApiError("busy", message, after ?? 5);
  return new ApiError(reply.status >= 500 ? "failed" : "refused", message);
}

/** Retry-After, which is a number of seconds or a date, in seconds; null where it says nothing. */
export function waitS(header, now = Date.now()) {
  if (!header) return null;
  const seconds = /^\d+$/.test(header.trim()) ? Number(header) : Math.ceil((Date.parse(header) - now) / 1000);
  return Number.isFinite(seconds) ? Math.min(Math.max(seconds, 1), 600) : null;
}

/** The models served: `{id, context}`, with context in tokens, or null where the server does not tell. */
export async function listModels(key) {
  const { data } = await (await request("v1/models", key)).json();
  return data.map((model) => ({ id: model.id, context: model.context_length ?? model.max_model_len ?? model.context_window ?? null }));
}

/** A reply as it comes: `{progress}`, the share of the prompt that has been read, `{text}`, `{finish}` and `{usage}`. Throws `ApiError`, or an AbortError once `signal` says stop. */
export async function* streamChat(body, key, signal) {
  const options = { method: "POST", body: JSON.stringify(body), headers: { "content-type": "application/json" }, signal };
  const reply = await request("v1/chat/completions", key, options);
  try {
    for await (const data of events(reply.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.code === FULL ? "full" : "failed", chunk.error.message ?? "The server failed on this reply.");
      const choice = chunk.choices?.[0];
      if (choice?.delta?.content) yield { text: choice.delta.content };
      if (choice?.finish_reason) yield { finish: choice.finish_reason };
      if (chunk.prompt_progress) yield { progress: chunk.prompt_progress.processed / chunk.prompt_progress.total };
      if (chunk.usage) yield { usage: chunk.usage };
    }
  } catch (error) {
    if (error instanceof ApiError || error.name === "AbortError") throw error;
  }
  throw new ApiError("offline", "The connection broke off before the reply had ended.");
}

/** The data of server-sent events, whatever pieces the bytes come in. */
export async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) yield line.slice(5).trim(); // herd, as OpenAI, has one line of data an event
      }
    }
  } finally {
    await reader.cancel().catch(() => {});
  }
}
