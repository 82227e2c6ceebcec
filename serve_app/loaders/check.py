"""Whether a model can be loaded, from its headers alone: the server looks before it starts anything.

Run as a program (`python -m serve_app.loaders.check`, a list of ModelSource as JSON on standard input), so that the
server's own process stays without torch. Exit code 0, or 2 with the sentence on standard error.
"""

import json
import sys
from typing import Any

from serve_app.errors import LaunchError, ModelFileError
from serve_app.loaders.headers import HeaderSource
from serve_app.loaders.isq import check_isq
from serve_app.loaders.model_files import ModelFiles, resolve
from serve_app.loaders.opening import find_args, open_checkpoint
from serve_app.options import IsqOptions, ModelSource


def check_model(files: ModelFiles) -> None:
    """Raises ModelFileError naming the file and the tensor or key that is missing, misshapen or not supported."""
    family, args = find_args(files)
    opened = open_checkpoint(files)
    check_isq(files, opened)
    family.build(args, HeaderSource(opened))


def main() -> int:
    """The program; returns the exit code."""
    try:
        for fields in json.load(sys.stdin):
            check_model(resolve(_source(fields)))
    except (ModelFileError, LaunchError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


def _source(fields: dict[str, Any]) -> ModelSource:
    isq = None if fields["isq"] is None else IsqOptions(**fields["isq"])
    return ModelSource(**{**fields, "files": tuple(fields["files"]), "isq": isq})


if __name__ == "__main__":
    sys.exit(main())
