// Inputs that few people change: Nodes 2.0 folds them away by itself, the classic editor only with this.
import { app } from "../../scripts/app.js";
import { t } from "./lib/words.mjs";

const BUTTON = "more settings";
const PANEL = "SUBJECTBOOTH_";
const RENDERER = "Comfy.VueNodes.Enabled";
const living = new Set();

// Front end 1.32 keeps the row of a hidden widget unless its height makes up for the gap of 4 pixels.
const NO_ROW = () => [0, -4];

function hide(widget, hidden) {
  widget.hidden = hidden;
  if (hidden && widget.computeSize !== NO_ROW) {
    widget.subjectBoothSize = Object.hasOwn(widget, "computeSize") ? widget.computeSize : null;
    widget.computeSize = NO_ROW;
  } else if (!hidden && widget.computeSize === NO_ROW) {
    if (widget.subjectBoothSize) widget.computeSize = widget.subjectBoothSize;
    else delete widget.computeSize;
  }
}

class Fold {
  constructor(node, widgets) {
    this.node = node;
    this.widgets = widgets;
    const { onConfigure, onRemoved } = node;
    const apply = () => this.apply();
    this.button = node.addWidget("button", BUTTON, null, () => this.toggle(), { serialize: false, canvasOnly: true });
    this.button.serialize = false;
    this.raise();
    node.onConfigure = function (...given) {
      onConfigure?.apply(this, given);
      apply();
    };
    node.onRemoved = function (...given) {
      living.delete(node.subjectBoothFold);
      onRemoved?.apply(this, given);
    };
    // A new node; a saved one gets its own size later. Nodes 2.0 makes room for what it shows by itself.
    for (const widget of widgets) hide(widget, true);
    const height = node.computeSize()[1];
    this.apply();
    node.setSize([node.size[0], height]);
  }

  // Above the panel, whichever of the two extensions came first.
  raise() {
    const { widgets } = this.node;
    const panel = widgets.findIndex((widget) => widget.type?.startsWith(PANEL));
    if (panel < 0 || panel > widgets.indexOf(this.button)) return;
    widgets.splice(widgets.indexOf(this.button), 1);
    widgets.splice(panel, 0, this.button);
  }

  toggle() {
    this.node.showAdvanced = !this.node.showAdvanced;
    this.apply();
    const [width, height] = this.node.size;
    const needed = this.node.computeSize()[1];
    if (needed > height || !this.node.showAdvanced) this.node.setSize([width, needed]);
    this.node.graph?.setDirtyCanvas(true, true);
  }

  apply() {
    const classic = !window.LiteGraph?.vueNodesMode;
    const linked = new Set((this.node.inputs ?? []).filter(({ link }) => link != null).map(({ widget }) => widget?.name));
    for (const widget of this.widgets) {
      hide(widget, classic && !this.node.showAdvanced && !linked.has(widget.name));
    }
    this.button.hidden = !classic;
    this.button.label = this.node.showAdvanced ? t("▾ fewer settings") : t("▸ more settings");
  }
}

app.registerExtension({
  name: "SubjectBooth.Folding",
  setup() {
    app.ui?.settings?.addEventListener?.(`${RENDERER}.change`, () => {
      setTimeout(() => living.forEach((fold) => fold.apply()), 0); // once the editor has changed over
    });
  },
  nodeCreated(node) {
    if (!node.constructor?.nodeData?.category?.startsWith("SubjectBooth")) return;
    const widgets = (node.widgets ?? []).filter((widget) => widget.options?.advanced);
    if (!widgets.length) return;
    node.subjectBoothFold = new Fold(node, widgets);
    living.add(node.subjectBoothFold);
  },
});
