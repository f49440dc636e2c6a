"""Coding layer after layer, against the equations solved anew layer by layer."""

import torch
from small import outputs
from spread import assert_below
from torch import nn

from lib.compress import compress, encode, prepare, remove
from lib.moments import input_moments
from lib.prune import KeepTop
from lib.quantize import RateDistortion, energy, rate_distortion, sequential
from lib.quantize.sequential import Sequential
from lib.recipe import Recipe
from lib.score import CRITERIA


def chain(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 4))


def by_hand(model, images, labels, price, ridge):
    """The same by the equations: lstsq on stacked rows, means, no code shared but the coder's."""
    layers = [model[0], model[2], model[4]]
    units = CRITERIA["fisher"].units(model, images, labels)
    moments = input_moments(model, images, centered=True)
    damage = sum(
        energy(layer.weight, moments[f"{i}.weight"], units[f"{i}.weight"])
        for i, layer in zip((0, 2, 4), layers, strict=True)
    ) / sum(layer.weight.numel() for layer in layers)
    wanted, a, symbols = images.double(), images.double(), []
    for i, layer in zip((0, 2, 4), layers, strict=True):
        weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
        z = wanted @ weight.T + bias  # the dense layer's, from the dense network's inputs
        ones = torch.cat([a, torch.ones(len(a), 1).double()], 1)
        strength = (ridge * (a.square().sum(0).mean())) ** 0.5
        tie = torch.cat([strength * torch.eye(a.shape[1]), torch.zeros(a.shape[1], 1)], 1).double()
        rows = torch.cat([ones, tie])
        goals = torch.cat([z, strength * weight.T])
        solution = torch.linalg.lstsq(rows, goals).solution  # [d + 1, units]
        centred = a - a.mean(0)
        code = rate_distortion(
            solution[:-1].T.float(),
            second_moment=(centred.T @ centred / len(a)).float(),
            unit_weight=units[f"{i}.weight"],
            lam=price * damage,
        )
        weight = code.decode().double()
        bias = (z - a @ weight.T).mean(0)
        symbols.append(code.symbols)
        a, wanted = (a @ weight.T + bias.half().double()).relu(), z.relu()
    return symbols


def test_the_equations_solved_by_hand_give_the_same_symbols():
    model, images = chain().eval(), torch.randn(200, 12) @ torch.randn(12, 12)
    labels = model(images).argmax(1)
    recipe = Recipe(store=Sequential("fisher", price=0.02, ridge=0.05))
    found = compress(model, images, labels, recipe)
    for name, symbols in zip(("0", "2", "4"), by_hand(model, images, labels, 0.02, 0.05),
                             strict=True):  # fmt: skip
        different = (found[f"{name}.weight"].symbols != symbols).float().mean()
        # ties between two symbols of equal cost, settled by rounding
        assert_below(different, 0.03, f"share of symbols that differ, layer {name}")


def test_the_unit_of_damage_is_that_of_coding_all_at_once(trained, references):
    plain, ordered = (Recipe(store=kind("fisher")) for kind in (RateDistortion, Sequential))
    removed = remove(trained, *references, plain)
    measured = [prepare(removed, *references, recipe).details.damage for recipe in (plain, ordered)]
    assert_below(abs(measured[1] / measured[0] - 1), 1e-3, "difference of the two units")


def test_nearly_free_bits_keep_the_function(trained, references):
    recipe = Recipe(store=Sequential("alike", price=1e-9))
    loaded = compress(trained, *references, recipe).to_model(trained).eval()
    expected = trained(references[0])
    error = (loaded(references[0]) - expected).abs().max() / expected.abs().max()
    assert_below(error.item(), 0.02, "largest error of a logit over the largest logit")


def test_outputs_drift_less_than_when_all_layers_are_coded_at_once(trained, references):
    errors = []
    for kind in (RateDistortion, Sequential):
        recipe = Recipe(store=kind("alike", price=0.02))
        removed = remove(trained, *references, recipe)
        compressed = encode(prepare(removed, *references, recipe), recipe)
        with torch.no_grad():
            error = compressed.to_model(trained).eval()(references[0]) - trained(references[0])
        errors.append(float(error.square().mean()))
    assert_below(errors[1] / errors[0], 1, "error layer after layer over all at once")


def test_removed_weights_stay_removed_and_layers_called_twice_are_stored(references):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.flat, self.first = nn.Flatten(), nn.Linear(784, 20)
            self.shared, self.last = nn.Linear(20, 20), nn.Linear(20, 10)

        def forward(self, x):
            x = self.first(self.flat(x)).relu()
            return self.last(self.shared(self.shared(x).relu()).relu())

    model = Twice().eval()
    recipe = Recipe(KeepTop("magnitude", density=0.3), store=Sequential("alike"))
    removed = remove(model, *references, recipe)
    compressed = encode(prepare(removed, *references, recipe), recipe)
    state = compressed.state_dict()
    for name, mask in removed.masks.items():
        assert (state[name][~mask] == 0).all() and (state[name][mask] != 0).any()
    assert compressed["shared.weight"].symbols.abs().max() <= 127


def test_inputs_that_hardly_vary_and_depthwise_layers_are_coded(references):
    class Steady(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first = nn.Conv2d(1, 6, 3)
            self.depth = nn.Conv2d(6, 6, 3, groups=6)
            self.last = nn.Linear(6, 10)

        def forward(self, x):
            x = 100 + 1e-3 * self.first(x)
            return self.last(self.depth(x).mean((2, 3)))

    model = Steady().eval()
    for recipe in (
        Recipe(store=Sequential("alike")),
        Recipe(store=Sequential("alike", price=1e-6)),
    ):
        removed = remove(model, *references, recipe)
        found = encode(prepare(removed, *references, recipe), recipe).to_model(model)
        with torch.no_grad():
            expected = model(references[0])
            error = found(references[0]) - expected
        assert error.abs().max() < 1e-3 * expected.abs().max()


def test_wide_layers_are_coded_in_parts_at_little_loss(monkeypatch):
    """Half the inputs at a time, all of them correlated: the second half makes up for the first."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 30), nn.ReLU(), nn.Linear(30, 4)).eval()
    images = torch.randn(600, 60) @ (torch.eye(60) + 0.2 * torch.randn(60, 60))
    labels = model(images).argmax(1)
    recipe = Recipe(KeepTop("magnitude", density=0.9), store=Sequential("alike", price=0.01))
    removed = remove(model, images, labels, recipe)
    errors, sizes = [], []
    for wide in (5000, 30):
        monkeypatch.setattr(sequential, "WIDE", wide)
        file = encode(prepare(removed, images, labels, recipe), recipe)
        assert file["0.weight"].kind == "uniform"
        assert (file["0.weight"].symbols[~removed.masks["0.weight"]] == 0).all()
        found = file.to_model(model).eval()
        errors.append(float((outputs(found, images) - outputs(model, images)).square().mean()))
        sizes.append(file.nbytes)
    assert_below(errors[1] / errors[0], 1.5, "error in parts over that at once")
    assert_below(sizes[1] / sizes[0], 1.1, "file in parts over that at once")


def test_what_pruning_did_is_taken_back(trained, references):
    images, _ = references
    recipe = Recipe(KeepTop("magnitude", density=0.5), store=Sequential("alike", price=1e-6))
    removed = remove(trained, *references, recipe)
    coded = encode(prepare(removed, *references, recipe), recipe).to_model(trained)
    wanted = outputs(trained, images)
    damage, left = (
        float((outputs(network, images) - wanted).square().mean())
        for network in (removed.network, coded)
    )
    assert_below(left / damage, 0.5, "error left of pruning's")
    state = coded.state_dict()
    assert all((state[name][~mask] == 0).all() for name, mask in removed.masks.items())


def test_means_of_all_outputs_are_those_of_the_dense_network():
    model, images = chain().eval(), torch.randn(300, 12) @ torch.randn(12, 12)
    coarse = Recipe(store=Sequential("alike", price=0.3))
    coded = compress(model, images, model(images).argmax(1), coarse).to_model(model)
    means, wanted = (outputs(network, images).mean(0) for network in (coded, model))
    spread = outputs(model, images).std(0)
    assert ((means - wanted).abs() < 0.01 * spread).all()
