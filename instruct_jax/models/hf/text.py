"""Tokenizer files and chat templates as transformers reads them.

PAD stands in tokenizer_config.json only: transformers gives it the first id past tokenizer.json,
which is ours, and our own loader keeps its vocabulary without it.
"""

import json
from pathlib import Path

from instruct_jax.data.templates import Template
from instruct_jax.data.tokenizer import CHAT_FILE, Tokenizer
from instruct_jax.errors import UserError
from instruct_jax.files import json_text, write_text
from instruct_jax.models.config import TransformerConfig


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
    pad = "<|pad|>" if tokenizer.id_of("<|pad|>") is None else f"<|pad_{config.pad_id}|>"
    described = tokenizer.named | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": pad,
        "model_max_length": config.max_length,
        "clean_up_tokenization_spaces": False,
    }
    write_text(directory / "tokenizer_config.json", json_text(described))
    if chat_template is not None:
        write_text(directory / CHAT_FILE, chat_template)


def chat_template_of(template: Template) -> str:
    """One of our prompt templates in the Jinja that transformers renders; EOS ends each answer.

    What `Template.segments` refuses it refuses too, but for a text that marks a role, and an empty
    system turn counts as absent. A prompt ends where the answer starts, whether or not a generation
    prompt is asked for.
    """
    later = _refusal("this model was trained on single questions")
    if template.later is not None:
        later = _pattern(template.later)
    pieces = [
        "{%- set seen = namespace(turns=0) -%}",
        "{%- for message in messages -%}",
        "{%- if message['role'] == 'system' and seen.turns == 0 -%}",
        "{%- if message['content'].strip() -%}",
        _pattern(template.system),
        "{%- endif -%}",
        "{%- else -%}",
        "{%- if message['role'] != ['user', 'assistant'][seen.turns % 2] -%}",
        _refusal("after the system, user and assistant must alternate"),
        "{%- elif message['role'] == 'assistant' -%}",
        f"{{{{- {_quoted(template.response_prefix)} + message['content'] + eos_token -}}}}",
        "{%- elif seen.turns == 0 -%}",
        _pattern(template.first),
        "{%- else -%}",
        later,
        "{%- endif -%}",
        "{%- set seen.turns = seen.turns + 1 -%}",
        "{%- endif -%}",
        "{%- endfor -%}",
    ]
    return "".join(pieces) + "\n"


def _refusal(reason: str) -> str:
    return f"{{{{ raise_exception({_quoted(reason)}) }}}}"


def _pattern(pattern: str) -> str:
    before, after = pattern.split("{text}")
    return f"{{{{- {_quoted(before)} + message['content'] + {_quoted(after)} -}}}}"


def _quoted(text: str) -> str:
    # JSON's escapes are Jinja's; braces only mean something outside a string.
    return json.dumps(text, ensure_ascii=True)
