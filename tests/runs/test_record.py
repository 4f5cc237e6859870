"""run.json: what is written comes back, older files are taken over, and what is no record is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune.core.errors import BadInput
from finetune.report.html import write_report
from finetune.runs.folder import RunFolder
from finetune.runs.plan import (
    Cut,
    Plan,
    PlannedBucket,
    PlannedClassImages,
    PlannedSubject,
    plan_lines,
    plan_rows,
    shared_rows,
)
from finetune.runs.record import RecordedSubject, RunRecord

BASE = "/home/ann/bases/photo-1"


def planned(**changes: Any) -> Plan:
    values: dict[str, Any] = {
        "base": BASE, "family": "sd1", "prediction": "epsilon", "prompts": ["a photo of zwx mug, ann's kitchen"],
        "subjects": [PlannedSubject(token="zwx", noun="mug", photos=5, captions="5 from one sentence")],
        "resolution": 64, "steps": 40, "batch_size": 2, "accumulate": 1, "times_seen": 16.0, "timesteps": "uniform",
        "method": "lora", "parts": ["denoiser", "text_encoder"], "precision": "fp32", "repeatable": True,
    }  # fmt: skip
    return Plan(**values | changes)


def record(**changes: Any) -> RunRecord:
    values: dict[str, Any] = {
        "token": "zwx", "class_noun": "mug", "family": "sd1", "base": BASE, "base_hash": "ab", "resolution": 64,
        "plan": plan_rows(planned()), "planned": planned(), "captions": [["a photo of zwx mug"]], "photos": ["0.png"],
        "prompts": ["a photo of zwx mug"], "guidance": 7.5, "versions": {"torch": "2"},
    }  # fmt: skip
    return RunRecord(**values | changes)


FULL = {
    "buckets": [PlannedBucket(width=64, height=32, photos=1), PlannedBucket(width=64, height=64, photos=4)],
    "cut": Cut(share=0.25, photo="a.png"),
    "places": 8,
    "repeats": 3,
    "masked": 2,
    "inputs": "inpaint",
    "widened": True,
    "class_images": PlannedClassImages(prompts=["a photo of a mug"], count=10, times=8.0),
    "repeatable": False,
}


@pytest.mark.parametrize("changes", [{}, {"planned": planned(**FULL)}, {"planned": None, "resolution": None}])
def test_what_is_written_comes_back(changes: dict[str, Any], tmp_path: Path) -> None:
    written = record(**changes, subjects=[RecordedSubject(token="vtx", class_noun=None, photos=1)])
    RunFolder(tmp_path).write_info(written)
    assert json.loads((tmp_path / "run.json").read_text())["schema"] == 1
    assert RunFolder(tmp_path).info == written


def test_the_rows_of_a_full_plan() -> None:
    rows = plan_rows(planned(**FULL))
    assert list(rows) == [
        "base", "subject", "training prompts", "token", "resolution", "steps", "each photo", "buckets", "padding",
        "masks", "inputs", "class images", "timesteps", "method", "precision", "resume",
    ]  # fmt: skip
    assert rows["base"] == f"{BASE} (sd1, epsilon)"
    assert rows["buckets"] == "64x32: 1 photo; 64x64: 4 photos; at most 25% of a photo (a.png) is cut away"
    assert rows["masks"] == "2 of 5 photos have one; the background has weight 0"
    assert rows["class images"] == "10 of 'a photo of a mug', each seen 8.0 times"


def test_the_log_shows_lists_as_text() -> None:
    lines = plan_lines(planned(prompts=["a zwx mug", "zwx mug, seen from above"], unused=["a.mov, b.txt"]))
    assert "training prompts  a zwx mug; zwx mug, seen from above" in lines
    assert "        not used  a.mov, b.txt" in lines
    assert "      resolution  64" in lines


def test_the_plan_is_in_plain_words() -> None:
    for changes in ({}, FULL):
        said = "; ".join(f"{name} {value}" for name, value in plan_rows(planned(**changes)).items())
        assert not [word for word in ("(s)", "(es)", "micro", "shift 1", "None", "{") if word in said], said


def test_a_page_gets_neither_captions_nor_folders() -> None:
    """Every row else is there, and as it was."""
    own, shared = plan_rows(planned(**FULL)), shared_rows(planned(**FULL))
    assert shared["base"] == "photo-1 (sd1, epsilon)"
    assert own.keys() - shared.keys() == {"training prompts"}
    assert {name for name in shared if shared[name] != own[name]} == {"base"}
    assert "ann" not in json.dumps(shared)


def test_a_file_without_a_schema_is_migrated(tmp_path: Path) -> None:
    """As 0.1.0 wrote it: the page shows its plan, without the rows that are private."""
    old = record().model_dump(mode="json")
    del old["planned"], old["subjects"]
    (tmp_path / "run.json").write_text(json.dumps(old))
    info = RunFolder(tmp_path).info
    assert (info.token, info.guidance, info.names, info.planned) == ("zwx", 7.5, ["zwx mug"], None)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "seen 16 times" in page
    assert "/home/ann" not in page
    assert "kitchen" not in page
    rows = old["plan"] | {"base": "owner/model (sd1, epsilon)"}
    (tmp_path / "run.json").write_text(json.dumps(old | {"base": "owner/model", "plan": rows}))
    assert "owner/model (sd1, epsilon)" in write_report(tmp_path).read_text(encoding="utf-8")


def test_a_new_page_shows_the_plan_and_nothing_private(tmp_path: Path) -> None:
    RunFolder(tmp_path).write_info(record())
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "seen 16 times" in page
    assert "photo-1 (sd1, epsilon)" in page
    assert "/home/ann" not in page
    assert "kitchen" not in page


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ('{"resolution": "<script>1</script>"}', "resolution"),
        ('{"captions": [1]}', r"captions\.0"),
        ("{", "run.json is damaged"),
        ("[]", "run.json is damaged"),
        ('{"schema": 2}', "run.json has schema 2, and finetune .* up to 1"),
        ('{"schema": "1"}', "run.json has schema 1"),
    ],
)
def test_what_is_no_record_is_refused_by_name(text: str, fault: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(BadInput, match=fault):
        write_report(tmp_path)


def test_a_runs_words_are_those_of_its_captions_and_older_records_have_theirs() -> None:
    assert record().trigger == "zwx mug"
    assert record(captions=[]).trigger == "zwx mug"
    assert record(token="<zwx>", captions=[["a photo of <zwx>", "a picture of <zwx>"]]).trigger == "<zwx>"
    assert record(captions=[["zwx mug"]], style=", in zwx style").trigger == "in zwx style"
    two = [
        RecordedSubject(token="vtx", class_noun="dog", photos=1),
        RecordedSubject(token="zwx", class_noun="mug", photos=9, listed=2),
    ]
    captions = [["vtx dog"], ["zwx in snow"], ["zwx, a mug"]]
    assert record(subjects=two, captions=captions).names == ["vtx dog", "zwx"]
    assert PlannedSubject(token="zwx", noun="mug", photos=1, captions="", words="zwx mug").called == (
        "zwx (class noun: mug)"
    )
    assert (
        "write '<zwx>' alone in prompts"
        in PlannedSubject(token="<zwx>", noun="mug", photos=1, captions="", words="<zwx>").called
    )
