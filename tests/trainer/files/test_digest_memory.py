"""A large file is hashed once, and again whenever its content may have changed."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from subjectbooth.trainer.files import digest_memory
from subjectbooth.trainer.files.digest_memory import DigestMemory, digest_of_files
from subjectbooth.trainer.files.storage import sha256_of

SIZE = 3 << 20
HOUR = 3600


class Hashed:
    """Digests of files, and how often one was computed."""

    def __init__(self, folder: Path | None) -> None:
        self.memory, self.count = DigestMemory(folder), 0

    def __call__(self, *paths: Path, others: str = "") -> str:
        def compute() -> str:
            self.count += 1
            return sha256_of(*paths, others)

        return digest_of_files(paths, others, compute, self.memory)


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large.safetensors"
    path.write_bytes(os.urandom(SIZE))
    age(path)
    return path


def age(path: Path) -> None:
    """What has just been written could still change within the same tick of the clock."""
    os.utime(path, (time.time() - HOUR, time.time() - HOUR))


def test_an_unchanged_file_is_hashed_once_for_all_processes(tmp_path: Path, large: Path) -> None:
    first = Hashed(tmp_path / "memory")
    digest = first(large)
    again = Hashed(tmp_path / "memory")
    assert digest == again(large) == sha256_of(large, "")
    assert (first.count, again.count) == (1, 0)
    assert again(large, others="another prediction type") == sha256_of(large, "another prediction type")
    assert again.count == 1


def replaced(path: Path) -> None:
    """Another file of the same size, copied there with its times."""
    other = path.with_name("other")
    other.write_bytes(os.urandom(SIZE))
    os.utime(other, (path.stat().st_atime, path.stat().st_mtime))
    shutil.copy2(other, path)


def edited(path: Path) -> None:
    """A byte where no sample lies; the modification time is restored."""
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    with path.open("r+b") as file:
        file.seek(digest_memory.SAMPLE_BYTES + 100)
        old = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([old[0] ^ 1]))
    os.utime(path, ns=times)


def appended(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")
    age(path)


@pytest.mark.parametrize("change", [replaced, appended, edited])
def test_a_changed_file_is_hashed_again(tmp_path: Path, large: Path, change: Callable[[Path], None]) -> None:
    if change is edited and sys.platform == "win32":
        pytest.skip("Windows does not record when a file was changed last, other than a time that can be set")
    hashed = Hashed(tmp_path / "memory")
    before = hashed(large)
    change(large)
    assert hashed(large) == sha256_of(large, "") != before
    assert hashed.count == 2


def test_the_sample_alone_tells_files_of_the_same_size_and_times_apart(
    tmp_path: Path, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on systems without the time of the last change: the two files have the same path, size and times."""
    about = large.stat()
    monkeypatch.setattr(Path, "stat", lambda self, **_: about)
    before = digest_memory.file_identity(large)
    middle = (SIZE - digest_memory.SAMPLE_BYTES) * 32 // (digest_memory.SAMPLES - 1)
    for position in (0, middle, SIZE - 1):
        content = bytearray(large.read_bytes())
        content[position] ^= 1
        large.write_bytes(content)
        after = digest_memory.file_identity(large)
        assert after != before
        before = after


def test_a_file_that_is_still_being_written_is_not_remembered(tmp_path: Path, large: Path) -> None:
    hashed = Hashed(tmp_path / "memory")
    os.utime(large)
    hashed(large)
    assert hashed(large) == sha256_of(large, "") and hashed.count == 2
    age(large)

    def compute() -> str:
        appended(large)
        return sha256_of(large)

    digest_of_files([large], "", compute, hashed.memory)
    hashed(large)
    assert hashed.count == 3


@pytest.mark.parametrize("content", [b"", b"\xff" * 64, b"0" * 63, b"0" * 65])
def test_a_damaged_memory_is_replaced(tmp_path: Path, large: Path, content: bytes) -> None:
    hashed = Hashed(tmp_path / "memory")
    digest = hashed(large)
    (kept,) = (tmp_path / "memory").iterdir()
    kept.write_bytes(content)
    assert hashed(large) == digest and hashed.count == 2
    assert hashed(large) == digest and hashed.count == 2


def test_a_folder_that_cannot_be_written_only_costs_time(tmp_path: Path, large: Path) -> None:
    blocked = tmp_path / "memory"
    blocked.write_text("a file")
    for folder in (blocked, blocked / "below", None):
        hashed = Hashed(folder)
        assert hashed(large) == hashed(large) == sha256_of(large, "")
        assert hashed.count == 2
    assert blocked.read_text() == "a file"


def test_only_the_digests_in_use_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest_memory, "MOST_KEPT", 3)
    memory = DigestMemory(tmp_path)
    keys = [sha256_of(str(number)) for number in range(5)]
    for number, key in enumerate(keys):
        memory.keep(key, key)
        os.utime(tmp_path / key, (HOUR + number, HOUR + number))
        assert memory.find(keys[0]) == keys[0]  # used all the time
    assert [key for key in keys if memory.find(key)] == [keys[0], keys[3], keys[4]]


def test_several_can_write_at_once(tmp_path: Path) -> None:
    """Readers see a whole digest or none, and no temporary file is left."""
    memory, key, digests = DigestMemory(tmp_path), "0" * 64, ["1" * 64, "2" * 64]
    with ThreadPoolExecutor(2) as pool:
        writers = [
            pool.submit(lambda digest=digest: [memory.keep(key, digest) for _ in range(20)]) for digest in digests
        ]
        seen = {memory.find(key)}
        while not all(writer.done() for writer in writers):
            seen.add(memory.find(key))
    assert seen <= {None, *digests} and memory.find(key) in digests
    assert [path.name for path in tmp_path.iterdir()] == [key]


def test_the_users_folder_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUBJECTBOOTH_CACHE", str(tmp_path / "chosen"))
    assert digest_memory.user_cache_folder() == tmp_path / "chosen"
    monkeypatch.delenv("SUBJECTBOOTH_CACHE")
    if sys.platform.startswith("linux"):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert digest_memory.user_cache_folder() == tmp_path / "subjectbooth" / "digests"
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert digest_memory.user_cache_folder() == tmp_path / "home" / ".cache" / "subjectbooth" / "digests"
