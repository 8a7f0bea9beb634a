"""Prompt templates with placeholders, and caption files."""

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
"""A weighted word in a prompt: ``(word:1.2)``."""

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_ARTICLE = re.compile(r"\b(a|an)(\s+)(?=\{class\})", re.IGNORECASE)
_LEADING_ARTICLE = re.compile(r"(?:a|an|the)\s+(?=\S)", re.IGNORECASE)
# Vowel letter but consonant sound, and vice versa.
_CONSONANT_SOUND = re.compile(
    r"(?:uni(?!n|m)|us[abeu]|eu|one\b|once\b|ur[aeiou]|ut[aeiou]|u\b|ukulele|ubiqu)", re.IGNORECASE
)
_VOWEL_SOUND = re.compile(r"(?:hour|honest|honou?r|heir)", re.IGNORECASE)


def article(word: str) -> str:
    """``"a"`` or ``"an"``, by an English word's first sound: a dog, an owl, a unicorn, an hourglass."""
    if _VOWEL_SOUND.match(word):
        return "an"
    return "an" if word[:1].lower() in tuple("aeiou") and not _CONSONANT_SOUND.match(word) else "a"


def without_article(words: str) -> str:
    """Remove a leading article (``"an old man"`` -> ``"old man"``), since the prompt template has one."""
    match = _LEADING_ARTICLE.match(words)
    return words[match.end() :] if match else words


def check_template(template: str, *, needs_token: bool, name: str = "prompt_template") -> str:
    """Check a prompt template and normalise its white space.

    Args:
        template: text with the placeholders ``{token}``, ``{class}`` and ``{subject}`` (token and class).
        needs_token: True for photos, whose template must contain the token; False for class images, whose template
            must not.

    Raises:
        SubjectBoothError: empty, an unknown placeholder, an unpaired brace, or the token missing or not allowed.
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
            f"{name} {tidy!r} does not contain the token",
            "{token} or {subject}, so that the prompt refers to the subject",
            f'write "{DEFAULT_TEMPLATE}"',
            name,
        )
    if not needs_token and has_token:
        raise SubjectBoothError(
            f"{name} {tidy!r} contains the token",
            "only the class: class images show other members of the class, not the subject",
            f'write "{DEFAULT_CLASS_TEMPLATE}"',
            name,
        )
    return tidy


def check_text(text: str, name: str) -> str:
    """Return ``text`` if it is valid Unicode: JSON allows unpaired surrogates, which cannot be encoded.

    Raises:
        SubjectBoothError: it cannot be encoded as UTF-8.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise SubjectBoothError(
            f"{name} contains an invalid character ({text[:60]!a})", "valid Unicode text", "type it again", name
        ) from None
    return text


def fill_template(template: str, token: str, class_word: str) -> str:
    """Fill in the placeholders, with the right article: ``a {class}`` becomes ``an owl``. Other braces are kept."""
    values = {"token": token, "class": class_word, "subject": f"{token} {class_word}"}

    def right_article(match: re.Match[str]) -> str:
        spelled = article(class_word)
        return (spelled.capitalize() if match[1][0].isupper() else spelled) + match[2]

    template = _ARTICLE.sub(right_article, template)
    return _PLACEHOLDER.sub(lambda match: values.get(match[1], match[0]), template)


def caption_file_of(photo: Path) -> Path:
    """``dog.txt`` for ``dog.jpg``, in the same folder: the convention of all trainers."""
    return photo.with_suffix(".txt")


def read_caption(path: Path) -> str:
    """Read a caption file as one line of text.

    The encoding is detected (see :mod:`trainer.subject.caption_encoding`). If it is uncertain, the file is rejected
    rather than trained on as garbage.

    Raises:
        SubjectBoothError: missing, empty, much too long, or in an unknown encoding.
    """
    try:
        size = path.stat().st_size
        data = path.read_bytes() if size <= MAX_CAPTION_BYTES else b""
    except OSError as error:
        raise SubjectBoothError(
            f"caption file {path.name} not found",
            "one .txt file next to each photo, with the same name",
            'write it, or set captions to "template"',
        ) from error
    if size > MAX_CAPTION_BYTES:
        raise SubjectBoothError(
            f"{path.name} is {size // 1024} KB long",
            f"a caption of at most {MAX_CAPTION_BYTES // 1024} KB",
            "shorten it, or move it out of the folder of the photo",
        )
    text = decode(data)
    if text is None or any(ord(c) < 32 and c not in "\t\r\n\f\v" for c in text):
        raise SubjectBoothError(
            f"the encoding of {path.name} cannot be detected",
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
