"""Closed-form repair against least squares on explicit patches, gathered position by position."""

import copy

import pytest
import torch
from patches import rows
from torch import nn

from lib import leastsquares, repair
from lib import masks as masking
from lib.fold import fold_batchnorm
from study.networks import build


def test_refit_is_least_squares_for_each_unit(layer_case):
    layer, images, kept = layer_case
    dense, masks = nn.Sequential(layer), {"0.weight": kept}
    fitted = repair.refit(dense, masking.apply(dense, masks), masks, images, ridge=1e-9)[0]
    target = layer(images).detach().double()
    for unit in range(len(kept)):
        inputs = rows(layer, images, unit).flatten(0, 1)[:, kept[unit].flatten()]
        if layer.bias is not None:
            inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], 1)
        dim = -1 if isinstance(layer, nn.Linear) else 1
        solution = torch.linalg.lstsq(inputs, target.select(dim, unit).reshape(-1)).solution
        found = fitted.weight[unit][kept[unit]].double()
        assert torch.allclose(found, solution[: len(found)], atol=2e-5)
        assert layer.bias is None or abs(fitted.bias[unit] - solution[-1]) < 2e-5
    assert not fitted.weight[~kept].any()


class Residual(nn.Module):
    """Two branches, in-place activations, a layer called twice and one never called."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.twice = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.up = nn.ConvTranspose2d(4, 4, 2)
        self.head = nn.Linear(4, 3)
        self.unused = nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu_(self.norm(self.stem(x)))
        x = self.up(x + torch.relu_(self.twice(torch.relu_(self.twice(x)))))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def network():
    torch.manual_seed(0)
    model, images = Residual(), torch.randn(80, 1, 6, 6)
    masks = masking.keep_top(
        {
            name: torch.rand(p.shape)
            for name, p in model.named_parameters()
            if p.ndim > 1 and "up" not in name
        },
        0.5,
    )
    return model, masks, images


def test_refit_repairs_a_network_and_touches_nothing_else(network):
    dense, masks, images = network
    pruned = masking.apply(dense, masks)
    before = [copy.deepcopy(model.state_dict()) for model in (dense, pruned)]
    fitted = repair.refit(dense, pruned, masks, images)
    again = repair.refit(dense, pruned, masks, images)
    for model, state in zip((dense, pruned), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    for name, value in fitted.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        assert name not in masks or not value[~masks[name]].any()
    assert fitted.training and not any(m._forward_hooks for m in fitted.modules())
    assert torch.equal(fitted.up.weight, dense.up.weight)
    assert torch.equal(fitted.unused.weight, pruned.unused.weight)
    error = [(m.eval()(images) - dense.eval()(images)).square().mean() for m in (fitted, pruned)]
    assert error[0] < 0.2 * error[1]


def test_a_dense_network_is_left_alone(network):
    dense, masks, images = network
    masks = {name: torch.ones_like(mask) for name, mask in masks.items()}
    fitted = repair.refit(dense, dense, masks, images)
    assert all(
        torch.allclose(value, dense.state_dict()[name], atol=1e-4)
        for name, value in fitted.state_dict().items()
    )


def test_dead_inputs_keep_their_weights():
    dense = nn.Sequential(nn.Linear(4, 3))
    images = torch.randn(50, 4) * torch.tensor([1.0, 0.0, 1.0, 0.0])
    for scale in (1, 0):
        masks = {"0.weight": torch.rand(3, 4) < 0.7}
        pruned = masking.apply(dense, masks)
        weight = repair.refit(dense, pruned, masks, images * scale)[0].weight
        assert torch.allclose(weight[:, 1], pruned[0].weight[:, 1], atol=1e-6)


def test_conjugate_gradients_in_float32(monkeypatch):
    torch.manual_seed(0)
    inputs = torch.randn(400, 60) @ torch.diag(torch.logspace(0, -1.5, 60)) @ torch.randn(60, 60)
    dense, masks = nn.Sequential(nn.Linear(60, 20)), {"0.weight": torch.rand(20, 60) < 0.4}
    pruned = masking.apply(dense, masks)
    fits = []
    for large in (1200, 10):
        monkeypatch.setattr(leastsquares, "LARGE", large)
        fitted = repair.refit(dense, pruned, masks, inputs)
        fits.append((fitted(inputs) - dense(inputs)).square().mean().item())
    assert fits[1] == pytest.approx(fits[0], rel=1e-3)


@pytest.mark.parametrize("smallest", [-1, -14])
def test_a_dense_layer_is_solved_in_float32_where_that_is_enough(smallest, monkeypatch):
    """Where it is not, since the equations are near singular, in float64."""
    torch.manual_seed(0)
    turn = torch.linalg.qr(torch.randn(60, 60, dtype=torch.float64)).Q
    gram = turn @ torch.diag(torch.logspace(0, smallest, 60, dtype=torch.float64)) @ turn.mT
    residual, kept = torch.randn(20, 60, dtype=torch.float64) @ gram, torch.ones(20, 60) > 0
    exact = leastsquares._solve(gram, kept, residual)
    monkeypatch.setattr(leastsquares, "LARGE", 10)
    found = leastsquares._solve(gram, kept, residual)
    assert torch.equal(found, exact) == (smallest == -14)
    cost = [float(((x @ gram - 2 * residual) * x).sum()) for x in (found, exact)]
    assert cost[0] == pytest.approx(cost[1], rel=1e-6)


def test_bias_correction_matches_the_means(network):
    dense, masks, images = network
    rough = masking.apply(
        dense, {name: torch.rand(mask.shape) < 0.8 for name, mask in masks.items()}
    )
    fixed = repair.bias_correction(dense, rough, images)
    with torch.no_grad():
        for name in ("stem", "head"):
            means = []
            for model in (dense, fixed, rough):
                outputs = []
                hook = (
                    model.eval()
                    .get_submodule(name)
                    .register_forward_hook(
                        lambda *seen, outputs=outputs: outputs.append(seen[2].clone())
                    )
                )
                model(images)
                hook.remove()
                means.append(
                    outputs[0].flatten(2).mean((0, 2)) if name == "stem" else outputs[0].mean(0)
                )
            assert torch.allclose(means[1], means[0], atol=1e-5)
            assert not torch.allclose(means[2], means[0], atol=1e-3)
    assert torch.equal(fixed.twice.weight, rough.twice.weight) and fixed.twice.bias is None


def test_renormalised_units_have_the_mean_and_deviation_that_they_had(network):
    dense, masks, images = network
    pruned = masking.apply(dense, masks)
    repaired = repair.renormalise(dense, pruned, masks, images)

    def moments(model, name):
        seen = []
        handle = model.get_submodule(name).register_forward_hook(
            lambda *call: seen.append(call[2].double().transpose(0, 1).flatten(1))
        )
        with torch.no_grad():
            model.eval()(images)
        handle.remove()
        return seen[0].mean(1), seen[0].std(1, correction=0)

    for name in ("stem", "head"):  # a layer called twice feeds itself and cannot be met exactly
        wanted, found = moments(dense, name), moments(repaired, name)
        for goal, value in zip(wanted, found, strict=True):
            torch.testing.assert_close(value, goal, rtol=1e-3, atol=1e-4)
        assert (moments(pruned, name)[1] - wanted[1]).abs().max() > 0.01
    for name, mask in masks.items():
        assert (repaired.get_parameter(name)[~mask] == 0).all()


def test_one_pass_and_pass_after_pass_agree(monkeypatch):
    torch.manual_seed(0)
    dense, images = build("resnet8"), torch.randn(30, 1, 28, 28)
    dense = fold_batchnorm(dense.eval())
    masks = {name: torch.rand(p.shape) < 0.5 for name, p in dense.named_parameters() if p.ndim > 1}
    pruned = masking.apply(dense, masks)
    for call in (
        lambda: repair.refit(dense, pruned, masks, images),
        lambda: repair.bias_correction(dense, pruned, images),
        lambda: repair.renormalise(dense, pruned, masks, images),
    ):
        states = []
        for memory in (repair.MEMORY, 0):
            with monkeypatch.context() as patch:
                patch.setattr(repair, "MEMORY", memory)
                patch.setattr(repair, "BATCH", 7)
                states.append(call().state_dict())
        for name, value in states[0].items():
            torch.testing.assert_close(value, states[1][name], rtol=1e-3, atol=1e-4)


def test_unusable_input(network):
    dense, masks, images = network
    for call in (
        lambda x: repair.refit(dense, dense, masks, x),
        lambda x: repair.bias_correction(dense, dense, x),
        lambda x: repair.renormalise(dense, dense, masks, x),
    ):
        with pytest.raises(ValueError, match="no (reference )?images"):
            call(images[:0])
        with pytest.raises(ValueError, match="not finite|NaN"):
            call(images / 0)
    with pytest.raises(ValueError, match="ridge"):
        repair.refit(dense, dense, masks, images, ridge=0)
    with pytest.raises(ValueError, match="'stem.weight'"):
        repair.refit(dense, dense, {"stem.weight": torch.ones(3) > 0}, images)


def test_every_repair_aims_at_the_dense_network(network):
    """A copy aimed at itself would come back as it was; these come nearer to the dense one."""
    dense, masks, images = network
    pruned = masking.apply(dense, masks)

    def missing(model):
        with torch.no_grad():
            return float((model.eval()(images) - dense.eval()(images)).square().mean())

    for repaired in (
        repair.refit(dense, pruned, masks, images),
        repair.bias_correction(dense, pruned, images),
        repair.renormalise(dense, pruned, masks, images),
    ):
        assert missing(repaired) < 0.5 * missing(pruned)


def test_refit_changes_the_weights_that_have_a_mask_and_no_others(network):
    dense, masks, images = network
    pruned = masking.apply(dense, masks)
    some = {"head.weight": masks["head.weight"]}
    fitted = repair.refit(dense, pruned, some, images)
    for name in masks:
        assert torch.equal(fitted.get_parameter(name), pruned.get_parameter(name)) == (
            name not in some
        )


def test_the_refit_takes_weights_as_they_are(network):
    """It solves for the kept weights; what the mask calls removed is the caller's to remove."""
    dense, masks, images = network
    fitted = repair.refit(dense, dense, masks, images)
    assert all(
        torch.equal(fitted.get_parameter(name)[~mask], dense.get_parameter(name)[~mask])
        for name, mask in masks.items()
    )
