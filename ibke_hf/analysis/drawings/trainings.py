"""Figures 3 and 4: scores by l_m and β, and by what of IBKE is left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...evaluation.report.drawing import SMALL, Theme
from ..trainings import METRICS, mean_and_error
from .frames import METRIC_LABELS, frame, legend, line_style, new_figure, say, seeds_in_words, signed

Data = Mapping[str, Any]


def draw_hyper_parameters(data: Data, theme: Theme) -> Any:
    """Draw Figure 3: each metric over β, a line for each l_m."""
    figure = new_figure(10.6, 4.6)
    top = say(figure, title_of_hyper_parameters(data), f"Atlas, {seeds_in_words(data['seeds'])}; as trained")
    for place, metric in enumerate(METRICS):
        axes = figure.add_axes((0.075 + place * 0.322, 0.13, 0.252, top - 0.29))
        for i, length in enumerate(data["latent_lengths"]):
            means, errors = zip(*map(mean_and_error, data["values"][metric][i]), strict=True)
            places = [j for j, mean in enumerate(means) if mean is not None]
            axes.errorbar(
                [j + 0.06 * (i - 1.5) for j in places],
                [means[j] for j in places],
                [errors[j] or 0.0 for j in places],
                label=f"{length}",
                capsize=2.5,
                elinewidth=0.9,
                **line_style(theme, i),
            )
        axes.set_xticks(range(len(data["betas"])), [f"{beta:g}" for beta in data["betas"]])
        axes.set_xlim(-0.4, len(data["betas"]) - 0.6)
        axes.set_xlabel("β, weight of the information term", fontsize=SMALL)
        axes.set_ylabel(METRIC_LABELS[metric], labelpad=6, fontsize=SMALL)
        frame(axes, theme, grid="y")
    legend(figure, axes, top - 0.005, len(data["latent_lengths"]), title="l_m, length of the latent")
    return figure


def title_of_hyper_parameters(data: Data) -> str:
    """Say where each metric is highest."""
    best = []
    for metric in METRICS:
        means = {
            (length, beta): mean_and_error(data["values"][metric][i][j])[0]
            for i, length in enumerate(data["latent_lengths"])
            for j, beta in enumerate(data["betas"])
        }
        present = {key: mean for key, mean in means.items() if mean is not None}
        (length, beta), score = max(present.items(), key=lambda item: item[1])
        best.append(f"{metric} at l_m = {length}, β = {beta:g} ({score:.1f} %)")
    return f"Highest are {', '.join(best[:-1])} and {best[-1]}"


def draw_ablation(data: Data, theme: Theme) -> Any:
    """Draw Figure 4: a row for each variant, a panel for each metric."""
    variants = data["variants"]
    figure = new_figure(10.2, 1.75 + 0.36 * len(variants))
    what = "IB: information bottleneck, SF: scale factor, -: left out"
    top = say(figure, title_of_ablation(data), f"Atlas, {seeds_in_words(data['seeds'])}. {what}")
    height = figure.get_size_inches()[1]
    for place, metric in enumerate(METRICS):
        axes = figure.add_axes((0.125 + place * 0.297, 0.62 / height, 0.262, top - 0.8 / height))
        for i, name in enumerate(variants):
            mean, error = mean_and_error(data["values"][metric][i])
            if mean is None:
                continue
            row = len(variants) - 1 - i
            ours = name == "IBKE (ours)"
            axes.errorbar(
                mean,
                row,
                xerr=error or 0.0,
                marker="D" if ours else "o" if i == 0 else "s",
                color=theme.colours[1 if ours else 0 if i == 0 else 2],
                markerfacecolor=theme.paper if i > 0 and not ours else None,
                markersize=7,
                capsize=3,
                elinewidth=1.2,
                linestyle="none",
            )
            axes.annotate(f"{mean:.1f}", (mean, row), (0, 7), textcoords="offset points", ha="center", fontsize=SMALL)
        axes.set_yticks(range(len(variants)), list(reversed(variants)) if place == 0 else [""] * len(variants))
        axes.set_ylim(-0.5, len(variants) - 0.3)
        axes.margins(x=0.18)
        axes.set_xlabel(METRIC_LABELS[metric], fontsize=SMALL)
        frame(axes, theme, grid="both")
    return figure


def title_of_ablation(data: Data) -> str:
    """Say what leaving out each part costs in generality and locality."""
    means = {
        metric: {
            name: mean_and_error(values)[0]
            for name, values in zip(data["variants"], data["values"][metric], strict=True)
        }
        for metric in METRICS
    }
    whole = {metric: means[metric].get("IBKE (paper)") for metric in METRICS}
    parts = []
    for name, what in (("- IB", "the bottleneck"), ("- SF", "the scale factor")):
        moved = [
            f"{metric} by {signed(value - full)}"
            for metric in ("generality", "locality")
            if (value := means[metric].get(name)) is not None and (full := whole[metric]) is not None
        ]
        if moved:
            parts.append(f"leaving out {what} moves {' and '.join(moved)} points")
    if not parts:
        return "Variants of IBKE by what is left out"
    text = "; ".join(parts)
    return text[0].upper() + text[1:]
