"""Build a library of cut-out drawings, 128x128 RGBA each, from the raw npm packages.

Needs `resvg-py` (to render SVG), Pillow, and `npm` to download the packages.
"""

from __future__ import annotations

import io
import json
import logging
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .classes import CLASSES, STYLES

logger = logging.getLogger("subjectbooth")

PACKAGES: dict[str, str] = {
    "noto": "@iconify-json/noto@1.2.9",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "fxemoji": "@iconify-json/fxemoji@1.2.2",
    "noto-v1": "@iconify-json/noto-v1@1.2.5",
    "emojione": "@iconify-json/emojione@1.2.3",
    "fluent": "@lobehub/fluent-emoji-3d@1.1.0",
}
OLDER_NAMES = {"bullseye": "direct-hit", "robot": "robot-face"}
"""Names in the two older sets of drawings that Noto has renamed."""
SIDE = 128
MARGIN = 8


@dataclass(frozen=True)
class Library:
    """Drawings of one or more sets. pixels: uint8 [n, 128, 128, 4], straight alpha, each drawing centred."""

    pixels: np.ndarray
    words: tuple[str, ...]
    styles: tuple[str, ...]


@contextmanager
def _atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path, renamed to *path* at the end of the block.

    Several training processes request the same files at the same time, and must not read incomplete ones.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part = Path(folder) / path.name
        yield part
        part.replace(path)


def package(style: str, folder: Path) -> Path:
    """The tarball of a set in *folder*, downloaded with `npm pack` if missing.

    Raises:
        FileNotFoundError: npm is not installed.
    """
    scope, name, version = PACKAGES[style].replace("@", "/", 1).strip("/").replace("@", "/").split("/")
    path = folder / f"{scope}-{name}-{version}.tgz"
    if not path.exists():
        npm = shutil.which("npm")
        if npm is None:
            raise FileNotFoundError("npm, needed to download the emoji sets, was not found: install Node.js")
        with _atomic_path(path) as part:
            subprocess.run([npm, "pack", PACKAGES[style]], cwd=part.parent, check=True, capture_output=True)
    return path


def centred(image: Image.Image) -> np.ndarray:
    """Crop a drawing to its visible part and centre it in a SIDE x SIDE RGBA square."""
    image = image.convert("RGBA")
    box = image.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox()
    image = image.crop(box)
    inner = SIDE - 2 * MARGIN
    scale = inner / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    premultiplied = image.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    square = Image.new("RGBA", (SIDE, SIDE))
    square.paste(premultiplied, ((SIDE - size[0]) // 2, (SIDE - size[1]) // 2))
    return np.asarray(square)


def _member(tarball: Path, name: str) -> bytes:
    with tarfile.open(tarball) as archive:
        handle = archive.extractfile(f"package/{name}")
        if handle is None:
            raise FileNotFoundError(f"{name} in {tarball}")
        return handle.read()


def svg_drawings(style: str, folder: Path) -> dict[str, np.ndarray]:
    """class word -> drawing, for one of the SVG sets."""
    tarball = package(style, folder)
    icons = json.loads(_member(tarball, "icons.json"))
    # The older sets have no tables of code points, but use Noto's names.
    chars = json.loads(_member(tarball, "chars.json")) or json.loads(_member(package("noto", folder), "chars.json"))
    known = {*icons["icons"], *icons.get("aliases", {})}
    drawings = {}
    for word, (code, firefox) in CLASSES.items():
        name = firefox if style == "fxemoji" else chars.get(code) or chars.get(f"{code}-fe0f")
        if name not in known:
            name = OLDER_NAMES.get(name or "")
        if name is not None and name in known:
            drawings[word] = _draw(icons, name)
    return drawings


def _draw(icons: dict[str, Any], name: str) -> np.ndarray:
    """Render one icon of a set."""
    import resvg_py

    while name not in icons["icons"]:
        name = icons.get("aliases", {})[name]["parent"]
    icon = icons["icons"][name]
    width = icon.get("width", icons.get("width", icons.get("height", 16)))
    height = icon.get("height", icons.get("height", 16))
    left, top = icon.get("left", 0), icon.get("top", 0)
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="256" height="256">{icon["body"]}</svg>'
    )
    png = resvg_py.svg_to_bytes(svg_string=svg, width=256, height=256)
    return centred(Image.open(io.BytesIO(bytes(png))))


def whole_set(style: str, folder: Path) -> dict[str, np.ndarray]:
    """icon name -> drawing, for an SVG set without skin tones and flags, which hardly differ."""
    icons = json.loads(_member(package(style, folder), "icons.json"))
    names = [name for name in icons["icons"] if "skin-tone" not in name and not name.startswith("flag-")]
    return {name: _draw(icons, name) for name in sorted(names)}


def fluent_drawings(folder: Path) -> dict[str, np.ndarray]:
    """class word -> drawing of the held-out set."""
    tarball = package("fluent", folder)
    drawings = {}
    with tarfile.open(tarball) as archive:
        names = {Path(name).stem: name for name in archive.getnames() if name.endswith(".webp")}
        for word, (code, _) in CLASSES.items():
            name = names.get(code) or names.get(f"{code}-fe0f")
            handle = archive.extractfile(name) if name else None
            if handle is not None:
                drawings[word] = centred(Image.open(io.BytesIO(handle.read())))
    return drawings


def _kept(cache: Path, make: Callable[[], dict[str, dict[str, np.ndarray]]]) -> Library:
    """The library cached in *cache*, created by *make* (style -> word -> drawing) if missing."""
    if not cache.exists():
        pixels: list[np.ndarray] = []
        words: list[str] = []
        names: list[str] = []
        for style, drawings in make().items():
            logger.info("%s: %d drawings", style, len(drawings))
            pixels += drawings.values()
            words += drawings
            names += [style] * len(drawings)
        with _atomic_path(cache) as part:
            np.savez(part, pixels=np.stack(pixels), words=np.array(words), styles=np.array(names))
    with np.load(cache) as data:
        return Library(data["pixels"], tuple(map(str, data["words"])), tuple(map(str, data["styles"])))


def library(folder: Path, styles: tuple[str, ...] = STYLES) -> Library:
    """The drawings of all classes in *styles*, cached in *folder* as one .npz."""

    def make() -> dict[str, dict[str, np.ndarray]]:
        return {s: fluent_drawings(folder) if s == "fluent" else svg_drawings(s, folder) for s in styles}

    return _kept(folder / f"library-{'-'.join(styles)}.npz", make)


def everything_drawn(folder: Path, styles: tuple[str, ...] = STYLES) -> Library:
    """All drawings of *styles*, not only those of the classes; used to train the autoencoder."""
    cache = folder / f"everything-{'-'.join(styles)}.npz"
    return _kept(cache, lambda: {style: whole_set(style, folder) for style in styles})
