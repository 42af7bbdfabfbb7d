"""`fathom.save_gguf`: a model becomes one file that llama.cpp reads.

Weights go out one after the other and in pieces, so writing takes the memory of a piece whatever the model's size. The
file appears whole or not at all: it is written beside its place and renamed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fathom.errors import CheckpointError, FathomError
from fathom.files import flush
from fathom.interop.gguf_keys import ARCHITECTURE, Value, model_keys
from fathom.interop.gguf_tensors import ROUTER, Named, tensors
from fathom.interop.gguf_vocabulary import Vocabulary, read_vocabulary
from fathom.interop.writing import SavesItself
from fathom.model.transformer import Transformer

KINDS = {
    "f32": "ALL_F32",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "q8_0": "MOSTLY_Q8_0",
    "q4_0": "MOSTLY_Q4_0",
}
"""What matrices can be stored as, and what llama.cpp calls such a file."""
_PLAIN = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
_PIECE = 1 << 20
"""Numbers that are converted at a time."""
_MAGIC = b"GGUF"


def save_gguf(
    model: Transformer,
    file: str | Path,
    tokenizer: SavesItself | None = None,
    kind: str | None = None,
    mtp: bool = False,
) -> None:
    """Write `model` as a GGUF file of architecture `deepseek2`.

    Matrices are stored as `kind` (see `KINDS`; None: as they are); norms, routers and their biases as float32, and so
    are matrices whose rows a quantised kind cannot divide into blocks. Without a tokenizer the file takes and gives ids
    only. `mtp` writes the first MTP module too, for llama.cpp to draft with; older versions do not load such a file.
    An existing GGUF file is replaced, anything else refused. Raises `ConfigError` for a model and `DataError` for a
    tokenizer that llama.cpp would treat otherwise, `CheckpointError` when the file cannot be written.
    """
    kind = kind or _PLAIN.get(model.lm_head.weight.dtype, "f32")
    if kind not in KINDS:
        raise FathomError(f"type {kind!r} cannot be written; use one of {', '.join(KINDS)}")
    package = _package()
    place = Path(file).resolve()
    _check_replaceable(place)
    keys = model_keys(model.config, mtp)
    vocabulary = read_vocabulary(tokenizer, model.config) if tokenizer else None
    made = place.with_name(f".{place.name}.partial")
    try:
        made.parent.mkdir(parents=True, exist_ok=True)
        with closing(package.GGUFWriter(made, ARCHITECTURE)) as writer, torch.no_grad():
            _describe(writer, keys, vocabulary, kind, place.stem)
            _write(writer, partial(tensors, model, mtp), kind)
        flush(made)
        made.replace(place)
    except OSError as error:
        raise CheckpointError(
            f"{place} could not be written ({error}); make room, or choose another place, and repeat"
        ) from error
    finally:
        made.unlink(missing_ok=True)


def _package() -> Any:
    try:
        import gguf
    except ModuleNotFoundError:
        raise FathomError(
            "writing GGUF needs the package gguf; run: pip install 'fathom[gguf]'"
        ) from None
    return gguf


def _check_replaceable(place: Path) -> None:
    """Refuse a place that holds something other than a GGUF file."""
    if place.is_dir():
        raise CheckpointError(f"{place} is a folder, and GGUF is one file; give {place}/model.gguf")
    if place.exists():
        with place.open("rb") as file:
            if file.read(len(_MAGIC)) != _MAGIC:
                raise CheckpointError(
                    f"{place} exists and is no GGUF file, so it is not replaced; choose another place"
                )


def _describe(
    writer: Any, keys: Mapping[str, Value], vocabulary: Vocabulary | None, kind: str, name: str
) -> None:
    """Everything but tensors."""
    package = _package()
    writer.add_type(package.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(package.LlamaFileType[KINDS[kind]])
    if kind.startswith("q"):
        writer.add_quantization_version(package.GGML_QUANT_VERSION)
    _add_keys(writer, keys)
    if vocabulary is None:
        writer.add_tokenizer_model("no_vocab")
        return
    _add_keys(writer, vocabulary.keys)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    writer.add_token_merges(vocabulary.merges)


def _add_keys(writer: Any, keys: Mapping[str, Value]) -> None:
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
    }
    for key, value in keys.items():
        add[type(value)](key, value)


def _write(writer: Any, each: Callable[[], Named], kind: str) -> None:
    """All tensors' names and shapes, then their numbers, in the same order."""
    for name, tensor in each():
        stored, size = _stored(name, tensor, kind)
        writer.add_tensor_info(name, tuple(tensor.shape), _float32(), size, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    file = writer.fout[0]
    for name, tensor in each():
        stored, size = _stored(name, tensor, kind)
        writer.write_padding(file, file.tell())
        for piece in _pieces(tensor):
            _converted(name, piece, stored).tofile(file)
        writer.write_padding(file, size)


def _float32() -> Any:
    import numpy

    return numpy.dtype(numpy.float32)


def _stored(name: str, tensor: Tensor, kind: str) -> tuple[Any, int]:
    """The type a tensor is stored as, and the bytes it takes."""
    package = _package()
    stored = package.GGMLQuantizationType[kind.upper()]
    block, size = package.GGML_QUANT_SIZES[stored]
    if tensor.dim() == 1 or name.endswith(ROUTER) or tensor.shape[-1] % block:
        stored = package.GGMLQuantizationType.F32
        block, size = package.GGML_QUANT_SIZES[stored]
    return stored, tensor.numel() // block * size


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor's rows in order, a bounded number of them at a time."""
    rows = max(1, _PIECE // tensor.shape[-1])
    for matrix in tensor.unbind(0) if tensor.dim() == 3 else (tensor,):
        yield from matrix.split(rows if matrix.dim() == 2 else matrix.numel())


def _converted(name: str, piece: Tensor, stored: Any) -> Any:
    """A piece's bytes, as a numpy array. Raises `CheckpointError` for numbers that the type cannot hold."""
    package = _package()
    values = piece.to("cpu", torch.float32).contiguous().numpy()
    most = torch.finfo(torch.float16 if stored.name == "F16" else torch.float32).max
    if not (abs(values) <= most).all():
        raise CheckpointError(
            f"{name} holds a number that {stored.name} cannot (not finite, or beyond {most:g}); "
            f"look at the weights, or write another type"
        )
    return package.quants.quantize(values, stored)
