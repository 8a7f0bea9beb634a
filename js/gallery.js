// The gallery: a tab of the sidebar with every run of this machine. It only shows what the server reads from the runs'
// folders, and asks it to act; no run depends on it.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { GalleryDetails } from "./lib/gallery_details.mjs";
import { baseOf, sendTo, trainerOf, useStep } from "./lib/gallery_graph.mjs";
import { GalleryList } from "./lib/gallery_list.mjs";
import { galleryWords } from "./lib/gallery_words.mjs";
import { readableBytes } from "./lib/numbers.mjs";
import { ask, make } from "./lib/panel.mjs";

const ID = "subjectbooth-gallery";

class Gallery {
  constructor(locale) {
    this.t = galleryWords(locale);
    const dates = new Intl.DateTimeFormat(locale, { dateStyle: "medium", timeStyle: "short" });
    this.date = (seconds) => (seconds ? dates.format(new Date(1000 * seconds)) : "");
    this.list = new GalleryList(this.t, {
      refresh: () => this.load(),
      open: (run) => this.open(run),
      thumbnail: ({ run, thumbnail }) =>
        (thumbnail ? api.apiURL(`/subjectbooth/runs/${encodeURIComponent(run)}/thumbnail?v=${thumbnail}`) : ""),
      date: this.date,
    });
    this.details = null;
    this.data = { runs: [], size: 0, opens: false, folder: "" };
    this.status = make("div", { className: "sbg-note" });
    this.status.setAttribute("role", "status");
    this.element = make("section", { className: "subjectbooth-gallery" }, this.status, this.list.element);
    this.element.setAttribute("aria-label", this.t("title"));
    this.element.addEventListener("keydown", (event) => event.stopPropagation()); // the editor has shortcuts of its own
  }

  /** Read the runs again; called whenever the tab is shown and when something has ended. */
  async load() {
    try {
      this.data = await ask(api, "/gallery");
      this.list.show(this.data.runs, this.data.size);
      const open = this.data.runs.find(({ run }) => run === this.details?.run.run);
      if (open) this.details.update(open);
    } catch (error) {
      this.list.fail(error.message);
    }
  }

  async open(run) {
    this.status.textContent = "";
    const details = new GalleryDetails(run, this.t, {
      back: () => this.back(),
      use: (step) => this.act(() => this.use(run, step)),
      sweep: (step) => this.act(() => this.sweep(run, step)),
      send: (step) => this.act(() => this.send(run, step)),
      folder: () => this.act(() => this.folder(run)),
      remove: () => this.act(() => this.remove(run)),
      viewAddress: (image) => api.apiURL(`/view?${new URLSearchParams(image)}`),
      date: this.date,
    }, this.data.opens);
    this.details = details;
    this.list.element.replaceWith(details.element);
    details.focus();
    await this.act(async () => {
      const path = `/runs/${encodeURIComponent(run.run)}`;
      const [history, { sweeps }] = await Promise.all([ask(api, `${path}/events`), ask(api, `${path}/sweep`)]);
      details.fill(history);
      details.showSweeps(sweeps);
      return "";
    });
  }

  back() {
    if (!this.details) return;
    const { run } = this.details.run;
    this.details.element.replaceWith(this.list.element);
    this.details = null;
    this.list.focus(run);
    void this.load();
  }

  /** Do something for the open run, and show the sentence that it returns, or the error. */
  async act(action) {
    const { details } = this;
    try {
      const said = await action();
      if (typeof said === "string") details?.note(said);
    } catch (error) {
      details?.note(error.message);
    }
  }

  post(run, what, body) {
    return ask(api, `/runs/${encodeURIComponent(run.run)}/${what}`, body);
  }

  async use(run, step) {
    const trainer = trainerOf(app, run.run);
    if (trainer) {
      await useStep(app, trainer, step);
      return this.t("used", { step });
    }
    const { lora } = await this.post(run, "publish", { step });
    return this.t("published", { lora, step });
  }

  async send(run, step) {
    const { lora } = await this.post(run, "publish", { step });
    const { node, isNew } = sendTo(app, lora);
    return this.t(isNew ? "sentNew" : "sent", { lora, node: node.id });
  }

  /** Queue the strength sweep of a step. Its pictures come in one by one; what is drawn already comes from the cache. */
  async sweep(run, step) {
    const { details } = this;
    const base = baseOf((await app.graphToPrompt()).output);
    const { prompt } = await this.post(run, "sweep", base ? { step, base } : { step });
    const answer = await api.fetchApi("/prompt", {
      method: "POST", body: JSON.stringify({ prompt, client_id: api.clientId }),
    });
    const queued = await answer.json();
    if (!answer.ok) throw new Error(this.t("sweepFailed", { error: reasonOf(queued) }));
    const pictures = Object.keys(prompt).filter((id) => prompt[id].class_type === "SaveImage");
    const show = async () => {
      const { sweeps } = await ask(api, `/runs/${encodeURIComponent(run.run)}/sweep`);
      if (this.details === details) details.showSweeps(sweeps);
    };
    this.follow(queued.prompt_id, pictures, show, (text) => details.note(text));
    await show();
    return this.t("sweepQueued");
  }

  /** Call `show` for each of a prompt's pictures, and say how it ends. */
  follow(promptId, pictures, show, say) {
    const done = new Set();
    const listeners = {
      executed: ({ node }) => {
        if (!pictures.includes(String(node))) return;
        done.add(node);
        say(this.t("sweeping", { done: done.size, count: pictures.length }));
        void show();
      },
      execution_success: () => end(""),
      execution_error: (detail) => end(this.t("sweepFailed", { error: detail.exception_message ?? "" })),
      execution_interrupted: () => end(""),
    };
    const entries = Object.entries(listeners).map(([name, act]) => [
      name, ({ detail }) => { if (detail?.prompt_id === promptId) act(detail); },
    ]);
    const end = (text) => {
      for (const [name, listener] of entries) api.removeEventListener(name, listener);
      say(text);
      void show();
    };
    for (const [name, listener] of entries) api.addEventListener(name, listener);
  }

  async folder(run) {
    const { opened, path } = await this.post(run, "open", {});
    return opened ? "" : path;
  }

  async remove(run) {
    const answer = await api.fetchApi(`/subjectbooth/runs/${encodeURIComponent(run.run)}`, { method: "DELETE" });
    const said = await answer.json();
    if (!answer.ok) throw new Error(said.error);
    this.back();
    this.status.textContent = this.t("deleted", { words: run.trigger || run.run, size: readableBytes(said.freed) });
    return null;
  }
}

/** The first reason in an answer of /prompt that rejects it. */
function reasonOf(said) {
  const errors = Object.values(said.node_errors ?? {}).flatMap((node) => node.errors ?? []);
  const first = errors[0];
  return first ? [first.message, first.details].filter(Boolean).join(": ") : said.error?.message ?? String(said.error ?? "");
}

app.registerExtension({
  name: "SubjectBooth.Gallery",

  setup() {
    const register = app.extensionManager?.registerSidebarTab;
    if (!register) return; // an older front end
    const style = document.createElement("link");
    style.rel = "stylesheet";
    style.href = new URL("./lib/gallery.css", import.meta.url).href;
    document.head.append(style);
    const gallery = new Gallery(app.extensionManager.setting?.get("Comfy.Locale") ?? "en");
    const isShown = () => gallery.element.isConnected && gallery.element.offsetParent !== null;
    app.extensionManager.registerSidebarTab({
      id: ID,
      icon: "pi pi-images",
      title: gallery.t("title"),
      tooltip: gallery.t("tooltip"),
      type: "custom",
      render: (place) => {
        // The front end may render the same place again.
        if (gallery.element.parentElement !== place) place.replaceChildren(gallery.element);
        place.style.height = "100%";
        void gallery.load();
      },
    });
    for (const name of ["execution_success", "execution_error", "execution_interrupted"]) {
      api.addEventListener(name, () => { if (isShown()) void gallery.load(); });
    }
  },
});
