// Nodes 2.0 of front end 1.32 shows, and keeps, three decimals of a number unless it is told how many it has: a learning
// rate of 0.0001 becomes 0.
import { app } from "../../scripts/app.js";

app.registerExtension({
  name: "SubjectBooth.Decimals",
  nodeCreated(node) {
    if (!node.constructor?.nodeData?.category?.startsWith("SubjectBooth")) return;
    for (const { options } of node.widgets ?? []) {
      if (options?.precision > 0) options.maxFractionDigits ??= options.precision;
    }
  },
});
