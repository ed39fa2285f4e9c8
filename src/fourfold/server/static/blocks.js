// Lines of Markdown -> blocks: {type, start, end, ...}, `start` and `end` being indices of lines. Types: paragraph {text},
// heading {level, text}, rule, quote {lines}, list {isOrdered, first, items: lines of each}, table {header, alignments,
// rows}, fence {language, indent, mark, lines}. Nothing but line ends separates blocks, so a block that another one follows
// is final, whatever comes later. No regular expression here takes more than linear time.

const MAX_DEPTH = 8; // of quotes and lists within each other; what is deeper is text
const FENCE = /^( {0,3})(`{3,}|~{3,}) *([^`]*)$/;
const CLOSING = /^ {0,3}(`{3,}|~{3,}) *$/;
const HEADING = /^ {0,3}(#{1,6}) +(?=\S)/;
const RULE = /^ {0,3}([-*_])( *\1){2,} *$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( {0,3})([-*+]|\d{1,9}[.)])( +(?=\S)|$)/;
const DELIMITERS = /^[ |:-]+$/;

export const untabbed = (line) => line.replace(/^[ \t]+/, (space) => space.replaceAll("\t", "    ")).replace(/\r$/, "");
export const unindented = (line, most) => line.slice(Math.min(indentOf(line), most));

/** Whether `line` ends the block of code that `fence` begins. */
export function closes(line, fence) {
  const mark = CLOSING.exec(line)?.[1];
  return mark !== undefined && mark[0] === fence.mark[0] && mark.length >= fence.mark.length;
}

export function parse(lines, depth = 0) {
  const blocks = [];
  for (let at = 0; at < lines.length; ) {
    if (isBlank(lines[at])) {
      at += 1;
      continue;
    }
    const block = { start: at, ...(special(lines, at, depth) ?? paragraph(lines, at, depth)) };
    blocks.push(block);
    at = block.end;
  }
  return blocks;
}

const isBlank = (line) => line.trim() === "";
const indentOf = (line) => line.length - line.trimStart().length;

/** The block at a line that begins one; null where it is a paragraph's. */
function special(lines, at, depth) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return fenceAt(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) return { type: "heading", level: heading[1].length, text: headingText(line.slice(heading[0].length)), end: at + 1 };
  if (RULE.test(line)) return { type: "rule", end: at + 1 };
  if (isTable(lines, at)) return tableAt(lines, at);
  if (depth >= MAX_DEPTH) return null;
  if (QUOTE.test(line)) {
    const end = endOf(lines, at, (next) => QUOTE.test(next));
    return { type: "quote", lines: lines.slice(at, end).map((quoted) => quoted.replace(QUOTE, "")), end };
  }
  const item = ITEM.exec(line);
  return item ? listAt(lines, at, item) : null;
}

function endOf(lines, at, belongs) {
  let end = at + 1;
  while (end < lines.length && belongs(lines[end], end)) end += 1;
  return end;
}

function paragraph(lines, at, depth) {
  const end = endOf(lines, at, (line, index) => !isBlank(line) && !interrupts(lines, index, depth));
  return { type: "paragraph", text: lines.slice(at, end).map((line) => line.trim()).join("\n"), end };
}

/** A number other than 1 begins no list within a paragraph: the line may be one that a year or a sum begins. */
function interrupts(lines, at, depth) {
  const line = lines[at];
  if (FENCE.test(line) || HEADING.test(line) || RULE.test(line) || isTable(lines, at)) return true;
  if (depth >= MAX_DEPTH) return false;
  const item = ITEM.exec(line);
  return QUOTE.test(line) || Boolean(item?.[3] && (!/\d/.test(item[2]) || parseInt(item[2]) === 1));
}

function headingText(text) {
  let end = text.trimEnd().length;
  while (text[end - 1] === "#") end -= 1;
  return end === 0 || text[end - 1] === " " ? text.slice(0, end).trim() : text.trim(); // C# keeps its #
}

function fenceAt(lines, at, [, indent, mark, language]) {
  const fence = { type: "fence", indent: indent.length, mark, language: language.trim().split(" ")[0] };
  const end = endOf(lines, at, (line) => !closes(line, fence));
  const body = lines.slice(at + 1, end).map((line) => unindented(line, fence.indent));
  return { ...fence, lines: body, end: Math.min(end + 1, lines.length) };
}

function listAt(lines, at, begin) {
  const base = begin[1].length;
  const isOrdered = /\d/.test(begin[2]);
  const items = [];
  let width = 0; // of the mark and the space after it: what the item's further lines are indented by at most
  let end = at;
  const isWithin = (line) => indentOf(line) - base >= 2;
  const isSibling = (line) => {
    const item = ITEM.exec(line);
    return Boolean(item && /\d/.test(item[2]) === isOrdered && !RULE.test(line));
  };
  while (end < lines.length) {
    const line = lines[end];
    if (isBlank(line)) {
      const next = endOf(lines, end, isBlank);
      if (next >= lines.length || !(isWithin(lines[next]) || isSibling(lines[next]))) break;
      items.at(-1).push(...lines.slice(end, next));
      end = next;
      continue;
    }
    if (items.length && isWithin(line)) {
      items.at(-1).push(unindented(line, base + width));
    } else if (isSibling(line)) {
      const [whole, , mark, space] = ITEM.exec(line);
      width = mark.length + (space.length > 4 ? 1 : Math.max(1, space.length));
      items.push([line.slice(whole.length)]);
    } else if (isBlank(lines[end - 1]) || ITEM.test(line) || interrupts(lines, end, 0)) {
      break;
    } else {
      items.at(-1).push(line); // a paragraph's line that lost its indentation
    }
    end += 1;
  }
  return { type: "list", isOrdered, first: isOrdered ? parseInt(begin[2]) : null, items, end };
}

function isTable(lines, at) {
  const next = lines[at + 1];
  return next !== undefined && lines[at].includes("|") && next.includes("|") && next.includes("-") && DELIMITERS.test(next);
}

function tableAt(lines, at) {
  const end = endOf(lines, at + 1, (line) => line.includes("|"));
  const alignments = cellsOf(lines[at + 1]).map((cell) =>
    cell.endsWith(":") ? (cell.startsWith(":") ? "center" : "right") : "",
  );
  return { type: "table", header: cellsOf(lines[at]), alignments, rows: lines.slice(at + 2, end).map(cellsOf), end };
}

/** A row's cells: between bars, those with a backslash before them being text. */
function cellsOf(row) {
  const cells = [""];
  for (const piece of row.trim().split("|")) {
    const before = cells.pop();
    if (before.endsWith("\\")) cells.push(`${before.slice(0, -1)}|${piece}`);
    else cells.push(before, piece);
  }
  cells.shift();
  if (cells[0]?.trim() === "") cells.shift();
  if (cells.length > 1 && cells.at(-1).trim() === "") cells.pop();
  return cells.map((cell) => cell.trim());
}
