"""Pruning rules: which weights go, by which scores, in how many rounds.

A rule is an object that says what to remove and by which criterion: derive it from ``Removal``,
give it ``masks``, and hand it to ``Recipe(remove=...)``.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass

from torch import Tensor, nn

from .finetune import Batches
from .fold import Folded
from .masks import Mask, check_scope, check_share, filters, intersect, keep_top, nonpositive_nearest
from .score import By, Scores, criterion


@dataclass(frozen=True)
class Removed:
    """A network after pruning and repair.

    Attributes
    ----------
    folded : Folded
        The user's model, and how BatchNorm was folded into its layers.
    network : nn.Module
        The folded copy, pruned, refitted and fine-tuned; removed weights are zero.
    masks : dict of str to Tensor
        bool, True = kept; keyed by weight name.
    train : tuple of Tensor, or iterable of batches, optional
        Training data, for quantizers that train.
    seed : int
        Of the order in training.
    """

    folded: Folded
    network: nn.Module
    masks: Mask
    train: Batches | None = None
    seed: int = 0

    def scores(self, by: By, images: Tensor, labels: Tensor) -> Scores:
        """Scores of the network as it is now.

        Folding multiplied each row by its BatchNorm's gain; a criterion that belongs to weights
        as trained gets it divided out.
        """
        chosen = criterion(by)
        gains = self.folded.scales() if chosen.as_trained else None
        return chosen(self.network, images, labels, gains)


@dataclass(frozen=True)
class Removal(ABC):
    """A pruning rule: which weights go, by which scores, and in how many steps.

    Attributes
    ----------
    by : str or Criterion
        The scores that decide; a name in ``CRITERIA`` or an object.
    rounds : int
        Removal in this many rounds, scored anew before each.
    layerwise : bool
        In each round one layer after the other, scored anew and repaired in between.

    Raises
    ------
    ValueError
        Unknown criterion (the message lists the known ones), or no round.
    """

    by: By = "lrp-epsilon"
    _: KW_ONLY
    rounds: int = 1
    layerwise: bool = False

    def __post_init__(self) -> None:
        criterion(self.by)
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, not {self.rounds}")

    @abstractmethod
    def masks(self, scores: Scores, before: Mask, round_: int) -> Mask:
        """Decide what is kept after one round.

        Parameters
        ----------
        scores : dict of Tensor
            Of the network as the rounds before left it.
        before : dict of Tensor
            bool, what was kept so far.
        round_ : int
            Counted from 0.

        Returns
        -------
        dict of Tensor
            bool, True = kept; nothing that was removed before comes back.
        """


@dataclass(frozen=True)
class NonPositive(Removal):
    """The paper's rule: weights with score <= 0 go, here those nearest zero first.

    Attributes
    ----------
    fraction : float
        Share of the non-positive weights that a round removes, in [0, 1]. One round at 1 is the
        literal rule.
    """

    fraction: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share("fraction", self.fraction)

    def masks(self, scores: Scores, before: Mask, round_: int) -> Mask:
        """See ``nonpositive_nearest``."""
        return nonpositive_nearest(scores, self.fraction, mask=before)


@dataclass(frozen=True)
class KeepTop(Removal):
    """Keep a share of the weights, highest scores first.

    Attributes
    ----------
    density : float
        Share kept after the last round, in (0, 1]; each round removes the same factor.
    scope : {"global", "layer"}
        Rank the weights of all layers together, or each layer's among themselves.
    """

    by: By = "magnitude"
    density: float = 0.5
    scope: str = "global"

    def __post_init__(self) -> None:
        super().__post_init__()
        _density(self.density)
        check_scope(self.scope)

    def masks(self, scores: Scores, before: Mask, round_: int) -> Mask:
        """See ``keep_top``."""
        return keep_top(_among(scores, before), _reached(self, round_), scope=self.scope)


@dataclass(frozen=True)
class KeepFilters(Removal):
    """Keep a share of each convolution's filters, and of the weights of all other layers.

    Attributes
    ----------
    density : float
        Share kept after the last round, in (0, 1]; each round removes the same factor.
    """

    by: By = "deeplift"
    density: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        _density(self.density)

    def masks(self, scores: Scores, before: Mask, round_: int) -> Mask:
        """See ``filters`` for convolutions and ``keep_top`` for the others."""
        scores, density = _among(scores, before), _reached(self, round_)
        flat = {name: score for name, score in scores.items() if score.ndim == 2}
        unstructured = keep_top(flat, density) if flat else {}
        return intersect(filters(scores, density, scope="layer"), unstructured)


def _reached(rule: "KeepTop | KeepFilters", round_: int) -> float:
    """Share kept after a round, so that each round removes the same factor."""
    return rule.density ** ((round_ + 1) / rule.rounds)


def _among(scores: Scores, kept: Mask) -> Scores:
    """Scores of the weights still there; the others rank last."""
    return {name: score.masked_fill(~kept[name], -math.inf) for name, score in scores.items()}


def _density(value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"density must lie in (0, 1], not {value}")
