"""Command line of the experiments: what the Makefile's targets call."""

import argparse
import os
import sys
from typing import TYPE_CHECKING

from . import stamps
from .profiles import folder_name

if TYPE_CHECKING:
    from .sweep import Study


def main(words: list[str] | None = None) -> int:
    """Parse the command line and run one command.

    Returns
    -------
    int
        Zero if all went well; one for ``fresh`` where the notebook has to be run, and for
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
            return LIGHT[command](folder_name(**place), notebook, chosen)
        from .sweep import Study  # here: torch, pandas and the rest take seconds to import

        return COMMANDS[command](Study(**chosen), chosen)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _fresh(folder: str, notebook: str, parameters: dict) -> int:
    if stamps.fresh(folder, notebook, parameters):
        print(f"{notebook}: up to date", flush=True)
        return 0
    return 1


def _stamp(folder: str, notebook: str, parameters: dict) -> int:
    stamps.stamp(folder, notebook, parameters)
    return 0


def _bases(study: "Study", parameters: dict) -> int:
    """Train what is missing before notebooks that run side by side would each train it."""
    for case in study.cases:
        study.base(case)
    return 0


def _claims(study: "Study", parameters: dict) -> int:
    """Write ``CLAIMS.md``; print verdicts that changed, and in twelve lines what all came to."""
    from . import publish
    from .records import read_claims

    publish.write_claims(study.results)
    claims, committed = read_claims(study.results), _committed(study)
    for line in publish.changed(claims, committed):
        print(line)
    print(publish.closing(study, claims, committed))
    return 0


def _committed(study: "Study") -> list[dict]:
    from .records import claims_in, git

    rows = []
    for path in sorted(study.results.glob("claims-*.json")):
        text = git("show", f"HEAD:results/{study.name}/{path.name}")
        rows += claims_in(text) if text else []
    return rows


def _verify(study: "Study", parameters: dict) -> int:
    from .verify import verify

    return verify(study)


def _store_outputs(study: "Study", parameters: dict) -> int:
    from . import publish

    stamps.store_outputs()
    publish.write_claims(study.results)
    publish.update()
    return 0


def _report(study: "Study", parameters: dict) -> int:
    from .report import report

    executed = study.scratch / "notebooks" / f"{stamps.LAST}.ipynb"
    report(executed, study.results / "report.html")
    print(study.results / "report.html")
    return 0


LIGHT = {"fresh": _fresh, "execute": stamps.execute, "stamp": _stamp}
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
