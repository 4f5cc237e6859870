"""The page's server, asked as a browser asks: what is refused, what is taken, and what is told."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import signal
import zipfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import quote

import pytest
from PIL import Image

pytest.importorskip("starlette", reason="the extra ui is not installed: pip install 'finetune-diffusion[ui]'")

from asgi import HOST, Browser, opened

from finetune.core.errors import BadInput
from finetune.runs.at_work import is_at_work
from finetune.ui import guard, uploads
from finetune.ui.chores import check_photos, unpack_zip
from finetune.ui.serve import Opening, bound, check_exposure


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def visit(folder: Path, act: Callable[[Browser], Awaitable[None]], password: str = "") -> None:
    async def going() -> None:
        async with opened(folder, password) as browser:
            await act(browser)

    asyncio.run(going())


def photo(colour: str = "teal", side: int = 80) -> bytes:
    held = io.BytesIO()
    Image.new("RGB", (side, side), colour).save(held, "PNG")
    return held.getvalue()


def a_run(folder: Path, state: str = "finished", name: str = "mug") -> Path:
    run = folder / "runs" / name
    (run / "samples" / "after").mkdir(parents=True)
    (run / "samples" / "after" / "00-0.png").write_bytes(photo())
    (run / "recipe.yaml").write_text("base:\n  source: tiny\ndata:\n  photos: /home/somebody/secret/photos\n")
    status = {"state": state, "step": 3, "steps": 3, "time": 0, "process": 1, "verdict": "good", "phase": "After"}
    (run / "status.json").write_text(json.dumps(status))
    rows = [{"step": n, "loss": 1 / n, "lr": 1e-3, "grad_norm": 1.0, "seconds": 0.5} for n in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def test_the_page_keeps_to_itself(here: Path) -> None:
    async def act(browser: Browser) -> None:
        page = await browser.get("/")
        assert page.status == 200
        assert browser.pages.rules.token in page.body.decode()
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy
        assert page.headers["x-content-type-options"] == "nosniff"
        script, style = [(await browser.get(path)).body.decode() for path in ("/page.js", "/page.css")]
        assert "http://" not in script.replace("http://www.w3.org/2000/svg", "")
        assert "innerHTML" not in script
        assert "--mark" in style  # the report's colours

    visit(here, act)


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"host": "evil.example"}, 421),
        ({"host": "127.0.0.1:9"}, 421),
        ({"host": None}, 421),
        ({guard.TOKEN: None}, 403),
        ({guard.TOKEN: "guessed"}, 403),
        ({"origin": "http://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site", "sec-fetch-mode": "navigate"}, 403),
        ({"origin": f"http://{HOST}"}, 200),
        ({"sec-fetch-site": None}, 200),
    ],
)
def test_only_the_page_itself_changes_something(headers: dict, code: int, here: Path) -> None:
    async def act(browser: Browser) -> None:
        answer = await browser.ask("POST", "/api/sets", headers=headers)
        assert answer.status == code
        assert ("set" in answer.told) == (code == 200)
        assert len(list((here / "finetune-ui").rglob("photos-*"))) == (code == 200)

    visit(here, act)


def test_another_page_may_link_here_but_not_look(here: Path) -> None:
    async def act(browser: Browser) -> None:
        other = {"sec_fetch_site": "cross-site"}
        assert (await browser.get("/", **other, sec_fetch_mode="navigate")).status == 200
        assert (await browser.get("/api/home", **other, sec_fetch_mode="cors")).status == 403
        assert (await browser.get("/page.js", **other, sec_fetch_mode="no-cors")).status == 403

    visit(here, act)


def test_a_password_is_asked_for(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "WRONG_PASSWORD_WAIT", 0.0)

    def basic(text: str) -> str:
        return f"Basic {base64.b64encode(text.encode()).decode()}"

    async def act(browser: Browser) -> None:
        for wrong in (None, "Basic", "Basic ???", basic("me:wrong"), basic("open sesame"), "Bearer open sesame"):
            answer = await browser.get("/api/home", authorization=wrong)
            assert answer.status == 401, wrong
            assert "Basic" in answer.headers["www-authenticate"]
        right = basic("me:open sesame")
        assert (await browser.get("/api/home", authorization=right, host="my.machine:7870")).status == 200

    visit(here, act, "open sesame")


def test_other_machines_need_a_password() -> None:
    place = Path("x")
    with pytest.raises(BadInput, match="FINETUNE_UI_PASSWORD"):
        check_exposure(Opening(place, place, place, host="0.0.0.0"))
    with pytest.raises(BadInput, match="at least 8"):
        check_exposure(Opening(place, place, place, host="0.0.0.0", password="short"))
    check_exposure(Opening(place, place, place, host="0.0.0.0", password="long enough"))
    check_exposure(Opening(place, place, place))


def test_a_taken_port_is_named_and_a_free_one_is_found() -> None:
    first = bound("127.0.0.1", 0)
    with first, pytest.raises(BadInput, match=r"can't be used .*--port"):
        bound("127.0.0.1", first.getsockname()[1])
    one = bound("127.0.0.1", None)
    with one, bound("127.0.0.1", None) as other:
        assert one.getsockname()[1] != other.getsockname()[1]


HOSTILE = (
    "../../evil.png", "..\\evil.png", "/etc/passwd.png", "C:\\evil.png", ".hidden.png", "con.png", "NUL.jpg",
    "a\x00.png", "a\nb.png", "x" * 200 + ".png", "", " ", "evil\u202egnp.exe", "<script>.png", "a?.png", "dot.png.",
    "script.html", "photo.svg", "run.py",
)  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_is_refused_in_a_sentence(name: str, here: Path) -> None:
    async def act(browser: Browser) -> None:
        chosen = (await browser.post("/api/sets")).told["set"]
        answer = await browser.put(f"/api/sets/{chosen}/files?name={quote(name)}", photo())
        assert answer.status == 422
        sentence = answer.told["error"]
        assert "\n" not in sentence
        assert str(here) not in sentence
        assert not [file for file in here.rglob("*") if file.is_file()]

    visit(here, act)


def test_names_of_people_and_phones_are_taken(here: Path) -> None:
    names = ["IMG_0001 (2).jpg", "Kätzchen.PNG", "狗.png", "a b.heic", "x.txt", "metadata.jsonl"]

    async def act(browser: Browser) -> None:
        chosen = (await browser.post("/api/sets")).told["set"]
        for name in names:
            answer = await browser.put(f"/api/sets/{chosen}/files?name={quote(name)}", photo())
            assert answer.told == {"added": [name], "unused": []}
        assert sorted(file.name for file in (here / "finetune-ui" / "photos" / chosen).iterdir()) == sorted(names)

    visit(here, act)


def test_a_file_that_is_too_large_leaves_nothing(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "LARGEST_PHOTO", 100_000)

    async def act(browser: Browser) -> None:
        chosen = (await browser.post("/api/sets")).told["set"]
        answer = await browser.put(f"/api/sets/{chosen}/files?name=big.png", b"x" * 200_000)
        assert (answer.status, "larger than 0.1 MB" in answer.told["error"]) == (422, True)
        answer = await browser.put(f"/api/sets/{chosen}/files?name=none.png", b"")
        assert "is empty" in answer.told["error"]
        assert not [file for file in here.rglob("*") if file.is_file()]

    visit(here, act)


def test_two_photos_of_one_name_stay_two_and_the_same_one_stays_one(here: Path) -> None:
    async def act(browser: Browser) -> None:
        chosen = (await browser.post("/api/sets")).told["set"]
        path = f"/api/sets/{chosen}/files?name=image.png"
        said = [(await browser.put(path, photo(colour))).told["added"] for colour in ("teal", "red", "teal", "red")]
        assert said == [["image.png"], ["image-2.png"], ["image.png"], ["image-2.png"]]

    visit(here, act)


@pytest.mark.parametrize("name", ["photos-00000000", "..", "%2e%2e", "photos-0000000g", "../runs"])
def test_there_are_no_sets_but_those_that_were_made(name: str, here: Path) -> None:
    async def act(browser: Browser) -> None:
        answer = await browser.put(f"/api/sets/{name}/files?name=a.png", photo())
        assert answer.status in (404, 422, 405)
        assert not [file for file in here.rglob("*") if file.is_file()]

    visit(here, act)


def test_a_photo_is_left_out_with_its_caption_and_taken_back(here: Path) -> None:
    async def act(browser: Browser) -> None:
        chosen = (await browser.post("/api/sets")).told["set"]
        path = f"/api/sets/{chosen}"
        for name, colour in (("a.png", "red"), ("b.png", "teal")):
            await browser.put(f"{path}/files?name={name}", photo(colour))
        await browser.post(f"{path}/caption", {"name": "a.png", "text": "  a red\nthing "})
        folder = here / "finetune-ui" / "photos" / chosen
        assert (folder / "a.txt").read_text() == "a red thing\n"
        await browser.post(f"{path}/out", {"name": "a.png", "out": True})
        assert [file.name for file in folder.iterdir()] == ["b.png"]
        assert (await browser.get(path)).told["left_out"] == ["a.png"]
        await browser.post(f"{path}/out", {"name": "a.png", "out": False})
        assert sorted(file.name for file in folder.iterdir()) == ["a.png", "a.txt", "b.png"]
        await browser.post(f"{path}/caption", {"name": "a.png", "text": " "})
        assert not (folder / "a.txt").exists()
        for name in ("../b.png", "c.png", "", "/etc/passwd"):
            assert (await browser.post(f"{path}/out", {"name": name, "out": True})).status == 422

    visit(here, act)


def a_zip(file: Path, entries: dict[str, bytes]) -> dict[str, str]:
    photos = file.parent / "photos"
    photos.mkdir(exist_ok=True)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as held:
        for name, content in entries.items():
            held.writestr(name, content)
    return {"zip": str(file), "photos": str(photos), "name": "mine.zip"}


def test_a_zips_photos_are_added_and_lead_nowhere(here: Path) -> None:
    inside = here / "deep"
    inside.mkdir()
    given = a_zip(inside / "a.zip", {"album/a.png": photo("red"), "album/b.png": photo("teal"), "album/run.sh": b"x"})
    assert unpack_zip(given) == {"added": ["a.png", "b.png"], "unused": ["run.sh"]}
    with pytest.raises(BadInput, match=r"has one of .* rename"):
        unpack_zip(a_zip(inside / "b.zip", {"evil?.png": photo("blue")}))
    with pytest.raises(BadInput, match="holds no photos"):
        unpack_zip(a_zip(inside / "c.zip", {"../../evil.png": photo("blue")}))
    assert not list(here.rglob("evil*"))


@pytest.mark.parametrize("fault", ["bomb", "many", "cut", "nothing"])
def test_a_hostile_zip_is_refused_in_a_sentence(fault: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "LARGEST_PHOTO", 1_000_000)
    monkeypatch.setattr(uploads, "MOST_FILES", 10)
    entries = {"bomb": {"a.png": bytes(5_000_000)}, "many": {f"{n}.png": b"x" for n in range(11)}}
    given = a_zip(here / "a.zip", entries.get(fault, {"a.html": b"x"}))
    if fault == "cut":
        (here / "a.zip").write_bytes((here / "a.zip").read_bytes()[:-10])
    with pytest.raises(BadInput, match=r"mine\.zip") as caught:
        unpack_zip(given)
    assert "\n" not in str(caught.value)
    assert not list((here / "photos").iterdir())


def test_the_check_tells_each_photo_and_makes_small_copies(here: Path) -> None:
    folder = here / "photos"
    folder.mkdir()
    (folder / "good.png").write_bytes(photo())
    (folder / "broken.png").write_bytes(photo()[:60])
    found = check_photos({"photos": str(folder), "small": str(here / "small"), "resolution": 64})
    shown = {file["name"]: (file["verdict"] == "leave out", file["shown"]) for file in found["files"]}
    assert shown["broken.png"] == (True, False)
    assert shown["good.png"][1]
    assert "folder" not in found  # no place of this machine
    with Image.open(here / "small" / "good.png.small.jpg") as small:
        assert (small.format, small.size) == ("JPEG", (80, 80))


def test_runs_of_the_command_line_are_found_and_shown(here: Path) -> None:
    a_run(here)

    async def act(browser: Browser) -> None:
        listed = (await browser.get("/api/home")).told["runs"]
        assert [(run["name"], run["state"], run["cover"]) for run in listed] == [("mug", "finished", "after/00-0.png")]
        live = (await browser.get("/api/runs/mug/live")).told
        assert [row[:2] for row in live["curve"]] == [[1, 1.0], [2, 0.5], [3, 0.33333]]
        assert live["seconds_per_step"] == 0.5
        image = await browser.get("/runs/mug/samples/after/00-0.png")
        assert (image.status, image.headers["content-type"]) == (200, "image/png")
        about = await browser.get("/api/runs/mug")
        assert "somebody" not in about.body.decode()
        assert "photos: photos" in about.told["recipe"]

    visit(here, act)


@pytest.mark.parametrize(
    "path",
    [
        "/api/runs/../secret", "/api/runs/%2e%2e/live", "/api/runs/other", "/api/runs/linked/live",
        "/runs/mug/report.html", "/runs/mug/samples/../recipe.yaml",
        "/runs/mug/samples/after/..%2f..%2frecipe.yaml",
        "/runs/mug/samples/after/01-0.png", "/runs/mug/files/recipe.yaml", "/runs/mug/files/../../../secret",
        "/runs/mug/files//etc/passwd", "/page.html", "/static/page.html", "/api/chores/0123",
    ],
)  # fmt: skip
def test_nothing_else_of_this_machine_is_shown(path: str, here: Path) -> None:
    run = a_run(here)
    secret = here / "secret"
    secret.mkdir()
    (secret / "recipe.yaml").write_text("secret: true\n")
    (here / "runs" / "linked").symlink_to(secret)
    (run / "samples" / "after" / "01-0.png").symlink_to(secret / "recipe.yaml")
    (run / "report.html").symlink_to(secret / "recipe.yaml")

    async def act(browser: Browser) -> None:
        answer = await browser.get(path)
        assert answer.status in (404, 405, 422), answer.body
        assert b"secret" not in answer.body
        assert str(here).encode() not in answer.body
        assert [each["name"] for each in (await browser.get("/api/home")).told["runs"]] == ["mug"]

    visit(here, act)


def test_an_exported_file_is_sent_and_a_folder_as_a_zip(here: Path) -> None:
    run = a_run(here)
    (run / "exports" / "mug-peft").mkdir(parents=True)
    (run / "exports" / "mug.safetensors").write_bytes(b"weights")
    (run / "exports" / "mug-peft" / "adapter.json").write_bytes(b"{}")
    one = {"size": 7, "read_by": ["ComfyUI"], "checks": [], "modules": 1}
    paths = {"peft": "exports/mug-peft", "kohya": "exports/mug.safetensors"}
    listed = [{"format": kind, "path": path, **one} for kind, path in paths.items()]
    (run / "exports.json").write_text(json.dumps(listed))

    async def act(browser: Browser) -> None:
        files = (await browser.get("/api/runs/mug")).told["files"]
        assert [file["format"] for file in files] == ["kohya", "peft"]
        assert files[0]["places"]["ComfyUI"] == "ComfyUI/models/loras"
        sent = await browser.get("/runs/mug/files/exports/mug.safetensors")
        assert (sent.body, sent.headers["content-disposition"]) == (
            b"weights",
            "attachment; filename*=UTF-8''mug.safetensors",
        )
        packed = await browser.get("/runs/mug/files/exports/mug-peft")
        with zipfile.ZipFile(io.BytesIO(packed.body)) as held:
            assert held.read("mug-peft/adapter.json") == b"{}"
        assert not list((here / "finetune-ui" / "incoming").iterdir())

    visit(here, act)


@pytest.mark.parametrize(("state", "told"), [("running", "ended"), ("stopped", "stopped"), ("failed", "failed")])
def test_a_run_that_does_not_work_now_says_so(state: str, told: str, here: Path) -> None:
    """A status that says running, of a process that was killed, is not believed."""
    a_run(here, state)

    async def act(browser: Browser) -> None:
        assert (await browser.get("/api/runs/mug/live")).told["state"] == told
        refused = await browser.post("/api/runs/mug/stop")
        assert (refused.status, "not at work" in refused.told["error"]) == (422, True)

    visit(here, act)


def test_a_run_at_work_in_another_process_is_seen(here: Path) -> None:
    from filelock import FileLock

    run = a_run(here, "running")

    async def act(browser: Browser) -> None:
        with FileLock(run / "run.lock"):
            assert (await browser.get("/api/runs/mug/live")).told["state"] == "running"
            refused = await browser.post("/api/runs/mug/resume")
            assert "at work already" in refused.told["error"]
            other = await browser.post("/api/runs/mug/stop")  # process 1, of a host that is not this one
            assert "another machine" in other.told["error"]

    visit(here, act)


def test_what_was_not_planned_is_not_started(here: Path) -> None:
    async def act(browser: Browser) -> None:
        assert (await browser.post("/api/start", {"plan": "0" * 16})).status == 422
        assert (await browser.post("/api/start", {})).status == 422
        assert not (here / "runs").exists()

    visit(here, act)


@pytest.mark.parametrize("body", [b"[", b"[1]", b'{"a":' * 100 + b"1" + b"}" * 100, b"\xff\xfe", b'{"set": 1e999}'])
def test_a_strange_request_is_answered_in_a_sentence(body: bytes, here: Path) -> None:
    async def act(browser: Browser) -> None:
        answer = await browser.ask("POST", "/api/recipe", body)
        assert answer.status == 422
        assert answer.told["error"]

    visit(here, act)


def end_runs(folder: Path) -> None:
    """Runs outlive their server, so a test that fails must end them."""
    for file in (folder / "runs").glob("*/status.json"):
        if is_at_work(file.parent):
            os.kill(json.loads(file.read_text())["process"], signal.SIGTERM)


@pytest.mark.slow
def test_a_run_lives_on_without_its_server_stops_and_goes_on(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started by one server, seen and stopped by the next one, continued to its end by a third; two pages at once."""
    import shutil
    import time

    from finetune.jobs.demo import demo_images

    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("FINETUNE_CACHE", str(here / "cache"))
    more = [
        "run.steps=2000", "prior.kind=none", "prior.others=null", "sample.steps=1", "sample.count=1",
        "export.formats=[kohya]", "run.verdicts=off", "export.verify=off",
    ]  # fmt: skip
    names: dict[str, str] = {}

    async def until(browser: Browser, reached: Callable[[dict], bool]) -> dict:
        end = time.monotonic() + 300
        while not reached(live := (await browser.get(f"/api/runs/{names['run']}/live")).told):
            assert time.monotonic() < end, live
            await asyncio.sleep(0.2)
        return live

    async def first(browser: Browser) -> None:
        chosen = (await browser.post("/api/sets")).told["set"]
        for file in sorted(demo_images().glob("*.png")):
            shutil.copy(file, here / "finetune-ui" / "photos" / chosen)
        wish = {"set": chosen, "kind": "thing", "noun": "mug", "base": "tiny", "more": more}
        plan = (await browser.post("/api/plan", wish)).told["chore"]
        planned = await browser.chore(plan)
        assert planned["state"] == "done", planned
        assert "2000 steps" in planned["result"]["words"][1]
        assert planned["result"]["warnings"] == []  # the toy knows mugs
        names["run"] = (await browser.post("/api/start", {"plan": plan})).told["run"]
        await until(browser, lambda live: live["step"] and live["step"] > 1)

    async def second(browser: Browser) -> None:
        assert [run["name"] for run in (await browser.get("/api/home")).told["runs"]] == ["mug"]
        step = (await until(browser, lambda live: live["state"] == "running"))["step"]
        await until(browser, lambda live: live["step"] > step)
        assert (await browser.post("/api/runs/mug/stop")).status == 200
        stopped = await until(browser, lambda live: live["state"] == "stopped")
        assert stopped["step"] < 2000
        assert stopped["images"][0]["folder"] == "before"

    async def third(browser: Browser) -> None:
        before = (await browser.get("/api/runs/mug/live")).told["step"]
        assert (await browser.post("/api/runs/mug/resume")).status == 200
        assert (await browser.post("/api/runs/mug/resume")).status == 422  # a second page
        await until(browser, lambda live: live["state"] == "running" and live["step"] > before)
        assert (await browser.post("/api/runs/mug/stop")).status == 200
        await until(browser, lambda live: live["state"] == "stopped")

    try:
        for act in (first, second, third):
            visit(here, act)
    finally:
        end_runs(here)
    steps = [json.loads(line)["step"] for line in (here / "runs" / "mug" / "metrics.jsonl").open(encoding="utf-8")]
    assert steps == list(range(1, len(steps) + 1))
