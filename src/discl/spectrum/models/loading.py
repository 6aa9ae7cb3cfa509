"""Generators from disk: describe, check, load."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from safetensors import safe_open

from ...checkpoint_checks import HARMLESS, check_complete, check_extent, check_loaded, loading
from ...checkpoints import (
    PICKLED,
    checkpoint_digest,
    find_checkpoint,
    find_settings,
    find_weights,
    local_path,
    settings_digest,
    weights_digest,
)
from ...errors import CheckpointError
from ...levels import TEXT_ONLY, format_level
from ...utils.hashing import digest
from .families import (
    SDXL,
    UNUSED,
    Family,
    check_denoiser,
    check_parts,
    find_family,
    parts_of,
    read_config,
    read_index,
)
from .interface import DTYPES, LatentModel
from .loras import add_loras, describe_loras
from .schedules import make_ddim, make_flow
from .stable_diffusion import check_side

FLUX_SAMPLE_SIZE = (
    128  # FLUX's files name no size of their own; diffusers takes this many latents a side
)


P = ParamSpec("P")
T = TypeVar("T")

MOST_TRAINING_STEPS = 100_000
SINGLE_PREFIXES = {
    "model.diffusion_model.": ("unet", "transformer"), "first_stage_model.": ("vae",),
}  # fmt: skip
"""Beginnings of the names of a single file's tensors, and the part that they are for."""


@dataclass(frozen=True)
class Generator:
    """What a checkpoint is, as far as its configuration tells.

    `model` and `scheduler` are digests; `size` is native pixels a side, None where the files of a plain one do not tell; the sides of a
    picture are multiples of `multiple` pixels and, where the network has places for no more, at most `most`; a `distilled` one takes one
    row a step whatever the guidance; of a `plain` one diffusers' own pipeline makes the pictures. `sampler` says who denoises, in words;
    an `aesthetic` one is told a wished-for beauty, as the SDXL refiner is.
    """

    family: str
    model: str
    scheduler: str
    size: int | None
    multiple: int
    distilled: bool
    plain: bool = False
    sampler: str = "DDIM"
    aesthetic: bool = False
    most: int | None = None


@dataclass(frozen=True)
class Address:
    """Where a generator lies: a folder in diffusers' layout, a hub name, `embedded:...`, or a single safetensors file.

    A single file holds weights only; `config` names a folder or hub name with the configurations (and tokenizers) of its
    family, by default a folder beside the file that is called as it is. `loras` are files and the scales they are added with.
    """

    checkpoint: str
    config: str | None = None
    loras: tuple[tuple[str, float], ...] = ()

    @property
    def single(self) -> bool:
        path = local_path(self.checkpoint)
        return not path.is_dir() and path.suffix in {".safetensors", *PICKLED}


@dataclass(frozen=True)
class _Found:
    """A generator on this machine: its family, the folder of its configurations, its weights where they are a file of their own."""

    family: Family
    folder: Path
    file: Path | None

    @property
    def digest(self) -> str:
        if self.file is None:
            return checkpoint_digest(self.folder)
        return digest(weights_digest(self.file), settings_digest(self.folder))


def _find(address: Address | str) -> _Found:
    address = Address(address) if isinstance(address, str) else address
    if not address.single:
        folder, file = find_checkpoint(address.checkpoint), None
    else:
        file = find_weights(address.checkpoint)
        beside = file.with_suffix("")
        if address.config is None and not beside.is_dir():
            raise CheckpointError(
                f"'{file}' is a single file, which says nothing of its configuration; name a folder or hub name of its family in "
                f"spectrum.config, for example stabilityai/stable-diffusion-xl-base-1.0, or put such a folder beside it as {beside.name}/."
            )
        folder = find_settings(address.config or str(beside))
    family = find_family(folder)
    check_parts(folder, family, weights=file is None)
    check_denoiser(folder, family)
    return _Found(family, folder, file)


def _told(
    function: Callable[Concatenate[Address | str, P], T],
) -> Callable[Concatenate[Address | str, P], T]:
    """The function, in which whatever spoilt configurations raise is a CheckpointError that names the checkpoint."""

    @wraps(function)
    def clearly(address: Address | str, *args: P.args, **kwargs: P.kwargs) -> T:
        named = address.checkpoint if isinstance(address, Address) else address
        with loading(Path(named), "a generator"):
            return function(address, *args, **kwargs)

    return clearly


@_told
def describe_generator(address: Address | str) -> Generator:
    """The checkpoint's family, digests and sizes, read without loading any weight."""
    found = _find(address)
    folder, family = found.folder, found.family
    multiple = _multiple(folder, family)
    raw = (
        read_config(folder, "scheduler")
        if family.plain
        else dict(load_scheduler(folder, family).config)
    )
    settings = {key: value for key, value in raw.items() if not key.startswith("_")}
    patch = 1 if family.diffusion else 2
    network, size = read_config(folder, family.network), None
    if not family.plain or ("sample_size" in network and _vae_stages(folder, family) is not None):
        side = network.get("sample_size", FLUX_SAMPLE_SIZE)
        if not isinstance(side, int) or not 0 < side < 100_000:
            raise CheckpointError(
                f"checkpoint '{folder}': the sample_size {side!r} of {family.network}/ is no number of latents a side."
            )
        size = side * multiple // patch
    scheduler = digest(
        family.pipeline if family.plain else "DDIM" if family.diffusion else "flow", settings
    )
    own = f"diffusers' {family.pipeline} with the checkpoint's own sampler"
    sampler = own if family.plain else "DDIM" if family.diffusion else "Euler steps of the flow"
    aesthetic = family is SDXL and bool(read_index(folder).get("requires_aesthetics_score"))
    most = _most(folder, family)
    return Generator(
        family.name,
        found.digest,
        scheduler,
        size,
        multiple,
        family.distilled,
        family.plain,
        sampler,
        aesthetic,
        most,
    )


@_told
def check_generator(
    address: Address | str,
    num_inference_steps: int,
    size: int | None = None,
    levels: Iterable[int] = (),
    fixed: bool = False,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
) -> None:
    """Raises CheckpointError for a checkpoint that is missing, of another family, or cannot do these steps, levels or sides.

    Reads configurations only, no weight.
    """
    found = _find(address)
    folder, family = found.folder, found.family
    if isinstance(address, Address):
        describe_loras(address.loras)
    if family.plain:
        _check_plain(found, levels, fixed or guidance_interval != (0.0, 1.0))
        if size is not None:
            check_side(size, _multiple(folder, family))
        elif describe_generator(address).size is None:
            raise CheckpointError(
                f"checkpoint '{folder}' does not tell how large the pictures of a {family.name} are; set spectrum.size."
            )
        return
    scheduler = load_scheduler(folder, family)
    if family.distilled and guidance_interval != (0.0, 1.0):
        raise CheckpointError(
            f"checkpoint '{folder}' is {family.name}, whose guidance is built in and costs nothing; leave out spectrum.guidance_interval."
        )
    make = make_ddim if family.diffusion else make_flow
    schedule = make(scheduler, num_inference_steps, fixed=fixed)
    lacking = [format_level(level) for level in levels if level not in schedule.spans]
    if lacking:
        raise CheckpointError(
            f"level {lacking[0]} has fewer than {num_inference_steps} training steps of noise, so that steps: fixed cannot be; "
            "use fewer steps, a lower level, or steps: per-level."
        )
    if size is not None:
        check_side(size, _multiple(folder, family), _most(folder, family))


def _check_plain(found: _Found, levels: Iterable[int], options: bool) -> None:
    name = found.family.name
    if options:
        raise CheckpointError(
            f"checkpoint '{found.folder}' is a {name}, which diffusers' own pipeline denoises; leave out spectrum.steps and "
            "spectrum.guidance_interval, which are for families of the engine."
        )
    if found.family.text is None and TEXT_ONLY in levels:
        raise CheckpointError(
            f"diffusers has no text-to-image pipeline for a {name}, which level 0 needs; take 0 out of spectrum.levels."
        )


def load_scheduler(folder: Path, family: Family) -> Any:
    """The checkpoint's schedule: of a diffusion model as DDIM, whatever sampler it was published with, of a flow as Euler steps.

    For DDIM clipping is off, for latents are not bounded by ±1 as its default has it; and the offset is 1 for Stable Diffusion, whose
    pipelines in diffusers force it, though not for SDXL, whose file is followed.
    """
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    settings = read_config(folder, "scheduler")
    steps = settings.get("num_train_timesteps", 1000)
    if not isinstance(steps, int) or not 1 <= steps <= MOST_TRAINING_STEPS:
        raise CheckpointError(
            f"checkpoint '{folder}': num_train_timesteps of scheduler/ is {steps!r:.80}; expected 1 to {MOST_TRAINING_STEPS:,}."
        )
    with loading(folder, "a sampler"):
        if family.diffusion:
            forced = {} if family is SDXL else {"steps_offset": 1}
            return DDIMScheduler.from_config(settings, clip_sample=False, **forced)
        return FlowMatchEulerDiscreteScheduler.from_config(settings)


@_told
def load_generator(
    address: Address | str, dtype: str = "float32", device: torch.device | str = "cpu"
) -> LatentModel:
    """The model of a checkpoint, its LoRAs added to its weights.

    The VAE runs in float32 where float16 is asked for (it overflows there). Raises CheckpointError for a folder that
    lacks a component or weights, holds pickled weights, or is of a family that is not supported.
    """
    found = _find(address)
    if found.family.build is None:
        raise CheckpointError(
            f"checkpoint '{found.folder}' is a {found.family.name}, which the engine does not know; use load_plain."
        )
    with loading(found.file or found.folder, "a generator"):
        pipeline = load_pipeline(found, dtype)
        if isinstance(address, Address):
            add_loras(pipeline, address.loras)
        return found.family.build(pipeline, device)


@_told
def load_plain(
    address: Address | str, dtype: str = "float32", device: torch.device | str = "cpu"
) -> tuple[Any, Any | None]:
    """diffusers' image-to-image and text-to-image pipelines (None where it has none) of a checkpoint, sharing their parts."""
    import diffusers

    found = _find(address)
    kind = getattr(diffusers, found.family.pipeline)
    diffusers.utils.logging.disable_progress_bar()
    takes = kind._get_signature_types()
    unused = {name: None for name in UNUSED if name in takes and name in kind._optional_components}
    with loading(found.file or found.folder, "a generator"):
        wanted: dict[str, Any] = {"local_files_only": True, **unused}
        if found.file is not None:
            image = kind.from_single_file(
                str(found.file), config=str(found.folder), torch_dtype=DTYPES[dtype], **wanted
            )
            _check_single(image, found.file)
        else:
            wanted |= load_parts(found.folder, found.family, {"default": DTYPES[dtype]})
            image = kind.from_pretrained(
                found.folder,
                dtype=DTYPES[dtype],
                use_safetensors=True,
                trust_remote_code=False,
                **wanted,
            )
        if isinstance(address, Address):
            add_loras(image, address.loras)
        image.to(device)
        text = (
            None
            if found.family.text is None
            else getattr(diffusers, found.family.text).from_pipe(image)
        )
    for pipeline in (image, text):
        if pipeline is not None:
            pipeline.set_progress_bar_config(disable=True)
    return image, text


def load_pipeline(found: _Found, dtype: str) -> Any:
    """diffusers' pipeline, from safetensors only."""
    import diffusers

    family, folder, wanted = found.family, found.folder, DTYPES[dtype]
    kind = getattr(diffusers, family.pipeline)
    takes = [
        name
        for name in kind._get_signature_types()
        if name in UNUSED or name.startswith(("tokenizer", "text_encoder"))
    ]
    absent: dict[str, Any] = {name: None for name in takes if name not in parts_of(folder, family)}
    common = {**absent, "scheduler": load_scheduler(folder, family), "local_files_only": True}
    diffusers.utils.logging.disable_progress_bar()
    if found.file is not None:
        pipeline = kind.from_single_file(
            str(found.file), config=str(folder), torch_dtype=wanted, **common
        )
        _check_single(pipeline, found.file)
        pipeline.vae.to(torch.float32 if dtype == "float16" else wanted)
        return pipeline
    dtypes = {"default": wanted, "vae": torch.float32 if dtype == "float16" else wanted}
    return kind.from_pretrained(
        folder,
        **common,
        **load_parts(folder, family, dtypes),
        dtype=dtypes,
        use_safetensors=True,
        trust_remote_code=False,
    )


def load_parts(folder: Path, family: Family, dtypes: Mapping[str, torch.dtype]) -> dict[str, Any]:
    """The networks of a folder by their names, each in its dtype or the default one.

    Raises CheckpointError for one whose files lack weights, which would be random ones.
    """
    import diffusers
    import transformers

    index, libraries, loaded = (
        read_index(folder),
        {"diffusers": diffusers, "transformers": transformers},
        {},
    )
    for name in parts_of(folder, family):
        files = [file.name for file in (folder / name).glob("*.safetensors")]
        library, kind = index.get(name) or ("", "")
        network: Any = getattr(libraries.get(library), kind, None)
        if not files or not hasattr(network, "modules"):
            continue  # not a network: a tokenizer may share a folder with the weights of a text encoder
        config = read_config(folder, name)
        check_extent(folder / name, config, partial(_without_weights, network, config))
        own = {"trust_remote_code": False} if library == "transformers" else {}
        loaded[name], found = network.from_pretrained(
            folder / name, dtype=dtypes.get(name, dtypes["default"]), use_safetensors=True, local_files_only=True, output_loading_info=True,
            variant="fp16" if all(".fp16" in file for file in files) else None, ignore_mismatched_sizes=True, **own,
        )  # fmt: skip
        check_loaded(folder / name, found)
    return loaded


def _without_weights(network: Any, config: Mapping[str, Any]) -> Any:
    """The network of a configuration, of transformers or of diffusers."""
    settings = dict(config)
    if hasattr(network, "config_class") and network.config_class is not None:
        return network(network.config_class.from_dict(settings))
    return network.from_config(settings)


def _check_single(pipeline: Any, file: Path) -> None:
    """Raises CheckpointError where the file lacked weights, which diffusers leaves without a value, or has some beyond the network's.

    Names differ from diffusers', but no value is dropped on the way: what the file has more is another network's.
    """
    parts = {
        name: part
        for name, part in pipeline.components.items()
        if isinstance(part, torch.nn.Module)
    }
    check_complete(
        file,
        [
            f"{part}.{name}"
            for part, network in parts.items()
            for name, tensor in network.named_parameters()
            if tensor.is_meta
        ],
    )
    held: dict[str, int] = {}
    with safe_open(file, "pt") as stored:
        for name in stored.keys():  # noqa: SIM118 (not a dict)
            for prefix in SINGLE_PREFIXES:
                if name.startswith(prefix) and not HARMLESS.search(name):
                    size = math.prod(stored.get_slice(name).get_shape())
                    held[prefix] = held.get(prefix, 0) + size
    for prefix, names in SINGLE_PREFIXES.items():
        network = next((parts[name] for name in names if name in parts), None)
        if network is None or prefix not in held:
            continue
        taken = sum(tensor.numel() for tensor in network.state_dict().values())
        if held[prefix] > taken:
            raise CheckpointError(
                f"'{file}' holds {held[prefix]:,} values under {prefix}*, {held[prefix] - taken:,} more than the {type(network).__name__} "
                "of its configuration takes. Name the configuration that belongs to it in spectrum.config."
            )


def _multiple(folder: Path, family: Family) -> int:
    stages = _vae_stages(folder, family)
    if stages is None:
        return 16
    return 2 ** (stages - 1) * (1 if family.diffusion else 2)


def _vae_stages(folder: Path, family: Family) -> int | None:
    """Stages of the VAE, each but the first of which halves a side; None for a plain family whose files do not tell."""
    if family.plain and "vae" not in family.parts:
        return None
    channels = read_config(folder, "vae").get("block_out_channels", None if family.plain else [0])
    if isinstance(channels, list):
        return len(channels)
    if channels is None and family.plain:
        return None
    raise CheckpointError(
        f"checkpoint '{folder}': block_out_channels of vae/ is {channels!r}, no list of channels; fetch it anew."
    )


def _most(folder: Path, family: Family) -> int | None:
    """The longest side that the network has places for; None where nothing bounds it."""
    places = None if family.plain else read_config(folder, family.network).get("pos_embed_max_size")
    return places * _multiple(folder, family) if isinstance(places, int) else None
