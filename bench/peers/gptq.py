"""GPTQ for convolutional networks whose BatchNorms are folded: no package codes these."""

import numpy as np
import torch
from torch import Tensor, nn

from lib.leastsquares import Equations
from lib.linear import hooked, layers_of

from .streams import FLOAT, Reader, Writer

DAMPING = 0.01  # of the second moment, relative to its mean diagonal
CLIPS = np.linspace(0.4, 1.0, 25)  # shares of the largest weight at which a grid may end


class GPTQ:
    """Rounding column by column; what a column misses is passed on to those after it.

    Layer after layer, each with inputs from the layers coded before it. Settings: ``bits``, and
    ``group``, columns that share a grid (0: all). Each unit's grid ends where the squared error of
    rounding is least; columns go by the energy of their input, largest first.

    References
    ----------
    Frantar, Ashkboos, Hoefler, Alistarh: GPTQ, ICLR 2023, algorithm 1.
    """

    version = "algorithm 1"

    def __init__(self, network: nn.Module, images: Tensor):
        self.network, self.images = network, images

    def encode(self, settings: dict) -> bytes:
        """One file; leaves the network as it was."""
        state = {name: value.clone() for name, value in self.network.state_dict().items()}
        written = {}
        try:
            for name, layer in layers_of(self.network).items():
                written[name] = self._layer(name, layer, settings)
        finally:
            self.network.load_state_dict(state)
        out = Writer()
        out.plain(np.array([settings["bits"], settings["group"]], np.uint16))
        for name, value in state.items():
            layer = name.removesuffix(".weight")
            if name.endswith(".weight") and layer in written:
                codes, order, steps, zeros = written[layer]
                if settings["group"]:
                    out.plain(order.astype(np.uint16))
                out.plain(steps.astype(FLOAT))
                out.symbols(zeros)
                out.symbols(codes)
            else:
                out.plain(value.numpy().astype(FLOAT))
        return out.content()

    def _layer(self, name: str, layer: nn.Module, settings: dict) -> tuple[np.ndarray, ...]:
        equations = Equations(layer)

        def add(_: str, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            equations.add(inputs[0], torch.zeros_like(output))

        with torch.no_grad(), hooked(self.network.eval(), {name: layer}, add):
            for some in self.images.split(50):
                self.network(some)
        moment = equations.plain()[0, :-1, :-1]
        weight = layer.weight.detach().flatten(1).double()
        order = moment.diagonal().argsort(descending=True, stable=True)
        codes, steps, zeros = gptq(weight[:, order], moment[order][:, order], settings)
        codes, steps, zeros = (value.numpy() for value in (codes, steps, zeros))
        order = order.numpy()
        values = dequantized(codes, order, steps, zeros, settings["group"])
        layer.weight.data = torch.from_numpy(values).reshape(layer.weight.shape)
        return np.take(codes, np.argsort(order), 1), order, steps, zeros

    def decode(self, data: bytes) -> dict[str, Tensor]:
        """The float32 state of a file."""
        found, read = {}, Reader(data)
        _, group = (int(value) for value in read.plain(2, np.uint16))
        layers = layers_of(self.network)
        for name, like in self.network.state_dict().items():
            if not (name.endswith(".weight") and name.removesuffix(".weight") in layers):
                values = read.plain(like.numel(), FLOAT).astype(np.float32)
                found[name] = torch.from_numpy(values).reshape(like.shape)
                continue
            rows, columns = len(like), like[0].numel()
            order = read.plain(columns, np.uint16).astype(int) if group else np.arange(columns)
            groups = -(-columns // group) if group else 1
            steps = read.plain(rows * groups, FLOAT).reshape(rows, groups)
            zeros = read.symbols().reshape(rows, groups)
            codes = np.take(read.symbols().reshape(rows, columns), order, 1)
            values = dequantized(codes, order, steps, zeros, group)
            found[name] = torch.from_numpy(values).reshape(like.shape)
        return found


def dequantized(
    codes: np.ndarray, order: np.ndarray, steps: np.ndarray, zeros: np.ndarray, group: int
) -> np.ndarray:
    """Weights [units, inputs] of codes whose columns stand in ``order``."""
    which = np.arange(codes.shape[1]) // group if group else np.zeros(codes.shape[1], int)
    values = steps.astype(np.float32)[:, which] * (codes - zeros[:, which])
    return np.take(values.astype(np.float32), np.argsort(order), 1)


def gptq(weight: Tensor, moment: Tensor, settings: dict) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [units, inputs], steps and zero points [units, groups] of a layer.

    Parameters
    ----------
    weight : Tensor
        float64 [units, inputs].
    moment : Tensor
        float64 [inputs, inputs], second moment of the inputs in the same order.
    settings : dict
        bits and group.
    """
    dead = moment.diagonal() == 0
    moment = moment + torch.diag(DAMPING * moment.diagonal().mean() + dead.double())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(moment)), upper=True)
    weight, width = weight.clone(), weight.shape[1]
    codes, steps, zeros = torch.zeros_like(weight, dtype=torch.int32), [], []
    block = settings["group"] or width
    for start in range(0, width, block):
        step, zero = grid(weight[:, start : start + block], settings["bits"])
        steps.append(step)
        zeros.append(zero)
        for low in range(start, min(start + block, width), 128):  # lazy batches
            high = min(low + 128, start + block, width)
            misses = torch.zeros(len(weight), high - low, dtype=torch.float64)
            for column in range(low, high):
                code = (weight[:, column] / step + zero).round().clamp(0, 2 ** settings["bits"] - 1)
                codes[:, column] = code.int()
                miss = (weight[:, column] - step * (code - zero)) / upper[column, column]
                weight[:, column:high] -= miss[:, None] * upper[column, column:high]
                misses[:, column - low] = miss
            weight[:, high:] -= misses @ upper[low:high, high:]
    return codes, torch.stack(steps, 1), torch.stack(zeros, 1).int()


def grid(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Step, as float16 holds it, and zero point of each row [units, columns]; see ``GPTQ``."""
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    top, best = 2**bits - 1, None
    for clip in CLIPS:
        step = ((high - low) * clip / top).clamp(min=1e-6).half().double()
        zero = (-low * clip / step).round().clamp(0, top)
        code = (weight / step[:, None] + zero[:, None]).round().clamp(0, top)
        error = (step[:, None] * (code - zero[:, None]) - weight).square().sum(1)
        if best is None:
            best = [error, step, zero]
        better = error < best[0]
        best = [torch.where(better, new, old) for new, old in zip((error, step, zero), best,
                                                                  strict=True)]  # fmt: skip
    return best[1], best[2]
