"""The distillation of `benchmarks/lcm.py`: its teacher's step, its boundary, and what it moves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from benchmarks.lcm import GUIDANCE, SETTINGS, SPACING, Distillation
from diffusers import DDIMScheduler

from discl.spectrum.low_rank import low_rank_weights
from discl.spectrum.models import load_generator


@pytest.fixture(scope="module")
def parts(tiny_diffusion: Path) -> tuple[Distillation, torch.Tensor, dict[str, torch.Tensor]]:
    """A distillation, latents of two images, and the conditioning of their prompts."""
    model = load_generator(str(tiny_diffusion))
    latents = torch.randn(
        2, *model.latent_shape(32, 32), generator=torch.Generator().manual_seed(0)
    )
    with torch.no_grad():
        negative = model.encode_texts([""], negative=True)
        conditioning = model.encode_texts(["a photo of a bag", "a photo of a hat"])
    return Distillation(model, negative), latents, conditioning


@pytest.mark.parametrize("begin", [SPACING - 1, 499, 999])
@torch.no_grad()
def test_the_teacher_takes_a_guided_step_of_ddim(parts, begin: int) -> None:
    distillation, latents, conditioning = parts
    model = distillation.model
    scheduler = DDIMScheduler.from_config(model.scheduler.config)
    scheduler.set_timesteps(1000 // SPACING)
    at = torch.tensor([begin, begin])
    negative = {
        name: each.expand(2, *each.shape[1:]) for name, each in distillation.negative.items()
    }
    without, prompt = (model.predict(latents, at, each) for each in (negative, conditioning))
    guided = without + GUIDANCE * (prompt - without)
    wanted = scheduler.step(guided, begin, latents).prev_sample
    found = distillation._teach(latents, at, (at - SPACING).clamp_min(0), conditioning)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_student_leaves_an_image_without_noise_as_it_is(parts) -> None:
    distillation, latents, conditioning = parts
    start = torch.zeros(2, dtype=torch.long)
    assert torch.equal(distillation._jump(latents, start, conditioning), latents)


def test_only_the_low_rank_weights_of_the_student_move(parts) -> None:
    distillation, latents, conditioning = parts
    with low_rank_weights(distillation.model.network, SETTINGS) as weights:
        rng = torch.Generator().manual_seed(0)
        loss = distillation.loss(latents, conditioning, rng)
        loss.backward()
        moved = {name for name, each in weights.items() if each.grad.abs().max() > 0}
        assert loss > 0 and moved and all("lora" in name for name in weights)
        grown = [
            name
            for name, each in distillation.model.network.named_parameters()
            if "lora" not in name and each.grad is not None
        ]
        assert not grown
