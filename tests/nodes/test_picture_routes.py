"""The routes behind the panels: photos as training sees them, what a LoRA says about itself, class images."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
from PIL import Image, ImageFilter

from subjectbooth.tests.comfy_server import ComfyClient, ComfyServer
from subjectbooth.tests.nodes.graphs import text_to_image
from subjectbooth.tests.nodes.training_graphs import apply_node, train_and_sample, upload_cat
from subjectbooth.trainer.files.safetensors_file import to_bytes
from subjectbooth.trainer.subject.crops import training_square
from subjectbooth.trainer.subject.photo import Photo

WORDS = {"class_word": "cat", "token": "ohwx", "prompt_template": "a photo of {token} {class}"}


def ask(comfy: ComfyClient, path: str, body: Any = None) -> tuple[int, Any]:
    """Status and parsed answer; every answer of these routes is JSON."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(comfy.url + path, data=data)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def test_a_body_that_comes_in_pieces_is_one_body(comfy: ComfyClient) -> None:
    body = json.dumps({"images": ["nothing there.png"] * 100, "resolution": 64}).encode()
    where = urllib.parse.urlsplit(comfy.url)
    connection = http.client.HTTPConnection(where.hostname or "", where.port, timeout=60)
    connection.putrequest("POST", "/subjectbooth/photos")
    connection.putheader("Content-Length", str(len(body)))
    connection.endheaders()
    for start in range(0, len(body), 1000):
        connection.send(body[start : start + 1000])
        time.sleep(0.1)
    answer = connection.getresponse()
    whole = ask(comfy, "/subjectbooth/photos", body)
    assert (answer.status, json.loads(answer.read())) == whole
    connection.close()


def server_of(comfy: ComfyClient) -> ComfyServer:
    assert comfy.server is not None
    return comfy.server


def upload(comfy: ComfyClient, name: str, picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return comfy.upload_image(file.getvalue(), name)


def as_jpeg(picture: Image.Image) -> np.ndarray:
    """A picture of an untrained model is noise, of which JPEG keeps little."""
    file = io.BytesIO()
    picture.convert("RGB").save(file, "JPEG", quality=88)
    return np.asarray(Image.open(file), dtype=np.float32)


def pixels_of(address: str) -> np.ndarray:
    head, content = address.split(",", 1)
    assert head == "data:image/jpeg;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(content))).convert("RGB"), dtype=np.float32)


@pytest.mark.parametrize("crop", ["center", "pad"])
def test_a_thumbnail_is_the_training_square(comfy: ComfyClient, crop: str) -> None:
    photo = Image.fromarray(skimage.data.chelsea())  # 451 x 300
    name = upload(comfy, "route_wide.png", photo)
    status, said = ask(comfy, "/subjectbooth/photos", {"images": [name], "crop": crop, "resolution": 128, **WORDS})
    assert status == 200, said
    (shown,) = said["photos"]
    assert (shown["name"], shown["width"], shown["height"]) == ("route_wide.png", 451, 300)
    wanted, _ = training_square(Photo(np.asarray(photo), None, "", ""), 128, crop)
    got = pixels_of(shown["thumbnail"])
    assert got.shape == (128, 128, 3)
    assert np.abs(got - wanted).mean() < 5  # of 255: JPEG
    other, _ = training_square(Photo(np.asarray(photo), None, "", ""), 128, "pad" if crop == "center" else "center")
    assert np.abs(got - other).mean() > 15


def test_warnings_lie_on_their_pictures(comfy: ComfyClient) -> None:
    cat, coffee = Image.fromarray(skimage.data.chelsea()), Image.fromarray(skimage.data.coffee())
    names = [
        upload(comfy, "route_cat.png", cat),
        upload(comfy, "route_copy.png", cat.resize((400, 266))),
        upload(comfy, "route_soft.png", coffee.filter(ImageFilter.GaussianBlur(8))),
        upload(comfy, "route_small.png", coffee.crop((0, 0, 90, 90))),
    ]
    broken = server_of(comfy).input_dir / "route_broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    said = ask(comfy, "/subjectbooth/photos", {"images": [*names, broken.name], "resolution": 256, **WORDS})[1]
    warnings = [" ".join(photo["warnings"]) for photo in said["photos"]]
    assert ["near-duplicates" in text for text in warnings] == [True, True, False, False, False]
    assert ["blurred" in text for text in warnings] == [False, False, True, False, False]
    assert ["smaller than" in text for text in warnings] == [False, False, False, True, False]
    assert [photo["kinds"] for photo in said["photos"]] == [["twice"], ["twice"], ["blurred"], ["small"], []]
    assert "damaged" in said["photos"][4]["error"] and "thumbnail" not in said["photos"][4]
    assert said["count"] == 5
    assert [photo.get("group") for photo in said["photos"]] == [1, 1, None, None, None]
    assert len({photo["warnings"][0] for photo in said["photos"][:2]}) == 1, "one sentence for both"


def test_captions_and_cut_masks_are_shown_with_their_photos(comfy: ComfyClient) -> None:
    cat = Image.fromarray(skimage.data.chelsea()).convert("RGBA")
    alpha = Image.new("L", cat.size)
    alpha.paste(255, (0, 40, 60, 200))  # left of the middle square
    cat.putalpha(alpha)
    names = [upload(comfy, "route_left.png", cat), upload(comfy, "route_said.png", cat.convert("RGB"))]
    folder = server_of(comfy).input_dir
    (folder / "route_said.txt").write_bytes("ФОТО {token} НА ТРАВЕ".encode("cp1251"))
    (folder / "route_left.txt").write_bytes("zdjęcie {token}".encode("cp1250"))
    body = {"images": names, "resolution": 64, **WORDS, "captions": "caption files"}
    left, captioned = ask(comfy, "/subjectbooth/photos", body)[1]["photos"]
    assert captioned["caption"] == "ФОТО ohwx НА ТРАВЕ" and "error" not in captioned
    assert "cannot be detected" in left["error"] and "caption" not in left
    assert left["kinds"] == ["white", "cut"] and "is outside the crop 'center'" in left["warnings"][1]
    said = ask(comfy, "/subjectbooth/photos", {**body, "captions": "template"})[1]
    assert any("ignored because captions" in text for text in said["warnings"])
    assert "caption" not in said["photos"][1]


def test_a_crop_and_a_caption_are_shown_on_their_photo(comfy: ComfyClient) -> None:
    photo = Image.fromarray(skimage.data.chelsea())  # 451 x 300
    names = [upload(comfy, "route_framed.png", photo), upload(comfy, "route_free.png", photo)]
    edits = {names[0]: {"crop": [0.25, 0.5, 0.5], "caption": "{subject} asleep"}, "gone.png": {"caption": "x"}}
    body = {"images": names, "resolution": 128, **WORDS, "photo_edits": json.dumps(edits), "whole": names[1]}
    status, said = ask(comfy, "/subjectbooth/photos", body)
    assert status == 200, said
    framed, free = said["photos"]
    assert (framed["key"], framed["caption"]) == (names[0], "ohwx cat asleep") and "caption" not in free
    # Centre (112.75, 150), side 150: from 38 and 75.
    wanted = np.asarray(photo.crop((38, 75, 188, 225)).resize((128, 128), Image.Resampling.LANCZOS))
    assert np.abs(pixels_of(framed["thumbnail"]) - wanted).mean() < 5
    assert (framed["width"], framed["height"], free["width"]) == (150, 150, 451)
    assert pixels_of(free["whole"]).shape == (300, 451, 3) and "whole" not in framed
    assert any("gone.png is not among the photos" in text for text in said["warnings"])
    # A painted mask is shown in blue; a lost one does not keep the photo from being edited.
    cut = photo.convert("RGBA")
    cut.paste((0, 0, 0, 0), (0, 0, 200, 300))
    for name, change in ((upload(comfy, "route_mask.png", cut), 0.5), ("lost.png", 0.0)):
        masked = {**body, "photo_edits": json.dumps({names[1]: {"mask": name}})}
        entry = ask(comfy, "/subjectbooth/photos", masked)[1]["photos"][1]
        assert ("error" in entry) == (change == 0) and entry["transparent"] is False
        blue = pixels_of(entry["whole"]).astype(float) - pixels_of(free["whole"])
        wanted = change * (255 - pixels_of(free["whole"])[:, :190, 2].astype(float))
        assert np.abs(blue[:, :190, 2] - wanted).mean() < 3 and np.abs(blue[:, 210:]).mean() < 3
    for wrong in ("{", '{"a": {"crop": [2, 0, 1]}}', "[1]"):
        status, said = ask(comfy, "/subjectbooth/photos", {**body, "photo_edits": wrong})
        assert status == 400 and "photo_edits" in said["error"]


def test_a_changed_file_is_looked_at_again(comfy: ComfyClient) -> None:
    body = {"images": [upload(comfy, "route_changed.png", Image.new("RGB", (64, 64), "red"))], "resolution": 64}
    first = pixels_of(ask(comfy, "/subjectbooth/photos", body)[1]["photos"][0]["thumbnail"]).mean((0, 1))
    upload(comfy, "route_changed.png", Image.new("RGB", (64, 64), "blue"))
    second = pixels_of(ask(comfy, "/subjectbooth/photos", body)[1]["photos"][0]["thumbnail"]).mean((0, 1))
    assert first[0] > 200 > 50 > first[2] and second[2] > 200 > 50 > second[0]


def test_words_make_a_sentence_or_say_what_is_missing(comfy: ComfyClient) -> None:
    said = ask(comfy, "/subjectbooth/photos", {"images": [], **WORDS, "class_word": "owl"})[1]
    assert (said["sentence"], said["class_sentence"]) == ("a photo of ohwx owl", "a photo of an owl")
    assert said["problem"] == "" and said["photos"] == []
    said = ask(comfy, "/subjectbooth/photos", {"images": [], **WORDS, "class_word": " "})[1]
    assert said["sentence"] == "" and "class_word is empty" in said["problem"]
    said = ask(comfy, "/subjectbooth/photos", {"images": [], **WORDS, "token": "sks"})[1]
    assert any("rifle" in text for text in said["warnings"])


def test_a_sample_brings_its_photos_and_its_word(comfy: ComfyClient) -> None:
    said = ask(comfy, "/subjectbooth/photos", {"sample": "dog", "resolution": 64, **WORDS, "class_word": ""})[1]
    assert len(said["photos"]) == 4 and said["class_sentence"] == "a photo of a dog"


@pytest.mark.parametrize(
    "name",
    [
        "../secret.png",
        "/etc/hostname",
        "..%2fsecret.png",
        "%2e%2e/secret.png",
        "a/../../secret.png",
        "..\\secret.png",
        "C:\\secret.png",
        "link.png",
        "nul\u0000.png",
        "x" * 5000,
        "secret.png [output]/../..",
        5,
        {"a": 1},
        [["a"]],
    ],
)
def test_no_name_leads_out_of_the_input_folder(comfy: ComfyClient, name: Any) -> None:
    server = server_of(comfy)
    secret = server.input_dir.parent / "secret.png"
    Image.new("RGB", (64, 64), (12, 200, 77)).save(secret)
    link = server.input_dir / "link.png"
    if not link.is_symlink():
        link.symlink_to(secret)
    for body in ({"images": [name]}, {"folder": name if isinstance(name, str) else "..", "images": ""}):
        status, said = ask(comfy, "/subjectbooth/photos", {**body, "resolution": 64})
        assert status == 400 and set(said) == {"error"}, said
        assert "thumbnail" not in json.dumps(said) and str(server.input_dir) not in json.dumps(said)


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"[" * 100_000, b'{"images": "' + b"x" * 70_000 + b'"}'])
def test_a_body_that_is_none_is_a_sentence(comfy: ComfyClient, body: bytes) -> None:
    status, said = ask(comfy, "/subjectbooth/photos", body)
    assert (status == 200 and said["photos"] == []) if body == b"" else (status in (400, 413) and said["error"])


@pytest.mark.parametrize(
    "changes",
    [{"resolution": 65}, {"resolution": "512"}, {"resolution": 10**9}, {"crop": "round"}, {"sample": "../dog"}],
)
def test_settings_that_the_node_would_refuse(comfy: ComfyClient, changes: dict[str, Any]) -> None:
    status, said = ask(comfy, "/subjectbooth/photos", {"images": "", **changes})
    assert status == 400 and list(changes)[0] in said["error"]


def test_a_new_lora_is_there_without_a_restart(comfy: ComfyClient) -> None:
    """In the list, over the API, and with its words and the picture that was drawn with it."""
    graph = train_and_sample(
        upload_cat(comfy),
        output_name="routes/fresh",
        seed=91,
        steps=4,
        learning_rate=0.0023,
        validation_prompts="a photo of {subject}",
        validation_interval=2,
    )
    comfy.run(graph)
    name = "routes/fresh.safetensors" if os.sep == "/" else "routes\\fresh.safetensors"
    listed = comfy.request("GET", "/object_info/ApplySubjectLoRA")["ApplySubjectLoRA"]["input"]["required"]["lora_name"]
    assert name in listed[1]["options"]
    later = text_to_image(model=["12", 0], clip=["12", 1], positive=["12", 2], seed=92)
    later["12"] = apply_node(lora_name=name)
    del later["12"]["inputs"]["subject_lora"]
    assert comfy.run(later).outputs["7"]["images"]
    said = ask(comfy, "/subjectbooth/lora?" + urllib.parse.urlencode({"name": name}))[1]
    assert said["ours"] is True and said["trigger"] == "ohwx cat" and said["step"] == "4" and said["rank"] == "4"
    folders = list((server_of(comfy).output_dir / "subjectbooth").glob("ohwx_cat_*/validation/step_000004_00.png"))
    assert any(np.abs(pixels_of(said["thumbnail"]) - as_jpeg(Image.open(path))).mean() < 1 for path in folders)


def test_a_strangers_lora_says_so_and_shows_the_picture_beside_it(comfy: ComfyClient) -> None:
    import torch

    folder = server_of(comfy).models_dir / "loras"
    (folder / "stranger.safetensors").write_bytes(to_bytes({"lora_unet_x.alpha": torch.ones(())}, {}))
    said = ask(comfy, "/subjectbooth/lora?name=stranger.safetensors")[1]
    assert (said["ours"], said["trigger"], said["thumbnail"]) == (False, "", "")
    Image.new("RGB", (300, 200), (200, 30, 30)).save(folder / "stranger.png")
    shown = pixels_of(ask(comfy, "/subjectbooth/lora?name=stranger.safetensors")[1]["thumbnail"])
    assert shown.shape == (128, 192, 3) and shown.mean((0, 1))[0] > 150


@pytest.mark.parametrize(
    "name", ["", "missing.safetensors", "../checkpoints/tiny15.safetensors", "/etc/passwd", "..%2f..%2fx", "a\u0000"]
)
def test_only_names_of_the_list_are_loras(comfy: ComfyClient, name: str) -> None:
    status, said = ask(comfy, "/subjectbooth/lora?" + urllib.parse.urlencode({"name": name}))
    assert status == 404 and set(said) == {"error"}


@pytest.mark.parametrize("name", ["", "..", ".", "/etc", "../../input", "a/../..", "..%5c..", "none", "a/b", "x" * 400])
def test_only_folders_of_class_images_are_listed(comfy: ComfyClient, name: str) -> None:
    status, said = ask(comfy, "/subjectbooth/class_images?" + urllib.parse.urlencode({"folder": name}))
    assert status in (400, 404) and set(said) == {"error"}


def test_a_link_to_another_folder_is_no_folder_of_class_images(comfy: ComfyClient) -> None:
    server = server_of(comfy)
    root = server.output_dir / "subjectbooth" / "class_images"
    root.mkdir(parents=True, exist_ok=True)
    elsewhere = server.output_dir.parent / "elsewhere"
    elsewhere.mkdir(exist_ok=True)
    (elsewhere / f"{'a' * 32}_{'b' * 8}.png").write_bytes(b"")
    link = root / "linked"
    if not link.is_symlink():
        link.symlink_to(elsewhere)
    assert ask(comfy, "/subjectbooth/class_images?folder=linked")[0] == 400


def test_other_methods_are_answered_in_json(comfy: ComfyClient) -> None:
    assert ask(comfy, "/subjectbooth/photos")[0] == 405
    assert ask(comfy, "/subjectbooth/lora", b"{}")[0] == 405
    assert Path(server_of(comfy).input_dir).is_dir()
