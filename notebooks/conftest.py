"""What nbval leaves out of the comparison: pictures, HTML tables, and what goes to stderr.

Tables are shown as HTML; their numbers are compared, with tolerances, by ``tests/regression``.
"""

SKIPPED = ("image/png", "text/html", "stderr")


def pytest_collectstart(collector):
    if hasattr(collector, "skip_compare"):
        collector.skip_compare += SKIPPED
