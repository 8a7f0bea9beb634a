"""Shared by the fuzz tests: the number of cases, the seed, and ways to corrupt a file.

SUBJECTBOOTH_FUZZ sets the total number of cases of all fuzz tests (`make soak` uses 10,000), SUBJECTBOOTH_FUZZ_SEED
repeats a run, and SUBJECTBOOTH_REPORT names a file that gets one JSON line with the results of each test.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import re
from collections.abc import Callable
from pathlib import Path

SEED = int(os.environ.get("SUBJECTBOOTH_FUZZ_SEED", "20261122"))

DEFAULT_TOTAL = 1800
"""Cases of all fuzz tests in CI: the sum of the arguments of `cases`."""


def cases(default: int) -> int:
    """Number of cases for a test; `default` in CI."""
    wanted = os.environ.get("SUBJECTBOOTH_FUZZ")
    return default if wanted is None else math.ceil(default * int(wanted) / DEFAULT_TOTAL)


def report(name: str, **seen: object) -> None:
    """Report a test's results, in its output and for docs/reliability.md."""
    print(name, seen)
    if os.environ.get("SUBJECTBOOTH_REPORT"):
        with Path(os.environ["SUBJECTBOOTH_REPORT"]).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, **seen}) + "\n")


def seeded_random(name: str) -> random.Random:
    """The random generator of one test; prints its seed."""
    print(f"{name}: SUBJECTBOOTH_FUZZ_SEED={SEED}")
    return random.Random(f"{SEED} {name}")


def is_clean(message: str) -> bool:
    """Whether the message is on one line, says what is wrong, required and to be done, and has no traceback."""
    one_line = "\n" not in message.strip() and "Traceback" not in message
    return one_line and bool(re.search(r"\. Required: .+\. .+\.", message))


def files_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file()}


class Exploit:
    """Writes a file if it is ever unpickled, which must never happen."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.write_text, (self.mark, "unpickled")


def split_header(content: bytes) -> tuple[bytes, bytes]:
    """A safetensors file's header and body."""
    length = int.from_bytes(content[:8], "little")
    return content[8 : 8 + length], content[8 + length :]


def join_header(header: bytes, body: bytes, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + body


def corrupt_safetensors(content: bytes, choose: random.Random, mark: Path) -> tuple[str, bytes]:
    """Corrupt a safetensors file in a random way; returns the kind of corruption and the bytes."""
    header, body = split_header(content)
    about = json.loads(header)
    names = [name for name in about if name != "__metadata__"]
    kind = choose.choice(list(_CORRUPTIONS))
    if kind in _BYTE_CORRUPTIONS:
        return kind, _BYTE_CORRUPTIONS[kind](content, choose)
    if kind == "a pickle under its name":
        return kind, pickle.dumps(Exploit(mark))
    if kind == "header length":
        length = choose.choice([0, 1, len(header) - 1, len(header) + 1, 2**31, 2**63, 2**64 - 1, 100 * 2**20])
        return kind, join_header(header, body, length)
    if kind == "header text":
        text = choose.choice(
            [
                b"",
                b"{}",
                b"[]",
                b"null",
                b"{",
                b"[" * 100_000,
                b'{"a":' * 50_000,
                b"\xff" * 64,
                b"1" * 5000,
                b'{"__metadata__":[]}',
                b'{"__metadata__":{"a":1}}',
                b'{"a":1}',
                b"NaN",
                b'"x"',
            ]
        )
        return kind, join_header(text, body)
    if kind == "metadata":
        about["__metadata__"] = choose.choice(
            [
                None,
                [],
                "not an object",
                {"subjectbooth.trigger": "x" * 100_000},
                {"subjectbooth.trigger": "a\nb\x00"},
                {"subjectbooth.trigger": ["ohwx"]},
                {"modelspec.trigger_phrase": "embedding:secret"},
                {"ss_datasets": "{{{"},
                {"": ""},
                {"subjectbooth.run_key": "../.."},
                {"subjectbooth.trigger": "\ud800"},
                5,
                {},
            ]
        )
        if about["__metadata__"] is None:
            del about["__metadata__"]
    else:
        entry = about[choose.choice(names)]
        if kind == "offsets":
            entry["data_offsets"] = choose.choice(
                [
                    [0, 2**62],
                    [-1, 5],
                    [5, 1],
                    [0, 0],
                    "x",
                    None,
                    [0],
                    [len(body), len(body) + 8],
                    [1.5, 2],
                    [2**64, 2**65],
                ]
            )
        elif kind == "shape":
            entry["shape"] = choose.choice([[], [0], [-1], [2**40, 2**40], [1] * 1000, "x", None, [2**63], [1.5]])
        elif kind == "dtype":
            entry["dtype"] = choose.choice(["F64", "I8", "BOOL", "F8_E4M3", "BF16", "X", "", None, 7, "U64"])
        elif kind == "names":
            new = choose.choice(["", "../x", "\x00", "a" * 5000, "lora_unet_x.alpha"])
            about = {new if name == names[0] else name: value for name, value in about.items()}
    return kind, join_header(json.dumps(about).encode("utf-8", "surrogatepass"), body)


def _flip_bits(content: bytes, choose: random.Random) -> bytes:
    flipped = bytearray(content)
    for _ in range(choose.choice((1, 1, 8))):
        flipped[choose.randrange(len(flipped))] ^= 1 << choose.randrange(8)
    return bytes(flipped)


_BYTE_CORRUPTIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "zero bytes": lambda content, choose: b"",
    "truncated": lambda content, choose: content[: choose.randrange(len(content))],
    "longer": lambda content, choose: content + choose.randbytes(choose.choice((1, 8, 4096))),
    "flipped bits": _flip_bits,
    "zeroed": lambda content, choose: bytes(len(content)),
    "noise": lambda content, choose: choose.randbytes(choose.randrange(1, 4096)),
    "text": lambda content, choose: b"<!DOCTYPE html><html>404 Not Found</html>" * 10,
    "block of zeros": lambda content, choose: (
        content[: (at := choose.randrange(len(content)))] + bytes(len(content) - at)
    ),
    "values that are no numbers": lambda content, choose: content[:-64] + b"\x00\x00\xc0\x7f" * 16,
}
_CORRUPTIONS = (
    *_BYTE_CORRUPTIONS,
    "a pickle under its name",
    "header length",
    "header text",
    "metadata",
    "offsets",
    "shape",
    "dtype",
    "names",
)
