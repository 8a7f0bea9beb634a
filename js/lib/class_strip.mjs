// Class images before and after the training, from the same seeds, with the drift if it is known.
import { make } from "./panel.mjs";
import { makePicture } from "./picture.mjs";

export class ClassStrip {
  /**
   * @param words see train_words.mjs
   * @param viewAddress from a picture of the server to its URL
   */
  constructor(words, viewAddress) {
    this._words = words;
    this._viewAddress = viewAddress;
    this._shown = "";
    this.element = make("div", { className: "sbt-class", title: words.classHelp, hidden: true });
  }

  /** @param pictures {prompt, before, after, drift} of the run's result, or nothing */
  show(pictures) {
    this.element.hidden = !pictures;
    const now = pictures ? JSON.stringify(pictures) : "";
    if (now === this._shown) return; // making them again would flicker
    this._shown = now;
    this.element.replaceChildren(...(pictures ? this._rows(pictures) : []));
  }

  _rows({ prompt, before, after, drift }) {
    const words = this._words;
    const figure = Number.isFinite(drift) ? `${words.drift} ${drift.toFixed(2)}` : "";
    return [
      make("div", { className: "sbt-line" },
        make("span", { className: "sbt-grow sbt-faint" }, `${words.classTitle}: ${prompt}`),
        make("span", { className: "sbt-numbers", title: words.driftHelp }, figure)),
      this._row(words.classBefore, before),
      this._row(words.classAfter, after),
    ];
  }

  _row(name, image) {
    return make("div", {}, make("span", { className: "sbt-side" }, name),
      makePicture(this._viewAddress(image), `${this._words.classTitle}, ${name}`));
  }
}
