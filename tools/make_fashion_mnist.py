"""Makes `assets/fashion_mnist/`: the shipped images, the tiny CLIP and the tiny diffusion model.

    python -m tools.make_fashion_mnist \\
        --source /usr/share/datasets/fashion-mnist --work build/fashion

`--source` is the folder that Debian's package `dataset-fashion-mnist` installs (four gzipped IDX
files). The stages run in order: data, clip, vae, unet, export. A stage whose result is in `--work`
is skipped, and the diffusion training resumes at its last checkpoint. For the time that it takes,
see the README in `assets/fashion_mnist`.

The models never see a shipped image. They are trained on the official training images without the
shipped pool and validation set, compared by content and not only by index.
"""

from __future__ import annotations

import argparse
import gzip
import io
import shutil
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tools import tiny_models as tiny

ASSETS = Path(__file__).resolve().parents[1] / "src" / "discl" / "assets"
CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
TEMPLATES = ("a photo of {}", "a black and white photo of {}", "{}")
POOL_PER_CLASS, VALIDATION_PER_CLASS = 500, 100


# ---------------------------------------------------------------- data


def read_idx(path: Path) -> np.ndarray:
    """Array of an IDX file (gzipped): uint8 `[n]` labels or `[n, 28, 28]` images."""
    raw = gzip.decompress(path.read_bytes())
    dims = raw[3]
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)


def split_rows(source: Path) -> dict[str, tuple[np.ndarray, np.ndarray, list[str]]]:
    """`{split: (images [n, 32, 32] uint8, labels [n], ids)}`, without common image content.

    The models are trained on `generator`, which does not ship.
    """
    pad = ((0, 0), (2, 2), (2, 2))
    train, test = (
        np.pad(read_idx(source / f"{name}-images-idx3-ubyte.gz"), pad) for name in ("train", "t10k")
    )
    train_y, test_y = (
        read_idx(source / f"{name}-labels-idx1-ubyte.gz").astype(np.int64)
        for name in ("train", "t10k")
    )
    seen = {image.tobytes() for image in test}
    chosen: dict[str, list[int]] = {"train": [], "validation": [], "generator": []}
    room = {
        label: {"train": POOL_PER_CLASS, "validation": VALIDATION_PER_CLASS} for label in range(10)
    }
    for row in np.random.default_rng(2410).permutation(len(train)):
        content = train[row].tobytes()
        if content in seen:
            continue
        seen.add(content)
        free = room[int(train_y[row])]
        split = next((name for name, count in free.items() if count), "generator")
        if split != "generator":
            free[split] -= 1
        chosen[split].append(int(row))
    result = {}
    for name, rows in chosen.items():
        rows = sorted(rows, key=lambda row: (train_y[row], row))
        result[name] = (train[rows], train_y[rows], [f"train-{row:05d}" for row in rows])
    unique = sorted(
        {image.tobytes(): row for row, image in enumerate(test)}.values(),
        key=lambda row: (test_y[row], row),
    )
    result["test"] = (test[unique], test_y[unique], [f"t10k-{row:05d}" for row in unique])
    return result


def write_shipped(rows: dict, folder: Path) -> None:
    """Writes `train`, `validation` and `test` as Parquet with lossless WebP images."""
    from datasets import ClassLabel, Dataset, Features, Image, Value
    from PIL import Image as Pillow

    features = Features(
        {"id": Value("string"), "image": Image(), "label": ClassLabel(names=list(CLASSES))}
    )
    for name in ("train", "validation", "test"):
        images, labels, ids = rows[name]
        encoded = []
        for image in images:
            buffer = io.BytesIO()
            Pillow.fromarray(image).save(buffer, "WEBP", lossless=True, method=6)
            encoded.append({"bytes": buffer.getvalue(), "path": None})
        table = Dataset.from_dict(
            {"id": ids, "image": encoded, "label": labels.tolist()}, features=features
        )
        folder.mkdir(parents=True, exist_ok=True)
        table.to_parquet(folder / f"{name}.parquet")


# ---------------------------------------------------------------- training


def texts_of(templates: int) -> list[list[str]]:
    """Per class the shipped phrases, and the templates with its name so many times."""
    from discl.prompts.templates import read_phrases

    phrases = read_phrases(ASSETS / "phrases" / "fashion-mnist.yaml")
    return [
        phrases[name] + [template.format(name) for template in TEMPLATES] * templates
        for name in CLASSES
    ]


def make_tokenizer(folder: Path):
    from discl.prompts.templates import read_phrases

    phrases = read_phrases(ASSETS / "phrases" / "fashion-mnist.yaml")
    texts = [text for lines in phrases.values() for text in lines]
    texts += [template.format(name) for template in TEMPLATES for name in CLASSES]
    return tiny.make_tokenizer(folder, texts)


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """float32 `[n, 3, h, w]` in [−1, 1] of uint8 grey images `[n, h, w]`."""
    return (torch.from_numpy(images).float() / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)


def train_clip(rows, work: Path, steps: int, batch: int) -> None:
    """Contrastive training; images and texts of one class are positives of each other."""
    from transformers import CLIPConfig, CLIPModel

    folder = work / "clip"
    if (folder / "model.safetensors").exists():
        return
    tokenizer = make_tokenizer(folder)
    text = tiny.text_config(
        tokenizer,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=64,
    )
    vision = {
        "image_size": 32,
        "patch_size": 4,
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "projection_dim": 64,
        "hidden_act": "quick_gelu",
    }
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=64))
    images, labels, _ = rows["generator"]
    tokens = torch.stack([tiny.tokenize(tokenizer, line) for line in texts_of(2)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    rng, start = np.random.default_rng(1), time.time()
    model.train()
    for step in range(steps):
        tiny.set_rate(optimizer, tiny.learning_rate(step, steps, 1e-3))
        chosen = rng.integers(len(images), size=batch)
        label = torch.from_numpy(labels[chosen])
        pixels = F.pad(to_pixels(images[chosen]), (2, 2, 2, 2), value=-1.0)
        down, right = rng.integers(5, size=2)
        pixels = pixels[:, :, down : down + 32, right : right + 32]
        if rng.random() < 0.5:
            pixels = pixels.flip(-1)
        line = torch.from_numpy(rng.integers(tokens.shape[1], size=batch))
        loss, excess = tiny.contrastive_loss(model, tokens[label, line], pixels, label)
        tiny.step_clip(model, optimizer, loss)
        if step % 100 == 0:
            seconds = time.time() - start
            print(f"clip {step:5d}/{steps} excess loss {excess:.4f} {seconds:.0f} s", flush=True)
    tiny.save_clip(model, folder)


def train_vae(rows, work: Path, steps: int, batch: int) -> None:
    """A KL autoencoder, 3×32×32 → 8×8×8; caches the posterior of every generator image."""
    from diffusers import AutoencoderKL

    folder = work / "diffusion" / "vae"
    if (folder / "diffusion_pytorch_model.safetensors").exists():
        return
    torch.manual_seed(0)
    model = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=8,
        sample_size=32,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=16,
    )
    images, _, _ = rows["generator"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    rng, start = np.random.default_rng(2), time.time()
    for step in range(steps):
        tiny.set_rate(optimizer, tiny.learning_rate(step, steps, 1e-3))
        pixels = to_pixels(images[rng.integers(len(images), size=batch)])
        error, kl, edges = tiny.reconstruct(model, pixels)
        loss = error.abs().mean() + error.square().mean() + edges + 1e-4 * kl
        tiny.step_clipped(model, optimizer, loss)
        if step % 100 == 0:
            losses = f"l1 {error.abs().mean():.4f} kl {kl:.2f}"
            print(f"vae {step:5d}/{steps} {losses} {time.time() - start:.0f} s", flush=True)
    model.eval()
    means, stds = [], []
    with torch.inference_mode():
        for part in torch.from_numpy(np.arange(len(images))).split(512):
            posterior = model.encode(to_pixels(images[part.numpy()])).latent_dist
            means.append(posterior.mean)
            stds.append(posterior.std)
    mean, std = torch.cat(means), torch.cat(stds)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    model.register_to_config(scaling_factor=round(1 / (mean + std * noise).std().item(), 5))
    latents = {"mean": mean.half().contiguous(), "std": std.half().contiguous()}
    save_file(latents, work / "latents.safetensors")
    model.half().save_pretrained(folder)


def train_unet(rows, work: Path, steps: int, batch: int) -> None:
    """Denoiser on cached latents, conditioned on the tiny CLIP's text tower."""
    folder = work / "diffusion"
    if (folder / "unet" / "diffusion_pytorch_model.safetensors").exists():
        return
    tokenizer, encoder = tiny.load_text(work / "clip")
    states = torch.stack([tiny.encode(tokenizer, encoder, line) for line in texts_of(1)])
    empty = tiny.encode(tokenizer, encoder, [""])
    latents, factor = tiny.load_latents(work)
    labels = torch.from_numpy(rows["generator"][1])

    def draw(generator: torch.Generator) -> tiny.Batch:
        row = torch.randint(len(labels), (batch,), generator=generator)
        clean = tiny.sample_latents(latents, row, factor, generator)
        noise, timestep = tiny.sample_noise(clean, generator)
        text = states[labels[row], torch.randint(states.shape[1], (batch,), generator=generator)]
        return clean, noise, timestep, tiny.drop_texts(text, empty, generator)

    save = partial(tiny.save_diffusion, folder=folder, tokenizer=tokenizer, text_encoder=encoder)
    average = tiny.train_denoiser(
        config={
            "block_out_channels": (64, 128),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "cross_attention_dim": 64,
        },
        draw=draw,
        rate=lambda step: tiny.learning_rate(step, steps, 1e-3),
        decay=0.999,
        steps=steps,
        checkpoint=work / "unet-checkpoint.safetensors",
        save=partial(save, name="unet-last"),
    )
    save(average)  # only a finished training has this folder


def export(work: Path, target: Path) -> None:
    """Copies the finished folders into the package."""
    for name in ("data", "clip", "diffusion"):
        shutil.rmtree(target / name, ignore_errors=True)
        shutil.copytree(work / name, target / name, ignore=shutil.ignore_patterns("unet-last"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--source", type=Path, required=True, help="folder with the four gzipped IDX files"
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="folder for caches and checkpoints"
    )
    parser.add_argument("--target", type=Path, default=ASSETS / "fashion_mnist")
    parser.add_argument("--clip-steps", type=int, default=2000)
    parser.add_argument("--vae-steps", type=int, default=2500)
    parser.add_argument("--unet-steps", type=int, default=3500)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    rows = split_rows(arguments.source)
    if not (arguments.work / "data" / "test.parquet").exists():
        write_shipped(rows, arguments.work / "data")
    train_clip(rows, arguments.work, arguments.clip_steps, batch=128)
    train_vae(rows, arguments.work, arguments.vae_steps, batch=64)
    train_unet(rows, arguments.work, arguments.unet_steps, batch=128)
    export(arguments.work, arguments.target)


if __name__ == "__main__":
    main()
