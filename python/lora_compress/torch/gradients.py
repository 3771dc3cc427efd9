"""Gradients of weights that are never formed: their products with a few columns, and what those say of their spectra.

The gradient of a linear layer's weight is G = Σ_t dy_t·x_tᵀ over the tokens t, (rows, cols). For thin R (cols, k) and
L (rows, k)

    G·R = Σ_t dy_t·(x_tᵀ·R),      Gᵀ·L = Σ_t x_t·(dy_tᵀ·L),

2·T·k·(rows + cols) operations for T tokens, and nothing larger than x, dy and the products themselves is held.

Spectra come from randomised subspace iteration (Halko, Martinsson & Tropp 2011, algorithm 4.4), one visit of the
batches for each product: G·Ω, then Gᵀ·Q with Q = orth(G·Ω), then G·P with P = orth(Gᵀ·Q). It is done for each half of
the batches, and each half is judged by the other (`Halves`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from lora_compress.errors import SelectionError
from lora_compress.torch.layers import CONVOLUTION, EMBEDDING, embedding_factor
from lora_compress.torch.sites import Layer, Target

Loss = Callable[[nn.Module, Any], torch.Tensor]
Thin = Mapping[str, torch.Tensor]
# Rows of x and dy that are seen in float32 at once.
CHUNK = 4096
# Columns of the test matrix that estimates what a subspace leaves out.
PROBE = 32


@dataclass(frozen=True)
class Halves:
    """One weight's gradient by two halves of the batches, G₀ and G₁, each a mean over its batches.

    agreement: float64 (k,), what the k leading directions u·vᵀ of one half are worth in the other, σ·uᵀ·G'·v, the mean
        of both ways. Other data judges, so it is σ·uᵀ·E[G]·v on average, without the noise that a half's own σ² has;
        what is nothing but noise is worth 0, give or take.
    energy: ½(‖G₀‖² + ‖G₁‖²), noise included.
    inner: ⟨G₀, G₁⟩, on average ‖E[G]‖².

    The last two are known within the subspaces that were found, and estimated beyond (Hutch++, Meyer et al. 2021).
    """

    agreement: torch.Tensor
    energy: float
    inner: float


def measure(
    model: nn.Module, targets: Sequence[Target], batches: Sequence[Any], loss: Loss, *, width: int, seed: int
) -> dict[str, Halves]:
    """The gradient of every target that the loss reaches, by the name of its tensor.

    Batches with even numbers are one half, the others the other one. width: columns of the subspaces, no more than the
    shorter side of a matrix. Beside the model and what its backward pass needs, about 3·width·(rows + cols) floats of
    each target are held. Raises `SelectionError` where nothing is reached or a gradient is not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    # The same for all matrices of a shape: what matters is that it is independent of each of them.
    random = {
        shape: torch.randn(shape[1], min(width, *shape) + PROBE, generator=generator)
        for shape in dict.fromkeys(target.shape for target in targets)
    }
    visit = partial(_visit, model, batches=batches, loss=loss, seed=seed)
    starts = {
        target.tensor: random[target.shape].to(_device(target), _wide(target.leader.weight)) for target in targets
    }
    first = visit(targets, thin=starts, transposed=False)
    if not first:
        raise SelectionError("the loss reaches none of the layers: are they part of what it is computed from?")
    if odd := [name for name, both in first.items() if not both.isfinite().all()]:
        raise SelectionError(f"the gradient of `{odd[0]}` is not finite")
    reached = [target for target in targets if target.tensor in first]
    tested = {name: both[:, :, -PROBE:].clone() for name, both in first.items()}
    bases = _bases(first, lambda both: both[:, :, :-PROBE])
    bases = _bases(visit(reached, thin=bases, transposed=True), _own)
    third = visit(reached, thin=bases, transposed=False)
    return {
        name: _judge(*(each.cpu().double() for each in (third.pop(name), bases.pop(name), starts[name], tested[name])))
        for name in tested
    }


def _bases(products: dict[str, torch.Tensor], own: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Orthonormal bases of both halves side by side, (long, 2k). The products are let go one by one."""
    return {name: torch.cat([*torch.linalg.qr(own(products.pop(name)))[0]], 1) for name in list(products)}


def _own(both: torch.Tensor) -> torch.Tensor:
    """Of products of each half with both bases (2, long, 2k): each half's with its own basis, (2, long, k)."""
    width = both.shape[2] // 2
    return torch.stack([both[0, :, :width], both[1, :, width:]])


def _judge(both: torch.Tensor, bases: torch.Tensor, start: torch.Tensor, tested: torch.Tensor) -> Halves:
    """both: G_h·[P₀ P₁] (2, rows, 2k); bases: [P₀ P₁] (cols, 2k); start: Ω and the probes (cols, …); tested: G_h·probes
    (2, rows, probes).
    """
    halves = zip(_own(both), _own(both.flip(0)), bases.chunk(2, 1), strict=True)
    agreement, energy, inner = torch.zeros(bases.shape[1] // 2, dtype=torch.float64), 0.0, 0.0
    for half, (mine, theirs, basis) in enumerate(halves):
        u, sigma, vt = torch.linalg.svd(mine, full_matrices=False)
        agreement += sigma * ((u.T @ theirs) * vt).sum(1) / 2
        # G·(1 − P·Pᵀ)·probe, of both halves.
        seen = basis.T @ start[:, -PROBE:]
        rest, their_rest = tested[half] - mine @ seen, tested[1 - half] - theirs @ seen
        energy += float((mine**2).sum() + (rest**2).sum() / PROBE) / 2
        inner += float((mine * theirs).sum() + (rest * their_rest).sum() / PROBE) / 2
    return Halves(agreement, energy, inner)


def _visit(
    model: nn.Module,
    targets: Sequence[Target],
    batches: Sequence[Any],
    loss: Loss,
    seed: int,
    thin: Thin,
    transposed: bool,
) -> dict[str, torch.Tensor]:
    """G_h·R, or G_hᵀ·L, with `thin` for every target that is reached: (2, rows or cols, columns)."""
    sums: dict[str, torch.Tensor] = {}
    half = 0

    def receive(target: Target, layer: Layer, x: torch.Tensor, dy: torch.Tensor) -> None:
        columns = thin[target.tensor]
        if target.tensor not in sums:
            shape = 2, target.shape[1 if transposed else 0], columns.shape[1]
            sums[target.tensor] = torch.zeros(shape, dtype=columns.dtype, device=columns.device)
        # Products are float32's even where somebody calls all of this under autocast.
        with torch.autocast(dy.device.type, enabled=False):
            _add_product(sums[target.tensor][half], layer, x, dy, columns, transposed=transposed)

    # Dropout is the same at every visit, so that all of them see one gradient.
    with _tapped(model, targets, receive), torch.random.fork_rng(), torch.enable_grad():
        for number, batch in enumerate(batches):
            torch.manual_seed(seed + number)
            half = number % 2
            value = loss(model, batch)
            if value.requires_grad:
                value.backward()
    counts = [len(batches[half::2]) for half in (0, 1)]
    return {name: both / both.new_tensor(counts)[:, None, None] for name, both in sums.items()}


def _add_product(
    total: torch.Tensor, layer: Layer, x: torch.Tensor, dy: torch.Tensor, thin: torch.Tensor, *, transposed: bool
) -> None:
    """total += G·thin, or Gᵀ·thin, of one call of a layer."""
    rows, cols = layer.shape
    if layer.kind is CONVOLUTION:
        gradient = _kernel_gradient(layer, x, dy).reshape(rows, cols).to(thin.dtype)
        total += (gradient.t() if transposed else gradient) @ thin
        return
    looks_up = layer.kind is EMBEDDING
    if looks_up:
        module = layer.module
        dy = dy * embedding_factor(module)
        kept = x.reshape(-1) != (-1 if module.padding_idx is None else module.padding_idx)
        x, dy = x.reshape(-1)[kept], dy.reshape(-1, cols)[kept]
    else:
        x, dy = x.reshape(-1, cols), dy.reshape(-1, rows)
    for some, errors in zip(x.split(CHUNK), dy.split(CHUNK), strict=True):
        errors = errors.to(thin.dtype)
        if looks_up and transposed:
            total.addmm_(errors.t(), thin[some])
        elif looks_up:
            total.index_add_(0, some, errors @ thin)
        elif transposed:
            total.addmm_(some.to(thin.dtype).t(), errors @ thin)
        else:
            total.addmm_(errors.t(), some.to(thin.dtype) @ thin)


def _kernel_gradient(layer: Layer, x: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """The gradient of a convolution's weight itself: kernels are small, and one is held at a time."""
    with torch.enable_grad():
        weight = layer.weight.detach().requires_grad_()
        y = layer.module._conv_forward(x.detach().to(weight.dtype), weight, None)
    gradient: torch.Tensor = torch.autograd.grad(y, weight, dy.to(y.dtype))[0]
    return gradient


class _Tap(torch.autograd.Function):
    """y as it is; its gradient is shown to `receive` together with x on the way back. The anchor requires a gradient,
    so that y does, whatever is frozen.
    """

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, x: torch.Tensor, _anchor: torch.Tensor, receive: Any) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.receive = receive
        # Not a view: activations may change it in place.
        return y.data

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        ctx.receive(*ctx.saved_tensors, dy)
        return dy, None, None, None


@contextmanager
def _tapped(model: nn.Module, targets: Sequence[Target], receive: Callable[..., None]) -> Iterator[None]:
    """The model, showing x and dy of every call of the targets' layers; its parameters get no gradients meanwhile."""
    wanted = [(each, each.requires_grad) for each in model.parameters()]
    anchor = torch.zeros((), requires_grad=True)
    with ExitStack() as undo:
        for each, before in wanted:
            undo.callback(each.requires_grad_, before)
            each.requires_grad_(False)
        for target in targets:
            for layer in target.layers:
                hook = partial(_tap, anchor, partial(receive, target, layer))
                undo.callback(layer.module.register_forward_hook(hook, with_kwargs=True).remove)
        if (table := _input_embeddings(model)) is not None:
            # Reentrant checkpointing goes back only through blocks whose input requires a gradient.
            hook = partial(_tap, anchor, lambda *_: None)
            undo.callback(table.register_forward_hook(hook, with_kwargs=True).remove)
        yield


def _tap(
    anchor: torch.Tensor, receive: Callable[..., None], _: nn.Module, args: Any, named: Mapping[str, Any], y: Any
) -> Any:
    return _Tap.apply(y, (*args, *named.values())[0], anchor, receive)


def _input_embeddings(model: Any) -> nn.Module | None:
    try:
        found = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Module) else None


def _device(target: Target) -> torch.device:
    device: torch.device = target.leader.weight.device
    return device


def _wide(weight: torch.Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32) if weight.is_floating_point() else torch.float32
