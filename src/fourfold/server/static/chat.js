// One turn: what is asked of the server, and what is noted of its answer. Knows nothing of the page.

import { answer, Failure } from "./api.js";

/**
 * The messages of a request. Answers of which nothing came are left out and neighbours of one role are joined, because
 * chat templates want the roles to take turns.
 */
export function requestMessages(messages, system) {
  const sent = system ? [{ role: "system", content: system }] : [];
  for (const { role, content } of messages) {
    if (!content) continue;
    if (sent.at(-1)?.role === role) sent.at(-1).content += `\n\n${content}`;
    else sent.push({ role, content });
  }
  return sent;
}

/** Tokens and their times. Pieces stand for tokens until the server says how many there were. */
class Measure {
  constructor() {
    this.startedAt = performance.now();
    this.firstAt = this.lastAt = null;
    this.pieces = 0;
    this.exact = null;
  }

  piece() {
    this.lastAt = performance.now();
    this.firstAt ??= this.lastAt;
    this.pieces += 1;
  }

  get summary() {
    const tokens = this.exact ?? this.pieces;
    const seconds = (this.lastAt - this.firstAt) / 1000;
    return {
      tokens,
      isExact: this.exact !== null,
      rate: tokens > 1 && seconds > 0 ? (tokens - 1) / seconds : null,
      first: this.firstAt === null ? null : (this.firstAt - this.startedAt) / 1000,
    };
  }
}

/**
 * Streams the answer into `message` (messages.js says what that is): `onText(text)` with each piece. Returns when it has
 * ended, however it ended; nothing is thrown.
 */
export async function takeAnswer(message, body, key, signal, onText) {
  const measure = new Measure();
  try {
    for await (const { text, finish, usage } of answer(body, key, signal)) {
      if (text) {
        measure.piece();
        message.content += text;
        message.measure = measure.summary;
        onText(text);
      }
      if (usage) measure.exact = usage.completion_tokens;
      if (finish) message.end = finish === "length" ? "length" : "stop";
    }
    message.end ??= "stop";
  } catch (error) {
    if (signal.aborted) {
      message.end = "stopped";
    } else {
      const { kind, message: said, retryAfter } = error instanceof Failure ? error : new Failure("Server", { message: String(error) });
      message.end = "failed";
      message.failure = { kind, message: said, retryAt: retryAfter === null ? null : Date.now() + 1000 * retryAfter };
    }
  }
  message.measure = measure.summary;
}
