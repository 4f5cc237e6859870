"""The training on a device that is not there (`fake_device_suite.py`), in a process of its own: torch takes a new
device only before its first backward pass."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUITE = Path(__file__).with_name("fake_device_suite.py")


def run(marker: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", marker, str(SUITE)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTEST_ADDOPTS": ""})
    assert done.returncode == 0, done.stdout[-6000:]
    assert " passed" in done.stdout or " skipped" in done.stdout


@pytest.mark.slow
def test_on_a_fake_device() -> None:
    run("not slow")


@pytest.mark.slow
def test_families_and_methods_on_a_fake_device() -> None:
    run("slow")
