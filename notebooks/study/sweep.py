"""Studies: one profile's base networks, runs that are not computed twice, tables and figures."""

import pickle
import time
from collections.abc import Iterable
from dataclasses import asdict, astuple, fields, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from lib import Compressed, Recipe
from lib.compress import encode, prepare, remove
from lib.finetune import evaluate
from lib.relevance import scored_weights

from . import data, digests, jobs
from .bases import base, checkpoint, is_trained
from .data import sample, split
from .jobs import Job
from .profiles import PROFILES, Case, cases, folder_name
from .progress import bar
from .records import address, base_address, kind, provenance, read_json, write, write_json
from .results import Results, published

LARGEST_KEPT = 1_200_000  # bytes of a compressed model in results/; all of them fit into 20 MB


def _at_default(settings: Any, own: dict[str, Any]) -> Any:
    """A dataclass with these values in those of its fields that were left at their defaults."""
    left = {f.name for f in fields(settings) if getattr(settings, f.name) == f.default}
    return replace(settings, **{name: own[name] for name in own.keys() & left})


class Study(Results):
    """All that the notebooks share: one profile's cases, networks, runs, tables and figures.

    Parameters
    ----------
    profile, datasets
        As for ``profiles.cases``: a key of ``PROFILES``, and names that replace its data sets. Data
        sets not in the profile get the networks of their kind.
    seed, per_class : int
        Added to the profile's seeds; reference images of each class, zero for the profile's. Others
        than the profile's write to folders of their own (``profiles.folder_name``).

    Raises
    ------
    ValueError
        Unknown profile, data set or network; the message lists the known ones.
    """

    def __init__(
        self, profile: str = "quick", datasets: str = "", seed: int = 0, per_class: int = 0
    ):
        super().__init__(folder_name(profile, seed, per_class))
        self.profile = PROFILES[profile]
        self.cases = cases(self.profile, datasets, seed)
        self.per_class = per_class or self.profile.per_class
        if self.name != profile:
            print(f"not the {profile} profile's own: written to {self.results.name}/")
        # What the paper profile computes in hours is kept and committed, run by run; the quick
        # profile computes anew whenever the code changes.
        self.kept_beside_tables = profile == "paper"
        self.scratch = data.CACHE / self.name
        anew = self.scratch / digests.of_code()[:16]
        store = self.results if self.kept_beside_tables else anew
        if profile == "quick":
            torch.set_num_threads(1)  # the order of sums, and so the outputs, are the same anywhere
        self.checkpoints, self.runs = store / "checkpoints", store / "runs"
        self.accuracies = store / "accuracies"
        self.home = store.parent / profile / "checkpoints" if self.kept_beside_tables else None
        self._states: dict[Case, str] = {}
        self.scratch.mkdir(parents=True, exist_ok=True)

    def first(self, model: str) -> Case:
        """The first case of a model, or the first of all where the profile has none of it."""
        return next((case for case in self.cases if case.model == model), self.cases[0])

    def kept(self, model: str) -> tuple[float, ...]:
        """Shares of weights kept of a model, for comparing criteria; largest first."""
        return self.profile.kept.get(model, self.profile.kept[""])

    def base(self, case: Case, progress: bool = True) -> nn.Module:
        """The trained base network of a case; trained now if it was not before."""
        folder = self._folder(case)
        folder.mkdir(parents=True, exist_ok=True)
        threads = torch.get_num_threads()
        if self.kept_beside_tables:  # trained once, while tests train the quick profile's anew
            torch.set_num_threads(max(threads, jobs.cpu_count()))
        try:
            return base(case.dataset, case.model, case.seed, folder, progress)
        finally:
            torch.set_num_threads(threads)

    def checkpoint(self, case: Case) -> Path:
        """The file of a case's base network."""
        return checkpoint(*astuple(case), self._folder(case))

    def _folder(self, case: Case) -> Path:
        if self.home and not is_trained(*astuple(case), self.checkpoints):
            # other reference images need no other network
            return self.home if is_trained(*astuple(case), self.home) else self.checkpoints
        return self.checkpoints

    def base_accuracy(self, case: Case, part: str) -> float:
        """Accuracy of a case's base network on a split, in percent; measured once."""
        name = base_address(self._state(case), case.dataset, part)
        path = self.accuracies / str(case) / f"{name}.json"
        if not path.exists():
            start, network = time.perf_counter(), self.base(case).to(jobs.device())
            accuracy = evaluate(network, *split(case.dataset, part))
            row = asdict(case) | {"split": part, "accuracy": accuracy}
            write_json(path, row | {"provenance": provenance(start)})
        return read_json(path)["accuracy"]

    def references(self, case: Case, per_class: int | None = None) -> tuple[Tensor, Tensor]:
        """Reference images and labels of a case, drawn from its training split."""
        return sample(*split(case.dataset, "train"), per_class or self.per_class, case.seed)

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
            For each quantizer (as ``records`` names it), settings of its knob that replace
            the recipe's own, and give way to those that the profile has for a model; those of
            "more images" where there are so many.
        cases, per_class
            All of the study's, and its number of reference images of each class, by default.
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
        images = per_class or self.per_class
        for case in cases:
            self.base(case)
        rows = [
            (name, case, variant, self._path(case, variant, images))
            for case in cases
            for name, recipe in recipes.items()
            for variant in self._variants(
                case, recipe if as_given else self._own(case, recipe), knobs or {}, images
            )
        ]
        missing = {path: (case, variant) for _, case, variant, path in rows if not path.exists()}
        self._run(missing, images)
        records = [{"recipe": name} | read_json(path) for name, *_, path in rows]
        columns = ["dataset", "model", "seed", "recipe"]
        table = pd.DataFrame(records).drop(columns="provenance")
        table = table[columns + [name for name in table if name not in columns]]
        return published(table).assign(knob=table["knob"])  # exact, by which runs are found again

    def _run(self, missing: dict[Path, tuple[Case, Recipe]], per_class: int) -> None:
        """Do runs, by the paths of their records; here alone results are written."""
        asked, paths, networks = [], [], {}
        for case, variants in jobs.grouped(missing):
            known = {f"base_{p}_accuracy": self.base_accuracy(case, p) for p in ("val", "test")}
            runs = tuple(variants.values())
            asked.append(Job(case, per_class, runs, known, digests.of_code()))
            paths.append(list(variants))
            if case not in networks:
                networks[case] = pickle.dumps(self.base(case))
        finished = jobs.done(asked, networks)
        shown = {"total": len(asked), "desc": "recipes", "leave": False, "disable": not asked}
        for place, results in bar(finished, **shown):
            for path, (record, content) in zip(paths[place], results, strict=True):
                write(self._file(path), content)
                write_json(path, record)

    def _variants(self, case: Case, recipe: Recipe, knobs: dict, images: int) -> list[Recipe]:
        name, values = kind(recipe.store), [recipe.store.value]
        if images == self.profile.more != self.per_class:
            name = "more images"
        if name in knobs:
            values = self.profile.special.get(case.model, {}).get(name, knobs[name])
        return [recipe.at(float(value)) for value in values]

    def _own(self, case: Case, recipe: Recipe) -> Recipe:
        """The recipe with what the profile has for a case's model: optimiser, how it trains."""
        repair, store, known = recipe.repair, recipe.store, self.profile
        if repair.finetune and case.model in known.optimisers:
            repair = _at_default(repair, {"optimiser": known.optimisers[case.model]})
        if store.trains:
            own = known.trained.get("", {}) | known.trained.get(case.model, {})
            store = _at_default(store, own)
        return replace(recipe, repair=repair, store=store)

    def compressed(self, case: Case, recipe: Recipe) -> Compressed:
        """The file of a run where it is still there; else the network is compressed anew."""
        record = self._path(case, recipe, self.per_class)
        if record.exists() and self._file(record).exists():
            return Compressed.load(self._file(record))
        images, train = self.references(case), split(case.dataset, "train")
        removed = remove(self.base(case), *images, recipe, train, case.seed)
        return encode(prepare(removed, *images, recipe), recipe)

    def _path(self, case: Case, recipe: Recipe, per_class: int) -> Path:
        name = address(recipe, per_class, self._state(case))
        return self.runs / str(case) / f"{name}.json"

    def _state(self, case: Case) -> str:
        """Digest of a case's base network: a run of another network is another run."""
        if case not in self._states:
            self._states[case] = digests.of_tensors(self.base(case).state_dict().values())
        return self._states[case]

    def _file(self, record: Path) -> Path:
        return self.scratch / "files" / record.relative_to(self.runs).with_suffix(".xaic")

    def bits_per_layer(self, recipes: dict[str, Recipe]) -> pd.DataFrame:
        """Bits that each layer's weights take in the file, for the first case of each network.

        Columns: dataset, model, recipe (the name), layer, bits.
        """
        rows = []
        for case in (c for c in self.cases if c.seed == self.cases[0].seed):
            weights = scored_weights(self.base(case))
            rows += [
                (case.dataset, case.model, name, layer.layer, layer.bits)
                for name, recipe in recipes.items()
                for layer in self.compressed(case, recipe).summary()
                if layer.layer in weights
            ]
        return pd.DataFrame(rows, columns=["dataset", "model", "recipe", "layer", "bits"])

    def save_models(
        self, best: pd.DataFrame, recipes: dict[str, Recipe], folder: str = "models"
    ) -> None:
        """Keep the chosen runs' files of the first seed up to ``LARGEST_KEPT``, and no others.

        ``best`` is of ``tables.smallest_files``, ``recipes`` are those of which files are kept, and
        ``folder`` begins with ``models``; each notebook has its own.
        """
        self.recover_models(folder)
        chosen = best[best["recipe"].isin(recipes) & (best["seed"] == self.cases[0].seed)]
        pairs = {}
        for row in chosen[chosen["file_bytes"] <= LARGEST_KEPT].itertuples():
            case = Case(row.dataset, row.model, row.seed)
            recipe = self._own(case, recipes[row.recipe]).at(row.knob)
            record = self._path(case, recipe, row.per_class)
            name = f"{case}-{row.recipe.replace(', ', '-').replace(' ', '-').replace('%', '')}"
            kept = self.results / folder / f"{name}.json"
            if kept.exists() and kept.read_text() == record.read_text():
                pairs[name] = kept, kept.with_suffix(".xaic")
                continue
            if not self._file(record).exists():
                self._run({record: (case, recipe)}, row.per_class)
            pairs[name] = record, self._file(record)
        ours = tuple(f"{case}-" for case in self.cases)
        for path in (self.results / folder).glob("*.*"):
            file = path.with_suffix(".xaic")
            if path.suffix == ".json" and file.exists() and not path.name.startswith(ours):
                pairs[path.stem] = path, file
        self.replace_models(pairs, folder)
