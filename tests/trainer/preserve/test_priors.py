"""The store of class images: nothing made twice, nothing damaged used, a cut-off run ends with the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from subjectbooth.tests.conftest import ROOT
from subjectbooth.tests.small_base import small_base, small_priors, small_subject
from subjectbooth.trainer.config import TrainConfig
from subjectbooth.trainer.errors import SubjectBoothError
from subjectbooth.trainer.events import Started
from subjectbooth.trainer.preserve.class_images import ClassImages
from subjectbooth.trainer.preserve.priors import (
    PriorRecipe,
    PriorStore,
    batches_to_make,
    class_priors,
    make_missing,
    parse_exclude,
    picture_hash,
    split_excluded,
)
from subjectbooth.trainer.runs.run import Run

RECIPE = PriorRecipe("base", "a photo of a dog", "", 64, 64, "euler", "normal", 20, 7.0, 5, 0)


class Sampler:
    """Stands for a model: a picture is a function of its recipe, its seed and, like on a real machine, its batch."""

    def __init__(self, recipe: PriorRecipe = RECIPE) -> None:
        self.recipe = recipe
        self.batches: list[tuple[int, ...]] = []

    def __call__(self, batch: tuple[int, ...]) -> torch.Tensor:
        self.batches.append(batch)
        seeds = [self.recipe.seed_of(index) for index in batch]
        noise = [torch.randn(4, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(noise) + len(batch) * 1e-4


def made(root: Path, count: int, batch_size: int = 4, recipe: PriorRecipe = RECIPE) -> tuple[dict, Sampler, list[str]]:
    store, sampler = PriorStore(root, recipe), Sampler(recipe)
    pictures, notes = store.load()
    list(make_missing(store, pictures, count, batch_size, sampler))
    return pictures, sampler, notes


def same(first: dict[int, torch.Tensor], second: dict[int, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[i], second[i]) for i in first)


@pytest.mark.parametrize(
    "change",
    [
        {"base_digest": "other"}, {"prompt": "a photo of a cat"}, {"negative": "blurred"}, {"width": 72},
        {"height": 72}, {"sampler_name": "heun"}, {"scheduler": "karras"}, {"steps": 21}, {"cfg": 7.5}, {"seed": 6},
        {"grouping": 4},
    ],
)  # fmt: skip
def test_the_key_changes_with_everything_that_makes_a_picture(change: dict[str, object]) -> None:
    assert replace(RECIPE, **change).key != RECIPE.key


def test_the_change_list_above_is_complete() -> None:
    assert len(RECIPE.__dataclass_fields__) == 11


def test_seeds_count_up_and_wrap() -> None:
    assert [RECIPE.seed_of(index) for index in range(3)] == [5, 6, 7]
    assert replace(RECIPE, seed=2**64 - 1).seed_of(1) == 0


def test_nothing_is_made_twice(tmp_path: Path) -> None:
    first, sampler, _ = made(tmp_path, 10)
    assert sampler.batches == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    again, sampler, notes = made(tmp_path, 10)
    assert sampler.batches == [] and notes == [] and same(again, first)


def test_more_pictures_reuse_those_that_are_there(tmp_path: Path) -> None:
    few, _, _ = made(tmp_path, 6)
    more, sampler, _ = made(tmp_path, 9, batch_size=2)
    assert sampler.batches == [(6, 7), (8,)]
    assert all(torch.equal(more[index], few[index]) for index in few)
    fewer, sampler, _ = made(tmp_path, 2)
    assert sampler.batches == [] and len(fewer) == 9


def test_other_recipes_do_not_meet(tmp_path: Path) -> None:
    made(tmp_path, 2)
    other, sampler, _ = made(tmp_path, 2, recipe=replace(RECIPE, seed=9))
    assert sampler.batches == [(0, 1)] and len(list(tmp_path.iterdir())) == 2
    # Not even when a file is moved into the other's folder.
    moved = next(PriorStore(tmp_path, RECIPE).path.glob("*.safetensors"))
    os.replace(moved, PriorStore(tmp_path, replace(RECIPE, seed=9)).path / "00002-00003.safetensors")
    pictures, notes = PriorStore(tmp_path, replace(RECIPE, seed=9)).load()
    assert same(pictures, other) and len(notes) == 1


@pytest.mark.parametrize("stop_after", [0, 1, 2])
def test_a_run_that_was_cut_off_goes_on_with_the_same_bits(tmp_path: Path, stop_after: int) -> None:
    whole, _, _ = made(tmp_path / "whole", 10)
    store, sampler = PriorStore(tmp_path / "cut", RECIPE), Sampler()
    run = make_missing(store, {}, 10, 4, sampler)
    for _ in range(stop_after):
        next(run)
    run.close()
    pictures, sampler, _ = made(tmp_path / "cut", 10)
    assert len(sampler.batches) == 3 - stop_after and same(pictures, whole)


def test_a_batch_that_fails_leaves_the_finished_ones(tmp_path: Path) -> None:
    sampler = Sampler()

    def fails(batch: tuple[int, ...]) -> torch.Tensor:
        if 4 in batch:
            raise KeyboardInterrupt
        return sampler(batch)

    with pytest.raises(KeyboardInterrupt):
        list(make_missing(PriorStore(tmp_path, RECIPE), {}, 8, 4, fails))
    assert sorted(PriorStore(tmp_path, RECIPE).load()[0]) == [0, 1, 2, 3]


def test_grouping_is_kept_where_the_sampler_needs_it(tmp_path: Path) -> None:
    grouped = replace(RECIPE, sampler_name="euler_ancestral", grouping=4)
    pictures, sampler, _ = made(tmp_path, 6, recipe=grouped)
    assert sampler.batches == [(0, 1, 2, 3), (4, 5, 6, 7)]
    # More of them, even with another batch size at hand, come in the same groups.
    more, sampler, _ = made(tmp_path, 9, batch_size=1, recipe=grouped)
    assert sampler.batches == [(8, 9, 10, 11)]
    assert all(torch.equal(more[index], pictures[index]) for index in pictures)
    assert batches_to_make({0, 1, 2}, 4, 4, 4) == [(0, 1, 2, 3)]


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        del content[len(content) // 2 :]
    elif how == "bit flip":
        content[-100] ^= 1
    elif how == "header":
        content[9] ^= 0x20
    elif how == "state":
        content[content.index(b'indices\\":[0') + 11] = ord("7")
    else:
        content.clear()
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("how", ["truncated", "bit flip", "header", "state", "empty"])
def test_damaged_files_are_found_said_and_made_again(tmp_path: Path, how: str) -> None:
    whole, _, _ = made(tmp_path, 8)
    damage(PriorStore(tmp_path, RECIPE).path / "00000-00003.safetensors", how)
    again, sampler, notes = made(tmp_path, 8)
    assert notes == ["00000-00003.safetensors was damaged; its class images are generated again."]
    assert sampler.batches == [(0, 1, 2, 3)] and same(again, whole)
    assert made(tmp_path, 8)[2] == []


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """Random bits of a batch's file: it never gives other pictures than it was written with."""
    recipe = replace(RECIPE, width=32, height=32)
    store = PriorStore(tmp_path, recipe)
    store.save([0], torch.randn(1, 4, 4, 4))
    path = next(store.path.glob("*.safetensors"))
    content, whole = path.read_bytes(), store.load()[0]
    random = np.random.default_rng(1)
    found = 0
    for position in random.choice(len(content) * 8, 300, replace=False):
        flipped = bytearray(content)
        flipped[position // 8] ^= 1 << (position % 8)
        path.write_bytes(bytes(flipped))
        pictures, notes = store.load()
        assert (pictures == {} and len(notes) == 1) or (same(pictures, whole) and notes == [])
        found += len(notes)
    assert found > 280


def test_values_that_are_not_numbers_are_not_kept(tmp_path: Path) -> None:
    store = PriorStore(tmp_path, RECIPE)
    with pytest.raises(SubjectBoothError, match="Class images 5 to 6 contain NaN or infinity"):
        store.save([4, 5], torch.full((2, 4, 8, 8), torch.nan))
    assert store.load() == ({}, [])


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(SubjectBoothError, match="Class images cannot be saved"):
        PriorStore(tmp_path, RECIPE).save([0], torch.zeros(1, 4, 8, 8))


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "root").write_bytes(b"")
    with pytest.raises(SubjectBoothError, match="Class images cannot be saved"):
        PriorStore(tmp_path / "root", RECIPE).save([0], torch.zeros(1, 4, 8, 8))


def test_excluded_pictures_are_left_out(tmp_path: Path) -> None:
    pictures, _, _ = made(tmp_path, 4)
    hashes = [picture_hash(pictures[index]) for index in range(4)]
    used, left_out = split_excluded(pictures, 4, (hashes[1], hashes[3][:8]))
    assert used == {0: hashes[0], 2: hashes[2]} and left_out == {1: hashes[1], 3: hashes[3]}
    store = PriorStore(tmp_path, RECIPE)
    priors = class_priors(pictures, used, store, "SD 1.x")
    assert torch.equal(priors.latents, torch.stack([pictures[0], pictures[2]]))
    assert priors.hashes == (hashes[0], hashes[2]) and priors.prompt == RECIPE.prompt
    assert (priors.store, priors.family, priors.base_digest) == (store.path.name, "SD 1.x", "base")
    everything = class_priors(pictures, split_excluded(pictures, 4, ())[0], store, "SD 1.x")
    assert everything.hashes == tuple(hashes) and everything.digest != priors.digest
    other = PriorStore(tmp_path, replace(RECIPE, prompt="another prompt"))
    assert class_priors(pictures, used, other, "SD 1.x").digest != priors.digest
    with pytest.raises(SubjectBoothError, match="Every class image is excluded"):
        class_priors(pictures, {}, store, "SD 1.x")


def test_priors_can_be_trained_on_when_made_in_inference_mode() -> None:
    with torch.inference_mode():
        priors = class_priors({0: torch.zeros(4, 8, 8)}, {0: "x"}, PriorStore(Path(), RECIPE), "SD 1.x")
    assert not priors.latents.is_inference()


def test_class_images_of_another_base_do_not_train_in_silence(tmp_path: Path) -> None:
    base, config = small_base(), TrainConfig(steps=1, rank=2, network_alpha=2.0, resolution=64)

    def run(**made_by: str) -> Run:
        priors = ClassImages(replace(small_priors(), **made_by))
        return Run(base, small_subject(), priors, config, tmp_path, torch.device("cpu"))

    with pytest.raises(SubjectBoothError, match="a model of the family SDXL for training on SD 1.x"):
        run(family="SDXL", base_digest="xl")
    other = run(family=base.family, base_digest="a finetune")
    (warning,) = other.warnings
    assert warning.startswith("The class images were made by another model")
    started = next(iter(other.events()))
    assert isinstance(started, Started) and warning in started.notes
    assert run(family=base.family, base_digest=base.digest).warnings == run().warnings == ()
    # They count by what they are, not by who made them.
    assert other.folder.key == run().folder.key


def test_exclude_is_parsed() -> None:
    first, second = "a1" * 32, "0123abcd"
    assert parse_exclude(f" {first.upper()},\n{second}; ") == (first, second)
    assert parse_exclude("") == ()
    for bad in ("1234567", "g" * 64, "a" * 65, "../../etc"):
        with pytest.raises(SubjectBoothError, match="exclude contains"):
            parse_exclude(bad)


WORKER = """
import sys, time, types
package = types.ModuleType("subjectbooth")
package.__path__ = [sys.argv[1]]
sys.modules["subjectbooth"] = package
import torch
from pathlib import Path
from subjectbooth.tests.trainer.preserve.test_priors import RECIPE, Sampler
from subjectbooth.trainer.preserve.priors import PriorStore, make_missing
store = PriorStore(Path(sys.argv[2]), RECIPE)
pictures, notes = store.load()
assert not notes, notes
print("ready", flush=True)
for batch in make_missing(store, pictures, int(sys.argv[3]), 2, Sampler()):
    time.sleep(0.003)
print("done", flush=True)
"""


def start_worker(root: Path, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, str(ROOT), str(root), str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_killed_at_any_moment_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    """kill -9 at random moments, again and again, until it gets through."""
    whole, _, _ = made(tmp_path / "whole", 200, batch_size=2)
    random = np.random.default_rng(20261122)
    kills = finished = 0
    while not finished:
        worker = start_worker(tmp_path / "killed", 200)
        assert worker.stdout is not None and worker.stdout.readline() == "ready\n"
        try:  # 100 batches take 0.3 s and more, so that three kills always come before the end
            worker.wait(float(random.uniform(0.0, 0.08)) if kills < 5 else 60)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.wait()
            kills += 1
        finished = "done" in worker.stdout.read()
        worker.stdout.close()
    pictures, notes = PriorStore(tmp_path / "killed", RECIPE).load()
    assert kills >= 3 and notes == [] and same(pictures, whole)


def test_two_programs_at_once_do_no_harm(tmp_path: Path) -> None:
    whole, _, _ = made(tmp_path / "whole", 40, batch_size=2)
    workers = [start_worker(tmp_path / "shared", 40) for _ in range(2)]
    outputs = [worker.communicate(timeout=120)[0] for worker in workers]
    assert outputs == ["ready\ndone\n"] * 2
    pictures, notes = PriorStore(tmp_path / "shared", RECIPE).load()
    assert notes == [] and same(pictures, whole)


@pytest.mark.parametrize("error", [PermissionError(13, "held by a scanner"), OSError(24, "too many open files")])
def test_a_file_that_cannot_be_read_now_is_not_taken_for_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    store = PriorStore(tmp_path, RECIPE)
    store.save([0], torch.randn(1, 4, 8, 8))
    (path,) = store.path.glob("*.safetensors")

    def refuse(_path: Path) -> bytes:
        raise error

    with monkeypatch.context() as held:
        held.setattr(Path, "read_bytes", refuse)
        with pytest.raises(SubjectBoothError, match="Class images cannot be read"):
            store.load()
    assert path.is_file()
    assert list(store.load()[0]) == [0]
