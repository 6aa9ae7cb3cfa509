"""The curriculum needs numpy alone."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import sys
from discl.curriculum import bandit, progress, sampling, schedule, strategies
print(*{"torch", "datasets", "pydantic", "PIL", "pandas"} & set(sys.modules))
"""


def test_no_other_package_is_imported() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("", "")
