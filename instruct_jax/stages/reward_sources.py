"""Where rewards come from, and how a command line names them.

    model=FOLDER                 a reward model, of any tokenizer
    models=FOLDER,FOLDER:mean    an ensemble; also `min`, the worst case, and `mean-0.5sd`, which
                                 takes so many times their spread off the mean
    python=FILE.py:NAME          a function of `Answers` (rewards.py)
    endpoint=URL                 POST {"query": [...], "prompts": [...]} -> {"rewards": [...]}, as
                                 OpenRLHF's /get_reward; a query is the prompt and its response

Each may end with * and a weight: "python=rewards.py:exact*0.5".
"""

import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from instruct_jax.data.tokenizer import Tokenizer
from instruct_jax.errors import ConfigError, RewardError
from instruct_jax.sampling.complete import Completion
from instruct_jax.stages.functions import python_function
from instruct_jax.stages.reward_model import score_answers
from instruct_jax.stages.rewards import Answers, Reward, Weighted, unique_names
from instruct_jax.stages.trained import TrainedModel

# Of what an endpoint may answer.
LARGEST_REPLY = 64 * 1024 * 1024


@dataclass(frozen=True)
class ModelReward:
    """A reward model beside PPO's own. One of the policy's `tokenizer` reads its tokens, another
    one the text in its own (`score_answers`).
    """

    reward: TrainedModel
    tokenizer: Tokenizer
    prompt_length: int
    response_length: int

    def __call__(self, answers: Answers) -> np.ndarray:
        """float32[B]. Raises RewardError for a prompt or an answer that is too long for it."""
        rows = zip(answers.responses, answers.ended, answers.response_ids, strict=True)
        own, lengths = self.reward.tokenizer, [0, 0]
        if own.fingerprint != self.tokenizer.fingerprint:
            for i, texts in enumerate((answers.prompts, answers.responses)):
                lengths[i] = 1 + max(map(len, own.encode_batch(list(texts))))
        longest = max(self.prompt_length, lengths[0]), max(self.response_length, lengths[1])
        if sum(longest) > self.reward.config.max_length:
            raise RewardError(
                f"{longest[0]} + {longest[1]} tokens do not fit the reward model's max_length "
                f"{self.reward.config.max_length}"
            )
        limit = self.reward.config.max_length
        # Rounded up where there is room, so that few programs are compiled.
        prompt, response = (-(-n // 16) * 16 for n in longest)
        prompt = min(prompt, limit - longest[1])
        return score_answers(
            self.reward,
            self.tokenizer,
            answers.prompts,
            [Completion(*row) for row in rows],
            prompt_length=prompt,
            response_length=min(response, limit - prompt),
        )


@dataclass(frozen=True)
class Ensemble:
    """Several rewards of whole responses as one: their mean, less `spread` deviations of them, or
    the least.
    """

    members: Sequence[Reward]
    least: bool = False
    spread: float = 0.0

    def __call__(self, answers: Answers) -> np.ndarray:
        """float32[B]."""
        scores = np.stack([np.asarray(member(answers), np.float32) for member in self.members])
        if self.least:
            return np.asarray(scores.min(0))
        return np.asarray(scores.mean(0) - self.spread * scores.std(0))


@dataclass(frozen=True)
class Endpoint:
    """A service that speaks OpenRLHF's protocol."""

    url: str
    seconds: float

    def __call__(self, answers: Answers) -> list[Any]:
        """What it says of each answer. Raises RewardError where it says nothing of use."""
        pairs = zip(answers.prompts, answers.responses, strict=True)
        asked = {"query": [a + b for a, b in pairs], "prompts": list(answers.prompts)}
        request = urllib.request.Request(
            self.url, json.dumps(asked).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=self.seconds) as reply:
                found = json.loads(reply.read(LARGEST_REPLY))
            rewards = found["rewards"]
            if not isinstance(rewards, list):
                raise TypeError("no list")
        except urllib.error.HTTPError as error:
            with error:
                raise RewardError(f"{self.url}: {error}") from error
        except OSError as error:
            raise RewardError(f"{self.url}: {error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise RewardError(f'{self.url}: no {{"rewards": [...]}} came back ({error})') from error
        return rewards


def named_rewards(
    texts: Sequence[str], *, model: Callable[[str], Reward], seconds: float
) -> tuple[Weighted, ...]:
    """The rewards that a command line names, in the form above; `model(folder)` makes that of a
    reward model. Raises ConfigError.
    """
    return tuple(unique_names([_named(text, model, seconds) for text in texts]))


def _named(text: str, model: Callable[[str], Reward], seconds: float) -> Weighted:
    what, weight = text, 1.0
    if (match := re.fullmatch(r"(.*)\*(-?[\d.]+(?:e[+-]?\d+)?)", text)) is not None:
        what = match[1]
        try:
            weight = float(match[2])
        except ValueError:
            raise ConfigError(f"rewards: {text!r}: {match[2]!r} is no weight") from None
    kind, equals, where = what.partition("=")
    if not equals or not where:
        raise ConfigError(f"rewards: {text!r} is not KIND=WHAT; kinds are {', '.join(_KINDS)}")
    if kind == "model":
        return Weighted(_folder_name(where), model(where), weight)
    if kind == "models":
        return Weighted("ensemble", _ensemble(where, model), weight)
    if kind == "python":
        return Weighted(where.rpartition(":")[2], python_function(where, field="rewards"), weight)
    if kind == "endpoint":
        if urlsplit(where).scheme not in ("http", "https"):
            raise ConfigError(f"rewards: {text!r}: expected http://... or https://...")
        return Weighted("endpoint", Endpoint(where, seconds), weight)
    raise ConfigError(f"rewards: no kind {kind!r}; there are {', '.join(_KINDS)}")


_KINDS = ("model", "models", "python", "endpoint")


def _ensemble(where: str, model: Callable[[str], Reward]) -> Ensemble:
    folders, _, how = where.rpartition(":")
    match = re.fullmatch(r"mean|min|mean-([\d.]+)sd", how)
    if not folders or match is None:
        raise ConfigError(
            f"rewards: models={where!r}: expected FOLDER,FOLDER:mean, :min or :mean-0.5sd"
        )
    members = [model(folder) for folder in folders.split(",")]
    return Ensemble(members, least=how == "min", spread=float(match[1] or 0.0))


def _folder_name(folder: str) -> str:
    """RUN of RUN/model, else the folder's own name."""
    path = Path(folder)
    return path.parent.name if path.name == "model" and path.parent.name else path.name
