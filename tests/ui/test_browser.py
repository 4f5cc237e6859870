"""The page in a real browser, on the tiny base: the way of a person, and what people send by mistake or malice."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from PIL import Image

pytest.importorskip("starlette", reason="the extra ui is not installed: pip install 'finetune-diffusion[ui]'")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

from test_pages import a_run, end_runs  # noqa: E402

from finetune.jobs.demo import demo_images  # noqa: E402
from finetune.ui.drafts import TINY_SIDE  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: install Debian's chromium"),
]
LONG = 300_000  # milliseconds: the machine of a test may be busy
STEPS = 100
SETTINGS = (
    f"run.steps={STEPS}", "run.batch_size=1", "prior.kind=none", "prior.others=null", "run.verdicts=off",
    'sample.prompts=["a photo of {token} {noun}"]', "sample.steps=1", "sample.count=1", "sample.every=4",
    "export.formats=[kohya]", "export.verify=deltas",
)  # fmt: skip


class Server:
    """`finetune ui` as a process, which can be killed and started again on the same port."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.address = folder, ""
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        root = Path(__file__).parents[2]
        environment = os.environ | {
            "PYTHONPATH": str(root), "FINETUNE_CACHE": str(self.folder / "cache"), "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        port = self.address.rpartition(":")[2].strip("/") or "0"
        command = [sys.executable, "-m", "finetune", "ui", "--port", port]
        self.process = subprocess.Popen(
            command, cwd=self.folder, env=environment, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
        assert self.process.stdout is not None
        said = self.process.stdout.readline()
        self.address = re.search(r"http://[\d.]+:\d+/", said)[0]  # type: ignore[index]

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    found = Server(tmp_path)
    found.start()
    yield found
    found.kill()
    end_runs(tmp_path)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as play:
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        try:
            found = play.chromium.launch(executable_path=CHROMIUM, args=options)
        except playwright.Error as error:
            pytest.skip(f"{CHROMIUM} does not start here: {str(error).splitlines()[0]}")
        yield found
        found.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1180, "height": 900})
    context.set_default_timeout(LONG)
    yield context.new_page()
    context.close()


def steps_of(page: Any) -> int:
    return int(page.inner_text(".figures dd").split(" ")[0])


def until(page: Any, reached: Callable[[], bool]) -> None:
    """Waits without `eval`, which the page's own rules forbid."""
    for _ in range(LONG // 300):
        if reached():
            return
        page.wait_for_timeout(300)
    raise AssertionError("what was waited for did not come")


def watched(page: Any) -> list[str]:
    """What goes wrong in a page from now on: errors of its scripts, and windows that a script opens."""
    found: list[str] = []
    page.on("pageerror", lambda error: found.append(str(error)))
    page.on("dialog", lambda dialog: (found.append(dialog.message), dialog.dismiss()))
    return found


def choose_photos(page: Any, folder: Path) -> None:
    """Sends five good photos and a broken one, which is left out; tries a mask, uses it, takes it back."""
    shutil.copytree(demo_images(), folder)
    (folder / "broken.png").write_bytes(b"\x89PNG not an image")
    page.set_input_files(".drop input", [str(file) for file in sorted(folder.iterdir())])
    page.wait_for_selector(".photo.worst >> text=broken.png")
    page.click("[aria-label='Leave out broken.png']")
    page.wait_for_selector("[aria-label='Take back broken.png']")
    page.click("[aria-label='Mask 02.png']")
    page.wait_for_selector(".photo.tried")
    page.click("[aria-label='Use it 02.png']")
    page.wait_for_selector(".photo .good-text:has-text('Masked')")
    page.fill("#noun", "mug")
    page.wait_for_selector("aside .code >> text=data.masks=auto")
    page.click("[aria-label='Undo 02.png']")
    page.wait_for_selector("[aria-label='Mask 02.png']")


def planned(page: Any) -> None:
    """Makes the plan of a short run, after a setting that does not exist was refused in a sentence."""
    page.click("summary:has-text('Settings')")
    page.fill("#more", "optim.lrate=1")
    page.click("text=Make the plan")
    page.wait_for_selector(".step .fault:has-text('lrate')")
    page.fill("#more", "\n".join(SETTINGS))
    page.click("text=Make the plan")
    page.wait_for_selector(".words >> text=from 5 photos")


def kill_and_start_again(page: Any, server: Server) -> None:
    """The run lives on without its server. It is held for that time, so that a slow machine does not let it end."""
    process = json.loads((server.folder / "runs/mug/status.json").read_text(encoding="utf-8"))["process"]
    os.kill(process, signal.SIGSTOP)
    before = steps_of(page)
    server.kill()
    page.wait_for_selector("#lost:not([hidden])")
    server.start()
    page.wait_for_selector("#lost", state="hidden")
    os.kill(process, signal.SIGCONT)
    until(page, lambda: steps_of(page) > before)


def stop_and_go_on(page: Any, server: Server) -> None:
    """Stops the run from a page that is older than the server, and goes on to the end: every step is there once."""
    page.click("button:has-text('Stop')")
    page.wait_for_selector(".chip.stopped")
    assert steps_of(page) < STEPS
    page.click("button:has-text('Go on')")
    page.wait_for_selector(".chip.finished")
    metrics = (server.folder / "runs/mug/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in metrics] == list(range(1, STEPS + 1))


def compared(page: Any, run: str, step: str = "", strength: str = "1") -> None:
    """Draws one prompt with the result and, at the same seed, with a step of a run: side by side, and not the same."""
    there = page.locator(".drawing").count()
    page.select_option("#compare-with", run)
    page.select_option("#compare-with-step", step)
    page.fill("#compare-with-strength", strength)
    page.click(".try button:has-text('Draw')")
    until(page, lambda: page.locator(".drawing").count() > there)
    newest = page.locator(".drawing").first
    newest.scroll_into_view_if_needed()  # images load when they are seen
    images = newest.locator(".seeds img")
    until(page, lambda: images.evaluate_all("(all) => all.map((one) => one.naturalWidth)") == [TINY_SIDE, TINY_SIDE])
    one, other = (
        page.request.get(source).body() for source in images.evaluate_all("(all) => all.map((one) => one.src)")
    )
    assert one.startswith(b"\x89PNG")
    assert one != other


def compare(page: Any, server: Server) -> None:
    """The result beside an earlier checkpoint, and beside a copy of this run at half strength."""
    runs = server.folder / "runs"
    earlier = min(int(each.name[5:]) for each in (runs / "mug" / "checkpoints").glob("step-*"))
    assert earlier < STEPS
    until(page, lambda: page.locator(f"#with-step option[value='{earlier}']").count() == 1)  # it was open all the time
    assert page.locator("#with-step option").first.text_content() == "all steps: the result"
    shutil.copytree(runs / "mug", runs / "other")
    page.reload()
    page.click("summary:has-text('Seeds and more')")
    page.fill("#draw-count", "1")
    page.fill("#draw-steps", "1")
    compared(page, "mug", step=str(earlier))
    compared(page, "other", strength="0.5")


def download_and_check(page: Any, server: Server) -> None:
    """What the browser saves is the exported file, and the page for LoRA files finds nothing wrong with it."""
    with page.expect_download() as waiting:
        page.click("a:has-text('Download')")
    file = server.folder / "mine.safetensors"
    waiting.value.save_as(file)
    assert file.read_bytes() == (server.folder / "runs/mug/exports/mug.safetensors").read_bytes()
    page.goto(f"{server.address}#/lora")
    page.set_input_files(".drop input", str(file))
    page.wait_for_selector(".verdict.good")


def fail(page: Any, server: Server) -> None:
    """Starts the plan that a page holds, after its photos went away: the run fails, and says why in a sentence."""
    for photo in (server.folder / "finetune-ui" / "photos").rglob("*.png"):
        photo.unlink()
    page.click("text=Start training")
    page.wait_for_selector(".chip.failed")
    assert "holds no" in page.inner_text(".now .fault")


def test_the_way_of_a_person_in_two_tabs(server: Server, page: Any) -> None:
    page.goto(server.address)
    wrong = watched(page)
    choose_photos(page, server.folder / "mine")
    other = page.context.new_page()
    wrong_there = watched(other)
    other.goto(page.url)
    other.wait_for_selector("[aria-label='Mask 02.png']")
    assert other.input_value("#noun") == "mug"  # the second tab opens the same draft
    planned(other)
    planned(page)
    page.click("text=Start training")
    page.wait_for_selector(".film th >> text=step 4")  # a preview, while it trains
    page.wait_for_selector(".chart >> text=Loss")
    kill_and_start_again(page, server)
    stop_and_go_on(page, server)
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    compare(page, server)
    assert str(server.folder) not in page.content()
    download_and_check(page, server)
    other.click("text=Make the plan")  # the server that made its first plan was killed
    other.wait_for_selector(".words >> text=from 5 photos")
    fail(other, server)
    assert str(server.folder) not in other.content()
    assert not wrong + wrong_there


ODD = "$(touch pwned) 'one' & `two` é.png"
SCRIPT = "</script><img src=x onerror=alert(1)> {token} $(touch pwned)"


def image(number: int) -> bytes:
    """A small photo that no other number gives."""
    drawn = Image.radial_gradient("L").rotate(number).resize((72, 72))
    content = io.BytesIO()
    dark = drawn.point([value * number // 256 for value in range(256)])
    Image.merge("RGB", [drawn, dark, drawn.rotate(90)]).save(content, "PNG")
    return content.getvalue()


def sent(name: str, content: bytes, kind: str = "image/png") -> dict[str, Any]:
    return {"name": name, "mimeType": kind, "buffer": content}


def packed(name: str, entries: dict[str, bytes]) -> dict[str, Any]:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as held:
        for entry, inside in entries.items():
            held.writestr(entry, inside)
    return sent(name, content.getvalue(), "application/zip")


def test_200_photos_and_hostile_ones(server: Server, page: Any) -> None:
    """Many photos at once; a name, a caption and zips that would do harm are shown as text, or refused in a
    sentence."""
    harm = watched(page)
    page.goto(f"{server.address}#/new")
    photos = [sent(f"photo {number:03}.png", image(number)) for number in range(200)]
    odd = [
        sent("<img src=x onerror=alert(1)>.png", image(201)),
        sent(ODD, image(202)),
        packed("out.zip", {"../../../evil.png": image(203)}),
        packed("mixed.zip", {"a/good.png": image(204), "a/pwn.sh": b"touch pwned"}),
        sent("cut.zip", b"PK\x03\x04", "application/zip"),
    ]
    page.set_input_files(".drop input", photos + odd)
    page.wait_for_selector("text=202 photos:")
    assert page.locator(".photo").count() == 202
    page.wait_for_selector(".step .fault:has-text('cut.zip')")
    said = page.inner_text(".step .fault >> nth=0")
    for words in ("has one of", "out.zip holds no photos", "left out: pwn.sh", "cut.zip is not a complete zip file"):
        assert words in said
    caption = page.get_by_label(f"Caption of {ODD}")
    caption.fill(SCRIPT)
    caption.press("Tab")
    page.wait_for_selector("#said:has-text('is kept')", state="attached")
    page.reload()
    page.wait_for_selector("[aria-label='Leave out photo 199.png']")
    assert page.get_by_label(f"Caption of {ODD}").input_value() == SCRIPT
    assert not harm
    assert page.title() == "New run · finetune"
    assert not [file for file in server.folder.parent.rglob("*") if file.name in ("evil.png", "pwned", "pwn.sh")]


MANY, UPDATES = 100_000, 5
MOST_SECONDS, MOST_BYTES = 0.2, 300e6


def row(step: int) -> str:
    return json.dumps({"step": step, "loss": 1 / step + step % 7 / 10, "lr": 1e-4, "grad_norm": 0.1, "seconds": 0.25})


def cpu_seconds(processes: list[psutil.Process]) -> float:
    return sum(sum(each.cpu_times()[:2]) for each in processes)


def test_the_page_of_100_000_steps_stays_light(
    server: Server, page: Any, record_property: Callable[[str, object], None]
) -> None:
    """What an update costs the server and the whole browser together, and what the page and its server hold."""
    run = a_run(server.folder, "running", "long")
    status = {"state": "running", "step": MANY, "steps": 2 * MANY, "phase": "Training", "time": time.time() + 1e6}
    status |= {"done": MANY, "total": 2 * MANY}
    (run / "status.json").write_text(json.dumps(status))
    (run / "metrics.jsonl").write_text("".join(f"{row(step)}\n" for step in range(1, MANY + 1)))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url) if request.url.endswith("/live") else None)
    page.goto(f"{server.address}#/run/long")
    page.wait_for_selector(f".chart >> text=step {MANY}")
    assert server.process is not None
    working = [psutil.Process(server.process.pid)]
    working += [each for each in psutil.Process().children(recursive=True) if "chrom" in each.name()]
    spent, before = cpu_seconds(working), len(asked)
    with (run / "metrics.jsonl").open("a") as more:
        for number in range(1, UPDATES + 1):
            more.write(f"{row(MANY + number)}\n")
            more.flush()
            until(page, lambda number=number: len(asked) > before + number)  # asks the page nothing: that costs, too
    seconds = (cpu_seconds(working) - spent) / (len(asked) - before)
    page.wait_for_selector(f".chart >> text=step {MANY + UPDATES}")
    pages = [each for each in working[1:] if "--type=renderer" in each.cmdline()]
    held = working[0].memory_full_info().uss
    held += max(each.memory_full_info().uss for each in pages)
    record_property("CPU seconds of an update", seconds)
    record_property("bytes of page and server", held)
    assert seconds < MOST_SECONDS
    assert held < MOST_BYTES
