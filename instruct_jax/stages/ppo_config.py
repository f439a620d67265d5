"""The hyper-parameters of PPO and PPO-ptx: the paper's values, and a field for what it omits.

The critic-free algorithms are the same iteration with another `estimator` of the advantages, which
then needs several samples of every prompt, or another `ratio` in the clipped loss:

============  ==============================  ==============  ===============  =====================
algorithm     estimator                       ratio           loss_reduction   KL
============  ==============================  ==============  ===============  =====================
PPO           gae                             token           token_mean       kl_coef (reward)
RLOO          rloo                            sequence        any              kl_coef (reward)
REINFORCE++   reinforce++                     token           token_mean       kl_coef (reward)
GRPO          grpo                            token           seq_mean         kl_loss_coef (loss)
Dr. GRPO      grpo, group_scale "none"        token           seq_sum_const    none
DAPO          grpo, clip_high 0.28            token           token_mean       none
GSPO          grpo                            sequence_mean   any              none
============  ==============================  ==============  ===============  =====================

Sources: losses/group.py. All of them take the pretraining mix.
"""

from dataclasses import dataclass
from typing import Literal

from instruct_jax.errors import ConfigError
from instruct_jax.models.adapters import LoraConfig
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
    # Where the log-probs of the policy that sampled come from: a forward over the whole rows
    # (PPO-5), or the sampler, which saves a tenth of an iteration's products and is exact to
    # rounding in float32. In bfloat16 the two differ by 0.03 nats, and the ratio is not 1 at first.
    old_log_probs: Literal["forward", "sampler"] = "forward"
    # 0 is on-policy. With 1 an iteration trains on what the policy answered at the start of the
    # iteration before, off-policy by its updates (`ppo.py`). On one mesh that saves no time.
    rollout_lag: Literal[0, 1] = 0
    # So many samples of a prompt are one group; batches and episodes count samples.
    samples_per_prompt: int = 1
    # Reward: the KL penalty, and what is done to the reward model's score before it.
    kl_coef: float = 0.02
    kl_target: float | None = None
    kl_horizon: int = 10_000
    missing_eos: Literal["none", "replace", "subtract"] = "none"
    missing_eos_penalty: float = 1.0
    reward_clip: float | None = None
    whiten_rewards: bool = False
    # Advantages; only "gae" has a value model.
    estimator: Literal["gae", "rloo", "grpo", "reinforce++"] = "gae"
    group_scale: Literal["group", "batch", "none"] = "group"
    discount: float = 1.0
    gae_lambda: float = 0.95
    whiten_advantages: Literal["rollout", "minibatch", "none"] = "rollout"
    # The clipped losses.
    ratio: Literal["token", "sequence", "sequence_mean"] = "token"
    clip: float = 0.2
    clip_high: float | None = None
    dual_clip: float | None = None
    value_clip: float = 0.2
    kl_loss_coef: float = 0.0
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
    # A gradient whose norm, before clipping, is this or more makes no update; None is no limit.
    skip_above: float | None = None
    # Rank 0 trains all parameters. Else an adapter of the policy and one of the value model, whose
    # head is trained whole; the reference is the policy with its adapter off.
    lora: LoraConfig = LoraConfig()
    # Parts of a minibatch that are computed one after the other, and parts of the text mixed into
    # it, by default as many: a part then has `ptx_ratio` times the rows. It changes no result.
    micro_batches: int = 1
    ptx_micro_batches: int | None = None
    # With more than 1, rows are sorted by length within a minibatch, and each micro-batch computed
    # at the least of so many widths that has room for its responses; scoring goes the same way, and
    # sampling goes on in half as many rows, up to one time less than that. It changes no result,
    # and pays where lengths differ: each width and each number of rows is compiled.
    length_buckets: int = 1
    seed: int = 0
    log_every: int = 1
    eval_every: int = 0
    save_every: int = 0

    def __post_init__(self) -> None:
        """ConfigError where a batch does not divide or two choices do not fit together."""
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
        text = self.minibatch * self.ptx_ratio
        if self.ptx_parts < 1 or text % self.ptx_parts:
            raise ConfigError(
                f"minibatch {self.minibatch} x ptx_ratio {self.ptx_ratio}, {text} rows of text, is "
                f"not a multiple of ptx_micro_batches {self.ptx_parts}"
            )
        if not 1 <= self.length_buckets <= self.response_length:
            raise ConfigError(
                f"length_buckets {self.length_buckets} is not between 1 and "
                f"response_length {self.response_length}"
            )
        if self.rollout_batch % self.samples_per_prompt:
            raise ConfigError(
                f"rollout_batch {self.rollout_batch} is not a multiple of "
                f"samples_per_prompt {self.samples_per_prompt}"
            )
        grouped = self.estimator in ("rloo", "grpo")
        if grouped and self.samples_per_prompt < 2:
            raise ConfigError(
                f"estimator {self.estimator!r} compares the samples of a prompt; "
                f"samples_per_prompt is {self.samples_per_prompt}, expected 2 or more"
            )
        if self.ratio != "token" and not grouped:
            raise ConfigError(
                f"ratio {self.ratio!r} needs one advantage a response, "
                f"which estimator {self.estimator!r} does not give; use 'rloo' or 'grpo'"
            )
        if self.ratio != "token" and self.kl_loss_coef:
            raise ConfigError(
                f"kl_loss_coef is a token loss and ratio is {self.ratio!r}; use kl_coef"
            )

    @property
    def iterations(self) -> int:
        """Rollout batches in the run."""
        return max(1, self.episodes // self.rollout_batch)

    @property
    def prompts(self) -> int:
        """Prompts in one iteration."""
        return self.rollout_batch // self.samples_per_prompt

    @property
    def halvings(self) -> int:
        """How often a rollout goes on in half as many rows."""
        return self.length_buckets - 1

    @property
    def ptx_parts(self) -> int:
        """Micro-batches of the text of a minibatch."""
        return self.micro_batches if self.ptx_micro_batches is None else self.ptx_micro_batches

    @property
    def updates(self) -> int:
        """Optimizer updates in one iteration."""
        return self.inner_epochs * (self.rollout_batch // self.minibatch)
