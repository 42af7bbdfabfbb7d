"""A GGUF file in llama.cpp, through llama-cpp-python: logits at all positions, logits of the MTP module, token ids.

The cache is float32 and flash attention off, so that nothing is rounded that need not be. llama-cpp-python has the MTP
context in its low-level functions only.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
from llama_cpp import llama_cpp_ext
from torch import Tensor


class LlamaCpp:
    """A file opened for at most `length` tokens, one thread."""

    def __init__(self, file: Path, length: int) -> None:
        self.llama = llama_cpp.Llama(
            str(file),
            n_ctx=length,
            n_batch=256,
            n_threads=1,
            n_threads_batch=1,
            logits_all=True,
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
            flash_attn=False,
            verbose=False,
        )

    def logits(self, tokens: list[int], first: int) -> Tensor:
        """[T, V]: the `first` tokens at once, the others one by one."""
        self.llama.reset()
        self.llama.eval(tokens[:first])
        for token in tokens[first:]:
            self.llama.eval([token])
        return torch.from_numpy(self.llama.scores[: len(tokens)].copy())

    def encode(self, text: str, control: bool) -> list[int]:
        """Ids of a text; `control`: spelled-out control tokens become those tokens."""
        return self.llama.tokenize(text.encode(), add_bos=False, special=control)

    def decode(self, ids: list[int]) -> str:
        """Text of ids, control tokens spelled out (the package's own method cuts tokens at 32 bytes)."""
        tokens, room = (ctypes.c_int32 * len(ids))(*ids), 64 * len(ids) + 64
        buffer, vocabulary = ctypes.create_string_buffer(room), self.llama._model.vocab
        size = llama_cpp.llama_detokenize(vocabulary, tokens, len(ids), buffer, room, False, True)
        return buffer.raw[:size].decode(errors="replace")

    def close(self) -> None:
        self.llama.close()


def mtp_logits(file: Path, tokens: list[int]) -> Tensor:
    """[T - 1, V] of the MTP module: row i joins the main model's state at i with token i + 1."""
    parameters = llama_cpp.llama_model_default_params()
    parameters.load_mtp = True
    model = llama_cpp.llama_model_load_from_file(str(file).encode(), parameters)
    main = _context(model, llama_cpp.LLAMA_CONTEXT_TYPE_DEFAULT, len(tokens))
    drafting = _context(model, llama_cpp.LLAMA_CONTEXT_TYPE_MTP, len(tokens))
    llama_cpp_ext.llama_set_embeddings_nextn(main, True, False)
    _read(main, tokens, None)
    width = llama_cpp.llama_model_n_embd(model)
    states = _array(llama_cpp_ext.llama_get_embeddings_nextn(main), len(tokens), width)
    _read(drafting, tokens[1:], np.ascontiguousarray(states[:-1]))
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    found = _array(llama_cpp.llama_get_logits(drafting), len(tokens) - 1, vocabulary)
    llama_cpp.llama_free(drafting)
    llama_cpp.llama_free(main)
    llama_cpp.llama_model_free(model)
    return torch.from_numpy(found)


def _context(model: Any, kind: int, length: int) -> Any:
    parameters = llama_cpp.llama_context_default_params()
    parameters.ctx_type = kind
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = max(length, 256)
    parameters.n_threads = parameters.n_threads_batch = 1
    parameters.type_k = parameters.type_v = llama_cpp.GGML_TYPE_F32
    parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return llama_cpp.llama_init_from_model(model, parameters)


def _read(context: Any, tokens: list[int], states: np.ndarray | None) -> None:
    """One batch of tokens from position 0, each with a state where the context wants them."""
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, i, 1
        batch.seq_id[i][0], batch.logits[i] = 0, 1
    if states is not None:
        batch.embd = states.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    code = llama_cpp.llama_decode(context, batch)
    batch.embd = None  # ours, not the batch's to free
    llama_cpp.llama_batch_free(batch)
    if code:
        raise RuntimeError(f"llama_decode returned {code}")


def _array(pointer: Any, rows: int, columns: int) -> np.ndarray:
    return np.ctypeslib.as_array(pointer, shape=(rows * columns,)).reshape(rows, columns).copy()
