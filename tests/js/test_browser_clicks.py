"""The tests' own mouse: a click that misses a moving button is made again, one that is swallowed is an error."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from subjectbooth.tests.js.browser import Browser, Page, find_chromium

pytestmark = pytest.mark.skipif(not find_chromium(), reason="no Chromium on this machine (CHROMIUM_PATH names one)")
BUTTON = "document.querySelector('button')"


@pytest.fixture
def page() -> Iterator[Page]:
    with Browser() as browser:
        page = browser.open("about:blank")
        page.evaluate(
            "document.body.innerHTML = '<button style=\"position: fixed; left: 0; top: 0\">Go</button>';"
            f"window.clicks = 0; {BUTTON}.addEventListener('click', () => {{ window.clicks += 1; }})"
        )
        yield page


@pytest.mark.parametrize("when", ["mousemove", "mousedown"])
def test_a_button_that_moves_away_once_is_clicked_once(page: Page, when: str) -> None:
    page.evaluate(f"addEventListener('{when}', () => {{ {BUTTON}.style.left = '300px'; }}, {{once: true}})")
    page.click(BUTTON, 10)
    assert page.evaluate("window.clicks") == 1
    assert page.evaluate(f"{BUTTON}.style.left") == "300px"


def test_a_button_that_goes_away_at_the_press_has_had_it(page: Page) -> None:
    page.evaluate(f"{BUTTON}.addEventListener('mousedown', event => event.target.remove())")
    page.click(BUTTON, 10)
    assert page.evaluate(f"{BUTTON}") is None


def test_swallowed_clicks_are_an_error(page: Page) -> None:
    page.evaluate("addEventListener('click', event => event.stopImmediatePropagation(), true)")
    with pytest.raises(RuntimeError, match="swallowed"):
        page.click(BUTTON, 10)
