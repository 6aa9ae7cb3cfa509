"""A run folder as one self-contained HTML page."""

from .page import write_report
from .survey import write_survey

__all__ = ["write_report", "write_survey"]
