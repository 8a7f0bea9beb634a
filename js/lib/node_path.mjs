// ComfyUI identifies a node inside subgraphs by its path: "12:3" is node 3 in the subgraph of node 12.

/** The node of such a path below a root graph, or null. */
export function nodeAt(root, path) {
  const ids = String(path ?? "").split(":");
  let graph = root;
  for (const id of ids.slice(0, -1)) {
    graph = graph?.getNodeById?.(Number(id))?.subgraph;
  }
  return (graph && ids.at(-1) !== "" && graph.getNodeById?.(Number(ids.at(-1)))) || null;
}

/** The id of graphs without one; many workflows share it. */
const NO_ID = "00000000-0000-0000-0000-000000000000";

const NAMED_LATER = "SubjectBooth.named";
const MOST_NAMED = 50;

/**
 * Remember a graph that was loaded without an id: some editors (1.49) assign one on load, also when the page is reloaded,
 * while earlier queued prompts still have none. Kept in the tab's session storage.
 * @param loaded the id in the workflow's data, as it was loaded
 */
export function noteLoaded(loaded, root, storage = null) {
  if ((loaded && loaded !== NO_ID) || !root?.id || root.id === NO_ID) return;
  try {
    (storage ?? sessionStorage).setItem(NAMED_LATER, JSON.stringify([...namedLater(storage), root.id].slice(-MOST_NAMED)));
  } catch {
    // If storage is full or forbidden, only the panel after a reload is lost.
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

/** The node that a server message is about, or null: nodes of other workflows may have the same ids. */
export function nodeOf(root, { node, workflow }, storage = null) {
  const known = workflow && root?.id && root.id !== NO_ID;
  const other = known && workflow !== root.id && !(workflow === NO_ID && namedLater(storage).includes(root.id));
  return other ? null : nodeAt(root, node);
}

/** A key for a node across workflows, or null if its workflow has no id of its own. */
export function keyOf(root, node) {
  const path = pathOf(root, node);
  return path === null || !root.id || root.id === NO_ID ? null : `${root.id}/${path}`;
}

/** The path of a node below a root graph, or null if it is not in it; for a subgraph used twice, the first. */
export function pathOf(root, node) {
  if (!root || !node?.graph) return null;
  if (node.graph === root) return String(node.id);
  for (const outer of root.nodes ?? root._nodes ?? []) {
    const inner = outer.subgraph ? pathOf(outer.subgraph, node) : null;
    if (inner !== null) return `${outer.id}:${inner}`;
  }
  return null;
}
