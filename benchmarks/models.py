"""Makes models of random weights in the true sizes of known ones, for measurements of speed; their text is noise.

    python -m benchmarks.models llama-1b FOLDER [--vocabulary FILE.gguf]
    python -m benchmarks.models qwen-0.5b FOLDER --quantize PATH/llama-quantize --types Q4_K_M,Q8_0,Q6_K,Q4_0
    python -m benchmarks.models llama-1b FOLDER --formats '' --openvino PATH/python --weight-formats int4,int8

Writes FOLDER/NAME-BF16.gguf (or -F16), FOLDER/NAME/ (a Hugging Face folder with the same weights), and from these
FOLDER/NAME-TYPE.gguf and FOLDER/NAME-openvino-FORMAT/. What is there already is kept.

qwen-0.5b has Qwen2.5-0.5B's sizes (rows of 896, 14 heads, 2 key-value heads, 24 layers, 151936 tokens, tied head) but
is a Llama without biases, so that engines without a Qwen can run it too. Rows of 896 are no multiple of 256:
llama-quantize then takes Q5_0 and Q8_0 for many matrices of the K-quant mixtures.
"""

import argparse
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.random_models.folder_writer import write_folder
from benchmarks.random_models.gguf_writer import write_gguf
from benchmarks.random_models.shapes import SHAPES
from benchmarks.random_models.vocabulary import make_vocabulary, vocabulary_from_gguf
from serve_app.cpu_info import num_cores


def gguf_path(folder: Path, name: str, quant_type: str) -> Path:
    """Where the GGUF of a model and type lies."""
    return folder / f"{name}-{quant_type}.gguf"


def openvino_path(folder: Path, name: str, weight_format: str) -> Path:
    """Where the OpenVINO export of a model lies."""
    return folder / f"{name}-openvino-{weight_format}"


def main(arguments: list[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    shape, folder = SHAPES[args.shape], args.folder
    folder.mkdir(parents=True, exist_ok=True)
    source = gguf_path(folder, shape.name, args.dtype.upper())
    formats = _words(args.formats)
    if formats:
        if args.vocabulary is None:
            vocabulary = make_vocabulary(shape.vocab_size)
        else:
            vocabulary = vocabulary_from_gguf(args.vocabulary, shape.vocab_size)
        if "gguf" in formats:
            _make(source, lambda path: write_gguf(path, shape, vocabulary, args.dtype, args.seed))
        if "hf" in formats:
            _make(folder / shape.name, lambda path: write_folder(path, shape, vocabulary, args.dtype, args.seed))
    if args.quantize is not None:
        for quant_type in _words(args.types):
            _make(gguf_path(folder, shape.name, quant_type), _quantizer(args.quantize, source, quant_type))
    if args.openvino is not None:
        for weight_format in _words(args.weight_formats):
            export = _exporter(args.openvino, folder / shape.name, weight_format)
            _make(openvino_path(folder, shape.name, weight_format), export)


def _make(path: Path, write: Callable[[Path], None]) -> None:
    """Writes under another name first: what bears the right one is whole."""
    if path.exists():
        print(f"{path}: is there")
        return
    start = time.perf_counter()
    unfinished = path.with_name(f"{path.name}.unfinished")
    write(unfinished)
    unfinished.rename(path)
    print(f"{path}: {_size(path) / 1e6:.1f} MB in {time.perf_counter() - start:.1f} s", flush=True)


def _quantizer(program: Path, source: Path, quant_type: str) -> Callable[[Path], None]:
    def quantize(path: Path) -> None:
        command = [str(program), str(source), str(path), quant_type, str(num_cores())]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    return quantize


def _exporter(python: Path, source: Path, weight_format: str) -> Callable[[Path], None]:
    """optimum-cli lies beside its environment's python."""

    def export(path: Path) -> None:
        task = ["--task", "text-generation-with-past", "--weight-format", weight_format]
        command = [str(python.parent / "optimum-cli"), "export", "openvino", "--model", str(source), *task, str(path)]
        subprocess.run(command, check=True)

    return export


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*"))


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--formats", default="gguf,hf", help="what to make of random weights: gguf, hf, both or ''")
    parser.add_argument("--dtype", choices=["bf16", "f16"], default="bf16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocabulary", type=Path, help="a GGUF to take a byte-level BPE vocabulary from")
    parser.add_argument("--quantize", type=Path, metavar="PATH", help="a llama-quantize program")
    parser.add_argument("--types", default="Q4_K_M,Q8_0,Q6_K,Q4_0", help="what to quantise to")
    parser.add_argument("--openvino", type=Path, metavar="PYTHON", help="an environment's python with optimum-intel")
    parser.add_argument("--weight-formats", default="int4,int8")
    return parser


if __name__ == "__main__":
    main()
