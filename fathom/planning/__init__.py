"""What a model costs before it is trained: parameters, FLOPs, memory, from its configuration (report §1).

Nothing here builds a model or measures a machine; every figure can be checked with a pencil.

>>> from fathom import ModelConfig
>>> count_parameters(ModelConfig()).main
671026404352
"""

from __future__ import annotations

from fathom.planning.describe import describe as describe
from fathom.planning.flops import flops_per_token as flops_per_token
from fathom.planning.flops import forward_flops_per_token as forward_flops_per_token
from fathom.planning.memory import TrainingMemory as TrainingMemory
from fathom.planning.memory import cache_bytes_per_token as cache_bytes_per_token
from fathom.planning.memory import training_memory as training_memory
from fathom.planning.parameters import Parameters as Parameters
from fathom.planning.parameters import count_parameters as count_parameters
