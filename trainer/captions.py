"""Prompts about the subject: the template with its placeholders, and caption files in whatever encoding."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

from .errors import SubjectBoothError

DEFAULT_TEMPLATE = "a photo of {token} {class}"
DEFAULT_CLASS_TEMPLATE = "a photo of a {class}"
PLACEHOLDERS = ("token", "class", "subject")
MAX_CAPTION_BYTES = 64 * 1024

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
_ARTICLE = re.compile(r"\b(a|an)(\s+)(?=\{class\})", re.IGNORECASE)
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
        raise SubjectBoothError(
            f"{name} has an unpaired brace: {tidy!r}", "braces in pairs", "remove it", name
        )
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


def fill(template: str, token: str, class_word: str) -> str:
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

    UTF-8 (with or without mark), UTF-16 and UTF-32 are recognised for certain; older 8-bit Cyrillic and
    Western European files by their letters. What fits none is refused rather than learned as garbage.

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
    text = _decode(data)
    if text is None or any(ord(c) < 32 and c not in "\t\r\n\f\v" for c in text):
        raise SubjectBoothError(
            f"{path.name} is in an encoding that cannot be told",
            "UTF-8",
            "open it in a text editor and save it as UTF-8",
        )
    text = " ".join(text.split())
    if not text:
        raise SubjectBoothError(
            f"the caption file {path.name} is empty",
            "a sentence about the photo",
            'write it, or set captions to "template"',
        )
    return text


def _decode(data: bytes) -> str | None:
    marks = (
        (codecs.BOM_UTF8, "utf-8-sig"),
        (codecs.BOM_UTF32_LE, "utf-32"),
        (codecs.BOM_UTF32_BE, "utf-32"),
        (codecs.BOM_UTF16_LE, "utf-16"),
        (codecs.BOM_UTF16_BE, "utf-16"),
    )
    for mark, encoding in marks:
        if data.startswith(mark):
            return _try(data, encoding)
    if b"\0" in data:  # UTF-16 without its mark: the zero halves of ASCII letters or spaces sit on one side
        odd, even = data[1::2].count(0), data[::2].count(0)
        return _try(data, "utf-16-le" if odd > even else "utf-16-be")
    text = _try(data, "utf-8")
    return text if text is not None else _decode_legacy(data)


def _try(data: bytes, encoding: str) -> str | None:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        return None


def _decode_legacy(data: bytes) -> str | None:
    """8-bit text by its letters: Russian in one of three encodings, else Western European, else None."""
    # The ten most frequent Russian letters make up two thirds of any text; in a wrong encoding they do not.
    best, best_share = None, 0.4
    for encoding in ("cp1251", "koi8-r", "cp866"):
        text = _try(data, encoding)
        high = [c for c in text or "" if ord(c) > 127 and c not in "«»–—…“”„’‘№\xa0"]
        share = sum(c in "оеаинтсрвл" for c in high) / max(1, len(high))
        if text is not None and all("А" <= c <= "я" or c in "Ёё" for c in high) and share > best_share:
            best, best_share = text, share
    if best is not None:
        return best
    text = _try(data, "cp1252")
    if text is None:
        return None
    # Accented letters stand alone among plain ones ("café"); two neighbours mean it is another alphabet.
    letters = re.findall(r"[^\x00-\x7f]+", text)
    plain = all(len(run) == 1 and (run.isalpha() or run in "«»–—…“”„’‘°\xa0") for run in letters)
    return text if plain else None
