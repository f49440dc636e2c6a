"""What else might make files smaller: variants of coding layer after layer, none of them in lib.

    python bench/bench_trials.py [PROFILE [DATASETS]]

For some base networks and each variant, files at several prices; bytes, and accuracy on validation
images, since these are choices. Writes results/<profile>/trials.csv row by row; interrupted, it
goes on from there. ``06-beyond`` shows the BD-rates of the variants against what each varies.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from bench.peers.run import PROVENANCE, appended
from lib import Recipe, Repair, compress
from lib.codes import storable
from lib.finetune import evaluate
from lib.linear import View
from lib.prune import NonPositive
from lib.quantize import Codes, Sequential, rate_distortion, ratedistortion, sequential
from lib.quantize.columns import code_lengths
from lib.quantize.sizes import step_of
from lib.score import CRITERIA, criterion
from study import Case, Study
from study.bdrate import bd_rates
from study.data import split
from study.records import provenance, write

LRP = "lrp-epsilon/contrastive"
ROOT, PLAIN = f"root:{LRP}", "by entropy"
POWERS = {"1/4": "root:root:", "1/2": "root:", "3/4": "three-quarters:", "1": ""}
NETWORKS = {"lenet300": 3, "lenet5": 3, "resnet20": 1}  # how many seeds; files of others take long
PRICES = {
    "lenet300": (0.01, 0.018, 0.032, 0.056, 0.1, 0.18),
    "lenet5": (0.018, 0.032, 0.056, 0.1, 0.18, 0.32, 0.56),
    "resnet20": (0.0056, 0.01, 0.018, 0.032, 0.056),
}
COUNTS = (5, 20, 200, 500)
"""Reference images of each class, where the profile's own number stands in all other rows."""
SCALE = 0.56  # where the two grids of dependent quantization do about the damage of one
USUAL = "relevance, power 1/2"
KEY = ["dataset", "model", "seed", "recipe"]
FILE = "file_bytes"
Array = NDArray[np.float64]


def usual_step(view: View, weight: Tensor, moment: Tensor, units: Tensor, lam: float) -> float:
    """That of the grid which ``ratedistortion.coded`` takes for a price."""
    sample = ratedistortion._sample(view, weight, moment, units)
    return float(storable(torch.tensor(step_of(lam, sample.cost, sample.largest))))


def a_step_for_each_unit(
    view: View, weight: Tensor, mask: Tensor, moment: Tensor, units: Tensor, lam: float,
    step: float | None = None, *, power: float = 0.25,
) -> Codes:  # fmt: skip
    """As ``ratedistortion.coded``, on grids that are finer for units of larger weight.

    Unit k's step is in proportion to G_k^-power; the file stores each in two bytes.
    """
    rows = view.rows(weight)
    each_unit = view.units(units, rows)
    scale = each_unit.double().clamp_min(1e-12) ** power
    steps = usual_step(view, weight, moment, units, lam) * scale.log().mean().exp() / scale
    steps = storable(steps.clamp_max(2.01 * float(weight.abs().max())).float())  # [units]
    each = steps.reshape(*rows.shape[:2], 1)
    code = rate_distortion(
        (rows / each).flatten(0, 1), second_moment=moment, lam=lam, step=1.0,
        unit_weight=each_unit * steps**2,
        mask=view.rows(mask).flatten(0, 1),
    )  # fmt: skip
    return Codes(view.weight(code.symbols, weight.shape), steps, "channel")


NEXT = ((0, 2), (2, 0), (1, 3), (3, 1))
"""By state and parity of the index the state after it; states 0 and 1 take even multiples."""


class Trellis:
    """Dependent quantization: two grids, and the parities of the indices say which is next.

    Even multiples of a step, or its odd ones and zero. The units of a column are one path, chosen
    by the Viterbi algorithm for least damage + bits; errors are made up for in later columns as
    ``lib.quantize.columns`` does.

    Attributes
    ----------
    bits : float
        Of all that was coded, by the distributions of the indices of either grid.
    scale : float
        Of the step, relative to that of plain codes at the same price.

    References
    ----------
    Schwarz et al.: Hybrid video encoding with trellis-coded quantization, DCC 2019, sections 3
    and 4 (grids, the four states).
    """

    def __init__(self, scale: float):
        self.bits, self.scale = 0.0, scale

    def __call__(
        self, view: View, weight: Tensor, mask: Tensor, moment: Tensor, units: Tensor, lam: float,
        step: float | None = None,
    ) -> Codes:  # fmt: skip
        """As ``ratedistortion.coded``; symbols are multiples of the step."""
        usual = usual_step(view, weight, moment, units, lam)
        grid = storable(torch.tensor([usual * self.scale]))
        rows, step = view.rows(weight).flatten(0, 1), float(grid)
        second, weights, order = ratedistortion._problem(rows, moment, units)
        assert len(second) == 1, "grouped layers are not coded by this trial"
        factor, damped, _ = ratedistortion._triangular(second)
        scaled = (rows[:, order].T / step).double().numpy()  # [d, units]
        kept = view.rows(mask).flatten(0, 1)[:, order].T.numpy()
        top = int(np.abs(scaled).max()) + 8
        tables = _Tables(top)
        chosen, states = tables.start(scaled * kept)
        damage = (weights.double() * step**2).numpy()
        for turn in range(5):
            bits = tables.lengths(chosen, states, kept)
            quadratic = (factor if turn < 2 else damped)[0].double().numpy()
            chosen, states = tables.improved(
                scaled, chosen, kept, quadratic, damage, lam * bits, triangular=turn < 2
            )
        self.bits += tables.total(chosen, states, kept)
        symbols = torch.from_numpy(chosen.T[:, order.argsort()].copy()).int()
        return Codes(view.weight(symbols, weight.shape), grid, "uniform")


class _Tables:
    """Multiples -top … top of a step: on which grid, with an index of which parity."""

    def __init__(self, top: int):
        self.top, m = top, np.arange(-top, top + 1)
        self.there = np.stack([m % 2 == 0, (m % 2 != 0) | (m == 0)])  # [grid, m]
        self.parity = np.stack([np.abs(m) // 2, (np.abs(m) + 1) // 2]) % 2  # of the index

    def start(self, target: Array) -> tuple[Array, Array]:
        """The nearest path, without regard to bits."""
        free = np.zeros((2, 2 * self.top + 1))
        return self._columns(target, np.ones_like(target), np.ones(target.shape, bool), free)

    def lengths(self, chosen: Array, grids: Array, kept: Array) -> Array:
        """Bits [grid, m] of each multiple, by how often its index was chosen on its grid."""
        found = np.full((2, 2 * self.top + 1), np.inf)
        for grid in (0, 1):
            used = chosen[kept & (grids == grid)].astype(int) + self.top
            counts = np.bincount(used, minlength=2 * self.top + 1) + 0.1 * self.there[grid]
            with np.errstate(divide="ignore"):
                found[grid] = -np.log2(counts / counts.sum())
        return found

    def total(self, chosen: Array, grids: Array, kept: Array) -> float:
        """Bits of all indices by their own distributions, one for each grid."""
        bits = 0.0
        for grid in (0, 1):
            counts = np.unique(chosen[kept & (grids == grid)], return_counts=True)[1]
            bits -= float((counts * np.log2(counts / max(1, counts.sum()))).sum())
        return bits

    def improved(
        self, scaled: Array, chosen: Array, kept: Array, quadratic: Array, damage: Array,
        bits: Array, triangular: bool,
    ) -> tuple[Array, Array]:  # fmt: skip
        """Code the columns [d, units] in turn, as ``lib.quantize.columns.code_columns`` does."""
        diagonal = quadratic.diagonal()
        coupling = quadratic / diagonal  # [i, j] = Q_ij / Q_jj
        energy = diagonal**2 if triangular else diagonal
        chosen, errors = chosen.copy(), scaled - chosen
        grids = np.zeros(chosen.shape, int)
        if triangular:
            errors[:] = 0
        for j in range(len(scaled)):
            past = errors[:j] if triangular else errors
            feedback = coupling[: len(past), j] @ past - (0 if triangular else errors[j])
            new, grids[j] = self._columns(
                (scaled[j] + feedback)[None], (energy[j] * damage)[None], kept[j][None], bits
            )
            chosen[j] = new[0]
            errors[j] = scaled[j] - new[0]
        return chosen, grids

    def _columns(
        self, target: Array, damage: Array, kept: Array, bits: Array
    ) -> tuple[Array, Array]:
        """The best path through the units of each column; removed weights are not on it."""
        chosen, grids = np.zeros(target.shape), np.zeros(target.shape, int)
        near = np.arange(-4, 5)
        for j in range(len(target)):
            on = np.flatnonzero(kept[j])
            t = target[j, on]
            tried = np.floor(t)[:, None] + near
            tried = np.concatenate([tried, np.zeros((len(t), 1))], 1).clip(-self.top, self.top)
            at = (tried + self.top).astype(int)
            error = damage[j, on, None] * (t[:, None] - tried) ** 2
            costs, best = np.empty((4, len(t))), np.empty((4, len(t)))
            for grid in (0, 1):
                cost = np.where(self.there[grid][at], error + bits[grid][at], np.inf)
                for parity in (0, 1):
                    own = np.where(self.parity[grid][at] == parity, cost, np.inf)
                    least = own.argmin(1)
                    costs[2 * grid + parity] = own[np.arange(len(t)), least]
                    best[2 * grid + parity] = tried[np.arange(len(t)), least]
            path = _viterbi(costs)
            chosen[j, on] = best[path, np.arange(len(t))]
            grids[j, on] = path // 2
        return chosen, grids


def _viterbi(costs: Array) -> NDArray[np.int64]:
    """Of four costs [2·grid + parity, n] of each unit, those on the path of least cost."""
    inf = float("inf")
    j0, j1, j2, j3 = 0.0, inf, inf, inf
    back = []
    for a0, a1, b0, b1 in costs.T.tolist():
        u, v = j0 + a0, j1 + a1
        n0, f0 = (u, 0) if u <= v else (v, 1)
        u, v = j0 + a1, j1 + a0
        n2, f2 = (u, 0) if u <= v else (v, 1)
        u, v = j2 + b0, j3 + b1
        n1, f1 = (u, 2) if u <= v else (v, 3)
        u, v = j2 + b1, j3 + b0
        n3, f3 = (u, 2) if u <= v else (v, 3)
        back.append((f0, f1, f2, f3))
        j0, j1, j2, j3 = n0, n1, n2, n3
    state = min(range(4), key=(j0, j1, j2, j3).__getitem__)
    path = np.zeros(len(back), int)
    for place in range(len(back) - 1, -1, -1):
        before = back[place][state]
        path[place] = 2 * (before // 2) + NEXT[before].index(state)
        state = before
    return path


@contextmanager
def coding(way: Callable) -> Iterator[None]:
    """Layers are coded this way instead of by ``ratedistortion.coded``."""
    with patch.object(sequential, "coded", way):
        yield


class Entropy:
    """The library's own way of coding; what its symbols take by their distribution in each layer.

    The file takes less, since its coder knows what stands beside a symbol.
    """

    def __init__(self) -> None:
        self.bits = 0.0

    def __call__(self, *arguments: Any, **named: Any) -> Codes:
        """See ``ratedistortion.coded``."""
        codes = ratedistortion.coded(*arguments, **named)
        top = int(codes.symbols.abs().max())
        lengths = code_lengths(codes.symbols, top)
        self.bits += float(lengths[(codes.symbols + top).long()].sum())
        return codes


class Trial:
    """One base network, and files of each variant for a price of a bit."""

    def __init__(self, study: Study, case: Case):
        self.study, self.case, self.model = study, case, study.base(case)
        self.images, self.labels = study.references(case)

    def file(self, by: Any, price: float, images=None, labels=None, **more: Any) -> dict:
        """Of a recipe that codes layer after layer, units weighed by a criterion."""
        images, labels = (self.images, self.labels) if images is None else (images, labels)
        compressed = compress(
            self.model, images, labels, Recipe(store=Sequential(by, price), **more)
        )
        accuracy = evaluate(compressed.to_model(self.model), *split(self.case.dataset, "val"))
        return {FILE: compressed.nbytes, "val_accuracy": accuracy, "compressed": compressed}

    def by_entropy(self, way: Any, price: float) -> dict:
        """The same, its size what the codes of all layers take by their distributions."""
        return self.coded_by(way, price) | {FILE: math.ceil(way.bits / 8)}

    def coded_by(self, way: Callable, price: float) -> dict:
        """A file of which layers are coded in another way."""
        with coding(way):
            return self.file(ROOT, price)

    def twice(self, price: float) -> dict:
        """Units weighed anew in the network that was read from a first file."""
        network = self.file(ROOT, price)["compressed"].to_model(self.model)
        again = criterion(ROOT).units(network, self.images, self.labels)
        fixed = replace(CRITERIA[LRP], name="again", unit_function=lambda *_: again)
        return self.file(fixed, price)

    def predicted(self, price: float) -> dict:
        """With the classes that the network itself gives, in place of labels."""
        with torch.no_grad():
            labels = torch.cat([self.model(x) for x in self.images.split(100)]).argmax(1)
        return self.file(ROOT, price, self.images, labels)

    def referring(self, per_class: int, by: str, price: float) -> dict:
        """From another number of reference images."""
        return self.file(by, price, *self.study.references(self.case, per_class))

    def variants(self) -> dict[str, Callable[[float], dict]]:
        """By name: from a price to a file. ``against`` says what each is compared with."""
        found: dict[str, Callable[[float], dict]] = {"all units alike": partial(self.file, "alike")}
        found[PLAIN] = lambda price: self.by_entropy(Entropy(), price)
        found["dependent quantization"] = lambda price: self.by_entropy(Trellis(SCALE), price)
        for what, plain in (("relevance", LRP), ("Fisher information", "fisher")):
            for power, change in POWERS.items():
                found[f"{what}, power {power}"] = partial(self.file, change + plain)
        gradual = {"remove": NonPositive(LRP, rounds=4, fraction=0.5), "repair": Repair(refit=True)}
        found["a mask first"] = partial(self.file, ROOT, **gradual)
        found["a step for each unit"] = partial(self.coded_by, a_step_for_each_unit)
        found["units weighed anew in the coded network"] = self.twice
        found["the network's own classes for labels"] = self.predicted
        for count in COUNTS[: 3 if self.case.model == "resnet20" else 4]:
            found[f"{count} images of each class"] = partial(self.referring, count, ROOT)
        return found


def against(variant: str) -> str:
    """What a variant is compared with: it differs from that in one thing."""
    return PLAIN if variant == "dependent quantization" else USUAL


def rates(table: pd.DataFrame) -> pd.DataFrame:
    """BD-rates by points of validation accuracy lost, of variants that ran at all prices."""
    asked = table["model"].map(PRICES)
    done = pd.Series([k in ks for k, ks in zip(table["knob"], asked, strict=True)], table.index)
    table = table[done]
    counts = table.groupby(KEY)["knob"].transform("nunique")
    lost = {"val_accuracy": "test_accuracy", "base_val_accuracy": "base_test_accuracy"}
    chosen = table[counts == table["model"].map(PRICES).map(len)].rename(columns=lost)
    names = chosen["recipe"].unique()
    pairs = [(name, against(name)) for name in names if name not in (USUAL, PLAIN)]
    return bd_rates(chosen, pairs)


def main(profile: str = "paper", datasets: str = "") -> None:
    """Run what is missing, and write both tables."""
    torch.set_num_threads(1)
    study = Study(profile, datasets)
    path = study.results / "trials.csv"
    table = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=[*KEY, "knob"])
    for case in (case for case in study.cases if case.seed < NETWORKS.get(case.model, 0)):
        trial = Trial(study, case)
        base = study.base_accuracy(case, "val")
        for name, way in tqdm(trial.variants().items(), desc=str(case)):
            for price in PRICES[case.model]:
                row = asdict(case) | {"recipe": name, "knob": price}
                if (table[[*row]] == list(row.values())).all(axis=1).any():
                    continue
                start = time.perf_counter()
                found = way(price)
                row |= {key: found[key] for key in (FILE, "val_accuracy")}
                made = provenance(start)
                row |= {"base_val_accuracy": base} | {key: made[key] for key in PROVENANCE}
                table = appended(table, row)
                write(path, table.to_csv(index=False))
    write(study.results / "trials-rates.csv", rates(table).to_csv(index=False))


if __name__ == "__main__":
    main(*sys.argv[1:])
