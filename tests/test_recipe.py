"""Recipes: which are there, what is refused, and that fields without use change nothing."""

import pickle
from dataclasses import replace

import pytest

from lib.compress import compress, encode, prepare, remove
from lib.finetune import OPTIMISERS
from lib.prune import KeepFilters, KeepTop, NonPositive
from lib.quantize import LayerWidths, RateDistortion, Tiers, Uniform
from lib.recipe import RECIPES, Recipe, Repair

pytestmark = pytest.mark.filterwarnings("ignore:compression took:UserWarning")
LRP = "lrp-epsilon/contrastive"


def test_the_recipes():
    assert list(RECIPES) == [
        "uniform", "magnitude", "lrp-paper", "lrp-paper-finetuned", "random-paper",
        "reversed-paper", "deeplift-baseline", "deeplift-baseline-finetuned", "lrp-gradual",
        "lrp-rd", "lrp-root-rd", "lrp-gradual-rd", "lrp-sequential", "lrp-gradual-sequential",
    ]  # fmt: skip
    literal = RECIPES["lrp-paper"]
    assert literal.remove == NonPositive("lrp-epsilon", fraction=1.0, rounds=1)
    assert literal.store == Tiers("lrp-epsilon") and literal.repair == Repair()
    for name in ("lrp-paper", "deeplift-baseline"):
        tuned = RECIPES[f"{name}-finetuned"]
        assert tuned.repair.finetune == 300
        assert replace(tuned, repair=Repair()) == RECIPES[name]


def test_controls_differ_from_the_paper_in_nothing_but_the_scores():
    paper = RECIPES["lrp-paper"]
    for name, by in (("random-paper", "random"), ("reversed-paper", "reversed:lrp-epsilon")):
        control = RECIPES[name]
        assert control.remove.by == control.store.by == by
        assert control == replace(
            paper, remove=replace(paper.remove, by=by), store=replace(paper.store, by=by)
        )


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: NonPositive("lrp-epsilom"), "unknown criterion 'lrp-epsilom'; known: .*deeplift"),
        (lambda: NonPositive(fraction=-0.1), "fraction -0.1 is outside"),
        (lambda: NonPositive(fraction=1.5), "fraction 1.5 is outside"),
        (lambda: NonPositive(fraction=float("nan")), "fraction nan is outside"),
        (lambda: NonPositive(rounds=0), "rounds must be at least 1"),
        (lambda: NonPositive(rounds=-3), "rounds must be at least 1"),
        (lambda: KeepTop("root:"), "unknown criterion 'root:'"),
        (lambda: KeepTop(density=0), "density must lie in"),
        (lambda: KeepTop(density=-0.5), "density must lie in"),
        (lambda: KeepTop(density=1.1), "density must lie in"),
        (lambda: KeepTop(density=float("nan")), "density must lie in"),
        (lambda: KeepTop(scope="all"), "unknown scope 'all'; known: global, layer"),
        (lambda: KeepTop(rounds=0), "rounds must be at least 1"),
        (lambda: KeepFilters("nothing"), "unknown criterion 'nothing'"),
        (lambda: KeepFilters(density=0), "density must lie in"),
        (lambda: KeepFilters(density=2), "density must lie in"),
        (lambda: KeepFilters(rounds=0), "rounds must be at least 1"),
        (lambda: Repair(finetune=-1), "finetune counts steps"),
        (lambda: Repair(optimiser="lion"), "unknown optimiser 'lion'; known: adam, adam-slow, sgd"),
        (lambda: Recipe(remove="nonpositive"), "remove must be a Removal or None, not 'nonp"),
        (lambda: Recipe(repair=True), "repair must be a Repair, not True"),
        (lambda: Recipe(store="int"), "store must be a Quantizer, not 'int'"),
        (lambda: Recipe(store=None), "store must be a Quantizer, not None"),
        (lambda: Recipe(Tiers()), "remove must be a Removal or None, not Tiers"),
        (lambda: Recipe(store=Uniform(-1)), "bits must lie in"),
        (lambda: Recipe(store=Tiers("alik")), "unknown criterion 'alik'"),
        (lambda: Recipe(store=Tiers(bits=-1)), "bits must lie in"),
        (lambda: Recipe(store=LayerWidths(bits=0)), "bits must lie in"),
        (lambda: Recipe(store=RateDistortion("rot:fisher")), "unknown criterion 'rot:"),
        (lambda: Recipe(store=RateDistortion(price=0)), "price must be positive"),
        (lambda: Recipe().at(-1), "price must be positive"),
    ],
)
def test_unusable_recipes_list_what_is_known(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "one, other, equal",
    [
        (Recipe(), Recipe(None, Repair(), RateDistortion(LRP, 0.01)), True),
        (Recipe(NonPositive()), Recipe(NonPositive("lrp-epsilon", 1.0, rounds=1)), True),
        (Recipe(store=Uniform(4)), Recipe(store=Uniform(4.0)), True),
        (Recipe(store=Uniform()).at(3), Recipe(store=Uniform(3)), True),
        (Recipe(store=Uniform(3)), Recipe(store=Uniform()), False),
        (Recipe(store=RateDistortion(price=3.0)), Recipe(), False),
        (Recipe(store=RateDistortion("taylor")), Recipe(), False),
        (Recipe(store=Tiers(widths=(0, 2, 8))), Recipe(store=Tiers()), False),
        (Recipe(KeepTop(density=0.1)), Recipe(KeepTop()), False),
        (Recipe(KeepTop(scope="layer")), Recipe(KeepTop()), False),
        (Recipe(KeepTop(rounds=2)), Recipe(KeepTop()), False),
        (Recipe(KeepTop()), Recipe(KeepFilters("magnitude")), False),
        (Recipe(NonPositive(fraction=0.5)), Recipe(NonPositive()), False),
        (Recipe(NonPositive(layerwise=True)), Recipe(NonPositive()), False),
        (Recipe(NonPositive("taylor")), Recipe(NonPositive()), False),
        (Recipe(NonPositive()), Recipe(), False),
        (Recipe(repair=Repair(refit=True)), Recipe(), False),
    ],
)
def test_recipes_are_equal_where_all_fields_are(one, other, equal):
    assert (one == other) == equal
    assert (len({one, other}) == 1) == equal
    assert pickle.loads(pickle.dumps(one)) == one


@pytest.mark.parametrize("optimiser", OPTIMISERS)
def test_what_a_recipe_makes_no_use_of_changes_nothing(optimiser, trained, references):
    """No rule, so nothing is repaired; no steps, so no optimiser is needed."""
    idle = Repair(refit=True, renormalise=True, optimiser=optimiser)
    for rule, one, other in (
        (None, Repair(), idle),
        (KeepTop(), Repair(), Repair(False, False, 0, optimiser)),
    ):
        files = [
            compress(trained, *references, Recipe(rule, repair, Uniform())).to_bytes()
            for repair in (one, other)
        ]
        assert files[0] == files[1]


@pytest.mark.parametrize(
    "one, other",
    [
        (Recipe(KeepTop(density=0.3), store=Uniform()), Recipe(KeepTop(), store=Uniform())),
        (Recipe(KeepTop(), Repair(refit=True), Uniform()), Recipe(KeepTop(), store=Uniform())),
        (
            Recipe(KeepTop(), Repair(renormalise=True), Uniform()),
            Recipe(KeepTop(), store=Uniform()),
        ),
        (
            Recipe(store=Tiers("lrp-epsilon")),
            Recipe(store=Tiers("reversed:lrp-epsilon")),
        ),
        (Recipe(store=RateDistortion("alike")), Recipe(store=RateDistortion("fisher"))),
        (Recipe(store=RateDistortion(price=0.02)), Recipe()),
    ],
)
def test_what_it_does_make_use_of_changes_the_file(one, other, trained, references):
    files = [compress(trained, *references, recipe).to_bytes() for recipe in (one, other)]
    assert files[0] != files[1]


@pytest.mark.parametrize("optimiser", ["adam-slow", "sgd"])
def test_optimiser_steps_and_seed_reach_the_fine_tuning(optimiser, trained, digits, references):
    def tuned(seed=0, **how):
        recipe = Recipe(KeepTop(), Repair(**how))
        return remove(trained, *references, recipe, digits, seed).network[0].weight

    plain = tuned(finetune=2)
    assert (plain == tuned(finetune=2)).all()
    for other in (tuned(finetune=2, optimiser=optimiser), tuned(finetune=3), tuned(1, finetune=2)):
        assert (plain != other).any()


def test_recipes_that_remove_the_same_share_what_was_removed(trained, references):
    rule = NonPositive(LRP, fraction=0.5, rounds=2)
    recipe = Recipe(rule, Repair(refit=True), RateDistortion(LRP, price=0.05))
    other = replace(recipe, store=Tiers("taylor", bits=3.0))
    files = [
        encode(prepare(remove(trained, *references, by), *references, recipe), recipe).to_bytes()
        for by in (recipe, other)
    ]
    assert files[0] == files[1]


@pytest.mark.parametrize("store", [Uniform(), Tiers(), LayerWidths(), RateDistortion()])
def test_what_was_prepared_serves_all_settings_of_the_knob(store, trained, references):
    recipe = Recipe(store=store)
    prepared = prepare(remove(trained, *references, recipe), *references, recipe)
    other = recipe.at(store.settings[len(store.settings) // 2])
    expected = compress(trained, *references, other)
    assert encode(prepared, other).to_bytes() == expected.to_bytes()
