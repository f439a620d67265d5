"""R19: nothing that a run did not write is written over or deleted, and nothing of an old run
before the new one stands; which directories may be a run's; what a run may be taken up with.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from instruct_jax import cli
from instruct_jax.cli import replacing, workdir
from instruct_jax.cli.record import changes
from instruct_jax.errors import NonFiniteError, StorageError, UserError
from instruct_jax.settings import Settings, setting


@dataclass(frozen=True)
class Fit(Settings):
    epochs: float = setting(1.0, "passes", above=0, may_change="more")
    log_every: int = setting(10, "updates", low=1, may_change=True)
    rate: float = setting(0.1, "rate", above=0)


@dataclass(frozen=True)
class Config:
    fit: Fit = Fit()
    init: str = ""
    files: tuple[str, ...] = ()
    extra: Fit | None = None


PRESETS = "def get_config(name='a'):\n    return {}\n"
OVERWRITE = "--overwrite"


def snapshot(folder):
    """Every entry below a folder: contents, where a link leads, or that it is a folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(folder))] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[str(path.relative_to(folder))] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[str(path.relative_to(folder))] = "folder"
    return found


def files(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if not p.is_dir())


def train(config, run):
    """Writes what a stage writes."""
    text = str(config.fit.rate)
    for name in (
        "checkpoints/7/state/d/0", "checkpoints/7/manifest.json", "checkpoints/pinned.json",
        "damaged/3.1/_CHECKPOINT_METADATA", "model/model.json", "model/tokenizer.json",
        "model/params/params/d/0",
        "tensorboard/sft/events.out.tfevents.1.host", "ledger.log", "sft.jsonl",
        "epochs/2/params/params/manifest.ocdbt",
        "tokens/train-0123456789ab/00000.tokens", "tokens/train-0123456789ab/plan.json",
    ):  # fmt: skip
        path = run.workdir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


WRITES = ("sft.jsonl", *replacing.model_files("epochs/#"))
STRANGERS = {
    "notes.txt": "mine",
    "sft.jsonl.bak": "mine",
    "my_prompts.jsonl": "mine",
    "model/README.md": "mine",
    "checkpoints/7 (copy)/x": "mine",
    "checkpoints/best/x": "mine",
    "plots/a.png": "mine",
    ".git/HEAD": "mine",
    "backup/config.json": '{"schema": "instruct_jax.run/1", "config": {}}',
    "backup/checkpoints/7/x": "mine",
}


@pytest.fixture
def launch(tmp_path, monkeypatch):
    """Runs a command line in this process; its exit code, 0 where none is raised."""
    (tmp_path / "presets.py").write_text(PRESETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(workdir, "_commit", lambda: None)  # git takes longer than all the rest

    def launch(*argv, main=train):
        argv = [*([] if any("--workdir" in a for a in argv) else ["--workdir=runs/a"]), *argv]
        try:
            cli.run(main, Config, default=str(tmp_path / "presets.py"), argv=argv, writes=WRITES)
        except SystemExit as stop:
            return stop.code
        return 0

    return launch


def one_line(capsys, *words):
    """The one line on stderr, which holds all of `words`."""
    out, err = capsys.readouterr()
    assert err.startswith("error: ") and err.count("\n") == 1 and out == "", err
    assert all(word in err for word in words), err
    return err


def add_strangers(workdir):
    for name, text in STRANGERS.items():
        (workdir / name).parent.mkdir(parents=True, exist_ok=True)
        (workdir / name).write_text(text)


# --- --overwrite -------------------------------------------------------------------------------


def test_overwrite_replaces_all_that_the_run_wrote_and_keeps_all_that_it_did_not(launch, tmp_path):
    workdir = tmp_path / "runs/a"
    assert launch() == 0
    add_strangers(workdir)
    assert launch(OVERWRITE, "--config.fit.rate=0.2", main=lambda config, run: None) == 0
    assert files(workdir) == sorted(["config.json", *STRANGERS])
    assert all((workdir / name).read_text() == text for name, text in STRANGERS.items())


def test_a_run_within_a_run_is_deleted_as_carefully(tmp_path):
    """A part of the quickstart, a start of a benchmark: a folder of theirs, with records."""
    for name in ("part/config.json", "part/checkpoints/7/state/d/0", "part/model/params/params/d/0",
                 "part/damaged/3.1/_CHECKPOINT_METADATA", "part/start0/checkpoints/1/state/d/0",
                 "part/checkpoints/7/notes.txt", "part/damaged/3.1/notes.txt",
                 "part/start0/checkpoints/1/notes.txt", "part/model/params/notes.txt",
                 "part/start0/notes.txt", "cache/x_1/step"):  # fmt: skip
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    # What is said of another folder is not meant of this one.
    replacing.delete(tmp_path, ("part/", "part/start#/", "cache/x_#/*", "part/cache/x_#/*"))
    assert {path.rpartition("/")[2] for path in files(tmp_path)} == {"notes.txt"}
    assert len(files(tmp_path)) == 5


def fail_with(error):
    def main(config, run):
        assert not (run.workdir / "checkpoints/7").exists(), "the old run must not be taken up"
        folder = run.workdir / "tokens/train-0123456789ab"
        folder.mkdir(parents=True)
        (folder / "plan.json").write_text("{}")
        run.record(data={"x": 1})
        (run.workdir / "checkpoints").mkdir(exist_ok=True)
        (run.workdir / "ledger.log").write_text("x")
        (run.workdir / "tensorboard/sft").mkdir(parents=True)
        (run.workdir / "tensorboard/sft/events.out.tfevents.9").write_text("x")
        raise error

    return main


@pytest.mark.parametrize(
    ("argv", "main", "code"),
    [
        (["--config=nowhere.py"], train, 2),
        (["--config.fit.rat=1"], train, 2),
        (["--config.fit.rate=-1"], train, 2),
        (["--host_devices=0"], train, 2),
        ([], fail_with(UserError("no such file, or a mesh that does not fit")), 2),
        ([], fail_with(NonFiniteError("x")), 3),
        ([], fail_with(StorageError("x")), 5),
        ([], fail_with(KeyboardInterrupt()), "KeyboardInterrupt"),
        ([], fail_with(ZeroDivisionError()), "ZeroDivisionError"),
        ([], lambda config, run: os.kill(os.getpid(), signal.SIGINT), 130),
        ([], lambda config, run: os.kill(os.getpid(), signal.SIGTERM), 143),
    ],
)
def test_a_command_that_fails_leaves_the_run_that_it_was_to_replace_untouched(
    launch, tmp_path, argv, main, code
):
    workdir = tmp_path / "runs/a"
    assert launch() == 0
    add_strangers(workdir)
    before = snapshot(workdir)
    if isinstance(code, str):
        with pytest.raises(BaseException) as raised:  # a bug keeps its traceback
            launch(OVERWRITE, "--config.fit.epochs=9", *argv, main=main)
        assert raised.type.__name__ == code
    else:
        assert launch(OVERWRITE, "--config.fit.epochs=9", *argv, main=main) == code
    assert snapshot(workdir) == before
    assert launch() == 0, "and it is taken up"


def test_a_new_run_that_fails_with_steps_saved_keeps_both(launch, tmp_path, capsys):
    def main(config, run):
        train(config, run)
        raise NonFiniteError("20 steps")

    workdir = tmp_path / "runs/a"
    launch()
    before = {name: (workdir / name).read_bytes() for name in files(workdir)}
    assert launch(OVERWRITE, "--config.fit.rate=0.2", main=main) == 3
    (aside,) = workdir.glob("replaced-*")
    assert str(aside.relative_to(tmp_path)) in capsys.readouterr().err
    assert {name: (aside / name).read_bytes() for name in files(aside)} == before
    assert launch("--config.fit.rate=0.2") == 0, "the new run is taken up and ends"
    assert not list(workdir.glob("replaced-*"))
    assert (workdir / "sft.jsonl").read_text() == "0.2"


def test_a_run_stopped_by_a_signal_with_its_state_saved_stands(launch, tmp_path):
    def main(config, run):
        train(config, run)
        raise SystemExit(0)

    launch()
    assert launch(OVERWRITE, "--config.fit.rate=0.2", main=main) == 0
    assert not list((tmp_path / "runs/a").glob("replaced-*"))


def test_links_are_not_followed_and_not_deleted(launch, tmp_path):
    workdir, disk = tmp_path / "runs/a", tmp_path / "disk"
    launch()
    (workdir / "checkpoints").rename(disk)
    (workdir / "checkpoints").symlink_to(disk)
    (workdir / "link").symlink_to(disk)
    (workdir / "sft.jsonl").rename(tmp_path / "rows")
    (workdir / "sft.jsonl").symlink_to(tmp_path / "rows")
    before = snapshot(disk)
    assert launch(OVERWRITE, "--config.fit.rate=0.2") == 0
    assert not (workdir / "checkpoints").is_symlink() and (workdir / "link").is_symlink()
    assert snapshot(disk) == before and (tmp_path / "rows").read_text() == "0.1"
    (kept,) = workdir.glob("kept-*")
    assert snapshot(kept) == {
        "checkpoints": f"-> {disk}",
        "sft.jsonl": f"-> {tmp_path / 'rows'}",
    }


@pytest.mark.parametrize("finished", [True, False], ids=["with a manifest", "unfinished"])
def test_what_is_put_into_a_saved_step_or_model_outlives_the_run(
    launch, tmp_path, capsys, repository, finished
):
    workdir, disk = tmp_path / "runs/a", tmp_path / "disk"
    disk.mkdir()
    (disk / "x").write_text("mine")
    step = repository / "tests/fixtures/checkpoints/format_2/4"

    def saves(config, run):
        train(config, run)
        for name in ("checkpoints/9", "model/params", "epochs/3/params"):
            shutil.rmtree(run.workdir / name, ignore_errors=True)
            shutil.copytree(step, run.workdir / name)
            if not finished:
                (run.workdir / name / "manifest.json").unlink()

    assert launch(main=saves) == 0
    wanted = {}
    for name in ("checkpoints/9", "model/params", "epochs/3/params"):
        for inner in ("notes.txt", "state/notes.txt", "plots/a.png"):
            path = workdir / name / inner
            path.parent.mkdir(exist_ok=True)
            path.write_text("mine")
            wanted[f"{name}/{inner}"] = hashlib.sha256(b"mine").hexdigest()
        (workdir / name / "link").symlink_to(disk)
        wanted[f"{name}/link"] = f"-> {disk}"
    assert launch(OVERWRITE, "--config.fit.rate=0.2", main=lambda config, run: None) == 0
    (kept,) = workdir.glob("kept-*")
    assert kept.name in capsys.readouterr().err
    assert {k: v for k, v in snapshot(kept).items() if v != "folder"} == wanted
    assert {path.name for path in workdir.iterdir()} == {"config.json", kept.name}
    assert files(disk) == ["x"]


@pytest.mark.parametrize("point", range(1, 40))
def test_a_process_killed_while_it_replaces_leaves_one_run_or_the_other(
    launch, tmp_path, monkeypatch, point
):
    """Killed at any of its operations on files, the next command finds a whole run."""

    class Killed(BaseException):
        pass

    workdir = tmp_path / "runs/a"
    launch()
    old = {name: (workdir / name).read_text() for name in files(workdir) if name != "config.json"}
    left = [point]

    def counted(function):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] <= 0:  # nothing happens any more: not what cleans up after it either
                raise Killed
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch, pytest.raises((Killed, SystemExit)):
        for name in ("rename", "replace", "mkdir", "rmdir", "unlink"):
            patch.setattr(os, name, counted(getattr(os, name)))
        launch(OVERWRITE, "--config.fit.rate=0.2", main=train)
        raise SystemExit
    if launch(main=lambda config, run: None) == 0:  # the old run, whole
        now = {name: (workdir / name).read_text() for name in files(workdir)}
        assert {name: text for name, text in now.items() if name in old} == old
    else:
        assert launch("--config.fit.rate=0.2") == 0
        assert (workdir / "sft.jsonl").read_text() == "0.2"
    assert not list(workdir.glob("replaced-*"))


@pytest.mark.parametrize(
    "record",
    [
        '{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}',
        '{"name": "a project", "config": {}}',
        "[]",
        "3",
        "null",
        '{"config": ',
        "",
        '{"schema": "instruct_jax.run/1"}',
        '{"schema": "instruct_jax.run/1", "config": []}',
        '{"schema": "instruct_jax.run/9", "config": {}}',
        '{"schema": ["x"], "config": {"a": 1}}',
        "\udcff",
        "[" * 100_000,
        None,
    ],
)
@pytest.mark.parametrize("flags", [(), (OVERWRITE,)])
def test_a_folder_that_is_not_a_run_of_ours_is_refused_and_untouched(
    launch, tmp_path, capsys, record, flags
):
    """An exported model, a project, a folder of texts; nor is --overwrite advised."""
    workdir = tmp_path / "runs/a"
    (workdir / ".git").mkdir(parents=True)
    (workdir / ".git/HEAD").write_text("x")
    (workdir / "thesis.tex").write_text("x")
    if record is not None:
        (workdir / "config.json").write_bytes(record.encode(errors="surrogateescape"))
    before = snapshot(workdir)
    assert launch(*flags) == 2
    assert OVERWRITE not in one_line(capsys, "runs/a", "choose another --workdir")
    assert snapshot(workdir) == before


def test_checkpoints_without_their_record_are_not_taken_up(launch, tmp_path, capsys):
    workdir = tmp_path / "runs/a"
    launch()
    (workdir / "config.json").unlink()
    before = snapshot(workdir)
    for flags in ((), (OVERWRITE,)):
        assert launch(*flags) == 2
        one_line(capsys, "no record of a run (config.json)", "checkpoints")
    assert snapshot(workdir) == before


def test_empty_folders_are_taken_back_and_in_nobodys_way(launch, tmp_path):
    def main(config, run):
        for folder in ("tokens/train-0123456789ab", "checkpoints", "tensorboard/sft", "model"):
            (run.workdir / folder).mkdir(parents=True)
        os.kill(os.getpid(), signal.SIGINT)

    assert launch(main=main) == 130
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs/a/made/by/hand").mkdir(parents=True)
    assert launch() == 0


def test_what_a_shell_or_a_cluster_writes_there_is_no_stranger(launch, tmp_path):
    workdir = tmp_path / "runs/a"
    workdir.mkdir(parents=True)
    for name in ("slurm-12.out", "train.log", ".nfs0001"):
        (workdir / name).write_text("x")
    assert launch() == 0
    assert launch(OVERWRITE) == 0
    assert (workdir / "slurm-12.out").exists()


def test_half_a_record_that_a_kill_left_is_no_stranger(launch, tmp_path):
    workdir = tmp_path / "runs/a"
    workdir.mkdir(parents=True)
    (workdir / "config.json.tmp").write_text('{\n  "sha')
    assert launch() == 0
    assert not (workdir / "config.json.tmp").exists()


# --- what may be a run's directory ---------------------------------------------------------------


def test_the_current_directory_the_home_and_the_root_are_never_replaced(
    launch, tmp_path, capsys, monkeypatch
):
    launch("--workdir=runs/a")
    monkeypatch.setenv("HOME", str(tmp_path / "runs/a"))
    before = snapshot(tmp_path / "runs/a")
    assert launch("--workdir=runs/a", OVERWRITE) == 2
    one_line(capsys, "your home")
    monkeypatch.chdir(tmp_path / "runs/a/model")
    for where in (".", "..", "../..", "/", f"{tmp_path}/runs"):
        assert launch(f"--workdir={where}", OVERWRITE) == 2
        one_line(capsys, "current directory")
    for empty in ("--workdir=", "--workdir= "):
        for flags in ((), (OVERWRITE,)):
            assert launch(empty, *flags) == 2
            one_line(capsys, "--workdir is empty")
    assert snapshot(tmp_path / "runs/a") == before


def test_a_place_that_cannot_be_a_directory_is_one_line_and_nothing_is_made(
    launch, tmp_path, capsys
):
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "pipe").touch()
    os.remove(tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipe")
    before = {p.name for p in tmp_path.iterdir()} | {"__pycache__"}  # of the presets
    places = [
        "file", "file/below", "dangling", "dangling/below", "loop", "loop/below", "pipe",
        "x" * 300, f"{'y' * 300}/run", "z/" * 3000, "a[b]", "a[b]/c", "a\\b", "x\udcffy", "gs:/x",
        "nul\0byte", "/proc/nowhere", "/dev/null/x",
    ]  # fmt: skip
    for place in places:
        for flags in ((), (OVERWRITE,)):
            assert launch(f"--workdir={place}", *flags) == 2, ascii(place)
            one_line(capsys, "--workdir")
    assert {p.name for p in tmp_path.iterdir()} <= before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_may_not_be_written_to_is_one_line(launch, tmp_path, capsys):
    (tmp_path / "mine").mkdir(mode=0o500)
    for place in ("mine", "mine/run"):
        assert launch(f"--workdir={place}") == 2
        one_line(capsys, "may not be written to")


def test_a_read_only_place_is_one_line_for_root_too(launch, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert launch() == 2
    one_line(capsys, "may not be written to")


@pytest.mark.parametrize(
    "name", ["a[b", "a]", "a*b", "a?b", "-a", "a ", " a", "a#b", "a%20b", "a:b", "日本"]
)
def test_names_that_can_be_written_right_are(launch, tmp_path, name):
    assert launch(f"--workdir={name}") == 0
    assert launch(f"--workdir={name}") == 0
    assert (tmp_path / name / "sft.jsonl").exists()


# --- what a run may be taken up with -------------------------------------------------------------


def record_of(config, **facts):
    return {"config": json.loads(json.dumps(dataclasses.asdict(config))), **facts}


def test_intervals_may_change_and_epochs_may_grow():
    record = record_of(Config(Fit(epochs=2.0)))
    assert changes(record, Config(Fit(epochs=3.0, log_every=1))) == []
    (less,) = changes(record, Config(Fit(epochs=1.0)))
    assert less == "fit.epochs was 2.0, is 1.0 (more would do)"
    assert changes(record, Config(Fit(epochs=2.0, rate=1.0))) == ["fit.rate was 0.1, is 1.0"]


def test_a_field_younger_than_the_record_has_its_default():
    record = record_of(Config())
    del record["config"]["fit"]["rate"]
    del record["config"]["files"]
    assert changes(record, Config()) == []
    assert changes(record, Config(Fit(rate=0.5), files=("x",))) == [
        "files was [], is ['x']",
        "fit.rate was 0.1, is 0.5",
    ]
    del record["config"]["fit"]
    assert changes(record, Config()) == []


def test_what_the_owner_of_a_group_sets_in_it_is_its_default():
    @dataclass(frozen=True)
    class Owner:
        fit: Fit = Fit(rate=0.7)

    record = record_of(Owner())
    del record["config"]["fit"]["rate"]
    assert changes(record, Owner()) == []
    assert changes(record, Owner(Fit())) == ["fit.rate was 0.7, is 0.1"]


def test_a_field_that_is_no_more_is_a_difference_that_is_named():
    record = record_of(Config())
    record["config"]["fit"]["momentum"] = 0.9
    assert changes(record, Config()) == ["fit.momentum was 0.9, and this version has no such field"]


def test_a_group_that_was_none_is_another_configuration():
    assert changes(record_of(Config()), Config(extra=Fit())) == [
        "extra.epochs was None, is 1.0",
        "extra.rate was None, is 0.1",
    ]
    assert "extra.rate was 0.1, its group is None" in changes(
        record_of(Config(extra=Fit())), Config()
    )


def test_texts_that_name_the_same_file_are_the_same(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("runs")
    before = record_of(Config(init="runs/gpt/model", files=("sft=runs/a/model", "x.jsonl")))
    for init, first in (
        (f"{tmp_path}/runs/gpt/model", f"sft={tmp_path}/runs/a/model"),
        ("runs/gpt/model/", "sft=./runs/a/model"),
        ("link/gpt/model", "sft=link/a/model"),
    ):
        assert changes(before, Config(init=init, files=(first, f"{tmp_path}/x.jsonl"))) == []
    assert changes(before, Config(init="runs/gpt2/model", files=("sft=runs/a/model", "x.jsonl")))
    assert changes(before, Config(init="runs/gpt/model", files=("ppo=runs/a/model", "x.jsonl")))
    assert changes(record_of(Config(init="")), Config(init="."))


def test_a_record_keeps_what_is_known_when_the_run_goes_on(launch, tmp_path):
    launch(main=lambda config, run: run.record(data={"train": "ab12"}))
    launch("--config.fit.log_every=3", main=lambda config, run: None)
    record = json.loads((tmp_path / "runs/a/config.json").read_text())
    assert record["data"] == {"train": "ab12"} and record["config"]["fit"]["log_every"] == 3


def test_a_run_that_was_not_taken_up_is_as_it_was(launch, tmp_path):
    """More epochs that a mistake kept from being trained may be fewer again."""

    def mistake(config, run):
        run.record(data={"other": 1})
        raise UserError("x")

    launch()
    before = snapshot(tmp_path / "runs/a")
    assert launch("--config.fit.epochs=9", main=mistake) == 2
    assert snapshot(tmp_path / "runs/a") == before


def test_a_record_of_before_the_mark_is_taken_up(launch, tmp_path):
    launch()
    path = tmp_path / "runs/a/config.json"
    record = json.loads(path.read_text())
    del record["schema"], record["writes"], record["config"]["extra"], record["sha256"]
    path.write_text(json.dumps(record))
    assert launch() == 0


# --- the rest of the door ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        ("--config=broken.py",), ("--config=nowhere.py",), ("--config.nowhere=1",), ("--bogus",),
        ("--host_devices=x",), ("--workdir=",), ("--config.fit.rate",), ("--config.fit.rate=x",),
    ],
)  # fmt: skip
@pytest.mark.parametrize("last", [True, False])
def test_help_is_given_whatever_else_is_wrong(launch, tmp_path, capsys, argv, last):
    (tmp_path / "broken.py").write_text("def get_config(:\n")
    assert launch(*argv, "--help") == 0 if last else launch("--help", *argv) == 0
    out, err = capsys.readouterr()
    assert "--workdir DIR" in out and not err
    if "broken" in argv[0]:
        assert "the fields of broken.py cannot be shown: " in out and "SyntaxError" in out
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_outside_of_the_loop_is_one_line_and_leaves_nothing(
    launch, tmp_path, capsys, number, code
):
    before = signal.getsignal(number)
    try:
        signal.signal(number, signal.default_int_handler)
        assert launch(main=lambda config, run: os.kill(os.getpid(), number)) == code
    finally:
        signal.signal(number, before)
    err = capsys.readouterr().err
    assert err.startswith("stopped by ") and err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_failure_removes_only_the_directories_that_were_made(launch, tmp_path):
    def mistake(config, run):
        raise UserError("x")

    def fail(config, run):
        (run.workdir / "notes.txt").write_text("of the user, meanwhile")
        raise UserError("x")

    (tmp_path / "here").mkdir()
    assert launch("--workdir=here/b/c", main=mistake) == 2
    assert not (tmp_path / "here/b").exists()
    assert launch("--workdir=here/d/e", main=fail) == 2
    assert files(tmp_path / "here/d") == ["e/notes.txt"]
    empty = tmp_path / "empty"
    empty.mkdir()
    assert launch("--workdir=empty", main=mistake) == 2
    assert empty.is_dir() and not list(empty.iterdir())


def test_a_script_at_its_end_by_sigkill_while_it_replaces_can_be_taken_up(tmp_path, repository):
    """A real SIGKILL after the old run is set aside: both are there, and the new one goes on."""
    (tmp_path / "presets.py").write_text("def get_config():\n    return {}\n")
    (tmp_path / "script.py").write_text(
        "import os, sys\nfrom dataclasses import dataclass\nfrom instruct_jax import cli\n"
        "@dataclass(frozen=True)\nclass Config:\n    die: bool = False\n    n: int = 0\n"
        "def main(config, run):\n"
        "    (run.workdir / 'log').write_text(str(config.n))\n"
        "    if os.environ.get('DIE'):\n        os.kill(os.getpid(), 9)\n"
        "cli.run(main, Config, default='./presets.py', writes=('log',))\n"
    )

    def call(*argv, **environment):
        command = [sys.executable, "script.py", "--workdir=run", *argv]
        extra = {"PYTHONPATH": str(repository), **environment}
        return subprocess.run(
            command, cwd=tmp_path, env=os.environ | extra, capture_output=True, text=True
        )

    assert call().returncode == 0
    assert call("--config.n=1", OVERWRITE, DIE="1").returncode == -signal.SIGKILL
    run = Path(tmp_path / "run")
    (aside,) = run.glob("replaced-*")
    assert (aside / "log").read_text() == "0" and (run / "log").read_text() == "1"
    refused = call()
    assert refused.returncode == 2 and f"it replaces the run in run/{aside.name}" in refused.stderr
    assert call("--config.n=1").returncode == 0
    assert sorted(p.name for p in run.iterdir()) == ["config.json", "log"]


# --- what a run was begun with -----------------------------------------------------------------


def test_a_run_is_not_taken_up_with_other_data_in_the_same_place(launch, tmp_path, capsys):
    """R20: refused, and the hash of then stays; new names are recorded, and --overwrite begins."""

    def reading(**hashes):
        return lambda config, run: (train(config, run), run.record_data(hashes, {}))

    def recorded():
        return json.loads((tmp_path / "runs/a/config.json").read_text())["data"]

    assert launch(main=reading(a="1", made={"seed": (0, 1)})) == 0
    assert launch(main=reading(a="1", made={"seed": (0, 1)})) == 0
    capsys.readouterr()
    assert launch(main=reading(a="2")) == 2
    one_line(capsys, "a: not what the run in runs/a began with (1, now 2)", "--overwrite")
    assert recorded()["a"] == "1"
    assert launch(OVERWRITE, main=reading(a="2")) == 0
    assert recorded() == {"a": "2"}


def test_a_tilde_in_the_workdir_is_the_users_home(launch, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert launch("--workdir=~/runs/b") == 0
    assert (tmp_path / "home/runs/b/config.json").is_file()
    assert not (tmp_path / "~").exists()


def test_a_workdir_with_a_line_break_is_refused(launch, tmp_path, capsys):
    assert launch("--workdir=runs/a\nb") == 2
    one_line(capsys, "has a line break")
    assert not (tmp_path / "runs").exists()
