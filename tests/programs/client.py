"""A server of programs (`server.py`) to talk to, and a chain of finished runs to start from."""

import json
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.conftest import REPOSITORY
from tests.experiments import scripts
from tests.programs import chain


class Programs:
    """All programs, each finished once, in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.commands = chain.commands(folder, chain.write_rows(folder / "data"))
        self._log = folder / "log"
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.programs.server"], cwd=REPOSITORY, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=scripts.environment(REPOSITORY),
        )  # fmt: skip
        self.events: dict[str, int] = {}
        """How often each program changed the file system."""
        self.states: dict[str, dict[str, str]] = {}
        """What each had left, where a test put that down."""

    def ask(self, **job: Any) -> dict[str, Any]:
        """One job of the server."""
        assert self._server.stdin and self._server.stdout
        print(json.dumps(job), file=self._server.stdin, flush=True)
        return json.loads(self._server.stdout.readline())

    def run(self, *command: str, below: Path | None = None, kill_at: int = 0) -> tuple[int, str]:
        """The exit code and what was printed."""
        extra = {} if below is None else {"below": str(below), "kill_at": kill_at}
        answer = self.ask(run=command, log=str(self._log), **extra)
        self.last_events = answer["events"]
        return answer["code"], self._log.read_text(errors="replace")

    def finish(self, *names: str) -> None:
        """Runs these."""
        for name in names:
            code, text = self.run(*self.commands[name], below=self.folder / name)
            assert code == 0, (name, text)
            self.events[name] = self.last_events

    def state(self, name: str) -> dict[str, str]:
        """What a program has left: {path: hash}."""
        return self.ask(state=str(self.folder / name))["files"]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._server.stdin
        assert self._server.stdout
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait()
