"""The model card of an exported model, made of what the run wrote down about itself.

Nothing is asserted that the record does not hold: where it is silent, the card says so.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from instruct_jax.models.config import TransformerConfig
from instruct_jax.models.families import parameter_count

_STAGES = {
    "pretrain": "a pretrained language model; it continues texts and was not taught to answer",
    "sft": "fine-tuned on demonstrations (supervised learning only)",
    "reward_model": "a reward model: one number that ranks answers to the same prompt",
    "ppo": "a policy trained by reinforcement learning against a learned reward model",
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
    folded: bool = True,
    head_bias: float = 0.0,
    licence: str = "other",
) -> str:
    """README.md from the record of a run (its config.json) and the notes of its model.json."""
    task = "text-generation" if kind == "language" else "text-classification"
    front = ["---", "library_name: transformers", f"pipeline_tag: {task}", f"license: {licence}",
             "tags: [instruct-jax, rlhf]", "---"]  # fmt: skip
    body = [
        f"# {name}",
        f"Made by instruct_jax, stage `{stage}`: {_STAGES.get(stage, 'a stage of its own')}. "
        f"{parameter_count(config):,} parameters, {config.num_layers} layers of width "
        f"{config.d_model}, {config.max_length:,} tokens of context, {config.vocab_size:,} tokens "
        f"of vocabulary and PAD (id {config.pad_id}).",
        "## Use",
        _use(kind, folded, head_bias),
        "## Training data",
        _list((f"`{path}`, sha256 `{sha}`" for path, sha in _flat(record.get("data"))),
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
        _list((f"`{key}`: {value}" for key, value in _flat(record.get("licences"))),
              "The record names no licence of the data."),
        "The licence of these weights follows from those of the data and of the model they started "
        "from. instruct_jax itself is Apache-2.0.",
    ]  # fmt: skip
    return "\n".join(front) + "\n\n" + "\n\n".join(body) + "\n"


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
            yield key, " ".join(map(str, value)) if isinstance(value, list) else str(value)
    yield from _flat(record.get("versions"))


def _flat(tree: Any, prefix: str = "") -> Iterable[tuple[str, str]]:
    """("a.b", text) of the leaves of nested dicts, in their order."""
    if not isinstance(tree, Mapping):
        return
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            text = f"{value:.6g}" if isinstance(value, float) else str(value)
            yield f"{prefix}{key}", text if len(text) <= 200 else text[:199] + "…"


def _list(items: Iterable[str], otherwise: str) -> str:
    # A record is data: no newline or HTML of it gets into the page.
    lines = [" ".join(item.split()).replace("<", "&lt;") for item in items]
    return "\n".join(f"- {line}" for line in lines) or otherwise
