"""What is in a run folder as self-contained HTML pages."""

from .audit_section import audit_rows
from .comparison_page import write_comparison
from .page import write_report
from .pilot_page import write_pilot
from .survey_page import write_survey

__all__ = ["audit_rows", "write_comparison", "write_pilot", "write_report", "write_survey"]
