"""Text to token ids and back, around the `tokenizers` library.

The contract (spec MODEL-7): ids 0..vocab_size-1 are the real vocabulary and hold EOS; PAD is
`vocab_size`, the first id past it, so PAD is never EOS, never comes from text, and has no logit.
Text never turns into a special token: "<|endoftext|>" in a user's text is encoded as characters,
and only the loader puts EOS where a response ends.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, SupportsIndex

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from instruct_jax.data.rows import DataError
from instruct_jax.data.tokenizer_checks import (
    FORMS,
    LONGEST,
    check_behaviour,
    check_ids,
    parse_object,
    read_text,
)
from instruct_jax.files import write_text

EOS = "<|endoftext|>"
# The stop tokens of published tokenizers, for a tokenizer.json that does not name its own.
_KNOWN_EOS = (EOS, "</s>", "<|end_of_text|>", "<|eot_id|>", "<|im_end|>", "<eos>")
_BYTES = 256
CHAT_FILE, GENERATION_FILE = "chat_template.jinja", "generation_config.json"
_LONGEST_TEMPLATE = 1_000_000
_SAMPLE = ("Hello, world 1\n", "\u00e9 \u4e2d")


class Tokenizer:
    """A byte-exact tokenizer with one EOS and a PAD past the vocabulary.

    `vocab_size` counts the real vocabulary, EOS included; `pad_id == vocab_size`.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos: str = EOS,
        named: Mapping[str, str] | None = None,
        chat: str | None = None,
        generation: Mapping[str, Any] | None = None,
    ) -> None:
        """`backend` is kept; ValueError when it has no token `eos`.

        `named` are the special tokens as tokenizer_config.json has them ("bos_token", "unk_token"
        and their like), `chat` is the model's own template (chat_template.py), and `generation`
        what generation_config.json holds: of it `stop_ids` are read, which end an answer as EOS
        does.
        """
        eos_id = backend.token_to_id(eos)
        if eos_id is None:
            raise ValueError(f"the tokenizer has no token {eos!r} to end a text with")
        backend.no_padding()
        backend.no_truncation()
        backend.add_special_tokens([eos])
        backend.encode_special_tokens = True  # special tokens in a text are read as characters
        self._backend = backend
        self.eos = eos
        self.eos_id: int = eos_id
        # A published vocabulary may have gaps, so its size is not always its length.
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.pad_id: int = self.vocab_size
        self.named: dict[str, str] = {**(named or {}), "eos_token": eos}
        added = backend.get_added_tokens_decoder().values()
        self.added: tuple[str, ...] = tuple(token.content for token in added)
        self.special: tuple[str, ...] = tuple(token.content for token in added if token.special)
        self.chat, self.generation = chat, dict(generation or {})
        ends = self.generation.get("eos_token_id")
        # Published files name ids that are no token; no model draws them.
        known = [i for i in _listed(ends) if type(i) is int and 0 <= i < self.vocab_size]
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys([eos_id, *known]))

    @cached_property
    def prefix(self) -> tuple[int, ...]:
        """What the tokenizer itself puts before a text that is in no template: one BOS, or
        nothing.
        """
        own = self._backend.encode("a", add_special_tokens=True).ids
        bare = self.encode("a")
        at = next((i for i in range(len(own)) if own[i : i + len(bare)] == bare), 0)
        return tuple(own[:at])

    def id_of(self, token: str) -> int | None:
        """The id of a token by its spelling in the vocabulary."""
        return self._backend.token_to_id(token)

    def as_json(self) -> str:
        """The text of its tokenizer.json."""
        return self._backend.to_str()

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without EOS; never a special token, never PAD."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text, in parallel."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[SupportsIndex]) -> str:
        """Text of `ids` without PAD and EOS; ValueError for an id outside the vocabulary."""
        kept = [i for i in map(int, ids) if i not in (self.pad_id, self.eos_id)]
        wrong = [i for i in kept if not 0 <= i < self.vocab_size]
        if wrong:
            raise ValueError(f"token id {wrong[0]} is outside 0..{self.pad_id}")
        return self._backend.decode(kept, skip_special_tokens=False)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of all that decides how text is encoded; equal for a saved and loaded copy."""
        return hashlib.sha256(f"{self.eos_id}\n{self._backend.to_str()}".encode()).hexdigest()

    def save(self, directory: str | os.PathLike[str]) -> list[str]:
        """Writes what `load_tokenizer` reads: tokenizer.json, tokenizer_config.json, and where the
        model has its own, chat_template.jinja and generation_config.json; their names.
        """
        texts = {
            "tokenizer.json": self._backend.to_str(),
            "tokenizer_config.json": json.dumps(self.named) + "\n",
        }
        if self.chat is not None:
            texts[CHAT_FILE] = self.chat
        if self.generation:
            texts[GENERATION_FILE] = json.dumps(self.generation, indent=2) + "\n"
        for name, text in texts.items():
            write_text(Path(directory) / name, text)
        return list(texts)

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, eos={self.eos!r}, eos_id={self.eos_id})"


def load_tokenizer(path: str | os.PathLike[str], *, eos: str | None = None) -> Tokenizer:
    """A tokenizer.json[.gz], a folder with one, or a GPT-2 folder (vocab.json and merges.txt).

    EOS is `eos`, else the `eos_token` of the tokenizer_config.json beside it, else the first known
    stop token of its vocabulary. DataError when nothing is there, when the files are not a
    tokenizer, or one that cannot be used with any text (`tokenizer_checks.py`).
    """
    path = Path(path)
    names = ("tokenizer.json", "tokenizer.json.gz")
    files = [path] if path.is_file() else [path / n for n in names if (path / n).is_file()]
    if files:
        found = files[0]
        backend, about = _parsed(found)
    elif (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        found, about = path / "vocab.json", {}
        backend = _guarded(path, lambda: _gpt2(path))
    elif path.exists():
        raise DataError("no tokenizer in this folder", path=path, hint=FORMS)
    else:
        raise DataError("no such file or folder", path=path, hint=FORMS)
    vocabulary = backend.get_vocab(with_added_tokens=True)
    if not vocabulary:
        raise DataError("the vocabulary is empty", path=path)
    check_ids(vocabulary, about.get("added_tokens"), found)
    folder = path if path.is_dir() else path.parent
    named = _named_tokens(vocabulary, folder)
    tokenizer = Tokenizer(
        backend,
        eos=eos or _eos_of(vocabulary, named, folder),
        named=named,
        chat=read_chat_template(folder),
        generation=_object_in(folder / GENERATION_FILE),
    )
    if not all(_guarded(found, lambda: tokenizer.encode_batch(_SAMPLE))):
        raise DataError("it encodes plain text to nothing", path=found)
    return tokenizer


def _parsed(path: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """A tokenizer.json as the library reads it, and as it is."""
    text = read_text(path)
    about = parse_object(text, path)
    check_behaviour(about, path)
    model = about.get("model")
    if isinstance(model, dict) and model.get("dropout"):
        # Merges left out at random are for training a tokenizer's model; text has one encoding.
        text = json.dumps(about | {"model": model | {"dropout": None}})
    return _guarded(path, lambda: tokenizers.Tokenizer.from_str(text)), about


def _guarded(path: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except BaseException as error:
        # The library raises bare Exceptions for malformed files, and its panics are not even those.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(f"not a tokenizer: {error}", path=path) from error


def train_bpe(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Byte-level BPE as GPT-2's, learnt from `texts`; the same texts give the same tokenizer.

    `vocab_size` counts the 256 bytes and EOS; a small corpus may give fewer tokens.
    """
    if vocab_size < _BYTES + 1:
        raise ValueError(f"vocab_size {vocab_size} is below {_BYTES + 1}: every byte and EOS")
    backend = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)


def _byte_level(model: models.BPE) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def _gpt2(folder: Path) -> tokenizers.Tokenizer:
    files = [folder / name for name in ("vocab.json", "merges.txt")]
    for path in files:
        if path.stat().st_size > LONGEST:
            raise DataError(f"more than {LONGEST:,} bytes; no tokenizer is so large", path=path)
    return _byte_level(models.BPE.from_file(*map(str, files)))


def read_chat_template(folder: Path) -> str | None:
    """The chat template of a folder, as text; DataError for a file that is no text."""
    path = folder / CHAT_FILE
    if path.is_file():
        with path.open("rb") as file:
            data = file.read(_LONGEST_TEMPLATE + 1)
        if len(data) > _LONGEST_TEMPLATE:
            told = f"more than {_LONGEST_TEMPLATE:,} bytes; no template is so long"
            raise DataError(told, path=path)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(f"not UTF-8 at byte {error.start}", path=path) from error
    found = _object_in(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(found, list):  # several, by name
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _object_in(path: Path) -> dict[str, Any]:
    return parse_object(read_text(path), path) if path.is_file() else {}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _named_tokens(vocabulary: dict[str, int], folder: Path) -> dict[str, str]:
    """The tokens that tokenizer_config.json and the older special_tokens_map.json name, such as
    "bos_token" and "eos_token".
    """
    named = {}
    for path in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        for name, token in _object_in(path).items():
            if not name.endswith("_token"):
                continue
            # Hugging Face writes the token as a string or as {"content": string, ...}.
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and token in vocabulary:
                named[name] = token
            elif name == "eos_token" and token is not None:
                told = f"eos_token={str(token)[:60]!r} is no token of the tokenizer"
                raise DataError(told, path=path, hint="name the one that ends a text")
    return named


def _eos_of(vocabulary: dict[str, int], named: dict[str, str], folder: Path) -> str:
    for token in (named.get("eos_token"), *_KNOWN_EOS):
        if token in vocabulary:
            return token
    hint = f"looked for {', '.join(_KNOWN_EOS)}; name it as eos_token in tokenizer_config.json"
    raise DataError("the tokenizer has no known end of text", path=folder, hint=hint)
