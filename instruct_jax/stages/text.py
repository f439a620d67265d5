"""Documents as rows of tokens for a stage: tokenised once, by all processes of a run together."""

from pathlib import Path

import jax

from instruct_jax.data.corpus import Corpus, TokenRows
from instruct_jax.data.sources import Source
from instruct_jax.data.tokenizer import Tokenizer
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
    corpus = Corpus(source.text(split), tokenizer, folder)
    hosts.first_alone(corpus.plan)
    corpus.make(jax.process_index(), jax.process_count())
    corpus.wait()
    return corpus.rows(length, required=split == "train")
