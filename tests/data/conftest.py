"""What several tests of data share."""

from __future__ import annotations

import gzip

import pytest

from fathom.data import Tokenizer
from tests.shared_data import shared_data


@pytest.fixture(scope="session")
def released(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """The real vocabulary of DeepSeek-V3, or skip."""
    packed = shared_data("tokenizer/deepseek_v3_tokenizer.json.gz")
    folder = tmp_path_factory.mktemp("released")
    (folder / "tokenizer.json").write_bytes(gzip.decompress(packed.read_bytes()))
    return Tokenizer.load(folder)
