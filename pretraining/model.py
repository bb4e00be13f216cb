"""The LLaMA that is pretrained: `transformers`' own classes, built from one file of configs/model/.

Nothing here is ours but the choice of numbers, so what the bench saves opens with `transformers` alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from data.errors import UserError

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {  # with the largest that is not a slip of the keyboard
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_hidden_layers": 2**10,
    "num_attention_heads": 2**14,
    "vocab_size": 2**24,
    "max_position_embeddings": 2**24,
}


def check_model(cfg: Mapping[str, Any]) -> None:
    """Refuse shapes that cannot be a LLaMA, naming the key that is wrong."""
    for key, largest in SIZES.items():
        value = cfg.get(key)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= largest:
            raise UserError(f"model.{key} must be a whole number of at least 1 and at most {largest:,}, not {value!r}.")
    hidden, heads = cfg["hidden_size"], cfg["num_attention_heads"]
    if hidden % heads:
        raise UserError(f"model.hidden_size ({hidden}) must be a multiple of model.num_attention_heads ({heads}).")
    if hidden // heads % 2:
        raise UserError(
            f"model.hidden_size / model.num_attention_heads is {hidden // heads}, but rotary position "
            "embeddings turn pairs of coordinates: choose heads that leave an even number each."
        )


def llama_config(cfg: Mapping[str, Any]) -> LlamaConfig:
    """The `transformers` configuration of `cfg.model`: no biases, plain RoPE."""
    from transformers import LlamaConfig

    check_model(cfg)
    options: dict[str, Any] = {key: cfg[key] for key in SIZES}
    options.update(
        rms_norm_eps=cfg["rms_norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": float(cfg["rope_theta"])},
        initializer_range=cfg["initializer_range"],
        tie_word_embeddings=cfg["tie_word_embeddings"],
        attention_bias=False,
        mlp_bias=False,
        attention_dropout=0.0,
        use_cache=False,
        attn_implementation=choose_attention(cfg.get("attn_implementation", "auto")),
        # None while the model is built: with a padding index, `transformers` zeroes that row of the embedding and
        # torch never gives it a gradient, but every matrix here is N(0, initializer_range^2) throughout.
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaConfig(**options)


def choose_attention(name: str, device: torch.device | None = None, length: int = 0) -> str:
    """What "auto" means: on a CPU attention as matrix products for short rows, scaled-dot-product attention elsewhere.

    On two cores the products take a fifth off the step of a small model with rows of 256 tokens (docs/performance.md);
    their memory grows with the square of the length.
    """
    if name != "auto":
        return name
    return "eager" if device is not None and device.type == "cpu" and 0 < length <= 512 else "sdpa"


def build_model(
    cfg: Mapping[str, Any],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    pad_token_id: int | None = None,
    eos_token_id: int | None = None,
    bos_token_id: int | None = None,
) -> LlamaForCausalLM:
    """A freshly initialised model; the draw is a function of `torch.manual_seed`, the shape and the device alone.

    Weights are drawn in float32 and then rounded to `dtype`, as the published code bases do, so a bf16 and a float32
    model of one seed start at the same point. Only parameters are cast: the rotary frequencies are a float32 buffer
    in `transformers`, also after `from_pretrained(dtype=torch.bfloat16)`, and rounding them would move the positions.
    For shapes without memory, pass `device="meta"` or call it inside `with torch.device("meta")`.
    """
    from transformers import LlamaForCausalLM

    if device is None:
        model = LlamaForCausalLM(llama_config(cfg))
    else:
        with torch.device(device):
            model = LlamaForCausalLM(llama_config(cfg))
    if dtype is not None:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        model.config.dtype = dtype
    for config in (model.config, model.generation_config):
        config.pad_token_id, config.eos_token_id, config.bos_token_id = pad_token_id, eos_token_id, bos_token_id
    return model


def hidden_states(model: Any, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
    """What the last layer multiplies, [b, T, h]: the steps of `transformers`' own forward pass, but for its mask.

    It looks for the beginnings of documents in each forward pass, also where there are none, and reads what it finds: a
    GPU's queue would run empty at every micro-batch. Here documents are asked for by ``position_ids``, [b, T], which
    start again at each. For training and evaluation, where nothing is cached or padded on the left.
    """
    net = model.model
    x = net.embed_tokens(input_ids)
    if position_ids is None:
        positions = torch.arange(input_ids.shape[1], device=x.device).unsqueeze(0)
    else:
        positions = position_ids
    eager = model.config._attn_implementation == "eager"
    mask = attention_mask(positions, x.dtype if eager else None) if eager or position_ids is not None else None
    rotary = net.rotary_emb(x, position_ids=positions)
    for layer in net.layers:
        x = layer(x, attention_mask=mask, position_embeddings=rotary, position_ids=positions)
    return net.norm(x)


def attention_mask(position_ids: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Which earlier positions of the same document each position sees: [b, 1, T, T].

    True where it does, for scaled-dot-product attention; with a ``dtype`` 0 there and its lowest number elsewhere, to be
    added to the scores.
    """
    T = position_ids.shape[1]
    document = (position_ids.diff(dim=1, prepend=position_ids[:, :1] - 1) != 1).cumsum(1)
    sees = torch.ones(T, T, dtype=torch.bool, device=position_ids.device).tril()
    sees = (sees & (document.unsqueeze(2) == document.unsqueeze(1))).unsqueeze(1)
    if dtype is None:
        return sees
    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, torch.finfo(dtype).min)


def compile_layers(model: nn.Module) -> None:
    """Let `torch.compile` make each decoder layer anew for the shapes that it meets, in place: names stay as they are.

    Layers are alike, so the first one's code serves all, and the time it takes does not grow with depth. Code is for one
    shape: a smaller last micro-batch has its own, made once. `torch.compiler.set_stance("force_eager")` leaves it out.
    """
    # Under DDP, torch would cut what it compiles where a bucket of gradients ends, to send it early; layers are small enough.
    torch._dynamo.config.optimize_ddp = False
    for layer in model.model.layers:  # type: ignore[union-attr]
        layer.compile(dynamic=False)


def weight_dtype(precision: str) -> torch.dtype:
    """Of weights and gradients, for bf16, bf16_mixed or fp32."""
    return torch.bfloat16 if precision == "bf16" else torch.float32


def parameter_count(model: nn.Module) -> int:
    """Number of trained weights; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())
