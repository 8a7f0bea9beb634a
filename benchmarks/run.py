"""Compare a training of this project with its peers, in one run; prints a table and writes it with all figures.

    python benchmarks/run.py [--script path/to/diffusers/examples/dreambooth/train_dreambooth_lora.py]

Contestants: a bare loop with peft (the floor); SubjectBooth from the shell, and in ComfyUI on ComfyUI's own module;
with --script diffusers' DreamBooth script; ComfyUI's own Train LoRA. All train the same base (Stable Diffusion's layout
with random weights, which affect neither time nor memory) on the same photos. Each run is a process of its own, all
children of this one, in random order in each round; steps are timed inside of it, and counted in one further run.

On a GPU the same command measures the GPU. There, use the real size:
--size sd1 --resolution 512 --precision bf16 --steps 50
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
package = types.ModuleType("subjectbooth")
package.__path__ = [str(ROOT)]
sys.modules.setdefault("subjectbooth", package)

if TYPE_CHECKING:
    from subjectbooth.benchmarks.scene import Scene


def main() -> int:
    options = parser()
    given = options.parse_args()
    if given.script and not given.script.is_file():
        options.error(f"{given.script} not found; use train_dreambooth_lora.py of a diffusers checkout")
    sys.path.insert(0, str(ROOT / "scripts"))
    from setup_env import ensure_environment

    environment = ensure_environment()
    if Path(sys.executable).resolve() != Path(environment.python).resolve():
        return subprocess.run([str(environment.python), __file__, *sys.argv[1:]], check=False).returncode
    with tempfile.TemporaryDirectory(prefix="benchmark_") as scratch:
        return compare(given, environment.comfyui, given.scratch or Path(scratch))


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--script", type=Path, help="diffusers' train_dreambooth_lora.py; without it, it is left out")
    options.add_argument("--only", nargs="+", metavar="NAME", help="these contestants; the floor is always added")
    options.add_argument("--size", choices=("tiny", "small", "sd1"), default="tiny", help="of the UNet (default tiny)")
    options.add_argument("--resolution", type=int, default=128, help="pixels (default 128)")
    options.add_argument("--rank", type=int, default=16, help="of the LoRA (default 16)")
    options.add_argument("--batch", type=int, default=1, help="photos per step (default 1)")
    options.add_argument("--precision", choices=("fp32", "bf16", "fp16"), default="fp32")
    options.add_argument("--threads", type=int, default=0, help="torch's threads in each process (default: its choice)")
    options.add_argument("--steps", type=int, default=10, help="timed steps of a run (default 10)")
    options.add_argument("--warm-up", type=int, default=2, help="steps before them (default 2)")
    options.add_argument("--rounds", type=int, default=3, help="timed runs of each; 0 counts only (default 3)")
    options.add_argument("--no-counts", action="store_true", help="only the timed rounds")
    options.add_argument("--add", action="store_true", help="add the rounds to those that OUT.json has")
    options.add_argument("--seed", type=int, default=0, help="of the order within the rounds")
    options.add_argument("--cpu", action="store_true", help="use the CPU even if there is a GPU")
    options.add_argument("--scratch", type=Path, help="a folder for bases and outputs, which are then kept")
    options.add_argument("--out", type=Path, default=Path("benchmark"), help="writes OUT.md and OUT.json")
    return options


def compare(given: argparse.Namespace, comfyui: Path, scratch: Path) -> int:
    from subjectbooth.benchmarks.contestants import Places, all_contestants
    from subjectbooth.benchmarks.rounds import Measured, run_all
    from subjectbooth.benchmarks.scene import build
    from subjectbooth.benchmarks.table import read, report
    from subjectbooth.tests.comfy_server import exit_on_sigterm

    scene = scene_of(given, scratch.resolve())
    script = given.script.resolve() if given.script else None
    places = Places(script, comfyui, scratch.resolve())
    contestants = all_contestants(places)
    names = [each.name for each in contestants]
    if unknown := set(given.only or ()) - set(names):
        raise SystemExit(f"unknown: {', '.join(sorted(unknown))}; contestants: {', '.join(names)}")
    wanted = [each for each in contestants if not given.only or each.name in given.only]
    needed = {each.floor for each in wanted} | {each.name for each in wanted}
    chosen = [each for each in contestants if each.name in needed and each.is_possible(places)]
    build(scene)
    earlier = read(given.out.with_suffix(".json"), scene) if given.add else None

    def keep(measured: Measured) -> None:
        text, figures = report(scene, contestants, measured)  # earlier ones too
        given.out.with_suffix(".md").write_text(text, "utf-8")
        given.out.with_suffix(".json").write_text(figures, "utf-8")

    exit_on_sigterm()
    measured = run_all(scene, places, chosen, given.rounds, given.seed, earlier, not given.no_counts, keep)
    keep(measured)
    print(given.out.with_suffix(".md").read_text("utf-8"))
    return 1 if measured.failed else 0


def scene_of(given: argparse.Namespace, scratch: Path) -> Scene:
    import torch

    from subjectbooth.benchmarks.scene import Scene

    is_gpu = torch.cuda.is_available() and not given.cpu
    if given.precision == "fp16" and not is_gpu:
        raise SystemExit("fp16 needs a GPU: use fp32 or bf16")
    return Scene(
        folder=scratch / "scene",
        size=given.size,
        resolution=given.resolution,
        rank=given.rank,
        batch=given.batch,
        precision=given.precision,
        device="cuda" if is_gpu else "cpu",
        threads=given.threads,
        warm_up=given.warm_up,
        timed=given.steps,
    )


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
