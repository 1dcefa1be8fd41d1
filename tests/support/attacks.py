"""Attacks, what each did before the hardening, and the tests that refuse it today."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Attack:
    """An attack.

    Attributes:
        group: what it is aimed at.
        words: what the attacker does.
        before: what it did before the hardening, measured or as written down then; empty if it was neither.
        tests: ids of the tests that refuse it, without parameters.
    """

    group: str
    words: str
    before: str
    tests: tuple[str, ...]


_STORE, _MEETING = "tests/tasks/cluster/test_store.py", "tests/tasks/cluster/test_rendezvous.py"
_GUARD, _PIPELINE, _LOGIN = (
    "tests/services/test_guarded_server.py",
    "tests/test_pipeline.py",
    "tests/services/test_login.py",
)
_CHECKPOINT, _WEIGHTS = (
    "tests/tlq/models/test_untrusted_checkpoints.py",
    "tests/tlq/models/test_incomplete_checkpoints.py",
)
_IMAGES, _CHAT, _SECRETS = (
    "tests/tlq/inputs/test_untrusted_images.py",
    "tests/tlq/inputs/test_chat.py",
    "tests/tasks/config/test_secrets.py",
)
_SERVING, _PACKAGE = "tests/tasks/registry/test_serving.py", "tests/test_package.py"
_RESUME, _DIGEST = "tests/tasks/stages/test_resume.py", "tests/tlq/models/test_source_digest.py"

_RANKS, _SERVERS, _MODELS, _DATA = "ranks and workers", "servers", "checkpoints", "data"
_SECRET, _PACKAGES, _BITS = "secrets and versions", "packages", "bits"

ATTACKS = (
    Attack(
        _RANKS,
        "A stranger writes a pickle into the rendezvous, before a group forms or between two groups",
        "ran code",
        (
            f"{_MEETING}::test_a_poisoned_state_is_not_unpickled_and_a_group_forms",
            f"{_MEETING}::test_ranks_under_attack_give_the_same_bits_and_listen_on_loopback_only",
        ),
    ),
    Attack(
        _RANKS,
        "A stranger writes a message, unsigned or with a signature of another key, into the job's store",
        "",
        (
            f"{_STORE}::test_a_value_without_the_jobs_signature_does_not_count",
            f"{_STORE}::test_a_signed_value_counts_only_under_its_key",
        ),
    ),
    Attack(_RANKS, "Another user reads the secret", "", (f"{_STORE}::test_a_secret_is_readable_for_its_owner_only",)),
    Attack(
        _RANKS,
        "Another machine connects to the store of a job on this machine",
        "rank 0 listened on every interface",
        (f"{_STORE}::test_the_store_listens_on_the_address_it_was_given_and_no_other",),
    ),
    Attack(
        _SERVERS,
        "A page of another site, or a foreign name for this machine, sends a request to Prefect or MLflow",
        "Prefect answered any origin",
        (
            f"{_GUARD}::test_only_own_pages_and_programs_are_answered",
            f"{_PIPELINE}::test_pages_of_other_sites_are_refused",
        ),
    ),
    Attack(
        _SERVERS,
        "A page of another site opens a web socket of Prefect",
        "",
        (f"{_GUARD}::test_a_websocket_of_another_site_is_closed",),
    ),
    Attack(
        _SERVERS,
        "A flow run brings its own command, environment or folder",
        "ran the command",
        (f"{_GUARD}::test_a_flow_run_cannot_choose_command_environment_or_folder",),
    ),
    Attack(
        _SERVERS,
        "A user without the login, or with a guessed one, starts a run",
        "",
        (f"{_LOGIN}::test_a_client_without_the_login_is_refused",),
    ),
    Attack(
        _SERVERS,
        "Another machine connects to a server of `make serve`",
        "",
        (f"{_PIPELINE}::test_every_server_listens_on_loopback_only",),
    ),
    Attack(
        _SERVERS,
        "A page of another site puts a question to the served model",
        "",
        (f"{_SERVING}::test_a_page_of_another_site_cannot_ask",),
    ),
    Attack(
        _SERVERS,
        "A request to the served model holds deep JSON, junk, or no row",
        "",
        (
            f"{_SERVING}::test_deep_json_is_refused_and_the_server_goes_on",
            f"{_SERVING}::test_invalid_requests_get_status_400_and_the_reason",
        ),
    ),
    Attack(
        _MODELS,
        "A checkpoint brings code, and a prompt is answered with y",
        "ran code",
        (f"{_CHECKPOINT}::test_custom_code_is_never_run_and_nobody_is_asked",),
    ),
    Attack(
        _MODELS,
        "A checkpoint names an attention kernel of the hub",
        "traceback",
        (f"{_CHECKPOINT}::test_attention_from_the_hub_is_refused_by_name",),
    ),
    Attack(
        _MODELS,
        "A checkpoint's code is to travel on in an export",
        "",
        (f"{_CHECKPOINT}::test_an_export_names_no_code_and_holds_none",),
    ),
    Attack(
        _MODELS,
        "An index or a link of a checkpoint leads to a file outside its folder",
        "",
        (
            f"{_CHECKPOINT}::test_a_shard_outside_the_folder_is_refused",
            f"{_CHECKPOINT}::test_a_link_out_of_the_checkpoint_is_refused_and_one_inside_the_hubs_cache_is_not",
        ),
    ),
    Attack(
        _MODELS,
        "A chat template does not end, in a stage or in a server's thread",
        "hang",
        (
            f"{_CHAT}::test_a_chat_template_that_does_not_end_is_stopped",
            f"{_SERVING}::test_a_chat_template_without_end_is_refused_in_a_servers_thread",
        ),
    ),
    Attack(
        _DATA,
        "A row names a file outside the data's folder, a link out of it, a FIFO or a device",
        "the link was read, the FIFO hung",
        (
            f"{_IMAGES}::test_any_other_file_is_refused_and_nothing_hangs",
            f"{_IMAGES}::test_a_device_is_refused_even_in_the_folder",
            f"{_IMAGES}::test_rows_of_a_list_stay_in_its_folder",
        ),
    ),
    Attack(
        _DATA,
        "A picture is PostScript or of another format that programs interpret",
        "PPM and ICO were read",
        (f"{_IMAGES}::test_other_formats_are_refused",),
    ),
    Attack(
        _DATA,
        "A picture of a few bytes has 170 megapixels",
        "",
        (f"{_IMAGES}::test_a_picture_of_170_megapixels_is_refused_before_it_is_decoded",),
    ),
    Attack(
        _DATA,
        "A text has a megabyte",
        "",
        (f"{_CHAT}::test_a_text_of_a_megabyte_is_refused_before_it_is_tokenized",),
    ),
    Attack(
        _SECRET,
        "A reader of messages, tags, commands or logs looks for a password",
        "",
        (
            f"{_SECRETS}::test_an_address_is_shown_without_its_secrets",
            f"{_SECRETS}::test_an_unreachable_mlflow_is_named_without_its_password",
            f"{_SECRETS}::test_the_command_that_shows_mlflow_names_the_variable",
            f"{_SECRETS}::test_a_database_that_refuses_is_named_without_its_password",
            f"{_SECRETS}::test_a_runs_tag_names_the_git_remote_without_its_token",
            f"{_LOGIN}::test_the_password_is_in_no_command_line_and_in_no_log",
        ),
    ),
    Attack(
        _SECRET,
        "A registered checkpoint is changed on disk",
        "",
        (f"{_SERVING}::test_a_checkpoint_that_changed_is_refused",),
    ),
    Attack(
        _PACKAGES,
        "A package of the lock is replaced in the index",
        "the lock had no hashes",
        (
            f"{_PACKAGE}::test_every_release_of_the_lock_has_hashes",
            f"{_PACKAGE}::test_the_set_up_installs_nothing_without_its_hash",
        ),
    ),
    Attack(
        _BITS,
        "A bit of a finished part flips, or the part is truncated, empty or gone",
        "a flipped byte was exported",
        (f"{_RESUME}::test_a_damaged_part_is_computed_again",),
    ),
    Attack(
        _BITS,
        "A byte of the weights changes between two runs",
        "",
        (f"{_DIGEST}::test_every_byte_counts", f"{_RESUME}::test_scores_of_another_model_are_refused"),
    ),
    Attack(
        _BITS,
        "Tensors of a checkpoint are missing, of another shape, not finite, or quantized",
        "missing weights were random, the scales of FP8 weights dropped",
        (
            f"{_WEIGHTS}::test_a_missing_weight_is_refused",
            f"{_WEIGHTS}::test_a_weight_of_another_shape_is_refused",
            f"{_WEIGHTS}::test_a_weight_that_is_not_finite_is_refused_before_any_work",
            f"{_WEIGHTS}::test_quantized_weights_are_refused",
        ),
    ),
)


def outcomes() -> dict[str, Counter[str]]:
    """Run the tests of all attacks; their ids with the number of "passed", "failed" and "skipped" cases.

    Raises:
        RuntimeError: a test does not exist.
    """
    tests = sorted({test for attack in ATTACKS for test in attack.tests})
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-m", "soak or not soak", "-o", "junit_family=xunit1", f"--junitxml={report}"]
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, *tests]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode > 1 or not report.exists():
            raise RuntimeError(done.stdout[-3000:] + done.stderr[-1000:])
        found: dict[str, Counter[str]] = {test: Counter() for test in tests}
        for case in ElementTree.parse(report).iter("testcase"):
            test = f"{case.get('file')}::{str(case.get('name')).partition('[')[0]}"
            found[test][_word(case)] += 1
    return found


def _word(case: ElementTree.Element) -> str:
    """ "passed", "failed" or "skipped"."""
    if case.find("skipped") is not None:
        return "skipped"
    return "passed" if case.find("failure") is None and case.find("error") is None else "failed"
