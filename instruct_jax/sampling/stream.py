"""Answers as they come: the new text of every row after a few tokens of each, and stop texts.

A stop text ends an answer wherever it stands in what was decoded, also across tokens, and is not
part of it. Text that may yet become one, or that ends in the middle of a character, waits.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from instruct_jax.data.tokenizer import Tokenizer
from instruct_jax.sampling.engine import Engine

End = Literal["stop", "length"]


class Piece(NamedTuple):
    """What is new of the answer to prompt `number`."""

    number: int
    text: str
    end: End | None = None  # by an end token or stop text, or by the budget; None while it goes on
    tokens: tuple[int, ...] = ()  # at its end: all that were drawn
    log_probs: tuple[float, ...] = ()  # of those


def stream(
    engine: Engine, tokenizer: Tokenizer, *, stops: Sequence[str] = (), turns: int = 8
) -> Iterator[Piece]:
    """Steps `engine`, `turns` tokens of each row at a time, until nothing waits or lives.

    Every row ends with one Piece that says how. The text of a row's pieces, joined, is that of its
    tokens without the end token, up to the first of `stops` in it.
    """
    said: dict[int, int] = {}
    while engine.busy:
        ended = engine.step(turns)
        for number, tokens in engine.drawn_by().items():
            text = tokenizer.decode(tokens)
            stop = first_stop(text, stops)
            if stop is None:
                told = said.get(number, 0)
                ready = settled(text, stops)
                if ready > told:
                    said[number] = ready
                    yield Piece(number, text[told:ready])
            else:
                engine.cancel([number])
                yield Piece(number, text[said.pop(number, 0) : stop], "stop", tokens)
        for number, response in ended.items():
            text = tokenizer.decode(response.tokens[: len(response.tokens) - response.ending])
            stop = first_stop(text, stops)
            end: End = "stop" if response.ended or stop is not None else "length"
            new = text[said.pop(number, 0) : stop]
            log_probs = tuple(map(float, response.log_probs))
            yield Piece(number, new, end, response.tokens, log_probs)


def first_stop(text: str, stops: Sequence[str]) -> int | None:
    """Where the first of `stops` begins in `text`."""
    return min((at for stop in stops if (at := text.find(stop)) >= 0), default=None)


def settled(text: str, stops: Sequence[str]) -> int:
    """How much of `text` no further token can change or make a part of a stop text."""
    size = len(text.rstrip("\ufffd"))  # the bytes of a character that is not whole yet
    for stop in stops:
        for part in range(min(len(stop) - 1, size), 0, -1):
            if text[:size].endswith(stop[:part]):
                size -= part
                break
    return size
