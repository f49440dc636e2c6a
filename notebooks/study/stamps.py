"""What is up to date: a notebook is run again only if something that it depends on has changed."""

import fcntl
import hashlib
import json
import os
import re
from pathlib import Path

import nbformat

from . import data, digests
from .claims import STANDARD
from .data import ROOT
from .records import write, write_json
from .results import LEDGER
from .sweep import Study

FOLDER = ROOT / "notebooks"
LAST = "09-paper"  # reads what the others wrote
READ = {LAST: ("*.csv", "claims-*.json"), "06-beyond": (f"{STANDARD}.csv",)}
"""By notebook, patterns of the results that it reads and did not write."""


def _path(study: Study, name: str) -> Path:
    return data.CACHE / study.name / "stamps" / f"{name}.json"


def _asked(study: Study, name: str, parameters: dict) -> str:
    """Digest of all that goes into a notebook: its code, lib, study, parameters, and the data."""
    digest = hashlib.sha256(json.dumps([parameters, os.environ.get("DATA_ROOT")]).encode())
    cells = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4).cells
    for cell in cells:
        if cell.cell_type == "code":
            digest.update(cell.source.encode() + b"\0")
    declared = "\n".join(c.source for c in cells if "parameters" in c.metadata.get("tags", []))
    for parameter in parameters:
        if not re.search(rf"^{parameter} *=", declared, flags=re.M):
            raise ValueError(f"{name}.ipynb has no parameter {parameter}")
    for path in digests.sources():
        digest.update(path.read_bytes())
    for pattern in READ.get(name, ()):
        for path in sorted(study.results.glob(pattern)):
            digest.update(f"{path.name} {digests.of_file(path)}".encode())
    return digest.hexdigest()


def fresh(study: Study, name: str, parameters: dict) -> bool:
    """Whether a notebook ran on all that it would read now, and what it wrote is still there.

    Parameters
    ----------
    study : Study
        Of the notebook's parameters.
    name : str
        The notebook's, without ``.ipynb``.
    parameters : dict
        Handed to the notebook.
    """
    path = _path(study, name)
    if not path.exists():
        return False
    stamp = json.loads(path.read_text())
    written = stamp["written"].items()
    return stamp["asked"] == _asked(study, name, parameters) and all(
        digests.of_file(Path(file)) == content for file, content in written
    )


def stamp(study: Study, name: str, parameters: dict) -> None:
    """Note that a notebook has just run, with the digest of each file that it wrote.

    Parameters
    ----------
    study, name, parameters
        As for ``fresh``; the environment variable ``STUDY_LEDGER`` names the list of the files.
    """
    ledger = Path(os.environ[LEDGER])
    files = sorted(set(ledger.read_text().splitlines())) if ledger.exists() else []
    written = {file: digests.of_file(Path(file)) for file in files}
    asked = _asked(study, name, parameters)
    write_json(_path(study, name), {"asked": asked, "written": written})
    ledger.unlink(missing_ok=True)


def store_outputs() -> None:
    """Copy the quick profile's outputs into the committed notebooks, run-time metadata removed."""
    for path in sorted(FOLDER.glob("[0-9][0-9]-*.ipynb")):
        stored = nbformat.read(path, as_version=4)
        executed = nbformat.read(data.CACHE / "quick" / "notebooks" / path.name, as_version=4)
        injected = "injected-parameters"
        cells = [c for c in executed.cells if injected not in c.metadata.get("tags", [])]
        for cell, done in zip(stored.cells, cells, strict=True):
            if cell.source != done.source:
                raise ValueError(f"{path.name} was edited since it was run: make reproduce")
        count = 0
        for cell, done in zip(stored.cells, cells, strict=True):
            if cell.cell_type == "code":
                count += 1
                outputs = [o for o in done.outputs if o.get("name") != "stderr"]  # progress bars
                cell.outputs, cell.execution_count = outputs, count
                for output in cell.outputs:
                    # of no use without the kernel that made it; the picture beside it stays
                    output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
                    if output.output_type == "execute_result":
                        output.execution_count = count
        write(path, nbformat.writes(stored) + "\n")


def alone(command: list[str]) -> None:
    """Become a command, once no other one that was started so runs in this checkout.

    The lock is the kernel's, held by the open file that the command inherits: it goes with the
    last process that has it, however that ends.

    Parameters
    ----------
    command : list of str
        Program and arguments.
    """
    data.CACHE.mkdir(parents=True, exist_ok=True)
    lock = os.open(data.CACHE / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("another make reproduce runs in this checkout; waiting for its end", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    os.set_inheritable(lock, True)
    os.execvp(command[0], command)
