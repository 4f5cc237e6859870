"""Data sets on the Hugging Face hub: `data.photos: hf:OWNER/NAME`, or hf:OWNER/NAME@REVISION."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finetune.core.errors import BadInput, reason_of
from finetune.data.settings import hub_id
from finetune.data.sources.data_set import DataSet, NamedDataSet, without_bars


class Hub(DataSet):
    """A data set on the hub. Offline, the copy in the cache of `datasets` is used, if there is one."""

    name = "hub"

    @classmethod
    def matches(cls, path: Path) -> bool:
        """Returns whether `data.photos` names a data set on the hub."""
        return hub_id(path) is not None

    def named(self, path: Path) -> NamedDataSet:
        """Returns the hub id, its splits and its commit.

        Raises:
            BadInput: there is no such data set, or neither the hub nor a copy of it can be reached.
        """
        found = hub_id(path)
        if found is None:
            raise BadInput(f"data.source is hub but data.photos is {path}: write hf:OWNER/NAME")
        name, revision = found
        builder = self._builder(name, revision)
        splits = list(builder.info.splits or {}) or list(getattr(builder.config, "data_files", None) or {})
        if not splits:
            raise BadInput(f"the data set {name} of the hub says no split: give one that has files of data")
        arguments = {"revision": revision} if revision else {}
        return NamedDataSet(name, dict.fromkeys(splits, ()), arguments, f"{name}@{builder.hash}")

    def _builder(self, name: str, revision: str | None) -> Any:
        with without_bars() as datasets:
            try:
                return datasets.load_dataset_builder(name, revision=revision)
            except MemoryError:
                raise
            except Exception as error:  # of the network, of the hub, of its files
                raise BadInput(
                    f"the data set {name!r} can't be fetched from the hub, and there is no copy of it on this disk "
                    f"({reason_of(error)}): check the name, your connection, or `hf auth login` for a gated one"
                ) from error
