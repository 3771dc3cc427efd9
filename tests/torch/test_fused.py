"""The fused step: what it computes, what it keeps, how many kernels it takes, and where it stands aside."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lora_compress.torch import AdapterSet, attach
from lora_compress.torch.functional import add_low_rank
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from tests.torch.training import IDS, all_plugins, stir, tiny_llama

LINEARS = r"(q|k|v|o|gate|up|down)_proj$"
TOKENS, WIDTH, RANK = 512, 64, 4


pytestmark = pytest.mark.usefixtures("plugins")


def batches(count: int) -> list[torch.Tensor]:
    """Rows that count up in steps of 7 from somewhere: there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    return [(torch.randint(0, 60, (2, 1), generator=generator) + 7 * torch.arange(16)) % 60 for _ in range(count)]


def peft_twin(adapters: AdapterSet, model: Any, rank: int, scale: float) -> Any:
    """PEFT's LoRA of a model with the factors of `adapters`."""
    config = LoraConfig(r=rank, lora_alpha=scale * rank, target_modules=LINEARS.replace("(", ".*(", 1))
    theirs = get_peft_model(model, config)
    modules = dict(theirs.base_model.model.named_modules())
    for site in adapters.sites:
        layer = modules[site.target.leader.path]
        b, a = site.adapter.factors()
        layer.lora_A["default"].weight.data = a.detach().clone()
        layer.lora_B["default"].weight.data = b.detach().clone()
    return theirs


def losses(model: Any, parameters: Any, steps: int, *, autocast: bool = False) -> torch.Tensor:
    optimizer = torch.optim.SGD([each for each in parameters if each.requires_grad], lr=0.1)
    seen = []
    for ids in batches(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.detach().double())
    return torch.stack(seen)


def test_training_is_that_of_peft_in_float32() -> None:
    ours = tiny_llama()
    adapters = attach(ours, rank=RANK, targets=LINEARS, scale=2.0)
    theirs = peft_twin(adapters, tiny_llama(), RANK, 2.0)
    mine = losses(ours, adapters.parameters(), 100)
    reference = losses(theirs, theirs.parameters(), 100)
    assert reference[-1] < reference[0] - 0.02, "nothing was learnt"
    assert ((mine - reference).abs() / reference).max() < 1e-5


def test_training_under_autocast_is_as_near_to_float32_as_that_of_peft() -> None:
    def model() -> Any:
        return tiny_llama(dtype=torch.bfloat16)

    exact = tiny_llama(dtype=torch.bfloat16).float()
    adapters = attach(exact, rank=RANK, targets=LINEARS, scale=2.0)
    twin = peft_twin(adapters, model(), RANK, 2.0)
    reference = losses(exact, adapters.parameters(), 20)
    ours = model()
    mine = losses(ours, attach(ours, rank=RANK, targets=LINEARS, scale=2.0).parameters(), 20, autocast=True)
    peft = losses(twin, twin.parameters(), 20, autocast=True)
    # Errors of single steps are noise of the rounding: they are compared in the mean square, with a tenth to spare.
    assert (mine - reference).square().mean().sqrt() <= 1.1 * (peft - reference).square().mean().sqrt()


class Counting(TorchDispatchMode):
    """Counts kernels: every operation that is no view and no bare allocation."""

    FREE = frozenset({"view", "t", "_unsafe_view", "detach", "empty", "new_empty", "alias", "as_strided", "expand",
                      "transpose", "reshape", "unsqueeze", "squeeze", "permute", "slice", "select", "split",
                      "empty_like", "unbind"})  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in self.FREE:
            self.kernels[name] += 1
            if isinstance(result, torch.Tensor):
                self.written += result.numel() * result.element_size()
        return result


def three_linears() -> nn.Module:
    """q, k and v of one input."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.q_proj(x) + self.k_proj(x) + self.v_proj(x)
            return result

    return Attention().to(torch.bfloat16)


def cost(model: nn.Module, *, autocast: bool = False) -> tuple[Counting, dict[int, int]]:
    """Kernels of forward and backward, and bytes of what is saved between them, by storage; parameters left out."""
    parameters = {each.untyped_storage().data_ptr() for each in model.parameters()}
    x = torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with Counting() as counting:
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            y = model(x)
        y.sum().backward()
    return counting, saved


@pytest.mark.parametrize("autocast", [False, True])
def test_kernels_and_saved_bytes(autocast: bool) -> None:
    floor, floor_saved = cost(three_linears().requires_grad_(requires_grad=False), autocast=autocast)
    ours = three_linears()
    attach(ours, rank=RANK)
    mine, mine_saved = cost(ours, autocast=autocast)
    config = LoraConfig(r=RANK, target_modules=["q_proj", "k_proj", "v_proj"])
    peft, peft_saved = cost(get_peft_model(three_linears(), config), autocast=autocast)
    full = TOKENS * WIDTH * 2
    # x once for the three layers; and of each u (tokens, r) and casts of B and A, in two bytes.
    narrow = 3 * RANK * (TOKENS + 2 * WIDTH) * 2
    assert sum(mine_saved.values()) - sum(floor_saved.values()) <= full + narrow
    assert sum(size >= full for size in mine_saved.values()) == 1, "a copy of x was kept"
    assert sum(peft_saved.values()) > sum(mine_saved.values())
    added, theirs = mine.kernels.total() - floor.kernels.total(), peft.kernels.total() - floor.kernels.total()
    # Of each layer: 2 casts and 2 products in the forward; du, dB, dA, addmm and 2 casts in the backward.
    assert added == 3 * 10
    assert theirs >= added + 3 * 3
    assert mine.written - floor.written < (peft.written - floor.written) / 4


def test_nothing_as_wide_as_the_input_is_kept_for_a_core() -> None:
    """LoRA-XS trains r × r numbers: x is needed for none of them."""
    floor_saved = cost(three_linears().requires_grad_(requires_grad=False))[1]
    model = three_linears()
    attach(model, "abc", RANK, init="lora-xs")
    saved = cost(model)[1]
    assert max(saved.values()) < TOKENS * WIDTH * 2
    extra = sum(saved.values()) - sum(floor_saved.values())
    # u and casts as above; B·C, and C cast.
    assert extra <= 3 * RANK * (TOKENS + 2 * WIDTH) * 2 + 3 * (WIDTH + RANK) * RANK * 4


@pytest.mark.parametrize("decomposition", ["ab", "abc", "tensor-train", "lokr"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_gradient(decomposition: str, reentrant: bool) -> None:
    model = tiny_llama()
    adapters = attach(model, decomposition, RANK)
    stir(adapters)
    model(IDS, labels=IDS).loss.backward()
    expected = [factor.grad.clone() for factor in adapters.parameters() if factor.grad is not None]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    model(IDS, labels=IDS).loss.backward()
    found = [factor.grad for factor in adapters.parameters()]
    assert len(found) == len(expected) > 0
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


def test_checkpointing_a_bare_layer_under_autocast() -> None:
    layer = nn.Linear(8, 8)
    adapters = attach(nn.Sequential(layer), rank=2)
    stir(adapters)
    x = torch.randn(4, 8, requires_grad=True)
    gradients = []
    ways: list[Any] = [layer, partial(checkpoint, layer, use_reentrant=False)]
    for wrapped in ways:
        with torch.autocast("cpu", torch.bfloat16):
            y = wrapped(x)
        assert y.dtype == torch.bfloat16
        gradients.append(torch.autograd.grad(y.sum(), [x, *adapters.parameters()]))
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    assert {each.dtype for each in gradients[0]} == {torch.float32}


@pytest.mark.parametrize("decomposition", ["ab", "abc", "tensor-train", "tensor-train-interleaved", "lokr"])
def test_compiles_as_one_graph(decomposition: str) -> None:
    model = tiny_llama()
    adapters = attach(model, decomposition, RANK, targets="layers.0.*(q_proj|down_proj)|embed")
    stir(adapters)
    block: Callable[[torch.Tensor], Any] = lambda ids: model(ids, use_cache=False).logits  # noqa: E731
    expected = block(IDS)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    found = compiled(IDS)
    assert torch.allclose(found, expected, atol=1e-4)
    factors = list(adapters.parameters())
    mine = torch.autograd.grad(found.square().sum(), factors)
    theirs = torch.autograd.grad(expected.square().sum(), factors)
    for one, other in zip(mine, theirs, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))


def test_adding_leaves_the_output_as_it_was() -> None:
    y, x = torch.randn(3, 5, 8), torch.randn(3, 5, 6)
    before = y.clone()
    b, a = torch.randn(8, 2), torch.randn(2, 6)
    assert torch.allclose(add_low_rank(y, x, b, a, 0.5), before + 0.5 * x @ a.t() @ b.t(), atol=1e-5)
    assert torch.equal(y, before)


def _train_in_processes(rank: int, port: int, kind: str, folder: Path, results: Any) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.nn.parallel import DistributedDataParallel

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    with all_plugins():
        # Sharded: float32 factors beside a frozen base of another dtype, in one group.
        model = tiny_llama(dtype=torch.bfloat16 if kind.startswith("fsdp-bf16") else torch.float32)
        adapters = attach(model, kind.partition("/")[2], RANK)
        stir(adapters)
        running: Any = model
        if kind.startswith("fsdp"):
            for block in model.model.layers:
                fully_shard(block)
            fully_shard(model, mp_policy=MixedPrecisionPolicy())
        else:
            running = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(adapters.parameters(), lr=0.1)
        for ids in batches(3):
            # Each process has one row of the batch.
            running(ids[rank : rank + 1], labels=ids[rank : rank + 1]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        adapters.save(folder, dtype="F32")
        values = [each.full_tensor() if hasattr(each, "full_tensor") else each for each in adapters.parameters()]
        if rank == 0:
            results.put([each.detach().numpy() for each in values])
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["ddp/ab", "fsdp/ab", "fsdp/abc-shared-input", "fsdp-bf16/tensor-train"])
def test_two_processes_train_as_one_does(kind: str, tmp_path: Path) -> None:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [
        context.Process(target=_train_in_processes, args=(rank, port, kind, tmp_path / "adapter", results))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    try:
        values = results.get(timeout=120)
    finally:
        for process in processes:
            process.join(timeout=60)
            process.kill()
    is_exact = not kind.startswith("fsdp-bf16")
    model = tiny_llama(dtype=torch.float32 if is_exact else torch.bfloat16)
    adapters = attach(model, kind.partition("/")[2], RANK)
    stir(adapters)
    start = [factor.detach().clone() for factor in adapters.parameters()]
    losses(model, adapters.parameters(), 3)
    # Averages of two gradients, in another order of sums: relative to how far training went, roundings of float32, or
    # some tens of bf16's 2⁻⁹ on the way of every gradient.
    most = 1e-4 if is_exact else 0.1
    for mine, theirs, before in zip(adapters.parameters(), values, start, strict=True):
        assert (mine - torch.from_numpy(theirs)).norm() <= most * (mine - before).norm()
    ours = model(IDS).logits
    adapters.load(tmp_path / "adapter")
    assert torch.allclose(model(IDS).logits, ours, rtol=0, atol=1e-4 if is_exact else 2.0**-6)
