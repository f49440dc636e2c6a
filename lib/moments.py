"""Second moments of what layers read, for the layers of ``lib.linear``."""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .attention import opened
from .checks import check_images
from .linear import Layer, Place, Projection, bias_of, layers_of, watch
from .patches import gram
from .warning import warn

FEW = 10  # images below which their covariance alone is not trusted
STEADY = 1e-4  # share of variance in the second moment below which an input hardly varies


def input_moments(
    model: nn.Module, images: Tensor, *, centered: bool = False, most: int | None = None
) -> dict[str, Tensor]:
    """Second moments of the inputs of every layer that ``lib.linear`` knows.

    Parameters
    ----------
    model : nn.Module
        Run in eval mode, on its own device.
    images : Tensor
        float32 [N, ...].
    centered : bool
        Take what is left when the bias is chosen best for any change of the weights, i.e. the
        covariance: right when biases are corrected afterwards. Layers without a bias keep the
        plain moment. Where the images cannot support it, see ``borrowed``, sums are taken
        in float64.
    most : int, optional
        Of more inputs of a unit, take the first so many.

    Returns
    -------
    dict of Tensor
        float32 by weight name: [d, d], or [groups, d, d] where groups of units read different
        inputs, ordered as by ``lib.linear.View``: in grouped convolutions; for the query, the key
        and the value of an in-projection; for each token of an embedding, d = 1, where the
        tokens never looked up get the mean of all, that their rows be worth something. Layers the
        model does not run are absent.

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
    model = opened(copy.deepcopy(model))
    layers = layers_of(model)

    def grams(paths: Iterable[str], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        sums: dict[str, Tensor] = {}
        last: list = [None, None]  # the projections of an attention often read the same

        def accumulate(path: str, layer: Layer, inputs: tuple[Tensor], output: Tensor) -> None:
            if not (isinstance(layer, Projection) and last[0] is inputs[0]):
                last[:] = inputs[0], gram(layer, inputs[0], dtype, most)
            sums[path] = sums[path] + last[1] if path in sums else last[1]

        watch(model, images, paths, accumulate)
        return sums

    sums = grams(layers)
    centred = [path for path in sums if centered and bias_of(layers[path]) is not None]
    weak = [path for path in centred if borrowed(*energies(sums[path]), len(images))]
    if centered and (named := list(sums) if len(images) < FEW else weak):
        warn_of(named, len(images))
    rounded = [path for path in centred if path in weak or steady(sums[path]).any()]
    sums |= grams(rounded, torch.float64) if rounded else {}
    moments: dict[str, list[Tensor]] = {}
    for path, layer in layers.items():
        if path in sums:
            moment = sums[path]
            share = borrowed(*energies(moment), len(images)) if path in centred else None
            moment = second_moment(moment, len(images), share, moment)
            if isinstance(layer, nn.Embedding):
                moment = torch.where(moment > 0, moment, moment.mean())
            name = Place.of(path, layer).name
            moments.setdefault(name, []).append(moment.to(layer.weight.dtype))
    return {
        name: torch.cat(parts) if len(parts) > 1 or len(parts[0]) > 1 else parts[0][0]
        for name, parts in moments.items()
    }


def second_moment(
    gram: Tensor, images: int, share: float | None = None, plain: Tensor | None = None
) -> Tensor:
    """Second moment of a layer's inputs [groups, d, d], from sums over the patches of images.

    Parameters
    ----------
    gram : Tensor
        [groups, d + 1, d + 1], the last input a one.
    share : float, optional
        Take the covariance C, what is left when the bias is chosen best for any change of the
        weights, and so much of the plain moment S: see ``borrowed``.
    plain : Tensor, optional
        The gram of the inputs as they are; that of ``gram`` may be shifted.

    Notes
    -----
    ``C + α S``: a bias fitted to the mean of n images is right for others up to 1/n of their
    spread, of which n images, all alike, tell nothing; so α is 1/n for few images and at least
    ``STEADY``. For one image C is zero and the plain moment is left, for many nothing is added.
    """
    moment = gram[:, :-1, :-1]
    if share is not None:
        total = gram[:, :-1, -1:]
        moment = torch.baddbmm(moment, total, -total.mT / gram[:, -1:, -1:])
        if share and plain is not None:
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
    energy, means = _by_group(gram)
    return float(energy.sum()), float(means.sum())


def steady(gram: Tensor) -> Tensor:
    """Groups, bool [groups], whose inputs hardly vary, so that of a difference little is left."""
    energy, means = _by_group(gram)
    return energy - means <= STEADY * energy


def _by_group(gram: Tensor) -> tuple[Tensor, Tensor]:
    energy = gram[:, :-1, :-1].diagonal(dim1=1, dim2=2).sum(1)
    return energy, (gram[:, :-1, -1].square() / gram[:, -1:, -1]).sum(1)


def warn_of(names: list[str], images: int) -> None:
    """Warn that images tell too little of what these layers read."""
    layers = ", ".join(repr(name or "the model itself") for name in names[:8])
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    warn(
        f"{images} reference image{'s' if images != 1 else ''} cannot tell how the inputs of "
        f"{layers}{more} vary; their weights are stored as if they varied by their own size, and "
        "may fit these images alone: give 20 to 50 different images of each class, unless these "
        "inputs are constant by design",
    )
