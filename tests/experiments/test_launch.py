"""Several real processes: what the launcher does with them, and a run that they share."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments import launch
from instruct_jax.cli import processes
from instruct_jax.errors import ConfigError
from instruct_jax.training.checkpoint import Checkpointer
from tests.experiments.scripts import environment
from tests.stages.run_stage import STAGES

STEPS = 30
MESH = "data:2,fsdp:2"


@pytest.fixture
def start(repository):
    """Starts the launcher with N processes of a command; ends what is left of it."""
    started = []

    def call(n, *command, devices=None):
        extra = [] if devices is None else [f"--devices-per-process={devices}"]
        process = subprocess.Popen(
            [sys.executable, "experiments/launch.py", "-n", str(n), *extra, "--", *command],
            cwd=repository,
            env=environment(repository),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        first = process.stderr.readline()
        assert first.startswith("launch: processes "), first + process.stderr.read()
        return process, [int(word) for word in first.split()[2:]]

    yield call
    for process in started:
        process.kill()
        process.communicate()


def python(code):
    return sys.executable, "-c", code


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"


# --- the launcher -------------------------------------------------------------------------------


def test_every_process_is_told_who_it_is(start, tmp_path):
    code = f"""
import os, pathlib
names = ("INSTRUCT_JAX_COORDINATOR", "INSTRUCT_JAX_PROCESSES", "INSTRUCT_JAX_PROCESS")
names += ("JAX_NUM_CPU_DEVICES", "JAX_LOCAL_DEVICE_IDS")
told = [os.environ[name] for name in names]
pathlib.Path({str(tmp_path)!r}, told[2]).write_text(" ".join(told))
print("out", told[2])
"""
    process, _ = start(3, *python(code), devices=2)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert out == "out 0\n", "one process speaks for all"
    told = [(tmp_path / str(i)).read_text().split() for i in range(3)]
    assert len({row[0] for row in told}) == 1 and told[0][0].startswith("localhost:")
    assert [row[1:] for row in told] == [
        ["3", "0", "2", "0,1"],
        ["3", "1", "2", "2,3"],
        ["3", "2", "2", "4,5"],
    ]


def test_one_that_fails_ends_the_others_and_gives_its_code(start):
    code = """
import os, sys, time
if os.environ["INSTRUCT_JAX_PROCESS"] == "1":
    sys.exit("row 3 is malformed") if len(sys.argv) > 1 else sys.exit(4)
time.sleep(100)
"""
    for argument, expected in (((), 4), (("say",), 1)):
        began = time.monotonic()
        process, pids = start(3, *python(code), *argument)
        _, err = process.communicate(timeout=60)
        assert process.returncode == expected and time.monotonic() - began < 15
        assert f"launch: process 1 ended with code {expected}" in err
        assert ("[1] row 3 is malformed" in err) == bool(argument)
        assert not any(map(alive, pids)), "no orphans"


def test_a_signal_reaches_every_process_once(start, tmp_path):
    code = f"""
import os, pathlib, signal, time
file = pathlib.Path({str(tmp_path)!r}, os.environ["INSTRUCT_JAX_PROCESS"])
seen = []
signal.signal(signal.SIGTERM, lambda *_: seen.append("TERM"))
signal.signal(signal.SIGINT, lambda *_: seen.append("INT"))
file.write_text("ready")
while not seen: time.sleep(0.01)
time.sleep(0.3)
file.write_text(" ".join(seen))
"""
    for number, name in ((signal.SIGTERM, "TERM"), (signal.SIGINT, "INT")):
        process, _ = start(2, *python(code))
        files = [tmp_path / "0", tmp_path / "1"]
        while not all(file.exists() and file.read_text() == "ready" for file in files):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(timeout=30) == 0
        assert [file.read_text() for file in files] == [name, name]


def test_a_launcher_that_is_killed_leaves_no_orphans(start):
    process, pids = start(2, *python("import time; time.sleep(100)"))
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, pids))


def test_a_command_line_without_a_command_is_refused(capsys):
    for arguments in (["-n", "2"], ["-n", "0", "--", "true"]):
        with pytest.raises(SystemExit) as exit_:
            launch.main(arguments)
        assert exit_.value.code == 2
    assert "-n 0: expected 1 or more" in capsys.readouterr().err


# --- who is there -------------------------------------------------------------------------------

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "a[1-2]", "SLURM_LOCALID": "0"}


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"JAX_PLATFORMS": "cpu"}, False),
        ({"INSTRUCT_JAX_PROCESSES": "2"}, True),
        (SLURM | {"SLURM_PROCID": "0", "SLURM_NTASKS": "2"}, True),
        (SLURM | {"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, False),  # sbatch without srun
        ({"OMPI_COMM_WORLD_SIZE": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "x", "JOB_COMPLETION_INDEX": "0"}, True),
        ({"KUBERNETES_SERVICE_HOST": "x"}, False),  # a notebook in a pod
    ],
)
def test_one_process_is_the_rule(environment, several):
    assert processes.announced({"JAX_PLATFORMS": "cpu"} | environment) is several


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"COORDINATOR": "a:1"}, "INSTRUCT_JAX_PROCESSES, INSTRUCT_JAX_PROCESS not set"),
        ({"COORDINATOR": "a:1", "PROCESSES": "2", "PROCESS": "2"}, "expected 0 <= process"),
        ({"COORDINATOR": "a:1", "PROCESSES": "two", "PROCESS": "0"}, "PROCESSES=two"),
    ],
)
def test_a_launcher_that_tells_half_is_a_mistake_of_one_line(monkeypatch, told, message):
    for name, value in told.items():
        monkeypatch.setenv(f"INSTRUCT_JAX_{name}", value)
    with pytest.raises(ConfigError, match=message):
        processes.join()


# --- one run of several processes ---------------------------------------------------------------


def rows(workdir, name="tiny"):
    return [json.loads(line) for line in (workdir / f"{name}.jsonl").read_text().splitlines()]


def wait_for_step(process, workdir, step):
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None:
        if (workdir / "tiny.jsonl").exists() and len(rows(workdir)) >= step:
            return
        time.sleep(0.05)
    pytest.fail(f"step {step} was not reached: {process.communicate()[1][-3000:]}")


def tiny(workdir, *, steps=STEPS, pause=0.0, mesh=MESH):
    arguments = (str(workdir), str(steps), str(pause), mesh)
    return sys.executable, "-m", "tests.training.run_tiny", *arguments


def test_two_processes_stop_together_die_together_and_go_on_as_one(start, tmp_path, repository):
    """R2, R3: SIGTERM to one saves one step of both; SIGKILL of one ends the other in 15 s; one
    process takes it up; the losses are those of one process that did it all (1e-5).
    """
    process, pids = start(2, *tiny(tmp_path, pause=0.1), devices=2)
    wait_for_step(process, tmp_path, 3)
    os.kill(pids[1], signal.SIGTERM)
    _, log = process.communicate(timeout=120)
    assert process.returncode == 0, log
    assert "stopped by a signal to another process at step" in log
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        saved = checkpointer.latest_step
    assert saved == rows(tmp_path)[-1]["step"] < STEPS

    process, pids = start(2, *tiny(tmp_path, pause=0.1), devices=2)
    wait_for_step(process, tmp_path, saved + 2)
    began = time.monotonic()
    os.kill(pids[1], signal.SIGKILL)
    _, log = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGKILL and time.monotonic() - began < 15
    assert f"resumed from step {saved}" in log
    assert not any(map(alive, pids))

    whole = tmp_path / "whole"
    for workdir in (tmp_path, whole):
        done = subprocess.run(
            tiny(workdir),
            cwd=repository,
            env=environment(repository) | {"JAX_NUM_CPU_DEVICES": "4"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    logs = [rows(workdir) for workdir in (tmp_path, whole)]
    assert [row["step"] for row in logs[0]] == list(range(1, STEPS + 1))
    losses = [[row["loss"] for row in log] for log in logs]
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.slow
def test_a_rank_that_dies_takes_the_others_with_it_without_a_launcher(tmp_path, repository):
    """R2: on a cluster nobody but the processes themselves can see it; whichever rank it is."""
    for victim in (0, 1):
        workdir = tmp_path / str(victim)
        address = {processes.COORDINATOR: f"localhost:{launch._free_port()}"}
        running = [
            subprocess.Popen(
                tiny(workdir, pause=0.2, steps=500),
                cwd=repository,
                env=environment(repository)
                | address
                | {processes.COUNT: "2", processes.INDEX: str(i), "JAX_NUM_CPU_DEVICES": "2"},
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
            )
            for i in range(2)
        ]
        wait_for_step(running[0], workdir, 3)
        began = time.monotonic()
        running[victim].kill()
        survivor = running[1 - victim]
        survivor.communicate(timeout=60)
        assert survivor.returncode != 0 and time.monotonic() - began < 15
        running[victim].communicate()


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_trains_on_four_processes_and_goes_on_with_two_and_one(
    start, tmp_path, repository, stage
):
    """Also its evaluations; its losses are those of one process to 1e-5 of their size."""

    def run(n, workdir, steps, mesh, devices):
        command = (sys.executable, "-m", "tests.stages.run_stage", stage, str(workdir))
        process, _ = start(n, *command, str(steps), mesh, devices=devices)
        out, log = process.communicate(timeout=900)
        assert process.returncode == 0, log[-3000:]
        return out

    shared, alone = tmp_path / "shared", tmp_path / "alone"
    run(4, shared, 2, "data:2,fsdp:2,tensor:2", 2)
    run(2, shared, 4, "fsdp:4", 2)
    run(1, shared, 6, "data:2,fsdp:4", 8)
    for steps in (2, 4, 6):  # the schedule is of so many steps
        run(1, alone, steps, "data:1", 1)
    for log in zip(rows(shared, stage), rows(alone, stage), strict=True):
        for name in (
            "loss",
            "grad_norm",
            "valid_loss",
            "score",
            "kl",
            "value_loss",
            "pretrain_nll",
        ):
            values = [row.get(name) for row in log]
            assert values[0] == pytest.approx(values[1], rel=1e-5, abs=1e-5), (name, log)
    with np.load(shared / "last.npz") as got, np.load(alone / "last.npz") as expected:
        for name in expected.files:
            np.testing.assert_allclose(got[name], expected[name], rtol=1e-4, atol=1e-5)
