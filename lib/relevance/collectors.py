"""Collectors: what is added up of the relevance that arrives at weights, units and images."""

import torch
from torch import Tensor

from ..inputs import UnsupportedLayerError
from .layers import Collector, Key, Layer


class Collected(Collector):
    """Keeps nothing; the others keep what they are for.

    Parameters
    ----------
    weights : dict of str to Tensor
        The scored weights of the network that is propagated through, by name.

    Attributes
    ----------
    totals : dict of str to Tensor
        Weight name -> what was collected over all samples.
    samples : int
        Images in the batch; 0 before the first, while one image is followed to learn of layers.
    backwards : bool
        Whether relevance is wanted, or only what the forward pass reads.
    copies : int
        How often the one image that is followed stands in its batch.
    direct : bool
        Whether a rule gives relevance to pixels that are zero.
    shares : bool
        Whether images are factors of activations, and take their share of relevance.
    unlike : bool
        Whether a weight has other uses in this batch, or reads other numbers of rows, than for the
        images that were followed.
    """

    backwards: bool = True
    copies: int = 1
    direct: bool = False
    shares: bool = False
    unlike: bool = False

    def __init__(self, weights: dict[str, Tensor]):
        self.weights, self.samples = weights, 0
        self.totals: dict[str, Tensor] = {}

    def follow(self, place: int) -> None:
        """The image at this place of the first batch is followed next, by itself.

        What was learned from it before is forgotten.
        """

    def begin(self, images: Tensor) -> Tensor:
        """Make ready for a batch; gives the images to propagate, [samples, ...]."""
        self.samples = len(images)
        return images

    def end(self) -> None:
        """Everything of the batch has arrived."""


class PerWeight(Collected):
    """Whose totals are shaped like the weights."""

    def total(self, key: Key) -> Tensor:
        """The rows of a weight's total that a layer uses; changed in place."""
        name, first, last = key
        if name not in self.totals:  # not before, when activations take most of the memory
            self.totals[name] = torch.zeros_like(self.weights[name])
        return self.totals[name][first:last]

    def found(self) -> dict[str, Tensor]:
        """Weight name -> total, zero where nothing arrived."""
        for name in self.weights:
            self.total((name, None, None))
        return {name: self.totals[name] for name in self.weights}


class Sums(PerWeight):
    """Relevance of each weight, summed over samples."""

    sums = True

    def weight(self, layer: Layer, s: Tensor, a: Tensor, w: Tensor, grad: Tensor | None) -> None:
        assert grad is not None
        self.total(layer.place).addcmul_(w, grad)

    def rows(self, layer: Layer, indices: Tensor, g: Tensor, w: Tensor) -> None:
        total = self.total(layer.place)
        relevance = (g * w).reshape(-1, *total.shape[1:])  # [look-ups, ...]
        total.index_add_(0, indices.reshape(-1), relevance)


class InputMoments(PerWeight):
    """Squared input of each connection, summed over samples and positions."""

    backwards = False

    def begin(self, images: Tensor) -> Tensor:
        self.used: list[Layer] = []
        return super().begin(images)

    def end(self) -> None:
        for layer in self.used:
            _only_used(layer)

    def use(self, layer: Layer, a: Tensor) -> None:
        if self.samples and layer.key:
            self.used.append(layer)
            name, first, last = layer.key
            squares = layer.operation.squares(a.detach(), self.weights[name][first:last])
            self.total(layer.key).add_(squares)


def _only_used(layer: Layer) -> None:
    """Refuse stored weights that layers do not use as they are: these have no units or inputs."""
    if layer.stored:
        raise UnsupportedLayerError(
            f"{layer.place[0]!r} is no weight of units: its layer multiplies by one that is "
            "computed from it (a parametrization, or a slice, a view or a sum); choose a recipe "
            "without units and inputs (uniform, magnitude), or give the layer a "
            "parameter of its own, by torch.nn.utils.parametrize.remove_parametrizations where "
            "it has one"
        )


class Units(Collected):
    """Squared ``R / z`` of each output unit, averaged over samples and positions."""

    def __init__(self, weights: dict[str, Tensor]):
        super().__init__(weights)
        self.counts: dict[str, Tensor] = {}  # terms in each unit's sum
        self.turned: dict[str, bool] = {}  # whether units are along its second axis

    def unit(self, layer: Layer, g: Tensor) -> None:
        name, turned = layer.place[0], bool(layer.operation.options[3:4] == (True,))
        if self.turned.setdefault(name, turned) != turned:
            raise UnsupportedLayerError(
                f"the weight {name!r} is used by a convolution and by a transposed one, whose "
                "units are not the same: choose a recipe without units (uniform, magnitude), or "
                "give each a weight of its own"
            )
        axis = 1 if layer.operation.options else g.dim() - 1
        squared = g.square().sum([d for d in range(g.dim()) if d != axis])  # [units]
        self._add(layer, squared, g.numel() // len(squared))

    def rows(self, layer: Layer, indices: Tensor, g: Tensor, w: Tensor) -> None:
        _only_used(layer)
        name, first, last = layer.place
        size, width = self.weights[name][first:last].shape
        flat = indices.reshape(-1)
        squared = g.reshape(-1, width).square().mean(1)  # [look-ups]
        squared = g.new_zeros(size).index_add_(0, flat, squared)
        self._add(layer, squared, flat.bincount(minlength=size))

    def _add(self, layer: Layer, squared: Tensor, count: int | Tensor) -> None:
        name, first, last = layer.place
        if name not in self.totals:
            size = len(squared) if last is None else len(self.weights[name])
            self.totals[name], self.counts[name] = squared.new_zeros(2, size)
        self.totals[name][first:last] += squared
        self.counts[name][first:last] += count

    def means(self) -> dict[str, Tensor]:
        """Weight name -> mean of each unit, 0 where the layer did not run."""
        return {
            name: self.totals[name] / self.counts[name].clamp(min=1)
            if name in self.totals else w.new_zeros(len(w))
            for name, w in self.weights.items()
        }  # fmt: skip


class Inputs(Collected):
    """Relevance of every input value."""

    def __init__(self, weights: dict[str, Tensor]):
        super().__init__(weights)
        self.maps: list[Tensor] = []  # of each batch, like its images

    def begin(self, images: Tensor) -> Tensor:
        # in rows, so that a view of it is told from a rearrangement
        image = super().begin(images).clone(memory_format=torch.contiguous_format)
        if self.direct:  # far below rounding, so that relevance over activation is defined
            image[image == 0] = 1e-20
        self.image = image.requires_grad_()
        self.kept = torch.zeros_like(image)  # relevance of pixels that layers read as they are
        return self.image

    def pixels(self, a: Tensor, relevance: Tensor) -> bool:
        """Keep relevance itself for the images, since pixels may be zero."""
        image = self.image
        same = a.data_ptr() == image.data_ptr() and a.numel() == image.numel() and a.is_contiguous()
        if same:
            self.kept += relevance.reshape(image.shape)
        return same

    def end(self) -> None:
        gradient = self.image.grad
        self.maps.append(
            self.kept if gradient is None else self.kept + self.image.detach() * gradient
        )
