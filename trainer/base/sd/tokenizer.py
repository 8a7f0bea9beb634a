"""CLIP's tokenizer, from merges that the pack includes, so that a run from a shell needs no download.

In ComfyUI its own tokenizer is used instead. The merges are OpenAI's (github.com/openai/CLIP, MIT licence).
"""

from __future__ import annotations

import lzma
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ...errors import require

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MERGES = Path(__file__).parent / "assets" / "clip_merges.txt.xz"
START, END = 49406, 49407
CHUNK = 75
"""Text tokens in a chunk of 77; the other two are start and end."""

_WORD = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


@cache
def clip_tokenizer() -> Tokenizer:
    """The byte-pair encoding of CLIP (arXiv 2103.00020), without start and end tokens."""
    require("tokenizers")
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

    lines = lzma.decompress(MERGES.read_bytes()).decode("utf-8").splitlines()
    merges = [(first, second) for first, second in map(str.split, lines)]
    letters = _byte_letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    vocabulary = {word: number for number, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    model = models.BPE(
        vocab=vocabulary,
        merges=merges,  # type: ignore[arg-type]
        unk_token="<|endoftext|>",
        continuing_subword_prefix="",
        end_of_word_suffix="</w>",
        fuse_unk=False,
    )
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(  # type: ignore[assignment]
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [  # type: ignore[assignment]
            pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return tokenizer


def tokenize(text: str) -> list[int]:
    """Token ids of a text, without start and end tokens."""
    return list(clip_tokenizer().encode(text, add_special_tokens=False).ids)


def chunks(text: str, padding: int = END) -> torch.Tensor:
    """Chunks of a text, int64 [n, 77]: start, up to 75 tokens, end, padding. One chunk for an empty text."""
    ids = tokenize(text)
    rows = [_row(ids[first : first + CHUNK], padding) for first in range(0, max(1, len(ids)), CHUNK)]
    return torch.tensor(rows)


def _row(ids: Sequence[int], padding: int) -> list[int]:
    return [START, *ids, END, *[padding] * (CHUNK - len(ids))]


def _byte_letters() -> list[str]:
    """The 256 letters that represent bytes, in CLIP's order: printable ones first, then the others, from 256 up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(len(moved))]
