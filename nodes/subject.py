"""LoadSubjectImages: photos and words in, a SUBJECT out."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy_api.latest import io
from PIL import Image

from ..trainer.errors import SubjectBoothError
from ..trainer.files.storage import sha256_of, write_atomic
from ..trainer.subject.captions import DEFAULT_TEMPLATE, caption_file_of
from ..trainer.subject.crops import CROPS
from ..trainer.subject.photo_files import read_photos
from ..trainer.subject.subject import MAX_RESOLUTION, MIN_RESOLUTION, Subject, caption_lines, make_subject
from ..trainer.subject.trigger import DEFAULT_TOKEN
from .bridge import literal_prompt
from .host import Progress, stop_if_cancelled
from .photo_sources import NO_SAMPLE, Source, input_pictures, photos_of_tensors, samples
from .types import CATEGORY, SubjectType

log = logging.getLogger("subjectbooth")

CAPTIONS_TEMPLATE, CAPTIONS_FILES = "template", "caption files"


class LoadSubjectImages(io.ComfyNode):
    """Reads the photos of a subject from exactly one of four sources, checks them, and says what may spoil a run.

    An output node, so that its pictures and warnings come back when the page is reloaded. Takes lists, so that a
    list of pictures of several sizes is one subject and not one training each.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LoadSubjectImages",
            display_name="Load Subject Images",
            category=CATEGORY,
            description="Photos of one subject, and what it is called. Give them as uploads, a folder, a sample "
            "or an IMAGE: one of the four.",
            is_output_node=True,
            is_input_list=True,
            inputs=[
                _UploadCombo(
                    "images",
                    options=["", *input_pictures()],
                    default="",
                    upload=io.UploadType.image,
                    tooltip="3 to 5 photos of the subject; the button uploads several at once. Over the API: "
                    '{"__value__": ["a.jpg", "b.jpg"]}. Leave it empty to use another source.',
                ),
                io.Combo.Input(
                    "folder",
                    options=["", *folder_paths.get_input_subfolders()],
                    default="",
                    tooltip="A folder under ComfyUI's input folder: all pictures directly in it.",
                ),
                io.Combo.Input(
                    "sample",
                    options=[NO_SAMPLE, *samples()],
                    default=NO_SAMPLE,
                    tooltip="A subject that comes with the pack, to try things out.",
                ),
                io.String.Input(
                    "class_word",
                    default="",
                    placeholder="dog",
                    tooltip="What the subject is one of: dog, vase, toy car. The right word matters more than any "
                    "training setting. Empty takes the sample's.",
                ),
                io.String.Input(
                    "token",
                    default=DEFAULT_TOKEN,
                    tooltip="The word that is to mean this one subject. Should be one CLIP token that means nothing "
                    "yet: ohwx, hta, olis. (sks is a rifle.)",
                ),
                io.String.Input(
                    "prompt_template",
                    default=DEFAULT_TEMPLATE,
                    tooltip="What each photo is said to show. {token} and {class} are filled in; {subject} is both. It "
                    "is learned as it is written: (brackets) are text here, not weights.",
                ),
                io.Combo.Input(
                    "captions",
                    options=[CAPTIONS_TEMPLATE, CAPTIONS_FILES],
                    default=CAPTIONS_TEMPLATE,
                    tooltip="template: prompt_template for every photo. caption files: photo.txt beside each "
                    "photo.jpg, with the token in it ({token}, {class} and {subject} work there too). The node "
                    "shows them.",
                ),
                io.Int.Input(
                    "resolution",
                    default=512,
                    min=MIN_RESOLUTION,
                    max=MAX_RESOLUTION,
                    step=8,
                    tooltip="Side of the training images in pixels: 512 for SD 1.5, 1024 for SDXL.",
                ),
                io.Combo.Input(
                    "crop",
                    options=list(CROPS),
                    default=CROPS[0],
                    tooltip="center: the largest square in the middle. pad: the whole photo with bars. subject: a "
                    "square around the mask (transparency or a wired MASK), else center.",
                ),
                io.Image.Input("image", optional=True, tooltip="Photos from other nodes: a batch or a list."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="For a wired IMAGE: white where the subject is, one mask a photo. An empty mask is "
                    "ignored. Of a cut-out, LoadImage gives the opposite: put InvertMask between.",
                ),
            ],
            outputs=[
                SubjectType.Output(display_name="subject", tooltip="The photos and words, for training."),
                io.Image.Output(display_name="images", tooltip="The photos as training sees them: cropped and scaled."),
                io.String.Output(
                    display_name="instance_prompt", tooltip='The filled-in template as a prompt: "a photo of ohwx dog".'
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, images: Any = None, folder: Any = None, sample: Any = None) -> bool | str:
        """Before anything runs: do the sources lead to pictures? A linked input arrives as None and passes.

        ComfyUI repeats the answer for each argument named here, so only what the widgets' own lists cannot check
        is; :meth:`execute` checks the rest, and runs before any model is asked for.
        """
        try:
            source = Source.of(_one(images), _one(folder), _one(sample))
            source.check(may_be_none=True)
            source.paths()
        except SubjectBoothError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        """Changes when a file's bytes do, so that an edited photo or caption under the old name is read again."""
        given = {name: _one(value) for name, value in inputs.items()}
        try:
            paths = Source.of(given.get("images"), given.get("folder"), given.get("sample")).paths()
            captions = [caption_file_of(path) for path in paths if caption_file_of(path).is_file()]
            # Where they are not read, the node says which are there.
            read = captions if given.get("captions") != CAPTIONS_TEMPLATE else [path.name for path in captions]
            return sha256_of(*paths, *read)
        except (SubjectBoothError, OSError) as error:
            return str(error)  # execute says it to the user

    @classmethod
    def execute(
        cls,
        images: list[Any],
        folder: list[str],
        sample: list[str],
        class_word: list[str],
        token: list[str],
        prompt_template: list[str],
        captions: list[str],
        resolution: list[int],
        crop: list[str],
        image: list[torch.Tensor] | None = None,
        mask: list[torch.Tensor] | None = None,
    ) -> io.NodeOutput:
        source = Source.of(images[0], folder[0], sample[0], has_image=image is not None)
        source.check()
        if mask is not None and image is None:
            raise SubjectBoothError(
                "a MASK without an IMAGE",
                "the photos that the mask belongs to",
                "wire the photos into image, or unplug the mask",
                "mask",
            )
        from_files = captions[0] == CAPTIONS_FILES
        if captions[0] not in (CAPTIONS_TEMPLATE, CAPTIONS_FILES):
            raise SubjectBoothError(
                f"captions {captions[0]!r}",
                f'"{CAPTIONS_TEMPLATE}" or "{CAPTIONS_FILES}"',
                "choose one",
                "captions",
            )
        if image is not None:
            if from_files:
                raise SubjectBoothError(
                    "caption files for a wired IMAGE, which has no file names",
                    'captions set to "template", or photos from files',
                    "change captions, or give the photos as uploads or a folder",
                    "captions",
                )
            photos, notes = photos_of_tensors(image, mask)
        else:
            photos, notes = read_photos(source.paths(), "files" if from_files else "template", stop_if_cancelled)
        subject = make_subject(
            photos,
            class_word=class_word[0] if class_word[0].strip() else source.sample_class_word(),
            token=token[0],
            resolution=resolution[0],
            crop=crop[0],
            prompt_template=prompt_template[0],
            tokenize=clip_tokenize(),
            notes=notes,
        )
        return _output(subject, cls.hidden.unique_id)


def _output(subject: Subject, node_id: str | None) -> io.NodeOutput:
    prepared = subject.prepare()
    # Shown in the order the user gave them, though they are trained on in the order of their content.
    positions = [prepared.order.index(index) for index in range(len(subject.photos))]
    shown = prepared.images[positions].permute(0, 2, 3, 1).contiguous()  # [n, r, r, 3]
    for warning in subject.warnings:
        log.warning("%s", warning)
    count = len(subject.photos)
    own = any(photo.caption != subject.instance_prompt for photo in subject.photos)
    words = "captions from files" if own else f'"{subject.instance_prompt}"'
    text = f"{count} photo{'s' if count != 1 else ''} at {subject.resolution} px, {words}"
    captions = caption_lines(subject) if own else []
    Progress(node_id, 1).say("\n".join([text, *subject.warnings, *captions]))
    ui = {
        "images": [_preview(image) for image in shown],
        "text": [text, *subject.warnings, *captions],
        "warnings": list(subject.warnings),
    }
    # Whoever wires it to a text encoder means the words that were learned.
    return io.NodeOutput(subject, shown, literal_prompt(subject.instance_prompt), ui=ui)


def _preview(image: torch.Tensor) -> dict[str, str]:
    """A training image [r, r, 3] as a file in ComfyUI's temp folder, named by its content: never twice."""
    pixels = (image * 255.0).round().to(torch.uint8).numpy()
    name = f"subject_{sha256_of(pixels.tobytes())[:24]}.png"
    path = Path(folder_paths.get_temp_directory()) / "subjectbooth" / name
    if not path.is_file():
        write_atomic(path, lambda beside: Image.fromarray(pixels).save(beside, compress_level=1))
    return {"filename": name, "subfolder": "subjectbooth", "type": "temp"}


@functools.lru_cache(maxsize=1)
def clip_tokenize() -> Callable[[str], list[int]] | None:
    """Text -> CLIP's BPE ids by ComfyUI's own tokenizer, without start and end; None where that is not to be had."""
    try:
        from comfy.sd1_clip import SDTokenizer

        tokenizer = SDTokenizer().tokenizer
        return lambda text: list(tokenizer(text)["input_ids"][1:-1])
    except Exception:  # only the check of the token needs it, and another ComfyUI may have it elsewhere
        log.warning("ComfyUI's CLIP tokenizer could not be loaded, so the token is not checked.", exc_info=True)
        return None


class _UploadCombo(io.Combo.Input):
    """A combo whose upload button takes several files. ComfyUI 0.3.75 has no argument for that."""

    def as_dict(self) -> dict[str, Any]:
        return {**super().as_dict(), "allow_batch": True}


def _one(value: Any) -> Any:
    """The value of a widget: with ``is_input_list`` each arrives in a list or, if linked, as ``(None,)``."""
    return value[0] if isinstance(value, list | tuple) and value else None
