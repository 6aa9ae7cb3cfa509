"""A run folder as one self-contained HTML page."""

from .audit_section import audit_rows
from .comparison_page import write_comparison
from .page import write_report
from .survey_page import write_survey

__all__ = ["audit_rows", "write_comparison", "write_report", "write_survey"]
