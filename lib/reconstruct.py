"""Closed-form repair of pruned and quantized networks: no labels, no training.

Layers are visited in the order of the forward pass. Each is fitted to what the dense network's
layer puts out, from the inputs which the repaired network gives it, so that errors made before it
are compensated as well. Linear, Conv1d and Conv2d layers of any stride, padding, dilation and
grouping are handled; others are left as they are. All models given stay untouched.
"""

import copy
from contextlib import contextmanager, suppress
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lib import prune

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d)
LARGE = 200  # inputs from which conjugate gradients run in float32 and stop early
MEMORY = 2**31  # bytes of layers' outputs that may be held at a time


def input_moments(model: nn.Module, images: Tensor, *, batch_size: int = 50,
                  centered: bool = False) -> dict[str, Tensor]:
    """Second moments of the inputs of every linear and convolutional layer.

    Parameters
    ----------
    model : nn.Module
        Run in eval mode, on its own device.
    images : Tensor
        float32 [N, ...].
    batch_size : int
        Images per forward pass; bounds the memory taken by unfolded patches.
    centered : bool
        Take what is left when the bias is chosen best for any change of the weights, i.e. the
        covariance: right when biases are corrected afterwards. Layers without a bias keep the
        plain moment.

    Returns
    -------
    dict of Tensor
        float32 by weight name: [d, d], or [groups, d, d] for grouped convolutions, where
        d = weight[0].numel(). Layers the model does not run are absent.

    Raises
    ------
    ValueError
        If there are no images or they hold values that are not finite.

    Notes
    -----
    H = 1/N Σ_n Σ_p a_np a_npᵀ with a_np the patch of image n at position p, ordered as the
    flattened weight; the sum over positions makes δᵀ H δ the error energy of one unit per image,
    comparable between layers. Centered, P·N·ā āᵀ/N is subtracted, ā the mean patch of P positions.
    """
    _check(images)
    model, sums = copy.deepcopy(model).eval(), {}

    def accumulate(name):
        def hook(layer, inputs, output):
            patches = _patches(layer, inputs[0])
            gram = patches @ patches.mT
            sums[name] = sums[name] + gram if name in sums else gram
        return hook

    layers = _layers(model)
    for name, layer in layers.items():
        layer.register_forward_hook(accumulate(name))
    with torch.no_grad():
        for batch in images.split(batch_size):
            model(_ready(batch, model))
    moments = {}
    for name, gram in sums.items():
        moment = gram[:, :-1, :-1]
        if centered and layers[name].bias is not None:
            total = gram[:, :-1, -1:]
            moment = moment - total @ total.mT / gram[:, -1:, -1:]
        moment = moment / len(images)
        moments[f"{name}.weight"] = moment if len(moment) > 1 else moment[0]
    return moments


def refit(dense: nn.Module, pruned: nn.Module, masks: prune.Mask, images: Tensor, *,
          batch_size: int = 50, ridge: float = 1e-3) -> nn.Module:
    """Refit the kept weights and biases of a pruned network by least squares, layer by layer.

    Parameters
    ----------
    dense, pruned : nn.Module
        The network before and after pruning, of one architecture; run in eval mode.
    masks : dict of Tensor
        bool by weight name, True = kept. Layers without a mask are left as they are.
    images : Tensor
        float32 [N, ...], a few hundred are enough; labels are not needed.
    batch_size : int
        Images whose patches are unfolded at a time, and images per forward pass where the outputs
        of all layers on all images would take more than 2 GiB.
    ridge : float
        Positive strength that ties the weights to the present ones, relative to the mean diagonal
        of the inputs' second moment; decides directions that the images leave open.

    Returns
    -------
    nn.Module
        A copy of ``pruned``; removed weights are exactly zero.

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
    _check(images)
    if not ridge > 0:
        raise ValueError(f"ridge must be positive, not {ridge}")
    repaired = prune.apply(pruned, masks)

    def fit(name, layer, batches):
        gram = residual = 0
        for inputs, output, target in batches:
            # Summing what is missing, not the target, leaves nothing large to cancel.
            missing = target - output
            for some, few in zip(inputs.split(batch_size), missing.split(batch_size), strict=True):
                patches = _patches(layer, some)
                gram = gram + (patches @ patches.mT).double()
                residual = residual + (_units(layer, few) @ patches.mT).double()
        _fit(layer, masks[f"{name}.weight"], gram, residual, ridge)

    _change_layers(dense, repaired, images, batch_size, fit, lambda name: f"{name}.weight" in masks)
    return repaired


def bias_correction(dense: nn.Module, quantized: nn.Module, images: Tensor, *,
                    batch_size: int = 50) -> nn.Module:
    """Correct biases so that each channel's mean pre-activation is the dense network's.

    Parameters
    ----------
    dense, quantized : nn.Module
        The network before and after compression, of one architecture; run in eval mode.
    images : Tensor
        float32 [N, ...].
    batch_size : int
        Images per forward pass, where the outputs of all layers on all images would take more
        than 2 GiB.

    Returns
    -------
    nn.Module
        A copy of ``quantized``; layers without a bias are as they were.

    Raises
    ------
    ValueError
        If there are no images or they hold values that are not finite.

    References
    ----------
    Nagel et al.: Data-Free Quantization Through Weight Equalization and Bias Correction,
    ICCV 2019, section 4.2, here with measured means.
    """
    _check(images)
    corrected = copy.deepcopy(quantized)

    def shift(name, layer, batches):
        now, wanted = _statistics(layer, batches)
        layer.bias.data += (wanted[0] - now[0]).to(layer.bias.dtype)

    def biased(name):
        return corrected.get_submodule(name).bias is not None

    _change_layers(dense, corrected, images, batch_size, shift, biased)
    return corrected


def renormalise(dense: nn.Module, pruned: nn.Module, masks: prune.Mask, images: Tensor, *,
                batch_size: int = 50) -> nn.Module:
    """Give each unit's pre-activation the mean and standard deviation of the dense network's.

    Parameters
    ----------
    dense, pruned : nn.Module
        The network before and after pruning, of one architecture; run in eval mode.
    masks : dict of Tensor
        bool by weight name; layers without a mask are left as they are.
    images : Tensor
        float32 [N, ...].
    batch_size : int
        Images per forward pass, where the outputs of all layers on all images would take more
        than 2 GiB.

    Returns
    -------
    nn.Module
        A copy of ``pruned`` with other gains (factors of the weights) and biases; removed weights
        stay zero.

    Raises
    ------
    ValueError
        If there are no images or they hold values that are not finite.

    Notes
    -----
    ``w ← w s / ŝ`` and ``b ← m + (b − m̂) s / ŝ``, with m, s the unit's mean and deviation in the
    dense network and m̂, ŝ in the pruned one. Where the dense layer's BatchNorm is folded, m and s
    are its shift and gain, and this is what estimating its statistics anew on the images comes to
    (Ioffe and Szegedy 2015, algorithm 2). Layers without a bias are only scaled.
    """
    _check(images)
    repaired = copy.deepcopy(pruned)

    def rescale(name, layer, batches):
        (mean, deviation), (target, wanted) = _statistics(layer, batches)
        gain = torch.where(deviation > 0, wanted / deviation, 1).to(layer.weight.dtype)
        layer.weight.data *= gain.view(-1, *[1] * (layer.weight.ndim - 1))
        if layer.bias is not None:
            layer.bias.data.sub_(mean).mul_(gain).add_(target)

    _change_layers(
        dense, repaired, images, batch_size, rescale, lambda name: f"{name}.weight" in masks
    )
    return repaired


def _change_layers(dense, repaired, images, batch_size, change, chosen):
    """Change layer after layer by ``change(name, layer, batches)``, inputs as repaired so far.

    The batches are (inputs, output, the dense network's output). Each network runs once where all
    that has to be held fits into memory; otherwise, and with layers called twice, anew up to each
    layer, batch by batch.
    """
    with _evaluating(copy.deepcopy(dense)) as dense, _evaluating(repaired), torch.no_grad():
        calls, size = _order(repaired, images[:1])
        names = [name for name in calls if chosen(name)]
        if size * len(images) <= MEMORY and all(calls[name] == 1 for name in names):
            _in_one_pass(dense, repaired, images, change, names)
            return
        for name in names:
            pairs = zip(_run(repaired, name, images, batch_size, calls[name]),
                        _run(dense, name, images, batch_size, calls[name]), strict=True)
            batches = ((*seen, target) for seen, (_, target) in pairs)
            change(name, repaired.get_submodule(name), batches)


def _in_one_pass(dense, repaired, images, change, names):
    targets = {}

    def keep(name, layer, inputs, output):
        targets[name] = output.clone()  # an activation in place may follow

    def replace(name, layer, inputs, output):
        change(name, layer, [(inputs[0], output, targets.pop(name))])
        return layer.forward(inputs[0])

    for model, hook in ((dense, keep), (repaired, replace)):
        with _hooked(model, names, hook):
            model(_ready(images, model))


@contextmanager
def _hooked(model, names, hook):
    """Call ``hook(name, layer, inputs, output)`` in forward passes."""
    handles = [model.get_submodule(name).register_forward_hook(partial(hook, name))
               for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Sums:
    """Sums over a unit's pre-activations, for their mean and standard deviation."""

    def __init__(self):
        self.count = self.total = self.squares = 0

    def add(self, units):
        units = units.double()
        self.count += units.shape[2]
        self.total = self.total + units.sum(2).flatten()
        self.squares = self.squares + units.square().sum(2).flatten()

    def moments(self):
        mean = self.total / self.count
        return mean, (self.squares / self.count - mean.square()).clamp(min=0).sqrt()


def _statistics(layer, batches):
    """Mean and deviation [units] of the outputs now, and of the dense layer's."""
    now, wanted = _Sums(), _Sums()
    for _, output, target in batches:
        now.add(_units(layer, output))
        wanted.add(_units(layer, target))
    return now.moments(), wanted.moments()


def _fit(layer, mask, gram, residual, ridge):
    """Solve normal equations [g, D, D], [g, rows, D] of a layer; the last column is the bias."""
    groups, rows, columns = residual.shape
    kept = mask.to(gram.device).reshape(groups, rows, -1)
    if layer.bias is None:
        gram, residual = gram[:, :-1, :-1], residual[..., :-1]
    else:
        kept = F.pad(kept, (0, 1), value=True)
    inputs = columns - 1
    scale = gram.diagonal(dim1=1, dim2=2)[:, :inputs].mean(1, keepdim=True)
    gram.diagonal(dim1=1, dim2=2)[:, :inputs] += torch.where(scale > 0, ridge * scale, 1)
    solutions = zip(gram, kept, residual * kept, strict=True)
    change = torch.stack([_solve(*problem) for problem in solutions])
    layer.weight.data += change[..., :inputs].reshape(layer.weight.shape).to(layer.weight.dtype)
    if layer.bias is not None:
        layer.bias.data += change[..., -1].flatten().to(layer.bias.dtype)


def _solve(gram, kept, residual):
    """Changes [rows, D] of kept weights for which the masked residual [rows, D] vanishes."""
    change = torch.zeros_like(residual)
    if (kept == kept[0]).all():
        inputs = kept[0].nonzero().squeeze(1)
        factor = torch.linalg.cholesky(gram[inputs[:, None], inputs])
        change[:, inputs] = torch.cholesky_solve(residual[:, inputs].mT, factor).mT
        return change
    if len(gram) > LARGE:
        return _conjugate_gradients(gram.float(), kept, residual.float(), 40, 3e-3).double()
    return _conjugate_gradients(gram, kept, residual, 300)


def _conjugate_gradients(gram, kept, residual, iterations, tolerance=1e-5):
    """The same by conjugate gradients, preconditioned by the diagonal, all rows at once."""
    scale, change, tiny = gram.diagonal().rsqrt(), torch.zeros_like(residual), 1e-30
    gram, residual = gram * scale * scale[:, None], residual * scale
    direction, energy = residual, residual.square().sum(1, keepdim=True)
    enough = energy * tolerance**2
    for _ in range(iterations):
        image = direction @ gram * kept
        step = energy / (direction * image).sum(1, keepdim=True).clamp(min=tiny)
        change, residual = change + step * direction, residual - step * image
        before, energy = energy, residual.square().sum(1, keepdim=True)
        if (energy <= enough).all():
            break
        direction = residual + energy / before.clamp(min=tiny) * direction
    return change * scale


def _patches(layer, inputs):
    """Patches as columns [groups, d + 1, images · positions]; the last row is one, for the bias."""
    if isinstance(layer, nn.Linear):
        columns = inputs.reshape(1, -1, inputs.shape[-1]).mT
    else:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        inputs = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
        shape = layer.kernel_size, layer.dilation, layer.stride
        if isinstance(layer, nn.Conv1d):
            inputs, shape = inputs.unsqueeze(2), [(1, *size) for size in shape]
        columns = F.unfold(inputs, shape[0], dilation=shape[1], stride=shape[2])
        columns = columns.unflatten(1, (layer.groups, -1)).permute(1, 2, 0, 3).flatten(2)
    return F.pad(columns, (0, 0, 0, 1), value=1)


def _units(layer, outputs):
    """Pre-activations [groups, units, images · positions]."""
    if isinstance(layer, nn.Linear):
        return outputs.reshape(1, -1, outputs.shape[-1]).mT
    return outputs.flatten(2).unflatten(1, (layer.groups, -1)).permute(1, 2, 0, 3).flatten(2)


class _Reached(Exception):
    """Ends a forward pass once the layer has been seen."""


def _run(model, name, images, batch_size, calls):
    """Yield the layer's (input, output) of each call, batch by batch."""
    seen = []

    def hook(name, layer, inputs, output):
        seen.append((inputs[0].clone(), output.clone()))
        if len(seen) == calls:
            raise _Reached

    for batch in images.split(batch_size):
        seen.clear()
        with _hooked(model, [name], hook), suppress(_Reached):
            model(_ready(batch, model))
        yield from list(seen)


def _order(model, images):
    """Layers in the order of the forward pass with the number of their calls; bytes put out."""
    trace = []

    def hook(name, layer, inputs, output):
        trace.append((name, output.nbytes))

    with _hooked(model, _layers(model), hook):
        model(_ready(images, model))
    names = [name for name, _ in trace]
    return {name: names.count(name) for name in names}, sum(size for _, size in trace)


@contextmanager
def _evaluating(model):
    modes = {module: module.training for module in model.modules()}
    try:
        yield model.eval()
    finally:
        for module, training in modes.items():
            module.training = training


def _layers(model):
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LAYERS)}


def _ready(batch, model):
    """A batch on the model's device, in the layout in which convolutions are fastest."""
    batch = batch.to(next(model.parameters()).device)
    return batch.contiguous(memory_format=torch.channels_last) if batch.ndim == 4 else batch


def _check(images):
    if not len(images):
        raise ValueError("there are no images")
    if not images.isfinite().all():
        raise ValueError("the images hold values that are not finite")
