"""An independent check of version 0.1 found these faults. Each has a test, which is named here and must exist.

The numbers are those of the check's list: A, wrong results without a word; B, what other programs read; C, bad input;
D, security; E, what a person meets.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import test_bad_input  # noqa: F401 - its cases
from bad_table import CASES

TESTS = Path(__file__).parent.parent
# "X1 a claim": the tests that show it; a file and the tests in it
Tests = dict[str, str]
PINS, CHECKPOINTS, WORDS = "jobs/test_pins.py", "jobs/test_checkpoints.py", "jobs/test_run_words.py"
FORMATS, SAFETY, TABLE = "data/test_formats.py", "reliability/test_safety.py", "reliability/test_bad_input.py"
FAULTS, PUBLISHED, COMMANDS = (
    f"adapters/{name}.py" for name in ("test_verify_faults", "test_published", "test_bad_adapters")
)
FILES, OUTPUT, STYLES = "export/test_lora_files.py", "cli/test_output.py", "jobs/test_styles.py"
OVERRIDES, ESTIMATE, PAGE = "config/test_overrides.py", "jobs/test_estimate.py", "report/test_report.py"
FOUND: dict[str, Tests] = {
    # A. a wrong result without a word
    "A1 folders and words parsed as YAML": {
        OVERRIDES: "test_folders_are_taken_as_they_are_in_every_form test_words_are_taken_as_they_are "
        "test_the_short_way_trains_the_folder_that_was_named",
    },
    "A2 resume on changed, added, renamed or moved photos": {
        PINS: "test_a_change_is_refused_by_name_and_nothing_is_written_over "
        "test_what_moved_or_was_renamed_is_found_by_its_content "
        "test_accepted_changes_are_written_down_and_trained_with",
        "runs/test_inputs.py": "test_every_change_is_named test_two_equal_photos_are_two",
    },
    "A3 resume on a changed base; a hash by size and time": {
        PINS: "test_a_change_is_refused_by_name_and_nothing_is_written_over "
        "test_a_base_with_the_same_size_and_time_is_not_taken_for_the_old_one test_doctor_forgets_stored_hashes",
    },
    "A4 damaged cache entries and results": {
        "data/test_cache.py": "test_a_wrong_entry_is_made_again",
        PINS: "test_a_damaged_result_is_named_and_made_again_from_the_checkpoint",
    },
    "A5 run.keep, and starting over unsaid": {
        "runs/test_run.py": "test_only_sound_ones_are_counted_and_the_one_just_written_stays",
        PINS: "test_a_run_says_where_it_goes_on_and_why_it_starts_over",
    },
    "A6 several machines without a shared folder": {
        "reliability/test_nodes.py": "test_each_machine_has_what_it_needs_on_its_own_disk "
        "test_a_run_of_two_machines_survives_a_killed_agent "
        "test_a_process_that_falls_silent_is_named_and_ends_the_others",
        "training/test_peers.py": "test_a_run_whose_checkpoints_are_on_another_machine_is_refused "
        "test_a_fingerprint_tells_one_bit_one_name_and_one_step",
    },
    "A7 a longer run bends the learning rate": {
        CHECKPOINTS: "test_a_longer_run_keeps_the_curve_of_its_learning_rate_or_is_refused",
    },
    "A8 files that training ignores": {
        FORMATS: "test_more_names_are_photos test_captions_beside_the_photo test_metadata test_kohyas_folder_is_read "
        "test_other_sub_folders_are_named test_leftovers_are_named test_the_plan_names_what_is_not_used",
    },
    "A9 placeholders, templates and tokens": {
        WORDS: "test_words_that_are_refused test_a_caption_files_typo_is_named test_a_template_without_the_token "
        "test_a_mark_of_the_tokenizer_is_no_rare_token test_a_run_fills_in_its_words "
        "test_a_prompt_with_nothing_to_fill_in",
    },
    "A10 sample overwrites, ignores and cuts": {
        CHECKPOINTS: "test_images_are_numbered_on_and_none_is_overwritten test_a_cut_prompt_is_named "
        "test_sample_refuses_in_one_sentence",
    },
    "A11 settings without a sane effect": {
        "config/test_effect.py": "test_a_warm_up_fits_into_the_run",
        CHECKPOINTS: "test_photos_that_are_never_seen_are_told",
        OVERRIDES: "test_a_section_that_is_given_whole_keeps_what_was_given_before",
        "jobs/test_class_images.py": "test_the_subjects_own_photos_are_no_class_images",
        TABLE: "absurd_steps absurd_class_images class_images_of_the_subject_itself",
    },
    "A12 previews: EMA, and lost ones": {
        "jobs/test_api.py": "test_previews_under_ema_show_what_leaves "
        "test_a_preview_that_a_stop_left_out_is_drawn_later",
    },
    "A13 templates are drawn at random": {"data/test_batches.py": "test_one_template_is_drawn_each_time"},
    # B. what other programs read
    "B what is said of each program": {
        "export/test_readers.py": "test_the_page_says_what_the_code_says test_every_row_says_how_it_is_known "
        "test_flux_without_clip test_flux_with_clip_says_what_it_costs",
        "adapters/test_adapters.py": "test_each_ui_gets_the_verdict_of_its_loader test_unmatched_keys_by_reader",
    },
    "B SDXL: A1111 loses one module": {
        "adapters/test_adapters.py": "test_a1111_loses_one_convolution_of_sdxl_under_diffusers_name",
        FILES: "test_sdxl_has_the_original_names_throughout",
    },
    "B a fault is named and 'fully' still said": {
        FAULTS: "test_each_fault_has_its_consequence_for_each_reader test_a_sound_file_is_read_fully "
        "test_diffusers_own_loader_is_never_said_to_read_a_fault_fully",
    },
    "B headers that contradict the tensors": {
        FAULTS: "test_a_header_with_another_alpha_is_for_diffusers_alone "
        "test_each_part_has_its_own_alpha_in_the_header",
        FILES: "test_the_header_says_what_the_tensors_hold test_variants_of_a_base_are_told_apart "
        "test_the_joined_file_is_what_uis_are_pointed_to",
    },
    "B files of diffusers' own scripts": {
        FAULTS: "test_files_of_diffusers_old_scripts_are_read_as_diffusers_reads_them "
        "test_old_keys_that_diffusers_no_longer_reads_are_converted",
    },
    "B one file of an SDXL that predicts v": {
        "export/test_single_file.py": "test_an_sdxl_file_says_what_it_predicts test_other_families_need_no_marks",
    },
    "B metadata that UIs use": {
        FILES: "test_hashes_are_those_of_the_bytes_on_disk test_the_old_hash_of_a_file_that_reaches_so_far "
        "test_facts_about_the_run_are_in_kohyas_fields",
    },
    # C. tracebacks and other faults of bad input
    "C numbers that are too large or too long": {
        TABLE: "'run.seed=1e23' 'run.seed=1208925819614629174706176' sample_with_seed_1e23 'method.rank=1000000000' "
        "plan_of_a_huge_rank 'optim.betas=[.9,_1.5]' 'optim.eps=-1' a_number_of_6000_digits "
        "recipe_of_a_6000_digit_number a_thousand_brackets recipe_of_1000_brackets a_noun_of_a_megabyte "
        "dreambooth_a_huge_noun",
    },
    "C sample.prompts=[]": {TABLE: "test_without_prompts_nothing_is_drawn"},
    "C commands": {
        TABLE: "sample_out_is_a_file tokens_check_nothing recipes_copy_into_no_folder resume_with_another_rank",
    },
    "C run.json, exports.json, state.json": {
        TABLE: "report_with_run_json_empty resume_with_run_json_cut report_with_run_json_a_list "
        "export_with_exports_json_cut export_with_the_adapter_cut",
        SAFETY: "test_broken_json_in_a_run_is_named test_a_broken_state_is_a_damaged_checkpoint "
        "test_a_state_names_its_own_files",
    },
    "C metrics.jsonl": {
        "runs/test_run.py": "test_odd_lines_of_metrics_stop_neither_a_page_nor_a_resumed_run",
        SAFETY: "test_odd_metrics_draw_no_curve_and_stop_no_page",
    },
    "C a broken image": {SAFETY: "test_a_broken_image_is_named_on_the_page_and_stops_nothing"},
    "C files where folders are, and the reverse": {
        TABLE: "samples_is_a_file exports_is_a_file report.html_is_a_folder report_onto_a_folder",
    },
    "C the run folder removed in the middle": {
        "jobs/test_api.py": "test_a_run_whose_folder_is_removed_ends_at_once",
    },
    "C file-hashes.json": {PINS: "test_damaged_stored_hashes_are_made_again"},
    "C bases that ask for boundless work": {
        TABLE: "base_with_ten_billion_timesteps base_with_a_million_layers base_with_a_nested_index",
        SAFETY: "test_a_base_asks_for_no_boundless_work",
    },
    "C 65,000 cached views": {"data/test_cache.py": "test_entries_that_were_read_hold_no_map_and_no_file"},
    "C refused, but files are left": {
        TABLE: "targets_that_the_base_has_not test_one_sentence_and_nothing_left",
        COMMANDS: "test_bad_arguments",
    },
    "C odd places of what is written": {COMMANDS: "test_out_names_the_file_or_the_folder"},
    "C sentences that blame the recipe's file, or are pydantic's": {
        OVERRIDES: "test_a_fault_in_what_was_typed_is_not_blamed_on_the_recipe_file",
        TABLE: "test_one_sentence_and_nothing_left 'method.rank=1e3'",
    },
    "C verify without a base, or with a wrong one": {
        PUBLISHED: "test_a_file_without_a_header_tells_its_base_by_names_and_sizes "
        "test_a_file_of_no_published_model_asks_for_the_base test_a_wrong_base_gets_one_short_verdict",
    },
    "C inspect of a LoRA or a run; merge to two formats": {
        COMMANDS: "test_what_needs_a_base_or_another_command_says_so test_bad_arguments",
    },
    "C `train demo` outside the checkout": {
        "jobs/test_demo.py": "test_its_recipe_finds_the_pictures_from_anywhere",
    },
    # D. security
    "D1 pickles and files outside the base, by an index": {
        SAFETY: "test_an_index_names_only_safetensors_files_beside_it test_a_base_in_several_files_is_read",
    },
    "D2 script and foreign images on a page": {
        SAFETY: "test_no_value_of_a_received_run_is_script_on_its_page test_the_page_forbids_what_it_does_not_need "
        "test_a_received_run_shows_no_image_of_this_disk test_links_out_of_a_received_run_are_refused",
    },
    "D3 relative paths leak": {SAFETY: "test_relative_paths_tell_no_more_than_absolute_ones"},
    "D4 any scheduler class": {SAFETY: "test_a_scheduler_is_one_of_a_list test_a_config_chooses_no_code"},
    "D5 links of a base are followed": {SAFETY: "test_a_bases_links_are_not_followed_into_exports"},
    "D6 the rights of files": {SAFETY: "test_files_have_the_rights_that_the_umask_says"},
    "D7 small files of huge pictures": {SAFETY: "test_a_small_file_of_a_huge_picture_is_not_decoded"},
    "D8 left-over temporary files": {SAFETY: "test_what_a_killed_process_left_is_swept"},
    # E. what a person meets
    "E1 a style that nothing was bound to, and plain prompts that it took": {
        STYLES: "test_the_trigger_is_added_where_the_token_is_missing "
        "test_without_a_trigger_the_plan_says_what_becomes_of_the_style "
        "test_the_base_draws_the_captions_without_the_style_in_turn "
        "test_the_shipped_recipe_has_pairs_and_keeps_plain_prompts",
    },
    "E1 no measure of a style": {
        "report/test_style_distance.py": "test_colours_and_strokes_are_told_apart "
        "test_the_share_is_0_for_plain_images_1_for_the_drawings_and_between_for_a_mixture",
        STYLES: "test_a_style_resumes_bit_for_bit_and_its_page_speaks_of_the_style",
    },
    "E2 stopped runs can't be used": {
        CHECKPOINTS: "test_the_newest_checkpoint_is_what_a_stopped_run_gives "
        "test_a_checkpoint_is_the_run_that_ends_there test_an_export_of_a_checkpoint_says_its_step",
    },
    "E3 nothing is printed without a terminal; noise in Python": {
        OUTPUT: "test_a_run_into_a_file_is_told_in_plain_lines "
        "test_python_logs_the_same_lines_without_noise_and_leaves_nothing_behind",
        "core/test_progress.py": "test_a_line_at_begin_first_step_every_thirty_seconds_and_end "
        "test_the_application_decides_what_is_shown",
        "core/test_logging.py": "test_what_diffusers_says_of_an_adapter_without_texts_is_not_shown",
    },
    "E4 the page: small images, no previews, class images, seeds or sampler": {
        PAGE: "test_a_click_opens_the_image_itself_while_the_page_is_in_its_run "
        "test_previews_class_images_and_how_they_were_drawn",
    },
    "E4 insider talk": {"runs/test_record.py": "test_the_plan_is_in_plain_words"},
    "E5 the toy base without a word; data_tools assumes 512 pixels": {
        OUTPUT: "test_a_run_into_a_file_is_told_in_plain_lines",
        "families/test_toy.py": "test_a_noun_that_it_does_not_know_is_named",
        "data_tools/test_data_tools.py": "test_it_says_for_which_resolution_it_checked",
    },
    "E6 help, version, completion, and what sample lacked": {
        OUTPUT: "test_help_begins_with_an_example_and_what_is_needed_first "
        "test_no_sentence_of_help_is_cut_at_80_columns test_version test_the_shell_completes_commands",
        CHECKPOINTS: "test_the_weight_of_a_lora",
        TABLE: "sample_with_size_33",
    },
    "E7 the package in Python": {
        "config/test_light.py": "test_the_package_shows_what_it_has_without_loading_it",
        "test_project.py": "test_packages_say_that_they_are_typed",
        OVERRIDES: "test_folders_are_taken_as_they_are_in_every_form test_a_dictionary_with_an_unknown_key_is_refused",
    },
    "E8 the model card's snippet; a command that no page names": {
        "jobs/test_companions.py": "test_the_cards_snippet_draws_with_the_tiny_base",
        "test_docs.py": "test_every_tool_for_photos_is_named_on_a_page",
    },
    "E9 the demo promises more than is seen": {
        "jobs/test_demo.py": "test_the_demo_teaches_the_mug test_what_it_says_at_its_end_is_true_of_its_mug",
    },
}  # fmt: skip
# what was decided against or has no test, and why
DECLINED: dict[str, str] = {
    "E4 a table at 500 pixels": "its columns become rows by a style sheet (@media), which a person looks at",
    "E4 measures on the page": "a run on photos has no judge that knows the subject; of a style its distance is shown",
    "E8 `datasets` among the dependencies": "`data_tools unpack` needs it to read data sets of the hub as they are",
}


def functions_of(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("finding", FOUND)
def test_each_finding_has_its_tests(finding: str) -> None:
    """A name without `test_` is a case of the table of bad input."""
    assert FOUND[finding]
    for file, names in FOUND[finding].items():
        known = functions_of(TESTS / file) | (set(CASES) if file == TABLE else set())
        gone = [name for name in names.split() if name not in known]
        assert not gone, f"{finding}: not in {file}"


def test_nothing_is_left_out() -> None:
    numbers = {name.split()[0] for name in FOUND}
    rows = {"A": 13, "D": 8, "E": 9}
    assert numbers == {"B", "C", *(f"{row}{number}" for row, most in rows.items() for number in range(1, most + 1))}
    assert {name.split()[0] for name in DECLINED} <= numbers
    assert all(DECLINED.values())
