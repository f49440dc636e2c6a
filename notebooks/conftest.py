"""What nbval leaves out of the comparison: pictures, HTML tables, widgets, and what goes to stderr.

Tables are shown as HTML; their numbers are compared, with tolerances, by ``tests/regression``.
"""

import os

from study.paths import QUIET

WIDGET = "application/vnd.jupyter.widget-view+json"
SKIPPED = ("image/png", "text/html", "stderr", WIDGET)
os.environ[QUIET] = "1"  # the kernels inherit it


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += SKIPPED
