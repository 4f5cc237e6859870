"""Rules that keep the code readable: few parameters, and one name for one thing."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "finetune").rglob("*.py"))
MOST = 6

# Options of the command line are a person's, and typer reads them from the parameters: these only collect and call.
COMMANDS = {
    "cli/sample.py:sample", "cli/evaluate.py:evaluate", "cli/main.py:export", "cli/main.py:dreambooth",
    "cli/adapters.py:resize", "cli/adapters.py:merge", "cli/adapters.py:extract",
}  # fmt: skip

# A record whose fields are built by position in one place each.
BY_POSITION = {"Exported"}

# In the commands and in what is shipped for tests, a name is that of what is called or tested.
APART = ("cli", "testing")
# One meaning for several formats, or for several kinds of a registry.
SAME_MEANING = {"read_by_diffusers"}
# What each package, or each of two packages, has of its own.
ROLES = {"__init__", "base", "registry", "settings", "plan", "images"}


def place(file: Path) -> str:
    return file.relative_to(ROOT / "finetune").as_posix()


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def functions(file: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """All but self and cls; *args and **kwargs are one each."""
    given = function.args
    names = [item.arg for item in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    names += [item.arg for item in (given.vararg, given.kwarg) if item is not None]
    return names[1:] if names[:1] in (["self"], ["cls"]) else names


def test_no_function_has_more_parameters_than_one_can_keep_in_mind() -> None:
    found = {
        f"{place(file)}:{node.name}" for file in FILES for node in functions(file) if len(parameters(node)) > MOST
    }
    assert found - COMMANDS == set()
    assert found >= COMMANDS, "an exception that is not needed any more"


def test_commands_with_many_options_only_call() -> None:
    """Flat and short: what is done stands in functions with few parameters."""
    for file in FILES:
        for node in functions(file):
            if f"{place(file)}:{node.name}" in COMMANDS:
                assert len(node.body) <= 20
                assert not any(isinstance(part, ast.For | ast.While | ast.With | ast.Try) for part in ast.walk(node))


def test_long_records_are_built_by_name() -> None:
    """So that a record may have more fields than a function parameters."""
    calls = [(place(file), node) for file in FILES for node in ast.walk(tree(file)) if isinstance(node, ast.Call)]
    found = {(name, ast.unparse(node.func)) for name, node in calls if len(node.args) > MOST}
    assert {(name, called) for name, called in found if called not in BY_POSITION} == set()


def test_no_four_integers_stand_in_a_row() -> None:
    """Two of them would be swapped unseen. Of fields too: a dataclass can be built by position."""
    for node in (node for file in FILES for node in ast.walk(tree(file))):
        rows: list[list[ast.expr | None]] = []
        if isinstance(node, ast.FunctionDef):
            rows = [[item.annotation for item in (*node.args.posonlyargs, *node.args.args)]]
        elif isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(item) for item in node.decorator_list):
            rows = [[item.annotation for item in node.body if isinstance(item, ast.AnnAssign)]]
        for row in rows:
            kinds = ["int" if item is not None and ast.unparse(item) == "int" else "-" for item in row]
            assert "intintintint" not in "".join(kinds), f"{node.name}, line {node.lineno}"


def defined(kinds: type | tuple[type, ...]) -> dict[str, set[str]]:
    """Public name -> the modules that define it at their top level."""
    found: dict[str, set[str]] = defaultdict(set)
    for file in FILES:
        for node in tree(file).body:
            if isinstance(node, kinds) and not node.name.startswith("_"):  # type: ignore[attr-defined]
                found[node.name].add(place(file))  # type: ignore[attr-defined]
            elif isinstance(node, ast.Assign) and kinds is ast.ClassDef:  # an alias such as Rows = dict[str, Any]
                names = [target.id for target in node.targets if isinstance(target, ast.Name)]
                for name in names:
                    if not name.isupper():
                        found[name].add(place(file))
    return found


def test_a_class_and_an_alias_have_a_name_of_their_own() -> None:
    twice = {name: files for name, files in defined(ast.ClassDef).items() if len(files) > 1}
    dunder = {name for name in twice if name.startswith("__")}
    assert {name: files for name, files in twice.items() if name not in dunder} == {}


def test_a_public_function_has_a_name_of_its_own() -> None:
    twice = {
        name
        for name, files in defined(ast.FunctionDef).items()
        if len([file for file in files if not file.startswith(APART)]) > 1
    }
    assert twice - SAME_MEANING == set()


def test_a_module_has_a_name_of_its_own() -> None:
    found: dict[str, list[str]] = defaultdict(list)
    for file in FILES:
        found[file.stem].append(place(file))
    twice = {name for name, files in found.items() if len([file for file in files if not file.startswith(APART)]) > 1}
    assert twice - ROLES == set()
