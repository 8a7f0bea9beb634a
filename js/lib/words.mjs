// Translations for the panels of photos, class images and LoRAs; the English text is the key.
import { warningIn } from "./warnings.mjs";

export const RUSSIAN = {
  "▸ more settings": "▸ ещё настройки",
  "▾ fewer settings": "▾ меньше настроек",
  "Caption of each photo:": "Подпись каждого фото:",
  "Caption of {name}. Empty: as set for all photos": "Подпись {name}. Пусто: как для всех фото",
  "Crop of {name}: arrow keys move it, + and - resize it": "Кадр {name}: стрелки двигают, + и - меняют размер",
  "Edit {name}: crop and mask": "Править {name}: кадр и маска",
  "Paint mask": "Нарисовать маску",
  "Change mask": "Изменить маску",
  "Remove mask": "Убрать маску",
  "Opens ComfyUI's mask editor: paint over the subject": "Открывает редактор масок ComfyUI: закрасьте объект",
  "The mask editor could not be opened": "Редактор масок не открылся",
  "Masks take effect with masked_loss in DreamBooth Options, or with crop set to subject.": "Маски действуют с «по маске» (masked_loss) в настройках DreamBooth или с кадром subject.",
  "Done": "Готово",
  "Reset crop": "Сбросить кадр",
  "Size of the crop": "Размер кадра",
  "caption": "подпись",
  "Choose, drop or paste photos": "Выберите, перетащите или вставьте фото",
  "Class images appear here as they are generated. Click one to exclude it.": "Здесь появятся картинки класса. Щелчок по картинке исключает её.",
  "Class prompt:": "Промпт класса:",
  "Click to exclude this image from the next run.": "Щёлкните, чтобы исключить картинку из следующего запуска.",
  "Excluded. Click to use it again.": "Исключена. Щёлкните, чтобы вернуть.",
  "Move back": "Ближе к концу",
  "Move forward": "Ближе к началу",
  "Remove this photo": "Убрать это фото",
  "The LoRA and its trained words come from the connected trainer.": "LoRA и её слова приходят из подключённого узла обучения.",
  "This file does not contain its trigger words. Write them into the prompt yourself.": "В файле не указаны слова-триггеры. Впишите их в промпт сами.",
  "Upload failed": "Не загружено",
  "and {n} more": "и ещё {n}",
  "copy": "копировать",
  "photos": "фото",
  "rank {n}": "ранг {n}",
  "small": "мало",
  "similar": "повтор",
  "blurred": "размыто",
  "cut off": "вне кадра",
  "damaged": "повреждено",
  "on white": "на белом",
  "uploading {n}": "загружаю: {n}",
  "{done} of {count} class images ready ({made} new)": "готово картинок класса: {done} из {count} (новых: {made})",
  "{n} class images from an earlier run": "картинок класса с прошлого раза: {n}",
  "{n} excluded": "исключено: {n}",
  "{n} steps": "шагов: {n}",
  "B": "Б",
  "KB": "КБ",
  "MB": "МБ",
  "GB": "ГБ",
  "TB": "ТБ",
  "s": "с",
  "min": "мин",
  "h": "ч",
};

let table = {};
let language = "en";

/** Set the language ("ru", "en", "zh-TW"); English if there is no translation. */
export function speak(locale) {
  language = String(locale ?? "en");
  table = String(locale ?? "").toLowerCase().startsWith("ru") ? RUSSIAN : {};
}

/** A message of the server in the editor's language. */
export function told(text) {
  return warningIn(language, text);
}

/** Translate a text, with {name} filled in from `values`. */
export function t(text, values = {}) {
  const translated = table[text] ?? text;
  return translated.replace(/\{(\w+)\}/g, (whole, name) => (name in values ? String(values[name]) : whole));
}
