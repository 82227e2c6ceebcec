import pytest
import torch

from kernels.reference.hqq import HqqTensor


def test_numbers() -> None:
    codes = torch.arange(128, dtype=torch.uint8).remainder(16).view(1, 128)
    tensor = HqqTensor.of(4, codes, torch.tensor([[0.5, 2.0]]), torch.tensor([[7.5, 0.0]]))
    assert tensor.shape == (1, 128)
    assert tensor.codes[0, :3].tolist() == [0x10, 0x32, 0x54]
    assert torch.equal(tensor.unpacked_codes(), codes)
    weights = tensor.dequantize()[0]
    assert weights[:3].tolist() == [-3.75, -3.25, -2.75]
    assert weights[64:67].tolist() == [0.0, 2.0, 4.0]
    assert tensor.nbytes == 64 + 2 * 2 * 2


def test_eight_bits() -> None:
    codes = torch.full((2, 64), 255, dtype=torch.uint8)
    tensor = HqqTensor.of(8, codes, torch.ones(2, 1), torch.tensor([[0.0], [127.5]]))
    assert tensor.dequantize()[:, 0].tolist() == [255.0, 127.5]


def test_refusals() -> None:
    codes, numbers = torch.zeros(1, 64, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.float16)
    with pytest.raises(ValueError, match="4 or 8 bits, not 3"):
        HqqTensor(3, codes, numbers, numbers)
    with pytest.raises(ValueError, match="96 columns are no whole number of HQQ groups of 64"):
        HqqTensor(8, torch.zeros(1, 96, dtype=torch.uint8), numbers, numbers)
    with pytest.raises(ValueError, match=r"are not \[1, 1\]"):
        HqqTensor(8, codes, numbers, numbers[:, :0])
    with pytest.raises(ValueError, match="float16"):
        HqqTensor(8, codes, numbers.float(), numbers)
