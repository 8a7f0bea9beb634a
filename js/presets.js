// DreamBoothLoRATrain: choosing a preset writes its values into the node; changing one of them makes it "custom" again.
// Over the API the server does the first; see nodes/presets.py.
import { app } from "../../scripts/app.js";
import { chain, setWidget } from "./lib/panel.mjs";

const CUSTOM = "custom";

function connect(node, presets) {
  const widget = (name) => node.widgets.find((candidate) => candidate.name === name);
  let filling = false;
  const fill = () => {
    const values = presets[widget("preset").value];
    if (!values || filling) return;
    filling = true;
    for (const [name, value] of Object.entries(values)) {
      const target = widget(name);
      if (target && target.value !== value) setWidget(node, name, value);
    }
    filling = false;
  };
  chain(widget("preset"), "callback", fill);
  for (const name of new Set(Object.values(presets).flatMap(Object.keys))) {
    const target = widget(name);
    if (!target) continue;
    chain(target, "callback", () => {
      const values = presets[widget("preset").value];
      if (!filling && values && values[name] !== target.value) setWidget(node, "preset", CUSTOM);
    });
  }
  chain(node, "onConfigure", fill); // what is shown is what runs
}

app.registerExtension({
  name: "SubjectBooth.Presets",
  nodeCreated(node) {
    if (node.comfyClass !== "DreamBoothLoRATrain") return;
    const spec = node.constructor?.nodeData?.input?.optional?.preset;
    if (spec?.[1]?.presets && node.widgets?.some(({ name }) => name === "preset")) connect(node, spec[1].presets);
  },
});
