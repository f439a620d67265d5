"""How far a long reading of files is: a bar on a terminal, now and then a line elsewhere."""

import sys
import time
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import BinaryIO, Self

from tqdm import tqdm

DELAY = 5.0  # seconds of work before anything is shown
LINE_SECONDS = 15.0  # off a terminal, at most one line in this time


class Progress:
    """Counts bytes of named files and tokens made of them; what takes a moment is not shown."""

    def __init__(self, title: str, sizes: Mapping[str, int]) -> None:
        """The bytes of each name; where they are unknown there is no estimate of the end."""
        self.title = title
        self._left = dict(sizes)
        self._total = sum(sizes.values())
        self._file: BinaryIO | None = None
        self._tokens, self._began, self._printed = 0, time.monotonic(), time.monotonic()
        self._first: int | None = None  # bytes read before the first token was made
        self._bar = tqdm(
            total=self._total or None, desc=title, unit="B", unit_scale=True, delay=DELAY,
            disable=not sys.stderr.isatty(), file=sys.stderr,
        )  # fmt: skip

    def watch(self, file: BinaryIO) -> None:
        """`file` is being read from now on."""
        self._file = file

    def end(self, names: Iterable[str]) -> None:
        """These names are read to their end."""
        self._file = None
        self._left |= dict.fromkeys(names, 0)

    def show(self, tokens: int) -> None:
        """So many more tokens were made."""
        done, now = self._done(), time.monotonic()
        if self._first is None:
            self._first, self._began = done, now  # what is only skipped tells nothing of the speed
        else:
            self._tokens += tokens
        rate = self._tokens / max(now - self._began, 1e-9)
        self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self._bar.update(done - self._bar.n)
        if self._bar.disable and self._tokens and now - self._printed >= LINE_SECONDS:
            self._printed = now
            read = done - self._first
            left = (self._total - done) * (now - self._began) / read / 60 if read > 0 else 0
            share = f"{done / self._total:.0%} of {self._total / 1e9:.3g} GB, " if done else ""
            ends = f", {left:.0f} min left" if left else ""
            print(f"{self.title}: {share}{rate:,.0f} tokens/s{ends}", file=sys.stderr, flush=True)

    def _done(self) -> int:
        here = 0 if self._file is None or self._file.closed else self._file.tell()
        return self._total - sum(self._left.values()) + here

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.close()
