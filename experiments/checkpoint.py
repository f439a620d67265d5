"""Looks after the checkpoints of a run.

    python experiments/checkpoint.py list   runs/ppo_ptx
    python experiments/checkpoint.py verify runs/ppo_ptx
    python experiments/checkpoint.py export runs/ppo_ptx --to=runs/ppo_ptx_at_200 --step=200
    python experiments/checkpoint.py prune  runs/ppo_ptx --keep=1
    python experiments/checkpoint.py pin    runs/ppo_ptx --step=200

list ends with the account of the run in its ledger.log: goodput (time of the steps that stand /
time since the first start), restarts, steps done twice. verify reads steps, models, tokens, rows
and reports, and ends with exit code 4 where a byte is not as it was written or a file of a finished
run is gone. export takes the averaged policy of a PPO run, or with --part=value its
value model. prune never deletes the newest intact step or a pinned one. A run that is going on
reads the pins when it starts.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from instruct_jax.cli import hush
from instruct_jax.errors import CheckpointError, ConfigError, RunError
from instruct_jax.files import read_object, user_path
from instruct_jax.paths import expanded
from instruct_jax.training.keeping import damage_of, pin, prune, saved_steps
from instruct_jax.training.ledger import account


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command; a RunError becomes one line on stderr and its exit code."""
    flags = _parse(argv)
    hush()
    try:
        flags.command(flags, flags.workdir / "checkpoints")
    except RunError as error:
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        sys.exit(error.exit_code)


def list_steps(flags: argparse.Namespace, directory: Path) -> None:
    """Show which steps there are, and the account of the run: goodput, restarts, lost steps."""
    print(f"{'step':>8}  {'written':19}  {'size':>10}  state")
    for step in saved_steps(directory):
        written = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(step.written))
        state = ("finished" if step.finished else "no manifest") + ", pinned" * step.pinned
        state += f", the best ({step.best})" if step.best else ""
        print(f"{step.number:>8}  {written:19}  {_size(step.size):>10}  {state}")
    if (total := account(flags.workdir)) is not None:
        print(f"step {total.step}, {total.reason}: {total}")


def verify(flags: argparse.Namespace, directory: Path) -> None:
    """Read all that is in the run, every byte and array, and compare with what was written."""
    from instruct_jax.stages.verify import arrays_damage, verify_run  # which load jax

    if flags.step is None:
        found = verify_run(flags.workdir)
    else:
        steps = [step for step in saved_steps(directory) if step.number == flags.step]
        if not steps:
            raise CheckpointError(f"{directory}: no step {flags.step}")
        found = ((f"step {step.number}", arrays_damage(step.path)) for step in steps)
    damaged = []
    for name, reason in found:
        print(f"{name}: {reason or 'intact'}", flush=True)
        damaged += [name] if reason else []
    if damaged:
        raise CheckpointError(f"{flags.workdir}: damaged: {', '.join(damaged)}")


def export(flags: argparse.Namespace, directory: Path) -> None:
    """Write a model folder from a step."""
    # These load jax; list, pin and prune need not wait for it.
    from instruct_jax.stages.trained import load_trained, save_trained
    from instruct_jax.training.checkpoint import load_item

    if flags.to.exists():
        raise ConfigError(f"--to={flags.to} exists")
    numbers = [step.number for step in saved_steps(directory)]
    step = flags.step if flags.step is not None else max(numbers, default=None)
    if step not in numbers:
        raise CheckpointError(f"{directory}: no step {step}; there are {numbers}")
    if (reason := damage_of(directory / str(step))) is not None:
        raise CheckpointError(f"{directory}: step {step}: {reason}")
    state = load_item(directory / str(step), "state")
    params = _parameters(state, flags.part, directory)
    if "embedder" not in params:
        raise ConfigError(
            f"{directory}: step {step} holds an adapter, not a model; its run leaves one in "
            f"{flags.workdir / 'adapter'}, and the merged model in {flags.workdir / 'model'}"
        )
    like = load_trained(flags.like or _like(flags.workdir))
    kind = "scalar" if "head" in params else "language"
    model = like._replace(kind=kind, params=params, stage=f"{like.stage} at step {step}")
    save_trained(flags.to, model, notes={"exported_from": str(directory / str(step))})
    print(flags.to)


def prune_steps(flags: argparse.Namespace, directory: Path) -> None:
    """Delete old steps, but pinned ones and the best."""
    if flags.keep < 1:
        raise ConfigError(f"--keep={flags.keep}: expected 1 or more")
    deleted = prune(directory, keep=flags.keep)
    print(f"deleted: {', '.join(map(str, deleted)) or 'none'}")


def pin_step(flags: argparse.Namespace, directory: Path) -> None:
    """Keep a step for good; --off lets go of it."""
    pins = pin(directory, [flags.step], pinned=not flags.off)
    print(f"pinned: {', '.join(map(str, sorted(pins))) or 'none'}")


def _parameters(state: dict[str, Any], part: str, directory: Path) -> Any:
    if "policy" not in state:
        return state["params"]
    if state.get(part) is None:
        raise CheckpointError(f"{directory}: this run has no {part} model")
    trained = state[part]
    return trained["ema"] if trained.get("ema") else trained["params"]


def _like(workdir: Path) -> Path:
    """A model folder with the tokenizer and the sizes: the run's own, or the one it began with."""
    if (workdir / "model" / "model.json").is_file():
        return workdir / "model"
    record = workdir / "config.json"
    init = read_object(record, "config")["config"].get("init") if record.is_file() else None
    if not isinstance(init, str):
        raise ConfigError(f"{workdir} has no model yet and began with none; name one with --like")
    return Path(expanded(init, workdir))


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Any) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=function.__doc__, description=function.__doc__)
        sub.add_argument("workdir", type=user_path, help="the run's directory")
        sub.set_defaults(command=function)
        return sub

    command("list", list_steps)
    command("verify", verify).add_argument("--step", type=int, help="this one only")
    sub = command("export", export)
    sub.add_argument("--to", type=user_path, required=True, help="the model folder to write")
    sub.add_argument("--step", type=int, help="default: the newest")
    sub.add_argument("--part", choices=("policy", "value"), default="policy", help="of a PPO run")
    sub.add_argument("--like", type=user_path, help="a model folder of its sizes and tokenizer")
    command("prune", prune_steps).add_argument("--keep", type=int, default=1)
    sub = command("pin", pin_step)
    sub.add_argument("--step", type=int, required=True)
    sub.add_argument("--off", action="store_true", help="let go of it")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
