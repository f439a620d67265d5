"""A larger vocabulary for a model that has weights already."""

import dataclasses

import numpy as np

from instruct_jax.models.config import TransformerConfig
from instruct_jax.models.transformer import Params


def resize_vocabulary(
    config: TransformerConfig, params: Params, vocab_size: int
) -> tuple[TransformerConfig, Params]:
    """The model with `vocab_size` tokens, as many as it has or more.

    A new token's embedding, and its column of an untied read-out, is the mean of all that there
    were: it is then about as likely as an average token, and no logit of another token changes
    (Hewitt 2021). Rows past the vocabulary stay zero. NumPy parameters in, NumPy parameters out;
    ValueError for fewer tokens, whose embeddings would be lost.
    """
    if vocab_size < config.vocab_size:
        raise ValueError(f"{vocab_size} tokens are fewer than the model's {config.vocab_size}")
    resized = dataclasses.replace(config, vocab_size=vocab_size)

    def grown(table: np.ndarray) -> np.ndarray:
        """[V, D] -> [V', D]."""
        known = np.asarray(table)[: config.vocab_size]
        rows = np.zeros((resized.vocab_rows, known.shape[1]), known.dtype)
        rows[: config.vocab_size] = known
        rows[config.vocab_size : vocab_size] = known.mean(axis=0, dtype=np.float64)
        return rows

    embedder = {**params["embedder"], "tokens": grown(params["embedder"]["tokens"])}
    params = {**params, "embedder": embedder}
    if "unembedding" in params:
        kernel = np.ascontiguousarray(grown(np.asarray(params["unembedding"]["kernel"]).T).T)
        params["unembedding"] = {"kernel": kernel}
    return resized, params
