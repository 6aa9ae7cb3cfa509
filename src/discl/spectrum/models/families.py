"""Which families are known, and what their folders must hold."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...checkpoint_checks import check_tokenizer, read_json
from ...checkpoints import how_to_convert
from ...errors import CheckpointError
from .flow import Flux, StableDiffusion3
from .interface import LatentModel
from .stable_diffusion import StableDiffusion, StableDiffusionXL

UNUSED = ("safety_checker", "feature_extractor", "image_encoder")
"""Parts of a checkpoint that generation does not need."""


@dataclass(frozen=True)
class Family:
    """A kind of checkpoint.

    - `name`: for messages and reports.
    - `pipeline`: diffusers' image-to-image class, which loads it.
    - `build`: makes a `LatentModel` of the pipeline and a device. None for a family that the engine
      does not know: diffusers' own pipeline makes its images.
    - `parts`: the folders that it needs, the denoising network first.
    - `distilled`: guidance is built into the network.
    - `text`: diffusers' text-to-image class, for level 0 without `build`.
    """

    name: str
    pipeline: str
    build: Callable[..., LatentModel] | None
    parts: tuple[str, ...]
    distilled: bool = False
    text: str | None = None

    @property
    def network(self) -> str:
        """The part that denoises."""
        return self.parts[0]

    @property
    def diffusion(self) -> bool:
        """Whether it is a diffusion model with a UNet; otherwise a flow."""
        return self.network == "unet"

    @property
    def plain(self) -> bool:
        """Whether diffusers' own pipeline makes the images."""
        return self.build is None


_FLOW = (
    "transformer",
    "vae",
    "text_encoder",
    "text_encoder_2",
    "tokenizer",
    "tokenizer_2",
    "scheduler",
)
SD = Family(
    "Stable Diffusion 1.x/2.x",
    "StableDiffusionImg2ImgPipeline",
    StableDiffusion,
    ("unet", "vae", "text_encoder", "tokenizer", "scheduler"),
)
SDXL = Family(
    "SDXL",
    "StableDiffusionXLImg2ImgPipeline",
    StableDiffusionXL,
    ("unet", "vae", "text_encoder_2", "tokenizer_2", "scheduler"),
)
SD3 = Family("Stable Diffusion 3.x", "StableDiffusion3Img2ImgPipeline", StableDiffusion3, _FLOW)
FLUX = Family("FLUX.1", "FluxImg2ImgPipeline", Flux, _FLOW, distilled=True)

FAMILIES = {
    "StableDiffusionPipeline": SD,
    "StableDiffusionImg2ImgPipeline": SD,
    "StableDiffusionXLPipeline": SDXL,
    "StableDiffusionXLImg2ImgPipeline": SDXL,
    "StableDiffusion3Pipeline": SD3,
    "StableDiffusion3Img2ImgPipeline": SD3,
    "FluxPipeline": FLUX,
    "FluxImg2ImgPipeline": FLUX,
}
"""Families that the engine knows, by the `_class_name` of their model_index.json."""

NOT_PLAIN = ("ControlNet", "Inpaint", "Kontext", "Control", "Inpainting")
"""Words in the names of pipelines that need more than a text and an image."""
PLAIN_ARGUMENTS = ("prompt", "image", "strength", "num_inference_steps")
"""Arguments that a plain family's image-to-image pipeline has to take."""

SAMPLERS = {
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSDEScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "UniPCMultistepScheduler",
}
"""Schedulers of diffusers for the same diffusion process as DDIM, with the same settings."""
FLOW_SAMPLERS = {"FlowMatchEulerDiscreteScheduler"}


def check_denoiser(folder: Path, family: Family) -> None:
    """Raises CheckpointError for other kinds of samplers and for distilled guidance in a UNet.

    The engine's steps would be wrong for them.
    """
    if family.plain:
        return
    sampler = read_config(folder, "scheduler").get("_class_name")
    known, steps = (SAMPLERS, "DDIM") if family.diffusion else (FLOW_SAMPLERS, "Euler steps")
    if sampler is not None and sampler not in known:
        raise CheckpointError(
            f"checkpoint '{folder}' is made for the sampler {sampler!s:.80}; {steps} would give "
            f"other images. Known: {', '.join(sorted(known))}. Use the checkpoint that it was "
            "distilled from."
        )
    if (
        family.diffusion
        and read_config(folder, family.network).get("time_cond_proj_dim") is not None
    ):
        raise CheckpointError(
            f"checkpoint '{folder}' has a UNet with distilled guidance (time_cond_proj_dim, as in "
            f"latent consistency models), which {family.name} does not have. Use the checkpoint "
            "that it was distilled from, or one of a LatentConsistencyModelPipeline."
        )


def find_family(folder: Path) -> Family:
    """The family of a folder in diffusers' layout: known, or any with an image-to-image pipeline.

    Raises CheckpointError for anything else.
    """
    index = read_index(folder)
    pipeline = str(index.get("_class_name"))
    family = FAMILIES.get(pipeline) or _plain_family(folder, pipeline, index)
    if family is None:
        known = ", ".join(dict.fromkeys(family.name for family in FAMILIES.values()))
        raise CheckpointError(
            f"checkpoint '{folder}' is a {pipeline:.80}, which is not supported. Supported are "
            f"{known} in diffusers' layout and, slower, families with an image-to-image pipeline "
            "in diffusers."
        )
    return family


def _plain_family(folder: Path, pipeline: str, index: dict[str, Any]) -> Family | None:
    """The family of another pipeline; None where diffusers has no image-to-image pipeline for it.

    Raises CheckpointError for an image-to-image pipeline without a strength.
    """
    from diffusers.pipelines import auto_pipeline as auto

    image, text = (
        auto._get_task_class(table, pipeline, throw_error_if_not_exist=False)
        for table in (
            auto.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
            auto.AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
        )
    )
    if image is None or image.__name__ in FAMILIES or any(word in pipeline for word in NOT_PLAIN):
        return None
    takes = inspect.signature(image.__call__).parameters
    if missing := [name for name in PLAIN_ARGUMENTS if name not in takes]:
        raise CheckpointError(
            f"checkpoint '{folder}' is a {pipeline}. Its image-to-image pipeline in diffusers "
            f"({image.__name__}) takes no {' and no '.join(missing)}, so it cannot make an image "
            "at a level; name another generator."
        )
    parts = _listed(index)
    network = next((name for name in ("transformer", "unet", "prior") if name in parts), None)
    if network is None:
        return None
    others = tuple(name for name in parts if name != network)
    return Family(
        pipeline,
        image.__name__,
        None,
        (network, *others),
        text=None if text is None else text.__name__,
    )


def read_index(folder: Path) -> dict[str, Any]:
    """`model_index.json` of a folder. Raises CheckpointError where it is missing or no JSON."""
    if not (folder / "model_index.json").is_file():
        present = ", ".join(sorted(item.name for item in folder.iterdir()))
        raise CheckpointError(
            f"checkpoint '{folder}' is no generator in diffusers' layout: model_index.json is "
            f"missing (present: {present}). A CLIP or a classifier cannot generate; name a "
            "text-to-image checkpoint."
        )
    index = read_json(folder / "model_index.json")
    for name, kind in index.items():
        if isinstance(kind, list):
            _check_part(folder, name, kind)
    return index


def _check_part(folder: Path, name: str, kind: list[Any]) -> None:
    """Raises CheckpointError for a part that is not a class of transformers or diffusers.

    diffusers imports the module that an index names, so another one would run foreign code.
    """
    from diffusers import pipelines

    if name == "_class_name" or kind == [None, None]:
        return
    known = len(kind) == 2 and all(isinstance(each, str) and each.isidentifier() for each in kind)
    if not known or not name.isidentifier():
        raise CheckpointError(
            f"checkpoint '{folder}': model_index.json has the part {name!r:.80} of {kind!r:.80}; "
            "expected a folder's name, and the names of a library and a class. Download it again."
        )
    library = kind[0]
    if library not in {"diffusers", "transformers"} and not hasattr(pipelines, library):
        raise CheckpointError(
            f"checkpoint '{folder}': the part {name} is a {kind[1]} of the module {library}. Code "
            "of a checkpoint is never run; use a checkpoint with parts of diffusers and "
            "transformers only."
        )


def parts_of(folder: Path, family: Family) -> list[str]:
    """Names of a checkpoint's parts: its family's, then others that model_index.json lists."""
    return [
        *family.parts,
        *(name for name in _listed(read_index(folder)) if name not in family.parts),
    ]


def _listed(index: dict[str, Any]) -> list[str]:
    return [
        name
        for name, value in index.items()
        if isinstance(value, list) and value and value[0] is not None and name not in UNUSED
    ]


def check_parts(folder: Path, family: Family, weights: bool = True) -> None:
    """Raises CheckpointError for missing parts, vocabularies or, with `weights`, safetensors."""
    parts = parts_of(folder, family)
    missing = [name for name in parts if not (folder / name).is_dir()]
    if missing:
        present = ", ".join(sorted(item.name for item in folder.iterdir()))
        raise CheckpointError(
            f"checkpoint '{folder}' is no complete {family.name} folder: {', '.join(missing)} "
            f"missing (present: {present}). Expected diffusers' layout with "
            f"{', '.join(name + '/' for name in parts)}."
        )
    for name in parts:
        if name.startswith("tokenizer"):
            check_tokenizer(folder / name)
        elif (
            weights
            and "processor" not in name
            and name != "scheduler"
            and not any((folder / name).glob("*.safetensors"))
        ):
            raise CheckpointError(
                f"checkpoint '{folder}': {name}/ holds no *.safetensors file. Download it. Pickled "
                f"weights are refused because unpickling runs code: {how_to_convert(folder)}."
            )


def read_config(folder: Path, part: str) -> dict[str, Any]:
    """Settings of one part. Raises CheckpointError where they are missing or no JSON."""
    return read_json(
        folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    )
