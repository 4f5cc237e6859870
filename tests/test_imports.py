"""Imports point down, and each heavy library is imported in its homes only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "finetune").rglob("*.py"))

# From the ground up. A module may import its own layer and those above it in this list.
LAYERS = (
    ("errors", "settings", "draws", "quiet", "progress", "files", "signals", "determinism", "devices"),
    ("batch", "dropout", "loss", "objectives", "optim", "recipes"),
    ("families",),
    ("methods", "data"),
    ("penalties",),
    ("config",),
    ("run", "badstep", "sample", "tokens", "export"),
    ("loop", "prior", "results", "adapters", "report"),
    ("previews", "subjects"),
    ("plan", "estimate"),
    ("job",),
    ("demo", "doctor", "launch", "cli_adapters"),
    ("cli", "__main__", "__init__", "testing"),
)
RANK = {name: number for number, layer in enumerate(LAYERS) for name in layer}

HOMES = {
    "diffusers": ("families", "testing"),
    "transformers": ("families", "quiet", "testing"),
    "peft": ("methods",),
    "tokenizers": ("methods.textual_inversion",),
    "accelerate": ("loop", "job"),
    "bitsandbytes": ("optim",),
    "typer": ("cli", "cli_adapters"),
    "rich": ("cli", "progress"),
    "pydantic": ("settings", "config", "penalties", "methods", "optim", "objectives"),
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
    used = {name.split(".")[1] for name in imports(file) if name.startswith("finetune.")}
    upward = {name for name in used if RANK.get(name, 0) > RANK[own]}
    assert not upward, f"{name_of(file)} imports {upward} from above itself"


@pytest.mark.parametrize("library", HOMES)
def test_a_library_stays_in_its_homes(library: str) -> None:
    users = {name_of(file) for file in FILES if any(name.split(".")[0] == library for name in imports(file))}
    strangers = {user for user in users if not user.startswith(HOMES[library])}
    assert users, f"nothing imports {library}"
    assert not strangers


def test_the_loop_names_no_family_and_no_method() -> None:
    words = {
        node.value if isinstance(node, ast.Constant) else getattr(node, "id", None)
        for node in ast.walk(ast.parse((ROOT / "finetune" / "loop.py").read_text(encoding="utf-8")))
    }
    assert not words & {"sd1", "sd2", "sdxl", "lora", "full", "pivotal", "LoRA", "Full", "Pivotal"}
