"""Reading picture files: what comes out is the same picture, and what cannot be read says why."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFile
from skimage import data

from subjectbooth.trainer.errors import SubjectBoothError
from subjectbooth.trainer.subject import notes as photo_notes
from subjectbooth.trainer.subject import photos
from subjectbooth.trainer.subject.photos import list_photos, read_photo

CAT = data.chelsea()[:, :, :3]  # 300 x 451, a photograph of a cat


def png_of_16_bits(values: np.ndarray, colour_type: int) -> bytes:
    """A PNG with 16-bit samples, written by hand since Pillow cannot write 16-bit RGB."""
    height, width = values.shape[:2]

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = values.astype(">u2").reshape(height, -1)
    raw = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def saved(path: Path, picture: Image.Image, **options: object) -> Path:
    picture.save(path, **options)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_gives_the_upright_pixels(tmp_path: Path, orientation: int) -> None:
    stored_for = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    upright = Image.fromarray(CAT)
    stored = upright if stored_for[orientation] is None else upright.transpose(stored_for[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "cat.png", stored, exif=exif)
    assert np.array_equal(read_photo(path).pixels, CAT)


def test_a_rotated_jpeg_is_the_decoded_jpeg_turned(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    path = saved(tmp_path / "cat.jpg", Image.fromarray(CAT), quality=90, exif=exif)
    with Image.open(path) as stored:
        expected = np.rot90(np.array(stored), -1)
    assert np.array_equal(read_photo(path).pixels, expected)


def test_alpha_becomes_white_and_mask(tmp_path: Path) -> None:
    alpha = np.zeros(CAT.shape[:2], np.uint8)
    alpha[50:200, 100:300] = 255
    alpha[200:250, 100:300] = 128
    path = saved(tmp_path / "cut.png", Image.fromarray(np.dstack([CAT, alpha])))
    photo = read_photo(path)
    assert photo.mask is not None and photo.mask.dtype == np.float32
    assert np.allclose(photo.mask, alpha / 255.0)
    assert np.array_equal(photo.pixels[50:200, 100:300], CAT[50:200, 100:300])
    assert (photo.pixels[:50] == 255).all()
    assert [str(note) for note in photo.notes] == [
        "The transparent part of cut.png becomes white; with masked_loss it is not trained on."
    ]
    half = CAT[200:250, 100:300] * (128 / 255) + 255 * (127 / 255)
    assert np.abs(photo.pixels[200:250, 100:300] - half).max() <= 1.0


def test_an_opaque_alpha_channel_is_no_mask(tmp_path: Path) -> None:
    opaque = np.full(CAT.shape[:2], 255, np.uint8)
    photo = read_photo(saved(tmp_path / "cat.png", Image.fromarray(np.dstack([CAT, opaque]))))
    assert photo.mask is None and np.array_equal(photo.pixels, CAT)


def test_palette_with_transparency(tmp_path: Path) -> None:
    indices = np.zeros((64, 64), np.uint8)
    indices[16:48, 16:48] = 1
    picture = Image.fromarray(indices)
    picture.putpalette([10, 20, 30, 200, 100, 50])
    picture.save(tmp_path / "p.png", transparency=0)
    photo = read_photo(tmp_path / "p.png")
    assert photo.mask is not None
    assert np.array_equal(photo.mask, (indices == 1).astype(np.float32))
    assert (photo.pixels[20, 20] == (200, 100, 50)).all() and (photo.pixels[0, 0] == 255).all()


def test_palette_without_transparency(tmp_path: Path) -> None:
    picture = Image.fromarray(CAT).quantize(64)
    photo = read_photo(saved(tmp_path / "p.png", picture))
    assert photo.mask is None and np.array_equal(photo.pixels, np.array(picture.convert("RGB")))


def test_colour_key_transparency_of_an_rgb_png(tmp_path: Path) -> None:
    pixels = np.full((64, 64, 3), 90, np.uint8)
    pixels[:32] = (1, 2, 3)
    photo = read_photo(saved(tmp_path / "k.png", Image.fromarray(pixels), transparency=(1, 2, 3)))
    assert photo.mask is not None
    assert (photo.mask[:32] == 0).all() and (photo.mask[32:] == 1).all() and (photo.pixels[:32] == 255).all()


def test_grey_and_16_bit_grey_come_out_alike(tmp_path: Path) -> None:
    grey = data.camera()
    eight = read_photo(saved(tmp_path / "8.png", Image.fromarray(grey)))
    assert np.array_equal(eight.pixels, np.dstack([grey] * 3))
    (tmp_path / "16.png").write_bytes(png_of_16_bits(grey.astype(np.uint16) * 257, 0))
    assert np.array_equal(read_photo(tmp_path / "16.png").pixels, eight.pixels)
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.tif")
    assert np.array_equal(read_photo(tmp_path / "16.tif").pixels, eight.pixels)
    Image.fromarray(grey.astype(np.float32) / 255).save(tmp_path / "f.tif")
    assert np.array_equal(read_photo(tmp_path / "f.tif").pixels, eight.pixels)


def test_16_bit_rgb_and_rgba(tmp_path: Path) -> None:
    (tmp_path / "rgb.png").write_bytes(png_of_16_bits(CAT.astype(np.uint16) * 257, 2))
    assert np.array_equal(read_photo(tmp_path / "rgb.png").pixels, CAT)
    alpha = np.full(CAT.shape[:2], 65535, np.uint16)
    alpha[:100] = 0
    rgba = np.dstack([CAT.astype(np.uint16) * 257, alpha])
    (tmp_path / "rgba.png").write_bytes(png_of_16_bits(rgba, 6))
    photo = read_photo(tmp_path / "rgba.png")
    assert photo.mask is not None and (photo.mask[:100] == 0).all() and (photo.mask[100:] == 1).all()
    assert np.array_equal(photo.pixels[100:], CAT[100:])


def test_cmyk(tmp_path: Path) -> None:
    path = saved(tmp_path / "c.tif", Image.fromarray(CAT).convert("CMYK"))
    assert np.abs(read_photo(path).pixels.astype(int) - CAT).max() <= 2
    path = saved(tmp_path / "c.jpg", Image.fromarray(CAT).convert("CMYK"), quality=95)
    assert np.abs(read_photo(path).pixels.astype(int) - CAT).mean() < 4


def test_a_colour_profile_is_converted_and_srgb_left_alone(tmp_path: Path) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert np.array_equal(read_photo(saved(tmp_path / "s.png", Image.fromarray(CAT), icc_profile=srgb)).pixels, CAT)
    # A linear-light profile made of the sRGB one: the tone curves are replaced by gamma 1.0.
    linear = bytearray(srgb)
    for tag in (b"rTRC", b"gTRC", b"bTRC"):
        at = linear.index(tag)
        offset = struct.unpack(">I", linear[at + 4 : at + 8])[0]
        linear[at + 8 : at + 12] = struct.pack(">I", 12)
        linear[offset : offset + 12] = b"curv" + bytes(4) + struct.pack(">I", 0)
    # Its name still says sRGB: the curves count.
    assert "sRGB" in ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(bytes(linear))))
    flat = np.full((64, 64, 3), 64, np.uint8)
    path = saved(tmp_path / "l.png", Image.fromarray(flat), icc_profile=bytes(linear))
    expected = 255 * (1.055 * (64 / 255) ** (1 / 2.4) - 0.055)  # the sRGB curve of linear 64/255
    assert np.abs(read_photo(path).pixels - expected).max() <= 2
    path = saved(tmp_path / "bad.png", Image.fromarray(CAT), icc_profile=b"not a profile at all" * 10)
    assert np.array_equal(read_photo(path).pixels, CAT)


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_animations_give_their_first_frame_and_say_so(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if suffix == "webp" else {}
    path = tmp_path / f"a.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    photo = read_photo(path)
    assert (photo.pixels == (255, 0, 0)).all()
    assert [str(note) for note in photo.notes] == [f"a.{suffix} has 3 frames: only the first is used."]


def test_a_phones_second_picture_is_no_animation(tmp_path: Path) -> None:
    path = tmp_path / "m.jpg"
    Image.fromarray(CAT).save(path, format="MPO", save_all=True, append_images=[Image.fromarray(CAT[:64, :64])])
    assert read_photo(path).notes == ()


def test_huge_sources_are_scaled_down(tmp_path: Path) -> None:
    huge = Image.fromarray(CAT).resize((5412, 3600), Image.Resampling.BICUBIC)
    alpha = Image.new("L", huge.size, 255)
    alpha.paste(0, (0, 0, 2706, 3600))
    for suffix in ("jpg", "png"):
        picture = huge.copy()
        if suffix == "png":
            picture.putalpha(alpha)
        photo = read_photo(
            saved(
                tmp_path / f"h.{suffix}",
                picture,
                **({"quality": 95} if suffix == "jpg" else {"compress_level": 1}),
            )
        )
        assert min(photo.pixels.shape[:2]) == photos.MAX_SHORT_SIDE
        small = np.array(Image.fromarray(photo.pixels).resize((451, 300), Image.Resampling.BOX)).astype(int)
        assert np.abs(small[:, 230:] - CAT[:, 230:]).mean() < 2
    assert photo.mask is not None and photo.mask.shape == photo.pixels.shape[:2]
    assert photo.mask[:, :1530].max() == 0 and photo.mask[:, 1545:].min() == 1


def zero_bytes(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_bytes(b"This is not a picture, whatever its name says.")


def cut_off(path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(CAT).save(buffer, "PNG" if path.suffix == ".png" else "JPEG")
    path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])


def flipped(path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(CAT).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(bytes(content))


def bomb(path: Path) -> None:
    """40,000 x 40,000 pixels in 60 bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 40000, 40000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")))


def small_bomb(path: Path) -> None:
    """13,000 x 10,000: below Pillow's own limit, above ours."""
    Image.new("1", (13000, 10000)).save(path)


def one_pixel(path: Path) -> None:
    Image.new("RGB", (1, 1)).save(path)


def ribbon(path: Path) -> None:
    Image.new("RGB", (20000, 50)).save(path)


def transparent(path: Path) -> None:
    Image.new("RGBA", (64, 64), (1, 2, 3, 0)).save(path)


def not_numbers(path: Path) -> None:
    Image.fromarray(np.full((64, 64), np.nan, np.float32)).save(path)


def heic(path: Path) -> None:
    path.write_bytes(struct.pack(">I", 24) + b"ftypheic" + bytes(200))


def folder(path: Path) -> None:
    path.mkdir()


def missing(path: Path) -> None:
    assert not path.exists()


@pytest.mark.parametrize(
    ("name", "make", "says"),
    [
        ("zero.jpg", zero_bytes, "zero.jpg is empty (0 bytes)"),
        ("text.png", text, "text.png is not an image"),
        ("cut.jpg", cut_off, "cut.jpg is damaged or truncated"),
        ("cut.png", cut_off, "cut.png is damaged or truncated"),
        ("flip.png", flipped, "flip.png is damaged or truncated"),
        (
            "bomb.png",
            bomb,
            "The header of bomb.png gives a size far beyond that of any photo. Required: at most 120 million pixels",
        ),
        ("bomb2.png", small_bomb, "bomb2.png is 13000x10000 pixels. Required: at most 120 million pixels"),
        ("one.png", one_pixel, "one.png is 1x1 pixels. Required: at least 32 pixels on each side"),
        ("ribbon.png", ribbon, "ribbon.png is 20000x50 pixels. Required: a long side of at most 8 times"),
        ("clear.png", transparent, "clear.png is fully transparent"),
        ("nan.tif", not_numbers, "nan.tif is damaged or truncated"),
        ("phone.heic", heic, "phone.heic is a HEIC image. Required: JPEG, PNG or WebP"),
        ("camera.DNG", heic, "camera.DNG is a camera RAW file. Required: JPEG, PNG or WebP"),
        ("dir.png", folder, "dir.png is a folder"),
        ("gone.png", missing, "gone.png does not exist"),
    ],
)
def test_what_cannot_be_read_says_why(tmp_path: Path, name: str, make: Callable[[Path], None], says: str) -> None:
    make(tmp_path / name)
    with pytest.raises(SubjectBoothError) as caught:
        read_photo(tmp_path / name)
    message = str(caught.value)
    assert message.startswith(says), message
    assert "Traceback" not in message and str(tmp_path) not in message and "\n" not in message


def test_a_process_wide_tolerance_for_damage_does_not_reach_us(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    cut_off(tmp_path / "cut.jpg")
    with pytest.raises(SubjectBoothError, match="damaged or truncated"):
        read_photo(tmp_path / "cut.jpg")
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


JPEG_KINDS = [
    {},
    {"progressive": True},
    {"quality": 95, "optimize": True, "subsampling": 0},
    {"restart_marker_rows": 1},
    {"restart_marker_blocks": 1},
]


@pytest.mark.parametrize("options", JPEG_KINDS, ids=str)
def test_a_torn_jpeg_with_a_proper_end_is_found(tmp_path: Path, options: dict[str, object]) -> None:
    """Decoders fill what is missing with grey and say nothing: an interrupted copy that some program has closed."""
    path = saved(tmp_path / "torn.jpg", Image.fromarray(CAT), **options)
    whole = path.read_bytes()
    assert read_photo(path).notes == ()
    for behind in (b"\0" * 99, b"a camera's own data \xff\xd9"):
        path.write_bytes(whole + behind)
        assert read_photo(path).notes == (), "what is behind a picture's end is none of it"
    for share in (0.3, 0.6, 0.9):
        path.write_bytes(whole[: int(len(whole) * share)].rstrip(b"\xff") + b"\xff\xd9")
        with Image.open(path) as torn:
            torn.load()  # which the decoder does without a word
        with pytest.raises(
            SubjectBoothError, match=r"torn\.jpg is damaged or truncated \(the lower \d+ % is missing\)"
        ):
            read_photo(path)
    path.write_bytes(whole[:-30].rstrip(b"\xff") + b"\xff\xd9")
    assert [note.kind for note in read_photo(path).notes] == ["torn"], "the last row of blocks alone"


def test_one_sentence_for_many_photos() -> None:
    notes = [photo_notes.Note("white", f"{number}.png") for number in range(300)]
    notes.insert(1, photo_notes.Note("frames", "a.gif", "3 frames"))
    assert photo_notes.sentences(notes) == [
        "The transparent parts of 0.png, 1.png and 298 more become white; with masked_loss they are not trained on.",
        "a.gif has 3 frames: only the first is used.",
    ]


def test_postscript_is_never_handed_to_an_interpreter(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\n")
    with pytest.raises(SubjectBoothError, match="is not an image"):
        read_photo(tmp_path / "x.png")


def test_random_damage_never_gives_another_error(tmp_path: Path) -> None:
    """Bit flips, cuts and inserted bytes in every format: a picture or a sentence, nothing else."""
    random = np.random.default_rng(20261121)
    path = tmp_path / "x"
    outcomes = {"read": 0, "refused": 0}
    for name in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"):
        buffer = io.BytesIO()
        Image.fromarray(CAT[::4, ::4]).save(buffer, name)
        original = buffer.getvalue()
        for _ in range(60):
            content = bytearray(original)
            for _ in range(int(random.integers(1, 6))):
                content[int(random.integers(0, len(content)))] = int(random.integers(0, 256))
            if random.random() < 0.3:
                del content[int(random.integers(1, len(content))) :]
            path.write_bytes(bytes(content))
            try:
                read_photo(path)
                outcomes["read"] += 1
            except SubjectBoothError as error:
                assert "\n" not in str(error)
                outcomes["refused"] += 1
    assert min(outcomes.values()) > 20, outcomes


def test_folders_are_listed_in_natural_order(tmp_path: Path) -> None:
    for name in ("dog10.png", "Dog2.JPG", "dog1.png", "._dog1.png", "dog1.txt", "notes.pdf", "x.heic"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "sub").mkdir()
    assert [p.name for p in list_photos(tmp_path)] == ["dog1.png", "Dog2.JPG", "dog10.png", "x.heic"]
    with pytest.raises(SubjectBoothError, match="No images found in the folder 'sub'"):
        list_photos(tmp_path / "sub")
    (tmp_path / "sub" / "10_ohwx old dog").mkdir()
    (tmp_path / "sub" / "10_ohwx old dog" / "a.PNG").write_bytes(b"x")
    (tmp_path / "sub" / "1_empty").mkdir()
    with pytest.raises(SubjectBoothError) as caught:
        list_photos(tmp_path / "sub")
    assert 'Choose the folder sub/10_ohwx old dog (token "ohwx", class word "old dog")' in str(caught.value)
    with pytest.raises(SubjectBoothError, match="The folder 'none' cannot be read"):
        list_photos(tmp_path / "none")
