// Markdown as it streams. A block is settled once another has begun after it, and is never touched again; only the last
// block is drawn anew, and code between fences, which may be long, only ever grows. HTML is text.

import { closes, parse, unindented, untabbed } from "./blocks.js";
import { element, inline } from "./inline.js";

export class MarkdownStream {
  /** Draws below `root`; `codeBlock(language)` makes {node, text}: a block of code, and the text node that it grows by. */
  constructor(root, codeBlock) {
    this.root = root;
    this.codeBlock = codeBlock;
    this.lines = []; // whole lines that are not settled: those of the last block
    this.rest = ""; // of a line that is still coming
    this.provisional = []; // nodes of both, drawn anew each time
    this.fence = null; // the block of code that is open
  }

  /** Takes what came; `draw` shows it. Several pieces may be taken between two drawings. */
  append(text) {
    const lines = (this.rest + text).split("\n");
    this.rest = lines.pop();
    this.lines.push(...lines.map(untabbed));
  }

  /** Takes the end of the text: its last line is whole. */
  end() {
    if (this.rest) this.append("\n");
  }

  draw() {
    for (const node of this.provisional.splice(0)) node.remove();
    while (!this.fence || this.growFence()) {
      const blocks = parse(this.lines);
      const last = blocks.at(-1);
      for (const block of blocks.slice(0, -1)) this.root.append(this.render(block));
      this.lines = last ? this.lines.slice(last.start) : [];
      if (last?.type !== "fence") {
        const open = parse(this.rest ? [...this.lines, untabbed(this.rest)] : this.lines);
        this.provisional = open.map((block) => this.render(block));
        this.root.append(...this.provisional);
        return;
      }
      this.fence = { ...last, ...this.codeBlock(last.language) };
      this.root.append(this.fence.node);
      this.lines.shift();
    }
  }

  /** Moves whole lines into the open block of code; true where they end it. */
  growFence() {
    const { fence } = this;
    const end = this.lines.findIndex((line) => closes(line, fence));
    const grown = this.lines.splice(0, end < 0 ? this.lines.length : end);
    if (grown.length) {
      const text = grown.map((line) => unindented(line, fence.indent)).join("\n");
      fence.text.appendData(fence.hasLines ? `\n${text}` : text);
      fence.hasLines = true;
    }
    if (end < 0) return false;
    this.lines.shift();
    this.fence = null;
    return true;
  }

  render(block, depth = 0) {
    switch (block.type) {
      case "heading":
        return element(`h${Math.min(6, block.level + 2)}`, { dir: "auto" }, inline(block.text)); // h1 and h2 are the page's
      case "rule":
        return element("hr");
      case "quote":
        return element("blockquote", {}, ...parse(block.lines, depth + 1).map((inner) => this.render(inner, depth + 1)));
      case "list": {
        const list = block.isOrdered ? element("ol", { start: block.first }) : element("ul");
        list.append(...block.items.map((lines) => element("li", { dir: "auto" }, ...this.renderItem(lines, depth + 1))));
        return list;
      }
      case "table":
        return element("div", { class: "wide" }, renderTable(block));
      case "fence": {
        const { node, text } = this.codeBlock(block.language);
        text.data = block.lines.join("\n");
        return node;
      }
      default:
        return element("p", { dir: "auto" }, inline(block.text));
    }
  }

  /** An item's first paragraph stands without a `p`, so that lists of short items stay tight. */
  renderItem(lines, depth) {
    return parse(lines, depth).map((block, index) =>
      index === 0 && block.type === "paragraph" ? inline(block.text) : this.render(block, depth),
    );
  }
}

function renderTable({ header, alignments, rows }) {
  const row = (cells, name) =>
    element("tr", {}, ...header.map((_, column) => element(name, { class: alignments[column] ?? "" }, inline(cells[column] ?? ""))));
  return element(
    "table",
    {},
    element("thead", {}, row(header, "th")),
    element("tbody", {}, ...rows.map((cells) => row(cells, "td"))),
  );
}
