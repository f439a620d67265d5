"""Writes an arithmetic task whose answers can be checked, and text to pretrain a policy for it on.

    python experiments/arithmetic.py --workdir=runs/arithmetic
    python experiments/pretrain.py --config=configs/pretrain.py:arithmetic \\
        --workdir=runs/arithmetic_gpt
    python experiments/ppo.py --config=configs/grpo.py:verifiable --workdir=runs/arithmetic_grpo

WORKDIR/documents.jsonl has sums, of which a share `wrong` is false: a model of it answers right
about as often, and GRPO with experiments/rewards.py:number makes it better. WORKDIR/questions.jsonl
has {"prompt", "response"} rows, the first part of a sum and the right rest of it.
"""

from dataclasses import dataclass
from pathlib import Path
from random import Random

from instruct_jax import cli
from instruct_jax.data.rows import Demonstration, Document, write_rows
from instruct_jax.settings import Settings, setting

FILES = ("documents.jsonl", "questions.jsonl")
WRITES = (*FILES, *(f"{name}.sha256" for name in FILES))


@dataclass(frozen=True)
class Config(Settings):
    """Sums of two numbers."""

    largest: int = setting(9, "the largest number that is added", low=1)
    documents: int = setting(64_000, "sums to pretrain on", low=1)
    questions: int = setting(2_000, "sums to complete", low=1)
    wrong: float = setting(0.6, "share of the sums to pretrain on that are false", low=0, high=1)
    seed: int = setting(0, "seed of all draws")


def main(config: Config, run: cli.Run) -> Path:
    """Writes both files and returns the folder."""
    rng = Random(config.seed)
    texts, questions = [], []
    for _ in range(config.documents):
        asked, total = _sum(rng, config.largest)
        if rng.random() < config.wrong:
            total = rng.choice([n for n in range(2 * config.largest + 1) if n != total])
        texts.append(Document(f"{asked} {total}"))
    for _ in range(config.questions):
        asked, total = _sum(rng, config.largest)
        questions.append(Demonstration(asked, f" {total}"))
    for name, rows in zip(FILES, (texts, questions), strict=True):
        write_rows(run.workdir / name, rows)
        run.say(f"{len(rows):,} rows: {run.workdir / name}")
    return run.workdir


def _sum(rng: Random, largest: int) -> tuple[str, int]:
    a, b = (rng.randint(0, largest) for _ in range(2))
    return f"{a} + {b} =", a + b


if __name__ == "__main__":
    cli.run(main, Config, default="configs/arithmetic.py", writes=WRITES)
