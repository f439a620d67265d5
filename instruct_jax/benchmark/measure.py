"""How long a program takes, and what this machine could have done in that time.

Compilation is timed apart, every run waits for its results, and the figure is the median of several
runs. The machine's own peaks come from the same run: C is the best of a few large matrix products,
W the best of a large copy and a matrix-vector product, which reads a matrix once as decoding does
(XLA's copy uses one core of a CPU).
"""

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from instruct_jax.models.costs import PEAKS, Cost, Peaks, time_limit, total

# The words of a device's kind that name a row of PEAKS.
_KINDS = {"v4": "v4", "v5 lite": "v5e", "v5e": "v5e", "v5": "v5p", "v6": "v6e"}
_KINDS |= {"h100": "h100", "h200": "h200"}


class Account(NamedTuple):
    """What one run of a workload did, as useful work.

    `tokens` are what its speed is counted in: those trained on, scored or drawn. `real` of `padded`
    positions held a token. `occupancy` is the share of slots that were live in a decode turn.
    """

    pieces: tuple[Cost, ...]
    tokens: int
    sequences: int
    real: int
    padded: int
    occupancy: float | None = None


class Workload(NamedTuple):
    """One phase, ready to run; `run()` returns arrays, `account` what they amounted to."""

    phase: str
    run: Callable[[], Any]
    account: Callable[[Any], Account]
    compile_seconds: float
    memory: dict[str, int] | None
    dtype: str


@dataclass(frozen=True)
class Machine:
    """The peaks of this machine: `flops` and `bandwidth` as measured, `published` where known."""

    flops: dict[str, float]
    bandwidth: float
    published: Peaks | None

    def peaks(self, dtype: str) -> tuple[float, float]:
        """(FLOP/s, bytes/s) that MFU and MBU are shares of: the vendor's, else as measured."""
        if self.published is not None:
            return self.published.flops(dtype), self.published.bandwidth
        return self.flops[dtype], self.bandwidth


@dataclass(frozen=True)
class Result:
    """One phase as measured. Rates are per second of the median run; memory is in bytes."""

    phase: str
    seconds: float
    runs: tuple[float, ...]
    compile_seconds: float
    tokens: int
    tokens_per_second: float
    sequences_per_second: float
    flops: float
    bytes: float
    mfu: float
    mbu: float
    limit_seconds: float
    roofline: float
    occupancy: float | None
    real_tokens: int
    padded_tokens: int
    memory: dict[str, int] | None


class Compiled(NamedTuple):
    """A program with what compiling it took and what it needs."""

    call: Callable[..., Any]
    seconds: float
    memory: dict[str, int] | None


def compiled(function: Callable[..., Any], *args: Any, donate: tuple[int, ...] = ()) -> Compiled:
    """`function` compiled for these arguments, once."""
    start = time.perf_counter()
    program = jax.jit(function, donate_argnums=donate).lower(*args).compile()
    seconds = time.perf_counter() - start
    return Compiled(program, seconds, memory_of(program))


def memory_of(program: Any) -> dict[str, int] | None:
    """Bytes of a compiled program on one device; None where the backend does not say."""
    analysis = program.memory_analysis()
    if analysis is None:
        return None
    arguments, outputs = analysis.argument_size_in_bytes, analysis.output_size_in_bytes
    shared, temporary = analysis.alias_size_in_bytes, analysis.temp_size_in_bytes
    peak = arguments + outputs - shared + temporary
    return {"peak": peak, "arguments": arguments, "outputs": outputs, "temporary": temporary}


def seconds_of(run: Callable[[], Any]) -> tuple[float, Any]:
    """One run, until its arrays are there."""
    start = time.perf_counter()
    result = jax.block_until_ready(run())
    return time.perf_counter() - start, result


def measure(workload: Workload, machine: Machine, *, repeats: int) -> Result:
    """`repeats` runs after one that does not count."""
    _, result = seconds_of(workload.run)
    runs = []
    for _ in range(repeats):
        seconds, result = seconds_of(workload.run)
        runs.append(seconds)
    account, seconds = workload.account(result), statistics.median(runs)
    work = total(account.pieces)
    flops, bandwidth = machine.peaks(workload.dtype)
    limit = time_limit(
        account.pieces, flops=machine.flops[workload.dtype], bandwidth=machine.bandwidth
    )
    return Result(
        phase=workload.phase,
        seconds=seconds,
        runs=tuple(runs),
        compile_seconds=workload.compile_seconds,
        tokens=account.tokens,
        tokens_per_second=account.tokens / seconds,
        sequences_per_second=account.sequences / seconds,
        flops=work.flops,
        bytes=work.bytes,
        mfu=work.flops / seconds / flops,
        mbu=work.bytes / seconds / bandwidth,
        limit_seconds=limit,
        roofline=limit / seconds,
        occupancy=account.occupancy,
        real_tokens=account.real,
        padded_tokens=account.padded,
        memory=workload.memory,
    )


def measure_machine(dtypes: Sequence[str] = ("float32",), *, repeats: int = 5) -> Machine:
    """A product of large square matrices in each dtype, a copy and a matrix-vector product."""
    cpu = jax.default_backend() == "cpu"
    size, width = (2048, 8192) if cpu else (8192, 16384)
    flops = {dtype: 2 * size**3 / _best(_product(size, dtype), repeats) for dtype in dtypes}
    x = jnp.ones((width, width), jnp.float32)
    copy = compiled(lambda x: x + 1, x).call
    read = compiled(lambda x, y: y @ x, x, x[:1]).call
    moved = (
        2 * x.nbytes / _best(lambda: copy(x), repeats),
        x.nbytes / _best(lambda: read(x, x[:1]), repeats),
    )
    return Machine(flops, max(moved), published_peaks(jax.devices()[0].device_kind))


def published_peaks(kind: str) -> Peaks | None:
    """The row of PEAKS for a device kind such as "TPU v5 lite" or "NVIDIA H200"."""
    found = next((name for word, name in _KINDS.items() if word in kind.lower()), None)
    return PEAKS[found] if found else None


def environment() -> dict[str, Any]:
    """Device, cores and versions: what a figure means nothing without."""
    devices = jax.devices()
    return {
        "device": devices[0].device_kind,
        "platform": devices[0].platform,
        "devices": len(devices),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "processor": _processor(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def describe_machine(machine: Machine) -> dict[str, Any]:
    """`machine` as JSON values."""
    published = None if machine.published is None else asdict(machine.published)
    return {"flops": machine.flops, "bandwidth": machine.bandwidth, "published": published}


def _product(size: int, dtype: str) -> Callable[[], jax.Array]:
    x = jnp.full((size, size), 1e-3, dtype)
    multiply = compiled(lambda x: jnp.matmul(x, x, preferred_element_type=jnp.float32), x).call
    return lambda: multiply(x)


def _best(run: Callable[[], Any], repeats: int) -> float:
    seconds_of(run)
    return min(seconds_of(run)[0] for _ in range(repeats))


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2] for line in file if line.startswith("model name")]
        return names[0].strip()
    except (OSError, IndexError):
        return platform.processor()
