"""The command line's options, group by group: one dataclass a group, one field an option.

Field names are those of the configuration's sections and defaults come from there, so that each is written once. An
option without a default here says in its help what happens when it is left out. The server's are in cli_server_options.
"""

from dataclasses import dataclass
from functools import partial
from typing import Annotated

from typer import Option

from serve_app.config import EngineSettings, LogLevel, ModelConfig
from serve_app.options import DType, KvDType, PaCacheType

# What the help shows as the type of an option that takes no value.
_FLAG = ""

_MODEL = ModelConfig()
_ENGINE = EngineSettings()

_model_option = partial(Option, rich_help_panel="Model")
_engine_option = partial(Option, rich_help_panel="Engine")
_cache_option = partial(Option, rich_help_panel="KV cache")
_chat_option = partial(Option, rich_help_panel="Chat")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """Which model, and from where."""

    model: Annotated[
        str | None,
        _model_option(
            "--model-id",
            "-m",
            help="Hub id, folder or file. Left out: the small model that comes with Sirocco.",
            metavar="REPO_OR_PATH",
        ),
    ] = _MODEL.model
    files: Annotated[
        list[str] | None,
        _model_option(
            "--quantized-filename",
            "-f",
            help="GGUF file in the folder or repository: a name, a glob, or several shards with ';' between them.",
            metavar="FILE",
        ),
    ] = None
    arch: Annotated[
        str | None,
        _model_option(
            "--arch",
            "-a",
            help="Architecture to read the files as, by its short name or config.json's; doctor --models lists them. "
            "Left out: what the files say.",
            metavar="NAME",
        ),
    ] = _MODEL.arch
    gqa: Annotated[
        int | None,
        _model_option(
            "--gqa",
            "-g",
            help="Query heads to a key head of a ggml model (Llama 2 70B: 8). Left out: what its tensors say.",
        ),
    ] = _MODEL.gqa
    tokenizer: Annotated[
        str | None,
        _model_option(
            "--tokenizer",
            "-t",
            help="Hub id, folder or file to take the tokenizer from. Left out: the model's own.",
            metavar="REPO_OR_PATH",
        ),
    ] = _MODEL.tokenizer
    dtype: Annotated[DType, _model_option("--dtype", help="Number format to compute in; auto: the model's own.")] = (
        _MODEL.dtype
    )
    max_seq_len: Annotated[
        int | None,
        _model_option(
            "--max-seq-len",
            help="Longest prompt and answer together, in tokens. Left out: what the model was made for.",
        ),
    ] = _MODEL.max_seq_len
    chat_template: Annotated[
        str | None,
        _model_option(
            "--chat-template",
            "-c",
            help="Chat template to use: a .json file with chat_template in it, or the template itself.",
            metavar="FILE_OR_TEXT",
        ),
    ] = _MODEL.chat_template
    jinja_explicit: Annotated[
        str | None,
        _model_option(
            "--jinja-explicit", "-j", help="A .jinja file that comes before every other chat template.", metavar="FILE"
        ),
    ] = _MODEL.jinja_explicit
    token_source: Annotated[
        str,
        _model_option(
            "--token-source",
            help="The hub's access token: literal:TOKEN, env:NAME, path:FILE, cache (as the hub's own tools), or none.",
            metavar="SOURCE",
        ),
    ] = _MODEL.token_source
    revision: Annotated[
        str | None,
        _model_option(
            "--revision", help="Branch, tag or commit of the hub repository. Left out: its main branch.", metavar="NAME"
        ),
    ] = _MODEL.revision
    hf_cache: Annotated[
        str | None,
        _model_option(
            "--hf-cache-path", help="Folder for downloads. Left out: the hub's usual cache.", metavar="FOLDER"
        ),
    ] = _MODEL.hf_cache
    offline: Annotated[
        bool,
        _model_option("--offline", metavar=_FLAG, help="Never ask the hub; use what was downloaded before."),
    ] = _MODEL.offline


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """Sizes of the engine."""

    max_seqs: Annotated[int, _engine_option("--max-seqs", help="Requests that run at the same time.")] = (
        _ENGINE.max_seqs
    )
    max_batched_tokens: Annotated[
        int,
        _engine_option("--max-batched-tokens", help="Tokens of all requests in one step."),
    ] = _ENGINE.max_batched_tokens
    prefill_chunk_tokens: Annotated[
        int,
        _engine_option(
            "--prefill-chunk-tokens",
            help="Prompt tokens of one request in one step: a longer prompt is taken in chunks.",
        ),
    ] = _ENGINE.prefill_chunk_tokens
    max_waiting: Annotated[
        int,
        _engine_option("--max-waiting", help="Requests that may wait for a place; more are refused with status 429."),
    ] = _ENGINE.max_waiting
    queue_timeout_s: Annotated[
        float,
        _engine_option("--queue-timeout", help="Longest wait for a place, in seconds."),
    ] = _ENGINE.queue_timeout_s
    num_threads: Annotated[
        int,
        _engine_option(
            "--threads",
            help="Computing threads; 0: the physical cores of cgroup and affinity mask, "
            "divided among the replicas of one machine.",
        ),
    ] = _ENGINE.num_threads
    cpu_exact: Annotated[
        bool,
        _engine_option(
            "--cpu-exact",
            metavar=_FLAG,
            help="On the CPU, multiply by activations as they are, not rounded to 8 or 16 bits: slower, for "
            "comparisons. Keeps keys and values in float32 too, unless told otherwise.",
        ),
    ] = _ENGINE.cpu_exact
    device: Annotated[
        str,
        _engine_option(
            "--device",
            help="Where models compute: cpu, cuda, cuda:N; auto: a CUDA device where this machine has one, else the "
            "CPU. On a joined cluster auto is the CPU.",
        ),
    ] = _ENGINE.device
    attention_backend: Annotated[
        str,
        _engine_option(
            "--attention-backend",
            help="Attention implementation; auto: the best that works here (see sirocco doctor).",
            metavar="NAME",
        ),
    ] = _ENGINE.attention_backend
    no_cuda_graphs: Annotated[
        bool,
        _engine_option(
            "--no-cuda-graphs",
            metavar=_FLAG,
            help="On a GPU, run decode steps kernel by kernel: slower, starts sooner, takes less memory.",
        ),
    ] = not _ENGINE.cuda_graphs
    no_overlap: Annotated[
        bool,
        _engine_option(
            "--no-overlap",
            metavar=_FLAG,
            help="On a GPU, begin a step only when the last one's tokens have been looked at: slower.",
        ),
    ] = not _ENGINE.overlap
    seed: Annotated[
        int | None,
        _engine_option(
            "--seed", "-s", help="Seed of requests that bring none of their own. Left out: a new one each time."
        ),
    ] = _ENGINE.seed
    prefix_cache_n: Annotated[
        int,
        _cache_option(
            "--prefix-cache-n", help="Released prompts that keep their blocks for later requests; 0: no prefix cache."
        ),
    ] = _ENGINE.prefix_cache_n
    no_paged_attn: Annotated[
        bool,
        _cache_option(
            "--no-paged-attn", metavar=_FLAG, help="One contiguous range of the cache for each request, nothing shared."
        ),
    ] = not _ENGINE.paged_attention
    pool_mb: Annotated[
        int | None,
        _cache_option(
            "--pa-gpu-mem",
            help="Size of the KV pool in MiB. Without this and the next two: on a GPU, --pa-gpu-mem-usage 0.9; else a "
            "quarter of the free memory, or less if all requests at full length need less.",
        ),
    ] = _ENGINE.pool_mb
    pool_fraction: Annotated[
        float | None,
        _cache_option(
            "--pa-gpu-mem-usage",
            help="Size of the KV pool: on a GPU, what fills its memory up to this fraction; on a CPU, this fraction of "
            "the free memory.",
        ),
    ] = _ENGINE.pool_fraction
    pool_tokens: Annotated[
        int | None,
        _cache_option("--pa-ctxt-len", help="Size of the KV pool in tokens."),
    ] = _ENGINE.pool_tokens
    kv_cache_dtype: Annotated[
        KvDType,
        _cache_option(
            "--kv-cache-dtype",
            help="Number format of keys and values; auto: bf16 or f32 for a model of that kind, else f16. Half of the "
            "memory take q8 (8 bits with a scale for each 32, native CPU kernels) and f8e4m3 (GPUs, plain torch).",
        ),
    ] = _ENGINE.kv_cache_dtype
    pa_cache_type: Annotated[
        PaCacheType,
        _cache_option("--pa-cache-type", help="The same, as mistral.rs names it: f8e4m3 is --kv-cache-dtype f8e4m3."),
    ] = _ENGINE.pa_cache_type
    block_size: Annotated[
        int,
        _cache_option("--pa-blk-size", help="Tokens in a block of the KV cache, a multiple of 16."),
    ] = _ENGINE.block_size


@dataclass(frozen=True, slots=True, kw_only=True)
class LogOptions:
    """What is logged."""

    log: Annotated[LogLevel, Option("--log", help="How much is logged, by Sirocco and by Ray.")] = "info"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatLogOptions:
    """The same in a conversation, where messages would stand between the answers."""

    log: Annotated[LogLevel, Option("--log", help="How much is logged, to standard error.")] = "warn"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """How `sirocco chat` begins; each can be changed in the conversation."""

    system: Annotated[str | None, _chat_option("--system", help="System message.", metavar="TEXT")] = None
    temperature: Annotated[
        float | None,
        _chat_option(
            "--temperature",
            help="0: always the likeliest token. Left out, here and below: as the model's makers say.",
            min=0.0,
            max=100.0,
        ),
    ] = None
    top_k: Annotated[
        int | None,
        _chat_option("--top-k", help="Draw from the k likeliest; 0: all.", min=0),
    ] = None
    top_p: Annotated[
        float | None,
        _chat_option("--top-p", help="Draw from the likeliest that make up this probability.", min=0.0, max=1.0),
    ] = None
    max_tokens: Annotated[
        int | None,
        _chat_option("--max-tokens", help="Longest answer. Left out: up to the model's context.", min=1),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorOptions:
    """How `sirocco doctor` reports."""

    as_json: Annotated[bool, Option("--json", metavar=_FLAG, help="Print JSON for programs.")] = False
    models: Annotated[bool, Option("--models", metavar=_FLAG, help="List the model families instead.")] = False
