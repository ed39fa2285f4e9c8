// Markdown within a line, as DOM nodes. Text reaches the page by text nodes alone; no model output is ever parsed as HTML.
// Looser than CommonMark where Chinese needs it: emphasis may touch letters and punctuation of any script.

const MAX_DEPTH = 6;
const WINDOW = 1000; // characters searched for the other end of a mark: bounds the work on text made of marks alone
const SPECIAL = /[\\`*_~[!<h\n]/g;
const ESCAPABLE = "\\`*_~#<>|!{}-+.";
const ADDRESS = /https?:\/\/[^\s<>"'`)\]}，。；：、！？（）【】《》“”]+/y;
const BREAK = /<br ?\/?>/y;
const WORD = /[\p{L}\p{N}_]/u;
const MARKS = [
  ["**", "strong"],
  ["__", "strong"],
  ["~~", "del"],
  ["*", "em"],
  ["_", "em"],
];

export function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

/** The nodes of one paragraph's text. */
export function inline(text, depth = 0) {
  const nodes = document.createDocumentFragment();
  let plainFrom = 0;
  let at = 0;
  while (at < text.length) {
    SPECIAL.lastIndex = at;
    const special = SPECIAL.exec(text);
    if (!special) break;
    at = special.index;
    const found = markup(text, at, depth);
    if (!found) {
      at += 1;
      continue;
    }
    if (at > plainFrom) nodes.append(text.slice(plainFrom, at));
    nodes.append(found.node);
    at = plainFrom = found.end;
  }
  if (plainFrom < text.length) nodes.append(text.slice(plainFrom));
  return nodes;
}

/** {node, end} of the markup that begins at `at`; null where that character is itself. */
function markup(text, at, depth) {
  switch (text[at]) {
    case "\n":
      return { node: element("br"), end: at + 1 };
    case "\\":
      return at + 1 < text.length && ESCAPABLE.includes(text[at + 1]) ? { node: text[at + 1], end: at + 2 } : null;
    case "`":
      return codeSpan(text, at);
    case "<":
      return matches(BREAK, text, at) ? { node: element("br"), end: BREAK.lastIndex } : null;
    case "h":
      return address(text, at);
    case "[":
      return link(text, at, depth);
    case "!": // an image is not loaded: its address would tell its owner what is read here
      return text[at + 1] === "[" ? link(text, at + 1, depth) : null;
    default:
      return depth < MAX_DEPTH ? emphasis(text, at, depth) : null;
  }
}

function matches(pattern, text, at) {
  pattern.lastIndex = at;
  return pattern.exec(text)?.[0];
}

function runLength(text, at) {
  let end = at;
  while (text[end] === text[at]) end += 1;
  return end - at;
}

function codeSpan(text, at) {
  const n = runLength(text, at);
  const limit = Math.min(text.length, at + WINDOW);
  for (let close = text.indexOf("`", at + n); close >= 0 && close < limit; close = text.indexOf("`", close)) {
    const m = runLength(text, close);
    if (m === n) {
      const inner = text.slice(at + n, close);
      const padded = inner.startsWith(" ") && inner.endsWith(" ") && inner.trim();
      return { node: element("code", {}, padded ? inner.slice(1, -1) : inner), end: close + n };
    }
    close += m;
  }
  return { node: text.slice(at, at + n), end: at + n };
}

function emphasis(text, at, depth) {
  for (const [mark, name] of MARKS) {
    if (!text.startsWith(mark, at)) continue;
    const from = at + mark.length;
    if (/\s/.test(text[from] ?? " ")) return null;
    if (mark[0] === "_" && at > 0 && WORD.test(text[at - 1])) return null; // snake_case
    const close = closing(text, from, mark);
    if (close > from) {
      return { node: element(name, {}, inline(text.slice(from, close), depth + 1)), end: close + mark.length };
    }
    if (mark.length === 2) return { node: mark, end: from };
  }
  return null;
}

/** Where `mark` closes what began before `from`; -1 where it does not. */
function closing(text, from, mark) {
  const limit = Math.min(text.length, from + WINDOW);
  for (let at = text.indexOf(mark, from); at >= 0 && at < limit; at = text.indexOf(mark, at)) {
    const run = runLength(text, at);
    const close = at + run - mark.length; // the innermost marks of a run belong to what is within
    const fits = mark.length === 2 || run !== 2; // ** within *...* is strong, not an end
    const isWord = mark[0] === "_" && WORD.test(text[at + run] ?? " ");
    if (fits && !isWord && at > from && !/\s/.test(text[at - 1])) return close;
    at += run;
  }
  return -1;
}

function anchor(address, ...children) {
  return element("a", { href: address, rel: "noopener noreferrer", target: "_blank" }, ...children);
}

function address(text, at) {
  const found = matches(ADDRESS, text, at)?.replace(/[.,;:!?*_~]{1,9}$/, "");
  return found ? { node: anchor(found, found), end: at + found.length } : null;
}

/** [label](address), where the address is one that may be followed: anything else stays text. */
function link(text, at, depth) {
  if (depth >= MAX_DEPTH) return null;
  const limit = Math.min(text.length, at + 2 * WINDOW);
  const middle = text.slice(at, at + WINDOW).indexOf("](");
  if (middle < 0) return null;
  const from = at + middle + 2;
  let end = from;
  for (let open = 1; end < limit; end += 1) {
    const character = text[end];
    if (character === "(") open += 1;
    else if (character === ")" && --open === 0) break;
    else if (character === " " || character === "\n") return null;
  }
  if (end >= limit) return null;
  const to = text.slice(from, end);
  if (!/^(https?:\/\/|mailto:)/i.test(to)) return null;
  const label = text.slice(at + 1, at + middle) || to;
  return { node: anchor(to, inline(label, MAX_DEPTH)), end: end + 1 };
}
