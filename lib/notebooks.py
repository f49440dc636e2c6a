"""Running the ordered notebooks with papermill, and not running again what is up to date."""

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import nbformat
import papermill
from joblib import Parallel, delayed
from nbconvert import HTMLExporter
from papermill.exceptions import PapermillExecutionError

from lib.data import CACHE
from lib.runs import ROOT, Study, read_claims, write, write_json

FOLDER = ROOT / "notebooks"


class NotebookError(RuntimeError):
    """A notebook stopped with an error; the message names notebook, cell and error."""


def _digest(path: Path, parameters: dict, earlier: list[str]) -> str:
    """Of all that a notebook's outcome depends on: its code, ``lib/``, parameters, data folder.

    The last notebook reads what the others wrote, and so depends on ``earlier``, their digests.
    """
    content = [parameters, os.environ.get("DATA_ROOT"), earlier]
    digest = hashlib.sha256(json.dumps(content).encode())
    for cell in nbformat.read(path, as_version=4).cells:
        digest.update(cell.source.encode())
    for source in sorted((ROOT / "lib").rglob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def _written_since(study: Study, start: float) -> list[str]:
    files = [*study.results.glob("*.*"), *study.figures.glob("*.png")]
    whole = (file for file in files if not file.name.startswith("."))
    return sorted(str(file) for file in whole if file.stat().st_mtime >= start)


def _up_to_date(stamp: Path, digest: str) -> bool:
    if not stamp.exists():
        return False
    state = json.loads(stamp.read_text())
    return state["digest"] == digest and all(Path(file).exists() for file in state["files"])


def reproduce(profile: str, datasets: str = "") -> None:
    """Execute the notebooks; those whose code and inputs are unchanged are skipped.

    The last one reads what the others wrote and runs after them. In the quick profile the others
    run side by side, one on each core; in the paper profile one after the other, each with its
    runs on all cores.

    Parameters
    ----------
    profile, datasets : str
        See ``lib.runs.Study``; passed to each notebook as parameters.

    Raises
    ------
    NotebookError
        A notebook that stops with an error; those that ended before it stay done.
    """
    study = Study(profile, datasets)
    parameters = {"profile": profile, "datasets": datasets}
    *paths, last = sorted(FOLDER.glob("[0-9][0-9]-*.ipynb"))
    for path in (*paths, last):
        unknown = parameters.keys() - papermill.inspect_notebook(str(path)).keys()
        if unknown:
            raise NotebookError(f"{path.name} has no parameter {', '.join(sorted(unknown))}")
    begin = time.time()
    digests = [_digest(path, parameters, []) for path in paths]
    missing = []
    for path, digest in zip(paths, digests, strict=True):
        if _up_to_date(_stamp(profile, path), digest):
            print(f"{path.stem}: up to date", flush=True)
        else:
            missing.append((path, digest))
    width = min(os.cpu_count(), len(missing)) if profile == "quick" else 1
    for case in study.cases if missing else []:
        study.base(case)  # before notebooks that run side by side would each train it
    run = Parallel(n_jobs=max(width, 1), return_as="generator_unordered")
    # The later notebooks take longest and start first, so that no core waits for them at the end.
    order = missing if width < 2 else missing[::-1]
    done = run(delayed(_execute)(path, parameters, digest, width > 1) for path, digest in order)
    for count, (stem, seconds) in enumerate(done, 1):
        print(f"[{count}/{len(missing)}] {stem}: {seconds:.0f} s", flush=True)
    digest = _digest(last, parameters, digests)
    if _up_to_date(_stamp(profile, last), digest):
        print(f"{last.stem}: up to date", flush=True)
    else:
        stem, seconds = _execute(last, parameters, digest)
        print(f"{stem}: {seconds:.0f} s", flush=True)
    print(f"{time.time() - begin:.0f} s in all\n")
    print_claims(study)


def _stamp(profile: str, path: Path) -> Path:
    return CACHE / profile / "stamps" / f"{path.stem}.json"


def _execute(
    path: Path, parameters: dict, digest: str, beside_others: bool = False
) -> tuple[str, float]:
    """Run a notebook and leave a stamp with what it wrote; its name and seconds."""
    if beside_others:
        os.environ["LOKY_MAX_CPU_COUNT"] = "1"  # its runs stay on the core that it has
    study, start = Study(**parameters), time.time()
    executed = CACHE / study.name / "notebooks" / path.name
    executed.parent.mkdir(parents=True, exist_ok=True)
    print(f"{path.stem} ...", flush=True)
    try:
        papermill.execute_notebook(
            str(path),
            str(executed),
            parameters=parameters,
            cwd=str(FOLDER),
            progress_bar=sys.stderr.isatty() and not beside_others,
            log_output=False,
        )
    except PapermillExecutionError as error:
        last = (str(error.evalue) or error.ename).strip()
        raise NotebookError(
            f"{path.name}, cell [{error.exec_count}]: {error.ename}: {last}\n"
            f"--- the cell ---\n{error.source}\n--- executed copy: {executed}"
        ) from None
    write_json(_stamp(study.name, path), {"digest": digest, "files": _written_since(study, start)})
    return path.stem, time.time() - start


def print_claims(study: Study) -> None:
    """Print the table of claims of a profile, verdict first."""
    rows = read_claims(study.results)
    for claim in rows:
        verdict = "holds         " if claim["holds"] else "does not hold "
        print(f"{verdict} {claim['id']:4} {claim['where']:22} {claim['claim']}")
        print(f"{'':20}expected: {claim['paper']}; measured: {claim['ours']}")
    held = sum(claim["holds"] for claim in rows)
    print(f"{held} of {len(rows)} claims hold in profile {study.name!r}; see notebooks/09-paper")


def report(profile: str, datasets: str = "") -> Path:
    """Turn the executed paper notebook into one HTML file without code.

    Parameters
    ----------
    profile, datasets : str
        See ``lib.runs.Study``.

    Returns
    -------
    Path
        ``results/<profile>/report.html``.
    """
    study = Study(profile, datasets)
    executed = CACHE / profile / "notebooks" / "report.ipynb"
    executed.parent.mkdir(parents=True, exist_ok=True)
    papermill.execute_notebook(
        str(FOLDER / "09-paper.ipynb"),
        str(executed),
        parameters={"profile": profile, "datasets": datasets},
        cwd=str(FOLDER),
        progress_bar=False,
    )
    exporter = HTMLExporter(exclude_input=True, embed_images=True)
    exporter.exclude_input_prompt = exporter.exclude_output_prompt = True
    html, _ = exporter.from_filename(str(executed))
    write(study.results / "report.html", html)
    return study.results / "report.html"


def store_outputs() -> None:
    """Copy the quick profile's outputs into the committed notebooks, run-time metadata removed."""
    for path in sorted(FOLDER.glob("[0-9][0-9]-*.ipynb")):
        stored = nbformat.read(path, as_version=4)
        executed = nbformat.read(CACHE / "quick" / "notebooks" / path.name, as_version=4)
        injected = "injected-parameters"
        cells = [c for c in executed.cells if injected not in c.metadata.get("tags", [])]
        for cell, done in zip(stored.cells, cells, strict=True):
            if cell.source != done.source:
                raise NotebookError(f"{path.name} was edited since it was run: make reproduce")
        count = 0
        for cell, done in zip(stored.cells, cells, strict=True):
            if cell.cell_type == "code":
                count += 1
                outputs = [o for o in done.outputs if o.get("name") != "stderr"]  # progress bars
                cell.outputs, cell.execution_count = outputs, count
                for output in cell.outputs:
                    if output.output_type == "execute_result":
                        output.execution_count = count
        write(path, nbformat.writes(stored) + "\n")
