"""What is planned: which stage a configuration is of, and which models it is for, before any of
them is there.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from instruct_jax.cli.config import load_config, resolve
from instruct_jax.errors import ConfigError
from instruct_jax.models.config import Attention, Remat
from instruct_jax.models.families import preset
from instruct_jax.models.transformer import TransformerConfig
from instruct_jax.stages.ppo_config import PPOConfig
from instruct_jax.stages.preference import PreferenceConfig
from instruct_jax.stages.pretrain import PretrainConfig
from instruct_jax.stages.record import RECORD, read_record
from instruct_jax.stages.reward_model import RewardModelConfig
from instruct_jax.stages.sft import SFTConfig

Stage = Literal["pretrain", "sft", "reward_model", "preference", "ppo"]
StageConfig = PretrainConfig | SFTConfig | RewardModelConfig | PreferenceConfig | PPOConfig


@dataclass(frozen=True)
class Job:
    """One stage to plan. `scalar` is the reward and value model of PPO."""

    stage: Stage
    config: Any
    model: TransformerConfig
    scalar: TransformerConfig | None = None
    ptx_length: int = 0
    # Steps (iterations of PPO) in the run.
    steps: int = 1

    @property
    def rows(self) -> int:
        """Rows of a batch, or of a minibatch of PPO."""
        return self.config.minibatch if self.stage == "ppo" else self.config.batch_size

    @property
    def mixes(self) -> bool:
        """Whether text is mixed in (PPO-ptx)."""
        return self.stage == "ppo" and self.config.ptx_coef > 0

    def with_micro_batches(self, micro_batches: int, ptx_micro_batches: int | None = None) -> "Job":
        """The same, with the batch in so many parts, and the text of PPO-ptx in its own."""
        changes = {"micro_batches": micro_batches}
        if self.stage == "ppo":
            changes["ptx_micro_batches"] = ptx_micro_batches
        config = dataclasses.replace(self.config, **changes)
        return dataclasses.replace(self, config=config)

    def with_remat(self, remat: Remat) -> "Job":
        """The same, with activations kept or computed again so (`TransformerConfig.remat`)."""
        scalar = self.scalar and dataclasses.replace(self.scalar, remat=remat)
        model = dataclasses.replace(self.model, remat=remat)
        return dataclasses.replace(self, model=model, scalar=scalar)

    def with_attention(self, attention: Attention) -> "Job":
        """The same, with attention computed so (`TransformerConfig.attention`)."""
        scalar = self.scalar and dataclasses.replace(self.scalar, attention=attention)
        model = dataclasses.replace(self.model, attention=attention)
        return dataclasses.replace(self, model=model, scalar=scalar)

    @property
    def length(self) -> int:
        """Tokens of a row."""
        config = self.config
        if self.stage == "pretrain":
            return config.length
        if self.stage == "sft":
            return config.pack_length or config.prompt_length + config.response_length
        if self.stage == "ppo":
            return config.prompt_length + config.response_length
        # The longest tree, which has a row of its own.
        return config.prompt_length + self.branches * config.response_length

    @property
    def branches(self) -> int:
        """Completions of a tree; KTO adds that of another prompt."""
        added = isinstance(self.config, PreferenceConfig) and self.config.loss == "kto"
        return self.config.completions + added


# Sizes by the names of presets; the embedded world's models are `mini`, of 767 tokens.
SIZES = {"1p3b": "gpt3-1.3b", "6b": "gpt3-6.7b", "175b": "gpt3-175b", "124m": "gpt2-small"}
SIZES |= {"1b": "gpt3-1.3b", "7b": "llama-7b", "small": "small"}
TOY = ("toyworld", "debug", "shared")
# Ouyang et al.: one reward model of 6B beside policies of every size (MODEL-6).
INSTRUCTGPT_REWARD = "gpt3-6.7b"
LARGE = 256  # a wider model computes in bfloat16 and recomputes its activations


def job_of(
    spec: str,
    overrides: Mapping[str, str],
    schemas: Mapping[Stage, type],
    *,
    policy: str | None = None,
    reward: str | None = None,
    rows: int = 100_000,
) -> Job:
    """The job of "FILE:NAME" with overrides; `schemas` are the configurations of the scripts.

    `policy` and `reward` name sizes, `rows` is the number of examples in the data. ConfigError
    where the stage or a size cannot be told.
    """
    values = load_config(spec)
    found = [stage for stage in schemas if isinstance(values.get(stage), dict)]
    if len(found) != 1:
        raise ConfigError(f"{spec}: not the configuration of one stage of {', '.join(schemas)}")
    (stage,) = found
    config: Any = resolve(schemas[stage], values, overrides)
    name = spec.partition(":")[2] or "toyworld"
    inner, scalar, ptx_length = getattr(config, stage), None, 0
    if stage == "pretrain":
        model = _pretrained(config, policy)
    else:
        model = config.model.on(_model(name, policy, config.init, "--policy"))
    if stage == "ppo":
        if reward is None and name.startswith("instructgpt"):
            reward = INSTRUCTGPT_REWARD
        scalar = _model(name, reward or policy, config.reward_model, "--reward")
        scalar = config.model.on(scalar)
        ptx_length, steps = config.ptx_length, inner.iterations
    else:
        steps = max(1, round(inner.epochs * rows / inner.batch_size))
    return Job(stage, inner, model, scalar, ptx_length=ptx_length, steps=steps)


def _pretrained(config: Any, policy: str | None) -> TransformerConfig:
    """The model that pretraining makes, whose vocabulary is the tokenizer's."""
    given = config.model
    model = _named(policy or given.preset, "--policy")
    if config.tokenizer is None:
        model = dataclasses.replace(model, vocab_size=config.vocab_size)
    length = given.max_length or model.max_length
    return given.on(dataclasses.replace(model, max_length=length))


def _model(name: str, size: str | None, folder: str, flag: str) -> TransformerConfig:
    if size is None and folder and (Path(folder) / RECORD).is_file():
        return read_record(Path(folder)).config
    if size is None:
        words = re.split(r"[_\-.]", name)
        size = next((SIZES[word] for word in words if word in SIZES), None)
        if size is None and words[0] in TOY:
            return dataclasses.replace(preset("mini"), vocab_size=767)
    if size is None:
        raise ConfigError(f"config {name}: the size of its model is not known here; {flag}=SIZE")
    config = _named(size, flag)
    large = config.d_model > LARGE
    dtype = "bfloat16" if large else config.dtype
    return dataclasses.replace(config, dtype=dtype, remat="full" if large else config.remat)


def _named(size: str, flag: str) -> TransformerConfig:
    try:
        return preset(size)
    except ValueError as error:
        raise ConfigError(f"{flag}={size}: {error}") from error
