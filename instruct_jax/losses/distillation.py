r"""Distillation: divergences between a student's and a teacher's next-token distributions.

With the teacher :math:`p` and the student :math:`q` at a position, each a softmax of logits over
a temperature. All are float[B, T], unreduced; the gradient reaches the student only. Which tokens
the two are compared on (a data set's, the student's own samples) is the caller's choice. The
factor :math:`\tau^2` of Hinton et al. 2015 is not applied. From hidden states, without ever holding
the logits, they are in `chunked_distillation`.
"""

from __future__ import annotations

import math
from typing import Literal

import chex
import jax
import jax.numpy as jnp

from instruct_jax.losses._array import keep, one_precision
from instruct_jax.losses.language import prepare_logits

Divergence = Literal["forward_kl", "reverse_kl", "jsd"]


def _log_softmaxes(
    student_logits: chex.Array,
    teacher_logits: chex.Array,
    temperature: chex.Numeric,
    vocab_size: int | None,
    where: chex.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """float[B, T, V] log-probabilities of the student and, held constant, of the teacher."""
    chex.assert_equal_shape([student_logits, teacher_logits])
    student, teacher = (
        jax.nn.log_softmax(prepare_logits(logits, temperature, vocab_size, where), axis=-1)
        for logits in (student_logits, teacher_logits)
    )
    student, teacher = one_precision(student, teacher)
    return student, jax.lax.stop_gradient(teacher)


def divergence(
    student: jax.Array, teacher: jax.Array, *, kind: Divergence, beta: float
) -> jax.Array:
    """Of log-probabilities float[..., V], over the last axis: the three functions below."""
    if kind == "forward_kl":
        return _kl(teacher, student)
    if kind == "reverse_kl":
        return _kl(student, teacher)
    if kind != "jsd":
        raise ValueError(f"kind must be 'forward_kl', 'reverse_kl' or 'jsd', got {kind!r}")
    if not 0.0 < beta < 1.0:
        raise ValueError(f"beta must lie inside (0, 1), got {beta}; use forward_kl or reverse_kl")
    mixture = jnp.logaddexp(teacher + math.log(beta), student + math.log1p(-beta))
    return beta * _kl(teacher, mixture) + (1.0 - beta) * _kl(student, mixture)


def _kl(log_p: jax.Array, log_q: jax.Array) -> jax.Array:
    """KL(p || q) over the last axis."""
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def forward_kl(
    student_logits: chex.Array,
    teacher_logits: chex.Array,
    *,
    where: chex.Array | None = None,
    temperature: chex.Numeric = 1.0,
    vocab_size: int | None = None,
) -> jax.Array:
    r"""KL from the teacher to the student: the student covers all that the teacher does.

    .. math:: \sum_v p_v (\log p_v - \log q_v)

    Source: Hinton et al. 2015, section 2.

    Stop-gradient on the teacher. Not done: no reduction.

    Args:
      student_logits: float[B, T, V], finite.
      teacher_logits: float[B, T, V], finite.
      where: bool[B, T], the positions that count; elsewhere the entry is 0. None counts all.
      temperature: tau, float[], of both.
      vocab_size: number of real columns.

    Returns:
      float[B, T].

    >>> logits = jnp.array([[[1.0, 2.0]]])
    >>> print(forward_kl(logits, logits + 1))
    [[0.]]
    """
    student, teacher = _log_softmaxes(
        student_logits, teacher_logits, temperature, vocab_size, where
    )
    return keep(where, divergence(student, teacher, kind="forward_kl", beta=0.5))


def reverse_kl(
    student_logits: chex.Array,
    teacher_logits: chex.Array,
    *,
    where: chex.Array | None = None,
    temperature: chex.Numeric = 1.0,
    vocab_size: int | None = None,
) -> jax.Array:
    r"""KL from the student to the teacher: the student avoids what the teacher would not say.

    .. math:: \sum_v q_v (\log q_v - \log p_v)

    Source: Gu et al. 2024 (MiniLLM), eq. 1.

    Stop-gradient on the teacher. Not done: no reduction.

    Args:
      student_logits: float[B, T, V], finite.
      teacher_logits: float[B, T, V], finite.
      where: bool[B, T], the positions that count; elsewhere the entry is 0. None counts all.
      temperature: tau, float[], of both.
      vocab_size: number of real columns.

    Returns:
      float[B, T].

    >>> logits = jnp.array([[[1.0, 2.0]]])
    >>> print(reverse_kl(logits, logits + 1))
    [[0.]]
    """
    student, teacher = _log_softmaxes(
        student_logits, teacher_logits, temperature, vocab_size, where
    )
    return keep(where, divergence(student, teacher, kind="reverse_kl", beta=0.5))


def generalized_jsd(
    student_logits: chex.Array,
    teacher_logits: chex.Array,
    *,
    where: chex.Array | None = None,
    beta: float = 0.5,
    temperature: chex.Numeric = 1.0,
    vocab_size: int | None = None,
) -> jax.Array:
    r"""Generalised Jensen-Shannon divergence, between the two KL divergences.

    .. math:: \beta\, KL(p \| m) + (1 - \beta)\, KL(q \| m), \qquad m = \beta p + (1 - \beta) q

    Source: Agarwal et al. 2024 (GKD), eq. 1. Divided by beta it tends to the forward KL as beta
    goes to 0, and divided by 1 - beta to the reverse KL as beta goes to 1; the divergence itself
    tends to 0 at both ends. (TRL jumps to the two KLs at exactly 0 and 1.)

    Stop-gradient on the teacher. Not done: no reduction.

    Args:
      student_logits: float[B, T, V], finite.
      teacher_logits: float[B, T, V], finite.
      where: bool[B, T], the positions that count; elsewhere the entry is 0. None counts all.
      beta: weight of the teacher, inside (0, 1).
      temperature: tau, float[], of both.
      vocab_size: number of real columns.

    Returns:
      float[B, T], between 0 and log 2.

    Raises:
      ValueError: beta outside of (0, 1).

    >>> far = 100.0 * jnp.array([[[1.0, 0.0]]])
    >>> print(jnp.exp(generalized_jsd(far, far[..., ::-1])))
    [[2.]]
    """
    student, teacher = _log_softmaxes(
        student_logits, teacher_logits, temperature, vocab_size, where
    )
    return keep(where, divergence(student, teacher, kind="jsd", beta=beta))
