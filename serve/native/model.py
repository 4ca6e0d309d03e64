"""A model for the native engine: its weights in the kernels' layouts, its KV cache, its step."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from secateur.compile import cpu
from secateur.errors import UsageError
from secateur.serve.native.config import Architecture, read_architecture
from secateur.serve.native.step import Batch, Floats
from secateur.serve.native.weight_cache import WeightCache
from secateur.serve.native.weights import Activations, Weights

KvType = Literal["fp32", "fp16", "int8"]

PAGE_TOKENS = 16
_WIDTHS = {"fp32": 4, "fp16": 2, "int8": 1}
_KV_BYTES, _TEXTS = 1 << 30, 64  # the cache unless asked otherwise; memory is taken by use


class NativeModel:
    """A model directory opened for stepping; see `secateur.serve.native.step.StepModel`.

    Keys and values are fp16 unless asked otherwise: half the memory and the reading of fp32, and
    rounded less than bf16 weights are. One beyond 65504 becomes infinite there; models have none.

    Attributes:
        matrices: the linears and the head, by module name, in the order of the model.
        report: what computes them: counts, layouts, types, bytes.
        weight_bytes: of all matrices.
        kv_bytes: of all pages; a page takes memory when it is written to.
    """

    page_tokens = PAGE_TOKENS

    def __init__(
        self,
        decoder: Any,
        weights: Weights,
        architecture: Architecture,
        pages: int,
        kv_type: str,
        mapped: Path | None,
    ) -> None:
        self._decoder = decoder
        self._architecture, self._kv_type, self._mapped = architecture, kv_type, mapped
        self.vocabulary_size = architecture.vocabulary
        self.eos_token_ids = architecture.eos_token_ids
        self.max_length = int(decoder.max_length)
        self.pages = pages
        self.matrices = weights.matrices
        self.report = weights.report()
        self.weight_bytes = sum(use.nbytes for use in self.report)
        self.kv_bytes = int(decoder.cache_bytes)

    @classmethod
    def open(
        cls,
        directory: str | Path,
        *,
        threads: int | None = None,
        values: cpu.Values | None = None,
        head: cpu.Values | Literal["auto"] = "auto",
        activations: Activations | None = None,
        kv_type: KvType = "fp16",
        kv_bytes: int | None = None,
        max_length: int | None = None,
        cache_weights: bool = False,
    ) -> NativeModel:
        """Read a dense, pruned or packed model directory.

        Args:
            directory: the model.
            threads: CPU threads; None leaves them as they are.
            values: type of dense and pruned linears; int8 and int4 round to nearest. None: as
                they are stored.
            head: type of the head; "auto": int8 if the linears are int8 or int4, else as stored.
            activations: what int8 and int4 values are multiplied with; None: int8.
            kv_type: type of keys and values in the cache.
            kv_bytes: memory for the cache; None: 1 GiB, or what 64 texts of the greatest length
                take if that is less.
            max_length: tokens that a sequence may have; None: what the model was made for, if the
                cache holds as many.
            cache_weights: map the packed weights from a file, which processes share, and write
                it first if need be; see `secateur.serve.native.weight_cache`.

        Raises:
            ModelError: the directory is damaged, or `secateur.serve.native.config.obstacle` says
                why the engine cannot run the model.
            UsageError: an option does not fit the model, or is too small.
            EnvironmentFault: the cache of weights cannot be written, or others can write to it.
        """
        architecture = read_architecture(directory)
        length = _length(architecture, max_length)
        pages = _pages(architecture, kv_type, kv_bytes, length, asked=max_length is not None)
        length = min(length, pages * PAGE_TOKENS)
        if threads is not None:
            cpu.set_threads(threads)

        def build(
            ready: Mapping[str, cpu.CpuMatrix] | None = None, mapped: Path | None = None
        ) -> NativeModel:
            weights = Weights(directory, values, head, activations, ready)
            decoder = _build(architecture, weights, kv_type, pages, length)
            return cls(decoder, weights, architecture, pages, kv_type, mapped)

        if not cache_weights:
            return build()
        settings = {"values": values, "head": head, "activations": activations}
        cache = WeightCache(Path(directory), settings)
        ready = cache.read()
        if not ready:
            cache.write(build().matrices)
            ready = cache.read()
        return build(ready, cache.path if ready else None)

    @property
    def nbytes(self) -> int:
        """Bytes of the matrices and of all pages."""
        return self.weight_bytes + self.kv_bytes

    @property
    def description(self) -> str:
        """Facts for the log."""
        model = self._architecture
        uses = "; ".join(map(str, self.report))
        mapped = f", mapped from {self._mapped}" if self._mapped else ""
        shortened = (
            f" (of {model.max_length}: the cache holds no more)"
            if self.max_length == self.pages * PAGE_TOKENS < model.max_length
            else ""
        )
        return (
            f"{model.model_type}, {len(model.sizes)} layers; {uses}{mapped}; "
            f"KV cache {self._kv_type}, {self.pages} pages of {PAGE_TOKENS} tokens, "
            f"{self.kv_bytes / 1e6:.0f} MB; up to {self.max_length} tokens{shortened}; "
            f"{cpu.isa()}, {cpu.threads()} thread{'s' if cpu.threads() > 1 else ''}"
        )

    def step(self, batch: Batch) -> Floats:
        """See `secateur.serve.native.step.StepModel.step`."""
        if self._decoder is None:
            raise ValueError("the model is closed")
        logits: Floats = self._decoder.step(
            batch.tokens, batch.starts, batch.positions, batch.tables, batch.wanted
        )
        return logits

    def close(self) -> None:
        """Free the memory, once no logits are held any more."""
        self._decoder = None
        self.matrices = {}

    def __enter__(self) -> NativeModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _length(architecture: Architecture, asked: int | None) -> int:
    if asked is None:
        return architecture.max_length
    if not 1 <= asked <= architecture.max_length:
        raise UsageError(
            f"a length of {asked} tokens for a model of at most {architecture.max_length}",
            f"choose 1 to {architecture.max_length}",
        )
    return asked


def _pages(
    architecture: Architecture, kv_type: KvType, kv_bytes: int | None, length: int, asked: bool
) -> int:
    """How many pages the cache has; as many as a text of an asked length needs, at least."""
    if kv_type not in _WIDTHS:
        raise UsageError(f"a KV cache of {kv_type!r}", f"choose one of {', '.join(_WIDTHS)}")
    own = page_bytes(architecture, kv_type)
    text = -(-length // PAGE_TOKENS)
    if kv_bytes is None:
        return max(min(_KV_BYTES // own, _TEXTS * text), text if asked else 1)
    pages = kv_bytes // own
    if pages < (text if asked else 1):
        raise UsageError(
            f"{kv_bytes} bytes hold {pages} pages of keys and values, of {text} that {length} "
            "tokens take",
            f"give at least {text * own} bytes, or a smaller length",
        )
    return pages


def page_bytes(architecture: Architecture, kv_type: KvType) -> int:
    """Bytes of a page in all layers and heads."""
    width = _WIDTHS[kv_type]
    chunks = -(-architecture.head_dim // PAGE_TOKENS)
    own = (architecture.head_dim + chunks * PAGE_TOKENS) * PAGE_TOKENS * width
    own += 2 * PAGE_TOKENS * 4 if kv_type == "int8" else 0
    return -(-own // 64) * 64 * sum(sizes.kv_heads for sizes in architecture.sizes)


def _build(a: Architecture, weights: Weights, kv_type: KvType, pages: int, max_length: int) -> Any:
    offset = 1.0 if a.family.gemma else 0.0
    embedding, kind = weights.table("model.embed_tokens.weight", (a.vocabulary, a.hidden))
    head = "model.embed_tokens.weight" if a.tied else "lm_head.weight"
    with ThreadPoolExecutor(cpu.threads()) as pool:
        try:
            made = pool.submit(weights.head, head, (a.vocabulary, a.hidden))
            layers = [
                pool.submit(_layer, a, weights, index, offset) for index in range(len(a.sizes))
            ]
            matrix, arguments = made.result(), [layer.result() for layer in layers]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    decoder = cpu._native().decoder(
        layers=[(sizes.heads, sizes.kv_heads, sizes.intermediate) for sizes in a.sizes],
        hidden=a.hidden,
        head_dim=a.head_dim,
        vocabulary=a.vocabulary,
        max_length=max_length,
        epsilon=a.epsilon,
        attention_scale=a.attention_scale,
        attention_cap=a.attention_cap,
        logit_cap=a.logit_cap,
        embedding_scale=a.embedding_scale,
        activation=a.activation,
        ropes=[(rope.frequencies, rope.factor) for rope in a.ropes],
        embedding=embedding,
        embedding_type=kind,
        norm=weights.vector("model.norm.weight", a.hidden, offset),
        head=matrix,
        cache_type=kv_type,
        pages=pages,
    )
    for layer in arguments:
        decoder.add_layer(**layer)
    return decoder


def _layer(a: Architecture, weights: Weights, index: int, offset: float) -> dict[str, Any]:
    prefix, sizes = f"model.layers.{index}.", a.sizes[index]
    queries, keys = sizes.heads * a.head_dim, sizes.kv_heads * a.head_dim
    width = sizes.intermediate

    def linear(name: str, rows: int, columns: int) -> Any:
        return weights.linear(prefix + name, (rows, columns), name in a.biases)

    def norm(name: str, length: int, there: bool = True) -> Floats | None:
        return weights.vector(f"{prefix}{name}.weight", length, offset) if there else None

    if a.family.fused:
        qkv = [linear("self_attn.qkv_proj", queries + 2 * keys, a.hidden)]
        gate_up = [linear("mlp.gate_up_proj", 2 * width, a.hidden)]
    else:
        rows = {"q": queries, "k": keys, "v": keys}
        qkv = [linear(f"self_attn.{part}_proj", rows[part], a.hidden) for part in "qkv"]
        gate_up = [linear(f"mlp.{part}_proj", width, a.hidden) for part in ("gate", "up")]
    four = a.family.gemma
    return {
        "qkv": qkv,
        "output": linear("self_attn.o_proj", a.hidden, queries),
        "gate_up": gate_up,
        "down": linear("mlp.down_proj", a.hidden, width),
        "attention_norm": norm("input_layernorm", a.hidden),
        "after_attention": norm("post_attention_layernorm", a.hidden, four),
        "mlp_norm": norm(
            "pre_feedforward_layernorm" if four else "post_attention_layernorm", a.hidden
        ),
        "after_mlp": norm("post_feedforward_layernorm", a.hidden, four),
        "query_norm": norm("self_attn.q_norm", a.head_dim, a.family.head_norms),
        "key_norm": norm("self_attn.k_norm", a.head_dim, a.family.head_norms),
        "rope": a.layer_ropes[index],
        "window": a.windows[index],
    }
