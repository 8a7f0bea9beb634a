// Class images before and after the training, from the same seeds, with the drift if it is known.
export class ClassStrip {
  /**
   * @param words see train_words.mjs
   * @param viewAddress from a picture of the server to its URL
   */
  constructor(words, viewAddress) {
    this._words = words;
    this._viewAddress = viewAddress;
    this._shown = "";
    this.element = document.createElement("div");
    this.element.className = "sbt-class";
    this.element.title = words.classHelp;
    this.element.hidden = true;
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
    const title = document.createElement("div");
    title.className = "sbt-line";
    const name = document.createElement("span");
    name.className = "sbt-grow sbt-faint";
    name.textContent = `${words.classTitle}: ${prompt}`;
    const figure = document.createElement("span");
    figure.className = "sbt-numbers";
    figure.title = words.driftHelp;
    figure.textContent = Number.isFinite(drift) ? `${words.drift} ${drift.toFixed(2)}` : "";
    title.append(name, figure);
    return [title, this._row(words.classBefore, before), this._row(words.classAfter, after)];
  }

  _row(name, image) {
    const row = document.createElement("div");
    const side = document.createElement("span");
    side.className = "sbt-side";
    side.textContent = name;
    const picture = document.createElement("img");
    picture.src = this._viewAddress(image);
    picture.alt = `${this._words.classTitle}, ${name}`;
    picture.draggable = false;
    picture.addEventListener("click", () => window.open(picture.src, "_blank", "noopener"));
    row.append(side, picture);
    return row;
  }
}
