"""The result of an inspection: what a LoRA file is, its faults, and how well each program reads it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from finetune.adapters.bases import Compared
from finetune.adapters.faults import ANOTHER_BASE, FAULTS, OTHER_METHOD, Problem, with_faults
from finetune.adapters.readers import Keys, read_by
from finetune.export.base import Adapter
from finetune.export.lora.diffusers import HEADER
from finetune.families.naming.base import Verdict


@dataclass
class Inspection:
    """The result of an inspection.

    `compared`: the base that the file was compared with. `dtypes`: precisions of the matrices, such as "fp16".
    `size`: bytes. `ranks`, `scales`: value -> number of modules. `zero`: modules whose delta is zero. `faults`: kind
    of problem -> the problem. `native`: "LoHa", "LoKr" or "DoRA" for a file in LyCORIS' format, and `parts` the number
    of its sound modules in each part. `notes`: what is worth knowing and no fault. `verdicts`: reader -> ("fully",
    "rightly" in spite of a fault that does not concern it, "partly", "wrongly", "refused" or "unknown"; the reason).
    """

    path: Path
    kind: str
    compared: Compared
    family: str
    dtypes: tuple[str, ...]
    size: int
    metadata: dict[str, str]
    adapter: Adapter | None = None
    ranks: Counter[int] = field(default_factory=Counter)
    scales: Counter[float] = field(default_factory=Counter)
    zero: list[str] = field(default_factory=list)
    unknown_keys: list[str] = field(default_factory=list)
    faults: dict[str, Problem] = field(default_factory=dict)
    native: str = ""
    parts: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    verdicts: dict[str, Verdict] = field(default_factory=dict)

    @property
    def called(self) -> str:
        """What the file is, in words."""
        return f"{self.native} in LyCORIS' format" if self.native else f"{self.kind} LoRA"

    @property
    def by_name(self) -> dict[str, Problem]:
        """All problems, one for each kind."""
        found = dict(self.faults)
        if self.unknown_keys:
            message = f"keys that fit nothing in {self.family}"
            found["unknown-keys"] = Problem("unknown-keys", message, tuple(self.unknown_keys))
        count = self.adapter.count if self.adapter else self.parts.total()
        if not count and ANOTHER_BASE not in found and not self.other_methods:
            message = f"the file has no readable module for {self.family}"
            found["nothing-fits"] = Problem("nothing-fits", message)
        elif self.zero and len(self.zero) == count:
            found["all-zero"] = Problem("all-zero", "every module is zero: the adapter changes nothing")
        return found

    @property
    def problems(self) -> list[Problem]:
        """All problems, one for each kind."""
        return list(self.by_name.values())

    @property
    def other_methods(self) -> bool:
        """Whether some keys are those of DoRA, LoHa, LoKr, OFT or the like."""
        return any(problem.name == OTHER_METHOD for problem in self.faults.values())

    @property
    def header_scale(self) -> str:
        """The scales of a file whose header alone says them, as text."""
        return ", ".join(f"{scale:g}" for scale in sorted(self.scales))

    def fault(self, name: str, module: str, of: str = "") -> None:
        """Records that `module` has the problem `name` (a key of FAULTS). `of` fills the blank in its message."""
        key = f"{name} {of}" if of else name
        known = self.faults.get(key)
        modules = known.modules if known else ()
        self.faults[key] = Problem(name, FAULTS[name].format(of), (*modules, module))

    def judge(self, names: list[str]) -> None:
        """Sets the verdicts of the UIs, with the effects of the faults. `names`: the modules' names in the file."""
        parts = list(self.adapter.layers) if self.adapter else []
        by_header = self.header_scale if HEADER in self.metadata and set(self.scales) - {1.0} else ""
        keys = Keys(self.family, self.kind, names, parts, len(self.unknown_keys), by_header)
        self.verdicts = with_faults(read_by(keys), self.by_name, self.header_scale)


def dtype_name(value: Tensor) -> str:
    """The name of a tensor's precision, such as "fp16"."""
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}.get(value.dtype, str(value.dtype))
