// Panels inside nodes: a DOM element that both renderers show and that is never saved.

/** The name of the editor's own widget for the text of a node. */
export const TEXT = "$$node-text-preview";

const STYLE = `
.sb-panel { box-sizing: border-box; width: 100%; height: 100%; overflow: auto; padding: 6px; border-radius: 6px;
  font: 12px/1.35 Inter, Arial, sans-serif; color: var(--input-text, #ddd); background: var(--comfy-input-bg, #222);
  contain: layout; overscroll-behavior: contain; text-align: left; }
.sb-grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(76px, 1fr)); gap: 6px; }
.sb-tile { position: relative; aspect-ratio: 1; border-radius: 5px; overflow: hidden; border: 2px solid transparent;
  background: #0004; padding: 0; margin: 0; color: inherit; font: inherit; display: block; width: 100%; }
.sb-tile:focus-visible { outline: 2px solid #5b9dff; }
.sb-tile img { width: 100%; height: 100%; object-fit: cover; display: block; -webkit-user-drag: none; }
.sb-tile.sb-warn { border-color: #e0a63a; }
.sb-tile.sb-bad { border-color: #d9534f; }
.sb-tile.sb-out img { opacity: 0.25; filter: grayscale(1); }
.sb-tile.sb-over { border-color: #5b9dff; }
.sb-mark { position: absolute; left: 3px; bottom: 3px; padding: 0 5px; border-radius: 8px; font-weight: 700;
  font-size: 11px; background: #e0a63a; color: #201600; }
.sb-bad .sb-mark { background: #d9534f; color: #fff; }
.sb-out .sb-mark { background: #999; color: #111; }
.sb-photo { min-width: 0; }
.sb-tile[role="button"] { cursor: pointer; }
.sb-tile.sb-cropped::after { content: ""; position: absolute; right: 5px; bottom: 5px; width: 9px; height: 9px; box-sizing: border-box;
  border: 2px solid #fff; outline: 1px solid #0008; }
.sb-tile.sb-masked { outline: 2px dotted #5b9dff; outline-offset: -3px; }
.sb-caption { box-sizing: border-box; width: 100%; margin-top: 3px; padding: 2px 4px; border: 1px solid var(--border-color, #555);
  border-radius: 4px; background: #0003; color: inherit; font: 11px/1.3 Inter, Arial, sans-serif; }
.sb-caption:focus { outline: 2px solid #5b9dff; }
.sb-crop { position: relative; width: fit-content; max-width: 100%; margin: 0 auto; overflow: hidden; border-radius: 5px; line-height: 0; }
.sb-crop > img { max-width: 100%; max-height: 300px; user-select: none; }
.sb-crop-box { position: absolute; box-sizing: border-box; border: 2px solid #5b9dff; cursor: move; touch-action: none;
  box-shadow: 0 0 0 4000px #000a; }
.sb-crop-box:focus-visible { outline: 2px solid #fff; }
.sb-crop-line { display: flex; gap: 8px; align-items: center; margin-top: 6px; }
.sb-crop-line input { flex: 1; min-width: 40px; accent-color: #5b9dff; }
.sb-space { flex: 1; }
.sb-tools { position: absolute; top: 2px; right: 2px; display: flex; gap: 2px; opacity: 0; }
.sb-tile:hover .sb-tools, .sb-tile:focus-within .sb-tools { opacity: 1; }
.sb-tools button, .sb-button { border: 0; border-radius: 4px; cursor: pointer; color: #fff; background: #000a;
  font: 12px/1 Arial, sans-serif; padding: 3px 5px; }
.sb-tools button:hover, .sb-button:hover { background: #3b82f6; }
.sb-add { border: 2px dashed #888a; cursor: pointer; background: none; color: inherit; font-size: 11px; }
.sb-add:hover { border-color: #5b9dff; }
.sb-line { margin: 5px 0 0; overflow-wrap: anywhere; }
.sb-quiet { opacity: 0.7; }
.sb-words { padding: 1px 5px; border-radius: 4px; background: #5b9dff33; user-select: text; }
.sb-note { margin: 4px 0 0; padding-left: 8px; border-left: 3px solid #e0a63a; }
.sb-problem { margin: 4px 0 0; padding-left: 8px; border-left: 3px solid #d9534f; }
.sb-row { display: flex; gap: 8px; align-items: flex-start; }
.sb-row > img { width: 76px; height: 76px; object-fit: cover; border-radius: 5px; flex: none; }
.sb-row > div { flex: 1; min-width: 0; }
/* Nodes 2.0 shows any node's pictures below it. Here they would be those of the panel again. */
[data-node-id]:has(.sb-own) .image-preview,
[data-node-id]:has(.sb-own) img:not(.sb-own *),
[data-node-id]:has(.sb-own) img:not(.sb-own *) + div,
[data-node-id]:has(.sb-own) div:has(img):not(.sb-own, .sb-own *, :has(.sb-own)) { display: none; }
`;

function addStyle() {
  if (document.getElementById("subjectbooth-style")) return;
  const style = document.createElement("style");
  style.id = "subjectbooth-style";
  style.textContent = STYLE;
  document.head.append(style);
}

// Creates an element: DOM properties (className, onclick), children as strings or elements.
export function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
}

const HIGHEST = 420; // pixels; a longer list scrolls

// A panel at the end of a node that fits its content. It is not an input: neither the workflow nor the prompt stores a
// value for it.
export class Panel {
  constructor(node, name, least) {
    addStyle();
    this.node = node;
    this.height = this.least = least;
    this.given = NaN; // the height that the node got from here
    this.inner = make("div");
    this.element = make("div", { className: "sb-panel" }, this.inner);
    // A scrollable list handles the wheel itself. Otherwise pass it to the canvas, which the panel covers in the classic editor.
    this.element.addEventListener("wheel", (event) => {
      if (this.element.scrollHeight > this.element.clientHeight && !event.ctrlKey) event.stopPropagation();
      else if (!window.LiteGraph?.vueNodesMode) window.app?.canvas?.processMouseWheel?.(event);
    }, { passive: false });
    this.element.addEventListener("pointerdown", (event) => event.stopPropagation());
    const widget = node.addDOMWidget(name, `SUBJECTBOOTH_${name.toUpperCase()}`, this.element, {
      serialize: false,
      hideOnZoom: false,
      getMinHeight: () => this.height,
      getValue: () => "",
      setValue: () => {},
    });
    widget.serialize = false;
    new ResizeObserver(() => this.fit()).observe(this.inner); // also when it first becomes visible
  }

  show(...children) {
    // An element that stays is left alone: something in it may be dragged right now.
    if (children.length && this.inner.firstChild === children[0]) {
      while (this.inner.childNodes.length > 1) this.inner.lastChild.remove();
      this.inner.append(...children.slice(1));
    } else {
      this.inner.replaceChildren(...children);
    }
    this.fit();
  }

  // Fits the node to its content. A height that the user has chosen only grows.
  fit() {
    const content = this.inner.offsetHeight;
    if (!content) return; // not on the screen
    const height = Math.min(HIGHEST, Math.max(this.least, content + 14));
    if (Math.abs(height - this.height) < 2) return;
    this.height = height;
    this.element.style.minHeight = `${height}px`;
    const [width, before] = this.node.size;
    const needed = this.node.computeSize()[1];
    const ours = Math.abs(before - this.given) < 1;
    if (needed > before || ours) {
      this.node.setSize([width, needed]);
      this.given = this.node.size[1];
    }
    this.node.graph?.setDirtyCanvas?.(true, true);
  }
}

// Widens a new node to fit its content; nodes from a workflow keep their size.
export function widen(node, width) {
  if (node.size[0] < width) node.setSize([width, node.size[1]]);
}

// Calls `changed` (debounced) after any of the named widgets changes: by hand, on loading a workflow, or by undo.
export function onWidgets(node, names, changed) {
  let pending = 0;
  const soon = () => {
    if (pending) return;
    pending = setTimeout(() => {
      pending = 0;
      if (node.graph) changed();
    }, 30);
  };
  for (const widget of node.widgets ?? []) {
    if (!names.includes(widget.name)) continue;
    chain(widget, "callback", soon);
  }
  chain(node, "onConfigure", soon);
  chain(node, "onAdded", soon);
  soon();
  return soon;
}

// Hides a widget that a panel sets. Without the panel it is a line of text.
export function hideWidget(node, name) {
  const widget = node.widgets.find((candidate) => candidate.name === name);
  if (!widget) return;
  widget.hidden = true;
  widget.computeSize = () => [0, -4]; // the classic editor leaves a gap for a hidden widget
  widget.options.hidden = true;
}

// Removes the editor's own text of a node, whose panel says the same. Returns whether there was one.
export function dropText(node) {
  const at = node.widgets?.findIndex(({ name }) => name === TEXT) ?? -1;
  if (at < 0) return false;
  node.widgets[at].onRemove?.();
  node.widgets.splice(at, 1);
  node.graph?.setDirtyCanvas?.(true, true);
  return true;
}

// Draws the panel again without taking the keyboard from what is being typed.
export function keepingFocus(element, draw) {
  const before = element.contains(document.activeElement) ? document.activeElement : null;
  const place = before?.dataset.focus;
  const { value, selectionStart, selectionEnd } = before ?? {};
  draw();
  const after = place && element.querySelector(`[data-focus="${CSS.escape(place)}"]`);
  if (!after) return;
  after.focus({ preventScroll: true });
  if (before.type !== "text") return;
  after.value = value;
  after.setSelectionRange(selectionStart, selectionEnd);
}

// Runs `more` after the existing method of this name.
export function chain(object, name, more) {
  const before = object[name];
  object[name] = function (...given) {
    const result = before?.apply(this, given);
    more.apply(this, given);
    return result;
  };
}

export function valuesOf(node, names) {
  const values = {};
  for (const widget of node.widgets ?? []) if (names.includes(widget.name)) values[widget.name] = widget.value;
  return values;
}

// Sets a widget's value as a user would, with its callback and undo.
export function setWidget(node, name, value) {
  const widget = node.widgets?.find((candidate) => candidate.name === name);
  if (!widget) return;
  widget.value = value;
  widget.callback?.(value);
  node.graph?.setDirtyCanvas?.(true, true);
  node.graph?.change?.();
}

// The JSON answer of one of the pack's routes.
export async function ask(api, path, body) {
  const request = body === undefined ? {} : { method: "POST", body: JSON.stringify(body) };
  const answer = await api.fetchApi(`/subjectbooth${path}`, request);
  const data = await answer.json().catch(() => ({ error: `the server answered ${answer.status}` }));
  if (!answer.ok) throw new Error(data.error ?? `the server answered ${answer.status}`);
  return data;
}

export function copyButton(text, label = "copy") {
  const button = make("button", { className: "sb-button", type: "button", title: text }, label);
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      // Not a secure context (ComfyUI over plain http on the network): fall back to the old API.
      const area = make("textarea", { value: text });
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    button.textContent = "✓";
    setTimeout(() => (button.textContent = label), 1200);
  });
  return button;
}
