"""Results of the notebook functions: they show themselves, draw on axes, and are kept in a file."""

from __future__ import annotations

import json
import math
import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from hpc_hess.api.showing import Drawn, Shown
from hpc_hess.errors import ConfigError, DataError
from hpc_hess.intake import given
from hpc_hess.linalg import density as densities
from hpc_hess.linalg import measure, quadrature
from hpc_hess.linalg import trace as traces
from hpc_hess.linalg.density import Density
from hpc_hess.linalg.measure import Cumulative, Interval
from hpc_hess.linalg.quadrature import Estimate, Ritz

if TYPE_CHECKING:
    from hpc_hess.studies.figures import Axes

Float = NDArray[np.float64]
Vectors = NDArray[np.floating[Any]]  # in the precision of the operator's vectors
_VERSION = 1
_KEY = "hpc_hess.result"


class Result(Shown):
    """A result of plain numbers and arrays, which are kept in a file."""

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it to a file, an .npz of plain arrays that :func:`load` reads. A file of that name is replaced. Local."""
        place, content = Path(path), dict[str, Any]()
        for each in fields(self):  # type: ignore[arg-type]  # every result is a dataclass
            value = getattr(self, each.name)
            if isinstance(value, list):
                content |= {f"{each.name}.{number}": one for number, one in enumerate(value)}
            elif value is not None:
                content[each.name] = value
        told = json.dumps({"result": type(self).__name__, "version": _VERSION})
        unfinished = place.with_name(f"{place.name}.part")
        try:
            with unfinished.open("wb") as file:
                np.savez(file, **{_KEY: np.array(told), **content})
            unfinished.replace(place)
        finally:
            unfinished.unlink(missing_ok=True)
        return place


def load(path: str | os.PathLike[str]) -> Result:
    """Read a result that :meth:`Result.save` wrote.

    Raises
    ------
    DataError : there is no such file, or it holds something else.

    """
    try:
        with np.load(path, allow_pickle=False) as file:
            content = {name: file[name] for name in file.files} if isinstance(file, np.lib.npyio.NpzFile) else {}
        told = json.loads(str(content.pop(_KEY)))
        kind, version = _RESULTS.get(told["result"]), told["version"]
    except FileNotFoundError as error:
        raise DataError(f"there is no file {path}") from error
    except (OSError, ValueError, KeyError, TypeError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} holds no result that save() wrote, or a damaged one: compute it again") from error
    if kind is None or version != _VERSION:
        raise DataError(
            f"{path} was written by another version of hpc_hess, which read it: version {version}, here {_VERSION}"
        )
    values: dict[str, Any] = {}
    for name, array in content.items():
        stem, _, number = name.partition(".")
        if number:
            values.setdefault(stem, []).append(array)
        else:
            values[stem] = array if array.ndim else array.item()
    return kind(**{each.name: values.get(each.name) for each in fields(kind)})  # type: ignore[arg-type]


def _number(x: float) -> str:
    return f"{x:.4g}"


def _estimate(found: Estimate) -> str:
    return _number(found.mean) + ("" if found.stderr is None else f" ± {found.stderr:.2g}")


def _many(number: int, word: str) -> str:
    return f"{number:,} {word}" + "s" * (number != 1)


@dataclass(frozen=True, repr=False, eq=False)
class Spectrum(Drawn, Result):
    """Quadratures of several probes and what follows from them.

    Attributes
    ----------
    size : the number N of eigenvalues.
    alphas, betas : of the Lanczos matrix T of each probe, float64 (steps,); the last beta is the residual norm.
    matrix : what it is the spectrum of, in words.

    """

    size: int
    alphas: list[Float]
    betas: list[Float]
    matrix: str = "matrix"
    _caption = "Grey: where the smoothed density lies, with 95 % probability at each place. Hatched: more steps would tell."

    @cached_property
    def quadratures(self) -> list[Ritz]:
        """Ritz values, weights and residuals of each probe."""
        return [quadrature.ritz(alpha, beta) for alpha, beta in zip(self.alphas, self.betas, strict=True)]

    @property
    def steps(self) -> int:
        """Lanczos steps of the probe with the fewest: less than asked for after an interrupt or in a small Krylov space."""
        return min(len(alpha) for alpha in self.alphas)

    @property
    def lambda_max(self) -> float:
        """Largest Ritz value of any probe."""
        return max(float(q.values[-1]) for q in self.quadratures)

    @property
    def lambda_min(self) -> float:
        """Smallest Ritz value of any probe."""
        return min(float(q.values[0]) for q in self.quadratures)

    @property
    def residuals(self) -> tuple[float, float]:
        """Bounds of the distances of ``lambda_min`` and ``lambda_max`` to eigenvalues: 0 where they are exact."""
        low, high = (choose(self.quadratures, key=lambda q: q.values[end]) for choose, end in ((min, 0), (max, -1)))
        return float(low.residuals[0]), float(high.residuals[-1])

    @property
    def trace(self) -> Estimate:
        """Trace with its standard error (None for one probe); ``half_width()`` is that of its interval, for any number."""
        return quadrature.trace(self.quadratures, self.size)

    def density(self, *, axis: Literal["linear", "symlog", "log", "chebyshev"] = "linear", **options: Any) -> Density:
        """Return the smoothed spectral density and its width; ``options`` as in linalg.density.

        "log" is over log10 |lambda|; "chebyshev" is linear, by damped Chebyshev moments instead of Gaussians.
        """
        smooth: dict[str, Callable[..., Density]] = {
            "linear": densities.density,
            "symlog": densities.density_symlog,
            "log": densities.density_log,
            "chebyshev": densities.density_chebyshev,
        }
        for name in options.keys() & {"width", "linear", "epsilon"}:
            if options[name] is not None and given.real(name, options[name]) <= 0:
                raise ConfigError(f"{name} = {options[name]!r} is not greater than 0")
        return smooth[given.one_of("axis", axis, smooth)](self.quadratures, **options)

    def cumulative(self, points: Any, *, risk: float = 0.05) -> Cumulative:
        """Return the share of eigenvalues at or below ``points``, with bounds of the truth."""
        places = given.numbers_of("points", points)
        return measure.cumulative(self._recurrences, places, self.size, risk=given.share("risk", risk))

    def mass(self, *, above: float = -math.inf, below: float = math.inf, risk: float = 0.05) -> Interval:
        """Return the share of eigenvalues in [``above``, ``below``], with bounds."""
        if not above < below:
            raise ConfigError(f"above = {above!r} is not less than below = {below!r}")
        return measure.mass(self._recurrences, self.size, above=above, below=below, risk=given.share("risk", risk))

    def wasserstein_bound(self, *, risk: float = 0.05) -> float:
        """Bound W1 between the spectrum and the mean quadrature, in units of the eigenvalues."""
        return measure.wasserstein_a_posteriori(self._recurrences, self.size, risk=given.share("risk", risk))

    @property
    def frobenius_norm(self) -> Estimate:
        """Frobenius norm with its standard error: a probe's second moment is alpha_1^2 + beta_1^2."""
        return traces.Moments([], quadrature.squared_norms(self.quadratures, self.size)).frobenius_estimate

    @property
    def _recurrences(self) -> list[measure.Recurrence]:
        return list(zip(self.alphas, self.betas, strict=True))

    def _lines(self) -> list[str]:
        scale = max(abs(self.lambda_min), abs(self.lambda_max))
        low, high = (f"(residual {r:.2g})" if r > 1e-14 * scale else "(to rounding)" for r in self.residuals)
        probes, steps = _many(len(self.alphas), "probe"), _many(self.steps, "step")
        return [
            f"Spectrum of the {self.matrix}, {_many(self.size, 'eigenvalue')}: {probes} of {steps}",
            f"from {_number(self.lambda_min)} {low} to {_number(self.lambda_max)} {high}",
            f"trace {_estimate(self.trace)}, Frobenius norm {_estimate(self.frobenius_norm)}",
        ]

    def _draw(self, axes: Axes) -> None:
        from hpc_hess.studies import figures

        figures.draw_spectrum(axes, self.quadratures, self.size)


@dataclass(frozen=True, repr=False, eq=False)
class Eigenpairs(Drawn, Result):
    """Eigenvalues ascending, residuals |A u - lambda u|, eigenvectors as rows (pair, N), in the operator's order.

    Attributes
    ----------
    values, residuals : float64 (pair,).
    vectors : (pair, N), in the precision of the operator's vectors.
    converged : all residuals are within the tolerance.
    num_products : what the search took.
    multiplicity_resolved : a search from a new direction has found no eigenvalue that is missing, such as another copy of
        one; where it is False, copies may be missing.
    modules, shares : names of the parameters, or of blocks and other modules where there are many, and the part of
        |u|^2 = 1 that each vector has in them, (pair, module).
    matrix : what they are the eigenpairs of, in words.

    """

    values: Float
    residuals: Float
    vectors: Vectors
    converged: bool
    num_products: int
    multiplicity_resolved: bool
    modules: NDArray[np.str_]
    shares: Float
    matrix: str = "matrix"

    @property
    def _inches(self) -> tuple[float, float]:
        return 7.0, 1.6 + 0.24 * len(self.values)

    def _lines(self) -> list[str]:
        said = "none is missing" if self.multiplicity_resolved else "copies of an eigenvalue may be missing"
        values = [_number(float(value)) for value in self.values]
        shown = ", ".join([*values[:3], "...", *values[-3:]] if len(values) > 7 else values)
        converged = "converged" if self.converged else "not all converged"
        return [
            f"{_many(len(values), 'eigenpair')} of the {self.matrix}: {converged}, {_many(self.num_products, 'product')}",
            shown,
            f"largest residual {self.residuals.max():.2g}; {said}",
        ]

    def _draw(self, axes: Axes) -> None:
        from hpc_hess.studies import figures

        rows = [dict(zip(self.modules.tolist(), row, strict=True)) for row in self.shares.tolist()]
        figures.draw_pairs(axes, self.values.tolist(), rows)


@dataclass(frozen=True, repr=False, eq=False)
class Trace(Result, Estimate):
    """An estimate of the trace: ``mean``, its standard error ``stderr`` (None for one sample), ``count`` samples."""

    matrix: str = field(default="matrix", kw_only=True)

    def _lines(self) -> list[str]:
        half = self.half_width()
        within = "no interval" if half is None else f"within ± {half:.2g} with 95 % probability"
        return [f"Trace of the {self.matrix}", _estimate(self), f"{_many(self.count, 'sample')}, {within}"]


class _Pair(Drawn, Result):
    """A result that can be taken apart into two arrays."""

    def _both(self) -> tuple[Vectors, Vectors]:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Vectors]:
        """Yield both, as in ``values, errors = ...``."""
        return iter(self._both())

    def __getitem__(self, index: int) -> Vectors:
        """Return one of both."""
        return self._both()[index]

    def __len__(self) -> int:
        """Return 2."""
        return 2


@dataclass(frozen=True, repr=False, eq=False)
class Diagonal(_Pair):
    """``values, stderr = diagonal(...)``: the entries and their standard errors, each (N,), in the operator's order.

    ``modules``, ``sums``, ``errors``: of each block or other module the sum of its entries, and the standard error of that.
    """

    values: Vectors
    stderr: Vectors
    num_products: int
    modules: NDArray[np.str_]
    sums: Float
    errors: Float
    matrix: str = "matrix"

    def _both(self) -> tuple[Vectors, Vectors]:
        return self.values, self.stderr

    @property
    def relative_error(self) -> float:
        """What to expect of the relative error in the 2-norm."""
        return float(np.linalg.norm(self.stderr)) / (float(np.linalg.norm(self.values)) or math.inf)

    @property
    def _inches(self) -> tuple[float, float]:
        return 7.0, 1.2 + 0.22 * len(self.modules)

    def _lines(self) -> list[str]:
        return [
            f"Diagonal of the {self.matrix}, {_many(len(self.values), 'entry').replace('entrys', 'entries')}",
            f"from {_number(float(self.values.min()))} to {_number(float(self.values.max()))}",
            f"relative error about {100 * self.relative_error:.2g} % in the 2-norm, {_many(self.num_products, 'product')}",
        ]

    def _draw(self, axes: Axes) -> None:
        from hpc_hess.studies.diagonal.view import draw_bars

        rows = zip(self.modules.tolist(), self.sums.tolist(), self.errors.tolist(), strict=True)
        draw_bars(axes, {name: {"sum": total, "variance": error**2} for name, total, error in rows})


@dataclass(frozen=True, repr=False, eq=False)
class Solution(_Pair):
    """``x, residuals = solve(...)``: the solution (N,), and relative residuals before and after every product, float64."""

    x: Vectors
    residuals: Float
    tolerance: float
    matrix: str = "matrix"

    def _both(self) -> tuple[Vectors, Vectors]:
        return self.x, self.residuals

    @property
    def converged(self) -> bool:
        """Whether the last residual is within the tolerance."""
        return bool(self.residuals[-1] <= self.tolerance)

    def _lines(self) -> list[str]:
        converged = "converged" if self.converged else "not converged"
        return [
            f"Solution with the {self.matrix}: {converged} after {_many(len(self.residuals) - 1, 'product')}",
            f"relative residual {self.residuals[-1]:.2g}, tolerance {self.tolerance:.2g}",
            f"|x| = {_number(float(np.linalg.norm(self.x)))}",
        ]

    def _draw(self, axes: Axes) -> None:
        from hpc_hess.studies import figures

        figures.draw_residuals(axes, self.residuals, self.tolerance)


_RESULTS: dict[str, type[Result]] = {each.__name__: each for each in (Spectrum, Eigenpairs, Trace, Diagonal, Solution)}
