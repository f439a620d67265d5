"""Meshes, micro-batches and remat worth a compile, best first by the estimate."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import get_args

from jax.sharding import Mesh

from instruct_jax.errors import ConfigError
from instruct_jax.models.config import Remat
from instruct_jax.planning.jobs import Job
from instruct_jax.planning.report import Plan, make_plan
from instruct_jax.planning.topologies import Topology

# The estimate may be this far off: what is over the limit by less is still compiled.
SLACK = 1.1
MICRO_BATCHES = (1, 2, 4, 8, 16, 32, 64)
REMAT: tuple[Remat, ...] = get_args(Remat)


@dataclass(frozen=True)
class Candidate:
    """A choice, with its estimate."""

    spec: str
    job: Job
    plan: Plan

    @property
    def order(self) -> tuple[float, float]:
        """By time: fewer gathers of the weights and no recomputation come first; then by memory."""
        sizes = dict(part.split(":") for part in self.spec.split(","))
        config = self.job.config
        loops = [config.micro_batches, *([config.ptx_parts] if self.job.mixes else [])]
        gathers = fmean(loops) * (1 - 1 / int(sizes["fsdp"]))
        parts = self.plan.parts
        recomputed = 1 + sum(part.recomputed for part in parts) / sum(part.flops for part in parts)
        # Two sums over `tensor` in a layer, each way, on every token: not hidden by anything.
        exposed = 1 + 0.02 * (int(sizes["tensor"]) - 1)
        return recomputed * exposed + 0.005 * gathers, self.plan.peak


def mesh_specs(job: Job, devices: int) -> Iterator[str]:
    """Meshes of all the devices whose tensor part divides the heads and whose rows divide."""
    tensor = 1
    while tensor <= min(devices, 16):
        if devices % tensor == 0 and job.model.num_heads % tensor == 0:
            rest = devices // tensor
            if job.rows % rest == 0:
                yield f"data:1,fsdp:{rest},tensor:{tensor}"
                if rest % 2 == 0:
                    yield f"data:2,fsdp:{rest // 2},tensor:{tensor}"
        tensor *= 2


def _splits(job: Job, devices: int) -> Iterator[tuple[int, int | None]]:
    """Micro-batches, and those of the text in it: as many, or with no more rows in each."""
    for micro_batches in MICRO_BATCHES:
        if job.rows % (devices * micro_batches) == 0:
            yield micro_batches, None
            if job.mixes and job.config.ptx_ratio > 1:
                yield micro_batches, micro_batches * job.config.ptx_ratio


def candidates(
    job: Job, name: str, topology: Topology, mesh_of: Callable[[str], Mesh]
) -> tuple[list[Candidate], int]:
    """Those that the estimate lets through, best first, and how many there were in all.

    Where it lets none through, the smallest one alone.
    """
    found = []
    for spec in mesh_specs(job, topology.size):
        mesh = mesh_of(spec)
        rows = mesh.shape["data"] * mesh.shape["fsdp"]
        for remat in REMAT:
            for split in _splits(job, rows):
                choice = job.with_micro_batches(*split).with_remat(remat)
                try:
                    plan, _ = make_plan(choice, name, topology, mesh)
                except ConfigError:
                    continue
                found.append(Candidate(spec, choice, plan))
    if not found:
        raise ConfigError(
            f"no mesh of {topology.size} devices divides {job.rows} rows; another --topology"
        )
    limit = topology.memory or float("inf")
    likely = [c for c in found if c.plan.peak <= SLACK * limit]
    chosen = sorted(likely, key=lambda c: c.order)
    return chosen or [min(found, key=lambda c: c.plan.peak)], len(found)
