"""Entropy coding: round trips, size against the entropy, streams that lie."""

import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib.codec import entropy
from lib.codec.contexts import biclusters

RNG = np.random.default_rng


def order0_bytes(*arrays):
    """Empirical order-0 entropy of the tuples of corresponding elements, in bytes."""
    pairs = sum(np.ravel(array).astype(int) * 10**6**i for i, array in enumerate(arrays))
    counts = np.bincount(pairs - pairs.min()) if len(arrays) < 2 else np.unique_counts(pairs).counts
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / counts.sum())).sum()) / 8


def gaussian(seed, scale, shape, limit):
    noise = RNG(seed).standard_normal(shape) * scale
    return np.rint(noise).clip(-limit, limit).astype(np.int32)


def ternary(seed, shape, density):
    return RNG(seed).choice([-1, 0, 1], shape, p=[density / 2, 1 - density, density / 2])


CASES = {
    "8 bits dense": gaussian(0, 30, (300, 1000), 127),
    "8 bits flat": RNG(1).integers(-127, 128, (100, 900)),
    "90 % zeros": ternary(2, (200, 1000), 0.1),
    "all zero": np.zeros((512, 4608), int),
    "all equal": np.full((30, 30), -7),
    "one in 100,000": np.eye(1, 100_000, 77),
    "10 weights": RNG(3).integers(-7, 8, 10),
    "10 weights far apart": RNG(4).integers(-30_000, 30_000, 10),
    "500 weights, 8 bits": gaussian(5, 30, 500, 127),
    "500 weights, 8 bits, flat": RNG(6).integers(-128, 128, 500),
    "500 weights, conv": gaussian(7, 2, (20, 1, 5, 5), 7),
    "2.4 M weights, 4 bits": gaussian(8, 2, (512, 4608), 7),
    "2.4 M weights, 2 bits": gaussian(9, 0.5, (512, 512, 3, 3), 1),
    "codebook": RNG(10).integers(0, 16, (64, 64)),
}


@pytest.mark.parametrize("name", CASES)
def test_size_is_within_one_percent_of_the_entropy(name):
    symbols = CASES[name].astype(np.int32)
    stream = entropy.encode(symbols)
    decoded, tiers = entropy.decode(stream, symbols.shape)
    assert decoded.dtype == np.int32 and np.array_equal(decoded, symbols) and not tiers.any()
    assert len(stream) <= 1.01 * order0_bytes(symbols) + 40


def test_tiers_cost_their_entropy_and_a_width_of_zero_nothing():
    rng = RNG(0)
    tiers = rng.choice(3, (300, 400), p=[0.1, 0.4, 0.5]).astype(np.uint8)
    choices = 0 * tiers, rng.integers(-1, 2, tiers.shape), gaussian(1, 20, tiers.shape, 127)
    symbols = np.choose(tiers, choices).astype(np.int32)
    stream = entropy.encode(symbols, tiers, 3)
    decoded = entropy.decode(stream, symbols.shape, 3)
    assert np.array_equal(decoded[0], symbols) and np.array_equal(decoded[1], tiers)
    assert len(stream) <= 1.01 * order0_bytes(symbols, tiers) + 40


@pytest.mark.parametrize(
    ("pattern", "at_most"),
    [("empty rows and columns", 0.75), ("varying density", 0.92), ("rows of other scale", 0.92)],
)
def test_structure_beats_order_0(pattern, at_most):
    rng = RNG(0)
    if pattern == "empty rows and columns":
        symbols = ternary(1, (400, 600), 0.4)
        symbols[rng.random(400) < 0.5] = 0
        symbols[:, rng.random(600) < 0.5] = 0
    elif pattern == "varying density":
        density = 0.1 * np.exp(rng.normal(0, 0.8, (400, 1)) + rng.normal(0, 0.8, 600))
        symbols = (rng.random((400, 600)) < density) * rng.choice([-1, 1], (400, 600))
    else:
        symbols = np.rint(rng.standard_normal((400, 600)) * np.exp(rng.normal(1, 1, (400, 1))))
    symbols = symbols.astype(np.int32)
    stream = entropy.encode(symbols)
    assert np.array_equal(entropy.decode(stream, symbols.shape)[0], symbols)
    assert len(stream) <= at_most * order0_bytes(symbols)


def test_contexts_are_off_where_they_do_not_pay():
    matrix = RNG(0).integers(0, 3, (64, 64)).astype(np.int32)
    assert not any(classes.any() for classes in biclusters(matrix, np.arange(-1, 2)))


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_round_trip_of_anything(data):
    shape = tuple(data.draw(st.lists(st.integers(0, 24), min_size=0, max_size=3)))
    rng = RNG(data.draw(st.integers(0, 2**32)))
    low = data.draw(st.sampled_from([-(2**31), -70, -1, 0, 5, 2**31 - 1 - 4000]))
    span = data.draw(st.sampled_from([1, 2, 3, 16, 255, 4000]))
    symbols = low + np.minimum(rng.geometric(data.draw(st.floats(0.001, 1)), shape) - 1, span - 1)
    if data.draw(st.booleans()):
        symbols = np.sort(symbols, axis=None).reshape(shape)[..., ::-1] if shape else symbols
    symbols = np.asarray(symbols, dtype=np.int32)
    levels = data.draw(st.integers(1, 4))
    tiers = rng.integers(0, levels, shape).astype(np.uint8) if levels > 1 else None
    stream = entropy.encode(symbols, tiers, levels)
    decoded = entropy.decode(stream, shape, levels)
    assert np.array_equal(decoded[0], symbols)
    assert tiers is None or np.array_equal(decoded[1], tiers)


@pytest.mark.parametrize("last", [0, 1])
def test_long_tails_of_one_symbol(last):
    symbols = np.full(300_000, 1 - last, np.int32)
    symbols[200_000:] = last
    for array in (symbols, np.where(np.arange(300_000) < 250_000, 0, np.arange(300_000) % 5_000)):
        array = array.astype(np.int32)
        assert np.array_equal(entropy.decode(entropy.encode(array), array.shape)[0], array)


def test_too_wide_an_alphabet_is_refused():
    with pytest.raises(ValueError, match="span more than"):
        entropy.encode(np.array([0, entropy.MAX_ALPHABET], np.int32))


@pytest.mark.parametrize("name", ["90 % zeros", "500 weights, 8 bits", "all zero"])
@pytest.mark.parametrize("factor", [1.5, 100, 100_000])
def test_more_weights_than_were_coded(name, factor):
    symbols = CASES[name].astype(np.int32)
    count, stream = min(int(symbols.size * factor), 1 << 28), entropy.encode(symbols)
    tracemalloc.start()
    started = time.process_time()
    with pytest.raises(ValueError, match="more weights are stated|malformed"):
        entropy.decode(stream, (count,))
    assert time.process_time() - started < 1
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


def test_fewer_weights_than_were_coded():
    with pytest.raises(ValueError, match="fewer weights are stated"):
        entropy.decode(entropy.encode(CASES["8 bits flat"].astype(np.int32)), (100, 800))
