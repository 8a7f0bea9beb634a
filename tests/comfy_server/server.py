"""A real ComfyUI as a child process."""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path

from .errors import ComfyError, ServerFailed

FP32_FLAGS = ("--fp32-unet", "--fp32-vae", "--fp32-text-enc")
"""Half precision is slow on a CPU, and comparisons to 1e-4 need the whole graph in one precision."""

# The machine's environment must not affect the results.
_OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "PYTHONUNBUFFERED": "1",
    "PYTHONIOENCODING": "utf-8",
}


def free_port() -> int:
    """A free loopback port."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def link_directory(target: Path, link: Path) -> None:
    """Create a symlink to a folder, or a junction on Windows without permission for symlinks."""
    target = target.resolve()
    if link.is_symlink() or link.exists():
        if link.resolve() == target:
            return
        raise ComfyError(f"{link} already exists and is not a link to {target}. Remove it and start again.")
    link.parent.mkdir(parents=True, exist_ok=True)
    try:
        link.symlink_to(target, target_is_directory=True)
    except OSError:
        if os.name != "nt":
            raise
        subprocess.run(["cmd", "/c", "mklink", "/J", str(link), str(target)], check=True, capture_output=True)


def exit_on_sigterm() -> None:
    """Handle SIGTERM like Ctrl-C, so that servers started by this program end with it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


class ComfyServer:
    """Runs `python main.py` of a ComfyUI tree on a free loopback port.

    Args:
        comfyui: the ComfyUI tree (the folder of main.py).
        base_dir: the folder of models/, input/, output/, user/ and custom_nodes/; created if missing.
        packs: folder name under custom_nodes -> the pack's folder, which is linked there.
        args: additional command line flags.
        env: additional environment variables; None removes one.
        python: the interpreter that runs ComfyUI.
        offline: forbid access to the Hugging Face hub.
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
        """Start the server and wait until it responds.

        Raises:
            ServerFailed: it exited or did not respond within `timeout` seconds; the message has the end of its log.
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
            # Busy-waiting threads slow each other down 5 times as soon as anything else uses the cores.
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
                raise ServerFailed(f"ComfyUI exited with code {code} while starting.\n{self.log_tail()}")
            try:
                with urllib.request.urlopen(f"{self.url}/system_stats", timeout=5):
                    return self
            except OSError:
                time.sleep(0.1)
        self.stop()
        raise ServerFailed(f"ComfyUI did not respond at {self.url} within {timeout:.0f} s.\n{self.log_tail()}")

    def stop(self) -> None:
        """Stop the server if it is running."""
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
        """Kill the server, so that it has no chance to save anything."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)
        self.stop()

    def restart(self) -> ComfyServer:
        """Start a new process with the same folders and port; everything in memory is lost."""
        self.stop()
        return self.start()

    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def log(self) -> str:
        """The log since the last start."""
        if not self.log_path.exists():
            return ""
        return self.log_path.read_bytes()[self._log_start :].decode("utf-8", errors="replace")

    def log_tail(self, lines: int = 40) -> str:
        return f"--- end of {self.log_path} ---\n" + "\n".join(self.log().splitlines()[-lines:])

    def __enter__(self) -> ComfyServer:
        return self.start()

    def __exit__(self, *_exc: object) -> None:
        self.stop()


def find_comfyui(root: Path) -> Path | None:
    """The ComfyUI to use: COMFYUI_PATH, or the one that scripts/get_comfyui.py has downloaded to .cache."""
    given = os.environ.get("COMFYUI_PATH")
    if given:
        return Path(given).expanduser().resolve()
    unpacked = root / ".cache" / "comfyui"
    return unpacked if (unpacked / "main.py").is_file() else None


def copy_file(source: Path, target: Path) -> None:
    """Hard-link a file (checkpoints are large), or copy it if the disk does not allow that."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
