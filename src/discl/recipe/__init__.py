"""The recipe: one validated tree (pydantic) read from and written to YAML."""

from ..assets import RECIPES, describe_shipped, shipped_recipes
from .audit import Audit
from .compare import Evaluate
from .data import Data, Groups, Hard, LongTail
from .filter import Filter
from .loading import load_recipe, parse_override, validate
from .methods import Method
from .pieces import check_own_pieces
from .pilot import Pilot
from .prompts import Captions, Endpoint, Prompts, Server, Settings
from .recipe import Recipe, Runtime
from .spectrum import Adapt, Spectrum
from .train import Train

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
