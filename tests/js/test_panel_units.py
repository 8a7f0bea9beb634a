"""The training panel's pure functions (js/lib/*.mjs), run in the browser that the other tests of the editor use."""

from __future__ import annotations

import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from subjectbooth.tests.js.browser import Browser, find_chromium

ROOT = Path(__file__).resolve().parents[2]
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
