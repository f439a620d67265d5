"""How what a device sends and holds grows with the number of devices, from compiled programs.

Under fsdp over n devices a device sends, in a step, its part of every gather of the weights and of
every reduction of the gradients: S (n - 1) / n of a whole of S bytes each, which stops growing;
what it holds falls as 1 / n. Strong scaling keeps the batch, weak scaling the rows of a device.
"""

import dataclasses
from typing import Any

from instruct_jax.planning.hlo import Collective
from instruct_jax.planning.jobs import Job
from instruct_jax.planning.report import compile_part, make_plan
from instruct_jax.planning.topologies import (
    CARDS,
    Topology,
    compile_mesh,
    open_devices,
    parse_topology,
)

# Slices of so many chips.
SLICES = {
    "v5e": {4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"},
    "v5p": {8: "2x2x2", 16: "2x2x4", 32: "2x4x4", 64: "4x4x4", 128: "4x4x8", 256: "4x8x8",
            512: "8x8x8", 1024: "8x8x16"},
}  # fmt: skip
SLICES["v6e"] = SLICES["v5e"]


def sized(topology: Topology, devices: int) -> Topology:
    """The same chip with so many devices."""
    if topology.chip == "cpu":
        return parse_topology(f"cpu:{devices}")
    if topology.chip in CARDS:
        return parse_topology(f"{topology.chip}:1x{max(devices // 8, 1)}x{min(devices, 8)}")
    return parse_topology(f"{topology.chip}:{SLICES[topology.chip][devices]}")


def scaling_rows(
    job: Job, name: str, topology: Topology, counts: list[int]
) -> list[dict[str, Any]]:
    """One row a kind of scaling and number of devices, all of them on fsdp."""
    found = []
    smallest = min(counts)
    for kind in ("strong", "weak"):
        for devices in counts:
            grown = job if kind == "strong" else _with_rows(job, job.rows * devices // smallest)
            target = sized(topology, devices)
            mesh = compile_mesh(target, "auto", open_devices(target))
            plan, made = make_plan(grown, name, target, mesh)
            for part, program in zip(plan.parts, made, strict=True):
                compile_part(part, program, target)
            sent = [part.compiled.collectives for part in plan.parts if part.compiled]
            found.append(
                {
                    "kind": kind,
                    "devices": devices,
                    "mesh": plan.mesh,
                    "rows": grown.rows,
                    "held": max(part.held for part in plan.parts),
                    "peak": plan.peak,
                    "count": sum(c.count for of in sent for c in of.values()),
                    "sent": sum(c.bytes for of in sent for c in of.values()),
                    "gathered": _bytes(sent, "all-gather"),
                    "reduced": _bytes(sent, "all-reduce") + _bytes(sent, "reduce-scatter"),
                }
            )
    return found


def _bytes(sent: list[dict[str, Collective]], kind: str) -> float:
    return sum(of[kind].bytes for of in sent if kind in of)


def _with_rows(job: Job, rows: int) -> Job:
    config = job.config
    if job.stage == "ppo":
        factor = rows // config.minibatch
        sizes = {"minibatch": rows, "rollout_batch": config.rollout_batch * factor}
        return dataclasses.replace(job, config=dataclasses.replace(config, **sizes))
    return dataclasses.replace(job, config=dataclasses.replace(config, batch_size=rows))
