"""Command line of the experiments: what the Makefile's targets call."""

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING

from . import stamps
from .profiles import folder_name

if TYPE_CHECKING:
    from .sweep import Study


def main(words: list[str] | None = None) -> int:
    """Parse the command line and run one command.

    Gives zero if all went well; one for ``fresh`` where the notebook has to be run, and for
    ``verify`` where a check failed; two for an error.
    """
    words = sys.argv[1:] if words is None else words
    if words[:1] == ["lock"]:
        stamps.alone(words[1:])
    parser = argparse.ArgumentParser(prog="python -m study", description=__doc__)
    parser.add_argument("command", choices=[*LIGHT, *COMMANDS, "lock"])
    parser.add_argument("notebook", nargs="?", default="", help="for fresh, execute and stamp")
    parser.add_argument("--profile", default="quick", help="quick or paper")
    parser.add_argument("--datasets", default="", help="comma-separated; empty: the profile's")
    parser.add_argument("--seed", type=int, default=0, help="added to the profile's seeds")
    parser.add_argument("--per-class", type=int, default=0, help="images; 0: the profile's")
    chosen = vars(parser.parse_args(words))
    command, notebook = chosen.pop("command"), chosen.pop("notebook")
    if os.environ.get("DATA_ROOT"):
        os.environ["DATA_ROOT"] = os.path.abspath(os.environ["DATA_ROOT"])
    try:
        if command in LIGHT:
            place = {name: chosen[name] for name in ("profile", "seed", "per_class")}
            return LIGHT[command](folder_name(**place), notebook, chosen) or 0
        from .sweep import Study  # here: torch, pandas and the rest take seconds to import

        return COMMANDS[command](Study(**chosen)) or 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _fresh(folder: str, notebook: str, parameters: dict) -> int:
    if not stamps.fresh(folder, notebook, parameters):
        return 1
    print(f"{notebook}: up to date", flush=True)
    return 0


def _bases(study: "Study") -> None:
    """Train what is missing before notebooks that run side by side would each train it."""
    for case in study.cases:
        study.base(case)


def _claims(study: "Study") -> None:
    """Write ``CLAIMS.md``; print verdicts that changed, and in twelve lines what all came to."""
    from . import publish
    from .records import git, read_claims

    publish.write_claims(study.results)
    paths = sorted(study.results.glob("claims-*.json"))
    texts = [git("show", f"HEAD:results/{study.name}/{path.name}") for path in paths]
    committed = [claim for text in texts if text for claim in json.loads(text)]
    claims = read_claims(study.results)
    for line in publish.changed(claims, committed):
        print(line)
    print(publish.closing(study, claims, committed))


def _verify(study: "Study") -> int:
    from .verify import verify

    return verify(study)


def _store_outputs(study: "Study") -> None:
    from . import publish

    stamps.store_outputs()
    publish.write_claims(study.results)
    publish.update()


def _report(study: "Study") -> None:
    from .report import report

    target = study.results / "report.html"
    report(study.scratch / "notebooks" / f"{stamps.LAST}.ipynb", target)
    print(target)


LIGHT = {"fresh": _fresh, "execute": stamps.execute, "stamp": stamps.stamp}
"""Asked before, for and after each notebook, so that they may import nothing that takes long."""
COMMANDS = {
    "bases": _bases,
    "claims": _claims,
    "verify": _verify,
    "report": _report,
    "store-outputs": _store_outputs,
}

if __name__ == "__main__":
    sys.exit(main())
