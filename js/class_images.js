// GenerateClassPriors: the class images as they come; a click leaves one out, which the "exclude" widget remembers.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { nodeOf } from "./lib/node_path.mjs";
import { Panel, ask, chain, make, onWidgets, setWidget, valuesOf } from "./lib/panel.mjs";
import { isExcluded, merged, toggled } from "./lib/photos.mjs";
import { t } from "./lib/words.mjs";

const KIND = "GenerateClassPriors";
const FOLDER = "class_images"; // a property of the node: which folder was shown last, for after a reload
const MOST = 500;

class ClassImagesPanel {
  constructor(node) {
    this.node = node;
    this.clear();
    this.panel = new Panel(node, "class_images", 60);
    node.onDrawBackground = () => {}; // the pictures are in the panel
    node.hideOutputImages = true;
    // A list of hashes needs no room: the pictures do.
    const exclude = node.widgets.find((widget) => widget.name === "exclude");
    if (exclude?.options) exclude.options.getMaxHeight = () => 44;
    this.refresh = onWidgets(node, ["exclude"], () => this.show());
    chain(node, "onExecuted", (output) => this.finished(output));
    chain(node, "onConfigure", () => void this.restore());
    this.show();
  }

  clear() {
    this.pictures = [];
    this.status = "";
  }

  // A run says which folder it fills and which pictures are there by now.
  note({ folder, pictures, done, count, made }) {
    if (folder !== this.node.properties[FOLDER]) this.clear();
    this.node.properties[FOLDER] = folder;
    this.pictures = merged(this.pictures, pictures, MOST);
    this.status = t("{done} of {count} there, {made} made now", { done, count, made });
    this.show();
  }

  finished(output) {
    if (!output?.hashes || !output.folder) return;
    const [folder] = output.folder;
    const [made] = output.made ?? [0];
    this.node.properties[FOLDER] = folder;
    const used = output.hashes.map((hash, index) => ({ hash, ...output.images[index] }));
    const left = (output.excluded_hashes ?? []).map((hash, index) => ({ hash, ...output.excluded_images[index] }));
    // Those of the run exactly: with a lower count fewer are used than lie in the folder.
    const known = new Map(this.pictures.map((picture, index) => [picture.hash.slice(0, 32), index]));
    this.pictures = [...used, ...left].map((picture) => ({ ...picture, hash: picture.hash.slice(0, 32) }));
    this.pictures.sort((a, b) => (known.get(a.hash) ?? MOST) - (known.get(b.hash) ?? MOST));
    this.pictures = this.pictures.slice(0, MOST);
    const count = used.length + left.length;
    this.status = t("{done} of {count} there, {made} made now", { done: count, count, made });
    this.show();
  }

  async restore() {
    const folder = this.node.properties?.[FOLDER];
    if (!folder || this.pictures.length) return;
    try {
      const said = await ask(api, `/class_images?folder=${encodeURIComponent(folder)}`);
      if (this.pictures.length) return; // a run was quicker
      this.pictures = said.pictures;
      this.status = t("{n} kept from before", { n: said.count });
      this.show();
    } catch {
      // Another machine's workflow, or the folder was deleted: the next run fills the panel.
    }
  }

  show() {
    const exclude = valuesOf(this.node, ["exclude"]).exclude;
    const out = this.pictures.filter((picture) => isExcluded(exclude, picture.hash)).length;
    const grid = make("div", { className: "sb-grid" }, ...this.pictures.map((picture) => this.tile(picture, exclude)));
    const text = !this.pictures.length
      ? t("The class images appear here while they are made. A click on one leaves it out.")
      : [this.status, out ? t("{n} left out", { n: out }) : ""].filter(Boolean).join(", ");
    this.panel.show(grid, make("div", { className: "sb-line sb-quiet" }, text));
  }

  tile(picture, exclude) {
    const out = isExcluded(exclude, picture.hash);
    const where = new URLSearchParams({ filename: picture.filename, subfolder: picture.subfolder, type: picture.type });
    const tile = make("button", {
      type: "button",
      className: out ? "sb-tile sb-out" : "sb-tile",
      title: out ? t("Left out. Click to use it again.") : t("Click to leave this picture out of the next run."),
    });
    tile.dataset.hash = picture.hash;
    tile.setAttribute("aria-pressed", String(out));
    tile.append(make("img", { src: api.apiURL(`/view?${where}`), loading: "lazy", draggable: false, alt: "" }));
    if (out) tile.append(make("span", { className: "sb-mark" }, "✕"));
    tile.onclick = () => {
      const now = valuesOf(this.node, ["exclude"]).exclude;
      setWidget(this.node, "exclude", toggled(now, picture.hash));
      this.show();
    };
    return tile;
  }
}

// Known from the start: a page that is reloaded gets messages before set-up, and the editor complains of unknown ones.
let ready = false;
api.addEventListener("subjectbooth.class_images", ({ detail }) => {
  const node = ready && nodeOf(app.rootGraph ?? app.graph, detail);
  if (node) node.subjectBoothClassImages?.note(detail);
});

app.registerExtension({
  name: "SubjectBooth.ClassImages",
  setup() {
    ready = true;
  },
  nodeCreated(node) {
    if (node.comfyClass !== KIND) return;
    if (app.extensionManager.setting.get("SubjectBooth.Panels.ClassImages") === false) return;
    node.subjectBoothClassImages = new ClassImagesPanel(node);
  },
});
