// Several uploaded files are one value of the "images" widget: a list. Without a label of its own the canvas tries to
// shorten that list as if it were a text, throws at every frame, and the node's body is not drawn (front end 1.32.9).
import { app } from "../../scripts/app.js";

function label(widget, text) {
  const value = widget.value;
  if (!Array.isArray(value) || text !== String(value)) return text ?? "";
  return value.length === 1 ? value[0] : `${value.length} photos: ${value.join(", ")}`;
}

app.registerExtension({
  name: "SubjectBooth.SubjectImages",
  nodeCreated(node) {
    if (node.comfyClass !== "LoadSubjectImages") return;
    const widget = node.widgets?.find((candidate) => candidate.name === "images");
    if (widget) widget.options.getOptionLabel = (text) => label(widget, text);
  },
});
