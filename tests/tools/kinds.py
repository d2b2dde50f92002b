"""Kinds of faults that other projects' bug reports led us to, and the tests that cover them now.
`python tests/tools/kinds.py` writes the table in tests/README.md."""

from collections import Counter
from pathlib import Path

TESTS = Path(__file__).parents[1]
README = TESTS / "README.md"

KINDS = {  # kind: its tests; a name may be a prefix
    "A derivative is silently zero": """
        test_fast.py::test_second_derivatives_are_correct
        test_fast.py::test_other_kinds_of_derivatives_are_correct
        test_distributed.py::test_a_split_sequence_equals_the_whole""",
    "A saved file cannot be loaded": """
        test_checkpoint.py::test_values_in_extra_are_read_again_as_plain_values
        test_checkpoint.py::test_values_that_cannot_be_saved_are_refused_before_any_training
        test_checkpoint.py::test_a_state_that_cannot_be_read_again_is_refused_before_any_training
        test_checkpoint.py::test_numbers_from_evaluate_are_saved_as_plain_numbers
        test_checkpoint.py::test_weights_that_are_not_finite_are_not_saved
        test_checkpoint.py::test_an_unreadable_checkpoint_should_be_moved_aside_not_deleted""",
    "A mark depends on the machine, or on the previously marked file": """
        test_checks.py::test_check_works_under_any_defaults_and_restores_them
        test_checks.py::test_all_ways_of_marking_agree
        test_checks.py::test_no_file_changes_the_mark_of_the_next
        test_checks.py::test_pytest_and_report_import_a_file_as_python_does
        test_checks.py::test_a_check_that_hangs_or_exits_costs_one_mark
        test_checks.py::test_no_process_outlives_its_caller""",
    "One call has two meanings": """
        test_model.py::test_fewer_queries_than_keys_are_the_last_ones
        test_model.py::test_a_mode_runs_its_own_form""",
    "A long run finds at its end that it cannot write its result": """
        test_runcard.py::test_an_unwritable_path_is_one_line_with_the_flag
        test_bench.py::test_an_unwritable_output_is_an_error_before_the_work
        test_measure.py::test_an_unwritable_output_is_an_error_before_the_work
        test_compare.py::test_unwritable_output_of_the_last_study_is_an_error_before_the_first
        test_compare.py::test_the_last_study_s_data_and_attention_file_are_checked_before_the_first
        test_compare.py::test_a_checkpoint_of_another_task_is_an_error_before_the_work
        test_checkpoint.py::test_a_folder_that_is_a_file_is_one_line_before_any_training""",
    "Compiled training fails at changing sizes": """
        test_fast.py::test_a_compiled_model_trains_at_changing_sizes
        test_fast.py::test_torch_compile_has_no_graph_break_and_few_graphs""",
    "Standard streams are replaced, closed, broken or None": """
        test_flags.py::test_a_custom_stream_is_written_to
        test_flags.py::test_a_broken_closed_or_missing_stream_does_not_end_a_script
        test_flags.py::test_characters_that_a_console_cannot_show_become_question_marks
        test_flags.py::test_a_run_finishes_even_if_its_reader_exits
        test_flags.py::test_a_run_finishes_without_streams_and_no_file_takes_their_place
        test_flags.py::test_a_script_runs_in_a_notebook""",
    "A library raises an unexpected exception": """
        test_images.py::test_a_file_that_is_not_a_png_raises_syntax_error_or_os_error
        test_images.py::test_an_exception_in_pillow_becomes_a_syntax_error
        test_images.py::test_a_file_that_is_not_an_archive_raises_value_error_or_os_error
        test_data.py::test_without_a_home_the_cache_is_a_temporary_folder
        test_platforms.py::test_a_user_without_a_home_or_a_name_can_train""",
    "A default fails its own check": """
        test_compare.py::test_there_are_as_many_workers_as_usable_processors
        test_compare.py::test_without_affinity_all_processors_count""",
    "Data is identified by name instead of content": """
        test_checkpoint.py::test_renamed_data_and_attention_files_resume
        test_checkpoint.py::test_other_content_under_the_same_name_does_not_resume
        test_own_attention.py::test_a_changed_file_is_another_attention""",
    "Training or evaluation mode is not restored": """
        test_model.py::test_generate_restores_the_mode_of_every_module
        test_measure.py::test_measuring_a_model_restores_every_module_s_mode
        test_train.py::test_training_restores_every_module_s_mode""",
    "The session's PyTorch defaults leak in": """
        test_model.py::test_the_default_dtype_changes_no_angle
        test_data.py::test_windows_do_not_depend_on_torch_s_defaults
        test_distributed.py::test_exchanges_do_not_depend_on_torch_s_defaults
        test_images.py::test_images_do_not_depend_on_torch_s_defaults
        test_measure.py::test_measurements_do_not_depend_on_torch_s_defaults
        test_synthetic.py::test_drawn_digits_do_not_depend_on_torch_s_defaults
        test_train.py::test_training_does_not_depend_on_torch_s_defaults
        test_train.py::test_a_script_runs_with_torch_s_usual_defaults_and_restores_the_user_s""",
    "An optimiser needs every gradient": """
        test_train.py::test_frozen_and_unused_parameters_do_not_change""",
    "An unknown keyword is silently ignored": """
        test_model.py::test_an_unknown_keyword_is_rejected""",
    "Values are read from tensors that have none": """
        test_model.py::test_models_run_on_tensors_without_values
        test_model.py::test_a_saved_export_gives_the_same_output
        test_model.py::test_unsupported_wrappers_say_what_to_use""",
    "A message does not say what to do next": """
        test_model.py::test_states_that_do_not_fit_the_tokens_are_rejected
        test_model.py::test_states_of_another_model_are_rejected
        test_model.py::test_invalid_arguments_are_rejected
        test_arguments.py::test_tokens_outside_the_vocabulary_are_named
        test_checkpoint.py::test_another_text_is_named_and_not_its_whole_vocabulary
        test_checkpoint.py::test_a_path_may_be_a_string
        test_images.py::test_a_path_may_be_a_string
        test_images.py::test_the_python_version_of_cifar10_is_refused_in_favour_of_the_binary_one
        test_images.py::test_a_path_that_is_not_a_folder_is_named
        test_checks.py::test_a_path_without_a_python_file_has_one_line""",
    "top_k keeps every tie": """
        test_model.py::test_top_k_keeps_k_tokens_of_equal_logits""",
    "The environment: ~, -OO, wheels, killed parents, closed terminals, torch.compile": """
        test_flags.py::test_a_tilde_is_the_home_folder_even_after_an_equals_sign
        test_flags.py::test_without_docstrings_there_is_no_description
        test_flags.py::test_a_closed_terminal_acts_like_ctrl_c_unless_ignored
        test_measure.py::test_an_installed_wheel_writes_to_runs_and_not_beside_itself
        test_checkpoint.py::test_a_stopped_run_is_saved_and_resumes_bit_for_bit
        test_checkpoint.py::test_nohup_keeps_training_when_the_terminal_is_closed
        test_checkpoint.py::test_a_compiled_model_is_saved_under_plain_names_and_resumes_in_any_form
        test_faults.py::""",
    "The work is done, then its evaluation fails": """
        test_checkpoint.py::test_a_failed_evaluation_costs_no_step_and_is_repeated
        test_measure.py::test_memory_for_measuring_does_not_grow_with_examples_or_the_square_of_tokens
        test_measure.py::test_the_weights_of_some_queries_are_rows_of_all_weights
        test_measure.py::test_sampled_queries_represent_all""",
}
BEGIN, END = "<!-- by tools/kinds.py -->\n", "<!-- end -->\n"


def table():
    """A row per kind of fault: its test files, and the number of tests in each."""
    lines = ["| kind | tests |", "|---|---|"]
    for kind, names in KINDS.items():
        files = Counter(name.split("::")[0] for name in names.split())
        cells = ", ".join(f"[`{file}`]({file}): {count}" for file, count in files.items())
        lines.append(f"| {kind} | {cells} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    before, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    README.write_text(before + BEGIN + table() + END + after, encoding="utf-8")
