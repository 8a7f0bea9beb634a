"""The drawings' packages, which all training processes ask for at the same time.

With a program of ours in the place of npm: what it fetches must come slowly, and its registry is not there in CI.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import pytest

from subjectbooth.demo.pictures import PACKAGES, package

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
