"""Control tokens as marks: one private code point each, in texts that a chat template wrote.

`Tokenizer.encode` reads every text as characters. A rendered dialogue has control tokens, which
must not be told by how they are spelt, since a user can spell them too: they stand in it as marks,
and `Marked` is the tokenizer that knows the marks of its control tokens and no other way to write
them. What is between them is encoded as the tokenizer itself does within one text.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

import tokenizers

from instruct_jax.data.tokenizer import Tokenizer

# The sixteenth plane is for private use, and so far from what fonts use that no text has it: marks,
# above them what chat_template.py hides, and the two of jinja.py at its end.
MARKS = 0x100000
HIDDEN = 0x108000
RESERVED = re.compile("[\U00100000-\U0010ffff]")


class Marked:
    """A tokenizer whose control tokens are written as marks."""

    def __init__(self, tokenizer: Tokenizer, controls: Iterable[str]) -> None:
        """ValueError for one of `controls` that is no token of `tokenizer`."""
        ids = {token: tokenizer.id_of(token) for token in controls}
        if unknown := [token for token, number in ids.items() if number is None]:
            raise ValueError(f"{unknown[0]!r} is no token of the tokenizer")
        self._marks = {token: chr(MARKS + i) for i, token in enumerate(ids)}
        self._by_id = {number: self._marks[token] for token, number in ids.items()}
        self._backend = tokenizers.Tokenizer.from_str(
            json.dumps(_renamed(json.loads(tokenizer.as_json()), self._marks))
        )
        self._ids = {
            self._backend.token_to_id(mark): ids[token] for token, mark in self._marks.items()
        }

    def mark_of(self, token: str) -> str:
        """The mark of a control token."""
        return self._marks[token]

    def mark_of_id(self, number: int) -> str | None:
        """The mark of a control token by its id; None for an id of another kind."""
        return self._by_id.get(number)

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids of a text with marks, and [start, end) in `text` of each."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        return [self._ids.get(i, i) for i in encoding.ids], encoding.offsets


def _renamed(about: dict[str, Any], marks: dict[str, str]) -> dict[str, Any]:
    """A tokenizer.json in which each of `marks` is the spelling of its token."""
    model = about["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        vocabulary = {marks.get(token, token): number for token, number in vocabulary.items()}
    else:  # Unigram: (piece, score), the place being the id
        vocabulary = [[marks.get(piece, piece), score] for piece, score in vocabulary]
    model = model | {"vocab": vocabulary}
    if "merges" in model:  # none makes a control token of characters any more
        model["merges"] = [
            merge
            for merge in model["merges"]
            if "".join(merge.split(" ") if isinstance(merge, str) else merge) not in marks
        ]
    added = [
        token | {"content": marks.get(token["content"], token["content"])}
        for token in about.get("added_tokens", ())
    ]
    known = {token["content"] for token in added}
    # One that is in the vocabulary alone becomes an added token, or no mark would find it.
    added += [
        {"id": number, "content": mark, "special": True, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for mark, number in (vocabulary.items() if isinstance(vocabulary, dict) else ())
        if mark in marks.values() and mark not in known
    ]
    return about | {"model": model, "added_tokens": added, "post_processor": None}
