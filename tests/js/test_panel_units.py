"""The training panel's pure functions (js/lib/*.mjs), run in the browser that the other tests of the editor use."""

from __future__ import annotations

import functools
import http.server
import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from subjectbooth.tests.conftest import module_alone
from subjectbooth.tests.js.browser import Browser, find_chromium
from subjectbooth.trainer.errors import SubjectBoothError
from subjectbooth.trainer.subject.checks import PhotoStats, findings
from subjectbooth.trainer.subject.notes import Note, sentences
from subjectbooth.trainer.subject.photo_files import caption_notes
from subjectbooth.trainer.subject.photos import check_size, list_photos, read_photo
from subjectbooth.trainer.subject.subject import mask_outside_crop_warning
from subjectbooth.trainer.subject.trigger import check_token, check_word

ROOT = Path(__file__).resolve().parents[2]
LABELS = {"class_word", "lora_name"}
"""Inputs whose labels are translated."""
pytestmark = pytest.mark.skipif(not find_chromium(), reason="no Chromium on this machine (CHROMIUM_PATH names one)")


class _Quiet(http.server.SimpleHTTPRequestHandler):
    extensions_map = {**http.server.SimpleHTTPRequestHandler.extensions_map, ".mjs": "text/javascript"}

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where the repository is served: a page may not import modules from a disk."""
    handler = functools.partial(_Quiet, directory=str(ROOT))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_pure_functions(address: str) -> None:
    with Browser() as browser:
        page = browser.open(f"{address}/tests/js/")
        page.wait_for(f"location.href.startsWith('{address}') && document.readyState === 'complete'")
        # Held by the window: a promise that nothing refers to may be collected while it is waited for.
        found = page.evaluate("window.found = import('/tests/js/panel_units.mjs').then(({ run }) => run())", 120)
    assert len(found) >= 15
    failed = [f"{name}: {error}" for name, error in found if error]
    assert not failed, "\n".join(failed)


def warnings_of_the_trainer(folder: Path) -> list[str]:
    """One of each kind, for one photo and for several."""
    same = np.zeros((16, 16), bool)
    found: list[str] = []
    for count, side in ((1, 100), (2, 100), (1, 900), (2, 900), (4, 900)):
        stats = [PhotoStats(side, side, same, np.zeros((8, 8, 3), np.float32), True) for _ in range(count)]
        found += [finding.text for finding in findings([f"{number}.png" for number in range(count)], stats, 512)]
    for kind in ("frames", "white", "torn", "empty mask"):
        found += [*sentences([Note(kind, "a.png", "3 frames")]), *sentences([Note(kind, name) for name in "abcdef"])]
    found += [mask_outside_crop_warning(names, "center") for names in (["a.png"], ["a.png", "b.png"])]
    for name in "ab":
        (folder / f"{name}.txt").write_text("x", encoding="utf-8")
        found += caption_notes(sorted(folder.glob("*.txt")), "template")
    for token, ids in (("dog", [1]), ("sks", [1]), ("zwx", [1, 2]), ("red", [736])):
        found += check_token(token, "dog", lambda _, ids=ids: ids)  # type: ignore[misc]
    return [*found, *problems_of_photos(folder)]


def problems_of_photos(folder: Path) -> list[str]:
    """What a user can do wrong with photos and words, as the server reports it."""
    (folder / "empty").mkdir()
    contents = {
        "a.nef": b"x",
        "b.jpg": b"\0\0\0\x18ftypheic" + bytes(20),
        "c.png": b"\x89PNG\r\n\x1a\n" + bytes(20),
        "d.jpg": b"text",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    Image.new("RGBA", (64, 64)).save(folder / "e.png")
    inside = module_alone("safe_paths").inside
    wrong: list[Callable[[], object]] = [
        lambda: check_word(" ", "class_word", "dog"),
        lambda: list_photos(folder / "missing"),
        lambda: list_photos(folder / "empty"),
        lambda: inside(folder, "../elsewhere", "folder"),
        *(functools.partial(read_photo, folder / name) for name in [*contents, "e.png"]),
        *(functools.partial(check_size, size, "f.png") for size in ((10**5, 10**5), (2, 2), (9000, 90))),
    ]
    found = []
    for act in wrong:
        with pytest.raises(SubjectBoothError) as caught:
            act()
        found.append(str(caught.value))
    return found


def test_warnings_and_the_templates_titles_and_notes_are_russian_in_russian(address: str, tmp_path: Path) -> None:
    warnings = warnings_of_the_trainer(tmp_path)
    assert len(warnings) >= 20 and len({warning[:12] for warning in warnings}) >= 12
    workflows = [json.loads(path.read_text("utf-8")) for path in (ROOT / "example_workflows").glob("*.json")]
    inside = [box for workflow in workflows for box in workflow.get("definitions", {}).get("subgraphs", [])]
    nodes = [node for graph in [*workflows, *inside] for node in graph["nodes"]]
    titles = {node["title"] for node in nodes if "title" in node}
    folded = {node["title"] for node in nodes if node.get("flags", {}).get("collapsed")}
    notes = sorted(node["widgets_values"][0] for node in nodes if node["type"] in ("Note", "MarkdownNote"))
    assert len(notes) == len(workflows)
    with Browser() as browser:
        page = browser.open(f"{address}/tests/js/")
        page.wait_for(f"location.href.startsWith('{address}') && document.readyState === 'complete'")
        translate = (
            "window.found = Promise.all(['warnings', 'titles', 'notes'].map(name => import(`/js/lib/${name}.mjs`)))"
            ".then(([w, t, n]) => [..."
            f" ['ru', 'en'].map(l => [{json.dumps(warnings)}.map(text => w.warningIn(l, text)),"
            f" {json.dumps(sorted(titles))}.map(text => t.titleIn(l, text)),"
            f" {json.dumps(notes)}.map(text => n.noteIn(l, text))]),"
            f" Object.keys(n.RUSSIAN), {json.dumps(notes)}.map(text => n.noteIn('ru', text + '!'))])"
        )
        (russian, titled, noted), english, paragraphs, edited = page.evaluate(translate, 60)
    assert english == [warnings, sorted(titles), notes]
    # The classic editor cuts a folded node's title there.
    assert folded and all(
        len(title) <= 20 for title in [*folded, *(dict(zip(sorted(titles), titled, strict=True))[f] for f in folded)]
    )
    assert edited == [f"{note}!" for note in notes], "what a user has written stays"
    assert set(paragraphs) == {paragraph for note in notes for paragraph in note.split("\n\n")}
    for note, translated in zip(notes, noted, strict=True):
        pairs = list(zip(note.split("\n\n"), translated.split("\n\n"), strict=True))
        assert [text for _, text in pairs if not re.search("[а-яё]", text)] == [], note
        # The names of files and settings, which are not translated.
        kept = [set(re.findall(r"\d+|\w+_\w+|\{\w+\}|[\w/]+/\w+", text)) - LABELS for pair in pairs for text in pair]
        assert kept[::2] == kept[1::2], note
    assert [text for text in [*russian, *titled] if not re.search("[а-яё]", text)] == []
    assert [text for text in russian if re.search("<|>|photos|trained|ignored|Required|undefined", text)] == []
    assert any("5" not in text and "a, b и ещё 4" in text for text in russian), "the names are kept"
