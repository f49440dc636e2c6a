"""What a profile's notebooks write, and read from each other: tables, claims, figures, models."""

import json
import os
import shutil
from io import BytesIO, StringIO
from pathlib import Path

import pandas as pd

from . import paths
from .paths import LEDGER
from .records import read_claims, write
from .tables import Table
from .verdicts import Claim


def _csv(table: pd.DataFrame) -> str:
    return table.to_csv(index=False, float_format="%.6g")


def published(table: pd.DataFrame) -> pd.DataFrame:
    """The table as it is read back from its file, so that what follows from either is the same."""
    return pd.read_csv(StringIO(_csv(table)))


class Results:
    """The folders ``results/<name>`` and ``figures/<name>``; every file is written whole.

    ``name`` is that of the profile, and of what differs from it. The folders' parents are the
    checkout's unless ``RESULTS_ROOT`` and ``FIGURES_ROOT`` say otherwise.
    """

    def __init__(self, name: str):
        self.name = name
        self.results, self.figures = paths.results(name), paths.figures(name)

    def save_table(self, name: str, table: pd.DataFrame) -> None:
        """Write ``results/<profile>/<name>.csv``."""
        self._write(self.results / f"{name}.csv", _csv(table))

    def save_claims(self, notebook: str, claims: list[Claim]) -> Table:
        """Write a notebook's claims to ``results/<profile>/claims-<notebook>.json``, and print."""
        rows = [claim.row(notebook) for claim in claims]
        content = json.dumps(rows, indent=1) + "\n"
        self._write(self.results / f"claims-{notebook}.json", content)
        # Near a threshold the verdict may differ between processors: the table shows it, and the
        # tests of results compare it; the printed line is the same on every machine.
        print(f"{len(claims)} claims tested: {', '.join(dict.fromkeys(c.id for c in claims))}")
        return Table(pd.DataFrame(rows).drop(columns=["notebook", "holds", "seeds"]))

    def load_table(self, name: str) -> pd.DataFrame:
        """Read what ``save_table`` wrote; the message of its error says which notebook to run."""
        path = self.results / f"{name}.csv"
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: make reproduce PROFILE={self.name}")
        return pd.read_csv(path)

    def load_claims(self) -> pd.DataFrame:
        """All claims of the profile, in the order of their notebooks."""
        return pd.DataFrame(read_claims(self.results))

    def save_figure(self, name: str, figure) -> None:
        """Write ``figures/<profile>/<name>.png``, the same bytes for the same picture."""
        figure.savefig(
            content := BytesIO(), dpi=150, bbox_inches="tight", metadata={"Software": None}
        )
        self._write(self.figures / f"{name}.png", content.getvalue())

    def replace_models(self, pairs: dict[str, tuple[Path, Path]], name: str = "models") -> None:
        """Make a folder hold these and no others: by name the record and the file to copy.

        The whole folder is exchanged: a record never stands beside another run's file, wherever
        this stops.
        """
        folder, new, old = self._model_folders(name)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        for stem, sources in pairs.items():
            for source in sources:
                shutil.copyfile(source, new / f"{stem}{source.suffix}")
        try:
            if folder.exists():
                folder.rename(old)
            new.rename(folder)
        finally:
            self.recover_models(name)
        for path in sorted(folder.iterdir()):
            self._note(path)

    def recover_models(self, name: str = "models") -> None:
        """Put back what was set aside if ``replace_models`` stopped between its two steps."""
        folder, _, old = self._model_folders(name)
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(old, ignore_errors=True)

    def _model_folders(self, name: str) -> tuple[Path, Path, Path]:
        return tuple(self.results / each for each in (name, f".{name}.new", f".{name}.old"))

    def _write(self, path: Path, content: str | bytes) -> None:
        write(path, content)
        self._note(path)

    def _note(self, path: Path) -> None:
        if ledger := os.environ.get(LEDGER):
            with open(ledger, "a") as file:
                file.write(f"{path}\n")
