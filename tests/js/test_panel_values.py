"""The plain functions behind the panels, run by node where it is to be had."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

JS = Path(__file__).resolve().parents[2] / "js"
NODE = shutil.which("node")
A, B = "a" * 64, "b" * 64


def run(module: str, expression: str) -> Any:
    """The JSON value of an expression that may use what the module exports, as `m`."""
    if NODE is None:
        pytest.skip("no node on this machine; the panels' own tests run the same functions in Chromium")
    address = (JS / "lib" / module).as_uri()
    program = f"import * as m from {json.dumps(address)}; console.log(JSON.stringify({expression}) ?? 'null')"
    done = subprocess.run(
        [NODE, "--input-type=module", "-e", program], capture_output=True, text=True, timeout=60, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_list_of_photos() -> None:
    cases = run(
        "photos.mjs",
        """[m.namesOf(""), m.namesOf("a.png"), m.namesOf(["a", "", null, "b"]), m.namesOf(null), m.valueOf([]),
            m.valueOf(["a"]), m.withAdded(["a", "b"], ["b", "c"]), m.without(["a", "b", "c"], 1),
            m.moved(["a", "b", "c"], 0, 2), m.moved(["a", "b", "c"], 2, 0), m.moved(["a", "b"], 0, 5),
            m.moved(["a", "b"], NaN, 0)]""",
    )
    assert cases == [
        [], ["a.png"], ["a", "b"], [], "", ["a"], ["a", "b", "c"], ["a", "c"], ["b", "c", "a"], ["c", "a", "b"],
        ["a", "b"], ["a", "b"],
    ]  # fmt: skip


def test_the_label_of_several_photos() -> None:
    """What the front end asks with: 1.32.9 a joined text, 1.58.1 the list, and both each option of the list."""
    assert run(
        "photos.mjs",
        """[m.labelOf(["a", "b"], "a,b"), m.labelOf(["a", "b"], ["a", "b"]), m.labelOf(["a"], "a"),
            m.labelOf(["a", "b"], "c"), m.labelOf("a", "a"), m.labelOf("", null)]""",
    ) == ["2 photos: a, b", "2 photos: a, b", "a", "c", "a", ""]


def test_a_class_image_is_left_out_and_taken_back() -> None:
    out, both, back, full, short = run(
        "photos.mjs",
        f"""(() => {{ const a = "{A}".slice(0, 32), b = "{B}".slice(0, 32); const out = m.toggled("", a);
            const both = m.toggled(out, b); return [out, both, m.toggled(both, a),
            [m.isExcluded("{A}, x", a), m.toggled("{A}", a)], [m.isExcluded("AAAAAAAA", a), m.isExcluded("", a)]];
            }})()""",
    )
    assert (out, both, back) == ("a" * 12, f"{'a' * 12}\n{'b' * 12}", "b" * 12)
    assert full == [True, ""] and short == [True, False]


def test_pictures_of_several_messages_are_each_there_once() -> None:
    merged = run(
        "photos.mjs",
        """m.merged([{hash: "a", n: 1}, {hash: "b", n: 1}], [{hash: "a", n: 2}, {hash: "c", n: 2}], 2)""",
    )
    assert merged == [{"hash": "b", "n": 1}, {"hash": "c", "n": 2}]


def test_every_word_of_the_panels_is_there_in_russian() -> None:
    used = set()
    for path in [*JS.glob("*.js"), *(JS / "lib").glob("*.mjs")]:
        if path.name.startswith("gallery"):  # has a table of its own
            continue
        used |= set(re.findall(r'\bt\(\s*"([^"]+)"', path.read_text("utf-8")))
    table = run("words.mjs", "m.RUSSIAN")
    assert set(table) == used and all(table.values())
    assert [re.findall(r"\{\w+\}", key) for key in table] == [re.findall(r"\{\w+\}", text) for text in table.values()]
    assert run("words.mjs", "(m.speak('ru'), m.t('and {n} more', {n: 3}))") == "и ещё 3"
    assert run("words.mjs", "(m.speak('fr'), m.t('and {n} more', {n: 3}))") == "and 3 more"


def test_the_reports_that_are_translated_are_those_of_the_nodes() -> None:
    sources = "".join(path.read_text("utf-8") for path in (JS.parent / "nodes").glob("*.py"))
    words = {word for text in run("reports.mjs", "Object.keys(m.REPORTS)") for word in re.split(r"<\w+>|[^\w ]", text)}
    assert len(words) > 20 and [word for word in words if word.strip() not in sources] == []


def test_the_about_badge_has_the_packs_version() -> None:
    project = (JS.parent / "pyproject.toml").read_text("utf-8")
    script = (JS / "about.js").read_text("utf-8")
    for name, pattern in (("VERSION", r'^version = "(.+)"'), ("REPOSITORY", r'^Repository = "(.+)"')):
        found = re.search(pattern, project, re.MULTILINE)
        assert found and f'const {name} = "{found[1]}";' in script
