"""How long a stage takes to its first step, with an empty compilation cache and with a full one.

    first    nothing is compiled yet, and no text of the world tokenised
    second   the same command in another work directory: programs and tokens are read

Each is a process of its own that ends with its first step. Its seconds are from before Python to
the first line of its metrics, in five parts that add up to them: importing, data and models before
the training loop, tracing (Python to StableHLO), compiling (in the second: reading), and the step
itself. The stages' inputs are small and made by the stages' own scripts.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from instruct_jax.data.rows import Comparison, Prompt, write_rows
from instruct_jax.data.toyworld import ToyWorld
from instruct_jax.errors import ConfigError
from instruct_jax.settings import Settings, setting
from instruct_jax.training import ledger

# What jax keeps of programs that it has compiled.
_CACHE = ("cache/*-cache", "cache/*-atime", "cache/xla_gpu_*/*")

Stage = Literal["pretrain", "sft", "reward_model", "ppo", "preference"]
# What a stage is given of `make_inputs`, as overrides of its script.
_INIT = "--config.init={folder}/pretrain/model"
_COMPARISONS = "--config.data.comparisons=('{folder}/comparisons.jsonl',)"
_TOKENS = "--config.data.token_dir={folder}/{stage}/tokens"
STAGES: dict[Stage, tuple[str, ...]] = {
    "pretrain": (_TOKENS,),
    "sft": (_INIT,),
    "reward_model": (_INIT, _COMPARISONS),
    "ppo": (_INIT, _TOKENS, "--config.reward_model={folder}/reward_model/model"),
    "preference": (_INIT, _COMPARISONS),
}
INPUTS: tuple[Stage, ...] = ("pretrain", "reward_model")
# In the folder of all starts; a stage's own and those of its starts are work directories of runs.
WRITES = (
    "comparisons.jsonl", "comparisons.jsonl.sha256", *(f"{stage}.log" for stage in INPUTS), *_CACHE,
    *(f"{stage}/{name}" for stage in STAGES
      for name in ("", "start#/", "start#.log", "start#.events", *_CACHE)),
)  # fmt: skip
# The rankings of configs/collect.py:toyworld, whose answers here are the writers'.
RANKINGS, COMPLETIONS = 4_000, 4

_TRACING = ("jaxpr_trace_duration", "jaxpr_to_mlir_module_duration")
_COMPILING = ("backend_compile_duration",)
_LOOK = 0.02  # seconds between two looks at the metrics


@dataclass(frozen=True)
class StartupConfig(Settings):
    """Which stages start, each with the preset of this name in its own config."""

    stages: tuple[Stage, ...] = setting(get_args(Stage), "stages that are started")
    preset: str = setting("toyworld", "preset of each stage's own config")


@dataclass(frozen=True)
class Start:
    """One start: `seconds` to the end of the first step, and the parts of them."""

    seconds: float
    imports: float
    setup: float
    tracing: float
    compiling: float
    step: float
    programs: int


@dataclass(frozen=True)
class Startup:
    """Both starts of a stage; `second` is the one of median seconds, `ratio` second to first."""

    stage: str
    first: Start
    second: Start
    ratio: float
    second_seconds: tuple[float, ...]


def measure_startup(
    stage: Stage, config: StartupConfig, folder: Path, *, script: Path, mesh: str, repeats: int
) -> Startup:
    """The first start of `stage` and `repeats` later ones, with the inputs in `folder`."""
    place = folder / stage
    argv = start_flags(stage, config, folder, mesh=mesh)
    starts = [
        _start(stage, argv, place / f"start{i}", script=script, cache=place / "cache")
        for i in range(repeats + 1)
    ]
    first, later = starts[0], starts[1:]
    middle = statistics.median_low(start.seconds for start in later)
    second = next(start for start in later if start.seconds == middle)
    ratio = second.seconds / first.seconds
    return Startup(stage, first, second, ratio, tuple(start.seconds for start in later))


def make_inputs(config: StartupConfig, folder: Path, *, script: Path, mesh: str) -> None:
    """A language model and a reward model of one update each, and rankings, in `folder`."""
    world = ToyWorld()
    write_rows(folder / "comparisons.jsonl", _rankings(world, world.prompts(RANKINGS)))
    for stage in INPUTS:
        argv = [
            str(script.parent / f"{stage}.py"),
            *input_flags(stage, config, folder, mesh=mesh),
            f"--workdir={folder / stage}",
        ]
        log = folder / f"{stage}.log"
        with _process(argv, log, folder / "cache") as process:
            if process.wait():
                raise _failure(stage, log)


def start_flags(stage: Stage, config: StartupConfig, folder: Path, *, mesh: str) -> list[str]:
    """Of the script of a stage that is timed."""
    return [*_flags(stage, config, folder, mesh), f"--config.{stage}.log_every=1"]


def input_flags(stage: Stage, config: StartupConfig, folder: Path, *, mesh: str) -> list[str]:
    """Of the script of a stage that makes an input of another: one update."""
    one = (f"--config.{stage}.epochs=1e-6", f"--config.{stage}.warmup=0")
    return [*_flags(stage, config, folder, mesh), *one]


def _flags(stage: Stage, config: StartupConfig, folder: Path, mesh: str) -> list[str]:
    own = (override.format(folder=folder, stage=stage) for override in STAGES[stage])
    return [f"--config=configs/{stage}.py:{config.preset}", f"--mesh={mesh}", *own]


def _rankings(world: ToyWorld, prompts: Iterable[Prompt]) -> Iterator[Comparison]:
    """Up to four writers' answers, the first the best: they are read here, not learnt from."""
    for prompt in prompts:
        drawn = (world.demonstrate(prompt, draw=i).response for i in range(COMPLETIONS))
        answers = tuple(dict.fromkeys(drawn))  # equal ones cannot be ranked
        if len(answers) > 1:
            yield Comparison(prompt.text, answers, tuple(range(len(answers))), meta=prompt.meta)


def _start(stage: str, argv: Sequence[str], place: Path, *, script: Path, cache: Path) -> Start:
    """A process of `stage` in the work directory `place`, until its first step."""
    place.parent.mkdir(parents=True, exist_ok=True)
    events, log = place.with_suffix(".events"), place.with_suffix(".log")
    metrics = place / f"{stage}.jsonl"
    began = time.time()
    with _process([str(script), stage, str(events), *argv, f"--workdir={place}"], log, cache) as p:
        while not (rows := _whole_lines(metrics)):
            if p.poll() is not None and not _whole_lines(metrics):
                raise _failure(stage, log)
            time.sleep(_LOOK)
    loop = next(row["time"] for row in ledger.read(place) if row["name"] == stage)
    return account(began, loop, rows[0]["time"], _whole_lines(events))


def account(began: float, loop: float, ended: float, events: Iterable[dict[str, Any]]) -> Start:
    """The parts of a start that `began`, came to its `loop` and `ended` its first step then.

    `events` are the lines of the process: when it was `imported`, and each duration that jax
    reported, with the time at its end.
    """
    known = [event for event in events if event["time"] <= ended]
    imported = next(event["time"] for event in known if event["name"] == "imported")

    def spent(names: Sequence[str], after: float, until: float) -> list[float]:
        return [
            event["seconds"]
            for event in known
            if event["name"].rpartition("/")[2] in names and after < event["time"] <= until
        ]

    both = _TRACING + _COMPILING
    compiling = spent(_COMPILING, began, ended)
    return Start(
        seconds=ended - began,
        imports=imported - began,
        setup=loop - imported - sum(spent(both, imported, loop)),
        tracing=sum(spent(_TRACING, began, ended)),
        compiling=sum(compiling),
        step=ended - loop - sum(spent(both, loop, ended)),
        programs=len(compiling),
    )


@contextlib.contextmanager
def _process(argv: Sequence[str], log: Path, cache: Path) -> Iterator[subprocess.Popen[bytes]]:
    """`argv` in this interpreter, and gone afterwards."""
    settings = {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, *argv], stdout=out, stderr=out, env=os.environ | settings
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def _failure(stage: str, log: Path) -> ConfigError:
    words = log.read_text().strip().splitlines()[-1:] or ["no message"]
    return ConfigError(f"{stage} ended before its first step: {words[0]} (all of it in {log})")


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(True) if line.endswith("\n")]
