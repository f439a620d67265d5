"""What a step needs on one device, by formula, without compiling anything.

What a program reads is exact: the shards of its arguments. What it makes on the way is a model of
what XLA was seen to keep, for rows b on a device, T tokens, widths D and F, heads N, vocabulary V,
tensor parts t, N_p parameters, k bytes a number:

    saved       L b T D k, the input of every layer, with full remat; that and the results of its
                products, but the last, with remat "products"; else all that a layer makes
    layer       b T (6 D + F / t) k streams; and where all scores are made at once 8 b N/t T^2, two
                float32 of them (on cards 4 + k), and k more backwards
    gradients   4 N_p a device, of every loss; once more where micro-batches are summed
    copies      k N_p a device, the matrices cast before the loop over the layers, which holds them
    tables      4 V D / t, the token table whole over fsdp: for the look-up, and for its gradient by
                the look-up, by the head, and by one chunk of positions of the head
    logits      of one chunk of positions in float32: they and their exponentials, their gradients
    weights     k N / t, what decoding gathers once, beside a cache of 2 L b T D k

Nothing orders the losses of whole minibatches, so the compiler runs one backwards while it has
begun the next: what is saved, and the tables, add up; of the layers one is at work. Loops over
micro-batches do follow each other, and the worst is the peak. experiments/results/plans.md has
these estimates beside the compiler's numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from instruct_jax.losses.chunked import default_chunk
from instruct_jax.models import costs
from instruct_jax.models.attention import implementation
from instruct_jax.models.sharding import platform
from instruct_jax.models.transformer import TransformerConfig
from instruct_jax.planning.abstract import Program, device_bytes
from instruct_jax.planning.jobs import Job

_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Memory:
    """Bytes on a device, by role; `arguments` are exact, the rest is the model above."""

    arguments: dict[str, float]
    temporaries: dict[str, float]

    @property
    def peak(self) -> float:
        """All of it."""
        return sum(self.arguments.values()) + sum(self.temporaries.values())


class Parts(NamedTuple):
    """Into how many the axes of a mesh cut rows, parameters, heads and positions."""

    rows: int
    fsdp: int
    tensor: int
    sequence: int


class Loss(NamedTuple):
    """One loss of an update: a model over rows of a device, in so many parts, and the bytes of its
    gradient there.
    """

    model: TransformerConfig
    kind: costs.Kind
    all_rows: float
    length: int
    gradient: float
    micro_batches: int

    @property
    def rows(self) -> float:
        """Rows at work at once."""
        return self.all_rows / self.micro_batches


def memory(job: Job, mesh: Mesh, program: Program) -> Memory:
    """The estimate for one program of `job`."""
    arguments = {role: float(device_bytes(tree)) for role, tree in program.arguments.items()}
    sizes = dict(mesh.shape)
    rows = sizes["data"] * sizes["fsdp"]
    parts = Parts(rows, sizes["fsdp"], sizes["tensor"], sizes["sequence"])
    # The models choose their attention by the platform of the mesh.
    with jax.sharding.use_abstract_mesh(getattr(mesh, "abstract_mesh", mesh)):
        if program.name == "rollout":
            return Memory(arguments, _decoding(job, parts))
        if program.name == "score":
            return Memory(arguments, _scoring(job, parts))
        return Memory(arguments, _updating(_losses(job, parts, program.arguments), parts))


def _streams(c: TransformerConfig, rows: float, length: int, parts: Parts) -> float:
    """The residual stream, its norms, and the feed-forward layer of one layer at work."""
    width = 6 * c.d_model + (2 if c.gated else 1) * c.ff_size / parts.tensor
    return rows * length / parts.sequence * width * _BYTES[c.dtype]


def _scores(c: TransformerConfig, rows: float, length: int, parts: Parts) -> float:
    """How many scores stand in memory at once: all of a layer, or none."""
    if implementation(c, length) != "xla":
        return 0.0
    return rows * c.num_heads / parts.tensor * length / parts.sequence * length


def _copies(c: TransformerConfig, parts: Parts) -> float:
    """The matrices of the layers in the compute dtype, where that is not the master's."""
    matrices = costs.matmul_parameters(c, kind="scalar")
    share = parts.fsdp * parts.tensor
    return 0.0 if c.dtype == "float32" else matrices * _BYTES[c.dtype] / share


def _table(c: TransformerConfig, parts: Parts) -> float:
    """The token table in float32, whole over fsdp."""
    return 4.0 * c.vocab_rows * c.d_model / parts.tensor


def _logits(c: TransformerConfig, positions: float, parts: Parts) -> float:
    """The logits of a chunk of positions in float32."""
    chunk = min(positions, default_chunk(c.d_model, c.vocab_rows))
    return 4 * chunk * c.vocab_rows / parts.tensor


def _losses(job: Job, parts: Parts, arguments: dict[str, Any]) -> list[Loss]:
    config = job.config
    rows, split = job.rows / parts.rows, config.micro_batches
    if job.stage != "ppo":
        kind: costs.Kind = "scalar" if job.stage == "reward_model" else "language"
        trained = float(device_bytes(arguments["parameters"]))
        return [Loss(job.model, kind, rows, job.length, trained, split)]
    policy = float(device_bytes(arguments["policy"]))
    losses = [Loss(job.model, "language", rows, job.length, policy, split)]
    if config.ptx_coef > 0:
        mixed = rows * config.ptx_ratio
        losses.append(Loss(job.model, "language", mixed, job.ptx_length, policy, config.ptx_parts))
    if arguments["value model"] is not None and job.scalar is not None:
        value = float(device_bytes(arguments["value model"]))
        losses.append(Loss(job.scalar, "scalar", rows, job.length, value, split))
    return losses


def _saved(loss: Loss, parts: Parts) -> float:
    """What the backward pass needs of the forward pass."""
    c, k = loss.model, _BYTES[loss.model.dtype]
    positions = loss.rows * loss.length / parts.sequence
    if c.remat == "full":
        return c.num_layers * positions * c.d_model * k
    if c.remat == "products":
        heads = (c.num_heads + 2 * c.kv_heads) * c.head_size
        split = heads + (2 if c.gated else 1) * c.ff_size
        return c.num_layers * positions * (2 * c.d_model + split / parts.tensor) * k
    # What `jax.vjp` of a layer keeps: four norms' float32, six more of width D; of width F the
    # pieces of a tanh or a gate, or of a ReLU its input, its sign and its output.
    wide = 2.25 if c.activation == "relu" else 6
    width = (16 + 6 * k) * c.d_model + wide * k * c.ff_size / parts.tensor
    scores = _scores(c, loss.rows, loss.length, parts)
    return c.num_layers * (positions * width + scores * (k if k == 4 else 4 + k))


def _work(loss: Loss, parts: Parts) -> float:
    """One layer backwards."""
    of = loss.model, loss.rows, loss.length, parts
    return _streams(*of) + (8 + _BYTES[loss.model.dtype]) * _scores(*of)


def _tables(loss: Loss, parts: Parts) -> float:
    """Gradients of the token table: by the look-up, and by the head and a chunk of it."""
    return (3 if loss.kind == "language" else 1) * _table(loss.model, parts)


def _head(loss: Loss, parts: Parts) -> float:
    """Logits, their exponentials, and their gradients."""
    if loss.kind == "scalar":
        return 0.0
    return 3 * _logits(loss.model, loss.rows * loss.length / parts.sequence, parts)


def _look_ups(models: Sequence[TransformerConfig], parts: Parts) -> float:
    """The tables gathered, once a model."""
    return sum(_table(c, parts) for c in set(models)) if parts.fsdp > 1 else 0.0


def _at_once(losses: list[Loss], parts: Parts) -> dict[str, float]:
    """Every loss on whole minibatches: they overlap."""
    models = [loss.model for loss in losses]
    tables = sum(_tables(loss, parts) for loss in losses) + _look_ups(models, parts)
    return {
        "gradients": sum(loss.gradient for loss in losses),
        "activations": sum(_saved(loss, parts) for loss in losses),
        "copies": sum(_copies(c, parts) for c in set(models)),
        "head or a layer": max(
            tables + max(_head(loss, parts) for loss in losses),
            *(_work(loss, parts) for loss in losses),
        ),
    }


def _updating(losses: list[Loss], parts: Parts) -> dict[str, float]:
    """The losses on whole minibatches, then for every other a loop over its micro-batches."""
    whole = [loss for loss in losses if loss.micro_batches == 1]
    worst = _at_once(whole, parts) if whole else {}
    kept = sum(loss.gradient for loss in whole)
    for loss in losses:
        if loss.micro_batches == 1:
            continue
        tables = _tables(loss, parts) + _look_ups([loss.model], parts)
        phase = {
            "gradients": kept + 2 * loss.gradient,
            "activations": _saved(loss, parts),
            "copies": _copies(loss.model, parts),
            "head or a layer": max(tables + _head(loss, parts), _work(loss, parts)),
        }
        kept += loss.gradient
        worst = max(worst, phase, key=lambda found: sum(found.values()))
    return worst


def _scoring(job: Job, parts: Parts) -> dict[str, float]:
    rows = job.config.rollout_batch / parts.rows
    models = [job.model] + ([job.scalar] if job.scalar else [])

    def layer(c: TransformerConfig) -> float:
        of = c, rows, job.length, parts
        # A TPU makes the softmax beside the scores; elsewhere it is fused, and casts.
        each = 8 if platform() == "tpu" else 4 + _BYTES[c.dtype]
        return _streams(*of) + each * _scores(*of)

    # The policy, where it is read, and the reference, at once.
    readings = 2 if job.config.old_log_probs == "forward" else 1
    head = 2 * readings * _logits(job.model, rows * job.config.response_length, parts)
    if parts.fsdp > 1:
        head += max(_table(c, parts) * (1 + _BYTES[c.dtype] / 4) for c in models)
    return {
        "copies": max(_copies(c, parts) for c in models),
        "head or a layer": max(head, *map(layer, models)),
    }


def _decoding(job: Job, parts: Parts) -> dict[str, float]:
    """The loop with its cache and weights, while the last layers of the prompts are read."""
    c, config = job.model, job.config
    rows, prompts = config.rollout_batch / parts.rows, config.prompts / parts.rows
    of_prompts = c, prompts, config.prompt_length, parts
    # Cached rows attend to all columns, by scores in memory.
    scores = prompts * c.num_heads / parts.tensor * config.prompt_length * job.length
    return {
        "cache": rows * job.length * costs.kv_bytes(c) / parts.tensor,
        "weights": costs.weight_bytes(c) / parts.tensor,
        "a layer": _streams(*of_prompts) + 4 * scores,
    }
