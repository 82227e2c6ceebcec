"""Loads a small model, says so, waits for a line, then loads another one with in-situ quantization, and says so.

Arguments: the small model, the other one, its options as JSON. The parent looks at this process's memory meanwhile.
"""

import json
import sys
from typing import Any

from kernels.dispatch import set_num_threads
from serve_app.loaders.load import load_model
from serve_app.loaders.model_files import resolve
from serve_app.options import IsqOptions, ModelSource


def load(path: str, **isq: Any) -> object:
    files = resolve(ModelSource(model=path, isq=IsqOptions(**isq)))
    return load_model(files, dtype="auto", device="cpu")


set_num_threads(2)
load(sys.argv[1], **json.loads(sys.argv[3]) | {"cache": None})
print("ready", flush=True)
sys.stdin.readline()
loaded = load(sys.argv[2], **json.loads(sys.argv[3]))
print("loaded", flush=True)
sys.stdin.readline()
