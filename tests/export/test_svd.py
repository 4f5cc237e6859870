"""What is no LoRA leaves as one: the error is the discarded singular values', the bound is kept, nothing is silent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import write_photos
from ends import resumed_is_the_unbroken_run
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_export import ABOUT, NAMES, bench_of, probe_trained
from test_peft_kinds import FORMULAS, KINDS, attached, own_parameters
from test_train import settings

from finetune.adapters.inspection import open_adapter
from finetune.cli.main import run
from finetune.config.load import parse_recipe
from finetune.core.errors import BadInput, CheckFailed
from finetune.core.records import Check
from finetune.export.adapter import export_adapter
from finetune.export.base import Request, delta
from finetune.export.decompose import decompose
from finetune.export.lora.peft import Peft
from finetune.export.registry import formats_for
from finetune.export.svd import export_native_form, native_formats, reduced
from finetune.export.verify import apply_adapter
from finetune.families.base import Family
from finetune.families.source import load_family
from finetune.jobs import train as job
from finetune.jobs.export import export_run
from finetune.jobs.open import open_exported, open_result
from finetune.methods.full import Full
from finetune.methods.peft_adapter import read_native_form
from finetune.methods.registry import METHODS
from finetune.runs.folder import RunFolder

PARTS = ["denoiser", "text_encoders"]


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


def some_deltas() -> list[tuple[str, str, torch.Tensor]]:
    made = torch.Generator().manual_seed(0)
    shapes = {"a": (12, 20), "b": (30, 8), "c": (6, 5, 3, 3)}
    return [("denoiser", name, torch.randn(shape, generator=made)) for name, shape in shapes.items()]


@pytest.mark.parametrize("rank", [1, 4, 7])
def test_the_error_is_that_of_the_discarded_singular_values(rank: int) -> None:
    """Eckart and Young, against torch's own singular values and the norm of what is missing."""
    deltas = some_deltas()
    found = decompose(deltas, most=8)
    lost = whole = 0.0
    for part, module, change in deltas:
        values = torch.linalg.svdvals(change.flatten(1).double())
        missing = change - delta(*found.layers(rank)[part][module], 1.0)
        assert float(missing.norm()) == pytest.approx(float(values[rank:].norm()), rel=1e-4, abs=1e-5)
        lost, whole = lost + float(values[rank:].square().sum()), whole + float(values.square().sum())
    assert found.kept(rank).error == pytest.approx((lost / whole) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("bound", [0.05, 0.3, 0.8, 1.0])
def test_the_chosen_rank_is_the_smallest_that_meets_the_bound(bound: float) -> None:
    found = decompose(some_deltas(), most=8)
    rank = found.rank_for(bound)
    assert found.kept(rank).error <= bound
    assert rank == 1 or found.kept(rank - 1).error > bound


def merged_by_formula(family: Family, method: Any, kind: str) -> Family:
    """The trained model as plain weights, by the papers' formulas."""
    clean = load_family(str(family.folder))
    scale = method.alpha_value / method.rank if hasattr(method, "rank") else 1.0
    with torch.no_grad():
        for part, path, layer in method.layers(family):
            modules = {name.removeprefix("text_model."): child for name, child in clean.parts[part].named_modules()}
            modules[path].weight.copy_(FORMULAS[kind](layer.get_base_layer().weight, own_parameters(layer), scale))
    return clean


def plain_weights(family: Family) -> dict[str, torch.Tensor]:
    """Every parameter by part and name, without `text_model.`."""
    return {
        f"{part}.{name.removeprefix('text_model.')}": value.detach()
        for part in ("denoiser", *family.text_encoders)
        for name, value in family.parts[part].named_parameters()
    }


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_on_a_clean_base_predicts_what_was_trained(
    name: str, kind: str, tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    """At full rank exactly; at a lower one with the error that the line states, measured here on the formulas."""
    method, family = attached(tiny_bases[name], kind, parts=PARTS)
    trained = merged_by_formula(family, method, kind)
    wanted = probe_trained(trained)
    whole = reduced(method, family, bench_of(tiny_bases[name]), 1000, 1e-3)
    assert torch.allclose(whole.prediction, wanted, atol=1e-4)
    for item in export_adapter(
        whole.adapter, Request(tmp_path, "x", "fp32", ABOUT), ["kohya", "diffusers"], bench_of(tiny_bases[name])
    ):
        assert item.ok, item.checks
        clean = load_family(str(tiny_bases[name]))
        moved = relative(probe_trained(clean), wanted)
        apply_adapter(clean, open_adapter(item.path, str(tiny_bases[name]))[0])
        assert relative(probe_trained(clean), wanted) < 1e-3 * moved
    method, family = attached(tiny_bases[name], kind, parts=PARTS)
    low = reduced(method, family, bench_of(tiny_bases[name]), 6, 1.0)
    lost = all_of = 0.0
    changes = plain_weights(trained)
    for place, before in plain_weights(load_family(str(tiny_bases[name]))).items():
        changes[place] = changes[place] - before
    for part, path, a, b in low.adapter.modules():
        change = changes[f"{part}.{path}.weight"]
        lost += float((delta(a, b, 1.0) - change).double().square().sum())
        all_of += float(change.double().square().sum())
    assert low.checks[0].error == pytest.approx((lost / all_of) ** 0.5, abs=5e-4)
    assert f"error {(lost / all_of) ** 0.5:.3f}" in low.checks[0].message
    assert low.checks[0].line.startswith("ok: rank 6 holds")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_own_form_is_pefts(name: str, kind: str, tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """PEFT's own `from_pretrained` on a clean base predicts what the trained model does."""
    method, family = attached(tiny_bases[name], kind, parts=PARTS)
    wanted = probe_trained(family)
    item = export_native_form(method, family, tmp_path / "x-peft", wanted, bench_of(tiny_bases[name]))
    assert item.ok, item.checks
    assert item.read_by == ["peft"]
    clean = load_family(str(tiny_bases[name]))
    for part in method.part_names(clean):
        model = peft.PeftModel.from_pretrained(clean.parts[part], tmp_path / "x-peft" / part)
        clean.parts[part] = model.base_model.model
    assert torch.allclose(probe_trained(clean), wanted, atol=1e-6)
    config = json.loads((tmp_path / "x-peft" / "denoiser" / "adapter_config.json").read_text())
    assert (config["peft_type"], config.get("use_dora", False)) == (
        {"dora": "LORA"}.get(kind, kind.upper()),
        kind == "dora",
    )


LOW = [torch.bfloat16, torch.float16]


def attached_in(base: Path, kind: str, dtype: torch.dtype, size: float = 0.05) -> tuple[Any, Family]:
    """A trained adapter in fp32 on a base in `dtype`, as on a GPU."""
    family = load_family(str(base), dtype=dtype)
    method = type(attached(base, kind)[0])()
    made = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in method.attach(family, 0).values():
            value.add_(torch.randn(value.shape, generator=made) * size)
    return method, family


@pytest.mark.parametrize("dtype", [torch.float32, *LOW])
@pytest.mark.parametrize("fault", ["none", "a dropped tensor", "another value", "another alpha", "swapped modules"])
def test_a_spoilt_own_form_is_found(
    fault: str, dtype: torch.dtype, tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reading by PEFT finds it alone, too: what was written is not asked."""
    from finetune.export import svd as module

    method, family = attached_in(tiny_bases["sd1"], "loha", dtype)
    real = module.write_json

    def spoilt(path: Path, value: dict) -> None:
        file = path.with_name("adapter_model.safetensors")
        tensors = load_file(file)
        if fault == "a dropped tensor":
            tensors.pop(next(iter(tensors)))
        elif fault == "another value":
            tensors[next(iter(tensors))].add_(0.5)
        elif fault == "swapped modules":
            one = next(name for name in tensors if "attn1.to_q.hada_w1_a" in name)
            other = one.replace("to_q", "to_k")
            tensors[one], tensors[other] = tensors[other], tensors[one]
        save_file(tensors, file)
        real(path, value | ({"alpha": 1.0} if fault == "another alpha" else {}))

    monkeypatch.setattr(module, "write_json", spoilt)
    monkeypatch.setattr(module, "_same_tensors", lambda path, wanted: Check("weights", True, "not asked"))
    item = export_native_form(
        method, family, tmp_path / "x", probe_trained(family), bench_of(tiny_bases["sd1"], dtype)
    )
    assert item.ok == (fault == "none"), item.checks
    assert item.read_by == (["peft"] if fault == "none" else [])


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("kind", KINDS)
def test_a_base_in_low_precision(kind: str, dtype: torch.dtype, tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """As on a GPU: the base in bf16 or fp16, the adapter in fp32. The LoRA's deltas are those of the adapter on this
    rounded base, and what PEFT reads is the adapter in fp32."""
    method, family = attached_in(tiny_bases["sd1"], kind, dtype)
    bench = bench_of(tiny_bases["sd1"], dtype)
    own = reduced(method, family, bench, 1000, 1e-3)
    assert own.checks[0].passed, own.checks
    wanted = {(part, path): change for part, path, change in method.deltas(family)}
    for part, path, a, b in own.adapter.modules():
        assert relative(delta(a, b, 1.0), wanted[part, path]) < 1e-4
    trained = method.state_dict(family)
    item = export_native_form(method, family, tmp_path / "x", own.prediction, bench)
    assert item.ok, item.checks
    assert "moves a prediction by" in item.checks[1].message
    clean = bench.load(dtype)
    read_native_form(clean, tmp_path / "x")
    assert all(torch.equal(value, trained[name]) for name, value in method.state_dict(clean).items())
    moved = relative(probe_trained(bench.load(dtype)), own.prediction)
    assert relative(probe_trained(clean), own.prediction) < 0.1 * moved


def test_our_reader_refuses_what_it_would_misread(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    for kind in KINDS:
        method, family = attached(tiny_bases["sd1"], kind)
        export_native_form(method, family, tmp_path / kind, probe_trained(family), bench_of(tiny_bases["sd1"]))
        with pytest.raises(BadInput, match=rf"a {kind.upper()} adapter of PEFT, not a plain LoRA"):
            open_adapter(tmp_path / kind, str(tiny_bases["sd1"]))


def test_a_rank_stabilised_peft_folder_is_read_with_its_scale(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    from finetune.methods.lora import LoRA

    family = load_family(str(tiny_bases["sd1"]))
    method = LoRA(rank=4, alpha=2, rank_stabilised=True)
    for name, value in method.attach(family, 0).items():
        if ".lora_B." in name:
            torch.nn.init.normal_(value, std=0.1)
    wanted = probe_trained(family)
    for part, (config, tensors) in method.native_form(family).items():
        (tmp_path / part).mkdir()
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / part / "adapter_model.safetensors")
        (tmp_path / part / "adapter_config.json").write_text(json.dumps(config))
    clean = load_family(str(tiny_bases["sd1"]))
    apply_adapter(clean, open_adapter(tmp_path, str(tiny_bases["sd1"]))[0])
    assert torch.allclose(probe_trained(clean), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("begun", "read"), [(True, True), ("gaussian", True), ("pissa_niter_4", False), ("olora", False)]
)
def test_a_peft_folder_that_changed_its_base_is_refused(begun: Any, read: bool, tmp_path: Path) -> None:
    """PiSSA's matrices are the base's own largest part: as a plain LoRA on the base they would count twice."""
    folder = tmp_path / "denoiser"
    folder.mkdir()
    held = {f"base_model.model.x.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    save_file(held, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "init_lora_weights": begun}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    if read:
        assert Peft().read(tmp_path, "sd1", Path()).count == 1
    else:
        with pytest.raises(BadInput, match=f"{begun}.*path_initial_model_for_weight_conversion"):
            Peft().read(tmp_path, "sd1", Path())


def test_only_adapters_that_are_no_lora_have_an_own_form() -> None:
    assert native_formats(Full(), ["kohya", "peft"]) == (["kohya", "peft"], False)
    from finetune.methods.oft import OFT

    assert native_formats(OFT(), ["kohya", "peft"]) == (["kohya"], True)
    assert native_formats(OFT(), ["kohya"]) == (["kohya"], False)


# whole runs


def recipe_of(base: Path, photos: Path, kind: str, *overrides: str) -> Any:
    plain = {"data.token=zwx", "prior.kind=none", "run.steps=4", "run.checkpoint_every=2", "run.name=mine"}
    return parse_recipe(settings(base, photos, {"kind": kind, "parts": PARTS}), [*sorted(plain), *overrides])


@pytest.mark.parametrize("kind", [KINDS[0], *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])])
@pytest.mark.slow
def test_a_whole_run_is_resumed_bit_for_bit_and_exported(
    kind: str, tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    whole = resumed_is_the_unbroken_run(recipe_of(tiny_bases["sd1"], photos, kind), tmp_path)
    listed = json.loads((whole / "exports.json").read_text())
    assert [item["format"] for item in listed] == formats_for(METHODS[kind].artifacts, usual=True)
    assert all(check.startswith("ok: ") for item in listed for check in item["checks"])
    with safe_open(whole / "exports" / "mine.safetensors", "pt") as opened:
        about = opened.metadata()
    assert (about["ss_network_module"], about["finetune_method"]) == ("networks.lora", kind)
    assert f"| method | {kind} |" in (whole / "exports" / "README.md").read_text()
    assert (whole / "exports" / "mine.json").is_file()
    assert "% of the change" in (whole / "report.html").read_text()
    family, _ = open_result(whole)
    wanted = probe_trained(family)
    only_peft = [item for item in export_run(RunFolder(whole), family) if item.format == "peft"]
    shown = open_exported(RunFolder(whole), only_peft, torch.float32)
    assert shown is not None
    assert torch.allclose(probe_trained(shown), wanted, atol=1e-6)


@pytest.mark.slow
def test_a_broken_bound_is_a_failure_that_says_which_rank_would_do(
    tiny_bases: dict[str, Path], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(tiny_bases["sd1"], photos, "oft", "export.rank=2", "export.max_error=0.05")
    with pytest.raises(CheckFailed, match="diffusers, kohya does not match what was trained"):
        job.train(recipe, tmp_path / "run")
    assert len(list((tmp_path / "run" / "samples" / "after").iterdir())) == 2  # drawn from the PEFT form
    command = ["export", str(tmp_path / "run"), "--to", "kohya"]
    code, _ = run(command)
    said = capsys.readouterr().out
    assert code == 1
    assert "FAILED: rank 2 holds" in said
    needed = said.split("export.rank=")[1].split(" ")[0]
    assert run([*command, "--rank", str(int(needed) - 1)])[0] == 1
    assert run([*command, "--rank", needed]) == (0, "")
    assert run([*command, "--max-error", "1"]) == (0, "")
    allowed = said.split("export.max_error=")[1].split()[0].rstrip(";")
    assert run([*command, "--max-error", allowed]) == (0, "")


def test_a_full_run_leaves_as_a_lora_that_says_what_it_loses(
    tiny_bases: dict[str, Path], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = recipe_of(tiny_bases["sd1"], photos, "full", "export.dtype=fp32")
    path = job.train(recipe, tmp_path / "run")
    assert {item["format"] for item in json.loads((path / "exports.json").read_text())} == {"folder"}
    assert run(["export", str(path), "--to", "kohya", "--to", "peft", "--to", "checkpoint", "--rank", "1000"]) == (
        0,
        "",
    )
    said = capsys.readouterr().out
    trained, base = open_result(path)[0], load_family(str(tiny_bases["sd1"]))
    before, after = plain_weights(base), plain_weights(trained)
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    lost = sum(before[name].ndim == 1 or "embedding.weight" in name for name in moved)
    assert lost > 0
    assert said.count(f"ok: {lost} biases, norms and embeddings changed too") == 2
    assert (path / "exports" / "mine.safetensors").is_file()  # the checkpoint
    adapter, _ = open_adapter(path / "exports" / "mine-lora.safetensors", str(tiny_bases["sd1"]))
    assert adapter.count == len(moved) - lost
    for part, module, a, b in adapter.modules():
        wanted = trained.parts[part].get_submodule(module).weight - base.parts[part].get_submodule(module).weight
        assert relative(delta(a, b, adapter.scale), wanted.detach()) < 1e-4, module
    card = (path / "exports" / "README.md").read_text()
    assert "from_pretrained" in card
    with safe_open(path / "exports" / "mine-lora.safetensors", "pt") as opened:
        assert opened.metadata()["finetune_method"] == "full"


def test_a_full_run_may_export_nothing_but_a_lora(tiny_bases: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tiny_bases["sd1"], photos, "full", "export.formats=[kohya]", "export.rank=1000")
    path = job.train(recipe, tmp_path / "run")
    assert 'weight_name="mine-lora.safetensors"' in (path / "exports" / "README.md").read_text()
    assert (path / "exports" / "mine-lora.json").is_file()
    assert len(list((path / "samples" / "after").iterdir())) == 2


def test_a_run_in_which_nothing_moved_has_no_lora(tiny_bases: dict[str, Path]) -> None:
    family = load_family(str(tiny_bases["sd1"]))
    method = Full()
    method.attach(family, 0)
    with pytest.raises(BadInput, match="there is no LoRA to write"):
        reduced(method, family, bench_of(tiny_bases["sd1"]), None, 0.1)


@pytest.fixture(scope="module")
def lora_run(tiny_bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    photos = write_photos(folder / "photos")
    recipe = recipe_of(tiny_bases["sd1"], photos, "lora", "run.steps=1", "export.formats=[kohya]")
    return job.train(recipe, folder / "run")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rank", "4"], ("export.rank is 4", "a lora is exported exactly as it was trained", "finetune resize")),
        (["--rank", "0"], ("export.rank is 0", "at least 1")),
        (["--max-error", "-1"], ("export.max_error is -1", "more than 0")),
        (["--to", "folder"], ("a folder file can't hold an adapter", "kohya")),
    ],
)
def test_bad_options(options: list[str], words: tuple[str, ...], lora_run: Path) -> None:
    code, message = run(["export", str(lora_run), *options])
    assert code == 2
    assert all(word in message for word in words), message
    assert "\n" not in message
