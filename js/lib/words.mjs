// What the panels of photos, class images and LoRAs say, in the editor's language: the English text is the key. Sentences
// that come from the server stay as it has them.
export const RUSSIAN = {
  "Choose, drop or paste photos": "Выберите, перетащите или вставьте фото",
  "Click to leave this picture out of the next run.": "Щёлкните, чтобы исключить картинку из следующего запуска.",
  "Each photo is": "Каждое фото — это",
  "Left out. Click to use it again.": "Исключена. Щёлкните, чтобы вернуть.",
  "Move to the back": "Ближе к концу",
  "Move to the front": "Ближе к началу",
  "Not uploaded": "Не загружено",
  "Remove this photo": "Убрать это фото",
  "The LoRA and its words come from the wired training.": "LoRA и её слова приходят из подключённого обучения.",
  "The class images appear here while they are made. A click on one leaves it out.": "Здесь появятся картинки класса. Щелчок по картинке исключает её.",
  "This file does not say its trigger words: write them into the prompt.": "В файле не указаны его слова-триггеры: впишите их в промпт сами.",
  "and {n} more": "и ещё {n}",
  "copy": "копировать",
  "photos": "фото",
  "rank {n}": "ранг {n}",
  "small": "мало",
  "twice": "повтор",
  "blurred": "размыто",
  "cut off": "вне кадра",
  "damaged": "повреждено",
  "on white": "на белом",
  "the class is": "класс — это",
  "uploading {n}": "загружаю: {n}",
  "{done} of {count} there, {made} made now": "есть {done} из {count}, сейчас сделано {made}",
  "{n} kept from before": "сохранено раньше: {n}",
  "{n} left out": "исключено: {n}",
  "{n} steps": "шагов: {n}",
};

let table = {};

/** Choose the language ("ru", "en", "zh-TW"); English where there are no words of it. */
export function speak(locale) {
  table = String(locale ?? "").toLowerCase().startsWith("ru") ? RUSSIAN : {};
}

/** The text in the editor's language, with {name} filled in from `values`. */
export function t(text, values = {}) {
  const translated = table[text] ?? text;
  return translated.replace(/\{(\w+)\}/g, (whole, name) => (name in values ? String(values[name]) : whole));
}
