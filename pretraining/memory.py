"""What a training step needs of a GPU's memory, from shapes alone: an estimate before anything is bought or rented.

    need = footprint(shape, "alice", precision="bf16", rows=16)
    need.peak, need.activations, need.states, ...             bytes
    largest_micro_batch(24 * 2**30, shape, "alice")           rows that fit, or 0

Formulas and how well they fit what was measured: docs/memory.md. Everything is for one GPU and for the trainer as it is:
`transformers`' LLaMA with scaled-dot-product attention, no recomputation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from data.errors import UserError
from optimizers.base import CHUNK_ENTRIES
from optimizers.memory import RANKS, llama, make, state_bytes

from .loss import CHUNK_TOKENS
from .model import weight_dtype

PRECISIONS = ("bf16", "bf16_mixed", "fp32")
LENGTH = 256
MOST_ROWS = 512  # the paper's batch: a micro-batch need not be larger

# Float32 copies of a stack of matrices that an update holds at its peak, a refresh of bases included: measured with
# torch's memory profiler on the CPU in bf16 and rounded up. Methods whose peak is not proportional to the matrix are
# left out.
STEP_COPIES = {
    "adam": 0,
    "adamw": 0,
    "alice": 10,
    "alice_0": 9,
    "apollo": 7,
    "apollo_mini": 7,
    "apollo_svd": 10,
    "fira": 9,
    "fira_plus": 10,
    "galore": 9,
    "muon": 8,
    "racs": 6,
}

# Allowance for what is not counted: the CUDA context, cuBLAS and cuSOLVER workspaces; holes between blocks of the
# allocator.
CONTEXT_BYTES = 2**30
FRAGMENTATION = 0.05


@dataclass(frozen=True)
class Footprint:
    """Bytes by what they are for.

    Attributes:
        weights, states: of all parameters and of the optimizer.
        gradients: of all parameters; layer-wise, of the largest one.
        activations: kept for the backward pass, autocast's bfloat16 copies of the weights included, without the loss.
        loss: logits and what the loss makes of them, or the last layer's gradient on its way, whichever is more.
        update: temporary memory of the optimizer's step.
        layerwise: gradients are freed inside the backward pass, each as soon as its parameter is updated.
    """

    weights: int
    gradients: int
    states: int
    activations: int
    loss: int
    update: int
    layerwise: bool = False

    @property
    def peak(self) -> int:
        kept = self.weights + self.states
        if self.layerwise:  # updates happen while activations are still there, the first when the logits are gone
            return kept + self.activations + max(self.loss, self.gradients + self.update)
        return kept + self.gradients + max(self.activations + self.loss, self.update)


def footprint(
    shape: Mapping[str, Any],
    optimizer: str,
    *,
    precision: str = "bf16",
    rows: int = 1,
    length: int = LENGTH,
    last_layer: str = "adam",
    rank: int | None = None,
    layerwise: bool = False,
    loss: str = "chunked",
) -> Footprint:
    """Memory of a step of ``rows`` rows of ``length`` tokens for each forward pass, with accumulation.

    Args:
        loss: trainer.loss, full or chunked.

    Raises:
        UserError: an optimizer whose step was not measured.
    """
    if optimizer not in STEP_COPIES:
        raise UserError(
            f"the temporary memory of a step of {optimizer} is unknown: choose one of {', '.join(sorted(STEP_COPIES))}."
        )
    dtype = weight_dtype(precision)
    model = llama(shape, dtype)
    built = make(optimizer, model, last_layer, RANKS.get(shape.get("name", "")) if rank is None else rank)
    sizes = [p.nbytes for p in model.parameters()]

    matrices = Counter(p.shape for group in built.param_groups if not group.get("adam") for p in group["params"])
    per_call = [
        kind.numel() if layerwise else min(count * kind.numel(), max(CHUNK_ENTRIES, kind.numel()))
        for kind, count in matrices.items()
    ]
    return Footprint(
        weights=sum(sizes),
        gradients=max(sizes) if layerwise else sum(sizes),
        states=sum(state_bytes(built)),
        activations=activation_bytes(shape, rows, length, precision),
        loss=loss_bytes(shape, rows, length, precision, loss),
        update=STEP_COPIES[optimizer] * 4 * max(per_call),
        layerwise=layerwise,
    )


def activation_bytes(shape: Mapping[str, Any], rows: int, length: int, precision: str) -> int:
    """What the forward pass keeps for the backward pass besides the weights, up to the last norm's output."""
    h, i, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    heads, mixed = shape["num_attention_heads"], precision == "bf16_mixed"
    b = 4 if precision == "fp32" else 2
    norm = 4 * h + (4 if mixed else b) * h + 4  # x in float32, x normalised, its factor
    inputs = 5 if mixed else 2  # of q, k, v and of gate, up: shared, but autocast casts for each linear layer anew
    attention = 4 * b * h + 4 * heads  # q, k, v, output; a log-sum for each head
    mlp = 4 * b * i  # gate, silu(gate), up, their product
    token = layers * (2 * norm + inputs * b * h + attention + mlp) + norm + b * h
    rotary = 2 * length * (h // heads) * (2 if precision == "bf16" else 4)
    return rows * length * (token + 8) + rotary + (2 * linear_weights(shape) if mixed else 0)


def loss_bytes(shape: Mapping[str, Any], rows: int, length: int, precision: str, loss: str = "chunked") -> int:
    """The most that logits, loss and their gradients take at once, beside the activations."""
    h, vocabulary, tokens = shape["hidden_size"], shape["vocab_size"], rows * length
    b = 4 if precision == "fp32" else 2
    gradient = weight_dtype(precision).itemsize * h * vocabulary  # of the output layer, not yet added to the others
    if loss == "full":  # three float32 tensors lie beside the logits, when the loss ends and when its gradient begins
        logits = b * tokens * vocabulary
        return max(logits + 12 * tokens * vocabulary, 2 * logits + gradient)
    # Logits of a part of the tokens, widened, and their logarithms; the weight's sum in float32 and what a part adds to it;
    # of the tokens, the last layer's inputs that have a target, as they are and as they are multiplied, and their gradient.
    kept, wide = 2 if precision == "bf16" else 4, 4 * h * vocabulary
    part = min(tokens, CHUNK_TOKENS["cuda"]) * vocabulary * (8 if b == 4 else b + 8)
    forward = part + wide + (b * h * vocabulary if b < 4 else 0) + tokens * h * (kept + b + (b if kept > b else 0))
    return max(forward, wide + gradient + tokens * h * (b + 2 * kept))


def linear_weights(shape: Mapping[str, Any]) -> int:
    """Entries of all matrices but the embedding's."""
    h, i = shape["hidden_size"], shape["intermediate_size"]
    return shape["num_hidden_layers"] * (4 * h * h + 3 * h * i) + h * shape["vocab_size"]


def usable(gpu_bytes: int) -> int:
    """What is left of a GPU for tensors, after the allowance."""
    return int(gpu_bytes * (1 - FRAGMENTATION)) - CONTEXT_BYTES


def largest_micro_batch(
    gpu_bytes: int,
    shape: Mapping[str, Any],
    optimizer: str,
    *,
    precision: str = "bf16",
    length: int = LENGTH,
    loss: str = "chunked",
    **options: Any,
) -> int:
    """The largest power of two of rows, at most the paper's batch, whose footprint fits; 0 if one row does not."""
    need = footprint(shape, optimizer, precision=precision, length=length, loss=loss, **options)
    rows = MOST_ROWS
    while rows and with_rows(need, shape, rows, length, precision, loss).peak > usable(gpu_bytes):
        rows //= 2
    return rows


def with_rows(
    need: Footprint, shape: Mapping[str, Any], rows: int, length: int, precision: str, loss: str = "chunked"
) -> Footprint:
    """The same for another micro-batch."""
    return replace(
        need,
        activations=activation_bytes(shape, rows, length, precision),
        loss=loss_bytes(shape, rows, length, precision, loss),
    )
