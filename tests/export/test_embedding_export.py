"""Runs of new words from photos to files: resumed bit for bit, drawn again, read by diffusers on a clean base."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import diffusers
import pytest
import torch
from conftest import write_photos
from ends import resumed_is_the_unbroken_run
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_export import bench_of

from finetune.cli import main
from finetune.config.load import parse_recipe
from finetune.core.errors import BadInput
from finetune.data.conditioning.base import unit
from finetune.data.crops import make_crops
from finetune.data.photos import scan
from finetune.export import embedding
from finetune.export.base import NewWords, Request
from finetune.export.embedding import export_embedding, read_by_diffusers, read_embedding
from finetune.families.base import Family
from finetune.families.drawing import ImageCondition
from finetune.families.registry import FAMILIES
from finetune.families.source import load_family
from finetune.jobs import train as job
from finetune.jobs.export import export_run
from finetune.jobs.open import open_exported, open_result, open_run
from finetune.methods.embeddings import embeddings
from finetune.methods.textual_inversion import TextualInversion
from finetune.runs.folder import RunFolder
from finetune.sampling.draw import draw
from finetune.sampling.settings import Sampling

NAMES = list(FAMILIES)
KINDS = {
    "textual_inversion": {"kind": "textual_inversion", "vectors": 2},
    "pivotal": {"kind": "pivotal", "vectors": 2, "rank": 2},
}
KEYS = {
    "sd1": {"emb_params": 16},
    "sd2": {"emb_params": 16},
    "sdxl": {"clip_l": 16, "clip_g": 24},
    "sdxl-refiner": {"clip_g": 24},
    "sd3": {"clip_l": 16, "clip_g": 24},
    "flux": {"clip_l": 16},
}
READ_BY_DIFFUSERS = [name for name in NAMES if name != "sd3"]  # its pipeline has no reader of embeddings
ABOUT = {"title": "x", "resolution": "32x32", "trigger_phrase": "x"}


def recipe(base: Path, photos: Path, kind: str, **sections: dict):
    values = {
        "base": str(base),
        "data": {"photos": str(photos), "class_noun": "mug", "token": "zwx", "caption_dropout": 0.2},
        "method": KINDS[kind],
        "optim": {"kind": "adamw", "lr": 3e-2, "text_lr": 1e-1},
        "run": {"steps": 2, "checkpoint_every": 1, "name": "mine"},
        "sample": {"count": 1, "steps": 1, "prompts": ["a photo of {token}", "a photo of a {noun}"]},
        "export": {"dtype": "fp32"},
    }
    return parse_recipe(values | sections)


Runs = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The photos of `runs`."""
    return write_photos(tmp_path_factory.mktemp("shown") / "photos")


@pytest.fixture(scope="module")
def runs(tiny_bases: dict[str, Path], shown: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The finished run of a family and a kind, to be looked at alone: trained when a test first asks for it."""
    folder = tmp_path_factory.mktemp("runs")

    @cache
    def run(name: str, kind: str) -> Path:
        return job.train(recipe(tiny_bases[name], shown, kind), folder / f"{name}-{kind}")

    return run


def every_weight(family: Family) -> dict[str, torch.Tensor]:
    return {f"{part}.{n}": p.detach().clone() for part, m in family.parts.items() for n, p in m.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_from_photos_to_files(name: str, kind: str, runs: Runs, shown: Path) -> None:
    """The page, the exports and their keys; pictures "after" are drawn from the files and are those of the run."""
    run = runs(name, kind)
    info = json.loads((run / "run.json").read_text())
    assert (info["token"], info["captions"][0]) == ("<zwx>", ["a photo of <zwx> mug"])
    exported = {item["format"]: item for item in json.loads((run / "exports.json").read_text())}
    assert all(check.startswith("ok: ") for item in exported.values() for check in item["checks"])
    pivotal = kind == "pivotal"
    assert exported.keys() == {"embedding", *({"kohya", "diffusers", "peft"} if pivotal else ())}
    file = run / exported["embedding"]["path"]
    assert file.name == ("mine-embedding.safetensors" if pivotal else "mine.safetensors")
    assert {key: tuple(value.shape) for key, value in load_file(file).items()} == {
        key: (2, width) for key, width in KEYS[name].items()
    }
    with safe_open(file, "pt") as held:
        metadata = held.metadata()
    assert metadata["modelspec.architecture"].endswith("/textual-inversion")
    assert metadata["modelspec.trigger_phrase"] == file.stem
    by_diffusers = any("diffusers reads it back" in check for check in exported["embedding"]["checks"])
    assert by_diffusers == (name in READ_BY_DIFFUSERS)
    again, _ = open_result(run)
    given = ImageCondition(
        unit(make_crops(scan(shown)[0], (32, 32), "center", 1, False, 0)[0].pixels())
    )  # the refiner reads it
    for number, image in enumerate(
        draw(
            again, ["a photo of <zwx>", "a photo of a mug"], Sampling(steps=1, size=32), seeds=[0, 0], condition=given
        )
    ):
        with Image.open(run / "samples" / "after" / f"{number:02d}-0.png") as held:
            apart = torch.tensor([a - b for a, b in zip(held.tobytes(), image.tobytes(), strict=True)])
            assert int(apart.abs().max()) <= 1  # the LoRA is merged in the file's reading
    assert "&lt;zwx&gt;" in (run / "report.html").read_text()
    sidecar = json.loads((run / "exports" / "mine.json").read_text())
    assert sidecar["activation text"] == f"{file.stem} mug"


@pytest.mark.parametrize("name", READ_BY_DIFFUSERS)
def test_diffusers_gives_the_trained_models_conditions_and_pictures(
    name: str, runs: Runs, tiny_bases: dict[str, Path]
) -> None:
    """diffusers' own pipeline, tokenizers, loader and prompt encoding; ours is asked for nothing but its files."""
    run = runs(name, "pivotal")
    trained, _ = open_result(run)
    kind = getattr(diffusers, FAMILIES[name].pipeline_class)
    extra = {"safety_checker": None} if name in ("sd1", "sd2") else {}
    pipeline = kind.from_pretrained(tiny_bases[name], **extra)
    pipeline.set_progress_bar_config(disable=True)
    rows = load_file(run / "exports" / "mine-embedding.safetensors")
    if name in ("sdxl", "sdxl-refiner"):
        for key, number in (("clip_l", ""), ("clip_g", "_2"))[name == "sdxl-refiner" :]:
            encoder, tokenizer = getattr(pipeline, f"text_encoder{number}"), getattr(pipeline, f"tokenizer{number}")
            pipeline.load_textual_inversion(rows[key], token="<zwx>", text_encoder=encoder, tokenizer=tokenizer)
    else:
        path = run / "exports"
        pipeline.load_textual_inversion(str(path), weight_name="mine-embedding.safetensors", token="<zwx>")
    lora = "mine-diffusers/pytorch_lora_weights.safetensors" if name == "flux" else "mine.safetensors"
    pipeline.load_lora_weights(run / "exports", weight_name=lora)
    t5 = {"prompt_2": "a photo of mug on the beach"} if name == "flux" else {}
    size = {"num_inference_steps": 2, "output_type": "np"} | trained.drawing.inputs(32, 1, 2, None)
    if name == "flux":
        size["max_sequence_length"] = trained.text_length(1)

    def drawn(pipe: object, **more: str):
        made = torch.Generator().manual_seed(3)
        return torch.tensor(pipe(prompt="a photo of <zwx> on the beach", generator=made, **size, **more).images)

    theirs, ours = drawn(pipeline, **t5), drawn(trained.drawing.pipeline())
    clean = drawn(load_family(str(tiny_bases[name])).drawing.pipeline())
    assert float((theirs - ours).abs().max()) < 1e-4
    assert float((clean - ours).abs().max()) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_goes_on_bit_for_bit(
    kind: str, tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    """Killed while the third step of four is logged, which is beyond the pivot."""
    steps, unchecked = {"steps": 4, "checkpoint_every": 1, "ema": 0.9}, {"dtype": "fp32", "verify": "off"}
    made = recipe(tiny_bases["sdxl"], photos, kind, run=steps, export=unchecked)
    resumed_is_the_unbroken_run(made, tmp_path)


def test_the_base_is_bit_identical_after_a_run(runs: Runs, tiny_bases: dict[str, Path]) -> None:
    after = every_weight(open_run(RunFolder(runs("sdxl", "textual_inversion")))[0])
    before = every_weight(load_family(str(tiny_bases["sdxl"])))
    new = {name for name in after if name.endswith(".new.rows")}
    renamed = {name.replace(".base_layer.", "."): value for name, value in after.items() if name not in new}
    assert len(new) == 2
    assert renamed.keys() == before.keys()
    assert all(torch.equal(value, renamed[name]) for name, value in before.items())


def test_checkpoints_hold_the_rows_only(runs: Runs) -> None:
    run = runs("sd1", "textual_inversion")
    (held,) = load_file(run / "checkpoints" / "step-000002" / "trained.safetensors").values()
    assert (tuple(held.shape), held.dtype) == ((2, 16), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sd1", "sdxl", "flux"])
def test_planted_faults_are_found(name: str, dtype: torch.dtype, tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    def named() -> tuple[Family, TextualInversion]:
        family = load_family(str(tiny_bases[name]))
        method = TextualInversion(vectors=2)
        method.add_subject_token(family, "zwx", "mug")
        torch.manual_seed(1)
        for rows in method.attach(family, 0).values():
            torch.nn.init.normal_(rows)
        return family, method

    family, method = named()
    path, request = tmp_path / "x.safetensors", Request(tmp_path, "x", "fp16", ABOUT)

    bench, words = bench_of(tiny_bases[name], dtype), NewWords(method, embeddings(family), "mug")
    item = export_embedding(words, family, request, bench)
    assert item.ok, item.checks
    assert item.modules == 2 * len(KEYS[name])
    values = read_embedding(path, name)
    part = list(values)[-1]
    for wrong in (values[part].flip(0), values[part] * 1.01):
        check = read_by_diffusers(method, values | {part: wrong}, path, "mug", bench)
        assert not check.passed, check
    write = embedding.save_tensors
    try:
        embedding.save_tensors = lambda file, tensors, about: write(  # type: ignore[assignment]
            file, {key: value.flip(0) for key, value in tensors.items()}, about
        )
        assert not export_embedding(words, family, request, bench).ok
    finally:
        embedding.save_tensors = write  # type: ignore[assignment]


@pytest.mark.parametrize("legacy", [False, True])
def test_a_config_that_misplaces_the_pooled_vector_is_said(
    legacy: bool, tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    """SDXL's second encoder says `eos_token_id: 2`: diffusers then needs the true one set, and the check says so."""
    base = tmp_path / "base"
    shutil.copytree(tiny_bases["sdxl"], base)
    file = base / "text_encoder_2" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | ({"eos_token_id": 2} if legacy else {})))
    run = job.train(recipe(base, photos, "textual_inversion"), tmp_path / "run")
    (item,) = json.loads((run / "exports.json").read_text())
    assert all(check.startswith("ok: ") for check in item["checks"])
    assert any("fix of its text encoder's eos_token_id" in check for check in item["checks"]) == legacy


def test_a_file_for_another_base_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"emb_params": torch.zeros(1, 16)}, path)
    with pytest.raises(BadInput, match="holds emb_params but an embedding for sdxl holds clip_l and clip_g"):
        read_embedding(path, "sdxl")
    path.write_bytes(b"no")
    with pytest.raises(BadInput, match="is not a complete safetensors file"):
        read_embedding(path, "sd1")


def test_the_command_exports_and_draws(
    tiny_bases: dict[str, Path], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = job.train(recipe(tiny_bases["sd1"], photos, "pivotal", export={"formats": ["kohya"]}), tmp_path / "run")
    assert (run / "samples" / "after" / "00-0.png").is_file()  # the word begins as its initialiser there
    code, message = main.run(["export", "run", "--to", "embedding"])
    assert (code, message) == (0, "")
    listed = {item["format"] for item in json.loads((run / "exports.json").read_text())}
    assert listed == {"kohya", "embedding"}
    assert main.run(["sample", "run", "-p", "a photo of <zwx>", "--steps", "1", "--count", "1"])[0] == 0
    code, message = main.run(["export", "run", "--to", "folder"])
    assert code != 0
    assert "can't hold an adapter or new embeddings" in message


def test_pictures_come_from_the_embeddings_file(tiny_bases: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    run = RunFolder(job.train(recipe(tiny_bases["sd1"], photos, "textual_inversion"), tmp_path / "run"))
    family, _ = open_run(run)
    exported = export_run(run, family)
    path = exported[0].path
    save_file({"emb_params": torch.full((2, 16), 0.5)}, path)
    shown = open_exported(run, exported, torch.float32)
    assert shown is not None
    (rows,) = [p for n, p in shown.parts["text_encoder"].named_parameters() if n.endswith("new.rows")]
    assert torch.equal(rows, torch.full((2, 16), 0.5))
