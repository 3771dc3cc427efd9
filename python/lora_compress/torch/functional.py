"""y = x·Wᵀ + b + s·(x·Aᵀ)·Bᵀ of a frozen W and a pair B (out, r), A (r, in), and what its gradients need.

    u  = x·Aᵀ                    y  = x·Wᵀ + b;  y += s·u·Bᵀ          (one addmm, into the base's output)
    du = s·dy·B                  dx = dy·W;      dx += du·A           (the same, into the base's gradient)
    dB = s·dyᵀ·u                 dA = duᵀ·x

x is saved as it came, never as a copy, so that layers of one input (q, k, v) share it; and only where A is trained. u
has r columns: keeping it costs less than multiplying again. Between the factors nothing has as many columns as x or y.
What remains is memory traffic: PEFT's x.to(f32), dropout, ·s and + are each a pass over all of x or y.

Every gradient is in the dtype of what it belongs to. Under autocast all products are in its dtype, from float32
factors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import Parameter
from torch.nn import functional as F  # noqa: N812 (as everywhere)

# What the functions below are given raw. DTensors, fake tensors and other subclasses take torch's own operations.
PLAIN = frozenset({torch.Tensor, Parameter})


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """What x is multiplied in: the dtype of autocast where it is on (it leaves float64 alone), else its own."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def is_traced(x: torch.Tensor, base: torch.Tensor, b: torch.Tensor, a: torch.Tensor) -> bool:
    """Whether torch's own operations have to be used: a compiler looks on, or a tensor is more than a tensor."""
    is_plain = type(x) in PLAIN and type(base) in PLAIN and type(b) in PLAIN and type(a) in PLAIN
    return torch.compiler.is_compiling() or not is_plain


def adapted_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, b: torch.Tensor, a: torch.Tensor, scale: float
) -> torch.Tensor:
    """x·(W + s·B·A)ᵀ + bias in one differentiable step, for W (out, in) and a bias that are not trained.

    x is (…, in); B (out, r) and A (r, in) may be of another dtype than x. Gradients reach x, B and A.
    """
    dtype = compute_dtype(x)
    result: torch.Tensor = _AdaptedLinear.apply(x if x.dtype == dtype else x.to(dtype), weight, bias, b, a, scale)
    return result


def add_low_rank(y: torch.Tensor, x: torch.Tensor, b: torch.Tensor, a: torch.Tensor, scale: float) -> torch.Tensor:
    """y + s·(x·Aᵀ)·Bᵀ for any layer's output y (…, out): that of a quantised one, or of one that a compiler sees.

    y stays as it is. Computed in y's dtype.
    """
    x = x if x.dtype == y.dtype else x.to(y.dtype)
    if not is_traced(x, y, b, a):
        result: torch.Tensor = _AddLowRank.apply(y, x, b, a, scale)
        return result
    u = F.linear(x, a.to(y.dtype))
    if torch.compiler.is_compiling():
        b = b.to(y.dtype)
        return torch.addmm(y.reshape(-1, y.shape[-1]), u.reshape(-1, u.shape[-1]), b.t(), alpha=scale).view(y.shape)
    # A sharded tensor may not be flattened.
    return torch.add(y, F.linear(u, b.to(y.dtype)), alpha=scale)


def _scaled_mm(left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """s·left·right by one kernel."""
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scale)


def _gradients(
    ctx: Any, dy: torch.Tensor, x: torch.Tensor | None, u: torch.Tensor | None, b: torch.Tensor, needs_x: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """du where it is needed, dB, dA. dy is (tokens, out), x (…, in), B already in dy's dtype."""
    du = _scaled_mm(dy, b, ctx.scale) if needs_x or x is not None else None
    db = _scaled_mm(dy.t(), u, ctx.scale).to(ctx.b_dtype) if u is not None else None
    da = (du.t() @ x.reshape(-1, x.shape[-1])).to(ctx.a_dtype) if x is not None and du is not None else None
    return du, db, da


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        b: torch.Tensor,
        a: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        dtype = x.dtype
        flat = x.reshape(-1, x.shape[-1])
        cast_w, cast_a, cast_b = weight.to(dtype), a.to(dtype), b.to(dtype)
        y = F.linear(flat, cast_w, bias if bias is None else bias.to(dtype))
        u = flat @ cast_a.t()
        y.addmm_(u, cast_b.t(), alpha=scale)
        needs_x, _, _, needs_b, needs_a, _ = ctx.needs_input_grad
        ctx.save_for_backward(
            x if needs_a else None,
            u if needs_b else None,
            cast_b,
            cast_a if needs_x else None,
            cast_w if needs_x else None,
        )
        ctx.scale, ctx.a_dtype, ctx.b_dtype, ctx.shape = scale, a.dtype, b.dtype, x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, u, b, a, weight = ctx.saved_tensors
        dy = grad.reshape(-1, grad.shape[-1])
        du, db, da = _gradients(ctx, dy, x, u, b, ctx.needs_input_grad[0])
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (dy @ weight).addmm_(du, a).view(ctx.shape)
        return dx, None, None, db, da, None


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, x: torch.Tensor, b: torch.Tensor, a: torch.Tensor, scale: float
    ) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        cast_a, cast_b = a.to(y.dtype), b.to(y.dtype)
        u = torch.mm(flat, cast_a.t())
        _, needs_x, needs_b, needs_a, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_a else None, u if needs_b else None, cast_b, cast_a if needs_x else None)
        ctx.scale, ctx.a_dtype, ctx.b_dtype, ctx.shape = scale, a.dtype, b.dtype, x.shape
        return torch.addmm(y.reshape(-1, y.shape[-1]), u, cast_b.t(), alpha=scale).view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, u, b, a = ctx.saved_tensors
        dy = grad.reshape(-1, grad.shape[-1])
        du, db, da = _gradients(ctx, dy, x, u, b, ctx.needs_input_grad[1])
        dx = torch.mm(du, a).view(ctx.shape) if ctx.needs_input_grad[1] and du is not None else None
        return grad, dx, db, da, None
