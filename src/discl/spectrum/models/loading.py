"""Loads generators: networks and pipelines, from safetensors only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ...checkpoint_checks import HARMLESS, check_complete, check_extent, check_loaded, loading
from ...errors import CheckpointError
from .class_tokens import check_takes_tokens, load_class_tokens
from .description import (
    Address,
    LocalGenerator,
    find_generator,
    load_scheduler,
    names_checkpoint,
)
from .families import UNUSED, Family, parts_of, read_config, read_index
from .interface import DTYPES, LatentModel
from .loras import add_loras

SINGLE_FILE_PARTS = {
    "model.diffusion_model.": ("unet", "transformer"),
    "first_stage_model.": ("vae",),
}
"""Prefixes of the tensors' names in a single file, and the parts that they belong to."""


@names_checkpoint
def load_generator(
    address: Address | str, dtype: str = "float32", device: torch.device | str = "cpu"
) -> LatentModel:
    """The model of a checkpoint, with its LoRAs merged into the weights, and its class tokens.

    - `address`: a folder in diffusers' layout, a hub name, `embedded:...`, or a single safetensors
      file.
    - `dtype`: `float32`, `bfloat16` or `float16`. With `float16` the VAE runs in float32, because
      it overflows otherwise.
    - `device`: where the networks run.

    Raises CheckpointError for a folder that lacks a component or weights, holds pickled weights, or
    is of a family that the engine does not know.

    ```python
    import discl

    model = discl.load_generator("embedded:fashion-mnist/diffusion")
    engine = discl.Engine(model, num_inference_steps=10, guidance_scale=3.0)
    ```
    """
    found = find_generator(address)
    if found.family.build is None:
        raise CheckpointError(
            f"checkpoint '{found.folder}' is a {found.family.name}, which the engine does not "
            "know; use load_plain."
        )
    with loading(found.file or found.folder, "a generator"):
        pipeline = load_pipeline(found, dtype)
        if isinstance(address, Address):
            add_loras(pipeline, address.loras)
        model = found.family.build(pipeline, device)
        if isinstance(address, Address) and address.class_tokens is not None:
            load_class_tokens(model, address.class_tokens)
        return model


@names_checkpoint
def load_plain(
    address: Address | str, dtype: str = "float32", device: torch.device | str = "cpu"
) -> tuple[Any, Any | None]:
    """diffusers' image-to-image and text-to-image pipelines of a checkpoint, sharing their parts.

    Arguments are those of `load_generator`. The second one is None where diffusers has none.
    """
    import diffusers

    found = find_generator(address)
    kind = getattr(diffusers, found.family.pipeline)
    diffusers.utils.logging.disable_progress_bar()
    takes = kind._get_signature_types()
    unused = {name: None for name in UNUSED if name in takes and name in kind._optional_components}
    settings: dict[str, Any] = {"local_files_only": True, **unused}
    with loading(found.file or found.folder, "a generator"):
        if found.file is not None:
            image = kind.from_single_file(
                str(found.file), config=str(found.folder), torch_dtype=DTYPES[dtype], **settings
            )
            _check_single_file(image, found.file)
        else:
            image = kind.from_pretrained(
                found.folder,
                dtype=DTYPES[dtype],
                use_safetensors=True,
                trust_remote_code=False,
                **settings,
                **load_parts(found.folder, found.family, {"default": DTYPES[dtype]}),
            )
        if isinstance(address, Address):
            add_loras(image, address.loras)
            if address.class_tokens is not None:
                check_takes_tokens(image)
        image.to(device)
        text = None
        if found.family.text is not None:
            text = getattr(diffusers, found.family.text).from_pipe(image)
    for pipeline in (image, text):
        if pipeline is not None:
            pipeline.set_progress_bar_config(disable=True)
    return image, text


def load_pipeline(found: LocalGenerator, dtype: str) -> Any:
    """diffusers' pipeline of a family that the engine knows, without unused parts."""
    import diffusers

    family, folder = found.family, found.folder
    vae_dtype = torch.float32 if dtype == "float16" else DTYPES[dtype]
    kind = getattr(diffusers, family.pipeline)
    takes = [
        name
        for name in kind._get_signature_types()
        if name in UNUSED or name.startswith(("tokenizer", "text_encoder"))
    ]
    absent: dict[str, Any] = {name: None for name in takes if name not in parts_of(folder, family)}
    common = {**absent, "scheduler": load_scheduler(folder, family), "local_files_only": True}
    diffusers.utils.logging.disable_progress_bar()
    if found.file is not None:
        pipeline = kind.from_single_file(
            str(found.file), config=str(folder), torch_dtype=DTYPES[dtype], **common
        )
        _check_single_file(pipeline, found.file)
        pipeline.vae.to(vae_dtype)
        return pipeline
    dtypes = {"default": DTYPES[dtype], "vae": vae_dtype}
    return kind.from_pretrained(
        folder,
        **common,
        **load_parts(folder, family, dtypes),
        dtype=dtypes,
        use_safetensors=True,
        trust_remote_code=False,
    )


def load_parts(folder: Path, family: Family, dtypes: Mapping[str, torch.dtype]) -> dict[str, Any]:
    """The networks of a folder by name, each in its dtype or in `default`.

    Raises CheckpointError for a network with missing weights, which diffusers would draw at random.
    """
    import diffusers
    import transformers

    index = read_index(folder)
    libraries = {"diffusers": diffusers, "transformers": transformers}
    loaded = {}
    for name in parts_of(folder, family):
        files = [file.name for file in (folder / name).glob("*.safetensors")]
        library, kind = index.get(name) or ("", "")
        network: Any = getattr(libraries.get(library), kind, None)
        if not files or not hasattr(network, "modules"):
            continue  # a tokenizer, which may share a folder with a text encoder's weights
        config = read_config(folder, name)
        check_extent(folder / name, config, partial(_without_weights, network, config))
        options: dict[str, Any] = {}
        if library == "transformers":
            options["trust_remote_code"] = False
        loaded[name], info = network.from_pretrained(
            folder / name,
            dtype=dtypes.get(name, dtypes["default"]),
            variant="fp16" if all(".fp16" in file for file in files) else None,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **options,
        )
        check_loaded(folder / name, info)
    return loaded


def denoiser_without_weights(found: LocalGenerator) -> torch.nn.Module:
    """The denoising network of a checkpoint with random values, or none on the meta device."""
    import diffusers

    name = found.family.network
    kind = getattr(diffusers, read_index(found.folder)[name][1])
    network: torch.nn.Module = _without_weights(kind, read_config(found.folder, name))
    return network


def text_encoders_without_weights(found: LocalGenerator) -> list[Any]:
    """The text encoders of a checkpoint, as `denoiser_without_weights` gives its network."""
    import transformers

    index = read_index(found.folder)
    return [
        _without_weights(getattr(transformers, index[part][1]), read_config(found.folder, part))
        for part in parts_of(found.folder, found.family)
        if part.startswith("text_encoder")
    ]


def count_weights(found: LocalGenerator) -> dict[str, int]:
    """`{part: values}` of the networks of a checkpoint; a single file is one part, `""`."""
    if found.file is not None:
        return {"": _count_values(found.file)}
    counts = {}
    for name in parts_of(found.folder, found.family):
        files = sorted((found.folder / name).glob("*.safetensors"))
        whole = [file for file in files if ".fp16" not in file.name] or files
        counts[name] = sum(map(_count_values, whole))
    return counts


def _count_values(file: Path) -> int:
    with safe_open(file, "pt") as stored:
        names = stored.keys()
        return sum(math.prod(stored.get_slice(name).get_shape()) for name in names)


def _without_weights(network: Any, config: Mapping[str, Any]) -> Any:
    """The network of a configuration of transformers or diffusers, with random weights."""
    settings = dict(config)
    if hasattr(network, "config_class") and network.config_class is not None:
        return network(network.config_class.from_dict(settings))
    return network.from_config(settings)


def _check_single_file(pipeline: Any, file: Path) -> None:
    """Raises CheckpointError where a single file has too few or too many weights for its pipeline.

    diffusers leaves missing weights without a value. Names differ from diffusers', but no value is
    dropped on loading, so surplus values belong to another network.
    """
    parts = {
        name: part
        for name, part in pipeline.components.items()
        if isinstance(part, torch.nn.Module)
    }
    check_complete(
        file,
        [
            f"{part}.{name}"
            for part, network in parts.items()
            for name, tensor in network.named_parameters()
            if tensor.is_meta
        ],
    )
    stored = _stored_values(file)
    for prefix, names in SINGLE_FILE_PARTS.items():
        network = next((parts[name] for name in names if name in parts), None)
        if network is None or prefix not in stored:
            continue
        loaded = sum(tensor.numel() for tensor in network.state_dict().values())
        if stored[prefix] > loaded:
            raise CheckpointError(
                f"'{file}' holds {stored[prefix]:,} values under {prefix}*, "
                f"{stored[prefix] - loaded:,} more than the {type(network).__name__} of its "
                "configuration takes. Name the configuration that belongs to it.",
                argument="config",
            )


def _stored_values(file: Path) -> dict[str, int]:
    """`{prefix: values under it}` of a single file, for the prefixes that it has."""
    values: dict[str, int] = {}
    with safe_open(file, "pt") as stored:
        for name in stored.keys():  # noqa: SIM118 (not a dict)
            for prefix in SINGLE_FILE_PARTS:
                if name.startswith(prefix) and not HARMLESS.search(name):
                    size = math.prod(stored.get_slice(name).get_shape())
                    values[prefix] = values.get(prefix, 0) + size
    return values
