// The templates' titles in the editor's language.
import { app } from "../../scripts/app.js";
import { titleIn } from "./lib/titles.mjs";

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
      if (translated !== node.title) node.title = translated;
    });
  },
});
