"""The subjects of a batch: rows of a CSV file, or folders."""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from ..errors import SubjectBoothError
from ..experiment.jobs import Job
from ..experiment.names import check_names
from ..files.storage import canonical_json, disk_errors, sha256_of
from ..subject.photos import list_photos
from .grid_options import check_options, options
from .options import parser
from .terms import error_in_shell

COLUMNS = ("photos", "class_word", "output_name")


def read_subjects(path: Path, common: Sequence[str], output_dir: Path) -> list[Job]:
    """A job for each subject, all checked.

    Args:
        path: a CSV file, in which photos are relative to its folder; or a folder with a folder of photos for each
            subject, by whose name the LoRA is called.
        common: arguments of all trainings, which a row may override.
        output_dir: where the LoRAs are published.

    Raises:
        SubjectBoothError: one sentence for each row that cannot be used.
    """
    jobs: list[Job] = []
    problems: list[str] = []
    names: dict[str, str] = {}
    for place, row in _rows(path):
        try:
            job = _job(row, common, output_dir)
            if job.name in names:
                raise SubjectBoothError(
                    f"output_name {job.name!r} is also that of {names[job.name]}", "a name for each LoRA", "change one"
                )
            names[job.name] = place
            jobs.append(job)
        except SubjectBoothError as error:
            problems.append(f"{place}: {error_in_shell(error)}")
    if problems:
        raise SubjectBoothError(
            f"{len(problems)} of {len(problems) + len(jobs)} subjects cannot be used",
            "photos, class_word and options as python -m trainer train takes them",
            "correct them; nothing was trained:\n" + "\n".join(problems),
        )
    if not jobs:
        raise SubjectBoothError(f"there are no subjects in {path}", "a row or folder for each", "add some")
    return jobs


def options_of(job: Job) -> argparse.Namespace:
    """The options of a job, as those of a training."""
    return _parsed(job.options["arguments"])


def _rows(path: Path) -> list[tuple[str, dict[str, str]]]:
    """Where each subject stands, for messages, and its columns."""
    if path.is_dir():
        folders = sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))
        return [(folder.name, {"photos": str(folder), "output_name": folder.name}) for folder in folders]
    with disk_errors("the list of subjects cannot be read", path):
        text = path.read_text("utf-8-sig")
    lines = csv.DictReader(text.splitlines())
    check_names(lines.fieldnames or (), {*options(), *COLUMNS}, path.name)
    found = []
    for row in lines:
        place = f"line {lines.line_num}"
        if None in row:
            row = {**row, "": "more"}  # reported with the row's other problems
        values = {name: (value or "").strip() for name, value in row.items() if name is not None}
        if not any(values.values()):
            continue
        if values.get("photos"):
            values["photos"] = str(path.parent / Path(values["photos"]).expanduser())
            values["output_name"] = values.get("output_name") or Path(values["photos"]).name
        found.append((place, values))
    return found


def _job(row: Mapping[str, str], common: Sequence[str], output_dir: Path) -> Job:
    if "" in row:
        raise SubjectBoothError("more cells than columns", "one for each column", "put cells with a comma in quotes")
    if not row.get("photos"):
        raise SubjectBoothError("photos is empty", "a folder with the subject's photos", "add it", "photos")
    arguments = [*common, "--output_dir", str(output_dir)]
    for name, value in row.items():
        known = options().get(name)
        if known is not None and known.kind is bool:
            if value.lower() not in ("", "true", "false", "yes", "no", "1", "0"):
                raise SubjectBoothError(f"{name} {value!r}", "true or false", "correct it", name)
            arguments += [f"--{name}"] * (value.lower() in ("true", "yes", "1"))
        elif value and name == "validation_prompts":
            arguments += [f"--{name}", *value.split("|")]
        elif value:
            arguments += [f"--{name}={value}"]
    given = _parsed(arguments)
    check_options({**vars(given), "base": str(given.base), "photos": str(given.photos)})
    list_photos(given.photos)
    identity = {name: value for name, value in vars(given).items() if name != "output_dir"}
    return Job(
        sha256_of(canonical_json({name: str(value) for name, value in identity.items()}))[:16],
        given.output_name,
        {"arguments": arguments},
        (given.steps,),
    )


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    found = parser()

    def error(message: str) -> NoReturn:
        raise SubjectBoothError(message, "options as python -m trainer train --help lists them", "correct it")

    found.error = error  # type: ignore[method-assign]
    return found.parse_args(arguments)
