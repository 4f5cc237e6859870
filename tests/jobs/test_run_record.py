"""What a run's record says of many photos: their number, and the first ones of each subject."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_train import LORA, settings

from finetune.config.load import parse_recipe
from finetune.jobs import pins, run_record
from finetune.jobs.prepare import Prepared, prepare
from finetune.report.html import write_report
from finetune.report.pictures import keep_photos, shown_photos
from finetune.runs.about import about_run
from finetune.runs.folder import RunFolder
from finetune.runs.inputs import changes
from finetune.runs.record import RunRecord


def job_of(base: Path, photos: Path, others: Path) -> Prepared:
    recipe = settings(base, photos, LORA, prior={"kind": "none"}, export={"metadata": "full"})
    recipe["data"] = {
        "photos": str(photos), "class_noun": "mug", "token": "zwx",
        "subjects": [{"photos": str(others), "class_noun": "dog", "token": "vtx"}],
    }  # fmt: skip
    return prepare(parse_recipe(recipe))


def test_many_photos_are_counted_and_the_first_are_listed(
    tiny_bases: dict[str, Path], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(photos, tmp_path / "others")
    (tmp_path / "others" / "2.txt").write_text("a {token} dog, night city", encoding="utf-8", newline="\n")
    job = job_of(tiny_bases["sd1"], photos, tmp_path / "others")
    small = run_record.record_of(job)
    assert (small.count, len(small.photos), small.tags, small.content) == (6, 6, {}, "")
    monkeypatch.setattr(run_record, "LISTED", 4)
    monkeypatch.setattr(run_record, "LEAST", 2)
    monkeypatch.setattr(pins, "LISTED", 4)
    record = run_record.record_of(job)
    assert [Path(path).name for path in record.photos] == ["0.png", "1.png"] * 2
    assert (record.count, [each.photos for each in record.subjects], len(record.captions)) == (6, [3, 3], 4)
    assert record.tags["night city"] == 1  # of a photo that is not listed
    assert record.content
    shown = seen_in(tmp_path / "run", job, record)
    assert "6 photos" in shown
    assert shown.count("<img") == 4
    told = about_run(RunFolder(tmp_path / "run"))
    assert told["train_images"] == "6"
    assert json.loads(told["tag_frequency"])[record.trigger]["night city"] == 1


def seen_in(run: Path, job: Prepared, record: RunRecord) -> str:
    """The report of a run folder that has this record."""
    folder = RunFolder(run)
    with folder.held(job.recipe):
        folder.write_info(record)
        keep_photos(run, record, [job.photos[index] for index in run_record.listed_photos(job)])
    assert shown_photos(folder.info) == [0, 1, 2, 3]
    write_report(run)
    return (run / "report.html").read_text(encoding="utf-8")


def test_many_photos_are_pinned_by_name(
    tiny_bases: dict[str, Path], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(photos, tmp_path / "others")
    full = pins.inputs_of(job_of(tiny_bases["sd1"], photos, tmp_path / "others"))
    monkeypatch.setattr(pins, "LISTED", 4)
    same = pins.inputs_of(job_of(tiny_bases["sd1"], photos, tmp_path / "others"))
    assert changes(full, same) == changes(same, full) == []
    (tmp_path / "others" / "1.txt").write_text("{token} asleep", encoding="utf-8", newline="\n")
    now = pins.inputs_of(job_of(tiny_bases["sd1"], photos, tmp_path / "others"))
    assert changes(full, now) == changes(same, now) == ["the caption of 1.png changed"]
