"""LoadSubjectImages in a real ComfyUI: every source gives the right pixels, every bad file its sentence."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from skimage import data

from subjectbooth.tests.comfy_server import ComfyClient, NodeFailed, PromptRejected
from subjectbooth.tests.conftest import ROOT
from subjectbooth.tests.nodes.fuzz_values import is_refused_as, refusals_of
from subjectbooth.tests.nodes.graphs import Graph, node
from subjectbooth.trainer.subject.photo import Photo
from subjectbooth.trainer.subject.photos import list_photos, read_photo
from subjectbooth.trainer.subject.subject import make_subject

CAT = data.chelsea()[:, :, :3]  # 300 x 451
COFFEE = data.coffee()[:, :, :3]
ROCKET = data.rocket()[:, :, :3]
SIDE = 128


def png(pixels: np.ndarray, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", **options)
    return buffer.getvalue()


def subject_graph(**inputs: Any) -> Graph:
    """LoadSubjectImages "1", and probes of its IMAGE "2" and its STRING "3"."""
    given = {
        "images": {"__value__": []},
        "folder": "",
        "sample": "none",
        "class_word": "cat",
        "token": "ohwx",
        "prompt_template": "a photo of {token} {class}",
        "captions": "template",
        "resolution": SIDE,
        "crop": "center",
        **inputs,
    }
    return {
        "1": node("LoadSubjectImages", **given),
        "2": node("ProbeImage", value=["1", 1]),
        "3": node("ProbeValue", value=["1", 2]),
    }


def square(pixels: np.ndarray, side: int = SIDE) -> np.ndarray:
    """The middle square scaled with Lanczos, uint8 [side, side, 3]."""
    height, width = pixels.shape[:2]
    edge = min(height, width)
    top, left = (height - edge) // 2, (width - edge) // 2
    cut = Image.fromarray(np.ascontiguousarray(pixels[top : top + edge, left : left + edge]))
    return np.array(cut.resize((side, side), Image.Resampling.LANCZOS))


def hash_of(*squares: np.ndarray) -> str:
    """What ProbeImage says of an IMAGE batch of these."""
    values = np.stack(squares).astype(np.float32) / np.float32(255)
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()


def shown(comfy: ComfyClient, records: list[dict[str, str]]) -> list[np.ndarray]:
    return [np.asarray(Image.open(io.BytesIO(comfy.view(**record)))) for record in records]


def refusal(comfy: ComfyClient, graph: Graph) -> str:
    """The sentence with which the graph is refused, before it runs or by the node."""
    try:
        comfy.run(graph)
    except PromptRejected as error:
        reports = [e["details"] for n in error.node_errors.values() for e in n["errors"]]
        return str(reports[0].split(" - ", 1)[1])
    except NodeFailed as error:
        assert error.node_type == "LoadSubjectImages"
        return error.node_message
    pytest.fail("it ran")


def test_schema(comfy: ComfyClient) -> None:
    info = comfy.object_info("LoadSubjectImages")
    assert info["output"] == ["SUBJECT", "IMAGE", "STRING", "STRING"] and info["output_node"]
    assert next(iter(info["input"]["required"])) == "images"
    upload = info["input"]["required"]["images"][1]
    assert upload["image_upload"] is True and upload["allow_batch"] is True and upload["options"][0] == ""
    assert info["input_order"]["optional"] == ["image", "mask", "photo_edits"]
    every = {**info["input"]["required"], **info["input"]["optional"]}
    assert all(options[1]["tooltip"] for options in every.values()) and all(info["output_tooltips"])


def test_uploads(comfy: ComfyClient) -> None:
    """Several files; one of them a JPEG that a camera held upright, one a cut-out."""
    exif = Image.Exif()
    exif[0x0112] = 6
    jpeg = io.BytesIO()
    Image.fromarray(np.rot90(COFFEE)).save(jpeg, "JPEG", quality=95, exif=exif)
    upright = np.rot90(np.array(Image.open(io.BytesIO(jpeg.getvalue()))), -1)
    alpha = np.zeros(ROCKET.shape[:2], np.uint8)
    alpha[100:300, 200:400] = 255
    names = [
        comfy.upload_image(png(CAT), "up cat.png"),
        comfy.upload_image(jpeg.getvalue(), "up_coffee.jpg"),
        comfy.upload_image(png(np.dstack([ROCKET, alpha])), "ракета 🚀.png", subfolder="up"),
    ]
    graph = subject_graph(images={"__value__": names})
    result = comfy.run(graph)
    white = np.where(alpha[..., None] > 0, ROCKET, 255).astype(np.uint8)
    expected = [square(CAT), square(upright), square(white)]
    assert np.abs(expected[1].astype(int) - square(COFFEE)).mean() < 4  # the right way up
    assert result.outputs["2"]["report"][0]["sha256"] == hash_of(*expected)
    for picture, wanted in zip(shown(comfy, result.images("1")), expected, strict=True):
        assert np.array_equal(picture, wanted)
    assert result.outputs["3"]["report"][0] == {"type": "str", "value": "a photo of ohwx cat"}
    (warning,) = result.outputs["1"]["warnings"]
    assert warning.startswith("The transparent part of ")
    assert result.outputs["1"]["text"][:1] == ['3 photos at 128 px, "a photo of ohwx cat"']


def test_its_pictures_come_back_when_it_is_cached(comfy: ComfyClient) -> None:
    name = comfy.upload_image(png(CAT), "cached.png")
    graph = subject_graph(images=name, token="hta")
    first, second = comfy.run(graph), comfy.run(graph)
    assert "1" in second.cached and second.outputs["1"] == first.outputs["1"]
    assert shown(comfy, second.images("1"))[0].shape == (SIDE, SIDE, 3)


def test_a_folder_in_natural_order(comfy: ComfyClient) -> None:
    for name, pixels in (("p10.png", ROCKET), ("p2.png", COFFEE), ("P1.PNG", CAT)):
        comfy.upload_image(png(pixels), name, subfolder="my photos/set 1")
    result = comfy.run(subject_graph(folder="my photos/set 1"))
    assert result.outputs["2"]["report"][0]["sha256"] == hash_of(square(CAT), square(COFFEE), square(ROCKET))
    assert "my photos/set 1" in comfy.object_info("LoadSubjectImages")["input"]["required"]["folder"][1]["options"]
    windows = comfy.run(subject_graph(folder="my photos\\set 1"))
    assert windows.outputs["2"] == result.outputs["2"]


def test_a_changed_file_is_read_again_and_an_unchanged_one_is_not(comfy: ComfyClient) -> None:
    name = comfy.upload_image(png(CAT), "edited.png")
    graph = subject_graph(images={"__value__": [name]})
    before = comfy.run(graph)
    assert "1" in comfy.run(graph).cached
    changed = CAT.copy()
    changed[100:200, 200:300] = 0
    comfy.upload_image(png(changed), "edited.png")
    after = comfy.run(graph)
    assert "1" not in after.cached
    assert after.outputs["2"]["report"][0]["sha256"] == hash_of(square(changed))
    assert before.outputs["2"]["report"][0]["sha256"] == hash_of(square(CAT))
    comfy.upload_image(png(CAT), "edited.png")  # the old bytes and a new date
    os.utime(comfy.server.input_dir / name, (1, 1))
    comfy.run(graph)
    os.utime(comfy.server.input_dir / name)
    assert "1" in comfy.run(graph).cached


def test_captions_from_files(comfy: ComfyClient) -> None:
    folder = comfy.server.input_dir / "captioned"
    folder.mkdir(exist_ok=True)
    (folder / "a.png").write_bytes(png(CAT))
    (folder / "b.png").write_bytes(png(COFFEE))
    (folder / "a.txt").write_text("фото {token} кота", encoding="cp1251")
    graph = subject_graph(folder="captioned", captions="caption files")
    assert refusal(comfy, graph).startswith("Caption file b.txt not found. Required: one .txt file next to each photo")
    (folder / "b.txt").write_text("just a cat", encoding="utf-16")
    graph = subject_graph(folder="captioned", captions="caption files", class_word="кот")
    graph["4"] = node("ProbeSubject", subject=["1", 0])
    result = comfy.run(graph)
    assert result.outputs["4"]["report"][0]["captions"] == ["фото ohwx кота", "just a cat"]
    assert result.outputs["1"]["text"][0] == "2 photos at 128 px, own captions"
    assert result.outputs["1"]["text"][-2:] == ["a.png: фото ohwx кота", "b.png: just a cat"], "which one each got"
    (warning,) = [w for w in result.outputs["1"]["warnings"] if "captions" in w]
    assert "(first: b.png)" in warning
    (folder / "b.txt").write_text("ohwx on a table", encoding="utf-8")
    again = comfy.run(graph)
    assert again.outputs["4"]["report"][0]["captions"] == ["фото ohwx кота", "ohwx on a table"]
    graph["1"]["inputs"] |= {"captions": "template", "prompt_template": "a photo of {token} {class} (toy)"}
    template = comfy.run(graph)
    assert template.outputs["4"]["report"][0]["captions"] == ["a photo of ohwx кот (toy)"] * 2
    assert (
        'The caption files a.txt and b.txt are ignored because captions is "template".'
        in template.outputs["1"]["warnings"]
    )
    # As a prompt it means the same text, round brackets included.
    assert template.outputs["3"]["report"][0]["value"] == r"a photo of ohwx кот \(toy\)"


def test_single_photos_are_cropped_and_captioned(comfy: ComfyClient) -> None:
    """Uploads by their names in the widget, connected photos by their numbers; what is trained is the square."""
    names = [comfy.upload_image(png(CAT), "framed a.png"), comfy.upload_image(png(COFFEE), "framed b.png")]
    edits = {names[1]: {"crop": [0.25, 0.5, 0.5], "caption": "{subject} in a cup"}}
    graph = subject_graph(images={"__value__": names}, photo_edits=json.dumps(edits))
    graph["4"] = node("ProbeSubject", subject=["1", 0])
    result = comfy.run(graph)
    cut = np.ascontiguousarray(COFFEE[100:300, 50:250])  # centre (150, 200), side 200
    assert result.outputs["2"]["report"][0]["sha256"] == hash_of(square(CAT), square(cut))
    assert sorted(result.outputs["4"]["report"][0]["captions"]) == ["a photo of ohwx cat", "ohwx cat in a cup"]
    graph = subject_graph(image=["10", 0], photo_edits=json.dumps({"image 1": edits[names[1]]}))
    graph["10"] = node("LoadImage", image=names[1])
    assert comfy.run(graph).outputs["2"]["report"][0]["sha256"] == hash_of(square(cut))
    # A workflow from before this input has the upload button's value in its place.
    graph = subject_graph(images={"__value__": names}, photo_edits="image")
    assert comfy.run(graph).outputs["2"]["report"][0]["sha256"] == hash_of(square(CAT), square(COFFEE))
    told = refusal(
        comfy, subject_graph(images={"__value__": names}, photo_edits='{"framed a.png": {"crop": [0, 0, 2]}}')
    )
    assert "the crop of 'framed a.png' is [0, 0, 2]" in told


def test_a_painted_mask_is_that_of_its_photo(comfy: ComfyClient) -> None:
    """From the file that ComfyUI's mask editor leaves in input/clipspace."""
    assert comfy.server is not None
    name = comfy.upload_image(png(ROCKET), "painted.png")
    alpha = np.full(ROCKET.shape[:2], 255, np.uint8)
    alpha[40:200, 400:600] = 0
    folder = comfy.server.input_dir / "clipspace"
    folder.mkdir(exist_ok=True)
    (folder / "subject mask.png").write_bytes(png(np.dstack([ROCKET, alpha])))
    edits = json.dumps({name: {"mask": "clipspace/subject mask.png [input]"}})
    graph = subject_graph(images={"__value__": [name]}, crop="subject", class_word="rocket", photo_edits=edits)
    graph["4"] = node("ProbeSubject", subject=["1", 0])
    mask = 1 - (alpha / 255).astype(np.float32)
    wanted = make_subject(
        [Photo(ROCKET, mask, "", "x")], class_word="rocket", resolution=SIDE, crop="subject"
    ).prepare()
    assert comfy.run(graph).outputs["4"]["report"][0]["digest"] == wanted.digest
    alpha[40:200, 300:600] = 0
    (folder / "subject mask.png").write_bytes(png(np.dstack([ROCKET, alpha])))
    assert comfy.run(graph).outputs["4"]["report"][0]["digest"] != wanted.digest, "painted again: read again"
    for gone in ("clipspace/gone.png [input]", "../outside.png"):
        told = refusal(
            comfy, subject_graph(images={"__value__": [name]}, photo_edits=json.dumps({name: {"mask": gone}}))
        )
        assert "photo_edits" in told or "not found" in told


def test_wired_image_and_mask(comfy: ComfyClient) -> None:
    """LoadImage's mask marks what is transparent, so a cut-out's is inverted; the crop follows it."""
    alpha = np.zeros(ROCKET.shape[:2], np.uint8)
    alpha[40:200, 400:600] = 255
    name = comfy.upload_image(png(np.dstack([ROCKET, alpha])), "wired.png")
    graph = subject_graph(image=["10", 0], mask=["11", 0], crop="subject", class_word="rocket")
    graph["10"] = node("LoadImage", image=name)
    graph["11"] = node("InvertMask", mask=["10", 1])
    graph["4"] = node("ProbeSubject", subject=["1", 0])
    result = comfy.run(graph)
    mask = (alpha / 255).astype(np.float32)
    prepared = make_subject(
        [Photo(ROCKET, mask, "", "x")], class_word="rocket", resolution=SIDE, crop="subject"
    ).prepare()
    assert result.outputs["4"]["report"][0]["digest"] == prepared.digest
    expected = square(ROCKET[0:240, 380:620])  # 200 wide, a tenth more on each side, around (500, 120)
    assert np.array_equal(shown(comfy, result.images("1"))[0], expected)
    # A photo without transparency has an empty mask, which is no mask at all.
    graph["10"] = node("LoadImage", image=comfy.upload_image(png(CAT), "wired_cat.png"))
    graph["1"]["inputs"] |= {"mask": ["10", 1], "class_word": "cat"}
    result = comfy.run(graph)
    assert result.outputs["2"]["report"][0]["sha256"] == hash_of(square(CAT))
    assert "The mask of image 1 is empty and ignored." in result.outputs["1"]["warnings"]


def test_an_upload_and_the_same_picture_wired_are_one_subject(comfy: ComfyClient) -> None:
    name = comfy.upload_image(png(CAT), "same.png")
    digests = []
    for inputs in ({"images": name}, {"image": ["10", 0]}):
        graph = subject_graph(**inputs)
        graph["10"] = node("LoadImage", image=name)
        graph["4"] = node("ProbeSubject", subject=["1", 0])
        digests.append(comfy.run(graph).outputs["4"]["report"][0]["digest"])
    assert digests[0] == digests[1]


def test_a_list_of_pictures_of_several_sizes_is_one_subject(comfy: ComfyClient) -> None:
    for name, pixels in (("a.png", CAT), ("b.png", COFFEE), ("c.png", ROCKET)):
        comfy.upload_image(png(pixels), name, subfolder="listed")
    graph = subject_graph(image=["10", 0])
    graph["10"] = node("LoadImageDataSetFromFolder", folder="listed")
    result = comfy.run(graph)
    assert result.outputs["2"]["report"][0]["shape"] == [3, SIDE, SIDE, 3]
    assert len(result.images("1")) == 3


def test_every_sample(comfy: ComfyClient) -> None:
    names = comfy.object_info("LoadSubjectImages")["input"]["required"]["sample"][1]["options"]
    assert names[0] == "none"
    folders = sorted(p.name for p in (ROOT / "demo" / "subjects").glob("*") if (p / "train").is_dir())
    assert names[1:] == folders
    if not folders:
        pytest.skip("no sample subject in the pack yet")
    for name in folders:
        about = json.loads((ROOT / "demo" / "subjects" / name / "subject.json").read_text("utf-8"))
        result = comfy.run(subject_graph(sample=name, class_word="", resolution=64))
        assert result.outputs["3"]["report"][0]["value"] == f"a photo of ohwx {about['class_word']}"
        photos = [read_photo(p) for p in list_photos(ROOT / "demo" / "subjects" / name / "train")]
        expected = hash_of(*[square(photo.pixels, 64) for photo in photos])
        assert result.outputs["2"]["report"][0]["sha256"] == expected
    own = comfy.run(subject_graph(sample=folders[0], class_word="toy", resolution=64))
    assert own.outputs["3"]["report"][0]["value"] == "a photo of ohwx toy"


def test_warnings_are_shown(comfy: ComfyClient) -> None:
    names = [comfy.upload_image(png(CAT), "twin1.png"), comfy.upload_image(png(CAT[1:]), "twin2.png")]
    result = comfy.run(subject_graph(images={"__value__": names}, token="sks", resolution=512))
    warnings = result.outputs["1"]["warnings"]
    starts = [
        "Only 2 photos",
        "twin1.png (451x300) and twin2.png (451x299) are smaller than the training size 512",
        "twin1.png and twin2.png are near-duplicates",
        'The token "sks" already means a rifle',
    ]
    assert [w for w, s in zip(warnings, starts, strict=True) if not w.startswith(s)] == []
    text = "\n".join(e.data["text"] for e in result.of_type("progress_text"))
    assert all(warning in text for warning in warnings)
    two = comfy.run(subject_graph(images={"__value__": names}, token="zwx")).outputs["1"]["warnings"]
    assert any('The token "zwx" is split into 2 CLIP tokens' in warning for warning in two)
    word = comfy.run(subject_graph(images={"__value__": names}, token="red")).outputs["1"]["warnings"]
    assert any("CLIP already knows" in warning for warning in word)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({}, "No photos were given. Required: exactly one of images, folder, sample and image"),
        ({"images": {"__value__": ["ok.png"]}, "folder": "refused"}, "Photos come from 2 sources: images and folder"),
        ({"images": "ok.png", "image": ["10", 0]}, "Photos come from 2 sources: images and image"),
        ({"images": "gone.png"}, "'gone.png' was not found in ComfyUI's input folder"),
        ({"images": {"__value__": [1, 2]}}, "images [1, 2]. Required: a list of file names"),
        ({"images": {"__value__": {"a": 1}}}, "images {'a': 1}. Required: a list of file names"),
        ({"images": "../outside.png"}, "images '../outside.png' leads out of ComfyUI's input folder"),
        ({"images": "../outside.png [output]"}, "images '../outside.png' leads out of ComfyUI's output folder"),
        ({"images": "link.png"}, "images 'link.png' leads out of ComfyUI's input folder"),
        ({"folder": ".."}, "folder '..' leads out of ComfyUI's input folder"),
        ({"folder": "refused/../.."}, "folder 'refused/../..' leads out of ComfyUI's input folder"),
        ({"folder": "refused\\..\\.."}, "folder 'refused\\\\..\\\\..' leads out of ComfyUI's input folder"),
        ({"folder": "/etc"}, "folder '/etc' leads out of ComfyUI's input folder"),
        ({"folder": "C:\\Windows"}, "folder 'C:\\\\Windows' leads out of ComfyUI's input folder"),
        ({"folder": "\\\\server\\share"}, "folder '\\\\\\\\server\\\\share' leads out"),
        ({"folder": "link"}, "folder 'link' leads out of ComfyUI's input folder"),
        ({"folder": "with_link"}, "folder 'with_link/x.png' leads out of ComfyUI's input folder"),
        ({"folder": "%2e%2e/"}, "The folder '%2e%2e' cannot be read"),
        ({"folder": "a\x00b"}, "folder 'a\\x00b' is not a valid name"),
        ({"folder": "n" * 5000}, "cannot be read (File name too long)"),
        ({"folder": "empty"}, "No images found in the folder 'empty'"),
        ({"folder": "for kohya"}, 'Choose the folder for kohya/10_ohwx dog (token "ohwx", class word "dog")'),
        ({"sample": "../../etc"}, "sample '../../etc'. Required: one of"),
        ({"images": "ok.png", "class_word": " "}, "class_word is empty"),
        ({"images": "ok.png", "class_word": "(dog:1.5)"}, "class_word '(dog:1.5)' contains '('"),
        ({"images": "ok.png", "token": ""}, "token is empty"),
        ({"images": "ok.png", "prompt_template": "a photo"}, "prompt_template 'a photo' does not contain the token"),
        ({"images": "ok.png", "captions": "x"}, "captions 'x'. Required: \"template\" or"),
        ({"images": "ok.png", "crop": "x"}, "crop 'x'. Required: one of center, pad, subject"),
        ({"images": "ok.png", "resolution": 500}, "resolution 500. Required: a multiple of 8"),
        ({"images": "ok.png", "mask": ["10", 1]}, "A MASK is connected without an IMAGE"),
        (
            {"image": ["10", 0], "captions": "caption files"},
            "captions are set to caption files, but a connected IMAGE has no file names",
        ),
        ({"image": ["10", 0], "mask": ["11", 0]}, "The mask of image 1 is 64x64, but the photo is 451x300"),
    ],
)
def test_what_cannot_be_used_says_why(comfy: ComfyClient, inputs: dict[str, Any], says: str) -> None:
    refused_files(comfy.server.input_dir)
    graph = subject_graph(**inputs)
    graph["10"] = node("LoadImage", image="ok.png")
    graph["11"] = node("SolidMask", value=0.5, width=64, height=64)
    with pytest.raises((NodeFailed, PromptRejected)) as caught:
        comfy.run(graph, targets=["1"])
    assert is_refused_as(caught.value, says), caught.value
    for message in refusals_of(caught.value):
        assert_is_a_sentence(message, comfy)


def refused_files(base: Path) -> None:
    (base / "ok.png").write_bytes(png(CAT))
    for name in ("refused", "empty", "with_link"):
        (base / name).mkdir(exist_ok=True)
    (base / "refused" / "ok.png").write_bytes(png(CAT))
    (base / "for kohya" / "10_ohwx dog").mkdir(parents=True, exist_ok=True)
    (base / "for kohya" / "10_ohwx dog" / "a.png").write_bytes(png(CAT))
    outside = base.parent / "outside"
    outside.mkdir(exist_ok=True)
    for path in (outside / "x.png", base.parent / "outside.png"):
        path.write_bytes(png(CAT))
    for link, target in (
        (base / "link.png", base.parent / "outside.png"),
        (base / "link", outside),
        (base / "with_link" / "x.png", outside / "x.png"),
    ):
        if not link.is_symlink():
            link.symlink_to(target)


def assert_is_a_sentence(message: str, comfy: ComfyClient) -> None:
    assert "Traceback" not in message and 'File "' not in message and "\n" not in message.strip()
    assert re.search(r"\. Required: .+\. [A-Z].+\.", message), message
    assert str(comfy.server.input_dir) not in message and len(message) < 500
    assert comfy.request("GET", "/queue") == {"queue_running": [], "queue_pending": []}


def corrupt(content: bytes) -> bytes:
    return content[: len(content) // 2]


def torn_jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(CAT).save(buffer, "JPEG")
    return corrupt(buffer.getvalue()) + b"\xff\xd9"


BAD_FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "zero.jpg": (lambda: b"", "zero.jpg is empty (0 bytes)"),
    "text.png": (lambda: b"no picture", "text.png is not an image"),
    "cut.png": (lambda: corrupt(png(CAT)), "cut.png is damaged or truncated"),
    "torn.jpg": (torn_jpeg, "torn.jpg is damaged or truncated (the lower "),
    "one.png": (lambda: png(np.zeros((1, 1, 3), np.uint8)), "one.png is 1x1 pixels"),
    "ribbon.png": (lambda: png(np.zeros((50, 20000, 3), np.uint8)), "ribbon.png is 20000x50 pixels"),
    "clear.png": (lambda: png(np.zeros((64, 64, 4), np.uint8)), "clear.png is fully transparent"),
    "phone.heic": (lambda: b"\0\0\0\x18ftypheic" + bytes(99), "phone.heic is a HEIC image"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_each_bad_file_gives_its_sentence(comfy: ComfyClient, name: str) -> None:
    make, says = BAD_FILES[name]
    good = comfy.upload_image(png(COFFEE), "good.png")
    bad = comfy.upload_image(make(), name)
    message = refusal(comfy, subject_graph(images={"__value__": [good, bad]}))
    assert message.startswith(says), message
    assert_is_a_sentence(message, comfy)


def test_an_animation_gives_its_first_frame(comfy: ComfyClient) -> None:
    buffer = io.BytesIO()
    frames = [Image.fromarray(np.full((64, 64, 3), value, np.uint8)) for value in (200, 100, 0)]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    result = comfy.run(subject_graph(images=comfy.upload_image(buffer.getvalue(), "moves.gif")))
    assert (shown(comfy, result.images("1"))[0] == 200).all()
    assert "moves.gif has 3 frames: only the first is used." in result.outputs["1"]["warnings"]


def test_linked_words_are_checked_when_they_are_known(comfy: ComfyClient) -> None:
    """A linked input reaches the checks before the run as None; it must not be refused there."""
    graph = subject_graph(images=comfy.upload_image(png(CAT), "linked.png"), class_word=["10", 0])
    graph["10"] = node("PrimitiveString", value="owl")
    assert comfy.run(graph).outputs["3"]["report"][0]["value"] == "a photo of ohwx owl"
    graph["10"] = node("PrimitiveString", value="")
    assert refusal(comfy, graph).startswith("class_word is empty")
