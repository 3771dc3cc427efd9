"""How much of a fine-tune a model has: the distance of its predictions from the tuned model's, on text that neither
saw.

A `Fidelity` knows one pair of `fine_tunes.py`. It measures weights: KL(tuned ‖ model) in nats per prediction, and the
loss on the held-out data (for ANARCII, whose data is not public: on the tuned model's own choices).
"""

from __future__ import annotations

import types
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from fine_tunes import pair, wheel
from safetensors.torch import load_file

State = Mapping[str, torch.Tensor]

# Trastuzumab's heavy and light chain, and the A6 T-cell receptor's α and β: varied at random, they are what ANARCII
# reads.
SEQUENCES = (
    "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVYYCSRWGGDGFYAMDYWGQGTLVTVSS",
    "DIQMTQSPSSLSASVGDRVTITCRASQDVNTAVAWYQQKPGKAPKLLIYSASFLYSGVPSRFSGSRSGTDFTLTISSLQPEDFATYYCQQHYTTPPTFGQGTKVEIK",
    "KEVEQNSGPLSVPEGAIASLNCTYSDRGSQSFFWYRQYSGKSPELIMFIYSNGDKEDGRFTAQLNKASQYVSLLIRDSQPSDSATYLCAVTTDSWGKLQFGAGTQVVVTP",
    "NAGVTQTPKFQVLKTGQSMTLQCAQDMNHEYMSWYRQDPGMGLRLIHYSVGAGITDQGEVPNGYNVSRSTTEDFPLRLLSAAPSQTSVYFCASRPGLAGGRPEQYFGPGTRLTVTE",
)
RESIDUES = "ACDEFGHIKLMNPQRSTVWXY"


class Fidelity:
    """One pair, its held-out data, and what tuned predicts there."""

    def __init__(self, cache: Path, name: str, windows: int = 8) -> None:
        self.folder = pair(cache, name)
        self.base, self.tuned = self.folder / "base", self.folder / "tuned"
        kinds: dict[str, type[_Model]] = {"smollm2": _Causal, "minilm": _Classifier}
        self._model = kinds.get(name, _Numbering)(cache, self.folder, windows)
        self._target = self._predictions(load_file(_weights(self.tuned)))

    def __call__(self, weights: State | Path) -> dict[str, float]:
        """KL(tuned ‖ weights) and loss."""
        state = load_file(_weights(weights)) if isinstance(weights, Path) else weights
        kl = loss = 0.0
        count = 0
        for (log_p, _), (log_q, labels) in zip(self._target, self._predictions(state), strict=True):
            kl += float((log_p.exp() * (log_p - log_q)).sum())
            loss -= float(log_q.gather(-1, labels[:, None]).sum())
            count += len(labels)
        return {"kl": kl / count, "loss": loss / count}

    def _predictions(self, state: State) -> list[tuple[torch.Tensor, torch.Tensor]]:
        with torch.inference_mode():
            return list(self._model.predict(state))


def _weights(folder: Path) -> Path:
    return folder / "model.safetensors"


class _Model:
    """Something that predicts: log-probabilities (n, classes) and labels (n,), batch by batch."""

    def __init__(self, cache: Path, folder: Path, windows: int) -> None:
        raise NotImplementedError

    def predict(self, state: State) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        raise NotImplementedError


class _Causal(_Model):
    """Next-token predictions of a causal language model on whole windows."""

    def __init__(self, cache: Path, folder: Path, windows: int) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32).eval()
        # The first half of the windows is for calibration.
        ids = load_file(folder / "heldout.safetensors")["ids"]
        self.ids = ids[len(ids) // 2 :][:windows]

    def predict(self, state: State) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        state = {name: value.float() for name, value in state.items()}
        self.model.load_state_dict({**state, "lm_head.weight": state["model.embed_tokens.weight"]})
        for window in self.ids:
            logits = self.model(window[None]).logits[0, :-1]
            yield logits.log_softmax(-1), window[1:]


class _Classifier(_Model):
    """Classes that the fine-tune's head gives to pooled hidden states."""

    def __init__(self, cache: Path, folder: Path, windows: int) -> None:
        from transformers import AutoModel

        self.model = AutoModel.from_pretrained(folder / "base").eval()
        data = load_file(folder / "heldout.safetensors")
        self.ids, self.mask, self.labels = data["ids"], data["mask"], data["labels"]
        self.head = torch.nn.Linear(data["head.weight"].shape[1], data["head.weight"].shape[0])
        self.head.load_state_dict({"weight": data["head.weight"], "bias": data["head.bias"]})

    def predict(self, state: State) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.model.load_state_dict(dict(state), strict=False)
        for rows in torch.arange(len(self.ids)).split(64):
            hidden = self.model(self.ids[rows], attention_mask=self.mask[rows]).last_hidden_state
            mask = self.mask[rows, :, None]
            yield self.head((hidden * mask).sum(1) / mask.sum(1)).log_softmax(-1), self.labels[rows]


class _Numbering(_Model):
    """Numbers that ANARCII's own model gives to residues, each given those that tuned chose before it."""

    def __init__(self, cache: Path, folder: Path, windows: int) -> None:
        module: Any = types.ModuleType("anarcii_model")
        with zipfile.ZipFile(wheel(cache, "anarcii")) as archive:
            exec(archive.read("anarcii/inference/model.py"), module.__dict__)  # noqa: S102 (the package's own code)
        tuned = load_file(folder / "tuned" / "model.safetensors")
        outputs, width = tuned["decoder.fc_out.weight"].shape
        inputs = tuned["encoder.tok_embedding.weight"].shape[0]
        cpu = torch.device("cpu")
        parts = (kind(size, width, 2, 4, 4 * width, 0.0, cpu) for kind, size in
                 ((module.Encoder, inputs), (module.Decoder, outputs)))  # fmt: skip
        self.model = module.S2S(*parts, 0, 0, cpu).eval()
        self.source = torch.nn.utils.rnn.pad_sequence(list(_varied(64)), batch_first=True)
        with torch.inference_mode():
            self.target = self._chosen(tuned)

    def predict(self, state: State) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.model.load_state_dict(dict(state))
        logits = self._logits(self.target[:, :-1])
        labels = self.target[:, 1:]
        # Predictions after the end are nobody's.
        wanted = (labels == 2).cumsum(1) - (labels == 2).int() == 0
        yield logits[wanted].log_softmax(-1), labels[wanted]

    def _chosen(self, tuned: State) -> torch.Tensor:
        self.model.load_state_dict(dict(tuned))
        chosen = self.source[:, :1]
        for _ in range(self.source.shape[1] + 1):
            chosen = torch.cat([chosen, self._logits(chosen)[:, -1:].argmax(-1)], 1)
        return chosen

    def _logits(self, target: torch.Tensor) -> torch.Tensor:
        mask = self.model.make_src_mask(self.source)
        encoded = self.model.encoder(self.source, mask)
        logits: torch.Tensor = self.model.decoder(target, encoded, *self.model.make_trg_mask(target), mask)[0]
        return logits


def _varied(count: int) -> Iterator[torch.Tensor]:
    """Sequences as tokens of ANARCII: <SOS> 1, <EOS> 2, residues from 4 on."""
    generator = torch.Generator().manual_seed(0)
    for number in range(count):
        tokens = torch.tensor([4 + RESIDUES.index(residue) for residue in SEQUENCES[number % len(SEQUENCES)]])
        varied = torch.rand(len(tokens), generator=generator) < 0.1
        tokens[varied] = torch.randint(4, 4 + len(RESIDUES), (int(varied.sum()),), generator=generator)
        yield torch.cat([torch.tensor([1]), tokens, torch.tensor([2])])
