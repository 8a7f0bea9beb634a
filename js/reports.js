// The text that the editor shows below a node while it works: in the editor's language, and gone where the node's panel
// says the same.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { nodeOf } from "./lib/node_path.mjs";
import { TEXT, dropText } from "./lib/panel.mjs";
import { isOnPanel, isRepeated } from "./lib/reports.mjs";
import { told } from "./lib/words.mjs";

function improve(node) {
  if (!node?.constructor?.nodeData?.category?.startsWith("SubjectBooth")) return;
  const widget = node.widgets?.find(({ name }) => name === TEXT);
  if (typeof widget?.value !== "string") return;
  const hasPanel = node.comfyClass !== "GenerateClassPriors" || node.subjectBoothClassImages;
  if (hasPanel && isOnPanel(node.comfyClass, widget.value)) {
    dropText(node);
    node.subjectBoothClassImages?.panel.fit();
    return;
  }
  const text = widget.value.split("\n").map(told).join("\n");
  if (text !== widget.value) widget.value = text;
}

// Before the editor makes its widget: making one at each step, to take it off again, would flicker.
api.addEventListener("progress_text", (event) => {
  const node = nodeOf(app.rootGraph ?? app.graph, { node: event.detail?.nodeId });
  if (!isRepeated(node?.comfyClass, event.detail?.text)) return;
  event.stopImmediatePropagation();
  dropText(node);
}, { capture: true });

// Once the editor has made or filled its widget.
api.addEventListener("progress_text", ({ detail }) => {
  setTimeout(() => improve(nodeOf(app.rootGraph ?? app.graph, { node: detail?.nodeId })), 0);
});

app.registerExtension({ name: "SubjectBooth.Reports" });
