"""Direct preference training: K-wise pairs, the reference, KTO's mismatched rows, and learning."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax import losses
from instruct_jax.data.trees import RowShape, TreeBatches, pack_trees
from instruct_jax.errors import ConfigError
from instruct_jax.models.transformer import language_model
from instruct_jax.stages import preference
from instruct_jax.stages.preference import (
    PreferenceConfig,
    judge_preferences,
    preference_loss,
    ranked_scores,
    read_by,
    thumbs,
)
from instruct_jax.stages.preference_rows import (
    ResponseScorer,
    branch_log_probs,
    with_mismatched,
)
from instruct_jax.training.mesh import make_mesh
from instruct_jax.training.state import accumulate_gradients
from tests.stages import lab as labs
from tests.stages.lab import EOS, KEY, PAD, SHAPE

MODEL = language_model(SHAPE)
ONE = make_mesh("data:1")
CONFIG = PreferenceConfig(
    batch_size=8, learning_rate=1e-3, warmup=0, completions=3, prompt_length=6, response_length=8
)
FAMILY = ("hinge", "exo", "discopop", "nca", "sppo", "apo_zero", "apo_down")
KINDS = ("dpo", "robust_dpo", "ipo", *FAMILY, "kto", "orpo", "simpo", "cpo", "dpo_sft")
K, WIDTH = 3, 14


def comparisons(rows, *, k=K, seed=0, better=None):
    """Prompts of 1 to 6 tokens with up to k completions of 1 to 7 tokens and EOS.

    The last completion of every other prompt is not there where k > 2. `better(response)` orders
    the completions; else they stand in random order.
    """
    rng = np.random.default_rng(seed)
    tokens = np.full((rows, k, WIDTH), PAD, np.int32)
    mask, where = np.zeros((rows, k, WIDTH), bool), np.ones((rows, k), bool)
    ranks, starts = np.zeros((rows, k), np.int32), rng.integers(1, 7, rows).astype(np.int32)
    for n, start in enumerate(starts):
        prompt = rng.integers(0, EOS, start)
        responses = [rng.integers(0, EOS, rng.integers(1, 8)) for _ in range(k)]
        for i, response in enumerate(responses):
            row = [*prompt, *response, EOS]
            tokens[n, i, : len(row)], mask[n, i, : len(row)] = row, True
        ranks[n] = rng.permutation(k)
        if better is not None:
            ranks[n] = np.argsort(np.argsort([-better(r) for r in responses], kind="stable"))
        if k > 2 and n % 2 == 0:
            where[n, -1], mask[n, -1], tokens[n, -1] = False, False, PAD
    return {
        "tokens": tokens,
        "mask": mask,
        "ranks": ranks,
        "where": where,
        "prompt_lengths": starts,
        "index": np.arange(rows, dtype=np.int32),
    }


def config_of(kind, **changes):
    return dataclasses.replace(CONFIG, loss=kind, **changes)


def batch_of(config, rows, *, shape=None):
    """A batch of all, with the log-probs of another policy as its reference."""
    batch = pack_trees(read_by(config, rows), pad_id=PAD, shape=shape)
    if config.needs_reference:
        batch["reference"] = np.asarray(ResponseScorer(MODEL, labs.policy_params(1), ONE)(batch))
    return batch


def on_device(rows):
    return {name: jnp.asarray(array) for name, array in rows.items()}


@functools.cache
def _program(config, micro_batches):
    loss = preference_loss(config, MODEL)
    return jax.jit(
        lambda params, batch: accumulate_gradients(
            loss, params, batch, key=KEY, micro_batches=micro_batches
        )
    )


def loss_and_gradient(config, batch, *, micro_batches=1):
    found = _program(config, micro_batches)(labs.policy_params(), batch)
    return float(found.loss), labs.flat(found.grads), found.metrics


def plain_log_prob(params, tokens, start, length):
    """Sum of the log-probs of tokens[start:length], one row, without padding."""
    logits = MODEL.apply(params, jnp.asarray(tokens[None, :length]))
    log_probs = np.asarray(jax.nn.log_softmax(logits)[0], np.float64)
    return sum(log_probs[t - 1, tokens[t]] for t in range(start, length))


def test_log_probs_are_of_the_response_and_its_stop_token_alone():
    """Each as if its row held nothing but the prompt and itself."""
    rows = comparisons(4)
    params = labs.policy_params()
    branched = on_device(pack_trees(rows, pad_id=PAD))
    found, lengths = branch_log_probs(MODEL, params, branched)
    starts = rows["prompt_lengths"]
    for n, k in np.argwhere(rows["where"]):
        end = rows["mask"][n, k].sum()
        wanted = plain_log_prob(params, rows["tokens"][n, k], starts[n], end)
        np.testing.assert_allclose(found[n, k], wanted, rtol=1e-5)
        assert float(lengths[n, k]) == end - starts[n]
    assert (np.asarray(found)[~rows["where"]] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_with_one_pair_a_prompt_the_loss_is_the_published_one(kind):
    config = config_of(kind, label_smoothing=0.1 if kind in ("dpo", "cpo") else 0.0)
    rows = comparisons(8, k=2)
    batch = batch_of(config, rows)
    params = labs.policy_params()
    of = np.asarray(ResponseScorer(MODEL, params, ONE)(batch))
    reference = batch.get("reference", np.zeros_like(of))
    lengths = rows["mask"].sum(-1).astype(np.float32) - rows["prompt_lengths"][:, None]
    lengths = lengths.astype(np.float32)
    order = np.argsort(rows["ranks"], axis=1)
    sides = [
        [np.take_along_axis(x, order, 1)[:, i] for x in (of, reference, lengths)] for i in (0, 1)
    ]
    (win, ref_win, win_length), (lose, ref_lose, lose_length) = sides
    four = win, lose, ref_win, ref_lose
    means = win / win_length, lose / lose_length
    if kind == "kto":
        kl = losses.kto_reference_kl(of[:, -1], reference[:, -1])
        good, bad = np.ones(8, bool), np.zeros(8, bool)
        wanted = losses.kto_loss(win, ref_win, good, kl) + losses.kto_loss(lose, ref_lose, bad, kl)
        wanted = wanted / 2
    else:
        wanted = {
            "dpo": lambda: losses.dpo_loss(*four, beta=0.1, label_smoothing=0.1),
            "robust_dpo": lambda: losses.robust_dpo_loss(*four, beta=0.1, flip_rate=0.1),
            "ipo": lambda: losses.ipo_loss(*four, beta=0.1),
            "orpo": lambda: losses.orpo_loss(*means, weight=0.1),
            "simpo": lambda: losses.simpo_loss(*means, beta=0.1, gamma=1.0),
            "cpo": lambda: losses.cpo_loss(win, lose, beta=0.1, label_smoothing=0.1),
            "dpo_sft": lambda: losses.dpo_sft_loss(*four, win_length, beta=0.1),
            **{form: lambda: losses.preference_loss(*four, form=kind, beta=0.1) for form in FAMILY},
        }[kind]()
    found, gradient, _ = loss_and_gradient(config, batch)
    np.testing.assert_allclose(found, np.mean(wanted), rtol=1e-5)
    assert np.abs(gradient).max() > 1e-4


@pytest.mark.parametrize("kind", ["dpo", pytest.param("simpo", marks=pytest.mark.slow)])
def test_all_pairs_of_a_prompt_at_once_are_the_mean_of_each_alone(kind):
    """One prompt is one element (RM-2): K forwards give the gradient of all its pairs."""
    config = config_of(kind)
    rows = comparisons(4)
    _, whole, _ = loss_and_gradient(config, batch_of(config, rows))
    per_prompt = []
    for n in range(4):
        pairs = []
        for i in range(K):
            for j in range(K):
                present = rows["where"][n, i] and rows["where"][n, j]
                if present and rows["ranks"][n, i] < rows["ranks"][n, j]:
                    pair = {name: x[n : n + 1] for name, x in rows.items()}
                    for name in ("tokens", "mask", "ranks", "where"):
                        pair[name] = pair[name][:, [i, j]]
                    pairs.append(loss_and_gradient(config, batch_of(config, pair))[1])
        per_prompt.append(np.mean(pairs, axis=0))
    np.testing.assert_allclose(whole, np.mean(per_prompt, axis=0), atol=2e-5)


def test_a_prompt_whose_completions_tie_weighs_nothing():
    rows = comparisons(4, k=2)
    config = config_of("dpo")
    tied = {**rows, "ranks": np.where(np.arange(4)[:, None] < 2, 0, rows["ranks"])}
    few = {name: x[2:] for name, x in rows.items()}
    both = [loss_and_gradient(config, batch_of(config, x))[:2] for x in (tied, few)]
    np.testing.assert_allclose(both[0][0], both[1][0], rtol=1e-6)
    np.testing.assert_allclose(both[0][1], both[1][1], atol=1e-6)


@pytest.mark.parametrize("kind", ["dpo", pytest.param("simpo", marks=pytest.mark.slow)])
def test_micro_batches_change_nothing(kind):
    config, rows = config_of(kind), comparisons(8)
    batches = TreeBatches(rows, 8, pad_id=PAD, micro_batches=4)
    score = ResponseScorer(MODEL, labs.policy_params(1), ONE, micro_batches=4)
    parts = batches(0)
    parts["reference"] = np.asarray(score(parts))
    whole = loss_and_gradient(config, batch_of(config, rows))
    found = loss_and_gradient(config, parts, micro_batches=4)
    np.testing.assert_allclose(found[0], whole[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], whole[1], atol=1e-5 * max(1.0, np.abs(whole[1]).max()))


@pytest.mark.parametrize("kind", ["dpo", pytest.param("kto", marks=pytest.mark.slow)])
def test_trees_in_one_row_train_as_each_in_its_own(kind):
    config, rows = config_of(kind), comparisons(6)
    apart, together = (
        loss_and_gradient(config, batch_of(config, rows, shape=RowShape(*shape)))
        for shape in ((6, 48), (1, 288))
    )
    np.testing.assert_allclose(together[0], apart[0], rtol=1e-5)
    np.testing.assert_allclose(together[1], apart[1], atol=1e-5 * max(1.0, np.abs(apart[1]).max()))


def test_at_the_reference_the_loss_of_dpo_is_log_two():
    params = labs.policy_params()
    judged = judge_preferences(CONFIG, MODEL, params, params, comparisons(10), mesh=ONE)
    np.testing.assert_allclose(judged["loss"], np.log(2), rtol=1e-6)
    assert judged["margin"] == judged["accuracy"] == 0.0


# --- KTO ----------------------------------------------------------------------------------------


def test_a_thumb_is_up_where_more_completions_are_beaten_than_lost_to():
    ranks = jnp.array([[0, 1, 2], [1, 0, 0], [0, 0, 0], [1, 0, 2]])
    where = jnp.array([[True] * 3, [True] * 3, [True] * 3, [True, True, False]])
    desirable, labelled = thumbs(ranks, where)
    assert labelled.tolist() == [
        [True, False, True],
        [True, True, True],
        [False] * 3,
        [True, True, False],
    ]
    assert (desirable & labelled).tolist() == [
        [True, False, False],
        [False, True, True],
        [False] * 3,
        [False, True, False],
    ]


def test_a_mismatched_completion_is_of_another_prompt():
    rows = comparisons(9)
    made = with_mismatched(rows, seed=0)
    for name in ("tokens", "mask", "where", "ranks"):
        assert (made[name][:, :-1] == rows[name]).all()
    assert made["where"][:, -1].all()
    for n, start in enumerate(rows["prompt_lengths"]):
        row = made["tokens"][n, -1][made["mask"][n, -1]].tolist()
        assert row[:start] == rows["tokens"][n, 0, :start].tolist()
        holders = [
            m
            for m, k in np.argwhere(rows["where"])
            if rows["tokens"][m, k][rows["mask"][m, k]].tolist()[rows["prompt_lengths"][m] :]
            == row[start:]
        ]
        assert holders
        assert n not in holders


def test_the_reference_point_moves_no_parameter():
    """KTO's z_0 is a constant: the gradient is that of a fixed number."""
    config = config_of("kto")
    batch = on_device(batch_of(config, comparisons(6, k=2)))
    _, whole, _ = loss_and_gradient(config, batch)

    def scored(params):
        log_probs, lengths = branch_log_probs(MODEL, params, batch)
        scores = preference.Scores(log_probs, batch["reference"], lengths)
        return ranked_scores(config, scores, batch["ranks"], batch["where"])

    def fixed(params, kl):
        terms, counted = preference.prompt_losses(config, *scored(params)[:3], kl)
        return losses.masked_mean(terms, where=counted)

    params = labs.policy_params()
    wanted = labs.flat(jax.jit(jax.grad(fixed))(params, scored(params)[3]))
    np.testing.assert_allclose(whole, wanted, atol=1e-6)


def labelled(count, *, better=None, seed=0):
    """Single completions, approved of where `better` says so, or every other one."""
    rows = comparisons(count, k=1, seed=seed)
    starts = rows["prompt_lengths"]
    responses = [rows["tokens"][n, 0][rows["mask"][n, 0]][starts[n] :] for n in range(count)]
    good = [n % 2 == 0 if better is None else better(r) for n, r in enumerate(responses)]
    return rows | {"labels": np.where(good, 1, -1)[:, None].astype(np.int32)}


def test_kto_of_single_completions_is_the_published_loss():
    """Their labels, and the reference point of completions of other prompts."""
    config, rows = config_of("kto"), labelled(6)
    batch = batch_of(config, rows)
    loss, _, metrics = loss_and_gradient(config, on_device(batch))
    log_probs, _ = branch_log_probs(MODEL, labs.policy_params(), on_device(batch))
    kl = losses.kto_reference_kl(log_probs[:, -1], jnp.asarray(batch["reference"][:, -1]))
    wanted = losses.kto_loss(
        log_probs[:, 0],
        jnp.asarray(batch["reference"][:, 0]),
        jnp.asarray(rows["labels"][:, 0] > 0),
        kl,
        beta=config.beta,
    )
    assert loss == pytest.approx(float(wanted.mean()), rel=1e-5)
    ratios = config.beta * (np.asarray(log_probs)[:, 0] - batch["reference"][:, 0])
    for name, mine in (("desirable", ratios[::2]), ("undesirable", ratios[1::2])):
        assert float(metrics[f"reward_{name}"]) == pytest.approx(mine.mean(), abs=1e-5)


def test_labels_say_what_ranks_would():
    """Of two completions of a prompt, one approved of, the loss is that of the pair."""
    config, rows = config_of("kto"), comparisons(6, k=2)
    labels = np.where(rows["ranks"] == 0, 1, -1).astype(np.int32)
    ranked, told = (batch_of(config, r) for r in (rows, rows | {"labels": labels}))
    first, second = (loss_and_gradient(config, on_device(batch)) for batch in (ranked, told))
    assert first[0] == second[0]
    np.testing.assert_array_equal(first[1], second[1])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "kto"])
def test_no_other_loss_takes_single_completions(kind):
    with pytest.raises(ConfigError, match=rf"preference.loss={kind} learns .*loss=kto"):
        read_by(config_of(kind), labelled(4))


def test_kto_on_one_prompt_is_refused():
    with pytest.raises(ConfigError, match="at least two prompts"):
        read_by(config_of("kto"), comparisons(1))


# --- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pytest.param("dpo", marks=pytest.mark.slow), "kto"])
def test_a_live_reference_trains_as_a_precomputed_one(kind, tmp_path):
    rows = comparisons(16)
    trained = [
        preference.train(
            config_of(kind, reference=reference),
            MODEL,
            labs.policy_params(),
            rows,
            mesh=ONE,
            workdir=tmp_path / reference,
        )
        for reference in ("precomputed", "live")
    ]
    np.testing.assert_allclose(*(labs.flat(params) for params in trained), atol=1e-6)
    assert np.abs(labs.flat(trained[0]) - labs.flat(labs.policy_params())).max() > 1e-4


@pytest.mark.parametrize(
    "kind", ["dpo", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("kto", "simpo"))]
)
def test_it_learns_what_is_preferred_and_it_holds_on_new_prompts(kind, tmp_path):
    """Completions with more low words are better; on eight devices."""

    def low_words(response):
        return (response < 10).mean() + 1e-3 * len(response)

    rows, valid = (comparisons(n, seed=n, better=low_words) for n in (1024, 64))
    config = config_of(kind, epochs=4, batch_size=32, learning_rate=2e-3, beta=0.5)
    start = labs.policy_params()
    mesh = make_mesh("data:4,fsdp:2")
    params = preference.train(config, MODEL, start, rows, mesh=mesh, workdir=tmp_path)
    before, after = (
        judge_preferences(config, MODEL, p, start, valid, mesh=mesh) for p in (start, params)
    )
    assert after["accuracy"] > 0.68
    assert after["margin"] > before["margin"]
    assert after["loss"] < before["loss"]
