"""Encoding many photos takes no more memory than encoding a few, beside the photos and latents themselves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from subjectbooth.scripts import full_size
from subjectbooth.tests.small_base import small_base
from subjectbooth.trainer.base.conditioning import AT_ONCE, in_parts
from subjectbooth.trainer.base.sd.codecs import KLCodec, TinyCodec
from subjectbooth.trainer.memory.footprint import Memory
from subjectbooth.trainer.runs.encodings import EncodingCache
from subjectbooth.trainer.runs.preparation import MIRRORED_AT_ONCE, _mirrored_latents
from subjectbooth.trainer.subject.photo import Photo
from subjectbooth.trainer.subject.subject import make_subject

SIDE = 64


def tiny_codec() -> TinyCodec:
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    return TinyCodec(AutoencoderTiny().state_dict(), "test")


def kl_codec() -> KLCodec:
    torch.manual_seed(0)
    return KLCodec(full_size.vae(block_out_channels=(32, 32, 32, 32)).state_dict(), 0.18, "test")


def extra(work: Callable[[], torch.Tensor], *given: torch.Tensor) -> int:
    """Peak bytes of live tensors, beside those given and the result."""
    with Memory({str(number): tensor for number, tensor in enumerate(given)}) as memory:
        result = work()
    return memory.peak - result.nbytes


@pytest.mark.parametrize("codec", [tiny_codec(), kl_codec()], ids=["tiny", "kl"])
def test_pictures_are_encoded_a_few_at_once(codec: TinyCodec | KLCodec) -> None:
    photos = torch.rand(5 * AT_ONCE, 3, SIDE, SIDE)
    few, many = (extra(lambda count=count: codec.encode(photos[:count]), photos) for count in (AT_ONCE, len(photos)))
    assert photos[:AT_ONCE].nbytes < few  # activations are counted
    assert many <= 1.1 * few


def test_mirrored_photos_are_made_a_few_at_once() -> None:
    base, photos = small_base(), torch.rand(4 * MIRRORED_AT_ONCE, 3, SIDE, SIDE)
    latents = _mirrored_latents(base, photos, EncodingCache(limit=0), "cpu")
    assert latents.equal(base.codec.encode(photos.flip(-1)))
    assert extra(lambda: _mirrored_latents(base, photos, EncodingCache(limit=0), "cpu"), photos) < photos.nbytes


def test_photos_are_prepared_without_a_second_copy() -> None:
    random = np.random.default_rng(0)
    photos = [
        Photo(random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8), None, "", str(number)) for number in range(24)
    ]
    subject = make_subject(photos, class_word="dog", resolution=SIDE)
    prepared = subject.prepare()
    for image, photo in zip(prepared.images, prepared.order, strict=True):
        assert image.equal(torch.from_numpy(photos[photo].pixels).permute(2, 0, 1).float() / 255)
    assert extra(lambda: subject.prepare().images) <= prepared.images[:1].nbytes * 1.1


def test_parts_give_what_one_batch_gives() -> None:
    """A single picture takes other kernels; it is not left over."""
    codec = tiny_codec()
    for count in (0, 1, AT_ONCE + 1, AT_ONCE + 2, 2 * AT_ONCE + 1):
        photos = torch.rand(count, 3, 32, 32)
        parts = in_parts(photos)
        assert torch.cat(parts).equal(photos)
        assert count == 1 or all(1 != len(part) <= AT_ONCE + 1 for part in parts)
        if count:
            whole = codec._model.encode(photos * 2 - 1).latents
            torch.testing.assert_close(codec.encode(photos), whole, rtol=0, atol=0)
