import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from serve_app.attention.array_pack import ArrayPack, to_device

shapes = st.lists(st.one_of(st.tuples(st.integers(0, 5)), st.tuples(st.integers(0, 4), st.integers(0, 4))), max_size=8)


@given(shapes, st.randoms(use_true_random=False))
def test_arrays_come_out_as_they_went_in(shapes: list[tuple[int, ...]], random: np.random.RandomState) -> None:
    arrays = [
        np.arange(int(np.prod(shape)), dtype=np.int64 if random.random() < 0.5 else np.int32).reshape(shape) + 7 * i
        for i, shape in enumerate(shapes)
    ]
    pack = ArrayPack(arrays)
    buffer = pack.host_buffer(torch.device("cpu"))
    for view, array in zip(pack.arrays(buffer), arrays, strict=True):
        view[...] = array
    for tensor, array in zip(pack.tensors(buffer.clone()), arrays, strict=True):
        assert tensor.shape == array.shape
        assert tensor.numpy().dtype == array.dtype
        assert (tensor.numpy() == array).all()
        assert tensor.numel() == 0 or tensor.storage_offset() * tensor.element_size() % 16 == 0


def test_on_the_cpu_nothing_is_copied() -> None:
    array = np.arange(5)
    [tensor] = to_device([array], torch.device("cpu"))
    array[2] = 9
    assert tensor.tolist() == [0, 1, 9, 3, 4]
