"""Bytes of weights and optimizer states, from shapes alone.

    gib("alice", shape, last_layer="candidate")                       what our optimizers allocate, dtype by dtype
    gib("alice", shape, last_layer="candidate", convention="paper")   a cell of Table 3 as it is printed

``shape`` is a mapping with the keys of configs/model/. Activations and gradients are not in here.
"""

import inspect
import math
from collections import Counter
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from .base import MatrixOptimizer
from .combined import Combined
from .libraries import AdamW
from .sharding import local

CONVENTIONS = ("exact", "paper")

# r of each size: Tables 7 and 11, Table 4's for 7B, a quarter of the hidden size for the proxies.
RANKS = {
    "llama_tiny": 64,
    "llama_tiny_4k": 32,
    "llama_60m": 128,
    "llama_130m": 256,
    "llama_350m": 256,
    "llama_1b": 512,
    "llama_7b": 256,
}


# The paper's formulas ---------------------------------------------------------------------------------------------


def _low_rank(m: int, n: int, r: int) -> int:
    """U [m, r] and two moments [r, n]."""
    return m * r + 2 * n * r


# Tables 1 and 6 less the weight itself: elements kept for one matrix m <= n in BF16, and in FP32. That p and Q~ of
# Alice take four bytes is not said in the paper, but no other reading gives its Table 3.
PAPER_STATES: dict[str, Callable[[int, int, int], tuple[int, int]]] = {
    "adam": lambda m, n, r: (2 * m * n, 0),
    "muon": lambda m, n, r: (m * n, 0),
    "galore": lambda m, n, r: (_low_rank(m, n, r), 0),
    "fira": lambda m, n, r: (_low_rank(m, n, r), 0),
    "apollo": lambda m, n, r: (2 * n * r, 0),  # U comes from a seed
    "apollo_mini": lambda m, n, r: (2 * n + 2, 0),
    "apollo_svd": lambda m, n, r: (_low_rank(m, n, r), 0),
    "racs": lambda m, n, r: (m + n + 1, 0),
    "alice_0": lambda m, n, r: (_low_rank(m, n, r), n),
    "alice": lambda m, n, r: (_low_rank(m, n, r), n + r * r),
}


def paper_bytes(optimizer: str, shape: Mapping[str, Any], last_layer: str = "adam", rank: int | None = None) -> int:
    """Weights and states as the paper counts them (App. F.4; deduced from the 48 printed cells of its Table 3).

    Two bytes for each number; p and Q~ of Alice four; norm gains left out; the weights, and those of them that Adam
    updates, each floored to whole millions before they are multiplied.

    Raises:
        ValueError: a method for which the paper has no formula.
    """
    if optimizer not in PAPER_STATES:
        raise ValueError(
            f"the paper has no memory formula for {optimizer}; use the exact convention, or one of "
            + ", ".join(PAPER_STATES)
        )
    _check_last_layer(last_layer)
    r = _rank(shape, rank)
    if r is None:
        raise ValueError(f"no rank is known for {shape.get('name') or 'this model'}; give one")
    matrices = {name: p for name, p in llama(shape).named_parameters() if p.ndim == 2}
    weights = sum(p.numel() for p in matrices.values())
    candidate = [] if optimizer == "adam" else [p for name, p in matrices.items() if _is_candidate(name, last_layer)]
    others = weights - sum(p.numel() for p in candidate)

    low = full = 0
    for p in candidate:
        elements = PAPER_STATES[optimizer](min(p.shape), max(p.shape), r)
        low, full = low + elements[0], full + elements[1]
    million = 10**6
    return 2 * (weights // million * million) + 2 * 2 * (others // million * million) + 2 * low + 4 * full


def _is_candidate(name: str, last_layer: str) -> bool:
    return "embed" not in name and ("lm_head" not in name or last_layer == "candidate")


# What is allocated ------------------------------------------------------------------------------------------------


def exact_bytes(
    optimizer: str,
    shape: Mapping[str, Any],
    last_layer: str = "adam",
    rank: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> int:
    """Bytes of weights in ``dtype`` and of the states that our optimizer keeps for them, after its first step.

    Raises:
        ValueError: an unknown method, one without states of its own (``any``), or a package that is not installed.
    """
    model = llama(shape, dtype)
    return sum(p.nbytes for p in model.parameters()) + sum(
        state_bytes(make(optimizer, model, last_layer, _rank(shape, rank)))
    )


def make(optimizer: str, model: nn.Module, last_layer: str = "adam", rank: int | None = None) -> torch.optim.Optimizer:
    """``create`` with what decides about memory; other hyper-parameters are the defaults.

    Args:
        optimizer: a config name.
        model: any module, on any device.
        last_layer: "adam" | "candidate".
        rank: r, for methods that have one; None for their own default. Apollo-mini has rank 1.
    """
    from .factory import METHODS, create

    if optimizer == "any":
        raise ValueError("any stands for a class of yours, whose states are unknown here; name another optimizer")
    if optimizer not in METHODS:
        raise ValueError(f"no optimizer is called {optimizer!r}; choose one of {', '.join(sorted(METHODS))}")
    build, preset = METHODS[optimizer]
    parameters = inspect.signature(build).parameters
    options: dict[str, Any] = {}
    if rank is not None and "rank" in parameters and "rank" not in preset:
        options["rank"] = rank
        if "leading" in parameters:  # at most r; of no consequence for memory
            options["leading"] = min(parameters["leading"].default, rank)
    return create(optimizer, model, last_layer=last_layer, verbose=False, **options)


def state_bytes(optimizer: torch.optim.Optimizer) -> list[int]:
    """Bytes that the states of each parameter group take once every parameter has been updated.

    Nothing is allocated, and a meta-device model will do. Counters kept as Python numbers count nothing.

    Raises:
        ValueError: an optimizer class that this function does not know.
    """
    if isinstance(optimizer, Combined):
        return [size for part in optimizer.optimizers for size in state_bytes(part)]
    return [_group_bytes(optimizer, group) for group in optimizer.param_groups]


def _group_bytes(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> int:
    if isinstance(optimizer, MatrixOptimizer):
        kinds = Counter((p.shape, p.dtype) for p in group["params"])  # a network has many matrices of few kinds
        total = 0
        for (shape, dtype), count in kinds.items():
            state = optimizer.new_state(torch.empty(shape, dtype=dtype, device="meta"), group)
            total += count * sum(value.nbytes for value in state.values() if isinstance(value, Tensor))
        return total
    kind = torch.optim.AdamW if isinstance(optimizer, AdamW) else type(optimizer)
    formula = _LIBRARY.get(f"{kind.__module__.split('.')[0]}.{kind.__name__}")
    if formula is None:
        raise ValueError(
            f"the states of {type(optimizer).__name__} are unknown before its first step; measure them then"
        )
    total = sum(formula(p, group) for p in group["params"])
    coded = formula is _eight_bit and any(p.numel() >= 4096 for p in group["params"])
    return total + (2 * 256 * 4 if coded else 0)  # two tables that all codes share


def _adam_mini(p: Tensor, group: dict[str, Any]) -> int:
    """The first moment, and a float32 number for each head of query and key, row of other matrices, or norm."""
    query_or_key = any(word in group["name"] for word in ("q_proj", "k_proj"))
    blocks = p.numel() // group["head_numel"] if query_or_key else p.shape[0] if p.ndim == 2 else 1
    return p.nbytes + 4 * blocks


def _eight_bit(p: Tensor, group: dict[str, Any]) -> int:
    """bitsandbytes: two codes, two maxima for each block of 256; small tensors in float32."""
    return 2 * p.numel() + 8 * math.ceil(p.numel() / 256) if p.numel() >= 4096 else 8 * p.numel()


# Bytes of what library classes keep for one parameter
_LIBRARY: dict[str, Callable[[Tensor, dict[str, Any]], int]] = {
    "torch.Adam": lambda p, group: 2 * p.nbytes + 4,  # the counter is a float32 tensor
    "torch.AdamW": lambda p, group: 2 * p.nbytes + 4,
    "torch.Muon": lambda p, group: p.nbytes,
    "torch.SGD": lambda p, group: p.nbytes if group["momentum"] else 0,
    "pytorch_optimizer.Lion": lambda p, group: p.nbytes,
    "pytorch_optimizer.SignSGD": lambda p, group: p.nbytes if group["momentum"] else 0,
    "transformers.Adafactor": lambda p, group: (
        4 * (sum(p.shape) + 1 + (p.numel() if group["beta1"] is not None else 0))
    ),
    "adam_mini.Adam_mini": _adam_mini,
    "bitsandbytes.AdamW8bit": _eight_bit,
}


def measured_state_bytes(
    optimizer: torch.optim.Optimizer, of: Callable[[Tensor, Tensor], bool] = lambda p, x: True
) -> int:
    """Bytes of the states that exist now on this rank; what several parameters share counts once.

    Args:
        of: whether a state of a parameter counts.
    """
    states = [(p, x) for p, state in optimizer.state.items() for x in state.values() if isinstance(x, Tensor)]
    tensors = [local(x) for p, x in states if of(p, x)]
    return sum({v.data_ptr() or id(v): v.nbytes for v in tensors}.values())


# Both conventions -------------------------------------------------------------------------------------------------


def gib(
    optimizer: str,
    shape: Mapping[str, Any],
    last_layer: str = "adam",
    convention: str = "exact",
    rank: int | None = None,
) -> float:
    """GiB (2^30 bytes) of BF16 weights and states; in the paper's convention rounded to 0.01, as Table 3 prints them."""
    if convention == "paper":
        return round(paper_bytes(optimizer, shape, last_layer, rank) / 2**30, 2)
    if convention != "exact":
        raise ValueError(f"convention = {convention!r} is unknown; set it to {' or '.join(CONVENTIONS)}")
    return exact_bytes(optimizer, shape, last_layer, rank) / 2**30


def llama(
    shape: Mapping[str, Any], dtype: torch.dtype = torch.bfloat16, device: torch.device | str = "meta"
) -> nn.Module:
    """The parameters of a LLaMA by their names in `transformers`, which is not needed; nothing can be computed with it."""
    h, i, vocabulary = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]

    def linear(rows: int, columns: int) -> nn.Module:
        return _module(weight=torch.empty(rows, columns, dtype=dtype, device=device))

    def norm() -> nn.Module:
        return _module(weight=torch.empty(h, dtype=dtype, device=device))

    layers = [
        _module(
            self_attn=_module(**{f"{x}_proj": linear(h, h) for x in "qkvo"}),
            mlp=_module(gate_proj=linear(i, h), up_proj=linear(i, h), down_proj=linear(h, i)),
            input_layernorm=norm(),
            post_attention_layernorm=norm(),
        )
        for _ in range(shape["num_hidden_layers"])
    ]
    embedding = nn.Embedding(vocabulary, h, _weight=torch.empty(vocabulary, h, dtype=dtype, device=device))
    model = _module(model=_module(embed_tokens=embedding, layers=nn.ModuleList(layers), norm=norm()))
    if not shape.get("tie_word_embeddings"):
        model.lm_head = linear(vocabulary, h)
    model.config = SimpleNamespace(hidden_size=h, num_attention_heads=shape["num_attention_heads"])  # type: ignore[assignment]
    return model


def _module(**parts: Any) -> nn.Module:
    module = nn.Module()
    for name, part in parts.items():
        setattr(module, name, nn.Parameter(part) if isinstance(part, Tensor) else part)
    return module


def _rank(shape: Mapping[str, Any], rank: int | None) -> int | None:
    return RANKS.get(shape.get("name", "")) if rank is None else rank


def _check_last_layer(last_layer: str) -> None:
    if last_layer not in ("adam", "candidate"):
        raise ValueError(f"last_layer = {last_layer!r} is unknown; set it to adam or candidate")
