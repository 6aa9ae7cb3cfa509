"""The recipe: one validated tree (pydantic) read from and written to YAML."""

from ..assets import RECIPES, describe_shipped, shipped_recipes
from .audit import Audit
from .data import Data, Groups, Hard, LongTail
from .generation import (
    Adapt,
    Captions,
    Endpoint,
    Filter,
    Pilot,
    Prompts,
    Server,
    Settings,
    Spectrum,
)
from .loading import load_recipe, parse_override, validate
from .pieces import check_own_pieces
from .recipe import Recipe, Runtime
from .training import Evaluate, Method, Train

__all__ = [
    "RECIPES",
    "Adapt",
    "Audit",
    "Captions",
    "Data",
    "Endpoint",
    "Evaluate",
    "Filter",
    "Groups",
    "Hard",
    "LongTail",
    "Method",
    "Pilot",
    "Prompts",
    "Recipe",
    "Runtime",
    "Server",
    "Settings",
    "Spectrum",
    "Train",
    "check_own_pieces",
    "describe_shipped",
    "load_recipe",
    "parse_override",
    "shipped_recipes",
    "validate",
]
