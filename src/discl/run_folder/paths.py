"""Every file name of a run folder, once."""

from __future__ import annotations

RECIPE = "recipe.yaml"
ENVIRONMENT = "environment.json"

DATA = "data.parquet"
HARD = "hard.parquet"
PLAN = "plan.parquet"
BUDGET = "budget.json"
"""The UNet rows that the hours of a budget buy, measured once."""
FILTER = "filter.parquet"
ALIA = "alia.parquet"

EARLIER = "earlier"
"""Tables and results of earlier recipes, a folder for each."""
FORMER = "former"
"""The same for one recipe, as an earlier version left it."""

PROMPTS = "prompts.yaml"
SETTINGS = "settings.yaml"
CAPTIONS = "captions"

SPECTRUM = "spectrum"
SCORES = "scores"
SHARD = "part-{}.parquet"
"""A file of a folder of shards: images, scores, captions or prepared images; `*` finds all."""

TRAIN = "train"
"""A folder for each method, with the files below."""
METHOD = "method.json"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
HISTORY = "history.jsonl"
CHECKPOINT = "checkpoint.safetensors"
BEST = "best"
LOGITS = "logits.safetensors"
ENSEMBLE = "we"
ENSEMBLE_MARK = "ensemble.json"
WANDB = "wandb.txt"

RESULTS = "results.json"
PREDICTIONS = "predictions.safetensors"
REPORT = "report.html"

SEEDS = "seeds"
COMPARISON_TABLE = "comparison.md"
COMPARISON_CSV = "comparison.csv"
COMPARISON_LATEX = "comparison.tex"
COMPARISON_DATA = "comparison.json"
COMPARISON_PAGE = "comparison.html"
TUNED = "tuned"
TRIALS = "trials"
TRIALS_DATA = "trials.json"

LEVELS = "levels"
LEVELS_DATA = "levels.json"
LEVELS_CSV = "levels.csv"
LEVELS_TABLE = "levels.md"
LEVELS_PAGE = "levels.html"

ADAPTED = "adapted"
"""Low-rank weights of the generator, one safetensors file for each key."""
ADAPTER = "adapter.json"
"""Names the file of `adapted/` that the recipe uses."""

PILOT = "pilot"
"""The images, scores and embeddings of all trials, a folder for each candidate, and the files
below."""
EMBEDDINGS = "embeddings"
PILOT_DATA = "pilot.json"
PILOT_CSV = "pilot.csv"
PILOT_TABLE = "pilot.md"

PREPARED = "prepared"
LOGS = "logs"
LOCKS = "locks"

CACHE = "cache"
CACHED_SHARDS = "shards"
CACHED_SQUARES = "squares"
CHECKED_SHARDS = "checked.json"
CHECKED_SQUARES = "checked-squares.json"
