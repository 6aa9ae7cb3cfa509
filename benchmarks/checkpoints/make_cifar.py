"""Makes the generator and CLIP of the benchmarks on CIFAR-100-LT and CIFAR-10 in low light.

    python benchmarks/checkpoints/make_cifar.py --cifar100 DIR --cifar10 DIR --work build/cifar

DIR has `train.parquet` with `id`, `image` and `label`. The stages run in order: clip, vae, unet,
export. A finished stage does not run again, and a killed one resumes from its last checkpoint.
`--unet-steps` may grow from call to call.

The models see CIFAR-100 training images outside the long-tailed set of imbalance ratio 50 (which
contains that of 100), and the CIFAR-10 training images of `is_pretraining`. They see no test
image, except the few that CIFAR holds twice, equal pixel by pixel, which are not searched for.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tools")]

import make_fashion_mnist as fashion  # noqa: E402
from discl.data import read_tables, take_long_tail  # noqa: E402
from discl.data.readers.camera_traps import is_pretraining  # noqa: E402

TEMPLATES = ("a photo of a {}", "a photo of {}", "{}")


def read_images(cifar100: Path, cifar10: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(uint8 images `[n, 32, 32, 3]`, labels `[n]`, 110 class names) that the models may see."""
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
    """Texts per class, all lists equally long: templates, and shipped phrases of CIFAR-100."""
    phrases = yaml.safe_load((ROOT / "src/discl/assets/phrases/cifar100.yaml").read_text())
    lines = []
    for place, name in enumerate(names):
        plain = [template.format(name) for template in TEMPLATES]
        own = plain * 3 + (
            [str(text) for text in phrases[name]] if place < 100 else plain * 3 + plain[:1]
        )
        lines.append(own)
    return lines


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """float32 `[n, 3, 32, 32]` in [−1, 1] of uint8 `[n, 32, 32, 3]`."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2))).float() / 127.5 - 1


def save_state(
    path: Path, step: int, optimizer: torch.optim.Optimizer, **models: torch.nn.Module
) -> None:
    state = {name: model.state_dict() for name, model in models.items()} | {
        "optimizer": optimizer.state_dict(),
        "step": step,
    }
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def load_state(path: Path, optimizer: torch.optim.Optimizer, **models: torch.nn.Module) -> int:
    """The step at which a killed training goes on."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    for name, model in models.items():
        model.load_state_dict(state[name])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def set_rate(optimizer: torch.optim.Optimizer, step: int, steps: int, peak: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = fashion.learning_rate(step, steps, peak)


def train_clip(
    images: np.ndarray, labels: np.ndarray, names: list[str], work: Path, steps: int, batch: int
) -> None:
    """Contrastive training; images and texts of one class are positives of each other."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    folder = work / "clip"
    if (folder / "model.safetensors").exists():
        return
    lines = texts_of(names)
    fashion.phrases = lambda: dict(zip(names, lines, strict=True))
    fashion.CLASSES, fashion.TEMPLATES = tuple(names), TEMPLATES
    tokenizer = fashion.make_tokenizer(folder)
    shared = {
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": 96,
        "hidden_act": "quick_gelu",
    }
    text = {
        **shared,
        "vocab_size": len(tokenizer),
        "hidden_size": 96,
        "intermediate_size": 256,
        "max_position_embeddings": fashion.TEXT_LENGTH,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        **shared,
        "image_size": 32,
        "patch_size": 4,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=96))
    print(f"clip: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    tokens = torch.stack([fashion.tokenize(tokenizer, line) for line in lines])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    checkpoint = work / "clip-checkpoint.pt"
    first, start = load_state(checkpoint, optimizer, model=model), time.time()
    model.train()
    for step in range(first, steps):
        rng = np.random.default_rng([1, step])
        set_rate(optimizer, step, steps, 1e-3)
        chosen = rng.integers(len(images), size=batch)
        label = torch.from_numpy(labels[chosen])
        pixels = F.pad(to_pixels(images[chosen]), (4, 4, 4, 4), value=0.0)
        down, right = rng.integers(9, size=2)
        pixels = pixels[:, :, down : down + 32, right : right + 32]
        flipped = torch.from_numpy(rng.random(batch) < 0.5)
        pixels = torch.where(flipped[:, None, None, None], pixels.flip(-1), pixels)
        pixels = pixels * torch.from_numpy(rng.uniform(0.7, 1.3, (batch, 1, 1, 1))).float()
        with torch.autocast("cpu", torch.bfloat16):
            out = model(
                input_ids=tokens[
                    label, torch.from_numpy(rng.integers(tokens.shape[1], size=batch))
                ],
                pixel_values=pixels,
            )
        logits = out.logits_per_image.float()
        target = (label[:, None] == label[None]).float()
        target = target / target.sum(1, keepdim=True)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(30))
        if step % 100 == 0:
            excess = loss.item() + (target * target.clamp_min(1e-9).log()).sum(1).mean().item()
            print(
                f"clip {step:5d}/{steps} excess loss {excess:.4f} {time.time() - start:.0f} s",
                flush=True,
            )
        if (step + 1) % 500 == 0:
            save_state(checkpoint, step + 1, optimizer, model=model)
    model.half().save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ).save_pretrained(folder)


def train_vae(images: np.ndarray, work: Path, steps: int, batch: int) -> None:
    """A KL autoencoder, 3×32×32 → 8×8×8.

    Then the posteriors of every image and of its mirror image are cached.
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
    # norms of at least four channels: a norm of one channel removes its mean, and so the colour
    model = AutoencoderKL(
        latent_channels=8,
        sample_size=32,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        norm_num_groups=4,
        **blocks,
    ).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3, weight_decay=0.0)
    checkpoint = work / "vae-checkpoint.pt"
    first, start = load_state(checkpoint, optimizer, model=model), time.time()
    for step in range(first, steps):
        rng = np.random.default_rng([2, step])
        set_rate(optimizer, step, steps, 1.5e-3)
        pixels = to_pixels(images[rng.integers(len(images), size=batch)]).contiguous(
            memory_format=torch.channels_last
        )
        torch.manual_seed(step)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = model.encode(pixels).latent_dist
            decoded = model.decode(posterior.sample()).sample
        error = decoded.float() - pixels
        kl = (
            0.5
            * (
                posterior.mean.float() ** 2 + posterior.var.float() - 1 - posterior.logvar.float()
            ).mean()
        )
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        red, green, blue = error.unbind(1)
        hue = (red - green).abs().mean() + (
            blue - (red + green) / 2
        ).abs().mean()  # else red and green are taken for one colour
        loss = error.abs().mean() + error.square().mean() + edges + hue + 1e-4 * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(
                f"vae {step:5d}/{steps} l1 {error.abs().mean():.4f} hue {hue:.4f} kl {kl:.2f}",
                f"{time.time() - start:.0f} s",
                flush=True,
            )
        if (step + 1) % 500 == 0:
            save_state(checkpoint, step + 1, optimizer, model=model)
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
    labels: np.ndarray, names: list[str], work: Path, steps: int, batch: int, schedule_steps: int
) -> None:
    """A denoiser on cached latents.

    The text is encoded by the CLIP, and dropped for one row in ten (arXiv 2207.12598).

    The rate is constant after the warm-up, and falls to zero over the last fifth of
    `schedule_steps`. The average of the weights is exported, so any state can be used.
    """
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = work / "diffusion"
    tokenizer = CLIPTokenizer.from_pretrained(work / "clip")
    text_encoder = CLIPTextModel.from_pretrained(work / "clip", dtype=torch.float32).eval()
    with torch.inference_mode():
        states = torch.stack(
            [text_encoder(fashion.tokenize(tokenizer, line))[0] for line in texts_of(names)]
        )
        empty = text_encoder(fashion.tokenize(tokenizer, [""]))[0]
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=96,
    ).to(memory_format=torch.channels_last)
    print(f"unet: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    latents = load_file(work / "latents.safetensors")
    scale = AutoencoderKL.load_config(folder / "vae")["scaling_factor"]
    label_of = torch.from_numpy(labels)
    checkpoint = work / "unet-checkpoint.pt"
    first, start, running = (
        load_state(checkpoint, optimizer, model=model, average=average),
        time.time(),
        0.0,
    )
    for step in range(first, steps):
        generator = torch.Generator().manual_seed(step)
        falling = min(1.0, (schedule_steps - step) / (0.2 * schedule_steps))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 200) * max(falling, 0.01)
        row = torch.randint(2 * len(labels), (batch,), generator=generator)
        mean, std = latents["mean"][row].float(), latents["std"][row].float()
        clean = (mean + std * torch.randn(mean.shape, generator=generator)) * scale
        noise = torch.randn(mean.shape, generator=generator)
        timestep = torch.randint(1000, (batch,), generator=generator)
        text = states[
            label_of[row % len(labels)],
            torch.randint(states.shape[1], (batch,), generator=generator),
        ]
        text = torch.where(
            (torch.rand(batch, generator=generator) < 0.1)[:, None, None], empty, text
        )
        noisy = scheduler.add_noise(clean, noise, timestep).contiguous(
            memory_format=torch.channels_last
        )
        with torch.autocast("cpu", torch.bfloat16):
            predicted = model(noisy, timestep, text).sample
        loss = F.mse_loss(predicted.float(), noise)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.9995, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        running = loss.item() if step == first else 0.99 * running + 0.01 * loss.item()
        if step % 100 == 0:
            print(
                f"unet {step:5d}/{steps} loss {running:.4f} {time.time() - start:.0f} s", flush=True
            )
        if (step + 1) % 500 == 0 or step + 1 == steps:
            save_state(checkpoint, step + 1, optimizer, model=model, average=average)
            fashion.save_diffusion(folder, average, scheduler, text_encoder, tokenizer, name="unet")


def export(work: Path, target: Path) -> None:
    """Copies the folders to the paths that the benchmarks use.

    The generator's text encoder and tokenizer are links to the CLIP.
    """
    for name in ("clip", "diffusion"):
        shutil.rmtree(target / name, ignore_errors=True)
        shutil.copytree(work / name, target / name)
    for name in ("text_encoder", "tokenizer"):
        shutil.rmtree(target / "diffusion" / name)
        (target / "diffusion" / name).symlink_to("../clip", target_is_directory=True)
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
        shutil.copytree(
            arguments.target / "clip", arguments.work / "clip"
        )  # what is exported already is not trained again
    images, labels, names = read_images(arguments.cifar100, arguments.cifar10)
    print(f"{len(images)} images of {len(names)} classes", flush=True)
    train_vae(images, arguments.work, arguments.vae_steps, batch=64)
    train_clip(images, labels, names, arguments.work, arguments.clip_steps, batch=128)
    train_unet(labels, names, arguments.work, arguments.unet_steps, 128, arguments.schedule_steps)
    export(arguments.work, arguments.target)


if __name__ == "__main__":
    main()
