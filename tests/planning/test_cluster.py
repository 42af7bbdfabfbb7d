"""Cluster descriptions: built in, by count, from a file, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from fathom.errors import PlanError
from fathom.planning.cluster import DEVICES, read_cluster


def test_names_and_counts() -> None:
    cluster = read_cluster("h800x2048")
    assert (cluster.device, cluster.devices, cluster.nodes) == (DEVICES["h800"], 2048, 256)
    assert cluster.name == "h800x2048"
    assert read_cluster("H100X8").device.name == "h100"
    assert read_cluster("laptop").devices == 1 and read_cluster("laptop").name == "laptop"


def test_figures_of_the_report() -> None:
    """Report §3.1-3.2: 160 and 50 GB/s, 132 SMs, $2 an hour."""
    h800 = DEVICES["h800"]
    assert (h800.intra_bandwidth, h800.inter_bandwidth) == (160e9, 50e9)
    assert (h800.sms, h800.per_node, h800.price) == (132, 8, 2.0)
    assert h800.fp8 == pytest.approx(2 * h800.bf16, rel=1e-3)


def test_a_file_describes_another(tmp_path: Path) -> None:
    file = tmp_path / "ours.toml"
    file.write_text(
        'devices = 16\nlike = "h800"\n[device]\nname = "ours"\nmemory = 96e9\nprice = 1.5\n'
    )
    cluster = read_cluster(str(file))
    assert (cluster.name, cluster.device.memory, cluster.device.price) == ("oursx16", 96e9, 1.5)
    assert cluster.device.bf16 == DEVICES["h800"].bf16
    file.write_text('devices = 4\ndevice = "a100"\n')
    assert read_cluster(str(file)).device is DEVICES["a100"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("h900x8", "did you mean 'h800'?"),
        ("h800x0", "at least 1"),
        ("h800x-2", "at least 1"),
        ("8xh800", "must look like h800x2048"),
        ("nowhere.toml", "cannot be read"),
    ],
)
def test_refused(text: str, said: str) -> None:
    with pytest.raises(PlanError, match=said.replace("?", r"\?")):
        read_cluster(text)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("devices = [", "is not TOML"),
        ('device = "h800"', "devices is missing; say how many"),
        ('devices = "8"\ndevice = "h800"', "devices = '8' must be a whole number"),
        ("devices = 4\ndevice = 3", "must be a name or a table"),
        ('devices = 4\n[device]\nname = "x"', r"\[device\] has no bf16"),
        ('devices = 4\nlike = "h800"\n[device]\nmemroy = 1', "did you mean 'memory'"),
        ('devices = 4\nlike = "h800"\n[device]\nmemory = "big"', "must be a number"),
        ('devices = 4\nlike = "h800"\n[device]\nsms = 0', "sms = 0 must be at least 1"),
        ('devices = 4\ndevice = "h800"\nnodes = 1', "nodes is not a key"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, content: str, said: str) -> None:
    file = tmp_path / "c.toml"
    file.write_text(content)
    with pytest.raises(PlanError, match=said):
        read_cluster(str(file))


def test_a_peak_that_there_is_not() -> None:
    with pytest.raises(PlanError, match="a100 has no FP8 products"):
        DEVICES["a100"].peak("fp8")
