"""What is in a SUBJECT and in CLASS_PRIORS."""

from __future__ import annotations

import hashlib
from typing import Any


class ProbeSubject:
    """The prepared subject: digest, captions and whether it has masks."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"subject": ("SUBJECT",)}}

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    CATEGORY = "probe"
    FUNCTION = "probe"

    def probe(self, subject: Any) -> dict[str, Any]:
        prepared = subject.prepare()
        in_order = [prepared.captions[prepared.order.index(i)] for i in range(len(prepared.order))]
        report = {
            "digest": prepared.digest,
            "captions": in_order,
            "has_masks": prepared.masks is not None,
            "inference": prepared.images.is_inference(),
            "class_prompt": subject.class_prompt,
        }
        return {"ui": {"report": [report]}}


class ProbePriors:
    """The class priors: prompt, digest, hashes, and each picture's latents as a hash of their bytes."""

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {"required": {"priors": ("CLASS_PRIORS",)}}

    RETURN_TYPES = ()
    OUTPUT_NODE = True
    CATEGORY = "probe"
    FUNCTION = "probe"

    def probe(self, priors: Any) -> dict[str, Any]:
        report = {
            "prompt": priors.prompt,
            "digest": priors.digest,
            "hashes": list(priors.hashes),
            "shape": list(priors.latents.shape),
            "dtype": str(priors.latents.dtype),
            "inference": priors.latents.is_inference(),
            "std": priors.latents.std().item(),
            "latents": [hashlib.sha256(latent.numpy().tobytes()).hexdigest() for latent in priors.latents],
        }
        return {"ui": {"report": [report]}}
