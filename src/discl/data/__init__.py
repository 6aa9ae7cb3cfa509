"""Tables of real images.

Each name is loaded when it is first used, because tables need Arrow and pixels do not.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .depth import Depth
    from .gate import Gate, Unreadable
    from .images import decode_image, keep_aspect, to_size, to_square, to_whole
    from .long_tail import (
        class_groups,
        exponential_counts,
        order_classes,
        rank_by_index,
        take_long_tail,
    )
    from .readers import Cameras, read_archive, read_tables
    from .splits import split_rows
    from .table import (
        ImageTable,
        Inspection,
        digest_image,
        inspect_images,
        settle_depth,
        with_depth,
        without_empty_classes,
    )

_HOMES = {
    "depth": ("Depth",),
    "gate": ("Gate", "Unreadable"),
    "images": ("decode_image", "keep_aspect", "to_size", "to_square", "to_whole"),
    "long_tail": (
        "class_groups",
        "exponential_counts",
        "order_classes",
        "rank_by_index",
        "take_long_tail",
    ),
    "readers": ("Cameras", "read_archive", "read_tables"),
    "splits": ("split_rows",),
    "table": (
        "ImageTable",
        "Inspection",
        "digest_image",
        "inspect_images",
        "settle_depth",
        "with_depth",
        "without_empty_classes",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Cameras",
    "Depth",
    "Gate",
    "ImageTable",
    "Inspection",
    "Unreadable",
    "class_groups",
    "decode_image",
    "digest_image",
    "exponential_counts",
    "inspect_images",
    "keep_aspect",
    "order_classes",
    "rank_by_index",
    "read_archive",
    "read_tables",
    "settle_depth",
    "split_rows",
    "take_long_tail",
    "to_size",
    "to_square",
    "to_whole",
    "with_depth",
    "without_empty_classes",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'discl.data' has no attribute '{name}'")
    return getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
