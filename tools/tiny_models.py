"""Parts of the scripts that train tiny CLIPs and tiny latent diffusion models.

`tools/make_fashion_mnist.py` trains what ships with the package; `benchmarks/checkpoints/` trains
the stand-ins of the benchmarks.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from discl.utils.atomic import whole

TEXT_LENGTH = 32
WARM_UP = 200
SAVE_EVERY = 500
"""Steps between two saved states of a training."""
MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""AdamW's state of one parameter."""
Batch = tuple[Tensor, Tensor, Tensor, Tensor]
"""Clean latents, noise, timesteps, hidden states of texts."""


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


def save_state(path: Path, step: int, optimizer: torch.optim.AdamW, **models: nn.Module) -> None:
    """Writes models and optimizer after `step` steps as safetensors, atomically.

    Names of the tensors: `MODEL.NAME`, and `optimizer.NUMBER.MOMENT` for parameter `NUMBER` of the
    optimizer.
    """
    tensors = {
        f"{name}.{key}": tensor
        for name, model in models.items()
        for key, tensor in model.state_dict().items()
    }
    for number, parameter in enumerate(parameters_of(optimizer)):
        for moment in MOMENTS:
            tensors[f"optimizer.{number}.{moment}"] = optimizer.state[parameter][moment]
    with whole(path) as file:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            file,
            metadata={"step": str(step)},
        )


def load_state(path: Path, optimizer: torch.optim.AdamW, **models: nn.Module) -> int:
    """Loads the file of `save_state`; returns the number of finished steps, 0 without a file."""
    if not path.exists():
        return 0
    with safe_open(path, "pt") as file:
        step = int(file.metadata()["step"])
    tensors = load_file(path)
    for name, model in models.items():
        model.load_state_dict({key: tensors[f"{name}.{key}"] for key in model.state_dict()})
    for number, parameter in enumerate(parameters_of(optimizer)):
        state = {moment: tensors[f"optimizer.{number}.{moment}"].clone() for moment in MOMENTS}
        for moment in ("exp_avg", "exp_avg_sq"):  # in the parameter's memory layout
            state[moment] = torch.empty_like(parameter.detach()).copy_(state[moment])
        optimizer.state[parameter] = state
    return step


def parameters_of(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """Parameters of all groups, in order."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


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


def load_text(clip: Path):
    """(tokenizer, text encoder) of a CLIP, in float32."""
    from transformers import CLIPTextModel, CLIPTokenizer

    encoder = CLIPTextModel.from_pretrained(clip, dtype=torch.float32)
    return CLIPTokenizer.from_pretrained(clip), encoder.eval()


@torch.inference_mode()
def encode(tokenizer, encoder, texts: list[str]) -> Tensor:
    """Hidden states, float32 `[texts, 32, width]`."""
    return encoder(tokenize(tokenizer, texts))[0]


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


# ---------------------------------------------------------------- denoiser


def load_latents(work: Path) -> tuple[dict[str, Tensor], float]:
    """(`mean` and `std` of the cached posteriors, float16 `[n, 8, 8, 8]`; factor of latents)."""
    from diffusers import AutoencoderKL

    factor = AutoencoderKL.load_config(work / "diffusion" / "vae")["scaling_factor"]
    return load_file(work / "latents.safetensors"), factor


def sample_latents(
    latents: dict[str, Tensor], row: Tensor, factor: float, generator: torch.Generator
) -> Tensor:
    """Scaled samples of these rows' posteriors, float32 `[rows, 8, 8, 8]`."""
    mean, std = latents["mean"][row].float(), latents["std"][row].float()
    return (mean + std * torch.randn(mean.shape, generator=generator)) * factor


def sample_noise(clean: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(noise of this shape, int64 `[rows]` timesteps)."""
    noise = torch.randn(clean.shape, generator=generator)
    return noise, torch.randint(1000, (len(clean),), generator=generator)


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


def train_denoiser(
    *,
    config: dict[str, Any],
    draw: Callable[[torch.Generator], Batch],
    rate: Callable[[int], float],
    decay: float,
    steps: int,
    checkpoint: Path,
    save: Callable[[nn.Module], None],
) -> nn.Module:
    """Trains a UNet for latents of 8×8×8; returns the moving average of its weights.

    - `config`: arguments of `UNet2DConditionModel` beyond those that all denoisers have here.
    - `draw`: returns a batch. Its generator has the step as seed.
    - `rate`: learning rate of a step.
    - `decay`: largest decay of the moving average, in [0, 1].
    - `steps`: number of steps in all, those before a break included.
    - `checkpoint`: file of the state. Training resumes at it.
    - `save`: writes the moving average. Called after the state, every 500 steps and at the end.
    """
    from diffusers import UNet2DConditionModel

    scheduler = make_scheduler()
    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=8,
        layers_per_block=1,
        attention_head_dim=2,
        **config,
    ).to(memory_format=torch.channels_last)
    print(f"unet: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    first = load_state(checkpoint, optimizer, model=model, average=average)
    start, running = time.time(), 0.0
    for step in range(first, steps):
        set_rate(optimizer, rate(step))
        clean, noise, timestep, text = draw(torch.Generator().manual_seed(step))
        loss = denoising_loss(model, scheduler, clean, noise, timestep=timestep, text=text)
        step_clipped(model, optimizer, loss)
        update_average(average, model, step, decay)
        running = loss.item() if step == first else 0.99 * running + 0.01 * loss.item()
        if step % 100 == 0:
            seconds = time.time() - start
            print(f"unet {step:5d}/{steps} loss {running:.4f} {seconds:.0f} s", flush=True)
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
            save_state(checkpoint, step + 1, optimizer, model=model, average=average)
            save(average)
    return average


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


def save_diffusion(
    unet: nn.Module, folder: Path, *, tokenizer, text_encoder, name: str = "unet"
) -> None:
    """Writes a diffusers pipeline in fp16: `model_index.json` and one folder per component.

    - `name`: folder of the UNet.
    """
    plain = copy.deepcopy(unet).to(memory_format=torch.contiguous_format)
    plain.half().save_pretrained(folder / name)
    make_scheduler().save_pretrained(folder / "scheduler")
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
    """Replaces the tokenizer by a link to that of a CLIP, `clip` relative to `folder`.

    The text encoder keeps its own file, because a loader refuses surplus tensors.
    """
    shutil.rmtree(folder / "tokenizer", ignore_errors=True)
    (folder / "tokenizer").symlink_to(clip, target_is_directory=True)
