// One run in the gallery: its pictures by step, and what can be done with a step.
import { readableBytes } from "./numbers.mjs";
import { nameOf } from "./gallery_list.mjs";
import { copyButton, make } from "./panel.mjs";
import { makePicture } from "./picture.mjs";

export class GalleryDetails {
  /**
   * @param run of the server's list
   * @param t see gallery_words.mjs
   * @param actions {back(), use(step), sweep(step), send(step), folder(), remove(), viewAddress(image), date(seconds)}
   * @param opens whether the server can open a folder
   */
  constructor(run, t, actions, opens) {
    this.run = run;
    this._t = t;
    this._actions = actions;
    this._steps = [];
    this._history = { saved: [], validations: [] };
    const words = run.trigger || run.run;
    this._back = make("button", { type: "button", onclick: () => actions.back() }, `‹ ${t("back")}`);
    this._pictures = make("div", { className: "sbg-pictures" });
    this._slider = make("input", { type: "range", min: "0", oninput: () => this._showStep() });
    this._slider.setAttribute("aria-label", t("pictures"));
    this._at = make("span", { className: "sbg-faint" });
    this._note = make("div", { className: "sbg-note" });
    this._note.setAttribute("role", "status");
    const button = (name, help, act) => make("button", { type: "button", title: help, onclick: act }, t(name));
    this._use = button("use", t("useHelp"), () => actions.use(this.step));
    this._use.classList.add("sbg-main");
    this._sweep = button("sweep", t("sweepHelp"), () => actions.sweep(this.step));
    this._send = button("send", t("sendHelp"), () => actions.send(this.step));
    const folder = button(opens ? "folder" : "path", "", () => actions.folder());
    this._delete = button("delete", "", () => this._ask());
    this._copy = copyButton(words, t("copy"));
    this._copy.className = "";
    this._question = make("div");
    this._sweeps = make("div");
    this._list = make("dl");
    this.element = make("div", {},
      make("div", { className: "sbg-line" }, this._back),
      make("h2", { className: "sbg-words" }, nameOf(run)),
      this._pictures,
      make("div", { className: "sbg-line" }, this._slider, this._at),
      make("div", { className: "sbg-actions" }, this._use, this._sweep, this._send, this._copy, folder, this._delete),
      this._question, this._note, this._sweeps, this._list);
    Object.assign(this.element.style, { display: "flex", flexDirection: "column", gap: "8px" });
    this.element.addEventListener("keydown", (event) => {
      if (event.key === "Escape") actions.back();
      event.stopPropagation(); // the editor has shortcuts of its own
    });
    this.update(run);
  }

  /** The step that the slider is at; 0 without any. */
  get step() {
    return this._steps[Number(this._slider.value)] ?? 0;
  }

  focus() {
    this._back.focus();
  }

  /** @param history of the server: saved steps, validations */
  fill(history) {
    const before = this.step || this.run.step;
    this._history = history;
    const steps = new Set([...history.saved, ...history.validations.map(({ step }) => step)]);
    this._steps = [...steps].sort((one, two) => one - two);
    this._slider.max = String(Math.max(0, this._steps.length - 1));
    // The last of those up to the step in use.
    const at = this._steps.findLastIndex((step) => step <= before);
    this._slider.value = String(Math.max(0, at));
    this._slider.disabled = this._steps.length < 2;
    this._showStep();
  }

  /** @param run the same run, read again */
  update(run) {
    this.run = run;
    this._delete.disabled = run.active;
    this._delete.title = run.active ? this._t("deleteTraining") : "";
    this._list.replaceChildren(...this._facts());
    this._showStep();
  }

  note(text) {
    this._note.textContent = text;
  }

  /** @param sweeps of the server */
  showSweeps(sweeps) {
    this._sweeps.replaceChildren(...sweeps.flatMap((sweep) => this._sweepOf(sweep)));
  }

  _showStep() {
    const t = this._t;
    const { step } = this;
    const inUse = step && step === this.run.step ? ` · ${t("inUse")}` : "";
    this._at.textContent = step ? t("step", { step }) + inUse : "";
    const shown = this._history.validations.find((validation) => validation.step === step);
    const images = (shown?.images ?? []).map((image, number) => {
      const prompt = shown.prompts[number] ?? "";
      const picture = makePicture(this._actions.viewAddress(image), `${t("step", { step })}: ${prompt}`);
      picture.title = prompt;
      return picture;
    });
    const missing = make("p", { className: "sbg-faint" }, t(this._steps.length ? "notDrawn" : "noSteps"));
    this._pictures.replaceChildren(...(images.length ? images : [missing]));
    const kept = this._history.saved.includes(step);
    for (const button of [this._use, this._sweep, this._send]) button.disabled = !kept;
    this._use.title = t(kept ? "useHelp" : "notKept");
  }

  _sweepOf({ step, prompts, strengths, images }) {
    const figure = (image, number, prompt) => make("figure", {},
      image
        ? makePicture(this._actions.viewAddress(image), `${prompt}, ${strengths[number]}`)
        : make("div", { className: "sbg-blank" }),
      make("figcaption", {}, strengths[number].toFixed(2)));
    return [
      make("h3", {}, this._t("sweepTitle", { step })),
      ...prompts.flatMap((prompt, row) => [
        make("div", { className: "sbg-small sbg-faint" }, prompt.replaceAll("{subject}", this.run.trigger)),
        make("div", { className: "sbg-sweep" }, ...images[row].map((image, number) => figure(image, number, prompt))),
      ]),
    ];
  }

  _facts() {
    const t = this._t;
    const { run } = this;
    const rows = [
      ["pictures", t("stepOf", run)],
      ["base", [run.file, run.base].filter(Boolean).join(" · ")],
      ["words", run.trigger],
      ["settings", settingsOf(run, t)],
      ["size", readableBytes(run.size)],
      ["date", this._actions.date(run.changed)],
      ["file", run.lora ? `models/loras/${run.lora}` : ""],
    ];
    return rows.filter(([, value]) => value).flatMap(([name, value]) => [
      make("dt", {}, t(name)), make("dd", {}, value),
    ]);
  }

  _ask() {
    const t = this._t;
    const { run } = this;
    const close = () => {
      this._question.replaceChildren();
      this._delete.focus();
    };
    const no = make("button", { type: "button", onclick: close }, t("deleteNo"));
    const yes = make("button", { type: "button", className: "sbg-danger", onclick: () => this._actions.remove() }, t("deleteYes"));
    const text = [t("deleteAsk", { size: readableBytes(run.size), saved: run.saved }),
      run.lora ? t("deleteKeeps", run) : ""].join(" ");
    const box = make("div", { className: "sbg-box" }, make("div", {}, text), make("div", { className: "sbg-line" }, no, yes));
    box.setAttribute("role", "alertdialog");
    box.setAttribute("aria-label", text);
    this._question.replaceChildren(box);
    no.focus();
  }
}

function settingsOf(run, t) {
  return [t("settingsOf", run), run.learning_rate && t("rateOf", { rate: run.learning_rate }),
    run.preservation && t("preservationOf", run)].filter(Boolean).join(", ");
}
