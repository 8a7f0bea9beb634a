"""Kill trainings again and again, compare what they end with, and write down what was seen: docs/reliability.md.

python tests/soak [--kills 42] [--comfyui-kills 10] [--fork-kills 50] [--inputs 10000] [--runs 50] [--seed 1]
                  [--only KIND] [--steps 24] [--no-write]
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.extend(str(Path(__file__).resolve().parents[2] / name) for name in ("tests", "scripts"))

from comfy_server import FP32_FLAGS
from setup_env import ROOT, Environment, ensure_environment
from soak.comfyui import PLANS as COMFYUI_PLANS
from soak.comfyui import kill_comfyui
from soak.page import write_page
from soak.shell import PLANS, kill_plan

TESTS = ROOT / "tests"
MATERIAL = """
import sys, types
from pathlib import Path
package = types.ModuleType("subjectbooth")
package.__path__ = [sys.argv[1]]
sys.modules["subjectbooth"] = package
from PIL import Image
from subjectbooth.tests.tiny import tiny_checkpoint
root, photos = Path(sys.argv[1]), Path(sys.argv[2])
photos.mkdir(parents=True)
cats = sorted((root / "demo" / "subjects" / "cat" / "train").iterdir())
for path, size in zip(cats, ((160, 160), (160, 110), (110, 160))):
    with Image.open(path) as photo:
        photo.convert("RGB").crop((0, 0, *size)).save(photos / path.name)
print(tiny_checkpoint(root / ".cache" / "tiny"))
"""
TRACE = "nodes/test_memory.py"
FUZZ = {"files": ("trainer/files/test_fuzz_files.py",), "inputs": ("nodes/test_fuzz_nodes.py",)}


def make_material(environment: Environment, photos: Path) -> Path:
    """The tests' smallest model in Stable Diffusion 1.5's layout, and photos of three shapes."""
    made = subprocess.run(
        [str(environment.python), "-c", MATERIAL, str(ROOT), str(photos)], capture_output=True, text=True, check=True
    )
    return Path(made.stdout.strip().splitlines()[-1])


def run_tests(environment: Environment, files: tuple[str, ...], settings: dict[str, str]) -> list[dict[str, Any]]:
    """Run test files in their long mode; what they report. Ends the program when one fails."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.jsonl"
        env = {**os.environ, **settings, "SUBJECTBOOTH_REPORT": str(report), "COMFYUI_PATH": str(environment.comfyui)}
        command = [str(environment.python), "-m", "pytest", "-c", str(TESTS / "pytest.ini"), "-s", *files]
        if subprocess.run(command, cwd=TESTS, env=env, stdin=subprocess.DEVNULL).returncode:
            raise SystemExit("A test failed: nothing is written.")
        return [json.loads(line) for line in report.read_text("utf-8").splitlines()] if report.exists() else []


def _shares(total: int, parts: int) -> list[int]:
    """``total`` in ``parts`` that differ by one at most."""
    return [total // parts + (number < total % parts) for number in range(parts)]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python tests/soak", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=42, help="Kills of trainings from a shell.")
    parser.add_argument("--comfyui-kills", type=int, default=10, help="Kills of ComfyUI while it trains.")
    parser.add_argument("--fork-kills", type=int, default=50, help="Kills of each kind of run in forks. 0: none.")
    parser.add_argument("--inputs", type=int, default=10_000, help="Strange inputs to try. 0: none.")
    parser.add_argument("--runs", type=int, default=50, help="Train-and-sample runs in one ComfyUI. 0: none.")
    parser.add_argument("--only", choices=[plan.name for plan in PLANS], help="One kind of training from a shell.")
    parser.add_argument("--steps", type=int, default=24, help="Of each of these trainings.")
    parser.add_argument("--seed", type=int, default=1, help="Of the moments of the kills, and of the inputs.")
    parser.add_argument("--no-write", action="store_true", help="Leave docs/reliability.md as it is.")
    options = parser.parse_args(arguments)
    environment = ensure_environment()
    choose = random.Random(options.seed)
    about = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "seed": options.seed,
        "machine": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, no GPU",
    }
    found: dict[str, dict[str, Any]] = {}

    def measured(part: str, rows: list[dict[str, Any]]) -> None:
        """Written at once: what fails or is stopped later costs only itself."""
        if rows:
            found[part] = {**about, "rows": rows}
            if not options.no_write:
                print(f"written: {write_page(ROOT / 'docs' / 'reliability.md', {part: found[part]})}", flush=True)

    with tempfile.TemporaryDirectory(prefix="soak-") as scratch:
        photos = Path(scratch) / "photos"
        base = make_material(environment, photos)
        chosen = [plan for plan in PLANS if options.only in (None, plan.name)]
        shares = zip(chosen, _shares(options.kills, len(chosen)), strict=True)
        measured(
            "kills",
            [
                kill_plan(
                    environment, base, photos, plan, share, choose, Path(scratch) / plan.name, steps=options.steps
                )
                for plan, share in shares
                if share
            ],
        )
        comfyui = zip(COMFYUI_PLANS, _shares(options.comfyui_kills, len(COMFYUI_PLANS)), strict=True)
        measured(
            "comfyui",
            [
                kill_comfyui(environment, base, name, share, choose, Path(scratch) / f"comfyui {number}", FP32_FLAGS)
                for number, (name, share) in enumerate(comfyui)
                if share
            ],
        )
    if options.fork_kills:
        measured(
            "forks",
            run_tests(
                environment,
                ("trainer/runs/test_kill.py",),
                {"SUBJECTBOOTH_KILLS": str(options.fork_kills), "SUBJECTBOOTH_FUZZ_SEED": str(options.seed)},
            ),
        )
    if options.inputs:
        for part, files in FUZZ.items():
            measured(
                part,
                run_tests(
                    environment,
                    files,
                    {"SUBJECTBOOTH_FUZZ": str(options.inputs), "SUBJECTBOOTH_FUZZ_SEED": str(options.seed)},
                ),
            )
    if options.runs:
        measured("traces", run_tests(environment, (TRACE,), {"SUBJECTBOOTH_RUNS": str(options.runs)}))
    print(json.dumps(found, indent=1))
    rows = [row for part in ("kills", "comfyui") if part in found for row in found[part]["rows"]]
    different = [row["name"] for row in rows if not row["identical"]]
    if different:
        print(f"NOT bit-identical: {', '.join(different)}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
