"""Write LICENSES.md: version and licence of every package that pyproject.toml names.

Usage, in the environment of `make env`:
    .venv/bin/python .ci/licences.py
"""

import re
import tomllib
from importlib.metadata import Distribution, distribution
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEAD = """# Licences of the dependencies

What `pyproject.toml` names, at the versions of `requirements.lock`, with the licence that each
package states. Written by `make lock`. Nothing of these packages is copied into this repository.
PyTorch's default build for Linux also installs NVIDIA's CUDA libraries, under NVIDIA's own terms;
its CPU build does not.

| package | version | licence | for |
|-|-|-|-|
"""


def licence(package: Distribution) -> str:
    """What a package says: an SPDX expression, else classifiers, else its own words."""
    if expression := package.metadata.get("License-Expression"):
        return expression
    classifiers = package.metadata.get_all("Classifier", [])
    names = [line.split(" :: ")[-1] for line in classifiers if line.startswith("License ::")]
    names = [name for name in names if name != "OSI Approved"]
    words = package.metadata.get("License", "").strip().splitlines() or ["not stated"]
    return ", ".join(names) or words[0]


def main():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {"lib": project["dependencies"], **project["optional-dependencies"]}
    groups.pop("architectures")  # of one benchmark, and not in the lock
    rows = []
    for group, requirements in groups.items():
        for requirement in requirements:
            package = distribution(re.match(r"[\w.-]+", requirement).group())
            version = package.version.partition("+")[0]
            rows.append(f"| {package.name} | {version} | {licence(package)} | {group} |\n")
    (ROOT / "LICENSES.md").write_text(HEAD + "".join(rows))


if __name__ == "__main__":
    main()
