"""What a model is trained and served on, as data: devices, the links between them, how many there are.

Peaks are dense (no structured sparsity), per device, as the vendors print them. Link rates are per device and per
direction. Inside a node they are what traffic can use, not the nominal rate: the report (§3.2.2) counts 160 GB/s of the
H800's nominal 200, which is 0.8, and the other devices' nominal rates are taken times the same 0.8 (DeepEP measures
726 of the B200's 900 GB/s, which is 0.81). Between nodes they are the nominal rate of the device's own adapter.

Sources: H800 report §3.1-3.2 and Table 1 (price), its chip is the H100's with less NVLink; H100, H200, B200, A100
the vendor's data sheets (SXM boards in HGX nodes of eight); prices other than the report's are not data, so there are
none: `--price` says them.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fathom.errors import PlanError, did_you_mean

GB, GiB, TB, TFLOPS = 1e9, 2**30, 1e12, 1e12


@dataclass(frozen=True)
class Device:
    """One accelerator (or one computer) and its place in a node."""

    name: str
    """What it is called in `NAMExCOUNT`."""
    bf16: float
    """Peak FLOP/s of BF16 products; 0 where there is no such unit, then FP32 is used."""
    fp8: float
    """Peak FLOP/s of FP8 products; 0 where there is no such unit."""
    fp32: float
    """Peak FLOP/s of FP32 arithmetic."""
    memory: float
    """Bytes of memory."""
    memory_bandwidth: float
    """Bytes per second between memory and chip."""
    sms: int
    """Streaming multiprocessors (cores), which computation and communication share."""
    per_node: int
    """Devices in a node."""
    intra_bandwidth: float
    """Usable bytes per second, one direction, to devices of the same node."""
    inter_bandwidth: float
    """Bytes per second, one direction, to other nodes."""
    price: float | None = None
    """US dollars for an hour of one device; None: not known."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("bf16", "fp8", "price") else 1
            if isinstance(value, int | float) and value < least:
                raise PlanError(
                    f"{self.name}: {field.name} = {value} must be at least {least}; correct it"
                )

    @property
    def compute(self) -> str:
        """The dtype of ordinary products: "bf16" where there are units for it, else "fp32"."""
        return "bf16" if self.bf16 else "fp32"

    def peak(self, dtype: str) -> float:
        """Peak FLOP/s of a dtype that the device has."""
        rate: float = getattr(self, dtype)
        if not rate:
            raise PlanError(
                f"{self.name} has no {dtype.upper()} products; plan without them (--no-fp8) or take a device that has"
            )
        return rate


_HOPPER = Device(
    name="h100",
    bf16=989.4 * TFLOPS,
    fp8=1978.9 * TFLOPS,
    fp32=66.9 * TFLOPS,
    memory=80 * GiB,
    memory_bandwidth=3.35 * TB,
    sms=132,
    per_node=8,
    intra_bandwidth=0.8 * 450 * GB,  # NVLink 4, 900 GB/s both ways
    inter_bandwidth=50 * GB,  # one 400 Gb/s adapter each
)
DEVICES = {
    device.name: device
    for device in (
        # Report §3.2.2: NVLink 160 GB/s, InfiniBand 50 GB/s; Table 1: $2 an hour.
        replace(_HOPPER, name="h800", intra_bandwidth=160 * GB, price=2.0),
        _HOPPER,
        replace(_HOPPER, name="h200", memory=141 * GB, memory_bandwidth=4.8 * TB),
        Device(
            name="b200",
            bf16=2250 * TFLOPS,
            fp8=4500 * TFLOPS,
            fp32=75 * TFLOPS,
            memory=180 * GB,
            memory_bandwidth=7.7 * TB,
            sms=148,
            per_node=8,
            intra_bandwidth=0.8 * 900 * GB,
            inter_bandwidth=50 * GB,
        ),
        Device(
            name="a100",
            bf16=312 * TFLOPS,
            fp8=0,
            fp32=19.5 * TFLOPS,
            memory=80 * GiB,
            memory_bandwidth=2.039 * TB,
            sms=108,
            per_node=8,
            intra_bandwidth=0.8 * 300 * GB,
            inter_bandwidth=25 * GB,  # one 200 Gb/s adapter each
        ),
        # Four cores at 3 GHz with two 256-bit FMA units each: 4 x 3e9 x 2 x 8 x 2; two channels of DDR5-4800.
        Device(
            name="laptop",
            bf16=0,
            fp8=0,
            fp32=0.384 * TFLOPS,
            memory=16 * GiB,
            memory_bandwidth=76.8 * GB,
            sms=4,
            per_node=1,
            intra_bandwidth=76.8 * GB,
            inter_bandwidth=0.125 * GB,  # 1 Gb/s Ethernet
            price=0.0,
        ),
    )
}


@dataclass(frozen=True)
class Cluster:
    """So many of one device."""

    device: Device
    devices: int

    def __post_init__(self) -> None:
        if self.devices < 1:
            raise PlanError(f"a cluster of {self.devices} devices must have at least 1; raise it")

    @property
    def name(self) -> str:
        """As it is written: h800x2048, laptop."""
        return f"{self.device.name}x{self.devices}" if self.devices > 1 else self.device.name

    @property
    def nodes(self) -> int:
        """Nodes, the last perhaps in part."""
        return -(-self.devices // self.device.per_node)


def read_cluster(text: str) -> Cluster:
    """A cluster from "h800x2048", "laptop" (one), or the path of a TOML file: `devices = 2048` and either
    `device = "h800"`, a table [device] with every field, or both a table and `like = "h800"` for the rest.

    Raises `PlanError`.
    """
    if text.endswith(".toml"):
        return _from_file(Path(text))
    found = re.fullmatch(r"([A-Za-z]\w*?)(?:[xX](-?\d+))?", text)
    if not found:
        raise PlanError(
            f"cluster {text!r} must look like h800x2048, be a device's name, or name a .toml file"
        )
    return Cluster(_device(found[1].lower()), int(found[2] or 1))


def _device(name: str) -> Device:
    if name not in DEVICES:
        raise PlanError(
            f"no device is called {name!r}; {did_you_mean(name, DEVICES, 'known are')}; a .toml file describes others"
        )
    return DEVICES[name]


def _from_file(path: Path) -> Cluster:
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PlanError(f"{path} is not TOML: {error}; correct it there") from error
    except OSError as error:
        raise PlanError(f"{path} cannot be read: {error.strerror}; mend that") from error
    table = content.get("device")
    device = _device(table.lower()) if isinstance(table, str) else _described(path, content, table)
    if "devices" not in content:
        raise PlanError(f"{path}: devices is missing; say how many there are: devices = 8")
    count = content["devices"]
    if not isinstance(count, int) or isinstance(count, bool):
        raise PlanError(
            f"{path}: devices = {count!r} must be a whole number; say how many there are"
        )
    _refuse_unknown(path, content, {"device", "devices", "like"})
    return Cluster(device, count)


def _described(path: Path, content: dict[str, Any], table: Any) -> Device:
    """A device from its table, the rest from the one that it is `like`."""
    if not isinstance(table, dict):
        raise PlanError(f"{path}: device = {table!r} must be a name or a table; write [device]")
    known = {field.name for field in fields(Device)}
    _refuse_unknown(path, table, known)
    for key, value in table.items():
        wanted = str if key == "name" else int | float
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise PlanError(f"{path}: device.{key} = {value!r} must be a number; correct it")
    if "like" in content:
        return replace(_device(str(content["like"]).lower()), **table)
    missing = sorted(known - set(table) - {"price"})
    if missing:
        raise PlanError(
            f"{path}: [device] has no {', '.join(missing)}; add them, or `like` to take them over"
        )
    return Device(**table)


def _refuse_unknown(path: Path, table: dict[str, Any], known: set[str]) -> None:
    for key in table:
        if key not in known:
            raise PlanError(
                f"{path}: {key} is not a key of a cluster; {did_you_mean(key, sorted(known))}"
            )
