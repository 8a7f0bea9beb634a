// One photo with its crop: a square that is dragged, and resized by a slider or the wheel; and the way to its mask. The photo
// stays as it is.
import { make } from "./panel.mjs";
import { MIDDLE, SMALLEST, boxOf, fitted } from "./photo_edits.mjs";
import { t } from "./words.mjs";

const STEP = 0.01;

export class CropEditor {
  /**
   * @param name of the photo
   * @param address of the whole photo
   * @param crop [x, y, size], or null for a photo that is not cropped yet
   * @param mask {can: whether a mask can be painted on it, has: whether one was}
   * @param actions {change(crop or null), paint(), unpaint(), close()}
   */
  constructor(name, address, crop, mask, actions) {
    this._actions = actions;
    this._crop = crop;
    this._size = [1, 1];
    this._box = make("div", { className: "sb-crop-box", tabIndex: 0 });
    this._box.setAttribute("role", "group");
    this._box.setAttribute("aria-label", t("Crop of {name}: arrow keys move it, + and - resize it", { name }));
    this._box.dataset.focus = "crop";
    this._image = make("img", { src: address, alt: name, draggable: false, onload: () => this._loaded() });
    this._stage = make("div", { className: "sb-crop" }, this._image, this._box);
    this._slider = make("input", { type: "range", min: String(SMALLEST), max: "1", step: String(STEP) });
    this._slider.setAttribute("aria-label", t("Size of the crop"));
    this._slider.dataset.focus = "size";
    this._slider.oninput = () => this._show([...this._now.slice(0, 2), Number(this._slider.value)]);
    this._slider.onchange = () => this._commit();
    const button = (text, title, act) => make("button", { type: "button", className: "sb-button", title, onclick: act }, text);
    const reset = button(t("Reset crop"), "", () => this._reset());
    const paint = button(mask.has ? t("Change mask") : t("Paint mask"), t("Opens ComfyUI's mask editor: paint over the subject"), () => actions.paint());
    paint.dataset.focus = "paint";
    const unpaint = button(t("Remove mask"), "", () => actions.unpaint());
    const done = button(t("Done"), "", () => actions.close());
    done.dataset.focus = "done";
    const masks = [mask.can ? paint : null, mask.has ? unpaint : null];
    this.element = make("div", {}, this._stage, make("div", { className: "sb-crop-line" }, this._slider, reset),
      make("div", { className: "sb-crop-line" }, ...masks, make("span", { className: "sb-space" }), done));
    this._listen();
  }

  focus() {
    this._box.focus();
  }

  get _now() {
    return this._crop ?? MIDDLE;
  }

  _loaded() {
    this._size = [this._image.naturalWidth, this._image.naturalHeight];
    this._place();
  }

  _listen() {
    let from = null;
    this._box.onpointerdown = (event) => {
      event.preventDefault();
      event.stopPropagation();
      this._box.focus();
      from = { x: event.clientX, y: event.clientY, crop: this._now };
      this._box.setPointerCapture(event.pointerId);
    };
    this._box.onpointermove = (event) => {
      if (!from) return;
      // Screen lengths, so that the editor's zoom does not matter.
      const { width, height } = this._image.getBoundingClientRect();
      const [x, y, size] = from.crop;
      this._show([x + (event.clientX - from.x) / width, y + (event.clientY - from.y) / height, size]);
    };
    this._box.onpointerup = this._box.onpointercancel = () => {
      if (from && from.crop !== this._now) this._commit();
      from = null;
    };
    this._stage.addEventListener("wheel", (event) => {
      event.preventDefault();
      event.stopPropagation();
      const [x, y, size] = this._now;
      this._show([x, y, size * (event.deltaY > 0 ? 1.05 : 1 / 1.05)]);
      clearTimeout(this._later);
      this._later = setTimeout(() => this._commit(), 300);
    }, { passive: false });
    this.element.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: [-STEP, 0], ArrowRight: [STEP, 0], ArrowUp: [0, -STEP], ArrowDown: [0, STEP] };
      const sizes = { "+": STEP, "=": STEP, "-": -STEP };
      const [x, y, size] = this._now;
      event.stopPropagation(); // the editor has shortcuts of its own
      if (event.key === "Escape") return this._actions.close();
      if (event.target !== this._box) return;
      const move = moves[event.key];
      if (move) this._show([x + move[0], y + move[1], size]);
      else if (sizes[event.key]) this._show([x, y, size + sizes[event.key]]);
      else return;
      event.preventDefault();
      clearTimeout(this._later);
      this._later = setTimeout(() => this._commit(), 300);
    });
  }

  _show(crop) {
    this._crop = fitted(crop, ...this._size);
    this._place();
  }

  _place() {
    const box = boxOf(this._now, ...this._size);
    for (const side of Object.keys(box)) this._box.style[side] = `${100 * box[side]}%`;
    this._slider.value = String(this._now[2]);
  }

  _commit() {
    clearTimeout(this._later);
    this._actions.change(this._crop);
  }

  _reset() {
    this._crop = null;
    this._place();
    this._commit();
  }
}
