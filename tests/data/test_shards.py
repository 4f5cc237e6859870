"""Shards and epochs at the size of large data sets."""

from __future__ import annotations

import hashlib
import os
import weakref
from pathlib import Path

import pytest
import torch

from finetune.data import shards
from finetune.data.samplers import permutation
from finetune.data.shards import IN_MEMORY, MOST_ENTRIES, Shards

MANY = 66_000  # more than a Linux process may have memory maps (65,530)


@pytest.mark.slow
def test_more_entries_than_a_process_may_have_maps(tmp_path: Path) -> None:
    """They lie in few files, none of which stays open; each comes back as it was."""
    written = Shards(tmp_path, "base")
    for number in range(MANY):
        written.add(str(number), {"mean": torch.full((1, 2, 2), float(number))})
    written.flush()
    files = list(tmp_path.rglob("*.safetensors"))
    assert MANY / MOST_ENTRIES <= len(files) <= MANY / MOST_ENTRIES + 3
    read = Shards(tmp_path, "base")
    assert read.find(map(str, range(MANY + 1))) == [str(MANY)]
    for number in range(MANY):
        assert float(read.read(str(number))["mean"].mean()) == number
    if Path("/proc/self/fd").is_dir():
        held = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        assert not [name for name in held if name.startswith(str(tmp_path))]
        assert str(tmp_path) not in Path("/proc/self/maps").read_text(encoding="utf-8")


def test_memory_holds_a_fixed_number_of_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from finetune.data import shards

    monkeypatch.setattr(shards, "IN_MEMORY", IN_MEMORY // 1000)
    written = Shards(tmp_path, "base")
    for number in range(40):
        written.add(str(number), {"mean": torch.full((1, 32, 32), float(number))})
    written.flush()
    for number in (*range(40), 3, 39):
        assert float(written.read(str(number))["mean"].mean()) == number
        assert sum(value.nbytes for entry in written._recent.values() for value in entry.values()) <= IN_MEMORY // 1000
    assert 10 < len(written._recent) < 20


def test_no_more_is_read_ahead_than_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each start the whole cache was read, however large, since what came in last threw out what came first."""
    from finetune.data import shards

    monkeypatch.setattr(shards, "IN_MEMORY", 10 * 4096)
    written = Shards(tmp_path, "base")
    keys = [str(number) for number in range(40)]
    for key in keys:
        written.add(key, {"mean": torch.full((1, 32, 32), float(key))})
    written.flush()
    written.warm(keys)
    assert [float(entry["mean"].mean()) for entry in written._recent.values()] == list(range(10))


def test_an_entry_that_waits_to_be_written_keeps_no_memory_of_its_maker(tmp_path: Path) -> None:
    """Small tensors that lie between an encoder's freed activations, or are views of them, held gigabytes."""
    written = Shards(tmp_path, "base")
    made = torch.arange(8.0).reshape(2, 4)
    owners = [weakref.ref(made.untyped_storage()), weakref.ref(made)]
    written.add("a", {"x": made[0]})
    del made
    assert [owner() for owner in owners] == [None, None]
    written.add("b", {"x": torch.zeros(4)})
    written.add("b", {"x": torch.ones(4)})  # the last one counts
    written.flush()
    assert written.read("a")["x"].tolist() == [0, 1, 2, 3]
    assert written.read("b")["x"].tolist() == [1, 1, 1, 1]


def test_with_each_shard_freed_memory_goes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caching 100,000 pictures grew by as much as all of their latents."""
    from finetune.data import shards

    given: list[int] = []
    monkeypatch.setattr(shards, "MOST_ENTRIES", 10)
    monkeypatch.setattr(shards, "give_back_freed_memory", lambda: given.append(1))
    written = Shards(tmp_path, "base")
    for number in range(25):
        written.add(str(number), {"x": torch.zeros(4)})
    assert len(given) == 2
    written.flush()
    assert len(given) == len(list(tmp_path.rglob("*.safetensors"))) == 3


def test_processes_that_share_a_folder_find_what_the_others_made(tmp_path: Path) -> None:
    keys = [str(number) for number in range(10)]
    processes = [Shards(tmp_path, "base"), Shards(tmp_path, "base")]
    for rank, process in enumerate(processes):
        share = keys[rank::2]
        assert process.find(share) == share
        for key in share:
            process.add(key, {"x": torch.full((2,), float(key))})
        process.flush()
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2
    for process in processes:
        assert process.find(keys) == []
        assert [float(process.read(key)["x"][0]) for key in keys] == [float(key) for key in keys]


def test_a_shard_says_in_its_name_what_it_holds(tmp_path: Path) -> None:
    made = Shards(tmp_path, "base")
    made.add("a", {"x": torch.ones(2)})
    made.flush()
    (file,) = tmp_path.rglob("*.safetensors")
    assert file.stem == hashlib.sha256(file.read_bytes()).hexdigest()
    elsewhere = Shards(tmp_path, "another base")
    elsewhere.folder.mkdir(parents=True)
    (elsewhere.folder / file.name).write_bytes(file.read_bytes())
    assert elsewhere.find(["a"]) == ["a"], "what was made from another base is not read"


def test_entries_of_different_forms_lie_in_shards_of_their_own(tmp_path: Path) -> None:
    made = Shards(tmp_path, "base", narrow=True)
    large = torch.tensor([1e30, 2.0])  # no fp16 can hold that
    entries = {"a": torch.ones(2, 3), "b": torch.ones(3, 2), "c": large, "d": torch.ones(2, dtype=torch.bfloat16)}
    for key, value in entries.items():
        made.add(key, {"x": value})
    made.flush()
    assert len(list(tmp_path.rglob("*.safetensors"))) == 4
    read = Shards(tmp_path, "base", narrow=True)
    assert read.find(entries) == []
    for key, value in entries.items():
        assert torch.equal(read.read(key)["x"], value)
        assert read.read(key)["x"].dtype == value.dtype


def test_an_epoch_of_100_000_has_each_picture_once() -> None:
    orders = [list(permutation(7, "order", 0, epoch, 100_000)) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(100_000)) for order in orders)
    assert sum(one == other for one, other in zip(*orders, strict=True)) < 20
    assert orders[0] != list(permutation(8, "order", 0, 0, 100_000))


def test_what_is_written_is_let_go_name_by_name() -> None:
    """A shard that is written was in memory three times: as it was gathered, sorted, and as a file's content."""
    first = {"a": torch.zeros(3), "b": torch.zeros(2)}
    held = shards._Open(first)
    for number in (2, 1):
        held.add(bytes([number]) * 32, {name: value + number for name, value in first.items()})
    keys, entries = held.taken()
    assert keys == [bytes([1]) * 32, bytes([2]) * 32]
    assert {name: rows[:, 0].tolist() for name, rows in entries.items()} == {"a": [1, 2], "b": [1, 2]}
    assert held.rows == {}
