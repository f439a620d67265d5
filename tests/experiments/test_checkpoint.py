"""experiments/checkpoint.py on the checkpoints of a real run."""

import importlib
import shutil
import subprocess
import sys

import pytest

from instruct_jax.errors import CheckpointError, ConfigError
from instruct_jax.stages.trained import load_adapter, load_trained
from instruct_jax.training.integrity import write_manifest
from instruct_jax.training.keeping import step_numbers
from tests.experiments import scripts
from tests.stages.lab import same_bits


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The workdir of an SFT run that saved every second step and kept the last two."""
    folder = tmp_path_factory.mktemp("checkpoints")
    rows = scripts.write_rows(folder / "data")
    init = scripts.write_model(folder / "init")
    scripts.launch(
        "sft", "--config=configs/sft.py:debug", f"--workdir={folder / 'run'}", "--mesh=data:2",
        "--config.data.source=files", f"--config.data.demonstrations={rows['demonstrations']}",
        f"--config.init={init}", "--config.sft.save_every=2", "--config.sft.pack_length=none",
        "--config.sft.prompt_length=24", "--config.sft.response_length=16",
        "--config.data.valid_fraction=0.3",
    )  # fmt: skip
    return folder / "run"


@pytest.fixture
def run(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "run")


def call(*arguments):
    importlib.import_module("experiments.checkpoint").main([str(a) for a in arguments])


def test_a_healthy_run_is_listed_and_verified(run, capsys):
    call("list", run)
    call("verify", run)
    text = capsys.readouterr().out
    for step in step_numbers(run / "checkpoints"):
        assert f"step {step}: intact" in text
    assert ("finished" in text and "MiB" in text) or "KiB" in text
    assert "done: goodput" in text, "R16"


def test_damage_ends_with_code_4_and_the_name_of_the_file(run, capsys):
    newest = run / "checkpoints" / str(step_numbers(run / "checkpoints")[-1])
    path = max(newest.rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    for arguments in (["verify", run], ["export", run, "--to", run / "x"]):
        with pytest.raises(SystemExit) as exit_:
            call(*arguments)
        assert exit_.value.code == 4
    out, err = capsys.readouterr()
    assert f"{path.name} was changed" in out
    assert err.count("\n") == 2 and path.name in err
    assert not (run / "x").exists()


def test_an_exported_step_is_the_model_that_the_run_wrote(run):
    call("export", run, "--to", run / "exported")
    exported, own = load_trained(run / "exported"), load_trained(run / "model")
    assert same_bits(exported.params, own.params)
    assert exported.config == own.config
    older = step_numbers(run / "checkpoints")[0]
    call("export", run, "--to", run / "older", "--step", older, "--like", run / "model")
    assert not same_bits(load_trained(run / "older").params, own.params)
    assert load_trained(run / "older").stage == f"sft at step {older}"


def test_pruning_keeps_the_pinned_step(run, capsys):
    first, *_, last = step_numbers(run / "checkpoints")
    assert first != last
    call("pin", run, "--step", first)
    call("prune", run, "--keep", 1)
    assert step_numbers(run / "checkpoints") == [first, last]
    call("pin", run, "--step", first, "--off")
    call("prune", run)
    assert step_numbers(run / "checkpoints") == [last]
    assert f"deleted: {first}" in capsys.readouterr().out


def test_verify_reads_the_arrays_and_the_models_beside_the_steps(run, repository):
    """A tree whose hashes are right and that cannot be read all the same is not intact."""

    def verify():
        return subprocess.run(
            [sys.executable, "experiments/checkpoint.py", "verify", str(run)],
            cwd=repository,
            env=scripts.environment(repository),
            capture_output=True,
            text=True,
        )

    whole = verify()
    assert whole.returncode == 0 and "model: intact" in whole.stdout and not whole.stderr
    params = run / "model" / "params"
    for path in params.rglob("manifest.ocdbt"):
        path.unlink()
    write_manifest(params)
    broken = verify()
    assert broken.returncode == 4, broken.stderr
    assert "model: " in broken.stdout and "model: intact" not in broken.stdout
    assert broken.stderr.endswith(f"error: {run}: damaged: model\n")
    assert "Traceback" not in broken.stderr


def test_a_folder_that_cannot_be_read_under_its_name_says_so(run, capsys):
    """Nor is a model under such a name: not damaged, but to be moved."""
    moved = run.rename(run.with_name("a[b]"))
    with pytest.raises(ConfigError, match=r"'\[b\]' in its name; move it"):
        load_trained(moved / "model")
    with pytest.raises(SystemExit):
        call("verify", moved)
    assert "in its name; move it" in capsys.readouterr().out


def test_a_model_or_adapter_whose_notes_are_spoilt_is_one_line_of_code_4(run, tmp_path):
    about = (run / "model" / "model.json").read_text()
    for text in (
        "",
        "[]",
        "3",
        "\x00",
        about[:40],
        "{}",
        '{"kind": "x", "config": {}, "stage": "s"}',
    ):
        (run / "model" / "model.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"model\.json"):
            load_trained(run / "model")
    for text in (
        "",
        "[]",
        "{}",
        '{"lora": [], "base": "x"}',
        '{"lora": {"targets": 3}, "base": 1}',
    ):
        (tmp_path / "adapter.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"adapter\.json"):
            load_adapter(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["list"], 4, "no checkpoints here"),
        (["export", "--to", "x", "--step", "1"], 4, "no checkpoints here"),
        (["prune", "--keep", "0"], 2, "--keep=0: expected 1 or more"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, arguments, code, message):
    with pytest.raises(SystemExit) as exit_:
        call(arguments[0], tmp_path, *arguments[1:])
    assert exit_.value.code == code
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
