// Words to find a node by, where the front end knows such aliases and ComfyUI does not send them yet (before 0.4).
import { app } from "../../scripts/app.js";

app.registerExtension({
  name: "SubjectBooth.Search",
  addCustomNodeDefs(definitions) {
    for (const definition of Object.values(definitions)) {
      if (!definition.category?.startsWith("SubjectBooth")) continue;
      const inputs = Object.values({ ...definition.input?.required, ...definition.input?.optional });
      definition.search_aliases ??= inputs.find(([, options]) => options?.search_aliases)?.[1].search_aliases;
    }
  },
});
