"""What a run of a stage is, without running it: its program, its rows, its start and its intervals.

A field of a configuration acts where another value makes another run of it. `values` makes the
other values from what is said beside the field, and `plan` says what a run would be: the stage's
own `train`, with the loop taken out.
"""

import dataclasses
import functools
import hashlib
import json
import re
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import pytest

from instruct_jax.data.loader import Batches
from instruct_jax.models.adapters import LoraConfig
from instruct_jax.models.transformer import language_model, scalar_from_language, scalar_model
from instruct_jax.settings import Settings, about
from instruct_jax.stages import distill, ppo, preference, pretrain, reward_model, sft, stage
from instruct_jax.stages.distill import DistillConfig
from instruct_jax.stages.optimizers import AdamConfig
from instruct_jax.stages.ppo_config import PPOConfig
from instruct_jax.stages.preference import PreferenceConfig
from instruct_jax.stages.pretrain import PretrainConfig
from instruct_jax.stages.reward_model import RewardModelConfig
from instruct_jax.stages.sft import SFTConfig
from instruct_jax.training.mesh import make_mesh
from tests.stages import lab, run_stage

MESH = make_mesh("data:1")
# Values that a few small updates feel; what is said beside a field cannot tell them.
FELT: dict[str, Any] = {
    "lora.targets": ("query/kernel",),
    "adam.eps": 0.1,
    "adam.weight_decay": 10.0,
    "adam.clip": 1e-9,  # only beside eps does a scale of all gradients count
    # A cut of all gradients alike is felt where the next is not cut by as much.
    "best_metric": "looked",
    "adafactor.clip": 0.01,
    "lion.clip": 0.01,
    "adafactor.weight_decay": 10.0,
    "lion.weight_decay": 10.0,
    "adafactor.min_factored": 16,
    "adafactor.clip_rms": 0.1,
    "dual_clip": 1.001,
    "clip_high": 0.01,
    "clip": 0.01,
    "value_clip": 0.01,
    "cispo_low": 1.5,
    "cispo_high": 0.5,
    "mismatch_low": 1.5,  # the sampler's log-probs are the trainer's but for rounding
    "mismatch_high": 0.5,
}


def bases() -> dict[str, Settings]:
    """Small runs, between them with every choice that turns other fields on."""
    # With Adam's usual eps a gradient that is zero but for rounding moves a parameter all the same.
    adam = AdamConfig(eps=1e-3)
    fit: dict[str, Any] = {"batch_size": 8, "warmup": 2, "epochs": 2.0, "micro_batches": 2}
    fit["adam"] = adam
    lora = LoraConfig(rank=2)
    best: dict[str, Any] = {"eval_every": 1, "best_metric": "looked"}
    few = {"completions": 3, "prompt_length": 2, "response_length": 6}
    rl = PPOConfig(
        episodes=64,
        rollout_batch=16,
        minibatch=8,
        prompt_length=run_stage.PROMPT,
        response_length=run_stage.RESPONSE,
        warmup_iterations=2,
        adam=adam,
        learning_rate=3e-3,
        value_learning_rate=3e-3,
    )
    group: dict[str, Any] = {"samples_per_prompt": 4}
    losses = typing.get_args(typing.get_type_hints(PreferenceConfig)["loss"])
    return {
        "pretrain": PretrainConfig(**fit, length=8),
        "pretrain lora": PretrainConfig(**fit, length=8, lora=lora),
        "pretrain adafactor": PretrainConfig(**fit, length=8, optimizer="adafactor", eval_every=1),
        "pretrain lion": PretrainConfig(
            **fit, length=8, optimizer="lion", schedule="linear", **best
        ),
        "pretrain muon": PretrainConfig(
            **fit, length=8, optimizer="muon", schedule="warmup_stable_decay"
        ),
        "sft": SFTConfig(**fit),
        "sft mixed": SFTConfig(**fit, pretrain_fraction=0.5),
        "reward_model": RewardModelConfig(**fit, **few),
        **{f"preference {x}": PreferenceConfig(**fit, **few, loss=x) for x in losses},
        "distill samples": DistillConfig(**fit),
        "distill logits": DistillConfig(**fit),
        "ppo": rl,
        "ppo one update": dataclasses.replace(rl, minibatch=16),
        **{
            f"ppo {x}": dataclasses.replace(rl, optimizer=x, schedule="linear", **more)
            for x, more in (("adafactor", {"eval_every": 1}), ("lion", best), ("muon", {}))
        },
        "ppo everything": dataclasses.replace(
            rl, ptx_coef=0.5, ptx_ratio=2, kl_target=1.0, missing_eos="subtract", lora=lora
        ),
        "ppo rloo": dataclasses.replace(rl, **group, estimator="rloo", ratio="sequence"),
        "ppo grpo": dataclasses.replace(
            rl, **group, estimator="grpo", kl_loss_coef=0.1, mismatch="sequence"
        ),
        "ppo cispo": dataclasses.replace(rl, **group, estimator="grpo", policy_loss="cispo"),
        "ppo sapo": dataclasses.replace(rl, policy_loss="sapo"),
        "ppo reinforce++": dataclasses.replace(rl, **group, estimator="reinforce++"),
    }


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any, Any]]:
    """("a.b", type, what is said of it, value) of every field."""
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, path = getattr(config, field.name), prefix + field.name
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{path}.")
        else:
            yield path, hints[field.name], about(type(config), field.name), value


def others(path: str, hint: Any, said: Any, value: Any) -> list[Any]:
    """Other values that the field's type and range allow, the likeliest to be taken first."""
    if path in FELT:
        return [FELT[path]]
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = typing.get_args(hint) if union else (hint,)
    hint = next(option for option in options if option is not types.NoneType)
    if typing.get_origin(hint) is Literal:
        return [choice for choice in typing.get_args(hint) if choice != value]
    if hint is bool:
        return [not value]
    if value is None:
        value = said.above if said.above is not None else said.low or 0
    near: list[Any] = [value * 2, value + 1, value // 2] if hint is int else [
        value * 0.5, value * 2.0, value + 0.25, value + 1.0,
    ]  # fmt: skip
    return [x for x in near if x != value and said.holds(x)]


@dataclass(frozen=True)
class Plan:
    """What a run is; its program is traced when it is asked for."""

    given: str
    trace: Callable[[], tuple[str, Any]]

    @functools.cached_property
    def program(self) -> str:
        """A hash of the step's program."""
        return _digest(self.trace())

    def same_as(self, other: "Plan") -> bool:
        """Whether both runs do the same."""
        return self.given == other.given and self.program == other.program


def plan(name: str, config: Any, workdir: Path) -> Plan:
    """What a run of the base `name` with `config` is."""
    seen: list[Any] = []
    programs: list[Callable[[], tuple[str, Any]]] = []

    def record(step: Any, state: Any, *, batch_at: Any, steps: int, key: Any, **rest: Any) -> Any:
        batches = [batch_at(i) for i in range(min(steps, 3))]
        seen.extend([state, batches, steps, jax.random.key_data(key)])
        seen.append({n: v for n, v in rest.items() if n.endswith("_every")})
        seen.append((rest["evaluate"] is None, rest["best"], rest.get("stop_when") is None))
        programs.append(lambda: _program(step, state, batches[0], key))
        return state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "run_loop", record)
        patch.setattr(ppo, "run_loop", record)
        patch.setattr(stage, "compile_step", _uncompiled)
        seen.append(_train(name, config, workdir))
    return Plan(_digest(seen), programs[0])


class Result(NamedTuple):
    """What a run left: its model, the lines of its metrics, and its files."""

    params: Any
    rows: list[dict[str, Any]]
    files: list[str]

    def differs_from(self, other: "Result") -> bool:
        """By more than rounding."""
        if (self.files, len(self.rows)) != (other.files, len(other.rows)):
            return True
        if any(a.keys() != b.keys() for a, b in zip(self.rows, other.rows, strict=True)):
            return True
        pairs = [
            (a[name], b[name]) for a, b in zip(self.rows, other.rows, strict=True) for name in a
        ]
        leaves = [jax.tree.leaves(tree.params) for tree in (self, other)]
        if [x.shape for x in leaves[0]] != [x.shape for x in leaves[1]]:
            return True
        pairs += zip(*leaves, strict=True)
        return not all(np.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in pairs)


def result(name: str, config: Any, workdir: Path) -> Result:
    """What a run of the base `name` with `config` leaves."""
    end = _train(name, config, workdir)
    params = end.policy.ema if isinstance(end, ppo.PPOState) else end
    lines = [line for path in workdir.glob("*.jsonl") for line in path.read_text().splitlines()]
    timed = ("time", "steps_per_second", "batch_wait_seconds")
    rows = [{n: v for n, v in json.loads(x).items() if n not in timed} for x in lines]
    rows = [row for row in rows if "event" not in row]
    files = sorted(str(p.relative_to(workdir)) for p in workdir.glob("checkpoints/*"))
    return Result(params, rows, files)


def _uncompiled(step: Any, mesh: Any, state: Any, *fixed: Any) -> Any:
    return lambda state, *inputs: step(state, *fixed, *inputs)


def _program(step: Any, state: Any, batch: Any, key: Any) -> tuple[str, Any]:
    with jax.set_mesh(MESH):
        traced = jax.make_jaxpr(step)(state, batch, key)
    return re.sub(r"0x[0-9a-f]+", "", str(traced)), traced.consts


def _digest(tree: Any) -> str:
    digest = hashlib.sha256()
    leaves, structure = jax.tree.flatten(tree)
    digest.update(re.sub(r"0x[0-9a-f]+", "", str(structure)).encode())
    for leaf in leaves:
        is_array = isinstance(leaf, jax.Array | np.ndarray)
        digest.update(np.asarray(leaf).tobytes() if is_array else repr(leaf).encode())
    return digest.hexdigest()


def _train(name: str, config: Any, workdir: Path) -> Any:
    """The stage's `train` on the rows of `run_stage`."""
    where: dict[str, Any] = {"mesh": MESH, "workdir": workdir}
    where["evaluate"] = lambda step, state: {"looked": step}
    model, kind = language_model(run_stage.SHAPE), name.split()[0]
    params = lab_params()
    scalar_params = scalar_from_language(params, jax.random.key(1), run_stage.SHAPE)
    text, demonstrations = run_stage.text(), run_stage.demonstrations()
    if kind == "pretrain":
        return pretrain.train(config, model, params, text[:, : config.length], **where)
    if kind == "sft":
        return sft.train(config, model, params, demonstrations, pretraining=text, **where)
    if kind == "reward_model":
        standard = {n: x for n, x in demonstrations.items() if n != "loss_mask"}
        comparisons, scalar = run_stage.comparisons(), scalar_model(run_stage.SHAPE)
        # With ties, which pair_norm counts or does not.
        comparisons["ranks"][::2] = np.minimum(comparisons["ranks"][::2], 1)
        return reward_model.train(
            config, scalar, scalar_params, comparisons, standard=standard, **where
        )
    if kind == "preference":
        return preference.train(config, model, params, run_stage.comparisons(), **where)
    if kind == "distill":
        shape, start = distill.shortened(lab.SHAPE, lab.policy_params(), config.layers)
        teacher: Any = language_model(lab.SHAPE), lab.policy_params()
        targets: Any = name.split()[1]
        student = language_model(shape)
        return distill.train(config, targets, student, start, *teacher, demonstrations, **where)
    size = config.updates * config.minibatch * config.ptx_ratio
    return ppo.train(
        config,
        model,
        scalar_model(run_stage.SHAPE),
        params,
        scalar_params,
        Batches(run_stage.prompts(), config.prompts, seed=config.seed),
        more_prompts=Batches(run_stage.prompts(), config.prompts, seed=config.seed + 2),
        ptx=Batches({"tokens": text}, size, seed=1),
        eos_id=run_stage.EOS,
        **where,
    )


def lab_params() -> Any:
    """Parameters of the one-layer model of `run_stage`."""
    return language_model(run_stage.SHAPE).init(jax.random.key(0))
