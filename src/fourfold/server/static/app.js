// The page: puts the parts together and decides what a key or a button does.

import { Failure, models } from "./api.js";
import { requestMessages, takeAnswer } from "./chat.js";
import { editor, failureText, MessageView } from "./messages.js";
import { Meter } from "./meter.js";
import { Settings } from "./settings.js";
import { choose, chosen, keep, kept, keptMessages } from "./store.js";
import { language, say, translate } from "./strings.js";

const EVERY_MS = 1000; // while an answer comes: its status, the meter, and what is kept
const SHARE_OF_TIME = 6; // drawing waits this many times as long as it took: a long answer leaves the page its time
const NEAR_END_PX = 48;

const find = (id) => document.getElementById(id);
const [draft, send, list, scroll] = ["draft", "send", "messages", "scroll"].map(find);

let messages = keptMessages();
let views = [];
let running = null; // the AbortController of the answer that is coming
let editing = kept("editing", null); // the text of the last question while it is being edited
let isAtEnd = true;
let isLeft = false;

const settings = new Settings(find("settings"), () => {
  learnModels();
  meter.ask();
  draft.focus();
});
const meter = new Meter(find, () => settings.key);

// ---- what is shown

function announce(key) {
  find("announce").textContent = key ? say(key) : "";
}

function lastQuestion() {
  return messages.findLastIndex((message) => message.role === "user");
}

function refresh() {
  const question = lastQuestion();
  views.forEach((view, index) => view.refresh(!running && index >= question));
  find("empty").hidden = messages.length > 0;
  find("hint").hidden = messages.length > 0; // by then it is known, and the line is the meter's
  find("restore").hidden = messages.length > 0 || keptMessages("previous").length === 0;
  send.dataset.mode = running ? "stop" : "send";
  send.setAttribute("aria-label", say(running ? "stop" : "send"));
  send.title = say(running ? "stop" : "send");
  list.setAttribute("aria-busy", String(Boolean(running)));
  enableSend();
}

function enableSend() {
  send.disabled = !running && (draft.value.trim() === "" || editing !== null);
}

/** Shows the conversation from the first message to the last; those that are shown already stay. */
function show() {
  const shown = views.findIndex((view, index) => view.message !== messages[index]);
  for (const view of views.splice(shown < 0 ? views.length : shown)) view.node.remove();
  for (const message of messages.slice(views.length)) {
    const view = new MessageView(message, { retry, edit, enterKey: () => settings.open("key") });
    views.push(view);
    list.append(view.node);
  }
  refresh();
  if (editing !== null && !running) openEditor();
  toEnd();
}

function toEnd() {
  scroll.scrollTop = scroll.scrollHeight;
  isAtEnd = true;
  find("to-end").hidden = true;
}

function follow() {
  if (isAtEnd) scroll.scrollTop = scroll.scrollHeight;
  else find("to-end").hidden = false;
}

/** As high as its lines are: browsers that can do so by themselves (page.css) are left alone. */
function fitDraft() {
  if (CSS.supports("field-sizing", "content")) return;
  draft.style.height = "auto";
  draft.style.height = `${draft.scrollHeight}px`;
}

/** Draws what came, at most once a frame, and less often where drawing takes long. */
class Drawing {
  constructor(view) {
    this.view = view;
    this.notBefore = 0;
    this.isDue = false;
  }

  ask() {
    if (this.isDue) return;
    this.isDue = true;
    const wait = this.notBefore - performance.now();
    const next = () => requestAnimationFrame(() => this.now());
    if (wait > 0) setTimeout(next, wait);
    else next();
  }

  now() {
    this.isDue = false;
    const began = performance.now();
    this.view.draw();
    this.view.updateStatus();
    follow();
    const ended = performance.now();
    this.notBefore = ended + SHARE_OF_TIME * (ended - began);
  }
}

// ---- what is done

/** Not once the page is being left: what breaks off then is no failure of the server's. */
function keepMessages() {
  if (isLeft) return;
  const isKept = keep("messages", messages);
  find("not-kept").hidden = isKept;
}

async function learnModels() {
  try {
    settings.offer(await models(settings.key));
  } catch {
    return; // said when something is sent
  }
  find("model").textContent = settings.model;
}

async function run() {
  const message = { role: "assistant", content: "", end: null, failure: null, measure: null, startedAt: Date.now() };
  const asked = messages.slice();
  messages.push(message);
  running = new AbortController();
  const { signal } = running;
  show();
  announce("answering");
  const view = views.at(-1);
  const drawing = new Drawing(view);
  const clock = setInterval(() => {
    view.updateStatus();
    keepMessages();
    meter.ask();
  }, EVERY_MS);
  if (!settings.model) await learnModels();
  const body = {
    model: settings.model,
    messages: requestMessages(asked, settings.system),
    stream: true,
    stream_options: { include_usage: true },
    ...settings.parameters(),
  };
  await takeAnswer(message, body, settings.key, signal, (text) => {
    view.grow(text);
    drawing.ask();
  });
  clearInterval(clock);
  if (running?.signal === signal) running = null;
  keepMessages();
  drawing.now();
  refresh();
  follow();
  meter.ask();
  if (message.end !== "failed") announce(message.end === "stopped" ? "answerStopped" : "answerDone");
}

function stop() {
  running?.abort();
}

function submit() {
  const text = draft.value.trim();
  if (running || !text || editing !== null) return;
  messages.push({ role: "user", content: text });
  draft.value = "";
  keep("draft", "");
  fitDraft();
  keepMessages();
  run();
}

function retry() {
  if (running) return;
  messages.length = lastQuestion() + 1;
  run();
  draft.focus();
}

function edit() {
  editing = messages[lastQuestion()].content;
  keep("editing", editing);
  openEditor().focus();
}

function openEditor() {
  const index = lastQuestion();
  const view = views[index];
  if (!view || view.editor) return view?.editor.field;
  view.editor = editor(editing, {
    onInput: (text) => keep("editing", (editing = text)),
    onSend: (text) => {
      if (running || !text.trim()) return;
      closeEditor();
      messages.length = index;
      messages.push({ role: "user", content: text.trim() });
      keepMessages();
      run();
      draft.focus();
    },
    onCancel: () => {
      closeEditor();
      draft.focus();
    },
    onEnter,
  });
  view.node.append(view.editor.node);
  view.node.setAttribute("data-editing", "");
  enableSend();
  return view.editor.field;
}

function closeEditor() {
  editing = null;
  keep("editing", null);
  for (const view of views) {
    view.editor?.node.remove();
    delete view.editor;
    view.node.removeAttribute("data-editing");
  }
  enableSend();
}

function newChat() {
  stop();
  if (running) messages.at(-1).end = "stopped";
  closeEditor();
  if (messages.length) keep("previous", messages);
  messages = [];
  keepMessages();
  show();
  draft.focus();
}

function restore() {
  messages = keptMessages("previous");
  keepMessages();
  show();
  draft.focus();
}

/** Enter sends; not with Shift, and not while an input method is composing, whose Enter chooses what was composed. */
function onEnter(event, act) {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing || event.keyCode === 229) return;
  event.preventDefault();
  act();
}

// ---- switches

function relabel() {
  document.title = settings.model ? `${settings.model} · fourfold` : "fourfold";
  translate(document);
  refresh();
  meter.show();
}

function switchLanguage() {
  document.documentElement.lang = language() === "zh" ? "en" : "zh-CN";
  choose("language", document.documentElement.lang);
  relabel();
}

const prefersDark = matchMedia("(prefers-color-scheme: dark)");

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
}

/** Back at what the browser prefers, the page follows it again. */
function switchTheme() {
  const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  setTheme(theme);
  choose("theme", (theme === "dark") === prefersDark.matches ? null : theme);
}

// ---- wiring

find("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) stop();
  else submit();
});
draft.addEventListener("keydown", (event) => onEnter(event, submit));
draft.addEventListener("input", () => {
  keep("draft", draft.value);
  enableSend();
  fitDraft();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !event.isComposing && !find("settings").open) stop();
});
scroll.addEventListener("scroll", () => {
  isAtEnd = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < NEAR_END_PX;
  if (isAtEnd) find("to-end").hidden = true;
});
find("to-end").addEventListener("click", toEnd);
find("new-chat").addEventListener("click", newChat);
find("restore").addEventListener("click", restore);
find("open-settings").addEventListener("click", () => settings.open());
find("theme").addEventListener("click", switchTheme);
find("language").addEventListener("click", switchLanguage);
prefersDark.addEventListener("change", ({ matches }) => {
  if (chosen("theme") === null) setTheme(matches ? "dark" : "light");
});
addEventListener("pagehide", () => {
  keepMessages();
  isLeft = true;
});
addEventListener("pageshow", () => (isLeft = false)); // back from the browser's cache
addEventListener("resize", fitDraft);
new ResizeObserver(() => isAtEnd && toEnd()).observe(scroll); // a keyboard on the screen, a draft that grows
setInterval(() => {
  const last = views.at(-1);
  if (last?.message.failure?.retryAt && !running) last.updateStatus(); // counts the seconds down
}, 1000);

draft.value = kept("draft", "");
translate(document);
show();
fitDraft();
draft.focus();
learnModels().then(relabel);
