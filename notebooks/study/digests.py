"""Digests: of tensors, of files, and of the code that numbers come from."""

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from .paths import ROOT

if TYPE_CHECKING:
    from torch import Tensor

_SHOWN = {
    "names", "palette", "figures", "pictures", "sketches", "sliders", "answers", "sentences",
    "lessons", "publish", "report", "stamps", "verify", "peers", "__main__",
}  # fmt: skip
"""Modules of ``study`` that no run of a recipe depends on: they show, or compute what is shown."""
_LATER = {"type_params", "type_comment", "kind"}
"""Fields of syntax trees that Python versions differ in, or that no value depends on."""


def of_tensors(tensors: "Iterable[Tensor]") -> str:
    """SHA-256 of the bytes of tensors, in their order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def of_file(path: Path) -> str:
    """SHA-256 of a file's content; empty where there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def sources() -> list[Path]:
    """The files of ``lib`` and ``study``, in the order of their paths."""
    folders = ROOT / "lib", ROOT / "notebooks" / "study"
    return [path for folder in folders for path in sorted(folder.rglob("*.py"))]


@cache
def of_code() -> str:
    """SHA-256 of all code that computes a number: ``lib`` and ``study`` without what shows it.

    Comments, docstrings and the layout of lines do not count, and it is the same on every version
    of Python that the project runs on.
    """
    digest = hashlib.sha256()
    for path in sources():
        name = path.relative_to(ROOT).as_posix()
        if not (name.startswith("notebooks/") and path.stem in _SHOWN):
            digest.update(of_source(path.read_text()).encode())
    return digest.hexdigest()


def of_source(text: str) -> str:
    """SHA-256 of what a module's text means to the interpreter.

    Of the syntax tree, walked here field by field: tokens differ between versions (one for a whole
    f-string before 3.12, several since), ``ast.unparse`` chooses quotes and parentheses anew with
    each, and ``ast.dump`` leaves out other fields since 3.13.
    """
    digest = hashlib.sha256()
    for part in _walk(ast.parse(text)):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


def _walk(node: object) -> Iterator[str]:
    if isinstance(node, list):
        yield f"[{len(node)}"
        for item in node:
            yield from _walk(item)
    elif isinstance(node, ast.AST):
        yield type(node).__name__
        for field in node._fields:
            value = getattr(node, field, None)
            if field == "body" and isinstance(value, list):
                value = _without_docstring(node)
            elif field == "values" and isinstance(node, ast.JoinedStr):
                value = _merged(value)
            if field not in _LATER and value is not None and value != []:
                yield field
                yield from _walk(value)
    else:
        # ascii, because what repr escapes depends on the version's Unicode tables
        yield f"{type(node).__name__} {ascii(node)}"


def _without_docstring(node: ast.AST) -> list:
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
        return node.body[1:]
    return node.body


def _merged(parts: list) -> list:
    """Parts of an f-string with neighbouring texts joined and empty ones left out."""
    merged: list = []
    for part in parts:
        if isinstance(part, ast.Constant) and merged and isinstance(merged[-1], ast.Constant):
            merged[-1] = ast.Constant(merged[-1].value + part.value)
        elif not (isinstance(part, ast.Constant) and part.value == ""):
            merged.append(part)
    return merged
