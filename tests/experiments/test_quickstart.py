"""All scripts in a chain at their debug size, as a user starts them; then once more."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from instruct_jax.cli import replacing
from instruct_jax.stages.trained import load_trained
from tests.experiments import scripts
from tests.stages.lab import same_bits

PARTS = (
    "pretrain", "sft", "rlhf_init", "collect", "reward_model", "select_sft", "ppo", "ppo_ptx",
    "evaluate",
)  # fmt: skip
MODELS = ("gpt", "gpt_prompted", "sft", "ppo", "ppo_ptx")


def quickstart(repository, workdir):
    """One run in a process of its own, on two devices, as strict as the tests are."""
    done = subprocess.run(
        [
            sys.executable,
            "-W", "error::FutureWarning",
            "experiments/quickstart.py",
            "--config=configs/quickstart.py:debug",
            f"--workdir={workdir}",
            "--host_devices=2",
        ],
        cwd=repository,
        env=scripts.environment(repository),
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory, repository):
    """The workdir of a finished run, and what it printed."""
    workdir = tmp_path_factory.mktemp("runs") / "quickstart"
    return workdir, quickstart(repository, workdir)


@pytest.fixture(scope="module")
def report(finished):
    """report.json."""
    return json.loads((finished[0] / "report.json").read_text())


def test_the_report_holds_the_figures_of_the_paper(report):
    assert list(report["win_rate_vs_sft"]) == list(MODELS)
    for name in MODELS:
        rate = report["win_rate_vs_sft"][name]
        assert 0 <= rate["low"] <= rate["mean"] <= rate["high"] <= 1
        assert set(report["gold"][name]) == {"helpful", "honest", "harmless", "overall"}
    assert set(report["rm_accuracy"]) >= {"mean", "low", "high"}
    assert {"labelers", "length_only", "calibration", "ece"} <= set(report["reward_model"])
    assert list(report["pretrain_loss"]) == ["gpt", "sft", "ppo", "ppo_ptx"]
    assert all(loss > 0 for loss in report["pretrain_loss"].values())
    assert set(report["kl"]) == {"ppo", "ppo_ptx"}
    assert set(report["tasks"]["few-shot accuracy"]) == {"gpt", "sft", "ppo", "ppo_ptx"}
    assert list(report["timings"]) == list(PARTS)
    assert report["samples"] and {"prompt", *MODELS} <= set(report["samples"][0])


def test_the_page_loads_nothing_from_elsewhere(finished):
    page = (finished[0] / "report.html").read_text()
    assert "<html" in page and "InstructGPT on the embedded world" in page
    assert not re.search(r"""(src|href)=["'](?!#|data:)""", page)
    assert "@import" not in page and "url(http" not in page


def test_the_run_ends_with_the_table_and_the_path(finished):
    workdir, printed = finished
    assert "win rate vs SFT" in printed and f"report: {workdir}/report.html" in printed


def test_every_part_leaves_a_record_of_what_it_was(finished):
    """JAX-10, issue 2: the resolved configuration, versions and where the data came from."""
    for part in PARTS:
        record = json.loads((finished[0] / part / "config.json").read_text())
        assert {"config", "versions", "commit", "command", "started"} <= set(record), part
        if part != "select_sft":
            assert record.get("data"), part
    comparisons = record_of(finished[0], "reward_model")["data"]
    path = finished[0] / "collect" / "comparisons.jsonl"
    assert hashlib.sha256(path.read_bytes()).hexdigest() in str(comparisons)


def record_of(workdir, part):
    return json.loads((workdir / part / "config.json").read_text())


def test_the_stages_meet_through_model_folders(finished):
    workdir, _ = finished
    stages = {
        "pretrain": ("language", "pretrain"), "sft": ("language", "sft"),
        "rlhf_init": ("language", "sft"), "reward_model": ("scalar", "reward_model"),
        "select_sft": ("language", "sft"), "ppo": ("language", "ppo"),
        "ppo_ptx": ("language", "ppo"),
    }  # fmt: skip
    loaded = {part: load_trained(workdir / part / "model") for part in stages}
    assert {part: (model.kind, model.stage) for part, model in loaded.items()} == stages
    assert len({model.tokenizer.fingerprint for model in loaded.values()}) == 1
    assert not same_bits(loaded["ppo"].params, loaded["rlhf_init"].params)
    assert not same_bits(loaded["ppo"].params, loaded["ppo_ptx"].params)


def test_the_sft_epoch_is_the_one_the_reward_model_prefers(finished):
    """T52, SFT-4: whatever its validation loss."""
    workdir, _ = finished
    decision = json.loads((workdir / "select_sft" / "selection.json").read_text())
    scores = {int(epoch): row["score"] for epoch, row in decision["epochs"].items()}
    assert decision["selected_epoch"] == max(scores, key=scores.get)
    assert all(row["loss"] > 0 for row in decision["epochs"].values())
    chosen = load_trained(workdir / "select_sft" / "model").params
    kept = load_trained(workdir / "sft" / "epochs" / str(decision["selected_epoch"])).params
    assert same_bits(chosen, kept)


def test_only_the_mix_reads_pretraining_text(finished):
    """T36, T38."""
    for part, mixed in (("ppo", False), ("ppo_ptx", True)):
        lines = (finished[0] / part / "ppo.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if "kl" in row]
        assert rows and all(("pretrain_nll" in row) == mixed for row in rows)
        assert all(row["ratio_error"] <= 1e-5 for row in rows), "T1"
        assert abs(rows[0]["kl"]) <= 1e-4, "T2"


def digest(workdir):
    """The hash of every file that a part wrote."""
    return {
        str(path.relative_to(workdir)): hashlib.sha256(path.read_bytes()).hexdigest()
        for part in PARTS
        for path in sorted((workdir / part).rglob("*"))
        if path.is_file()
    }


def test_a_second_run_goes_on_where_the_first_stopped_and_has_nothing_to_do(
    finished, report, repository
):
    workdir, _ = finished
    before = digest(workdir)
    printed = quickstart(repository, workdir)
    assert re.findall(r"== (\w+): done before", printed) == list(PARTS)
    assert digest(workdir) == before
    again = json.loads((workdir / "report.json").read_text())
    assert again == report


def test_every_file_of_a_run_is_known_to_overwrite(finished):
    """R19: what --overwrite would set aside is all that is there, and a stranger is not."""
    workdir, _ = finished
    stranger = workdir / "sft" / "epochs" / "notes.txt"
    stranger.write_text("mine")
    writes = json.loads((workdir / "config.json").read_text())["writes"]
    known = [workdir / path for path in replacing.written(workdir, writes)]
    files = {path for path in workdir.rglob("*") if path.is_file()}
    below = {file for file in files if any(p == file or p in file.parents for p in known)}
    assert files - below == {stranger}
    stranger.unlink()


def test_parts_that_are_gone_are_run_again_under_another_name_of_the_folder(
    finished, report, repository
):
    """A result that is missing, a folder that is empty, and a path that is written otherwise."""
    workdir, _ = finished
    (workdir / "evaluate" / "evaluation.json").unlink()
    shutil.rmtree(workdir / "select_sft")
    (workdir / "select_sft").mkdir()
    printed = quickstart(repository, os.path.relpath(workdir, repository))
    again = [part for part in PARTS if f"== {part}: done before" not in printed]
    assert again == ["select_sft", "evaluate"]
    now = json.loads((workdir / "report.json").read_text())
    for result in ("win_rate_vs_sft", "gold", "selection", "samples", "pretrain_loss"):
        assert now[result] == report[result]
