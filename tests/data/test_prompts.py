import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instruct_jax.data.formats import read_prompts
from instruct_jax.data.pii import find_pii, has_pii
from instruct_jax.data.prompts import (
    Lengths,
    cap_contributors,
    contributor,
    deduplicate,
    expand_few_shot,
    length_statistics,
    length_table,
    prepare_prompts,
    split_contributors,
    split_of,
)
from instruct_jax.data.rows import Comparison, Demonstration, Prompt
from instruct_jax.data.tokenizer import train_bpe

# One token a byte, so prefix lengths can be counted by hand.
TOKENIZER = train_bpe(["abc"], vocab_size=257)


def texts(rows):
    return [row.text for row in rows]


def shuffled(rows, seed=0):
    return random.Random(seed).sample(rows, len(rows))


def test_k_pairs_give_exactly_k_examples_and_no_target_sees_its_answer():
    """T51, DATA-3."""
    pairs = [(f"question {i}", f"answer {i}.") for i in range(7)]
    rows = expand_few_shot("Answer.", pairs)
    assert len(rows) == 7
    for (question, answer), row in zip(pairs, rows, strict=True):
        assert row.response == f" {answer}" and answer not in row.prompt
        assert row.prompt.endswith(f"Input: {question}\nOutput:")
        assert row.prompt.count("Output:") == 7
        assert all(other in row.prompt for _, other in pairs if other != answer)


def test_several_samples_of_the_shots_give_several_examples_of_a_target():
    """T51, A.3: K * samples, all different, and never with the target among its shots."""
    pairs = [(f"q{i}", f"a{i}.") for i in range(6)]
    rows = expand_few_shot("Answer.", pairs, shots=3, samples=4, seed=1)
    assert len(rows) == 24 == len({row.prompt for row in rows})
    assert all(row.response.strip() not in row.prompt for row in rows)
    assert all(row.prompt.count("Output:") == 4 for row in rows)
    assert Counter(row.response for row in rows) == {f" a{i}.": 4 for i in range(6)}
    assert rows == expand_few_shot("Answer.", pairs, shots=3, samples=4, seed=1)
    for wrong in ({"pairs": pairs[:1]}, {"pairs": pairs, "shots": 6}):
        with pytest.raises(ValueError):
            expand_few_shot("Answer.", **wrong)


@pytest.mark.parametrize(
    ("first", "second", "duplicate"),
    [
        ("a" * 64 + "b" * 64, "a" * 64 + "c" * 99, True),  # 64 tokens, half of the shorter
        ("a" * 64 + "b" * 65, "a" * 64 + "c" * 99, False),  # less than half
        ("a" * 63 + "b" * 10, "a" * 63 + "c" * 10, False),  # fewer than 64 tokens
        ("short", "short", True),  # equal as a whole
        ("short  one\n", "short one", True),  # but for whitespace
        ("a" * 64, "a" * 64 + "c" * 500, True),
    ],
)
def test_prompts_with_a_long_shared_prefix_are_collapsed(first, second, duplicate):
    """DATA-4."""
    rows = [Prompt(first), Prompt(second)]
    assert len(deduplicate(rows, TOKENIZER)) == 1 + (not duplicate)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text("ab", max_size=9), max_size=12), st.randoms(use_true_random=False))
def test_deduplication_is_idempotent_and_blind_to_order(prompts, draw):
    """T50."""
    rows = [Prompt(text, {"n": i}) for i, text in enumerate(prompts)]
    once = deduplicate(rows, TOKENIZER, min_prefix=2)
    assert deduplicate(once, TOKENIZER, min_prefix=2) == once
    mixed = draw.sample(rows, len(rows))
    key = lambda row: row.meta["n"]  # noqa: E731
    assert sorted(deduplicate(mixed, TOKENIZER, min_prefix=2), key=key) == once
    # What is left has no pair of duplicates, by the definition.
    kept = [TOKENIZER.encode(row.text) for row in once]
    for i, a in enumerate(kept):
        for b in kept[:i]:
            shared = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)
            shared = min(len(a), len(b)) if shared is None else shared
            assert a != b and not (shared >= 2 and shared >= 0.5 * min(len(a), len(b)))


def test_no_contributor_has_more_than_the_cap():
    """T50, DATA-5: and which ones are kept does not depend on the order of the file."""
    rows = [
        Prompt(f"{org} {i}", {"org_id": org, "user_id": i % 3}) for org in "abc" for i in range(300)
    ]
    rows += [Prompt(f"nobody {i}") for i in range(300)]
    kept = cap_contributors(rows)
    counts = Counter(row.meta.get("org_id") for row in kept)
    assert counts == {"a": 200, "b": 200, "c": 200, None: 300}
    assert set(texts(cap_contributors(shuffled(rows)))) == set(texts(kept))
    assert cap_contributors(kept) == kept
    by_user = cap_contributors(rows, cap_key="user_id", cap=5)
    assert len(by_user) == 3 * 5 + 300


def test_splits_share_no_contributor_and_new_data_moves_no_one():
    """T50, DATA-6."""
    rows = [Prompt(f"p{i}", {"org_id": i % 400}) for i in range(4000)]
    splits = split_contributors(rows, salt="x")
    owners = {name: {contributor(row, "org_id") for row in part} for name, part in splits.items()}
    assert not owners["train"] & (owners["valid"] | owners["test"])
    assert not owners["valid"] & owners["test"]
    assert {name: len(part) > 50 for name, part in splits.items()} == dict.fromkeys(splits, True)
    assert sum(map(len, splits.values())) == 4000
    more = split_contributors(
        [*rows, *(Prompt(f"n{i}", {"org_id": -i}) for i in range(999))], salt="x"
    )
    assert all(set(texts(splits[name])) <= set(texts(more[name])) for name in splits)
    assert split_contributors(rows, salt="y") != splits


def test_the_sizes_of_the_splits_are_the_fractions():
    n = 20_000
    counts = Counter(split_of(f"key {i}") for i in range(n))
    for name, fraction in {"train": 0.9, "valid": 0.05, "test": 0.05}.items():
        assert abs(counts[name] / n - fraction) < 0.01
    with pytest.raises(ValueError, match="add up to 1"):
        split_of("a", fractions={"train": 0.9})


def test_a_prompt_without_a_contributor_is_one_of_its_own():
    same = split_contributors([Prompt("a", {"n": i}) for i in range(10)])
    assert sorted(map(len, same.values())) == [0, 0, 10]


PERSONAL = {
    "e-mail": ["write to jane.doe+x@mail.example.co.uk please", "<bob@x.io>"],
    "phone": [
        "call (415) 555-2671", "415-555-2671", "+1 415 555 2671", "+44 20 7946 0958",
        "+49 (30) 1234567", "1-800-555-0199.", "+33 1 23 45 67 89",
    ],
    "iban": ["DE89 3704 0044 0532 0130 00", "IBAN GB82WEST12345698765432!", "NL91ABNA0417164300"],
    "card": ["4111 1111 1111 1111", "5500-0000-0000-0004", "card: 378282246310005"],
    "ssn": ["SSN 078-05-1120", "219 09 9999"],
    "street address": [
        "I live at 221B Baker Street, London", "1600 Pennsylvania Ave NW", "P.O. Box 1234",
        "12 W. 5th Avenue", "Hauptstraße 12, Berlin", "10 rue de la Paix, Paris",
    ],
    "ip": ["from 203.0.113.42 port 22", "2001:db8::8a2e:370:7334"],
    "api key": [
        "sk-abcdEFGH1234ijklMNOP5678", "AKIAIOSFODNN7EXAMPLE",
        "ghp_0123456789abcdefghijABCDEFGHIJ012345", "xoxb-123456789012-abcdefghij",
        "api_key = 'd41d8cd98f00b204e9800998ecf8427e'", "-----BEGIN RSA PRIVATE KEY-----",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl",
    ],
}  # fmt: skip
IMPERSONAL = [
    "Sort 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16.",
    "The war lasted from 1939-1945; see pages 100-200.",
    "pi is 3.14159265358979323846",
    "4111 1111 1111 1112",  # fails Luhn
    "DE88 3704 0044 0532 0130 00",  # fails mod 97
    "0000 0000 0000 0000",
    "std::vector<int> at 12:30:45, version 1.2.3",
    "ping 127.0.0.1 and ::1",
    "999.1.2.3",
    "In 2019 it cost $1,234,567.89 at 9 a.m.",
    "order 000-12-3456",
    "The task-skills sk-learn library",
    "@user mentioned a@b",
]


@pytest.mark.parametrize("kind", PERSONAL)
def test_personal_data_is_found(kind):
    """T50: full recall on the fixture list."""
    for text in PERSONAL[kind]:
        finds = find_pii(text)
        assert kind in {find.kind for find in finds}, text
        assert all(0 <= find.start < find.end <= len(text) for find in finds)
        assert has_pii(text)


@pytest.mark.parametrize("text", IMPERSONAL)
def test_figures_and_code_are_not_taken_for_personal_data(text):
    assert find_pii(text) == [] and not has_pii(text)


def test_the_pipeline_filters_splits_and_counts():
    """DATA-4 to DATA-8 in one call."""
    rows = [Prompt(f"task {i:05}", {"org_id": i % 50}) for i in range(1000)]
    rows += [Prompt(f"task {i:05}", {"org_id": 7}) for i in range(10)]  # again, by someone else
    rows += [Prompt(f"{i:04} mail me: a{i}@b.com", {"org_id": f"m{i}"}) for i in range(100)]
    rows += [Prompt(f"{i:03}" + "x" * 998, {"org_id": f"l{i}"}) for i in range(20)]
    prepared = prepare_prompts(rows, TOKENIZER, cap=15, salt="s")
    kept = [row for part in prepared.splits.values() for row in part]
    assert len(kept) + sum(prepared.dropped.values()) == len(rows)
    assert (
        prepared.dropped["duplicate"] == 10 and prepared.dropped["over the cap"] == 1000 - 50 * 15
    )
    assert prepared.dropped["too long"] == 20
    assert not any(has_pii(row.text) for row in prepared.splits["train"])
    assert any(has_pii(row.text) for row in prepared.splits["valid"])
    assert 80 < prepared.dropped["personal data"] < 100
    assert max(len(row.text) for row in kept) <= 1000
    assert prepared.lengths["train"].n == len(prepared.splits["train"])
    assert prepared.lengths["train unfiltered"].max == 1001
    again = prepare_prompts(shuffled(rows), TOKENIZER, cap=15, salt="s")
    for name, part in prepared.splits.items():
        assert {row.text for row in again.splits[name]} == {row.text for row in part}
    assert "left out: duplicate 10" in str(prepared)


def test_demonstrations_and_comparisons_go_through_the_pipeline_too():
    demos = [Demonstration(f"p{i}", "r", {"org_id": i}) for i in range(40)]
    pairs = [Comparison(f"p{i}", ("a", "b"), (0, 1), meta={"org_id": i}) for i in range(40)]
    for rows in (demos, pairs):
        prepared = prepare_prompts(rows, TOKENIZER)
        assert sorted(r.prompt for part in prepared.splits.values() for r in part) == sorted(
            r.prompt for r in rows
        )


def test_length_statistics_are_those_of_table_9():
    assert length_statistics([1, 2, 3, 4]) == Lengths(4, 2.5, 1.25**0.5, 1, 1.75, 2.5, 3.25, 4)
    assert length_statistics([]).n == 0
    table = length_table({"train": length_statistics([10, 20]), "test set": length_statistics([7])})
    assert [len(line) for line in table.splitlines()] == [len(table.splitlines()[0])] * 3
    assert " ".join(table.splitlines()[1].split()) == "train 2 15 5 10 12 15 18 20"


def test_real_prompts_go_through_the_pipeline(shared):
    rows = read_prompts(
        shared / "data/sft/t0_train.jsonl.gz", on_bad_row="skip", limit=600, template=None
    )
    prepared = prepare_prompts(rows, TOKENIZER, cap_key="task", max_tokens=800)
    tasks = {name: {row.meta["task"] for row in part} for name, part in prepared.splits.items()}
    assert not tasks["train"] & tasks["valid"] and not tasks["train"] & tasks["test"]
    kept = sum(map(len, prepared.splits.values()))
    assert kept + sum(prepared.dropped.values()) == 600
    assert prepared.dropped["duplicate"] > 0 and prepared.dropped["too long"] > 0
