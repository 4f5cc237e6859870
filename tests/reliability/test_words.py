"""New words in several processes: one result. Captions are dropped often, so that one process sees no new word."""

from __future__ import annotations

from pathlib import Path

import pytest
import work_words
from safetensors.torch import load_file
from test_processes import distance, losses, one_and_two


@pytest.mark.slow
def test_one_and_two_processes_end_equal(tiny_bases: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    one_and_two(work_words, "work", tmp_path, photos, tiny_bases["sdxl"])
    for name in ("textual_inversion", "pivotal"):
        one, two = (tmp_path / count / "runs" / name for count in ("1", "2"))
        assert len(losses(one)) == 12
        assert losses(two) == pytest.approx(losses(one), rel=1e-5)
        assert distance(*(load_file(run / "adapter" / "trained.safetensors") for run in (one, two))) < 1e-5, name
