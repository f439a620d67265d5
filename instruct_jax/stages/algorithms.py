"""The critic-free algorithms as configurations of PPO's iteration, with their papers' values.

    PPOConfig()  RLOOConfig()  ReinforcePlusPlusConfig()  GRPOConfig()  DrGRPOConfig()  DAPOConfig()
    GSPOConfig()  GSPOTokenConfig()  CISPOConfig()  SAPOConfig()

What makes each is in the table of ppo_config.py. Any field may be given another value; where what
comes of that is no algorithm of these, `named` says what sets it apart, and a run says it first of
all. What a paper does not say has PPO's default.
"""

from dataclasses import dataclass
from typing import Literal

from instruct_jax.settings import about, why_idle
from instruct_jax.stages.ppo_config import PPOConfig

Estimator = Literal["gae", "rloo", "grpo", "reinforce++"]
Ratio = Literal["token", "sequence", "sequence_mean", "sequence_mean_token"]
PolicyLoss = Literal["clip", "cispo", "sapo"]
Reduction = Literal["token_mean", "seq_mean", "seq_sum_const"]
Whitening = Literal["rollout", "minibatch", "none"]


@dataclass(frozen=True)
class RLOOConfig(PPOConfig):
    """Ahmadian et al. 2024, section 4 and appendix: a response is one action; KL in the reward."""

    estimator: Estimator = "rloo"
    ratio: Ratio = "sequence"
    whiten_advantages: Whitening = "none"
    samples_per_prompt: int = 4
    minibatch: int = 512
    kl_coef: float = 0.03
    learning_rate: float = 1e-6


@dataclass(frozen=True)
class ReinforcePlusPlusConfig(PPOConfig):
    """Hu et al. 2025, section 3: token rewards to go, normalised over the batch; KL in the reward.

    With several samples a prompt the group's mean is taken off: its "-baseline" form.
    """

    estimator: Estimator = "reinforce++"
    whiten_advantages: Whitening = "none"


@dataclass(frozen=True)
class GRPOConfig(PPOConfig):
    """Shao et al. 2024 (DeepSeekMath), section 4.2: one update a rollout, KL in the loss."""

    estimator: Estimator = "grpo"
    whiten_advantages: Whitening = "none"
    loss_reduction: Reduction = "seq_mean"
    samples_per_prompt: int = 64
    rollout_batch: int = 1024
    minibatch: int = 1024
    kl_coef: float = 0.0
    kl_loss_coef: float = 0.04
    learning_rate: float = 1e-6


@dataclass(frozen=True)
class DrGRPOConfig(GRPOConfig):
    """Liu et al. 2025, section 3.2: no scale by the deviation, no weight by length, no KL."""

    group_scale: Literal["group", "batch", "none"] = "none"
    loss_reduction: Reduction = "seq_sum_const"
    samples_per_prompt: int = 8
    minibatch: int = 128
    kl_loss_coef: float = 0.0


@dataclass(frozen=True)
class DAPOConfig(GRPOConfig):
    """Yu et al. 2025, sections 3 and 4.1: a higher upper clip, tokens weigh alike, no KL, groups
    without signal replaced. The paper sets no bound on that; 10 is that of its published script.

    Not done here: the soft punishment of overlong responses.
    """

    loss_reduction: Reduction = "token_mean"
    samples_per_prompt: int = 16
    rollout_batch: int = 8192
    minibatch: int = 512
    clip_high: float | None = 0.28
    kl_loss_coef: float = 0.0
    max_resamples: int = 10


@dataclass(frozen=True)
class GSPOConfig(GRPOConfig):
    """Zheng et al. 2025, section 5.1: one ratio a response, its clip range, four minibatches."""

    ratio: Ratio = "sequence_mean"
    clip: float = 3e-4
    clip_high: float | None = 4e-4
    minibatch: int = 256
    kl_loss_coef: float = 0.0


@dataclass(frozen=True)
class GSPOTokenConfig(GSPOConfig):
    """Zheng et al. 2025, section 4.3: the ratio of the response, the gradient of each token."""

    ratio: Ratio = "sequence_mean_token"


@dataclass(frozen=True)
class CISPOConfig(DAPOConfig):
    """MiniMax 2025 (MiniMax-M1), section 3.1: bounded weights in DAPO's place of a clip, with its
    token mean and its dynamic sampling. The upper bound is of Khatri et al. 2025.
    """

    policy_loss: PolicyLoss = "cispo"
    clip_high: float | None = None


@dataclass(frozen=True)
class SAPOConfig(GRPOConfig):
    """Gao et al. 2025, section 4: a smooth gate in place of the clip, four minibatches, no KL."""

    policy_loss: PolicyLoss = "sapo"
    minibatch: int = 256
    kl_loss_coef: float = 0.0


ALGORITHMS: dict[str, PPOConfig] = {
    "RLOO": RLOOConfig(),
    "REINFORCE++": ReinforcePlusPlusConfig(),
    "GRPO": GRPOConfig(),
    "Dr. GRPO": DrGRPOConfig(),
    "DAPO": DAPOConfig(),
    "GSPO": GSPOConfig(),
    "GSPO-token": GSPOTokenConfig(),
    "CISPO": CISPOConfig(),
    "SAPO": SAPOConfig(),
}
_MAKES = ("policy_loss", "ratio", "loss_reduction", "group_scale", "whiten_advantages")
# How much there is of these is a matter of tuning, whether there is any is not.
_SWITCHES = ("kl_coef", "kl_loss_coef", "max_resamples")


def named(config: PPOConfig) -> str:
    """The algorithm that `config` makes, or the nearest one and what sets `config` apart from it.

    >>> named(GRPOConfig(kl_loss_coef=0.6)), named(GRPOConfig(whiten_advantages="rollout"))
    ('GRPO', "GRPO but for whiten_advantages 'rollout', there 'none'")
    """
    if config.estimator == "gae":
        mix = "-ptx" if config.ptx_coef else ""
        own = ((n, getattr(config, n), getattr(PPOConfig(), n)) for n in _MAKES[:3])
        apart = "; ".join(f"{n} {x!r}, there {usual!r}" for n, x, usual in own if x != usual)
        return f"PPO{mix}{apart and ' but for '}{apart}"
    apart_from = {
        name: _apart(config, usual)
        for name, usual in ALGORITHMS.items()
        if usual.estimator == config.estimator
    }
    # What has a ratio, and what becomes of it, say most of an algorithm.
    name = min(
        apart_from,
        key=lambda name: (
            ALGORITHMS[name].ratio != config.ratio,
            ALGORITHMS[name].policy_loss != config.policy_loss,
            len(apart_from[name]),
        ),
    )
    differences = "; ".join(apart_from[name])
    return f"{name} but for {differences}" if differences else name


def _apart(config: PPOConfig, usual: PPOConfig) -> list[str]:
    """What `config` does otherwise than `usual`, each in a few words."""
    found = []
    for field in _MAKES:
        own, theirs = getattr(config, field), getattr(usual, field)
        if own != theirs and why_idle(config, about(PPOConfig, field).needs) is None:
            found.append(f"{field} {own!r}, there {theirs!r}")
    for field in _SWITCHES:
        own, theirs = getattr(config, field), getattr(usual, field)
        if bool(own) != bool(theirs):
            found.append(f"{field} {own:g}, there {theirs:g}")
    if config.ratio == usual.ratio and why_idle(config, about(PPOConfig, "clip").needs) is None:
        own, theirs = (c.clip if c.clip_high is None else c.clip_high for c in (config, usual))
        # A response's ratio moves a thousandth of a token's; an upper clip alone is DAPO's.
        if not 0.1 < config.clip / usual.clip < 10.0:
            found.append(f"clip {config.clip:g}, there {usual.clip:g}")
        elif (own > config.clip) != (theirs > usual.clip):
            found.append(f"clip_high {own:g}, there {theirs:g}")
    return found
