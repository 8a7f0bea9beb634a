"""Test set-up: the package alias, a real ComfyUI, and tiny models.

The repo root is never on sys.path, because ComfyUI has its own `nodes.py`. The package is imported under the alias
`subjectbooth`, whose `__path__` is the root: `from subjectbooth.trainer.config import TrainConfig`.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"

# Tests never access the hub. Must be set before any Hugging Face library is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
# Digests of the tests' bases are not kept in the user's folder.
os.environ.setdefault("SUBJECTBOOTH_CACHE", str(CACHE / "digests"))
# Processes that share a few cores must not busy-wait for their threads (10 times slower).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

if "subjectbooth" not in sys.modules:
    _package = types.ModuleType("subjectbooth")
    _package.__path__ = [str(ROOT)]
    sys.modules["subjectbooth"] = _package

from subjectbooth.tests import tiny  # noqa: E402
from subjectbooth.tests.comfy_server import (  # noqa: E402
    FP32_FLAGS,
    ComfyClient,
    ComfyServer,
    copy_file,
    exit_on_sigterm,
    find_comfyui,
)

# Files whose tests also run with the oldest libraries that requirements.txt allows; in other files, single tests are
# marked `oldest`. Together they cover all uses of diffusers, peft, accelerate and transformers, from the CLI and in
# ComfyUI.
OLDEST = ("trainer/learn/test_loss.py", "test_packaging.py")

# Files with one long test. At the end of a run with several workers, the others would wait for it.
FIRST = ("trainer/runs/test_kill.py",)

PACKS = {"SubjectBooth": ROOT, "probe_nodes": ROOT / "tests" / "nodes" / "probe_nodes"}


def pytest_configure() -> None:
    exit_on_sigterm()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    no_gpu = _no_gpu() if any("gpu" in item.keywords for item in items) else None
    no_comfy = None if find_comfyui(ROOT) else "ComfyUI not found: run scripts/get_comfyui.py or set COMFYUI_PATH"
    items.sort(key=lambda item: item.path.relative_to(ROOT / "tests").as_posix() not in FIRST)
    for item in items:
        if item.path.relative_to(ROOT / "tests").as_posix() in OLDEST:
            item.add_marker(pytest.mark.oldest)
        if item.path.parent.name == "js":
            item.add_marker(pytest.mark.editor)
        if {"comfy", "comfy_factory"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.comfy)
        if no_gpu and "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=no_gpu))
        if no_comfy and "comfy" in item.keywords and not os.environ.get("CI"):
            item.add_marker(pytest.mark.skip(reason=no_comfy))


def _no_gpu() -> str | None:
    import torch

    return None if torch.cuda.is_available() else "no CUDA GPU on this machine"


def module_alone(name: str) -> types.ModuleType:
    """A new copy of a module of nodes/ ("wired.families") that needs no ComfyUI, which its package does."""
    path = ROOT / "nodes" / f"{name.replace('.', '/')}.py"
    spec = importlib.util.spec_from_file_location(f"subjectbooth.nodes.{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


@pytest.fixture
def torch_threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's number of threads, and restores it after the test."""
    import torch

    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Path:
    """A random SD 1.5-layout checkpoint with one level (25.8 M UNet parameters)."""
    return tiny.tiny_checkpoint(CACHE / "tiny")


@pytest.fixture(scope="session")
def tiny_checkpoint_two_levels() -> Path:
    """The same with two levels (107 M UNet parameters): slower, for tests that need down- and upsampling."""
    return tiny.tiny_checkpoint(CACHE / "tiny", levels=2)


@pytest.fixture(scope="session")
def tiny_style_lora() -> Path:
    return tiny.tiny_style_lora(CACHE / "tiny")


@pytest.fixture(scope="session")
def comfy_factory(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, tiny_style_lora: Path
) -> Iterator[Callable[..., ComfyServer]]:
    """Creates (but does not start) additional servers, each with its own folders and the tiny models.

    `comfy_factory(args=[...], env={...}, packs={...}, base_dir=..., tree=...)`; use the result in a `with`, or call
    start(). `tree` is the ComfyUI to run if not the session's. All servers are stopped at the end of the session.
    """
    servers: list[ComfyServer] = []
    comfyui = find_comfyui(ROOT)
    if comfyui is None:
        pytest.fail("ComfyUI not found: run scripts/get_comfyui.py or set COMFYUI_PATH.")

    def make(
        *,
        args: tuple[str, ...] | list[str] = FP32_FLAGS,
        env: dict[str, str | None] | None = None,
        packs: dict[str, Path] | None = None,
        base_dir: Path | None = None,
        tree: Path = comfyui,
    ) -> ComfyServer:
        base = base_dir or tmp_path_factory.mktemp("comfy")
        copy_file(tiny_checkpoint, base / "models" / "checkpoints" / "tiny15.safetensors")
        copy_file(tiny_style_lora, base / "models" / "loras" / "tiny_style.safetensors")
        # The overlay of the oldest allowed libraries applies to the server too.
        inherited = {"PYTHONPATH": os.environ.get("SUBJECTBOOTH_OVERLAY")}
        front_end = os.environ.get("SUBJECTBOOTH_FRONT_END")
        front_end_args = ["--front-end-root", front_end] if front_end else []
        server = ComfyServer(
            tree,
            base,
            packs=PACKS if packs is None else packs,
            args=[*args, "--disable-api-nodes", *front_end_args],
            env={**inherited, **(env or {})},
        )
        servers.append(server)
        return server

    yield make
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def comfy_server(comfy_factory: Callable[..., ComfyServer]) -> Iterator[ComfyServer]:
    """One ComfyUI in fp32 for the whole session. It caches results between tests, so use unique seeds."""
    with comfy_factory() as server:
        yield server


@pytest.fixture(scope="session")
def _comfy_client(comfy_server: ComfyServer) -> Iterator[ComfyClient]:
    with ComfyClient(comfy_server.url, comfy_server) as client:
        yield client


@pytest.fixture
def comfy(_comfy_client: ComfyClient) -> ComfyClient:
    """A client of the session's ComfyUI (`comfy.server` has its folders). Restarts it if a test has killed it."""
    assert _comfy_client.server is not None
    if not _comfy_client.server.alive():
        _comfy_client.server.restart()
    return _comfy_client


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """On failure, show the log of the test's ComfyUI."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.when != "call" or not report.failed:
        return
    for name in ("comfy", "comfy_server"):
        used = getattr(item, "funcargs", {}).get(name)
        server = used.server if isinstance(used, ComfyClient) else used
        if isinstance(server, ComfyServer):
            report.sections.append(("ComfyUI log", server.log_tail(80)))
            return
