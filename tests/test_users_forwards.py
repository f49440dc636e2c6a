"""Forward passes as users write them: scored right, or refused by name."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from oracles import by_gradient
from small import Forwarded
from torch import nn

from lib import Recipe, Sequential, Uniform, compress
from lib.onnx import to_onnx
from lib.relevance import (
    Rule,
    UnsupportedLayerError,
    input_relevance,
    unit_sensitivity,
    weight_relevance,
)
from lib.relevance.collect import totals

EIGHT = Recipe(store=Uniform(8))
CALLS = {
    "compress": lambda m, x, y: compress(m, x, y, EIGHT),
    "weights": weight_relevance,
    "inputs": input_relevance,
    "units": unit_sensitivity,
}


class Net(Forwarded):
    sizes = {"a": (8, 6), "b": (8, 6), "c": (6, 6), "d": (6, 3)}


def _data(samples=24):
    images = torch.randn(samples, 8, generator=torch.Generator().manual_seed(5)).double()
    return images, torch.arange(samples) % 3


def _net(forward, **layers):
    return Net(forward, **layers).double().eval()


def _check(model, x, y, **how):
    wanted = {name: each.sum(0) for name, each in by_gradient(model, x, y).items()}
    for name, score in weight_relevance(model, x, y, **how).items():
        torch.testing.assert_close(score, wanted[name], msg=lambda said, n=name: f"{n}: {said}")


TOGETHER = {
    "mean over images": lambda m, x: m.d((m.a(x) - m.a(x).mean(0)).relu()),
    "softmax over images": lambda m, x: m.d(m.a(x).softmax(0)),
    "as many steps as images": lambda m, x: m.d(m.a(x) * len(x)),
    "transformer with another first axis": lambda m, x: m.d(m.t(m.a(x)[:, None])[:, 0]),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("way", TOGETHER)
def test_outputs_that_depend_on_other_images_are_refused(way, call):
    model = _net(TOGETHER[way], t=nn.TransformerEncoderLayer(6, 2, 8))
    with pytest.raises(UnsupportedLayerError, match="depends on the others of its batch"):
        CALLS[call](model, *_data())


RANDOM = {
    "paths dropped": lambda m, x: m.d(
        m.a(x).relu() + (torch.rand(len(x), 1) > 0.5) * m.b(x).relu()
    ),
    "dropout": lambda m, x: m.d(F.dropout(m.a(x), 0.1)),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("way", RANDOM)
def test_outputs_that_depend_on_chance_are_refused(way, call):
    torch.manual_seed(1)
    with pytest.raises(UnsupportedLayerError, match="differ from pass to pass"):
        CALLS[call](_net(RANDOM[way]), *_data())


def _closed(model):
    model.forward = lambda x: model.d(model.a(x).relu())
    return model


def _hook_on(model):
    model.gain = nn.Parameter(torch.full((6,), 1.5).double())
    model.a.register_forward_hook(lambda module, inputs, output: output * model.gain)
    return model


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("held", [_closed, _hook_on])
def test_a_function_that_holds_on_to_the_model_is_refused(held, call):
    model = held(_net(lambda m, x: m.d(m.a(x).relu())))
    with pytest.raises(UnsupportedLayerError, match="reads '(a.weight|gain)' of the model itself"):
        CALLS[call](model, *_data())


def test_a_tensor_with_gradients_that_is_no_parameter_is_refused():
    model = _net(lambda m, x: m.d(m.a(x) * m.gain))
    model.gain = torch.ones(6).double().requires_grad_()
    listed = _net(lambda m, x: m.d(m.norms[0](m.a(x))))
    listed.norms = [nn.LayerNorm(6).double()]
    for each in (model, listed):
        with pytest.raises(UnsupportedLayerError, match="no parameter of the model.*ModuleList"):
            weight_relevance(each, *_data())


COMPUTED = {
    "abs": lambda w: w.abs(),
    "clamp": lambda w: w.clamp(-9, 9),
    "cat": lambda w: torch.cat([w[:3], w[3:]]),
    "flip": lambda w: w.flip(0),
    "product": lambda w: 2 * w,
}


@pytest.mark.parametrize("how", COMPUTED)
def test_units_of_a_computed_weight_are_refused(how):
    model = _net(lambda m, x: m.d(F.linear(x, COMPUTED[how](m.a.weight)).relu()))
    _check(model, *_data())
    for ask in (unit_sensitivity, lambda *data: totals(*data, wanted="moments")):
        with pytest.raises(UnsupportedLayerError, match="'a.weight' is no weight of units"):
            ask(model, *_data())
    turned = _net(lambda m, x: m.d(F.linear(m.a(x).relu(), m.a.weight.t())[:, :6].relu()))
    _check(turned, *_data())


def test_images_take_their_share_as_factors():
    x, y = _data()
    model = _net(lambda m, x: m.last(x * m.gate(x).sigmoid()), gate=nn.Linear(8, 8, bias=False),
                 last=nn.Linear(8, 3, bias=False))  # fmt: skip
    with torch.no_grad():
        at = model.gate(x)
        gate = at.sigmoid()
        product = model.last.weight[y] * x * gate
        wanted = (product * (gate - 0.5) / (2 * gate) / at).T @ x * model.gate.weight
    for aggregate in ("sum", "abs"):
        scores = weight_relevance(model, x, y, aggregate=aggregate)
        assert scores["gate.weight"].any()
        if aggregate == "sum":
            torch.testing.assert_close(scores["gate.weight"], wanted)
    signal = weight_relevance(model, x, y, rule=Rule(gate="signal"))
    assert not signal["gate.weight"].any() and signal["last.weight"].any()


def test_attention_over_images_by_hand_is_that_of_torch():
    images = torch.randn(6, 5, 8, generator=torch.Generator().manual_seed(2)).double()

    def by_hand(m, x):
        scores = (m.a(x) @ m.b(x).mT / 6**0.5).softmax(-1)
        return m.last((scores @ x).mean(1))

    def of_torch(m, x):
        return m.last(F.scaled_dot_product_attention(m.a(x), m.b(x), x).mean(1))

    last = nn.Linear(8, 3)
    found = [
        weight_relevance(_net(way, last=copy.deepcopy(last)), images, torch.arange(6) % 3)
        for way in (by_hand, of_torch)
    ]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("rule", ["flat", "box", "epsilon-plus-flat", "epsilon-gamma-box"])
def test_the_first_layer_is_the_one_that_reads_the_images(rule):
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(2)).double()
    layers = {"places": nn.Embedding(4, 6), "conv": nn.Conv2d(3, 6, 4, stride=4, bias=False)}

    def before(m, x):
        places = m.places(torch.arange(4))
        return m.d((m.conv(x).flatten(2).mT + places).relu().mean(1))

    def after(m, x):
        h = m.conv(x).flatten(2).mT
        return m.d((h + m.places(torch.arange(4))).relu().mean(1))

    found = [
        weight_relevance(_net(way, **copy.deepcopy(layers)), images, torch.arange(6) % 3, rule=rule)
        for way in (before, after)
    ]
    torch.testing.assert_close(*found)


def test_every_layer_that_reads_the_images_is_a_first_one():
    def second(m, x):
        h = m.b(x).relu()
        return m.d(m.a(x).relu() + h)

    x, y = _data()
    first = _net(lambda m, x: m.d(m.a(x).relu() + m.b(x).relu()))
    found = [weight_relevance(model, x, y, rule="flat") for model in (first, _net(second))]
    torch.testing.assert_close(*found)
    given = input_relevance(first, x, y, rule="flat").sum(1)
    torch.testing.assert_close(given, first(x).gather(1, y[:, None])[:, 0].detach())


def test_a_rule_for_images_that_no_layer_is_seen_to_read_is_refused():
    model = _net(lambda m, x: m.d(m.a(torch.tensor(x.tolist(), dtype=x.dtype)).relu()))
    weight_relevance(model, *_data())
    with pytest.raises(UnsupportedLayerError, match="'flat' is for the layer that reads the image"):
        weight_relevance(model, *_data(), rule="flat")


@pytest.mark.parametrize("kernel", [2, 3, 4])
def test_padding_takes_no_relevance_whatever_the_kernel(kernel):
    model = _net(
        lambda m, x: m.last(m.conv(x[:, None]).relu().flatten(1)),
        conv=nn.Conv1d(1, 2, kernel, padding="same", bias=False),
        last=nn.Linear(16, 3, bias=False),
    )
    x, y = _data()
    for rule in ("flat", "epsilon"):
        given = input_relevance(model, x, y, rule=rule).sum(1)
        torch.testing.assert_close(given, model(x).gather(1, y[:, None])[:, 0].detach())
    _check(model, x, y)
    rows = [weight_relevance(model, x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
    sums = weight_relevance(model, x, y, aggregate="abs")
    for name, score in sums.items():
        torch.testing.assert_close(score, sum(row[name].abs() for row in rows))


def _part_in_place(m, x):
    gate = m.b(x).sigmoid()
    gate[:, :3] *= 2
    return m.d(m.a(x) * gate)


def _view_in_place(m, x):
    gate = m.b(x).sigmoid()
    part = gate[:, :3]
    part.mul_(2)
    return m.d(m.a(x) * gate)


@pytest.mark.parametrize("way", [_part_in_place, _view_in_place])
def test_a_gate_of_which_a_part_changes_in_place_is_refused(way):
    with pytest.raises(UnsupportedLayerError, match="a part is changed in place.*torch.cat"):
        weight_relevance(_net(way), *_data())


def test_batch_norm_of_a_gate_leaves_it_one():
    gains = torch.tensor([2.0, 2, 2, 1, 1, 1]).double()
    zeros, ones = torch.zeros(6).double(), torch.ones(6).double()
    ways = (
        lambda m, x: m.d(m.a(x) * (m.b(x).sigmoid() * gains)),
        lambda m, x: m.d(m.a(x) * F.batch_norm(m.b(x).sigmoid(), zeros, ones, gains, eps=0.0)),
    )
    torch.testing.assert_close(*(weight_relevance(_net(way), *_data()) for way in ways))


def test_samples_are_found_where_time_comes_first():
    tokens = torch.randint(0, 11, (24, 5), generator=torch.Generator().manual_seed(3))
    labels = torch.arange(24) % 3
    model = _net(
        lambda m, t: m.d(m.a(m.token(t.t()) + m.place(torch.arange(5)[:, None])).relu().mean(0)),
        token=nn.Embedding(11, 8), place=nn.Embedding(5, 8),
    )  # fmt: skip
    for aggregate in ("abs", "rms"):
        both = [
            weight_relevance(model, tokens, labels, aggregate=aggregate, batch_size=size)
            for size in (32, 1)
        ]
        torch.testing.assert_close(*both)


def _pairs(x):
    """Every image is followed by itself in a mirror."""
    return torch.stack([x, x.flip(1)], 1).flatten(0, 1)[: len(x)]


SETS = {
    "mirrored pairs": _pairs,
    "blank at first": lambda x: torch.cat([torch.ones_like(x[:5]), x[5:]]),
    "blank in the middle": lambda x: torch.cat([x[:5], torch.ones_like(x[:5]), x[10:]]),
}
SPREAD = {  # two views of each image as rows, and their mean
    "behind each other": (
        lambda x: torch.cat([x, x.flip(1)]), lambda rows: rows.unflatten(0, (2, -1)).mean(0)
    ),
    "side by side": (
        lambda x: torch.stack([x, x.flip(1)], 1).flatten(0, 1),
        lambda rows: rows.unflatten(0, (-1, 2)).mean(1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("aggregate", ["abs", "rms"])
@pytest.mark.parametrize("images", SETS)
@pytest.mark.parametrize("spread", SPREAD)
def test_samples_are_found_whatever_the_images(spread, images, aggregate):
    views, mean = SPREAD[spread]
    model = _net(lambda m, x: m.d(mean(m.c(m.a(views(x)).relu()).relu())))
    x, y = _data()
    together, apart = (
        weight_relevance(model, SETS[images](x), y, aggregate=aggregate, batch_size=size)
        for size in (16, 1)
    )
    torch.testing.assert_close(together, apart)


def test_samples_that_nothing_tells_apart_are_taken_one_by_one():
    x, y = torch.ones(24, 8).double(), torch.arange(24) % 3
    rows, mean = SPREAD["behind each other"]
    model = _net(lambda m, x: m.d(mean(m.c(m.a(rows(x))))))
    together, apart = (
        weight_relevance(model, x, y, aggregate="abs", batch_size=size) for size in (24, 1)
    )
    torch.testing.assert_close(together, apart)


def _halved(values):
    def forward(m, x):
        h = m.c(m.a(x).relu()).relu()
        values(m.c.weight)[:] /= 2
        h = m.c(h).relu()
        values(m.c.weight)[:] *= 2
        return m.d(h)

    return forward


def _doubled_at_first(m, x):
    m.c.weight.data.mul_(2)
    h = m.c(m.a(x).relu()).relu()
    m.c.weight.data.div_(2)
    return m.d(h)


def _another_norm(m, x):
    h = m.norm(m.a(x)).relu()
    m.norm.weight.data.add_(1)
    h = m.norm(m.c(h)).relu()
    m.norm.weight.data.sub_(1)
    return m.d(h)


WEIGHT = "'c.weight' changes during the forward pass"
CHANGED = {
    "a weight, by data": (_halved(lambda weight: weight.data), WEIGHT),
    "a weight, by numpy": (_halved(lambda weight: weight.detach().numpy()), WEIGHT),
    "a weight, before its one use": (_doubled_at_first, WEIGHT),
    "a norm": (_another_norm, "'norm.weight' changes during the forward pass"),
}


@pytest.mark.parametrize("way", CHANGED)
def test_what_changes_after_it_was_used_unseen_by_torch_is_refused(way):
    forward, said = CHANGED[way]
    for call in (weight_relevance, unit_sensitivity):
        with pytest.raises(UnsupportedLayerError, match=said):
            call(_net(forward, norm=nn.LayerNorm(6)), *_data())


REUSED = {
    "copy_": lambda buffer, values: buffer.copy_(values),
    "an index": lambda buffer, values: buffer.__setitem__(slice(None), values),
    "data": lambda buffer, values: buffer.data.copy_(values),
    "numpy": lambda buffer, values: buffer.numpy().__setitem__(slice(None), values.numpy()),
}


@pytest.mark.parametrize("how", REUSED)
def test_memory_that_a_forward_uses_again_is_read_as_it_was(how):
    def reusing(m, x):
        buffer, total = torch.zeros_like(x), 0
        for turn, layer in enumerate((m.a, m.b, m.a)):
            REUSED[how](buffer, x.roll(turn, 1))
            total = total + layer(buffer).relu()
        return m.d(total)

    def plain(m, x):
        layers = enumerate((m.a, m.b, m.a))
        return m.d(sum(layer(x.roll(turn, 1)).relu() for turn, layer in layers))

    found = [weight_relevance(_net(way), *_data()) for way in (reusing, plain)]
    torch.testing.assert_close(*found)


def test_images_may_change_after_they_are_read():
    def changing(m, x):
        h = m.a(x)
        x.mul_(0)
        return m.d(h.relu())

    x, y = _data()
    found = [weight_relevance(_net(w), x, y) for w in (changing, lambda m, x: m.d(m.a(x).relu()))]
    torch.testing.assert_close(*found)


class Experts(nn.Module):
    """Each image goes through one of three layers."""

    def __init__(self, skip):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.route = nn.Linear(8, 6), nn.Linear(6, 3)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.last, self.skip = nn.Linear(6, 3), skip

    def forward(self, x):
        h = self.a(x).relu()
        choice, out = self.route(h).argmax(1), torch.zeros_like(h)
        for number, expert in enumerate(self.experts):
            rows = torch.where(choice == number)[0]
            if not (self.skip and len(rows) == 0):
                out.index_add_(0, rows, expert(h[rows]).relu())
        return self.last(out)


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.filterwarnings("ignore:no weight of", "ignore:.*take eight bits")
@pytest.mark.filterwarnings("ignore:.*reference image")
def test_experts_that_read_some_images_only(skip):
    model = Experts(skip).eval()
    images = torch.randn(90, 8, generator=torch.Generator().manual_seed(3))
    labels = model(images).argmax(1)
    scores = weight_relevance(model, images, labels)
    single = [weight_relevance(model, images[i : i + 1], labels[i : i + 1]) for i in range(90)]
    for name, score in scores.items():
        torch.testing.assert_close(
            score, sum(each[name] for each in single), rtol=1e-3, atol=1e-4, msg=name
        )
    for name, score in weight_relevance(model, images, labels, aggregate="abs").items():
        wanted = sum(each[name].abs() for each in single)
        torch.testing.assert_close(score, wanted, rtol=1e-3, atol=1e-4, msg=name)
    for recipe in ("lrp-rd", "lrp-gradual-rd", Recipe(store=Sequential(price=1e-6))):
        try:
            packed = compress(model, images, labels, recipe)
        except UnsupportedLayerError as error:
            assert recipe not in ("lrp-rd", "lrp-gradual-rd") and "lrp-rd" in str(error)
        else:
            same = (packed.to_model(model)(images).argmax(1) == labels).float().mean()
            assert same > 0.5


def test_layers_without_an_axis_of_samples():
    images = torch.randn(6, 2, 8, generator=torch.Generator().manual_seed(2)).double()
    for conv in (nn.Conv1d(2, 6, 3, bias=False), nn.ConvTranspose1d(2, 6, 3, bias=False)):
        alone = _net(
            lambda m, x: torch.stack([m.d(m.conv(i).relu().mean(1)) for i in x]), conv=conv
        )
        _check(alone, images, torch.arange(6) % 3)
        compress(alone, images, torch.arange(6) % 3, "uniform")
    rows = _net(
        lambda m, x: torch.stack([F.linear(m.a(x).relu(), m.d.weight[i]) for i in range(3)], 1)
    )
    _check(rows, *_data())


KERNELS = {
    "made here": lambda m, h: F.conv1d(h[:, None], torch.ones(1, 1, 3, dtype=h.dtype), padding=1)[
        :, 0
    ],
    "of a buffer": lambda m, h: F.conv1d(h[:, None], m.filter.repeat(1, 1, 1), padding=1)[:, 0],
    "of a parameter": lambda m, h: F.linear(h, m.own * (m.own.detach() > 0)),
}


@pytest.mark.parametrize("way", KERNELS)
def test_a_constant_may_be_a_weight(way):
    model = _net(lambda m, x: m.d(KERNELS[way](m, m.a(x)).relu()))
    model.register_buffer("filter", torch.tensor([[[1.0, -2, 1]]]).double())
    model.own = nn.Parameter(torch.randn(6, 6).double())
    _check(model, *_data())


def test_a_weight_made_of_images_or_held_as_a_plain_tensor_is_refused():
    made = _net(lambda m, x: m.d(F.linear(m.a(x), m.c.weight.new_ones(6, 6) + 0 * x.sum())))
    held = _net(lambda m, x: m.d(F.linear(m.a(x), m.plain)))
    held.plain = torch.ones(6, 6).double()
    for model in (made, held):
        with pytest.raises(UnsupportedLayerError, match="a buffer if it is a constant"):
            weight_relevance(model, *_data())


ARRANGED = {
    "rot90": lambda h: torch.rot90(h[:, None], 2, (1, 2))[:, 0],
    "fliplr": torch.fliplr,
    "ravel": lambda h: h.ravel().view_as(h),
    "hsplit": lambda h: torch.cat(torch.hsplit(h, 2)[::-1], 1),
    "column_stack": lambda h: torch.column_stack([h[:, 3:], h[:, :3]]),
    "broadcast_tensors": lambda h: torch.broadcast_tensors(h, torch.zeros(6))[0],
    "diag_embed": lambda h: torch.diag_embed(h).sum(1),
    "masked_select": lambda h: h.masked_select(torch.ones_like(h, dtype=torch.bool)).view_as(h),
    "diff": lambda h: torch.diff(h, dim=1, prepend=torch.zeros_like(h[:, :1])),
    "nansum": lambda h: torch.nansum(h[..., None], -1),
    "adjoint": lambda h: h[:, None].adjoint()[..., 0],
    "atleast_3d": lambda h: torch.atleast_3d(h)[..., 0],
    "unsafe_chunk": lambda h: torch.cat(h.unsafe_chunk(2, 1), 1),
    "positive": lambda h: +h,
    "slice_scatter": lambda h: torch.slice_scatter(h, 2 * h[:, :2], 1, 0, 2),
    "tensordot": lambda h: torch.tensordot(h, torch.eye(6).double().roll(1, 0), 1),
    "inner": lambda h: torch.inner(h, torch.eye(6).double().roll(1, 0)),
    "kron": lambda h: torch.kron(h, torch.ones(1, 1).double()),
    "cummax": lambda h: h.cummax(1).values,
    "fmax": lambda h: torch.fmax(h, h.flip(1)),
    "aminmax": lambda h: h + torch.aminmax(h, dim=1, keepdim=True).min,
}


@pytest.mark.parametrize("name", ARRANGED)
def test_functions_that_select_and_arrange(name):
    _check(_net(lambda m, x: m.d(ARRANGED[name](m.a(x)).relu())), *_data())


def test_backward_hooks_of_the_model_do_not_matter():
    x, y = _data()
    model = _net(lambda m, x: m.d(m.a(x).relu()))
    wanted = weight_relevance(model, x, y)
    calls = []
    model.a.register_full_backward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(weight_relevance(model, x, y), wanted)
    assert not calls and model.a._backward_hooks


def test_modes_and_layers_that_are_not_ready():
    x, y = _data()
    model = _net(lambda m, x: m.d(m.a(x).relu()))
    plain = compress(model, x, y).to_bytes()
    with torch.inference_mode():
        assert compress(model, x, y).to_bytes() == plain
        made = x + 0
    assert compress(model, made, y).to_bytes() == plain
    with pytest.raises(ValueError, match="'0.weight' has no shape yet: run the model once"):
        weight_relevance(nn.Sequential(nn.LazyLinear(3)), x, y)
    model.c.weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="'c.weight' holds values that are not finite"):
        compress(model, x, y, "uniform")
    adding = _net(lambda m, x: m.d(m.a(x).scatter(
        1, torch.arange(6).expand(len(x), 6), m.b(x), reduce="add")))  # fmt: skip
    with pytest.raises(UnsupportedLayerError, match="'scatter' that reduces.*scatter_add"):
        weight_relevance(adding, x, y)


def test_layers_that_are_not_called_are_named():
    x, y = torch.randn(60, 8), torch.arange(60) % 3
    model = Net(lambda m, x: m.d(F.linear(x, m.a.weight).relu())).eval()
    for recipe in ("lrp-rd", "lrp-sequential"):
        with pytest.warns(UserWarning, match="take eight bits.*'a.weight'.*layer\\(x\\)"):
            compress(model, x, y, recipe)
    called = Net(lambda m, x: m.d(m.c(m.a(x).relu()) + m.b(x))).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "the model itself is near chance")
        compress(called, x, y, "lrp-sequential")


def test_an_onnx_file_is_compared_on_all_images(tmp_path):
    def branching(m, x):
        h = m.a(x).relu()
        return m.d(m.c(h).relu() if bool((x > 3).any()) else h)

    model = Net(branching).eval()
    images = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    images[:5] = images[:5].clamp(-2, 2)
    images[5:] = images[5:] * 3
    packed = compress(_net(lambda m, x: m.d(m.a(x))).float(), images, torch.arange(40) % 3, EIGHT)
    with pytest.raises(ValueError, match="depend on values"):
        to_onnx(packed, model, images, tmp_path / "branching.onnx")
    assert not (tmp_path / "branching.onnx").exists()


class Tokens(nn.Module):
    """A masked mean of looked-up rows."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.e, self.a, self.d = nn.Embedding(11, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, t):
        there = (t != 0).float()[..., None]
        return self.d(self.a((self.e(t) * there).sum(1) / there.sum(1)).relu())


@pytest.mark.parametrize("rule", ["epsilon", "epsilon-plus-flat", "flat"])
def test_tokens_may_be_masked_by_themselves(rule):
    tokens = torch.randint(1, 11, (24, 5), generator=torch.Generator().manual_seed(3))
    scores = weight_relevance(Tokens().eval(), tokens, torch.arange(24) % 3, rule=rule)
    assert all(score.any() for score in scores.values())


FRONT = {
    "a mask of the images": lambda m, x: m.d(m.a(x).relu() * (x[:, :6] > 0.5).double()),
    "logarithms and a mask": lambda m, x: m.d(m.a(x.abs().log()).relu() * (x[:, :6] > 0)),
    "a kernel of distances": lambda m, x: m.d(m.a(x).relu() * torch.exp(-x[:, :6].abs())),
    "signs": lambda m, x: m.d(m.a(x).relu() * x[:, :6].sign()),
}


@pytest.mark.parametrize("way", FRONT)
def test_what_no_gradient_leads_through_is_a_constant_factor(way):
    _check(_net(FRONT[way]), *_data())


def test_a_tensor_made_like_the_images_is_a_constant():
    part = nn.Linear(2, 6, bias=False)

    def recurrent(start):
        def forward(m, x):
            h = start(x)
            for two in x.split(2, 1):
                h = (m.c(h) + m.i(two)).tanh()
            return m.d(h)

        return _net(forward, i=copy.deepcopy(part))

    x, y = _data()
    ways = (lambda x: x.new_zeros(len(x), 6), lambda x: torch.zeros(len(x), 6).double())
    torch.testing.assert_close(
        *(weight_relevance(recurrent(way), x, y, rule="flat") for way in ways)
    )
    for kernel in (lambda m, x: x.new_ones(8, 8), lambda m, x: m.ones.to(x)):
        model = _net(lambda m, x, k=kernel: m.d(m.a(F.linear(x, k(m, x))).relu()))
        model.register_buffer("ones", torch.ones(8, 8))
        _check(model, x, y)


@pytest.mark.parametrize("length", [4, 16, 32])
def test_a_table_is_shared_whatever_the_length_of_the_sequence(length):
    tokens = torch.randint(0, 11, (32, length), generator=torch.Generator().manual_seed(3))
    labels = torch.arange(32) % 3
    layers = {"token": nn.Embedding(11, 8), "place": nn.Embedding(1, 8)}
    ways = (
        lambda m, t: m.d(m.a(m.token(t) + m.place(torch.zeros(1, 1).long())).relu().mean(1)),
        lambda m, t: m.d(m.a(m.token(t.t()) + m.place(torch.zeros(1, 1).long())).relu().mean(0)),
    )
    for way in ways:
        model = _net(way, **copy.deepcopy(layers))
        found = [
            weight_relevance(model, tokens, labels, aggregate="abs", batch_size=size)
            for size in (32, 1)
        ]
        torch.testing.assert_close(*found)


def test_rows_times_a_number_are_rows_still():
    tokens = torch.randint(0, 11, (24, 5), generator=torch.Generator().manual_seed(3))
    labels = torch.arange(24) % 3
    layers = {name: nn.Embedding(size, 8) for name, size in (("token", 11), ("p", 5), ("q", 5))}
    found = [
        unit_sensitivity(_net(way, **copy.deepcopy(layers)), tokens, labels)
        for way in (
            lambda m, t: m.d(m.a(m.token(t) + (m.p.weight + m.q.weight) * 0.5).relu().mean(1)),
            lambda m, t: m.d(m.a(m.token(t) + (m.p.weight + m.q.weight) / 2).relu().mean(1)),
        )
    ]
    torch.testing.assert_close(*found)
    assert found[0]["p.weight"].any()


def test_networks_that_take_two_images_or_one():
    x, y = _data()
    joined = _net(lambda m, x: m.d(torch.cat([m.a(x)[:, :3, None].squeeze()] * 2, 1)))
    compress(joined, x, y, EIGHT)
    single = _net(lambda m, x: m.d(m.a(x.view(1, 8)).relu()))
    plain = _net(lambda m, x: m.d(m.a(x).relu()))
    torch.testing.assert_close(
        weight_relevance(single, x, y, batch_size=1), weight_relevance(plain, x, y)
    )


def test_logits_of_some_images_that_are_not_finite_are_refused():
    x, y = _data()
    x[3] = 0
    model = _net(lambda m, x: m.d(m.a(x / x.abs().sum(1, keepdim=True))))
    for call in CALLS.values():
        with pytest.raises(ValueError, match="NaN or infinite logits"):
            call(model, x, y)


def test_constants_of_other_kinds_do_not_disturb():
    x, y = _data()
    sparse = _net(lambda m, x: m.d(torch.sparse.mm(m.matrix, m.a(x).T).T))
    sparse.matrix = torch.eye(6).double().to_sparse()
    compress(sparse, x, y, EIGHT)
    with pytest.raises(UnsupportedLayerError, match="sparse_mm"):
        weight_relevance(sparse, x, y)
    masked = _net(lambda m, x: m.d((m.a(x) + m.mask).softmax(1)))
    masked.mask = nn.Parameter(torch.tensor([0, 0, 0, -torch.inf, 0, 0]), requires_grad=False)
    weight_relevance(masked.double(), x, y)
