"""An independent check of version 0.1 found these faults. Each has a test, which is named here and must exist.

The numbers are those of the check's list: A, wrong results without a word; B, what other programs read; C, bad input;
D, security; E, what a person meets.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent.parent
FOUND: dict[str, list[str]] = {
    "A1 folders and words parsed as YAML": [
        "config/test_overrides.py::test_the_short_way_trains_the_folder_that_was_named",
        "config/test_overrides.py::test_words_are_taken_as_they_are",
    ],
    "A2 resume on changed or moved photos": [
        "jobs/test_pins.py::test_a_change_is_refused_by_name_and_nothing_is_written_over",
        "jobs/test_pins.py::test_what_moved_or_was_renamed_is_found_by_its_content",
    ],
    "A3 resume on a changed base": [
        "jobs/test_pins.py::test_a_change_is_refused_by_name_and_nothing_is_written_over",
        "jobs/test_pins.py::test_a_base_with_the_same_size_and_time_is_not_taken_for_the_old_one",
    ],
    "A4 damaged cache entries and results": [
        "data/test_cache.py::test_a_wrong_entry_is_made_again",
        "jobs/test_pins.py::test_a_damaged_result_is_named_and_made_again_from_the_checkpoint",
    ],
    "A5 run.keep, and starting over unsaid": [
        "runs/test_run.py::test_only_sound_ones_are_counted_and_the_one_just_written_stays",
        "jobs/test_pins.py::test_a_run_says_where_it_goes_on_and_why_it_starts_over",
    ],
    "A7 a longer run bends the learning rate": [
        "jobs/test_checkpoints.py::test_a_longer_run_keeps_the_curve_of_its_learning_rate_or_is_refused",
    ],
    "A8 files that training ignores": [
        "data/test_formats.py::test_more_names_are_photos",
        "data/test_formats.py::test_captions_beside_the_photo",
        "data/test_formats.py::test_metadata",
        "data/test_formats.py::test_kohyas_folder_is_read",
        "data/test_formats.py::test_the_plan_names_what_is_not_used",
    ],
    "A9 placeholders, templates and tokens": [
        "jobs/test_run_words.py::test_words_that_are_refused",
        "jobs/test_run_words.py::test_a_template_without_the_token",
        "jobs/test_run_words.py::test_a_mark_of_the_tokenizer_is_no_rare_token",
        "jobs/test_run_words.py::test_a_run_fills_in_its_words",
    ],
    "A10 sample overwrites, ignores and cuts": [
        "jobs/test_checkpoints.py::test_images_are_numbered_on_and_none_is_overwritten",
        "jobs/test_checkpoints.py::test_a_cut_prompt_is_named",
        "jobs/test_checkpoints.py::test_sample_refuses_in_one_sentence",
    ],
    "A11 settings without a sane effect": [
        "config/test_effect.py::test_a_warm_up_fits_into_the_run",
        "jobs/test_checkpoints.py::test_photos_that_are_never_seen_are_told",
        "config/test_overrides.py::test_a_section_that_is_given_whole_keeps_what_was_given_before",
        "jobs/test_class_images.py::test_the_subjects_own_photos_are_no_class_images",
    ],
    "A12 previews: EMA, and lost ones": [
        "jobs/test_api.py::test_previews_under_ema_show_what_leaves",
        "jobs/test_api.py::test_a_preview_that_a_stop_left_out_is_drawn_later",
    ],
    "A13 templates are drawn at random": ["data/test_batches.py::test_one_template_is_drawn_each_time"],
    "C bad input": [
        "reliability/test_bad_input.py::test_one_sentence_and_nothing_left",
        "reliability/test_safety.py::test_broken_json_in_a_run_is_named",
        "reliability/test_safety.py::test_a_broken_state_is_a_damaged_checkpoint",
        "reliability/test_safety.py::test_odd_metrics_draw_no_curve_and_stop_no_page",
        "reliability/test_safety.py::test_a_base_asks_for_no_boundless_work",
    ],
    "D1 pickles and files outside the base, by an index": [
        "reliability/test_safety.py::test_an_index_names_only_safetensors_files_beside_it",
    ],
    "D2 script and foreign images on a page": [
        "reliability/test_safety.py::test_no_value_of_a_received_run_is_script_on_its_page",
        "reliability/test_safety.py::test_a_received_run_shows_no_image_of_this_disk",
    ],
    "D3 relative paths leak": ["reliability/test_safety.py::test_relative_paths_tell_no_more_than_absolute_ones"],
    "D4 any scheduler class": ["reliability/test_safety.py::test_a_scheduler_is_one_of_a_list"],
    "D5 links of a base are followed": ["reliability/test_safety.py::test_a_bases_links_are_not_followed_into_exports"],
    "D6 the rights of files": ["reliability/test_safety.py::test_files_have_the_rights_that_the_umask_says"],
    "D7 small files of huge pictures": ["reliability/test_safety.py::test_a_small_file_of_a_huge_picture_is_not_decoded"],
    "D8 left-over temporary files": ["reliability/test_safety.py::test_what_a_killed_process_left_is_swept"],
    "E2 stopped runs can't be used": [
        "jobs/test_checkpoints.py::test_the_newest_checkpoint_is_what_a_stopped_run_gives",
    ],
}  # fmt: skip
# what was decided against, and why
DECLINED: dict[str, str] = {}


@pytest.mark.parametrize("finding", list(FOUND))
def test_each_finding_has_its_tests(finding: str) -> None:
    for name in FOUND[finding]:
        file, _, function = name.partition("::")
        tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
        names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert function in names, f"{finding}: {name} is gone"


def test_nothing_is_left_out() -> None:
    numbers = {name.split()[0] for name in [*FOUND, *DECLINED]}
    wanted = (
        {f"A{k}" for k in range(1, 14)} | {"B", "C"} | {f"D{k}" for k in range(1, 9)} | {f"E{k}" for k in range(1, 10)}
    )
    assert wanted - numbers == set()
