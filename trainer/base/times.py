"""At which noise levels a network is trained: how uniform random numbers are spread over its noise process."""

from __future__ import annotations

import torch

LOGIT_NORMAL = "logit_normal"

EDGE = 1e-6
"""Distance of a logit-normal number's origin from 0 and 1, where the normal distribution's is infinite."""


def spread(uniform: torch.Tensor, is_logit_normal: bool, shift: float | None = None) -> torch.Tensor:
    """Numbers float64 [b] in [0, 1), 0 for the least noise, from uniform ones.

    Args:
        is_logit_normal: whether they are concentrated in the middle (arXiv 2403.03206, section 3.1).
        shift: towards more noise, if greater than 1 (the same paper, equation 23); None for none.
    """
    if is_logit_normal:
        uniform = torch.sigmoid(torch.special.ndtri(uniform.clamp(EDGE, 1 - EDGE)))
    return uniform if shift is None else shift * uniform / (1 + (shift - 1) * uniform)
