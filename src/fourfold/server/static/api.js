// What the page asks of the server, and what can go wrong, by kind. Addresses are relative: a proxy may mount the page
// below any path.

/** Why there is no answer. `kind` chooses the sentence; `message` is the server's own; `retryAfter` is in seconds. */
export class Failure extends Error {
  constructor(kind, { message = "", retryAfter = null } = {}) {
    super(message || kind);
    Object.assign(this, { kind, message, retryAfter });
  }
}

const KIND_OF_STATUS = { 401: "Key", 403: "Key", 429: "Busy", 503: "Draining" };

/** Retry-After in seconds, from either of its two forms; null where it says nothing usable. */
function retryAfter(header) {
  if (!header) return null;
  const seconds = /^\d+$/.test(header.trim()) ? Number(header) : (Date.parse(header) - Date.now()) / 1000;
  return Number.isFinite(seconds) ? Math.max(0, Math.ceil(seconds)) : null;
}

async function failureOf(response) {
  const body = await response.json().catch(() => null); // a proxy's error page is no JSON
  const message = String(body?.error?.message ?? body?.detail ?? `${response.status} ${response.statusText}`.trim());
  const kind = KIND_OF_STATUS[response.status] ?? (response.status < 500 ? "Refused" : "Server");
  return new Failure(kind, { message, retryAfter: retryAfter(response.headers.get("Retry-After")) });
}

async function request(path, key, options = {}) {
  const headers = { ...(key && { Authorization: `Bearer ${key}` }), ...(options.body && { "Content-Type": "application/json" }) };
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store", credentials: "same-origin" });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    // A key with characters that no header may carry never leaves the browser: it is the key that is wrong.
    throw new Failure(key && !/^[\x20-\x7e]+$/.test(key) ? "Key" : "Unreachable");
  }
  if (!response.ok) throw await failureOf(response);
  return response;
}

async function json(path, key) {
  const response = await request(path, key);
  return response.json().catch(() => {
    throw new Failure("Server", { message: `${path}` });
  });
}

/** The ids of the models that the server offers. */
export const models = async (key) => (await json("v1/models", key)).data.map((model) => String(model.id));

/**
 * What the server is doing: {tokens_per_second, prompt_tokens_per_second, bandwidth_share, running, waiting}, the share being
 * of the machine's memory bandwidth, 0..1, or null where that was not measured.
 */
export const stats = (key) => json("stats", key);

/**
 * Streams one answer: yields {text}, {finish} and {usage}, each as it comes. Throws a Failure; "Lost" where the stream
 * ended before the answer did. An abort of `signal` throws the browser's AbortError.
 */
export async function* answer(body, key, signal) {
  const response = await request("v1/chat/completions", key, { method: "POST", body: JSON.stringify(body), signal });
  let finished = false;
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Failure("Server", { message: String(chunk.error.message ?? chunk.error) });
      if (chunk.usage) yield { usage: chunk.usage };
      const choice = chunk.choices?.[0];
      if (choice?.delta?.content) yield { text: choice.delta.content };
      if (choice?.finish_reason) {
        finished = true;
        yield { finish: choice.finish_reason };
      }
    }
  } catch (error) {
    if (signal.aborted || error instanceof Failure) throw error;
    if (!finished) throw new Failure("Lost");
  }
  if (!finished) throw new Failure("Lost");
}

/** The data of each server-sent event of a stream of bytes. */
async function* events(stream) {
  const reader = stream.getReader();
  const decoder = new TextDecoder();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
      rest = lines.pop();
      for (const raw of lines) {
        const line = raw.endsWith("\r") ? raw.slice(0, -1) : raw;
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // frees the connection where the reader left early
  }
}
