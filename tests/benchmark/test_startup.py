"""Starts of a script that stands for a stage: the cache it is given, and where its seconds went."""

import json

import pytest

from instruct_jax.benchmark.startup import StartupConfig, account, make_inputs, measure_startup
from instruct_jax.cli import from_config
from instruct_jax.data.formats import read_comparisons
from instruct_jax.errors import ConfigError

# What is slow the first time: an empty cache. It ends by being killed, as a long run does.
SCRIPT = """
import json, os, pathlib, sys, time
stage, events, flags = sys.argv[1], sys.argv[2], sys.argv[3:]
workdir = pathlib.Path(next(f for f in flags if f.startswith("--workdir=")).partition("=")[2])
cache = pathlib.Path(os.environ["JAX_COMPILATION_CACHE_DIR"])
out = open(events, "w")
def note(name, seconds=0.0):
    print(json.dumps({"name": name, "seconds": seconds, "time": time.time()}), file=out, flush=True)
note("imported")
workdir.mkdir()
(workdir / "flags.json").write_text(json.dumps(flags))
line = {"event": "start", "name": stage, "step": 0, "lost": 0, "time": time.time()}
(workdir / "ledger.log").write_text(json.dumps(line) + chr(10))
slow = 0.1 if cache.exists() else 2.0
cache.mkdir(exist_ok=True)
time.sleep(slow)
note("/jax/core/compile/backend_compile_duration", slow)
with (workdir / f"{stage}.jsonl").open("w") as metrics:
    print(json.dumps({"step": 1, "time": time.time()}), file=metrics, flush=True)
time.sleep(600)
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def test_the_first_start_compiles_and_the_later_ones_read(tmp_path, script):
    result = measure_startup(
        "sft", StartupConfig(), tmp_path, script=script, mesh="data:1", repeats=3
    )
    assert result.first.compiling == 2.0 and result.second.compiling == 0.1
    assert result.first.programs == 1
    assert len(result.second_seconds) == 3
    assert result.second.seconds == sorted(result.second_seconds)[1]
    assert result.ratio == pytest.approx(result.second.seconds / result.first.seconds)
    assert result.ratio < 0.9
    for start in (result.first, result.second):
        parts = (start.imports, start.setup, start.tracing, start.compiling, start.step)
        assert min(parts) >= 0


def test_a_stage_is_started_with_its_preset_its_inputs_and_every_step_logged(tmp_path, script):
    config = StartupConfig(preset="debug")
    measure_startup("ppo", config, tmp_path, script=script, mesh="data:1", repeats=1)
    first, second = (
        json.loads((tmp_path / "ppo" / f"start{i}" / "flags.json").read_text()) for i in range(2)
    )
    for flag in (
        "--config=configs/ppo.py:debug",
        "--mesh=data:1",
        f"--config.init={tmp_path}/pretrain/model",
        f"--config.reward_model={tmp_path}/reward_model/model",
        "--config.ppo.log_every=1",
    ):
        assert flag in first
    # Another work directory, and nothing else.
    assert set(first) ^ set(second) == {f"--workdir={tmp_path}/ppo/start{i}" for i in range(2)}


def test_a_stage_that_ends_before_its_first_step_is_told_with_its_last_words(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("import sys; sys.exit('error: no such model')")
    with pytest.raises(ConfigError, match=r"sft ended before its first step: error: no such model"):
        measure_startup("sft", StartupConfig(), tmp_path, script=script, mesh="auto", repeats=1)


def test_the_parts_of_a_start():
    compile_event = "/jax/core/compile/backend_compile_duration"
    trace_event = "/jax/core/compile/jaxpr_trace_duration"
    lower_event = "/jax/core/compile/jaxpr_to_mlir_module_duration"
    events = [
        {"name": "imported", "seconds": 0.0, "time": 11.0},
        {"name": trace_event, "seconds": 0.5, "time": 12.0},
        {"name": compile_event, "seconds": 0.25, "time": 13.0},
        {"name": "/jax/compilation_cache/compile_time_saved_sec", "seconds": 9.0, "time": 13.0},
        {"name": lower_event, "seconds": 1.0, "time": 15.0},
        {"name": compile_event, "seconds": 2.0, "time": 17.0},
        {"name": compile_event, "seconds": 7.0, "time": 21.0},  # after the first step
    ]
    start = account(10.0, 14.0, 18.0, events)
    assert start.seconds == 8.0
    assert start.imports == 1.0
    assert start.setup == 3.0 - 0.75
    assert start.tracing == 1.5
    assert start.compiling == 2.25
    assert start.step == 4.0 - 3.0
    assert start.programs == 2


def test_the_inputs_are_rankings_and_models_of_the_stages_own_scripts(tmp_path):
    folder = tmp_path / "inputs"
    folder.mkdir()
    for stage in ("pretrain", "reward_model"):
        (tmp_path / f"{stage}.py").write_text(
            "import pathlib, sys; pathlib.Path(__file__).with_suffix('.flags')"
            ".write_text('\\n'.join(sys.argv[1:]))"
        )
    make_inputs(StartupConfig(), folder, script=tmp_path / "child.py", mesh="auto")
    rankings = list(read_comparisons(folder / "comparisons.jsonl"))
    assert len(rankings) > 3_000
    assert all(len(set(row.completions)) == len(row.ranks) > 1 for row in rankings)
    flags = (tmp_path / "reward_model.flags").read_text().splitlines()
    assert f"--config.init={folder}/pretrain/model" in flags
    assert f"--workdir={folder}/reward_model" in flags


def test_an_unknown_stage_is_a_configuration_error():
    with pytest.raises(ConfigError, match=r"stages\[0\]='rlhf': expected one of pretrain, sft"):
        from_config(StartupConfig, {"stages": ("rlhf",)})
