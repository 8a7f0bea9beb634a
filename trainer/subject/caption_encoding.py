"""Detect the encoding of a caption file, or give up: a wrong guess would silently be trained on.

UTF-8, UTF-16 and UTF-32 can be recognised reliably. 8-bit files cannot: the same bytes are valid text in dozens of code
pages. Russian is recognised by letter frequencies and word shapes. In the Western code page (Windows-1252), a letter is
certain if other Latin code pages have the same letter there ("é"), or if nearby words are of a language that uses it.
"""

from __future__ import annotations

import codecs
import math
import re
import unicodedata

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)

# Letter frequencies of Russian text in percent (Lyashevskaya and Sharov, 2009), most frequent first. "ё" is mostly
# printed as "е", so it is more frequent in texts that do use it: 0.20 instead of 0.04.
_RUSSIAN = dict(
    zip(
        "оеаинтсрвлкмдпуяыьгзбчйхжшюцщэфъё",
        (
            10.97,
            8.45,
            8.01,
            7.35,
            6.70,
            6.26,
            5.47,
            4.73,
            4.54,
            4.40,
            3.49,
            3.21,
            2.98,
            2.81,
            2.62,
            2.01,
            1.90,
            1.74,
            1.70,
            1.65,
            1.59,
            1.44,
            1.21,
            0.97,
            0.94,
            0.73,
            0.64,
            0.48,
            0.36,
            0.32,
            0.26,
            0.04,
            0.20,
        ),
        strict=True,
    )
)
_RUSSIAN_PAIRS = frozenset(
    "ст но то на ен ов ни ра во ко ро ре ос ли не по пр ал ть от ка та го ол ер ет ла ор ан ес ва ск ом ло де од ин ел "
    "ат об ас ит те да ле за ри ми со ог ам ак ки тр ся ой ик".split()
)
"""Frequent letter pairs: 48 % of the pairs in this pack's Russian texts, 9 % if the texts are misread as KOI8-R."""
_CYRILLIC_PAGES = ("cp1251", "koi8-r", "cp866", "mac-cyrillic", "iso8859-5")
_CYRILLIC_WORD = re.compile(r"[А-Яа-яЁё]+")
_PUNCTUATION = frozenset("«»–—…“”„‘’•·№°\xa0")
_MISREAD_CAPITALS = re.compile(r"[–—…“”„‘’•°][А-Яа-яЁё]|[А-Яа-яЁё][•°]|«(?!.*»)", re.DOTALL)
"""Punctuation where there should be none: capital letters of another code page."""
_MIN_LETTERS = 3
"""Cyrillic letters required in one word: "à" alone could be a Russian word too."""
_PAIR_BONUS, _CAPITALS_PENALTY = 1.5, 2.0
"""Added to the log-likelihood for each frequent letter pair, and subtracted from it for all-capital words."""
_MIN_MEAN_LOG_LIKELIHOOD = -3.0
"""Mean log-likelihood per letter below which text is not Russian."""
_MIN_MARGIN = 6.0
"""Minimum difference in log-likelihood between the best decoding and the second best."""

_OTHER_LATIN = ("cp1250", "cp1254", "cp1257")
"""Central European, Turkish and Baltic: code pages that can be mistaken for the Western one."""
_SYMBOLS = _PUNCTUATION - {"№"} | frozenset("™¡£€¥§©®¼½¾¿")
# The special letters of each language, and frequent words that no language of the other code pages has.
_WESTERN = tuple(
    (frozenset(letters + letters.upper()), re.compile(words, re.IGNORECASE))
    for letters, words in (
        ("àâæçèéêëîïôœùûüÿ", r"\b(?:une|avec|du|aux|qui|sous|devant|sans|cette)\b|\b[ld]['’]\w"),
        ("áéíñóúü¿¡", r"\b(?:una|el|del|con)\b"),
        ("àèéìîòóù", r"\b(?:una|della|nella|con|che)\b"),
        ("áâãàçéêíóôõúü", r"\b(?:uma|com|ao|dos|das)\b"),
        ("åäöæøé", r"\b(?:och|ett|av|til|og|det)\b"),
        ("éëïöüèê", r"\b(?:een|het)\b"),
        ("äöüß", r"\b(?:der|die|das|ein|eine|und|mit)\b"),
    )
)
_LETTERS = frozenset.union(*(letters for letters, _ in _WESTERN))


def decode(data: bytes) -> str | None:
    """The decoded text, or None if its encoding is uncertain."""
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            return _try(data, encoding)
    if b"\0" in data:  # UTF-16 without a BOM: the zero bytes of ASCII characters are all at odd or all at even offsets
        odd, even = data[1::2].count(0), data[::2].count(0)
        return _try(data, "utf-16-le" if odd > even else "utf-16-be")
    text = _try(data, "utf-8")
    if text is None:
        text = _russian(data)
    return _western(data) if text is None else text


def _try(data: bytes, encoding: str) -> str | None:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        return None


def _russian(data: bytes) -> str | None:
    texts = {text for page in _CYRILLIC_PAGES if (text := _try(data, page)) is not None and _may_be_russian(text)}
    ranked = sorted((_log_likelihood(text), text) for text in texts)
    if not ranked or (len(ranked) > 1 and ranked[-1][0] - ranked[-2][0] < _MIN_MARGIN):
        return None
    text = ranked[-1][1]
    letters = "".join(_CYRILLIC_WORD.findall(text))
    return text if _log_likelihood(text) > _MIN_MEAN_LOG_LIKELIHOOD * len(letters) else None


def _may_be_russian(text: str) -> bool:
    """Whether every word is plausible: one alphabet, consistent case, and a vowel."""
    if _MISREAD_CAPITALS.search(text):
        return False
    if any(ord(c) > 127 and c not in _PUNCTUATION and not _CYRILLIC_WORD.match(c) for c in text):
        return False
    words = [word for word in re.findall(r"[^\W\d_]+", text) if _CYRILLIC_WORD.search(word)]
    return max(map(len, words), default=0) >= _MIN_LETTERS and all(map(_is_russian_word, words))


def _log_likelihood(text: str) -> float:
    """Log-likelihood of the letters and letter pairs in Russian, up to a constant."""
    words = _CYRILLIC_WORD.findall(text)
    letters = sum(math.log(_RUSSIAN[c] / 100) for word in words for c in word.lower())
    pairs = sum(word[at : at + 2] in _RUSSIAN_PAIRS for word in map(str.lower, words) for at in range(len(word) - 1))
    # All capitals are rarer than lower case; this decides for text that is valid Russian in two code pages.
    has_capitals = any(len(word) > 1 and word.isupper() for word in words)
    return letters + _PAIR_BONUS * pairs - _CAPITALS_PENALTY * has_capitals


def _is_russian_word(word: str) -> bool:
    all_cyrillic = _CYRILLIC_WORD.fullmatch(word) is not None
    consistent_case = word.islower() or word.isupper() or word.istitle()
    pronounceable = len(word) < _MIN_LETTERS or any(c in "аеёиоуыэюя" for c in word.lower())
    return all_cyrillic and consistent_case and pronounceable and word[0].lower() not in "ъыь"


def _western(data: bytes) -> str | None:
    text = _try(data, "cp1252")
    if text is None or not _is_latin(text):
        return None
    letters = {c for c in text if ord(c) > 127 and (c.isalpha() or c in "¿¡")}
    if _is_certain(text, data):
        return text
    return text if any(letters <= own and words.search(text) for own, words in _WESTERN) else None


def _is_latin(text: str) -> bool:
    """Accented letters occur singly ("café"); two in a row mean another alphabet."""
    if re.search(r"\w„", text) or any(ord(c) > 127 and c not in _LETTERS and c not in _SYMBOLS for c in text):
        return False
    return all(set(run) <= _PUNCTUATION and len(run) < 3 for run in re.findall(r"[^\x00-\x7f]{2,}", text))


def _is_certain(text: str, data: bytes) -> bool:
    """Whether every non-ASCII letter is part of a word and the same in the other Latin code pages.

    A symbol is certain too, unless in another code page it is a letter that would be part of a word, or a different
    symbol other than a bare accent.
    """
    if any(ord(c) > 127 and c.isalpha() and not _is_joined(text, at) for at, c in enumerate(text)):
        return False  # "à", or a Russian word of one letter
    for page in _OTHER_LATIN:
        other = data.decode(page, "replace")
        for at, (here, there) in enumerate(zip(text, other, strict=True)):
            if here == there or there == "\ufffd":  # undefined in the other code page, so the text is not in it
                continue
            is_accent = unicodedata.category(there) == "Sk"
            if _is_joined(other, at) if there.isalpha() else here.isalpha() or not is_accent:
                return False
    return True


def _is_joined(text: str, at: int) -> bool:
    return any(c.isalpha() for c in text[max(0, at - 1) : at] + text[at + 1 : at + 2])
