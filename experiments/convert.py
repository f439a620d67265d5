"""Hugging Face models in and out: config.json, safetensors, tokenizer, chat template, model card.

    python experiments/convert.py --config=configs/convert.py:from_hf --config.source=DIR_OR_HUB_ID
    python experiments/convert.py --config=configs/convert.py:to_hf --config.source=runs/sft/model

from_hf reads a folder or a hub id (its config, safetensors and tokenizer files; never pickles or
code) and writes WORKDIR/model, which every stage takes as its `init`. to_hf reads the `model`
folder of a stage and writes WORKDIR/hf, which transformers loads as a causal language model, or,
for a reward or value model, as a sequence classifier with one label; its model card is made from
the record of the stage's run. Half precision only saves disk: parameters are fp32 here.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from instruct_jax import cli
from instruct_jax.data.templates import template_named
from instruct_jax.data.tokenizer import load_tokenizer
from instruct_jax.errors import ConfigError
from instruct_jax.models.hf import (
    chat_template_of,
    inspect_pretrained,
    load_pretrained,
    model_card,
    read_chat_template,
    save_pretrained,
)
from instruct_jax.models.hf.text import CHAT_FILE
from instruct_jax.stages.stage import TrainedModel, load_trained, save_trained

# Beside what every run writes; --overwrite replaces these.
WRITES = (
    "hf/config.json", "hf/generation_config.json", "hf/model*.safetensors",
    "hf/model.safetensors.index.json", "hf/scalar_head.safetensors", "hf/tokenizer.json",
    "hf/tokenizer_config.json", "hf/chat_template.jinja", "hf/README.md", ".hf.partial",
)  # fmt: skip


@dataclass(frozen=True)
class Config:
    """`tokenizer` is for folders without one; `family` is a model_type (None: the one that came in,
    or the first that fits).

    `template` names the prompt template that becomes the chat template (None: the run's own, or
    what came in with the model). `ignore_code` reads a folder although its config.json names code
    (auto_map); the code is not run.
    """

    direction: Literal["from_hf", "to_hf"] = "from_hf"
    source: str = ""
    revision: str | None = None
    ignore_code: bool = False
    tokenizer: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    family: str | None = None
    template: str | None = None
    name: str | None = None
    licence: str = "other"
    shard_gb: float = 5.0


def main(config: Config, run: cli.Run) -> Path:
    """Writes the model and returns its folder."""
    if not config.source:
        raise ConfigError("config.source is empty; name the model to convert")
    if config.shard_gb <= 0:
        raise ConfigError(f"config.shard_gb={config.shard_gb}: expected more than 0")
    return (from_hf if config.direction == "from_hf" else to_hf)(config, run)


def from_hf(config: Config, run: cli.Run) -> Path:
    """WORKDIR/model of a Hugging Face folder or hub id."""
    options: dict[str, Any] = {"revision": config.revision, "ignore_code": config.ignore_code}
    found = inspect_pretrained(config.source, **options)
    tokenizer = load_tokenizer(config.tokenizer or found.folder)
    if tokenizer.vocab_size < found.config.vocab_size:
        raise ConfigError(
            f"{config.source}: {found.config.vocab_size} tokens, its tokenizer has "
            f"{tokenizer.vocab_size}"
        )
    shape, params = load_pretrained(found.folder, ignore_code=config.ignore_code)
    trained = TrainedModel(found.kind, shape, params, tokenizer, "imported")
    notes = {"source": config.source, "model_type": found.raw["model_type"]}
    folder = save_trained(run.workdir / "model", trained, notes=notes)
    chat = read_chat_template(found.folder)
    if chat is not None:
        (folder / CHAT_FILE).write_text(chat, encoding="utf-8")
    print(f"{config.source}: a {found.kind} model of {shape.num_layers} layers, now in {folder}")
    return folder


def to_hf(config: Config, run: cli.Run) -> Path:
    """WORKDIR/hf of a stage's model folder."""
    source = Path(config.source)
    trained = load_trained(source)
    about, record = _json(source / "model.json"), _json(source.parent / "config.json")
    name = config.name or f"{source.absolute().parent.name}-{trained.stage}"
    bias, folded = 0.0, trained.config.norm == "layernorm"
    if trained.kind == "scalar":
        bias = float(trained.params["head"]["bias"][0])
    card = model_card(
        name,
        trained.config,
        kind=trained.kind,
        stage=trained.stage,
        record=record,
        notes=about.get("notes", {}),
        folded=folded,
        head_bias=bias,
        licence=config.licence,
    )
    folder = save_pretrained(
        run.workdir / "hf",
        trained.config,
        trained.params,
        tokenizer=trained.tokenizer,
        chat_template=_chat_template(config, source, record),
        card=card,
        family=config.family or about.get("notes", {}).get("model_type"),
        dtype=config.dtype,
        shard_bytes=int(config.shard_gb * 1e9),
    )
    print(f"{name}: written to {folder}")
    if bias and not folded:
        print(f"scores in transformers are lower by the head's bias, {bias!r}: see the model card")
    return folder


def _chat_template(config: Config, source: Path, record: dict[str, Any]) -> str | None:
    name = config.template
    if name is None:
        own = read_chat_template(source)
        if own is not None:
            return own
        name = record.get("config", {}).get("data", {}).get("template")
    if name is None:
        return None
    try:
        return chat_template_of(template_named(name))
    except ValueError as error:
        raise ConfigError(f"config.template: {error}") from error


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


if __name__ == "__main__":
    cli.run(main, Config, default="configs/convert.py", writes=WRITES)
