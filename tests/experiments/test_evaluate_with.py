"""--config.evaluate_with and best_metric through the scripts: logged, kept, listed, refused."""

import json
import shutil
import sys

import pytest

from instruct_jax.stages.trained import load_trained
from instruct_jax.training.keeping import best_step
from tests.experiments import scripts
from tests.experiments.test_checkpoint import call
from tests.stages.lab import same_bits

OWN = """
import jax

def size(run):
    '''Falls, then rises.'''
    answers = run.generate(["a b c"], max_new_tokens=2)
    assert len(answers) == 1
    return {"off": abs(run.step - 3), "leaves": len(jax.tree.leaves(run.params))}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate_with")
    scripts.write_rows(folder / "data")
    scripts.write_model(folder / "init")
    (folder / "own.py").write_text(OWN)
    return folder


def sft(folder, workdir, *more):
    scripts.launch(
        "sft", "--config=configs/sft.py:debug", f"--workdir={workdir}", "--mesh=data:1",
        "--config.data.source=files", "--config.sft.pack_length=none",
        f"--config.data.demonstrations={folder / 'data' / 'demonstrations.jsonl'}",
        f"--config.init={folder / 'init'}", "--config.sft.eval_every=1", "--config.sft.epochs=1",
        "--config.sft.prompt_length=24", "--config.sft.response_length=16",
        "--config.sft.batch_size=8", "--config.sft.optimizer=muon",
        f"--config.evaluate_with={folder / 'own.py'}:size", *more,
    )  # fmt: skip


def lines(workdir):
    return [json.loads(line) for line in (workdir / "sft.jsonl").read_text().splitlines()]


def test_the_users_numbers_are_logged_and_the_best_of_them_is_kept(folder, tmp_path, capsys):
    run = tmp_path / "run"
    sft(folder, run, "--config.sft.best_metric=size/off")
    found = {row["step"]: row["size/off"] for row in lines(run) if "size/off" in row}
    assert found == {step: abs(step - 3) for step in range(1, max(found) + 1)} and max(found) > 4
    assert f"best model: {run / 'best'} (size/off 0 at step 3)" in capsys.readouterr().out
    assert best_step(run / "checkpoints").step == 3
    call("list", run)
    assert ", the best (size/off 0)" in capsys.readouterr().out
    call("export", run, "--to", run / "third", "--step", 3)
    best, last = load_trained(run / "best"), load_trained(run / "model")
    assert same_bits(best.params, load_trained(run / "third").params)
    assert not same_bits(best.params, last.params) and best.stage == "sft"
    shutil.rmtree(run / "third")
    call("verify", run)


@pytest.mark.parametrize(
    ("name", "told"),
    [("own.py:sise", "no function 'sise' here; there are size"), ("own.pi:size", "no such file")],
)
def test_a_wrong_file_or_name_ends_with_code_2_and_leaves_nothing(
    folder, tmp_path, capsys, name, told
):
    with pytest.raises(SystemExit) as error:
        sft(folder, tmp_path / "run", f"--config.evaluate_with={folder / name}")
    assert error.value.code == 2
    err = capsys.readouterr().err.splitlines()
    assert told in err[-1] and err[-1].startswith("error: evaluate_with: ")
    assert not (tmp_path / "run").exists()


def test_one_that_raises_ends_with_code_3_and_is_made_again(folder, tmp_path, capsys):
    own = tmp_path / "later.py"
    own.write_text("def later(run):\n    return 1 / (run.step - 2)\n")
    with pytest.raises(SystemExit) as error:
        sft(folder, tmp_path / "run", f"--config.evaluate_with={own}:later")
    assert error.value.code == 3
    assert "evaluate_with later: step 2: ZeroDivisionError" in capsys.readouterr().err
    own.write_text("def later(run):\n    return run.step\n")
    sys.modules.pop("users_later", None)
    sft(folder, tmp_path / "run", f"--config.evaluate_with={own}:later")
    found = [row["step"] for row in lines(tmp_path / "run") if "later" in row]
    assert found == list(range(1, found[-1] + 1))
