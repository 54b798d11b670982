"""Newton: softmax regressions over the same rows, solved side by side, by steps from conjugate gradients.

Several problems (the folds of one setting, say) lie beside each other as columns, so that one product of matrices
serves all of them. What is minimised, for each problem, is ``sum_i w_i loss_i / sum_i w_i + lam / 2 |V|^2``, without
the intercepts in the norm.

How it gets there: one step solves the equations of Newton's method roughly, by conjugate gradients, which need products
of the Hessian alone. These may be rough: where the machine multiplies bfloat16 several times as fast as float32, they
are of rows rounded to bfloat16, while objective and gradient stay in float32, so that what is found doesn't depend on
it. What conjugate gradients need is a good preconditioner: the Hessian is close to ``S x G + lam``, where G is the Gram
matrix of the rows and S the mean of ``diag(p) - p p'``; in the eigenvectors of both it is a diagonal. G is taken from a
few thousand rows, once; S anew at each step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.solvers.rows import Block, Rows

_SAMPLE = 4
"""Rows that the preconditioner is made from, as a multiple of their width: more change nothing that was measured."""
_WIDEST = 4096
"""Numbers a row up to which eigenvectors are worth their time (3 s there); wider rows are scaled one by one."""
_BLOCK_LOGITS = {"cpu": 1 << 19, "cuda": 1 << 27}
"""Logits of a block: on a CPU they stay in its cache between the two products."""
_ROUGH = 0.5
"""How far a step may be from Newton's at first, in the preconditioner's norm; closer steps cost more than they give."""
_POINTS = 3
"""Whose probabilities are there at a time: where a path goes on from, where it stands, and where a step would lead."""
_MOST_PRODUCTS = 60
_HALVINGS = 30
_SHORT = 1 / 16
"""Share of a step below which it was a bad one, which products rounded to bfloat16 may have made it."""
_STRONG, _APART, _NEAR = 1e-3, 30, 1e-2
"""The way to a weak penalty: where it starts, as a share of the largest variance; the ratio of one penalty to the next;
and how near to each solution it leads."""
_DIGITS = 1e-6
"""Share of an objective below which float32 can't tell whether it falls."""
_STILL = 1e-2
"""An objective that falls in a step by less than this share of the tolerance has ended, whatever is expected of it."""


class CentredRows:
    """Rows less their mean, through their scale: kept where twice their size fits, else made again at every pass.

    Attributes:
        mean: ``(F,)`` in the rows' exact type, that is taken off.
        scale: ``(F,)`` of that type, that is divided by.
        basis: ``(F, R)``, the eigenvectors of the Gram matrix as columns, or None where rows are too wide. R is F; of
            fewer rows than numbers a row it is their number, as coefficients lie in the space that the rows span.
        spread: ``(R,)``, the variance along each of them.
        rough: the type that rough products are in.
    """

    def __init__(self, rows: Rows, weights: Tensor, *, standardised: bool, device: torch.device, columns: int) -> None:
        self.rows, self.device = rows, device
        self.mean, self.scale = _mean_and_scale(rows, weights, standardised=standardised)
        self.rough = rough_type(device)
        self._block_rows = int(np.clip(_BLOCK_LOGITS[device.type] // columns, 256, 1 << 16))
        twin = 0.5 if self.rough != torch.float32 else 0.0
        self._kept = rows.kept(device, self._change, copies=1 + twin)
        self._rough = None if self._kept is None else self._kept.to(self.rough)
        self.basis, self.spread = self._decomposed()

    def __len__(self) -> int:
        return len(self.rows)

    def exact(self) -> Iterator[Block]:
        """All rows in float32, block by block."""
        return self._blocks(self._kept, torch.float32)

    def roughly(self) -> Iterator[Block]:
        """All rows in the type of rough products."""
        return self._blocks(self._rough, self.rough)

    def round_no_more(self) -> None:
        """From now on rough products are exact ones."""
        self.rough, self._rough = torch.float32, self._kept

    def turned(self, coefficients: Tensor) -> Tensor:
        """Coefficients ``(R, ...)`` along the eigenvectors, as coefficients of the rows ``(F, ...)``."""
        return coefficients if self.basis is None else self.basis @ coefficients

    def turned_back(self, coefficients: Tensor) -> Tensor:
        """The inverse of `turned`."""
        return coefficients if self.basis is None else self.basis.T @ coefficients

    def _change(self, block: Tensor) -> Tensor:
        return (block - self.mean) / self.scale

    def _blocks(self, kept: Tensor | None, dtype: torch.dtype) -> Iterator[Block]:
        if kept is None:
            for where, block in self.rows.blocks(self.device, self._block_rows, exact=True):
                yield where, self._change(block).to(dtype)
            return
        for start in range(0, len(kept), self._block_rows):
            where = slice(start, min(start + self._block_rows, len(kept)))
            yield where, kept[where]

    def _decomposed(self) -> tuple[Tensor | None, Tensor]:
        if self._kept is not None and len(self) < self.rows.width:
            span, own = torch.linalg.qr(self._kept.T.double())
            spread, vectors = torch.linalg.eigh(own @ own.T / len(self))
            return (span @ vectors).float(), spread.clamp_min(0).float()
        every = max(1, len(self) // (_SAMPLE * self.rows.width))
        source = [(where, self._kept)] if (where := slice(None)) and self._kept is not None else self.exact()
        sample = torch.cat([block[::every] for _, block in source])
        if self.rows.width > _WIDEST:
            return None, sample.square().mean(0)
        gram = (sample.T @ sample) / len(sample)
        spread, basis = torch.linalg.eigh(gram)
        return basis, spread.clamp_min(0)


@dataclass(kw_only=True)
class Point:
    """Where the problems stand: coefficients and all that one pass over the rows says of them.

    Attributes:
        values: ``(P, R + 1, K)``, along the eigenvectors; the last row holds the intercepts.
        losses: ``(P,)`` float64, mean losses without penalty.
        gradients: ``(P, R + 1, K)``, of the mean losses.
        chances: ``(N, P, K)``, the probability of each class; None where they are too many to keep, and are computed
            again for each product.
        spreads: ``(P, K, K)``, the mean of ``diag(p) - p p'``.
    """

    values: Tensor
    losses: Tensor
    gradients: Tensor
    chances: Tensor | None
    spreads: Tensor


class Problems:
    """P softmax regressions over the same rows and labels, each with its own weights of rows.

    Args:
        rows: centred.
        numbers: ``(N,)``, the class of each row.
        num_classes: K.
        weights: ``(N, P)``; a row of weight 0 isn't in that problem.
    """

    def __init__(self, rows: CentredRows, numbers: NDArray[np.int64], num_classes: int, weights: Tensor) -> None:
        self.rows, self.num_classes = rows, num_classes
        self.num_problems = weights.shape[1]
        self._weights = (weights / weights.sum(0)).float()
        self._numbers = torch.from_numpy(numbers).to(rows.device)
        self._keeps_chances = rows.rows.leave_room(rows.device, _POINTS * 4 * weights.numel() * num_classes)

    def start(self) -> Point:
        """All coefficients 0."""
        shape = (self.num_problems, len(self.rows.spread) + 1, self.num_classes)
        return self.at(torch.zeros(shape, device=self.rows.device))

    def at(self, values: Tensor) -> Point:
        """What holds at these coefficients: one pass, two products."""
        device, shape = self.rows.device, (self.num_problems, self.num_classes)
        matrix, intercepts = self._as_matrix(values)
        chances = torch.empty((len(self.rows), *shape), device=device) if self._keeps_chances else None
        losses = torch.zeros(self.num_problems, dtype=torch.float64, device=device)
        gradient, gradient0 = torch.zeros_like(matrix), torch.zeros_like(intercepts)
        spreads = torch.zeros((self.num_problems, self.num_classes, self.num_classes), device=device)
        for where, block in self.rows.exact():
            logits = torch.addmm(intercepts, block, matrix).view(-1, self.num_problems, self.num_classes)
            logs, weights = torch.log_softmax(logits, -1), self._weights[where]
            own = self._numbers[where, None, None].expand(-1, self.num_problems, 1)
            losses -= (logs.gather(-1, own)[..., 0].double() * weights).sum(0)
            chance = torch.exp(logs, out=None if chances is None else chances[where])
            weighted = chance * weights[..., None]
            spreads -= torch.einsum("npk,npl->pkl", weighted, chance)
            spreads.diagonal(dim1=1, dim2=2).add_(weighted.sum(0))
            errors = weighted.scatter_add_(-1, own, -weights[..., None]).flatten(1)
            gradient += block.T @ errors
            gradient0 += errors.sum(0)
        return Point(
            values=values,
            losses=losses,
            gradients=self._as_values(gradient, gradient0),
            chances=chances,
            spreads=spreads,
        )

    def product(self, point: Point, direction: Tensor) -> Tensor:
        """The Hessian of the mean losses at `point` times a direction, roughly: one pass, two rough products."""
        matrix, intercepts = self._as_matrix(direction)
        result, result0 = torch.zeros_like(matrix), torch.zeros_like(intercepts)
        if point.chances is None:  # beside the direction lie the coefficients themselves, in the same product
            at, at0 = self._as_matrix(point.values)
            matrix, intercepts = torch.cat([matrix, at], 1), torch.cat([intercepts, at0])
        rough, width = matrix.to(self.rows.rough), len(result0)
        for where, block in self.rows.roughly():
            both = (block @ rough).float().add_(intercepts)
            change = both[:, :width].view(-1, self.num_problems, self.num_classes)
            if point.chances is None:
                chance = both[:, width:].view(-1, self.num_problems, self.num_classes).softmax(-1)
            else:
                chance = point.chances[where]
            change -= torch.linalg.vecdot(change, chance)[..., None]
            change.mul_(chance).mul_(self._weights[where, :, None])
            errors = change.flatten(1)
            result += block.T @ errors.to(self.rows.rough)
            result0 += errors.sum(0)
        return self._as_values(result, result0)

    def without_coefficients(self) -> Tensor:
        """The least losses ``(P,)`` of intercepts alone: the entropy of each problem's classes."""
        shares = torch.zeros((self.num_classes, self.num_problems), dtype=torch.float64, device=self.rows.device)
        shares.index_add_(0, self._numbers, self._weights.double())
        entropy: Tensor = torch.special.entr(shares).sum(0)
        return entropy

    def chosen(self, point: Point, problem_of: Tensor) -> Tensor:
        """The likeliest class ``(N,)`` of each row, by the problem ``(N,)`` that it is asked of."""
        if point.chances is not None:
            everyone = torch.arange(len(self.rows), device=self.rows.device)
            return point.chances[everyone, problem_of].argmax(1)
        matrix, intercepts = self._as_matrix(point.values)
        found = torch.empty(len(self.rows), dtype=torch.int64, device=self.rows.device)
        for where, block in self.rows.exact():
            logits = torch.addmm(intercepts, block, matrix).view(-1, self.num_problems, self.num_classes)
            everyone = torch.arange(len(block), device=self.rows.device)
            found[where] = logits[everyone, problem_of[where]].argmax(1)
        return found

    def _as_matrix(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Coefficients of the rows ``(F, P K)`` and intercepts ``(P K,)``."""
        along = values.permute(1, 0, 2).flatten(1)
        return self.rows.turned(along[:-1]).contiguous(), along[-1].contiguous()

    def _as_values(self, matrix: Tensor, intercepts: Tensor) -> Tensor:
        along = torch.cat([self.rows.turned_back(matrix), intercepts[None]])
        return along.view(-1, self.num_problems, self.num_classes).permute(1, 0, 2).contiguous()


@dataclass(frozen=True, kw_only=True)
class Solved:
    """Where a solution stands.

    Attributes:
        point: with its coefficients.
        num_iterations: steps that were made.
        num_products: rough products of the Hessian.
        is_converged: whether each problem's objective could fall by no more than the tolerance, or fell no further.
    """

    point: Point
    num_iterations: int
    num_products: int
    is_converged: bool


def minimise(
    problems: Problems, point: Point, penalty: Tensor, *, tol: float, max_iterations: int, of_gain: bool = False
) -> Solved:
    """The least objective of each problem, from `point` on.

    Args:
        problems: to solve.
        point: where to start: the solution for another penalty, or `Problems.start`.
        penalty: ``(P,)`` float32, lam of each.
        tol: ends when the estimate of what an objective could still fall by is at most this share of it, for all.
        max_iterations: most steps.
        of_gain: whether that share is of what the objective lies below the least of intercepts alone. Under a strong
            penalty it is a small part of the objective, and all that tells rows apart.
    """
    first: Tensor | None = None
    alone = problems.without_coefficients() if of_gain else None
    num_products = 0
    for iteration in range(max_iterations + 1):
        gradient, objective = _gradient(point, penalty), _objective(point, penalty)
        conditioner = _Conditioner(problems, point, penalty)
        fall = _dot(gradient, conditioner(gradient))  # about twice what the objective lies above its least
        worth = objective if alone is None else torch.minimum(objective, (alone - objective).clamp_min(0))
        open_ = fall > tol * worth
        if iteration == max_iterations or not bool(open_.any()):
            break
        first = fall if first is None else first
        closeness = (fall / first).clamp_max(1).pow(0.25).clamp_max(_ROUGH)
        step, used = _conjugate(problems, point, penalty, conditioner, -gradient * _wide(open_), closeness)
        num_products += used
        moved, length = _descended(problems, point, penalty, step, objective, _dot(gradient, step))
        if problems.rows.rough != torch.float32 and bool((open_ & (length < _SHORT)).any()):
            problems.rows.round_no_more()
        elif moved is None:
            open_ &= fall > _DIGITS * objective
            break
        elif bool((objective - _objective(moved, penalty) <= _STILL * tol * worth).all()):
            point, open_ = moved, torch.zeros_like(open_)
            break
        point = point if moved is None else moved
    return Solved(point=point, num_iterations=iteration, num_products=num_products, is_converged=not bool(open_.any()))


def approach(problems: Problems, penalty: Tensor, *, max_iterations: int) -> Point:
    """A point near the solutions for `penalty`, by way of those for stronger ones, from which Newton's steps hold.

    From 0 the first step for a weak penalty leads so far off that every class is certain, and no step leads back.
    """
    point = problems.start()
    weakest, strong = float(penalty.min()), _STRONG * float(problems.rows.spread.max())
    several = max(0, math.ceil(math.log(strong / weakest, _APART))) if strong > 0 else 0
    for stronger in reversed(range(1, several + 1)):
        at_once = penalty * float(_APART) ** stronger
        point = minimise(problems, point, at_once, tol=_NEAR, max_iterations=max_iterations).point
    return point


class _Conditioner:
    """The inverse of ``S x G + lam``, the Hessian's better known part."""

    def __init__(self, problems: Problems, point: Point, penalty: Tensor) -> None:
        values, self._vectors = torch.linalg.eigh(point.spreads)
        spread = torch.cat([problems.rows.spread, torch.ones(1, device=penalty.device)])
        lam = penalty[:, None, None].expand(-1, len(spread), 1).clone()
        lam[:, -1] = 0  # intercepts aren't penalised
        diagonal = spread[:, None] * values.clamp_min(1e-12)[:, None] + lam
        diagonal[:, -1, 0] = torch.inf  # adding a number to all intercepts changes nothing
        self._inverse = 1 / diagonal

    def __call__(self, gradient: Tensor) -> Tensor:
        along: Tensor = gradient @ self._vectors * self._inverse
        steered: Tensor = along @ self._vectors.mT
        return steered


def _conjugate(
    problems: Problems, point: Point, penalty: Tensor, conditioner: _Conditioner, residual: Tensor, closeness: Tensor
) -> tuple[Tensor, int]:
    """A step for which the Hessian gives about `residual`, by preconditioned conjugate gradients."""
    step = torch.zeros_like(residual)
    lam = _wide(penalty).expand(-1, residual.shape[1], 1).clone()
    lam[:, -1] = 0
    steered = conditioner(residual)
    direction, size = steered, _dot(residual, steered)
    enough = closeness.square() * size
    running = size > 0
    used = 0
    while used < _MOST_PRODUCTS:
        used += 1
        bent = problems.product(point, direction) + lam * direction
        curvature = _dot(direction, bent)
        running &= curvature > 0
        length = torch.where(running, size / curvature.clamp_min(1e-38), 0)
        step += _wide(length) * direction
        residual = residual - _wide(length) * bent
        steered = conditioner(residual)
        before, size = size, _dot(residual, steered)
        running &= size > enough
        if not bool(running.any()):
            break
        direction = steered + _wide(size / before.clamp_min(1e-38)) * direction
    return step, used


def _descended(
    problems: Problems, point: Point, penalty: Tensor, step: Tensor, objective: Tensor, slope: Tensor
) -> tuple[Point | None, Tensor]:
    """The point at the whole step, or at a half, a quarter ... of it for problems that would not fall enough.

    With it the share of the step that each problem went; no point where none could.
    """
    length = torch.where(slope < 0, torch.ones_like(slope), 0)
    for _ in range(_HALVINGS):
        moved = problems.at(point.values + _wide(length) * step)
        risen = _objective(moved, penalty) > objective + 1e-4 * length * slope + 1e-7 * objective
        if not bool(risen.any()):
            return (moved if bool((length > 0).any()) else None), length
        length = torch.where(risen, length / 2, length)
    return None, torch.zeros_like(length)


def _objective(point: Point, penalty: Tensor) -> Tensor:
    return point.losses + 0.5 * penalty.double() * point.values[:, :-1].double().square().sum((1, 2))


def _gradient(point: Point, penalty: Tensor) -> Tensor:
    gradient = point.gradients.clone()
    gradient[:, :-1] += _wide(penalty) * point.values[:, :-1]
    return gradient


def _dot(first: Tensor, second: Tensor) -> Tensor:
    return (first * second).sum((1, 2))


def _wide(numbers: Tensor) -> Tensor:
    return numbers[:, None, None]


def _mean_and_scale(rows: Rows, weights: Tensor, *, standardised: bool) -> tuple[Tensor, Tensor]:
    """Mean and, where asked for, standard deviation of each column, as StandardScaler has them."""
    sums = torch.zeros((2, rows.width), dtype=torch.float64, device=weights.device)
    shift: Tensor | None = None
    for where, block in rows.blocks(weights.device, exact=True):
        shift = block.double().mean(0) if shift is None else shift
        values = block.double() - shift
        sums[0] += weights[where] @ values
        if standardised:
            sums[1] += weights[where] @ values.square()
    assert shift is not None
    mean, square = sums / weights.sum()
    scale = torch.ones_like(mean)
    if standardised:
        variance = square - mean.square()
        scale = torch.where(variance > 1e-12 * square, variance.clamp_min(0).sqrt(), 1.0)  # a column of one value
    return (mean + shift).to(rows.dtype), scale.to(rows.dtype)


def rough_type(device: torch.device) -> torch.dtype:
    """bfloat16 where the device multiplies it several times as fast as float32 (AMX, tensor cores), else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    told: Any = getattr(torch.cpu, "get_capabilities", dict)()  # newer versions of torch have it
    return torch.bfloat16 if told.get("amx_bf16") else torch.float32
