"""A folder as diffusers saves it is the same base as the single file of the same weights."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import safetensors.torch
import torch

from subjectbooth.tests.layout_pair import NARROW, write_pair
from subjectbooth.tests.small_base import small_subject
from subjectbooth.trainer.base.base_model import BaseModel
from subjectbooth.trainer.base.sd import families
from subjectbooth.trainer.base.sd.schedule import prediction_target
from subjectbooth.trainer.base.sd.unet import predict
from subjectbooth.trainer.base.stored import stored_base
from subjectbooth.trainer.base.stored.stored_base import load_base
from subjectbooth.trainer.config import TrainConfig
from subjectbooth.trainer.errors import SubjectBoothError
from subjectbooth.trainer.events import StepDone
from subjectbooth.trainer.files.digest_memory import FOLDER_VARIABLE
from subjectbooth.trainer.runs.run import Run

pytestmark = pytest.mark.oldest
PROMPT = "a photo of ohwx dog"


@pytest.fixture(autouse=True)
def _narrow_families(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "FAMILIES", tuple(NARROW.values()))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    return {name: write_pair(tmp_path_factory.mktemp("pair"), name) for name in NARROW}


@pytest.fixture
def sd1(pairs: dict[str, tuple[Path, Path]], tmp_path: Path) -> Path:
    """A folder that a test may spoil."""
    return Path(shutil.copytree(pairs["SD 1.x"][1], tmp_path / "pipeline"))


def _train(base: BaseModel, root: Path, **changes: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    config = TrainConfig(
        **{"steps": 3, "learning_rate": 1e-2, "rank": 2, "network_alpha": 2.0, "resolution": 64, **changes}
    )
    run = Run(base, small_subject(), None, config, root, torch.device("cpu"))
    losses = [event.loss for event in run.events() if isinstance(event, StepDone)]
    path = run.folder.finished_lora(3)
    assert path is not None
    return losses, safetensors.torch.load_file(path)


@pytest.mark.parametrize("name", list(NARROW))
@pytest.mark.parametrize("with_text", [False, True])
def test_a_folder_is_the_same_base_as_the_single_file(
    pairs: dict[str, tuple[Path, Path]], tmp_path: Path, name: str, with_text: bool
) -> None:
    single, folder = (load_base(path) for path in pairs[name])
    assert single.family == folder.family == name
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    latents = single.codec.encode(images)
    assert float(latents.std()) > 0.01
    torch.testing.assert_close(folder.codec.encode(images), latents, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(folder.codec.decode(latents), single.codec.decode(latents), atol=1e-5, rtol=1e-5)
    told = [base.prompts.encode([PROMPT])[0] for base in (single, folder)]
    torch.testing.assert_close(told[1].hidden_states, told[0].hidden_states, atol=1e-5, rtol=1e-5)
    assert (told[0].pooled is not None) == (name == "SDXL")
    if told[0].pooled is not None:
        torch.testing.assert_close(told[1].pooled, told[0].pooled, atol=1e-5, rtol=1e-5)
    noise, steps = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([500])
    with torch.no_grad():
        outputs = [predict(base.denoiser.build(torch.float32), noise, steps, told[0]) for base in (single, folder)]
    assert float(outputs[0].std()) > 0.1
    torch.testing.assert_close(outputs[1], outputs[0], atol=1e-6, rtol=1e-6)
    (first, file), (second, again) = (
        _train(base, tmp_path / str(number), train_text_encoder=with_text, lora_targets="attention+mlp")
        for number, base in enumerate((single, folder))
    )
    assert file.keys() == again.keys()
    assert any(key.startswith("lora_te") for key in file) == with_text
    assert second == pytest.approx(first, rel=1e-5)


def test_a_base_is_hashed_once(sd1: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not at each start: that of a base of 7 GB takes 5 to 20 seconds."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "digests"))
    files = sorted(sd1.glob("*/*.safetensors"))
    for file in files:
        os.utime(file, (file.stat().st_atime, file.stat().st_mtime - 3600))
    with mock.patch.object(stored_base, "sha256_of", wraps=stored_base.sha256_of) as hashed:

        def digest(**changes: Any) -> tuple[str, int]:
            hashed.reset_mock()
            found = load_base(sd1, **changes).digest
            return found, sum(isinstance(part, Path) for call in hashed.call_args_list for part in call.args)

        first, count = digest()
        assert count == len(files) == 3
        assert digest() == (first, 0)
        other, count = digest(clip_skip=2)
        assert other != first and count == 3
        shutil.copy2(files[0], tmp_path / "copy")
        with files[0].open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x11")
        assert digest()[0] not in (first, other)
        os.replace(tmp_path / "copy", files[0])
        assert digest()[0] == first


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_file_of_a_base_stays_open(pairs: dict[str, tuple[Path, Path]]) -> None:
    """Its pages would lie in memory beside the model, and Windows would let nobody replace it."""
    for path in pairs["SD 1.x"]:
        base = load_base(path)
        parts = [base.denoiser.build(torch.float32), base.text.build(torch.float32)]
        base.codec.encode(torch.zeros(1, 3, 64, 64))
        held = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.exists()]
        held += Path("/proc/self/maps").read_text().splitlines()
        assert parts and not [one for one in held if str(path) in one]


@pytest.mark.parametrize("name", list(NARROW))
def test_the_unets_names_are_diffusers_own(pairs: dict[str, tuple[Path, Path]], name: str) -> None:
    """diffusers' model of the folder and the one that is trained have the same weights under the same names."""
    from diffusers import UNet2DConditionModel

    theirs = UNet2DConditionModel.from_pretrained(pairs[name][1] / "unet").state_dict()
    ours = load_base(pairs[name][0]).denoiser.build(torch.float32).state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[key], ours[key]) for key in theirs)


def test_sd_2s_unused_last_layer_may_be_missing(pairs: dict[str, tuple[Path, Path]]) -> None:
    single, folder = pairs["SD 2.x"]
    config = json.loads((folder / "text_encoder" / "config.json").read_text("utf-8"))
    assert config["num_hidden_layers"] == NARROW["SD 2.x"].text_encoders[0].layers - 1
    with pytest.raises(SubjectBoothError, match="its last layer"):
        load_base(folder, clip_skip=1)
    assert load_base(single, clip_skip=1).text.clip_layer == -1


def _encoded(path: Path, clip_skip: int | None = None) -> Any:
    return load_base(path, clip_skip).prompts.encode([PROMPT])[0].hidden_states


def test_a_single_file_without_sd_2s_unused_last_layer_is_read(
    pairs: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """As diffusers' own converter writes it."""
    single, path = pairs["SD 2.x"][0], tmp_path / "converted.safetensors"
    state = safetensors.torch.load_file(single)
    shape = NARROW["SD 2.x"].text_encoders[0]
    last = f"{shape.single_file}transformer.resblocks.{shape.layers - 1}."
    kept = {name: tensor for name, tensor in state.items() if not name.startswith(last)}
    assert len(kept) < len(state)
    safetensors.torch.save_file(kept, path)
    assert torch.equal(_encoded(path), _encoded(single))
    with pytest.raises(SubjectBoothError, match="saved without its last layer. Required: clip_skip 2"):
        load_base(path, clip_skip=1)
    # SDXL's second encoder gives the pooled prompt from its last layer: without it the file is broken.
    shape = NARROW["SDXL"].text_encoders[1]
    last = f"{shape.single_file}transformer.resblocks.{shape.layers - 1}."
    state = safetensors.torch.load_file(pairs["SDXL"][0])
    safetensors.torch.save_file({name: tensor for name, tensor in state.items() if not name.startswith(last)}, path)
    with pytest.raises(SubjectBoothError, match="is missing"):
        _encoded(path)


def test_novelais_names_of_the_text_encoder_are_read(pairs: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """Anything and its relatives have no ``text_model.`` in them, which older versions of transformers ask for."""
    single, path = pairs["SD 1.x"][0], tmp_path / "nai.safetensors"
    state = safetensors.torch.load_file(single)
    renamed = {
        name.replace("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."): tensor
        for name, tensor in state.items()
    }
    assert renamed.keys() != state.keys()
    renamed["cond_stage_model.transformer.embeddings.position_ids"] = torch.arange(77)[None]
    safetensors.torch.save_file(renamed, path)
    assert torch.equal(_encoded(path), _encoded(single))


@pytest.mark.parametrize("rescale", [False, True])
def test_the_folders_scheduler_says_how_noise_is_made(tmp_path: Path, rescale: bool) -> None:
    """v-prediction and zero terminal SNR, against diffusers' own scheduler of the same configuration."""
    from diffusers import DDPMScheduler

    _, folder = write_pair(tmp_path, "SDXL", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": rescale})
    base = load_base(folder)
    theirs = DDPMScheduler.from_pretrained(folder / "scheduler")
    torch.testing.assert_close(
        base.denoiser.noise_scheduler.alphas_cumprod, theirs.alphas_cumprod, atol=2e-6, rtol=1e-5
    )
    assert (float(base.denoiser.noise_scheduler.alphas_cumprod[-1]) < 1e-7) == rescale
    latents, noise, steps = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), torch.tensor([700])
    torch.testing.assert_close(
        prediction_target(base.denoiser.noise_scheduler, latents, noise, steps),
        theirs.get_velocity(latents, noise, steps),
        atol=1e-5,
        rtol=1e-4,
    )
    # What a folder says of itself is believed; an option is for what says nothing.
    assert (
        load_base(folder, prediction_type="epsilon").denoiser.noise_scheduler.config["prediction_type"]
        == "v_prediction"
    )


def test_half_precision_and_sharded_folders(sd1: Path) -> None:
    whole = load_base(sd1).denoiser.build(torch.float32).state_dict()
    unet = sd1 / "unet"
    stored = safetensors.torch.load_file(unet / "diffusion_pytorch_model.safetensors")
    (unet / "diffusion_pytorch_model.safetensors").unlink()
    safetensors.torch.save_file(
        {name: tensor.half() for name, tensor in stored.items()}, unet / "diffusion_pytorch_model.fp16.safetensors"
    )
    half = load_base(sd1).denoiser.build(torch.float32).state_dict()
    assert all(torch.equal(half[name], whole[name].half().float()) for name in whole)

    (unet / "diffusion_pytorch_model.fp16.safetensors").unlink()
    names = sorted(stored)
    index = {"weight_map": {}}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        file = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        safetensors.torch.save_file({name: stored[name] for name in part}, unet / file)
        index["weight_map"] |= dict.fromkeys(part, file)
    (unet / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    sharded = load_base(sd1).denoiser.build(torch.float32).state_dict()
    assert all(torch.equal(sharded[name], whole[name]) for name in whole)


def test_old_names_of_the_vaes_attention(sd1: Path) -> None:
    """Folders of SD 1.x as they were first published."""
    file = sd1 / "vae" / "diffusion_pytorch_model.safetensors"
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    expected = load_base(sd1).codec.encode(images)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in safetensors.torch.load_file(file).items():
        for new, before in old.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{before}.")
        renamed[name] = tensor
    assert any(".query." in name for name in renamed)
    safetensors.torch.save_file(renamed, file)
    torch.testing.assert_close(load_base(sd1).codec.encode(images), expected)


def test_a_folder_of_another_version_of_transformers(sd1: Path) -> None:
    """Names with "text_model." in front and without it mean the same, whichever version is installed."""
    file = sd1 / "text_encoder" / "model.safetensors"
    expected = load_base(sd1).prompts.encode([PROMPT])[0].hidden_states
    stored = safetensors.torch.load(file.read_bytes())  # not mapped: the file is written over
    plain = {name.removeprefix("text_model."): tensor for name, tensor in stored.items()}
    for renamed in (plain, {f"text_model.{name}": tensor for name, tensor in plain.items()}):
        safetensors.torch.save_file(renamed, file)
        assert torch.equal(load_base(sd1).prompts.encode([PROMPT])[0].hidden_states, expected)


def test_all_that_decides_what_the_base_is_counts_in_its_digest(sd1: Path) -> None:
    digests = [
        load_base(sd1).digest,
        load_base(sd1, clip_skip=2).digest,
        load_base(sd1, prediction_type="v_prediction").digest,
    ]
    _config("scheduler", "scheduler_config.json", beta_end=0.013)(sd1)
    digests.append(load_base(sd1).digest)
    _config("vae", "config.json", scaling_factor=0.2)(sd1)
    digests.append(load_base(sd1).digest)
    for part in ("unet", "vae", "text_encoder"):
        path = next((sd1 / part).glob("*.safetensors"))
        stored = safetensors.torch.load(path.read_bytes())
        name = next(iter(stored))
        safetensors.torch.save_file({**stored, name: stored[name] + 1}, path)
        digests.append(load_base(sd1).digest)
    assert len(set(digests)) == len(digests)
    assert load_base(sd1).digest == digests[-1]


def _pickled(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.safetensors").rename(folder / "unet" / "diffusion_pytorch_model.bin")


def _config(part: str, file: str, **changes: Any) -> Any:
    def change(folder: Path) -> None:
        path = folder / part / file
        path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **changes}), "utf-8")

    return change


def _flux(folder: Path) -> None:
    (folder / "unet").rename(folder / "transformer")
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}', "utf-8")


def _index(folder: Path) -> None:
    (folder / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "vae" / "diffusion_pytorch_model.safetensors.index.json").write_text(
        '{"weight_map": {"encoder.conv_in.weight": "../../../secret.safetensors"}}', "utf-8"
    )


def _other_vae(folder: Path) -> None:
    from diffusers import AutoencoderKL

    AutoencoderKL(block_out_channels=(32,), latent_channels=16).save_pretrained(folder / "vae")


def _edit_model(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    stored = safetensors.torch.load_file(file)
    safetensors.torch.save_file({**stored, "conv_in.weight": torch.zeros(32, 8, 3, 3)}, file)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (_pickled, "The weights are in diffusion_pytorch_model.bin. Required: a .safetensors file"),
        (_flux, "The folder holds a FluxPipeline"),
        (_index, "The index does not list files next to it"),
        (_other_vae, "The VAE has 16 latent channels"),
        (_edit_model, "8 input channels: it is an edit model"),
        (lambda folder: shutil.rmtree(folder / "vae"), "The checkpoint has no VAE"),
        (lambda folder: shutil.rmtree(folder / "text_encoder"), "The checkpoint has no text encoder"),
        (lambda folder: shutil.rmtree(folder / "unet"), "The folder has no unet/"),
        (
            _config("scheduler", "scheduler_config.json", _class_name="EDMEulerScheduler"),
            "samples with EDMEulerScheduler",
        ),
        (
            _config("scheduler", "scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler"),
            "samples with Flow",
        ),
        (_config("scheduler", "scheduler_config.json", prediction_type="sample"), "predicts 'sample'"),
        (
            _config("scheduler", "scheduler_config.json", beta_schedule="squaredcos_cap_v2"),
            "The noise schedule is",
        ),
        (_config("unet", "config.json", _class_name="UNet3DConditionModel"), "The UNet is a UNet3DConditionModel"),
        (
            lambda folder: (folder / "scheduler" / "scheduler_config.json").write_text("{", "utf-8"),
            "The configuration is not JSON",
        ),
    ],
)
def test_what_cannot_be_trained_on_is_refused_in_one_sentence(sd1: Path, spoil: Any, sentence: str) -> None:
    spoil(sd1)
    with pytest.raises(SubjectBoothError) as refused:
        load_base(sd1)
    assert sentence in str(refused.value)
