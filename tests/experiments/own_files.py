"""Files as people have them, in five formats and with their flaws: a byte-order mark, Windows line
ends, empty rows, duplicates and rows that are far too long.
"""

import csv
import json
from pathlib import Path
from typing import Any

ANIMALS = ("cat", "dog", "horse", "owl", "fox", "hen", "goat", "mouse", "crow", "wolf", "bee")
PLACES = ("barn", "forest", "field", "house", "hill", "river", "garden", "village")
DOES = ("sleeps", "runs", "sings", "waits", "hides", "eats", "looks around")


def fact(i: int) -> tuple[str, str, str]:
    """An animal, its place and what it does there."""
    return ANIMALS[i % 11], PLACES[i * 3 % 8], DOES[i * 5 % 7]


def question(i: int) -> str:
    """The i-th question; no two below 616 are equal."""
    animal, place, _ = fact(i)
    return f"What does the {animal} do in the {place} on day {i}?"


def answer(i: int) -> str:
    """Its answer."""
    animal, place, does = fact(i)
    return f"On day {i} the {animal} {does} in the {place}."


def write_own_files(folder: Path, rows: int = 160) -> dict[str, Path]:
    """documents (.txt), alpaca (JSON), chats (JSONL), questions (CSV), pairs and ranks (JSONL)."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {
        "documents": "stories.txt", "alpaca": "alpaca.json", "chats": "chats.jsonl",
        "questions": "questions.csv", "pairs": "pairs.jsonl", "ranks": "ranks.jsonl",
    }  # fmt: skip
    paths = {name: folder / file for name, file in names.items()}
    stories = ("\n".join(answer(i + j) for j in range(6)) for i in range(0, 6 * rows, 6))
    paths["documents"].write_text("\r\n\r\n".join(stories), encoding="utf-8-sig")

    told = [{"instruction": question(i), "input": "", "output": answer(i)} for i in range(rows)]
    told[3] = told[4]  # twice the same
    told[5] = told[5] | {"output": ""}  # no answer
    told[7] = told[7] | {"instruction": " ".join([question(7)] * 60)}  # far too long
    told[8] = told[8] | {"input": "It is a rainy day."}
    paths["alpaca"].write_text(json.dumps(told, indent=1), encoding="utf-8-sig")

    _write_lines(paths["chats"], [_chat(i) for i in range(rows, 2 * rows)])

    with paths["questions"].open("w", encoding="utf-8-sig", newline="") as file:
        table = csv.writer(file, lineterminator="\r\n")
        table.writerow(["question", "answer"])
        for i in range(2 * rows, 3 * rows):
            table.writerow([question(i), answer(i) if i % 40 else ""])

    pairs = [
        {"prompt": question(i), "chosen": answer(i), "rejected": answer(i + 1)} for i in range(rows)
    ]
    pairs[2] = pairs[2] | {"rejected": pairs[2]["chosen"]}  # nothing to prefer
    pairs[3] = pairs[3] | {"chosen": ""}
    _write_lines(paths["pairs"], pairs)
    _write_lines(
        paths["ranks"],
        [
            {
                "prompt": question(i),
                "completions": [answer(i), answer(i + 11), answer(i + 1)],
                "ranks": [0, 1, 2] if i % 5 else [0, 1, 1],
            }
            for i in range(rows, 2 * rows)
        ],
    )
    return paths


def _chat(i: int) -> dict[str, Any]:
    turns = [
        {"role": "system", "content": "You know the animals of the farm."},
        {"role": "user", "content": question(i)},
        {"role": "assistant", "content": answer(i)},
    ]
    if i % 3 == 0:
        turns += [
            {"role": "user", "content": question(i + 1)},
            {"role": "assistant", "content": answer(i + 1)},
        ]
    return {"messages": turns}


def _write_lines(path: Path, rows: list[Any]) -> None:
    """JSONL with an empty line in the middle and Windows line ends."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    lines.insert(len(lines) // 2, "")
    path.write_bytes(("\r\n".join(lines) + "\r\n").encode())
