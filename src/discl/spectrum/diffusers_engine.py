"""One diffusers pipeline call per image, for families the engine does not know."""

from __future__ import annotations

import inspect
import time
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..errors import CheckpointError, arguments_named
from ..levels import check_level, check_levels
from ..utils.hashing import derive_seed
from .oom import MEND, is_out_of_memory
from .plan import Request
from .request_queue import LoadPixels, checked
from .stats import Work


class PlainEngine:
    """What `Engine` does, through a pair of diffusers pipelines (`load_plain`), with the checkpoint's own sampler.

    The generator of an image is keyed by (source, seed, try) as the engine's ε is. What a pipeline draws from it is its own
    affair: its levels share their noise only where it draws nothing before. `work` counts steps as rows. The guidance scale goes to
    `true_cfg_scale` where a pipeline has that and its network no guidance built in; there `guidance_scale` has no effect.
    """

    def __init__(
        self, pipelines: tuple[Any, Any | None], *, num_inference_steps: int, guidance_scale: float
    ) -> None:
        self.image, self.text = pipelines
        self.num_inference_steps, self.guidance_scale = num_inference_steps, guidance_scale
        self.work = Work()
        network = getattr(self.image, "transformer", None)
        built_in = bool(getattr(getattr(network, "config", None), "guidance_embeds", False))
        self.guidance = (
            "true_cfg_scale"
            if "true_cfg_scale" in _takes(self.image) and not built_in
            else "guidance_scale"
        )

    def unused(self) -> list[str]:
        """What a recipe says that the pipeline has no place for, by the names of the recipe."""
        names = {"negative_prompt": "prompts.negative", self.guidance: "spectrum.guidance_scale"}
        return [told for name, told in names.items() if name not in _takes(self.image)]

    def generate(
        self, requests: Iterable[Request], load_pixels: LoadPixels
    ) -> Iterator[tuple[Request, np.ndarray]]:
        """Yields each request with its picture, uint8 `[height, width, 3]`, in the order in which they come.

        Raises RecipeError for a level that takes no step, DataError for pixels of another shape.
        """
        for request in requests:
            with arguments_named(levels="requests"):
                check_levels([check_level(request.level)], self.num_inference_steps)
            load = checked(load_pixels, request.height, request.width)
            picture = (
                None
                if request.level == 0
                else Image.fromarray(load(request.source_id).transpose(1, 2, 0))
            )
            yield request, self._make(request, picture)

    def rows_per_second(self, height: int, width: int) -> float:
        """Rows per second of two steps of one image, after one call that warms up."""
        grey = Image.new("RGB", (width, height), "grey")
        request = Request("", "", "", 0, 50, 0, 0, "", "", width, height)
        before, seconds = self.work, 0.0
        for _ in range(2):
            self.work, started = Work(), time.perf_counter()
            self._make(request, grey)
            seconds = time.perf_counter() - started
        rows, self.work = self.work.unet_rows, before
        return rows / seconds

    @torch.inference_mode()
    def _make(self, request: Request, picture: Image.Image | None) -> np.ndarray:
        pipeline = self.text if picture is None else self.image
        if pipeline is None:
            raise CheckpointError(
                f"{type(self.image).__name__} makes no image from text alone, which level 0 needs."
            )
        steps = request.steps(self.num_inference_steps)
        settings: dict[str, Any] = {
            "prompt": request.prompt, "negative_prompt": request.negative_prompt, "num_inference_steps": self.num_inference_steps,
            self.guidance: self.guidance_scale, "height": request.height, "width": request.width, "output_type": "np",
            "generator": torch.Generator().manual_seed(derive_seed("noise", request.source_id, request.seed, request.attempt)),
        }  # fmt: skip
        if picture is not None:
            settings |= {
                "image": picture,
                "strength": strength_of(pipeline, steps, self.num_inference_steps),
            }
        takes, kind = _takes(pipeline), type(pipeline).__name__
        try:
            made = pipeline(
                **{name: value for name, value in settings.items() if name in takes}
            ).images[0]
        except (ValueError, TypeError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise CheckpointError(
                    f"out of memory with a single image in {kind}; " + MEND
                ) from error
            raise CheckpointError(
                f"{kind} of diffusers makes no image of source '{request.source_id}' at level {request.level} %: {error}"
            ) from error
        if made.shape[:2] != (request.height, request.width):
            raise CheckpointError(
                f"{kind} of diffusers made a picture of {made.shape[1]} × {made.shape[0]} pixels, where {request.width} × {request.height} "
                "were asked for; set spectrum.size to what it makes."
            )
        if not np.isfinite(made).all():
            raise CheckpointError(
                f"the generator produced NaN for source '{request.source_id}' at level {request.level} %; use dtype float32 or bfloat16."
            )
        rows = steps * (1 + (self.guidance_scale != 1))
        self.work.unet_calls += steps
        self.work.unet_rows += rows
        self.work.unet_rows_computed += rows
        self.work.text_encodes += 1
        self.work.vae_encodes += picture is not None
        self.work.vae_decodes += 1
        return (np.asarray(made) * 255).round().astype(np.uint8)


def _takes(pipeline: Any) -> Collection[str]:
    return inspect.signature(pipeline.__call__).parameters


def strength_of(pipeline: Any, steps: int, num_inference_steps: int) -> float:
    """diffusers' strength with which a pipeline takes the last `steps` of T steps.

    It is t(λ) / T, but some round T · strength down in floats and others T − T · strength, so each is asked what it makes
    of it, and gets half a step more or less where that is another number.
    """
    nearest = steps / num_inference_steps
    ask = getattr(pipeline, "get_timesteps", None)
    for strength in (
        nearest,
        min((steps + 0.5) / num_inference_steps, 1.0),
        (steps - 0.5) / num_inference_steps,
    ):
        try:
            if ask is not None and ask(num_inference_steps, strength, "cpu")[1] == steps:
                return strength
        except TypeError:  # another signature
            return nearest
    return nearest
