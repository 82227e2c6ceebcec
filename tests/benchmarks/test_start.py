"""The start benchmark with a made-up llama-server, and its table."""

import json
import sys
from pathlib import Path

import pytest

from benchmarks import models, start
from benchmarks.start import Start

SERVER = """#!{python}
import json
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

answers = iter([503, 503, 200])

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(next(answers) if self.path == "/health" else 404)
        self.end_headers()

HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


def program(path: Path, body: str) -> Path:
    """An executable of the given text."""
    path.write_text(body.format(python=sys.executable))
    path.chmod(0o755)
    return path


def test_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models.main(["tiny", str(tmp_path), "--formats", "gguf"])
    server = program(tmp_path / "llama-server", SERVER)
    options = ["--llama-server", str(server), "--rounds", "1", "--threads", "1", "--json", str(tmp_path / "out.json")]
    start.main([str(tmp_path / "tiny-BF16.gguf"), *options])
    (found,) = json.loads((tmp_path / "out.json").read_text())
    assert 0 < found["load_s"] < found["process_s"]
    assert found["llama_s"] > 0.02  # two refusals, a pause behind each
    assert found["peak_rss_mb"] > 50
    assert "| process to ready |" in capsys.readouterr().out


def test_a_server_that_ends_is_an_error(tmp_path: Path) -> None:
    server = program(tmp_path / "llama-server", "#!{python}\nraise SystemExit(3)\n")
    with pytest.raises(RuntimeError, match="ended with 3"):
        start.llama_start_s(server, tmp_path / "no.gguf", 1)


def test_the_table_takes_ratios_of_pairs() -> None:
    text = start.table([Start(3.0, 1.0, 900, 1.0), Start(4.0, 2.0, 950, 4.0), Start(6.0, 3.0, 940, 3.0)])
    assert "| process to ready | 4.00 (3.00–6.00) | 2.00 [1.00, 3.00] |" in text
    assert "| of which the model | 2.00 (1.00–3.00) | 1.00 [0.50, 1.00] |" in text
    assert "| llama-server | 3.00 (1.00–4.00) | |" in text
    assert text.endswith("peak memory 950 MB")
