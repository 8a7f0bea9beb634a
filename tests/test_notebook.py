"""The notebook runs from top to bottom in Jupyter's kernel on the CPU, and is stored without outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "notebooks" / "dreambooth.ipynb"


def cells(kind: str, notebook: Any = None) -> list[Any]:
    notebook = notebook or json.loads(NOTEBOOK.read_text("utf-8"))
    assert notebook["nbformat"] == 4
    return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def test_it_is_stored_without_outputs_and_with_russian_headings() -> None:
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells("code"))
    headings = [cell for cell in cells("markdown") if cell["source"][0].startswith("#")]
    assert len(headings) == 5
    assert all(any("а" <= letter <= "я" for letter in cell["source"][1]) for cell in headings)


def test_it_runs(tmp_path: Path) -> None:
    pytest.importorskip("ipykernel")
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    shorter = {
        'OUTPUT = Path("demo_output/notebook")': f"OUTPUT = Path({str(tmp_path / 'out')!r})",
        "STEPS = 60": "STEPS = 4",
        '"validation_interval": 10': '"validation_interval": 1',
        "others = 2": "others = 1\nsteps = 1",
    }
    for old, new in shorter.items():
        (cell,) = [cell for cell in cells("code", notebook) if old in cell["source"]]
        cell["source"] = cell["source"].replace(old, new)
    folder = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=folder).execute()
    shown = [[output for output in cell["outputs"]] for cell in cells("code", notebook)]
    texts = ["".join(output.get("text", "") for output in outputs) for outputs in shown]
    assert any("write 'ohwx dog' in prompts" in text for text in texts)
    assert any("2 runs; page:" in text for text in texts)
    pages = [[output["data"] for output in outputs if "data" in output] for outputs in shown]
    photos, curve, page = pages[1], pages[2], pages[3]
    assert photos[0]["text/html"].count("data:image/png") == 4
    # One picture, drawn again at every score: two charts with the steps 0 to 4.
    assert [data["text/html"].count("<circle") for data in curve] == [10]
    assert any("| none |" in data["text/markdown"] and "| teacher |" in data["text/markdown"] for data in page)
    assert len(list((tmp_path / "out" / "runs").iterdir())) == 2  # the grid shares the first run
