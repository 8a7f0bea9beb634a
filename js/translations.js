// Front end 1.32 merges the packs' translations and then loads its own words of the language over them, which loses
// ours (1.58 keeps them). So they are put into the definitions too, where every front end looks when it has none.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const table = {};

/** Put the translated names and tooltips of `words` into one node's definition. */
export function translate(definition, words) {
  definition.display_name = words.display_name ?? definition.display_name;
  definition.description = words.description ?? definition.description;
  for (const group of [definition.input?.required, definition.input?.optional]) {
    for (const [name, spec] of Object.entries(group ?? {})) {
      const said = words.inputs?.[name];
      if (!said) continue;
      spec[1] = { ...spec[1], display_name: said.name ?? name, tooltip: said.tooltip ?? spec[1]?.tooltip };
    }
  }
  for (const [slot, said] of Object.entries(words.outputs ?? {})) {
    if (said.tooltip && definition.output_tooltips) definition.output_tooltips[slot] = said.tooltip;
  }
}

/** The same for the labels on a node that has just been made. */
export function label(node, words) {
  for (const part of [...(node.inputs ?? []), ...(node.widgets ?? [])]) {
    const said = words.inputs?.[part.name]?.name;
    if (!said) continue;
    if (node.widgets?.includes(part)) part.label = said;
    else part.localized_name = said;
  }
  for (const [slot, said] of Object.entries(words.outputs ?? {})) {
    if (said.name && node.outputs?.[slot]) node.outputs[slot].localized_name = said.name;
  }
}

app.registerExtension({
  name: "SubjectBooth.Translations",
  async addCustomNodeDefs(definitions) {
    const locale = app.extensionManager?.setting?.get("Comfy.Locale") ?? "en";
    if (locale === "en") return;
    try {
      const words = (await (await api.fetchApi("/i18n")).json())[locale]?.nodeDefs ?? {};
      for (const [kind, said] of Object.entries(words)) {
        if (!definitions[kind]?.category?.startsWith("SubjectBooth")) continue;
        translate(definitions[kind], said);
        table[kind] = said;
      }
    } catch (error) {
      console.info(`SubjectBooth: the node names stay English (${error.message}).`);
    }
  },
  nodeCreated(node) {
    if (table[node.comfyClass]) label(node, table[node.comfyClass]);
  },
});
