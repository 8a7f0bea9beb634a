// ApplySubjectLoRA and EvaluateSubjectLoRA: keeps their lists of LoRAs up to date. The former also shows the metadata of
// the selected one.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { Panel, ask, copyButton, make, onWidgets, valuesOf } from "./lib/panel.mjs";
import { t, told } from "./lib/words.mjs";

const KIND = "ApplySubjectLoRA";
const KINDS = [KIND, "EvaluateSubjectLoRA"]; // with a list of LoRAs
const NO_FILE = "(from subject_lora)";
const living = new Set();

class LoraPanel {
  constructor(node) {
    this.node = node;
    this.asked = 0;
    this.panel = new Panel(node, "lora", 44);
    this.refresh = onWidgets(node, ["lora_name"], () => this.load());
  }

  async load() {
    const number = (this.asked += 1);
    const name = valuesOf(this.node, ["lora_name"]).lora_name;
    if (!name || name === NO_FILE) {
      const text = t("The LoRA and its trained words come from the connected trainer.");
      this.panel.show(make("div", { className: "sb-quiet" }, text));
      return;
    }
    let shown;
    try {
      shown = describe(await ask(api, `/lora?name=${encodeURIComponent(name)}`));
    } catch (error) {
      shown = make("div", { className: "sb-problem" }, told(error.message));
    }
    if (number === this.asked) this.panel.show(shown);
  }
}

function describe(lora) {
  const about = [
    lora.step ? t("{n} steps", { n: lora.step }) : "",
    lora.rank ? t("rank {n}", { n: lora.rank }) : "",
    lora.base,
    `${lora.megabytes} ${t("MB")}`,
  ];
  const words = lora.trigger
    ? make("div", {}, make("span", { className: "sb-words" }, lora.trigger), " ", copyButton(lora.trigger, t("copy")))
    : make("div", { className: "sb-quiet" }, t("This file does not contain its trigger words. Write them into the prompt yourself."));
  return make(
    "div",
    { className: "sb-row" },
    lora.thumbnail ? make("img", { src: lora.thumbnail, alt: lora.trigger }) : null,
    make("div", {}, words, make("div", { className: "sb-line sb-quiet" }, about.filter(Boolean).join(", "))),
  );
}

// The front end loads the list at start-up, so it lacks LoRAs trained since then.
async function freshList() {
  if (!living.size) return;
  let options;
  try {
    const definitions = await (await api.fetchApi(`/object_info/${KIND}`)).json();
    const [kind, details] = definitions[KIND].input.required.lora_name;
    options = Array.isArray(kind) ? kind : details.options;
  } catch {
    return; // retried at the next run, new node or press of R
  }
  for (const node of living) {
    const widget = node.widgets?.find((candidate) => candidate.name === "lora_name");
    if (widget && String(widget.options.values) !== String(options)) widget.options.values = [...options];
  }
}

app.registerExtension({
  name: "SubjectBooth.ApplySubject",
  setup() {
    api.addEventListener("execution_success", () => void freshList());
    api.addEventListener("executed", ({ detail }) => {
      if (detail?.output?.text && living.size) void freshList();
    });
  },
  nodeCreated(node) {
    if (!KINDS.includes(node.comfyClass)) return;
    living.add(node);
    const removed = node.onRemoved;
    node.onRemoved = function (...given) {
      living.delete(node);
      return removed?.apply(this, given);
    };
    void freshList();
    if (node.comfyClass === KIND && app.extensionManager.setting.get("SubjectBooth.Panels.Loras") !== false) {
      node.subjectBoothLora = new LoraPanel(node);
    }
  },
});
