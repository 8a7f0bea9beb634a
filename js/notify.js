// A notification when a training ends while the tab is hidden; the panel of DreamBoothLoRATrain has the button for it.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { RunNotices } from "./lib/notify.mjs";
import { wordsOf } from "./lib/train_words.mjs";

app.registerExtension({
  name: "SubjectBooth.Notify",
  setup() {
    const notices = new RunNotices(wordsOf(app.extensionManager?.setting?.get("Comfy.Locale")));
    api.addEventListener("subjectbooth.train", ({ detail }) => notices.take(detail));
  },
});
