"""What the engine is told: frozen dataclasses, no pydantic, so that the engine runs without the server's packages."""

from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

DType = Literal["auto", "f32", "f16", "bf16"]
KvDType = Literal["auto", "f32", "f16", "bf16", "q8", "f8e4m3"]
PaCacheType = Literal["auto", "f8e4m3"]
ModelKind = Literal["auto", "plain", "gguf", "ggml"]
Speculate = Literal["auto", "draft", "ngram", "suffix", "off"]
DraftSampling = Literal["greedy", "sampled"]

MAX_DRAFT_TOKENS = 16
"""Tokens drafted for one request in one step at most."""


@dataclass(frozen=True, slots=True)
class DryParams:
    """The DRY repetition penalty: multiplier * base ** (match length - allowed_length), 0 = off."""

    multiplier: float = 0.0
    base: float = 1.75
    allowed_length: int = 2
    sequence_breakers: tuple[str, ...] = ("\n", ":", '"', "*")


@dataclass(frozen=True, slots=True)
class RequestSpeculation:
    """What one request wants of speculation: none of it, or at most so many drafted tokens a step (None: as the server
    does)."""

    enabled: bool = True
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one request are drawn, and when it ends.

    temperature 0 is greedy; top_k 0, top_p 1, min_p 0 are off. logprobs None: none, k: the chosen token's and the
    k best. prompt_logprobs asks for those of the prompt's tokens too (completions with echo). seed None: drawn anew.
    max_tokens None: up to the model's context.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    dry: DryParams = field(default_factory=DryParams)
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    max_tokens: int | None = None
    min_tokens: int = 0
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: bool = False
    speculation: RequestSpeculation = field(default_factory=RequestSpeculation)

    def with_overrides(self, overrides: dict[str, Any]) -> "SamplingParams":
        """These parameters with the given fields replaced; unknown names are an assertion, never a client's."""
        assert set(overrides) <= {f.name for f in fields(self)}, overrides
        return replace(self, **overrides)


@dataclass(frozen=True, slots=True)
class IsqOptions:
    """In-situ quantization: what the weights become while they are loaded.

    type: the name of a type or of a mix of types (quant.mix.Recipe). is_pure: embedding and head get the type itself,
    not one a class better. experts_only: nothing but the experts of a mixture becomes another type. imatrix: a file of
    importances. calibration_file: a text to compute them from. topology: a file that says which layers get which type.
    cache: a folder that keeps the results for the next start.
    """

    type: str | None = None
    is_pure: bool = False
    experts_only: bool = False
    imatrix: str | None = None
    calibration_file: str | None = None
    topology: str | None = None
    cache: str | None = None


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Which model, and from where.

    model is a hub id, a folder or a file; None is the embedded model. files are the names given with -f (kind gguf),
    already split at ';' but not yet globbed. tokenizer is another hub id, folder or file to take the tokenizer from.
    arch: the architecture in the place of the files' own, in any of its names (models.registry). gqa: query heads to a
    KV head, which the old GGML container does not say; None: as its tensors show.
    token_source: 'cache', 'none', 'literal:…', 'env:…' or 'path:…'. isq None: weights are served in the files' types.
    """

    model: str | None = None
    kind: ModelKind = "auto"
    arch: str | None = None
    gqa: int | None = None
    files: tuple[str, ...] = ()
    tokenizer: str | None = None
    revision: str | None = None
    token_source: str = "cache"
    hf_cache: str | None = None
    offline: bool = False
    chat_template: str | None = None
    jinja_explicit: str | None = None
    dtype: DType = "auto"
    max_seq_len: int | None = None
    isq: IsqOptions | None = None


@dataclass(frozen=True, slots=True)
class SpeculationOptions:
    """How tokens are drafted.

    use: by which proposer; auto: by whichever pays, draft only where there is a draft model. max_tokens: drafted a step
    and request at most. is_fixed: always so many, whatever it costs; else as many as pay. deadline_ms: how long a step
    waits for the draft. maps_text: the draft has another vocabulary, its proposals go through text. draft_sampling: the
    draft proposes its likeliest tokens, or, for requests without a seed, tokens that it samples as they would.
    """

    use: Speculate = "off"
    max_tokens: int = 5
    is_fixed: bool = False
    deadline_ms: float = 100.0
    maps_text: bool = False
    draft_sampling: DraftSampling = "greedy"


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Sizes and limits of one engine.

    device: cpu, cuda, cuda:N, or auto: the first CUDA device where there is one.
    At most one of pool_mb, pool_fraction and pool_tokens sets the KV pool (the --pa-gpu-mem, --pa-gpu-mem-usage and
    --pa-ctxt-len options); with none it is the smaller of a quarter of the memory that the cgroup leaves free and
    max_seqs * context, and on a GPU as with pool_fraction 0.9. prefix_cache_n: how many released prompts keep their
    blocks, 0 = no prefix cache. max_batched_tokens bounds one step's tokens, prefill_chunk_tokens one request's share
    of it. max_waiting: requests that may wait; more are refused with QueueFull. kv_cache_dtype 'auto' suits the weights
    (loaders.load.kv_dtype); pa_cache_type, the name that users of mistral.rs know, says the same with fewer choices.
    cpu_exact: on the CPU no product rounds its input. num_threads 0: the physical cores of cgroup and affinity;
    shares_cores: others use them too, so that threads sleep at once after each step. cuda_graphs: on a CUDA device,
    record decode steps as graphs. overlap: on a CUDA device, begin a step before the host knows the tokens of the last.
    """

    max_seqs: int = 32
    max_batched_tokens: int = 2048
    prefill_chunk_tokens: int = 512
    block_size: int = 32
    paged_attention: bool = True
    prefix_cache_n: int = 1024
    pool_mb: int | None = None
    pool_fraction: float | None = None
    pool_tokens: int | None = None
    max_waiting: int = 1024
    queue_timeout_s: float = 300.0
    device: str = "auto"
    kv_cache_dtype: KvDType = "auto"
    pa_cache_type: PaCacheType = "auto"
    cpu_exact: bool = False
    num_threads: int = 0
    shares_cores: bool = False
    attention_backend: str = "auto"
    cuda_graphs: bool = True
    overlap: bool = True
    seed: int | None = None

    @property
    def kv_type(self) -> KvDType:
        """What kv_cache_dtype and pa_cache_type say together."""
        return self.kv_cache_dtype if self.pa_cache_type == "auto" else self.pa_cache_type
