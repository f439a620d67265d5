"""Rows without padding are the padded array they stand for, to the bit."""

import numpy as np
import pytest

from instruct_jax.data.ragged import Builder, Ragged, concatenate, values_of

LENGTHS = np.array([3, 0, 5, 1, 2])


def padded(lengths, width, *, left=False, fill=-1):
    """Numbers from 0 on in rows of these lengths."""
    out, at = np.full((len(lengths), width), fill, np.int32), 0
    for row, length in zip(out, lengths, strict=True):
        here = slice(width - length, None) if left else slice(0, length)
        row[here] = np.arange(at, at := at + length)
    return out


def ragged(lengths=LENGTHS, *, left=False):
    values = np.arange(lengths.sum(), dtype=np.int32)
    return Ragged(values, lengths, width=6, fill=-1, left=left)


INDICES = [0, -1, slice(1, 4), slice(None), [4, 0, 0], np.array([[1, 2], [3, 0]]), slice(2, 2)]


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("index", INDICES, ids=str)
def test_rows_are_those_of_the_padded_array(index, left):
    rows, whole = ragged(left=left), padded(LENGTHS, 6, left=left)
    for ours, theirs in ((rows, whole), (rows.marks(), whole >= 0)):
        assert (ours.shape, ours.dtype, len(ours)) == (theirs.shape, theirs.dtype, len(theirs))
        np.testing.assert_array_equal(ours[index], theirs[index], strict=True)
        np.testing.assert_array_equal(np.asarray(ours), theirs, strict=True)
        np.testing.assert_array_equal(list(ours), list(theirs))
    assert rows.marks().sum(1).tolist() == LENGTHS.tolist()
    assert rows.sum(-1).tolist() == np.where(whole < 0, 0, whole).sum(-1).tolist()


def test_rows_behind_heads_are_as_if_each_had_its_own():
    own = np.array([[2, 0, 1], [0, 3, 0]])
    heads = ragged(np.array([1, 2]))
    rows = Ragged(np.arange(10, 16), own, width=6, fill=-1, heads=heads)
    wanted = [
        [[0, 10, 11, -1, -1, -1], [-1] * 6, [0, 12, -1, -1, -1, -1]],
        [[-1] * 6, [1, 2, 13, 14, 15, -1], [-1] * 6],
    ]
    np.testing.assert_array_equal(rows[:], wanted)
    np.testing.assert_array_equal(rows[1, 1], wanted[1][1])
    np.testing.assert_array_equal(rows[:, :-1], np.array(wanted)[:, :-1])
    np.testing.assert_array_equal(rows.marks()[[1, 0]], np.array(wanted)[[1, 0]] >= 0)
    assert rows.lengths.tolist() == rows.marks().sum().tolist() == [[3, 0, 2], [0, 5, 0]]
    assert rows.sum().tolist() == [[21, 0, 12], [0, 45, 0]]


def test_what_is_no_row_is_refused():
    rows = ragged()
    for index in (5, [0, 9], -6):
        with pytest.raises(IndexError):
            rows[index]
    with pytest.raises(IndexError, match="only rows"):
        rows[np.array([0]), np.array([1])]
    with pytest.raises(ValueError, match="3 values for rows of 4"):
        Ragged(np.arange(3), np.array([4]), width=6, fill=0)
    with pytest.raises(ValueError, match="last axis"):
        rows.sum(0)


def test_rows_are_collected_and_joined():
    builder = Builder(np.int32)
    for row in padded(LENGTHS, 6):
        builder.add(row[row >= 0].tolist())
    assert len(builder) == 5
    rows = builder.rows(width=6, fill=-1)
    np.testing.assert_array_equal(rows[:], padded(LENGTHS, 6))
    np.testing.assert_array_equal(concatenate([rows, rows])[:], np.tile(padded(LENGTHS, 6), (2, 1)))
    np.testing.assert_array_equal(concatenate([rows, np.asarray(rows)]), concatenate([rows, rows]))
    for each in (rows, np.asarray(rows)):
        np.testing.assert_array_equal(values_of(each, LENGTHS), np.arange(11))
