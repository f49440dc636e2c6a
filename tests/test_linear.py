"""Layers as linear maps: damage foretold against the squared change of their outputs."""

import copy

import pytest
import torch
from small import Tied
from torch import nn

from lib import patches, repair
from lib.attention import opened, views_of
from lib.compress import compress
from lib.leastsquares import equations
from lib.linear import View, layers_of, watch
from lib.moments import input_moments
from lib.quantize import RateDistortion, Sequential, energy
from lib.quantize.ratedistortion import coded
from lib.recipe import Recipe

UPWARD = {
    "stride": lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1),
    "groups": lambda: nn.ConvTranspose2d(4, 6, (2, 3), stride=(1, 2), groups=2, dilation=(2, 1)),
    "cropped": lambda: nn.ConvTranspose2d(4, 2, 2, stride=3, padding=2, bias=False),
    "one axis": lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2),
    "three": lambda: nn.ConvTranspose3d(4, 2, 2, stride=(1, 2, 1)),
}


class Tokens(nn.Module):
    """An embedding, attention over it, and a head."""

    def __init__(self, vocabulary=12, width=8):
        super().__init__()
        self.word = nn.Embedding(vocabulary, width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.head = nn.Linear(width, 3)

    def forward(self, x):
        h = self.word(x)
        return self.head((h + self.attention(h, h, h)[0]).mean(1))


class Pooled(nn.Module):
    """A learned query that attends to tokens of another width."""

    def __init__(self):
        super().__init__()
        self.first, self.query = nn.Linear(4, 6), nn.Parameter(torch.randn(1, 2, 8))
        self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        keys = self.first(x)
        h, _ = self.attention(self.query.expand(len(x), -1, -1), keys, keys, need_weights=False)
        return self.head(h.flatten(1)[:, :8])


def foretold(weight, change, moment, view, units=None):
    """The damage by the moment, in float64, for a unit weight of one."""
    rows = view.rows(change)  # [groups, rows, d]
    moment = moment.reshape(view.groups, view.inputs, view.inputs)
    return float(torch.einsum("grd,gde,gre->", rows, moment, rows))


def measured(layer, inputs, change):
    """Squared change of the layer's output, a mean over images."""
    other = copy.deepcopy(layer)
    other.weight.data += change
    with torch.no_grad():
        return float((other(inputs) - layer(inputs)).square().sum()) / len(inputs)


@pytest.mark.parametrize("make", UPWARD.values(), ids=UPWARD)
def test_damage_of_transposed_convolutions(make):
    torch.manual_seed(0)
    layer = make().double()
    model = nn.Sequential(layer)
    images = torch.randn(12, 4, *(5, 4, 3)[: layer.weight.dim() - 2]).double()
    change = torch.randn_like(layer.weight)
    moment = input_moments(model, images)["0.weight"]
    found = foretold(layer.weight, change, moment, views_of(model)["0.weight"])
    assert found == pytest.approx(measured(layer, images, change), rel=1e-9)


def test_a_view_and_back_is_the_weight():
    others = (lambda: nn.Embedding(5, 3), lambda: nn.Conv2d(4, 6, 3, groups=2))
    for make in (*UPWARD.values(), *others):
        layer = make()
        view = View.of(layer)
        assert torch.equal(view.weight(view.rows(layer.weight), layer.weight.shape), layer.weight)


def test_damage_of_embeddings_counts_how_often_a_token_is_looked_up():
    torch.manual_seed(0)
    layer = nn.Embedding(9, 4).double()
    model, images = nn.Sequential(layer), torch.randint(0, 7, (20, 5))
    change = torch.randn_like(layer.weight)
    moment = input_moments(model, images)["0.weight"]
    counts = moment.flatten()[:7]
    torch.testing.assert_close(counts, images.flatten().bincount().double() / 20)
    # the two never looked up are worth the mean of all nine
    torch.testing.assert_close(moment.flatten()[7:], torch.full((2,), 5 / 9).double())
    change[7:] = 0
    found = foretold(layer.weight, change, moment, views_of(model)["0.weight"])
    assert found == pytest.approx(measured(layer, images, change), rel=1e-9)


@pytest.mark.parametrize("name", ["word.weight", "attention.in_proj_weight", "head.weight",
                                  "attention.out_proj.weight"])  # fmt: skip
def test_damage_inside_of_attention(name):
    """Against the outputs of the layers themselves, before and after a change."""
    torch.manual_seed(0)
    model, images = Tokens().double().eval(), torch.randint(0, 12, (30, 6))
    weight, network = model.get_parameter(name), opened(model)
    moment, view = input_moments(model, images)[name], views_of(model)[name]
    path = name.removesuffix(".weight")
    paths = [f"attention.in_proj_{letter}" for letter in "qkv"] if "in_proj" in name else [path]
    seen = []

    def keep(path, layer, inputs, output):
        seen.append((layer, inputs[0], output.clone()))

    watch(network, images, paths, keep)
    change = torch.randn_like(weight)
    with torch.no_grad():
        weight += change  # which the opened network shares
        actual = sum(float((layer(a) - z).square().sum()) for layer, a, z in seen) / 30
    assert foretold(weight, change, moment, view) == pytest.approx(actual, rel=1e-9)


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"add_bias_kv": True},
                                     {"add_zero_attn": True}, {"kdim": 5, "vdim": 6}])  # fmt: skip
@pytest.mark.parametrize("batch_first", [True, False])
def test_an_opened_attention_computes_the_same(options, batch_first):
    torch.manual_seed(0)
    inner = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options)
    for p in inner.parameters():
        nn.init.normal_(p)
    model = nn.ModuleDict({"a": inner}).eval()
    query = torch.randn(3, 3, 8)
    key, value = (torch.randn(3, 3, options.get(name, 8)) for name in ("kdim", "vdim"))
    for more in (
        {"need_weights": False},
        {"average_attn_weights": False},
        {"attn_mask": torch.ones(3, 3).triu(1).bool()},
        {"attn_mask": torch.ones(3, 3).triu(1).bool(), "is_causal": True, "need_weights": False},
        {"key_padding_mask": torch.tensor([[False, False, True]] * 3)},
    ):
        expected = inner(query, key, value, **more)
        found = opened(model)["a"](query, key, value, **more)
        for a, b in zip(expected, found, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_encoder_layers_of_torch_are_seen_through():
    """In evaluation mode they would run as one fused call."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)).eval()
    images = torch.randn(5, 4, 8)
    names = {f"0.{n}.weight" for n in ("linear1", "linear2", "self_attn.out_proj")}
    assert set(input_moments(model, images)) == names | {"0.self_attn.in_proj_weight"}
    torch.testing.assert_close(opened(model)(images), model(images), rtol=1e-4, atol=1e-5)


def test_an_embedding_of_a_tied_weight_is_not_taken_for_its_own():
    assert list(layers_of(Tied())) == ["f"]


def test_refit_and_codes_of_transposed_convolutions_match_the_ordinary_layer():
    """With stride one it is a convolution of the weight turned around."""
    torch.manual_seed(0)
    up = nn.ConvTranspose2d(4, 6, 3, padding=1)
    same = nn.Conv2d(4, 6, 3, padding=1)
    with torch.no_grad():
        same.weight.copy_(up.weight.transpose(0, 1).flip(2, 3))
        same.bias.copy_(up.bias)
    images = torch.randn(40, 4, 6, 6)
    kept = torch.rand(up.weight.shape) < 0.6
    missing = torch.randn(40, 6, 6, 6)
    results = []
    for layer, mask in ((up, kept), (same, kept.transpose(0, 1).flip(2, 3))):
        layer.weight.data *= mask
        problem = equations(layer, centre=True)
        problem.add(images, missing)
        problem.refit(mask, 0.01)
        code = coded(View.of(layer), layer.weight.detach(), mask, problem.moment(len(images)),
                     torch.rand(6, generator=torch.Generator().manual_seed(0)), 1e-3)  # fmt: skip
        results.append((layer.weight.detach(), code.decode()))
    (weight, code), (expected, wanted) = results
    torch.testing.assert_close(weight.transpose(0, 1).flip(2, 3), expected, rtol=1e-3, atol=1e-4)
    different = (code.transpose(0, 1).flip(2, 3) - wanted).abs() > 1e-6
    assert different.float().mean() < 0.03  # the order of equal columns differs


def test_refit_of_an_embedding_is_the_mean_of_what_is_missing():
    torch.manual_seed(0)
    layer, tokens = nn.Embedding(5, 3), torch.tensor([[0, 1], [1, 1], [3, 0]])
    before, missing = layer.weight.detach().clone(), torch.randn(3, 2, 3)
    kept = torch.rand(5, 3) < 0.7
    problem = equations(layer)
    problem.add(tokens, missing)
    problem.refit(kept, 1e-9)
    for token in range(5):
        at = tokens == token
        change = missing[at].mean(0) * kept[token] if at.any() else torch.zeros(3)
        torch.testing.assert_close(layer.weight[token].detach() - before[token], change)


def up():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=4, padding=1), nn.ReLU(), nn.ConvTranspose2d(6, 4, 3, stride=2),
        nn.ReLU(), nn.Flatten(), nn.Linear(4 * 15 * 15, 10),
    )  # fmt: skip


CASES = {
    "transposed": (up, torch.randn(60, 1, 28, 28)),
    "embedding, attention": (Tokens, torch.randint(0, 11, (60, 6))),
    "cross attention": (Pooled, torch.randn(60, 5, 4)),
}


@pytest.mark.filterwarnings("ignore:the model itself")
@pytest.mark.filterwarnings("ignore:.*reference image")
@pytest.mark.parametrize("kind", [RateDistortion, Sequential])
@pytest.mark.parametrize("by", ["alike", "root:lrp-epsilon/contrastive", "fisher"])
@pytest.mark.parametrize("case", CASES)
def test_all_of_these_are_coded_by_the_price(case, by, kind):
    """Nearly free bits keep the function, and grids follow the price."""
    torch.manual_seed(0)
    make, images = CASES[case]
    model = make().eval()
    labels = model(images).argmax(1)
    exact = compress(model, images, labels, Recipe(store=kind(by, price=1e-9)))
    expected = model(images)
    error = (exact.to_model(model).eval()(images) - expected).abs().max()
    assert error < 0.02 * expected.abs().max()
    small = compress(model, images, labels, Recipe(store=kind(by, price=1e-3)))
    quantized = [name for name, p in model.named_parameters() if p.dim() == 2 or p.dim() == 4]
    for name in quantized:
        fine, coarse = (file[name].symbols.abs().max() for file in (exact, small))
        assert fine > 2 * coarse  # in eight bits both would go up to 127
    assert small.nbytes < exact.nbytes


def test_bias_correction_and_renormalisation_of_these_layers():
    torch.manual_seed(0)
    for make, images in CASES.values():
        dense = make().eval()
        rough = copy.deepcopy(dense)
        masks = {}
        for name, p in rough.named_parameters():
            if p.dim() > 1 and name != "query":
                masks[name] = torch.rand(p.shape) < 0.8
                p.data *= masks[name]

        def missing(model, dense=dense, images=images):
            with torch.no_grad():
                return float((model(images) - dense(images)).square().mean())

        for fixed in (
            repair.bias_correction(dense, rough, images),
            repair.refit(dense, rough, masks, images),
        ):
            assert missing(fixed) < missing(rough)
        repaired = repair.renormalise(dense, rough, masks, images)
        assert all((repaired.get_parameter(n)[~mask] == 0).all() for n, mask in masks.items())


def test_energy_of_an_in_projection_is_that_of_its_parts():
    torch.manual_seed(0)
    model, images = Pooled().eval(), torch.randn(40, 5, 4)
    moments = input_moments(model, images)
    for letter, width in zip("qkv", (8, 6, 6), strict=True):
        name = f"attention.{letter}_proj_weight"
        assert moments[name].shape == (width, width)
        assert energy(model.get_parameter(name), moments[name]) > 0


@pytest.mark.parametrize("make", [lambda: nn.Conv2d(3, 4, 3, groups=1), UPWARD["groups"]])
def test_some_positions_of_large_images_stand_for_all(make, monkeypatch):
    torch.manual_seed(0)
    layer, images = make(), torch.randn(40, make().in_channels, 12, 12)
    missing = layer(images).detach()
    results = []
    for positions in (10**6, 60):
        monkeypatch.setattr(patches, "POSITIONS", positions)
        problem = equations(layer, centre=True)
        problem.add(images, missing)
        results.append((problem.moment(40), problem.outputs(), problem.missing, problem.count))
        moments = input_moments(nn.Sequential(layer), images, centered=True)["0.weight"]
        torch.testing.assert_close(moments.double().view_as(results[-1][0]), results[-1][0],
                                   rtol=1e-3, atol=1e-2)  # fmt: skip
    for whole, part in zip(*results, strict=True):
        assert (whole - part).norm() < 0.2 * whole.norm()
    torch.testing.assert_close(
        results[1][3], results[0][3], rtol=1e-5, atol=0
    )  # in all, positions count as before


@pytest.mark.parametrize("width", [5, 12, 13, 30])
def test_products_of_both_halves_from_one(width):
    torch.manual_seed(0)
    rows = torch.randn(2, width, 7, dtype=torch.float64)
    product = patches.squared(rows, size=6)
    assert torch.allclose(product, rows @ rows.mT, atol=1e-12)
    assert torch.equal(product, product.mT)


@pytest.mark.parametrize("case", ["linear", "convolution", "transposed", "groups"])
def test_moments_of_the_first_inputs_are_a_part_of_all(case):
    torch.manual_seed(0)
    layer, shape = {
        "linear": (nn.Linear(9, 4), (3, 9)),
        "convolution": (nn.Conv2d(6, 4, 3, padding=1), (3, 6, 5, 5)),
        "transposed": (nn.ConvTranspose2d(6, 4, 2), (3, 6, 5, 5)),
        "groups": (nn.Conv2d(6, 4, 3, groups=2), (3, 6, 5, 5)),  # each reads few: left whole
    }[case]
    images = torch.randn(shape)
    for centered in (False, True):
        some = input_moments(nn.Sequential(layer), images, centered=centered, most=5)["0.weight"]
        whole = input_moments(nn.Sequential(layer), images, centered=centered)["0.weight"]
        inputs = {"linear": 5, "convolution": 9, "transposed": 8, "groups": 27}[case]
        assert some.shape[-1] == inputs
        assert torch.allclose(some, whole[..., :inputs, :inputs], atol=1e-5)


@pytest.mark.parametrize("portion", [1, 10**9])
def test_images_may_be_looked_at_in_portions(portion, monkeypatch):
    torch.manual_seed(0)
    layer, images = nn.Conv2d(3, 4, 3, padding=1).double(), torch.randn(7, 3, 6, 6).double() + 1
    missing = torch.randn_like(layer(images))
    monkeypatch.setattr(patches, "PORTION", portion)
    columns, problem = patches.patches_of(layer, images), equations(layer, centre=True)
    problem.add(images, missing)
    assert torch.allclose(problem.plain(), columns @ columns.mT)
    assert torch.allclose(patches.gram(layer, images), columns @ columns.mT)
