"""Runs a command as N processes of one run on this machine.

    python experiments/launch.py -n 2 -- python experiments/sft.py --config=configs/sft.py:debug ...
    python experiments/launch.py -n 4 --devices-per-process=2 -- python experiments/ppo.py ...

With M devices a process, process i has the accelerators i*M to i*M+M-1; on a machine without any,
the CPU stands for M devices. Without M every process sees all devices, which only a CPU allows.

Shown is what process 0 writes, and the last lines of another that fails; --prefix shows all. When
one fails the others are ended within seconds, and its exit code is the command's. SIGTERM and
Ctrl-C are passed on: the run saves and ends with code 0. On machines of a cluster use its own
launcher (srun, mpirun, xpk, gcloud ... ssh --worker=all); scripts find each other there by
themselves.
"""

import argparse
import ctypes
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence

from instruct_jax.cli import HOST_DEVICE_FLAGS
from instruct_jax.cli.processes import COORDINATOR, COUNT, INDEX

GRACE = 5.0  # seconds that the others have to end by themselves
LINES = 40  # of the output of a process that fails
PR_SET_PDEATHSIG = 1
LOOPBACK = "127.0.0.1"  # where the processes meet: no other machine has a say in it


class Process:
    """Process `index` of the run, and what it writes."""

    def __init__(self, index: int, command: Sequence[str], extra: Mapping[str, str], prefix: bool):
        self.index = index
        shown = index == 0 and not prefix
        pipe = None if shown else subprocess.PIPE
        self.popen = subprocess.Popen(
            command,
            env=os.environ | extra,
            stdout=pipe,
            stderr=None if shown else subprocess.STDOUT,
            text=True,
            errors="replace",
            # Ctrl-C on a terminal would reach it twice, and twice means at once.
            start_new_session=True,
            preexec_fn=_end_with_parent,
        )
        self.tail: deque[str] = deque(maxlen=LINES)
        self._reader = threading.Thread(target=self._read, args=(prefix,), daemon=True)
        if not shown:
            self._reader.start()

    def _read(self, prefix: bool) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self.tail.append(line)
            if prefix:
                print(f"[{self.index}] {line}", end="", flush=True)

    def send(self, number: int) -> None:
        """A signal to it and to whatever it started."""
        try:
            os.killpg(self.popen.pid, number)
        except ProcessLookupError:
            return

    def report(self, prefix: bool) -> None:
        """Says on stderr how it failed."""
        code = self.popen.returncode
        how = (
            f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        )
        print(f"launch: process {self.index} {how}", file=sys.stderr, flush=True)
        if self.index and not prefix:
            self._reader.join(timeout=1)
            for line in self.tail:
                print(f"[{self.index}] {line}", end="", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; the exit code."""
    flags = _parse(argv)
    shared = {COORDINATOR: f"{LOOPBACK}:{_free_port()}", COUNT: str(flags.n)}
    processes: list[Process] = []

    def pass_on(number: int, frame: object) -> None:
        for process in processes:
            process.send(number)

    usual = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for i in range(flags.n):
            extra = shared | {INDEX: str(i)} | _devices(i, flags.devices_per_process)
            processes.append(Process(i, flags.command, extra, flags.prefix))
        pids = " ".join(str(process.popen.pid) for process in processes)
        print(f"launch: processes {pids}", file=sys.stderr, flush=True)
        return _wait(processes, flags.prefix)
    except OSError as error:  # of starting them
        print(f"launch: {flags.command[0]}: {error.strerror}", file=sys.stderr)
        return 2
    finally:
        for process in processes:
            process.send(signal.SIGKILL)
            process.popen.wait()
        for number, handler in usual.items():
            signal.signal(number, handler)


def _wait(processes: Sequence[Process], prefix: bool) -> int:
    """The exit code of the first that fails, once all have ended or had their time; 0."""
    failed, deadline = None, float("inf")
    while time.monotonic() < deadline:
        codes = [process.popen.poll() for process in processes]
        if failed is None:
            # What a signal ended is the cause, where others have failed of its absence meanwhile.
            fallen = [p for p, code in zip(processes, codes, strict=True) if code]
            failed = min(fallen, key=lambda p: p.popen.returncode > 0, default=None)
            if failed is not None:
                failed.report(prefix)
                deadline = time.monotonic() + GRACE
        if None not in codes:
            break
        time.sleep(0.05)
    if failed is None:
        return 0
    code = failed.popen.returncode
    return code if code > 0 else 128 - code


def _devices(index: int, count: int | None) -> dict[str, str]:
    if count is None:
        return {}
    own = range(index * count, (index + 1) * count)
    return {
        "JAX_NUM_CPU_DEVICES": str(count),
        "JAX_LOCAL_DEVICE_IDS": ",".join(map(str, own)),
        "XLA_FLAGS": " ".join([os.environ.get("XLA_FLAGS", ""), *HOST_DEVICE_FLAGS]),
    }


def _end_with_parent() -> None:
    # Where this script is killed, its processes save and end; Linux alone can say so.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return probe.getsockname()[1]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-n", type=int, required=True, metavar="N", help="processes")
    parser.add_argument("--devices-per-process", type=int, metavar="M")
    parser.add_argument("--prefix", action="store_true", help="show every process, as [I] LINE")
    parser.add_argument("command", nargs="+", metavar="CMD", help="after --")
    flags = parser.parse_args(argv)
    for name, value in (("-n", flags.n), ("--devices-per-process", flags.devices_per_process)):
        if value is not None and value < 1:
            parser.error(f"{name} {value}: expected 1 or more")
    return flags


if __name__ == "__main__":
    sys.exit(main())
