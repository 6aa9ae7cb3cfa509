"""`discl prompts`: descriptions, settings and captions by models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pyarrow as pa

from ..baselines.alia import condense_request, pick_captions
from ..errors import RunError, arguments_named
from ..prompts import class_prompts
from ..prompts.captions import Captioner, describe_captioner, find_captioner
from ..prompts.chat_client import ChatClient, ensure_openai
from ..prompts.class_descriptions import TextRules, missing_classes, write_missing
from ..prompts.endpoint import read_key
from ..prompts.settings import read_settings, write_settings
from ..prompts.templates import spoken_names, with_settings
from ..recipe import Captions, Server, Settings
from ..recipe import Endpoint as EndpointSection
from ..run_folder import paths
from ..run_folder.run import Run
from ..spectrum.store import Shards
from ..utils.console import progress
from ..utils.counts import count_of
from ..utils.hashing import derive_seed, digest
from ..utils.logging import get_logger
from ..utils.stored import read_table
from .prepare_data import split_rows_of

logger = get_logger(__name__)

CAPTIONED_AT_ONCE = 256


def check_prompts(run: Run) -> None:
    """Checks the language model's package and key, and the captioner, before any long work.

    Raises EndpointError for a missing package or key, CheckpointError for a folder that holds no
    captioner.
    """
    prompts = run.recipe.prompts
    if prompts.endpoint is not None and not run.path(paths.PROMPTS).exists():
        _check_server(prompts.endpoint, "prompts.endpoint")
    if prompts.captions is not None:
        key = "prompts.captions.checkpoint"
        with arguments_named(key, address=key):
            find_captioner(prompts.captions.checkpoint)
    if prompts.settings is not None and not run.path(paths.SETTINGS).exists():
        _check_server(prompts.settings.endpoint, "prompts.settings.endpoint")
        key = "prompts.settings.captioner.checkpoint"
        with arguments_named(key, address=key):
            find_captioner(prompts.settings.captioner.checkpoint)


def _check_server(server: Server, section: str) -> None:
    with arguments_named(key_variable=f"{section}.key_variable"):
        ensure_openai()
        read_key(server.key_variable)


def write_prompts(run: Run) -> Path:
    """Writes missing texts, settings or captions by models, as the recipe says.

    Returns `prompts.yaml`, `settings.yaml` or the folder of captions; the run folder if the recipe
    names no such model.
    """
    prompts = run.recipe.prompts
    if prompts.endpoint is not None:
        return _describe_classes(run, prompts.endpoint)
    if prompts.settings is not None:
        return _condense_captions(run, prompts.settings)
    if prompts.captions is not None:
        hard = read_table(run.path(paths.HARD), ["id", "digest"]).to_pylist()
        return _caption_images(run, prompts.captions, hard)
    return run.folder


def ensure_texts(run: Run) -> dict[int, list[str]]:
    """`{label: texts}` of the classes with hard images; prompts are drawn from them.

    Texts that a language model writes, and that are missing, are written first.
    """
    prompts, names = run.recipe.prompts, run.train.class_names
    phrases = str(write_prompts(run)) if prompts.endpoint is not None else prompts.phrases
    templates = (
        prompts.templates
        if prompts.settings is None
        else with_settings(prompts.templates, _read_settings(write_prompts(run)))
    )
    with arguments_named(phrases="prompts.phrases", names="prompts.names"):
        texts = class_prompts(
            names, templates, phrases, names=prompts.names, needed=hard_classes(run)
        )
    return {
        label: [prompts.prefix + text for text in texts[name]]
        for label, name in enumerate(names)
        if name in texts
    }


def _read_settings(path: Path) -> list[str]:
    with arguments_named(settings="prompts.settings"):
        return read_settings(path)


def hard_classes(run: Run) -> set[str]:
    """Names of the classes with hard images; only these need texts."""
    labels = read_table(run.path(paths.HARD), ["label"])["label"].unique()
    return {run.train.class_names[label] for label in labels.to_pylist()}


def add_captions(run: Run, images: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of training images, with a `caption` if the recipe has a captioner.

    Missing captions are made first.

    - `images`: rows with `id` and `digest`, such as those of `hard.parquet`.
    """
    captioner = run.recipe.prompts.captions
    if captioner is None:
        return [dict(row) for row in images]
    _caption_images(run, captioner, images)
    captions = _captions(run, captioner)
    return [{**row, "caption": captions[row["digest"]]} for row in images]


def _describe_classes(run: Run, section: EndpointSection) -> Path:
    path = run.path(paths.PROMPTS)
    with arguments_named(names="prompts.names"):
        names = spoken_names(run.train.class_names, run.recipe.prompts.names)
    needed = hard_classes(run)
    missing = missing_classes(path, names, needed)
    if missing:
        if len(missing) < len(needed):
            present = len(needed) - len(missing)
            logger.info(f"prompts: {present} of {len(needed)} classes with hard images have texts")
        rules = TextRules(section.count, section.words, section.only_class, section.tries)
        with (
            _naming_server("prompts.endpoint", rules="prompts.endpoint"),
            progress("prompts", len(missing)) as advance,
        ):
            write_missing(
                path,
                names,
                _connect(section, "prompts.endpoint"),
                rules,
                parallel=section.parallel,
                advance=advance,
                needed=needed,
            )
    return path


def _naming_server(section: str, **more: str) -> AbstractContextManager[None]:
    keys = ("url", "model", "key_variable", "parameters", "retries")
    return arguments_named(**{key: f"{section}.{key}" for key in keys}, **more)


def _connect(server: Server, section: str) -> ChatClient:
    """A client of the server that a section names; warns that a key is sent."""
    key = read_key(server.key_variable)
    if key is not None:
        logger.warning(f"{section}: {server.url} is sent the API key in {server.key_variable}")
    return ChatClient(
        server.url,
        server.model,
        key,
        parameters=server.parameters,
        timeout=server.timeout,
        retries=server.retries,
    )


def _condense_captions(run: Run, settings: Settings) -> Path:
    """Writes `settings.yaml`, if it is missing, from captions of some training images."""
    path, prompts = run.path(paths.SETTINGS), run.recipe.prompts
    if path.exists():
        return path
    with _naming_server("prompts.settings.endpoint"):
        client = _connect(settings.endpoint, "prompts.settings.endpoint")
    with arguments_named(names="prompts.names"):
        names = spoken_names(run.train.class_names, prompts.names)
    listed = split_rows_of(run, "train", ["id", "digest"]).to_pylist()
    sample = sorted(listed, key=lambda row: derive_seed("settings", row["id"]))[: settings.images]
    _caption_images(run, settings.captioner, sample)
    captions = _captions(run, settings.captioner)
    shown = pick_captions(
        [captions[row["digest"]] for row in sample if captions[row["digest"]]], settings.captions
    )
    if not shown:
        raise RunError(
            f"'{settings.captioner.checkpoint}' wrote an empty caption for all of "
            f"{count_of(len(sample), 'training image')}; name another model in "
            f"prompts.settings.captioner, or write the settings into {path} yourself, a list in "
            "YAML such as '- in a meadow at dusk'."
        )
    used = f"{count_of(len(shown), 'different caption')} of {count_of(len(sample), 'image')}"
    logger.info(f"settings: {settings.endpoint.model} condenses {used}")
    forbidden = [settings.kind, *names.values()]
    with _naming_server("prompts.settings.endpoint"):
        write_settings(
            path,
            lambda count: condense_request(shown, settings.kind, count),
            forbidden,
            client,
            count=settings.count,
            tries=settings.tries,
        )
    return path


def _caption_images(run: Run, section: Captions, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Captions the training images (`id`, `digest`) that have no caption by this model."""
    store, known, captioner_id = _caption_shards(run), _captions(run, section), _id_of(section)
    store.clear_unfinished()
    missing = list({row["digest"]: row for row in rows if row["digest"] not in known}.values())
    if not missing:
        return run.path(paths.CAPTIONS)
    captioner = Captioner(
        section.checkpoint,
        section.prompt,
        max_new_tokens=section.max_new_tokens,
        dtype=section.dtype,
        device=run.device,
    )
    row_of = {name: row for row, name in enumerate(run.train.ids)}
    empty = 0
    with progress("captions", len(missing)) as advance:
        for first in range(0, len(missing), CAPTIONED_AT_ONCE):
            part = missing[first : first + CAPTIONED_AT_ONCE]
            pictures = [run.checked_image(row_of[row["id"]], row["digest"]) for row in part]
            captions = captioner(pictures)
            empty += captions.count("")
            store.append(
                [
                    {
                        "id": digest(row["digest"], captioner_id),
                        "image": row["digest"],
                        "captioner": captioner_id,
                        "caption": caption,
                    }
                    for row, caption in zip(part, captions, strict=True)
                ]
            )
            advance(len(part))
    if empty:
        logger.warning(
            f"captions: {empty} of {len(missing)} are empty, which adds nothing to a prompt"
        )
    return run.path(paths.CAPTIONS)


def _caption_shards(run: Run) -> Shards:
    columns = ("image", "captioner", "caption")
    schema = pa.schema([(name, pa.string()) for name in ("id", *columns)])
    return Shards(run.path(paths.CAPTIONS), schema, filled=columns)


def _id_of(section: Captions) -> str:
    return describe_captioner(
        section.checkpoint, section.prompt, section.max_new_tokens, section.dtype
    )


def _captions(run: Run, section: Captions) -> dict[str, str]:
    """`{digest of the image: caption}` by the captioner of a section of the recipe."""
    captioner = _id_of(section)
    return {
        row["image"]: row["caption"]
        for row in _caption_shards(run).read().to_pylist()
        if row["captioner"] == captioner
    }
