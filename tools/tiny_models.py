"""Parts of the scripts that train tiny CLIPs and tiny latent diffusion models.

`tools/make_fashion_mnist.py` trains what ships with the package; `benchmarks/checkpoints/` trains
the stand-ins of the benchmarks.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEXT_LENGTH = 32
WARM_UP = 200


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Rate of a step: a linear warm-up, then a half cosine down to zero."""
    warm_up = min(1.0, (step + 1) / WARM_UP)
    return peak * warm_up * 0.5 * (1 + math.cos(math.pi * step / steps))


def trapezoid_rate(step: int, steps: int, peak: float) -> float:
    """Rate of a step: a linear warm-up, constant, then down to 1 % over the last fifth."""
    falling = min(1.0, (steps - step) / (0.2 * steps))
    return peak * min(1.0, (step + 1) / WARM_UP) * max(falling, 0.01)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate


def save_state(
    path: Path, step: int, optimizer: torch.optim.Optimizer, **models: nn.Module
) -> None:
    """Writes models and optimizer after `step` steps, atomically."""
    state = {name: model.state_dict() for name, model in models.items()}
    state |= {"optimizer": optimizer.state_dict(), "step": step}
    torch.save(state, path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def load_state(path: Path, optimizer: torch.optim.Optimizer, **models: nn.Module) -> int:
    """Loads what `save_state` wrote, and returns the step to go on at; 0 without a file."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    for name, model in models.items():
        model.load_state_dict(state[name])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]


# ---------------------------------------------------------------- text


def make_tokenizer(folder: Path, texts: Sequence[str]):
    """A CLIP tokenizer (byte-level BPE, `</w>`) whose merges come from these texts."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=2048, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    learned = [tuple(merge) for merge in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = alphabet + [token + "</w>" for token in alphabet]
    known = set(tokens)
    merged = dict.fromkeys(left + right for left, right in learned)
    tokens += [token for token in merged if token not in known]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    merges = "".join(f"{left} {right}\n" for left, right in learned)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}")
    tokenizer = CLIPTokenizer.from_pretrained(folder, model_max_length=TEXT_LENGTH)
    tokenizer.save_pretrained(folder)
    return tokenizer


def tokenize(tokenizer, texts: list[str]) -> Tensor:
    """int64 `[texts, 32]`."""
    encoded = tokenizer(
        texts, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
    )
    return encoded["input_ids"]


def text_config(tokenizer, **sizes: Any) -> dict[str, Any]:
    """Configuration of a CLIP's text tower with this tokenizer."""
    return {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": TEXT_LENGTH,
        "hidden_act": "quick_gelu",
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **sizes,
    }


# ---------------------------------------------------------------- losses


def contrastive_loss(model, tokens: Tensor, pixels: Tensor, labels: Tensor) -> tuple[Tensor, float]:
    """(loss, loss above its minimum) of a CLIP; pairs of one class are positives."""
    with torch.autocast("cpu", torch.bfloat16):
        out = model(input_ids=tokens, pixel_values=pixels)
    logits = out.logits_per_image.float()
    target = (labels[:, None] == labels[None]).float()
    target = target / target.sum(1, keepdim=True)
    loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    excess = loss.item() + (target * target.clamp_min(1e-9).log()).sum(1).mean().item()
    return loss, excess


def step_clip(model, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step of the optimizer; the temperature stays at 1 / 30 or more."""
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        model.logit_scale.clamp_(0, math.log(30))


def reconstruct(model, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(error, KL divergence, error of edges) of an autoencoder."""
    with torch.autocast("cpu", torch.bfloat16):
        posterior = model.encode(pixels).latent_dist
        decoded = model.decode(posterior.sample()).sample
    error = decoded.float() - pixels
    mean, var, logvar = (each.float() for each in (posterior.mean, posterior.var, posterior.logvar))
    kl = 0.5 * (mean**2 + var - 1 - logvar).mean()
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error, kl, edges


def step_clipped(model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step of the optimizer, with gradients of norm 1 at most."""
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def denoising_loss(
    model, scheduler, clean: Tensor, noise: Tensor, *, timestep: Tensor, text: Tensor
) -> Tensor:
    """Mean squared error of the predicted noise."""
    noisy = scheduler.add_noise(clean, noise, timestep).contiguous(
        memory_format=torch.channels_last
    )
    with torch.autocast("cpu", torch.bfloat16):
        predicted = model(noisy, timestep, text).sample
    return F.mse_loss(predicted.float(), noise)


def drop_texts(text: Tensor, empty: Tensor, generator: torch.Generator) -> Tensor:
    """The texts with one row in ten empty, for classifier-free guidance (arXiv 2207.12598)."""
    dropped = torch.rand(len(text), generator=generator) < 0.1
    return torch.where(dropped[:, None, None], empty, text)


def update_average(average: nn.Module, model: nn.Module, step: int, limit: float) -> None:
    """Moving average of the weights, with a decay of at most `limit`."""
    decay = min(limit, (step + 1) / (step + 10))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


# ---------------------------------------------------------------- files


def make_scheduler():
    """The noise schedule of Stable Diffusion 1.5."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def save_clip(model, folder: Path) -> None:
    """Writes a CLIP for images of 32 pixels in fp16, with its image processor."""
    from transformers import CLIPImageProcessor

    model.half().save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": 32},
        crop_size={"height": 32, "width": 32},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ).save_pretrained(folder)


def save_diffusion(folder: Path, unet, scheduler, text_encoder, tokenizer, *, name: str) -> None:
    """Writes a diffusers pipeline in fp16: `model_index.json` and one folder per component.

    - `name`: folder of the UNet.
    """
    plain = copy.deepcopy(unet).to(memory_format=torch.contiguous_format)
    plain.half().save_pretrained(folder / name)
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


def link_to_clip(folder: Path, clip: str) -> None:
    """Replaces text encoder and tokenizer by links to a CLIP, `clip` relative to `folder`."""
    for name in ("text_encoder", "tokenizer"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).symlink_to(clip, target_is_directory=True)
