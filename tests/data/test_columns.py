"""What columns and messages mean: read, or refused in one line, and never dropped in silence."""

import json

import pytest

from instruct_jax.data.formats import (
    DataError,
    read_comparisons,
    read_demonstrations,
    read_dialogues,
    read_documents,
    read_prompts,
)
from instruct_jax.data.rows import Turn

SYSTEM, ASK, REPLY = Turn("system", "Be kind."), Turn("user", "ask"), Turn("assistant", "reply")
USER = {"role": "user", "content": "ask"}
ASSISTANT = {"role": "assistant", "content": "reply"}


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def dialogue(path, record, **options):
    (row,) = read_dialogues(write(path / "rows.jsonl", record), **options)
    return row.turns


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "ask", "output": "reply"},
        {"instruction": "ask", "response": "reply"},
        {"question": "ask", "response": "reply"},
        {"question": "ask", "answer": "reply"},
        {"query": "ask", "response": "reply"},
        {"prompt": "ask", "completion": "reply"},
        {"prompt": "ask", "response": "reply"},
        {"messages": [USER, ASSISTANT]},
        {"conversations": [{"from": "human", "value": "ask"}, {"from": "gpt", "value": "reply"}]},
    ],
    ids="+".join,
)
@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_system_column_is_the_system_turn_in_every_format(tmp_path, record, column):
    assert dialogue(tmp_path, record) == (ASK, REPLY)
    assert dialogue(tmp_path, {column: "Be kind.", **record}) == (SYSTEM, ASK, REPLY)
    assert dialogue(tmp_path, {column: " ", **record}) == (ASK, REPLY)
    path = write(tmp_path / "rows.jsonl", {column: "Be kind.", **record})
    assert "Be kind." in str(read_prompts(path, template="chat")[0].text)
    assert "Be kind." in str(read_demonstrations(path)[0].prompt)


def test_a_system_column_stands_above_both_answers_of_a_pair(tmp_path):
    orca = {"system": "Be kind.", "question": "ask", "chosen": "reply", "rejected": "no"}
    (row,) = read_comparisons(write(tmp_path / "a.jsonl", orca), template="chat")
    prompt = "\n<|system|>\nBe kind.\n<|user|>\nask\n<|assistant|>\n"
    assert (row.prompt, row.completions) == (prompt, ("reply", "no"))


def test_two_system_prompts_that_differ_are_refused(tmp_path):
    chat = {"messages": [{"role": "system", "content": "Be kind."}, USER, ASSISTANT]}
    assert dialogue(tmp_path, {**chat, "system": "Be kind."}) == (SYSTEM, ASK, REPLY)
    for record in (
        {**chat, "system": "Be brief."},
        {"prompt": "ask", "response": "reply", "system": "a", "system_prompt": "b"},
    ):
        with pytest.raises(DataError, match=r'field "system.*system'):
            dialogue(tmp_path, record)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("history", [["q", "a"]]), ("context", "c"), ("input", "i"), ("choices", ["a", "b"]),
        ("weight", 0), ("weight", 0.5), ("tools", [{"name": "t"}]), ("images", ["a.png"]),
    ],
)  # fmt: skip
def test_a_column_that_changes_the_meaning_is_refused_where_it_is_not_read(tmp_path, name, value):
    record = {"prompt": "ask", "response": "reply", "id": 7}
    path = write(tmp_path / "a.jsonl", {**record, name: value})
    for read in (read_demonstrations, read_dialogues, read_prompts):
        with pytest.raises(DataError, match=rf'field "{name}": this column is not read.*rename it'):
            read(path)
    for nothing in (None, "", []):
        (row,) = read_demonstrations(write(path, {**record, name: nothing}))
        assert row.meta["id"] == 7
    (row,) = read_demonstrations(write(path, {**record, "weight": 1}))
    assert row.meta == {"id": 7, "weight": 1}


def test_an_input_and_a_context_are_read_beside_every_instruction(tmp_path):
    for answer in ("output", "response"):
        for column in ("input", "context"):
            record = {"instruction": "ask", column: "this", answer: "reply"}
            assert dialogue(tmp_path, record)[0].text == "ask\n\nthis"
    with pytest.raises(DataError, match="both an input and a context"):
        dialogue(tmp_path, {"instruction": "ask", "input": "a", "context": "b", "output": "c"})
    path = write(tmp_path / "a.jsonl", {"question": "ask", "context": "this", "answer": "reply"})
    assert "ask" in read_demonstrations(path)[0].prompt and "this" in read_prompts(path)[0].text


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "ask", "chosen": "reply", "rejected": "no"},
        {"question": "ask", "chosen": "reply", "rejected": "no"},
        {
            "conversations": [{"from": "human", "value": "ask"}],
            "chosen": {"from": "gpt", "value": "reply"},
            "rejected": {"from": "gpt", "value": "no"},
        },
        {
            "prompt": "ask",
            "chosen": json.dumps([USER, ASSISTANT]),
            "rejected": json.dumps([USER, {**ASSISTANT, "content": "no"}]),
        },
    ],
    ids=str,
)
def test_a_pair_is_read_whatever_its_prompt_is_called(tmp_path, record):
    (row,) = read_comparisons(write(tmp_path / "a.jsonl", record), template="chat")
    assert row.prompt == "\n<|user|>\nask\n<|assistant|>\n"
    assert row.completions == ("reply", "no")


@pytest.mark.parametrize("role", ["User", "USER", " human ", "Human"])
def test_a_role_is_known_in_any_case(tmp_path, role):
    chat = [{"role": role, "content": "ask"}, {"role": "Assistant", "content": "reply"}]
    assert dialogue(tmp_path, {"messages": chat}) == (ASK, REPLY)


def test_a_developer_is_the_system_and_an_empty_system_turn_is_none(tmp_path):
    developer = {"role": "developer", "content": "Be kind."}
    assert dialogue(tmp_path, {"messages": [developer, USER, ASSISTANT]}) == (SYSTEM, ASK, REPLY)
    for content in ("", " \n", None):
        chat = [{"role": "system", "content": content}, USER, ASSISTANT]
        assert dialogue(tmp_path, {"messages": chat}) == (ASK, REPLY)


def test_parts_of_text_are_joined(tmp_path):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    turns = dialogue(tmp_path, {"messages": [{**USER, "content": parts}, ASSISTANT]})
    assert turns == (Turn("user", "one\ntwo"), REPLY)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (
            {**USER, "content": [{"type": "image_url", "image_url": {}}]},
            "type 'image_url', no text",
        ),
        ({**USER, "content": ["text"]}, "type 'a string', no text"),
        ({**USER, "content": [{"type": "text"}]}, "expected a string, found null"),
        ({**USER, "content": []}, "empty text"),
        ({"role": "tool", "content": "4"}, "of role 'tool', which no template here writes"),
        ({"role": "function", "content": "4"}, "of role 'function', which no template"),
        ({"from": "observation", "value": "4"}, "of role 'observation'"),
        ({**ASSISTANT, "tool_calls": [{}]}, 'has "tool_calls", which no template here writes'),
        ({**ASSISTANT, "reasoning_content": "hm"}, 'has "reasoning_content", which no'),
        ({**ASSISTANT, "weight": 2}, "a weight that is neither 0 nor 1"),
        ({"role": ["user"], "content": "x"}, "message 1 has no known role"),
        ("text", "message 1 has no known role"),
    ],
)
def test_a_message_that_no_template_writes_is_refused_by_name(tmp_path, message, reason):
    path = write(
        tmp_path / "a.jsonl", {"messages": [USER, message]}, {"messages": [USER, ASSISTANT]}
    )
    for read in (read_demonstrations, read_dialogues, read_prompts):
        with pytest.raises(DataError, match=f"a.jsonl:1:2: field .messages.: .*{reason}"):
            read(path)
    assert len(read_dialogues(path, on_bad_row="skip")) == 1


def test_whole_numbers_may_be_written_as_floats(tmp_path):
    kwise = {"prompt": "p", "completions": ["a", "b"], "ranks": [1.0, 0.0]}
    (row,) = read_comparisons(write(tmp_path / "a.jsonl", kwise))
    assert row.ranks == (1, 0) and all(type(rank) is int for rank in row.ranks)
    # Ties at the mean of their places, as statistics programs rank.
    tied = {"prompt": "p", "completions": list("abcde"), "ranks": [4.5, 1, 2.5, 2.5, 4.5]}
    assert read_comparisons(write(tmp_path / "c.jsonl", tied))[0].ranks == (2, 0, 1, 1, 2)
    pair = {"input": "p", "output_1": "a", "output_2": "b", "label": 2.0}
    assert read_comparisons(write(tmp_path / "a.jsonl", pair))[0].ranks == (1, 0)
    for label in (1.5, True, "x", 3):
        with pytest.raises(DataError, match="expected one of 1, 2"):
            read_comparisons(write(tmp_path / "a.jsonl", {**pair, "label": label}))


def test_json_in_a_column_of_text_is_read(tmp_path):
    import csv

    import pyarrow
    import pyarrow.parquet

    chat, kwise = json.dumps([USER, ASSISTANT]), ("p", '["a", "b"]', "[1, 0]")
    with open(tmp_path / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["messages"], [chat]])
    with open(tmp_path / "b.csv", "w", newline="") as file:
        csv.writer(file).writerows([["prompt", "completions", "ranks", "labeler"], [*kwise, ""]])
    pyarrow.parquet.write_table(pyarrow.table({"messages": [chat]}), tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        assert read_dialogues(tmp_path / name)[0].turns == (ASK, REPLY)
    (row,) = read_comparisons(tmp_path / "b.csv")
    assert (row.completions, row.ranks, row.labeler) == (("a", "b"), (1, 0), None)
    (tmp_path / "a.csv").write_text("messages\n\"[{'role': 'user', 'content': 'ask'}]\"\n")
    with pytest.raises(DataError, match=r'a.csv:2: field "messages": not JSON.*text of its JSON'):
        read_dialogues(tmp_path / "a.csv")
    (row,) = read_prompts(write(tmp_path / "a.jsonl", {"prompt": '[{"a": 1}] is what?'}))
    assert row.text == '[{"a": 1}] is what?', "a prompt may start like JSON"


@pytest.mark.parametrize("read", [read_demonstrations, read_dialogues])
def test_rows_of_another_kind_are_told_as_such(shared, read):
    for name in ("alpacaeval_rankings_k25.jsonl.gz", "pandalm_human_3annotators.jsonl.gz"):
        with pytest.raises(DataError, match=r":1:1: expected demonstrations, found comparisons"):
            read(shared / "data/rm" / name)


def refused(path, read, record, message):
    with pytest.raises(DataError, match=rf"a.jsonl:1:\d+: {message}"):
        read(write(path / "a.jsonl", record))


@pytest.mark.parametrize("prompt", [["a", "b"], ["a", "b", "c"]])
def test_texts_as_a_prompt_are_refused_unless_we_wrote_them(tmp_path, prompt):
    good = {"prompt": "a", "completion": "x"}
    path = write(tmp_path / "a.jsonl", {**good, "prompt": prompt}, good)
    for read in (read_demonstrations, read_prompts, read_dialogues):
        for template in (None, "chat"):
            with pytest.raises(DataError, match=r'a.jsonl:1:2: field "prompt": a list of texts'):
                read(path, template=template)
            assert len(read(path, template=template, on_bad_row="skip")) == 1
    plain = {**good, "prompt": prompt, "template": "plain"}
    refused(tmp_path, read_demonstrations, plain, 'field "prompt": a list of texts')


def test_an_answer_alone_is_refused(tmp_path):
    for read in (read_demonstrations, read_prompts, read_dialogues):
        refused(tmp_path, read, {"messages": [ASSISTANT]}, 'field "messages": an answer without')
    refused(tmp_path, read_prompts, {"question_id": 1, "turns": []}, 'field "turns": expected')


@pytest.mark.parametrize("column", ["System", "SYSTEM_PROMPT", "system_message", "System Prompt"])
def test_a_system_column_is_known_however_it_is_spelt(tmp_path, column):
    record = {column: "Be kind.", "prompt": "ask", "response": "reply"}
    assert dialogue(tmp_path, record) == (SYSTEM, ASK, REPLY)
    refused(tmp_path, read_prompts, {**record, "system": "b"}, r'field ".*say different things')


@pytest.mark.parametrize("key", ["weight", "train", "training", "loss"])
def test_a_message_that_is_not_to_be_learnt_is_no_target(tmp_path, key):
    chat = [USER, {**ASSISTANT, key: False}, USER, {**ASSISTANT, key: True}]
    turns = dialogue(tmp_path, {"messages": chat})
    assert [turn.target for turn in turns] == [True, False, True, True]
    chat[1][key] = "no"
    refused(tmp_path, read_dialogues, {"messages": chat}, f".*has a {key} that is neither 0 nor 1")


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [USER, ASSISTANT]},
        {"instruction": "ask", "output": "reply"},
        {"question": "ask", "answer": "reply"},
        {"prompt": "ask", "chosen": "reply", "rejected": "no"},
    ],
    ids="+".join,
)
def test_an_answer_that_is_labelled_false_is_refused(tmp_path, record):
    read = read_comparisons if "chosen" in record else read_demonstrations
    for label in (False, 0, 0.0, "false"):
        refused(tmp_path, read, {**record, "label": label}, 'field "label": a label false')
    (row,) = read(write(tmp_path / "a.jsonl", {**record, "label": True}))
    assert row.meta == {"label": True}


def test_a_weighted_document_is_refused(tmp_path):
    for weight in (0, 0.5):
        refused(tmp_path, read_documents, {"text": "a", "weight": weight}, 'field "weight"')
    assert len(read_documents(write(tmp_path / "a.jsonl", {"text": "a", "weight": 1}))) == 1


def test_a_label_may_be_a_float(tmp_path):
    judged = [{"prompt": "p", "completion": "a", "label": label} for label in (1.0, 0.0)]
    rows = read_comparisons(write(tmp_path / "a.jsonl", *judged))
    assert [row.label for row in rows] == [True, False]


HH_PROMPT = "\n\nHuman: q\n\nAssistant:"


@pytest.mark.parametrize(
    "prompt", [HH_PROMPT, "Human: q\n\nAssistant:", "q", [{**USER, "content": "q"}]]
)
def test_a_transcript_with_its_prompt_beside_it_is_a_transcript(tmp_path, prompt):
    pair = {"prompt": prompt, "chosen": f"{HH_PROMPT} a", "rejected": f"{HH_PROMPT} b"}
    (row,) = read_comparisons(write(tmp_path / "a.jsonl", pair))
    assert (row.prompt, row.completions, row.template) == (HH_PROMPT, (" a", " b"), "hh")
    other = 'field "prompt": not the prompt that'
    refused(tmp_path, read_comparisons, {**pair, "prompt": "another"}, other)


def test_a_chat_pair_ends_with_the_assistant_and_has_one_prompt(tmp_path):
    pair = {"chosen": [USER, ASSISTANT], "rejected": [USER, {**ASSISTANT, "content": "no"}]}
    for prompt in ("ask", [USER], ""):
        (row,) = read_comparisons(write(tmp_path / "a.jsonl", {"prompt": prompt, **pair}))
        assert row.completions == ("reply", "no")
    for prompt in ("another", [{**USER, "content": "another"}], [USER, ASSISTANT, USER]):
        message = 'field "prompt": not the prompt that'
        refused(tmp_path, read_comparisons, {"prompt": prompt, **pair}, message)
    last = 'field "chosen": the last turn is not the assistant'
    refused(tmp_path, read_comparisons, {"prompt": "ask", **pair, "chosen": [USER]}, last)


def test_a_rejected_answer_of_a_higher_score_is_refused(tmp_path):
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    scored = {**pair, "score_chosen": 1.0, "score_rejected": 2}
    refused(tmp_path, read_comparisons, scored, 'field "score_chosen": the rejected answer')
    (row,) = read_comparisons(write(tmp_path / "a.jsonl", {**scored, "score_chosen": 2}))
    assert row.meta == {"score_chosen": 2, "score_rejected": 2}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [USER, {**ASSISTANT, "content": "reply<|endoftext|>\n"}]},
        {"instruction": "ask", "output": "reply<|endoftext|>"},
        {"prompt": "ask", "completion": "reply<|endoftext|>"},
        {"question": "ask", "answer": "reply<|endoftext|>"},
    ],
    ids="+".join,
)
def test_an_end_of_text_that_is_spelt_out_is_taken_off_in_every_format(tmp_path, record):
    assert dialogue(tmp_path, record) == (ASK, REPLY)
    (row,) = read_demonstrations(write(tmp_path / "a.jsonl", record))
    assert row.response == "reply"
    pair = {"prompt": "p", "chosen": "a<|endoftext|>", "rejected": "b"}
    assert read_comparisons(write(tmp_path / "a.jsonl", pair))[0].completions == ("a", "b")
    refused(tmp_path, read_comparisons, {**pair, "rejected": "a"}, ".*the same text")


def test_text_of_json_is_a_chat_in_a_table_alone(tmp_path):
    chat = json.dumps([USER])
    path = write(tmp_path / "a.jsonl", {"prompt": chat, "completion": "x"})
    assert read_prompts(path)[0].text == read_demonstrations(path)[0].prompt == chat
    (tmp_path / "a.csv").write_text('prompt\n"' + chat.replace('"', '""') + '"\n')
    assert read_prompts(tmp_path / "a.csv")[0].text == "\n<|user|>\nask\n<|assistant|>\n"


def test_columns_in_another_case_are_suggested(tmp_path):
    (tmp_path / "a.csv").write_text("Prompt,Completion\nq,a\n")
    with pytest.raises(DataError, match=r'field "Prompt": unknown column.*did you mean "prompt"'):
        read_demonstrations(tmp_path / "a.csv")
