"""Runs programs, and takes stock of what they left, each time in a child of a process that has
everything imported: `python -m tests.programs.server`, one JSON object a line in and out.

    {"run": [SCRIPT, ARGUMENT, ...], "log": FILE, "below": FOLDER, "kill_at": N}
        -> {"code": exit code, -9 if killed, "events": changes below FOLDER by Python}
    {"state": FOLDER}
        -> {"files": {path: hash of what in it depends on nothing but the command}}

With `kill_at` the N-th change of the file system below FOLDER is met by a SIGKILL, before it is
made: a file opened to be written, renamed or removed, a folder made or removed.
"""

import hashlib
import importlib
import json
import os
import runpy
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from instruct_jax import cli

# Imported before the first fork; none of these starts a device.
SCRIPTS = (
    "arithmetic", "checkpoint", "collect", "convert", "corpus", "evaluate", "ppo", "preference",
    "prepare", "pretrain", "reward_model", "select_sft", "sft",
)  # fmt: skip
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# What in JSON depends on the machine and the time of day, or says what such files hash to.
VOLATILE = {
    "sha256", "process", "started", "artefacts", "time", "seconds", "memory_mb", "batches",
    "steps_per_second", "tokens_per_second", "batch_wait_seconds", "params/manifest.json",
    "mtime_ns", "command", "productive_seconds", "inputs", "said",
}  # fmt: skip


def watch(below: str, kill_at: int) -> list[int]:
    """Counts the changes below a folder in the list that it returns, and kills at one of them."""
    count = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = flags & WRITING if mode is None else set(mode) & set("wxa+")
        else:
            path, writes = (arguments[0] if arguments else None), event in CHANGES
        named = writes and isinstance(path, str | bytes | os.PathLike)
        if named and os.path.abspath(os.fsdecode(path)).startswith(below):
            count[0] += 1
            if count[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return count


def run(job: dict[str, Any]) -> dict[str, Any]:
    """One program, to its end."""
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    script, *arguments = job["run"]
    count = watch(job["below"], job["kill_at"]) if job.get("below") else [0]
    sys.argv = [f"experiments/{script}.py", *arguments]
    code = 0
    try:
        if script == "checkpoint":
            importlib.import_module("experiments.checkpoint").main(arguments)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    return {"code": code, "events": count[0]}


def state(folder: Path) -> dict[str, str]:
    """{path: hash} of all in a run's directory; of arrays, that of the numbers in them."""
    return {name: hashlib.sha256(data).hexdigest()[:16] for name, data in sorted(_contents(folder))}


def _contents(folder: Path) -> Iterator[tuple[str, bytes]]:
    import jax
    import numpy as np

    from instruct_jax.training.checkpoint import load_item
    from instruct_jax.training.mesh import tree_paths
    from instruct_jax.training.ocp import checkpointables_metadata

    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in ("tensorboard", "damaged")]
        if "_CHECKPOINT_METADATA" in files or "orbax.checkpoint" in files:
            folders.clear()
            name = str(Path(root).relative_to(folder))
            about = checkpointables_metadata(root)
            yield f"{name}:metadata", _json(about.custom_metadata)
            for item in about.metadata:
                for path, leaf in tree_paths(load_item(root, item)):
                    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                        leaf = jax.random.key_data(leaf)
                    yield f"{name}:{item}/{path}", np.asarray(leaf).tobytes()
            continue
        for file in files:
            path = Path(root, file)
            data = path.read_bytes()
            if file == "ledger.log":
                continue
            if path.suffix in (".json", ".jsonl"):
                lines = data.splitlines() if path.suffix == ".jsonl" else [data]
                data = _json([json.loads(line) for line in lines])
            yield str(path.relative_to(folder)), data


def _json(value: Any) -> bytes:
    return json.dumps(_steady(value), sort_keys=True).encode()


def _steady(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _steady(v) for k, v in value.items() if k not in VOLATILE}
    return [_steady(v) for v in value] if isinstance(value, list) else value


def main() -> None:
    """Answers until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for script in SCRIPTS:
        importlib.import_module(f"experiments.{script}")
    for line in sys.stdin:
        job = json.loads(line)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            cli.hush()
            answer = run(job) if "run" in job else {"files": state(Path(job["state"]))}
            os.write(writer, json.dumps(answer).encode())
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            text = pipe.read()
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(text or json.dumps({"code": status, "events": -1}), file=answers, flush=True)


if __name__ == "__main__":
    main()
