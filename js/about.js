// The pack's settings, its badge on the About page, and the language of its panels.
import { app } from "../../scripts/app.js";
import { speak } from "./lib/words.mjs";

const VERSION = "0.1.0"; // pyproject.toml's; a test holds the two together
const REPOSITORY = "https://github.com/subjectbooth/SubjectBooth";

function panel(id, name, tooltip) {
  const category = ["SubjectBooth", "Panels", id];
  return { id: `SubjectBooth.Panels.${id}`, category, name, tooltip, type: "boolean", defaultValue: true };
}

app.registerExtension({
  name: "SubjectBooth.About",
  aboutPageBadges: [{ label: `SubjectBooth ${VERSION}`, url: REPOSITORY, icon: "pi pi-github" }],
  settings: [
    panel("Photos", "Photos on Load Subject Images", "Shows the cropped photos, warnings and captions. Applies to new nodes."),
    panel("ClassImages", "Images on Generate Class Priors", "Shows class images as they are generated; click one to exclude it. Applies to new nodes."),
    panel("Loras", "LoRA details on Apply Subject LoRA", "Shows the trained words and a preview of the selected LoRA. Applies to new nodes."),
  ],
  init() {
    speak(app.extensionManager?.setting?.get("Comfy.Locale"));
  },
});
