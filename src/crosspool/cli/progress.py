"""Shows how far weights have come: bars on a terminal, one line a model in a log."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TransferSpeedColumn,
)
from rich.text import Text

from crosspool.cli.sizes import format_bytes
from crosspool.core.info import LoadProgress


class _Amount(ProgressColumn):
    """How much is done, in bytes or in whatever the task counts."""

    def __init__(self) -> None:
        super().__init__()
        self._bytes = DownloadColumn(binary_units=True)

    def render(self, task: Task) -> Text:
        if task.fields["unit"] == "bytes":
            return self._bytes.render(task)
        return Text(f"{task.completed:.0f}/{task.total or 0:.0f} {task.fields['unit']}")


class LoadBars:
    """A context manager that is called with every LoadProgress. Everything goes to ``console``."""

    def __init__(self, console: Console, verb: str) -> None:
        self._console = console
        self._verb = verb
        self._tasks: dict[str, TaskID] = {}
        self._done: set[str] = set()
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            _Amount(),
            TransferSpeedColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> LoadBars:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Take the bars off the terminal's last lines. May be called twice."""
        self._bars.stop()

    def __call__(self, progress: LoadProgress) -> None:
        if progress.model not in self._tasks:
            self._tasks[progress.model] = self._bars.add_task(progress.model, total=None, unit=progress.unit)
        self._bars.update(
            self._tasks[progress.model], completed=progress.done_bytes, total=progress.total_bytes
        )
        if progress.model in self._done:
            return
        if progress.error is not None:
            self._say(progress.model, f"{progress.model} will not be served: {progress.error}")
        elif progress.done_bytes >= progress.total_bytes and not self._console.is_terminal:
            amount = format_bytes(progress.total_bytes)
            if progress.unit != "bytes":
                amount = f"{progress.total_bytes} {progress.unit}"
            self._say(progress.model, f"{self._verb} {progress.model}, {amount}")

    def _say(self, model: str, line: str) -> None:
        self._done.add(model)
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
