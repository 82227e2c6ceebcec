"""How far quantising is, as a bar in the terminal."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn


class Bar:
    """See loaders.isq_progress.LoadProgress: tensor, bar, share, bytes of the source a second, time left.

    Nothing where there is no terminal.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        columns = (
            TextColumn("{task.fields[tensor]:<28}"),
            BarColumn(),
            TaskProgressColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        is_shown = console.is_terminal
        self._bar = Progress(*columns, console=console, transient=True, get_time=clock, disable=not is_shown)

    def start(self, title: str, total_bytes: int) -> None:
        """See LoadProgress."""
        self._task = self._bar.add_task(title, total=total_bytes, tensor=title)
        self._bar.start()

    def advance(self, tensor: str, num_bytes: int) -> None:
        """See LoadProgress."""
        self._bar.update(self._task, advance=num_bytes, tensor=tensor)

    def finish(self) -> None:
        """See LoadProgress."""
        self._bar.stop()
        self._bar.remove_task(self._task)


def steps_bar(console: Console) -> Progress:
    """A bar for work that is counted in steps; nothing where there is no terminal."""
    columns = (TextColumn("{task.description:<20}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


@contextmanager
def loading(console: Console, model_name: str, *, quantises: bool) -> Iterator[Bar | None]:
    """While a model is loaded: a bar where weights are quantised and there is a terminal, else a line and None."""
    if quantises and console.is_terminal:
        console.print(f"Loading {model_name} …")
        yield Bar(console)
    else:
        with console.status(f"Loading {model_name} …"):
            yield None
