"""How byte-level BPE splits a text before it merges: `tokenizer.ggml.pre`, by its names.

Each name stands for a pre-tokenizer of the library `tokenizers`. A tokenizer that is written gets
the name whose pre-tokenizer splits a text made for that as its own does, which is how llama.cpp's
own converter tells them apart.
"""

import functools
import json
from typing import Any

import tokenizers

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
_MARKS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = r"[^\r\n\p{L}\p{N}]?"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_LLAMA3 = (_CONTRACTIONS + _WORDS + r"|\p{N}{1,3}" + _MARKS + _SPACES,)
_QWEN2 = (_CONTRACTIONS + _WORDS + r"|\p{N}" + _MARKS + _SPACES,)
_TEKKEN = (
    f"{_CASED}{_UPPER}*{_LOWER}+|{_CASED}{_UPPER}+{_LOWER}*"
    + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACES,
)  # fmt: skip
_GPT4O = (
    f"{_CASED}{_UPPER}*{_LOWER}+{_CONTRACTIONS}?|{_CASED}{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    + r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _SPACES,
)  # fmt: skip
_DIGITS = (r"\p{N}", _GPT2)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")

# The first name of a split is the one that is written. Not all of llama.cpp's are here: those of
# the architectures that are read.
NAMES: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "smollm": _DIGITS,
    "llama-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "tekken": _TEKKEN,
    "gpt-4o": _GPT4O,
    "default": _DEFAULT,
    **dict.fromkeys(("phi-2", "mpt", "olmo", "exaone4", "trillion", "mellum"), (_GPT2,)),
    **dict.fromkeys(("starcoder", "refact", "command-r", "codeshell", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("llama3", "llama-v3", "falcon3", "pixtral", "dbrx", "smaug-bpe"), _LLAMA3),
    **dict.fromkeys(("stablelm2", "deepseek-r1-qwen", "megrez", "hunyuan", "kormo"), _QWEN2),
    "llama4": _GPT4O,
}
WHOLE_WORDS = {"llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken"}
"""Whose words are tokens wherever the vocabulary has them, whatever the merges say; they also begin
with BOS unless the file says otherwise."""
NORMALISED = {"qwen2", "deepseek-r1-qwen", "megrez"}
"""Whose tokenizers compose characters (NFC), which llama.cpp leaves to the caller."""

# Runs of spaces and digits, scripts, marks, cases and contractions.
_TRIAL = (
    "\n \n\n \n\n\n \t \t\t \t\n  \n   \n    \n     \n"
    "  two  three   spaces 3 33 333 3333 33333 333333 1,234.5 3.3 3..3 \u0664\u0665\u0666 \u00bd "
    "I've 'told HE'S 'RE We'Ve a'lL don't ''''''```......!!!!!!?????? ------======= (normal) [x] "
    "{y} <z> a_b a/b/c\n//\n $5+4=9^2~1|2 HTTPServer getValue ABCdef "
    "\u00c9t\u00e9 na\u00efve e\u0301 \u043d\u0435\u0449\u043e \u043d\u0430 "
    "\u6211\u60f3\u5728apple\u5de5\u4f5c1314\u5929\uff5e \u1780\u17b6\u1793\u17cb\u178f\u17c2 "
    "\u0939\u093f\u0928\u094d\u0926\u0940 \ud55c\uad6d\uc5b4 \U0001f680 "
    "\U0001f636\u200d\U0001f32b\ufe0f \u00a0nbsp\u3000wide tail  "
)


def pre_tokenizer(name: str) -> dict[str, Any]:
    """The pre_tokenizer of a tokenizer.json; KeyError for a name that is not known."""
    patterns = NAMES[name]
    if patterns == (_GPT2,):
        return _bytes(split=True)
    splits: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": one}, "behavior": "Isolated", "invert": False}
        for one in patterns
    ]
    if patterns == _DIGITS:  # as its tokenizers say it
        splits = [{"type": "Digits", "individual_digits": True}]
    return {"type": "Sequence", "pretokenizers": [*splits, _bytes(split=patterns == _DIGITS)]}


def name_of(pre: dict[str, Any] | None, *, whole_words: bool) -> str | None:
    """The name of what splits as the pre_tokenizer of a tokenizer.json does; None where none has.

    `whole_words` is whether a word that is a token is never merged (`ignore_merges`).
    """
    if pre is None:
        return None
    own = _pieces(json.dumps(pre))
    equal = [name for name in NAMES if _pieces(json.dumps(pre_tokenizer(name))) == own]
    return next((name for name in equal if (name in WHOLE_WORDS) == whole_words), None)


@functools.cache
def _pieces(pre: str) -> list[str]:
    about = {"version": "1.0", "added_tokens": [], "pre_tokenizer": json.loads(pre),
             "model": {"type": "WordLevel", "vocab": {"?": 0}, "unk_token": "?"}}  # fmt: skip
    backend = tokenizers.Tokenizer.from_str(json.dumps(about))
    return [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(_TRIAL)]


def _bytes(*, split: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": split,
    }  # fmt: skip
