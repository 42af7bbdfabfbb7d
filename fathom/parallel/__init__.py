"""Training on many devices (report §3.2): layouts, expert parallelism, pipelines, ZeRO-1."""

from fathom.parallel.dispatcher import ExpertParallelDispatcher as ExpertParallelDispatcher
from fathom.parallel.experts import shard_experts as shard_experts
from fathom.parallel.layout import Layout as Layout
from fathom.parallel.mesh import Group as Group
from fathom.parallel.mesh import Mesh as Mesh
from fathom.parallel.training import Parallel as Parallel
