"""Documents as rows of tokens for a stage: tokenised once, by all processes of a run together."""

from pathlib import Path

import jax
import numpy as np

from instruct_jax.data.config import DataConfig
from instruct_jax.data.corpus import Corpus, Text
from instruct_jax.data.shares import Shares
from instruct_jax.data.sources import Source
from instruct_jax.data.tokenizer import Tokenizer
from instruct_jax.data.tokens import JoinedRows, TokenRows
from instruct_jax.data.toyworld.world import Split
from instruct_jax.training import hosts


def text_rows(
    source: Source, split: Split, tokenizer: Tokenizer, *, length: int, folder: Path
) -> TokenRows:
    """The documents of a split end to end, EOS after each: int32[N, length], no padding.

    They are kept as files in `folder`, which all processes must see, and are found there the next
    time. Each process makes its share of the parts and waits for the others. DataError for a row
    that cannot be used, for files that are not those of the first time, and for less than one row
    to train on; of a held-out part there may be none.
    """
    return _rows(source.text(split), tokenizer, length, folder, required=split == "train")


def training_text(
    source: Source, tokenizer: Tokenizer, *, length: int, folder: Path
) -> tuple[TokenRows | JoinedRows, Shares | None]:
    """`text_rows` to train on, and where files have weights of which each row is."""
    weights = source.config.weights("documents")
    if weights is None:
        return text_rows(source, "train", tokenizer, length=length, folder=folder), None
    parts = [_rows(text, tokenizer, length, folder, required=True) for text in source.texts()]
    of = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return JoinedRows(parts), Shares(of, weights, source.config.files("documents"))


def _rows(
    text: Text, tokenizer: Tokenizer, length: int, folder: Path, *, required: bool
) -> TokenRows:
    corpus = Corpus(text, tokenizer, folder)
    hosts.first_alone(corpus.plan)
    corpus.make(jax.process_index(), jax.process_count())
    corpus.wait()
    return corpus.rows(length, required=required)


def names_text(config: DataConfig, split: Split = "valid") -> bool:
    """Whether there are any documents for a held-out part to be of."""
    own = (config.test if split == "test" else config.valid).documents
    return config.source == "toyworld" or bool(config.documents or own)


def held_out_text(
    config: DataConfig,
    source: Source,
    tokenizer: Tokenizer,
    *,
    length: int,
    folder: Path,
    split: Split = "valid",
) -> np.ndarray:
    """The held-out documents in the same form, in memory: int32[N, length].

    N is 0 where `config` names no documents, holds none out, or less of them than one row.
    """
    if not names_text(config, split):
        return np.zeros((0, length), np.int32)
    return text_rows(source, split, tokenizer, length=length, folder=folder)[:]
