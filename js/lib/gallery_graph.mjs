// What the gallery reads from the open workflow, and what it changes there. `app` is ComfyUI's.
import { setWidget } from "./panel.mjs";

const APPLY = "ApplySubjectLoRA";
const TRAINER = "DreamBoothLoRATrain";
const OWN = [TRAINER, "GenerateClassPriors", "EvaluateSubjectLoRA", "LoadSubjectImages"];

const isLink = (value) => Array.isArray(value) && value.length === 2 && typeof value[0] === "string";

/** All nodes of a graph, with those of its subgraphs. */
export function allNodes(graph) {
  return (graph?.nodes ?? []).flatMap((node) => [node, ...(node.subgraph ? allNodes(node.subgraph) : [])]);
}

/**
 * What loads the model in a prompt in API format: {nodes, model, clip, vae}, or null. From the inputs of the trainer, of
 * ApplySubjectLoRA, or from a checkpoint loader.
 */
export function baseOf(prompt) {
  const all = Object.entries(prompt);
  const ofKind = (kind) => all.filter(([, node]) => node.class_type === kind);
  const vae = all.map(([, node]) => node.inputs.vae).find(isLink);
  const found = [...ofKind(TRAINER), ...ofKind(APPLY)].map(([, { inputs }]) => [inputs.model, inputs.clip, inputs.vae ?? vae]);
  for (const [id] of ofKind("CheckpointLoaderSimple")) found.push([[id, 0], [id, 1], [id, 2]]);
  for (const [model, clip, decoder] of found) {
    const nodes = above(prompt, [model, clip, decoder]);
    if (nodes) return { nodes, model, clip, vae: decoder };
  }
  return null;
}

/** A node of a prompt in API format with all that it hangs on, itself included. */
export function upstreamOf(prompt, id) {
  const nodes = {};
  const waiting = [id];
  while (waiting.length) {
    const next = waiting.pop();
    if (nodes[next] || !prompt[next]) continue;
    nodes[next] = prompt[next];
    waiting.push(...Object.values(prompt[next].inputs).filter(isLink).map(([source]) => source));
  }
  return nodes;
}

/** The nodes that some links come from, with all above them; null if one is missing or would train. */
function above(prompt, links) {
  const nodes = {};
  const waiting = [...links];
  while (waiting.length) {
    const link = waiting.pop();
    const node = isLink(link) ? prompt[link[0]] : null;
    if (!node || OWN.includes(node.class_type)) return null;
    if (nodes[link[0]]) continue;
    nodes[link[0]] = { class_type: node.class_type, inputs: node.inputs };
    waiting.push(...Object.values(node.inputs).filter(isLink));
  }
  return nodes;
}

/** The trainer's node in the open workflow that trained a run, or nothing. */
export function trainerOf(app, run) {
  return allNodes(app.rootGraph ?? app.graph)
    .find((node) => node.comfyClass === TRAINER && node.properties?.subjectbooth_run === run);
}

/** Make a step the result in the trainer's node, and queue the workflow. */
export async function useStep(app, trainer, step) {
  setWidget(trainer, "use_step", step);
  setWidget(trainer, "force_retrain", false);
  await app.queuePrompt(0, 1);
}

/**
 * Choose a LoRA file in the selected ApplySubjectLoRA, otherwise in the first of the open graph, otherwise in a new one.
 * @returns {node, isNew}
 */
export function sendTo(app, lora) {
  const graph = app.canvas.graph ?? app.graph;
  const selected = Object.values(app.canvas.selected_nodes ?? {});
  const isApply = (node) => node.comfyClass === APPLY;
  let node = selected.find(isApply) ?? graph.nodes.find(isApply);
  const isNew = !node;
  if (isNew) {
    node = window.LiteGraph.createNode(APPLY);
    const { scale, offset } = app.canvas.ds;
    const canvas = app.canvas.canvas;
    node.pos = [canvas.clientWidth / 2 / scale - offset[0] - node.size[0] / 2, canvas.clientHeight / 3 / scale - offset[1]];
    graph.add(node);
  }
  // Both a file and a connected LoRA are an error.
  const wired = node.inputs.findIndex(({ name }) => name === "subject_lora");
  if (wired >= 0 && node.isInputConnected(wired)) node.disconnectInput(wired);
  const widget = node.widgets.find(({ name }) => name === "lora_name");
  if (!widget.options.values.includes(lora)) widget.options.values = [...widget.options.values, lora];
  setWidget(node, "lora_name", lora);
  app.canvas.selectNode?.(node);
  return { node, isNew };
}
