"""The tokenizer of a GGUF file as files of Hugging Face, and back.

`tokenizer.ggml.model` is "gpt2" for byte-level BPE, with its merges and the name of its split
(`gguf_splits.py`), or "llama" for SentencePiece's BPE with byte fallback, whose merges follow from
the scores of its tokens, as transformers converts it. `token_type` says which tokens are special
(control tokens), which are added (user-defined) and which stand for a byte.
"""

import json
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import tokenizers

from instruct_jax.data import gguf_splits as splits

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "\u2581"
_FILLER = re.compile(r"\[PAD\d+\]")
# What ends a turn, also in files that do not say so; llama.cpp stops there too.
_TURN_ENDS = ("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|eom_id|>")
_LONGEST_TEMPLATE = 1_000_000

Metadata = dict[str, Any]
Files = dict[str, dict[str, Any]]


def tokenizer_files(metadata: Metadata, architecture: str) -> Files:
    """tokenizer.json, tokenizer_config.json and generation_config.json, as objects.

    Raises ValueError, which names the key, for a tokenizer of another kind.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise ValueError(
            f"tokenizer.ggml.model={str(kind)!r:.40}: gpt2 (byte-level BPE) and llama "
            "(SentencePiece) are read; give another tokenizer as config.tokenizer"
        )
    tokens, types = _tokens(metadata, sentencepiece=kind == "llama")
    if kind == "gpt2":
        about, begins = _byte_level(metadata, tokens, types)
    else:
        about, begins = _sentencepiece(metadata, architecture, tokens, types)
    named = {
        name: tokens[number]
        for name, key in (("bos_token", "bos"), ("eos_token", "eos"), ("unk_token", "unknown"))
        if (number := _id(metadata, key, len(tokens))) is not None
    }
    ends = [_id(metadata, key, len(tokens)) for key in ("eos", "eot", "eom")]
    ends += [i for i, token in enumerate(tokens) if types[i] == _CONTROL and token in _TURN_ENDS]
    added = {name: _flag(metadata, f"add_{name}_token", name == "bos" and begins)
             for name in ("bos", "eos")}  # fmt: skip
    about["post_processor"] = _post_processor(named, added, tokens, byte_level=kind == "gpt2")
    generation = {"eos_token_id": list(dict.fromkeys(i for i in ends if i is not None))}
    return {
        "tokenizer.json": about,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **named,
            **{f"add_{name}_token": flag for name, flag in added.items()},
            "clean_up_tokenization_spaces": False,
        },
        "generation_config.json": generation if generation["eos_token_id"] else {},
    }


def chat_template(metadata: Metadata) -> str | None:
    """The template as text; it is passed on, never rendered here."""
    template = metadata.get("tokenizer.chat_template")
    if template is not None and (
        not isinstance(template, str) or len(template) > _LONGEST_TEMPLATE
    ):
        raise ValueError(
            f"tokenizer.chat_template: not a text of {_LONGEST_TEMPLATE:,} characters at most"
        )
    return template


def _tokens(metadata: Metadata, *, sentencepiece: bool) -> tuple[list[str], list[int]]:
    """Tokens and their types, without the rows that only fill up the table."""
    tokens, types = metadata.get("tokenizer.ggml.tokens"), _numbers(metadata, "token_type")
    if not isinstance(tokens, list) or not tokens:
        raise ValueError("tokenizer.ggml.tokens: expected a list of texts")
    kinds = [_NORMAL] * len(tokens) if types is None else [int(one) for one in types]
    if len(kinds) != len(tokens):
        raise ValueError(f"tokenizer.ggml.token_type has {len(kinds)} of {len(tokens)} tokens")
    tokens = [token or f"[EMPTY_{i}]" for i, token in enumerate(tokens)]
    while tokens and kinds[len(tokens) - 1] == _UNUSED and _FILLER.fullmatch(tokens[-1]):
        tokens.pop()
    if sentencepiece:
        for i, token in enumerate(tokens):  # runs of spaces are merged like any other token
            if kinds[i] == _USER and not token.strip(" "):
                tokens[i], kinds[i] = _SPACE * len(token), _NORMAL
    if len(set(tokens)) < len(tokens):
        seen: set[str] = set()
        twice = next(token for token in tokens if token in seen or seen.add(token))
        raise ValueError(f"tokenizer.ggml.tokens: {twice!r:.40} is there twice")
    return tokens, kinds[: len(tokens)]


def _byte_level(
    metadata: Metadata, tokens: list[str], types: list[int]
) -> tuple[dict[str, Any], bool]:
    name = metadata.get("tokenizer.ggml.pre", "default")
    if not isinstance(name, str) or name not in splits.NAMES:
        raise ValueError(
            f"tokenizer.ggml.pre={str(name)!r:.40} is not known; known: "
            f"{', '.join(splits.NAMES)}; give its tokenizer as config.tokenizer"
        )
    merges = metadata.get("tokenizer.ggml.merges", [])
    if not isinstance(merges, list) or not all(isinstance(m, str) for m in merges):
        raise ValueError("tokenizer.ggml.merges: expected a list of texts")
    pairs = []
    for merge in merges:
        cut = merge.find(" ", 1)
        if cut < 0:
            raise ValueError(f"tokenizer.ggml.merges: {merge!r:.40} is no pair")
        pairs.append([merge[:cut], merge[cut + 1 :]])
    model = _model(tokens, types, pairs, ignore_merges=name in splits.WHOLE_WORDS)
    about = _tokenizer(tokens, types, model)
    about["normalizer"] = {"type": "NFC"} if name in splits.NORMALISED else None
    about["pre_tokenizer"] = splits.pre_tokenizer(name)
    about["decoder"] = {
        "type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True,
    }  # fmt: skip
    return about, name in splits.WHOLE_WORDS


def _sentencepiece(
    metadata: Metadata, architecture: str, tokens: list[str], types: list[int]
) -> tuple[dict[str, Any], bool]:
    scores = _numbers(metadata, "scores")
    if scores is None or len(scores) < len(tokens):
        raise ValueError("tokenizer.ggml.scores: expected a number for each token")
    if architecture.startswith("gemma"):
        # Its scores do not follow the order of its merges; that of its tokens does.
        scores = -np.arange(len(tokens), dtype=np.float32)
    pairs = _merges(tokens, types, np.asarray(scores, np.float64).tolist())
    unknown = _id(metadata, "unknown", len(tokens))
    if unknown is None and _UNKNOWN in types:
        unknown = types.index(_UNKNOWN)
    model = _model(
        tokens,
        types,
        pairs,
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=_BYTE in types,
    )
    about = _tokenizer(tokens, types, model)
    prefixed = _flag(metadata, "add_space_prefix", True)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    prepend = [{"type": "Prepend", "prepend": _SPACE}] if prefixed else []
    about["normalizer"] = {"type": "Sequence", "normalizers": [*prepend, replace]}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefixed else []
    back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    about["decoder"] = {
        "type": "Sequence",
        "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
    }
    return about, True


def _merges(tokens: list[str], types: list[int], scores: list[float]) -> list[list[str]]:
    """Every way to make a token of two, the best token first; text never makes a special one."""
    ids = {token: i for i, token in enumerate(tokens) if types[i] in (_NORMAL, _USER)}
    found = []
    for token, number in ids.items():
        score = scores[number]
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                found.append((-score, -len(left), -len(right), ids[left], ids[right], left, right))
    return [list(merge[-2:]) for merge in sorted(found)]


def _model(
    tokens: list[str], types: list[int], merges: list[list[str]], **options: Any
) -> dict[str, Any]:
    # What is added behind the last token of the model's own is not the model's, or a word that is
    # spelt so would be that token.
    own = len(tokens)
    while options.get("ignore_merges") and own and types[own - 1] in (_CONTROL, _USER):
        own -= 1
    usual = {"type": "BPE", "dropout": None, "unk_token": None, "fuse_unk": False,
             "byte_fallback": False, "ignore_merges": False}  # fmt: skip
    vocabulary = {token: i for i, token in enumerate(tokens[:own])}
    return {**usual, **options, "vocab": vocabulary, "merges": merges}


def _tokenizer(tokens: list[str], types: list[int], model: dict[str, Any]) -> dict[str, Any]:
    added = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": types[i] == _CONTROL}
        for i, token in enumerate(tokens)
        if types[i] in (_CONTROL, _USER)
    ]  # fmt: skip
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
            "model": model}  # fmt: skip


def _post_processor(
    named: dict[str, str], added: dict[str, bool], tokens: list[str], *, byte_level: bool
) -> dict[str, Any] | None:
    """What puts BOS before a text and EOS behind it."""
    before, after = ([named[f"{name}_token"]] if added[name] and f"{name}_token" in named else []
                     for name in ("bos", "eos"))  # fmt: skip
    if not before and not after:
        return None

    def around(letter: str, number: int) -> list[dict[str, Any]]:
        inner = {"Sequence": {"id": letter, "type_id": number}}
        ends = [[{"SpecialToken": {"id": t, "type_id": number}} for t in part]
                for part in (before, after)]  # fmt: skip
        return [*ends[0], inner, *ends[1]]

    template = {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": around("A", 0) + around("B", 1),
        "special_tokens": {
            token: {"id": token, "ids": [tokens.index(token)], "tokens": [token]}
            for token in before + after
        },
    }
    if not byte_level:
        return template
    offsets = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False,
               "use_regex": True}  # fmt: skip
    return {"type": "Sequence", "processors": [offsets, template]}


def _id(metadata: Metadata, key: str, count: int) -> int | None:
    """A special token by its key; one outside the vocabulary is none, as in llama.cpp."""
    value = metadata.get(f"tokenizer.ggml.{key}_token_id")
    return value if type(value) is int and 0 <= value < count else None


def _flag(metadata: Metadata, key: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{key}", default)
    if not isinstance(value, bool):
        raise ValueError(f"tokenizer.ggml.{key}: expected true or false")
    return value


def _numbers(metadata: Metadata, key: str) -> np.ndarray | None:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if value is not None and not isinstance(value, np.ndarray):
        raise ValueError(f"tokenizer.ggml.{key}: expected a list of numbers")
    return value


def tokenizer_metadata(
    about: dict[str, Any], config: dict[str, Any], ends: Iterable[int]
) -> Metadata:
    """The keys of a tokenizer.json and its tokenizer_config.json; `ends` are the ids that end an
    answer, the first of them EOS. Raises ValueError for a tokenizer that llama.cpp has no word for.
    """
    model = about["model"]
    if model["type"] != "BPE":
        raise ValueError(f"a tokenizer of the kind {model['type']} is not written, only BPE")
    tokens, types = _table(about)
    merges = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
    parts = list(_parts(about.get("normalizer"))), list(_parts(about.get("pre_tokenizer")))
    keys: Metadata = {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types}
    kinds = [part["type"] for part in parts[0]]
    if any(part["type"] == "ByteLevel" for part in parts[1]):
        whole_words = bool(model.get("ignore_merges"))
        name = splits.name_of(about["pre_tokenizer"], whole_words=whole_words)
        if name is None or set(kinds) - {"NFC"}:
            raise ValueError("llama.cpp has no name for the normalizer and split of its tokenizer")
        if not merges:
            raise ValueError("llama.cpp reads no byte-level tokenizer without merges")
        keys |= {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": name,
            "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        }
    else:
        metaspace = [part for part in parts[1] if part["type"] == "Metaspace"]
        if not set(kinds) <= {"Prepend", "Replace"} or not ("Replace" in kinds or metaspace):
            raise ValueError("its tokenizer is neither byte-level BPE nor as SentencePiece's")
        _respell(tokens, types, model)
        first: dict[str, int] = {}
        for rank, merge in enumerate(merges):
            first.setdefault("".join(merge), rank)
        scores = [-float(first.get(token, len(merges))) for token in tokens]
        never = all(part.get("prepend_scheme") == "never" for part in metaspace)
        keys |= {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.scores": [0.0 if t == _BYTE else s
                                      for s, t in zip(scores, types, strict=True)],
            "tokenizer.ggml.add_space_prefix": "Prepend" in kinds or not never,
        }  # fmt: skip
    return keys | _special(about, config, tokens, list(ends))


def _table(about: dict[str, Any]) -> tuple[list[str], list[int]]:
    """Every id's token and type; ids without one are filled up."""
    ids: dict[str, int] = dict(about["model"]["vocab"])
    kinds: dict[str, int] = {}
    for token in about["added_tokens"]:
        ids[token["content"]] = token["id"]
        kinds[token["content"]] = _CONTROL if token["special"] else _USER
    count = max(ids.values()) + 1
    tokens, types = [f"[PAD{i}]" for i in range(count)], [_UNUSED] * count
    for token, number in ids.items():
        tokens[number], types[number] = token, kinds.get(token, _NORMAL)
    return tokens, types


def _respell(tokens: list[str], types: list[int], model: dict[str, Any]) -> None:
    for i, token in enumerate(tokens):
        if token == model.get("unk_token"):
            types[i] = _UNKNOWN
        elif model.get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", token):
            types[i] = _BYTE
        elif types[i] == _USER:
            tokens[i] = token.replace(_SPACE, " ")


def _special(
    about: dict[str, Any], config: dict[str, Any], tokens: list[str], ends: list[int]
) -> Metadata:
    keys: Metadata = {}
    if ends:
        keys["tokenizer.ggml.eos_token_id"] = ends[0]
    if len(ends) > 1:
        keys["tokenizer.ggml.eot_token_id"] = ends[1]
    for key, name in (("bos", "bos_token"), ("unknown", "unk_token")):
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if token in tokens:
            keys[f"tokenizer.ggml.{key}_token_id"] = tokens.index(token)
    bos = keys.get("tokenizer.ggml.bos_token_id")
    if bos is None and ends:
        keys["tokenizer.ggml.bos_token_id"] = ends[0]  # llama.cpp would take some other token
    written = tokenizers.Tokenizer.from_str(json.dumps(about)).encode("a").ids
    keys["tokenizer.ggml.add_bos_token"] = bos is not None and written[:1] == [bos]
    keys["tokenizer.ggml.add_eos_token"] = bool(ends) and written[-1:] == [ends[0]]
    return keys


def _parts(component: dict[str, Any] | None) -> Iterable[dict[str, Any]]:
    """The components of a sequence, or the one that there is."""
    if component is None:
        return
    inner = component.get("normalizers", component.get("pretokenizers"))
    yield from inner if component["type"] == "Sequence" and inner is not None else (component,)
