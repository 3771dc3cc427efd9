"""How kohya's sd-scripts and ComfyUI name the factors of a module (`networks/lora.py`; `comfy/lora.py`,
`comfy/weight_adapter/lora.py`).

    key                                shape                      meaning
    P_M.lora_down.weight               (r, in) or (r, in, k…)     the factor next to the input
    P_M.lora_up.weight                 (out, r) or (out, r, 1…)   the factor next to the output
    P_M.lora_mid.weight                (r, r, k…)                 the kernel in between (Tucker), down then has 1…
    P_M.alpha                          ()                         ΔW = alpha / r · up·down; absent or 0: alpha = r

P is the component (`lora_unet`, `lora_te1`, …) and M the path of the module with `.` written as `_`. That cannot be
undone, so names are looked up in a map that is made from the base's. ComfyUI and diffusers also take paths with their
dots, `diffusion_model.….lora_A.weight`. All keys of one component are named one way.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from lora_compress.model import Model, is_convolution, is_depthwise, is_embedding, module_of

PARTS = {"down": "down", "up": "up", "mid": "mid", "A": "down", "B": "up"}
KEY = re.compile(r"(?P<stem>.+)\.(?:lora[_.](?P<part>down|up|mid|A|B)(?:\.default)?\.weight|alpha)")
FLAT = re.compile(r"(?P<prefix>lora_(?:prior_)?(?:unet|te\d*))_(?P<path>.+)")
PREFIX = re.compile(r"lora_(?:prior_)?(?:unet|te\d*)")
UNET, TEXT = "lora_unet", "lora_te"
# Prefixes of paths with dots, and those that mean the same component.
DOTTED = {
    "diffusion_model": (UNET,),
    "transformer": (UNET,),
    "unet": (UNET,),
    "text_encoder": (TEXT, "lora_te1"),
    "text_encoder_2": ("lora_te2",),
    "text_encoder_3": ("lora_te3",),
}
# Where a checkpoint of a whole pipeline in one file has its components, and what they are called: the first is written.
ROOTS = {
    "model.diffusion_model.": (UNET,),
    "diffusion_model.": (UNET,),
    "cond_stage_model.transformer.": (TEXT, "lora_te1"),
    "conditioner.embedders.0.transformer.": ("lora_te1", TEXT),
    "text_encoders.clip_l.transformer.": ("lora_te1", TEXT),
    "text_encoders.clip_g.transformer.": ("lora_te2",),
    "text_encoders.t5xxl.transformer.": ("lora_te3",),
}
# What else such files hold, by the end of the key.
REFUSED = {
    r"dora_scale": "DoRA rescales the merged weight",
    r"hada_\w+": "LoHa multiplies two low-rank matrices element by element",
    r"lokr_\w+": "LoKr is a Kronecker product",
    r"diff|diff_b": "a whole difference of a weight or bias",
    r"w_norm|b_norm": "the difference of a norm",
    r"oft_\w+|rescale": "OFT rotates the base's weight",
    r"on_input": "IA³ rescales activations",
    r"[ab][12]\.weight|bm\.weight": "GLoRA changes the base's weight by products with it",
    r"reshape_weight": "the base's weight is padded to another shape",
}
ANY_END = re.compile("|".join([r"lora[_.](?:down|up|mid|A|B)(?:\.default)?\.weight", "alpha", *REFUSED]))


@dataclass(frozen=True, slots=True)
class Module:
    """The tensors of one module in a file, by part: `up`, `down`, `mid`, `alpha`."""

    stem: str
    prefix: str
    path: str
    is_flat: bool
    keys: dict[str, str] = field(default_factory=dict)


def module_at(stem: str) -> Module | None:
    """What a key without its end says; None where its beginning is no component's."""
    if match := FLAT.fullmatch(stem):
        return Module(stem, match["prefix"], match["path"], True)
    prefix, _, path = stem.partition(".")
    return Module(stem, prefix, path, False) if prefix in DOTTED and path else None


def is_key(key: str) -> bool:
    """Whether a tensor's name is one of such a file, of a kind that can be read or not."""
    begins = FLAT.match(key) is not None or key.partition(".")[0] in DOTTED
    return begins and any(ANY_END.fullmatch(key, at + 1) for at in range(len(key)) if key[at] == ".")


def stem_of(key: str) -> str | None:
    """The beginning of a factor's or an alpha's key; None for any other."""
    match = KEY.fullmatch(key)
    return match["stem"] if match else None


def part_of(key: str) -> str | None:
    """The part of a module that a key names; None where it is of no kind that can be read."""
    match = KEY.fullmatch(key)
    return match and (PARTS[match["part"]] if match["part"] else "alpha")


def why_refused(key: str) -> str | None:
    """What a key of a known kind that is not low-rank is; None for any other."""
    ends = (key[at + 1 :] for at in range(len(key)) if key[at] == ".")
    return next((reason for end in ends for pattern, reason in REFUSED.items() if re.fullmatch(pattern, end)), None)


class NameMap:
    """The base's weights by the names that such files have for them."""

    def __init__(self, base: Model, prefix: str | None = None) -> None:
        stored = base.checkpoint.tensors()
        self.roots = [root for root in ROOTS if any(tensor.name.startswith(root) for tensor in stored)]
        self.prefix = prefix or component(base)
        self._flat: dict[tuple[str | None, str], list[str]] = {}
        self._dotted: dict[tuple[str | None, str], list[str]] = {}
        self._place: dict[str, tuple[str, str]] = {}
        self._shapes: dict[str, list[int]] = {}
        for tensor in stored:
            module = module_of(tensor.name)
            # A `Conv1D`, stored as (in, out), is unknown to all readers of such files.
            is_linear = len(tensor.shape) == 2 and not base.is_conv1d(tensor.name)
            if module is None or not (is_linear or is_convolution(tensor.name, tensor.shape)):
                continue
            root = next((root for root in self.roots if module.startswith(root)), None if self.roots else "")
            if root is None:
                continue
            path = module.removeprefix(root)
            flat = path.replace(".", "_")
            prefixes: tuple[str | None, ...] = ROOTS[root] if root else (None,)
            for name in prefixes:
                self._flat.setdefault((name, flat), []).append(tensor.name)
                self._dotted.setdefault((name, path), []).append(tensor.name)
            self._shapes[tensor.name] = tensor.shape
            self._place[tensor.name] = prefixes[0] or self.prefix, flat

    def holds(self, prefix: str) -> bool:
        """Whether a checkpoint of a whole pipeline has the component of a prefix, by where its tensors are."""
        meant = DOTTED.get(prefix, (prefix,))
        return any(name in meant for root in self.roots for name in ROOTS[root])

    def find(self, module: Module) -> list[str]:
        """The base's tensors that a module of a file may mean: none, one, or several whose names are flattened
        alike.
        """
        names = self._flat if module.is_flat else self._dotted
        prefixes = (module.prefix,) if module.is_flat else DOTTED[module.prefix]
        keys = [(prefix, module.path) for prefix in prefixes] if self.roots else [(None, module.path)]
        return next((names[key] for key in keys if key in names), [])

    def stem(self, tensor: str) -> str | None:
        """The beginning of the keys of a tensor's factors; None where there is none, or another tensor has the same."""
        if tensor not in self._place or is_embedding(tensor):
            return None
        shape = self._shapes[tensor]
        if len(shape) > 2 and is_depthwise(shape):
            return None
        prefix, flat = self._place[tensor]
        same = self._flat[(prefix if self.roots else None, flat)]
        return f"{prefix}_{flat}" if len(same) == 1 else None


def component(base: Model) -> str:
    """The prefix of a base that is one component, from its configuration.

    UNets and, as ComfyUI has it, every diffusion transformer are `lora_unet`. The text encoder of SD 1 and 2 is
    `lora_te`; SDXL's first is the same model under the name `lora_te1`, which nothing in its files tells.
    """
    if base.architecture == "CLIPTextModel":
        return TEXT
    if base.architecture == "CLIPTextModelWithProjection":
        # SDXL's and SD 3's second encoder is OpenCLIP's bigG, SD 3's first is CLIP's L.
        return "lora_te2" if base.config.get("hidden_size") == 1280 else "lora_te1"
    return "lora_te3" if base.architecture == "T5EncoderModel" else UNET
