"""The step-level batched denoiser.

One call of the network holds rows that stand at different steps: it takes a timestep per row, and a step of DDIM or of a flow
is elementwise. A slot whose image is finished takes the next request, the longest first, so every call is full until the work
runs out. Calls keep one static shape: idle rows at the very end are computed and counted as waste, and in return an image
does not depend on which others it shared a call with.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError
from ..levels import noise_fractions
from ..utils.hashing import derive_seed
from .models import Conditioning, LatentModel, Schedule
from .oom import (
    call_halving,
    largest_that_fits,
    slots_on_cpu,
    stay_below,
)
from .plan import Request
from .request_queue import LoadPixels, Queue, checked
from .stats import Work
from .text_cache import Text, Texts

MOST_SHAPES = 64
"""Shapes of calls that are compiled, at most, one by one."""


def draw_noise(source_id: str, seed: int, attempt: int, shape: Sequence[int]) -> Tensor:
    """ε, float32 standard normal, a pure function of (source, seed, try): every image has a generator of its own."""
    generator = torch.Generator().manual_seed(derive_seed("noise", source_id, seed, attempt))
    return torch.randn(tuple(shape), generator=generator)


class Engine:
    """Denoises requests step by step in shared batches; `work` counts its steps and calls.

    - `model`: a generator from `load_generator`.
    - `num_inference_steps`: T, 1 or more.
    - `guidance_scale`: s of classifier-free guidance; 1 is none.
    - `slots`: images per call of the network. A guided image (s ≠ 1) takes two rows. Slots are halved
      when memory runs out, and no image is lost.
    - `fixed`: give every level T steps instead of t(λ).
    - `guidance_interval`: noise fractions between which steps are guided, the lower end excluded.

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
    ) -> None:
        self.model, self.num_inference_steps, self.fixed = model, num_inference_steps, fixed
        self.guided = guidance_scale != 1 and not model.distilled
        self.guidance_scale, self.guidance_interval = guidance_scale, guidance_interval
        self.set_slots(slots)
        self.work = Work()
        self.texts = Texts(model, self.work)

    def set_slots(self, slots: int) -> None:
        """How many guided images share a call, from the next shape on."""
        self.slots, self.rows = slots, slots * (1 + self.guided)
        self.vae_batch = min(slots, 16)
        self.lookahead = max(16 * slots, 256)

    def fit_slots(self, height: int, width: int) -> int:
        """Sets the slots to what suits the device for pictures of that many pixels, and returns them.

        On a GPU the largest power of two, up to 64, whose calls leave some memory free; elsewhere a number that depends on the shape alone.
        """
        latents = self.model.latent_shape(height, width)
        if self.model.device.type != "cuda":
            self.set_slots(slots_on_cpu(*latents[1:]))
            return self.slots

        def call(slots: int) -> None:
            self.set_slots(slots)
            self._bare_call(height, width)()

        self.set_slots(largest_that_fits(stay_below(call, self.model.device)))
        return self.slots

    def compile(
        self, height: int, width: int, backend: str | Callable[..., Any] = "inductor"
    ) -> None:
        """Compiles the network (torch.compile) for calls of this shape; another shape or number of slots is compiled when it comes.

        ImageCache move by rounding only, ids do not. Raises whatever the compiler does, after which the network is as before.
        """
        # a run may hold many shapes; beyond the limit torch would silently go on without
        torch._dynamo.config.recompile_limit = max(
            torch._dynamo.config.recompile_limit, MOST_SHAPES
        )
        network = self.model.network
        network.compile(backend=backend, dynamic=False)
        try:
            self._bare_call(height, width)()
        except Exception:
            network._compiled_call_impl = None
            raise

    @torch.inference_mode()
    def generate(
        self, requests: Iterable[Request], load_pixels: LoadPixels
    ) -> Iterator[tuple[Request, np.ndarray]]:
        """Yields each request with its picture, uint8 `[height, width, 3]`, in the order in which they are finished.

        Requests of one shape that follow one another share calls, so sort them by shape. `load_pixels(source_id)` returns
        the source as uint8 `[3, height, width]` of its requests; it is asked once per source in sight. Where something fails, what
        was denoised before is yielded first. Raises RecipeError for a level that takes no step, DataError for pixels of another shape.
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
            if finished and (
                len(finished) >= self.vae_batch or latents.shape != finished[0][1].shape
            ):
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
        """Yields each request with its clean latents `[c, h, w]`, float32 on the CPU, as soon as its last step is done."""
        for (height, width), alike in itertools.groupby(
            requests, lambda request: (request.height, request.width)
        ):
            slots = _Slots(self, height, width)
            queue = Queue(alike, self, slots.schedule.spans, checked(load_pixels, height, width))
            while True:
                while slots.has_room() and (taken := queue.pop()) is not None:
                    slots.place(*taken)
                if slots.idle():
                    break
                yield from slots.advance()

    @torch.inference_mode()
    def rows_per_second(self, height: int, width: int, calls: int = 2) -> float:
        """Rows of the network per second at this batch shape, from `calls` timed calls after one that warms up."""
        call = self._bare_call(height, width)
        call()
        started = time.perf_counter()
        for _ in range(calls):
            call()
        return calls * self.rows / (time.perf_counter() - started)

    @torch.inference_mode()
    def _bare_call(self, height: int, width: int) -> Callable[[], None]:
        """A call of the network at the engine's shape, on noise-free latents and no text; it returns when the device has ended it."""
        encoded = self.model.encode_texts([""])
        conditioning = {
            name: tensor[:1].expand(self.rows, *tensor.shape[1:]).contiguous()
            for name, tensor in encoded.items()
        }
        conditioning |= self.told_scale()
        latents = torch.zeros(
            self.rows, *self.model.latent_shape(height, width), device=self.model.device
        )
        schedule = self.model.schedule(self.num_inference_steps, height, width, self.fixed)
        timesteps = schedule.timesteps[:1].repeat(self.rows).to(self.model.device)

        @torch.inference_mode()
        def call() -> None:
            self.model.predict(latents, timesteps, conditioning).sum().item()

        return call

    def told_scale(self) -> Conditioning:
        """What the rows of a distilled network are told of guidance; nothing for others."""
        if not self.model.distilled:
            return {}
        return {
            "guidance_scale": torch.full(
                (self.rows,), float(self.guidance_scale), device=self.model.device
            )
        }

    def texts_of(self, request: Request) -> list[Text]:
        """The texts that a request's rows are conditioned on: with guidance the negative prompt comes first."""
        prompt = Text(request.prompt, negative=False)
        return [Text(request.negative_prompt, negative=True), prompt] if self.guided else [prompt]

    def halved_slots(self, slots: int) -> None:
        """Takes over that a call holds half as many images from now on."""
        self.slots, self.rows = slots, slots * (1 + self.guided)
        self.work.out_of_memory += 1

    def _halved_vae_batch(self, size: int) -> None:
        self.vae_batch = size
        self.work.out_of_memory += 1

    def through_vae(self, call: Callable[[Tensor], Tensor], items: Tensor) -> Tensor:
        """The result, on the CPU, of the VAE's `call` over batches of one static size."""

        def batches(size: int) -> Tensor:
            parts = []
            for part in items.split(size):
                batch = torch.zeros(size, *items.shape[1:])
                batch[: len(part)] = part
                parts.append(call(batch.to(self.model.device)).cpu()[: len(part)])
            return torch.cat(parts)

        return call_halving(batches, self.vae_batch, self._halved_vae_batch, where="VAE")

    def _decode(
        self, finished: list[tuple[Request, Tensor]]
    ) -> Iterator[tuple[Request, np.ndarray]]:
        whole = [
            (request, latents) for request, latents in finished if bool(latents.isfinite().all())
        ]
        if whole:
            pictures = self.through_vae(
                self.model.decode, torch.stack([latents for _, latents in whole])
            ).numpy()
            self.work.vae_decodes += len(whole)
            yield from (
                (request, picture) for (request, _), picture in zip(whole, pictures, strict=True)
            )
        for request, latents in finished:
            if not bool(latents.isfinite().all()):
                where = f"source '{request.source_id}' at level {request.level} %"
                raise CheckpointError(
                    f"the generator produced NaN for {where}; use dtype float32 or bfloat16."
                )


class _Slots:
    """Images of one shape in the making, each at a step of its own.

    A guided step takes two rows of a call, another one. There is a place for every image that a call could hold; those for
    which a call has no rows left wait for the next one.
    """

    def __init__(self, engine: Engine, height: int, width: int) -> None:
        self.engine, model = engine, engine.model
        self.schedule: Schedule = model.schedule(
            engine.num_inference_steps, height, width, engine.fixed
        )
        self.tables = self.schedule.to(model.device)
        self.shape = model.latent_shape(height, width)
        self.guided = self._guided_steps()
        self.halves = 1 + engine.guided
        count = engine.slots if bool(self.guided.all()) else engine.rows
        self.latents = torch.zeros(count, *self.shape, device=model.device)
        self.occupant: list[Request | None] = [None] * count
        self.position, self.end = (
            [0] * count,
            [0] * count,
        )  # the next step of each place, and one beyond its last
        self.conditioning: Conditioning = {}
        self.gathered: tuple[list[int], Conditioning] | None = None

    def _guided_steps(self) -> Tensor:
        """Which steps of the schedule take two rows, bool `[steps]`."""
        guided = torch.zeros(len(self.schedule.timesteps), dtype=torch.bool)
        low, high = self.engine.guidance_interval
        for percent, span in self.schedule.spans.items():
            fractions = noise_fractions(percent, self.engine.num_inference_steps, self.engine.fixed)
            guided[span.start : span.stop] = torch.tensor(
                [self.engine.guided and low < fraction <= high for fraction in fractions]
            )
        return guided

    def _needs(self, place: int) -> int:
        return 1 + int(self.guided[self.position[place]])

    def _taken(self) -> list[int]:
        return [place for place, request in enumerate(self.occupant) if request is not None]

    def idle(self) -> bool:
        return not self._taken()

    def has_room(self) -> bool:
        """Whether the next call has a row, and an image a place, to spare."""
        taken = self._taken()
        return len(taken) < len(self.occupant) and sum(map(self._needs, taken)) < self.engine.rows

    def place(self, request: Request, clean: Tensor | None) -> None:
        """Puts a request at the start of its level."""
        place = self.occupant.index(None)
        span = self.schedule.spans[request.level]
        self.occupant[place], self.position[place], self.end[place] = request, span.start, span.stop
        noise = draw_noise(request.source_id, request.seed, request.attempt, self.shape)
        self.latents[place] = self.schedule.start(clean, noise, span.start).to(self.latents.device)
        for half, text in enumerate(self.engine.texts_of(request)):
            for name, tensor in self.engine.texts[text].items():
                if name not in self.conditioning:
                    shape = self.halves * len(self.occupant), *tensor.shape
                    self.conditioning[name] = torch.zeros(
                        shape, dtype=tensor.dtype, device=self.latents.device
                    )
                self.conditioning[name][half * len(self.occupant) + place] = tensor
        self.gathered = None

    def advance(self) -> Iterator[tuple[Request, Tensor]]:
        """One call of the network; yields what is finished with its latents on the CPU."""

        def call(slots: int) -> list[int]:
            chosen = self._choose()
            self._call(chosen)
            return chosen

        yield from self._finished(
            call_halving(call, self.engine.slots, self._halved, where="network")
        )

    def _halved(self, slots: int) -> None:
        self.gathered = None
        self.engine.halved_slots(slots)

    def _choose(self) -> list[int]:
        """Places that the next call has rows for, the first ones first."""
        chosen, left = [], self.engine.rows
        for place in self._taken():
            if self._needs(place) <= left:
                chosen.append(place)
                left -= self._needs(place)
        return chosen

    def _call(self, chosen: Sequence[int]) -> None:
        """Moves the images at these places on by a step; where it fails nothing has changed."""
        engine, count, device = self.engine, len(self.occupant), self.latents.device
        both = [place for place in chosen if self.guided[self.position[place]]]
        single = [place for place in chosen if not self.guided[self.position[place]]]
        prompts = (
            self.halves - 1
        ) * count  # where the prompts' own conditioning begins, behind that of the negative ones
        rows = [*both, *(prompts + place for place in (*both, *single))]
        rows += [0] * (engine.rows - len(rows))
        index = torch.tensor(self.position, device=device)
        places = torch.tensor([row % count for row in rows], device=device)
        output = engine.model.predict(
            self.latents[places], self.tables.timesteps[index[places]], self._gather(rows)
        )
        negative_row, prompt_row = torch.zeros(2, count, dtype=torch.long)
        for row, place in enumerate(both):
            negative_row[place], prompt_row[place] = row, len(both) + row
        for row, place in enumerate(single):
            negative_row[place] = prompt_row[place] = 2 * len(both) + row
        without, with_text = output[negative_row.to(device)], output[prompt_row.to(device)]
        # ε_u + s (ε_c − ε_u), which is eq. 2 with s = 1 + w; where a step is not guided both are ε_c
        guided = (
            without + engine.guidance_scale * (with_text - without) if engine.guided else with_text
        )
        moved = torch.zeros(count, 1, 1, 1, dtype=torch.bool)
        moved[chosen] = True
        self.latents = torch.where(
            moved.to(device), self.tables.step(self.latents, guided, index), self.latents
        )
        engine.work.unet_calls += 1
        engine.work.unet_rows += 2 * len(both) + len(single)
        engine.work.unet_rows_computed += engine.rows

    def _gather(self, rows: list[int]) -> Conditioning:
        """The conditioning of the rows of a call; kept while the same rows are asked for."""
        if self.gathered is None or self.gathered[0] != rows:
            where = torch.tensor(rows, device=self.latents.device)
            self.gathered = (
                rows,
                {name: tensor[where] for name, tensor in self.conditioning.items()}
                | self.engine.told_scale(),
            )
        return self.gathered[1]

    def _finished(self, moved: Sequence[int]) -> Iterator[tuple[Request, Tensor]]:
        for place in moved:
            self.position[place] += 1
            request = self.occupant[place]
            if request is not None and self.position[place] == self.end[place]:
                self.occupant[place], self.position[place] = None, 0
                yield request, self.latents[place].cpu().clone()
