// ComfyUI's own mask editor for a picture that no node shows.

/**
 * Open the mask editor for an input file. It saves a copy in ComfyUI's input folder; the file itself stays as it is.
 * @param app ComfyUI's
 * @param ComfyApp its class, which opens the editor for plugins
 * @param name of the file, as in LoadImage: "pets/rex.jpg", "clipspace/painted.png [input]"
 * @param viewAddress from {filename, subfolder, type} to its URL
 * @param saved called with the name of the copy
 */
export async function openMaskEditor(app, ComfyApp, name, viewAddress, saved) {
  const file = fileOf(name);
  const picture = new Image();
  picture.src = viewAddress(file);
  await picture.decode();
  // The editor takes a node, and writes the name of the copy to its widget "image".
  const widget = { name: "image", type: "combo", value: name, options: {}, callback: (value) => saved(value) };
  const node = {
    id: -1, type: "LoadImage", comfyClass: "LoadImage", imgs: [picture], images: [file], imageIndex: 0,
    previewMediaType: "image", widgets: [widget], properties: {}, inputs: [], outputs: [],
    graph: app.graph, isInputNode: () => false, setSizeForImage() {}, setDirtyCanvas() {},
  };
  ComfyApp.clipspace_return_node = node;
  if (!ComfyApp.open_maskeditor) throw new Error("this version of ComfyUI has no mask editor for other nodes");
  ComfyApp.copyToClipspace?.(node);
  ComfyApp.open_maskeditor();
}

/** "pets/rex.jpg [output]" as {filename, subfolder, type}. */
export function fileOf(name) {
  const [, path, type = "input"] = name.match(/^(.*?)(?: \[(input|output|temp)\])?$/s);
  const parts = path.replaceAll("\\", "/").split("/");
  return { filename: parts.pop(), subfolder: parts.join("/"), type };
}
