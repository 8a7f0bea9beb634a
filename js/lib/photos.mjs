// The values behind the panels, as plain functions: the list of photos and the list of class images to leave out.

// The names that the value of the "images" widget stands for: nothing, one name or a list of them.
export function namesOf(value) {
  const listed = Array.isArray(value) ? value : [value];
  return listed.filter((name) => typeof name === "string" && name.trim());
}

// The other way round: an empty text when there is none, else a list, which the API knows as several photos.
export function valueOf(names) {
  return names.length ? [...names] : "";
}

// The list with what is new in `more` behind it.
export function withAdded(names, more) {
  return [...new Set([...names, ...more])];
}

export function without(names, index) {
  return names.filter((_, place) => place !== index);
}

// The list with the entry at `from` taken out and put in at `to`; unchanged where one of them is no place in it.
export function moved(names, from, to) {
  if (from === to || !(from in names) || !(to in names)) return [...names];
  const rest = without(names, from);
  return [...rest.slice(0, to), names[from], ...rest.slice(to)];
}

// The front end asks for the label of the value (1.32.9: joined to a text, 1.58.1: as the list it is) and of each option.
export function labelOf(value, asked) {
  if (!Array.isArray(value) || String(asked) !== String(value)) return asked ?? "";
  return value.length === 1 ? value[0] : `${value.length} photos: ${value.join(", ")}`;
}

// Hexadecimal digits of a content hash that the "exclude" widget gets; 8 are the least that the node takes.
export const HASH_DIGITS = 12;

function hashesOf(text) {
  return String(text ?? "").toLowerCase().split(/[\s,;]+/).filter(Boolean);
}

// Either may be the shorter: panels know 32 of the 64 digits, people may write as few as 8.
const same = (part, hash) => hash.startsWith(part) || part.startsWith(hash);

export function isExcluded(text, hash) {
  return hashesOf(text).some((part) => same(part, hash));
}

// The text of "exclude" with this picture left out, or taken back in.
export function toggled(text, hash) {
  const kept = hashesOf(text).filter((part) => !same(part, hash));
  if (!isExcluded(text, hash)) kept.push(hash.slice(0, HASH_DIGITS));
  return kept.join("\n");
}

// Class images known so far and those that a message brings, each once, in the order in which they came.
export function merged(pictures, more, most) {
  const byHash = new Map(pictures.map((picture) => [picture.hash, picture]));
  for (const picture of more) byHash.set(picture.hash, picture);
  return [...byHash.values()].slice(-most);
}
