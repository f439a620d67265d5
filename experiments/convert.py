"""Models in and out: folders of Hugging Face (config.json, safetensors, tokenizer, chat template,
model card) and GGUF files, which llama.cpp, Ollama and LM Studio run.

    python experiments/convert.py --config=configs/convert.py:from_hf --config.source=DIR_OR_HUB_ID
    python experiments/convert.py --config=configs/convert.py:to_hf --config.source=runs/sft/model
    python experiments/convert.py --config=configs/convert.py:from_gguf --config.source=FILE.gguf
    python experiments/convert.py --config=configs/convert.py:to_gguf --config.source=runs/ppo/model

from_hf reads a folder or a hub id (its config, safetensors and tokenizer files; never pickles or
code) and writes WORKDIR/model, which every stage takes as its `init`. to_hf reads the `model`
folder of a stage and writes WORKDIR/hf, which transformers loads as a causal language model, or,
for a reward or value model, as a sequence classifier with one label; its model card is made from
the record of the stage's run. Half precision only saves disk: parameters are fp32 here.
from_gguf reads a file of any quantisation that the package gguf dequantises, with its tokenizer and
template; to_gguf writes WORKDIR/model.gguf of a language model, in float32, float16, bfloat16 or
q8_0. Both need pip install -e '.[gguf]'.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from instruct_jax import cli
from instruct_jax.data.templates import template_named
from instruct_jax.data.tokenizer import load_tokenizer
from instruct_jax.data.tokenizer_checks import FORMS
from instruct_jax.errors import ConfigError
from instruct_jax.models.gguf import ARCHITECTURES, gguf_package, open_gguf, save_gguf
from instruct_jax.models.hf import (
    FAMILIES,
    Pretrained,
    chat_template_of,
    exported_files,
    family_of,
    inspect_pretrained,
    model_card,
    read_pretrained,
    save_pretrained,
)
from instruct_jax.models.vocabulary import resize_vocabulary
from instruct_jax.settings import Settings, setting
from instruct_jax.stages.record import RECORD as MODEL_RECORD
from instruct_jax.stages.record import Base, read_record
from instruct_jax.stages.trained import TrainedModel, check_exported, load_trained, save_trained

# Beside what every run writes; --overwrite replaces these.
WRITES = (*exported_files("hf"), "model.gguf", ".model.gguf.partial")


@dataclass(frozen=True)
class Config(Settings):
    """One conversion; `source` is a folder of the one kind, the work directory gets the other."""

    direction: Literal["from_hf", "to_hf", "from_gguf", "to_gguf"] = setting("from_hf", "which way")
    source: str = setting(
        "", "the model to convert: a folder, a hub id for from_hf, a file for from_gguf"
    )
    revision: str | None = setting(None, "of a hub id", needs="direction=from_hf")
    ignore_code: bool = setting(
        False,
        "read a folder although its config.json names code (auto_map), which is not run",
        needs="direction=from_hf",
    )
    tokenizer: str | None = setting(
        None, "a tokenizer instead of the model's own", needs="direction=from_hf|from_gguf"
    )
    resize: bool = setting(
        False,
        "give tokens that the tokenizer has and the model lacks the mean of all embeddings",
        needs="direction=from_hf|from_gguf",
    )
    dtype: Literal["float32", "bfloat16", "float16", "q8_0"] = setting(
        "float32",
        "of the numbers that are written; q8_0, a byte a number, only as GGUF",
        needs="direction=to_hf|to_gguf",
    )
    family: str | None = setting(
        None,
        "a model_type; None is the one that came in, or the first that fits",
        needs="direction=to_hf|to_gguf",
    )
    template: str | None = setting(
        None,
        "the template that becomes the chat template; None is the run's own",
        needs="direction=to_hf|to_gguf",
    )
    name: str | None = setting(None, "of the model, for its card", needs="direction=to_hf|to_gguf")
    licence: str | None = setting(None, "of the weights; None is what the base says")
    shard_gb: float = setting(
        5.0, "size of a file of weights at most", above=0.0, unit="GB", needs="direction=to_hf"
    )


def main(config: Config, run: cli.Run) -> Path:
    """Writes the model and returns its folder."""
    if not config.source:
        raise ConfigError("config.source is empty; name the model to convert")
    ways = {"from_hf": from_hf, "to_hf": to_hf, "from_gguf": from_gguf, "to_gguf": to_gguf}
    return ways[config.direction](config, run)


def from_hf(config: Config, run: cli.Run) -> Path:
    """WORKDIR/model of a Hugging Face folder or hub id."""
    check_exported(Path(config.source))
    found = inspect_pretrained(
        config.source,
        revision=config.revision,
        ignore_code=config.ignore_code,
        tokenizer=load_tokenizer(config.tokenizer) if config.tokenizer else None,
        resize=config.resize,
    )
    return _import(found, config, run)


def from_gguf(config: Config, run: cli.Run) -> Path:
    """WORKDIR/model of a GGUF file."""
    tokenizer = load_tokenizer(config.tokenizer) if config.tokenizer else None
    with open_gguf(config.source, tokenizer=tokenizer, resize=config.resize) as found:
        return _import(found, config, run)


def _import(found: Pretrained, config: Config, run: cli.Run) -> Path:
    tokenizer = found.tokenizer
    if tokenizer is None:
        raise ConfigError(
            f"{config.source}: no tokenizer here; give one, --config.tokenizer=PATH ({FORMS})"
        )
    shape, params = read_pretrained(found)
    if added := tokenizer.vocab_size - shape.vocab_size:
        shape, params = resize_vocabulary(shape, params, tokenizer.vocab_size)
        print(f"{config.source}: {added} tokens without a row got the mean of all embeddings")
    base = Base(found.name, config.licence or found.licence, found.raw["model_type"])
    trained = TrainedModel(found.kind, shape, params, tokenizer, "imported", base)
    folder = save_trained(run.workdir / "model", trained)
    print(f"{config.source}: a {found.kind} model of {shape.num_layers} layers, now in {folder}")
    return folder


def to_hf(config: Config, run: cli.Run) -> Path:
    """WORKDIR/hf of a stage's model folder."""
    source = Path(config.source)
    trained = load_trained(source, field="config.source")
    record: dict[str, Any] = {}
    notes: dict[str, Any] = {}
    if (source / MODEL_RECORD).is_file():
        record, notes = _run_of(source), read_record(source).notes
    name = config.name or _name(source, trained)
    licence = config.licence or (trained.base and trained.base.licence)
    bias, folded = 0.0, trained.config.norm == "layernorm"
    if trained.kind == "scalar":
        bias = float(trained.params["head"]["bias"][0])
    card = model_card(
        name,
        trained.config,
        kind=trained.kind,
        stage=trained.stage,
        record=record,
        notes=notes,
        base=trained.base and trained.base.name,
        history=trained.history,
        folded=folded,
        head_bias=bias,
        licence=licence,
    )
    folder = save_pretrained(
        run.workdir / "hf",
        trained.config,
        trained.params,
        tokenizer=trained.tokenizer,
        chat_template=_chat_template(config, trained),
        card=card,
        family=config.family or _family(trained),
        dtype=config.dtype,
        shard_bytes=int(config.shard_gb * 1e9),
        again=True,  # the run is this one: its directory says so
    )
    print(f"{name}: written to {folder}")
    if not licence:
        run.note(
            "no licence of these weights is stated, so the card says `other`: name the one that "
            "they are under, as --config.licence=apache-2.0"
        )
    if bias and not folded:
        print(f"scores in transformers are lower by the head's bias, {bias!r}: see the model card")
    return folder


def to_gguf(config: Config, run: cli.Run) -> Path:
    """WORKDIR/model.gguf of a stage's model folder."""
    gguf_package()  # or its remedy, before a model is read
    source = Path(config.source)
    trained = load_trained(source, kind="language", field="config.source")
    name = config.name or _name(source, trained)
    path = save_gguf(
        run.workdir / "model.gguf",
        trained.config,
        trained.params,
        tokenizer=trained.tokenizer,
        chat_template=_chat_template(config, trained),
        family=config.family or _family(trained, {a.model_type for a in ARCHITECTURES.values()}),
        dtype=config.dtype,
        name=name,
        licence=config.licence or (trained.base and trained.base.licence),
    )
    print(f"{name}: written to {path}, {path.stat().st_size / 1e6:.0f} MB")
    return path


def _chat_template(config: Config, trained: TrainedModel) -> str | None:
    """That of the template asked for, or trained on, or the one that came in with the weights."""
    name = config.template or trained.template
    if name is None:
        return trained.tokenizer.chat
    try:
        return chat_template_of(template_named(name))
    except ValueError as error:
        raise ConfigError(f"config.template: {error}") from error


def _name(source: Path, trained: TrainedModel) -> str:
    folder = source.absolute().parent
    return trained.stage if folder == Path.home() else f"{folder.name}-{trained.stage}"


def _family(trained: TrainedModel, known: Collection[str] = FAMILIES) -> str | None:
    """The family that the weights came in, where it can still say what they have become."""
    name = trained.base and trained.base.model_type
    if name not in known:
        return None
    try:
        return family_of(trained.config, name)
    except ValueError:
        return None


def _run_of(source: Path) -> dict[str, Any]:
    """The record of the run that a model folder lies in; empty where it was taken out of one."""
    path = next((p for p in _records(source) if p.is_file()), None)
    if path is None:
        return {}
    try:
        record = json.loads(path.read_bytes().decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: the record of the run is damaged ({error})") from error
    return record if isinstance(record, dict) else {}


def _records(source: Path) -> list[Path]:
    # A stage's model lies in its work directory, an epoch's or a student's one folder deeper.
    return [folder / "config.json" for folder in list(source.absolute().parents)[:2]]


if __name__ == "__main__":
    cli.run(main, Config, default="configs/convert.py", writes=WRITES)
