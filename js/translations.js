// Front end 1.32 merges the packs' translations and then overwrites them with its own (1.58 does not). So put ours into
// the node definitions too, which every front end falls back to.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const table = {};

/** Put the translated title, description and tooltips of `words` into one node's definition. */
function translate(definition, words) {
  definition.display_name = words.display_name ?? definition.display_name;
  definition.description = words.description ?? definition.description;
  for (const group of [definition.input?.required, definition.input?.optional]) {
    for (const [name, spec] of Object.entries(group ?? {})) {
      const tooltip = words.inputs?.[name]?.tooltip;
      if (tooltip) spec[1] = { ...spec[1], tooltip };
    }
  }
  for (const [slot, translated] of Object.entries(words.outputs ?? {})) {
    if (translated.tooltip && definition.output_tooltips) definition.output_tooltips[slot] = translated.tooltip;
  }
}

/** Apply the translated names of inputs and outputs to a new node. */
function label(node, words) {
  const named = (part) => words.inputs?.[part.name]?.name;
  for (const input of node.inputs ?? []) input.localized_name = named(input) ?? input.localized_name;
  for (const widget of node.widgets ?? []) widget.label = named(widget) ?? widget.label;
  for (const [slot, translated] of Object.entries(words.outputs ?? {})) {
    if (translated.name && node.outputs?.[slot]) node.outputs[slot].localized_name = translated.name;
  }
}

app.registerExtension({
  name: "SubjectBooth.Translations",
  async addCustomNodeDefs(definitions) {
    const locale = app.extensionManager?.setting?.get("Comfy.Locale") ?? "en";
    if (locale === "en") return;
    try {
      const words = (await (await api.fetchApi("/i18n")).json())[locale]?.nodeDefs ?? {};
      for (const [kind, translated] of Object.entries(words)) {
        if (!definitions[kind]?.category?.startsWith("SubjectBooth")) continue;
        translate(definitions[kind], translated);
        table[kind] = translated;
      }
    } catch (error) {
      console.info(`SubjectBooth: could not load translations; node names stay English (${error.message}).`);
    }
  },
  nodeCreated(node) {
    if (table[node.comfyClass]) label(node, table[node.comfyClass]);
  },
});
