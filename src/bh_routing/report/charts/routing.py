"""Charts of any routing: number of experts per token, by layer, and expert load.

Every function takes arrays, Series or tensors, returns the figure, and optionally saves it.
Axes: T tokens, L layers, E experts, A alphas.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from bh_routing.errors import InputError
from bh_routing.report.arrays import numbers
from bh_routing.report.charts.marks import (
    Floats,
    add_legend,
    draw_heat_map,
    from_zero,
    looks_of,
    spread,
)
from bh_routing.report.charts.style import (
    BASELINE,
    BLUE,
    INK,
    OTHER_COLOURS,
    SOFT,
    look,
    new_figure,
    save,
    set_title,
)
from bh_routing.report.text import number, percent, plain

PathLike = str | Path


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
    with look():
        figure, axes = new_figure(3.5)
        are_whole = bool(np.all(counts_n == np.round(counts_n)))
        draw = _whole_counts if are_whole else _mean_counts
        draw(axes, counts_n)
        mean = float(counts_n.mean())
        axes.axvline(mean, color=INK, linewidth=1.6, linestyle=(0, (4, 2)))
        axes.grid(axis="y")
        what = f"{counts_n.size:,} counts" if are_whole else f"{counts_n.size:,} means"
        low, high = (number(v, 0 if are_whole else 1) for v in (counts_n.min(), counts_n.max()))
        finding = f"{number(mean)} experts on average (dashed), from {low} to {high} over {what}"
        set_title(figure, _titled(method_name, alpha, finding))
    return _finished(figure, save_path)


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
    experts_AP = numbers(mean_experts, "mean_experts")
    experts_AP = _one_a_row(experts_AP, len(alphas_A), "mean_experts")
    order = np.argsort(alphas_A)
    alphas_A, experts_AP = alphas_A[order], experts_AP[order]
    means_A = _row_means(experts_AP)
    with look():
        figure, axes = new_figure(3.6)
        if experts_AP.shape[1] > 1:
            x = np.repeat(alphas_A, experts_AP.shape[1])
            axes.scatter(x, experts_AP.ravel(), s=12, color=BLUE, alpha=0.4, linewidths=0)
        axes.plot(alphas_A, means_A, color=BLUE, marker="o", label="mean experts")
        if noise is not None:
            noise_A = _one_a_row(numbers(noise, "noise"), len(alphas_A), "noise")[order, 0]
            label = "on pure noise"
            axes.plot(
                alphas_A, noise_A, color=OTHER_COLOURS[0], marker="s", linestyle="--", label=label
            )
        if top_k is not None:
            axes.axhline(top_k, color=BASELINE, linestyle=":", label=f"top-{top_k:g}")
        axes.set_xscale("log")
        axes.set_xticks(alphas_A, [f"{a:g}" for a in alphas_A], rotation=45 * (len(alphas_A) > 8))
        axes.minorticks_off()
        axes.set_ylim(bottom=0.0)
        axes.grid()
        axes.set_xlabel("alpha (logarithmic)")
        axes.set_ylabel("Experts kept")
        figure.legend(loc="outside lower center", ncols=3)
        finding = f"{number(means_A[0])} experts at alpha {alphas_A[0]:g}"
        if len(alphas_A) > 1:
            finding += f", {number(means_A[-1])} at {alphas_A[-1]:g}"
        set_title(figure, _titled(method_name, None, finding))
    return _finished(figure, save_path)


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
    with look():
        shown = [plain(token, 12) or "␣" for token in tokens or ()]
        columns = shown if shown and num_tokens <= 32 else range(num_tokens)
        labels = "Token", "Layer", "Experts kept"
        figure = draw_heat_map(counts_TL.T, range(num_layers), columns, labels)
        figure.axes[0].invert_yaxis()
        layers_L = _row_means(counts_TL.T)
        low, high = int(np.nanargmin(layers_L)), int(np.nanargmax(layers_L))
        finding = f"fewest experts in layer {low} ({number(layers_L[low])}), "
        finding += f"most in layer {high} ({number(layers_L[high])})"
        if low == high or layers_L[low] == layers_L[high]:
            finding = f"{number(layers_L[low])} experts in every layer"
        set_title(figure, _titled(method_name, None, finding))
    return _finished(figure, save_path)


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
    load_LE = _two_axes(np.atleast_2d(numbers(utilization, "utilization")), "utilization")
    load_LE = np.nan_to_num(load_LE)
    totals_L = load_LE.sum(axis=1)
    if not totals_L.any():
        raise InputError("utilization holds no assignment: every number is 0; route a text first")
    used = totals_L > 0
    relative_LE = -np.sort(-load_LE[used] / load_LE[used].mean(axis=1, keepdims=True), axis=1)
    cv = float(relative_LE.std(axis=1).mean())
    with look():
        figure, axes = new_figure(3.6)
        ranks_E = np.arange(1, load_LE.shape[1] + 1)
        for row_E in relative_LE:
            axes.plot(ranks_E, row_E, color=BLUE, alpha=0.35, linewidth=1.1)
        axes.plot(ranks_E, relative_LE.mean(axis=0), color=BLUE, linewidth=2.6,
                  label="mean over layers" if len(relative_LE) > 1 else "load")  # fmt: skip
        axes.axhline(1.0, color=SOFT, linestyle="--", label="even load")
        from_zero(axes, y=float(relative_LE.max()))
        axes.grid()
        axes.set_xlabel("Experts of a layer, most used first")
        axes.set_ylabel("Load (multiple of even)")
        figure.legend(loc="outside lower center", ncols=2)
        unused = float((load_LE == 0).mean())
        finding = f"load varies by CV {number(cv)} in a layer, its most used expert takes "
        finding += f"{number(relative_LE[:, 0].mean(), 1)} times an even share"
        finding += f"; {percent(unused, 1)} of experts unused" if unused else ""
        set_title(figure, _titled(method_name, None, finding))
    return _finished(figure, save_path)


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
    names = list(arrays)
    looks = looks_of(names)
    with look():
        figure, axes = new_figure(3.4 + 0.08 * len(names))
        for name, counts_TL in arrays.items():
            layers_L = np.arange(counts_TL.shape[1])
            if len(counts_TL) > 1 and len(names) == 1:
                low_L, high_L = np.nanquantile(counts_TL, [0.1, 0.9], axis=0)
                axes.fill_between(layers_L, low_L, high_L, color=looks[name][0], alpha=0.18, lw=0)
            colour, shape = looks[name]
            axes.plot(layers_L, _row_means(counts_TL.T), color=colour, marker=shape,
                      markeredgecolor=INK, markeredgewidth=0.7)  # fmt: skip
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        axes.set_ylim(bottom=0.0)
        axes.grid()
        axes.set_xlabel("Layer")
        axes.set_ylabel("Experts kept")
        add_legend(figure, looks)
        set_title(figure, _layer_finding(arrays))
    return _finished(figure, save_path)


def _layer_finding(arrays: Mapping[str, Floats]) -> str:
    means = {name: _row_means(counts_TL.T) for name, counts_TL in arrays.items()}
    name = max(means, key=lambda n: float(np.nanmax(means[n]) - np.nanmin(means[n])))
    low, high = int(np.nanargmin(means[name])), int(np.nanargmax(means[name]))
    if means[name][low] == means[name][high]:
        return "Every layer keeps the same number of experts"
    return (
        f"Layers lie furthest apart in {plain(name, 24)}: {number(means[name][low])} experts "
        f"(layer {low}) to {number(means[name][high])} (layer {high})"
    )


def _whole_counts(axes: Axes, counts_n: Floats) -> None:
    values, how_many = np.unique(counts_n, return_counts=True)
    axes.bar(values, how_many / counts_n.size, width=0.8, color=BLUE,
             edgecolor=INK, linewidth=0.6)  # fmt: skip
    axes.set_xlim(min(values[0], 1.0) - 0.6, values[-1] + 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    axes.set_xlabel("Experts kept per token and layer")
    axes.set_ylabel("Share")


def _mean_counts(axes: Axes, means_n: Floats) -> None:
    bins = int(np.clip(np.sqrt(means_n.size), 5, 30))
    how_many, _, _ = axes.hist(means_n, bins=bins, color=BLUE, edgecolor=INK,
                               linewidth=0.6, alpha=0.85)  # fmt: skip
    tallest = float(np.max(how_many))
    if means_n.size <= 500:
        height_n = -0.09 * tallest + spread(means_n.size, 0.05 * tallest)
        axes.scatter(means_n, height_n, s=12, color=BLUE, edgecolors=INK,
                     linewidths=0.3)  # fmt: skip
        axes.axhline(0.0, color=INK, linewidth=0.8)
    axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel("Mean experts kept")
    axes.set_ylabel("How many")


def _titled(method_name: str, alpha: float | None, finding: str) -> str:
    name = plain(method_name, 32)
    if alpha is not None:
        name = f"{name}, alpha {alpha:g}" if name else f"alpha {alpha:g}"
    return f"{name}: {finding}" if name else finding[:1].upper() + finding[1:]


def _finished(figure: Figure, save_path: PathLike | None) -> Figure:
    if save_path is not None:
        save(figure, Path(save_path))
    return figure


def _two_axes(array: Floats, what: str) -> Floats:
    if array.ndim != 2:
        raise InputError(f"{what} must have two axes, got shape {array.shape}")
    return array


def _one_a_row(array: Floats, rows: int, what: str) -> Floats:
    if array.ndim not in (1, 2) or len(array) != rows:
        raise InputError(
            f"{what} must have one row for each of the {rows} alphas, got shape {array.shape}"
        )
    return array.reshape(rows, -1)


def _row_means(array: Floats) -> Floats:
    """Return the mean over finite values of each row; NaN for rows without any."""
    finite = np.isfinite(array)
    known = finite.sum(axis=1)
    sums = np.where(finite, array, 0.0).sum(axis=1)
    means: Floats = np.full(len(array), np.nan)
    np.divide(sums, known, out=means, where=known > 0)
    return means
