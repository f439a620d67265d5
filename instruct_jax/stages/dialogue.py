"""How a model is asked: which words go around a question, and a dialogue that goes on.

A model is asked in the template that it was fine-tuned on here, else in its own chat template, else
with the bare text, after what its tokenizer puts before one (BOS).
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from instruct_jax.data.chat_template import ChatTemplate
from instruct_jax.data.jinja import check_template
from instruct_jax.data.rows import Turn
from instruct_jax.data.templates import PLAIN, Template, encode_texts, template_named
from instruct_jax.data.tokenizer import Tokenizer
from instruct_jax.errors import ConfigError
from instruct_jax.stages.reward_model import score_rows
from instruct_jax.stages.trained import TrainedModel

OWN = "model"
_WIDTH_STEP = 64  # widths that recur: a program each


class Asking(Protocol):
    """From turns, of which the last is a question, to the ids that are answered."""

    name: str

    def ids(self, turns: Sequence[Turn]) -> list[int]:
        """The ids of a prompt; ValueError for turns that the template does not take."""
        ...

    def more(self, turns: Sequence[Turn]) -> list[int] | None:
        """The ids of the last question alone, as they follow an answer and its end; None where the
        template writes what came before in another way once there is more.
        """
        ...


def way_of_asking(trained: TrainedModel, name: str | None = None) -> Asking:
    """How `trained` is asked: by the template `name` ("model" is its own), or as it was trained.

    ConfigError for a name that it does not have, and for a template of its own that fails.
    """
    tokenizer = trained.tokenizer
    chosen = name or trained.template or (OWN if tokenizer.chat is not None else PLAIN.name)
    if chosen != OWN:
        try:
            return _Ours(template_named(chosen), tokenizer)
        except ValueError as error:
            raise ConfigError(f"config.template: {error}, {OWN} (the model's own)") from error
    if tokenizer.chat is None:
        raise ConfigError("config.template=model: the model's folder has no chat template")
    try:
        check_template(tokenizer.chat, tokenizer.named)
    except ValueError as error:
        raise ConfigError(f"the model's chat template: {error}; name another one") from error
    return _Own(ChatTemplate(tokenizer.chat, tokenizer))


class Speaker(NamedTuple):
    """A model and how it is asked; with a reward model, who scores its answers."""

    trained: TrainedModel
    asking: Asking
    judge: tuple[TrainedModel, Asking] | None = None

    def score(self, turns: Sequence[Turn], answer: str, tokens: Sequence[int]) -> float | None:
        """What the reward model says of an answer; None where there is none, or no room in it.

        The tokens are read as they were drawn; one of another tokenizer reads the text and its EOS.
        """
        if self.judge is None:
            return None
        reward, asking = self.judge
        own = reward.tokenizer
        if own.fingerprint != self.trained.tokenizer.fingerprint:
            tokens = [*own.encode(answer), own.eos_id]
        row = [*asking.ids(turns), *tokens]
        most = reward.config.max_length
        if len(row) > most:
            return None
        width = min(-(-len(row) // _WIDTH_STEP) * _WIDTH_STEP, most)
        ids = np.full((1, width), own.pad_id, np.int32)
        ids[0, : len(row)] = row
        mask = np.arange(width)[None] < len(row)
        return float(score_rows(reward.model, reward.params, ids, mask)[0])


class _Ours:
    """One of templates.py."""

    def __init__(self, template: Template, tokenizer: Tokenizer) -> None:
        self._template, self._tokenizer = template, tokenizer
        self.name = template.name

    def ids(self, turns: Sequence[Turn]) -> list[int]:
        prompt = self._template.prompt(turns)
        return [*self._tokenizer.prefix, *encode_texts([prompt], self._tokenizer)[0]]

    def more(self, turns: Sequence[Turn]) -> list[int] | None:
        return self._tokenizer.encode(self._template.segments(turns)[-1].text)


class _Own:
    """A chat template of the model's own."""

    name = OWN

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template

    def ids(self, turns: Sequence[Turn]) -> list[int]:
        return self._template.encode(_messages(turns), add_generation_prompt=True).ids

    def more(self, turns: Sequence[Turn]) -> list[int] | None:
        return self._template.encode_after(_messages(turns))


def _messages(turns: Sequence[Turn]) -> list[dict[str, str]]:
    return [{"role": turn.role, "content": turn.text} for turn in turns]


class Dialogue:
    """Turns with a model, whose ids are carried on: what it has drawn is never encoded again."""

    def __init__(self, asking: Asking, stop_ids: Sequence[int], *, system: str = "") -> None:
        self._asking, self._stop_ids = asking, frozenset(stop_ids)
        self.turns: list[Turn] = [Turn("system", system)] if system.strip() else []
        self._ids: list[int] | None = None

    def ask(self, question: str) -> list[int]:
        """The ids of the dialogue with `question` at its end; ValueError, and the question is not
        taken, where the template refuses it.
        """
        turns = [*self.turns, Turn("user", question)]
        more = None if self._ids is None else self._asking.more(turns)
        ids = self._asking.ids(turns) if more is None or self._ids is None else self._ids + more
        self.turns, self._ids = turns, ids
        return list(ids)

    def answered(self, tokens: Sequence[int], text: str) -> None:
        """What was drawn for the last question, and its text. Only an answer with its end token can
        be gone on from as it is.
        """
        self.turns.append(Turn("assistant", text))
        whole = self._ids is not None and tokens and tokens[-1] in self._stop_ids
        self._ids = [*(self._ids or ()), *tokens] if whole else None
