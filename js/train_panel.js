// The live panel on DreamBoothLoRATrain. No run depends on it: it shows the server's messages, requests a stop, and sets
// the node's own inputs.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { Estimates } from "./lib/estimate.mjs";
import { keyOf, nodeOf, noteLoaded } from "./lib/node_path.mjs";
import { recall, remember } from "./lib/remembered.mjs";
import { ownId } from "./lib/template_ids.mjs";
import { TrainState } from "./lib/train_state.mjs";
import { TrainView } from "./lib/train_view.mjs";
import { wordsOf } from "./lib/train_words.mjs";

const NODE = "DreamBoothLoRATrain";
const PROPERTY = "subjectbooth_run";
const REMEMBERED = "SubjectBooth.runs";
const SILENCE = 3000;
/** Pixels of margin that the classic editor leaves around an element. */
const MARGIN = 8;

/** Panel by node. */
const panels = new WeakMap();
/** The panels of all nodes that exist. */
const living = new Set();

const rootGraph = () => app.rootGraph ?? app.graph;

class TrainPanel {
  constructor(node) {
    this.node = node;
    this.run = null;
    this.lastMessage = 0;
    const words = wordsOf(app.extensionManager?.setting?.get("Comfy.Locale"));
    this.view = new TrainView(words, {
      stop: () => this.stop(),
      resume: () => this.resume(),
      use: (step) => this.use(step),
      viewAddress: (image) => api.apiURL(`/view?${new URLSearchParams(image)}`),
      sharpness: () => (window.devicePixelRatio || 1) * Math.min(2, Math.max(1, app.canvas?.ds?.scale ?? 1)),
    });
    this.words = words;
    this.height = this.view.height;
    this.widget = node.addDOMWidget("training", "SUBJECTBOOTH_TRAINING", this.view.element, {
      // Excluded from the prompt; the widget's own flag excludes it from the saved workflow.
      serialize: false, hideOnZoom: false, margin: MARGIN, getMinHeight: () => this.height + 2 * MARGIN,
      getValue: () => "", setValue: () => {},
    });
    this.widget.serialize = false;
    this.view.element.addEventListener("wheel", (event) => {
      // In the classic editor, DOM elements cover the canvas, which handles zooming.
      if (!window.LiteGraph?.vueNodesMode) app.canvas?.processMouseWheel?.(event);
    }, { passive: false });
    this.show();
  }

  /** Handle a message of a run; a run that is new to the panel has its history read first. */
  async receive(message) {
    this.lastMessage = Date.now();
    if (this.run?.run !== message.run) {
      this.run = new TrainState(message.run);
      this.remember(message.run);
      this.run.take(message);
      this.show();
      await this.read(message.run);
      return;
    }
    this.run.take(message);
    this.show();
    this.watch();
  }

  /** Handle the node's final result, which may come from ComfyUI's cache. */
  async finish(result) {
    if (this.run?.run !== result.run) {
      this.run = new TrainState(result.run);
      this.remember(result.run);
      await this.read(result.run);
    }
    if (this.run?.run !== result.run) return;
    this.run.done(result);
    this.show();
  }

  /** Fill the panel from the run's folder. */
  async read(run) {
    const answer = await api.fetchApi(`/subjectbooth/runs/${encodeURIComponent(run)}/events`);
    if (!answer.ok) {
      // A run has no log before its first step; a deleted run is forgotten.
      if (this.run?.run === run && !this.run.atWork && !this.run.error) {
        this.run = null;
        this.show();
      }
      return;
    }
    const history = await answer.json();
    if (this.run?.run !== run) return;
    this.run.fill(history);
    this.show();
    this.watch();
  }

  /** After a reload, or when a workflow is opened: show the active run of this node, or its last one. */
  async restore(active) {
    const root = rootGraph();
    const mine = active.find((one) => nodeOf(root, one) === this.node);
    const run = mine?.run ?? this.node.properties?.[PROPERTY] ?? recall(REMEMBERED, this.key());
    if (!run || this.run?.run === run || typeof run !== "string") return;
    this.run = new TrainState(run);
    await this.read(run);
    if (mine) this.remember(run);
  }

  async stop() {
    const run = this.run;
    this.set("after_stop", "keep");
    const answer = await api.fetchApi(`/subjectbooth/runs/${encodeURIComponent(run.run)}/stop`, { method: "POST" });
    const data = await answer.json();
    if (answer.ok) {
      run.state = "stopping";
      this.show();
    } else {
      app.extensionManager?.toast?.add({ severity: "warn", summary: this.words.stopFailed, detail: data.error, life: 5000 });
      await this.read(run.run);
    }
  }

  async resume() {
    this.set("after_stop", "continue");
    this.set("use_step", 0); // or nothing would be trained
    this.set("force_retrain", false); // or it would start over
    await app.queuePrompt(0, 1);
  }

  /** Make a step the result, or with 0 the run's own choice again. */
  async use(step) {
    this.set("use_step", step);
    this.set("force_retrain", false); // the step is there already
    await app.queuePrompt(0, 1);
  }

  set(input, value) {
    const widget = this.node.widgets?.find(({ name }) => name === input);
    if (!widget || widget.value === value) return;
    widget.value = value;
    widget.callback?.(value, app.canvas, this.node);
    this.node.graph?.setDirtyCanvas(true, true);
  }

  /** Poll while a run is active but sends no messages here (another browser has started it). */
  watch() {
    clearTimeout(this.timer);
    if (!this.run?.atWork) return;
    this.timer = setTimeout(() => {
      if (!panels.has(this.node) || !this.run?.atWork) return;
      if (Date.now() - this.lastMessage < SILENCE) this.watch();
      else this.read(this.run.run).catch(() => this.watch());
    }, SILENCE);
  }

  showEstimate(text, isWarning) {
    this.view.showEstimate(text, isWarning);
    this.show();
  }

  show() {
    this.view.show(this.run);
    const { height } = this.view;
    if (height === this.height) return;
    this.height = height;
    const [width, now] = this.node.size;
    const needed = this.node.computeSize()[1];
    // Only grow: keep the size that the user has chosen.
    if (needed > now) this.node.setSize([width, needed]);
    this.node.graph?.setDirtyCanvas(true, true);
  }

  key() {
    return keyOf(rootGraph(), this.node);
  }

  /** Remember the run in the node's properties, and in the browser for workflows that are not saved. */
  remember(run) {
    this.node.properties ??= {};
    this.node.properties[PROPERTY] = run;
    remember(REMEMBERED, this.key(), run);
  }

  remove() {
    clearTimeout(this.timer);
    panels.delete(this.node);
    living.delete(this);
    this.view.remove();
  }
}

let asked = null;

/** The active runs; one request for all nodes of a workflow. */
function activeRuns() {
  asked ??= api.fetchApi("/subjectbooth/active")
    .then((answer) => (answer.ok ? answer.json() : { runs: [] }))
    .then(({ runs }) => runs)
    .catch(() => [])
    .finally(() => setTimeout(() => { asked = null; }, 500));
  return asked;
}

function panelOf(message) {
  const node = nodeOf(rootGraph(), message);
  return node ? panels.get(node) : undefined;
}

const estimates = new Estimates(api, app, () => [...living]);

// Registered early: after a reload, messages arrive before setup(), and the editor warns about unknown ones.
let ready = false;
/** The id in the workflow being loaded; the graph may get another one. */
let loaded = null;
api.addEventListener("subjectbooth.train", ({ detail }) => ready && panelOf(detail)?.receive(detail));

app.registerExtension({
  name: "SubjectBooth.TrainPanel",

  setup() {
    const style = document.createElement("link");
    style.rel = "stylesheet";
    style.href = new URL("./lib/train_panel.css", import.meta.url).href;
    document.head.append(style);
    api.addEventListener("executed", ({ detail }) => {
      const result = detail?.output?.subjectbooth?.[0];
      if (result?.run) estimates.again();
      if (result?.run) panelOf({ node: detail.display_node ?? detail.node })?.finish(result);
    });
    api.addEventListener("graphChanged", () => estimates.soon());
    ready = true;
  },

  beforeConfigureGraph(data) {
    ownId(data);
    loaded = data?.id;
  },

  afterConfigureGraph() {
    noteLoaded(loaded, rootGraph());
  },

  nodeCreated(node) {
    if (node.comfyClass !== NODE) return;
    const panel = new TrainPanel(node);
    panels.set(node, panel);
    living.add(panel);
    estimates.soon();
    // The panel shows the validation images; hide ComfyUI's own preview below it.
    Object.defineProperty(node, "imgs", { configurable: true, get: () => undefined, set() {} });
    const { onConfigure, onRemoved } = node;
    node.onConfigure = function (...args) {
      onConfigure?.apply(this, args);
      // Wait until the graph is complete, with the node and its subgraphs in it.
      estimates.soon();
      setTimeout(() => activeRuns().then((active) => panel.restore(active)), 0);
    };
    node.onRemoved = function (...args) {
      onRemoved?.apply(this, args);
      panel.remove();
    };
  },
});
