"""What a generator is and can do, read from its configuration alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from ...checkpoint_checks import loading
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
from ...errors import CheckpointError, arguments_named
from ...levels import TEXT_ONLY, format_level
from ...utils.hashing import digest
from .families import (
    SDXL,
    Family,
    check_denoiser,
    check_parts,
    find_family,
    read_config,
    read_index,
)
from .loras import describe_loras
from .samplers import check_own_sampler, make_sampler
from .schedules import make_flow
from .stable_diffusion import check_side

P = ParamSpec("P")
T = TypeVar("T")

FLUX_SAMPLE_SIZE = 128
"""Latents a side of FLUX's native size, which its files do not name; diffusers' value."""
MAX_TRAINING_STEPS = 100_000


@dataclass(frozen=True)
class Generator:
    """What a checkpoint is, as far as its configuration says.

    - `family`: its name, for example `SDXL`.
    - `model`, `scheduler`: digests of weights and schedule.
    - `size`: native pixels a side; None where the files of a `plain` one do not say.
    - `multiple`: sides of an image are multiples of this many pixels.
    - `distilled`: guidance is built in, so a step takes one row at any scale.
    - `plain`: the engine does not know the family; diffusers' own pipeline makes the images.
    - `sampler`: what denoises, in words.
    - `aesthetic`: the network takes an aesthetic score, as the SDXL refiner does.
    - `max_side`: the longest side in pixels that the network has position embeddings for; None
      where nothing bounds it.
    - `takes_class_tokens`: CLIP alone encodes its texts, so class tokens can be trained.
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
    max_side: int | None = None
    takes_class_tokens: bool = False


@dataclass(frozen=True)
class Address:
    """Where a generator is.

    - `checkpoint`: a folder in diffusers' layout, a hub name, `embedded:...`, or a single
      safetensors file.
    - `config`: for a single file, the folder or hub name with the configurations and tokenizers of
      its family. By default the folder beside the file, with the file's name without suffix.
    - `loras`: LoRA files and the scales that they are added with.
    - `class_tokens`: a file of class tokens that `discl adapt` wrote. Prompts are then written with
      the tokens of their request's label.
    """

    checkpoint: str
    config: str | None = None
    loras: tuple[tuple[str, float], ...] = ()
    class_tokens: str | None = None

    @property
    def single(self) -> bool:
        """Whether it is a single file."""
        path = local_path(self.checkpoint)
        return not path.is_dir() and path.suffix in {".safetensors", *PICKLED}


@dataclass(frozen=True)
class LocalGenerator:
    """A generator on this machine: `file` holds the weights if they are a single file."""

    family: Family
    folder: Path
    file: Path | None

    @property
    def digest(self) -> str:
        """Digest of the weights and settings."""
        if self.file is None:
            return checkpoint_digest(self.folder)
        return digest(weights_digest(self.file), settings_digest(self.folder))


def names_checkpoint(
    function: Callable[Concatenate[Address | str, P], T],
) -> Callable[Concatenate[Address | str, P], T]:
    """Decorator: errors of broken files become a CheckpointError that names the checkpoint."""

    @wraps(function)
    def wrapped(address: Address | str, *args: P.args, **kwargs: P.kwargs) -> T:
        name = address.checkpoint if isinstance(address, Address) else address
        with loading(Path(name), "a generator"):
            return function(address, *args, **kwargs)

    return wrapped


def find_generator(address: Address | str) -> LocalGenerator:
    """Finds (or fetches) a generator's files and checks that they are complete.

    Raises CheckpointError otherwise; for a single file without a configuration (`config`).
    """
    address = Address(address) if isinstance(address, str) else address
    if not address.single:
        folder, file = find_checkpoint(address.checkpoint), None
    else:
        file = find_weights(address.checkpoint)
        beside = file.with_suffix("")
        if address.config is None and not beside.is_dir():
            raise CheckpointError(
                f"'{file}' is a single file without a configuration. Name a folder or hub name of "
                "its family, for example stabilityai/stable-diffusion-xl-base-1.0, or put such a "
                f"folder beside it as {beside.name}/.",
                argument="config",
            )
        with arguments_named("config"):
            folder = find_settings(address.config or str(beside))
    family = find_family(folder)
    check_parts(folder, family, weights=file is None)
    check_denoiser(folder, family)
    return LocalGenerator(family, folder, file)


@names_checkpoint
def describe_generator(address: Address | str) -> Generator:
    """The checkpoint's family, digests and sizes, read without loading any weight.

    - `address`: a folder in diffusers' layout, a hub name, `embedded:...`, or a single safetensors
      file.

    Raises CheckpointError for a missing or incomplete checkpoint, and for an unknown family.

    ```python
    import discl

    generator = discl.describe_generator("embedded:fashion-mnist/diffusion")
    generator.size  # 32
    ```
    """
    found = find_generator(address)
    folder, family = found.folder, found.family
    return Generator(
        family=family.name,
        model=found.digest,
        scheduler=_scheduler_digest(folder, family),
        size=_native_size(folder, family),
        multiple=_side_multiple(folder, family),
        distilled=family.distilled,
        plain=family.plain,
        sampler=_sampler(family),
        aesthetic=family is SDXL and bool(read_index(folder).get("requires_aesthetics_score")),
        max_side=_max_side(folder, family),
        takes_class_tokens=family.diffusion and not family.plain,
    )


@names_checkpoint
def check_generator(
    address: Address | str,
    num_inference_steps: int,
    size: int | None = None,
    levels: Iterable[int] = (),
    *,
    fixed: bool = False,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    sampler: str = "ddim",
    timestep_spacing: str | None = None,
) -> None:
    """Checks that a generator can make such images; reads configurations only, no weight.

    - `num_inference_steps`: T.
    - `size`: pixels a side; None for the native size.
    - `levels`: λ in whole per cents.
    - `fixed`: whether every level takes T steps.
    - `guidance_interval`: the noise fractions at which steps are guided, the lower end excluded.
    - `sampler`: one of `SAMPLERS`; families other than Stable Diffusion and SDXL have their own.
    - `timestep_spacing`: `leading`, `trailing`, `linspace`, or None for the checkpoint's own.

    Raises CheckpointError that names the argument, and for a checkpoint that is missing,
    incomplete or of an unknown family.
    """
    found = find_generator(address)
    folder, family = found.folder, found.family
    if isinstance(address, Address):
        describe_loras(address.loras)
    if family.plain or not family.diffusion:
        check_own_sampler(f"a {family.name}", sampler, timestep_spacing)
    if family.plain:
        _check_plain(found, levels, fixed, guidance_interval)
        if size is not None:
            check_side(size, _side_multiple(folder, family))
        elif _native_size(folder, family) is None:
            raise CheckpointError(
                f"checkpoint '{folder}' does not say how large the images of a {family.name} are; "
                "set the size.",
                argument="size",
            )
        return
    scheduler = load_scheduler(folder, family)
    if family.distilled and guidance_interval != (0.0, 1.0):
        raise CheckpointError(
            f"checkpoint '{folder}' is {family.name}: its guidance is built in and costs nothing. "
            "Leave the interval out.",
            argument="guidance_interval",
        )
    levels = list(levels)
    if family.diffusion:
        spans = make_sampler(
            scheduler,
            num_inference_steps,
            sampler=sampler,
            timestep_spacing=timestep_spacing,
            fixed=fixed,
            levels=levels,
        ).spans
    else:
        spans = make_flow(scheduler, num_inference_steps, fixed=fixed).spans
    missing = [level for level in levels if level not in spans]
    if missing:
        raise CheckpointError(
            f"level {format_level(missing[0])} has fewer than {num_inference_steps} training steps "
            "of noise on this sampler's grid, so it cannot take a fixed number of steps. Use fewer "
            "steps, a lower level, or steps per level.",
            argument="levels",
        )
    if size is not None:
        check_side(size, _side_multiple(folder, family), _max_side(folder, family))


def _check_plain(
    found: LocalGenerator,
    levels: Iterable[int],
    fixed: bool,
    guidance_interval: tuple[float, float],
) -> None:
    name = found.family.name
    options = {"fixed": fixed, "guidance_interval": guidance_interval != (0.0, 1.0)}
    for argument, used in options.items():
        if used:
            raise CheckpointError(
                f"checkpoint '{found.folder}' is a {name}, which diffusers' own pipeline denoises. "
                "Only families that the engine knows have this option; leave it out.",
                argument=argument,
            )
    if found.family.text is None and TEXT_ONLY in levels:
        raise CheckpointError(
            f"diffusers has no text-to-image pipeline for a {name}, which level 0 needs; take 0 "
            "out.",
            argument="levels",
        )


def load_scheduler(folder: Path, family: Family) -> Any:
    """The checkpoint's schedule: DDIM for a diffusion model whatever its sampler, else Euler steps.

    For DDIM clipping is off, because latents are not bounded by ±1 as its default assumes. The
    offset is 1 for Stable Diffusion, whose pipelines in diffusers force it. For SDXL the file
    decides.
    """
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    settings = read_config(folder, "scheduler")
    steps = settings.get("num_train_timesteps", 1000)
    if not isinstance(steps, int) or not 1 <= steps <= MAX_TRAINING_STEPS:
        raise CheckpointError(
            f"checkpoint '{folder}': num_train_timesteps of scheduler/ is {steps!r:.80}; expected "
            f"1 to {MAX_TRAINING_STEPS:,}."
        )
    with loading(folder, "a sampler"):
        if family.diffusion:
            forced = {} if family is SDXL else {"steps_offset": 1}
            return DDIMScheduler.from_config(settings, clip_sample=False, **forced)
        return FlowMatchEulerDiscreteScheduler.from_config(settings)


def _scheduler_digest(folder: Path, family: Family) -> str:
    if family.plain:
        kind, config = family.pipeline, read_config(folder, "scheduler")
    else:
        kind = "DDIM" if family.diffusion else "flow"
        config = dict(load_scheduler(folder, family).config)
    return digest(kind, {key: value for key, value in config.items() if not key.startswith("_")})


def _sampler(family: Family) -> str:
    if family.plain:
        return f"diffusers' {family.pipeline} with the checkpoint's own sampler"
    return "DDIM" if family.diffusion else "Euler steps of the flow"


def _native_size(folder: Path, family: Family) -> int | None:
    """Pixels a side; None for a plain family whose files do not say."""
    network = read_config(folder, family.network)
    if family.plain and ("sample_size" not in network or _vae_stages(folder, family) is None):
        return None
    side = network.get("sample_size", FLUX_SAMPLE_SIZE)
    if not isinstance(side, int) or not 0 < side < 100_000:
        raise CheckpointError(
            f"checkpoint '{folder}': the sample_size {side!r} of {family.network}/ is no number of "
            "latents a side."
        )
    patch = 1 if family.diffusion else 2
    return side * _side_multiple(folder, family) // patch


def _side_multiple(folder: Path, family: Family) -> int:
    """Pixels that a side is a multiple of: a latent, or a patch of 2 latents for a transformer."""
    stages = _vae_stages(folder, family)
    if stages is None:
        return 16
    return 2 ** (stages - 1) * (1 if family.diffusion else 2)


def _vae_stages(folder: Path, family: Family) -> int | None:
    """Stages of the VAE, each but the first of which halves a side.

    None for a plain family whose files do not say.
    """
    if family.plain and "vae" not in family.parts:
        return None
    channels = read_config(folder, "vae").get("block_out_channels", None if family.plain else [0])
    if isinstance(channels, list):
        return len(channels)
    if channels is None and family.plain:
        return None
    raise CheckpointError(
        f"checkpoint '{folder}': block_out_channels of vae/ is {channels!r}, no list of channels; "
        "download it again."
    )


def _max_side(folder: Path, family: Family) -> int | None:
    """The longest side that the network has position embeddings for; None without a bound."""
    if family.plain:
        return None
    positions = read_config(folder, family.network).get("pos_embed_max_size")
    return positions * _side_multiple(folder, family) if isinstance(positions, int) else None
