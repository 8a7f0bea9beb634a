"""The command that cleans up finds ComfyUI's folders by where the pack lies, wherever it is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from subjectbooth.trainer.errors import SubjectBoothError
from subjectbooth.trainer.shell import clean


@pytest.mark.parametrize("started", ["in the pack", "elsewhere"])
def test_comfyuis_folders_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, started: str) -> None:
    pack, output, loras = (
        tmp_path / "ComfyUI" / name for name in ("custom_nodes/SubjectBooth", "output/subjectbooth", "models/loras")
    )
    for folder in (pack, output, loras):
        folder.mkdir(parents=True)
    assert (clean.PACK_FOLDER / "trainer" / "shell" / "clean.py").is_file(), "the pack's own folder"
    monkeypatch.chdir(pack if started == "in the pack" else tmp_path)
    if started == "elsewhere":
        with pytest.raises(SubjectBoothError, match="Folder of runs not found"):
            clean._find_folders(None, None)
        monkeypatch.setattr(clean, "PACK_FOLDER", pack)
    assert clean._find_folders(None, None) == (output, output, [loras])
