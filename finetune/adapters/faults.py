"""The faults that a LoRA file can have, and what each reader makes of them.

The effects come from the source code of the readers' loaders (November 2026). In all of them but diffusers a module is
applied as weight += scale * (up @ down), reshaped to the weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from finetune.families.naming.base import Verdict

UIS = ("ComfyUI", "Forge", "A1111", "InvokeAI", "sdnext")
STATES = ("fully", "rightly", "unknown", "partly", "wrongly", "refused")  # from the best to the worst

NO_ALPHA, HEADER_ALPHA, ODD_ALPHA, ANOTHER_BASE = "no-alpha", "header-alpha", "odd-alpha", "another-base"
MIXED_NAMES, HEADER_RANK = "mixed-names", "header-rank"
BEARABLE = {NO_ALPHA, HEADER_ALPHA, ODD_ALPHA, MIXED_NAMES, HEADER_RANK}  # the adapter itself is whole
FAULTS = {
    NO_ALPHA: "modules without alpha: readers take scale 1, right only if the trainer's alpha was the rank",
    HEADER_ALPHA: "modules whose alpha is in the header alone and is not the rank: UIs do not read the header",
    ODD_ALPHA: "modules with another alpha than most: diffusers ignores it on attention projections",
    HEADER_RANK: "modules with another rank than the header says: diffusers builds them with the header's",
    MIXED_NAMES: "modules under diffusers' names beside others under the original ones",
    "not-finite": "modules with NaN or infinite values",
    "not-floating": "modules whose matrices are not floating-point numbers",
    "one-matrix": "modules without their {} matrix",
    "another-shape": "modules with another shape than in the base",
    "one-by-one": "3x3 convolutions whose down matrix is 1x1",
    "exchanged": "modules whose down and up matrices are exchanged (or transposed, if square)",
    "transposed": "modules whose matrices are transposed",
    "twice": "modules that are in the file twice, under two names",
    "other-method": "keys of {}, which a reader of plain LoRA drops or misreads",
}


@dataclass(frozen=True)
class Problem:
    """One kind of problem in a file.

    `name`: a stable word for programs. `message`: a description for people. `modules`: the modules or keys concerned;
    empty if the problem concerns the whole file.
    """

    name: str
    message: str
    modules: tuple[str, ...] = ()

    @property
    def line(self) -> str:
        """The message, with the number of modules and the names of the first three."""
        such = f" ({len(self.modules)}, such as {', '.join(self.modules[:3])})" if self.modules else ""
        return f"{self.message}{such}"


SKIPS = ("partly", "it skips {n} modules")
FAILS = ("refused", "an error at {n} modules ends the loading")
SHAPES: dict[str, Verdict] = {
    "ComfyUI": ("partly", "it logs an error for {n} modules and leaves them out"),
    "Forge": ("refused", "a shape that does not fit ends the whole merge"),
    "A1111": ("partly", "it counts an error for {n} modules and leaves them out"),
    "InvokeAI": ("refused", "a shape that does not fit ends the generation"),
    "sdnext": ("partly", "it counts an error for {n} modules and leaves them out"),
}
SPREADS = ("wrongly", "it adds the 1x1 to all nine positions of {n} convolutions")
UNITY = ("unknown", "it takes scale 1 for {n} modules, which may be another strength than the trained one")
EFFECTS: dict[str, dict[str, Verdict]] = {
    NO_ALPHA: dict.fromkeys((*UIS, "diffusers"), UNITY),
    HEADER_ALPHA: dict.fromkeys(UIS, ("wrongly", "it takes scale 1 for {n} modules and not the header's {scale}")),
    ODD_ALPHA: {"diffusers": ("wrongly", "it ignores a module's own alpha on attention projections: {n} differ")},
    HEADER_RANK: {"diffusers": ("refused", "the header has another rank than {n} modules")},
    MIXED_NAMES: {"InvokeAI": ("refused", "it refuses a file that mixes both kinds of names")},
    "not-finite": dict.fromkeys((*UIS, "diffusers"), ("wrongly", "{n} modules are NaN: the images are black")),
    "not-floating": dict.fromkeys((*UIS, "diffusers"), ("unknown", "not established for such numbers")),
    "one-matrix up": {"ComfyUI": SKIPS, "Forge": SKIPS, "A1111": FAILS, "InvokeAI": FAILS, "sdnext": SKIPS},
    "one-matrix down": {"ComfyUI": FAILS, "Forge": FAILS, "A1111": FAILS, "InvokeAI": FAILS, "sdnext": SKIPS},
    "another-shape": SHAPES,
    "one-by-one": SHAPES | {"A1111": SPREADS, "sdnext": SPREADS},
    "exchanged": SHAPES,
    "transposed": SHAPES,
    "twice": dict.fromkeys((*UIS, "diffusers"), ("unknown", "{n} modules are there twice: which one counts is open")),
    "all-zero": dict.fromkeys((*UIS, "diffusers"), ("wrongly", "it loads, and changes nothing")),
    ANOTHER_BASE: dict.fromkeys((*UIS, "diffusers"), ("unknown", "not judged against another base")),
    "nothing-fits": dict.fromkeys((*UIS, "diffusers"), ("refused", "nothing fits")),
}


def with_faults(verdicts: Mapping[str, Verdict], faults: Mapping[str, Problem], scale: str = "") -> dict[str, Verdict]:
    """The verdicts with the effects of the faults: the worst one counts, with its reason. With a fault that does not
    concern a reader, "fully" becomes "rightly": the word is kept for files without any.

    Args:
        faults: the key of FAULTS or EFFECTS -> the problem.
        scale: the header's scale, for `HEADER_ALPHA`.
    """
    found = dict(verdicts)
    for reader, (state, why) in verdicts.items():
        felt = [(state, why)] if why or not faults else []
        for name, problem in faults.items():
            effect = EFFECTS.get(name, {}).get(reader)
            if effect is None and name.startswith("other-method"):
                effect = ("unknown", "not established for keys of another method")
            if effect is not None:
                felt.append((effect[0], effect[1].format(n=len(problem.modules), scale=scale)))
        if state == "fully":
            state = "rightly" if faults else state
        worst = max([state, *(one for one, _ in felt)], key=STATES.index)
        reasons = [reason for one, reason in felt if one == worst and reason]
        if worst == "rightly":
            reasons = reasons or ["the faults below change nothing that it reads"]
        found[reader] = (worst, "; ".join(dict.fromkeys(reasons)))
    return found
