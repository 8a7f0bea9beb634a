"""The demo base written out wide is the same function as the narrow model, for diffusers and transformers too."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from torch import nn

from subjectbooth.demo import base
from subjectbooth.demo.expand import WIDE_TEXT, WIDE_UNET, WIDE_VAE, narrow_state, pack_state, wide_tensors
from subjectbooth.demo.making.autoencoder import decoder_widths, encoder_widths, grow, make_decoder, make_encoder
from subjectbooth.demo.making.text import TextEncoder
from subjectbooth.demo.making.unet import UNet
from subjectbooth.trainer.base.sd.layout import LdmLayout
from subjectbooth.trainer.base.sd.unet import build_unet

Tensors = dict[str, torch.Tensor]
TOKENS = [0, 320, 1125, 539, 1929, 49406, 49407]
IDS = torch.tensor([[49406, 320, 1125, 539, 1929] + [49407] * 72, [49406] + [49407] * 76])


def _nets() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    nets = {"unet": UNet(), "text": TextEncoder(TOKENS)}
    vae = {"vae.encoder": make_encoder((8, 16, 24, 32)), "vae.decoder": make_decoder((16, 24, 32, 40))}
    for net in (*nets.values(), *vae.values()):
        for parameter in net.parameters():
            # Nothing may be zero or one, as some layers start out: a wrong rule for them would not show.
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return {**nets, **vae}


@pytest.fixture(scope="module")
def made() -> tuple[dict[str, nn.Module], Tensors, Tensors]:
    """Narrow nets with the weights that the compact file keeps, the compact tensors, the wide ones in fp32."""
    nets = _nets()
    packed = pack_state({f"{part}.{k}": v for part, net in nets.items() for k, v in net.state_dict().items()})
    state = narrow_state(packed)
    for part, net in nets.items():
        net.load_state_dict({k[len(part) + 1 :]: v for k, v in state.items() if k.startswith(f"{part}.")})
        net.eval().requires_grad_(False)
    return nets, packed, {name: value.float() for name, value in wide_tensors(packed)}


def _part(wide: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): value for name, value in wide.items() if name.startswith(prefix)}


def test_the_wide_unet_in_diffusers_is_the_narrow_one(made: tuple[dict[str, nn.Module], Tensors, Tensors]) -> None:
    nets, _, wide = made
    weights = _part(wide, WIDE_UNET)
    shapes = {name: value.shape for name, value in weights.items()}
    unet = build_unet(LdmLayout.of(shapes, "test"), lambda: weights, torch.float32)
    x, steps, context = torch.randn(3, 4, 8, 8), torch.tensor([3, 400, 999]), torch.randn(3, 77, 96)
    with torch.no_grad():
        narrow = nets["unet"](x, steps, context)
        full = unet(x, steps, context.repeat_interleave(8, 2)).sample
    assert narrow.std() > 0.1
    assert (narrow - full).abs().max() < 1e-4 * max(1.0, float(narrow.abs().max()))


def test_the_wide_text_encoder_in_transformers_is_the_narrow_one(
    made: tuple[dict[str, nn.Module], Tensors, Tensors],
) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    nets, _, wide = made
    config = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        hidden_act="quick_gelu", bos_token_id=49406, eos_token_id=49407,
    )  # fmt: skip
    model = CLIPTextModel(config).eval()
    weights = _part(wide, WIDE_TEXT)
    names = set(model.state_dict())
    prefix = "text_model." if any(name.startswith("text_model.") for name in names) else ""
    missing, unexpected = model.load_state_dict({prefix + k: v for k, v in weights.items()}, strict=False)
    assert not unexpected
    assert all(name.endswith("position_ids") for name in missing)
    with torch.no_grad():
        narrow = nets["text"](IDS)
        full = model(IDS).last_hidden_state
    assert narrow.std() > 0.1
    assert (narrow.repeat_interleave(8, 2) - full).abs().max() < 1e-4


def test_the_wide_autoencoder_in_diffusers_is_the_narrow_one(
    made: tuple[dict[str, nn.Module], Tensors, Tensors],
) -> None:
    from diffusers import AutoencoderTiny

    nets, _, wide = made
    weights = _part(wide, WIDE_VAE)
    taesd = AutoencoderTiny().eval()
    # diffusers' decoder has TAESD's clamp in its forward, so its module numbers are one less.
    renamed = {}
    for name, value in weights.items():
        net, _, rest = name.partition(".")
        if net == "taesd_encoder":
            renamed[f"encoder.layers.{rest}"] = value
        elif net == "taesd_decoder":
            index, _, inner = rest.partition(".")
            renamed[f"decoder.layers.{int(index) - 1}.{inner}"] = value
    taesd.load_state_dict(renamed)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        latents = nets["vae.encoder"](images)
        decoded = nets["vae.decoder"](latents)
        assert (taesd.encode(images * 2 - 1).latents - latents).abs().max() < 1e-4
        assert (taesd.decode(latents).sample - (decoded * 2 - 1)).abs().max() < 1e-4
    assert float(weights["vae_scale"]) == pytest.approx(0.18215, abs=1e-8)


def test_dividing_loses_nothing_in_fp16(made: tuple[dict[str, nn.Module], Tensors, Tensors]) -> None:
    """The compact file holds the divided weights, so multiplying back and dividing again gives the same fp16."""
    _, packed, _ = made
    again = pack_state(narrow_state(packed))
    assert all(torch.equal(packed[key], again[key]) for key in packed)


def test_the_file_is_the_same_bytes_every_time(
    made: tuple[dict[str, nn.Module], Tensors, Tensors], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    _, packed, wide = made
    first = tmp_path / "first.safetensors"
    with first.open("wb") as handle:
        digest = base.write_checkpoint(packed, handle)
    assert base.sha256_of(first) == digest
    assert base.write_checkpoint(packed, io.BytesIO()) == digest
    loaded = load_file(first)
    assert loaded.keys() == wide.keys()
    assert all(torch.equal(loaded[name].float(), wide[name]) for name in wide)


def _grown(small: nn.Module, large: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """*large* grown from *small* (its zeros stirred first) gives the same for *x*; the loss it starts from."""
    for parameter in small.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    grow(large, small.state_dict())
    with torch.no_grad():
        assert (small(x) - large(x)).abs().max() < 1e-4
    loss: torch.Tensor = large(x).square().mean()
    return loss


def test_a_grown_autoencoder_starts_as_the_same_function() -> None:
    torch.manual_seed(1)
    decoder = make_decoder((12, 16, 16, 24))
    _grown(make_decoder((8, 8, 16, 16)), decoder, torch.randn(2, 4, 8, 8)).backward()
    # The new channels take part as soon as it learns.
    gradient = decoder[19].weight.grad
    assert gradient is not None and gradient[:, 8:].abs().max() > 0
    encoder = make_encoder((12, 16, 16, 24))
    _grown(make_encoder((8, 8, 16, 16)), encoder, torch.rand(2, 3, 64, 64)).backward()
    gradient = encoder[14].weight.grad
    assert gradient is not None and gradient[:, 16:].abs().max() > 0


def test_widths_are_read_off_the_weights() -> None:
    assert encoder_widths(make_encoder((8, 16, 24, 32)).state_dict()) == [8, 16, 24, 32]
    assert decoder_widths(make_decoder((16, 24, 32, 40)).state_dict()) == [16, 24, 32, 40]
