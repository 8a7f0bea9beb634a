// Several uploaded files are one value of the "images" widget: a list. Without a label of its own the canvas tries to
// shorten that list as if it were a text, throws at every frame, and the node's body is not drawn (seen with front ends
// 1.32.9 and 1.58.1).
import { app } from "../../scripts/app.js";

// The front end asks for the label of the value (1.32.9: joined to a text, 1.58.1: as the list it is) and of each option.
function label(value, asked) {
  if (!Array.isArray(value) || String(asked) !== String(value)) return asked ?? "";
  return value.length === 1 ? value[0] : `${value.length} photos: ${value.join(", ")}`;
}

app.registerExtension({
  name: "SubjectBooth.SubjectImages",
  nodeCreated(node) {
    if (node.comfyClass !== "LoadSubjectImages") return;
    const widget = node.widgets?.find((candidate) => candidate.name === "images");
    if (widget) widget.options.getOptionLabel = (asked) => label(widget.value, asked);
  },
});
