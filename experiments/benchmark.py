"""Measures how fast every phase runs, how far that is from the hardware's limit, and from a peer.

    python experiments/benchmark.py --config=configs/benchmark.py:mini --workdir=runs/benchmark
    python experiments/benchmark.py --config=configs/benchmark.py:sweep --workdir=runs/sweep
    python experiments/benchmark.py --config=configs/benchmark.py:ppo_trl --workdir=runs/ppo_trl \\
        --config.peer_python=/path/to/venv/bin/python
    python experiments/benchmark.py --config=configs/benchmark.py:startup --workdir=runs/startup

The phases are the stages' own programs at the shape of the preset (instruct_jax/benchmark/).
Seconds are medians of `repeats` runs, compilation apart. The roofline fraction is the time limit of
instruct_jax/models/costs.py, on real tokens, over the time measured; the limit's FLOP/s and bytes/s
are those of a large matrix product and a large copy in the same run. MFU and MBU are shares of the
vendor's peaks where the device is known, else of the measured ones.

With `--config.peer=trl` the same work is done by TRL and transformers in another process, turn by
turn with ours, and the ratio of the speeds is printed; with `tunix` by Tunix, which is in JAX. With
`--config.profile=true` a jax.profiler trace of one run of each phase is left in WORKDIR/profile.

`startup` times the stages' own scripts instead, to the end of their first step, with an empty
compilation cache and with a full one (instruct_jax/benchmark/startup.py).

Writes WORKDIR/benchmark.json, benchmark.md and roofline.png (and sweep.png).
"""

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
from jax.sharding import Mesh

from instruct_jax import cli
from instruct_jax.benchmark import peers, startup
from instruct_jax.benchmark.measure import (
    Machine,
    describe_machine,
    environment,
    measure,
    measure_machine,
    seconds_of,
)
from instruct_jax.benchmark.rows import Rows, real_rows, synthetic_rows
from instruct_jax.benchmark.shapes import Shape, random_models
from instruct_jax.benchmark.startup import StartupConfig
from instruct_jax.benchmark.tables import (
    peer_table,
    phase_table,
    startup_table,
    sweep_table,
    write_roofline,
    write_sweeps,
)
from instruct_jax.benchmark.workloads import BUILDERS, PHASES, check_phases
from instruct_jax.cli import replacing
from instruct_jax.data.config import DataConfig
from instruct_jax.data.tokenizer import Tokenizer, load_tokenizer
from instruct_jax.errors import ConfigError
from instruct_jax.files import read_object, write_json, write_text
from instruct_jax.settings import Settings, setting
from instruct_jax.stages.inputs import data_acts
from instruct_jax.training.mesh import make_mesh

STARTUP_SCRIPT = "benchmark_startup.py"
STARTUP, PEER, PROFILE = "startup", "peer", "profile"  # folders of the work directory
# Beside what every run writes; --overwrite replaces these.
WRITES = (
    "benchmark.json", "benchmark.md", "sweep.png", "roofline.png",
    *(f"{PROFILE}/*/plugins/profile/*/*.{end}" for end in ("xplane.pb", "trace.json.gz")),
    *(f"{STARTUP}/{name}" for name in startup.WRITES), *(f"{PEER}/{name}" for name in peers.WRITES),
)  # fmt: skip


@dataclass(frozen=True)
class Config(Settings):
    """`data` with a `tokenizer` gives real rows to the phases that have any; else random tokens.

    `sweep` is a list of (field of the shape, its values), each measured with the rest as it is.
    With `startup` the start of stages is measured, and no phase.
    """

    acts_if: ClassVar[Mapping[str, str]] = {
        **data_acts("documents", "demonstrations", "comparisons", "prompts"),
        **dict.fromkeys(("shape", "data", "phases", "peer"), "startup=None"),
    }

    shape: Shape = Shape()
    phases: tuple[str, ...] = setting(PHASES, "what is measured, in this order")
    repeats: int = setting(5, "measurements, of which the median counts", low=1)
    data: DataConfig | None = setting(None, "real rows; none draws random tokens")
    tokenizer: str | None = setting(None, "a tokenizer.json or folder, for real rows")
    sweep: tuple[tuple[str, tuple[int, ...]], ...] = setting(
        (), "fields of the shape, with values", needs="startup=None and peer=none"
    )
    startup: StartupConfig | None = setting(None, "the stages whose start is measured instead")
    profile: bool = setting(
        False,
        "whether a trace of each phase is left in WORKDIR/profile",
        needs="startup=None and peer=none",
    )
    peer: Literal["none", "trl", "tunix"] = setting("none", "what the same work is compared with")
    peer_python: str | None = setting(
        None, "interpreter that has the peer; none is this one", needs="peer"
    )

    def __post_init__(self) -> None:
        """ConfigError for an unknown phase, or half of what real rows need."""
        super().__post_init__()
        for phase in self.phases:
            if phase not in BUILDERS:
                raise ConfigError(f"phases: no phase {phase!r}; there are {', '.join(BUILDERS)}")
        if (self.data is None) != (self.tokenizer is None):
            raise ConfigError("tokenizer: real rows need both config.data and config.tokenizer")
        fields = {field.name for field in dataclasses.fields(Shape)}
        for field, _ in self.sweep:
            if field not in fields:
                raise ConfigError(f"sweep: the shape has no field {field!r}")
        if self.peer != "none":
            for phase in self.phases:
                peers.check_phase(phase, peers.LIBRARIES[self.peer])


def main(config: Config, run: cli.Run) -> Path:
    """Measures, prints the tables and returns the JSON file."""
    report: dict[str, Any] = {
        "config": dataclasses.asdict(config),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": read_object(run.workdir / "config.json").get("commit"),
    }
    if config.startup is not None:
        # Before anything here touches a device that the stages need.
        report["startup"] = run_startup(config, config.startup, run)
        report["environment"] = environment()
        table = startup_table(report["startup"])
    else:
        report["environment"] = environment()
        table = compare(config, run, report)
    out = run.workdir / "benchmark.json"
    write_json(out, report)
    write_text(run.workdir / "benchmark.md", table)
    print("\n" + table)
    return out


def compare(config: Config, run: cli.Run, report: dict[str, Any]) -> str:
    """Puts phases, a sweep or a peer's into `report`, with this machine's limits; their table."""
    check(config, make_mesh(run.mesh))
    machine = measure_machine((config.shape.dtype,))
    report["machine"] = describe_machine(machine)
    flops, bandwidth = machine.flops[config.shape.dtype], machine.bandwidth
    print(f"machine: {flops / 1e9:,.0f} GFLOP/s {config.shape.dtype}, {bandwidth / 1e9:,.1f} GB/s")
    if config.peer != "none":
        report["peers"] = compare_peers(config, run)
        return peer_table(report["peers"])
    if config.sweep:
        report["sweep"] = run_sweep(config, machine, run)
        write_sweeps(run.workdir / "sweep.png", report["sweep"])
        return sweep_table(report["sweep"])
    report["phases"] = run_phases(config, config.shape, machine, run)
    title = f"{report['environment']['device']}, {config.shape.dtype}"
    picture = run.workdir / "roofline.png"
    write_roofline(picture, report["phases"], flops=flops, bandwidth=bandwidth, title=title)
    return phase_table(report["phases"])


def check(config: Config, mesh: Mesh) -> None:
    """ConfigError where there are too few rows for a phase, or `mesh` does not divide them."""
    grown = [config.shape.grown(field, v) for field, values in config.sweep for v in values]
    for shape in grown or [config.shape]:
        rows, _ = load_rows(config, shape)
        packed = None
        if config.peer != "none" and "sft" in config.phases and shape.pack_length is not None:
            _, packed = peers.packed_alike(shape, rows)
        check_phases(config.phases, shape, rows, mesh, packed=packed)


def run_startup(config: Config, chosen: StartupConfig, run: cli.Run) -> list[dict[str, Any]]:
    """The first start and `repeats` second ones of every stage."""
    folder = empty_folder(run, STARTUP)  # a first start has nothing to read
    script, results = Path(__file__).with_name(STARTUP_SCRIPT), []
    startup.make_inputs(chosen, folder, script=script, mesh=run.mesh)
    for stage in chosen.stages:
        result = startup.measure_startup(
            stage, chosen, folder, script=script, mesh=run.mesh, repeats=config.repeats
        )
        print(
            f"{stage:13} {result.first.seconds:6.2f} s, then {result.second.seconds:6.2f} s"
            f"   ratio {result.ratio:.2f}",
            flush=True,
        )
        results.append(dataclasses.asdict(result))
    return results


def empty_folder(run: cli.Run, name: str) -> Path:
    """A folder of the work directory, in which nothing is left of what this run wrote before."""
    replacing.delete(run.workdir, WRITES, among=(name,))
    folder = run.workdir.absolute() / name
    folder.mkdir(exist_ok=True)
    return folder


def run_phases(
    config: Config, shape: Shape, machine: Machine, run: cli.Run
) -> list[dict[str, Any]]:
    """Every phase, one after another."""
    rows, _ = load_rows(config, shape)
    models, mesh, results = random_models(shape, eos_id=rows.eos_id), make_mesh(run.mesh), []
    with jax.set_mesh(mesh):
        for phase in config.phases:
            workload = BUILDERS[phase](shape, rows, models, mesh)
            result = measure(workload, machine, repeats=config.repeats)
            print(
                f"{phase:13} {result.seconds:9.4f} s {result.tokens_per_second:12,.0f} tokens/s"
                f"   roofline {result.roofline:.2f}",
                flush=True,
            )
            if config.profile:
                with jax.profiler.trace(str(run.workdir / PROFILE / phase)):
                    seconds_of(workload.run)
            results.append(dataclasses.asdict(result))
    return results


def run_sweep(config: Config, machine: Machine, run: cli.Run) -> list[dict[str, Any]]:
    """The phases at every value of every swept field."""
    points = []
    for field, values in config.sweep:
        for value in values:
            shape = config.shape.grown(field, value)
            for row in run_phases(config, shape, machine, run):
                points.append({"field": field, "value": value, **row})
    return points


def compare_peers(config: Config, run: cli.Run) -> list[dict[str, Any]]:
    """Every phase against the peer."""
    rows, tokenizer = load_rows(config, config.shape)
    models = random_models(config.shape, eos_id=rows.eos_id)
    mesh, results = make_mesh(run.mesh), []
    folder = empty_folder(run, PEER)
    library = peers.LIBRARIES[config.peer]
    peers.write_inputs(folder, library, config.shape, rows, models, tokenizer)
    with jax.set_mesh(mesh):
        for phase in config.phases:
            for comparison in peers.comparisons(
                phase,
                library,
                config.shape,
                rows,
                models,
                mesh,
                python=config.peer_python,
                folder=folder,
                repeats=config.repeats,
            ):
                print(
                    f"{phase} against {comparison.peer}: {comparison.ours:,.1f} and "
                    f"{comparison.theirs:,.1f} {comparison.unit}/s, ratio {comparison.ratio:.2f}",
                    flush=True,
                )
                results.append(dataclasses.asdict(comparison))
    return results


def load_rows(config: Config, shape: Shape) -> tuple[Rows, Tokenizer | None]:
    """Random rows, with real ones in the place of those that `config.data` has."""
    if config.data is None or config.tokenizer is None:
        return synthetic_rows(shape), None
    tokenizer = load_tokenizer(config.tokenizer)
    return real_rows(shape, config.data, tokenizer), tokenizer


if __name__ == "__main__":
    cli.run(main, Config, default="configs/benchmark.py", writes=WRITES)
