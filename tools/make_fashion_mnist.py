"""Makes `assets/fashion_mnist/`: the images that ship, the tiny CLIP, the tiny diffusion model.

    python tools/make_fashion_mnist.py --work build/fashion \\
        --source /usr/share/datasets/fashion-mnist

`--source` is the folder of Debian's package `dataset-fashion-mnist` (four gzipped IDX files). The
stages run in order: data, clip, vae, unet, export. A stage with a result in `--work` does not run
again, and the diffusion training resumes from its last checkpoint. For the time on two CPU cores
see `fashion_mnist/README.md`.

The models never see an image that ships. They are trained on the official training images without
the shipped pool and validation set, compared by content and not only by index.
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import math
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

ASSETS = Path(__file__).parents[1] / "src" / "discl" / "assets"
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
TEXT_LENGTH = 32


# ---------------------------------------------------------------- data


def read_idx(path: Path) -> np.ndarray:
    """Array of an IDX file (gzipped): uint8 `[n]` labels or `[n, 28, 28]` images."""
    raw = gzip.decompress(path.read_bytes())
    dims = raw[3]
    shape = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)


def split_rows(source: Path) -> dict[str, tuple[np.ndarray, np.ndarray, list[str]]]:
    """`{split: (images [n, 32, 32] uint8, labels [n], ids)}`; the splits share no image content.

    `generator` is what the models are trained on and does not ship.
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
        places = room[int(train_y[row])]
        place = next((name for name, free in places.items() if free), "generator")
        if place != "generator":
            places[place] -= 1
        chosen[place].append(int(row))
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
    import io

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


# ---------------------------------------------------------------- text


def phrases() -> dict[str, list[str]]:
    from discl.prompts.templates import read_phrases

    return read_phrases(ASSETS / "phrases" / "fashion-mnist.yaml")


def make_tokenizer(folder: Path):
    """A CLIP tokenizer (byte-level BPE, `</w>`) whose merges come from the shipped phrases."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    texts = [text for lines in phrases().values() for text in lines]
    texts += [template.format(name) for template in TEMPLATES for name in CLASSES]
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=2048,
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    learned = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = alphabet + [token + "</w>" for token in alphabet]
    tokens += [
        token
        for token in dict.fromkeys(left + right for left, right in learned)
        if token not in set(tokens)
    ]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(
        json.dumps({token: index for index, token in enumerate(tokens)})
    )
    (folder / "merges.txt").write_text(
        "#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in learned)
    )
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=TEXT_LENGTH)
    tokenizer.save_pretrained(folder)
    return tokenizer


def tokenize(tokenizer, texts: list[str]) -> torch.Tensor:
    encoded = tokenizer(
        texts, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
    )
    return encoded["input_ids"]


# ---------------------------------------------------------------- training


def to_pixels(images: np.ndarray) -> torch.Tensor:
    """float32 `[n, 3, h, w]` in [−1, 1] of uint8 grey images `[n, h, w]`."""
    return (torch.from_numpy(images).float() / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)


def learning_rate(step: int, steps: int, peak: float, warm_up: int = 200) -> float:
    return peak * min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train_clip(rows, work: Path, steps: int, batch: int) -> None:
    """Contrastive training; images and texts of one class are positives of each other."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    folder = work / "clip"
    if (folder / "model.safetensors").exists():
        return
    tokenizer = make_tokenizer(folder)
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": TEXT_LENGTH,
        "projection_dim": 64,
        "hidden_act": "quick_gelu",
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
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
    lines = [
        phrases()[name] + [template.format(name) for template in TEMPLATES] * 2 for name in CLASSES
    ]
    tokens = torch.stack([tokenize(tokenizer, line) for line in lines])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
    rng, start = np.random.default_rng(1), time.time()
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 1e-3)
        chosen = rng.integers(len(images), size=batch)
        label = torch.from_numpy(labels[chosen])
        pixels = F.pad(to_pixels(images[chosen]), (2, 2, 2, 2), value=-1.0)
        down, right = rng.integers(5, size=2)
        pixels = pixels[:, :, down : down + 32, right : right + 32]
        if rng.random() < 0.5:
            pixels = pixels.flip(-1)
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
            plain = loss.item() + (target * target.clamp_min(1e-9).log()).sum(1).mean().item()
            print(
                f"clip {step:5d}/{steps} excess loss {plain:.4f} {time.time() - start:.0f} s",
                flush=True,
            )
    model.half().save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ).save_pretrained(folder)


def train_vae(rows, work: Path, steps: int, batch: int) -> None:
    """A KL autoencoder, 3×32×32 → 8×8×8. Then the posterior of every generator image is cached."""
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
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 1e-3)
        pixels = to_pixels(images[rng.integers(len(images), size=batch)])
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
        loss = error.abs().mean() + error.square().mean() + edges + 1e-4 * kl
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(
                f"vae {step:5d}/{steps} l1 {error.abs().mean():.4f} kl {kl:.2f}",
                f"{time.time() - start:.0f} s",
                flush=True,
            )
    model.eval()
    means, stds = [], []
    with torch.inference_mode():
        for part in torch.from_numpy(np.arange(len(images))).split(512):
            posterior = model.encode(to_pixels(images[part.numpy()])).latent_dist
            means.append(posterior.mean)
            stds.append(posterior.std)
    mean, std = torch.cat(means), torch.cat(stds)
    scale = (
        1
        / (mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(0)))
        .std()
        .item()
    )
    model.register_to_config(scaling_factor=round(scale, 5))
    save_file(
        {"mean": mean.half().contiguous(), "std": std.half().contiguous()},
        work / "latents.safetensors",
    )
    model.half().save_pretrained(folder)


def train_unet(rows, work: Path, steps: int, batch: int) -> None:
    """A denoiser on cached latents.

    The text is encoded by the tiny CLIP, and dropped for one row in ten (arXiv 2207.12598).
    """
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = work / "diffusion"
    if (folder / "unet" / "diffusion_pytorch_model.safetensors").exists():
        return
    tokenizer = CLIPTokenizer.from_pretrained(work / "clip")
    text_encoder = CLIPTextModel.from_pretrained(work / "clip", dtype=torch.float32).eval()
    lines = [
        phrases()[name] + [template.format(name) for template in TEMPLATES] for name in CLASSES
    ]
    with torch.inference_mode():
        states = torch.stack([text_encoder(tokenize(tokenizer, line))[0] for line in lines])
        empty = text_encoder(tokenize(tokenizer, [""]))[0]
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
        cross_attention_dim=64,
    ).to(memory_format=torch.channels_last)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    latents = load_file(work / "latents.safetensors")
    scale = AutoencoderKL.load_config(folder / "vae")["scaling_factor"]
    labels = torch.from_numpy(rows["generator"][1])
    checkpoint, first = work / "unet-checkpoint.pt", 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        (
            model.load_state_dict(state["model"]),
            average.load_state_dict(state["average"]),
            optimizer.load_state_dict(state["optimizer"]),
        )
        first = state["step"]
    start, running = time.time(), 0.0
    for step in range(first, steps):
        generator = torch.Generator().manual_seed(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 1e-3)
        row = torch.randint(len(labels), (batch,), generator=generator)
        mean, std = latents["mean"][row].float(), latents["std"][row].float()
        clean = (mean + std * torch.randn(mean.shape, generator=generator)) * scale
        noise = torch.randn(mean.shape, generator=generator)
        timestep = torch.randint(1000, (batch,), generator=generator)
        text = states[labels[row], torch.randint(states.shape[1], (batch,), generator=generator)]
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
        decay = min(0.999, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        running = loss.item() if step == first else 0.99 * running + 0.01 * loss.item()
        if step % 100 == 0:
            print(
                f"unet {step:5d}/{steps} loss {running:.4f} {time.time() - start:.0f} s", flush=True
            )
        if (step + 1) % 500 == 0:
            state = {
                "model": model.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
            }
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
            save_diffusion(folder, average, scheduler, text_encoder, tokenizer, name="unet-last")
    save_diffusion(folder, average, scheduler, text_encoder, tokenizer, name="unet")


def save_diffusion(folder: Path, unet, scheduler, text_encoder, tokenizer, name: str) -> None:
    """Writes the layout of a diffusers pipeline: `model_index.json` and a folder per component."""
    copy.deepcopy(unet).to(memory_format=torch.contiguous_format).half().save_pretrained(
        folder / name
    )
    scheduler.save_pretrained(folder / "scheduler")
    copy.deepcopy(text_encoder).half().save_pretrained(folder / "text_encoder")
    tokenizer.save_pretrained(folder / "tokenizer")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": [None, None],
        "safety_checker": [None, None],
        "requires_safety_checker": False,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


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
