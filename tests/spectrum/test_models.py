"""Loading a checkpoint: what a good folder gives, and the errors of bad ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from discl.errors import CheckpointError
from discl.spectrum.models import describe_generator, load_generator
from discl.spectrum.models.description import load_scheduler
from discl.spectrum.models.families import SD
from discl.spectrum.models.schedules import make_ddim


@pytest.fixture
def copy(tiny_diffusion: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint that a test may spoil."""
    return Path(shutil.copytree(tiny_diffusion, tmp_path / "checkpoint"))


def test_sizes_of_a_good_folder(tiny_diffusion: Path) -> None:
    model = load_generator(str(tiny_diffusion))
    assert (
        model.size == 32
        and model.latent_shape(32, 32) == (4, 8, 8)
        and model.latent_shape(48, 32) == (4, 12, 8)
    )
    assert model.dtype == torch.float32 and model.device == torch.device("cpu")
    assert not any(part.training for part in (model.unet, model.vae, model.text_encoder))
    with torch.inference_mode():
        texts = model.encode_texts(["a shirt", "a very long text " * 50])
        latents = model.encode_images(torch.zeros(3, 3, 32, 32))
        pictures = model.decode(latents)
        output = model.predict(latents[:2], torch.tensor([1, 951]), texts)
    assert {name: tuple(tensor.shape) for name, tensor in texts.items()} == {
        "encoder_hidden_states": (2, 16, 32)
    }
    assert (
        latents.shape == (3, 4, 8, 8)
        and latents.dtype == output.dtype == torch.float32
        and output.shape == (2, 4, 8, 8)
    )
    assert pictures.shape == (3, 32, 32, 3) and pictures.dtype == torch.uint8


@pytest.mark.parametrize(
    ("dtype", "unet", "vae"),
    [("bfloat16", torch.bfloat16, torch.bfloat16), ("float16", torch.float16, torch.float32)],
)
def test_dtype_of_the_weights(
    tiny_diffusion: Path, dtype: str, unet: torch.dtype, vae: torch.dtype
) -> None:
    model = load_generator(str(tiny_diffusion), dtype)
    assert (model.dtype, model.vae.dtype) == (unet, vae)


def test_description_needs_no_weights_and_follows_the_content(
    tiny_diffusion: Path, copy: Path
) -> None:
    found = describe_generator(str(tiny_diffusion))
    assert (found.size, found.multiple, found.distilled) == (32, 4, False) and describe_generator(
        str(copy)
    ) == found
    settings = copy / "scheduler" / "scheduler_config.json"
    settings.write_text(settings.read_text().replace('"epsilon"', '"v_prediction"'))
    moved = Path(shutil.copytree(copy, copy.with_name("moved")))
    assert (
        describe_generator(str(moved)).model != found.model
        and describe_generator(str(moved)).scheduler != found.scheduler
    )


@pytest.mark.filterwarnings("ignore::FutureWarning:diffusers.*")
def test_schedule_of_a_checkpoint_with_another_sampler_is_that_of_diffusers(copy: Path) -> None:
    """diffusers turns clipping off and sets the offset; another sampler's file does not."""
    (copy / "scheduler" / "scheduler_config.json").unlink()
    DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    ).save_pretrained(copy / "scheduler")
    published = DDIMScheduler.from_config(
        DPMSolverMultistepScheduler.from_pretrained(copy / "scheduler").config
    )
    assert published.config.clip_sample
    pipeline = StableDiffusionPipeline.from_pretrained(
        copy, scheduler=published, safety_checker=None
    )
    ours = load_scheduler(copy, SD)
    pipeline.scheduler.set_timesteps(20)
    for name in (
        "clip_sample",
        "steps_offset",
        "prediction_type",
        "timestep_spacing",
        "set_alpha_to_one",
        "num_train_timesteps",
    ):
        assert ours.config[name] == pipeline.scheduler.config[name]
    schedule = make_ddim(ours, 20)
    assert schedule.clip is None and torch.equal(schedule.timesteps, pipeline.scheduler.timesteps)


def only_pickled(folder: Path) -> None:
    for file in folder.rglob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))


def unet_pickled(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_suffix(".bin"))


def no_weights(folder: Path) -> None:
    for file in folder.rglob("*.safetensors"):
        file.unlink()


def half_written(folder: Path) -> None:
    file = folder / "text_encoder" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def no_tokenizer_or_scheduler(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")
    shutil.rmtree(folder / "scheduler")


def link_to_nowhere(folder: Path) -> None:
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.unlink()
    file.symlink_to("../../blobs/0123")


def no_vocabulary(folder: Path) -> None:
    (folder / "tokenizer" / "tokenizer.json").unlink()


def no_scheduler_file(folder: Path) -> None:
    (folder / "scheduler" / "scheduler_config.json").unlink()


def video(folder: Path) -> None:
    file = folder / "model_index.json"
    file.write_text(
        file.read_text().replace("StableDiffusionPipeline", "StableVideoDiffusionPipeline")
    )


def unknown_settings(folder: Path) -> None:
    (folder / "unet" / "config.json").write_text(json.dumps({"block_out_channels": [32]}))


def without(part: str, sign: str) -> Callable[[Path], None]:
    """Takes the tensors whose names hold `sign` out of a part's file."""

    def spoil(folder: Path) -> None:
        (file,) = (folder / part).glob("*.safetensors")
        save_file(
            {name: tensor for name, tensor in load_file(file).items() if sign not in name},
            file,
            {"format": "pt"},
        )

    return spoil


def changed(part: str, file: str, **settings: object) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        path = folder / part / file
        path.write_text(json.dumps(json.loads(path.read_text()) | settings))

    return spoil


SPOILED: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "no folder": (
        shutil.rmtree,
        ["no checkpoint folder", "hub name", "embedded:fashion-mnist/diffusion"],
    ),
    "a file": (
        lambda folder: (shutil.rmtree(folder), folder.write_text("")),
        ["is a file", "folder", "diffusers"],
    ),
    "no VAE": (
        lambda folder: shutil.rmtree(folder / "vae"),
        ["vae missing", "present: model_index.json", "Expected diffusers' layout"],
    ),
    "no tokenizer or scheduler": (
        no_tokenizer_or_scheduler,
        ["tokenizer, scheduler missing", "Expected diffusers' layout"],
    ),
    "no weights": (no_weights, ["holds no weights", "*.safetensors"]),
    "only pickled": (
        only_pickled,
        ["only pickled weights", ".bin", "refused", "discl convert"],
    ),
    "UNet pickled": (
        unet_pickled,
        ["unet/ holds no *.safetensors", "refused", "discl convert"],
    ),
    "half a file": (half_written, ["cannot be loaded"]),
    "another family": (video, ["StableVideoDiffusionPipeline", "not supported", "SDXL", "FLUX.1"]),
    "a CLIP": (
        lambda folder: (folder / "model_index.json").unlink(),
        ["model_index.json is missing", "present: scheduler", "text-to-image"],
    ),
    "no index": (
        lambda folder: (folder / "model_index.json").write_text("[]"),
        ["model_index.json is a list", "Download"],
    ),
    "no vocabulary": (no_vocabulary, ["tokenizer' has no vocabulary", "vocab.json", "Download"]),
    "no settings of the tokenizer": (
        lambda folder: (folder / "tokenizer" / "tokenizer_config.json").unlink(),
        ["tokenizer' has no tokenizer_config.json", "Download"],
    ),
    "half a UNet": (
        without("unet", "mid_block"),
        ["unet' has no mid_block.attentions.0.", " more: ", "missing", "Download"],
    ),
    "no token embedding": (
        without("text_encoder", "token_embedding"),
        ["text_encoder' has no", "token_embedding.weight: 1 "],
    ),
    "half a VAE": (
        without("vae", "decoder.conv_out"),
        ["vae' has no decoder.conv_out.bias, decoder.conv_out.weight: 2 "],
    ),
    "another diffusion": (
        changed("scheduler", "scheduler_config.json", _class_name="EDMEulerScheduler"),
        ["made for the sampler EDMEulerScheduler", "DDIM"],
    ),
    "a flow": (
        changed(
            "scheduler", "scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler"
        ),
        ["FlowMatchEuler", "other images"],
    ),
    "guidance distilled": (
        changed("unet", "config.json", time_cond_proj_dim=16),
        ["distilled guidance", "LatentConsistencyModel"],
    ),
    "a link to nowhere": (
        link_to_nowhere,
        ["unet/diffusion_pytorch_model.safetensors links to", "cp -rL"],
    ),
    "no scheduler file": (no_scheduler_file, ["scheduler_config.json is missing", "Download"]),
    "other settings": (unknown_settings, ["cannot be loaded"]),
}


@pytest.mark.parametrize("case", SPOILED)
def test_bad_folder_is_told_what_is_wrong(copy: Path, case: str) -> None:
    spoil, words = SPOILED[case]
    spoil(copy)
    with pytest.raises(CheckpointError) as caught:
        load_generator(str(copy))
    message = str(caught.value)
    assert str(copy) in message and all(word in message for word in words), message


def test_old_names_of_attention_are_no_missing_weights(copy: Path, tiny_diffusion: Path) -> None:
    """The VAE of Stable Diffusion 1.x is published with them."""
    (file,) = (copy / "vae").glob("*.safetensors")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = load_file(file)
    for name in [name for name in state if "attentions" in name]:
        for new, before in old.items():
            if f".{new}." in name:
                state[name.replace(f".{new}.", f".{before}.")] = state.pop(name)
    assert any("proj_attn" in name for name in state)
    save_file(state, file, {"format": "pt"})
    pixels = torch.rand(1, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(
            load_generator(str(copy)).encode_images(pixels),
            load_generator(str(tiny_diffusion)).encode_images(pixels),
        )


def test_pickled_weights_beside_safetensors_are_not_read(copy: Path) -> None:
    for name in (
        "unet/diffusion_pytorch_model.bin",
        "vae/diffusion_pytorch_model.bin",
        "text_encoder/pytorch_model.bin",
    ):
        (copy / name).write_bytes(b"not a pickle at all")
    assert load_generator(str(copy)).size == 32


def test_a_vae_without_its_channels_is_told(copy: Path) -> None:
    changed("vae", "config.json", block_out_channels=None)(copy)
    with pytest.raises(CheckpointError, match="block_out_channels of vae/ is None"):
        describe_generator(str(copy))


def test_size_must_be_a_multiple_of_the_vae_factor(tiny_diffusion: Path) -> None:
    with pytest.raises(CheckpointError, match=r"30 is not a multiple of 4, .* 32") as raised:
        load_generator(str(tiny_diffusion)).latent_shape(32, 30)
    assert raised.value.argument == "size"


def test_more_inference_than_training_steps_are_refused(tiny_diffusion: Path) -> None:
    model = load_generator(str(tiny_diffusion))
    with pytest.raises(CheckpointError, match=r"1001 inference steps exceed the 1000 .* use fewer"):
        model.schedule(1001, 32, 32)


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"thresholding": True}, "thresholding True"), ({"prediction_type": "flow"}, "'flow'")],
)
def test_schedules_that_are_not_ddim_are_refused(settings: dict[str, object], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        make_ddim(DDIMScheduler(**settings), 10)
