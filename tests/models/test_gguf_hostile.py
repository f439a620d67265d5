"""A hostile or broken GGUF file gives one clear error before anything large is allocated."""

import random
import struct
import sys
import tracemalloc

import pytest

from instruct_jax.errors import UserError
from instruct_jax.models.gguf import open_gguf
from instruct_jax.models.hf import read_pretrained
from tests.models.gguf_files import write_gguf

HUGE = (2**63, 2**64 - 1, 2**40, 10**9)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = write_gguf(tmp_path_factory.mktemp("gguf") / "a.gguf", "llama")
    return path.read_bytes()


@pytest.fixture
def refused(tmp_path):
    """The error of a file of these bytes; what was claimed was not allocated on the way to it."""

    def refuse(data):
        path = tmp_path / "a.gguf"
        path.write_bytes(data)
        tracemalloc.start()
        try:
            with pytest.raises(UserError) as error, open_gguf(path) as found:
                read_pretrained(found)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < 80_000_000, "the buffer for a tokenizer of the largest size takes 64 million"
        told = str(error.value)
        assert "\n" not in told and len(told) < 1_000 and str(path) in told
        return told

    return refuse


def text(value):
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def container(keys=b"", tensors=b"", *, version=3, counts=None, numbers=b""):
    """A file of these encoded keys and tensors."""
    many = counts or (int(bool(tensors)), int(bool(keys)))
    return b"GGUF" + struct.pack("<IQQ", version, *many) + keys + tensors + numbers


def entry(name="x", shape=(32,), kind=0, offset=0, dimensions=None):
    sizes = struct.pack(f"<{len(shape)}Q", *shape)
    many = len(shape) if dimensions is None else dimensions
    return text(name) + struct.pack("<I", many) + sizes + struct.pack("<IQ", kind, offset)


@pytest.mark.parametrize("kept", [0, 3, 8, 23, 24, 100, 2_000, -1])
def test_a_truncated_file(whole, refused, kept):
    told = refused(whole[:kept])
    assert "not a readable GGUF file" in told or "too short" in told


def test_a_file_of_another_kind(refused, whole):
    assert "it does not begin with GGUF" in refused(b"PK\x03\x04" + whole[4:])
    assert "version 1;" in refused(container(version=1) + bytes(64))
    assert "big-endian" in refused(container(version=3 << 24) + bytes(64))


@pytest.mark.parametrize("count", HUGE)
def test_counts_of_keys_and_tensors(refused, count):
    assert "it claims" in refused(container(counts=(0, count)) + bytes(64))
    assert "it claims" in refused(container(counts=(count, 0)) + bytes(64))


@pytest.mark.parametrize("count", HUGE)
@pytest.mark.parametrize("kind", [0, 5, 8, 12])
def test_arrays_that_claim_to_be_huge(refused, count, kind):
    array = text("k") + struct.pack("<IIQ", 9, kind, count)
    assert "k claims" in refused(container(array) + bytes(64))


@pytest.mark.parametrize("length", HUGE)
def test_texts_that_claim_to_be_huge(refused, length):
    assert "a text of" in refused(container(struct.pack("<Q", length)) + bytes(64))
    value = text("k") + struct.pack("<IQ", 8, length)
    assert "a text of" in refused(container(value) + bytes(64))


def test_keys_that_are_none(refused):
    assert "the unknown type 99" in refused(
        container(text("k") + struct.pack("<I", 99)) + bytes(64)
    )
    nested = text("k") + struct.pack("<IIQ", 9, 9, 1) + struct.pack("<IQ", 9, 1)
    assert "an array of the type 9" in refused(container(nested) + bytes(64))
    assert "is not UTF-8" in refused(container(text(b"\xff\xfe") + bytes(64)))
    one = text("k") + struct.pack("<II", 4, 1)
    assert "the key k is there twice" in refused(container(one + one, counts=(0, 2)) + bytes(64))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shape": (2**62, 4)}, "x has the shape"),
        ({"shape": (2**63,)}, "x has the shape"),
        ({"shape": (2**32,)}, "x does not fit the file"),
        ({"offset": 2**62}, "x does not fit the file"),
        ({"offset": 7}, "x does not fit the file"),
        ({"dimensions": 2**32 - 1}, "x has 4294967295 dimensions"),
        ({"dimensions": 0}, "x has 0 dimensions"),
        ({"kind": 4_000}, "x has the unknown type 4000"),
        ({"kind": 28}, "x is F64, which this version of the package gguf cannot dequantise"),
        ({"kind": 12, "shape": (100,)}, "x: rows of 100, blocks of 256"),
        ({"name": "../" * 200}, "a text of 600 bytes"),
    ],
    ids=str,
)
def test_a_tensor_that_lies(refused, changes, message):
    assert message in refused(container(tensors=entry(**changes)) + bytes(256))


def test_tensors_that_share_their_numbers_or_their_name(refused):
    two = entry("a") + entry("b")
    assert "b overlaps a" in refused(container(tensors=two, counts=(2, 0)) + bytes(256))
    same = entry("a") + entry("a", offset=128)
    assert "the tensor a is there twice" in refused(
        container(tensors=same, counts=(2, 0)) + bytes(512)
    )


@pytest.mark.parametrize("value", [0, 3, 2**31])
def test_an_alignment_that_is_none(refused, value):
    key = text("general.alignment") + struct.pack("<II", 4, value)
    assert "is no power of two" in refused(container(key, entry()) + bytes(512))


def test_names_never_become_paths(tmp_path, refused, whole):
    name = b"blk.0.attn_norm.weight"
    assert whole.count(name) == 1
    told = refused(whole.replace(name, b"../../../../etc/passwd"))
    assert "1 unexpected: ../../../../etc/passwd" in told and "1 missing" in told
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gguf"]


def test_bytes_changed_at_random_are_refused_or_read(tmp_path, whole):
    """Nothing but a UserError comes out of a file, whatever its header says."""
    rng, path = random.Random(0), tmp_path / "a.gguf"
    header = whole.index(b"blk.0.attn_norm.weight") + 200
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(rng.randrange(1, 4)):
            data[rng.randrange(header)] = rng.randrange(256)
        path.write_bytes(data)
        try:
            with open_gguf(path) as found:
                read_pretrained(found)
        except UserError as error:
            assert "\n" not in str(error), bytes(data)


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(UserError, match="no such file"), open_gguf(path):
            pass


def test_where_the_package_is_missing_its_remedy_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[gguf\]'"), open_gguf(tmp_path / "a"):
        pass
