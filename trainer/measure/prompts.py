"""The prompts that a LoRA is measured with: the class, other things and scenes, and the subject."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import SubjectBoothError
from ..subject.captions import DEFAULT_CLASS_TEMPLATE, fill_template

SCENES = ("on a beach", "on a blue background", "at night")
"""Added to the class and to the subject. The demo base knows these as well."""

OTHER_PROMPTS = (
    "a photo of a clock",
    "a photo of a cat",
    "a photo of a horse",
    "a photo of a bird on a branch",
    "a photo of a bicycle",
    "a photo of a red car",
    "a photo of a sailing boat",
    "a photo of a chair",
    "a photo of a teapot",
    "a photo of a backpack",
    "a photo of a guitar",
    "a photo of a bowl of fruit",
    "a photo of a slice of bread",
    "a photo of a sunflower",
    "a photo of a woman smiling",
    "a photo of a man reading a newspaper",
    "a photo of a child's drawing",
    "a photo of a mountain lake at sunset",
    "a photo of a forest in autumn",
    "a photo of a city street in the rain",
    "a photo of a lighthouse by the sea",
    "a photo of a living room",
    "a photo of an old stone bridge",
    "an oil painting of a village",
)
"""Other classes and scenes, for any base. A way to keep the class must not learn from these, or drift would only be
measured where it was held back."""

SPARE_PROMPTS = (
    "a photo of an umbrella",
    "a photo of a pair of shoes",
    "a photo of a candle",
    "a photo of a waterfall",
    "a photo of a pencil",
    "a photo of a desert",
)
"""Replacements for other prompts that contain the class being trained."""

_COMMON_WORDS = frozenset("a an and at by for from in of on the to with photo painting".split())
"""In many prompts, so that they say nothing about the class."""


@dataclass(frozen=True)
class PromptSet:
    """All prompts of an evaluation.

    Attributes:
        class_prompts: the plain class first, then in each scene.
        others: other classes and scenes.
        subject: like the training prompt.
        subject_scenes: the subject in each scene.
        scenes: the class in each scene, for a namer: what the pictures of ``subject_scenes`` should show.
    """

    class_prompts: tuple[str, ...]
    others: tuple[str, ...]
    subject: tuple[str, ...]
    subject_scenes: tuple[str, ...]

    @property
    def scenes(self) -> tuple[str, ...]:
        return self.class_prompts[1:]

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """The prompts by group, in the order in which they are drawn and shown."""
        return {
            "class": self.class_prompts,
            "others": self.others,
            "subject": self.subject,
            "subject in scenes": self.subject_scenes,
        }

    @property
    def all(self) -> tuple[str, ...]:
        """Every prompt once, in the order of :attr:`groups`."""
        return tuple(dict.fromkeys(prompt for group in self.groups.values() for prompt in group))


def prompt_set(class_word: str, trigger: str, others: Sequence[str] = OTHER_PROMPTS) -> PromptSet:
    """The prompts for one subject.

    Args:
        class_word: such as "dog".
        trigger: the words that stand for the subject, such as "ohwx dog".
        others: prompts that are not about the class. Of :data:`OTHER_PROMPTS`, those that share a word with the class
            are replaced; your own are taken as they are.

    Raises:
        SubjectBoothError: there are no other prompts.
    """
    if tuple(others) == OTHER_PROMPTS:
        others = _without_class(class_word)
    if not others:
        raise SubjectBoothError("no prompts of other things were given", "one prompt or more", "add some", "prompts")
    plain = fill_template(DEFAULT_CLASS_TEMPLATE, "", class_word)
    special = f"a photo of {trigger}"
    return PromptSet(
        (plain, *(f"{plain} {scene}" for scene in SCENES)),
        tuple(dict.fromkeys(others)),
        (special,),
        tuple(f"{special} {scene}" for scene in SCENES),
    )


def _without_class(class_word: str) -> list[str]:
    words = set(class_word.casefold().split()) - _COMMON_WORDS
    kept = [prompt for prompt in (*OTHER_PROMPTS, *SPARE_PROMPTS) if not words & set(prompt.casefold().split())]
    return kept[: len(OTHER_PROMPTS)]
