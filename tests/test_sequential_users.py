"""Layer after layer in networks of all ways of calling their layers: the right codes, or a word."""

import pytest
import torch
import torch.nn.functional as F
from small import Doubled, Forwarded, outputs
from torch import nn
from torch.nn.utils import parametrize

from lib.compress import compress
from lib.inputs import UnsupportedLayerError
from lib.leastsquares import equations
from lib.lockstep import plan
from lib.moments import input_moments
from lib.prune import KeepTop
from lib.quantize import Sequential, rate_distortion, sequential, uniform
from lib.recipe import Recipe


def coded(model, images, price=0.003, by="alike", **given):
    """The file, for labels as the network has them."""
    with torch.no_grad():
        labels = given.get("output", lambda out: out)(model.eval()(images)).argmax(1)
    return compress(model, images, labels, Recipe(store=Sequential(by, price=price)), **given)


class Frames(nn.Module):
    """Layers on tokens [N, T, 8]; ``how`` says what the first axis of the middle ones counts."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 24), nn.Linear(24, 12)
        self.taps, self.head, self.how = nn.Conv1d(12, 6, 3), nn.Linear(6, 4), how

    def inner(self, h):
        return self.down(self.up(h).relu())

    def forward(self, x):
        h = self.stem(x).relu()
        if self.how == "samples":
            h = self.inner(h)
        elif self.how == "tokens":
            h = self.inner(h.flatten(0, 1)).unflatten(0, x.shape[:2])
        elif self.how == "time":
            h = self.inner(h.transpose(0, 1)).transpose(0, 1)
        else:  # one sample of all tokens
            h = self.inner(h.flatten(0, 1)[None])[0].unflatten(0, x.shape[:2])
        return self.head(self.taps(h.mT).relu().amax(2))


@pytest.mark.parametrize("how", ["tokens", "time", "one"])
def test_which_axis_counts_samples_does_not_matter(how):
    torch.manual_seed(1)
    images = torch.randn(60, 10, 8) * torch.randn(60, 10, 1).exp()
    wanted, found = (coded(Frames(each).eval(), images) for each in ("samples", how))
    for name in wanted:
        if name.endswith("weight"):
            assert torch.equal(wanted[name].grid, found[name].grid), name
            same = (wanted[name].symbols == found[name].symbols).float().mean()
            assert same > 0.97, name  # sums in another order may move a few


def test_moments_are_those_of_the_images_whatever_a_layer_reads_as_samples():
    torch.manual_seed(0)
    frames = nn.Sequential(nn.Flatten(0, 1), nn.Conv2d(2, 3, 3), nn.Unflatten(0, (-1, 5)))
    images = torch.randn(12, 5, 2, 6, 6) + 1
    wanted = input_moments(frames, images, centered=True)["1.weight"]
    problem = equations(frames[1], centre=True)
    inputs = images.flatten(0, 1)
    problem.add(inputs, torch.zeros_like(frames[1](inputs)))
    torch.testing.assert_close(problem.moment(12)[0].float(), wanted, rtol=1e-3, atol=1e-3)


def test_attention_with_time_first_is_coded_like_the_same_with_samples_first():
    class Attends(nn.Module):
        def __init__(self, first):
            super().__init__()
            torch.manual_seed(0)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=first)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            x = x if self.attention.batch_first else x.transpose(0, 1)
            y = self.attention(x, x, x, need_weights=False)[0]
            return self.head((y if self.attention.batch_first else y.transpose(0, 1)).mean(1))

    torch.manual_seed(1)
    images = torch.randn(40, 6, 8)
    one, other = (coded(Attends(first).eval(), images, 0.01) for first in (True, False))
    for name in ("attention.in_proj_weight", "attention.out_proj.weight", "head.weight"):
        torch.testing.assert_close(one[name].grid, other[name].grid)
        assert (one[name].symbols == other[name].symbols).float().mean() > 0.97, name


class Returned(nn.Module):
    """Logits, and a sum of them that nothing depends on."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.head = nn.Linear(12, 16), nn.Linear(16, 5)
        self.prior = nn.Linear(12, 5)

    def forward(self, x):
        logits = self.head(self.first(x).relu())
        return {"logits": logits, "others": [logits + self.prior(x)]}


def test_an_output_that_the_model_returns_ends_no_branch():
    model, images = Returned().eval(), torch.randn(40, 12)
    assert plan(model, images).branch_ends == {"prior"}
    file = coded(model, images, 1e-6, output=lambda out: out["logits"])
    before, after = (outputs(n, images)["logits"] for n in (model, file.to_model(model)))
    assert (before - after).square().mean() < 1e-4 * before.var()


@pytest.mark.parametrize("turned", [lambda h: h.mT, lambda h: h.mH, lambda h: h.data.mT])
def test_an_output_that_is_read_by_an_attribute_ends_no_branch(turned):
    def mixed(net, x):
        h = net.stem(x)  # [N, 9, 9]
        assert h.shape[1:] == (9, 9) and h.dtype == torch.float32  # read nothing of it
        return net.head((h + net.mix(turned(h).relu())).amax(1))

    mixer = Forwarded(mixed, stem=nn.Linear(20, 9), mix=nn.Linear(9, 9), head=nn.Linear(9, 3))
    assert plan(mixer.eval(), torch.randn(4, 9, 20)).branch_ends == {"mix"}


class Chunked(nn.Module):
    """What a forward does that splits large batches, or takes another way for them."""

    def __init__(self, most, other=False):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.most, self.other = nn.Linear(12, 9), nn.Linear(9, 4), most, other

    def forward(self, x):
        if self.other and len(x) > self.most:
            return F.linear(self.one(x).relu(), self.two.weight, self.two.bias)
        return torch.cat([self.two(self.one(some).relu()) for some in x.split(self.most)])


@pytest.mark.parametrize("other", [False, True])
def test_forwards_that_take_many_images_otherwise_than_two_are_refused(other):
    images = torch.randn(40, 12)
    name = "two" if other else "one"
    with pytest.raises(
        UnsupportedLayerError, match=f"'{name}' cannot.*not for all at once.*lrp-rd"
    ):
        coded(Chunked(16, other).eval(), images)
    whole, few = (coded(Chunked(most).eval(), images) for most in (16 * 40, 40))
    assert whole.to_bytes() == few.to_bytes()


def test_a_sum_that_many_images_do_without_is_refused():
    def sometimes(net, x):
        y = net.two(net.one(x).relu())
        return x + y if len(x) < 20 else torch.stack([x, y]).sum(0)

    model = Forwarded(sometimes, one=nn.Linear(12, 12), two=nn.Linear(12, 12))
    with pytest.raises(UnsupportedLayerError, match="'two' cannot be coded.*not for all at once"):
        coded(model, torch.randn(40, 12))


def test_an_attention_of_which_only_queries_are_steady_keeps_all_its_rows():
    class Pooled(nn.Module):
        """A learned query; keys as long as the longest text of the batch."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.tokens, self.head = nn.Embedding(20, 16), nn.Linear(16, 4)
            self.query = nn.Parameter(torch.randn(1, 1, 16))
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)

        def forward(self, t):
            t = t[:, : int((t != 0).sum(1).max())]
            h, query = self.tokens(t), self.query.expand(len(t), 1, 16)
            seen, _ = self.attention(query, h, h, key_padding_mask=t == 0, need_weights=False)
            return self.head(seen[:, 0])

    torch.manual_seed(1)
    texts = torch.randint(1, 20, (40, 12))
    texts[torch.arange(12) >= torch.randint(2, 13, (40, 1))] = 0
    model = Pooled().eval()
    with pytest.warns(UserWarning, match="eight bits at any price.*in_proj_weight"):
        file = coded(model, texts)
    assert file["attention.in_proj_weight"].symbols.shape == (48, 16)
    assert file["attention.in_proj_weight"].symbols.abs().max() == 127
    file.to_model(model)


def test_parts_of_wide_layers_share_a_grid_where_bits_are_free(monkeypatch):
    monkeypatch.setattr(sequential, "WIDE", 4)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 3))
    images = torch.randn(50, 12)
    model[0].weight.data[:, :4] *= 1e-3  # the finest step of later parts is larger
    file = coded(model.eval(), images, 1e-12)
    assert file["0.weight"].kind == "uniform"
    again = file.from_bytes(file.to_bytes()).to_model(model)
    drifted = (outputs(again, images) - outputs(model, images)).square().mean()
    assert drifted < 1e-6 * outputs(model, images).var()


def test_a_bias_that_is_computed_stays_and_is_not_counted_on():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5)).eval()
    parametrize.register_parametrization(model[0], "bias", Doubled())
    images = torch.randn(80, 6) + 2
    bias = model[0].bias.detach().clone()
    file = coded(model, images, 0.03)
    units = torch.ones(5)
    # nothing else moves a mean: H is the plain moment, and one layer has nothing to be refitted to
    moment = images.T.double() @ images.double() / 80
    weight = model[0].weight.detach()
    damage = float(torch.einsum("ki,ij,kj->", weight.double(), moment, weight.double())) / 30
    wanted = rate_distortion(weight, second_moment=moment.float(), unit_weight=units,
                             lam=0.03 * damage)  # fmt: skip
    torch.testing.assert_close(file["0.weight"].grid, wanted.grid, rtol=2e-3, atol=0)
    assert (file["0.weight"].symbols == wanted.symbols).float().mean() > 0.9
    assert torch.equal(file.to_model(model)[0].bias, bias)


def test_a_bias_that_two_layers_share_suits_neither_alone_and_stays():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)).eval()
    model[2].bias = model[0].bias
    file = coded(model, torch.randn(80, 6) + 2, 0.1)
    torch.testing.assert_close(file.to_model(model)[0].bias, model[0].bias, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("first", ["tokens", "head"])
def test_weights_that_two_modules_have_take_eight_bits_whichever_comes_first(first):
    class Tells(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            layers = {"tokens": nn.Embedding(30, 8), "head": nn.Linear(8, 30, bias=False)}
            for name in (first, *layers):
                self.add_module(name, layers[name])
            self.inner = nn.Linear(8, 8)
            layers["head"].weight = layers["tokens"].weight

        def forward(self, t):
            return self.head(self.inner(self.tokens(t).mean(1)).relu())

    model = Tells().eval()
    with pytest.warns(UserWarning, match="eight bits at any price"):
        file = coded(model, torch.randint(0, 30, (40, 5)))
    wanted = uniform(model.head.weight.detach(), 8)
    assert torch.equal(file[f"{first}.weight"].symbols, wanted.symbols)


def test_a_convolution_without_an_axis_of_samples_is_coded_like_one_with_it():
    class Rows(nn.Module):
        """All samples are the places of one."""

        def __init__(self, axis):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.taps, self.head = nn.Linear(6, 9), nn.Conv1d(9, 9, 1), nn.Linear(9, 3)
            self.axis = axis

        def forward(self, x):
            h = self.first(x).T
            h = self.taps(h[None])[0] if self.axis else self.taps(h)
            return self.head(h.T.relu())

    images = torch.randn(60, 6)
    with_axis, without = (coded(Rows(axis).eval(), images) for axis in (True, False))
    assert with_axis.to_bytes() == without.to_bytes()
    kept = Recipe(KeepTop("magnitude", density=0.5), store=Sequential("alike"))
    compress(Rows(False).eval(), images, torch.arange(60) % 3, kept)


def test_a_refit_does_not_count_on_a_bias_that_is_computed():
    torch.manual_seed(0)
    layer = nn.Linear(6, 5)
    parametrize.register_parametrization(layer, "bias", Doubled())
    inputs, missing, before = torch.randn(80, 6) + 2, torch.randn(80, 5) + 1, layer.weight.clone()
    problem = equations(layer)
    problem.add(inputs, missing)
    problem.refit(torch.ones(5, 6, dtype=torch.bool), 1e-9)
    wanted = torch.linalg.lstsq(inputs, missing).solution.T
    torch.testing.assert_close(layer.weight - before, wanted, rtol=1e-3, atol=1e-4)
