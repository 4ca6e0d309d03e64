"""Sparse initializers: ``SparseTensorProto``, values and their places as int64.

The standard form, and at 50 % larger than the dense one: it pays off above a sparsity of
8 / (8 + b), where b is the bytes of a value (67 % for fp32, 80 % for 16 bits, 89 % for int8).
ONNX Runtime makes the weights dense when it opens the file.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from secateur.errors import ModelError

INDEX_BYTES = 8
_PROTOBUF = 2**31 - 1  # bytes of a file; sparse initializers cannot lie beside it


def break_even(value_bytes: int) -> float:
    """The sparsity above which a sparse initializer is smaller than a dense one."""
    return INDEX_BYTES / (INDEX_BYTES + value_bytes)


def make_sparse(model: Any, names: Collection[str]) -> int:
    """Turn initializers of an ``onnx.ModelProto`` into sparse ones, in place.

    Returns:
        the bytes that they take.

    Raises:
        ModelError: they do not fit into one file.
    """
    from onnx import helper, numpy_helper

    graph, total = model.graph, 0
    kept = []
    for tensor in graph.initializer:
        if tensor.name not in names:
            kept.append(tensor)
            continue
        dense = numpy_helper.to_array(tensor)
        places = np.flatnonzero(dense).astype(np.int64)
        values = numpy_helper.from_array(dense.reshape(-1)[places], tensor.name)
        indices = numpy_helper.from_array(places, tensor.name + ".places")
        graph.sparse_initializer.append(
            helper.make_sparse_tensor(values, indices, list(dense.shape))
        )
        total += len(values.raw_data) + len(indices.raw_data)
        if total > _PROTOBUF:
            raise ModelError(
                f"sparse initializers of more than {total / 1e9:.1f} GB do not fit into one file",
                "use --onnx-weights bitmask",
            )
    typed = [one for one in graph.value_info if one.name not in names]
    del graph.value_info[:]
    graph.value_info.extend(typed)
    del graph.initializer[:]
    graph.initializer.extend(kept)
    return total
