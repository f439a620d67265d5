"""Several real processes: what the launcher does with them, and a run that they share."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import launch
from instruct_jax.cli import processes
from instruct_jax.errors import ConfigError
from instruct_jax.stages.trained import load_trained
from instruct_jax.training.checkpoint import Checkpointer
from tests.experiments import scripts
from tests.experiments.scripts import environment
from tests.stages.run_stage import LAGGING, STAGES

STEPS = 30
MESH = "data:2,fsdp:2"


class Launched:
    """A launcher at work, its processes' ids, and what it wrote."""

    def __init__(self, command, repository, folder):
        folder.mkdir()
        self.out, self.err = folder / "out", folder / "err"
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                command, cwd=repository, env=environment(repository), stdout=out, stderr=err
            )
        while not self.err.read_text().startswith("launch: processes ") or "\n" not in self.log:
            assert self.process.poll() is None, self.log
            time.sleep(0.02)
        self.pids = [int(word) for word in self.log.splitlines()[0].split()[2:]]

    @property
    def log(self):
        return self.err.read_text()

    def wait(self, timeout=200):
        return self.process.wait(timeout)

    def until(self, condition, what):
        deadline = time.monotonic() + 200
        while not condition():
            assert self.process.poll() is None and time.monotonic() < deadline, what + self.log
            time.sleep(0.05)


@pytest.fixture
def start(repository, tmp_path):
    """Starts the launcher with N processes of a command; ends what is left of it."""
    started = []

    def call(n, *command, devices=None):
        extra = [] if devices is None else [f"--devices-per-process={devices}"]
        launcher = [sys.executable, "experiments/launch.py", "-n", str(n), *extra, "--", *command]
        started.append(Launched(launcher, repository, tmp_path / f"launch{len(started)}"))
        return started[-1]

    yield call
    for launched in started:
        launched.process.kill()
        launched.process.wait()


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
    launched = start(3, *python(code), devices=2)
    assert launched.wait() == 0
    assert launched.out.read_text() == "out 0\n", "one process speaks for all"
    told = [(tmp_path / str(i)).read_text().split() for i in range(3)]
    assert len({row[0] for row in told}) == 1 and told[0][0].startswith("127.0.0.1:")
    assert [row[1:] for row in told] == [
        ["3", "0", "2", "0,1"],
        ["3", "1", "2", "2,3"],
        ["3", "2", "2", "4,5"],
    ]


def test_one_that_fails_ends_the_others_and_gives_its_code(start):
    code = """
import os, sys, time
if os.environ["INSTRUCT_JAX_PROCESS"] == "1":
    print("row 3 is malformed", file=sys.stderr)
    sys.exit(4)
time.sleep(100)
"""
    began = time.monotonic()
    launched = start(3, *python(code))
    assert launched.wait() == 4 and time.monotonic() - began < 15
    assert "launch: process 1 ended with code 4\n[1] row 3 is malformed\n" in launched.log
    assert not any(map(alive, launched.pids)), "no orphans"


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
    files = [tmp_path / "0", tmp_path / "1"]
    for number, name in ((signal.SIGTERM, "TERM"), (signal.SIGINT, "INT")):
        launched = start(2, *python(code))
        launched.until(lambda: all(f.exists() and f.read_text() == "ready" for f in files), "ready")
        launched.process.send_signal(number)
        assert launched.wait() == 0
        assert [file.read_text() for file in files] == [name, name]


def test_a_launcher_that_is_killed_leaves_no_orphans(start):
    launched = start(2, *python("import time; time.sleep(100)"))
    launched.process.kill()
    launched.wait()
    deadline = time.monotonic() + 10
    while any(map(alive, launched.pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, launched.pids))


def test_a_command_line_without_a_command_is_refused(capsys):
    for arguments in (["-n", "2"], ["-n", "0", "--", "true"]):
        with pytest.raises(SystemExit) as exit_:
            launch.main(arguments)
        assert exit_.value.code == 2
    assert "-n 0: expected 1 or more" in capsys.readouterr().err


def test_a_command_that_cannot_be_started_is_one_line(repository):
    for command in ("no-such-command", "/etc/hostname"):
        done = subprocess.run(
            [sys.executable, "experiments/launch.py", "-n", "2", "--", command],
            cwd=repository,
            env=scripts.environment(repository),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 2
        assert done.stderr.startswith(f"launch: {command}: ") and done.stderr.count("\n") == 1


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
        *(
            ({"COORDINATOR": address, "PROCESSES": "2", "PROCESS": "1"}, "expected HOST:PORT")
            for address in ("localhost", "localhost:", ":1", "localhost:http", "a:0", "a:70000")
        ),
        ({"COORDINATOR": "no.such.host.invalid:1", "PROCESSES": "2", "PROCESS": "1"}, "no host"),
    ],
)
def test_a_launcher_that_tells_half_is_a_mistake_of_one_line(monkeypatch, told, message):
    for name, value in told.items():
        monkeypatch.setenv(f"INSTRUCT_JAX_{name}", value)
    with pytest.raises(ConfigError, match=message):
        processes.join()


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]"])
def test_a_port_in_use_is_told_before_jax_meets_it(monkeypatch, host):
    """It would end the process with a segmentation fault."""
    ipv6 = host == "[::1]"
    if ipv6 and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    family = socket.AF_INET6 if ipv6 else socket.AF_INET
    with socket.create_server(("::1" if ipv6 else "127.0.0.1", 0), family=family) as taken:
        port = taken.getsockname()[1]
        told = {"COORDINATOR": f"{host}:{port}", "PROCESSES": "2", "PROCESS": "0"}
        for name, value in told.items():
            monkeypatch.setenv(f"INSTRUCT_JAX_{name}", value)
        with pytest.raises(ConfigError, match=f"cannot listen on port {port} .*another port"):
            processes.join()


@pytest.mark.parametrize(
    ("host", "addresses", "bound"),
    [
        ("localhost", ["127.0.0.1"], "127.0.0.1"),
        ("127.0.0.1", ["127.0.0.1"], "127.0.0.1"),
        ("this-node", ["127.0.1.1"], None),  # as Debian's /etc/hosts names a machine to itself
        ("a-service", ["192.0.2.1"], None),  # another machine's, which passes it on
    ],
)
def test_process_0_listens_where_it_was_told_and_on_all_only_where_that_would_not_do(
    monkeypatch, capsys, host, addresses, bound
):
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, 0)) for a in addresses]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    port = launch._free_port()
    listens = processes._bound(f"{host}:{port}")
    if bound is None:
        assert listens in (f"[::]:{port}", f"0.0.0.0:{port}")
        assert capsys.readouterr().err.startswith("note: INSTRUCT_JAX_COORDINATOR=")
    else:
        assert listens == f"{bound}:{port}" and not capsys.readouterr().err


def listening(pid):
    """The addresses, as the kernel writes them, on which a process has a socket that listens."""
    links = [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()]
    own = {link[len("socket:[") : -1] for link in links if link.startswith("socket:[")}
    found = set()
    for table in ("tcp", "tcp6"):
        rows = [row.split() for row in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()]
        found |= {row[1].partition(":")[0] for row in rows if row[3] == "0A" and row[9] in own}
    return found


# 127.0.0.1, ::1 and 127.0.0.1 as an IPv6 socket has it; words are in the machine's order.
LOOPBACKS = {"0100007F", "0" * 24 + "01000000", "0" * 16 + "FFFF00000100007F"}


@pytest.mark.skipif(sys.platform != "linux" or sys.byteorder == "big", reason="reads /proc")
def test_the_coordinator_of_the_launcher_listens_on_this_machine_alone(start):
    """No other machine can reach what starts and ends the run."""
    code = """
import time
from instruct_jax.cli import processes
processes.join()
print("met", flush=True)
time.sleep(60)
"""
    launched = start(2, *python(code), devices=1)
    launched.until(lambda: "met" in launched.out.read_text(), "they did not meet: ")
    found = listening(launched.pids[0])
    assert found and found <= LOOPBACKS


REWARD_FAILS = """
import sys
from instruct_jax.cli import processes
from instruct_jax.errors import RunError
from tests.training import run_tiny
processes.join()
try:
    with processes.together():
        run_tiny.run(sys.argv[1], 20, mesh="data:2", reward_until=int(sys.argv[2]))
except RunError as error:
    sys.exit(error.exit_code)
"""


def test_a_reward_that_fails_in_one_process_ends_all_with_its_code(tmp_path, repository):
    """Exit code 3 of each, as a cluster sees it, within seconds; and the state is saved."""
    for until in (0, 4):
        workdir = tmp_path / str(until)
        address = {processes.COORDINATOR: f"localhost:{launch._free_port()}"}
        running = [
            subprocess.Popen(
                [*python(REWARD_FAILS), str(workdir), str(until)],
                cwd=repository,
                env=environment(repository)
                | address
                | {processes.COUNT: "2", processes.INDEX: str(i), "JAX_NUM_CPU_DEVICES": "1"},
                stderr=subprocess.PIPE,
                text=True,
            )
            for i in range(2)
        ]
        told = [process.communicate(timeout=200)[1] for process in running]
        assert [process.returncode for process in running] == [3, 3], told
        with Checkpointer(workdir / "checkpoints") as checkpointer:
            assert checkpointer.latest_step == (until or None)


# --- one run of several processes ---------------------------------------------------------------


def rows(workdir, name="tiny"):
    return [json.loads(line) for line in (workdir / f"{name}.jsonl").read_text().splitlines()]


def reached(workdir, step):
    return (workdir / "tiny.jsonl").exists() and len(rows(workdir)) >= step


def tiny(workdir, *, steps=STEPS, pause=0.0, mesh=MESH):
    arguments = (str(workdir), str(steps), str(pause), mesh)
    return sys.executable, "-m", "tests.training.run_tiny", *arguments


def test_two_processes_stop_together_die_together_and_go_on_as_one(start, tmp_path, repository):
    """R2, R3: SIGTERM to one saves one step of both; SIGKILL of one ends the other in 15 s; one
    process takes it up; the losses are those of one process that did it all (1e-5).
    """
    first = start(2, *tiny(tmp_path / "run", pause=0.1), devices=2)
    first.until(lambda: reached(tmp_path / "run", 3), "step 3")
    os.kill(first.pids[1], signal.SIGTERM)
    assert first.wait() == 0, first.log
    assert "stopped by a signal to another process at step" in first.log
    with Checkpointer(tmp_path / "run" / "checkpoints") as checkpointer:
        saved = checkpointer.latest_step
    assert saved == rows(tmp_path / "run")[-1]["step"] < STEPS

    second = start(2, *tiny(tmp_path / "run", pause=0.1), devices=2)
    second.until(lambda: reached(tmp_path / "run", saved + 2), "two more")
    began = time.monotonic()
    os.kill(second.pids[1], signal.SIGKILL)
    assert second.wait() == 128 + signal.SIGKILL and time.monotonic() - began < 15
    assert f"resumed from step {saved}" in second.log
    assert not any(map(alive, second.pids))

    whole = tmp_path / "whole"
    for workdir in (tmp_path / "run", whole):
        done = subprocess.run(
            tiny(workdir),
            cwd=repository,
            env=environment(repository) | {"JAX_NUM_CPU_DEVICES": "4"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
    logs = [rows(workdir) for workdir in (tmp_path / "run", whole)]
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
        deadline = time.monotonic() + 200
        while not reached(workdir, 3):
            assert running[0].poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        began = time.monotonic()
        running[victim].kill()
        survivor = running[1 - victim]
        survivor.communicate(timeout=60)
        assert survivor.returncode != 0 and time.monotonic() - began < 15
        running[victim].communicate()


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed_end_with_the_same_bits(start, tmp_path):
    """R2: whichever rank it is, taken up by as many processes again."""

    def last_line(launched):  # after what gloo says
        return launched.out.read_text().splitlines()[-1]

    whole = start(2, *tiny(tmp_path / "whole"), devices=2)
    assert whole.wait() == 0, whole.log
    assert len(last_line(whole)) == 64
    for victim in (1, 0):
        workdir = tmp_path / str(victim)
        killed = start(2, *tiny(workdir, pause=0.1), devices=2)
        killed.until(lambda workdir=workdir: reached(workdir, 8), "step 8")
        began = time.monotonic()
        os.kill(killed.pids[victim], signal.SIGKILL)
        assert killed.wait() == 128 + signal.SIGKILL and time.monotonic() - began < 15
        assert not any(map(alive, killed.pids))
        again = start(2, *tiny(workdir), devices=2)
        assert again.wait() == 0 and "resumed from step" in again.log, again.log
        assert last_line(again) == last_line(whole)


# What is compared of two logs; the rest are rates.
LOGGED = ("loss", "grad_norm", "valid_loss", "valid_pretrain_loss", "score", "kl", "value_loss",
          "pretrain_nll", "policy_loss")  # fmt: skip


def assert_same_course(rows, expected):
    """Two logs tell the same to 1e-5 of its size."""
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert row.keys() == other.keys()
        for name in row.keys() & set(LOGGED):
            assert row[name] == pytest.approx(other[name], rel=1e-5, abs=1e-5), (name, row, other)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [*STAGES, LAGGING])
def test_a_run_goes_on_with_four_processes_two_one_and_one_of_eight_devices(
    start, tmp_path, repository, stage
):
    """Its evaluations too; all that is logged, and the last state, are those of the run that never
    changed its layout, to 1e-5 and 1e-4 of their size.
    """

    def run(n, workdir, steps, mesh, devices):
        command = (sys.executable, "-m", "tests.stages.run_stage", stage, str(workdir))
        launched = start(n, *command, str(steps), mesh, devices=devices)
        assert launched.wait(900) == 0, launched.log[-3000:]

    moved, alone = tmp_path / "moved", tmp_path / "alone"
    run(4, moved, 2, "data:2,fsdp:2,tensor:2", 2)
    run(2, moved, 4, "fsdp:4", 2)
    run(1, moved, 6, "data:1", 1)
    run(1, moved, 8, "data:2,fsdp:4", 8)
    for steps in (2, 4, 6, 8):  # the schedule is of so many steps
        run(1, alone, steps, "data:1", 1)
    log = "ppo" if stage == LAGGING else stage
    assert_same_course(rows(moved, log), rows(alone, log))
    with np.load(moved / "last.npz") as got, np.load(alone / "last.npz") as expected:
        for name in expected.files:
            np.testing.assert_allclose(got[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_processes_evaluate_and_answer_as_one_does(start, tmp_path):
    """The scripts of a user, from pretraining to PPO-ptx: held-out losses during the run, answers
    to the probe prompts (`complete`), the reward model's accuracy, the models that are left.
    """
    comparisons = scripts.write_rows(tmp_path / "data")["comparisons"]

    def run(n, script, *arguments, preset="debug"):
        folder = tmp_path / str(n) / script
        command = [sys.executable, f"experiments/{script}.py", f"--workdir={folder}"]
        command += [f"--config=configs/{script}.py:{preset}", "--mesh=data:2", *arguments]
        launched = start(n, *command, devices=2 // n)
        assert launched.wait(900) == 0, launched.log[-3000:]
        return folder / "model"

    for n in (1, 2):
        init = f"--config.init={run(n, 'pretrain')}"
        init = f"--config.init={run(n, 'sft', init)}"
        reward = run(n, "reward_model", init, f"--config.data.comparisons={comparisons}")
        run(n, "ppo", init, f"--config.reward_model={reward}", preset="debug_ptx")
    one, two = tmp_path / "1", tmp_path / "2"
    for script in ("pretrain", "sft", "reward_model", "ppo"):
        assert_same_course(rows(two / script, script), rows(one / script, script))
        models = [load_trained(folder / script / "model").params for folder in (one, two)]
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), *models)
    assert "valid_pretrain_loss" in {name for row in rows(two / "ppo", "ppo") for name in row}
    answers = [(folder / "ppo" / "samples.jsonl").read_text() for folder in (one, two)]
    assert answers[0] == answers[1] and len(answers[0].splitlines()) >= 10
    reports = [json.loads((f / "reward_model" / "accuracy.json").read_text()) for f in (one, two)]
    assert reports[0]["accuracy"] == reports[1]["accuracy"]
