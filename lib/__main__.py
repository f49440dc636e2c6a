"""Command line of the artifact: what the Makefile's targets call."""

import argparse
import os
import sys

from lib import notebooks, readme
from lib.runs import PROFILES, Study
from lib.verify import verify


def main() -> int:
    """Parse the command line and run one command; the exit status is zero if all went well."""
    parser = argparse.ArgumentParser(prog="python -m lib", description=__doc__)
    parser.add_argument("command", choices=["reproduce", "verify", "report", "store-outputs"])
    parser.add_argument("--profile", default="quick", help=", ".join(PROFILES))
    parser.add_argument("--datasets", default="", help="comma-separated; empty: the profile's")
    chosen = parser.parse_args()
    if os.environ.get("DATA_ROOT"):
        os.environ["DATA_ROOT"] = os.path.abspath(os.environ["DATA_ROOT"])
    try:
        study = Study(chosen.profile, chosen.datasets)
        if chosen.command == "reproduce":
            notebooks.reproduce(chosen.profile, chosen.datasets)
        elif chosen.command == "report":
            print(notebooks.report(chosen.profile, chosen.datasets))
        elif chosen.command == "store-outputs":
            notebooks.store_outputs()
            readme.update()
        else:
            return verify(study)
    except (ValueError, FileNotFoundError, notebooks.NotebookError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
