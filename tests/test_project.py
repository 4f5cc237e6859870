"""What the project says of itself in several places is the same everywhere."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path
from typing import TypeGuard

import pytest
import yaml

import finetune

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def steps(workflow: Path) -> list[dict]:
    jobs = yaml.safe_load(workflow.read_text(encoding="utf-8"))["jobs"]
    return [step for job in jobs.values() for step in job.get("steps", [])]


def is_field(node: ast.AST) -> TypeGuard[ast.Call]:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Field"


def test_the_version_is_stated_once_and_repeated_right() -> None:
    assert "version" not in PROJECT["project"]
    assert PROJECT["tool"]["hatch"]["version"]["path"] == "finetune/__init__.py"
    assert yaml.safe_load(read("CITATION.cff"))["version"] == finetune.__version__
    headings = re.findall(r"^## \[(.+?)\]", read("CHANGELOG.md"), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert headings[1] == finetune.__version__


def test_each_released_section_of_the_changelog_has_a_date_and_known_kinds_of_changes() -> None:
    text = read("CHANGELOG.md")
    kinds = set(re.findall(r"^### (.+)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    for heading in re.findall(r"^## (.+)$", text, re.MULTILINE)[1:]:
        assert re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d{2}-\d{2}", heading), heading


def test_the_licence_is_the_same_in_the_citation() -> None:
    assert yaml.safe_load(read("CITATION.cff"))["license"] == PROJECT["project"]["license"]


@pytest.mark.parametrize("package", PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
def test_packages_say_that_they_are_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()


def test_mypy_alone_is_strict_about_all_that_is_packaged() -> None:
    settings = PROJECT["tool"]["mypy"]
    assert settings["strict"] is True
    assert set(PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) <= set(settings["files"])
    assert not any(name.split(".")[0] in settings["files"] for own in settings["overrides"] for name in own["module"])


def test_settings_name_their_defaults() -> None:
    """Type checkers without pydantic's plugin take a field for required if its default is not named (PEP 681)."""
    files = [*(ROOT / "finetune").rglob("*.py"), *(ROOT / "examples").rglob("*.py")]
    calls = [node for file in files for node in ast.walk(ast.parse(file.read_text("utf-8"))) if is_field(node)]
    assert calls
    assert not [ast.unparse(call) for call in calls if call.args]


def test_pre_commit_uses_the_versions_of_the_dev_extra() -> None:
    ruff, local = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    assert f"ruff=={ruff['rev'].removeprefix('v')}" in PROJECT["project"]["optional-dependencies"]["dev"]
    assert {hook["id"] for hook in ruff["hooks"]} == {"ruff-check", "ruff-format"}
    assert [hook["entry"] for hook in local["hooks"]] == ["python -m mypy"]


def test_exact_pins_of_extras_are_the_constraints() -> None:
    pins = dict(line.split("==") for line in read("constraints.txt").splitlines())
    extras = [item for extra in PROJECT["project"]["optional-dependencies"].values() for item in extra]
    names = {re.split(r"[\[<>=]", item)[0] for item in extras}
    assert names <= set(pins)
    assert all(pins[item.split("==")[0]] == item.split("==")[1] for item in extras if "==" in item)


def test_the_workflow_runs_what_ci_runs_and_readme_shows() -> None:
    commands = [step["run"] for step in steps(ROOT / ".github" / "workflows" / "ci.yml") if "run" in step]
    (targets,) = re.findall(r"^make --jobs=2 ([a-z ]+?)(?: #.*)?$", read(".ci/run"), re.MULTILINE)
    assert targets.split() == ["check", "test"]
    assert {f"make {target}" for target in targets.split()} <= set(commands)
    for line in ('pip install -c constraints.txt -e ".[dev]"', "-m pytest -n 2"):
        assert line in read("README.md")
        assert any(line in command for command in commands)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_get_no_more_rights_than_they_need(workflow: Path) -> None:
    content = yaml.safe_load(workflow.read_text(encoding="utf-8"))
    assert content["permissions"] == {"contents": "read"}
    writing = {name: job["permissions"] for name, job in content["jobs"].items() if "permissions" in job}
    assert writing == ({"publish": {"id-token": "write"}} if workflow.name == "release.yml" else {})
    checkouts = [step for step in steps(workflow) if "checkout" in step.get("uses", "")]
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)


def test_only_tested_builds_are_published() -> None:
    jobs = yaml.safe_load(read(".github/workflows/release.yml"))["jobs"]
    assert jobs["test"]["uses"] == "./.github/workflows/ci.yml"
    assert (jobs["build"]["needs"], jobs["publish"]["needs"]) == ("test", "build")


@pytest.mark.parametrize("form", ["bug", "feature"])
def test_issue_forms_have_what_github_wants(form: str) -> None:
    content = yaml.safe_load(read(f".github/ISSUE_TEMPLATE/{form}.yml"))
    assert {"name", "description", "body"} <= set(content)
    asked = [item for item in content["body"] if item["type"] != "markdown"]
    assert all(item["attributes"]["label"] for item in asked)
    assert len({item["id"] for item in asked}) == len(asked)


def test_the_pages_of_the_site_exist() -> None:
    """mkdocs itself needs the docs extra: `make docs` builds with broken links as errors."""
    content = yaml.safe_load(read("mkdocs.yml"))
    made = {"index.md", "contributing.md", "changelog.md", "security.md"}  # docs/pages.py, from the repository's root
    stack, named = [*content["nav"]], set()
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            named.add(item)
        else:
            stack += [page for value in item.values() for page in (value if isinstance(value, list) else [value])]
    assert {page for page in named - made if not (ROOT / "docs" / page).is_file()} == set()
