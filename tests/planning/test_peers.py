"""The protocol, with a peer that only sleeps; the real one is measured by hand."""

import sys

import pytest

from instruct_jax.errors import ConfigError
from instruct_jax.planning.peers import Case, Turn, cases, compare
from instruct_jax.planning.shapes import Models, Shape, synthetic_rows

ECHO = """
import json, pathlib, sys
spec = json.loads((pathlib.Path(sys.argv[1]) / "spec.json").read_text())
print(json.dumps({"peer": "echo", "versions": {}}), flush=True)
log = pathlib.Path(sys.argv[1]) / "turns"
for line in sys.stdin:
    with log.open("a") as file:
        file.write("peer ")
    print(json.dumps({"seconds": 2.0, "work": spec["work"]}), flush=True)
"""


def run(tmp_path, script: str, ours=lambda: Turn(1.0, 6.0)):
    path = tmp_path / "peer.py"
    path.write_text(script)
    case = Case("sft", ", padded", "tokens", ours, {"work": 3.0})
    return compare(case, python=sys.executable, script=path, folder=tmp_path, repeats=3)


def test_both_sides_take_turns_and_the_ratio_is_of_their_speeds(tmp_path):
    def ours() -> Turn:
        with (tmp_path / "turns").open("a") as log:
            log.write("ours ")
        return Turn(1.0, 6.0)

    result = run(tmp_path, ECHO, ours)
    assert (tmp_path / "turns").read_text() == "ours peer " * 4
    assert (result.ours, result.theirs, result.ratio) == (6.0, 1.5, 4.0)
    assert result.peer == "echo, padded"
    assert result.theirs_seconds == (2.0, 2.0, 2.0)


def test_a_peer_that_dies_is_told_with_its_last_words(tmp_path):
    with pytest.raises(ConfigError, match="no such model"):
        run(tmp_path, "import sys; sys.exit('no such model')")


def test_a_library_that_is_missing_is_told_with_the_remedy(tmp_path):
    script = 'import json; print(json.dumps({"error": "python3 has no torch; name another"}))'
    with pytest.raises(ConfigError, match=r"config\.peer_python: python3 has no torch"):
        run(tmp_path, script)


def test_an_interpreter_that_is_not_there_is_a_configuration_error(tmp_path):
    case = Case("sft", "", "tokens", lambda: Turn(1.0, 1.0), {})
    with pytest.raises(ConfigError, match="peer_python=/no/python"):
        compare(case, python="/no/python", script=tmp_path, folder=tmp_path, repeats=1)


def test_a_phase_that_the_peer_has_not_is_refused():
    shape = Shape(model="tiny", rows=2, minibatch=2)
    with pytest.raises(ConfigError, match="no 'engine'"):
        cases("engine", shape, synthetic_rows(shape), Models(None, None), None)
