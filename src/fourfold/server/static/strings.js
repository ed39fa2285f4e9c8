// Every sentence of the page, in both languages. {name} is filled in by `say`. Tests hold the two tables to the same keys
// and the same blanks, and every key to being used.

const en = {
  tools: "Tools",
  newChat: "New chat",
  restore: "Back to the previous chat",
  settings: "Settings",
  theme: "Light or dark",
  otherLanguage: "中文",
  switchLanguage: "切换到中文",
  conversation: "Conversation",
  emptyTitle: "What can I help with?",
  emptyText: "The model runs on this server’s processors. What you write is sent there and nowhere else.",
  message: "Message",
  placeholder: "Write a message",
  hint: "Enter sends, Shift+Enter breaks the line",
  send: "Send",
  stop: "Stop",
  toEnd: "To the end",
  you: "You",
  answer: "Answer",
  copy: "Copy",
  copied: "Copied",
  copyFailed: "Not copied",
  copyCode: "Copy the code",
  retry: "Retry",
  edit: "Edit",
  editMessage: "Edit the message",
  cancel: "Cancel",
  model: "Model",
  system: "System prompt",
  systemPlaceholder: "How the model should answer",
  sampling: "Sampling",
  samplingNote: "An empty field leaves the choice to the server.",
  temperature: "Temperature",
  topP: "Top p",
  maxTokens: "Max tokens",
  seed: "Seed",
  seedPlaceholder: "random",
  serverDefault: "default",
  apiKey: "API key",
  apiKeyPlaceholder: "Only if the server asks for one",
  apiKeyNote: "Kept in this tab alone, and forgotten when it closes.",
  close: "Close",
  done: "Done",
  waiting: "Waiting for the first token",
  waitingSeconds: "Waiting for the first token, {seconds}\u00a0s",
  answering: "Answering",
  answerDone: "The answer is complete.",
  answerStopped: "Stopped",
  answerCut: "Longest length reached",
  token: "{n} token",
  tokens: "{n} tokens",
  speed: "{rate} tokens/s",
  promptSpeed: "{rate} prompt tokens/s",
  firstToken: "first after {seconds}\u00a0s",
  share: "{percent}\u00a0% of memory bandwidth",
  queue: "{running} running, {waiting} waiting",
  idle: "Idle",
  offline: "Server not reached",
  errorUnreachable: "The server cannot be reached; the conversation is kept.",
  errorLost: "The connection was lost in the middle of the answer.",
  errorKey: "The server wants a valid API key.",
  errorBusy: "The server is full at the moment.",
  errorBusyFor: "The server is full; it asks to try again in {seconds}\u00a0s.",
  errorDraining: "The server is starting or shutting down; try again in a moment.",
  errorDrainingFor: "The server is starting or shutting down; it asks to try again in {seconds}\u00a0s.",
  errorRefused: "The server refused the request: {message}",
  errorServer: "The server failed: {message}",
  errorReload: "The answer was interrupted when the page was left.",
  errorStorage: "The browser does not keep this conversation: it is lost when the page closes.",
  enterKey: "Enter the API key",
};

const zh = {
  tools: "工具",
  newChat: "新对话",
  restore: "回到上一个对话",
  settings: "设置",
  theme: "浅色或深色",
  otherLanguage: "English",
  switchLanguage: "Switch to English",
  conversation: "对话",
  emptyTitle: "有什么可以帮您？",
  emptyText: "模型运行在这台服务器的处理器上，您输入的内容只会发送到这里。",
  message: "消息",
  placeholder: "输入消息",
  hint: "Enter 发送，Shift+Enter 换行",
  send: "发送",
  stop: "停止",
  toEnd: "到末尾",
  you: "您",
  answer: "回答",
  copy: "复制",
  copied: "已复制",
  copyFailed: "复制失败",
  copyCode: "复制代码",
  retry: "重试",
  edit: "编辑",
  editMessage: "编辑消息",
  cancel: "取消",
  model: "模型",
  system: "系统提示词",
  systemPlaceholder: "希望模型如何回答",
  sampling: "采样",
  samplingNote: "留空则由服务器决定。",
  temperature: "温度",
  topP: "Top p",
  maxTokens: "最大词元数",
  seed: "随机种子",
  seedPlaceholder: "随机",
  serverDefault: "默认",
  apiKey: "API 密钥",
  apiKeyPlaceholder: "仅在服务器要求时填写",
  apiKeyNote: "只保存在此标签页中，关闭后即清除。",
  close: "关闭",
  done: "完成",
  waiting: "等待第一个词元",
  waitingSeconds: "等待第一个词元，{seconds}\u00a0秒",
  answering: "正在回答",
  answerDone: "回答完毕。",
  answerStopped: "已停止",
  answerCut: "已达到长度上限",
  token: "{n} 个词元",
  tokens: "{n} 个词元",
  speed: "{rate} 词元/秒",
  promptSpeed: "提示 {rate} 词元/秒",
  firstToken: "首个用时 {seconds}\u00a0秒",
  share: "内存带宽的 {percent}%",
  queue: "{running} 个运行中，{waiting} 个等待",
  idle: "空闲",
  offline: "无法连接服务器",
  errorUnreachable: "无法连接服务器；对话已保留。",
  errorLost: "回答中途连接断开。",
  errorKey: "服务器要求有效的 API 密钥。",
  errorBusy: "服务器繁忙，请稍后再试。",
  errorBusyFor: "服务器繁忙，请在 {seconds}\u00a0秒后重试。",
  errorDraining: "服务器正在启动或关闭，请稍后再试。",
  errorDrainingFor: "服务器正在启动或关闭，请在 {seconds}\u00a0秒后重试。",
  errorRefused: "服务器拒绝了请求：{message}",
  errorServer: "服务器出错：{message}",
  errorReload: "离开页面时回答被中断。",
  errorStorage: "浏览器无法保存此对话，关闭页面后将丢失。",
  enterKey: "填写 API 密钥",
};

export const STRINGS = { en, zh };

export const language = () => (document.documentElement.lang.startsWith("zh") ? "zh" : "en");

/** The sentence of `key` in the page's language, its blanks filled with `values`. */
export function say(key, values = {}) {
  return STRINGS[language()][key].replace(/\{(\w+)\}/g, (_, name) => values[name]);
}

/** A number as the page's language writes it, with exactly `digits` after the point. */
export function number(value, digits = 0) {
  const form = { minimumFractionDigits: digits, maximumFractionDigits: digits };
  return new Intl.NumberFormat(document.documentElement.lang, form).format(value);
}

/** Writes the language's words into everything below `root` that names a key in data-i18n, -label, -title, -placeholder. */
export function translate(root) {
  const each = (name, write) => {
    for (const element of root.querySelectorAll(`[data-i18n${name}]`)) {
      write(element, say(element.getAttribute(`data-i18n${name}`)));
    }
  };
  each("", (element, text) => (element.textContent = text));
  each("-label", (element, text) => element.setAttribute("aria-label", text));
  each("-title", (element, text) => element.setAttribute("title", text));
  each("-placeholder", (element, text) => element.setAttribute("placeholder", text));
}
