"""How much of a fine-tune a causal language model with an adapter has: KL from tuned's predictions, and the loss."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lora_compress.adapter import Adapter
from lora_compress.errors import SelectionError
from lora_compress.model import Model, last_component, stack_of
from lora_compress.torch.tokens import read_tokens
from lora_compress.verbs.merge import read_adapter

CONTEXT = 512
TOKENS = 8192


class Fidelity:
    """Measures adapters of one pair on one text, in float32: call it with the directory of an adapter, or of the base
    or the tuned model itself.

    Parameters
    ----------
    base, tuned: model directories that transformers loads.
    calibration: text, or token ids as .npy or .json; to say something of quality, text that training has not seen.
    context, tokens: length of a window, and how many tokens to use in all.
    device: where to compute; a GPU if there is one.

    Raises `SelectionError` when transformers does not load the models, or names weights otherwise than the checkpoint.
    """

    def __init__(
        self,
        base: str | Path,
        tuned: str | Path,
        calibration: str | Path,
        *,
        context: int = CONTEXT,
        tokens: int = TOKENS,
        device: str | None = None,
    ) -> None:
        self._base, self._tuned = Path(base), Path(tuned)
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        windows = read_tokens(calibration, self._tuned, context=context, most=tokens)
        with torch.inference_mode():
            self._target = Target(load(self._tuned, self._device), windows)

    def __call__(self, path: Path) -> dict[str, float]:
        """KL(tuned ‖ model) and loss, in nats per token."""
        with torch.inference_mode():
            if path == self._tuned:
                model = load(path, self._device)
            else:
                model = load(self._base, self._device)
                if path != self._base:
                    base = Model.open(self._base)
                    adapted = Adapted(model, base, read_adapter(path, base))
                    adapted.set(dict.fromkeys(adapted.kinds, 1.0))
            every = list(range(len(self._target.windows)))
            kl, loss = self._target.divergence_and_loss(model, every)
        return {"kl": kl, "loss": loss}


class Target:
    """What tuned predicts on every window."""

    def __init__(self, tuned: Any, windows: torch.Tensor) -> None:
        size = tuned.get_input_embeddings().num_embeddings
        if int(windows.min()) < 0 or int(windows.max()) >= size:
            raise SelectionError(
                f"token ids reach from {int(windows.min())} to {int(windows.max())}, the model has {size}"
            )
        self.windows = windows
        self.log_p = [predictions(tuned, window).cpu() for window in windows]

    def halves(self) -> tuple[list[int], list[int]]:
        """Every other window calibrates, the others check."""
        numbers = list(range(len(self.windows)))
        return numbers[::2], numbers[1::2]

    def divergence(self, model: Any, half: list[int]) -> float:
        """KL(tuned ‖ model) in nats per token."""
        return self.divergence_and_loss(model, half)[0]

    def divergence_and_loss(self, model: Any, numbers: list[int]) -> tuple[float, float]:
        """KL(tuned ‖ model), and the loss on the text itself, in nats per token."""
        total, loss, count = 0.0, 0.0, 0
        for number in numbers:
            log_q = predictions(model, self.windows[number])
            log_p = self.log_p[number].to(log_q.device)
            total += float((log_p.exp() * (log_p - log_q)).sum(dtype=torch.float64))
            following = self.windows[number][1:, None].to(log_q.device)
            loss -= float(log_q.gather(-1, following).sum(dtype=torch.float64))
            count += len(log_p)
        return total / count, loss / count


class Adapted:
    """A base whose weights carry an adapter at scales that can be set: `model` is what transformers makes of `base`."""

    def __init__(self, model: Any, base: Model, adapter: Adapter) -> None:
        self.model = model
        parameters = dict(model.named_parameters(remove_duplicate=False))

        def weight_of(name: str) -> torch.Tensor:
            stack = stack_of(name)
            path = base.path_of(stack[0] if stack else name)
            if path not in parameters:
                raise SelectionError(f"transformers has no weight `{path}`: it names this model's weights otherwise")
            weight: torch.Tensor = parameters[path]
            return weight[stack[1]] if stack else weight

        if adapter.new_rows:
            raise SelectionError(
                f"`{min(adapter.new_rows)}` has new rows: nothing is measured where the vocabulary grew"
            )
        for name, (checkpoint, key) in adapter.replacements.items():
            weight = weight_of(name)
            weight.copy_(torch.from_numpy(checkpoint.read(key)).to(weight))
        self._terms: list[tuple[str, torch.Tensor, tuple[torch.Tensor, ...]]] = []
        for name in sorted(adapter.factored()):
            # A kernel as the matrix that its factors multiply to.
            weight = weight_of(name).flatten(1)
            for term in adapter.terms(name):
                arrays = term if isinstance(term, tuple) else (term,)
                values = tuple(torch.from_numpy(array).to(weight) for array in arrays)
                self._terms.append((last_component(name), weight, values))
        self.kinds = list(dict.fromkeys(kind for kind, *_ in self._terms))
        self._scales = dict.fromkeys(self.kinds, 0.0)

    def set(self, scales: Mapping[str, float]) -> None:
        """Give every kind of module a scale."""
        for kind, weight, values in self._terms:
            step = scales[kind] - self._scales[kind]
            if step and len(values) == 2:
                weight.addmm_(*values, alpha=step)
            elif step:
                weight.add_(values[0], alpha=step)
        self._scales = dict(scales)


def load(path: str | Path, device: torch.device) -> Any:
    """A causal language model in float32. Raises `SelectionError`."""
    try:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().to(device)
    except (OSError, ValueError) as error:
        raise SelectionError(f"transformers does not load `{path}` as a causal language model: {error}") from error


def predictions(model: Any, window: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the next token, float32 (context − 1, vocabulary)."""
    device = next(model.parameters()).device
    logits: torch.Tensor = model(window[None].to(device)).logits[0, :-1]
    return logits.float().log_softmax(-1)
