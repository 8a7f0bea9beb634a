// Notes of the templates, by paragraph; the English paragraph is the key.
export const RUSSIAN = {
  "**1** Choose the Flux.2 klein 4B files. If one is missing, the editor names it and where it belongs.":
    "**1** Выберите файлы Flux.2 klein 4B. Если какого-то нет, редактор назовёт его и папку для него.",
  "**1** Choose the SDXL checkpoint. If it is missing, the editor names the file and where it belongs.":
    "**1** Выберите чекпойнт SDXL. Если его нет, редактор назовёт файл и папку для него.",
  "**1** Choose the Stable Diffusion 1.5 checkpoint. If it is missing, the editor names the file and where it belongs.":
    "**1** Выберите чекпойнт Stable Diffusion 1.5. Если его нет, редактор назовёт файл и папку для него.",
  "**1** Choose the Z-Image files. If one is missing, the editor names it and where it belongs.":
    "**1** Выберите файлы Z-Image. Если какого-то нет, редактор назовёт его и папку для него.",
  "**2** Add 3 to 5 photos, and enter what they show in *class_word*: dog, vase, toy car.":
    "**2** Добавьте от 3 до 5 фото и впишите в *слово класса* по-английски, что на них: dog, vase, toy car.",
  "**3** Press **Run**. When the images in *Train* show your subject, **Stop and keep** ends the training there.":
    "**3** Запустите граф. Когда на картинках в узле *Обучение* появится ваш объект, обучение можно закончить кнопкой **Остановить и сохранить**.",
  "**4** Change the prompt and run again: nothing is trained twice.":
    "**4** Поменяйте промпт и запустите ещё раз: второй раз ничего не обучается.",
  "Sizes are 512; for SD 2.x at 768, change step 2 and *Sample*. Settings from the literature, tested on a small model only.":
    "Размеры — 512; для SD 2.x (768) поменяйте их в шаге 2 и внутри узлов с картинками. Настройки взяты из литературы и проверены только на маленькой модели.",
  "Sizes are 1024. Out of memory? Lower the resolution of step 2 to 768, or the rank. Settings from the literature, not tested at full size.":
    "Размеры — 1024. Не хватает памяти? Уменьшите разрешение в шаге 2 до 768 или ранг. Настройки взяты из литературы, в полном размере не проверены.",
  "Train on Z-Image, not Turbo; the LoRA works with both. Little memory? weight_dtype fp8_e4m3fn, resolution 512. Tested on a small model of this kind only.":
    "Обучайте на Z-Image, а не на Turbo; LoRA подходит к обеим. Мало памяти? weight_dtype fp8_e4m3fn, разрешение 512. Проверено только на маленькой модели такого же вида.",
  "Train on the base model; the LoRA also works with the distilled one. Little memory? weight_dtype fp8_e4m3fn, resolution 512. Tested on a small model of this kind only.":
    "Обучайте на базовой модели (base); LoRA подходит и к дистиллированной. Мало памяти? weight_dtype fp8_e4m3fn, разрешение 512. Проверено только на маленькой модели такого же вида.",
  "Press **Run**: a small demo model learns the dog of step 2 and draws it in a new scene. The first run writes the model (466 MB) to *models/checkpoints/subjectbooth*.":
    "Запустите граф: маленькая демо-модель выучит собаку из шага 2 и нарисует её в новой сцене. Первый запуск записывает модель (466 МБ) в *models/checkpoints/subjectbooth*.",
  "**Your own photos:** in step 2, set *sample* to none, add 3 to 5 photos, and enter what they show in *class_word*: dog, vase, toy car.":
    "**Свои фото:** в шаге 2 поставьте *пример* в none, добавьте от 3 до 5 фото и впишите в *слово класса* по-английски, что на них: dog, vase, toy car.",
  "**Your own model:** open *sd15_train_and_sample*, *sdxl_...*, *z_image_...* or *flux2_klein_...* instead. This graph has the demo's sizes and rates.":
    "**Своя модель:** откройте *sd15_train_and_sample*, *sdxl_...*, *z_image_...* или *flux2_klein_...*. Размеры и скорость в этом графе — для демо-модели.",
  "Press **Run**: trains, and saves the LoRA to *models/loras*, without class images and without sampling. Then open *use_a_trained_lora*.":
    "Запустите граф: он обучит LoRA и сохранит её в *models/loras*, без картинок класса и без генерации. Потом откройте *use_a_trained_lora*.",
  "The first run writes the demo model (466 MB) to *models/checkpoints/subjectbooth*.":
    "Первый запуск записывает демо-модель (466 МБ) в *models/checkpoints/subjectbooth*.",
  "**Your own model:** replace step 1 with *Load Checkpoint*, set resolution to 512 (SD 1.5) or 1024 (SDXL), choose a *preset*, and delete the options for the demo.":
    "**Своя модель:** замените шаг 1 загрузчиком чекпойнта, поставьте разрешение 512 (SD 1.5) или 1024 (SDXL), выберите *набор* и удалите настройки для демо-модели.",
  "**Which step is best?** Press **Run**. Every 50 steps, *Train* keeps the LoRA and draws the same prompt from the same noise. On the right, a row for each step; the one in use is framed.":
    "**Какой шаг лучше?** Запустите граф. Каждые 50 шагов узел *Обучение* сохраняет LoRA и рисует один и тот же промпт из одного и того же шума. Справа каждый шаг — строка; выбранный обведён рамкой.",
  "Too early, the subject is missing; too late, the images copy the photos. Move the slider in *Train* to the best step and press **Use this step**: nothing is trained again.":
    "Слишком рано — объекта ещё нет; слишком поздно — картинки повторяют фото. Поставьте ползунок узла *Обучение* на лучший шаг и нажмите **Взять этот шаг**: заново ничего не обучается.",
  "Draws with a LoRA that was trained before: choose it in *lora_name*. {subject} stands for its words.":
    "Рисует с LoRA, обученной раньше: выберите её в поле *файл lora*. {subject} — это её слова.",
  "*my_dog* comes from *train_and_sample* or *train_only*. Use the model that a LoRA was trained on: for your own, replace the model with *Load Checkpoint*, and in *Sample* set the size and bypass *4 times as large* (Ctrl+B).":
    "*my_dog* получается в *train_and_sample* и *train_only*. Берите ту модель, на которой LoRA обучена: для своей замените модель загрузчиком чекпойнта, а внутри узла с картинками поставьте размер и обойдите «Увеличить в 4 раза» (Ctrl+B).",
};

/** A note in the editor's language. One that a user has changed has a paragraph that is not in the table, and stays. */
export function noteIn(locale, text) {
  if (!String(locale ?? "").toLowerCase().startsWith("ru")) return text;
  const paragraphs = String(text).split("\n\n").map((paragraph) => RUSSIAN[paragraph]);
  return paragraphs.every(Boolean) ? paragraphs.join("\n\n") : text;
}
