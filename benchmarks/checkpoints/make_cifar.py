"""Makes the stand-in generator and CLIP of the CIFAR benchmarks.

    python -m benchmarks.checkpoints.make_cifar --cifar100 DIR --cifar10 DIR --work build/cifar

One small set of weights serves CIFAR-100-LT and CIFAR-10 in low light. DIR holds `train.parquet`
with `id`, `image` and `label`. The stages run in order: vae, clip, unet, export. A finished stage
is skipped, and a killed one resumes at its last checkpoint. `--unet-steps` may grow from call to
call.

The models see the CIFAR-100 training images outside the long-tailed set of imbalance ratio 50
(which contains that of 100), and the CIFAR-10 training images that `is_pretraining` names. Test
images are not used; the few that CIFAR contains twice, pixel by pixel, are not excluded.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import save_file
from tools import tiny_models as tiny

from discl.data import read_tables, take_long_tail
from discl.data.readers.camera_traps import is_pretraining

ROOT = Path(__file__).resolve().parents[2]
TEMPLATES = ("a photo of a {}", "a photo of {}", "{}")


def read_images(cifar100: Path, cifar10: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(uint8 images `[n, 32, 32, 3]`, labels `[n]`, the 110 classes) that the models may see."""
    coarse, fine = (read_tables(str(folder))["train"] for folder in (cifar10, cifar100))
    in_long_tail = set(take_long_tail(fine, 500, 50, list(range(100)), seed=0))
    rows = [(fine, row, 0) for row in range(len(fine)) if row not in in_long_tail]
    ids = coarse.ids
    rows += [
        (coarse, row, len(fine.class_names))
        for row in range(len(coarse))
        if is_pretraining(ids[row])
    ]
    labels = {id(table): table.labels for table in (fine, coarse)}
    images = np.stack([np.asarray(table.image(row)) for table, row, _ in rows])
    names = [name.replace("_", " ") for name in (*fine.class_names, *coarse.class_names)]
    return images, np.asarray([labels[id(table)][row] + shift for table, row, shift in rows]), names


def texts_of(names: list[str]) -> list[list[str]]:
    """Texts of each class, equally many: templates, and the shipped phrases of CIFAR-100."""
    phrases = yaml.safe_load((ROOT / "src/discl/assets/phrases/cifar100.yaml").read_text())
    lines = []
    for label, name in enumerate(names):
        plain = [template.format(name) for template in TEMPLATES]
        others = plain * 3 + plain[:1]
        lines.append(plain * 3 + ([str(each) for each in phrases[name]] if label < 100 else others))
    return lines


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """float32 `[n, 3, 32, 32]` in [−1, 1] of uint8 `[n, 32, 32, 3]`."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float() / 127.5 - 1


def train_clip(
    images: np.ndarray, labels: np.ndarray, names: list[str], work: Path, steps: int, batch: int
) -> None:
    """Contrastive training; images and texts of one class are positives of each other."""
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = work / "clip"
    if (folder / "model.safetensors").exists():
        return
    lines = texts_of(names)
    texts = [text for listed in lines for text in listed]
    texts += [template.format(name) for template in TEMPLATES for name in names]
    checkpoint = work / "clip-checkpoint.safetensors"
    if checkpoint.exists():  # a second training of the tokenizer may give other merges
        tokenizer = CLIPTokenizer.from_pretrained(folder)
    else:
        tokenizer = tiny.make_tokenizer(folder, texts)
    text = tiny.text_config(
        tokenizer,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=96,
    )
    vision = {
        "image_size": 32,
        "patch_size": 4,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "projection_dim": 96,
        "hidden_act": "quick_gelu",
    }
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=96))
    print(f"clip: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    tokens = torch.stack([tiny.tokenize(tokenizer, line) for line in lines])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    first, start = tiny.load_state(checkpoint, optimizer, model=model), time.time()
    model.train()
    for step in range(first, steps):
        rng = np.random.default_rng([1, step])
        tiny.set_rate(optimizer, tiny.learning_rate(step, steps, 1e-3))
        chosen = rng.integers(len(images), size=batch)
        label = torch.from_numpy(labels[chosen])
        pixels = F.pad(to_pixels(images[chosen]), (4, 4, 4, 4), value=0.0)
        down, right = rng.integers(9, size=2)
        pixels = pixels[:, :, down : down + 32, right : right + 32]
        flipped = torch.from_numpy(rng.random(batch) < 0.5)
        pixels = torch.where(flipped[:, None, None, None], pixels.flip(-1), pixels)
        pixels = pixels * torch.from_numpy(rng.uniform(0.7, 1.3, (batch, 1, 1, 1))).float()
        line = torch.from_numpy(rng.integers(tokens.shape[1], size=batch))
        loss, excess = tiny.contrastive_loss(model, tokens[label, line], pixels, label)
        tiny.step_clip(model, optimizer, loss)
        if step % 100 == 0:
            seconds = time.time() - start
            print(f"clip {step:5d}/{steps} excess loss {excess:.4f} {seconds:.0f} s", flush=True)
        if (step + 1) % tiny.SAVE_EVERY == 0:
            tiny.save_state(checkpoint, step + 1, optimizer, model=model)
    tiny.save_clip(model, folder)


def train_vae(images: np.ndarray, work: Path, steps: int, batch: int) -> None:
    """A KL autoencoder, 3×32×32 → 8×8×8.

    Caches the posterior of every image, and of its mirror image.
    """
    from diffusers import AutoencoderKL

    folder = work / "diffusion" / "vae"
    if (folder / "diffusion_pytorch_model.safetensors").exists():
        return
    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
    }
    # norms of four channels and more: a norm of one channel removes its mean, and so the colour
    model = AutoencoderKL(
        latent_channels=8,
        sample_size=32,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_num_groups=4,
        **blocks,
    ).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3, weight_decay=0.0)
    checkpoint = work / "vae-checkpoint.safetensors"
    first, start = tiny.load_state(checkpoint, optimizer, model=model), time.time()
    for step in range(first, steps):
        rng = np.random.default_rng([2, step])
        tiny.set_rate(optimizer, tiny.learning_rate(step, steps, 1.5e-3))
        pixels = to_pixels(images[rng.integers(len(images), size=batch)]).contiguous(
            memory_format=torch.channels_last
        )
        torch.manual_seed(step)
        error, kl, edges = tiny.reconstruct(model, pixels)
        red, green, blue = error.unbind(1)
        hue = (red - green).abs().mean() + (blue - (red + green) / 2).abs().mean()
        # without the hue, red and green become one colour
        loss = error.abs().mean() + error.square().mean() + edges + hue + 1e-4 * kl
        tiny.step_clipped(model, optimizer, loss)
        if step % 100 == 0:
            losses = f"l1 {error.abs().mean():.4f} hue {hue:.4f} kl {kl:.2f}"
            print(f"vae {step:5d}/{steps} {losses} {time.time() - start:.0f} s", flush=True)
        if (step + 1) % tiny.SAVE_EVERY == 0:
            tiny.save_state(checkpoint, step + 1, optimizer, model=model)
    model.eval()
    cached: dict[str, list[torch.Tensor]] = {"mean": [], "std": []}
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        for mirrored in (False, True):
            for part in np.array_split(np.arange(len(images)), len(images) // 512):
                pixels = to_pixels(images[part])
                posterior = model.encode(pixels.flip(-1) if mirrored else pixels).latent_dist
                cached["mean"].append(posterior.mean.half())
                cached["std"].append(posterior.std.half())
    mean, std = torch.cat(cached["mean"]), torch.cat(cached["std"])
    drawn = mean.float() + std.float() * torch.randn(
        mean.shape, generator=torch.Generator().manual_seed(0)
    )
    model.register_to_config(scaling_factor=round(1 / drawn.std().item(), 5))
    save_file({"mean": mean.contiguous(), "std": std.contiguous()}, work / "latents.safetensors")
    model.to(memory_format=torch.contiguous_format).half().save_pretrained(folder)


def train_unet(
    labels: np.ndarray,
    names: list[str],
    work: Path,
    *,
    steps: int,
    batch: int,
    schedule_steps: int,
) -> None:
    """Denoiser on cached latents, conditioned on the CLIP's text tower.

    The rate is constant after the warm-up and falls over the last fifth of `schedule_steps`. The
    moving average of the weights is exported, so the state at any time is usable.
    """
    folder = work / "diffusion"
    tokenizer, encoder = tiny.load_text(work / "clip")
    states = torch.stack([tiny.encode(tokenizer, encoder, line) for line in texts_of(names)])
    empty = tiny.encode(tokenizer, encoder, [""])
    latents, factor = tiny.load_latents(work)
    label_of = torch.from_numpy(labels)

    def draw(generator: torch.Generator) -> tiny.Batch:
        row = torch.randint(2 * len(labels), (batch,), generator=generator)
        clean = tiny.sample_latents(latents, row, factor, generator)
        noise, timestep = tiny.sample_noise(clean, generator)
        line = torch.randint(states.shape[1], (batch,), generator=generator)
        text = states[label_of[row % len(labels)], line]
        return clean, noise, timestep, tiny.drop_texts(text, empty, generator)

    tiny.train_denoiser(
        config={
            "block_out_channels": (64, 128),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 96,
        },
        draw=draw,
        rate=lambda step: tiny.trapezoid_rate(step, schedule_steps, 1e-3),
        decay=0.9995,
        steps=steps,
        checkpoint=work / "unet-checkpoint.safetensors",
        save=partial(tiny.save_diffusion, folder=folder, tokenizer=tokenizer, text_encoder=encoder),
    )


def export(work: Path, target: Path) -> None:
    """Copies the folders into the repository; the tokenizer is a link to that of the CLIP."""
    for name in ("clip", "diffusion"):
        shutil.rmtree(target / name, ignore_errors=True)
        shutil.copytree(work / name, target / name)
    tiny.link_to_clip(target / "diffusion", "../clip")
    size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    print(json.dumps({"bytes": size, "target": target.name}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cifar100", type=Path, required=True)
    parser.add_argument("--cifar10", type=Path, required=True)
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for caches and checkpoints"
    )
    parser.add_argument("--target", type=Path, default=Path(__file__).parent / "cifar")
    parser.add_argument("--clip-steps", type=int, default=2500)
    parser.add_argument("--vae-steps", type=int, default=2500)
    parser.add_argument(
        "--unet-steps", type=int, default=8300, help="stop here; the next call may go further"
    )
    parser.add_argument(
        "--schedule-steps", type=int, default=8300, help="where the learning rate reaches zero"
    )
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if (arguments.target / "clip").is_dir() and not (arguments.work / "clip").exists():
        shutil.copytree(arguments.target / "clip", arguments.work / "clip")  # not trained again
    images, labels, names = read_images(arguments.cifar100, arguments.cifar10)
    print(f"{len(images)} images of {len(names)} classes", flush=True)
    train_vae(images, arguments.work, arguments.vae_steps, batch=64)
    train_clip(images, labels, names, arguments.work, arguments.clip_steps, batch=128)
    train_unet(
        labels,
        names,
        arguments.work,
        steps=arguments.unet_steps,
        batch=128,
        schedule_steps=arguments.schedule_steps,
    )
    export(arguments.work, arguments.target)


if __name__ == "__main__":
    main()
