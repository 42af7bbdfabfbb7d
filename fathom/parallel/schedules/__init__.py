"""Pipeline schedules as data: made, checked, simulated; `fathom.parallel.draw` draws them (report §3.2.1)."""

from __future__ import annotations

from fathom.parallel.schedules.actions import Action as Action
from fathom.parallel.schedules.actions import Kind as Kind
from fathom.parallel.schedules.actions import Pair as Pair
from fathom.parallel.schedules.actions import Part as Part
from fathom.parallel.schedules.actions import Schedule as Schedule
from fathom.parallel.schedules.actions import Step as Step
from fathom.parallel.schedules.actions import Transfer as Transfer
from fathom.parallel.schedules.actions import singles as singles
from fathom.parallel.schedules.formulas import activations_in_table_2 as activations_in_table_2
from fathom.parallel.schedules.formulas import bubble_by_formula as bubble_by_formula
from fathom.parallel.schedules.formulas import bubble_in_table_2 as bubble_in_table_2
from fathom.parallel.schedules.formulas import in_flight as in_flight
from fathom.parallel.schedules.legality import check as check
from fathom.parallel.schedules.making import SCHEDULES as SCHEDULES
from fathom.parallel.schedules.making import Traits as Traits
from fathom.parallel.schedules.making import schedule as schedule
from fathom.parallel.schedules.making import traits as traits
from fathom.parallel.schedules.overlap import OVERLAPPED_ORDER as OVERLAPPED_ORDER
from fathom.parallel.schedules.overlap import POSTED_EARLY as POSTED_EARLY
from fathom.parallel.schedules.overlap import check_overlapped_order as check_overlapped_order
from fathom.parallel.schedules.overlap import overlapped_time as overlapped_time
from fathom.parallel.schedules.simulation import Costs as Costs
from fathom.parallel.schedules.simulation import Simulation as Simulation
from fathom.parallel.schedules.simulation import Span as Span
from fathom.parallel.schedules.simulation import simulate as simulate
from fathom.parallel.schedules.transfers import Receive as Receive
from fathom.parallel.schedules.transfers import Send as Send
from fathom.parallel.schedules.transfers import program as program
