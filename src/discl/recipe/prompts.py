"""Section `prompts`: the texts of each class, and the servers and captions they come from."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Field,
    field_validator,
    model_validator,
)

from ..errors import RecipeError, shorten
from ..prompts import CAPTION, SETTING
from ..prompts.endpoint import check_url
from .paths import PathOrName
from .types import ImageTemplate, Strict

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
