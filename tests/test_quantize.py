"""Quantizers against exhaustive search, closed forms and each other."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import quantize
from lib.quantize import Codes


def error(codes, weight):
    return float((codes.decode() - weight).double().square().sum())


def damage(codes, weight, moment, units=None):
    moment = (moment if moment.ndim == 3 else moment[None]).double()
    rest = (weight - codes.decode()).double().reshape(len(moment), -1, moment.shape[-1])
    each = (rest @ moment * rest).sum(2).flatten()
    return float((each if units is None else each * units).sum())


def entropy(symbols):
    shares = symbols.unique(return_counts=True)[1].double() / symbols.numel()
    return float(-(shares * shares.log2()).sum() * symbols.numel())


def correlated(inputs, images=200):
    mixing = torch.randn(inputs, inputs) * torch.logspace(0, -1, inputs)
    patches = (torch.randn(images, inputs) @ mixing + 0.3).relu()
    return patches.T @ patches / images


@pytest.fixture
def weight():
    torch.manual_seed(0)
    return torch.randn(8, 6, 3, 3) * torch.logspace(-2, 0, 8)[:, None, None, None]


@pytest.fixture
def mask(weight):
    return torch.rand(weight.shape) < 0.6


QUANTIZERS = {
    "uniform": lambda w, **k: quantize.uniform(w, 4, **k),
    "binary": lambda w, **k: quantize.uniform(w, 1, **k),
    "tiers": lambda w, **k: quantize.score_tiers(w, w.abs(), **k),
    "k-means": lambda w, **k: quantize.kmeans(w, 3, **k),
    "rate-distortion": lambda w, **k: quantize.rate_distortion(
        w, second_moment=correlated(54), step=0.05, lam=1e-4, **k
    ),
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_quantizer(name, weight, mask):
    quantizer = QUANTIZERS[name]
    codes = quantizer(weight, mask=mask)
    decoded = codes.decode()
    assert decoded.shape == weight.shape and decoded.dtype == torch.float32
    assert not decoded[~mask].any()
    assert torch.equal(decoded == 0, codes.symbols == 0)
    assert not torch.signbit(decoded[codes.symbols == 0]).any()
    assert error(codes, weight * mask) < float((weight * mask).square().sum())
    torch.manual_seed(1)
    twice = [quantizer(weight) for _ in range(2) if torch.manual_seed(1)]
    assert torch.equal(twice[0].symbols, twice[1].symbols)
    assert not quantizer(weight * 0).symbols.any()
    assert quantizer(weight * 1e-9).decode().isfinite().all()
    with pytest.raises(ValueError, match="not finite"):
        quantizer(weight / 0)
    with pytest.raises(ValueError, match="mask"):
        quantizer(weight, mask=mask[:4])
    with pytest.raises(ValueError, match="bool"):
        quantizer(weight, mask=mask.float())


@pytest.mark.parametrize("bits", range(1, 9))
def test_uniform_step_is_the_best_of_a_fine_search(bits):
    torch.manual_seed(bits)
    weight, top = torch.randn(400), max(1, 2 ** (bits - 1) - 1)
    codes = quantize.uniform(weight, bits)
    assert codes.symbols.abs().max() <= top
    assert bits > 1 or codes.symbols.all()
    steps = torch.linspace(0.05, 1.2, 2000)[:, None] * weight.abs().max() / top
    trials = (weight / steps).round().clamp(-top, top) if bits > 1 else weight.sign()
    best = (weight - steps * trials).square().sum(1).min()
    assert error(codes, weight) <= 1.1 * best


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=4, max_size=4), st.integers(1, 90))
def test_tiers_hold_their_shares(parts, count):
    torch.manual_seed(count)
    scores, mask = torch.randint(-4, 5, (count,)).float(), torch.rand(count) < 0.8
    shares = [part / sum(parts) for part in parts]
    codes = quantize.score_tiers(torch.randn(count), scores, shares=shares, mask=mask)
    kept = int(mask.sum())
    ends = [0, *(round(kept * end) for end in itertools.accumulate(shares[:-1])), kept]
    sizes = codes.tiers[mask].bincount(minlength=4).tolist()
    assert sizes == [high - low for low, high in itertools.pairwise(ends)]
    for lower in range(3):
        low, high = (scores[mask][codes.tiers[mask] == tier] for tier in (lower, lower + 1))
        assert not len(low) or not len(high) or low.max() <= high.min()
    for tier, width in enumerate((0, 2, 4, 8)):
        symbols = codes.symbols[codes.tiers == tier].abs()
        assert not len(symbols) or symbols.max() <= (2 ** (width - 1) - 1 if width else 0)


@pytest.mark.parametrize("bits", [1, 2, 3, 5])
def test_kmeans_beats_the_uniform_grid(bits, weight, mask):
    for kept in (None, mask):
        target = weight if kept is None else weight * kept
        codes = quantize.kmeans(weight, bits, mask=kept)
        assert len(codes.grid) <= 2**bits + 1
        assert error(codes, target) <= error(quantize.uniform(weight, bits, mask=kept), target)


def test_kmeans_of_few_values_is_exact_and_of_many_is_binned():
    few = torch.tensor([0.0, 0.25, -1.5, 0.25, 3.0])
    assert torch.equal(quantize.kmeans(few, 3).decode(), few)
    torch.manual_seed(0)
    many = torch.randn(2**17)
    assert error(quantize.kmeans(many, 2), many) / len(many) == pytest.approx(0.0799, abs=2e-3)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 500)), min_size=1, max_size=8),
    st.floats(2, 9),
)
def test_layer_widths_meet_the_budget(layers, mean):
    importance = {str(i): value for i, (value, _) in enumerate(layers)}
    numel = {str(i): count for i, (_, count) in enumerate(layers)}
    widths = quantize.layer_widths(importance, numel, mean)
    used, total = sum(widths[name] * numel[name] for name in numel), sum(numel.values())
    assert used <= mean * total + 1e-6 and set(widths.values()) <= {2, 3, 4, 5, 6, 8}
    wider = {2: 1, 3: 1, 4: 1, 5: 1, 6: 2}
    assert all(
        used + wider[width] * numel[name] > mean * total - 1e-6
        for name, width in widths.items()
        if width < 8
    )


def test_layer_widths_follow_importance():
    numel = dict.fromkeys("abcd", 100)
    widths = quantize.layer_widths({"a": 1.0, "b": 16.0, "c": 0.1, "d": 1.0}, numel, 4)
    assert widths["b"] > widths["a"] == widths["d"] > widths["c"]
    assert sum(widths.values()) == 16
    with pytest.raises(ValueError, match="below the least width"):
        quantize.layer_widths({"a": 1.0}, {"a": 3}, 1.5)
    with pytest.raises(ValueError, match="same layers"):
        quantize.layer_widths({"a": 1.0}, {"b": 3}, 3)


def rounded(weight, mask, step):
    """Codes of each weight for itself."""
    grid = torch.tensor([step]).half().float()
    return Codes((weight / grid * mask).round().int(), grid, "uniform")


def test_without_a_price_and_correlation_codes_are_rounded(weight, mask):
    codes = quantize.rate_distortion(
        weight, second_moment=torch.eye(54), step=0.05, lam=0, mask=mask
    )
    assert torch.equal(codes.symbols, rounded(weight, mask, 0.05).symbols)


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("groups", [1, 4])
def test_compensation_lowers_damage_and_the_objective(share, groups):
    for seed in range(3):
        torch.manual_seed(seed)
        weight, units = torch.randn(16, 40), torch.rand(16) + 0.1
        moment = torch.stack([correlated(40) for _ in range(groups)])
        mask, lam = torch.rand(weight.shape) < share, 0.02
        weight = weight * mask
        problem = dict(second_moment=moment, unit_weight=units, mask=mask, step=0.5)
        plain = rounded(weight, mask, 0.5)
        exact, traded = (quantize.rate_distortion(weight, lam=way, **problem) for way in (0, lam))
        assert damage(exact, weight, moment, units) < 0.8 * damage(plain, weight, moment, units)
        assert not traded.symbols[~mask].any()
        totals = [
            damage(codes, weight, moment, units) + lam * entropy(codes.symbols)
            for codes in (traded, plain, exact)
        ]
        assert totals[0] < totals[1] and totals[0] < totals[2]


def test_close_to_the_optimum_of_every_choice():
    """All 5^5 rows of symbols: found damage is at most a few per cent above the least."""
    grid = torch.tensor(list(itertools.product(range(-2, 3), repeat=5))).float()
    found = least = 0.0
    for seed in range(30):
        torch.manual_seed(seed)
        weight, moment = torch.rand(1, 5) * 2 - 1, correlated(5)
        codes = quantize.rate_distortion(weight, second_moment=moment, step=0.5, lam=0)
        rest = weight - grid * 0.5
        best = (rest @ moment * rest).sum(1).min()
        assert damage(codes, weight, moment) >= best - 1e-6
        found, least = found + damage(codes, weight, moment), least + float(best)
    assert found < 1.1 * least


def test_masked_errors_are_compensated():
    torch.manual_seed(0)
    weight, moment, mask = torch.randn(12, 30), correlated(30), torch.rand(12, 30) < 0.7
    codes = quantize.rate_distortion(weight, second_moment=moment, step=0.01, lam=0, mask=mask)
    assert not codes.symbols[~mask].any()
    least = 0.0
    for row, gone in zip(weight.double(), ~mask, strict=True):
        left, crossed = moment[gone][:, gone].double(), moment[gone][:, ~gone].double()
        inner = moment[~gone][:, ~gone].double()
        schur = left - crossed @ torch.linalg.solve(inner, crossed.T)
        least += float(row[gone] @ schur @ row[gone])
    assert 0.99 * least < damage(codes, weight, moment) < 1.15 * least
    assert damage(rounded(weight, mask, 0.01), weight, moment) > 1.5 * least


def test_the_step_balances_damage_and_bits():
    """At high rate the damage is λ / (2 ln 2) a weight, and one λ gives all layers one slope."""
    torch.manual_seed(0)
    for scale in (1, 100):
        weight, units = torch.randn(64, 90), torch.rand(64) * scale
        moment, lam = correlated(90, 4000) * scale, 1e-3
        codes = quantize.rate_distortion(weight, second_moment=moment, unit_weight=units, lam=lam)
        share = damage(codes, weight, moment, units) / (lam * weight.numel())
        assert share == pytest.approx(1 / (2 * math.log(2)), rel=0.15)


def test_units_that_matter_are_coded_more_exactly():
    torch.manual_seed(0)
    weight, moment = torch.randn(40, 30), correlated(30)
    units = torch.tensor([1.0, 0.01]).repeat_interleave(20)
    codes = quantize.rate_distortion(weight, second_moment=moment, unit_weight=units, lam=0.3)
    assert (codes.symbols[:20] != 0).sum() > 2 * (codes.symbols[20:] != 0).sum()
    dead = quantize.rate_distortion(weight, second_moment=moment * 0, lam=0.1)
    assert not dead.symbols.any()


@pytest.mark.parametrize("together", [0, 0.5], ids=["each input apart", "together"])
def test_codes_do_not_depend_on_the_unit_of_damage(together):
    torch.manual_seed(0)
    weight, deviation = torch.randn(40, 30), torch.rand(30) + 0.5
    moment = (together + (1 - together) * torch.eye(30)) * torch.outer(deviation, deviation)
    lam = 0.05 * quantize.energy(weight, moment) / weight.numel()
    found = [
        quantize.rate_distortion(weight, second_moment=unit * moment, lam=unit * lam)
        for unit in (2**-6, 1, 2**6)
    ]
    assert 0.1 < float((found[1].symbols != 0).float().mean()) < 0.9
    assert all(torch.equal(codes.symbols, found[1].symbols) for codes in found)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"second_moment": torch.eye(5)}, "second_moment is"),
        ({"second_moment": -torch.eye(6)}, "positive semidefinite"),
        ({"second_moment": torch.eye(6) / 0}, "not finite"),
        ({"unit_weight": torch.ones(3)}, "unit_weight is"),
        ({"unit_weight": -torch.ones(4)}, "negative"),
        ({"lam": -1.0}, "lam must"),
        ({"lam": 0.0}, "lam must be positive"),
        ({"step": 0.0, "lam": 0.0}, "step must"),
        ({"step": 1e-6}, "too fine"),
    ],
)
def test_unusable_problems(change, message):
    problem = {"second_moment": torch.eye(6), "lam": 0.1} | change
    with pytest.raises(ValueError, match=message):
        quantize.rate_distortion(torch.ones(4, 6), **problem)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((torch.zeros(2), torch.ones(1), "uniform"), "int32"),
        ((torch.zeros(2).int(), torch.ones(1).double(), "uniform"), "float32"),
        ((torch.zeros(2).int(), torch.ones(2), "uniform"), "one step"),
        ((torch.zeros(2).int(), torch.tensor([0.1]), "uniform"), "float16"),
        ((torch.zeros(2).int(), torch.tensor([math.inf]), "uniform"), "finite"),
        ((torch.zeros(2).int(), torch.zeros(1), "uniform"), "positive"),
        ((torch.zeros(2).int(), torch.ones(1), "row"), "kind 'row'"),
        ((torch.zeros(2, 3).int(), torch.ones(3), "channel"), "output channels"),
        ((torch.zeros(2).int(), torch.ones(1), "tier"), "tiers go with"),
        ((torch.zeros(2).int(), torch.ones(1), "tier", torch.ones(2).byte()), "no step"),
        ((torch.zeros(2).int(), torch.ones(1), "tier", torch.zeros(3).byte()), "shaped like"),
        ((torch.zeros(2).int(), torch.ones(1), "codebook"), "must be zero"),
        ((torch.ones(2).int() * 2, torch.tensor([0.0, 1.0]), "codebook"), "must lie in"),
    ],
)
def test_codes_are_checked(arguments, message):
    with pytest.raises(ValueError, match=message):
        Codes(*arguments)


def test_codes_decode():
    symbols = torch.tensor([[1, -2], [0, 3]], dtype=torch.int32)
    steps, tiers = torch.tensor([0.5, 0.25]), torch.tensor([[0, 1], [1, 1]], dtype=torch.uint8)
    assert Codes(symbols, steps[:1], "uniform").decode().tolist() == [[0.5, -1], [0, 1.5]]
    assert Codes(symbols, steps, "channel").decode().tolist() == [[0.5, -1], [0, 0.75]]
    assert Codes(symbols, steps, "tier", tiers).decode().tolist() == [[0.5, -0.5], [0, 0.75]]
    book = torch.tensor([0.0, -1.0, 4.0, 8.0])
    assert Codes(symbols.abs(), book, "codebook").decode().tolist() == [[-1, 4], [0, 8]]


def normal_scores(*shapes):
    generator = torch.Generator().manual_seed(0)
    return {str(i): torch.randn(s, generator=generator) for i, s in enumerate(shapes)}


@pytest.mark.parametrize("mean", [2.5, 4.0, 6.0])
def test_tier_shares_have_the_mean_and_rank_globally(mean):
    scores = normal_scores((40, 50), (30, 20))
    scores["1"] += 1.0
    masks = {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}
    shares = quantize.tier_shares(scores, masks, (0, 2, 4, 8), mean)
    total = sum(score.numel() for score in scores.values())
    widths = torch.tensor([0.0, 2, 4, 8], dtype=torch.float64)
    found = sum(
        float(torch.tensor(shares[name]).double() @ widths) * score.numel() / total
        for name, score in scores.items()
    )
    assert abs(found - mean) < 0.02
    assert all(abs(sum(share) - 1) < 1e-6 and share[0] == 0 for share in shares.values())
    assert shares["1"][3] > shares["0"][3] and shares["1"][1] < shares["0"][1]


def test_flattest_shares_at_the_middle_are_equal():
    scores = normal_scores((300, 100))
    masks = {"0": torch.ones(300, 100, dtype=torch.bool)}
    shares = quantize.tier_shares(scores, masks, (0, 2, 4, 6), 4.0)["0"]
    assert shares == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3], abs=1e-3)


def test_removed_weights_do_not_count():
    scores = normal_scores((10, 10))
    kept = scores["0"] > 0
    shares = quantize.tier_shares(scores, {"0": kept}, (0, 2, 8), 5.0)["0"]
    assert abs(shares[1] - 0.5) < 0.02 and abs(shares[2] - 0.5) < 0.02
