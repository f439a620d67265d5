"""Every program on small files, one after another: what it is started with, and what it reads."""

from pathlib import Path

from tests.experiments import scripts

LENGTHS = {"prompt_length": 24, "response_length": 8}


def commands(folder: Path, paths: dict[str, Path]) -> dict[str, list[str]]:
    """{name: script and arguments}, each in `folder`/NAME, in an order in which they can be run."""
    made: dict[str, list[str]] = {}

    def add(name: str, script: str, *arguments: str, config: str = "", **fields: object) -> None:
        made[name] = [
            script,
            f"--config=configs/{config or script + '.py:debug'}",
            f"--workdir={folder / name}",
            *arguments,
            *(f"--config.{field.replace('__', '.')}={value}" for field, value in fields.items()),
        ]

    def rows(*kinds: str) -> tuple[str, ...]:
        own = (f"--config.data.{kind}={paths[kind]}" for kind in kinds)
        return ("--config.data.source=files", "--config.data.valid_fraction=0.2", *own)

    def within(group: str) -> dict[str, object]:
        return {f"{group}__{name}": value for name, value in LENGTHS.items()}

    gpt, sft, reward = (folder / name / "model" for name in ("pretrain", "sft", "reward_model"))
    saving = "save_every=2"
    add(
        "pretrain", "pretrain", *rows("documents"), f"--config.pretrain.{saving}",
        vocab_size=300, pretrain__length=40, pretrain__epochs=1.0, model__max_length=64,
    )  # fmt: skip
    add(
        "sft", "sft", *rows("documents", "demonstrations"), f"--config.sft.{saving}",
        init=gpt, keep_epochs=True, sft__epochs=2, sft__pack_length=48,
        sft__pretrain_fraction=0.25, **within("sft"),
    )  # fmt: skip
    add(
        "lora", "sft", *rows("demonstrations"), init=gpt, sft__epochs=1, sft__pack_length="none",
        sft__lora__rank=2, **within("sft"),
    )  # fmt: skip
    add(
        "reward_model", "reward_model", *rows("comparisons", "demonstrations"), init=sft,
        **within("reward_model"),
    )  # fmt: skip
    add(
        "ppo", "ppo", *rows("prompts", "documents"), f"--config.ppo.{saving}", init=sft,
        reward_model=reward, ptx_length=32, ppo__ptx_coef=1.0, ppo__ptx_ratio=1, ppo__eval_every=1,
        **within("ppo"),
    )  # fmt: skip
    add("preference", "preference", *rows("comparisons"), init=sft, **within("preference"))
    add(
        "select_sft", "select_sft", *rows("prompts"), epochs=folder / "sft" / "epochs",
        reward_model=reward, **LENGTHS,
    )  # fmt: skip
    models = f"('gpt={gpt}', 'sft={sft}')"
    add(
        "evaluate", "evaluate", *rows("prompts", "documents"), models=models, document_length=32,
        reward_model=reward, **LENGTHS,
    )  # fmt: skip
    add(
        "collect", "collect", policy=gpt, prompt_length=48, response_length=8, temperature=0.1,
    )  # fmt: skip
    add(
        "prepare", "prepare", config="prepare.py:paper",
        files=f"('{paths['prompts']}',)", min_prefix=4,
    )  # fmt: skip
    add("corpus", "corpus", *rows("documents"), length=16, tokenizer=gpt)
    add("to_hf", "convert", config="convert.py:to_hf", source=sft, shard_gb=0.0005)
    add(
        "from_hf", "convert", config="convert.py:from_hf", source=folder / "to_hf" / "hf",
    )  # fmt: skip
    add("arithmetic", "arithmetic", config="arithmetic.py", documents=50, questions=20)
    return made


def write_rows(folder: Path) -> dict[str, Path]:
    """The files that they read."""
    return scripts.write_rows(folder)
