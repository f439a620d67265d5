"""Fine-tuning: what is a target, what is mixed in, when it stops, which epoch is taken."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax.data.packing import pack
from instruct_jax.data.shares import Shares
from instruct_jax.errors import ConfigError
from instruct_jax.models.transformer import language_model
from instruct_jax.sampling.sampler import generate
from instruct_jax.stages import sft
from instruct_jax.stages.pretrain import language_loss, language_rows
from instruct_jax.stages.sft import SFTConfig, select_epoch
from instruct_jax.training.mesh import make_mesh
from tests.stages import lab as labs
from tests.stages.lab import EOS, KEY, PAD, SHAPE, VOCAB

CONFIG = SFTConfig(epochs=2, batch_size=8, learning_rate=1e-2, residual_dropout=0.0)
ONE = make_mesh("data:1")


def demonstrations(pairs, *, width=20):
    """(prompt, response) token lists as the loader encodes them: right-padded, EOS a target."""
    tokens = np.full((len(pairs), width), PAD, np.int32)
    mask, loss_mask = np.zeros(tokens.shape, bool), np.zeros(tokens.shape, bool)
    for n, (prompt, response) in enumerate(pairs):
        row = [*prompt, *response, EOS]
        tokens[n, : len(row)] = row
        mask[n, : len(row)] = True
        loss_mask[n, len(prompt) : len(row)] = True
    return {"tokens": tokens, "mask": mask, "loss_mask": loss_mask}


def random_demonstrations(rows, *, seed=0):
    rng = np.random.default_rng(seed)

    def words(most):
        return rng.integers(0, VOCAB - 1, rng.integers(1, most)).tolist()

    return demonstrations([(words(9), words(9)) for _ in range(rows)])


@pytest.fixture(scope="module")
def gradient():
    """(mean loss, its gradient) of rows, compiled once for a shape of rows."""
    loss = language_loss(language_model(SHAPE))

    @jax.jit
    def program(params, batch):
        def mean(params):
            total, count, _ = loss(params, batch, KEY)
            return total / count

        return jax.value_and_grad(mean)(params)

    return lambda rows: program(labs.policy_params(), rows)


def test_packed_rows_have_the_loss_and_the_gradient_of_rows_apart(gradient):
    """To 1e-5: attention stays inside a segment and positions start again."""
    rows = random_demonstrations(24)
    packed = pack(rows, length=40, pad_id=PAD)
    assert len(packed["tokens"]) < 12
    (loss, grads), (packed_loss, packed_grads) = gradient(rows), gradient(packed)
    np.testing.assert_allclose(packed_loss, loss, rtol=1e-5)
    assert labs.distance(packed_grads, grads) <= 1e-5
    blind = {name: array for name, array in packed.items() if name != "segment_ids"}
    assert abs(gradient(blind)[0] - loss) > 1e-2, "it would be seen"


def test_rows_may_be_packed_in_any_order(gradient):
    packed = pack(random_demonstrations(24), length=40, pad_id=PAD)
    shuffled = {name: array[::-1].copy() for name, array in packed.items()}
    np.testing.assert_allclose(gradient(shuffled)[0], gradient(packed)[0], rtol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
def test_the_loss_may_fall_on_the_prompt_too(tmp_path, monkeypatch, packed):
    """SFT-1: then every token of a row is a target but its first, which has nothing before it."""
    rows = random_demonstrations(24)
    targets = (rows["mask"].sum(-1) - 1).sum()
    if packed:
        rows = pack(rows, length=40, pad_id=PAD)
    seen = []
    monkeypatch.setattr(sft, "fit", lambda config, loss, params, batches, **_: seen.append(batches))
    config = dataclasses.replace(CONFIG, loss_on_prompt=True)
    sft.train(config, language_model(SHAPE), None, rows, mesh=ONE, workdir=tmp_path)
    (batches,) = seen
    assert batches.arrays["loss_mask"][:, 1:].sum() == targets


def test_a_model_that_learnt_one_answer_stops_where_it_ends(tmp_path):
    """T13: greedy decoding gives the response, its stop token, and nothing more."""
    prompt, response = [3, 1, 4, 1, 5], [9, 2, 6]
    rows = demonstrations([(prompt, response)] * 8)
    model = language_model(SHAPE)
    config = dataclasses.replace(CONFIG, epochs=30, log_every=30)
    params = sft.train(config, model, labs.policy_params(), rows, mesh=ONE, workdir=tmp_path)
    rollout = generate(
        model,
        params,
        jnp.asarray([prompt], jnp.int32),
        jnp.ones((1, 5), bool),
        jax.random.split(KEY, 1),
        max_new_tokens=12,
        eos_id=EOS,
        temperature=0.0,
    )
    assert rollout.tokens[0, 5:].tolist() == [*response, EOS] + [PAD] * 8
    assert rollout.response_mask.sum() == 4


def test_a_share_of_every_batch_is_pretraining_text(tmp_path, monkeypatch):
    """SFT-5: with every token a target, and segments where the demonstrations have them."""
    seen = []
    monkeypatch.setattr(sft, "fit", lambda config, loss, params, batches, **_: seen.append(batches))
    text = labs.text_rows(rows=16, length=40)["tokens"]
    config = dataclasses.replace(CONFIG, batch_size=10, pretrain_fraction=0.2)
    rows = pack(random_demonstrations(64), length=40, pad_id=PAD)
    sft.train(
        config, language_model(SHAPE), None, rows, pretraining=text, mesh=ONE, workdir=tmp_path
    )
    for step in range(5):
        batch = seen[0](step)
        assert batch["tokens"].shape == (10, 40)
        own = [any(np.array_equal(row, other) for other in text) for row in batch["tokens"]]
        assert own == [False] * 8 + [True] * 2
        assert batch["mask"][8:].all() and batch["loss_mask"][8:].all()
        assert (batch["segment_ids"][8:] == 1).all()
    plain = {name: array for name, array in language_rows(text).items()}
    assert set(batch) == {*plain, "segment_ids"}


def test_every_epoch_is_shown_with_the_parameters_after_it(tmp_path):
    """SFT-4: the last one is what `train` returns."""
    epochs = []
    params = sft.train(
        dataclasses.replace(CONFIG, epochs=3),
        language_model(SHAPE),
        labs.policy_params(),
        random_demonstrations(16),
        mesh=ONE,
        workdir=tmp_path,
        on_epoch=lambda epoch, params: epochs.append((epoch, jax.device_get(params))),
    )
    assert [epoch for epoch, _ in epochs] == [1, 2, 3]
    assert labs.same_bits(epochs[-1][1], params)
    assert not labs.same_bits(epochs[0][1], epochs[1][1])
    log = [json.loads(line) for line in (tmp_path / "sft.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in log) == 6


def test_fine_tuning_drops_out_what_its_configuration_says(tmp_path):
    """SFT-3: residual dropout 0.2 is part of the paper's recipe, and no part of PPO's."""
    shape = dataclasses.replace(SHAPE, residual_dropout=0.2)
    batch = random_demonstrations(8)
    loss = jax.jit(language_loss(language_model(shape), dropout=True))
    sums = [loss(labs.policy_params(), batch, jax.random.key(i))[0] for i in (0, 0, 1)]
    assert sums[0] == sums[1] != sums[2]
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            sft,
            "language_loss",
            lambda model, *, dropout: seen.append((model.config.residual_dropout, dropout)),
        )
        patch.setattr(sft, "fit", lambda *_, **__: None)
        for rate in (0.0, 0.2):
            config = dataclasses.replace(CONFIG, residual_dropout=rate)
            sft.train(config, language_model(SHAPE), None, batch, mesh=ONE, workdir=tmp_path)
    assert seen == [(0.0, False), (0.2, True)]


def test_the_epoch_is_chosen_by_reward_and_not_by_loss(tmp_path):
    """T52, SFT-4: the decision is written down with its grounds; ties go to the earlier."""
    path = tmp_path / "deep" / "selection.json"
    scores = {1: 0.1, 2: 0.7, 10: 0.4, 3: 0.7}
    assert select_epoch(scores, losses={1: 1.0, 2: 3.0, 3: 4.0}, path=path) == 2
    decision = json.loads(path.read_text())
    assert decision["selected_epoch"] == 2 and "reward" in decision["by"]
    assert list(decision["epochs"]) == ["1", "2", "3", "10"]
    assert decision["epochs"]["2"] == {"score": 0.7, "loss": 3.0}
    assert decision["epochs"]["10"] == {"score": 0.4, "loss": None}


def test_a_batch_that_the_mesh_cannot_divide_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match="a batch of 10 rows cannot be divided over mesh data:8"):
        sft.train(
            dataclasses.replace(CONFIG, batch_size=10),
            language_model(SHAPE),
            labs.policy_params(),
            random_demonstrations(16),
            mesh=make_mesh("data:8"),
            workdir=tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()


def test_a_run_of_weighed_files_taken_up_at_a_checkpoint_ends_with_the_same_bits(tmp_path):
    """R7, in demonstrations and in the text beside them."""
    halves = Shares(np.repeat([0, 1], [12, 8]), (1, 4), ("a", "b"))
    config = dataclasses.replace(CONFIG, pretrain_fraction=0.5, save_every=1, eval_every=3)

    def run(folder, stop=False):
        def evaluate(step, state):
            if stop:
                raise KeyboardInterrupt
            return {}

        return sft.train(
            config,
            language_model(SHAPE),
            labs.policy_params(),
            random_demonstrations(20),
            pretraining=labs.text_rows(rows=20, length=20)["tokens"],
            shares=halves,
            text_shares=halves,
            mesh=ONE,
            workdir=tmp_path / folder,
            evaluate=evaluate,
        )

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("stopped", stop=True)
    assert labs.same_bits(run("stopped"), whole)
