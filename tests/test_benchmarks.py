"""The programs in benchmarks/ with the smallest real pieces: a change elsewhere must not break them unseen."""

from __future__ import annotations

import importlib
import json
import mmap
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks"
PROGRAMS = sorted(file.stem for file in FOLDER.glob("*.py") if "__main__" in file.read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """The programs set variables, and find one another beside themselves."""
    before = dict(os.environ)
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "tiny_base"))
    monkeypatch.syspath_prepend(str(FOLDER))
    os.environ["FINETUNE_CACHE"] = str(tmp_path / "cache")
    yield
    os.environ.clear()
    os.environ.update(before)


def program(name: str) -> ModuleType:
    found = importlib.import_module(name)
    assert Path(str(found.__file__)).parent in (FOLDER, ROOT / "examples" / "tiny_base")
    return found


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_says_what_it_is_for(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = program(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        found.main()
    assert end.value.code == 0
    assert str(found.__doc__).splitlines()[0] in capsys.readouterr().out


# dreambooth_claims.py


def smooth(seed: int) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((32, 32), Image.Resampling.BICUBIC)


def test_near_copies_of_photos_are_counted(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    from finetune.families.source import load_family

    for seed in range(4):
        smooth(seed).save(tmp_path / f"{seed}.png")
    family = load_family(str(tiny_bases["sd1"]))
    drawn = [smooth(2), smooth(50), smooth(1).transpose(Image.Transpose.FLIP_LEFT_RIGHT), smooth(51)]
    copies = program("claims_measure").copies
    assert copies(drawn[:2], tmp_path, family) == 0.5
    assert copies(drawn[3:], tmp_path, family) == 0


def rendered(facts: Any) -> Image.Image:
    looks, world = program("looks"), program("world")
    rng = np.random.default_rng(7)
    return world.render(looks.pose(looks.look_of(facts, rng), facts.place, rng))


def test_renders_of_the_subject_itself_have_the_best_figures() -> None:
    claims, looks = program("claims_measure"), program("looks")
    name, other = "mug", next(name for name, look in looks.SUBJECTS.items() if look.kind == "house")
    sets = {place: [looks.subject_picture(name, k, place) for k in range(2)] for place in claims.UNSEEN}
    sets |= {each: [rendered(facts) for facts in facts_of] for each, facts_of in claims.asked("mug").items()}
    sets |= {"own": [looks.subject_picture(name, k) for k in range(6)]}
    sets |= {key: [looks.subject_picture(other, k) for k in range(4)] for key in ("plain", "empty")}
    row = claims.measure(sets, name) | {"subject": name, "cpu_seconds": 1.0, "real_likeness": 1.0}
    row |= {f"kept_at_{place}": 1.0 for place in claims.UNSEEN}
    found = claims.derive(row, row | {"class_likeness": 0.2})
    assert found["is the subject"] >= 0.8
    assert found["gain"] >= 0.9
    assert [found[f"{place}: drawn"] for place in claims.UNSEEN] == [1.0] * len(claims.UNSEEN)
    assert found["“a noun” is the subject"] == 0
    assert found["“” own class"] == 0
    assert min(row["own_right"], row["others_right"]) >= 0.8
    assert (found["own class"], found["others"], found["diversity"]) == (1, 1, 1)  # of its own


def claims_rows() -> list[dict[str, Any]]:
    """The stored rows of the newest base and judge, as far as the base's own row is there."""
    lines = (FOLDER / "claims.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    rows = [row for row in rows if all(row[name] == rows[-1][name] for name in ("base", "judge"))]
    there = {(row["subject"], row["seed"]) for row in rows if row["case"] == "base"}
    return [row for row in rows if (row["subject"], row["seed"]) in there]


def test_every_stored_row_of_the_claims_is_in_their_tables() -> None:
    claims = program("dreambooth_claims")
    rows = {claims.key_of(row): row for row in claims_rows()}
    text = program("claims_page").tables(rows)
    held = {subject for subject, _, case, _ in rows if case == "lora"} & set(program("looks").HELD_OUT)
    assert all(f"| {subject} |" in text for subject in held)
    bases = {(subject, seed): row for (subject, seed, case, _), row in rows.items() if case == "base"}
    runs = [row for row in rows.values() if row["case"] != "base" and row["verdicts"]]
    verdicts = program("verdicts")
    compared = verdicts.compared(runs, bases)
    table = verdicts.listed(compared)
    assert all(f"| {row['subject']} | {row['seed']} | {row['case']} |" in table for row in runs)
    disagree = [run for run in compared if not run.agrees("good or not")]
    total = len(runs) - len(disagree)
    counts = re.findall(r"(\d+) of \d+", verdicts.agreement(compared).splitlines()[-1])
    assert sum(map(int, counts)) == total


# style.py


@pytest.mark.slow
def test_drawings_have_their_style_and_other_images_have_not(monkeypatch: pytest.MonkeyPatch) -> None:
    style = program("style")
    monkeypatch.setattr(style, "EACH", 1)
    plain = [rendered(program("style_drawings").facts_of(kind, n)) for kind, _, n in style.scenes()]
    found = style.measure(style.of_artist("blue lines", 7000), plain, plain, "blue lines")
    assert found["style"] > 0.8
    assert found["plain"] == pytest.approx(0, abs=1e-6)
    assert found["right"] > 0.8


# peers.py


def test_a_step_of_a_peer_is_the_difference_of_two_runs_by_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peers = program("peers")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"")
    job = peers.Job("base", tmp_path / "photos")
    script = tmp_path / "train_network.py"
    trainers = {"ours": peers.ours(job), "diffusers": peers.diffusers(job, script, sys.executable)}
    trainers["kohya"] = peers.kohya(job, tmp_path, sys.executable)

    def cost_of(command: list[str], log: Path) -> Any:
        steps = next(
            int(word.split("=")[1]) for word in command if word.startswith(("--max_train_steps", "run.steps"))
        )
        own = 1 if "finetune" in command else 2
        return peers.Cost(own * (3 + 0.5 * steps), 7e6)

    with monkeypatch.context() as patch:
        patch.setattr(peers, "cost_of", cost_of)
        found = peers.measure(trainers, (4, 24), 3, tmp_path)
    assert found == {"ours": [0.5, 5.0, 7.0], "diffusers": [1.0, 10.0, 7.0], "kohya": [1.0, 10.0, 7.0]}
    assert "| kohya | 1.000 | 0.50 | 10.0 | 0.50 | 7 |" in peers.table(found, 4)
    script.write_text("raise SystemExit('no such flag')", encoding="utf-8", newline="\n")
    with pytest.raises(SystemExit, match="no such flag"):
        peers.measure({"kohya": trainers["kohya"]}, (4, 24), 1, tmp_path)


# job.py, step.py, growth.py


def test_the_bare_job_trains_what_it_saves(
    tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_bases["sd1"], tmp_path / "34M")  # in place of the larger one: what is there is not written
    job = program("job")
    monkeypatch.setattr(job, "SIDE", 32)
    assert job.base_of("34M", tmp_path) == str(tmp_path / "34M")
    seconds = job.floor_job("34M", tmp_path, 1)
    assert {"Base", "Latents", "Training", "Export"} <= set(seconds)
    saved = load_file(tmp_path / "floor.safetensors")
    assert any(name.endswith("lora_B.weight") and value.any() for name, value in saved.items())


def test_our_step_is_timed_beside_the_floors(
    tiny_bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finetune.training.readings import Readings
    from finetune.training.trainer import Trainer

    for owner, name in ((Readings, "rows"), (Trainer, "_report")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # put back afterwards: the benchmark replaces it
    step, done = program("step"), list[int]()
    spent = step.timed_protection()
    assert step.our_run(str(tiny_bases["sd1"]), tmp_path, 2, done.append) > 0
    assert done == [1, 2]
    assert len(spent) >= 4  # both, in every step
    step.floor_step(str(tiny_bases["sd1"]))()


def test_latents_that_are_made_up_are_found_by_the_run(tmp_path: Path) -> None:
    growth = program("growth")
    pictures = growth.make_pictures(tmp_path / "pictures", 4)
    growth.make_up(pictures, None)
    made = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.safetensors")}
    assert made
    growth.warm(pictures, None)
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").rglob("*.safetensors")} == made


def test_the_page_shows_the_rows_of_steps() -> None:
    step = program("step")
    rows = [json.loads(line) for line in step.ROWS.read_text(encoding="utf-8").splitlines()]
    assert step.table(rows) in (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the system tells mapped files apart on Linux")
def test_own_memory_leaves_mapped_files_out(tmp_path: Path) -> None:
    memory, size = program("memory"), 64 * 2**20
    file = tmp_path / "mapped"
    file.write_bytes(bytes(size))
    before = memory.own_memory()
    with (
        memory.OwnPeak() as mapping,
        file.open("rb") as opened,
        mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ) as at,
    ):
        assert sum(at[::4096]) == 0  # every page is in memory
        time.sleep(3 * memory.EVERY)
    with memory.OwnPeak() as taking:
        taken = bytearray(size)
        time.sleep(3 * memory.EVERY)
        del taken
    assert mapping.peak - before < size / 2
    assert taking.peak - before > size / 2


def test_the_page_shows_the_newest_rows_of_growth() -> None:
    growth = program("growth")
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert growth.table(ROOT / "benchmarks" / "growth.jsonl") in page


# gpu.py: what its slow tests run, in little


def test_the_loop_is_measured_on_a_cpu(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    import torch

    gpu = program("gpu_speed")
    shutil.copytree(tiny_bases["sd1"], tmp_path / "bases" / "sd1")
    case = gpu.prepared(program("gpu_common").Where(torch.device("cpu"), True, tmp_path), "SD 1.5", "lora")
    case.side, case.batch = 32, 1
    row = program("gpu_loops").our_loop(case)
    assert row["ours_ms"] > 0
    assert gpu.counted(gpu.bare_step(case)) > 0


# prepare_many.py


@pytest.mark.parametrize(("part", "code"), [("check", 1), ("dedupe", 0), ("convert to webdataset", 0)])
def test_each_command_with_many_images_ends_well(
    part: str, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`check` ends with 1: images of 64 pixels are too small."""
    many = program("prepare_many")
    many.make_images(tmp_path / "images", 3, 64)
    many.inside([word.format(images=tmp_path / "images", out=tmp_path / "out") for word in many.PARTS[part]])
    assert capsys.readouterr().out.startswith(f"exit {code}, ")
    assert part == "check" or any((tmp_path / "out").iterdir())
