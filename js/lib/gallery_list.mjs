// The gallery's list of runs. Renders, and calls back; knows neither the server nor the graph.
import { readableBytes } from "./numbers.mjs";
import { make } from "./panel.mjs";

/** Below this many, all runs are seen at once. */
const SEARCHED_FROM = 8;

export class GalleryList {
  /**
   * @param t see gallery_words.mjs
   * @param actions {refresh(), open(run), thumbnail(run), date(seconds)}
   */
  constructor(t, actions) {
    this._t = t;
    this._actions = actions;
    this._runs = null;
    this._count = make("span", { className: "sbg-grow sbg-faint" });
    const refresh = make("button", { type: "button", onclick: () => actions.refresh() }, t("refresh"));
    this._search = make("input", { type: "search", placeholder: t("search"), hidden: true, oninput: () => this._fill() });
    this._search.setAttribute("aria-label", t("search"));
    this._body = make("div");
    const head = make("div", { className: "sbg-line" }, make("h2", {}, t("heading")), this._count, refresh);
    this.element = make("div", {}, head, this._search, this._body);
    Object.assign(this.element.style, { display: "flex", flexDirection: "column", gap: "8px" });
    this._body.append(make("p", { className: "sbg-faint" }, t("loading")));
  }

  /** @param runs of the server's list; size in bytes */
  show(runs, size) {
    this._runs = runs;
    this._search.hidden = runs.length < SEARCHED_FROM;
    const values = { n: runs.length, size: readableBytes(size) };
    const focused = document.activeElement?.dataset.run;
    this._count.textContent = runs.length ? this._t(runs.length === 1 ? "one" : "summary", values) : "";
    this._fill();
    if (focused) this.focus(focused);
  }

  fail(error) {
    this._body.replaceChildren(make("p", { className: "sbg-note" }, this._t("failed", { error })));
  }

  /** Give the keyboard back to the entry that was opened. */
  focus(run) {
    this._body.querySelector(`[data-run="${CSS.escape(run)}"]`)?.focus();
  }

  _fill() {
    const t = this._t;
    const text = this._search.hidden ? "" : this._search.value.trim().toLowerCase();
    const found = this._runs.filter((run) => !text || searchable(run).includes(text));
    if (!this._runs.length) {
      this._body.replaceChildren(make("p", {}, t("empty")), make("p", { className: "sbg-faint" }, t("emptyMore")));
    } else if (!found.length) {
      this._body.replaceChildren(make("p", { className: "sbg-faint" }, t("noMatch", { text: this._search.value.trim() })));
    } else {
      this._body.replaceChildren(make("ul", {}, ...found.map((run) => make("li", {}, this._entry(run)))));
    }
  }

  _entry(run) {
    const t = this._t;
    const name = nameOf(run);
    const words = run.trigger === name ? "" : run.trigger;
    const button = make("button", { type: "button", className: "sbg-run", onclick: () => this._actions.open(run) });
    button.dataset.run = run.run;
    button.setAttribute("aria-label", t("open", { words: name }));
    const facts = [words, run.file || run.base, readableBytes(run.size), this._actions.date(run.changed)];
    const mark = run.active ? "training" : markOf(run);
    button.append(
      picture(run, this._actions.thumbnail(run), t),
      make("div", { className: "sbg-grow" },
        make("div", { className: "sbg-words" }, name),
        make("div", { className: "sbg-small" }, stepOf(run, t), " ",
          mark ? make("span", { className: "sbg-mark" }, t(mark)) : null),
        make("div", { className: "sbg-small sbg-faint" }, facts.filter(Boolean).join(" · "))),
    );
    return button;
  }
}

/** What a run is called: its file in models/loras; before it has one, its words. */
export const nameOf = (run) => run.lora.replace(/\.safetensors$/, "") || run.trigger || run.run;

const searchable = (run) => `${run.trigger} ${run.file} ${run.base} ${run.lora}`.toLowerCase();

const markOf = ({ why }) => (["stopped", "unfinished", "chosen", "best"].includes(why) ? why : "");

function stepOf(run, t) {
  return run.step && run.step === run.steps ? t("step", run) : t("stepOf", run);
}

function picture(run, address, t) {
  if (!address) return make("span", { className: "sbg-thumb" }, t("noPicture"));
  // Loaded when it comes into view.
  return make("img", { className: "sbg-thumb", loading: "lazy", src: address, alt: "", draggable: false });
}
