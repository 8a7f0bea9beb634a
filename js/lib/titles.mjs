// Titles of the templates' nodes; the English title is the key.
const RUSSIAN = {
  "Start here": "Начните здесь",
  "1 · Model": "1 · Модель",
  "1 · Model (demo)": "1 · Модель (демо)",
  "Model (demo)": "Модель (демо)",
  "2 · Photos of the subject": "2 · Фото объекта",
  "3 · Train": "3 · Обучение",
  "4 · Draw it: your prompt": "4 · Рисуем: ваш промпт",
  "4 · All steps in one grid": "4 · Все шаги в одной таблице",
  "Class images, to compare": "Картинки класса",
  "Options for the demo": "Настройки для демо",
  "Sample with the subject": "Картинки с объектом",
  "Sample without, same seed": "Без объекта, тот же seed",
  "Your subject": "Ваш объект",
  "The same without your subject": "То же без вашего объекта",
  "Prompt": "Промпт",
  "Negative prompt": "Негативный промпт",
  "4 times as large (demo)": "Увеличить в 4 раза (демо)",
};

/** A title in the editor's language. One that a user has written is not in the table and stays. */
export function titleIn(locale, title) {
  return (String(locale ?? "").toLowerCase().startsWith("ru") && RUSSIAN[title]) || title;
}

const SLOTS = { model: "модель", prompt: "промпт", image: "изображение" };

/** The name of an input or output of a template's subgraph in the editor's language. */
export function slotIn(locale, name) {
  return (String(locale ?? "").toLowerCase().startsWith("ru") && SLOTS[name]) || name;
}
