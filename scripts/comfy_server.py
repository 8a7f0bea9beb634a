"""A real ComfyUI as a child process, and a client of its HTTP and websocket API.

The demo, the UI runner and the tests all drive ComfyUI through this one file, in the way any outside program would:
nothing of ComfyUI is imported here. Needs the standard library and aiohttp (one of ComfyUI's own requirements).
"""

from __future__ import annotations

import asyncio
import atexit
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Prompt = Mapping[str, Mapping[str, Any]]
"""A workflow in API format: node id -> {"class_type": ..., "inputs": {...}}."""

FP32_FLAGS = ("--fp32-unet", "--fp32-vae", "--fp32-text-enc")
"""On a CPU half precision is slow, and comparisons to 1e-4 need the whole graph in one precision."""

# What a server may pick up from the machine must not decide what a run gives.
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONIOENCODING": "utf-8",
}


class ComfyError(RuntimeError):
    """Something went wrong at or in ComfyUI; the message is meant to be read by a person."""


class ServerFailed(ComfyError):
    """The server did not start, or died."""


class PromptRejected(ComfyError):
    """ComfyUI refused a prompt before running it. `node_errors` is what it answered, by node id."""

    def __init__(self, message: str, node_errors: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.node_errors = node_errors


class NodeFailed(ComfyError):
    """A node raised while it ran. `node_message` is its own error text."""

    def __init__(
        self, message: str, node_id: str, node_type: str, node_message: str, exception_type: str
    ) -> None:
        super().__init__(message)
        self.node_id = node_id
        self.node_type = node_type
        self.node_message = node_message
        self.exception_type = exception_type


class Interrupted(ComfyError):
    """The prompt was cancelled. `entry` is its history entry."""

    def __init__(self, message: str, entry: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.entry = entry


@dataclass(frozen=True)
class Event:
    """One websocket message.

    `type` is ComfyUI's own name ("progress", "executing", ...); binary messages become "preview" (`data`: `node`,
    `prompt_id`, `mime`, `image` bytes) and "progress_text" (`data`: `node`, `text`). `time` is time.monotonic().
    """

    type: str
    data: dict[str, Any]
    time: float

    @property
    def prompt_id(self) -> str | None:
        return self.data.get("prompt_id")


@dataclass(frozen=True)
class RunResult:
    """What one prompt gave. `outputs`: node id -> its `ui` output. `cached`: nodes that did not run again."""

    prompt_id: str
    outputs: dict[str, dict[str, Any]]
    cached: frozenset[str]
    entry: dict[str, Any]
    events: list[Event] = field(repr=False)
    seconds: float = 0.0

    def executed(self) -> list[str]:
        """Node ids in the order they began to run."""
        return [
            e.data["node"] for e in self.events if e.type == "executing" and e.data.get("node") is not None
        ]

    def of_type(self, type: str) -> list[Event]:
        return [e for e in self.events if e.type == type]

    def images(self, node_id: str) -> list[dict[str, str]]:
        """The picture records ({filename, subfolder, type}) that a node showed."""
        return list(self.outputs[node_id]["images"])


def free_port() -> int:
    """A loopback port nobody listens on at this moment."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def link_directory(target: Path, link: Path) -> None:
    """Make `link` show `target`: a symlink, on Windows without that right a junction."""
    target = target.resolve()
    if link.is_symlink() or link.exists():
        if link.resolve() == target:
            return
        raise ComfyError(f"{link} is already there and is not a link to {target}. Remove it and start again.")
    link.parent.mkdir(parents=True, exist_ok=True)
    try:
        link.symlink_to(target, target_is_directory=True)
    except OSError:
        if os.name != "nt":
            raise
        subprocess.run(["cmd", "/c", "mklink", "/J", str(link), str(target)], check=True, capture_output=True)


def exit_on_sigterm() -> None:
    """Make a plain `kill` end this program as Ctrl-C does, so that servers it has started end with it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


class ComfyServer:
    """Starts `python main.py` of a ComfyUI tree on a free loopback port, and stops it again.

    Args:
        comfyui: the ComfyUI tree (the folder of main.py).
        base_dir: where models/, input/, output/, user/ and custom_nodes/ are; made when missing.
        packs: folder name under custom_nodes -> the pack's folder, linked there.
        args: further command line flags.
        env: further environment variables; a value of None removes one.
        python: the interpreter that runs ComfyUI.
        offline: nothing may ask the Hugging Face hub.
    """

    def __init__(
        self,
        comfyui: Path,
        base_dir: Path,
        *,
        packs: Mapping[str, Path] | None = None,
        args: Sequence[str] = (),
        env: Mapping[str, str | None] | None = None,
        python: str | Path | None = None,
        port: int | None = None,
        cpu: bool = True,
        offline: bool = True,
    ) -> None:
        self.comfyui = Path(comfyui).resolve()
        self.base_dir = Path(base_dir).resolve()
        self.packs = dict(packs or {})
        self.args = list(args)
        self.env = dict(env or {})
        self.python = str(python or sys.executable)
        self.port = port
        self.cpu = cpu
        self.offline = offline
        self.process: subprocess.Popen[bytes] | None = None
        self.log_path = self.base_dir / "server.log"
        self._log_start = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def input_dir(self) -> Path:
        return self.base_dir / "input"

    @property
    def output_dir(self) -> Path:
        return self.base_dir / "output"

    @property
    def models_dir(self) -> Path:
        return self.base_dir / "models"

    def command(self) -> list[str]:
        command = [self.python, str(self.comfyui / "main.py"), "--base-directory", str(self.base_dir)]
        command += ["--listen", "127.0.0.1", "--port", str(self.port), "--disable-auto-launch"]
        command += ["--database-url", f"sqlite:///{(self.base_dir / 'user' / 'comfyui.db').as_posix()}"]
        if self.cpu:
            command.append("--cpu")
        return command + self.args

    def start(self, timeout: float = 180.0) -> ComfyServer:
        """Start and wait until the server answers.

        Raises:
            ServerFailed: it ended or did not answer within `timeout` seconds; with the end of its log.
        """
        if not (self.comfyui / "main.py").is_file():
            raise ServerFailed(
                f"No ComfyUI at {self.comfyui}: main.py is missing. Set COMFYUI_PATH to a ComfyUI folder."
            )
        if self.process is not None:
            raise ServerFailed("This ComfyUI is already running.")
        for name in ("input", "output", "temp", "user", "custom_nodes", "models/checkpoints", "models/loras"):
            (self.base_dir / name).mkdir(parents=True, exist_ok=True)
        for name, folder in self.packs.items():
            link_directory(folder, self.base_dir / "custom_nodes" / name)
        if self.port is None:
            self.port = free_port()
        env = {**os.environ, **(_OFFLINE if self.offline else {})}
        if self.cpu:
            # Threads that wait in busy loops slow each other down 5 times as soon as anything else uses the cores.
            env.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        env.pop("PYTHONPATH", None)
        for name, value in self.env.items():
            if value is None:
                env.pop(name, None)
            else:
                env[name] = value
        self._log_start = self.log_path.stat().st_size if self.log_path.exists() else 0
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, cwd=self.base_dir
            )
        atexit.register(self.stop)
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                code = self.process.returncode
                self.stop()
                raise ServerFailed(f"ComfyUI ended with code {code} while starting.\n{self.log_tail()}")
            try:
                with urllib.request.urlopen(f"{self.url}/system_stats", timeout=5):
                    return self
            except OSError:
                time.sleep(0.1)
        self.stop()
        raise ServerFailed(f"ComfyUI did not answer at {self.url} within {timeout:.0f} s.\n{self.log_tail()}")

    def stop(self) -> None:
        """End the server; twice does no harm."""
        process, self.process = self.process, None
        atexit.unregister(self.stop)
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)

    def kill(self) -> None:
        """End the server as a power cut would: it gets no chance to save anything."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
        self.stop()

    def restart(self) -> ComfyServer:
        """A new process on the same folders and port: everything in memory is gone."""
        self.stop()
        return self.start()

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def log(self) -> str:
        """Everything this process has logged since its last start."""
        if not self.log_path.exists():
            return ""
        return self.log_path.read_bytes()[self._log_start :].decode("utf-8", errors="replace")

    def log_tail(self, lines: int = 40) -> str:
        return f"--- end of {self.log_path} ---\n" + "\n".join(self.log().splitlines()[-lines:])

    def __enter__(self) -> ComfyServer:
        return self.start()

    def __exit__(self, *_exc: object) -> None:
        self.stop()


class ComfyClient:
    """Talks to a running ComfyUI the way its front end does.

    Args:
        url: "http://127.0.0.1:8188".
        server: when the server is a child of ours, its death is noticed and its log is shown in errors.
        listen: open the websocket and collect every event.
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
        """One HTTP call; JSON in, parsed JSON out (bytes when the answer is not JSON).

        Raises:
            urllib.error.HTTPError: the server answered with an error status.
            ServerFailed: the server is gone.
        """
        data = None if body is None else json.dumps(body).encode("utf-8")
        headers = {"Content-Type": "application/json"} if data is not None else {}
        return self._send(
            urllib.request.Request(self.url + path, data=data, headers=headers, method=method), timeout
        )

    def _send(self, request: urllib.request.Request, timeout: float) -> Any:
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                content = answer.read()
                is_json = answer.headers.get_content_type() == "application/json"
        except urllib.error.HTTPError:
            raise
        except OSError as error:
            raise ServerFailed(f"ComfyUI at {self.url} does not answer ({error}).{self._log()}") from error
        if not is_json:
            return content
        return json.loads(content) if content else None

    def _log(self) -> str:
        return "" if self.server is None else "\n" + self.server.log_tail()

    def object_info(self, node: str | None = None) -> dict[str, Any]:
        """The definitions of all nodes, or of one ({} when there is no such node)."""
        if node is None:
            return dict(self.request("GET", "/object_info"))
        return dict(self.request("GET", f"/object_info/{urllib.parse.quote(node)}").get(node, {}))

    def queue(
        self, prompt: Prompt, *, extra_data: Mapping[str, Any] | None = None, targets: Sequence[str] = ()
    ) -> str:
        """Queue a prompt; its id. `targets`: run only what these output nodes need.

        Raises:
            PromptRejected: ComfyUI found it invalid.
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
            raise PromptRejected(_rejection(reason), reason.get("node_errors") or {}) from error
        return str(answer["prompt_id"])

    def history(self, prompt_id: str) -> dict[str, Any] | None:
        """The finished prompt's history entry, None while it waits or runs."""
        entry = self.request("GET", f"/history/{prompt_id}").get(prompt_id)
        return None if entry is None else dict(entry)

    def wait(self, prompt_id: str, timeout: float = 900.0, *, check: bool = True) -> dict[str, Any]:
        """Wait for the end of a prompt; its history entry.

        Raises:
            NodeFailed: a node raised (only with `check`).
            Interrupted: it was cancelled (only with `check`).
            ServerFailed: the server died.
            TimeoutError: it still runs after `timeout` seconds; it is then cancelled.
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
                said = str(data.get("exception_message", "")).strip()
                where = f"{data.get('node_type')} (node {data.get('node_id')})"
                trace = "".join(data.get("traceback", []))
                raise NodeFailed(
                    f"{where} failed: {data.get('exception_type')}: {said}\n{trace}{self._log()}",
                    node_id=str(data.get("node_id")),
                    node_type=str(data.get("node_type")),
                    node_message=said,
                    exception_type=str(data.get("exception_type")),
                )

    def run(self, prompt: Prompt, timeout: float = 900.0, *, targets: Sequence[str] = ()) -> RunResult:
        """Queue a prompt, wait for it and collect what it gave. Raises as `queue` and `wait` do."""
        started = time.monotonic()
        prompt_id = self.queue(prompt, targets=targets)
        entry = self.wait(prompt_id, timeout)
        seconds = time.monotonic() - started
        # The history is written before the last messages are out.
        self.wait_event(
            lambda e: e.type == "execution_success" and e.prompt_id == prompt_id, timeout=5, missing_ok=True
        )
        events = self.events_of(prompt_id)
        cached = {str(n) for e in events if e.type == "execution_cached" for n in e.data.get("nodes", [])}
        return RunResult(prompt_id, dict(entry.get("outputs", {})), frozenset(cached), entry, events, seconds)

    def interrupt(self) -> None:
        """Cancel what runs now."""
        self.request("POST", "/interrupt", {})

    def free(self) -> None:
        """Unload all models and drop the cached results (the "free memory" button), and wait until that is done."""
        self.request("POST", "/free", {"unload_models": True, "free_memory": True})
        time.sleep(1.0)

    def upload_image(
        self, image: Path | bytes, name: str | None = None, *, subfolder: str = "", overwrite: bool = True
    ) -> str:
        """Put one picture into ComfyUI's input folder; the name to use in a prompt ("sub/file.png")."""
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

    def view(self, filename: str, subfolder: str = "", type: str = "output") -> bytes:
        """The bytes of a picture that a node saved or previewed."""
        query = urllib.parse.urlencode({"filename": filename, "subfolder": subfolder, "type": type})
        content = self.request("GET", f"/view?{query}")
        return content if isinstance(content, bytes) else json.dumps(content).encode("utf-8")

    # --- events -----------------------------------------------------------------------------------------------

    def events_of(self, prompt_id: str) -> list[Event]:
        """The events of one prompt in their order, those without a prompt id that came between included."""
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
        """Wait for the first event (from index `since` on) for which `wanted` is true.

        Raises:
            TimeoutError: it did not come, unless `missing_ok`.
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
        raise TimeoutError(f"The awaited event did not come within {timeout:.0f} s.{self._log()}")

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
                        await socket_.send_json(
                            {"type": "feature_flags", "data": {"supports_preview_metadata": True}}
                        )
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
                                event = _binary_event(message.data)
                                if event is not None:
                                    self._add(event)
                            else:
                                break
                except (aiohttp.ClientError, OSError):
                    pass
                if not self._stop.is_set():
                    await asyncio.sleep(0.3)  # the server restarts: come back to it

    def _add(self, event: Event) -> None:
        with self._changed:
            self.events.append(event)
            self._changed.notify_all()


def _binary_event(message: bytes) -> Event | None:
    """ComfyUI's binary websocket messages (protocol.py, BinaryEventTypes)."""
    (kind,) = struct.unpack(">I", message[:4])
    body = message[4:]
    now = time.monotonic()
    if kind == 1:  # a preview without metadata: 4 bytes of format, then the picture
        (image_format,) = struct.unpack(">I", body[:4])
        mime = "image/png" if image_format == 2 else "image/jpeg"
        return Event("preview", {"mime": mime, "image": bytes(body[4:])}, now)
    if kind == 3:  # a line of text for a node: length of the node's id, the id, the text
        (length,) = struct.unpack(">I", body[:4])
        node = body[4 : 4 + length].decode("utf-8")
        return Event("progress_text", {"node": node, "text": body[4 + length :].decode("utf-8")}, now)
    if kind == 4:  # a preview with metadata: length of a JSON text, the text, the picture
        (length,) = struct.unpack(">I", body[:4])
        metadata = json.loads(body[4 : 4 + length])
        return Event(
            "preview",
            {
                "mime": metadata.get("image_type", ""),
                "image": bytes(body[4 + length :]),
                "node": metadata.get("node_id"),
                "prompt_id": metadata.get("prompt_id"),
            },
            now,
        )
    return None


def _rejection(reason: Mapping[str, Any]) -> str:
    error = reason.get("error")
    said = f"{error.get('message')}: {error.get('details')}" if isinstance(error, Mapping) else str(error)
    lines = [f"ComfyUI refused the prompt. {said}"]
    for node_id, report in (reason.get("node_errors") or {}).items():
        for problem in report.get("errors", []):
            where = f"{report.get('class_type')} (node {node_id})"
            lines.append(f"  {where}: {problem.get('message')}: {problem.get('details')}")
    return "\n".join(lines)


def find_comfyui(root: Path) -> Path | None:
    """The ComfyUI to use: COMFYUI_PATH, else the one scripts/get_comfyui.py has put into .cache."""
    given = os.environ.get("COMFYUI_PATH")
    if given:
        return Path(given).expanduser().resolve()
    unpacked = root / ".cache" / "comfyui"
    return unpacked if (unpacked / "main.py").is_file() else None


def copy_file(source: Path, target: Path) -> None:
    """Hard link where the disk allows it (checkpoints are large), else copy."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
