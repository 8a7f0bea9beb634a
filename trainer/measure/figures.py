"""The measures, as arithmetic on embeddings.

Every function returns one value per seed, float32 [seeds]; their mean is the figure, and their spread says how far it
can be trusted. Embeddings are unit vectors, so a product of two is their cosine.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def drift(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """How far the pictures of some prompts have moved. 0: unchanged; 1: as different as another random picture.

    The distance (1 - cosine) between the pictures of the same seed before and after, averaged over the prompts, divided
    by the mean distance between two seeds of the base.

    Args:
        before: embeddings of the base's pictures [prompts, seeds, d]; two seeds or more.
        after: those of the same prompts and seeds with the LoRA.
    """
    # 1 - cosine of unit vectors, but exactly 0 if they are equal.
    distance = ((before - after) ** 2).sum(2) / 2
    return distance.mean(0) / seed_distance(before)


def seed_distance(embeddings: torch.Tensor) -> torch.Tensor:
    """The mean distance between two different seeds of the same prompt, a scalar; see :func:`drift`."""
    return div(embeddings).mean()


def div(embeddings: torch.Tensor) -> torch.Tensor:
    """Diversity (DIV; arXiv 2208.12242, section 4.3): the mean distance between two pictures of the same prompt.

    Higher is better. The paper takes LPIPS, which needs weights from a download; here it is 1 - cosine of the same
    embedding as for all other figures, so only values of the same embedder can be compared.

    Args:
        embeddings: [prompts, seeds, d]; two seeds or more.
    """
    seeds = embeddings.shape[1]
    cosines = embeddings @ embeddings.transpose(1, 2)
    others = cosines.sum(2) - cosines.diagonal(dim1=1, dim2=2)
    return (1 - others / (seeds - 1)).mean(0)


def similarity(pictures: torch.Tensor, photos: torch.Tensor) -> torch.Tensor:
    """The mean cosine between pictures and photos, over all pairs (arXiv 2208.12242, section 4.2).

    Of pictures of the subject, this is its fidelity (the paper's DINO and CLIP-I), higher is better. Of pictures of the
    plain class, it is the preservation of the class (PRES, section 4.3), lower is better: pictures of the class that
    look like the subject mean that it has collapsed to the subject.

    Args:
        pictures: [prompts, seeds, d].
        photos: [photos, d].
    """
    return (pictures @ photos.T).mean((0, 2))


def pres(class_pictures: torch.Tensor, subject_photos: torch.Tensor) -> torch.Tensor:
    """PRES: :func:`similarity` of pictures of the class, drawn with the LoRA, to photos of the subject."""
    return similarity(class_pictures, subject_photos)


def subject_share(pictures: torch.Tensor, photos: torch.Tensor, class_before: torch.Tensor) -> torch.Tensor:
    """The share of pictures that are nearer to the subject's photos than to the base's pictures of the class.

    Args:
        pictures: [prompts, seeds, d].
        photos: [photos, d].
        class_before: [..., d]; together with the photos, the centres to choose from.
    """
    subject = F.normalize(photos.mean(0), dim=0)
    plain = F.normalize(class_before.flatten(0, -2).mean(0), dim=0)
    return (pictures @ subject > pictures @ plain).float().mean(0)


def share(flags: list[list[bool]]) -> torch.Tensor:
    """The share of true flags, given as [prompts][seeds]."""
    return torch.tensor(flags).float().mean(0)
