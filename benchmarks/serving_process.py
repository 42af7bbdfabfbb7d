"""`fathom serve` as a process, for the scripts that load it: started, found, looked at."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))

import fathom
from tests.speaking import small_model, talking_tokenizer

NAME = "loaded"


@dataclass
class Served:
    """A server that listens."""

    url: str
    process: subprocess.Popen[str]

    def resident(self) -> int:
        """Bytes of memory that the process holds."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found
        return int(found[1]) * 1024

    def metrics(self) -> dict[str, float]:
        """All metrics, summed over their labels."""
        found: dict[str, float] = {}
        for line in httpx.get(self.url + "/metrics", timeout=30).text.splitlines():
            if not line.startswith("#"):
                name = re.split(r"[{ ]", line)[0].removeprefix("fathom:")
                found[name] = found.get(name, 0.0) + float(line.rsplit(" ", 1)[1])
        return found


def save_small_model(folder: Path) -> None:
    """A random model of a million parameters with one MTP module, and a tokenizer that knows conversations."""
    tokenizer = talking_tokenizer()
    model = small_model(
        tokenizer.vocab_size,
        hidden_size=128,
        intermediate_size=256,
        moe_intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=16,
        n_routed_experts=8,
        max_position_embeddings=1024,
        num_nextn_predict_layers=1,
        initializer_range=0.1,
    )
    fathom.save(model, folder, tokenizer)


@contextmanager
def served(directory: str | None, *options: object) -> Iterator[Served]:
    """`fathom serve` on a free port; without a directory, of a small random model."""
    with tempfile.TemporaryDirectory() as scratch:
        if directory is None:
            save_small_model(Path(scratch) / "model")
            directory = str(Path(scratch) / "model")
        line = [sys.executable, "-m", "fathom", "serve", directory, "--port", "0"]
        more = ["--model-name", NAME, *map(str, options)]
        process = subprocess.Popen(
            line + more, stderr=subprocess.PIPE, text=True, env={**os.environ}
        )
        try:
            url = _address(process)
            _wait(url)
            yield Served(url, process)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


def _address(process: subprocess.Popen[str]) -> str:
    """Where it says it listens; its log is read on, so that its pipe does not fill."""
    assert process.stderr is not None
    before = ""
    for line in process.stderr:
        before += line
        if found := re.search(r"http://\S+", line):
            threading.Thread(target=_pass_on, args=(process,), daemon=True).start()
            return found[0]
    raise SystemExit(f"the server ended before it listened: {before}")


def _pass_on(process: subprocess.Popen[str]) -> None:
    """Warnings and tracebacks to our own stderr; a line for every request is too many."""
    assert process.stderr is not None
    for line in process.stderr:
        if " INFO " not in line:
            sys.stderr.write(line)


def _wait(url: str) -> None:
    for _ in range(300):
        try:
            if httpx.get(url + "/health").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise SystemExit("the server did not answer within 30 seconds")
