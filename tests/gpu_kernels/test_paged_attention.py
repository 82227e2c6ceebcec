"""Paged attention against plain torch in float32, in every regime."""

import pytest
import torch
from paged_cases import PagedCase, make_case

from kernels.gpu import attention_plan
from kernels.gpu.attention_plan import AttentionPlan, choose_tiles
from kernels.gpu.paged_attention import attend
from kernels.reference import attention as reference

Request = tuple[int, int]

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def expected(case: PagedCase, **options: float) -> torch.Tensor:
    exact = case.exact()
    return reference.paged_attention(
        exact.q, exact.k_cache, exact.v_cache, exact.block_tables, *exact.host_lengths, **options
    )


def got(case: PagedCase, **options: float) -> torch.Tensor:
    num_tokens, *heads = case.q.shape
    block_size, n_kv_heads = case.k_cache.shape[1:3]
    plan = AttentionPlan(
        case.block_tables, case.query_start, case.context_lens, num_tokens, case.max_query_len, block_size, heads[0],
        n_kv_heads, heads[1], case.q.element_size(),
    )  # fmt: skip
    return attend(plan, case.q, case.k_cache, case.v_cache, k_scale=case.k_scale, v_scale=case.v_scale, **options)


def check(case: PagedCase, **options: float) -> None:
    out, right = got(case, **options), expected(case, **options)
    assert out.dtype == case.q.dtype
    tolerance = TOLERANCE[case.q.dtype]
    torch.testing.assert_close(out.float(), right, rtol=4 * tolerance, atol=4 * tolerance)


DECODES: list[Request] = [(1, 1), (1, 70), (1, 33), (1, 200), (1, 64)]
MIXED: list[Request] = [(1, 40), (37, 37), (0, 20), (5, 90), (1, 1), (18, 130)]

SHAPES = [(4, 2, 16), (3, 1, 24), (2, 2, 8), (20, 1, 40), (7, 1, 64), (4, 1, 128), (2, 2, 80)]


@pytest.mark.parametrize(("n_heads", "n_kv_heads", "head_dim"), SHAPES)
def test_decodes_and_mixed_batches(n_heads: int, n_kv_heads: int, head_dim: int, device: torch.device) -> None:
    for requests in (DECODES, MIXED):
        check(make_case(requests, n_heads, n_kv_heads, head_dim, device=device))


@pytest.mark.parametrize("kv_dtype", [None, torch.float8_e4m3fn], ids=["same", "e4m3"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_number_formats(dtype: torch.dtype, kv_dtype: torch.dtype | None, device: torch.device) -> None:
    for requests in (DECODES, MIXED):
        check(make_case(requests, 4, 2, 32, dtype, kv_dtype, device=device))


def test_queries_may_be_wider_than_the_cache(device: torch.device) -> None:
    check(make_case(MIXED, 4, 2, 16, torch.float32, torch.float16, device=device))


@pytest.mark.parametrize(
    "options",
    [{"window": 1}, {"window": 40}, {"window": 500}, {"softcap": 3.0}, {"scale": 0.7}, {"window": 33, "softcap": 20.0}],
    ids=str,
)
def test_window_softcap_and_scale(options: dict[str, float], device: torch.device) -> None:
    for requests in (DECODES, MIXED):
        check(make_case(requests, 4, 2, 32, device=device, spread=2.0), **options)


@pytest.mark.parametrize("block_size", [16, 32, 48, 128])
def test_block_sizes(block_size: int, device: torch.device) -> None:
    check(make_case(MIXED, 4, 2, 16, block_size=block_size, device=device))


def test_one_token_and_4097_tokens(device: torch.device) -> None:
    case = make_case([(1, 4097), (1, 1)], 4, 1, 16, block_size=32, device=device)
    check(case)
    check(case, window=1000)
    check(make_case([(3, 4097)], 2, 1, 16, block_size=32, device=device))


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_any_number_of_parts_gives_the_same_result(
    parts: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_plan, "_num_parts", lambda *sizes: parts)
    for requests in ([(1, 170), (1, 3), (1, 64)], MIXED):
        case = make_case(requests, 4, 2, 16, device=device)
        check(case)
        check(case, window=20)


def test_the_same_call_gives_the_same_bits(device: torch.device) -> None:
    case = make_case(MIXED, 4, 2, 16, torch.float16, device=device)
    assert torch.equal(got(case), got(case))


def test_a_prompt_in_chunks_gives_the_bits_of_one_pass(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one part, a row's sums depend on nothing but its own keys: tiles are counted from the context's begin."""
    monkeypatch.setattr(attention_plan, "_num_parts", lambda *sizes: 1)
    monkeypatch.setattr(attention_plan, "choose_tiles", lambda *sizes, choose=choose_tiles: choose(64, *sizes[1:]))
    whole = make_case([(100, 100)], 4, 2, 16, device=device)
    rows = got(whole)
    for begin, end in [(0, 30), (30, 31), (31, 100)]:
        part = make_case([(100, 100)], 4, 2, 16, device=device)
        part.q = part.q[begin:end]
        part.query_start = torch.tensor([0, end - begin], dtype=torch.int32, device=device)
        part.context_lens = torch.tensor([end], dtype=torch.int32, device=device)
        assert torch.equal(got(part), rows[begin:end])


def test_requests_that_fill_up_a_batch_give_zeros(device: torch.device) -> None:
    case = make_case([(1, 20), (1, 0), (1, 0)], 4, 2, 16, device=device)
    out = got(case)
    assert not out[1:].any()
    torch.testing.assert_close(out[:1], expected(case)[:1], rtol=1e-5, atol=1e-5)


def test_nothing_in_and_nothing_out(device: torch.device) -> None:
    assert got(make_case([(0, 5)], 4, 2, 16, device=device)).shape == (0, 64)


def test_queries_in_a_fused_row(device: torch.device) -> None:
    case = make_case(MIXED, 4, 2, 16, device=device)
    right = got(case)
    fused = torch.full((len(case.q), 200), torch.nan, device=device)
    fused[:, 8:72] = case.q.flatten(1)
    case.q = fused[:, 8:72].unflatten(1, (4, 16))
    assert torch.equal(got(case), right)


def test_a_plan_serves_layers_of_different_options(device: torch.device) -> None:
    case = make_case(MIXED, 4, 2, 16, device=device)
    plan = AttentionPlan(
        case.block_tables, case.query_start, case.context_lens, len(case.q), case.max_query_len, 16, 4, 2, 16, 4
    )
    for window in (0, 30):
        out = attend(plan, case.q, case.k_cache, case.v_cache, window=window)
        torch.testing.assert_close(out, expected(case, window=window), rtol=1e-5, atol=1e-5)


def test_every_query_has_a_tile(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        lengths = torch.randint(0, 60, (int(torch.randint(1, 9, (), generator=generator)),), generator=generator)
        lengths[0] = 40
        starts = torch.cat([torch.zeros(1), lengths.cumsum(0)]).to(torch.int32)
        tables = torch.zeros((len(lengths), 4), dtype=torch.int32)
        plan = AttentionPlan(
            tables, starts, lengths.to(torch.int32), int(lengths.sum()), int(lengths.max()), 16, 4, 1, 16, 4
        )
        assert plan.tile_request is not None
        queries = plan.tiles.queries
        covered = set()
        for tile, r in enumerate(plan.tile_request.tolist()):
            first = (tile - int(starts[r]) // queries - r) * queries
            assert first >= 0
            covered |= {(r, i) for i in range(first, min(first + queries, int(lengths[r])))}
        assert covered == {(r, i) for r, n in enumerate(lengths.tolist()) for i in range(n)}


@pytest.mark.parametrize("group", [1, 3, 4, 7, 8, 20, 32])
@pytest.mark.parametrize("max_query_len", [1, 2, 5, 64, 4096])
@pytest.mark.parametrize("head_dim", [8, 64, 80, 128, 256])
def test_tiles_are_what_tensor_cores_take(group: int, max_query_len: int, head_dim: int) -> None:
    for itemsize in (2, 4):
        tiles = choose_tiles(max_query_len, group, head_dim, itemsize)
        for side in (tiles.rows, tiles.keys, tiles.width):
            assert side >= 16
            assert side & (side - 1) == 0
        assert tiles.queries >= 1
        assert tiles.queries * group <= tiles.rows
        assert tiles.width >= head_dim
        assert (tiles.num_stages - 1) // 2 * 2 * tiles.keys * tiles.width * itemsize <= 64 << 10


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(40))
def test_random_batches(seed: int, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(values: list[int]) -> int:
        return values[int(torch.randint(len(values), (), generator=generator))]

    requests = []
    for _ in range(draw([1, 2, 5, 9])):
        context = draw([1, 2, 15, 16, 17, 63, 64, 65, 300, 1025])
        requests.append((min(context, draw([0, 1, 1, 1, 3, 16, 40, 1025])), context))
    n_kv_heads, group = draw([1, 2, 3]), draw([1, 2, 3, 4, 8])
    dtype = [torch.float32, torch.float16, torch.bfloat16][seed % 3]
    kv_dtype = torch.float8_e4m3fn if draw([0, 0, 1]) else dtype
    case = make_case(
        [(1, 1), *requests], n_kv_heads * group, n_kv_heads, draw([8, 16, 40, 64, 80, 128]), dtype, kv_dtype,
        block_size=draw([16, 32, 48]), device=device, seed=seed,
    )  # fmt: skip
    check(case, window=draw([0, 0, 1, 50, 400]), softcap=float(draw([0, 0, 5])))
