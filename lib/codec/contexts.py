"""Coding contexts: rows and columns of a weight matrix grouped by what their symbols look like."""

import numpy as np
from numpy.typing import NDArray

MAX_CLASSES = 8
"""Most classes of rows, and of columns."""

_LEVELS = 16
_ROUNDS = 2
_SHORTEST = 8


def biclusters(
    matrix: NDArray[np.int32], values: NDArray[np.int64]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Group rows and columns so that the symbols of a row class × column class code shorter.

    The matrix, int32 [m, n], holds indices into `values`, int64 [k] in ascending parts. Returned
    are the classes of rows and columns, int32 [m] and [n]: 0 … 2^i - 1, sparser ones first, all
    zero if classes do not pay.

    Notes
    -----
    Pruned networks have emptied inputs and outputs, and relevance makes some units finer than
    others. Rows are clustered by their histograms, ``argmin_c -Σ_s n(row, s) log p(s | c)``, and
    so are columns; of all numbers of classes (1, 2, 4 or 8 each, neighbouring classes merged) the
    pair of the shortest description is taken: entropy given the context, ½ log n for each
    frequency that has to be learnt, and the classes themselves.

    References
    ----------
    Dhillon, Mallela & Modha 2003, "Information-theoretic co-clustering". Wiedemann et al. 2020,
    "DeepCABAC", arXiv 1907.11900, for contexts in the coding of networks.
    """
    height, width = matrix.shape
    if min(height, width) < _SHORTEST:
        return np.zeros(height, np.int32), np.zeros(width, np.int32)
    levels = _levels(np.bincount(matrix.ravel(), minlength=len(values)), values)
    if len(values) > _LEVELS:
        matrix = levels.take(matrix)
    k = min(len(values), _LEVELS)
    # int32 halves the traffic; wider only where the indices of the histograms need it.
    wide: type[np.signedinteger] = np.int32 if max(height, width) * k < 2**31 else np.int64
    starts = np.arange(height, dtype=wide)[:, None] * k, np.arange(width, dtype=wide) * k
    rows, columns = (
        _cluster(np.bincount((start + matrix).ravel(), minlength=size * k).reshape(size, k))
        for start, size in zip(starts, matrix.shape, strict=True)
    )
    blocks = (rows * MAX_CLASSES)[:, None] + columns
    shape = MAX_CLASSES, MAX_CLASSES, k
    joint = np.bincount((blocks * k + matrix).ravel(), minlength=np.prod(shape)).reshape(shape)
    _, i, j = min(
        (_bits(_merged(joint, i, j)) + _side_bits(rows >> i) + _side_bits(columns >> j), i, j)
        for i in range(4) for j in range(4)
    )  # fmt: skip
    return rows >> i, columns >> j


def _levels(counts: NDArray[np.int64], values: NDArray[np.int64]) -> NDArray[np.int32]:
    """Map from symbols to at most 16 levels of similar mass, ordered by magnitude."""
    order = np.argsort(np.abs(values), kind="stable")
    below = np.cumsum(counts[order]) - counts[order]
    levels = np.empty(len(values), np.int32)
    levels[order] = below * _LEVELS // max(int(counts.sum()), 1)
    return levels


def _cluster(histograms: NDArray[np.int64]) -> NDArray[np.int32]:
    """Classes of rows by hard expectation-maximisation, sparser classes first."""
    size, k = histograms.shape
    mean = histograms.sum(0) / histograms.sum()
    order = np.argsort(-histograms[:, np.argmax(mean)], kind="stable")
    classes = np.empty(size, np.int32)
    classes[order] = np.arange(size) * MAX_CLASSES // size
    for _ in range(_ROUNDS):
        joint = np.zeros((MAX_CLASSES, k))
        np.add.at(joint, classes, histograms)
        given = (joint + mean) / (joint.sum(1, keepdims=True) + 1)
        classes = np.argmin(histograms @ -np.log2(given.T + 1e-12), axis=1)
    order = np.argsort(-given[:, np.argmax(mean)])
    return np.argsort(order).astype(np.int32)[classes]


def _merged(joint: NDArray[np.int64], i: int, j: int) -> NDArray[np.int64]:
    """Joint histogram with 2^i row classes and 2^j column classes made one each."""
    m, n, k = joint.shape
    return joint.reshape(m >> i, 1 << i, n >> j, 1 << j, k).sum((1, 3)).reshape(-1, k)


def _bits(counts: NDArray[np.int64]) -> float:
    """Description length in bits of symbols with these counts [contexts, k]."""
    total = np.maximum(counts.sum(1, keepdims=True), 1)
    entropy = -(counts * np.log2(np.maximum(counts, 1) / total)).sum()
    free = np.maximum((counts > 0).sum(1, keepdims=True) - 1, 0)
    return entropy + (free * np.log2(total) / 2).sum() + 8 * len(counts)


def _side_bits(classes: NDArray[np.int32]) -> float:
    """Description length in bits of the classes themselves."""
    return _bits(np.bincount(classes)[None]) if classes.any() else 0.0
