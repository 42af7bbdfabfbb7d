"""Text to ids and back (report §4.1). Any Hugging Face `tokenizer.json` loads; ours are made in `vocabulary`.

Text never turns into a control token unless the caller says so: an end-of-sentence token spelled out in a
document or in a user's message is encoded as the characters it is made of.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from hashlib import sha256
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from fathom.data.chat import CHAT_TEMPLATE
from fathom.data.definition import control_tokens, reading_controls, reading_text
from fathom.data.progress import Say
from fathom.data.text_stream import TextStream
from fathom.data.vocabulary import (
    BOS,
    EOS,
    PAD,
    PLACEHOLDER,
    cuts_like_released,
    stretches,
    train_bpe,
    train_characters,
)
from fathom.errors import DataError

TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
TEMPLATE_FILE = "chat_template.jinja"
CHAT_KEY = "fathom_chat"
_PLACEHOLDER_START = PLACEHOLDER.split("{")[0]


class Tokenizer:
    """A vocabulary with its settings (the content of tokenizer.json and of tokenizer_config.json)."""

    def __init__(self, definition: str, settings: Mapping[str, Any]) -> None:
        self._definition = definition
        self.settings = dict(settings)
        self._controls = control_tokens(definition)
        self._backend = reading_text(definition, self._controls)

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int | None,
        kind: str = "bpe",
        say: Say | None = None,
        total_bytes: int | None = None,
    ) -> Tokenizer:
        """A tokenizer of exactly `vocab_size` ids learned from `texts`, the same for the same texts.

        kind "bpe": byte-level BPE in the released layout, any text can be encoded. kind "char": one id per
        character, text with other characters cannot; `vocab_size` None takes as many ids as that needs.
        `say` hears how far the training of a BPE is, with the time left if the texts' `total_bytes` are known.
        Raises `DataError` for a size that is too small.
        """
        if kind == "char":
            settings = {"bos_token": BOS, "eos_token": EOS, "pad_token": EOS}
            return cls(train_characters(texts, vocab_size).to_str(), _SETTINGS | settings)
        if kind != "bpe" or vocab_size is None:
            raise DataError(
                f"kind={kind!r} with vocab_size={vocab_size}: use 'bpe' with a size, or 'char'"
            )
        settings = {
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "chat_template": CHAT_TEMPLATE,
        }
        return cls(train_bpe(texts, vocab_size, say, total_bytes).to_str(), _SETTINGS | settings)

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """From a folder with a tokenizer.json or from such a file, with the settings that lie beside it."""
        file = Path(path) / TOKENIZER_FILE if Path(path).is_dir() else Path(path)
        try:
            definition = file.read_text(encoding="utf-8")
            return cls(definition, _read_settings(file.parent))
        except OSError as error:
            raise DataError(
                f"no tokenizer at {path} ({error.strerror}); give a {TOKENIZER_FILE} or a folder that holds one"
            ) from error
        except Exception as error:  # the Rust side raises bare Exception for a file it cannot parse
            raise DataError(f"{file} is not a tokenizer this library reads ({error})") from error

    def save(self, directory: str | Path, model_max_length: int | None = None) -> None:
        """Write tokenizer.json, tokenizer_config.json and chat_template.jinja, as `transformers` reads them.

        The template is in both of the latter, for tools old and new. `model_max_length` is written where the settings
        have none of their own.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        limit = {} if model_max_length is None else {"model_max_length": model_max_length}
        text = json.dumps(limit | self.settings, indent=2, ensure_ascii=False, sort_keys=True)
        (folder / TOKENIZER_FILE).write_text(self._definition, encoding="utf-8")
        (folder / SETTINGS_FILE).write_text(text + "\n", encoding="utf-8")
        if isinstance(template := self.settings.get("chat_template"), str):
            (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")

    def encode(self, text: str, allow_special: bool = False) -> list[int]:
        """Ids of `text`, nothing added. With `allow_special`, spelled-out control tokens become those tokens.

        Raises `DataError` for half a surrogate pair and, by a character tokenizer, for a character it does not know.
        """
        backend = self._reading_controls if allow_special else self._backend
        return self._encode_all([text], backend)[0]

    @cached_property
    def _reading_controls(self) -> Backend:
        return reading_controls(self._definition, self._controls)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of many texts, on all cores."""
        return self._encode_all(texts, self._backend)

    def _encode_all(self, texts: Sequence[str], backend: Backend) -> list[list[int]]:
        try:
            found = backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # the Rust side raises bare Exception
            raise DataError(
                self._why_not(texts) or f"the text cannot be encoded ({error})"
            ) from error
        return [encoding.ids for encoding in found]

    def _why_not(self, texts: Sequence[str]) -> str:
        known = self._backend.get_vocab()
        unknown = "".join(sorted({c for text in texts for c in text if c not in known}))
        if any("\ud800" <= character <= "\udfff" for character in unknown):
            return "the text holds half a surrogate pair; pass valid Unicode text"
        remedy = "leave them out, or train with the 'bpe' tokenizer"
        return unknown and f"the tokenizer does not know the characters {unknown[:10]!r}; {remedy}"

    def stretches(self, text: str, size: int = 1_000_000) -> Iterator[str]:
        """`text` in parts of about `size` characters whose ids, one after the other, are those of the whole.

        A loaded tokenizer that cuts in another way gets the text in one part: it may see a text's beginning
        differently from its middle.
        """
        return stretches(text, size) if self._cuts_like_released else iter([text])

    @cached_property
    def _cuts_like_released(self) -> bool:
        return cuts_like_released(json.loads(self._definition))

    def pieces(self, text: str) -> list[tuple[str, list[int]]]:
        """What pre-tokenisation cuts `text` into, each piece with its ids; together they are `encode(text)`."""
        self.encode(text)  # for its errors
        encoding = self._backend.encode(text, add_special_tokens=False)
        found: list[tuple[str, list[int]]] = []
        for _, group in groupby(range(len(encoding.ids)), lambda i: encoding.word_ids[i]):
            places = list(group)
            start = min(encoding.offsets[i][0] for i in places)
            end = max(encoding.offsets[i][1] for i in places)
            found.append((text[start:end], [encoding.ids[i] for i in places]))
        return found

    def prompt_ids(self, text: str) -> list[int]:
        """Ids of a text that a model is to continue: with begin-of-sentence where the settings add it (our own training
        does not), and for an empty text the end of the document before."""
        ids = self.encode(text)
        if self.settings.get("add_bos_token"):
            return [self.bos_id, *ids]
        return ids or [self.eos_id]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, control tokens spelled out; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def spelling(self, token: int) -> str | None:
        """How the file spells an id (bytes as the characters that stand for them); None for an id it does not have."""
        return self._backend.id_to_token(token)

    def stream(self) -> TextStream:
        """A decoder for ids that arrive one by one."""
        return TextStream(self.decode)

    def control_id(self, spelling: str) -> int:
        """Id of a control token; `DataError` when this tokenizer has none of that spelling."""
        found = self._controls.get(spelling)
        if found is None:
            raise DataError(
                f"the tokenizer has no control token {spelling!r}; use one that was trained with it"
            )
        return found

    @property
    def vocab_size(self) -> int:
        """Ids, control tokens and place holders included."""
        return self._backend.get_vocab_size()

    @property
    def placeholders(self) -> int:
        """Ids that stand for nothing, because the corpus gave fewer merges than were asked for."""
        return sum(spelling.startswith(_PLACEHOLDER_START) for spelling in self._controls)

    @property
    def bos_id(self) -> int:
        """Token that begins a sequence; `DataError` when the settings name none."""
        return self._named("bos_token", BOS)

    @property
    def eos_id(self) -> int:
        """Token that ends a document; `DataError` when the settings name none."""
        return self._named("eos_token", EOS)

    def sentence_ids(self) -> dict[str, int]:
        """Those of the two that there are, under their names in `config.json`."""
        ids = {}
        for role, usual in (("bos_token", BOS), ("eos_token", EOS)):
            with suppress(DataError):
                ids[f"{role}_id"] = self._named(role, usual)
        return ids

    def _named(self, role: str, usual: str) -> int:
        value = self.settings.get(role) or usual
        spelling = value["content"] if isinstance(value, dict) else value
        found = self._backend.token_to_id(spelling)
        if found is None:
            raise DataError(
                f"the tokenizer has no {role} ({spelling!r} is not in it); set {role} in {SETTINGS_FILE}"
            )
        return found

    @property
    def taught_to_chat(self) -> bool:
        """Whether the model it belongs to was taught the chat form (see `fathom.cli.chat`)."""
        return bool(self.settings.get(CHAT_KEY, "chat_template" in self.settings))

    @property
    def definition(self) -> str:
        """The content of tokenizer.json."""
        return self._definition

    @property
    def fingerprint(self) -> str:
        """sha256 of tokenizer.json: equal for tokenizers that encode alike."""
        return sha256(self._definition.encode()).hexdigest()


_SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "add_bos_token": False,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
    CHAT_KEY: False,
}


def _read_settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json, with the chat template that newer `transformers` put into a file of its own."""
    file, template = folder / SETTINGS_FILE, folder / TEMPLATE_FILE
    settings = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if "chat_template" not in settings and template.exists():
        settings["chat_template"] = template.read_text(encoding="utf-8")
    return settings
