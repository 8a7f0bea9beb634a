// ComfyUI's own mask editor on one photo. It only edits the picture of the selected node, so it gets a Load Image node for
// as long as it is open.

const EDITOR = '[aria-labelledby="global-mask-editor"], .mask-editor-dialog';
const COMMAND = "Comfy.MaskEditor.OpenMaskEditor";
/** Milliseconds in which the editor opens. */
const PATIENCE = 8000;
const INTERVAL = 150;

/** Where ComfyUI serves a file of its folders; `name` as its widgets have it: "rex.jpg", "dogs/rex.jpg [input]". */
export function viewOf(name) {
  const [, path, type = "input"] = /^(.*?)(?: \[(input|output|temp)\])?$/s.exec(name);
  const at = path.lastIndexOf("/");
  return new URLSearchParams({ filename: path.slice(at + 1), subfolder: path.slice(0, Math.max(at, 0)), type });
}

const isOpen = () => document.querySelector(EDITOR) !== null;
const pause = () => new Promise((done) => setTimeout(done, INTERVAL));

/**
 * Open the editor and wait until it is closed.
 *
 * @param api ComfyUI's
 * @param app ComfyUI's
 * @param owner the node that the photo belongs to
 * @param name the photo, or the mask painted before
 * @returns the name of the saved picture, whose painted part is transparent; null if nothing was saved
 * @throws Error if there is no such photo, or the editor does not open
 */
export async function paintMask(api, app, owner, name) {
  const image = new Image();
  image.src = api.apiURL(`/view?${viewOf(name)}`);
  await image.decode();
  const { canvas } = app;
  const selected = [...(canvas.selectedItems ?? [])];
  const node = window.LiteGraph.createNode("LoadImage");
  canvas.emitBeforeChange(); // until the end, what changes in the graph is no step of undo
  await pause(); // the editor is still recording what led to the click
  try {
    owner.graph.add(node);
    node.pos = [...owner.pos];
    const widget = node.widgets.find((candidate) => candidate.name === "image");
    widget.value = name;
    node.imgs = [image];
    canvas.deselectAll();
    canvas.select(node);
    await app.extensionManager.command.execute(COMMAND);
    const latest = Date.now() + PATIENCE;
    while (!isOpen() && Date.now() < latest) await pause();
    if (!isOpen()) throw new Error("the mask editor does not open");
    while (isOpen()) await pause();
    return widget.value === name ? null : String(widget.value);
  } finally {
    owner.graph?.remove(node);
    if (app.nodeOutputs) delete app.nodeOutputs[String(node.id)];
    canvas.deselectAll();
    for (const item of selected) canvas.select(item);
    canvas.emitAfterChange();
  }
}
