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
from ..levels import check_level, check_levels, format_level
from ..utils.hashing import derive_seed
from .oom import ADVICE, is_out_of_memory
from .plan import Request
from .request_queue import LoadPixels, checked
from .stats import Work


class PlainEngine:
    """Makes images like `Engine`, with diffusers' own pipelines and the checkpoint's own sampler.

    - `pipelines`: of `load_plain`: image-to-image and text-to-image.
    - `num_inference_steps`: T.
    - `guidance_scale`: s. It goes to `true_cfg_scale` where a pipeline has that argument and its
      network no built-in guidance.

    The random generator of an image is keyed by (source, seed, attempt), like the engine's ε.
    Levels share their noise only where a pipeline draws nothing before it. `work` counts steps as
    rows.
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
        """Which of `negative_prompt` and `guidance_scale` have no effect with this pipeline."""
        names = {"negative_prompt": "negative_prompt", self.guidance: "guidance_scale"}
        return [argument for name, argument in names.items() if name not in _takes(self.image)]

    def generate(
        self, requests: Iterable[Request], load_pixels: LoadPixels
    ) -> Iterator[tuple[Request, np.ndarray]]:
        """Yields each request with its image, uint8 `[height, width, 3]`, in order.

        - `load_pixels`: returns a source as uint8 `[height, width, 3]`, in the size of the request.

        Raises RecipeError for a level that takes no step, DataError for pixels of another shape,
        and CheckpointError for a pipeline that fails.
        """
        for request in requests:
            with arguments_named(levels="requests"):
                check_levels([check_level(request.level)], self.num_inference_steps)
            load = checked(load_pixels, request.height, request.width)
            picture = None if request.level == 0 else Image.fromarray(load(request.source_id))
            yield request, self._make(request, picture)

    def rows_per_second(self, height: int, width: int) -> float:
        """Rows per second of one image at level 50, after a warm-up."""
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
        seed = derive_seed("noise", request.source_id, request.seed, request.attempt)
        settings: dict[str, Any] = {
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "num_inference_steps": self.num_inference_steps,
            self.guidance: self.guidance_scale,
            "height": request.height,
            "width": request.width,
            "output_type": "np",
            "generator": torch.Generator().manual_seed(seed),
        }
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
                    f"out of memory with a single image in {kind}; " + ADVICE
                ) from error
            raise CheckpointError(
                f"{kind} of diffusers makes no image of source '{request.source_id}' at level "
                f"{format_level(request.level)}: {error}"
            ) from error
        if made.shape[:2] != (request.height, request.width):
            raise CheckpointError(
                f"{kind} of diffusers made an image of {made.shape[1]} × {made.shape[0]} pixels "
                f"instead of {request.width} × {request.height}; request the size that it makes."
            )
        if not np.isfinite(made).all():
            raise CheckpointError(
                f"the generator produced NaN for source '{request.source_id}' at level "
                f"{format_level(request.level)}; use dtype float32 or bfloat16."
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
    """diffusers' strength with which a pipeline takes the last `steps` of T steps: t(λ) / T.

    Some pipelines round T · strength down in floats, others T − T · strength. So the pipeline's own
    count decides; where it differs, the strength is half a step larger or smaller.
    """
    nearest = steps / num_inference_steps
    count = getattr(pipeline, "get_timesteps", None)
    for strength in (
        nearest,
        min((steps + 0.5) / num_inference_steps, 1.0),
        (steps - 0.5) / num_inference_steps,
    ):
        try:
            if count is not None and count(num_inference_steps, strength, "cpu")[1] == steps:
                return strength
        except TypeError:  # another signature
            return nearest
    return nearest
