"""Weights used outside of their layers, in place, under no_grad: followed, or refused by name."""

import copy

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from oracles import aggregated, by_gradient
from torch import nn

from lib import compress
from lib.relevance import (
    AGGREGATES,
    UnsupportedLayerError,
    input_relevance,
    unit_sensitivity,
    weight_relevance,
)


class Net(nn.Module):
    """Two linear layers, a table, and a forward that the test writes."""

    def __init__(self, function, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(6, 3)
        self.q = nn.Embedding(4, 6)
        self.function = function
        self.double().eval()

    def forward(self, x):
        return self.function(self, x)


def _data(samples=5):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, 4, generator=generator).double()
    return x, torch.arange(samples) % 3


def _expected(model, x, y, aggregate):
    """Weight times gradient of each sample: the epsilon rule of a network of ReLU."""
    return {
        name: aggregated(each, aggregate)
        for name, each in by_gradient(model, x, y).items()
        if each.ndim > 2
    }


def _kept(x):
    return x.relu() * 1  # so that plain autograd allows a change in place


def in_place_not_used(s, x):
    h = _kept(s.a(x))
    h.add_(s.b(x))
    h.mul_(0.5)
    return s.c(h)


def views_that_overlap(s, x):
    h = _kept(s.a(x))
    h[:, :3].add_(1.0)
    h[:, 2:4].mul_(2.0)
    return s.c(h)


def columns_added_to(s, x):
    h = _kept(s.a(x))
    h[:, :3] += s.b(x)[:, :3]
    return s.c(h)


def columns_filled(s, x):
    h = torch.zeros(len(x), 6).double()
    h[:, :3] = s.a(x)[:, :3]
    h[:, 3:] = s.b(x)[:, 3:].relu()
    return s.c(h)


def base_of_a_changed_view(s, x):
    h = s.a(x)
    h.view(-1, 2, 3)[:, 0].relu_()
    return s.c(h)


def result_and_original(s, x):
    h = s.a(x)
    y = h.add_(1.0)
    h.mul_(2.0)
    return s.c(y)


def half_of_the_columns(s, x):
    h = _kept(s.a(x))
    first, second = h[:, :3], h[:, 3:]
    first.zero_()
    return s.c(torch.cat([first, second], 1))


def copied_into(s, x):
    h = torch.empty(len(x), 6).double()
    h.copy_(s.a(x))
    return s.c(F.relu(h, True))


def own_forward(s, x):
    return (x @ s.a.weight.T + s.a.bias).relu() @ s.c.weight.t() + s.c.bias


def as_torch_functions(s, x):
    return torch.addmm(s.c.bias, torch.mm(x, s.a.weight.t()).relu(), s.c.weight.T)


def some_rows_in_a_product(s, x):
    h = torch.cat([x @ s.a.weight[:2].T, F.linear(x, s.a.weight[2:])], 1)
    return s.c((h + s.a.bias).relu())


def rows_of_a_table(s, x):
    return s.c((s.a(x)[:, None] + s.q.weight[1:3]).relu().mean(1))


def one_row(s, x):
    return s.c((s.a(x) + s.q.weight[2]).relu())


def rows_by_index(s, x):
    return s.c((s.a(x) + s.q.weight[torch.tensor([1])]).relu())


FOLLOWED = [
    in_place_not_used, views_that_overlap, columns_added_to, columns_filled, base_of_a_changed_view,
    result_and_original, half_of_the_columns, copied_into, own_forward, as_torch_functions,
    some_rows_in_a_product, rows_of_a_table, one_row, rows_by_index,
]  # fmt: skip


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("function", FOLLOWED, ids=lambda f: f.__name__)
def test_followed_is_weight_times_gradient(function, aggregate):
    model, (x, y) = Net(function), _data()
    scores = weight_relevance(model, x, y, aggregate=aggregate, batch_size=3)
    wanted = _expected(copy.deepcopy(model), x, y, aggregate)
    torch.testing.assert_close(scores, wanted, rtol=1e-9, atol=1e-12)
    assert any(score.any() for score in scores.values())


@pytest.mark.filterwarnings("ignore:the model itself is near chance")
@pytest.mark.parametrize("function", FOLLOWED, ids=lambda f: f.__name__)
def test_followed_has_units_and_inputs_and_compresses(function):
    model, (x, y) = Net(function), _data(12)
    image = x.clone().requires_grad_()
    model(image * 1).gather(1, y[:, None]).sum().backward()
    torch.testing.assert_close(input_relevance(model, x, y), x * image.grad, rtol=1e-9, atol=1e-12)
    units = unit_sensitivity(model, x, y)
    assert all(unit.isfinite().all() for unit in units.values())
    decoded = compress(model, x, y, "lrp-gradual-rd").to_model(model)
    assert decoded(x * 1).isfinite().all()


@pytest.mark.parametrize("rule", ["zplus", "gamma", "alpha2beta1"])
def test_a_product_with_the_transposed_weight_is_its_layer_under_any_rule(rule):
    x, y = _data()
    for other in (own_forward, as_torch_functions):
        model, plain = Net(other), Net(lambda s, x: s.c(s.a(x).relu()))
        if other is as_torch_functions:  # whose first product has no bias
            nn.init.zeros_(model.a.bias), nn.init.zeros_(plain.a.bias)
        else:  # a bias added afterwards takes no part in the sharing
            for net in (model, plain):
                nn.init.zeros_(net.a.bias), nn.init.zeros_(net.c.bias)
        scores, wanted = (weight_relevance(m, x, y, rule=rule) for m in (model, plain))
        torch.testing.assert_close(scores, wanted)


def test_a_slice_of_the_table_counts_with_its_look_ups():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb, self.pos, self.fc = nn.Embedding(7, 4), nn.Embedding(9, 4), nn.Linear(4, 4)

        def forward(self, t):
            h = self.fc(self.emb(t) + self.pos.weight[: t.shape[1]]).relu().mean(1)
            return h @ self.emb.weight.T

    torch.manual_seed(0)
    model, t, y = Tokens().double(), torch.randint(0, 7, (8, 5)), torch.randint(0, 7, (8,))
    torch.testing.assert_close(weight_relevance(model, t, y), _expected(model, t, y, "sum"))
    scores = weight_relevance(model, t, y, aggregate="abs", batch_size=3)
    wanted = _expected(model, t, y, "abs")
    for name in ("pos.weight", "fc.weight"):  # both uses of the other are summed apart
        torch.testing.assert_close(scores[name], wanted[name])


def _without_gradients(s, x):
    with torch.no_grad():
        h = s.a(x).relu()
    return s.c(h)


def _in_inference(s, x):
    with torch.inference_mode():
        h = s.a(x).relu()
    return s.c(h.clone())


def _switched(s, x):
    torch.set_grad_enabled(False)
    h = s.a(x).relu()
    torch.set_grad_enabled(True)
    return s.c(h)


def _detached_weight(s, x):
    return F.linear(F.linear(x, s.a.weight.detach(), s.a.bias).relu(), s.c.weight.data, s.c.bias)


@pytest.mark.parametrize(
    "function", [_without_gradients, _in_inference, _switched, _detached_weight]
)
def test_what_runs_without_gradients_has_its_relevance(function):
    x, y = _data()
    model, plain = Net(function), Net(lambda s, x: s.c(s.a(x).relu()))
    for call in (weight_relevance, input_relevance, unit_sensitivity):
        torch.testing.assert_close(call(model, x, y), call(plain, x, y), rtol=0, atol=0)


REFUSED = {
    "not transposed": lambda s, x: (s.a(x).relu() @ s.a.weight)[:, :3],
    "einsum": lambda s, x: s.c(torch.einsum("ni,oi->no", x, s.a.weight).relu()),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_uses_are_refused_with_the_weight(name):
    x, y = _data()
    for call in (weight_relevance, input_relevance, unit_sensitivity):
        with pytest.raises(UnsupportedLayerError, match="'a.weight'"):
            call(Net(REFUSED[name]), x, y)


def test_reading_its_shape_is_no_use_of_a_weight():
    def read(s, x):
        assert s.a.weight.shape == (6, 4) and s.a.weight.numel() == 24
        torch.zeros_like(s.a.weight)
        return s.c(s.a(x.to(s.a.weight.dtype)).relu())

    x, y = _data()
    torch.testing.assert_close(
        weight_relevance(Net(read), x, y),
        weight_relevance(Net(lambda s, x: s.c(s.a(x).relu())), x, y),
    )


class Experts(nn.Module):
    """A stack of matrices, of which each sample passes one."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stack = nn.Parameter(torch.randn(2, 4, 4))
        self.a, self.c = nn.Linear(4, 4), nn.Linear(4, 3)
        self.double().eval()

    def forward(self, x):
        h = self.a(x).relu()
        h = torch.stack([F.linear(row, self.stack[i % 2]) for i, row in enumerate(h)])
        return self.c(h.relu())


def test_a_part_of_a_parameter_of_no_layer_carries_relevance_and_has_none():
    model, (x, y) = Experts(), _data()
    x = x[:1]  # the only one, so that it passes the same matrix alone and in a batch
    expected = _expected(model, x, y[:1], "sum")
    scores = weight_relevance(model, x, y[:1])
    assert set(scores) == {"a.weight", "c.weight"}
    torch.testing.assert_close(scores, {name: expected[name] for name in scores})


PRODUCTS = {
    "broadcast": lambda h, w: (h[:, None] * (1 * w)[None]).sum(-1),
    "batched": lambda h, w: (w.unsqueeze(0) @ h[:, :, None])[:, :, 0],
    "einsum over heads": lambda h, w: torch.einsum("bi,kmi->bkm", h, w.reshape(2, 3, 6)).flatten(1),
    "row by row": lambda h, w: torch.stack([h @ w[i] for i in range(6)], 1),
    "unbound": lambda h, w: torch.stack([h @ row for row in w.unbind()], 1),
    "computed": lambda h, w: h @ (2 * w).t(),
}


@pytest.mark.parametrize("how", PRODUCTS)
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_a_product_with_a_weight_is_linear_in_the_activation(how, aggregate):
    """No half of the relevance goes astray where a weight is viewed or computed before."""
    model, (x, y) = Net(lambda m, x: m.c(PRODUCTS[how](F.relu(m.a(x)), m.d.weight))), _data()
    model.d = nn.Linear(6, 6).double()
    scores = weight_relevance(model, x, y, aggregate=aggregate, batch_size=1)
    for name, wanted in _expected(model, x, y, aggregate).items():
        if name in ("a.weight", "c.weight", "d.weight"):
            torch.testing.assert_close(scores[name], wanted)


SUMS = {
    "low rank": lambda m, x: F.linear(F.relu(m.a(x)), m.c.weight + m.up @ m.down),
    "table": lambda m, x: m.c((F.relu(m.a(x))[:, None] + (m.d.weight + m.shift)).relu().mean(1)),
}


@pytest.mark.parametrize("how", SUMS)
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_a_weight_added_to_another_is_no_samples_own(how, aggregate):
    model, (x, y) = Net(SUMS[how]), _data()
    model.d = nn.Linear(6, 6).double()
    model.up, model.down = (nn.Parameter(torch.randn(s).double()) for s in ((3, 2), (2, 6)))
    model.shift = nn.Parameter(torch.randn(6).double())
    if aggregate == "sum":
        every = weight_relevance(model, x, y, batch_size=3)
        torch.testing.assert_close(every, weight_relevance(model, x, y, batch_size=1))
        return
    with pytest.raises(UnsupportedLayerError, match="told apart by sample"):
        weight_relevance(model, x, y, aggregate=aggregate, batch_size=3)
    scores = weight_relevance(model, x, y, aggregate=aggregate, batch_size=1)
    single = [weight_relevance(model, *one) for one in zip(x.split(1), y.split(1), strict=True)]
    for name, score in scores.items():
        wanted = aggregated(torch.stack([one[name] for one in single]), aggregate)
        torch.testing.assert_close(score, wanted)


class Own(torch.autograd.Function):
    """A linear layer that torch's functions do not show."""

    @staticmethod
    def forward(ctx, x, w, b):
        ctx.save_for_backward(x, w)
        return x @ w.t() + b

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w, g.t() @ x, g.sum(0)


def _reentrant(model, x):
    return torch.utils.checkpoint.checkpoint(model.a, x, use_reentrant=True)


UNSEEN = {
    "own function": (
        lambda m, x: Own.apply(x, m.a.weight, m.a.bias),
        "the weight 'a.weight' moves",
    ),
    "checkpoint": (_reentrant, "weight 'a.weight' moves"),
    "buffer": (lambda m, x: F.linear(x, m.same, m.a.bias), "shares the memory of .*'a.weight'"),
    "number": (lambda m, x: m.a(x) * float(m.b(torch.ones_like(x[:1])).sum()), "'item'"),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("how", UNSEEN)
def test_a_first_part_that_nobody_sees_is_refused(how):
    function, said = UNSEEN[how]
    model = Net(lambda m, x: m.c(F.relu(function(m, x))))
    if how == "buffer":
        model.register_buffer("same", model.a.weight.data, persistent=False)
    with pytest.raises(UnsupportedLayerError, match=said):
        weight_relevance(model, *_data())


SAME = {
    "bound": (lambda h, g, c: h.clamp(max=g), lambda h, g, c: torch.minimum(h, g)),
    "gain": (
        lambda h, g, c: F.layer_norm(h, (6,), c),
        lambda h, g, c: F.layer_norm(h, (6,)) * c,
    ),
    "sum by name": (lambda h, g, c: torch.add(input=h, other=g), lambda h, g, c: h + g),
    "product by name": (lambda h, g, c: torch.mul(input=h, other=g), lambda h, g, c: h * g),
    "choice by name": (
        lambda h, g, c: torch.where(condition=h > 0, input=h, other=g),
        lambda h, g, c: torch.where(h > 0, h, g),
    ),
    "power by name": (lambda h, g, c: g + torch.pow(input=h, exponent=2), lambda h, g, c: g + h**2),
}  # fmt: skip


@pytest.mark.parametrize("how", SAME)
def test_two_ways_to_write_the_same_have_the_same_relevance(how):
    def net(f):
        return Net(lambda m, x: m.c(f(m.a(x), m.b(x), m.b(torch.ones_like(x[:1]))[0])))

    found = [weight_relevance(net(f), *_data(), batch_size=5) for f in SAME[how]]
    assert all(found[1][name].any() for name in ("a.weight", "b.weight", "c.weight"))
    torch.testing.assert_close(*found)


def test_a_bias_that_is_an_activation_takes_its_share():
    def forward(m, x):
        h, mean = F.relu(m.a(x)), F.relu(m.a(torch.ones_like(x[:1])))[0]
        return m.c(F.relu(F.linear(h, m.d.weight, m.e(mean))))

    model, (x, y) = Net(forward), _data()
    model.d, model.e = (nn.Linear(6, 6).double() for _ in range(2))
    scores = weight_relevance(model, x, y, batch_size=len(x))
    model(x).gather(1, y[:, None]).sum().backward()
    for name in ("a", "d", "e", "c"):
        weight = model.get_submodule(name).weight
        torch.testing.assert_close(scores[f"{name}.weight"], (weight * weight.grad).detach())
