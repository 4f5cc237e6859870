"""`export.verify`: `deltas` loads no second model and still finds faults; `off` claims nothing anywhere."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_export import ABOUT, bench_of, trained
from test_svd import recipe_of

from finetune.cli.main import run
from finetune.config.load import parse_recipe
from finetune.core.errors import BadInput, CheckFailed
from finetune.export import verify as checks
from finetune.export.adapter import adapter_from, export_adapter
from finetune.export.base import Request
from finetune.export.bench import Bench
from finetune.export.model import model_folder as whole_models
from finetune.export.registry import EXPORTS
from finetune.export.settings import ExportTo
from finetune.families.registry import FAMILIES
from finetune.families.source import load_family
from finetune.jobs import train as job
from finetune.jobs.export import export_run
from finetune.jobs.open import open_run
from finetune.runs.folder import RunFolder

FORMATS = {
    "lora": ["kohya", "diffusers", "peft"],
    "dora": ["kohya", "diffusers", "peft"],
    "full": ["folder", "checkpoint", "kohya"],
    "pivotal": ["kohya", "embedding"],
}


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("a second model is loaded")


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.slow
def test_what_a_run_says_of_files_that_it_did_not_check(
    kind: str,
    tiny_bases: dict[str, Path],
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said: list[str] = []
    options = ["export.verify=off", f"export.formats={FORMATS[kind]}"]
    options += ["export.max_error=1"] if kind in ("dora", "full") else []  # the others leave as they were trained
    path = job.train(recipe_of(tiny_bases["sd1"], photos, kind, *options), tmp_path / "run", said.append)
    listed = json.loads((path / "exports.json").read_text())
    assert [item["format"] for item in listed] == FORMATS[kind]
    assert all((path / item["path"]).exists() and not item["checks"] and not item["read_by"] for item in listed)
    page, card = ((path / file).read_text(encoding="utf-8") for file in ("report.html", "exports/README.md"))
    assert page.count("not checked") == card.count("not checked") == len(listed)
    assert sum(line.endswith("not checked") for line in said) == len(listed)
    assert "ok: " not in page + card + "".join(said)
    capsys.readouterr()
    assert run(["export", str(path)]) == (0, "")
    out = capsys.readouterr().out
    assert out.count("not checked") == len(listed)
    assert "ok" not in out.replace("kohya", "").split()
    monkeypatch.setattr(Bench, "_loaded", refuse)
    monkeypatch.setattr(whole_models, "loaded_part", refuse)
    family, _ = open_run(RunFolder(path))
    exported = export_run(RunFolder(path), family, FORMATS[kind], ExportTo(verify="deltas", max_error=1))
    assert all(item.ok and item.checks and item.read_by for item in exported), exported
    with pytest.raises(AssertionError, match="second model"):  # the default does load one
        export_run(RunFolder(path), open_run(RunFolder(path))[0], FORMATS[kind], ExportTo(max_error=1))


def test_a_broken_bound_is_told_by_off_too(tiny_bases: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    options = ["export.verify=off", "export.rank=1", "export.max_error=0.01", "export.formats=[kohya]"]
    with pytest.raises(CheckFailed, match="kohya"):
        job.train(recipe_of(tiny_bases["sd1"], photos, "dora", *options), tmp_path / "run")
    (item,) = json.loads((tmp_path / "run" / "exports.json").read_text())
    (line,) = item["checks"]
    assert line.startswith("FAILED: rank 1 holds")


@pytest.mark.parametrize(("setting", "found"), [("full", True), ("deltas", True), ("off", False)])
def test_a_spoilt_adapter(setting: str, found: bool, tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    method, family = trained(tiny_bases["sd1"])
    adapter, bench = adapter_from(method, family), replace(bench_of(tiny_bases["sd1"]), verify=setting)
    (item,) = export_adapter(adapter, Request(tmp_path, "x", "fp32", ABOUT), ["kohya"], bench)
    assert item.ok
    tensors = load_file(item.path)
    name = next(name for name in tensors if name.endswith("lora_up.weight"))
    save_file(tensors | {name: tensors[name] * 1.03}, item.path)
    again = checks.verify(adapter, EXPORTS["kohya"](), item.path, torch.float32, bench)
    assert again.ok != found
    assert bool(again.checks) == found


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_spoilt_folder_is_found_from_its_files(
    name: str, tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = load_family(str(tiny_bases[name]))
    monkeypatch.setattr(whole_models, "loaded_part", refuse)
    item = whole_models.export_folder(family, tmp_path / "x", "fp16", "deltas")
    assert item.ok, item.checks
    assert item.modules == sum(1 for part in family.parts.values() for _ in part.named_parameters())
    file = next((tmp_path / "x" / "vae").glob("*.safetensors"))
    tensors = load_file(file)
    odd = next(key for key, value in tensors.items() if value.any())
    save_file(tensors | {odd: tensors[odd] * 1.01}, file, {"format": "pt"})
    _, found = whole_models._compare(family, tmp_path / "x", torch.float16, "deltas")
    assert not found.passed
    assert found.message.startswith(f"vae.{odd}")


def test_off_as_yaml_reads_it(photos: Path) -> None:
    sections = {"data": {"photos": str(photos), "class_noun": "mug"}, "method": {"kind": "lora"}}
    sections |= {"optim": {"kind": "adamw"}}
    assert parse_recipe(sections, ["export.verify=off"]).export.verify == "off"
    assert parse_recipe(sections | {"export": {"verify": False}}).export.verify == "off"
    with pytest.raises(BadInput, match=r"export\.verify"):
        parse_recipe(sections, ["export.verify=on"])
