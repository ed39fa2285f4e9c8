// What the server is doing, asked for while the page is seen: tokens/s of all its users, and the share of the memory
// bandwidth that this takes, which is what bounds it.

import { stats } from "./api.js";
import { number, say } from "./strings.js";

const EVERY_MS = 2000;
const WHEN_AWAY_MS = 6000;
const PARTS = ["meter", "meter-speed", "meter-share", "meter-share-text", "gauge", "meter-queue"];

export class Meter {
  /** `find(id)` gives the meter's elements; `key()` the API key. */
  constructor(find, key) {
    this.find = find;
    this.key = key;
    this.latest = null; // what the server said last; null where it did not answer
    this.kind = null; // of the failure, where it did not
    document.addEventListener("visibilitychange", () => this.ask());
    this.ask();
  }

  /** Asks now, and then again and again; one round at a time. */
  async ask() {
    clearTimeout(this.timer);
    if (document.hidden || this.isAsking) return;
    this.isAsking = true;
    try {
      this.latest = await stats(this.key());
      this.kind = null;
    } catch (error) {
      this.latest = null;
      this.kind = error.kind ?? "Server";
    }
    this.isAsking = false;
    this.show();
    this.timer = setTimeout(() => this.ask(), this.latest ? EVERY_MS : WHEN_AWAY_MS);
  }

  show() {
    const [meter, speed, share, shareText, gauge, queue] = PARTS.map(this.find);
    const { latest } = this;
    const isBusy = Boolean(latest && (latest.running || latest.waiting));
    const percent = Math.round(100 * (latest?.bandwidth_share ?? 0));
    meter.hidden = !latest && this.kind !== "Unreachable"; // without a key the server's work is nobody's business
    meter.dataset.state = latest ? (isBusy ? "busy" : "idle") : "away";
    speed.textContent = isBusy ? speedText(latest) : say(latest ? "idle" : "offline");
    share.hidden = !isBusy || latest.bandwidth_share === null; // null: the machine's bandwidth was not measured
    shareText.textContent = say("share", { percent: number(percent) });
    gauge.style.width = `${Math.min(100, percent)}%`;
    queue.hidden = !isBusy;
    queue.textContent = isBusy ? say("queue", { running: number(latest.running), waiting: number(latest.waiting) }) : "";
  }
}

/** Answers' tokens; those of prompts where nothing but prompts is computed. */
function speedText({ tokens_per_second: answers, prompt_tokens_per_second: prompts }) {
  return answers || !prompts ? say("speed", { rate: number(answers, 1) }) : say("promptSpeed", { rate: number(prompts) });
}
