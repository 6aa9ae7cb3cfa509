"""`discl init`: a commented recipe for a folder or a list of images."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Mapping
from pathlib import Path

import torch
import yaml

from ..data import ImageTable, read_tables
from ..data.readers import FILE_NAME, guess_columns, list_inside, too_few_classes
from ..data.readers import LIST_SUFFIXES as LISTS
from ..errors import DataError, unknown
from ..escaping import one_line
from ..recipe import load_recipe
from ..recipe.data import OwnSplit
from ..recipe.types import as_name
from ..utils.atomic import make_folder, whole
from ..utils.logging import get_logger

logger = get_logger(__name__)

EPOCHS = 65
UPDATES = 2000
"""What the network from scratch is given at least, however few the images are."""
COLUMNS = ("image", "label", "id", "split", "domain", "group")

TEMPLATE = """\
# Recipe for {folder!r}: {images} training images in {classes} classes ({smallest} to {largest} a class).
# discl plan {file}     what the spectrum would cost
# discl run {file}      the whole chain; the same command again does only what is missing
name: {name}

data:
  root: {root}
{list}  # Own data without splits is divided by class; images of one group (camera, burst) stay together.
  own_split: {{validation: 0.1, test: 0.2, seed: 0}}
  unreadable: error            # or skip

groups: {{many: {many}, few: {few}}}   # the report's groups: more than / fewer than so many training images

hard: {{rule: tail, fewer_than: {few}}}   # which images get a spectrum; or {{rule: probability, below: 0.5}}

prompts:
  templates:                   # one is drawn per hard image and seed; write scenes that your images may show
{scenes}  # phrases: phrases.yaml      # {{class: [ten scenes, ...]}}, at least of the hard classes; scenes that fit each class
  # endpoint: {{url: "http://localhost:11434/v1", model: llama3.1}}   # or a language model writes them: discl prompts {file}
  names: {{}}                    # {{Ursus_arctos: brown bear}} where folder names are no plain words

spectrum:
  # A Stable Diffusion 1.x/2.x, SDXL, SD 3.x or FLUX.1 checkpoint: a folder in diffusers' format, or its name on the hub.
  checkpoint: stable-diffusion-v1-5/stable-diffusion-v1-5
  # checkpoint: stabilityai/stable-diffusion-xl-refiner-1.0  # SDXL, the paper's: finer pictures of 1,024 pixels, several times the cost
  # checkpoint: stabilityai/stable-diffusion-3.5-medium      # with guidance_scale: 4.5 and dtype: bfloat16; the hub asks you to log in
  # checkpoint: black-forest-labs/FLUX.1-dev                 # with guidance_scale: 3.5 and dtype: bfloat16; needs a large GPU and a log-in
  levels: [0, 10, 30, 50]      # whole per cents of image guidance: 0 is text only, 100 the real image
  seeds: 8                     # synthetic images per hard image and level
  tries: 1                     # draw each up to so many times, until the filter keeps one
  num_inference_steps: 50
  guidance_scale: 10
  dtype: {dtype}
  encoding: jpeg

filter:
  checkpoint: laion/CLIP-ViT-B-32-laion2B-s34B-b79K  # has safetensors, which openai/clip-vit-base-patch32 lacks
  template: "a photo of {{class}}"
  threshold: 0.25              # raw cosine; look at the report's histogram, then try another: --amend makes no image again

train:
  epochs: {epochs}
  curriculum_epochs: 60        # from then on real images only
  batch_size: {batch}
  {steps}
  image_size: 224
  resize: 256
  augment: [random-resized-crop, flip]
  model: {{architecture: resnet10, stem: 7x7}}   # from scratch, as in the paper's tables of long tails
  optimizer: {{name: adam, lr: 0.001}}
  # A pretrained network gets far more out of few images, in fewer epochs. One of these in place of the model above, with this optimizer:
  # model: {{architecture: timm, checkpoint: timm/resnet50.a1_in1k}}   # pip install 'discl[timm]'
  # model: {{architecture: transformers, checkpoint: google/vit-base-patch16-224}}
  # optimizer: {{name: adamw, lr: 0.0001, weight_decay: 0.05, warm_up_epochs: 2}}
  # Or a CLIP, whose head begins as its texts of the classes; methods may then take objective: flyp, below.
  # model: {{architecture: clip, checkpoint: laion/CLIP-ViT-B-32-laion2B-s34B-b79K, templates: ["a photo of a {{class}}."]}}
  # optimizer: {{name: adamw, lr: 0.00001, weight_decay: 0.2, warm_up_epochs: 2}}
  # crop_scale: [0.9, 1.0]     # FLYP's

methods:                       # each is a row of the table; the first is the baseline of the report
  ce: {{strategy: real-only}}
  discl: {{strategy: diverse-to-specific}}
  # balanced: {{strategy: real-only, objective: balanced-softmax}}
  # all-levels: {{strategy: all-levels}}
  # zero-shot: {{fine_tune: zero-shot}}                        # only with a CLIP, as the next two
  # flyp: {{strategy: real-only, objective: flyp}}             # contrastive
  # flyp-discl: {{strategy: adaptive, objective: flyp}}        # the paper's on iWildCam
"""


def write_starter(
    folder: Path,
    out: Path | None = None,
    columns: Mapping[str, str] | None = None,
    images: Path | None = None,
) -> Path:
    """Writes a commented recipe for the images in `folder`, or in a list of them, and returns its path (default `ITS NAME.yaml`).

    `columns` says what a list calls ours, where its names are not usual ones; `images` is the folder that its paths are relative to.
    Raises DataError if there is no data set or only one class, if columns or the first image are missing, or if the file is there already.
    """
    for ours in columns or {}:
        if ours not in COLUMNS:
            raise DataError(unknown("column", ours, COLUMNS))
    is_list = folder.is_file() and folder.suffix.lower() in LISTS
    found = guess_columns(folder, columns or {}) if is_list else dict(columns or {})
    if folder.is_dir() and (described := list_inside(str(folder), found)) is not None:
        found = guess_columns(described, {"image": FILE_NAME, **found})
        if found["image"] == FILE_NAME:
            del found["image"]
    beside = None if images is None else str(images)
    tables = read_tables(str(folder), columns=found, images=beside, on_left_out=logger.warning)
    table: ImageTable = tables["train"]
    if told := too_few_classes(str(folder), table.class_names):
        raise DataError(told)
    first = table.rows[0]["image"]["path"] if is_list and table.root is not None else None
    if first is not None and not Path(first).exists():
        raise DataError(
            f"{folder} names {Path(first).absolute()}, which is not there; name the folder of the images with --images."
        )
    whole_path = folder.resolve()
    name = as_name(whole_path.stem if folder.is_file() else whole_path.name)
    path = out if out is not None else Path(f"{name}.yaml")
    if path.exists():
        raise DataError(f"{path} exists already; name another file with --out.")
    counts = table.class_counts
    empty = int((counts == 0).sum())
    counts = counts[counts > 0]
    own, batch = OwnSplit(), min(128, max(len(table) // 2, 1))
    left = 1 - own.validation * ("validation" not in tables) - own.test * ("test" not in tables)
    few = max(20, int(counts.min()) + 1)  # at least the smallest class is a tail class
    make_folder(path.parent)
    text = TEMPLATE.format(
        folder=one_line(folder.name), images=len(table), classes=len(counts), smallest=counts.min(), largest=counts.max(),
        file=one_line(shlex.quote(str(path))), name=name, root=_quoted(str(whole_path)), many=max(100, few), few=few,
        list=_of_list(found, images, is_list) + _of_empty(empty), dtype=_dtype(), epochs=EPOCHS, batch=batch,
        scenes="".join(f'    - "{context}"\n' for context in _scenes()), steps=_steps(max(math.ceil(left * len(table) / batch), 1)),
    )  # fmt: skip
    with whole(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    return path


def _of_list(columns: Mapping[str, str], images: Path | None, is_list: bool) -> str:
    """The lines of section `data` that only a list has."""
    stated = yaml.safe_dump(
        dict(columns), default_flow_style=True, allow_unicode=True, width=1000
    ).strip()
    lines = [f"  columns: {stated}   # our column: the name that it has here"] if columns else []
    if images is not None:
        lines.append(
            f"  images: {_quoted(str(images.resolve()))}   # the folder that the list's paths are relative to"
        )
    elif is_list:
        lines.append(
            "  # images: DIR              # the folder that a list's paths are relative to, where it is not the list's own"
        )
    return "".join(f"{line}\n" for line in lines)


def _scenes() -> list[str]:
    """Templates of varied scenes, those of the recipes for ImageNet-LT."""
    return load_recipe("imagenet-lt-ce-discl").prompts.templates


def _of_empty(classes: int) -> str:
    """The line of section `data` where classes are listed that have no image."""
    told = (
        "listed classes have no training image"
        if classes > 1
        else "listed class has no training image"
    )
    return f"  drop_empty_classes: true     # {classes} {told}\n" if classes else ""


def _dtype() -> str:
    """The value of `spectrum.dtype` for the device that is there, and why."""
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        return "float16               # for the GPU of this machine; bfloat16 for SD 3.x and FLUX.1, float32 on a CPU"
    return "float32               # no GPU was found here; on one, float16 or bfloat16 takes half the memory and much less time"


def _steps(usual: int) -> str:
    """The line of `train.steps_per_epoch`, of which an epoch has `usual` ones where nothing is stated."""
    least = -(-UPDATES // EPOCHS)
    if usual >= least:
        return f"# steps_per_epoch: {usual}       # updates in an epoch; this is training images / batch_size, which it is by default"
    return (
        f"steps_per_epoch: {least}          # {least * EPOCHS:,} updates in all; training images / batch_size, {usual} an epoch, "
        "would be too few to learn from scratch"
    )


def _quoted(text: str) -> str:
    """A text in YAML, on one line."""
    return "'" + text.replace("'", "''") + "'" if text.isprintable() else json.dumps(text)
