"""What an iteration of PPO is given: prompts, those of rollouts that it may add, and text."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from instruct_jax.errors import ConfigError
from instruct_jax.stages.ppo_config import PPOConfig
from instruct_jax.stages.pretrain import language_rows

RowsAt = Callable[[int], dict[str, np.ndarray]]


class IterationBatches(NamedTuple):
    """Of iteration i: the prompts that it answers, those of i + `lag`, of `tries` more rollouts the
    prompts of a stream of their own, and for PPO-ptx its pretraining rows; a pure function of i.
    """

    prompts: RowsAt
    text: RowsAt | None
    updates: int
    lag: int = 0
    more: RowsAt | None = None
    tries: int = 0

    def answered(self, step: int) -> dict[str, Any]:
        """The prompts that iteration `step` answers."""
        step += self.lag
        batch = _asked(self.prompts(step))
        if self.more is not None:
            at = range(step * self.tries, (step + 1) * self.tries)
            batch["more"] = [_asked(self.more(i)) for i in at]
        return batch

    def __call__(self, step: int) -> dict[str, Any]:
        """The batch of iteration `step`."""
        batch = self.answered(step)
        if self.text is not None:
            tokens = self.text(step)["tokens"]
            shaped = tokens.reshape(self.updates, -1, tokens.shape[-1])
            batch["text"] = language_rows(shaped)
        return batch


def _asked(rows: dict[str, np.ndarray]) -> dict[str, Any]:
    index = {"index": rows["index"]} if "index" in rows else {}
    return {"prompts": rows["tokens"], "prompt_mask": rows["mask"]} | index


def iteration_batches(
    config: PPOConfig,
    prompts: RowsAt,
    ptx: RowsAt | None,
    more_prompts: RowsAt | None,
) -> IterationBatches:
    """Those of a run. ConfigError where text or prompts that it needs are not given."""
    if not config.ptx_coef:
        ptx = None
    elif ptx is None:
        raise ConfigError(f"ptx_coef {config.ptx_coef} needs pretraining text; none was given")
    if not config.max_resamples:
        more_prompts = None
    elif more_prompts is None:
        raise ConfigError(f"max_resamples {config.max_resamples} needs more prompts")
    lag, tries = config.rollout_lag, config.max_resamples
    return IterationBatches(prompts, ptx, config.updates, lag, more_prompts, tries)
