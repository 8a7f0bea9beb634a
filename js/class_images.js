// GenerateClassPriors: shows class images as they are generated; a click adds one to the "exclude" widget.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { keyOf, nodeOf } from "./lib/node_path.mjs";
import { Panel, ask, chain, make, onWidgets, setWidget, valuesOf } from "./lib/panel.mjs";
import { isExcluded, merged, toggled } from "./lib/photos.mjs";
import { recall, remember } from "./lib/remembered.mjs";
import { t } from "./lib/words.mjs";

const KIND = "GenerateClassPriors";
const FOLDER = "class_images"; // property of the node: the folder shown last, to survive a reload
const REMEMBERED = "SubjectBooth.class_images";
const MOST = 500;

class ClassImagesPanel {
  constructor(node) {
    this.node = node;
    this.clear();
    this.panel = new Panel(node, "class_images", 60);
    this.panel.element.classList.add("sb-own");
    node.onDrawBackground = () => {}; // the images are in the panel
    node.hideOutputImages = true;
    // Leave the space to the images, not to the list of hashes.
    const exclude = node.widgets.find((widget) => widget.name === "exclude");
    if (exclude?.options) exclude.options.getMaxHeight = () => 44;
    this.refresh = onWidgets(node, ["exclude"], () => this.show());
    chain(node, "onExecuted", (output) => this.finished(output));
    // Once the node is in its graph, which has the id it is remembered by.
    chain(node, "onConfigure", () => setTimeout(() => void this.restore(), 0));
    this.show();
  }

  clear() {
    this.pictures = [];
    this.status = "";
  }

  // A message of a run: its folder and the images so far.
  update({ folder, pictures, done, count, made }) {
    if (folder !== this.node.properties[FOLDER]) this.clear();
    this.keep(folder);
    this.pictures = merged(this.pictures, pictures, MOST);
    this.status = t("{done} of {count} class images ready ({made} new)", { done, count, made });
    this.show();
  }

  finished(output) {
    if (!output?.hashes || !output.folder) return;
    const [folder] = output.folder;
    const [made] = output.made ?? [0];
    this.keep(folder);
    const used = output.hashes.map((hash, index) => ({ hash, ...output.images[index] }));
    const left = (output.excluded_hashes ?? []).map((hash, index) => ({ hash, ...output.excluded_images[index] }));
    // Exactly those of the run: with a lower count, the folder has more.
    const known = new Map(this.pictures.map((picture, index) => [picture.hash.slice(0, 32), index]));
    this.pictures = [...used, ...left].map((picture) => ({ ...picture, hash: picture.hash.slice(0, 32) }));
    this.pictures.sort((a, b) => (known.get(a.hash) ?? MOST) - (known.get(b.hash) ?? MOST));
    this.pictures = this.pictures.slice(0, MOST);
    const count = used.length + left.length;
    this.status = t("{done} of {count} class images ready ({made} new)", { done: count, count, made });
    this.show();
  }

  key() {
    return keyOf(app.rootGraph ?? app.graph, this.node);
  }

  // The editor saves a changed property only after the next click.
  keep(folder) {
    this.node.properties[FOLDER] = folder;
    remember(REMEMBERED, this.key(), folder);
  }

  async restore() {
    const folder = this.node.properties?.[FOLDER] ?? recall(REMEMBERED, this.key());
    if (!folder || this.pictures.length) return;
    try {
      const listed = await ask(api, `/class_images?folder=${encodeURIComponent(folder)}`);
      if (this.pictures.length) return; // a run was faster
      this.pictures = listed.pictures;
      this.status = t("{n} class images from an earlier run", { n: listed.count });
      this.show();
    } catch {
      // The workflow is from another machine, or the folder was deleted: the next run fills the panel.
    }
  }

  show() {
    const exclude = valuesOf(this.node, ["exclude"]).exclude;
    const out = this.pictures.filter((picture) => isExcluded(exclude, picture.hash)).length;
    const grid = make("div", { className: "sb-grid" }, ...this.pictures.map((picture) => this.tile(picture, exclude)));
    const text = !this.pictures.length
      ? t("Class images appear here as they are generated. Click one to exclude it.")
      : [this.status, out ? t("{n} excluded", { n: out }) : ""].filter(Boolean).join(", ");
    this.panel.show(grid, make("div", { className: "sb-line sb-quiet" }, text));
  }

  tile(picture, exclude) {
    const out = isExcluded(exclude, picture.hash);
    const where = new URLSearchParams({ filename: picture.filename, subfolder: picture.subfolder, type: picture.type });
    const tile = make("button", {
      type: "button",
      className: out ? "sb-tile sb-out" : "sb-tile",
      title: out ? t("Excluded. Click to use it again.") : t("Click to exclude this image from the next run."),
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

// Registered early: after a reload, messages arrive before setup(), and the editor warns about unknown ones.
let ready = false;
api.addEventListener("subjectbooth.class_images", ({ detail }) => {
  const node = ready && nodeOf(app.rootGraph ?? app.graph, detail);
  if (node) node.subjectBoothClassImages?.update(detail);
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
