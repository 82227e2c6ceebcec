"""Does some work with a small model, says so, waits for a line, does it with another one, and says so.

Arguments: the work's name, and the arguments of either as a JSON object. The parent looks at this process's memory
meanwhile.
"""

import json
import sys
from pathlib import Path
from typing import Any

import serve_app
from kernels.dispatch import set_num_threads
from serve_app.__main__ import main
from serve_app.engine.calibration import measure_inputs
from serve_app.loaders.load import load_model
from serve_app.loaders.model_files import resolve
from serve_app.options import IsqOptions, ModelSource


def load(model: str, **isq: Any) -> object:
    """Quantised while it is loaded."""
    files = resolve(ModelSource(model=model, isq=IsqOptions(**isq)))
    return load_model(files, dtype="auto", device="cpu")


def quantize(model: str, output: str, **options: str) -> None:
    """By the command."""
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    assert main(["quantize", "-m", model, "-o", output, "--threads", "2", *words]) == 0


def calibrate(model: str, tokenizer: str) -> object:
    """Over the text that comes along, two chunks of it."""
    text = (Path(serve_app.__file__).parent / "assets" / "stories.txt").read_text(encoding="utf-8")
    return measure_inputs(resolve(ModelSource(model=model, tokenizer=tokenizer)), text, max_chunks=2)


set_num_threads(2)
work = {"load": load, "quantize": quantize, "calibrate": calibrate}[sys.argv[1]]
work(**json.loads(sys.argv[2]))
print("ready", flush=True)
sys.stdin.readline()
kept = work(**json.loads(sys.argv[3]))
print("loaded", flush=True)
sys.stdin.readline()
