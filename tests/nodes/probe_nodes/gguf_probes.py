"""GGUF files of small models, for ComfyUI-GGUF's own loader; there only where the package gguf can be imported."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import comfy.utils
import folder_paths
import numpy as np
import torch

from .wired_kinds import KINDS
from .wired_probes import build

ARCHITECTURES = {"SD 3.5": "sd3", "Flux.1": "flux"}


def _path(kind: str, quantised: str) -> Path:
    folder = Path(folder_paths.models_dir) / "unet"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{ARCHITECTURES[kind]} {quantised}.gguf"


class ProbeWriteGguf:
    """Writes a small model as such files are made: matrices quantised, the rest in fp32."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"kind": (list(ARCHITECTURES),), "quantised": ("STRING",), "seed": ("INT",)}}

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    CATEGORY = "probe"
    FUNCTION = "write"

    def write(self, kind: str, quantised: str, seed: int) -> dict[str, Any]:
        import gguf

        path = _path(kind, quantised)
        writer = gguf.GGUFWriter(str(path), ARCHITECTURES[kind])
        wanted, packed = gguf.GGMLQuantizationType[quantised], 0
        for name, tensor in build(KINDS[kind], seed).model.diffusion_model.state_dict().items():
            values = tensor.float().numpy()
            if values.ndim == 2 and values.shape[1] % 32 == 0 and "pos_embed" not in name:
                writer.add_tensor(name, gguf.quants.quantize(values, wanted), raw_dtype=wanted)
                packed += 1
            else:
                if values.ndim > 2:
                    writer.add_array(f"comfy.gguf.orig_shape.{name}", [int(size) for size in values.shape])
                writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return {"ui": {"report": [{"file": path.name, "packed": packed}]}}


class ProbeGgufPlain:
    """The same model with the file's numbers, as the package itself reads them, in plain weights.

    In fp16 before they are used in fp32, as ComfyUI-GGUF does by default.
    """

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"kind": (list(ARCHITECTURES),), "quantised": ("STRING",), "seed": ("INT",)}}

    RETURN_TYPES = ("MODEL",)
    CATEGORY = "probe"
    FUNCTION = "make"

    def make(self, kind: str, quantised: str, seed: int) -> tuple[Any]:
        import gguf

        model = build(KINDS[kind], seed)
        own = model.model.diffusion_model.state_dict()
        for tensor in gguf.GGUFReader(str(_path(kind, quantised))).tensors:
            values = np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
            plain = torch.from_numpy(values).view(own[tensor.name].shape)
            is_packed = tensor.tensor_type == gguf.GGMLQuantizationType[quantised]
            own[tensor.name].copy_(plain.half() if is_packed else plain)
        return (model,)


class ProbeGgufBytes:
    """Whether each weight of the connected model has the bytes of the file."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL",), "kind": (list(ARCHITECTURES),), "quantised": ("STRING",), "nonce": ("INT",),
            },
            "optional": {"after": ("*",)},
        }  # fmt: skip

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    CATEGORY = "probe"
    FUNCTION = "probe"

    def probe(self, model: Any, kind: str, quantised: str, nonce: int, after: Any = None) -> dict[str, Any]:
        import gguf

        whole, changed, packed = model.model.diffusion_model, [], 0
        for tensor in gguf.GGUFReader(str(_path(kind, quantised))).tensors:
            found = comfy.utils.get_attr(whole, tensor.name)
            packed += getattr(found, "tensor_type", None) == gguf.GGMLQuantizationType[quantised]
            raw = found.detach().cpu().as_subclass(torch.Tensor).contiguous().view(torch.uint8).numpy().tobytes()
            if raw != np.ascontiguousarray(tensor.data).tobytes():
                changed.append(tensor.name)
        return {"ui": {"report": [{"changed": changed, "packed": packed}]}}


NODES = (
    {"ProbeWriteGguf": ProbeWriteGguf, "ProbeGgufPlain": ProbeGgufPlain, "ProbeGgufBytes": ProbeGgufBytes}
    if importlib.util.find_spec("gguf")
    else {}
)
