import json
import re
from types import SimpleNamespace

import pandas as pd
import pytest

from lib import RECIPES
from study import Case, Study, __main__, publish
from study.names import readable
from study.paths import ROOT
from study.records import read_claims, write_json

TEXT, APPENDIX = publish.README.read_text(), publish.ARTIFACT.read_text()
CHECKLIST = (ROOT / "REPRODUCIBILITY.md").read_text()


def test_the_tables_are_what_the_results_say():
    assert publish.filled(TEXT) == TEXT
    assert publish.filled(APPENDIX) == APPENDIX and "| C1: " in APPENDIX
    kinds = re.findall(r"<!-- (\w+): \w+ -->", TEXT + APPENDIX)
    assert set(kinds) >= set(publish.TABLES) and "| C1 " in TEXT


def test_files_and_recipes_that_are_named_exist():
    everything = TEXT + APPENDIX + CHECKLIST
    paths = re.findall(r"`((?:lib|notebooks|tests|results|figures)/[\w/.-]*)`", everything)
    paths += re.findall(r"\]\(((?!http)[\w/.-]+)\)", everything)
    assert len(paths) > 8 and all((ROOT / path).exists() for path in paths)
    assert all((ROOT / path).exists() for path in re.findall(r"\]\((figures/.*?)\)", TEXT))
    assert set(re.findall(r"`(lrp-[\w-]+-(?:rd|sequential))`", TEXT)) <= set(RECIPES)


def test_targets_that_are_named_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`make ([a-z]+)(?![a-z-])", TEXT + APPENDIX)):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


@pytest.mark.parametrize("profile", ["quick", "paper"])
def test_claims_files_are_what_the_claims_say(profile):
    results = ROOT / "results" / profile
    assert (results / "CLAIMS.md").read_text() == publish.claims_text(results)


def cells(line):
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_a_method_that_was_not_run_on_a_network_leaves_its_cell_open(tmp_path):
    row = {"seed": 0, "file_bytes": 1000, "ratio": 4.0, "test_accuracy": 90.0,
           "base_test_accuracy": 91.0, "reached": True}  # fmt: skip
    cases = [("a", "x", "lrp root"), ("a", "x", "random"), ("b", "y", "lrp root")]
    names = ("dataset", "model", "recipe")
    table = pd.DataFrame([dict(zip(names, case, strict=True)) | row for case in cases])
    table.loc[1, "reached"] = False
    table.to_csv(tmp_path / "headline-smallest.csv")
    bases = [("a", "x", 32, 4000), ("b", "y", 8, 1500)]
    columns = ["dataset", "model", "stored bits", "stored bytes"]
    pd.DataFrame(bases, columns=columns).to_csv(tmp_path / "bases.csv")
    lines = publish.files_table(tmp_path).splitlines()
    assert cells(lines[0]) == ["", "a-x, 1 seed", "b-y, 1 seed"]
    float32, in8 = "4 kB as float32, 91.00 %", "4 kB as float32 (kept in 8 bits: 2 kB), 91.00 %"
    assert cells(lines[2]) == ["base network", float32, in8]
    assert cells(lines[4]) == ["random", "1.0 kB (4.0x), 90.00 % †", "–"]
    name = "lrp root, sequential"
    more = [(name, 1.0), (name, 0.5), ("lrp root", 1.0), ("not in README", 1.0)]
    recipes, drops = zip(*more, strict=True)
    new = table.iloc[[0] * 4].assign(recipe=recipes, max_drop=drops, file_bytes=[500, 700, 900, 9])
    new["ratio"] = 4000 / new["file_bytes"]
    new.to_csv(tmp_path / "sequential-smallest.csv")
    again = publish.files_table(tmp_path).splitlines()
    assert cells(again[3]) == [readable(name), "0.5 kB (8.0x), 90.00 %", "–"]
    assert [*again[:3], *again[4:]] == lines  # recipes in both tables stand there once


def test_claims_that_are_open_or_fail_are_marked():
    def claim(verdict, where, claim="s|t"):
        return {"id": "B1", "claim": claim, "where": where, "expected": "1", "ours": "0.5",
                "verdict": verdict, "notebook": "01-train"}  # fmt: skip

    rows = [claim("holds", "a-x"), claim("open", "b-y"), claim("fails", "c-z")]
    head, _, line = publish.claims_table(rows).splitlines()
    assert cells(head) == ["", "claim", "expected", "a-x", "b-y", "c-z", "notebook"]
    assert cells(line) == ["B1", r"s\|t", "1", "0.5", "*0.5*", "**0.5**", "`01`"]
    with pytest.raises(ValueError, match="two results of"):
        publish.claims_table([*rows, claim("holds", "a-x")])
    coded = [claim("holds", "a-x", "no larger than fisher") | {"ours": "against tiers by random"}]
    told = publish.claims_table(coded).splitlines()[2]
    assert cells(told)[1:4:2] == [
        "no larger than squared gradients (Fisher)",
        "against tiers: random",
    ]


def test_networks_of_one_seed_or_of_few_bits_are_called_so(tmp_path):
    rows = [("a", "x", 0, 32, 4000), ("a", "x", 1, 32, 4000), ("b", "y", 0, 8, 1000)]
    columns = ["dataset", "model", "seed", "stored bits", "stored bytes"]
    assert publish.heads(tmp_path) == {}
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "bases.csv", index=False)
    heads = publish.heads(tmp_path)
    assert heads == {"a-x": "a-x", "b-y": "b-y, 1 seed (kept in 8 bits: 1 kB)"}
    rows = [{"id": "B1", "claim": "s", "where": where, "expected": "1", "ours": "2",
             "verdict": "holds", "notebook": "01-train"} for where in heads]  # fmt: skip
    head, *_ = publish.claims_table(rows, heads).splitlines()
    assert cells(head)[3:5] == list(heads.values())


def test_one_seed_that_misses_the_accuracy_or_did_not_run_is_marked(tmp_path):
    row = {"dataset": "a", "model": "x", "recipe": "random", "file_bytes": 1000, "ratio": 4.0,
           "test_accuracy": 90.0, "base_test_accuracy": 91.0}  # fmt: skip
    seeds = [row | {"seed": seed, "reached": seed != 1} for seed in range(3)]
    pd.DataFrame(seeds).to_csv(tmp_path / "headline-smallest.csv")
    more = pd.DataFrame(seeds[:2]).assign(recipe="lrp root", reached=True)
    pd.concat([pd.DataFrame(seeds), more]).to_csv(tmp_path / "headline-smallest.csv")
    few, whole = (cells(line)[1] for line in publish.files_table(tmp_path).splitlines()[-2:])
    assert whole.endswith(" †") and few.endswith(" (seeds 0, 1)")


def test_a_file_that_loses_more_on_test_images_than_on_those_it_was_chosen_by_is_marked():
    rows = pd.DataFrame({"file_bytes": [1000], "ratio": 4.0, "test_accuracy": 90.0, "seed": 0,
                         "base_test_accuracy": [91.0], "reached": True})  # fmt: skip
    assert publish._file(rows, 1) == "1.0 kB (4.0x), 90.00 %"
    rows["base_test_accuracy"] = 91.1
    assert publish._file(rows, 1) == "1.0 kB (4.0x), 90.00 % ‡"
    rows["reached"] = False
    assert publish._file(rows, 1) == "1.0 kB (4.0x), 90.00 % †"


def test_what_reproduce_prints_at_its_end_fits_twelve_lines():
    study = Study("quick")
    claims = read_claims(ROOT / "results" / "quick")
    held = sum(claim["verdict"] == "holds" for claim in claims)
    other = [c | {"verdict": "open" if c["verdict"] == "fails" else "fails"} for c in claims]
    for committed, differ in (([], None), (claims, 0), (other, len(claims))):
        lines = publish.closing(study, claims, committed).splitlines()
        assert len(lines) <= 12
        assert lines[0] == f"profile 'quick': {held} of {len(claims)} claims hold"
        said = [line for line in lines if "differ from" in line]
        assert [int(line.split()[0]) for line in said] == [differ] * (differ is not None)
        counts = [int(n) for line in lines[1:4] for n in re.findall(r" (\d+) of \d+", line)]
        assert sum(counts) == len(claims)
    for place in ("CLAIMS.md", "figures", "tables", "notebooks"):
        assert sum(place in line for line in lines) >= 1
    assert "VGG-16 on CIFAR-10 (JPEG)" in lines[-1] and "C7: " in lines[-1]


def test_after_a_run_all_verdicts_that_changed_are_listed(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RESULTS_ROOT", str(tmp_path))
    monkeypatch.setattr("study.data.CACHE", tmp_path / "cache")

    def rows(*verdicts):
        row = {"id": "B1", "where": "a-x", "expected": "1", "seeds": [0], "notebook": "01-train"}
        return [row | {"claim": f"s{i}", "ours": f"0.{i}", "verdict": v, "holds": v == "holds"}
                for i, v in enumerate(verdicts)]  # fmt: skip

    def git(*words):
        assert words == ("show", "HEAD:results/quick/claims-01-train.json")
        return json.dumps(rows(*["holds"] * 9)).encode()

    monkeypatch.setattr("study.records.git", git)
    now = rows(*["fails"] * 7, "holds", "open", "fails")
    write_json(tmp_path / "quick" / "claims-01-train.json", now)
    assert __main__.main(["claims"]) == 0
    said = capsys.readouterr().out.splitlines()
    listed = [f"B1 a-x, s{i}: holds (0.{i}) -> fails (0.{i})" for i in range(7)]
    assert said[:8] == [*listed, "B1 a-x, s8: holds (0.8) -> open (0.8)"]
    (counted,) = [line for line in said if "differ from" in line]
    assert counted == (
        "8 verdicts differ from the committed ones (git HEAD), listed above; 1 claims are new"
    )


def test_networks_left_out_for_some_seeds_only_are_named_with_these():
    def takes(part, case):
        return case.model == "y" and case.seed == 1

    cases = [Case("digits", model, seed) for model in ("x", "y") for seed in (0, 1, 2)]
    study = SimpleNamespace(cases=cases, profile=SimpleNamespace(takes=takes))
    one, other = publish._idle(study, "training")
    assert "seeds" not in one and other.endswith(" (seeds 0, 2)")
