"""Models and data as users bring them: right, or refused by a sentence that names the remedy."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from small import Doubled
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from lib import RECIPES, Recipe, Sequential, Uniform, compress
from lib.fold import fold_batchnorm
from lib.quantize import LayerWidths
from lib.relevance import (
    AGGREGATES,
    input_relevance,
    unit_sensitivity,
    weight_relevance,
)

pytestmark = pytest.mark.filterwarnings("ignore:the model itself is near chance")
CALLS = (compress, weight_relevance, input_relevance, unit_sensitivity)
EIGHT = Recipe(store=Uniform(8))


def _net(inputs=20):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, 4))


def _data(samples=60, inputs=20):
    torch.manual_seed(1)
    return torch.randn(samples, inputs), torch.arange(samples) % 4


def _error(model, other, images):
    want = model(images).detach()
    return float((other(images) - want).norm() / want.norm())


class Around(nn.Module):
    """The same network, called in another way."""

    def __init__(self, function, net=None):
        super().__init__()
        self.n, self.function = _net() if net is None else net, function

    def forward(self, x):
        return self.function(self.n, x)


def _autocast(n, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return n(x).float()


SAME = {
    "keyword": lambda n, x: n[2](input=n[1](n[0](input=x))),
    "autocast": _autocast,
    "in place on the images": lambda n, x: n(x.sub_(0.5).div_(0.25).mul_(0.25).add_(0.5)),
    "squeeze": lambda n, x: n[2](n[1](n[0](x)).unsqueeze(1).squeeze()),
}


@pytest.mark.parametrize("way", SAME)
def test_the_same_network_called_in_another_way(way):
    model, plain, (x, y) = Around(SAME[way]), Around(lambda n, x: n(x)), _data(61)
    given = x.clone()
    for aggregate in AGGREGATES:
        scores, wanted = (
            weight_relevance(m, given, y, aggregate=aggregate, batch_size=4) for m in (model, plain)
        )
        torch.testing.assert_close(scores, wanted, rtol=1e-3, atol=1e-3)
    for recipe in (*(r for r in RECIPES if "tuned" not in r), Recipe(store=Sequential())):
        if way == "keyword" or recipe in ("uniform", "lrp-gradual-rd"):
            ours, theirs = (compress(m, given, y, recipe) for m in (model, plain))
            ours, theirs = ours.to_model(plain), theirs.to_model(plain)
            assert _error(theirs, ours, x) < 0.1
    assert torch.equal(given, x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_any_dtype_of_model_and_default(dtype):
    model, (x, y) = _net().to(dtype), _data()
    exact = weight_relevance(copy.deepcopy(model).double(), x.to(dtype).double(), y)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for name, score in weight_relevance(model, x.to(dtype), y).items():
            assert score.dtype == dtype
            torch.testing.assert_close(score.double(), exact[name], rtol=0.02, atol=0.02)
        assert input_relevance(model, x.to(dtype), y).dtype == dtype
        for recipe in ("lrp-paper", "lrp-gradual-rd", "deeplift-baseline", Recipe()):
            decoded = compress(model, x.to(dtype), y, recipe).to_model(model)
            assert all(p.dtype == dtype for p in decoded.parameters())
        assert (
            _error(model, compress(model, x.to(dtype), y, EIGHT).to_model(model), x.to(dtype))
            < 0.03
        )
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("rule", ["epsilon", "flat", "box"])
def test_pixels_in_any_layout_keep_their_relevance(rule):
    torch.manual_seed(0)
    body = (nn.Conv2d(3, 4, 3, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3, bias=False))
    model, x, y = nn.Sequential(*body), torch.rand(4, 3, 6, 6), torch.tensor([0, 1, 2, 0])
    x[x < 0.5] = 0  # black
    logits = model(x).gather(1, y[:, None])[:, 0].detach()
    last = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    turned = nn.Sequential(Around(lambda n, x: n(x.permute(0, 3, 1, 2)), model))
    layouts = [(model, x), (model, x.contiguous(memory_format=torch.channels_last)), (model, last),
               (turned, x.permute(0, 2, 3, 1).contiguous())]  # fmt: skip
    for net, images in layouts:
        found = input_relevance(net, images, y, rule=rule).flatten(1).sum(1)
        torch.testing.assert_close(found, logits, rtol=1e-4, atol=1e-6)


def test_images_that_require_grad_and_own_parameters_are_no_obstacle():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(20, 20))

        def forward(self, x):
            return F.linear(x, self.w)

    model, (x, y) = nn.Sequential(Own(), _net()), _data()
    scores = weight_relevance(model, x.clone().requires_grad_(), y)
    twin = nn.Sequential(nn.Linear(20, 20, bias=False), model[1])
    twin[0].weight = model[0].w
    wanted = weight_relevance(twin, x, y)
    assert set(scores) == {"1.0.weight", "1.2.weight"}
    torch.testing.assert_close(scores, {name: wanted[name] for name in scores})


def test_batchnorm_on_another_axis_and_a_kernel_used_twice_are_not_folded():
    class TwoScales(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.b = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
            self.f = nn.Linear(144, 3)

        def forward(self, x):
            other = F.conv2d(x, self.c.weight, self.c.bias, padding=2, dilation=2)
            return self.f((self.b(self.c(x)) + other).relu().flatten(1))

    torch.manual_seed(0)
    axis = nn.Sequential(
        *(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3))
    )
    spectral = parametrizations.spectral_norm(nn.Conv2d(1, 4, 3, padding=1))
    computed = nn.Sequential(spectral, nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(144, 3))
    for model, shape in ((axis, (6, 6)), (TwoScales(), (1, 6, 6)), (computed, (1, 6, 6))):
        x, y = torch.randn(24, *shape), torch.arange(24) % 3
        for module in model.eval().modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_var.uniform_(0.3, 3), module.running_mean.normal_()
        assert torch.allclose(fold_batchnorm(model)(x), model(x), atol=1e-5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert _error(model, compress(model, x, y, EIGHT).to_model(model), x) < 0.02


def test_layers_that_no_rule_scores_are_named_with_their_share():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.l, self.f = nn.LSTM(5, 32, batch_first=True), nn.Linear(32, 4)

        def forward(self, x):
            return self.f(self.l(x)[0][:, -1])

    bag = nn.Sequential(nn.EmbeddingBag(100, 16), nn.Linear(16, 4))
    y = torch.arange(24) % 4
    numbers = torch.randint(0, 100, (24, 6))
    cases = (Recurrent(), torch.randn(24, 4, 5), "'l' .LSTM"), (bag, numbers, "'0' .EmbeddingBag")
    for model, x, name in cases:
        with pytest.warns(UserWarning, match=rf"{name}.: 9\d%"):
            compress(model, x, y, "uniform")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "the model itself")
        compress(_net(), *_data(), "uniform")


def test_few_or_constant_images_warn_and_leave_a_network():
    model, (x, y) = _net(), _data(200)
    for images, match in ((x[:1], "1 reference image .*'0', '2'"),
                          (torch.ones(50, 20), "50 reference images .*'0', '2'")):  # fmt: skip
        for recipe in ("lrp-rd", "lrp-gradual-rd", Recipe(store=Sequential())):
            with pytest.warns(UserWarning, match=match):
                decoded = compress(model, images, y[: len(images)], recipe).to_model(model)
            assert decoded(x).std(0).mean() > 0.1 * model(x).std(0).mean()


def test_learned_queries_are_named_and_kept():
    class Query(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = nn.Parameter(torch.randn(8))
            self.of, self.a, self.c = nn.Linear(8, 16), nn.Linear(20, 16), nn.Linear(16, 4)

        def forward(self, x):
            return self.c((self.a(x) + self.of(self.q.expand(len(x), -1))).relu())

    torch.manual_seed(0)
    model, (x, y) = Query(), _data(200)
    with pytest.warns(UserWarning, match="200 reference images .*'of' vary"):
        compressed = compress(model, x, y, "lrp-rd")
    assert _error(model, compressed.to_model(model), x) < 0.3


def test_the_same_convolution_with_depth_one_and_a_bare_layer_are_treated_alike():
    torch.manual_seed(0)
    flat = nn.Sequential(nn.Conv2d(1, 6, 3, stride=2), nn.ReLU(), nn.Conv2d(6, 6, 2, groups=2),
                         nn.Flatten(), nn.Linear(24, 4))  # fmt: skip
    first, second = (
        nn.Conv3d(1, 6, (1, 3, 3), stride=(1, 2, 2)),
        nn.Conv3d(6, 6, (1, 2, 2), groups=2),
    )
    deep = nn.Sequential(first, nn.ReLU(), second, nn.Flatten(), nn.Linear(24, 4))
    like = deep.state_dict()
    deep.load_state_dict({k: v.reshape(like[k].shape) for k, v in flat.state_dict().items()})
    bare, y = nn.Linear(20, 4), _data(200)[1]
    x, v = torch.randn(200, 1, 8, 8), _data(200)[0]
    for recipe in ("lrp-gradual-rd", Recipe(store=Sequential())):
        for one, other, a, b in ((flat, deep, x, x[:, :, None]), (nn.Sequential(bare), bare, v, v)):
            c, d = compress(one, a, y, recipe), compress(other, b, y, recipe)
            assert abs(c.nbytes - d.nbytes) < 12
            torch.testing.assert_close(c.to_model(one)(a), d.to_model(other)(b))


def test_outputs_that_hold_the_logits_are_told_by_output():
    plain, (x, y) = Around(lambda n, x: n(x)), _data()
    for function, output in (
        (lambda n, x: {"logits": n(x)}, lambda o: o["logits"]),
        (lambda n, x: (x, n(x)), lambda o: o[1]),
    ):
        model = Around(function)
        for call in CALLS[1:]:
            torch.testing.assert_close(call(model, x, y, output=output), call(plain, x, y))
        one, other = compress(model, x, y, output=output, ratio=5), compress(plain, x, y, ratio=5)
        assert one.to_bytes() == other.to_bytes()
        assert not model._forward_hooks


class Viewed(nn.Module):
    """A forward that asks for a view of what a convolution puts out, as many do."""

    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 36, 3)

    def forward(self, x):
        return self.fc(F.relu(self.conv(x)).view(x.size(0), -1))


@pytest.mark.parametrize("recipe", ["lrp-sequential", "lrp-gradual-rd", "deeplift-baseline"])
def test_a_view_of_activations_is_no_obstacle(recipe):
    torch.manual_seed(0)
    model, images = Viewed().eval(), torch.randn(90, 3, 6, 6)
    data = images, model(images).argmax(1)
    for given in (images, images.contiguous(memory_format=torch.channels_last)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of images that are noise
            packed = compress(model, given, data[1], recipe, val=data)
        assert packed.to_model(model)(images).isfinite().all()


def test_a_forward_that_changes_its_own_weights_leaves_the_callers_alone():
    class Clamped(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(20, 8), nn.Linear(8, 4)

        def forward(self, x):
            self.a.weight.data.clamp_(-0.1, 0.1)
            return self.b(F.relu(self.a(x)))

    torch.manual_seed(0)
    model, (images, labels) = Clamped().eval(), _data()
    before = copy.deepcopy(model.state_dict())
    assert before["a.weight"].abs().max() > 0.1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        compress(model, images, labels)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_a_layer_of_ones_own_that_is_linear_for_the_first_images_alone_is_not_replaced():
    class Saturating(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 20))

        def forward(self, x):
            return (x @ self.weight.t()).clamp(-30, 30)

    torch.manual_seed(0)
    model, (images, labels) = nn.Sequential(Saturating(), nn.Linear(4, 4)), _data()
    images[20:] *= 50
    forward, backward = (
        weight_relevance(model, images[order], labels[order])
        for order in (slice(None), torch.arange(len(images)).flip(0))
    )
    torch.testing.assert_close(forward, backward)


def test_one_sample_after_the_other_without_an_axis_for_them():
    loop = Around(lambda n, x: torch.stack([n[2](n[1](n[0](row))) for row in x]))
    plain, (x, y) = Around(lambda n, x: n(x)), _data()
    torch.testing.assert_close(weight_relevance(loop, x, y), weight_relevance(plain, x, y))
    assert _error(loop, compress(loop, x, y).to_model(loop), x) < 0.1
    both = [weight_relevance(m, x, y, aggregate="abs") for m in (loop, plain)]
    torch.testing.assert_close(*both)


@pytest.mark.parametrize("recipe", ["lrp-sequential", "lrp-gradual-rd", "uniform"])
def test_a_bias_that_is_computed_stays_as_it_is(recipe):
    model, (x, y) = _net(), _data()
    parametrize.register_parametrization(model[0], "bias", Doubled())
    small = compress(model, x, y, recipe)
    original = "0.parametrizations.bias.original"
    torch.testing.assert_close(
        small.state_dict()[original].float(), model.state_dict()[original], rtol=1e-3, atol=1e-3
    )
    assert _error(model, small.to_model(model), x) < 1


class Selecting(nn.Module):
    """Layers with one of torch's functions between them."""

    def __init__(self, function, width):
        super().__init__()
        self.c, self.o = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.Linear(width, 4, bias=False)
        self.register_buffer("grid", F.affine_grid(0.8 * torch.eye(2, 3)[None], (1, 4, 6, 6)))
        self.function = function

    def forward(self, x):
        return self.o(self.function(self, F.relu(self.c(x))).flatten(1))


def _unpooled(s, h):
    return F.max_unpool2d(*F.max_pool2d(h, 2, return_indices=True), 2)


SELECTING = {
    "median": (lambda s, h: h.flatten(2).median(2).values, 4),
    "third smallest": (lambda s, h: h.flatten(2).kthvalue(30, 2).values, 4),
    "pooled, and back": (_unpooled, 144),
    "adaptively": (lambda s, h: F.adaptive_max_pool2d(h, 2, return_indices=True)[0], 16),
    "on a grid": (lambda s, h: F.grid_sample(h, s.grid.expand(len(h), -1, -1, -1)), 144),
    "in half precision": (lambda s, h: h.half().to(h.dtype).bfloat16().to(h.dtype), 144),
}


@pytest.mark.filterwarnings("ignore:Default grid_sample", "ignore:Default affine")
@pytest.mark.parametrize("name", SELECTING)
def test_functions_that_select_or_mix_pass_relevance_by_their_gradient(name):
    torch.manual_seed(0)
    model, x = Selecting(*SELECTING[name]), torch.randn(6, 2, 6, 6)
    y = torch.arange(6) % 4
    scores = weight_relevance(model, x, y)
    model(x).gather(1, y[:, None]).sum().backward()
    for path, weight in model.named_parameters():
        torch.testing.assert_close(
            scores[path], weight.detach() * weight.grad, rtol=1e-4, atol=1e-4
        )


PROTOTYPES = torch.randn(4, 4, generator=torch.Generator().manual_seed(2))


def _wide(logits):
    return logits[:, :, None].expand(-1, -1, 4)


def test_cosine_similarity_is_a_product_of_two_that_are_normalised():
    written = Around(lambda n, x: (F.normalize(n(x))[:, None] * F.normalize(PROTOTYPES)).sum(2))
    given = Around(lambda n, x: F.cosine_similarity(n(x)[:, None], PROTOTYPES[None], dim=2))
    torch.testing.assert_close(
        weight_relevance(given, *_data()), weight_relevance(written, *_data())
    )
    both = Around(lambda n, x: F.cosine_similarity(n(x)[:, None], n(-x)[:, :, None], dim=-1))
    apart = Around(
        lambda n, x: (F.normalize(n(x))[:, None] * F.normalize(_wide(n(-x)), dim=-1)).sum(-1)
    )
    torch.testing.assert_close(weight_relevance(both, *_data()), weight_relevance(apart, *_data()))


class Behind(nn.Module):
    """One layer acts only as a divisor, or decides which other one is used."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.d, self.g, self.f = nn.Linear(20, 16), nn.Linear(20, 16), nn.Linear(16, 4)
        self.how = how

    def forward(self, x):
        return self.f(self.how(self.d(x).relu(), self.g(x)))


BEHIND = {
    "divisor": lambda d, g: d / (0.1 + g.sigmoid()),
    "index": lambda d, g: d * F.one_hot(g.argmax(1), 16),
    "comparison": lambda d, g: d * (g > 0),
}


@pytest.mark.filterwarnings("ignore:compression took the accuracy")
@pytest.mark.parametrize("how", BEHIND)
def test_a_layer_that_relevance_never_reaches_is_named_if_it_goes(how):
    model, images = Behind(BEHIND[how]), _data()[0]
    labels = model(images).argmax(1)
    with pytest.warns(UserWarning, match="no weight of 'g.weight' is left.*recipe='uniform'"):
        compress(model, images, labels, "lrp-rd")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        small = compress(model, images, labels, EIGHT)
    assert small["g.weight"].decode().any()


@pytest.mark.parametrize("recipe", ["lrp-rd", "lrp-sequential"])
@pytest.mark.parametrize("value", [0.1, 30.1, 70.1])
def test_a_channel_that_never_varies_before_a_depthwise_layer(value, recipe):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
    )
    model[0].weight.data[4], model[0].bias.data[4] = 0, value
    images, labels = torch.randn(60, 3, 8, 8), torch.arange(60) % 4
    small = compress(model, images, labels, RECIPES[recipe].at(1e-5))
    assert _error(model, small.to_model(model), images) < 0.05


def test_weights_out_of_reach_of_float16_are_named():
    model = _net()
    model[0].weight.data *= 1e-7
    with pytest.warns(UserWarning) as told:
        compress(model, *_data(), EIGHT)
    assert "weights of '0.weight' are smaller than 1e-05" in str(told[0].message)


def test_a_layer_that_nothing_uses_gets_a_width_as_well():
    model = Around(lambda n, x: n(x))
    model.unused = nn.Linear(3, 3)
    small = compress(model, *_data(), Recipe(store=LayerWidths(bits=4)))
    assert "unused.weight" in small


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_channels_last_weights_have_the_same_relevance(aggregate):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 4))
    images, labels = torch.randn(8, 3, 6, 6), torch.arange(8) % 4
    wanted = weight_relevance(model, images, labels, aggregate=aggregate)
    last = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(weight_relevance(last, images, labels, aggregate=aggregate), wanted)


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_positions_in_the_first_axis_belong_to_their_image(aggregate):
    class Positions(nn.Module):
        def __init__(self, flat):
            super().__init__()
            self.n, self.flat = _net(5).double(), flat

        def forward(self, x):
            x = x.view(-1, 4, 5)
            h = self.n(x.flatten(0, 1)).view(-1, 4, 4) if self.flat else self.n(x)
            return h.sum(1)

    images, labels = _data()
    flat, wanted = (
        weight_relevance(Positions(flat), images.double(), labels, aggregate=aggregate)
        for flat in (True, False)
    )
    torch.testing.assert_close(flat, wanted)


class Absolute(nn.Module):
    def forward(self, x):
        return torch.fft.fft(x).abs()


def test_the_absolute_value_of_a_spectrum_passes_relevance_by_its_gradient():
    model = nn.Sequential(nn.Linear(20, 16, bias=False), Absolute(), nn.Linear(16, 4, bias=False))
    images, labels = _data()
    model, images = model.double(), images.double()
    given = input_relevance(model, images, labels).sum(1)
    torch.testing.assert_close(given, model(images).gather(1, labels[:, None])[:, 0].detach())


def test_a_query_that_may_read_nothing_reads_zeros():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.q, self.o = nn.Linear(5, 5), nn.Linear(5, 4)
            self.register_buffer("mask", torch.ones(4, 4, dtype=torch.bool).tril(-1))

        def forward(self, x):
            x = x.view(-1, 1, 4, 5)
            read = F.scaled_dot_product_attention(self.q(x), x, x, attn_mask=self.mask)
            return self.o(read.mean((1, 2)))

    images, labels = _data()
    assert weight_relevance(Masked(), images, labels)["q.weight"].any()


def test_a_model_may_keep_what_it_makes_of_its_biases():
    class Keeping(nn.Module):
        def __init__(self):
            super().__init__()
            self.n, self.bias, self.kept = _net(), nn.Parameter(torch.randn(2)), None
            self.register_buffer("index", torch.tensor([0, 1, 1, 0]))

        def forward(self, x):
            if self.kept is None:
                self.kept = self.bias[self.index]
            return self.n(x) + self.kept

    model, (images, labels) = Keeping(), _data()
    scores = weight_relevance(model, images, labels)
    assert model.kept is None and set(scores) == {"n.0.weight", "n.2.weight"}
    copy.deepcopy(model)
