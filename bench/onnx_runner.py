"""Decoders in ONNX files, on ONNX Runtime or OpenVINO.

The file is what `optimum-cli export onnx` and the onnx-community models are: `input_ids`,
`attention_mask`, `position_ids` (where it wants them) and `past_key_values.*` go in, `logits` and
`present.*` come out, `present.X` being the next `past_key_values.X`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from secateur.bench.runners import Ids, Subject, Timing, Workload, prompts
from secateur.errors import EnvironmentFault, ModelError

_PAST, _PRESENT = "past_key_values.", "present."
_NUMPY = {"float": np.float32, "float16": np.float16, "double": np.float64, "f32": np.float32}
_NUMPY |= {"f16": np.float16}

Feeds = dict[str, np.ndarray[Any, Any]]


class Decoder:
    """A graph that is ready to run.

    Args:
        inputs: of each input the shape (what is no number is free) and the element type.
        outputs: names.
        run: from inputs by name to outputs by name.

    Raises:
        ModelError: it is no decoder of the form above.
    """

    def __init__(
        self,
        path: str | Path,
        inputs: Mapping[str, tuple[Sequence[Any], str]],
        outputs: Sequence[str],
        run: Callable[[Feeds], Feeds],
    ) -> None:
        self._inputs, self._run = inputs, run
        self._past = [name for name in inputs if name.startswith(_PAST)]
        wanted = {name.replace(_PAST, _PRESENT) for name in self._past} | {"logits"}
        if "input_ids" not in inputs or not self._past or not wanted <= set(outputs):
            raise ModelError(
                f"{path} is no decoder with a KV cache: its inputs are {', '.join(inputs)}",
                "export it with past key values, e.g. optimum-cli export onnx --task "
                "text-generation-with-past",
            )

    def empty(self, batch: int) -> Feeds:
        """A cache without keys: the free dimensions are the batch and the length."""
        cache = {}
        for name in self._past:
            shape, kind = self._inputs[name]
            sizes = [size if isinstance(size, int) and size > 0 else 0 for size in shape]
            sizes[0] = batch
            cache[name] = np.zeros(sizes, _NUMPY[kind])
        return cache

    def step(self, ids: Ids, cache: Feeds, read: int) -> tuple[Ids, Feeds]:
        """Read tokens ``[batch, n]`` after `read` others; the likeliest next ones and the cache."""
        batch, count = ids.shape
        every: Feeds = {
            "input_ids": ids.astype(np.int64),
            "attention_mask": np.ones((batch, read + count), np.int64),
            "position_ids": np.tile(np.arange(read, read + count), (batch, 1)),
            **cache,
        }
        found = self._run({name: every[name] for name in self._inputs})
        token: Ids = found["logits"][:, -1].argmax(-1).astype(np.int32)[:, None]
        return token, {name: found[name.replace(_PAST, _PRESENT)] for name in self._past}


def open_onnx(path: str | Path, engine: str, threads: int) -> Subject:
    """Open an .onnx file.

    Args:
        path: the file.
        engine: onnxruntime or openvino.
        threads: CPU threads.

    Raises:
        EnvironmentFault: the engine is not installed.
        ModelError: it cannot open the file, or it is no decoder.
    """
    decoder, release, vocabulary = (_openvino if engine == "openvino" else _onnxruntime)(
        path, threads
    )
    file = Path(path)
    size = sum(one.stat().st_size for one in file.parent.glob(f"{file.name}*"))  # external data

    def run(load: Workload) -> Timing:
        tokens = prompts(vocabulary, load)
        begun = time.perf_counter()
        token, cache = decoder.step(tokens, decoder.empty(load.batch), 0)
        filled = time.perf_counter()
        for at in range(load.new_tokens):
            token, cache = decoder.step(token, cache, load.prompt + at)
        return Timing(prefill=filled - begun, decode=time.perf_counter() - filled)

    return Subject(str(path), engine, run, size, size, {}, (f"{engine} {release}",))


def open_onnx_directory(
    path: str | Path, length: int, threads: int, providers: Sequence[str]
) -> Subject:
    """Open a directory with ``model.onnx``, as ``secateur serve --engine onnx`` does.

    Args:
        length: tokens that it must be able to read.
        providers: see `secateur.serve.onnx.session.parse_providers`.

    Raises:
        ModelError: it cannot be opened, or reads fewer tokens.
        UsageError, EnvironmentFault: a provider is unknown or absent.
    """
    from secateur.serve.onnx.session import OnnxModel

    model = OnnxModel.open(Path(path), threads, providers)
    if length > model.max_length:
        raise ModelError(
            f"{path} reads at most {model.max_length} tokens", "use a smaller --prompt"
        )
    size = sum(file.stat().st_size for file in Path(path).glob("model.onnx*"))
    names = ", ".join(model.session.get_providers())

    def run(load: Workload) -> Timing:
        tokens = prompts(int(model.config["vocab_size"]), load)
        begun = time.perf_counter()
        logits, cache = model.step(tokens, ())
        token = logits[:, -1:].argmax(-1)
        filled = time.perf_counter()
        for _ in range(load.new_tokens):
            logits, cache = model.step(token, cache)
            token = logits[:, -1:].argmax(-1)
        return Timing(prefill=filled - begun, decode=time.perf_counter() - filled)

    return Subject(
        str(path),
        "onnxruntime",
        run,
        size,
        model.weight_bytes,
        {},
        (f"ONNX Runtime {model.runtime}: {names}",),
        ("prefill: computes the logits of every position, not only of the last",),
    )


def _onnxruntime(path: str | Path, threads: int) -> tuple[Decoder, str, int]:
    try:
        import onnxruntime
    except ImportError as fault:
        raise EnvironmentFault(
            f"{path} needs ONNX Runtime, which is not installed", "pip install 'secateur[peers]'"
        ) from fault
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as fault:  # its own kinds, which derive from nothing more precise
        raise ModelError(f"ONNX Runtime cannot open {path}: {fault}", "check the file") from fault
    inputs = {
        one.name: (one.shape, one.type.removeprefix("tensor(").rstrip(")"))
        for one in session.get_inputs()
    }
    outputs = [one.name for one in session.get_outputs()]

    def run(feeds: Feeds) -> Feeds:
        return dict(zip(outputs, session.run(outputs, feeds), strict=True))

    vocabulary = next(one.shape[-1] for one in session.get_outputs() if one.name == "logits")
    return Decoder(path, inputs, outputs, run), onnxruntime.__version__, vocabulary


def _openvino(path: str | Path, threads: int) -> tuple[Decoder, str, int]:
    try:
        import openvino
    except ImportError as fault:
        raise EnvironmentFault(
            f"{path} needs OpenVINO, which is not installed", "pip install openvino"
        ) from fault
    try:
        graph = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_NUM_THREADS": threads})
    except RuntimeError as fault:
        raise ModelError(f"OpenVINO cannot open {path}: {fault}", "check the file") from fault
    request = graph.create_infer_request()
    inputs = {
        one.any_name: (
            [size.get_length() if size.is_static else None for size in one.partial_shape],
            one.element_type.get_type_name(),
        )
        for one in graph.inputs
    }
    outputs = [one.any_name for one in graph.outputs]

    def run(feeds: Feeds) -> Feeds:
        found = request.infer(feeds)
        return {name: found[name] for name in outputs}

    last = graph.output("logits").partial_shape[-1]
    return Decoder(path, inputs, outputs, run), openvino.__version__, last.get_length()
