"""What others have measured, and what this planner says of the same runs: one set of constants, none fitted to these.

Layouts as published; where the published run does something that a `PlannedLayout` cannot say, `differs` tells what.
The first is a whole run of months, its interruptions included, and ours beside it a step at the full batch less the
time that interruptions take; the others are benchmarks of a few steps with even
expert loads.
"""

from __future__ import annotations

from dataclasses import dataclass

from fathom.model import ModelConfig
from fathom.planning.cluster import read_cluster
from fathom.planning.layout import REPORT, PlannedLayout
from fathom.planning.rates import Rates
from fathom.planning.step_time import StepTime, step_time

V3 = ModelConfig()
"""The 671B model; the defaults are its shape."""
V2_LITE = ModelConfig(
    vocab_size=102400,
    hidden_size=2048,
    intermediate_size=10944,
    moe_intermediate_size=1408,
    num_hidden_layers=27,
    num_attention_heads=16,
    q_lora_rank=None,
    n_routed_experts=64,
    n_shared_experts=2,
    num_experts_per_tok=6,
    n_group=1,
    topk_group=1,
    routed_scaling_factor=1.0,
    first_k_dense_replace=1,
    num_nextn_predict_layers=0,
)
"""The released config_16B.json, which torchtitan trains."""


@dataclass(frozen=True)
class Point:
    """A published throughput."""

    who: str
    cluster: str
    layout: PlannedLayout
    batch: int
    """Sequences of 4,096 in a step."""
    published: float
    """Tokens per second and device."""
    source: str
    differs: str
    """What of the published run the layout leaves out."""
    config: ModelConfig = V3
    mtp: bool = True
    whole_run: bool = False
    """Whether the published figure is a run's, interruptions in it; ours is a step at the full batch less those."""

    @property
    def name(self) -> str:
        """Who, on what, and what is compared."""
        return f"{self.who}, {self.cluster}" + (" (at the full batch)" if self.whole_run else "")


POINTS = (
    Point(
        who="DeepSeek",
        cluster="h800x2048",
        layout=REPORT,
        batch=15360,
        published=14.8e12 / 2664e3 / 3600,
        source="report Table 1: 14.8T tokens in 2,664K hours",
        differs="the growing batch of the first 3 %",
        whole_run=True,
    ),
    Point(
        who="Megatron-Bridge",
        cluster="h100x1024",
        layout=PlannedLayout(pp=8, dp=128, ep=64, schedule="1F1B", interleave=4, overlap=True),
        batch=8192,
        published=1297,
        source="NVIDIA-NeMo/Megatron-Bridge, docs/performance-summary-archive.md, 25.09, dropless",
        differs="TP 2 over dp 64, reckoned as dp 128; its FP8 has one scale a tensor; overlap as its recipe asks",
    ),
    Point(
        who="NeMo Automodel",
        cluster="h100x256",
        layout=PlannedLayout(
            pp=4,
            dp=64,
            ep=64,
            schedule="1F1B",
            interleave=8,
            overlap=False,
            recompute="full",
            fp8=False,
            moment_bytes=4,
        ),
        batch=512,
        published=1002,
        source="NVIDIA-NeMo/Automodel, docs/performance-summary.md, 256 GPUs",
        differs="FSDP2 gathers weights, taken as hidden",
        mtp=False,
    ),
    Point(
        who="torchtitan 16B",
        cluster="h100x8",
        layout=PlannedLayout(
            dp=8,
            ep=8,
            micro_batch=4,
            overlap=False,
            recompute="full",
            fp8=False,
            moment_bytes=4,
        ),
        batch=32,
        published=11600,
        source="pytorch/torchtitan#1789",
        differs="ep 8, micro-batch 4 and full recomputation are our reading; FSDP2 gathers weights, taken as hidden",
        config=V2_LITE,
        mtp=False,
    ),
)
SEQ_LEN = 4096
"""Of all of them."""


@dataclass(frozen=True)
class Prediction:
    """A published figure and ours."""

    point: Point
    step: StepTime
    predicted: float
    """Tokens per second and device, interruptions included where the published figure has them."""

    @property
    def error(self) -> float:
        """Signed, of the published figure: +0.1 says 10 % more than was measured."""
        return self.predicted / self.point.published - 1


def predict(point: Point, rates: Rates) -> Prediction:
    """What the planner says of one point."""
    step = step_time(
        point.config,
        point.layout,
        read_cluster(point.cluster).device,
        rates,
        seq_len=SEQ_LEN,
        batch=point.batch,
        mtp=point.mtp,
    )
    good = rates.good_time if point.whole_run else 1.0
    return Prediction(point, step, step.tokens_per_second * good)


def predictions() -> list[Prediction]:
    """All of them, with one set of constants."""
    return [predict(point, Rates()) for point in POINTS]
