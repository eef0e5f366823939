"""Check that the tests can fail: change one operator, comparison or number, and run them.

    python tools/mutation.py                          every module of MODULES, a sample of each
    python tools/mutation.py dsv3_ref/optim.py        these files; --sample 0 takes every mutant
    python tools/mutation.py --survivors build/mutants.json   run the survivors of a report again

cosmic-ray makes the mutants. Each is written into a copy of the checkout, and its tests run in a
fork of a process that has imported them and in which the changed function is replaced; if the
change is outside of functions, or no test notices it, they run in a process that imports everything
again. One run without a mutant records the time of every test and the functions that it calls; a
mutant is then given only the tests that call its function or start processes, the quickest first. A
kill counts if the test passes alone without the mutant. A timeout counts as a kill if the same
tests end in a fifth of the time without the mutant. A mutant that no test can tell from the
original is listed in tests/equivalent_mutants.json with the reason.
"""

import argparse
import contextlib
import gc
import hashlib
import inspect
import json
import multiprocessing.connection
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import chain, groupby
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Queue
from tempfile import TemporaryDirectory
from types import CodeType, FrameType, FunctionType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
EQUIVALENT = ROOT / "tests" / "equivalent_mutants.json"
COPIED = (
    "dsv3_ref", "kernels", "tests", "tools", "notebooks", "slurm", "docs", "README.md",
    "pyproject.toml",
)  # fmt: skip
FOLDERS = ("parallel", "posttraining", "serving", "data")  # besides the generated modules
CALLS = ROOT / "build" / "test_calls.json"  # what `Tracer` has recorded, by test file
SLOWEST = 1200.0  # seconds that the tests of one file may take without a mutant
FORK = get_context("forkserver")
PYTEST = ["-q", "-p", "no:cacheprovider", "-n", "0"]
PROCESSES = {subprocess.__file__, multiprocessing.connection.__file__}
REPORT = "mutation_report.json"  # of the last tests in a copy
ENGINE_TESTS = [  # of the serving engine, without a server
    f"test_serve::{name}"
    for name in (
        "test_every_page_is_in_one_state_and_never_given_twice",
        "test_a_key_depends_on_all_tokens_up_to_its_end",
        "test_any_rows_write_what_a_full_forward_pass_would",
        "test_in_fp64_tokens_are_exactly_those_of_one_stream",
        "test_a_seed_repeats_a_draw_whoever_else_is_there",
        "test_logits_are_those_of_a_full_forward_pass",
        "test_every_token_of_a_prompt_after_the_first_has_a_log_probability",
        "test_a_stop_token_ends_a_row",
        "test_a_likely_stop_token_waits_for_the_least_number_of_tokens",
        "test_drafts_are_the_likeliest_tokens_of_the_mtp_modules",
        "test_a_long_prompt_stalls_no_request",
        "test_what_was_read_is_not_read_again",
        "test_too_few_pages_put_the_youngest_back_and_the_oldest_ends_first",
        "test_what_cannot_fit_is_rejected_and_so_is_what_finds_a_full_queue",
        "test_who_leaves_frees_what_they_held",
        "test_experts_move_between_two_steps_and_no_request_is_dropped",
        "test_new_weights_forget_what_old_ones_read",
        "test_a_prompt_computed_elsewhere_is_answered_as_if_computed_here",
        "test_a_request_is_aborted_while_another_process_computes_its_prompt",
        "test_a_transfer_survives_serialization",
    )
]
EXTRA_TESTS = {  # of modules whose tests have another name
    "dsv3_ref/block.py": ["test_model", "test_mtp"],
    "dsv3_ref/grpo.py": ["test_rl"],
    "dsv3_ref/mla.py": ["test_ops"],
    "dsv3_ref/rope.py": ["test_mla", "test_ops"],
    "dsv3_ref/optim.py": ["test_pretrain"],
    "dsv3_ref/inference_scale.py": ["test_scale"],
    "dsv3_ref/scale.py": ["test_plan"],
    "dsv3_ref/serve.py": [
        *ENGINE_TESTS,
        "test_faults::test_an_output_is_not_changed_by_later_steps",
        "test_faults::test_a_fault_while_sampling_ends_one_request",
        "test_faults::test_a_damaged_prefix_is_not_shared",
        "test_faults::test_a_transfer_with_nan_ends_one_request",
        "test_faults::test_a_salt_keeps_prefixes_apart",
        "test_faults::test_a_hash_covers_the_tokens_that_drafts_depend_on",
    ],
    "dsv3_ref/sft.py": ["test_sft_task", "test_conversations"],
    "dsv3_ref/rewards.py": [  # without those of the verifier, which depend on time
        *(
            f"test_rewards::{name}"
            for name in (
                "test_a_box",
                "test_any_text_has_one_box_or_none",
                "test_the_form",
                "test_a_score_is_its_samples_alone_and_a_product_with_one_row",
                "test_only_judgments_are_learnt_by_heart",
                "test_an_answer_among_several_turns_is_no_judgment",
                "test_bradley_terry_is_the_log_likelihood",
                "test_the_loss_of_pairs_is_both_of_its_parts",
                "test_calibration_counts_each_pair_once",
                "test_a_pair_counts_from_the_side_that_is_preferred",
                "test_a_table_of_calibration_by_hand",
                "test_what_judges_and_voters_are_asked",
                "test_a_self_reward_is_the_share_of_the_first_votes",
                "test_condorcet_by_enumeration",
                "test_one_of_k_samples_is_correct",
                "test_the_answer_of_most_samples",
                "test_votes_agree_with_the_truth_or_not",
            )
        ),
        "test_grading::test_boxes",
        "test_grading::test_the_prompt_may_open_the_thought",
        "test_grading::test_programs",
        "test_tasks::test_the_only_block_of_code",
    ],
    "dsv3_ref/data/discovery.py": ["test_data_files"],
    "dsv3_ref/data/files.py": ["test_data", "test_data_files", "test_hub_data"],
    "dsv3_ref/data/formats.py": ["test_data_files"],
    "dsv3_ref/data/hub.py": ["test_hub_data"],
    "dsv3_ref/data/jinja_template.py": ["test_chat_templates"],
    "dsv3_ref/data/messages.py": ["test_conversation_rows"],
    "dsv3_ref/data/packing.py": ["test_conversations"],
    "dsv3_ref/data/permutation.py": ["test_data", "test_prepare"],
    "dsv3_ref/data/text_cache.py": ["test_data_files"],
    "dsv3_ref/data/tokenize_workers.py": ["test_prepare"],
    "dsv3_ref/parallel/block_scales.py": [
        "test_resident_weights::test_slices_quantize_as_the_whole_does",
        "test_resident_weights::test_padding_is_less_than_an_element_per_rank",
    ],
    "dsv3_ref/parallel/build.py": [
        "test_parallel::test_the_first_and_the_last_stage_hold_the_embedding",
        "test_parallel::test_a_rank_starts_with_the_weights_of_one_device_bit_for_bit",
        "test_parallel::test_experts_that_no_group_size_divides_are_refused",
        "test_parallel::test_more_stages_than_layers_are_refused",
    ],
    "dsv3_ref/parallel/context_parallel.py": [
        "test_strategies",
        "test_context_parallel::test_packed_samples_may_cross_the_chunks_of_ranks",
    ],
    "dsv3_ref/parallel/data_parallel.py": [
        "test_strategies",
        "test_replicas::test_an_update_of_rl_on_two_ranks_is_that_of_one",
    ],
    "dsv3_ref/parallel/engine.py": [
        "test_one_rank",
        "test_deepep::test_training_with_deepep",
        "test_parallel::test_so_is_a_step_on_packed_conversations",
        "test_parallel::test_pairs_hide_all_to_alls_behind_computation",
        "test_parallel::test_a_loss_over_the_batch_is_refused",
        "test_parallel::test_more_stages_than_layers_are_refused",
    ],
    "dsv3_ref/parallel/hf_shards.py": [
        "test_post_training::test_rl_in_parts_samples_from_an_engine",
    ],
    "dsv3_ref/data/terminal.py": ["test_generate", "test_environment"],
    "dsv3_ref/parallel/launch.py": ["test_cluster"],
    "dsv3_ref/parallel/mesh.py": [
        "test_parallel::test_dp_defaults_to_the_rest_of_the_world",
        "test_parallel::test_ranks_that_do_not_fill_the_world_are_refused",
        "test_parallel::test_groups_sum_dense_parameters_over_dp_and_ep_and_experts_over_dp",
        "test_messages::test_a_warm_up_connects_every_pair_both_ways_and_cannot_block",
        "test_messages::test_all_members_of_a_group_have_as_many_groups_before_it",
        "test_messages::test_a_rank_of_2048_opens_no_more_communicators_than_one_of_64",
    ],
    "dsv3_ref/parallel/mesh_parallel.py": [
        "test_strategies",
        "test_rows::test_ranks_read_the_rows_of_one_process",
        "test_rows::test_a_reader_that_fails_stops_all_ranks_with_the_file",
        "test_cluster::test_samples_are_skipped_if_the_model_does_not_fit",
    ],
    "dsv3_ref/parallel/physical_experts.py": ["test_eplb"],
    "dsv3_ref/parallel/pipeline.py": [
        "test_one_rank",
        "test_messages::test_with_a_warm_up_no_schedule_waits_forever",
        "test_messages::test_sent_messages_are_dropped_at_their_receipts",
        "test_messages::test_sent_messages_are_dropped_when_nccl_reports_them",
        "test_messages::test_a_forward_pass_sends_all_messages_and_keeps_none_afterwards",
        "test_parallel::test_a_step_on_any_mesh_is_the_step_of_one_process",
        "test_parallel::test_a_loss_over_the_batch_is_refused",
    ],
    "dsv3_ref/parallel/stage.py": [
        "test_one_rank",
        "test_parallel::test_a_step_on_any_mesh_is_the_step_of_one_process",
    ],
    "dsv3_ref/parallel/tape.py": [
        "test_parallel::test_a_tape_of_segments_has_the_gradients_of_autograd",
        "test_parallel::test_generators_take_turns",
        "test_parallel::test_experts_on_many_ranks_are_the_experts_on_one",
        "test_deepep::test_a_forward_pass_alone",
    ],
    "dsv3_ref/parallel/token_dispatcher.py": [
        "test_one_rank",
        "test_fixed_sizes::test_a_padded_layout_has_the_first_rows_of_every_member",
        "test_fixed_sizes::test_sorted_choices_are_cut_off_or_followed_by_none",
        "test_fixed_sizes::test_fixed_sizes_give_the_same_bits",
        "test_fixed_sizes::test_what_exceeds_the_sizes_is_counted",
        "test_fixed_sizes::test_cuda_events_tell_the_exchange_from_the_computation",
        "test_fixed_sizes::test_sizes_are_a_multiple_of_the_mean",
        "test_parallel::test_packed_tensors_can_be_unpacked",
        "test_parallel::test_experts_on_many_ranks_are_the_experts_on_one",
        "test_parallel::test_dispatch_in_fp8_loses_a_rounding_and_halves_no_gradient",
        "test_parallel::test_the_bytes_of_dispatch_and_combine",
    ],
    "dsv3_ref/parallel/zero.py": [
        "test_one_rank",
        "test_parallel::test_a_step_on_any_mesh_is_the_step_of_one_process",
    ],
    "dsv3_ref/posttraining/grpo.py": ["test_rl", "test_tasks"],
    "dsv3_ref/posttraining/prompts.py": [
        "test_tasks",
        "test_grading::test_a_right_answer_to_a_row_earns_1",
        "test_grading::test_rows_that_are_left_out",
        "test_grading::test_answers_that_nobody_can_box_are_told",
        "test_grading::test_repeated_questions_and_tasks",
    ],
    "dsv3_ref/posttraining/reward.py": ["test_reward_model"],
    "dsv3_ref/posttraining/rollout_engines.py": [
        f"test_rollout_engines::{name}"
        for name in (
            "test_prompts_are_dealt_out_in_turn_and_come_back_in_order",
            "test_a_prompt_has_a_seed_of_its_own_in_every_step",
            "test_new_weights_begin_the_seeds_of_a_step",
            "test_a_completion_needs_a_log_probability_for_each_token",
            "test_vllm_is_asked_for_its_own_calls",
            "test_an_engine_that_is_not_there_is_named",
            "test_a_long_page_of_an_error_is_cut",
        )
    ],
    "dsv3_ref/posttraining/sft.py": ["test_sft_task"],
    "dsv3_ref/posttraining/vllm_rollout.py": [
        "test_vllm::test_answers_and_log_probabilities_come_through",
        "test_vllm::test_by_default_the_engine_has_half_of_the_memory_of_one_gpu",
        "test_vllm::test_the_engine_follows_the_model",
        "test_vllm::test_without_vllm_it_says_what_is_missing",
    ],
    "dsv3_ref/serving/config.py": ["test_network"],
    "dsv3_ref/serving/conversation.py": ["test_service"],
    "dsv3_ref/serving/engine_thread.py": ["test_service"],
    "dsv3_ref/serving/detokenizer.py": [
        f"test_company::{name}"
        for name in (
            "test_no_part_of_a_stop_string_leaks",
            "test_any_tokens_become_the_text_that_the_tokenizer_decodes",
            "test_a_stop_string_of_byte_tokens_leaks_nothing",
            "test_every_byte_has_a_sign",
            "test_a_token_begins_in_the_character_of_its_first_byte",
            "test_a_stop_string_is_found_as_by_searching_the_whole_text",
            "test_what_may_begin_a_stop_string_is_shorter_than_it",
            "test_long_stop_strings_cost_little_for_each_token",
            "test_a_tokenizer_of_words_and_bytes_streams_the_same_text",
            "test_an_echoed_prompt_comes_once_and_moves_the_offsets",
            "test_logprobs_wait_for_their_text",
        )
    ],
    "dsv3_ref/serving/output_processor.py": [
        f"test_company::{name}"
        for name in (
            "test_a_stop_string_closes_a_request",
            "test_the_last_output_returns_what_was_withheld_and_no_stop_token",
            "test_an_end_without_text",
            "test_a_fault_ends_its_request",
            "test_an_echoed_prompt_comes_once_and_moves_the_offsets",
            "test_logprobs_wait_for_their_text",
            "test_an_impossible_token_has_a_finite_logprob",
        )
    ],
    "dsv3_ref/serving/prefill.py": [
        "test_serve::test_a_transfer_survives_serialization",
        "test_serve::test_a_prompt_computed_elsewhere_is_answered_as_if_computed_here",
        "test_serve::test_prefill_and_decoding_in_two_processes_and_an_end_that_waits",
        "test_faults::test_a_prompt_that_a_worker_cannot_compute_is_computed_here",
        "test_faults::test_a_transfer_with_nan_ends_one_request",
    ],
    "dsv3_ref/serving/protocol.py": ["test_fields"],
    "dsv3_ref/serving/json_body.py": ["test_network"],
    "dsv3_ref/serving/network.py": [
        "test_limits::test_the_host_of_a_header",
        "test_limits::test_only_known_hosts",
    ],
    "dsv3_ref/serving/text_generator.py": ["test_generate"],  # without those in a browser
    "dsv3_ref/serving/tokenize_pool.py": ["test_network"],
    "dsv3_ref/serving/tool_calls.py": [
        "test_tool_calls::test_calls_are_parsed_or_the_text_is_kept",
        "test_tool_calls::test_the_pieces_of_a_stream_do_not_matter",
        "test_tool_calls::test_marks_are_found_in_the_tokenizer",
    ],
}

OPERATORS = [
    f"core/{name}"
    for name in (
        "ReplaceBinaryOperator_Add_Sub", "ReplaceBinaryOperator_Sub_Add",
        "ReplaceBinaryOperator_Mul_Add", "ReplaceBinaryOperator_Mul_FloorDiv",
        "ReplaceBinaryOperator_Div_Mul", "ReplaceBinaryOperator_FloorDiv_Mul",
        "ReplaceBinaryOperator_Mod_Add", "ReplaceBinaryOperator_Pow_Mul",
        "ReplaceBinaryOperator_LShift_RShift", "ReplaceBinaryOperator_RShift_LShift",
        "ReplaceComparisonOperator_Eq_NotEq", "ReplaceComparisonOperator_NotEq_Eq",
        "ReplaceComparisonOperator_Lt_LtE", "ReplaceComparisonOperator_Lt_Gt",
        "ReplaceComparisonOperator_LtE_Lt", "ReplaceComparisonOperator_Gt_GtE",
        "ReplaceComparisonOperator_Gt_Lt", "ReplaceComparisonOperator_GtE_Gt",
        "ReplaceComparisonOperator_Is_IsNot", "ReplaceComparisonOperator_IsNot_Is",
        "NumberReplacer", "AddNot", "ReplaceTrueWithFalse", "ReplaceFalseWithTrue",
        "ReplaceAndWithOr", "ReplaceOrWithAnd",
    )
]  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change of one file."""

    path: str
    operator: str
    occurrence: int
    line: int
    before: str
    after: str


# ── Mutants ──


def mutate(code: str, operator: str, occurrence: int) -> str | None:
    """Return the code with one change, or None if the operator has no such place."""
    from cosmic_ray import plugins
    from cosmic_ray.mutating import mutate_code

    return mutate_code(code, plugins.get_operator(operator)(), occurrence)


def places_of(code: str) -> list[tuple[str, int]]:
    """Return (operator, occurrence) of every change that the operators can make."""
    from cosmic_ray import plugins
    from cosmic_ray.ast import get_ast

    tree, places = get_ast(code), []
    for name in OPERATORS:
        operator = plugins.get_operator(name)()
        count = sum(len(list(operator.mutation_positions(node))) for node in nodes(tree))
        places += [(name, i) for i in range(count)]
    return places


def nodes(node: Any) -> Iterator[Any]:
    """Yield a syntax tree's nodes in the order in which cosmic-ray visits them."""
    yield node
    for child in getattr(node, "children", ()):
        yield from nodes(child)


def describe(path: str, operator: str, occurrence: int, code: str, changed: str) -> Mutant:
    """Return the mutant with the first line that differs."""
    before, after = code.splitlines(), changed.splitlines()
    line = next(i for i, (a, b) in enumerate(zip(before, after)) if a != b)
    return Mutant(path, operator, occurrence, line + 1, before[line].strip(), after[line].strip())


def is_python(code: str) -> bool:
    """Return whether a text can be compiled: cosmic-ray takes the stars of `{**x}` for a power."""
    try:
        compile(code, "", "exec")
    except SyntaxError:
        return False
    return True


def draw(path: str, size: int, seed: int) -> list[Mutant]:
    """Return a random sample of a file's mutants in the order of their lines; size 0: all."""
    code = (ROOT / path).read_text(encoding="utf-8")
    places = places_of(code)
    if size and len(places) > size:
        places = random.Random(f"{seed} {path}").sample(places, size)
    changed = [(place, mutate(code, *place)) for place in places]
    mutants = [describe(path, *place, code, text) for place, text in changed if is_python(text)]
    return sorted(mutants, key=lambda m: (m.line, m.operator, m.occurrence))


# ── Tests ──


def tests_of(path: str) -> list[str]:
    """Return a module's tests: the files named after it, else those beside it that import it.

    EXTRA_TESTS adds files, or single tests of a file as FILE::TEST; of the file that is named after
    the module too, which is then not added as a whole.
    """
    stem, folder = Path(path).stem, Path(path).parent.name
    places = sorted((ROOT / "tests").rglob("test_*.py"))
    home = "tests" if folder == "dsv3_ref" else folder
    named = [p for p in places if p.stem == f"test_{stem}" and p.parent.name == home]
    extra = EXTRA_TESTS.get(path, ())
    is_chosen = any(name.startswith(f"test_{stem}::") for name in extra)
    tests = [] if is_chosen else [str(p.relative_to(ROOT)) for p in named]
    for name in extra:
        file, *test = name.split("::")
        tests += ["::".join([str(p.relative_to(ROOT)), *test]) for p in places if p.stem == file]
    words = (f"{folder}.{stem} import", f"{folder} import {stem}")
    for files in ([p for p in places if p.parent.name == folder], places):
        tests = tests or [
            str(p.relative_to(ROOT))
            for p in files
            if any(word in p.read_text(encoding="utf-8") for word in words)
        ]
    return tests


class Tracer:
    """A pytest plugin that records the time of each test, its failure, and what it calls.

    Calls during the setup of fixtures count for all tests of the file, which may share them.
    """

    def __init__(self, folder: str, chosen: Sequence[str] = ()):
        self.package = f"{folder}/dsv3_ref/"
        self.chosen = {test: i for i, test in enumerate(chosen)}
        self.rows: dict[str, dict] = {}
        self.calls: dict[str, set[CodeType]] = {}  # by test, and by file those of its fixtures
        self.now: set[CodeType] = set()
        self.failed = ""

    def pytest_collection_modifyitems(self, items: list) -> None:
        """Keep the chosen tests, in their order."""
        if self.chosen:
            items[:] = [item for item in items if item.nodeid in self.chosen]
            items.sort(key=lambda item: self.chosen[item.nodeid])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Begin a test, with the setup of its fixtures."""
        self.rows[nodeid] = {"seconds": 0.0}
        self.calls[nodeid] = set()
        self.now = self.calls.setdefault(file_of(nodeid), set())

    def pytest_runtest_call(self, item: Any) -> None:
        """Count calls for this test alone."""
        self.now = self.calls[item.nodeid]

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Add the time of a phase; keep the name of the first test that fails."""
        self.rows[report.nodeid]["seconds"] += report.duration
        if report.failed:
            self.failed = self.failed or report.nodeid

    def trace(self, frame: FrameType, event: str, argument: object) -> None:
        """Record a call of the package, or of what other processes are started by."""
        name = frame.f_code.co_filename
        if name in PROCESSES or name.startswith(self.package):
            self.now.add(frame.f_code)

    def report(self) -> dict[str, Any]:
        """Return the tests with [file, first line, last line] of all functions that they call."""
        for test, row in self.rows.items():
            codes = self.calls[test] | self.calls[file_of(test)]
            row["processes"] = any(code.co_filename in PROCESSES for code in self.calls[test])
            row["calls"] = [self.place(c) for c in codes if c.co_filename not in PROCESSES]
        return {"rows": self.rows, "failed": self.failed}

    def place(self, code: CodeType) -> tuple[str, int, int]:
        """Return (file, first line, last line) of a function."""
        lines = [line for _, line, *_ in code.co_positions() if line]
        file = f"dsv3_ref/{code.co_filename.removeprefix(self.package)}"
        return file, min([code.co_firstlineno, *lines]), max([code.co_firstlineno, *lines])


def run_pytest(folder: str, tests: list[str], chosen: Sequence[str], is_traced: bool) -> int:
    """Run tests in a copy of the checkout, write the tracer's report, and return pytest's code."""
    import pytest

    tracer = Tracer(folder, chosen)
    if is_traced:
        threading.settrace(tracer.trace)
        sys.settrace(tracer.trace)
    code = pytest.main([*PYTEST, "-x", *tests], [tracer])
    sys.settrace(None)
    Path(folder, REPORT).write_text(json.dumps(tracer.report()), encoding="utf-8")
    return int(code)


def enter(folder: str) -> None:
    """Make a copy of the checkout this process's own, without output."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    os.chdir(folder)
    for name in [name for name in sys.modules if name.partition(".")[0] == "dsv3_ref"]:
        del sys.modules[name]  # of another checkout
    sys.path[:0] = [folder, f"{folder}/tests"]
    os.environ["PYTHONPATH"] = f"{folder}:{folder}/tests"


def test_in_copy(folder: str, tests: list[str], chosen: Sequence[str], is_traced: bool) -> None:
    """Run tests on the copy in `folder` in this forked process; exit with pytest's code."""
    os.setsid()  # what the tests start ends with them
    enter(folder)
    sys.exit(run_pytest(folder, tests, chosen, is_traced))


# ── A process that has imported the tests already ──


def changed_functions(old: CodeType, new: CodeType) -> dict[CodeType, CodeType] | None:
    """Return old code → new code of the functions in which a module differs.

    None if it differs outside of functions, where only a new import helps.
    """
    changed: dict[CodeType, CodeType] = {}
    codes, values = [], []
    for code in (old, new):
        codes.append([x for x in code.co_consts if isinstance(x, CodeType)])
        constants = [repr(x) for x in code.co_consts if not isinstance(x, CodeType)]
        values.append((code.co_code, code.co_names, constants))
    if old.co_flags & inspect.CO_OPTIMIZED:
        changed |= {old: new} if old != new else {}
    elif values[0] != values[1]:
        return None
    for a, b in zip(*codes):
        inner = changed_functions(a, b)
        if inner is None:
            return None
        changed |= inner
    return changed


def replace_functions(
    functions: list[FunctionType], file: str, changed: dict[CodeType, CodeType]
) -> None:
    """Give the functions of a file their new code, wherever references to them are kept."""
    for function in [f for f in functions if f.__code__.co_filename == file]:
        function.__code__ = changed.get(function.__code__, function.__code__)


def serve_copy(folder: str, files: list[str], pipe: Connection) -> None:
    """Import test files, then run jobs from the pipe, each in a fork, and send their exit codes."""
    import pytest

    enter(folder)
    pytest.main([*PYTEST, "--collect-only", *files])
    functions = [x for x in gc.get_objects() if isinstance(x, FunctionType)]
    gc.collect()
    gc.freeze()  # a collection in a fork would copy all memory
    for job in iter(pipe.recv, None):
        pipe.send(run_in_fork(folder, functions, *job))


def run_in_fork(
    folder: str, functions: list[FunctionType], path: str, code: str, tests: list[str],
    chosen: Sequence[str], limit: float, is_traced: bool,
) -> int | None:  # fmt: skip
    """Run tests with this text of a module in a fork; return pytest's code, None after `limit`."""
    file = f"{folder}/{path}"
    original = compile(Path(file).read_text(encoding="utf-8"), file, "exec")
    changed = changed_functions(original, compile(code, file, "exec"))
    assert changed is not None, "`is_local` is true"
    pid = os.fork()
    if not pid:
        os.setsid()  # what the tests start ends with them
        try:
            replace_functions(functions, file, changed)
            Path(file).write_text(code, encoding="utf-8")  # for processes that the tests start
            os._exit(run_pytest(folder, tests, chosen, is_traced))
        finally:
            os._exit(1)
    end, status = time.monotonic() + limit, 0
    while time.monotonic() < end and not status:
        status, exit_status = os.waitpid(pid, os.WNOHANG)
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    if not status:
        os.waitpid(pid, 0)
        return None
    return os.waitstatus_to_exitcode(exit_status)


class TestsFailError(Exception):
    """Tests that fail without a mutant, so that they tell nothing about mutants."""


class Outcome(NamedTuple):
    """The end of the tests of a mutant."""

    kind: str  # killed, survived or timeout
    seconds: float
    failed: str = ""  # the test that noticed the change


class Copy:
    """A copy of the checkout in which one mutant at a time is tested."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.process: Any = None
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                ignore = shutil.ignore_patterns("*.ipynb", "__pycache__")
                shutil.copytree(source, folder / name, symlinks=True, ignore=ignore)
            else:
                shutil.copy(source, folder / name)
        kernels = folder / "dsv3_ref" / "kernels"
        if not kernels.is_symlink():
            kernels.symlink_to("../kernels")

    def start(self, files: list[str]) -> None:
        """Start the process that imports test files once, for `run`."""
        self.pipe, theirs = FORK.Pipe()
        self.process = FORK.Process(target=serve_copy, args=(str(self.folder), files, theirs))
        self.process.start()
        theirs.close()

    def stop(self) -> None:
        """End the process that `start` has started."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
        self.process = None

    def is_local(self, path: str, code: str) -> bool:
        """Return whether a text differs from the file in functions only, so that `run` can."""
        file = self.folder / path
        original = compile(file.read_text(encoding="utf-8"), str(file), "exec")
        return changed_functions(original, compile(code, str(file), "exec")) is not None

    def run(
        self, path: str, code: str, tests: list[str], limit: float, chosen: Sequence[str] = (),
        is_traced: bool = False,
    ) -> Outcome:  # fmt: skip
        """Return how tests end with this text of a module, whose imports are not repeated.

        chosen: the ids of the tests to run, all if empty.
        """
        file, start = self.folder / path, time.perf_counter()
        original = file.read_text(encoding="utf-8")
        (self.folder / REPORT).unlink(missing_ok=True)
        tests = list(dict.fromkeys(map(file_of, chosen))) or tests
        self.pipe.send((path, code, tests, chosen, limit, is_traced))
        exit_code = self.pipe.recv()
        file.write_text(original, encoding="utf-8")
        return self.outcome(exit_code, time.perf_counter() - start)

    def run_afresh(
        self, path: str, code: str, tests: list[str], limit: float, chosen: Sequence[str] = ()
    ) -> Outcome:
        """Return how tests end with this text of a module, in a process that imports everything."""
        file, start = self.folder / path, time.perf_counter()
        original = file.read_text(encoding="utf-8")
        (self.folder / REPORT).unlink(missing_ok=True)
        tests = list(dict.fromkeys(map(file_of, chosen))) or tests
        file.write_text(code, encoding="utf-8")
        process = FORK.Process(target=test_in_copy, args=(str(self.folder), tests, chosen, False))
        process.start()
        process.join(limit)
        exit_code = None if process.is_alive() else process.exitcode
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.join()
        file.write_text(original, encoding="utf-8")
        return self.outcome(exit_code, time.perf_counter() - start)

    def outcome(self, exit_code: int | None, seconds: float) -> Outcome:
        """Return the outcome of tests that have ended with an exit code, None for a timeout."""
        if exit_code is None:
            return Outcome("timeout", seconds)
        if exit_code == 0:
            return Outcome("survived", seconds)
        return Outcome("killed", seconds, self.report().get("failed", ""))

    def report(self) -> dict[str, Any]:
        """Return what the last tests have recorded; nothing if they did not come to an end."""
        file = self.folder / REPORT
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


# ── Which tests a mutant gets ──


def file_of(test: str) -> str:
    """Return the file of a test."""
    return test.split("::")[0]


def digest_of(test: str) -> str:
    """Return a hash of the files that the calls of a test depend on."""
    files = [ROOT / file_of(test), *sorted((ROOT / "dsv3_ref").rglob("*.py"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def recorded_calls(copy: Copy, path: str, tests: list[str]) -> dict[str, dict]:
    """Return the rows of `Tracer.report` for tests of one file; raise if any of them fails."""
    test = " ".join(tests)
    known = json.loads(CALLS.read_text(encoding="utf-8")) if CALLS.exists() else {}
    digest = digest_of(tests[0])
    if known.get(test, {}).get("digest") != digest:
        code = (ROOT / path).read_text(encoding="utf-8")
        outcome = copy.run(path, code, tests, SLOWEST, is_traced=True)
        if outcome.kind != "survived":
            raise TestsFailError(f"{test} fails without a mutant: {outcome.failed or outcome.kind}")
        known = json.loads(CALLS.read_text(encoding="utf-8")) if CALLS.exists() else {}
        known[test] = {"digest": digest, "rows": copy.report()["rows"]}
        CALLS.parent.mkdir(parents=True, exist_ok=True)
        part = CALLS.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(known), encoding="utf-8")
        part.replace(CALLS)  # whole, for other processes that read it
    return known[test]["rows"]


def tests_for(mutant: Mutant, rows: dict[str, dict]) -> list[str]:
    """Return the tests that may notice a change, the quickest first.

    They call the function of the changed line or use other processes. A change outside of functions
    gets all tests.
    """

    def is_called(row: dict) -> bool:
        return any(f == mutant.path and a <= mutant.line <= b for f, a, b in row["calls"])

    called = {test for test, row in rows.items() if is_called(row)}
    chosen = [test for test, row in rows.items() if row["processes"] or test in called]
    if not called:
        chosen = list(rows)
    seconds = Counter[str]()  # of each file, whose tests stay together, since they share fixtures
    for test in chosen:
        seconds[file_of(test)] += rows[test]["seconds"]

    def place(test: str) -> tuple[float, str, bool, float]:
        row, file = rows[test], file_of(test)
        return seconds[file], file, row["processes"], row["seconds"]

    return sorted(chosen, key=place)


class ModuleTests:
    """The tests of a module, which are run on its mutants in one copy."""

    def __init__(self, copy: Copy, path: str):
        self.copy, self.path = copy, path
        self.code = (ROOT / path).read_text(encoding="utf-8")
        self.tests = tests_of(path)
        self.rows: dict[str, dict] = {}
        for _, tests in groupby(self.tests, file_of):
            self.rows |= recorded_calls(copy, path, list(tests))
        self.passes_alone: dict[str, bool] = {}

    def run(self, mutant: Mutant) -> Outcome:
        """Return how the tests of a mutant end."""
        changed = mutate(self.code, mutant.operator, mutant.occurrence)
        chosen = tests_for(mutant, self.rows)
        if self.copy.is_local(self.path, changed):
            outcome = self.run_chosen(self.copy.run, changed, chosen)
            if outcome.kind != "survived":  # what was called while importing is as it was
                return outcome
        return self.run_chosen(self.copy.run_afresh, changed, chosen)

    def run_chosen(self, run: Callable[..., Outcome], changed: str, chosen: list[str]) -> Outcome:
        """Return how tests end on a changed text, after the doubts have been settled."""
        limit = 60 + 10 * sum(self.rows[test]["seconds"] for test in chosen)
        outcome = run(self.path, changed, self.tests, limit, chosen)
        if outcome.kind == "timeout":
            unmutated = run(self.path, self.code, self.tests, SLOWEST, chosen)
            if 5 * unmutated.seconds > limit:  # the machine was busy
                outcome = run(self.path, changed, self.tests, 10 * unmutated.seconds, chosen)
        if outcome.kind == "killed" and outcome.failed and not self.is_sound(outcome.failed):
            outcome = run(self.path, changed, self.tests, SLOWEST)
        return outcome

    def is_sound(self, test: str) -> bool:
        """Return whether a test passes alone without a mutant."""
        if test not in self.passes_alone:
            alone = self.copy.run(self.path, self.code, self.tests, SLOWEST, [test])
            self.passes_alone[test] = alone.kind == "survived"
        return self.passes_alone[test]


# ── The report ──


def known_equivalents() -> dict[tuple[str, str, str], str]:
    """Return (path, before, after) → why no test can see the change."""
    if not EQUIVALENT.exists():
        return {}
    rows = json.loads(EQUIVALENT.read_text(encoding="utf-8"))
    return {(r["path"], r["before"], r["after"]): r["reason"] for r in rows}


def check(copies: Queue, mutants: list[Mutant]) -> list[dict]:
    """Test the mutants of one file; none of them if its tests fail without a mutant."""
    path, rows = mutants[0].path, []
    copy = copies.get()
    try:
        tests = ModuleTests(copy, path)
        for mutant in mutants:
            outcome = tests.run(mutant)
            row = {"outcome": outcome.kind, "seconds": round(outcome.seconds, 1)}
            rows.append(asdict(mutant) | row | {"killed_by": outcome.failed})
            print(".sT"[("killed", "survived", "timeout").index(outcome.kind)], end="", flush=True)
    except TestsFailError as e:
        print(f"{path} is not tested: {e}", file=sys.stderr, flush=True)
    finally:
        copies.put(copy)
    survivors = sum(r["outcome"] == "survived" for r in rows)
    print(f"\n{path:44}{len(rows):4} mutants {survivors:4} survived", flush=True)
    return rows


def summarize(rows: list[dict]) -> tuple[str, float]:
    """Return the survivors with the totals, and the share killed; equivalents do not count."""
    reasons, lines = known_equivalents(), []
    for row in rows:
        row["equivalent"] = reasons.get((row["path"], row["before"], row["after"]))
        if row["outcome"] == "survived" and not row["equivalent"]:
            lines += [f"{row['path']}:{row['line']}", f"  - {row['before']}", f"  + {row['after']}"]
    counted = [r for r in rows if not r["equivalent"]]
    killed = sum(r["outcome"] != "survived" for r in counted)
    share = killed / max(1, len(counted))
    same = len(rows) - len(counted)
    lines.append(
        f"{len(rows)} mutants, {same} equivalent, {killed} of {len(counted)} killed: {share:.1%}"
    )
    return "\n".join(lines), share


def default_modules() -> list[str]:
    """Return the generated modules and the packages that the report's results rest on."""
    paths = sorted(p for p in (ROOT / "dsv3_ref").glob("*.py") if p.name[0] != "_")
    for name in FOLDERS:
        paths += sorted((ROOT / "dsv3_ref" / name).glob("[a-z]*.py"))
    return [str(p.relative_to(ROOT)) for p in paths]


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the options of the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="*", help="files to mutate; default: all of the core")
    parser.add_argument(
        "--sample", type=int, default=12, help="mutants per file, 0: all (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="which sample (%(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="tests at a time (%(default)s)")
    parser.add_argument("--survivors", type=Path, help="a report whose survivors are tested again")
    parser.add_argument("--out", type=Path, default=Path("build/mutants.json"), help="report")
    return parser.parse_args(argv)


def sampled(args: argparse.Namespace) -> list[list[Mutant]]:
    """Return a sample of the mutants of each file that was asked for."""
    return [draw(path, args.sample, args.seed) for path in args.paths or default_modules()]


def surviving(report: Path) -> list[list[Mutant]]:
    """Return the survivors of an earlier report, by file."""
    fields, groups = Mutant.__dataclass_fields__, {}
    for row in json.loads(report.read_text(encoding="utf-8")):
        if row["outcome"] == "survived":
            groups.setdefault(row["path"], []).append(Mutant(**{k: row[k] for k in fields}))
    return list(groups.values())


def main(argv: list[str]) -> int:
    """Write the report; the exit code is 1 below 90 % killed."""
    args = parse(argv)
    groups = [*filter(None, surviving(args.survivors) if args.survivors else sampled(args))]
    tests = [tests_of(group[0].path) for group in groups]
    files = sorted(set(map(file_of, chain.from_iterable(tests))))
    rows: list[dict] = []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with copies_of(args.workers, files) as copies, ThreadPoolExecutor(args.workers) as pool:
        for part in pool.map(lambda group: check(copies, group), groups):
            rows += part
            args.out.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    text, share = summarize(rows)
    print(text)
    return int(share < 0.9 or len({row["path"] for row in rows}) < len(groups))


@contextlib.contextmanager
def copies_of(n: int, files: list[str]) -> Iterator[Queue]:
    """Yield a queue of n copies of the checkout whose processes have imported these test files."""
    copies: Queue = Queue()
    with TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for i in range(n):
            copy = Copy(Path(folder) / str(i))
            stack.callback(copy.stop)
            copy.start(files)
            copies.put(copy)
        yield copies


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    FORK.set_forkserver_preload(["pytest", "hypothesis", "torch", "numpy", "datasets"])
    sys.exit(main(sys.argv[1:]))
