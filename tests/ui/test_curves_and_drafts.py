"""What needs no server: curves of growing files, drafts as commands and recipes, sentences without places."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from finetune.config.load import load_recipe
from finetune.core.errors import BadInput
from finetune.core.events import Measured, Restored
from finetune.families.facts import facts
from finetune.families.source import resolve_base
from finetune.ui import run_views
from finetune.ui.chores import toy_words
from finetune.ui.drafts import TINY_SIDE, Draft, base_of, bases_in, draft_of
from finetune.ui.plain_words import MEASURE_TITLES, advice_for_the_page, without_places
from finetune.ui.run_views import VerdictCurves
from finetune.ui.serve import Opening, serve
from finetune.ui.thinning import CHUNK, POINTS, GrowingMetrics
from finetune.verdicts.advice import Best, Means, advice
from finetune.verdicts.rows import VerdictsFile, read_rows


def line(step: int, loss: float) -> str:
    return json.dumps({"step": step, "loss": loss, "lr": 1e-4, "grad_norm": 0.1, "seconds": 0.25}) + "\n"


def read_all(metrics: GrowingMetrics) -> int:
    updates = 1
    while metrics.update():
        updates += 1
    return updates


def test_a_curve_of_many_steps_stays_small_and_true() -> None:
    from finetune.ui.thinning import ThinCurve

    curve, losses = ThinCurve(), [1 / (1 + n) + (n % 7) / 10 for n in range(100_000)]
    for step, loss in enumerate(losses, 1):
        curve.add(step, loss, 1e-4, 0.5)
    rows = curve.rows()
    assert POINTS / 2 <= len(rows) <= 2 * POINTS
    assert rows[-1][0] == 100_000
    assert (min(row[2] for row in rows), max(row[3] for row in rows)) == pytest.approx(
        (min(losses), max(losses)), rel=1e-4
    )
    mean = sum(point.total for point in curve.points) / sum(point.count for point in curve.points)
    assert mean == pytest.approx(sum(losses) / len(losses))
    first = curve.points[0]
    assert first.total / first.count == pytest.approx(sum(losses[: first.count]) / first.count)
    assert curve.seconds / curve.steps == 0.5


def test_a_growing_file_is_read_once(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    metrics = GrowingMetrics(file)
    assert not metrics.update()  # not there yet
    file.write_text("".join(line(step, 1.0) for step in range(1, 6_001)))
    size = file.stat().st_size
    assert read_all(metrics) == -(-size // CHUNK)  # each update reads a bounded part
    assert (metrics.curve.steps, metrics.bytes_read) == (6_000, pytest.approx(size, rel=0.01))
    before = metrics.bytes_read
    assert not metrics.update()
    assert metrics.bytes_read == before
    with file.open("a") as more:
        more.write(line(6_001, 3.0) + '{"step": 6002, "lo')  # the last line is not whole yet
    added = file.stat().st_size - size
    metrics.update()
    assert metrics.bytes_read - before == added
    assert (metrics.curve.steps, metrics.curve.points[-1].high) == (6_001, 3.0)
    with file.open("a") as more:
        more.write('ss": 2.0, "lr": 1e-4, "seconds": 0.1}\n')
    metrics.update()
    assert metrics.curve.steps == 6_002


def test_a_file_that_a_resumption_wrote_anew_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(line(step, 1.0) for step in range(1, 11)))
    metrics = GrowingMetrics(file)
    read_all(metrics)
    other = tmp_path / "new"
    other.write_text("".join(line(step, 2.0) for step in range(1, 11)))
    other.replace(file)  # of the same size
    read_all(metrics)
    assert [row[:2] for row in metrics.curve.rows()] == [[step, 2.0] for step in range(1, 11)]


def test_measures_are_read_again_only_when_there_are_new_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page looks every second; a run of a day measures some hundred times."""
    reads: list[Path] = []
    monkeypatch.setattr(run_views, "read_rows", lambda file: (reads.append(file), read_rows(file))[1])
    curves, rows = VerdictCurves(tmp_path), VerdictsFile(tmp_path)
    assert curves.update() == []
    for step in (10, 20):
        rows(Measured(step, {"learned": step / 100}, 1.0))
        assert all(curves.update()[0]["points"][-1] == [step, step / 100] for _ in range(5))
    assert len(reads) == 2
    rows(Restored(10))
    assert curves.update()[0]["points"] == [[10, 0.1]]


@pytest.mark.parametrize("odd", ["{}", "[]", "x", '{"step": NaN, "loss": 1, "lr": 1, "seconds": 1}', "{" * 300_000])
def test_lines_that_no_run_writes_are_skipped(odd: str, tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(f"{line(1, 1.0)}{odd}\n{line(2, 1.0)}")
    metrics = GrowingMetrics(file)
    read_all(metrics)
    assert [row[0] for row in metrics.curve.rows()] == [1, 2]


def test_the_command_and_the_recipe_are_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    photos = Path("finetune-ui/photos/photos-0")
    for kind, noun in (("thing", "coffee mug"), ("style", "")):
        values = {"kind": kind, "noun": noun, "base": "tiny", "more": ["run.steps = 40", "optim.lr=1e-3", ""]}
        draft = draft_of(values, photos, {})
        (tmp_path / "mine.yaml").write_text(draft.as_yaml())
        assert load_recipe(tmp_path / "mine.yaml") == load_recipe(draft.recipe, draft.settings())
        assert str(tmp_path) not in draft.as_yaml() + draft.command()
        assert draft.command().startswith(f"finetune train {draft.recipe} data.photos=finetune-ui/photos/photos-0")
        assert load_recipe(draft.recipe, draft.settings()).run.steps == 40


@pytest.mark.parametrize(
    "more",
    [
        "data.photos=/etc", "run.dir=elsewhere", "prior.folder=x", "base=x", "base.source=x", "sample.image=x",
        "steps=4", "optim.lr", "sample.prompts=['/etc/passwd']", "optim.kind=~/x", "run.trackers=[x]", "profile=x",
        "__class__=1",
    ],
)  # fmt: skip
def test_a_page_sets_no_path(more: str) -> None:
    with pytest.raises(BadInput, match=r"can't be set here|looks like a path"):
        draft_of({"kind": "thing", "noun": "mug", "more": [more]}, Path("p"), {})


@pytest.mark.parametrize("noun", ["", "  ", "../x", "a=b", "x" * 50, "$(id)", "mug\nx=1;", "-rf"])
def test_a_noun_is_a_word_or_two(noun: str) -> None:
    with pytest.raises(BadInput, match="in a word or two"):
        draft_of({"kind": "thing", "noun": noun}, Path("p"), {})


def test_a_base_is_one_of_the_list_or_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (
        "bases/one.safetensors",
        "bases/sd/model_index.json",
        "own/model",
        "bases/.hidden.safetensors",
        "bases/note.txt",
    ):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text("{}")
    bases = bases_in(Path("bases"))
    assert sorted(bases) == ["one.safetensors", "sd"]
    assert base_of("tiny", bases) == "tiny"
    assert base_of("local:sd", bases) == "bases/sd"
    assert base_of("stabilityai/sdxl", bases) == "stabilityai/sdxl"
    for wrong in ("local:../own", "/etc/passwd", "own/model", "..", "a/../b", "~/x", "x", "C:/x", 5, ["a"]):
        with pytest.raises(BadInput):
            base_of(wrong, bases)


def test_the_page_knows_the_size_of_the_tiny_base() -> None:
    assert facts(resolve_base("tiny"))["resolution"].split(" ")[0] == str(TINY_SIDE)


def test_a_draft_is_refused_before_anything_is_read() -> None:
    with pytest.raises(BadInput, match="neither thing nor style"):
        draft_of({"kind": "other", "noun": "mug"}, Path("p"), {})
    with pytest.raises(BadInput, match="not a hub id"):
        draft_of({"noun": "mug", "like": "../x"}, Path("p"), {})
    assert Draft(Path("p"), "thing", "mug", "bases/x.safetensors", "a/b").settings()[2:4] == [
        "base.source=bases/x.safetensors", "base.like=a/b",
    ]  # fmt: skip


def test_sentences_name_no_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert without_places(f"{tmp_path}/runs/mug has no photos") == "runs/mug has no photos"
    assert without_places("/home/me/photos/a.png can't be read: see https://x.org/a/b") == (
        "a.png can't be read: see https://x.org/a/b"
    )
    assert without_places("C:\\Users\\me\\a.png is broken") == "a.png is broken"
    assert without_places("stabilityai/sdxl at 3/4 of it, 1.5 steps/s") == "stabilityai/sdxl at 3/4 of it, 1.5 steps/s"


@pytest.mark.parametrize("missing", ["uvicorn", "starlette"])
def test_without_the_extra_a_sentence_says_what_to_install(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = (f"{missing}.", "finetune.ui.pages", "finetune.ui.guard")
    for name in [name for name in sys.modules if name.startswith(loaded)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(BadInput, match=r"pip install 'finetune-diffusion\[ui\]'"):
        serve(Opening(tmp_path / "own", tmp_path, tmp_path), print)
    assert not (tmp_path / "own").exists()


def test_measures_are_called_as_in_the_report() -> None:
    from finetune.verdicts.registry import MEASURES

    assert {name: kind.title for name, kind in MEASURES.items()} == MEASURE_TITLES


def test_the_advice_of_a_page_names_no_command() -> None:
    kept, lost = (advice([], Best(16, good=True), Means(kept=steps)) for steps in ((16,), ()))
    assert "finetune export" in kept
    assert advice_for_the_page(kept) == "Step 16 was a little better (it is kept)."
    said = "(it was not kept: in a new run, write run.keep_best=true in Settings)"
    assert said in advice_for_the_page(lost)


@pytest.mark.parametrize(("base", "noun", "said"), [("tiny", "dog", 1), ("tiny", "red car", 0), ("a/base", "dog", 0)])
def test_the_plan_says_what_the_built_in_base_has_never_seen(base: str, noun: str, said: int) -> None:
    warnings = toy_words(SimpleNamespace(base=base, subjects=[SimpleNamespace(noun=noun)]))
    assert len(warnings) == said
    assert all("never seen a dog" in text for text in warnings)
