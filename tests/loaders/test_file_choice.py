import pytest

from serve_app.errors import ModelFileError
from serve_app.loaders.file_choice import choose_files, choose_gguf, choose_plain, detect_kind

SHARDS = [f"big-Q4_K_M-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
REPO = ["README.md", "config.json", "tokenizer.json", "m-Q4_0.gguf", "m-Q8_0.gguf", "mmproj-m-f16.gguf", *SHARDS]


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["m-Q4_0.gguf"], ["m-Q4_0.gguf"]),
        (["*Q8_0*"], ["m-Q8_0.gguf"]),
        (["*Q4_K_M*"], SHARDS),
        ([SHARDS[1]], SHARDS),
        ([SHARDS[2], SHARDS[0], SHARDS[1]], SHARDS),
        (["m-Q4_0.gguf", "m-Q8_0.gguf"], ["m-Q4_0.gguf", "m-Q8_0.gguf"]),
    ],
)
def test_gguf_by_name_and_glob(patterns: list[str], expected: list[str]) -> None:
    assert choose_gguf(REPO, patterns, "repo") == expected


def test_the_only_gguf_needs_no_name() -> None:
    assert choose_gguf(["m.gguf", "mmproj-m.gguf", "imatrix.gguf"], [], "repo") == ["m.gguf"]
    assert choose_gguf(["x/m.gguf"], [], "repo") == ["x/m.gguf"]
    assert choose_gguf(SHARDS, [], "repo") == SHARDS


@pytest.mark.parametrize(
    ("names", "patterns", "sentence"),
    [
        (REPO, [], "repo: holds several GGUF models, choose one with -f: big-Q4_K_M-00001"),
        (REPO, ["m-*"], "repo: holds several GGUF models, choose one with -f: m-Q4_0.gguf, m-Q8_0.gguf$"),
        (REPO, ["*Q9*"], r"repo: no file matches -f \*Q9\*; its .gguf files: big"),
        (["a.txt"], ["*.gguf"], "repo: no file matches .*its .gguf files: none"),
        (["a.txt"], [], "repo: holds no .gguf file"),
        (["mmproj-m.gguf"], [], "repo: holds no .gguf file"),
        (SHARDS[:2], [], "repo: big-Q4_K_M-00003-of-00003.gguf is missing, shard of a split GGUF"),
        ([f"{i}.gguf" for i in range(99)], [], r"repo: holds several .*… \(99 in all\)$"),
    ],
)
def test_gguf_refusals(names: list[str], patterns: list[str], sentence: str) -> None:
    with pytest.raises(ModelFileError, match=sentence):
        choose_gguf(names, patterns, "repo")


def test_plain_prefers_hugging_faces_layout() -> None:
    names = ["consolidated.safetensors", "model-00002-of-00002.safetensors", "model-00001-of-00002.safetensors"]
    assert choose_plain(names, "repo") == sorted(names[1:])
    assert choose_plain(["weights.safetensors", "original/model.safetensors"], "repo") == ["weights.safetensors"]
    with pytest.raises(ModelFileError, match=r"repo: holds no \.safetensors file"):
        choose_plain(["pytorch_model.bin"], "repo")


@pytest.mark.parametrize(
    ("names", "files", "kind", "expected"),
    [
        (["model.safetensors", "m.gguf"], [], "auto", "plain"),
        (["model.safetensors", "m.gguf"], ["m.gguf"], "auto", "gguf"),
        (["model.safetensors", "m.gguf"], [], "gguf", "gguf"),
        (["m.gguf"], [], "auto", "gguf"),
        (["x/m.safetensors"], [], "auto", "auto"),
        ([], ["a.safetensors"], "auto", "plain"),
    ],
)
def test_kind(names: list[str], files: list[str], kind: str, expected: str) -> None:
    assert detect_kind(names, files, kind) == expected  # type: ignore[arg-type]


def test_small_files_come_along_and_others_do_not() -> None:
    names = [*REPO, "additional_chat_templates/rag.jinja", "pytorch_model.bin", "sub/config.json"]
    assert choose_files(names, ["*Q8_0*"], "auto", "repo") == [
        "m-Q8_0.gguf", "config.json", "tokenizer.json", "additional_chat_templates/rag.jinja"
    ]  # fmt: skip
    with pytest.raises(ModelFileError, match=r"neither \.safetensors nor .gguf"):
        choose_files(["pytorch_model.bin"], [], "auto", "repo")
