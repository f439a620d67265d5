"""R1: killed anywhere, a run goes on to the bits of the run that nobody disturbed.

Every death is a real SIGKILL of a real process, at a named phase of a save, of an iteration or
between steps, or at a random time. The processes are forked from one that has imported everything
and touched no device, so that a death costs little more than what it interrupts.
"""

import json
import multiprocessing
import signal

import numpy as np
import pytest

from instruct_jax.training.ledger import account, read
from tests.stages.run_stage import LAGGING, STAGES, run_once

STEPS = 5
# Each is a process that dies there; together they leave every kind of debris behind.
DEATHS = [("write", 2), ("commit", 2), ("batch", 3)]
OF_PPO = [("rollout", 2), ("commit", 2), ("update", 2)]
OF_LAGGING = [("rollout", 3), ("commit", 2), ("update", 2)]
PHASES = ["save", "write", "commit", "prune", "batch"]
PHASES_OF_PPO = [*PHASES, "rollout", "score", "update"]


@pytest.fixture(scope="module")
def processes():
    """Where the processes come from."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.stages.run_stage"])
    return context


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Programs compiled by the first run of a stage, read by all others."""
    return tmp_path_factory.mktemp("programs")


@pytest.fixture
def run(processes, cache, tmp_path):
    """Runs a stage in a process: its exit code, and the sha256 of the last state it got to."""

    def once(stage, workdir, *, steps=STEPS, phase=None, nth=0):
        result = tmp_path / "sha256"
        result.unlink(missing_ok=True)
        arguments = (stage, str(workdir), steps, phase, nth, str(cache), str(result))
        process = processes.Process(target=run_once, args=arguments)
        process.start()
        process.join(timeout=300)
        assert process.exitcode is not None, "it hangs"
        return process.exitcode, result.read_text() if result.exists() else None

    return once


def steps_logged(workdir, stage):
    lines = (workdir / f"{stage}.jsonl").read_text().splitlines()
    return [row["step"] for row in map(json.loads, lines) if "loss" in row or "kl" in row]


@pytest.mark.parametrize("stage", [*STAGES, pytest.param(LAGGING, marks=pytest.mark.slow)])
def test_killed_three_times_a_run_ends_with_the_same_bits(run, tmp_path, stage):
    code, whole = run(stage, tmp_path / "whole")
    assert code == 0
    killed = tmp_path / "killed"
    for phase, nth in {"ppo": OF_PPO, LAGGING: OF_LAGGING}.get(stage, DEATHS):
        assert run(stage, killed, phase=phase, nth=nth) == (-signal.SIGKILL, None), phase
    assert run(stage, killed) == (0, whole)
    events = [row for row in read(killed) if row["event"] != "state"]
    assert [row["event"] for row in events] == ["start", "resume", "resume", "resume"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_killed_twenty_five_times_a_run_ends_with_the_same_bits(run, tmp_path, stage, capsys):
    """At random phases and random times; a death before the first save starts from nothing."""
    rng = np.random.default_rng(STAGES.index(stage))
    steps, deaths, attempts = 16, 0, 0
    code, whole = run(stage, tmp_path / "whole", steps=steps)
    assert code == 0
    killed = tmp_path / "killed"
    phases = PHASES_OF_PPO if stage == "ppo" else PHASES
    while deaths < 25:
        attempts += 1
        assert attempts < 100, "the deaths come too late"
        if attempts % 2:
            phase, nth = phases[rng.integers(len(phases))], int(rng.integers(1, 3))
        else:
            phase, nth = "after", int(rng.integers(20, 4000))
        code, sha = run(stage, killed, steps=steps, phase=phase, nth=nth)
        assert code in (0, -signal.SIGKILL)
        deaths += code != 0
        if code == 0:  # it got to the end first: that must be right too, and it begins again
            assert sha == whole
            killed = tmp_path / f"killed{attempts}"
    code, sha = run(stage, killed, steps=steps)
    assert (code, sha) == (0, whole)
    assert steps_logged(killed, stage) == list(range(1, steps + 1))
    with capsys.disabled():
        print(
            f"\n{stage}: {deaths} deaths in {attempts} runs, sha256 {sha[:16]}; {account(killed)}"
        )
