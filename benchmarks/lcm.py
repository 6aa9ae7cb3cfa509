"""Distils the embedded generator into few steps without guidance: a stand-in for LCM-LoRAs.

    python -m benchmarks.lcm --out benchmarks/checkpoints/lcm.safetensors   # 25 minutes of one core

Latent consistency distillation of low-rank weights (arXiv 2310.04378, 2311.05556). The student
jumps from any of 50 noise levels to the image. It learns to jump to the same place from there and
from one DDIM step further, which the teacher takes with guidance. The teacher is the student
without its low-rank weights. `lossy.py` has rows with the result, by `sampler: lcm`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor

import discl
from discl.spectrum.low_rank import AdapterSettings, low_rank_weights, save_adapter
from discl.spectrum.models.interface import Conditioning, LatentModel

ROOT = Path(__file__).parents[1]
PHRASES = ROOT / "src/discl/assets/phrases/fashion-mnist.yaml"
GUIDANCE = 3.0
"""That of the recipe `fashion-lt`; built into the student."""
GRID, SPACING = 50, 20
"""Noise levels of the student, and timesteps between two of them."""
SIGMA_DATA, SCALING = 0.5, 10.0
"""Of the boundary condition, as diffusers' LCMScheduler has them."""
HUBER = 1e-3
SETTINGS = AdapterSettings(
    rank=32, steps=3000, learning_rate=5e-4, batch_size=32, layers="attention-and-convolutions"
)


class Distillation:
    """Losses of a student that shares its network with its teacher.

    - `model`: of Stable Diffusion's family with noise prediction; its network has an adapter.
    - `negative`: conditioning of the empty prompt, one row.
    """

    def __init__(self, model: LatentModel, negative: Conditioning) -> None:
        self.model, self.negative = model, negative
        self.alphas = model.scheduler.alphas_cumprod

    def loss(self, latents: Tensor, conditioning: Conditioning, rng: torch.Generator) -> Tensor:
        """Pseudo-Huber loss of one batch (arXiv 2310.04378, algorithm 1, with fixed guidance).

        - `latents`: scaled, `[batch, c, h, w]`; `conditioning`: of their prompts, one row each.
        """
        count = len(latents)
        begin = SPACING * torch.randint(1, GRID + 1, (count,), generator=rng) - 1
        end = (begin - SPACING).clamp_min(0)
        noise = torch.randn(latents.shape, generator=rng)
        noisy = self.model.scheduler.add_noise(latents, noise, begin)
        jumped = self._jump(noisy, begin, conditioning)
        with torch.no_grad():
            network = self.model.network
            network.disable_adapters()
            moved = self._teach(noisy, begin, end, conditioning)
            network.enable_adapters()
            wanted = self._jump(moved, end, conditioning)
        return (((jumped - wanted) ** 2 + HUBER**2).sqrt() - HUBER).mean()

    def _parts(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Signal and noise at timesteps, `[batch, 1, 1, 1]` each."""
        alphas = self.alphas[timesteps].view(-1, 1, 1, 1)
        return alphas.sqrt(), (1 - alphas).sqrt()

    def _jump(self, noisy: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """The student's image; at timestep 0 nearly the input."""
        signal, sigma = self._parts(timesteps)
        predicted = self.model.predict(noisy, timesteps, conditioning)
        clean = (noisy - sigma * predicted) / signal
        scaled = SCALING * timesteps.view(-1, 1, 1, 1)
        skip = SIGMA_DATA**2 / (scaled**2 + SIGMA_DATA**2)
        return skip * noisy + scaled / (scaled**2 + SIGMA_DATA**2) ** 0.5 * clean

    def _teach(
        self, noisy: Tensor, begin: Tensor, end: Tensor, conditioning: Conditioning
    ) -> Tensor:
        """One guided DDIM step of the teacher, from `begin` to `end`."""
        count = len(noisy)
        both = {
            name: torch.cat([tensor.expand(count, *tensor.shape[1:]), conditioning[name]])
            for name, tensor in self.negative.items()
        }
        found = self.model.predict(torch.cat([noisy, noisy]), torch.cat([begin, begin]), both)
        negative, prompt = found.chunk(2)
        predicted = negative + GUIDANCE * (prompt - negative)
        signal, sigma = self._parts(begin)
        clean = (noisy - sigma * predicted) / signal
        signal, sigma = self._parts(end)
        return signal * clean + sigma * predicted


@torch.no_grad()
def read_latents(model: LatentModel) -> tuple[Tensor, np.ndarray, list[str]]:
    """(scaled latents, labels, class names) of the example's real images."""
    table = discl.read_tables("embedded:fashion-mnist/data")["train"]
    parts = []
    for first in range(0, len(table), 256):
        rows = range(first, min(first + 256, len(table)))
        pixels = np.stack([np.asarray(discl.to_square(table.image(row), 32)) for row in rows])
        tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        parts.append(model.encode_images(tensor))
    return torch.cat(parts), np.asarray(table.labels), list(table.class_names)


def distil(target: Path, steps: int) -> dict[str, float | int]:
    """Trains the low-rank weights and writes them; returns what it cost."""
    model = discl.load_generator("embedded:fashion-mnist/diffusion")
    latents, labels, names = read_latents(model)
    phrases = yaml.safe_load(PHRASES.read_text())
    with torch.no_grad():
        texts = {name: model.encode_texts(phrases[name]) for name in names}
        negative = model.encode_texts([""], negative=True)
    distillation, rng = Distillation(model, negative), torch.Generator().manual_seed(0)
    started, losses = time.perf_counter(), []
    with low_rank_weights(model.network, SETTINGS) as weights:
        optimizer = torch.optim.AdamW(weights.values(), lr=SETTINGS.learning_rate, weight_decay=0)
        for step in range(steps):
            rows = torch.randint(len(labels), (SETTINGS.batch_size,), generator=rng)
            drawn = [texts[names[labels[row]]] for row in rows.tolist()]
            conditioning = {}
            for key in negative:
                chosen = torch.randint(1 << 30, (len(drawn),), generator=rng).tolist()
                conditioning[key] = torch.stack(
                    [each[key][at % len(each[key])] for each, at in zip(drawn, chosen, strict=True)]
                )
            for group in optimizer.param_groups:
                group["lr"] = SETTINGS.learning_rate * min(1, 20 * (1 - step / steps))
            optimizer.zero_grad()
            loss = distillation.loss(latents[rows], conditioning, rng)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if (step + 1) % 100 == 0:
                seconds = time.perf_counter() - started
                print(f"{step + 1}: {np.mean(losses[-100:]):.4f}, {seconds:.0f} s", flush=True)
            if (step + 1) % 1000 == 0:
                save_adapter(model, target)
        save_adapter(model, target)
    return {
        "steps": steps,
        "seconds": time.perf_counter() - started,
        "loss_first_100": float(np.mean(losses[:100])),
        "loss_last_100": float(np.mean(losses[-100:])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/lcm.safetensors"))
    parser.add_argument("--steps", type=int, default=SETTINGS.steps)
    asked = parser.parse_args()
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    found = distil(asked.out, asked.steps)
    asked.out.with_suffix(".json").write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
