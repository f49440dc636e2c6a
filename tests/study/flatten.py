"""Recipes of today from the flat fields that records of runs hold."""

from lib import Recipe
from lib.prune import KeepFilters, KeepTop, NonPositive
from lib.quantize import ECQx, LayerWidths, RateDistortion, Sequential, Tiers, Trained, Uniform
from lib.recipe import Repair


def recipe(fields: dict) -> Recipe:
    """The recipe that a record's ``provenance["recipe"]`` tells of, as it was written then."""
    common = {"by": fields["criterion"]} | {k: fields[k] for k in ("rounds", "layerwise")}
    remove = {
        "none": lambda: None,
        "nonpositive": lambda: NonPositive(**common, fraction=fields["fraction"]),
        "top": lambda: KeepTop(**common, density=fields["density"], scope=fields["scope"]),
        "filters": lambda: KeepFilters(**common, density=fields["density"]),
    }[fields["pruning"]]()
    names = ("renormalise", "refit", "finetune", "optimiser")
    repair = Repair(**{name: fields[name] for name in names})
    by, bits = fields["precision"] or fields["criterion"], fields["bits"]
    later = {k.removeprefix("store."): v for k, v in fields.items() if k.startswith("store.")}
    store = {
        "uniform": lambda: Uniform(bits),
        "tiers": lambda: Tiers(by, bits, tuple(fields["widths"])),
        "layers": lambda: LayerWidths(by, bits),
        "rate-distortion": lambda: RateDistortion(by, fields["lam"]),
        "Sequential": lambda: Sequential(by, fields["lam"]),
        "Trained": lambda: Trained(by, fields["lam"], **later),
        "ECQx": lambda: ECQx(price=fields["lam"], by=by, **later),
    }[fields["quantizer"]]()
    return Recipe(remove, repair, store)
