// Russian for what nodes report in a line of text while they work and afterwards. <parts> differ from case to case.
const VERBS = { "trained": "обучено", "reused (trained before)": "взято готовое, обученное раньше" };
const STEPS = {
  "<step> of <steps> (stopped and kept)": "<step> из <steps> (остановлено и сохранено)",
  "<step> of <steps> (chosen by use_step)": "<step> из <steps> (выбран вами)",
  "<step> of <steps> (best: <reason>)": "<step> из <steps> (лучший)",
  "<step>": "<step>",
};

const ENDS = Object.entries(VERBS).flatMap(([verb, russian]) => Object.entries(STEPS).map(([step, translated]) => [
  `${verb}: <file>, <size> MB, step ${step}, matched <layers>, use “<words>” in prompts`,
  `${russian}: <file>, <size> МБ, шаг ${translated}, совпало <layers>, в промптах пишите «<words>»`,
]));

export const REPORTS = {
  "reading the base model": "читаю модель",
  "writing <size> MB, once, to <path>": "записываю <size> МБ, один раз, в <path>",
  "<size> MB written to <path>": "<size> МБ записано в <path>",
  "studying what the model knows  <done>": "изучаю, что модель уже знает: <done>",
  "training on <device> in <precision>; <notes>": "обучаю на <device> в <precision>; <notes>",
  "step <step>  loss <loss> (<terms>)  <seconds> s/step  ETA <time>": "шаг <step>, потери <loss>, <seconds> с/шаг, осталось <time>",
  "step <step>  loss <loss>  <seconds> s/step  ETA <time>": "шаг <step>, потери <loss>, <seconds> с/шаг, осталось <time>",
  "step <step>  drawing <done>": "шаг <step>, рисую <done>",
  "the class after training: picture <n> of <all>, step <step>": "класс после обучения: картинка <n> из <all>, шаг <step>",
  ...Object.fromEntries(ENDS),
  "class drift <drift> (0: unchanged, 1: another random picture)": "сдвиг класса <drift> (0: без изменений, 1: как другая случайная картинка)",
  "as usual for <family>: <numbers>": "обычное для <family>: <numbers>",
  "no validation images of step <steps> for these prompts and settings; force_retrain creates them":
    "нет проверочных картинок шага <steps> для этих промптов и настроек; их создаст «заново» (force_retrain)",
  "<n> class images ready (<new> new), <prompt>": "картинок класса: <n> (новых: <new>), <prompt>",
  "applied: all <n> layers": "применено слоёв: <n>, все",
  "not applied: the strength is 0": "не применено: сила равна 0",
};

/** What is on the panel of a node as well, by its type. */
const ON_PANEL = {
  GenerateClassPriors: [/^\d+ class images ready \(/],
  DreamBoothLoRATrain: [/^(trained|reused \(trained before\)): .+, matched \d+\/\d+, use /, /^class drift \d/],
};

/** What the trainer's panel shows all the time: steps, their losses and time, the settings in use and the memory plan. */
const WHILE_TRAINING = [/^training on \S+ in /, /^studying what the model knows {2}\d/, /^step \d+\/\d+ {2}(loss|drawing) /];

/** Whether the editor need not show this text of a node at all. */
export function isRepeated(kind, text) {
  return kind === "DreamBoothLoRATrain" && WHILE_TRAINING.some((pattern) => pattern.test(text ?? ""));
}

/** Whether a node's panel shows all lines of its text. */
export function isOnPanel(kind, text) {
  const known = ON_PANEL[kind] ?? [];
  return text.split("\n").every((line) => known.some((pattern) => pattern.test(line)));
}
