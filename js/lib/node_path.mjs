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

/** The node that a message of the server is about, or null: another workflow's nodes may have the same numbers. */
export function nodeOf(root, { node, workflow }) {
  const known = workflow && root?.id && root.id !== NO_ID;
  return known && workflow !== root.id ? null : nodeAt(root, node);
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
