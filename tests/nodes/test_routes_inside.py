"""Each route of the pack, and each way to name something outside: a bait lies there, and no route bites."""

from __future__ import annotations

import http.client
import json
import shutil
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image

from subjectbooth.tests.comfy_server import ComfyClient, ComfyServer
from subjectbooth.tests.nodes.test_fuzz_nodes import _routes
from subjectbooth.trainer.files.safetensors_file import to_bytes

SECRET = "SECRETWORD"
BAIT = "inside_bait"
LINK = "inside_link"
HASH = "a" * 32
KEY = "a" * 64


@dataclass(frozen=True)
class Place:
    """Where a route takes a name, and what it would show of a bait.

    Attributes:
        method, path: the route's; ``{name}`` in the path or the query stands for the name.
        body: the JSON sent, with the name where ``{name}`` stands.
        root: the folder that names are looked up in.
        bait: lays a bait at a path.
        suffix: of a bait that is a file.
        shows: in a bait's answer.
        links: whether a link in the root is refused. ComfyUI lists the LoRAs behind links, as people keep them.
        status: of the answer about a bait in the root itself.
    """

    method: str
    path: str
    root: Callable[[ComfyServer], Path]
    bait: Callable[[Path], None]
    body: str = ""
    suffix: str = ""
    shows: str = SECRET
    links: bool = True
    status: int = 200


def _lay_run(path: Path) -> None:
    (path / "validation").mkdir(parents=True)
    record = {"key": KEY, "trigger": SECRET, "config": {"steps": 5}}
    (path / "run.json").write_text(json.dumps(record), "utf-8")
    _lay_picture(path / "validation" / "step_000001_00.png")
    step = {"event": "StepDone", "step": 1, "loss": 0.5, "instance_loss": 0.5}
    (path / "events.jsonl").write_text(json.dumps(step) + "\n", "utf-8")


def _lay_class_images(path: Path) -> None:
    path.mkdir()
    (path / "recipe.json").write_text(json.dumps({"prompt": SECRET}), "utf-8")
    _lay_picture(path / f"{HASH}_{'b' * 8}.png")


def _lay_picture(path: Path) -> None:
    Image.new("RGB", (64, 64), (12, 200, 77)).save(path)


def _lay_folder(path: Path) -> None:
    path.mkdir()
    _lay_picture(path / f"{SECRET}.png")


def _lay_lora(path: Path) -> None:
    path.write_bytes(to_bytes({"lora_unet_x.alpha": torch.ones(())}, {"subjectbooth.trigger": SECRET}))


def _runs(server: ComfyServer) -> Path:
    return server.output_dir / "subjectbooth"


PLACES = {
    "events": Place("GET", "/runs/{name}/events", _runs, _lay_run),
    # Its run is not being trained, which it says of a run that is there.
    "stop": Place("POST", "/runs/{name}/stop", _runs, _lay_run, shows="not in training", status=409),
    "thumbnail": Place("GET", "/runs/{name}/thumbnail", _runs, _lay_run, suffix=f"_{KEY[:12]}", shows="JFIF"),
    "sweeps": Place("GET", "/runs/{name}/sweep", _runs, _lay_run, suffix=f"_{KEY[:12]}", shows="sweeps"),
    # Its run has no LoRA, which they say of a run that is there.
    "sweep": Place("POST", "/runs/{name}/sweep", _runs, _lay_run, suffix=f"_{KEY[:12]}", shows="has not kept",
                   status=400),
    "publish": Place("POST", "/runs/{name}/publish", _runs, _lay_run, suffix=f"_{KEY[:12]}", shows="has not kept",
                     status=400),
    "open": Place("POST", "/runs/{name}/open", _runs, _lay_run, suffix=f"_{KEY[:12]}", shows="opened"),
    "delete": Place("DELETE", "/runs/{name}", _runs, _lay_run, suffix=f"_{KEY[:12]}", shows="freed"),
    "class_images": Place("GET", "/class_images?folder={name}", lambda server: _runs(server) / "class_images",
                          _lay_class_images),
    "lora": Place("GET", "/lora?name={name}", lambda server: server.models_dir / "loras", _lay_lora,
                  suffix=".safetensors", links=False),
    "images": Place("POST", "/photos", lambda server: server.input_dir, _lay_picture,
                    body='{"images": [{name}], "resolution": 64}', suffix=".png", shows="thumbnail"),
    "folder": Place("POST", "/photos", lambda server: server.input_dir, _lay_folder,
                    body='{"folder": {name}, "resolution": 64}'),
    "sample": Place("POST", "/photos", lambda server: server.input_dir, _lay_folder,
                    body='{"sample": {name}, "resolution": 64}'),
}  # fmt: skip


def _ways(bait: Path) -> list[str]:
    """Names for a thing that lies beside the folder in which it is looked for."""
    name, whole = bait.name, bait.as_posix()
    encoded = urllib.parse.quote(whole, safe="")
    return [
        f"../{name}", f"./../{name}", f"x/../../{name}", f"{LINK}/../{name}", f"..//{name}", f"..\\{name}",
        f"x\\..\\..\\{name}", f"..%2f{name}", f"..%2F{name}", f"%2e%2e/{name}", f"%2e%2e%2f{name}", f"..%5c{name}",
        f"%2e%2e%5c{name}", f"..%252f{name}", f"%252e%252e%252f{name}", f"..%c0%af{name}", f"..\uff0f{name}",
        f"....//{name}", whole, f"/{whole}", f"//{whole.lstrip('/')}", encoded, encoded.lower(), f"file://{whole}",
        f"C:{whole}", whole.replace("/", "\\"), f"\\\\localhost\\{name}", f"C:\\{name}", f"C:{name}", f"../{name}\x00",
        f"../{name}/", f"../{name}/.", f"~/../{name}", "..", "../", "../..", ".", "./", "/", "\\", "~",
    ]  # fmt: skip


def _ask(client: ComfyClient, place: Place, name: str, as_it_is: bool) -> tuple[int, str]:
    """Status and body. ``as_it_is``: an address with the name as it stands, where a client would encode it."""
    address = urllib.parse.urlsplit(client.url)
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=60)
    body = place.body.replace("{name}", json.dumps(name)).encode()
    # What no request line can hold is encoded in any case.
    part = urllib.parse.quote(name, safe="/%\\:.~?&=" if as_it_is else "")
    try:
        connection.putrequest(place.method, "/subjectbooth" + place.path.replace("{name}", part))
        connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, answer.read().decode("utf-8", "replace")
    finally:
        connection.close()


def _without(said: str, name: str) -> str:
    """An answer's sentence without the name it repeats."""
    sentence = str(json.loads(said)["error"])
    for known in (name, urllib.parse.unquote(name)):
        for spelled in (known, repr(known)[1:-1], known[:60], repr(known[:60])[1:-1]):  # a long one is repeated in part
            sentence = sentence.replace(spelled, "")
    return sentence


def _state(base: Path) -> dict[Path, tuple[int, int]]:
    """Size and time of every file that a route could have changed."""
    passing = (base / "temp", base / "user")
    files = [path for path in base.rglob("*") if path.is_file() and not any(map(path.is_relative_to, passing))]
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in files if path.suffix != ".log"}


@pytest.fixture
def server(comfy: ComfyClient) -> Iterator[ComfyServer]:
    """The session's, without what a test has laid out there."""
    assert comfy.server is not None
    yield comfy.server
    for path in sorted(comfy.server.base_dir.rglob("inside_*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def test_every_route_is_here() -> None:
    takes_names = {(place.method, place.path.partition("?")[0]) for place in PLACES.values()}
    assert set(_routes()) - takes_names == {("GET", "/active"), ("GET", "/gallery"), ("POST", "/estimate")}, (
        "a new route has to be tried here too"
    )


@pytest.mark.parametrize("kind", list(PLACES))
def test_nothing_outside_is_read_or_written(comfy: ComfyClient, server: ComfyServer, kind: str) -> None:
    place = PLACES[kind]
    root = place.root(server)
    root.mkdir(parents=True, exist_ok=True)
    bait, own = root.parent / f"{BAIT}{place.suffix}", root / f"inside_own{place.suffix}"
    place.bait(bait)
    place.bait(own)
    status, said = _ask(comfy, place, own.name, False)
    if kind == "sample":  # its folder is the pack's own
        status, said = _ask(comfy, place, "cat", False)
        assert status == 200 and "thumbnail" in said
    else:
        assert place.shows in said, "a bait in the folder itself is seen"
        assert status == place.status
    names = _ways(bait)
    if kind == "folder":  # ComfyUI's input folder itself is one that may be chosen
        names = [name for name in names if name not in (".", "./")]
    try:
        (root / f"{LINK}{place.suffix}").symlink_to(bait, target_is_directory=bait.is_dir())
        if place.links:
            names += [f"{LINK}{place.suffix}", f"{LINK}{place.suffix}/", f"./{LINK}{place.suffix}"]
    except OSError:
        print("no right to make links here: they are not tried")
    before, base = _state(server.base_dir), str(server.base_dir)
    for name in names:
        for as_it_is in (False, True):
            status, said = _ask(comfy, place, name, as_it_is)
            # Parts that ComfyUI's own server tidies up may lead to another route, or to none.
            assert status in (400, 404, 405), (name, as_it_is, status, said)
            assert place.shows not in said and SECRET not in said and "thumbnail" not in said, (name, said)
            if "error" in said:
                assert set(json.loads(said)) == {"error"}
                assert base not in _without(said, name), (name, said)
    assert _state(server.base_dir) == before


def test_links_inside_a_folder_of_ours_are_not_followed(comfy: ComfyClient, server: ComfyServer) -> None:
    """A folder with the right name whose files are links to somewhere else."""
    outside = server.base_dir / BAIT
    outside.mkdir()
    (outside / "recipe.json").write_text(json.dumps({"prompt": SECRET}), "utf-8")
    _lay_picture(outside / "picture.png")
    folder, key = _runs(server) / "class_images" / "inside_recipe", "c" * 64
    validation = _runs(server) / f"inside_run_{key[:12]}" / "validation"
    folder.mkdir(parents=True)
    validation.mkdir(parents=True)
    lora = server.models_dir / "loras" / "inside_lora.safetensors"
    metadata = {"subjectbooth.run_key": key, "subjectbooth.step": "5"}
    lora.write_bytes(to_bytes({"lora_unet_x.alpha": torch.ones(())}, metadata))
    try:
        (folder / "recipe.json").symlink_to(outside / "recipe.json")
        (validation / "step_000004_00.png").symlink_to(outside / "picture.png")
    except OSError:
        pytest.skip("no right to make links here")
    status, said = _ask(comfy, PLACES["class_images"], folder.name, False)
    assert status == 200 and json.loads(said)["prompt"] == ""
    status, said = _ask(comfy, PLACES["lora"], lora.name, False)
    assert status == 200 and json.loads(said)["thumbnail"] == ""
    _lay_picture(validation / "step_000002_00.png")
    assert json.loads(_ask(comfy, PLACES["lora"], lora.name, False)[1])["thumbnail"]
