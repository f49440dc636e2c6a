"""Products with sigmoid gates: relevance is shared by an equation, conserved, and bounded."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lib.relevance import Rule, input_relevance, weight_relevance


class Gated(nn.Module):
    """``last(first(x) · gate(x))``, the gate the output of a layer of its own."""

    def __init__(self, shape=lambda gate: gate, kind=torch.sigmoid):
        super().__init__()
        self.first, self.gate = nn.Linear(5, 4, bias=False), nn.Linear(5, 4, bias=False)
        self.last = nn.Linear(4, 3, bias=False)
        self.shape, self.kind = shape, kind

    def forward(self, x):
        return self.last(self.first(x) * self.shape(self.kind(self.gate(x))))


def _case(model, samples=6, seed=0):
    torch.manual_seed(seed)
    for p in model.parameters():
        nn.init.normal_(p)
    labels = torch.randint(0, 3, (samples,))
    return model.double().eval(), torch.randn(samples, 5).double(), labels


def _shares(how, gate, rest):
    """Parts of the relevance of a product that signal and gate get."""
    if how == "half":
        return torch.full_like(gate, 0.5), torch.full_like(gate, 0.5)
    if how == "signal":
        return torch.ones_like(gate), torch.zeros_like(gate)
    return (gate + rest) / (2 * gate), (gate - rest) / (2 * gate)


@pytest.mark.parametrize("kind", [torch.sigmoid, F.hardsigmoid])
@pytest.mark.parametrize("how", ["shapley", "signal", "half"])
def test_gate_shares_by_the_equation_and_conserves(how, kind):
    model, x, y = _case(Gated(kind=kind))
    scores = weight_relevance(model, x, y, rule=Rule(gate=how))
    with torch.no_grad():
        signal, at = model.first(x), model.gate(x)
        gate = kind(at)
        product = signal * gate * model.last.weight[y]  # relevance of each product [samples, 4]
        to_signal, to_gate = (product * part for part in _shares(how, gate, 0.5))
        torch.testing.assert_close(to_signal + to_gate, product)
        # each of the two is a linear layer: R_jk = a_j w_jk R_k / z_k
        wanted = {
            "first.weight": (to_signal / signal).T @ x * model.first.weight,
            "gate.weight": (to_gate / at).T @ x * model.gate.weight,
        }
    for name, score in wanted.items():
        torch.testing.assert_close(scores[name], score)
    logits = model(x).gather(1, y[:, None])[:, 0]
    given = input_relevance(model, x, y, rule=Rule(gate=how)).sum(1)
    torch.testing.assert_close(given, logits.detach())


def test_relevance_is_bounded_where_the_gate_is_at_rest():
    model, x, y = _case(Gated())
    model.gate.weight.data.mul_(1e-9)  # so that sigma(x) / x is huge
    sizes = {
        how: weight_relevance(model, x, y, rule=Rule(gate=how))["gate.weight"].abs().sum().item()
        for how in ("shapley", "signal", "half")
    }
    assert sizes["signal"] == 0 and 0 < sizes["shapley"] < 1e-6 and sizes["half"] > 1
    signal, slope = model.first(x), 1 / 8  # of (sigma(x) - sigma(0)) / 2 x
    bound = (slope * (signal * model.last.weight[y]).abs()).T @ x.abs() * model.gate.weight.abs()
    scores = weight_relevance(model, x, y, aggregate="abs")
    assert (scores["gate.weight"] <= bound * (1 + 1e-9)).all()


SHAPES = {
    "view": lambda g: g.view(-1, 2, 2).flatten(1),
    "unsqueeze": lambda g: g[:, :, None].expand(-1, -1, 2)[..., 0],
    "one less": lambda g: 1 - g,
    "twice": lambda g: 2.0 * g,
    "buffer": lambda g: g * torch.tensor([1.0, 2.0, 3.0, 4.0]).double(),
    "first chunk": lambda g: g.repeat(1, 2).chunk(2, 1)[0],
    "unbound": lambda g: g[None].unbind()[0],
    "turned twice": lambda g: -g.flip(1).roll(1, 1).roll(-1, 1).flip(1),
    "mean": lambda g: g[:, None].repeat(1, 3, 1).mean(1),
    "padded": lambda g: F.pad(g, (0, 2), value=0.5)[:, :4],
    "chunks": lambda g: torch.cat([g[:, :2], g[:, 2:]], 1),
}


@pytest.mark.parametrize("shape", [*SHAPES][:-1])
def test_a_gate_in_another_shape_is_one_still(shape):
    model, x, y = _case(Gated(SHAPES[shape]))
    scores = weight_relevance(model, x, y)
    with torch.no_grad():
        at = model.gate(x)
        gate = SHAPES[shape](at.sigmoid())
        rest = SHAPES[shape](torch.full_like(at, 0.5))
        product = model.first(x) * gate * model.last.weight[y]
        to_gate = product * _shares("shapley", gate, rest)[1]
        wanted = (to_gate / at).T @ x * model.gate.weight
    torch.testing.assert_close(scores["gate.weight"], wanted)
    given = input_relevance(model, x, y).sum(1)
    torch.testing.assert_close(given, model(x).gather(1, y[:, None])[:, 0].detach())


def test_what_is_joined_is_no_gate_but_a_product_of_two_activations():
    model, x, y = _case(Gated(SHAPES["chunks"]))
    for how in ("shapley", "half"):
        scores = weight_relevance(model, x, y, rule=Rule(gate=how))
    torch.testing.assert_close(scores, weight_relevance(model, x, y))


class Unit(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(5, 8, bias=False), nn.Linear(4, 3, bias=False)

    def forward(self, x):
        return self.last(F.glu(self.first(x)))


class Written(Unit):
    def forward(self, x):
        h = self.first(x)
        return self.last(h[:, :4] * h[:, 4:].sigmoid())


def test_gated_linear_unit_is_a_signal_and_a_gate():
    unit, x, y = _case(Unit())
    written = Written().double()
    written.load_state_dict(unit.state_dict())
    for how in ("shapley", "signal", "half"):
        scores, wanted = (weight_relevance(m, x, y, rule=Rule(gate=how)) for m in (unit, written))
        torch.testing.assert_close(scores, wanted)


def test_sigmoid_times_its_own_input_is_silu():
    class Own(Unit):
        def forward(self, x):
            h = self.first(x)[:, :4]
            return self.last(h * h.sigmoid())

    class Silu(Unit):
        def forward(self, x):
            return self.last(F.silu(self.first(x)[:, :4]))

    own, x, y = _case(Own())
    silu = Silu().double()
    silu.load_state_dict(own.state_dict())
    torch.testing.assert_close(weight_relevance(own, x, y), weight_relevance(silu, x, y))


def test_squeeze_and_excitation_does_not_blow_relevance_up():
    shelf = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = shelf.regnet_y_400mf(num_classes=5).double().eval()
    x, y = torch.randn(2, 3, 64, 64).double(), torch.tensor([1, 2])
    first = [
        next(iter(weight_relevance(model, x, y, rule=Rule(gate=how)).values())).abs().sum().item()
        for how in ("shapley", "signal", "half")
    ]
    assert first[0] < 1.01 * first[1] < first[2]


def test_unknown_gate_lists_the_known():
    with pytest.raises(ValueError, match="shapley, signal, half"):
        Rule(gate="tanh")
