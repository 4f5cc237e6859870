"""How processes wait, agree and fail together: two threads on one store of torch."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from finetune.config.load import load_recipe
from finetune.core.errors import BadInput, CheckFailed
from finetune.core.progress import is_main_process
from finetune.core.signals import Interrupted
from finetune.jobs.nodes import FolderChoice
from finetune.training.checkpoint import Checkpoints, State
from finetune.training.heartbeat import Heartbeat
from finetune.training.peers import LAUNCH, Peers, joined
from finetune.training.shared_state import fingerprint

Work = Callable[[Peers], Any]


def of_two(*work: Work) -> list[Any]:
    """What each of two processes' work returns, or the error that ended it."""
    store = HashStore()
    store.set_timeout(timedelta(seconds=30))

    def one(rank: int) -> Any:
        peers = Peers(rank, 2, store, Heartbeat(store, rank, 2))
        try:
            with peers.in_a_run():
                return work[rank](peers)
        except (BadInput, CheckFailed, Interrupted) as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, (0, 1)))


def test_values_come_to_all_in_their_order() -> None:
    def work(peers: Peers) -> list[Any]:
        return [peers.gather([peers.rank, "é"]), peers.from_first({"of": peers.rank}), peers.gather(None)]

    assert of_two(work, work) == [[[[0, "é"], [1, "é"]], {"of": 0}, [None, None]]] * 2


def test_nobody_goes_on_before_all_have_come() -> None:
    done = threading.Event()

    def slow(peers: Peers) -> None:
        done.wait(0.3)
        done.set()
        peers.wait()

    def quick(peers: Peers) -> bool:
        peers.wait()
        return done.is_set()

    assert of_two(slow, quick)[1] is True


@pytest.mark.parametrize("error", [BadInput("no photos"), CheckFailed("the loss is nan"), Interrupted(15)])
def test_what_ends_one_ends_the_other_with_the_same_words(error: BaseException) -> None:
    def fails(peers: Peers) -> None:
        raise error

    for work in ((fails, Peers.wait), (Peers.wait, fails)):
        found = of_two(*work)
        assert [type(one) for one in found] == [type(error)] * 2
        assert [str(one) for one in found] == [str(error)] * 2


def test_work_is_dealt_over_those_that_see_the_same_folder(tmp_path: Path) -> None:
    def shared(peers: Peers) -> tuple[int, int]:
        found = peers.of_folder(tmp_path / "shared")
        return found.rank, found.world

    def own(peers: Peers) -> tuple[int, int]:
        found = peers.of_folder(tmp_path / f"disk-{peers.rank}")
        return found.rank, found.world

    assert of_two(shared, shared) == [(0, 2), (1, 2)]
    assert of_two(own, own) == [(0, 1), (0, 1)]
    assert not [file for file in tmp_path.rglob("*") if file.is_file()]


def test_a_run_whose_checkpoints_are_on_another_machine_is_refused(tmp_path: Path) -> None:
    """Both look at a folder of the same name, each on its own disk."""
    one = {"denoiser.x": torch.ones(2)}
    Checkpoints(tmp_path / "1" / "run").save(State(20, one, {}), 1)
    recipe = load_recipe("dreambooth-lora", {"data.photos": "photos", "data.class_noun": "mug", "run.dir": "run"})

    def choose(peers: Peers) -> Path:
        choice = FolderChoice(recipe, None, peers)
        choice._refuse_later_elsewhere(tmp_path / str(peers.rank) / "run")
        return choice.chosen()

    refused = of_two(choose, choose)
    assert all(isinstance(error, BadInput) and "step 20" in str(error) for error in refused), refused
    (tmp_path / "1").rename(tmp_path / "0")
    assert of_two(choose, choose) == [Path("run")] * 2


def test_a_fingerprint_tells_one_bit_one_name_and_one_step() -> None:
    def state(**changed: Any) -> State:
        usual: dict[str, Any] = {
            "step": 3,
            "trained": {"a": torch.tensor([1.0, 2.0])},
            "optimizer": {"0/step": torch.tensor(3.0)},
            "values": {"optimizer": {"d": 0.5}},
        }
        return State(**usual | changed)

    near = torch.tensor([1.0, 2.0]).view(torch.int32) + torch.tensor([0, 1], dtype=torch.int32)
    others = [
        state(step=4),
        state(trained={"a": near.view(torch.float32)}),
        state(trained={"b": torch.tensor([1.0, 2.0])}),
        state(optimizer={"0/step": torch.tensor(4.0)}),
        state(values={"optimizer": {"d": 0.25}}),
        state(ema={"a": torch.tensor([1.0, 2.0])}),
    ]
    assert fingerprint(state()) == fingerprint(state())
    assert len({fingerprint(one) for one in [state(), *others]}) == 7


@pytest.mark.parametrize(
    ("left", "said"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, .* without RANK and MASTER_ADDR and MASTER_PORT"),
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x, .* WORLD_SIZE is no number"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0, .* without RANK and WORLD_SIZE"),
        ({"WORLD_SIZE": "1", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "here"}, "without MASTER_PORT"),
    ],
)
def test_variables_that_another_program_left_are_refused(
    left: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch and Accelerate would raise errors of their own, or wait for processes that nobody started."""
    for name in LAUNCH:
        monkeypatch.delenv(name, raising=False)
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match=said) as refused:
        joined()
    assert "unset WORLD_SIZE RANK LOCAL_RANK" in str(refused.value)


@pytest.mark.parametrize("left", [{}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": "", "RANK": "1"}, {"LOCAL_RANK": "-1"}])
def test_a_process_alone_never_joins(left: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*LAUNCH, "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in left.items():
        monkeypatch.setenv(name, value)
    assert joined().world == 1
    assert is_main_process()  # it says what it does


ENDS_WHILE_IT_TALKS = """
import time
from datetime import timedelta
from torch.distributed import TCPStore
from finetune.training import heartbeat
heartbeat.BEAT = 0
store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=30))
beats = heartbeat.Heartbeat(store, 0, 1)
beats.sign()
beats.start()
while store.get("finetune/beat/0") == b"0":
    time.sleep(0.01)
"""


def test_a_process_that_talks_while_it_ends_ends_without_an_error() -> None:
    """Python ends a thread that is in C++ code when the interpreter goes down: the process was aborted by SIGABRT."""
    done = subprocess.run([sys.executable, "-c", ENDS_WHILE_IT_TALKS], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
