"""Drives a real, headless Chromium over its DevTools protocol: what the UI tests need of it, and no more.

Needs a `chromium` (or Chrome) on this machine and aiohttp, which ComfyUI brings; no node, no driver program.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from subjectbooth.tests.comfy_server import ComfyClient

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--mute-audio",
    "--remote-debugging-port=0",
)
READY = (
    "!!(window.app?.graph?.nodes && window.app.extensionManager"
    " && !document.querySelector('.p-progressspinner') && document.querySelector('[data-testid=\"queue-button\"]'))"
)
"""Whether the graph editor has come up."""
OUT_OF_THE_WAY = {"Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False}
"""The editor's settings with which nothing lies over what is to be clicked."""


def find_chromium() -> str | None:
    """The browser's program: CHROMIUM_PATH, else the first usual name on the path."""
    return os.environ.get("CHROMIUM_PATH") or next((p for p in map(shutil.which, NAMES) if p), None)


@dataclass(frozen=True)
class Message:
    """A line of the browser's console, or an uncaught exception. `url`: the script it comes from."""

    level: str
    text: str
    url: str


class Page:
    """One tab. Every wait has a limit and says what it waited for."""

    def __init__(self, browser: Browser, socket: Any) -> None:
        self._browser = browser
        self._socket = socket
        self._ids = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._dialogs: list[asyncio.Task[dict[str, Any]]] = []
        self.console: list[Message] = []

    def call(self, method: str, timeout: float = 60.0, **params: Any) -> dict[str, Any]:
        """One DevTools command; its result."""
        return self._browser.wait(self._call(method, params), timeout)

    async def _call(self, method: str, params: dict[str, Any]) -> dict[str, Any]:
        number = next(self._ids)
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._answers[number] = future
        await self._socket.send_json({"id": number, "method": method, "params": params})
        answer = await future
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error'].get('message')}")
        return dict(answer.get("result", {}))

    async def _read(self) -> None:
        async for raw in self._socket:
            message = json.loads(raw.data)
            if "id" in message:
                future = self._answers.pop(message["id"], None)
                if future is not None and not future.done():
                    future.set_result(message)
            else:
                self._note(message["method"], message["params"])

    def _note(self, method: str, params: dict[str, Any]) -> None:
        if method == "Page.javascriptDialogOpening":
            # "Leave with unsaved changes?": until it is answered the page, and each command to it, stands still.
            answer = self._call("Page.handleJavaScriptDialog", {"accept": True})
            self._dialogs.append(asyncio.get_running_loop().create_task(answer))
        if method == "Runtime.consoleAPICalled":
            parts = [str(a.get("value", a.get("description", ""))) for a in params["args"]]
            frames = params.get("stackTrace", {}).get("callFrames") or [{}]
            self.console.append(Message(params["type"], " ".join(parts), frames[0].get("url", "")))
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            text = details.get("exception", {}).get("description") or details.get("text", "")
            self.console.append(Message("exception", text, details.get("url", "")))
        elif method == "Log.entryAdded":
            entry = params["entry"]
            self.console.append(Message(entry["level"], entry["text"], entry.get("url", "")))

    def evaluate(self, expression: str, timeout: float = 60.0) -> Any:
        """The value of a JavaScript expression; a promise is awaited.

        Raises:
            RuntimeError: it threw.
        """
        answer = self.call(
            "Runtime.evaluate", timeout, expression=expression, awaitPromise=True, returnByValue=True, userGesture=True
        )
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise RuntimeError(details.get("exception", {}).get("description") or details.get("text"))
        return answer["result"].get("value")

    def wait_for(self, expression: str, timeout: float = 60.0) -> Any:
        """Wait until an expression is truthy; its value.

        Raises:
            TimeoutError: it never was.
        """
        # An element cannot be sent over: that it is there is the answer. Vue's wrapped lists come as plain ones.
        plain = "v instanceof Node ? true : v && typeof v === 'object' ? JSON.parse(JSON.stringify(v)) : v"
        sendable = f"Promise.resolve({expression}).then(v => {plain})"
        deadline = time.monotonic() + timeout
        while not (value := self.evaluate(sendable)):
            if time.monotonic() > deadline:
                said = self.evaluate("document.body.innerText.slice(-800)")
                raise TimeoutError(f"Not true within {timeout:.0f} s: {expression}\nThe page says: {said}")
            time.sleep(0.1)
        return value

    def click(self, element: str, timeout: float = 30.0) -> None:
        """A real mouse click on the middle of the element that a JavaScript expression gives.

        Waits until it stands still there (the editor moves its view slowly on a busy machine) and nothing covers it;
        again if it moved away under the press. A press that it gets without a click, though it stands still, is an
        error: something swallows clicks.

        Raises:
            TimeoutError: it never did; what is there instead.
            RuntimeError: its clicks are swallowed.
        """
        find = (
            f"const find = () => {{ const e = {element}; const b = e?.getBoundingClientRect();"
            " if (!b?.width) return null;"
            " const x = b.x + b.width / 2, y = b.y + b.height / 2, top = document.elementFromPoint(x, y);"
            " return {e, x, y, top, free: e.contains(top)}; };"
        )
        # Frames, not time alone: a machine that draws slowly moves its view in steps with pauses between.
        still = (
            f"(async () => {{ {find} const one = find(); if (!one?.free) return null;"
            " await new Promise(done => setTimeout(done, 120));"
            " for (let i = 0; i < 2; i += 1) await new Promise(requestAnimationFrame); const two = find();"
            " if (!two?.free || one.e !== two.e || one.x !== two.x || one.y !== two.y) return null;"
            " const got = window.clicked = {}, once = {capture: true, once: true};"
            " for (const kind of ['pointerdown', 'click'])"
            " addEventListener(kind, event => { got[kind] = two.e.contains(event.target); }, once);"
            " got.now = () => { const now = two.e.getBoundingClientRect(); return {gone: !now.width,"
            " moved: now.x + now.width / 2 !== two.x || now.y + now.height / 2 !== two.y}; };"
            " return {x: two.x, y: two.y}; })()"
        )
        deadline = time.monotonic() + timeout
        while True:
            try:
                box = self.wait_for(still, deadline - time.monotonic())
            except TimeoutError as error:
                seen = self.evaluate(
                    f"(() => {{ {find} const at = find(); if (!at) return 'it is not shown';"
                    " return `at ${at.x}, ${at.y} of ${innerWidth} x ${innerHeight}, on top: `"
                    " + (at.top?.outerHTML.slice(0, 300) ?? 'nothing'); })()"
                )
                raise TimeoutError(f"Nothing to click on within {timeout:.0f} s: {element}\nNow: {seen}") from error
            for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
                self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **box)
            # What the click leads to may have taken the element, or the whole page, away.
            got = self.evaluate("window.clicked && {...clicked, ...clicked.now()}") or {"click": True}
            if got.get("click") or got.get("pointerdown") and got["gone"]:
                return
            if got.get("pointerdown") and not got["moved"]:
                raise RuntimeError(f"Clicks are swallowed, though it stands still: {element}")

    @contextmanager
    def covered(self) -> Iterator[None]:
        """Another tab is open in front of this one."""
        other = self._browser.open("about:blank#covers")
        other.wait_for("location.hash === '#covers' && document.readyState === 'complete'")
        try:
            yield
        finally:
            self.call("Page.bringToFront")
            other.call("Page.close")

    def screenshot(self, path: Path, clip: dict[str, float] | None = None) -> Path:
        """Save what the tab shows; `clip`: x, y, width, height in CSS pixels. PNG or JPEG by the file's name."""
        params: dict[str, Any] = {"format": "png"}
        if path.suffix.lower() in (".jpg", ".jpeg"):
            params = {"format": "jpeg", "quality": 88}
        if clip:
            params["clip"] = {**clip, "scale": 1}
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", **params)["data"]))
        return path


class Browser:
    """A Chromium of its own, with a new profile. Use it in a `with`."""

    def __init__(self, program: str | None = None, *, width: int = 1600, height: int = 1000) -> None:
        found = program or find_chromium()
        if found is None:
            raise RuntimeError("No Chromium on this machine: install it, or set CHROMIUM_PATH.")
        self.program, self.width, self.height = found, width, height
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="browser", daemon=True)
        self._session: Any = None
        self._readers: list[asyncio.Task[None]] = []

    def __enter__(self) -> Browser:
        self._folder = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        command = [self.program, *FLAGS, f"--user-data-dir={self._folder.name}"]
        command.append(f"--window-size={self.width},{self.height}")
        self._process = subprocess.Popen(
            [*command, "about:blank"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        self._thread.start()
        port_file = Path(self._folder.name) / "DevToolsActivePort"
        deadline = time.monotonic() + 60
        while not (port_file.is_file() and port_file.read_text(encoding="utf-8").strip()):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.__exit__()
                raise RuntimeError(f"{self.program} did not start.")
            time.sleep(0.05)
        self._port = int(port_file.read_text(encoding="utf-8").split()[0])
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._session is not None:
            self.wait(self._session.close(), 10)
        for reader in self._readers:
            self.loop.call_soon_threadsafe(reader.cancel)
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self._folder.cleanup()

    def wait(self, coroutine: Coroutine[Any, Any, Any], timeout: float) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout)

    def open(self, url: str) -> Page:
        """A new tab on `url`; its console is recorded from the start."""
        page: Page = self.wait(self._attach(), 60)
        for domain in ("Page", "Runtime", "Log"):
            page.call(f"{domain}.enable")
        page.call(
            "Emulation.setDeviceMetricsOverride",
            width=self.width,
            height=self.height,
            deviceScaleFactor=1,
            mobile=False,
        )
        page.call("Page.navigate", url=url)
        return page

    async def _attach(self) -> Page:
        import aiohttp

        if self._session is None:
            self._session = aiohttp.ClientSession()
        address = f"http://127.0.0.1:{self._port}/json/new?about:blank"
        async with self._session.put(address) as answer:
            target = await answer.json(content_type=None)
        socket = await self._session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0)
        page = Page(self, socket)
        self._readers.append(self.loop.create_task(page._read()))
        return page


@contextmanager
def open_editor(client: ComfyClient, timeout: float = 90, **size: int) -> Iterator[Page]:
    """ComfyUI's graph editor in a browser of its own, as somebody sees it who has been there before."""
    for setting, value in OUT_OF_THE_WAY.items():
        client.request("POST", f"/settings/{setting}", value)
    with Browser(**size) as browser:
        page = browser.open(client.url)
        page.wait_for(READY, timeout)
        yield page
