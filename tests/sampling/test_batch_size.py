"""`sample.batch_size` and `--batch-size`: how many pictures the denoiser sees at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import pytest
from test_svd import recipe_of

from finetune.cli.main import run
from finetune.jobs import train as job


@contextmanager
def sizes_drawn(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[int]]:
    """Pictures in each call of the pipeline inside the block."""
    seen: set[int] = set()
    real = diffusers.StableDiffusionPipeline.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.add(len(kwargs["prompt"]))
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(diffusers.StableDiffusionPipeline, "__call__", call)
        yield seen


def test_a_run_and_the_command_draw_as_many_at_once_as_asked(
    tiny_bases: dict[str, Path],
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = ["sample.count=4", "sample.prompts=['a photo of {token}']", "export.verify=off", "run.steps=1"]
    with sizes_drawn(monkeypatch) as seen:
        path = job.train(recipe_of(tiny_bases["sd1"], photos, "lora", *asked, "sample.batch_size=2"), tmp_path / "run")
    assert seen == {2}
    command = ["sample", str(path), "-p", "a mug", "--count", "3", "--steps", "1", "--out", str(tmp_path / "out")]
    for options, sizes in (([], {3}), (["--batch-size", "1"], {1})):
        with sizes_drawn(monkeypatch) as seen:
            assert run([*command, *options]) == (0, "")
        assert seen == sizes
    assert len(list((tmp_path / "out").glob("00-*.png"))) == 3
    assert run([*command, "--batch-size", "0"])[0] == 2
    assert "--batch-size" in capsys.readouterr().err
