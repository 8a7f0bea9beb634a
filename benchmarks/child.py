"""The process of one contestant: ``python benchmarks/child.py NAME SCENE OUT COUNTS STARTED OUTPUT [ARGUMENT...]``."""

from __future__ import annotations

import os
import runpy
import sys
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
package = types.ModuleType("subjectbooth")
package.__path__ = [str(ROOT)]
sys.modules.setdefault("subjectbooth", package)
# This folder would come before torch's own modules of the same names.
sys.path[:] = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]


def main(arguments: list[str]) -> int:
    name, scene_json, out, counts, started, output, *more = arguments
    import torch

    from subjectbooth.benchmarks.recorder import Recorder, measure_diffusers, measure_ours, steps_of
    from subjectbooth.benchmarks.scene import Scene

    scene = Scene.from_json(scene_json)
    if scene.threads:
        torch.set_num_threads(scene.threads)
    recorder = Recorder(scene, Path(out), counts == "counts", float(started))
    steps = steps_of(scene, counts == "counts")
    if name.startswith("floor"):
        import diffusers  # noqa: F401
        import peft  # noqa: F401
        import transformers  # noqa: F401

        from subjectbooth.benchmarks.floor import train

        recorder.start_parts()
        train(scene, name.endswith("class"), steps, Path(output), recorder.parts.part)
    elif name.startswith("ours"):
        sys.path.insert(0, str(ROOT))
        os.chdir(ROOT)
        from trainer import __main__ as shell

        if name == "ours-prepare":
            _draw_nothing()
        measure_ours(recorder.parts)
        recorder.start_parts()
        if code := shell.main(more):
            return code
    else:
        script, *options = more
        sys.argv = [script, *options]
        measure_diffusers(recorder.parts)
        recorder.start_parts()
        runpy.run_path(script, run_name="__main__")
    recorder.write()
    return 0


def _draw_nothing() -> None:
    """Random latents in place of class images, which take a denoising run each."""
    from collections.abc import Generator
    from typing import Any

    import torch

    from trainer.base.sd.denoiser import DiffusersUNet

    def sample(self: Any, *given: Any) -> Generator[int, None, torch.Tensor]:
        _, _, _, size, steps, _, seeds, _ = given
        yield steps
        return torch.stack([torch.randn(size, generator=torch.Generator().manual_seed(seed)) for seed in seeds])

    DiffusersUNet.sample = sample  # type: ignore[method-assign]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
