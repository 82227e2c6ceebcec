"""The bar in a terminal, and the line where there is none."""

import io
import re

from rich.console import Console

from serve_app.commands.progress import Bar, loading, steps_bar


def console(*, is_terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=is_terminal, width=120, force_interactive=is_terminal), out


def plain(out: io.StringIO) -> str:
    """Without colours."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())


def test_the_bar_shows_tensor_share_speed_and_what_is_left() -> None:
    terminal, out = console(is_terminal=True)
    now = 50.0
    bar = Bar(terminal, lambda: now)
    for _ in range(2):  # into a cache and out of it again, say
        bar.start("Q4_K", 4_000_000)
        for tensor in ("blk.0.attn_k.weight", "blk.0.attn_q.weight"):
            now += 2.0
            bar.advance(tensor, 1_000_000)
        bar._bar.refresh()
        bar.finish()
        assert re.search(r"blk\.0\.attn_q\.weight .* 50% .*500\.0 kB/s .*0:00:04", plain(out))
        out.truncate(0)


def test_a_bar_without_a_terminal_says_nothing() -> None:
    elsewhere, out = console(is_terminal=False)
    bar = Bar(elsewhere)
    bar.start("Q4_K", 4)
    bar.advance("blk.0.attn_q.weight", 4)
    bar.finish()
    with steps_bar(elsewhere) as steps:
        steps.advance(steps.add_task("x", total=1))
    assert out.getvalue() == ""


def test_a_terminal_has_a_bar_while_weights_are_quantised() -> None:
    terminal, out = console(is_terminal=True)
    with loading(terminal, "a model", quantises=True) as bar:
        assert isinstance(bar, Bar)
    assert "Loading a model" in out.getvalue()


def test_elsewhere_the_log_is_told() -> None:
    for is_terminal, quantises in ((False, True), (True, False)):
        terminal, _ = console(is_terminal=is_terminal)
        with loading(terminal, "a model", quantises=quantises) as bar:
            assert bar is None
