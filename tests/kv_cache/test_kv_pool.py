import pytest
import torch

from serve_app.kv_cache.arena import PosixShmArena
from serve_app.kv_cache.kv_pool import HEADER_BYTES, KvPool, kv_dtype_name, row_elements


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_views_have_the_promised_shape_and_do_not_overlap(dtype: torch.dtype) -> None:
    pool = KvPool.create(PosixShmArena.create, 5, 16, 3, 2, 4, dtype)
    assert (pool.num_blocks, pool.block_size, pool.dtype) == (5, 16, dtype)
    assert pool.num_bytes == HEADER_BYTES + 5 * KvPool.bytes_per_block(16, 3, 2, 4, dtype)
    tensors = [*pool.k, *pool.v]
    assert len(pool.k) == len(pool.v) == 3
    for i, tensor in enumerate(tensors):
        assert tensor.shape == (5, 16, 2, 4)
        assert tensor.dtype == dtype
        assert tensor.is_contiguous()
        assert not tensor.any()
        assert tensor.data_ptr() % 64 == 0
        tensor.fill_(i + 1)
    assert [float(tensor.float().mean()) for tensor in tensors] == [1, 2, 3, 4, 5, 6]
    pool.close()


def test_slot_is_block_times_size_plus_offset() -> None:
    pool = KvPool.create(PosixShmArena.create, 4, 16, 1, 2, 4, torch.float32)
    pool.k[0].view(-1, 2, 4)[2 * 16 + 5] = 1.0
    assert float(pool.k[0][2, 5].sum()) == float(pool.k[0].sum()) == 8.0
    pool.close()


def test_copy_block_copies_every_layer_and_nothing_else() -> None:
    pool = KvPool.create(PosixShmArena.create, 4, 16, 2, 2, 4, torch.float32)
    for tensor in [*pool.k, *pool.v]:
        tensor.copy_(torch.randn(tensor.shape))
    before = [tensor.clone() for tensor in [*pool.k, *pool.v]]
    pool.copy_block(1, 3)
    for tensor, old in zip([*pool.k, *pool.v], before, strict=True):
        assert torch.equal(tensor[3], old[1])
        assert torch.equal(tensor[:3], old[:3])
    pool.close()


def test_a_tensor_taken_from_the_pool_may_outlive_it() -> None:
    pool = KvPool.create(PosixShmArena.create, 2, 16, 1, 1, 8, torch.float32)
    view = pool.v[0]
    pool.close()
    pool.close()
    view.fill_(2.0)
    assert float(view.sum()) == 2.0 * view.numel()
    assert pool.k == []


def test_q8_rows_hold_a_scale_for_each_32_values() -> None:
    pool = KvPool.create(PosixShmArena.create, 3, 16, 2, 2, 80, torch.uint8)
    assert row_elements(80, torch.uint8) == 80 + 3 * 2
    assert pool.k[1].shape == (3, 16, 2, 86)
    assert KvPool.bytes_per_block(16, 2, 2, 80, torch.uint8) == 2 * 2 * 16 * 2 * 86
    assert kv_dtype_name(pool.dtype) == "q8"
    pool.v[1][1].fill_(7)
    pool.copy_block(1, 2)
    assert int(pool.v[1][2].sum()) == 7 * 16 * 2 * 86
    pool.close()


def test_e4m3_has_a_scale_for_each_head() -> None:
    pool = KvPool.create(PosixShmArena.create, 3, 16, 2, 4, 24, torch.float8_e4m3fn)
    assert pool.k[1].shape == (3, 16, 4, 24)
    assert KvPool.bytes_per_block(16, 2, 4, 24, torch.float8_e4m3fn) == 2 * 2 * 16 * 4 * 24
    assert kv_dtype_name(pool.dtype) == "f8e4m3"
    assert pool.k_scales is not None
    assert pool.v_scales is not None
    assert [scale.tolist() for scale in (*pool.k_scales, *pool.v_scales)] == [[1.0] * 4] * 4
    pool.close()
    other = KvPool.create(PosixShmArena.create, 3, 16, 2, 4, 24, torch.float16)
    assert other.k_scales is None
    assert other.v_scales is None
    other.close()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_a_pool_in_a_devices_memory_has_the_same_views(dtype: torch.dtype) -> None:
    pool = KvPool.on_device("cpu", 5, 16, 3, 2, 4, dtype)
    shared = KvPool.create(PosixShmArena.create, 5, 16, 3, 2, 4, dtype)
    assert pool.geometry == shared.geometry
    for ours, theirs in zip((*pool.k, *pool.v), (*shared.k, *shared.v), strict=True):
        assert (ours.shape, ours.stride(), ours.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)
        assert not ours.float().any()
    pool.k[2][1] = torch.ones(16, 2, 4).to(dtype)
    pool.copy_block(1, 4)
    assert float(pool.k[2][4].float().sum()) == float(pool.k[2].float().sum()) / 2 == 128.0
    pool.close()
    assert pool.k == []
    shared.close()
