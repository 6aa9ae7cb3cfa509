"""Synthetic images as a data set for other tools: a folder of pictures, WebDataset shards, or a folder for the hub."""

from .card import make_card
from .formats import FORMATS
from .writing import MARKER, export_images

__all__ = ["FORMATS", "MARKER", "export_images", "make_card"]
