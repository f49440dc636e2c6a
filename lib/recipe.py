"""Recipes: what to remove, how to repair, how precisely to store."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from .fields import check_fields
from .finetune import OPTIMISERS
from .prune import KeepFilters, KeepTop, NonPositive, Removal
from .quantize import LayerWidths, Quantizer, RateDistortion, Sequential, Tiers, Uniform


@dataclass(frozen=True)
class Repair:
    """How a pruned network is repaired.

    Attributes
    ----------
    renormalise : bool
        After each removal, give every unit the mean and deviation that it had: what estimating
        BatchNorm's statistics anew does (no labels). Before the refit, if both are asked for.
    refit : bool
        After each removal, refit the kept weights to the dense layers' outputs (no labels).
    finetune : int
        Steps with labels after the last removal; needs ``train``.
    optimiser : str
        Of these steps: a key of ``lib.finetune.OPTIMISERS``.
    """

    renormalise: bool = False
    refit: bool = False
    finetune: int = 0
    optimiser: str = "adam"

    def __post_init__(self) -> None:
        check_fields(self)
        if self.finetune < 0:
            raise ValueError(f"finetune counts steps and cannot be {self.finetune}")
        if self.optimiser not in OPTIMISERS:
            known = ", ".join(OPTIMISERS)
            raise ValueError(f"unknown optimiser {self.optimiser!r}; known: {known}")


@dataclass(frozen=True)
class Recipe:
    """One row of the comparison.

    Attributes
    ----------
    remove : Removal, optional
        What to remove: ``NonPositive``, ``KeepTop``, ``KeepFilters``, or a rule of your own;
        nothing by default.
    repair : Repair
        How to repair what is left; nothing is done by default.
    store : Quantizer
        How precisely to store it: ``RateDistortion``, ``Tiers``, ``LayerWidths``, ``Uniform``, or
        a quantizer of your own.

    Raises
    ------
    ValueError
        For a part that is none of these; each part checks its own fields.
    """

    remove: Removal | None = None
    repair: Repair = field(default_factory=Repair)
    store: Quantizer = field(default_factory=RateDistortion)

    def __post_init__(self) -> None:
        check_fields(self)

    def at(self, value: float) -> "Recipe":
        """The same recipe with the quantizer's knob at another value."""
        return replace(self, store=self.store.at(value))


_LRP = "lrp-epsilon/contrastive"
_PAPER = Recipe(NonPositive("lrp-epsilon"), store=Tiers("lrp-epsilon"))
_RANDOM = Recipe(NonPositive("random"), store=Tiers("random"))
_REVERSED = Recipe(NonPositive("reversed:lrp-epsilon"), store=Tiers("reversed:lrp-epsilon"))
_GRADUAL = Recipe(NonPositive(_LRP, rounds=4, fraction=0.5), Repair(refit=True))
_BASELINE = Recipe(KeepFilters("deeplift", density=0.8), store=LayerWidths("deeplift"))

RECIPES: Mapping[str, Recipe] = {
    "uniform": Recipe(store=Uniform()),
    "magnitude": Recipe(KeepTop("magnitude"), store=Uniform()),
    "lrp-paper": _PAPER,
    "lrp-paper-finetuned": replace(_PAPER, repair=Repair(finetune=300)),
    "random-paper": _RANDOM,
    "reversed-paper": _REVERSED,
    "deeplift-baseline": _BASELINE,
    "deeplift-baseline-finetuned": replace(_BASELINE, repair=Repair(finetune=300)),
    "lrp-gradual": replace(_GRADUAL, store=Tiers(_LRP)),
    "lrp-rd": Recipe(store=RateDistortion(_LRP)),
    "lrp-root-rd": Recipe(store=RateDistortion(f"root:{_LRP}")),
    "lrp-gradual-rd": replace(_GRADUAL, store=RateDistortion(_LRP)),
    "lrp-sequential": Recipe(store=Sequential(f"root:{_LRP}")),
    "lrp-gradual-sequential": replace(_GRADUAL, store=Sequential(_LRP)),
}
"""Recipes by name: the paper's rule read literally, the XAI baseline, ours, and controls."""
