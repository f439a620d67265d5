"""The completions of a prompt as branches of one row, so that the prompt is read once.

    x x x x  a a a  b b b b  c c  .  .       prompt x, completions a, b, c, then padding
    0 0 0 0  1 1 1  2 2 2 2  3 3  0  0       branches
    0 1 2 3  4 5 6  4 5 6 7  4 5  0  0       positions

A token sees the prompt and what stands before it in its own branch, and its position is the one it
would have if its branch were alone: exactly K rows of prompt and completion, for the work of one.
"""

from collections.abc import Mapping

import numpy as np


def branch_rows(
    comparisons: Mapping[str, np.ndarray], *, pad_id: int, multiple: int = 8
) -> dict[str, np.ndarray]:
    """Encoded comparisons (`encode_comparisons`: tokens int32[N, K, T], mask, prompt_lengths ...)
    with the K rows of a prompt as one.

    tokens int32[N, W], mask bool[N, W], branches int32[N, W] (0: prompt or padding), positions
    int32[N, W], previous int32[N, W] (the index of the token before, which for the first of a
    branch is the prompt's last), ends int32[N, K] (the index of a completion's last token; 0 where
    there is none); ranks and where as they were. W is the longest row, rounded up to `multiple`.
    """
    tokens, mask, where = (comparisons[name] for name in ("tokens", "mask", "where"))
    starts = comparisons["prompt_lengths"]
    count, k, _ = tokens.shape
    sizes = np.where(where, mask.sum(-1) - starts[:, None], 0)
    width = -(-int((starts + sizes.sum(1)).max(initial=1)) // multiple) * multiple
    rows = {
        "tokens": np.full((count, width), pad_id, np.int32),
        "mask": np.zeros((count, width), bool),
        "branches": np.zeros((count, width), np.int32),
        "positions": np.zeros((count, width), np.int32),
        "previous": np.zeros((count, width), np.int32),
        "ends": np.zeros((count, k), np.int32),
        "ranks": comparisons["ranks"],
        "where": where,
    }
    for n, start in enumerate(starts):
        at = int(start)
        rows["tokens"][n, :at] = tokens[n, np.argmax(where[n]), :at]
        rows["positions"][n, :at] = np.arange(at)
        rows["previous"][n, 1:at] = np.arange(at - 1)
        for i in np.flatnonzero(sizes[n]):
            end = at + int(sizes[n, i])
            rows["tokens"][n, at:end] = tokens[n, i, start : start + sizes[n, i]]
            rows["branches"][n, at:end] = i + 1
            rows["positions"][n, at:end] = np.arange(start, start + sizes[n, i])
            rows["previous"][n, at:end] = np.arange(at - 1, end - 1)
            rows["previous"][n, at] = max(int(start) - 1, 0)
            rows["ends"][n, i] = end - 1
            at = end
        rows["mask"][n, :at] = True
    return rows
