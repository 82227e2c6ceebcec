import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

import kernels
from serve_app import __main__, cli
from serve_app.cli import Invocation
from serve_app.cli_grammar import ALIASES, COMMANDS, GROUPS, KINDS, LATER_KINDS, Command, option_names
from serve_app.cli_isq_options import InSituOptions
from serve_app.config import AppConfig, IsqConfig
from serve_app.errors import LaunchError
from serve_app.options import IsqOptions, SpeculationOptions

# Options that the help of some kinds leaves out.
HIDDEN = {"--quantized-filename": ("plain",), "--gqa": ("plain", "gguf"), "--model-id": ("toml",)}


def parsed(line: str) -> Invocation:
    invocation = cli.parse(line.split())
    assert invocation is not None
    return invocation


def test_nothing_means_serving_the_embedded_model() -> None:
    assert parsed("") == Invocation(command="serve", config=AppConfig())
    assert parsed("").config.http.port == 1234
    assert parsed("").config.http.host == "127.0.0.1"


@pytest.mark.parametrize(
    "line",
    [
        "serve --port 8080 --max-seqs 16 gguf -m org/repo -f a.gguf --no-paged-attn",
        "gguf -m org/repo -f a.gguf --port 8080 --max-seqs 16 --no-paged-attn",
        "--port=8080 --max-seqs=16 --no-paged-attn -morg/repo -fa.gguf gguf",
        "-p8080 gguf --quantized-model-id org/repo --no-paged-attn --quantized-file a.gguf --max-seqs 16",
        "-p 8080 serve --max-seqs 16 --no-paged-attn -m org/repo -f a.gguf",
    ],
)
def test_options_stand_on_both_sides_of_command_and_kind(line: str) -> None:
    config = parsed(line).config
    assert config.to_args() == {
        "http": {"port": 8080},
        "engine": {"max_seqs": 16, "paged_attention": False},
        "model": {"model": "org/repo", "kind": "gguf", "files": ["a.gguf"]},
    }


def test_the_line_of_the_specification() -> None:
    config = parsed(
        "--port 8080 --host 0.0.0.0 --log info --max-seqs 16 --prefix-cache-n 16 --no-paged-attn "
        "--token-source env:HF_TOKEN --request-logging-file requests.jsonl gguf -m REPO_OR_DIR -f FILE"
    ).config
    assert (config.http.host, config.http.request_logging_file) == ("0.0.0.0", "requests.jsonl")
    assert (config.engine.prefix_cache_n, config.model.token_source) == (16, "env:HF_TOKEN")


def test_a_value_that_looks_like_a_kind_or_command_stays_a_value() -> None:
    config = parsed("--served-model-name gguf plain -m serve").config
    assert (config.http.served_model_name, config.model.kind, config.model.model) == ("gguf", "plain", "serve")
    chat = parsed("chat --system --json")
    assert chat.chat.system == "--json"


def test_kinds() -> None:
    assert parsed("plain -m x").config.model.kind == "plain"
    assert parsed("run -m x").config.model.kind == "auto"
    assert parsed("-m x").config.model.kind == "auto"
    assert parsed("run").config.model.model is None
    assert parsed("-m x -f y.gguf").config.model.kind == "gguf"
    assert parsed("-m x -f y.bin").config.model.kind == "auto"
    ggml = parsed("ggml -m x -f y.bin -t tokens -g 8").config.model
    assert (ggml.kind, ggml.files, ggml.tokenizer, ggml.gqa) == ("ggml", ("y.bin",), "tokens", 8)


def test_an_architecture_is_named_for_every_kind() -> None:
    for line in ("plain -m x -a mistral", "gguf -m x --arch mistral", "-a mistral -m x", "run -m x --arch=mistral"):
        assert parsed(line).config.model.arch == "mistral"
        assert parsed(line).config.to_args()["model"]["arch"] == "mistral"


def test_file_names() -> None:
    assert parsed("gguf -m d -f a;b -f *.gguf").config.model.files == ("a", "b", "*.gguf")
    local = parsed("gguf -f models/a-1.gguf;models/a-2.gguf").config.model
    assert (local.model, local.files) == ("models", ("a-1.gguf", "a-2.gguf"))


def test_repeated_keys_and_last_value_wins() -> None:
    config = parsed("--api-key one --port 1 --api-key env:TWO --port 2").config
    assert config.http.api_keys == ("one", "env:TWO")
    assert config.http.port == 2


def test_chat_and_doctor_have_options_of_their_own() -> None:
    chat = parsed("chat --temperature 0 --top-k 5 --max-tokens 7 --system hello --seed 3 plain -m x")
    assert (chat.chat.temperature, chat.chat.top_k, chat.chat.max_tokens, chat.chat.system) == (0.0, 5, 7, "hello")
    assert chat.config.engine.seed == 3
    chat = parsed("chat speculative -m x -d y -n 3")
    assert chat.config.speculation.to_options() == SpeculationOptions(use="auto", max_tokens=3)
    assert chat.config.speculation.draft is not None
    assert parsed("chat -m x --speculation ngram").config.speculation.use == "ngram"
    assert parsed("doctor --json").as_json
    assert not parsed("doctor").as_json


def test_quantize_has_options_of_its_own() -> None:
    words = parsed("quantize -m x --isq Q4K,Q8_0 -o a.gguf --imatrix i.dat --threads 2 --isq-organization pure")
    assert (words.quantize.isq, words.quantize.output, words.quantize.imatrix) == ("Q4K,Q8_0", "a.gguf", "i.dat")
    assert (words.quantize.num_threads, words.quantize.isq_organization) == (2, "pure")
    assert words.config.model.model == "x"


@pytest.mark.parametrize("option", ["--dtype f16", "--max-seq-len 64", "--max-seq-len=64"])
@pytest.mark.parametrize("form", ["quantize {} -m x --isq Q4K", "{} quantize gguf -m x --isq Q4K"])
def test_quantize_refuses_what_changes_nothing_in_a_file(option: str, form: str) -> None:
    with pytest.raises(LaunchError, match=rf"^The command quantize does not have {option[:7]}.*: .*\.$"):
        cli.parse(form.format(option).split())
    assert parsed(form.replace("quantize", "quality").format(option)).command == "quality"


def test_every_option_reaches_the_configuration() -> None:
    """Each option of serve, given a value other than its default, changes the configuration."""
    flags = {"--offline", "--no-paged-attn", "--strict-model-name", "--cpu-exact", "--no-cuda-graphs", "--no-overlap"}
    flags |= {"--fixed-draft-tokens"}
    values = {
        "--dtype": "f16",
        "--kv-cache-dtype": "q8",
        "--pa-cache-type": "f8e4m3",
        "--token-source": "none",
        "--ingress": "handle",
        "--draft-gpu": "own",
        "--model-nodes": "models=yes",
        "--proxy": "python",
        "--log": "debug",
        "--pa-gpu-mem-usage": "0.5",
        "--pa-blk-size": "64",
        "--max-targets": "7",
        "--max-batched-tokens": "4096",
        "--isq": "Q4K",
        "--isq-organization": "pure",
        "--speculation": "ngram",
        "--num-draft-tokens": "7",
        "--draft-vocab": "text",
        "--draft-sampling": "sampled",
        "--draft-kind": "plain",
        "--draft-dtype": "f16",
        "--draft-isq": "Q4K",
    }
    in_situ = {name for names in option_names(InSituOptions).values() for name in names}
    for group in GROUPS["serve"]:
        for names in option_names(group).values():
            words = [] if names[0] in flags else [values.get(names[0], "17")]
            base = ["-m", "x", *(["--isq", "Q8_0"] if names[0] in in_situ - {"--isq"} else [])]
            base += ["-d", "y"] if "draft" in names[0] else []
            config = cli.parse([*base, names[0], *words])
            assert config is not None
            assert config.config != parsed(" ".join(base)).config, names


def test_in_situ_quantization_is_a_part_of_the_model() -> None:
    line = "--isq q4k plain -m x --imatrix i.dat --topology t.yml --isq-cache c"
    assert parsed(line).config.to_args()["model"]["isq"] == {
        "type": "q4k", "imatrix": "i.dat", "topology": "t.yml", "cache": "c",
    }  # fmt: skip
    options = parsed("--isq 4 -m x --isq-organization moqe --calibration-file t.txt").config.model.to_source().isq
    assert options == IsqOptions(type="4", experts_only=True, calibration_file="t.txt")
    assert parsed("chat -m x --topology t.yml").config.model.to_source().isq == IsqOptions(topology="t.yml")
    assert parsed("--isq-organization default -m x").config == parsed("-m x").config


def test_the_line_of_the_specification_for_speculation() -> None:
    config = parsed("--port 8080 speculative -m TARGET --isq Q4K -d DRAFT --draft-isq Q4K -n 5").config
    assert config.to_args() == {
        "http": {"port": 8080},
        "model": {"model": "TARGET", "isq": {"type": "Q4K"}},
        "speculation": {"use": "auto", "draft": {"model": "DRAFT", "isq": {"type": "Q4K"}}},
    }
    assert config.speculation.max_tokens == 5


@pytest.mark.parametrize("words", ["speculative gguf", "gguf", "serve speculative gguf --port 1"])
@pytest.mark.parametrize(
    ("options", "draft"),
    [
        ("-d D --draft-kind plain --draft-dtype bf16", {"model": "D", "kind": "plain", "dtype": "bf16"}),
        ("-d D --draft-file a.gguf", {"model": "D", "kind": "gguf", "files": ["a.gguf"]}),
        ("--draft-file d/a.gguf;d/b.gguf", {"model": "d", "kind": "gguf", "files": ["a.gguf", "b.gguf"]}),
        (
            "-d D --draft-kind ggml --draft-file a.bin --draft-gqa 8 --draft-tokenizer T --draft-arch llama",
            {"model": "D", "kind": "ggml", "files": ["a.bin"], "gqa": 8, "tokenizer": "T", "arch": "llama"},
        ),
    ],
)
def test_every_kind_stands_on_both_sides(words: str, options: str, draft: dict[str, object]) -> None:
    config = parsed(f"{words} -m M -f m.gguf {options}").config
    assert config.to_args()["model"] == {"model": "M", "kind": "gguf", "files": ["m.gguf"]}
    assert config.to_args()["speculation"] == {"use": "auto", "draft": draft}


def test_how_to_speculate() -> None:
    line = "-m M -d D -n 3 --fixed-draft-tokens --draft-deadline-ms 12.5 --draft-vocab text --speculation draft"
    assert parsed(line).config.speculation.to_options() == SpeculationOptions("draft", 3, True, 12.5, True)
    assert parsed("-m M -d D --draft-sampling sampled").config.to_args()["speculation"] == {
        "use": "auto", "draft_sampling": "sampled", "draft": {"model": "D"},
    }  # fmt: skip
    assert parsed("-m M -d D --draft-sampling greedy").config == parsed("-m M -d D").config
    assert parsed("-m M").config.speculation.use == "off"
    for kind in ("", "gguf", "ggml", "plain", "run", "speculative", "speculative plain"):
        assert parsed(f"{kind} -m M --speculation ngram -n 9").config.to_args()["speculation"] == {
            "use": "ngram", "max_tokens": 9,
        }  # fmt: skip
    assert parsed("-m M --speculation suffix").config.speculation.draft is None
    assert parsed("-m M --speculation off").config == parsed("-m M").config


def test_both_models_come_from_the_same_hub_and_are_kept_in_the_same_folder() -> None:
    line = "-m M -d D --token-source none --hf-cache-path h --offline --isq Q8_0 --isq-cache c --draft-isq Q4K"
    draft = parsed(line).config.speculation.draft
    assert draft is not None
    assert (draft.token_source, draft.hf_cache, draft.offline) == ("none", "h", True)
    assert draft.isq == IsqConfig(type="Q4K", cache="c")
    without = parsed("-m M -d D --isq Q8_0 --isq-cache c").config.speculation.draft
    assert without is not None
    assert without.isq is None


@pytest.mark.parametrize("alias", ALIASES)
def test_names_that_other_programs_use(alias: str) -> None:
    value = "4096" if "tokens" in alias else "1.2.3.4"
    base = ["-m", "x", "-d", "y"]
    assert cli.parse([*base, alias, value]) == cli.parse([*base, ALIASES[alias], value])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--isq Q9K plain -m x", "The option --isq names no type that weights can be quantised to"),
        ("--isq IQ4_XS plain -m x", "IQ4_XS can be read but not written"),
        ("--isq-cache c -m x", "needs a type (--isq) or a topology"),
        ("--isq Q4_K_M --isq-organization pure -m x", "Q4_K_M is a mix of types: it cannot be pure"),
        ("--isq Q4K --isq-organization best -m x", "'best' is not one of 'default', 'pure', 'moqe'"),
        ("--topology t --isq-organization moqe -m x", "moqe needs a type"),
        ("--isq Q4K --imatrix i --calibration-file t -m x", "--imatrix and --calibration-file each give"),
        ("--prot 80", "did you mean --port"),
        ("-q", "no option -q"),
        ("bench", "neither a command"),
        ("gguf plain -m x", "may follow the kind gguf"),
        ("gguf -m x y.gguf", "may follow the kind gguf"),
        ("serve chat", "neither a command"),
        ("gguf", "needs a model"),
        ("plain", "needs a model"),
        ("plain -m x -f y", "belongs to the kind gguf"),
        ("ggml", "needs a model"),
        ("gguf -m x -g 8", "The option --gqa belongs to the kind ggml; a gguf model"),
        ("plain -m x -g 8", "The option --gqa belongs to the kind ggml; a plain model"),
        ("ggml -m x -g 0", "--gqa"),
        ("gguf -m x -f ;", "names no file"),
        ("gguf -f a/x.gguf;b/x.gguf", "several folders"),
        ("--revision main", "--revision"),
        ("-m", "needs a value"),
        ("--offline=yes", "takes no value"),
        ("--port zero", "--port"),
        ("--port 70000", "--port"),
        ("--dtype f8", "--dtype"),
        ("--kv-cache-dtype q2", "--kv-cache-dtype"),
        ("--log loud", "--log"),
        ("--max-seqs 0", "--max-seqs"),
        ("--pa-blk-size 24", "--pa-blk-size"),
        ("--pa-gpu-mem 5 --pa-ctxt-len 5", "--pa-gpu-mem and --pa-ctxt-len"),
        ("--token-source hunter2", "--token-source"),
        ("--num-targets 3 --max-targets 2", "--max-targets"),
        ("--max-seqs 64 --max-batched-tokens 32", "--max-batched-tokens"),
        ("chat --port 80", "--port"),
        ("chat --temperature -1", "--temperature"),
        ("speculative -m x", "The kind speculative needs a draft model"),
        ("speculative -m x --speculation off", "The kind speculative needs a draft model"),
        ("speculative gguf -d y", "The kind gguf needs a model"),
        ("speculative speculative -m x -d y", "may follow the kind speculative"),
        ("gguf speculative -m x -d y", "may follow the kind gguf"),
        ("speculative serve -m x -d y", "may follow the kind speculative"),
        ("quality speculative -m x -d y", "The command quality uses no draft model"),
        ("quality -m x -d y", "-d"),
        ("chat -m x -d y --draft-deadline-ms 5", "The command chat does not have --draft-deadline-ms"),
        ("doctor speculative", "leave out speculative"),
        ("-m x -d y --speculation off", "A draft model (-d) is for --speculation auto or draft"),
        ("-m x -d y --speculation eagle", "'eagle' is not one of"),
        ("-m x --speculation draft", "needs a draft model"),
        ("-m x --draft-isq Q4K", "The option --draft-isq belongs to a draft model"),
        ("-m x --draft-arch llama", "The option --draft-arch belongs to a draft model"),
        ("-m x --draft-vocab same", "The option --draft-vocab belongs to a draft model"),
        ("-m x --speculation ngram --draft-sampling sampled", "The option --draft-sampling belongs to a draft model"),
        ("-m x -d y --draft-sampling often", "'often' is not one of 'greedy', 'sampled'"),
        ("-m x -d y --draft-sampling sampled --draft-vocab text", "does not go with --draft-vocab text"),
        ("-m x -d y --draft-sampling sampled --seed 1", "--seed gives one to all"),
        ("-m x --speculation ngram --draft-deadline-ms 5", "The option --draft-deadline-ms belongs to a draft model"),
        ("-m x -n 5", "The option --num-draft-tokens belongs to speculative decoding"),
        ("-m x --fixed-draft-tokens", "The option --fixed-draft-tokens belongs to speculative decoding"),
        ("-m x -d y -n 0", "The option --num-draft-tokens should be greater than or equal to 1"),
        ("-m x -d y -n 17", "The option --num-draft-tokens should be less than or equal to 16"),
        ("-m x -d y --draft-deadline-ms 0", "The option --draft-deadline-ms should be greater than 0"),
        ("-m x -d y --draft-deadline-ms 10001", "--draft-deadline-ms should be less than or equal to 10000"),
        ("-m x -d y --draft-isq Q9K", "The option --draft-isq names no type"),
        ("-m x -d y --draft-gqa 0", "The option --draft-gqa should be"),
        ("-m x -d y --draft-kind lora", "'lora' is not one of"),
        ("-m x -d y --draft-kind plain --draft-file z", "The option --draft-file belongs to the kind gguf"),
        ("-m x -d y --draft-kind gguf --draft-gqa 8", "The option --draft-gqa belongs to the kind ggml"),
        ("-m x --draft-file a/x.gguf;b/x.gguf", "The files given with --draft-file lie in several folders"),
        ("doctor gguf", "doctor"),
        ("doctor --log info", "--log"),
        *((f"{kind} -m x", f"The model kind {kind} ") for kind in LATER_KINDS),
    ],
)
def test_mistakes_end_in_one_sentence_and_code_2(line: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sirocco: ")
    assert err.count("\n") == 1
    assert words in err


def test_a_wrong_token_source_is_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["--token-source", "hunter2"]) == 2
    assert "hunter2" not in capsys.readouterr().err


NOT_OF = {"quantize": ("--dtype", "--max-seq-len"), "chat": ("--draft-deadline-ms",)}


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("doctor", ""),
        *((c, k) for c in COMMANDS if c != "doctor" for k in ("", *KINDS) if k != "speculative"),
        *((c, k) for c in ("serve", "config", "chat") for k in ("speculative", "speculative gguf")),
    ],
)
def test_help_explains_every_option(
    command: Command, kind: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.parse([command, *kind.split(), "--help"]) is None
    text = capsys.readouterr().out
    for group in GROUPS[command]:
        for names in option_names(group).values():
            is_hidden = kind.removeprefix("speculative ") in HIDDEN.get(names[0], ())
            is_hidden |= names[0] in NOT_OF.get(command, ())
            assert (f" {names[0]} " in text) != is_hidden
    if command in ("serve", "config"):
        assert "[default: 1234]" in text
        assert "─ Limits of a request ─" in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("sirocco ")


def test_options_are_grouped_in_one_place_each() -> None:
    for groups in GROUPS.values():
        names = sorted(name for group in groups for option in option_names(group).values() for name in option)
        assert not [name for name, following in pairwise(names) if name == following]


def test_help_is_quick_and_needs_neither_torch_nor_ray() -> None:
    code = (
        "import sys, time; from serve_app.__main__ import main; code = main(['--help']); "
        "heavy = {'torch', 'ray', 'numpy', 'fastapi', 'transformers'} & set(sys.modules); "
        "print(time.process_time(), file=sys.stderr); "
        "sys.exit(f'imported {heavy}' if heavy else code)"
    )
    seconds = []
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "--port" in done.stdout
        seconds.append(float(done.stderr))
    # 0.5 s of processor time when measured; the margin is for slower and busier machines.
    assert min(seconds) < 1.5


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "serve_app", "--pa-blk-size", "24"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "sirocco: The option --pa-blk-size should be a multiple of 16.\n"


def test_a_foreign_kernels_package_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "__file__", str(tmp_path / "kernels" / "__init__.py"))
    assert __main__.main(["--version"]) == 2
    assert "another distribution's" in capsys.readouterr().err


def test_a_stale_kernels_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "ABI", __main__.EXPECTED_ABI + 1)
    with pytest.raises(LaunchError, match="install Sirocco again"):
        __main__.check_kernels()
