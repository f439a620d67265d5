"""A student learns its teacher's answers, and only those that ended."""

import dataclasses

import jax
import numpy as np
import pytest

from instruct_jax.data.rows import Prompt
from instruct_jax.data.tokenizer import train_bpe
from instruct_jax.errors import ConfigError
from instruct_jax.models.matrices import join
from instruct_jax.models.transformer import language_model
from instruct_jax.sampling.complete import Completion
from instruct_jax.stages import distill
from instruct_jax.stages.pretrain import language_loss, language_rows
from instruct_jax.stages.trained import TrainedModel, load_trained
from instruct_jax.training.mesh import make_mesh
from tests.stages import lab as labs


@pytest.mark.parametrize("targets", ["samples", "logits"])
def test_a_shorter_student_learns_what_its_teacher_says(tmp_path, targets):
    shape = dataclasses.replace(labs.SHAPE, num_layers=4)
    teacher = language_model(shape)
    params = teacher.init(jax.random.key(0))
    half, start = distill.shortened(shape, params)
    assert half.num_layers == 2
    kernel = lambda p: np.asarray(p["layers"]["mlp"]["up"]["kernel"])  # noqa: E731
    np.testing.assert_array_equal(kernel(start), kernel(params)[[0, 3]])
    student = language_model(half)
    rows = language_rows(labs.text_rows(rows=64)["tokens"])
    rows["loss_mask"] = rows["loss_mask"].copy()
    rows["loss_mask"][:, :4] = False
    before = jax.tree.map(np.copy, params)
    config = distill.DistillConfig(epochs=6, batch_size=16, learning_rate=3e-3, log_every=1)
    learnt = distill.train(
        config, targets, student, start, teacher, params, rows,
        mesh=make_mesh("data:1"), workdir=tmp_path,
    )  # fmt: skip
    assert jax.tree.structure(learnt) == jax.tree.structure(start)
    assert labs.same_bits(params, before)

    def loss(own):
        if targets == "samples":
            total, count, _ = language_loss(student)(own, rows, labs.KEY)
        else:
            both = join({"teacher": params}, own)
            total, count, _ = distill.logits_loss(student, teacher)(both, rows, labs.KEY)
        assert int(count) == rows["loss_mask"][:, 1:].sum()
        return float(total / count)

    assert loss(learnt) < 0.9 * loss(start)


@pytest.mark.parametrize("layers", [0, 5])
def test_a_student_has_layers_of_its_teacher(layers):
    shape = dataclasses.replace(labs.SHAPE, num_layers=4)
    with pytest.raises(ConfigError, match=f"1 to 4 layers of its teacher: {layers}"):
        distill.shortened(shape, language_model(shape).init(jax.random.key(0)), layers)


def test_only_answers_that_ended_are_taught(tmp_path, monkeypatch):
    tokenizer = train_bpe(["one two three four"], vocab_size=300)
    shape = dataclasses.replace(labs.SHAPE, vocab_size=tokenizer.vocab_size)
    params = language_model(shape).init(jax.random.key(0))
    teacher = TrainedModel("language", shape, params, tokenizer, "ppo")
    prompts = [Prompt(f"{i}: ") for i in range(4)]
    answers = [Completion(f"answer {i}", i != 2, (1, 2)) for i in range(4)]
    taught = []

    def train(config, targets, student, start, teacher, params, rows, *, mesh, workdir):
        taught.extend(
            tokenizer.decode(t[m].tolist())
            for t, m in zip(rows["tokens"], rows["mask"], strict=True)
        )
        return start

    monkeypatch.setattr(distill, "train", train)
    places = {"prompt_length": 16, "response_length": 16}
    where = {"mesh": make_mesh("data:1"), "workdir": tmp_path, **places}
    config = distill.DistillConfig(batch_size=3, layers=1)
    student = distill.teach(config, "logits", teacher, prompts, answers, **where)
    assert student.answers == 3 == len(taught)
    assert all(f"{i}: answer {i}" in text for i, text in zip((0, 1, 3), taught, strict=True))
    kept = load_trained(tmp_path / "model", kind="language")
    assert (kept.config.num_layers, kept.stage) == (1, "distill")
    fuller = dataclasses.replace(config, batch_size=4)
    with pytest.raises(ConfigError, match=r"distill:logits: 3 of 4 answers ended, less than one"):
        distill.teach(fuller, "logits", teacher, prompts, answers, **where)
