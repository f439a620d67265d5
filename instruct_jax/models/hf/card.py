"""The model card of an exported model, made of what the run wrote down about itself.

Nothing is asserted that the record does not hold: where it is silent, the card says so. A card is
for strangers: of a path that says where something lay on this machine only the last name is told.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from instruct_jax.data.hub import is_hub_id
from instruct_jax.models.config import TransformerConfig
from instruct_jax.models.families import parameter_count

_STAGES = {
    "pretrain": "a pretrained language model; it continues texts and was not taught to answer",
    "sft": "fine-tuned on demonstrations (supervised learning only)",
    "reward_model": "a reward model: one number that ranks answers to the same prompt",
    "preference": "a policy trained on comparisons directly, without a reward model",
    "ppo": "a policy trained by reinforcement learning against a learned reward model",
    "distill": "a student of fewer layers, taught by the answers of a larger model",
    "imported": "imported weights, not trained here",
}


def model_card(
    name: str,
    config: TransformerConfig,
    *,
    kind: str,
    stage: str,
    record: Mapping[str, Any],
    notes: Mapping[str, Any],
    base: str | None = None,
    history: Sequence[str] = (),
    folded: bool = True,
    head_bias: float = 0.0,
    licence: str | None = None,
) -> str:
    """README.md from the record of a run (its config.json) and the notes of its model.json.

    `base` is the model that it was trained from, a hub id or a bare name, with the stages of
    `history`; `licence` that of these weights, None where nobody stated one.
    """
    task = "text-generation" if kind == "language" else "text-classification"
    front = ["---", "library_name: transformers", f"pipeline_tag: {task}",
             f"license: {licence or 'other'}", "tags: [instruct-jax, rlhf]"]  # fmt: skip
    if base is not None and is_hub_id(base):
        front.append(f"base_model: {base}")
    front.append("---")
    body = [
        f"# {name}",
        f"Made by instruct_jax, stage `{stage}`: {_STAGES.get(stage, 'a stage of its own')}. "
        f"{parameter_count(config):,} parameters, {config.num_layers} layers of width "
        f"{config.d_model}, {config.max_length:,} tokens of context, {config.vocab_size:,} tokens "
        f"of vocabulary and PAD (id {config.pad_id}).",
        "## Base",
        _origin(base, history, licence),
        "## Use",
        _use(kind, folded, head_bias),
        "## Training data",
        _list((f"`{_data_name(path)}`, sha256 `{sha}`"
               for path, sha in _flat(record.get("data"))),
              "The record names no data file."),
        "## How it was made",
        _list((f"`{key}`: {value}" for key, value in _made(record)), "No record came with it."),
        "### Configuration",
        _list((f"`{key}` = `{value}`" for key, value in _flat(record.get("config"))),
              "No configuration came with it."),
        "## Measurements",
        _list((f"`{key}`: {value}" for key, value in _flat(notes)),
              "No measurement came with it."),
        "## Limitations",
        _limitations(kind, stage),
        "## Licences",
        _list((f"`{_data_name(key)}`: {value}" for key, value in _flat(record.get("licences"))),
              "The record names no licence of the data."),
        "The licence of these weights follows from those of the data and of the model they started "
        "from. instruct_jax itself is Apache-2.0.",
    ]  # fmt: skip
    return "\n".join(front) + "\n\n" + "\n\n".join(body) + "\n"


def _origin(base: str | None, history: Sequence[str], licence: str | None) -> str:
    told = ["The record names no model it was trained from."]
    if base or history[:1] == ("pretrain",):
        told = [f"Trained from `{base}`." if base else "Trained from random weights."]
    if history:
        told.append(f"Stages, in their order: {', '.join(f'`{stage}`' for stage in history)}.")
    told.append(f"Licence: {licence}." if licence else "Licence: not stated.")
    return " ".join(" ".join(told).split()).replace("<", "&lt;")


def _use(kind: str, folded: bool, head_bias: float) -> str:
    if kind == "language":
        return (
            "`AutoModelForCausalLM.from_pretrained(folder)`, with the tokenizer of the same "
            "folder. The last row of the vocabulary is PAD, which generation_config.json "
            "suppresses; mask its logit where you use logits directly."
        )
    told = "`AutoModelForSequenceClassification.from_pretrained(folder)`; the one logit, read at "
    told += "the last token of prompt and answer, is the score. "
    if folded or head_bias == 0.0:
        return told + "It is the score of the model as it was trained."
    return told + (
        f"Add {head_bias!r} to get the score of the model as it was trained: transformers has no "
        "place for the head's bias. Differences between scores need no such thing."
    )


def _limitations(kind: str, stage: str) -> str:
    told = [
        "Outputs can be false, biased or harmful; nothing here filters them.",
        "It reflects the texts and the labelers it was trained on, and no one else.",
    ]
    if kind == "scalar":
        told.append(
            "Scores compare answers to one prompt; far from its training data, or under "
            "optimisation against it, it can be wrong in ways that raise the score."
        )
    if stage == "ppo":
        told.append(
            "It was optimised against a learned reward, which it may have learnt to please rather "
            "than to answer better."
        )
    return _list(told, "")


def _made(record: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    for key in ("command", "config_file", "mesh", "commit", "started"):
        value = record.get(key)
        if value:
            words = value if isinstance(value, list) else [value]
            yield key, " ".join(str(_public(word)) for word in words)
    yield from _flat(record.get("versions"))


def _flat(tree: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    """("a.b", text) of the leaves of nested dicts, in their order."""
    if not isinstance(tree, Mapping):
        return
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            text = f"{value:.6g}" if isinstance(value, float) else str(_public(value))
            yield f"{prefix}{key}", text if len(text) <= 200 else text[:199] + "…"


_ANYWHERE = r"(?:file:/+|~[\w.-]*/|/|[A-Za-z]:\\)"
_QUOTED = re.compile(rf"(['\"]){_ANYWHERE}[^'\"]*\1")
_WORD = re.compile(rf"(?<![\w./:~-]){_ANYWHERE}[^\s'\",;()\[\]]+")


def _public(value: Any) -> Any:
    """`value`, with the last names of absolute paths instead of those."""
    if isinstance(value, list | tuple):
        return [_public(item) for item in value]
    if not isinstance(value, str):
        return value
    name, equals, rest = value.rpartition("=")
    if re.match(_ANYWHERE, rest):  # to its end, spaces included
        return _public(name) + equals + _last(rest)
    value = _QUOTED.sub(lambda found: f"{found[1]}{_last(found[0][1:-1])}{found[1]}", value)
    return _WORD.sub(lambda found: _last(found[0]), value)


def _data_name(key: str) -> str:
    """A file without its directories; a hub id as it is."""
    return key if is_hub_id(key) else _last(key)


def _last(path: str) -> str:
    return PurePath(path.replace("\\", "/")).name


def _list(items: Iterable[str], otherwise: str) -> str:
    # A record is data: no newline or HTML of it gets into the page.
    lines = [" ".join(item.split()).replace("<", "&lt;") for item in items]
    return "\n".join(f"- {line}" for line in lines) or otherwise
