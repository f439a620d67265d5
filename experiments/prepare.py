"""Prepares prompts as the paper did: duplicates, caps, splits by contributor, PII, lengths
(DATA-4..8).

    python experiments/prepare.py --config=configs/prepare.py:shared_data --workdir=runs/prompts

Reads prompts, demonstrations or comparisons of any known format and writes WORKDIR/train.jsonl,
valid.jsonl and test.jsonl, which the other scripts read, with WORKDIR/statistics.txt: how many rows
went and why, and the lengths of what is left (the paper's Table 9). Contributors (`cap_key` in a
row's meta) are in one split only; a row that names none is a contributor of its own.
"""

from collections import ChainMap
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from instruct_jax import cli
from instruct_jax.data.files import hash_files
from instruct_jax.data.formats import read_comparisons, read_demonstrations, read_prompts
from instruct_jax.data.licences import find_licences
from instruct_jax.data.prompts import prepare_prompts, prompt_text
from instruct_jax.data.rows import write_rows
from instruct_jax.data.tokenizer import load_tokenizer, train_bpe
from instruct_jax.errors import ConfigError

READERS = {
    "prompts": read_prompts,
    "demonstrations": read_demonstrations,
    "comparisons": read_comparisons,
}


# Beside what every run writes; --overwrite replaces these.
WRITES = (
    *(
        f"{split}.jsonl{suffix}"
        for split in ("train", "valid", "test")
        for suffix in ("", ".sha256")
    ),
    "statistics.txt",
)


@dataclass(frozen=True)
class Config:
    """`files` are paths, globs or hub ids; lengths are counted by `tokenizer` (None: a BPE of
    these).
    """

    files: tuple[str, ...] = ()
    kind: Literal["prompts", "demonstrations", "comparisons"] = "prompts"
    template: str | None = None
    on_bad_row: Literal["error", "skip"] = "error"
    tokenizer: str | None = None
    cap_key: str = "org_id"
    cap: int = 200
    min_prefix: int = 64
    min_share: float = 0.5
    max_tokens: int = 1000
    train: float = 0.8
    valid: float = 0.1
    test: float = 0.1
    salt: str = ""


def main(config: Config, run: cli.Run) -> Path:
    """Writes the splits and returns their folder."""
    if not config.files:
        raise ConfigError("config.files is empty; name the files (or hub ids) to prepare")
    fractions = {"train": config.train, "valid": config.valid, "test": config.test}
    if abs(sum(fractions.values()) - 1) > 1e-9:
        raise ConfigError(f"config.train, valid and test are shares of one whole, not {fractions}")
    rows = []
    for source in config.files:
        read = READERS[config.kind]
        rows += read(source, template=config.template, on_bad_row=config.on_bad_row)
    hashes = [hash_files(source) for source in config.files]
    found = [find_licences(source) for source in config.files]
    run.record_data(dict(ChainMap(*hashes)), dict(ChainMap(*found)))
    if config.tokenizer is None:
        tokenizer = train_bpe(map(prompt_text, rows), vocab_size=8_191)
    else:
        tokenizer = load_tokenizer(config.tokenizer)
    prepared = prepare_prompts(
        rows,
        tokenizer,
        cap_key=config.cap_key,
        cap=config.cap,
        min_prefix=config.min_prefix,
        min_share=config.min_share,
        fractions=fractions,
        salt=config.salt,
        max_tokens=config.max_tokens,
    )
    for name, split in prepared.splits.items():
        write_rows(run.workdir / f"{name}.jsonl", split)
    (run.workdir / "statistics.txt").write_text(f"{prepared}\n")
    print(prepared)
    return run.workdir


if __name__ == "__main__":
    cli.run(main, Config, default="configs/prepare.py", writes=WRITES)
