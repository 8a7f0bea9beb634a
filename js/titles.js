// The templates' titles, notes and the inputs of their subgraphs in the editor's language.
import { app } from "../../scripts/app.js";
import { noteIn } from "./lib/notes.mjs";
import { slotIn, titleIn } from "./lib/titles.mjs";

const NOTES = ["MarkdownNote", "Note"];

function eachNode(graph, act) {
  for (const node of graph?.nodes ?? []) {
    act(node);
    if (node.subgraph) eachNode(node.subgraph, act);
  }
}

app.registerExtension({
  name: "SubjectBooth.Titles",
  afterConfigureGraph() {
    const locale = app.extensionManager?.setting?.get("Comfy.Locale");
    const ours = [];
    eachNode(app.rootGraph ?? app.graph, (node) => {
      if (node.constructor?.nodeData?.category?.startsWith("SubjectBooth")) ours.push(node);
    });
    if (!ours.length) return;
    eachNode(app.rootGraph ?? app.graph, (node) => {
      const translated = titleIn(locale, node.title);
      if (translated !== node.title) {
        node.title = translated;
        const { subgraph } = node;
        const slots = subgraph ? [node, subgraph].flatMap(({ inputs, outputs }) => [...inputs, ...outputs]) : [];
        for (const slot of slots) slot.localized_name = slotIn(locale, slot.localized_name ?? slot.name);
      }
      const [text] = NOTES.includes(node.type) ? node.widgets ?? [] : [];
      if (!text) return;
      const note = noteIn(locale, text.value);
      if (note !== text.value) text.value = note;
    });
  },
});
