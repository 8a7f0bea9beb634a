"""The prompts for which the teacher keeps the base's predictions.

They are general, so that they suit any base. None of them is a prompt that drift is measured with: what is measured
must not be what was held back (a test compares the two lists).
"""

from __future__ import annotations

from ..subject.captions import fill_template

CLASS_TEMPLATES = (
    "a photo of a {class}",
    "a {class}",
    "a picture of a {class}",
    "a photo of a {class} on the grass",
    "a photo of a {class} in the snow",
    "a photo of a {class} indoors",
    "a photo of a {class} on a red background",
    "a photo of a {class} on a yellow background",
    "a photo of a {class} in front of a brick wall",
    "a close-up photo of a {class}",
    "a drawing of a {class}",
    "an oil painting of a {class}",
)
"""The class by itself and in scenes."""

OTHER_SENTENCES = (
    "a photo of a dog",
    "a photo of a rabbit",
    "a photo of an elephant",
    "a photo of a frog",
    "a photo of an owl",
    "a photo of a fish",
    "a photo of a butterfly",
    "a photo of a bear",
    "a photo of a monkey",
    "a photo of a rose",
    "a photo of a cactus",
    "a photo of a tree",
    "a photo of a mushroom",
    "a photo of an apple",
    "a photo of a banana",
    "a photo of a pizza",
    "a photo of a birthday cake",
    "a photo of a cup of coffee",
    "a photo of a bottle",
    "a photo of a hat",
    "a photo of a crown",
    "a photo of a ball",
    "a photo of a balloon",
    "a photo of a book",
    "a photo of a lamp",
    "a photo of a camera",
    "a photo of a robot",
    "a photo of a teddy bear",
    "a photo of a bus",
    "a photo of an airplane",
    "a photo of a rocket",
    "a photo of a house",
    "a photo of a castle",
    "a photo of a girl",
    "a photo of a family",
    "a photo of a crowd",
    "a photo of a garden",
    "a photo of clouds in the sky",
    "a photo of a snowy landscape",
    "a photo of a kitchen table",
    "a photo of fireworks",
    "a watercolor of flowers",
    "a black and white portrait",
    "a cartoon of a pirate",
    "a 3d render of a cube",
    "a pattern of stripes",
)
"""Other things, scenes and styles."""


def class_sentences(class_word: str) -> tuple[str, ...]:
    """:data:`CLASS_TEMPLATES` with the class filled in."""
    return tuple(fill_template(template, "", class_word) for template in CLASS_TEMPLATES)
