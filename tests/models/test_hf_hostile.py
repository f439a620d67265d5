"""R10: a hostile or broken folder gives one clear error before anything large is allocated.

No code of a folder runs: there is a canary in every place where another reader would run it.
"""

import json
import os
import struct
import tracemalloc

import numpy as np
import pytest

from instruct_jax.errors import UserError
from instruct_jax.models.hf import load_pretrained
from tests.models.folders import write_folder

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "model", "llama")


def refused(folder, **options):
    """The error, in one line; what was claimed was not allocated on the way to it."""
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as error:
            load_pretrained(folder, **options)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 10_000_000, "tracing a model for its shapes takes some"
    assert "\n" not in str(error.value) and len(str(error.value)) < 1_000
    return str(error.value)


def change_config(folder, **changes):
    raw = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(raw))


def split(folder):
    """(header, numbers) of the weights."""
    whole = (folder / WEIGHTS).read_bytes()
    length = struct.unpack_from("<Q", whole)[0]
    return json.loads(whole[8 : 8 + length]), whole[8 + length :]


def join(folder, header, numbers, *, length=None, name=WEIGHTS):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    size = len(text) if length is None else length
    (folder / name).write_bytes(struct.pack("<Q", size) + text + numbers)


def first(header):
    return next(name for name in header if name != "__metadata__")


@pytest.mark.parametrize("kept", [0, 4, 8, 100, -1])
def test_a_truncated_file(folder, kept):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:kept])
    assert "not a readable safetensors file" in refused(folder)


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 200_000_000])
def test_a_header_that_claims_to_be_huge(folder, length):
    header, numbers = split(folder)
    join(folder, header, numbers, length=length)
    assert f"its header claims {length} bytes" in refused(folder)


def test_a_header_of_nested_lists(folder):
    join(folder, b"[" * 100_000, b"")
    assert "not JSON" in refused(folder)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"shape": [2**40, 2**40]}, "does not fit the file"),
        ({"shape": [-1, 4]}, "a size that is none"),
        ({"shape": [1.5]}, "a size that is none"),
        ({"shape": [True]}, "a size that is none"),
        ({"shape": "abc"}, "a size that is none"),
        ({"shape": [10**30]}, "a size that is none"),
        ({"dtype": "F4_E2"}, "unknown dtype 'F4_E2'"),
        ({"dtype": ["F32"]}, "unknown dtype"),
        ({"data_offsets": [0, 2**40]}, "does not fit the file"),
        ({"data_offsets": [8, 0]}, "does not fit the file"),
        ({"data_offsets": [0]}, "is not one"),
        ({"data_offsets": None}, "is not one"),
    ],
    ids=str,
)
def test_an_entry_that_lies_about_its_tensor(folder, entry, message):
    header, numbers = split(folder)
    header[first(header)].update(entry)
    join(folder, header, numbers)
    assert message in refused(folder)


def test_tensors_that_overlap_or_leave_a_gap(folder):
    header, numbers = split(folder)
    names = [name for name in header if name.endswith("layernorm.weight")]
    header[names[0]]["data_offsets"] = header[names[1]]["data_offsets"]
    join(folder, header, numbers)
    assert "leave a gap or overlap" in refused(folder)
    header, numbers = split(write_folder(folder, "llama"))
    join(folder, header, numbers + b"extra")
    assert "bytes of numbers, its header describes" in refused(folder)


def test_the_same_name_twice(folder):
    header, numbers = split(folder)
    text = json.dumps(header)
    name = json.dumps(first(header))
    join(folder, text.replace("{", "{" + f"{name}: 1, ", 1).encode(), numbers)
    assert "is there twice" in refused(folder)
    write_folder(folder, "llama")
    (folder / "config.json").write_text('{"vocab_size": 1, "vocab_size": 2}')
    assert "the name 'vocab_size' is there twice" in refused(folder)


def test_the_same_tensor_in_two_files(folder):
    (folder / "b.safetensors").write_bytes((folder / WEIGHTS).read_bytes())
    names = [name for name in split(folder)[0] if name != "__metadata__"]
    weight_map = dict.fromkeys(names, WEIGHTS) | {names[0]: "b.safetensors"}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert "is there twice" in refused(folder)


@pytest.mark.parametrize(
    "file",
    [
        "../secret.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "..",
        "",
        7,
        None,
        "a\\b.safetensors",
    ],
    ids=str,
)
def test_an_index_that_leaves_its_folder(folder, file):
    (folder.parent / "secret.safetensors").write_bytes((folder / WEIGHTS).read_bytes())
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
    assert "files of its own folder" in refused(folder)


def test_an_index_that_names_the_wrong_file(folder):
    (folder / INDEX).write_text(
        json.dumps({"weight_map": {"model.norm.weight": WEIGHTS, "x": WEIGHTS}})
    )
    assert "not in the file it names: x" in refused(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": []}))
    assert "weight_map must name files" in refused(folder)


@pytest.mark.parametrize("kind", ["I64", "BOOL", "F8_E4M3"])
def test_tensors_that_are_no_floats(folder, kind):
    header, numbers = split(folder)
    name = "model.norm.weight"
    begin, end = header[name]["data_offsets"]
    width = {"I64": 8, "BOOL": 1, "F8_E4M3": 1}[kind]
    header[name] |= {"dtype": kind, "shape": [(end - begin) // width]}
    join(folder, header, numbers)
    assert f"norm.weight is {kind}" in refused(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 10**12}, "num_hidden_layers=1000000000000 is not a size"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers=1000000 is absurd"),
        ({"num_hidden_layers": 9_999}, "config.json describes 9999 layers"),
        ({"hidden_size": 2**31 - 2}, "config.json describes"),
        ({"intermediate_size": 2**31 - 1}, "config.json describes"),
        ({"vocab_size": 2**31 - 1}, "config.json describes"),
        ({"vocab_size": 0}, "vocab_size=0 is not a size"),
        ({"head_dim": 2**30}, "config.json describes"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 is not a size"),
        ({"num_attention_heads": True}, "num_attention_heads=True is not a size"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps=inf is not a number"),
        ({"rms_norm_eps": None}, "config.json: rms_norm_eps=null is not a number"),
        ({"rms_norm_eps": [1e-6]}, "rms_norm_eps=[1e-06] is not a number"),
        ({"num_hidden_layers": None}, "num_hidden_layers=null is not a size"),
        ({"max_position_embeddings": None}, "max_position_embeddings=null is not a size"),
        ({"tie_word_embeddings": None}, "tie_word_embeddings=null is not true or false"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings=1 is not true or false"),
        ({"hidden_act": ["silu"]}, "hidden_act=\"['silu']\" is not supported"),
        ({"rope_scaling": [1]}, "rope_scaling=[1] is not an object"),
        ({"rope_parameters": {"rope_theta": None}}, "rope_theta=null is not a number"),
        ({"partial_rotary_factor": 1e9}, "rope_fraction must lie in (0, 1]"),
        ({"rms_norm_eps": -1.0}, "norm_eps must be positive"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta must be positive"),
        ({"rope_parameters": "x"}, "config.json"),
        ({"model_type": ["llama"]}, "model_type="),
        ({"architectures": "x" * 10_000, "num_hidden_layers": 4}, "missing"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_absurd_values_in_config_json(folder, changes, message):
    change_config(folder, **changes)
    assert message in refused(folder)


def test_a_config_json_without_end(folder):
    (folder / "config.json").write_bytes(b'{"a": ' + b" " * 10_000_001)
    assert "not a file of at most 10000000 bytes" in refused(folder)
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/dev/zero")
    assert "not a file of at most 10000000 bytes" in refused(folder)


CANARY = "import pathlib; pathlib.Path({path!r}).touch()"


def test_code_of_the_folder_is_named_and_never_run(folder, tmp_path):
    canary = tmp_path / "canary"
    for name in ("modeling_x.py", "configuration_x.py", "__init__.py", "tokenization_x.py"):
        (folder / name).write_text(CANARY.format(path=str(canary)))
    (folder / "chat_template.jinja").write_text("{{ cycler.__init__.__globals__.os.system('x') }}")
    assert load_pretrained(folder), "a file that nothing names does no harm"
    change_config(folder, auto_map={"AutoModelForCausalLM": "modeling_x.Model"})
    assert "auto_map names code of the folder's own, which is never run" in refused(folder)
    config, _ = load_pretrained(folder, ignore_code=True)
    assert config.num_layers == 3
    assert not canary.exists()


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickles_are_never_opened(folder, tmp_path):
    import pickle

    canary = tmp_path / "canary"
    (folder / WEIGHTS).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(canary)))
    message = refused(folder)
    assert "only safetensors weights are read; pytorch_model.bin may be a pickle" in message
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": "pytorch_model.bin"}}))
    assert "weight_map names 'pytorch_model.bin'; only safetensors" in refused(folder)
    (folder / INDEX).unlink()
    (folder / WEIGHTS).write_bytes(pickle.dumps(Bomb(canary)))
    assert "not a readable safetensors file" in refused(folder)
    np.save(folder / "weights.npy", np.array([Bomb(canary)], dtype=object), allow_pickle=True)
    refused(folder)
    assert not canary.exists()


def test_names_never_become_paths(folder, tmp_path):
    header, numbers = split(folder)
    header["../../escape"] = header.pop(first(header))
    join(folder, header, numbers)
    assert "1 unexpected: ../../escape" in refused(folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_a_name_that_is_neither_a_folder_nor_to_be_had(tmp_path):
    assert "neither a folder nor a hub id" in refused(tmp_path / "none")
    with pytest.raises(
        UserError, match=r"nobody/none: no such folder, and not to be had .*folder$"
    ):
        load_pretrained("nobody/none")
