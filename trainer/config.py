"""The settings of a training run: one frozen dataclass, the source of the run key, the metadata and the CLI options."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from .errors import SubjectBoothError, check_choice
from .files.storage import canonical_json, sha256_of

FORMAT_VERSION = 2
"""Part of every run key: increased when the same settings no longer give the same weights."""

AUTO = "auto"

MOST_KEPT = 32
"""Most adapters that a run keeps at a regular interval: 0.4 GB for SD 1.5 at rank 16, 3 GB for SDXL."""


def _setting(
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    in_key: bool = True,
) -> Any:
    """A dataclass field with the metadata for its check, its CLI option and its tooltip."""
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
    """The requested settings. ``auto`` stays ``auto`` here; its resolved value is saved with the checkpoint.

    Raises:
        SubjectBoothError: on construction, for the first setting that is out of range or of the wrong type.
    """

    steps: int = _setting(
        500,
        "Optimizer updates. Steps are counted, not epochs, so class images do not make a run longer.",
        low=1,
        high=1_000_000,
    )
    learning_rate: float = _setting(1e-4, "Learning rate of the LoRA.", low=1e-9, high=1.0)
    rank: int = _setting(
        16, "Rank of the LoRA. A higher rank can learn more and makes a larger file.", low=1, high=1024
    )
    network_alpha: float = _setting(
        16.0, "The LoRA is scaled by network_alpha / rank. Equal to rank means a scale of 1.", low=1e-6, high=4096
    )
    train_batch_size: int = _setting(
        1, "Photos per step. With preservation class_images, the same number of class images is added.", low=1, high=256
    )
    gradient_accumulation_steps: int = _setting(
        1,
        "Batches whose gradients are averaged for one step: the effect of a larger batch at the memory cost of "
        "a small one.",
        low=1,
        high=1024,
    )
    prior_loss_weight: float = _setting(
        1.0,
        "Strength of class preservation: 1 is the default strength of each method, 0 none. For class images, it is the "
        "weight of the prior-preservation loss (lambda in the DreamBooth paper).",
        low=0.0,
        high=100.0,
    )
    seed: int = _setting(
        0,
        "Seed for the initial LoRA weights, the noise, the timesteps and the order of the photos.",
        low=0,
        high=2**64 - 1,
    )
    resolution: int = _setting(
        512, "Width and height of the training images in pixels, a multiple of 8.", low=16, high=4096
    )
    lr_scheduler: str = _setting(
        "constant", "Learning rate schedule after the warm-up.", choices=("constant", "cosine", "linear")
    )
    lr_warmup_steps: int = _setting(
        0, "Steps over which the learning rate rises linearly from 0.", low=0, high=1_000_000
    )
    max_grad_norm: float = _setting(
        1.0, "Gradient clipping: gradients with a larger norm are scaled down to it. 0: off.", low=0.0, high=1e6
    )
    gradient_checkpointing: str = _setting(
        AUTO,
        "Saves memory at the cost of about a third of the speed. auto: on if training would not fit into memory "
        "without it.",
        choices=(AUTO, "on", "off"),
        in_key=False,
    )
    precision: str = _setting(
        AUTO,
        "Precision of the base model; the LoRA is always trained in fp32. auto: bf16 if the GPU supports it, "
        "otherwise fp16; fp32 on a CPU.",
        choices=(AUTO, "fp32", "fp16", "bf16"),
    )
    attention: str = _setting(
        AUTO,
        "Attention implementation. auto: PyTorch's sdpa. xformers needs the xformers package and an NVIDIA GPU; "
        "if it is unavailable, you are told and sdpa is used.",
        choices=(AUTO, "sdpa", "xformers"),
        in_key=False,
    )
    optimizer: str = _setting(
        "adamw",
        "adamw8bit needs bitsandbytes and a GPU; prodigy needs prodigyopt and a learning rate of about 1. "
        "If the package is missing, you are told and adamw is used.",
        choices=("adamw", "adamw8bit", "adafactor", "prodigy"),
    )
    weight_decay: float = _setting(0.01, "Weight decay of the LoRA.", low=0.0, high=10.0)
    lora_targets: str = _setting(
        "attention",
        "Layers that get a LoRA. attention: all attention projections; attention+mlp: the MLPs of the transformer "
        "blocks as well; all: every linear layer and 1x1 convolution of the network.",
        choices=("attention", "attention+mlp", "all"),
    )
    lora_dropout: float = _setting(
        0.0, "Fraction of the LoRA's inputs dropped at each step, to reduce overfitting.", low=0.0, high=0.99
    )
    use_rslora: bool = _setting(
        False, "Rank-stabilised LoRA: scale by network_alpha / sqrt(rank), for high ranks (arXiv 2312.03732)."
    )
    snr_gamma: float = _setting(
        0.0,
        "Min-SNR weighting of the timesteps (arXiv 2303.09556); the paper uses 5. 0: off.",
        low=0.0,
        high=1000.0,
    )
    noise_offset: float = _setting(
        0.0,
        "Adds an offset to the noise of each image, so that very dark and very bright images can be learned. "
        "0.05 is common. 0: off.",
        low=0.0,
        high=1.0,
    )
    masked_loss: bool = _setting(False, "Train only on the masked part of each photo (its mask, or its transparency).")
    caption_dropout: float = _setting(
        0.0, "Fraction of the photos that are trained with an empty prompt.", low=0.0, high=1.0
    )
    flip: bool = _setting(
        False, "Also train on mirrored photos. Not for asymmetric subjects, or subjects with text on them."
    )
    ema_decay: float = _setting(
        0.0,
        "Save an exponential moving average (EMA) of the LoRA. 0.99 averages over a few hundred steps; a shorter run "
        "averages over about its last tenth (warm-up). 0: off.",
        low=0.0,
        high=0.99999,
    )
    train_text_encoder: bool = _setting(
        False,
        "Also train a LoRA for the text encoder(s). It learns the token better, but forgets other things sooner.",
    )
    text_encoder_lr: float = _setting(5e-5, "Learning rate of the text encoder LoRA.", low=1e-9, high=1.0)
    text_encoder_share: float = _setting(
        1.0,
        "Fraction of the steps for which the text encoder LoRA is trained; then it is frozen.",
        low=0.0,
        high=1.0,
    )
    enable_bucket: bool = _setting(
        False,
        "Aspect-ratio bucketing: photos keep roughly their own aspect ratio, with the same area as a square of "
        "the given resolution. Class images stay square.",
    )
    pictures_per_forward: int = _setting(
        0,
        "Micro-batch: how many photos and class images go through the model at once. The gradients of a batch are "
        "summed over its micro-batches, so this only affects memory and speed (with lora_dropout, also which inputs "
        "are dropped). 0: as many as fit into memory.",
        low=0,
        high=512,
        in_key=False,
    )
    validation_prompts: tuple[str, ...] = _setting(
        (), "Prompts sampled during training. {subject} is replaced by the trained words.", in_key=False
    )
    validation_interval: int = _setting(
        100,
        "Steps between scores and validation images. The LoRA of these steps is kept, with or without images. 0: only "
        "at the end.",
        low=0,
        high=1_000_000,
        in_key=False,
    )
    # 12: with more, the images would be more than a tenth of a default run.
    validation_steps: int = _setting(12, "Sampling steps per validation image.", low=1, high=1000, in_key=False)
    validation_guidance_scale: float = _setting(
        0.0,
        "Classifier-free guidance scale (CFG) for validation images. 0: what is usual for the model, 7 for Stable "
        "Diffusion. 1: no guidance.",
        low=0.0,
        high=100.0,
        in_key=False,
    )
    keep: str = _setting(
        "last",
        "Which step of a finished run is its result. last: the last one. best: of the steps whose LoRA is kept, the "
        "one whose scores balance subject and new scenes best (docs/best-step.md).",
        choices=("best", "last"),
        in_key=False,
    )
    checkpoint_seconds: float = _setting(
        60.0,
        "Seconds between checkpoints: at most this much work is lost if the program is killed.",
        low=0.0,
        high=1e6,
        in_key=False,
    )
    compile: str = _setting(
        AUTO,
        "torch.compile for the model's repeated blocks: faster steps after a minute of compiling. auto: on with an "
        "NVIDIA GPU in runs that are long enough for it to pay (8,000 steps at 512 pixels, 2,000 at 1024). If it "
        "fails, you are told and the run goes on without it. Only where Stable Diffusion is trained on a copy: from a "
        "shell, and with train_text_encoder.",
        choices=(AUTO, "on", "off"),
        in_key=False,
    )
    timestep_sampling: str = _setting(
        AUTO,
        "Noise levels to train at. auto: those that are usual for the model, uniform for Stable Diffusion and "
        "logit_normal for most others. logit_normal: mostly in the middle (arXiv 2403.03206). uniform: all alike.",
        choices=(AUTO, "uniform", "logit_normal"),
    )
    timestep_shift: float = _setting(
        0.0,
        "Shifts the noise levels to train at: a shift greater than 1 towards more noise (arXiv 2403.03206, "
        "equation 23). 0: the model's own, or what is usual for it.",
        low=0.0,
        high=100.0,
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

    def guidance_scale(self, usual: float) -> float:
        """The guidance of validation images.

        Args:
            usual: that of the model, see :class:`trainer.base.denoiser.Denoiser`.
        """
        return self.validation_guidance_scale or usual

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of update ``step``, counted from 0. It depends only on the step, so there is no state to save.

        The warm-up is linear and reaches the full rate at step ``lr_warmup_steps``; cosine and linear then decay to 0
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
    def text_encoder_steps(self) -> int:
        """Number of steps for which the text encoder's LoRA is trained, before it is frozen."""
        return math.ceil(self.text_encoder_share * self.steps) if self.train_text_encoder else 0

    def validation_is_due(self, step: int) -> bool:
        """Whether to sample validation images once ``step`` updates are done."""
        if not self.validation_prompts:
            return False
        return step == self.steps or bool(self.validation_interval and step % self.validation_interval == 0)

    @property
    def kept_interval(self) -> int:
        """Steps between the adapters that a run keeps, with or without validation images; 0: only the last one.

        It is ``validation_interval``, doubled until they are at most :data:`MOST_KEPT`.
        """
        interval = self.validation_interval
        while interval and self.steps // interval > MOST_KEPT:
            interval *= 2
        return interval

    def step_is_kept(self, step: int) -> bool:
        """Whether the run keeps the adapter of ``step``, so that it can become the result."""
        return step == self.steps or bool(self.kept_interval and step % self.kept_interval == 0)

    def validations_left(self, step: int) -> int:
        """How many more times validation images will be sampled after ``step`` updates."""
        if not self.validation_prompts or step >= self.steps:
            return 0
        if not self.validation_interval:
            return 1
        regular = self.steps // self.validation_interval - step // self.validation_interval
        return regular + (self.steps % self.validation_interval != 0)

    def key_fields(self) -> dict[str, Any]:
        """The settings that affect the weights.

        ``steps`` is left out if no weight depends on where the run ends, so that more steps continue the run.
        """
        chosen = {s.name: getattr(self, s.name) for s in dataclasses.fields(self) if s.metadata["in_key"]}
        if not self.train_text_encoder:
            del chosen["text_encoder_lr"], chosen["text_encoder_share"]
        elif self.lora_dropout and self.text_encoder_steps < self.steps:
            chosen["text_encoder_share_without_dropout"] = True  # older versions kept dropout on once it was frozen
        if not self.enable_bucket:
            del chosen["enable_bucket"]  # keeps the keys of runs from before buckets existed
        if self.timestep_sampling == AUTO:
            del chosen["timestep_sampling"]  # as runs from before these settings
        if not self.timestep_shift:
            del chosen["timestep_shift"]
        if self.ema_decay:
            chosen["ema_warm_up"] = True  # older versions, without the warm-up, saved other weights
        if self.lr_scheduler == "constant" and not (self.train_text_encoder and self.text_encoder_share < 1.0):
            del chosen["steps"]
        return chosen

    def to_json(self) -> dict[str, Any]:
        """All settings as JSON values; the inverse of :meth:`from_json`."""
        values = dataclasses.asdict(self)
        values["validation_prompts"] = list(self.validation_prompts)
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainConfig:
        """The inverse of :meth:`to_json`.

        Raises:
            SubjectBoothError: an unknown setting, or a value out of range.
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
    rounding: int = 0,
) -> str:
    """Key of a run: a hash (64 hex digits) of everything that affects its result, and nothing else.

    Args:
        config: the requested settings.
        subject_digest: digest of the prepared photos' pixels, masks and captions.
        base_digest: digest of the base's weights (including patches), noise schedule and prompt encoder.
        preservation: what affects the weights about class preservation (for class images, the digest of their
            latents); None without it.
        rounding: increased for runs whose weights a newer version rounds in another way, see
            :func:`trainer.machine.runtime.rounding`; 0 for the others.
        trigger: the trigger words, which are stored in the LoRA file. User captions do not have to contain them.
    """
    fields = config.key_fields()
    if rounding:
        fields["rounding"] = rounding
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
        check_choice(name, value, meta["choices"])
        return
    if name == "validation_prompts":
        if not isinstance(value, tuple) or not all(isinstance(prompt, str) for prompt in value):
            raise SubjectBoothError(f"{name} {value!r}", "a tuple of strings", "write one prompt per line", name)
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
