"""A plan: what each program of a step needs and takes, by formula and by the compiler; a verdict.

The roofline of a program is the sum over its pieces of max(FLOPs / C, bytes / W), spread evenly
over the devices, or the time of its collectives at the speed of the links, whichever is longer:
computing, moving and sending overlap perfectly. A run takes longer; how much is for the benchmark.
"""

import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from jax.sharding import Mesh

from instruct_jax.models.costs import PEAKS, Cost, time_limit, total
from instruct_jax.planning import estimate
from instruct_jax.planning.abstract import Program
from instruct_jax.planning.hlo import Collective, collectives, largest_temporaries
from instruct_jax.planning.jobs import Job
from instruct_jax.planning.programs import programs
from instruct_jax.planning.topologies import Topology
from instruct_jax.training.mesh import describe

GIB = 2.0**30


@dataclass
class Compiled:
    """What the compiler says of a program on one device; `error` where it gave up."""

    seconds: float
    peak: float = 0.0
    arguments: float = 0.0
    temporaries: float = 0.0
    collectives: dict[str, Collective] = field(default_factory=dict)
    largest: list[tuple[float, str]] = field(default_factory=list)
    error: str | None = None


@dataclass
class Part:
    """One program of a step; bytes are of one device, FLOPs of all, those of remat beside them."""

    name: str
    estimated: dict[str, float]
    peak_estimated: float
    held: float
    flops: float
    recomputed: float
    bytes: float
    seconds: float | None
    compiled: Compiled | None = None

    @property
    def peak(self) -> float:
        """Bytes of a device at the worst moment, the compiler's where it was asked."""
        if self.compiled is None:
            return self.peak_estimated
        return math.inf if self.compiled.error else self.compiled.peak


@dataclass
class Plan:
    """One job on one mesh of one topology."""

    job: str
    topology: str
    mesh: str
    micro_batches: int
    ptx_micro_batches: int | None
    remat: str
    devices: int
    memory: float | None
    parts: list[Part]
    steps: int

    @property
    def peak(self) -> float:
        """The largest peak of the programs."""
        return max(part.peak for part in self.parts)

    @property
    def fits(self) -> bool:
        """Whether every program compiled and fits; for a CPU, whether it compiled."""
        failed = any(part.compiled and part.compiled.error for part in self.parts)
        return not failed and (self.memory is None or self.peak <= self.memory)

    @property
    def step_seconds(self) -> float | None:
        """The roofline of a step; None where the chip's speed is not known."""
        seconds = [part.seconds for part in self.parts if part.seconds is not None]
        return sum(seconds) if seconds else None

    def as_json(self, price: float | None = None) -> dict[str, Any]:
        """All of it, and what follows from it."""
        peak = self.peak if math.isfinite(self.peak) else None
        row = asdict(self) | {"peak": peak, "fits": self.fits}
        for part in row["parts"]:
            sent = part["compiled"] and part["compiled"]["collectives"]
            for kind, found in (sent or {}).items():
                sent[kind] = {"count": found.count, "bytes": found.bytes}
        if self.step_seconds is not None:
            days = self.step_seconds * self.steps / 86_400
            row |= {"step_seconds": self.step_seconds, "days": days}
            row["chip_hours"] = 24 * days * self.devices
            if price is not None:
                row["cost"] = row["chip_hours"] * price
        return row


def make_plan(job: Job, name: str, topology: Topology, mesh: Mesh) -> tuple[Plan, list[Program]]:
    """The estimate alone, and the programs to compile."""
    made = programs(job, mesh)
    parts = []
    for program in made:
        memory = estimate.memory(job, mesh, program)
        work = total(program.cost)
        roles = memory.arguments | memory.temporaries
        held = sum(memory.arguments.values())
        parts.append(
            Part(
                name=program.name,
                estimated=roles,
                peak_estimated=memory.peak,
                held=held,
                flops=work.flops,
                recomputed=work.recomputed,
                bytes=work.bytes,
                seconds=_seconds(program.cost, topology, mesh.size),
            )
        )
    plan = Plan(
        job=name,
        topology=topology.name,
        mesh=describe(mesh),
        micro_batches=job.config.micro_batches,
        ptx_micro_batches=job.config.ptx_parts if job.mixes else None,
        remat=job.model.remat,
        devices=mesh.size,
        memory=topology.memory,
        parts=parts,
        steps=job.steps,
    )
    return plan, made


def compile_part(part: Part, program: Program, topology: Topology) -> None:
    """Compiles `program` and writes what it needs into `part`."""
    start = time.perf_counter()
    try:
        compiled = program.lower().compile()
    except Exception as error:
        message = " ".join(str(error).split())
        if "RESOURCE_EXHAUSTED" not in message and "memory" not in message.lower():
            raise
        seconds = time.perf_counter() - start
        part.compiled = Compiled(seconds, error=message[:400])
        return
    seconds = time.perf_counter() - start
    analysis, text = compiled.memory_analysis(), compiled.as_text()
    arguments = analysis.argument_size_in_bytes
    temporaries = analysis.temp_size_in_bytes
    outputs = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    # For a CPU the compiler's peak leaves out what the program makes.
    here = topology.chip == "cpu"
    peak = arguments + outputs + temporaries if here else analysis.peak_memory_in_bytes
    # What this program does not read is on the device all the same.
    peak += max(part.held - arguments, 0.0)
    sent = collectives(text, unknown_trips=program.trips)
    part.compiled = Compiled(seconds, peak, arguments, temporaries, sent, largest_temporaries(text))
    if topology.link is not None and part.seconds is not None:
        part.seconds = max(part.seconds, sum(c.bytes for c in sent.values()) / topology.link)


def _seconds(pieces: tuple[Cost, ...], topology: Topology, devices: int) -> float | None:
    if topology.chip not in PEAKS:
        return None
    peaks = PEAKS[topology.chip]
    shares = [
        Cost((piece.flops + piece.recomputed) / devices, piece.bytes / devices) for piece in pieces
    ]
    return time_limit(shares, flops=peaks.bfloat16, bandwidth=peaks.bandwidth)


def remedies(plan: Plan, job: Job) -> list[str]:
    """What to change where it does not fit, the cheapest first, for all that is over the limit."""
    limit = math.inf if plan.memory is None else plan.memory
    over = {part.name for part in plan.parts if part.peak > limit}
    sizes = dict(axis.split(":") for axis in plan.mesh.split(","))
    found = []
    if job.model.remat == "none":
        found.append("--remat=products: compute all but the products again in the backward pass")
    if job.model.remat != "full":
        found.append("--remat=full: compute every layer again from its input")
    devices = int(sizes["data"]) * int(sizes["fsdp"])
    if job.mixes and "update" in over:
        text, split = job.rows * job.config.ptx_ratio, 2 * job.config.ptx_parts
        if text % (split * devices) == 0:
            found.append(f"--config.ppo.ptx_micro_batches={split}: half the text at a time")
    split = job.config.micro_batches * devices
    if job.rows % (2 * split) == 0 and over & {"update", "train step"}:
        field_name = "ppo" if job.stage == "ppo" else job.stage
        found.append(
            f"--config.{field_name}.micro_batches={2 * job.config.micro_batches}: "
            "half the rows at a time"
        )
    if int(sizes["data"]) > 1:
        found.append("--mesh with fsdp instead of data: parameters, moments and average sharded")
    if int(sizes["fsdp"]) > 1 and job.model.num_heads % (2 * int(sizes["tensor"])) == 0:
        half = int(sizes["fsdp"]) // 2
        mesh = f"data:{sizes['data']},fsdp:{half},tensor:{2 * int(sizes['tensor'])}"
        found.append(f"--mesh={mesh}: layers, cache and logits in smaller parts")
    found.append("a larger --topology: all that is sharded shrinks with the devices")
    return found


def render(plan: Plan, job: Job, *, price: float | None = None) -> str:
    """The plan for people."""
    head = f"{plan.job} on {plan.topology}, mesh {plan.mesh}, micro_batches {plan.micro_batches}"
    if plan.ptx_micro_batches is not None:
        head += f", of the text {plan.ptx_micro_batches}"
    lines = [f"{head}, remat {plan.remat}"]
    names = ("policy", "reward and value model") if job.scalar else ("model",)
    lines += [f"{name}: {said}" for name, said in zip(names, job.origins, strict=False)]
    lines.append("")
    for part in plan.parts:
        roles = ", ".join(
            f"{role} {size / GIB:.2f}" for role, size in part.estimated.items() if size > 1e6
        )
        lines.append(f"{part.name}: estimated {part.peak_estimated / GIB:.2f} GiB a device")
        lines.append(f"  {roles or 'under a megabyte in all parts'}")
        again = f" and {part.recomputed:.3g} recomputed" if part.recomputed else ""
        lines.append(f"  {part.flops:.3g} FLOPs{again}, {part.bytes / 1e12:.3g} TB, on all devices")
        if part.compiled is None:
            continue
        done = part.compiled
        if done.error:
            lines.append(f"  compiler ({done.seconds:.0f} s): {done.error}")
            continue
        gap = part.peak_estimated / done.peak - 1
        lines.append(
            f"  compiled ({done.seconds:.0f} s): peak {done.peak / GIB:.2f} GiB "
            f"(estimate {gap:+.0%}), arguments {done.arguments / GIB:.2f}, "
            f"temporaries {done.temporaries / GIB:.2f}"
        )
        for kind, sent in done.collectives.items():
            lines.append(f"  {kind}: {sent.count:.0f} times, {sent.bytes / GIB:.2f} GiB sent")
        if done.largest:
            size, name = done.largest[0]
            lines.append(f"  largest array made: {name}, {size / GIB:.2f} GiB")
    lines.extend(["", _verdict(plan, job), *_times(plan, price)])
    return "\n".join(lines)


def _verdict(plan: Plan, job: Job) -> str:
    by = "compiled" if all(part.compiled for part in plan.parts) else "by the estimate"
    if plan.memory is None:
        return f"verdict: peak {plan.peak / GIB:.2f} GiB a device ({by})"
    limit = f"{plan.memory / GIB:.2f} GiB of a chip"
    if plan.fits:
        return f"verdict: FITS, {plan.peak / GIB:.2f} of {limit} ({by})"
    worst = max(plan.parts, key=lambda part: part.peak)
    needs = "more than" if worst.peak == math.inf else f"{worst.peak / GIB:.2f} of"
    text = f"verdict: DOES NOT FIT, {worst.name} needs {needs} the {limit} ({by}); change one of:"
    return "\n".join([text, *(f"  {remedy}" for remedy in remedies(plan, job))])


def _times(plan: Plan, price: float | None) -> list[str]:
    row = plan.as_json(price)
    if plan.step_seconds is None:
        told = f"{plan.steps} steps; how fast this machine computes is not known here:"
        return [f"no time: {told} experiments/benchmark.py measures it"]
    text = (
        f"roofline: {plan.step_seconds:.2f} s a step, {plan.steps} steps, {row['days']:.2f} days, "
        f"{row['chip_hours']:.0f} chip-hours"
    )
    return [text + (f", {row['cost']:.0f} at {price:g} a chip-hour" if price is not None else "")]
