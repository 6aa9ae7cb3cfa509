"""`discl compare --tune`: the same number of trials for every method, on validation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from ..checkpoints import public_name
from ..data import split_rows
from ..evaluation.controls import ADJUSTED, NORMALISED
from ..mixtures import LONG_FORM, describe_mixture
from ..recipe import Recipe, check_own_pieces, validate
from ..recipe.loop import learner_of
from ..recipe.merge import get_value, merge, set_value
from ..run_folder import paths
from ..run_folder.run import Run
from ..training.distributed import current_processes
from ..utils.atomic import make_folder
from ..utils.counts import count_of
from ..utils.hashing import derive_seed
from ..utils.logging import get_logger
from ..utils.stored import read_json, read_table, write_table, write_text
from .evaluate import evaluate
from .prepare_data import listed_units
from .train import train

logger = get_logger(__name__)

HELD_OUT = 0.2
"""Fraction of the training images held out for trials, without a validation split or a setting."""

MIXTURE = "mixture"
"""The key of a space that replaces both forms of a method's mixture."""
OF_RUN = (paths.RETRIEVED, paths.SPECTRUM, paths.SCORES, paths.CACHE, paths.PREPARED)
"""What trials take from the run, as it is."""
Settings = Mapping[str, Any]
"""Overrides of a method in a trial: keys such as `train.optimizer.lr`, and their values."""


def tune(run: Run) -> Recipe:
    """The recipe with every method at the best of its trials; `tuned/trials.json` lists them all.

    A trial is measured by `compare.tune.metric` on the validation split, or on held-out training
    images. It then trains on neither these nor synthetic images made from them. The earlier of two
    equal trials wins. Only missing trials are trained.
    """
    settings = run.recipe.compare.tune
    trials = {name: plan_trials(run.recipe, name, run.allow_plugins) for name in run.recipe.methods}
    for name, planned in trials.items():
        if len(planned) < settings.trials:
            logger.warning(
                f"tune: {name} has {count_of(len(planned), 'trial')} instead of {settings.trials}, "
                "because its space has no more"
            )
    searched = _searched_run(run, trials)
    processes = current_processes()
    measured_on = processes.on_main(lambda: divide(run, searched))
    count = sum(map(len, trials.values()))
    logger.info(f"tune: {count} trials, measured by {settings.metric} on {measured_on}")
    train(searched)
    processes.on_main(lambda: evaluate(searched))
    results = read_json(searched.path(paths.RESULTS))
    best: dict[str, Settings] = {}
    methods: dict[str, Any] = {}
    for name, planned in trials.items():
        rows = [_row(name, number) for number in range(len(planned))]
        figures = [score_trial(results[row], settings.metric) for row in rows]
        number = int(np.argmax(figures))
        best[name] = planned[number]
        if "validation" not in run.tables:  # else it is chosen on validation by the final model
            best[name] = {**best[name], **adjustment_of(results, rows[number])}
        listed = [
            {"settings": dict(each), "figure": figure}
            for each, figure in zip(planned, figures, strict=True)
        ]
        methods[name] = {"chosen": dict(best[name]), "trials": listed}
    tuned = with_methods(run.recipe, {name: (name, best[name]) for name in trials})
    record = {"judged_on": measured_on, "metric": settings.metric, "methods": methods}
    if any(MIXTURE in each for planned in trials.values() for each in planned):
        record["mixtures"] = _mixtures(tuned)
    processes.on_main(
        lambda: write_text(
            searched.folder.parent / paths.TRIALS_DATA,
            json.dumps(record, indent=2, ensure_ascii=False),
        )
    )
    return tuned


def keep_mixtures(recipe: Recipe, tuned: Recipe) -> Recipe:
    """The recipe before it was tuned, but with the mixtures that were chosen."""
    chosen = {name: method.mixture for name, method in tuned.methods.items()}
    return with_methods(
        recipe,
        {name: (name, {} if each is None else {MIXTURE: each}) for name, each in chosen.items()},
    )


def plan_trials(recipe: Recipe, name: str, allow_plugins: bool = False) -> list[Settings]:
    """Settings of a method's trials: first the method unchanged, then combinations of its space.

    Combinations are sampled if there are more of them than trials. A method that trains nothing has
    one trial. A method that states its mixture keeps it, for it is a control, unless its own space
    names `mixture`. Raises RecipeError for a setting that the method cannot have, and for
    `module:attribute` without `allow_plugins`.
    """
    config, method = recipe.compare.tune, recipe.methods[name]
    if method.fine_tune == "zero-shot":
        return [{}]
    rate = recipe.training(name).optimizer.lr
    space = {
        **(config.space or {"train.optimizer.lr": [rate / 3, rate * 3]}),
        **config.methods.get(name, {}),
    }
    if method.states_mixture and MIXTURE not in config.methods.get(name, {}):
        space.pop(MIXTURE, None)
    stated = {
        **method.model_dump(mode="json"),
        MIXTURE: _mixtures(recipe)[name],
        "train": recipe.training(name).model_dump(mode="json"),
    }
    settings = [dict(zip(space, values, strict=True)) for values in product(*space.values())]
    others = [
        each
        for each in settings
        if any(get_value(stated, key) != value for key, value in each.items())
    ]
    wanted = config.trials - 1
    if len(others) > wanted:
        rng = np.random.default_rng(derive_seed("trials", config.seed, name))
        others = [others[place] for place in sorted(rng.choice(len(others), wanted, replace=False))]
    named = {_row(name, number): (name, each) for number, each in enumerate(others)}
    if named:
        check_own_pieces(with_methods(recipe, named), allow_plugins)
    return [{}, *others]


def tuned_run(run: Run, recipe: Recipe) -> Run:
    """The run of the tuned methods, in `tuned/`; it uses the spectrum of `run`."""
    return replace(run, recipe=recipe, folder=run.folder / paths.TUNED)


def describe_tuning(run: Run) -> list[str]:
    """Describes what was searched, and what was chosen for each method."""
    record = read_json(run.folder / paths.TRIALS_DATA, "metric", "judged_on", "methods")
    lines = [
        f"Settings chosen by {record['metric']} on {record['judged_on']}, never on test images."
    ]
    for name, each in record["methods"].items():
        chosen = (
            ", ".join(f"{key} = {public_name(str(value))}" for key, value in each["chosen"].items())
            or "unchanged"
        )
        figures = [trial["figure"] for trial in each["trials"]]
        lines.append(
            f"{name}: {chosen} ({100 * max(figures):.1f}; the worst of {len(figures)} trials: "
            f"{100 * min(figures):.1f})"
        )
    rows: dict[str, list[str]] = {}
    for name, mixture in record.get("mixtures", {}).items():
        rows.setdefault(mixture, []).append(name)
    if rows:
        found = (f"{mixture} ({', '.join(names)})" for mixture, names in rows.items())
        lines.append(f"mixtures: {'; '.join(found)}")
    return lines


def _mixtures(recipe: Recipe) -> dict[str, str]:
    """The mixture of every method, in words."""
    by_tail = recipe.hard.rule == "tail"
    return {
        name: describe_mixture(method.model_dump(mode="json"), by_tail)
        for name, method in recipe.methods.items()
    }


def _row(name: str, number: int) -> str:
    return f"{name}.{number}"


def _searched_run(run: Run, trials: Mapping[str, list[Settings]]) -> Run:
    """A run whose methods are all trials, on the spectrum and scores of `run`."""
    named = {
        _row(name, number): (name, each)
        for name, planned in trials.items()
        for number, each in enumerate(planned)
    }
    # α is chosen on validation later
    evaluated = run.recipe.evaluate.model_copy(update={"weight_ensembling": []})
    recipe = with_methods(
        run.recipe.model_copy(update={"evaluate": evaluated}), named, run.recipe.compare.tune.train
    )
    folder = run.folder / paths.TUNED / paths.TRIALS
    make_folder(folder)
    return replace(
        run,
        recipe=recipe,
        folder=folder,
        overrides={name: run.path(name) for name in OF_RUN},
    )


def divide(run: Run, searched: Run) -> str:
    """Writes the tables of the trials; returns the name of the images they are measured on.

    Hard rows and synthetic images of held-out images are held out too.
    """
    config = run.recipe.compare.tune
    listed = read_table(run.path(paths.DATA)).to_pandas()
    training = listed[listed["split"] == "train"]
    if config.hold_out is None and (listed["split"] == "validation").any():
        measured_on, validation = "the validation split", listed[listed["split"] == "validation"]
    else:
        share = config.hold_out or HELD_OUT
        units = listed_units(pa.Table.from_pandas(training, preserve_index=False))
        parts = split_rows(
            training["id"].tolist(),
            training["label"].tolist(),
            units,
            {"validation": share},
            seed=config.seed,
        )
        measured_on = f"{len(parts['validation'])} of the {len(training)} training images, held out"
        validation = training.iloc[parts["validation"]].assign(split="validation")
        training = training.iloc[parts["train"]]
    write_table(
        pa.Table.from_pandas(pd.concat([training, validation]), preserve_index=False),
        searched.path(paths.DATA),
    )
    used = pa.array(training["id"], pa.string())
    for name, column in (
        (paths.HARD, "id"),
        (paths.PLAN, "source_id"),
        (paths.FILTER, "source_id"),
    ):
        table = read_table(run.path(name))
        write_table(table.filter(pc.is_in(table[column], used)), searched.path(name))
    return measured_on


def score_trial(row: Mapping[str, Any], metric: str) -> float:
    """A trial's figure on validation; balanced accuracy is the mean over classes with images."""
    measured = row["validation"]
    return (
        float(np.mean(list(measured["per_class"].values())))
        if metric == "balanced_accuracy"
        else measured[metric]
    )


def adjustment_of(results: Mapping[str, Any], row: str) -> Settings:
    """Prior and τ of a trial's rows `+la` and `+tau` as settings of its method."""
    settings: dict[str, Any] = {}
    if (adjusted := results.get(row + ADJUSTED)) is not None:
        ((prior, tau),) = {(each["prior"], each["tau"]) for each in adjusted.values()}
        settings |= {"adjustment.prior": prior, "adjustment.tau": tau}
    if (normalised := results.get(row + NORMALISED)) is not None:
        (tau,) = {each["tau_normalisation"] for each in normalised.values()}
        settings["tau_normalisation"] = tau
    return settings


def with_methods(
    recipe: Recipe,
    named: Mapping[str, tuple[str, Settings]],
    train: Mapping[str, Any] | None = None,
) -> Recipe:
    """The recipe with these methods only. Raises RecipeError for an invalid one.

    - `named`: `{new name: (name of a method, overrides)}`.
    - `train`: overrides of the section `train` for all.
    """
    tree = recipe.plain()
    methods = {}
    for new, (name, settings) in named.items():
        method = tree["methods"][name]
        if MIXTURE in settings:
            method = {key: value for key, value in method.items() if key not in LONG_FORM}
        for key, value in settings.items():
            section, _, below = key.partition(".")
            if below and isinstance(method.get(section), str):  # cuda is short for {name: cuda}
                method = {**method, section: {"name": method[section]}}
            method = set_value(method, key, value)
        methods[new] = method
    tree |= {
        "methods": methods,
        "baseline": recipe.baseline if recipe.baseline in methods else None,
    }
    if train:
        tree["train"] = merge(tree["train"], train)
        for method in methods.values():  # also where a method has its own section `train`
            method["train"] = (
                merge(method["train"], train) if method.get("train") else method.get("train")
            )
    if recipe.loop is not None:  # trials are trained on the finished spectrum
        learner = learner_of(recipe)
        tree["loop"] = {**tree["loop"], "learner": learner} if learner in methods else None
    del tree["compare"]["tune"]  # it may name other methods
    return validate(tree)
