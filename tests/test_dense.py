"""Dense layers of other classes than nn.Linear: scored, pruned and stored as nn.Linear is."""

import copy

import pytest
import torch
from torch import nn

from lib import Compressed, Recipe, compress
from lib.codec import Constant
from lib.dense import dense_layers
from lib.fold import fold
from lib.quantize import Codes, LayerWidths, Sequential, Tiers, Uniform
from lib.relevance import (
    AGGREGATES,
    UnsupportedLayerError,
    filter_relevance,
    input_relevance,
    scored_weights,
    unit_sensitivity,
    weight_relevance,
)
from lib.score import CRITERIA

pytestmark = pytest.mark.filterwarnings(
    "ignore:the model itself is near chance", "ignore:compression took"
)


class Turned(nn.Module):
    """As GPT-2's Conv1D: the weight is [inputs, outputs]."""

    def __init__(self, inputs, outputs, bias=True):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs**0.5)
        self.bias = nn.Parameter(torch.randn(outputs) / 4) if bias else None

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        out = flat @ self.weight if self.bias is None else torch.addmm(self.bias, flat, self.weight)
        return out.view(*x.shape[:-1], -1)


class Plain(Turned):
    """The weight is [outputs, inputs], but the class is none of torch's."""

    def __init__(self, inputs, outputs, bias=True):
        super().__init__(outputs, inputs, False)
        self.bias = nn.Parameter(torch.randn(outputs) / 4) if bias else None

    def forward(self, x):
        out = torch.einsum("...i,oi->...o", x, self.weight)
        return out if self.bias is None else out + self.bias


class Rectified(Turned):
    def forward(self, x):
        return super().forward(x).relu()


class Counting(Turned):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def _pair(kind=Turned, width=8, bias=True):
    """The same network with such layers, and with nn.Linear."""
    torch.manual_seed(0)
    first, second = kind(8, width, bias), kind(width, 8, bias)
    linear = []
    for layer in (first, second):
        rows = layer.weight.T if kind is not Plain else layer.weight
        same = nn.Linear(rows.shape[1], rows.shape[0], bias)
        same.weight.data = rows.detach().clone()
        if bias:
            same.bias.data = layer.bias.detach().clone()
        linear.append(same)
    head = nn.Linear(8, 3)
    return tuple(
        nn.Sequential(one, nn.ReLU(), other, nn.Tanh(), copy.deepcopy(head)).eval()
        for one, other in ((first, second), linear)
    )


def _data(samples=40):
    torch.manual_seed(1)
    return torch.randn(samples, 8), torch.arange(samples) % 3


def _turned(values, kind):
    return {n: v.T if kind is not Plain and not n.startswith("4") else v for n, v in values.items()}


def test_they_are_known_by_what_they_compute():
    model = nn.Sequential(
        *(Turned(4, 4), Plain(4, 4), Turned(4, 6, False), Rectified(6, 6), nn.Linear(6, 6)),
        *(Counting(6, 5), nn.EmbeddingBag(5, 5)),
    )
    assert dense_layers(model) == {"0": True, "1": False, "2": True, "5": True}
    assert model[5].calls == 0
    with torch.no_grad():
        model[0].weight.zero_()  # both ways the same
    model[1].register_forward_hook(lambda *_: None)
    model[3].weight = model[2].weight
    assert dense_layers(model) == {"5": True}


@pytest.mark.parametrize("kind", [Turned, Plain])
@pytest.mark.parametrize("width, bias", [(8, True), (5, False)])
def test_their_scores_are_those_of_linear_layers(kind, width, bias):
    (model, linear), (x, y) = _pair(kind, width, bias), _data()
    model, linear, x = model.double(), linear.double(), x.double()
    before = copy.deepcopy(model.state_dict())
    for rule in ("epsilon", "zplus", "alpha2beta1", "gamma"):
        for aggregate in AGGREGATES:
            given, wanted = (
                weight_relevance(m, x, y, rule=rule, aggregate=aggregate) for m in (model, linear)
            )
            torch.testing.assert_close(_turned(given, kind), wanted)
            assert all(model.get_parameter(n).shape == v.shape for n, v in given.items())
    assert list(scored_weights(model)) == list(scored_weights(linear))
    for function in (unit_sensitivity, input_relevance):
        torch.testing.assert_close(function(model, x, y), function(linear, x, y))
    sums = filter_relevance(weight_relevance(model, x, y), model)
    torch.testing.assert_close(sums, filter_relevance(weight_relevance(linear, x, y)))
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())


@pytest.mark.parametrize("name", [n for n in CRITERIA if not n.startswith(("lrp", "random"))])
def test_every_criterion_takes_them(name):
    (model, linear), (x, y) = _pair(width=5), _data()
    given, wanted = (CRITERIA[name](m, x, y) for m in (model, linear))
    near = {"rtol": 0.5, "atol": 1} if name == "hessian-trace" else {}  # other random directions
    torch.testing.assert_close(_turned(given, Turned), wanted, **near)


@pytest.mark.parametrize("kind", [Turned, Plain])
@pytest.mark.parametrize(
    "recipe",
    [
        "magnitude", "lrp-paper", "lrp-gradual-rd", "deeplift-baseline", Recipe(store=Sequential()),
        Recipe(store=LayerWidths()), Recipe(store=Tiers()), Recipe(store=Uniform(3)),
    ],
)  # fmt: skip
def test_they_are_stored_as_linear_layers_are(kind, recipe, tmp_path):
    (model, linear), (x, y) = _pair(kind, 16), _data(120)
    given, wanted = (compress(m, x, y, recipe) for m in (model, linear))
    assert given.summary()[0].kept == wanted.summary()[0].kept
    given.save(tmp_path / "model.xaic")
    again = Compressed.load(tmp_path / "model.xaic").to_model(model)
    assert type(again[0]) is kind
    torch.testing.assert_close(again(x), wanted.to_model(linear)(x))
    assert isinstance(given["0.weight"], Codes)


class Reading(nn.Module):
    """Multiplies by the weight of such a layer once more, outside of it."""

    def __init__(self):
        super().__init__()
        self.inner, self.head = Turned(8, 6), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.inner(x).relu() @ self.inner.weight.mT)


def test_one_that_is_read_elsewhere_is_refused_by_name_and_stored_right():
    torch.manual_seed(0)
    model, (x, y) = Reading().eval(), _data()
    assert fold(model, x).dense == {}
    with pytest.raises(UnsupportedLayerError, match="'inner.weight' in 'addmm'.*'inner' .Turned"):
        weight_relevance(model, x, y)
    decoded = compress(model, x, y, Recipe(store=Uniform(8))).to_model(model)
    assert (decoded(x) - model(x)).norm() < 0.03 * model(x).norm()


def test_one_that_stands_in_two_places_stays_one():
    torch.manual_seed(0)
    shared = Turned(8, 8)
    model, (x, y) = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(8, 3)).eval(), _data()
    folded = fold(model, x).network
    assert folded[0] is folded[2] and isinstance(folded[0], nn.Linear)
    logits = model(x).gather(1, y[:, None]).sum()
    logits.backward()
    scores = weight_relevance(model, x, y)
    torch.testing.assert_close(scores["0.weight"], shared.weight.detach() * shared.weight.grad)
    compressed = compress(model, x, y, Recipe(store=Uniform(8)))
    assert compressed["0.weight"] is compressed["2.weight"]
    decoded = compressed.to_model(model)
    assert decoded[0] is decoded[2]
    assert (decoded(x) - model(x)).norm() < 0.03 * model(x).norm()


def test_steps_by_output_channel_are_refused_by_name():
    model = _pair()[0]
    folded = fold(model, _data()[0])
    entries = dict(folded.network.state_dict())
    entries["0.weight"] = Codes(torch.zeros(8, 8).int(), torch.ones(8), "channel")
    with pytest.raises(ValueError, match="'0.weight' is .inputs, outputs.*another kind"):
        folded.unfold(entries)


class BatchNormAct(nn.BatchNorm2d):
    """As timm's: followed by an activation of its own."""

    def __init__(self, channels, act):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class Branching(nn.Sequential):
    """Cannot be traced symbolically."""

    def forward(self, x):
        return super().forward(x if x.sum() < 1e9 else -x)


class Block(nn.Module):
    """Layer and BatchNorm beside each other, but in no nn.Sequential."""

    def __init__(self, act):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), BatchNormAct(4, act)

    def forward(self, x):
        return self.norm(self.conv(x))


@pytest.mark.parametrize("whole", [nn.Sequential, Branching])
@pytest.mark.parametrize("act", [nn.ReLU, nn.PReLU, nn.SiLU])
def test_batchnorm_with_an_activation_is_folded(whole, act):
    torch.manual_seed(0)
    body = (Block(act()), nn.Conv2d(4, 4, 3), BatchNormAct(4, act()))
    model = whole(*body, nn.Flatten(), nn.Linear(64, 3))
    for norm in (model[0].norm, model[2]):
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
        norm.running_mean.normal_(), norm.running_var.uniform_(0.3, 3)
    model, x = model.eval(), torch.randn(24, 3, 8, 8)
    folded = fold(model, x)
    assert folded.pairs == {"0.norm": "0.conv", "2": "1"}
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.network.modules())
    torch.testing.assert_close(folded.network(x), model(x), rtol=1e-4, atol=1e-5)
    y = torch.arange(24) % 3
    compressed = compress(model, x, y, Recipe(store=Uniform(8)))
    for norm in ("0.norm", "2"):
        assert isinstance(compressed[f"{norm}.running_var"], Constant)
        assert isinstance(compressed[f"{norm}.weight"], Constant)
    decoded = compressed.to_model(model)
    assert isinstance(decoded[0].norm, BatchNormAct)
    assert (decoded(x) - model(x)).norm() < 0.03 * model(x).norm()


def test_without_images_such_a_batchnorm_is_left():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct(4, nn.ReLU())).eval()
    assert fold(model).pairs == {}
