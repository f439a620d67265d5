"""What is planned: which stage a configuration is of, and which models it is for, before any of
them is there.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from instruct_jax.cli.config import load_config, resolve
from instruct_jax.errors import ConfigError
from instruct_jax.models.config import Attention, Remat
from instruct_jax.models.families import preset
from instruct_jax.models.hf import inspect_pretrained
from instruct_jax.models.transformer import TransformerConfig
from instruct_jax.stages.ppo_config import PPOConfig
from instruct_jax.stages.preference import PreferenceConfig
from instruct_jax.stages.pretrain import PretrainConfig
from instruct_jax.stages.record import RECORD, read_record
from instruct_jax.stages.reward_model import RewardModelConfig
from instruct_jax.stages.sft import SFTConfig
from instruct_jax.stages.stage import steps_of

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
    # In words, what the model is and where that was said; then the same of `scalar`.
    origins: tuple[str, ...] = ()

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
ROWS = 100_000  # examples in the data, where nothing says how many
LARGE = 256  # a wider model computes in bfloat16 and recomputes its activations


class _Sized(NamedTuple):
    """A model's configuration, and in words where it is from."""

    config: TransformerConfig
    origin: str


def job_of(
    spec: str,
    overrides: Mapping[str, str],
    schemas: Mapping[Stage, type],
    *,
    policy: str | None = None,
    reward: str | None = None,
    rows: int | None = None,
) -> Job:
    """The job of "FILE:NAME" with overrides; `schemas` are the configurations of the scripts.

    `policy` and `reward` name sizes, `rows` is the number of examples in the data, by default ROWS.
    A folder that the overrides name says the size of its model; one that only the preset names does
    so where its name tells none, since it may hold anything. ConfigError where the stage or a size
    cannot be told, and for a size or a number that the stage has not.
    """
    values = load_config(spec)
    found = [stage for stage in schemas if isinstance(values.get(stage), dict)]
    if len(found) != 1:
        raise ConfigError(f"{spec}: not the configuration of one stage of {', '.join(schemas)}")
    (stage,) = found
    if reward is not None and stage != "ppo":
        raise ConfigError(f"--reward={reward} has no effect: {stage} has one model; leave it out")
    if rows is not None and stage == "ppo":
        raise ConfigError(f"--rows={rows} has no effect: config.ppo.episodes says how long it is")
    config: Any = resolve(schemas[stage], values, overrides)
    name = spec.partition(":")[2] or "toyworld"
    inner, scalar, ptx_length = getattr(config, stage), None, 0
    if stage == "pretrain":
        model = _pretrained(config, policy)
    else:
        model = _model(name, policy, "init", config, overrides, "--policy")
    if stage == "ppo":
        paper, flag = name.startswith("instructgpt"), "--reward"
        if reward is None and not paper and "reward_model" not in overrides:
            reward, flag = policy, "--policy" if policy else flag
        scalar = _model(name, reward, "reward_model", config, overrides, flag, paper=paper)
        ptx_length, steps = config.ptx_length, inner.iterations
    else:
        steps = steps_of(inner.epochs, ROWS if rows is None else rows, inner.batch_size)
    if stage != "pretrain":
        model = model._replace(config=config.model.on(model.config))
    if scalar is not None:
        scalar = scalar._replace(config=config.model.on(scalar.config))
    return Job(
        stage,
        inner,
        model.config,
        None if scalar is None else scalar.config,
        ptx_length=ptx_length,
        steps=steps,
        origins=tuple(sized.origin for sized in (model, scalar) if sized is not None),
    )


def _pretrained(config: Any, policy: str | None) -> _Sized:
    """The model that pretraining makes, whose vocabulary is the tokenizer's."""
    given = config.model
    size = policy or given.preset
    model = _named(size, "--policy")
    if config.tokenizer is None:
        model = dataclasses.replace(model, vocab_size=config.vocab_size)
    length = given.max_length or model.max_length
    model = given.on(dataclasses.replace(model, max_length=length))
    return _Sized(model, f"{size}, by {'--policy' if policy else 'config.model.preset'}")


def _model(
    name: str,
    size: str | None,
    field: str,
    config: Any,
    overrides: Mapping[str, str],
    flag: str,
    *,
    paper: bool = False,
) -> _Sized:
    """What a flag says; else the folder that the command line names in config.`field`; else the
    preset's name; else the folder of the preset.
    """
    folder = getattr(config, field)
    if size is not None:
        return _Sized(_large(_named(size, flag)), f"{size}, by {flag}")
    if field in overrides:
        return _in_folder(folder, f"config.{field}={folder}")
    if paper:
        size, by = INSTRUCTGPT_REWARD, "one reward model serves all policies of the paper"
        return _Sized(_large(_named(size, flag)), f"{size}, {by}")
    words = re.split(r"[_\-.]", name)
    size = next((SIZES[word] for word in words if word in SIZES), None)
    if size is not None:
        return _Sized(_large(_named(size, flag)), f"{size}, by the name of the preset, {name}")
    if words[0] in TOY:
        toy = dataclasses.replace(preset("mini"), vocab_size=767)
        return _Sized(toy, f"mini with 767 tokens, as the presets {name} of all stages have it")
    if folder and (Path(folder) / RECORD).is_file():
        return _in_folder(folder, f"the preset's config.{field}={folder}")
    raise ConfigError(
        f"config {name}: the size of its model is not known here; {flag}=SIZE, or name a model "
        f"folder: --config.{field}=DIR"
    )


def _in_folder(folder: str, said: str) -> _Sized:
    path = Path(folder)
    if folder and (path / RECORD).is_file():
        config = read_record(path).config
    elif folder and (path / "config.json").is_file():
        config = inspect_pretrained(path).config
    else:
        raise ConfigError(
            f"{said}: neither model.json nor config.json here, so nothing says how large it is"
        )
    shape = f"{config.num_layers} layers, {config.d_model} wide, {config.vocab_size:,} tokens"
    return _Sized(config, f"{shape}, by {said}")


def _large(config: TransformerConfig) -> TransformerConfig:
    large = config.d_model > LARGE
    dtype = "bfloat16" if large else config.dtype
    return dataclasses.replace(config, dtype=dtype, remat="full" if large else config.remat)


def _named(size: str, flag: str) -> TransformerConfig:
    try:
        return preset(size)
    except ValueError as error:
        raise ConfigError(f"{flag}={size}: {error}") from error
