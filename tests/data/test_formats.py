import gzip
import json
from collections import Counter

import pytest

from instruct_jax.data import files, texts
from instruct_jax.data.formats import (
    Comparison,
    DataError,
    Demonstration,
    Dialogue,
    Document,
    Prompt,
    Turn,
    hash_files,
    read_comparisons,
    read_demonstrations,
    read_dialogues,
    read_documents,
    read_prompts,
    stream_documents,
    write_rows,
)
from instruct_jax.data.rows import plain_text
from instruct_jax.data.templates import ALPACA, CHAT, HH


def write(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# Real files: rows and bad rows add up to the rows of the file; pandalm has three labelers a row.
REAL = [
    (read_demonstrations, "sft/alpaca_52k.jsonl.gz", "alpaca", 49904, 27),
    (read_demonstrations, "sft/alpaca_gpt4_demo999.jsonl.gz", "alpaca", 999, 0),
    (read_demonstrations, "sft/lima.jsonl.gz", "alpaca", 832, 0),
    (read_demonstrations, "sft/dolly_hhrlhf_small.jsonl.gz", "prompt+response", 784, 0),
    (read_demonstrations, "sft/self_instruct_seed_tasks.jsonl", "self-instruct", 175, 0),
    (read_demonstrations, "sft/t0_train.jsonl.gz", "prompt+completion", 45494, 1400),
    (read_comparisons, "rm/hh_helpful_base_pairs.jsonl.gz", "hh transcripts", 1827, 22),
    (read_comparisons, "rm/hh_harmless_base_pairs.jsonl.gz", "hh transcripts", 1824, 30),
    (read_comparisons, "rm/webgpt_pairs.jsonl.gz", "webgpt", 703, 0),
    (read_comparisons, "rm/pandalm_human_3annotators.jsonl.gz", "pandalm", 3 * 688, 41),
    (read_comparisons, "rm/oasst_rankings.jsonl.gz", "oasst rankings", 176, 0),
    (read_comparisons, "rm/alpacaeval_rankings_k25.jsonl.gz", "alpaca_eval rankings", 613, 0),
    (read_comparisons, "rm/llmbar_natural.jsonl", "llmbar", 100, 0),
    (read_documents, "pretrain/gutenberg_16books.jsonl.gz", "text", 16, 0),
    (read_documents, "pretrain/c4_300.jsonl.gz", "text", 300, 0),
    (read_prompts, "eval/user_oriented_252_with_predictions.jsonl.gz", "instructions", 252, 0),
    (read_prompts, "eval/mt_bench_question.jsonl", "questions", 80, 0),
]


@pytest.mark.parametrize(
    ("read", "name", "format", "good", "bad"), REAL, ids=[row[1] for row in REAL]
)
def test_every_row_of_a_public_set_is_read_or_counted(shared, read, name, format, good, bad):
    rows = read(shared / "data" / name, on_bad_row="skip")
    (report,) = rows.report
    assert (report.format, report.rows, report.bad.total()) == (format, good, bad)
    assert len(rows) == good
    assert format in str(report)


def test_a_public_set_with_a_bad_row_stops_at_its_place(shared):
    with pytest.raises(DataError, match=r'alpaca_52k.jsonl.gz:276:103: field "output": empty'):
        read_demonstrations(shared / "data/sft/alpaca_52k.jsonl.gz")


@pytest.mark.parametrize(
    ("name", "lines"),
    [("tinyshakespeare.txt.gz", 40000 - 7223), ("wikipedia_30.txt.gz", 30)],
)
def test_a_text_file_is_one_document_or_one_a_line(shared, name, lines):
    path = shared / "data/pretrain" / name
    assert len(read_documents(path)) == 1
    assert len(read_documents(path, split="line")) == lines


def test_the_literal_end_of_text_of_t0_is_taken_off(shared):
    rows = read_demonstrations(shared / "data/sft/t0_train.jsonl.gz", limit=100, on_bad_row="skip")
    assert len(rows) == 100
    assert not any("<|endoftext|>" in row.response for row in rows)


def test_real_alpaca_rows_are_in_the_template_that_dolly_was_published_in(shared):
    """G4-3: the strings, against an independent copy of them."""
    ours = read_demonstrations(shared / "data/sft/alpaca_52k.jsonl.gz", limit=1)[0]
    theirs = read_demonstrations(shared / "data/sft/dolly_hhrlhf_small.jsonl.gz", limit=1)[0]
    preamble = theirs.prompt.partition("### Instruction:\n")[0]
    task = "Give three tips for staying healthy."
    assert ours.prompt == f"{preamble}### Instruction:\n{task}\n\n### Response:"
    assert ours.response.startswith("1.Eat")


def test_real_hh_pairs_share_all_but_the_last_turn(shared):
    path = shared / "data/rm/hh_helpful_base_pairs.jsonl.gz"
    rows = read_comparisons(path, on_bad_row="skip", limit=50)
    lines = gzip.decompress(path.read_bytes()).decode().splitlines()
    texts = {(r["chosen"], r["rejected"]) for r in map(json.loads, lines)}
    for row in rows:
        prompt = plain_text(row.prompt)
        assert (prompt + row.completions[0], prompt + row.completions[1]) in texts
        assert prompt.endswith("\n\nAssistant:") and row.ranks == (0, 1)


def test_rankings_of_25_models_follow_the_judge_and_keep_their_sources(shared):
    path = shared / "data/rm/alpacaeval_rankings_k25.jsonl.gz"
    rows = read_comparisons(path)
    assert Counter(row.meta["dataset"] for row in rows)["selfinstruct"] == 252
    assert (
        sum(name.count("+") + 1 for row in rows for name in row.sources) == 608 * 25 + 5 * 24 - 24
    )
    assert all(len(row.sources) == len(row.completions) == len(row.ranks) for row in rows)
    # The file is sorted best first, so ranks never fall; merged texts stand at their mean score.
    unmerged = [row for row in rows if not any("+" in source for source in row.sources)]
    assert len(unmerged) > 400
    assert all(list(row.ranks) == sorted(row.ranks) for row in unmerged)


def test_a_subsample_of_completions_depends_on_seed_and_prompt_alone(shared):
    path = shared / "data/rm/alpacaeval_rankings_k25.jsonl.gz"
    rows = read_comparisons(path, subsample=(4, 9))
    sizes = Counter(len(row.completions) for row in rows)
    assert set(sizes) == set(range(4, 10)) and min(sizes.values()) > 60
    assert read_comparisons(path, subsample=(4, 9), limit=50) == rows[:50]
    assert read_comparisons(path, subsample=(4, 9), limit=50, seed=1) != rows[:50]
    assert all(min(row.ranks) == 0 for row in rows)


def test_a_small_gap_is_a_tie_and_a_chain_of_small_gaps_is_not(tmp_path):
    record = {
        "instruction": "Go",
        "dataset": "koala",
        "responses": [
            {"model": m, "text": m, "logit": x}
            for m, x in zip("abcd", (3.0, 2.6, 2.2, 0), strict=True)
        ],
        "K": 4,
    }
    path = write(tmp_path / "k.jsonl", record)
    assert read_comparisons(path)[0].ranks == (0, 1, 2, 3)
    assert read_comparisons(path, tie_gap=0.5)[0].ranks == (0, 0, 1, 2)
    assert read_comparisons(path, tie_gap=9.0)[0].ranks == (0, 0, 0, 0)


def test_three_annotators_give_three_rankings_and_one_prompt(tmp_path):
    record = {
        "idx": 6, "motivation_app": "x", "cmp_key": "opt-7b_llama-7b", "instruction": "Say",
        "input": "", "response1": "A", "response2": "B",
        "annotator1": 1, "annotator2": 2, "annotator3": 0,
    }  # fmt: skip
    path = write(tmp_path / "p.jsonl", record)
    rows = read_comparisons(path)
    assert [row.ranks for row in rows] == [(0, 1), (1, 0), (0, 0)]
    assert [row.labeler for row in rows] == ["annotator1", "annotator2", "annotator3"]
    assert rows[0].sources == ("opt-7b", "llama-7b")
    assert len(read_prompts(path)) == 1


COMPARED = [
    ({"prompt": "p", "chosen": "a", "rejected": "b"}, ("p", ("a", "b"), (0, 1))),
    (
        {"prompt": "p", "completions": ["a", "b", "c"], "ranks": [7, 2, 2]},
        ("p", ("a", "b", "c"), (1, 0, 0)),
    ),
    ({"prompt": "p", "completions": ["a", "b"], "scores": [1, 2.5]}, ("p", ("a", "b"), (1, 0))),
    (
        {"chosen": "\n\nHuman: p\n\nAssistant: a", "rejected": "\n\nHuman: p\n\nAssistant: b"},
        ("\n\nHuman: p\n\nAssistant:", (" a", " b"), (0, 1)),
    ),
    (
        {"question": "p", "answers": ["a", "b"], "scores": [0.5, 0.5]},
        (ALPACA.render("p"), ("a", "b"), (0, 0)),
    ),
    (
        {"input": "p", "output_1": "a", "output_2": "b", "label": 2, "subset": "Natural"},
        (ALPACA.render("p"), ("a", "b"), (1, 0)),
    ),
    (
        {"user_input": "p", "completion_a": "a", "completion_b": "b"},
        (ALPACA.render("p"), ("a", "b"), (0, 1)),
    ),
    (
        {
            "messages": [{"role": "prompter", "text": "p"}],
            "responses": [{"text": "a", "rank": 0}, {"text": "b", "rank": 1}],
            "K": 2,
        },
        (CHAT.render("p"), ("a", "b"), (0, 1)),
    ),
    (
        {
            "chosen": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}],
            "rejected": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "b"}],
        },
        (CHAT.render("p"), ("a", "b"), (0, 1)),
    ),
    (
        {
            "info": {"post": "p", "title": "t", "subreddit": "s", "id": "1"},
            "summaries": [{"text": " a", "policy": "sup"}, {"text": "b", "policy": "ref"}],
            "choice": 1,
            "worker": "w",
        },
        ("SUBREDDIT: r/s\n\nTITLE: t\n\nPOST: p\n\nTL;DR:", (" a", " b"), (1, 0)),
    ),
]


@pytest.mark.parametrize(
    ("record", "expected"), COMPARED, ids=["+".join(r)[:30] for r, _ in COMPARED]
)
def test_a_comparison_is_read_from_each_layout(tmp_path, record, expected):
    (row,) = read_comparisons(write(tmp_path / "rows.jsonl", record))
    assert (row.prompt, row.completions, row.ranks) == expected
    assert [p.text for p in read_prompts(tmp_path / "rows.jsonl")] == [row.prompt]


CHATTED = [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}]
SHOWN = [
    ({"instruction": "p", "input": "", "output": "a"}, (ALPACA.render("p"), "a")),
    ({"instruction": "p", "input": "x", "output": "a"}, (ALPACA.render("p", "x"), "a")),
    ({"instruction": "p", "output": "a"}, (ALPACA.render("p"), "a")),
    ({"instruction": "p", "context": "x", "response": "a"}, (ALPACA.render("p", "x"), "a")),
    ({"prompt": "p", "completion": " a<|endoftext|>"}, ("p", " a")),
    ({"prompt": "p", "response": "a"}, ("p", "a")),
    ({"prompt": CHATTED[:1], "completion": CHATTED[1:]}, (CHAT.render("p"), "a")),
    ({"messages": CHATTED}, (CHAT.render("p"), "a")),
    (
        {"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "a"}]},
        (CHAT.render("p"), "a"),
    ),
    (
        {"instruction": "p", "input": "", "output": "a", "history": [["q", "b"]]},
        (ALPACA.render("q") + "b\n\n### Instruction:\np\n\n### Response:", "a"),
    ),
    (
        {"subreddit": "s", "title": "t", "post": "p", "summary": "a"},
        ("SUBREDDIT: r/s\n\nTITLE: t\n\nPOST: p\n\nTL;DR:", " a"),
    ),
]


@pytest.mark.parametrize(("record", "expected"), SHOWN, ids=["+".join(r)[:30] for r, _ in SHOWN])
def test_a_demonstration_is_read_from_each_layout(tmp_path, record, expected):
    (row,) = read_demonstrations(write(tmp_path / "rows.jsonl", record))
    assert (plain_text(row.prompt), row.response) == expected
    (prompt,) = read_prompts(tmp_path / "rows.jsonl")
    assert prompt.text == row.prompt


def test_each_instance_of_a_seed_task_is_a_demonstration(tmp_path):
    pairs = [{"input": "1", "output": "a"}, {"input": "2", "output": "b"}]
    path = write(tmp_path / "s.jsonl", {"id": "t", "instruction": "p", "instances": pairs})
    rows = read_demonstrations(path)
    assert [row.response for row in rows] == ["a", "b"]
    assert [row.meta for row in rows] == [{"id": "t"}, {"id": "t"}]


def test_a_named_template_replaces_the_one_of_the_format(tmp_path):
    path = write(tmp_path / "a.jsonl", {"instruction": "p", "output": "a"})
    assert read_demonstrations(path, template="plain")[0].prompt == "p"
    assert read_demonstrations(path, template=HH)[0].response == " a"
    with pytest.raises(ValueError, match='did you mean "alpaca"'):
        read_demonstrations(path, template="alpacca")
    pair = {"chosen": "\n\nHuman: p\n\nAssistant: a", "rejected": "\n\nHuman: p\n\nAssistant: b"}
    row = read_comparisons(write(tmp_path / "h.jsonl", pair), template="chat")[0]
    assert (row.prompt, row.completions) == (CHAT.render("p"), ("a", "b"))


def test_a_chat_keeps_its_turns(tmp_path):
    path = write(tmp_path / "m.jsonl", {"messages": [*CHATTED, *CHATTED], "id": 3})
    (row,) = read_dialogues(path)
    assert row == Dialogue((Turn("user", "p"), Turn("assistant", "a")) * 2, {"id": 3})


def test_a_message_of_weight_0_is_kept_and_is_no_target(tmp_path):
    chat = [*CHATTED, *CHATTED]
    first = [{**turn, "weight": 0} for turn in chat[:2]] + chat[2:]
    last = [*chat[:3], {**chat[3], "weight": 0}]
    path = write(tmp_path / "m.jsonl", {"messages": first}, {"messages": last})
    targets = [[turn.target for turn in row.turns] for row in read_dialogues(path)]
    assert targets == [[True, False, True, True], [True, True, True, False]]
    write_rows(tmp_path / "again.jsonl", read_dialogues(path))
    assert read_dialogues(tmp_path / "again.jsonl") == read_dialogues(path)
    with pytest.raises(DataError, match=r"m.jsonl:2:1: the answer has weight 0"):
        read_demonstrations(path)
    for weight, message in ((0, "every answer has weight 0"), (0.5, "neither 0 nor 1")):
        write(path, {"messages": [chat[0], {**chat[1], "weight": weight}]})
        with pytest.raises(DataError, match=message):
            read_dialogues(path)


ROWS = [
    (read_documents, [Document("one\n"), Document("zwei ü", {"title": "t"})]),
    (read_demonstrations, [Demonstration("p", "r"), Demonstration("p\r\nq", " r\u2028", {"n": 1})]),
    (
        read_comparisons,
        [
            Comparison("p", ("a", "b", "c"), (1, 0, 0), "ann", ("m", "n", "o"), {"k": [1]}),
            Comparison("p", ("a", "b"), (0, 1)),
        ],
    ),
    (read_prompts, [Prompt("p"), Prompt("q", {"org_id": "7", "tags": {"a": 1}})]),
    (read_dialogues, [Dialogue((Turn("user", "p"), Turn("assistant", "a")), {"n": 1})]),
]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
@pytest.mark.parametrize(("read", "rows"), ROWS, ids=[row[0].__name__ for row in ROWS])
def test_written_rows_are_read_back_equal(tmp_path, name, read, rows):
    path = tmp_path / "new" / name
    assert write_rows(path, rows) == len(rows)
    assert read(path) == rows
    first = path.read_bytes()
    write_rows(path, rows)
    assert path.read_bytes() == first
    assert {file.name for file in path.parent.iterdir()} == {name, f"{name}.sha256"}


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_a_copy_of_written_rows_that_is_cut_at_the_end_of_a_line_is_refused(tmp_path, name):
    path = tmp_path / name
    write_rows(path, [Comparison(f"p{i}", ("a", "b"), (0, 1)) for i in range(3)])
    zipped = path.suffix == ".gz"
    lines = (gzip.decompress(path.read_bytes()) if zipped else path.read_bytes()).splitlines(True)
    cut = b"".join(lines[:2])
    path.write_bytes(gzip.compress(cut) if zipped else cut)
    for on_bad_row in ("error", "skip"):
        with pytest.raises(DataError, match=rf"{name}.sha256 is of: cut short.*delete {name}.sha"):
            read_comparisons(path, on_bad_row=on_bad_row)
    (tmp_path / f"{name}.sha256").unlink()
    assert len(read_comparisons(path)) == 2


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [Document("old")])
    with pytest.raises(UnicodeEncodeError):
        write_rows(path, [Document("new"), Document("\ud800")])
    assert read_documents(path) == [Document("old")]
    assert {file.name for file in tmp_path.iterdir()} == {"rows.jsonl", "rows.jsonl.sha256"}


def test_an_array_a_table_and_lines_give_the_same_rows(tmp_path):
    records = [{"prompt": "p\n1", "response": "a, b"}, {"prompt": "q", "response": '"r"'}]
    lines = read_demonstrations(write(tmp_path / "a.jsonl", *records))
    (tmp_path / "b.json").write_text(json.dumps(records, indent=2))
    (tmp_path / "c.csv").write_text('prompt,response\n"p\n1","a, b"\nq,"""r"""\n')
    (tmp_path / "d.tsv").write_text('prompt\tresponse\n"p\n1"\ta, b\nq\t"""r"""\n')
    (tmp_path / "e.json.gz").write_bytes(gzip.compress(json.dumps(records).encode()))
    for name in ("b.json", "c.csv", "d.tsv", "e.json.gz"):
        assert read_demonstrations(tmp_path / name) == lines, name


def test_a_glob_and_a_folder_read_every_file_with_its_own_format(tmp_path):
    write(tmp_path / "a.jsonl", {"prompt": "p", "response": "a"})
    write(tmp_path / "b.jsonl", {"instruction": "q", "output": "b"})
    rows = read_demonstrations(tmp_path / "*.jsonl")
    assert [row.response for row in rows] == ["a", "b"]
    assert [r.format for r in rows.report] == ["prompt+response", "alpaca"]
    (tmp_path / "notes.rst").write_text("not data")
    assert read_demonstrations(tmp_path) == rows
    assert read_demonstrations(tmp_path, limit=1) == rows[:1]
    assert len(hash_files(tmp_path)) == 2


def test_lines_of_a_text_file_are_prompts_and_paragraphs_may_be_documents(tmp_path):
    path = tmp_path / "p.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\r\nlines\r\n")
    assert [row.text for row in read_prompts(path)] == ["one", "two", "lines"]
    assert [row.text for row in read_documents(path, split="paragraph")] == ["one", "two\nlines"]
    assert read_documents(path)[0].text == "one\n\ntwo\nlines\n"


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_text_is_cut_as_it_is_read_as_if_it_had_been_read_whole(tmp_path, monkeypatch, rng, end):
    """Lines, paragraphs and pieces, at any number of empty lines, with the line they start on."""
    monkeypatch.setattr(texts, "PIECE", 6)
    path = tmp_path / "text.txt"
    for _ in range(300):
        letters = ["a", "é", "\n", "\n\n"]
        text = "".join(rng.permuted(["a", *rng.choice(letters, rng.integers(1, 24))]))
        path.write_bytes(b"\xef\xbb\xbf" + text.replace("\n", end).encode())
        for split, parts in (("line", text.split("\n")), ("paragraph", text.split("\n\n"))):
            ((_, records),) = files.open_records(path, split=split)
            found = [(record.line, record.fields["text"]) for record in records]
            assert [words for _, words in found] == [p.strip("\n") for p in parts if p.strip()]
            lines = text.split("\n")
            assert all(lines[line - 1] == words.split("\n")[0] for line, words in found)
        streamed = list(stream_documents(path, reports=[]))
        assert [row.text for row in streamed] == list(texts.pieces(text))
        (whole,) = read_documents(path)
        assert whole.text == text


def test_a_long_text_is_cut_at_the_first_end_of_a_paragraph_after_so_many_characters(monkeypatch):
    monkeypatch.setattr(texts, "PIECE", 4)
    text = "ab\n\ncdefgh\n\n\nij\n\nkl\n\n"
    assert list(texts.pieces(text)) == ["ab\n\ncdefgh\n\n", "\nij\n\nkl\n\n"]
    assert "".join(texts.pieces(text)) == text
    assert list(texts.pieces("abcdef\n\n\n\n")) == ["abcdef\n\n"], "without the blank end"
