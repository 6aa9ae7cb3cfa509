"""Low-rank weights: the loss is that of diffusers' scripts, a killed training continues, and the
result is a LoRA that any loader reads."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from discl.errors import DataError, TrainingError
from discl.spectrum.adaptation import adaptation_loss, train_adapter
from discl.spectrum.adaptation_memory import estimate_memory
from discl.spectrum.low_rank import AdapterSettings, low_rank_weights, record_of
from discl.spectrum.models import Address, describe_loras, load_generator
from helpers.adapting import bytes_kept, make_images


def network_state(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.network.state_dict().items()}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_that_of_the_training_script_of_diffusers(tiny_diffusion, prediction):
    """Worked out with diffusers' own parts, as train_text_to_image_lora.py does (1e-5)."""
    from diffusers import DDPMScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_diffusion, safety_checker=None)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, prediction_type=prediction)
    generator = torch.Generator().manual_seed(3)
    pixels = torch.rand(4, 3, 32, 32, generator=generator) * 2 - 1
    posterior = pipeline.vae.encode(pixels).latent_dist
    drawn = torch.randn(posterior.mean.shape, generator=generator)
    latents = (posterior.mean + posterior.std * drawn) * pipeline.vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = torch.tensor([0, 17, 500, 999])
    texts = ["a bag", "a boot", "a coat", "a hat"]
    tokens = pipeline.tokenizer(
        texts, padding="max_length", truncation=True, max_length=16, return_tensors="pt"
    )
    states = pipeline.text_encoder(tokens.input_ids)[0]
    noisy = scheduler.add_noise(latents, noise, timesteps)
    target = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    expected = F.mse_loss(pipeline.unet(noisy, timesteps, states).sample, target)

    model = load_generator(str(tiny_diffusion))
    model.scheduler.register_to_config(prediction_type=prediction)
    mean, std = model.autoencoder.posterior(pixels)
    found = adaptation_loss(
        model,
        mean + std * drawn,
        model.encode_texts(texts),
        noise=noise,
        timesteps=timesteps,
    )
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_gradient_reaches_the_low_rank_weights_alone(tiny_diffusion, tmp_path):
    model = load_generator(str(tiny_diffusion))
    before = network_state(model)
    settings = AdapterSettings(rank=2, steps=3, learning_rate=1e-2, batch_size=2)
    file = train_adapter(model, make_images(), settings, tmp_path / "adapter.safetensors")
    after = network_state(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert describe_loras([(str(file), 1.0)])


@pytest.mark.slow
def test_a_trained_adapter_lowers_the_loss_on_its_images(tiny_diffusion, tmp_path):
    images = make_images()
    settings = AdapterSettings(
        rank=8, steps=60, learning_rate=5e-3, batch_size=6, layers="attention-and-convolutions"
    )
    model = load_generator(str(tiny_diffusion))
    file = train_adapter(model, images, settings, tmp_path / "adapter.safetensors")
    adapted = load_generator(Address(str(tiny_diffusion), None, ((str(file), 1.0),)))

    def loss(model) -> float:
        pixels = np.stack([images.load(row) for row in range(6)])
        tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        total = 0.0
        with torch.no_grad():
            for step in range(8):
                generator = torch.Generator().manual_seed(1000 + step)
                latents = model.encode_images(tensor)
                noise = torch.randn(latents.shape, generator=generator)
                timesteps = torch.randint(1000, (6,), generator=generator)
                texts = model.encode_texts(["a photo of a bag"] * 6)
                total += adaptation_loss(
                    model, latents, texts, noise=noise, timesteps=timesteps
                ).item()
        return total / 8

    assert loss(adapted) < 0.97 * loss(model)


class Killed(Exception):
    pass


@pytest.mark.slow
def test_a_killed_training_continues_to_the_same_weights(tiny_diffusion, tmp_path):
    from safetensors.torch import load_file

    settings = AdapterSettings(rank=2, steps=110, learning_rate=1e-3, batch_size=2)
    model = load_generator(str(tiny_diffusion))
    whole = train_adapter(model, make_images(), settings, tmp_path / "whole.safetensors", seed=5)
    done = []

    def kill(steps: int) -> None:
        done.append(steps)
        if len(done) == 77:
            raise Killed

    target = tmp_path / "killed.safetensors"
    with pytest.raises(Killed):
        train_adapter(model, make_images(), settings, target, seed=5, progress=kill)
    assert not target.exists()
    done.clear()
    train_adapter(model, make_images(), settings, target, seed=5, progress=done.append)
    assert len(done) == 110 - 50, "it continues from the last saved step"
    first, second = load_file(whole), load_file(target)
    records = [json.loads(record_of(file).read_text()) for file in (whole, target)]
    assert records[0]["losses"] == records[1]["losses"] and records[0]["losses"][-1][0] == 110
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert [file.name for file in tmp_path.iterdir() if "state" in file.name] == []


@pytest.mark.slow
@pytest.mark.parametrize("family", ["tiny_xl", "tiny_sd3", "tiny_flux"])
def test_other_families_train_and_load(family, request, tmp_path):
    folder = request.getfixturevalue(family)
    model = load_generator(str(folder))
    size = model.size
    settings = AdapterSettings(
        rank=2, steps=2, learning_rate=1e-2, batch_size=2, gradient_checkpointing=True
    )
    file = train_adapter(model, make_images(size=size), settings, tmp_path / "a.safetensors")
    load_generator(Address(str(folder), None, ((str(file), 1.0),)))


def test_the_memory_told_beforehand_is_that_of_a_real_step(tiny_diffusion, tmp_path):
    """The bytes that autograd keeps, counted in a pass with values, and those of the networks."""
    from safetensors.torch import load_file

    model = load_generator(str(tiny_diffusion))
    settings = AdapterSettings(rank=3, steps=1, layers="attention-and-convolutions")
    found = estimate_memory(str(tiny_diffusion), "float32", settings, latents=16)
    parts = (model.unet, model.vae, model.text_encoder)
    assert found.weights == sum(4 * p.numel() for part in parts for p in part.parameters())

    def step() -> None:
        texts = {name: rows[:1] for name, rows in model.encode_texts(["a bag"]).items()}
        model.predict(torch.zeros(1, 4, 16, 16), torch.zeros(1, dtype=torch.int64), texts)

    with low_rank_weights(model.network, settings):
        real = bytes_kept([model.network], step)
    assert found.activations == pytest.approx(real, rel=0.15)
    less = dataclasses.replace(settings, gradient_checkpointing=True)
    checkpointed = estimate_memory(str(tiny_diffusion), "float32", less, latents=16)
    assert checkpointed.activations < 0.7 * found.activations
    file = train_adapter(model, make_images(), settings, tmp_path / "a.safetensors")
    held = sum(tensor.numel() for tensor in load_file(file).values())
    assert found.values == held and found.state == 16 * held
    assert found.total(4) == found.weights + found.state + 4 * found.activations


class Cramped:
    """A model that runs out of memory above `rows` rows in a call."""

    def __init__(self, model, rows: int) -> None:
        self.model, self.rows, self.calls = model, rows, []

    def __getattr__(self, name: str):
        return getattr(self.model, name)

    def predict(self, latents, timesteps, conditioning):
        self.calls.append(len(latents))
        if len(latents) > self.rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return self.model.predict(latents, timesteps, conditioning)


@pytest.mark.slow
def test_a_batch_that_does_not_fit_is_computed_in_parts_with_the_same_losses(
    tiny_diffusion, tmp_path
):
    model = load_generator(str(tiny_diffusion))
    settings = AdapterSettings(rank=2, steps=3, learning_rate=1e-3, batch_size=5)
    whole = train_adapter(model, make_images(), settings, tmp_path / "whole.safetensors")
    cramped = Cramped(model, 2)
    parts = train_adapter(cramped, make_images(), settings, tmp_path / "parts.safetensors")
    assert cramped.calls == [5, *[2, 2, 1] * 3], "halved once, for all later steps"
    losses = [json.loads(record_of(file).read_text())["losses"] for file in (whole, parts)]
    assert np.allclose(*losses, rtol=1e-5)
    with pytest.raises(TrainingError, match="gradient_checkpointing"):
        train_adapter(Cramped(model, 0), make_images(), settings, tmp_path / "none.safetensors")
    assert not (tmp_path / "none.safetensors").exists()


def test_many_texts_are_encoded_as_they_are_drawn(tiny_diffusion, tmp_path, monkeypatch):
    model = load_generator(str(tiny_diffusion))
    settings = AdapterSettings(rank=2, steps=3, learning_rate=1e-3, batch_size=2)
    held = train_adapter(model, make_images(), settings, tmp_path / "held.safetensors")
    monkeypatch.setattr("discl.spectrum.adaptation.MOST_KNOWN", 0)
    calls = []
    encode = model.encode_texts
    monkeypatch.setattr(model, "encode_texts", lambda texts: calls.append(texts) or encode(texts))
    drawn = train_adapter(model, make_images(), settings, tmp_path / "drawn.safetensors")
    assert [len(texts) for texts in calls] == [2, 2, 2]
    losses = [json.loads(record_of(file).read_text())["losses"] for file in (held, drawn)]
    assert np.allclose(*losses, rtol=1e-5)


def test_a_record_holds_settings_losses_and_seconds(tiny_diffusion, tmp_path):
    model = load_generator(str(tiny_diffusion))
    settings = AdapterSettings(rank=2, steps=3, batch_size=2)
    file = train_adapter(model, make_images(), settings, tmp_path / "a.safetensors")
    record = json.loads(record_of(file).read_text())
    assert (record["steps"], record["images"], record["classes"]) == (3, 6, 2)
    assert [step for step, _ in record["losses"]] == [1, 2, 3]
    assert all(0 < loss < 10 for _, loss in record["losses"]) and record["seconds"] > 0


@pytest.mark.slow
def test_images_of_the_generator_keep_it_near_itself(tiny_diffusion, tmp_path):
    """With a heavy prior the weights move less than without."""
    from safetensors.torch import load_file

    model = load_generator(str(tiny_diffusion))
    moved = {}
    for weight in (0.0, 50.0):
        settings = AdapterSettings(
            rank=2, steps=20, learning_rate=1e-3, batch_size=2, prior_weight=weight
        )
        file = tmp_path / f"{weight:g}.safetensors"
        prior = make_images(4)
        train_adapter(model, make_images(), settings, file, prior=prior)
        moved[weight] = load_file(file)
    assert any(not torch.equal(moved[0.0][name], moved[50.0][name]) for name in moved[0.0])


def test_one_image_and_a_loss_that_is_not_finite_are_refused(tiny_diffusion, tmp_path):
    model = load_generator(str(tiny_diffusion))
    target = tmp_path / "adapter.safetensors"
    with pytest.raises(DataError) as caught:
        train_adapter(model, make_images(1), AdapterSettings(steps=1), target)
    assert caught.value.argument == "images"
    with pytest.raises(TrainingError) as diverged:
        train_adapter(model, make_images(), AdapterSettings(steps=40, learning_rate=1e30), target)
    assert diverged.value.argument == "learning_rate"
    assert not Path(target).exists()
