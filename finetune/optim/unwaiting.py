"""bitsandbytes' optimisers without their wait for the device after each weight."""

from __future__ import annotations

from typing import Any


def unwaiting(kind: Any) -> Any:
    """The class `kind` of bitsandbytes with a `step` that does not make the CPU wait.

    bitsandbytes synchronises the device after every weight, hundreds of times in a step. Kernels of one stream run in
    their order without it, and only a paged state, which the CPU's memory holds, needs it.
    """
    import torch
    from bitsandbytes.optim import optimizer

    names = vars(optimizer)
    if "sync_gpu" not in names:  # another version of bitsandbytes, which does not wait, or does so elsewhere
        return kind

    def step(self: Any, closure: Any = None) -> Any:
        wait, names["sync_gpu"] = names["sync_gpu"], lambda weight: None
        try:
            return kind.step(self, closure)
        finally:
            names["sync_gpu"] = wait

    return type(f"Unwaiting{kind.__name__}", (kind,), {"step": torch.no_grad()(step)})
