"""The protocol, with a peer that only sleeps; the real one is measured by hand."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from instruct_jax.benchmark.peers import (
    LIBRARIES,
    Case,
    Turn,
    cases,
    compare,
    write_inputs,
)
from instruct_jax.benchmark.rows import synthetic_rows
from instruct_jax.benchmark.shapes import Models, Shape, random_models
from instruct_jax.errors import ConfigError, UserError

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
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


@pytest.mark.parametrize(("peer", "phase"), [("trl", "engine"), ("tunix", "rollout")])
def test_a_phase_that_the_peer_has_not_is_refused(peer, phase):
    shape = Shape(model="tiny", rows=2, minibatch=2)
    rows, models = synthetic_rows(shape), Models(None, None)
    with pytest.raises(ConfigError, match=f"no '{phase}'"):
        cases(phase, LIBRARIES[peer], shape, rows, models, None)


@pytest.mark.parametrize(("peer", "model"), [("trl", "tiny"), ("tunix", "small-qwen2")])
def test_a_peer_is_given_the_weights_in_the_family_that_it_reads(tmp_path, peer, model):
    shape = Shape(model=model, num_layers=1, rows=2, minibatch=2, prompt=4, response=4)
    rows, models, library = synthetic_rows(shape), random_models(shape), LIBRARIES[peer]
    write_inputs(tmp_path, library, shape, rows, models, None)
    sizes = json.loads((tmp_path / "model" / "config.json").read_text())
    assert sizes["model_type"] == library.family
    with np.load(tmp_path / "rows.npz") as archive:
        np.testing.assert_array_equal(archive["prompts"], rows.prompts["tokens"])


def test_a_model_of_another_family_is_refused(tmp_path):
    shape = Shape(model="tiny", rows=2, minibatch=2)
    rows, models = synthetic_rows(shape), random_models(shape)
    with pytest.raises(UserError, match="qwen2"):
        write_inputs(tmp_path, LIBRARIES["tunix"], shape, rows, models, None)


@pytest.mark.parametrize("library", LIBRARIES.values(), ids=LIBRARIES)
def test_a_script_tells_which_library_its_interpreter_has_not(tmp_path, library):
    """The script itself, in an interpreter whose torch and tunix cannot be imported."""
    blocked = tmp_path / "blocked"
    for module in ("torch", "tunix"):
        (blocked / module).mkdir(parents=True)
        (blocked / module / "__init__.py").write_text(f"raise ImportError(name={module!r})")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={blocked} exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    case = Case("iteration", "", "episodes", lambda: Turn(1.0, 1.0), {"phase": "iteration"})
    with pytest.raises(ConfigError, match=r"has no (torch|tunix); name an interpreter with"):
        compare(
            case,
            python=str(python),
            script=EXPERIMENTS / library.script,
            folder=tmp_path,
            repeats=1,
        )


TUNIX = """
import numpy as np
from pathlib import Path
import sys
sys.path.insert(0, {experiments!r})
from benchmark_peers import serve

def work(folder, spec, rows, turns):
    def batches():
        turns.begin()
        while True:
            yield rows["prompts"][: spec["rows"]]
            turns.end(spec["rows"])
    for batch in batches():  # as Tunix's learner asks for them
        assert len(batch) == spec["rows"]

serve(Path(sys.argv[1]), {{"numpy": "numpy"}}, lambda spec, _: "fake " + spec["phase"], work)
"""


def test_a_turn_is_from_one_batch_to_the_next(tmp_path):
    """The protocol of both scripts, with a learner that only asks for batches."""
    np.savez(tmp_path / "rows.npz", prompts=np.zeros((4, 2), np.int32))
    path = tmp_path / "peer.py"
    path.write_text(TUNIX.format(experiments=str(EXPERIMENTS)))
    spec = {"phase": "iteration", "rows": 3}
    case = Case("iteration", "", "episodes", lambda: Turn(1.0, 3.0), spec)
    result = compare(case, python=sys.executable, script=path, folder=tmp_path, repeats=2)
    assert result.peer == "fake iteration"
    assert result.versions == {"numpy": np.__version__}
    assert len(result.theirs_seconds) == 2
    assert result.theirs == pytest.approx(
        np.median([3 / seconds for seconds in result.theirs_seconds])
    )
