r"""One family of preference losses: what two implicit rewards of a comparison should be.

A policy that is regularised towards a reference by an f-divergence is optimal for the reward
:math:`\beta f'(\pi / \pi_{ref})`, up to a constant of the prompt. Two choices make a loss of it:
the divergence, and the form, a function of the rewards :math:`c` and :math:`r` of the chosen and
the rejected response, or of their gap :math:`h = c - r - \mu` alone:

============  =========================================================================  ==========
form          loss                                                                       known as
============  =========================================================================  ==========
`logistic`    :math:`-(1 - \epsilon) \log \sigma(h) - \epsilon \log \sigma(-h)`          DPO, cDPO
`hinge`       :math:`\max(0, 1 - h)`                                                     SLiC, RSO
`square`      :math:`(h / \beta - 1 / 2 \beta)^2`                                        IPO
`exo`         :math:`KL(\sigma(h) \| 1 - \epsilon)`, of two Bernoulli distributions      EXO
`discopop`    :math:`-(1 - m) \log \sigma(h) + m e^{-h}, \; m = \sigma(h / \tau)`        DiscoPOP
`nca`         :math:`-\log \sigma(c) - \frac12 (\log \sigma(-c) + \log \sigma(-r))`      NCA
`sppo`        :math:`((c - 1/2) / \beta)^2 + ((r + 1/2) / \beta)^2`                      SPPO-hard
`apo_zero`    :math:`1 - \sigma(c) + \sigma(r)`                                          APO-zero
`apo_down`    :math:`\sigma(c) + 1 - \sigma(h)`                                          APO-down
============  =========================================================================  ==========

The gap's forms say how far apart the two should be, the others where each should be: with `nca`,
`sppo` and `apo_zero` the chosen response becomes likelier, with `apo_down` both become less likely.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple, get_args

import chex
import jax
import jax.numpy as jnp

from instruct_jax.losses._array import (
    LOG_RATIO_LIMIT,
    bounded_exp,
    full_precision,
    keep,
    one_precision,
    visible,
)

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]
Form = Literal[
    "logistic", "hinge", "square", "exo", "discopop", "nca", "sppo", "apo_zero", "apo_down"
]


def log_ratio(
    log_probs: chex.Array, ref_log_probs: chex.Array, where: chex.Array | None
) -> jax.Array:
    """float[B] log of policy over reference, the reference held constant; 0 where hidden."""
    log_probs, ref_log_probs = visible(where, *full_precision(log_probs, ref_log_probs, rank=1))
    return log_probs - jax.lax.stop_gradient(ref_log_probs)


def implicit_rewards(
    log_probs: chex.Array,
    ref_log_probs: chex.Array,
    *,
    where: chex.Array | None = None,
    beta: float = 0.1,
    divergence: Divergence = "reverse_kl",
    alpha: float = 0.5,
) -> jax.Array:
    r"""The reward that a policy is optimal for, up to a constant of the prompt.

    .. math:: \beta f'(u), \qquad u = \pi(y) / \pi_{ref}(y)

    =============  ==========================================
    divergence     :math:`f'(u)`, which is 0 at u = 1
    =============  ==========================================
    `reverse_kl`   :math:`\log u`
    `forward_kl`   :math:`1 - 1 / u`
    `js`           :math:`\log \frac{2 u}{1 + u}`
    `alpha`        :math:`(1 - u^{-\alpha}) / \alpha`
    =============  ==========================================

    Source: Rafailov et al. 2023, eq. 5; other divergences, Wang et al. 2024, "Beyond reverse KL",
    table 1. Its differences give the accuracy and the margin of a policy as a reward model.

    Stop-gradient on `ref_log_probs`. In "forward_kl" and "alpha" log u is not let below -20 (over
    alpha); the gradient is 0 beyond. Not done: no reduction.

    Args:
      log_probs: float[B].
      ref_log_probs: float[B].
      where: bool[B], the rows that count; elsewhere the result is 0. None counts all.
      beta: the coefficient of the divergence.
      divergence: which one the policy is held to the reference by.
      alpha: of "alpha", in (0, 1): near 0 it is the reverse KL, at 1 the forward.

    Returns:
      float[B].

    Raises:
      ValueError: an unknown divergence.

    >>> print(implicit_rewards(jnp.array([-2.0]), jnp.array([-4.0]), beta=0.5))
    [1.]
    """
    x = log_ratio(log_probs, ref_log_probs, where)
    if divergence == "reverse_kl":
        return beta * x
    if divergence == "js":
        return keep(where, beta * (math.log(2.0) + jax.nn.log_sigmoid(x)))
    if divergence == "forward_kl":
        alpha = 1.0
    elif divergence != "alpha":
        raise ValueError(
            f"divergence must be 'reverse_kl', 'forward_kl', 'js' or 'alpha', got {divergence!r}"
        )
    return -beta / alpha * jnp.expm1(-jnp.maximum(alpha * x, -LOG_RATIO_LIMIT))


def preference_loss(
    chosen: chex.Array,
    rejected: chex.Array,
    ref_chosen: chex.Array,
    ref_rejected: chex.Array,
    *,
    where: chex.Array | None = None,
    form: Form | Mapping[Form, float] = "logistic",
    beta: float = 0.1,
    margin: chex.Numeric | None = None,
    label_smoothing: float | None = None,
    tau: float = 0.05,
    divergence: Divergence = "reverse_kl",
    alpha: float = 0.5,
) -> jax.Array:
    r"""A loss of the family in the module's docstring, or a weighted sum of several.

    Source: logistic, Rafailov et al. 2023, eq. 7, with smoothing Mitchell 2023; its margin, Amini
    et al. 2024, "Direct preference optimization with an offset", eq. 4. hinge, Zhao et al. 2023
    (SLiC-HF), as in Liu et al. 2024 (RSO), section 2. square, Azar et al. 2023, eq. 17. exo, Ji
    et al. 2024, section 3.2, pairs. discopop, Lu et al. 2024, section 5. nca, Chen et al. 2024, for
    pairs. sppo, Wu et al. 2024, section 4. apo, D'Oosterlinck et al. 2024, section 4. Weighted
    sums, Wang et al. 2024, "Mixed preference optimization".

    Stop-gradient on the reference. Not done: no reduction, no length normalisation.

    Args:
      chosen: float[B], summed log-probs of the chosen responses under the policy.
      rejected: float[B], of the rejected ones.
      ref_chosen: float[B], of the chosen ones under the reference.
      ref_rejected: float[B].
      where: bool[B], the pairs that count; elsewhere the result is 0. None counts all.
      form: a form, or the weight of each of several.
      beta: strength of the pull to the reference.
      margin: mu, float[] or float[B], by how much the chosen reward should win; None is 0.
      label_smoothing: epsilon of "logistic" and "exo"; None takes 0 and 1e-3, their papers'.
      tau: of "discopop", how suddenly its two parts change places.
      divergence: as in `implicit_rewards`.
      alpha: as in `implicit_rewards`.

    Returns:
      float[B].

    Raises:
      ValueError: an unknown form; a margin or a smoothing that one of the forms does not read; a
        smoothing of 0 in "exo".

    >>> lp = jnp.array([-5.0])
    >>> for form in ("hinge", "apo_zero", {"logistic": 0.5, "hinge": 0.5}):
    ...     print(preference_loss(lp, lp, lp, lp, form=form).round(4))
    [1.]
    [1.]
    [0.8466]
    """
    reward = {"where": where, "beta": beta, "divergence": divergence, "alpha": alpha}
    of_chosen, of_rejected = one_precision(
        implicit_rewards(chosen, ref_chosen, **reward),
        implicit_rewards(rejected, ref_rejected, **reward),
    )
    chex.assert_equal_shape([of_chosen, of_rejected])
    if margin is not None and jnp.ndim(margin):
        (margin,) = visible(where, *full_precision(margin, rank=1))
        chex.assert_equal_shape([margin, of_chosen])
    pair = _Pair(of_chosen, of_rejected, beta, margin, label_smoothing, tau)
    weights = {form: 1.0} if isinstance(form, str) else form
    losses = [weight * pair.loss(name) for name, weight in weights.items()]
    if not losses:
        raise ValueError("form names no loss")
    return keep(where, sum(losses[1:], start=losses[0]))


class _Pair(NamedTuple):
    """The implicit rewards float[B] of a comparison, and what a form may read beside them."""

    chosen: jax.Array
    rejected: jax.Array
    beta: float
    margin: chex.Numeric | None
    label_smoothing: float | None
    tau: float

    def loss(self, form: Form) -> jax.Array:
        """float[B]."""
        if self.margin is not None and form in ("nca", "sppo", "apo_zero"):
            raise ValueError(f"form {form!r} reads no gap, and so no margin")
        if self.label_smoothing is not None and form not in ("logistic", "exo"):
            raise ValueError(f"form {form!r} reads no label_smoothing")
        if form in ("nca", "sppo", "apo_zero"):
            return self._of_rewards(form)
        return self._of_gap(form)

    def gap(self) -> jax.Array:
        """h: the difference of the rewards, less the margin."""
        gap = self.chosen - self.rejected
        return gap if self.margin is None else gap - jnp.asarray(self.margin, gap.dtype)

    def _of_gap(self, form: Form) -> jax.Array:
        gap = self.gap()
        if form == "logistic":
            return smoothed_logistic(gap, self.label_smoothing or 0.0)
        if form == "hinge":
            return jax.nn.relu(1.0 - gap)
        if form == "square":
            return jnp.square((gap - 0.5) / self.beta)
        if form == "exo":
            return _bernoulli_kl(
                gap, 1e-3 if self.label_smoothing is None else self.label_smoothing
            )
        if form == "discopop":
            mix = jax.nn.sigmoid(gap / self.tau)
            return -(1.0 - mix) * jax.nn.log_sigmoid(gap) + mix * bounded_exp(-gap)
        if form == "apo_down":
            return jax.nn.sigmoid(self.chosen) + jax.nn.sigmoid(-gap)
        raise ValueError(f"form must be one of {', '.join(get_args(Form))}; got {form!r}")

    def _of_rewards(self, form: Form) -> jax.Array:
        chosen, rejected = self.chosen, self.rejected
        if form == "nca":
            both = jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected)
            return -jax.nn.log_sigmoid(chosen) - 0.5 * both
        if form == "sppo":
            errors = (chosen - 0.5) / self.beta, (rejected + 0.5) / self.beta
            return jnp.square(errors[0]) + jnp.square(errors[1])
        return jax.nn.sigmoid(-chosen) + jax.nn.sigmoid(rejected)


def smoothed_logistic(logit: jax.Array, flip: float) -> jax.Array:
    """float[B]: the cross-entropy of a Bernoulli whose target is 1 - flip."""
    return -(1.0 - flip) * jax.nn.log_sigmoid(logit) - flip * jax.nn.log_sigmoid(-logit)


def _bernoulli_kl(logit: jax.Array, flip: float) -> jax.Array:
    """float[B]: KL of the Bernoulli of a logit to the one of 1 - flip."""
    if not 0.0 < flip < 1.0:
        raise ValueError(f"form 'exo' needs a label_smoothing inside (0, 1), got {flip}")
    target = jnp.asarray([1.0 - flip, flip], logit.dtype)
    kept, flipped = jax.nn.log_sigmoid(logit), jax.nn.log_sigmoid(-logit)
    log_target = jnp.log(target)
    return jnp.exp(kept) * (kept - log_target[0]) + jnp.exp(flipped) * (flipped - log_target[1])
