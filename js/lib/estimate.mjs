// The line on the training panel that says what the next run will take.
import { upstreamOf } from "./gallery_graph.mjs";
import { readableBytes, readableSeconds } from "./numbers.mjs";
import { ask } from "./panel.mjs";
import { pathOf } from "./node_path.mjs";
import { t } from "./words.mjs";

/** Milliseconds without a change before the server is asked. */
const PAUSE = 700;

/** Minutes as people say them: "2 min", "1 h 5 min", "40 s". */
export function roughTime(seconds) {
  if (seconds < 90) return `${Math.max(1, Math.round(seconds))} ${t("s")}`;
  const minutes = Math.round(seconds / 60);
  return minutes < 90 ? `${minutes} ${t("min")}` : `${Math.floor(minutes / 60)} ${t("h")} ${minutes % 60} ${t("min")}`;
}

/** The text of an estimate by the server, and whether it is a warning. */
export function estimateText(found, words) {
  const fill = (text, values) => text.replace(/\{(\w+)\}/g, (_, name) => values[name]);
  if (!found.known) return [words.estimateUnknown, false];
  const memory = Number.isFinite(found.needed) && Number.isFinite(found.free)
    ? { needed: readableBytes(found.needed), free: readableBytes(found.free) } : null;
  const time = fill(found.scaled ? words.estimateScaled : words.estimate, {
    time: roughTime(found.seconds), step: readableSeconds(found.step), words: found.trigger,
  });
  if (memory && found.offloads) return [`${time} · ${fill(words.estimateOffloads, memory)}`, true];
  if (memory && !found.fits) return [`${fill(words.estimateTooLarge, memory)}. ${time}`, true];
  return [memory ? `${time} · ${fill(words.estimateMemory, memory)}` : time, false];
}

/** Keeps the lines of all training panels up to date. `panels` gives them: {node, view, words, showEstimate()}. */
export class Estimates {
  constructor(api, app, panels) {
    this._api = api;
    this._app = app;
    this._panels = panels;
    this._asked = "";
    this._timer = 0;
  }

  /** Something may have changed; asked a little later, once. */
  soon() {
    clearTimeout(this._timer);
    this._timer = setTimeout(() => void this._ask(), PAUSE);
  }

  /** Forget what was asked: a run has ended, and is what the next one is compared with. */
  again() {
    this._asked = "";
    this.soon();
  }

  async _ask() {
    const shown = this._panels().filter(({ view }) => view.element.isConnected);
    if (!shown.length) return;
    try {
      const { output } = await this._app.graphToPrompt();
      const requests = shown.map(({ node }) => {
        const id = pathOf(this._app.rootGraph ?? this._app.graph, node);
        return { prompt: upstreamOf(output, id), node: id };
      });
      // The graph also changes when a node is moved.
      const now = JSON.stringify(requests);
      if (now === this._asked) return;
      this._asked = now;
      for (const [number, panel] of shown.entries()) await this._show(panel, requests[number]);
    } catch {
      // A graph that cannot be queued as it is; Run will say why.
    }
  }

  async _show(panel, request) {
    const ready = request.prompt[request.node]?.inputs.model;
    const found = ready ? await ask(this._api, "/estimate", request).catch(() => null) : null;
    panel.showEstimate(...(found ? estimateText(found, panel.words) : ["", false]));
  }
}
