"""Orthogonal transforms that spread a vector out: Walsh-Hadamard, Fourier, Haar; and Kronecker products of small matrices.

Each acts on the rows of z [k, M]. The adjoint is written from the same factors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, Protocol

import torch

from hpc_hess.sketch import streams
from hpc_hess.sketch.streams import Use

Preconditioner = Literal["hadamard", "fft", "haar"]


class Transform(Protocol):
    """A linear map of rows and its adjoint."""

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Return the images [k, outputs] of z [k, inputs]."""
        ...

    def adjoint(self, z: torch.Tensor) -> torch.Tensor:
        """Return the images [k, inputs] of z [k, outputs] under the adjoint."""
        ...


class Kronecker:
    """The Kronecker product of small matrices [d_i, b_i], each applied along its own axis.

    ``matrices`` are float64; they are rounded to the data's dtype once.
    """

    def __init__(self, matrices: Sequence[torch.Tensor]) -> None:
        self._matrices = list(matrices)
        self._rounded: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Return the images [k, prod d_i] of z [k, prod b_i]."""
        return self._apply(z, self._of(z))

    def adjoint(self, z: torch.Tensor) -> torch.Tensor:
        """Return the images [k, prod b_i] of z [k, prod d_i]."""
        return self._apply(z, [matrix.T for matrix in self._of(z)])

    def _of(self, z: torch.Tensor) -> list[torch.Tensor]:
        key = z.dtype, z.device
        if key not in self._rounded:
            self._rounded[key] = [matrix.to(dtype=z.dtype, device=z.device) for matrix in self._matrices]
        return self._rounded[key]

    @staticmethod
    def _apply(z: torch.Tensor, matrices: list[torch.Tensor]) -> torch.Tensor:
        sizes = [matrix.shape[1] for matrix in matrices]
        # those that shorten the vector first, those that lengthen it last
        for axis in sorted(range(len(matrices)), key=lambda i: matrices[i].shape[0] / matrices[i].shape[1]):
            lead, trail = len(z) * math.prod(sizes[:axis]), math.prod(sizes[axis + 1 :])
            matrix = matrices[axis]
            if trail == 1:
                z = (z.reshape(lead, sizes[axis]) @ matrix.T).view(len(z), -1)
            else:
                each = matrix.expand(lead, -1, -1)  # matmul would fold these into one product, with a copy
                z = torch.bmm(each, z.reshape(lead, sizes[axis], trail)).view(len(z), -1)
            sizes[axis] = matrix.shape[0]
        return z


class Fourier:
    """The orthonormal real Fourier transform of M (even) entries: real and imaginary parts of the frequencies in turn."""

    def __init__(self, size: int, rows: int) -> None:
        self._size, self._rows = size, rows

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Return the first ``rows`` of the M coefficients."""
        found = torch.view_as_real(torch.fft.rfft(z, norm="ortho"))  # [k, M / 2 + 1, 2]; the first and last are real
        out = found[:, :-1].reshape(len(z), self._size) * math.sqrt(2.0)
        out[:, 0], out[:, 1] = found[:, 0, 0], found[:, -1, 0]
        return out[:, : self._rows]

    def adjoint(self, z: torch.Tensor) -> torch.Tensor:
        """Return the M entries: the inverse, since the whole transform is orthogonal."""
        whole = z.new_zeros((len(z), self._size // 2 + 1, 2))
        whole[:, :-1].view(len(z), self._size)[:, : self._rows] = z / math.sqrt(2.0)
        whole[:, -1, 0] = z[:, 1] if self._rows > 1 else 0.0
        whole[:, 0, 0], whole[:, 0, 1] = z[:, 0], 0.0
        return torch.fft.irfft(torch.view_as_complex(whole), n=self._size, norm="ortho")


def spreading(
    kind: Preconditioner, size: int, rows: int, seed: int, which: int, *, permute: Literal["rows", "columns"] = "rows"
) -> Transform:
    """Return an orthogonal transform of ``size`` (a power of two) entries, of which ``rows`` coefficients are kept.

    ``which`` numbers the transforms of one sketch. Hadamard factors have their rows or columns permuted at random
    (Schioppa 2024, section 3: pi_1 and pi_2 act within the Kronecker factors).
    """
    if kind == "fft":
        return Fourier(size, rows)
    matrices = []
    for number, width in enumerate(factors(size)):
        if kind == "haar":
            matrix = haar(width, width, seed, which << 8 | number)
        else:
            matrix = hadamard(width)
            use = Use.ROWS if permute == "rows" else Use.COLUMNS
            order = streams.permutation(seed, use, [which << 8 | number], width, matrix.device)[0]
            matrix = matrix[order] if permute == "rows" else matrix[:, order]
        matrices.append(matrix)
    left = rows
    for axis in range(len(matrices) - 1, -1, -1):  # the first coordinates: the last factors whole, the first ones cut
        kept = min(left, len(matrices[axis]))
        matrices[axis] = matrices[axis][:kept]
        left //= kept
    return Kronecker(matrices)


def factors(size: int, largest: int = 64) -> list[int]:
    """Return powers of two, at most ``largest`` and as equal as can be, whose product is ``size`` (a power of two)."""
    bits, most = size.bit_length() - 1, largest.bit_length() - 1
    count = max(1, -(-bits // most))
    return [1 << (bits // count + (i < bits % count)) for i in range(count)]


def hadamard(size: int) -> torch.Tensor:
    """Return the orthonormal Walsh-Hadamard matrix of a power of two, float64."""
    matrix = torch.ones((1, 1), dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(size)


def haar(rows: int, columns: int, seed: int, stream: int) -> torch.Tensor:
    """Return the first ``rows`` of a Haar-distributed orthogonal matrix of ``columns`` entries, float64.

    From the QR factors of a Gaussian, with the signs of R's diagonal taken out (Mezzadri, Notices AMS 54, 2007).
    """
    gaussian = streams.normals(seed, Use.HAAR, [stream], columns * rows, torch.float64, torch.device("cpu")).view(
        columns, rows
    )
    q, r = torch.linalg.qr(gaussian)
    return (q * torch.sgn(torch.diagonal(r))).T.contiguous()
