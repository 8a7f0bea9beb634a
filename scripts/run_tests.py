"""Set up and run the tests, then once more those that matter with the oldest libraries that requirements.txt allows.

python scripts/run_tests.py [--oldest | --newest] [pytest arguments, such as -k priors]
"""

from __future__ import annotations

import os
import subprocess
import sys

from setup_env import ROOT, Environment, ensure_environment, ensure_oldest

INTERRUPTED = 2  # pytest's exit code
WORKERS = max(1, min(4, os.cpu_count() or 1))


def run(environment: Environment, arguments: list[str], overlay: str | None = None) -> int:
    env = {**os.environ, "COMFYUI_PATH": str(environment.comfyui)}
    env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // WORKERS)))
    if overlay:
        env |= {"PYTHONPATH": overlay, "SUBJECTBOOTH_OVERLAY": overlay}
    command = [str(environment.python), "-m", "pytest", "-c", str(ROOT / "tests" / "pytest.ini")]
    command += ["-n", str(WORKERS), "--dist", "loadfile", *arguments]
    return subprocess.run(command, cwd=ROOT / "tests", env=env, stdin=subprocess.DEVNULL).returncode


def main(arguments: list[str]) -> int:
    only_oldest, only_newest = "--oldest" in arguments, "--newest" in arguments
    arguments = [a for a in arguments if a not in ("--oldest", "--newest")]
    environment = ensure_environment()
    codes = []
    if not only_oldest:
        print("\n=== The tests", flush=True)
        codes.append(run(environment, arguments))
        if codes[0] == INTERRUPTED:
            return INTERRUPTED
    if not only_newest:
        overlay = ensure_oldest(environment.python)
        print("\n=== With the oldest libraries that requirements.txt allows", flush=True)
        codes.append(run(environment, ["-m", "oldest", *arguments], str(overlay)))
    return 1 if any(codes) else 0  # a run that was killed has a negative code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
