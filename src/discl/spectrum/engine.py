"""The step-level batched denoiser.

One UNet call holds rows that stand at different steps: the UNet takes a timestep per row and a DDIM step is elementwise.
A slot whose image is finished takes the next request, the longest first, so every call is full until the work runs out.
Calls keep one static shape: idle rows at the very end are computed and counted as waste, and in return an image does not
depend on which others it shared a call with.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..digests import derive_seed
from ..errors import CheckpointError
from .models import Conditioning, LatentModel, Schedule
from .plan import Request

LoadPixels = Callable[[str], np.ndarray]


@dataclass
class Work:
    """What the engine did. Useful rows are those of an unfinished image; the rest of a call is padding."""

    unet_calls: int = 0
    unet_rows: int = 0
    unet_rows_computed: int = 0
    vae_encodes: int = 0
    vae_decodes: int = 0
    text_encodes: int = 0

    @property
    def slot_fill(self) -> float:
        """Useful UNet rows ÷ rows computed, in [0, 1]."""
        return self.unet_rows / self.unet_rows_computed if self.unet_rows_computed else 1.0


def draw_noise(source_id: str, seed: int, attempt: int, shape: Sequence[int]) -> Tensor:
    """ε, float32 standard normal, a pure function of (source, seed, try): every image has a generator of its own."""
    generator = torch.Generator().manual_seed(derive_seed("noise", source_id, seed, attempt))
    return torch.randn(tuple(shape), generator=generator)


def ddim_step(latents: Tensor, output: Tensor, alpha: Tensor, alpha_next: Tensor, prediction_type: str, clip: float | None) -> Tensor:
    """x_next = √ᾱ_next · x̂0 + √(1 − ᾱ_next) · ε̂ with η = 0 (arXiv 2010.02502, eq. 12).

    `alpha` and `alpha_next` are ᾱ now and after the step, broadcast over `latents` `[rows, c, h, w]`. Clipping bounds x̂0
    and leaves ε̂ as predicted, as diffusers does.
    """
    if prediction_type == "epsilon":
        noise, clean = output, (latents - (1 - alpha).sqrt() * output) / alpha.sqrt()
    elif prediction_type == "v_prediction":
        noise, clean = alpha.sqrt() * output + (1 - alpha).sqrt() * latents, alpha.sqrt() * latents - (1 - alpha).sqrt() * output
    else:
        noise, clean = (latents - alpha.sqrt() * output) / (1 - alpha).sqrt(), output
    if clip is not None:
        clean = clean.clamp(-clip, clip)
    return alpha_next.sqrt() * clean + (1 - alpha_next).sqrt() * noise


def start_latents(clean: Tensor | None, noise: Tensor, schedule: Schedule, steps: int) -> Tensor:
    """z_t = √ᾱ_t · z_real + √(1 − ᾱ_t) · ε (eq. 1, 3) where `steps` steps are left; pure noise where `clean` is None (λ = 0)."""
    if clean is None:
        return noise
    alpha = schedule.alphas[len(schedule) - steps]
    return alpha.sqrt() * clean + (1 - alpha).sqrt() * noise


@dataclass
class _Texts:
    """Text embeddings, each computed once while it is remembered: those that are waited for, and up to `limit` in all."""

    model: LatentModel
    work: Work
    limit: int = 4096
    batch: int = 16
    known: OrderedDict[str, Conditioning] = field(default_factory=OrderedDict)

    def learn(self, texts: Iterable[str]) -> None:
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        for first in range(0, len(new), self.batch):
            part = new[first : first + self.batch]
            encoded = self.model.encode_texts(part + [""] * (self.batch - len(part)))
            self.work.text_encodes += len(part)
            for row, text in enumerate(part):
                self.known[text] = {name: tensor[row].clone() for name, tensor in encoded.items()}

    def __getitem__(self, text: str) -> Conditioning:
        if text not in self.known:
            self.learn([text])
        self.known.move_to_end(text)
        return self.known[text]

    def trim(self, needed: set[str]) -> None:
        """Forgets the least recently used texts beyond `limit`, but none that is `needed`."""
        for text in [text for text in self.known if text not in needed][: max(len(self.known) - self.limit, 0)]:
            del self.known[text]


class _Queue:
    """Requests waiting for a slot, the longest first, with the latents of their source images.

    It looks ahead over a bounded number of requests, so that a plan of any length is worked on in constant memory.
    """

    def __init__(self, requests: Iterable[Request], engine: Engine, load_pixels: LoadPixels) -> None:
        self.incoming = iter(requests)
        self.engine, self.load_pixels = engine, load_pixels
        self.heap: list[tuple[int, int, Request]] = []
        self.latents: dict[str, Tensor] = {}
        self.users: Counter[str] = Counter()
        self.newest: str | None = None  # source of the last request in sight: the plan may go on with it
        self.taken = 0
        self.exhausted = False

    def pop(self) -> tuple[Request, Tensor | None] | None:
        """The longest request in sight with its clean latents (None for text only), or None when the work has run out."""
        if not self.exhausted and len(self.heap) <= self.engine.lookahead // 2:
            self._look_ahead()
        if not self.heap:
            return None
        _, _, request = heapq.heappop(self.heap)
        clean = None
        if request.level > 0:
            clean = self.latents[request.source_id]
            self.users[request.source_id] -= 1
            self._release(request.source_id)
        return request, clean

    def _release(self, source: str | None) -> None:
        """Forgets the latents of a source that no request in sight needs, unless the next ones may be its own."""
        if source is not None and source != self.newest and not self.users[source]:
            del self.users[source]
            self.latents.pop(source, None)

    def _look_ahead(self) -> None:
        new: list[Request] = []
        while len(self.heap) + len(new) < self.engine.lookahead:
            request = next(self.incoming, None)
            if request is None:
                self.exhausted = True
                break
            new.append(request)
        self.engine.texts.learn(text for request in new for text in self.engine.texts_of(request))
        sources = dict.fromkeys(request.source_id for request in new if request.level > 0)
        before, self.newest = self.newest, new[-1].source_id if new else None
        self.users.update(request.source_id for request in new if request.level > 0)
        self._release(before)
        self._encode([source for source in sources if source not in self.latents])
        for request in new:
            heapq.heappush(self.heap, (-request.steps(len(self.engine.schedule)), self.taken, request))
            self.taken += 1
        self.engine.texts.trim({text for _, _, request in self.heap for text in self.engine.texts_of(request)})

    def _encode(self, sources: list[str]) -> None:
        engine = self.engine
        for first in range(0, len(sources), engine.vae_batch):
            part = sources[first : first + engine.vae_batch]
            pixels = torch.zeros(engine.vae_batch, 3, engine.size, engine.size)
            for row, source in enumerate(part):
                pixels[row] = torch.from_numpy(self.load_pixels(source)).float() / 127.5 - 1
            for source, latents in zip(part, engine.model.encode_images(pixels).cpu(), strict=False):
                self.latents[source] = latents.clone()
            engine.work.vae_encodes += len(part)


class Engine:
    """Denoises requests with one model at one setting; `work` counts what was done.

    `slots` images share a UNet call (twice as many rows with guidance, s > 1).
    """

    def __init__(self, model: LatentModel, *, num_inference_steps: int, guidance_scale: float, size: int, slots: int = 64) -> None:
        self.model, self.schedule = model, model.schedule(num_inference_steps)
        self.guidance_scale, self.size, self.slots = guidance_scale, size, slots
        self.vae_batch = min(slots, 16)
        self.lookahead = max(16 * slots, 256)
        self.shape = model.latent_shape(size)
        self.work = Work()
        self.texts = _Texts(model, self.work)

    @torch.inference_mode()
    def generate(self, requests: Iterable[Request], load_pixels: LoadPixels) -> Iterator[tuple[Request, np.ndarray]]:
        """Yields each request with its picture, uint8 `[size, size, 3]`, in the order in which they are finished.

        `load_pixels(source_id)` returns the source image as uint8 `[3, size, size]`; it is asked once per source in sight.
        """
        finished: list[tuple[Request, Tensor]] = []
        for request, latents in self.denoise(requests, load_pixels):
            finished.append((request, latents))
            if len(finished) == self.vae_batch:
                yield from self._decode(finished)
                finished = []
        if finished:
            yield from self._decode(finished)

    @torch.inference_mode()
    def denoise(self, requests: Iterable[Request], load_pixels: LoadPixels) -> Iterator[tuple[Request, Tensor]]:
        """Yields each request with its clean latents `[c, h, w]`, float32 on the CPU, as soon as its last step is done."""
        queue = _Queue(requests, self, load_pixels)
        model, schedule, slots = self.model, self.schedule, self.slots
        guided = self.guidance_scale != 1
        latents = torch.zeros(slots, *self.shape, device=model.device)
        position = torch.zeros(slots, dtype=torch.long)  # index of the next step of each slot
        occupant: list[Request | None] = [None] * slots
        conditioning: Conditioning = {}
        tables = [tensor.to(model.device) for tensor in (schedule.timesteps, schedule.alphas, schedule.alphas_next)]
        while True:
            for slot in (slot for slot in range(slots) if occupant[slot] is None):
                taken = queue.pop()
                if taken is None:
                    break
                request, clean = taken
                occupant[slot] = request
                steps = request.steps(len(schedule))
                position[slot] = len(schedule) - steps
                noise = draw_noise(request.source_id, request.seed, request.attempt, self.shape)
                latents[slot] = start_latents(clean, noise, schedule, steps).to(model.device)
                self._place_text(conditioning, slot, request)
            active = [slot for slot in range(slots) if occupant[slot] is not None]
            if not active:
                return
            timesteps, alphas, alphas_next = (table[position.to(model.device)] for table in tables)
            output = self._guided(latents, timesteps, conditioning) if guided else model.predict(latents, timesteps, conditioning)
            alphas, alphas_next = (alpha.view(-1, 1, 1, 1) for alpha in (alphas, alphas_next))
            latents = ddim_step(latents, output, alphas, alphas_next, schedule.prediction_type, schedule.clip)
            self.work.unet_calls += 1
            self.work.unet_rows += len(active) * (1 + guided)
            self.work.unet_rows_computed += slots * (1 + guided)
            for slot in active:
                position[slot] += 1
                if position[slot] == len(schedule):
                    request = occupant[slot]  # type: ignore[assignment]
                    occupant[slot], position[slot] = None, 0
                    yield request, latents[slot].cpu().clone()

    @torch.inference_mode()
    def rows_per_second(self, calls: int = 2) -> float:
        """UNet rows per second at this batch shape, from `calls` timed calls after one that warms up."""
        rows = self.slots * (1 + (self.guidance_scale != 1))
        conditioning = {
            name: tensor[:1].expand(rows, *tensor.shape[1:]).contiguous() for name, tensor in self.model.encode_texts([""]).items()
        }
        latents = torch.zeros(rows, *self.shape, device=self.model.device)
        timesteps = torch.zeros(rows, dtype=torch.long, device=self.model.device)
        self.model.predict(latents, timesteps, conditioning).sum().item()
        started = time.perf_counter()
        for _ in range(calls):
            self.model.predict(latents, timesteps, conditioning).sum().item()
        return calls * rows / (time.perf_counter() - started)

    def _guided(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """ε_u + s (ε_c − ε_u), which is eq. 2 with s = 1 + w; both halves go through the network in one call."""
        both = self.model.predict(torch.cat([latents, latents]), torch.cat([timesteps, timesteps]), conditioning)
        without, with_text = both.chunk(2)
        return without + self.guidance_scale * (with_text - without)

    def texts_of(self, request: Request) -> list[str]:
        """The texts that a request's rows are conditioned on: with guidance the negative prompt comes first."""
        return [request.prompt] if self.guidance_scale == 1 else [request.negative_prompt, request.prompt]

    def _place_text(self, conditioning: Conditioning, slot: int, request: Request) -> None:
        """Writes a slot's text rows: the negative prompt's in the first half, the prompt's in the second."""
        halves = self.texts_of(request)
        for half, text in enumerate(halves):
            for name, tensor in self.texts[text].items():
                if name not in conditioning:
                    conditioning[name] = tensor.new_zeros(len(halves) * self.slots, *tensor.shape)
                conditioning[name][half * self.slots + slot] = tensor

    def _decode(self, finished: list[tuple[Request, Tensor]]) -> Iterator[tuple[Request, np.ndarray]]:
        batch = torch.zeros(self.vae_batch, *self.shape)
        for row, (_, latents) in enumerate(finished):
            batch[row] = latents
        if not bool(batch.isfinite().all()):
            broken = next(request for request, latents in finished if not bool(latents.isfinite().all()))
            raise CheckpointError(
                f"the generator produced NaN for source '{broken.source_id}' at level {broken.level} %; use dtype float32 or bfloat16."
            )
        pictures = self.model.decode(batch.to(self.model.device)).numpy()
        self.work.vae_decodes += len(finished)
        for row, (request, _) in enumerate(finished):
            yield request, pictures[row]
