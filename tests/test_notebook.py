"""The notebook runs from top to bottom on the CPU, as nbclient would run it, and is stored without outputs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "notebooks" / "dreambooth.ipynb"

DISPLAY = """
import json, os
class Shown:
    def __init__(self, text): self.text = text
HTML = Markdown = Shown
def display(shown, display_id=None, update=False):
    with open(os.environ["SHOWN"], "a", encoding="utf-8") as file:
        file.write(json.dumps([display_id, update, shown.text]) + "\\n")
"""
"""In place of IPython.display, which is not installed for the tests: writes down what is shown."""


def cells(kind: str) -> list[dict[str, Any]]:
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    assert notebook["nbformat"] == 4
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_it_is_stored_without_outputs_and_with_russian_headings() -> None:
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells("code"))
    headings = [cell for cell in cells("markdown") if cell["source"][0].startswith("#")]
    assert len(headings) == 5
    assert all(any("а" <= letter <= "я" for letter in cell["source"][1]) for cell in headings)


def test_it_runs(tmp_path: Path) -> None:
    (tmp_path / "IPython").mkdir()
    (tmp_path / "IPython" / "__init__.py").touch()
    (tmp_path / "IPython" / "display.py").write_text(DISPLAY, "utf-8")
    script = "\n\n".join("".join(cell["source"]) for cell in cells("code"))
    shorter = {
        'OUTPUT = Path("demo_output/notebook")': f"OUTPUT = Path({str(tmp_path / 'out')!r})",
        "STEPS = 60": "STEPS = 4",
        '"validation_interval": 10': '"validation_interval": 1',
        "others = 2": "others = 1\nsteps = 1",
    }
    for old, new in shorter.items():
        assert script.count(old) == 1
        script = script.replace(old, new)
    (tmp_path / "notebook.py").write_text(script, "utf-8")
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "SHOWN": str(tmp_path / "shown")}
    command = [sys.executable, str(tmp_path / "notebook.py")]
    done = subprocess.run(command, cwd=ROOT / "notebooks", env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "write 'ohwx dog' in prompts" in done.stdout and "2 runs; page:" in done.stdout
    shown = [json.loads(line) for line in (tmp_path / "shown").read_text("utf-8").splitlines()]
    curve = [text for name, _, text in shown if name == "curve"]
    assert [text.count("<circle") for text in curve[1:]] == [2, 4, 6, 8, 10]  # two charts; steps 0 to 4
    assert [update for name, update, _ in shown if name == "curve"] == [False, True, True, True, True, True]
    assert any("| none |" in text and "| teacher |" in text for _, _, text in shown)
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 2  # the grid shares the first run
