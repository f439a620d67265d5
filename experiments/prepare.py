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
from instruct_jax.files import write_text
from instruct_jax.settings import Settings, setting

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
class Config(Settings):
    """What is prepared, and how."""

    files: tuple[str, ...] = setting((), "paths, globs or hub ids")
    kind: Literal["prompts", "demonstrations", "comparisons"] = setting(
        "prompts", "what the rows are read as"
    )
    template: str | None = setting(None, "of the prompts' text; none takes that of the format")
    on_bad_row: Literal["error", "skip"] = setting("error", "what becomes of an unusable row")
    tokenizer: str | None = setting(
        None, "a tokenizer.json or folder that lengths are counted with; none trains a BPE on these"
    )
    cap_key: str = setting("org_id", "the field of a row's meta that names its contributor")
    cap: int = setting(200, "rows of a contributor, at most", low=1)
    min_prefix: int = setting(64, "shared by two prompts that are one", low=1, unit="tokens")
    min_share: float = setting(0.5, "of the shorter one, that they share", above=0.0, high=1.0)
    max_tokens: int = setting(1000, "of the longest prompt", low=1)
    train: float = setting(0.8, "share of the contributors", low=0.0, high=1.0)
    valid: float = setting(0.1, "share of the contributors", low=0.0, high=1.0)
    test: float = setting(0.1, "share of the contributors", low=0.0, high=1.0)
    salt: str = setting("", "another word draws other splits")

    def __post_init__(self) -> None:
        """ConfigError also where the shares are not of one whole."""
        super().__post_init__()
        if abs(sum(self.fractions.values()) - 1) > 1e-9:
            raise ConfigError(
                f"train, valid and test are shares of one whole, not {self.fractions}"
            )

    @property
    def fractions(self) -> dict[str, float]:
        """The share of each split."""
        return {"train": self.train, "valid": self.valid, "test": self.test}


def main(config: Config, run: cli.Run) -> Path:
    """Writes the splits and returns their folder."""
    if not config.files:
        raise ConfigError("config.files is empty; name the files (or hub ids) to prepare")
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
        fractions=config.fractions,
        salt=config.salt,
        max_tokens=config.max_tokens,
    )
    for name, split in prepared.splits.items():
        write_rows(run.workdir / f"{name}.jsonl", split)
    write_text(run.workdir / "statistics.txt", f"{prepared}\n")
    run.say(str(prepared))
    counts = ", ".join(f"{name} {len(rows):,}" for name, rows in prepared.splits.items())
    run.say(f"rows: {run.workdir}/{{train,valid,test}}.jsonl ({counts})")
    return run.workdir


if __name__ == "__main__":
    cli.run(main, Config, default="configs/prepare.py", writes=WRITES)
