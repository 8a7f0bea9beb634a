"""The drawings' packages, which all training processes ask for at the same time.

With a program of ours in the place of npm: what it fetches must come slowly, and its registry is not there in CI.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from subjectbooth.demo.making import pictures
from subjectbooth.demo.making.pictures import PACKAGES, package, svg_drawings

SLOW_NPM = f"""#!{sys.executable}
import sys, time
assert sys.argv[1] == "pack", sys.argv
with open("iconify-json-noto-1.2.9.tgz", "w") as tarball:
    tarball.write("first half, ")
    tarball.flush()
    time.sleep(1)
    tarball.write("second half")
"""


@pytest.mark.skipif(os.name == "nt", reason="the program in npm's place is a script with a shebang")
def test_no_process_sees_a_package_that_another_has_half_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert PACKAGES["noto"] == "@iconify-json/noto@1.2.9"
    program = tmp_path / "bin" / "npm"
    program.parent.mkdir()
    program.write_text(SLOW_NPM)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    folder = tmp_path / "npm"
    seen: list[str] = []

    def ask() -> None:
        seen.append(package("noto", folder).read_text())

    asking = [threading.Thread(target=ask) for _ in range(2)]
    for thread in asking:
        thread.start()
        time.sleep(0.5)
    for thread in asking:
        thread.join()
    assert seen == ["first half, second half"] * 2
    assert [path.name for path in folder.iterdir()] == ["iconify-json-noto-1.2.9.tgz"]


def test_without_npm_the_error_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="npm"):
        package("noto", tmp_path / "npm")


def write_package(folder: Path, name: str, **files: object) -> None:
    """A tarball as npm packs it, of these .json files."""
    with tarfile.open(folder / name, "w:gz") as archive:
        for file, content in files.items():
            data = json.dumps(content).encode()
            member = tarfile.TarInfo(f"package/{file}.json")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def test_a_set_without_code_points_is_read_by_notos_names_and_older_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The drawing itself needs a package that only the build has: here it gives its icon's name back."""
    monkeypatch.setattr(pictures, "_draw", lambda icons, name: np.array(name))
    codes = {"1f436": "dog-face", "1f431": "cat-face", "1f3af": "bullseye", "1f9f8": "teddy-bear"}
    write_package(tmp_path, "iconify-json-noto-1.2.9.tgz", icons={"icons": dict.fromkeys(codes.values())}, chars=codes)
    icons = {"dog-face": {}, "kitty": {}, "direct-hit": {}}
    older = {"icons": icons, "aliases": {"cat-face": {"parent": "kitty"}}}
    write_package(tmp_path, "iconify-json-emojione-1.2.3.tgz", icons=older, chars={})
    found = {word: str(drawing) for word, drawing in svg_drawings("emojione", tmp_path).items()}
    assert found == {"dog": "dog-face", "cat": "cat-face", "dart": "direct-hit"}
    found = {word: str(drawing) for word, drawing in svg_drawings("noto", tmp_path).items()}
    assert found == {"dog": "dog-face", "cat": "cat-face", "dart": "bullseye", "teddy bear": "teddy-bear"}
