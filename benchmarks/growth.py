"""How time and memory of a run grow with steps, photos, class images, resolution and rank; writes one picture.

    python benchmarks/growth.py [--out docs/performance-growth]

Runs of this project from the shell on the benchmark's small base, one process each. Times are CPU time, which other
programs disturb less than wall time. Peak memory is of the whole process, from its start.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import types
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
package = types.ModuleType("subjectbooth")
package.__path__ = [str(ROOT)]
sys.modules.setdefault("subjectbooth", package)

if TYPE_CHECKING:
    from subjectbooth.benchmarks.plot import Panel
    from subjectbooth.benchmarks.scene import Scene

AXES: dict[str, tuple[str, tuple[int, ...], str]] = {
    "timed": ("steps", (10, 50, 100, 200), "all steps"),
    "photos": ("photos", (3, 50, 150, 500), "to first step"),
    "class_images": ("class images", (0, 100, 1000), "to first step"),
    "resolution": ("pixels along a side", (64, 128, 256, 384), "one step"),
    "rank": ("rank", (4, 16, 64, 128), "one step"),
}
"""By field of the scene: its name, the values, and which seconds are shown. The class images are there already."""


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", nargs="+", choices=tuple(AXES), help="these settings")
    options.add_argument("--scratch", type=Path, help="a folder for base and outputs, which are then kept")
    options.add_argument("--out", type=Path, default=Path("growth"), help="writes OUT.svg and OUT.json, and adds to it")
    given = options.parse_args()
    sys.path.insert(0, str(ROOT / "scripts"))
    from setup_env import ensure_environment

    python = ensure_environment().python
    if Path(sys.executable).resolve() != Path(python).resolve():
        return subprocess.run([str(python), __file__, *sys.argv[1:]], check=False).returncode
    with tempfile.TemporaryDirectory(prefix="growth_") as scratch:
        measure(given.only or list(AXES), (given.scratch or Path(scratch)).resolve(), given.out)
    return 0


def measure(axes: list[str], scratch: Path, out: Path) -> None:
    from subjectbooth.benchmarks.plot import svg
    from subjectbooth.benchmarks.scene import Scene

    kept = out.with_suffix(".json")
    found: dict[str, Any] = json.loads(kept.read_text("utf-8")) if kept.is_file() else {}
    start = Scene(folder=scratch / "scene", size="tiny", resolution=64, warm_up=2, timed=5, threads=1, class_images=0)
    for axis in axes:
        points = found[axis] = [each for each in found.get(axis, []) if each["at"] in AXES[axis][1]]
        for value in AXES[axis][1]:
            if value not in {each["at"] for each in points}:
                points.append(point(_with(start, axis, value), axis, scratch))
                points.sort(key=lambda each: float(each["at"]))
                kept.write_text(json.dumps(found, indent=1), "utf-8")
    panels = [panel(axis, found[axis]) for axis in AXES if axis in found]
    out.with_suffix(".svg").write_text(svg(panels), "utf-8")


def _with(scene: Scene, axis: str, value: int) -> Scene:
    changes: dict[str, Any] = {axis: value}
    return replace(scene, **changes)


def point(scene: Scene, axis: str, scratch: Path) -> dict[str, Any]:
    """One run."""
    from subjectbooth.benchmarks.contestants import Places, ours
    from subjectbooth.benchmarks.scene import build

    places = Places(None, None, scratch)
    build(replace(scene, class_images=0))
    way = "class_images" if scene.class_images else "none"
    value = getattr(scene, axis)
    print(f"{AXES[axis][0]}: {value} ... ", end="", file=sys.stderr, flush=True)
    if scene.class_images:
        ours(way, prepare=True)(scene, places, scratch / "growth", False)
    run = ours(way)(scene, places, scratch / "growth", False)
    times = {
        "all steps": sum(run["cpu"]),
        "to first step": run["first_cpu"],
        "one step": sum(run["cpu"]) / len(run["cpu"]),
    }
    peak = max(run["peak"], run["peak_before"])
    print(f"{times[AXES[axis][2]]:.2f} s, {peak / 2**30:.2f} GB", file=sys.stderr, flush=True)
    return {"at": value, **times, "peak": peak, "peak_in_steps": run["peak"]}


def panel(axis: str, points: list[dict[str, Any]]) -> Panel:
    """Its plot."""
    from subjectbooth.benchmarks.plot import Panel

    name, _, seconds = AXES[axis]
    return Panel(
        title=name[0].upper() + name[1:],
        across=name,
        at=[each["at"] for each in points],
        time=[each[seconds] for each in points],
        memory=[each["peak"] / 2**30 for each in points],
        time_name=f"CPU s, {seconds}",
    )


if __name__ == "__main__":
    sys.exit(main())
