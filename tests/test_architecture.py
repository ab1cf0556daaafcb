"""The house rules that a machine can check: imports go down the floors only, files and functions stay short."""

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "nbdmap"
MODULES = sorted(PACKAGE.rglob("*.py"))
FLOORS = [
    {"errors"},
    {"units", "layout"},
    {"nbd", "ciphers"},
    {"block", "luks"},
    {"dm", "persist"},
    {"targets"},
    {"control", "server"},
    {"cli"},
    {"__main__"},
]
"""From the ground up; those on one floor do not see each other."""
SANS_IO = {"nbd", "errors", "units", "layout"}
FORBIDDEN_WITHOUT_IO = {"asyncio", "socket", "ssl", "select", "threading", "uvloop", "os"}


def part(module: Path) -> str:
    """The part of the house that a file belongs to."""
    return module.relative_to(PACKAGE).parts[0].removesuffix(".py")


def floor(name: str) -> int:
    return next(number for number, parts in enumerate(FLOORS) if name in parts)


def imported(tree: ast.AST) -> set[str]:
    """Every module that is imported, at any depth of the file."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module(module: Path) -> None:
    text = module.read_text()
    tree = ast.parse(text)
    assert text.count("\n") <= 450, "files stay under 450 lines"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 70, f"{node.name} is longer than 70 lines"
    assert ast.get_docstring(tree) or not text.strip(), "a module says what it is for"
    names = imported(tree)
    if module == PACKAGE / "__init__.py":
        assert names == set()
        return
    here = part(module)
    for name in names:
        if name.startswith("nbdmap.") and name != "nbdmap.__version__":
            there = name.split(".")[1]
            assert there == here or floor(there) < floor(here), f"{here} must not import {name}"
        if here in SANS_IO:
            assert name.split(".")[0] not in FORBIDDEN_WITHOUT_IO, f"{here} is sans-I/O: no {name}"
        if here == "targets" and name.startswith("nbdmap.targets."):
            assert module.name == "__init__.py" or name.split(".")[2] == module.relative_to(PACKAGE).parts[1]


def test_no_bare_tasks() -> None:
    """A task is kept by whoever starts it: `create_task` never stands alone as a statement."""
    for module in MODULES:
        for node in ast.walk(ast.parse(module.read_text())):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                name = node.value.func.attr if isinstance(node.value.func, ast.Attribute) else ""
                assert name not in ("create_task", "ensure_future"), f"{module}:{node.lineno}: a bare {name}"


def test_compiled_modules_do_not_wait_while_they_handle_an_error() -> None:
    """setup.py says why."""
    compiled = re.findall(r'^    "(nbdmap/.*\.py)",$', (PACKAGE.parent / "setup.py").read_text(), re.MULTILINE)
    assert len(compiled) > 10
    for name in compiled:
        for node in ast.walk(ast.parse((PACKAGE.parent / name).read_text())):
            within = node.body if isinstance(node, ast.ExceptHandler) else node.finalbody if isinstance(node, ast.Try) else []
            for awaited in (inner for statement in within for inner in ast.walk(statement)):
                assert not isinstance(awaited, ast.Await), f"{name}:{awaited.lineno}: await in an except or finally clause"
