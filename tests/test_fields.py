"""Fields of recipes and all their parts: one clear error for a value of another type."""

from dataclasses import dataclass, fields

import numpy as np
import pytest

from lib import Recipe
from lib.fields import check_fields
from lib.prune import KeepFilters, KeepTop, NonPositive
from lib.quantize import LayerWidths, Quantizer, RateDistortion, Sequential, Tiers, Uniform
from lib.quantize.ecqx import ECQx
from lib.quantize.trained import Trained
from lib.recipe import Repair
from lib.relevance import Rule
from lib.relevance.rules import chooser
from lib.score import CRITERIA

PARTS = (
    Uniform, Tiers, LayerWidths, RateDistortion, Sequential, Trained, ECQx,
    NonPositive, KeepTop, KeepFilters, Repair, Recipe, Rule,
)  # fmt: skip
WRONG = ("8", b"8", None, [4], {}, object(), float, True, 2.5, 1, "adam")


@pytest.mark.parametrize("part", PARTS)
def test_every_field_refuses_values_of_another_type(part):
    for field in fields(part):
        refused = 0
        for value in WRONG:
            try:
                part(**{field.name: value})
            except ValueError as error:
                assert "\n" not in str(error)
                refused += str(error).startswith(f"{field.name} must be ")
        assert refused >= 5, field.name


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Uniform(bits="8"), "bits must be a number, not '8'"),
        (lambda: Uniform(bits=True), "bits must be a number, not True"),
        (lambda: Uniform(bits=float("nan")), r"bits must lie in \[1, 8\]"),
        (lambda: Tiers(widths=[0, 4]), r"widths must be a tuple of integers, not \[0, 4\]"),
        (lambda: Tiers(widths=(0, "4")), "widths must be a tuple of integers"),
        (lambda: RateDistortion(by=3), "by must be a string or a Criterion, not 3"),
        (lambda: Sequential(ridge=None), "ridge must be a number, not None"),
        (lambda: Sequential(ridge=float("inf")), "ridge must be positive"),
        (lambda: ECQx(price=float("nan")), "price must be positive"),
        (lambda: Trained(coded="no"), "coded must be True or False, not 'no'"),
        (lambda: NonPositive(rounds=1.5), "rounds must be an integer, not 1.5"),
        (lambda: Repair(finetune="300"), "finetune must be an integer, not '300'"),
        (lambda: Repair(refit=1), "refit must be True or False, not 1"),
        (lambda: Rule(epsilon=float("nan")), "epsilon and gamma must be finite"),
        (lambda: Rule(low=[0.0]), r"low must be a number or a tuple of numbers or None, not \["),
        (lambda: chooser(None), "rule must be a name, a Rule or a mapping to these, not None"),
    ],
)
def test_errors_name_field_and_remedy(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_numbers_of_any_kind_are_numbers():
    assert Uniform(np.float32(3)) == Uniform(np.int64(3)) == Uniform(3)
    assert NonPositive(rounds=2.0) == NonPositive(rounds=2)
    assert isinstance(NonPositive(rounds=2.0).rounds, int)
    assert RateDistortion(CRITERIA["alike"]).by is CRITERIA["alike"]


def test_a_quantizer_of_ones_own_is_checked_by_what_it_declares():
    class Hidden:
        pass

    @dataclass(frozen=True)
    class Mine(Quantizer):
        levels: int = 3

    with pytest.raises(ValueError, match="levels must be an integer, not 'x'"):
        Mine("x")

    @dataclass
    class Unknown:
        one: "Hidden" = None

    check_fields(Unknown(3))  # a type that cannot be looked up
