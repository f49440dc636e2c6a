"""Products with sigmoid gates: relevance is shared by an equation, conserved, and bounded."""

import random

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


def _written(gate):
    new = torch.ones_like(gate)
    new[:, 1:] = gate[:, 1:] / 2
    return new


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
    "stacked": lambda g: torch.stack([g[:, 0], g[:, 1], 1 - g[:, 2], g[:, 3]], 1),
    "one of two": lambda g: torch.where(torch.tensor([True, False, True, False]), g, 2 * g),
    "clamped": lambda g: g.clamp(0.3, 0.7),
    "cut": lambda g: F.relu(g - 0.2) + 0.1,
    "at least": lambda g: torch.maximum(g, torch.tensor(0.6).double()),
    "square": lambda g: g.square(),
    "power": lambda g: g**3,
    "times itself": lambda g: g * g,
    "root": lambda g: (g + 0.1).sqrt(),
    "a sigmoid of it": lambda g: torch.sigmoid(3 * g),
    "running sum": lambda g: g[..., None].cumsum(2)[..., 0],
    "left as it is": lambda g: F.dropout(g, 0.5, training=False),
    "written into": _written,
    "largest of two": lambda g: torch.stack([g, g / 2]).amax(0),
    "largest and where": lambda g: torch.stack([g / 3, g]).max(0)[0],
    "at least a number": lambda g: torch.max(g, torch.full_like(g, 0.6)),
    "pooled": lambda g: F.max_pool1d(g.repeat_interleave(2, 1)[:, None], 2)[:, 0],
    "pooled to a size": lambda g: F.adaptive_max_pool2d(
        g[:, :, None, None].expand(-1, -1, 3, 3), 1
    ).flatten(1),
    "sorted and back": lambda g: (s := g.sort(1)).values.gather(1, s.indices.argsort(1)),
    "first of the largest": lambda g: torch.stack([g, g - 1, g - 2]).topk(2, 0).values[0],
    "the middle one": lambda g: torch.stack([g, g + 1, g - 1]).median(0).values,
    "running largest": lambda g: torch.stack([g, g - 1]).cummax(0)[0][1],
    "larger of two": lambda g: torch.maximum(g, g - 1),
    "matrix": lambda g: g @ torch.diag(torch.arange(1.0, 5.0)).double(),
}


@pytest.mark.parametrize("shape", SHAPES)
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


SECOND = {
    "sum": lambda g, h: g + 2 * h,
    "difference": lambda g, h: 3 * g - h,
    "product": lambda g, h: g * h,
    "joined": lambda g, h: torch.cat([g[:, :2], h[:, 2:]], 1),
    "shifted product": lambda g, h: g * (1.3 * h - 1) + 2,  # as WavLM has it
}


class TwoGates(Gated):
    """``last(first(x) · join(gate(x), other(x)))``, both of them gates."""

    def __init__(self, join, kind=torch.sigmoid):
        super().__init__()
        self.other, self.join, self.second = nn.Linear(5, 4, bias=False), join, kind

    def forward(self, x):
        gate = self.join(self.gate(x).sigmoid(), self.second(self.other(x)))
        return self.last(self.first(x) * gate)


@pytest.mark.parametrize("join", SECOND)
def test_what_is_made_of_two_gates_is_one(join):
    model, x, y = _case(TwoGates(SECOND[join]))
    scores = weight_relevance(model, x, y)
    with torch.no_grad():
        g, h, rest = model.gate(x).sigmoid(), model.other(x).sigmoid(), torch.tensor(0.5).double()
        together = SECOND[join](g, h)
        signal = model.first(x) * model.last.weight[y]
        # Shapley's value of three: what a factor adds, averaged over the order of the other two,
        # as if the gates came first and were then shared between themselves
        still = rest.expand_as(g)
        alone = SECOND[join](g, still) - SECOND[join](still, still)
        last = SECOND[join](g, h) - SECOND[join](still, h)
        to_gate = signal * (alone + last) / 4
        at_rest = SECOND[join](still, still)
        wanted = {
            "gate.weight": (to_gate / model.gate(x)).T @ x * model.gate.weight,
            "first.weight": (signal / model.first(x) * (together + at_rest) / 2).T
            @ x
            * model.first.weight,
        }
    for name, value in wanted.items():
        torch.testing.assert_close(scores[name], value)
    given = input_relevance(model, x, y).sum(1)
    torch.testing.assert_close(given, model(x).gather(1, y[:, None])[:, 0].detach())


class Mixed(Gated):
    """A gate whose product with the signal is a product of matrices."""

    def __init__(self, multiply):
        super().__init__()
        self.multiply = multiply

    def forward(self, x):
        s, g = (layer(x).view(-1, 2, 2) for layer in (self.first, self.gate))
        return self.last(self.multiply(g.sigmoid(), s).flatten(1))


MATRICES = {
    "matmul": lambda g, s: g @ s,
    "the other way round": lambda g, s: (s.mT @ g.mT).mT,
    "bmm": lambda g, s: torch.bmm(input=g, mat2=s),
    "einsum": lambda g, s: torch.einsum("nij,njk->nik", g, s),
}


@pytest.mark.parametrize("multiply", MATRICES)
def test_a_gate_in_a_product_of_matrices_is_one(multiply):
    model, x, y = _case(Mixed(MATRICES[multiply]))
    scores = weight_relevance(model, x, y)
    with torch.no_grad():
        s, at = (layer(x).view(-1, 2, 2) for layer in (model.first, model.gate))
        down = model.last.weight[y].view(-1, 2, 2)  # gradient at the product
        to_gate = (down @ s.mT) * (at.sigmoid() - 0.5) / 2  # relevance [samples, 2, 2]
        wanted = (to_gate / at).flatten(1).T @ x * model.gate.weight
    torch.testing.assert_close(scores["gate.weight"], wanted)
    model.gate.weight.data.mul_(1e-9)
    small = weight_relevance(model, x, y)["gate.weight"].abs().sum()
    assert 0 < small < 1e-6


def test_a_gate_joined_with_signals_moves_as_they_do():
    model, x, y = _case(TwoGates(torch.add, nn.Identity()))
    scores = weight_relevance(model, x, y)
    with torch.no_grad():
        to_other = model.first(x) * model.last.weight[y] / 2
        wanted = to_other.T @ x * model.other.weight
    torch.testing.assert_close(scores["other.weight"], wanted)
    model.gate.weight.data.mul_(1e-9)
    assert weight_relevance(model, x, y)["gate.weight"].abs().sum() < 1e-6


@pytest.mark.parametrize("name", ["softplus", "logsigmoid"])
def test_what_does_not_rest_at_zero_is_bounded_in_products(name):
    model, x, y = _case(Gated(kind=getattr(F, name)))
    scores = weight_relevance(model, x, y)
    rest = getattr(F, name)(torch.zeros(1)).double()
    with torch.no_grad():
        at, signal = model.gate(x), model.first(x) * model.last.weight[y]
        to_gate = signal * (getattr(F, name)(at) - rest) / 2
        wanted = (to_gate / at).T @ x * model.gate.weight
    torch.testing.assert_close(scores["gate.weight"], wanted, rtol=1e-6, atol=1e-7)
    model.gate.weight.data.mul_(1e-9)
    assert 0 < weight_relevance(model, x, y)["gate.weight"].abs().sum() < 1e-6


SPELT = {
    "relu6": (F.hardsigmoid, lambda x: F.relu6(x + 3) / 6),
    "added in place": (F.hardsigmoid, lambda x: F.relu6(3 + x.clone().add_(0)) * (1 / 6)),
    "hardtanh": (F.hardsigmoid, lambda x: F.hardtanh(x / 6 + 0.5, 0, 1)),
    "clamp": (F.hardsigmoid, lambda x: (x / 6 + 0.5).clamp(0, 1)),
    "clip": (F.hardsigmoid, lambda x: torch.clip(x / 6 + 0.5, min=0.0, max=1.0)),
    "expit": (torch.sigmoid, torch.special.expit),
    "copied": (torch.sigmoid, lambda x: torch.empty_like(x).copy_(x.sigmoid())),
    "softsign": (lambda x: 0.5 + F.softsign(x) / 2, lambda x: (1 + F.softsign(x)) / 2),
}


@pytest.mark.parametrize("name", SPELT)
def test_a_gate_spelt_otherwise_is_the_same(name):
    kind, other = SPELT[name]
    model, x, y = _case(Gated(kind=kind))
    spelt = Gated(kind=other).double()
    spelt.load_state_dict(model.state_dict())
    torch.testing.assert_close(weight_relevance(spelt, x, y), weight_relevance(model, x, y))
    given = input_relevance(spelt, x, y).sum(1)
    torch.testing.assert_close(given, model(x).gather(1, y[:, None])[:, 0].detach())
    spelt.gate.weight.data.mul_(1e-9)
    assert 0 < weight_relevance(spelt, x, y)["gate.weight"].abs().sum() < 1e-6


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


KINDS = (torch.sigmoid, F.hardsigmoid, F.softplus, F.logsigmoid, lambda x: 1 + x.tanh())
ONE = (
    *(SHAPES[name] for name in ("one less", "twice", "clamped", "cut", "square", "power")),
    *(torch.sigmoid, torch.tanh, F.silu, F.gelu, lambda g: g.flip(1), lambda g: g / 3),
)
TWO = (
    *SECOND.values(), torch.maximum, lambda g, h: torch.stack([g, h], 1).mean(1),
    lambda g, h: torch.stack([g, h], 1).amax(1), lambda g, h: torch.cat([g, h], 1).topk(4).values,
    lambda g, h: (g[:, :, None] @ h[:, None]).diagonal(dim1=1, dim2=2),
)  # fmt: skip


class Drawn(Gated):
    """A gate by an expression drawn at random, of one or two layers."""

    def __init__(self, seed):
        super().__init__()
        self.other, self.seed = nn.Linear(5, 4, bias=False), seed

    def forward(self, x):
        draw = random.Random(self.seed)

        def gate(depth):
            if depth == 0 or draw.random() < 0.2:
                return draw.choice(KINDS)(draw.choice((self.gate, self.other))(x))
            if draw.random() < 0.5:
                return draw.choice(ONE)(gate(depth - 1))
            return draw.choice(TWO)(gate(depth - 1), gate(depth - 1))

        return self.last(self.first(x) * gate(3))


@pytest.mark.parametrize("seed", range(40))
def test_whatever_is_made_of_gates_is_bounded_where_they_rest(seed):
    model, x, y = _case(Drawn(seed))
    for layer in (model.gate, model.other):
        layer.weight.data.mul_(1e-9)
    scores = weight_relevance(model, x, y)
    for name in ("gate.weight", "other.weight"):
        assert scores[name].abs().sum() < 1e-6
