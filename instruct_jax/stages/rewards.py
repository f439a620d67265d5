"""Rewards from anywhere: what scores a rollout besides the reward model on the device.

A reward is a function of `Answers`, B of them, that returns a number for each, or for each a list
with one number a token of its response:

    def short(answers):
        return [-len(text) / 100 for text in answers.responses]

`HostRewards` asks several at a time while the device reads the rollout, in batches and within a
limit of time, and adds them up by their weights. What raises, hangs, or returns a wrong count or a
number that is not finite ends the run (`RewardError`): a score that is made up is worse than none.
Where functions are deterministic a run that is taken up ends with the same bits.
"""

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, Protocol

import numpy as np

from instruct_jax.data.rows import Prompt, plain_text
from instruct_jax.data.tokenizer import Tokenizer
from instruct_jax.errors import RewardError
from instruct_jax.sampling.complete import completions_of
from instruct_jax.sampling.sampler import Rollout
from instruct_jax.training import hosts


@dataclass(frozen=True)
class Answers:
    """Prompts with a sampled response each, B of them, as text and as the policy's tokens."""

    prompts: Sequence[str]
    responses: Sequence[str]  # without the stop token
    prompt_ids: Sequence[tuple[int, ...]]
    response_ids: Sequence[tuple[int, ...]]  # the stop token included
    ended: Sequence[bool]  # by the stop token, not by the budget
    # What else the rows of the prompts hold; "reference" is the answer that stands beside one.
    meta: Sequence[Mapping[str, Any]]

    def __len__(self) -> int:
        return len(self.prompts)

    def part(self, start: int, stop: int) -> "Answers":
        """Those from `start` to before `stop`."""
        return Answers(**{name: values[start:stop] for name, values in vars(self).items()})


class Reward(Protocol):
    """What may be asked for rewards."""

    def __call__(self, answers: Answers) -> Sequence[float] | Sequence[Sequence[float]]:
        """One number an answer, or one a token of each response."""
        ...


class Weighted(NamedTuple):
    """A reward of a sum, and what it is called in the logs."""

    name: str
    reward: Reward
    weight: float = 1.0


class Given(NamedTuple):
    """The weighted sum of rewards that were asked for."""

    scores: np.ndarray  # float32[B], of whole responses
    tokens: np.ndarray  # float32[B, R], of single tokens


@dataclass(frozen=True)
class HostRewards:
    """All rewards of a run that no program of PPO computes.

    `rows` are the prompts that a rollout's `index` counts. A reward is asked about `batch` answers
    at a time, and has `seconds` for them. Of several processes the first asks.
    """

    rewards: Sequence[Weighted]
    rows: Sequence[Prompt]
    tokenizer: Tokenizer
    seconds: float = 60.0
    batch: int = 64

    def __call__(self, rollout: Rollout, index: np.ndarray) -> tuple[Given, dict[str, np.ndarray]]:
        """The rewards of a rollout of the prompts `rows[index]`, int[N], and their logs.

        Raises RewardError, in every process.
        """
        rollout = hosts.fetch(rollout)
        asked: Callable[[], Any] = lambda: self._ask(rollout, index)  # noqa: E731
        given, means = hosts.of_first(asked, self._nothing(rollout))
        logs = {f"reward_{w.name}": mean for w, mean in zip(self.rewards, means, strict=True)}
        return given, logs

    def _nothing(self, rollout: Rollout) -> tuple[Given, np.ndarray]:
        """The shapes of what `_ask` returns."""
        where = rollout.response_mask
        given = Given(np.zeros(len(where), np.float32), np.zeros(where.shape, np.float32))
        return given, np.zeros(len(self.rewards), np.float32)

    def _ask(self, rollout: Rollout, index: np.ndarray) -> tuple[Given, np.ndarray]:
        answers = answers_of(rollout, [self.rows[i] for i in index], self.tokenizer)
        working = [_Working(lambda w=w: self._of_one(w, answers)) for w in self.rewards]
        given, means = self._nothing(rollout)
        for i, (weighted, work) in enumerate(zip(self.rewards, working, strict=True)):
            found = work.result()
            means[i] = np.mean([np.sum(x) for x in found])
            for row, x in enumerate(found):
                if x.ndim:
                    given.tokens[row, : len(x)] += weighted.weight * x
                else:
                    given.scores[row] += weighted.weight * x
        return given, means

    def _of_one(self, weighted: Weighted, answers: Answers) -> list[np.ndarray]:
        """float[] or float[tokens] of each answer."""
        found: list[np.ndarray] = []
        for start in range(0, len(answers), self.batch):
            part = answers.part(start, start + self.batch)
            found += _checked(weighted, part, self.seconds, first=start)
        if len({x.ndim for x in found}) > 1:
            raise RewardError(
                f"reward {weighted.name}: gives a number to some answers and a list to others"
            )
        return found


def answers_of(rollout: Rollout, prompts: Sequence[Prompt], tokenizer: Tokenizer) -> Answers:
    """The rows of a rollout of N prompts (in host memory), B / N samples of each in a row."""
    tokens, mask, where = (np.asarray(x) for x in rollout[:3])
    width, samples = where.shape[1], len(tokens) // len(prompts)
    asked = [prompt for prompt in prompts for _ in range(samples)]
    completions = completions_of(rollout, tokenizer)
    rows = zip(tokens[:, :-width], mask[:, :-width], strict=True)
    return Answers(
        prompts=[plain_text(prompt.text) for prompt in asked],
        responses=[completion.text for completion in completions],
        prompt_ids=[tuple(row[real].tolist()) for row, real in rows],
        response_ids=[completion.tokens for completion in completions],
        ended=[completion.ended for completion in completions],
        meta=[prompt.meta for prompt in asked],
    )


def _checked(weighted: Weighted, answers: Answers, seconds: float, *, first: int) -> list[Any]:
    """The rewards of `answers`, rows `first` and on of the rollout. Raises RewardError."""
    rows = f"reward {weighted.name}, rows {first} to {first + len(answers) - 1}"
    try:
        found = _Working(lambda: list(weighted.reward(answers))).result(seconds)
    except TimeoutError:
        raise RewardError(f"{rows}: nothing came within {seconds:g} seconds") from None
    except RewardError as error:
        raise RewardError(f"{rows}: {error}") from error
    except Exception as error:  # whatever a user's function raises
        row, why = _culprit(weighted.reward, answers, error, seconds)
        where = rows if row is None else _row(weighted, answers, row, first)
        raise RewardError(f"{where}: {type(why).__name__}: {why}") from error
    if len(found) != len(answers):
        raise RewardError(f"{rows}: {len(found)} rewards for {len(answers)} answers")
    return [_numbers(x, answers, i, weighted, first) for i, x in enumerate(found)]


def _numbers(value: Any, answers: Answers, i: int, weighted: Weighted, first: int) -> np.ndarray:
    """float32[] or float32[tokens] of one answer. Raises RewardError."""
    where = _row(weighted, answers, i, first)
    try:
        numbers = np.asarray(value, np.float32)
    except (TypeError, ValueError):
        raise RewardError(f"{where}: {value!r} is no number") from None
    tokens = len(answers.response_ids[i])
    if numbers.ndim > 1 or (numbers.ndim == 1 and len(numbers) != tokens):
        raise RewardError(f"{where}: numbers of shape {numbers.shape} for {tokens} tokens")
    if not np.isfinite(numbers).all():
        raise RewardError(f"{where}: {value!r} is not finite")
    return numbers


def _row(weighted: Weighted, answers: Answers, i: int, first: int) -> str:
    prompt, response = answers.prompts[i], answers.responses[i]
    return f"reward {weighted.name}, row {first + i} ({prompt[-60:]!r} -> {response[:60]!r})"


def _culprit(
    reward: Reward, answers: Answers, error: Exception, seconds: float
) -> tuple[int | None, Exception]:
    """The first answer that alone raises too, and what; None where none does."""
    for i in range(len(answers)):
        try:
            _Working(lambda i=i: list(reward(answers.part(i, i + 1)))).result(seconds)
        except TimeoutError:
            return None, error
        except Exception as alone:
            return i, alone
    return None, error


class _Working:
    """A call in a thread of its own, which may be left behind: it ends with the process at last."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self._done: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()

        def work() -> None:
            try:
                self._done.put((call(), None))
            except BaseException as error:  # raised where the result is asked for
                self._done.put((None, error))

        threading.Thread(target=work, daemon=True).start()

    def result(self, seconds: float = math.inf) -> Any:
        """What the call returned, or raises what it raised; TimeoutError where it is not done."""
        try:
            found, error = self._done.get(timeout=None if math.isinf(seconds) else seconds)
        except Empty:
            raise TimeoutError from None
        if error is not None:
            raise error
        return found


def unique_names(rewards: Sequence[Weighted]) -> Iterator[Weighted]:
    """`rewards`, those of a name that another has numbered."""
    seen: dict[str, int] = {}
    for weighted in rewards:
        seen[weighted.name] = seen.get(weighted.name, 0) + 1
        count = seen[weighted.name]
        yield weighted if count == 1 else weighted._replace(name=f"{weighted.name}_{count}")
