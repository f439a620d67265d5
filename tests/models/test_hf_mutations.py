"""Folders with one thing wrong, made by machine: read, or refused in one line, and at once.

Every key of every family's config.json, of a tokenizer and its configuration, every entry of a
safetensors header and of an index is dropped, set to null, or to a value of another type or size.
What is not noticed must still make a model: the mutations that are read are read in full.
"""

import json
import random
import struct
import time
import tracemalloc

import pytest

from instruct_jax.data.tokenizer import train_bpe
from instruct_jax.errors import UserError
from instruct_jax.models.hf import inspect_pretrained, load_pretrained
from tests.models.folders import NAMES, write_folder

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DROPPED, RENAMED = object(), object()
VALUES = (
    DROPPED, RENAMED, None, True, 0, -1, 1, 3, 2**31 - 1, 2**63, 10**400, -1e300, 1e-300,
    float("nan"), float("inf"), "", "x" * 100_000, "a\nb\ud800", [], [1], [[]], {}, {"": {}},
    ["full_attention"] * 3, {"rope_type": "linear", "factor": None},
)  # fmt: skip
SECONDS, BYTES = 5.0, 100_000_000


def read(folder, load):
    """Whether it was read; it took little time and memory, and an error was one line."""
    tracemalloc.start()
    start = time.process_time()
    try:
        load(folder)
        return True
    except UserError as error:
        told = str(error)
        assert "\n" not in told and len(told) < 2_000, told[:3_000]
        told.encode()  # or it could not be printed
        assert str(folder) in told
        return False
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < BYTES and time.process_time() - start < SECONDS


def places(value, path=()):
    """The paths of all that is in nested dicts and lists, first ones of long lists."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:3])
    for key, inner in items if isinstance(value, dict | list) else ():
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))
        else:
            yield (*path, key)


def mutated(value, path, new):
    """A copy with one thing changed."""
    value = json.loads(json.dumps(value))
    target = value
    for key in path[:-1]:
        target = target[key]
    if not path:
        return {} if new in (DROPPED, RENAMED) else new
    if new is RENAMED and isinstance(target, dict):
        target["new\nname\ud800"] = target[path[-1]]
        new = DROPPED
    elif new is RENAMED:
        target.reverse()
        return value
    if new is DROPPED:
        del target[path[-1]]
    else:
        target[path[-1]] = new
    return value


def mutations(value, *, seed, count):
    """`count` of all (path, new value), drawn once for every seed."""
    pairs = [(path, new) for path in places(value) for new in VALUES]
    return random.Random(seed).sample(pairs, min(count, len(pairs)))


def try_all(folder, file, *, seed, count, load):
    """Mutates a JSON file of a folder; the two outcomes, each at least once."""
    path = folder / file
    whole = json.loads(path.read_text())
    outcomes = set()
    for place, new in mutations(whole, seed=seed, count=count):
        path.write_text(json.dumps(mutated(whole, place, new)))
        try:
            outcomes.add(read(folder, load))
        except BaseException as error:
            error.add_note(f"{file}: {place} = {str(new)[:80]}")
            raise
    path.write_text(json.dumps(whole))
    return outcomes


def with_tokenizer(folder):
    """The folder with a tokenizer that its table has rows for."""
    train_bpe(["the cat sat on the mat"], vocab_size=270).save(folder)
    raw = json.loads((folder / "config.json").read_text())
    own = {"instruct_jax": {"vocab_size": 270}} if raw["vocab_size"] > 270 else {}
    (folder / "config.json").write_text(json.dumps(raw | own))
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_no_config_json_ends_in_a_traceback_or_takes_what_it_claims(tmp_path, name):
    """Without the numbers, which the slow test reads too."""
    folder = write_folder(tmp_path / name, name)
    assert False in try_all(folder, "config.json", seed=1, count=60, load=inspect_pretrained)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_what_a_mutated_config_json_still_describes_is_read_in_full_or_refused(tmp_path, name):
    folder = write_folder(tmp_path / name, name)
    assert False in try_all(folder, "config.json", seed=2, count=150, load=load_pretrained)


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_no_tokenizer_ends_in_a_traceback_or_takes_what_it_claims(tmp_path, file):
    folder = tmp_path / "model"
    write_folder(folder, "llama")
    train_bpe(["the cat sat on the mat"], vocab_size=270).save(folder)
    raw = json.loads((folder / "config.json").read_text()) | {"vocab_size": 300}
    (folder / "config.json").write_text(json.dumps(raw))
    assert try_all(folder, file, seed=3, count=60, load=inspect_pretrained) == {True, False}


@pytest.mark.slow
def test_no_tokenizer_of_a_thousand_does(tmp_path):
    folder = tmp_path / "model"
    write_folder(folder, "llama")
    train_bpe(["the cat sat on the mat"], vocab_size=270).save(folder)
    raw = json.loads((folder / "config.json").read_text()) | {"vocab_size": 300}
    (folder / "config.json").write_text(json.dumps(raw))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        try_all(folder, file, seed=4, count=500, load=inspect_pretrained)


def headers(folder, *, seed, count):
    """Mutates the header of the weights, then bytes anywhere in the file."""
    path = folder / WEIGHTS
    whole = path.read_bytes()
    (length,) = struct.unpack_from("<Q", whole)
    header, numbers = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    for place, new in mutations(header, seed=seed, count=count):
        text = json.dumps(mutated(header, place, new)).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + numbers)
        read(folder, load_pretrained)
    draw = random.Random(seed)
    for _ in range(count):
        changed = bytearray(whole)
        for _ in range(draw.choice((1, 1, 4, 32))):
            changed[draw.randrange(8 + length)] = draw.randrange(256)
        path.write_bytes(bytes(changed[: draw.choice((None, draw.randrange(len(whole)))) or None]))
        read(folder, load_pretrained)
    path.write_bytes(whole)


def test_no_header_of_weights_ends_in_a_traceback_or_takes_what_it_claims(tmp_path):
    headers(write_folder(tmp_path / "model", "llama"), seed=5, count=30)


@pytest.mark.slow
def test_no_header_of_five_hundred_does(tmp_path):
    headers(write_folder(tmp_path / "model", "gpt2"), seed=6, count=250)


def test_no_index_ends_in_a_traceback_or_takes_what_it_claims(tmp_path):
    folder = write_folder(tmp_path / "model", "llama")
    length = struct.unpack_from("<Q", (folder / WEIGHTS).read_bytes())[0]
    header = json.loads((folder / WEIGHTS).read_bytes()[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    about = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, WEIGHTS)}
    (folder / INDEX).write_text(json.dumps(about))
    assert False in try_all(folder, INDEX, seed=7, count=60, load=load_pretrained)
