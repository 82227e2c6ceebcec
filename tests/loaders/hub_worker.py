"""Resolves hub ids, one JSON line each, in a process of its own: huggingface_hub reads its environment only once."""

import json
import sys

from serve_app.errors import LaunchError, ModelFileError
from serve_app.loaders.model_files import resolve
from serve_app.options import ModelSource

for line in sys.stdin:
    try:
        files = resolve(ModelSource(**json.loads(line)))
        answer = {"kind": files.kind, "name": files.model_name, "files": [p.name for p in files.weight_files]}
    except (LaunchError, ModelFileError) as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(answer), flush=True)
