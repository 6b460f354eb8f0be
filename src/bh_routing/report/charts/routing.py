"""Charts of any routing: number of experts per token, by layer, and expert load.

Every function takes arrays, Series or tensors, returns the figure, and optionally saves it.
Axes: T tokens, L layers, E experts, A alphas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bh_routing.errors import InputError
from bh_routing.report.charts.marks import Floats, add_legend, draw_heat_map, from_zero, spread
from bh_routing.report.charts.style import (
    BASELINE,
    BLUE,
    INK,
    OTHER_COLOURS,
    SOFT,
    look,
    looks_of,
    new_figure,
    save,
    set_title,
)
from bh_routing.report.text import number, percent, plain

PathLike = str | Path


@look()
def plot_expert_count_distribution(
    counts: Any,
    method_name: str = "",
    alpha: float | None = None,
    save_path: PathLike | None = None,
) -> Figure:
    """Draw the distribution of the number of experts kept.

    Integers are counts and get one bar each; other numbers are means, such as one per prompt,
    and get a histogram with every value as a point.

    Args:
        counts: experts kept, of any shape; `trace.expert_counts` or a column of the results.
        method_name: shown in the title, such as the configuration's name.
        alpha: shown in the title if given.
        save_path: output file, ending in .png, .pdf, .svg or .jpg.
    Returns:
        The figure.
    Raises:
        InputError: no value is finite, or a value is negative.
    Example:
        >>> figure = plot_expert_count_distribution([1, 4, 4, 8], method_name="bh", alpha=0.05)
    """
    counts_n = numbers(counts, "counts").ravel()
    counts_n = counts_n[np.isfinite(counts_n)]
    are_whole = bool(np.all(counts_n == np.round(counts_n)))
    looks: dict[str, Any] = {"color": BLUE, "edgecolor": INK}
    figure, axes = new_figure(3.5)
    if are_whole:
        values, how_many = np.unique(counts_n, return_counts=True)
        axes.bar(values, how_many / counts_n.size, width=0.8, linewidth=0.6, **looks)
        axes.set_xlim(min(values[0], 1.0) - 0.6, values[-1] + 0.6)
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
        axes.set(xlabel="Experts kept per token and layer", ylabel="Share")
    else:
        bins = int(np.clip(np.sqrt(counts_n.size), 5, 30))
        how_many = axes.hist(counts_n, bins=bins, linewidth=0.6, alpha=0.85, **looks)[0]
        if counts_n.size <= 500:
            height_n = how_many.max() * (spread(counts_n.size, 0.05) - 0.09)
            axes.scatter(counts_n, height_n, s=12, linewidths=0.3, **looks)
            axes.axhline(0.0, color=INK, linewidth=0.8)
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set(xlabel="Mean experts kept", ylabel="How many")
    axes.axvline(counts_n.mean(), color=INK, linewidth=1.6, linestyle=(0, (4, 2)))
    axes.grid(axis="y")
    what = f"{counts_n.size:,} counts" if are_whole else f"{counts_n.size:,} means"
    low, high = (number(v, 0 if are_whole else 1) for v in (counts_n.min(), counts_n.max()))
    finding = (
        f"{number(counts_n.mean())} experts on average (dashed), from {low} to {high} over {what}"
    )
    name = plain(method_name, 32)
    if alpha is not None:
        name = f"{name}, alpha {alpha:g}" if name else f"alpha {alpha:g}"
    return _finished(figure, name, finding, save_path)


@look()
def plot_alpha_sensitivity(
    alphas: Any,
    mean_experts: Any,
    method_name: str = "",
    top_k: float | None = None,
    noise: Any = None,
    save_path: PathLike | None = None,
) -> Figure:
    """Draw mean experts against alpha.

    Args:
        alphas: values of alpha in (0, 1), shape (A,).
        mean_experts: mean experts kept, shape (A,), or (A, prompts) to show each prompt.
        method_name: shown in the title.
        top_k: the model's own number of experts, drawn as a line.
        noise: mean experts on pure noise at the same alphas, shape (A,), drawn as a second line.
        save_path: output file.
    Raises:
        InputError: lengths differ, or an alpha is outside (0, 1).
    """
    alphas_A = numbers(alphas, "alphas").ravel()
    if np.any((alphas_A <= 0) | (alphas_A >= 1)):
        raise InputError(f"alphas must be in (0, 1), got {alphas_A.min():g} to {alphas_A.max():g}")
    order = np.argsort(alphas_A)
    experts_AP = _one_a_row(mean_experts, len(alphas_A), "mean_experts")[order]
    alphas_A, means_A = alphas_A[order], _row_means(experts_AP)
    figure, axes = new_figure(3.6)
    if experts_AP.shape[1] > 1:
        axes.plot(alphas_A, experts_AP, color=BLUE, marker=".", linestyle="none", alpha=0.4)
    axes.plot(alphas_A, means_A, color=BLUE, marker="o", label="mean experts")
    if noise is not None:
        noise_A = _one_a_row(noise, len(alphas_A), "noise")[order, 0]
        axes.plot(alphas_A, noise_A, color=OTHER_COLOURS[0], marker="s", linestyle="--",
                  label="on pure noise")  # fmt: skip
    if top_k is not None:
        axes.axhline(top_k, color=BASELINE, linestyle=":", label=f"top-{top_k:g}")
    axes.set(xscale="log", xlabel="alpha (logarithmic)", ylabel="Experts kept")
    axes.set_xticks(alphas_A, [f"{a:g}" for a in alphas_A], rotation=45 * (len(alphas_A) > 8))
    axes.minorticks_off()
    axes.set_ylim(bottom=0.0)
    axes.grid()
    figure.legend(loc="outside lower center", ncols=3)
    finding = f"{number(means_A[0])} experts at alpha {alphas_A[0]:g}"
    if len(alphas_A) > 1:
        finding += f", {number(means_A[-1])} at {alphas_A[-1]:g}"
    return _finished(figure, method_name, finding, save_path)


@look()
def plot_routing_heatmap(
    expert_counts: Any,
    method_name: str = "",
    tokens: Sequence[str] | None = None,
    save_path: PathLike | None = None,
) -> Figure:
    """Draw the number of experts kept per token and layer.

    Args:
        expert_counts: shape (T, L), such as `trace.expert_counts`.
        method_name: shown in the title.
        tokens: texts of the T tokens, shown on the axis if legible.
        save_path: output file.
    Raises:
        InputError: the array isn't two-dimensional, or the number of tokens differs.
    """
    counts_TL = _two_axes(numbers(expert_counts, "expert_counts"), "expert_counts (tokens, layers)")
    num_tokens, num_layers = counts_TL.shape
    if tokens is not None and len(tokens) != num_tokens:
        raise InputError(
            f"tokens must be {num_tokens} texts, one a row of expert_counts, got {len(tokens)}"
        )
    shown = [plain(token, 12) or "␣" for token in tokens or ()]
    columns = shown if shown and num_tokens <= 32 else range(num_tokens)
    labels = "Token", "Layer", "Experts kept"
    figure = draw_heat_map(counts_TL.T, range(num_layers), columns, labels)
    figure.axes[0].invert_yaxis()
    layers_L = _row_means(counts_TL.T)
    low, high = int(np.nanargmin(layers_L)), int(np.nanargmax(layers_L))
    finding = f"{number(layers_L[low])} experts in every layer"
    if layers_L[low] < layers_L[high]:
        finding = f"fewest experts in layer {low} ({number(layers_L[low])}), "
        finding += f"most in layer {high} ({number(layers_L[high])})"
    return _finished(figure, method_name, finding, save_path)


@look()
def plot_expert_utilization(
    utilization: Any, method_name: str = "", save_path: PathLike | None = None
) -> Figure:
    """Draw each layer's sorted expert load, as a multiple of an even load.

    Args:
        utilization: tokens that kept each expert, shape (L, E) or (E,), such as
            `trace.utilization`.
        method_name: shown in the title.
        save_path: output file.
    Raises:
        InputError: the number of axes is wrong, a number is negative, or all are 0.
    """
    load_LE = np.atleast_2d(numbers(utilization, "utilization"))
    load_LE = np.nan_to_num(_two_axes(load_LE, "utilization"))
    used_LE = load_LE[load_LE.any(axis=1)]
    if not used_LE.size:
        raise InputError("utilization holds no assignment: every number is 0; route a text first")
    relative_LE = -np.sort(-used_LE / used_LE.mean(axis=1, keepdims=True), axis=1)
    ranks_E = np.arange(1, load_LE.shape[1] + 1)
    figure, axes = new_figure(3.6)
    axes.plot(ranks_E, relative_LE.T, color=BLUE, alpha=0.35, linewidth=1.1)
    axes.plot(ranks_E, relative_LE.mean(axis=0), color=BLUE, linewidth=2.6,
              label="mean over layers" if len(relative_LE) > 1 else "load")  # fmt: skip
    axes.axhline(1.0, color=SOFT, linestyle="--", label="even load")
    from_zero(axes, y=float(relative_LE.max()))
    axes.grid()
    axes.set(xlabel="Experts of a layer, most used first", ylabel="Load (multiple of even)")
    figure.legend(loc="outside lower center", ncols=2)
    unused = float((load_LE == 0).mean())
    finding = f"load varies by CV {number(relative_LE.std(axis=1).mean())} in a layer, its most "
    finding += f"used expert takes {number(relative_LE[:, 0].mean(), 1)} times an even load"
    finding += f"; {percent(unused, 1)} of experts unused" if unused else ""
    return _finished(figure, method_name, finding, save_path)


@look()
def plot_layerwise_counts(
    counts: Any, method_name: str = "", save_path: PathLike | None = None
) -> Figure:
    """Draw the mean experts kept in each layer.

    For a single method, a band also shows the middle 80 % of its tokens.

    Args:
        counts: shape (T, L), or means of shape (L,), or a mapping from names to either.
        method_name: shown in the title; names a single array.
        save_path: output file.
    Raises:
        InputError: an array has another shape, or the mapping is empty.
    """
    named = counts if isinstance(counts, Mapping) else {method_name or "experts": counts}
    if not named:
        raise InputError("counts must hold at least one method, got an empty mapping")
    arrays = {
        str(name): _two_axes(np.atleast_2d(numbers(value, "counts")), "counts")
        for name, value in named.items()
    }
    means = {name: _row_means(counts_TL.T) for name, counts_TL in arrays.items()}
    looks = looks_of(arrays)
    figure, axes = new_figure(3.4 + 0.08 * len(arrays))
    for name, counts_TL in arrays.items():
        colour, marker = looks[name]
        if len(counts_TL) > 1 and len(arrays) == 1:
            low_L, high_L = np.nanquantile(counts_TL, [0.1, 0.9], axis=0)
            axes.fill_between(range(len(low_L)), low_L, high_L, color=colour, alpha=0.18, lw=0)
        axes.plot(means[name], color=colour, marker=marker, markeredgecolor=INK,
                  markeredgewidth=0.7)  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes.set_ylim(bottom=0.0)
    axes.grid()
    axes.set(xlabel="Layer", ylabel="Experts kept")
    add_legend(figure, looks)
    widest = max(means, key=lambda n: float(np.nanmax(means[n]) - np.nanmin(means[n])))
    mean_L, finding = means[widest], "Every layer keeps the same number of experts"
    low, high = int(np.nanargmin(mean_L)), int(np.nanargmax(mean_L))
    if mean_L[low] < mean_L[high]:
        finding = (
            f"Layers lie furthest apart in {plain(widest, 24)}: {number(mean_L[low])} experts "
        )
        finding += f"(layer {low}) to {number(mean_L[high])} (layer {high})"
    return _finished(figure, "", finding, save_path)


def _finished(figure: Figure, method_name: str, finding: str, save_path: PathLike | None) -> Figure:
    name = plain(method_name, 32 + len(", alpha 0.0001"))
    set_title(figure, f"{name}: {finding}" if name else finding[:1].upper() + finding[1:])
    if save_path is not None:
        save(figure, Path(save_path))
    return figure


def _two_axes(array: Floats, what: str) -> Floats:
    if array.ndim != 2:
        raise InputError(f"{what} must have two axes, got shape {array.shape}")
    return array


def _one_a_row(values: Any, rows: int, what: str) -> Floats:
    array = numbers(values, what)
    if array.ndim not in (1, 2) or len(array) != rows:
        raise InputError(
            f"{what} must have one row for each of the {rows} alphas, got shape {array.shape}"
        )
    return array.reshape(rows, -1)


def _row_means(array: Floats) -> Floats:
    """Return the mean over finite values of each row; NaN for rows without any."""
    means: Floats = np.ma.masked_invalid(array).mean(axis=1).filled(np.nan)
    return means


def numbers(values: Any, what: str) -> Floats:
    """Return counts, means or fractions as a float64 array of the same shape.

    Tensors are recognised by duck typing, so torch isn't required.

    Args:
        values: a list, array, Series, DataFrame or tensor, on any device.
        what: name of the values in error messages.
    Raises:
        InputError: the values include text or a negative number, or none is finite.
    """
    for step in ("detach", "cpu"):
        values = getattr(values, step)() if hasattr(values, step) else values
    if hasattr(values, "is_floating_point") and values.is_floating_point():
        values = values.double()  # numpy has no bfloat16
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{what} must be numbers in a list, array, Series or tensor: {error}"
        ) from error
    finite = array[np.isfinite(array)]
    if not finite.size:
        raise InputError(f"{what} must hold at least one finite number, got {array.size} values")
    if finite.min() < 0:
        raise InputError(f"{what} must not be negative, got {finite.min():g}")
    return np.where(np.isfinite(array), array, np.nan)
