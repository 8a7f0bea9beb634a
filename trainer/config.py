"""The settings of a training run: one frozen dataclass that is the run's key, its metadata and its CLI options."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from .errors import SubjectBoothError
from .files.storage import canonical_json, sha256_of

FORMAT_VERSION = 2
"""Part of every run's key: raised when the same settings would no longer give the same weights."""

AUTO = "auto"


def _setting(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    in_key: bool = True,
) -> Any:
    """A field that carries what the check, the CLI and the node's tooltip need to know about it."""
    return field(
        default=default,
        metadata={
            "help": help,
            "low": low,
            "high": high,
            "choices": choices,
            "in_key": in_key,
        },
    )


@dataclass(frozen=True)
class TrainConfig:
    """What the user asked for. ``auto`` stays ``auto`` here; what it became is kept beside the checkpoint.

    Raises:
        SubjectBoothError: on construction, for the first setting that is out of its range or of the wrong type.
    """

    steps: int = _setting(
        500,
        "Training steps (optimizer updates). Steps are counted, not epochs, so class images never make a run longer.",
        low=1,
        high=1_000_000,
    )
    learning_rate: float = _setting(1e-4, "Learning rate of the adapter's weights.", low=1e-9, high=1.0)
    rank: int = _setting(16, "Rank of the LoRA: how much it can learn, and how large its file is.", low=1, high=1024)
    network_alpha: float = _setting(
        16.0, "The adapter is scaled by network_alpha / rank. Equal to rank means a scale of 1.", low=1e-6, high=4096
    )
    train_batch_size: int = _setting(
        1, "Photos a step; with class priors as many class images are added.", low=1, high=256
    )
    gradient_accumulation_steps: int = _setting(
        1, "Batches summed up before each step: a larger batch for the memory of a small one.", low=1, high=1024
    )
    prior_loss_weight: float = _setting(
        1.0,
        "Weight of the class-preservation loss (lambda in the DreamBooth paper). Counts only with class priors.",
        low=0.0,
        high=100.0,
    )
    seed: int = _setting(
        0,
        "Seed of the adapter's first weights, the noise, the timesteps and the order of the photos.",
        low=0,
        high=2**64 - 1,
    )
    resolution: int = _setting(512, "Side of the training images in pixels, a multiple of 8.", low=16, high=4096)
    lr_scheduler: str = _setting(
        "constant", "How the learning rate goes on after the warm-up.", choices=("constant", "cosine", "linear")
    )
    lr_warmup_steps: int = _setting(0, "Steps over which the learning rate rises from 0.", low=0, high=1_000_000)
    max_grad_norm: float = _setting(
        1.0, "Gradients with a larger norm are scaled down to it. 0 turns this off.", low=0.0, high=1e6
    )
    gradient_checkpointing: str = _setting(
        AUTO,
        "Saves memory and costs about a third of the speed. auto: on where the memory is too small without it.",
        choices=(AUTO, "on", "off"),
        in_key=False,
    )
    precision: str = _setting(
        AUTO,
        "Precision of the base model; the adapter always is fp32. auto: bf16 where the card has it, else fp16, "
        "and fp32 on a CPU.",
        choices=(AUTO, "fp32", "fp16", "bf16"),
    )
    attention: str = _setting(
        AUTO,
        "How attention is computed. auto: torch's own sdpa. xformers needs the package of that name and an "
        "NVIDIA GPU; where it cannot be used, that is said and sdpa is used.",
        choices=(AUTO, "sdpa", "xformers"),
        in_key=False,
    )
    optimizer: str = _setting(
        "adamw",
        "adamw8bit needs bitsandbytes and a GPU, prodigy needs prodigyopt (and a learning rate of about 1). "
        "A missing package is said, and adamw is used.",
        choices=("adamw", "adamw8bit", "adafactor", "prodigy"),
    )
    weight_decay: float = _setting(0.01, "Weight decay of the adapter's weights.", low=0.0, high=10.0)
    lora_targets: str = _setting(
        "attention",
        "Layers that get a LoRA. attention: the projections of every attention; attention+mlp: the "
        "transformer blocks' MLPs besides; all: every linear and 1x1 layer of the UNet.",
        choices=("attention", "attention+mlp", "all"),
    )
    lora_dropout: float = _setting(
        0.0, "Share of the LoRA's inputs that is left out at each step, against overfitting.", low=0.0, high=0.99
    )
    use_rslora: bool = _setting(
        False, "Scale the adapter by network_alpha / sqrt(rank), which suits high ranks (arXiv 2312.03732)."
    )
    snr_gamma: float = _setting(
        0.0,
        "Min-SNR weighting of the timesteps (arXiv 2303.09556); the paper uses 5. 0 turns it off.",
        low=0.0,
        high=1000.0,
    )
    noise_offset: float = _setting(
        0.0,
        "Shifts the noise of whole pictures, so that very dark and bright ones can be learned. 0.05 is usual.",
        low=0.0,
        high=1.0,
    )
    masked_loss: bool = _setting(
        False, "Count only the masked part of each photo (a MASK, or the photo's transparency)."
    )
    caption_dropout: float = _setting(
        0.0, "Share of the photos that are shown with an empty prompt.", low=0.0, high=1.0
    )
    flip: bool = _setting(
        False, "Also show the photos mirrored. Not for subjects with a left and a right, or with writing on them."
    )
    ema_decay: float = _setting(
        0.0,
        "Save a running average of the adapter (EMA). 0.99 averages over some hundred steps; a run shorter than "
        "that averages over its last tenth or so (warm-up). 0 turns it off.",
        low=0.0,
        high=0.99999,
    )
    train_text_encoder: bool = _setting(
        False, "Train a LoRA for the text encoder(s) too. Learns the subject's name better, and forgets sooner."
    )
    text_encoder_lr: float = _setting(5e-5, "Learning rate of the text encoder's LoRA.", low=1e-9, high=1.0)
    text_encoder_share: float = _setting(
        1.0,
        "Share of the steps in which the text encoder's LoRA is trained; after them it stays as it is.",
        low=0.0,
        high=1.0,
    )
    enable_bucket: bool = _setting(
        False,
        "Aspect-ratio buckets: photos keep about their own shape, at the area of resolution, in place of a "
        "square. Class images stay square.",
    )
    pictures_per_forward: int = _setting(
        0,
        "Photos and class images at once; the rest of a batch follows, with the gradients summed up. Changes memory "
        "and speed only (with lora_dropout also what is left out). 0: as many as fit.",
        low=0,
        high=512,
        in_key=False,
    )
    validation_prompts: tuple[str, ...] = _setting(
        (), "Prompts drawn while training. {subject} becomes the trained words.", in_key=False
    )
    validation_interval: int = _setting(
        100, "Steps between validation pictures. 0: at the end only.", low=0, high=1_000_000, in_key=False
    )
    validation_steps: int = _setting(20, "Sampling steps of a validation picture.", low=1, high=1000, in_key=False)
    validation_guidance_scale: float = _setting(
        7.0, "Classifier-free guidance of the validation pictures.", low=1.0, high=100.0, in_key=False
    )
    checkpoint_seconds: float = _setting(
        60.0, "At most this much work is lost when the program is killed, in seconds.", low=0.0, high=1e6, in_key=False
    )

    def __post_init__(self) -> None:
        for setting in dataclasses.fields(self):
            _check(setting, getattr(self, setting.name))
        if self.resolution % 8:
            raise SubjectBoothError(
                f"resolution {self.resolution}",
                "a multiple of 8 (latents are 8 times smaller than pixels)",
                f"use {self.resolution // 8 * 8}",
                "resolution",
            )
        if self.lr_warmup_steps > self.steps:
            raise SubjectBoothError(
                f"lr_warmup_steps {self.lr_warmup_steps} with {self.steps} steps",
                "no more than steps",
                "lower lr_warmup_steps or raise steps",
                "lr_warmup_steps",
            )

    def lr_at(self, step: int) -> float:
        """Learning rate of the update number ``step``, counted from 0. A function of the step alone: nothing to save.

        The warm-up is linear and reaches the full rate at step ``lr_warmup_steps``; cosine and linear then fall to 0
        at the end of the run.
        """
        if step < self.lr_warmup_steps:
            return self.learning_rate * (step + 1) / (self.lr_warmup_steps + 1)
        if self.lr_scheduler == "constant":
            return self.learning_rate
        progress = (step - self.lr_warmup_steps) / max(1, self.steps - self.lr_warmup_steps)
        if self.lr_scheduler == "linear":
            return self.learning_rate * (1.0 - progress)
        return self.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))

    @property
    def steps_that_train_text(self) -> int:
        """After so many steps the text encoder's LoRA stays as it is."""
        return math.ceil(self.text_encoder_share * self.steps) if self.train_text_encoder else 0

    def validation_is_due(self, step: int) -> bool:
        """Whether validation pictures follow the update after which ``step`` are done."""
        if not self.validation_prompts:
            return False
        return step == self.steps or bool(self.validation_interval and step % self.validation_interval == 0)

    def validations_after(self, step: int) -> int:
        """How many times pictures are still due after ``step`` updates."""
        if not self.validation_prompts or step >= self.steps:
            return 0
        if not self.validation_interval:
            return 1
        regular = self.steps // self.validation_interval - step // self.validation_interval
        return regular + (self.steps % self.validation_interval != 0)

    def key_fields(self) -> dict[str, Any]:
        """The settings that change the weights.

        Where no weight depends on where the run ends, ``steps`` is not one of them: more steps go on from there.
        """
        chosen = {s.name: getattr(self, s.name) for s in dataclasses.fields(self) if s.metadata["in_key"]}
        if not self.train_text_encoder:
            del chosen["text_encoder_lr"], chosen["text_encoder_share"]
        elif self.lora_dropout and self.steps_that_train_text < self.steps:
            chosen["text_encoder_share_without_dropout"] = True  # before, dropout went on after the share
        if not self.enable_bucket:
            del chosen["enable_bucket"]  # runs from before there were buckets are found again
        if self.ema_decay:
            chosen["ema_warm_up"] = True  # without it the same decay saved other weights
        if self.lr_scheduler == "constant" and not (self.train_text_encoder and self.text_encoder_share < 1.0):
            del chosen["steps"]
        return chosen

    def to_json(self) -> dict[str, Any]:
        """All settings as plain JSON values; :meth:`from_json` reads them back."""
        values = dataclasses.asdict(self)
        values["validation_prompts"] = list(self.validation_prompts)
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainConfig:
        """Read what :meth:`to_json` wrote.

        Raises:
            SubjectBoothError: a name that is no setting, or a value out of range.
        """
        names = {s.name for s in dataclasses.fields(cls)}
        unknown = sorted(set(values) - names)
        if unknown:
            raise SubjectBoothError(
                f"unknown setting {unknown[0]!r}", f"one of {', '.join(sorted(names))}", "correct the name"
            )
        prompts = tuple(values.get("validation_prompts", ()))
        return cls(**{**values, "validation_prompts": prompts})


def run_key(
    config: TrainConfig,
    subject_digest: str,
    base_digest: str,
    preservation: str | None,
    trigger: str = "",
) -> str:
    """Name of a run: 64 hex digits that change when, and only when, what it ends with would.

    Args:
        config: the requested settings.
        subject_digest: over the prepared photos' pixels, masks and captions.
        base_digest: over the base's weights (patches included), noise schedule and prompt encoder.
        preservation: what of the way to keep the class changes the weights (of class images, the digest of their
            latents); None where there is nothing.
        trigger: the trained words, which the file tells every loader. Captions of one's own need not hold them.
    """
    fields = config.key_fields()
    if preservation is None:
        del fields["prior_loss_weight"]
    return sha256_of(
        canonical_json(
            {
                "format": FORMAT_VERSION,
                "config": fields,
                "subject": subject_digest,
                "base": base_digest,
                "priors": preservation,
                "trigger": trigger,
            }
        )
    )


def _check(setting: dataclasses.Field[Any], value: Any) -> None:
    name, meta = setting.name, setting.metadata
    if meta["choices"]:
        if value not in meta["choices"]:
            raise SubjectBoothError(
                f"{name} {value!r}", "one of " + ", ".join(meta["choices"]), "choose one of them", name
            )
        return
    if name == "validation_prompts":
        if not isinstance(value, tuple) or not all(isinstance(prompt, str) for prompt in value):
            raise SubjectBoothError(f"{name} {value!r}", "a tuple of strings", "give one prompt a line", name)
        return
    if isinstance(setting.default, bool):
        if not isinstance(value, bool):
            raise SubjectBoothError(f"{name} {value!r}", "true or false", "choose one of them", name)
        return
    whole = isinstance(setting.default, int)
    kind = "a whole number" if whole else "a number"
    wanted = f"{kind} from {meta['low']:g} to {meta['high']:g}"
    is_number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not meta["low"] <= value <= meta["high"]:
        raise SubjectBoothError(f"{name} {value!r}", wanted, f"set {name} within that range", name)
