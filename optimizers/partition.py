"""Which parameter goes to the matrix optimizer and which to Adam, for any model."""

import os
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_OUTPUT = re.compile(  # some at any depth; others, which attention layers use for something else, near the top alone
    r"(?:^|\.)(?:lm_head|embed_out|unembed\w*)\.weight$"
    r"|^(?:\w+\.)?(?:output_projection|output|score|classifier)\.weight$"
)
_WRAPPER = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def partition(
    model: nn.Module,
    last_layer: str = "adam",
    adam_lr: float | Tensor | None = None,
    adam_betas: tuple[float, float] = (0.9, 0.999),
    adam_eps: float = 1e-8,
    *,
    matrices: Sequence[str] = (),
    adam: Sequence[str] = (),
    adam_weight_decay: float = 0.0,
    adam_state_dtype: torch.dtype | str | None = None,
    verbose: bool = True,
) -> list[dict[str, Any]]:
    """Parameter groups: the matrices inside the network, and everything else for Adam.

    As in the paper, the matrix method gets the attention and MLP weights, that is all 2-D parameters with more than one
    row and column but embeddings and the output layer; those, norms and biases go to Adam. The output layer is the one that
    ``get_output_embeddings`` returns, or that is named so, or the only matrix of an embedding's shape outside numbered
    blocks. Frozen parameters are left out, shared ones appear once (an output layer that shares the embedding's weight
    is an embedding). Weights of three dimensions, as experts that are stored together, go to Adam with a warning, unless
    ``matrices`` or ``adam`` say so.

    Args:
        model: any module; wrappers (DDP, torch.compile) are looked through.
        last_layer: "adam" (the paper's starred columns) or "candidate", for the output layer.
        adam_lr: rate of the Adam group; None for the matrices' rate, as the paper probably has it.
        adam_betas, adam_eps, adam_weight_decay, adam_state_dtype: of the Adam group.
        matrices: regular expressions; if there are any, only names that match one are matrices.
        adam: regular expressions of names that go to Adam whatever they are.
        verbose: print what went where (on the first rank only).

    Returns:
        Groups for any optimizer of this package, with names; the second has ``adam=True``.

    Raises:
        ValueError: a pattern that matches nothing, no matrix at all, a shared output layer asked for as candidate.
    """
    if last_layer not in ("adam", "candidate"):
        raise ValueError(f"last_layer = {last_layer!r} is unknown; set it to adam or candidate")
    # a shared weight comes once, under its first name
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    parameters = {_WRAPPER.sub("", name): p for name, p in trainable}
    if len(parameters) < len(trainable):  # a part of the model itself is called like a wrapper
        parameters = dict(trainable)
    embeddings = {
        id(p): p
        for module in model.modules()
        if isinstance(module, nn.Embedding) or "Embedding" in type(module).__name__
        for p in module.parameters(recurse=False)
    }
    output = _output_layer(model, parameters, embeddings)
    if last_layer == "candidate" and output is not None and id(output) in embeddings:
        raise ValueError("the output layer shares its weight with the embedding; set last_layer to adam")

    for pattern in (*matrices, *adam):
        if not any(re.search(pattern, name) for name in parameters):
            raise ValueError(
                f"the pattern {pattern!r} matches no trainable parameter: correct it; the names are like "
                + ", ".join(list(parameters)[:3])
            )

    def is_matrix(name: str, p: Tensor) -> bool:
        if p.ndim != 2 or any(re.search(pattern, name) for pattern in adam):
            return False
        if matrices:
            return any(re.search(pattern, name) for pattern in matrices)
        if name.endswith("bias") or min(p.shape) == 1:  # of experts stored together, a row each; a gate, a magnitude
            return False
        return id(p) not in embeddings and (p is not output or last_layer == "candidate")

    candidate = [(name, p) for name, p in parameters.items() if is_matrix(name, p)]
    others = [(name, p) for name, p in parameters.items() if not is_matrix(name, p)]
    if not candidate:
        raise ValueError("the model has no trainable matrix outside embeddings and output layer; use Adam alone")
    kernels = {id(p) for module in model.modules() if "Conv" in type(module).__name__ for p in module.parameters()}
    stacks = [
        name
        for name, p in others
        if p.ndim == 3 and min(p.shape) > 1 and id(p) not in kernels and not any(re.search(a, name) for a in adam)
    ]
    if stacks and not matrices and os.environ.get("RANK", "0") == "0":
        warnings.warn(
            f"weights of three dimensions ({len(stacks)}, such as {stacks[0]}) go to Adam: make each of their matrices a "
            "parameter of its own if the matrix method is to have them, or name them in adam",
            stacklevel=3,
        )
    groups: list[dict[str, Any]] = [{"params": candidate, "adam": False}]
    if others:
        groups.append(
            {
                "params": others,
                "adam": True,
                "lr": adam_lr,
                "betas": tuple(adam_betas),
                "eps": adam_eps,
                "weight_decay": adam_weight_decay,
                "state_dtype": adam_state_dtype,
            }
        )
    if verbose and os.environ.get("RANK", "0") == "0":
        print(describe(groups))
    return groups


def describe(groups: list[dict[str, Any]]) -> str:
    """Two lines: what the matrix method gets, by shape, and what Adam gets, by name."""
    lines = []
    for adam in (False, True):
        named = [pair for group in groups if bool(group.get("adam")) == adam for pair in _named(group)]
        if not named:
            continue
        total = sum(p.numel() for _, p in named)
        if adam:
            kinds = Counter(name.removesuffix(".weight").split(".")[-1] for name, _ in named)
            what = ", ".join(f"{count} {name}" if count > 1 else name for name, count in kinds.items())
            lines.append(f"Adam:   {len(named):4d} tensors,  {total:13,} parameters ({what})")
        else:
            shapes = Counter("x".join(map(str, p.shape)) for _, p in named)
            what = ", ".join(f"{count} of {shape}" for shape, count in shapes.items())
            lines.append(f"matrix: {len(named):4d} matrices, {total:13,} parameters ({what})")
    return "\n".join(lines)


def _named(group: dict[str, Any]) -> list[tuple[str, Tensor]]:
    params = list(group["params"])
    if params and isinstance(params[0], Tensor):
        return list(zip(group.get("param_names", [""] * len(params)), params, strict=True))
    return params


def _output_layer(
    model: nn.Module, parameters: Mapping[str, Tensor], embeddings: Mapping[int, Tensor]
) -> Tensor | None:
    """The weight of the layer that makes logits: what the model says, else what its name or at last its shape says."""
    for module in model.modules():  # a wrapper has no such method, the model inside it has
        layer = getattr(module, "get_output_embeddings", lambda: None)()
        if layer is not None:
            return getattr(layer, "weight", None)
    named = next((p for name, p in parameters.items() if _OUTPUT.search(name)), None)
    if named is not None:
        return named
    # The only matrix outside numbered blocks that has the shape of an embedding
    shapes = {p.shape for p in embeddings.values() if p.ndim == 2}
    alike = [
        p
        for name, p in parameters.items()
        if p.shape in shapes and id(p) not in embeddings and not re.search(r"(?:^|\.)\d+\.", name)
    ]
    return alike[0] if len(alike) == 1 else None
