"""``python -m trainer experiment`` on a small base from a file, with a small CLIP."""

from __future__ import annotations

import csv
import json
import pickle
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest
import torch

from subjectbooth.tests.layout_pair import NARROW, write_pair
from subjectbooth.tests.small_base import write_cat_photos
from subjectbooth.tests.trainer.measure.test_embedding import clip, saved
from subjectbooth.trainer import __main__ as shell
from subjectbooth.trainer.base.sd import families
from subjectbooth.trainer.base.stored.stored_base import load_base
from subjectbooth.trainer.errors import SubjectBoothError
from subjectbooth.trainer.experiment import figures
from subjectbooth.trainer.experiment.jobs import lay_out
from subjectbooth.trainer.experiment.spec import make_spec, read_spec
from subjectbooth.trainer.measure.drawer import Drawer
from subjectbooth.trainer.measure.embedding import from_folder
from subjectbooth.trainer.measure.evaluation import Evaluation, evaluate
from subjectbooth.trainer.measure.prompts import prompt_set
from subjectbooth.trainer.runs.folder import RunFolder
from subjectbooth.trainer.runs.lora_reader import read_lora
from subjectbooth.trainer.shell.grid_options import check_options, defaults, options
from subjectbooth.trainer.shell.grid_worker import Worker
from subjectbooth.trainer.subject.photo_files import read_photos
from subjectbooth.trainer.subject.photos import list_photos

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[3]

EXPERIMENT = """
question = "Does the rank matter?"
base = "{folder}/single.safetensors"
seeds = {seeds}

[settings]
photos = "{folder}/photos"
class_word = "cat"
token = "hta"
preservation = "none"
resolution = 64
learning_rate = 1e-2
validation_interval = 2
checkpoint_seconds = 0

{axes}

[measure]
figures = ["photo_loss", "scene_kept", "drift_others", "subject"]
embedder = "{folder}/clip"
seeds = 2
others = 1
steps = 1

[pictures]
prompts = ["a photo of {{subject}}", "a photo of a {{class}}"]
"""
FIGURES = ("photo_loss", "scene_kept", "drift_others", "subject")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, a CLIP, photos, a file that is no photo, and two experiments."""
    folder = tmp_path_factory.mktemp("experiment")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "FAMILIES", tuple(NARROW.values()))
        write_pair(folder, "SD 1.x")
    saved(folder / "clip", clip)
    write_cat_photos(folder / "photos")
    (folder / "broken.png").write_bytes(b"not a picture")
    broken = f'{{ photos = ["{folder.as_posix()}/broken.png"] }}'
    experiments = {
        "grid": ("[0, 1]", "[axes]\nrank = [2, 3]\nsteps = [2, 3]"),
        "killed": ("[0]", "[axes]\nrank = [2, 3]\nsteps = [2, 3]"),
        "failing": ("[0, 1]", f"[axes]\nrank = [2]\nsteps = [2]\n[axes.photos_of]\nsome = {{}}\nbroken = {broken}"),
    }
    for name, (seeds, axes) in experiments.items():
        content = EXPERIMENT.format(folder=folder.as_posix(), axes=axes, seeds=seeds)
        if name == "killed":  # faster: only scores, and the pictures to show
            content = content.replace(', "drift_others", "subject"', "")
        (folder / f"{name}.toml").write_text(content, "utf-8")
    return folder


@pytest.fixture(scope="module")
def output(folder: Path) -> Path:
    """The output folder after both experiments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "FAMILIES", tuple(NARROW.values()))
        given = ["--output_dir", str(folder / "out"), "--cpu"]
        assert shell.main(["experiment", str(folder / "grid.toml"), *given]) == 0
        assert shell.main(["experiment", str(folder / "failing.toml"), *given, "--report_to", "tensorboard"]) == 1
    return folder / "out"


def rows_of(page: Path) -> list[dict[str, str]]:
    with (page / "runs.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_is_what_the_run_folders_say(output: Path) -> None:
    """Each row's key, settings and scores are those of an ordinary run's folder; a steps axis is one run."""
    rows = rows_of(output / "grid")
    assert [(row["rank"], row["seed"], row["steps"]) for row in rows] == [
        (rank, seed, steps) for seed in "01" for rank in "23" for steps in "23"
    ]
    assert len({row["key"] for row in rows}) == 4 and len(list((output / "runs").iterdir())) == 4
    for row in rows:
        run = RunFolder(output / "runs", row["key"], "hta cat")
        assert run.path.name == row["run"]
        config = json.loads(run.record_path.read_text("utf-8"))["config"]
        assert (str(config["rank"]), str(config["seed"])) == (row["rank"], row["seed"])
        scores = run.scores(3)[int(row["steps"])]
        assert [float(row[name]) for name in FIGURES[:2]] == [scores[name] for name in FIGURES[:2]]
        assert [entry["step"] for entry in run.entries() if entry["event"] == "StepDone"] == [1, 2, 3]


def test_the_figures_are_those_of_an_evaluation(output: Path, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(families, "FAMILIES", tuple(NARROW.values()))
        base = load_base(folder / "single.safetensors")
        row = rows_of(output / "grid")[1]
        lora = output / "runs" / row["run"] / "lora_000003.safetensors"
        prompts = prompt_set("cat", "hta cat")
        prompts = prompt_set("cat", "hta cat", prompts.others[:1])
        draw = Drawer(base, read_lora(lora)[0], "lora", prompts.all, 64, 1, 7.0, CPU)
    photos = [
        torch.from_numpy(photo.pixels).permute(2, 0, 1).float() / 255
        for photo in read_photos(list_photos(folder / "photos"), "template")[0]
    ]
    *_, result = evaluate(draw, from_folder(folder / "clip"), prompts, range(2), photos)
    assert isinstance(result, Evaluation)
    assert float(row["drift_others"]) == result.figures["drift_others"].value
    assert float(row["subject"]) == result.figures["subject"].value
    assert set(result.figures) == set(figures.MEASURES)


def test_the_page_shows_mean_and_spread_over_the_seeds(output: Path) -> None:
    rows, page = rows_of(output / "grid"), (output / "grid" / "README.md").read_text("utf-8")
    for rank in "23":
        for steps in "23":
            cells = [rank, steps]
            for name in FIGURES:
                values = [float(row[name]) for row in rows if (row["rank"], row["steps"]) == (rank, steps)]
                cells.append(f"{mean(values):.3f} ± {stdev(values):.3f}")
            assert f"| {' | '.join(cells)} | 2 |" in page
    assert "Does the rank matter?" in page and "failed" not in page
    shown = {line.split("](")[1][:-1] for line in page.splitlines() if line.startswith("![")}
    assert shown == {"curves.svg", "pictures-1.png", "pictures-2.png"}  # rank by steps, a sheet for each prompt
    assert all((output / "grid" / name).is_file() for name in shown)


def test_a_failed_run_is_named_and_the_others_go_on(output: Path) -> None:
    page, rows = (output / "failing" / "README.md").read_text("utf-8"), rows_of(output / "failing")
    assert "**2 of 4 runs failed:**" in page
    failed = [row for row in rows if row["photos_of"] == "broken"]
    assert len(failed) == 2 and all("broken.png" in row["problem"] and not row["key"] for row in failed)
    assert "- **rank 2, photos_of broken, seed 0**: " in page and "broken.png" in page
    done = {row["key"]: row for row in rows if row["photos_of"] == "some"}
    whole = rows_of(output / "grid")
    first = {row["key"]: row for row in whole if (row["rank"], row["steps"]) == ("2", "2")}
    assert {key: row["subject"] for key, row in done.items()} == {key: row["subject"] for key, row in first.items()}
    assert list((output / "failing" / "tensorboard").iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="no fork")
def test_a_killed_grid_has_the_same_page_and_trains_nothing_twice(folder: Path, tmp_path: Path) -> None:
    driver = Path(__file__).with_name("grid_driver.py")
    command = [sys.executable, str(driver), str(tmp_path), str(folder / "killed.toml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr + "".join(log.read_text() for log in tmp_path.glob("*/log"))
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["whole"]["codes"] == [0, 0] and found["killed"]["codes"] == [-9] * 10 + [0, 0]
    assert found["killed"]["files"] == found["whole"]["files"]
    for grid in found.values():
        assert set(grid["trained"].values()) == {1} and len(grid["trained"]) == 6 and not grid["again"]


def spec(**changes: Any) -> Any:
    values: dict[str, Any] = {
        "base": "narrow",
        "settings": {"photos": ".", "class_word": "dog"},
        "axes": {"rank": [2, 4]},
        **changes,
    }
    return make_spec("x", values, options())


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"axis": {}}, "Unknown name 'axis' in the experiment. .* Use axes."),
        ({"settings": {"lerning_rate": 1e-4}}, "Unknown name 'lerning_rate' in .settings.. .*Use learning_rate."),
        ({"axes": {"stepps": [1]}}, "Unknown name 'stepps' in .axes.. .*Use steps."),
        ({"axes": {"rank": [2, "four"]}}, "rank = 'four' in .axes.. Required: a whole number"),
        ({"axes": {"rank": [2.5]}}, "rank = 2.5"),
        ({"axes": {"flip": [1]}}, "flip = 1 in .axes.. Required: true or false"),
        ({"axes": {"precision": ["fp23"]}}, "precision = 'fp23'.*Use fp32"),
        ({"axes": {"rank": []}}, "axis 'rank' is empty"),
        ({"axes": {"rank": 4}}, "rank = 4 in .axes.. Required: a list of values"),
        ({"axes": {"rank": [4, 4]}}, "rank has '4' twice"),
        ({"axes": {}}, "There are no axes"),
        ({"axes": {"way": {}}}, "axis 'way' is empty"),
        ({"axes": {"way": {"a": {"presevation": "none"}}}}, "'presevation' in .axes.way.*Use preservation."),
        ({"axes": {"way": {"a": {"rank": 2}}, "rank": [4]}}, "rank is set by .axes. .way. and .axes. .rank."),
        ({"settings": {"rank": 4}}, "rank is set by .axes. and .settings."),
        ({"on_demo": {"rank": 4}}, "rank is set by .axes. and .on_demo."),
        ({"axes": {"seed": [1]}}, "seed in .axes.. Required: seeds at the top"),
        ({"seeds": []}, "seeds is an empty list"),
        ({"seeds": [1, 1]}, "seeds has 1 twice"),
        ({"measure": {"figures": ["subjct"]}}, "figures = 'subjct'.*Use subject"),
        ({"measure": {"seeds": 1}}, "seeds = 1 in .measure.. Required: a number from 2 to 64"),
        ({"pictures": {"prompt": ["x"]}}, "'prompt' in .pictures.*Use prompts"),
    ],
)
def test_a_mistake_is_one_sentence_with_the_right_name(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(SubjectBoothError, match=f"(?s){problem}"):
        spec(**changes)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"settings": {"photos": "."}}, "class_word is not set"),
        ({"base": "missing.safetensors"}, "The base 'missing.safetensors' does not exist"),
        ({"settings": {"photos": "missing", "class_word": "dog"}}, "folder 'missing' cannot be read"),
        ({"axes": {"rank": [5000]}}, "rank 5000"),
        ({"settings": {"class_word": "dog", "preservation": "class_images"}}, "class images"),
        ({"settings": {"class_word": "dog", "prompt_template": "a photo"}}, "does not contain the token"),
    ],
)
def test_what_cannot_run_is_reported_before_anything_runs(
    changes: dict[str, Any], problem: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = {"photos": str(folder / "photos")}
    changes = {**changes, "settings": {**photos, **changes.get("settings", {"class_word": "dog"})}}
    with pytest.raises(SubjectBoothError, match=problem):
        lay_out(spec(**changes), defaults(), check_options)


def test_an_experiment_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        SubjectBoothError, match=r"^The experiment cannot be read .* Check the path\. Where: .*nope\.toml$"
    ):
        read_spec(tmp_path / "nope.toml", options())


def test_a_steps_axis_is_one_job_only_if_longer_runs_continue_shorter_ones(folder: Path) -> None:
    settings = {"photos": str(folder / "photos"), "class_word": "dog"}
    axes = {"steps": [30, 10], "lr_scheduler": ["constant", "cosine"]}
    points, jobs = lay_out(spec(settings=settings, axes=axes), defaults(), check_options)
    assert [job.steps for job in jobs] == [(10, 30), (30,), (10,)]
    assert len({job.key for job in jobs}) == 3 and {point.job for point in points} == {job.key for job in jobs}
    assert json.loads(json.dumps(jobs[0].options)) == jobs[0].options  # can be sent elsewhere


def test_settings_on_the_demo_base_only(folder: Path) -> None:
    settings = {"photos": str(folder / "photos"), "class_word": "dog", "learning_rate": 1e-4}
    ranks = {}
    for base in ("narrow", str(folder / "single.safetensors")):
        made = spec(base=base, settings=settings, on_demo={"learning_rate": 2e-3}, axes={"rank": [2]})
        (job,) = lay_out(made, defaults(), check_options)[1]
        ranks[base] = job.options["learning_rate"]
    assert list(ranks.values()) == [2e-3, 1e-4]


@pytest.mark.parametrize("path", sorted((ROOT / "experiments").glob("*.toml")), ids=lambda path: path.stem)
def test_the_experiments_of_the_repository_can_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    made = read_spec(path, options())
    points, jobs = lay_out(made, defaults(), check_options)  # names, values and files are checked
    assert {point.seed for point in points} == set(made.seeds)
    assert {job.options["resolution"] for job in jobs} <= {64, 96}  # [on_demo] is used


def test_a_worker_of_a_cluster_is_made_from_what_it_was_given(folder: Path, tmp_path: Path) -> None:
    """Once in a process, so that it keeps its base."""
    spec = read_spec(folder / "grid.toml", options())
    sent = pickle.dumps(Worker(tmp_path, spec.measuring, CPU, "tensorboard"))
    found, again = (pickle.loads(sent) for _ in range(2))  # noqa: S301 - our own
    assert found is again and found.runs == tmp_path / "runs"
    assert (found._measuring, found._device, found._report_to) == (spec.measuring, CPU, "tensorboard")
