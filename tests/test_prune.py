"""Pruning rules: what each removes in a round, and a rule of one's own."""

from dataclasses import dataclass, replace

import pytest
import torch
from spread import assert_above, assert_below

from lib import masks as masking
from lib.codec import Compressed
from lib.compress import compress, remove
from lib.fold import fold_batchnorm
from lib.prune import KeepFilters, KeepTop, NonPositive, Removal
from lib.recipe import RECIPES, Recipe, Repair
from lib.relevance import weight_relevance
from lib.score import CRITERIA, Criterion

pytestmark = pytest.mark.filterwarnings("ignore:compression took:UserWarning")


def kept(model, data, rule, repair=None):
    return remove(model, *data, Recipe(rule, repair or Repair())).masks


def everything(scores):
    return {name: torch.ones_like(score, dtype=torch.bool) for name, score in scores.items()}


def test_literal_rule_removes_what_relevance_says(trained, references):
    removed = remove(trained, *references, RECIPES["lrp-paper"])
    scores = weight_relevance(fold_batchnorm(trained), *references)
    for name, mask in masking.nonpositive(scores).items():
        assert torch.equal(removed.masks[name], mask)
        assert (removed.network.get_parameter(name)[~mask] == 0).all()


def test_literal_rule_removes_zero_scores_too():
    scores = {"a": torch.tensor([1.0, 0.0, -1.0]), "b": torch.tensor([0.0, 1e-30])}
    for masks in (NonPositive().masks(scores, everything(scores), 0), masking.nonpositive(scores)):
        assert masks["a"].tolist() == [True, False, False]
        assert masks["b"].tolist() == [False, True]


def test_a_share_of_the_nonpositive_weights_goes_over_all_layers_at_once():
    """Those nearest zero, wherever they are; weights removed before are no candidates."""
    scores = {"a": torch.tensor([-1.0, -2.0, 5.0, 0.0]), "b": torch.tensor([-3.0, -4.0, -5.0, 1.0])}
    before = everything(scores)
    before["a"][3] = False
    masks = NonPositive(fraction=0.4).masks(scores, before, 0)
    assert masks["a"].tolist() == [False, False, True, False] and masks["b"].all()


def test_rounds_remove_more_each_time_and_nothing_comes_back(trained, references):
    rule, repair = RECIPES["lrp-gradual"].remove, RECIPES["lrp-gradual"].repair
    masks = [kept(trained, references, replace(rule, rounds=r), repair) for r in (1, 2, 3)]
    for fewer, more in zip(masks, masks[1:], strict=False):
        share = masking.density(more) / masking.density(fewer)
        assert_below(share, 1, "density over that after one round less")
        assert all((fewer[name] | ~more[name]).all() for name in fewer)


def test_layer_after_layer_scores_what_the_layers_before_left(trained, references):
    rule = NonPositive("lrp-epsilon", layerwise=True)
    masks, working = kept(trained, references, rule), fold_batchnorm(trained)
    for name in masks:
        scores = weight_relevance(working, *references)
        expected = masking.nonpositive(scores)[name]
        assert torch.equal(masks[name], expected)
        working = masking.apply(working, {name: expected})
    at_once = kept(trained, references, replace(rule, layerwise=False))
    assert any(not torch.equal(masks[name], at_once[name]) for name in masks)


def test_scope_decides_what_is_ranked_together(trained, references):
    rule = KeepTop("magnitude", density=0.3, scope="layer")
    masks = kept(trained, references, rule)
    for mask in masks.values():
        assert int(mask.sum()) == round(0.3 * mask.numel())
    everywhere = kept(trained, references, replace(rule, scope="global"))
    assert any(mask.sum() != everywhere[name].sum() for name, mask in masks.items())


def test_ranked_globally_no_weight_kept_is_below_one_removed():
    """But for each layer's best, which stays; the whole network is the default."""
    scores = {"strong": torch.arange(10.0) + 100, "weak": torch.arange(10.0)}
    masks = KeepTop(density=0.5).masks(scores, everything(scores), 0)
    assert masks["strong"].tolist() == [False] + 9 * [True]
    assert masks["weak"].tolist() == 9 * [False] + [True]


def test_top_keeps_exactly_the_share(trained, references):
    for rounds in (1, 3):
        rule = KeepTop("magnitude", density=0.3, rounds=rounds)
        assert abs(masking.density(kept(trained, references, rule)) - 0.3) < 1e-3


@pytest.mark.parametrize("make", [KeepTop, KeepFilters])
def test_every_round_removes_the_same_factor(make):
    scores = {"conv": torch.arange(64.0).reshape(64, 1, 1, 1), "flat": torch.arange(64.0)[:, None]}
    masks, shares = everything(scores), []
    for round_ in range(3):
        masks = make(density=1 / 8, rounds=3).masks(scores, masks, round_)
        shares.append(masking.density(masks))
    assert shares == [1 / 2, 1 / 4, 1 / 8]


@pytest.mark.parametrize("make", [KeepTop, KeepFilters])
def test_what_was_removed_before_ranks_last(make):
    """A removed weight's score is zero because the weight is, and may be the highest."""
    scores = {"conv": -torch.rand(8, 2, 1, 1), "flat": -torch.rand(8, 3)}
    before = everything(scores)
    before["conv"][:4] = before["flat"][:4] = False
    after = make(density=0.5).masks(
        {name: score * before[name] for name, score in scores.items()}, before, 0
    )
    assert all(torch.equal(mask, before[name]) for name, mask in after.items())


def test_magnitude_ranks_weights_as_trained_not_as_folded(trained, references):
    masks = kept(trained, references, KeepTop("magnitude", density=0.4))
    raw = {name: trained.get_parameter(name).detach().abs() for name in masks}
    expected = masking.keep_top(raw, 0.4)
    differing = sum(int((masks[name] != expected[name]).sum()) for name in masks)
    # rounding where two magnitudes are equal but for the last bit
    assert_below(differing, 3, "weights that differ from magnitudes as trained")
    folded = fold_batchnorm(trained)
    other = masking.keep_top({n: folded.get_parameter(n).detach().abs() for n in masks}, 0.4)
    others = sum(int((masks[name] != other[name]).sum()) for name in masks)
    assert_above(others, 100, "weights that differ from magnitudes as folded")


def test_filters_go_whole(trained, references):
    masks = kept(trained, references, KeepFilters("magnitude", density=0.5))
    for mask in masks.values():
        if mask.ndim == 4:
            rows = mask.flatten(1)
            assert (rows.all(1) | ~rows.any(1)).all() and rows.all(1).sum() == len(rows) // 2
        else:
            assert int(mask.sum()) == round(0.5 * mask.numel())


def test_filters_with_the_highest_sums_stay():
    scores = {"conv": torch.tensor([[3.0, -4.0], [1.0, 1.0], [0.0, 1.5]])[:, :, None, None]}
    masks = KeepFilters(density=1 / 3).masks(scores, everything(scores), 0)
    assert masks["conv"].flatten(1).tolist() == [[False, False], [True, True], [False, False]]


def test_the_random_control_removes_as_much_as_the_signs_of_a_coin(trained, references):
    masks = kept(trained, references, RECIPES["random-paper"].remove)
    for mask in masks.values():
        spread = (0.25 / mask.numel()) ** 0.5
        assert abs(float(mask.float().mean()) - 0.5) < 4 * spread


def test_the_reversed_control_removes_what_the_rule_keeps(trained, references):
    plain, other = (
        kept(trained, references, RECIPES[f"{name}-paper"].remove) for name in ("lrp", "reversed")
    )
    scores = weight_relevance(fold_batchnorm(trained), *references)
    for name, score in scores.items():
        assert torch.equal(other[name], score < 0)
        assert not (plain[name] & other[name]).any()


@dataclass(frozen=True)
class EveryNth(Removal):
    """Keeps every n-th weight of the ranking of each layer: a rule of one's own."""

    every: int = 2

    def masks(self, scores, before, round_):
        ranks = {name: score.flatten().argsort().argsort() for name, score in scores.items()}
        return {n: (r % self.every == 0).view_as(scores[n]) for n, r in ranks.items()}


def test_a_rule_of_ones_own_is_carried_to_the_file(trained, references, tmp_path):
    recipe = Recipe(EveryNth("magnitude", every=3))
    size = compress(trained, *references, recipe).save(tmp_path / "mine")
    decoded = Compressed.load(tmp_path / "mine").state_dict()
    masks = remove(trained, *references, recipe).masks
    assert size < compress(trained, *references, Recipe()).nbytes
    for name, mask in masks.items():
        assert int(mask.sum()) == -(-mask.numel() // 3)
        assert not decoded[name][~mask].any()


def test_no_rule_brings_back_what_a_round_before_removed(trained, references):
    class Forgetful(Removal):
        def masks(self, scores, before, round_):
            return {n: torch.arange(s.numel()).view_as(s) % 2 == round_ for n, s in scores.items()}

    masks = kept(trained, references, Forgetful("magnitude", rounds=2))
    assert masking.density(masks) == 0
    assert masking.density(kept(trained, references, Forgetful("magnitude"))) > 0.49


def test_a_criterion_of_ones_own_by_object_and_by_name(trained, references):
    def last(model, images, labels):
        names = CRITERIA["magnitude"](model, images, labels)
        return {n: torch.arange(s.numel()).view_as(s) - s.numel() / 2 for n, s in names.items()}

    mine = Criterion("mine", last)
    CRITERIA["mine"] = mine
    try:
        files = [
            compress(trained, *references, Recipe(NonPositive(by))).to_bytes()
            for by in (mine, "mine")
        ]
        back = kept(trained, references, NonPositive("reversed:mine"))
    finally:
        del CRITERIA["mine"]
    masks = kept(trained, references, NonPositive(mine))
    for name, mask in masks.items():
        flat = mask.flatten()
        assert int(flat.sum()) == (len(flat) - 1) // 2 and flat[-(len(flat) // 2 - 1) :].all()
        assert not (back[name] & mask).any()
    assert files[0] == files[1]
    with pytest.raises(ValueError, match="unknown criterion 'mine'"):
        NonPositive("mine")


@pytest.mark.parametrize("rule", [NonPositive, KeepTop, KeepFilters])
def test_the_second_argument_is_the_share(rule):
    given = rule("random", 0.25)
    assert (given.fraction if rule is NonPositive else given.density) == 0.25
    assert given.rounds == 1 and not given.layerwise
