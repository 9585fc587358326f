"""Attention in chunks: values, tangents and their pulls against elementary operations in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from hpc_hess.model.blocks import attention_chunks
from hpc_hess.model.blocks.attention import Mask, attention, elementary

QUERIES = 23
PLACES = torch.arange(QUERIES)
BEHIND = PLACES[:, None] - PLACES[None]
KINDS = ["full", "causal", "window", "alibi", "left padding", "left padding, added"]
FORMS = [(None, False), (1.5, False), (None, True), (1.5, True)]
Several = tuple[torch.Tensor, ...]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention_chunks.CHUNK_ENTRIES, "cpu", 1)
    monkeypatch.setattr(attention_chunks, "_LEAST_ROWS", 5)  # the last chunk is shorter


def _mask(kind: str) -> Mask:
    if kind == "full":
        return Mask()
    if kind == "causal":
        return Mask(causal=True)
    if kind == "window":
        return Mask.of((BEHIND >= 0) & (BEHIND < 5), False)
    if kind == "alibi":
        bias = -0.3 * BEHIND.double() * torch.tensor([1.0, 0.5, 0.2, 0.1])[:, None, None]
        return Mask.of(bias.masked_fill(BEHIND < 0, -torch.inf)[None], False)
    seen = torch.ones(3, 1, 1, QUERIES, dtype=torch.bool)
    seen[1, ..., :4] = False  # some queries see nothing
    seen = seen & (BEHIND >= 0)
    if kind == "left padding":
        return Mask.of(seen, False)
    return Mask(bias=torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, torch.finfo(torch.float64).min))


def _functions(kind: str, cap: float | None) -> list[Callable[..., torch.Tensor]]:
    """Ours, and elementary operations."""
    mask = _mask(kind)
    return [lambda q, k, v, s=None, f=f: f(q, k, v, mask, 0.4, cap, s) for f in (attention, elementary)]


def _draw(*leading: int, sinks: bool, seed: int = 0) -> Several:
    """Four heads of queries, two of keys; keys and values of different size."""
    shapes = [(3, 4, QUERIES, 4), (3, 2, QUERIES, 4), (3, 2, QUERIES, 6), *([(4,)] if sinks else [])]
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(*leading, *s, dtype=torch.float64, generator=generator) for s in shapes)


def _bars(*leading: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*leading, 3, 4, QUERIES, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _compare(found: Any, right: Any) -> None:
    found, right = torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(right)
    for ours, theirs in zip(found, right, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("directions", ["one", "several", "several, one cotangent"])
@pytest.mark.parametrize(("cap", "sinks"), FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_elementary_operations(kind: str, cap: float | None, sinks: bool, directions: str) -> None:
    """Value, tangent, and the pull of both: the Hessian by q, k, v and sinks times a direction."""
    leading = () if directions == "one" else (3,)
    x, dots, bars = _draw(sinks=sinks), _draw(*leading, sinks=sinks, seed=2), _bars(*leading)
    dot_bar = _bars(*(leading if directions == "several" else ()), seed=3)

    def products(f: Callable[..., torch.Tensor]) -> Any:
        def one(dots: Several, bars: torch.Tensor, dot_bar: torch.Tensor) -> Any:
            (y, y_dot), pull = vjp(lambda x, x_dot: jvp(f, x, x_dot), x, dots)
            return y, y_dot, pull((bars, dot_bar))

        if not leading:
            return one(dots, bars, dot_bar)
        return vmap(one, in_dims=(0, 0, 0 if directions == "several" else None))(dots, bars, dot_bar)

    ours, theirs = _functions(kind, cap)
    _compare(products(ours), products(theirs))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("cap", "sinks"), FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_double_backward(kind: str, cap: float | None, sinks: bool) -> None:
    x, bar, along = ([t.requires_grad_() for t in _draw(sinks=sinks)], _bars().requires_grad_(), _draw(sinks=sinks, seed=2))

    def twice(f: Callable[..., torch.Tensor]) -> Any:
        bars = torch.autograd.grad(f(*x), x, bar, create_graph=True)
        return bars, torch.autograd.grad(bars, [*x, bar], along)

    ours, theirs = _functions(kind, cap)
    _compare(twice(ours), twice(theirs))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("gauss_newton_directions", [1, 3])
def test_gradients_under_vmap_share_what_is_the_same(gauss_newton_directions: int) -> None:
    x, bars = _draw(sinks=True), _bars(gauss_newton_directions)
    ours, theirs = ((lambda bar, f=f: vjp(f, *x)[1](bar)) for f in _functions("left padding", 1.5))
    _compare(vmap(ours)(bars), vmap(theirs)(bars))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("kind", ["causal", "alibi", "left padding"])
def test_what_is_differentiated_may_differ_under_vmap(kind: str) -> None:
    x, dots, bars = _draw(2, sinks=True), _draw(2, sinks=True, seed=2), _bars(2)

    def product(f: Callable[..., torch.Tensor]) -> Any:
        def one(x: Several, dots: Several, bars: torch.Tensor) -> Any:
            found, pull = vjp(lambda x, x_dot: jvp(f, x, x_dot), x, dots)
            return found, pull((bars, bars))

        return vmap(one)(x, dots, bars)

    ours, theirs = _functions(kind, None)
    _compare(product(ours), product(theirs))


@pytest.mark.parametrize("shape", [(QUERIES, 4), (2, QUERIES, 4), (2, 3, 2, QUERIES, 4)])
@pytest.mark.parametrize("kind", ["causal", "window"])
def test_any_number_of_leading_dimensions(shape: tuple[int, ...], kind: str) -> None:
    q, k, v = (torch.randn(shape, dtype=torch.float64) for _ in range(3))
    _compare(attention(q, k, v, _mask(kind)), elementary(q, k, v, _mask(kind)))


def test_half_precision_is_as_near_as_elementary_operations() -> None:
    exact, (x, bars) = _functions("causal", None), (_draw(sinks=False), _bars())
    right = vjp(exact[1], *x)[1](bars)
    rough = [vjp(f, *(t.bfloat16() for t in x))[1](bars.bfloat16()) for f in exact]
    ours, theirs = ([float((f - r).norm() / r.norm()) for f, r in zip(found, right, strict=True)] for found in rough)
    assert all(o < 1.2 * t for o, t in zip(ours, theirs, strict=True)), (ours, theirs)


def test_keys_that_no_query_of_a_chunk_sees_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(attention_chunks.CHUNK_ENTRIES, "cpu", 1)
    monkeypatch.setattr(attention_chunks, "_LEAST_ROWS", 8)
    seen: list[slice] = []
    part = attention_chunks._Part.__init__

    def noting(self: Any, *args: Any) -> None:
        seen.append(args[-1])
        part(self, *args)

    monkeypatch.setattr(attention_chunks._Part, "__init__", noting)
    q = torch.randn(1, 1, QUERIES, 4)
    for kind, spans in {"causal": [(0, 8), (0, 16), (0, 23)], "window": [(0, 8), (4, 16), (12, 23)]}.items():
        seen.clear()
        attention(q, q, q, _mask(kind))
        assert [(s.start, s.stop) for s in seen] == spans


def test_a_mask_that_is_differentiated_keeps_elementary_operations() -> None:
    bias = torch.zeros(1, 1, 6, 6, requires_grad=True)
    q = torch.randn(1, 1, 6, 2)
    attention(q, q, q, Mask.of(bias, False)).sum().backward()
    assert bias.grad is not None
    _, dot = jvp(lambda b: attention(q, q, q, Mask.of(b, False)), (bias.detach(),), (torch.randn(1, 1, 6, 6),))
    assert bool(dot.any())


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_products_can_be_traced(kind: str, directions: int) -> None:
    """make_fx of the tangent, its pull, and both under vmap: plain operations, the right numbers for other inputs."""
    ours, theirs = _functions(kind, 1.5)

    def product(f: Callable[..., torch.Tensor]) -> Callable[..., Any]:
        def one(dots: Several, bars: torch.Tensor, x: Several, dot_bar: torch.Tensor) -> Any:
            pushed = jvp(f, x, dots)
            _, pull = vjp(lambda x, x_dot: jvp(f, x, x_dot), x, dots)
            return pushed, pull((bars, dot_bar)), vjp(f, *x)[1](bars)

        return one if directions == 1 else vmap(one, in_dims=(0, 0, None, None))

    def inputs(seed: int) -> Any:
        leading = () if directions == 1 else (directions,)
        dots, bars = _draw(*leading, sinks=True, seed=seed), _bars(*leading, seed=seed + 1)
        return dots, bars, _draw(sinks=True, seed=seed + 2), _bars(seed=seed + 3)

    with torch.no_grad():
        graph = make_fx(product(ours))(*inputs(10))
        _compare(graph(*inputs(20)), product(theirs)(*inputs(20)))


@pytest.mark.usefixtures("small_chunks")
def test_plans_trace_it_without_numbers() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        q = torch.empty(2, 4, QUERIES, 4)
        found = attention(q, q, q, Mask.of(torch.ones(2, 1, QUERIES, QUERIES, dtype=torch.bool), False))
    assert found.shape == q.shape
