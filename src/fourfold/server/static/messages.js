// The conversation as it is shown. A message is {role, content}; an assistant's also {end, failure, measure}: `end` is
// null while it is coming, then "stop", "length", "stopped" or "failed"; `failure` is {kind, message, retryAt};
// `measure` is {tokens, isExact, rate, first}: tokens/s after the first token, seconds until it.

import { element } from "./inline.js";
import { MarkdownStream } from "./markdown.js";
import { number, say } from "./strings.js";

const COPIED_MS = 1600;

/** A button of words that `act` answers; data-i18n lets `translate` find it. */
function button(key, act, kind = "quiet") {
  const node = element("button", { type: "button", class: kind, "data-i18n": key }, say(key));
  node.addEventListener("click", () => act(node));
  return node;
}

/** Says on the button itself whether its text reached the clipboard. */
async function copy(node, text, key) {
  let outcome = "copied";
  try {
    if (navigator.clipboard) await navigator.clipboard.writeText(text);
    else if (!copyBySelection(text)) outcome = "copyFailed"; // plain HTTP from another machine has no clipboard
  } catch {
    outcome = "copyFailed";
  }
  node.textContent = say(outcome);
  setTimeout(() => (node.textContent = say(key)), COPIED_MS);
}

function copyBySelection(text) {
  const field = element("textarea", { class: "unseen", readonly: "", "aria-hidden": "true" });
  const focused = document.activeElement;
  field.value = text;
  document.body.append(field);
  field.select();
  const isCopied = document.execCommand("copy");
  field.remove();
  focused?.focus();
  return isCopied;
}

function codeBlock(language) {
  const text = document.createTextNode("");
  const copyButton = button("copy", (node) => copy(node, text.data, "copy"));
  copyButton.setAttribute("data-i18n-label", "copyCode");
  copyButton.setAttribute("aria-label", say("copyCode"));
  const head = element("div", { class: "code-head" }, element("span", {}, language), copyButton);
  const body = element("pre", { tabindex: "0", dir: "ltr" }, element("code", {}, text));
  return { node: element("div", { class: "code" }, head, body), text };
}

/** One message. `acts` are what its buttons do: {retry, edit, enterKey}; `isLast` shows those of the last turn. */
export class MessageView {
  constructor(message, acts) {
    this.message = message;
    this.acts = acts;
    this.body = element("div", { class: "body" });
    this.foot = element("div", { class: "foot-line" });
    this.name = element("h3", { class: "unseen" });
    this.node = element("li", { class: "message", "data-role": message.role }, this.name, this.body, this.foot);
    if (message.role === "user") {
      this.body.dir = "auto";
      this.body.textContent = message.content;
    } else {
      this.markdown = new MarkdownStream(this.body, codeBlock);
      this.grow(message.content);
      this.draw();
    }
  }

  grow(text) {
    this.markdown.append(text);
  }

  draw() {
    if (this.message.end) this.markdown.end();
    this.markdown.draw();
  }

  /** Writes what stands around the message's text anew: after a change of its state, of its place, or of the language. */
  refresh(isLast) {
    const { message, acts } = this;
    this.name.textContent = say(message.role === "user" ? "you" : "answer");
    this.foot.replaceChildren();
    if (message.role === "user") {
      if (isLast) this.foot.append(button("edit", acts.edit));
      this.foot.append(button("copy", (node) => copy(node, message.content, "copy")));
      return;
    }
    this.node.toggleAttribute("data-open", !message.end);
    this.status = element("span", { class: "status" });
    this.updateStatus();
    if (message.end === "failed") this.foot.append(this.failureBox(isLast));
    else this.foot.append(this.status);
    if (!message.end) return;
    const tools = element("span", { class: "acts" });
    if (message.content) tools.append(button("copy", (node) => copy(node, message.content, "copy")));
    if (isLast && message.end !== "failed") tools.append(button("retry", acts.retry));
    this.foot.append(tools);
  }

  failureBox(isLast) {
    const { failure } = this.message;
    this.status.className = "why";
    const box = element("div", { class: "failure", role: "alert" }, this.status);
    if (!isLast) return box;
    if (failure.kind === "Key") box.append(button("enterKey", this.acts.enterKey, "plain"));
    box.append(button("retry", this.acts.retry, "plain"));
    return box;
  }

  updateStatus() {
    const { message } = this;
    const text = message.end === "failed" ? failureText(message.failure) : progressText(message);
    if (this.status.textContent !== text) this.status.textContent = text;
  }
}

/** The one sentence that says what went wrong; with the seconds that are left where the server named some. */
export function failureText({ kind, message = "", retryAt = null }) {
  const seconds = retryAt === null ? 0 : Math.ceil((retryAt - Date.now()) / 1000);
  return seconds > 0 && ["Busy", "Draining"].includes(kind)
    ? say(`error${kind}For`, { seconds: number(seconds) })
    : say(`error${kind}`, { message });
}

function progressText({ end, content, measure, startedAt }) {
  if (!end && !content) {
    const seconds = Math.floor((Date.now() - startedAt) / 1000);
    return seconds < 2 ? say("waiting") : say("waitingSeconds", { seconds: number(seconds) });
  }
  const parts = [];
  if (end === "stopped") parts.push(say("answerStopped"));
  if (end === "length") parts.push(say("answerCut"));
  if (!end) parts.push(say("answering"));
  if (measure) {
    const about = measure.isExact ? "" : "≈ ";
    if (measure.tokens) parts.push(say(measure.tokens === 1 ? "token" : "tokens", { n: about + number(measure.tokens) }));
    if (measure.rate) parts.push(say("speed", { rate: about + number(measure.rate, 1) }));
    if (end && measure.first !== null) parts.push(say("firstToken", { seconds: number(measure.first, 2) }));
  }
  return parts.join(" · ");
}

/** The editor that takes the place of a user's message: Enter sends, Escape gives up. */
export function editor(text, { onInput, onSend, onCancel, onEnter }) {
  const field = element("textarea", { class: "edit", rows: "3", "aria-label": say("editMessage"), "data-i18n-label": "editMessage" });
  field.value = text;
  field.addEventListener("input", () => onInput(field.value));
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") {
      event.stopPropagation();
      onCancel();
    }
    onEnter(event, () => onSend(field.value));
  });
  const acts = element("div", { class: "edit-acts" }, button("cancel", onCancel, "plain"), button("send", () => onSend(field.value), "plain strong"));
  return { node: element("div", { class: "editor" }, field, acts), field };
}
