"""Hugging Face data sets as photos: parquet, tar shards, image folders and the hub, mapped and streamed."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet
from safetensors.torch import load_file
from test_train import LORA, settings

from finetune import resume, train
from finetune.config.load import parse_recipe
from finetune.core.errors import BadInput, Stopped
from finetune.core.events import Event, StepDone
from finetune.core.files import cache_dir, sha256
from finetune.core.parallel import mapped
from finetune.core.signals import Stop
from finetune.data import set_rows, tables
from finetune.data.captions import Words
from finetune.data.decoding import BadImage
from finetune.data.photos import photo_of, scan
from finetune.data.settings import Data, hub_id
from finetune.data.sources import webdataset
from finetune.data.sources.data_set import chosen_split, split_of
from finetune.data.sources.hub_data_set import Hub
from finetune.evaluation.prompts_file import Called
from finetune.jobs.dataset import held_out_photos
from finetune.jobs.evaluated import Trained, photos_trained_on
from finetune.jobs.pins import inputs_of
from finetune.jobs.prepare import prepare
from finetune.jobs.run_record import record_of
from finetune.jobs.subjects import Scanned, _captioned, scan_subjects
from finetune.runs.folder import RunFolder
from finetune.runs.inputs import InputsRecord, changes, read_inputs, write_inputs

TEXTS = ["a {token} {noun} on a table", "the {token} {noun}", None]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` keeps its Arrow files in a folder of the test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path / "hf"))


def contents(photos: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted(photos.glob("*.png"))]


def write_parquet(photos: Path, file: Path, texts: list[Any] = TEXTS, **columns: list[Any]) -> Path:
    """Without the note that `datasets` writes of its types: as other programs write it."""
    images = [{"bytes": content, "path": None} for content in contents(photos)]
    parquet.write_table(pyarrow.table({"image": images, "text": texts} | columns), file)
    return file


def write_shards(photos: Path, folder: Path) -> Path:
    """Two tar files; the first has two samples."""
    folder.mkdir()
    samples = list(zip(contents(photos), TEXTS, strict=True))
    for number, part in enumerate((samples[:2], samples[2:])):
        with tarfile.open(folder / f"train-{number:05d}.tar", "w") as held:
            for index, (content, text) in enumerate(part):
                for ending, data in (("png", content), ("txt", (text or "").encode())):
                    about = tarfile.TarInfo(f"{number}{index:03d}.{ending}")
                    about.size = len(data)
                    held.addfile(about, io.BytesIO(data))
    return folder


def write_folder(photos: Path, folder: Path) -> Path:
    (folder / "train").mkdir(parents=True)
    names = [file.name for file in sorted(photos.glob("*.png"))]
    rows = [{"file_name": name, "text": text} for name, text in zip(names, TEXTS, strict=True)]
    (folder / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in names:
        shutil.copy(photos / name, folder / "train" / name)
    return folder


Writer = Callable[[Path, Path], Path]
KINDS: dict[str, tuple[Writer, dict[str, Any]]] = {
    "parquet": (lambda photos, to: write_parquet(photos, to.with_suffix(".parquet")), {}),
    "webdataset": (write_shards, {}),
    "imagefolder": (write_folder, {"source": "imagefolder"}),
}


def scanned(**values: Any) -> Scanned:
    (found,) = scan_subjects(Data(class_noun="mug", **values))
    return found


@pytest.mark.parametrize("streaming", [False, True], ids=["mapped", "streamed"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_a_data_set_gives_the_folders_photos(kind: str, streaming: bool, photos: Path, tmp_path: Path) -> None:
    write, values = KINDS[kind]
    made = write(photos, tmp_path / "set")
    found = scanned(photos=made, streaming=streaming, **values)
    plain = scan(photos)
    assert [photo.digest for photo in found.photos] == [photo.digest for photo in plain]
    assert [photo.size for photo in found.photos] == [photo.size for photo in plain]
    assert found.table is not None
    assert found.table.captions == [[TEXTS[0]], [TEXTS[1]], []]
    for ours, file in reversed(list(zip(found.photos, plain, strict=True))):  # going back in a stream begins anew
        assert ours.open().tobytes() == file.open().tobytes()
    assert found.table.facts.files == {
        file.relative_to(made if made.is_dir() else made.parent).as_posix(): sha256(file)
        for file in sorted(made.rglob("*") if made.is_dir() else [made])
        if file.is_file()
    }


def test_a_second_start_reads_no_image(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_parquet(photos, tmp_path / "set.parquet")
    first = scanned(photos=file)
    monkeypatch.setattr(datasets, "load_dataset", None)
    again = scanned(photos=file)
    assert again.photos == first.photos
    assert again.table is not None
    assert again.table.facts == first.table.facts if first.table else False


def test_mapped_files_are_let_go(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages of mapped files that were read would count as memory of the process."""
    monkeypatch.setattr(set_rows, "LET_GO", 1)
    file = write_parquet(photos, tmp_path / "set.parquet")
    assert [photo.digest for photo in scanned(photos=file).photos] == [photo.digest for photo in scan(photos)]


@pytest.mark.parametrize(
    ("columns", "named"),
    [({"caption": ["a", "b", "c"]}, "text"), ({"prompt": ["a", "b", "c"]}, "text")],
)
def test_the_usual_columns_are_found(columns: dict[str, list[Any]], named: str, photos: Path, tmp_path: Path) -> None:
    found = scanned(photos=write_parquet(photos, tmp_path / "set.parquet", **columns))
    assert found.table is not None
    assert found.table.facts.columns == {"image": "image", "caption": named}
    (other,) = columns
    chosen = scanned(photos=tmp_path / "set.parquet", caption_column=other)
    assert chosen.table is not None
    assert chosen.table.captions == [["a"], ["b"], ["c"]]


def test_a_row_may_have_several_captions_or_plain_bytes(photos: Path, tmp_path: Path) -> None:
    table = {"jpg": contents(photos), "captions": [["a", "b"], ["c"], []]}
    parquet.write_table(pyarrow.table(table), tmp_path / "set.parquet")
    found = scanned(photos=tmp_path / "set.parquet")
    assert found.table is not None
    assert found.table.captions == [["a", "b"], ["c"], []]


def refused(*words: str, **values: Any) -> None:
    with pytest.raises(BadInput) as raised:
        scanned(**values)
    assert all(word in str(raised.value) for word in words), raised.value
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_mix_of_captions_is_of_columns(streaming: bool, photos: Path, tmp_path: Path) -> None:
    qwen = [["q0", "q00"], ["q1"], ["q2"]]
    file = write_parquet(photos, tmp_path / "a.parquet", ["a", "b", None], qwen=qwen, number=[1, 2, 3])
    mix = {"own": 1.0, "qwen": 3.0, "templates": 2.0}
    chosen: dict[str, Any] = {"templates": ["{token}"], "streaming": streaming}
    for _ in range(2):  # the second time from what the first one kept
        data = Data(class_noun="mug", photos=file, caption_mix=mix, **chosen)
        (found,) = scan_subjects(data)
        mixed = _captioned(data, found, Words("sks", "mug"))
        assert [item.captions for item in mixed] == [["a", "q0", "q00", "sks"], ["b", "q1", "sks"], ["q2", "sks"]]
        assert [item.shares for item in mixed] == [(1.0, 1.5, 1.5, 2.0), (1.0, 3.0, 2.0), (3.0, 2.0)]
    refused("'number', which is no column of text", photos=file, caption_mix={"own": 1, "number": 1})
    refused("row 2 of", "have no caption of data.caption_mix", photos=file, caption_mix={"own": 1})


def test_bad_data_sets_are_refused_by_name(photos: Path, tmp_path: Path) -> None:
    file = write_parquet(photos, tmp_path / "set.parquet", label=[1, 2, 3])
    refused("no column 'words'", "it has image, text, label", photos=file, caption_column="words")
    refused("no column 'img'", "it has image, text, label", photos=file, image_column="img")
    refused("'label', which holds int64 and no text", photos=file, caption_column="label")
    refused("'label', which holds int64 and no images", photos=file, image_column="label")
    refused("no split 'test'", "it has train", photos=file, split="test")
    refused("row 2 of", "have no caption", photos=file, captions="files")
    refused("data.masks is alpha", "which has no masks", photos=file, masks="alpha")
    refused("data.source is 'lmdb'", "parquet", photos=file, source="lmdb")
    refused("data.split is 'train'", "is for data sets", photos=photos, split="train")
    refused("holds no parquet files", photos=photos, source="parquet")
    refused("write hf:OWNER/NAME", photos=photos, source="hub")
    refused("there is no folder", photos=tmp_path / "none", source="imagefolder")
    (tmp_path / "cut.parquet").write_bytes(file.read_bytes()[:-40])
    refused("cut.parquet can't be read", photos=tmp_path / "cut.parquet")
    (tmp_path / "cut.tar").write_bytes(b"x" * 2000)
    refused("cut.tar can't be read", photos=tmp_path / "cut.tar")
    parquet.write_table(pyarrow.table({"image": pyarrow.array([], pyarrow.binary())}), tmp_path / "empty.parquet")
    refused("empty.parquet has no rows", photos=tmp_path / "empty.parquet")
    parquet.write_table(pyarrow.table({"number": [1]}), tmp_path / "none.parquet")
    refused("no column of images that is known: name one of number", photos=tmp_path / "none.parquet")
    refused("'owner/none' can't be fetched from the hub", "check the name, your connection", photos="hf:owner/none")
    held = contents(photos)
    parquet.write_table(pyarrow.table({"image": [held[0]] * 2}), tmp_path / "same.parquet")
    refused("all 2 rows of", "hold the same image", photos=tmp_path / "same.parquet")


def tar(file: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(file, "w") as held:
        for name, data in members:
            about = tarfile.TarInfo(name)
            about.size = len(data)
            held.addfile(about, io.BytesIO(data))
    return file


@pytest.mark.parametrize("streaming", [False, True], ids=["mapped", "streamed"])
def test_samples_of_tar_shards_need_not_have_the_same_files(streaming: bool, photos: Path, tmp_path: Path) -> None:
    """`datasets` refuses it of the first five, and takes no column that the first shard's have not."""
    images = [(f"{number}.png", content) for number, content in enumerate(contents(photos))]
    text, about = ("1.txt", b"the {token} {noun}"), ("2.json", b'{"width": 8}')
    late = tmp_path / "late"
    late.mkdir()
    tar(late / "0.tar", images[:1])
    tar(late / "1.tar", [images[1], text, images[2], about])
    for place in (tar(tmp_path / "one.tar", [*images[:2], text, images[2], about]), late):
        found = scanned(photos=place, streaming=streaming)
        assert [photo.digest for photo in found.photos] == [photo.digest for photo in scan(photos)]
        assert found.table is not None
        assert found.table.captions == [[], ["the {token} {noun}"], []]
    assert webdataset._columns([late / "0.tar"]) is None
    many = [(f"{number}.{ending}", b"") for number in range(40) for ending in ("png", "txt", "json")]
    assert webdataset._columns([tar(tmp_path / "many.tar", many)]) is None  # what is looked at ends within a sample


@pytest.mark.parametrize("streaming", [False, True], ids=["mapped", "streamed"])
def test_a_cut_tar_shard_is_refused(streaming: bool, photos: Path, tmp_path: Path) -> None:
    """Cut between two samples, it reads as a whole one with fewer of them."""
    shards = write_shards(photos, tmp_path / "shards")
    file = shards / "train-00000.tar"
    with tarfile.open(file) as held:
        second = held.getmembers()[2].offset
    whole = file.read_bytes()
    for length in (second, second + 100, len(whole) - 9_000):
        file.write_bytes(whole[:length])
        refused("the end of", "train-00000.tar is missing", "copy it again", photos=shards, streaming=streaming)


def test_a_streamed_parquet_file_is_not_kept_in_memory(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Arrow's read-ahead kept all of a file: 1.15 GB for one of 0.75 GB, and 0.47 GB without it."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))  # nothing is known of this file
    write_parquet(photos, tmp_path / "set.parquet")
    given: list[Any] = []
    load = datasets.load_dataset

    def watched(loader: str, **options: Any) -> Any:
        given.append(options.get("fragment_scan_options"))
        return load(loader, **options)

    monkeypatch.setattr(datasets, "load_dataset", watched)
    scanned(photos=tmp_path / "set.parquet", streaming=True)
    assert given
    assert not any(options.pre_buffer for options in given)


@pytest.mark.parametrize("streaming", [False, True], ids=["mapped", "streamed"])
def test_bad_rows_are_named_or_left_out(streaming: bool, photos: Path, tmp_path: Path) -> None:
    held = contents(photos)
    small = io.BytesIO()
    Image.new("RGB", (4, 4)).save(small, "PNG")
    images = [held[0], held[1][:-30], None, b"no picture", small.getvalue(), held[2]]
    parquet.write_table(pyarrow.table({"image": images, "text": list("abcdef")}), tmp_path / "set.parquet")
    named = ("4 of 6 rows", "row 1 (", "row 2 (no image)", "row 3 (not an image", "row 4 (4x4 pixels is too small)")
    refused(*named, photos=tmp_path / "set.parquet", streaming=streaming)
    found = scanned(photos=tmp_path / "set.parquet", streaming=streaming, skip_bad=True)
    assert [photo.path.name for photo in found.photos] == ["row 0", "row 5"]
    assert found.table is not None
    assert found.table.captions == [["a"], ["f"]]
    assert found.left_out.endswith("they are left out")
    assert found.photos[1].open().size == (48, 40)


def test_splits(photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    write_parquet(photos, folder / "data" / "train-00000-of-00001.parquet")
    write_parquet(photos, folder / "data" / "test-00000-of-00001.parquet", texts=["x", "y", "z"])
    assert [photo.path.name for photo in scanned(photos=folder).photos] == ["row 0", "row 1", "row 2"]
    other = scanned(photos=folder, split="test")
    assert other.table is not None
    assert (other.table.captions, other.table.facts.split) == ([["x"], ["y"], ["z"]], "test")
    assert [split_of(Path(name)) for name in ("val.tar", "test-0.parquet", "0001.parquet")] == [
        "validation", "test", "train",
    ]  # fmt: skip
    with pytest.raises(BadInput, match=r"has the splits a, b: choose one with data\.split"):
        chosen_split(["a", "b"], None, "x")


def test_a_folder_of_photos_stays_one(photos: Path, tmp_path: Path) -> None:
    """What lay beside photos before is still named as not used."""
    write_parquet(photos, photos / "more.parquet")
    found = scanned(photos=photos)
    assert found.table is None
    assert len(found.photos) == 3


@pytest.mark.parametrize("streaming", [False, True], ids=["mapped", "streamed"])
def test_a_data_set_takes_no_image_from_this_disk(streaming: bool, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "sent").mkdir()
    rows = datasets.Dataset.from_list([{"image": {"bytes": None, "path": str(photos / "0.png")}}])
    rows.to_parquet(str(tmp_path / "sent" / "set.parquet"))
    refused("not inside its folder", photos=tmp_path / "sent" / "set.parquet", streaming=streaming)


def test_a_hub_id_is_no_path(photos: Path, tmp_path: Path) -> None:
    for written in ("hf:owner/name", "hf://datasets/owner/name", "hf://owner/name"):
        assert Data(photos=written).photos.as_posix() == "hf:owner/name"
    assert hub_id(Data(photos="hf:owner/name@v1.0").photos) == ("owner/name", "v1.0")
    assert hub_id(Data(photos=photos).photos) is None


def test_the_copy_of_a_data_set_from_the_hub_is_used_offline(photos: Path, tmp_path: Path) -> None:
    """`datasets` itself writes the copy, from a file here; its name and commit are then those of one from the hub."""
    file = write_parquet(photos, tmp_path / "set.parquet")
    made = datasets.load_dataset("parquet", data_files=str(file), split="train")
    home = Path(made.cache_files[0]["filename"]).parent
    commit = "0123456789abcdef0123456789abcdef01234567"
    copy = tmp_path / "arrow" / "owner___mugs" / "default" / "0.0.0" / commit
    copy.parent.mkdir(parents=True)
    shutil.move(home, copy)
    for arrow in copy.glob("*.arrow"):
        arrow.rename(copy / arrow.name.replace("parquet-", "mugs-"))
    about = json.loads((copy / "dataset_info.json").read_text())
    about |= {"builder_name": "parquet", "dataset_name": "mugs", "config_name": "default"}
    about["splits"]["train"]["dataset_name"] = "mugs"
    (copy / "dataset_info.json").write_text(json.dumps(about))
    found = scanned(photos="hf:owner/mugs")
    assert [photo.digest for photo in found.photos] == [photo.digest for photo in scan(photos)]
    assert found.table is not None
    assert found.table.facts.revision == f"owner/mugs@{commit}"
    assert found.photos[0].open().size == (48, 40)


def test_workers_keep_the_order_and_pass_errors_on() -> None:
    def slow_square(number: int) -> int:
        if number == 50:
            raise BadInput("fifty")
        return number * number

    assert list(mapped(slow_square, range(40), 3)) == [n * n for n in range(40)]
    with pytest.raises(BadInput, match="fifty"):
        list(mapped(slow_square, range(100), 3))


def made(base: Path, photos: Path, **data: Any) -> Any:
    run = {"steps": 4, "batch_size": 2, "checkpoint_every": 2, "precision": "fp32"}
    values = settings(base, photos, LORA, run=run, prior={"kind": "none"})
    values["data"] |= data
    return parse_recipe(values)


def test_a_run_resumes_in_its_epoch_and_refuses_another_data_set(
    tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    """Streamed and mapped give the same weights, also when stopped after a step and a half of an epoch."""
    file = write_parquet(photos, tmp_path / "set.parquet")
    stop = Stop()

    def after_two(event: Event) -> None:
        if isinstance(event, StepDone) and event.step == 2:
            stop.request()

    whole = train(made(tiny_bases["sd1"], file), tmp_path / "whole")
    with pytest.raises(Stopped):
        train(made(tiny_bases["sd1"], file, streaming=True), tmp_path / "run", events=after_two, stop=stop)
    recorded = read_inputs(tmp_path / "run")
    assert recorded is not None
    assert recorded.inputs.photos == []
    (table,) = recorded.inputs.tables
    assert (table.files, table.rows, table.split) == ({"set.parquet": sha256(file)}, 3, "train")
    held = file.read_bytes()
    write_parquet(photos, file, texts=["another", "the {token} {noun}", None])
    with pytest.raises(BadInput, match=r"the file set\.parquet of the data set set\.parquet changed"):
        resume(tmp_path / "run")
    file.write_bytes(held)
    shutil.rmtree(cache_dir() / "tables")
    resume(tmp_path / "run")
    ours, theirs = (load_file(run / "adapter" / "trained.safetensors") for run in (tmp_path / "run", whole))
    assert all(bool((ours[name] == theirs[name]).all()) for name in theirs)
    assert (whole / "report.html").read_text(encoding="utf-8").count("<img") >= 3


@pytest.mark.slow
def test_the_run_is_the_folders(tiny_bases: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    """The same photos and captions, as files and as rows: the same adapter."""
    file = write_parquet(photos, tmp_path / "set.parquet")
    for name, text in zip(("0", "1"), TEXTS, strict=False):
        (photos / f"{name}.txt").write_text(str(text))
    one, other = (train(made(tiny_bases["sd1"], each), tmp_path / f"run-{each.stem}") for each in (photos, file))
    ours, theirs = (load_file(run / "adapter" / "trained.safetensors") for run in (one, other))
    assert all(bool((ours[name] == theirs[name]).all()) for name in theirs)


def test_too_little_memory_is_not_told_as_a_set_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given: Any, **more: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(datasets, "load_dataset_builder", full)
    with pytest.raises(MemoryError):
        Hub().named(Path("hf:owner/name"))


def test_rows_are_read_again_once_their_format_can_be(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until pillow-heif is installed, as the message says; the scan from before is not taken for it."""
    monkeypatch.setenv("FINETUNE_CACHE", str(tmp_path / "cache"))
    file = write_parquet(photos, tmp_path / "set.parquet")

    def unread(path: Path, content: bytes) -> Any:
        if path.name == "row 1":
            raise BadImage(path, "HEIC, which needs a package: `pip install pillow-heif`")
        return photo_of(path, content)

    monkeypatch.setattr(tables, "photo_of", unread)
    assert len(scanned(photos=file, skip_bad=True).photos) == 2
    monkeypatch.setattr(tables, "photo_of", photo_of)
    assert len(scanned(photos=file, skip_bad=True).photos) == 2
    monkeypatch.setattr(metadata, "version", lambda package: "9.9")
    assert len(scanned(photos=file).photos) == 3


@pytest.mark.parametrize("streaming", [False, True], ids=["mapped", "streamed"])
def test_an_evaluation_knows_what_of_a_data_set_was_trained_on(
    streaming: bool, tiny_bases: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    """Beside a folder of another subject: both hold one image out. A record without the images says nothing."""
    balls, file = tmp_path / "balls", write_parquet(photos, tmp_path / "set.parquet")
    shutil.copytree(photos, balls)
    for number, drawing in enumerate(sorted(balls.glob("*.png"))):
        Image.new("RGB", (40, 40), (90 * number, 30, 60)).save(drawing)
    values = settings(tiny_bases["sd1"], file, LORA, run={"steps": 2, "verdicts": "on"}, prior={"kind": "none"})
    values["data"] |= {"streaming": streaming, "hold_out": 1, "token": "zwx"}
    values["data"] |= {"subjects": [{"photos": str(balls), "class_noun": "ball", "token": "vtx"}]}
    looked = prepare(parse_recipe(values))
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    (folder.path / "recipe.yaml").touch()
    folder.write_info(record_of(looked))
    recorded = inputs_of(looked)
    write_inputs(folder.path, InputsRecord(inputs=recorded))
    source, unseen = Trained(folder.path, "run", Called("zwx", "mug"), ""), held_out_photos(looked)
    found = [photos_trained_on(source, [photo.digest]) for photo in looked.photos]
    assert found == [number not in unseen for number in range(6)]
    assert [sum(found[:3]), sum(found[3:])] == [2, 2]
    older = recorded.model_copy(update={"tables": [recorded.tables[0].model_copy(update={"images": ""})]})
    assert changes(older, recorded) == []
    write_inputs(folder.path, InputsRecord(inputs=older))
    assert photos_trained_on(source, [looked.photos[0].digest]) is None
