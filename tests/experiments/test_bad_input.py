"""What is wrong with a command or its data is told in one line; nothing is written."""

import json
import resource
import subprocess
import sys

import pytest

from tests.experiments import scripts

SFT = ("--config=configs/sft.py:debug", "--config.data.source=files")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model folder and files of rows that are all right."""
    folder = tmp_path_factory.mktemp("inputs")
    paths = scripts.write_rows(folder)
    scripts.write_model(folder / "model")
    return folder, paths


@pytest.fixture(scope="module")
def reward_folder(inputs):
    """A reward model of the same tokenizer."""
    return scripts.write_reward_model(inputs[0] / "reward", inputs[0] / "model")


def sft_arguments(inputs, workdir):
    folder, paths = inputs
    return [
        *SFT,
        f"--config.init={folder / 'model'}",
        f"--config.data.demonstrations={paths['demonstrations']}",
        f"--workdir={workdir}",
    ]


def malformed(folder, **row):
    """A file whose third line is `row`."""
    path = folder / "malformed.jsonl"
    lines = [json.dumps({"prompt": "a", "response": "b"})] * 2
    path.write_text("\n".join([*lines, row.get("text") or json.dumps(row)]) + "\n")
    return path


def refused(capsys, script, *argv):
    """The one line that `script` ends with, exit code 2."""
    with pytest.raises(SystemExit) as stop:
        scripts.launch(script, *argv)
    assert stop.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("error: "), err
    return err


def test_a_missing_file_is_named(tmp_path, capsys, inputs):
    workdir, missing = tmp_path / "run", tmp_path / "no_such.jsonl"
    arguments = [*sft_arguments(inputs, workdir), f"--config.data.demonstrations={missing}"]
    assert str(missing) in refused(capsys, "sft", *arguments)
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "response": 3}, "response"),
        ({"prompt": "a"}, "expected demonstrations"),
        ({"text": '{"prompt": "a", "resp'}, "JSON"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, capsys, inputs, row, reason):
    workdir, path = tmp_path / "run", malformed(tmp_path, **row)
    arguments = [*sft_arguments(inputs, workdir), f"--config.data.demonstrations={path}"]
    line = refused(capsys, "sft", *arguments)
    assert f"{path}:3" in line and reason in line
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("script", "override", "reason"),
    [
        ("sft", "--config.init={tmp}/nowhere", "nowhere: no such folder"),
        (
            "sft",
            "--config.data.source=flies",
            "config.data.source=flies: expected one of toyworld, files",
        ),
        ("sft", "--mesh=data:9", "needs 9 devices"),
        ("pretrain", "--config.model.preset=minni", "did you mean mini"),
        ("pretrain", "--config.tokenizer={tmp}/nowhere", "no such file or folder"),
        ("ppo", "--config.ppo.rollout_batch=12", "not a multiple of minibatch 8"),
        ("ppo", "--config.reward_model={inputs}/model", "a scalar model is needed"),
        ("reward_model", "--config.data.comparisons={tmp}/none.jsonl", "none.jsonl"),
        ("reward_model", "--config.data.comparisons=", "data.comparisons is empty"),
        ("select_sft", "--config.epochs={tmp}", "no epochs here"),
        ("evaluate", "--config.baseline=m1", "baseline 'm1' is none of the models ['sft']"),
        ("collect", "--config.data.source=files", "must be 'toyworld'"),
    ],
)
def test_other_mistakes_are_told_by_every_script(
    tmp_path, capsys, inputs, script, override, reason
):
    workdir, model = tmp_path / "run", inputs[0] / "model"
    start = {
        "pretrain": [],
        "evaluate": [f"--config.models=('sft={model}',)"],
        "collect": [f"--config.policy={model}"],
        "select_sft": [],
    }.get(script, [f"--config.init={model}"])
    arguments = [f"--config=configs/{script}.py:debug", f"--workdir={workdir}", *start]
    line = refused(capsys, script, *arguments, override.format(tmp=tmp_path, inputs=inputs[0]))
    assert reason in line
    assert not workdir.exists()


def test_a_policy_and_a_reward_model_of_two_tokenizers_are_refused(tmp_path, capsys, inputs):
    folder, _ = inputs
    other = scripts.write_model(tmp_path / "other", reads=scripts.tokenizer(["xyz", "pqr"]))
    scripts.write_reward_model(other, other)
    line = refused(
        capsys,
        "ppo",
        "--config=configs/ppo.py:debug",
        f"--config.init={folder / 'model'}",
        f"--config.reward_model={other}",
        f"--workdir={tmp_path / 'run'}",
    )
    assert "different tokenizers" in line
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_not_written_over(tmp_path, capsys, inputs):
    """Another configuration in its directory is refused, and every file stays."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    record = {"schema": "instruct_jax.run/1", "config": {"init": "other"}}
    (workdir / "config.json").write_text(json.dumps(record))
    line = refused(capsys, "sft", *sft_arguments(inputs, workdir))
    assert "holds a run with another configuration" in line
    assert [path.name for path in workdir.iterdir()] == ["config.json"]


MISTAKES = {
    "wrong type": "--config.sft.learning_rate=fast",
    "out of range": "--host_devices=0",
    "missing model": "--config.init={folder}/nowhere",
    "missing file": "--config.data.demonstrations={folder}/nowhere.jsonl",
    "malformed row": "--config.data.demonstrations={folder}/malformed.jsonl",
    "unfit mesh": "--config.sft.batch_size=7",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_process_ends_within_two_seconds_with_one_line_and_code_2(
    tmp_path, inputs, repository, mistake
):
    """R12: through the shell: no traceback, no log before it, an empty stdout; the time is the
    processors', and of the faster of up to three runs, since the machine may be busy.
    """
    workdir = tmp_path / "run"
    malformed(tmp_path, prompt="a")
    arguments = [*sft_arguments(inputs, workdir), "--host_devices=2", "--mesh=data:2"]
    command = [
        sys.executable,
        str(repository / "experiments" / "sft.py"),
        *arguments,
        MISTAKES[mistake].format(folder=tmp_path),
    ]
    for _ in range(3):
        before = children_seconds()
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env=scripts.environment(repository),
            capture_output=True,
            text=True,
        )
        seconds = children_seconds() - before
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
        assert not workdir.exists()
        if seconds < 2:
            return
    pytest.fail(f"{seconds:.2f} s in the last of three runs")


def children_seconds() -> float:
    """Processor seconds of all processes that this one has waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@pytest.mark.parametrize(
    ("script", "arguments", "field"),
    [
        ("pretrain", ["--config.model.max_length=32"], "config.pretrain.length"),
        ("sft", ["--config.sft.response_length=100"], "config.sft.prompt_length + response_len"),
        ("sft", ["--config.sft.pack_length=200", "--config.sft.pretrain_fraction=0.5"],
         "config.sft.pack_length"),
        ("reward_model", ["--config.reward_model.prompt_length=120"], "config.reward_model.prompt"),
        ("preference", ["--config.preference.prompt_length=120"], "config.preference.prompt_leng"),
        ("ppo", ["--config.ppo.response_length=120"], "config.ppo.prompt_length + response_length"),
        ("ppo", ["--config.ptx_length=200"], "config.ptx_length"),
        ("collect", ["--config.prompt_length=120"], "config.prompt_length + response_length"),
        ("evaluate", ["--config.document_length=200"], "config.document_length"),
        ("evaluate", ["--config.response_length=100"], "config.prompt_length + response_length"),
        ("compress", ["--config.document_length=200"], "config.document_length"),
        ("select_sft", ["--config.response_length=100"], "config.prompt_length + response_length"),
    ],
)  # fmt: skip
def test_a_length_past_the_model_s_positions_is_refused_before_anything_is_computed(
    tmp_path, capsys, inputs, reward_folder, script, arguments, field
):
    workdir, model = tmp_path / "run", inputs[0] / "model"
    start = {
        "pretrain": [],
        "ppo": [f"--config.init={model}", f"--config.reward_model={reward_folder}"],
        "evaluate": [f"--config.models=('sft={model}',)"],
        "collect": [f"--config.policy={model}"],
        "compress": [f"--config.model={model}"],
        "select_sft": [f"--config.epochs={model.parent}", f"--config.reward_model={reward_folder}"],
    }.get(script, [f"--config.init={model}"])
    if script == "select_sft":
        (tmp_path / "epochs").mkdir()
        (tmp_path / "epochs" / "1").symlink_to(model)
        start[0] = f"--config.epochs={tmp_path / 'epochs'}"
    arguments = [f"--config=configs/{script}.py:debug", f"--workdir={workdir}", *start, *arguments]
    line = refused(capsys, script, *arguments)
    assert field in line and "(its max_length)" in line
    assert not workdir.exists()


@pytest.mark.parametrize("script", ["benchmark_peers", "benchmark_startup", "benchmark_tunix"])
def test_a_script_that_another_starts_has_help(script, repository):
    command = [sys.executable, str(repository / f"experiments/{script}.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == "" and "usage:" in done.stdout


def test_presets_of_another_script_are_told_by_their_own(capsys):
    with pytest.raises(SystemExit) as end:
        scripts.launch("sft", "--config=configs/ppo.py:files")
    assert end.value.code == 2
    assert "(configs/ppo.py is for experiments/ppo.py)" in capsys.readouterr().err
