// The sheet of settings: model, system prompt, sampling, API key. What is typed is kept at once.

import { keep, kept } from "./store.js";

const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];
const TEXTS = ["model", "system", "key"];

export class Settings {
  /** `onClose` is called when the sheet was closed. */
  constructor(dialog, onClose) {
    this.dialog = dialog;
    this.form = dialog.querySelector("form");
    const values = kept("settings", {});
    for (const name of [...NUMBERS, ...TEXTS]) {
      if (name !== "model") this.form.elements[name].value = String(values[name] ?? "");
    }
    this.model = String(values.model ?? "");
    this.form.addEventListener("input", () => this.keep());
    // Escape closes the sheet too, but leaves no value behind that the browser finds wrong.
    dialog.addEventListener("cancel", (event) => {
      if (!this.form.reportValidity()) event.preventDefault();
    });
    dialog.addEventListener("close", onClose);
    dialog.addEventListener("click", (event) => {
      if (event.target === dialog && this.form.reportValidity()) dialog.close(); // beside the sheet
    });
  }

  open(field = "system") {
    this.dialog.showModal();
    this.form.elements[field].focus();
  }

  keep() {
    const { elements } = this.form;
    if (!elements.model.parentElement.hidden) this.model = elements.model.value;
    const values = Object.fromEntries([...NUMBERS, ...TEXTS].map((name) => [name, elements[name].value]));
    keep("settings", { ...values, model: this.model });
  }

  get key() {
    return this.form.elements.key.value.trim();
  }

  /** Takes the ids that the server offers; a choice is shown only where there is one. */
  offer(ids) {
    const choice = this.form.elements.model;
    choice.replaceChildren(...ids.map((id) => new Option(id, id)));
    if (!ids.includes(this.model)) this.model = ids[0] ?? "";
    choice.value = this.model;
    choice.parentElement.hidden = ids.length < 2;
  }

  /** The fields of a request that were filled in; the others are the server's to choose. */
  parameters() {
    const filled = NUMBERS.filter((name) => this.form.elements[name].value !== "");
    return Object.fromEntries(filled.map((name) => [name, this.form.elements[name].valueAsNumber]));
  }

  get system() {
    return this.form.elements.system.value.trim();
  }
}
