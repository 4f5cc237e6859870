"""Reading pickles is allowed for a block: no environment, no other thread's work."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch

from finetune.core.errors import BadInput
from finetune.core.pickles import may_read_pickles, pickles_allowed
from finetune.families.source import load_family


def test_it_is_given_back_after_an_error_too() -> None:
    before, seen = dict(os.environ), []

    def work() -> None:
        with pickles_allowed():
            seen.append(may_read_pickles())
            with pickles_allowed(False):
                seen.append(may_read_pickles())
            other = threading.Thread(target=lambda: seen.append(may_read_pickles()))
            other.start()
            other.join()
            seen.append(dict(os.environ) == before)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work()
    assert seen == [True, False, False, True]
    assert not may_read_pickles()


def test_a_pickled_base_is_read_inside_the_block_only(tiny_bases: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file

    base = tmp_path / "base"
    shutil.copytree(tiny_bases["sd1"], base)
    (file,) = (base / "unet").glob("*.safetensors")
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    with pickles_allowed():
        family = load_family(str(base))
    wanted = load_family(str(tiny_bases["sd1"])).parts["denoiser"].state_dict()
    assert all(torch.equal(value, wanted[name]) for name, value in family.parts["denoiser"].state_dict().items())
    with pytest.raises(BadInput, match="allow-pickle"):
        load_family(str(base))
