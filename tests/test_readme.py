import re
from pathlib import Path

import pandas as pd

from lib import readme
from lib.recipes import RECIPES

TEXT = readme.README.read_text()


def test_the_tables_are_what_the_results_say():
    assert readme.filled(TEXT) == TEXT
    assert TEXT.count("<!-- claims:") == 2 and "| C1 |" in TEXT


def test_files_and_recipes_that_are_named_exist():
    root = Path(readme.ROOT)
    paths = re.findall(r"`((?:lib|notebooks|tests|results|figures)/[\w/.-]*)`", TEXT)
    assert len(paths) > 15 and all((root / path).exists() for path in paths)
    assert all((root / path).exists() for path in re.findall(r"\]\((figures/.*?)\)", TEXT))
    assert set(re.findall(r"`(lrp-[\w-]+-rd)`", TEXT)) <= set(RECIPES)


def test_targets_that_are_named_exist():
    makefile = (Path(readme.ROOT) / "Makefile").read_text()
    for target in set(re.findall(r"`make (\w+)", TEXT)):
        assert re.search(rf"^{target}:", makefile, flags=re.M), target


def test_a_method_that_was_not_run_on_a_network_leaves_its_cell_open(tmp_path):
    row = {"seed": 0, "file_bytes": 1000, "ratio": 4.0, "test_accuracy": 90.0,
           "base_test_accuracy": 91.0, "reached": True}  # fmt: skip
    cases = [("a", "x", "one"), ("a", "x", "two"), ("b", "y", "one")]
    names = ("dataset", "model", "recipe")
    table = pd.DataFrame([dict(zip(names, case, strict=True)) | row for case in cases])
    table.loc[1, "reached"] = False
    table.to_csv(tmp_path / "headline-smallest.csv")
    lines = readme.files_table(tmp_path).splitlines()
    assert lines[0] == "|  | a-x, 1 seed | b-y, 1 seed |"
    assert lines[2] == "| uncompressed | 4 kB, 91.00 % | 4 kB, 91.00 % |"
    assert lines[4] == "| two | 1.0 kB (4.0x), 90.00 % † | – |"
