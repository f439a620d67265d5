"""The hyper-parameters of PPO and PPO-ptx: the paper's values, and a field for what it omits."""

from dataclasses import dataclass
from typing import Literal

from instruct_jax.errors import ConfigError
from instruct_jax.stages.stage import AdamConfig


@dataclass(frozen=True)
class PPOConfig:
    """PPO-3: the paper's values; `ptx_coef` 0 is PPO, 27.8 the paper's PPO-ptx."""

    episodes: int = 256_000
    rollout_batch: int = 512
    minibatch: int = 64
    inner_epochs: int = 1
    prompt_length: int = 1024
    response_length: int = 1024
    temperature: float = 1.0
    # Reward: the KL penalty, and what is done to the reward model's score before it.
    kl_coef: float = 0.02
    kl_target: float | None = None
    kl_horizon: int = 10_000
    missing_eos: Literal["none", "replace", "subtract"] = "none"
    missing_eos_penalty: float = 1.0
    reward_clip: float | None = None
    whiten_rewards: bool = False
    # Advantages and the clipped losses.
    discount: float = 1.0
    gae_lambda: float = 0.95
    whiten_advantages: Literal["rollout", "minibatch", "none"] = "rollout"
    clip: float = 0.2
    value_clip: float = 0.2
    loss_reduction: Literal["token_mean", "seq_mean", "seq_sum_const"] = "token_mean"
    # The pretraining mix.
    ptx_coef: float = 0.0
    ptx_ratio: int = 8
    ptx_reduction: Literal["token_mean", "seq_sum_mean"] = "token_mean"
    # Optimizers: one each for the policy and the value model.
    learning_rate: float = 9.65e-6
    value_learning_rate: float = 9e-6
    warmup_iterations: int = 10
    adam: AdamConfig = AdamConfig(eps=1e-5)
    ema_decay: float = 0.992
    micro_batches: int = 1
    seed: int = 0
    log_every: int = 1
    eval_every: int = 0
    save_every: int = 0

    def __post_init__(self) -> None:
        """ConfigError where a batch does not divide."""
        if self.rollout_batch % self.minibatch:
            raise ConfigError(
                f"rollout_batch {self.rollout_batch} is not a multiple of "
                f"minibatch {self.minibatch}"
            )
        if self.minibatch % self.micro_batches:
            raise ConfigError(
                f"minibatch {self.minibatch} is not a multiple of "
                f"micro_batches {self.micro_batches}"
            )

    @property
    def iterations(self) -> int:
        """Rollout batches in the run."""
        return max(1, self.episodes // self.rollout_batch)

    @property
    def updates(self) -> int:
        """Optimizer updates in one iteration."""
        return self.inner_epochs * (self.rollout_batch // self.minibatch)
