// The panel's state of one run, from messages and from the run's log. No DOM, no ComfyUI.
import { Series } from "./numbers.mjs";

const MOST_VALIDATIONS = 400;
const MOST_SAVED = 1000;
const MOST_NOTES = 20;
/** In training, where a stop keeps what is learned. */
const IN_TRAINING = ["preparing", "studying", "training", "drawing", "stopping"];
/** After it, or in its place, while the LoRA is published and checked. */
const AFTER = ["saving", "reusing", "using"];

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
    this.error = "";
    /** [done, total] of the images that are studied or sampled */
    this.part = null;
    /** the step that is used without training */
    this.used = null;
    this.chosen = {};
    this.notes = [];
    this.series = new Map();
    this.scores = new Map();
    this.saved = [];
    this.validations = [];
    this.result = null;
    this._recent = [];
  }

  /** Whether the node is at work on the run. */
  get atWork() {
    return this.canStop || AFTER.includes(this.state);
  }

  /** Whether it is in training, and can be stopped and kept. */
  get canStop() {
    return IN_TRAINING.includes(this.state);
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
      // Why a run is not finished is known only to the server that ran it.
      const state = history.kept ? "kept" : done ? "finished" : history.step ? "interrupted" : "";
      this._now({ ...history, state, ...history.ended });
    }
    if (Number.isFinite(history.seconds)) this.seconds = history.seconds;
  }

  /** Apply the node's final result. */
  done(result) {
    const { step, steps, why } = result;
    if ([undefined, "last", "stopped"].includes(why)) {
      // A reused result of fewer steps may be in a folder that was trained further since: drop the later steps.
      this._cut(step);
      this._now({ step, steps, state: step < steps ? "kept" : "finished" });
    } else {
      // The step was chosen from all: the run stays as it is.
      this._now({ steps, state: this.atWork ? "finished" : this.state });
    }
    this.result = result;
  }

  _now(message) {
    if (message.state !== undefined) this.state = message.state;
    if (Number.isFinite(message.step)) this.step = message.step;
    if (Number.isFinite(message.steps) && message.steps > 0) this.steps = message.steps;
    this.eta = message.eta ?? null;
    this.error = message.error ?? "";
    if (message.memory) this.memory = message.memory;
    this.part = ["studying", "drawing"].includes(this.state) ? message.part ?? this.part : null;
    this.used = message.used ?? null;
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
