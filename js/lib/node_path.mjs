// ComfyUI names a node inside subgraphs by its path: "12:3" is node 3 in the subgraph that node 12 stands for.

/** The node of such a path below a root graph, or null. */
export function nodeAt(root, path) {
  const ids = String(path ?? "").split(":");
  let graph = root;
  for (const id of ids.slice(0, -1)) {
    graph = graph?.getNodeById?.(Number(id))?.subgraph;
  }
  return (graph && ids.at(-1) !== "" && graph.getNodeById?.(Number(ids.at(-1)))) || null;
}

/** What the editor calls a graph that was given no id: many workflows have it. */
const NO_ID = "00000000-0000-0000-0000-000000000000";

const NAMED_LATER = "SubjectBooth.named";
const MOST_NAMED = 50;

/**
 * Note a graph that came without an id and has one now: some editors (1.49) give it one when they load it, a reload of
 * the page included, and what was queued before that still goes by none. The browser's tab remembers it.
 * @param loaded the id in the workflow's data, as it was loaded
 */
export function noteLoaded(loaded, root, storage = null) {
  if ((loaded && loaded !== NO_ID) || !root?.id || root.id === NO_ID) return;
  try {
    (storage ?? sessionStorage).setItem(NAMED_LATER, JSON.stringify([...namedLater(storage), root.id].slice(-MOST_NAMED)));
  } catch {
    // A full or forbidden storage costs only the panel after a reload.
  }
}

function namedLater(storage) {
  try {
    const ids = JSON.parse((storage ?? sessionStorage).getItem(NAMED_LATER) ?? "[]");
    return Array.isArray(ids) ? ids : [];
  } catch {
    return [];
  }
}

/** The node that a message of the server is about, or null: another workflow's nodes may have the same numbers. */
export function nodeOf(root, { node, workflow }, storage = null) {
  const known = workflow && root?.id && root.id !== NO_ID;
  const other = known && workflow !== root.id && !(workflow === NO_ID && namedLater(storage).includes(root.id));
  return other ? null : nodeAt(root, node);
}

/** A node's name among all workflows, or null when its workflow has none that is its own. */
export function keyOf(root, node) {
  const path = pathOf(root, node);
  return path === null || !root.id || root.id === NO_ID ? null : `${root.id}/${path}`;
}

/** The path of a node below a root graph, or null when it is not in it. A subgraph used twice gives its first place. */
export function pathOf(root, node) {
  if (!root || !node?.graph) return null;
  if (node.graph === root) return String(node.id);
  for (const outer of root.nodes ?? root._nodes ?? []) {
    const inner = outer.subgraph ? pathOf(outer.subgraph, node) : null;
    if (inner !== null) return `${outer.id}:${inner}`;
  }
  return null;
}
