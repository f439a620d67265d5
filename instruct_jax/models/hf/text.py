"""Tokenizer files and chat templates as transformers reads them.

PAD stands in tokenizer_config.json only: transformers gives it the first id past tokenizer.json,
which is ours, and our own loader keeps its vocabulary without it.
"""

import json
from pathlib import Path
from typing import Any

from instruct_jax.data.templates import Template
from instruct_jax.data.tokenizer import Tokenizer
from instruct_jax.errors import UserError
from instruct_jax.models.config import TransformerConfig

CHAT_FILE = "chat_template.jinja"


def write_tokenizer(
    directory: Path, tokenizer: Tokenizer, config: TransformerConfig, chat_template: str | None
) -> None:
    """tokenizer.json, tokenizer_config.json with PAD at `config.pad_id`, and the chat template.

    Raises UserError where the tokenizer does not have the model's vocabulary.
    """
    if tokenizer.vocab_size != config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {config.vocab_size}; "
            "export the model with the tokenizer it was trained with"
        )
    tokenizer.save(directory)
    path = directory / "tokenizer.json"
    about = json.loads(path.read_text(encoding="utf-8"))
    words: set[str] = {token["content"] for token in about.get("added_tokens", ())}
    words |= set(about["model"]["vocab"])
    pad = "<|pad|>" if "<|pad|>" not in words else f"<|pad_{config.pad_id}|>"
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.eos,
        "pad_token": pad,
        "model_max_length": config.max_length,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n")
    if chat_template is not None:
        (directory / CHAT_FILE).write_text(chat_template, encoding="utf-8")


def chat_template_of(template: Template) -> str:
    """One of our prompt templates in the Jinja that transformers renders; EOS ends each answer.

    A prompt ends where the answer starts, whether or not a generation prompt is asked for. A
    template without dialogue refuses a second question.
    """
    later = "{{ raise_exception('this model was trained on single questions') }}"
    if template.later is not None:
        later = _pattern(template.later)
    pieces = [
        "{%- for message in messages -%}",
        "{%- if message['role'] == 'system' -%}",
        _pattern(template.system),
        "{%- elif message['role'] == 'assistant' -%}",
        f"{{{{- {_quoted(template.response_prefix)} + message['content'] + eos_token -}}}}",
        "{%- elif loop.first or (loop.previtem['role'] == 'system') -%}",
        _pattern(template.first),
        "{%- else -%}",
        later,
        "{%- endif -%}",
        "{%- endfor -%}",
    ]
    return "".join(pieces) + "\n"


def read_chat_template(directory: Path) -> str | None:
    """The chat template of a folder, as text: it is passed on, never rendered here."""
    path = directory / CHAT_FILE
    if path.is_file():
        return path.read_text(encoding="utf-8")
    old: Any = directory / "tokenizer_config.json"
    template = json.loads(old.read_text(encoding="utf-8")) if old.is_file() else {}
    template = template.get("chat_template") if isinstance(template, dict) else None
    return template if isinstance(template, str) else None


def _pattern(pattern: str) -> str:
    before, after = pattern.split("{text}")
    return f"{{{{- {_quoted(before)} + message['content'] + {_quoted(after)} -}}}}"


def _quoted(text: str) -> str:
    # JSON's escapes are Jinja's; braces only mean something outside a string.
    return json.dumps(text, ensure_ascii=True)
