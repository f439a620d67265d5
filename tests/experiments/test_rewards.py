"""The rewards that come with the scripts, and the rows and the task that they are asked about."""

import json

import pytest

from experiments import arithmetic, rewards
from instruct_jax.cli import Run
from instruct_jax.data.formats import read_prompts
from instruct_jax.stages.rewards import Answers


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
