"""The report of finished, unfinished and broken runs, from run folders made by hand."""

from __future__ import annotations

import errno
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fathom.errors import FathomError
from fathom.runs.report import write_report
from fathom.runs.report.data import RunData, final_mean, read_lines
from fathom.runs.report.figure import smoothed
from fathom.runs.report.html import flat
from fathom.runs.report.load import MOST_BLOCKS, chosen_blocks
from fathom.runs.report.page import headline

BLOCKS, EXPERTS = 3, 4


def step_line(step: int, **more: Any) -> dict[str, Any]:
    loads = [1.5 / step**0.1 + block / 10 for block in range(BLOCKS)]
    return {
        "step": step,
        "stage": "pretrain",
        "tokens": step * 1000,
        "loss": 8.0 / step**0.3,
        "mtp_loss": 8.5 / step**0.3,
        "balance_loss": 1e-4,
        "grad_norm": 1.0 / step,
        "lr": 1e-3,
        "tokens_per_second": 5000.0,
        "mfu": 0.4,
        "max_load": max(loads),
        "expert_load": loads,
        "seconds": 0.2,
        **more,
    }


def write_run(folder: Path, steps: int = 30, **more: Any) -> Path:
    """A run folder with every file that `fathom run` leaves."""
    (folder / "data").mkdir(parents=True)
    (folder / "recipe.toml").write_text('name = "tiny"\nseed = 7\n')
    (folder / "environment.json").write_text(json.dumps({"torch": "2.13.0", "cpu": {"cores": 2}}))
    write_manifest(folder, train=123456)
    write_jsonl(folder / "metrics.jsonl", [step_line(i + 1, **more) for i in range(steps)])
    evals = [{"step": s, "loss": 5.0 - s / 10, "bits_per_byte": 2.0 - s / 20} for s in (10, 20)]
    write_jsonl(folder / "evals.jsonl", evals)
    load = np.arange(1, BLOCKS * EXPERTS + 1).reshape(BLOCKS, EXPERTS).tolist()
    write_jsonl(folder / "load.jsonl", [{"step": s, "load": load} for s in (10, 20, 30)])
    write_jsonl(folder / "samples.jsonl", [{"step": 20, "prompt": "def f(", "text": "x):\n"}])
    return folder


def write_manifest(folder: Path, **tokens: int) -> None:
    (folder / "data" / "manifest.json").write_text(json.dumps({"tokens": tokens}))


def write_jsonl(path: Path, lines: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


VOID = {"meta", "br", "hr", "img", "input"}


class Outline(HTMLParser):
    """Tags that are opened and not closed, and everything that an attribute refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [
            value or "" for name, value in attrs if name in ("href", "src", "xlink:href")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag


def outline(path: Path) -> Outline:
    parser = Outline()
    parser.feed(path.read_text(encoding="utf-8"))
    parser.close()
    assert parser.open == []
    return parser


def test_whole_report_holds_everything_and_loads_nothing(tmp_path: Path) -> None:
    path = write_report(write_run(tmp_path / "tiny"))
    assert path == tmp_path / "tiny" / "report.html"
    text, found = path.read_text(encoding="utf-8"), outline(path)
    assert found.tags.count("svg") == 7  # loss, two small ones, schedules, balance, blocks, experts
    assert "script" not in found.tags and "link" not in found.tags
    assert all(link.startswith(("#", "data:")) for link in found.links)
    assert not re.search(r"url\((?!#)|@import", text)
    for expected in ("held-out loss", "3.000", "1.000", "seed = 7", "123,456", "cpu.cores"):
        assert expected in text
    assert sorted(p.name for p in path.parent.iterdir() if p.name.startswith(".")) == []


def test_figures_take_their_colours_from_the_page(tmp_path: Path) -> None:
    text = write_report(write_run(tmp_path / "tiny")).read_text(encoding="utf-8")
    assert "var(--one)" in text and "var(--ink)" in text
    assert not re.search(r"#0[1-6]0[1-6]0[1-6]\b", text), "a stand-in colour was left in a figure"
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids)), (
        "two figures share an id, so one may draw with the other's parts"
    )
    referred = set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text))
    assert referred <= set(ids)


def test_what_the_model_wrote_is_escaped(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "tiny")
    sample = {"step": 1, "prompt": "<b>", "text": "</pre><script>alert(1)</script>&amp;"}
    write_jsonl(folder / "samples.jsonl", [sample])
    (folder / "recipe.toml").write_text("# <script>alert(2)</script>")
    (folder / "environment.json").write_text('{"<script>": "</td><script>"}')
    path = write_report(folder)
    assert "script" not in outline(path).tags
    assert "&lt;/pre&gt;&lt;script&gt;alert(1)&lt;/script&gt;&amp;amp;" in path.read_text()


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_a_run_that_has_hardly_begun(tmp_path: Path, steps: int) -> None:
    folder = write_run(tmp_path / "tiny", steps=steps)
    for name in ("evals.jsonl", "load.jsonl", "samples.jsonl", "environment.json"):
        (folder / name).unlink()
    text = write_report(folder).read_text(encoding="utf-8")
    assert ("no step has been finished yet" in text) == (steps == 0)
    assert "held-out" not in text
    outline(folder / "report.html")


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "tiny", steps=5)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')
    assert len(RunData.read(folder).metrics) == 5
    write_report(folder)


def test_a_broken_line_before_the_last_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"step": 1}\nrubbish\n{"step": 3}\n')
    with pytest.raises(FathomError, match=r"m\.jsonl:2 is not JSON"):
        read_lines(tmp_path / "m.jsonl")


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "tiny", steps=5)
    text = "before\u2028between\u0085after"
    write_jsonl(folder / "samples.jsonl", [{"step": 5, "prompt": "", "text": text}])
    assert RunData.read(folder).samples[0]["text"] == text


def test_a_model_without_experts(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "tiny", steps=5)
    write_jsonl(folder / "load.jsonl", [{"step": 5, "load": [], "bias": []}])
    write_report(folder)


def test_values_that_are_not_numbers_do_not_stop_it(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "tiny", steps=5, mfu=None, grad_norm=float("nan"))
    run = RunData.read(folder)
    assert run.series("grad_norm") == ([], [])
    assert "MFU" not in [name for name, _, _ in headline(run)]
    write_report(folder)


def test_router_biases_are_drawn_when_recorded(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "tiny")
    lines = read_lines(folder / "load.jsonl")
    write_jsonl(folder / "load.jsonl", [x | {"bias": [[-0.1, 0.0], [0.0, 0.2]]} for x in lines])
    assert RunData.read(folder).bias_range() == ([10, 20, 30], [-0.1] * 3, [0.2] * 3)
    assert "router bias" in write_report(folder).read_text(encoding="utf-8")


def test_held_out_losses_on_different_texts_make_no_curve(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "tiny")
    sizes = [(10, 100), (20, 100), (30, 900)]
    evals = [{"step": s, "loss": 2.0, "held_out_tokens": n} for s, n in sizes]
    write_jsonl(folder / "evals.jsonl", evals)
    write_manifest(folder, held_out=901)
    assert RunData.read(folder).evals_by_coverage() == (evals[:2], evals[2:])
    text = write_report(folder).read_text(encoding="utf-8")
    assert "held out, a part" in text and "held out, all" in text
    assert "Dots: loss on one part of the text" in text and "Diamonds:" in text


@pytest.mark.parametrize(("tokens", "label"), [(900, "held out"), (100, "held out, a part")])
def test_held_out_losses_on_one_text_make_a_curve(tmp_path: Path, tokens: int, label: str) -> None:
    """The whole text each time, or, as long as no stage has ended, the same part of it."""
    folder = write_run(tmp_path / "tiny")
    evals = [{"step": s, "loss": 2.0, "held_out_tokens": tokens} for s in (10, 20, 30)]
    write_jsonl(folder / "evals.jsonl", evals)
    write_manifest(folder, held_out=901)
    text = write_report(folder).read_text(encoding="utf-8")
    assert re.findall(">(held out[^<]*)</text>", text) == [label]
    assert "Dots:" in text and "Diamonds" not in text


def test_the_average_has_its_curve_and_its_figure(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "tiny")
    sizes = [(10, 100), (20, 100), (30, 900)]
    evals = [
        {"step": s, "loss": 2.0, "ema_loss": 1.75 + s / 1000, "held_out_tokens": n}
        for s, n in sizes
    ]
    write_jsonl(folder / "evals.jsonl", evals)
    write_manifest(folder, held_out=901)
    text = write_report(folder).read_text(encoding="utf-8")
    labels = re.findall(">(held out[^<]*)</text>", text)
    whole = ["held out, a part", "held out, all"]
    assert labels == [f"{kind}{which}" for kind in whole for which in ("", ", averaged weights")]
    assert "Hollow marks: on the same text" in text
    cards = {name: value for name, value, _ in headline(RunData.read(folder))}
    assert cards["held-out loss, averaged"] == "1.780"


def test_the_caption_tells_only_of_what_is_drawn(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "tiny", mtp_loss=None)
    (folder / "evals.jsonl").unlink()
    text = write_report(folder).read_text(encoding="utf-8")
    assert "Pale: every step" in text
    assert (
        "Dots" not in text
        and "Diamonds" not in text
        and "Hollow" not in text
        and "MTP predicts" not in text
    )


def test_stages_are_marked(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "tiny", steps=4)
    lines = [step_line(s, stage="warm" if s < 3 else "<long>") for s in (1, 2, 3, 4)]
    write_jsonl(folder / "metrics.jsonl", lines)
    assert RunData.read(folder).stages() == [(1, "warm"), (3, "<long>")]
    assert "&lt;long&gt;" in write_report(folder).read_text(encoding="utf-8")
    outline(folder / "report.html")


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FathomError, match="is not a run folder"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_clear_error_and_the_old_page_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(tmp_path / "tiny", steps=2)
    before = write_report(folder).read_text(encoding="utf-8")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fathom.files.os.fsync", full)
    with pytest.raises(FathomError, match=r"report\.html could not be written: No space left"):
        write_report(folder)
    assert (folder / "report.html").read_text(encoding="utf-8") == before


def test_without_matplotlib_the_remedy_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(tmp_path / "tiny")
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(FathomError, match=re.escape("pip install 'fathom[report]'")):
        write_report(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before


def test_headline_names_what_was_measured(tmp_path: Path) -> None:
    cards = {name: value for name, value, _ in headline(RunData.read(write_run(tmp_path / "t")))}
    assert cards["held-out loss"] == "3.000" and cards["held-out bits per byte"] == "1.000"
    assert cards["tokens trained on"] == "30K" and cards["time in steps"] == "6 s"
    assert cards["tokens per second"] == "5,000" and cards["MFU"] == "40.0%"


def test_small_helpers() -> None:
    assert final_mean([5.0, 1.0, 3.0], 2) == 2.0
    assert chosen_blocks(4) == [0, 1, 2, 3]
    many = chosen_blocks(58)
    assert len(many) == MOST_BLOCKS and many[0] == 0 and many[-1] == 57
    assert dict(flat({"a": {"b": [1, 2]}, "n": 12345, "t": True})) == {
        "a.b": "1, 2",
        "n": "12,345",
        "t": "True",
    }
    constant = smoothed([2.0] * 200)
    assert np.allclose(constant, 2.0)
    line = smoothed(list(range(400)), share=0.02)
    assert np.allclose(line[4:-4], np.arange(400)[4:-4])
