"""The rewards that come with the scripts, and the rows and the task that they are asked about."""

import json
import signal
import subprocess
import sys
from unittest.mock import ANY

import pytest

from experiments import arithmetic, rewards
from instruct_jax.cli import Run
from instruct_jax.data.formats import read_prompts
from instruct_jax.files import read_lines
from instruct_jax.stages.rewards import Answers
from instruct_jax.stages.trained import load_trained
from tests.experiments import scripts
from tests.stages.lab import same_bits


def answers(*responses, reference, ended=True):
    n = len(responses)
    return Answers(
        ["1 + 1 ="] * n, responses, [(1,)] * n, [(2,)] * n, [ended] * n,
        [{"reference": reference}] * n,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 5 + 13 = 18 left.\n#### 18", 18.0),
        ("#### 1,024", 1024.0),
        ("#### -3.5 apples of 7", -3.5),
        ("first #### 1 then #### 2", 2.0),
        ("12, or rather 13.", 13.0),
        ("#### none, 4 before it", 4.0),
        ("no idea", None),
        ("#### no idea", None),
    ],
)
def test_the_final_number_is_the_one_after_the_marker_or_the_last(text, number):
    assert rewards.final_number(text) == number


def test_a_number_is_right_and_no_number_is_wrong():
    found = rewards.number(answers("#### 18", "18.0", "17", "", reference="so #### 18"))
    assert found == [1.0, 1.0, 0.0, 0.0]
    assert rewards.number(answers("no", reference="none")) == [0.0], "two times nothing is no match"
    assert rewards.exact(answers(" 18\n", "18.0", reference="18")) == [1.0, 0.0]


def test_rows_of_gsm8k_carry_their_answer_beside_the_prompt(tmp_path):
    """{"question", "answer"}: the answer is no part of the prompt."""
    rows = [{"question": "How many?", "answer": "5 + 13 = <<5+13=18>>18\n#### 18"}]
    path = tmp_path / "gsm8k.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (row,) = read_prompts(path)
    assert row.meta["reference"].endswith("#### 18") and "18" not in str(row.text)
    assert rewards.number(answers("It is 18.", reference=row.meta["reference"])) == [1.0]


def test_the_arithmetic_task_is_right_where_it_asks_and_wrong_as_often_as_it_says(tmp_path):
    config = arithmetic.Config(documents=2_000, questions=50, wrong=0.25)
    arithmetic.main(config, Run(tmp_path))
    texts = [json.loads(x)["text"] for x in (tmp_path / "documents.jsonl").read_text().splitlines()]
    sums = [text.replace("+", "=").split("=") for text in texts]
    wrong = sum(int(a) + int(b) != int(said) for a, b, said in sums) / len(sums)
    assert abs(wrong - 0.25) < 0.04
    for row in read_prompts(tmp_path / "questions.jsonl"):
        a, b = row.text.removesuffix(" =").split(" + ")
        assert int(row.meta["reference"]) == int(a) + int(b)


OWN = """
import os, signal
calls = 0

def short(answers):
    global calls
    calls += 1
    if str(calls) == os.environ.get("KILLED_AT"):
        os.kill(os.getpid(), signal.SIGKILL)
    return [-len(ids) for ids in answers.response_ids]
"""


def test_killed_while_it_asks_a_reward_of_ones_own_a_run_ends_as_if_it_had_not_been(
    tmp_path, repository
):
    """R1, R22: a real SIGKILL within the function; parameters to the bit, and no metric and no
    sample twice or missing.
    """
    (tmp_path / "own.py").write_text(OWN)
    init = scripts.write_model(tmp_path / "gpt/model")
    prompts = scripts.write_rows(tmp_path / "data")["prompts"]

    def run(name, **killed):
        command = [sys.executable, "experiments/ppo.py", "--config=configs/ppo.py:debug"]
        command += [f"--workdir={tmp_path / name}", f"--config.init={init}", "--mesh=data:1"]
        command += ["--config.data.source=files", f"--config.data.prompts={prompts}"]
        command += ["--config.data.valid_fraction=0.2", "--config.reward_model=none"]
        command += [f"--config.rewards=('python={tmp_path / 'own.py'}:short',)"]
        command += ["--config.ppo.episodes=64", "--config.ppo.response_length=8"]
        command += ["--config.ppo.save_every=2"]
        environment = scripts.environment(repository) | killed
        done = subprocess.run(
            command, cwd=repository, env=environment, capture_output=True, text=True
        )
        return done.returncode, done.stderr

    assert run("whole") == (0, ANY)
    for call in ("4", "2"):  # between two saves, and soon after it is taken up
        code, told = run("killed", KILLED_AT=call)
        assert code == -signal.SIGKILL, told
    assert run("killed") == (0, ANY)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert (whole / "samples.jsonl").read_bytes() == (killed / "samples.jsonl").read_bytes()
    models = [load_trained(folder / "model").params for folder in (whole, killed)]
    assert same_bits(*models)
    logs = [[timeless(row) for row in read_lines(w / "ppo.jsonl")] for w in (whole, killed)]
    assert logs[0] == logs[1] and len(logs[0]) >= 4


def timeless(row):
    return {name: x for name, x in row.items() if "second" not in name and name != "time"}
