"""The prompts of an evaluation: the built-in ones, and a user's own lines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from ..trainer.errors import SubjectBoothError
from ..trainer.measure.prompts import OTHER_PROMPTS, PromptSet, prompt_set
from ..trainer.subject.captions import check_text, fill_template
from ..trainer.subject.subject import Subject
from .bridge import literal_prompt

MAX_LINES = 200
_SUBJECT = "{subject}"


def check_lines(text: str) -> list[str]:
    """The lines of the input ``prompts``, without empty ones and repeats.

    Raises:
        SubjectBoothError: another placeholder, an unpaired brace, invalid Unicode, or too many lines.
    """
    lines = list(dict.fromkeys(" ".join(line.split()) for line in check_text(text, "prompts").splitlines()))
    lines = [line for line in lines if line]
    for line in lines:
        if re.search("[{}]", line.replace(_SUBJECT, "")):
            raise SubjectBoothError(
                f"prompts has a placeholder other than {_SUBJECT} in {line[:60]!r}",
                f"{_SUBJECT} as the only word in braces; the class is drawn in its place by itself",
                f"write {_SUBJECT}, or remove the braces",
                "prompts",
            )
    if len(lines) > MAX_LINES:
        raise SubjectBoothError(f"{len(lines)} prompts", f"at most {MAX_LINES}", "remove some lines", "prompts")
    return lines


def prompts_for(text: str, subject: Subject, trigger: str, built_in_others: Sequence[str] = OTHER_PROMPTS) -> PromptSet:
    """The prompts to draw.

    Args:
        text: the user's lines. Those with ``{subject}`` replace the built-in scenes, the others the built-in prompts of
            other things.
        trigger: the words that the LoRA was trained with; if empty, those of the subject.
        built_in_others: prompts of other things that this base knows.

    Raises:
        SubjectBoothError: a line is invalid; see :func:`check_lines`.
    """
    lines = check_lines(text)
    scenes = [line for line in lines if _SUBJECT in line]
    others = tuple(line for line in lines if _SUBJECT not in line)
    # Captions are literal, so that these words are too.
    class_word, words = literal_prompt(subject.class_word), literal_prompt(trigger or subject.trigger)
    built_in = prompt_set(class_word, words, others or built_in_others)
    if not scenes:
        return built_in
    plain = tuple(fill_template(of_the_class(line), "", class_word) for line in scenes)
    own = tuple(line.replace(_SUBJECT, words) for line in scenes)
    return replace(built_in, class_prompts=(built_in.class_prompts[0], *plain), subject_scenes=own)


def of_the_class(line: str) -> str:
    """The same line about the class: "a photo of {subject} at night" -> "a photo of a {class} at night"."""
    return re.sub(r"(\b(?:an?|the|my|this|that)\s+)?\{subject\}", lambda m: f"{m[1] or 'a '}{{class}}", line)
