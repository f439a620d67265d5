"""Says whether a run fits a machine that is not here, how long it takes at best, and what it costs.

    python experiments/plan.py --config=configs/ppo.py:instructgpt_6b_ptx --topology=v5p:4x4x4 \\
        --mesh=fsdp:16,tensor:4 --config.ppo.micro_batches=8 --price=4.2
    python experiments/plan.py --config=configs/ppo.py:instructgpt_1p3b_ptx --topology=v5e:8x8 \\
        --search
    python experiments/plan.py --config=configs/sft.py:toyworld --topology=cpu:8
    python experiments/plan.py --config=configs/pretrain.py:instructgpt_1p3b --scaling=8,64,512

The file of --config says which stage it is: pretrain, sft, reward_model, preference, or ppo (grpo,
rloo). The sizes of the models are those of --policy and --reward, by the names of
models/families.py; else those of the folders that --config.init and --config.reward_model name on
the command line; else the preset's name says them (1p3b, 6b, 175b; InstructGPT's reward model is 6B
beside all of them); else the folders that the preset names. A plan says which it took, and from
where.

First comes an estimate by formula, in seconds. Then the stage's own programs are lowered and
compiled for the topology: a TPU slice (v4, v5e, v5p, v6e; extra `plan`), cards (h100:1x4x8 is
slices x hosts x cards; extra `gpu`) or this CPU as several devices (cpu:8). Memory, temporaries and
collectives are then the compiler's. The time is a roofline: no run is faster.

--estimate_only stops before the compiler. --search tries meshes, micro-batches and remat, and
compiles the best few. --scaling compiles for growing slices, with the batch as it is (strong) and
grown with the devices (weak). --json=FILE also writes the figures; --table=FILE makes the Markdown
tables of all plan-*.json beside it, and nothing else. On cards attention is cuDNN's unless
--attention=xla, which compiles without cuDNN too.
"""

import argparse
import inspect
import math
import shlex
import sys
import time
from pathlib import Path
from typing import Any, NoReturn, get_args

import ppo
import preference
import pretrain
import reward_model
import sft

from instruct_jax.cli import HOST_DEVICE_FLAGS, split_overrides
from instruct_jax.errors import ConfigError, RunError
from instruct_jax.files import read_object, user_path, write_json, write_text
from instruct_jax.models.config import Attention, Remat
from instruct_jax.planning.jobs import Job, Stage, job_of
from instruct_jax.planning.report import compile_part, make_plan, render
from instruct_jax.planning.scaling import scaling_rows
from instruct_jax.planning.search import candidates
from instruct_jax.planning.tables import plan_tables, scaling_table
from instruct_jax.planning.topologies import (
    Topology,
    abstract_mesh,
    compile_mesh,
    open_devices,
    parse_topology,
    prepare,
)

SCHEMAS: dict[Stage, type] = {
    "pretrain": pretrain.Config,
    "sft": sft.Config,
    "reward_model": reward_model.Config,
    "preference": preference.Config,
    "ppo": ppo.Config,
}


# What a way to plan does not read.
_ALONE = {
    "search": ("mesh", "scaling", "remat"),
    "scaling": ("mesh", "estimate_only", "price"),
}


class Parser(argparse.ArgumentParser):
    """Whose errors are ours."""

    def error(self, message: str) -> NoReturn:
        """One line, as every mistake on a command line."""
        raise ConfigError(message)


def parse(argv: list[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """The flags, and the overrides of --config as "a.b" -> text."""
    parser = Parser(
        description=inspect.getdoc(sys.modules[__name__]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    flag = parser.add_argument
    flag("--config", default="configs/ppo.py:instructgpt_1p3b_ptx", metavar="FILE:NAME")
    flag("--topology", default="cpu:8", help="such as v5p:4x4x4, h100:1x1x8, cpu:8 (the default)")
    flag("--mesh", help="such as fsdp:16,tensor:4 (default: all devices to fsdp)")
    flag("--policy", metavar="SIZE", help="size of the model that is trained, such as gpt3-6.7b")
    flag("--reward", metavar="SIZE", help="size of the reward and value model of PPO")
    flag(
        "--rows", type=_whole, help="examples in the data, for the run's length (default: 100,000)"
    )
    flag("--price", type=_price, help="of a chip-hour, in any currency")
    flag("--remat", choices=get_args(Remat), help="what to recompute (default: the model's)")
    flag("--attention", choices=get_args(Attention), help="default: by the chip")
    flag("--search", type=_whole, nargs="?", const=3, metavar="N", help="compile the best N (3)")
    flag("--estimate_only", action="store_true", help="do not compile")
    flag("--scaling", type=_counts, metavar="N,N,...", help="device counts of a scaling table")
    flag("--json", type=user_path, metavar="FILE", help="also write the figures")
    flag("--table", type=user_path, metavar="FILE", help="tables of the plan-*.json in its folder")
    rest, overrides = split_overrides(argv)
    flags = parser.parse_args(rest)
    for first, others in _ALONE.items():
        given = [name for name in others if getattr(flags, name) not in (None, False)]
        if given and getattr(flags, first) is not None:
            raise ConfigError(f"--{given[0]} has no effect with --{first}; leave one of them out")
    parts = next((name for name in overrides if name.endswith("micro_batches")), None)
    if parts is not None and flags.search is not None:
        raise ConfigError(f"--config.{parts} has no effect with --search, which tries several")
    return flags, overrides


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def _counts(text: str) -> list[int]:
    return [_whole(count) for count in text.split(",")]


def _price(text: str) -> float:
    try:
        price = float(text)
    except ValueError:
        price = -1.0
    if not 0.0 <= price < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number from 0, got {text!r}")
    return price


def main(argv: list[str]) -> None:
    """Prints the plan of a command line."""
    flags, overrides = parse(argv)
    if flags.table is not None:
        write_tables(flags.table)
        return
    if flags.scaling and flags.topology.startswith("cpu"):
        flags.topology = f"cpu:{max(flags.scaling)}"
    topology = parse_topology(flags.topology)
    prepare(topology, HOST_DEVICE_FLAGS)
    sizes = {"policy": flags.policy, "reward": flags.reward, "rows": flags.rows}
    job = job_of(flags.config, overrides, SCHEMAS, **sizes)
    if flags.remat is not None:
        job = job.with_remat(flags.remat)
    if flags.attention is not None:
        job = job.with_attention(flags.attention)
    if flags.scaling:
        results = {"scaling": scale(flags, job, topology)}
    elif flags.search:
        results = {"plans": search(flags, job, topology)}
    else:
        results = {"plans": [plan(flags, job, topology, flags.mesh or "auto")]}
    if flags.json is not None:
        words = [word for word in argv if not word.startswith("--json")]
        command = shlex.join(["python", "experiments/plan.py", *words])
        results = {"command": command, "models": job.origins, **results}
        write_json(flags.json, results)


def plan(flags: argparse.Namespace, job: Job, topology: Topology, spec: str) -> dict[str, Any]:
    """One mesh: the estimate, and the compiler's word where it can be had."""
    start = time.perf_counter()
    estimated, _ = make_plan(job, flags.config, topology, abstract_mesh(topology, spec))
    print(render(estimated, job, price=flags.price))
    print(f"estimated in {time.perf_counter() - start:.1f} s\n", flush=True)
    if flags.estimate_only:
        return estimated.as_json(flags.price)
    try:
        devices = open_devices(topology)
    except ConfigError as error:
        print(f"not compiled: {error}", file=sys.stderr)
        return estimated.as_json(flags.price)
    mesh = compile_mesh(topology, spec, devices)
    made, programs = make_plan(job, flags.config, topology, mesh)
    for part, program in zip(made.parts, programs, strict=True):
        print(f"compiling {part.name} ...", file=sys.stderr, flush=True)
        compile_part(part, program, topology)
    print(render(made, job, price=flags.price))
    return made.as_json(flags.price)


def search(flags: argparse.Namespace, job: Job, topology: Topology) -> list[dict[str, Any]]:
    """The best few candidates compiled, those that fit first, then the fastest."""
    chosen, count = candidates(
        job, flags.config, topology, lambda spec: abstract_mesh(topology, spec)
    )
    print(f"{count} candidates, {len(chosen)} may fit; compiling {min(flags.search, len(chosen))}")
    results = [plan(flags, c.job, topology, c.spec) for c in chosen[: flags.search]]
    results.sort(key=lambda r: (not r["fits"], r.get("step_seconds") or 0.0, r["peak"] or 0.0))
    print("\n" + plan_tables([{"command": "", "plans": results}]).partition("\n\n")[0])
    return results


def scale(flags: argparse.Namespace, job: Job, topology: Topology) -> list[dict[str, Any]]:
    """Collectives and bytes of a device, at growing numbers of devices."""
    results = scaling_rows(job, flags.config, topology, flags.scaling)
    print(scaling_table(results))
    return results


def write_tables(path: Path) -> None:
    """The tables of every plan-*.json in the folder of `path`."""
    found = [read_object(file) for file in sorted(path.parent.glob("plan-*.json"))]
    if not found:
        raise ConfigError(f"--table={path}: no plan-*.json in its folder; --json=FILE writes one")
    plans = [result for result in found if "plans" in result]
    text = "# Plans\n\n" + plan_tables(plans) + "\n"
    for result in found:
        if "scaling" in result:
            text += f"\n    {result['command']}\n\n{scaling_table(result['scaling'])}\n"
    write_text(path, text)
    print(f"{path}: {len(found)} files")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except RunError as error:
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        sys.exit(error.exit_code)
