"""Time of one transformer block on one device, taken apart as DualPipe does (report §3.2.1, §3.3): attention and MLP,
forward, input gradients and weight gradients, and the all-to-alls between them.

Products are reckoned by `rates.product_seconds`; everything between them by the bytes it reads and writes, each
operation in a pass of its own: norms, rotation, residual sums, SwiGLU, sorting tokens to experts and back, and with
FP8 the casts, in the backward pass in two directions (§3.3.2). Expert loads are taken as even.
"""

from __future__ import annotations

from dataclasses import dataclass

from fathom.model import ModelConfig
from fathom.planning.cluster import Device
from fathom.planning.communication import combine, dispatch
from fathom.planning.flops import core_flops
from fathom.planning.layout import PlannedLayout
from fathom.planning.rates import BYTES, SCALE, Rates, product_seconds


@dataclass(frozen=True)
class Product:
    """A linear layer: W[out, reduced], applied to `rows` rows, or to rows of several experts."""

    out: int
    reduced: int
    rows: float
    matrices: float = 1
    fp8: bool = True
    cast: float | None = None
    """Rows of the input that are quantised for it; None: all; 0: another product has the same input."""
    cast_gradient: float | None = None
    """Rows of the output's gradient that are quantised; None: all."""


@dataclass(frozen=True)
class Work:
    """Seconds of computation of one micro-batch in one half of a block, on all SMs."""

    forward: float = 0.0
    inputs: float = 0.0
    """Backward, gradients of inputs and whatever is computed again for it."""
    weights: float = 0.0
    """Backward, gradients of weights."""

    def __add__(self, other: Work) -> Work:
        return Work(
            self.forward + other.forward,
            self.inputs + other.inputs,
            self.weights + other.weights,
        )

    @property
    def backward(self) -> float:
        """Both parts."""
        return self.inputs + self.weights

    @property
    def total(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward

    def scaled(self, factor: float) -> Work:
        """The same on fewer SMs."""
        return Work(factor * self.forward, factor * self.inputs, factor * self.weights)


@dataclass(frozen=True)
class BlockTime:
    """One block and one micro-batch: seconds of its halves, and of its all-to-alls (0 without experts elsewhere)."""

    attention: Work
    mlp: Work
    dispatch: float
    """Tokens to experts, forward; in backward gradients go the same way."""
    combine: float
    """Back; in backward likewise."""

    @property
    def work(self) -> Work:
        """Computation of the whole block."""
        return self.attention + self.mlp

    @property
    def transfer(self) -> float:
        """All-to-all time of one pass, forward or backward."""
        return self.dispatch + self.combine


@dataclass(frozen=True)
class Setting:
    """What every time depends on."""

    config: ModelConfig
    layout: PlannedLayout
    device: Device
    rates: Rates
    seq_len: int
    parts: int = 1
    """Devices that a sequence is divided among (context parallelism, taken as free); 1: it stays whole."""

    @property
    def tokens(self) -> float:
        """Of a micro-batch."""
        return self.seq_len * self.layout.micro_batch / self.parts

    @property
    def number(self) -> int:
        """Bytes of an activation."""
        return BYTES[self.device.compute]


def block_time(setting: Setting, layer: int) -> BlockTime:
    """Seconds of block `layer`, forward and backward."""
    config, layout = setting.config, setting.layout
    moe = config.is_moe_layer(layer)
    away = moe and layout.ep > 1
    send = dispatch(config, setting.device, layout.ep, layout.fp8)
    back = combine(config, setting.device, layout.ep)
    attention, mlp = _attention(setting), _mlp(setting, moe)
    if layout.recompute == "full":
        attention = Work(attention.forward, attention.inputs + attention.forward, attention.weights)
        mlp = Work(mlp.forward, mlp.inputs + mlp.forward, mlp.weights)
    seconds = [
        setting.tokens * way.seconds(setting.rates, setting.device) if away else 0.0
        for way in (send, back)
    ]
    return BlockTime(attention, mlp, *seconds)


def products_time(setting: Setting, products: list[Product]) -> Work:
    """Forward and both backward products of linear layers, with FP8's casts."""
    total = Work()
    for product in products:
        total += _product_time(setting, product)
    return total


def _product_time(setting: Setting, p: Product) -> Work:
    rates, device = setting.rates, setting.device
    fp8 = p.fp8 and setting.layout.fp8
    dtype = "fp8" if fp8 else device.compute
    forward = product_seconds(rates, device, dtype, p.rows, p.out, p.reduced, matrices=p.matrices)
    inputs = product_seconds(rates, device, dtype, p.rows, p.reduced, p.out, matrices=p.matrices)
    # The sum over micro-batches is read and written in FP32.
    operations = 2 * p.rows * p.out * p.reduced
    moved = BYTES[dtype] * p.rows * (p.out + p.reduced) + 8 * p.matrices * p.out * p.reduced
    weights = operations / rates.product(device, dtype) + moved / rates.bandwidth(device)
    if fp8:
        one_way = setting.number + 1 + SCALE  # read, write FP8
        bandwidth = rates.bandwidth(device)
        if rates.cast:
            cast = p.rows if p.cast is None else p.cast
            gradient = p.rows if p.cast_gradient is None else p.cast_gradient
            forward += cast * p.reduced * one_way / bandwidth
            inputs += gradient * p.out * one_way / bandwidth
        if rates.transpose:  # the stored input is read as FP8, the gradient as it came
            again = 2 * (1 + SCALE) * p.reduced + one_way * p.out
            weights += p.rows * again / bandwidth
    return Work(forward, inputs, weights)


def _moved(setting: Setting, forward: float, again: float = 0.0) -> Work:
    """A pass that moves so many bytes per token forward, half as many more backward, and `again` if made again."""
    seconds = setting.tokens / setting.rates.bandwidth(setting.device)
    recomputed = again if setting.layout.recompute == "report" else 0.0
    return Work(seconds * forward, seconds * (1.5 * forward + recomputed))


def _attention(setting: Setting) -> Work:
    """MLA (eqs 1-11) with its norm and residual sum."""
    c, n, number = setting.config, setting.tokens, setting.number
    D, H, C, R = c.hidden_size, c.num_attention_heads, c.kv_lora_rank, c.qk_rope_head_dim
    rank = c.q_lora_rank
    up = [Product(H * (c.qk_nope_head_dim + c.v_head_dim), C, n)]
    down = [Product(C + R, D, n), Product(D, H * c.v_head_dim, n)]
    if rank is None:
        down.append(Product(H * c.qk_head_dim, D, n, cast=0))
    else:
        down.append(Product(rank, D, n, cast=0))  # the same input as the other's
        up.append(Product(H * c.qk_head_dim, rank, n))
    total = products_time(setting, down + up) + _core(setting)
    norms = 2 * number * (D + (rank or 0) + C)
    # rotated parts of the queries in place; keys put together of both parts
    rotation = number * H * (2 * R + c.qk_nope_head_dim + c.qk_head_dim)
    total += _moved(setting, norms + rotation + 3 * number * D, again=norms + rotation)
    if setting.layout.recompute == "report":
        again = products_time(setting, up).forward
        total += Work(inputs=again)
    return total


def _core(setting: Setting) -> Work:
    """Attention itself; backward multiplies five times where forward does twice (FlashAttention)."""
    operations = setting.tokens * core_flops(setting.config, setting.seq_len)
    device, rates = setting.device, setting.rates
    if device.compute == "fp32":
        rate = rates.product(device, "fp32")
        return Work(operations / rate, 2.5 * operations / rate)
    peak = device.peak("bf16")
    return Work(
        operations / (rates.attention * peak), 2.5 * operations / (rates.attention_backward * peak)
    )


def _mlp(setting: Setting, moe: bool) -> Work:
    """A feed-forward block with its norm and residual sum (eq 12); of an MoE block what one rank computes."""
    c, n, number = setting.config, setting.tokens, setting.number
    D = c.hidden_size
    norm, residual = 2 * number * D, 3 * number * D
    if not moe:
        width = c.intermediate_size
        products = _swiglu(D, width, n, 1)
        moved: float = norm + residual + 3 * number * width
        return products_time(setting, products) + _moved(
            setting, moved, again=norm + 3 * number * width
        )
    K, inner = c.num_experts_per_tok, c.moe_intermediate_size
    # Tokens are quantised before they are sent, once for all their experts; so are gradients (§3.3.3).
    products = _swiglu(D, inner, n * K, c.n_routed_experts / setting.layout.ep, sent=n)
    if c.n_shared_experts:
        products += _swiglu(D, c.n_shared_experts * inner, n, 1, sent=0)
    products.append(Product(c.n_routed_experts, D, n, fp8=False))
    swiglu = 3 * number * (K + c.n_shared_experts) * inner
    arrived: float = 1 + SCALE if setting.layout.fp8 and setting.layout.ep > 1 else number
    sort = K * D * (2 * arrived + 2 * number)  # to experts, and back with the sum over them
    moved = norm + residual + number * D + swiglu + sort
    return products_time(setting, products) + _moved(setting, moved, again=norm + swiglu)


def _swiglu(
    hidden: int, inner: int, rows: float, matrices: float, sent: float | None = None
) -> list[Product]:
    """Gate and up at once, then down; `sent`: rows that are quantised on the way in, and gradients likewise."""
    return [
        Product(2 * inner, hidden, rows, matrices, cast=sent),
        Product(hidden, inner, rows, matrices, cast_gradient=sent),
    ]


def end_time(setting: Setting, mtp: bool) -> Work:
    """What the last stage does behind its blocks: final norm, head and loss, for the main model and each MTP module,
    and the modules' eh_proj; all BF16 (§3.3.1).
    """
    c, n = setting.config, setting.tokens
    head = Product(c.vocab_size, c.hidden_size, n, fp8=False)
    join = Product(c.hidden_size, 2 * c.hidden_size, n, fp8=False)
    logits = 4 * 3 * c.vocab_size  # FP32, written, read, and turned into their gradient
    depth = c.num_nextn_predict_layers if mtp else 0
    seconds = n / setting.rates.bandwidth(setting.device)
    total = products_time(setting, [head] * (1 + depth) + [join] * depth)
    return total + Work((1 + depth) * seconds * logits)
