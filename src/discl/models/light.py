"""Light tuning: adapters in a frozen vision transformer, and a head over its features."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checkpoints import checkpoint_digest, find_checkpoint, find_stored_checkpoint
from ..errors import CheckpointError, RecipeError, shorten
from .clip import ClipClassifier, ClipTower, read_clip_tower
from .heads import CosineHead
from .pretrained import TimmClassifier, TransformersClassifier

NORMS = ("layer_norm2", "layernorm_after", "norm2")
"""Names of the layer norm before the MLP of a block, in transformers and timm."""
MLPS = ("mlp", "output")
QUERIES_AND_VALUES = ("q_proj", "v_proj", "query", "value")
LORA = ".lora_"
"""Part of the name of every parameter that peft adds."""
UNREACHED = (
    "adapters beside the MLP need blocks that call their MLP as one module, after its layer norm; "
    "use adapter: lora or none."
)
ANY_CLASSES = ("0", "1")
"""Class names of a network that is taken without its head."""


class AdaptFormer(nn.Module):
    """A bottleneck beside the MLP of a block (arXiv 2205.13535, eq. 2), as in LIFT.

    It returns scale · up(ReLU(down(norm(x)))). `up` starts at zero and the scale at 1, so the
    initial network is the frozen one.

    - `channels`: of the block; `width`: of the bottleneck.
    """

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)
        self.down, self.up = nn.Linear(channels, width), nn.Linear(width, channels)
        self.scale = nn.Parameter(torch.ones(()))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)
        self.seen: Tensor | None = None
        self.applied = False

    def forward(self, x: Tensor) -> Tensor:
        """What is added to the MLP's output, `[..., channels]`, for the block's stream x."""
        return self.scale * self.up(F.relu(self.down(self.norm(x))))

    def attach(self, block: Block) -> None:
        """Adds the bottleneck's output to that of the block's MLP, in every call from now on."""
        block.norm.register_forward_pre_hook(self._see)
        block.mlp.register_forward_hook(self._add)

    def _see(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.seen = inputs[0]

    def _add(self, mlp: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        seen, self.seen, self.applied = self.seen, None, True
        if seen is None or seen.shape != output.shape:
            raise CheckpointError(UNREACHED, argument="adapter")
        return output + self(seen)


@dataclass(frozen=True)
class Block:
    """A block of a vision transformer: its name, the norm before its MLP, and the MLP."""

    name: str
    norm: nn.LayerNorm
    mlp: nn.Module


class LightClassifier(nn.Module):
    """A frozen image tower with adapters, and a head over its features (LIFT, arXiv 2309.10019).

    Its state is the light part: adapters and head. The weights of the tower come by `load_base`.

    - `architecture`: `clip`, `transformers` or `timm`.
    - `backbone`: the network as plain values; of a CLIP `{"vision_config": ...}`.
    - `light`: `adapter`, `width`, `head` and `scale`, as returned by `light_settings`.
    - `num_classes`: number of labels.

    Raises CheckpointError for a tower without the layers that the adapters need.
    """

    def __init__(
        self,
        architecture: str,
        backbone: Mapping[str, Any],
        light: Mapping[str, Any],
        num_classes: int,
    ) -> None:
        super().__init__()
        self.tower = _build_network(architecture, backbone)
        adapter, width = light["adapter"], light["width"]
        blocks = find_blocks(self.tower) if adapter != "none" else []
        channels = _without_head(self.tower)
        self.adapters = nn.ModuleList()
        if adapter == "lora":
            add_lora(self.tower, blocks, width)
        for name, parameter in self.tower.named_parameters():
            parameter.requires_grad_(LORA in name)
        if adapter == "adaptformer":
            for block in blocks:
                self.adapters.append(AdaptFormer(block.norm.normalized_shape[0], width))
                self.adapters[-1].attach(block)  # type: ignore[operator]
        self.head: Any = (
            CosineHead(channels, num_classes, light["scale"])
            if light["head"] == "cosine"
            else nn.Linear(channels, num_classes)
        )
        self.register_state_dict_post_hook(_without_base)

    def features(self, x: Tensor) -> Tensor:
        """Features of normalised pixels `[batch, 3, h, w]`, float32 `[batch, channels]`.

        Those of a CLIP are before its projection.
        """
        return self.tower(x).float()

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[batch, classes]` of normalised pixels `[batch, 3, h, w]`."""
        features = self.features(x)
        kind = features.device.type
        exact = torch.amp.autocast_mode.is_autocast_available(kind)
        with torch.autocast(kind, enabled=False) if exact else nullcontext():
            return self.head(features)

    def train(self, mode: bool = True) -> LightClassifier:
        """Sets training or evaluation mode; the frozen tower stays in evaluation mode."""
        super().train(mode)
        self.tower.eval()
        return self

    @torch.no_grad()
    def set_head(self, vectors: Tensor) -> None:
        """Starts the head from one vector per class, `[classes, channels]`; biases are zero."""
        self.head.weight.copy_(vectors)
        if getattr(self.head, "bias", None) is not None:
            self.head.bias.zero_()

    @torch.no_grad()
    def load_base(self, tensors: Mapping[str, Tensor]) -> None:
        """Copies the weights of the tower, named as without adapters; others are ignored.

        Raises CheckpointError for missing ones, or those of another shape.
        """
        for name, tensor in self.tower.state_dict(keep_vars=True).items():
            if LORA in name:
                continue
            plain = name.replace(".base_layer.", ".")
            found = tensors.get(plain)
            if found is None or found.shape != tensor.shape:
                raise CheckpointError(
                    f"the base has no weight '{plain}' of shape {list(tensor.shape)}; it is "
                    "another network."
                )
            tensor.copy_(found)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Loads the light part. Raises RuntimeError for missing or surplus tensors."""
        different = sorted(self.state_dict().keys() ^ state_dict.keys())
        if different:
            raise RuntimeError(
                f"'{different[0]}' and {len(different) - 1} other tensors are missing or not of "
                "this light part."
            )
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def __deepcopy__(self, memo: dict[int, Any]) -> LightClassifier:
        """A copy of the light part; the frozen weights are shared."""
        base = [*self.tower.named_parameters(), *self.tower.named_buffers()]
        memo.update({id(tensor): tensor for name, tensor in base if LORA not in name})
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return made


def _without_base(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Drops the frozen weights from a state."""
    for name in [name for name in state if name.startswith(f"{prefix}tower.")]:
        if LORA not in name:
            del state[name]


def _build_network(architecture: str, backbone: Mapping[str, Any]) -> nn.Module:
    """A tower of a CLIP, or a classifier with its head, initialised at random."""
    if architecture == "clip":
        return ClipTower(backbone["vision_config"])
    return _with_head(architecture, backbone)


def _without_head(network: Any) -> int:
    """Takes the head off a network, in place; returns the number of its features."""
    if isinstance(network, ClipTower):
        return int(network.model.config.hidden_size)
    head = network.head
    if not isinstance(head, nn.Linear):
        raise CheckpointError(
            f"light tuning replaces a head of one linear layer; this network has a "
            f"{type(head).__name__}."
        )
    for name, module in list(network.named_modules()):
        if module is head:
            above, _, last = name.rpartition(".")
            setattr(network.get_submodule(above), last, nn.Identity())
    return head.in_features


def _with_head(architecture: str, backbone: Mapping[str, Any]) -> nn.Module:
    if architecture == "timm":
        return TimmClassifier(dict(backbone), len(ANY_CLASSES))
    return TransformersClassifier(dict(backbone), ANY_CLASSES)


def read_base(folder: Path, architecture: str, backbone: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of the image tower in a checkpoint folder, for `LightClassifier.load_base`.

    Raises CheckpointError for missing weights, and those of another network.
    """
    if architecture == "clip":
        return read_clip_tower(folder)
    made: Any = _with_head(architecture, backbone)
    made.load_pretrained(folder)
    return made.state_dict()


def find_blocks(tower: nn.Module) -> list[Block]:
    """The blocks of a vision transformer.

    Raises CheckpointError for a network without blocks of a layer norm and an MLP.
    """
    blocks = []
    for name, module in tower.named_modules():
        parts = dict(module.named_children())
        norm = next((parts[each] for each in NORMS if each in parts), None)
        mlp = next((parts[each] for each in MLPS if each in parts), None)
        if isinstance(norm, nn.LayerNorm) and mlp is not None:
            blocks.append(Block(name, norm, mlp))
    if not blocks:
        kind = type(getattr(tower, "model", tower)).__name__
        raise CheckpointError(
            f"adapters need the blocks of a vision transformer, and a {kind} has none. Use a CLIP "
            "with a ViT, or a ViT; or tune the head only (adapter: none).",
            argument="adapter",
        )
    return blocks


def add_lora(tower: nn.Module, blocks: Sequence[Block], rank: int) -> None:
    """Adds low-rank updates (arXiv 2106.09685) to q and v of every block, by peft; α is the rank.

    Raises CheckpointError for blocks that keep q, k and v in one layer, and without peft.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise CheckpointError(
            "adapter: lora needs the package peft: pip install 'discl[lora]'.", argument="adapter"
        ) from error
    targets = []
    for block in blocks:
        inside = tower.get_submodule(block.name)
        found = [
            f"{block.name}.{name}"
            for name, module in inside.named_modules()
            if name.rpartition(".")[2] in QUERIES_AND_VALUES and isinstance(module, nn.Linear)
        ]
        if len(found) != 2:
            raise CheckpointError(
                f"adapter: lora needs q and v as two linear layers in every block, and "
                f"'{block.name}' has {len(found)}; use adapter: adaptformer.",
                argument="adapter",
            )
        targets += found
    settings = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
    inject_adapter_in_model(settings, tower, adapter_name="light")


def auto_width(classes: int, blocks: int) -> int:
    """2^⌊log2(C / 2L)⌋ for C classes and L blocks, at least 1 (LIFT, arXiv 2309.10019)."""
    return 2 ** max(0, math.floor(math.log2(classes / (2 * blocks))))


def light_settings(
    architecture: str,
    backbone: Mapping[str, Any],
    *,
    classes: int,
    image_size: int,
    adapter: str,
    width: int | str,
    head: str,
    scale: float,
) -> dict[str, Any]:
    """The settings of a `LightClassifier`, checked on its network without its weights.

    - `width`: of the adapters; `auto`: by `auto_width`.

    Raises CheckpointError for a tower without the layers that the adapters need.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        if adapter == "none":
            number = 0
        elif isinstance(width, int):
            number = width
        else:
            tower = _build_network(architecture, backbone)
            number = auto_width(classes, len(find_blocks(tower)))
        settings = {"adapter": adapter, "width": number, "head": head, "scale": scale}
        model = LightClassifier(architecture, backbone, settings, classes)
        if adapter == "adaptformer":
            model(torch.zeros(1, 3, image_size, image_size))
            if not all(each.applied for each in model.adapters):
                raise CheckpointError(UNREACHED, argument="adapter")
    return settings


def text_vectors(clip: ClipClassifier) -> Tensor:
    """The texts of the classes as vectors before the projection P, `[classes, channels]`.

    They are normalise(t_c) · Pᵀ, normalised again, with t_c the mean of the embeddings of the
    class's prompts (LIFT, arXiv 2309.10019, text-aware initialisation).

    - `clip`: with its zero-shot head.
    """
    texts = F.normalize(clip.head.weight.detach(), dim=1)
    return F.normalize(texts @ clip.clip.visual_projection.weight.detach(), dim=1)


def find_base(light: Mapping[str, Any], base: str | Path | None = None) -> Path:
    """The folder of the checkpoint that a light classifier was tuned over.

    - `light`: with the `checkpoint`, as its training named it, and its digest `base`.
    - `base`: where the checkpoint is now; None: where it was. Then nothing is downloaded.

    Raises CheckpointError where it is not on this machine, or is another one.
    """
    stated, wanted = light["checkpoint"], light["base"]
    if base is not None:
        folder = find_checkpoint(str(base))
    else:
        try:
            folder = find_stored_checkpoint(stated)
        except (CheckpointError, RecipeError) as error:
            raise CheckpointError(
                f"it was tuned over the base {shorten(stated, 300)} of digest {wanted}, which is "
                f"not here ({error}). Name its folder: base=FOLDER, or --base FOLDER.",
                argument="base",
            ) from error
    found = checkpoint_digest(folder)
    if found != wanted:
        raise CheckpointError(
            f"it was tuned over the base '{stated}' of digest {wanted}, but '{base or stated}' has "
            f"digest {found}. Give the checkpoint that it was tuned over.",
            argument="base",
        )
    return folder


def check_light(light: Mapping[str, Any]) -> None:
    """Raises ValueError for settings that no light classifier has."""
    allowed: dict[str, Any] = {
        "adapter": lambda value: value in ("adaptformer", "lora", "none"),
        "width": lambda value: type(value) is int and 0 <= value < 100_000,
        "head": lambda value: value in ("cosine", "linear"),
        "scale": lambda value: type(value) in (int, float) and 0 < value < 1e6,
        "base": lambda value: isinstance(value, str),
        "checkpoint": lambda value: isinstance(value, str),
    }
    for name, is_allowed in allowed.items():
        if name not in light or not is_allowed(light[name]):
            raise ValueError(f"light.{name} is {light.get(name)!r:.80}")
    if light["adapter"] != "none" and not light["width"]:
        raise ValueError("light.width is 0, and an adapter needs at least 1")
