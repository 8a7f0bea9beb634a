// LoadSubjectImages: shows the photos as training will see them, with warnings and captions.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { nodeOf } from "./lib/node_path.mjs";
import { Panel, ask, chain, dropText, hideWidget, keepingFocus, make, onWidgets, setWidget, valuesOf, widen } from "./lib/panel.mjs";
import { CropEditor } from "./lib/crop_editor.mjs";
import { paintMask } from "./lib/mask_editor.mjs";
import { editsOf, onlyOf, textOf, withEdit } from "./lib/photo_edits.mjs";
import { labelOf, moved, namesOf, valueOf, withAdded, without } from "./lib/photos.mjs";
import { t, told } from "./lib/words.mjs";

/** Maximum number of captions listed; the others are in the tooltips of the photos. */
const MOST_CAPTIONS = 8;
const EDITS = "photo_edits";
const WATCHED = ["images", "folder", "sample", "class_word", "token", "prompt_template", "captions", "resolution", "crop", EDITS];
const ACCEPTED = "image/png,image/jpeg,image/webp,image/avif,image/gif,image/bmp,image/tiff";

class PhotoPanel {
  constructor(node) {
    this.node = node;
    this.asked = 0;
    this.uploading = 0;
    this.answer = null;
    this.failure = "";
    this.panel = new Panel(node, "photos", 110);
    this.panel.element.classList.add("sb-own");
    widen(node, 400);
    // The panel shows the photos; hide the front end's own preview of the uploads.
    node.onDrawBackground = () => {};
    node.hideOutputImages = true;
    this.picker = make("input", { type: "file", multiple: true, accept: ACCEPTED });
    this.picker.onchange = () => {
      this.add([...this.picker.files]);
      this.picker.value = "";
    };
    const button = node.widgets.find((widget) => widget.type === "button");
    if (button) button.callback = () => this.picker.click();
    const isPicture = (file) => file.type.startsWith("image/");
    node.onDragDrop = (event) => this.add([...(event.dataTransfer?.files ?? [])].filter(isPicture));
    node.pasteFiles = (files) => this.add([...files].filter(isPicture));
    this.panel.element.addEventListener("dragover", (event) => event.preventDefault());
    this.panel.element.addEventListener("drop", (event) => {
      const files = [...(event.dataTransfer?.files ?? [])].filter(isPicture);
      event.preventDefault();
      event.stopPropagation();
      if (files.length) this.add(files);
    });
    this.cropping = null;
    this.panel.element.addEventListener("keydown", (event) => event.stopPropagation()); // not the editor's shortcuts
    hideWidget(node, EDITS);
    this.refresh = onWidgets(node, WATCHED, () => this.load());
    chain(node, "onExecuted", () => {
      this.refresh();
      setTimeout(() => this.dropText(), 0);
    });
  }

  // The editor's own copy of the status and the warnings, which the panel shows already.
  dropText() {
    if (this.answer && dropText(this.node)) this.panel.fit();
  }

  get names() {
    return namesOf(valuesOf(this.node, ["images"]).images);
  }

  set names(names) {
    const left = this.names.filter((name) => !names.includes(name));
    if (left.length) this.edits = onlyOf(this.edits, Object.keys(this.edits).filter((name) => !left.includes(name)));
    setWidget(this.node, "images", valueOf(names));
    this.refresh();
  }

  get edits() {
    return editsOf(valuesOf(this.node, [EDITS])[EDITS]);
  }

  set edits(edits) {
    setWidget(this.node, EDITS, textOf(edits));
  }

  // Uploads the files and appends them to the photos. Returns whether there were any, as onDragDrop expects.
  add(files) {
    if (!files.length) return false;
    void this.upload(files);
    return true;
  }

  async upload(files) {
    this.uploading += files.length;
    this.show();
    const failed = [];
    const added = [];
    for (const file of files) {
      try {
        added.push(await this.send(file));
      } catch (error) {
        failed.push(`${file.name}: ${error.message}`);
      }
      this.uploading -= 1;
    }
    if (failed.length) {
      app.extensionManager.toast.add({ severity: "error", summary: t("Upload failed"), detail: failed.join("\n") });
    }
    const combo = this.node.widgets.find((widget) => widget.name === "images");
    if (Array.isArray(combo.options.values)) combo.options.values = withAdded(combo.options.values, added);
    this.names = withAdded(this.names, added);
  }

  // ComfyUI renames an upload if another file has its name.
  async send(file) {
    const body = new FormData();
    body.append("image", file, file.name);
    if (file.name === "image.png") body.append("subfolder", "pasted"); // as the front end does for the clipboard
    const answer = await api.fetchApi("/upload/image", { method: "POST", body });
    if (answer.status !== 200) throw new Error(`${answer.status} ${answer.statusText}`);
    const saved = await answer.json();
    return saved.subfolder ? `${saved.subfolder}/${saved.name}` : saved.name;
  }

  async load() {
    const number = (this.asked += 1);
    const values = valuesOf(this.node, WATCHED);
    const linked = this.node.inputs?.some((input, slot) => WATCHED.includes(input.name) && this.node.isInputConnected(slot));
    let answer = null;
    let failure = "";
    try {
      answer = linked ? null : await ask(api, "/photos", values);
    } catch (error) {
      failure = error.message;
    }
    if (number !== this.asked) return; // superseded by a newer request
    this.answer = answer;
    this.failure = failure;
    this.show();
  }

  // Shows one whole photo with its crop in place of the grid.
  async crop(photo, focus = "crop") {
    const { photos } = await ask(api, "/photos", { ...valuesOf(this.node, WATCHED), whole: photo.key });
    const found = photos.find(({ key }) => key === photo.key);
    if (!found?.whole) return;
    const { crop = null, mask } = this.edits[photo.key] ?? {};
    const masks = { can: this.fileOf(photo) !== null && !found.transparent, has: Boolean(mask) };
    this.cropping = new CropEditor(photo.name, found.whole, crop, masks, {
      change: (changed) => (this.edits = withEdit(this.edits, photo.key, { crop: changed })),
      paint: () => void this.paint(photo),
      unpaint: () => this.setMask(photo, ""),
      close: () => {
        this.cropping = null;
        this.show();
        this.focus(`tile ${photo.key}`);
      },
    });
    this.show();
    this.focus(focus);
  }

  focus(place) {
    this.panel.element.querySelector(`[data-focus="${CSS.escape(place)}"]`)?.focus();
  }

  // The photo as ComfyUI's own nodes name it; null for the pack's samples, which are in no folder of ComfyUI.
  fileOf(photo) {
    const { folder, sample } = valuesOf(this.node, ["folder", "sample"]);
    if (sample && sample !== "none") return null;
    return folder ? `${folder}/${photo.key}` : photo.key;
  }

  async paint(photo) {
    try {
      const mask = await paintMask(api, app, this.node, this.edits[photo.key]?.mask || this.fileOf(photo));
      if (mask) await this.setMask(photo, mask);
      else this.focus("paint");
    } catch (error) {
      app.extensionManager.toast.add({ severity: "error", summary: t("The mask editor could not be opened"), detail: error.message });
    }
  }

  async setMask(photo, mask) {
    this.edits = withEdit(this.edits, photo.key, { mask });
    await this.crop(photo, "paint");
  }

  show() {
    const { photos = [], count = 0, sentence, class_sentence: classSentence, problem, warnings = [] } = this.answer ?? {};
    const own = photos.length > 0 && photos.length === this.names.length;
    const grid = make("div", { className: "sb-grid" }, ...photos.map((photo, index) => this.photo(photo, index, own)));
    const values = valuesOf(this.node, ["folder", "sample", "crop"]);
    if (!values.folder && (values.sample ?? "none") === "none") grid.append(this.addTile());
    const lines = [this.cropping?.element ?? grid];
    const line = (className, ...children) => lines.push(make("div", { className }, ...children));
    if (count > photos.length) line("sb-line sb-quiet", t("and {n} more", { n: count - photos.length }));
    if (this.failure) line("sb-problem", told(this.failure));
    const captioned = photos.filter((photo) => photo.caption);
    for (const photo of captioned.slice(0, MOST_CAPTIONS)) {
      line("sb-line", `${photo.name}: `, make("span", { className: "sb-words" }, photo.caption));
    }
    if (captioned.length > MOST_CAPTIONS) {
      line("sb-line sb-quiet", t("and {n} more", { n: captioned.length - MOST_CAPTIONS }));
    }
    if (sentence) {
      if (!captioned.length) line("sb-line", `${t("Caption of each photo:")} `, make("span", { className: "sb-words" }, sentence));
      line("sb-line sb-quiet", `${t("Class prompt:")} `, make("span", { className: "sb-words" }, classSentence));
    } else if (problem) {
      line("sb-note", told(problem));
    }
    const masked = Object.values(this.edits).some(({ mask }) => mask);
    if (masked && values.crop !== "subject") line("sb-line sb-quiet", t("Masks take effect with masked_loss in DreamBooth Options, or with crop set to subject."));
    for (const warning of warnings) line("sb-note", told(warning));
    keepingFocus(this.panel.element, () => this.panel.show(...lines));
  }

  // A photo with the box for its caption.
  photo(photo, index, own) {
    const box = make("input", { type: "text", className: "sb-caption", placeholder: t("caption") });
    box.value = this.edits[photo.key]?.caption ?? "";
    box.title = t("Caption of {name}. Empty: as set for all photos", { name: photo.name });
    box.setAttribute("aria-label", box.title);
    box.dataset.focus = `caption ${photo.key}`;
    box.onchange = () => (this.edits = withEdit(this.edits, photo.key, { caption: box.value.trim() }));
    return make("div", { className: "sb-photo" }, this.tile(photo, index, own), box);
  }

  tile(photo, index, own) {
    const messages = photo.error ? [told(photo.error)] : photo.warnings.map(told);
    const tile = make("div", { className: "sb-tile", tabIndex: 0, title: [photo.name, photo.caption, ...messages].filter(Boolean).join("\n") });
    tile.dataset.photo = photo.name;
    if (photo.error) tile.classList.add("sb-bad");
    else if (messages.length) tile.classList.add("sb-warn");
    if (photo.thumbnail) tile.append(make("img", { src: photo.thumbnail, alt: photo.name, draggable: false }));
    if (messages.length) tile.append(make("span", { className: "sb-mark" }, photo.error ? "✕" : signOf(photo, this.answer.photos)));
    tile.dataset.focus = `tile ${photo.key}`;
    if (!photo.error || this.edits[photo.key]?.mask) { // the mask may be what is wrong
      tile.classList.toggle("sb-cropped", Boolean(this.edits[photo.key]?.crop));
      tile.classList.toggle("sb-masked", Boolean(this.edits[photo.key]?.mask));
      tile.setAttribute("role", "button");
      tile.setAttribute("aria-label", t("Edit {name}: crop and mask", { name: photo.name }));
      tile.onclick = (event) => { if (event.target.tagName !== "BUTTON") void this.crop(photo); };
      tile.onkeydown = (event) => { if (event.target === tile && ["Enter", " "].includes(event.key)) void this.crop(photo); };
    }
    if (own) this.addTools(tile, index);
    return tile;
  }

  addTools(tile, index) {
    const tool = (name, sign, title, act) => {
      const button = make("button", { type: "button", title }, sign);
      button.dataset.tool = name;
      button.onclick = act;
      return button;
    };
    const tools = make("div", { className: "sb-tools" });
    if (index > 0) tools.append(tool("earlier", "‹", t("Move forward"), () => this.move(index, index - 1)));
    if (index < this.names.length - 1) {
      tools.append(tool("later", "›", t("Move back"), () => this.move(index, index + 1)));
    }
    tools.append(tool("remove", "✕", t("Remove this photo"), () => (this.names = without(this.names, index))));
    tile.append(tools);
    tile.draggable = true;
    tile.ondragstart = (event) => event.dataTransfer.setData("text/subjectbooth-photo", `${this.node.id}:${index}`);
    tile.ondragenter = () => tile.classList.add("sb-over");
    tile.ondragleave = () => tile.classList.remove("sb-over");
    tile.ondrop = (event) => {
      const [id, from] = event.dataTransfer.getData("text/subjectbooth-photo").split(":");
      tile.classList.remove("sb-over");
      if (id !== String(this.node.id)) return;
      event.preventDefault();
      event.stopPropagation();
      this.move(Number(from), index);
    };
  }

  move(from, to) {
    this.names = moved(this.names, from, to);
  }

  addTile() {
    const text = this.uploading ? t("uploading {n}", { n: this.uploading }) : `+ ${t("photos")}`;
    const tile = make("button", { type: "button", className: "sb-tile sb-add", title: t("Choose, drop or paste photos") });
    tile.dataset.tool = "add";
    tile.append(text);
    tile.onclick = () => this.picker.click();
    return tile;
  }
}

// One word on the image; the tooltip has the full warnings.
function signOf(photo, photos) {
  const manyGroups = photos.some(({ group }) => group > 1);
  const signs = {
    small: t("small"), twice: manyGroups ? `${t("similar")} ${photo.group}` : t("similar"), blurred: t("blurred"),
    white: t("on white"), cut: t("cut off"), torn: t("damaged"),
  };
  return photo.kinds.map((kind) => signs[kind]).filter(Boolean).join(", ") || "!";
}

// The text arrives before the result does, or alone if the result is cached.
api.addEventListener("progress_text", ({ detail }) => {
  setTimeout(() => nodeOf(app.rootGraph ?? app.graph, { node: detail?.nodeId })?.subjectBoothPhotos?.dropText(), 0);
});

app.registerExtension({
  name: "SubjectBooth.SubjectImages",
  nodeCreated(node) {
    if (node.comfyClass !== "LoadSubjectImages") return;
    // Several uploads are one value, a list. Without a label, the canvas tries to shorten the list like a string, throws
    // on every frame and does not draw the node's body (front ends 1.32.9 and 1.58.1).
    const images = node.widgets?.find((widget) => widget.name === "images");
    if (!images) return;
    images.options.getOptionLabel = (asked) => labelOf(images.value, asked);
    if (app.extensionManager.setting.get("SubjectBooth.Panels.Photos") === false) return;
    node.subjectBoothPhotos = new PhotoPanel(node);
  },
});
