"""Set up and run the tests: all of them, then a subset with the oldest libraries that requirements.txt allows, then the
graph editor's with a newer front end.

python scripts/run_tests.py [--newest | --oldest | --editor | --comfyui] [pytest arguments, such as -k priors]

Each switch runs one of these passes only. --comfyui runs only the tests of nodes and panels, in another (newer) ComfyUI
given by COMFYUI_PATH.
"""

from __future__ import annotations

import os
import subprocess
import sys

from get_comfyui import get_comfyui
from setup_env import (
    CACHE,
    NEWEST_FRONT_END,
    ROOT,
    Environment,
    ensure_environment,
    ensure_front_end,
    ensure_oldest,
)

OTHER_COMFYUI = "SUBJECTBOOTH_OTHER_COMFYUI"
INTERRUPTED, NO_TESTS_COLLECTED = 2, 5  # pytest's exit codes
WORKERS = max(1, min(4, os.cpu_count() or 1))


def run(environment: Environment, arguments: list[str], **variables: str) -> int:
    env = {**os.environ, "COMFYUI_PATH": str(environment.comfyui), **variables}
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))
    command = [str(environment.python), "-m", "pytest", "-c", str(ROOT / "tests" / "pytest.ini")]
    command += ["-n", str(WORKERS), "--dist", "loadfile", *arguments]
    return subprocess.run(command, cwd=ROOT / "tests", env=env, stdin=subprocess.DEVNULL).returncode


def newest(environment: Environment, arguments: list[str]) -> int:
    print("\n=== All tests", flush=True)
    return run(environment, arguments)


def oldest(environment: Environment, arguments: list[str]) -> int:
    overlay = str(ensure_oldest(environment.python))
    print("\n=== Tests with the oldest libraries that requirements.txt allows", flush=True)
    return run(environment, ["-m", "oldest", *arguments], PYTHONPATH=overlay, SUBJECTBOOTH_OVERLAY=overlay)


def editor(environment: Environment, arguments: list[str]) -> int:
    front_end = str(ensure_front_end(environment.python))
    print(f"\n=== Graph editor tests with {NEWEST_FRONT_END}", flush=True)
    return run(environment, ["-m", "editor", *arguments], SUBJECTBOOTH_FRONT_END=front_end)


def comfyui(environment: Environment, arguments: list[str]) -> int:
    # tests/nodes/test_versions.py compares the training results of the two.
    default = str(get_comfyui(CACHE / "comfyui", str(environment.python)))
    print(f"\n=== Nodes and panels in {environment.comfyui}", flush=True)
    return run(environment, ["nodes", "js", *arguments], **{OTHER_COMFYUI: os.environ.get(OTHER_COMFYUI, default)})


def main(arguments: list[str]) -> int:
    default = {"--newest": newest, "--oldest": oldest, "--editor": editor}
    passes = {**default, "--comfyui": comfyui}
    chosen = [test_pass for switch, test_pass in passes.items() if switch in arguments] or list(default.values())
    rest = [argument for argument in arguments if argument not in passes]
    if comfyui in chosen and not os.environ.get("COMFYUI_PATH"):
        raise SystemExit("Set COMFYUI_PATH to the ComfyUI folder to test with, such as a git checkout of its master.")
    environment = ensure_environment()
    failed = False
    for test_pass in chosen:
        code = test_pass(environment, rest)
        if code == INTERRUPTED:
            return INTERRUPTED
        failed |= code not in (0, NO_TESTS_COLLECTED if len(chosen) > 1 else 0)  # negative if killed
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
