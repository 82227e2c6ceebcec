"""Triton kernels. Signatures are those of kernels.reference, with lengths as tensors on the device.

No kernel waits for the device or asks it for a number: grids follow from shapes alone, so that every one may be
captured in a CUDA graph and replayed with other contents. Nothing is added up by atomics: the same call gives the same
bits.

Triton decides as kernels are defined whether they are compiled or interpreted (TRITON_INTERPRET=1); support.py says
what can run here without importing it.
"""
