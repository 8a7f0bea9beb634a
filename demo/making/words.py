"""Captions to CLIP token ids without a tokenizer: the demo's words are few and their ids are kept in a table.

The table is made from the real CLIP tokenizer by `demo.making.build`; a test compares the two on captions.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch

TABLE = Path(__file__).parent / "weights" / "words.json"
LENGTH = 77
START, END = 49406, 49407


@cache
def word_ids() -> dict[str, list[int]]:
    """word -> its CLIP token ids."""
    table: dict[str, list[int]] = json.loads(TABLE.read_text(encoding="utf-8"))
    return table


def token_ids(captions: Iterable[str]) -> torch.Tensor:
    """Captions -> int64 [n, 77]: start, words, end, padded with end, as ComfyUI's SD 1.5 tokenizer does.

    Raises KeyError for a word the demo base was never taught.
    """
    rows = []
    for text in captions:
        ids = [START, *(i for word in text.split() for i in word_ids()[word]), END]
        rows.append(ids + [END] * (LENGTH - len(ids)))
    return torch.tensor(rows)


def vocabulary() -> tuple[int, ...]:
    """Every token id the demo's captions can hold, sorted."""
    return tuple(sorted({START, END, *(i for ids in word_ids().values() for i in ids)}))


def write_table(vocab_file: Path, merges_file: Path, words: Iterable[str]) -> None:
    """Make the table from CLIP's own vocabulary files (shell only; needs transformers)."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer(str(vocab_file), str(merges_file))
    table = {word: tokenizer(word)["input_ids"][1:-1] for word in words}
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(json.dumps(table, indent=0) + "\n", encoding="utf-8")
