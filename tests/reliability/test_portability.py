"""Windows and macOS, which no test runs on here: what Linux can play of them, and what the source must not name."""

from __future__ import annotations

import ast
import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path, PureWindowsPath

import pytest
import torch
from safetensors.torch import load_file

from finetune.cli import launch
from finetune.config.load import parse_recipe
from finetune.core.errors import BadInput
from finetune.core.files import load_tensors, save_tensors, write_text
from finetune.core.signals import STOPPING
from finetune.runs.folder import RunFolder
from finetune.training.settings import Run

ROOT = Path(__file__).parents[2]
OURS = [file for part in ("finetune", "data_tools") for file in sorted((ROOT / part).rglob("*.py"))]
PROGRAMS = sorted((ROOT / "benchmarks").glob("*.py"))
POSIX_MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
POSIX_NAMES = {
    "os": {
        "O_DIRECTORY", "O_NOFOLLOW", "chown", "fork", "forkpty", "geteuid", "getgid", "getpgid", "getuid", "killpg",
        "mkfifo", "nice", "sched_getaffinity", "setsid", "statvfs", "sysconf", "uname", "wait", "waitpid",
    },
    "signal": {"SIGALRM", "SIGCHLD", "SIGHUP", "SIGKILL", "SIGQUIT", "SIGUSR1", "SIGUSR2", "alarm", "setitimer"},
}  # fmt: skip
OPENS = {"open", "read_text", "write_text", "fdopen", "NamedTemporaryFile"}


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def at_module_level(node: ast.AST) -> list[ast.AST]:
    """What runs when the module is imported, outside `try`."""
    found: list[ast.AST] = []
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Try):
            found += [child, *at_module_level(child)]
    return found


def imported(node: ast.AST) -> set[str]:
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[0] for alias in node.names}
    return {(node.module or "").split(".")[0]} if isinstance(node, ast.ImportFrom) else set()


def posix_modules(module: ast.Module) -> set[str]:
    return {name for node in at_module_level(module) for name in imported(node)} & POSIX_MODULES


def posix_names(module: ast.Module) -> set[str]:
    return {
        f"{node.value.id}.{node.attr}"
        for node in ast.walk(module)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.attr in POSIX_NAMES.get(node.value.id, ())
    }


def mode_of(call: ast.Call, is_method: bool) -> str:
    """ "r" where none is said."""
    place = 0 if is_method else 1
    said = [item.value for item in call.keywords if item.arg == "mode"] + call.args[place : place + 1]
    return str(said[0].value) if said and isinstance(said[0], ast.Constant) else "r"


# things of our own whose `open` gives no text file
OWN_OPEN = ("os", "Image", "mask", "self.mask", "kind()", "export", "photo", "photos[number]", "chosen(options)")


def faults_of_text(module: ast.Module) -> list[str]:
    """Text that is read or written in the system's own encoding, or written with its own newlines."""
    found = []
    for node in ast.walk(module):
        if not isinstance(node, ast.Call):
            continue
        is_method = isinstance(node.func, ast.Attribute)
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        owner = ast.unparse(node.func.value) if isinstance(node.func, ast.Attribute) else ""
        if name not in OPENS or owner in OWN_OPEN:
            continue
        mode = "w" if name == "write_text" else "r" if name == "read_text" else mode_of(node, is_method)
        given = {item.arg for item in node.keywords}
        if (name == "write_text" and not is_method) or "b" in mode:
            continue  # finetune.files.write_text; bytes
        needed = {"encoding"} | ({"newline"} if set(mode) & set("wax+") else set())
        if needed - given:
            found.append(f"line {node.lineno}: {ast.unparse(node)[:60]} has no {', '.join(sorted(needed - given))}")
    return found


def test_planted_faults_are_found() -> None:
    assert posix_modules(ast.parse("if True:\n    import fcntl.x")) == {"fcntl"}
    assert posix_modules(ast.parse("from resource import y")) == {"resource"}
    assert not posix_modules(ast.parse("def f():\n    import pwd\ntry:\n    import grp\nexcept ImportError: pass"))
    assert posix_names(ast.parse("os.kill(1, signal.SIGKILL) or os.fork()")) == {"signal.SIGKILL", "os.fork"}
    for text in ("open(f)", "open(f, 'w', encoding='utf-8')", "p.open('a')", "p.read_text()", "p.write_text(t)"):
        assert faults_of_text(ast.parse(text)), text
    fine = ("open(f, 'rb')", "p.open('r+b')", "p.read_text(encoding='utf-8')", "write_text(p, t)")
    assert not any(faults_of_text(ast.parse(text)) for text in fine)


@pytest.mark.parametrize("file", [*OURS, *PROGRAMS], ids=lambda file: str(file.relative_to(ROOT)))
def test_source_names_nothing_that_windows_lacks(file: Path) -> None:
    module = tree(file)
    assert not posix_modules(module)
    assert not posix_names(module)
    assert not faults_of_text(module)


def as_windows(what: str, work: Path, *more: object) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "FINETUNE_CACHE": str(work / "cache"), "OMP_NUM_THREADS": "1"}
    (work / "cache").mkdir()
    command = [sys.executable, Path(__file__).with_name("as_windows.py"), what, work, *more]
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, check=False, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.endswith("done\n")


@pytest.mark.slow
def test_without_posix_every_module_imports_and_files_are_written_safely(tmp_path: Path) -> None:
    as_windows("rules", tmp_path)


@pytest.mark.slow
def test_without_posix_the_demo_trains_goes_on_and_exports(tmp_path: Path) -> None:
    as_windows("first-steps", tmp_path, ROOT / "examples" / "subject_mug")
    listed = json.loads((tmp_path / "run" / "exports.json").read_text(encoding="utf-8"))
    assert {item["format"] for item in listed} == {"kohya", "diffusers", "peft"}
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").open(encoding="utf-8")]
    assert steps == [1, 2, 3]
    assert [file.name for file in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000003"]


ON_SUCH_A_CONSOLE = """
import json, runpy, sys
for words in json.loads(sys.argv[1]):
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="cp1252", errors="strict")
    sys.argv = words
    try:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        print(f"[ended with {end.code or 0}]", flush=True)
"""


def ended(calls: list[tuple[object, ...]]) -> list[tuple[bytes, int]]:
    """What the calls print on a console of cp1252, and their exit codes. One process: each imports for seconds."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    words = json.dumps([list(map(str, call)) for call in calls])
    command = [sys.executable, "-c", ON_SUCH_A_CONSOLE, words]
    done = subprocess.run(command, capture_output=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr.decode("cp1252")
    assert b"Traceback" not in done.stderr
    parts = re.findall(rb"(.*?)\[ended with (\d+)\]\r?\n", done.stdout, re.DOTALL)
    assert len(parts) == len(calls), done.stdout
    return [(said, int(code)) for said, code in parts]


@pytest.mark.slow
def test_a_console_that_lacks_characters_ends_no_command(photos: Path, tmp_path: Path) -> None:
    """cp1252, as on Windows: what it has not is shown by its number."""
    place = photos.rename(tmp_path / "杯")
    given = (f"data.photos={place}", "data.class_noun=mug", 'data.templates=["a photo of {token} {noun}, 杯"]')
    calls = (
        (("finetune", "--help"), b"doctor"),
        (("finetune", "recipes", "show", "demo"), b"kind: lora"),
        (("finetune", "plan", "demo", *given), b"parameters"),
        (("finetune", "train", "demo", *given, "--dry-run"), rb"\u676f"),
        (("data_tools", "check", place), rb"\u676f"),
    )
    for (arguments, expected), (said, code) in zip(calls, ended([words for words, _ in calls]), strict=True):
        assert code in (0, 1), arguments  # 1: photos with problems
        assert expected in said, arguments


def test_json_for_other_programs_is_whole_on_such_a_console(photos: Path, tmp_path: Path) -> None:
    place = photos.rename(tmp_path / "杯")
    (place / "0.txt").write_text("une tasse — 杯", encoding="utf-8")
    ((said, _),) = ended([("data_tools", "check", place, "--json")])
    told = json.loads(said)
    assert told["folder"] == place.as_posix()
    assert told["files"][0]["caption"] == "une tasse — 杯"


def test_paths_stand_with_slashes_in_recipes() -> None:
    run = Run.model_construct(dir=PureWindowsPath(r"C:\runs\mug"))
    assert run.model_dump(mode="json")["dir"] == "C:/runs/mug"
    assert Run().model_dump(mode="json")["dir"] is None


@pytest.mark.parametrize("name", ["aux", "CON", "nul.2", "com1", "LPT9.x", "mug.", "mug "])
def test_a_name_that_windows_has_not_is_refused(name: str, photos: Path) -> None:
    data = {"photos": str(photos), "class_noun": "mug"}
    with pytest.raises(BadInput, match=r"run\.name.*Windows"):
        parse_recipe({"data": data, "method": {"kind": "lora"}, "optim": {"kind": "adamw"}, "run": {"name": name}})


@pytest.mark.parametrize("name", ["auxiliary", "console", "com", "mug.2", "nul-1", "lpt10"])
def test_a_name_that_only_looks_like_one_is_taken(name: str) -> None:
    assert Run(name=name).name == name


def test_tensors_are_no_longer_mapped_to_their_file(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_tensors(file, {"x": torch.arange(5000.0)})
    maps = Path("/proc/self/maps")
    mapped = load_file(file)
    assert str(file) in maps.read_text(encoding="utf-8")  # else the next line shows nothing
    copied = load_tensors(file)
    assert torch.equal(copied["x"], mapped["x"])
    del mapped
    assert str(file) not in maps.read_text(encoding="utf-8")


def test_text_has_plain_newlines_on_every_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "linesep", "\r\n")
    write_text(tmp_path / "x", "a\nü\n")
    assert (tmp_path / "x").read_bytes() == "a\nü\n".encode()


def test_a_filesystem_without_locks_is_named(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A soft lock, which a dead process would hold, is no lock of ours."""

    def none(*rest: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    data = {"photos": str(photos), "class_noun": "mug"}
    recipe = parse_recipe({"data": data, "method": {"kind": "lora"}, "optim": {"kind": "adamw"}})
    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(BadInput, match=r"without file locks.*run\.dir=PATH"), RunFolder(tmp_path / "run").held(recipe):
        pass


def test_the_second_of_one_process_is_refused_too(photos: Path, tmp_path: Path) -> None:
    data = {"photos": str(photos), "class_noun": "mug"}
    recipe = parse_recipe({"data": data, "method": {"kind": "lora"}, "optim": {"kind": "adamw"}})
    folder = RunFolder(tmp_path / "run")
    with folder.held(recipe):
        for _ in range(2):  # a refused one leaves the name there
            with pytest.raises(BadInput, match=f"in use by process {os.getpid()} on"), folder.held(recipe):
                pass
    with folder.held(recipe):
        pass


@pytest.mark.parametrize("tells_all", [True, False])
def test_a_key_press_is_passed_on_where_the_console_does_not(tells_all: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """os.kill ends a process on Windows, where it would have saved its step."""
    passed: list[tuple[int, int]] = []
    monkeypatch.setattr(launch, "CONSOLE_TELLS_ALL", tells_all)
    with launch._signals_passed_on([11, 12]):
        monkeypatch.setattr(os, "kill", lambda pid, number: passed.append((pid, number)))
        signal.raise_signal(signal.SIGINT)
    assert passed == ([] if tells_all else [(11, signal.SIGINT), (12, signal.SIGINT)])
    assert {signal.SIGINT, signal.SIGTERM} <= set(STOPPING)


def test_a_wait_that_a_signal_cut_short_goes_on() -> None:
    """On Windows the wait for processes ends so after Ctrl-C; Linux takes it up again by itself."""

    class Context:
        calls = 0

        def join(self, grace_period: float) -> bool:
            self.calls += 1
            if self.calls == 1:
                raise InterruptedError
            return self.calls == 3

    context = Context()
    assert launch._join(context) is None
    assert context.calls == 3
