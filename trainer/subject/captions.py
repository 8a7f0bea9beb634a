"""Prompts about the subject: the template with its placeholders, and caption files in whatever encoding."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import SubjectBoothError
from .caption_encoding import decode

DEFAULT_TEMPLATE = "a photo of {token} {class}"
DEFAULT_CLASS_TEMPLATE = "a photo of a {class}"
PLACEHOLDERS = ("token", "class", "subject")
MAX_CAPTION_BYTES = 64 * 1024
WEIGHT = re.compile(r"\([^()]*:\s*\d*\.?\d+\s*\)")
"""How prompts weight a word: ``(word:1.2)``."""

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_ARTICLE = re.compile(r"\b(a|an)(\s+)(?=\{class\})", re.IGNORECASE)
_LEADING_ARTICLE = re.compile(r"(?:a|an|the)\s+(?=\S)", re.IGNORECASE)
# Written with a vowel, spoken with a consonant, and the other way round.
_CONSONANT_SOUND = re.compile(
    r"(?:uni(?!n|m)|us[abeu]|eu|one\b|once\b|ur[aeiou]|ut[aeiou]|u\b|ukulele|ubiqu)", re.IGNORECASE
)
_VOWEL_SOUND = re.compile(r"(?:hour|honest|honou?r|heir)", re.IGNORECASE)


def article(word: str) -> str:
    """``"a"`` or ``"an"``, by the first sound of an English word: a dog, an owl, a unicorn, an hourglass."""
    if _VOWEL_SOUND.match(word):
        return "an"
    return "an" if word[:1].lower() in tuple("aeiou") and not _CONSONANT_SOUND.match(word) else "a"


def without_article(words: str) -> str:
    """``"old man"`` of ``"an old man"``: prompts have an article of their own."""
    found = _LEADING_ARTICLE.match(words)
    return words[found.end() :] if found else words


def check_template(template: str, *, needs_token: bool, name: str = "prompt_template") -> str:
    """The template with its white space tidied.

    Args:
        template: text with ``{token}``, ``{class}`` and ``{subject}`` (= token and class) in it.
        needs_token: the photos' template must name the token; the class images' must not.

    Raises:
        SubjectBoothError: empty, an unknown placeholder, a stray brace, or the token missing or out of place.
    """
    tidy = " ".join(check_text(template, name).split())
    if not tidy:
        raise SubjectBoothError(
            f"{name} is empty",
            "a sentence with placeholders",
            f'write "{DEFAULT_TEMPLATE if needs_token else DEFAULT_CLASS_TEMPLATE}"',
            name,
        )
    for found in _PLACEHOLDER.findall(tidy):
        if found not in PLACEHOLDERS:
            raise SubjectBoothError(
                f"{name} has the placeholder {{{found}}}",
                "one of {token}, {class}, {subject}",
                "correct the placeholder or remove the braces",
                name,
            )
    if "{" in _PLACEHOLDER.sub("", tidy) or "}" in _PLACEHOLDER.sub("", tidy):
        raise SubjectBoothError(f"{name} has an unpaired brace: {tidy!r}", "braces in pairs", "remove it", name)
    has_token = "{token}" in tidy or "{subject}" in tidy
    if needs_token and not has_token:
        raise SubjectBoothError(
            f"{name} {tidy!r} names no token",
            "{token} or {subject} in it, or nothing would call the subject",
            f'write "{DEFAULT_TEMPLATE}"',
            name,
        )
    if not needs_token and has_token:
        raise SubjectBoothError(
            f"{name} {tidy!r} names the token",
            "the class alone: class images show what the subject is one of",
            f'write "{DEFAULT_CLASS_TEMPLATE}"',
            name,
        )
    return tidy


def check_text(text: str, name: str) -> str:
    """``text`` when it can be written down: JSON lets half a surrogate pair through, which no encoder takes.

    Raises:
        SubjectBoothError: it cannot be encoded as UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise SubjectBoothError(
            f"{name} has a broken character in it ({text[:60]!a})", "Unicode text", "type it again", name
        ) from None
    return text


def fill_template(template: str, token: str, class_word: str) -> str:
    """Put the words in. ``a {class}`` becomes ``an owl`` where English wants it; other braces stay."""
    values = {"token": token, "class": class_word, "subject": f"{token} {class_word}"}

    def right_article(match: re.Match[str]) -> str:
        spelled = article(class_word)
        return (spelled.capitalize() if match[1][0].isupper() else spelled) + match[2]

    template = _ARTICLE.sub(right_article, template)
    return _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), template)


def caption_file_of(photo: Path) -> Path:
    """``dog.txt`` beside ``dog.jpg``, the convention of every trainer."""
    return photo.with_suffix(".txt")


def read_caption(path: Path) -> str:
    """A caption file's text on one line.

    Its encoding is recognised (see :mod:`trainer.subject.caption_encoding`); what cannot be told for certain is refused
    rather than learned as garbage.

    Raises:
        SubjectBoothError: missing, empty, far too long, or in an encoding that cannot be told.
    """
    try:
        size = path.stat().st_size
        data = path.read_bytes() if size <= MAX_CAPTION_BYTES else b""
    except OSError as error:
        raise SubjectBoothError(
            f"there is no caption file {path.name}",
            "one .txt file beside each photo, of the same name",
            'write it, or set captions to "template"',
        ) from error
    if size > MAX_CAPTION_BYTES:
        raise SubjectBoothError(
            f"{path.name} holds {size // 1024} KB",
            f"a caption, at most {MAX_CAPTION_BYTES // 1024} KB",
            "shorten it, or move it away from beside the photo",
        )
    text = decode(data)
    if text is None or any(ord(c) < 32 and c not in "\t\r\n\f\v" for c in text):
        raise SubjectBoothError(
            f"{path.name} is in an encoding that cannot be told for certain",
            "UTF-8",
            "open it in a text editor, check that the text is right, and save it as UTF-8",
        )
    text = " ".join(text.split())
    if not text:
        raise SubjectBoothError(
            f"the caption file {path.name} is empty",
            "a sentence about the photo",
            'write it, or set captions to "template"',
        )
    return text
