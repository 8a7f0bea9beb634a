// Pure functions behind cropping and captioning single photos: the value of the widget "photo_edits".

/** Side of the smallest crop, as a fraction of the photo's shorter side; the server's limit. */
export const SMALLEST = 0.05;
/** The largest square in the middle: what an untouched photo starts from. */
export const MIDDLE = [0.5, 0.5, 1];

/** The edits by photo: {name: {crop: [x, y, size], caption}}. What is not readable counts as none. */
export function editsOf(text) {
  try {
    const edits = JSON.parse(text);
    return edits && typeof edits === "object" && !Array.isArray(edits) ? edits : {};
  } catch {
    return {};
  }
}

/** The widget's value; empty without any edit, so that the run stays that of the plain photos. */
export function textOf(edits) {
  return Object.keys(edits).length ? JSON.stringify(edits) : "";
}

/** The edits with `more` ({crop} or {caption}) for one photo; null or an empty text removes it. */
export function withEdit(edits, name, more) {
  const merged = { ...edits[name], ...more };
  const kept = Object.fromEntries(Object.entries(merged).filter(([, value]) => value !== null && value !== ""));
  const { [name]: _, ...others } = edits;
  return Object.keys(kept).length ? { ...others, [name]: kept } : others;
}

/** Only the edits of these photos. */
export function onlyOf(edits, names) {
  return Object.fromEntries(Object.entries(edits).filter(([name]) => names.includes(name)));
}

const between = (value, low, high) => Math.min(high, Math.max(low, value));
const rounded = (value) => Math.round(value * 10000) / 10000;

/** A crop in a photo of this width and height: its size within limits, its centre where the square is inside. */
export function fitted([x, y, size], width, height) {
  const side = between(size, SMALLEST, 1);
  const [halfWidth, halfHeight] = [width, height].map((length) => (side * Math.min(width, height)) / length / 2);
  return [between(x, halfWidth, 1 - halfWidth), between(y, halfHeight, 1 - halfHeight), side].map(rounded);
}

/** Left, top, width and height of a crop, as fractions of the photo's. */
export function boxOf([x, y, size], width, height) {
  const [across, down] = [width, height].map((length) => (size * Math.min(width, height)) / length);
  return { left: x - across / 2, top: y - down / 2, width: across, height: down };
}
