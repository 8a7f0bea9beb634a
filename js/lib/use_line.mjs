// The lines below the slider: which step is the result and why, and the buttons that change it.
export class UseLine {
  /**
   * @param words see train_words.mjs
   * @param button makes a button from its text, its help and its action
   * @param use called with a step, or with 0 for the run's own result
   */
  constructor(words, button, use) {
    this._words = words;
    this._step = 0;
    this.element = document.createElement("div");
    this.element.className = "sbt-use";
    this._text = document.createElement("span");
    this._text.className = "sbt-numbers";
    this._own = button(words.own, words.ownHelp, () => use(0));
    this._use = button(words.use, words.useHelp, () => use(this._step));
    this.element.append(this._text, this._use, this._own);
  }

  /** How many buttons are shown. In a narrow node, each needs a line of its own. */
  get buttons() {
    return [this._own, this._use].filter(({ hidden }) => !hidden).length;
  }

  /**
   * @param run a TrainState
   * @param shown the validation that the slider is at, or null
   */
  show(run, shown) {
    const words = this._words;
    const result = run.atWork ? null : run.result;
    const why = words[`why_${result?.why}`] ?? result?.why;
    this.element.hidden = run.atWork || !(shown || run.chosenByUser);
    this._text.textContent = result ? `${words.inUse}: ${words.step} ${result.step}${why ? ` (${why})` : ""}` : "";
    this._text.title = this._text.textContent;
    this._own.hidden = !run.chosenByUser;
    this._step = shown?.step ?? 0;
    this._use.hidden = !shown || shown.step === result?.step;
    this._use.disabled = !run.saved.includes(this._step);
    this._use.title = this._use.disabled ? words.notKept : words.useHelp;
  }
}
