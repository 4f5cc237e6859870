"""Every command in README.md and docs/ is run here, in the order in which a reader meets it; links lead somewhere."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import write_companions
from networks import write_clip, write_dino
from PIL import Image, ImageOps
from test_data_sets import write_folder, write_parquet, write_shards

from data_tools.__main__ import main as data_tools
from finetune.adapters.inspection import open_adapter
from finetune.cli import main

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SHORT = (
    "run.steps=2", "sample.steps=1", "sample.count=1", "sample.prompts=['a photo of {token}']", "optim.warmup=0",
    "optim.lr=1e-3",
)  # fmt: skip
FEW_CLASS_IMAGES = ("prior.count=2", "prior.others=null", "prior.steps=1")
# What `.ci/run` and `make` run themselves; the demo has a test of its own (jobs/test_demo.py).
BY_MAKE = (
    "make demo", "make test", "make check", "python3 -m venv .venv",
    '.venv/bin/pip install -c constraints.txt -e ".[dev]"',
    ".venv/bin/finetune demo", ".venv/bin/python -m pytest -n 2",
)  # fmt: skip


def commands(page: Path) -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = [line.split("  #")[0].split(" # ")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


# recipes -> their base, where it is not Stable Diffusion 1.5
BASES: dict[str, Any] = {
    "sdxl-lora": "sdxl",
    "inpainting-lora": ("sd1", "inpaint"), "depth-lora": ("sd2", "depth"), "edit-lora": ("sd1", "edit"),
}  # fmt: skip
NO_PRIOR = ("depth-lora", "edit-lora")


def shortened(line: str, photos: Path, bases: dict[Any, Path]) -> list[str]:
    """The command on small things: the test's photos and random bases, two steps; everything else as it is written."""
    for folder in ("PHOTOS", "DRAWINGS", "PAIRS"):
        line = line.replace(folder, str(photos))
    words = shlex.split(line)
    words = [word.replace("stable-diffusion-v1-5/stable-diffusion-v1-5", str(bases["sd1"])) for word in words]
    words = [re.sub(r"run\.steps=\d+", "run.steps=3", word) for word in words]
    if words[1] == "train" and words[2] in BASES:
        words.append(f"base={bases[BASES[words[2]]]}")
    if words[1] in ("train", "dreambooth") and not words[2].endswith("recipe.yaml"):
        words += [*SHORT, *(() if words[2] in NO_PRIOR else FEW_CLASS_IMAGES)]
    if words[1] == "evaluate":
        networks = (f"--{kind}={bases[kind]}" for kind in ("dino", "clip"))
        words += [*networks, "--count=2", "--class-count=2", "--steps=1"]
    if words[1] == "sample":
        words += ["--steps", "2" if "--strength" in words else "1"]
    return words


def run(words: list[str]) -> int:
    if words[:3] == ["python", "-m", "data_tools"]:
        return data_tools(words[3:])
    assert words[0] == "finetune", words
    if words[1] == "ui":  # as a person's Ctrl-C, once it serves
        threading.Timer(5, signal.raise_signal, [signal.SIGINT]).start()
    code, message = main.run(words[1:])
    print(message)
    return code


def write_tagged(photos: Path, parquet: Path) -> None:
    """A caption with tags beside each photo, and a file of `datasets` with the same."""
    files = sorted(photos.glob("*.png"))
    for file in files:
        file.with_suffix(".txt").write_text("sks, watermark, tree")
    rows = datasets.Dataset.from_dict({"image": list(map(str, files)), "text": ["sks, tree"] * len(files)})
    rows.cast_column("image", datasets.Image()).to_parquet(str(parquet))


def write_kohya(photos: Path, folder: Path) -> None:
    """img/10_sks mug with captions that the tiny base can read, and reg/1_mug."""
    shutil.copytree(photos, folder / "img" / "10_sks mug")
    for file in (folder / "img").rglob("*.txt"):
        file.write_text("sks, a, mug, dog")
    (folder / "reg" / "1_mug").mkdir(parents=True)
    for file in photos.glob("*.png"):
        ImageOps.invert(Image.open(file)).save(folder / "reg" / "1_mug" / file.name)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_runs(
    page: Path, photos: Path, tiny_bases: dict, wide_bases: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if page.name == "ui.md":
        pytest.importorskip("starlette", reason="the extra ui is not installed: pip install 'finetune-diffusion[ui]'")
    networks = {}
    if page.name == "evaluation.md":
        networks = {
            "dino": write_dino(tmp_path / "networks" / "dino"),
            "clip": write_clip(tmp_path / "networks" / "clip"),
        }
    if page.name == "data.md":
        write_tagged(photos, tmp_path / "captioned.parquet")
        write_kohya(photos, tmp_path / "kohya")
    if page.name == "inputs.md":
        write_companions(photos)
        for name in ("photo", "mask", "depth"):
            shutil.copy(photos / ("0.depth.png" if name == "depth" else "0.png"), f"{name}.png")
    if page.name == "data-sources.md":
        write_parquet(photos, Path("mugs.parquet"))
        write_shards(photos, Path("shards"))
        write_folder(photos, Path("pictures"))
    for line in commands(page):
        if line in BY_MAKE:
            continue
        small = "data_tools check" in line or "data check" in line  # the test's photos are smaller than 512 pixels
        small = small and "renamed" not in line  # whose base reads 32 pixels
        expected = 1 if small or "tokens check sks" in line else 0
        assert run(shortened(line, photos, tiny_bases | wide_bases | networks)) == expected, line


def test_the_makefile_runs_the_lines_that_readme_shows() -> None:
    makefile = (
        (ROOT / "Makefile")
        .read_text(encoding="utf-8")
        .replace("$(VENV)", ".venv")
        .replace("pip install -q", "pip install")
    )
    for line in BY_MAKE[4:]:
        assert line in makefile, line
    last = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1]
    assert {"check", "test"} <= set(last.partition("#")[0].removeprefix("make ").split())


def test_every_tool_for_photos_is_named_on_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        data_tools(["--help"])
    names = re.findall(r"^    (\w+) ", capsys.readouterr().out, flags=re.MULTILINE)
    assert len(names) >= 2
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    assert [name for name in names if f"data_tools {name}" not in pages] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing


@pytest.mark.slow
def test_the_api_example_runs(photos: Path, tmp_path: Path) -> None:
    example = ROOT / "examples" / "train_api.py"
    command = [sys.executable, str(example), str(photos), *SHORT, *FEW_CLASS_IMAGES]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "api" / "beach.png").is_file()
    assert (tmp_path / "runs" / "api" / "report.html").is_file()


@pytest.mark.slow
def test_a_loop_of_your_own_writes_a_file_that_is_whole(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "own_loop.py")],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": loss ") == 20
    adapter, _ = open_adapter(tmp_path / "own_loop" / "mug.safetensors", "tiny")
    assert adapter.count > 0
    assert (tmp_path / "own_loop" / "beach.png").is_file()
