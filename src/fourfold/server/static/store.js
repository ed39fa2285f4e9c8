// What survives a reload. The tab's own storage: conversation, draft, settings, API key; it is gone when the tab closes.
// The browser's storage: theme and language alone (early.js reads them).

const PREFIX = "fourfold.";

function read(storage, name, otherwise) {
  try {
    return JSON.parse(storage().getItem(PREFIX + name)) ?? otherwise;
  } catch {
    return otherwise; // blocked, or written by something else
  }
}

/** False where the browser refuses: storage is blocked or full. */
function write(storage, name, value) {
  try {
    storage().setItem(PREFIX + name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

const tab = () => sessionStorage;

export const keep = (name, value) => write(tab, name, value);
export const kept = (name, otherwise) => read(tab, name, otherwise);

/** Remembers a choice made by a switch, as plain text; null forgets it, and the browser's own preference holds again. */
export function choose(name, value) {
  try {
    if (value === null) localStorage.removeItem(PREFIX + name);
    else localStorage.setItem(PREFIX + name, value);
  } catch {
    // Blocked: the choice holds until the page is left.
  }
}

export function chosen(name) {
  try {
    return localStorage.getItem(PREFIX + name);
  } catch {
    return null;
  }
}

/** The messages that were kept, those that are messages; an answer that was still coming was interrupted. */
export function keptMessages(name = "messages") {
  const messages = kept(name, []);
  if (!Array.isArray(messages)) return [];
  return messages
    .filter((message) => ["user", "assistant"].includes(message?.role) && typeof message.content === "string")
    .map((message) => (message.role === "user" || message.end ? message : { ...message, end: "failed", failure: { kind: "Reload" } }));
}
