"""The published test vectors are those of the oracles, and the conformance table is complete."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

from instruct_jax import losses
from tests.fixtures.losses.reader import read
from tests.fixtures.losses.write_oracle import documents

jsonschema = pytest.importorskip("jsonschema")


@pytest.fixture(scope="module")
def folder(repository):
    return repository / "tests" / "fixtures" / "losses"


@pytest.fixture(scope="module")
def table(repository):
    return (repository / "instruct_jax" / "losses" / "CONFORMANCE.md").read_text()


def test_the_files_follow_the_schema(folder):
    schema = json.loads((folder / "schema.json").read_text())
    files = [path for path in folder.glob("*.json") if path.name != "schema.json"]
    assert len(files) > 10
    for path in files:
        document = json.loads(path.read_text())
        jsonschema.validate(document, schema)
        names = [vector["name"] for vector in document["vectors"]]
        assert len(names) == len(set(names))


def test_the_vectors_are_what_the_oracles_say_today(folder, tmp_path):
    for name, document in documents().items():
        (tmp_path / name).write_text(json.dumps(document))
        today, published = read(tmp_path / name), read(folder / name)
        assert [v.name for v in today] == [v.name for v in published]
        for new, old in zip(today, published, strict=True):
            assert new.hyper == old.hyper
            for a, b in zip(new.expected, old.expected, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14, err_msg=new.name)
            for argument in new.inputs:
                np.testing.assert_array_equal(new.inputs[argument], old.inputs[argument])
            for argument in new.gradients:
                a, b = new.gradients[argument], old.gradients[argument]
                np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8, err_msg=new.name)


def test_a_vector_is_a_call_as_the_reader_says(folder):
    for vector in read(folder / "reward.json")[:2]:
        arguments = [jnp.asarray(x, np.float32 if x.dtype == np.float64 else None)
                     for x in vector.arguments]  # fmt: skip
        result = getattr(losses, vector.function)(*arguments, **vector.keywords)
        np.testing.assert_allclose(result, vector.expected[0], rtol=1e-5)


def test_every_public_function_is_in_the_conformance_table(table):
    functions = {n for n in losses.__all__ if not isinstance(getattr(losses, n), type)}
    rows = set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE))
    assert rows == functions


def test_every_recorded_trl_loss_is_in_the_conformance_table(folder, table):
    for vector in read(folder / "trl.json"):
        assert f"`{vector.name}`" in table, vector.name
