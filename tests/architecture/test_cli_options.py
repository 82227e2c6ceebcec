"""The command line is a promise: an option added, renamed or dropped shows here."""

import pytest

from serve_app.cli_grammar import COMMANDS, GROUPS, KINDS, LATER_KINDS, Command, option_names

MODEL = """--arch -a --chat-template -c --dtype --gqa -g --hf-cache-path --jinja-explicit -j --max-seq-len --model-id -m
--offline --quantized-filename -f --revision --token-source --tokenizer -t"""
ENGINE = """--attention-backend --cpu-exact --device --kv-cache-dtype --max-batched-tokens --max-seqs --max-waiting
--no-cuda-graphs --no-overlap --no-paged-attn --pa-blk-size --pa-cache-type
--pa-ctxt-len --pa-gpu-mem --pa-gpu-mem-usage --prefill-chunk-tokens --prefix-cache-n --queue-timeout --seed -s
--threads"""
HTTP = """--api-key --first-token-timeout --host --idle-stream-timeout --max-body-bytes --max-choices
--max-header-bytes --max-logit-bias --max-logprobs --max-messages --max-n --max-prompts --max-stop --port -p
--request-logging-file --served-model-name --slow-client-timeout --strict-model-name"""
RAY = """--draft-cpus --draft-gpu --ingress --ingress-cpus --max-targets --model-nodes --num-ingress --num-preprocessors
--num-targets --preprocessor-cpus --proxy --ray-address --startup-timeout --target-cpus"""
LOG = "--log"
CHAT = "--max-tokens --system --temperature --top-k --top-p"
DOCTOR = "--json --models"
QUANTIZE = """--calibration-file --imatrix --isq --isq-organization --output -o --save-imatrix --threads --topology"""
QUALITY = "--calibration-file --chunk-tokens --chunks --imatrix --isq --isq-organization --json --plot --text"
ISQ = "--calibration-file --imatrix --isq --isq-cache --isq-organization --topology"

SPECULATION = """--draft-deadline-ms --draft-sampling --draft-vocab --fixed-draft-tokens --num-draft-tokens -n
--speculation"""
DRAFT = """--draft-arch --draft-dtype --draft-file --draft-gqa --draft-isq --draft-kind --draft-model-id -d
--draft-revision --draft-tokenizer"""

EXPECTED: dict[Command, tuple[str, ...]] = {
    "serve": (MODEL, ISQ, SPECULATION, DRAFT, ENGINE, HTTP, RAY, LOG),
    "config": (MODEL, ISQ, SPECULATION, DRAFT, ENGINE, HTTP, RAY, LOG),
    "chat": (MODEL, ISQ, SPECULATION, DRAFT, ENGINE, CHAT, LOG),
    "doctor": (DOCTOR,),
    "quantize": (MODEL, QUANTIZE, LOG),
    "quality": (MODEL, ENGINE, QUALITY, LOG),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_options_of_each_command(command: Command) -> None:
    names = {name for group in GROUPS[command] for option in option_names(group).values() for name in option}
    assert sorted(names) == sorted(" ".join(EXPECTED[command]).split())


def test_commands_and_kinds() -> None:
    assert COMMANDS == ("serve", "chat", "config", "doctor", "quantize", "quality")
    assert KINDS == ("gguf", "ggml", "plain", "run", "speculative", "toml")
    assert not set(COMMANDS) & {*KINDS, *LATER_KINDS}
