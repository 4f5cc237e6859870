"""Other libraries are quiet inside a block, and as they were after it."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import diffusers.utils.logging as of_diffusers
import pytest
import transformers.utils.logging as of_transformers

from finetune.core.logging import quieted

LIBRARIES = (of_diffusers, of_transformers)


@pytest.fixture(autouse=True)
def usual() -> object:
    """The libraries as they come; the tests' process had them quiet."""
    before = [(each.get_verbosity(), each.is_progress_bar_enabled()) for each in LIBRARIES]
    for each in LIBRARIES:
        each.set_verbosity_warning()
        each._tqdm_active = True
    yield
    for each, (verbosity, bars) in zip(LIBRARIES, before, strict=True):
        each.set_verbosity(verbosity)
        each._tqdm_active = bars


def states() -> list[tuple[int, bool]]:
    return [(each.get_verbosity(), each.is_progress_bar_enabled()) for each in LIBRARIES]


def warn_of_theirs() -> None:
    """A warning that comes from peft, and one of the application."""
    warnings.warn_explicit("of theirs", UserWarning, "x.py", 1, module="peft.tuners.lora")
    warnings.warn_explicit("of ours", UserWarning, "y.py", 1, module="application")


def test_all_is_quiet_inside_and_as_before_afterwards() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        filters = list(warnings.filters)
        with quieted():
            warn_of_theirs()
            assert states() == [(40, False)] * 2
        assert [str(each.message) for each in caught] == ["of ours"]
        assert list(warnings.filters) == filters
        warn_of_theirs()
        assert [str(each.message) for each in caught] == ["of ours", "of theirs", "of ours"]
    assert states() == [(30, True)] * 2


def test_an_error_restores_too_and_a_wish_to_hear_more_is_heeded() -> None:
    of_diffusers.set_verbosity_info()
    seen: list[int] = []
    with pytest.raises(KeyError), quieted():
        {}[seen.append(of_diffusers.get_verbosity())]
    assert seen == [20]
    assert states() == [(20, True), (30, True)]


def test_the_last_of_several_threads_restores() -> None:
    inside, leave = threading.Event(), threading.Event()

    def work() -> None:
        with quieted():
            inside.set()
            leave.wait(10)

    thread = threading.Thread(target=work)
    with quieted():
        thread.start()
        inside.wait(10)
    assert states() == [(40, False)] * 2, "the other is still inside"
    leave.set()
    thread.join()
    assert states() == [(30, True)] * 2


@pytest.mark.slow
def test_what_diffusers_says_of_an_adapter_without_texts_is_not_shown() -> None:
    """The sentence that asks people to open an issue, by diffusers' own logger in a process of its own."""
    code = (
        "import diffusers.utils.logging as d, contextlib, sys\n"
        "from finetune.core.logging import quieted\n"
        "with (quieted() if sys.argv[1:] else contextlib.nullcontext()):\n"
        "    d.get_logger('diffusers.loaders.lora_base').warning('No LoRA keys associated to CLIPTextModel found')\n"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", code, *more],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
            env={name: value for name, value in os.environ.items() if name != "DIFFUSERS_VERBOSITY"},
            check=True,
        ).stderr
        for more in ([], ["quiet"])
    ]
    assert "No LoRA keys" in said[0]
    assert "No LoRA keys" not in said[1]
