// The panel's state of one run, from messages and from the run's log. No DOM, no ComfyUI.
import { Series } from "./numbers.mjs";

const MOST_VALIDATIONS = 400;
const MOST_SAVED = 1000;
const MOST_NOTES = 20;
const AT_WORK = ["preparing", "training", "drawing", "stopping"];

/** Thin the entries to at most `most`: repeatedly keep every second one, and always the last. */
function thinned(entries, most) {
  let kept = entries;
  while (kept.length > most) {
    const last = kept.length - 1;
    kept = kept.filter((_, at) => at % 2 === 1 || at === last);
  }
  return kept;
}

/** The curve of a name; a new one if there is none. */
function of(curves, name) {
  if (!curves.has(name)) curves.set(name, new Series());
  return curves.get(name);
}

export class TrainState {
  constructor(run) {
    this.run = run;
    this.state = "";
    this.step = 0;
    this.steps = 0;
    this.seconds = null;
    this.eta = null;
    this.memory = null;
    this.drawn = null;
    this.chosen = {};
    this.notes = [];
    this.series = new Map();
    this.scores = new Map();
    this.saved = [];
    this.validations = [];
    this.result = null;
    this._recent = [];
  }

  /** Whether the run is in training. */
  get atWork() {
    return AT_WORK.includes(this.state);
  }

  /** Whether it was stopped and kept, and can be resumed. */
  get kept() {
    return this.state === "kept";
  }

  /** Whether the user chose the step in use, in place of the run's own result. */
  get chosenByUser() {
    return this.result?.why === "chosen";
  }

  /** Apply a "subjectbooth.train" message. */
  take(message) {
    // Only the first message after a start has `chosen` without a note: later steps in the log will be repeated.
    if (message.chosen && message.note === undefined) this._cut(message.step);
    this._now(message);
    this._add(message);
    if (message.notes) this.notes = message.notes.slice(-MOST_NOTES);
    if (message.note) this.notes = [...this.notes, message.note].slice(-MOST_NOTES);
  }

  /** Apply the history that the server reads from the run's folder. */
  fill(history) {
    // Points can only be appended, so start with the log, which has the older ones.
    const later = new Map([...this.series].map(([name, series]) => [name, series.points]));
    this.series = new Map();
    this._add(history);
    for (const [name, points] of later) of(this.series, name).add(points);
    if (history.notes?.length) this.notes = history.notes.slice(-MOST_NOTES);
    if (history.active) {
      this._now(history.active);
    } else {
      const done = history.steps > 0 && history.step >= history.steps;
      const state = history.kept ? "kept" : done ? "finished" : history.step ? "cancelled" : "";
      this._now({ ...history, state, eta: null, drawn: null });
    }
    if (Number.isFinite(history.seconds)) this.seconds = history.seconds;
  }

  /** Apply the node's final result. */
  done(result) {
    const { step, steps, why } = result;
    if ([undefined, "last", "stopped"].includes(why)) {
      // A reused result of fewer steps may be in a folder that was trained further since: drop the later steps.
      this._cut(step);
      this._now({ step, steps, state: step < steps ? "kept" : "finished", eta: null });
    } else {
      // The step was chosen from all: the run stays as it is.
      this._now({ steps, state: this.atWork ? "finished" : this.state, eta: null });
    }
    this.result = result;
  }

  _now(message) {
    if (message.state !== undefined) this.state = message.state;
    if (Number.isFinite(message.step)) this.step = message.step;
    if (Number.isFinite(message.steps) && message.steps > 0) this.steps = message.steps;
    if ("eta" in message) this.eta = message.eta;
    if (message.memory) this.memory = message.memory;
    this.drawn = this.state === "drawing" ? message.drawn ?? this.drawn : null;
    if (!Number.isFinite(message.seconds)) return;
    this._recent = [...this._recent, message.seconds].slice(-20);
    this.seconds = this._recent.reduce((sum, value) => sum + value, 0) / this._recent.length;
  }

  _add(message) {
    if (message.chosen && Object.keys(message.chosen).length) this.chosen = message.chosen;
    for (const [name, points] of Object.entries(message.series ?? {})) of(this.series, name).add(points);
    for (const [name, points] of Object.entries(message.scores ?? {})) of(this.scores, name).add(points);
    const saved = [...new Set([...this.saved, ...(message.saved ?? [])])].sort((one, two) => one - two);
    this.saved = thinned(saved, MOST_SAVED);
    const byStep = new Map(this.validations.map((shown) => [shown.step, shown]));
    for (const shown of message.validations ?? []) byStep.set(shown.step, shown);
    this.validations = thinned([...byStep.values()].sort((one, two) => one.step - two.step), MOST_VALIDATIONS);
    if (message.result) this.result = message.result;
  }

  _cut(step) {
    for (const series of [...this.series.values(), ...this.scores.values()]) series.cut(step);
    this.validations = this.validations.filter((shown) => shown.step <= step);
    this.saved = this.saved.filter((saved) => saved <= step);
    this.result = null;
  }
}
