import dataclasses
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from instruct_jax import cli
from instruct_jax.cli import Run, from_config
from instruct_jax.cli.config import load_config, resolve
from instruct_jax.cli.help import field_help
from instruct_jax.errors import CheckpointError, ConfigError, NonFiniteError, UserError
from instruct_jax.files import read_object
from instruct_jax.settings import NEVER, Settings, setting

CONFIGS = """
from ml_collections import ConfigDict

PRESETS = ("tiny", "large")

def get_config(name="tiny"):
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}; it has {', '.join(PRESETS)}")
    return ConfigDict({"steps": 10, "adam": {"learning_rate": 1e-3}})
"""


@dataclass(frozen=True)
class Adam:
    learning_rate: float
    clip: float | None = 1.0
    kind: Literal["torch", "tf"] = "torch"


@dataclass(frozen=True)
class Config:
    """A run."""

    steps: int
    adam: Adam
    name: str = "x"
    flag: bool = False
    files: tuple[str, ...] = ()
    shape: tuple[int, float] = (1, 2.0)
    limit: int | None = None
    extra: Adam | None = None
    mixed: int | str = 0

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps is {self.steps}, expected 1 or more")


BASE = {"steps": 10, "adam": {"learning_rate": 0.1}}


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "presets.py"
    path.write_text(CONFIGS)
    return path


@pytest.fixture
def launch(tmp_path, config_file):
    """Runs a command line in this process; returns what main was called with."""

    def launch(*argv, main=None):
        calls = []

        def record(config, run):
            calls.append((config, run))
            if main is not None:
                main(config, run)

        argv = [f"--workdir={tmp_path / 'runs' / 'a'}", *argv]
        cli.run(record, Config, default=str(config_file), argv=argv, writes=("log",))
        return calls[0]

    return launch


def test_nested_values_become_nested_frozen_dataclasses():
    config = from_config(Config, ConfigDict(BASE | {"files": ("a", "b"), "shape": [3, 4]}))
    assert config == Config(10, Adam(0.1), files=("a", "b"), shape=(3, 4.0))
    assert type(config.shape[1]) is float
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 3
    assert from_config(Config, ConfigDict(BASE | {"limit": placeholder(int)})).limit is None
    assert from_config(Config, BASE | {"extra": {"learning_rate": 1}}).extra == Adam(1.0)
    assert (
        type(from_config(Config, BASE | {"adam": {"learning_rate": 1}}).adam.learning_rate) is float
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (BASE | {"stpes": 1}, "unknown key config.stpes; did you mean steps?"),
        (
            BASE | {"adam": {"learning_rat": 1.0}},
            "config.adam.learning_rat; did you mean learning_rate?",
        ),
        (BASE | {"zzz": 1}, "unknown key config.zzz; there are adam, extra, files"),
        ({"steps": 1}, "config.adam has no value"),
        (BASE | {"steps": 1.5}, "config.steps=1.5: expected int"),
        (BASE | {"steps": True}, "config.steps=True: expected int"),
        (BASE | {"steps": "3"}, "config.steps='3': expected int"),
        (BASE | {"flag": 1}, "config.flag=1: expected bool"),
        (BASE | {"name": None}, "config.name=None: expected str"),
        (BASE | {"limit": "many"}, "config.limit=many: expected int | None"),
        (BASE | {"files": ["a", 3]}, "config.files[1]=3: expected str"),
        (BASE | {"files": "a"}, "config.files='a': expected tuple of str"),
        (BASE | {"shape": (1, 2.0, 3)}, "config.shape: expected 2 values, got 3"),
        (BASE | {"adam": 3}, "config.adam=3: expected Adam"),
        (BASE | {"extra": {"learning_rate": 1, "clp": 1}}, "config.extra.clp; did you mean clip?"),
        (BASE | {"adam": {"learning_rate": 1, "kind": "jax"}}, "expected one of torch, tf"),
        (BASE | {"steps": 0}, "config: steps is 0, expected 1 or more"),
    ],
)
def test_a_wrong_value_is_refused_by_name(values, message):
    with pytest.raises(ConfigError) as error:
        from_config(Config, values)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("steps=1_000", {"steps": 1000}),
        ("name=1e-5", {"name": "1e-5"}),
        ("name=", {"name": ""}),
        ("name=a=b c", {"name": "a=b c"}),
        ("flag=true", {"flag": True}),
        ("flag=False", {"flag": False}),
        ("files=a.jsonl, b.jsonl", {"files": ("a.jsonl", "b.jsonl")}),
        ("files=('a,b',)", {"files": ("a,b",)}),
        ("files=", {"files": ()}),
        ("shape=3,4", {"shape": (3, 4.0)}),
        ("limit=5", {"limit": 5}),
        ("limit=None", {"limit": None}),
        ("mixed=7", {"mixed": 7}),
        ("mixed=seven", {"mixed": "seven"}),
        ("adam.learning_rate=1", {"adam": Adam(1.0)}),
        ("adam.learning_rate=-1e-3", {"adam": Adam(-1e-3)}),
        ("adam.clip=none", {"adam": Adam(1e-3, clip=None)}),
        ("adam.kind=tf", {"adam": Adam(1e-3, kind="tf")}),
        ("extra.learning_rate=2", {"extra": Adam(2.0)}),
    ],
)
def test_an_override_is_read_by_the_type_of_its_field(launch, override, changed):
    """Also of a field that the file leaves out."""
    config, _ = launch(f"--config.{override}")
    assert config == dataclasses.replace(Config(10, Adam(1e-3)), **changed)


def test_an_override_may_follow_its_name_and_the_last_one_counts(launch):
    config, run = launch(
        "--config.steps", "3", "-config.adam.learning_rate", "-2", "--config.steps=4"
    )
    assert config == Config(4, Adam(-2.0))
    assert (run.workdir.name, run.mesh) == ("a", "auto")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.stpes=1", "unknown key config.stpes; did you mean config.steps?"),
        ("--config.learning_rate=1", "did you mean config.adam.learning_rate?"),
        ("--config.adam.learning_rat=1", "did you mean config.adam.learning_rate?"),
        ("--config.steps.x=1", "unknown key config.steps.x"),
        ("--config.steps=ten", "config.steps=ten: expected int"),
        ("--config.adam.learning_rate=fast", "config.adam.learning_rate=fast: expected float"),
        ("--config.flag=yes", "config.flag=yes: expected bool"),
        ("--config.limit=many", "config.limit=many: expected int | None"),
        ("--config.shape=1", "config.shape: expected 2 values, got 1"),
        ("--config.files=('a'", "config.files=('a': expected tuple of str"),
        ("--config.adam=3", "config.adam is a group of fields; set one of them"),
        ("--config.adam.kind=jax", "expected one of torch, tf"),
        ("--config.steps", "--config.steps needs a value"),
        ("--config.steps=0", "config: steps is 0, expected 1 or more"),
        ("--config=nowhere.py", "no config file 'nowhere.py'"),
        ("--config=configs/stf.py", "did you mean configs/sft.py?"),
        ("--config={file}:tyni", "no preset 'tyni'; it has tiny, large"),
        ("--wrkdir=x", "unrecognized arguments: --wrkdir=x; did you mean --workdir?"),
        ("--host_devices=0", "--host_devices=0: expected 1 or more"),
        ("--host_devices=two", "invalid int value: 'two'"),
        ("stray", "unrecognized arguments: stray"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    launch, tmp_path, config_file, capsys, argument, message
):
    """R12: and nothing is written."""
    with pytest.raises(SystemExit) as exit_:
        launch(argument.format(file=config_file))
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert message in err and err.startswith("error: ") and err.count("\n") == 1 and not out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def get_config(:\n", "presets.py"),
        ("x = 1\ny = x.z\n", "presets.py:2: AttributeError"),
        ("def get_config():\n    return 1 / 0\n", "presets.py:2: ZeroDivisionError"),
        ("", "AttributeError"),
    ],
)
def test_a_bug_in_a_config_file_is_one_line_with_its_place(
    launch, config_file, capsys, source, message
):
    config_file.write_text(source)
    with pytest.raises(SystemExit) as exit_:
        launch()
    err = capsys.readouterr().err
    assert exit_.value.code == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("bad row"), 2),
        (NonFiniteError("20 steps"), 3),
        (CheckpointError("damaged\nhere"), 4),
    ],
)
def test_the_way_a_run_ends_is_its_exit_code(launch, tmp_path, capsys, error, code):
    def main(config, run):
        raise error

    with pytest.raises(SystemExit) as exit_:
        launch(main=main)
    assert exit_.value.code == code
    assert capsys.readouterr().err == f"error: {' '.join(str(error).split())}\n"
    assert not (tmp_path / "runs").exists(), "a run that wrote nothing leaves nothing"


def test_a_bug_keeps_its_traceback(launch):
    def main(config, run):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        launch(main=main)


def write_a_file(config, run):
    (run.workdir / "log").write_text("x")


def test_the_record_says_what_was_run(launch, config_file):
    def main(config, run):
        assert json.loads((run.workdir / "config.json").read_text())["mesh"] == "data:2"
        run.record(data={"train": "ab12"})

    _, run = launch("--mesh=data:2", "--config.steps=3", main=main)
    record = json.loads((run.workdir / "config.json").read_text())
    assert record["config"] == json.loads(json.dumps(dataclasses.asdict(Config(3, Adam(1e-3)))))
    # Paths as they lead there from the work directory: the record is published.
    assert record["config_file"] == f"$HERE/../../{config_file.name}"
    assert record["command"][1:] == [
        "--workdir=$HERE",
        "--mesh=data:2",
        "--config.steps=3",
    ]
    assert record["data"] == {"train": "ab12"}
    assert {"jax", "numpy", "python", "instruct_jax"} <= record["versions"].keys()
    assert "commit" in record and record["started"].endswith("Z")
    assert [p.name for p in run.workdir.iterdir()] == ["config.json"]


def test_the_same_configuration_resumes_and_another_is_refused(launch, tmp_path, capsys):
    launch(main=write_a_file)
    launch(main=write_a_file)
    record = (tmp_path / "runs" / "a" / "config.json").read_bytes()
    with pytest.raises(SystemExit) as exit_:
        launch("--config.steps=3", "--config.adam.clip=none", main=write_a_file)
    err = capsys.readouterr().err
    assert exit_.value.code == 2
    assert "another configuration (adam.clip was 1.0, is None, steps was 10, is 3)" in err
    assert (tmp_path / "runs" / "a" / "config.json").read_bytes() == record


def test_overwrite_deletes_a_run_and_nothing_else(launch, tmp_path, capsys):
    _, run = launch(main=write_a_file)
    launch("--config.steps=3", "--overwrite")
    assert [p.name for p in run.workdir.iterdir()] == ["config.json"]
    (run.workdir / "config.json").rename(run.workdir / "thesis.tex")
    with pytest.raises(SystemExit):
        launch("--overwrite")
    assert "holds thesis.tex and no record of a run (config.json)" in capsys.readouterr().err
    assert (run.workdir / "thesis.tex").exists()


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(launch, tmp_path, capsys):
    """R6: the lock is the system's, so nothing is left behind by SIGKILL."""
    workdir = tmp_path / "runs" / "a"
    hold = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from instruct_jax.cli import open_workdir\n"
        "process = {'id': 7, 'machine': sys.argv[2]}\n"
        "with open_workdir(Path(sys.argv[1]), None, {'process': process, 'config': {}}):\n"
        "    Path(sys.argv[1], 'held').touch()\n"
        "    time.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    own = cli.describe(Config(3, Adam(1e-3)), "", "auto", [])["process"]["machine"]
    command = [sys.executable, "-c", hold, str(workdir), own]
    with subprocess.Popen(command, env=environment) as other:
        try:
            while not (workdir / "held").exists():
                assert other.poll() is None
                time.sleep(0.02)
            for flags in ((), ("--overwrite",)):
                with pytest.raises(SystemExit) as exit_:
                    launch(*flags)
                assert exit_.value.code == 2
                assert (
                    "is in use by another process, 7 on this machine; wait"
                    in capsys.readouterr().err
                )
            assert (workdir / "held").exists()
        finally:
            other.kill()
    launch("--overwrite", main=write_a_file)
    # Nobody has said that a run writes such a file.
    assert sorted(p.name for p in workdir.iterdir()) == ["config.json", "held", "log"]


def test_a_mistake_found_late_keeps_an_earlier_run(launch, tmp_path):
    def fail(config, run):
        raise UserError("bad row")

    launch(main=write_a_file)
    with pytest.raises(SystemExit):
        launch(main=fail)
    assert sorted(p.name for p in (tmp_path / "runs" / "a").iterdir()) == ["config.json", "log"]


SCRIPT = '''
"""Counts to config.steps.

    python count.py --config=presets.py:tiny
"""
from dataclasses import dataclass
from pathlib import Path
from instruct_jax import cli

@dataclass(frozen=True)
class Adam:
    learning_rate: float = 1.0

@dataclass(frozen=True)
class Config:
    steps: int = 1
    adam: Adam = Adam()

def main(config, run):
    import jax
    from jax import config as settings
    print(config.steps, run.workdir, jax.device_count(), settings.jax_compilation_cache_dir,
          settings.jax_persistent_cache_min_compile_time_secs)

if __name__ == "__main__":
    cli.run(main, Config, default="presets.py")
'''


@pytest.fixture
def script(tmp_path, config_file, repository, monkeypatch):
    (tmp_path / "count.py").write_text(SCRIPT)
    monkeypatch.setenv("PYTHONPATH", str(repository))
    for name in ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))

    def call(*argv):
        return subprocess.run(
            [sys.executable, "count.py", *argv], cwd=tmp_path, capture_output=True, text=True
        )

    return call


def test_a_script_says_what_it_does_and_what_can_be_set(script):
    done = script("--help", "--config.steps=7")
    assert done.returncode == 0 and not done.stderr
    for text in (
        "Counts to config.steps.",
        "python count.py --config=presets.py:tiny",
        "--workdir DIR",
        "fields, with their values in presets.py",
        "--config.steps=7",
        "--config.adam.learning_rate=0.001",
    ):
        assert text in done.stdout


@dataclass(frozen=True)
class Inner(Settings):
    rate: float = setting(0.5, "how fast it goes", above=0.0, high=1.0, unit="1/s")
    mixed: float = setting(0.0, "share of text", low=0.0, below=1.0)
    text: int = setting(3, "rows of text", low=1, needs="mixed")
    kind: str = "gae"
    sizes: tuple[int, ...] = setting((1, 2), "widths", low=1)
    limit: int | None = setting(None, "rows at most", low=1)


@dataclass(frozen=True)
class Slower(Inner):
    rate: float = 0.25
    value: float = setting(1.0, "clip of the value", needs="kind=gae|other")

    def __post_init__(self):
        super().__post_init__()
        if self.limit == 7:
            raise ConfigError(f"limit {self.limit} is never right")


@dataclass(frozen=True)
class Paths:
    prompts: str = ""
    pairs: str = ""


@dataclass(frozen=True)
class Described(Settings):
    acts_if: ClassVar = {"data.prompts": "inner.mixed", "data.pairs": NEVER}
    inner: Slower = Slower()
    data: Paths = Paths()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "inner.rate=0",
            "config.inner.rate=0.0: expected above 0 and at most 1 (how fast it goes)",
        ),
        ("inner.rate=nan", "config.inner.rate=nan: expected above 0 and at most 1"),
        ("inner.mixed=1", "config.inner.mixed=1.0: expected 0 or more and below 1"),
        ("inner.value=inf", "config.inner.value=inf: expected a finite number"),
        ("inner.sizes=2,0", "config.inner.sizes=(2, 0): expected 1 or more (widths)"),
        ("inner.limit=0", "config.inner.limit=0: expected 1 or more"),
        ("inner.limit=7", "config.inner.limit 7 is never right"),
        ("inner.text=4", "config.inner.text has no effect: inner.mixed is 0.0; leave it out"),
        ("data.prompts=x", "config.data.prompts has no effect: inner.mixed is 0.0"),
        ("data.pairs=x", "config.data.pairs has no effect: nothing here reads it"),
    ],
)
def test_a_field_out_of_range_or_without_effect_is_refused(override, message):
    with pytest.raises(ConfigError) as error:
        resolve(Described, {}, dict([override.split("=")]))
    assert message in str(error.value)


def test_a_field_acts_where_what_it_needs_is_on():
    overrides = {
        "inner.mixed": "0.5",
        "inner.text": "4",
        "data.prompts": "x",
        "inner.limit": "none",
    }
    config = resolve(Described, {}, overrides)
    assert (config.inner.text, config.data.prompts, config.inner.limit) == (4, "x", None)
    with pytest.raises(ConfigError, match=r"value has no effect: inner\.kind is 'rloo'"):
        resolve(Described, {}, {"inner.kind": "rloo", "inner.value": "2"})
    with pytest.raises(ConfigError, match=r"^rate=2: expected"):
        type(config.inner)(rate=2)


def test_help_says_of_each_field_what_it_is_and_hides_those_that_nothing_reads():
    text = field_help(Described(), "x.py:tiny", ("tiny", "large"))
    assert "presets: tiny, large" in text and "data.pairs" not in text
    assert (
        "--config.inner.rate=0.25\n      How fast it goes [float, above 0 and at most 1, 1/s]"
        in text
    )
    assert "Rows of text [int, 1 or more; acts with inner.mixed]" in text
    assert "  --config.data.prompts=\n      [str; acts with inner.mixed]" in text
    assert "  --config.inner.sizes=1,2\n      Widths [tuple of int, 1 or more]" in text
    assert "  --config.inner.limit=none\n" in text
    # What a class says itself stands before what its base said.
    assert text.index("inner.value") < text.index("inner.rate")
    set_otherwise = dataclasses.replace(Described(), inner=Slower(rate=1.0))
    assert "at most 1, 1/s; default 0.25]" in field_help(set_otherwise, "x.py")


@dataclass(frozen=True)
class Sampled(Settings):
    steps: int = setting(4, low=1)
    lag: int = 0
    clip: float = setting(0.2, "a bound", above=0.0, needs="steps>1 or lag")
    both: float = setting(0.0, low=0.0, needs="lag and steps=2|4")
    switch: bool = setting(False, needs="lag")


def test_conditions_are_joined_and_what_is_turned_off_is_never_refused():
    assert resolve(Sampled, {}, {"clip": "1"}).clip == 1.0
    assert resolve(Sampled, {}, {"steps": "1", "lag": "1", "clip": "1"}).clip == 1.0
    assert resolve(Sampled, {}, {"lag": "1", "both": "1"}).both == 1.0
    for overrides, reason in (
        ({"steps": "1", "clip": "1"}, "clip has no effect: steps is 1 and lag is 0; leave it out"),
        ({"both": "1"}, "both has no effect: lag is 0"),
        ({"lag": "1", "both": "1", "steps": "3"}, "both has no effect: steps is 3"),
        ({"switch": "true"}, "switch has no effect: lag is 0"),
    ):
        with pytest.raises(ConfigError, match=reason):
            resolve(Sampled, {}, overrides)
    assert resolve(Sampled, {"switch": True}, {"lag": "0", "switch": "false"}) == Sampled()


def test_a_bare_name_is_a_preset_of_ours_and_a_file_of_the_same_name_here_is_not_run(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "sft.py").write_text("raise SystemExit('foreign code was run')\n")
    monkeypatch.chdir(tmp_path)
    wanted = load_config("configs/sft.py:debug")
    note = "note: configs/sft.py is the package's; yours is ./configs/sft.py\n"
    assert capsys.readouterr().err == note
    assert wanted == load_config("debug", default="configs/sft.py")
    assert capsys.readouterr().err == "", "there the file was not named"
    assert wanted["sft"]["epochs"] == 1
    with pytest.raises(SystemExit, match="foreign"):
        load_config("./configs/sft.py:debug")


def test_the_file_that_is_suggested_keeps_the_preset_that_was_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"did you mean configs/pretrain\.py:debug\?$"):
        load_config("pretrain.py:debug")


def test_a_suggestion_is_near():
    @dataclass(frozen=True)
    class Fit:
        warmup: int = 1
        learning_rate: float = 1.0
        batch_size: int = 1

    @dataclass(frozen=True)
    class Script:
        fit: Fit = Fit()

    meant = {"fit.lr": "learning_rate", "lr": "learning_rate", "fit.rate": "learning_rate"}
    for wrong, right in {**meant, "fit.bs": "batch_size", "fit.batch": "batch_size"}.items():
        with pytest.raises(ConfigError, match=f"did you mean config.fit.{right}\\?"):
            resolve(Script, {}, {wrong: "1"})
    with pytest.raises(ConfigError, match=r"there are fit\.warmup, fit\.learning_rate"):
        resolve(Script, {}, {"fit.zzz": "1"})


def test_a_script_runs_with_devices_and_a_cache_of_its_own(script, tmp_path):
    done = script("--host_devices=3", "--config=presets.py:large")
    cache = Path(tmp_path) / ".cache" / "instruct_jax" / "xla"
    assert done.stdout.split() == ["10", "runs/presets", "3", str(cache), "0.0"], done.stderr


def test_a_variable_of_the_cache_comes_first(script, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "mine"))
    done = script()
    assert done.stdout.split()[-2:] == [str(tmp_path / "mine"), "0.0"], done.stderr
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "3.0")
    done = script("--workdir=runs/other")
    assert done.stdout.split()[-2:] == [str(tmp_path / "mine"), "3.0"], done.stderr


def test_a_misspelt_key_fails_within_two_seconds(script, tmp_path):
    """R12: of processor time, since the machine may be busy."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = script("--config.adam.learning_rat=1")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2
    assert done.stderr == (
        "error: unknown key config.adam.learning_rat; did you mean config.adam.learning_rate?\n"
    )
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2
    assert not (tmp_path / "runs").exists()


def test_the_door_itself_does_not_load_jax():
    code = "import sys, instruct_jax.cli; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_run_outside_a_script_can_be_recorded(tmp_path):
    Run(tmp_path / "notebook").record(data="x")
    assert read_object(tmp_path / "notebook" / "config.json") == {"data": "x"}


@dataclass(frozen=True)
class Default:
    adam: Adam = field(default_factory=lambda: Adam(2.0))


def test_a_default_factory_is_a_default():
    assert from_config(Default, {}) == Default(Adam(2.0))


def test_a_group_named_in_part_keeps_what_its_owner_set_in_the_rest():
    @dataclass(frozen=True)
    class Stage:
        adam: Adam = Adam(0.5, kind="tf")

    @dataclass(frozen=True)
    class Run:
        stage: Stage = Stage(Adam(0.25, kind="tf"))

    assert from_config(Stage, {"adam": {"clip": 2.0}}) == Stage(Adam(0.5, 2.0, "tf"))
    inner = from_config(Run, {"stage": {"adam": {"clip": 2.0}}})
    assert inner == Run(Stage(Adam(0.25, 2.0, "tf")))
