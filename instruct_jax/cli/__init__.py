"""The door of every script: a command line in, a frozen configuration and a work directory out.

    python experiments/sft.py --config=configs/sft.py:toyworld --config.sft.learning_rate=1e-4

All that can be wrong with a command line is found before any device is touched or any file is
written, and told in one line on stderr with exit code 2 (the other codes: instruct_jax/errors.py).
"""

import argparse
import difflib
import errno
import inspect
import logging
import os
import re
import shutil
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from instruct_jax.cli import processes
from instruct_jax.cli.config import from_config, known, load, load_config, resolve
from instruct_jax.cli.help import field_help
from instruct_jax.cli.names import suggest, suggest_field
from instruct_jax.cli.workdir import Run, describe, open_workdir
from instruct_jax.errors import ConfigError, Interrupted, RunError, StorageError
from instruct_jax.files import user_path
from instruct_jax.settings import Settings

__all__ = [
    "HOST_DEVICE_FLAGS",
    "Run",
    "describe",
    "from_config",
    "hush",
    "load_config",
    "open_workdir",
    "resolve",
    "run",
    "split_overrides",
]

Config = TypeVar("Config")

# Every program is kept, those of a few operations too: a stage has some thirty of them before its
# first step, which take longer to compile than to read. A variable of the same name comes first.
_COMPILATION_CACHE = {
    "jax_compilation_cache_dir": str(Path.home() / ".cache" / "instruct_jax" / "xla"),
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
}

# XLA flags for a CPU that stands for several devices, which must meet in every collective.
HOST_DEVICE_FLAGS = (
    # On a busy machine threads come late; by default 40 s of waiting end the process.
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
)


def run(
    main: Callable[[Config, Run], Any],
    config_class: type[Config],
    *,
    default: str,
    writes: Sequence[str] = (),
    once: bool = False,
    argv: Sequence[str] | None = None,
) -> None:
    """Calls `main(config, run)` as the command line says; a RunError becomes its exit code.

    `config_class` is a frozen dataclass, `default` the "FILE:NAME" of its usual values, `writes`
    the files in the work directory that this script writes beside those that all do (`COMMON` in
    replacing.py), so that --overwrite knows them. With `once` a run that has ended, and of which
    nothing has changed, is not made again: `main` is not called. Writes workdir/config.json before
    `main`: the resolved configuration, versions, commit and command. Ctrl-C and SIGTERM end it in
    one line with code 130 and 143; a loop that can save its state handles them itself
    (training/loop.py). Compiled programs are kept in $JAX_COMPILATION_CACHE_DIR or
    ~/.cache/instruct_jax/xla. Where the environment says that there are several processes
    (processes.py) they meet first, and the first of them alone writes.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        with _ended_by_signals(), _plain_warnings():
            _run(main, config_class, default, writes, once, argv)
    except RunError as error:
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        sys.exit(error.exit_code)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.exit_code)


def _run(
    main: Callable[[Config, Run], Any],
    config_class: type[Config],
    default: str,
    writes: Sequence[str],
    once: bool,
    argv: list[str],
) -> None:
    flags, overrides = _parse(argv, main, default, known(config_class))
    if flags.help:
        print(flags.usage + _fields(config_class, flags.config, default, overrides))
        return
    loaded = load(flags.config, default=default)
    try:
        config = resolve(config_class, loaded.values, overrides)
    except ConfigError as error:
        raise ConfigError(f"{error}{_of_another_script(loaded.spec, main)}") from error
    workdir = flags.workdir or Path("runs", Path(loaded.spec.partition(":")[0]).stem)
    if isinstance(config, Settings) and not config.leaves_files:
        _configure_jax(flags.host_devices)
        main(config, Run(workdir, flags.mesh))
        return
    record = describe(config, loaded.spec, flags.mesh, argv, writes=writes)
    several = processes.announced()
    if several:
        _configure_jax(flags.host_devices)
        processes.join()
    with (
        processes.together(),
        _storage(workdir),
        open_workdir(workdir, config, record, overwrite=flags.overwrite, once=once) as done,
    ):
        run = Run(workdir, flags.mesh)
        if done:
            run.say_again()
            return
        if not several:
            _configure_jax(flags.host_devices)
        main(config, run)
        if once and run.said:
            run.record(said=run.said)


def _of_another_script(spec: str, main: Callable[..., Any]) -> str:
    """What to add to a complaint about `spec` where it has the presets of another script than that
    of `main`; else nothing.
    """
    own = Path(inspect.getfile(main))
    presets = Path(spec.partition(":")[0])
    others = own.with_name(f"{presets.stem}.py")
    if presets.parent.name != "configs" or others == own or not others.is_file():
        return ""
    return f" ({presets} is for {own.parent.name}/{presets.stem}.py)"


def _fields(config_class: type[Any], spec: str, default: str, overrides: dict[str, str]) -> str:
    """The fields as --help shows them; a configuration that is broken is named instead."""
    try:
        loaded = load(spec, default=default)
        config = resolve(config_class, loaded.values, overrides)
        return field_help(config, loaded.spec, loaded.presets)
    except RunError as error:
        return f"\nthe fields of {spec} cannot be shown: {' '.join(str(error).splitlines())}"


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Within it Ctrl-C and SIGTERM raise Interrupted, so that what was begun is taken back."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return
    usual = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def on_signal(number: int, frame: Any) -> None:
        raise Interrupted(number)

    for number, handler in usual.items():
        if handler is not signal.SIG_IGN:  # as in the background of a shell
            signal.signal(number, on_signal)
    try:
        yield
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


class _PlainLines(logging.Handler):
    """What the package warns of: a line each, each once, from the process that writes."""

    def __init__(self) -> None:
        super().__init__()
        self._told: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """As the notes of a run are, without breaking a progress bar."""
        from tqdm import tqdm

        text = " ".join(record.getMessage().splitlines())
        if text not in self._told and not processes.index():
            tqdm.write(f"{record.levelname.lower()}: {text}", file=sys.stderr)
        self._told.add(text)


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """Within it the package's warnings are told as `_PlainLines`, and go nowhere else."""
    logger, lines = logging.getLogger("instruct_jax"), _PlainLines()
    before, logger.propagate = logger.propagate, False
    logger.addHandler(lines)
    try:
        yield
    finally:
        logger.removeHandler(lines)
        logger.propagate = before


# What is wrong with a disk or its permissions, and not with the program.
_STORAGE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


@contextmanager
def _storage(workdir: Path) -> Iterator[None]:
    """Within it a full disk or a missing permission is a StorageError."""
    try:
        yield
    except OSError as error:
        if error.errno not in _STORAGE:
            raise
        place = Path(error.filename or workdir).absolute()
        present = next(p for p in (place, *place.parents) if p.is_dir())
        raise StorageError(
            f"{error.filename or workdir}: {error.strerror}; {shutil.disk_usage(present).free:,}"
            f" bytes are free at {present}: make room, mend the permissions or choose another"
            " --workdir; what was saved stands"
        ) from error


class _Parser(argparse.ArgumentParser):
    fields: Sequence[str] = ()

    def error(self, message: str) -> NoReturn:
        flags = [option for action in self._actions for option in action.option_strings]
        unknown = re.match(r"unrecognized arguments: (-[^\s=]*)", message)
        if unknown is None:
            raise ConfigError(message)
        field = suggest_field(unknown[1].lstrip("-"), self.fields)
        likely = difflib.get_close_matches(unknown[1], flags) or "did you mean" not in field
        raise ConfigError(message + (suggest(unknown[1], flags) if likely else field))


def _parse(
    argv: Sequence[str], main: Callable[..., Any], default: str, fields: Sequence[str]
) -> tuple[argparse.Namespace, dict[str, str]]:
    """The flags, and the overrides as "a.b" -> text."""
    parser = _Parser(
        description=inspect.getdoc(inspect.getmodule(main)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.fields = fields
    flag = parser.add_argument
    flag("-h", "--help", action="store_true", help="this, and the fields of the configuration")
    flag(
        "--config",
        default=default,
        metavar="FILE:NAME",
        help=f"preset (default: {default}); NAME: one of the same file",
    )
    flag("--workdir", metavar="DIR", help="the run's files (default: runs/FILE)")
    flag(
        "--mesh", default="auto", help="data, fsdp, tensor, sequence: data:2,fsdp:4 (default: auto)"
    )
    flag(
        "--overwrite",
        action="store_true",
        help="replace the run in DIR (what it wrote, and no other file), once this one stands",
    )
    flag("--host_devices", type=int, metavar="N", help="use the CPU as N devices")
    if {"-h", "--help"} & set(argv):
        flags, overrides = _help_flags(parser, argv)
        flags.usage = parser.format_help()
        return flags, overrides
    rest, overrides = split_overrides(argv)
    flags = parser.parse_args(rest)
    if flags.workdir is not None:
        if not flags.workdir.strip():
            raise ConfigError("--workdir is empty; name a directory for the run's files")
        if len(flags.workdir.splitlines()) > 1:
            raise ConfigError(f"--workdir={flags.workdir!r} has a line break; rename it")
        flags.workdir = user_path(flags.workdir)
    if flags.host_devices is not None and flags.host_devices < 1:
        raise ConfigError(f"--host_devices={flags.host_devices}: expected 1 or more")
    return flags, overrides


def _help_flags(parser: _Parser, argv: Sequence[str]) -> tuple[argparse.Namespace, dict[str, str]]:
    """Those of a command line that asks for help: whatever else is wrong with it, it is given."""
    try:
        rest, overrides = split_overrides(argv)
        return parser.parse_known_args(rest)[0], overrides
    except ConfigError:
        return parser.parse_args(["--help"]), {}


def split_overrides(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """What is no override, and the overrides --config.a.b=text as "a.b" -> text. ConfigError."""
    rest, overrides, words = [], {}, iter(argv)
    for word in words:
        match = re.fullmatch(r"--?config\.([^=]+)(?:=(.*))?", word, re.DOTALL)
        if match is None:
            rest.append(word)
            continue
        value = match[2] if match[2] is not None else next(words, "--")
        if match[2] is None and value.startswith("--"):
            raise ConfigError(f"{word} needs a value: {word}=VALUE")
        overrides[match[1]] = value
    return rest, overrides


def hush() -> None:
    """What Orbax logs with a traceback it also raises, and that is told in one line."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)


def _configure_jax(host_devices: int | None) -> None:
    import jax  # a mistake on the command line should not wait for it

    hush()
    if host_devices is not None:
        os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *HOST_DEVICE_FLAGS])
        jax.config.update("jax_num_cpu_devices", host_devices)
    for name, value in _COMPILATION_CACHE.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
