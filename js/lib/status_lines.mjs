// The panel's first lines: what the run is doing, with which settings, at which step and how fast; its bar and its error.
import { readableBytes, readableSeconds, readableTime } from "./numbers.mjs";
import { stateText } from "./train_words.mjs";

function make(kind, className = "") {
  const element = document.createElement(kind);
  element.className = className;
  return element;
}

export class StatusLines {
  /** @param words see train_words.mjs */
  constructor(words) {
    this._words = words;
    this.element = make("div", "sbt-status");
    this._state = make("span", "sbt-grow");
    this._state.setAttribute("role", "status");
    this._setting = make("span", "sbt-faint");
    this._count = make("span", "sbt-count sbt-numbers");
    this._numbers = make("span", "sbt-faint sbt-numbers");
    this._error = make("div", "sbt-error");
    this._done = make("div");
    const [first, second, bar] = [make("div", "sbt-line sbt-wrap"), make("div", "sbt-line sbt-wrap"), make("div", "sbt-bar")];
    first.append(this._state, this._setting);
    second.append(this._count, this._numbers);
    bar.append(this._done);
    this.element.append(first, this._error, second, bar);
  }

  get hasError() {
    return !this._error.hidden;
  }

  /** @param run a TrainState */
  show(run) {
    const words = this._words;
    const unfinished = ["cancelled", "interrupted"].includes(run.state) && run.chosenByUser;
    const part = run.part ? ` ${run.part[0]} / ${run.part[1]}` : "";
    this._state.textContent = (unfinished ? words.unfinished : stateText(words, run)) + part;
    this._state.title = run.notes.join("\n");
    this._error.textContent = run.error;
    this._error.title = run.error;
    this._error.hidden = !run.error;
    const { precision, device } = run.chosen;
    this._setting.textContent = [precision, device].filter(Boolean).join(" · ");
    this._setting.title = Object.entries(run.chosen).map(([name, value]) => `${name}: ${value}`).join("\n");
    this._count.textContent = `${words.step} ${run.step}${run.steps ? ` / ${run.steps}` : ""}`;
    const numbers = [];
    if (Number.isFinite(run.seconds)) numbers.push(`${readableSeconds(run.seconds)} ${words.perStep}`);
    if (run.canStop && Number.isFinite(run.eta)) numbers.push(`${readableTime(run.eta)} ${words.left}`);
    if (run.memory && run.atWork) numbers.push(readableBytes(run.memory.used));
    this._numbers.textContent = numbers.join(" · ");
    const [done, total] = run.state === "studying" && run.part ? run.part : [run.step, run.steps];
    this._done.style.width = `${total ? Math.min(100, (100 * done) / total) : 0}%`;
  }
}
