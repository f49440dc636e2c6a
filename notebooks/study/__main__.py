"""Command line of the experiments: what the Makefile's targets call."""

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .sweep import Study


def main(words: list[str] | None = None) -> int:
    """Parse the command line and run one command.

    Gives zero if all went well; one for ``fresh`` where the notebook has to be run, and for
    ``verify`` where a check failed; two for an error; 130 if it was interrupted.
    """
    try:
        return _run(sys.argv[1:] if words is None else words)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # imports take so long that they are where it often comes
        return 130


def _run(words: list[str]) -> int:
    from . import stamps
    from .profiles import folder_name

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
    if command in LIGHT:
        place = {name: chosen[name] for name in ("profile", "seed", "per_class")}
        return LIGHT[command](folder_name(**place), notebook, chosen) or 0
    from .sweep import Study  # here: torch, pandas and the rest take seconds to import

    return COMMANDS[command](Study(**chosen)) or 0


def _fresh(folder: str, notebook: str, parameters: dict) -> int:
    from . import stamps

    if not stamps.fresh(folder, notebook, parameters):
        return 1
    print(f"{notebook}: up to date", flush=True)
    return 0


def _execute(folder: str, notebook: str, parameters: dict) -> int:
    from . import stamps

    return stamps.execute(folder, notebook, parameters)


def _stamp(folder: str, notebook: str, parameters: dict) -> None:
    from . import stamps

    stamps.stamp(folder, notebook, parameters)


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
    from . import publish, stamps

    stamps.store_outputs()
    publish.write_claims(study.results)
    publish.update()


def _report(study: "Study") -> None:
    from . import stamps
    from .report import report

    target = study.results / "report.html"
    report(study.scratch / "notebooks" / f"{stamps.LAST}.ipynb", target)
    print(target)


LIGHT = {"fresh": _fresh, "execute": _execute, "stamp": _stamp}
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
