"""The bar in a terminal, and the line where there is none."""

import io

from rich.console import Console

from serve_app.commands.progress import Bar, loading


def console(*, is_terminal: bool) -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=is_terminal, width=120, force_interactive=is_terminal), out


def test_the_bar_shows_tensor_share_and_speed() -> None:
    terminal, out = console(is_terminal=True)
    with loading(terminal, "a model", quantises=True) as bar:
        assert isinstance(bar, Bar)
        for _ in range(2):  # into a cache and out of it again, say
            bar.start("Q4_K", 4_000_000)
            bar.advance("blk.0.attn_q.weight", 1_000_000)
            bar._bar.refresh()
            bar.finish()
    assert "Loading a model" in out.getvalue()
    assert "blk.0.attn_q.weight" in out.getvalue()
    assert "25%" in out.getvalue()


def test_elsewhere_the_log_is_told() -> None:
    for is_terminal, quantises in ((False, True), (True, False)):
        terminal, _ = console(is_terminal=is_terminal)
        with loading(terminal, "a model", quantises=quantises) as bar:
            assert bar is None
