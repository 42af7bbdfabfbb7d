"""A pipeline schedule put to work: a model cut into stages, and the list of one rank run over them (report §3.2.1)."""

from __future__ import annotations

from fathom.parallel.pipeline.executor import MicroBatch as MicroBatch
from fathom.parallel.pipeline.executor import Pipeline as Pipeline
from fathom.parallel.pipeline.plan import Plan as Plan
from fathom.parallel.pipeline.reading import Measure as Measure
from fathom.parallel.pipeline.reading import read as read
from fathom.parallel.pipeline.stages import Weights as Weights
from fathom.parallel.pipeline.stages import share_layers as share_layers
