// Pure functions of the training panel, without DOM or ComfyUI. tests/js/test_panel_units.py tests them.
import { t } from "./words.mjs";

/** Moving average over `radius` points to both sides; near the ends the window shrinks symmetrically. */
export function smooth(points, radius) {
  const sums = [0];
  for (const [, value] of points) sums.push(sums.at(-1) + value);
  return points.map(([step], at) => {
    const reach = Math.min(radius, at, points.length - 1 - at);
    // The last points would follow every jump, so there the window looks back by at least a quarter of its size.
    const from = Math.max(0, at - Math.max(reach, Math.min(at, Math.ceil(radius / 2))));
    const to = at + reach;
    return [step, (sums[to + 1] - sums[from]) / (to + 1 - from)];
  });
}

/** Smoothing radius for a curve of `count` points: a twentieth of it. */
export function smoothingRadius(count) {
  return Math.max(2, Math.round(count / 20));
}

/** Average pairs of neighbours: half the points, the same curve. */
export function halved(points) {
  const result = [];
  for (let at = 0; at < points.length; at += 2) {
    const one = points[at];
    const two = points[at + 1];
    result.push(two ? [(one[0] + two[0]) / 2, (one[1] + two[1]) / 2] : one);
  }
  return result;
}

/** A curve of at most `most` points, however many are added. Steps must increase. */
export class Series {
  constructor(most = 2000) {
    this.most = most;
    this.points = [];
  }

  add(points) {
    for (const [step, value] of points) {
      if (!Number.isFinite(step) || !Number.isFinite(value)) continue;
      // A point may arrive twice: with a message, and with the log that is read after a reload.
      if (this.points.length && step <= this.points.at(-1)[0]) continue;
      this.points.push([step, value]);
      if (this.points.length > this.most) this.points = halved(this.points);
    }
  }

  /** Drop the points after a step, because a resumed run produces them again. */
  cut(step) {
    this.points = this.points.filter(([at]) => at <= step);
  }

  get last() {
    return this.points.at(-1)?.[1];
  }
}

/** Round numbers from `low` to `high`, about `count` of them. */
export function ticks(low, high, count) {
  if (!(high > low)) return [low];
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const size = [1, 2, 5, 10].find((factor) => factor * power >= rough * 0.999) * power;
  const result = [];
  for (let number = Math.ceil(low / size - 1e-9); number * size <= high + size * 1e-9; number += 1) {
    result.push(Number((number * size).toPrecision(12)));
  }
  return result;
}

/** The value range that shows all smoothed curves and nearly all raw points; single peaks may be clipped. */
export function valueRange(raw, smoothed, share = 0.98) {
  const sorted = raw.flat().map(([, value]) => value).sort((one, two) => one - two);
  if (!sorted.length) return [0, 1];
  let low = sorted[Math.floor((1 - share) * (sorted.length - 1))];
  let high = sorted[Math.ceil(share * (sorted.length - 1))];
  for (const [, value] of smoothed.flat()) {
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  if (low === high) return [low - Math.abs(low || 1) / 2, high + Math.abs(high || 1) / 2];
  const margin = (high - low) * 0.06;
  return [low >= 0 ? Math.max(0, low - margin) : low - margin, high + margin];
}

/** A function from [from, to] to [start, end]. */
export function scale(from, to, start, end) {
  const factor = to === from ? 0 : (end - start) / (to - from);
  return (value) => start + (value - from) * factor;
}

/** The point of a curve nearest to a step, by binary search. */
export function nearest(points, step) {
  if (!points.length) return null;
  let low = 0;
  let high = points.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < step) low = middle + 1;
    else high = middle;
  }
  const before = points[low - 1];
  return before && step - before[0] <= points[low][0] - step ? before : points[low];
}

/** "1:05", "2:01:05"; "–" if unknown. */
export function readableTime(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return "–";
  const whole = Math.max(0, Math.round(seconds));
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60];
  const two = (number) => String(number).padStart(2, "0");
  return hours ? `${hours}:${two(minutes)}:${two(rest)}` : `${minutes}:${two(rest)}`;
}

/** Seconds per step with three digits: "0.042", "1.25", "12.5", "125". */
export function readableSeconds(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  if (seconds >= 100) return seconds.toFixed(0);
  if (seconds >= 10) return seconds.toFixed(1);
  return seconds >= 1 ? seconds.toFixed(2) : seconds.toFixed(3);
}

/** "812 KB", "3.2 MB", "11.4 GB", in powers of 1024 as file managers and ComfyUI count. */
export function readableBytes(bytes) {
  if (!Number.isFinite(bytes)) return "–";
  const units = [t("B"), t("KB"), t("MB"), t("GB"), t("TB")];
  let [value, unit] = [bytes, 0];
  while (value >= 1024 && unit < units.length - 1) [value, unit] = [value / 1024, unit + 1];
  return `${unit === 0 || value >= 100 ? value.toFixed(0) : value.toFixed(1)} ${units[unit]}`;
}
