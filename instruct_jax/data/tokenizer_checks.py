"""What a tokenizer.json from elsewhere must hold to before its text is trusted with ours.

The library takes ids up to 2^32, gives added tokens other ids than the file says where those clash,
and runs regular expressions by backtracking: a pattern such as (a+)+$ takes seconds for thirty
characters, and then ends in a panic, native backtrace and all. So:

- the file, unpacked, is at most `LONGEST` bytes, whatever a .gz claims to hold;
- ids are dense enough for a table of them to be made (`check_ids`);
- a pattern, or whatever else can be slow, fail or make a text grow without end, is tried on texts
  made for it, in a process of its own with little time and memory (`check_behaviour`). A trial
  proves nothing about other texts; it is what a user can have without a regex engine of our own.
  The known components of the library are not tried: they are linear.
"""

import functools
import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from instruct_jax.data.rows import DataError

FORMS = (
    "expected tokenizer.json[.gz], or a folder with it or with vocab.json and merges.txt; of a "
    "SentencePiece model, save_pretrained of transformers writes the first"
)
LONGEST, _MOST_VALUES = 64_000_000, 4_000_000
# Ids without a token: a published vocabulary has a few.
_MOST_GAPS = 1_000

_LINEAR = {
    "ByteLevel", "Metaspace", "Whitespace", "WhitespaceSplit", "BertPreTokenizer", "Digits",
    "Punctuation", "UnicodeScripts", "CharDelimiterSplit", "NFC", "NFD", "NFKC", "NFKD",
    "Lowercase", "Strip", "StripAccents", "BertNormalizer", "Nmt",
}  # fmt: skip
_CPU_SECONDS, _SECONDS, _BYTES = 2, 30, 500_000_000

# The other process: a tokenizer of the same components over a model of one token. Long runs show
# what is quadratic and worse, and short ones what is exponential.
_TRIAL = """
import itertools, json, resource, sys
resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[1]),) * 2)
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]),) * 2)
sys.path[:] = json.loads(sys.argv[3])
import tokenizers
about = sys.stdin.read()
trial = tokenizers.Tokenizer.from_str(about)
said = set()
def patterns(part):
    if isinstance(part, dict):
        said.update(*(part[k] for k in ("Regex", "String") if isinstance(part.get(k), str)))
    if isinstance(part, (dict, list)):
        for inner in part.values() if isinstance(part, dict) else part:
            patterns(inner)
patterns(json.loads(about))
said = sorted(said - set("\\\\()[]{}|?*+^$"))
units = [*"aA1 \\n.'_", "\\u00e9", "\\u4e2d", *said[:24]]
units += [a + b for a, b in itertools.permutations(units[:12], 2)]
for unit in units:
    for count in (30, 80, 1000 // len(unit)):
        # The last holds whatever literal a match must end with, out of its reach.
        for end in ("", "!", " ", "\\u00a7" + "".join(said)):
            trial.encode(unit * count + end)
"""


def read_text(path: Path) -> str:
    """The text of a tokenizer file, unpacked where it ends in .gz. Raises DataError."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(LONGEST + 1)
    except (OSError, EOFError, gzip.zlib.error) as error:  # type: ignore[attr-defined]
        raise DataError(f"not a tokenizer: {error}", path=path) from error
    if len(data) > LONGEST:
        raise DataError(f"more than {LONGEST:,} bytes; no tokenizer is so large", path=path)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        reason = f"not a tokenizer: not UTF-8 at byte {error.start:,}"
        raise DataError(reason, path=path, hint=FORMS) from error


def parse_object(text: str, path: Path) -> dict[str, Any]:
    """The JSON object `text`, of `path`. Raises DataError."""
    if text.count(",") > _MOST_VALUES:
        raise DataError(f"more than {_MOST_VALUES:,} values; no tokenizer has so many", path=path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"not a tokenizer: not JSON ({error})", path=path) from error
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise DataError(f"not a tokenizer: expected a JSON object, found {kind}", path=path)
    return value


def check_ids(vocabulary: dict[str, int], added: Any, path: Path) -> None:
    """DataError unless every token has an id of its own, the one that the file says, and the ids
    leave few gaps; `added` is the file's added_tokens.
    """
    size, largest = len(vocabulary), max(vocabulary.values(), default=-1)
    if largest >= 2 * size + _MOST_GAPS:
        raise DataError(
            f"the largest token id is {largest}, of {size} tokens; a model of this tokenizer would "
            "have a row for each id",
            path=path,
        )
    for token in added if isinstance(added, list) else ():
        content, number = token.get("content"), token.get("id")
        if vocabulary.get(content) != number:
            raise DataError(
                f"the added token {content!r:.60} has the id {number}, which is another token's or "
                f"leaves a gap; the library would give it {vocabulary.get(content)}",
                path=path,
            )
    if len(set(vocabulary.values())) < size:
        of_ids: dict[int, str] = {}
        for token, number in vocabulary.items():
            other = of_ids.setdefault(number, token)
            if other != token:
                raise DataError(
                    f"the tokens {other!r:.60} and {token!r:.60} have one id, {number}", path=path
                )


def check_behaviour(about: dict[str, Any], path: Path) -> None:
    """DataError where the normalizer or pre-tokenizer of a tokenizer.json is slow or fails."""
    parts = {name: about.get(name) for name in ("normalizer", "pre_tokenizer")}
    if all(_linear(part) for part in parts.values()):
        return
    reason = _trial(json.dumps(parts, sort_keys=True))
    if reason is not None:
        raise DataError(
            f"its normalizer or pre-tokenizer {reason}, on texts of a thousand characters; mend "
            "its patterns (nested repetitions such as (a+)+ are the usual cause)",
            path=path,
        )


def _linear(part: Any) -> bool:
    if part is None:
        return True
    if not isinstance(part, dict):
        return False
    kind = part.get("type")
    if kind == "Sequence":
        inner = part.get("normalizers", part.get("pretokenizers"))
        return isinstance(inner, list) and all(_linear(one) for one in inner)
    if kind == "Replace":
        pattern, content = part.get("pattern"), part.get("content")
        old = pattern.get("String") if isinstance(pattern, dict) else None
        return isinstance(old, str) and isinstance(content, str) and len(content) <= len(old)
    if kind == "Prepend":
        return isinstance(part.get("prepend"), str) and len(part["prepend"]) <= 1
    return kind in _LINEAR


@functools.cache
def _trial(parts: str) -> str | None:
    """What goes wrong with a normalizer and a pre-tokenizer, as JSON; None where nothing does."""
    model = {"type": "WordLevel", "vocab": {"?": 0}, "unk_token": "?"}
    about = {"version": "1.0", "model": model, "added_tokens": []}
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-c", _TRIAL, str(_CPU_SECONDS), str(_BYTES),
             json.dumps(sys.path)],
            input=json.dumps(about | json.loads(parts)).encode(),
            capture_output=True,
            timeout=_SECONDS,
            env={"TOKENIZERS_PARALLELISM": "false", "RUST_BACKTRACE": "0"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"takes more than {_SECONDS} seconds"
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"takes more than {_CPU_SECONDS} seconds, or {_BYTES:,} bytes"
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
    return f"fails ({lines[-1][:120] if lines else 'without a word'})"
