"""The connected model, trained by the real trainer on a pretended card (tests/card/device.py) with ComfyUI's own code.

python tests/card/wired_rehearsal.py COMFYUI CHECKPOINT NAME... prints a JSON line for each of :data:`REHEARSALS`. The
models are small; that no operation mixes devices, and where the host waits, does not depend on the size.
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent.parent
CAPTIONS = ("a photo of ohwx dog", "ohwx dog on a beach", "ohwx dog")
STABLE_DIFFUSION = "SD 1.5"
ROOM = 10**12

REHEARSALS: dict[str, dict[str, Any]] = {
    STABLE_DIFFUSION: {"precision": "bf16", "stored": "fp16"},
    "SD 3.5": {
        "precision": "bf16",
        "gradient_checkpointing": "on",
        "validation_prompts": ("x",),
        "validation_steps": 2,
    },
    "Z-Image": {"precision": "fp16", "preservation": "curvature"},
}
"""What each rehearses: another precision than the file's; checkpointed blocks and a picture; loss scaling, the study of
the base, and its penalty."""


def import_comfyui(folder: str) -> None:
    """Make ComfyUI and the project importable."""
    sys.argv = [sys.argv[0], "--cpu"]
    sys.path.insert(0, folder)
    importlib.import_module("utils.install_util")  # before any other package of that name
    importlib.import_module("comfy.options").enable_args_parsing()
    package = types.ModuleType("subjectbooth")
    package.__path__ = [str(ROOT)]
    sys.modules.setdefault("subjectbooth", package)


def rehearse(
    name: str, checkpoint: str, precision: str, stored: str = "", preservation: str = "none", **settings: Any
) -> dict[str, Any]:
    """Three steps on the card, and what was counted at each of them.

    Args:
        name: of the family.
        checkpoint: a small one of Stable Diffusion.
        precision, settings: of :class:`TrainConfig`.
        stored: the precision of the weights; that of training if empty.
        preservation: ``none`` or ``curvature``.
    """
    import torch
    from comfy import model_management

    from subjectbooth.nodes.wired import objective
    from subjectbooth.tests.card.counting import Counting
    from subjectbooth.tests.card.device import CARD, NAME
    from subjectbooth.trainer.config import TrainConfig

    model, clip, vae = _connected(name, checkpoint, stored or precision)
    config = TrainConfig(steps=3, rank=4, network_alpha=4.0, resolution=128, precision=precision, **settings)
    found: dict[str, Any] = {"steps": [], "pictures": [], "plan": ""}
    with (
        Counting() as card,
        mock.patch.multiple(
            model_management,
            get_torch_device=lambda: CARD,
            get_free_memory=lambda _=None, torch_free_too=False: (ROOM, ROOM) if torch_free_too else ROOM,
            soft_empty_cache=lambda *_: None,
            vram_state=model_management.VRAMState.NORMAL_VRAM,
            cpu_state=model_management.CPUState.GPU,
        ),
        mock.patch.object(objective, "_DOUBLE", (*objective._DOUBLE, NAME)),  # as a GPU of NVIDIA
    ):
        model.load_device = CARD
        _train(model, clip, vae, config, preservation, card, found)
        with torch.inference_mode():
            model_management.unload_all_models()
        gc.collect()
        found["left"] = card.live
    return found


def _train(model: Any, clip: Any, vae: Any, config: Any, preservation: str, card: Any, found: dict[str, Any]) -> None:
    from subjectbooth.tests.card.device import CARD
    from subjectbooth.trainer.events import Started, StepDone, Validation
    from subjectbooth.trainer.learn.loop import Training

    base, data = _base_and_data(model, clip, vae, preservation, config.seed)
    shown = CAPTIONS[:1] if config.validation_prompts else ()
    with Training(base, data, config, shown, None, CARD, lambda _: ROOM) as training:
        for event in training.events():
            if isinstance(event, Started):
                card.next_step()
                found["plan"] = event.plan
            elif isinstance(event, StepDone):
                found["steps"].append(card.next_step().to_json())
            elif isinstance(event, Validation):
                found["pictures"].append(list(event.images.shape))
        found["layers"] = len(training.lora())


def _connected(name: str, checkpoint: str, precision: str) -> tuple[Any, Any, Any]:
    """MODEL, CLIP and VAE, the model's weights on the CPU in this precision."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.sd
    import comfy.supported_models
    import torch

    from subjectbooth.tests.nodes.probe_nodes.wired_kinds import KINDS
    from subjectbooth.tests.nodes.probe_nodes.wired_probes import CPU, ProbeClip, ProbeVae

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    with torch.inference_mode():
        if name == STABLE_DIFFUSION:
            return comfy.sd.load_checkpoint_guess_config(checkpoint, model_options={"dtype": dtype})[:3]
        kind = KINDS[name]
        config = getattr(comfy.supported_models, kind.config)(dict(kind.settings()))
        config.unet_config = dict(kind.settings())
        config.set_inference_dtype(dtype, None)
        model = getattr(comfy.model_base, kind.model)(config, device=CPU)
        kind.shrink(model)
    return comfy.model_patcher.ModelPatcher(model, CPU, CPU), ProbeClip(kind), ProbeVae(kind)


def _base_and_data(model: Any, clip: Any, vae: Any, preservation: str, seed: int) -> tuple[Any, Any]:
    import torch

    from subjectbooth.nodes.wired.base import wired_base
    from subjectbooth.trainer.learn.data import TrainingData
    from subjectbooth.trainer.preserve.curvature import Curvature
    from subjectbooth.trainer.preserve.none import NoPreservation

    base = wired_base(model, clip, vae)
    way = NoPreservation() if preservation == "none" else Curvature("dog", images=4)
    prompts = tuple(dict.fromkeys((*CAPTIONS, "a photo of a dog", "", *way.prompts_for(seed, len(CAPTIONS)))))
    encoded = dict(zip(prompts, base.prompts.encode(prompts), strict=True))
    latents = torch.randn(len(CAPTIONS), *base.denoiser.latent_size(128, 128))
    return base, TrainingData(latents, CAPTIONS, encoded, way)


def main(comfyui: str, checkpoint: str, names: list[str]) -> None:
    import_comfyui(comfyui)
    import torch

    # One thread: what is freed when does not depend on chance.
    torch.autograd.set_multithreading_enabled(False)
    torch.set_num_threads(1)
    for name in names:
        print(json.dumps({"rehearsal": name, **rehearse(name, checkpoint, **REHEARSALS[name])}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
