// Pure functions behind the panels: the list of photos and the list of excluded class images.
import { t } from "./words.mjs";

// The names in the value of the "images" widget: none, one, or a list.
export function namesOf(value) {
  const listed = Array.isArray(value) ? value : [value];
  return listed.filter((name) => typeof name === "string" && name.trim());
}

// The inverse: an empty string for none, otherwise a list, which the API accepts as several photos.
export function valueOf(names) {
  return names.length ? [...names] : "";
}

// The list with new entries of `more` appended.
export function withAdded(names, more) {
  return [...new Set([...names, ...more])];
}

export function without(names, index) {
  return names.filter((_, place) => place !== index);
}

// The list with the entry at `from` moved to `to`; unchanged if either is out of range.
export function moved(names, from, to) {
  if (from === to || !(from in names) || !(to in names)) return [...names];
  const rest = without(names, from);
  return [...rest.slice(0, to), names[from], ...rest.slice(to)];
}

// The front end requests labels for the value (1.32.9: joined to a string, 1.58.1: as a list) and for each option.
export function labelOf(value, asked) {
  if (!Array.isArray(value) || String(asked) !== String(value)) return asked ?? "";
  return value.length === 1 ? value[0] : `${value.length} ${t("photos")}: ${value.join(", ")}`;
}

// Hex digits of a content hash written to the "exclude" widget; the node requires at least 8.
export const HASH_DIGITS = 12;

function hashesOf(text) {
  return String(text ?? "").toLowerCase().split(/[\s,;]+/).filter(Boolean);
}

// Either may be shorter: panels know 32 of the 64 digits, and people may write as few as 8.
const same = (part, hash) => hash.startsWith(part) || part.startsWith(hash);

export function isExcluded(text, hash) {
  return hashesOf(text).some((part) => same(part, hash));
}

// The text of "exclude" with this image added or removed.
export function toggled(text, hash) {
  const kept = hashesOf(text).filter((part) => !same(part, hash));
  if (!isExcluded(text, hash)) kept.push(hash.slice(0, HASH_DIGITS));
  return kept.join("\n");
}

// The known class images plus those of a message, without duplicates, in order of arrival.
export function merged(pictures, more, most) {
  const byHash = new Map(pictures.map((picture) => [picture.hash, picture]));
  for (const picture of more) byHash.set(picture.hash, picture);
  return [...byHash.values()].slice(-most);
}
