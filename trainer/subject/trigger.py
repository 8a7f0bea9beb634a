"""Check the trigger token: it should be a single CLIP token without a meaning."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import SubjectBoothError
from .captions import without_article

DEFAULT_TOKEN = "ohwx"
GOOD_TOKENS = ("ohwx", "hta", "olis", "shs")
"""Single tokens of CLIP's vocabulary without a visual meaning."""

# CLIP's BPE merges are ordered by frequency, so a low token id means a frequent word ("red" 736, "dog" 1929, "corgi"
# 31320). From 40,000 on, short tokens are mostly meaningless ("ohwx" 47993, "hta" 49384), but longer ones are still
# names and words ("teapot" 40749).
RARE_FROM = 40_000
RARE_MAX_LETTERS = 4

KNOWN_MEANINGS = {
    "sks": "a rifle, and the base model draws weapons with it",
    "dvr": "a video recorder",
    "glock": "a pistol",
    "ssd": "a disk",
    "lsd": "a drug",
    "ufos": "flying saucers",
    "bmi": "a body measure",
    "hgtv": "a television channel",
    "wiiu": "a game console",
    "imac": "a computer",
}
# The words with a visual meaning among the vocabulary's 1,500 short rare tokens.
_WORD_LIST = (
    "foal fawn mink ibis mako ewe eels doge axes kiln kilt hula gilt blob sewn tubs bite mace puli purr lard fuzz "
    "yawn hobo pawn oily hoof tint lice hock slum thaw lox jig mew hag fez orc"
)
_WORDS = frozenset(_WORD_LIST.split())


def check_token(token: str, class_word: str, tokenize: Callable[[str], list[int]] | None) -> list[str]:
    """Warnings about the token, one sentence each; empty if it is a good one.

    Args:
        token: the word that stands for the subject.
        class_word: the kind of thing the subject is, such as "dog".
        tokenize: returns CLIP's BPE token ids of a text, without start and end tokens. None skips the checks that
            need it.
    """
    word = token.casefold()
    better = f'use "{DEFAULT_TOKEN}"' if word != DEFAULT_TOKEN else f'use "{GOOD_TOKENS[1]}"'
    if word in class_word.casefold().split():
        return [f'The token "{token}" is part of the class word, so the class itself becomes the subject: {better}.']
    if word in KNOWN_MEANINGS:
        return [f'The token "{token}" already means {KNOWN_MEANINGS[word]}: {better}.']
    if tokenize is None or word in GOOD_TOKENS:
        return []
    ids = tokenize(token)
    if len(ids) != 1:
        return [f'The token "{token}" is split into {len(ids)} CLIP tokens with their own meanings: {better}.']
    if ids[0] < RARE_FROM or len(word) > RARE_MAX_LETTERS or word in _WORDS:
        known = f"a word that CLIP already knows (number {ids[0]:,} in its vocabulary, frequent words first)"
        return [f'The token "{token}" is {known}, so its meaning leaks into the subject: {better}.']
    return []


def check_word(value: str, name: str, example: str) -> str:
    """Check a token or class word, and normalise its white space; a class word loses its article ("an old man").

    Raises:
        SubjectBoothError: empty, too long, or with a character that has a special meaning in prompts.
    """
    tidy = " ".join(value.split())
    if name == "class_word":
        tidy = without_article(tidy)
    if not tidy:
        what = "what the photos show, in a word or two" if name == "class_word" else "a word"
        raise SubjectBoothError(f"{name} is empty", f'{what}, such as "{example}"', f"fill in {name}", name)
    # ( ) and \ set weights in a ComfyUI prompt, { } are placeholders, and "embedding:" loads a file.
    special = sorted({c for c in tidy if c in "(){}\\:" or not c.isprintable()})
    if special:
        raise SubjectBoothError(
            f"{name} {tidy[:60]!r} contains {special[0]!r}",
            "plain words; this character has a special meaning in prompts",
            "remove it",
            name,
        )
    if len(tidy) > 60:
        raise SubjectBoothError(
            f"{name} is {len(tidy)} characters long",
            "one or a few words of at most 60 characters",
            "shorten it",
            name,
        )
    return tidy
