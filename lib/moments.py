"""What layers read and put out: patches, units and second moments of inputs.

Linear and convolutional layers of any stride, padding, dilation and grouping are handled, where
they compute what torch's layers of these types do.
"""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .inputs import FullPrecision, check_images, full_precision, ready, split

Layer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
FEW = 10  # images below which their covariance alone is not trusted
STEADY = 1e-4  # share of variance in the second moment below which an input hardly varies


def input_moments(model: nn.Module, images: Tensor, *, centered: bool = False) -> dict[str, Tensor]:
    """Second moments of the inputs of every linear and convolutional layer.

    Parameters
    ----------
    model : nn.Module
        Run in eval mode, on its own device.
    images : Tensor
        float32 [N, ...].
    centered : bool
        Take what is left when the bias is chosen best for any change of the weights, i.e. the
        covariance: right when biases are corrected afterwards. Layers without a bias keep the
        plain moment. Where the images cannot support it, see ``second_moment``, sums are taken
        in float64.

    Returns
    -------
    dict of Tensor
        float32 by weight name: [d, d], or [groups, d, d] for grouped convolutions, where
        d = weight[0].numel(). Layers the model does not run are absent.

    Raises
    ------
    ValueError
        If there are no images or they hold values that are not finite.

    Warns
    -----
    UserWarning
        Centred, from fewer than ten images or in layers whose input hardly varies; names them.

    Notes
    -----
    H = 1/N Σ_n Σ_p a_np a_npᵀ with a_np the patch of image n at position p, ordered as the
    flattened weight; the sum over positions makes δᵀ H δ the error energy of one unit per image,
    comparable between layers. Centered, P·N·ā āᵀ/N is subtracted, ā the mean patch of P positions.
    """
    check_images(images)
    model = copy.deepcopy(model).eval()
    layers = layers_of(model)

    def grams(names: Iterable[str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}

        def accumulate(name: str, layer: Layer, inputs: tuple[Tensor], output: Tensor) -> None:
            patches = patches_of(layer, inputs[0]).to(dtype or inputs[0].dtype)
            gram = patches @ patches.mT  # [groups, d + 1, d + 1]
            sums[name] = sums[name] + gram if name in sums else gram

        watch(model, images, names, accumulate)
        return sums

    sums = grams(layers)
    centred = [name for name in sums if centered and layers[name].bias is not None]
    weak = [name for name in centred if unsupported(sums[name], len(images))]
    if centered and (named := list(sums) if len(images) < FEW else weak):
        warn_of(named, len(images))
    sums |= grams(weak, torch.float64) if weak else {}
    moments = {}
    for name, gram in sums.items():
        moment = second_moment(gram, len(images), centered=name in centred)
        moment = moment.to(layers[name].weight.dtype)
        moments[weight_name(name)] = moment if len(moment) > 1 else moment[0]
    return moments


def second_moment(
    gram: Tensor, images: int, *, centered: bool, plain: Tensor | None = None
) -> Tensor:
    """Second moment of a layer's inputs [groups, d, d], from sums over the patches of images.

    Parameters
    ----------
    gram : Tensor
        [groups, d + 1, d + 1], the last input a one.
    centered : bool
        Take the covariance C, what is left when the bias is chosen best for any change of the
        weights. Where it is ``unsupported``, a share α of the plain moment S is added.
    plain : Tensor, optional
        The gram of the inputs as they are, where that of ``gram`` were shifted.

    Notes
    -----
    ``C + α S``: a bias fitted to the mean of n images is right for others up to 1/n of their
    spread, of which n images, all alike, tell nothing; so α is 1/n for few images and at least
    ``STEADY``. For one image C is zero and the plain moment is left, for many nothing is added.
    """
    moment, plain = gram[:, :-1, :-1], gram if plain is None else plain
    if centered:
        total = gram[:, :-1, -1:]
        moment = moment - total @ total.mT / gram[:, -1:, -1:]
        if share := borrowed(*energies(plain), images):
            moment = moment + share * plain[:, :-1, :-1]
    return moment / images


def borrowed(energy: float, means: float, images: int) -> float:
    """Share α of the plain moment that a covariance borrows; 0 where images support it.

    ``energy`` is a sum of squares, ``means`` what the means make of it.
    """
    if images >= FEW and energy - means > STEADY * energy:
        return 0.0
    return max(STEADY, 1 / images if images < FEW else 0.0)


def energies(gram: Tensor) -> tuple[float, float]:
    """Sum of squares of the inputs, and what their means make of it, from sums over patches."""
    energy = gram[:, :-1, :-1].diagonal(dim1=1, dim2=2).sum()
    return float(energy), float((gram[:, :-1, -1].square() / gram[:, -1:, -1]).sum())


def unsupported(gram: Tensor, images: int) -> bool:
    """Whether images cannot support a covariance: they are few, or the inputs hardly vary."""
    return borrowed(*energies(gram), images) > 0


def warn_of(names: list[str], images: int) -> None:
    """Warn that images tell too little of what these layers read."""
    layers = ", ".join(repr(name or "the model itself") for name in names[:8])
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    warnings.warn(
        f"{images} reference image{'s' if images != 1 else ''} cannot tell how the inputs of "
        f"{layers}{more} vary; their weights are stored as if they varied by their own size, and "
        "may fit these images alone: give 20 to 50 different images of each class, unless these "
        "inputs are constant by design",
        stacklevel=2,
    )


def patches_of(layer: Layer, inputs: Tensor) -> Tensor:
    """Patches as columns [groups, d + 1, images · positions]; the last row is one, for the bias."""
    if isinstance(layer, nn.Linear):
        columns = inputs.reshape(1, -1, inputs.shape[-1]).mT
    else:
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        columns = F.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
        sizes = zip(layer.kernel_size, layer.dilation, layer.stride, strict=True)
        for axis, (size, gap, step) in enumerate(sizes, 2):
            columns = columns.unfold(axis, gap * (size - 1) + 1, step)[..., ::gap]
        # [images, groups, channels, *places, *taps] -> [groups, channels · taps, images · places]
        k = len(layer.kernel_size)
        columns = columns.unflatten(1, (layer.groups, -1))
        columns = columns.permute(1, 2, *range(3 + k, 3 + 2 * k), 0, *range(3, 3 + k))
        columns = columns.flatten(2 + k).flatten(1, 1 + k)
    return F.pad(columns, (0, 0, 0, 1), value=1)


def units_of(layer: Layer, outputs: Tensor) -> Tensor:
    """Pre-activations [groups, units, images · positions]."""
    if isinstance(layer, nn.Linear):
        return outputs.reshape(1, -1, outputs.shape[-1]).mT
    return outputs.flatten(2).unflatten(1, (layer.groups, -1)).permute(1, 2, 0, 3).flatten(2)


def layers_of(model: nn.Module) -> dict[str, Layer]:
    """Layers whose inputs and units are known here, by module path."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, Layer) and _is_torchs(layer)
    }


def _is_torchs(layer: Layer) -> bool:
    """Whether it computes what its type says, from its own weight: subclasses need not."""
    kind = next(k for k in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(layer, k))
    forward = getattr(layer.forward, "__func__", None)
    inner = getattr(type(layer), "_conv_forward", None) is getattr(kind, "_conv_forward", None)
    hooks = layer._forward_hooks or layer._forward_pre_hooks
    return forward is kind.forward and inner and not hooks and "weight" in layer._parameters


def weight_name(path: str) -> str:
    """Name of the weight of the layer at a module path, which is empty for a bare layer."""
    return f"{path}.weight" if path else "weight"


@contextmanager
def hooked(model: nn.Module, names: Iterable[str], hook: Callable) -> Iterator[None]:
    """Call ``hook(name, layer, inputs, output)`` in forward passes, which autocast leaves alone."""

    def calling(name: str) -> Callable:
        def called(layer: Any, args: tuple, kwargs: dict, output: Tensor) -> Any:
            with full_precision():
                return hook(name, layer, args or (kwargs["input"],), output)

        return called

    handles = [
        model.get_submodule(name).register_forward_hook(calling(name), with_kwargs=True)
        for name in names
    ]
    try:
        with FullPrecision():
            yield
    finally:
        for handle in handles:
            handle.remove()


def watch(
    model: nn.Module, images: Tensor, names: Iterable[str], hook: Callable, batch_size: int = 50
) -> None:
    """Run a model on images, in batches, with a hook as of ``hooked`` on the layers named."""
    with hooked(model, names, hook), torch.no_grad():
        for batch in split(images, batch_size):
            model(ready(batch, model))
