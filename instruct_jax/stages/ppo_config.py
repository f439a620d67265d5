"""The hyper-parameters of PPO and PPO-ptx: the paper's values, and a field for what it omits.

The critic-free algorithms are the same iteration with another `estimator` of the advantages, which
then needs several samples of every prompt, or another `ratio` in the clipped loss:

============  ==========================  ===================  ===============  ===================
algorithm     estimator                   ratio                loss_reduction   KL
============  ==========================  ===================  ===============  ===================
PPO           gae                         token                token_mean       kl_coef (reward)
RLOO          rloo                        sequence             any              kl_coef (reward)
REINFORCE++   reinforce++                 token                token_mean       kl_coef (reward)
GRPO          grpo                        token                seq_mean         kl_loss_coef (loss)
Dr. GRPO      grpo, group_scale "none"    token                seq_sum_const    none
DAPO          grpo, clip_high 0.28        token                token_mean       none
GSPO          grpo                        sequence_mean        any              none
GSPO-token    grpo                        sequence_mean_token  seq_mean         none
CISPO         grpo, policy_loss "cispo"   token                token_mean       none
SAPO          grpo, policy_loss "sapo"    token                seq_mean         none
============  ==========================  ===================  ===============  ===================

None of the critic-free ones whitens its advantages once more (`whiten_advantages` "none"); those
whose KL is in the loss, or that have none, set `kl_coef` to 0; GSPO clips at 3e-4 and 4e-4; DAPO
and CISPO draw groups again whose rewards are all equal (`max_resamples`).
algorithms.py has a constructor of each, and `named`, which says what a configuration makes.
Sources: losses/group.py, losses/policy_gradient.py. All of them take the pretraining mix.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from instruct_jax.errors import ConfigError
from instruct_jax.settings import setting
from instruct_jax.stages.optimizers import AdamConfig
from instruct_jax.stages.stage import RunConfig

# Which advantages are of whole responses, and so have a sequence's ratio.
GROUPED = ("rloo", "grpo")
# Ratios of which a response has one.
OF_RESPONSES = ("sequence", "sequence_mean")
TOKENS = "ratio=token|sequence_mean_token"
# Where the policy that is updated is not the one that sampled, so that ratios leave 1.
MOVES = "updates>1 or rollout_lag or old_log_probs=sampler"


@dataclass(frozen=True)
class PPOConfig(RunConfig):
    """PPO-3: the paper's values; `ptx_coef` 0 is PPO, 27.8 the paper's PPO-ptx."""

    episodes: int = setting(
        256_000,
        "episodes of the run, in whole rollout batches",
        low=1,
        unit="episodes",
        may_change="more",
    )
    rollout_batch: int = setting(512, "episodes of an iteration", low=1, unit="episodes")
    minibatch: int = setting(64, "episodes of an update", low=1, unit="episodes")
    inner_epochs: int = setting(1, "passes over a rollout batch", low=1)
    samples_per_prompt: int = setting(
        1, "answers to one prompt, which are a group of episodes", low=1
    )
    prompt_length: int = setting(
        1024, "tokens of the longest prompt; longer ones are left out", low=1, unit="tokens"
    )
    response_length: int = setting(1024, "tokens that a response may have", low=1, unit="tokens")
    temperature: float = setting(
        1.0, "temperature of sampling and of all log-probs; at 0 there is no gradient", above=0.0
    )
    # From the sampler they save a tenth of an iteration's products and are exact to rounding in
    # float32. In bfloat16 the two differ by 0.03 nats, and the ratio is not 1 at first.
    old_log_probs: Literal["forward", "sampler"] = setting(
        "forward",
        "where the log-probs of the policy that sampled come from; forward: a pass over whole rows",
    )
    # A sampler with other kernels or another precision draws from another distribution than the one
    # whose log-probs the ratio uses (losses/mismatch.py).
    mismatch: Literal["none", "token", "sequence"] = setting(
        "none",
        "whether the policy's loss is weighed by trainer over sampler, of tokens or of responses",
        needs="old_log_probs=forward",
    )
    mismatch_outside: Literal["truncate", "mask"] = setting(
        "truncate", "what becomes of such a weight outside of its bounds", needs="mismatch"
    )
    mismatch_low: float = setting(0.0, "the least of these weights", low=0.0, needs="mismatch")
    mismatch_high: float = setting(2.0, "the largest", above=0.0, needs="mismatch")
    # Dynamic sampling: each rollout has prompts of its own, and its groups fill the places of those
    # without signal.
    max_resamples: int = setting(
        0,
        "rollouts that an iteration may add to replace groups whose scores are all equal",
        low=0,
        needs="estimator=rloo|grpo",
    )
    # Off-policy by the updates of one iteration (`ppo.py`). On one mesh that saves no time.
    rollout_lag: Literal[0, 1] = setting(
        0, "iterations between a rollout and the updates that learn from it; 0 is on-policy"
    )
    # Reward: the KL penalty, and what is done to the reward model's score before it.
    kl_coef: float = setting(0.02, "beta, what a nat of KL costs in the reward", low=0.0)
    kl_target: float | None = setting(
        None,
        "the KL of a response that kl_coef is steered to; none holds it",
        above=0.0,
        unit="nats",
        needs="kl_coef",
    )
    kl_horizon: int = setting(
        10_000, "episodes in which kl_coef is steered", low=1, unit="episodes", needs="kl_target"
    )
    kl_stop: float | None = setting(
        None,
        "the run ends after the first iteration whose mean KL of a response is above this",
        above=0.0,
        unit="nats",
        may_change=True,
    )
    missing_eos: Literal["none", "replace", "subtract"] = setting(
        "none", "what missing_eos_penalty does to the score of a response without a stop token"
    )
    missing_eos_penalty: float = setting(
        1.0,
        "what takes the place of that score, negated, or is taken off it",
        low=0.0,
        needs="missing_eos",
    )
    reward_clip: float | None = setting(
        None, "scores are cut to this on both sides of 0; none cuts none", above=0.0
    )
    whiten_rewards: bool = setting(
        False, "whether token rewards are divided by their deviation", needs="estimator=gae"
    )
    # Advantages.
    estimator: Literal["gae", "rloo", "grpo", "reinforce++"] = setting(
        "gae", "how advantages are got; gae alone has a value model (see ppo_config.py)"
    )
    group_scale: Literal["group", "batch", "none"] = setting(
        "group", "whose deviation divides an advantage", needs="estimator=grpo"
    )
    discount: float = setting(
        1.0,
        "gamma, what a reward is worth one token earlier",
        low=0.0,
        high=1.0,
        needs="estimator=gae|reinforce++",
    )
    gae_lambda: float = setting(
        0.95,
        "lambda, between one step and the whole response",
        low=0.0,
        high=1.0,
        needs="estimator=gae",
    )
    bootstrap_truncated: bool = setting(
        False,
        "whether a response that its budget cut off is worth what the value model says of its end",
        needs="estimator=gae",
    )
    whiten_advantages: Literal["rollout", "minibatch", "none"] = setting(
        "rollout", "over what advantages get mean 0 and deviation 1"
    )
    # The losses of the policy and of the value model.
    ratio: Literal["token", "sequence", "sequence_mean", "sequence_mean_token"] = setting(
        "token",
        "what has one probability ratio: a token, a response, the mean token of one, or each token "
        "that of the mean",
    )
    policy_loss: Literal["clip", "cispo", "sapo"] = setting(
        "clip",
        "what a ratio far from 1 does to a gradient: clip takes it away, cispo bounds it, sapo "
        "fades it out",
        needs=MOVES,
    )
    clip: float = setting(
        0.2,
        "epsilon, how far the ratio moves before it is clipped",
        above=0.0,
        needs="policy_loss=clip and " + MOVES,
    )
    clip_high: float | None = setting(
        None,
        "epsilon above 1; none: the same as below",
        above=0.0,
        needs="policy_loss=clip and " + MOVES,
    )
    dual_clip: float | None = setting(
        None,
        "bound of the ratio where the advantage is negative; none sets none",
        above=1.0,
        needs="policy_loss=clip and " + MOVES,
    )
    cispo_low: float = setting(0.0, "the least weight", low=0.0, needs="policy_loss=cispo")
    cispo_high: float = setting(5.0, "the largest weight", above=0.0, needs="policy_loss=cispo")
    sapo_sharpness: float = setting(
        1.0, "how soon gradients fade, of positive advantages", above=0.0, needs="policy_loss=sapo"
    )
    sapo_sharpness_negative: float = setting(
        1.05, "the same of all others", above=0.0, needs="policy_loss=sapo"
    )
    value_clip: float = setting(
        0.2,
        "how far a value moves before it is clipped",
        above=0.0,
        needs="estimator=gae and " + MOVES,
    )
    kl_loss_coef: float = setting(
        0.0, "what a nat of KL costs in the loss, token by token", low=0.0, needs=TOKENS
    )
    loss_reduction: Literal["token_mean", "seq_mean", "seq_sum_const"] = setting(
        "token_mean", "how the losses of tokens become one (ppo_losses.py)", needs=TOKENS
    )
    # The pretraining mix.
    ptx_coef: float = setting(
        0.0, "gamma, how much the pretraining loss counts; 0 mixes none in", low=0.0
    )
    ptx_ratio: int = setting(8, "rows of text beside an episode", low=1, needs="ptx_coef")
    ptx_reduction: Literal["token_mean", "seq_sum_mean"] = setting(
        "token_mean",
        "mean of the text's loss over tokens, or over rows of their sum",
        needs="ptx_coef",
    )
    # Optimizers: one each for the policy and the value model.
    learning_rate: float = setting(
        9.65e-6, "learning rate of the policy, after the warm-up", above=0.0
    )
    value_learning_rate: float = setting(
        9e-6,
        "learning rate of the value model, after the warm-up",
        above=0.0,
        needs="estimator=gae",
    )
    warmup_iterations: int = setting(
        10, "iterations in which the rates rise from a tenth", low=0, unit="iterations"
    )
    schedule: Literal["constant", "linear"] = setting(
        "constant", "how the rates go on from there, to the end of the run"
    )
    final_fraction: float = setting(
        0.0,
        "the rates at the end, in parts of their peak",
        low=0.0,
        high=1.0,
        needs="schedule=linear",
    )
    adam: AdamConfig = AdamConfig(eps=1e-5)
    ema_decay: float = setting(
        0.992,
        "how much of the policy's average an update keeps; the average is the model",
        low=0.0,
        below=1.0,
    )
    # A part of the text then has `ptx_ratio` times the rows of a part of the minibatch.
    ptx_micro_batches: int | None = setting(
        None, "parts of the text of an update; none: micro_batches", low=1, needs="ptx_coef"
    )
    # Rows are sorted by length within a minibatch, and each micro-batch computed at the least width
    # that has room for its responses; scoring goes the same way, and sampling goes on in half as
    # many rows, up to one time less than that. Each width and each number of rows is compiled.
    length_buckets: int = setting(
        1, "widths that responses are computed at; more pays where lengths differ", low=1
    )
    log_every: int = 1

    def __post_init__(self) -> None:
        """ConfigError where a batch does not divide or two choices do not fit together."""
        super().__post_init__()
        self._check_batches()
        if self.warmup_iterations > self.iterations:
            raise ConfigError(
                f"warmup_iterations {self.warmup_iterations} of {self.iterations} iterations: the "
                "learning rate is never reached; give fewer of them, or more episodes"
            )
        if self.kl_target is not None and not self.kl_coef:
            raise ConfigError("kl_target steers kl_coef, which is 0 and stays so; give it a value")
        if self.whiten_rewards and self.estimator != "gae":
            raise ConfigError(
                "whiten_rewards leaves the mean of the rewards, and pays it once a token: without "
                f"a value model, as with estimator {self.estimator!r}, that is paid for length"
            )
        self._check_loss()

    def _check_loss(self) -> None:
        grouped, whole = self.estimator in GROUPED, self.ratio in OF_RESPONSES
        if grouped and self.samples_per_prompt < 2:
            raise ConfigError(
                f"estimator {self.estimator!r} compares the samples of a prompt; "
                f"samples_per_prompt is {self.samples_per_prompt}, expected 2 or more"
            )
        if whole and not grouped:
            raise ConfigError(
                f"ratio {self.ratio!r} needs one advantage a response, "
                f"which estimator {self.estimator!r} does not give; use 'rloo' or 'grpo'"
            )
        if whole and self.kl_loss_coef:
            raise ConfigError(
                f"kl_loss_coef is a token loss and ratio is {self.ratio!r}; use kl_coef"
            )
        if self.policy_loss != "clip" and self.ratio != "token":
            raise ConfigError(
                f"policy_loss {self.policy_loss!r} is of the ratio of a token, and ratio is "
                f"{self.ratio!r}"
            )
        if whole and self.mismatch == "token":
            raise ConfigError(
                f"mismatch 'token' weighs tokens, and with ratio {self.ratio!r} a response has "
                "one loss; use 'sequence'"
            )
        for name in ("cispo", "mismatch"):
            low, high = getattr(self, f"{name}_low"), getattr(self, f"{name}_high")
            if low > high:
                raise ConfigError(f"{name}_low {low:g} is above {name}_high {high:g}")

    def _check_batches(self) -> None:
        divided = (
            ("rollout_batch", self.rollout_batch, "minibatch", self.minibatch),
            ("minibatch", self.minibatch, "micro_batches", self.micro_batches),
            ("rollout_batch", self.rollout_batch, "samples_per_prompt", self.samples_per_prompt),
        )
        for whole, rows, part, size in divided:
            if rows % size:
                raise ConfigError(f"{whole} {rows} is not a multiple of {part} {size}")
        text = self.minibatch * self.ptx_ratio
        if self.ptx_coef and text % self.ptx_parts:
            raise ConfigError(
                f"minibatch {self.minibatch} x ptx_ratio {self.ptx_ratio}, {text} rows of text, is "
                f"not a multiple of ptx_micro_batches {self.ptx_parts}"
            )
        if self.episodes < self.rollout_batch:
            raise ConfigError(
                f"episodes {self.episodes} is less than one rollout_batch of {self.rollout_batch}"
            )
        if self.length_buckets > self.response_length:
            raise ConfigError(
                f"length_buckets {self.length_buckets} is not between 1 and "
                f"response_length {self.response_length}"
            )

    def why_stop(self, metrics: Mapping[str, float]) -> str | None:
        """Why the run ends after an iteration of these metrics, where its KL was too large."""
        if self.kl_stop is None or not metrics["kl"] > self.kl_stop:
            return None
        return f"its KL of {metrics['kl']:.4g} nats is above kl_stop {self.kl_stop:g}"

    @property
    def iterations(self) -> int:
        """Rollout batches in the run."""
        return self.episodes // self.rollout_batch

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
