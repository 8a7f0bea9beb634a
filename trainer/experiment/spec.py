"""An experiment as a TOML file: what stays the same, what is varied, and what is measured.

.. code-block:: toml

    question = "Where does overfitting start?"
    base = "narrow"                       # the line to change: "model.safetensors"
    seeds = [0, 1, 2]

    [settings]                            # any option of python -m trainer train
    photos = "demo/subjects/dog/train"
    class_word = "dog"

    [axes]
    steps = [25, 75, 150]                 # an option and its values
    [axes.way]                            # or a name of its own, and the options of each variant, which count more
                                          # than those above; {} changes nothing
    none = { preservation = "none" }
    "class images" = { preservation = "class_images", num_class_images = 24 }

    [on_demo]                             # options in place of those above, on the demo base only
    resolution = 64

    [measure]
    figures = ["subject", "drift_others"]

    [pictures]
    prompts = ["a photo of {subject} on a beach"]
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import SubjectBoothError
from ..files.storage import read_chosen_file
from . import figures
from .names import Option, check_names, check_section, check_value

DEMO_BASES = ("demo", "narrow", "narrow-v", "narrow-v-zero-snr")
"""Values of ``base`` that name no file: the demo base as a checkpoint; the narrow model, which is several times faster;
and that model with its prediction converted to v, also with zero terminal SNR."""

SEED = Option("seeds", int, many=True)
TEXTS = {name: Option(name, str) for name in ("title", "question", "answer", "base")}
MEASURE = {
    "figures": Option("figures", str, tuple(figures.MEANINGS), many=True),
    "embedder": Option("embedder", str),
    "photos": Option("photos", str, many=True),
    "seeds": Option("seeds", int),
    "others": Option("others", int),
    "steps": Option("steps", int),
    "guidance_scale": Option("guidance_scale", float),
    "resolution": Option("resolution", int),
}
PICTURES = {"prompts": Option("prompts", str, many=True), "seed": Option("seed", int)}
SECTIONS = ("settings", "axes", "on_demo", "measure", "pictures")

_LIMITS = {
    "seeds": (2, 64),
    "others": (1, 24),
    "steps": (1, 1000),
    "guidance_scale": (1, 100),
    "resolution": (64, 4096),
}


@dataclass(frozen=True)
class Axis:
    """Something that is varied.

    Attributes:
        variants: the options that each value sets, by the value's label.
    """

    name: str
    variants: Mapping[str, Mapping[str, Any]]

    @property
    def options(self) -> set[str]:
        """All options that it sets."""
        return {name for variant in self.variants.values() for name in variant}


@dataclass(frozen=True)
class Measuring:
    """How runs are measured. ``None`` and an empty embedder mean: what is usual for the base.

    Attributes:
        figures: names of :data:`trainer.experiment.figures.MEANINGS`.
        embedder: a folder, or "demo"; empty: "demo" on the demo base, none on others.
        photos: with which pictures of the subject are compared; empty: those of the run.
        seeds: pictures per prompt.
        others: prompts of other things.
        prompts, picture_seed: of the pictures that the page shows.
    """

    figures: tuple[str, ...] = figures.DEFAULT
    embedder: str = ""
    photos: tuple[str, ...] = ()
    seeds: int = 4
    others: int = 24
    steps: int | None = None
    guidance_scale: float | None = None
    resolution: int | None = None
    prompts: tuple[str, ...] = ("a photo of {subject}", "a photo of {subject} on a beach", "a photo of a {class}")
    picture_seed: int = 0


@dataclass(frozen=True)
class Spec:
    """A checked experiment.

    Attributes:
        name: of the file, without the suffix.
        settings: options of every run.
        on_demo: options in their place if the base is the demo's.
        seeds: of the trainings.
    """

    name: str
    title: str
    question: str
    answer: str
    settings: Mapping[str, Any]
    on_demo: Mapping[str, Any]
    axes: tuple[Axis, ...]
    seeds: tuple[int, ...]
    measuring: Measuring


def read_spec(path: Path, options: Mapping[str, Option]) -> Spec:
    """Read and check an experiment.

    Args:
        options: what can be set and varied, by name.

    Raises:
        SubjectBoothError: the file cannot be read, or something in it is wrong.
    """
    content = read_chosen_file(path, "the experiment")
    toml: Any = _toml()
    try:
        values = toml.loads(content.decode("utf-8-sig"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise SubjectBoothError(f"{path.name} is not valid TOML ({error})", "TOML", "correct it", str(path)) from error
    return make_spec(path.stem, values, options)


def make_spec(name: str, values: Mapping[str, Any], options: Mapping[str, Option]) -> Spec:
    """Check an experiment.

    Args:
        name: of the experiment.
        values: the content of the file.
        options: what can be set and varied, by name.

    Raises:
        SubjectBoothError: something is wrong.
    """
    check_names(values, (*TEXTS, "seeds", *SECTIONS), "the experiment")
    texts = {name: check_value(option, values[name], name) for name, option in TEXTS.items() if name in values}
    if "seed" in options:
        _refuse_seed(values)
    settings = check_section(values.get("settings", {}), options, "[settings]")
    if "base" in texts:
        if "base" in settings:
            raise _conflict("base", "at the top", "[settings]")
        settings["base"] = check_value(options["base"], texts.pop("base"), "base")
    on_demo = check_section(values.get("on_demo", {}), options, "[on_demo]")
    axes = _axes(values.get("axes", {}), options)
    for axis in axes:
        for where, section in {"[settings]": settings, "[on_demo]": on_demo}.items():
            if axis.name in section:  # variants may set an option that others leave as it is
                raise _conflict(axis.name, "[axes]", where if axis.name != "base" else "base")
    seeds = check_value(SEED, values.get("seeds", [0]), "seeds")
    _check_once(seeds, "seeds")
    return Spec(
        name,
        texts.get("title", name),
        texts.get("question", ""),
        texts.get("answer", ""),
        settings,
        on_demo,
        axes,
        tuple(seeds),
        _measuring(values),
    )


def _refuse_seed(values: Mapping[str, Any]) -> None:
    for section in ("settings", "on_demo", "axes"):
        if isinstance(values.get(section), dict) and "seed" in values[section]:
            raise SubjectBoothError(
                f"seed in [{section}]",
                "seeds at the top of the file, over which figures are averaged",
                "write seeds = [0, 1, 2]",
                "seed",
            )


def _axes(section: Any, options: Mapping[str, Option]) -> tuple[Axis, ...]:
    if not isinstance(section, dict) or not section:
        raise SubjectBoothError("there are no axes", "one or more", "add a section [axes]", "[axes]")
    axes: list[Axis] = []
    for name, values in section.items():
        where = f"[axes] ({name})"
        if isinstance(values, dict):
            if name in options:
                raise SubjectBoothError(
                    f"the axis {name!r} has variants, and its name is an option",
                    "a list of values, or another name",
                    f"write {name} = [...] or rename the section",
                    name,
                )
            variants = {label: check_section(variant, options, f"[axes.{name}]") for label, variant in values.items()}
        else:
            check_names([name], options, "[axes]")
            if not isinstance(values, list):
                raise SubjectBoothError(f"{name} = {values!r} in [axes]", "a list of values", "use brackets", name)
            checked = [check_value(options[name], value, "[axes]") for value in values]
            _check_once([label_of(value) for value in checked], name)
            variants = {label_of(value): {name: value} for value in checked}
        if not variants:
            raise SubjectBoothError(f"the axis {name!r} is empty", "one value or more", "add some", where)
        for earlier in axes:
            both = sorted(earlier.options & {option for variant in variants.values() for option in variant})
            if both:
                raise _conflict(both[0], f"[axes] ({earlier.name})", where)
        axes.append(Axis(name, variants))
    return tuple(axes)


def _measuring(values: Mapping[str, Any]) -> Measuring:
    found = check_section(values.get("measure", {}), MEASURE, "[measure]")
    shown = check_section(values.get("pictures", {}), PICTURES, "[pictures]")
    for name, (low, high) in _LIMITS.items():
        if name in found and not low <= found[name] <= high:
            raise SubjectBoothError(
                f"{name} = {found[name]} in [measure]", f"a number from {low} to {high}", "change the value", name
            )
    for name in ("figures", "photos"):
        if name in found:
            found[name] = tuple(found[name])
    if "prompts" in shown:
        found["prompts"] = tuple(shown["prompts"])
    if "seed" in shown:
        if not 0 <= shown["seed"] < 2**63:
            raise SubjectBoothError(f"seed = {shown['seed']} in [pictures]", "0 or more", "use 0", "seed")
        found["picture_seed"] = shown["seed"]
    return Measuring(**found)


def label_of(value: Any) -> str:
    """How a value is shown."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return " + ".join(map(label_of, value)) if isinstance(value, list) else str(value)


def _check_once(values: list[Any], name: str) -> None:
    twice = next((value for number, value in enumerate(values) if value in values[:number]), None)
    if twice is not None:
        raise SubjectBoothError(f"{name} has {twice!r} twice", "each value once", "remove one", name)


def _conflict(option: str, first: str, second: str) -> SubjectBoothError:
    return SubjectBoothError(f"{option} is set by {first} and {second}", "one place", "remove it from one", option)


def _toml() -> Any:
    """``tomllib``, which Python has from 3.11 on, or the same as a package."""
    for name in ("tomllib", "tomli"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise SubjectBoothError(
        "this Python cannot read TOML", "Python 3.11, or the package tomli", "run python -m pip install tomli", "tomli"
    )
