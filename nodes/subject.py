"""LoadSubjectImages: turns photos and words into a SUBJECT."""

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
from ..trainer.subject.photo_edits import NAME, PhotoEdit, edited, unused_note
from ..trainer.subject.photo_files import read_photos
from ..trainer.subject.subject import MAX_RESOLUTION, MIN_RESOLUTION, Subject, caption_lines, make_subject
from ..trainer.subject.trigger import DEFAULT_TOKEN
from .bridge import literal_prompt
from .graph_terms import graph_messages
from .host import Progress, stop_if_cancelled
from .photo_sources import NO_SAMPLE, Source, edits_of, input_pictures, mask_of, photos_of_tensors, samples
from .presentation import presented
from .types import CATEGORY, SubjectType

log = logging.getLogger("subjectbooth")

CAPTIONS_TEMPLATE, CAPTIONS_FILES = "template", "caption files"

SHOWN = ("images", "folder", "sample", "class_word", "token", "resolution", "crop", "photo_edits")
"""Inputs in sight; the others are under the editor's "advanced inputs"."""


class LoadSubjectImages(io.ComfyNode):
    """Reads the photos of a subject from exactly one of four sources, checks them, and warns of likely problems.

    An output node, so that its images and warnings survive a reload of the page. Takes lists, so that a list of images
    of different sizes becomes one subject instead of one run per image.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        schema = io.Schema(
            node_id="LoadSubjectImages",
            display_name="Load Subject Images (DreamBooth photos)",
            category=CATEGORY,
            description="Loads photos of one subject and the words for it. Use one source: uploads, a folder, a sample "
            "or an IMAGE.",
            is_output_node=True,
            is_input_list=True,
            inputs=[
                _UploadCombo(
                    "images",
                    options=["", *input_pictures()],
                    default="",
                    upload=io.UploadType.image,
                    tooltip="3 to 5 photos of the subject. The button uploads several at once. In the API: "
                    '{"__value__": ["a.jpg", "b.jpg"]}. Leave empty to use another source.',
                ),
                io.Combo.Input(
                    "folder",
                    options=["", *folder_paths.get_input_subfolders()],
                    default="",
                    tooltip="A folder inside ComfyUI's input folder. All images directly in it are used.",
                ),
                io.Combo.Input(
                    "sample",
                    options=[NO_SAMPLE, *samples()],
                    default=NO_SAMPLE,
                    tooltip="A sample subject included with the pack, for trying things out.",
                ),
                io.String.Input(
                    "class_word",
                    default="",
                    placeholder="what it is: dog, vase, toy car",
                    tooltip="The kind of thing the subject is: dog, vase, toy car. Required for your own photos: the "
                    "right word matters more than any training setting. Leave empty to use the sample's.",
                ),
                io.String.Input(
                    "token",
                    default=DEFAULT_TOKEN,
                    tooltip="The word that will stand for this subject. Use a single CLIP token without a meaning of "
                    "its own: ohwx, hta, olis. (sks is a rifle.)",
                ),
                io.String.Input(
                    "prompt_template",
                    default=DEFAULT_TEMPLATE,
                    tooltip="Caption for each photo. {token} and {class} are filled in; {subject} stands for both. "
                    "Captions are used literally: (parentheses) are text here, not weights.",
                ),
                io.Combo.Input(
                    "captions",
                    options=[CAPTIONS_TEMPLATE, CAPTIONS_FILES],
                    default=CAPTIONS_TEMPLATE,
                    tooltip="template: prompt_template for every photo. caption files: a photo.txt next to each "
                    "photo.jpg, with the token in it ({token}, {class} and {subject} work there too). The node "
                    "shows the captions.",
                ),
                io.Int.Input(
                    "resolution",
                    default=512,
                    min=MIN_RESOLUTION,
                    max=MAX_RESOLUTION,
                    step=8,
                    tooltip="Width and height of the training images in pixels: 512 for SD 1.5, 1024 for SDXL.",
                ),
                io.Combo.Input(
                    "crop",
                    options=list(CROPS),
                    default=CROPS[0],
                    tooltip="center: the largest centered square. pad: the whole photo, padded to a square. subject: a "
                    "square around the mask (transparency or a connected MASK), or center if there is none.",
                ),
                io.Image.Input("image", optional=True, tooltip="Photos from other nodes: a batch or a list."),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="For a connected IMAGE: white where the subject is, one mask per photo. Empty masks are "
                    "ignored. Load Image inverts transparency masks; add Invert Mask.",
                ),
                # Optional, so that API prompts from before this input still validate.
                io.String.Input(
                    NAME,
                    default="",
                    optional=True,
                    tooltip="Crop, caption and mask of single photos, set in the panel: "
                    '{"rex.jpg": {"crop": [x, y, size], "caption": "..."}} with the centre of the square as fractions '
                    "of width and height, and its side as a fraction of the shorter side. Photos without an entry "
                    "follow crop and captions.",
                ),
            ],
            outputs=[
                SubjectType.Output(display_name="subject", tooltip="The photos and captions, for training."),
                io.Image.Output(display_name="images", tooltip="The photos as training sees them: cropped and scaled."),
                io.String.Output(
                    display_name="instance_prompt",
                    tooltip='The template with its words filled in, as a prompt: "a photo of ohwx dog".',
                ),
                io.String.Output(
                    display_name="class_prompt",
                    tooltip='The class alone, as a prompt: "a photo of a dog". For comparisons without the subject.',
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )
        return presented(schema, SHOWN)

    @classmethod
    def validate_inputs(cls, images: Any = None, folder: Any = None, sample: Any = None) -> bool | str:
        """Check that the sources lead to images before anything runs. A linked input arrives as None and passes.

        ComfyUI repeats the error for each argument named here, so these are only the inputs that their own lists
        cannot check; :meth:`execute` checks the rest, and runs before any model is used.
        """
        try:
            source = Source.of(_first(images), _first(folder), _first(sample))
            source.check(may_be_none=True)
            source.paths()
        except SubjectBoothError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        """Changes with the content of the files, so that an edited photo or caption of the same name is read again."""
        given = {name: _first(value) for name, value in inputs.items()}
        try:
            paths = Source.of(given.get("images"), given.get("folder"), given.get("sample")).paths()
            captions = [caption_file_of(path) for path in paths if caption_file_of(path).is_file()]
            # If captions are not read, the node still reports which files exist.
            read = captions if given.get("captions") != CAPTIONS_TEMPLATE else [path.name for path in captions]
            masks = filter(None, map(mask_of, edits_of(given.get(NAME)).values()))
            return sha256_of(*paths, *read, *masks)
        except (SubjectBoothError, OSError) as error:
            return str(error)  # execute reports it to the user

    @classmethod
    @graph_messages()
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
        photo_edits: list[str] | None = None,
    ) -> io.NodeOutput:
        edits = edits_of(photo_edits[0] if photo_edits else "")
        source = Source.of(images[0], folder[0], sample[0], has_image=image is not None)
        source.check()
        if mask is not None and image is None:
            raise SubjectBoothError(
                "a MASK is connected without an IMAGE",
                "the photos that the mask belongs to",
                "connect the photos to image, or disconnect the mask",
                "mask",
            )
        from_files = captions[0] == CAPTIONS_FILES
        if captions[0] not in (CAPTIONS_TEMPLATE, CAPTIONS_FILES):
            raise SubjectBoothError(
                f"captions {captions[0]!r}",
                f'"{CAPTIONS_TEMPLATE}" or "{CAPTIONS_FILES}"',
                "choose one of them",
                "captions",
            )
        if image is not None:
            if from_files:
                raise SubjectBoothError(
                    "captions are set to caption files, but a connected IMAGE has no file names",
                    'captions set to "template", or photos from files',
                    "change captions, or use uploads or a folder",
                    "captions",
                )
            photos, notes = photos_of_tensors(image, mask)
            names = [photo.name for photo in photos]
            each = [edits.get(name, PhotoEdit()) for name in names]
            photos = [edited(photo, edit, mask_of(edit)) for photo, edit in zip(photos, each, strict=True)]
        else:
            paths = source.paths()
            names = source.names_in_edits(paths)
            each = [edits.get(name, PhotoEdit()) for name in names]
            masks = [mask_of(edit) for edit in each]
            photos, notes = read_photos(paths, "files" if from_files else "template", stop_if_cancelled, each, masks)
        subject = make_subject(
            photos,
            class_word=class_word[0] if class_word[0].strip() else source.sample_class_word(),
            token=token[0],
            resolution=resolution[0],
            crop=crop[0],
            prompt_template=prompt_template[0],
            tokenize=clip_tokenize(),
            notes=[*notes, *unused_note(edits, names)],
        )
        return _output(subject, cls.hidden.unique_id)


def _output(subject: Subject, node_id: str | None) -> io.NodeOutput:
    prepared = subject.prepare()
    # Shown in the user's order; training sorts them by content.
    positions = [prepared.order.index(index) for index in range(len(subject.photos))]
    shown = prepared.images[positions].permute(0, 2, 3, 1).contiguous()  # [n, r, r, 3]
    for warning in subject.warnings:
        log.warning("%s", warning)
    count = len(subject.photos)
    own = any(photo.caption != subject.instance_prompt for photo in subject.photos)
    words = "own captions" if own else f'"{subject.instance_prompt}"'
    text = f"{count} photo{'s' if count != 1 else ''} at {subject.resolution} px, {words}"
    captions = caption_lines(subject) if own else []
    Progress(node_id, 1).set_text("\n".join([text, *subject.warnings, *captions]))
    ui = {
        "images": [_preview(image) for image in shown],
        "text": [text, *subject.warnings, *captions],
        "warnings": list(subject.warnings),
    }
    # Escaped, so that a CLIP Text Encode gets exactly the words that were trained.
    prompts = (literal_prompt(subject.instance_prompt), literal_prompt(subject.class_prompt))
    return io.NodeOutput(subject, shown, *prompts, ui=ui)


def _preview(image: torch.Tensor) -> dict[str, str]:
    """A training image [r, r, 3] as a file in ComfyUI's temp folder, named by its content and written once."""
    pixels = (image * 255.0).round().to(torch.uint8).numpy()
    name = f"subject_{sha256_of(pixels.tobytes())[:24]}.png"
    path = Path(folder_paths.get_temp_directory()) / "subjectbooth" / name
    if not path.is_file():
        write_atomic(path, lambda beside: Image.fromarray(pixels).save(beside, compress_level=1))
    return {"filename": name, "subfolder": "subjectbooth", "type": "temp"}


@functools.lru_cache(maxsize=1)
def clip_tokenize() -> Callable[[str], list[int]] | None:
    """Text -> CLIP's BPE ids by ComfyUI's own tokenizer, without start and end tokens; None if it is unavailable."""
    try:
        from comfy.sd1_clip import SDTokenizer

        tokenizer = SDTokenizer().tokenizer
        return lambda text: list(tokenizer(text)["input_ids"][1:-1])
    except Exception:  # only the token check needs it, and other ComfyUI versions may move it
        log.warning("Could not load ComfyUI's CLIP tokenizer; the token is not checked.", exc_info=True)
        return None


class _UploadCombo(io.Combo.Input):
    """A combo whose upload button accepts several files. ComfyUI 0.3.75 has no argument for that."""

    def as_dict(self) -> dict[str, Any]:
        return {**super().as_dict(), "allow_batch": True}


def _first(value: Any) -> Any:
    """The value of a widget: with ``is_input_list`` each arrives in a list or, if linked, as ``(None,)``."""
    return value[0] if isinstance(value, list | tuple) and value else None
