"""The same work through another library, in a process of its own, turn by turn with ours.

    ours, peer, ours, peer, ...     each waits while the other runs, on the same cores

Both start from one set of weights (ours, exported as a Hugging Face folder) and read the same token
rows. The peer answers one JSON line a turn: its seconds, and the tokens and sequences of useful
work in them. What a turn is:

    rollout         `rows` responses of exactly `response` tokens      transformers' generate
    sft             one update, padded rows and packed ones            TRL's SFTTrainer
    reward_model    one update on `ranked` pairs                       TRL's RewardTrainer
    iteration       one PPO iteration                                  TRL's experimental PPOTrainer
                                                                       or Tunix's PPOLearner

Speeds are of useful work: drawn tokens, real tokens of the rows, pairs, episodes.
"""

import io
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from instruct_jax.benchmark.measure import seconds_of
from instruct_jax.benchmark.reinforcement import iteration
from instruct_jax.benchmark.rows import Rows
from instruct_jax.benchmark.shapes import Models, Shape
from instruct_jax.benchmark.workloads import Training
from instruct_jax.data.loader import Batches
from instruct_jax.data.packing import pack
from instruct_jax.data.tokenizer import Tokenizer
from instruct_jax.data.trees import TreeBatches
from instruct_jax.errors import ConfigError
from instruct_jax.files import json_text, write_bytes, write_text
from instruct_jax.models.hf import exported_files, save_pretrained
from instruct_jax.models.transformer import language_model, scalar_model
from instruct_jax.sampling.sampler import generate
from instruct_jax.stages.pretrain import language_loss
from instruct_jax.stages.reward_model import RewardModelConfig, reward_loss
from instruct_jax.stages.sft import SFTConfig
from instruct_jax.training.mesh import BATCH_AXES, axes_size


class Library(NamedTuple):
    """A peer: the script of its side, the model family that it reads, and the phases it has."""

    script: str
    family: str
    phases: tuple[str, ...]


LIBRARIES = {
    "trl": Library("benchmark_peers.py", "gpt2", ("rollout", "sft", "reward_model", "iteration")),
    "tunix": Library("benchmark_tunix.py", "qwen2", ("iteration",)),
}

# In the folder that both sides read.
WRITES = ("spec.json", "rows.npz", "peer.log", *exported_files("model"))


class Turn(NamedTuple):
    """One turn of either side: `work` is what its speed is counted in."""

    seconds: float
    work: float


@dataclass(frozen=True)
class Comparison:
    """Speeds are medians over turns, of `unit` a second; `ratio` is ours over the peer's."""

    phase: str
    peer: str
    unit: str
    ours: float
    theirs: float
    ratio: float
    ours_seconds: tuple[float, ...]
    theirs_seconds: tuple[float, ...]
    versions: dict[str, str]


class Case(NamedTuple):
    """One comparison: our turn, and what the peer is told."""

    phase: str
    variant: str
    unit: str
    ours: Callable[[], Turn]
    spec: dict[str, Any]


class Peer:
    """The other side of the pipe."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process, self._log = process, log

    def answer(self) -> dict[str, Any]:
        """Its next line. Raises ConfigError, with its last words, where it has ended."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            words = self._log.read_text().strip().splitlines()[-1:] or ["no message"]
            raise ConfigError(f"the peer process ended: {words[0]} (all of it in {self._log})")
        message = json.loads(line)
        if "error" in message:
            raise ConfigError(f"config.peer_python: {message['error']}")
        return message

    def turn(self) -> Turn:
        """One turn of its work."""
        assert self._process.stdin is not None
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        message = self.answer()
        return Turn(message["seconds"], message["work"])


@contextmanager
def open_peer(python: str, script: Path, folder: Path) -> Iterator[Peer]:
    """A process of `python` that works on `folder`, and is gone afterwards."""
    log = folder / "peer.log"
    threads = str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    settings = {"OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "XLA_FLAGS")}
    try:
        with log.open("w") as errors:
            process = subprocess.Popen(
                [python, str(script), str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=kept | settings,
            )
    except OSError as error:
        raise ConfigError(f"config.peer_python={python}: {error.strerror}") from error
    try:
        yield Peer(process, log)
    finally:
        process.kill()
        process.communicate()


def comparisons(
    phase: str,
    library: Library,
    shape: Shape,
    rows: Rows,
    models: Models,
    mesh: Mesh,
    *,
    python: str | None,
    folder: Path,
    repeats: int,
) -> Iterator[Comparison]:
    """Those of a phase, on what `write_inputs` wrote; `python` is None for this interpreter."""
    script = Path(__file__).resolve().parents[2] / "experiments" / library.script
    for case in cases(phase, library, shape, rows, models, mesh):
        yield compare(
            case, python=python or sys.executable, script=script, folder=folder, repeats=repeats
        )


def compare(case: Case, *, python: str, script: Path, folder: Path, repeats: int) -> Comparison:
    """`repeats` turns of each side in alternation, after one that does not count."""
    write_text(folder / "spec.json", json_text(case.spec))
    ours, theirs = [], []
    with open_peer(python, script, folder) as peer:
        about = peer.answer()
        for _ in range(repeats + 1):
            ours.append(case.ours())
            theirs.append(peer.turn())
    speeds = [statistics.median(t.work / t.seconds for t in side[1:]) for side in (ours, theirs)]
    return Comparison(
        phase=case.phase,
        peer=f"{about['peer']}{case.variant}",
        unit=case.unit,
        ours=speeds[0],
        theirs=speeds[1],
        ratio=speeds[0] / speeds[1],
        ours_seconds=tuple(t.seconds for t in ours[1:]),
        theirs_seconds=tuple(t.seconds for t in theirs[1:]),
        versions=about["versions"],
    )


def write_inputs(
    folder: Path,
    library: Library,
    shape: Shape,
    rows: Rows,
    models: Models,
    tokenizer: Tokenizer | None,
) -> None:
    """The weights as a Hugging Face folder, and the rows as an archive of arrays.

    Raises UserError for a model that is not of the library's family.
    """
    folder.mkdir(parents=True, exist_ok=True)
    save_pretrained(
        folder / "model",
        shape.policy_config(),
        models.policy,
        tokenizer=tokenizer,
        family=library.family,
    )
    ranked, where = rows.comparisons, rows.comparisons["where"]
    arrays = io.BytesIO()
    np.savez(
        arrays,
        prompts=rows.prompts["tokens"],
        prompt_mask=rows.prompts["mask"],
        tokens=rows.demonstrations["tokens"],
        mask=rows.demonstrations["mask"],
        loss_mask=rows.demonstrations["loss_mask"],
        ranked=ranked["tokens"],
        ranked_mask=ranked["mask"] & where[..., None],
        ranks=ranked["ranks"],
    )
    write_bytes(folder / "rows.npz", arrays.getvalue())


def check_phase(phase: str, library: Library) -> None:
    """ConfigError for a phase that the peer has not."""
    if phase not in library.phases:
        raise ConfigError(
            f"phases: the peer has no {phase!r}; there are {', '.join(library.phases)}"
        )


def cases(
    phase: str, library: Library, shape: Shape, rows: Rows, models: Models, mesh: Mesh
) -> list[Case]:
    """The comparisons of a phase. Raises ConfigError for a phase that the peer has not."""
    check_phase(phase, library)
    makers = {"rollout": _rollout, "sft": _sft, "reward_model": _reward, "iteration": _iteration}
    spec = {
        "phase": phase,
        "pad_id": shape.policy_config().pad_id,
        "eos_id": rows.eos_id,
        "prompt": shape.prompt,
        "response": shape.response,
        "rows": shape.rows,
        "ranked": shape.ranked,
        "minibatches": shape.rows // shape.minibatch,
        "epochs": shape.inner_epochs,
        "pack_length": shape.pack_length,
        "ends": shape.mean_response is not None,
        "packed": False,
        "seed": shape.seed,
    }
    return makers[phase](spec, shape, rows, models, mesh)


def _rollout(
    spec: dict[str, Any], shape: Shape, rows: Rows, models: Models, mesh: Mesh
) -> list[Case]:
    del mesh  # `generate` follows the ambient one
    model = language_model(shape.policy_config())
    first = (rows.prompts[name][: shape.rows] for name in ("tokens", "mask"))
    prompts, mask = map(jax.numpy.asarray, first)
    steps = 0

    def ours() -> Turn:
        nonlocal steps
        keys = jax.random.split(jax.random.fold_in(jax.random.key(shape.seed), steps), shape.rows)
        steps += 1
        seconds, _ = seconds_of(
            lambda: generate(
                model,
                models.policy,
                prompts,
                mask,
                keys,
                max_new_tokens=shape.response,
                min_new_tokens=shape.response,
                eos_id=rows.eos_id,
            )
        )
        return Turn(seconds, shape.rows * shape.response)

    return [Case("rollout", "", "tokens", ours, spec)]


def packed_alike(shape: Shape, rows: Rows) -> tuple[dict[str, np.ndarray], int]:
    """All demonstrations in packed rows, and how many of these hold about `rows` of them."""
    assert shape.pack_length is not None
    pad_id = shape.policy_config().pad_id
    packed = pack(rows.demonstrations, length=shape.pack_length, pad_id=pad_id)
    of, count = len(rows.demonstrations["tokens"]), len(packed["tokens"])
    return packed, min(max(1, round(count * shape.rows / of)), count)


def _sft(spec: dict[str, Any], shape: Shape, rows: Rows, models: Models, mesh: Mesh) -> list[Case]:
    """As many demonstrations an update on either side, against padded rows and against packed."""
    config = shape.policy_config()
    if shape.pack_length is None:
        raise ConfigError("config.shape.pack_length: packed rows are what is compared")
    packed, alike = packed_alike(shape, rows)
    loss = language_loss(language_model(config))

    def case(variant: str, count: int, **more: Any) -> Case:
        batches = Batches(packed, count, seed=shape.seed)
        step = Training(SFTConfig(), loss, models.policy, batches(0), mesh=mesh)
        ours = _updates(step, batches, lambda batch: batch["mask"].sum())
        return Case("sft", variant, "tokens", ours, spec | more)

    return [case(", padded", alike), case(", packed", alike, packed=True, rows=alike)]


def _reward(
    spec: dict[str, Any], shape: Shape, rows: Rows, models: Models, mesh: Mesh
) -> list[Case]:
    config = shape.scalar_config()
    batches = TreeBatches(
        rows.comparisons,
        shape.ranked,
        pad_id=config.pad_id,
        seed=shape.seed,
        devices=axes_size(mesh, BATCH_AXES),
    )
    loss = reward_loss(scalar_model(config))
    step = Training(RewardModelConfig(), loss, models.reward, batches(0), mesh=mesh)
    ours = _updates(step, batches, lambda batch: len(batch["ranks"]))
    return [Case("reward_model", "", "pairs", ours, spec)]


def _iteration(
    spec: dict[str, Any], shape: Shape, rows: Rows, models: Models, mesh: Mesh
) -> list[Case]:
    workload = iteration(shape, rows, models, mesh)

    def ours() -> Turn:
        seconds, _ = seconds_of(workload.run)
        return Turn(seconds, shape.rows)

    return [Case("iteration", "", "episodes", ours, spec)]


def _updates(
    step: Training, batches: Batches | TreeBatches, work: Callable[[dict[str, np.ndarray]], Any]
) -> Callable[[], Turn]:
    steps = 0

    def ours() -> Turn:
        nonlocal steps

        def run() -> Any:
            batch = batches(steps % batches.steps_per_epoch)
            return step(batch), np.int64(work(batch))

        seconds, (_, amount) = seconds_of(run)
        steps += 1
        return Turn(seconds, float(amount))

    return ours
