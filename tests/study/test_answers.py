"""What notebooks say in words and show in tables that no text compares: answers, and lessons."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from study import answers, lessons, names, sentences
from study.paths import ROOT
from study.records import read_claims, write_json
from study.verdicts import Claim

SMALL, LARGE = "digits-lenet5-s0", "digits-resnet8-s0"


def row(identifier, where, verdict, claim="s", ours="1.00", expected="96.0"):
    return {"id": identifier, "where": where, "verdict": verdict, "claim": claim, "ours": ours,
            "expected": expected, "seeds": [0], "holds": verdict == "holds"}  # fmt: skip


def on_both(identifier, sentence, what, found):
    """Claims about two networks, by reading what is told of each."""
    return [
        row(identifier, where, "fails", sentence.format(reading)) | {what: value}
        for reading, values in found.items()
        for where, value in zip((SMALL, LARGE), values, strict=True)
    ]


def test_answers_count_what_holds_and_neither_what_is_open_nor_what_fails():
    rows = [row("C1", SMALL, "holds"), row("C1", SMALL, "open"), row("C1", LARGE, "fails"),
            row("C2", LARGE, "holds"), row("C3", SMALL, "open")]  # fmt: skip
    than = "relevance needs no larger file than {}"
    rows += [
        row("C1", LARGE, "fails", sentences.SMALLER, "47.1 %"),
        row("C6", LARGE, "holds", than.format("fisher"), "-1.1 ± 2.0 %; within 1 point 3.9 kB"),
        row("C6", LARGE, "holds", f"the root of {than.format('fisher')}", "-7.0 %"),
        row("C6", LARGE, "holds", than.format("root:fisher"), "-8.0 %"),
        row("C6", SMALL, "holds", than.format("alike"), "-34.0 %; within 1 point 9.1 kB"),
        row("C6", LARGE, "holds", than.format("alike"), "-26.1 %; within 1 point 3.9 kB"),
    ]
    assert sentences.ANSWERS["05-xai-baseline"](pd.DataFrame(rows)) == (
        "Our smallest file within one point is smaller than the baseline's by 47.1 % on ResNet-8 "
        "on digits. BD-rate of relevance against squared gradients: -1.1 ± 2.0 % on ResNet-8 on "
        "digits; against units all alike: -34.0 % on LeNet-5 on digits, -26.1 % on ResNet-8 on "
        "digits (negative: smaller files). How many readings hold: 64 % smaller, 1 of 2 on LeNet-5 "
        "on digits, 0 of 2 on ResNet-8 on "
        "digits; 42 % more accurate, 1 of 1 on ResNet-8 on digits; at most one point lost, 0 of 1 "
        "on LeNet-5 on digits."
    )
    trained = [row("B1", SMALL, "holds", ours="97.22"), row("B1", LARGE, "open", ours="95.90")]
    said = sentences.ANSWERS["01-train"](pd.DataFrame(trained))
    assert said.startswith("1 of 2 are for certain")
    assert "LeNet-5 on digits 97.22 % (known for 96.0 %); ResNet-8 on digits 95.90 %" in said
    needed = on_both("A1", "the reading needs {}", "verdict",
                     {"refitting": ("holds", "holds"), "rounds": ("holds", "open"),
                      "a start": ("open", "fails")})  # fmt: skip
    said = sentences.ANSWERS["07-which-ingredient"](pd.DataFrame(needed))
    assert said == (
        "Needed, that is, a point more is lost without it — on LeNet-5 on digits, ResNet-8 on "
        "digits: refitting; on LeNet-5 on digits: rounds. Needed for certain on no network: a "
        "start."
    )


def test_answers_tell_readings_apart():
    lost = on_both("C4", "s ({})", "ours", {
        "literal, no training": ("83.06 points lost", "88.61 points lost"),
        "the half nearest zero": ("-0.28 points lost", "1.11 points lost"),
        "four rounds": ("0.28 points lost", "2.50 points lost"),
    })  # fmt: skip
    said = sentences.ANSWERS["03-pruning"](pd.DataFrame(lost))
    assert "all at once they cost 83.1 to 88.6 points" in said
    assert "the rest refitted, cost -0.3 to 1.1; four such rounds" in said
    assert said.endswith("before each, cost 0.3 to 2.5.")
    tested = on_both("C5", "s ({})", "verdict", {
        "rate-distortion by relevance": ("holds", "fails"),
        "tiers by |relevance|": ("fails", "open"),
    })  # fmt: skip
    said = sentences.ANSWERS["04-mixed-precision"](pd.DataFrame(tested))
    assert "on 1 of 2 networks if relevance weighs the rounding" in said
    assert "and on 0 of 2 networks if its magnitude ranks" in said


def test_the_answer_about_drift_is_its_table_s_and_leaves_out_curves_apart(tmp_path):
    ways = {"all layers at once": (0.3, 0.2), "layer after layer": (0.3, 0.05)}
    rows = [("digits", "lenet5", 0, way, knob, error)
            for way, errors in ways.items() for knob, error in enumerate(errors, 1)]  # fmt: skip
    errors = pd.DataFrame(rows, columns=["dataset", "model", "seed", "recipe", "knob", "error"])
    errors.to_csv(tmp_path / "drift.csv", index=False)
    files = [("lrp root", 1000, 0.1), ("lrp root", 500, 2.0), ("lrp root, sequential", 500, 0.1),
             ("lrp root, sequential", 250, 2.0), ("alike, sequential", 500, 9.0)]  # fmt: skip
    table = pd.DataFrame(files, columns=["recipe", "file_bytes", "test_accuracy"])
    table["test_accuracy"] = 99 - table["test_accuracy"]
    table = table.assign(dataset="digits", model="lenet5", seed=0, base_test_accuracy=99.0)
    table.to_csv(tmp_path / "sequential.csv", index=False)
    said = sentences.FROM_TABLES["06-beyond"](tmp_path)
    assert said.startswith(
        "Yes, in part: at the output of LeNet-5 on digits the relative error falls from 0.200 to "
        "0.050."
    )
    assert said.endswith("Layer after layer against all at once: LeNet-5 on digits -50.0 %.")


@pytest.mark.parametrize("lost, said", [("0.28", "loses 0.28 points"), ("-0.28", "loses no test")])
def test_the_answer_is_that_of_the_last_run_and_else_the_committed_one(lost, said, tmp_path):
    study = SimpleNamespace(results=tmp_path, name="quick")
    committed = answers.answer(study, "00-quickstart").text
    assert "times smaller than the float32" in committed
    found = {"Q1": "123.4", "Q2": lost, "Q3": "equal"}
    rows = [row(name, SMALL, "holds", ours=ours) for name, ours in found.items()]
    write_json(tmp_path / "claims-00-quickstart.json", rows)
    text = answers.answer(study, "00-quickstart").text
    assert text != committed and "123.4 times smaller" in text and said in text
    nothing = SimpleNamespace(results=tmp_path / "none", name="none")
    assert answers.answer(nothing, "00-quickstart").text.startswith("Not known yet")


def claim(identifier, where, ours, seeds=(0, 1, 2)):
    return Claim(identifier, "sentence", where, "expected", ours, "holds", seeds)


def test_a_table_of_claims_names_every_control_and_keeps_what_a_number_rests_on():
    files = (
        "9.1 ± 0.2 kB within 1 point; against units by alike -34.0 ± 1.0 % (19.3 ± 0.1 kB); "
        "tiers by reversed:lrp-epsilon/contrastive/abs the other never within 2 points (never); "
        "uniform bits -3.0 %, too few losses in common (1 of 3 seeds) (150.5 kB)"
    )
    unmet = "42.0 % (accuracy not reached)"
    (said, other) = answers.by_network(
        [claim("C5", "digits-lenet5", files), claim("C1", "digits-lenet5", unmet)]
    )["LeNet-5 on digits"]
    assert said == (
        "holds: 9.1 ± 0.2 kB within 1 point; against units: all alike (-34.0 ± 1.0 %); tiers: "
        "|contrastive relevance|, in reverse (the other never within 2 points); same bits for all "
        "(-3.0 %, too few losses in common (1 of 3 seeds))"
    )
    assert other == f"holds: {unmet}"


def test_all_committed_measurements_can_be_told():
    for profile in ("quick", "paper"):
        rows = read_claims(ROOT / "results" / profile)
        for each in [row["ours"] for row in rows if row["id"] == "C5"]:
            assert answers.measured(each).count("(") >= each.count("; ")


def test_a_network_of_one_seed_is_named_wherever_verdicts_are_told():
    table = answers.by_network(
        [claim("C1", "digits-lenet5", "1 %", (0,)), claim("C1", "digits-resnet8", "1 %"),
         claim("Q1", "digits-mobilenet", "20", (0,))]
    )  # fmt: skip
    assert [*table][3:] == [
        "LeNet-5 on digits, one seed", "ResNet-8 on digits", "MobileNetV3-small on digits"
    ]  # fmt: skip
    rows = [row("C1", SMALL, "holds"), row("C1", LARGE, "holds") | {"seeds": [0, 1, 2]}]
    assert answers.one_seed(rows).startswith(" One seed, hence no interval: LeNet-5 on digits.")
    assert not answers.one_seed(rows[1:]) and not answers.one_seed([row("Q1", SMALL, "holds")])
    some = [*rows, row("C2", LARGE, "holds")]  # the same network, of which one claim has one seed
    assert f"LeNet-5 on digits, {names.place(LARGE)} (1 of 2 readings)." in answers.one_seed(some)


def test_of_each_setting_the_best_and_the_worst_value():
    runs = [("rule", "epsilon", 90.0), ("rule", "epsilon", 92.0), ("rule", "gamma", 96.0),
            ("rule", "zplus", 80.0)]  # fmt: skip
    turned = pd.DataFrame(runs, columns=["recipe", "value", "test_accuracy"])
    table = lessons.by_value(turned.assign(base_test_accuracy=97.0))
    assert table.loc["rule"].to_dict() == {
        "best": "gamma", "least lost": 1.0, "worst": "zplus", "most lost": 17.0
    }  # fmt: skip


def test_a_setting_is_turned_in_runs_that_differ_in_nothing_else():
    turned = lessons.settings(ROOT / "results" / "quick")
    assert set(turned["recipe"]) == set(lessons.TURNED)
    for setting, rows in turned.groupby("recipe"):
        assert rows["value"].nunique() == len(rows) > 1, setting
        assert len(rows[["dataset", "model", "seed"]].drop_duplicates()) == 1, setting


@pytest.mark.parametrize(
    "order, gone", [("nearest zero first", {0.0, -1.0}), ("farthest first", {-4.0, -2.0})]
)
def test_a_share_of_the_nonpositive_weights_goes_in_its_order(order, gone):
    scores = {"a": torch.tensor([[-4.0, -1.0, 2.0]]), "b": torch.tensor([-2.0, 0.0, 5.0])}
    masks = lessons._without(scores, order, 0.5)
    assert {float(v) for name in scores for v in scores[name][~masks[name]]} == gone
    assert all(mask.all() for mask in lessons._without(scores, order, 0).values())
    every = lessons._without(scores, "at random", 1)
    assert all(torch.equal(every[name], scores[name] > 0) for name in scores)


def test_of_what_is_removed_and_of_what_is_kept_so_many_are_negative():
    layer = torch.nn.Linear(5, 1, bias=False)
    layer.weight.data = torch.tensor([[-1.0, -2.0, 3.0, 4.0, -5.0]])
    scores = {"weight": torch.tensor([[-1.0, 0.0, -1.0, 2.0, 3.0]])}
    assert lessons.negative_shares(layer, scores) == pytest.approx((200 / 3, 50))
    assert "67 %</b> are negative" in answers.negative(200 / 3, 50).text


def test_recipes_are_compared_in_the_room_that_ours_takes():
    files = [("ours", 900, 96.9, 96.0), ("ours", 500, 96.5, 95.0), ("ours", 400, 90.0, 91.0),
             ("alike", 500, 80.0, 81.0), ("alike", 450, 85.0, 84.0), ("alike", 501, 97.0, 97.0),
             ("far", 600, 70.0, 60.0), ("far", 700, 90.0, 90.0)]  # fmt: skip
    columns = ["recipe", "file_bytes", "val_accuracy", "test_accuracy"]
    table = pd.DataFrame(files, columns=columns).assign(
        dataset="digits", model="lenet5", seed=0, base_val_accuracy=97.0, base_test_accuracy=97.5
    )
    found = lessons.same_bytes(table, "ours", ["alike", "far"])
    assert found["file_bytes"].tolist() == [500, 450, 600] and set(found["room"]) == {500}
    assert "LeNet-5 on digits, at most 0.5 kB: ours 2.5; all alike 13.5; far 37.5 in a larger" in (
        answers.in_the_same_room(found).text
    )
