"""Figures 6 and 7: latents in a plane, scale factors over tokens and layers, and pruning them."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from ...evaluation.report.drawing import MARKERS, SMALL, Theme
from ..trainings import mean_and_error
from .domains import ORDINAL, heat_map
from .frames import frame, layer_label, legend, line_style, new_figure, say, shortened, two_digits

Data = Mapping[str, Any]
PANEL = 2.5  # inches
FAINTEST = 0.25  # of a point whose edit is not believed at all
NARROW = 13  # letters of an editor's label beside a heat map
LONGEST = 26  # letters of a relation in the legend


# --- Figure 6 -----------------------------------------------------------------------------------------------------


def draw_latents(data: Data, theme: Theme) -> Any:
    """Draw Figure 6: a map of the latents for each layer and editor; the less sure of an edit, the fainter."""
    editors = data["editors"]
    layers = list(next(iter(editors.values()))["layers"])
    names = list(dict.fromkeys(data["relations"]))
    per_row = max(int((PANEL * len(layers) + 0.4) / 2.5), 1)
    legend_rows = -(-len(names) // per_row)
    height = 1.35 + 0.22 * legend_rows + (PANEL + 0.35) * len(editors)
    figure = new_figure(PANEL * len(layers) + 0.6, height)
    note = (
        f"t-SNE of the latents of {len(data['relations'])} edits of {len(names)} relations; faint: the edited model "
        f"is not sure of the answer. Above each: silhouette (−1 … 1) of the latents, and of their map"
    )
    top = say(figure, title_of_latents(data), note) * height
    start = top - 0.25 - 0.22 * legend_rows
    width = figure.get_size_inches()[0]
    for i, (label, editor) in enumerate(editors.items()):
        for j, layer in enumerate(layers):
            bottom = start - (i + 1) * (PANEL + 0.35) + 0.1
            place = ((0.45 + j * PANEL) / width, bottom / height, (PANEL - 0.2) / width, (PANEL - 0.1) / height)
            axes = figure.add_axes(place)
            _scatter(axes, editor, layer, data["relations"], names, theme)
            clear = mean_and_error(editor["layers"][layer]["silhouette"].values())[0]
            of_map = editor["layers"][layer]["silhouette_of_map"]
            score = "" if clear is None or of_map is None else f": {two_digits(clear)}, map {two_digits(of_map)}"
            axes.set_title(f"{layer_label(layer)}{score}", fontsize=SMALL, pad=4)
            if j == 0:
                axes.set_ylabel(label, fontsize=SMALL + 1)
    legend(figure, axes, top / height, per_row)
    return figure


def _scatter(
    axes: Any, editor: Data, layer: str, relations: Sequence[str], names: Sequence[str], theme: Theme
) -> None:
    points, sure = editor["layers"][layer]["points"], editor["confidence"]
    for k, name in enumerate(names):
        members = [i for i, relation in enumerate(relations) if relation == name]
        axes.scatter(
            [points[i][0] for i in members],
            [points[i][1] for i in members],
            s=26,
            marker=MARKERS[k % len(MARKERS)],
            color=theme.colours[k % len(theme.colours)],
            alpha=[FAINTEST + (1 - FAINTEST) * sure[i] for i in members],
            linewidth=0,
        )
        axes.scatter(  # for the legend alone, in full colour
            [],
            [],
            s=30,
            marker=MARKERS[k % len(MARKERS)],
            color=theme.colours[k % len(theme.colours)],
            label=shortened(name, LONGEST),
        )
    axes.set_xticks([])
    axes.set_yticks([])


def clearness(data: Data) -> dict[str, float]:
    """Return the mean silhouette over layers and seeds, by editor."""
    means = {}
    for label, editor in data["editors"].items():
        scores = [score for layer in editor["layers"].values() for score in layer["silhouette"].values()]
        mean = mean_and_error(scores)[0]
        if mean is not None:
            means[label] = mean
    return means


def title_of_latents(data: Data) -> str:
    """Say how clear the clusters are."""
    means = clearness(data)
    each = ", ".join(f"{two_digits(value)} ({label})" for label, value in means.items())
    ends = ""
    if len(means) > 1:
        best, worst = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
        ends = f"; clusters are clearest {best}" if means[best] - means[worst] >= 0.005 else "; clusters are as clear"
    return f"Silhouette of latents by relation, a mean over layers: {each or 'not defined'}{ends}"


# --- Figure 7a ----------------------------------------------------------------------------------------------------


def draw_scale_factors(data: Data, theme: Theme) -> Any:
    """Draw Figure 7a: a heat map of tokens and layers for each edit and editor."""
    labels = list(data["statistics"])
    layers = list(next(iter(data["edits"][0]["editors"].values())))
    most = max(len(edit["tokens"]) for edit in data["edits"])
    row, gap = 0.24 * len(layers), 0.32
    each = 0.95 + len(labels) * (row + gap)
    width, height = max(0.5 * most + 2.4, 8.4), 1.0 + each * len(data["edits"])
    figure = new_figure(width, height)
    note = (
        f"0: a token has no part in the edit, 1: its whole part; sparsity (Hoyer) and share below 0.5 are of all "
        f"{data['measured']} edits; underlined tokens predict the new answer"
    )
    top = say(figure, title_of_scale_factors(data), note) * height
    for i, edit in enumerate(data["edits"]):
        y = top - 0.28 - i * each
        text = f"{edit['prompt']} → {edit['target']}"
        figure.text(0.2 / width, y / height, shortened(text, int(width / 0.08)), fontsize=SMALL + 1, va="top")
        for k, label in enumerate(labels):
            bottom = y - 0.62 - k * (row + gap) - row
            wrapped = "\n".join(textwrap.wrap(label, NARROW))
            place = (1.9 / width, bottom / height, 0.5 * len(edit["tokens"]) / width, row / height)
            axes = figure.add_axes(place)
            _factors(axes, edit, label, layers, theme, tokens=k == 0)
            figure.text(0.2 / width, (bottom + row / 2) / height, wrapped, fontsize=SMALL, va="center")
    return figure


def _factors(axes: Any, edit: Data, label: str, layers: Sequence[str], theme: Theme, *, tokens: bool) -> None:
    heat_map(axes, [edit["editors"][label][layer] for layer in layers], (0.0, 1.0), ORDINAL, is_signed=False)
    axes.set_yticks(range(len(layers)), map(layer_label, layers), fontsize=8)
    axes.xaxis.tick_top()
    shown = [shortened(token.strip() or "␣", 7) for token in edit["tokens"]] if tokens else []
    axes.set_xticks(range(len(shown)), shown, fontsize=8)
    axes.tick_params(length=0, pad=2)
    for spine in axes.spines.values():
        spine.set_visible(False)
    for j, judged in enumerate(edit["judged"]):
        if judged:
            axes.plot(
                [j - 0.42, j + 0.42],
                [len(layers) - 0.36] * 2,
                color=theme.colours[1],
                linewidth=2.4,
                clip_on=False,
                solid_capstyle="butt",
            )


def gate_means(data: Data, name: str) -> dict[str, float]:
    """Return the mean of a statistic of scale factors over layers and seeds, by editor."""
    means = {}
    for label, by_seed in data["statistics"].items():
        values = [layer[name] for layers in by_seed.values() for layer in layers.values()]
        means[label] = sum(values) / len(values)
    return means


def title_of_scale_factors(data: Data) -> str:
    """Say how large and how sparse the scale factors are."""
    sparse, mean = (gate_means(data, name) for name in ("sparsity", "mean"))
    below = gate_means(data, "below_half")
    each = [
        f"mean {mean[label]:.2f} ({label}), sparsity {sparse[label]:.2f}, {100 * below[label]:.0f} % below 0.5"
        for label in sparse
    ]
    return f"Scale factors: {'; '.join(each)}"


# --- Figure 7b ----------------------------------------------------------------------------------------------------

CURVES = (
    ("reliability_confidence", "Reliability: confidence", False),
    ("generality_confidence", "Generality: confidence", False),
    ("locality_similarity", "Locality: similarity (1 − JS)", False),
    ("reliability_rank", "Reliability: rank of the target", True),
    ("generality_rank", "Generality: rank of the target", True),
)


def draw_pruning(data: Data, theme: Theme) -> Any:
    """Draw Figure 7b: confidence, rank and similarity over the share of scale factors that are pruned."""
    figure = new_figure(10.4, 6.2)
    seeds = max(len(by_seed) for by_seed in data["editors"].values())
    note = (
        f"means over {data['successful']} edits of {data['records']} that succeed under every editor, "
        f"{seeds} seed{'s' * (seeds > 1)}; rank 1 is the best"
    )
    top = say(figure, title_of_pruning(data), note)
    room = (top - 0.2) / 2
    for place, (name, label, is_rank) in enumerate(CURVES):
        axes = figure.add_axes((0.07 + place % 3 * 0.32, 0.1 + (1 - place // 3) * (room + 0.09), 0.25, room - 0.05))
        for k, (editor, by_seed) in enumerate(data["editors"].items()):
            values = curve_of(by_seed, name)
            places = [i for i, value in enumerate(values) if value is not None]
            axes.plot(
                [100 * data["fractions"][i] for i in places],
                [values[i] for i in places],
                label=editor,
                **line_style(theme, k),
            )
        if is_rank:
            axes.set_yscale("log")
        axes.set_ylabel(label, labelpad=3, fontsize=SMALL)
        axes.set_xlabel("pruned scale factors (%)" if place > 1 else "", fontsize=SMALL)
        frame(axes, theme, grid="y")
        if place == 0:
            first = axes
    handles, labels = first.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="center", bbox_to_anchor=(0.84, 0.1 + room / 2), frameon=False, handlelength=3.5
    )
    return figure


def curve_of(by_seed: Mapping[str, Data], name: str) -> list[float | None]:
    """Average a measure over seeds, for each fraction."""
    return [mean_and_error(values)[0] for values in zip(*(curve[name] for curve in by_seed.values()), strict=True)]


def title_of_pruning(data: Data) -> str:
    """Say how much of the confidence is left when half of the factors are pruned."""
    half = min(range(len(data["fractions"])), key=lambda i: abs(data["fractions"][i] - 0.5))
    parts = []
    for label, by_seed in data["editors"].items():
        curves = {role: curve_of(by_seed, f"{role}_confidence") for role in ("reliability", "generality")}
        kept = [
            f"{100 * left / whole:.0f} % in {role}"
            for role, values in curves.items()
            if (whole := values[0]) and (left := values[half]) is not None
        ]
        parts.append(f"{label} {' and '.join(kept)}")
    share = f"{100 * data['fractions'][half]:.0f} %"
    return f"With the {share} smallest scale factors pruned, confidence keeps {'; '.join(parts)}"
