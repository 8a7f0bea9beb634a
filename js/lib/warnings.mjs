// Russian for the server's messages about photos, words and LoRAs. <parts> are what differs from case to case.
import { PROBLEMS } from "./problems.mjs";
import { REPORTS } from "./reports.mjs";

const RUSSIAN = {
  "Only <n> photos: with fewer than <least>, the background and the pose are learned with the subject. 3 to 5 photos from different angles work best.":
    "Мало фото (<n>): если их меньше <least>, вместе с объектом выучиваются фон и поза. Лучше всего от 3 до 5 фото с разных сторон.",
  "Only <n> photo: with fewer than <least>, the background and the pose are learned with the subject. 3 to 5 photos from different angles work best.":
    "Мало фото (<n>): если их меньше <least>, вместе с объектом выучиваются фон и поза. Лучше всего от 3 до 5 фото с разных сторон.",
  "<names> is <size>, smaller than the training size <side>: it is enlarged, and the subject becomes soft.":
    "<names>: размер <size> меньше размера обучения <side>. Фото увеличивается, и объект становится нерезким.",
  "<names> are smaller than the training size <side>: they are enlarged, and the subject becomes soft.":
    "<names>: меньше размера обучения <side>. Фото увеличиваются, и объект становится нерезким.",
  "<names> are near-duplicates: this view gets double weight.": "<names>: почти одинаковые. Этот вид получает двойной вес.",
  "<n> photos are near-duplicates: <names>. This view gets <times> times the weight.":
    "Почти одинаковых фото: <n> (<names>). Вес этого вида больше в <times> раз.",
  "<names> looks blurred: the blur is learned with the subject.": "<names>: размыто. Размытие выучивается вместе с объектом.",
  "<names> look blurred: the blur is learned with the subject.": "<names>: размыты. Размытие выучивается вместе с объектом.",
  "<names> has <detail>: only the first is used.": "<names>: несколько кадров или страниц. Берётся только первый.",
  "<names> have several frames or pages: only the first is used.": "<names>: несколько кадров или страниц. Берётся только первый.",
  "The transparent part of <names> becomes white; with masked_loss it is not trained on.":
    "<names>: прозрачная часть становится белой; с «по маске» (masked_loss) на ней не учат.",
  "The transparent parts of <names> become white; with masked_loss they are not trained on.":
    "<names>: прозрачные части становятся белыми; с «по маске» (masked_loss) на них не учат.",
  "<names> is truncated: its last rows of pixels are missing. Copy or download it again.":
    "<names>: файл обрезан, нет последних строк. Скопируйте или скачайте его ещё раз.",
  "<names> are truncated: their last rows of pixels are missing. Copy or download them again.":
    "<names>: файлы обрезаны, нет последних строк. Скопируйте или скачайте их ещё раз.",
  "The mask of <names> is empty and ignored.": "<names>: маска пуста и не учитывается.",
  "The masks of <names> are empty and ignored.": "<names>: маски пусты и не учитываются.",
  "The mask of <names> is outside the crop '<crop>': this photo trains nothing with masked_loss, and only the background without it. Set crop to \"subject\" or \"pad\".":
    "<names>: маска вне кадра («<crop>»). С «по маске» это фото ничему не учит, без неё учит только фону. Поставьте кадр «subject» или «pad».",
  "The masks of <names> are outside the crop '<crop>': these photos train nothing with masked_loss, and only the background without it. Set crop to \"subject\" or \"pad\".":
    "<names>: маски вне кадра («<crop>»). С «по маске» эти фото ничему не учат, без неё учат только фону. Поставьте кадр «subject» или «pad».",
  "The caption file <names> is ignored because captions is \"template\".": "Файл подписи <names> не читается: подписи берутся из шаблона.",
  "The caption files <names> are ignored because captions is \"template\".": "Файлы подписей <names> не читаются: подписи берутся из шаблона.",
  "The token \"<token>\" is part of the class word, so the class itself becomes the subject: use \"<better>\".":
    "Токен «<token>» — часть слова класса, и объектом станет весь класс. Возьмите «<better>».",
  "The token \"<token>\" already means <meaning>: use \"<better>\".": "Токен «<token>» уже значит другое. Возьмите «<better>».",
  "The token \"<token>\" is split into <n> CLIP tokens with their own meanings: use \"<better>\".":
    "Токен «<token>» делится на токены CLIP со своими значениями (<n>). Возьмите «<better>».",
  "The token \"<token>\" is a word that CLIP already knows (number <n> in its vocabulary, frequent words first), so its meaning leaks into the subject: use \"<better>\".":
    "Токен «<token>» — слово, которое CLIP уже знает (номер <n> в его словаре, сначала частые), и его значение примешается к объекту. Возьмите «<better>».",
  "prompt_template has no {class}: naming the class helps more than any other setting.":
    "В шаблоне нет {class}: слово класса помогает больше любой другой настройки.",
  "<n> of <all> captions contain a prompt weight (<weight>). Captions are taken literally, so it is treated as text.":
    "В подписях (<n> из <all>) есть вес промпта (<weight>). Подписи берутся дословно, и он считается текстом.",
  "<n> of <all> captions (first: <name>) do not contain the token \"<token>\", so these photos do not train it.":
    "В подписях (<n> из <all>, первая: <name>) нет токена «<token>», и эти фото ему не учат.",
  "class_word is empty. Required: what the photos show, in a word or two, such as \"dog\". Fill in class_word.":
    "Слово класса не задано. Впишите по-английски, что на фото, одним-двумя словами: например, dog.",
};

const escaped = (text) => text.replace(/[.*+?^${}()|[\]\\]/g, "\\$&");

function patternOf(sentence) {
  const names = [...sentence.matchAll(/<(\w+)>/g)].map(([, name]) => name);
  const source = sentence.split(/<\w+>/).map(escaped).join("(.+?)");
  return { names, expression: new RegExp(`^${source}$`, "s") };
}

const patterns = Object.entries({ ...RUSSIAN, ...PROBLEMS, ...REPORTS }).map(([english, russian]) => ({ ...patternOf(english), russian }));

const listed = (names) => names.replace(/ and (\d+) more$/, " и ещё $1").replace(/ and /g, " и ");

/** A message in the editor's language; as it is if there is no translation. */
export function warningIn(locale, text) {
  if (!String(locale ?? "").toLowerCase().startsWith("ru")) return text;
  for (const { names, expression, russian } of patterns) {
    const found = expression.exec(text);
    if (!found) continue;
    const values = Object.fromEntries(names.map((name, at) => [name, found[at + 1]]));
    return russian.replace(/<(\w+)>/g, (_, name) => (name === "names" ? listed(values.names) : values[name] ?? ""));
  }
  return text;
}
