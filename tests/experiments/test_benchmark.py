"""The benchmark as a user runs it: the record, the tables, and the mistakes."""

import importlib
import json
import os
from importlib.util import find_spec

import pytest

from experiments import benchmark
from instruct_jax import cli
from instruct_jax.benchmark import peers, rows, shapes, startup
from instruct_jax.benchmark.workloads import PHASES
from instruct_jax.cli import replacing
from instruct_jax.stages.stage import check_warmup

DEBUG = "--config=configs/benchmark.py:debug"
NUMBERS = (
    "seconds", "compile_seconds", "tokens_per_second", "sequences_per_second", "mfu", "mbu",
    "limit_seconds", "roofline", "real_tokens", "padded_tokens", "flops", "bytes",
)  # fmt: skip


def run(workdir, *extra):
    argv = [DEBUG, f"--workdir={workdir}", "--mesh=data:1", *extra]
    cli.run(benchmark.main, benchmark.Config, default=DEBUG, argv=argv, writes=benchmark.WRITES)
    return json.loads((workdir / "benchmark.json").read_text())


def only_strangers_are_left(workdir):
    """R19: every file of a run is known as its own, and no other one in its folders is."""
    # Arrays whose save was killed are known by their folders: no manifest names the files.
    made = [path for path in workdir.rglob("*") if path.is_dir() and path.name != "d"]
    for folder in made:
        (folder / "notes.txt").write_text("mine")
    replacing.delete(workdir, benchmark.WRITES)
    left = [path for path in workdir.rglob("*") if not path.is_dir()]
    assert set(left) == {folder / "notes.txt" for folder in made}


def check(report, workdir, phases):
    rows = report["phases"]
    assert [row["phase"] for row in rows] == list(phases)
    for row in rows:
        assert all(row[name] > 0 for name in NUMBERS), row
        assert row["real_tokens"] <= row["padded_tokens"]
        assert len(row["runs"]) == 2
    assert report["environment"]["device"] == "cpu"
    assert report["environment"]["versions"]["jax"]
    assert report["machine"]["flops"]["float32"] > 1e8
    table = (workdir / "benchmark.md").read_text()
    assert all(f"| {phase} |" in table for phase in phases)
    assert (workdir / "roofline.png").read_bytes()[:4] == b"\x89PNG"


def test_a_run_leaves_figures_a_table_a_picture_and_a_trace(tmp_path):
    phases = ("reward_model", "rollout")
    report = run(tmp_path, f"--config.phases={phases}", "--config.profile=True")
    check(report, tmp_path, phases)
    assert report["phases"][0]["memory"]["peak"] > 0
    assert report["phases"][1]["occupancy"] == 1.0
    assert list((tmp_path / "profile" / "rollout").rglob("*.xplane.pb"))
    only_strangers_are_left(tmp_path)


def test_a_sweep_has_every_point_and_its_picture(tmp_path):
    sweep = "--config.sweep=(('rows',(2,4)),)"
    report = run(tmp_path, sweep, "--config.phases=('rollout',)", "--config.repeats=1")
    assert [(row["field"], row["value"]) for row in report["sweep"]] == [("rows", 2), ("rows", 4)]
    few, many = report["sweep"]
    assert many["flops"] == pytest.approx(2 * few["flops"])
    assert (tmp_path / "sweep.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
def test_every_phase_is_measured(tmp_path):
    check(run(tmp_path), tmp_path, PHASES)


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--config.phases=('rolout',)", "no phase 'rolout'"),
        ("--config.sweep=(('rose',(1,)),)", "no field 'rose'"),
        ("--config.shape.model=small_", "config.shape"),
        ("--config.tokenizer=tokenizer.json", "both config.data and config.tokenizer"),
        ("--config.startup.stages=('rlhf',)", "stages[0]='rlhf': expected one of pretrain, sft"),
    ],
)
def test_a_mistake_is_told_in_one_line(tmp_path, capsys, flag, words):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "run", flag)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert words in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "field"),
    [
        (["--config.startup.preset=debug", "--config.profile=True"], "profile"),
        (["--config.startup.preset=debug", "--config.phases=('sft',)"], "phases"),
        (["--config.startup.preset=debug", "--config.shape.rows=8"], "shape.rows"),
        (["--config.peer=trl", "--config.phases=rollout", "--config.profile=True"], "profile"),
        (["--config.peer=trl", "--config.phases=rollout", "--config.sweep=(('rows',(2,)),)"],
         "sweep"),
    ],
)  # fmt: skip
def test_a_field_that_cannot_act_is_refused(tmp_path, capsys, flags, field):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "run", *flags)
    assert stop.value.code == 2
    assert f"config.{field} has no effect" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("mesh", "flags", "words"),
    [
        ("data:2", ["--config.peer=trl", "--config.phases=sft", "--config.shape.pack_length=24"],
         "sft: a batch of 3 rows cannot be divided over mesh data:2"),
        ("data:3", ["--config.phases=pretrain"], "(by config.shape.text_rows)"),
        ("data:3", ["--config.phases=reward_model"], "(by config.shape.ranked)"),
        ("data:3", ["--config.phases=rollout"], "rollout: a batch of 4 rows cannot be divided"),
        ("data:4", ["--config.sweep=(('rows',(8,10)),)", "--config.phases=rollout"],
         "rollout: a batch of 10 rows"),
        ("data:1", ["--config.peer=trl", "--config.phases=score"], "the peer has no 'score'"),
    ],
)  # fmt: skip
def test_rows_that_the_mesh_cannot_divide_are_told_before_anything_is_measured(
    tmp_path, capsys, monkeypatch, mesh, flags, words
):
    monkeypatch.setattr(benchmark, "measure_machine", None)  # which takes seconds
    rows = ["--config.shape.rows=3", "--config.shape.minibatch=3"] if "sft" in words else []
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "run", f"--mesh={mesh}", *rows, *flags)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert words in message and len(message.splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(find_spec("torch") is not None, reason="torch is installed here")
def test_a_peer_that_is_not_installed_is_told_with_the_remedy(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "run", "--config.peer=trl", "--config.phases=('rollout',)")
    assert stop.value.code == 2
    assert "has no torch; name an interpreter" in capsys.readouterr().err


@pytest.mark.slow
def test_the_second_start_reads_what_the_first_compiled(tmp_path):
    report = run(
        tmp_path,
        "--config.startup.preset=debug",
        "--config.startup.stages=('pretrain','reward_model')",
        "--config.repeats=1",
    )
    rows = report["startup"]
    assert [row["stage"] for row in rows] == ["pretrain", "reward_model"]
    for row in rows:
        assert row["second"]["programs"] == row["first"]["programs"] > 10
        assert row["second"]["compiling"] < row["first"]["compiling"] / 3
        assert row["ratio"] < 1
    table = (tmp_path / "benchmark.md").read_text()
    assert "| reward_model | full |" in table
    assert report["environment"]["device"] == "cpu"
    only_strangers_are_left(tmp_path)


def test_what_is_written_for_a_peer_and_nothing_else_is_written_anew(tmp_path):
    shape = shapes.Shape(model="tiny", num_layers=1, rows=2, minibatch=2, prompt=4, response=4)
    rows_, models = rows.synthetic_rows(shape), shapes.random_models(shape)
    (tmp_path / "config.json").write_text("{}")
    for _ in range(2):
        folder = benchmark.empty_folder(cli.Run(tmp_path), benchmark.PEER)
        library = peers.LIBRARIES["trl"]
        peers.write_inputs(folder, library, shape, rows_, models, None)
    assert (tmp_path / "config.json").exists()
    only_strangers_are_left(tmp_path)


def test_starts_begin_with_empty_caches_and_a_user_s_files_stay(tmp_path):
    for name in ("cache/jit_step-cafe-cache", "sft/cache/jit_step-cafe-atime", "sft/start1.events",
                 "sft/start1/ledger.log", "pretrain/model/model.json", "pretrain/start0.log",
                 "pretrain/tokens/train-0123456789ab/plan.json", "pretrain.log"):  # fmt: skip
        path = tmp_path / benchmark.STARTUP / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    mine = tmp_path / benchmark.STARTUP / "mine" / "config.json"
    mine.parent.mkdir()
    mine.write_text("{}")
    folder = benchmark.empty_folder(cli.Run(tmp_path), benchmark.STARTUP)
    assert [path for path in folder.rglob("*") if path.is_file()] == [mine]


@pytest.mark.parametrize("preset", ["debug", "toyworld"])
def test_the_scripts_of_the_stages_take_what_they_are_started_with(tmp_path, preset):
    """Without running them: every field acts, and one update is enough for an input."""
    config = startup.StartupConfig(preset=preset)

    def found(stage, flags):
        rest, overrides = cli.split_overrides(flags(stage, config, tmp_path, mesh="data:1"))
        script = importlib.import_module(f"experiments.{stage}")
        return cli.resolve(script.Config, cli.load_config(rest[0].partition("=")[2]), overrides)

    for stage in config.stages:
        found(stage, startup.start_flags)
    for stage in startup.INPUTS:
        check_warmup(getattr(found(stage, startup.input_flags), stage), steps=1)


@pytest.mark.slow
def test_every_peer_phase_has_a_ratio(tmp_path):
    """Needs an interpreter with TRL 1.12, torch and transformers: INSTRUCT_JAX_PEER_PYTHON."""
    python = os.environ.get("INSTRUCT_JAX_PEER_PYTHON")
    if python is None:
        pytest.skip("INSTRUCT_JAX_PEER_PYTHON names no interpreter with TRL")
    phases = ("rollout", "sft", "reward_model", "iteration")
    report = run(
        tmp_path,
        f"--config.phases={phases}",
        "--config.peer=trl",
        f"--config.peer_python={python}",
    )
    rows = report["peers"]
    assert [row["phase"] for row in rows] == ["rollout", "sft", "sft", "reward_model", "iteration"]
    assert all(row["ratio"] == pytest.approx(row["ours"] / row["theirs"]) for row in rows)
    assert all(row["versions"]["torch"] for row in rows)
