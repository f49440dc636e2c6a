"""Command line of the experiments: what the Makefile's targets call."""

import argparse
import os
import sys

from . import publish, stamps
from .records import claims_in, git, read_claims
from .sweep import Study
from .verdicts import HOLDS
from .verify import verify


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
    parser.add_argument("command", choices=[*COMMANDS, "lock"])
    parser.add_argument("notebook", nargs="?", default="", help="for fresh and stamp")
    parser.add_argument("--profile", default="quick", help="quick or paper")
    parser.add_argument("--datasets", default="", help="comma-separated; empty: the profile's")
    parser.add_argument("--seed", type=int, default=0, help="added to the profile's seeds")
    parser.add_argument("--per-class", type=int, default=0, help="images; 0: the profile's")
    chosen = vars(parser.parse_args(words))
    command, notebook = chosen.pop("command"), chosen.pop("notebook")
    if os.environ.get("DATA_ROOT"):
        os.environ["DATA_ROOT"] = os.path.abspath(os.environ["DATA_ROOT"])
    try:
        return COMMANDS[command](Study(**chosen), notebook, chosen)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _fresh(study: Study, notebook: str, parameters: dict) -> int:
    if stamps.fresh(study, notebook, parameters):
        print(f"{notebook}: up to date", flush=True)
        return 0
    return 1


def _stamp(study: Study, notebook: str, parameters: dict) -> int:
    stamps.stamp(study, notebook, parameters)
    return 0


def _bases(study: Study, notebook: str, parameters: dict) -> int:
    """Train what is missing before notebooks that run side by side would each train it."""
    for case in study.cases:
        study.base(case)
    return 0


def _claims(study: Study, notebook: str, parameters: dict) -> int:
    """Print all claims, verdict first, then what differs from the committed verdicts."""
    rows = read_claims(study.results)
    for claim in rows:
        print(f"{claim['verdict']:6} {claim['id']:4} {claim['where']:22} {claim['claim']}")
        print(f"{'':12}expected: {claim['expected']}; measured: {claim['ours']}")
    publish.write_claims(study.results)
    committed = {_key(claim): claim for claim in _committed(study)}
    if committed:
        changed = [
            (claim, before)
            for claim in rows
            if (before := committed.get(_key(claim))) and before["verdict"] != claim["verdict"]
        ]
        print(f"\n{len(changed)} verdicts differ from the committed ones (git HEAD)")
        for claim, before in changed:
            print(f"{claim['id']:4} {claim['where']:22} {claim['claim']}")
            print(f"{'':5}committed: {before['verdict']} ({before['ours']}); "
                  f"now: {claim['verdict']} ({claim['ours']})")  # fmt: skip
    held = sum(claim["verdict"] == HOLDS for claim in rows)
    print(f"{held} of {len(rows)} claims hold in profile {study.name!r}; see notebooks/09-paper")
    return 0


def _key(claim: dict) -> tuple[str, ...]:
    return tuple(claim[name] for name in ("notebook", "id", "where", "claim"))


def _committed(study: Study) -> list[dict]:
    rows = []
    for path in sorted(study.results.glob("claims-*.json")):
        text = git("show", f"HEAD:results/{study.name}/{path.name}")
        rows += claims_in(text) if text else []
    return rows


def _store_outputs(study: Study, notebook: str, parameters: dict) -> int:
    stamps.store_outputs()
    publish.write_claims(study.results)
    publish.update()
    return 0


COMMANDS = {
    "bases": _bases,
    "fresh": _fresh,
    "stamp": _stamp,
    "claims": _claims,
    "verify": lambda study, *_: verify(study),
    "store-outputs": _store_outputs,
}

if __name__ == "__main__":
    sys.exit(main())
