"""The registry of class preservation methods."""

from __future__ import annotations

from ..errors import check_choice
from .class_images import ClassImages
from .curvature import Curvature
from .dco import DirectConsistency
from .none import NoPreservation
from .preservation import Preservation
from .priors import ClassPriors
from .teacher import Teacher
from .weight_l2 import WeightL2

WAYS: dict[str, type[Preservation]] = {
    way.name: way
    for way in (
        Curvature,
        ClassImages,
        Teacher,
        WeightL2,
        DirectConsistency,
        NoPreservation,
    )
}
"""By the name that users choose them by."""

DEFAULT_WAY = Curvature.name
"""What node and shell use if nothing is chosen."""

PRESERVATION_HELP = (
    "How the class is preserved, so that not every dog turns into yours. curvature: holds back changes that would "
    "alter what the model draws for the class and for other things; needs no class images; the model is studied once, "
    "on 64 images, before the first step. class_images: also trains on class images. teacher: compares with the "
    "model's own predictions at each step. weight_l2: keeps the weights close to the model's. dco: the more a photo's "
    "prediction has improved on the model's own, the less the photo counts. none: no preservation. curvature and "
    "teacher use class images, if there are any."
)


def keeping_class(priors: ClassPriors | None, class_word: str, way: str = DEFAULT_WAY) -> Preservation:
    """The method of this name, with its default settings.

    Args:
        priors: the class images; None without. Methods that need none may use them as well.
        class_word: the kind of thing the subject is.
        way: one of :data:`WAYS`.

    Raises:
        SubjectBoothError: there is no such method, or it needs class images.
    """
    check_way(way)
    return WAYS[way].create(class_word, priors)


def uses_class_images(way: str) -> bool:
    """Whether a method makes use of class images, if there are any."""
    check_way(way)
    return WAYS[way].uses_class_images


def check_way(way: str) -> None:
    """Check the name of a method.

    Raises:
        SubjectBoothError: there is no such method.
    """
    check_choice("preservation", way, WAYS)


def loss_labels() -> dict[str, str]:
    """The labels of the panel's curves, by the loss term's name."""
    return {"instance_loss": "subject"} | {name: label for way in WAYS.values() for name, label in way.losses.items()}
