"""GenerateClassPriors: class images sampled by the connected base, stored as latents."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from comfy.model_patcher import ModelPatcher
from comfy.sd import CLIP, VAE
from comfy_api.latest import io
from PIL import Image
from server import PromptServer

from ..trainer.preserve.priors import (
    PriorRecipe,
    PriorStore,
    batches_to_make,
    class_priors,
    make_missing,
    parse_exclude,
    picture_hash,
    split_excluded,
)
from ..trainer.subject.captions import DEFAULT_CLASS_TEMPLATE, check_template, check_text, fill_template
from ..trainer.subject.subject import Subject
from .album import Album
from .base import check_base
from .bridge import base_digest, latent_factor
from .downstream import check_trainers
from .graph_terms import graph_messages
from .host import Progress, grid, pack_output_dir, place_of, readable_seconds, view_entry
from .presentation import presented
from .sampling import BATCH_INDEPENDENT, PictureSampler, automatic_batch_size, check_choices, sampler_inputs
from .types import CATEGORY, ClassPriorsType, SubjectType

log = logging.getLogger("subjectbooth")

EVENT = "subjectbooth.class_images"
MOST_SHOWN = 200
"""Maximum number of images in one message to the panel."""

DEFAULT_COUNT = 8
"""Enough to see whether the class stays as it was, and curvature keeps it without more. For ``class_images``, 24 at 20
steps cost 0.8 PFLOP on SD 1.5, as much as 450 training steps; the 200 at 50 steps of most guides cost eight times as
much as a whole run of 1,200 steps. More can be added at any time; existing ones are reused."""

SHOWN = ("class_prompt", "count", "steps", "cfg")
"""Inputs in sight; the others are under the editor's "advanced inputs"."""

CLASS_CFG = 1.0
"""Measured on the demo base (docs/demo-base-log.md): with class images of cfg 1, 2 and 4, the subject gained 0.87, 0.68
and 0.77, and new scenes 0.82, 0.69 and 0.65. Guidance draws more contrast than the model has learned."""


class GenerateClassPriors(io.ComfyNode):
    """Generates class images with ComfyUI's own sampler, or reuses those on the disk.

    An output node, so that the images can be generated and reviewed before training.
    """

    @classmethod
    def define_schema(cls) -> io.Schema:
        """The node as ComfyUI shows it. Inputs are appended, never inserted: workflows store values by position."""
        schema = io.Schema(
            node_id="GenerateClassPriors",
            display_name="Generate Class Priors (DreamBooth)",
            category=CATEGORY,
            description="Generates ordinary images of the class: to compare before and after training, and to keep the "
            "class with preservation class_images. Finished images are kept: a cancelled run resumes where it stopped, "
            "and the same images are never generated twice.",
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model to train on: use the one connected to the trainer."),
                io.Clip.Input("clip", tooltip="Its text encoder."),
                io.Vae.Input("vae", tooltip="Decodes the images for viewing; training uses the latents."),
                SubjectType.Input("subject", tooltip="Sets the class and the size of the images."),
                io.String.Input(
                    "class_prompt",
                    default=DEFAULT_CLASS_TEMPLATE,
                    tooltip='Prompt for the images. {class} is filled in, and "a" becomes "an" where needed.',
                ),
                io.String.Input("negative", default="", tooltip="Negative prompt: what the images should not show."),
                io.Int.Input(
                    "count",
                    default=DEFAULT_COUNT,
                    min=1,
                    max=10_000,
                    tooltip=f"Number of images. {DEFAULT_COUNT} are enough to compare. With preservation class_images, "
                    "use more: 24 take about as long as 450 training steps, and 100 to 200 preserve the class better. "
                    "You can raise it at any time: finished images are reused.",
                ),
                *sampler_inputs(
                    "image",
                    cfg=" Leave it at 1: the images then show what the base itself has learned, which preserves the "
                    "class best, in half the time. Higher values look better and preserve it worse.",
                    usual_cfg=CLASS_CFG,
                    sampler_name=" With ancestral and SDE samplers, an image also depends on batch_size.",
                    seed="Seed of the first image; each further image uses the next seed. Another seed gives new "
                    "images.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=0,
                    min=0,
                    max=64,
                    tooltip="Images per batch. 0: as many as fit into free memory, up to 4; always 4 with ancestral "
                    "and SDE samplers, whose images depend on it. Lower it if you run out of memory.",
                ),
                io.String.Input(
                    "exclude",
                    default="",
                    multiline=True,
                    tooltip="Hashes of images to exclude, separated by spaces or commas. The node's output lists the "
                    "hashes. Excluded images are not replaced.",
                ),
            ],
            outputs=[
                ClassPriorsType.Output(display_name="class_priors", tooltip="The latents of the images, for training."),
                io.Image.Output(display_name="images", tooltip="The images in use, for viewing."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo, io.Hidden.prompt],
        )
        return presented(schema, SHOWN)

    @classmethod
    @graph_messages()
    def execute(
        cls,
        model: ModelPatcher,
        clip: CLIP,
        vae: VAE,
        subject: Subject,
        class_prompt: str,
        negative: str,
        count: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        seed: int,
        batch_size: int,
        exclude: str,
    ) -> io.NodeOutput:
        family = check_base(model, clip, vae)  # what the trainer would reject is rejected before an image is made
        check_choices(sampler_name, scheduler, cfg)
        batch_size = batch_size or automatic_batch_size(model, subject.resolution, latent_factor(vae), sampler_name)
        template = check_template(class_prompt, needs_token=False, name="class_prompt")
        excluded = parse_exclude(exclude)
        recipe = PriorRecipe(
            base_digest=base_digest(model, clip),
            prompt=fill_template(template, subject.token, subject.class_word),
            negative=check_text(negative, "negative"),
            width=subject.resolution,
            height=subject.resolution,
            sampler_name=sampler_name,
            scheduler=scheduler,
            steps=steps,
            cfg=cfg,
            seed=seed,
            grouping=0 if sampler_name in BATCH_INDEPENDENT else batch_size,
        )
        store = PriorStore(pack_output_dir() / "class_images", recipe, latent_factor(vae))
        pictures, notes = store.load()
        if batches_to_make(pictures.keys(), count, batch_size, recipe.grouping):
            check_trainers(cls.hidden.prompt, cls.hidden.unique_id, model, clip, vae, subject, recipe.prompt)
        album = Album(store.path, model, vae)
        place = place_of(cls.hidden)
        made = _sample_missing(store, pictures, count, batch_size, model, clip, vae, album, place, notes)
        used, left_out = split_excluded(pictures, count, excluded)
        priors = class_priors(pictures, used, store, family)
        unknown = [part for part in excluded if not any(value.startswith(part) for value in left_out.values())]
        if unknown:
            notes.append(f"{len(unknown)} of {len(excluded)} hashes in exclude do not match any of these images.")
        text = f'{len(used)} class images ready ({made} new), "{recipe.prompt}"'
        text += f", {len(left_out)} excluded" if left_out else ""
        for note in notes:
            log.warning("%s", note)
        shown = album.paths(pictures, range(count), batch_size)
        Progress(place["node"], 1).set_text("\n".join([text, *notes]))
        ui = {
            "images": [view_entry(shown[index]) for index in used],
            "hashes": list(used.values()),
            "excluded_images": [view_entry(shown[index]) for index in left_out],
            "excluded_hashes": list(left_out.values()),
            "folder": [store.path.name],
            "made": [made],
            "text": [text, *notes],
        }
        return io.NodeOutput(priors, album.read([shown[index] for index in used]), ui=ui)


def _sample_missing(
    store: PriorStore,
    pictures: dict[int, torch.Tensor],
    count: int,
    batch_size: int,
    model: ModelPatcher,
    clip: CLIP,
    vae: VAE,
    album: Album,
    place: dict[str, str],
    notes: list[str],
) -> int:
    """Sample the missing images; return their number. Does not touch the models if none is missing."""
    recipe = store.recipe
    todo = batches_to_make(pictures.keys(), count, batch_size, recipe.grouping)
    if not todo:
        return 0
    sampler = PictureSampler.of_recipe(model, clip, recipe, latent_factor=latent_factor(vae))
    if sampler.dropped:
        dropped = ", ".join(sampler.dropped)
        notes.append(f"Guidance and attention patches on MODEL ({dropped}) are not used for class images.")
    progress = Progress(place["node"], len(todo) * recipe.steps)
    started = time.monotonic()
    done = 0  # batches

    def sample(batch: tuple[int, ...]) -> torch.Tensor:
        def on_step(step: int, total: int, preview: Image.Image | None) -> None:
            part = done + min(1.0, step / max(1, total))
            left = (time.monotonic() - started) / part * (len(todo) - part)
            text = f"class images {batch[0] + 1}-{batch[-1] + 1} of {count}, step {step}/{total}, "
            progress.update(round(part * recipe.steps), text + f"{readable_seconds(left)} left", preview)

        return sampler.sample([recipe.seed_of(index) for index in batch], on_step)

    made = 0
    found = sorted(index for index in pictures if index < count)
    _send_progress(place, store, pictures, album.paths(pictures, found, batch_size), count, made)
    for batch in make_missing(store, pictures, count, batch_size, sample):
        done += 1
        made += len(batch)
        paths = album.paths(pictures, batch, batch_size)
        progress.update(done * recipe.steps, preview=grid(album.read(list(paths.values()))))
        _send_progress(place, store, pictures, paths, count, made)
    return made


def _send_progress(
    place: dict[str, str],
    store: PriorStore,
    pictures: Mapping[int, torch.Tensor],
    paths: Mapping[int, Path],
    count: int,
    made: int,
) -> None:
    """Send the node's panel the images so far: once per batch, so never more than a few times per second."""
    message = {
        **place,
        "folder": store.path.name,
        "pictures": [
            {"hash": picture_hash(pictures[index])[:32], **view_entry(paths[index])}
            for index in list(paths)[:MOST_SHOWN]
        ],
        "done": sum(index < count for index in pictures),
        "count": count,
        "made": made,
    }
    PromptServer.instance.send_sync(EVENT, message, PromptServer.instance.client_id)
