"""Block-wise dynamic 8-bit codes for optimizer states (Dettmers et al. 2022, arXiv 2110.02861).

A state is cut into blocks of 256 entries; each block keeps its largest magnitude in float32 and, for every entry, the
index of the nearest of 256 fixed values in [-1, 1] (signed states) or [0, 1]. The values are dense near 0: the number of
leading zeros of an index is a decimal exponent, the rest a linear fraction.
"""

import math
from functools import cache

import torch
from torch import Tensor

BLOCK = 256
_EXPONENTS = 7


@cache
def _values(signed: bool) -> Tensor:
    """The 256 code values in ascending order, float64 on the CPU: 0, 1, and 7 decades of bin centres of [0.1, 1]."""
    decades = []
    for i in range(_EXPONENTS):
        bins = 2 ** (i if signed else i + 1)
        edges = torch.linspace(0.1, 1, bins + 1, dtype=torch.float64, device="cpu")
        decades.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (i + 1 - _EXPONENTS))
    positive = torch.cat(decades)
    parts = [positive, torch.tensor([0.0, 1.0], dtype=torch.float64, device="cpu")]
    return torch.cat([*parts, -positive] if signed else parts).sort().values


@cache
def _values_on(device: torch.device, signed: bool) -> Tensor:
    """The same in float32 on a device; kept, since a GPU would be sent them for every state in every step."""
    return _values(signed).to(device, torch.float32)


@cache
def _code_of_0(signed: bool) -> int:
    return _values(signed).tolist().index(0.0)


def new_codes(shape: torch.Size | tuple[int, ...], signed: bool) -> tuple[Tensor, Tensor]:
    """Codes and block maxima of a state that is 0, on the default device."""
    blocks = math.ceil(math.prod(shape) / BLOCK)
    return torch.full(shape, _code_of_0(signed), dtype=torch.uint8), torch.zeros(blocks, dtype=torch.float32)


def quantize(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Codes (uint8, the shape of ``x``) and the maximum of each block (float32, [number of blocks])."""
    flat = torch.nn.functional.pad(x.float().flatten(), (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    absmax = flat.abs().amax(dim=1)
    values = _values_on(flat.device, signed)
    middles = (values[1:] + values[:-1]) / 2
    tiny = torch.finfo(torch.float32).tiny
    codes = torch.bucketize((flat / absmax.clamp_min(tiny).unsqueeze(1)).contiguous(), middles)
    return codes.to(torch.uint8).flatten()[: x.numel()].view(x.shape), absmax


def dequantize(codes: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """The float32 state that the codes stand for."""
    values = _values_on(codes.device, signed)[codes.int()]
    return values * absmax.repeat_interleave(BLOCK)[: codes.numel()].view(codes.shape)
