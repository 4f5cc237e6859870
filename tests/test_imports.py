"""Imports point down, and each heavy library is imported in its homes only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "finetune").rglob("*.py"))

# From the ground up. A module may import its own package and those before it in this list.
PACKAGES = (
    "core", "objectives", "optim", "families", "methods", "data", "sampling", "evaluation", "training", "verdicts",
    "export", "adapters", "config", "runs", "report", "jobs", "ui", "cli", "testing",
)  # fmt: skip
RANK = {name: number for number, name in enumerate(PACKAGES)}
API = ("__init__", "__main__")  # what `import finetune` and `python -m finetune` show

HOMES = {
    "diffusers": ("families", "testing"),
    "transformers": ("families", "testing", "core.logging", "evaluation.backbones"),
    "peft": ("methods",),
    "tokenizers": ("methods.embeddings",),
    "accelerate": ("training", "jobs"),
    "bitsandbytes": ("optim.",),
    "prodigyopt": ("optim.",),
    "schedulefree": ("optim.",),
    "starlette": ("ui",),
    "uvicorn": ("ui",),
    "typer": ("cli",),
    "rich": ("cli",),
}


def name_of(file: Path) -> str:
    parts = list(file.relative_to(ROOT / "finetune").with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports(file: Path) -> list[str]:
    """Every imported module; `from finetune import x` counts as finetune.x."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            whole = node.module == "finetune"
            found += [f"finetune.{alias.name}" for alias in node.names] if whole else [node.module or ""]
    return found


@pytest.mark.parametrize("file", FILES, ids=name_of)
def test_imports_point_down(file: Path) -> None:
    own = name_of(file).split(".")[0]
    if own in API:
        return
    used = {name.split(".")[1] for name in imports(file) if name.startswith("finetune.")} - {"__version__"}
    upward = {name for name in used if RANK[name] > RANK[own]}
    assert not upward, f"{name_of(file)} imports {upward} from above itself"


def test_packages_are_those_of_the_list_and_hold_no_logic() -> None:
    there = {folder.name for folder in (ROOT / "finetune").iterdir() if (folder / "__init__.py").is_file()}
    assert there == set(PACKAGES)
    for file in FILES:
        if file.name == "__init__.py" and file.parent.name != "finetune":
            statements = ast.parse(file.read_text(encoding="utf-8")).body
            assert all(isinstance(node, ast.Expr) for node in statements), f"{file} holds more than a docstring"


@pytest.mark.parametrize("library", HOMES)
def test_a_library_stays_in_its_homes(library: str) -> None:
    users = {name_of(file) for file in FILES if any(name.split(".")[0] == library for name in imports(file))}
    unknown_keys = {user for user in users if not user.startswith(HOMES[library])}
    assert users, f"nothing imports {library}"
    assert not unknown_keys


def test_the_loop_names_no_family_and_no_method() -> None:
    words = {
        node.value if isinstance(node, ast.Constant) else getattr(node, "id", None)
        for node in ast.walk(ast.parse((ROOT / "finetune" / "training" / "trainer.py").read_text(encoding="utf-8")))
    }
    assert not words & {"sd1", "sd2", "sdxl", "lora", "full", "pivotal", "LoRA", "Full", "Pivotal"}
