"""The prompts of an evaluation."""

from __future__ import annotations

import pytest

from subjectbooth.trainer.errors import SubjectBoothError
from subjectbooth.trainer.measure.prompts import OTHER_PROMPTS, SPARE_PROMPTS, prompt_set


def test_there_are_24_other_prompts_all_different() -> None:
    assert len(OTHER_PROMPTS) == 24
    together = (*OTHER_PROMPTS, *SPARE_PROMPTS)
    assert len({prompt.casefold() for prompt in together}) == len(together)


def test_the_class_comes_plain_and_in_three_scenes() -> None:
    prompts = prompt_set("owl", "ohwx owl")
    assert prompts.class_prompts == (
        "a photo of an owl",
        "a photo of an owl on a beach",
        "a photo of an owl on a blue background",
        "a photo of an owl at night",
    )
    assert prompts.subject == ("a photo of ohwx owl",)
    assert prompts.subject_scenes[0] == "a photo of ohwx owl on a beach"
    assert prompts.others == OTHER_PROMPTS
    assert len(prompts.all) == 4 + 24 + 1 + 3


@pytest.mark.parametrize("class_word", ["clock", "Clock", "red car", "bowl of fruit", "photo of a man"])
def test_the_class_is_replaced_among_the_other_prompts(class_word: str) -> None:
    others = prompt_set(class_word, "ohwx thing").others
    words = {"clock", "red", "car", "bowl", "fruit", "man"} & set(class_word.casefold().split())
    assert len(set(others)) == 24
    assert not [prompt for prompt in others if words & set(prompt.split())]
    assert len(set(others) & set(OTHER_PROMPTS)) == 23


def test_own_prompts_are_used_once_each() -> None:
    assert prompt_set("dog", "ohwx dog", ["a dog", "a cat", "a dog"]).others == ("a dog", "a cat")
    with pytest.raises(SubjectBoothError, match="No prompts of other things"):
        prompt_set("dog", "ohwx dog", [])
