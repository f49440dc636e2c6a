"""Quantization-aware training: what is assigned, by what it is weighed, and what training does."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from spread import assert_above, assert_below
from torch import nn

from lib import Compressed, Recipe, compress
from lib.compress import encode, prepare, remove
from lib.finetune import evaluate, finetune
from lib.moments import input_moments
from lib.quantize import ECQx, RateDistortion, Trained
from lib.quantize.trained import Grid, input_means
from lib.score import criterion

WEIGHT = torch.tensor([[0.9, -0.2, 0.4, -1.6, 0.05, 0.0], [0.3, -0.6, 0.1, 0.2, -0.9, 1.4]])


def costs(weight, damage, grid, share, zero):
    """Cost [weights, symbols] of every symbol for every weight, from the equations alone."""
    symbols = torch.arange(-grid.top, grid.top + 1)
    counts = torch.stack([(grid.symbols == s).sum() for s in symbols]).float() + 0.1
    bits = -(counts / counts.sum()).log2()
    squares = (weight.reshape(-1, 1) / grid.step - symbols).square()
    cost = damage.expand(weight.shape).reshape(-1, 1) * squares + share * grid.lam * bits
    factor = zero.expand(weight.shape).reshape(-1, 1)
    return torch.where(symbols == 0, factor * cost, cost), symbols


@pytest.mark.parametrize("zeros", [None, torch.linspace(0.1, 3, 12).reshape(2, 6)])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_grid_assigns_each_weight_to_its_cheapest_symbol(share, zeros):
    damage = torch.linspace(0.2, 2, 12).reshape(2, 6)
    grid = Grid(0.25, 8, damage, 0.3, torch.ones(2, 6, dtype=torch.bool), zeros)
    grid.start(WEIGHT)
    assert torch.equal(grid.symbols, (WEIGHT / 0.25).round())
    cost, symbols = costs(WEIGHT, damage, grid, share, torch.ones(1) if zeros is None else zeros)
    # among the nearest, the next towards zero, and zero
    nearest = (WEIGHT / 0.25).round().reshape(-1, 1)
    near = (symbols == nearest) | (symbols == nearest - nearest.sign()) | (symbols == 0)
    expected = symbols[cost.where(near, math.inf).argmin(1)].reshape(2, 6)
    grid.assign(WEIGHT, share)
    assert torch.equal(grid.symbols.long(), expected)


def test_removed_weights_stay_zero_whatever_they_cost():
    kept = WEIGHT > 0
    grid = Grid(0.25, 8, torch.ones(1), 0.0, kept, 100 * torch.ones(2, 6))
    grid.start(WEIGHT)
    grid.assign(WEIGHT.abs(), 1.0)
    assert bool((grid.symbols[~kept] == 0).all() & (grid.symbols[kept] > 0).any())


def encoded(model, references, store, train, seed=0):
    recipe = Recipe(store=store)
    return encode(prepare(remove(model, *references, recipe, train, seed), *references, recipe),
                  recipe)  # fmt: skip


@pytest.mark.parametrize(
    "store", [Trained("alike", 0.03, steps=40, coded=True), Trained("alike", 0.003, steps=40),
              ECQx(price=0.1, steps=80, bits=3)],
)  # fmt: skip
def test_the_file_holds_the_trained_codes_and_nothing_but_codes(
    store, trained, digits, validation, references
):
    result = encoded(trained, references, store, digits)
    loaded = Compressed.from_bytes(result.to_bytes()).to_model(trained)
    again = encoded(trained, references, store, digits)
    assert result.to_bytes() == again.to_bytes()
    values = []
    for name, value in loaded.state_dict().items():
        if name.endswith("weight") and value.ndim > 1:
            nonzero = value[value != 0].abs()
            steps = nonzero / nonzero.min()
            assert torch.equal(steps, steps.round()), name
            values.append(len(steps.unique()))
    kind = type(store).__name__ + (", coded" if getattr(store, "coded", False) else "")
    assert_below(max(values), 41, f"most sizes of weights in a layer, {kind}")
    assert_above(evaluate(loaded, *validation), 50, f"accuracy of the file of {kind}")


def test_training_takes_back_what_rounding_costs(trained, digits, validation, references):
    untrained = Trained("alike", 0.03, steps=1, rate=1e-6)
    longer = Trained("alike", 0.03, steps=100)
    before, after = (
        encoded(trained, references, store, digits).to_model(trained)
        for store in (untrained, longer)
    )
    gain = evaluate(after, *validation) - evaluate(before, *validation)
    assert_above(gain, 20, "points that training takes back")


def test_what_has_no_grid_moves_at_its_own_scale(digits, references):
    """A LayerNorm at a thousandth of the scale, the layer behind it at a thousand times its own."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(digits[0][0].numel(), 24), nn.LayerNorm(24), nn.ReLU(),
        nn.Linear(24, 10, bias=False),
    )  # fmt: skip
    finetune(model, {}, digits, steps=200)
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in scaled[2].parameters():
            parameter.mul_(2**-10)
        scaled[4].weight.mul_(2**10)
    store = Trained("alike", 0.003, steps=30, rate=0.05)
    removed = remove(model, *references, Recipe(store=store), digits, 0)
    before = removed.network[2].weight
    moved = [
        dict(store.store(r, store.prepare(r, *references), references[0])[0].named_parameters())
        for r in (removed, remove(scaled, *references, Recipe(store=store), digits, 0))
    ]
    assert bool((moved[0]["2.weight"] - before).abs().max() > 0.01)
    assert torch.allclose(moved[1]["2.weight"] * 2**10, moved[0]["2.weight"], atol=1e-3)


def test_biases_make_up_for_the_mean_of_what_assignment_changes(trained, digits, references):
    """Coarse codes without a step of training: each layer keeps the mean that it read."""
    recipe = Recipe(store=Trained("alike", 0.03, steps=1, rate=1e-9))
    removed = remove(trained, *references, recipe, digits, 0)
    details = prepare(removed, *references, recipe).details
    network, codes = recipe.store.store(removed, details, references[0])
    means = input_means(removed.network, references[0])
    for name, code in codes.items():
        bias = name.removesuffix("weight") + "bias"
        before, mean = removed.network.get_parameter(name), means[name]
        rows = (before - code.decode()).detach().reshape(len(mean), -1, mean.shape[1])
        expected = removed.network.get_parameter(bias) + (rows @ mean[..., None]).flatten()
        assert torch.allclose(network.get_parameter(bias), expected, atol=1e-5), name


def test_an_error_costs_what_its_unit_weighs_times_what_its_input_varies(
    trained, digits, references
):
    recipe = Recipe(store=Trained("lrp-epsilon/contrastive", 0.03))
    removed = remove(trained, *references, recipe, digits, 0)
    details = prepare(removed, *references, recipe).details
    _, _, grids = recipe.store.start(removed, details, references[0])
    units = criterion("lrp-epsilon/contrastive").units(removed.network, *references)
    moments = input_moments(removed.network, references[0], centered=True)
    assert grids.keys() == removed.masks.keys()
    for name, grid in grids.items():
        varies = moments[name].diagonal().flatten()  # of a layer in one group
        expected = grid.step**2 * units[name][:, None] * varies
        assert torch.allclose(grid.damage.flatten(1), expected, rtol=1e-4), name


def test_what_units_weigh_decides_about_the_codes(trained, digits, references):
    by = "lrp-epsilon/contrastive"
    files = {
        name: encoded(trained, references, Trained(name, 0.1, steps=20), digits)
        for name in (by, f"reversed:{by}", "alike")
    }
    assert len({result.to_bytes() for result in files.values()}) == 3


def test_relevance_makes_zero_dear_in_ecqx(trained, digits, references):
    """Between the same prices with relevance and without, other weights are kept."""
    seen = []

    class Spy(ECQx):
        def refresh(self, network, grids, prepared):
            super().refresh(network, grids, prepared)
            scores = criterion(self.by)(network, *prepared)
            seen.append({n: (grid.zero.clone(), scores[n].abs()) for n, grid in grids.items()})

    encoded(trained, references, Spy(price=1.0, steps=20), digits)
    assert len(seen) == 10
    least, most, deviations = [], [], []
    for name, (zero, relevance) in seen[-1].items():
        least.append(zero.flatten()[relevance.argmin()])
        most.append(zero.flatten()[relevance.argmax()])
        deviations.append(zero.std())
        assert float(zero.mean()) == pytest.approx(1, abs=1e-4), name
        assert float(zero.min()) >= 0
    assert_above(torch.stack(most).min(), 1, "factor of zero for the most relevant, least")
    assert_below(torch.stack(least).max(), 1, "factor of zero for the least relevant, largest")
    assert_above(torch.stack(deviations).min(), 0.1, "its deviation in a layer, least")


def test_layers_that_are_not_assigned_keep_eight_bits(digits, references):
    class Twice(nn.Module):
        """Calls a layer two times, so that it has no inputs of its own."""

        def __init__(self):
            super().__init__()
            self.first, self.shared, self.last = (
                nn.Linear(784, 16), nn.Linear(16, 16), nn.Linear(16, 10)
            )  # fmt: skip

        def forward(self, x):
            h = self.first(x.flatten(1)).relu()
            return self.last(self.shared(self.shared(h).relu()).relu())

    torch.manual_seed(0)
    model = Twice()
    result = encoded(model, references, Trained("alike", 0.1, steps=10), digits)
    assert set(result.to_model(model).state_dict()) == set(model.state_dict())


def test_training_data_are_asked_for_before_anything_starts(trained, references):
    for store in (Trained("alike", 0.1), ECQx()):
        with pytest.raises(ValueError, match="give it train="):
            compress(trained, *references, Recipe(store=store))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Trained(steps=0), "steps must be positive"),
        (lambda: Trained(rate=0), "rate must lie"),
        (lambda: Trained(price=-1), "price must be positive"),
        (lambda: ECQx(bits=1), "bits must lie"),
        (lambda: ECQx(power=0), "power must lie"),
        (lambda: ECQx(price=0), "price must be positive"),
        (lambda: ECQx(by="nothing"), "unknown criterion"),
    ],
)
def test_fields_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_more_for_a_bit_makes_smaller_files(trained, digits, references):
    for store in (Trained("alike", steps=20), ECQx(steps=20)):
        sizes = [
            encoded(trained, references, store.at(price), digits).nbytes
            for price in ((0.03, 0.3) if isinstance(store, RateDistortion) else (0.3, 30))
        ]
        assert_below(sizes[1] / sizes[0], 0.8, f"smaller file over larger, {type(store).__name__}")


def test_a_bit_of_ecqx_costs_less_in_smaller_layers():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(20, 10), nn.Linear(10, 5))
    masks = {f"{i}.weight": torch.ones_like(network[i].weight, dtype=torch.bool) for i in (0, 1)}
    removed = SimpleNamespace(network=network, masks=masks)
    _, _, grids = ECQx(price=2.0).start(removed, None, None)
    for i, share in ((0, 1.0), (1, 0.25)):
        expected = 2.0 * float(network[i].weight.detach().square().mean()) * share
        assert grids[f"{i}.weight"].lam == pytest.approx(expected)


def test_ecqx_keeps_half_of_the_relevance_of_before(monkeypatch):
    scores = {"w": torch.tensor([4.0, -1.0, 0.0, 1.0])}
    monkeypatch.setattr("lib.quantize.ecqx.criterion", lambda by: lambda *_: scores)
    grids, store = {"w": SimpleNamespace(zero=None)}, ECQx()
    store.refresh(None, grids, ())
    first = torch.tensor([1.0, 0.5, 0.0, 0.5]) / 0.5  # roots over the largest, one in the mean
    assert torch.allclose(grids["w"].zero, first)
    scores["w"] = torch.tensor([0.0, 9.0, 9.0, 0.0])
    store.refresh(None, grids, ())
    assert torch.allclose(grids["w"].zero, (first + torch.tensor([0.0, 2.0, 2.0, 0.0])) / 2)


def test_training_is_as_was_asked_for(monkeypatch):
    seen, network = [], nn.Sequential(nn.Linear(20, 10), nn.Linear(10, 5))
    monkeypatch.setattr("lib.quantize.trained.finetune", lambda *_, **how: seen.append(how))
    masks = {f"{i}.weight": torch.ones_like(network[i].weight, dtype=torch.bool) for i in (0, 1)}
    images = torch.randn(8, 20)
    removed = SimpleNamespace(network=network, masks=masks, seed=7, train=(images, None))
    _, codes = ECQx(steps=3, rate=0.02, bfloat16=True).store(removed, None, images)
    asked = {"seed": 7, "steps": 3, "lr": 0.02, "bfloat16": True}
    assert [{name: how[name] for name in asked} for how in seen] == [asked]
    assert set(codes) == set(masks)
