"""Photos -> subject: crops, masks, captions, the digest, and the warnings."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageFilter
from skimage import data

from subjectbooth.trainer.errors import SubjectBoothError
from subjectbooth.trainer.subject.checks import (
    PhotoStats,
    check_photos,
    duplicate_groups,
    is_blurred,
    photo_stats,
    sharpness,
)
from subjectbooth.trainer.subject.photo import Photo
from subjectbooth.trainer.subject.subject import Subject, make_subject

CAT = data.chelsea()[:, :, :3]  # 300 x 451
COFFEE = data.coffee()[:, :, :3]  # 400 x 600
ROCKET = data.rocket()[:, :, :3]  # 427 x 640


def photo(pixels: np.ndarray, mask: np.ndarray | None = None, caption: str = "", name: str = "x.png") -> Photo:
    return Photo(np.ascontiguousarray(pixels), mask, caption, name)


def subject(*photos: Photo, resolution: int = 128, crop: str = "center", **options: object) -> Subject:
    return make_subject(photos, class_word="cat", resolution=resolution, crop=crop, **options)


def as_array(image: torch.Tensor) -> np.ndarray:
    """[3, r, r] in 0..1 -> uint8 [r, r, 3]."""
    return np.rint(image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)


def test_a_class_word_with_an_article_gives_one_article() -> None:
    made = make_subject(
        [photo(CAT)], class_word="an old man", resolution=64, prompt_template="photo of a {class} {token}"
    )
    assert (made.trigger, made.class_prompt) == ("ohwx old man", "a photo of an old man")
    assert made.instance_prompt == "photo of an old man ohwx"


def test_a_weight_in_a_caption_is_text() -> None:
    given = [photo(CAT, caption="ohwx (toy:1.2)"), photo(COFFEE, caption="ohwx cat (toy)"), photo(ROCKET)]
    (warning,) = subject(*given).warnings
    assert warning.startswith("1 of 3 captions contain a prompt weight ((toy:1.2)). Captions are taken literally")


def test_prompts() -> None:
    made = make_subject([photo(CAT)], class_word="owl", resolution=64)
    assert (made.trigger, made.instance_prompt, made.class_prompt) == (
        "ohwx owl",
        "a photo of ohwx owl",
        "a photo of an owl",
    )
    assert made.photos[0].caption == "a photo of ohwx owl"


def test_center_crop_is_the_middle_square_scaled_with_lanczos() -> None:
    prepared = subject(photo(CAT)).prepare()
    expected = Image.fromarray(CAT[:, 75:375]).resize((128, 128), Image.Resampling.LANCZOS)
    assert prepared.images.shape == (1, 3, 128, 128) and prepared.images.dtype == torch.float32
    assert np.array_equal(as_array(prepared.images[0]), np.array(expected))
    assert prepared.masks is None


def test_tensors_can_be_trained_on_when_made_in_inference_mode() -> None:
    with torch.inference_mode():
        prepared = subject(photo(CAT, np.eye(300, 451, dtype=np.float32))).prepare()
    assert prepared.masks is not None
    assert not prepared.images.is_inference() and not prepared.masks.is_inference()


def test_a_picture_of_the_training_size_is_untouched() -> None:
    square = CAT[:256, :256]
    assert np.array_equal(as_array(subject(photo(square), resolution=256).prepare().images[0]), square)


def test_scaling_down_does_not_alias() -> None:
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 255
    image = subject(photo(stripes), resolution=64).prepare().images
    assert image.std() < 0.02 and abs(float(image.mean()) - 0.5) < 0.01


def test_pad_keeps_all_of_the_picture() -> None:
    wide = CAT[:296, :448]
    mask = np.zeros(wide.shape[:2], np.float32)
    mask[100:200, :] = 1
    prepared = subject(photo(wide, mask), crop="pad", resolution=448).prepare()
    image, bars = as_array(prepared.images[0]), (448 - 296) // 2
    assert np.array_equal(image[bars : bars + 296], wide)
    expected = np.rint(wide[[0, -1]].reshape(-1, 3).mean(axis=0))
    assert (image[:bars] == expected).all() and (image[bars + 296 :] == expected).all()
    assert prepared.masks is not None and np.array_equal(prepared.masks[0, 0, bars : bars + 296].numpy(), mask)
    assert prepared.masks[0, 0, :bars].max() == 0 and prepared.masks[0, 0, bars + 296 :].max() == 0
    tall = subject(photo(wide.transpose(1, 0, 2)), crop="pad", resolution=448).prepare()
    assert np.array_equal(as_array(tall.images[0])[:, bars : bars + 296], wide.transpose(1, 0, 2))


def test_subject_crop_goes_around_the_mask() -> None:
    mask = np.zeros(ROCKET.shape[:2], np.float32)
    mask[50:200, 450:600] = 1  # 150 x 150 in the right upper corner
    prepared = subject(photo(ROCKET, mask), crop="subject", resolution=64).prepare()
    left, top, edge = 435, 35, 180  # the box with a tenth on each side
    expected = Image.fromarray(ROCKET[top : top + edge, left : left + edge]).resize((64, 64), Image.Resampling.LANCZOS)
    assert np.array_equal(as_array(prepared.images[0]), np.array(expected))
    assert prepared.masks is not None
    assert float(prepared.masks.mean()) == pytest.approx((150 / 180) ** 2, abs=0.02)


def test_subject_crop_stays_inside_and_never_enlarges() -> None:
    mask = np.zeros(ROCKET.shape[:2], np.float32)
    mask[0:10, 630:640] = 1  # a speck in the corner
    prepared = subject(photo(ROCKET, mask), crop="subject", resolution=256).prepare()
    assert np.array_equal(as_array(prepared.images[0]), ROCKET[:256, 384:])
    for nothing in (None, np.zeros(ROCKET.shape[:2], np.float32)):
        without = subject(photo(ROCKET, nothing), crop="subject").prepare()
        assert torch.equal(without.images, subject(photo(ROCKET)).prepare().images)


def test_masks_are_there_for_all_or_none() -> None:
    mask = np.zeros(CAT.shape[:2], np.float32)
    mask[:, :225] = 1
    prepared = subject(photo(CAT, mask), photo(COFFEE)).prepare()
    assert prepared.masks is not None and prepared.masks.shape == (2, 1, 128, 128)
    by_photo = {source: prepared.masks[i] for i, source in enumerate(prepared.order)}
    assert by_photo[1].min() == 1
    assert by_photo[0][..., :60].min() == 1 and by_photo[0][..., 68:].max() == 0
    assert prepared.masks.min() >= 0 and prepared.masks.max() <= 1


def test_captions_follow_their_photo() -> None:
    made = subject(photo(CAT, caption="{token} on a sofa"), photo(COFFEE, caption="a cup, ohwx"), photo(ROCKET))
    prepared = made.prepare()
    captions = ("ohwx on a sofa", "a cup, ohwx", "a photo of ohwx cat")
    assert tuple(prepared.captions[prepared.order.index(i)] for i in range(3)) == captions
    for i, source in enumerate((CAT, COFFEE, ROCKET)):
        alone = subject(photo(source)).prepare().images[0]
        assert torch.equal(prepared.images[prepared.order.index(i)], alone)


def test_the_digest_is_of_content_and_nothing_else() -> None:
    mask = np.ones(CAT.shape[:2], np.float32)
    mask[:100] = 0
    first, second = photo(CAT, mask, "ohwx one", "a.png"), photo(COFFEE, None, "ohwx two", "b.png")
    base = subject(first, second).prepare()
    renamed = subject(replace(second, name="0.png"), replace(first, name="z.jpg")).prepare()
    assert renamed.digest == base.digest
    assert torch.equal(renamed.images, base.images) and renamed.captions == base.captions
    assert renamed.masks is not None and base.masks is not None and torch.equal(renamed.masks, base.masks)

    changed_pixel = CAT.copy()
    changed_pixel[150, 200] ^= 64
    changed_mask = mask.copy()
    changed_mask[150:160, 200:210] = 0
    swapped = (replace(first, caption="ohwx two"), replace(second, caption="ohwx one"))
    others = [
        subject(replace(first, pixels=changed_pixel), second),
        subject(replace(first, mask=changed_mask), second),
        subject(replace(first, mask=None), second),
        subject(replace(first, caption="ohwx three"), second),
        subject(*swapped),
        subject(first),
        subject(first, first, second),
        subject(first, second, resolution=136),
        subject(first, second, crop="pad"),
    ]
    digests = [other.prepare().digest for other in others]
    assert len({base.digest, *digests}) == len(others) + 1
    assert subject(first, second, resolution=64).prepare(128).digest == base.digest


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"resolution": 500}, "resolution 500. Required: a multiple of 8"),
        ({"resolution": 0}, "resolution 0. Required: 64 to 4096"),
        ({"resolution": True}, "resolution True"),
        ({"resolution": 512.0}, "resolution 512.0"),
        ({"crop": "stretch"}, "crop 'stretch'. Required: one of center, pad, subject"),
        ({"token": ""}, "token is empty"),
        ({"prompt_template": "a photo"}, "does not contain the token"),
    ],
)
def test_settings_that_cannot_be_used(options: dict[str, object], says: str) -> None:
    with pytest.raises(SubjectBoothError) as caught:
        make_subject([photo(CAT)], class_word="cat", **options)
    assert says in str(caught.value)


def test_no_photo() -> None:
    with pytest.raises(SubjectBoothError, match="No photos were given"):
        make_subject([], class_word="cat")


def test_warnings_name_what_is_wrong() -> None:
    good = subject(photo(CAT), photo(COFFEE), photo(ROCKET))
    assert good.warnings == ()
    poor = make_subject(
        [photo(CAT, name="cat.png"), photo(CAT, name="copy.png", caption="a cat")],
        class_word="cat",
        resolution=512,
        prompt_template="a photo of {token}",
        notes=["cat.png has 3 frames: only the first is used."],
    )
    starts = [
        "cat.png has 3 frames",
        "Only 2 photos",
        "cat.png (451x300) and copy.png (451x300) are smaller than the training size 512",
        "cat.png and copy.png are near-duplicates",
        "prompt_template has no {class}",
        "1 of 2 captions (first: copy.png)",
    ]
    assert len(poor.warnings) == len(starts)
    for warning, start in zip(poor.warnings, starts, strict=True):
        assert warning.startswith(start), warning


def test_a_flood_of_frames_is_one_sentence_a_kind() -> None:
    """300 frames of a film, each nearly the one before: pairs were 44,850 warnings."""
    frames = [
        photo(np.clip(CAT[::4, ::4].astype(int) + number % 2, 0, 255).astype(np.uint8), name=f"{number}.png")
        for number in range(300)
    ]
    frames += [photo(COFFEE, name="a.png"), photo(COFFEE, name="b.png"), photo(ROCKET, name="c.png")]
    assert check_photos(frames, 256) == [
        "0.png (113x75), 1.png (113x75) and 298 more are smaller than the training size 256: they are enlarged, and "
        "the subject becomes soft.",
        "300 photos are near-duplicates: 0.png, 1.png and 298 more. This view gets 300 times the weight.",
        "a.png and b.png are near-duplicates: this view gets double weight.",
    ]


def test_the_frames_of_a_slow_film_are_one_group() -> None:
    """The first and the last have nothing in common, but each is nearly the one before it."""
    hashes = np.zeros((40, 256), dtype=bool)
    for number in range(40):
        hashes[number, : 6 * number] = True
    looks = [PhotoStats(512, 512, bits.reshape(16, 16), np.zeros((8, 8, 3), np.float32), False) for bits in hashes]
    apart = PhotoStats(512, 512, looks[0].hash, np.full((8, 8, 3), 99, np.float32), False)
    order = np.random.default_rng(0).permutation(40).tolist()
    groups = duplicate_groups([apart, *(looks[index] for index in order)])
    assert groups == [list(range(1, 41))]


def left_cut_out(name: str, left: int = 40) -> Photo:
    """Its mask is left of the middle square, which begins at column 75."""
    mask = np.zeros(CAT.shape[:2], np.float32)
    mask[40:200, left - 40 : left + 20] = 1
    return photo(CAT, mask, name=name)


def test_a_mask_outside_the_crop_is_named() -> None:
    cut = left_cut_out("0.png")
    made = subject(cut, photo(COFFEE), photo(ROCKET))
    (warning,) = made.warnings
    assert warning.startswith("The mask of 0.png is outside the crop 'center': this photo trains nothing with masked")
    assert made.check_masks(128) == warning, "the other photos are learned whole"
    assert made.check_masks(128, buckets=True) == "", "the bucket of this shape keeps it"
    for crop in ("pad", "subject"):
        other = subject(cut, photo(COFFEE), photo(ROCKET), crop=crop)
        assert other.warnings == () and other.check_masks(128) == ""


def test_a_masked_loss_with_every_mask_outside_the_crop_is_refused() -> None:
    made = subject(*(left_cut_out(f"{number}.png", 40 + 5 * number) for number in range(3)))
    assert made.warnings[-1].startswith("The masks of 0.png, 1.png and 2.png are outside the crop 'center'")
    with pytest.raises(SubjectBoothError) as caught:
        made.check_masks(128)
    assert "every mask is outside the crop 'center': 0.png, 1.png and 2.png. Required:" in str(caught.value)
    assert subject(left_cut_out("0.png", 80)).check_masks(128) == "", "a part of it is inside"


# --- nearly equal pictures and blur, on photographs ---

MOTORCYCLE, _, _ = data.stereo_motorcycle()
PHOTOGRAPHS = {
    "cat": CAT,
    "coffee": COFFEE,
    "rocket": ROCKET,
    "motorcycle": np.asarray(MOTORCYCLE)[:, :, :3],
    "camera": np.dstack([data.camera()] * 3),
    "hubble": data.hubble_deep_field(),
}


def recompressed(pixels: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=quality)
    return np.array(Image.open(buffer))


def equal_pairs(images: list[np.ndarray]) -> list[tuple[int, ...]]:
    return [tuple(group) for group in duplicate_groups([photo_stats(image) for image in images])]


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_copies_are_found(name: str) -> None:
    pixels = PHOTOGRAPHS[name]
    height, width = pixels.shape[:2]
    picture = Image.fromarray(pixels)
    copies = [
        recompressed(pixels, 90),
        recompressed(pixels, 20),
        np.array(picture.resize((width // 3, height // 3))),
        np.array(ImageEnhance.Brightness(picture).enhance(1.08)),
    ]
    for copy in copies:
        assert equal_pairs([pixels, copy]) == [(0, 1)]


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_other_crops_of_the_same_photo_are_other_pictures(name: str) -> None:
    pixels = PHOTOGRAPHS[name]
    height, width = pixels.shape[:2]
    for part in (0.9, 0.8, 0.6):
        h, w = int(height * part), int(width * part)
        crops = [pixels[:h, :w], pixels[-h:, -w:], pixels[(height - h) // 2 :, (width - w) // 2 :][:h, :w]]
        assert equal_pairs([pixels, *crops]) == []
    assert equal_pairs([pixels, pixels[:, ::-1]]) == []


def test_one_drawing_before_two_backgrounds_is_two_pictures() -> None:
    def drawing(background: tuple[int, int, int]) -> np.ndarray:
        image = np.full((128, 128, 3), background, np.uint8)
        image[40:90, 40:90] = COFFEE[100:150, 300:350]
        return image

    assert equal_pairs([drawing((250, 250, 250)), drawing((180, 200, 250)), drawing((250, 180, 180))]) == []
    assert equal_pairs([drawing((250, 250, 250)), drawing((249, 250, 250))]) == [(0, 1)]


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_blur(name: str) -> None:
    pixels = PHOTOGRAPHS[name]
    assert not is_blurred(pixels)

    def blurred(radius: float) -> np.ndarray:
        return np.array(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(radius)))

    assert not is_blurred(blurred(1.0))
    assert is_blurred(blurred(5.0))
    assert sharpness(pixels) > sharpness(blurred(1.0)) > sharpness(blurred(5.0))


def test_a_sharp_subject_before_a_soft_background_is_no_blur() -> None:
    pixels = np.array(Image.fromarray(COFFEE).filter(ImageFilter.GaussianBlur(8)))
    pixels[100:300, 200:400] = COFFEE[100:300, 200:400]  # a sixth of the picture
    assert not is_blurred(pixels)


def test_blur_is_warned_about_once_and_not_for_small_pictures() -> None:
    soft = np.array(Image.fromarray(COFFEE).filter(ImageFilter.GaussianBlur(6)))
    photos = [photo(CAT), photo(soft, name="soft.png"), photo(ROCKET)]
    assert check_photos(photos, 256) == ["soft.png looks blurred: the blur is learned with the subject."]
    small = [warning for warning in check_photos(photos, 424) if "soft.png" in warning]
    assert len(small) == 1 and "smaller than the training size" in small[0]
