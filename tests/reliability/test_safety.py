"""Safe by default: no pickle, no code of others, nothing outside the run folder, nothing told unasked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from finetune import load_recipe, train
from finetune.core.errors import BadInput
from finetune.core.files import sha256
from finetune.report.html import write_report
from finetune.runs.folder import RunFolder

ROOT = Path(__file__).parents[2]
SETTINGS = (
    "data.class_noun=mug", "prior.count=2", "prior.steps=1", "sample.steps=1", "sample.count=1", "run.steps=2",
    "sample.prompts=['a photo of {token} {noun}']", "optim.lr=1e-2",
)  # fmt: skip
TEXT = {".json", ".jsonl", ".yaml", ".html", ".md", ".txt", ".lock", ".jinja"}


@pytest.fixture(scope="module")
def runs(tiny_bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LoRA and a full run below a folder with a telling name, from photos with telling captions."""
    import shutil

    from PIL import Image

    home = tmp_path_factory.mktemp("jane-doe")
    base, photos = home / "models" / "mine", home / "pictures"
    shutil.copytree(tiny_bases["sd1"], base)
    photos.mkdir()
    for number in range(3):
        Image.effect_noise((48, 48), 90).convert("RGB").save(photos / f"{number}.png")
        (photos / f"{number}.txt").write_text("{token} mug in night city")
    made = {}
    for name, recipe in (("lora", "dreambooth-lora"), ("full", "dreambooth-full")):
        settings = [f"base={base}", f"data.photos={photos}", f"run.name={name}", *SETTINGS]
        made[name] = train(load_recipe(recipe, settings), home / "runs" / name)
    return made


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_nothing_that_is_written_is_a_pickle(kind: str, runs: dict[str, Path]) -> None:
    for file, content in contents(runs[kind]).items():
        assert file.suffix in TEXT | {".safetensors", ".png"}, file
        assert not content.startswith((b"\x80\x02", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")), file


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_what_is_passed_on_tells_no_folders_users_or_captions(kind: str, runs: dict[str, Path]) -> None:
    run = runs[kind]
    passed_on = contents(run / "exports") | contents(run / "samples") | {run / "report.html": b""}
    passed_on[run / "report.html"] = (run / "report.html").read_bytes()
    assert len(passed_on) > 4
    for file, content in passed_on.items():
        for secret in (b"jane-doe", b"in night city", str(Path.home()).encode() + b"/", str(ROOT).encode()):
            assert secret not in content, (file, secret)


def test_captions_are_shown_when_asked_for(runs: dict[str, Path]) -> None:
    page = runs["lora"] / "report.html"
    assert "report RUN --captions" in page.read_text()
    assert "in night city" in write_report(runs["lora"], with_captions=True).read_text()
    write_report(runs["lora"])


@pytest.mark.parametrize("name", ["../../elsewhere", "/tmp/elsewhere", "a/b", "..", ".hidden", "a\\b", ""])
def test_a_name_leads_out_of_no_folder(name: str, photos: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"run\.name"):
        load_recipe("dreambooth-lora", [f"data.photos={photos}", "data.class_noun=mug", f"run.name={name!r}"])


def test_an_adapters_metadata_leads_nowhere(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """Names inside a file that somebody sent are never used as paths."""
    from finetune.cli.main import run

    part = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    width = json.loads((tiny_bases["sd1"] / "unet" / "config.json").read_text())["block_out_channels"][-1]
    tensors = {
        f"{part}.lora_down.weight": torch.ones(2, width),
        f"{part}.lora_up.weight": torch.ones(width, 2) * 1e-3,
        f"{part}.alpha": torch.tensor(2.0),
    }
    metadata = {"ss_output_name": "../../../evil", "modelspec.title": "/tmp/evil"}
    save_file(tensors, tmp_path / "sent.safetensors", metadata)
    out = tmp_path / "deep" / "er" / "out"
    arguments = ["sample", str(tmp_path / "sent.safetensors"), "-p", "../../../evil", "--base", str(tiny_bases["sd1"])]
    assert run([*arguments, "--steps", "1", "--count", "1", "--out", str(out)]) == (0, "")
    assert {file.parent for file in tmp_path.rglob("*.png")} == {out}


def test_a_bases_own_code_is_not_run(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    """`auto_map` names a Python file beside the weights, for libraries that trust remote code."""
    import shutil

    from finetune.families.source import load_family

    base = tmp_path / "base"
    shutil.copytree(tiny_bases["sd1"], base)
    code = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\nclass Evil: pass\n"
    for part in ("text_encoder", "unet"):
        (base / part / "evil.py").write_text(code)
        config = json.loads((base / part / "config.json").read_text())
        (base / part / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "evil.Evil"}}))
    load_family(str(base))
    assert not (tmp_path / "ran").exists()


GUARD = """
import sys
def hook(event, arguments):
    if event == "pickle.find_class" and not arguments[0].startswith(("multiprocessing", "torch._C")):
        print("PICKLE", arguments, flush=True)
sys.addaudithook(hook)
from finetune.cli.main import main
main()
"""


@pytest.mark.slow
def test_no_pickle_is_read_in_a_run_or_its_resumption(
    tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    """Python's own audit event, raised for every class that a pickle names."""
    arguments = [f"base={tiny_bases['sd1']}", f"data.photos={photos}", f"run.dir={tmp_path / 'run'}", *SETTINGS]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for more in ([], ["run.steps=3"]):
        command = [sys.executable, "-c", GUARD, "train", "dreambooth-lora", *arguments, *more]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
        assert "PICKLE" not in done.stdout, done.stdout


def test_the_same_run_twice_is_the_same_bytes(runs: dict[str, Path], tmp_path: Path) -> None:
    again = train(RunFolder(runs["lora"]).recipe, tmp_path / "again")
    assert sha256(again / "adapter" / "trained.safetensors") == sha256(
        runs["lora"] / "adapter" / "trained.safetensors"
    )
