"""ECQx: relevance in the assignment of entropy-constrained training, a rival to compare with."""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..codes import Codes, check, storable
from ..prune import Removed
from ..score import By, criterion
from .trained import Grid, InTraining


@dataclass(frozen=True)
class ECQx(InTraining):
    """Entropy-constrained quantization-aware training whose zeros relevance makes dear.

    Attributes
    ----------
    price : float
        Of a bit, relative to the mean squared weight of the layer; less in smaller layers.
    by : str or Criterion
        Its absolute scores decide what being set to zero costs.
    bits : int
        Width of the grids: 2^bits − 1 values, zero among them.
    power : float
        Of the relevance, in (0, 1]: β.

    Notes
    -----
    With R the absolute relevance of a weight over the largest of its layer, and ρ such that
    ρ R^β is one in the mean over the layer, the symbol s of weight w minimises

        (w − Δ s)² − λ log2 p(s), for s = 0 times ρ R^β.

    Becking et al. give no code for this setting; assumed here: relevance of the reference images
    in the network as coded, taken anew ten times (theirs: of each batch), half of it kept from
    before; λ is price x mean w² x the layer's share of the largest layer's weights; the grid spans
    the weights before training; first and last layer like all others.

    References
    ----------
    Becking et al.: ECQx: Explainability-Driven Quantization for Low-Bit and Sparse DNNs, 2021
    (arXiv 2109.04236), section 4.
    """

    knob = "price"
    settings = tuple(10 ** (step / 20 - 8) for step in range(201))
    price: float = 0.01
    by: By = "lrp-epsilon"
    bits: int = 4
    power: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        criterion(self.by)
        check(0 < self.price < math.inf, f"price must be positive, not {self.price}")
        check(2 <= self.bits <= 8, f"bits must lie in [2, 8], not {self.bits}")
        check(0 < self.power <= 1, f"power must lie in (0, 1], not {self.power}")

    def prepare(self, removed: Removed, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The reference images and labels, by which relevance is taken anew."""
        return images, labels

    def start(
        self, removed: Removed, prepared: tuple[Tensor, Tensor], images: Tensor
    ) -> tuple[nn.Module, dict[str, Codes], dict[str, Grid]]:
        """The network as it is, and grids that span the weights of each layer."""
        network = copy.deepcopy(removed.network)
        weights = {name: network.get_parameter(name).detach() for name in removed.masks}
        most = max(weight.numel() for weight in weights.values())
        top, grids = 2 ** (self.bits - 1) - 1, {}
        for name, weight in weights.items():
            largest = float(weight.abs().max()) or 1.0
            step = float(storable(torch.tensor(largest / top, dtype=torch.float32)))
            lam = self.price * float(weight.square().mean()) * weight.numel() / most
            damage = torch.tensor([step**2]).to(weight)
            grids[name] = Grid(step, top, damage, lam, removed.masks[name].to(weight.device))
        return network, {}, grids

    def refresh(
        self, network: nn.Module, grids: dict[str, Grid], prepared: tuple[Tensor, Tensor]
    ) -> None:
        """Take relevance anew, half of what zero costs from before."""
        for name, scores in criterion(self.by)(network, *prepared).items():
            relevance = scores.abs()
            relevance = (relevance / relevance.max().clamp_min(1e-30)) ** self.power
            zero = relevance / relevance.mean().clamp_min(1e-30)
            before = grids[name].zero
            grids[name].zero = zero if before is None else (before + zero) / 2
