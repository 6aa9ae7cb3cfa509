"""Roughly how much device memory an adaptation of the generator takes, from shapes alone.

Networks are built on torch's meta device, where a pass computes shapes and nothing else. What
autograd keeps for the backward pass is counted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .low_rank import AdapterSettings, low_rank_weights
from .models import Address
from .models.class_tokens import GrownEmbedding
from .models.description import LocalGenerator, find_generator, names_checkpoint
from .models.interface import DTYPES
from .models.loading import (
    count_weights,
    denoiser_without_weights,
    text_encoders_without_weights,
)

TEXT_TOKENS = 77
"""Tokens of a prompt for CLIP."""
STATE_BYTES = 16
"""Bytes of a trained value: itself, its gradient and the two moments of AdamW, in float32."""


@dataclass(frozen=True)
class AdapterMemory:
    """Bytes on the device, without what the allocator adds.

    - `weights`: of all networks of the generator.
    - `state`: of the low-rank weights and class tokens, with gradients and moments.
    - `activations`: of one image in a step; None for a family whose passes are not counted.
    - `values`: number of trained values.
    """

    weights: int
    state: int
    activations: int | None
    values: int

    def total(self, images: int) -> int:
        """Bytes of a step with that many images."""
        return self.weights + self.state + images * (self.activations or 0)


@lru_cache(8)
@names_checkpoint
def estimate_memory(
    address: Address | str, dtype: str, settings: AdapterSettings, latents: int, classes: int = 0
) -> AdapterMemory:
    """What `train_adapter` takes, before anything is loaded.

    Activations are counted for Stable Diffusion 1.x, 2.x and SDXL, with attention that keeps no
    matrix of tokens by tokens, as all present backends of PyTorch do.

    - `dtype`: `float32`, `bfloat16` or `float16`.
    - `latents`: latents a side.
    - `classes`: of the data set, for class tokens.

    Raises CheckpointError for a checkpoint that is missing or incomplete.
    """
    found = find_generator(address)
    with torch.device("meta"):
        network = denoiser_without_weights(found).to(DTYPES[dtype])
        with low_rank_weights(network, settings) as trained:
            values = sum(parameter.numel() for parameter in trained.values())
            kept = None
            if found.family.diffusion:
                kept = _count_activations(network, latents, settings)
                if settings.class_tokens:
                    rows, texts = _count_tokens(found, dtype, classes * settings.class_tokens)
                    values, kept = values + rows, kept + texts
    return AdapterMemory(_count_weights(found, dtype), STATE_BYTES * values, kept, values)


def _count_weights(found: LocalGenerator, dtype: str) -> int:
    """Bytes of all networks as they are loaded; the VAE is float32 beside float16."""
    wide = DTYPES[dtype].itemsize
    sizes = {"vae": 4 if dtype == "float16" else wide}
    return sum(sizes.get(part, wide) * values for part, values in count_weights(found).items())


class _Fused(torch.autograd.Function):
    """What fused attention keeps: queries, keys, values and its output."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output)
        return output


class _FusedAttention(TorchFunctionMode):
    """Replaces attention by `_Fused`: on the meta device torch takes the path that keeps most."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            named = {**dict(zip(("query", "key", "value"), args, strict=False)), **(kwargs or {})}
            return _Fused.apply(named["query"], named["key"], named["value"])
        return func(*args, **(kwargs or {}))


def _count_tokens(found: LocalGenerator, dtype: str, rows: int) -> tuple[int, int]:
    """(values of so many rows of the embeddings, bytes that autograd keeps for one text)."""
    values, kept = 0, 0
    for encoder in text_encoders_without_weights(found):
        encoder.to(DTYPES[dtype]).requires_grad_(False)
        table = encoder.get_input_embeddings()
        added = torch.nn.Parameter(torch.empty(rows, table.weight.shape[1]))
        encoder.set_input_embeddings(GrownEmbedding(table, added, table.num_embeddings))
        values += added.numel()
        length = min(TEXT_TOKENS, encoder.config.max_position_embeddings)
        kept += _count_kept(encoder, torch.zeros(1, length, dtype=torch.int64))
    return values, kept


def _count_kept(network: Any, ids: Tensor) -> int:
    """Bytes that autograd keeps in a call with `ids`, as far as they are no weights."""
    weights = {id(parameter) for parameter in network.parameters()}
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        if id(base) not in weights:
            found[id(base)] = base
        return tensor

    with _FusedAttention(), torch.autograd.graph.saved_tensors_hooks(keep, lambda each: each):
        network(ids)
    return _bytes(found.values())


def _count_activations(network: Any, latents: int, settings: AdapterSettings) -> int:
    """Bytes that autograd keeps for one image, as far as they are no weights.

    With checkpointing each unit keeps its inputs alone, and one unit at a time is computed again.
    """
    weights = {id(parameter) for parameter in network.parameters()}
    scopes: list[dict[int, Tensor]] = [{}]
    units: list[int] = []
    inputs: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        base = tensor if tensor._base is None else tensor._base
        if id(base) not in weights:
            scopes[-1][id(base)] = base
        return tensor

    def unit(function: Callable[..., Any], *args: Any) -> Any:
        inputs.update({id(each): each for each in args if isinstance(each, Tensor)})
        scopes.append({})
        output = function(*args)
        units.append(_bytes(scopes.pop().values()))
        return output

    network.enable_gradient_checkpointing(gradient_checkpointing_func=unit)
    network.train()
    with _FusedAttention(), torch.autograd.graph.saved_tensors_hooks(keep, lambda each: each):
        network(**_arguments(network, latents, learn=bool(settings.class_tokens)))
    network.disable_gradient_checkpointing()
    if settings.gradient_checkpointing:
        return _bytes([*scopes[0].values(), *inputs.values()]) + max(units, default=0)
    return _bytes(scopes[0].values()) + sum(units)


def _bytes(tensors: Sequence[Tensor] | Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _arguments(network: Any, latents: int, *, learn: bool) -> dict[str, Any]:
    """One image and its text as a UNet takes them, without values.

    - `learn`: whether a gradient reaches the text.
    """
    config, dtype = network.config, network.dtype
    wide = config.cross_attention_dim
    wide = wide if isinstance(wide, int) else max(wide)
    arguments: dict[str, Any] = {
        "sample": torch.empty(1, config.in_channels, latents, latents, dtype=dtype),
        "timestep": torch.zeros(1, dtype=torch.int64),
        "encoder_hidden_states": torch.empty(
            1, TEXT_TOKENS, wide, dtype=dtype, requires_grad=learn
        ),
    }
    if config.addition_embed_type == "text_time":
        times = 6
        pooled = config.projection_class_embeddings_input_dim - (
            times * config.addition_time_embed_dim
        )
        arguments["added_cond_kwargs"] = {
            "text_embeds": torch.empty(1, pooled, dtype=dtype),
            "time_ids": torch.empty(1, times, dtype=dtype),
        }
    return arguments
