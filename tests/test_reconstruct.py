"""Closed-form repair against least squares on explicit patches, gathered position by position."""

import copy

import pytest
import torch
from torch import nn

from lib import prune, reconstruct
from lib.models import build, fold_batchnorm

LAYERS = {
    "linear": (lambda: nn.Linear(7, 5), (7,)),
    "linear over tokens": (lambda: nn.Linear(7, 5), (3, 7)),
    "conv": (lambda: nn.Conv2d(3, 4, 3, padding=1), (3, 5, 6)),
    "stride, dilation": (lambda: nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(2, 1),
                                           dilation=(1, 2)), (2, 8, 7)),
    "same, circular": (lambda: nn.Conv2d(2, 3, 3, padding="same", padding_mode="circular"),
                       (2, 5, 5)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 6, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), (4, 5, 5)),
    "no bias": (lambda: nn.Conv2d(3, 4, 3, bias=False), (3, 6, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (4, 9)),
}


def rows(layer, images, unit):
    """Inputs [N, positions, d] of one unit, from the layer's derivative by its weights."""
    probe = copy.deepcopy(layer).double()
    probe.weight.data.zero_()
    columns = []
    for index in range(probe.weight[unit].numel()):
        probe.weight.data[unit].view(-1)[index] = 1
        output = probe(images.double()) - (0 if probe.bias is None else probe(images.double() * 0))
        dim = -1 if isinstance(layer, nn.Linear) else 1
        columns.append(output.select(dim, unit).reshape(len(images), -1))
        probe.weight.data.zero_()
    return torch.stack(columns, 2).detach()


@pytest.fixture(params=LAYERS)
def case(request):
    torch.manual_seed(0)
    make, shape = LAYERS[request.param]
    layer = make()
    return layer, torch.randn(60, *shape), torch.rand(layer.weight.shape) < 0.5


def test_refit_is_least_squares_for_each_unit(case):
    layer, images, kept = case
    dense, masks = nn.Sequential(layer), {"0.weight": kept}
    fitted = reconstruct.refit(dense, prune.apply(dense, masks), masks, images,
                               batch_size=17, ridge=1e-9)[0]
    target = layer(images).detach().double()
    for unit in range(len(kept)):
        inputs = rows(layer, images, unit).flatten(0, 1)[:, kept[unit].flatten()]
        if layer.bias is not None:
            inputs = torch.cat([inputs, torch.ones(len(inputs), 1)], 1)
        dim = -1 if isinstance(layer, nn.Linear) else 1
        solution = torch.linalg.lstsq(inputs, target.select(dim, unit).reshape(-1)).solution
        found = fitted.weight[unit][kept[unit]].double()
        assert torch.allclose(found, solution[:len(found)], atol=2e-5)
        assert layer.bias is None or abs(fitted.bias[unit] - solution[-1]) < 2e-5
    assert not fitted.weight[~kept].any()


def test_moments_are_means_over_images_of_sums_over_positions(case):
    layer, images, _ = case
    model = nn.Sequential(layer)
    plain = reconstruct.input_moments(model, images, batch_size=17)["0.weight"]
    centered = reconstruct.input_moments(model, images, centered=True)["0.weight"]
    groups = getattr(layer, "groups", 1)
    for group in range(groups):
        inputs = rows(layer, images, group * len(layer.weight) // groups)
        moment = torch.einsum("npi,npj->ij", inputs, inputs) / len(images)
        found = plain if groups == 1 else plain[group]
        assert torch.allclose(found.double(), moment, atol=1e-4)
        if layer.bias is not None:
            inputs = inputs - inputs.mean((0, 1))
            moment = torch.einsum("npi,npj->ij", inputs, inputs) / len(images)
            found = centered if groups == 1 else centered[group]
            assert torch.allclose(found.double(), moment, atol=1e-4)


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
    masks = prune.keep_top({name: torch.rand(p.shape) for name, p in model.named_parameters()
                            if p.ndim > 1 and "up" not in name}, 0.5)
    return model, masks, images


def test_refit_repairs_a_network_and_touches_nothing_else(network):
    dense, masks, images = network
    pruned = prune.apply(dense, masks)
    before = [copy.deepcopy(model.state_dict()) for model in (dense, pruned)]
    fitted = reconstruct.refit(dense, pruned, masks, images)
    again = reconstruct.refit(dense, pruned, masks, images)
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
    fitted = reconstruct.refit(dense, dense, masks, images)
    assert all(torch.allclose(value, dense.state_dict()[name], atol=1e-4)
               for name, value in fitted.state_dict().items())


def test_dead_inputs_keep_their_weights():
    dense = nn.Sequential(nn.Linear(4, 3))
    images = torch.randn(50, 4) * torch.tensor([1.0, 0.0, 1.0, 0.0])
    for scale in (1, 0):
        masks = {"0.weight": torch.rand(3, 4) < 0.7}
        pruned = prune.apply(dense, masks)
        weight = reconstruct.refit(dense, pruned, masks, images * scale)[0].weight
        assert torch.allclose(weight[:, 1], pruned[0].weight[:, 1], atol=1e-6)


def test_conjugate_gradients_in_float32(monkeypatch):
    torch.manual_seed(0)
    inputs = torch.randn(400, 60) @ torch.diag(torch.logspace(0, -1.5, 60)) @ torch.randn(60, 60)
    dense, masks = nn.Sequential(nn.Linear(60, 20)), {"0.weight": torch.rand(20, 60) < 0.4}
    pruned = prune.apply(dense, masks)
    fits = []
    for large in (1200, 10):
        monkeypatch.setattr(reconstruct, "LARGE", large)
        fitted = reconstruct.refit(dense, pruned, masks, inputs)
        fits.append((fitted(inputs) - dense(inputs)).square().mean().item())
    assert fits[1] == pytest.approx(fits[0], rel=1e-3)


def test_bias_correction_matches_the_means(network):
    dense, masks, images = network
    rough = prune.apply(dense, {name: torch.rand(mask.shape) < 0.8 for name, mask in masks.items()})
    fixed = reconstruct.bias_correction(dense, rough, images, batch_size=17)
    with torch.no_grad():
        for name in ("stem", "head"):
            means = []
            for model in (dense, fixed, rough):
                outputs = []
                hook = model.eval().get_submodule(name).register_forward_hook(
                    lambda *seen, outputs=outputs: outputs.append(seen[2].clone()))
                model(images)
                hook.remove()
                means.append(outputs[0].flatten(2).mean((0, 2)) if name == "stem"
                             else outputs[0].mean(0))
            assert torch.allclose(means[1], means[0], atol=1e-5)
            assert not torch.allclose(means[2], means[0], atol=1e-3)
    assert torch.equal(fixed.twice.weight, rough.twice.weight) and fixed.twice.bias is None


def test_renormalised_units_have_the_mean_and_deviation_that_they_had(network):
    dense, masks, images = network
    pruned = prune.apply(dense, masks)
    repaired = reconstruct.renormalise(dense, pruned, masks, images)

    def moments(model, name):
        seen = []
        handle = model.get_submodule(name).register_forward_hook(
            lambda *call: seen.append(call[2].double().transpose(0, 1).flatten(1)))
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
    pruned = prune.apply(dense, masks)
    for repair in (lambda: reconstruct.refit(dense, pruned, masks, images, batch_size=7),
                   lambda: reconstruct.bias_correction(dense, pruned, images, batch_size=7),
                   lambda: reconstruct.renormalise(dense, pruned, masks, images, batch_size=7)):
        states = []
        for memory in (reconstruct.MEMORY, 0):
            with monkeypatch.context() as patch:
                patch.setattr(reconstruct, "MEMORY", memory)
                states.append(repair().state_dict())
        for name, value in states[0].items():
            torch.testing.assert_close(value, states[1][name], rtol=1e-3, atol=1e-4)


def test_unusable_input(network):
    dense, masks, images = network
    for call in (lambda x: reconstruct.refit(dense, dense, masks, x),
                 lambda x: reconstruct.bias_correction(dense, dense, x),
                 lambda x: reconstruct.input_moments(dense, x)):
        with pytest.raises(ValueError, match="no images"):
            call(images[:0])
        with pytest.raises(ValueError, match="not finite"):
            call(images / 0)
    with pytest.raises(ValueError, match="ridge"):
        reconstruct.refit(dense, dense, masks, images, ridge=0)
    with pytest.raises(ValueError, match="'stem.weight'"):
        reconstruct.refit(dense, dense, {"stem.weight": torch.ones(3) > 0}, images)
