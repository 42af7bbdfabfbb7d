"""Lesson 7 — a loss without logits (report §2.2, eqs 23-24).

At 129,280 words the logits of a batch are by far its largest tensor: one sequence of 4,096 tokens
makes 2.1 GB in float32, its gradient as much again, and MTP doubles that. They are needed for a
moment only, so head and cross-entropy are one rule that works through the positions in chunks.
"""

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fathom.kernels import linear_cross_entropy

torch.manual_seed(0)
N, D, V = 2048, 64, 16000
hidden, head = torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True)
targets = torch.randint(V, (N,))


class Largest(TorchDispatchMode):
    """Remembers the size in bytes of the largest tensor any operation made."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Run the operation and look at what it gives."""
        result = func(*args, **(kwargs or {}))
        made = [t.nbytes for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        self.bytes = max(self.bytes, *made, 0) if made else self.bytes
        return result


def whole() -> torch.Tensor:
    """All logits at once."""
    return F.cross_entropy(hidden @ head.T, targets, reduction="sum")


def chunked() -> torch.Tensor:
    """The same sum, a chunk of positions at a time."""
    return linear_cross_entropy(hidden, head, targets)


found = {}
for loss in (whole, chunked):
    hidden.grad = head.grad = None
    with Largest() as largest:
        value = loss()
        value.backward()
    found[loss.__name__] = value.item(), hidden.grad, head.grad, largest.bytes
    mebibytes = largest.bytes / 2**20
    print(f"{loss.__name__:8} loss {value.item():.1f}, largest tensor {mebibytes:5.1f} MiB")
(a, a_hidden, a_head, a_bytes), (b, b_hidden, b_head, b_bytes) = found["whole"], found["chunked"]
print(f"gradients of the head differ by at most {(a_head - b_head).abs().max():.1e}")
assert abs(a - b) < 1e-4 * a
assert torch.allclose(a_hidden, b_hidden, atol=1e-3) and torch.allclose(a_head, b_head, atol=1e-3)
assert a_bytes >= N * V * 4 and b_bytes < a_bytes / 4
