"""Rewards to be named by file and function, and a pattern for your own:

    python experiments/ppo.py --config=configs/grpo.py:verifiable \\
        --config.rewards="('python=experiments/rewards.py:number',)"

A function is given `Answers` (instruct_jax/stages/rewards.py): lists of prompts, responses, their
token ids, whether each ended, and `meta`, what else stands in a prompt's row; `reference` there is
the answer that the row gives.
"""

import re
from functools import cache

from instruct_jax.data.rows import Prompt
from instruct_jax.data.toyworld import ToyWorld
from instruct_jax.stages.rewards import Answers

# What GSM8K's answers end with.
MARKER = "####"
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def number(answers: Answers) -> list[float]:
    """1 for a response whose final number is the reference's, else 0."""
    pairs = zip(answers.responses, answers.meta, strict=True)
    return [float(same_number(response, str(meta["reference"]))) for response, meta in pairs]


def exact(answers: Answers) -> list[float]:
    """1 for a response that is the reference but for spaces around it, else 0."""
    pairs = zip(answers.responses, answers.meta, strict=True)
    return [float(text.strip() == str(meta["reference"]).strip()) for text, meta in pairs]


def ended(answers: Answers) -> list[float]:
    """1 for a response that ended within its budget, else 0."""
    return [float(x) for x in answers.ended]


def gold(answers: Answers) -> list[float]:
    """The overall grade of the embedded world's judge, for its own prompts."""
    rows = zip(answers.prompts, answers.meta, answers.responses, answers.ended, strict=True)
    return [
        float(_world().judge(Prompt(prompt, meta), response, ended).overall)
        for prompt, meta, response, ended in rows
    ]


def same_number(response: str, reference: str) -> bool:
    """Whether two texts come to one number: what follows the marker, or without one the last.

    >>> same_number("so it is #### 1,024", "2^10 #### 1024"), same_number("12 or 13", "#### 12")
    (True, False)
    """
    found, wanted = (final_number(text) for text in (response, reference))
    return found is not None and found == wanted


def final_number(text: str) -> float | None:
    """The number after the last marker, or without a marker the last one; None without any."""
    _, marker, after = text.rpartition(MARKER)
    numbers = _NUMBER.findall(after if marker else text)
    if not numbers:
        return None
    return float(numbers[0 if marker else -1].replace(",", ""))


@cache
def _world() -> ToyWorld:
    return ToyWorld(0)
