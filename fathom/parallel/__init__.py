"""Training and serving on many devices (report §3.2, 3.4): what is decided before anything runs, and what runs it."""

from __future__ import annotations

from fathom.parallel.dispatcher import ExpertParallelDispatcher as ExpertParallelDispatcher
from fathom.parallel.eplb import loads_by_gpu as loads_by_gpu
from fathom.parallel.eplb import rebalance_experts as rebalance_experts
from fathom.parallel.experts import shard_experts as shard_experts
from fathom.parallel.layout import Layout as Layout
from fathom.parallel.mesh import Group as Group
from fathom.parallel.mesh import Mesh as Mesh
from fathom.parallel.schedules import OVERLAPPED_ORDER as OVERLAPPED_ORDER
from fathom.parallel.schedules import POSTED_EARLY as POSTED_EARLY
from fathom.parallel.schedules import SCHEDULES as SCHEDULES
from fathom.parallel.schedules import Action as Action
from fathom.parallel.schedules import Costs as Costs
from fathom.parallel.schedules import Pair as Pair
from fathom.parallel.schedules import Part as Part
from fathom.parallel.schedules import Receive as Receive
from fathom.parallel.schedules import Schedule as Schedule
from fathom.parallel.schedules import Send as Send
from fathom.parallel.schedules import Simulation as Simulation
from fathom.parallel.schedules import Step as Step
from fathom.parallel.schedules import Transfer as Transfer
from fathom.parallel.schedules import activations_in_table_2 as activations_in_table_2
from fathom.parallel.schedules import bubble_in_table_2 as bubble_in_table_2
from fathom.parallel.schedules import check as check
from fathom.parallel.schedules import check_overlapped_order as check_overlapped_order
from fathom.parallel.schedules import overlapped_time as overlapped_time
from fathom.parallel.schedules import program as program
from fathom.parallel.schedules import schedule as schedule
from fathom.parallel.schedules import simulate as simulate
from fathom.parallel.schedules import singles as singles
from fathom.parallel.training import Parallel as Parallel
