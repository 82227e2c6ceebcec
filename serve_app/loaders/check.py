"""Whether a model can be loaded, from its headers alone: the server looks before it starts anything.

Run as a program (`python -m serve_app.loaders.check`, a ModelSource as JSON on standard input), so that the server's
own process stays without torch. Exit code 0, or 2 with the sentence on standard error.
"""

import json
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

from serve_app.errors import LaunchError, ModelFileError
from serve_app.loaders.isq import check_isq
from serve_app.loaders.model_files import ModelFiles, resolve
from serve_app.loaders.opening import find_args, open_checkpoint
from serve_app.loaders.weight_source import CheckpointSource
from serve_app.options import IsqOptions, ModelSource
from serve_app.quant.experts import DenseExperts, Experts
from serve_app.quant.weight import DenseWeight, Weight


class _Headers(CheckpointSource):
    """Checks every tensor as the real source does, and gives tensors without data."""

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        self._take(name, shape)
        return torch.empty(shape, device="meta")

    def weight(self, names: Sequence[str], out_features: Sequence[int], in_features: int) -> Weight:
        for name, out in zip(names, out_features, strict=True):
            self._take(name, (out, in_features))
        return DenseWeight(torch.empty((sum(out_features), in_features), device="meta"))

    def experts(self, name: str, num_experts: int, out_features: int, in_features: int) -> Experts:
        self._expert_parts(name, num_experts, out_features, in_features)
        return DenseExperts(torch.empty((num_experts, out_features, in_features), device="meta"))


def check_model(files: ModelFiles) -> None:
    """Raises ModelFileError naming the file and the tensor or key that is missing, misshapen or not supported."""
    family, args = find_args(files)
    opened = open_checkpoint(files)
    check_isq(files, opened)
    family.build(args, _Headers(opened, torch.float32, torch.device("meta")))


def main() -> int:
    """The program; returns the exit code."""
    fields = json.load(sys.stdin)
    fields["files"] = tuple(fields["files"])
    if fields.get("isq") is not None:
        fields["isq"] = IsqOptions(**fields["isq"])
    try:
        check_model(resolve(ModelSource(**fields)))
    except (ModelFileError, LaunchError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
