"""Builds the tensors and weights that a family asks for out of a checkpoint's stored ones."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from kernels.dispatch import native_matrix, triton_computes
from kernels.formats import BlockFormat
from kernels.gpu.planar import PlanarMatrix
from kernels.gpu.planar_forms import planar_form
from kernels.reference.quant import dequantize
from serve_app.errors import ModelFileError
from serve_app.loaders.checkpoint import Checkpoint, StoredTensor, num_elements
from serve_app.loaders.pages import as_tensor, drop_pages, expect_pages
from serve_app.loaders.recode import Progress, blocks_of, recoded_bytes
from serve_app.quant.experts import DenseExperts, Experts, PackedExperts
from serve_app.quant.native_experts import NativeExperts, padded
from serve_app.quant.native_weight import NativeWeight
from serve_app.quant.packed import PackedWeight, fuse
from serve_app.quant.planar_weight import FusedPlanarWeight, PlanarExperts, PlanarWeight
from serve_app.quant.weight import PLAIN_DTYPES, DenseWeight, FusedWeight, Weight

logger = logging.getLogger(__name__)

SMALL_MODEL_BYTES = 64 << 20
"""Models that take at most this much in float32 keep a decoded copy where torch multiplies packed blocks."""


class CheckpointSource:
    """The WeightSource (serve_app.models.base) over a checkpoint.

    With native kernels on the CPU every matrix is packed into their layout, bit by bit, and its pages of the file are
    given back. Where Triton's kernels compute, so is every matrix of a type that has planes, into these and on the
    device; those that are asked for together and have one type become one. Elsewhere a matrix whose stored type is the
    compute dtype is a view of the mapped file; one in another plain type that is as wide or wider is converted, its
    pages given back; every other stays packed, float16 for a float32 model included. A tensor that is quantised while
    it is loaded (StoredTensor.recoding) goes the same ways, piece by piece, without a view of the file; where
    Triton's kernels compute it is encoded on the device, if there is an encoder of its type. Remembers which tensors
    were asked for. is_exact: see NativeWeight. progress: told of each, piece by piece where quantised.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        *,
        is_exact: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self._progress = progress
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device
        self._is_exact = is_exact
        self._taken: set[str] = set()
        num_weights = sum(num_elements(t.shape) for t in checkpoint.stored())
        self._keep_decoded = num_weights * 4 <= SMALL_MODEL_BYTES
        self._has_triton, reason = triton_computes(device)
        if device.type not in ("cpu", "meta") and not self._has_triton:
            logger.warning("no Triton kernels, quantised matrices are decoded tile by tile, which is slow: %s", reason)

    def has(self, name: str) -> bool:
        """See WeightSource."""
        return self._checkpoint.find(name) is not None

    def tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """See WeightSource."""
        stored = self._take(name, shape)
        if stored.recoding is not None:
            return dequantize(stored.form, recoded_bytes(stored, self._progress)).view(shape).to(self._device)
        rows = self._rows(stored, shape[0] if len(shape) > 1 else 1)
        values = dequantize(stored.form, rows).view(shape)
        if stored.row_order is not None:
            values = values[stored.row_order]
        drop_pages(stored.data)
        return values.to(self._device)

    def weight(self, names: Sequence[str], out_features: Sequence[int], in_features: int) -> Weight:
        """See WeightSource."""
        stored = [self._take(n, (out, in_features)) for n, out in zip(names, out_features, strict=True)]
        if self._has_triton and all(planar_form(tensor.form.name) for tensor in stored):
            runs = [self._planar(list(run)) for _, run in groupby(stored, lambda tensor: tensor.form.name)]
            return runs[0] if len(runs) == 1 else FusedPlanarWeight(runs)
        weight = fuse([self._matrix(tensor) for tensor in stored])
        if len(stored) > 1 and not isinstance(weight, FusedWeight):
            for tensor in stored:  # the parts were copied into one matrix
                drop_pages(tensor.data)
        return weight

    def experts(self, name: str, num_experts: int, out_features: int, in_features: int) -> Experts:
        """See WeightSource."""
        parts = self._expert_parts(name, num_experts, out_features, in_features)
        return self._native_experts(parts) or self._planar_experts(parts) or self._torch_experts(parts)

    def unused(self) -> list[str]:
        """Stored names of tensors that nothing asked for."""
        return [t.name for t in self._checkpoint.stored() if t.name not in self._taken]

    def _take(self, name: str, shape: tuple[int, ...]) -> StoredTensor:
        stored = self._checkpoint.find(name)
        if stored is None:
            raise ModelFileError(f"{self._checkpoint.label}: tensor {self._checkpoint.stored_name(name)!r} is missing")
        where = f"{stored.file}: tensor {stored.name!r}"
        if stored.shape != shape:
            raise ModelFileError(f"{where} has shape {list(stored.shape)}, the model needs {list(shape)}")
        if not stored.form.is_decodable:
            raise ModelFileError(f"{where} has type {stored.form.name}, which cannot be a weight")
        self._taken.add(stored.name)
        if self._progress is not None and stored.recoding is None:
            self._progress(stored.name, len(stored.data))
        return stored

    def _blocks(self, stored: StoredTensor, device: torch.device | None = None) -> Iterator[tuple[int, Tensor]]:
        """See loaders.recode; what keeps its type was told when it was taken."""
        return blocks_of(stored, None if stored.recoding is None else self._progress, device)

    def _rows(self, stored: StoredTensor, num_rows: int) -> Tensor:
        """The bytes as [num_rows, bytes per row], still those of the file."""
        return as_tensor(stored.data).view(num_rows, -1)

    def _expert_parts(self, name: str, num_experts: int, out: int, width: int) -> list[StoredTensor]:
        """The experts' matrices one by one, each with its own bytes of the file."""
        whole_name = name.replace("{}.", "")
        if not self.has(whole_name):
            parts = [self._take(name.format(expert), (out, width)) for expert in range(num_experts)]
            for part in parts:
                if part.form is not parts[0].form:
                    raise ModelFileError(
                        f"{part.file}: tensor {part.name!r} has type {part.form.name}, expert 0 has "
                        f"{parts[0].form.name}: the experts of a layer must have one type"
                    )
            return parts
        whole = self._take(whole_name, (num_experts, out, width))
        size = len(whole.data) // num_experts
        datas = [whole.data[expert * size : (expert + 1) * size] for expert in range(num_experts)]
        recodings = [None if whole.recoding is None else whole.recoding.of_expert(e, width) for e in range(num_experts)]
        return [
            replace(whole, shape=(out, width), data=data, recoding=recoding)
            for data, recoding in zip(datas, recodings, strict=True)
        ]

    def _native_experts(self, parts: list[StoredTensor]) -> NativeExperts | None:
        (rows, columns), form = parts[0].shape, parts[0].form
        num_rows = len(parts) * padded(rows)
        matrix = native_matrix(form.type_id, num_rows, columns) if self._device.type == "cpu" else None
        if matrix is None:
            return None
        experts = NativeExperts(matrix, len(parts), rows, self._dtype, is_exact=self._is_exact)
        for number, part in enumerate(parts):
            self._pack(part, partial(experts.pack, number))
        return experts

    def _planar_experts(self, parts: list[StoredTensor]) -> PlanarExperts | None:
        """None without Triton's kernels, or for a type without planes."""
        if not self._has_triton or planar_form(parts[0].form.name) is None:
            return None
        return PlanarExperts(self._planar(parts).matrix, len(parts), self._dtype)

    def _torch_experts(self, parts: list[StoredTensor]) -> Experts:
        form, plain = parts[0].form, PLAIN_DTYPES.get(parts[0].form.name)
        num_rows, columns = parts[0].shape
        device = self._encoding_device(form)
        rows = torch.empty((len(parts), num_rows, form.row_bytes(columns)), dtype=torch.uint8, device=device)
        for out, part in zip(rows, parts, strict=True):
            recoded_bytes(part, self._progress if part.recoding else None, out, device)
        if plain is not None and plain.itemsize >= self._dtype.itemsize:
            return DenseExperts(self._placed(rows.view(plain).to(self._dtype)))
        return PackedExperts(form, self._placed(rows), self._dtype)

    def _matrix(self, stored: StoredTensor) -> Weight:
        if self._has_triton and planar_form(stored.form.name) is not None:
            return self._planar([stored])
        return self._native(stored) or self._torch(stored)

    def _planar(self, stored: list[StoredTensor]) -> PlanarWeight:
        """Matrices of one type, which has planes, as one. The device holds one piece of a file besides."""
        form = planar_form(stored[0].form.name)
        assert form is not None
        matrix = PlanarMatrix(form, sum(t.shape[0] for t in stored), stored[0].shape[1], self._device)
        first = 0
        for tensor in stored:
            for start, blocks in self._blocks(tensor, self._device):
                matrix.pack(first + start, blocks)
            first += tensor.shape[0]
        return PlanarWeight(matrix, self._dtype)

    def _native(self, stored: StoredTensor) -> NativeWeight | None:
        """None where native kernels cannot multiply by it."""
        matrix = native_matrix(stored.form.type_id, *stored.shape) if self._device.type == "cpu" else None
        if matrix is None:
            return None
        if stored.row_order is not None and stored.recoding is None:
            expect_pages(stored.data)
            matrix.pack(0, self._rows(stored, stored.shape[0]), stored.row_order)
            drop_pages(stored.data)
        else:
            self._pack(stored, matrix.pack)
        return NativeWeight(matrix, self._dtype, is_exact=self._is_exact)

    def _pack(self, stored: StoredTensor, pack: Callable[[int, Tensor], None]) -> None:
        for first, blocks in self._blocks(stored):
            pack(first, blocks)

    def _torch(self, stored: StoredTensor) -> Weight:
        if stored.recoding is not None:
            rows = recoded_bytes(stored, self._progress, device=self._encoding_device(stored.form))
        else:
            rows = self._rows(stored, stored.shape[0])
            if stored.row_order is not None:
                rows = rows[stored.row_order]
                drop_pages(stored.data)
        plain = PLAIN_DTYPES.get(stored.form.name)
        if plain == self._dtype:
            return DenseWeight(self._placed(_view(rows, plain)))
        if plain is not None and plain.itemsize >= self._dtype.itemsize:
            dense = _view(rows, plain).to(self._dtype)
            drop_pages(stored.data)
            return DenseWeight(self._placed(dense))
        return PackedWeight(stored.form, self._placed(rows), self._dtype, keep_decoded=self._keep_decoded)

    def _encoding_device(self, form: BlockFormat) -> torch.device | None:
        """Where blocks without planes are put together: plain numbers, which are yet to be converted, on the CPU."""
        return self._device if self._has_triton and form.name not in PLAIN_DTYPES else None

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._device)


def _view(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes as numbers; copied only where the file has them at an address that is no multiple of their size."""
    if rows.data_ptr() % dtype.itemsize:
        rows = rows.clone()
    return rows.view(dtype)
