"""The part of benchmarks/gpu.py that counts how often a step makes the CPU wait, and what `run.compile` gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gpu_common import Row, Where, check, forget
from gpu_loops import our_loop, profiled
from gpu_speed import BATCHES, SIDES, prepared

# with log_every=1 each step is read, one step late; with 1000 no step that is measured is read
WAYS: dict[str, dict[str, Any]] = {
    "each step logged": {"log_every": 1},
    "no step logged": {"log_every": 1000},
    "no step logged, channels_last": {"log_every": 1000, "channels_last": True},
    "no step logged, fast": {"log_every": 1000, "fast": "on"},
    "no step logged, graphs": {"log_every": 1000, "compile": "graphs"},
    "no step logged, regional": {"log_every": 1000, "compile": "regional"},  # compiles for a minute: the last one
}


def waits(where: Where) -> Iterator[Row]:
    """SD 1.5, LoRA, batch 1: waits and copies of one step of our loop. One copy to the device, and no wait unless the
    step is logged."""
    for what, settings in WAYS.items():
        case = prepared(where, "SD 1.5", "lora")  # compiled blocks stay compiled, so each way has its own model
        case.side, case.batch, case.settings = (32 if where.tiny else SIDES[0]), BATCHES[0], dict(settings)
        if where.tiny and settings.get("compile") == "regional":
            case.settings["compile"] = "off"  # generating code for a CPU takes minutes
        found = our_loop(case)
        counted = profiled(case)
        yield {"table": "waits", "what": what} | found | counted
        if settings["log_every"] > 1 and not where.tiny:
            value = f"{counted['waits']:.3g} waits and {counted['copies_to_device']:.3g} copies to the device a step"
            yield check(f"{what}: no wait", counted["waits"] == 0 and counted["copies_to_host"] == 0, value)
        del case
        forget()
