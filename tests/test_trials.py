"""Variants of coding that are tried beside the library's."""

from itertools import product

import numpy as np
import pytest
import torch

from bench import bench_trials as trials
from lib.linear import View
from lib.quantize import ratedistortion


def allowed(m):
    """Whether multiples of a step are a path of dependent quantization, by its definition."""
    state = 0
    for value in m:
        if state < 2 and value % 2 or state >= 2 and value % 2 == 0 and value != 0:
            return False
        index = abs(value) // 2 if state < 2 else (abs(value) + 1) // 2
        state = trials.NEXT[state][index % 2]
    return True


@pytest.mark.parametrize("seed", range(5))
def test_the_path_of_least_damage_is_found_among_all(seed):
    rng = np.random.default_rng(seed)
    target, damage = rng.normal(0, 1.5, (1, 4)), rng.uniform(0.5, 2, (1, 4))
    tables = trials._Tables(8)
    bits = 0.3 * np.abs(np.arange(-8, 9))[None].repeat(2, 0)  # of a multiple, on either grid
    kept = np.ones(target.shape, bool)
    found, grids = tables._columns(target, damage, kept, bits)
    assert allowed(found[0].astype(int))
    assert set(np.unique(grids)) <= {0, 1}

    def cost(m):
        m = np.array(m)
        return float((damage[0] * (target[0] - m) ** 2).sum() + bits[0][m + 8].sum())

    least = min(cost(m) for m in product(range(-6, 7), repeat=4) if allowed(m))
    assert cost(found[0].astype(int)) == pytest.approx(least)


@pytest.fixture
def layer():
    """Arguments of ``coded`` for a layer of six units with correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(12, 6)
    weight = torch.randn(6, 12, generator=generator)
    inputs = torch.randn(40, 12, generator=generator) @ torch.randn(12, 12, generator=generator)
    moment = (inputs.T @ inputs / len(inputs))[None]
    view = View.of(linear)
    return view, weight, torch.ones(6, 12, dtype=torch.bool), moment


def test_columns_are_paths_and_errors_are_made_up_for(layer):
    view, weight, mask, moment = layer
    units = torch.ones(6)
    lam = 0.01 * ratedistortion.energy(weight, moment) / weight.numel()
    way = trials.Trellis(trials.SCALE)
    codes = way(view, weight, mask, moment, units, lam)
    assert all(allowed(column) for column in codes.symbols.T.tolist())
    assert way.bits > 0

    def damage(decoded):
        return ratedistortion.energy(weight - decoded, moment)

    nearest = (weight / (2 * codes.grid)).round() * 2 * codes.grid
    assert damage(codes.decode()) < damage(nearest)


def test_with_units_alike_all_units_have_the_same_step(layer):
    view, weight, mask, moment = layer
    lam = 0.01 * ratedistortion.energy(weight, moment) / weight.numel()
    plain = ratedistortion.coded(view, weight, mask, moment, torch.ones(6), lam)
    each = trials.a_step_for_each_unit(view, weight, mask, moment, torch.ones(6), lam)
    torch.testing.assert_close(each.decode(), plain.decode())
    finer = trials.a_step_for_each_unit(view, weight, mask, moment, torch.arange(1.0, 7), lam)
    assert (finer.grid.diff() < 0).all()


def test_each_variant_is_compared_with_what_it_varies():
    rows = [
        {"dataset": "digits", "model": "lenet5", "seed": 0, "recipe": name, "knob": knob,
         "file_bytes": size / knob, "val_accuracy": 100 - 4 * knob, "base_val_accuracy": 100.0}
        for name, size in ((trials.USUAL, 100), ("a mask first", 110), (trials.PLAIN, 90),
                           ("dependent quantization", 81))
        for knob in trials.PRICES["lenet5"]
    ]  # fmt: skip
    rows.append(rows[0] | {"recipe": "cut short"})
    rates = trials.rates(trials.pd.DataFrame(rows)).set_index("recipe")
    assert rates["against"].to_dict() == {
        "a mask first": trials.USUAL, "dependent quantization": trials.PLAIN
    }  # fmt: skip
    assert rates["bd_rate"].round(6).to_dict() == {
        "a mask first": 10, "dependent quantization": -10
    }  # fmt: skip
