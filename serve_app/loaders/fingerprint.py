"""A model's identity for the prefix cache: keys and values are only shared between equal fingerprints."""

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import numpy as np

from serve_app.loaders.checkpoint import StoredTensor
from serve_app.loaders.pages import drop_pages

FINGERPRINT_BYTES = 16
_SAMPLES = 8
_SAMPLE_BYTES = 64


def fingerprint(facts: dict[str, Any], tensors: Iterable[StoredTensor]) -> bytes:
    """blake2b, 16 bytes, over facts that decide what K and V are and over the tensors.

    facts: the model's arguments and the compute dtype, as JSON with sorted keys. Of each tensor: name, type, shape and
    eight evenly spaced samples of 64 bytes. Names of files and times do not count, so copies of a model agree; a
    fine-tuned or re-quantised one differs, since that changes numbers all over its matrices. Reading whole files would
    take as long as loading them.
    """
    digest = hashlib.blake2b(digest_size=FINGERPRINT_BYTES, person=b"sirocco-model")
    digest.update(json.dumps(facts, sort_keys=True, default=str).encode())
    for tensor in tensors:
        digest.update(f"\0{tensor.name}\0{tensor.form.name}\0{tensor.shape}\0".encode())
        last = max(0, len(tensor.data) - _SAMPLE_BYTES)
        for start in np.unique(np.linspace(0, last, _SAMPLES, dtype=np.int64)):
            digest.update(tensor.data[start : start + _SAMPLE_BYTES].tobytes())
        drop_pages(tensor.data)  # a fault brings in its neighbourhood: the samples would leave half the file resident
    return digest.digest()
