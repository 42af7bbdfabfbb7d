"""llama.cpp's side of the serving comparison: the same weights as GGUF, batches through its own decode call.

Its cache cannot be filled with numbers from outside, so a context is really read, once for each batch and length.
Needs llama-cpp-python (a build of a quarter of an hour).
"""

from __future__ import annotations

import ctypes
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from serving import ROOM, prompts
from shapes import fathom_config

CHUNK = 512
"""Tokens of a prompt that are read at a time."""


class LlamaServing:
    """One model in llama.cpp, sequences 0 .. batch - 1."""

    def __init__(self, fields: dict[str, Any], kind: str, threads: int) -> None:
        self.fields, self.kind, self.threads = fields, kind, threads
        self.context: Any = None
        self.room = 0

    def load(self, path: str) -> None:
        import llama_cpp

        import fathom

        self.silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self.silence, None)
        ours = fathom.Transformer(fathom_config(self.fields)).eval()
        ours.load_state_dict(torch.load(path, mmap=True), strict=True)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.gguf"
            fathom.save_gguf(ours, file, kind=self.kind)
            del ours
            parameters = llama_cpp.llama_model_default_params()
            parameters.use_mmap = False
            self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), parameters)

    def _open(self, batch: int, length: int, exact: bool = False) -> None:
        """A context for `batch` texts; attention in float16, as llama.cpp has it by default, or float32 if `exact`."""
        import llama_cpp

        if self.context is not None:
            llama_cpp.llama_free(self.context)
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max = batch * (-(-length // 256) * 256), batch
        parameters.n_batch = parameters.n_ubatch = CHUNK
        parameters.n_threads = parameters.n_threads_batch = self.threads
        if exact:  # float32, and no flash attention, which rounds to float16
            parameters.type_k = parameters.type_v = parameters.flash_attn_type = 0
        self.context, self.room = llama_cpp.llama_init_from_model(self.model, parameters), 0

    def _decode(self, rows: list[tuple[int, int, int]], last_only: bool) -> np.ndarray:
        """Logits of rows (token, position, sequence): of all, or of the last."""
        import llama_cpp

        call = llama_cpp.llama_batch_init(len(rows), 0, 1)
        call.n_tokens = len(rows)
        for i, (token, position, sequence) in enumerate(rows):
            call.token[i], call.pos[i], call.n_seq_id[i] = token, position, 1
            call.seq_id[i][0] = sequence
            call.logits[i] = not last_only or i == len(rows) - 1
        code = llama_cpp.llama_decode(self.context, call)
        llama_cpp.llama_batch_free(call)
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        count = 1 if last_only else len(rows)
        pointer = llama_cpp.llama_get_logits(self.context)
        size = self.fields["vocab_size"]
        return np.ctypeslib.as_array(pointer, shape=(count * size,)).reshape(count, size)

    def _read(self, ids: list[int], sequence: int) -> int:
        """A prompt in chunks; the likeliest next token."""
        best = 0
        for lo in range(0, len(ids), CHUNK):
            part = ids[lo : lo + CHUNK]
            rows = [(token, lo + i, sequence) for i, token in enumerate(part)]
            best = int(self._decode(rows, last_only=True)[0].argmax())
        return best

    def fill(self, batch: int, context: int) -> None:
        """As for the others: one text is read, and its entries are copied for the others."""
        import llama_cpp

        self._open(batch, context + ROOM)
        self.batch, self.length = batch, context
        self._read(prompts(self.fields, 1, context)[0], 0)
        size = llama_cpp.llama_state_seq_get_size(self.context, 0)
        state = (ctypes.c_uint8 * size)()
        if batch > 1 and llama_cpp.llama_state_seq_get_data(self.context, state, size, 0) != size:
            raise RuntimeError("llama_state_seq_get_data gave less than it said")
        for sequence in range(1, batch):
            if not llama_cpp.llama_state_seq_set_data(self.context, state, size, sequence):
                raise RuntimeError("llama_state_seq_set_data took nothing")

    def decode(self, tokens: int) -> None:
        """Steps behind the context, which is as it was afterwards."""
        import llama_cpp

        last = [0] * self.batch
        for step in range(tokens):
            rows = [(last[s], self.length + step, s) for s in range(self.batch)]
            last = self._decode(rows, last_only=False).argmax(1).tolist()
        memory = llama_cpp.llama_get_memory(self.context)
        for sequence in range(self.batch):
            llama_cpp.llama_memory_seq_rm(memory, sequence, self.length, -1)

    def prefill(self, length: int) -> None:
        """A prompt up to its first token; the context is there already."""
        import llama_cpp

        if self.room < length:
            self._open(1, length)
            self.room = length
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        self._read(prompts(self.fields, 1, length)[0], 0)

    def says(self, batch: int, length: int, tokens: int) -> list[list[int]]:
        """Greedy answers to real prompts."""
        answers = []
        for ids in prompts(self.fields, batch, length, seed=3):
            self._open(1, length + tokens, exact=True)
            answer = [self._read(ids, 0)]
            while len(answer) < tokens:
                row = (answer[-1], length + len(answer) - 1, 0)
                answer.append(int(self._decode([row], last_only=True)[0].argmax()))
            answers.append(answer)
        return answers

    def bytes_per_token(self) -> int:
        """As llama.cpp keeps it: float16 unless asked otherwise."""
        config = fathom_config(self.fields)
        return 2 * config.num_hidden_layers * config.cache_dim
