// The training panel's elements. Renders a TrainState and calls back; knows neither the server nor the node.
import { ClassStrip } from "./class_strip.mjs";
import { colourOf, drawChart, shownSeries, stepAt } from "./loss_chart.mjs";
import { readableBytes } from "./numbers.mjs";
import { askOnce, canAsk } from "./notify.mjs";
import { makePicture } from "./picture.mjs";
import { StatusLines } from "./status_lines.mjs";
import { UseLine } from "./use_line.mjs";

/** Heights in CSS pixels that the panel needs in the node. */
const HEIGHTS = {
  idle: 54, estimate: 36, warning: 86, status: 46, error: 52, chart: 158, scores: 106, strip: 200, class: 150, use: 24, button: 30, actions: 30, result: 52, wrapped: 20, padding: 12,
};

function make(kind, className = "", text = "") {
  const element = document.createElement(kind);
  if (className) element.className = className;
  if (text) element.textContent = text;
  return element;
}

/**
 * @param words see train_words.mjs
 * @param actions {stop, resume, use(step), viewAddress(image), sharpness()}; step 0 is the run's own result
 */
export class TrainView {
  constructor(words, actions) {
    this._words = words;
    this._actions = actions;
    this._run = null;
    this._picked = null;
    this._held = null;
    this._frame = 0;
    this.element = make("div", "subjectbooth-train");
    this._build();
    this._sizes = new ResizeObserver(() => this._draw());
    for (const { canvas } of [this._losses, this._scores]) this._sizes.observe(canvas);
    this.show(null);
  }

  /** Required height of the panel in CSS pixels. */
  get height() {
    const line = this._estimate.classList.contains("sbt-warning") ? "warning" : "estimate";
    const parts = this._estimate.hidden ? [] : [line];
    if (!this._run) return HEIGHTS.idle + (parts.length ? HEIGHTS[line] : 0);
    parts.push("status", "padding");
    if (this._status.hasError) parts.push("error");
    if (!this._losses.chart.hidden) parts.push("chart");
    if (!this._scores.chart.hidden) parts.push("scores");
    if (!this._strip.hidden) parts.push("strip");
    if (!this._class.element.hidden) parts.push("class");
    if (!this._use.element.hidden) parts.push("use", ...Array(this._use.buttons).fill("button"));
    if (!this._actionsLine.hidden) parts.push("actions");
    if (!this._result.hidden) parts.push("result");
    for (const line of this.element.querySelectorAll(".sbt-wrap")) if (line.offsetHeight > HEIGHTS.wrapped) parts.push("wrapped");
    return parts.reduce((sum, part) => sum + HEIGHTS[part], 0);
  }

  /** Show a run, or the idle text for null. */
  show(run) {
    if (run?.run !== this._run?.run) {
      this._picked = null;
      this._held = null;
    }
    this._run = run;
    this._idle.hidden = Boolean(run);
    const charts = [this._losses, this._scores].flatMap(({ legend, chart }) => [legend, chart]);
    for (const part of [this._status.element, this._actionsLine, this._result, ...charts, this._strip,
      this._use.element, this._class.element]) {
      part.hidden = !run;
    }
    this._estimate.hidden = !this._estimateText || Boolean(run?.atWork);
    this.element.dataset.state = run?.state ?? "idle";
    this.element.dataset.step = String(run?.step ?? 0);
    if (!run) return;
    this._status.show(run);
    this._showCurves(run);
    this._showPictures(run);
    this._use.show(run, this._strip.hidden ? null : this._shown());
    this._showActions(run);
    this._showResult(run);
    this._class.show(run.atWork ? null : run.result?.class);
  }

  /** @param text what the next run will take, empty to hide it; isWarning: it will not fit */
  showEstimate(text, isWarning) {
    this._estimateText = text;
    this._estimate.textContent = text;
    this._estimate.title = text;
    this._estimate.classList.toggle("sbt-warning", isWarning);
    this.show(this._run);
  }

  remove() {
    this._sizes.disconnect();
    cancelAnimationFrame(this._frame);
    this.element.remove();
  }

  _build() {
    const words = this._words;
    this._idle = make("div", "sbt-idle sbt-faint", words.idle);
    this._estimate = make("div", "sbt-estimate sbt-faint");
    this._estimateText = "";
    this._status = new StatusLines(words);

    this._losses = this._makeChart(words.chart, (run) => run.series, (value) => value.toFixed(4));
    this._scores = this._makeChart(words.scores, (run) => run.scores, (value) => `${Math.round(100 * value)} %`);
    this._scores.chart.classList.add("sbt-scores");
    this._scores.chart.title = words.scoresHelp;

    this._strip = make("div", "sbt-strip");
    this._pictures = make("div", "sbt-pictures");
    const steps = make("div", "sbt-line");
    this._slider = make("input");
    this._slider.type = "range";
    this._slider.min = "0";
    this._slider.setAttribute("aria-label", words.slider);
    this._slider.addEventListener("input", () => {
      this._pick(Number(this._slider.value));
      this.show(this._run);
    });
    this._pickedText = make("span", "sbt-faint sbt-numbers");
    this._compare = this._button(words.compare, words.compareHelp, () => this._toggleCompare());
    steps.append(this._slider, this._pickedText, this._compare);
    this._strip.append(this._pictures, steps);

    this._class = new ClassStrip(words, this._actions.viewAddress);

    const button = (...parts) => this._button(...parts);
    this._use = new UseLine(words, button, (step) => this._actions.use(step));

    this._actionsLine = make("div", "sbt-line");
    this._stop = this._button(words.stop, words.stopHelp, () => this._actions.stop());
    this._resume = this._button(words.resume, words.resumeHelp, () => this._actions.resume());
    this._resume.classList.add("sbt-main");
    this._notify = this._button(words.notify, words.notifyHelp, async () => {
      await askOnce();
      this.show(this._run);
    });
    this._actionsLine.append(this._stop, this._resume, this._notify);

    this._result = make("div");
    this._file = make("div", "sbt-line sbt-wrap");
    this._fileName = make("span", "sbt-grow sbt-file");
    this._fileFacts = make("span", "sbt-faint sbt-numbers");
    this._file.append(this._fileName, this._fileFacts);
    const trigger = make("div", "sbt-line");
    this._trigger = make("code");
    this._copy = this._button(words.copy, words.copyHelp, () => this._copyTrigger());
    trigger.append(make("span", "sbt-faint", words.words), this._trigger, this._copy);
    this._result.append(this._file, trigger);

    // Buttons above the parts that come and go, so that they do not move.
    this.element.append(this._idle, this._estimate, this._status.element, this._actionsLine, this._result,
      this._losses.legend, this._losses.chart, this._scores.legend, this._scores.chart, this._strip,
      this._use.element, this._class.element);
  }

  /** A chart with its legend; `curvesOf` a run gives its curves by name. */
  _makeChart(name, curvesOf, readable) {
    const [legend, chart, canvas] = [make("div", "sbt-legend sbt-faint"), make("div", "sbt-chart"), make("canvas")];
    canvas.setAttribute("role", "img");
    chart.append(canvas);
    const made = { name, legend, chart, canvas, curvesOf, readable, pointed: null };
    canvas.addEventListener("pointermove", (event) => {
      // Screen lengths include the editor's zoom; offsetWidth does not.
      const box = canvas.getBoundingClientRect();
      const left = ((event.clientX - box.left) * canvas.offsetWidth) / (box.width || 1);
      const run = this._run;
      made.pointed = run ? stepAt(left, canvas.offsetWidth, { series: curvesOf(run), steps: run.steps }) : null;
      this._draw();
    });
    canvas.addEventListener("pointerleave", () => {
      made.pointed = null;
      this._draw();
    });
    return made;
  }

  _button(text, help, action) {
    const button = make("button", "", text);
    button.type = "button";
    button.title = help;
    button.addEventListener("click", action);
    return button;
  }

  _showCurves(run) {
    for (const made of [this._losses, this._scores]) this._showLegend(run, made);
    if (run.saved.length) {
      const entry = make("span");
      entry.append(make("i", "sbt-triangle"), this._words.saved);
      this._losses.legend.append(entry);
    }
    this._draw();
  }

  _showLegend(run, { name, legend, chart, canvas, curvesOf, readable }) {
    const curves = shownSeries(curvesOf(run));
    chart.hidden = !curves.length;
    legend.hidden = !curves.length;
    const names = curves.map(([curve]) => curve);
    legend.replaceChildren(...curves.map(([curve, series]) => {
      const entry = make("span");
      const sign = make("i");
      sign.style.background = colourOf(curve, names);
      entry.append(sign, `${this._words[curve] ?? curve} ${readable(series.last)}`);
      return entry;
    }));
    const summary = curves.map(([curve, series]) => `${curve} ${readable(series.last)}`).join(", ");
    canvas.setAttribute("aria-label", `${name}: ${summary}`);
  }

  _draw() {
    if (this._frame) return;
    this._frame = requestAnimationFrame(() => {
      this._frame = 0;
      for (const made of [this._losses, this._scores]) this._drawChart(made);
    });
  }

  _drawChart({ canvas, curvesOf, pointed }) {
    const run = this._run;
    const [width, height] = [canvas.offsetWidth, canvas.offsetHeight];
    if (!run || !width || !height) return;
    const sharpness = this._actions.sharpness();
    const [pixelsAcross, pixelsDown] = [Math.round(width * sharpness), Math.round(height * sharpness)];
    if (canvas.width !== pixelsAcross) canvas.width = pixelsAcross;
    if (canvas.height !== pixelsDown) canvas.height = pixelsDown;
    const context = canvas.getContext("2d");
    context.setTransform(sharpness, 0, 0, sharpness, 0, 0);
    const style = getComputedStyle(this.element);
    const colour = (name, other) => style.getPropertyValue(name).trim() || other;
    drawChart(context, { width, height }, {
      series: curvesOf(run), steps: run.steps, saved: run.saved, pointed, exact: curvesOf(run) === run.scores,
      picked: this._strip.hidden ? null : this._shown()?.step ?? null,
    }, {
      text: style.color, faint: colour("--descrip-text", "#999"), grid: colour("--border-color", "#444"),
      back: style.backgroundColor,
    });
  }

  /** The validation selected by the slider: until the user moves it, the newest that is not held for comparison. */
  _shown() {
    const all = this._run?.validations ?? [];
    return all.find(({ step }) => step === this._picked) ?? all.findLast(({ step }) => step !== this._held) ?? null;
  }

  /** Move to the validation at this place. The one that is held is passed over: a step is not compared to itself. */
  _pick(at) {
    const all = this._run?.validations ?? [];
    const from = all.indexOf(this._shown());
    const beyond = at + Math.sign(at - from);
    const to = all[at]?.step !== this._held ? at : beyond in all ? beyond : from;
    this._picked = all[to]?.step ?? null;
  }

  /** Hold the shown step next to another one, or end that. */
  _toggleCompare() {
    const all = this._run.validations;
    const at = all.indexOf(this._shown());
    this._held = this._held === null ? all[at].step : null;
    // A step is not compared to itself.
    if (this._held !== null && this._picked !== null) this._picked = (all[at - 1] ?? all[at + 1]).step;
    this.show(this._run);
  }

  _showPictures(run) {
    if (!run.validations.some(({ step }) => step === this._held)) this._held = null;
    const shown = this._shown();
    this._strip.hidden = !shown;
    if (!shown) {
      this._pictures.replaceChildren();
      delete this._pictures.dataset.now;
      return;
    }
    const held = run.validations.find(({ step }) => step === this._held);
    this._slider.max = String(run.validations.length - 1);
    this._slider.value = String(run.validations.indexOf(shown));
    this._slider.disabled = run.validations.length < 2;
    this._compare.hidden = run.validations.length < 2;
    this._compare.textContent = held ? this._words.release : this._words.compare;
    this._compare.setAttribute("aria-pressed", String(Boolean(held)));
    this._pickedText.textContent = `${this._words.step} ${shown.step}`;
    const both = held && held !== shown ? [held, shown] : [shown];
    const figures = both.map((validation) => this._figure(validation, Boolean(held)));
    const now = JSON.stringify([held, shown]);
    // Keep unchanged images: recreating them at each message would flicker.
    if (this._pictures.dataset.now !== now) this._pictures.replaceChildren(...figures);
    this._pictures.dataset.now = now;
  }

  _figure(validation, named) {
    const figure = make("figure");
    const row = make("div");
    for (const [at, image] of validation.images.entries()) {
      const prompt = validation.prompts?.[at] ?? "";
      const alt = `${this._words.picturesOf} ${validation.step}: ${prompt}`;
      const picture = makePicture(this._actions.viewAddress(image), alt);
      picture.title = prompt;
      row.append(picture);
    }
    figure.append(row);
    if (named) figure.append(make("figcaption", "", `${this._words.step} ${validation.step}`));
    return figure;
  }

  _showActions(run) {
    this._stop.hidden = !run.canStop;
    this._stop.disabled = run.state === "stopping";
    this._resume.hidden = !run.kept;
    this._notify.hidden = !run.atWork || !canAsk();
    this._actionsLine.hidden = this._stop.hidden && this._resume.hidden;
  }

  _showResult(run) {
    const result = run.atWork ? null : run.result;
    this._result.hidden = !result;
    if (!result) return;
    this._fileName.textContent = `models/loras/${result.lora}`;
    this._fileName.title = this._fileName.textContent;
    this._fileFacts.textContent = `${this._words.matched} ${result.matched}/${result.layers}`;
    this._fileFacts.title = readableBytes(result.size);
    this._trigger.textContent = result.trigger;
  }

  async _copyTrigger() {
    await copyText(this._trigger.textContent, this.element);
    this._copy.textContent = this._words.copied;
    setTimeout(() => {
      this._copy.textContent = this._words.copy;
    }, 1500);
  }
}

/** Copy to the clipboard; with the old API if the page is not a secure context (http from another machine). */
async function copyText(text, near) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const field = make("textarea");
    field.value = text;
    near.append(field);
    field.select();
    document.execCommand("copy");
    field.remove();
  }
}
