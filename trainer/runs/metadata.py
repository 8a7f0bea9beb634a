"""The metadata of a LoRA file.

kohya's ``ss_*`` keys are shown by A1111, Forge and LoRA managers; ``modelspec.*`` is Stability's ModelSpec 1.0.1;
``subjectbooth.*`` is read by ApplySubjectLoRA. For privacy, the only user data are the prompts' words and the name of
the LoRA: no photos, no paths, no names of photo files.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping

from ..base.base_model import BaseModel
from ..config import AUTO, TrainConfig
from ..learn.adapter import file_alpha
from ..machine.resolved_settings import ResolvedSettings
from ..subject.subject import Subject

IMPLEMENTATION = "SubjectBooth"


def base_name(metadata: Mapping[str, str]) -> str:
    """The family of a base ("sd_v1", "sdxl_base_v1-0", "flux-1-dev"), from the metadata of its denoiser or of a LoRA.

    It is empty if they do not name it.
    """
    return metadata.get("ss_base_model_version") or metadata.get("modelspec.architecture", "").removesuffix("/lora")


def lora_metadata(
    body_hash: str,
    subject: Subject,
    base: BaseModel,
    config: TrainConfig,
    *,
    step: int,
    run_key: str,
    started: float,
    preservation: Mapping[str, str],
    chosen: ResolvedSettings,
    buckets: Mapping[str, int],
) -> dict[str, str]:
    """All metadata except the file's name, which :func:`with_output_name` adds.

    Args:
        body_hash: hash of the file's tensors, by which other tools look up models.
        subject: the trained subject.
        base: the base model.
        config: the requested settings.
        step: optimizer updates done.
        run_key: 64 hex digits.
        started: Unix time of the run's first start.
        preservation: metadata of the method of class preservation.
        chosen: the resolved values of ``auto`` settings.
        buckets: number of photos by size ("512x512"); one size without aspect-ratio buckets.
    """
    photos = len(subject.photos)
    resolution = f"({config.resolution}, {config.resolution})"
    date = datetime.datetime.fromtimestamp(int(started), datetime.timezone.utc)
    subset = {"class_tokens": subject.trigger, "image_count": photos, "is_reg": False, "num_repeats": 1}
    return {
        **base.denoiser.metadata,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(config.rank),
        "ss_network_alpha": repr(file_alpha(config)),
        "ss_network_dropout": f"{config.lora_dropout:g}",
        "ss_steps": str(step),
        "ss_max_train_steps": str(config.steps),
        "ss_learning_rate": f"{config.learning_rate:g}",
        "ss_unet_lr": f"{config.learning_rate:g}",
        "ss_lr_scheduler": config.lr_scheduler,
        "ss_lr_warmup_steps": str(config.lr_warmup_steps),
        "ss_seed": str(config.seed),
        "ss_optimizer": chosen.optimizer,
        "ss_mixed_precision": {"fp32": "no"}.get(chosen.precision, chosen.precision),
        "ss_gradient_checkpointing": str(chosen.gradient_checkpointing),
        "ss_enable_bucket": str(config.enable_bucket),
        "ss_bucket_info": json.dumps(
            {
                "buckets": {
                    str(number): {"resolution": [int(side) for side in size.split("x")], "count": count}
                    for number, (size, count) in enumerate(buckets.items())
                }
            }
        ),
        "ss_min_snr_gamma": f"{config.snr_gamma:g}",
        "ss_noise_offset": f"{config.noise_offset:g}",
        "ss_caption_dropout_rate": f"{config.caption_dropout:g}",
        "ss_prior_loss_weight": f"{config.prior_loss_weight:g}",
        "ss_num_train_images": str(photos),
        **preservation,
        "ss_resolution": resolution,
        "ss_clip_skip": str(base.text.clip_skip if base.text is not None else 1),
        "ss_text_encoder_lr": f"{config.text_encoder_lr:g}" if config.train_text_encoder else "None",
        "ss_batch_size_per_device": str(config.train_batch_size),
        "ss_gradient_accumulation_steps": str(config.gradient_accumulation_steps),
        "ss_training_started_at": f"{int(started)}.0",
        "ss_tag_frequency": json.dumps({"subject": {subject.trigger: photos}}, ensure_ascii=False),
        "ss_datasets": json.dumps([{"subsets": [subset], "resolution": [config.resolution] * 2}], ensure_ascii=False),
        "sshs_model_hash": body_hash,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.implementation": IMPLEMENTATION,
        "modelspec.resolution": f"{config.resolution}x{config.resolution}",
        "modelspec.date": date.isoformat().replace("+00:00", "Z"),
        "modelspec.trigger_phrase": subject.trigger,
        "modelspec.usage_hint": f"Write {subject.trigger!r} where the subject is meant: {subject.instance_prompt}",
        "modelspec.hash_sha256": f"0x{body_hash}",
        "subjectbooth.run_key": run_key,
        "subjectbooth.base_digest": base.digest,
        "subjectbooth.token": subject.token,
        "subjectbooth.class_word": subject.class_word,
        "subjectbooth.trigger": subject.trigger,
        "subjectbooth.instance_prompt": subject.instance_prompt,
        "subjectbooth.class_prompt": subject.class_prompt,
        "subjectbooth.step": str(step),
        **_times(config),
        **{
            f"subjectbooth.{name}": value
            for name, value in chosen.as_settings().items()
            if name in ("precision", "gradient_checkpointing", "pictures_per_forward")
        },
    }


def _times(config: TrainConfig) -> dict[str, str]:
    """The requested noise levels; nothing for the usual ones."""
    found = {}
    if config.timestep_sampling != AUTO:
        found["subjectbooth.timestep_sampling"] = config.timestep_sampling
    if config.timestep_shift:
        found["subjectbooth.timestep_shift"] = f"{config.timestep_shift:g}"
    return found


def with_output_name(metadata: dict[str, str], output_name: str) -> dict[str, str]:
    """Add the name under which the file is published, which A1111 accepts as an alias in prompts."""
    return {**metadata, "ss_output_name": output_name, "modelspec.title": output_name}
