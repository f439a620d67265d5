"""Several short rows in one long row, told apart by segment ids.

A row of instruction data is a few dozen tokens in a row of padding; packed, almost every position
is a real one. `segment_ids` int32[N, T] number the rows packed together from 1 (0 is padding):
attention stays inside a segment and positions restart with it, so the packed loss is the unpacked
loss.
"""

from collections.abc import Mapping

import numpy as np

from instruct_jax.data.ragged import Rows, values_of


def pack(rows: Mapping[str, Rows], *, length: int, pad_id: int) -> dict[str, np.ndarray]:
    """Right-padded rows (tokens int32[N, T], mask, loss_mask) packed into rows of `length`.

    First fit, longest row first, ties in the given order: deterministic, and nearly full. Keeps
    every token and every target, except that the first token of a segment is no target: what stands
    before it is another row. Raises ValueError for a row longer than `length`.
    """
    sizes = rows["mask"].sum(axis=1)
    if sizes.max(initial=0) > length:
        raise ValueError(f"a row of {sizes.max()} tokens does not fit a packed row of {length}")
    bins = first_fit(sizes, length)
    # Of every row, where in the packed rows, one after the other, it starts, and its segment.
    place, segment = np.zeros((2, len(sizes)), np.int64)
    for n, members in enumerate(bins):
        room = sizes[members]
        place[members] = n * length + np.cumsum(room) - room
        segment[members] = np.arange(1, len(members) + 1)
    begins = np.cumsum(sizes) - sizes
    at = np.repeat(place - begins, sizes) + np.arange(sizes.sum())
    packed = {
        "tokens": np.full(len(bins) * length, pad_id, np.int32),
        "mask": np.zeros(len(bins) * length, bool),
        "loss_mask": np.zeros(len(bins) * length, bool),
        "segment_ids": np.zeros(len(bins) * length, np.int32),
    }
    for name in ("tokens", "mask", "loss_mask"):
        packed[name][at] = values_of(rows[name], sizes)
    packed["loss_mask"][place[sizes > 0]] = False
    packed["segment_ids"][at] = np.repeat(segment, sizes)
    return {name: array.reshape(len(bins), length) for name, array in packed.items()}


def first_fit(sizes: np.ndarray, length: int) -> list[list[int]]:
    """The numbers of what has these `sizes` int[N], by bin of `length`.

    The largest first, ties in the given order, each into the first bin that has room for it.
    """
    bins: list[list[int]] = []
    rooms: list[int] = []
    first_with_room = np.zeros(length + 1, np.int64)  # bins before this one lack room for the size
    for row in np.argsort(-sizes, kind="stable"):
        size = int(sizes[row])
        n = int(first_with_room[size])
        while n < len(bins) and rooms[n] < size:
            n += 1
        first_with_room[size] = n
        if n == len(bins):
            bins.append([])
            rooms.append(length)
        bins[n].append(int(row))
        rooms[n] -= size
    return bins
