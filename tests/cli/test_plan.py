"""`fathom plan` as a user calls it: 80 columns, JSON, a page for a browser, and one line for what is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from fathom.cli.plan import segments
from fathom.cli.plan_tables import counted, gain, gib
from fathom.runs.layout import RunLayout
from fathom.runs.recipe import load_recipe
from tests.cli.calling import call


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def test_the_report_s_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Text, JSON and page of the same plan agree."""
    page = tmp_path / "new" / "plan.html"
    status, text, _ = call(capsys, "plan", "v3-671b", "--cluster", "h800x2048", "--html", page)
    assert status == 0 and max(map(len, text.splitlines())) <= 80 + len(str(page))
    status, out, _ = call(capsys, "plan", "v3-671b", "--cluster", "h800x2048", "--json")
    found = json.loads(out)
    assert status == 0 and found["fits"] and found["cluster"] == "h800x2048"
    assert (found["layout"]["pp"], found["layout"]["dp"], found["layout"]["ep"]) == (16, 128, 64)
    assert found["parameters"]["main"] == 671_026_404_352
    memory = found["memory_per_rank_bytes"]
    assert memory["total"] == sum(size for name, size in memory.items() if name != "total")
    hours = found["gpu_hours"]
    assert hours["total"] == pytest.approx(sum(h for name, h in hours.items() if name != "total"))
    assert found["cost_usd"] == pytest.approx(2 * hours["total"])
    assert found["published"]["cost_usd"] == 5_576_000
    pre_training = sum(hours[name] for name in ("constant", "cosine", "low", "lowest"))
    assert pre_training == pytest.approx(2_664_000, rel=0.15)
    assert 0 < found["bubble_fraction"] < 0.1
    assert all(one["fits"] for one in found["alternatives"]) and len(found["alternatives"]) == 5
    assert f"{found['tokens_per_second_per_gpu']:,.0f}" in text
    assert "2,788K x $2 = $5.576M" in text and "fits" in text
    _check_page(page.read_text(), f"{found['tokens_per_second_per_gpu']:,.0f}")


def _check_page(html: str, rate: str) -> None:
    assert rate in html and "default-src 'none'" in html
    assert html.count("<svg") == 2 and "<script" not in html
    assert not re.search(r"""(src|href)=["']?http""", html)
    for tag in ("table", "figure", "details", "svg", "main"):
        assert html.count(f"<{tag}") == html.count(f"</{tag}>")


def test_one_process_on_a_laptop(capsys: pytest.CaptureFixture[str]) -> None:
    status, text, _ = call(capsys, "plan", "nano", "--cluster", "laptop")
    assert status == 0 and "nano on laptop: fits" in text
    assert max(map(len, text.splitlines())) <= 80
    status, out, _ = call(capsys, "plan", "nano", "--cluster", "laptop", "--json")
    found = json.loads(out)
    assert found["memory_per_rank_bytes"]["weights"] == 4 * 16_328_512
    assert found["cost_usd"] == 0 and found["bubble_fraction"] == 0
    assert 60 < found["days"] * 86400 < 3600


def test_what_does_not_fit_is_said_with_what_does(capsys: pytest.CaptureFixture[str]) -> None:
    wish = ("--pp", "2", "--ep", "4", "--schedule", "1F1B", "--recompute", "none")
    status, out, _ = call(capsys, "plan", "v3-16b", "--cluster", "h100x8", *wish, "--json")
    found = json.loads(out)
    assert status == 0 and found["fits"] is False
    assert found["alternatives"] and all(one["fits"] for one in found["alternatives"])
    _, text, _ = call(capsys, "plan", "v3-16b", "--cluster", "h100x8", *wish)
    assert "DOES NOT FIT" in text and "The nearest layouts that fit" in text
    assert "no price is known" in text
    _, text, _ = call(capsys, "plan", "v3-671b", "--cluster", "laptop")
    assert "DOES NOT FIT" in text and "No layout fits: take more" in text


def test_options_reach_the_plan(capsys: pytest.CaptureFixture[str]) -> None:
    base = ("plan", "v3-16b", "--cluster", "h100x16", "--json")
    _, out, _ = call(
        capsys, *base, "--pp", "2", "--ep", "8", "--schedule", "DualPipe", "--price", "1.5",
        "--no-zero1", "--no-fp8", "--no-overlap", "--micro-batch", "2", "--split", "14,13",
        "--recompute", "full", "--stage", "second-drop",
    )  # fmt: skip
    found = json.loads(out)
    expected = {
        "pp": 2, "dp": 8, "ep": 8, "micro_batch": 2, "schedule": "DualPipe", "zero1": False,
        "fp8": False, "overlap": False, "recompute": "full", "split": [14, 13], "moment_bytes": 4,
        "interleave": 1, "full_shard": False,
    }  # fmt: skip
    assert found["layout"] == expected
    assert found["cost_usd"] == pytest.approx(1.5 * found["gpu_hours"]["total"])
    assert found["sweep"] is None
    _, out, _ = call(
        capsys, *base, "--pp", "4", "--schedule", "1F1B", "--interleave", "2", "--sweep"
    )
    found = json.loads(out)
    assert found["layout"]["interleave"] == 2 and len(found["sweep"]) == 20
    rates = [one["tokens_per_second_per_gpu"] for one in found["sweep"] if one["fits"]]
    assert rates == sorted(rates, reverse=True)


def test_the_recipe_s_own_layout_is_planned_where_nothing_else_is_asked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    table = (
        "parallel.pp=2",
        "parallel.ep=4",
        "parallel.schedule='ZB1P'",
        "parallel.layers=[14,13]",
    )
    changes = [word for key in table for word in ("--set", key)]
    base = ("plan", "v3-16b", "--cluster", "h100x16", *changes, "--json")
    found = json.loads(call(capsys, *base, "--set", "parallel.zero1=false")[1])["layout"]
    assert (found["pp"], found["dp"], found["ep"], found["schedule"]) == (2, 8, 4, "ZB1P")
    assert found["split"] == [14, 13] and found["zero1"] is False
    found = json.loads(call(capsys, *base, "--pp", "4", "--zero1")[1])["layout"]
    assert (found["pp"], found["ep"], found["schedule"]) == (4, 4, "ZB1P")
    assert found["split"] is None and found["zero1"] is True
    found = json.loads(call(capsys, *base, "--pp", "1")[1])["layout"]
    assert (found["pp"], found["dp"], found["ep"]) == (1, 16, 4)


@pytest.mark.parametrize(
    ("recipe", "devices", "changes"),
    [
        ("nano", 2, ["parallel.pp=2"]),
        ("nano", 4, ["parallel.pp=2", "parallel.ep=2", "stages.pretrain.batch=16"]),
        ("nano", 2, ["parallel.pp=2", "parallel.schedule='DualPipeV'", "stages.pretrain.batch=24"]),
        ("nano", 4, ["parallel.ep=2", "stages.pretrain.batch=16"]),
        ("mini", 4, ["parallel.pp=2"]),
        ("mini", 8, ["parallel.pp=2", "parallel.ep=2", "stages.pretrain.micro_batch=2"]),
    ],
)
def test_a_plan_cuts_the_batch_as_a_run_does(
    capsys: pytest.CaptureFixture[str], recipe: str, devices: int, changes: list[str]
) -> None:
    words = [word for key in changes for word in ("--set", key)]
    out = call(capsys, "plan", recipe, "--cluster", f"laptopx{devices}", *words, "--json")[1]
    layout = RunLayout(load_recipe(recipe, changes), devices)
    stage = layout.recipe.stages[0]
    assert json.loads(out)["layout"]["micro_batch"] == layout.micro_batch(stage)
    if layout.plan:
        assert json.loads(out)["micro_batches"] == layout.bubble(stage)[0]


def test_schedules_that_cannot_be_have_no_figures(capsys: pytest.CaptureFixture[str]) -> None:
    """One micro-batch for two ranks: DualPipe and DualPipeV want two for each rank."""
    wish = ("plan", "mini", "--cluster", "h200x8", "--pp", "2", "--schedule", "ZB1P")
    found = json.loads(call(capsys, *wish, "--json")[1])
    lacking = found["schedules_lacking"]
    assert lacking == dict.fromkeys(("DualPipe", "DualPipeV"), "needs 4 micro-batches")
    by_schedule = found["bubble_fraction_by_schedule"]
    assert [name for name, one in by_schedule.items() if one is None] == list(lacking)
    assert by_schedule["ZB1P"] == found["bubble_fraction"]
    text = call(capsys, *wish)[1]
    assert re.search(r"DualPipe +needs 4 micro-batches", text)
    enough = json.loads(call(capsys, *wish, "--micro-batch", "2", "--json")[1])
    assert not enough["schedules_lacking"]
    assert None not in enough["bubble_fraction_by_schedule"].values()


def test_fp8_is_said_to_be_on_paper_only(capsys: pytest.CaptureFixture[str]) -> None:
    wish = ("plan", "mini", "--cluster", "h200x8")
    assert "fathom does not train in it yet" in call(capsys, *wish)[1]
    assert "fathom does not train" not in call(capsys, *wish, "--no-fp8")[1]


def test_full_sharding_is_the_recipe_s_or_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    base = ("plan", "v3-16b", "--cluster", "h100x16", "--ep", "4", "--json")
    asked, own, not_asked = (
        json.loads(call(capsys, *base, *more)[1])
        for more in (
            ("--full-shard",),
            ("--set", "parallel.full_shard=true"),
            ("--set", "parallel.full_shard=true", "--no-full-shard"),
        )
    )
    assert asked == own and asked["layout"]["full_shard"] and not not_asked["layout"]["full_shard"]
    memory, whole = asked["memory_per_rank_bytes"], not_asked["memory_per_rank_bytes"]
    assert memory["weights"] < whole["weights"] and memory["gradients"] < whole["gradients"]
    status, _, trouble = call(capsys, *base[:-1], "--full-shard", "--pp", "2")
    assert status == 2 and "give --no-full-shard" in trouble


def test_a_what_if_changes_the_whole_plan(capsys: pytest.CaptureFixture[str]) -> None:
    shape = ("--pp", "4", "--ep", "8", "--schedule", "DualPipe", "--json")
    base = ("plan", "v3-16b", "--cluster", "h800x64", *shape)
    plain = json.loads(call(capsys, *base)[1])
    free = json.loads(call(capsys, *base, "--what-if", "offload")[1])
    assert free["gpu_hours"]["total"] < plain["gpu_hours"]["total"]
    said = {one["name"]: one["tokens_per_second_per_gpu"] for one in plain["what_ifs"]}
    assert said["offload"] == pytest.approx(free["tokens_per_second_per_gpu"])


def test_numbers_in_words() -> None:
    assert gain(-0.0001) == gain(0.0001) == "0.0%" and gain(-0.001) == "-0.1%"
    assert counted(1, "micro-batch") == "1 micro-batch" and counted(2, "device") == "2 devices"
    assert counted(1200, "micro-batch") == "1,200 micro-batches"
    assert gib(2**30 - 2**25) == "992.0 MiB" and gib(2**30) == "1.0 GiB"


def test_segments_of_the_report() -> None:
    """The batch grows from 3,072 to 15,360 over 469B tokens; no token is lost."""
    recipe = load_recipe("v3-671b")
    parts = segments(recipe)
    first = [part for part in parts if part.stage == "constant"]
    assert [part.batch for part in first] == sorted({part.batch for part in first})
    assert (first[0].batch, first[-1].batch) == (3072, 15360)
    assert sum(part.tokens for part in first) == 10e12
    assert sum(part.tokens for part in first[:-1]) == pytest.approx(469e9, rel=1e-3)
    total = sum(stage.tokens_asked for stage in recipe.stages)
    assert sum(part.tokens for part in parts) == pytest.approx(total)


REPORT = ("v3-671b", "--cluster", "h800x2048")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nano",), "Missing option '--cluster'"),
        (("nanno", "--cluster", "laptop"), "did you mean 'nano'?"),
        (("nano", "--cluster", "h900x8"), "did you mean 'h800'?"),
        ((*REPORT, "--pp", "3"), "pp = 3 must divide the 2048 devices"),
        ((*REPORT, "--pp", "16", "--ep", "48"), "ep = 48 must divide dp = 128"),
        ((*REPORT, "--schedule", "Dualpipe"), "did you mean 'DualPipe'?"),
        ((*REPORT, "--schedule", "ZB1P"), "does nothing in a pipeline of one rank; give --pp"),
        ((*REPORT, "--stage", "extend-128k"), "no layout can train batches of 480 sequences"),
        ((*REPORT, "--stage", "lows"), "did you mean 'low'?"),
        (("v3-671b", "--cluster", "a100x2048", "--fp8"), "a100 has no FP8 products"),
        ((*REPORT, "--split", "a"), "must be whole numbers"),
        ((*REPORT, "--split", "4,4,3"), "and pp is 1; give --pp 3 too"),
        ((*REPORT, "--pp", "2", "--split", "1,2"), "must be 2 numbers that make 61 layers"),
        (("nano", "--cluster", "laptop", "--pp", "2"), "has 1; give --cluster laptopx2"),
        ((*REPORT, "--what-if", "offlod"), "did you mean 'offload'?"),
        ((*REPORT, "--recompute", "some"), "must be one of none, report, full"),
        ((*REPORT, "--price", "-1"), "price = -1.0 must be at least 0"),
        ((*REPORT, "--pp", "many"), "Invalid value for '--pp'"),
        (("nano", "--cluster", "laptop", "--html", "/dev/null/x.html"), "cannot be written"),
    ],
)
def test_refused(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str) -> None:
    status, out, error = call(capsys, "plan", *arguments)
    assert status == 2 and out == ""
    assert error.startswith("error: ") and error.count("\n") == 1
    assert said in error
