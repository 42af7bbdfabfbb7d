"""That llama.cpp computes from our GGUF files what we compute: logits at every position, and token ids of texts.

Random tiny models of many shapes, and the recipe shapes, are written as float32 and read by llama.cpp with a float32
cache; the mark is a largest difference of 1e-3. A choice of experts that hangs on less than rounding would show as a
difference, so models are drawn until there is none. Texts are the repository's own files and some hard ones. With
`--model`, what each stored type costs a trained model. Needs llama-cpp-python, which builds llama.cpp (a quarter of an
hour): `python benchmarks/gguf_vs_llama_cpp.py --help`.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from gguf_shapes import SHAPES, TINY, draw, random_model
from harness import describe, environment, table, write_json
from llama_cpp_side import LlamaCpp, mtp_logits
from torch import Tensor

import fathom
from fathom.data import Tokenizer
from fathom.interop.gguf import KINDS

ROOT = Path(__file__).resolve().parents[1]
MARK = 1e-3
RECIPES = ("nano", "mini")
CODE = "fathom/interop/*.py"
HARD_TEXTS = (
    "",
    " ",
    "\n",
    "\r\n\t  \n   x",
    "12345678901 3.14159 1,000,000 x2y33z444",
    "don't  stop — it's 5 o'clock… (really?!) <tag/> a.b->c[d]{e}",
    "中文、日本語のテキスト、한국어 텍스트 and mixed中英文123混排",
    "Привет, мир! ¿Qué tal? Ελληνικά עברית العربية हिन्दी ไทย",
    "e\u0301 ﬁ ½ ² ① Ⅷ 👩‍👩‍👧‍👦 🏳️‍🌈 𝔘𝔫𝔦 \u200b\u00a0\u2028 \ufeff",
    "    def f(self):\n        return self._x\n\n\n# end\n\n",
    "<｜begin▁of▁sentence｜>hello<｜User｜>who?<｜Assistant｜>me<｜end▁of▁sentence｜>",
    "a" * 300 + "=" * 90 + "\n" * 40 + " " * 70 + "!?" * 40,
)


def compare_logits(name: str, fields: dict[str, Any], length: int) -> dict[str, Any]:
    """Largest difference over all positions and rows."""
    model, tokens = draw(fields, length)
    with torch.inference_mode():
        ours = model(tokens[None], mtp=False).logits[0]
    return _difference(name, model, ours, logits_by_llama_cpp(model, tokens, "f32"))


def _difference(
    name: str, model: fathom.Transformer, ours: Tensor, theirs: Tensor
) -> dict[str, Any]:
    return {
        "shape": name,
        "tokens": len(ours),
        "parameters": model.num_parameters(),
        "deviation of the logits": float(ours.std()),
        "largest difference": float((theirs - ours).abs().max()),
        "same likeliest token": float((theirs.argmax(-1) == ours.argmax(-1)).float().mean()),
    }


def logits_by_llama_cpp(model: fathom.Transformer, tokens: Tensor, kind: str) -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        fathom.save_gguf(model, file, tokenizer_of(model.config.vocab_size), kind)
        theirs = LlamaCpp(file, len(tokens))
        found = theirs.logits(tokens.tolist(), len(tokens) * 3 // 4)
        theirs.close()
    return found


def compare_mtp(length: int) -> dict[str, Any]:
    """The MTP module of a tiny model, written on demand."""
    model, tokens = draw(TINY | {"num_nextn_predict_layers": 1}, length)
    with torch.inference_mode():
        ours = model(tokens[None]).mtp_logits[0][0]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        fathom.save_gguf(model, file, tokenizer_of(model.config.vocab_size), "f32", mtp=True)
        theirs = mtp_logits(file, tokens.tolist())
    return _difference("MTP module", model, ours, theirs)


_TOKENIZERS: dict[int, Tokenizer] = {}


def tokenizer_of(size: int) -> Tokenizer:
    """Learned from the repository's own files."""
    if size not in _TOKENIZERS:
        _TOKENIZERS[size] = Tokenizer.train(own_texts(), size)
    return _TOKENIZERS[size]


def own_texts() -> Iterator[str]:
    for kind in ("*.md", "fathom/**/*.py", "docs/*.md", "tests/data/*.py"):
        for path in sorted(ROOT.glob(kind)):
            yield path.read_text(encoding="utf-8")


def compare_types(place: Path, length: int) -> list[dict[str, Any]]:
    """Each stored type of a trained model by llama.cpp, on our own code: size, loss, divergence from our float32."""
    model, tokenizer = fathom.load(place, torch.float32, mtp=False), Tokenizer.load(place)
    ids = tokenizer.encode("".join(path.read_text() for path in sorted(ROOT.glob(CODE))))
    tokens = torch.tensor(ids[:length])
    with torch.inference_mode():
        exact = model(tokens[None]).logits[0].log_softmax(-1)
    found = [
        {
            "type": "ours, float32",
            "bytes": 4 * model.num_parameters(),
            **_losses(exact, exact, tokens),
        }
    ]
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.gguf"
            fathom.save_gguf(model, file, tokenizer, kind)
            theirs = LlamaCpp(file, length)
            other = theirs.logits(tokens.tolist(), length).log_softmax(-1)
            theirs.close()
            row = {"type": kind, "bytes": file.stat().st_size}
        found.append(row | _losses(exact, other, tokens))
    return found


def _losses(exact: Tensor, other: Tensor, tokens: Tensor) -> dict[str, float]:
    """Nats per token: of the text, and of `other` from `exact`, both log probabilities [T, V]."""
    loss = -other[:-1].gather(-1, tokens[1:, None]).mean()
    divergence = (exact.exp() * (exact - other)).sum(-1).mean()
    return {"loss": float(loss), "divergence": float(divergence)}


def fields_of(recipe: str) -> dict[str, Any]:
    return fathom.load_recipe(recipe).model.to_dict()


def compare_ids(tokenizer: Tokenizer, label: str) -> dict[str, Any]:
    """Texts that llama.cpp cuts otherwise, control tokens read and not read; texts that come back otherwise; and how
    many strings of random characters it cuts otherwise (newer characters than its tables have).
    """
    size = max(tokenizer.vocab_size, TINY["vocab_size"])
    model = random_model(TINY | {"vocab_size": size})
    texts = [*HARD_TEXTS, *own_texts()]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        fathom.save_gguf(model, file, tokenizer, "f16")
        theirs = LlamaCpp(file, 32)
        other, back, count = [], [], 0
        for control in (False, True):
            for text in texts:
                ids = tokenizer.encode(text, allow_special=control)
                count += len(ids)
                if theirs.encode(text, control) != ids:
                    other.append(text[:60])
                if theirs.decode(ids) != text:
                    back.append(text[:60])
        strings = list(random_strings(3000))
        unlike = [text for text in strings if theirs.encode(text, False) != tokenizer.encode(text)]
        theirs.close()
    return {
        "tokenizer": label,
        "texts": 2 * len(texts),
        "ids": count,
        "other ids": other,
        "other text": back,
        "strings": len(strings),
        "other ids of strings": unlike,
    }


def random_strings(count: int) -> Iterator[str]:
    """Up to 40 characters from all over Unicode, blanks and line ends among them."""
    draw = random.Random(0)
    ranges = [(0x20, 0x7F), (0xA0, 0x2000), (0x2000, 0xD7FF), (0x1F000, 0x1FAFF)]
    blanks = "\t\n\r \u0085\u00a0\u200b\u3000\ufeff"
    for _ in range(count):
        kinds = [draw.randrange(5) for _ in range(draw.randrange(1, 40))]
        yield "".join(
            draw.choice(blanks) if k == 4 else chr(draw.randrange(*ranges[k])) for k in kinds
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, default=256, help="tokens of each tiny model")
    parser.add_argument("--recipes", default=",".join(RECIPES), help="recipe shapes to add")
    parser.add_argument("--model", type=Path, help="exported directory: what types cost it")
    parser.add_argument("--text", type=int, default=2000, help="tokens of code that it reads")
    parser.add_argument("--tokenizer", type=Path, help="one more tokenizer.json, as the released")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    facts = environment() | {"llama_cpp_python": _llama_version()}
    print(describe(facts), f"\nllama-cpp-python {facts['llama_cpp_python']}\n")
    cases = {name: TINY | changes for name, changes in SHAPES.items()}
    cases |= {f"recipe {name}": fields_of(name) for name in options.recipes.split(",") if name}
    logits = []
    for name, fields in cases.items():
        logits.append(compare_logits(name, fields, options.length))
        print(f"  {name}: {logits[-1]['largest difference']:.2e}", file=sys.stderr)
    logits.append(compare_mtp(options.length))
    print(_logit_table(logits), "\n")
    types = compare_types(options.model, options.text) if options.model else []
    print(_type_table(types), "\n")
    tokenizers = [compare_ids(tokenizer_of(2048), "learned here")]
    if options.tokenizer:
        tokenizers.append(compare_ids(Tokenizer.load(options.tokenizer), "given"))
    print(_id_table(tokenizers), "\n")
    write_json(
        options.json,
        {"environment": facts, "logits": logits, "types": types, "tokenizers": tokenizers},
    )
    worst = max(row["largest difference"] for row in logits)
    unlike = sum(len(row["other ids"]) for row in tokenizers)
    print(f"largest difference of all: {worst:.2e} (mark {MARK:g}); texts with other ids: {unlike}")
    sys.exit(worst > MARK or unlike > 0)


def _llama_version() -> str:
    import llama_cpp

    return llama_cpp.__version__


def _logit_table(rows: list[dict[str, Any]]) -> str:
    return table(
        ["shape", "parameters", "tokens", "deviation of the logits", "largest difference"],
        [
            [
                row["shape"],
                f"{row['parameters']:,}",
                str(row["tokens"]),
                f"{row['deviation of the logits']:.2f}",
                f"{row['largest difference']:.1e}",
            ]
            for row in rows
        ],
    )


def _type_table(rows: list[dict[str, Any]]) -> str:
    return table(
        ["type", "MB", "loss, nats per token", "divergence from ours, nats per token"],
        [
            [
                row["type"],
                f"{row['bytes'] / 1e6:.1f}",
                f"{row['loss']:.4f}",
                f"{row['divergence']:.1e}",
            ]
            for row in rows
        ],
    )


def _id_table(rows: list[dict[str, Any]]) -> str:
    return table(
        [
            "tokenizer",
            "texts",
            "ids",
            "with other ids",
            "that come back otherwise",
            "random strings",
            "with other ids",
        ],
        [
            [
                row["tokenizer"],
                str(row["texts"]),
                f"{row['ids']:,}",
                str(len(row["other ids"])),
                str(len(row["other text"])),
                str(row["strings"]),
                str(len(row["other ids of strings"])),
            ]
            for row in rows
        ],
    )


if __name__ == "__main__":
    main()
