"""`discl adapt`: teaches the generator the domain of the real images."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from ..data import to_size
from ..errors import CheckpointError, DataError, RecipeError, arguments_named, shorten
from ..prompts import class_prompts, fill_caption
from ..prompts.templates import spoken_names
from ..recipe import Adapt
from ..run_folder import paths
from ..run_folder.run import Run
from ..spectrum.adaptation import AdapterImages, check_images, train_adapter
from ..spectrum.adaptation_memory import estimate_memory
from ..spectrum.engine import Engine
from ..spectrum.low_rank import AdapterSettings, adapter_files, write_adapter
from ..spectrum.models import describe_loras, load_generator
from ..spectrum.models.class_tokens import FAMILIES
from ..spectrum.models.interface import LatentModel
from ..spectrum.plan import Request, plan_requests
from ..utils.atomic import make_folder
from ..utils.console import progress
from ..utils.counts import count_have, count_of
from ..utils.hashing import digest
from ..utils.logging import get_logger
from .pending import filter_texts
from .prepare_data import split_rows_of
from .prompts import add_captions, ensure_texts

logger = get_logger(__name__)

KEYS = {
    "class_tokens": "spectrum.adapt.class_tokens",
    "names": "prompts.names",
    "token_learning_rate": "spectrum.adapt.token_learning_rate",
    "batch_size": "spectrum.adapt.batch_size",
    "learning_rate": "spectrum.adapt.learning_rate",
}


def adapt(run: Run) -> Path:
    """Trains the recipe's weights or tokens, unless they exist; names them in `adapter.json`.

    They are trained on the real training images and their prompts, captions included, never on
    validation or test images. Their file is keyed by the generator, the images, the texts and the
    settings. Returns the path of `adapter.json`; the run folder if the recipe adapts nothing.

    Raises CheckpointError as `check_adaptable`, DataError for a single image and for a class name
    or prompt without tokens of its class, TrainingError if memory runs out or the loss is not
    finite.
    """
    settings = run.recipe.spectrum.adapt
    if settings is None:
        return run.folder
    check_adaptable(run)
    return name_adapter(run, ensure_adapter(run, settings, np.arange(len(run.train))))


def check_adaptable(run: Run) -> None:
    """Checks, before any long work, that a recipe with `spectrum.adapt` can be carried out.

    Raises CheckpointError for a generator that only diffusers' own pipeline can run, and for class
    tokens of a family whose texts are not encoded by CLIP alone.
    """
    settings = run.recipe.spectrum.adapt
    if settings is None:
        return
    if run.generator.plain:
        raise CheckpointError(
            f"the generator is a {run.generator.family}, whose denoising steps the engine does not "
            "know; use Stable Diffusion 1.x, 2.x, SDXL, SD 3.x or FLUX.1, or remove the section.",
            argument="spectrum.adapt",
        )
    if settings.class_tokens and not run.generator.takes_class_tokens:
        raise CheckpointError(
            f"the generator is a {run.generator.family}, and class tokens are for {FAMILIES}; set "
            "0, which trains low-rank weights alone.",
            argument="spectrum.adapt.class_tokens",
        )


def name_adapter(run: Run, file: Path) -> Path:
    """Writes `adapter.json`, which says that `run` uses what `ensure_adapter` returned."""
    pointer = run.path(paths.ADAPTER)
    write_adapter(adapter_files(file, _settings(run.recipe.spectrum.adapt or Adapt())), pointer)
    return pointer


def ensure_adapter(run: Run, settings: Adapt, rows: np.ndarray) -> Path:
    """What is learnt of some training images, trained if a file of it does not exist.

    - `rows`: int64, rows of `run.train`. The others are not seen.

    Returns the file of the low-rank weights, which `adapter_files` takes; with rank 0 there are
    only tokens.
    """
    texts, names = class_texts(run), _names(run, settings)
    train, contents = run.train, split_rows_of(run, "train", ["digest"])["digest"].to_pylist()
    chosen, labels = [contents[row] for row in rows.tolist()], train.labels[rows]
    image_texts = _image_texts(run, texts, rows, chosen)
    key = digest(
        run.generator.model,
        describe_loras(run.base_address.loras),
        run.recipe.spectrum.dtype,
        run.size,
        sorted(settings.model_dump().items()),
        chosen,
        image_texts,
        *([names] if names else []),
    )[:16]
    file, wanted = make_folder(run.path(paths.ADAPTED)) / f"{key}.safetensors", _settings(settings)
    if all(each.exists() for each in adapter_files(file, wanted).present()):
        return file
    with arguments_named(images="data"):
        check_images(len(chosen))
    if names:
        _warn_of_single(run, labels)
    logger.info(f"adapt: {describe_memory(run)}")
    model = load_generator(run.base_address, run.recipe.spectrum.dtype, run.device)
    size = run.size

    def load(place: int) -> np.ndarray:
        return to_size(run.checked_image(int(rows[place]), chosen[place]), size, size)

    images = AdapterImages(load, labels, image_texts)
    prior = _prior(run, model, settings, texts) if settings.prior_weight else None
    with (
        arguments_named(**KEYS),
        progress("adapt", settings.steps) as advance,
    ):
        return train_adapter(
            model,
            images,
            wanted,
            file,
            seed=settings.seed,
            prior=prior,
            names=names,
            progress=advance,
        )


def _names(run: Run, settings: Adapt) -> list[str]:
    """The name of each class in prompts, where class tokens stand for them; else none.

    Raises DataError for an empty name, before anything is loaded.
    """
    if not settings.class_tokens:
        return []
    spoken = spoken_names(run.train.class_names, run.recipe.prompts.names)
    for name, words in spoken.items():
        if not words.strip():
            raise DataError(
                f"class {shorten(name)} has the empty name {words!r} in prompts, so its tokens "
                "have nothing to begin at; give it a name.",
                argument="prompts.names",
            )
    return list(spoken.values())


def _warn_of_single(run: Run, labels: np.ndarray) -> None:
    counts = np.bincount(labels, minlength=len(run.train.class_names))
    if names := [run.train.class_names[label] for label in np.flatnonzero(counts == 1)]:
        classes = count_have(len(names), "class", "classes")
        logger.warning(
            f"adapt: {classes} one image, which class tokens may learn by heart: {shorten(names)}"
        )


def describe_memory(run: Run) -> str:
    """Roughly how much device memory the adaptation of a recipe takes, in words."""
    section = run.recipe.spectrum.adapt or Adapt()
    side = run.size // run.generator.multiple
    memory = estimate_memory(
        run.base_address,
        run.recipe.spectrum.dtype,
        _settings(section),
        side,
        len(run.train.class_names) if section.class_tokens else 0,
    )
    images = section.batch_size * (2 if section.prior_weight else 1)
    parts = f"{_gigabytes(memory.weights)} of weights"
    parts += f", {_gigabytes(memory.state)} of {memory.values:,} trained values and their state"
    if memory.activations is None:
        return f"{parts} in device memory, and the activations of {count_of(images, 'image')}"
    total, each = _gigabytes(memory.total(images)), _gigabytes(memory.activations)
    text = f"about {total} of device memory: {parts}, {images} × {each} of activations"
    if run.device.type != "cuda":
        return text
    present = torch.cuda.get_device_properties(run.device).total_memory
    if present >= memory.total(images):
        return text
    return (
        f"{text}. The device has {_gigabytes(present)}, so a batch will be computed in parts; "
        "spectrum.adapt.gradient_checkpointing: true and dtype bfloat16 need less"
    )


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.0f} MB"


def class_texts(run: Run) -> dict[int, list[str]]:
    """`{label: texts}` of all classes: those of the spectrum, or a plain prompt without any."""
    prompts, names = run.recipe.prompts, run.train.class_names
    texts = {label: [text] for label, text in filter_texts(run).items()}
    if prompts.endpoint is None and prompts.settings is None:
        with suppress(RecipeError):  # phrases of the hard classes alone
            found = class_prompts(names, prompts.templates, prompts.phrases, names=prompts.names)
            texts |= {
                label: [prompts.prefix + text for text in found[name]]
                for label, name in enumerate(names)
            }
    return texts | ensure_texts(run)


def _image_texts(
    run: Run, texts: dict[int, list[str]], rows: np.ndarray, contents: Sequence[str]
) -> list[list[str]]:
    """Texts of each training image: those of its class, with its own caption.

    - `texts`: of each label.
    - `contents`: digests of the images at `rows`.
    """
    images = [
        {"id": run.train.ids[row], "digest": content}
        for row, content in zip(rows.tolist(), contents, strict=True)
    ]
    captions = [image.get("caption", "") for image in add_captions(run, images)]
    labels = run.train.labels[rows].tolist()
    return [
        [fill_caption(text, caption) for text in texts[label]]
        for label, caption in zip(labels, captions, strict=True)
    ]


def _settings(section: Adapt) -> AdapterSettings:
    known = asdict(AdapterSettings())
    return AdapterSettings(
        **{name: value for name, value in section.model_dump().items() if name in known}
    )


def _prior(
    run: Run, model: LatentModel, settings: Adapt, texts: dict[int, list[str]]
) -> AdapterImages:
    """Text-only images of the unadapted generator, the classes in turn."""
    labels = [number % len(texts) for number in range(settings.prior_images)]
    sources = [
        {
            "id": f"prior-{number}",
            "digest": "",
            "label": label,
            "width": run.size,
            "height": run.size,
        }
        for number, label in enumerate(labels)
    ]
    requests: Sequence[Request] = plan_requests(
        sources,
        [0],
        1,
        texts,
        negative_prompt=run.recipe.prompts.negative,
        sampling=run.base_sampling,
    )
    engine = Engine(
        model,
        num_inference_steps=run.base_sampling.num_inference_steps,
        guidance_scale=run.base_sampling.guidance_scale,
        slots=settings.batch_size,
    )
    pictures = {}
    with progress("images of the generator", len(requests)) as advance:
        for request, picture in engine.generate(
            requests, lambda source: np.zeros((run.size, run.size, 3), np.uint8)
        ):
            pictures[request.id] = picture
            advance(1)
    return AdapterImages(
        lambda row: np.asarray(pictures[requests[row].id]),
        np.asarray(labels),
        [[request.prompt] for request in requests],
    )
