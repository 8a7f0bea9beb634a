"""Convert captions to CLIP token ids with a table of the demo's few words, without a tokenizer.

`demo.making.build` generates the table with the real CLIP tokenizer; a test compares the two on captions.
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
    """Captions -> int64 [n, 77]: start, words, end, padded with end, like ComfyUI's SD 1.5 tokenizer.

    Raises:
        KeyError: a word is not in the demo base's vocabulary.
    """
    rows = []
    for text in captions:
        ids = [START, *(i for word in text.split() for i in word_ids()[word]), END]
        rows.append(ids + [END] * (LENGTH - len(ids)))
    return torch.tensor(rows)


def vocabulary() -> tuple[int, ...]:
    """All token ids that the demo's captions may contain, sorted."""
    return tuple(sorted({START, END, *(i for ids in word_ids().values() for i in ids)}))


def write_table(vocab_file: Path, merges_file: Path, words: Iterable[str]) -> None:
    """Generate the table from CLIP's vocabulary files (needs transformers)."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer(str(vocab_file), str(merges_file))
    table = {word: tokenizer(word)["input_ids"][1:-1] for word in words}
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(json.dumps(table, indent=0) + "\n", encoding="utf-8")
