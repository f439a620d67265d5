"""Tokenises documents ahead of a training run, and measures how fast its batches come.

    python experiments/corpus.py --config=configs/corpus.py:shared_data --workdir=runs/corpus \\
        --config.data.token_dir=data/tokens
    python experiments/pretrain.py --config.data.token_dir=data/tokens ...   # finds them there

Stopped, killed or run again, it goes on where it was; of several processes (experiments/launch.py)
each tokenises its share of the files. Tokens belong to a tokenizer and to the fields of `data`
that choose documents: a training run with the same ones finds them. WORKDIR/corpus.json tells
tokens, speeds and the memory that it took. With `synthetic_bytes`, a corpus of that size is written
to WORKDIR/text first, of paragraphs of the documents in random order: to see what loading costs
before the data is there.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from instruct_jax import cli
from instruct_jax.data.config import DataConfig
from instruct_jax.data.loader import Batches
from instruct_jax.data.rows import Document, write_rows
from instruct_jax.data.sources import Source, open_source
from instruct_jax.data.tokenizer import load_tokenizer, train_bpe
from instruct_jax.data.tokens import TokenRows
from instruct_jax.files import write_json
from instruct_jax.settings import Settings, setting
from instruct_jax.stages.inputs import data_acts
from instruct_jax.stages.pretrain import language_rows
from instruct_jax.stages.text import held_out_text, text_rows

SHARD_BYTES = 250_000_000


# Beside what every run writes; --overwrite replaces these.
WRITES = ("corpus.json", "text/#.jsonl", "text/#.jsonl.sha256")


@dataclass(frozen=True)
class Config(Settings):
    """What is tokenised, and how many batches are then read."""

    acts_if: ClassVar[Mapping[str, str]] = data_acts("documents", demonstrations="tokenizer=None")

    data: DataConfig = DataConfig()
    tokenizer: str | None = setting(None, "a tokenizer.json or folder; none trains a BPE")
    vocab_size: int = setting(
        8191, "of the BPE that is trained", low=257, unit="tokens", needs="tokenizer=None"
    )
    length: int = setting(2048, "of a row", low=2, unit="tokens")
    batch_size: int = setting(64, "rows of a batch", low=1)
    batches: int = setting(500, "batches that are read to measure the speed", low=1)
    seed: int = setting(0, "of the order of the rows", low=0, high=2**32 - 1)
    synthetic_bytes: int = setting(
        0, "of text to make of the documents' paragraphs; 0 takes the documents", low=0, high=10**15
    )


def main(config: Config, run: cli.Run) -> dict[str, Any]:
    """Returns what corpus.json holds."""
    source = open_source(config.data)
    if config.tokenizer is None:
        tokenizer = train_bpe(source.tokenizer_texts(), vocab_size=config.vocab_size)
    else:
        tokenizer = load_tokenizer(config.tokenizer)
    data = config.data
    if config.synthetic_bytes:
        paths = synthesise(source, run.workdir / "text", config.synthetic_bytes, seed=config.seed)
        data = replace(data, source="files", documents=tuple(map(str, paths)))
        source = open_source(data)
    report: dict[str, Any] = {"memory_mb": {"at start": peak_memory()}}
    kept = {"length": config.length, "folder": data.token_folder(run.workdir)}
    for split in ("valid", "train"):
        began = time.monotonic()
        if split == "train":
            rows = text_rows(source, split, tokenizer, **kept)
            count = len(rows)
        else:
            count = len(held_out_text(data, source, tokenizer, **kept))
        report[split] = {
            "tokens": count * config.length,
            "rows": count,
            "seconds": round(time.monotonic() - began, 1),
        }
        report["memory_mb"][f"{split} tokenised"] = peak_memory()
    report["batches"] = {
        state: measure(config, rows, cold=state == "cold") for state in ("cold", "warm")
    }
    report["memory_mb"]["batches read"] = peak_memory()
    if run.writes:
        write_json(run.workdir / "corpus.json", report)
    run.say(json.dumps(report, indent=2))
    run.say(f"tokens: {kept['folder']} (train {report['train']['tokens']:,})")
    return report


def synthesise(source: Source, folder: Path, size: int, *, seed: int) -> list[Path]:
    """Files of documents of `size` bytes of text in all, the same for the same seed.

    Files that are there already are kept: each appears whole or not at all.
    """
    pool = [p for row in source.text("train") for p in row.text.split("\n\n") if p.strip()]
    weights = [len(paragraph.encode()) for paragraph in pool]

    def documents(shard: int) -> Iterator[Document]:
        draw, written = Random(f"{seed}/{shard}"), 0
        wanted = min(SHARD_BYTES, size - shard * SHARD_BYTES)
        while written < wanted:
            chosen = draw.choices(range(len(pool)), k=draw.randint(4, 60))
            written += sum(weights[i] for i in chosen)
            yield Document("\n\n".join(pool[i] for i in chosen))

    paths = [folder / f"{shard:05}.jsonl" for shard in range(-(-size // SHARD_BYTES))]
    for shard, path in enumerate(paths):
        if not path.exists():
            write_rows(path, documents(shard))
    return paths


def measure(config: Config, rows: TokenRows, *, cold: bool) -> dict[str, float]:
    """Speed of the batches of a training run, of files that the system has in memory or not."""
    batches = Batches(language_rows(rows), config.batch_size, seed=config.seed)
    batches.rows(0)  # the permutation of an epoch is drawn once
    if cold:
        rows.forget()
    seconds = []
    for step in range(config.batches):
        began = time.perf_counter()
        batches(step)
        seconds.append(time.perf_counter() - began)
    tokens = config.batches * config.batch_size * config.length
    return {
        "tokens_per_second": round(tokens / sum(seconds)),
        "milliseconds_per_batch": round(1e3 * sum(seconds) / len(seconds), 3),
        "slowest_milliseconds": round(1e3 * max(seconds), 3),
    }


def peak_memory() -> int:
    """The most memory that this process has had so far, in MB."""
    status = Path(f"/proc/{os.getpid()}/status")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) // 1000


if __name__ == "__main__":
    cli.run(main, Config, default="configs/corpus.py", writes=WRITES)
