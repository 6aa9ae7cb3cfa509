"""The engine against diffusers' pipelines: ratios of times in one process, and exact counters.

    python benchmarks/engine.py --json benchmarks/results/engine.json   # about four minutes
    python benchmarks/engine.py --quick          # seconds; its times mean nothing
    python benchmarks/engine.py --parts worker   # only reading, encoding, scoring, writing
    python benchmarks/engine.py --parts ceiling  # bfloat16, plain and compiled; peak memory

- All arms run the same float32 weights at levels 0, 10, 30, 50, 70, 90. First they must make the
  same latents and images.
- The arms take turns within every repetition, in alternating order. None of them runs for the first
  time there. A ratio is the median over the ratios of the repetitions, with a distribution-free
  interval of at least 95 % (order statistics). A goal is met if the whole interval meets it, and
  open if a part does.
- Ratios are of the process's processor time on one thread: on a shared machine the wall's time also
  holds what others did. The wall's ratio stands beside it. With more threads only the wall counts.
- A ratio is also predicted: a UNet call is timed at each number of rows that an arm uses, and the
  calls of each arm are counted. What the prediction leaves is what an arm costs besides the UNet.
- The arms of diffusers are its Stable Diffusion pipelines with two draws replaced, so that outputs
  can be compared: ε is that of the engine, and a source image is encoded to the mode of its
  posterior. They keep the UNet in the memory layout that is faster for them.
- The slot fill is counted on the real engine with a network that predicts zeros, because it does
  not depend on the values of the network.
- Everything runs on the CPU. `benchmarks/gpu.sh` measures the shape of SDXL on a GPU.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DDIMScheduler, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from discl.data import decode_image
from discl.spectrum.clip_filter import ClipScorer
from discl.spectrum.encoding import encode_image
from discl.spectrum.engine import Engine
from discl.spectrum.models import Conditioning, load_generator
from discl.spectrum.models.stable_diffusion import StableDiffusion
from discl.spectrum.plan import Request, Sampling, plan_requests, unet_rows
from discl.spectrum.slots import draw_noise
from discl.spectrum.stats import Work
from discl.spectrum.store import score_shards, spectrum_shards
from discl.spectrum.worker import Worker
from discl.utils.hashing import derive_seed
from figures import Figure, as_rows, table
from sdxl import count_flops, count_work, matmul_rate
from turns import Times, paired, take_turns, typical_seconds

LEVELS = (0, 10, 30, 50, 70, 90)
CLASSES = ("shirt", "sneaker", "bag", "coat")
GUIDANCE_SCALE = 7.5
PARTS = ("counters", "times", "worker", "slots", "ceiling")


# ---------------------------------------------------------------- the work


def make_requests(sources: int, steps: int, size: int) -> list[Request]:
    """The plan of `sources` images, all levels, one seed."""
    rows = [
        {"id": f"image-{index}", "digest": f"digest-{index}", "label": index % len(CLASSES)}
        for index in range(sources)
    ]
    sampling = Sampling("model", "scheduler", steps, GUIDANCE_SCALE, size, "float32", "webp")
    prompts = {label: [f"a photo of a {name}"] for label, name in enumerate(CLASSES)}
    return plan_requests(rows, list(LEVELS), 1, prompts, negative_prompt="", sampling=sampling)


def pixels_of(source: str, size: int) -> np.ndarray:
    """A picture uint8 `[size, size, 3]` of random patches, a pure function of the source's name."""
    coarse = np.random.default_rng(derive_seed(source)).integers(
        256, size=(3, 4, 4), dtype=np.uint8
    )
    blocks = np.kron(coarse, np.ones((1, -(-size // 4), -(-size // 4)), np.uint8))
    return np.ascontiguousarray(blocks[:, :size, :size].transpose(1, 2, 0))


# ---------------------------------------------------------------- the arms


class ImageToImage(StableDiffusionImg2ImgPipeline):
    """diffusers' pipeline with the engine's ε and the mode of the posterior instead of draws."""

    noise: Tensor

    def prepare_latents(
        self,
        image: Tensor,
        timestep: Tensor,
        batch_size: int,
        copies: int,
        dtype: Any,
        device: Any,
        generator: Any = None,
    ) -> Tensor:
        clean = (
            self.vae.encode(image.to(device, dtype)).latent_dist.mode()
            * self.vae.config.scaling_factor
        )
        return self.scheduler.add_noise(clean, self.noise, timestep)


class Diffusers:
    """diffusers' text-to-image (λ = 0) and image-to-image (λ > 0) with a model's weights."""

    def __init__(self, model: StableDiffusion, unet: Any, steps: int, size: int) -> None:
        self.steps, self.size, self.shape, self.dtype = (
            steps,
            size,
            model.latent_shape(size, size),
            model.dtype,
        )
        self.text, self.image = (
            self._pipeline(kind, model, unet) for kind in (StableDiffusionPipeline, ImageToImage)
        )

    def __call__(
        self, requests: Iterable[Request], batch: int, latents: dict[str, Tensor] | None = None
    ) -> dict[str, np.ndarray]:
        """`{id: picture}` of calls of up to `batch` requests of one level.

        `latents` takes those of the last step, by id.
        """
        made: dict[str, np.ndarray] = {}
        requests = list(requests)
        for level in LEVELS:
            same = [request for request in requests if request.level == level]
            for first in range(0, len(same), batch):
                part = same[first : first + batch]
                made.update(
                    zip((request.id for request in part), self._call(part, latents), strict=True)
                )
        return made

    def _call(self, requests: list[Request], latents: dict[str, Tensor] | None) -> np.ndarray:
        noise = torch.stack(
            [
                draw_noise(request.source_id, request.seed, request.attempt, self.shape)
                for request in requests
            ]
        ).to(self.dtype)
        common: dict[str, Any] = {
            "prompt": [request.prompt for request in requests],
            "negative_prompt": [request.negative_prompt for request in requests],
            "num_inference_steps": self.steps,
            "guidance_scale": GUIDANCE_SCALE,
            "output_type": "np",
        }
        if latents is not None:
            common["callback_on_step_end"] = partial(_keep_latents, latents, requests)
        if requests[0].level == 0:
            return self.text(latents=noise, height=self.size, width=self.size, **common).images
        self.image.noise = noise
        pictures = [
            Image.fromarray(pixels_of(request.source_id, self.size)) for request in requests
        ]
        # half a step more than t(λ) / T, because the pipeline rounds T · strength down in floats
        return self.image(
            image=pictures, strength=(requests[0].steps(self.steps) + 0.5) / self.steps, **common
        ).images

    @staticmethod
    def _pipeline(kind: type, model: StableDiffusion, unet: Any) -> Any:
        pipeline = kind(
            vae=model.vae,
            text_encoder=model.text_encoder,
            tokenizer=model.tokenizer,
            unet=unet,
            scheduler=DDIMScheduler.from_config(model.scheduler.config),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline


def _keep_latents(
    kept: dict[str, Tensor],
    requests: list[Request],
    pipeline: Any,
    step: int,
    timestep: Tensor,
    state: dict[str, Tensor],
) -> dict[str, Tensor]:
    """A callback of a pipeline's steps; what the last one leaves in `kept` counts."""
    kept.update(zip((request.id for request in requests), state["latents"], strict=True))
    return state


class Bench:
    """The arms over one checkpoint at one setting."""

    def __init__(self, checkpoint: str, steps: int, slots: int) -> None:
        model: Any = load_generator(checkpoint)
        self.checkpoint = checkpoint
        self.model, self.steps, self.slots, self.size = model, steps, slots, model.size
        layouts = {
            "channels last": model.unet,
            "contiguous": copy.deepcopy(model.unet).to(memory_format=torch.contiguous_format),
        }
        self.layouts = {rows: self._faster(layouts, rows) for rows in (2, 2 * slots)}
        self.single, self.batched = (
            Diffusers(model, layouts[self.layouts[rows]], steps, self.size)
            for rows in (2, 2 * slots)
        )

    def engine(self) -> Engine:
        return Engine(
            self.model,
            num_inference_steps=self.steps,
            guidance_scale=GUIDANCE_SCALE,
            slots=self.slots,
        )

    def load_pixels(self, source: str) -> np.ndarray:
        return pixels_of(source, self.size)

    def generate(self, requests: list[Request]) -> dict[str, np.ndarray]:
        return {
            request.id: picture
            for request, picture in self.engine().generate(requests, self.load_pixels)
        }

    def denoise(self, requests: list[Request]) -> dict[str, Tensor]:
        return {
            request.id: latents
            for request, latents in self.engine().denoise(requests, self.load_pixels)
        }

    def count(self, requests: list[Request]) -> Work:
        """What the engine counts over `requests`."""
        engine = self.engine()
        for _ in engine.generate(requests, self.load_pixels):
            pass
        return engine.work

    @torch.inference_mode()
    def bare(self, calls: int) -> None:
        """`calls` calls of the UNet at the engine's shape, and nothing else."""
        for _ in range(calls):
            self.call(self.model.unet, 2 * self.slots)

    @torch.inference_mode()
    def call(self, unet: Any, rows: int) -> None:
        latents = torch.zeros(rows, *self.model.latent_shape(self.size, self.size)).contiguous(
            memory_format=torch.channels_last
        )
        width = unet.config.cross_attention_dim
        length = min(
            self.model.tokenizer.model_max_length,
            self.model.text_encoder.config.max_position_embeddings,
        )
        unet(latents, torch.full((rows,), 500), torch.zeros(rows, length, width), return_dict=False)

    def _faster(self, layouts: dict[str, Any], rows: int) -> str:
        arms = {name: lambda unet=unet: self.call(unet, rows) for name, unet in layouts.items()}
        seconds = typical_seconds(arms, 5, "wall")
        return min(seconds, key=seconds.__getitem__)


class Weightless:
    """A model of the same shapes that predicts zeros, to count long plans in seconds."""

    device, dtype, distilled = torch.device("cpu"), torch.float32, False
    class_tokens = None

    def __init__(self, model: StableDiffusion) -> None:
        self.schedule, self.latent_shape = model.schedule, model.latent_shape

    def encode_texts(self, texts: list[str], negative: bool = False) -> Conditioning:
        return {"states": torch.zeros(len(texts), 1)}

    def encode_images(self, pixels: Tensor) -> Tensor:
        return torch.zeros(len(pixels), *self.latent_shape(*pixels.shape[-2:]))

    def decode(self, latents: Tensor) -> Tensor:
        return torch.zeros(len(latents), 8, 8, 3, dtype=torch.uint8)

    def predict(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        return torch.zeros_like(latents)


# ---------------------------------------------------------------- the figures


def equality(bench: Bench, requests: list[Request]) -> list[Figure]:
    """Largest differences from the outputs of diffusers, with a call per image and per level."""
    latents, pictures = bench.denoise(requests), bench.generate(requests)
    figures = []
    for name, arm, batch in (
        ("per image", bench.single, 1),
        ("per level", bench.batched, bench.slots),
    ):
        wanted: dict[str, Tensor] = {}
        drawn = arm(requests, batch, wanted)
        error = max(
            ((latents[one] - wanted[one]).abs().max() / wanted[one].abs().max()).item()
            for one in latents
        )
        grey = max(
            np.abs(pictures[one].astype(int) - (drawn[one] * 255).round().astype(int)).max()
            for one in pictures
        )
        figures.append(
            Figure(
                f"engine and diffusers {name}: latents, largest relative difference",
                error,
                "<=",
                1e-5,
            )
        )
        figures.append(
            Figure(
                f"engine and diffusers {name}: pictures, largest difference in grey levels",
                int(grey),
                "<=",
                1,
            )
        )
    return figures


def counters(bench: Bench, requests: list[Request]) -> list[Figure]:
    """Goals 3 and 4; they are exact and the same on every machine."""
    work, figures = bench.count(requests), []
    rows = unet_rows(requests, bench.steps, GUIDANCE_SCALE)
    sources = len({request.source_id for request in requests if request.level > 0})
    texts = len({request.prompt for request in requests}) + 1
    figures.append(
        Figure("UNet rows ÷ Σ 2·t(λ)", work.unet_rows / rows, "==", 1.0, f"{work.unet_rows} rows")
    )
    figures.append(
        Figure(
            "VAE encodes ÷ source images",
            work.vae_encodes / sources,
            "==",
            1.0,
            f"{work.vae_encodes} encodes",
        )
    )
    figures.append(
        Figure(
            "text encodes ÷ (distinct prompts + 1)",
            work.text_encodes / texts,
            "==",
            1.0,
            f"{work.text_encodes} encodes",
        )
    )
    for times, goal in ((10, 0.95), (100, 0.99)):
        wanted = times * bench.slots
        long = make_requests(-(-wanted // len(LEVELS)), bench.steps, bench.size)[:wanted]
        engine = Engine(
            Weightless(bench.model),
            num_inference_steps=bench.steps,
            guidance_scale=GUIDANCE_SCALE,
            slots=bench.slots,
        )
        for _ in engine.denoise(long, bench.load_pixels):
            pass
        figures.append(
            Figure(
                f"slot fill, {times}× as many requests as slots",
                engine.work.slot_fill,
                ">=",
                goal,
                f"{wanted} requests",
            )
        )
    return figures


@dataclass
class Clock:
    """How long each comparison takes, and which clock counts: the processor's on one thread."""

    seconds: float

    @property
    def name(self) -> str:
        return "processor" if torch.get_num_threads() == 1 else "wall"

    def compare(
        self, arms: dict[str, Callable[[], object]], warm: bool = False
    ) -> dict[str, Times]:
        return take_turns(arms, self.seconds, warm=warm)

    def figure(
        self,
        name: str,
        slow: Times,
        fast: Times,
        comparison: str = "",
        goal: float | None = None,
        detail: str = "",
    ) -> Figure:
        """The ratio of two arms by the clock that counts, the wall's in the detail."""
        found = paired(getattr(slow, self.name), getattr(fast, self.name))
        told = [f"{found.pairs} pairs, {slow.typical(self.name):.3g} and "]
        told[0] += f"{fast.typical(self.name):.3g} s"
        if self.name != "wall":
            told.append(f"by the wall {paired(slow.wall, fast.wall).median:.3f}")
        words = "; ".join([*told, *([detail] if detail else [])])
        return Figure(name, found.median, comparison, goal, words, found.low, found.high)


def calls_of(bench: Bench, requests: list[Request]) -> dict[str, dict[int, int]]:
    """`{arm: {rows of a UNet call: calls}}`, counted from the plan; the engine counts its own."""
    single: Counter[int] = Counter()
    level: Counter[int] = Counter()
    for each in LEVELS:
        same = [request for request in requests if request.level == each]
        steps = same[0].steps(bench.steps)
        single[2] += steps * len(same)
        for first in range(0, len(same), bench.slots):
            level[2 * len(same[first : first + bench.slots])] += steps
    engine = {2 * bench.slots: bench.count(requests).unet_calls}
    return {"per image": dict(single), "per level": dict(level), "engine": engine}


def call_costs(bench: Bench, rows: Sequence[int], clock: Clock) -> dict[int, float]:
    """Seconds of one UNet call with each number of rows, in the layout that an arm uses."""
    layouts = {rows: bench.single if rows == 2 else bench.batched for rows in rows}
    arms = {
        str(each): lambda each=each: bench.call(layouts[each].text.unet, each)  # type: ignore[misc]
        for each in rows
    }
    with torch.inference_mode():
        times = take_turns(arms, clock.seconds / 4)
    return {each: times[str(each)].typical(clock.name) for each in rows}


def timings(bench: Bench, sources: int, clock: Clock) -> list[Figure]:
    """Goals 1, 2 and 5. Shapes are known by then: from `equality`, and from `call_costs`."""
    slots, figures = bench.slots, []
    plans = {count: make_requests(count, bench.steps, bench.size) for count in (sources, slots)}
    calls = {count: calls_of(bench, requests) for count, requests in plans.items()}
    rows = sorted({size for arms in calls.values() for arm in arms.values() for size in arm})
    costs = call_costs(bench, rows, clock)
    told = ", ".join(f"{1000 * cost / size:.2f} ms with {size}" for size, cost in costs.items())
    figures.append(
        Figure(
            f"{clock.name} time of a UNet row, largest call",
            costs[rows[-1]] / rows[-1],
            "",
            None,
            told,
        )
    )

    def predicted(count: int, arm: str) -> str:
        ours, theirs = (
            sum(number * costs[size] for size, number in calls[count][name].items())
            for name in ("engine", arm)
        )
        return f"{theirs / ours:.2f} predicted from the calls"

    few, full = plans[sources], plans[slots]
    number = calls[sources]["engine"][2 * slots]
    times = clock.compare(
        {
            "engine": lambda: bench.generate(few),
            "per image": lambda: bench.single(few, 1),
            "per level": lambda: bench.batched(few, slots),
            "bare": lambda: bench.bare(number),
        },
        warm=True,
    )
    name = "engine ÷ diffusers per (image, level)"
    told = predicted(sources, "per image")
    figures.append(clock.figure(name, times["per image"], times["engine"], ">=", 4.0, told))
    name = "engine ÷ diffusers per-level batches, {} images a level, at most {} rows a call"
    large = clock.compare(
        {"engine": lambda: bench.generate(full), "per level": lambda: bench.batched(full, slots)},
        warm=True,
    )
    for count, found, goal, kind in (
        (sources, times, 1.15, "a small class"),
        (slots, large, 0.98, "full batches only"),
    ):
        told = f"{kind}; {predicted(count, 'per level')}"
        title = name.format(count, 2 * slots)
        figures.append(clock.figure(title, found["per level"], found["engine"], ">=", goal, told))
    title, told = "engine with VAE and texts ÷ bare UNet loop", f"{number} calls"
    figures.append(clock.figure(title, times["bare"], times["engine"], ">=", 0.9, told))
    speed = 2 * slots * number / times["bare"].typical(clock.name)
    figures.append(Figure(f"UNet rows per second of {clock.name} time, bare loop", speed))
    return figures


def against_ceiling(bench: Bench, clock: Clock) -> list[Figure]:
    """Both sides in bfloat16, plain and compiled, with full batches at every level.

    Figures: images/s, fraction of the matmul ceiling, peak memory.
    """
    requests = make_requests(bench.slots, bench.steps, bench.size)
    arms: dict[str, Callable[[], object]] = {}
    # first: what is called while being counted is never compiled
    work = count_work(count_flops(bench.model, bench.size), requests, bench.steps)
    for name in ("plain", "compiled"):
        model: Any = load_generator(bench.checkpoint, "bfloat16")
        engine = Engine(
            model, num_inference_steps=bench.steps, guidance_scale=GUIDANCE_SCALE, slots=bench.slots
        )
        theirs = Diffusers(model, copy.deepcopy(model.unet), bench.steps, bench.size)
        if name == "compiled":
            engine.compile(bench.size, bench.size)
            theirs.text.unet.compile(dynamic=False)  # the unet of both pipelines
        arms[f"engine, {name}"] = lambda engine=engine: list(
            engine.generate(requests, bench.load_pixels)
        )  # type: ignore[misc]
        arms[f"per level, {name}"] = lambda theirs=theirs: theirs(requests, bench.slots)  # type: ignore[misc]
    ceiling = matmul_rate("cpu", torch.bfloat16, 2048)
    times = clock.compare(arms)
    figures = [
        Figure(
            "bfloat16 matmul ceiling, TFLOP/s",
            ceiling,
            detail=f"{1000 * work / len(requests):.1f} GFLOP an image",
        )
    ]
    for name in ("plain", "compiled"):
        ours, theirs = times[f"engine, {name}"], times[f"per level, {name}"]
        taken = ours.typical("wall")
        title = f"bfloat16, {name}: engine ÷ diffusers per-level batches, full batches only"
        figures += [
            Figure(f"bfloat16, {name}: images/s", len(requests) / taken),
            Figure(f"bfloat16, {name}: share of the matmul ceiling", work / taken / ceiling),
            clock.figure(title, theirs, ours, ">=", 0.98),
        ]
    for side in ("engine", "diffusers per level"):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
            told = alone.submit(
                peak_memory,
                side,
                bench.checkpoint,
                bench.steps,
                bench.slots,
                torch.get_num_threads(),
            ).result()
        figures.append(
            Figure(f"bfloat16, plain: peak memory of a process with the {side} alone, MB", told)
        )
    return figures


def peak_memory(side: str, checkpoint: str, steps: int, slots: int, threads: int) -> float:
    """Peak resident MB of this process, which makes the full batches with one side."""
    torch.set_num_threads(threads)
    model: Any = load_generator(checkpoint, "bfloat16")
    requests = make_requests(slots, steps, model.size)
    if side == "engine":
        engine = Engine(
            model, num_inference_steps=steps, guidance_scale=GUIDANCE_SCALE, slots=slots
        )
        for _ in engine.generate(requests, lambda source: pixels_of(source, model.size)):
            pass
    else:
        Diffusers(model, model.unet, steps, model.size)(requests, slots)
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmHWM")
    )
    return int(line.split()[1]) * 1024 / 1e6


def beside_denoising(
    bench: Bench, sources: int, clock: Clock, clip: str, encoding: str = "webp-lossless"
) -> list[Figure]:
    """What reading, encoding, scoring and writing add to denoising when they run beside it."""
    requests = make_requests(sources, bench.steps, bench.size)
    scorer = ClipScorer(clip, {label: f"a photo of a {name}" for label, name in enumerate(CLASSES)})
    stored = [encode_image(picture, encoding) for picture in bench.generate(requests).values()]
    waits: list[float] = []

    def worker() -> None:
        with tempfile.TemporaryDirectory() as folder:
            sampling = Sampling(
                "m", "s", bench.steps, GUIDANCE_SCALE, bench.size, "float32", encoding
            )
            images, scores = (
                spectrum_shards(Path(folder) / "spectrum", CLASSES),
                score_shards(Path(folder) / "scores"),
            )
            work = Worker(
                bench.engine(), images, sampling, scorer=scorer, scores=scores, shard_rows=64
            )
            started = time.perf_counter()
            work.make(
                requests,
                bench.load_pixels,
                {request.source_id: (bench.size, bench.size) for request in requests},
            )
            waits.append(work.waited / (time.perf_counter() - started))

    def score() -> None:
        scorer([decode_image({"bytes": data, "path": None}) for data in stored], [0] * len(stored))

    arms: dict[str, Callable[[], object]] = {
        "engine": lambda: bench.generate(requests),
        "worker": worker,
        "scoring": score,
    }
    score()  # the engine's first time was in `equality`
    times = clock.compare(arms, warm=True)
    return [
        clock.figure(
            "CLIP scoring ÷ generation",
            times["scoring"],
            times["engine"],
            "<=",
            0.02,
            f"{len(requests)} images",
        ),
        clock.figure(
            "worker (reads, encodes, scores, writes) ÷ engine alone",
            times["worker"],
            times["engine"],
            detail="by the wall 1 is full overlap",
        ),
        Figure(
            "idle share: denoising waits for sources or for room behind it",
            statistics.median(waits),
        ),
    ]


def other_slots(bench: Bench, sources: int) -> list[Figure]:
    """Changes of pixels with other slots, order or workers, in float32 and in bfloat16."""
    figures = []
    requests = make_requests(sources, bench.steps, bench.size)
    for dtype, comparison, goal in (("float32", "<=", 1.0), ("bfloat16", "", None)):
        model = load_generator(bench.checkpoint, dtype)

        def pictures(asked: list[Request], slots: int, model: Any = model) -> dict[str, np.ndarray]:
            engine = Engine(
                model, num_inference_steps=bench.steps, guidance_scale=GUIDANCE_SCALE, slots=slots
            )
            return {
                request.id: picture.astype(int)
                for request, picture in engine.generate(asked, bench.load_pixels)
            }

        first = pictures(requests, 4)
        half = len(requests) // 2
        others = {
            "reversed, in two workers, 4 slots": {
                **pictures(requests[half:][::-1], 4),
                **pictures(requests[:half][::-1], 4),
            },
            "16 slots instead of 4": pictures(requests, 16),
        }
        for name, made in others.items():
            differences = np.concatenate([np.abs(made[one] - first[one]).ravel() for one in first])
            told = f"mean {differences.mean():.4f}, in {np.mean(differences > 0):.2%} of the values"
            bound = 0.0 if "reversed" in name else goal
            sign = "==" if "reversed" in name else comparison
            figures.append(
                Figure(
                    f"grey levels between pictures, {dtype}: {name}",
                    int(differences.max()),
                    sign,
                    bound,
                    told,
                )
            )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint",
        default="embedded:fashion-mnist/diffusion",
        help="a folder, a hub name or embedded:...",
    )
    parser.add_argument("--sources", type=int, default=8, help="images of the small class")
    parser.add_argument(
        "--slots", type=int, default=16, help="images that share a call of the UNet"
    )
    parser.add_argument("--steps", type=int, default=20, help="inference steps T")
    parser.add_argument(
        "--seconds", type=float, default=20, help="of each comparison, and at least five pairs"
    )
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=["counters", "times", "worker"],
        help="equality is always shown first",
    )
    parser.add_argument(
        "--clip", default="embedded:fashion-mnist/clip", help="CLIP that scores the pictures"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument(
        "--quick", action="store_true", help="2 images, 4 slots, T = 10, five pairs each"
    )
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.sources, arguments.slots, arguments.seconds = 2, 4, 0.0
        arguments.steps = 10
    torch.set_num_threads(arguments.threads)
    clock = Clock(arguments.seconds)
    started = time.time()
    bench = Bench(arguments.checkpoint, arguments.steps, arguments.slots)
    settings = {
        "checkpoint": arguments.checkpoint,
        "num_inference_steps": arguments.steps,
        "levels": list(LEVELS),
        "guidance_scale": GUIDANCE_SCALE,
        "size": bench.size,
        "sources": arguments.sources,
        "slots": arguments.slots,
        "seconds": arguments.seconds,
        "clock": clock.name,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "unet_parameters": sum(weight.numel() for weight in bench.model.unet.parameters()),
        "diffusers_layout": {f"{rows} rows": layout for rows, layout in bench.layouts.items()},
        "quick": arguments.quick,
    }
    print(", ".join(f"{name} {value}" for name, value in settings.items()))
    few = make_requests(arguments.sources, arguments.steps, bench.size)
    figures = equality(bench, few)
    print(table(figures), flush=True)
    if not all(figure.met for figure in figures):
        raise SystemExit("the outputs are not equal, so nothing was timed.")
    if "counters" in arguments.parts:
        figures += counters(bench, few)
    if "times" in arguments.parts:
        figures += timings(bench, arguments.sources, clock)
    if "worker" in arguments.parts:
        figures += beside_denoising(bench, arguments.sources, clock, arguments.clip)
    if "slots" in arguments.parts:
        figures += other_slots(bench, arguments.sources)
    if "ceiling" in arguments.parts:
        figures += against_ceiling(bench, clock)
    print(table(figures[4:]))
    print(f"T = {arguments.steps}, {time.time() - started:.0f} s")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        rows = as_rows(figures)
        arguments.json.write_text(
            json.dumps({"settings": settings, "figures": rows}, indent=1, ensure_ascii=False)
        )


if __name__ == "__main__":
    main()
