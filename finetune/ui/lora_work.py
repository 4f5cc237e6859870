"""Chores with LoRA files of any trainer: verify, convert, merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.core.errors import BadInput, CheckFailed
from finetune.core.files import replacing_folder, write_json

if TYPE_CHECKING:
    from finetune.export.base import Exported

NOTE = ".made.json"
MODELS = ("checkpoint", "folder")


def verify_lora(given: Mapping[str, Any]) -> Any:
    """What `finetune verify` says of a LoRA file."""
    from finetune.adapters.operations import verify_file

    found = verify_file(Path(given["file"]), given.get("base") or None)
    return {
        "called": found.called,
        "family": found.family,
        "size": found.size,
        "ranks": sorted(found.ranks),
        "compared": found.compared.line,
        "readers": [[reader, state, why or ""] for reader, (state, why) in found.verdicts.items()],
        "notes": list(found.notes),
        "problems": [problem.line for problem in found.problems],
    }


def convert_lora(given: Mapping[str, Any]) -> Any:
    """`finetune convert`: writes the file in another format into the new folder `folder`, and checks it.

    Raises:
        CheckFailed: what was written is not what was read.
    """
    from finetune.adapters.inspection import open_adapter
    from finetune.adapters.operations import about_of, write
    from finetune.adapters.targets import Target

    adapter, found = open_adapter(Path(given["file"]), given.get("base") or None)
    dtype = given.get("dtype") or (found.dtypes[0] if len(found.dtypes) == 1 else "fp32")
    with replacing_folder(Path(given["folder"])) as temporary:
        write_json(temporary / NOTE, given["note"])
        target = Target(temporary, given["name"])
        return _told(write(adapter, target, [given["to"]], dtype, True, about_of(found)))


def merge_loras(given: Mapping[str, Any]) -> Any:
    """`finetune merge`: writes the weighted sum of LoRA files, or the base with them in it, into the new folder
    `folder`.

    Raises:
        BadInput: the files do not fit each other, or the base that a whole model needs was not named.
        CheckFailed: what was written is not what was read.
    """
    from finetune.adapters.operations import merged_files, merged_model, write
    from finetune.adapters.targets import Target, model_path

    pairs = [(Path(file), float(weight)) for file, weight in given["files"]]
    base, to = given.get("base") or None, given["to"]
    with replacing_folder(Path(given["folder"])) as temporary:
        write_json(temporary / NOTE, given["note"])
        target = Target(temporary, given["name"])
        if to not in MODELS:
            adapter, _ = merged_files(pairs, base, given.get("rank"))
            return _told(write(adapter, target, [to], "fp16", True, {}))
        if base is None:
            raise BadInput("a whole model is the base with the LoRA in it: say which base")
        return _told([merged_model(pairs, base, model_path(target, to), "fp16", to)])


def _told(exported: Sequence[Exported]) -> dict[str, Any]:
    failed = [check.line for item in exported for check in item.checks if not check.passed]
    if failed:
        raise CheckFailed(f"what was written did not pass its check and was not kept: {failed[0]}")
    return {
        "checks": [check.line for item in exported for check in item.checks],
        "read_by": [name for item in exported for name in item.read_by],
    }
