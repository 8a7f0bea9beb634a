// Class images before and after the training, from the same seeds, with the drift if it is known.
export class ClassStrip {
  /**
   * @param words see train_words.mjs
   * @param viewAddress from a picture of the server to its URL
   */
  constructor(words, viewAddress) {
    this._words = words;
    this._viewAddress = viewAddress;
    this.element = document.createElement("div");
    this.element.className = "sbt-class";
    this.element.title = words.classHelp;
    const title = document.createElement("div");
    title.className = "sbt-line";
    this._title = document.createElement("span");
    this._title.className = "sbt-grow sbt-faint";
    this._drift = document.createElement("span");
    this._drift.className = "sbt-numbers";
    this._drift.title = words.driftHelp;
    title.append(this._title, this._drift);
    this._before = this._row(words.classBefore);
    this._after = this._row(words.classAfter);
    this.element.append(title, this._before.parentElement, this._after.parentElement);
    this.element.hidden = true;
  }

  /** @param pictures {prompt, before, after, drift} of the run's result, or nothing */
  show(pictures) {
    this.element.hidden = !pictures;
    if (!pictures) return;
    const { prompt, before, after, drift } = pictures;
    this._title.textContent = `${this._words.classTitle}: ${prompt}`;
    this._drift.textContent = Number.isFinite(drift) ? `${this._words.drift} ${drift.toFixed(2)}` : "";
    for (const [picture, image] of [[this._before, before], [this._after, after]]) {
      const address = this._viewAddress(image);
      if (picture.getAttribute("src") !== address) picture.src = address; // setting it again would flicker
    }
  }

  _row(name) {
    const row = document.createElement("div");
    const side = document.createElement("span");
    side.className = "sbt-side";
    side.textContent = name;
    const picture = document.createElement("img");
    picture.alt = `${this._words.classTitle}, ${name}`;
    picture.draggable = false;
    picture.addEventListener("click", () => window.open(picture.src, "_blank", "noopener"));
    row.append(side, picture);
    return picture;
  }
}
