import re
from pathlib import Path

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
