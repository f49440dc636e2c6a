"""Weights computed from parameters: the stored ones are scored, or refused by name."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from lib import RECIPES, Recipe, compress
from lib.quantize import Uniform
from lib.relevance import UnsupportedLayerError, input_relevance, unit_sensitivity, weight_relevance


class Standardised(nn.Conv2d):
    """Weight standardisation (Qiao et al. 2019), as timm writes it."""

    def forward(self, x):
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, training=True, momentum=0.0, eps=1e-6)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding)


class ByHand(nn.Conv2d):
    """The same, written out."""

    def forward(self, x):
        w = self.weight
        centred = w - w.mean((1, 2, 3), keepdim=True)
        w = centred / (w.var((1, 2, 3), keepdim=True, correction=0) + 1e-6).sqrt()
        return F.conv2d(x, w, self.bias, self.stride, self.padding)


class Cosine(nn.Linear):
    """A linear layer of rows of length one."""

    def forward(self, x):
        return F.linear(x, F.normalize(self.weight), self.bias)


def network(first, head=None):
    torch.manual_seed(0)
    layers = [first(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, head or nn.Linear(12, 3)).double().eval()


def data(samples=5):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 2, 6, 6, generator=generator).double()
    return x, torch.arange(samples) % 3


def effective(first):
    """The weight that a layer multiplies by, as a constant of its normalisation, on a leaf."""
    leaf = first.weight.detach().clone().requires_grad_()
    centred = leaf - leaf.mean((1, 2, 3), keepdim=True)
    variance = centred.detach().square().mean((1, 2, 3), keepdim=True)
    return leaf, centred / (variance + 1e-6).sqrt()


def test_weight_standardisation_scores_the_stored_weight():
    for kind in (Standardised, ByHand):
        model, (x, y) = network(kind), data()
        scores = weight_relevance(model, x, y)
        leaf, weight = effective(model[0])
        out = F.conv2d(x, weight, model[0].bias)
        for layer in list(model)[1:]:
            out = layer(out)
        out.gather(1, y[:, None]).sum().backward()
        torch.testing.assert_close(scores["0.weight"], leaf.detach() * leaf.grad)
        plain = network(nn.Conv2d)
        plain.load_state_dict(model.state_dict())
        plain[0].weight.data = weight.detach()
        expected = weight_relevance(plain, x, y)
        torch.testing.assert_close(scores["2.weight"], expected["2.weight"])
        # the stored weights of a unit get what its computed ones would: nothing is lost
        torch.testing.assert_close(
            scores["0.weight"].flatten(1).sum(1), expected["0.weight"].flatten(1).sum(1)
        )
        for rule in ("zplus", "gamma", "epsilon-plus-flat"):
            one, other = (weight_relevance(m, x, y, rule=rule) for m in (model, plain))
            torch.testing.assert_close(one["2.weight"], other["2.weight"])
            maps = [input_relevance(m, x, y, rule=rule) for m in (model, plain)]
            torch.testing.assert_close(*maps)
        torch.testing.assert_close(
            weight_relevance(model, x, y, aggregate="abs", batch_size=1)["0.weight"],
            sum(
                weight_relevance(model, x[i : i + 1], y[i : i + 1])["0.weight"].abs()
                for i in range(len(x))
            ),
        )


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrized_weights_score_as_the_weights_they_make(norm):
    model, (x, y) = network(lambda *a: norm(nn.Conv2d(*a))), data()
    scores = weight_relevance(model, x, y)
    name = next(n for n in scores if n.startswith("0."))
    plain = network(lambda *a: norm(nn.Conv2d(*a)))
    parametrize.remove_parametrizations(plain[0], "weight")
    expected = weight_relevance(plain, x, y)
    assert expected["0.weight"].any()
    torch.testing.assert_close(scores[name], expected["0.weight"])


def test_cosine_classifier_holds_the_length_of_its_rows_constant():
    model, (x, y) = network(nn.Conv2d, Cosine(12, 3)), data()
    scores = weight_relevance(model, x, y)
    plain = network(nn.Conv2d)
    plain.load_state_dict(model.state_dict())
    plain[5].weight.data = F.normalize(model[5].weight.data)
    torch.testing.assert_close(scores["5.weight"], weight_relevance(plain, x, y)["5.weight"])


class Scaled(nn.Linear):
    """A learning rate of its own, as in StyleGAN."""

    def forward(self, x):
        return F.linear(x, self.weight * 2, self.bias)


def test_scaled_weights_score_as_those_they_make():
    model, (x, y) = network(nn.Conv2d, Scaled(12, 3)), data()
    plain = network(nn.Conv2d)
    plain.load_state_dict(model.state_dict())
    plain[5].weight.data *= 2
    one, other = (weight_relevance(m, x, y) for m in (model, plain))
    for name, score in one.items():
        torch.testing.assert_close(score, other[name])
    torch.testing.assert_close(input_relevance(model, x, y), input_relevance(plain, x, y))


def test_what_has_no_meaning_for_stored_weights_is_refused_by_name():
    model, (x, y) = network(Standardised), data()
    for call in (unit_sensitivity, lambda *a: compress(*a)):
        with pytest.raises(UnsupportedLayerError, match="'0.weight' is no weight of units"):
            call(model, x, y)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "kind", [Standardised, lambda *a: parametrizations.weight_norm(nn.Conv2d(*a))]
)
def test_recipes_store_the_stored_weight_or_refuse(kind):
    model, (x, y) = network(kind).float(), data(12)
    x = x.float()
    restored = compress(model, x, y, Recipe(store=Uniform(bits=8))).to_model(model)
    torch.testing.assert_close(restored(x), model(x), rtol=0, atol=0.1)
    for recipe in RECIPES:
        if recipe.endswith("finetuned") or recipe == "deeplift-baseline":
            continue
        before = {n: t.clone() for n, t in model.state_dict().items()}
        try:
            result = compress(model, x, y, recipe)
        except UnsupportedLayerError as error:
            assert "0." in str(error)
        else:
            assert result.to_model(model)(x).isfinite().all()
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
