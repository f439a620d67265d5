"""Agreement between labelers (DATA-20)."""

import numpy as np
import pytest

from instruct_jax.evaluation.agreement import rank_agreement


def test_pairs_that_either_labeler_ties_say_nothing():
    agreement = rank_agreement([[0, 1, 2]], [[0, 0, 1]])
    assert agreement.mean == 1.0
    assert rank_agreement([[0, 1, 2]], [[2, 1, 0]]).mean == 0.0
    # One of the three pairs is in the other order.
    assert rank_agreement([[0, 1, 2]], [[1, 0, 2]]).mean == pytest.approx(2 / 3)


def test_absent_completions_make_no_pair():
    where = [[True, True, False]]
    assert rank_agreement([[0, 1, 2]], [[0, 1, 0]], where=where).mean == 1.0


def test_two_labelers_who_flip_a_pair_agree_as_the_formula_says(rng):
    flips = rng.random((2, 20_000)) < 0.16
    ranks = np.stack([flips, ~flips], axis=-1).astype(int)
    expected = 0.84**2 + 0.16**2  # 0.731, the paper's labelers' 72.6 %
    assert rank_agreement(ranks[0], ranks[1]).mean == pytest.approx(expected, abs=0.01)


def test_rankings_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match="two int"):
        rank_agreement([[0, 1]], [[0, 1, 2]])
