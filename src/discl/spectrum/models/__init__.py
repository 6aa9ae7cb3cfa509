"""diffusers checkpoints behind one small interface."""

from .class_tokens import describe_class_tokens
from .description import Address, Generator, check_generator, describe_generator
from .interface import Conditioning, LatentModel
from .loading import load_generator, load_plain
from .loras import check_peft, describe_loras
from .samplers import SAMPLERS
from .schedules import Schedule

__all__ = [
    "SAMPLERS",
    "Address",
    "Conditioning",
    "Generator",
    "LatentModel",
    "Schedule",
    "check_generator",
    "check_peft",
    "describe_class_tokens",
    "describe_generator",
    "describe_loras",
    "load_generator",
    "load_plain",
]
