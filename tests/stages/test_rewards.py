"""Rewards from anywhere: what they are given, how they add up, and how each failure ends a run."""

import dataclasses
import http.server
import json
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax.data.rows import Prompt
from instruct_jax.data.tokenizer import train_bpe
from instruct_jax.errors import ConfigError, RewardError
from instruct_jax.models.transformer import language_model, scalar_model
from instruct_jax.sampling.sampler import Rollout
from instruct_jax.stages import ppo
from instruct_jax.stages.reward_model import sequence_scores
from instruct_jax.stages.reward_sources import Endpoint, Ensemble, ModelReward, named_rewards
from instruct_jax.stages.rewards import HostRewards, Weighted, answers_of
from instruct_jax.stages.trained import TrainedModel
from instruct_jax.training.checkpoint import Checkpointer
from instruct_jax.training.mesh import make_mesh
from tests.stages import lab as labs
from tests.stages.run_ppo import CONFIG, Killed, fingerprint

TOKENIZER = train_bpe(["0 1 2 3 4 5 6 7 8 9 + ="] * 9, vocab_size=258)
EOS, PAD = TOKENIZER.eos_id, TOKENIZER.pad_id
ROWS = [Prompt("1+2=", {"reference": "3"}), Prompt("2+2=", {"reference": "4"})]


def rollout_of(*responses, width=4):
    """Two answers to each of ROWS: texts, those with a stop that end with "."."""
    asked = [TOKENIZER.encode(row.text) for row in ROWS for _ in range(2)]
    tokens = np.full((4, 6 + width), PAD, np.int32)
    mask, where = np.zeros(tokens.shape, bool), np.zeros((4, width), bool)
    for i, (prompt, text) in enumerate(zip(asked, responses, strict=True)):
        ids = [*TOKENIZER.encode(text.rstrip(".")), *[EOS] * text.endswith(".")]
        tokens[i, 6 - len(prompt) : 6], mask[i, 6 - len(prompt) : 6] = prompt, True
        tokens[i, 6 : 6 + len(ids)], mask[i, 6 : 6 + len(ids)] = ids, True
        where[i, : len(ids)] = True
    return Rollout(tokens, mask, where, np.zeros(where.shape, np.float32))


ROLLOUT = rollout_of("3.", "12", "4.", "5.")


def right(answers):
    return [
        float(r == m["reference"]) for r, m in zip(answers.responses, answers.meta, strict=True)
    ]


def asking(*rewards, **limits):
    named = [Weighted(*reward) if isinstance(reward, tuple) else reward for reward in rewards]
    return HostRewards(named, ROWS, TOKENIZER, **limits)


INDEX = np.array([0, 1])


# --- what is asked and what comes of it ---------------------------------------------------------


def test_a_reward_is_given_texts_tokens_and_what_stands_beside_the_prompt():
    answers = answers_of(ROLLOUT, ROWS, TOKENIZER)
    assert answers.prompts == ["1+2=", "1+2=", "2+2=", "2+2="]
    assert answers.responses == ["3", "12", "4", "5"]
    assert answers.ended == [True, False, True, True]
    assert answers.prompt_ids[3] == tuple(TOKENIZER.encode("2+2="))
    assert answers.response_ids[0] == (*TOKENIZER.encode("3"), EOS)
    assert answers.response_ids[1] == tuple(TOKENIZER.encode("12"))
    assert [meta["reference"] for meta in answers.meta] == ["3", "3", "4", "4"]


def test_rewards_are_a_weighted_sum_and_each_is_logged_apart():
    """A score of 0.0 is a score; one number a token goes where its token is."""
    each = lambda answers: [[0.5] * len(ids) for ids in answers.response_ids]  # noqa: E731
    ask = asking(("right", right, 2.0), ("each", each, -1.0), ("none", lambda a: [0.0] * len(a)))
    given, logs = ask(ROLLOUT, INDEX)
    assert given.scores.tolist() == [2.0, 0.0, 2.0, 0.0]
    np.testing.assert_array_equal(given.tokens, np.where(ROLLOUT.response_mask, -0.5, 0.0))
    assert {name: float(x) for name, x in logs.items()} == {
        "reward_right": 0.5, "reward_each": 1.0, "reward_none": 0.0,
    }  # fmt: skip


def test_rewards_are_asked_in_batches_and_side_by_side():
    sizes, meeting = [], threading.Barrier(2)

    def sized(answers):
        sizes.append(len(answers))
        return [1.0] * len(answers)

    def together(answers):
        meeting.wait(timeout=20)  # returns only where both are asked at once
        return [1.0] * len(answers)

    given, _ = asking(("sized", sized), batch=3)(ROLLOUT, INDEX)
    assert sizes == [3, 1] and given.scores.tolist() == [1.0] * 4
    given, _ = asking(("a", together), ("b", together))(ROLLOUT, INDEX)
    assert given.scores.tolist() == [2.0] * 4


def raising(answers):
    return [1.0 / (text != "4") for text in answers.responses]


@pytest.mark.parametrize(
    ("reward", "told"),
    [
        (raising, r"reward bad, row 2 \('2\+2=' -> '4'\): ZeroDivisionError"),
        (lambda a: [1.0] * (len(a) - 1), r"reward bad, rows 0 to 3: 3 rewards for 4 answers"),
        (lambda a: [0.0, np.nan, 0.0, 0.0], r"row 1 \('1\+2=' -> '12'\): nan is not finite"),
        (lambda a: [0.0, 0.0, 0.0, np.inf], r"row 3 .*: inf is not finite"),
        (lambda a: [0.0, None, 0.0, 0.0], r"row 1 .* (is no number|is not finite)"),
        (lambda a: ["good"] * 4, r"row 0 .*'good' is no number"),
        (lambda a: [[0.0]] * 4, r"row 0 .*shape \(1,\) for 2 tokens"),
        (lambda a: [0.0, [0.0] * len(a.response_ids[1]), 0.0, 0.0], r"a number to some answers"),
        (lambda a: time.sleep(60), r"rows 0 to 3: nothing came within 0.2 seconds"),
    ],
    ids=["raises", "short", "nan", "inf", "None", "text", "wrong tokens", "mixed", "sleeps"],
)
def test_what_is_no_reward_stops_the_run_and_names_the_row(reward, told):
    with pytest.raises(RewardError, match=told) as stop:
        asking(("bad", reward), seconds=0.2)(ROLLOUT, INDEX)
    assert stop.value.exit_code == 3


# --- other models -------------------------------------------------------------------------------


def reward_model(tokenizer, seed=0):
    shape = dataclasses.replace(labs.SHAPE, vocab_size=tokenizer.vocab_size, vocab_multiple=1)
    params = scalar_model(shape).init(jax.random.key(seed))
    return TrainedModel("scalar", shape, params, tokenizer, "reward_model")


def alone(reward, texts, *, ended):
    rows = [[*reward.tokenizer.encode(p), *reward.tokenizer.encode(r)] for p, r in texts]
    rows = [[*row, *[reward.tokenizer.eos_id] * end] for row, end in zip(rows, ended, strict=True)]
    score = lambda ids: sequence_scores(  # noqa: E731
        reward.model, reward.params, np.array([ids], np.int32), np.ones((1, len(ids)), bool)
    )
    return np.array([float(score(ids)[0]) for ids in rows])


@pytest.mark.parametrize("same", [True, False], ids=["the policy's tokenizer", "another"])
def test_a_reward_model_scores_as_it_does_alone(same):
    """To 1e-5, decoded and encoded again where it reads other tokens."""
    reward = reward_model(TOKENIZER if same else train_bpe(["12 34 + = 5"] * 9, vocab_size=262))
    answers = answers_of(ROLLOUT, ROWS, TOKENIZER)
    found = ModelReward(reward, TOKENIZER, prompt_length=6, response_length=4)(answers)
    texts = list(zip(answers.prompts, answers.responses, strict=True))
    np.testing.assert_allclose(found, alone(reward, texts, ended=answers.ended), atol=1e-5)


def test_an_ensemble_is_its_mean_its_worst_or_its_mean_less_the_spread():
    members = [lambda a, x=x: [x] * len(a) for x in (1.0, 2.0, 6.0)]
    answers = answers_of(ROLLOUT, ROWS, TOKENIZER)
    spread = np.std([1.0, 2.0, 6.0])
    for ensemble, value in [
        (Ensemble(members), 3.0),
        (Ensemble(members, least=True), 1.0),
        (Ensemble(members, spread=0.5), 3.0 - 0.5 * spread),
    ]:
        np.testing.assert_allclose(ensemble(answers), [value] * 4, rtol=1e-6)


# --- an endpoint --------------------------------------------------------------------------------


@pytest.fixture
def endpoint():
    """The URL of a service of OpenRLHF's protocol, and what it was asked."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            if self.path == "/broken":
                self.send_error(500)
                return
            reply = {"rewards": [len(q) for q in asked[-1]["query"]]}
            body = json.dumps(reply if self.path == "/get_reward" else {"scores": []}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_endpoint_is_asked_in_openrlhfs_protocol(endpoint):
    url, asked = endpoint
    given, _ = asking(("service", Endpoint(f"{url}/get_reward", 20.0), 0.1))(ROLLOUT, INDEX)
    assert asked == [
        {"query": ["1+2=3", "1+2=12", "2+2=4", "2+2=5"], "prompts": ["1+2="] * 2 + ["2+2="] * 2}
    ]
    np.testing.assert_allclose(given.scores, [0.5, 0.6, 0.5, 0.5])
    for path, told in (("broken", "500"), ("other", 'no {"rewards"')):
        with pytest.raises(RewardError, match=f"{url}/{path}: .*{told}"):
            asking(("service", Endpoint(f"{url}/{path}", 20.0)))(ROLLOUT, INDEX)
    with pytest.raises(RewardError, match="refused"):
        asking(("service", Endpoint("http://127.0.0.1:1/get_reward", 20.0)))(ROLLOUT, INDEX)


# --- the command line ---------------------------------------------------------------------------


def test_rewards_are_named_by_kind_place_and_weight(tmp_path):
    (tmp_path / "mine.py").write_text("def score(answers):\n    return [1.0] * len(answers)\n")
    folders = []

    def model(folder):
        folders.append(folder)
        return lambda answers: [float(len(folders))] * len(answers)

    texts = [
        f"python={tmp_path}/mine.py:score*0.5", "model=runs/rm/model",
        "models=a,b/model:mean-0.5sd*2",
        "endpoint=http://localhost:80/get_reward*-1", f"python={tmp_path}/mine.py:score",
    ]  # fmt: skip
    found = named_rewards(texts, model=model, seconds=1.0)
    assert [(w.name, w.weight) for w in found] == [
        ("score", 0.5), ("rm", 1.0), ("ensemble", 2.0), ("endpoint", -1.0), ("score_2", 1.0),
    ]  # fmt: skip
    assert folders == ["runs/rm/model", "a", "b/model"] and found[2].reward.spread == 0.5


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("my.py:score", "is not KIND=WHAT; kinds are model, models, python, endpoint"),
        ("pyton=a.py:b", "no kind 'pyton'"),
        ("python=a.py", "rewards: 'a.py': expected FILE.py:NAME"),
        ("python=nowhere.py:score", "nowhere.py: there is no such file"),
        ("python={here}:scroe", "no function 'scroe' here; there are right"),
        ("models=a,b", "expected FOLDER,FOLDER:mean"),
        ("endpoint=file:///etc/passwd", "expected http"),
        ("python={here}:right*1.2.3", "'1.2.3' is no weight"),
    ],
)
def test_a_reward_that_is_misspelt_is_one_line(tmp_path, text, told):
    here = tmp_path / "mine.py"
    here.write_text("def right(answers):\n    return []\n")
    with pytest.raises(ConfigError, match=told):
        named_rewards([text.format(here=here)], model=lambda folder: None, seconds=1.0)


# --- in PPO -------------------------------------------------------------------------------------


# The lab's ids as text, so that a function may read them.
class Ids:
    """A tokenizer of the lab: the words are the ids."""

    eos_id, pad_id, fingerprint = labs.EOS, labs.PAD, "ids"

    def decode(self, ids):
        return " ".join(map(str, ids))


def run(workdir, reward, *, iterations=3, stop_at=None, config=CONFIG, weight=0.0):
    """PPO-ptx on the lab's models with a reward of its own."""
    rows = [Prompt(str(i), {"number": i}) for i in range(config.prompts)]

    def prompts(step):
        if step == stop_at:
            raise Killed
        asked = labs.prompt_rows(step, rows=config.prompts)
        return asked | {"index": np.arange(config.prompts, dtype=np.int32)}

    config = dataclasses.replace(
        config,
        episodes=iterations * config.rollout_batch,
        warmup_iterations=min(config.warmup_iterations, iterations),
    )
    return ppo.train(
        config,
        language_model(labs.SHAPE),
        scalar_model(labs.SHAPE),
        labs.policy_params(),
        labs.reward_params(),
        prompts,
        ptx=labs.text_rows,
        eos_id=labs.EOS,
        mesh=make_mesh("data:1"),
        workdir=workdir,
        rewards=HostRewards([Weighted("sevens", reward)], rows, Ids()),
        model_weight=weight,
    )


def sevens(answers):
    """How many of the tokens are 7."""
    return [ids.count(7) for ids in answers.response_ids]


def log_of(workdir):
    lines = map(json.loads, (workdir / "ppo.jsonl").read_text().splitlines())
    return [row for row in lines if "kl" in row]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, run(workdir, sevens)


def test_a_reward_of_ones_own_is_the_score(whole):
    """And with a weight the reward model's is added to it."""
    for row in log_of(whole[0]):
        assert row["score"] == pytest.approx(row["reward_sevens"], abs=1e-6)
        assert row["score_max"] == int(row["score_max"]) >= 1


def test_the_reward_model_and_a_function_add_up(tmp_path, whole):
    run(tmp_path / "a", sevens, iterations=1, weight=0.5)
    run(tmp_path / "b", lambda answers: [0.0] * len(answers), iterations=1, weight=1.0)
    (both,), (model,), (own, *_) = map(log_of, (tmp_path / "a", tmp_path / "b", whole[0]))
    assert both["score"] == pytest.approx(0.5 * model["score"] + own["score"], abs=1e-5)
    assert both["reward_sevens"] == own["reward_sevens"] and abs(model["score"]) > 1e-2


def test_a_run_with_a_function_is_taken_up_to_the_bit(tmp_path, whole):
    with pytest.raises(Killed):
        run(tmp_path, sevens, stop_at=2)
    assert fingerprint(run(tmp_path, sevens)) == fingerprint(whole[1])


def test_a_reward_that_fails_on_the_way_loses_nothing(tmp_path, whole):
    """The state of before the iteration is saved, also between saves, and goes on as if it had not
    failed."""
    asked = []

    def failing(answers):
        asked.append(len(answers))
        return sevens(answers) if len(asked) < 3 else [float("nan")] * len(answers)

    config = dataclasses.replace(CONFIG, save_every=0)
    with pytest.raises(RewardError, match=r"reward sevens, row 0 .* is not finite"):
        run(tmp_path, failing, config=config)
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        assert checkpointer.latest_step == 2
    assert fingerprint(run(tmp_path, sevens, config=config)) == fingerprint(whole[1])


def test_rewards_of_tokens_are_paid_where_they_are_earned():
    """Each joins the shaped rewards of its own token; without a future they are the returns."""
    config = dataclasses.replace(labs.CONFIG, discount=0.0, whiten_advantages="none", kl_coef=0.0)
    lab = labs.make_lab(config)
    rollout = labs.sample(lab)
    recipe = lab.recipe()._replace(model_weight=0.0)
    readings = ppo.read_rollout(recipe, lab.frozen.models(lab.state), rollout)
    paid = jnp.arange(rollout.response_mask.size, dtype=jnp.float32)
    given = ppo.Given(jnp.zeros(labs.ROWS), paid.reshape(rollout.response_mask.shape))
    experience, metrics = ppo.make_experience(recipe, jnp.float32(0.0), rollout, readings, given)
    wanted = np.where(rollout.response_mask, given.tokens, 0.0)
    np.testing.assert_allclose(experience.returns, wanted, atol=1e-4)
    np.testing.assert_allclose(metrics["score"], wanted.sum(-1).mean(), rtol=1e-5)
