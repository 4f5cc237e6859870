"""A run that goes on has the photos, captions, base and packages that it began with, or names what changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from ends import weights
from PIL import Image
from test_train import LORA, settings

from finetune.cli.main import run as command
from finetune.config.load import load_recipe, parse_recipe
from finetune.core.errors import BadInput
from finetune.families.digests import base_files, forget_hashes
from finetune.jobs import pins
from finetune.jobs import train as job
from finetune.runs import inputs
from finetune.runs.folder import RunFolder
from finetune.runs.inputs import read_inputs
from finetune.testing.kill import killed_at

Change = Callable[[Path], None]


@pytest.fixture(scope="module")
def begun(tiny_bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `photos` (two with a caption, one with a mask), `classes`, `base`, a `whole` run and one that was
    killed at its third step."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(tiny_bases["sd1"], folder / "base")
    for kind in ("photos", "classes"):
        (folder / kind).mkdir()
        for number, colour in enumerate(((200, 30, 30), (30, 200, 30), (30, 30, 200))):
            image = Image.new("RGB", (48, 40), colour)
            ink = (250, 250, 250) if kind == "photos" else (20, 20, 20)
            image.paste(ink, (8 * number, 8, 8 * number + 12, 24))
            image.save(folder / kind / f"{number}.png")
    Image.new("L", (48, 40), 255).save(folder / "photos" / "1.mask.png")
    (folder / "photos" / "0.txt").write_text("a photo of {token} mug in red", encoding="utf-8")
    recipe = parse_recipe(
        settings(
            folder / "base",
            folder / "photos",
            LORA,
            data={"photos": str(folder / "photos"), "class_noun": "mug", "token": "zwx", "masks": "auto"},
            prior={"kind": "class_images", "folder": str(folder / "classes")},
            run={"steps": 4, "batch_size": 1, "checkpoint_every": 1},
            export={"verify": "off"},
        )
    )
    job.train(recipe, folder / "whole")
    with killed_at(3):
        job.train(recipe, folder / "stopped")
    return folder


@pytest.fixture
def place(begun: Path, tmp_path: Path) -> Path:
    """A copy of it all, in another place: the stopped run's recipe names the places here."""
    shutil.copytree(begun, tmp_path / "here")
    recipe = tmp_path / "here" / "stopped" / "recipe.yaml"
    recipe.write_text(recipe.read_text(encoding="utf-8").replace(str(begun), str(tmp_path / "here")), encoding="utf-8")
    return tmp_path / "here"


def edit(folder: Path) -> None:
    with Image.open(folder / "photos" / "1.png") as image:
        changed = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    changed.save(folder / "photos" / "1.png")


def swap_weight(folder: Path) -> None:
    file = folder / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-4:] = b"\x00\x00\x80\x3f"
    file.write_bytes(bytes(content))


CHANGES: dict[str, tuple[Change, str]] = {
    "edited": (edit, "the photo 1.png is not the same image"),
    "deleted": (lambda at: (at / "photos" / "2.png").unlink(), "the photo 2.png is gone"),
    "added": (lambda at: Image.new("RGB", (40, 40), "red").save(at / "photos" / "9.png"), "the photo 9.png is new"),
    "caption": (
        lambda at: (at / "photos" / "0.txt").write_text("a {token} mug", encoding="utf-8") and None,
        "the caption of 0.png changed",
    ),
    "caption-added": (
        lambda at: (at / "photos" / "2.txt").write_text("a {token} mug", encoding="utf-8") and None,
        "the caption of 2.png changed",
    ),
    "mask": (
        lambda at: Image.new("L", (48, 40), 200).save(at / "photos" / "1.mask.png"),
        "the mask of 1.png changed",
    ),
    "class-image": (
        lambda at: Image.new("RGB", (48, 40), "blue").save(at / "classes" / "1.png"),
        "1 of the class images of 'a photo of a mug' changed",
    ),
    "base": (swap_weight, "the base's file unet/diffusion_pytorch_model.safetensors changed"),
}


@pytest.mark.parametrize("name", list(CHANGES))
def test_a_change_is_refused_by_name_and_nothing_is_written_over(name: str, place: Path) -> None:
    change, said = CHANGES[name]
    change(place)
    run = place / "stopped"
    kept = {file: (run / file).read_bytes() for file in ("run.json", "inputs.json", "metrics.jsonl")}
    with pytest.raises(BadInput, match="begun with other inputs") as refused:
        job.resume(run)
    assert said in str(refused.value)
    assert "--accept-changes" in str(refused.value)
    assert (run / "inputs.json").read_bytes() == kept["inputs.json"]
    assert (run / "metrics.jsonl").read_bytes() == kept["metrics.jsonl"]


def test_a_refused_start_leaves_recipe_and_status_of_the_run(place: Path) -> None:
    """A mistyped folder stayed in RUN/recipe.yaml: the run could not be resumed any more, and was called failed."""
    run = place / "stopped"
    shutil.copytree(place / "photos", place / "others" / "photos")
    edit(place / "others")
    kept = {file: (run / file).read_bytes() for file in ("recipe.yaml", "status.json", "inputs.json")}
    overrides = [f"run.dir={run}", "run.steps=6", f"data.photos={place / 'others' / 'photos'}"]
    with pytest.raises(BadInput, match=r"the photo 1\.png is not the same image"):
        job.train(load_recipe(str(run / "recipe.yaml"), overrides))
    assert {file: (run / file).read_bytes() for file in kept} == kept
    job.resume(run)
    assert RunFolder(run).recipe.run.steps == 4


def test_another_package_is_refused_by_name(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = pins.version
    monkeypatch.setattr(pins, "version", lambda name: "0.1" if name == "peft" else real(name))
    with pytest.raises(BadInput, match=r"peft is 0\.1 and was"):
        job.resume(place / "stopped")


def test_another_precision_of_auto_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a machine with another GPU has it: the base would be held in another precision."""
    monkeypatch.setattr("finetune.training.accelerate.auto_precision", lambda: "bf16")
    with pytest.raises(BadInput, match=r"the precision is bf16 here and was fp32"):
        job.resume(place / "stopped")


def test_what_moved_or_was_renamed_is_found_by_its_content(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Photos in another folder under other names, and the base in another: the unbroken run's weights, bit for bit."""
    (place / "photos").rename(place / "moved")
    for old, new in (("0.png", "z.png"), ("0.txt", "z.txt"), ("2.png", "a.png")):
        (place / "moved" / old).rename(place / "moved" / new)
    code, said = command(["resume", str(place / "stopped")])
    assert code == 2
    assert said is not None
    assert f"finetune resume {place / 'stopped'} --photos FOLDER" in said
    assert command(["resume", str(place / "stopped"), "--photos", str(place / "moved")])[0] == 0
    wanted, found = weights(place / "whole"), weights(place / "stopped")
    assert all(torch.equal(value, found[key]) for key, value in wanted.items())


def test_accepted_changes_are_written_down_and_trained_with(place: Path) -> None:
    edit(place)
    job.resume(place / "stopped", accept_changes=True)
    record = read_inputs(place / "stopped")
    assert record is not None
    assert [item.changes for item in record.accepted] == [["the photo 1.png is not the same image"]]
    assert record.accepted[0].step == 2
    wanted, found = weights(place / "whole"), weights(place / "stopped")
    assert not all(torch.equal(value, found[key]) for key, value in wanted.items())
    job.resume(place / "stopped")  # the new photo is now the run's own


def test_a_base_with_the_same_size_and_time_is_not_taken_for_the_old_one(place: Path) -> None:
    """As `cp -p` and `rsync -t` leave it: only the file's inode or ctime tell."""
    file = place / "base" / "unet" / "diffusion_pytorch_model.safetensors"
    before, stat = base_files(place / "base"), file.stat()
    swap_weight(place)
    import os

    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = base_files(place / "base")
    assert {name for name in before if before[name] != after[name]} == {"unet/diffusion_pytorch_model.safetensors"}


def test_a_linked_part_and_a_sentencepiece_model_are_part_of_the_base(place: Path) -> None:
    (place / "base" / "unet").rename(place / "elsewhere")
    (place / "base" / "unet").symlink_to(place / "elsewhere", target_is_directory=True)
    (place / "base" / "tokenizer" / "spiece.model").write_bytes(b"one")
    files = base_files(place / "base")
    assert "unet/diffusion_pytorch_model.safetensors" in files
    assert "tokenizer/spiece.model" in files


def test_an_older_run_without_the_record_goes_on_and_has_it_then(place: Path) -> None:
    (place / "stopped" / inputs.FILE).unlink()
    job.resume(place / "stopped")
    assert read_inputs(place / "stopped") is not None


def test_a_damaged_result_is_named_and_made_again_from_the_checkpoint(place: Path) -> None:
    file = place / "whole" / "adapter" / "trained.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    recipe = place / "whole" / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(file.parents[2]), str(place)), encoding="utf-8")
    wanted = {name: value.clone() for name, value in weights(place / "whole").items()}  # not mapped to the file
    for damage in (bytes(content), file.read_bytes()[:100], b""):
        file.write_bytes(damage)
        code, said = command(["export", str(place / "whole"), "--to", "kohya"])
        assert code == 2
        assert said is not None
        assert f"finetune resume {place / 'whole'}" in said
    job.resume(place / "whole")
    found = weights(place / "whole")
    assert all(torch.equal(value, found[key]) for key, value in wanted.items())


def test_a_run_says_where_it_goes_on_and_why_it_starts_over(place: Path) -> None:
    lines: list[str] = []
    job.resume(place / "stopped", lines.append)
    assert any("resumes" in line and "after step 2" in line for line in lines)
    shutil.rmtree(place / "stopped" / "checkpoints")
    (place / "stopped" / "adapter" / "trained.safetensors").unlink()
    lines.clear()
    job.resume(place / "stopped", lines.append)
    assert any("resumes" in line and "none of its checkpoints" in line for line in lines)


def test_doctor_forgets_stored_hashes(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What no time or inode tells, such as a disk that lost a bit, is found after it."""
    stored = place / "cache" / "file-hashes.json"
    monkeypatch.setenv("FINETUNE_CACHE", str(stored.parent))
    honest = base_files(place / "base")
    name = "unet/diffusion_pytorch_model.safetensors"
    stored.write_text(stored.read_text(encoding="utf-8").replace(honest[name], "0" * 64), encoding="utf-8")
    assert base_files(place / "base")[name] == "0" * 64
    forget_hashes()
    assert base_files(place / "base") == honest


@pytest.mark.parametrize(
    "content",
    [b"", b'{"a": "', b"[]", b"null", b"\xff\xfe\0", b'{"a": 5, "b": "x"}', b"[" * 5000],
    ids=["empty", "cut", "a list", "null", "binary", "other values", "nested"],
)
def test_damaged_stored_hashes_are_made_again(content: bytes, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They stand in nobody's way: they are only there to save time."""
    stored = place / "cache" / "file-hashes.json"
    monkeypatch.setenv("FINETUNE_CACHE", str(stored.parent))
    honest = base_files(place / "base")
    whole = stored.read_bytes()
    stored.write_bytes(content)
    assert base_files(place / "base") == honest
    assert stored.read_bytes() == whole
