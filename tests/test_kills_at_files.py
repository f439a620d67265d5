"""R22: a program killed at any change that it makes to its directory ends, run again, with what one
that was never killed has left: every file and array, samples included.

Compared is all but what depends on the machine or the hour (programs/server.py: VOLATILE), the
ledger, which tells of the kill, TensorBoard's files, named by time, and the folder in
which a step is set aside that was killed between its last byte and its manifest.
"""

import shutil

import numpy as np
import pytest

from tests.programs.client import Programs

# In every run of the suite: the cheapest of them, and a stage.
QUICK = {"prepare": 2, "corpus": 4, "arithmetic": 2, "pretrain": 2, "to_hf": 3}
EACH = 13  # of each of the others too, under the slow marker: 182 in all


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    with Programs(tmp_path_factory.mktemp("kills")) as started:
        yield started


def killed_and_run_again(programs, name, kills):
    """What is wrong after kills at so many places, evenly apart; the place of each is printed."""
    missing = [other for other in programs.commands if other not in programs.events]
    needed = list(programs.commands).index(name) + 1
    programs.finish(*[other for other in list(programs.commands)[:needed] if other in missing])
    expected, wrong = programs.state(name), []
    folder = programs.folder / name
    for place in np.linspace(1, programs.events[name], kills).round().astype(int).tolist():
        shutil.rmtree(folder)
        code, text = programs.run(*programs.commands[name], below=folder, kill_at=place)
        if code != -9:
            wrong.append((place, "not killed", code, text[-300:]))
        code, text = programs.run(*programs.commands[name])
        if code:
            wrong.append((place, "the second run", code, text[-300:]))
            continue
        found = programs.state(name)
        if found != expected:
            paths = sorted(p for p in found | expected if found.get(p) != expected.get(p))
            wrong.append((place, paths[:5]))
        elif "Traceback" in text:
            wrong.append((place, text[-300:]))
    return wrong


@pytest.mark.parametrize("name", QUICK)
def test_killed_at_a_change_of_a_file_a_program_ends_as_if_it_had_not_been(programs, name):
    assert not killed_and_run_again(programs, name, QUICK[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "prepare", "corpus", "arithmetic", "pretrain", "sft", "lora", "reward_model", "ppo",
        "preference", "select_sft", "evaluate", "collect", "to_hf", "from_hf",
    ],
)  # fmt: skip
def test_every_program_killed_thirteen_times_ends_as_if_it_had_not_been(programs, name):
    assert not killed_and_run_again(programs, name, EACH)
