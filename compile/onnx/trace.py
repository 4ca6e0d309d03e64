"""Tracing: transformers' decoder becomes an ONNX graph with a KV cache, by torch's exporter.

Inputs and outputs have the names of optimum and onnxruntime-genai::

    input_ids, attention_mask, position_ids, past_key_values.N.key, past_key_values.N.value
    logits, present.N.key, present.N.value

Two ops are not traced into but marked, which keeps the trace short: attention, as
``com.microsoft::GroupQueryAttention``, and each linear, as ``secateur::Linear``. `graph` puts
standard ops in their place. No weight is read: every parameter is a view of one number.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.onnx import ops

from secateur.errors import ModelError

if TYPE_CHECKING:
    import onnx_ir
    from transformers import PreTrainedModel

OPSET = 21
DOMAIN, MICROSOFT = "secateur", "com.microsoft"
KERNEL_WIDTH = 8  # ONNX Runtime's kernel takes heads of multiples of this width
ATTENTION, LINEAR = "GroupQueryAttention", "Linear"
MASKED = -1e9  # added to the scores of tokens that may not be seen
_IMPLEMENTATION = "secateur_onnx"


class _Cache:
    """Stands in for transformers' cache: the past comes in as inputs, the present goes out."""

    def __init__(self, past: list[torch.Tensor]) -> None:
        self.past = past
        self.present: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key, value  # `attend` joins them with the past

    def get_seq_length(self, *_: Any) -> int:
        return 0  # of use to make positions only, and those are given


class Decoder(torch.nn.Module):
    """The model with the signature of the graph; see the module."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.layers = int(model.config.num_hidden_layers)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        *past: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        """Logits, then key and value of each layer."""
        cache = _Cache(list(past))
        answer = self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            secateur_cache=cache,
            secateur_masks=_Masks(input_ids, attention_mask),
        )
        present = [part for layer in range(self.layers) for part in cache.present[layer]]
        return (answer.logits, *present)


class _Masks:
    """What is added to the scores, ``[batch, 1, new, total]``, by the window of a layer."""

    def __init__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> None:
        self._new, self.total = input_ids.shape[1], attention_mask.shape[1]
        self.batch = input_ids.shape[0]
        self._attention_mask = attention_mask
        self._made: dict[int | None, torch.Tensor] = {}
        self.lengths = torch.full((self.batch,), self.total - 1, dtype=torch.int32)
        self.length = torch.full((), self.total, dtype=torch.int32)

    def of(self, window: int | None) -> torch.Tensor:
        if window not in self._made:
            columns = torch.arange(self.total)
            rows = torch.arange(self._new)[:, None] + (self.total - self._new)
            seen = columns <= rows
            if window is not None:
                seen = seen & (columns > rows - window)
            allowed = seen & (self._attention_mask != 0)[:, None, None, :]
            self._made[window] = torch.where(allowed, 0.0, MASKED)
        return self._made[window]


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _: Any,
    *,
    scaling: float,
    secateur_cache: _Cache,
    secateur_masks: _Masks,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **__: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as a mark: ``[batch, heads, new, width]`` to ``[batch, new, heads, width]``."""
    layer, heads, key_heads = module.layer_idx, query.shape[1], key.shape[1]
    batch, width, masks = secateur_masks.batch, query.shape[3], secateur_masks
    past = secateur_cache.past[2 * layer : 2 * layer + 2]
    flat = [part.transpose(1, 2).flatten(2) for part in (query, key, value)]
    attributes: dict[str, Any] = {
        "num_heads": heads,
        "kv_num_heads": key_heads,
        "scale": float(scaling),
        "softcap": float(softcap or 0),
    }
    present = (batch, key_heads, masks.total, width)
    output, *both = ops.symbolic_multi_out(
        f"{MICROSOFT if width % KERNEL_WIDTH == 0 else DOMAIN}::{ATTENTION}",
        (*flat, *past, masks.lengths, masks.length, None, None, None, masks.of(sliding_window)),
        attributes,
        dtypes=(query.dtype,) * 3,
        shapes=(flat[0].shape, present, present),
        version=1,
    )
    secateur_cache.present[layer] = (both[0], both[1])
    return output.view(batch, -1, heads, width), None


def multiply(self: torch.nn.Linear, x: torch.Tensor) -> torch.Tensor:
    """A linear as a mark."""
    inputs = (x, self.weight) if self.bias is None else (x, self.weight, self.bias)
    shape = (*x.shape[:-1], self.out_features)
    return ops.symbolic(f"{DOMAIN}::{LINEAR}", inputs, dtype=x.dtype, shape=shape, version=1)


def trace(model: PreTrainedModel) -> onnx_ir.Model:
    """Trace a model without its weights.

    Args:
        model: its parameters may be on the meta device; afterwards they are placeholders.

    Returns:
        the graph; initializers that are parameters have no data and their names in the model.

    Raises:
        ModelError: torch cannot trace the model; names the op or the line.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(_IMPLEMENTATION, attend)
    config = model.config
    config._attn_implementation = _IMPLEMENTATION
    _hollow(model)
    names, examples, shapes = _signature(config)
    try:
        with _quietly(), _marked_linears(), torch.no_grad():
            program = torch.onnx.export(
                Decoder(model).eval(),
                tuple(examples),
                input_names=names,
                output_names=["logits", *_cache_names("present", config.num_hidden_layers)],
                opset_version=OPSET,
                dynamic_shapes=shapes,
                dynamo=True,
                verbose=False,
                optimize=False,
            )
    except torch.onnx.OnnxExporterError as fault:
        raise ModelError(
            f"torch {torch.__version__} cannot trace this {config.model_type}: {fault}",
            "try the versions of torch and transformers that the manifest of a good export names",
        ) from fault
    assert program is not None
    _optimise(program.model, [f"model.{name}" for name, _ in _parameters(model)])
    return program.model


def _parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """All parameters, one that is tied under each of its names."""
    return iter(model.named_parameters(remove_duplicate=False))


def _optimise(model: onnx_ir.Model, parameters: list[str]) -> None:
    """Fold constants and merge what is equal; parameters have no data yet and are no constants."""
    from onnxscript import optimizer

    graph = model.graph
    held = [graph.initializers.pop(name) for name in parameters if name in graph.initializers]
    for value in held:
        value.const_value = None
        graph.inputs.append(value)
    optimizer.optimize_ir(model)
    for value in held:
        graph.inputs.remove(value)
        graph.initializers[value.name] = value


def _cache_names(prefix: str, layers: int) -> list[str]:
    return [f"{prefix}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def _signature(config: Any) -> tuple[list[str], list[Any], Any]:
    """Names, example inputs and dynamic axes of the graph."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    batch, new, past = 2, 3, 5
    ids = torch.zeros((batch, new), dtype=torch.int64)
    examples = [ids, torch.ones((batch, past + new), dtype=torch.int64), ids.clone()]
    names = ["input_ids", "attention_mask", "position_ids"]
    caches = _cache_names("past_key_values", config.num_hidden_layers)
    examples += [torch.zeros((batch, heads, past, width)) for _ in caches]
    axis = torch.export.Dim
    rows, fresh, total = axis("batch"), axis("sequence"), axis("total_sequence")
    before = axis("past_sequence")
    shapes = ({0: rows, 1: fresh}, {0: rows, 1: total}, {0: rows, 1: fresh})
    return names + caches, examples, (*shapes, tuple({0: rows, 2: before} for _ in caches))


def _hollow(model: torch.nn.Module) -> None:
    """Put a view of one number in the place of every parameter."""
    made: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if id(parameter) not in made:
                view = torch.zeros(1).expand(parameter.shape)
                made[id(parameter)] = torch.nn.Parameter(view, requires_grad=False)
            module.register_parameter(name, made[id(parameter)])


@contextlib.contextmanager
def _marked_linears() -> Iterator[None]:
    plain = torch.nn.Linear.forward
    torch.nn.Linear.forward = multiply  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        torch.nn.Linear.forward = plain  # type: ignore[method-assign]


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without what the exporter tells of itself and of packages that are not there."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
