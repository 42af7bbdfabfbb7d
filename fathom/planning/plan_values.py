"""A plan as plain values, which `fathom plan --json` prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, fields
from typing import Any

from fathom.planning import serving
from fathom.planning.layout import PlannedLayout
from fathom.planning.plan import Plan
from fathom.planning.published import Prediction
from fathom.planning.run_cost import PUBLISHED_HOURS, PUBLISHED_PRICE
from fathom.planning.search import Candidate
from fathom.planning.step_time import StepTime
from fathom.planning.what_if import Outcome


def as_values(plan: Plan, most: int | None = None) -> dict[str, Any]:
    """The plan as plain values. `most`: of the swept layouts; None: they are left out."""
    step, p = plan.step, plan.parameters
    rank, memory = plan.fullest
    return {
        "recipe": plan.name,
        "cluster": plan.task.cluster.name,
        "layout": layout_values(plan.layout),
        "seq_len": plan.task.seq_len,
        "batch": plan.task.batch,
        "micro_batches": plan.micro_batches,
        "parameters": {
            **{
                key: getattr(p, key)
                for key in ("embedding", "head", "attention", "feed_forward", "norms")
            },
            "main": p.main,
            "mtp": p.mtp,
            "active": p.active,
        },
        "flops_per_token": step.flops,
        "memory_per_rank_bytes": {**asdict(memory), "total": memory.total},
        "fullest_rank": rank,
        "memory_otherwise_bytes": {key: one.total for key, one in plan.memory_otherwise.items()},
        "device_memory_bytes": plan.task.cluster.device.memory,
        "host_ema_bytes": plan.host_ema_bytes,
        "fits": plan.fits,
        "traffic_bytes": plan.traffic,
        "step_seconds": step_values(step),
        "step_seconds_without_overlap": step_values(plan.step_without_overlap),
        "bubble_fraction": step.bubble_fraction,
        "bubble_fraction_by_schedule": {
            **{name: one.bubble_fraction for name, one in plan.bubbles.items()},
            **dict.fromkeys(plan.schedules_lacking),
        },
        "schedules_lacking": plan.schedules_lacking,
        "tokens_per_second_per_gpu": step.tokens_per_second,
        "mfu": step.mfu,
        "days": plan.cost.days,
        "gpu_hours": {
            "total": plan.cost.hours,
            **{stage.stage: stage.hours for stage in plan.cost.stages},
        },
        "cost_usd": plan.cost.usd,
        "published": _published() if plan.is_report else None,
        "alternatives": [candidate_values(one) for one in plan.alternatives],
        "sweep": None if most is None else [candidate_values(c) for c in plan.swept[:most]],
        "what_ifs": [what_if_values(one) for one in plan.what_ifs],
        "predictions": [prediction_values(one) for one in plan.predictions],
        "serving": _serving(plan),
    }


def layout_values(layout: PlannedLayout) -> dict[str, Any]:
    """A layout's fields."""
    return {field.name: getattr(layout, field.name) for field in fields(layout)}


def step_values(step: StepTime) -> dict[str, float]:
    """Where a step's time goes."""
    parts = ("compute", "exposed", "bubble", "reduce", "update", "all_to_all", "pipeline")
    return {**{key: getattr(step, key) for key in parts}, "total": step.total}


def candidate_values(one: Candidate) -> dict[str, Any]:
    """A layout of a sweep."""
    return {
        "layout": layout_values(one.layout),
        "fits": one.fits,
        "memory_bytes": one.memory.total,
        "tokens_per_second_per_gpu": one.step.tokens_per_second,
        "bubble_fraction": one.step.bubble_fraction,
    }


def what_if_values(one: Outcome) -> dict[str, Any]:
    """What changed hardware would give."""
    return {
        "name": one.what_if.name,
        "says": one.what_if.says,
        "tokens_per_second_per_gpu": one.step.tokens_per_second,
        "gain": one.gain,
    }


def prediction_values(one: Prediction) -> dict[str, Any]:
    """A published run beside the planner's figure for it."""
    return {
        "who": one.point.who,
        "cluster": one.point.cluster,
        "published": one.point.published,
        "predicted": one.predicted,
        "error": one.error,
        "source": one.point.source,
        "differs": one.point.differs,
    }


def _published() -> dict[str, Any]:
    total = sum(PUBLISHED_HOURS.values())
    return {"gpu_hours": {**PUBLISHED_HOURS, "total": total}, "cost_usd": total * PUBLISHED_PRICE}


def _serving(plan: Plan) -> dict[str, Any] | None:
    if not plan.decodes:
        return None
    units: Sequence[Any] = (*plan.prefills, *plan.decodes)
    return {
        "cache_bytes_per_token": serving.cache_bytes(plan.config, fp8=False),
        "cache_bytes_per_token_fp8": serving.cache_bytes(plan.config, fp8=True),
        "units": [
            {
                "unit": one.unit.name,
                **{
                    key: getattr(one, key)
                    for key in ("batch", "most", "memory", "compute", "network")
                    if hasattr(one, key)
                },
                "bound": one.bound,
                "roof": one.roof,
                "floor": one.floor,
            }
            for one in units
        ],
        "published_decode": serving.PUBLISHED_DECODE,
        "published_prefill": serving.PUBLISHED_PREFILL,
        "published_prefill_computed": serving.PUBLISHED_PREFILL * (1 - serving.CACHE_HITS),
    }
