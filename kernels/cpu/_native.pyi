"""The native module's interface: addresses and sizes in, as csrc/bindings.cpp states them."""

import numpy as np
from numpy.typing import NDArray

ABI: int

def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def use_instruction_set(name: str) -> None: ...
def set_num_threads(count: int) -> None: ...
def num_threads() -> int: ...
def stay_out_of_team() -> None: ...
def set_spin(barrier_ns: int = ..., idle_ns: int = ...) -> None: ...

class Mailbox:
    def __init__(self, memory: int, descriptor: int, is_first: bool) -> None: ...
    @property
    def descriptor(self) -> int: ...
    @property
    def has_reader(self) -> bool: ...
    def post(self, message: bytes, after: int) -> bool: ...
    def take(self, after: int) -> bytes | None: ...

def wait_readable(descriptors: list[int], mailboxes: list[Mailbox], spin_ns: int, timeout_ns: int) -> list[int]: ...
def can_decode(type_id: int) -> bool: ...
def dequantize(type_id: int, blocks: int, out: int, rows: int, row_bytes: int, columns: int) -> None: ...
def matmul(
    type_id: int,
    weight: int,
    rows: int,
    row_bytes: int,
    block_bytes: int,
    block_length: int,
    x: int,
    x_type: int,
    tokens: int,
    in_features: int,
    out: int,
    out_type: int,
    out_stride: int,
) -> None: ...
def act_row_bytes(kind: int, columns: int) -> int: ...
def kv_row_bytes(kv_type: int, head_dim: int) -> int: ...
def norm(
    x: int,
    x_stride: int,
    residual: int,
    weight: int,
    bias: int,
    is_layer_norm: bool,
    weight_offset: float,
    epsilon: float,
    tokens: int,
    width: int,
    out: int,
    out_stride: int,
    acts: list[tuple[int, int]],
) -> None: ...
def activate(
    gate_up: int,
    stride: int,
    tokens: int,
    width: int,
    kind: int,
    is_gated: bool,
    out: int,
    out_stride: int,
    acts: list[tuple[int, int]],
) -> None: ...
def convert(x: int, stride: int, tokens: int, width: int, acts: list[tuple[int, int]]) -> None: ...
def rope_kv(
    q: int,
    k: int,
    v: int,
    q_stride: int,
    k_stride: int,
    v_stride: int,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    half: int,
    table: int,
    table_rows: int,
    positions: int,
    slots: int,
    num_slots: int,
    k_cache: int,
    v_cache: int,
    kv_type: int,
    tokens: int,
) -> None: ...
def softcap(x: int, count: int, cap: float) -> None: ...
def add(x: int, y: int, count: int) -> None: ...
def scale(x: int, count: int, factor: float) -> None: ...
def uniform(seeds: int, positions: int, out: int, count: int) -> None: ...
def likeliest(logits: int, row_stride: int, rows: int, vocab: int, out: int) -> None: ...
def logprobs(
    logits: int, row_stride: int, rows: int, vocab: int, ids: int, k: int, chosen: int, top_ids: int, top: int
) -> None: ...
def add_to_logits(
    logits: int,
    row_stride: int,
    rows: int,
    vocab: int,
    who: int,
    num_who: int,
    tokens: int,
    amounts: int,
    count: int,
) -> None: ...
def penalise(
    logits: int,
    row_stride: int,
    rows: int,
    vocab: int,
    who: int,
    num_who: int,
    tokens: int,
    amounts: int,
    factors: int,
    scratch: int,
    count: int,
) -> None: ...
def forbid(
    logits: int, row_stride: int, rows: int, vocab: int, who: int, num_who: int, words: int, words_stride: int
) -> None: ...
def draw_tokens(
    logits: int,
    row_stride: int,
    rows: int,
    vocab: int,
    temperature: int,
    top_k: int,
    top_p: int,
    min_p: int,
    u: int,
    out: int,
) -> None: ...

class AttentionPlan:
    def make(
        self,
        block_tables: int,
        tables_stride: int,
        query_start: int,
        context_lens: int,
        requests: int,
        tokens: int,
        num_blocks: int,
        block_size: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        num_threads: int,
    ) -> None: ...
    def run(
        self,
        q: int,
        q_stride: int,
        out: int,
        out_stride: int,
        k_cache: int,
        v_cache: int,
        kv_type: int,
        scale: float,
        softcap: float,
        window: int,
    ) -> None: ...
    @property
    def num_units(self) -> int: ...

class PackedMatrix:
    def __init__(self, type_id: int, rows: int, columns: int) -> None: ...
    @property
    def rows(self) -> int: ...
    @property
    def columns(self) -> int: ...
    @property
    def type_id(self) -> int: ...
    @property
    def act(self) -> int: ...
    @property
    def row_bytes(self) -> int: ...
    @property
    def num_bytes(self) -> int: ...
    def part(self, first: int, rows: int) -> PackedMatrix: ...
    def pack(self, first: int, count: int, blocks: int, num_blocks: int, order: int) -> None: ...
    def unpack(self, first: int, count: int, out: int) -> None: ...
    def gather(self, ids: int, count: int, out: int) -> None: ...
    def matmul(self, x: int, tokens: int, exact: bool, bias: int, out: int, out_stride: int) -> None: ...

def grouped_matmul(
    matrices: list[PackedMatrix],
    x: int,
    tokens: int,
    who: int,
    pairs: int,
    starts: int,
    exact: bool,
    out: int,
    out_stride: int,
) -> None: ...
def packed_bytes(type_id: int, rows: int, columns: int) -> int: ...
def prepare_weight_memory(sizes: list[int]) -> None: ...
def end_weight_preparation() -> None: ...

class Program:
    def __init__(self, num_blocks: int, block_size: int) -> None: ...
    def buffer(self, is_wanted: bool, row_bytes: int) -> int: ...
    def table(self, data: int, num_rows: int) -> int: ...
    def set_table(self, index: int, data: int, num_rows: int) -> None: ...
    def embed(self, weight: PackedMatrix, out: int, factor: float) -> None: ...
    def norm(
        self,
        x: int,
        residual: int,
        out: int,
        width: int,
        weight: int,
        bias: int,
        is_layer_norm: bool,
        weight_offset: float,
        epsilon: float,
        acts: list[tuple[int, int]],
    ) -> None: ...
    def head_norm(
        self,
        x: int,
        row_width: int,
        first: int,
        count: int,
        head_dim: int,
        weight: int,
        weight_offset: float,
        epsilon: float,
    ) -> None: ...
    def matmul(self, segments: list[tuple[PackedMatrix, int, int, int]], out: int) -> None: ...
    def activate(
        self, x: int, out: int, width: int, kind: int, is_gated: bool, acts: list[tuple[int, int]]
    ) -> None: ...
    def experts(
        self,
        x: tuple[int, int],
        logits: int,
        out: int,
        gate: PackedMatrix,
        up: PackedMatrix,
        down: PackedMatrix,
        down_kind: int,
        num_experts: int,
        hidden: int,
        inner: int,
        top_k: int,
        routing_kind: int,
        is_renormalised: bool,
        jitter: float,
        activation: int,
    ) -> None: ...
    def add_gated(self, x: int, other: int, gate: int, width: int) -> None: ...
    def convert(self, x: int, width: int, acts: list[tuple[int, int]]) -> None: ...
    def rope_kv(
        self,
        qkv: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        rotary_dim: int,
        table: int,
        group: int,
        k_cache: int,
        v_cache: int,
        kv_type: int,
    ) -> None: ...
    def attention(
        self,
        qkv: int,
        out: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        group: int,
        k_cache: int,
        v_cache: int,
        kv_type: int,
        scale: float,
        softcap: float,
        window: int,
    ) -> None: ...
    def gather(self, pairs: list[tuple[int, int]]) -> None: ...
    def softcap(self, x: int, width: int, cap: float) -> None: ...
    def scale(self, x: int, width: int, factor: float) -> None: ...
    def add(self, x: int, other: int, width: int) -> None: ...
    def finish(self, result: int) -> None: ...
    def run(
        self,
        token_ids: NDArray[np.int64],
        positions: NDArray[np.int64],
        wanted: NDArray[np.int64],
        query_start: NDArray[np.int32],
        context_lens: NDArray[np.int32],
        groups: list[tuple[NDArray[np.int64], NDArray[np.int32]]],
    ) -> NDArray[np.float32]: ...
    @property
    def num_ops(self) -> int: ...
    @property
    def bytes_per_row(self) -> tuple[int, int]: ...

class ReadProbe:
    def __init__(self, bytes: int, threads: int, huge_pages: bool = True) -> None: ...
    def rates(self, passes: int) -> list[float]: ...

def probe_dot(kind: str, threads: int, passes: int) -> list[float]: ...
def can_encode(type_id: int) -> bool: ...
def quantize(
    type_id: int,
    source_type_id: int,
    source: int,
    source_row_bytes: int,
    importance: int,
    rows: int,
    columns: int,
    out: int,
    out_row_bytes: int,
) -> tuple[int, int]: ...
def quantize_hqq(
    bits: int, source_type_id: int, source: int, source_row_bytes: int, rows: int, columns: int, out: int
) -> tuple[int, int]: ...
