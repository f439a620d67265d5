"""The door of every script: a command line in, a frozen configuration and a work directory out.

    python experiments/sft.py --config=configs/sft.py:toyworld --config.sft.learning_rate=1e-4

All that can be wrong with a command line is found before any device is touched or any file is
written, and told in one line on stderr with exit code 2 (the other codes: instruct_jax/errors.py).
"""

import argparse
import errno
import inspect
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from instruct_jax.cli import processes
from instruct_jax.cli.config import (
    field_help,
    from_config,
    load,
    load_config,
    resolve,
    suggest,
)
from instruct_jax.cli.workdir import Run, describe, open_workdir
from instruct_jax.errors import ConfigError, RunError, StorageError

__all__ = [
    "HOST_DEVICE_FLAGS",
    "Run",
    "describe",
    "from_config",
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
    argv: Sequence[str] | None = None,
) -> None:
    """Calls `main(config, run)` as the command line says; a RunError becomes its exit code.

    `config_class` is a frozen dataclass, `default` the "FILE:NAME" of its usual values. Writes
    workdir/config.json before `main`: the resolved configuration, versions, commit and command.
    Compiled programs are kept in $JAX_COMPILATION_CACHE_DIR or ~/.cache/instruct_jax/xla. Where the
    environment says that there are several processes (processes.py) they meet first, and the first
    of them alone writes.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        flags, overrides = _parse(argv, main, default)
        loaded = load(flags.config, default=default)
        config = resolve(config_class, loaded.values, overrides)
        if flags.help:
            print(flags.usage + field_help(config, loaded.spec, loaded.presets))
            return
        workdir = flags.workdir or Path("runs", Path(loaded.spec.partition(":")[0]).stem)
        record = describe(config, loaded.spec, flags.mesh, argv)
        several = processes.announced()
        if several:
            _configure_jax(flags.host_devices)
            processes.join()
        with (
            processes.together(),
            _storage(workdir),
            open_workdir(workdir, config, record, overwrite=flags.overwrite),
        ):
            if not several:
                _configure_jax(flags.host_devices)
            main(config, Run(workdir, flags.mesh))
    except RunError as error:
        print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
        sys.exit(error.exit_code)


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
    def error(self, message: str) -> NoReturn:
        known = [option for action in self._actions for option in action.option_strings]
        unknown = re.match(r"unrecognized arguments: (-[^\s=]*)", message)
        raise ConfigError(message + (suggest(unknown[1], known) if unknown else ""))


def _parse(
    argv: Sequence[str], main: Callable[..., Any], default: str
) -> tuple[argparse.Namespace, dict[str, str]]:
    """The flags, and the overrides as "a.b" -> text."""
    parser = _Parser(
        description=inspect.getdoc(inspect.getmodule(main)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    flag = parser.add_argument
    flag("-h", "--help", action="store_true", help="this, and the fields of the configuration")
    flag(
        "--config",
        default=default,
        metavar="FILE:NAME",
        help=f"preset (default: {default}); NAME: one of the same file",
    )
    flag("--workdir", type=Path, metavar="DIR", help="the run's files (default: runs/FILE)")
    flag(
        "--mesh", default="auto", help="data, fsdp, tensor, sequence: data:2,fsdp:4 (default: auto)"
    )
    flag("--overwrite", action="store_true", help="delete the run in DIR instead of resuming it")
    flag("--host_devices", type=int, metavar="N", help="use the CPU as N devices")
    rest, overrides = split_overrides(argv)
    flags = parser.parse_args(rest)
    flags.usage = parser.format_help()
    if flags.host_devices is not None and flags.host_devices < 1:
        raise ConfigError(f"--host_devices={flags.host_devices}: expected 1 or more")
    return flags, overrides


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


def _configure_jax(host_devices: int | None) -> None:
    import jax  # a mistake on the command line should not wait for it

    # What Orbax logs with a traceback it also raises, and that is told in one line.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    if host_devices is not None:
        os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *HOST_DEVICE_FLAGS])
        jax.config.update("jax_num_cpu_devices", host_devices)
    for name, value in _COMPILATION_CACHE.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)
