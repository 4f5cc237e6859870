"""The way of a person in a real browser, on the tiny base: photos, plan, start, live, server killed, stop."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra ui is not installed: pip install 'finetune-diffusion[ui]'")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

from test_pages import end_runs  # noqa: E402

from finetune.jobs.demo import demo_images  # noqa: E402

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: install Debian's chromium"),
]
LONG = 600_000  # milliseconds: the machine of a test may be busy
SETTINGS = (
    "run.steps=3000", "prior.count=2", "prior.steps=1", "sample.steps=1", "sample.count=1", "sample.every=2",
    "run.verdicts=off",
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


@pytest.fixture
def page() -> Iterator[Any]:
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        opened = browser.new_page(viewport={"width": 1180, "height": 900})
        opened.set_default_timeout(LONG)
        yield opened
        browser.close()


def steps_of(page: Any) -> int:
    return int(page.inner_text(".figures dd").split(" ")[0])


def test_the_way_of_a_person(server: Server, page: Any, tmp_path: Path) -> None:
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(server.address)
    photos = tmp_path / "mine"
    shutil.copytree(demo_images(), photos)
    (photos / "broken.png").write_bytes(b"\x89PNG not an image")
    page.set_input_files(".drop input", [str(file) for file in sorted(photos.iterdir())])
    page.wait_for_selector(".photo.worst >> text=broken.png")
    page.click("[aria-label='Leave out broken.png']")
    page.wait_for_selector("[aria-label='Take back broken.png']")
    page.fill("#noun", "mug")
    page.wait_for_selector("aside .code >> text=data.class_noun=mug")
    page.click("summary:has-text('Settings')")
    page.fill("#more", "optim.lrate=1")
    page.click("text=Make the plan")
    page.wait_for_selector(".step .fault:has-text('lrate')")  # what is wrong is said in a sentence
    page.fill("#more", "\n".join(SETTINGS))
    page.select_option("#previews", "0")
    page.click("text=Make the plan")
    page.wait_for_selector(".words >> text=from 5 photos")
    page.click("text=Start training")
    page.wait_for_selector(".figures")
    page.wait_for_selector(".film th >> text=step 2")  # a preview, while it trains
    page.wait_for_selector(".chart[class] >> text=Loss")

    server.kill()
    page.wait_for_selector("#lost:not([hidden])")
    before = steps_of(page)
    server.start()
    page.wait_for_selector("#lost", state="hidden")
    while steps_of(page) <= before:
        page.wait_for_timeout(500)

    page.click("button:has-text('Stop')")  # the page is older than the server, and asks for its new token
    page.wait_for_selector(".chip.stopped")
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    assert not errors
    steps = [json.loads(line)["step"] for line in (tmp_path / "runs/mug/metrics.jsonl").open(encoding="utf-8")]
    assert steps == list(range(1, len(steps) + 1))
    assert str(tmp_path) not in page.content()
