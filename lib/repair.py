"""Closed-form repair of pruned and quantized networks: no labels, no training.

Layers are visited in the order of the forward pass. Each is fitted to what the dense network's
layer puts out, from the inputs which the repaired network gives it, so that errors made before it
are compensated as well. Layers that ``lib.linear`` does not know are left as they are, and those
that read other samples than in the dense network. All models given stay untouched.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import chain

import torch
from torch import Tensor, nn

from .attention import opened
from .checks import check_images
from .inputs import own, split
from .leastsquares import equations
from .linear import Layer, Place, View, bias_of, hooked, layers_of, watch
from .lockstep import pairs_of
from .masks import Mask, masked
from .patches import units_of

MEMORY = 2**31  # bytes of layers' outputs that may be held at a time
BATCH = 50  # images unfolded at a time, and run at a time where outputs would take more
Pair = tuple[Tensor, Tensor]  # a layer's input and output
Triple = tuple[Tensor, Tensor, Tensor]  # and the output wanted
Batches = Iterable[Triple]
Change = Callable[[str, Layer, Batches], None]


def refit(
    dense: nn.Module, pruned: nn.Module, masks: Mask, images: Tensor, *, ridge: float = 1e-3
) -> nn.Module:
    """Refit the kept weights and biases of a pruned network by least squares, layer by layer.

    Parameters
    ----------
    dense, pruned : nn.Module
        The network before and after pruning (removed weights are zero), of one architecture; run
        in eval mode.
    masks : dict of Tensor
        bool by weight name, True = kept. Layers without a mask are left as they are.
    images : Tensor
        float32 [N, ...], a few hundred are enough; labels are not needed.
    ridge : float
        Positive strength that ties the weights to the present ones, relative to the mean diagonal
        of the inputs' second moment; decides directions that the images leave open.

    Returns
    -------
    nn.Module
        A copy of ``pruned``; removed weights stay exactly zero.

    Raises
    ------
    ValueError
        If a mask does not fit the model, the images are unusable or the ridge is not positive.

    Notes
    -----
    For each unit k with kept inputs S the weights and the bias minimise

        Σ_np (w_Sᵀ a_np,S + b − z_np)² + ρ ‖w_S − w⁰_S‖²

    where z is the dense layer's pre-activation and a the input in the network repaired so far. A
    Cholesky factor solves it when all units share a mask; otherwise conjugate gradients run for
    all units at once, from the present weights.

    References
    ----------
    Frantar, Alistarh: Optimal Brain Compression, NeurIPS 2022, eq. 1: the layer-wise problem.
    """
    if not ridge > 0:
        raise ValueError(f"ridge must be positive, not {ridge}")
    masked(pruned, masks)

    def fit(name: str, layer: Layer, batches: Batches) -> None:
        problem, place = equations(layer), Place.of(name, layer)
        for inputs, output, target in batches:
            problem.add(inputs, target - output, BATCH)
        problem.refit(place(masks[place.name]), ridge)

    return _repaired(
        dense, pruned, images, fit, lambda name, layer: Place.of(name, layer).name in masks
    )


def bias_correction(dense: nn.Module, quantized: nn.Module, images: Tensor) -> nn.Module:
    """Correct biases so that each channel's mean pre-activation is the dense network's.

    The networks before and after compression are of one architecture and run in eval mode on
    images, float32 [N, ...]. Returns a copy of ``quantized``; layers without a bias are as they
    were. ValueError if there are no images or they hold values that are not finite.

    References
    ----------
    Nagel et al.: Data-Free Quantization Through Weight Equalization and Bias Correction,
    ICCV 2019, section 4.2, here with measured means.
    """

    def shift(name: str, layer: Layer, batches: Batches) -> None:
        now, wanted = _statistics(layer, batches)
        if (bias := bias_of(layer)) is not None:
            bias.data += (wanted[0] - now[0]).to(bias.dtype)

    return _repaired(dense, quantized, images, shift, lambda _, layer: bias_of(layer) is not None)


def renormalise(dense: nn.Module, pruned: nn.Module, masks: Mask, images: Tensor) -> nn.Module:
    """Give each unit's pre-activation the mean and standard deviation of the dense network's.

    Arguments and errors as of ``refit``. Returns a copy of ``pruned`` with other gains (factors of
    the weights) and biases; removed weights stay zero.

    Notes
    -----
    ``w ← w s / ŝ`` and ``b ← m + (b − m̂) s / ŝ``, with m, s the unit's mean and deviation in the
    dense network and m̂, ŝ in the pruned one. Where the dense layer's BatchNorm is folded, m and s
    are its shift and gain, and this is what estimating its statistics anew on the images comes to
    (Ioffe and Szegedy 2015, algorithm 2). Layers without a bias are only scaled, embeddings left.
    """

    def rescale(name: str, layer: Layer, batches: Batches) -> None:
        (mean, deviation), (target, wanted) = _statistics(layer, batches)
        weight, view = layer.weight.data, View.of(layer)
        gain = torch.where(deviation > 0, wanted / deviation, 1).to(weight.dtype)
        scaled = view.rows(weight) * gain.reshape(view.groups, -1, 1)
        weight.copy_(view.weight(scaled, weight.shape))
        if (bias := bias_of(layer)) is not None:
            bias.data.sub_(mean).mul_(gain).add_(target)

    def chosen(name: str, layer: Layer) -> bool:
        return Place.of(name, layer).name in masks and not isinstance(layer, nn.Embedding)

    return _repaired(dense, pruned, images, rescale, chosen)


def _repaired(
    dense: nn.Module, broken: nn.Module, images: Tensor, change: Change,
    chosen: Callable[[str, Layer], bool],
) -> nn.Module:  # fmt: skip
    """A copy, layer after layer changed by ``change(name, layer, batches)``.

    The batches are (inputs as repaired so far, output, the dense network's output). Each network
    runs once where all that has to be held fits into memory; otherwise, and with layers called
    twice, anew up to each layer, batch by batch.
    """
    check_images(images)
    repaired = copy.deepcopy(broken)
    dense, network = opened(copy.deepcopy(dense)), opened(repaired)
    layers = layers_of(network)
    with torch.no_grad():
        calls, size = _order(network, images)
        names = [name for name in calls if chosen(name, layers[name])]
        if size * len(images) <= MEMORY and all(calls[name] == 1 for name in names):
            _in_one_pass(dense, network, images, change, names)
            return repaired
        for name in names:
            seen, wanted = (_run(model, name, images, calls[name]) for model in (network, dense))
            batches = _alike(seen, wanted)
            if (first := next(batches, None)) is not None:
                change(name, layers[name], chain([first], batches))
    return repaired


def _alike(seen: Iterator[list[Pair]], wanted: Iterator[list[Pair]]) -> Iterator[Triple]:
    """(input, output, output wanted) of a layer where both networks call it on the same samples."""
    for now, then in zip(seen, wanted, strict=True):
        if [output.shape for _, output in now] == [output.shape for _, output in then]:
            yield from ((a, z, target) for (a, z), (_, target) in zip(now, then, strict=True))


def _in_one_pass(
    dense: nn.Module, repaired: nn.Module, images: Tensor, change: Change, names: list[str]
) -> None:
    targets: dict[str, Tensor] = {}

    def keep(name: str, layer: Layer, inputs: tuple[Tensor], output: Tensor) -> None:
        targets[name] = output.clone()  # an activation in place may follow

    def replace(name: str, layer: Layer, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        target = targets.pop(name, None)
        if target is None or target.shape != output.shape:
            return output  # of other samples
        change(name, layer, [(inputs[0], output, target)])
        return layer.forward(inputs[0])

    for model, hook in ((dense, keep), (repaired, replace)):
        with hooked(model, names, hook):
            model(own(images, model))


def _statistics(layer: Layer, batches: Batches) -> list[tuple[Tensor, Tensor]]:
    """Mean and deviation, float64 [units], of the outputs now, and of the dense layer's."""
    count, sums = 0, torch.zeros(4, 1, dtype=torch.float64)
    for _, output, target in batches:
        now, wanted = (units_of(layer, t).double() for t in (output, target))  # [groups, units, p]
        count += now.shape[2]
        parts = [part.sum(2).flatten() for x in (now, wanted) for part in (x, x.square())]
        sums = sums.to(now.device) + torch.stack(parts)
    means = sums / count
    return [(mean, (square - mean.square()).clamp(min=0).sqrt())
            for mean, square in (means[:2], means[2:])]  # fmt: skip


class _Reached(Exception):
    """Ends a forward pass once the layer has been seen."""


def _run(model: nn.Module, name: str, images: Tensor, calls: int) -> Iterator[list[Pair]]:
    """Yield the layer's (input, output) of all calls, batch by batch."""
    seen: list[Pair] = []

    def hook(name: str, layer: Layer, inputs: tuple[Tensor], output: Tensor) -> None:
        seen.append((inputs[0].clone(), output.clone()))
        if len(seen) == calls:
            raise _Reached

    for batch in split(images, BATCH):
        seen.clear()
        with hooked(model, [name], hook), suppress(_Reached):
            model(own(batch, model))
        yield list(seen)


def _order(model: nn.Module, images: Tensor) -> tuple[dict[str, int], float]:
    """Layers in the order of the pass with the number of their calls; bytes put out an image.

    Those are left out that read other samples, or a part of them, from some images to others.
    """
    passes: list[dict[str, list[tuple[torch.Size, int]]]] = []

    def hook(name: str, layer: Layer, inputs: tuple[Tensor], output: Tensor) -> None:
        passes[-1].setdefault(name, []).append((output.shape, output.nbytes))

    pairs = pairs_of(images)
    for pair in pairs:
        passes.append({})
        watch(model, pair, layers_of(model), hook)
    calls = {
        name: len(found)
        for name, found in passes[0].items()
        if all(found == each.get(name) for each in passes)
    }
    size = sum(nbytes for found in passes[0].values() for _, nbytes in found)
    return calls, size / len(pairs[0])
