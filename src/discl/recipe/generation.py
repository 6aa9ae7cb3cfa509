"""Sections of phase 1: prompts, spectrum, filter."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    field_serializer,
    field_validator,
    model_serializer,
    model_validator,
)

from ..baselines.alia import NEGATIVE_PROMPTS
from ..data.readers import READERS
from ..errors import RecipeError, arguments_named, shorten
from ..levels import check_levels
from ..mixtures import Mixture
from ..prompts import CAPTION, SETTING
from ..prompts.chat_client import check_url
from .budget import Budget
from .paths import PathOrName
from .rejection import EarlyRejection
from .types import ImageTemplate, Level, Strict, Template, one_of, without_default

OF_SETTINGS = f"a photo of a {{class}} {SETTING}"
"""The default template where `prompts.settings` is used."""


class Server(Strict):
    """A language model at a server with OpenAI's chat interface: vLLM, Ollama, a provider."""

    url: Annotated[str, AfterValidator(check_url)] = Field(
        description="base URL, such as http://localhost:11434/v1"
    )
    model: str = Field(min_length=1)
    key_variable: str | None = Field(
        None,
        pattern=r"^[A-Za-z_][A-Za-z0-9_]*$",
        description="environment variable with the API key; the key itself is never stored",
    )
    parameters: dict[str, Any] = Field(
        default_factory=dict,
        description="parameters of each request, such as {temperature: 1.0, max_tokens: 2000}",
    )
    timeout: float = Field(
        120, gt=0, le=86_400, description="seconds for a request and its whole answer"
    )
    retries: int = Field(
        6,
        ge=0,
        le=1000,
        description="retries of a request that a busy or failing server refused",
    )

    @field_validator("parameters")
    @classmethod
    def _none_taken(cls, value: dict[str, Any]) -> dict[str, Any]:
        taken = sorted({"model", "messages", "stream", "n"} & set(value))
        if taken:
            raise RecipeError(f"parameters cannot set {', '.join(taken)}; remove it.")
        return value

    @field_validator("parameters")
    @classmethod
    def _are_json(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key, each in value.items():
            try:
                json.dumps(each, allow_nan=False)
            except (TypeError, ValueError, RecursionError) as error:
                raise RecipeError(
                    f"'{shorten(key, quoted=False)}' cannot be sent as JSON "
                    f"({shorten(str(error), quoted=False)}); put it in quotes if a text is meant, "
                    "such as a date."
                ) from error
        return value


class Endpoint(Server):
    """A language model that describes each class.

    Its texts are stored in `prompts.yaml` of the run folder, and may be edited. Classes in this
    file are not requested again.
    """

    count: int = Field(10, ge=1, le=10_000, description="texts per class")
    words: int = Field(15, ge=1, le=1000, description="minimum number of words in a text")
    only_class: bool = Field(
        True, description="rejects texts that name another class of the data set"
    )
    tries: int = Field(
        4,
        ge=1,
        le=1000,
        description="requests per class before its texts count as unusable",
    )
    parallel: int = Field(4, ge=1, le=64, description="parallel requests")


class Captions(Strict):
    """An image-to-text model of transformers.

    As `prompts.captions` it describes each hard image, for templates with {caption}.
    """

    checkpoint: PathOrName = Field(description="folder in transformers' format, or hub name")
    prompt: str | None = Field(
        None,
        min_length=1,
        description="beginning that the model completes, or the question to a model that chats",
    )
    max_new_tokens: int = Field(
        40, ge=1, le=10_000, description="maximum number of tokens in a caption"
    )
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class Settings(Strict):
    """Settings to edit images to, as in ALIA (arXiv 2305.16289), for templates with {setting}.

    A language model condenses captions of training images into places and conditions. They are
    stored in `settings.yaml` of the run folder, and may be edited. While this file exists, nothing
    is captioned or requested.
    """

    captioner: Captions
    endpoint: Server
    kind: str = Field(
        "objects",
        min_length=1,
        description="what all images show, such as animals; part of the request",
    )
    images: int = Field(
        100, ge=1, le=10**6, description="number of training images to caption, drawn at random"
    )
    captions: int = Field(
        20,
        ge=1,
        le=10_000,
        description="number of different captions in the request",
    )
    count: int = Field(10, ge=2, le=1000, description="maximum number of settings")
    tries: int = Field(
        4,
        ge=1,
        le=1000,
        description="requests before the answers count as unusable",
    )

    @model_validator(mode="after")
    def _enough_images(self) -> Settings:
        if self.captions > self.images:
            raise RecipeError(
                f"prompts.settings.captions = {self.captions} exceeds prompts.settings.images = "
                f"{self.images}; raise images."
            )
        return self


class Prompts(Strict):
    """Texts to generate from. One is drawn per (source, seed, try), the same for all levels."""

    templates: list[ImageTemplate] = Field(["a photo of {class}"], min_length=1)
    phrases: PathOrName | None = Field(
        None,
        description="YAML file {class: [texts]}, or embedded:NAME; replaces the templates",
    )
    endpoint: Endpoint | None = Field(
        None, description="a language model that writes the texts; replaces the templates"
    )
    captions: Captions | None = Field(
        None,
        description="captions of the hard images, for templates with {class} and {caption}",
    )
    settings: Settings | None = Field(
        None,
        description="settings condensed from captions, for templates with {class} and {setting}",
    )
    prefix: str = Field(
        "",
        description="beginning of every text that images are generated from, such as 'a photo: '",
    )
    negative: str = ""
    names: dict[str, str] = Field(default_factory=dict, description="class name: its name in texts")

    @model_validator(mode="before")
    @classmethod
    def _template_of_settings(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("settings") is not None:
            return {"templates": [OF_SETTINGS], **value}
        return value

    @model_validator(mode="after")
    def _settings_are_used(self) -> Prompts:
        holds = any(SETTING in template for template in self.templates)
        if self.settings is None:
            if holds:
                raise RecipeError(
                    f"prompts.templates hold {SETTING}, but no model writes settings; name a "
                    "captioner and an endpoint in prompts.settings, or replace {setting} by a "
                    "setting in each template."
                )
            return self
        for other in ("phrases", "endpoint", "captions"):
            if getattr(self, other) is not None:
                raise RecipeError(
                    f"prompts.settings and prompts.{other} cannot be used together; remove one."
                )
        if not holds:
            raise RecipeError(
                f"prompts.settings needs templates with {SETTING}, and prompts.templates has "
                f"none; write '{OF_SETTINGS}' there."
            )
        return self

    @model_validator(mode="after")
    def _one_kind(self) -> Prompts:
        if self.phrases is not None and self.endpoint is not None:
            raise RecipeError(
                "prompts.phrases and prompts.endpoint cannot be used together; remove one."
            )
        captioned = any(CAPTION in template for template in self.templates)
        if captioned and self.captions is None:
            raise RecipeError(
                f"prompts.templates hold {CAPTION}, but no model writes captions; name one in "
                "prompts.captions.checkpoint."
            )
        if self.captions is not None and not (
            captioned and self.phrases is None and self.endpoint is None
        ):
            raise RecipeError(
                f"prompts.captions needs templates with {CAPTION}, such as "
                f"'a photo of {{class}}, {CAPTION}'; write one, and remove phrases and endpoint."
            )
        return self


class Lora(Strict):
    """Weights that are added to those of the generator."""

    path: PathOrName = Field(
        description="a *.safetensors file, or owner/name/FILE.safetensors on the hub"
    )
    scale: float = Field(1.0, ge=-100, le=100, description="factor of the weights")


class Adapt(Strict):
    """Low-rank weights that teach the generator the domain of the real training images.

    They need pip install 'discl[lora]'. Classes are drawn equally often.
    """

    rank: int = Field(8, ge=1, le=1024)
    steps: int = Field(500, ge=1, le=1_000_000, description="gradient steps")
    learning_rate: float = Field(1e-4, gt=0, le=1, description="of AdamW")
    batch_size: int = Field(4, ge=1, le=4096)
    layers: Literal["attention", "attention-and-convolutions"] = Field(
        "attention", description="layers with low-rank weights; convolutions: those of a UNet"
    )
    flip: bool = Field(False, description="mirror every second image")
    prior_weight: float = Field(
        0.0,
        ge=0,
        le=1000,
        description="weight of the loss on images of the unadapted generator (DreamBooth)",
    )
    prior_images: int = Field(64, ge=2, le=100_000, description="how many of these")
    gradient_checkpointing: bool = Field(False, description="less memory, about a third slower")
    seed: int = Field(0, ge=0, le=2**32 - 1)


def _as_list(value: Any) -> Any:
    """A name as a list; names of a list once each."""
    if isinstance(value, list) and all(isinstance(each, str) for each in value):
        return list(dict.fromkeys(value))
    return [value] if isinstance(value, str) else value


class Pilot(Strict):
    """What `discl pilot` makes and measures before the spectrum is paid for."""

    images: int = Field(128, ge=8, le=100_000, description="images of each candidate")
    folds: int = Field(3, ge=2, le=100, description="of the cross-validation over hard images")
    mixture: Annotated[list[Mixture], BeforeValidator(_as_list)] = Field(
        ["class-balanced"],
        min_length=1,
        max_length=4,
        description="how classes are mixed, with and without synthetic images; a list: the first "
        "one for the gains, and all are compared on validation images",
    )
    thresholds: list[Annotated[float, Field(ge=-1, le=1)]] | None = Field(
        None,
        min_length=1,
        max_length=20,
        description="of the filter, to choose from besides filter.threshold; null: those that keep "
        "all, three quarters, half and a quarter of a candidate's images",
    )
    real_per_class: int = Field(
        20, ge=2, le=10_000, description="real images of each class without hard images"
    )
    candidates: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        max_length=100,
        description="name: values of spectrum or prompts; none: the spectrum as it is",
    )

    @field_serializer("mixture")
    def _one_by_its_name(self, value: list[Mixture]) -> list[Mixture] | Mixture:
        return value[0] if len(value) == 1 else value


NEW_KEYS = {
    "wanted": None,
    "budget": None,
    "early_rejection": None,
    "sampler": "ddim",
    "timestep_spacing": None,
}
"""Keys that a written recipe states only where they differ from these defaults."""


class Spectrum(Strict):
    """Phase 1: the synthetic images of each hard image."""

    checkpoint: PathOrName = Field(
        description="folder in diffusers' format, hub name, single *.safetensors file, or "
        "embedded:fashion-mnist"
    )
    config: PathOrName | None = Field(
        None,
        description="single file: folder or hub name with the configurations of its family; null: "
        "a folder beside it",
    )
    loras: list[Lora] = Field(
        default_factory=list,
        max_length=100,
        description="LoRA weights and their scales; they need pip install 'discl[lora]'",
    )
    adapt: Adapt | None = Field(
        None, description="train low-rank weights on the real images first; null: do not"
    )
    levels: list[Level] = Field(min_length=1, max_length=100)
    seeds: int = Field(8, ge=1, le=10_000, description="synthetic images per source and level")
    wanted: int | None = Field(
        None,
        ge=1,
        le=10_000,
        description="kept images per source and level; seeds are drawn until the filter has kept "
        "as many, at most wanted × tries; replaces seeds",
    )
    tries: int = Field(
        1,
        ge=1,
        le=1000,
        description="maximum number of tries per image until the filter keeps one, each with "
        "another prompt and noise",
    )
    budget: Budget | None = Field(
        None, description="the most that is generated; null: the whole plan and its tries"
    )
    early_rejection: EarlyRejection | None = Field(
        None,
        description="drop images on the way that the filter would drop, with a bound on what is "
        "lost; null: finish all",
    )
    num_inference_steps: int = Field(50, ge=1, le=10_000)
    guidance_scale: float = Field(
        10.0,
        ge=1,
        le=1000,
        description="classifier-free guidance, s = 1 + w of eq. 2, as diffusers counts it",
    )
    steps: Literal["per-level", "fixed"] = Field(
        "per-level",
        description="level λ takes the last t(λ) of T steps, as in the paper, or T finer steps "
        "over the same noise",
    )
    sampler: Literal["ddim", "dpm-solver++", "euler", "lcm", "tcd"] = Field(
        "ddim",
        description="for Stable Diffusion and SDXL; other families have their own; lcm and tcd "
        "are for weights distilled for them",
    )
    timestep_spacing: Literal["leading", "trailing", "linspace"] | None = Field(
        None,
        description="of the sampler's grid, as diffusers counts it; null: the checkpoint's own; "
        "few-step weights need trailing",
    )
    guidance_interval: tuple[
        Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]
    ] = Field(
        (0.0, 1.0),
        description="part of the noise schedule with guidance, 1 is pure noise; other steps cost "
        "half; lossy",
    )
    size: int | None = Field(
        None, ge=8, le=16_384, description="pixels per side; null: the size of the checkpoint"
    )
    resize: Literal["square", "keep-aspect"] = Field(
        "square",
        description="centre squares of size × size, or about as many pixels at the aspect of the "
        "image, up to 4 : 1",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    encoding: Literal["webp-lossless", "webp", "jpeg", "png"] = "webp-lossless"

    @model_serializer(mode="wrap")
    def _plain(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return without_default(write(self), **NEW_KEYS)

    @model_validator(mode="after")
    def _wanted_has_tries(self) -> Spectrum:
        if self.wanted is not None and self.tries == 1:
            raise RecipeError(
                f"spectrum.wanted = {self.wanted} draws further seeds only with spectrum.tries of "
                "2 or more, the most draws per wanted image; set it, or use "
                f"spectrum.seeds: {self.wanted}."
            )
        return self

    @model_validator(mode="after")
    def _levels_are_generated(self) -> Spectrum:
        if len(set(self.levels)) != len(self.levels):
            raise RecipeError(f"spectrum.levels names a level twice: {shorten(list(self.levels))}.")
        steps = self.num_inference_steps
        with arguments_named(levels="spectrum.levels"):
            check_levels(self.levels, 100 * steps if self.steps == "fixed" else steps)
        if self.guidance_interval[0] >= self.guidance_interval[1]:
            raise RecipeError(
                f"spectrum.guidance_interval = {list(self.guidance_interval)} is empty; write the "
                "smaller value first, for example [0.4, 1]."
            )
        return self


class Retrieval(Strict):
    """Images of an unlabelled archive for methods with `images: retrieved`.

    `filter.checkpoint` assigns each image of the archive to the class whose text it is closest to.
    For each class with hard images the closest ones are chosen. Copies of images of the data set
    are left out.
    """

    archive: PathOrName = Field(
        description="folder with images at any depth, list, or any other data set that data.root "
        "may name; labels are not read"
    )
    format: Annotated[str, one_of("format", ("auto", *READERS))] = "auto"
    columns: dict[Literal["id", "image"], str] = Field(
        default_factory=dict, description="our column: its name in the archive"
    )
    images: PathOrName | None = Field(
        None,
        description="manifest: folder that the paths of the list are relative to; null: the folder "
        "of the list",
    )
    per_image: float = Field(3.0, gt=0, le=10_000, description="images for each hard image")
    threshold: float | None = Field(
        None,
        ge=-1,
        le=1,
        description="minimum clip_similarity with the text of the class; null: filter.threshold",
    )
    image_weight: float = Field(
        0.0,
        ge=0,
        le=1,
        description="weight of the cosine with the mean training image of a class, beside that "
        "with its text",
    )
    copy_cosine: float = Field(
        0.95,
        gt=0,
        le=1,
        description="images with a CLIP cosine of at least this with an image of the data set are "
        "left out as copies",
    )


class Filter(Strict):
    """The filter of synthetic images before training.

    - `threshold`: drops images with a `clip_similarity` (raw cosine) below the threshold.
    - `alia`: the two filters of ALIA (arXiv 2305.16289). It drops images that CLIP finds closer to
      one of `negatives` than to their class. It also drops images that are too easy or mislabelled:
      a classifier trained on the real images for `hard.epochs` is more confident than on average.
    """

    checkpoint: PathOrName = Field(
        description="CLIP folder in transformers' format, hub name, or embedded:fashion-mnist"
    )
    template: Template = "a photo of {class}"
    threshold: float = Field(0.3, ge=-1, le=1)
    rule: Literal["threshold", "alia"] = "threshold"
    negatives: list[str] = Field(
        list(NEGATIVE_PROMPTS), min_length=1, description="alia: texts that fit any image"
    )
    positive: str | None = Field(
        None,
        min_length=1,
        description="alia: one text for all classes that images are compared with; null: the "
        "template",
    )

    @model_validator(mode="after")
    def _positive_is_used(self) -> Filter:
        if self.positive is not None and self.rule != "alia":
            raise RecipeError(
                "filter.positive needs filter.rule: alia; remove it, or use filter.template."
            )
        return self
