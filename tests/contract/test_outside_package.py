"""examples/outside_package, installed as pip would leave it: recipes know what it adds, and it keeps the contract."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "examples" / "outside_package"

RECIPE = """
from pathlib import Path
from finetune.config.load import parse_recipe
from finetune.testing import contract
base, folder, other = Path({base!r}), Path({folder!r}), Path({other!r})
recipe = parse_recipe({{
    "data": {{"photos": "x", "class_noun": "mug"}},
    "method": {{"kind": "lora_fa", "rank": 4}},
    "objective": {{"weighting": {{"kind": "soft_min_snr", "gamma": 3}}}},
    "optim": {{"kind": "sgd", "lr": 0.5, "momentum": 0.8}},
}})
assert type(recipe.optim).__module__ == "finetune_outside.sgd"
assert type(recipe.method).__module__ == "finetune_outside.lora_fa"
weighting = recipe.objective.weighting
assert type(weighting).__module__ == "finetune_outside.soft_min_snr" and weighting.gamma == 3
"""
CHECKS = """
contract.killed_and_resumed_is_the_unbroken_run(base, "lora_fa", folder, recipe.optim)
for check in (
    contract.only_what_should_move_moves,
    contract.every_trained_weight_gets_a_gradient,
    contract.step_0_is_the_base_and_the_seed_decides,
    contract.saved_and_loaded_is_the_same,
    contract.checkpointing_gives_the_same_gradients,
):
    check(base, "lora_fa", ["denoiser", "text_encoders"])
contract.switched_off_is_the_base(base, "lora_fa")
contract.a_weight_is_finite_and_above_0(weighting)
contract.a_weight_is_the_same_for_every_prediction(weighting)
snr = __import__("torch").tensor([0.5, 100.0])
assert __import__("torch").allclose(weighting.weight(snr, "epsilon"), 3 / (snr + 3))  # 1 / (1 + SNR / gamma)
"""
FAMILY = """
from finetune.families.registry import FAMILIES
from finetune.jobs.train import train
from finetune.testing.family_contract import FAMILY_CONTRACT
from finetune.testing.tiny import write_tiny
assert FAMILIES["deepfloyd-if"].__module__ == "finetune_outside.deepfloyd"
small = folder / "base"
write_tiny("deepfloyd-if", small)
for promise in FAMILY_CONTRACT:
    promise(small)
contract.killed_and_resumed_is_the_unbroken_run(small, "lora", folder)
for check in (contract.only_what_should_move_moves, contract.step_0_is_the_base_and_the_seed_decides):
    check(small, "lora", ["denoiser"])
train(parse_recipe({{
    "base": str(small), "data": {{"photos": {photos!r}, "class_noun": "mug", "token": "zwx"}},
    "prior": {{"kind": "class_images", "count": 2, "steps": 2}},
    "method": {{"kind": "lora_fa", "rank": 4, "alpha": 8}},
    "optim": {{"kind": "sgd", "lr": 0.5}}, "run": {{"steps": 3, "batch_size": 1, "dir": str(folder / "run")}},
    "sample": {{"prompts": ["a photo of {{token}} {{noun}}"], "count": 1, "steps": 2}},
}}), say=lambda line: None)
assert (folder / "run" / "report.html").is_file()
"""
BROKEN = """
import finetune_outside.sgd
finetune_outside.sgd.SGD.build = lambda self, *args: __import__("torch").optim.SGD(
    self.groups(*args), lr=self.lr, momentum=self.momentum * len(list(other.rglob("step-*"))) / 9
)
try:
    contract.killed_and_resumed_is_the_unbroken_run(base, "lora_fa", other, recipe.optim)
except AssertionError as error:
    assert "differ after a resume" in str(error), error
else:
    raise SystemExit("an optimiser that forgets passed the contract")
"""
BROKEN_WEIGHTS = """
def refused(check, said):
    try:
        check(weighting)
    except AssertionError as error:
        assert said in str(error), error
    else:
        raise SystemExit(f"a wrong weight passed {check.__name__}")
of = type(weighting)
of.in_x0 = lambda self, snr: (snr - 1).clamp(min=0)
refused(contract.a_weight_is_finite_and_above_0, "0.0 at SNR 0 (epsilon)")
of.in_x0 = lambda self, snr: snr.double()
refused(contract.a_weight_is_finite_and_above_0, "float64")
of.in_x0 = lambda self, snr: snr / snr.max()
refused(contract.a_weight_is_finite_and_above_0, "depends on the other samples")
of.weight = lambda self, snr, prediction: 1 / (snr + 1)
refused(contract.a_weight_is_finite_and_above_0, "0.0 at SNR inf")
refused(contract.a_weight_is_the_same_for_every_prediction, "the loss for")
"""


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder with the package and its dist-info, as `pip install --target` writes it."""
    project = tomllib.loads((SOURCE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    site = tmp_path / "site"
    shutil.copytree(SOURCE / "finetune_outside", site / "finetune_outside")
    info = site / f"finetune_outside-{project['version']}.dist-info"
    info.mkdir()
    metadata = f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
    (info / "METADATA").write_text(metadata, encoding="utf-8")
    lines = []
    for group, entries in project["entry-points"].items():
        lines += [f"[{group}]", *[f"{name} = {value}" for name, value in entries.items()]]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return site


def run(site: Path, program: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(site)])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)


def places(tiny_bases: dict[str, Path], folder: Path) -> dict[str, str]:
    for name in ("kept", "broken"):
        (folder / name).mkdir()
    return {"base": str(tiny_bases["sd1"]), "folder": str(folder / "kept"), "other": str(folder / "broken")}


@pytest.mark.slow
def test_what_it_adds_keeps_the_contract_and_what_breaks_it_is_seen(
    installed: Path, tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    done = run(installed, RECIPE.format(**places(tiny_bases, tmp_path)) + CHECKS + BROKEN + BROKEN_WEIGHTS)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_its_family_keeps_the_contract_and_trains(
    installed: Path, tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    done = run(installed, RECIPE.format(**places(tiny_bases, tmp_path)) + FAMILY.format(photos=str(photos)))
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_package_that_does_not_load_is_named(installed: Path) -> None:
    (installed / "finetune_outside" / "sgd.py").write_text("import a_library_that_is_not_there\n", encoding="utf-8")
    done = run(installed, "import finetune.optim.registry")
    assert done.returncode == 1
    assert "finetune_outside.sgd:SGD of finetune-outside can't be loaded" in done.stderr
    assert "uninstall it" in done.stderr
