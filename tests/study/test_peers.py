"""Other coders: their way from a network to a row, and what is said of the rows."""

import copy
import json
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from spread import assert_above, assert_below
from torch import nn

from bench.peers import deep_compression, gptq, grid, run
from lib.finetune import evaluate
from lib.fold import fold_batchnorm
from lib.moments import input_moments
from study import claims, peers
from study.data import split
from study.networks import build

FAKE = """
import json, sys
from pathlib import Path
import numpy as np
from safetensors.numpy import load_file, save_file

name, folder = sys.argv[1], Path(sys.argv[2])
state = load_file(folder / "state.safetensors")
print(json.dumps({"version": f"{name} 1.0"}), flush=True)
for line in sys.stdin:
    step = json.loads(line)["step"]
    with open(folder / "coded", "wb") as file:
        codes = {k: np.rint(v / step).astype("int32") for k, v in state.items()}
        np.savez_compressed(file, **codes)
    codes = dict(np.load(folder / "coded"))
    decoded = {k: (step * v).astype("float32") for k, v in codes.items()}
    save_file(decoded, folder / "decoded.safetensors")
    print("{}", flush=True)
"""


@pytest.fixture
def fake(tmp_path):
    """Command of a coder in a process of its own that rounds to a grid and writes ``.npz``."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    return [sys.executable, str(script)]


@pytest.fixture
def network():
    """With BatchNorms that have seen something."""
    network = build("resnet8", channels=1)
    with torch.no_grad():
        network.train()(torch.randn(32, 1, 28, 28, generator=torch.Generator().manual_seed(0)))
    return network.eval()


def test_what_a_coder_gives_back_is_what_is_evaluated(fake, network):
    empty = build("resnet8", channels=1, seed=1).eval()
    with run.installed("fake", network, fake) as (coder, version):
        data, state = coder({"step": 0.25})
        finer, near = coder({"step": 1e-4})
    assert version == "fake 1.0"
    assert len(data) < len(finer) and data[:2] == b"PK"
    run.filled(empty, state)
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(empty.state_dict()[name], (value / 0.25).round() * 0.25)
    images = torch.randn(4, 1, 28, 28)
    torch.testing.assert_close(run.filled(empty, near)(images), network(images), atol=0.05, rtol=0)


def test_a_coder_that_ends_or_forgets_tensors_is_named(fake, network):
    with pytest.raises(RuntimeError, match="fake ended with 1"):  # noqa: SIM117
        with run.installed("fake", network, fake) as (coder, _):
            coder({"no step": 1})
    state = {k: v for k, v in network.state_dict().items() if "running_var" not in k}
    with pytest.raises(ValueError, match="lacks .*running_var"):
        run.filled(network, state)


def test_files_are_chosen_on_validation_and_tested_once(study, fake, monkeypatch):
    steps = (0.002, 0.02, 0.1, 0.3, 1.0)
    monkeypatch.setitem(grid.GRIDS, "fake", lambda model: [[{"step": s}] for s in steps])
    case, (path,) = study.cases[0], [study.results / "peers" / "fake.csv"]
    network = study.base(case)
    base = {f"base_{part}_accuracy": study.base_accuracy(case, part) for part in ("val", "test")}
    base["float_bytes"] = 1000
    seen = []

    def counted(model, images, labels):
        seen.append("test" if images is split(case.dataset, "test")[0] else "val")
        return evaluate(model, images, labels)

    monkeypatch.setattr(run, "evaluate", counted)

    def measured():
        opened = run.installed("fake", network, fake)
        run.measure(case, "fake", opened, copy.deepcopy(network), base, run.Log(path))

    measured()
    table = pd.read_csv(path)
    assert [json.loads(each)["step"] for each in table["settings"]] == [*steps]
    assert table["ratio"].tolist() == pytest.approx((1000 / table["file_bytes"]).tolist(), rel=1e-5)
    kept = run.unbeaten(table)
    lost = base["base_val_accuracy"] - table["val_accuracy"]
    assert_below(lost.iloc[0], run.LOST, "points that the finest step loses")
    assert_above(lost.iloc[-1], run.LOST, "points that the coarsest step loses")
    assert 0 < kept.sum() < len(steps) and (table["test_accuracy"].notna() == kept).all()
    assert seen == ["val"] * len(steps) + ["test"] * kept.sum()
    measured()
    assert len(seen) == len(steps) + kept.sum(), "nothing is done again"
    table.iloc[:2].assign(test_accuracy=np.nan).to_csv(path, index=False)
    measured()
    again = pd.read_csv(path)
    told = ["settings", "file_bytes", "val_accuracy", "test_accuracy", "version", "commit"]
    pd.testing.assert_frame_equal(again[told], table[told])
    run.tables(study.results)
    found = pd.read_csv(study.results / "peers.csv")
    assert sorted(found["knob"]) == sorted(table.loc[kept, "file_bytes"])
    assert not (study.results / "nncodec.csv").exists()


def test_a_coder_with_files_that_are_not_tested_yet_is_left_out(tmp_path, capsys):
    def rows(coder, tested):
        common = {"dataset": "a", "model": "x", "seed": 0, "recipe": coder, "settings": "{}",
                  "ratio": 2.0, "base_val_accuracy": 90.0, "base_test_accuracy": 90.0}  # fmt: skip
        return [common | {"file_bytes": size, "val_accuracy": 88 + size / 100,
                          "test_accuracy": 88.0 if size < 200 or tested else None}
                for size in (100.0, 200.0)]  # fmt: skip

    (tmp_path / "peers").mkdir()
    log = pd.DataFrame(rows("whole", True) + rows("half", False))
    log.to_csv(tmp_path / "peers" / "a-x-s0.csv", index=False)
    run.tables(tmp_path)
    found = pd.read_csv(tmp_path / "peers.csv")
    assert set(found["recipe"]) == {"whole"} and found["file_bytes"].tolist() == [100, 200]
    assert found["file_bytes"].dtype == int
    assert "half of a-x-s0" in capsys.readouterr().out


def test_a_ladder_ends_where_too_much_is_lost(tmp_path):
    log, ladder = run.Log(tmp_path / "log.csv"), [{"qp": qp} for qp in (1, 2, 3)]
    assert log.missing("coder", ladder) == ladder
    assert run.named({"qp": 1, "bnf": True}) == run.named({"bnf": True, "qp": 1})
    row = {"recipe": "coder", "base_val_accuracy": 90.0, "settings": json.dumps(ladder[0])}
    log.add(row | {"val_accuracy": 88.0})
    assert log.missing("coder", ladder) == ladder[1:] and log.missing("other", ladder) == ladder
    log.add(row | {"settings": json.dumps(ladder[1]), "val_accuracy": 84.0})
    assert run.Log(log.path).missing("coder", ladder) == []


def test_only_files_that_no_other_beats_and_that_lose_little_are_tested():
    rows = pd.DataFrame(
        {"file_bytes": [100, 90, 90, 80, 70, 60], "val_accuracy": [97, 98, 97, 96, 96, 90],
         "base_val_accuracy": 98}
    )  # fmt: skip
    assert run.unbeaten(rows).tolist() == [False, True, False, False, True, False]


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5)).eval()


@pytest.mark.parametrize("threshold", [0.0, 1.0, 9.0])
def test_deep_compression_gives_each_kept_weight_its_nearest_centre(threshold):
    network = small()
    with torch.no_grad():  # a gap of more than one symbol
        network[0].weight[3:25] *= 1e-3
    coder = deep_compression.DeepCompression(network, None)
    data = coder.encode({"threshold": threshold, "clusters": 5})
    for name, value in coder.decode(data).items():
        own = network.state_dict()[name]
        if own.ndim < 2:
            assert torch.equal(value, own.half().float())
            continue
        kept = own.abs() > threshold * own.std(correction=0)
        assert (value[~kept] == 0).all()
        centres = value[kept].unique()
        assert len(centres) <= 5
        if kept.any():
            nearest = (own[kept][:, None] - centres).abs().argmin(1)
            assert torch.equal(value[kept], centres[nearest])


def test_k_means_finds_what_no_move_of_a_centre_betters():
    values = np.random.default_rng(0).normal(size=500)
    centres, labels = deep_compression.k_means(values, 6)
    for place, centre in enumerate(centres):
        assert centre == pytest.approx(values[labels == place].mean(), abs=2e-3)


@pytest.mark.parametrize("group", [0, 16])
def test_gptq_of_independent_inputs_rounds_and_of_others_errs_less_than_rounding(group):
    settings = {"bits": 3, "group": group}
    weight = small()[0].weight.detach().double()
    codes, steps, zeros = gptq.gptq(weight, torch.eye(40).double(), settings)
    order = np.arange(40)
    found = gptq.dequantized(codes.numpy(), order, steps.numpy(), zeros.numpy(), group)
    which = np.arange(40) // group if group else np.zeros(40, int)
    step, zero = steps.numpy()[:, which], zeros.numpy()[:, which]
    rounded = step * (np.clip(np.rint(weight.numpy() / step + zero), 0, 7) - zero)
    np.testing.assert_allclose(found, rounded, atol=1e-6)
    mixed = torch.randn(40, 40, generator=torch.Generator().manual_seed(1)).double()
    moment = mixed @ mixed.T / 40
    codes, steps, zeros = gptq.gptq(weight, moment, settings)
    found = gptq.dequantized(codes.numpy(), order, steps.numpy(), zeros.numpy(), group)

    def error(values):
        miss = torch.from_numpy(np.asarray(values)).double() - weight
        return float((miss @ moment * miss).sum())

    assert error(found) < 0.8 * error(rounded)


@pytest.mark.parametrize("group", [0, 8])
def test_gptq_decodes_what_it_coded_and_leaves_the_network(network, group):
    folded = fold_batchnorm(network)
    before = {name: value.clone() for name, value in folded.state_dict().items()}
    images = torch.randn(20, 1, 28, 28, generator=torch.Generator().manual_seed(2))
    coder = gptq.GPTQ(folded, images)
    state = coder.decode(coder.encode({"bits": 8, "group": group}))
    assert all(torch.equal(value, before[name]) for name, value in folded.state_dict().items())
    moments = input_moments(folded, images)
    for name, moment in moments.items():
        miss, own = ((v.flatten(1)) for v in (state[name] - before[name], before[name]))
        assert (miss @ moment * miss).sum() < 1e-3 * (own @ moment * own).sum(), name


def rows(recipe, sizes, lost):
    return pd.DataFrame(
        [{"dataset": "mnist", "model": "lenet5", "seed": seed, "recipe": recipe, "knob": size,
          "file_bytes": size + seed, "val_accuracy": 99 - drop, "base_val_accuracy": 99.0,
          "test_accuracy": 98 - drop, "base_test_accuracy": 98.0}
         for seed in (0, 1) for size, drop in zip(sizes, lost, strict=True)]
    )  # fmt: skip


def test_the_smallest_files_of_all_coders_stand_in_one_table():
    ours = rows("lrp root, sequential", (20000, 10000, 5000), (0.1, 0.6, 3.0))
    theirs = rows("nncodec", (40000, 30000), (0.4, 1.5))
    said = peers.smallest([ours, theirs], ["lrp root, sequential", "nncodec", "gptq"])
    assert said["LeNet-5 on MNIST"].tolist() == [
        "20.0 ± 0.0 / 10.0 ± 0.0",
        "40.0 ± 0.0 / 40.0 ± 0.0",
    ]
    never = peers.smallest([ours, theirs], ["nncodec"], (0.3, 0.5))
    assert never["LeNet-5 on MNIST"].tolist() == ["– / 40.0 ± 0.0"]


def test_sizes_that_are_close_make_one_point_of_a_curve():
    files = pd.concat([rows("nncodec", (40000,), (0.1,)), rows("nncodec", (20000,), (1.0,))])
    both = peers.curves(files.iloc[:0], files)
    assert both.groupby("knob").size().tolist() == [2, 2]


def test_without_peers_a_line_says_so_and_with_them_c7_is_judged(study, capsys):
    study.cases = [type(study.cases[0])("mnist", "lenet5", seed) for seed in (0, 1)]
    assert peers.read(study).empty
    assert capsys.readouterr().out == "other coders were not run: make peers PROFILE=quick\n"
    ours = rows("lrp root, sequential", (20000, 10000, 5000), (0.1, 0.6, 3.0))
    study.save_table("nncodec", rows("nncodec", (80000, 40000, 20000), (0.1, 0.6, 3.0)))
    study.save_table("peers", rows("gptq", (60000,), (0.1,)).assign(seed=7))
    assert set(peers.read(study)["recipe"]) == {"nncodec"}, "of the study's own networks"
    found = [claim for claim in claims.beyond(ours, study.load_table) if claim.id == "C7"]
    assert [claim.verdict for claim in found] == ["holds"]


def test_variants_that_were_tried_stand_in_one_table_by_network(study, capsys):
    assert peers.trials(study).empty and "not tried" in capsys.readouterr().out
    rows = "dataset,model,seed,recipe,against,bd_rate,why\n"
    rows += "digits,lenet5,0,a mask first,usual,-10,\ndigits,lenet5,1,a mask first,usual,-10,\n"
    study.results.mkdir(parents=True, exist_ok=True)
    (study.results / "trials-rates.csv").write_text(rows)
    table = peers.trials(study)
    assert table["LeNet-5 on digits"].tolist() == ["-10.0 ± 0.0 %"]
