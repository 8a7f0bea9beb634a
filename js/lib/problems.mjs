// Russian for what keeps a panel from showing photos or a LoRA. <parts> are what differs from case to case.
export const PROBLEMS = {
  "lora_name <name> was not found. Required: a file in models/loras. Refresh the node definitions (R) and choose again.":
    "Файл lora <name> не найден в models/loras. Обновите узлы клавишей R и выберите снова.",
  "Photos come from <n> sources: <list>. Required: exactly one of images, folder, sample and image. Keep one; clear or disconnect the others.":
    "Фото взяты из нескольких мест (<n>). Нужно одно: фото, папка, пример или вход изображений. Остальные очистите или отключите.",
  "The folder <name> cannot be read (<reason>). Required: a folder with images. Check the folder's name and permissions.":
    "Папка <name> не читается. Проверьте её имя и права доступа.",
  "No images found in the folder <name> (<n> other files). Required: 3 to 5 photos as JPEG, PNG or WebP directly in it. Put the photos there, or choose another folder.":
    "В папке <name> нет картинок. Положите туда от 3 до 5 фото (JPEG, PNG или WebP) или выберите другую папку.",
  "<kind> <name> leads out of ComfyUI's <folder> folder. Required: something inside the <same> folder. Copy the files into the <this> folder and use names relative to it.":
    "<name> ведёт за пределы папки <folder> ComfyUI. Скопируйте файлы в эту папку и укажите имена внутри неё.",
  "<name> was not found in ComfyUI's input folder. Required: uploaded photos. Upload it again. Where: images":
    "Файла <name> нет в папке input ComfyUI. Загрузите его ещё раз.",
  "<name> was not found in ComfyUI's input folder. Required: a mask of the mask editor. Paint the mask again, or remove it. Where: photo_edits":
    "Маски <name> нет в папке input ComfyUI. Нарисуйте её заново или уберите.",
  "<name> is a camera RAW file. Required: JPEG, PNG or WebP. Export it as JPEG.": "<name>: файл RAW с камеры. Сохраните его как JPEG.",
  "<name> is a HEIC image. Required: JPEG, PNG or WebP. Export it as JPEG (on an iPhone: Settings, Camera, Formats, Most Compatible).":
    "<name>: картинка HEIC. Сохраните её как JPEG (на iPhone: Настройки, Камера, Форматы, Наиболее совместимые).",
  "<name> is fully transparent. Required: an image that shows the subject. Leave this file out.":
    "<name>: картинка полностью прозрачна. Уберите её.",
  "<name> is damaged or truncated. Required: a complete image. Copy or download the file again, or leave it out.":
    "<name>: файл повреждён или обрезан. Скопируйте или скачайте его ещё раз либо уберите.",
  "<name> is not an image. Required: JPEG, PNG, WebP, AVIF, GIF, BMP or TIFF. Convert it, or leave it out.":
    "<name>: не картинка. Нужен JPEG, PNG, WebP, AVIF, GIF, BMP или TIFF.",
  "<name> is <size> pixels. Required: at most <n> million pixels. Scale the image down first.":
    "<name>: <size> пикселей, это слишком много (больше <n> млн). Сначала уменьшите картинку.",
  "<name> is <size> pixels. Required: at least <n> pixels on each side. Use a larger image, or leave this one out.":
    "<name>: <size> пикселей, это слишком мало (сторона меньше <n>). Возьмите картинку побольше или уберите эту.",
  "<name> is <size> pixels. Required: a long side of at most <n> times the short one. Crop it around the subject.":
    "<name>: <size> пикселей, картинка слишком вытянута (больше чем в <n> раз). Обрежьте её вокруг объекта.",
};
