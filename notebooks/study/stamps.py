"""What is up to date: a notebook is run again only if something that it depends on has changed."""

import fcntl
import hashlib
import json
import os
import re
import sys
from pathlib import Path

from . import digests, paths
from .paths import LEDGER, QUIET, ROOT, STANDARD

FOLDER = ROOT / "notebooks"
LAST = "09-paper"  # reads what the others wrote
READ = {
    LAST: ("*.csv", "claims-*.json"),
    "06-beyond": (f"{STANDARD}.csv", "peers.csv", "trials-rates.csv"),
}
"""By notebook, patterns of the results that it reads and did not write."""


def _path(folder: str, name: str) -> Path:
    return paths.CACHE / folder / "stamps" / f"{name}.json"


def _asked(folder: str, name: str, parameters: dict) -> str:
    """Digest of all that goes into a notebook: its code, lib, study, parameters, and the data."""
    digest = hashlib.sha256(json.dumps([parameters, os.environ.get("DATA_ROOT")]).encode())
    # not by nbformat, whose import takes seconds
    cells = json.loads((FOLDER / f"{name}.ipynb").read_text())["cells"]
    for cell in cells:
        if cell["cell_type"] == "code":
            digest.update("".join(cell["source"]).encode() + b"\0")
    declared = "\n".join(
        "".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", [])
    )
    for parameter in parameters:
        if not re.search(rf"^{parameter} *=", declared, flags=re.M):
            raise ValueError(f"{name}.ipynb has no parameter {parameter}")
    for path in digests.sources():
        digest.update(path.read_bytes())
    for pattern in READ.get(name, ()):
        for path in sorted(paths.results(folder).glob(pattern)):
            digest.update(f"{path.name} {digests.of_file(path)}".encode())
    return digest.hexdigest()


def fresh(folder: str, name: str, parameters: dict) -> bool:
    """Whether a notebook ran on all that it would read now, and what it wrote is still there.

    The folder is ``profiles.folder_name`` of the parameters, which are handed to the notebook; its
    name is without ``.ipynb``.
    """
    try:
        stamp = json.loads(_path(folder, name).read_text())
        asked, written = stamp["asked"], stamp["written"].items()
    except (FileNotFoundError, ValueError, LookupError, TypeError, AttributeError):
        return False  # never run, or of another version
    return asked == _asked(folder, name, parameters) and all(
        digests.of_file(Path(file)) == content for file, content in written
    )


def execute(folder: str, name: str, parameters: dict) -> int:
    """Run a notebook into the folder of executed copies, quietly but for what went wrong in it.

    Gives one where a cell failed; what it raised was printed.
    """
    from papermill import PapermillExecutionError, execute_notebook  # here: takes a second

    target = paths.CACHE / folder / "notebooks" / f"{name}.ipynb"
    target.parent.mkdir(parents=True, exist_ok=True)
    os.environ[QUIET] = "1"
    try:
        execute_notebook(
            FOLDER / f"{name}.ipynb",
            target,
            parameters,
            progress_bar=False,
            cwd=FOLDER,
            # what kernels say of their own transport and end says nothing about the notebook
            extra_arguments=["--IPKernelApp.log_level=50"],
        )
    except PapermillExecutionError as error:
        print(error, file=sys.stderr)
        print(f"{name}.ipynb stopped at the cell named above; executed copy: {target}")
        return 1
    return 0


def stamp(folder: str, name: str, parameters: dict) -> None:
    """Note that a notebook has just run, with the digest of each file that it wrote.

    The environment variable ``STUDY_LEDGER`` names the list of these files.
    """
    ledger = Path(os.environ[LEDGER])
    files = sorted(set(ledger.read_text().splitlines())) if ledger.exists() else []
    written = {file: digests.of_file(Path(file)) for file in files}
    path = _path(folder, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    asked = _asked(folder, name, parameters)
    partial.write_text(json.dumps({"asked": asked, "written": written}, indent=1) + "\n")
    partial.replace(path)
    ledger.unlink(missing_ok=True)


def store_outputs() -> None:
    """Copy the quick profile's outputs into the committed notebooks, run-time metadata removed."""
    import nbformat

    from .records import write
    from .sliders import VIEW

    for path in sorted(FOLDER.glob("[0-9][0-9]-*.ipynb")):
        stored = nbformat.read(path, as_version=4)
        executed = nbformat.read(paths.CACHE / "quick" / "notebooks" / path.name, as_version=4)
        injected = "injected-parameters"
        cells = [c for c in executed.cells if injected not in c.metadata.get("tags", [])]
        pairs = list(zip(stored.cells, cells, strict=True))
        if any(cell.source != done.source for cell, done in pairs):
            raise ValueError(f"{path.name} was edited since it was run: make reproduce")
        code = [(cell, done) for cell, done in pairs if cell.cell_type == "code"]
        for count, (cell, done) in enumerate(code, 1):
            cell.outputs = [o for o in done.outputs if o.get("name") != "stderr"]  # warnings
            cell.execution_count = count
            for output in cell.outputs:
                output.get("data", {}).pop(VIEW, None)  # the picture beside it stays
                if output.output_type == "execute_result":
                    output.execution_count = count
        write(path, nbformat.writes(stored) + "\n")


def alone(command: list[str]) -> None:
    """Become a command, once no other one that was started so runs in this checkout.

    The lock is the kernel's, held by the open file that the command inherits: it goes with the
    last process that has it, however that ends.
    """
    paths.CACHE.mkdir(parents=True, exist_ok=True)
    lock = os.open(paths.CACHE / "lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print("another make reproduce runs in this checkout; waiting for its end", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)
    os.set_inheritable(lock, True)
    os.execvp(command[0], command)
