"""Groups without signal are replaced: by which, how often, and the same wherever it is done."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax.errors import ConfigError
from instruct_jax.sampling.sampler import Rollout
from instruct_jax.stages import ppo
from instruct_jax.stages.ppo_models import Readings
from instruct_jax.stages.resampling import Answered, Refill, first_look, lively, refilled
from instruct_jax.training.mesh import make_mesh
from tests.stages import lab as labs
from tests.stages import run_ppo
from tests.stages.test_policy_losses import CISPO

# Scores are clipped to their sign, nearly, so that many groups are of one score.
CONFIG = dataclasses.replace(CISPO, max_resamples=2, reward_clip=1e-3, save_every=1)
RECIPE = labs.make_lab(CONFIG).recipe()
PAIRS = RECIPE._replace(config=dataclasses.replace(CONFIG, samples_per_prompt=2))


def of_scores(*scores):
    """Pairs of responses with these scores, whose tokens say which pair it is."""
    rows = len(scores)
    tokens = jnp.arange(rows)[:, None] * jnp.ones((1, 3), jnp.int32)
    where = jnp.ones((rows, 2), bool)
    flat = jnp.zeros((rows, 2))
    scored = Readings(flat, flat, flat, jnp.array(scores, jnp.float32) * 1e-4, None)
    return Answered(Rollout(tokens, jnp.ones((rows, 3), bool), where, flat), scored, None)


def test_the_next_groups_with_signal_take_the_places_of_those_without():
    kept = of_scores(1, 1, 0, 1, 2, 2, 3, 3)
    fresh = of_scores(5, 5, 6, 7, 8, 8, 9, 0)
    found = refilled(PAIRS, kept, fresh)
    np.testing.assert_allclose(1e4 * found.readings.scores, [6, 7, 0, 1, 9, 0, 3, 3], rtol=1e-5)
    np.testing.assert_array_equal(found.rollout.tokens[:, 0], [2, 3, 2, 3, 6, 7, 6, 7])


@pytest.mark.parametrize(
    ("tries", "asked", "left"), [(0, 0, 0.5), (1, 1, 0.25), (2, 2, 0.0), (5, 2, 0.0)]
)
def test_rollouts_are_added_until_no_group_is_without_signal_or_there_were_so_many(
    tries, asked, left
):
    rollouts = [of_scores(1, 1, 0, 1, 2, 2, 3, 4), of_scores(5, 5, 6, 7, 8, 8, 9, 9)]
    rollouts += [of_scores(0, 1, 0, 1, 0, 1, 0, 1)] * 4
    seen = []

    def answer(batch, key):
        seen.append(jax.random.key_data(key).tolist())
        return rollouts[batch["number"]]

    batch = {"number": 0, "more": [{"number": i + 1} for i in range(tries)]}
    refill = Refill(
        lambda answered: first_look(PAIRS, answered), lambda *both: refilled(PAIRS, *both)
    )
    found, logs = lively(answer, refill, batch, labs.KEY)
    assert logs["extra_rollouts"] == asked and len(seen) == 1 + asked
    assert len({tuple(key) for key in seen}) == len(seen)
    assert float(logs["no_signal_first"]) == 0.5
    assert float(first_look(PAIRS, found)["no_signal_first"]) == left


def iteration(mesh):
    """The state and the logs after one iteration on a mesh."""
    lab = labs.make_lab(CONFIG)
    recipe = lab.recipe()
    frozen, state = ppo.placed_models(recipe, labs.policy_params(), labs.reward_params(), mesh)

    def rows(step):
        return labs.prompt_rows(step, rows=CONFIG.prompts)

    more = ppo.IterationBatches(rows, None, CONFIG.updates, 0, lambda i: rows(100 + i), 2)
    with jax.set_mesh(mesh):
        run = ppo.make_iteration(recipe, frozen, state, mesh)
        scored = run.gather(state, more(0), labs.KEY)
        return jax.device_get(scored)


def test_a_mesh_replaces_the_same_groups():
    one, four = (iteration(make_mesh(spec)) for spec in ("data:1", "data:2,fsdp:2"))
    np.testing.assert_array_equal(one.experience.tokens, four.experience.tokens)
    assert one.metrics["extra_rollouts"] == four.metrics["extra_rollouts"] >= 1
    for name in ("no_signal_first", "no_signal"):
        assert one.metrics[name] == four.metrics[name]
    assert one.metrics["no_signal"] < one.metrics["no_signal_first"]


def test_a_run_that_replaced_groups_ends_with_the_same_bits_when_it_is_taken_up(tmp_path):
    whole = run_ppo.run(tmp_path / "whole", 3, config=CONFIG)
    with pytest.raises(run_ppo.Killed):
        run_ppo.run(tmp_path / "stopped", 3, config=CONFIG, stop_at=2)
    resumed = run_ppo.run(tmp_path / "stopped", 3, config=CONFIG)
    assert run_ppo.fingerprint(resumed) == run_ppo.fingerprint(whole)
    metrics = (tmp_path / "whole" / "ppo.jsonl").read_text()
    assert '"extra_rollouts": 2' in metrics or '"extra_rollouts": 1' in metrics


def test_more_rollouts_without_prompts_for_them_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="max_resamples 2 needs more prompts"):
        ppo.train(
            CONFIG, *[None] * 4, None, eos_id=labs.EOS, mesh=make_mesh("data:1"), workdir=tmp_path
        )
