"""The step-level batched denoiser.

One call of the network has rows at different steps: it takes a timestep per row, and a step of DDIM
or of a flow is elementwise. A slot whose image is finished takes the next request, the longest
first, so calls are full until the work runs out. Calls have one static shape. Idle rows at the very
end are computed and counted as padding. In return an image does not depend on the others in a call.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError
from ..levels import format_level
from .early_rejection import Inspector
from .models import Conditioning, LatentModel, Schedule
from .oom import call_halving, largest_that_fits, limit_memory, slots_on_cpu
from .plan import Request
from .request_queue import LoadPixels, RequestQueue, checked
from .slots import Slots
from .stats import Work
from .text_cache import Text, TextCache

MAX_SHAPES = 64
"""Maximum number of shapes of calls that are compiled, one by one."""
MAX_VAE_BATCH = 16
MAX_VAE_PIXELS = 8 * 1024**2
"""Of a call of the VAE. More take memory and are hardly faster (benchmarks/README.md)."""


class Engine:
    """Denoises requests step by step in shared batches; `work` counts its steps and calls.

    - `model`: a generator from `load_generator`.
    - `num_inference_steps`: T, 1 or more.
    - `guidance_scale`: s of classifier-free guidance; 1 is none.
    - `slots`: images per call of the network. A guided image (s ≠ 1) takes two rows. Slots are
      halved when memory runs out, and no image is lost.
    - `fixed`: give every level T steps instead of t(λ).
    - `guidance_interval`: noise fractions between which steps are guided, the lower end excluded.
    - `sampler`: `ddim`, `dpm-solver++`, `euler`, `lcm` or `tcd`; flows have only their own, the
      default.
    - `timestep_spacing`: `leading`, `trailing` or `linspace`; None for the checkpoint's own.

    ```python
    from PIL import Image

    import discl

    model = discl.load_generator("embedded:fashion-mnist/diffusion")
    engine = discl.Engine(model, num_inference_steps=4, guidance_scale=3.0)
    request = discl.Request.of("a photo of a bag", 50, "photos/Bag/000.png", width=32)
    for request, pixels in engine.generate(
        [request], lambda source: discl.to_square(Image.open(source).convert("RGB"), 32)
    ):
        assert pixels.shape == (32, 32, 3)
    ```
    """

    def __init__(
        self,
        model: LatentModel,
        *,
        num_inference_steps: int,
        guidance_scale: float,
        slots: int = 64,
        fixed: bool = False,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        sampler: str = "ddim",
        timestep_spacing: str | None = None,
    ) -> None:
        self.model, self.num_inference_steps, self.fixed = model, num_inference_steps, fixed
        self.guided = guidance_scale != 1 and not model.distilled
        self.guidance_scale, self.guidance_interval = guidance_scale, guidance_interval
        self.sampler, self.timestep_spacing = sampler, timestep_spacing
        self.set_slots(slots)
        self.work = Work()
        self.texts = TextCache(model, self.work)
        self.inspector: Inspector | None = None

    # ------------------------------------------------------------ images

    @torch.inference_mode()
    def generate(
        self, requests: Iterable[Request], load_pixels: LoadPixels
    ) -> Iterator[tuple[Request, np.ndarray]]:
        """Yields each request with its image, uint8 `[height, width, 3]`, once it is finished.

        - `requests`: any number. Sort them by shape: neighbours of one shape share calls.
        - `load_pixels`: returns a source as uint8 `[height, width, 3]`, in the size of its
          requests. It is called once per source in sight.

        Images that the engine's `inspector` drops on the way are not among them.

        Raises RecipeError for a level that takes no step, DataError for pixels of another shape,
        and CheckpointError for NaN or too little memory. Images denoised before are yielded first.
        """
        finished: list[tuple[Request, Tensor]] = []
        denoised, failed = self.denoise(requests, load_pixels), None
        while True:
            try:
                request, latents = next(denoised)
            except StopIteration:
                break
            except Exception as error:
                failed = error
                break
            full = len(finished) >= self.vae_batch_for(request.height, request.width)
            if finished and (full or latents.shape != finished[0][1].shape):
                yield from self._decode(finished)
                finished = []
            finished.append((request, latents))
        if finished:
            yield from self._decode(finished)
        if failed is not None:
            raise failed

    @torch.inference_mode()
    def denoise(
        self, requests: Iterable[Request], load_pixels: LoadPixels
    ) -> Iterator[tuple[Request, Tensor]]:
        """Yields each request with its clean latents `[c, h, w]`, float32 on the CPU, once done.

        Arguments and errors are those of `generate`.
        """
        for (height, width), alike in itertools.groupby(
            requests, lambda request: (request.height, request.width)
        ):
            slots = Slots(self, height, width)
            load = checked(load_pixels, height, width)
            queue = RequestQueue(alike, self, slots.schedule.spans, load, (height, width))
            while True:
                while slots.has_room() and (taken := queue.pop()) is not None:
                    slots.add(*taken)
                if slots.idle():
                    break
                yield from slots.advance()

    def _decode(
        self, finished: list[tuple[Request, Tensor]]
    ) -> Iterator[tuple[Request, np.ndarray]]:
        """Yields the images of finished latents. Raises CheckpointError for NaN, at the end."""
        finite = [bool(latents.isfinite().all()) for _, latents in finished]
        whole = list(itertools.compress(finished, finite))
        if whole:
            latents = torch.stack([each for _, each in whole])
            images = self.decode(latents, whole[0][0].height, whole[0][0].width).numpy()
            self.work.vae_decodes += len(whole)
            for (request, _), image in zip(whole, images, strict=True):
                yield request, image
        if not all(finite):
            request, _ = finished[finite.index(False)]
            raise CheckpointError(
                f"the generator produced NaN for source '{request.source_id}' at level "
                f"{format_level(request.level)}; use dtype float32 or bfloat16."
            )

    # ------------------------------------------------------------ what slots and queue need

    def schedule(self, height: int, width: int) -> Schedule:
        """The denoising steps for images of that many pixels.

        Raises CheckpointError for a sampler that the generator does not have.
        """
        options: dict[str, Any] = {}
        if self.sampler != "ddim":
            options["sampler"] = self.sampler
        if self.timestep_spacing is not None:
            options["timestep_spacing"] = self.timestep_spacing
        return self.model.schedule(self.num_inference_steps, height, width, self.fixed, **options)

    def texts_of(self, request: Request) -> list[Text]:
        """The texts that a request's rows are conditioned on; with guidance the negative first."""
        tokens, words = self.model.class_tokens, request.prompt
        if tokens is not None:
            words = tokens.write(words, request.label)
        prompt = Text(words, negative=False)
        return [Text(request.negative_prompt, negative=True), prompt] if self.guided else [prompt]

    def scale_conditioning(self) -> Conditioning:
        """The guidance scale as conditioning of a distilled network; nothing for others."""
        if not self.model.distilled:
            return {}
        scale = torch.full((self.rows,), float(self.guidance_scale), device=self.model.device)
        return {"guidance_scale": scale}

    def encode(self, pixels: Tensor) -> Tensor:
        """`LatentModel.encode_images` in batches that fit into memory, on the CPU."""
        return self._through_vae(self.model.encode_images, pixels, *pixels.shape[-2:])

    def decode(self, latents: Tensor, height: int, width: int) -> Tensor:
        """`LatentModel.decode`, to images of that shape, in batches that fit into memory."""
        return self._through_vae(self.model.decode, latents, height, width)

    def _through_vae(
        self, call: Callable[[Tensor], Tensor], items: Tensor, height: int, width: int
    ) -> Tensor:
        """The result of the VAE's `call` over batches of one static size."""

        def batches(size: int) -> Tensor:
            parts = []
            for part in items.split(size):
                batch = torch.zeros(size, *items.shape[1:])
                batch[: len(part)] = part
                parts.append(call(batch.to(self.model.device)).cpu()[: len(part)])
            return torch.cat(parts)

        size = self.vae_batch_for(height, width)
        return call_halving(batches, size, self._halved_vae_batch, where="VAE")

    # ------------------------------------------------------------ batch sizes

    def set_slots(self, slots: int) -> None:
        """Sets the number of guided images in a call, from the next shape on."""
        self.slots, self.rows = slots, slots * (1 + self.guided)
        self._vae_batch = min(slots, MAX_VAE_BATCH)
        self.lookahead = max(16 * slots, 256)

    def fit_slots(self, height: int, width: int) -> int:
        """Sets the slots to what suits the device, and returns them.

        On a GPU this is the largest power of two, up to 64, whose calls leave some memory free.
        On a CPU it depends on the shape alone.

        - `height`, `width`: of the images, in pixels.
        """
        latents = self.model.latent_shape(height, width)
        if self.model.device.type != "cuda":
            self.set_slots(slots_on_cpu(*latents[1:]))
            return self.slots

        def call(slots: int) -> None:
            self.set_slots(slots)
            self._make_call(height, width)()

        self.set_slots(largest_that_fits(limit_memory(call, self.model.device)))
        return self.slots

    def halved_slots(self, slots: int) -> None:
        """Sets the slots after a call ran out of memory."""
        self.slots, self.rows = slots, slots * (1 + self.guided)
        self.work.out_of_memory += 1

    def vae_batch_for(self, height: int, width: int) -> int:
        """Images of that many pixels a side in a call of the VAE."""
        return min(self._vae_batch, max(MAX_VAE_PIXELS // (height * width), 1))

    def _halved_vae_batch(self, size: int) -> None:
        self._vae_batch = size
        self.work.out_of_memory += 1

    # ------------------------------------------------------------ compilation and timing

    def compile(
        self, height: int, width: int, backend: str | Callable[..., Any] = "inductor"
    ) -> None:
        """Compiles network and VAE decoder (torch.compile) for calls of this shape.

        Other shapes and numbers of slots are compiled when they come. Pixels change by rounding
        only; ids stay.

        - `height`, `width`: of the images, in pixels.
        - `backend`: of torch.compile.

        Raises the compiler's errors, after which both are as before.
        """
        # a run may have many shapes; beyond the limit torch would silently go on without
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_SHAPES)
        networks = self.model.network, self.model.autoencoder.vae.decoder
        latents = torch.zeros(1, *self.model.latent_shape(height, width))
        for network in networks:
            network.compile(backend=backend, dynamic=False)
        try:
            self._make_call(height, width)()
            with torch.inference_mode():  # as in `generate`; else it is compiled again there
                self.decode(latents, height, width)
        except Exception:
            for network in networks:
                network._compiled_call_impl = None
            raise

    @torch.inference_mode()
    def rows_per_second(self, height: int, width: int, calls: int = 2) -> float:
        """Rows of the network per second at this shape, over `calls` calls after a warm-up."""
        call = self._make_call(height, width)
        call()
        started = time.perf_counter()
        for _ in range(calls):
            call()
        return calls * self.rows / (time.perf_counter() - started)

    @torch.inference_mode()
    def _make_call(self, height: int, width: int) -> Callable[[], None]:
        """A synchronous call of the network at the engine's shape, on empty latents and texts."""
        encoded = self.model.encode_texts([""])
        conditioning = {
            name: tensor[:1].expand(self.rows, *tensor.shape[1:]).contiguous()
            for name, tensor in encoded.items()
        }
        conditioning |= self.scale_conditioning()
        shape = self.model.latent_shape(height, width)
        latents = torch.zeros(self.rows, *shape, device=self.model.device)
        timesteps = (
            self.schedule(height, width).timesteps[:1].repeat(self.rows).to(self.model.device)
        )

        @torch.inference_mode()
        def call() -> None:
            self.model.predict(latents, timesteps, conditioning).sum().item()

        return call
