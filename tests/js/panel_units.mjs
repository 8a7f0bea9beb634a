// Unit tests of the training panel's pure functions. test_panel_units.py runs them in Chromium, `node` by hand:
//   node -e 'import("./tests/js/panel_units.mjs").then(({ run }) => console.log(run()))'
import { estimateText, roughTime } from "../../js/lib/estimate.mjs";
import { baseOf, upstreamOf } from "../../js/lib/gallery_graph.mjs";
import { GalleryDetails } from "../../js/lib/gallery_details.mjs";
import { GalleryList } from "../../js/lib/gallery_list.mjs";
import { TABLES, galleryWords } from "../../js/lib/gallery_words.mjs";
import { keyOf, nodeAt, nodeOf, noteLoaded, pathOf } from "../../js/lib/node_path.mjs";
import { colourOf, shownSeries, stepAt } from "../../js/lib/loss_chart.mjs";
import {
  Series, halved, nearest, readableBytes, readableSeconds, readableTime, scale, smooth, smoothingRadius, ticks, valueRange,
} from "../../js/lib/numbers.mjs";
import { merged, moved } from "../../js/lib/photos.mjs";
import { RunNotices, askOnce, canAsk } from "../../js/lib/notify.mjs";
import { StatusLines } from "../../js/lib/status_lines.mjs";
import { ownId } from "../../js/lib/template_ids.mjs";
import { TrainState } from "../../js/lib/train_state.mjs";
import { TrainView } from "../../js/lib/train_view.mjs";
import { wordsOf } from "../../js/lib/train_words.mjs";
import { isOnPanel, isRepeated } from "../../js/lib/reports.mjs";
import { warningIn } from "../../js/lib/warnings.mjs";
import { speak } from "../../js/lib/words.mjs";

function same(found, expected, what = "") {
  const [one, two] = [JSON.stringify(found), JSON.stringify(expected)];
  if (one !== two) throw new Error(`${what} found ${one}, expected ${two}`);
}

function near(found, expected, what = "") {
  if (!(Math.abs(found - expected) < 1e-9)) throw new Error(`${what} found ${found}, expected ${expected}`);
}

const message = (step, more = {}) => ({
  node: "11", run: "r", state: "training", step, steps: 10_000, seconds: 0.5, eta: 9, ...more,
});

/** A page of a browser with notifications. */
function pageWith(permission, hidden) {
  const shown = [];
  const stored = {};
  class Notification {
    static permission = permission;
    static asked = 0;
    static async requestPermission() { Notification.asked += 1; Notification.permission = "granted"; }
    constructor(title, { body, tag }) { shown.push([title, body, tag]); }
  }
  const localStorage = { getItem: (key) => stored[key] ?? null, setItem: (key, value) => { stored[key] = value; } };
  return { Notification, document: { hidden }, localStorage, shown };
}

const tests = {
  "an estimate names its run, and warns if it will not fit"() {
    const found = { known: true, seconds: 754, step: 0.42, trigger: "ohwx dog", scaled: false };
    const words = wordsOf("en");
    same(estimateText(found, words), ["About 13 min: 0.420 s/step, as for “ohwx dog”", false]);
    same(estimateText({ ...found, scaled: true, needed: 6 * 2 ** 30, free: 8 * 2 ** 30, fits: true }, words),
      ["About 13 min: 0.420 s/step, estimated from “ohwx dog” · about 6.0 GB, 8.0 GB free", false]);
    const [text, isWarning] = estimateText({ ...found, needed: 9 * 2 ** 30, free: 2 ** 33, fits: false }, words);
    same([text.startsWith("Will probably not fit: about 9.0 GB needed, 8.0 GB free."), isWarning], [true, true]);
    const [slower] = estimateText({ ...found, needed: 9 * 2 ** 30, free: 2 ** 33, fits: false, offloads: true }, words);
    same(slower.endsWith("part of the model stays in system memory, which is slower"), true);
    same(estimateText({ known: false }, words), [words.estimateUnknown, false]);
    same([5, 89, 90, 5400, 3600 * 30].map(roughTime), ["5 s", "89 s", "2 min", "1 h 30 min", "30 h 0 min"]);
    speak("ru");
    const russian = estimateText({ ...found, needed: 6 * 2 ** 30, free: 8 * 2 ** 30, fits: true }, wordsOf("ru"));
    const hours = roughTime(6000);
    speak("en");
    same([russian[0], hours],
      ["Около 13 мин: 0.420 с/шаг, как у «ohwx dog» · около 6.0 ГБ, свободно 8.0 ГБ", "1 ч 40 мин"]);
    const prompt = { 1: { inputs: {} }, 2: { inputs: { model: ["1", 0], text: "a" } }, 3: { inputs: { x: ["2", 0] } } };
    same(Object.keys(upstreamOf(prompt, "2")), ["1", "2"]);
  },
  async "a notification is asked for once, and not where there are none"() {
    const page = pageWith("default", true);
    same(canAsk(page), true);
    await askOnce(page);
    page.Notification.permission = "default"; // dismissed
    same([canAsk(page), page.Notification.asked], [false, 1]);
    same([canAsk(pageWith("denied", true)), canAsk(pageWith("granted", true)), canAsk({ })], [false, false, false]);
  },
  "a training that ends in a hidden tab is notified, once; one that is seen, reused or cancelled is not"() {
    const name = "ohwx_dog_0123456789ab";
    const at = (state, more = {}) => message(4, { run: name, state, steps: 4, series: {}, ...more });
    const told = (permission, hidden, messages) => {
      const page = pageWith(permission, hidden);
      const notices = new RunNotices(wordsOf("en"), page);
      for (const one of messages) notices.take(one);
      return page.shown;
    };
    const trained = at("training", { series: { loss: [[1, 0.5]] } });
    const end = at("finished", { result: { trigger: "ohwx dog" } });
    same(told("granted", true, [trained, end, end]), [["ohwx dog: Finished", "step 4 / 4", name]]);
    same(told("granted", true, [trained, at("failed")])[0][0], "ohwx dog: Failed; the steps so far are saved");
    same(told("granted", true, [trained, at("failed", { step: 0 })])[0][0], "ohwx dog: Failed");
    same(told("granted", true, [at("training"), end]), [], "reused");
    same(told("granted", true, [trained, at("cancelled")]), []);
    same(told("granted", false, [trained, end]), [], "seen");
    same(told("default", true, [trained, end]), [], "not allowed");
  },
  "the gallery has every text in both languages, with the same values"() {
    same(Object.keys(TABLES.ru), Object.keys(TABLES.en));
    const values = (text) => (text.match(/\{\w+\}/g) ?? []).sort();
    for (const name of Object.keys(TABLES.en)) {
      same(values(TABLES.ru[name]), values(TABLES.en[name]), name);
      if (!/[а-яё]/i.test(TABLES.ru[name])) throw new Error(`${name} is not translated`);
    }
    same(galleryWords("en")("stepOf", { step: 2, steps: 4 }), "step 2 of 4");
  },
  "a run is listed under its file, and says what it was trained with"() {
    if (typeof document === "undefined") return; // run by node
    const one = { run: "ohwx_dog_0123456789ab", trigger: "ohwx dog", lora: "pets/rex.safetensors", step: 8, steps: 20, why: "stopped",
      base: "sd_v1", file: "x.safetensors", size: 2 ** 22, changed: 5, resolution: 512, rank: 16, learning_rate: 0.0001, preservation: "curvature" };
    const bare = { ...one, run: "ohwx_dog_000000000000", lora: "", learning_rate: 0, preservation: "" };
    const t = galleryWords("en");
    const actions = { thumbnail: () => "", date: () => "today", viewAddress: () => "" };
    const list = new GalleryList(t, actions);
    list.show([one, bare, { ...bare, trigger: "" }], 1);
    same([...list.element.querySelectorAll(".sbg-words")].map(({ textContent }) => textContent),
      ["pets/rex", "ohwx dog", "ohwx_dog_000000000000"]);
    same([...list.element.querySelectorAll(".sbg-faint.sbg-small")].map(({ textContent }) => textContent),
      ["ohwx dog · x.safetensors · 4.0 MB · today", "x.safetensors · 4.0 MB · today", "x.safetensors · 4.0 MB · today"]);
    const facts = (run) => [...new GalleryDetails(run, t, actions, false).element.querySelectorAll("dd")].map(({ textContent }) => textContent);
    same(facts(one).includes("512 px, rank 16, learning rate 0.0001, preservation curvature"), true, facts(one));
    same(facts(bare).includes("512 px, rank 16"), true, facts(bare));
  },
  "the base is what the trainer's three inputs hang on, or a loader's"() {
    const loader = { class_type: "CheckpointLoaderSimple", inputs: { ckpt_name: "a.safetensors" } };
    const style = { class_type: "LoraLoader", inputs: { model: ["1", 0], clip: ["1", 1] } };
    const trainer = { class_type: "DreamBoothLoRATrain", inputs: { model: ["2", 0], clip: ["2", 1], vae: ["1", 2] } };
    const decode = { class_type: "VAEDecode", inputs: { vae: ["1", 2], samples: ["6", 0] } };
    const apply = { class_type: "ApplySubjectLoRA", inputs: { model: ["1", 0], clip: ["1", 1], subject_lora: ["11", 0] } };
    const found = baseOf({ 1: loader, 2: style, 6: decode, 11: trainer, 12: apply });
    same(Object.keys(found.nodes), ["1", "2"]);
    same([found.model, found.clip, found.vae], [["2", 0], ["2", 1], ["1", 2]]);
    same(baseOf({ 1: loader, 6: decode, 12: apply }).vae, ["1", 2]);
    same(baseOf({ 5: loader }).clip, ["5", 1]);
    same(baseOf({ 11: trainer }), null, "its loader is missing");
    same(baseOf({}), null);
  },
  "smoothing keeps steps, a constant and a line"() {
    const flat = [...Array(50)].map((_, step) => [step, 3]);
    same(smooth(flat, 5), flat);
    const rising = smooth([...Array(50)].map((_, step) => [step, step]), 4);
    near(rising[25][1], 25);
    same(rising.length, 50);
    same(smooth([], 3), []);
    same(smooth([[7, 2]], 3), [[7, 2]]);
  },
  "smoothing takes the noise out and no point from outside its window"() {
    const noisy = [...Array(200)].map((_, step) => [step, step % 2]);
    for (const [step, value] of smooth(noisy, 10).slice(10, -10)) {
      if (Math.abs(value - 0.5) > 0.05) throw new Error(`${value} at ${step}`);
    }
    const jump = smooth([...Array(100)].map((_, step) => [step, step < 50 ? 0 : 1]), 5);
    same([jump[40][1], jump[60][1]], [0, 1]);
    const end = smooth([...Array(20), 9].map((value, step) => [step, value ?? 0]), 8).at(-1)[1];
    if (end > 9 / 4) throw new Error(`a single last jump of 9 shows as ${end}`);
  },
  "a radius is a twentieth and at least two"() {
    same([0, 10, 100, 2000].map(smoothingRadius), [2, 2, 5, 100]);
  },
  "halving keeps the mean of the steps and of the values"() {
    same(halved([[1, 1], [2, 3], [3, 5], [4, 7]]), [[1.5, 2], [3.5, 6]]);
    same(halved([[1, 1], [2, 3], [3, 5]]), [[1.5, 2], [3, 5]]);
  },
  "a series is bounded, whole in its range and true in its mean"() {
    const series = new Series(100);
    for (let step = 1; step <= 10_000; step += 1) series.add([[step, step]]);
    if (series.points.length > 100 || series.points.length < 40) throw new Error(`${series.points.length} points`);
    for (const [step, value] of series.points) near(value, step);
    same(series.points.at(-1)[0] > 9_800, true, "the end");
    same(series.points.every(([step], at) => !at || step > series.points[at - 1][0]), true, "the order");
  },
  "a series takes no point twice and no nonsense"() {
    const series = new Series();
    series.add([[1, 0.5], [2, 0.4], [2, 9], [1, 9], [3, NaN], [4, null], [5, 0.3]]);
    same(series.points, [[1, 0.5], [2, 0.4], [5, 0.3]]);
    series.cut(2);
    same([series.points, series.last], [[[1, 0.5], [2, 0.4]], 0.4]);
  },
  "ticks are round and inside"() {
    same(ticks(0, 100, 5), [0, 20, 40, 60, 80, 100]);
    same(ticks(0.013, 0.047, 4), [0.02, 0.03, 0.04]);
    same(ticks(-1, 1, 4), [-1, -0.5, 0, 0.5, 1]);
    same(ticks(3, 3, 4), [3]);
    same(ticks(0, 1, 5).at(-1), 1);
  },
  "the range shows every smoothed point and leaves single peaks out"() {
    const raw = [...Array(200)].map((_, step) => [step, 0.1 + 0.001 * (step % 10)]);
    raw[77] = [77, 50];
    const [low, high] = valueRange([raw], [[[0, 0.4]]]);
    same([low <= 0.1, low >= 0, high >= 0.4, high < 1], [true, true, true, true], `${low} ${high}`);
    same(valueRange([], []), [0, 1]);
    const [below, above] = valueRange([[[1, 2], [2, 2]]], []);
    same(below < 2 && above > 2, true);
  },
  "scales go both ways and survive an empty range"() {
    near(scale(0, 10, 100, 200)(5), 150);
    near(scale(0, 10, 200, 100)(10), 100);
    near(scale(3, 3, 7, 9)(3), 7);
  },
  "the nearest point"() {
    const points = [[1, 0], [5, 1], [9, 2]];
    same([0, 2.9, 3.1, 7.1, 99].map((step) => nearest(points, step)[0]), [1, 1, 5, 9, 9]);
    same(nearest([], 3), null);
  },
  "times, seconds and bytes as people read them"() {
    same([0, 5, 65, 3661, 59.6, null, undefined, NaN].map(readableTime),
      ["0:00", "0:05", "1:05", "1:01:01", "1:00", "–", "–", "–"]);
    same([0.0421, 1.25, 12.34, 123.4, NaN].map(readableSeconds), ["0.042", "1.25", "12.3", "123", "–"]);
    same([0, 812, 1536, 3.3 * 2 ** 20, 12 * 2 ** 30, NaN].map(readableBytes),
      ["0 B", "812 B", "1.5 KB", "3.3 MB", "12.0 GB", "–"]);
  },
  "paths lead into subgraphs and back"() {
    const graph = (nodes) => {
      const made = { nodes, getNodeById: (id) => nodes.find((node) => node.id === id) ?? null };
      for (const node of nodes) node.graph = made;
      return made;
    };
    const [deep, beside] = [{ id: 3 }, { id: 3 }];
    const root = graph([beside, { id: 12, subgraph: graph([{ id: 5, subgraph: graph([deep]) }]) }]);
    same([nodeAt(root, "12:5:3") === deep, nodeAt(root, "3") === beside], [true, true]);
    same([nodeAt(root, "12:9:3"), nodeAt(root, "3:3"), nodeAt(root, ""), nodeAt(null, "3")], [null, null, null, null]);
    same([pathOf(root, deep), pathOf(root, beside), pathOf(root, { id: 3 })], ["12:5:3", "3", null]);
  },
  "a workflow without an id of its own has no key to remember a run by"() {
    const root = { nodes: [] };
    const node = { id: 11, graph: root };
    const keyIn = (id) => keyOf(Object.assign(root, { id }), node);
    same([undefined, "00000000-0000-0000-0000-000000000000", "a-b"].map(keyIn), [null, null, "a-b/11"]);
    same(keyOf(root, { id: 11 }), null);
  },
  "a message of another workflow is not for the node of the same number"() {
    const node = { id: 5 };
    const root = { id: "a-b", getNodeById: (id) => (id === 5 ? node : undefined) };
    const found = (id, workflow) => nodeOf({ ...root, id }, { node: "5", workflow }) === node;
    same([found("a-b", "a-b"), found("a-b", "c-d"), found("a-b", ""), found("a-b", undefined)], [true, false, true, true]);
    same([found(undefined, "c-d"), found("00000000-0000-0000-0000-000000000000", "c-d")], [true, true]);
  },
  "a template is given an id of its own whenever it is opened, and no other workflow"() {
    const shipped = "45c38f60-2070-5d4f-a4c4-90b80a5fb946";
    const ids = [1, 2].map(() => {
      const workflow = { id: shipped, nodes: [] };
      ownId(workflow);
      return workflow.id;
    });
    same(ids.map((id) => /^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/.test(id)), [true, true]);
    same(ids[0] === ids[1], false);
    const own = { id: ids[0] };
    ownId(own);
    same(own.id, ids[0]);
    for (const workflow of [{}, { id: undefined }, null, undefined]) ownId(workflow);
  },
  "a workflow that was given its id by the editor still hears of what it queued without one"() {
    const kept = new Map();
    const storage = { getItem: (key) => kept.get(key) ?? null, setItem: (key, value) => kept.set(key, value) };
    const node = { id: 5 };
    const [noId, getNodeById] = ["00000000-0000-0000-0000-000000000000", () => node];
    const found = (id, workflow) => nodeOf({ id, getNodeById }, { node: "5", workflow }, storage) === node;
    noteLoaded("own", { id: "own" }, storage);
    noteLoaded(undefined, { id: noId }, storage);
    same([found("own", noId), found("new", noId)], [false, false]);
    noteLoaded(noId, { id: "new" }, storage);
    noteLoaded(undefined, { id: "newer" }, storage);
    same([found("new", noId), found("newer", noId), found("new", "newer"), found("own", noId)], [true, true, false, false]);
    for (let count = 0; count < 60; count += 1) noteLoaded(undefined, { id: `other ${count}` }, storage);
    same([found("new", noId), found("other 59", noId), [...kept.values()][0].length < 1000], [false, true, true]);
    kept.set([...kept.keys()][0], "{");
    same(found("other 59", noId), false);
  },
  "a run is filled by messages, within bounds over 10,000 of them"() {
    const state = new TrainState("r");
    state.take(message(0, { chosen: { precision: "fp32" }, notes: ["one"], seconds: undefined }));
    for (let step = 1; step <= 10_000; step += 1) {
      state.take(message(step, {
        series: { loss: [[step, 0.3]], subject: [[step, 0.2]], class: [[step, 0.1]], drift: [[step, 0.5]] }, note: "n",
        validations: [{ step, prompts: ["p"], images: [{ filename: `${step}.png` }] }], saved: [step],
      }));
    }
    same([...state.series.keys()], ["loss", "subject", "class", "drift"]);
    same([...state.series.values()].every(({ points }) => points.length <= 2000), true);
    same([state.validations.length <= 400, state.validations.at(-1).step], [true, 10_000]);
    same([state.saved.length <= 1000, state.saved.at(-1)], [true, 10_000]);
    same([state.notes.length, state.step, state.steps, state.atWork, state.kept], [20, 10_000, 10_000, true, false]);
    near(state.seconds, 0.5);
    same(JSON.stringify(state).length < 600_000, true);
  },
  "the page holds as much after 10,000 messages as after the first"() {
    if (typeof document === "undefined") return; // run by node
    const state = new TrainState("r");
    const view = new TrainView(wordsOf("en"), { viewAddress: ({ filename }) => `data:,${filename}`, sharpness: () => 1 });
    const counts = [];
    for (let step = 1; step <= 10_000; step += 1) {
      state.take(message(step, {
        series: { loss: [[step, 0.3]], subject: [[step, 0.2]], class: [[step, 0.1]] }, note: "n", saved: [step],
        validations: [{ step, prompts: ["p", "q"], images: [{ filename: `${step}a` }, { filename: `${step}b` }] }],
      }));
      view.show(state);
      if (step === 10 || step === 10_000) counts.push(view.element.querySelectorAll("*").length);
    }
    same(counts[0], counts[1], "elements");
    same([...view.element.querySelectorAll("img")].map(({ src }) => src), ["data:,10000a", "data:,10000b"]);
    view.remove();
  },
  "pictures drawn anew under their names are shown, and the same ones stay"() {
    if (typeof document === "undefined") return; // run by node
    const view = new TrainView(wordsOf("en"), {
      viewAddress: (image) => `data:,${new URLSearchParams(image)}`, sharpness: () => 1,
    });
    const state = new TrainState("r");
    const drawn = (step, v, prompt) => ({ step, prompts: [prompt], images: [{ filename: `${step}.png`, v }] });
    const shown = () => [...view.element.querySelectorAll("img")];
    const told = (...validations) => {
      state.take(message(9, { validations }));
      view.show(state);
      return shown().map(({ src, title }) => [src, title]);
    };
    same(told(drawn(5, "1", "a dog")), [["data:,filename=5.png&v=1", "a dog"]]);
    const [first] = shown();
    told(drawn(5, "1", "a dog"));
    same(shown()[0] === first, true, "the same picture");
    same(told(drawn(5, "2", "a cat")), [["data:,filename=5.png&v=2", "a cat"]]);
    told(drawn(7, "3", "a cat"));
    [...view.element.querySelectorAll("button")].find(({ textContent }) => textContent === "Compare").click();
    same(shown().map(({ src }) => src), ["data:,filename=7.png&v=3", "data:,filename=5.png&v=2"], "not 7 next to itself");
    told(drawn(8, "4", "a cat"));
    same(told(drawn(7, "5", "a cow")), [["data:,filename=7.png&v=5", "a cow"], ["data:,filename=8.png&v=4", "a cat"]]);
    const slider = view.element.querySelector("input[type=range]");
    slider.value = "1"; // step 7, which is held
    slider.dispatchEvent(new Event("input"));
    same(shown().map(({ src }) => src), ["data:,filename=7.png&v=5", "data:,filename=5.png&v=2"], "the held one is passed over");
    state.take(message(0, { chosen: { precision: "fp32" } }));
    view.show(state);
    same(shown().length, 0, "a run that starts again");
    view.remove();
  },
  "any step whose LoRA is kept can be used, and the run's own choice be taken again"() {
    if (typeof document === "undefined") return; // run by node
    const used = [];
    const view = new TrainView(wordsOf("en"), {
      viewAddress: () => "data:,", sharpness: () => 1, use: (step) => used.push(step),
    });
    const button = (text) => [...view.element.querySelectorAll("button")].find(({ textContent }) => textContent === text);
    const line = () => view.element.querySelector(".sbt-use");
    const to = (at) => {
      const slider = view.element.querySelector("input[type=range]");
      slider.value = String(at);
      slider.dispatchEvent(new Event("input"));
    };
    const state = new TrainState("r");
    const validations = [2, 4, 5].map((step) => ({ step, prompts: ["p"], images: [{ filename: `${step}` }] }));
    state.take(message(5, { steps: 5, saved: [2, 5], validations }));
    view.show(state);
    same(line().hidden, true, "in training");
    const result = { run: "r", step: 5, steps: 5, why: "last", lora: "x", size: 1, matched: 1, layers: 1, trigger: "t" };
    state.done(result);
    view.show(state);
    same(line().querySelector("span").textContent, "In use: step 5 (last)");
    same([button("Use this step").hidden, button("Back to the run's own choice").hidden], [true, true]);
    to(1);
    same([button("Use this step").disabled, button("Use this step").title],
      [true, "The LoRA of this step was not kept"]);
    to(0);
    same([button("Use this step").hidden, button("Use this step").disabled], [false, false]);
    button("Use this step").click();
    state.done({ ...result, step: 2, why: "chosen" });
    view.show(state);
    same(line().querySelector("span").textContent, "In use: step 2 (chosen by you)");
    same([state.step, state.state, state.validations.length, state.saved], [5, "finished", 3, [2, 5]], "nothing is cut");
    button("Back to the run's own choice").click();
    same(used, [2, 0]);
    // After a reload, of a run that was cancelled.
    const read = new TrainState("s");
    read.fill({ step: 4, steps: 9, series: {}, validations, saved: [2, 4], notes: [], chosen: {}, active: null, kept: null,
      result: { ...result, step: 2, steps: 9, why: "chosen" } });
    view.show(read);
    same(view.element.querySelector("[role=status]").textContent, "Not finished; one of its steps is in use");
    same(button("Back to the run's own choice").hidden, false);
    view.remove();
  },
  "what nodes report is Russian in Russian, without losing a number"() {
    const reports = [
      "reading the base model", "writing 466 MB, once, to models/checkpoints/subjectbooth",
      "studying what the model knows  12/64", "training on cuda:0 in bf16; 5.1 GB",
      "step 26/60  loss 0.0648 (subject 0.0581, class 0.0067)  2.40 s/step  ETA 2:29", "step 3/60  loss 0.0648  2.40 s/step  ETA 2:29",
      "step 20/60  drawing 3/8", "the class after training: picture 1 of 4, step 5/20",
      "trained: my_dog.safetensors, 4.6 MB, step 290, matched 99/99, use “ohwx dog” in prompts",
      "reused (trained before): my_dog.safetensors, 4.6 MB, step 150 of 290 (best: .71), matched 99/99, use “ohwx dog” in prompts",
      "trained: a.safetensors, 4.6 MB, step 12 of 290 (stopped and kept), matched 9/9, use “ohwx dog” in prompts",
      "class drift 0.05 (0: unchanged, 1: another random picture)", "as usual for Z-Image: learning_rate 0.0001, rank 32",
      "no validation images of step 5, 10 for these prompts and settings; force_retrain creates them",
      '4 class images ready (0 new), "a photo of a dog"', "466 MB written to models/checkpoints/subjectbooth", "applied: all 99 layers", "not applied: the strength is 0",
    ];
    for (const text of reports) {
      const russian = warningIn("ru", text);
      same([/[а-яё]/.test(russian), /[<>]|undefined| of \d|\b(step|images|drawing|matched)\b/.test(russian)], [true, false], russian);
      same(warningIn("en", text), text);
    }
    const [, , , , , , , , trained, , , drift, , , ready] = reports;
    same([isOnPanel("DreamBoothLoRATrain", `${trained}\n${drift}`), isOnPanel("GenerateClassPriors", ready)], [true, true]);
    same(isOnPanel("DreamBoothLoRATrain", `${trained}\nNothing else says this.`), false);
    same(isOnPanel("DreamBoothLoRATrain", trained.replace("trained", "trained, but nothing was learned")), false);
    same([isOnPanel("DreamBoothLoRATrain", reports[4]), isOnPanel("ApplySubjectLoRA", ready)], [false, false]);
    same(reports.filter((text) => isRepeated("DreamBoothLoRATrain", text)), reports.slice(2, 7));
    same(isRepeated("GenerateClassPriors", reports[4]), false);
    same(warningIn("ru", reports[4]), "шаг 26/60, потери 0.0648, 2.40 с/шаг, осталось 2:29");
    same(warningIn("ru", reports[10]),
      "обучено: a.safetensors, 4.6 МБ, шаг 12 из 290 (остановлено и сохранено), совпало 9/9, в промптах пишите «ohwx dog»");
  },
  async "nothing on the panel is cut off, in both languages and in the narrower renderer"() {
    const style = Object.assign(document.createElement("link"), { rel: "stylesheet", href: "/js/lib/train_panel.css" });
    await new Promise((resolve) => { style.onload = resolve; document.head.append(style); });
    const found = { known: true, seconds: 754, step: 0.42, trigger: "ohwx toy car", scaled: true };
    const large = { ...found, needed: 9.5 * 2 ** 30, free: 2 ** 33, fits: false };
    const more = { series: { loss: [[1, 0.5], [2, 0.4]] }, steps: 2000, eta: 7000, memory: { used: 2 ** 34 } };
    const result = { run: "r", step: 1000, steps: 2000, why: "stopped", lora: "my_subject.safetensors", size: 2 ** 22,
      matched: 99, layers: 99, trigger: "ohwx toy car" };
    for (const locale of ["en", "ru"]) {
      speak(locale);
      const words = wordsOf(locale);
      const view = new TrainView(words, { viewAddress: () => "", sharpness: () => 1 });
      document.body.append(view.element);
      view.element.style.width = "290px"; // of the templates' node in Nodes 2.0
      const check = (what) => {
        view.element.style.height = `${view.height}px`;
        const { right } = view.element.getBoundingClientRect();
        const shown = [...view.element.querySelectorAll("*")].filter((e) => e.offsetWidth && e.tagName !== "CANVAS");
        same(shown.filter((e) => !e.children.length && e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== "inline"
          || e.getBoundingClientRect().right > right).map((e) => e.textContent), [], `${locale}, ${what}`);
        same([view.element.scrollHeight <= view.element.clientHeight], [true], `${locale}, ${what}, height`);
      };
      for (const told of [found, large, { ...large, offloads: true }, { known: false }]) {
        view.showEstimate(...estimateText(told, words));
        const line = view.element.querySelector(".sbt-estimate");
        same(line.scrollHeight <= line.clientHeight, true, line.textContent);
        check("estimate");
      }
      const state = new TrainState("r");
      state.take(message(1000, more));
      view.show(state);
      check("in training");
      state.take(message(1000, { ...more, state: "kept" }));
      state.done(result);
      view.show(state);
      check("kept");
      for (const phase of ["studying", "drawing", "saving", "reusing", "using", "cancelled"]) {
        state.take(message(1000, { ...more, state: phase, part: [13, 64], used: 1500, chosen: { precision: "bf16", device: "cuda:0" } }));
        view.show(state);
        check(phase);
      }
      for (const error of ["CUDA out of memory.", `${"Tensors created in inference mode cannot be saved ".repeat(3).slice(0, 119)}…`]) {
        state.take(message(1000, { ...more, state: "failed", error }));
        view.show(state);
        check("failed");
        const line = view.element.querySelector(".sbt-error");
        same(line.scrollHeight <= line.clientHeight, true, `${locale}, ${error}`);
      }
      view.remove();
    }
    speak("en");
    style.remove();
  },
  async "scores have a chart of their own, which is there only with scores"() {
    const view = new TrainView(wordsOf("en"), { viewAddress: () => "", sharpness: () => 1 });
    document.body.append(view.element);
    const [losses, scores] = view.element.querySelectorAll(".sbt-chart");
    const state = new TrainState("r");
    state.take(message(1, { steps: 4, series: { subject: [[1, 0.5]] } }));
    view.show(state);
    same([losses.hidden, scores.hidden], [false, true]);
    const before = view.height;
    // Each message has all scores so far; a resumed run repeats those after its checkpoint.
    state.take(message(2, { scores: { subject: [[0, 0], [2, 0.6]], scenes: [[0, 1], [2, 0.9]] } }));
    state.take(message(4, { scores: { subject: [[0, 0], [2, 0.6], [4, 0.8]], scenes: [[0, 1], [2, 0.9], [4, 0.456]] } }));
    view.show(state);
    same(state.scores.get("scenes").points, [[0, 1], [2, 0.9], [4, 0.456]]);
    same([scores.hidden, view.height > before], [false, true]);
    same(scores.previousElementSibling.textContent, "subject 80 %scenes 46 %");
    same(scores.firstChild.getAttribute("aria-label"), "Scores: subject 80 %, scenes 46 %");
    await new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)));
    const { width, height } = scores.firstChild;
    const pixels = scores.firstChild.getContext("2d").getImageData(0, 0, width, height).data;
    same(pixels.some((value, at) => at % 4 === 2 && value > 200 && pixels[at - 2] < 80), true, "the subject's blue");
    state.take(message(2, { chosen: { precision: "fp32" } }));
    same(state.scores.get("scenes").points, [[0, 1], [2, 0.9]]);
    view.remove();
  },
  "a photo is moved to where it was dropped and no other is lost"() {
    const names = ["a", "b", "c", "d"];
    for (const from of names.keys()) {
      for (const to of names.keys()) {
        const order = moved(names, from, to);
        same(order[to], names[from], `${from} to ${to}`);
        same(order.filter((name) => name !== names[from]), names.filter((name) => name !== names[from]));
      }
    }
    for (const [from, to] of [[4, 0], [0, 4], [-1, 0], [0, -1], [NaN, 0], [0, NaN], [0.5, 1]]) {
      same(moved(names, from, to), names, `${from} to ${to}`);
    }
    same(names, ["a", "b", "c", "d"], "the list that was given");
  },
  "class images of 10,000 messages are bounded"() {
    let pictures = [];
    for (let n = 1; n <= 10_000; n += 1) pictures = merged(pictures, [{ hash: `h${n}`, filename: `${n}.png` }], 500);
    same([pictures.length, pictures.at(-1).hash], [500, "h10000"]);
  },
  "a run that starts again forgets what it makes anew"() {
    const state = new TrainState("r");
    for (const step of [1, 2, 3, 4]) state.take(message(step, { series: { subject: [[step, step]] } }));
    state.take(message(2, { chosen: { precision: "fp32" }, notes: [] }));
    same(state.series.get("subject").points, [[1, 1], [2, 2]]);
    state.take(message(3, { series: { subject: [[3, 9]] } }));
    same(state.series.get("subject").last, 9);
    state.take(message(3, { chosen: { precision: "fp32", pictures: "1" }, note: "less memory" }));
    same([state.series.get("subject").last, state.notes], [9, ["less memory"]], "a change in the middle cuts nothing");
  },
  "the log fills what came before the messages"() {
    const state = new TrainState("r");
    state.take(message(5, { series: { subject: [[5, 5]] }, saved: [5] }));
    state.fill({
      run: "r", step: 4, steps: 10, seconds: 0.25, series: { subject: [[1, 1], [2, 2], [3, 3], [4, 4]] }, saved: [2],
      validations: [{ step: 2, prompts: [], images: [] }], notes: [], chosen: {}, kept: null, result: null,
      active: { state: "training", step: 5, steps: 10, eta: 3 },
    });
    same(state.series.get("subject").points.map(([step]) => step), [1, 2, 3, 4, 5]);
    same([state.saved, state.validations.length, state.step, state.atWork], [[2, 5], 1, 5, true]);
  },
  "what is not at work is finished, kept or to be gone on with"() {
    const log = { step: 4, steps: 10, series: {}, validations: [], saved: [], notes: [], chosen: {}, active: null };
    const filled = (more) => {
      const state = new TrainState("r");
      state.fill({ ...log, kept: null, result: null, ...more });
      return state.state;
    };
    same(filled({}), "interrupted");
    same(filled({ kept: 4, result: { step: 4 } }), "kept");
    same(filled({ step: 10, result: { step: 10 } }), "finished");
    same(filled({ step: 0 }), "");
    const state = new TrainState("r");
    state.take(message(4));
    state.fill({ ...log, kept: null, result: null });
    same(state.state, "interrupted", "a run that nobody trains any more is not at work, whatever was heard last");
    state.done({ run: "r", step: 4, steps: 10, lora: "x" });
    same([state.kept, state.result.lora], [true, "x"]);
  },
  "a training that failed says so, also once its log is read, and names saved steps only if there are any"() {
    const log = { step: 4, steps: 10, series: {}, validations: [], saved: [], notes: [], chosen: {}, active: null, kept: null };
    const end = { state: "failed", step: 4, error: "CUDA out of memory." };
    for (const [locale, failed, saved] of [["en", "Failed", "Failed; the steps so far are saved"], ["ru", "Ошибка", "Ошибка; сделанные шаги сохранены"]]) {
      const words = wordsOf(locale);
      const lines = new StatusLines(words);
      const [status, error] = [lines.element.querySelector("[role=status]"), lines.element.querySelector(".sbt-error")];
      const shown = (run) => (lines.show(run), [status.textContent, error.hidden ? "" : error.textContent]);
      const state = new TrainState("r");
      state.take(message(4));
      same(shown(state), [words.training, ""]);
      state.take(message(4, end));
      same([...shown(state), state.atWork], [saved, "CUDA out of memory.", false]);
      state.fill({ ...log, ended: end }); // asked for before the end, answered after it
      same(shown(state), [saved, "CUDA out of memory."]);
      state.take(message(0, { ...end, step: 0 }));
      same(shown(state), [failed, "CUDA out of memory."]);
      state.take(message(0, { state: "cancelled" }));
      same(shown(state), [words.cancelled, ""]);
      state.take(message(4, { state: "cancelled" }));
      same(shown(state), [words.cancelledSaved, ""]);
      state.take(message(4, { state: "preparing", eta: undefined }));
      same([shown(state)[0], state.step, state.eta], [words.preparing, 4, null], "queued again");
      same(Object.values(words).includes(undefined), false);
    }
    same(Object.keys(wordsOf("ru")), Object.keys(wordsOf("en")));
  },
  "each phase has its own words and bar, and a stop only while there is something to stop"() {
    const view = new TrainView(wordsOf("en"), { viewAddress: () => "", sharpness: () => 1 });
    const [status, bar] = [view.element.querySelector("[role=status]"), view.element.querySelector(".sbt-bar > div")];
    const stop = [...view.element.querySelectorAll("button")].find(({ textContent }) => textContent === "Stop and keep");
    const state = new TrainState("r");
    const told = (name, step, more = {}) => {
      state.take(message(step, { steps: 200, state: name, ...more }));
      view.show(state);
      return [status.textContent, bar.style.width, !stop.closest("[hidden]")];
    };
    same(told("preparing", 50), ["Preparing photos and model …", "25%", true]);
    same(told("studying", 0, { part: [16, 64] }), ["Studying the model 16 / 64", "25%", true]);
    same(told("training", 100), ["Training", "50%", true]);
    same(told("drawing", 100, { part: [3, 8] }), ["Sampling validation images 3 / 8", "50%", true]);
    same(told("saving", 200), ["Trained; saving and checking the file …", "100%", false]);
    same(told("reusing", 200), ["Trained before; reading the result …", "100%", false]);
    same(told("using", 200, { used: 150 }), ["Using step 150, without training …", "100%", false]);
    same(view.element.querySelector(".sbt-numbers:not(.sbt-count)").textContent.includes("left"), false);
    same(told("finished", 200), ["Finished", "100%", false]);
    view.remove();
  },
  "a result found again shows its own steps, not those that its folder got later"() {
    const state = new TrainState("r");
    const points = [[100, 0.3], [300, 0.2], [400, 0.1]];
    const validations = [100, 300, 400].map((step) => ({ step, images: [] }));
    state.fill({ run: "r", step: 400, steps: 400, series: { loss: points }, saved: [150, 300, 400], validations });
    state.done({ run: "r", step: 300, steps: 300, lora: "x" });
    same(state.series.get("loss").points, points.slice(0, 2));
    same(state.validations.map(({ step }) => step), [100, 300]);
    same([state.saved, state.step, state.steps, state.state], [[150, 300], 300, 300, "finished"]);
    same(state.result.lora, "x");
  },
  "curves are drawn by what they are called, new ones in colours of their own"() {
    const series = new Map([["loss", { points: [[1, 1]] }], ["subject", { points: [[1, 1]] }], ["class", { points: [] }],
      ["drift", { points: [[1, 1]] }], ["score", { points: [[1, 1]] }]]);
    const names = shownSeries(series).map(([name]) => name);
    same(names, ["subject", "drift", "score"]);
    same(new Set(names.map((name) => colourOf(name, names))).size, 3);
    same(shownSeries(new Map([["loss", { points: [[1, 1]] }]])).length, 1);
    same(stepAt(0, 300, { series, steps: 100 }), 0);
    same(stepAt(300, 300, { series, steps: 100 }), 100);
  },
  "both languages say the same things"() {
    same(Object.keys(wordsOf("ru")), Object.keys(wordsOf("en")));
    same(wordsOf("ru-RU").stop !== wordsOf("fr").stop, true);
    same(wordsOf(undefined), wordsOf("en"));
  },
};

/** Name of each test, and what it found wrong (null: nothing). */
export async function run() {
  const found = [];
  for (const [name, test] of Object.entries(tests)) {
    try {
      await test();
      found.push([name, null]);
    } catch (error) {
      found.push([name, String(error.stack ?? error)]);
    }
  }
  return found;
}
