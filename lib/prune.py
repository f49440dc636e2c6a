"""Pruning rules: which weights go, by which scores, in how many rounds.

A rule is an object that says what to remove and by which criterion: derive it from ``Removal``,
give it ``masks``, and hand it to ``Recipe(remove=...)``.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass

from torch import Tensor, nn

from .fields import check_fields
from .finetune import Batches
from .fold import Folded
from .masks import Mask, check_scope, check_share, filters, intersect, keep_top, nonpositive
from .score import By, Scores, criterion


@dataclass(frozen=True)
class Removed:
    """A network after pruning and repair."""

    folded: Folded  # the user's model, and how BatchNorm was folded into its layers
    network: nn.Module  # the folded copy, pruned, refitted and fine-tuned; removed weights are zero
    masks: Mask  # bool, True = kept; keyed by weight name
    train: Batches | None = None  # training data, for quantizers that train
    seed: int = 0  # of the order in training

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
        check_fields(self)
        criterion(self.by)
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, not {self.rounds}")

    @abstractmethod
    def masks(self, scores: Scores, before: Mask, round_: int) -> Mask:
        """What is kept after one round, counted from 0; nothing removed before comes back.

        The scores are of the network as the rounds before left it; masks are bool, True = kept,
        ``before`` what was kept so far.
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
        """See ``nonpositive``."""
        return nonpositive(scores, self.fraction, mask=before)


@dataclass(frozen=True)
class _Share(Removal):
    """Keep a share, of which each round removes the same factor."""

    density: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.density <= 1:
            raise ValueError(f"density must lie in (0, 1], not {self.density}")

    def masks(self, scores: Scores, before: Mask, round_: int) -> Mask:
        """See ``kept``; what was removed before ranks last."""
        left = {name: score.masked_fill(~before[name], -math.inf) for name, score in scores.items()}
        return self.kept(left, self.density ** ((round_ + 1) / self.rounds))

    @abstractmethod
    def kept(self, scores: Scores, density: float) -> Mask:
        """What is kept at that density."""


@dataclass(frozen=True)
class KeepTop(_Share):
    """Keep a share of the weights, highest scores first.

    Attributes
    ----------
    density : float
        Share kept after the last round, in (0, 1]; each round removes the same factor.
    scope : {"global", "layer"}
        Rank the weights of all layers together, or each layer's among themselves.
    """

    by: By = "magnitude"
    scope: str = "global"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scope(self.scope)

    def kept(self, scores: Scores, density: float) -> Mask:
        """See ``keep_top``."""
        return keep_top(scores, density, scope=self.scope)


@dataclass(frozen=True)
class KeepFilters(_Share):
    """Keep a share of each convolution's filters, and of the weights of all other layers.

    Attributes
    ----------
    density : float
        Share kept after the last round, in (0, 1]; each round removes the same factor.
    """

    by: By = "deeplift"

    def kept(self, scores: Scores, density: float) -> Mask:
        """See ``filters`` for convolutions and ``keep_top`` for the others."""
        flat = {name: score for name, score in scores.items() if score.ndim == 2}
        return intersect(filters(scores, density), keep_top(flat, density) if flat else {})
