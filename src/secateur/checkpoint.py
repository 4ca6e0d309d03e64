"""Reading Hugging Face checkpoints tensor by tensor, and writing safetensors files safely.

A checkpoint is a directory with ``config.json`` and one ``*.safetensors`` file, or several with
``model.safetensors.index.json``. Opening it reads headers only; a tensor is read when asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.errors import ModelError

if TYPE_CHECKING:
    import torch

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# Everything else that makes a model directory complete; copied from model to model unchanged.
COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab*",
    "merges.txt",
    "preprocessor_config.json",
    "*.model",
    "LICENSE*",
)

_DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}
_DTYPES |= {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1}
_TORCH_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "BOOL": "bool",
}
_TORCH_DTYPES |= {
    f"{kind}{bits}": f"{name}{bits}"
    for kind, name in (("I", "int"), ("U", "uint"))
    for bits in (8, 16, 32, 64)
}
_STORED_DTYPES = {name: kind for kind, name in _TORCH_DTYPES.items()}
# In which order safetensors lays tensors out: wide elements first, so that all are aligned.
_ORDER = "U64 I64 F64 F32 U32 I32 BF16 F16 U16 I16 F8_E4M3 F8_E5M2 I8 U8 BOOL".split()  # noqa: SIM905


class Checkpoint:
    """A model directory opened for reading.

    Attributes:
        path: the directory.
        config: the parsed ``config.json``.

    Raises:
        ModelError: on opening, if the directory, its config or a shard is missing or damaged;
            on reading, if a tensor is absent.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_dir():
            raise ModelError(
                f"there is no model directory at {self.path}",
                "give the path of a Hugging Face model directory (config.json + *.safetensors)",
            )
        self.config: dict[str, Any] = read_json(self.path / CONFIG)
        self._entries: dict[str, tuple[Path, dict[str, Any]]] = {}
        self._starts: dict[Path, int] = {}
        for shard in self._shards():
            self._starts[shard] = _data_start(shard)
            for name, entry in _read_header(shard).items():
                self._entries[name] = (shard, entry)

    def _shards(self) -> list[Path]:
        if (self.path / INDEX).exists():
            named = read_json(self.path / INDEX).get("weight_map")
            if not isinstance(named, dict):
                raise ModelError(f"{self.path / INDEX} has no 'weight_map'", "copy the file again")
            shards = [self.path / name for name in sorted(set(named.values()))]
        else:
            shards = [self.path / SINGLE]
        for shard in shards:
            if shard.parent != self.path:
                raise ModelError(
                    f"{INDEX} names {shard}, which is outside the model directory",
                    "use file names without folders in 'weight_map'",
                )
            if not shard.exists():
                raise ModelError(
                    f"{self.path} has no {shard.name}",
                    "copy the model again; secateur reads safetensors only (no .bin, .pt, .pth)",
                )
        return shards

    @property
    def files(self) -> list[Path]:
        """The safetensors files, sorted."""
        return sorted({shard for shard, _ in self._entries.values()})

    def names(self) -> list[str]:
        """The names of all tensors, sorted."""
        return sorted(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def _entry(self, name: str) -> tuple[Path, dict[str, Any]]:
        try:
            return self._entries[name]
        except KeyError:
            raise ModelError(
                f"{self.path} has no tensor {name!r}", "check that the model was saved completely"
            ) from None

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._entry(name)[0]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, from the header alone."""
        return tuple(self._entry(name)[1]["shape"])

    def dtype(self, name: str) -> str:
        """The type of a tensor in safetensors' spelling, e.g. ``F32`` or ``BF16``."""
        return str(self._entry(name)[1]["dtype"])

    def nbytes(self, name: str) -> int:
        """The bytes that a tensor takes in its file."""
        start, end = self._entry(name)[1]["data_offsets"]
        return int(end) - int(start)

    def load(self, name: str) -> torch.Tensor:
        """Read one tensor into memory of its own, in the type it is stored in.

        The file is read, not mapped: mapped pages would count as memory of this process.
        """
        import torch

        shard, entry = self._entry(name)
        start, end = entry["data_offsets"]
        raw = torch.empty(end - start, dtype=torch.uint8)
        with shard.open("rb") as file:
            file.seek(self._starts[shard] + start)
            if end > start and file.readinto(raw.numpy().data) != end - start:
                raise ModelError(f"{shard} is truncated", "copy the file again")
        dtype: torch.dtype = getattr(torch, _TORCH_DTYPES[entry["dtype"]])
        return raw.view(dtype).view(entry["shape"])

    def companions(self) -> list[Path]:
        """Tokenizer, generation config and other files that travel with the weights."""
        found = {file for glob in COMPANIONS for file in self.path.glob(glob) if file.is_file()}
        return sorted(found)

    def sha256(self) -> dict[str, str]:
        """The hash of the config and of every weight file, by file name."""
        return {file.name: file_sha256(file) for file in [self.path / CONFIG, *self.files]}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that belongs to a model directory.

    Raises:
        ModelError: the file is missing, damaged, or holds something else.
    """
    try:
        parsed = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{path.parent} has no {path.name}",
            "give the path of a Hugging Face model directory (config.json + *.safetensors)",
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as fault:
        raise ModelError(f"{path} is not valid JSON: {fault}", "copy the file again") from fault
    if not isinstance(parsed, dict):
        raise ModelError(f"{path} is not a JSON object", "copy the file again")
    return parsed


def _read_header(path: Path) -> dict[str, dict[str, Any]]:
    """The header of a safetensors file, checked against the file's own length."""
    size = path.stat().st_size
    damaged = "copy the file again: its length does not agree with its header"
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            raise ModelError(f"{path} is truncated: {size} bytes", damaged)
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                count = 1
                for extent in entry["shape"]:
                    count *= extent
                if entry["dtype"] not in _DTYPES or not 0 <= begin <= end:
                    raise ValueError(f"tensor {name!r}: {entry}")
                if end - begin != count * _DTYPES[entry["dtype"]]:
                    raise ValueError(f"tensor {name!r}: shape and length disagree")
                if end > size - 8 - length:
                    raise ModelError(f"{path} is truncated: tensor {name!r} is cut off", damaged)
        except (ValueError, KeyError, TypeError, AttributeError) as fault:
            raise ModelError(f"{path} has a broken header: {fault}", damaged) from fault
    return dict(header)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file so that it is either whole on disk or not there."""
    from safetensors.torch import save_file

    aside = path.with_name(path.name + ".writing")
    contiguous = {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
    save_file(contiguous, aside, metadata={"format": "pt"})
    aside.chmod(0o644)  # safetensors makes its files private
    sync_file(aside)
    os.replace(aside, path)


class TensorWriter:
    """A safetensors file written one tensor at a time, so that none of them stays in memory.

    Use it as a context manager: the file is whole on disk at its end, or not there. Until then the
    tensors lie in a file beside it. The result is the one that safetensors itself would write.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._heap = path.with_name(path.name + ".tensors")
        self._entries: dict[str, tuple[dict[str, Any], int, int]] = {}  # where each begins and ends

    def __enter__(self) -> TensorWriter:
        self._file = self._heap.open("wb")
        return self

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Append a tensor, of any device."""
        import torch

        kind = _STORED_DTYPES[str(tensor.dtype).removeprefix("torch.")]
        start = self._file.tell()
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        self._file.write(flat.view(torch.uint8).numpy().data)
        entry = {"dtype": kind, "shape": list(tensor.shape)}
        self._entries[name] = entry, start, start + tensor.nbytes

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: Any
    ) -> None:
        self._file.close()
        if kind is None:
            self._order()
        self._heap.unlink()

    def _order(self) -> None:
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        names = sorted(self._entries)
        names.sort(key=lambda name: _ORDER.index(self._entries[name][0]["dtype"]))
        offset = 0
        for name in names:
            entry, start, end = self._entries[name]
            header[name] = {**entry, "data_offsets": [offset, offset + end - start]}
            offset += end - start
        places = (self._entries[name][1:] for name in names)
        data = (chunk for start, end in places for chunk in _chunks(self._heap, start, end))
        _write_whole(self.path, header, data)


def merge_tensors(path: Path, parts: Iterable[Path]) -> None:
    """Concatenate safetensors files into one, copying a tensor at a time."""
    parts = list(parts)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for part in parts:
        for name, entry in sorted(
            _read_header(part).items(), key=lambda item: item[1]["data_offsets"]
        ):
            length = entry["data_offsets"][1] - entry["data_offsets"][0]
            header[name] = {**entry, "data_offsets": [offset, offset + length]}
            offset += length
    _write_whole(path, header, (chunk for part in parts for chunk in _data_of(part)))


def _write_whole(path: Path, header: dict[str, Any], data: Iterable[bytes]) -> None:
    """A safetensors file of a header and all its data, whole on disk or not there."""
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    aside = path.with_name(path.name + ".writing")
    with aside.open("wb") as out:
        out.write(struct.pack("<Q", len(encoded)) + encoded)
        for chunk in data:
            out.write(chunk)
    sync_file(aside)
    os.replace(aside, path)


def _data_start(path: Path) -> int:
    """Where the header of a safetensors file ends and its data begins."""
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def _data_of(path: Path) -> Iterator[bytes]:
    return _chunks(path, _data_start(path))


def _chunks(path: Path, start: int, end: int | None = None) -> Iterator[bytes]:
    left = (path.stat().st_size if end is None else end) - start
    with path.open("rb") as file:
        file.seek(start)
        while data := file.read(min(left, 1 << 24)):
            left -= len(data)
            yield data


def write_index(directory: Path, files: Iterable[Path]) -> None:
    """Write ``model.safetensors.index.json`` for the given shards of ``directory``."""
    weight_map: dict[str, str] = {}
    total = 0
    for file in files:
        for name, entry in _read_header(file).items():
            weight_map[name] = file.name
            total += entry["data_offsets"][1] - entry["data_offsets"][0]
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(directory / INDEX, index)


def write_json(path: Path, content: object) -> None:
    """Write JSON so that the file is either whole on disk or not there."""
    aside = path.with_name(path.name + ".writing")
    aside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sync_file(aside)
    os.replace(aside, path)


def sync_file(path: Path) -> None:
    """Force a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
