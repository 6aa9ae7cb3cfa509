"""The recipe: one validated tree of everything that determines a run, read from and written to YAML."""

from .loading import RECIPES, describe_shipped, load_recipe, parse_override, shipped_recipes, validate
from .tree import Data, Evaluate, Filter, Groups, Hard, Method, Prompts, Recipe, Runtime, Spectrum, Train

__all__ = [
    "RECIPES",
    "Data",
    "Evaluate",
    "Filter",
    "Groups",
    "Hard",
    "Method",
    "Prompts",
    "Recipe",
    "Runtime",
    "Spectrum",
    "Train",
    "describe_shipped",
    "load_recipe",
    "parse_override",
    "shipped_recipes",
    "validate",
]
