"""An update that is not multiplied out before it reaches the weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .linalg import product


@dataclass(frozen=True)
class Factored:
    """U R + Diag(rows) G Diag(columns), [B, m, n]: to apply it takes a product and a pass over the weights.

    Attributes:
        U, R: [B, m, r] and [B, r, n]; None where there is no such term.
        G: [B, m, n]; None where there is no such term.
        rows: [B, m, 1]; None for ones.
        columns: [B, 1, n] or [B, 1, 1]; None for ones, or where there is no ``G``.
    """

    U: Tensor | None = None
    R: Tensor | None = None
    G: Tensor | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Of the parts that are as large as the matrix, or multiply to one."""
        return {x.dtype for x in (self.U, self.G) if x is not None}

    def times(self, factor: float | Tensor) -> Factored:
        """``factor`` [] or [B, 1, 1] times this: only what is small is multiplied."""
        scaled = replace(self, R=None if self.R is None else self.R * factor)
        if self.G is None:
            return scaled
        columns = torch.ones_like(self.G[:, :1, :1]) if self.columns is None else self.columns
        return replace(scaled, columns=columns * factor)

    def dense(self, turned: bool = False) -> Tensor:
        """A new tensor [B, m, n], in the memory layout of ``G``; without one, by rows or ``turned``, by columns."""
        scaled = None
        if self.G is not None:
            scaled = self.G.clone() if self.columns is None else self.G * self.columns.to(self.G.dtype)
            if self.rows is not None:
                scaled.mul_(self.rows)
        if self.U is None or self.R is None:
            assert scaled is not None
            return scaled
        U, R = self.U, self.R.to(self.U.dtype)
        if scaled is None:
            return product(R.mT, U.mT).mT if turned else product(U, R)
        if scaled.dtype != U.dtype:
            return scaled.add_(product(R.mT, U.mT).mT if turned else product(U, R))
        return scaled[0].addmm_(U[0], R[0]).unsqueeze(0) if len(U) == 1 else scaled.baddbmm_(U, R)

    def expression(self, dtype: torch.dtype) -> Tensor:
        """The same in ``dtype``. torch.compile makes one pass over the weights of all of it but the product."""
        terms = []
        if self.U is not None and self.R is not None:
            terms.append(product(self.U, self.R.to(self.U.dtype)).to(dtype))
        if self.G is not None:
            scaled = self.G.to(dtype)
            for scale in (self.rows, self.columns):
                scaled = scaled if scale is None else scaled * scale
            terms.append(scaled)
        return terms[0] + terms[1] if len(terms) > 1 else terms[0]

    def subtract_from(self, W: Tensor, factor: float | Tensor = 1.0) -> None:
        """W -= factor times this, in place; no tensor of that size comes in between, but for ``rows``. All of W's dtype."""
        if isinstance(factor, Tensor):
            return self.times(factor).subtract_from(W)
        if self.U is not None and self.R is not None:
            W[0].addmm_(self.U[0], self.R[0], alpha=-factor)  # faster than a stack of one
        if self.G is not None:
            G = self.G if self.rows is None else self.G * self.rows
            if self.columns is None:
                W.sub_(G, alpha=factor)
            else:
                W.addcmul_(G, self.columns, value=-factor)
