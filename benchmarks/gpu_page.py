"""Formats the rows of benchmarks/gpu.py as a page of tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]
HEAD = """# Results on a GPU

Made by `python benchmarks/gpu.py` from `benchmarks/rows/gpu.jsonl`; do not edit. Random weights at published sizes,
LoRA of rank 16 with AdamW, full training with 8-bit AdamW. "Bare" is the same model, forward, loss, backward and
optimiser, with everything on the device; "graph" is the same with forward and backward as one CUDA graph. MFU counts
the products, convolutions and attention of a step, without what gradient checkpointing computes twice, against what a
large bf16 product reaches on the same device; the published peak is higher.
"""


def page(rows: Sequence[Row], about: dict[str, str], cpu: bool) -> str:
    facts = ", ".join(f"{name} {value}" for name, value in about.items() if name != "device")
    sections = [HEAD, f"Device: **{about['device']}**. {facts}.\n", device(rows), works(rows), speed(rows)]
    return "\n".join(text for text in [*sections, waits(rows), steps(rows), start(rows)] if text)


def device(rows: Sequence[Row]) -> str:
    return "".join(
        f"A bf16 product of 8192 x 8192 x 8192: {row['tflops']:.0f} TFLOP/s. A copy: {row['gb_per_s']:.0f} GB/s.\n"
        for row in chosen(rows, "device")
    )


def works(rows: Sequence[Row]) -> str:
    found = chosen(rows, "works")
    bad = [row for row in found if not row["ok"]]
    title = f"## What works\n\n{len(found) - len(bad)} of {len(found)} checks hold.\n"
    ordered = sorted(found, key=lambda row: row["ok"])  # failed checks first
    cells = [[row["part"], row["what"], "yes" if row["ok"] else "**NO**", str(row["value"])] for row in ordered]
    return title + "\n" + grid(["part", "check", "holds", ""], cells) if found else ""


def speed(rows: Sequence[Row]) -> str:
    best = max((row["tflops"] for row in chosen(rows, "device")), default=0.0)
    columns: dict[str, Callable[[Row], Any]] = {
        "ours, ms": lambda row: row.get("ours_ms"),
        "bare, ms": lambda row: row.get("bare_ms"),
        "graph, ms": lambda row: row.get("graph_ms") or row.get("graph_note"),
        "ours / bare": lambda row: ratio(row, "ours_ms", "bare_ms"),
        "ours / graph": lambda row: ratio(row, "ours_ms", "graph_ms"),
        "MFU of ours": lambda row: row["flops"] / row["ours_ms"] / 1e9 / best if row.get("flops") and best else None,
        "peak, GiB": lambda row: row.get("peak_gib"),
        "plan, GiB": lambda row: row.get("plan_gib"),
        "checkpoint, s": lambda row: row.get("checkpoint_s"),
        "": lambda row: row.get("note") or ("gradient checkpointing" if row.get("checkpointing") else ""),
    }
    cells = [[row["what"], *(number(get(row)) for get in columns.values())] for row in chosen(rows, "speed")]
    return "## Speed and memory\n\n" + grid(["case", *columns], cells) if cells else ""


def waits(rows: Sequence[Row]) -> str:
    names = {
        "ours_ms": "ours, ms", "waits": "waits", "copies_to_device": "copies to the device",
        "copies_to_host": "copies to the host", "kernels": "kernels", "host_ms": "host, ms",
    }  # fmt: skip
    cells = [[row["what"], *(number(row[name]) for name in names)] for row in chosen(rows, "waits")]
    head = "## Waits\n\nSD 1.5, LoRA, batch 1. Numbers are for one step of our loop.\n\n"
    return head + grid(["case", *names.values()], cells) if cells else ""


def steps(rows: Sequence[Row]) -> str:
    names = {
        "kernels": "kernels", "waits": "waits", "copies_to_device": "copies to the device",
        "copies_to_host": "copies to the host", "kernels_ms": "kernels, ms", "host_ms": "host, ms",
        "operators": "operators",
    }  # fmt: skip
    found = [row for row in chosen(rows, "speed") if "kernels" in row]
    cells = [[row["what"], *(number(row[name]) for name in names)] for row in found]
    return "## One step of our loop\n\n" + grid(["case", *names.values()], cells) if cells else ""


def start(rows: Sequence[Row]) -> str:
    cells = [[row["what"], number(row["first_step_s"])] for row in chosen(rows, "start")]
    return "## From the command to the first step\n\n" + grid(["", "seconds"], cells) if cells else ""


def chosen(rows: Sequence[Row], name: str) -> list[Row]:
    return [row for row in rows if row.get("table") == name]


def ratio(row: Row, above: str, below: str) -> float | None:
    return row[above] / row[below] if row.get(above) and row.get(below) else None


def number(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def grid(head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    rule = "|" + "---|" * len(head)
    lines = ["| " + " | ".join(text.replace("|", "/").replace("\n", " ") for text in row) + " |" for row in cells]
    return "\n".join(["| " + " | ".join(head) + " |", rule, *lines]) + "\n"
