"""Parts of `gpu.py` about generation: the engine against diffusers, in float32 and bfloat16."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import sdxl
from discl.spectrum.engine import Engine
from discl.spectrum.oom import call_halving
from figures import Figure
from gpu_bench import Bench

CLIP = "embedded:fashion-mnist/clip"
PROCESSOR = "preprocessor_config.json"
TIMEOUT = 60
"""Seconds that one process waits for the other."""


def ceiling(bench: Bench) -> Iterator[Figure]:
    """What the card does on square matrix products; shares of a ceiling are of the first."""
    side = 256 if bench.smoke else 8192
    for name, dtype, tf32 in (
        (str(bench.dtype).removeprefix("torch."), bench.dtype, False),
        ("float32", torch.float32, False),
        ("float32 as TF32", torch.float32, True),
    ):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        rate = sdxl.matmul_rate(bench.device, dtype, side)
        torch.backends.cuda.matmul.allow_tf32 = False
        bench.known.setdefault("ceiling", rate)
        yield Figure(f"matmul ceiling, {name}, TFLOP/s", rate)


def equality(bench: Bench) -> Iterator[Figure]:
    """Latents of the engine in calls of mixed levels against diffusers', in float32."""
    shape = sdxl.TINY if bench.smoke else sdxl.TRUE
    levels = sdxl.LEVELS if bench.smoke else (0, 50, 90)
    difference = sdxl.compare(shape, bench.device, bench.steps, levels)
    detail = f"of the largest value; levels {', '.join(map(str, levels))} in shared calls"
    name = "difference from diffusers' latents, float32"
    yield Figure(name, difference, "<=", sdxl.EQUAL, detail)


def flops_of(bench: Bench) -> tuple[float, float, float]:
    """As `sdxl.count_flops`; before the network is compiled, because that hides its operations."""
    if "flops" not in bench.known:
        bench.known["flops"] = sdxl.count_flops(bench.model, bench.size)
    return bench.known["flops"]


def make_engine(bench: Bench) -> Engine:
    return Engine(
        bench.model,
        num_inference_steps=bench.steps,
        guidance_scale=sdxl.GUIDANCE_SCALE,
        slots=bench.slots,
    )


def time_engine(bench: Bench, engine: Engine, kind: str) -> Iterator[Figure]:
    """Images per second of a plan of mixed levels, and how they relate to what is possible."""
    size, requests = bench.size, sdxl.make_requests(bench.sources, bench.steps, bench.model.size)
    flops = flops_of(bench)
    rate = engine.rows_per_second(size, size, calls=5)
    bench.known[f"rows, {kind}"] = rate
    yield Figure(f"{kind}: UNet rows/s, bare calls", rate, detail=f"{engine.rows} rows a call")
    if kind == "plain":
        detail = f"encode {flops[1]:.3g}, decode {flops[2]:.3g}"
        yield Figure("one row of the UNet, TFLOP", flops[0], detail=detail)
    limit = "ceiling" in bench.known and bench.known["ceiling"]
    if limit:
        name = f"{kind}: share of the matmul ceiling, bare calls"
        yield Figure(name, rate * flops[0] / limit)
    calls = engine.work.unet_calls
    sdxl.wait(bench.device)
    started, first = time.perf_counter(), None
    for _ in engine.generate(requests, lambda source: sdxl.pixels_of(source, size)):
        first = first or time.perf_counter() - started
    sdxl.wait(bench.device)
    seconds, calls = time.perf_counter() - started, engine.work.unet_calls - calls
    bench.known[f"engine, {kind}"] = len(requests) / seconds
    told = f"{len(requests)} images, {calls} calls, {seconds:.2f} s, slot fill "
    told += f"{engine.work.slot_fill:.3f}, out of memory {engine.work.out_of_memory}"
    yield Figure(f"{kind}: images/s", len(requests) / seconds, detail=told)
    if limit:
        share = sdxl.count_work(flops, requests, bench.steps) / seconds / limit
        yield Figure(f"{kind}: share of the matmul ceiling", share, ">=", 0.45, "aim .6")
    idle = 1 - calls * engine.rows / rate / seconds
    yield Figure(f"{kind}: idle share of the network", idle, detail="VAE and texts included")


def engine(bench: Bench) -> Iterator[Figure]:
    """The engine in bfloat16, not compiled."""
    yield from time_engine(bench, make_engine(bench), "plain")
    if bench.device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
        yield Figure("peak memory of the engine, GiB", peak, detail=f"{bench.slots} slots")


def time_pipelines(bench: Bench, kind: str) -> Iterator[Figure]:
    """diffusers' pipelines on the same requests, in batches per level and one by one."""
    model, size = bench.model, bench.model.size
    requests = sdxl.make_requests(bench.sources, bench.steps, size)
    theirs = sdxl.Pipelines(model, bench.steps, size)
    short = [each for each in requests if each.level == sdxl.LEVELS[-1]]
    single = requests[: len(sdxl.LEVELS)]
    for name, asked, most in (
        ("per-level batches", requests, bench.slots),
        ("one by one", single, 1),
    ):
        batch = warm_up(theirs, short, most)
        sdxl.wait(bench.device)
        started = time.perf_counter()
        theirs(asked, batch)
        sdxl.wait(bench.device)
        rate = len(asked) / (time.perf_counter() - started)
        told = f"{len(asked)} images, {batch} a call"
        yield Figure(f"{kind}: images/s of diffusers, {name}", rate, detail=told)
        ours = bench.known.get(f"engine, {kind}")
        if ours:
            goal = (">=", 0.98) if most > 1 else ("", None)
            yield Figure(f"{kind}: engine ÷ diffusers, {name}", ours / rate, *goal)


def warm_up(theirs: sdxl.Pipelines, requests: list[Any], most: int) -> int:
    """Calls the pipelines once at their shape; returns how many images fit into a call."""
    fits = [most]

    def call(batch: int) -> None:
        theirs(requests[:batch], batch)

    call_halving(call, most, fits.append, where="pipelines")
    return fits[-1]


def pipelines(bench: Bench) -> Iterator[Figure]:
    """diffusers in bfloat16, not compiled."""
    yield from time_pipelines(bench, "plain")


def batch_finder(bench: Bench) -> Iterator[Figure]:
    """The slots that `Engine.fit_slots` finds, and the speed with them."""
    found = make_engine(bench)
    started = time.perf_counter()
    slots = found.fit_slots(bench.size, bench.size)
    told = f"{time.perf_counter() - started:.1f} s"
    yield Figure("slots that fit, by trying", slots, detail=told)
    found.set_slots(min(slots, bench.slots) if bench.smoke else slots)
    rate = found.rows_per_second(bench.size, bench.size, calls=3)
    yield Figure("UNet rows/s with these slots", rate, detail=f"{found.rows} rows a call")


def autoencoder(bench: Bench) -> Iterator[Figure]:
    """Decoded images per second by the size of a batch, and the memory that a batch takes."""
    yield from time_decoder(bench, "plain", (1, 2) if bench.smoke else (1, 2, 4, 8, 16))


def time_decoder(bench: Bench, kind: str, batches: Sequence[int]) -> Iterator[Figure]:
    shape = bench.model.latent_shape(bench.size, bench.size)
    for batch in batches:
        latents = torch.zeros(batch, *shape, device=bench.device)
        bench.begin()
        with torch.inference_mode():
            bench.model.decode(latents)
            sdxl.wait(bench.device)
            started, rounds = time.perf_counter(), max(16 // batch, 2)
            for _ in range(rounds):
                bench.model.decode(latents)
        rate = rounds * batch / (time.perf_counter() - started)
        peak = bench.end().get("peak_allocated_gib", 0)
        name = f"{kind}: images/s decoded, {batch} a call"
        yield Figure(name, rate, detail=f"peak {peak} GiB")


KERNELS = (
    ("attention", ("flash", "fmha", "attention", "sdpa")),
    ("convolution", ("conv", "fprop", "implicit")),
    ("matrix products", ("gemm", "cutlass", "nvjet", "cublas")),
    ("normalisation", ("norm", "moments")),
    ("layout", ("nchw", "nhwc", "transpose", "copy")),
)
"""Kinds of kernels, and parts of their names; a kernel is of the first kind that fits."""


def kernels(bench: Bench) -> Iterator[Figure]:
    """Which kernels a call of the network spends its time in."""
    call = make_engine(bench)._make_call(bench.size, bench.size)
    call()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if bench.device == "cuda":
        activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
    taken: dict[str, float] = {}
    for event in profile.key_averages():
        on_device = bench.device == "cuda"
        spent = event.self_device_time_total if on_device else event.self_cpu_time_total
        taken[event.key] = taken.get(event.key, 0) + spent
    kinds: dict[str, dict[str, float]] = {}
    for name, spent in taken.items():
        matching = (kind for kind, parts in KERNELS if any(part in name.lower() for part in parts))
        kinds.setdefault(next(matching, "others"), {})[name] = spent
    total = sum(taken.values())
    for kind, found in sorted(kinds.items(), key=lambda item: -sum(item[1].values())):
        largest = sorted(found, key=lambda name: -found[name])[:3]
        told = "; ".join(f"{name[:70]} {found[name] / total:.3f}" for name in largest)
        yield Figure(f"time of a UNet call: {kind}", sum(found.values()) / total, detail=told)


def layouts(bench: Bench) -> Iterator[Figure]:
    """The network, not compiled, with its weights in `channels_last` and in torch's default."""
    unet, engine, rates = bench.model.unet, make_engine(bench), []
    for layout in (torch.contiguous_format, torch.channels_last):
        unet.to(memory_format=layout)
        rates.append(engine.rows_per_second(bench.size, bench.size, calls=3))
    yield Figure("UNet rows/s, default layout ÷ channels_last", rates[0] / rates[1])


def scorer(bench: Bench) -> Iterator[Figure]:
    """`ClipScorer` with the shape of CLIP ViT-B/32: seconds for what the engine made."""
    from discl.spectrum.clip_filter import ClipScorer

    size, count = bench.size, 4 if bench.smoke else 64
    pictures = [Image.fromarray(sdxl.pixels_of(f"{row}", size)) for row in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        address = CLIP if bench.smoke else make_clip(Path(folder) / "clip")
        score = ClipScorer(str(address), {0: "a photo of a bag"}, bench.device)
        score(pictures[: score.batch], [0] * score.batch if count >= score.batch else [0] * count)
        sdxl.wait(bench.device)
        started = time.perf_counter()
        cosines = score(pictures, [0] * count)
        rate = count / (time.perf_counter() - started)
    assert np.isfinite(cosines).all()
    yield Figure("CLIP ViT-B/32: images/s scored", rate, detail="preprocessing on a CPU included")
    ours = max(bench.known.get(f"engine, {kind}", 0) for kind in ("plain", "compiled"))
    if ours:
        yield Figure("CLIP scoring ÷ generation", ours / rate, "<=", 0.02)


def make_clip(folder: Path) -> Path:
    """A CLIP ViT-B/32 with random weights, and the tokenizer of the embedded one."""
    from transformers import CLIPConfig, CLIPModel

    from discl.spectrum.clip_filter import find_clip

    CLIPModel(CLIPConfig()).save_pretrained(folder)
    for file in find_clip(CLIP).iterdir():
        if file.suffix != ".safetensors" and file.name != "config.json":
            shutil.copyfile(file, folder / file.name)
    processor = json.loads((folder / PROCESSOR).read_text())
    side = CLIPConfig().vision_config.image_size
    processor |= {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    (folder / PROCESSOR).write_text(json.dumps(processor))
    return folder


def compiled(bench: Bench) -> Iterator[Figure]:
    """The engine with compiled networks (`runtime.compile`)."""
    if "ceiling" not in bench.known:
        next(ceiling(bench))
    flops_of(bench)
    engine = make_engine(bench)
    started = time.perf_counter()
    if not bench.smoke:  # the compiler is tested elsewhere; here it would take most of the time
        engine.compile(bench.size, bench.size)
    yield Figure("compiled: seconds to compile", time.perf_counter() - started)
    yield from time_engine(bench, engine, "compiled")
    yield from time_decoder(bench, "compiled", [engine.vae_batch_for(bench.size, bench.size)])


def compiled_pipelines(bench: Bench) -> Iterator[Figure]:
    """diffusers with the same compiled networks; their shapes are compiled first."""
    if not bench.smoke:
        make_engine(bench).compile(bench.size, bench.size)
    yield from time_pipelines(bench, "compiled")


# --------------------------------------------------------------------- two processes on one device


def two_processes(bench: Bench) -> Iterator[Figure]:
    """Images per second of two engines on one device, and of one of them alone."""
    context = multiprocessing.get_context("fork" if bench.smoke else "spawn")
    barrier, answers = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=generate_twice, args=(number, bench.smoke, barrier, answers))
        for number in range(2)
    ]
    try:
        for process in processes:
            process.start()
        told = [answers.get(timeout=2 * TIMEOUT) for _ in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()
    wrong = [each["error"] for each in told if "error" in each]
    if wrong:
        raise RuntimeError(wrong[0])
    alone = next(each["alone"] for each in told if each["alone"])
    begun, ended = (pick(each[key] for each in told) for pick, key in ((min, "from"), (max, "to")))
    both = sum(each["images"] for each in told) / (ended - begun)
    yield Figure("one process: images/s", alone, detail="half the slots")
    yield Figure("two processes on one device: images/s", both)
    yield Figure("two processes ÷ one", both / alone)


def generate_twice(number: int, smoke: bool, barrier: Any, answers: Any) -> None:
    """In a process: the first one generates alone, then both do."""
    try:
        bench = Bench(smoke)
        bench.slots = max(bench.slots // 2, 1)
        engine, size = make_engine(bench), bench.size
        requests = sdxl.make_requests(max(bench.sources // 4, 1), bench.steps, size)
        engine.rows_per_second(size, size, calls=1)

        def generate() -> tuple[float, float]:
            started = time.time()
            for _ in engine.generate(requests, lambda source: sdxl.pixels_of(source, size)):
                pass
            sdxl.wait(bench.device)
            return started, time.time()

        alone = None
        barrier.wait(TIMEOUT)
        if number == 0:
            begun, ended = generate()
            alone = len(requests) / (ended - begun)
        barrier.wait(TIMEOUT)
        begun, ended = generate()
        told = {"alone": alone, "images": len(requests), "from": begun, "to": ended}
        answers.put(told)
    except Exception as error:
        barrier.abort()
        answers.put({"error": f"process {number}: {type(error).__name__}: {error}"[:800]})
