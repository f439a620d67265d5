"""The reward model: one prompt is one element, the zero point, and what it learns."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax.data.tokenizer import train_bpe
from instruct_jax.data.trees import RowShape, TreeBatches, pack_trees, tree_sizes
from instruct_jax.errors import ConfigError
from instruct_jax.evaluation.reward_model import evaluate_rewards
from instruct_jax.models.transformer import language_model, scalar_from_language, scalar_model
from instruct_jax.sampling.complete import Completion
from instruct_jax.stages import reward_model
from instruct_jax.stages.reward_model import (
    RewardModelConfig,
    affine_scores,
    branch_scores,
    normalise,
    reward_loss,
    score_answers,
    score_comparisons,
    score_rows,
    sequence_scores,
)
from instruct_jax.stages.stage import steps_of
from instruct_jax.stages.trained import TrainedModel
from instruct_jax.training.mesh import make_mesh
from instruct_jax.training.state import accumulate_gradients
from tests.stages import lab as labs
from tests.stages.lab import KEY, PAD, SHAPE

MODEL = scalar_model(SHAPE)
ONE = make_mesh("data:1")
CONFIG = RewardModelConfig(batch_size=8, learning_rate=1e-3, completions=3)
K, WIDTH = 3, 10


def comparisons(rows, *, k=K, seed=0):
    """Prompts of 0 to 2 tokens, completions in random order; every other last one is not there."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(3, WIDTH + 1, (rows, k, 1))
    mask = np.arange(WIDTH)[None, None] < lengths
    tokens = np.where(mask, rng.integers(0, labs.VOCAB, mask.shape), PAD).astype(np.int32)
    prompts = rng.integers(0, 3, rows).astype(np.int32)
    beginning = np.arange(WIDTH) < prompts[:, None, None]
    tokens = np.where(beginning, tokens[:, :1], tokens)
    where = np.ones((rows, k), bool)
    where[::2, -1] = False
    ranks = rng.permuted(np.tile(np.arange(k, dtype=np.int32), (rows, 1)), axis=1)
    return {
        "tokens": tokens, "mask": mask, "ranks": ranks, "where": where, "prompt_lengths": prompts,
    }  # fmt: skip


@pytest.fixture(scope="module")
def rows():
    """Eight prompts."""
    return comparisons(8)


@pytest.fixture(scope="module")
def demonstrations():
    """Rows that fix the zero point: 70, which no batch size divides."""
    both = comparisons(70, k=1, seed=1)
    return {name: both[name][:, 0] for name in ("tokens", "mask")}


@pytest.fixture(scope="module")
def gradient():
    """(mean loss, gradient, metrics) of comparisons at the lab's reward model."""
    program = jax.jit(
        lambda params, rows: accumulate_gradients(reward_loss(MODEL), params, rows, KEY)
    )

    def of(rows, params=None):
        return program(params or labs.reward_params(), pack_trees(rows, pad_id=PAD))

    return of


def test_a_batch_takes_one_forward_that_reads_every_token_once(rows):
    """T46: in one call, the prompt once for all its completions, not K (K - 1) rows."""
    calls = []

    def counted(params, tokens, **options):
        calls.append(tokens.shape)
        return MODEL.apply(params, tokens, **options)

    counting = MODEL._replace(apply=counted)
    batch = pack_trees(rows, pad_id=PAD)
    jax.eval_shape(reward_loss(counting), labs.reward_params(), batch, KEY)
    assert calls == [batch["tokens"].shape]
    assert batch["mask"].sum() == tree_sizes(rows).sum() > 0.7 * batch["mask"].size


@pytest.mark.parametrize("shape", [RowShape(8, 32), RowShape(2, 112)], ids=["one", "several"])
def test_trees_score_as_rows_of_their_own(rows, shape):
    """One or several in a row: to 1e-5, and so does the gradient of any function of the scores."""
    params, packed = labs.reward_params(), pack_trees(rows, pad_id=PAD, shape=shape)
    weights = np.random.default_rng(7).normal(size=rows["where"].shape).astype(np.float32)
    weights = np.where(rows["where"], weights, 0.0)

    def together(params):
        scores = branch_scores(MODEL, params, packed)
        return (jnp.where(rows["where"], scores, 0.0) * weights).sum(), scores

    def apart(params):
        scores = sequence_scores(MODEL, params, rows["tokens"], rows["mask"])
        return (jnp.where(rows["where"], scores, 0.0) * weights).sum(), scores

    (_, one), one_grads = jax.jit(jax.value_and_grad(together, has_aux=True))(params)
    (_, many), many_grads = jax.jit(jax.value_and_grad(apart, has_aux=True))(params)
    np.testing.assert_allclose(
        np.asarray(one)[rows["where"]], np.asarray(many)[rows["where"]], atol=1e-5
    )
    np.testing.assert_allclose(labs.flat(one_grads), labs.flat(many_grads), atol=1e-4)


@pytest.mark.parametrize("width", [112, 256], ids=["all scores", "in blocks"])
def test_nothing_leaks_from_one_tree_into_another(rows, width):
    """Other tokens in one: the scores of the others keep every bit."""
    shape, scores = RowShape(2, width), []
    run = jax.jit(lambda batch: branch_scores(MODEL, labs.reward_params(), batch))
    for shift in (0, 1):
        changed = {name: x.copy() for name, x in rows.items()}
        changed["tokens"][3] = (changed["tokens"][3] + shift) % labs.VOCAB
        scores.append(np.asarray(run(pack_trees(changed, pad_id=PAD, shape=shape))))
    moved = (scores[0] != scores[1]) & rows["where"]
    assert moved[3, rows["where"][3]].all()
    assert not np.delete(moved, 3, axis=0).any()


def test_micro_batches_have_the_loss_and_the_gradient_of_the_whole(rows, gradient):
    """Each with rows of its own for its own prompts."""
    parts = TreeBatches(rows, 8, pad_id=PAD, micro_batches=4)(0)
    found = jax.jit(
        lambda params: accumulate_gradients(reward_loss(MODEL), params, parts, KEY, micro_batches=4)
    )(labs.reward_params())
    whole = gradient(rows)
    np.testing.assert_allclose(found.loss, whole.loss, rtol=1e-5)
    np.testing.assert_allclose(labs.flat(found.grads), labs.flat(whole.grads), atol=1e-5)
    np.testing.assert_allclose(found.metrics["accuracy"], whole.metrics["accuracy"], rtol=1e-6)


def test_all_pairs_of_a_prompt_are_in_its_one_step(rows, gradient):
    """T47, RM-1: the loss is the mean over prompts of the mean over their pairs."""
    scores = score_rows(MODEL, labs.reward_params(), rows["tokens"], rows["mask"]).astype(float)
    losses = []
    for r, ranks, where in zip(scores, rows["ranks"], rows["where"], strict=True):
        pairs = [
            np.log1p(np.exp(r[b] - r[a]))
            for a in range(K)
            for b in range(K)
            if ranks[a] < ranks[b] and where[a] and where[b]
        ]
        assert len(pairs) in (1, 3)
        losses.append(np.mean(pairs))
    np.testing.assert_allclose(gradient(rows).loss, np.mean(losses), rtol=1e-5)


def test_a_completion_that_is_not_there_and_a_prompt_of_ties_weigh_nothing(rows, gradient):
    """T45: neither the value nor the gradient knows them."""
    tied = {name: array.copy() for name, array in rows.items()}
    tied["ranks"][4:] = 1
    first = {name: np.concatenate([array[:4]] * 2) for name, array in rows.items()}
    a, b = gradient(tied), gradient(first)
    np.testing.assert_allclose(a.loss, b.loss, rtol=1e-6)
    assert labs.distance(a.grads, b.grads) <= 1e-6
    absent = {name: array.copy() for name, array in rows.items()}
    absent["tokens"][~rows["where"]] = 5
    absent["ranks"][~rows["where"]] = -7
    np.testing.assert_allclose(gradient(absent).loss, gradient(rows).loss, rtol=1e-6)


def test_padding_may_stand_on_either_side(rows):
    """T6, MODEL-4: to 1e-4."""
    right = score_rows(MODEL, labs.reward_params(), rows["tokens"], rows["mask"])
    tokens, mask = np.full_like(rows["tokens"], PAD), np.zeros_like(rows["mask"])
    for n, k in np.ndindex(*right.shape):
        length = rows["mask"][n, k].sum()
        tokens[n, k, WIDTH - length :] = rows["tokens"][n, k, :length]
        mask[n, k, WIDTH - length :] = True
    np.testing.assert_allclose(
        score_rows(MODEL, labs.reward_params(), tokens, mask), right, atol=1e-4
    )


def test_comparisons_score_in_their_order_as_rows_of_their_own(rows):
    """Also where the batches of an epoch do not divide them, or one is larger than all."""
    params, where = labs.reward_params(), rows["where"]
    expected = score_rows(MODEL, params, rows["tokens"], rows["mask"])
    for batch_size in (3, 16):
        found = score_comparisons(MODEL, params, rows, batch_size=batch_size)
        np.testing.assert_allclose(found[where], expected[where], atol=1e-5)


def test_scores_come_in_the_shape_of_their_rows(rows, demonstrations):
    params = labs.reward_params()
    assert score_rows(MODEL, params, rows["tokens"], rows["mask"]).shape == (8, K)
    scores = score_rows(MODEL, params, **demonstrations, batch_size=16)
    assert scores.shape == (70,)
    whole = jax.jit(lambda t, m: sequence_scores(MODEL, params, t, m))(*demonstrations.values())
    np.testing.assert_allclose(scores, whole, atol=1e-5)


# --- the zero point -----------------------------------------------------------------------------


def test_training_ends_with_demonstrations_at_zero(tmp_path, rows, demonstrations):
    """T29, RM-4: on average, to 1e-5; the bias carries it."""
    params = reward_model.train(
        CONFIG,
        MODEL,
        labs.reward_params(),
        rows,
        standard=demonstrations,
        mesh=ONE,
        workdir=tmp_path,
    )
    scores = score_rows(MODEL, params, **demonstrations)
    assert abs(scores.mean()) <= 1e-5 and scores.std() > 0.1
    raw = reward_model.train(
        dataclasses.replace(CONFIG, normalisation="none"),
        MODEL, labs.reward_params(), rows, standard=None, mesh=ONE, workdir=tmp_path,
    )  # fmt: skip
    assert abs(score_rows(MODEL, raw, **demonstrations).mean()) > 1e-3
    head = params["head"]["kernel"], {name: params[name] for name in params if name != "head"}
    raw_head = raw["head"]["kernel"], {name: raw[name] for name in raw if name != "head"}
    assert labs.same_bits(head, raw_head), "nothing but the bias moves"


def test_the_loss_does_not_see_the_zero_point(rows, gradient):
    """T29: a shift of all scores."""
    shifted = affine_scores(labs.reward_params(), shift=3.0)
    np.testing.assert_allclose(
        score_rows(MODEL, shifted, rows["tokens"], rows["mask"]),
        score_rows(MODEL, labs.reward_params(), rows["tokens"], rows["mask"]) + 3.0,
        atol=1e-5,
    )
    np.testing.assert_allclose(gradient(rows, shifted).loss, gradient(rows).loss, atol=1e-5)


def test_samples_can_be_given_mean_zero_and_deviation_one(demonstrations):
    """RM-4, the recipe of 2019; twice is once."""
    params = normalise(MODEL, labs.reward_params(), demonstrations, kind="policy_meanstd")
    scores = score_rows(MODEL, params, **demonstrations)
    np.testing.assert_allclose([scores.mean(), scores.std()], [0.0, 1.0], atol=1e-5)
    again = normalise(MODEL, params, demonstrations, kind="policy_meanstd")
    assert labs.distance(again, params) <= 1e-5
    raw = labs.reward_params()
    assert normalise(MODEL, raw, {}, kind="none") is raw


def test_single_completions_with_a_label_are_refused(tmp_path):
    """They are in no pair: the loss would be that of nothing."""
    rows = comparisons(4) | {"labels": np.ones((4, K), np.int32)}
    with pytest.raises(ConfigError, match=r"a reward model learns .*preference.loss=kto"):
        reward_model.train(CONFIG, MODEL, None, rows, standard={}, mesh=ONE, workdir=tmp_path)


def test_a_zero_point_needs_rows(tmp_path, rows):
    with pytest.raises(ConfigError, match="normalisation 'demo_mean' needs rows"):
        reward_model.train(
            CONFIG, MODEL, None, rows, standard=None, mesh=ONE, workdir=tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()


# --- what it learns -----------------------------------------------------------------------------

# A reward that is linear in the words of a sequence, as of a person who likes some words more.
WORTH = np.random.default_rng(5).normal(size=labs.VOCAB)
YOUNG = dataclasses.replace(SHAPE, init_std=0.1)


def opinions(rows, *, k, seed, flips=0.0, gap):
    """K sequences a prompt, ranked by worth; a share `flips` of the rankings is upside down."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, labs.VOCAB, (8 * rows, k, WIDTH)).astype(np.int32)
    worth = WORTH[tokens].sum(-1)
    clear = (np.diff(np.sort(worth, axis=-1), axis=-1) > gap).all(-1)
    tokens, worth = tokens[clear][:rows], worth[clear][:rows]
    assert len(tokens) == rows
    ranks = np.argsort(np.argsort(-worth, axis=-1), axis=-1)
    ranks = np.where(rng.random((rows, 1)) < flips, k - 1 - ranks, ranks).astype(np.int32)
    every = np.ones(tokens.shape, bool)
    return {
        "tokens": tokens, "mask": every, "ranks": ranks, "where": every[..., 0],
        "prompt_lengths": np.zeros(rows, np.int32),
    }  # fmt: skip


def learnt(workdir, rows, **changes):
    """A judge that is trained from scratch on `rows`: its metrics on other rows."""
    model = scalar_model(YOUNG)
    trunk = language_model(YOUNG).init(KEY)
    config = RewardModelConfig(
        completions=rows["ranks"].shape[1], normalisation="none", warmup=10, log_every=50
    )
    params = reward_model.train(
        dataclasses.replace(config, **changes),
        model,
        scalar_from_language(trunk, KEY, YOUNG),
        rows,
        standard=None,
        mesh=ONE,
        workdir=workdir,
    )

    def judge(others):
        scores = score_rows(model, params, others["tokens"], others["mask"], batch_size=256)
        return evaluate_rewards(scores, others["ranks"], where=others["where"]).metrics

    return judge


def test_a_linear_reward_is_learnt_from_rankings(tmp_path):
    """T48: more than 95 % of the pairs of unseen prompts."""
    train, other = (opinions(n, k=4, seed=n, gap=0.3) for n in (1_600, 400))
    judge = learnt(tmp_path, train, batch_size=16, learning_rate=3e-3)
    assert judge(other).accuracy.mean > 0.95


@pytest.mark.slow
def test_with_a_quarter_of_the_labels_wrong_it_is_right_and_knows_how_sure_to_be(tmp_path):
    """T48: accuracy tends to 75 % of the labels, and the calibration error is below 0.03."""
    train, other = (opinions(n, k=2, seed=n, gap=3.0, flips=0.25) for n in (25_600, 4_000))
    judge = learnt(tmp_path, train, batch_size=64, learning_rate=1e-3)
    metrics = judge(other)
    assert metrics.accuracy.mean == pytest.approx(0.75, abs=0.025)
    assert metrics.ece < 0.03
    assert judge(opinions(4_000, k=2, seed=3, gap=3.0)).accuracy.mean > 0.97, "of the true order"


@pytest.mark.slow
def test_one_epoch_beats_three(tmp_path):
    """T49, RM-3: in validation log-loss, where labels are noisy and few."""
    train, other = (opinions(n, k=4, seed=n, gap=0.3, flips=0.25) for n in (400, 2_000))
    losses = {
        epochs: learnt(
            tmp_path / str(epochs), train, batch_size=16, learning_rate=2e-3, epochs=epochs
        )(other).log_loss
        for epochs in (1.0, 3.0)
    }
    assert losses[1.0] < losses[3.0]


# --- answers that were sampled ------------------------------------------------------------------


@pytest.fixture(scope="module")
def judged():
    """A reward model that reads bytes, prompts, and answers of which the last did not end."""
    own = train_bpe(["a b c d e f g"], vocab_size=260)
    shape = dataclasses.replace(labs.SHAPE, vocab_size=own.vocab_size, vocab_multiple=1)
    params = scalar_model(shape).init(jax.random.key(0))
    reward = TrainedModel("scalar", shape, params, own, "reward_model")
    # The second is spelt in other tokens than the tokenizer would choose.
    answers = [
        Completion("ab", True, (*own.encode("ab"), own.eos_id)),
        Completion("a b", True, (*own.encode("a"), *own.encode(" "), *own.encode("b"), own.eos_id)),
        Completion("abc", False, tuple(own.encode("abc"))),
    ]
    return reward, ["x", "y z", "w"], answers


LENGTHS = {"prompt_length": 8, "response_length": 8}


def alone(reward, prompt, response):
    """The score of one row, by itself."""
    tokens = np.array([[*reward.tokenizer.encode(prompt), *response]], np.int32)
    mask = np.ones(tokens.shape, bool)
    return float(sequence_scores(reward.model, reward.params, tokens, mask)[0])


def test_answers_are_scored_in_the_tokens_that_were_drawn(judged):
    """As in PPO: no other spelling, and no end that was not sampled."""
    reward, prompts, answers = judged
    scores = score_answers(reward, reward.tokenizer, prompts, answers, **LENGTHS)
    wanted = [alone(reward, p, a.tokens) for p, a in zip(prompts, answers, strict=True)]
    np.testing.assert_allclose(scores, wanted, atol=1e-5)
    ended = alone(reward, prompts[2], [*answers[2].tokens, reward.tokenizer.eos_id])
    assert abs(scores[2] - ended) > 1e-4


def test_a_reward_model_of_another_tokenizer_reads_the_text_in_its_own(judged):
    reward, prompts, answers = judged
    other = train_bpe(["abc abc xy yz"] * 9, vocab_size=264)
    scores = score_answers(reward, other, prompts, answers, **LENGTHS)
    own = reward.tokenizer
    spelt = [[*own.encode(a.text), *[own.eos_id] * a.ended] for a in answers]
    wanted = [alone(reward, p, ids) for p, ids in zip(prompts, spelt, strict=True)]
    np.testing.assert_allclose(scores, wanted, atol=1e-5)
    with pytest.raises(ValueError, match="more than prompt_length 1 "):
        score_answers(reward, other, ["too long"], answers[:1], prompt_length=1, response_length=8)


# --- length of a run ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "rows", "batch", "steps"),
    [
        (1, 20, 16, 2),
        (1, 16, 16, 1),
        (2, 20, 16, 3),
        (1.1, 100, 10, 11),
        (0.3, 100, 10, 3),
        (0.5, 3, 64, 1),
    ],
)
def test_no_row_of_an_epoch_is_left_without_its_update(epochs, rows, batch, steps):
    """20 rows in batches of 16 are two updates: rounded to one, four rows were never read."""
    assert steps_of(epochs, rows, batch) == steps
