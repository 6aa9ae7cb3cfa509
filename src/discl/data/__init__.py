"""Tables of real images."""

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
from .readers import Cameras, read_tables
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
