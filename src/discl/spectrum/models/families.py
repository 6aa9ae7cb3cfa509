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
"""Parts of a folder that nothing here needs."""


@dataclass(frozen=True)
class Family:
    """A kind of checkpoint: its name, the diffusers class that loads it, the parts it cannot do without.

    Without `build` it is one that the engine does not know: diffusers' own pipeline makes its pictures, `text` those of level 0.
    """

    name: str
    pipeline: str
    build: Callable[..., LatentModel] | None
    parts: tuple[str, ...]
    distilled: bool = False
    text: str | None = None

    @property
    def network(self) -> str:
        return self.parts[0]

    @property
    def diffusion(self) -> bool:
        return self.network == "unet"

    @property
    def plain(self) -> bool:
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
    "StableDiffusionPipeline": SD, "StableDiffusionImg2ImgPipeline": SD,
    "StableDiffusionXLPipeline": SDXL, "StableDiffusionXLImg2ImgPipeline": SDXL,
    "StableDiffusion3Pipeline": SD3, "StableDiffusion3Img2ImgPipeline": SD3,
    "FluxPipeline": FLUX, "FluxImg2ImgPipeline": FLUX,
}  # fmt: skip
"""`_class_name` of model_index.json: the family."""


NOT_PLAIN = ("ControlNet", "Inpaint", "Kontext", "Control", "Inpainting")
"""Parts of the names of pipelines that want more than a text and a picture."""
TAKEN = ("prompt", "image", "strength", "num_inference_steps")
"""What an image-to-image pipeline has to take."""

SAMPLERS = {
    "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler",
    "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler", "DPMSolverSDEScheduler",
}  # fmt: skip
"""Schedulers of diffusers that solve the same diffusion as DDIM does, from the same settings."""
FLOW_SAMPLERS = {"FlowMatchEulerDiscreteScheduler"}


def check_denoiser(folder: Path, family: Family) -> None:
    """Raises CheckpointError where the engine's steps would be wrong: for other kinds of sampler, or distilled guidance."""
    if family.plain:
        return
    sampler = read_config(folder, "scheduler").get("_class_name")
    known, ours = (SAMPLERS, "DDIM") if family.diffusion else (FLOW_SAMPLERS, "Euler steps")
    if sampler is not None and sampler not in known:
        raise CheckpointError(
            f"checkpoint '{folder}' is made for the sampler {sampler!s:.80}, in whose place {ours} would give other images; "
            f"known: {', '.join(sorted(known))}. Take the checkpoint that it was made from."
        )
    if (
        family.diffusion
        and read_config(folder, family.network).get("time_cond_proj_dim") is not None
    ):
        raise CheckpointError(
            f"checkpoint '{folder}' has a UNet whose guidance is distilled (time_cond_proj_dim, as in latent consistency models), which "
            f"{family.name} does not have; take the checkpoint that it was made from, or one of a LatentConsistencyModelPipeline."
        )


def find_family(folder: Path) -> Family:
    """The family of a folder in diffusers' layout, known or of any image-to-image pipeline. Raises CheckpointError for another one."""
    index = read_index(folder)
    found = str(index.get("_class_name"))
    family = FAMILIES.get(found) or _plain_family(folder, found, index)
    if family is None:
        known = ", ".join(dict.fromkeys(family.name for family in FAMILIES.values()))
        raise CheckpointError(
            f"checkpoint '{folder}' is a {found:.80}, which is no generator that is supported; supported are {known} in diffusers' layout, "
            "and, slower, whatever diffusers has an image-to-image pipeline for."
        )
    return family


def _plain_family(folder: Path, found: str, index: dict[str, Any]) -> Family | None:
    """The family of another pipeline, or None where diffusers can make no image from a text and an image with it.

    Raises CheckpointError where it can, but not from an image with its share of noise.
    """
    from diffusers.pipelines import auto_pipeline as auto

    image, text = (
        auto._get_task_class(table, found, throw_error_if_not_exist=False)
        for table in (
            auto.AUTO_IMAGE2IMAGE_PIPELINES_MAPPING,
            auto.AUTO_TEXT2IMAGE_PIPELINES_MAPPING,
        )
    )
    if image is None or image.__name__ in FAMILIES or any(word in found for word in NOT_PLAIN):
        return None
    if lacking := [
        name for name in TAKEN if name not in inspect.signature(image.__call__).parameters
    ]:
        raise CheckpointError(
            f"checkpoint '{folder}' is a {found}, whose image-to-image pipeline in diffusers ({image.__name__}) takes no "
            f"{' and no '.join(lacking)}, so that it cannot make an image at a level; name another generator."
        )
    parts = _listed(index)
    network = next((name for name in ("transformer", "unet", "prior") if name in parts), None)
    if network is None:
        return None
    others = tuple(name for name in parts if name != network)
    return Family(
        found,
        image.__name__,
        None,
        (network, *others),
        text=None if text is None else text.__name__,
    )


def read_index(folder: Path) -> dict[str, Any]:
    """`model_index.json` of a folder. Raises CheckpointError where it is missing or no JSON."""
    if not (folder / "model_index.json").is_file():
        found = ", ".join(sorted(item.name for item in folder.iterdir()))
        raise CheckpointError(
            f"checkpoint '{folder}' is no generator in diffusers' layout: it lacks model_index.json (it holds {found}). "
            "A CLIP or a classifier cannot generate; name a text-to-image checkpoint."
        )
    index = read_json(folder / "model_index.json")
    for name, kind in index.items():
        if isinstance(kind, list):
            _check_part(folder, name, kind)
    return index


def _check_part(folder: Path, name: str, kind: list[Any]) -> None:
    """Raises CheckpointError for a part that is no folder of its own, or of a class that is not transformers' or diffusers'.

    diffusers imports a module that an index names, so another one would be code of the checkpoint's choice.
    """
    from diffusers import pipelines

    if name == "_class_name" or kind == [None, None]:
        return
    known = len(kind) == 2 and all(isinstance(each, str) and each.isidentifier() for each in kind)
    if not known or not name.isidentifier():
        raise CheckpointError(
            f"checkpoint '{folder}': model_index.json has the part {name!r:.80} of {kind!r:.80}, where a folder's name and the "
            "names of a library and a class are expected; fetch it anew."
        )
    library = kind[0]
    if library not in {"diffusers", "transformers"} and not hasattr(pipelines, library):
        raise CheckpointError(
            f"checkpoint '{folder}': the part {name} is a {kind[1]} of the module {library}, code of its own, which is never run; "
            "take a checkpoint whose parts are of diffusers and transformers."
        )


def parts_of(folder: Path, family: Family) -> list[str]:
    """Names of the parts that a checkpoint is made of: those of its family, and those that its model_index.json lists."""
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
    """Raises CheckpointError for a folder that lacks a part, its vocabulary or, with `weights`, its safetensors."""
    parts = parts_of(folder, family)
    lacking = [name for name in parts if not (folder / name).is_dir()]
    if lacking:
        found = ", ".join(sorted(item.name for item in folder.iterdir()))
        raise CheckpointError(
            f"checkpoint '{folder}' is no complete {family.name} folder: it lacks {', '.join(lacking)} (it holds {found}). "
            f"Expected diffusers' layout with {', '.join(name + '/' for name in parts)}."
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
                f"checkpoint '{folder}': {name}/ holds no *.safetensors file. Fetch it; pickled weights are refused because "
                f"unpickling runs code: {how_to_convert(folder)}."
            )


def read_config(folder: Path, part: str) -> dict[str, Any]:
    """Settings of one part. Raises CheckpointError where they are missing or no JSON."""
    return read_json(
        folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    )
