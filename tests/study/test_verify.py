import json
import subprocess

import pandas as pd
import pytest
import torch
from safetensors.torch import save_file

from lib import RECIPES
from study import Study, claims, data, jobs, publish, sweep, verify
from study.bases import SCHEDULES, Schedule, base
from study.paths import ROOT
from study.profiles import PROFILES, Case
from study.records import read_claims, write_json
from study.tables import smallest_files


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Results of one small network, as a notebook would have written them."""
    monkeypatch.setenv("RESULTS_ROOT", str(tmp_path / "results"))
    monkeypatch.setattr(data, "CACHE", tmp_path / "cache")
    monkeypatch.setitem(SCHEDULES, ("digits", "lenet300"), Schedule(1, 0.05, 64))
    monkeypatch.setattr(jobs, "Parallel", lambda **_: lambda asked: (f(*a) for f, a, _ in asked))
    study = Study("quick")
    # as in the paper profile, whose networks and records are committed beside its tables
    study.checkpoints, study.runs = study.results / "checkpoints", study.results / "runs"
    study.kept_beside_tables = True
    study.cases = [Case("digits", "lenet300", 0)]
    recipes = {"even": RECIPES["uniform"]}
    table = study.sweep(recipes, {"uniform": (3, 5)})
    study.save_table("curve", table)
    study.save_models(smallest_files([table], max_drop=100), recipes)
    study.save_table("bases", pd.DataFrame([
        {"dataset": "digits", "model": "lenet300", "seed": 0,
         "val": table["base_val_accuracy"].iloc[0], "test": table["base_test_accuracy"].iloc[0]}
    ]))  # fmt: skip
    return study


def verdicts(capsys):
    return [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:-1]]


def test_what_was_written_is_verified(study, capsys):
    assert verify.verify(study) == 0
    assert verdicts(capsys) == ["pass"] * 3


def test_files_that_would_swell_the_repository_are_not_kept(study, monkeypatch):
    recipes = {"even": RECIPES["uniform"]}
    best = smallest_files([study.sweep(recipes, {"uniform": (3, 5)})], max_drop=100)
    models = study.results / "models"
    assert len(list(models.iterdir())) == 2
    monkeypatch.setattr(sweep, "LARGEST_KEPT", best["file_bytes"].max() - 1)
    study.save_models(best, recipes)
    assert not list(models.iterdir())


def spoil_table(study):
    path = study.results / "curve.csv"
    table = pd.read_csv(path)
    table.loc[1, "test_accuracy"] += 0.1
    table.to_csv(path, index=False)


def empty_cell(study):
    path = study.results / "curve.csv"
    table = pd.read_csv(path)
    table.loc[1, "test_accuracy"] = None
    table.to_csv(path, index=False)


def spoil_record(study):
    (path,) = (study.results / "models").glob("*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"test_accuracy": 5.0}))


def spoil_model(study):
    (path,) = (study.results / "models").glob("*.xaic")
    path.write_bytes(path.read_bytes()[:-1])


def spoil_size(study):
    (path,) = (study.results / "models").glob("*.json")
    row = json.loads(path.read_text())
    path.write_text(json.dumps(row | {"file_bytes": row["file_bytes"] - 1}))


def spoil_base(study):
    (path,) = study.checkpoints.glob("*.safetensors")
    state = base("digits", "lenet300", 0, study.checkpoints).state_dict()
    save_file({key: torch.zeros_like(value) for key, value in state.items()}, path)


def remove_base(study):
    (path,) = study.checkpoints.glob("*.safetensors")
    path.unlink()


def remove_runs(study):
    for path in study.runs.rglob("*.json"):
        path.unlink()


def change_base_in_table(study):
    path = study.results / "bases.csv"
    pd.read_csv(path).assign(test=50.0).to_csv(path, index=False)


@pytest.mark.parametrize(
    "spoil, positions",
    [
        (spoil_record, [0]),
        (spoil_model, [0]),
        (spoil_size, [0]),
        (spoil_base, [1]),
        (remove_base, [1]),
        (spoil_table, [2]),
        (empty_cell, [2]),
        (remove_runs, [2]),
        (change_base_in_table, [1, 2]),
    ],
)
def test_a_number_that_is_not_measured_is_found(study, capsys, spoil, positions):
    spoil(study)
    assert verify.verify(study) == 1
    found = [verdict for verdict in verdicts(capsys) if verdict in ("pass", "FAIL")]
    assert [place for place, verdict in enumerate(found) if verdict == "FAIL"] == positions


def test_missing_data_are_told_and_the_rest_is_verified(study, capsys, monkeypatch):
    def missing(*_):
        raise verify.DataNotFoundError("not there")

    monkeypatch.setattr(verify, "split", missing)
    assert verify.verify(study) == 0
    assert "1 pass, 0 FAIL, 2 no data" in capsys.readouterr().out


def test_nothing_to_verify_is_a_failure(study, monkeypatch, tmp_path):
    monkeypatch.setattr(study, "results", tmp_path / "empty")
    assert verify.verify(study) == 1


def test_claims_are_recomputed_and_their_texts_compared(study, capsys):
    made = claims.base_networks(study.load_table("bases"))
    study.save_claims("01-train", made)
    publish.write_claims(study.results)
    capsys.readouterr()
    assert verify.verify(study) == 0
    assert verdicts(capsys) == ["pass"] * 5
    path = study.results / "claims-01-train.json"
    (row,) = json.loads(path.read_text())
    write_json(path, [row | {"ours": "99.99"}])
    assert verify.verify(study) == 1
    out = capsys.readouterr().out
    assert f"B1 digits-lenet300: {row['ours']}, not 99.99" in out and "2 FAIL" in out


def test_readmes_tables_have_to_follow_from_the_claims(study, capsys):
    study.save_claims("01-train", claims.base_networks(study.load_table("bases")))
    publish.write_claims(study.results)
    readme = study.results.parents[1] / "README.md"
    text = publish.filled("<!-- verdicts: quick -->\n<!-- end -->", readme.parent)
    for content, code, verdict in ((text, 0, "pass"), (text.replace("|", "| 1", 1), 1, "FAIL")):
        readme.write_text(content)
        capsys.readouterr()
        assert verify.verify(study) == code
        said = capsys.readouterr().out.splitlines()
        assert said[0] == f"the files of {study.results} are verified"  # rather than git HEAD
        (line,) = [line for line in said if "tables of README.md from results/" in line]
        assert line.split()[0] == verdict


def test_claims_of_the_sequential_pipeline_are_recomputed_and_peers_are_no_runs(study, capsys):
    table = study.load_table("curve")
    both = pd.concat(table.assign(recipe=name) for name in ("lrp root", "lrp root, sequential"))
    study.save_table("sequential", both)
    files = table.drop(columns=["per_class", "density", "bits"]).assign(file_bytes=10**9)
    study.save_table("nncodec", files)
    study.save_claims("06-beyond", claims.beyond(both, study.load_table))
    capsys.readouterr()
    assert verify.verify(study) == 0
    out = capsys.readouterr().out
    assert "rows of sequential.csv from runs" in out and "nncodec" not in out
    rows = json.loads((study.results / "claims-06-beyond.json").read_text())
    assert {row["id"] for row in rows} == {"L1", "C7"}  # no control of C5 was run
    (study.results / "nncodec.csv").unlink()
    study.save_table("sequential", both.assign(file_bytes=both["file_bytes"] + 1))
    assert verify.verify(study) == 1


def test_tables_of_several_versions_of_the_code_are_named(study, capsys):
    path = min(study.runs.rglob("*.json"))
    record = json.loads(path.read_text())
    record["provenance"]["code"] = "another"
    write_json(path, record)
    assert verify.verify(study) == 0
    assert "curve.csv: its rows come from 2 versions of the code" in capsys.readouterr().out


def test_what_is_committed_is_verified_rather_than_the_working_tree(study, capsys, monkeypatch):
    root = study.results.parents[1]

    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=b", *words], cwd=root,
                       check=True, capture_output=True)  # fmt: skip

    (root / "README.md").write_text("")
    for words in (["init"], ["add", "README.md", "results"], ["commit", "-m", "x"]):
        git(*words)
    monkeypatch.delenv("RESULTS_ROOT")
    monkeypatch.setattr("study.records.ROOT", root)
    spoil_record(study)
    assert verify.verify(study) == 0
    out = capsys.readouterr().out
    assert "(git HEAD) is verified; 1 files of results/quick differ from it now" in out
    git("commit", "-a", "-m", "y")
    assert verify.verify(study) == 1


@pytest.mark.parametrize("profile", ["quick", "paper"])
def test_committed_claims_follow_from_committed_tables(profile):
    results = ROOT / "results" / profile
    rows = read_claims(results)
    again = claims.from_tables(
        lambda name: pd.read_csv(results / f"{name}.csv"), PROFILES[profile].finetune, rows
    )
    assert len(again) > 50 and all(row in rows for row in again)
    told = {row["notebook"] for row in again}
    alone = {"R1", "R2"}  # rest on what no table holds
    assert [r for r in rows if r["notebook"] in told and r["id"] not in alone] == again


def test_rows_of_committed_tables_follow_from_committed_runs():
    """Of the paper profile: records of the quick one are not committed."""
    checks = {what: check() for what, _, check in verify._tables(ROOT / "results/paper")}
    assert {"rows of headline.csv from runs", "rows of sequential.csv from runs"} <= checks.keys()
    assert not [what for what, (good, _) in checks.items() if not good]
