"""Relevance of weights and inputs against oracles written from the equations, zennit and Captum."""

import copy
import functools
import math

import pytest
import torch
import torch.nn.functional as F
from captum.attr import LRP
from captum.attr._utils.lrp_rules import Alpha1_Beta0_Rule, EpsilonRule, GammaRule
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from oracles import BATCHNORMS, NORMS, Node, OracleRule, Tape, aggregated, start_relevance
from torch import nn
from zennit import rules as zennit_rules
from zennit.composites import (
    EpsilonAlpha2Beta1,
    EpsilonAlpha2Beta1Flat,
    EpsilonGammaBox,
    EpsilonPlus,
    EpsilonPlusFlat,
    LayerMapComposite,
)
from zennit.layer import Sum
from zennit.types import Activation, AvgPool, Linear

from lib.fold import fold_batchnorm
from lib.relevance import (
    AGGREGATES,
    COMPOSITES,
    EPSILON,
    RULES,
    STARTS,
    Rule,
    UnsupportedLayerError,
    filter_relevance,
    input_relevance,
    scored_weights,
    unit_sensitivity,
    weight_relevance,
)
from study.networks import BasicBlock, build

CLASSES = 3
FIRST_ONLY = ("flat", "box")


# ---------------------------------------------------------------------- networks with two readings


class Residual(nn.Module):
    def __init__(self, body, shortcut=None):
        super().__init__()
        self.body, self.shortcut = body, nn.Identity() if shortcut is None else shortcut

    def forward(self, x):
        return torch.relu(self.body(x) + self.shortcut(x))

    def explain(self, tape, name, node):
        body = tape.follow(f"{name}.body", self.body, node)
        total = tape.add(body, tape.follow(f"{name}.shortcut", self.shortcut, node))
        return tape.activation(torch.relu, total)


class SumResidual(Residual):
    """The same block as zennit wants it, for zennit."""

    def __init__(self, block):
        super().__init__(block.body, block.shortcut)
        self.sum, self.relu = Sum(), nn.ReLU()

    def forward(self, x):
        return self.relu(self.sum(torch.stack([self.body(x), self.shortcut(x)], -1)))


class ReadBasicBlock(BasicBlock):
    """The ResNet block, whose shortcut strides and pads channels; read after folding."""

    def explain(self, tape, name, node):
        body = tape.activation(torch.relu, tape.layer(f"{name}.conv1", self.conv1, node))
        body = tape.layer(f"{name}.conv2", self.conv2, body)
        low, high = self.widen // 2, self.widen - self.widen // 2

        def shortcut(x):
            return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, low, high))

        return tape.activation(torch.relu, tape.add(body, tape.move(shortcut, node)))


class Concatenation(nn.Module):
    def __init__(self, *branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], 1)

    def explain(self, tape, name, node):
        branches = enumerate(self.branches)
        return tape.cat([tape.follow(f"{name}.branches.{i}", b, node) for i, b in branches], 1)


class SelfAttention(nn.Module):
    """One attention, written in the ways people write it."""

    ways = ("module", "module with weights", "module, time first", "fused", "by hand")

    def __init__(self, width, heads, bias=True, way="module", causal=False):
        super().__init__()
        self.heads, self.way, self.causal = heads, way, causal
        self.mha = nn.MultiheadAttention(width, heads, bias=bias, batch_first=True)

    def forward(self, x):
        future = torch.ones(x.shape[1], x.shape[1]).triu(1).bool() if self.causal else None
        if self.way.startswith("module"):
            self.mha.batch_first = "time first" not in self.way
            x = x if self.mha.batch_first else x.transpose(0, 1)
            y = self.mha(x, x, x, attn_mask=future, need_weights="weights" in self.way)[0]
            return y if self.mha.batch_first else y.transpose(0, 1)
        packed = F.linear(x, self.mha.in_proj_weight, self.mha.in_proj_bias)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in packed.chunk(3, -1))
        if self.way == "fused":
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            if self.causal:
                scores = scores.masked_fill(future, -math.inf)
            mixed = scores.softmax(-1) @ v
        return self.mha.out_proj(mixed.transpose(1, 2).flatten(2))

    def explain(self, tape, name, node):
        mha, (_, length, width) = self.mha, node.value.shape
        per_head = width // self.heads

        def linear(weight, x):
            return x @ weight.T

        def chunk(i):
            def pick(x):
                part = x[..., i * width : (i + 1) * width]
                return part.reshape(len(x), length, self.heads, per_head).transpose(1, 2)

            return pick

        def merge(x):
            return x.transpose(1, 2).reshape(len(x), length, width)

        path = f"{name}.mha"
        packed = tape.affine(
            f"{path}.in_proj_weight",
            linear,
            mha.in_proj_weight,
            mha.in_proj_bias,
            node,
            tape.choose(path, mha),
        )
        q, k, v = (tape.move(chunk(i), packed) for i in range(3))
        q = tape.activation(lambda x: x / math.sqrt(per_head), q)
        scores = tape.matmul(q, tape.move(lambda x: x.transpose(-1, -2), k))
        past = torch.ones(length, length).tril().double() if self.causal else None
        attention = tape.softmax(scores, past)
        mixed = tape.move(merge, tape.matmul(attention, v))
        return tape.layer(f"{path}.out_proj", mha.out_proj, mixed)


class TransformerBlock(nn.Module):
    def __init__(self, width, heads, bias=True):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), SelfAttention(width, heads, bias)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width, bias), nn.GELU(), nn.Linear(2 * width, width, bias)
        )

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))

    def explain(self, tape, name, node):
        normed = tape.norm(self.norm1, node)
        node = tape.add(node, self.attention.explain(tape, f"{name}.attention", normed))
        normed = tape.norm(self.norm2, node)
        return tape.add(node, tape.follow(f"{name}.mlp", self.mlp, normed))


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)

    def explain(self, tape, name, node):
        return tape.average(lambda x: x.mean(1), node)


class Tokens(nn.Module):
    """Integer tokens and learned positions -> transformer."""

    def __init__(self, vocabulary, length, width):
        super().__init__()
        self.word, self.place = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.rest = nn.Sequential(
            TransformerBlock(width, 2), nn.LayerNorm(width), Mean(), nn.Linear(width, CLASSES)
        )

    def forward(self, tokens):
        return self.rest(self.word(tokens) + self.place(torch.arange(tokens.shape[1])))

    def explain(self, tape, name, tokens):
        word, place = Node(self.word(tokens).detach()), Node(self.place.weight.detach())
        place.value = place.value.expand_as(word.value)
        place.relevance = torch.zeros_like(word.value)
        last = tape.follow("rest", self.rest, tape.add(word, place))
        return last, word, place


def _head(features):
    return nn.Flatten(), nn.Linear(features, CLASSES)


NETWORKS = {
    "linear": lambda: ((6,), nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, CLASSES))),
    "positions": lambda: (
        (4, 3),
        nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2), nn.ReLU(), *_head(8)),
    ),
    "stride and padding": lambda: (
        (2, 6, 5),
        nn.Sequential(
            nn.Conv2d(2, 3, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(3, 4, (2, 3), padding=(0, 1), bias=False),
            nn.ReLU(),
            *_head(24),
        ),
    ),
    "dilation": lambda: (
        (2, 6, 6),
        nn.Sequential(
            nn.Conv2d(2, 3, 3, dilation=2, padding="same"),
            nn.ReLU(),
            nn.Conv2d(3, 2, (3, 2), dilation=(2, 1), stride=(1, 2)),
            nn.ReLU(),
            *_head(12),
        ),
    ),
    "reflect padding": lambda: (
        (2, 5, 5),
        nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect", stride=2), nn.ReLU(), *_head(27)
        ),
    ),
    "groups": lambda: (
        (4, 5, 5),
        nn.Sequential(
            nn.Conv2d(4, 6, 3, groups=2, padding=1, stride=2),
            nn.ReLU(),
            nn.Conv2d(6, 3, 2, groups=3),
            nn.ReLU(),
            *_head(12),
        ),
    ),
    "depthwise": lambda: (
        (3, 5, 5),
        nn.Sequential(
            nn.Conv2d(3, 6, 3, groups=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(6, 2, 1),
            nn.ReLU(),
            *_head(50),
        ),
    ),
    "conv1d": lambda: (
        (2, 9),
        nn.Sequential(
            nn.Conv1d(2, 4, 3, stride=2, padding=2, dilation=2),
            nn.ReLU(),
            nn.AvgPool1d(2),
            nn.Conv1d(4, 4, 2, groups=2),
            nn.ReLU(),
            *_head(4),
        ),
    ),
    "transposed": lambda: (
        (2, 3, 3),
        nn.Sequential(
            nn.ConvTranspose2d(2, 4, 3, stride=2, padding=1, output_padding=1),
            nn.ReLU(),
            nn.ConvTranspose2d(4, 2, 2, groups=2, dilation=2),
            nn.ReLU(),
            nn.AvgPool2d(4),
            *_head(8),
        ),
    ),
    "residual sum": lambda: (
        (2, 4, 4),
        nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1),
            nn.ReLU(),
            Residual(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 3, 1))),
            Residual(nn.Conv2d(3, 4, 2, stride=2), nn.Conv2d(3, 4, 1, stride=2)),
            nn.AdaptiveAvgPool2d(1),
            *_head(4),
        ),
    ),
    "concatenation": lambda: (
        (2, 4, 4),
        nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1),
            nn.LeakyReLU(0.1),
            Concatenation(
                nn.Conv2d(3, 2, 1),
                nn.Sequential(nn.Conv2d(3, 2, 3, padding=1), nn.ReLU()),
                nn.MaxPool2d(3, stride=1, padding=1),
            ),
            nn.AvgPool2d(2),
            *_head(28),
        ),
    ),
    "pooling": lambda: (
        (2, 9, 9),
        nn.Sequential(
            nn.Conv2d(2, 3, 2),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
            nn.Conv2d(3, 4, 2, padding=1),
            nn.SiLU(),
            nn.AvgPool2d(2, stride=1, padding=1, ceil_mode=True),
            nn.AdaptiveMaxPool2d(4),
            nn.AdaptiveAvgPool2d((3, 2)),
            nn.Dropout(),
            *_head(24),
        ),
    ),
    "gelu": lambda: (
        (5,),
        nn.Sequential(
            nn.Linear(5, 6), nn.GELU(), nn.LayerNorm(6), nn.Linear(6, 4), nn.SiLU(), *_head(4)
        ),
    ),
    "batchnorm first": lambda: (
        (2, 4, 4),
        nn.Sequential(
            nn.BatchNorm2d(2), nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.ReLU(), *_head(48)
        ),
    ),
    "batchnorm before a convolution": lambda: (
        (2, 4, 4),
        nn.Sequential(
            nn.Conv2d(2, 3, 3, padding=1),
            nn.ReLU(),
            nn.BatchNorm2d(3),
            nn.Conv2d(3, 4, 3, padding=1, stride=2),
            nn.ReLU(),
            *_head(16),
        ),
    ),
    "batchnorm alone": lambda: (
        (5,),
        nn.Sequential(
            *(nn.Linear(5, 6), nn.ReLU(), nn.BatchNorm1d(6), nn.GELU()), nn.Linear(6, CLASSES)
        ),
    ),
    "group norm": lambda: (
        (2, 3, 3),
        nn.Sequential(
            nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 3, 2), *_head(3)
        ),
    ),
    "rms norm": lambda: (
        (5,),
        nn.Sequential(nn.Linear(5, 6), nn.RMSNorm(6), nn.ReLU(), nn.RMSNorm(6, 0.1), *_head(6)),
    ),
    "attention": lambda: (
        (3, 4),
        nn.Sequential(
            nn.Linear(4, 4),
            TransformerBlock(4, 2),
            nn.LayerNorm(4),
            Mean(),
            nn.Linear(4, CLASSES),
        ),
    ),
}


def _randomise(model, seed, zero_bias=False):
    """Weights of size 1/sqrt(fan in), biases and statistics that matter, evaluation mode."""
    generator = torch.Generator().manual_seed(seed)

    def draw(like, scale=1.0):
        return scale * torch.randn(like.shape, generator=generator, dtype=torch.float64)

    for module in model.modules():
        norm = isinstance(module, BATCHNORMS + NORMS)
        for name, parameter in module.named_parameters(recurse=False):
            if norm and name == "weight":
                parameter.data = 1 + draw(parameter, 0.2)
            elif name.endswith("weight"):
                fan_in = parameter[0].numel()
                parameter.data = draw(parameter, 1.4 / math.sqrt(fan_in))
            else:
                parameter.data = draw(parameter, 0.0 if zero_bias else 0.3)
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.copy_(draw(module.running_mean, 0.0 if zero_bias else 0.5))
            module.running_var.copy_(0.5 + draw(module.running_var).abs())
    return model.double().eval()


def _draw(*shape, seed=0):
    """Standard normal images."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _make(network, seed=0, samples=4, zero_bias=False):
    shape, model = NETWORKS[network]()
    _randomise(model, seed, zero_bias)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (samples,), generator=generator)
    return model, _draw(samples, *shape, seed=seed + 1), labels


@functools.cache
def _known(network):
    """Connections of a network, which neither weights nor rules change: found once."""
    return {}


def _choose(rule):
    """The oracle's own reading of a rule's name or of a ``Rule``: module -> OracleRule."""
    if isinstance(rule, Rule):
        return lambda name, module: OracleRule(
            rule.name, rule.epsilon, rule.gamma, rule.low, rule.high
        )
    parts = {
        "epsilon-plus": ("epsilon", "zplus", None),
        "epsilon-plus-flat": ("epsilon", "zplus", "flat"),
        "epsilon-alpha2beta1": ("epsilon", "alpha2beta1", None),
        "epsilon-alpha2beta1-flat": ("epsilon", "alpha2beta1", "flat"),
    }
    dense, convolution, first = parts.get(rule, (rule, rule, None))
    visited = []

    def choose(name, module):
        visited.append(name)
        if first and len(visited) == 1:
            return OracleRule(first, EPSILON)
        is_convolution = isinstance(module, nn.modules.conv._ConvNd)
        return OracleRule(convolution if is_convolution else dense, EPSILON)

    return choose


def _oracle(model, images, labels, rule="epsilon", start="target", choose=None, known=None):
    known = {} if known is None else known
    tape, node = Tape(choose or _choose(rule), epsilon=0.0, known=known), Node(images)
    last = tape.follow("", model, node)
    torch.testing.assert_close(last.value, model(images).detach(), rtol=1e-10, atol=1e-10)
    tape.backward(last, start_relevance(last.value, labels, start))
    return tape, node.relevance


def _assert_near(actual, expected, tolerance=1e-9):
    """Largest difference relative to the largest expected value."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert torch.isfinite(actual).all()
    difference, largest = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert difference <= tolerance * largest


def _assert_scores_near(actual, expected, tolerance=1e-9):
    assert set(actual) == set(expected)
    for name in expected:
        _assert_near(actual[name], expected[name], tolerance)


def _expected(tape, aggregate="sum"):
    return {name: aggregated(r, aggregate) for name, r in tape.weights.items()}


# ------------------------------------------------------------------------ rules against the oracle


@pytest.mark.parametrize("rule", [r for r in RULES if r not in FIRST_ONLY])
@pytest.mark.parametrize("network", NETWORKS)
def test_rule_equals_its_connections(network, rule):
    model, images, labels = _make(network)
    for start in STARTS:
        tape, at_inputs = _oracle(model, images, labels, rule, start, known=_known(network))
        _assert_near(input_relevance(model, images, labels, rule=rule, start=start), at_inputs)
        for aggregate in AGGREGATES if start == "target" else ("sum",):
            scores = weight_relevance(
                model, images, labels, rule=rule, start=start, aggregate=aggregate
            )
            _assert_scores_near(scores, _expected(tape, aggregate))


@pytest.mark.parametrize("rule", ["epsilon-plus", "epsilon-plus-flat", "epsilon-alpha2beta1-flat"])
@pytest.mark.parametrize("network", NETWORKS)
def test_composite_equals_its_connections(network, rule):
    model, images, labels = _make(network)
    tape, at_inputs = _oracle(model, images, labels, rule, known=_known(network))
    _assert_near(input_relevance(model, images, labels, rule=rule), at_inputs)
    for aggregate in AGGREGATES:
        scores = weight_relevance(model, images, labels, rule=rule, aggregate=aggregate)
        _assert_scores_near(scores, _expected(tape, aggregate))


@pytest.mark.parametrize(
    "rule",
    [Rule("epsilon", epsilon=0.25), Rule("zplus", epsilon=0.25), Rule("alpha2beta1", epsilon=0.25)]
    + [Rule("gamma", epsilon=0.25, gamma=0.5), Rule("gamma", gamma=2.0)],
    ids=str,
)
@pytest.mark.parametrize("network", ["linear", "groups", "transposed", "residual sum", "attention"])
def test_constants_of_a_rule_are_used(network, rule):
    model, images, labels = _make(network, seed=5)
    tape, at_inputs = _oracle(model, images, labels, rule, known=_known(network))
    _assert_near(input_relevance(model, images, labels, rule=rule), at_inputs)
    _assert_scores_near(weight_relevance(model, images, labels, rule=rule), _expected(tape))


def _bounds(images, low, high):
    """Bounds of every input value: given for all, given per channel, or those of all images."""
    low = images.min() if low is None else torch.tensor(low).double()
    high = images.max() if high is None else torch.tensor(high).double()
    ones = [1] * (images.dim() - 2)
    return tuple(bound.reshape(-1, *ones).expand(images.shape[1:]) for bound in (low, high))


@pytest.mark.parametrize("bounds", ["given", "given per channel", "of the images"])
@pytest.mark.parametrize(
    "network", ["linear", "stride and padding", "dilation", "reflect padding", "groups", "conv1d"]
)
def test_box_rule_for_the_layer_that_reads_the_images(network, bounds):
    model, images, labels = _make(network, seed=2)
    channels = images.shape[1]
    low, high = {
        "given": (-2.0, 3.0),
        "given per channel": (tuple(-1.0 - i for i in range(channels)), (2.5,) * channels),
        "of the images": (None, None),
    }[bounds]
    box = OracleRule("box", EPSILON, 0.0, *_bounds(images, low, high))
    tape, at_inputs = _oracle(
        *(model, images, labels),
        choose=lambda name, _: box if name == "0" else OracleRule("epsilon", EPSILON),
        known=_known(network),
    )
    for batch_size in (50, 1):
        options = {"rule": {"0": Rule("box", low=low, high=high)}, "batch_size": batch_size}
        _assert_near(input_relevance(model, images, labels, **options), at_inputs)
        _assert_scores_near(weight_relevance(model, images, labels, **options), _expected(tape))


@pytest.mark.parametrize("rule", FIRST_ONLY)
def test_rules_for_images_leave_the_other_layers_to_epsilon(rule):
    model, images, labels = _make("groups")
    alone = weight_relevance(model, images, labels, rule=rule)
    _assert_scores_near(alone, weight_relevance(model, images, labels, rule={"0": rule}), 1e-12)


def test_mapping_chooses_by_pattern_first_match_first():
    model, images, labels = _make("residual sum")
    rule = {"2.body.*": Rule("gamma", gamma=1.0), "2.*": "zplus", "[0-3]*": "alpha2beta1"}

    def choose(name, module):
        if name.startswith("2.body."):
            return OracleRule("gamma", EPSILON, 1.0)
        if name.startswith("2."):
            return OracleRule("zplus", EPSILON)
        return OracleRule("alpha2beta1" if name[0] in "0123" else "epsilon", EPSILON)

    tape, at_inputs = _oracle(model, images, labels, choose=choose)
    _assert_near(input_relevance(model, images, labels, rule=rule), at_inputs)
    _assert_scores_near(weight_relevance(model, images, labels, rule=rule), _expected(tape))


def test_ordinary_resnet_block_with_strided_shortcut():
    model = nn.Sequential(
        nn.Conv2d(2, 2, 3, padding=1),
        nn.ReLU(),
        ReadBasicBlock(2, 5, 2),
        nn.AdaptiveAvgPool2d(1),
        *_head(5),
    )
    _randomise(model, 3)
    images, labels = _draw(4, 2, 5, 5), torch.tensor([0, 1, 2, 1])
    for rule in ("epsilon", "epsilon-plus", "gamma"):
        tape, at_inputs = _oracle(fold_batchnorm(model), images, labels, rule)
        _assert_near(input_relevance(model, images, labels, rule=rule), at_inputs)
        _assert_scores_near(weight_relevance(model, images, labels, rule=rule), _expected(tape))


def test_start_of_the_softmax_gradient_is_the_gradient_of_the_true_probability():
    model, images, labels = _make("linear")
    logits = model(images).detach().requires_grad_()
    probability = torch.softmax(logits, 1).gather(1, labels[:, None]).sum()
    (expected,) = torch.autograd.grad(probability, logits)
    _assert_near(start_relevance(logits.detach(), labels, "softmax-gradient"), expected)


# ------------------------------------------------------------------- conservation and its relatives

CONSERVING = [name for name in NETWORKS if name != "attention"]


def _assert_sum(actual, expected, tolerance):
    assert abs(actual.item() - float(expected)) < tolerance * abs(float(expected))


@pytest.mark.parametrize("network", CONSERVING)
def test_weights_of_every_layer_carry_all_relevance_at_zero_bias(network):
    model, images, labels = _make(network, seed=11, zero_bias=True)
    tape, _ = _oracle(model, images, labels, known=_known(network))
    started = start_relevance(model(images), labels, "target").sum().item()
    scores = weight_relevance(model, images, labels)
    for name, arriving in tape.sums.items():
        _assert_sum(scores[name].sum(), arriving.sum(), 1e-10)
    _assert_sum(input_relevance(model, images, labels).sum(), started, 1e-10)
    _assert_sum(scores[next(iter(scores))].sum(), started, 1e-10)  # the layer at the images
    _assert_sum(scores[list(scores)[-1]].sum(), started, 1e-10)
    scores = weight_relevance(model.float(), images.float(), labels)
    for name, arriving in tape.sums.items():
        assert scores[name].dtype == torch.float32
        _assert_sum(scores[name].sum(), arriving.sum(), 1e-4)
    _assert_sum(input_relevance(model, images.float(), labels).sum(), started, 1e-4)


@pytest.mark.parametrize("rule", ["gamma", "zplus"])
@pytest.mark.parametrize("network", ["linear", "groups", "depthwise", "transposed"])
def test_other_rules_conserve_at_zero_bias(network, rule):
    model, images, labels = _make(network, seed=11, zero_bias=True)
    model[-1].weight.data.abs_()  # z⁺ drops the relevance of a logit without a positive part
    tape, _ = _oracle(model, images, labels, rule, known=_known(network))
    scores = weight_relevance(model, images, labels, rule=rule)
    for name, arriving in tape.sums.items():
        _assert_sum(scores[name].sum(), arriving.sum(), 1e-10)


@pytest.mark.parametrize("rule", [r for r in RULES if r not in FIRST_ONLY])
@pytest.mark.parametrize("network", ["linear", "stride and padding", "transposed", "conv1d"])
def test_weights_and_inputs_of_the_first_layer_get_the_same_whatever_the_bias(network, rule):
    model, images, labels = _make(network, seed=12)
    first = weight_relevance(model, images, labels, rule=rule)["0.weight"]
    _assert_sum(first.sum(), input_relevance(model, images, labels, rule=rule).sum(), 1e-10)


NOT_PIECEWISE_LINEAR = {"pooling", "gelu", "batchnorm alone", "attention", "group norm", "rms norm"}


@pytest.mark.parametrize("rule", ["lrp-0", "epsilon", Rule("epsilon", epsilon=1e-14)], ids=str)
@pytest.mark.parametrize("network", [n for n in NETWORKS if n not in NOT_PIECEWISE_LINEAR])
def test_lrp_0_of_a_relu_network_is_weight_times_gradient(network, rule):
    model, images, labels = _make(network, seed=13)
    names = list(scored_weights(model))
    logits = model(images).gather(1, labels[:, None]).sum()
    gradients = torch.autograd.grad(logits, [model.get_parameter(n) for n in names])
    scores = weight_relevance(model, images, labels, rule=rule)
    assert list(scores) == names
    for name, gradient in zip(names, gradients, strict=True):
        _assert_near(scores[name], model.get_parameter(name).detach() * gradient, 1e-10)


# ------------------------------------------------------------------------------- zennit and Captum

ZENNIT_NETWORKS = [
    *("linear", "positions", "stride and padding", "dilation", "reflect padding", "groups"),
    *("depthwise", "conv1d", "transposed", "residual sum"),
]


def _zennit(model, images, labels, composite, start):
    for name, block in list(model.named_modules()):
        if isinstance(block, Residual):
            model.set_submodule(name, SumResidual(block))
    with composite.context(model) as hooked:
        images = images.clone().requires_grad_()
        logits = hooked(images)
        relevance = start_relevance(logits.detach(), labels, start)
        return torch.autograd.grad(logits, images, relevance)[0]


@pytest.mark.parametrize(
    "rule, hook",
    [
        (Rule("epsilon", epsilon=1e-6), zennit_rules.Epsilon(1e-6)),
        (Rule("epsilon", epsilon=0.1), zennit_rules.Epsilon(0.1)),
        (Rule("zplus", epsilon=1e-6), zennit_rules.ZPlus()),
        (Rule("alpha2beta1", epsilon=1e-6), zennit_rules.AlphaBeta(2, 1)),
        (Rule("gamma", epsilon=1e-6), zennit_rules.Gamma()),
        (Rule("gamma", epsilon=1e-3, gamma=1.5), zennit_rules.Gamma(1.5, 1e-3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("network", ZENNIT_NETWORKS)
def test_input_relevance_agrees_with_zennit(network, rule, hook):
    model, images, labels = _make(network, seed=21)
    for start in STARTS:
        ours = input_relevance(model, images, labels, rule=rule, start=start)
        norm = zennit_rules.Norm(EPSILON)
        layers = [(Activation, zennit_rules.Pass()), ((AvgPool, Sum), norm), (Linear, hook)]
        other = copy.deepcopy(model)
        _assert_near(ours, _zennit(other, images, labels, LayerMapComposite(layers), start))


@pytest.mark.parametrize(
    "rule, composite",
    [
        ("epsilon-plus", EpsilonPlus),
        ("epsilon-plus-flat", EpsilonPlusFlat),
        ("epsilon-alpha2beta1", EpsilonAlpha2Beta1),
        ("epsilon-alpha2beta1-flat", EpsilonAlpha2Beta1Flat),
    ],
)
@pytest.mark.parametrize("network", ZENNIT_NETWORKS)
def test_composite_agrees_with_zennit(network, rule, composite):
    model, images, labels = _make(network, seed=22)
    ours = input_relevance(model, images, labels, rule=rule)
    composite = composite(epsilon=EPSILON, stabilizer=EPSILON)
    _assert_near(ours, _zennit(copy.deepcopy(model), images, labels, composite, "target"))


def test_epsilon_gamma_box_agrees_with_zennit():
    model, images, labels = _make("stride and padding", seed=22)
    ours = input_relevance(model, images, labels, rule="epsilon-gamma-box")
    low, high = (bound[None] for bound in _bounds(images, None, None))
    composite = EpsilonGammaBox(low, high, epsilon=EPSILON, stabilizer=EPSILON)
    _assert_near(ours, _zennit(copy.deepcopy(model), images, labels, composite, "target"))


class Classifier(nn.Module):
    """Flattens by a function, which Captum can follow and a module of which it cannot."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(4, 3, 3, stride=2, padding=1, dilation=1), nn.ReLU(), nn.Dropout()),
            nn.AvgPool2d(2, stride=1),
        )
        self.head = nn.Sequential(nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, CLASSES))

    def forward(self, x):
        return self.head(torch.flatten(self.features(x), 1))


@pytest.mark.parametrize("rule", ["epsilon", "zplus", "gamma"])
def test_input_relevance_agrees_with_captum(rule):
    model = _randomise(Classifier(), 31, zero_bias=rule != "epsilon")
    images, labels = _draw(4, 2, 12, 12).abs(), torch.tensor([0, 2, 1, 1])
    hidden = {"features.*": rule, "head.0": rule}
    ours = input_relevance(model, images, labels, rule=hidden)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)) and name != "head.2":
            module.rule = {"epsilon": EpsilonRule, "zplus": Alpha1_Beta0_Rule, "gamma": GammaRule}[
                rule
            ]()
    theirs = LRP(model).attribute(images, target=labels).detach()
    _assert_near(ours, theirs, 1e-6)


# ---------------------------------------------------------------------------------------- BatchNorm


def _with_batchnorm(seed=41):
    block = ReadBasicBlock(6, 8, 2)
    model = nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Conv2d(4, 6, 3, padding=1, groups=2), nn.BatchNorm2d(6), nn.ReLU()),
        block,
        *(nn.ConvTranspose2d(8, 4, 2), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        *(nn.Linear(4, 5, bias=False), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, CLASSES)),
    )
    _randomise(model, seed)
    for module in model.modules():
        if isinstance(module, BATCHNORMS):
            module.weight.data[0] *= -1  # which flips the signs of a filter's folded weights
    return model, _draw(4, 2, 5, 5, seed=seed), torch.tensor([0, 1, 2, 2])


@pytest.mark.parametrize("rule", [*(r for r in RULES if r not in FIRST_ONLY), "epsilon-plus-flat"])
def test_folded_and_unfolded_network_have_the_same_relevance(rule):
    model, images, labels = _with_batchnorm()
    folded = fold_batchnorm(model)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())
    _assert_near(model(images).detach(), folded(images).detach(), 1e-12)
    tape, at_inputs = _oracle(folded, images, labels, rule, known=_known("folded"))
    for network in (model, folded):
        _assert_near(input_relevance(network, images, labels, rule=rule), at_inputs)
        for aggregate in AGGREGATES:
            scores = weight_relevance(network, images, labels, rule=rule, aggregate=aggregate)
            _assert_scores_near(scores, _expected(tape, aggregate))


def test_folding_leaves_weight_times_gradient_of_the_stored_weight():
    model, images, labels = _with_batchnorm()
    logits = model(images).gather(1, labels[:, None]).sum()
    for name, score in weight_relevance(model, images, labels).items():
        weight = model.get_parameter(name)
        gradient = torch.autograd.grad(logits, weight, retain_graph=True)[0]
        _assert_near(score, (weight * gradient).detach(), 1e-10)


# ------------------------------------------------------------------------------- filters and units


@pytest.mark.parametrize("network", ["linear", "groups", "conv1d", "residual sum", "attention"])
def test_filter_relevance_is_what_leaves_through_each_output_channel(network):
    model, images, labels = _make(network, seed=51)
    scores = weight_relevance(model, images, labels)
    tape, _ = _oracle(model, images, labels, known=_known(network))
    filters = filter_relevance(scores)
    assert list(filters) == list(scores)
    for name, relevance in tape.weights.items():
        expected = torch.stack(
            [sum(r[k].sum() for r in relevance) for k in range(len(relevance[0]))]
        )
        _assert_near(filters[name], expected)


@pytest.mark.parametrize("groups", [1, 2])
def test_filter_relevance_of_a_transposed_convolution_is_its_output_channels(groups):
    generator = torch.manual_seed(3)
    layer = nn.ConvTranspose2d(4, 6, 2, groups=groups, bias=False)
    model = nn.Sequential(layer, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    image = torch.rand(1, 4, 3, 3, generator=generator)
    for label in range(6):  # each channel is a class's logit, so relevance enters there alone
        scores = weight_relevance(model, image, torch.tensor([label]))
        channels = filter_relevance(scores, model)["0.weight"]
        logit = model(image)[0, label].detach()
        _assert_near(channels, logit * nn.functional.one_hot(torch.tensor(label), 6), 1e-4)
    scores = {"weight": torch.rand(4, 6 // groups, 2, 2)}  # of the layer by itself
    alone, within = filter_relevance(scores, layer), {"0.weight": scores["weight"]}
    assert torch.equal(alone["weight"], filter_relevance(within, model)["0.weight"])


@pytest.mark.parametrize("start", ["target", "softmax-gradient"])
@pytest.mark.parametrize("rule", ["epsilon", "epsilon-plus", "gamma", Rule("epsilon", epsilon=0.2)])
@pytest.mark.parametrize(
    "network",
    ["linear", "positions", "groups", "conv1d", "transposed", "residual sum", "attention"],
)
def test_unit_sensitivity_is_the_mean_square_of_relevance_over_activation(network, rule, start):
    model, images, labels = _make(network, seed=52)
    tape, _ = _oracle(model, images, labels, rule, start, known=_known(network))
    sensitivity = unit_sensitivity(model, images, labels, rule=rule, start=start)
    assert set(sensitivity) == set(tape.quotients)
    sequence = network in ("positions", "attention")
    for name, quotient in tape.quotients.items():
        units = quotient.flatten(0, -2) if sequence else quotient.transpose(1, -1).flatten(0, -2)
        _assert_near(sensitivity[name], (units**2).mean(0))


def test_unit_sensitivity_is_that_of_the_folded_layer():
    model, images, labels = _with_batchnorm()
    folded = unit_sensitivity(fold_batchnorm(model), images, labels)
    _assert_scores_near(unit_sensitivity(model, images, labels), folded, 1e-12)


# ------------------------------------------------------------------------------------- transformers


def _tokens(seed=61):
    model = _randomise(Tokens(vocabulary=7, length=4, width=4), seed)
    tokens = torch.tensor([[0, 3, 3, 1], [6, 2, 0, 0], [5, 5, 5, 5], [1, 2, 3, 4], [6, 6, 0, 3]])
    return model, tokens, torch.tensor([0, 2, 1, 1, 0])


def _explained_tokens(rule="epsilon", start="target"):
    model, tokens, labels = _tokens()
    tape = Tape(_choose(rule), epsilon=0.0)
    last, word, place = model.explain(tape, "", tokens)
    torch.testing.assert_close(last.value, model(tokens).detach())
    tape.backward(last, start_relevance(last.value, labels, start))
    tape.weights["word.weight"] = torch.zeros(len(tokens), *model.word.weight.shape).double()
    for n, sentence in enumerate(tokens):
        for t, token in enumerate(sentence):
            tape.weights["word.weight"][n, token] += word.relevance[n, t]
    tape.weights["place.weight"] = place.relevance
    return (model, tokens, labels), tape


@pytest.mark.parametrize("rule", ["epsilon", "gamma", "zplus"])
def test_transformer_of_tokens(rule):
    for start in ("target", "contrastive"):
        arguments, tape = _explained_tokens(rule, start)
        for aggregate in AGGREGATES:
            options = {"rule": rule, "start": start, "aggregate": aggregate}
            scores = weight_relevance(*arguments, **options)
            expected = _expected(tape, aggregate)
            if aggregate != "sum":
                del scores["place.weight"], expected["place.weight"]
            _assert_scores_near(scores, expected)


@pytest.mark.parametrize("batch_size", [1, 3, 50])
@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_positions_looked_up_once_for_all_samples_are_scored_per_sample(aggregate, batch_size):
    arguments, tape = _explained_tokens()
    scores = weight_relevance(*arguments, aggregate=aggregate, batch_size=batch_size)
    _assert_near(scores["place.weight"], _expected(tape, aggregate)["place.weight"])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("way", SelfAttention.ways)
def test_attention_however_it_is_written(way, causal):
    attention = SelfAttention(4, 2, way=way, causal=causal)
    model = _randomise(nn.Sequential(attention, Mean(), nn.Linear(4, CLASSES)), 64)
    images, labels = _draw(4, 3, 4), torch.tensor([0, 1, 2, 0])
    for rule in ("epsilon", "gamma"):
        tape, at_inputs = _oracle(model, images, labels, rule)
        _assert_near(input_relevance(model, images, labels, rule=rule), at_inputs)
        for aggregate in AGGREGATES:
            scores = weight_relevance(model, images, labels, rule=rule, aggregate=aggregate)
            _assert_scores_near(scores, _expected(tape, aggregate))


def test_attention_keeps_only_what_its_softmax_keeps():
    model, images, labels = _make("attention", seed=62, zero_bias=True)
    tape, _ = _oracle(model, images, labels)
    started = start_relevance(model(images).detach(), labels, "target").sum()
    kept = sum(lost.sum() for lost in tape.lost)
    assert abs(kept) > 1e-3 * abs(started)
    _assert_sum(input_relevance(model, images, labels).sum(), started - kept, 1e-10)
    scores = weight_relevance(model, images, labels)
    _assert_sum(scores["0.weight"].sum(), started - kept, 1e-10)
    _assert_sum(scores["4.weight"].sum(), started, 1e-10)


def test_torch_encoder_layer_equals_the_block_written_out():
    layer = nn.TransformerEncoderLayer(
        *(4, 2, 8), dropout=0.3, activation="gelu", batch_first=True, norm_first=True
    )
    block = TransformerBlock(4, 2)
    ours = nn.Sequential(block, Mean(), nn.Linear(4, CLASSES))
    _randomise(ours, 63)
    theirs = nn.Sequential(layer, Mean(), ours[2]).double().eval()
    names = {"attention.mha": "self_attn", "mlp.0": "linear1", "mlp.2": "linear2"}
    for name, twin in {**names, "norm1": "norm1", "norm2": "norm2"}.items():
        layer.get_submodule(twin).load_state_dict(block.get_submodule(name).state_dict())
    images, labels = _draw(3, 5, 4), torch.tensor([0, 1, 2])
    _assert_near(theirs(images).detach(), ours(images).detach(), 1e-12)
    scores, twins = (weight_relevance(m, images, labels) for m in (ours, theirs))
    assert len(scores) == len(twins) == 5
    for name, score in scores.items():
        for part, twin in names.items():
            name = name.replace(f"0.{part}.", f"0.{twin}.")
        _assert_near(twins[name], score, 1e-10)


# -------------------------------------------------------------------------------- how it is written


class InPlace(nn.Module):
    """A residual block as memory-conscious people write it."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        y = self.block.body(x)
        y += self.block.shortcut(x)
        return F.relu(y, inplace=True)


def test_operations_in_place_change_nothing():
    model, images, labels = _make("residual sum", seed=71)
    other = copy.deepcopy(model)
    for name, module in list(other.named_modules()):
        if isinstance(module, Residual):
            other.set_submodule(name, InPlace(module))
        if isinstance(module, nn.ReLU):
            module.inplace = True
    scores, before = weight_relevance(other, images, labels, rule="epsilon-plus"), images.clone()
    scores = {name.replace("block.", ""): score for name, score in scores.items()}
    expected = weight_relevance(model, images, labels, rule="epsilon-plus")
    _assert_scores_near(scores, expected, 1e-12)
    assert torch.equal(images, before)


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(torch.relu(self.layer(torch.relu(self.layer(x)))))

    def explain(self, tape, name, node):
        for _ in range(2):
            node = tape.activation(torch.relu, tape.layer("layer", self.layer, node))
        return tape.layer("head", self.head, node)


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_both_uses_of_a_shared_layer_count(aggregate):
    model = _randomise(Twice(), 72)
    images, labels = _draw(5, 4), torch.tensor([0, 1, 2, 0, 1])
    tape, _ = _oracle(model, images, labels)
    scores = weight_relevance(model, images, labels, aggregate=aggregate)
    _assert_scores_near(scores, _expected(tape, aggregate))


class TimeFirst(nn.Module):
    """Applies a layer to [time, samples, features], as recurrent and older attention code does."""

    def __init__(self, length):
        super().__init__()
        self.step, self.head = nn.Linear(3, 4), nn.Linear(4 * length, CLASSES)

    def forward(self, x):
        steps = torch.relu(self.step(x.transpose(0, 1)))
        return self.head(steps.transpose(0, 1).flatten(1))


class Frames(nn.Module):
    """Folds the frames of a film into the sample axis, film by film or moment by moment."""

    def __init__(self, length, by_film):
        super().__init__()
        self.by_film = by_film
        self.step, self.head = nn.Conv1d(1, 4, 2), nn.Linear(8 * length, CLASSES)

    def forward(self, x):
        if self.by_film:
            frames = torch.relu(self.step(x.flatten(0, 1)[:, None]))
            return self.head(frames.reshape(len(x), -1))
        frames = torch.relu(self.step(x.transpose(0, 1).flatten(0, 1)[:, None]))
        return self.head(frames.unflatten(0, (-1, len(x))).transpose(0, 1).flatten(1))


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("length", [4, 5, 10])
@pytest.mark.parametrize("layout", ["time first", "film by film", "moment by moment"])
def test_samples_stay_apart_wherever_they_stand(layout, length, aggregate):
    model = TimeFirst(length) if layout == "time first" else Frames(length, layout[0] == "f")
    _randomise(model, 73)
    images, labels = _draw(5, length, 3), torch.tensor([0, 1, 2, 0, 1])
    scores = weight_relevance(model, images, labels, aggregate=aggregate)
    pairs = [(images[n : n + 1], labels[n : n + 1]) for n in range(5)]
    singles = [weight_relevance(model, *pair)["step.weight"] for pair in pairs]
    _assert_near(scores["step.weight"], aggregated(torch.stack(singles), aggregate))


# ------------------------------------------------------------------------- random architectures


def _grid_layer(draw, channels):
    kind = draw(st.sampled_from(["conv", "transposed", "residual", "join", "pool", "batchnorm"]))
    if kind in ("conv", "transposed"):
        groups = draw(st.sampled_from([g for g in (1, 2, 3) if channels % g == 0]))
        outputs, kernel, dilation = (draw(st.integers(1, top)) for top in (2, 3, 2))
        reach = dilation * (kernel - 1)
        options = {"stride": draw(st.integers(1, 2)), "dilation": dilation, "groups": groups}
        if kind == "conv":
            make, options["padding"] = nn.Conv2d, draw(st.integers((reach + 1) // 2, reach))
        else:
            make, options["padding"] = nn.ConvTranspose2d, draw(st.integers(0, reach // 2))
        layer = make(channels, outputs * groups, kernel, bias=draw(st.booleans()), **options)
        norm = [nn.BatchNorm2d(outputs * groups)] if draw(st.booleans()) else []
        act = draw(st.sampled_from([nn.ReLU(), nn.LeakyReLU(0.2), nn.GELU(), nn.SiLU()]))
        return [layer, *norm, act], outputs * groups
    if kind == "residual":
        body = nn.Sequential(
            nn.Conv2d(channels, 2, 3, padding=1), nn.ReLU(), nn.Conv2d(2, channels, 1)
        )
        return [Residual(body)], channels
    if kind == "join":
        branch = nn.Sequential(nn.Conv2d(channels, 2, 3, padding=1), nn.ReLU())
        return [Concatenation(nn.Identity(), branch)], channels + 2
    if kind == "pool":
        pools = [nn.MaxPool2d(2, 1, 1), nn.AvgPool2d(2, 1, 1), nn.AdaptiveAvgPool2d(2)]
        return [draw(st.sampled_from([*pools, nn.AdaptiveMaxPool2d(2)]))], channels
    return [nn.BatchNorm2d(channels)], channels


@st.composite
def architectures(draw, zero_bias=False):
    """A small random network for images, five images and their labels."""
    channels, height, width = (draw(st.integers(1, top)) for top in (3, 5, 5))
    seed, image_shape = draw(st.integers(0, 2**16)), (channels, height, width)
    layers = []
    for _ in range(draw(st.integers(1, 3))):
        more, channels = _grid_layer(draw, channels)
        layers += more
    layers.append(nn.AdaptiveAvgPool2d(draw(st.integers(1, 2))))
    layers.append(nn.Flatten())
    if draw(st.booleans()):
        layers += [nn.Linear(channels * layers[-2].output_size ** 2, 4), nn.ReLU()]
        layers.append(nn.Linear(4, CLASSES))
    else:
        layers.append(nn.Linear(channels * layers[-2].output_size ** 2, CLASSES))
    model = _randomise(nn.Sequential(*layers), seed, zero_bias)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (5,), generator=generator)
    return model, _draw(5, *image_shape, seed=seed), labels


EXAMPLES = settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
any_rule = st.sampled_from([r for r in RULES if r not in FIRST_ONLY] + ["epsilon-plus-flat"])


@EXAMPLES
@given(architectures(), any_rule, st.sampled_from(STARTS))
def test_any_network_equals_its_connections(network, rule, start):
    model, images, labels = network
    tape, at_inputs = _oracle(fold_batchnorm(model), images, labels, rule, start)
    _assert_near(input_relevance(model, images, labels, rule=rule, start=start), at_inputs, 1e-8)
    for aggregate in AGGREGATES:
        scores = weight_relevance(
            model, images, labels, rule=rule, start=start, aggregate=aggregate
        )
        _assert_scores_near(scores, _expected(tape, aggregate), 1e-8)


@EXAMPLES
@given(architectures(zero_bias=True), st.sampled_from(STARTS))
def test_any_network_conserves_relevance_at_zero_bias(network, start):
    model, images, labels = network
    started = start_relevance(model(images).detach(), labels, start)
    at_inputs = input_relevance(model, images, labels, start=start)
    # relative to all that is added up, since the signed sum itself may vanish
    slack = 1e-10 * at_inputs.abs().sum().item()
    missing = started.sum((1,)) - at_inputs.flatten(1).sum(1)
    assert missing.abs().max().item() <= slack
    scores = weight_relevance(model, images, labels, start=start)
    last = scores[list(scores)[-1]]
    assert abs(last.sum() - started.sum()).item() <= 1e-10 * last.abs().sum().item()


@EXAMPLES
@given(architectures(), any_rule, st.sampled_from(AGGREGATES), st.integers(1, 4))
def test_neither_batches_nor_order_matter_nor_do_samples_mix(network, rule, aggregate, batch_size):
    model, images, labels = network
    options = {"rule": rule, "aggregate": aggregate}
    order = torch.tensor([3, 0, 4, 1, 2])
    scores = weight_relevance(model, images, labels, **options)
    singles = [
        weight_relevance(model, images[n : n + 1], labels[n : n + 1], rule=rule) for n in range(5)
    ]
    for name, score in scores.items():
        looped = aggregated(torch.stack([single[name] for single in singles]), aggregate)
        _assert_near(score, looped, 1e-10)
    batched = weight_relevance(model, images, labels, batch_size=batch_size, **options)
    _assert_scores_near(batched, scores, 1e-10)
    permuted = weight_relevance(model, images[order], labels[order], **options)
    _assert_scores_near(permuted, scores, 1e-10)
    at_inputs = input_relevance(model, images, labels, rule=rule)
    apart = input_relevance(model, images[order], labels[order], rule=rule, batch_size=batch_size)
    _assert_near(apart, at_inputs[order], 1e-10)


# ----------------------------------------------------------------------------- what it leaves alone


def _everything(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
        for m in model.modules()
    ]
    parameters = [
        (id(p), p.requires_grad, None if p.grad is None else p.grad.clone())
        for p in model.parameters()
    ]
    attributes = [sorted(vars(module)) for module in model.modules()]
    return state, modes, hooks, parameters, attributes


def _assert_same(before, after):
    for name in before[0]:
        assert torch.equal(before[0][name], after[0][name])
    assert before[1:3] == after[1:3] and before[4] == after[4]
    for (old, asked, gradient), (new, asks, now) in zip(before[3], after[3], strict=True):
        assert old == new and asked == asks
        assert (gradient is None) == (now is None)
        assert gradient is None or torch.equal(gradient, now)


class Odd(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("fails", [False, True])
def test_scoring_leaves_the_model_as_it_was(fails):
    model, images, labels = _with_batchnorm()
    if fails:
        model.insert(9, Odd(torch.cos))
    model.train()
    model[1].eval()
    next(model.parameters()).requires_grad_(False)
    model[-1].weight.grad = torch.ones_like(model[-1].weight)
    before, state = _everything(model), torch.random.get_rng_state()
    for call in (weight_relevance, input_relevance, unit_sensitivity):
        if fails:
            with pytest.raises(UnsupportedLayerError):
                call(model, images, labels)
        else:
            call(model, images, labels)
        _assert_same(before, _everything(model))
        assert torch.is_grad_enabled() and torch.equal(state, torch.random.get_rng_state())


@pytest.mark.parametrize("aggregate", AGGREGATES)
def test_results_are_ordinary_tensors_and_repeat_bit_by_bit(aggregate):
    model, images, labels = _with_batchnorm()
    first, second = (
        weight_relevance(model.float(), images.float(), labels, aggregate=aggregate)
        for _ in range(2)
    )
    for name, score in first.items():
        assert torch.equal(score, second[name])
        assert not score.requires_grad and not score.is_inference()
        assert score.data_ptr() != model.get_parameter(name).data_ptr()


class Reversal(torch.autograd.Function):
    """A gradient that is not that of the forward pass, as in domain adaptation."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return -3 * gradient


UNKNOWN = {
    "cos": torch.cos,
    "exp": torch.exp,
    "power of two": lambda x: 2**x,
    "power of itself": lambda x: x.abs() ** x,
    "reciprocal operator": lambda x: 1 / x,
    "remainder operator": lambda x: x % 2,
    "rounded quotient": lambda x: torch.div(x, 0.1, rounding_mode="floor"),
    "cumulative product": lambda x: x.cumprod(1),
    "phase": lambda x: torch.fft.fft(x).angle(),
    "detach": lambda x: x.detach(),
    "data": lambda x: x.data,
    "number": lambda x: torch.stack([row * row.mean().item() for row in x]),
    "own gradient": Reversal.apply,
    "recurrent": nn.GRUCell(6, 6).double(),
}


@pytest.mark.parametrize("function", UNKNOWN)
def test_unknown_function_is_named_and_never_a_silent_gradient(function):
    model = nn.Sequential()
    model.add_module("first", nn.Linear(5, 6))
    model.add_module("strange", Odd(UNKNOWN[function]))
    model.add_module("last", nn.Linear(6, CLASSES))
    model.double()
    images, labels = _draw(3, 5), torch.tensor([0, 1, 2])
    for call in (weight_relevance, input_relevance, unit_sensitivity):
        with pytest.raises(UnsupportedLayerError, match="strange"):
            call(model, images, labels)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_scripted_module_is_named():
    scripted = torch.jit.script(Odd(nn.Sequential(nn.Linear(6, 6), nn.Sigmoid())).double())
    model = nn.Sequential(nn.Linear(5, 6), scripted, nn.Linear(6, CLASSES)).double()
    with pytest.raises(UnsupportedLayerError, match="'1"):
        weight_relevance(model, _draw(3, 5), torch.tensor([0, 1, 2]))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": torch.tensor([0, 1, CLASSES])}, "label"),
        ({"labels": torch.tensor([0, -1, 1])}, "label"),
        ({"labels": torch.tensor([0, 1])}, "label"),
        ({"images": torch.full((3, 6), float("nan")).double()}, "finite|NaN"),
        ({"images": torch.full((3, 6), float("inf")).double()}, "finite|NaN|inf"),
        ({"images": torch.zeros(0, 6).double(), "labels": torch.zeros(0).long()}, "empty|no "),
        ({"rule": "epsilonn"}, "zplus"),
        ({"rule": {"0": "epsilonn"}}, "zplus"),
        ({"rule": {"2": "flat"}}, "flat"),
        ({"rule": {"2": Rule("box", low=-1.0, high=1.0)}}, "box"),
        ({"start": "logit"}, "contrastive"),
        ({"aggregate": "mean"}, "rms"),
        ({"model": nn.Sequential(nn.Flatten(), nn.ReLU())}, "weight"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(change, message):
    model, images, labels = _make("linear", samples=3)
    arguments = {"model": model, "images": images, "labels": labels, **change}
    positional = [arguments.pop(name) for name in ("model", "images", "labels")]
    with pytest.raises(ValueError, match=message):
        weight_relevance(*positional, **arguments)


def test_all_published_names_work_on_a_network_from_the_shelf():
    model = build("resnet8", channels=1).eval()
    images, labels = _draw(3, 1, 8, 8).float(), torch.tensor([0, 4, 9])
    for rule in (*RULES, *COMPOSITES):
        scores = weight_relevance(model, images, labels, rule=rule, batch_size=2)
        assert {name: s.shape for name, s in scores.items()} == {
            name: p.shape for name, p in scored_weights(model).items()
        }
        assert all(torch.isfinite(s).all() and s.abs().sum() > 0 for s in scores.values())
