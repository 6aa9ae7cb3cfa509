"""The kept images for other tools."""

from .card import make_card
from .formats import FORMATS
from .marks import mark_synthetic
from .writing import MARKER, export_images, holds_export

__all__ = ["FORMATS", "MARKER", "export_images", "holds_export", "make_card", "mark_synthetic"]
