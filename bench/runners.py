"""Models that are ready to be timed: transformers, native, ONNX Runtime or llama.cpp.

One run is a prefill (the prompts, and the argmax of their last positions) and some greedy
steps with a KV cache. The prompts are random tokens, the same for all models of one vocabulary.
"""

from __future__ import annotations

import inspect
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from secateur.bench.layers import Linears, native_linears, now, torch_linears
from secateur.bench.subjects import model_bytes
from secateur.errors import EnvironmentFault, ModelError, UsageError, did_you_mean

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

Ids = np.ndarray[Any, np.dtype[np.int32]]

# Of directories; one with model.onnx, and an .onnx file, is run by ONNX Runtime.
ENGINES = ("transformers", "native")
_CHUNK = 512  # prompt tokens of a step: what an engine with other things to do would take


@dataclass(frozen=True)
class Workload:
    """What one run computes: so many prompts of so many tokens, and so many tokens after each."""

    prompt: int
    new_tokens: int
    batch: int


@dataclass(frozen=True)
class Timing:
    """Seconds that one model took in one round; joules where the machine counts them."""

    prefill: float
    decode: float
    joules: float | None = None


Runner = Callable[[], Timing]


@dataclass(frozen=True)
class Subject:
    """A model in memory.

    Attributes:
        path: as it was given.
        engine: what runs it.
        run: one run under a load, timed.
        bytes: of its weight files.
        memory_bytes: of its weights in memory.
        modules: what it computes with: innermost modules by class, or linears by layout.
        notes: what a reader must know of how it is computed.
        warnings: what makes its numbers doubtful.
        linears: its linears, if they can be timed by themselves.
    """

    path: str
    engine: str
    run: Callable[[Workload], Timing]
    bytes: int
    memory_bytes: int
    modules: dict[str, int]
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    linears: Linears | None = None


def is_file(path: str | Path) -> bool:
    """Whether a path is a file that another program runs, and no directory."""
    return Path(path).suffix in (".gguf", ".onnx")


def is_onnx(path: str | Path) -> bool:
    """Whether a path is ONNX Runtime's to run."""
    return (Path(path) / "model.onnx").is_file()


def choose_engine(
    wanted: str, paths: Sequence[str | Path], device: str, dtype: str
) -> tuple[str, str | None]:
    """The engine for all directories, and a remark if "auto" could not take the native one.

    Raises:
        UsageError: there is no such engine, or the native one cannot do what is asked.
    """
    from secateur.serve.native.config import obstacle

    if wanted not in (*ENGINES, "auto"):
        raise UsageError(f"there is no engine {wanted!r}", did_you_mean(wanted, [*ENGINES, "auto"]))
    if wanted == "transformers":
        return wanted, None
    why = None
    if device != "cpu":
        why = f"it has no kernels for {device}"
    elif dtype != "auto":
        why = f"it computes in the type of the weights, not in {dtype}"
    for path in paths:
        why = why or (None if is_file(path) or is_onnx(path) else obstacle(path))
    if why is None:
        return "native", None
    if wanted == "native":
        raise UsageError(f"the native engine cannot be measured here: {why}", "leave out --engine")
    return "transformers", f"run by transformers; the native engine cannot: {why}"


def open_transformers(path: str | Path, dtype: str, device: torch.device) -> Subject:
    """Open a directory with transformers, in one compute type of `DTYPES`.

    Raises:
        ModelError: it cannot be opened.
    """
    import torch

    from secateur.model import load_causal_lm
    from secateur.serve.linear import kernel_report

    model = load_causal_lm(path, dtype=getattr(torch, dtype)).to(device)
    uses = kernel_report(model)
    leaves = (module for module in model.modules() if next(module.children(), None) is None)
    tensors = [*model.parameters(), *model.buffers()]
    short = _last_position(model)
    doubt = "prefill: computes the logits of every position, not only of the last"
    return Subject(
        str(path),
        "transformers",
        transformers_runner(model, device, short),
        model_bytes(path),
        sum(tensor.nbytes for tensor in tensors)
        + sum(use.nbytes for use in uses if use.path != "dense"),
        dict(Counter(type(module).__name__ for module in leaves).most_common()),
        tuple(map(str, uses)),
        () if short else (doubt,),
        torch_linears(model, getattr(torch, dtype), device),
    )


def open_native(
    path: str | Path, loads: Sequence[Workload], threads: int | None, head: str = "auto"
) -> Subject:
    """Open a directory with the native engine; ``head`` is the value type of its lm_head.

    Raises:
        ModelError: it cannot be opened.
        EnvironmentFault: the kernels are not built.
    """
    from secateur.serve.native.model import NativeModel

    model = NativeModel.open(path, threads=threads, head=head)  # type: ignore[arg-type]
    for load in loads:
        length = load.prompt + load.new_tokens
        needed = load.batch * -(-length // model.page_tokens)
        if needed > model.pages:
            raise UsageError(
                f"{path}: the KV cache has {model.pages} pages; {load.batch} sequences of "
                f"{length} tokens take {needed}",
                "use a smaller --batch, --prompt or --new-tokens",
            )
    layouts: Counter[str] = Counter()
    for use in model.report:
        layouts[f"{use.layout} {use.values}"] += use.matrices
    return Subject(
        str(path),
        "native",
        _native_runner(model),
        model_bytes(path),
        model.weight_bytes,
        dict(layouts.most_common()),
        tuple(map(str, model.report)),
        linears=native_linears(model),
    )


def open_llama_cpp(path: str | Path, loads: Sequence[Workload], threads: int) -> Subject:
    """Open a GGUF file with llama.cpp.

    Raises:
        EnvironmentFault: llama-cpp-python is not installed.
        UsageError: a batch is asked for.
        ModelError: it cannot be opened.
    """
    if any(load.batch != 1 for load in loads):
        raise UsageError(f"{path}: llama.cpp is measured with one sequence", "leave out --batch")
    try:
        import llama_cpp
    except ImportError as fault:
        raise EnvironmentFault(
            f"{path} needs llama.cpp, which is not installed",
            "pip install 'secateur[llama-cpp]', which compiles it",
        ) from fault
    length = max(load.prompt + load.new_tokens for load in loads)
    try:
        model = llama_cpp.Llama(
            str(path), n_ctx=length, n_batch=_CHUNK, n_ubatch=_CHUNK, verbose=False,
            n_threads=threads, n_threads_batch=threads,
        )  # fmt: skip
    except (ValueError, OSError) as fault:
        raise ModelError(f"llama.cpp cannot open {path}: {fault}", "check the file") from fault
    size = Path(path).stat().st_size
    runner = _llama_cpp_runner(llama_cpp, model)
    return Subject(
        str(path), "llama.cpp", runner, size, size, {}, (f"llama.cpp {llama_cpp.__version__}",)
    )


def prompts(vocabulary: int, load: Workload) -> Ids:
    """The tokens that are read, ``[batch, prompt]``."""
    shape = (load.batch, load.prompt)
    return np.random.default_rng(0).integers(vocabulary, size=shape, dtype=np.int32)


def transformers_runner(
    model: PreTrainedModel, device: torch.device, short: dict[str, int]
) -> Callable[[Workload], Timing]:
    """Of whatever is called as a model of transformers is.

    Args:
        model: the model.
        device: where it computes.
        short: the keyword that limits logits to the last position, if it has one.
    """
    import torch

    keywords = {"use_cache": True, **short}

    @torch.inference_mode()
    def run(load: Workload) -> Timing:
        tokens = prompts(model.config.get_text_config().vocab_size, load)
        prompt = torch.from_numpy(tokens).long().to(device)
        begun = now(device)
        output = model(input_ids=prompt, **keywords)
        token = output.logits[:, -1:].argmax(-1)
        filled = now(device)
        for _ in range(load.new_tokens):
            output = model(input_ids=token, past_key_values=output.past_key_values, **keywords)
            token = output.logits[:, -1:].argmax(-1)
        return Timing(prefill=filled - begun, decode=now(device) - filled)

    return run


def _last_position(model: PreTrainedModel) -> dict[str, int]:
    """The keyword that limits the logits to the last position, where the architecture has it."""
    known = inspect.signature(model.forward).parameters
    return {"logits_to_keep": 1} if "logits_to_keep" in known else {}


def _native_runner(model: Any) -> Callable[[Workload], Timing]:
    from secateur.serve.native.step import Batch

    def run(load: Workload) -> Timing:
        tokens = prompts(model.vocabulary_size, load)
        batch, length = tokens.shape
        pages = -(-(length + load.new_tokens) // model.page_tokens)
        tables = np.arange(batch * pages, dtype=np.int32).reshape(batch, pages)
        size = max(1, _CHUNK // batch)

        def step(new: Ids, position: int) -> Ids:
            count = new.shape[1]
            starts = np.arange(batch + 1, dtype=np.int32) * count
            last = starts[1:] - 1
            positions = np.full(batch, position, np.int32)
            logits = model.step(Batch(new.reshape(-1), starts, positions, tables, last))
            chosen: Ids = logits.argmax(axis=1).astype(np.int32)[:, None]
            return chosen

        begun = time.perf_counter()
        for at in range(0, length, size):
            token = step(np.ascontiguousarray(tokens[:, at : at + size]), at)
        filled = time.perf_counter()
        for at in range(load.new_tokens):
            token = step(token, length + at)
        return Timing(prefill=filled - begun, decode=time.perf_counter() - filled)

    return run


def _llama_cpp_runner(library: Any, model: Any) -> Callable[[Workload], Timing]:
    vocabulary = model.n_vocab()

    def step(new: Ids) -> Ids:
        array = (library.llama_token * len(new))(*new.tolist())
        code = library.llama_decode(model.ctx, library.llama_batch_get_one(array, len(new)))
        if code != 0:
            raise ModelError(f"llama.cpp failed with code {code}", "check the file")
        logits = np.ctypeslib.as_array(library.llama_get_logits_ith(model.ctx, -1), (vocabulary,))
        return np.array([logits.argmax()], np.int32)

    def run(load: Workload) -> Timing:
        tokens = prompts(vocabulary, load)[0]
        library.llama_memory_clear(library.llama_get_memory(model.ctx), True)
        begun = time.perf_counter()
        for at in range(0, len(tokens), _CHUNK):
            token = step(tokens[at : at + _CHUNK])
        filled = time.perf_counter()
        for _ in range(load.new_tokens):
            token = step(token)
        return Timing(prefill=filled - begun, decode=time.perf_counter() - filled)

    return run
