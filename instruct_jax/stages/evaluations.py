"""Evaluations of a user's own, and the model that was the best at one.

    --config.evaluate_with=my_eval.py:addition --config.sft.best_metric=addition/exact \\
        --config.sft.best_mode=max

    def addition(run):                      # an `Evaluated`
        sums = [(a, b) for a in range(10) for b in range(10)]
        answers = run.generate([f"{a} + {b} =" for a, b in sums], max_new_tokens=4)
        right = [x.text.strip() == str(a + b) for x, (a, b) in zip(answers, sums)]
        return {"exact": sum(right) / len(right)}

The function is called whenever the stage evaluates, and what it returns is logged under its name:
"addition/exact", or "addition" where it returns one number. Of several processes all call it, and
it must return the same in each.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from instruct_jax.data.rows import PromptText
from instruct_jax.data.templates import encode_texts
from instruct_jax.data.tokenizer import Tokenizer
from instruct_jax.errors import EvaluationError
from instruct_jax.models.transformer import Model
from instruct_jax.sampling.complete import Completion, complete
from instruct_jax.settings import setting
from instruct_jax.stages.functions import python_function
from instruct_jax.stages.reward_model import score_answers
from instruct_jax.stages.stage import OnBest
from instruct_jax.stages.trained import TrainedModel, save_trained
from instruct_jax.training.keeping import Best

Evaluate = Callable[[int, Any], dict[str, float]]


def evaluate_with(needs: str = "") -> Any:
    """The field of a script's configuration."""
    text = "FILE.py:FUNCTION, called at every evaluation; its numbers are logged under its name"
    return setting(None, text, needs=needs)


@dataclass(frozen=True)
class Evaluated:
    """The model of a run as it is after `step` updates (of PPO, iterations)."""

    step: int
    model: Model
    """its pure functions, of `params`"""
    params: Any
    """whole parameters, an adapter merged; of PPO the average of the policy"""
    tokenizer: Tokenizer
    mesh: Mesh
    trained: TrainedModel

    def generate(
        self,
        prompts: Sequence[PromptText],
        *,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        seed: int = 0,
        **sampling: Any,
    ) -> list[Completion]:
        """The answer of a language model to each prompt, which is read as it stands, in no
        template. Greedy by default; `sampling` is of `complete`.
        """
        options = {"max_new_tokens": max_new_tokens, "temperature": temperature} | sampling
        key = jax.random.key(seed)
        of = self.model, self.params, self.tokenizer
        return complete(*of, prompts, key=key, mesh=self.mesh, **options)

    def score(self, prompts: Sequence[PromptText], answers: Sequence[str]) -> np.ndarray:
        """float32[N], what a reward model says of each whole answer to its prompt."""
        own = self.tokenizer
        ids = [(*tokens, own.eos_id) for tokens in own.encode_batch(list(answers))]
        told = [Completion(text, True, row) for text, row in zip(answers, ids, strict=True)]
        longest = (max(map(len, rows), default=1) for rows in (encode_texts(prompts, own), ids))
        form = dict(zip(("prompt_length", "response_length"), longest, strict=True))
        model = self.trained._replace(params=self.params)
        return score_answers(model, own, prompts, told, **form)


@dataclass(frozen=True)
class Users:
    """A function of the user's, by the name that it was given."""

    name: str
    function: Callable[[Evaluated], Any]

    def __call__(self, evaluated: Evaluated) -> dict[str, float]:
        """Its numbers, each under its name. EvaluationError where it raises or returns others."""
        where = f"evaluate_with {self.name}: step {evaluated.step}"
        try:
            found = self.function(evaluated)
        except Exception as error:  # whatever the user's code does
            raise EvaluationError(f"{where}: {type(error).__name__}: {error}") from error
        named = found if isinstance(found, Mapping) else {"": found}
        try:
            return {
                f"{self.name}/{key}".removesuffix("/"): float(value) for key, value in named.items()
            }
        except (TypeError, ValueError) as error:
            raise EvaluationError(f"{where}: expected numbers by name ({error})") from error


def users_evaluation(text: str | None) -> Users | None:
    """The function that FILE.py:FUNCTION names. Raises ConfigError."""
    if text is None:
        return None
    name = text.rpartition(":")[2]
    return Users(name, python_function(text, field="evaluate_with"))


def with_users(
    own: Evaluate | None,
    users: Users | None,
    trained: TrainedModel,
    mesh: Mesh,
    *,
    params: Callable[[Any], Any] = lambda state: state.params,
) -> Evaluate | None:
    """The stage's own evaluation, and the user's of the model that `trained` names, with
    `params(state)`; None where there is neither.
    """
    if users is None:
        return own

    def both(step: int, state: Any) -> dict[str, float]:
        found = {} if own is None else own(step, state)
        told = Evaluated(step, trained.model, params(state), trained.tokenizer, mesh, trained)
        return {**found, **users(told)}

    return both


def keeping_best(workdir: Path, trained: TrainedModel, say: Callable[[str], None]) -> OnBest:
    """Writes the best model, `trained` with other parameters, to WORKDIR/best, and says so."""

    def keep(best: Best, params: Any) -> None:
        notes = {"step": best.step, best.metric: best.value}
        folder = save_trained(workdir / "best", trained._replace(params=params), notes=notes)
        say(f"best model: {folder} ({best} at step {best.step})")

    return keep
