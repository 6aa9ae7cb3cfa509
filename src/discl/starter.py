"""A commented recipe for somebody's own images."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from .data import ImageTable, read_tables
from .errors import DataError

TEMPLATE = """\
# Recipe for {folder!r}: {images} training images in {classes} classes ({smallest} to {largest} a class).
# discl plan {file}     what the spectrum would cost
# discl run {file}      the whole chain; the same command again does only what is missing
name: {name}

data:
  root: {root}
  # Own data without splits is divided by class; images of one group (camera, burst) stay together.
  own_split: {{validation: 0.1, test: 0.2, seed: 0}}
  unreadable: error            # or skip

groups: {{many: {many}, few: {few}}}   # the report's groups: more than / fewer than so many training images

hard: {{rule: tail, fewer_than: {few}}}   # which images get a spectrum; or {{rule: probability, below: 0.5}}

prompts:
  templates: ["a photo of a {{class}}"]
  # phrases: phrases.yaml      # {{class: [ten scenes, ...]}}; more varied images than one template
  # endpoint: {{url: "http://localhost:11434/v1", model: llama3.1}}   # or a language model writes them: discl prompts {file}
  names: {{}}                    # {{Ursus_arctos: brown bear}} where folder names are no plain words

spectrum:
  # A Stable Diffusion 1.x/2.x folder in diffusers' format, or its name on the hub.
  checkpoint: stable-diffusion-v1-5/stable-diffusion-v1-5
  levels: [0, 10, 30, 50]      # whole per cents of image guidance: 0 is text only, 100 the real image
  seeds: 8                     # synthetic images per hard image and level
  tries: 1                     # draw each up to so many times, until the filter keeps one
  num_inference_steps: 50
  guidance_scale: 10
  dtype: float16               # bfloat16 or float32 on a CPU
  encoding: jpeg

filter:
  checkpoint: laion/CLIP-ViT-B-32-laion2B-s34B-b79K  # has safetensors, which openai/clip-vit-base-patch32 lacks
  template: "a photo of {{class}}"
  threshold: 0.25              # raw cosine; look at the report's histogram, then try another: --amend makes no image again

train:
  epochs: 65
  curriculum_epochs: 60        # from then on real images only
  batch_size: {batch}
  image_size: 224
  resize: 256
  augment: [random-resized-crop, flip]
  model: {{architecture: resnet10, stem: 7x7}}
  optimizer: {{name: adam, lr: 0.001}}

methods:                       # each is a row of the table; the first is the baseline of the report
  ce: {{strategy: real-only}}
  discl: {{strategy: diverse-to-specific}}
  # balanced: {{strategy: real-only, objective: balanced-softmax}}
  # all-levels: {{strategy: all-levels}}
"""


def write_starter(folder: Path, out: Path | None = None) -> Path:
    """Writes a commented recipe for the images in `folder` and returns its path (default `FOLDER'S NAME.yaml`).

    Raises DataError if the folder holds no data set, or if the file is there already.
    """
    table: ImageTable = read_tables(str(folder))["train"]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", folder.resolve().name).strip("-._") or "my-data"
    path = out if out is not None else Path(f"{name}.yaml")
    if path.exists():
        raise DataError(f"{path} exists already; name another file with --out.")
    counts = table.class_counts
    few = max(20, int(counts.min()) + 1)  # at least the smallest class is a tail class
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        TEMPLATE.format(
            folder=folder.name, images=len(table), classes=len(table.class_names), smallest=counts.min(), largest=counts.max(),
            file=shlex.quote(str(path)), name=name, root=_quoted(str(folder.resolve())), many=max(100, few), few=few,
            batch=min(128, max(len(table) // 2, 1)),
        )
    )  # fmt: skip
    return path


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
