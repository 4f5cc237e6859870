"""Bad input to the commands: files that are cut, empty or in the way, and options that mean nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from bad_table import CASES, Place, case


def command(name: str, *arguments: str, words: tuple[str, ...]) -> None:
    """A case that is nothing but a command. {photos}, {run}, {path} and {base} are those of its place."""
    assert name not in CASES, name

    def make(place: Place) -> list[str]:
        run = place.done() if any("{run}" in argument for argument in arguments) else ""
        known = {"{photos}": place.photos, "{run}": run, "{path}": place.path, "{base}": place.base}
        filled = []
        for argument in arguments:
            for word, value in known.items():
                argument = argument.replace(word, str(value))
            filled.append(argument)
        return filled

    CASES[name] = (make, words)


def spoilt(name: str, command: str, file: str, spoil: Callable[[Path], object], words: tuple[str, ...]) -> None:
    """A case in which one file of a finished run is not what the run wrote."""
    assert name not in CASES, name

    def make(place: Place) -> list[str]:
        run = place.done()
        spoil(run / file)
        options = ["-p", "a mug", "--out", str(place.path / "out")] if command == "sample" else []
        return [command, str(run), *options]

    CASES[name] = (make, words)


def content(text: str | bytes) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(text if isinstance(text, bytes) else text.encode())


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def cut_in_a_key(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    file.write_text(text[: text.index("optim:") + 3], encoding="utf-8")


def a_folder(file: Path) -> None:
    file.unlink(missing_ok=True)
    file.mkdir()


def a_file(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.write_text("mine")


def dangling(file: Path) -> None:
    file.unlink()
    file.symlink_to(file.parent / "nothing")


# what a run wrote, spoilt

for where, broken in (("empty", content("")), ("cut", cut), ("a_list", content("[]")), ("null", content("null"))):
    for task in ("resume", "export", "sample", "report") if where == "cut" else ("report",):
        spoilt(f"{task}_with_run_json_{where}", task, "run.json", broken, ("run.json is damaged", "restore"))
    if where != "a_list":
        for task in ("resume", "export", "report") if where == "cut" else ("report",):
            spoilt(f"{task}_with_exports_json_{where}", task, "exports.json", broken, ("exports.json", "remove it"))
    spoilt(f"resume_with_inputs_json_{where}", "resume", "inputs.json", broken, ("inputs.json is damaged", "new run"))
for where, text in (("number", "[1]"), ("later", '[{"schema": 99}]'), ("item", '[{"format": "kohya"}]')):
    advice = "install the version" if where == "later" else "remove it"
    spoilt(f"exports_json_has_a_{where}", "export", "exports.json", content(text), ("exports.json", advice))
for where, broken in (("cut", cut), ("empty", content(b"")), ("noise", content(os.urandom(999)))):
    for task in ("export", "sample"):
        file = "adapter/trained.safetensors"
        spoilt(f"{task}_with_the_adapter_{where}", task, file, broken, ("trained.safetensors is not what", "resume"))
for name in ("run.json", "inputs.json", "status.json", "metrics.jsonl", "exports.json", "report.html", "run.lock"):
    words = (f"{name} is a folder, where a run keeps a file", "move it away")
    spoilt(f"{name}_is_a_folder", "resume", name, a_folder, words)
for name in ("adapter", "checkpoints", "exports", "photos", "samples", "samples/after"):
    words = (f"{name} is a file, where a run keeps a folder", "move it away")
    spoilt(f"{name}_is_a_file", "resume", name, a_file, words)
spoilt("report_onto_a_folder", "report", "report.html", a_folder, ("report.html is a folder", "move it away"))
spoilt("export_into_a_file", "export", "exports", a_file, ("exports is a file", "move it away"))
for task in ("resume", "export", "sample", "report"):
    text = "no schema of ours\n"
    spoilt(f"{task}_with_recipe_yaml_of_text", task, "recipe.yaml", content(text), ("recipe.yaml", "instead of"))
spoilt("resume_with_recipe_yaml_empty", "resume", "recipe.yaml", content(""), ("recipe.yaml", "'data' is missing"))
spoilt("resume_with_recipe_yaml_cut", "resume", "recipe.yaml", cut_in_a_key, ("recipe.yaml", "correct that line"))
spoilt(
    "resume_with_recipe_yaml_later", "resume", "recipe.yaml", content("# schema: 99\n"), ("99", "install the version")
)
spoilt("resume_with_recipe_yaml_binary", "resume", "recipe.yaml", content(b"\xff\xfe\0"), ("not UTF-8", "save it"))
spoilt("resume_with_a_folder_as_recipe", "resume", "recipe.yaml", a_folder, ("is not a run folder",))
spoilt("resume_with_a_dangling_recipe", "resume", "recipe.yaml", dangling, ("is not a run folder",))


@case("do not fit the recipe", "16", "give the run its own recipe.yaml back")
def resume_with_another_rank(place: Place) -> list[str]:
    run = place.done()
    recipe = (run / "recipe.yaml").read_text()
    assert "rank: 16" in recipe
    (run / "recipe.yaml").write_text(recipe.replace("rank: 16", "rank: 4"))
    return ["sample", str(run), "-p", "a mug", "--out", str(place.path / "out")]


@case("photos of", "--photos FOLDER")
def resume_without_its_photos(place: Place) -> list[str]:
    run = place.done()
    recipe = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(recipe.replace("photos: /", "photos: /gone/"))
    return ["resume", str(run)]


# commands


command("resume_nowhere", "resume", "/nowhere", words=("/nowhere is not a run folder", "give the folder of a run"))
command("resume_a_file", "resume", "{photos}/0.png", words=("is not a run folder",))
command("resume_photos_nowhere", "resume", "{run}", "--photos", "/nowhere", words=("there is no folder /nowhere",))
command("resume_with_no_processes", "resume", "{run}", "--processes", "0", words=("--processes", "1"))
command("export_a_file", "export", "{photos}/0.png", words=("is not a run folder",))
command("export_to_unknown", "export", "{run}", "--to", "kohia", words=("kohia", "did you mean 'kohya'"))
command("export_to_nothing", "export", "{run}", "--to", "", words=("''", "known are"))
command("export_a_step_that_is_not", "export", "{run}", "--step", "77", words=("step 77", "kept are: 1, 2"))
command("export_a_negative_step", "export", "{run}", "--step", "-1", words=("--step is '-1'", "or best"))
command("export_an_odd_step", "export", "{run}", "--step", "last", words=("--step is 'last'", "or best"))
command("export_checked_somehow", "export", "{run}", "--verify", "maybe", words=("export.verify is 'maybe'", "'off'"))
command("export_rank_of_a_lora", "export", "{run}", "--rank", "4", words=("export.rank is 4", "finetune resize"))
command("export_out_is_a_file", "export", "{run}", "--out", "{photos}/0.png", words=("0.png",))
command("export_error_is_nan", "export", "{run}", "--max-error", "nan", words=("export.max_error is 'nan'", "NaN"))
command("report_of_a_file", "report", "{photos}/0.png", words=("is not a run folder",))
command("report_of_a_step", "report", "{run}", "--step", "5", words=("step 5", "kept are: 1, 2"))
command("report_out_is_a_folder", "report", "{run}", "--out", "{photos}", words=("photos", "another path"))
command("sample_without_prompts", "sample", "{run}", words=("--prompt",))
command("sample_out_is_a_file", "sample", "{run}", "-p", "x", "--out", "{photos}/0.png", words=("is a file", "--out"))
command(
    "sample_out_is_in_a_file",
    "sample",
    "{run}",
    "-p",
    "x",
    "--out",
    "{photos}/0.png/x",
    words=("0.png/x", "another path"),
)
for option, value, said in (
    ("--seed", str(2**80), "at most"),
    ("--seed", "1e23", "whole number"),
    ("--seed", "one", "whole number"),
    ("--steps", "5000", "1,000"),
    ("--steps", "2.5", "whole number"),
    ("--size", "33", "multiples of"),
    ("--size", "100000", "multiples of"),
    ("--count", "1000000000", "at most 1,000"),
    ("--batch-size", "0", "at least 1"),
    ("--guidance", "nan", "give a number"),
    ("--guidance", "inf", "give a number"),
    ("--guidance", "high", "give a number"),
    ("--weight", "nan", "give a number"),
    ("--weight", "inf", "give a number"),
    ("--sampler", "", "euler"),
    ("--step", "9", "kept are"),
    ("--base", "tiny", "leave --base out"),
):
    text = ("sample", "{run}", "-p", "x", "--out", "{path}/out", option, value)
    command(f"sample_with_{option[2:]}_{value[:12]}", *text, words=(option.removeprefix("--"), said))
command("sample_an_unknown_word", "sample", "{run}", "-p", "a {dog}", "--out", "{path}/o", words=("{dog}", "braces"))
command("sample_a_photo", "sample", "{photos}/0.png", "-p", "x", "--out", "{path}/o", words=("0.png",))
command("sample_a_folder_of_photos", "sample", "{photos}", "-p", "x", "--out", "{path}/o", words=("photos",))
command("tokens_check_nothing", "tokens", "check", "", words=("''", "give a word"))
command("tokens_check_spaces", "tokens", "check", "   ", words=("give a word",))
command("tokens_check_a_base_that_is_a_file", "tokens", "check", "sks", "--base", "{photos}/0.png", words=("0.png",))
command("tokens_suggest_none", "tokens", "suggest", "-n", "0", words=("-n", "1"))
command("tokens_suggest_of_photos", "tokens", "suggest", "--base", "{photos}", words=("model_index.json",))
command(
    "recipes_copy_into_no_folder", "recipes", "copy", "demo", "{path}/no/x.yaml", words=("there is no folder", "/no")
)
command("recipes_copy_onto_a_folder", "recipes", "copy", "demo", "{photos}", words=("photos already exists",))
command("recipes_copy_unknown", "recipes", "copy", "dreambooth-lore", "{path}/x.yaml", words=("did you mean",))
command("recipes_show_nothing", "recipes", "show", "", words=("recipe",))
command("recipes_show_a_photo", "recipes", "show", "{photos}/0.png", words=("0.png", "UTF-8"))
command("recipes_schema_onto_a_folder", "recipes", "schema", "{photos}", words=("photos", "another path"))
command("inspect_nowhere", "inspect", "/nowhere", words=("'/nowhere' is not a folder", "hub id"))
command("inspect_photos", "inspect", "{photos}", words=("model_index.json",))
command("inspect_a_photo", "inspect", "{photos}/0.png", words=("0.png", "safetensors"))
command("inspect_a_run", "inspect", "{run}", words=("is a run folder, not a base", "finetune report"))
command("inspect_nothing", "inspect", "", words=("base",))
command("plan_nothing", "plan", "", words=("recipe",))
command("plan_a_photo", "plan", "{photos}/0.png", words=("0.png", "UTF-8"))
command("plan_of_no_base", "plan", "demo", "base=/nowhere", words=("/nowhere",))
command("plan_of_a_huge_rank", "plan", "demo", "method.rank=1000000000", words=("method.rank", "at most 4,096"))
command("plan_of_a_huge_block", "plan", "demo", "method.kind=oft", "method.block_size=9999", words=("at most 4,096",))
command("train_nothing", "train", "", words=("recipe",))
command("train_a_photo", "train", "{photos}/0.png", words=("0.png", "UTF-8"))
command("train_a_run_folder", "train", "{run}", words=("is a folder and no recipe", "finetune resume"))
command("train_a_device", "train", "/dev/zero", words=("/dev/zero", "recipe"))
command("train_on_no_processes", "train", "demo", "--processes", "-2", words=("--processes",))
command("train_with_an_unknown_option", "train", "demo", "--dry", words=("--dry",))
command("train_without_photos", "train", "style-lora", words=("data.photos is missing", "data.photos=FOLDER"))
command(
    "train_the_noun_as_token_on_no_base", "train", "dreambooth-lora", "data.photos={photos}", "data.class_noun=dog",
    "data.token=Dog", "base=/nowhere", words=("data.token and data.class_noun are both 'dog'",),
)  # fmt: skip
command(
    "resume_with_a_setting", "resume", "{run}", "run.steps=16",
    words=("resume takes no settings", "finetune train", "recipe.yaml run.dir=", "run.steps=16"),
)  # fmt: skip
command("resume_two_runs", "resume", "{run}", "{path}", words=("resume takes one run folder", "one run at a time"))
command("dreambooth_nothing", "dreambooth", "", "--class-noun", "dog", words=("data.photos", "give a path"))
command("dreambooth_nowhere", "dreambooth", "/nowhere", "--class-noun", "dog", words=("there is no folder /nowhere",))
command("dreambooth_a_photo", "dreambooth", "{photos}/0.png", "--class-noun", "dog", words=("0.png",))
command("dreambooth_a_blank_noun", "dreambooth", "{photos}", "--class-noun", "  ", words=("data.class_noun", "blank"))
command("dreambooth_no_noun", "dreambooth", "{photos}", "--class-noun", "", words=("class noun",))
command("dreambooth_braces", "dreambooth", "{photos}", "--class-noun", "{noun}", words=("'{noun}'", "without braces"))
command("dreambooth_a_long_noun", "dreambooth", "{photos}", "--class-noun", "x" * 999, words=("at most 200",))
command("dreambooth_a_huge_noun", "dreambooth", "{photos}", "--class-noun", "x" * 1_000_000, words=("at most 200",))
command("dreambooth_no_base", "dreambooth", "{photos}", "--class-noun", "mug", "--base", "", words=("base", "blank"))
command("demo_onto_a_file", "demo", "--out", "{photos}/0.png", words=("0.png",))
command("demo_onto_photos", "demo", "--out", "{photos}", words=("photos", "not a run folder"))
command("doctor_of_something", "doctor", "everything", words=("everything",))


# what a dry run must refuse too

for name, overrides, words in (
    ("precision", ["run.precision=fp16"], ("fp16", "no CUDA GPU")),
    ("optimiser", ["optim.kind=paged_adamw8bit"], ("paged_adamw8bit", "NVIDIA GPU")),
    ("processes", ["run.processes=4"], ("run.processes is 4", "--processes 4")),
    ("photos_as_run", ["run.dir={photos}"], ("photos exists and is not a run folder",)),
    ("run_in_a_file", ["run.dir={photos}/0.png/x"], ("could not be created", "is not a folder")),
):
    arguments = ("train", "dreambooth-lora", "data.photos={photos}", "data.class_noun=mug", "base={base}")
    command(f"dry_run_{name}", *arguments, *overrides, "--dry-run", words=words)


@case("run.batch_size 3", "2 processes", "multiple of 6")
def dry_run_of_more_processes(place: Place) -> list[str]:
    return [*place.train("run.batch_size=3", "run.accumulate=3"), "--dry-run", "--processes", "2"]


@case("another recipe", "optim.lr")
def dry_run_in_a_run_of_another_recipe(place: Place) -> list[str]:
    run = place.done()
    return [*place.train("prior.kind=none", "optim.lr=0.5", f"run.dir={run}"), "--dry-run"]


# folders and files


@case("method.targets is 'conv'", "no convolutions", "all-linear")
def targets_that_the_base_has_not(place: Place) -> list[str]:
    place.base = place.bases["flux"]
    return place.train("method.targets=conv")


@case("method.targets is cross-kv", "no separate cross attention")
def cross_attention_that_the_base_has_not(place: Place) -> list[str]:
    place.base = place.bases["flux"]
    return place.train("method.kind=pivotal", "method.targets=cross-kv", "prior.kind=none")


@case("prior.folder", "which is a file", "give a folder")
def class_images_in_a_file(place: Place) -> list[str]:
    return place.train(f"prior.folder={place.photos / '0.png'}")


@case("prior.folder", "holds the subject's photos", "leave it out")
def class_images_of_the_subject_itself(place: Place) -> list[str]:
    return place.train(f"prior.folder={place.photos}")


@case("could not be created", "run.dir=PATH")
def run_dir_is_a_dangling_link(place: Place) -> list[str]:
    (place.path / "run").symlink_to(place.path / "nothing")
    return place.train()


@case("could not be created", "run.dir=PATH")
def run_dir_in_a_file(place: Place) -> list[str]:
    return place.train(f"run.dir={place.photos / '0.png' / 'run'}")


@case("metadata.jsonl", "two different captions for 0.png", "keep one")
def captions_jsonl_twice(place: Place) -> list[str]:
    rows = '{"file_name": "0.png", "text": "a mug"}\n{"file_name": "0.png", "text": "a cup"}\n'
    return place.captioned("metadata.jsonl", rows)


@case("captions.csv", "two different captions for 1.png", "keep one")
def captions_csv_twice(place: Place) -> list[str]:
    return place.captioned("captions.csv", "file_name,text\n1.png,a mug\n1.png,a cup\n")


@case("metadata.csv", "two different captions for 2.png", "keep one")
def captions_metadata_csv_twice(place: Place) -> list[str]:
    return place.captioned("metadata.csv", "file_name,text\n2.png,a mug\n0.png,a mug\n2.png,a cup\n")


@case("0.png", "not a regular file")
def caption_is_a_link_to_a_device(place: Place) -> list[str]:
    (place.photos / "captions.csv").symlink_to("/dev/zero")
    (place.photos / "0.png").unlink()
    (place.photos / "0.png").symlink_to("/dev/zero")
    return place.train()


# bases


@case("scheduler_config.json", "num_train_timesteps")
def base_with_ten_billion_timesteps(place: Place) -> list[str]:
    return _edited(place, "scheduler/scheduler_config.json", num_train_timesteps=10**10)


@case("vae/config.json", "layers_per_block")
def base_with_a_million_layers(place: Place) -> list[str]:
    return _edited(place, "vae/config.json", layers_per_block=10**6)


@case("model_index.json", "nested")
def base_with_a_nested_index(place: Place) -> list[str]:
    (place.own_base() / "model_index.json").write_text("[" * 5000 + "]" * 5000)
    return place.train()


@case("model_index.json", "twice")
def base_with_a_key_twice(place: Place) -> list[str]:
    (place.own_base() / "model_index.json").write_text('{"_class_name": "A", "_class_name": "B"}')
    return place.train()


@case("model_index.json", "UTF-8")
def base_with_a_binary_index(place: Place) -> list[str]:
    (place.own_base() / "model_index.json").write_bytes(b"\xff\xfe\0\1")
    return place.train()


def _edited(place: Place, file: str, **values: object) -> list[str]:
    import json

    config = place.own_base() / file
    config.write_text(json.dumps(json.loads(config.read_text()) | values))
    return place.train()


# recipes


RECIPES = {
    "tabs": ("data:\n\tphotos: x\n", "not valid YAML"),
    "two_documents": ("data: {photos: x}\n---\ndata: {photos: y}\n", "not valid YAML"),
    "only_comments": ("# nothing\n", "'data' is missing"),
    "a_number": ("5", "instead of sections"),
    "a_text": ("hello", "instead of sections"),
    "null": ("null", "'data' is missing"),
    "a_merge_of_nothing": ("data: {<<: 5, photos: x}\n", "not valid YAML"),
    "numbers_as_keys": ("1: 2\n", "'data' is missing"),
    "null_as_a_key": ("null: 2\n", "'data' is missing"),
    "a_list_as_a_key": ("? [a]\n: b\n", "not valid YAML"),
    "a_date_as_photos": ("data: {photos: 2024-01-01}\nmethod: {kind: lora}\noptim: {kind: adamw}\n", "give a path"),
    "a_month_of_13": ("data: {photos: 2024-13-41}\n", "not valid YAML"),
    "an_unknown_alias": ("data: *nobody\n", "undefined alias"),
    "an_own_tag": ("data: !mine {photos: x}\n", "constructor"),
    "a_set": ("!!set {a, b}\n", "instead of sections"),
    "a_nul": ('data: {photos: "a\\0b", class_noun: x}\nmethod: {kind: lora}\noptim: {kind: adamw}\n', "give a path"),
    "a_loop": ("data: &a {photos: x, templates: [*a]}\n", "more values"),
    "a_6000_digit_number": (f"run: {{steps: {'9' * 6000}}}\n", "4300 digits"),
    "1000_brackets": (f"data: {{templates: {'[' * 1000}{']' * 1000}}}\n", "nested too deeply"),
    "true_for_a_number": (
        "data: {photos: x}\nmethod: {kind: lora, rank: yes}\noptim: {kind: adamw}\n",
        "method.rank is True: give a number",
    ),
}


def _recipe(name: str, text: str, said: str) -> None:
    CASES[f"recipe_of_{name}"] = (lambda place: place.recipe(text), ("recipe.yaml", said))


for name, (text, said) in RECIPES.items():
    _recipe(name, text, said)


@case("recipe.yaml", "larger than 1 MB")
def recipe_of_two_megabytes(place: Place) -> list[str]:
    return place.recipe("#" * 2_000_000)


@case("recipe.yaml", "not UTF-8")
def recipe_of_utf_16(place: Place) -> list[str]:
    return place.recipe("data: {photos: x}\n".encode("utf-16"))


@case("recipe.yaml", "recipe")
def recipe_is_a_pipe(place: Place) -> list[str]:
    os.mkfifo(place.path / "recipe.yaml")
    return ["train", str(place.path / "recipe.yaml")]


@case("recipe.yaml", "recipe")
def recipe_is_a_dangling_link(place: Place) -> list[str]:
    (place.path / "recipe.yaml").symlink_to(place.path / "nothing.yaml")
    return ["train", str(place.path / "recipe.yaml")]
