"""What people see: tables, and of a long run bars with rate and time left, on standard error, and only if that is a terminal."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

SLOW = 1.0  # seconds that a stage has to last for a bar


class RateColumn(ProgressColumn):
    """Items per second, or seconds per item where that is the larger number."""

    def render(self, task: Task) -> Text:
        """The rate of one bar."""
        speed = task.finished_speed or task.speed
        if not speed:
            return Text("")
        return Text(f"{speed:.1f}/s" if speed >= 1 else f"{1 / speed:.1f} s each", style="progress.data.speed")


class Bars:
    """Progress bars, one for each stage that lasts; calling it reports progress (`gladad.core.records.Progress`)."""

    def __init__(self, progress: Progress):
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}
        self._stage, self._since = "", time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Report that ``done`` of ``total`` are done in a stage."""
        if stage != self._stage:
            self._stage = stage
            self._tasks.pop(stage, None)
        if stage not in self._tasks and done < total and time.monotonic() - self._since > SLOW * (done / total):
            self._tasks[stage] = self._progress.add_task(stage, total=total)
        if stage in self._tasks:
            self._progress.update(self._tasks[stage], completed=done, total=total)
        if done >= total:
            self._since = time.monotonic()


@contextmanager
def bars(quiet: bool) -> Iterator[Bars]:
    """Show progress while the block runs; nothing if quiet, or if standard error is not a terminal."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), RateColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=quiet or not console.is_terminal) as progress:
        yield Bars(progress)


@contextmanager
def waiting(text: str, quiet: bool) -> Iterator[None]:
    """Show that something of unknown length is going on; nothing if quiet, or if standard error is not a terminal."""
    console = Console(stderr=True)
    with console.status(text) if console.is_terminal and not quiet else nullcontext():
        yield


def show(table: Table, rows: Iterable[Sequence[object]]) -> None:
    """Print a table, whose cells may hold any text."""
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    Console().print(table)
