"""Deep Compression without retraining, for networks whose BatchNorms are folded."""

import numpy as np
import torch
from torch import Tensor, nn

from .streams import FLOAT, Reader, Writer

ITERATIONS = 50


class DeepCompression:
    """Pruning by magnitude and k-means of what is left, per layer, without retraining.

    Settings: ``threshold``, of which weights smaller in magnitude go, in standard deviations of the
    layer's weights; ``clusters`` per layer, 2 to 256. Positions are stored as gaps.

    References
    ----------
    Han, Mao, Dally: Deep Compression, ICLR 2016, sections 2 to 4.
    """

    version = "sections 2 to 4"

    def __init__(self, network: nn.Module, images: Tensor):
        self.state = {name: value.cpu() for name, value in network.state_dict().items()}

    def encode(self, settings: dict) -> bytes:
        """One file."""
        out = Writer()
        for value in self.state.values():
            weights = value.numpy().ravel()
            if value.ndim < 2:
                out.plain(weights.astype(FLOAT))
                continue
            kept = np.flatnonzero(np.abs(weights) > settings["threshold"] * weights.std())
            gaps = np.diff(kept, prepend=-1) - 1
            if len(kept) < len(weights):  # a gap that is too long for a symbol takes several
                longs, rest = np.divmod(gaps, 255)
                ends = np.cumsum(longs + 1) - 1
                steps = np.full(int(longs.sum()) + len(gaps), 255)
                steps[ends] = rest
                out.plain(np.array([1], np.uint8))
                out.symbols(steps)
            else:
                out.plain(np.array([0], np.uint8))
            centres, labels = k_means(weights[kept], settings["clusters"])
            out.plain(np.array([len(centres)], np.uint16))
            out.plain(centres)
            out.symbols(labels)
        return out.content()

    def decode(self, data: bytes) -> dict[str, Tensor]:
        """The float32 state of a file."""
        found, read = {}, Reader(data)
        for name, like in self.state.items():
            if like.ndim < 2:
                found[name] = torch.from_numpy(read.plain(like.numel(), FLOAT).astype(np.float32))
                continue
            kept = np.arange(like.numel())
            if read.plain(1, np.uint8)[0]:
                steps = read.symbols().astype(np.int64)
                moved = np.cumsum(np.where(steps == 255, 255, steps + 1)) - 1
                kept = moved[steps < 255]
            centres = read.plain(int(read.plain(1, np.uint16)[0]), FLOAT)
            weights = np.zeros(like.numel(), np.float32)
            weights[kept] = centres.astype(np.float32)[read.symbols()]
            found[name] = torch.from_numpy(weights).reshape(like.shape)
        return found


def k_means(values: np.ndarray, clusters: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres, float16 and ascending, and which of them each value [n] is nearest to.

    Centres start evenly between the extremes, the paper's "linear" initialisation; those that
    nothing is nearest to are dropped.
    """
    if not len(values):
        return np.zeros(1, FLOAT), np.zeros(0, np.int64)
    order = np.sort(values.astype(np.float64))
    sums = np.concatenate([[0], np.cumsum(order)])
    centres = np.linspace(order[0], order[-1], clusters)
    for _ in range(ITERATIONS):
        ends = np.searchsorted(order, (centres[1:] + centres[:-1]) / 2)
        ends = np.concatenate([[0], ends, [len(order)]])
        some = np.diff(ends) > 0
        new = (np.diff(sums[ends])[some]) / np.diff(ends)[some]
        if len(new) == len(centres) and np.allclose(new, centres, rtol=1e-6):
            break
        centres = new
    centres = np.unique(centres.astype(FLOAT))
    wide = centres.astype(np.float64)
    return centres, np.searchsorted((wide[1:] + wide[:-1]) / 2, values)
