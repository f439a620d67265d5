"""A function of the user's at every evaluation, and the model that was the best at one."""

import dataclasses

import jax
import numpy as np
import pytest

from instruct_jax.errors import ConfigError, EvaluationError
from instruct_jax.models.transformer import language_model, scalar_model
from instruct_jax.sampling.complete import complete
from instruct_jax.stages.evaluations import (
    Evaluated,
    keeping_best,
    users_evaluation,
    with_users,
)
from instruct_jax.stages.trained import TrainedModel, load_trained
from instruct_jax.training.keeping import Best
from instruct_jax.training.mesh import make_mesh
from tests.experiments.scripts import tokenizer
from tests.stages import lab as labs

MESH = make_mesh("data:1")
TOKENIZER = tokenizer()
SHAPE = dataclasses.replace(labs.SHAPE, vocab_size=TOKENIZER.vocab_size, max_length=32)


def language():
    model = language_model(SHAPE)
    return TrainedModel("language", SHAPE, model.init(jax.random.key(0)), TOKENIZER, "sft")


def evaluated(trained, step=3):
    return Evaluated(step, trained.model, trained.params, TOKENIZER, MESH, trained)


def named(tmp_path, body, name="mine"):
    file = tmp_path / "own.py"
    file.write_text(f"import numpy as np\n\ndef {name}(run):\n    {body}\n")
    return users_evaluation(f"{file}:{name}")


@pytest.mark.parametrize(
    ("body", "logged"),
    [
        ("return 0.5", {"mine": 0.5}),
        ("return {'a': 1, 'b': np.float32(2)}", {"mine/a": 1.0, "mine/b": 2.0}),
        ("return {'step': run.step}", {"mine/step": 3.0}),
        ("return {}", {}),
    ],
)
def test_its_numbers_are_logged_under_its_name(tmp_path, body, logged):
    assert named(tmp_path, body)(evaluated(language())) == logged


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("raise KeyError('x')", "evaluate_with mine: step 3: KeyError: 'x'"),
        ("return 1 / 0", "step 3: ZeroDivisionError"),
        ("return 'good'", "expected numbers by name"),
        ("return {'a': None}", "expected numbers by name"),
        ("return None", "expected numbers by name"),
    ],
)
def test_what_raises_or_gives_no_numbers_is_told_with_the_step(tmp_path, body, told):
    with pytest.raises(EvaluationError, match=told) as error:
        named(tmp_path, body)(evaluated(language()))
    assert error.value.exit_code == 3


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("own.py", "expected FILE.py:NAME"),
        ("nowhere.py:mine", "there is no such file"),
        ("{here}:mien", "no function 'mien' here; there are mine"),
        ("{broken}:mine", "broken.py: NameError"),
    ],
)
def test_a_wrong_name_is_told_in_one_line(tmp_path, text, told):
    named(tmp_path, "return 1")
    (tmp_path / "broken.py").write_text("mine = yours\n")
    text = text.format(here=tmp_path / "own.py", broken=tmp_path / "broken.py")
    with pytest.raises(ConfigError, match=f"evaluate_with: .*{told}"):
        users_evaluation(text)


def test_it_may_ask_the_model_for_answers(tmp_path):
    trained = language()
    users = named(tmp_path, "return len(run.generate(['a b', 'c'], max_new_tokens=4)[1].tokens)")
    prompts, key = ["a b", "c"], jax.random.key(0)
    expected = complete(
        trained.model, trained.params, TOKENIZER, prompts, key=key, max_new_tokens=4,
        temperature=0.0,
    )  # fmt: skip
    assert users(evaluated(trained)) == {"mine": len(expected[1].tokens)}


def test_it_may_ask_a_reward_model_for_scores(tmp_path):
    """The score at the end of prompt, answer and stop token."""
    model = scalar_model(SHAPE)
    trained = TrainedModel(
        "scalar", SHAPE, model.init(jax.random.key(0)), TOKENIZER, "reward_model"
    )
    users = named(tmp_path, "return dict(zip('ab', run.score(['q', 'q r'], ['one', 'two words'])))")
    found = users(evaluated(trained))
    for name, prompt, answer in (("mine/a", "q", "one"), ("mine/b", "q r", "two words")):
        ids = [*TOKENIZER.encode(prompt), *TOKENIZER.encode(answer), TOKENIZER.eos_id]
        score = model.apply(trained.params, np.array([ids], np.int32))[0, -1]
        np.testing.assert_allclose(found[name], score, rtol=1e-5)


def test_it_comes_after_the_stages_own_or_alone(tmp_path):
    users, trained = named(tmp_path, "return float(run.params['w'])"), language()
    both = with_users(lambda step, state: {"own": step}, users, trained, MESH, params=lambda s: s)
    alone = with_users(None, users, trained, MESH, params=lambda s: s)
    assert both(5, {"w": 2}) == {"own": 5, "mine": 2.0} and alone(5, {"w": 2}) == {"mine": 2.0}
    assert with_users(None, None, trained, MESH) is None


def test_the_best_model_is_a_folder_that_says_what_it_was_the_best_at(tmp_path):
    said, trained = [], language()
    params = jax.tree.map(lambda x: x + 1, trained.params)
    keeping_best(tmp_path, trained, said.append)(Best(7, "valid_loss", 1.25), params)
    assert said == [f"best model: {tmp_path / 'best'} (valid_loss 1.25 at step 7)"]
    found = load_trained(tmp_path / "best")
    assert labs.same_bits(found.params, params) and found.stage == "sft"
