// The browser's own notification when a training ends while the tab is hidden. Asked for once, by a button.
import { stateText } from "./train_words.mjs";

const ASKED = "SubjectBooth.notify.asked";
/** Ends worth a message; who cancels a run is there. */
const ENDS = ["finished", "kept", "failed"];

/** Whether the user can still be asked: the browser has notifications here, and neither it nor we have asked before. */
export function canAsk(page = window) {
  try {
    return page.Notification?.permission === "default" && !page.localStorage.getItem(ASKED);
  } catch {
    return false; // storage is forbidden: we could not remember that we have asked
  }
}

/** Ask the user; to be called from a click. */
export async function askOnce(page = window) {
  page.localStorage.setItem(ASKED, "1");
  await page.Notification.requestPermission();
}

/** Shows a notification for each run that is seen in training and then ends. */
export class RunNotices {
  /** @param words {finished, kept, failed} see train_words.mjs */
  constructor(words, page = window) {
    this._words = words;
    this._page = page;
    this._trained = new Set();
  }

  /** Take a message of a run. A run that is reused has no steps in its messages, and needs no notification. */
  take(message) {
    const { run, state, series, step, steps, result } = message;
    if (!ENDS.includes(state)) {
      if (Object.keys(series ?? {}).length) this._trained.add(run);
      return;
    }
    if (!this._trained.delete(run)) return;
    const page = this._page;
    if (!page.document.hidden || page.Notification?.permission !== "granted") return;
    const words = result?.trigger || run.replace(/_[0-9a-f]{12}$/, "").replaceAll("_", " ");
    const notice = new page.Notification(`${words}: ${stateText(this._words, message)}`, {
      body: `${this._words.step} ${step} / ${steps}`,
      tag: run, // one for all tabs
    });
    notice.onclick = () => page.focus();
  }
}
