"""A client of ComfyUI's HTTP and websocket API."""

from __future__ import annotations

import asyncio
import json
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import ComfyError, Interrupted, NodeFailed, PromptRejected, ServerFailed, rejection
from .events import Event, RunResult, binary_event
from .server import ComfyServer

Prompt = Mapping[str, Mapping[str, Any]]
"""A workflow in API format: node id -> {"class_type": ..., "inputs": {...}}."""


class ComfyClient:
    """Talks to a running ComfyUI the way its front end does.

    Args:
        url: "http://127.0.0.1:8188".
        server: the server, if it is our child process: its exit is detected and its log is shown in errors.
        listen: open the websocket and collect all events.
    """

    def __init__(self, url: str, server: ComfyServer | None = None, *, listen: bool = True) -> None:
        self.url = url.rstrip("/")
        self.server = server
        self.client_id = uuid.uuid4().hex
        self.events: list[Event] = []
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._connected = threading.Event()
        self._thread: threading.Thread | None = None
        if listen:
            self._thread = threading.Thread(target=self._listen, name="comfy-events", daemon=True)
            self._thread.start()
            if not self._connected.wait(30):
                raise ComfyError(f"No websocket at {self.url}/ws within 30 s.")

    # --- HTTP -------------------------------------------------------------------------------------------------

    def request(self, method: str, path: str, body: Any = None, *, timeout: float = 60.0) -> Any:
        """One HTTP request; JSON in, parsed JSON out (bytes if the response is not JSON).

        Raises:
            urllib.error.HTTPError: the server returned an error status.
            ServerFailed: the server does not respond.
        """
        data = None if body is None else json.dumps(body).encode("utf-8")
        headers = {"Content-Type": "application/json"} if data is not None else {}
        return self._send(urllib.request.Request(self.url + path, data=data, headers=headers, method=method), timeout)

    def _send(self, request: urllib.request.Request, timeout: float) -> Any:
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                content = answer.read()
                is_json = answer.headers.get_content_type() == "application/json"
        except urllib.error.HTTPError:
            raise
        except OSError as error:
            raise ServerFailed(f"ComfyUI at {self.url} does not respond ({error}).{self._log()}") from error
        if not is_json:
            return content
        return json.loads(content) if content else None

    def _log(self) -> str:
        return "" if self.server is None else "\n" + self.server.log_tail()

    def object_info(self, node: str | None = None) -> dict[str, Any]:
        """The definitions of all nodes, or of one ({} if there is no such node)."""
        if node is None:
            return dict(self.request("GET", "/object_info"))
        return dict(self.request("GET", f"/object_info/{urllib.parse.quote(node)}").get(node, {}))

    def defaults(self, node: str) -> dict[str, Any]:
        """The default values of a node's inputs."""
        given = self.object_info(node)["input"]
        specs = {name: spec for group in ("required", "optional") for name, spec in given.get(group, {}).items()}
        return {name: spec[1]["default"] for name, spec in specs.items() if len(spec) > 1 and "default" in spec[1]}

    def queue(self, prompt: Prompt, *, extra_data: Mapping[str, Any] | None = None, targets: Sequence[str] = ()) -> str:
        """Queue a prompt and return its id. `targets`: run only what these output nodes need.

        Raises:
            PromptRejected: ComfyUI rejected it as invalid.
        """
        body: dict[str, Any] = {"prompt": prompt, "client_id": self.client_id}
        if extra_data:
            body["extra_data"] = dict(extra_data)
        if targets:
            body["partial_execution_targets"] = list(targets)
        try:
            answer = self.request("POST", "/prompt", body)
        except urllib.error.HTTPError as error:
            text = error.read().decode("utf-8", errors="replace")
            try:
                reason = json.loads(text)
            except json.JSONDecodeError:
                raise PromptRejected(f"ComfyUI answered {error.code} to the prompt: {text}", {}) from error
            raise PromptRejected(rejection(reason), reason.get("node_errors") or {}) from error
        return str(answer["prompt_id"])

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """The finished prompt's history entry, or None while it is queued or running."""
        entry = self.request("GET", f"/history/{prompt_id}").get(prompt_id)
        return None if entry is None else dict(entry)

    def wait(self, prompt_id: str, timeout: float = 900.0, *, check: bool = True) -> dict[str, Any]:
        """Wait until a prompt has finished and return its history entry.

        Raises:
            NodeFailed: a node raised (only with `check`).
            Interrupted: it was cancelled (only with `check`).
            ServerFailed: the server died.
            TimeoutError: it is still running after `timeout` seconds; it is then cancelled.
        """
        deadline = time.monotonic() + timeout
        while (entry := self.history(prompt_id)) is None:
            if self.server is not None and not self.server.alive():
                raise ServerFailed(f"ComfyUI died while it ran a prompt.{self._log()}")
            if time.monotonic() > deadline:
                self.interrupt()
                raise TimeoutError(f"The prompt was not done within {timeout:.0f} s.{self._log()}")
            with self._changed:
                self._changed.wait(0.1)
        if check:
            self._raise_for(entry)
        return entry

    def _raise_for(self, entry: Mapping[str, Any]) -> None:
        messages = entry.get("status", {}).get("messages", [])
        for kind, data in messages:
            if kind == "execution_interrupted":
                raise Interrupted(f"The prompt was cancelled in node {data.get('node_id')}.", entry)
            if kind == "execution_error":
                message = str(data.get("exception_message", "")).strip()
                where = f"{data.get('node_type')} (node {data.get('node_id')})"
                trace = "".join(data.get("traceback", []))
                raise NodeFailed(
                    f"{where} failed: {data.get('exception_type')}: {message}\n{trace}{self._log()}",
                    node_id=str(data.get("node_id")),
                    node_type=str(data.get("node_type")),
                    node_message=message,
                    exception_type=str(data.get("exception_type")),
                )

    def run(self, prompt: Prompt, timeout: float = 900.0, *, targets: Sequence[str] = ()) -> RunResult:
        """Queue a prompt, wait for it and collect its results. Raises the same errors as `queue` and `wait`."""
        started = time.monotonic()
        prompt_id = self.queue(prompt, targets=targets)
        entry = self.wait(prompt_id, timeout)
        seconds = time.monotonic() - started
        # The history is written before the last messages are sent.
        self.wait_event(
            lambda e: e.type == "execution_success" and e.prompt_id == prompt_id, timeout=5, missing_ok=True
        )
        events = self.events_of(prompt_id)
        cached = {str(n) for e in events if e.type == "execution_cached" for n in e.data.get("nodes", [])}
        return RunResult(prompt_id, dict(entry.get("outputs", {})), frozenset(cached), entry, events, seconds)

    def interrupt(self) -> None:
        """Cancel the running prompt."""
        self.request("POST", "/interrupt", {})

    def free(self) -> None:
        """Unload all models and clear the cached results (the "free memory" button), and wait until that is done.

        ComfyUI's worker handles the request when it wakes up, or only after the next prompt if it was just about to
        sleep. So two trivial prompts are run: the request has been handled before the second one.
        """
        self.request("POST", "/free", {"unload_models": True, "free_memory": True})
        for _ in range(2):
            number = {"class_type": "PrimitiveInt", "inputs": {"value": 0}}
            self.run({"1": number, "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 0]}}}, timeout=120)

    def upload_image(
        self, image: Path | bytes, name: str | None = None, *, subfolder: str = "", overwrite: bool = True
    ) -> str:
        """Upload an image to ComfyUI's input folder and return its name for a prompt ("sub/file.png")."""
        content = image if isinstance(image, bytes) else image.read_bytes()
        name = name or (image.name if isinstance(image, Path) else f"{uuid.uuid4().hex}.png")
        boundary = uuid.uuid4().hex
        fields = {"type": "input", "subfolder": subfolder, "overwrite": "true" if overwrite else "false"}
        parts = [
            f'--{boundary}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'.encode()
            for key, value in fields.items()
        ]
        parts.append(
            f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n'
            "Content-Type: application/octet-stream\r\n\r\n".encode()
        )
        parts += [content, f"\r\n--{boundary}--\r\n".encode()]
        request = urllib.request.Request(
            self.url + "/upload/image",
            data=b"".join(parts),
            headers={"Content-Type": f"multipart/form-data; boundary={boundary}"},
        )
        answer = self._send(request, 60.0)
        return f"{answer['subfolder']}/{answer['name']}" if answer.get("subfolder") else str(answer["name"])

    def upload_images(self, images: Iterable[Path], *, subfolder: str = "") -> list[str]:
        return [self.upload_image(image, subfolder=subfolder) for image in images]

    def view(self, filename: str, subfolder: str = "", type: str = "output", **more: str) -> bytes:
        """The bytes of an image that a node saved or previewed. `more`: further fields of its record."""
        query = urllib.parse.urlencode({"filename": filename, "subfolder": subfolder, "type": type, **more})
        content = self.request("GET", f"/view?{query}")
        return content if isinstance(content, bytes) else json.dumps(content).encode("utf-8")

    # --- events -----------------------------------------------------------------------------------------------

    def events_of(self, prompt_id: str) -> list[Event]:
        """The events of one prompt in order, including those in between without a prompt id."""
        with self._changed:
            events = list(self.events)
        mine = [i for i, e in enumerate(events) if e.prompt_id == prompt_id]
        if not mine:
            return []
        between = events[mine[0] : mine[-1] + 1]
        return [e for e in between if e.prompt_id in (None, prompt_id)]

    def wait_event(
        self,
        wanted: Callable[[Event], bool],
        timeout: float = 60.0,
        *,
        missing_ok: bool = False,
        since: int = 0,
    ) -> Event | None:
        """Wait for the first event (from index `since`) for which `wanted` returns true.

        Raises:
            TimeoutError: no such event arrived, unless `missing_ok`.
        """
        deadline = time.monotonic() + timeout
        seen = since
        with self._changed:
            while True:
                while seen < len(self.events):
                    if wanted(self.events[seen]):
                        return self.events[seen]
                    seen += 1
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(left)
        if missing_ok:
            return None
        raise TimeoutError(f"The expected event did not arrive within {timeout:.0f} s.{self._log()}")

    def close(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(10)

    def __enter__(self) -> ComfyClient:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def _listen(self) -> None:
        asyncio.run(self._collect())

    async def _collect(self) -> None:
        import aiohttp

        address = f"{self.url.replace('http', 'ws', 1)}/ws?clientId={self.client_id}"
        async with aiohttp.ClientSession() as session:
            while not self._stop.is_set():
                try:
                    async with session.ws_connect(address, max_msg_size=0) as socket_:
                        await socket_.send_json({"type": "feature_flags", "data": {"supports_preview_metadata": True}})
                        self._connected.set()
                        while not self._stop.is_set():
                            try:
                                message = await socket_.receive(timeout=0.2)
                            except asyncio.TimeoutError:
                                continue
                            if message.type == aiohttp.WSMsgType.TEXT:
                                parsed = json.loads(message.data)
                                self._add(Event(parsed["type"], parsed.get("data") or {}, time.monotonic()))
                            elif message.type == aiohttp.WSMsgType.BINARY:
                                event = binary_event(message.data)
                                if event is not None:
                                    self._add(event)
                            else:
                                break
                except (aiohttp.ClientError, OSError):
                    pass
                if not self._stop.is_set():
                    await asyncio.sleep(0.3)  # the server is restarting: reconnect

    def _add(self, event: Event) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()
