// What a panel showed last, by node, in the browser's storage: for workflows that are reloaded before they are saved.
const MOST = 50;

function entriesOf(name) {
  try {
    const entries = JSON.parse(localStorage.getItem(name) ?? "[]");
    return Array.isArray(entries) ? entries.filter((entry) => Array.isArray(entry) && entry.length === 2) : [];
  } catch {
    return [];
  }
}

/** @param key see keyOf in node_path.mjs; null is not remembered */
export function remember(name, key, value) {
  if (key === null) return;
  const others = entriesOf(name).filter(([other]) => other !== key);
  try {
    localStorage.setItem(name, JSON.stringify([...others, [key, value]].slice(-MOST)));
  } catch {
    // If storage is full or forbidden, only the panel after a reload is lost.
  }
}

export function recall(name, key) {
  return entriesOf(name).find(([other]) => other === key)?.[1];
}
