// The charts of a run on plain canvases: losses raw (thin) and smoothed (bold), and scores.
import { nearest, scale, smooth, smoothingRadius, ticks, valueRange } from "./numbers.mjs";

const KNOWN = { subject: "#3b8eea", class: "#e08a2e", loss: "#8d96a0" };
const OTHERS = ["#3fa45b", "#b565d9", "#d65a5a", "#2fa8a8", "#c2a21d"];
const ROOM = { left: 40, right: 8, top: 6, bottom: 18 };

/** The colour of a curve: fixed for known names, the next free one for others. */
export function colourOf(name, names) {
  return KNOWN[name] ?? OTHERS[names.filter((other) => !KNOWN[other]).indexOf(name) % OTHERS.length];
}

/** The curves to draw: if subject and class have curves of their own, their sum is left out. */
export function shownSeries(series) {
  const filled = [...series].filter(([, { points }]) => points.length);
  const names = filled.map(([name]) => name);
  const apart = names.includes("subject");
  return filled.filter(([name]) => !(apart && name === "loss"));
}

/**
 * Draw it.
 * @param context of the canvas, in which one unit is one CSS pixel
 * @param size {width, height} in CSS pixels
 * @param run series (name -> {points}), steps, saved (steps), step under the pointer or null, picked (a step) or null,
 *   exact: whether curves are not smoothed
 * @param colours {text, faint, grid} as CSS
 */
export function drawChart(context, size, run, colours) {
  context.clearRect(0, 0, size.width, size.height);
  const curves = shownSeries(run.series).map(([name, { points }], _, all) => ({
    name, points, smoothed: run.exact ? points : smooth(points, smoothingRadius(points.length)),
    colour: colourOf(name, all.map(([other]) => other)),
  }));
  const last = Math.max(1, run.steps || 0, ...curves.map(({ points }) => points.at(-1)[0]));
  const [low, high] = valueRange(curves.map(({ points }) => points), curves.map(({ smoothed }) => smoothed));
  const [right, bottom] = [size.width - ROOM.right, size.height - ROOM.bottom];
  const x = scale(0, last, ROOM.left, right);
  const y = scale(low, high, bottom, ROOM.top);
  axes(context, { x, y, low, high, last, right, bottom }, colours);
  context.save();
  context.beginPath();
  context.rect(ROOM.left, 0, right - ROOM.left + 1, bottom);
  context.clip();
  for (const curve of curves) line(context, curve.points, x, y, curve.colour, 1, 0.35);
  for (const curve of curves) line(context, curve.smoothed, x, y, curve.colour, 2, 1);
  context.restore();
  for (const step of run.saved) mark(context, x(step), bottom, step === run.picked ? colours.text : colours.faint);
  if (run.pointed !== null && run.pointed !== undefined) {
    reading(context, curves, run.pointed, { x, y, right, bottom }, colours);
  }
}

/** The step at a position on the chart, in CSS pixels from its left edge. */
export function stepAt(left, width, run) {
  const points = [...run.series.values()].map((series) => series.points.at(-1)?.[0] ?? 0);
  const last = Math.max(1, run.steps || 0, ...points);
  return Math.min(last, Math.max(0, scale(ROOM.left, width - ROOM.right, 0, last)(left)));
}

function axes(context, { x, y, low, high, last, right, bottom }, colours) {
  context.font = "10px sans-serif";
  context.lineWidth = 1;
  context.textBaseline = "middle";
  context.textAlign = "right";
  for (const value of ticks(low, high, 4)) {
    const at = Math.round(y(value)) + 0.5;
    context.strokeStyle = colours.grid;
    context.beginPath();
    context.moveTo(ROOM.left, at);
    context.lineTo(right, at);
    context.stroke();
    context.fillStyle = colours.faint;
    context.fillText(shortNumber(value), ROOM.left - 5, at);
  }
  context.textBaseline = "alphabetic";
  const marks = ticks(0, last, 5).filter((step) => Number.isInteger(step));
  for (const step of marks) {
    context.textAlign = step === 0 ? "left" : x(step) > right - 14 ? "right" : "center";
    context.fillText(String(step), x(step), bottom + 14);
  }
}

function shortNumber(value) {
  return String(Number(value.toPrecision(3)));
}

function line(context, points, x, y, colour, width, alpha) {
  context.strokeStyle = colour;
  context.globalAlpha = alpha;
  context.lineWidth = width;
  context.lineJoin = "round";
  context.beginPath();
  points.forEach(([step, value], at) => (at ? context.lineTo(x(step), y(value)) : context.moveTo(x(step), y(value))));
  if (points.length === 1) context.arc(x(points[0][0]), y(points[0][1]), 1.5, 0, 7);
  context.stroke();
  context.globalAlpha = 1;
}

function mark(context, x, bottom, colour) {
  context.fillStyle = colour;
  context.beginPath();
  context.moveTo(x, bottom - 6);
  context.lineTo(x + 4, bottom);
  context.lineTo(x - 4, bottom);
  context.fill();
}

function reading(context, curves, step, { x, y, right, bottom }, colours) {
  const found = curves.map((curve) => ({ ...curve, at: nearest(curve.smoothed, step) })).filter(({ at }) => at);
  if (!found.length) return;
  const place = x(found[0].at[0]);
  context.strokeStyle = colours.faint;
  context.lineWidth = 1;
  context.beginPath();
  context.moveTo(place, ROOM.top);
  context.lineTo(place, bottom);
  context.stroke();
  const texts = [String(Math.round(found[0].at[0])), ...found.map(({ at }) => at[1].toFixed(4))];
  const inks = [colours.text, ...found.map(({ colour }) => colour)];
  context.font = "10px sans-serif";
  const width = Math.max(...texts.map((text) => context.measureText(text).width)) + 8;
  const left = place + width + 6 > right ? place - width - 4 : place + 4;
  context.fillStyle = colours.back;
  context.globalAlpha = 0.85;
  context.fillRect(left, ROOM.top, width, texts.length * 13 + 4);
  context.globalAlpha = 1;
  context.textAlign = "left";
  context.textBaseline = "top";
  texts.forEach((text, at) => {
    context.fillStyle = inks[at];
    context.fillText(text, left + 4, ROOM.top + 3 + at * 13);
  });
  for (const { at, colour } of found) {
    context.fillStyle = colour;
    context.beginPath();
    context.arc(x(at[0]), y(at[1]), 3, 0, 7);
    context.fill();
  }
}
