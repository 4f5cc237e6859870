"""What a person reads when a run ends."""

from __future__ import annotations

import shlex
from pathlib import Path

from finetune.core.errors import Stopped


def test_the_command_that_goes_on_can_be_pasted() -> None:
    """Of "runs/my dog #2" a shell read three words and a comment."""
    run = Path("runs") / "my dog #2"
    command = str(Stopped(run, 2)).split("go on with: ")[1]
    assert shlex.split(command, comments=True) == ["finetune", "resume", str(run)]
    assert str(Stopped(Path("runs") / "dog", 2)).endswith("finetune resume " + str(Path("runs") / "dog"))
