"""The losses agree with TRL where both exist, in value and gradient, on TRL's own recorded runs.

`tests/fixtures/losses/record_trl.py` made the vectors. Each function here says how a TRL loss is
put together from ours; instruct_jax/losses/CONFORMANCE.md has the table.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax.losses import (
    centering_loss,
    chunked_cross_entropy_sum,
    chunked_next_token_loss,
    clipped_policy_loss,
    cpo_loss,
    dpo_loss,
    forward_kl,
    generalized_jsd,
    grpo_advantages,
    grpo_loss,
    gspo_loss,
    ipo_loss,
    kto_loss,
    kto_reference_kl,
    masked_mean,
    orpo_loss,
    pairwise_loss,
    reduce_loss,
    reverse_kl,
    rloo_advantages,
    robust_dpo_loss,
    sequence_log_probs,
    simpo_loss,
)
from tests.fixtures.losses.reader import read

VECTORS = {v.name: v for v in read(Path(__file__).parents[1] / "fixtures" / "losses" / "trl.json")}


def sft(hidden, head, tokens, where):
    return masked_mean(chunked_next_token_loss(hidden, head.T, tokens, chunk=3), where=where[:, 1:])


def summed_sft(hidden, head, tokens, where):
    """The same mean, of the sum whose gradient is made with its logits."""
    targets = jnp.pad(where[:, 1:], ((0, 0), (0, 1)))
    following = jnp.roll(tokens, -1, axis=1)
    total, _ = chunked_cross_entropy_sum(hidden, head.T, following, where=targets, chunk=3)
    return total / targets.sum(dtype=jnp.float32)


def reward(chosen, rejected, margin=0.0, *, centering=0.0):
    loss = pairwise_loss(chosen, rejected, margin=margin)
    return (loss + centering * centering_loss(chosen, rejected)).mean()


def pairs(log_probs, ref_log_probs, where, *, mean=False):
    """The chosen half and the rejected half of a TRL batch, as our four arguments."""
    rows = (sequence_log_probs(x, where=where, mean=mean) for x in (log_probs, ref_log_probs))
    (chosen, rejected), (ref_chosen, ref_rejected) = (jnp.split(x, 2) for x in rows)
    return chosen, rejected, ref_chosen, ref_rejected


def dpo(log_probs, ref_log_probs, where, *, beta):
    return dpo_loss(*pairs(log_probs, ref_log_probs, where), beta=beta).mean()


def dpo_of_means(log_probs, ref_log_probs, where, *, beta):
    return dpo_loss(*pairs(log_probs, ref_log_probs, where, mean=True), beta=beta).mean()


def dpo_with_sft(log_probs, ref_log_probs, where, *, beta):
    half = len(log_probs) // 2
    sft = masked_mean(-log_probs[:half], where=where[:half])
    return dpo(log_probs, ref_log_probs, where, beta=beta) + sft


def robust_dpo(log_probs, ref_log_probs, where, *, beta, label_smoothing):
    four = pairs(log_probs, ref_log_probs, where)
    return robust_dpo_loss(*four, beta=beta, flip_rate=label_smoothing).mean()


def ipo_of_means(log_probs, ref_log_probs, where, *, beta):
    return ipo_loss(*pairs(log_probs, ref_log_probs, where, mean=True), beta=beta).mean()


def kto(log_probs, ref_log_probs, other_log_probs, ref_other_log_probs, desirable, where, **hyper):
    policy, ref, other, ref_other = (
        sequence_log_probs(x, where=where)
        for x in (log_probs, ref_log_probs, other_log_probs, ref_other_log_probs)
    )
    return kto_loss(policy, ref, desirable, kto_reference_kl(other, ref_other), **hyper).mean()


def orpo_odds_term(chosen, rejected, *, weight):
    return (orpo_loss(chosen, rejected, weight=weight) + chosen).mean()


def simpo(chosen, rejected, **hyper):
    return simpo_loss(chosen, rejected, **hyper).mean()


def cpo_preference_term(chosen, rejected, **hyper):
    return cpo_loss(chosen, rejected, nll_weight=0.0, **hyper).mean()


def grpo(reduction):
    def loss(log_probs, old_log_probs, ref_log_probs, advantages, where, **hyper):
        losses = grpo_loss(log_probs, old_log_probs, ref_log_probs, advantages, **hyper)
        return reduce_loss(losses, where=where, reduction=reduction)

    return loss


def gspo(log_probs, old_log_probs, ref_log_probs, advantages, where, *, kl_coef, **hyper):
    del ref_log_probs, kl_coef
    return gspo_loss(log_probs, old_log_probs, advantages, where=where, **hyper).mean()


def rloo(log_probs, old_log_probs, advantages, where, *, clip):
    policy, old = (sequence_log_probs(x, where=where) for x in (log_probs, old_log_probs))
    return clipped_policy_loss(policy, old, advantages, clip=clip).mean()


def distill(divergence):
    def loss(student_logits, teacher_logits, where, *, beta, temperature):
        keywords = {"beta": beta} if divergence is generalized_jsd else {}
        values = divergence(student_logits, teacher_logits, temperature=temperature, **keywords)
        return masked_mean(values, where=where)

    return loss


OURS = {
    "sft": sft,
    "reward": reward,
    "reward/margin": reward,
    "reward/centered": reward,
    "dpo/sigmoid": dpo,
    "dpo/sigmoid_norm": dpo_of_means,
    "dpo/sigmoid+sft": dpo_with_sft,
    "dpo/robust": robust_dpo,
    "dpo/ipo": ipo_of_means,
    "kto": kto,
    "orpo": orpo_odds_term,
    "simpo": simpo,
    "cpo": cpo_preference_term,
    "grpo": grpo("seq_mean"),
    "bnpo": grpo("token_mean"),
    "dapo": grpo("token_mean"),
    "dr_grpo": grpo("seq_sum_const"),
    "dual_clip": grpo("seq_mean"),
    "gspo": gspo,
    "rloo": rloo,
    "advantages/grpo": grpo_advantages,
    "advantages/grpo_batch": lambda rewards: grpo_advantages(rewards, scale="batch"),
    "advantages/rloo": rloo_advantages,
    "gkd/forward_kl": distill(forward_kl),
    "gkd/reverse_kl": distill(reverse_kl),
    "gkd/jsd": distill(generalized_jsd),
}


@pytest.mark.parametrize(("name", "ours"), [*OURS.items(), ("sft", summed_sft)])
def test_value_and_gradient_agree_with_trl(name, ours):
    vector = VECTORS[name]
    inputs = {
        k: jnp.asarray(v, jnp.float32 if v.dtype == np.float64 else None)
        for k, v in vector.inputs.items()
    }

    @jax.jit
    def run(inputs):
        def scalar(subset):
            value = ours(**(inputs | subset), **vector.hyper)
            return value.sum(), value

        return jax.grad(scalar, has_aux=True)({n: inputs[n] for n in vector.gradients})

    gradients, value = run(inputs)
    np.testing.assert_allclose(value, vector.expected[0], rtol=1e-5, atol=1e-5)
    for argument, expected in vector.gradients.items():
        np.testing.assert_allclose(gradients[argument], expected, rtol=1e-5, atol=1e-5)


def test_every_recorded_loss_is_compared():
    assert VECTORS.keys() == OURS.keys()
