"""What the first images do not show: other ways through the network, other rows, other scales."""

import copy

import pytest
import torch
import torch.nn.functional as F
from oracles import aggregated, by_gradient
from small import Forwarded
from torch import nn

from lib import Recipe, Uniform, compress
from lib.fold import fold
from lib.relevance import UnsupportedLayerError, totals, weight_relevance

EIGHT = Recipe(store=Uniform(8))


class Net(Forwarded):
    sizes = {"a": (6, 8), "b": (8, 8), "c": (8, 4)}


def _net(forward, **layers):
    return Net(forward, **layers).double().eval()


def _data(*shape, samples=64):
    images = torch.randn(samples, *shape, generator=torch.Generator().manual_seed(5)).double()
    return images, torch.arange(samples) % 4


def _check(model, x, y, aggregates=("sum", "abs", "rms"), **how):
    each = by_gradient(model, x, y)
    for aggregate in aggregates:
        for name, score in weight_relevance(model, x, y, aggregate=aggregate, **how).items():
            wanted = aggregated(each[name], aggregate)
            torch.testing.assert_close(score, wanted, msg=lambda said, n=name: f"{n}: {said}")


def _skipping(m, x):
    h = m.a(x)
    hard, z = x[:, 0] > 1.8, m.norm(h).relu()
    if hard.any():  # a few images are read before their BatchNorm
        z = z.clone()
        z[hard] = m.b(h[hard]).relu()
    return m.c(z)


def test_a_batchnorm_that_some_later_images_skip_is_not_folded():
    x, y = _data(6)
    x = x[x[:, 0].argsort()]
    assert 1 <= (x[:, 0] > 1.8).sum() <= 4
    norm = nn.BatchNorm1d(8)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.2, 3)
    model = _net(_skipping, norm=norm)
    folded = fold(model, x)
    assert folded.pairs == {}
    torch.testing.assert_close(folded.network(x), model(x))
    _check(model, x, y, ["sum"])


class Shortcut(nn.Module):
    """What BatchNorm, here the identity, reads is read by a shortcut as well."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.b, self.c = nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)
        nn.init.normal_(self.a.bias)

    def forward(self, x):
        h = self.a(x)
        if x.shape[-1] < 4:  # no graph can be traced
            h = h * 1
        return self.c((h + self.b(self.norm(h).relu())).relu().mean((2, 3)))


@pytest.mark.filterwarnings("ignore:.*near chance")
def test_a_batchnorm_whose_input_has_another_reader_is_not_folded():
    model, (x, y) = Shortcut().eval(), _data(2, 8, 8)
    assert fold(model, x.float()).pairs == {}
    for recipe in (EIGHT, "lrp-sequential"):
        decoded = compress(model, x.float(), y, recipe).to_model(model)(x.float())
        assert float((decoded - model(x.float())).norm() / model(x.float()).norm()) < 0.3


class Says(nn.Module):
    """With state of its own, or that is loaded in a way of its own."""

    def __init__(self, what):
        super().__init__()
        torch.manual_seed(0)
        self.what = what
        self.a, self.norm, self.c = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)
        self.norm.running_var.uniform_(0.2, 3)

    def forward(self, x):
        h = self.norm(self.a(x)) if x.shape[-1] > 4 else self.a(x)  # no graph can be traced
        if self.what == "limits" and h.abs().max() > 6:
            raise RuntimeError("activations out of range")
        return self.c(h.relu())

    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        return state | {"epoch": 3} if self.what == "a number" else state

    def load_state_dict(self, *args, **kwargs):
        if self.what == "loading":
            raise NotImplementedError
        return super().load_state_dict(*args, **kwargs)


@pytest.mark.parametrize("what", ["nothing", "a number", "loading", "limits"])
def test_what_cannot_be_unfolded_is_scored_as_it_is(what):
    model, (x, y) = Says(what).double().eval(), _data(6)
    plain = Says("nothing").double().eval()
    assert fold(plain, x).pairs == {"norm": "a"}
    torch.testing.assert_close(weight_relevance(model, x, y), weight_relevance(plain, x, y))


def _ragged(m, x):
    real = x[..., 0] != 0  # rows of zeros are padding
    total = x.new_zeros(len(x), 8).index_add(0, real.nonzero()[:, 0], m.a(x[real]).relu())
    return m.c(m.b(total).relu())


def _experts(m, x):
    tokens = x.flatten(0, 1)
    choice = (tokens[:, 0] > 0).long()
    out = tokens.new_zeros(len(tokens), 8)
    for number, expert in enumerate((m.a, m.e)):
        rows = (choice == number).nonzero()[:, 0]
        out = out.index_add(0, rows, expert(tokens[rows]).relu())
    return m.c(m.b(out.view(len(x), -1, 8).mean(1)).relu())


def _by_slices(m, x):
    rows = [image[:n] for image, n in zip(x, (x[..., 0] != 0).sum(1), strict=True)]
    return _gathered(m, x, rows)


def _by_numbers(m, x):
    counts = (x[..., 0] != 0).double().sum(1)
    return _gathered(m, x, [image[: int(n)] for image, n in zip(x, counts, strict=True)])


def _gathered(m, x, rows):
    owner = torch.cat([torch.full((len(each),), i) for i, each in enumerate(rows)])
    total = x.new_zeros(len(x), 8).index_add(0, owner, m.a(torch.cat(rows)).relu())
    return m.c(m.b(total).relu())


def _repeated(m, x):
    counts = (x[..., 0] != 0).sum(1)
    rows = x.sum(1).repeat_interleave(counts, 0)
    owner = torch.arange(len(x)).repeat_interleave(counts)
    return m.c(m.b(x.new_zeros(len(x), 8).index_add(0, owner, m.a(rows).relu())).relu())


def _squeezed(m, x):
    return _ragged(m, x).squeeze()


LENGTHS = {
    "short ones later": [5] * 40 + [1, 2, 3] * 8,
    "in turn": [2, 1, 3] * 21 + [2],
    "all five": [1, 2, 3, 4, 5] * 12 + [5] * 4,
}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("way", [_ragged, _experts, _by_slices, _by_numbers, _repeated])
def test_rows_of_unequal_number_belong_to_their_image(way, lengths):
    x, y = _data(5, 6)
    for image, length in zip(x, LENGTHS[lengths], strict=True):
        image[length:] = 0
    model = _net(way, e=nn.Linear(6, 8, bias=False))
    for size in (32, 6):
        _check(model, x, y, batch_size=size)


@pytest.mark.parametrize("size", [2, 4])
def test_rows_of_unequal_number_in_a_network_that_squeezes_are_refused(size):
    x, y = _data(5, 6)
    for image, length in zip(x, LENGTHS["in turn"], strict=True):
        image[length:] = 0
    with pytest.raises(UnsupportedLayerError, match="which rows belong to which image"):
        weight_relevance(_net(_squeezed), x, y, aggregate="abs", batch_size=size)


def test_checks_of_the_images_leave_batches_together():
    seen = []

    def forward(m, x):
        seen.append(len(x))
        if torch.isnan(x).any().item() or not bool((x.abs() < 99).all()):
            raise ValueError("strange images")
        return _plain(m, x[:, m.chosen])

    model = _net(forward)
    model.chosen = torch.tensor([True] * 6 + [False])
    x, y = _data(7)
    _check(model, x, y)
    assert seen.count(32) == 6  # three aggregates, two batches each


def test_images_that_are_factors_for_later_ones_only_take_their_share():
    def forward(m, x):
        h = m.a(x)
        factor = torch.where(x[:, :1] > 0, x.sum(1, keepdim=True), torch.ones_like(x[:, :1]))
        if (x[:, 0] > 0).any():
            h = h * factor
        return m.c(h.relu())

    x, y = _data(6)
    x = x[x[:, 0].argsort()]
    scores = [weight_relevance(_net(forward), *data) for data in ((x, y), (x.flip(0), y.flip(0)))]
    torch.testing.assert_close(*scores)
    moments = [
        totals(_net(forward), images, y, wanted="moments", batch_size=1)
        for images in (x, x.flip(0))
    ]
    torch.testing.assert_close(*moments)


ALIKE = {
    "the same": lambda x: torch.cat([x[:1].expand(8, -1), x[8:]]),
    "blank": lambda x: torch.cat([torch.zeros_like(x[:8]), x[8:]]),
}
TOGETHER = {
    "mean over images": lambda m, x: m.c((m.a(x) - 0.5 * m.a(x).mean(0)).relu()),
    "largest norm": lambda m, x: m.c((m.a(x) / (1 + m.a(x).norm(dim=1).max())).relu()),
    "a factor for several": lambda m, x: m.c((2 * m.a(x) if len(x) > 1 else m.a(x)).relu()),
}


@pytest.mark.parametrize("images", ALIKE)
@pytest.mark.parametrize("way", TOGETHER)
def test_dependence_on_others_is_seen_where_the_first_are_alike(way, images):
    x, y = _data(6)
    for call in (weight_relevance, lambda *a: compress(*a, EIGHT)):
        with pytest.raises(UnsupportedLayerError, match="depends on the others of its batch"):
            call(_net(TOGETHER[way]), ALIKE[images](x), y)


def test_a_later_image_without_finite_logits_is_refused():
    x, y = _data(6)
    x[17] = 0
    model = _net(lambda m, x: m.c(m.a(x / x.abs().sum(1, keepdim=True)).relu()))
    for call in (weight_relevance, lambda *a: compress(*a, EIGHT)):
        with pytest.raises(ValueError, match="NaN or infinite logits"):
            call(model, x, y)


def test_a_rule_for_a_layer_that_the_first_image_skips():
    def forward(m, x):
        h = m.a(x).relu()
        hard = x[:, 0] > 0
        return m.c(torch.where(hard[:, None], m.b(h).relu(), h) if hard.any() else h)

    x, y = _data(6)
    x = x[x[:, 0].argsort()]
    both = [
        weight_relevance(_net(forward), *data, rule={"b": "zplus"})
        for data in ((x, y), (x.flip(0), y.flip(0)))
    ]
    torch.testing.assert_close(*both)
    with pytest.raises(ValueError, match="no layer fits 'd'"):
        weight_relevance(_net(forward), x, y, rule={"d": "zplus"})


def _plain(m, x):
    return m.c(m.b(m.a(x).relu()).relu())


@pytest.mark.parametrize("scale", [1e-10, 1e-14, 1e-18, 1e10])
def test_relevance_has_no_scale_of_its_own(scale):
    x, y = _data(6)
    model = _net(_plain)
    for aggregate in ("sum", "abs"):
        found, wanted = (
            weight_relevance(model, images, y, aggregate=aggregate) for images in (scale * x, x)
        )
        torch.testing.assert_close({n: score / scale for n, score in found.items()}, wanted)


def test_scores_beyond_the_range_of_their_type_are_refused():
    x, y = _data(6)
    model = _net(_plain).float()
    with pytest.raises(ValueError, match="leave the range of float32.*float64"):
        weight_relevance(model, (x * 1e20).float(), y, aggregate="rms")
    for scale in (1e-20, 1e20):
        with pytest.raises(ValueError, match="squares float32 cannot hold"):
            compress(model, (x * scale).float(), y)


def test_small_scores_of_half_precision_are_kept():
    x, y = _data(6)
    model = _net(_plain)
    half = copy.deepcopy(model).half()
    scores = weight_relevance(half, x.half(), y, aggregate="rms")
    wanted = weight_relevance(model, x, y, aggregate="rms")
    for name, score in scores.items():
        assert score.dtype == torch.float16
        torch.testing.assert_close(score.double(), wanted[name], rtol=0.02, atol=1e-4)


def test_biases_too_small_for_float16_are_kept():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.a, self.c = nn.Linear(6, 8), nn.Linear(8, 4)
            self.a.bias.data *= 1e-9

        def forward(self, x):
            return self.c(F.normalize(self.a(1e-9 * x)).relu())

    model, (x, y) = Small().eval(), _data(6)
    with pytest.warns(UserWarning):
        decoded = compress(model, x.float(), y, EIGHT).to_model(model)
    torch.testing.assert_close(decoded.a.bias, model.a.bias, rtol=0.05, atol=0)


def test_complex_activations_conserve_and_complex_weights_are_refused():
    def forward(m, x, function=torch.square):
        h = m.a(x)
        z = function(torch.view_as_complex(h.unflatten(1, (4, 2)).contiguous()))
        return m.c(torch.view_as_real(z).flatten(1))

    x, y = _data(6)
    for function in (torch.square, torch.sqrt, torch.tanh, torch.sin, lambda z: z * z.conj()):
        model = _net(lambda m, x, f=function: forward(m, x, f))
        logits = model(x).gather(1, y[:, None]).sum()
        scores = weight_relevance(model, x, y)
        for name in ("a.weight", "c.weight"):
            torch.testing.assert_close(scores[name].sum(), logits)
    inner = nn.Linear(4, 4, bias=False, dtype=torch.cfloat)
    with pytest.raises(UnsupportedLayerError, match="'e.weight' is complex"):
        weight_relevance(Net(forward, e=inner), x.float(), y)


ROWS = {
    "two": lambda w: w[torch.tensor([4, 1, 1])],
    "a mask": lambda w: w[torch.tensor([True, False, True, False, False, True])],
    "from the end": lambda w: w[torch.tensor([-2, -6])],
    "one from the end": lambda w: w[-2],
    "index_select": lambda w: w.index_select(-2, torch.tensor([4, 1])),
    "narrow": lambda w: w.narrow(-2, 1, 3),
}


@pytest.mark.parametrize("rows", ROWS)
def test_rows_of_a_table_by_any_index(rows):
    def forward(m, x):
        h = m.a(x)[:, None] + ROWS[rows](m.table.weight).view(-1, 8)
        return m.c(m.b(h.relu()).relu().mean(1))

    x, y = _data(6)
    _check(_net(forward, table=nn.Embedding(6, 8)), x, y, ["sum"])


def test_a_weight_used_as_it_is_and_summed():
    def forward(m, x):
        h = F.conv2d(x, m.e.weight, padding=1) - 0.7 * F.conv2d(x, m.e.weight.sum((2, 3), True))
        return m.c(m.b(h.relu().mean((2, 3))).relu())

    x, y = _data(2, 5, 5, samples=12)
    for size in (32, 1):
        _check(_net(forward, e=nn.Conv2d(2, 8, 3, bias=False)), x, y, batch_size=size)


def test_what_a_network_says_of_itself():
    class Frozen(Net):
        def train(self, mode=True):
            super().train(mode)

    class Renamed(Net):
        def state_dict(self, *args, **kwargs):
            state = super().state_dict(*args, **kwargs)
            return {f"net.{name}": value for name, value in state.items()}

    x, y = _data(6)
    frozen = Frozen(_plain).double()
    _check(frozen, x, y, ["sum"])
    assert compress(frozen, x, y, EIGHT).nbytes > 0
    with pytest.raises(UnsupportedLayerError, match="state_dict does not hold 'a.weight'"):
        compress(Renamed(_plain), x.float(), y, EIGHT)
    with torch.inference_mode():
        made = Net(_plain).double()
    torch.testing.assert_close(weight_relevance(made, x, y), weight_relevance(_net(_plain), x, y))
    tokens = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 4))
    with pytest.raises(ValueError, match="needs floats, no tokens"):
        compress(tokens, torch.randint(0, 9, (64, 3)), y, "deeplift-baseline")
