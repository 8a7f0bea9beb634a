// The pack's settings, all under one heading, its badge on the About page, and the words of its panels.
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
    panel("Photos", "Photos on Load Subject Images", "Thumbnails as training sees them, warnings and sentences. For new nodes."),
    panel("ClassImages", "Pictures on Generate Class Priors", "Class images as they come; a click leaves one out. For new nodes."),
    panel("Loras", "Words and picture on Apply Subject LoRA", "What the chosen LoRA says about itself. For new nodes."),
  ],
  init() {
    speak(app.extensionManager?.setting?.get("Comfy.Locale"));
  },
});
