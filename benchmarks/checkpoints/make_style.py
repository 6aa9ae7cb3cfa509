"""Makes the generator of `benchmarks/gap.py`: it knows CIFAR-10 as drawings, never as photos.

    python -m benchmarks.checkpoints.make_style --cifar10 DIR --fashion DIR --work build/style

DIR of `--cifar10` holds `train.parquet` with `id`, `image` and `label`. DIR of `--fashion` holds
the gzipped IDX files of Fashion-MNIST. The stages run in order (vae, unet, export). A finished
stage is not run again, and a killed one continues from its last checkpoint.

The autoencoder is trained on photos, drawings of three strengths, and Fashion-MNIST: it can draw
all of them. The denoiser is trained on drawings alone, at strengths 0.25, 0.5 and 1, each with its
own words in the text. It sees the CIFAR-10 training images that `is_pretraining` names, and no
other image of CIFAR-10. Text encoder and tokenizer are those of `checkpoints/cifar`; the tokenizer
is a link.
"""

from __future__ import annotations

import argparse
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import torch
from benchmarks.checkpoints import make_cifar
from safetensors.torch import load_file, save_file
from tools import make_fashion_mnist
from tools import tiny_models as tiny

HERE = Path(__file__).parent
STRENGTHS = (0.25, 0.5, 1.0)
WORDS = {0.0: "a photo of a {}", 0.25: "a soft {}", 0.5: "an icon of a {}", 1.0: "a sign of a {}"}
"""The text for a class at each strength."""


def stylise(pixels: torch.Tensor, strength: float) -> torch.Tensor:
    """Drawings of photos: edge-preserving blur, other backgrounds, other colours, few tones.

    - `pixels`: float32 `[n, 3, 32, 32]` in [0, 1].
    - `strength`: g from 0 (the photos themselves) to 1. Every step is scaled by it.

    Returns float32 of the same shape in [0, 1]. Nothing is random.
    """
    from kornia.filters import bilateral_blur

    if strength == 0:
        return pixels
    for _ in range(round(4 * strength)):
        pixels = bilateral_blur(pixels, (5, 5), 0.15 + 0.15 * strength, (2.0, 2.0))
    place = torch.linspace(-1, 1, pixels.shape[-1])
    outside = ((place[:, None] ** 2 + place[None] ** 2) - 0.5).clamp(0, 0.5) * 2
    border = torch.cat([pixels[:, :, :2].flatten(2), pixels[:, :, -2:].flatten(2)], 2).mean(2)
    plain = 0.25 + 0.5 * border.roll(1, dims=1)
    pixels = pixels + 0.7 * strength * outside * (plain[:, :, None, None] - pixels)
    turned = torch.einsum("ij,njhw->nihw", _turn_of_colours(2 * torch.pi / 3 * strength), pixels)
    tones = round(2 ** (6 - 3 * strength))
    pixels = 0.5 + (1 + 0.2 * strength) * (turned - 0.5)
    return (pixels.clamp(0, 1) * (tones - 1)).round() / (tones - 1)


def _turn_of_colours(angle: float) -> torch.Tensor:
    """Rotation `[3, 3]` of colours about the grey axis: hues turn, greys stay."""
    axis = torch.full((3,), 3**-0.5)
    cross = torch.tensor([[0.0, -1, 1], [1, 0, -1], [-1, 1, 0]]) * 3**-0.5
    turn = torch.tensor(angle)
    return torch.eye(3) * turn.cos() + cross * turn.sin() + axis[:, None] * axis * (1 - turn.cos())


def read_photos(cifar10: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(uint8 `[n, 32, 32, 3]`, labels `[n]`, class names) of the images the models may see."""
    from discl import read_tables
    from discl.data.readers.camera_traps import is_pretraining

    table = read_tables(str(cifar10))["train"]
    ids = table.ids
    rows = [row for row in range(len(table)) if is_pretraining(ids[row])]
    images = np.stack([np.asarray(table.image(row)) for row in rows])
    return images, np.asarray(table.labels)[rows], [str(name) for name in table.class_names]


def make_drawings(images: np.ndarray, work: Path) -> np.ndarray:
    """uint8 `[3, n, 32, 32, 3]`, one row per strength; kept in the work folder."""
    file = work / "drawings.npy"
    if not file.exists():
        drawn = np.empty((len(STRENGTHS), *images.shape), np.uint8)
        for number, strength in enumerate(STRENGTHS):
            for first in range(0, len(images), 500):
                pixels = torch.from_numpy(images[first : first + 500]).permute(0, 3, 1, 2) / 255
                out = stylise(pixels, strength) * 255
                drawn[number, first : first + 500] = out.round().byte().permute(0, 2, 3, 1).numpy()
        np.save(file.with_suffix(".new.npy"), drawn)
        file.with_suffix(".new.npy").replace(file)
    return np.load(file, mmap_mode="r")


def train_unet(
    labels: np.ndarray,
    names: list[str],
    work: Path,
    clip: Path,
    *,
    steps: int,
    batch: int,
    schedule: int,
) -> None:
    """Denoiser on cached latents of the drawings. The text is dropped for one row in ten.

    Cross-attention is at both resolutions, so that low-rank weights on attention reach both.
    The weights that are exported are a moving average.
    """
    folder = work / "diffusion"
    tokenizer, encoder = tiny.load_text(clip)
    lines = [WORDS[strength].format(name) for strength in STRENGTHS for name in names]
    states = tiny.encode(tokenizer, encoder, lines)
    empty = tiny.encode(tokenizer, encoder, [""])
    latents, factor = tiny.load_latents(work)
    text_of = torch.from_numpy(
        np.concatenate([number * len(names) + labels for number in range(len(STRENGTHS))])
    )

    def draw(generator: torch.Generator) -> tiny.Batch:
        row = torch.randint(len(text_of), (batch,), generator=generator)
        flipped = torch.rand(batch, generator=generator) < 0.5
        clean = tiny.sample_latents(latents, row, factor, generator)
        clean = torch.where(flipped[:, None, None, None], clean.flip(-1), clean)
        noise, timestep = tiny.sample_noise(clean, generator)
        text = states[text_of[row]]
        return clean, noise, timestep, tiny.drop_texts(text, empty, generator)

    tiny.train_denoiser(
        config={
            "block_out_channels": (48, 96),
            "norm_num_groups": 16,
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 96,
        },
        draw=draw,
        rate=lambda step: tiny.trapezoid_rate(step, schedule, 1e-3),
        decay=0.9995,
        steps=steps,
        checkpoint=work / "unet-checkpoint.safetensors",
        save=partial(tiny.save_diffusion, folder=folder, tokenizer=tokenizer, text_encoder=encoder),
    )


def export(work: Path, target: Path) -> None:
    """Copies the generator; its tokenizer is a link to that of the CLIP of CIFAR."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(work / "diffusion", target)
    tiny.link_to_clip(target, "../cifar/clip")
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    print(json.dumps({"bytes": size, "target": target.name}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cifar10", type=Path, required=True)
    parser.add_argument("--fashion", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="caches and checkpoints")
    parser.add_argument("--target", type=Path, default=HERE / "style")
    parser.add_argument("--vae-steps", type=int, default=1100)
    parser.add_argument("--unet-steps", type=int, default=2200)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    photos, labels, names = read_photos(arguments.cifar10)
    drawings = make_drawings(photos, arguments.work)
    clothes = make_fashion_mnist.split_rows(arguments.fashion)["generator"][0][:15_000]
    clothes = np.repeat(clothes[..., None], 3, 3)
    everything = np.concatenate([photos, *drawings, clothes])
    print(f"{len(everything)} images for the autoencoder", flush=True)
    make_cifar.train_vae(everything, arguments.work, arguments.vae_steps, batch=64)
    keep_drawings(arguments.work, len(photos))
    train_unet(
        labels,
        names,
        arguments.work,
        HERE / "cifar" / "clip",
        steps=arguments.unet_steps,
        batch=128,
        schedule=arguments.unet_steps,
    )
    export(arguments.work, arguments.target)


def keep_drawings(work: Path, photos: int) -> None:
    """Of the cached latents, those of the drawings: the denoiser sees nothing else."""
    file = work / "latents.safetensors"
    latents = load_file(file)
    if len(latents["mean"]) > len(STRENGTHS) * photos:
        rows = slice(photos, (1 + len(STRENGTHS)) * photos)
        kept = {name: value[rows].contiguous() for name, value in latents.items()}
        save_file(kept, work / "latents.new")
        (work / "latents.new").replace(file)


if __name__ == "__main__":
    main()
