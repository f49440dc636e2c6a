"""The command line: what it prints about files, and one sentence about those it cannot read."""

import subprocess
import sys

import pytest
import torch

from lib.__main__ import main
from lib.codec import Compressed, Constant
from lib.quantize import Codes


def codes(symbols, step=0.5):
    return Codes(torch.tensor(symbols, dtype=torch.int32), torch.tensor([step]), "uniform")


@pytest.fixture
def entries():
    weight = codes([[0, 1, -2], [0, 0, 3]])
    return {
        "fc.weight": weight,
        "tied.weight": weight,
        "fc.bias": torch.tensor([1.0, 2.0]).half(),
        "bn.running_var": Constant(torch.tensor(1.0), (4, 5)),
        "only": torch.tensor(7),
    }


@pytest.fixture
def run(tmp_path, capsys):
    """Save what is given, run a command on it, return the lines of the output by first word."""

    def run(command, *held, status=0):
        paths = [tmp_path / f"{number}.xaic" for number in range(len(held))]
        for path, compressed in zip(paths, held, strict=True):
            compressed.save(path)
        assert main([command, *map(str, paths)]) == status
        lines = capsys.readouterr().out.splitlines()
        return {line.split()[0]: line for line in lines if line.strip()}

    return run


def test_inspect_names_every_entry_and_adds_up(entries, run):
    compressed = Compressed(entries, {"recipe": "lrp"})
    lines = run("inspect", compressed)
    layer = compressed.summary()[0]
    text = f"uniform, grid of 1  2x3    3 of 6  {layer.bits:.3f}"
    assert " ".join(lines["fc.weight"].split()) == " ".join(
        f"fc.weight {text} {layer.bytes} {layer.share:.1%}".split()
    )
    assert lines["tied.weight"].split()[1:] == ["same", "as", "fc.weight", "2x3", "0"]
    assert lines["fc.bias"].split()[1:] == ["float16", "2", "4"]
    assert lines["bn.running_var"].split()[1:] == ["float32,", "all", "equal", "4x5", "0"]
    assert lines["only"].split()[1:] == ["int64", "scalar", "8"]
    assert lines["recipe:"] == "recipe: lrp"
    header = compressed.nbytes - layer.bytes - 4 - 8
    assert lines[str(compressed.nbytes)].endswith(
        f"bytes, {header} of them for names, shapes and remarks"
    )


def test_inspect_prints_no_control_characters(run):
    lines = run("inspect", Compressed({"a\x1b[2Jb": codes([1])}, {"k\n": "v\x07"}))
    assert "a?[2Jb" in lines and lines["k?:"] == "k?: v?"


def test_inspect_of_a_huge_constant_takes_no_memory(run):
    lines = run("inspect", Compressed({"w": Constant(torch.tensor(0.0), (1 << 14, 1 << 14))}))
    assert lines["w"].split()[1:] == ["float32,", "all", "equal", "16384x16384", "0"]


def test_diff_of_equal_files(entries, run):
    lines = run("diff", Compressed(entries), Compressed(entries))
    size = Compressed(entries).nbytes
    assert lines.keys() == {"entry", "5", str(size)}
    assert lines["5"] == "5 of 5 entries are the same"
    assert lines[str(size)] == f"{size} bytes / {size} bytes"


def test_diff_counts_symbols_and_weights(entries, run):
    other = entries | {"fc.weight": codes([[1, 1, -2], [0, 0, 5]])}
    other["fc.bias"] = torch.tensor([1.0, 2.25])
    other["bn.running_var"] = Constant(torch.tensor(1.0), (5, 4))
    other["new"] = other.pop("only")
    lines = run("diff", Compressed(entries, {"a": "1", "b": "2"}), Compressed(other, {"b": "3"}))
    assert lines["fc.weight"].split()[-3:] == ["2", "2", "1"]  # 5 - 3 steps of a half
    bias = ["float16", "/", "float32", "2", "4", "8", "1", "0.25"]
    assert lines["fc.bias"].split()[1:] == bias
    assert "4x5 / 5x4" in lines["bn.running_var"]
    assert lines["only"].split()[-2:] == ["8", "-"] and lines["new"].split()[-2:] == ["-", "8"]
    assert lines["tied.weight"].split()[1:6] == ["same", "as", "fc.weight", "/", "uniform,"]
    assert lines["a:"] == "a: 1 / -" and lines["b:"] == "b: 2 / 3"
    assert lines["0"] == "0 of 6 entries are the same"


def test_diff_of_other_steps_has_other_weights_but_the_same_symbols(run):
    files = (Compressed({"w": codes([[0, 1, -2]], step)}) for step in (0.5, 0.25))
    *_, shape, first, second, weights, largest = run("diff", *files)["w"].split()
    assert (shape, first, weights, largest) == ("1x3", second, "2", "0.5")


def test_diff_takes_nan_for_equal_to_nan(run):
    one, two = (torch.tensor([float("nan"), last]) for last in (1.0, float("inf")))
    lines = run("diff", Compressed({"w": one}), Compressed({"w": two}))
    assert lines["w"].split()[-2:] == ["1", "inf"]


@pytest.mark.parametrize("command", ["inspect", "diff"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        (b"\x93XAIC\x01 cut", "damaged or cut short: the checksum does not match"),
        (b"PK", "not a compressed model file"),
    ],
)
def test_an_unreadable_file_is_one_sentence(command, content, message, tmp_path, capsys):
    path = tmp_path / "a.xaic"
    if content is not None:
        path.write_bytes(content)
    assert main([command] + [str(path)] * (2 if command == "diff" else 1)) == 1
    out, err = capsys.readouterr()
    assert not out and err == f"xai-compression: {path}: {message}\n"


def test_help_and_bad_usage():
    command = [sys.executable, "-m", "lib", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=False)
    assert shown.returncode == 0 and "inspect" in shown.stdout and "diff" in shown.stdout
    for words in ([], ["diff", "one"]):
        with pytest.raises(SystemExit) as stopped:
            main(words)
        assert stopped.value.code == 2
