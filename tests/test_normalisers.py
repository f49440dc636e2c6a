"""Normalisation and activations written out by hand, quotients and norms: each by its equation."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lib.relevance import (
    Rule,
    UnsupportedLayerError,
    input_relevance,
    unit_sensitivity,
    weight_relevance,
)

EPS = 1e-6


class Between(nn.Module):
    """``last(body(first(x), second(x)))`` without biases, so that relevance is conserved."""

    def __init__(self, body, width=6):
        super().__init__()
        self.first, self.second = (nn.Linear(5, 6, bias=False) for _ in range(2))
        self.last, self.body = nn.Linear(width, 3, bias=False), body

    def forward(self, x):
        return self.last(self.body(self.first(x), self.second(x)))


def case(body, width=6, samples=4):
    torch.manual_seed(0)
    model = Between(body, width).double().eval()
    return model, torch.randn(samples, 5).double(), torch.arange(samples) % 3


def same(one, other):
    scores = [weight_relevance(*case(body)) for body in (one, other)]
    for name in scores[0]:
        torch.testing.assert_close(scores[0][name], scores[1][name], rtol=1e-9, atol=1e-12)
    assert any(score.any() for score in scores[0].values())
    return scores[0]


def rms(h):
    return h.pow(2).mean(-1, keepdim=True) + EPS


RMS_NORMS = {
    "mul of rsqrt": lambda h, _: h * torch.rsqrt(rms(h)),
    "rsqrt first": lambda h, _: rms(h).rsqrt().to(h.dtype) * h,
    "expanded": lambda h, _: h * rms(h).rsqrt().expand_as(h).contiguous(),
    "div by sqrt": lambda h, _: h / rms(h).sqrt(),
    "negative power": lambda h, _: h * rms(h) ** -0.5,
    "reciprocal": lambda h, _: h * rms(h).sqrt().reciprocal(),
    "one divided": lambda h, _: h * (1 / rms(h).sqrt()),
    "square of itself": lambda h, _: h * ((h * h).mean(-1, keepdim=True) + EPS).rsqrt(),
    "named": lambda h, _: torch.div(h, other=(h.pow(exponent=2).mean(-1, True) + EPS).sqrt()),
    "in place": lambda h, _: h.clone().div_(rms(h).sqrt()),
}


@pytest.mark.parametrize("written", RMS_NORMS)
def test_rms_norm_written_out_is_rms_norm(written):
    same(RMS_NORMS[written], lambda h, _: F.rms_norm(h, (6,), eps=EPS))


def test_rms_norm_holds_its_scale_constant():
    model, x, y = case(RMS_NORMS["mul of rsqrt"])
    scores = weight_relevance(model, x, y)
    with torch.no_grad():
        h = model.first(x)
        scale = 1 / rms(h).sqrt()  # [samples, 1]
        wanted = model.first.weight * ((scale * model.last.weight[y]).T @ x)
    torch.testing.assert_close(scores["first.weight"], wanted)
    given = input_relevance(model, x, y).sum(1)
    torch.testing.assert_close(given, model(x).gather(1, y[:, None])[:, 0].detach())


def test_layer_norm_written_out_is_layer_norm():
    def written(h, _):
        h = h - h.mean(-1, keepdim=True)
        return h / torch.sqrt(h.pow(2).mean(-1, keepdim=True) + EPS)

    def by_var(h, _):
        return (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, correction=0) + EPS).sqrt()

    same(written, lambda h, _: F.layer_norm(h, (6,), eps=EPS))
    same(by_var, lambda h, _: F.layer_norm(h, (6,), eps=EPS))


def test_normalize_instance_norm_and_quotient_hold_the_divisor_constant():
    same(lambda h, _: F.normalize(h, dim=-1), lambda h, _: h / h.norm(dim=-1, keepdim=True))
    same(
        lambda h, _: F.instance_norm(h[:, :, None].view(-1, 2, 3)).flatten(1),
        lambda h, _: F.layer_norm(h.view(-1, 2, 3), (3,)).flatten(1),
    )
    model, x, y = case(lambda h, k: h / (2 + k.abs()))
    scores = weight_relevance(model, x, y)
    with torch.no_grad():
        scale = 1 / (2 + model.second(x).abs())
        wanted = model.first.weight * ((scale * model.last.weight[y]).T @ x)
    torch.testing.assert_close(scores["first.weight"], wanted)
    assert not scores["second.weight"].any()


def test_relevance_of_the_norm_rule_is_bounded_where_the_norm_is_small():
    model, x, y = case(RMS_NORMS["mul of rsqrt"])
    model.first.weight.data.mul_(1e-12)
    scores = weight_relevance(model, x, y, aggregate="abs")["first.weight"]
    largest = EPS**-0.5  # of the factor
    bound = largest * (model.last.weight[y].abs().T @ x.abs()) * model.first.weight.abs()
    assert scores.any() and (scores <= bound * (1 + 1e-9)).all()


GELUS = {
    "erf": (lambda h, _: h * 0.5 * (1.0 + torch.erf(h / math.sqrt(2))), "none"),
    "tanh": (
        lambda h, _: 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))),
        "tanh",
    ),
    "tanh of pow": (
        lambda h, _: (
            (torch.tanh((h + 0.044715 * torch.pow(h, 3.0)) * math.sqrt(2 / math.pi)) + 1)
            * (0.5 * h)
        ),
        "tanh",
    ),
}


@pytest.mark.parametrize("written", GELUS)
def test_gelu_written_out_is_gelu(written):
    body, approximate = GELUS[written]
    same(body, lambda h, _: F.gelu(h, approximate=approximate))


def test_silu_and_swish_written_out_are_one():
    same(lambda h, _: h * torch.sigmoid(h), lambda h, _: F.silu(h))


def test_tanh_is_a_signal_to_a_sigmoid_and_a_gate_once_shifted():
    model, x, y = case(lambda h, k: torch.tanh(h) * torch.sigmoid(k))
    scores = weight_relevance(model, x, y, rule=Rule(gate="signal"))
    assert scores["first.weight"].any() and not scores["second.weight"].any()
    model.body = lambda h, k: h * (torch.tanh(k) + 1)
    scores = weight_relevance(model, x, y, rule=Rule(gate="signal"))
    assert scores["first.weight"].any() and not scores["second.weight"].any()


@pytest.mark.parametrize(
    "body",
    [
        lambda h, k: h.square() + k.abs() * 2,
        lambda h, k: h.abs().sqrt() + k.pow(3) + torch.erf(h) + torch.log1p(k.abs()),
        lambda h, k: h.norm(dim=-1, keepdim=True) * k,
        lambda h, k: torch.linalg.vector_norm(h, dim=-1, keepdim=True) + k,
        lambda h, k: h.var(-1, keepdim=True) + k.std(-1, keepdim=True) + k,
        lambda h, k: torch.addcmul(h, k, h, value=0.3),
        lambda h, k: torch.baddbmm(h[:, None], h[:, None], (k[:, None] * h[:, :, None]))[:, 0],
        lambda h, k: F.local_response_norm(h.view(-1, 6, 1), 3)[..., 0] + k,
        lambda h, k: torch.fft.fft2(h.view(-1, 2, 3)).real.flatten(1) + k.cumsum(1),
        lambda h, k: h + k * (h.norm(dim=-1, keepdim=True) / (k.norm(dim=-1, keepdim=True) + EPS)),
    ],
)
def test_relevance_is_conserved(body):
    model, x, y = case(body)
    given = input_relevance(model, x, y).sum(1)
    torch.testing.assert_close(given, model(x).gather(1, y[:, None])[:, 0].detach())


def test_a_sum_with_a_product_is_one_of_its_parts():
    same(
        lambda h, k: torch.addmm(h, k, torch.eye(6).double(), beta=0.5, alpha=3),
        lambda h, k: 0.5 * h + 3 * (k @ torch.eye(6).double()),
    )
    same(lambda h, k: torch.addcdiv(h, k, k.abs() + 1), lambda h, k: h + k / (k.abs() + 1))
    same(lambda h, k: torch.addcmul(h, h, k), lambda h, k: h + h * k)
    same(lambda h, k: h.addmm(mat1=k, mat2=torch.eye(6).double()), lambda h, k: h + k)
    same(
        lambda h, k: h[:, None].baddbmm(
            batch1=k[:, None], batch2=h[..., None] @ k[:, None], beta=0.5
        )[:, 0],
        lambda h, k: (0.5 * h[:, None] + torch.bmm(k[:, None], h[..., None] @ k[:, None]))[:, 0],
    )


def test_a_reciprocal_that_scales_nothing_is_refused_by_name():
    for body in (
        lambda h, k: h + 1 / (2 + k.abs()),
        lambda h, k: h + torch.rsqrt(1 + k.square()),
        lambda h, k: h + (2 + k.abs()) ** -1,
    ):
        model, x, y = case(body)
        with pytest.raises(UnsupportedLayerError, match="reciprocal of an activation"):
            weight_relevance(model, x, y)


class Grouped(nn.Module):
    """Attention with two heads of keys for four of queries."""

    def __init__(self, repeat):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(5, 8), nn.Linear(5, 4), nn.Linear(5, 4)
        self.last, self.repeat = nn.Linear(8, 3), repeat

    def forward(self, x):
        q, k, v = (
            t.unflatten(-1, (-1, 2)).transpose(1, 2) for t in (self.q(x), self.k(x), self.v(x))
        )
        if self.repeat:  # as the models of transformers do
            k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(q.shape) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=not self.repeat)
        return self.last(out.transpose(1, 2).flatten(2).mean(1))


def test_grouped_query_attention_is_attention_with_keys_repeated():
    torch.manual_seed(0)
    repeated, grouped = Grouped(True).double(), Grouped(False).double()
    grouped.load_state_dict(repeated.state_dict())
    x, y = torch.randn(3, 7, 5).double(), torch.tensor([0, 2, 1])
    for aggregate in ("sum", "abs"):
        one, other = (weight_relevance(m, x, y, aggregate=aggregate) for m in (repeated, grouped))
        for name, score in one.items():
            assert score.any()
            torch.testing.assert_close(other[name], score)
    one, other = (unit_sensitivity(m, x, y) for m in (repeated, grouped))
    for name, score in one.items():
        torch.testing.assert_close(other[name], score)
