"""Records of runs: where each is found again, where it comes from, and what all of them took."""

import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from functools import cache
from pathlib import Path

import pandas as pd
import torch

from lib import Recipe
from lib.files import write_bytes
from lib.prune import KeepFilters, KeepTop, NonPositive
from lib.quantize import ECQx, LayerWidths, RateDistortion, Sequential, Tiers, Trained, Uniform

from . import digests
from .paths import ROOT

_PACKAGES = (
    "torch", "torchvision", "zennit", "captum", "constriction", "numpy", "scipy", "scikit-learn",
)  # fmt: skip
RULES = {NonPositive: "nonpositive", KeepTop: "top", KeepFilters: "filters"}
STORES = {
    Tiers: "tiers", Uniform: "uniform", LayerWidths: "layers", RateDistortion: "rate-distortion",
    Sequential: "Sequential", Trained: "Trained", ECQx: "ECQx",
}  # fmt: skip
_FLAT = {
    "criterion": "lrp-epsilon", "pruning": "none", "density": 0.5, "scope": "global", "rounds": 1,
    "fraction": 1.0, "layerwise": False, "refit": False, "renormalise": False, "finetune": 0,
    "optimiser": "adam", "quantizer": "tiers", "bits": 4.0, "widths": (0, 2, 4, 8), "lam": 0.01,
    "precision": "",
}  # fmt: skip
_KNOBS = ("bits", "lam")


def flat(recipe: Recipe) -> dict:
    """The sixteen fields by which a recipe's runs are addressed. FROZEN.

    The files of ``results/paper/runs`` are named by a hash of this dictionary: a changed name,
    default or type (floats stay floats) would lose hours of runs. A field that a recipe makes no
    use of has its default here, so that equal recipes are one run. Fields that rules and
    quantizers get in future are added, as ``remove.name``, only where they differ from their
    default; so recipes of today keep their address.

    Rules that are not in ``RULES`` and quantizers that are not in ``STORES`` are named by their
    class. The dictionary can be written as JSON.
    """
    remove, repair, store = recipe.remove, recipe.repair, recipe.store
    fields = dict(_FLAT)
    told = {"remove": {"by"}, "repair": {"finetune", "optimiser"}, "store": {"by"}}
    if remove is not None:
        told["remove"] |= {"rounds", "layerwise", "fraction", "density", "scope"}
        told["repair"] |= {"refit", "renormalise"}
        fields |= {
            "criterion": _name(remove.by),
            "pruning": RULES.get(type(remove), type(remove).__name__),
            "rounds": remove.rounds,
            "layerwise": remove.layerwise,
            "refit": repair.refit,
            "renormalise": repair.renormalise,
        }
        for name, made in (("fraction", float), ("density", float), ("scope", str)):
            if hasattr(remove, name):
                fields[name] = made(getattr(remove, name))
    else:
        told["repair"] |= {"refit", "renormalise"}  # nothing is removed: nothing to repair
    if repair.finetune:
        fields |= {"finetune": repair.finetune, "optimiser": repair.optimiser}
    told["store"] |= {store.knob, "widths"}
    fields["quantizer"] = kind(store)
    fields["lam" if store.knob == "price" else store.knob] = float(store.value)
    if isinstance(store, Tiers):
        fields["widths"] = tuple(store.widths)
    decides = _name(getattr(store, "by", fields["criterion"]))
    if decides != fields["criterion"]:
        fields["precision"] = decides
    for part, value in (("remove", remove), ("repair", repair), ("store", store)):
        fields |= _later(part, value, told[part])
    return fields


def kind(store) -> str:
    """What a quantizer is called in addresses, and in the knobs of profiles."""
    return STORES.get(type(store), type(store).__name__)


def _name(by) -> str:
    return getattr(by, "name", by)


def _later(part: str, value, told: set[str]) -> dict:
    """Fields that the sixteen do not tell, where they differ from their defaults."""
    if value is None:
        return {}
    fields = [field for field in dataclasses.fields(value) if field.name not in told]
    return {
        f"{part}.{field.name}": getattr(value, field.name)
        for field in fields
        if getattr(value, field.name) != field.default
    }


def address(recipe: Recipe, per_class: int, state: str) -> str:
    """Name of a run's record: 16 hexadecimal digits.

    The recipe has its knob set; ``state`` is the digest of the base network's ``state_dict``: a run
    of another network is another run.
    """
    return _hash([flat(recipe), per_class, state])


def base_address(state: str, dataset: str, part: str) -> str:
    """Name of the record that holds a base network's accuracy on a split."""
    return _hash([state, dataset, part])


def _hash(content: list) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_records(folder: Path) -> list[dict]:
    """Records of all runs in ``folder``, ``Study.runs``, in the order of their paths."""
    return [read_json(path) for path in sorted(folder.rglob("*.json"))]


def read_json(path: Path) -> dict:
    """What ``write_json`` wrote; a ValueError names a file that is damaged."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, to run it again") from error


def read_claims(results: Path) -> list[dict]:
    """All claims of a profile's ``results``, in the order of their notebooks."""
    return [claim for path in sorted(results.glob("claims-*.json")) for claim in read_json(path)]


def cost(folder: Path) -> pd.DataFrame:
    """What the runs in a folder took: a row for each network and processor.

    Columns: dataset, model, processor (of a CPU its capability), seeds, runs and core hours
    (training of the base networks not counted). What the runs of a job share is counted once.
    """
    rows = []
    for row in read_records(folder):
        where = row["provenance"]
        # Records of before jobs had names shared their job with those that differ in a knob.
        recipe = {k: v for k, v in where["recipe"].items() if k not in _KNOBS}
        job = where.get("job", [row["per_class"], recipe, where["commit"]])
        processor = where["cpu_capability"] if where["device"] == "cpu" else where["device"]
        told = {name: row[name] for name in ("dataset", "model", "seed")}
        told |= {"processor": processor, "job": json.dumps([row["seed"], job])}
        rows.append(told | {"core hours": where["threads"] * where["seconds"] / 3600})
    names = ["dataset", "model", "processor", "seed", "job", "core hours"]
    table = pd.DataFrame(rows, columns=names)
    by = ["dataset", "model", "processor"]
    jobs = table.groupby([*by, "job"], sort=False)["core hours"].max()
    groups = table.groupby(by, sort=False)
    return pd.DataFrame(
        {
            "seeds": groups["seed"].nunique(),
            "runs": groups.size(),
            "core hours": jobs.groupby(by, sort=False).sum(),
        }
    ).reset_index()


def write(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, content.encode() if isinstance(content, str) else content)


def write_json(path: Path, content) -> None:
    """Write JSON as ``write`` does."""
    write(path, json.dumps(content, indent=1) + "\n")


def git(*words: str) -> bytes | None:
    """What git prints for these words in the checkout; None without git, or where it fails."""
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True)
    except FileNotFoundError:
        return None
    return done.stdout if done.returncode == 0 else None


@cache
def _environment() -> dict:
    return {
        "commit": (git("rev-parse", "HEAD") or b"unknown").decode().strip(),
        "code_changed_since": bool(git("status", "--porcelain", "lib", "notebooks/study")),
        "code": digests.of_code(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processor": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
    }


def provenance(start: float) -> dict:
    """Where a result comes from, for which work began at ``start`` (of ``time.perf_counter``).

    Commit, whether ``lib`` or ``study`` differ from it, digest of the code, versions, device,
    threads and seconds.
    """
    seconds = round(time.perf_counter() - start, 2)
    return _environment() | {"threads": torch.get_num_threads(), "seconds": seconds}
