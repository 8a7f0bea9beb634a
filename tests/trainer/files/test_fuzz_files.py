"""Files of strangers and files that were damaged: the right content, or one sentence, and nothing else."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from subjectbooth.tests.fuzzing import cases, corrupt_safetensors, files_below, is_clean, report, seeded_random
from subjectbooth.trainer.errors import SubjectBoothError
from subjectbooth.trainer.events import StepDone, Validation
from subjectbooth.trainer.files.safetensors_file import to_bytes
from subjectbooth.trainer.learn import checkpoint
from subjectbooth.trainer.learn.checkpoint import Checkpoint
from subjectbooth.trainer.preserve.priors import PriorRecipe, PriorStore
from subjectbooth.trainer.runs.diffusers_names import ADAPTER_METADATA
from subjectbooth.trainer.runs.folder import RunFolder
from subjectbooth.trainer.runs.lora_reader import read_lora, trigger_words
from subjectbooth.trainer.runs.publish import checked_name, publish
from subjectbooth.trainer.runs.writer import FolderWriter
from subjectbooth.trainer.subject.captions import read_caption
from subjectbooth.trainer.subject.photo import Photo
from subjectbooth.trainer.subject.photos import read_photo
from subjectbooth.trainer.subject.subject import make_subject

TENSORS = {
    "lora_unet_a.lora_down.weight": torch.randn(4, 16),
    "lora_unet_a.lora_up.weight": torch.randn(16, 4),
    "lora_unet_a.alpha": torch.tensor(4.0),
}
LORA = to_bytes(TENSORS, {"subjectbooth.trigger": "ohwx dog", "subjectbooth.run_key": "k"})
PEFT_SETTINGS = [
    "",
    "{",
    "[]",
    "5",
    "null",
    "[" * 100_000,
    "{}",
    '{"unet.lora_alpha": 1e400}',
    '{"unet.lora_alpha": 8}',
    '{"unet.lora_alpha": ' + "9" * 4000 + "}",
    '{"unet.alpha_pattern": [1]}',
    '{"unet.lora_alpha": null}',
    '{"unet.alpha_pattern": {"(a+)+$": {}}}',
    '{"unet.alpha_pattern": {"conv_in": NaN}}',
]


def _of_diffusers(settings: str) -> bytes:
    """The same adapter as diffusers may have written it, with settings that somebody else wrote."""
    names = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight", "alpha": "lora_magnitude_vector"}
    tensors = {f"unet.conv_in.{names[name.split('.', 1)[1]]}": tensor for name, tensor in TENSORS.items()}
    return to_bytes(tensors, {ADAPTER_METADATA: settings})


def _refused(action: Callable[[], object], where: object) -> bool:
    """Whether it was refused, with a proper sentence."""
    try:
        action()
    except SubjectBoothError as error:
        assert is_clean(str(error)), (where, str(error))
        return True
    return False


def test_lora_files_of_strangers(tmp_path: Path) -> None:
    choose, mark = seeded_random("LoRA files"), tmp_path / "mark"
    path = tmp_path / "stranger.safetensors"
    refused: dict[str, int] = {}
    for number in range(cases(400)):
        source = LORA if choose.random() < 0.5 else _of_diffusers(choose.choice(PEFT_SETTINGS))
        kind, content = corrupt_safetensors(source, choose, mark)
        path.write_bytes(content)
        found: list[tuple[dict[str, torch.Tensor], dict[str, str]]] = []
        if _refused(lambda: found.append(read_lora(path)), (number, kind)):  # noqa: B023
            refused[kind] = refused.get(kind, 0) + 1
            continue
        tensors, metadata = found[0]
        assert tensors
        assert all(torch.isfinite(tensor.float()).all() for tensor in tensors.values()), (number, kind)
        assert len(trigger_words(metadata)) <= 200
        assert trigger_words(metadata).isprintable()
    report("LoRA files, read", cases=cases(400), outcomes={"refused": sum(refused.values())})
    for kind in ("zero bytes", "truncated", "zeroed", "a pickle under its name", "text", "values that are no numbers"):
        assert refused[kind] > 0
    assert files_below(tmp_path) == {path}, "something was unpickled, or written"


def test_a_header_of_100_mb_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.write((100 * 2**20).to_bytes(8, "little"))
        file.truncate(100 * 2**20 + 8)
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail("it was read"))
    with pytest.raises(SubjectBoothError, match=r"The header claims 104857600 bytes"):
        read_lora(path)


def test_a_tensor_of_a_thousand_dimensions_is_refused(tmp_path: Path) -> None:
    """The format allows it, torch fails on it: found by the long fuzz."""
    header = json.dumps({"a": {"dtype": "F32", "shape": [1] * 1000, "data_offsets": [0, 4]}}).encode()
    path = tmp_path / "deep.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(SubjectBoothError, match="The tensor 'a' has 1000 dimensions"):
        read_lora(path)


@pytest.mark.parametrize("suffix", [".ckpt", ".pt", ".bin", ".pkl", ""])
def test_other_formats_are_refused_by_name(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(LORA)
    assert _refused(lambda: read_lora(path), suffix)
    assert _refused(lambda: read_lora(tmp_path / "missing.safetensors"), "missing")


def test_damaged_checkpoints_and_class_images_are_found(tmp_path: Path) -> None:
    """Whatever is accepted is exactly what was written: a single flipped bit is found by the checksum."""
    choose, mark = seeded_random("checkpoints and class images"), tmp_path / "mark"
    state = Checkpoint(
        3,
        {"unet/a": torch.randn(4, 4)},
        {0: {"step": torch.tensor(3.0), "x": torch.randn(4)}},
        [{"loss": 0.1, "instance_loss": 0.1}] * 3,
        {"precision": "fp32"},
        [{"lr": 1e-4}],
        [torch.randn(4)],
        {},
    )
    whole = tmp_path / "checkpoint.safetensors"
    checkpoint.save(whole, state)
    content = whole.read_bytes()
    store = PriorStore(tmp_path / "class_images", PriorRecipe("b", "a dog", "", 64, 64, "ddim", "x", 2, 7.0, 5, 0))
    store.save([0, 1], torch.randn(2, 4, 8, 8))
    file = next(store.path.glob("*.safetensors"))
    latents, made = file.read_bytes(), store.load()[0]
    accepted = 0
    for number in range(cases(100)):
        kind, spoilt = corrupt_safetensors(content, choose, mark)
        whole.write_bytes(spoilt)
        if not _refused(lambda: checkpoint.load(whole), (number, kind)):
            accepted += 1
            found = checkpoint.load(whole)
            assert torch.equal(found.adapter["unet/a"], state.adapter["unet/a"]), (number, kind)
            assert torch.equal(found.optimizer[0]["x"], state.optimizer[0]["x"]), (number, kind)
            assert (found.step, found.losses, found.chosen) == (3, state.losses, state.chosen)
        kind, spoilt = corrupt_safetensors(latents, choose, mark)
        file.write_bytes(spoilt)
        pictures, notes = store.load()
        if pictures:
            assert all(torch.equal(pictures[index], made[index]) for index in made), (number, kind)
        else:
            assert len(notes) == 1
            assert not file.exists()
        file.write_bytes(latents)
    report("checkpoints and files of class images, damaged", cases=2 * cases(100))
    assert accepted < cases(100) // 10
    assert not mark.exists()


def test_a_spoilt_log_never_stops_a_run(tmp_path: Path) -> None:
    choose = seeded_random("logs")
    folder = RunFolder(tmp_path, "0" * 64, "ohwx собака")
    prompts = ("фото ohwx собака",)
    FolderWriter(folder).open({})
    for step in (1, 2, 3):
        FolderWriter(folder).log(StepDone(step, 3, 0.1 * step, {"instance_loss": 0.1}, 1e-4, 1.0, 0.5, None))
    FolderWriter(folder).log(Validation(3, prompts, torch.rand(1, 8, 8, 3)))
    log, record = folder.path / "events.jsonl", folder.path / "run.json"
    picture = folder.validation_paths(3, 1)[0]
    files = {path: path.read_bytes() for path in (log, record, picture)}
    assert len(folder.losses(3)) == 3
    assert len(folder.validations(3, prompts)) == 1
    lines = [
        b"[]",
        b"5",
        b"null",
        b'{"step":"x","event":"StepDone"}',
        b'{"event":"Validation","step":1,"prompts":5}',
        b'{"event":"Validation","step":1}',
        b'{"event":"StepDone","step":1}',
        b"[" * 5000,
        b'{"step":1e999}',
        b'{"started":NaN}',
        b'{"started":1e300}',
        b'{"started":"x"}',
        b'{"started":-1e18}',
        b"\xff\xfe{}",
    ]
    for number in range(cases(60)):
        for path, content in files.items():
            spoilt = bytearray(content)
            accident = choose.choice(("cut", "flip", "line", "none"))
            if accident == "cut":
                spoilt = spoilt[: choose.randrange(len(spoilt))]
            elif accident == "flip":
                for _ in range(3):
                    spoilt[choose.randrange(len(spoilt))] ^= 1 << choose.randrange(8)
            elif accident == "line":
                spoilt = bytearray(content + choose.choice(lines) if choose.random() < 0.7 else choose.choice(lines))
            path.write_bytes(bytes(spoilt))
        assert len(folder.validations(3, prompts)) <= 2, number
        assert all(isinstance(loss, float) for loss in folder.losses(3)), number
        started = FolderWriter(folder).open({})
        assert started >= 0, number
        FolderWriter(folder).truncate_events(choose.choice((0, 2, 3)))
        assert all(json.loads(line) for line in log.read_text("utf-8").splitlines()), number
    report("logs and pictures of a run, damaged", cases=cases(60))


def _picture(choose: random.Random) -> tuple[bytes, str]:
    """A small picture in some format and mode, perhaps spoilt; and its suffix."""
    size = choose.choice([(64, 64), (1, 1), (2000, 5), (33, 200), (40, 40)])
    mode = choose.choice(["RGB", "RGBA", "L", "P", "1", "CMYK", "I;16", "LA", "F"])
    kind = choose.choice(["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO"])
    picture = Image.fromarray(
        np.random.default_rng(choose.randrange(1000)).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    )
    buffer = io.BytesIO()
    try:
        moves = kind in ("GIF", "TIFF", "WEBP") and size[0] > 8
        options = {"save_all": True, "append_images": [picture]} if moves else {}
        picture.convert(mode).save(buffer, kind, **options)
    except (OSError, ValueError, KeyError):
        picture.save(buffer, "PNG")
    content = buffer.getvalue()
    accident = choose.random()
    if accident < 0.2:
        content = content[: choose.randrange(len(content))]
        if kind == "JPEG" and accident < 0.1:
            content += b"\xff\xd9"  # closed properly, as some programs do with an interrupted copy
    elif accident < 0.6:
        spoilt = bytearray(content)
        for _ in range(choose.choice((1, 4, 64))):
            spoilt[choose.randrange(len(spoilt))] = choose.randrange(256)
        content = bytes(spoilt)
    elif accident < 0.7:
        content = choose.randbytes(choose.randrange(2000))
    return content, choose.choice([".png", ".jpg", ".webp", ".gif", ".bmp", ".tiff", ".avif"])


def test_pictures(tmp_path: Path) -> None:
    choose = seeded_random("pictures")
    outcomes = {"read": 0, "refused": 0}
    for number in range(cases(300)):
        content, suffix = _picture(choose)
        path = tmp_path / f"фото {number % 5}{suffix}"
        path.write_bytes(content)
        if _refused(lambda: read_photo(path), number):  # noqa: B023
            outcomes["refused"] += 1
        else:
            pixels = read_photo(path).pixels
            assert pixels.dtype == np.uint8
            assert pixels.ndim == 3
            outcomes["read"] += 1
    report("picture files", cases=cases(300), outcomes=outcomes)
    assert min(outcomes.values()) > cases(300) // 20


def test_captions_in_any_encoding(tmp_path: Path) -> None:
    choose, path = seeded_random("captions"), tmp_path / "dog.txt"
    texts = [
        "a photo of ohwx dog",
        "фотография ohwx собака на траве",
        "une photo de café ohwx",
        "写真 ohwx 犬",
        "🐶 ohwx",
        "",
        " ",
        "ФОТОГРАФИЯ OHWX СОБАКА",
        "Фото: «ohwx» — собака",
        "zdjęcie psa ohwx",
        "ohwx kočka",
        "köpek fotoğrafı ohwx",
        "ohwx šuo ir gėlė",
        "ohwx dog • garden ½",
        "à côté de l'ohwx",
        "ohwx (toy:1.2)",
    ]
    outcomes = {"read": 0, "refused": 0}
    for number in range(cases(300)):
        encoding = choose.choice(
            [
                "utf-8",
                "utf-8-sig",
                "utf-16",
                "utf-16-le",
                "utf-32",
                "cp1251",
                "koi8-r",
                "cp1252",
                "shift_jis",
                "cp866",
                "latin-1",
                "cp1250",
                "cp1254",
                "cp1257",
                "mac-cyrillic",
            ]
        )
        text = choose.choice(texts)
        content = text.encode(encoding, "replace")
        is_intact = content.decode(encoding) == text and choose.random() < 0.6
        if not is_intact:
            content = content[choose.randrange(len(content) + 1) :] + choose.randbytes(choose.randrange(40))
        path.write_bytes(content)
        if _refused(lambda: read_caption(path), (number, encoding)):
            outcomes["refused"] += 1
        else:
            assert read_caption(path).strip()
            assert "\0" not in read_caption(path)
            assert not is_intact or read_caption(path) == text, (number, encoding)
            outcomes["read"] += 1
    report("caption files", cases=cases(300), outcomes=outcomes)
    assert min(outcomes.values()) > cases(300) // 20


def test_sets_of_photos() -> None:
    """However many photos there are, there is a sentence a kind, and a masked loss learns or is refused."""
    choose, values = seeded_random("sets of photos"), np.random.default_rng(20261130)
    outcomes = {"learned": 0, "refused": 0}
    for number in range(cases(40)):
        photos = []
        for index in range(choose.choice((1, 3, 3, 12))):
            height, width = choose.choice([(64, 64), (64, 200), (200, 64), (40, 90)])
            pixels = (
                values.integers(0, 255, (height, width, 3), dtype=np.uint8)
                if choose.random() < 0.7
                else np.zeros((height, width, 3), np.uint8)
            )
            mask = np.zeros((height, width), np.float32)
            mask[choose.randrange(height) :, : choose.randrange(1, 30)] = choose.choice((0.2, 1.0))
            caption = choose.choice(("", "ohwx (toy)", "(ohwx:1.4", "\\(", "{class}", "an {class}"))
            photos.append(Photo(pixels, mask if choose.random() < 0.9 else None, caption, f"photo {index}.png"))
        subject = make_subject(
            photos,
            class_word=choose.choice(("a dog", "an old man", "the", "owl")),
            resolution=64,
            crop=choose.choice(("center", "center", "pad", "subject")),
        )
        assert len(subject.warnings) <= 12, (number, subject.warnings)
        assert all(len(text) < 400 for text in subject.warnings), (number, subject.warnings)
        if _refused(lambda: subject.check_masks(64), number):  # noqa: B023
            outcomes["refused"] += 1
        else:
            prepared = subject.prepare(64)
            assert prepared.masks is not None and prepared.masks.sum() > 0, number
            outcomes["learned"] += 1
    report("sets of photos", cases=cases(40), outcomes=outcomes)
    assert min(outcomes.values()) > cases(40) // 20


NAMES = [
    "..", "../x", "a/../../x", "/etc/passwd", "C:\\x", "\\\\server\\share", "con", "CON.txt", "aux/x", "COM1", "lpt¹",
    "conin$", "a" * 201, "я" * 120, "🐶" * 60, "a/" * 90 + "b", "x\0y", "x\ny", "", " ", ".", "./x", "x.", " x", "x/",
    "~", "~/x", "a:b", "a*b", "a?b", "\ud800", "x.safetensors", "рекс", "рекс/собака 🐕", "pets/rex", "%2e%2e/x",
    "a\\b", "a\\..\\..\\b", "nul.safetensors", "rex.ckpt", ".hidden", "-rf", "x" * 180, "\u202eexe",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_output_names_stay_inside(tmp_path: Path, name: str) -> None:
    run = tmp_path / "run.safetensors"
    run.write_bytes(LORA)
    folder = tmp_path / "loras"
    folder.mkdir()
    if _refused(lambda: checked_name(name), name):
        return
    path = publish(run, folder, name).path
    assert path.resolve().is_relative_to(folder.resolve())
    assert path.is_file()
    assert files_below(tmp_path) == {run, path}


def test_which_output_names_are_refused() -> None:
    fine = {name for name in NAMES if not _refused(lambda: checked_name(name), name)}  # noqa: B023
    assert fine == {
        "./x",
        "~",
        "x.safetensors",
        "рекс",
        "рекс/собака 🐕",
        "pets/rex",
        "%2e%2e/x",
        "a\\b",
        "rex.ckpt",
        " x",
        "-rf",
        "x" * 180,
        "a/" * 90 + "b",
        "\u202eexe",
    }
