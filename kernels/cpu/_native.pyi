"""The native module's interface: addresses and sizes in, as csrc/bindings.cpp states them."""

ABI: int

def instruction_sets() -> list[str]: ...
def instruction_set() -> str: ...
def use_instruction_set(name: str) -> None: ...
def set_num_threads(count: int) -> None: ...
def num_threads() -> int: ...
def set_spin(barrier_ns: int = ..., idle_ns: int = ...) -> None: ...
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
def rms_norm(
    x: int, residual: int, weight: int, out: int, tokens: int, width: int, epsilon: float, type: int
) -> None: ...
def rope(
    q: int,
    k: int,
    q_stride: int,
    k_stride: int,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    half: int,
    table: int,
    table_rows: int,
    positions: int,
    tokens: int,
    type: int,
) -> None: ...
def silu_mul(gate_up: int, out: int, tokens: int, width: int, type: int) -> None: ...
def kv_write(
    k: int,
    v: int,
    k_stride: int,
    v_stride: int,
    row: int,
    k_cache: int,
    v_cache: int,
    slots: int,
    tokens: int,
    num_slots: int,
    type: int,
    kv_type: int,
) -> None: ...
def uniform(seeds: int, positions: int, out: int, count: int) -> None: ...
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
    def __init__(
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
    ) -> None: ...
    def run(self, q: int, q_stride: int, out: int, k_cache: int, v_cache: int, type: int, kv_type: int) -> None: ...
    @property
    def num_items(self) -> int: ...
