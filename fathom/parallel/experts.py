"""Which experts are here: a model's routed experts cut down to this rank's.

`fathom.parallel.pieces` says how the parts are called, `Parallel.whole_weights` puts them together.
"""

from __future__ import annotations

from torch import nn

from fathom.model import Transformer
from fathom.model.moe import Experts, MoE
from fathom.parallel.all_to_all import Traffic
from fathom.parallel.dispatcher import ExpertParallelDispatcher
from fathom.parallel.mesh import Mesh


def local_experts(experts: int, mesh: Mesh) -> range:
    """The routed experts of this rank, consecutive ones."""
    here = experts // mesh.ep.size
    return range(mesh.ep.place * here, (mesh.ep.place + 1) * here)


def shard_experts(model: Transformer, mesh: Mesh) -> Traffic:
    """Keep this rank's experts of every MoE block and let tokens travel to the others; what they send is counted.

    The parameters are new ones, so this comes before the optimiser. Raises `ParallelError` when the experts cannot be
    shared out evenly.
    """
    mesh.layout.check(model.config)
    traffic = Traffic()
    if mesh.ep.size == 1:
        return traffic
    here = local_experts(model.config.n_routed_experts, mesh)
    for module in model.modules():
        if isinstance(module, MoE):
            for name, whole in list(module.experts.named_parameters()):
                part = whole.detach()[here.start : here.stop].clone()
                setattr(module.experts, name, nn.Parameter(part, whole.requires_grad))
            module.dispatcher = ExpertParallelDispatcher(
                mesh, model.config.n_routed_experts, traffic
            )
    return traffic


def sharded_names(model: Transformer) -> set[str]:
    """Names of the parameters that expert parallelism shards, all along their first axis."""
    return {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, Experts)
        for name, _ in module.named_parameters()
    }
