"""Other coders on the study's base networks: their files, decoded, on the study's images.

    python -m bench.peers.run --python .cache/peers/bin/python --profile paper

For each base network and coder, the settings of ``grid.py`` are coded to files, each file decoded,
and the decoded network evaluated in float32 on the validation images. Those files that no other one
of the same coder beats there, in bytes and accuracy at once, are coded again and evaluated on the
test images, once. ``results/<profile>/peers/<network>.csv`` is written row by row: interrupted,
it goes on from there. ``nncodec.csv`` and ``peers.csv`` beside that folder hold the files that were
evaluated on the test images.
"""

import argparse
import copy
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from lib.batchnorm import batchnorm_pairs
from lib.finetune import evaluate
from lib.fold import fold_batchnorm
from study import Case, Study, float_bytes
from study.data import split
from study.paths import STANDARD
from study.records import provenance, write

from . import grid
from .deep_compression import DeepCompression
from .gptq import GPTQ

HERE, SCRIPT = Path(__file__).parent, "installed.py"
WRITTEN = {"deep compression": DeepCompression, "gptq": GPTQ}
LOST = 3.0
"""Points of validation accuracy beyond which a ladder of settings ends, and no file is tested."""
KEY = ["recipe", "settings"]
WHOLE = ("seed", "file_bytes", "threads")
FIRST = ["dataset", "model", "seed", "recipe", "knob", "settings"]
PROVENANCE = ("commit", "code_changed_since", "python", "device", "cpu_capability", "threads")
Coder = Callable[[dict], tuple[bytes, dict[str, Tensor]]]


@contextmanager
def installed(name: str, network: nn.Module, command: list[str]) -> Iterator[tuple[Coder, str]]:
    """A coder in a process of its own, as ``installed.py`` describes, and its version.

    Parameters
    ----------
    name : str
        Which coder; the first argument of the command, before the folder.
    network : nn.Module
        Its state in float32 is what is coded.
    command : list of str
        Interpreter and script.
    """
    tensors = {
        key: value.detach().cpu().contiguous()
        for key, value in network.state_dict().items()
        if value.is_floating_point()
    }
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save_file(tensors, folder / "state.safetensors")
        norms = {"batchnorms": batchnorm_pairs(network)}
        (folder / "network.json").write_text(json.dumps(norms))
        process = subprocess.Popen(
            [*command, name, place], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

        def answer() -> dict:
            if line := process.stdout.readline():
                return json.loads(line)
            raise RuntimeError(f"{name} ended with {process.wait()}: see its output above")

        def coder(settings: dict) -> tuple[bytes, dict[str, Tensor]]:
            process.stdin.write(json.dumps(settings) + "\n")
            process.stdin.flush()
            answer()
            return (folder / "coded").read_bytes(), load_file(folder / "decoded.safetensors")

        try:
            yield coder, answer()["version"]
        finally:
            process.stdin.close()
            process.wait()


@contextmanager
def here(name: str, network: nn.Module, images: Tensor) -> Iterator[tuple[Coder, str]]:
    """A coder that is written here, and which part of its paper it is."""
    made = WRITTEN[name](network, images)

    def coder(settings: dict) -> tuple[bytes, dict[str, Tensor]]:
        data = made.encode(settings)
        return data, made.decode(data)

    yield coder, made.version


def filled(network: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """The network with a decoded state, in place; a ValueError names what the state lacks."""
    own = network.state_dict()
    lacking = [key for key, value in own.items() if value.is_floating_point() and key not in state]
    if lacking:
        raise ValueError(f"the decoded state lacks {', '.join(lacking)}")
    network.load_state_dict({**own, **state})
    return network


def unbeaten(rows: pd.DataFrame) -> pd.Series:
    """Which rows have more validation accuracy than every file as small, and lose little."""
    ordered = rows.sort_values(["file_bytes", "val_accuracy"], ascending=[True, False])
    before = ordered["val_accuracy"].cummax().shift(fill_value=float("-inf"))
    close = ordered["base_val_accuracy"] - ordered["val_accuracy"] <= LOST
    return ((ordered["val_accuracy"] > before) & close).reindex(rows.index)


def named(settings: dict) -> str:
    """Settings as they stand in tables: the same in whatever order they are given."""
    return json.dumps(settings, sort_keys=True)


def appended(table: pd.DataFrame, row: dict) -> pd.DataFrame:
    """A table and one more row."""
    new = pd.DataFrame([row])
    # an empty table has no kinds of columns yet, and would make whole numbers decimals
    return pd.concat([table, new], ignore_index=True) if len(table) else new


class Log:
    """Rows of one base network, in a file that is written whole after each."""

    def __init__(self, path: Path):
        self.path = path
        self.table = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=KEY)
        whole = [name for name in WHOLE if name in self.table]
        self.table = self.table.astype(dict.fromkeys(whole, "int64"))

    def of(self, recipe: str) -> pd.DataFrame:
        """Rows of one coder."""
        return self.table[self.table["recipe"] == recipe]

    def missing(self, recipe: str, ladder: list[dict]) -> list[dict]:
        """Settings of a ladder that are to be run yet; none if a file lost too much."""
        rows, names = self.of(recipe), [named(settings) for settings in ladder]
        known = rows[rows["settings"].isin(names)]
        if len(known) and (known["base_val_accuracy"] - known["val_accuracy"]).max() > LOST:
            return []
        done = set(known["settings"])
        return [each for each, name in zip(ladder, names, strict=True) if name not in done]

    def pending(self, recipe: str) -> list[int]:
        """Rows of one coder that are to be evaluated on test images, and were not."""
        rows = self.of(recipe)
        return list(rows.index[unbeaten(rows) & rows["test_accuracy"].isna()]) if len(rows) else []

    def add(self, row: dict) -> None:
        """Append a row."""
        self.table = appended(self.table, row)
        self.save()

    def save(self) -> None:
        """Write all rows, with the very numbers: equal accuracies stay equal."""
        write(self.path, self.table.to_csv(index=False))


def measure(case: Case, name: str, opened, empty: nn.Module, base: dict, log: Log) -> None:
    """Run what is missing of one coder on one base network.

    Parameters
    ----------
    case : Case
        Names the base network.
    name : str
        Of the coder, in tables.
    opened : context manager
        Of ``installed`` or ``here``; entered only if something is missing.
    empty : nn.Module
        What decoded states are loaded into.
    base : dict of str to float
        base_val_accuracy, base_test_accuracy (percent) and float_bytes.
    log : Log
        Of this base network.
    """
    ladders = grid.ladders(name, case.model)
    if not any(log.missing(name, ladder) for ladder in ladders) and not log.pending(name):
        return
    accuracies = {key: value for key, value in base.items() if key != "float_bytes"}
    with opened as (coder, version):
        for ladder in tqdm(ladders, desc=f"{case}, {name}"):
            while missing := log.missing(name, ladder):
                start = time.perf_counter()
                data, state = coder(missing[0])
                accuracy = evaluate(filled(empty, state), *split(case.dataset, "val"))
                made = provenance(start)
                log.add(
                    asdict(case)
                    | {"recipe": name, "settings": named(missing[0])}
                    | {"file_bytes": len(data), "ratio": base["float_bytes"] / len(data)}
                    | {"val_accuracy": accuracy, "test_accuracy": float("nan"), **accuracies}
                    | {"version": version, **{key: made[key] for key in PROVENANCE}}
                )
        for index in tqdm(log.pending(name), desc=f"{case}, {name}, test images"):
            row = log.table.loc[index]
            data, state = coder(json.loads(row["settings"]))
            if len(data) != row["file_bytes"]:
                raise RuntimeError(f"{name} {row['settings']} gave another file than before")
            tested = evaluate(filled(empty, state), *split(case.dataset, "test"))
            log.table.loc[index, "test_accuracy"] = tested
            log.save()


def tables(results: Path) -> None:
    """Write ``nncodec.csv`` and ``peers.csv`` from the rows of all base networks.

    Their ``knob`` is the size of a file, by which the files of one coder and network differ.
    """
    found = []
    for path in sorted((results / "peers").glob("*.csv")):
        log = pd.read_csv(path)
        for coder, part in log.groupby("recipe", sort=False):
            kept = part[unbeaten(part)]
            if kept["test_accuracy"].isna().any():  # a curve with gaps would flatter ours
                print(f"left out until all of its files are tested: {coder} of {path.stem}")
            else:
                found.append(kept)
    if not found:
        return
    rows = pd.concat(found).astype({"file_bytes": int})
    rows = rows.assign(knob=rows["file_bytes"]).sort_values([*FIRST[:4], "knob"])
    rows = rows[[*FIRST, *(name for name in rows if name not in FIRST)]]
    standard = rows["recipe"] == STANDARD
    for name, part in ((STANDARD, rows[standard]), ("peers", rows[~standard])):
        if len(part):
            write(results / f"{name}.csv", part.to_csv(index=False, float_format="%.6g"))


def main() -> None:
    """Run all coders on all base networks that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", help="interpreter of the environment with the packages")
    parser.add_argument("--profile", default="quick")
    parser.add_argument("--datasets", default="", help="as for the study, such as mnist/lenet5")
    parser.add_argument("--coders", default=",".join(grid.GRIDS), help="comma-separated")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    study, command = Study(chosen.profile, chosen.datasets), [chosen.python, str(HERE / SCRIPT)]
    for case in study.cases:
        network = study.base(case)
        base = {f"base_{p}_accuracy": study.base_accuracy(case, p) for p in ("val", "test")}
        base["float_bytes"] = float_bytes(network)
        log = Log(study.results / "peers" / f"{case}.csv")
        folded = fold_batchnorm(network)
        for name in chosen.coders.split(","):
            own = network if name == STANDARD else folded  # NNCodec folds by itself, and better
            opened = (
                here(name, copy.deepcopy(own), study.references(case)[0])
                if name in WRITTEN
                else installed(name, own, command)
            )
            measure(case, name, opened, copy.deepcopy(own), base, log)
        tables(study.results)


if __name__ == "__main__":
    main()
