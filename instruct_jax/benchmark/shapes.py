"""The sizes of a benchmark, and its random weights.

Where `mean_response` is given, the end token is made as probable as a mean length of that many
tokens needs, so that skewed lengths come out of the sampler itself.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from instruct_jax.errors import ConfigError
from instruct_jax.models.config import Dtype, Remat
from instruct_jax.models.families import preset
from instruct_jax.models.transformer import (
    TransformerConfig,
    language_model,
    scalar_from_language,
    scalar_model,
)
from instruct_jax.settings import Settings, setting
from instruct_jax.stages.ppo_config import PPOConfig

END = 0


@dataclass(frozen=True)
class Shape(Settings):
    """Sizes of the models and of the batches; None keeps the preset's value."""

    model: str = setting("small", "named size of the policy (models/families.py)")
    scalar: str | None = setting(None, "of the reward and value model; none: the policy's")
    vocab_size: int | None = setting(None, "entries of the vocabulary", low=2)
    num_layers: int | None = setting(None, "layers of the policy", low=1)
    d_model: int | None = setting(None, "width of the policy", low=1)
    num_heads: int | None = setting(None, "attention heads of the policy", low=1)
    max_length: int | None = setting(None, "tokens of the longest text", low=1, unit="tokens")
    dtype: Dtype = setting("float32", "what matrices are multiplied in")
    remat: Remat = setting("none", "what the backward pass computes again, to save memory")
    rows: int = setting(32, "prompts of a batch", low=1)
    prompt: int = setting(64, "tokens of a prompt", low=1, unit="tokens")
    response: int = setting(64, "tokens that a response may have", low=1, unit="tokens")
    mean_response: int | None = setting(
        None, "tokens of a response in the mean; none: all are as long as they may be", low=1
    )
    text_rows: int = setting(32, "rows of a batch of text", low=1)
    text_length: int = setting(128, "tokens of a row of text", low=2, unit="tokens")
    ranked: int = setting(8, "prompts of a batch with ranked completions", low=1)
    completions: int = setting(4, "completions of such a prompt", low=2)
    pack_length: int | None = setting(
        512, "tokens of a row of several demonstrations; none: one a row", low=2, unit="tokens"
    )
    minibatch: int = setting(32, "episodes of an update of PPO", low=1)
    inner_epochs: int = setting(1, "passes over a rollout batch", low=1)
    rollout_lag: Literal[0, 1] = setting(0, "iterations between a rollout and its updates")
    micro_batches: int = setting(1, "parts of a batch, one after the other", low=1)
    ptx_micro_batches: int | None = setting(
        None, "parts of the text of an update; none: micro_batches", low=1, needs="ptx_ratio"
    )
    length_buckets: int = setting(1, "widths that responses are computed at", low=1)
    ptx_ratio: int = setting(0, "rows of text beside an episode; 0 mixes none in", low=0)
    seed: int = setting(0, "seed of weights and rows", low=0, high=2**32 - 1)

    def policy_config(self) -> TransformerConfig:
        """The language model. Raises ConfigError for sizes that make no model."""
        return self._config(self.model, language=True)

    def scalar_config(self) -> TransformerConfig:
        """The reward and the value model."""
        return self._config(self.scalar or self.model, language=self.scalar is None)

    def grown(self, field: str, value: int) -> "Shape":
        """This shape with `field` of another value, and what grows with it.

        More `rows` are more rows everywhere, a `text_length` is also that of prompt and response
        together, and a wider `d_model` has more heads of the same size.
        """
        together: dict[str, dict[str, Any]] = {
            "rows": {"minibatch": value, "text_rows": value},
            "text_length": {
                "prompt": value // 2,
                "response": value - value // 2,
                "max_length": value,
            },
            "d_model": {"num_heads": max(value // 32, 1)},
        }
        changes: dict[str, Any] = {field: value, **together.get(field, {})}
        return dataclasses.replace(self, **changes)

    def _config(self, name: str, *, language: bool) -> TransformerConfig:
        changes: dict[str, Any] = {"dtype": self.dtype, "remat": self.remat}
        names = ["vocab_size", "max_length"]
        names += ["num_layers", "d_model", "num_heads"] if language else []
        changes |= {n: getattr(self, n) for n in names if getattr(self, n) is not None}
        try:
            return dataclasses.replace(preset(name), **changes)
        except ValueError as error:
            raise ConfigError(f"config.shape: {error}") from error

    def ppo_config(self) -> PPOConfig:
        """The settings of an iteration of this shape."""
        return PPOConfig(
            episodes=self.rows,
            rollout_batch=self.rows,
            minibatch=self.minibatch,
            inner_epochs=self.inner_epochs,
            rollout_lag=self.rollout_lag,
            micro_batches=self.micro_batches,
            ptx_micro_batches=self.ptx_micro_batches,
            length_buckets=self.length_buckets,
            prompt_length=self.prompt,
            response_length=self.response,
            old_log_probs="sampler" if self.dtype == "float32" else "forward",
            ptx_coef=27.8 if self.ptx_ratio else 0.0,
            ptx_ratio=max(self.ptx_ratio, 1),
            warmup_iterations=0,
            seed=self.seed,
        )


class Models(NamedTuple):
    """Parameters of the policy and of the reward model, on the host's default device."""

    policy: Any
    reward: Any


def random_models(shape: Shape, *, eos_id: int = END) -> Models:
    """Both models with random weights, and the end token as probable as `shape` says."""
    policy, scalar = shape.policy_config(), shape.scalar_config()
    keys = jax.random.split(jax.random.key(shape.seed), 3)
    params = language_model(policy).init(keys[0])
    if scalar == policy:
        reward = scalar_from_language(params, keys[1], scalar)
    else:
        reward = scalar_model(scalar).init(keys[1])
    if shape.mean_response is not None:
        params = with_mean_length(params, policy, shape.mean_response, eos_id=eos_id, key=keys[2])
    return Models(params, reward)


def with_mean_length(
    params: Any, config: TransformerConfig, mean: int, *, eos_id: int, key: jax.Array
) -> Any:
    """The same model, ending with probability of about 1 / mean at every token.

    The last norm's bias gets a direction u that only the end token's row of the table points in, so
    that token's logit is nearly constant. Raises ConfigError for a model without that bias.
    """
    bias = params["final_norm"].get("bias")
    if bias is None or not config.tie_embeddings:
        raise ConfigError("config.shape.mean_response needs a model with LayerNorm and tied tables")
    u = jax.random.normal(key, (config.d_model,), jnp.float32)
    u = u / jnp.linalg.norm(u)
    table = params["embedder"]["tokens"]
    table = table - jnp.outer(table @ u, u)
    small = jnp.float32(0.02)
    table = table.at[eos_id].set(small * u)

    def with_bias(logit: jax.Array) -> Any:
        return {
            **params,
            "embedder": {**params["embedder"], "tokens": table},
            "final_norm": {**params["final_norm"], "bias": bias + logit / small * u},
        }

    tokens = jax.random.randint(key, (4, 32), 1, config.vocab_size)
    logits = jax.jit(language_model(config).apply)(with_bias(jnp.float32(0.0)), tokens)
    others = jax.nn.logsumexp(logits.at[..., eos_id].set(-jnp.inf), axis=-1).mean()
    return with_bias(others - jnp.log(jnp.float32(mean - 1)))
