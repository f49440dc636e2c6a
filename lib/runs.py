"""Runs of the comparison: profiles, results that are not computed twice, provenance, claims."""

import ast
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from pathlib import Path

import pandas as pd
import torch
from joblib import Memory, Parallel, cpu_count, delayed
from torch import Tensor, nn
from tqdm import tqdm

from lib.bases import base
from lib.claims import Claim
from lib.codec import Compressed
from lib.data import CACHE, DATASETS, load, sample
from lib.files import write_bytes
from lib.prune import density
from lib.recipes import KNOBS, Recipe, encode, prepare, remove
from lib.relevance import scored_weights
from lib.train import evaluate, pick_device

ROOT = Path(__file__).parents[1]
LARGEST_KEPT = 4_000_000  # bytes of a compressed model in results/
_PACKAGES = ("torch", "torchvision", "zennit", "captum", "constriction", "numpy", "scikit-learn")
_BOOKKEEPING = {
    "plots", "runs", "notebooks", "claims", "checks", "verify", "readme", "export", "__main__",
}  # fmt: skip


@dataclass(frozen=True)
class Profile:
    """How much is run.

    Attributes
    ----------
    networks : dict of str to dict of str to tuple of int
        By data set and model the seeds, each of which trains and compresses its own network.
    per_class : int
        Reference images of each class, from the training split.
    finetune : int
        Steps, for every recipe that fine-tunes.
    knobs : dict of str to tuple of float
        For each quantizer, the settings of its knob that make a curve.
    special : dict of str to dict of str to tuple of float
        By model the knobs that differ: where a curve bends elsewhere, or a run takes long.
    kept : dict of str to tuple of float
        By model shares of weights kept, for comparing criteria; "" stands for all others.
    optimisers : dict of str to str
        By model the optimiser of fine-tuning where the recipes' default does harm; chosen on the
        validation split.
    slow : tuple of str
        Models that ablations leave out, since they take hours there.
    """

    networks: dict[str, dict[str, tuple[int, ...]]]
    per_class: int
    finetune: int
    knobs: dict[str, tuple[float, ...]]
    special: dict[str, dict[str, tuple[float, ...]]]
    kept: dict[str, tuple[float, ...]]
    optimisers: dict[str, str] = field(default_factory=dict)
    slow: tuple[str, ...] = ()


def _prices(steps: Iterable[float]) -> tuple[float, ...]:
    return tuple(10 ** (step / 4 - 3) for step in steps)


PROFILES = {
    "quick": Profile(
        {"digits": {"lenet5": (0,), "resnet8": (0,)}},
        per_class=15,
        finetune=50,
        knobs={
            "tiers": (2.2, 3, 4),
            "uniform": (2, 3, 4, 5),
            "layers": (1.5, 2, 3, 4, 5),
            "rate-distortion": (0.003, 0.01, 0.03),
        },
        special={},
        kept={"": (0.4, 0.15)},
    ),
    "paper": Profile(
        {
            "mnist": {"lenet300": (0, 1, 2), "lenet5": (0, 1, 2)},
            "cifar10-jpeg": {"resnet20": (0, 1, 2), "vgg16": (0,)},
        },
        per_class=50,
        finetune=300,
        knobs={
            "tiers": (2.2, 3, 4),
            "uniform": (2, 3, 4, 5),
            "layers": (1, 2, 3, 4),
            "rate-distortion": _prices(range(9)),
        },
        special={
            "resnet20": {
                "tiers": (3, 4, 5),
                "uniform": (3, 4, 5, 6),
                "layers": (3, 3.5, 4, 5, 6),
                "rate-distortion": _prices((0, 1, 2, 2.5, 3, 3.5, 4, 4.5)),
            },
            "vgg16": {
                "tiers": (2.2, 3),
                "uniform": (4, 5, 6),
                "layers": (2, 2.5, 3, 4),
                "rate-distortion": _prices((0, 1, 2, 3, 4, 6)),
            },
        },
        kept={"": (0.1, 0.03), "resnet20": (0.4, 0.2), "vgg16": (0.2,)},
        optimisers={"vgg16": "adam-slow"},
        slow=("vgg16",),
    ),
}


@dataclass(frozen=True)
class Case:
    """One base network: data set, model, seed."""

    dataset: str
    model: str
    seed: int

    def __str__(self):
        return f"{self.dataset}-{self.model}-s{self.seed}"


class Table:
    """A table for the eye: HTML in a notebook, whose numbers are tested in ``results/`` instead.

    Parameters
    ----------
    frame : DataFrame
        What to show.
    digits : int
        Decimals of floating-point columns.
    """

    def __init__(self, frame: pd.DataFrame, digits: int = 2):
        self.frame, self.digits = frame, digits

    def __repr__(self):
        rows, columns = self.frame.shape
        return f"table of {rows} rows and {columns} columns"

    def _repr_html_(self):
        index = not isinstance(self.frame.index, pd.RangeIndex)
        return self.frame.to_html(index=index, float_format=lambda x: f"{x:,.{self.digits}f}")


class Study:
    """All that the notebooks share: one profile's cases, networks, runs, tables and figures.

    Parameters
    ----------
    profile : str
        A key of ``PROFILES``.
    datasets : str
        Comma-separated names that replace the profile's data sets, such as ``mnist`` or, for one
        network only, ``cifar10-jpeg/resnet20``; data sets not in the profile get the networks of
        their kind. Empty: the profile's own.
    seed : int
        Added to the profile's seeds.

    Raises
    ------
    ValueError
        Unknown profile, data set or network; the message lists the known ones.
    """

    def __init__(self, profile: str = "quick", datasets: str = "", seed: int = 0):
        if profile not in PROFILES:
            raise ValueError(f"unknown profile {profile!r}; known: {', '.join(PROFILES)}")
        self.name, self.profile = profile, PROFILES[profile]
        chosen = datasets.split(",") if datasets else self.profile.networks
        self.cases = [
            Case(name.partition("/")[0], model, seed + offset)
            for name in chosen
            for model, seeds in self._networks(*name.split("/", 1)).items()
            for offset in seeds
        ]
        self.results = Path(os.environ.get("RESULTS_ROOT", ROOT / "results")) / profile
        self.figures = Path(os.environ.get("FIGURES_ROOT", ROOT / "figures")) / profile
        # What the paper profile computes in hours is kept and committed, run by run; the quick
        # profile computes anew whenever the code changes.
        store = self.results if profile == "paper" else CACHE / profile / code_digest()[:16]
        if profile == "quick":
            torch.set_num_threads(1)  # the order of sums, and so the outputs, are the same anywhere
        self.checkpoints = store / "checkpoints"
        self.runs = store / "runs"
        self._states: dict[Case, str] = {}
        self.scratch = CACHE / profile
        self.scratch.mkdir(parents=True, exist_ok=True)

    def _networks(self, dataset: str, model: str = "") -> dict[str, tuple[int, ...]]:
        if dataset not in DATASETS:
            raise ValueError(f"unknown data set {dataset!r}; known: {', '.join(DATASETS)}")
        kind = "cifar10-jpeg" if dataset == "cifar10" else dataset
        everywhere = PROFILES["paper"].networks | PROFILES["quick"].networks
        networks = (everywhere | self.profile.networks)[kind]
        if model and model not in networks:
            known = ", ".join(networks)
            raise ValueError(f"unknown network {model!r} of {dataset}; known: {known}")
        return {model: networks[model]} if model else networks

    def first(self, model: str) -> Case:
        """The first case of a model, or the first of all where the profile has none of it."""
        return next((case for case in self.cases if case.model == model), self.cases[0])

    def kept(self, model: str) -> tuple[float, ...]:
        """Shares of weights kept of a model, for comparing criteria; largest first."""
        return self.profile.kept.get(model, self.profile.kept[""])

    def base(self, case: Case, progress: bool = True) -> nn.Module:
        """The trained base network of a case; trained now if it was not before."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        threads = torch.get_num_threads()
        torch.set_num_threads(max(threads, os.cpu_count()))  # training alone uses all cores
        try:
            return base(case.dataset, case.model, case.seed, self.checkpoints, progress)
        finally:
            torch.set_num_threads(threads)

    def base_accuracy(self, case: Case, part: str) -> float:
        """Accuracy of a case's base network on a split, in percent; measured once."""
        network = self.base(case).to(_device())
        return _accuracy(network, case.dataset, part, self._state(case), code_digest())

    def references(self, case: Case, per_class: int | None = None) -> tuple[Tensor, Tensor]:
        """Reference images and labels of a case, drawn from its training split."""
        return sample(*split(case.dataset, "train"), per_class or self.profile.per_class, case.seed)

    def sweep(
        self,
        recipes: dict[str, Recipe],
        knobs: dict[str, Iterable[float]] | None = None,
        cases: list[Case] | None = None,
        per_class: int | None = None,
        as_given: bool = False,
    ) -> pd.DataFrame:
        """Run recipes on cases; a run whose result is there is not done again.

        Parameters
        ----------
        recipes : dict of str to Recipe
            By the name that they have in tables.
        knobs : dict of str to iterable of float, optional
            For each quantizer, settings of its knob that replace the recipe's own, and give way
            to those that the profile has for a model.
        cases : list of Case, optional
            All of the profile's by default.
        per_class : int, optional
            Reference images of each class; the profile's by default.
        as_given : bool
            Keep the recipes' optimisers where the profile has another for a model.

        Returns
        -------
        DataFrame
            A row per run: dataset, model, seed, recipe, knob, per_class, density, file_bytes,
            ratio (float32 ``state_dict`` bytes over ``file_bytes``), bits (of the file per
            weight), val_accuracy and test_accuracy of the model loaded from the file, and the base
            network's (percent).
        """
        cases = self.cases if cases is None else cases
        images = per_class or self.profile.per_class
        for case in cases:
            self.base(case)
        rows = [
            (name, case, variant)
            for case in cases
            for name, recipe in recipes.items()
            for variant in self._variants(
                case, recipe if as_given else self._own(case, recipe), knobs or {}
            )
        ]
        # Variants that differ in their knob alone share a job, equal ones of two names a run.
        jobs: dict[tuple[Case, Recipe], dict[Path, Recipe]] = {}
        for _, case, variant in rows:
            path = self._path(case, variant, images)
            if not path.exists():
                alike = replace(variant.plain, bits=Recipe.bits, lam=Recipe.lam)
                jobs.setdefault((case, alike), {})[path] = variant
        workers = Parallel(n_jobs=cpu_count(), return_as="generator_unordered")
        done = workers(
            delayed(self._run)(case, list(variants.values()), images)
            for (case, _), variants in jobs.items()
        )
        for _ in tqdm(done, total=len(jobs), desc="recipes", disable=not jobs):
            pass
        records = [
            {"recipe": name} | json.loads(self._path(case, variant, images).read_text())
            for name, case, variant in rows
        ]
        columns = ["dataset", "model", "seed", "recipe"]
        table = pd.DataFrame(records).drop(columns="provenance")
        return table[columns + [name for name in table if name not in columns]]

    def _variants(self, case: Case, recipe: Recipe, knobs: dict) -> list[Recipe]:
        knob = KNOBS[recipe.quantizer]
        values = [getattr(recipe, knob)]
        if recipe.quantizer in knobs:
            special = self.profile.special.get(case.model, {})
            values = special.get(recipe.quantizer, knobs[recipe.quantizer])
        return [replace(recipe, **{knob: float(value)}) for value in values]

    def _own(self, case: Case, recipe: Recipe) -> Recipe:
        """The recipe with the optimiser that the profile has for a case's model."""
        if not recipe.finetune or recipe.optimiser != Recipe.optimiser:
            return recipe
        own = self.profile.optimisers.get(case.model, recipe.optimiser)
        return replace(recipe, optimiser=own)

    def compressed(self, case: Case, recipe: Recipe) -> Compressed:
        """The file of a run where it is still there; else the network is compressed anew."""
        record = self._path(case, recipe, self.profile.per_class)
        if record.exists() and self._file(record).exists():
            return Compressed.load(self._file(record))
        return encode(prepare(self.base(case), *self.references(case), recipe), recipe)

    def _path(self, case: Case, recipe: Recipe, per_class: int) -> Path:
        key = json.dumps([asdict(recipe.plain), per_class, self._state(case)], sort_keys=True)
        return self.runs / str(case) / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"

    def _state(self, case: Case) -> str:
        """Digest of a case's base network: a run of another network is another run."""
        if case not in self._states:
            self._states[case] = _digest(self.base(case).state_dict().values())
        return self._states[case]

    def _file(self, record: Path) -> Path:
        return CACHE / self.name / "files" / record.relative_to(self.runs).with_suffix(".xaic")

    def _run(self, case: Case, variants: list[Recipe], per_class: int) -> None:
        torch.set_num_threads(1)
        start, device = time.perf_counter(), _device()
        model = self.base(case).to(device)
        train = split(case.dataset, "train")
        references = self.references(case, per_class)
        removal = variants[0].removal
        data = [*references, *(train if removal.finetune else ())]
        key = (self._state(case), _digest(data), code_digest())
        working, masks = _removed(model, references, train, removal, case.seed, key)
        removed = working.to(device), {name: mask.to(device) for name, mask in masks.items()}
        prepared = prepare(model, *references, variants[0], removed=removed)
        weights = sum(mask.numel() for mask in prepared.masks.values())
        floats = float_bytes(model)
        bases = {f"base_{p}_accuracy": self.base_accuracy(case, p) for p in ("val", "test")}
        for variant in variants:
            record = self._path(case, variant, per_class)
            file = self._file(record)
            file.parent.mkdir(parents=True, exist_ok=True)
            size = encode(prepared, variant).save(file)
            loaded = Compressed.load(file).to_model(model)
            row = asdict(case) | {
                "knob": getattr(variant, KNOBS[variant.quantizer]),
                "per_class": per_class,
                "density": density(prepared.masks),
                "file_bytes": size,
                "ratio": floats / size,
                "bits": 8 * size / weights,
                "val_accuracy": evaluate(loaded, *split(case.dataset, "val")),
                "test_accuracy": evaluate(loaded, *split(case.dataset, "test")),
                **bases,
                "provenance": provenance(start) | {"recipe": asdict(variant)},
            }
            write_json(record, row)

    def save_table(self, name: str, table: pd.DataFrame) -> None:
        """Write ``results/<profile>/<name>.csv``."""
        write(self.results / f"{name}.csv", table.to_csv(index=False, float_format="%.6g"))

    def save_claims(self, notebook: str, claims: list[Claim]) -> Table:
        """Write a notebook's claims to ``results/<profile>/claims-<notebook>.json``, and print."""
        rows = [
            asdict(claim) | {"holds": bool(claim.holds), "notebook": notebook} for claim in claims
        ]
        write_json(self.results / f"claims-{notebook}.json", rows)
        # Near a threshold the verdict may differ between processors: the table shows it, and the
        # tests of results compare it; the printed line is the same on every machine.
        print(f"{len(claims)} claims tested: {', '.join(dict.fromkeys(c.id for c in claims))}")
        return Table(pd.DataFrame(rows).drop(columns="notebook"))

    def load_table(self, name: str) -> pd.DataFrame:
        """Read what ``save_table`` wrote; the message of its error says which notebook to run."""
        path = self.results / f"{name}.csv"
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: make reproduce PROFILE={self.name}")
        return pd.read_csv(path)

    def load_claims(self) -> pd.DataFrame:
        """All claims of the profile, in the order of their notebooks."""
        return pd.DataFrame(read_claims(self.results))

    def save_models(self, best: pd.DataFrame, recipes: dict[str, Recipe]) -> None:
        """Keep the files of chosen runs of the first seed, each beside its record, and no others.

        Files above ``LARGEST_KEPT`` are left out: they would swell the repository.

        Parameters
        ----------
        best : DataFrame
            Of ``lib.claims.smallest_files``.
        recipes : dict of str to Recipe
            Those of which files are kept.
        """
        folder = self.results / "models"
        folder.mkdir(parents=True, exist_ok=True)
        names = set()
        chosen = best[best["recipe"].isin(recipes) & (best["seed"] == self.cases[0].seed)]
        chosen = chosen[chosen["file_bytes"] <= LARGEST_KEPT]
        for row in chosen.itertuples():
            case = Case(row.dataset, row.model, row.seed)
            recipe = self._own(case, recipes[row.recipe])
            recipe = replace(recipe, **{KNOBS[recipe.quantizer]: row.knob})
            record = self._path(case, recipe, row.per_class)
            file = self._file(record)
            name = f"{case}-{row.recipe.replace(', ', '-').replace(' ', '-').replace('%', '')}"
            names.add(name)
            kept = folder / f"{name}.json"
            if kept.exists() and kept.read_text() == record.read_text():
                continue
            if not file.exists():
                self._run(case, [recipe], row.per_class)
            shutil.copy(file, folder / f"{name}.xaic")
            shutil.copy(record, kept)
        ours = tuple(f"{case}-" for case in self.cases)
        for old in folder.iterdir():
            if old.stem not in names and old.name.startswith(ours):
                old.unlink()

    def save_figure(self, name: str, figure) -> None:
        """Write ``figures/<profile>/<name>.png``, the same bytes for the same picture."""
        self.figures.mkdir(parents=True, exist_ok=True)
        partial = self.figures / f".{name}.png"
        figure.savefig(partial, dpi=150, bbox_inches="tight", metadata={"Software": None})
        partial.replace(self.figures / f"{name}.png")


@cache
def split(dataset: str, part: str) -> tuple[Tensor, Tensor]:
    """Images and labels of a split, read once in a process."""
    return load(dataset, part)


def _digest(tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


# Several recipes remove the same weights, and each worker of each notebook asks for the accuracies
# of base networks. Both are kept on disk by all that they depend on.
_memory = Memory(CACHE / "memory", verbose=0)


@_memory.cache(ignore=["network"])
def _accuracy(network: nn.Module, dataset: str, part: str, state: str, code: str) -> float:
    return evaluate(network, *split(dataset, part))


@_memory.cache(ignore=["network", "references", "train"])
def _removed(network, references, train, removal, seed, key):
    working, masks = remove(network, *references, removal, train, seed)
    return working.cpu(), {name: mask.cpu() for name, mask in masks.items()}


def _device() -> torch.device:
    """Where networks are run, with convolutions in float32 proper rather than TF32."""
    torch.backends.cudnn.allow_tf32 = False
    return pick_device()


def float_bytes(model: nn.Module) -> int:
    """Bytes of a network's ``state_dict`` at four bytes an element: what ratios refer to."""
    return sum(4 * value.numel() for value in model.state_dict().values())


def bits_per_layer(study: Study, recipes: dict[str, tuple[Recipe, float]]) -> pd.DataFrame:
    """Bits that each layer's weights take in the file, for the first case of each network.

    Parameters
    ----------
    study : Study
        Its cases are compressed.
    recipes : dict of str to tuple of Recipe and float
        By the name in the table: recipe and setting of its knob.

    Returns
    -------
    DataFrame
        dataset, model, recipe, layer, bits.
    """
    rows = []
    for case in (c for c in study.cases if c.seed == study.cases[0].seed):
        weights = scored_weights(study.base(case))
        for name, (recipe, value) in recipes.items():
            recipe = replace(recipe, **{KNOBS[recipe.quantizer]: float(value)})
            layers = study.compressed(case, recipe).summary()
            for layer, bits in zip(layers["layer"], layers["bits per weight"], strict=True):
                if layer in weights:
                    rows.append({"dataset": case.dataset, "model": case.model, "recipe": name,
                                 "layer": layer, "bits": bits})  # fmt: skip
    return pd.DataFrame(rows)


def read_records(folder: Path) -> list[dict]:
    """Records of all runs in ``folder``, ``Study.runs``, in the order of their paths."""
    return [json.loads(path.read_text()) for path in sorted(folder.rglob("*.json"))]


def read_claims(results: Path) -> list[dict]:
    """All claims of a profile's ``results``, in the order of their notebooks."""
    paths = sorted(results.glob("claims-*.json"))
    return [claim for path in paths for claim in json.loads(path.read_text())]


def cost(folder: Path) -> pd.DataFrame:
    """What runs took, added up from their records.

    Parameters
    ----------
    folder : Path
        As for ``read_records``.

    Returns
    -------
    DataFrame
        dataset, model, processor (of a CPU its capability), seeds, runs and core hours (training
        of the base networks not counted), a row for each network and processor. A run shares its
        preparation with those that differ in their knob alone; it is counted once.
    """
    rows = []
    for row in read_records(folder):
        where = row["provenance"]
        recipe = {k: v for k, v in where["recipe"].items() if k not in KNOBS.values()}
        job = json.dumps([row["seed"], row["per_class"], recipe, where["commit"]])
        hours = where["threads"] * where["seconds"] / 3600
        processor = where["cpu_capability"] if where["device"] == "cpu" else where["device"]
        rows.append((row["dataset"], row["model"], processor, row["seed"], job, hours))
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


def write(path: Path, text: str) -> None:
    """Write a text file whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, text.encode())


def write_json(path: Path, content) -> None:
    """Write JSON as ``write`` does."""
    write(path, json.dumps(content, indent=1) + "\n")


@cache
def code_digest() -> str:
    """SHA-256 of the code that results depend on: ``lib/`` without plots and bookkeeping.

    Comments, docstrings and the layout of lines do not count.
    """
    digest = hashlib.sha256()
    for path in sorted((ROOT / "lib").rglob("*.py")):
        if path.stem not in _BOOKKEEPING:
            tree = ast.parse(path.read_text())
            for node in ast.walk(tree):
                documented = ast.Module | ast.ClassDef | ast.FunctionDef
                if isinstance(node, documented) and ast.get_docstring(node) is not None:
                    del node.body[0]
            digest.update(ast.unparse(tree).encode())
    return digest.hexdigest()


@cache
def _environment() -> dict:
    def git(*words: str) -> str:
        try:
            done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        except FileNotFoundError:
            return "unknown"
        return done.stdout.strip() if done.returncode == 0 else "unknown"

    return {
        "commit": git("rev-parse", "HEAD"),
        "code_changed_since": bool(git("status", "--porcelain", "--", "lib")),
        "code": code_digest(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processor": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
    }


def provenance(start: float) -> dict:
    """Where a result comes from.

    Parameters
    ----------
    start : float
        ``time.perf_counter()`` when the work began.

    Returns
    -------
    dict
        Commit, whether ``lib/`` differs from it, digest of the code, versions, device, threads
        and seconds.
    """
    seconds = round(time.perf_counter() - start, 2)
    return _environment() | {"threads": torch.get_num_threads(), "seconds": seconds}
