"""Levels of linear layers' weights: their database, and the places of a search.

A database holds every level's weight as it is multiplied by, so that a search tries levels without solving again
(EvoPress, Sieberling et al. 2024, section 3). With a folder the weights lie in files, one for each layer, that are
mapped into memory; a database that was stopped goes on, and one that is complete is used again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
import torch.utils._pytree as pytree
from safetensors.torch import save

from ...ir.errors import ImportModelError, InputError
from ...ir.files import write_atomically
from ...ir.program import Program
from ...ir.safetensors_index import read_header
from ...ir.weights import Weight
from ..base import Context
from .consumers import with_weight_matrix
from .levels import Level, Place
from .linear_correction import that_save
from .linear_sites import LinearSite, linear_sites
from .linear_solve import Solved, counted_bytes, counted_params, solve
from .linear_texts import BITS_METHODS, SPARSE_METHODS, Bits, LinearLevel, LowRank, Sparse, for_plan
from .local.factorize import rank_for

MODES = ("sparsity", "bits", "rank")


@dataclass(frozen=True)
class LinearSettings:
    """Which levels there are.

    Attributes:
        method: how a level is solved, out of `SPARSE_METHODS` or `BITS_METHODS`; None: the first of them.
        goal: what all layers together are to save; where that is nothing there are no levels. sparsity: one more level
            of each saves the share that all would save alike, which is what a search has to beat. None: not known.
        step: sparsity: how many numbers each level saves more than the one before, the same for all layers, so that
            one layer's step up pays for another's step down. None: such that the layer that can save most has ``steps``
            levels.
        steps: sparsity: levels of that layer besides the untouched one, where ``step`` is not given.
        floor: sparsity: the share of a layer's weights that stays at least.
        bits: bits: the levels.
        group: bits: columns that share a scale and a zero point; None: whole rows.
        kappa: rank: how many times as many coefficients as each output keeps there are; 1 for a dense factor.
        share: rank: the share of a layer that each level removes more than the one before.
        most: rank: the share that the last level removes.
        correction: sparsity and bits: rank of the maps beside every changed weight, which count; 0 for none.
    """

    method: str | None = None
    goal: float | None = None
    step: int | None = None
    steps: int = 16
    floor: float = 0.1
    bits: tuple[int, ...] = (8, 4, 3, 2)
    group: int | None = 64
    kappa: float = 1.0
    share: float = 0.05
    most: float = 0.7
    correction: int = 0


Database = dict[int, dict[LinearLevel, tuple[Weight | None, float | None]]]
"""For each site, by its index, and each of its levels: the weight (None where it was not asked for) and its error."""


def linear_places(
    program: Program,
    ctx: Context,
    mode: str,
    settings: LinearSettings | None = None,
    *,
    weights: bool = True,
    folder: Path | None = None,
) -> tuple[list[Place], dict[str, int]]:
    """The weights of linear layers as places of a search.

    What a level costs is counted in parameters (``sparsity``: nonzeros; ``rank``: the numbers in both factors that are
    used) or in bytes (``bits``: codes, scales and zero points), with the maps of a correction. A level's label is what
    a plan holds.

    Args:
        program: the program.
        ctx: calibration data.
        mode: one of `MODES`.
        settings: which levels.
        weights: whether levels hold their weights, so that they can be tried; errors and costs are there anyway.
        folder: where the weights are kept in files; None: in memory.

    Returns:
        The places in graph order, and why other layers are none, with counts.

    Raises:
        InputError: a mode or method that does not exist.
        PreconditionError: calibration data is needed and missing, or it or weights are not finite.
        ExportError, ImportModelError: a file in the folder cannot be written or read.
    """
    settings = LinearSettings() if settings is None else settings
    sites, blocked = linear_sites(program, ctx.structure(program))
    wanted = levels_of(sites, mode, settings)
    if settings.correction and (settings.goal is None or settings.goal > 0):
        wanted = {site.index: that_save(wanted[site.index], _costs(program, site, mode)) for site in sites}
        small = [site for site in sites if not wanted[site.index]]
        sites = [site for site in sites if wanted[site.index]]
        if small:
            blocked[f"a layer too small for maps of rank {settings.correction} beside it"] = len(small)
    database = build(program, sites, wanted, ctx, weights=weights, folder=folder)
    places: list[Place] = []
    for site in sites:
        cost, was = _costs(program, site, mode), 8 * program.weights[site.weight].dtype.itemsize
        levels = [Level("untouched", cost(None), 0.0)]
        for level in wanted[site.index]:
            weight, error = database[site.index][level]
            replaced: Mapping[str, Weight] = {} if weight is None else {site.weight: weight}
            text = for_plan(level, site.outputs, site.inputs, was)
            levels.append(Level(text, cost(level), error, replaced=replaced))
        places.append(Place("linear", site.label, site.block, tuple(levels), site.first, site.index))
    return places, blocked


def _costs(program: Program, site: LinearSite, mode: str) -> Callable[[LinearLevel | None], int]:
    """What a layer costs at a level, or as it is (None), in the unit of a mode."""
    stored = program.weights[site.weight]
    if mode == "bits":
        return lambda level: stored.nbytes if level is None else counted_bytes(level, site, stored.dtype)
    return lambda level: site.size if level is None else counted_params(level, site)


def levels_of(sites: Sequence[LinearSite], mode: str, settings: LinearSettings) -> dict[int, list[LinearLevel]]:
    """The levels of each site besides the untouched one, from mild to harsh, by the site's index.

    Raises:
        InputError: a mode or method that does not exist.
    """
    if mode not in MODES:
        raise InputError(f"no mode '{mode}' for linear layers", expected=f"one of: {', '.join(MODES)}")
    choices = {"sparsity": SPARSE_METHODS, "bits": BITS_METHODS}.get(mode, ())
    method = settings.method or next(iter(choices), "")
    if choices and method not in choices:
        raise InputError(f"no method '{method}' for {mode}", expected=f"one of: {', '.join(choices)}")
    if settings.goal is not None and settings.goal <= 0:
        return {site.index: [] for site in sites}
    if mode == "bits":
        return {site.index: _bit_levels(site, settings, method) for site in sites}
    if mode == "rank":
        return {site.index: _rank_levels(site, settings) for site in sites}
    return _sparse_levels(sites, settings, method)


def _sparse_levels(sites: Sequence[LinearSite], settings: LinearSettings, method: str) -> dict[int, list[LinearLevel]]:
    rank, goal = settings.correction, settings.goal
    beside = {site.index: rank * (site.inputs + site.outputs) for site in sites}
    room = {site.index: _removable(site, settings.floor) - beside[site.index] for site in sites}
    step = settings.step or max(1, max(room.values(), default=0) // settings.steps)
    share = (goal or 0.0) / max(1, sum(site.size for site in sites if room[site.index] > 0))
    found: dict[int, list[LinearLevel]] = {}
    for site in sites:
        saved = {*range(step, room[site.index] + 1, step)}
        if goal is not None and room[site.index] > 0:
            saved.add(min(room[site.index], math.ceil(share * site.size)))
        whole = site.size - beside[site.index]
        found[site.index] = [Sparse(whole - numbers, method, rank) for numbers in sorted(saved)]
    return found


def _removable(site: LinearSite, floor: float) -> int:
    return site.size - math.ceil(floor * site.size - 1e-9)


def _bit_levels(site: LinearSite, settings: LinearSettings, method: str) -> list[LinearLevel]:
    # A group as wide as a row is the row.
    group = settings.group if settings.group is not None and settings.group < site.inputs else None
    return [Bits(bits, group, method, settings.correction) for bits in sorted(set(settings.bits), reverse=True)]


def _rank_levels(site: LinearSite, settings: LinearSettings) -> list[LinearLevel]:
    found: dict[LinearLevel, None] = {}
    for number in range(1, math.floor(settings.most / settings.share + 1e-9) + 1):
        try:
            rank, nonzeros = rank_for(number * settings.share, settings.kappa, site.inputs, site.outputs)
        except InputError:
            break  # a layer this small has no rank left; harsher levels have none either
        found[LowRank(rank, nonzeros)] = None
    return list(found)


def build(
    program: Program,
    sites: Sequence[LinearSite],
    wanted: Mapping[int, Sequence[LinearLevel]],
    ctx: Context,
    *,
    weights: bool = True,
    folder: Path | None = None,
) -> Database:
    """Solve levels and keep them.

    Args:
        program, sites, wanted, ctx: as for `linear_solve.solve`.
        weights: whether to keep weights, or errors alone.
        folder: where the weights are kept in files, made if it is not there; None: in memory.

    Raises:
        PreconditionError: as `linear_solve.solve`.
        ExportError, ImportModelError: a file in the folder cannot be written or read.
    """
    known: Database = {}
    keys: dict[int, str] = {}
    if folder is not None and weights:
        folder.mkdir(parents=True, exist_ok=True)
        about = f"{program.fingerprint()} {_digest(ctx)}"
        for site in sites:
            was = 8 * program.weights[site.weight].dtype.itemsize
            texts = [for_plan(level, site.outputs, site.inputs, was) for level in wanted.get(site.index, ())]
            keys[site.index] = hashlib.blake2b(f"{about} {site.weight} {texts}".encode(), digest_size=16).hexdigest()
            found = _read(_path(folder, site), keys[site.index], wanted.get(site.index, ()))
            if found is not None:
                known[site.index] = found
    rest = {index: levels for index, levels in wanted.items() if index not in known}
    held: list[Solved] = []
    for solved in solve(program, sites, rest, ctx):
        site = solved.site
        if folder is not None and weights:
            held.append(solved)
            if len(held) == len(rest[site.index]):
                known[site.index] = _write(program, _path(folder, site), keys[site.index], held)
                held = []
            continue
        weight = with_weight_matrix(program, site.consumers[0], solved.matrix()) if weights else None
        known.setdefault(site.index, {})[solved.level] = weight, solved.error
    return known


def _path(folder: Path, site: LinearSite) -> Path:
    return folder / f"linear-{site.index}.safetensors"


def _write(
    program: Program, path: Path, key: str, held: Sequence[Solved]
) -> dict[LinearLevel, tuple[Weight | None, float | None]]:
    tensors = {
        str(number): with_weight_matrix(program, solved.site.consumers[0], solved.matrix()).tensor()
        for number, solved in enumerate(held)
    }
    write_atomically(path, save(tensors, {"key": key, "errors": json.dumps([solved.error for solved in held])}))
    found = _read(path, key, [solved.level for solved in held])
    if found is None:
        raise ImportModelError(f"'{path}' was changed by somebody else", remedy="use a folder for each search")
    return found


def _read(
    path: Path, key: str, levels: Sequence[LinearLevel]
) -> dict[LinearLevel, tuple[Weight | None, float | None]] | None:
    """The levels of a file; None where there is no file, or one of something else."""
    if not path.exists():
        return None
    try:
        with safetensors.safe_open(str(path), "pt") as file:
            header: dict[str, Any] = dict(file.metadata() or {})
    except (OSError, safetensors.SafetensorError) as error:
        raise ImportModelError(
            f"cannot read the levels in '{path}': {error}", remedy="delete the file; it is made again"
        ) from error
    if header.get("key") != key:
        return None
    weights, errors = read_header(path), json.loads(header["errors"])
    return {level: (weights[str(number)], errors[number]) for number, level in enumerate(levels)}


def _digest(ctx: Context) -> str:
    """A hash of the calibration data."""
    state = hashlib.blake2b(digest_size=16)
    for batch in ctx.calibration or ():
        for name in sorted(batch):
            for leaf in pytree.tree_leaves(batch[name]):
                text = Weight.from_tensor(leaf).digest() if isinstance(leaf, torch.Tensor) else repr(leaf)
                state.update(f"{name} {text};".encode())
    return state.hexdigest()
