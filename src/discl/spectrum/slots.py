"""Images in progress: each in a slot, at its own denoising step."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..levels import noise_fractions
from ..utils.hashing import derive_seed
from .models import Conditioning, Schedule
from .oom import call_halving
from .plan import Request

if TYPE_CHECKING:
    from .engine import Engine


def draw_noise(
    source_id: str, seed: int, attempt: int, shape: Sequence[int], left: int | None = None
) -> Tensor:
    """ε, float32 standard normal `shape`, keyed by (source, seed, attempt).

    Every image has its own generator.

    - `left`: for the fresh noise of a step, the number of steps from it to the end.
    """
    step = () if left is None else (left,)
    key = derive_seed("noise", source_id, seed, attempt, *step)
    generator = torch.Generator().manual_seed(key)
    return torch.randn(tuple(shape), generator=generator)


def guide(negative: Tensor, prompt: Tensor, guidance_scale: float) -> Tensor:
    """ε_u + s (ε_c − ε_u): classifier-free guidance (arXiv 2410.13674, eq. 2, with s = 1 + w)."""
    return negative + guidance_scale * (prompt - negative)


class Slots:
    """Images of one shape in progress, each at its own step.

    A guided step takes two rows of a call of the network, another step one. There is a slot for
    every image that a call could hold. Images for which a call has no rows left wait for the next.

    - `engine`: has the model, its settings, texts and counters.
    - `height`, `width`: of the images, in pixels.
    """

    def __init__(self, engine: Engine, height: int, width: int) -> None:
        model, device = engine.model, engine.model.device
        self.engine = engine
        self.schedule: Schedule = engine.schedule(height, width)
        self.tables = self.schedule.to(device)
        self.guided_steps = self._guided_steps()
        count = engine.slots if bool(self.guided_steps.all()) else engine.rows
        self.shape = model.latent_shape(height, width)
        self.latents = torch.zeros(count, *self.shape, device=device)
        self.previous = torch.zeros_like(self.latents)  # x̂0 of the last step, if it is needed
        self.requests: list[Request | None] = [None] * count
        self.step = [0] * count  # the next step of each slot
        self.end = [0] * count  # one beyond its last step
        self.looks: list[dict[int, int]] = [{}] * count  # steps after which to look: steps taken
        # rows of the negative prompts of all slots, if any, then rows of their prompts
        self.conditioning: Conditioning = {}
        self._gathered: tuple[list[int], Conditioning] | None = None

    def _guided_steps(self) -> Tensor:
        """Which steps of the schedule take two rows, bool `[steps]`."""
        engine = self.engine
        guided = torch.zeros(len(self.schedule.timesteps), dtype=torch.bool)
        low, high = engine.guidance_interval
        for level, span in self.schedule.spans.items():
            fractions = noise_fractions(level, engine.num_inference_steps, engine.fixed)
            guided[span.start : span.stop] = torch.tensor(
                [engine.guided and low < fraction <= high for fraction in fractions]
            )
        return guided

    def _rows_of(self, slot: int) -> int:
        return 1 + int(self.guided_steps[self.step[slot]])

    def _taken(self) -> list[int]:
        return [slot for slot, request in enumerate(self.requests) if request is not None]

    def idle(self) -> bool:
        """Whether no image is in progress."""
        return not self._taken()

    def has_room(self) -> bool:
        """Whether there is a free slot, and a free row in the next call."""
        taken = self._taken()
        return len(taken) < len(self.requests) and sum(map(self._rows_of, taken)) < self.engine.rows

    def add(self, request: Request, clean: Tensor | None) -> None:
        """Puts a request into a free slot, noised to the start of its level.

        - `clean`: latents `[c, h, w]` of its source; None for level 0.
        """
        slot = self.requests.index(None)
        span = self.schedule.spans[request.level]
        self.requests[slot], self.step[slot], self.end[slot] = request, span.start, span.stop
        noise = draw_noise(request.source_id, request.seed, request.attempt, self.shape)
        self.latents[slot] = self.schedule.start(clean, noise, span.start).to(self.latents.device)
        self.previous[slot] = 0
        looks = (
            self.engine.inspector.looks(request.level, len(span)) if self.engine.inspector else ()
        )
        self.looks[slot] = {span.start + look - 1: look for look in looks}
        count, texts = len(self.requests), self.engine.texts_of(request)
        for part, text in enumerate(texts):
            for name, tensor in self.engine.texts[text].items():
                if name not in self.conditioning:
                    self.conditioning[name] = torch.zeros(
                        (len(texts) * count, *tensor.shape),
                        dtype=tensor.dtype,
                        device=self.latents.device,
                    )
                self.conditioning[name][part * count + slot] = tensor
        self._gathered = None

    def advance(self) -> Iterator[tuple[Request, Tensor]]:
        """One call of the network. Yields what is finished with its latents, on the CPU."""

        def call(slots: int) -> tuple[list[int], Tensor | None]:
            chosen = self._choose()
            return chosen, self._denoise(chosen)

        chosen, clean = call_halving(call, self.engine.slots, self._halved, where="network")
        dropped = self._inspect(chosen, clean)
        for slot in chosen:
            self.step[slot] += 1
            request = self.requests[slot]
            if slot in dropped:
                self.requests[slot], self.step[slot] = None, 0
            elif request is not None and self.step[slot] == self.end[slot]:
                self.requests[slot], self.step[slot] = None, 0
                yield request, self.latents[slot].cpu().clone()

    def _inspect(self, chosen: Sequence[int], clean: Tensor | None) -> set[int]:
        """The slots that the inspector drops, of those that have just been moved."""
        looking = [slot for slot in chosen if self.step[slot] in self.looks[slot]]
        inspector, work = self.engine.inspector, self.engine.work
        if not looking or inspector is None or clean is None:
            return set()
        requests = [request for slot in looking if (request := self.requests[slot]) is not None]
        taken = [self.looks[slot][self.step[slot]] for slot in looking]
        verdicts = inspector.inspect(requests, taken, clean[looking].cpu())
        work.looks += len(looking)
        work.dropped += sum(verdicts)
        return set(itertools.compress(looking, verdicts))

    def _halved(self, slots: int) -> None:
        self._gathered = None
        self.engine.halved_slots(slots)

    def _choose(self) -> list[int]:
        """Slots for which the next call has rows, the first ones first."""
        chosen, free = [], self.engine.rows
        for slot in self._taken():
            if self._rows_of(slot) <= free:
                chosen.append(slot)
                free -= self._rows_of(slot)
        return chosen

    def _denoise(self, chosen: Sequence[int]) -> Tensor | None:
        """Moves the images in these slots on by one step. Where it fails, nothing has changed.

        Returns x̂0 of all slots `[slots, c, h, w]`, or None where nobody needs it.
        """
        engine, count, device = self.engine, len(self.requests), self.latents.device

        # rows of the call: negative prompts and prompts of guided steps, prompts of others, padding
        guided = [slot for slot in chosen if self.guided_steps[self.step[slot]]]
        single = [slot for slot in chosen if not self.guided_steps[self.step[slot]]]
        first_prompt = count if engine.guided else 0
        rows = [*guided, *(first_prompt + slot for slot in (*guided, *single))]
        rows += [0] * (engine.rows - len(rows))

        # the network, with a timestep per row
        step = torch.tensor(self.step, device=device)
        slots = torch.tensor([row % count for row in rows], device=device)
        output = engine.model.predict(
            self.latents[slots], self.tables.timesteps[step[slots]], self._gather(rows)
        )

        # guidance; both rows of a slot are the same where its step is not guided
        negative_row, prompt_row = torch.zeros(2, count, dtype=torch.long)
        for row, slot in enumerate(guided):
            negative_row[slot], prompt_row[slot] = row, len(guided) + row
        for row, slot in enumerate(single):
            negative_row[slot] = prompt_row[slot] = 2 * len(guided) + row
        prediction = output[prompt_row.to(device)]
        if engine.guided:
            negative = output[negative_row.to(device)]
            prediction = guide(negative, prediction, engine.guidance_scale)

        # a step of the schedule, for the chosen slots
        chosen_slots = torch.zeros(count, 1, 1, 1, dtype=torch.bool)
        chosen_slots[list(chosen)] = True
        chosen_slots = chosen_slots.to(device)
        latents, noise, clean = self.latents, self._draw_noise(chosen), None
        multistep = self.schedule.multistep
        if multistep or any(self.step[slot] in self.looks[slot] for slot in chosen):
            clean = self.tables.predict_clean(latents, prediction, step)
        previous = self.previous if multistep else None
        moved = self.tables.step(latents, prediction, step, previous, noise)
        self.latents = torch.where(chosen_slots, moved, latents)
        if multistep and clean is not None:
            self.previous = torch.where(chosen_slots, clean, self.previous)
        engine.work.unet_calls += 1
        engine.work.unet_rows += 2 * len(guided) + len(single)
        engine.work.unet_rows_computed += engine.rows
        return clean

    def _draw_noise(self, chosen: Sequence[int]) -> Tensor | None:
        """The fresh noise of these slots' steps `[slots, c, h, w]`; None where none takes any."""
        noise = None
        for slot in chosen:
            request, step = self.requests[slot], self.step[slot]
            if request is not None and self.schedule.adds_noise(step):
                noise = torch.zeros(self.latents.shape) if noise is None else noise
                key = request.source_id, request.seed, request.attempt
                noise[slot] = draw_noise(*key, self.shape, left=self.end[slot] - step)
        return None if noise is None else noise.to(self.latents.device)

    def _gather(self, rows: list[int]) -> Conditioning:
        """The conditioning of the rows of a call; cached while the rows stay the same."""
        if self._gathered is None or self._gathered[0] != rows:
            index = torch.tensor(rows, device=self.latents.device)
            gathered = {name: tensor[index] for name, tensor in self.conditioning.items()}
            self._gathered = rows, gathered | self.engine.scale_conditioning()
        return self._gathered[1]
