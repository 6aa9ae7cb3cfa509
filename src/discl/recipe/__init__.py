"""The recipe: one validated tree of everything that determines a run, read from and written to YAML."""

from .data import Data, Groups, Hard, LongTail
from .learning import Evaluate, Method, Train
from .loading import (
    RECIPES,
    describe_shipped,
    load_recipe,
    parse_override,
    shipped_recipes,
    validate,
)
from .making import Captions, Endpoint, Filter, Prompts, Server, Settings, Spectrum
from .pieces import check_own_pieces
from .places import change_places
from .tree import Recipe, Runtime

__all__ = [
    "RECIPES",
    "Captions",
    "Data",
    "Endpoint",
    "Evaluate",
    "Filter",
    "Groups",
    "Hard",
    "LongTail",
    "Method",
    "Prompts",
    "Recipe",
    "Runtime",
    "Server",
    "Settings",
    "Spectrum",
    "Train",
    "change_places",
    "check_own_pieces",
    "describe_shipped",
    "load_recipe",
    "parse_override",
    "shipped_recipes",
    "validate",
]
