"""Draws what jointgrad.py and study.py leave: data and runs, comparisons, sweeps, step times.

Each draw_… but draw_boxes returns a figure of matplotlib's; `save` writes it.
"""
from pathlib import Path
from typing import Any

import jointgrad as jg  # the program that runs, or a module of that name
import numpy as np
from matplotlib import figure, font_manager, rcParams

rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                 "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False})
SCORES = ("mAP50-95", "balanced_accuracy")  # of detection, of classification
COLOUR = {mode: f"C{k}" for k, mode in enumerate((*jg.MODES, "tuned"))}

def panels(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure and its axes (rows, columns), without pyplot: no window, no state."""
    fig = figure.Figure(size)
    return fig, fig.subplots(rows, columns, squeeze=False)

def save(fig: Any, path: Path) -> None:
    """Writes the figure as PNG, the same bytes for the same data."""
    fig.tight_layout()
    fig.savefig(path, dpi=110, bbox_inches="tight", metadata={"Software": None})

# --------------------------------------------------------------------------------------------------
# 1. Of one run: labelled images, predictions, curves
# --------------------------------------------------------------------------------------------------

def drawable(names: list[str]) -> list[str]:
    """The names, each as its index where the figures' font lacks a letter of it."""
    font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))  # comes with matplotlib
    return [name if all(map(font.get_char_index, map(ord, name))) else str(k)
            for k, name in enumerate(names)]

def draw_boxes(ax: Any, image: Any, boxes: list[tuple], title: str) -> None:
    """An image and up to 300 boxes: class index, x1 y1 x2 y2 px, text beside it."""
    ax.imshow(image)
    ax.autoscale(False)  # a box on the border shall not shrink the image
    for k, (x1, y1, x2, y2), text in boxes[299::-1]:  # the best last, on top
        colour = f"C{k % 10}"
        ax.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], color=colour, lw=1.2)
        ax.text(x1, y1, text, fontsize=7, color="white", parse_math=False, clip_on=True,
                bbox={"fc": colour, "ec": "none", "alpha": 0.6, "pad": 1} if text else None)
    ax.set_title(title, parse_math=False)
    ax.axis("off")

def draw_found(image: Any, found: dict, model: Any) -> Any:
    """One image with what a Predictor found on it."""
    fig, axes = panels(1, 1, (5, 5))
    names, classes, boxes, title = drawable(model.names), model.classification_names, [], ""
    for box in found["boxes"]:
        k = model.names.index(box["name"])
        boxes.append((k, box["box_xyxy"], f"{names[k]} {box['score']:.2f}"))
    if found["classification"]:
        title = drawable(classes)[classes.index(found["classification"]["name"])]
    draw_boxes(axes[0, 0], image, boxes, title)
    return fig

def draw_data(data: jg.JointSet) -> Any:
    """Nine images of a split, evenly spaced, with their labels; a colour for each class of box."""
    fig, axes = panels(3, 3, (9, 9 * data.canvas[0] / data.canvas[1] + 1))
    names = [f"class {k}" if name == str(k) else name for k, name in
             enumerate(drawable(data.classification_names))] + ["no class"]  # NO_LABEL is below 0
    for ax, i in zip(axes.flat, np.linspace(0, len(data) - 1, 9).astype(int)):
        boxes = [(int(k), box, "") for k, *box in data.truth(i).tolist()]
        stem = data.paths[i].stem[:30] if data.paths else ""
        stem = stem if stem and drawable([stem]) == [stem] else f"image {i}"
        draw_boxes(ax, data.pixels[i], boxes, f"{stem}: {names[max(data.labels[i], -1)]}")
    for k, name in enumerate(drawable(data.names)):
        axes[0, 0].plot([], [], color=f"C{k % 10}", label=f"{k} {name}" if name != str(k) else name)
    fig.legend(loc="upper center", ncols=8, bbox_to_anchor=(0.5, 0))
    return fig

def draw_run(run: jg.Run, data: jg.JointSet) -> Any:
    """The curves of one run over its steps, and what its classifier took each class for."""
    fig, axes = panels(2, 3, (12, 6.5))
    rows, curve = run.rows, [row for row in run.rows if "val" in row]
    titles = {"w": "Task weights w", "L": "Training losses L, unweighted",
              "G": "Share of G = w n, where a trunk is shared", "r": "Relative inverse rates r"}
    for ax, (key, title) in zip(axes.flat, titles.items()):
        ax.set(title=title, xlabel="step (means of 11)")
        for task in (task for task in run.config.tasks if f"{key}/{task}" in rows[0]):
            line = np.array([row[f"{key}/{task}"] for row in rows])
            if key == "G":
                line /= [sum(row[f"G/{t}"] for t in run.config.tasks) + 1e-30 for row in rows]
            ax.plot(np.convolve(np.pad(line, 5, "edge"), np.ones(11) / 11, "valid"), label=task)
            ax.legend()
    for key in SCORES:
        score = [row["val"][key] for row in curve]
        if None not in score:
            axes[1, 1].plot([row["step"] for row in curve], score, "o-", label=key)
    axes[1, 1].set(title="Validation", xlabel="step")
    axes[1, 1].legend(*axes[1, 1].get_legend_handles_labels())
    if "cls" in run.config.tasks:
        names, confusion = drawable(data.classification_names), curve[-1]["val"]["confusion"]
        axes[1, 2].imshow(confusion, "Blues", alpha=0.5)
        for (k, guess), count in np.ndenumerate(confusion):
            axes[1, 2].text(guess, k, count, ha="center", va="center")
        axes[1, 2].set(title="Validation images by class (row) and guess")
        axes[1, 2].set_xticks(range(len(names)), names)
        axes[1, 2].set_yticks(range(len(names)), names)
        axes[1, 2].grid(False)
    for ax in axes.flat:
        ax.set_visible(ax.has_data())  # r without GradNorm, shares without a shared trunk: none
    fig.suptitle(f"{run.config.mode}, seed {run.config.seed}")
    return fig

# --------------------------------------------------------------------------------------------------
# 2. Of many runs: comparisons, sweeps, step times
# --------------------------------------------------------------------------------------------------

def draw_plane(results: dict[str, Any]) -> Any:
    """What each joint mode loses or gains against the single tasks: a cross of 95 % intervals."""
    fig, axes = panels(1, 1, (7.4, 5))
    ax, paired = axes[0, 0], {(row["mode"], row["versus"]): row for row in results["paired"]}
    ax.axvspan(-results["level"], results["level"], color="0.92")
    ax.axhspan(-results["level"], results["level"], color="0.92")
    ax.plot(0, 0, "*", color="gold", mec="black", ms=18)
    points = [(paired[mode, "detect"], paired[mode, "classify"]) for mode in COLOUR
              if {(mode, "detect"), (mode, "classify")} <= paired.keys()]
    for x, y in points:
        half, colour = [np.ptp(q["ci95"] or [0]) / 2 for q in (y, x)], COLOUR[x["mode"]]
        near = min(points, key=lambda p: (p[0] is x, abs(p[0]["delta"] - x["delta"])))
        above = (y["delta"], x["delta"]) >= (near[1]["delta"], near[0]["delta"])
        ax.errorbar(x["delta"], y["delta"], *half, "o", c=colour, capsize=3)
        up, va = (1, "bottom") if above else (-1, "top")
        ax.annotate(x["mode"], (x["delta"], y["delta"] + up * half[0]), (0, 4 * up),
                    textcoords="offset points", ha="center", va=va, c=colour)
    ax.set(xlabel="Detection: mAP50-95, less that of `detect`",
           ylabel="Classification: balanced accuracy, less that of `classify`",
           title="Star: as good as alone. Grey: level. Crosses: 95 % intervals over seeds.")
    return fig

def draw_sweep(results: dict[str, Any]) -> Any:
    """Each judged metric over the swept value: a line a mode through its means, a dot a seed."""
    labels, measured = results["labels"], results["modes"].values()
    metrics = [x for x in SCORES if any(x in q for q in measured)] or SCORES  # of no box: no score
    fig, axes = panels(1, len(metrics), (4 * len(metrics), 3.8))
    ticks = list(dict.fromkeys(value for _, key, value in labels if key))
    points = [(mode, x, q) for (mode, key, value), q in zip(labels, measured)
              for x in ([ticks.index(value)] if key else range(len(ticks)))]
    for ax, metric in zip(axes[0], metrics):
        for mode in dict.fromkeys(mode for mode, _, _ in points):
            line = [(x, q[metric]["mean"], q[metric]["per_seed"]) for owner, x, q in points
                    if owner == mode and metric in q]
            c = COLOUR[mode]
            ax.plot([x for x, *_ in line], [mean for _, mean, _ in line], label=mode, c=c)
            for x, _, scores in line:
                ax.plot([x] * len(scores), scores, ".", c=c)
        ax.set_xticks(range(len(ticks)), ticks)
        ax.set(xlabel=results["sweep"].partition("=")[0], title=metric.replace("_", " "))
    axes[0, -1].legend()
    return fig

def draw_weights(results: dict[str, Any]) -> Any:
    """GradNorm's weights and detection's share of the weighted gradients at W, over training."""
    fig, axes = panels(1, 2, (8, 3))
    for key, q in results["trajectories"].items():
        ax = axes[0, int(key == "share_det")]
        ax.plot(q["median"], label=key)
        ax.fill_between(range(len(q["median"])), q["min"], q["max"], alpha=0.25)
        ax.set(title="Detection's share of the gradient at W" if ax is axes[0, 1] else
               "GradNorm's task weights", xlabel="% of training; median and range over seeds")
        ax.legend()
    return fig

def draw_bench(results: dict[str, Any]) -> Any:
    """Time of each variant's step over that of a plain joint step."""
    ratios, (fig, axes) = results["ratios"], panels(1, 1, (7.4, 2.6))
    bars = axes[0, 0].barh(list(ratios), [x["median"] for x in ratios.values()])
    axes[0, 0].bar_label(bars, fmt="%.2f")
    axes[0, 0].set_title("Time of a step over that of a plain joint step")
    return fig
