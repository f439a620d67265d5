"""What a step needs on one device, by formula, without compiling anything.

What a program reads is exact: the shards of its arguments. What it makes on the way is a model of
XLA's, for rows b on a device, T tokens, widths D and F, heads N, vocabulary V, tensor parts t:

    saved       L b T D k, one activation a layer with remat; without it all that a layer makes
    layer       b N/t T T (4 + k) + b T (4 D + 2 F/t) k, one layer's own: scores in fp32, streams
    weights     2 D (4 D + 2 F) k / t, the matrices of this layer and the next, whole over fsdp
    gradients   4 N_p / shards, once more for accumulation and once for each gradient kept
    head        3 chunk V 4, and the token table whole over fsdp: V D (4 + k) / t

tests/planning/test_plan.py holds the arguments to the compiler's. The rest is rough: for the one
program compiled for a TPU so far it is a fifth too low (experiments/LOG.md, section 8).
"""

from dataclasses import dataclass

from jax.sharding import Mesh

from instruct_jax.losses.chunked import CHUNK_LOGITS
from instruct_jax.models.transformer import TransformerConfig
from instruct_jax.planning import costs
from instruct_jax.planning.abstract import Program, device_bytes
from instruct_jax.planning.jobs import Job

_BYTES = {"float32": 4, "bfloat16": 2}
BATCH = ("data", "fsdp")


@dataclass(frozen=True)
class Memory:
    """Bytes on a device, by role; `arguments` are exact, the rest is the model above."""

    arguments: dict[str, float]
    temporaries: dict[str, float]

    @property
    def peak(self) -> float:
        """All of it."""
        return sum(self.arguments.values()) + sum(self.temporaries.values())


def memory(job: Job, mesh: Mesh, program: Program) -> Memory:
    """The estimate for one program of `job`."""
    arguments = {role: float(device_bytes(tree)) for role, tree in program.arguments.items()}
    shape = dict(mesh.shape)
    if program.name == "rollout":
        return Memory(arguments, _decoding(job, shape, program))
    if program.name == "score":
        return Memory(arguments, _scoring(job, shape))
    return Memory(arguments, _training(job, shape, program))


def _parts(shape: dict[str, int], *names: str) -> int:
    total = 1
    for name in names:
        total *= shape.get(name, 1)
    return total


def _forward(c: TransformerConfig, rows: float, length: int, shape: dict[str, int]) -> float:
    """One layer at work."""
    k, tensor = _BYTES[c.dtype], _parts(shape, "tensor")
    own = length / _parts(shape, "sequence")
    scores = rows * c.num_heads / tensor * own * length * (4 + k)
    streams = rows * own * (4 * c.d_model + (3 if c.gated else 2) * c.ff_size / tensor) * k
    return scores + streams


def _gathered(c: TransformerConfig, shape: dict[str, int]) -> float:
    """The matrices of this layer and the next, whole over fsdp, where there is any."""
    if _parts(shape, "fsdp") == 1:
        return 0.0
    layer = costs.matmul_parameters(c, kind="scalar") / c.num_layers
    return 2 * layer * _BYTES[c.dtype] / _parts(shape, "tensor")


def _head(c: TransformerConfig, shape: dict[str, int]) -> float:
    tensor = _parts(shape, "tensor")
    table = c.vocab_rows * c.d_model * (4 + _BYTES[c.dtype]) / tensor
    return 3 * 4 * max(CHUNK_LOGITS, 64 * c.vocab_rows) / tensor + table


def _activations(c: TransformerConfig, rows: float, length: int, shape: dict[str, int]) -> float:
    """What the backward pass of one micro-batch needs of the forward pass."""
    own = length / _parts(shape, "sequence")
    saved = c.num_layers * rows * own * c.d_model * _BYTES[c.dtype]
    layer = _forward(c, rows, length, shape)
    # The gradient of a layer holds its scores and streams once more.
    return saved + 2 * layer if c.remat else c.num_layers * layer + 2 * layer


def _training(job: Job, shape: dict[str, int], program: Program) -> dict[str, float]:
    config = job.config
    rows = job.rows / config.micro_batches / _parts(shape, *BATCH)
    if job.stage != "ppo":
        trained = float(device_bytes(program.arguments["parameters"]))
        copies = 2 if config.micro_batches > 1 else 1
        return {
            "gradients": copies * trained,
            "activations": _activations(job.model, rows, job.length, shape),
            "gathered weights": _gathered(job.model, shape),
            "loss": _head(job.model, shape) if job.stage != "reward_model" else 0.0,
        }
    policy = float(device_bytes(program.arguments["policy"]))
    value = program.arguments["value model"]
    accumulated = 2 if config.micro_batches > 1 else 1
    kept = policy if config.ptx_coef > 0 else 0.0
    phases = [
        (
            kept + accumulated * policy,
            _activations(job.model, rows, job.length, shape),
            _gathered(job.model, shape),
            _head(job.model, shape),
        )
    ]
    if config.ptx_coef > 0:
        mixed = rows * config.ptx_ratio
        activations = _activations(job.model, mixed, job.ptx_length, shape)
        phases.append((kept + accumulated * policy, activations, *phases[0][2:]))
    if value is not None and job.scalar is not None:
        activations = _activations(job.scalar, rows, job.length, shape)
        gradients = accumulated * float(device_bytes(value))
        phases.append((gradients, activations, _gathered(job.scalar, shape), 0.0))
    worst = max(phases, key=sum)
    return dict(zip(("gradients", "activations", "gathered weights", "loss"), worst, strict=True))


def _scoring(job: Job, shape: dict[str, int]) -> dict[str, float]:
    rows = job.config.rollout_batch / _parts(shape, *BATCH)
    models = [job.model] + ([job.scalar] if job.scalar else [])
    worst = max(models, key=lambda c: _forward(c, rows, job.length, shape))
    return {
        "activations": _forward(worst, rows, job.length, shape),
        "gathered weights": max(_gathered(c, shape) for c in models),
        "loss": _head(job.model, shape),
    }


def _decoding(job: Job, shape: dict[str, int], program: Program) -> dict[str, float]:
    c, config = job.model, job.config
    rows = config.rollout_batch / _parts(shape, *BATCH)
    tensor = _parts(shape, "tensor")
    cache = rows * job.length * costs.kv_bytes(c) / tensor
    # The loop is given the weights whole over fsdp, once, in the compute dtype.
    weights = costs.weight_bytes(c) / tensor
    prompts = config.prompts / _parts(shape, *BATCH)
    return {
        "cache": cache,
        "gathered weights": weights,
        "activations": _forward(c, prompts, config.prompt_length, shape),
    }
