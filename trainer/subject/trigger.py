"""Is the trigger token a good name for a subject? One CLIP token that means nothing yet."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import SubjectBoothError
from .captions import without_article

DEFAULT_TOKEN = "ohwx"
GOOD_TOKENS = ("ohwx", "hta", "olis", "shs")
"""Single tokens of CLIP's vocabulary that name nothing a picture could show."""

# CLIP's BPE merges are numbered by how often their letters were seen together, so a low number is a frequent
# word ("red" 736, "dog" 1929, "corgi" 31320). From 40,000 on, short tokens are mostly letters that mean nothing
# ("ohwx" 47993, "hta" 49384); longer ones still are names and words ("teapot" 40749).
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
# Words among the short rare tokens: of the vocabulary's 1,500, these are what a picture can show.
_WORD_LIST = (
    "foal fawn mink ibis mako ewe eels doge axes kiln kilt hula gilt blob sewn tubs bite mace puli purr lard fuzz "
    "yawn hobo pawn oily hoof tint lice hock slum thaw lox jig mew hag fez orc"
)
_WORDS = frozenset(_WORD_LIST.split())


def check_token(token: str, class_word: str, tokenize: Callable[[str], list[int]] | None) -> list[str]:
    """Warnings about the token, each a sentence; empty when it is a good one.

    Args:
        token: the word that is to name the subject.
        class_word: what the subject is one of.
        tokenize: CLIP's BPE token ids of a text, without start and end. None skips what needs it.
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
        return [f'The token "{token}" is {len(ids)} CLIP tokens, so its parts bring their own meanings: {better}.']
    if ids[0] < RARE_FROM or len(word) > RARE_MAX_LETTERS or word in _WORDS:
        known = f"a word that CLIP already knows (number {ids[0]:,} of its vocabulary, frequent words first)"
        return [f'The token "{token}" is {known}, so what it means gets mixed into the subject: {better}.']
    return []


def check_word(value: str, name: str, example: str) -> str:
    """A token or class word, tidied; a class word without the article in front ("an old man").

    Raises:
        SubjectBoothError: empty, longer than a few words, or with a character that means something in prompts.
    """
    tidy = " ".join(value.split())
    if name == "class_word":
        tidy = without_article(tidy)
    if not tidy:
        raise SubjectBoothError(f"{name} is empty", f'a word such as "{example}"', f"fill in {name}", name)
    # ( ) and \ set weights in a ComfyUI prompt, { } are placeholders, and "embedding:" loads a file.
    strange = sorted({c for c in tidy if c in "(){}\\:" or not c.isprintable()})
    if strange:
        raise SubjectBoothError(
            f"{name} {tidy[:60]!r} has {strange[0]!r} in it",
            "plain words: prompts give that character another meaning",
            "remove it",
            name,
        )
    if len(tidy) > 60:
        raise SubjectBoothError(
            f"{name} is {len(tidy)} characters long",
            "a word or a few, at most 60 characters",
            "shorten it",
            name,
        )
    return tidy
