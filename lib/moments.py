"""What layers read and put out: patches, units and second moments of inputs.

Linear, Conv1d and Conv2d layers of any stride, padding, dilation and grouping are handled.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Layer = nn.Linear | nn.Conv1d | nn.Conv2d


def input_moments(
    model: nn.Module, images: Tensor, *, batch_size: int = 50, centered: bool = False
) -> dict[str, Tensor]:
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
    check_images(images)
    model = copy.deepcopy(model).eval()
    sums: dict[str, Tensor] = {}
    layers = layers_of(model)

    def accumulate(name: str, layer: Layer, inputs: tuple[Tensor], output: Tensor) -> None:
        patches = patches_of(layer, inputs[0])
        gram = patches @ patches.mT  # [groups, d + 1, d + 1]
        sums[name] = sums[name] + gram if name in sums else gram

    with hooked(model, layers, accumulate), torch.no_grad():
        for batch in images.split(batch_size):
            model(ready(batch, model))
    moments = {}
    for name, gram in sums.items():
        centred = centered and layers[name].bias is not None
        moment = second_moment(gram, len(images), centered=centred)
        moments[f"{name}.weight"] = moment if len(moment) > 1 else moment[0]
    return moments


def second_moment(gram: Tensor, images: int, *, centered: bool) -> Tensor:
    """Second moment [groups, d, d] from sums over patches [groups, d + 1, d + 1], the last a one.

    ``centered`` takes what is left when the bias is chosen best for any change of the weights.
    """
    moment = gram[:, :-1, :-1]
    if centered:
        total, trace = gram[:, :-1, -1:], _trace(moment)
        moment = moment - total @ total.mT / gram[:, -1:, -1:]
        # Of inputs that are the same for all images, what is left is rounding of either sign.
        moment = torch.where(_trace(moment) > 1e-6 * trace, moment, 0.0)
    return moment / images


def _trace(moments: Tensor) -> Tensor:
    """Traces [groups, 1, 1] of [groups, d, d]."""
    return moments.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]


def patches_of(layer: Layer, inputs: Tensor) -> Tensor:
    """Patches as columns [groups, d + 1, images · positions]; the last row is one, for the bias."""
    if isinstance(layer, nn.Linear):
        columns = inputs.reshape(1, -1, inputs.shape[-1]).mT
    else:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        inputs = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
        kernel, dilation, stride = layer.kernel_size, layer.dilation, layer.stride
        if isinstance(layer, nn.Conv1d):
            inputs = inputs.unsqueeze(2)
            kernel, dilation, stride = ((1, *size) for size in (kernel, dilation, stride))
        columns = F.unfold(inputs, kernel, dilation=dilation, stride=stride)
        columns = columns.unflatten(1, (layer.groups, -1)).permute(1, 2, 0, 3).flatten(2)
    return F.pad(columns, (0, 0, 0, 1), value=1)


def units_of(layer: Layer, outputs: Tensor) -> Tensor:
    """Pre-activations [groups, units, images · positions]."""
    if isinstance(layer, nn.Linear):
        return outputs.reshape(1, -1, outputs.shape[-1]).mT
    return outputs.flatten(2).unflatten(1, (layer.groups, -1)).permute(1, 2, 0, 3).flatten(2)


def layers_of(model: nn.Module) -> dict[str, Layer]:
    """Layers whose inputs and units are known here, by module path."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, Layer)}


@contextmanager
def hooked(model: nn.Module, names: Iterable[str], hook: Callable) -> Iterator[None]:
    """Call ``hook(name, layer, inputs, output)`` in forward passes."""
    handles = [
        model.get_submodule(name).register_forward_hook(partial(hook, name)) for name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def ready(batch: Tensor, model: nn.Module) -> Tensor:
    """A batch on the model's device, in the layout in which convolutions are fastest."""
    batch = batch.to(next(model.parameters()).device)
    return batch.contiguous(memory_format=torch.channels_last) if batch.ndim == 4 else batch


def check_images(images: Tensor) -> None:
    """Raise ValueError unless there are images and all of them are finite."""
    if not len(images):
        raise ValueError("there are no images")
    if not images.isfinite().all():
        raise ValueError("the images hold values that are not finite")
