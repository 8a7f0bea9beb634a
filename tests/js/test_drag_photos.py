"""Photos are put in another order by dragging one tile onto another, in both renderers."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from subjectbooth.tests.comfy_server import ComfyClient
from subjectbooth.tests.js.browser import Browser, Page, find_chromium
from subjectbooth.tests.js.panel_steps import (
    USUAL,
    add,
    files,
    ours,
    reload_with,
    set_widgets,
    tiles,
    value,
)

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.skipif(not find_chromium(), reason="no Chromium on this machine (CHROMIUM_PATH names one)"),
]
TILES = "[...made.widgets.find(w => w.type === 'SUBJECTBOOTH_PHOTOS').element.querySelectorAll('[data-photo]')]"


@pytest.fixture(scope="module", params=["classic", "nodes 2.0"])
def page(_comfy_client: ComfyClient, request: pytest.FixtureRequest) -> Iterator[Page]:
    """The editor with three photos in a node."""
    with Browser() as browser:
        page = browser.open("about:blank")
        reload_with(_comfy_client, page, Comfy_VueNodes_Enabled=request.param != "classic")
        add(page, "LoadSubjectImages")
        set_widgets(page, class_word="cat", resolution=128)
        page.evaluate(f"made.onDragDrop({{dataTransfer: {files('chelsea', 'coffee', 'rocket')}}})")
        tiles(page, 3)
        yield page
        for setting, usual in USUAL.items():
            _comfy_client.request("POST", f"/settings/{setting}", usual)


def drag(page: Page, start: str, target: str, transfer: str = "new DataTransfer()") -> list[str]:
    """The events of one drag, as the browser sends them; which of them somebody has taken for his own."""
    taken: list[str] = page.evaluate(
        f"(() => {{ const dataTransfer = {transfer}; const taken = [];"
        " const send = (element, type) => { const event = new DragEvent(type,"
        "   {bubbles: true, cancelable: true, composed: true, dataTransfer});"
        "  element.dispatchEvent(event); if (event.defaultPrevented) taken.push(type); };"
        f" const start = {start}, target = {target};"
        " if (start && !start.draggable) throw new Error('it cannot be dragged');"
        " if (start) send(start, 'dragstart');"
        " send(target, 'dragenter'); send(target, 'dragover'); send(target, 'drop');"
        " if (start) send(start, 'dragend'); return taken; })()"
    )
    return taken


def order(page: Page, expected: list[str]) -> None:
    """Value, tiles and what is sent are in this order."""
    page.wait_for(f"[made.widgets[0].value].flat().join('|') === {json.dumps('|'.join(expected))}", 10)
    assert [tile["name"] for tile in tiles(page, len(expected))] == expected
    prompt = page.evaluate("app.graphToPrompt().then(p => JSON.parse(JSON.stringify(p.output)))")
    assert [node["inputs"]["images"] for node in prompt.values() if len(node["inputs"]["images"])] == [
        {"__value__": expected}
    ]


@pytest.mark.parametrize(("start", "target"), [(0, 2), (2, 0), (1, 2), (1, 1)])
def test_a_photo_goes_where_it_is_dropped(page: Page, start: int, target: int) -> None:
    before = value(page)
    taken = drag(page, f"{TILES}[{start}]", f"{TILES}[{target}]")
    assert {"dragover", "drop"} <= set(taken), "the browser would refuse the drop, or open what was dropped"
    expected = before[:start] + before[start + 1 :]
    order(page, [*expected[:target], before[start], *expected[target:]])
    assert page.evaluate("document.querySelectorAll('.sb-over').length") == 0
    assert not ours(page)


def test_a_drag_with_the_mouse(page: Page) -> None:
    """Nothing of the editor takes the mouse away from the tile."""
    before = value(page)
    places = page.evaluate(
        f"{TILES}.map(t => t.getBoundingClientRect()).map(b => ({{x: b.x + b.width / 3, y: b.y + b.height * 0.6}}))"
    )
    page.evaluate(
        "(() => { window.seen = ''; for (const type of ['dragstart', 'dragover']) document.addEventListener(type,"
        " e => { window.seen = `${type} ${e.target.closest?.('[data-photo]')?.dataset.photo}`; }, true); })()"
    )

    def move(to: dict[str, float], until: str) -> None:
        """Drags start and go on in the browser's own time; it is told of a move again until it has seen it."""
        for wiggle in range(50):
            page.call(
                "Input.dispatchMouseEvent",
                type="mouseMoved",
                button="left",
                buttons=1,
                x=to["x"] + wiggle % 2,
                y=to["y"],
            )
            if page.evaluate("window.seen").startswith(until):
                return
            time.sleep(0.1)
        raise TimeoutError(f"no {until}")

    page.call("Input.dispatchMouseEvent", type="mouseMoved", **places[0])
    page.call("Input.dispatchMouseEvent", type="mousePressed", button="left", buttons=1, clickCount=1, **places[0])
    move({"x": places[0]["x"] + 15, "y": places[0]["y"] + 5}, "drag")
    move(places[2], f"dragover {before[2]}")
    page.call("Input.dispatchMouseEvent", type="mouseReleased", button="left", clickCount=1, **places[2])
    order(page, [before[1], before[2], before[0]])


def test_what_is_no_photo_of_this_node_moves_nothing(page: Page) -> None:
    before = value(page)
    for data in ("'text/plain', 'hello'", "'text/subjectbooth-photo', '999:0'", "'text/subjectbooth-photo', ''"):
        transfer = f"(() => {{ const t = new DataTransfer(); t.setData({data}); return t; }})()"
        assert "drop" in drag(page, "null", f"{TILES}[1]", transfer), "else the browser would leave the page"
    page.evaluate("new Promise(done => setTimeout(done, 200))")
    order(page, before)
    # A file that is dropped on a tile is a new photo, as anywhere in the panel.
    drag(page, "null", f"{TILES}[1]", files("astronaut"))
    tiles(page, 4)
    assert value(page)[:3] == before and len(value(page)) == 4
