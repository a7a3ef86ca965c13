"""Draws pictures: plain numbers, names and pixels in, a figure out; imports nothing of ours.

Pictures of images are Pillow's, of numbers matplotlib's; `save` writes either.
"""
import itertools
import math
import re

import numpy as np
from matplotlib import font_manager, rc_context
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image, ImageDraw, ImageFont

# Names are other people's: no text is a formula, whatever its dollars and braces.
styled = rc_context({"text.parse_math": False,
                     "font.family": "DejaVu Sans",
                     "font.size": 9,
                     "axes.spines.top": False,
                     "axes.spines.right": False,
                     "axes.grid": True,
                     "grid.alpha": 0.3,
                     "legend.frameon": False})
FONT = font_manager.findfont("DejaVu Sans")  # comes with matplotlib
TITLE, LABEL = (ImageFont.truetype(FONT, size) for size in (16, 13))  # px
SCORES = {"mAP50-95": "detect", "balanced_accuracy": "classify"}  # and who learns it alone
TASKS = {"det": "detection", "cls": "classification"}
COLOURS = dict(word.split("=") for word in """
    detect=#1f77b4 det=#1f77b4 mAP50-95=#1f77b4
    classify=#ff7f0e cls=#ff7f0e balanced_accuracy=#ff7f0e
    fixed=#8c6d31 tuned=#8c6d31 equal=#222222 gradnorm=#d62728 dual=#2ca02c cap=#0b3d91
    uncertainty=#9467bd pcgrad=#17becf imtl=#e377c2 mgda=#bcbd22 detach=#7f7f7f""".split())

def colour_of(label):
    """The colour of a mode, also with settings behind a colon: the same in all pictures."""
    mode = label.partition(":")[0]
    return COLOURS.get(mode, f"C{sum(map(ord, mode)) % 10}")

def class_colour(k):
    return to_hex(f"C{k % 10}")

def legible(text):
    """The first 50 letters, with a question mark for each that the font lacks."""
    index = font_manager.get_font(FONT).get_char_index  # 0: no such glyph
    letters = [x if x.isprintable() and index(ord(x)) else "?" for x in text[:50]]
    return "".join(letters)

def class_names(names, limit=25):
    """The names, cut; the index of each of which the font lacks a letter."""
    shown = []
    for k, name in enumerate(names):
        text = legible(name)
        whole = text.strip() and name.startswith(text)
        shown.append(text[:limit] if whole else str(k))
    return shown

def panels(count, width, height):
    """A figure and so many axes of that size in inches, without pyplot: no window, no state."""
    columns = 2 if count == 4 else min(count, 3)
    rows = math.ceil(count / columns)
    fig = Figure((columns * width, rows * height), layout="constrained")
    axes = [fig.add_subplot(rows, columns, k + 1) for k in range(count)]
    return fig, axes

@styled
def save(picture, path):
    """Writes the picture as PNG, the same bytes for the same data."""
    if isinstance(picture, Image.Image):
        picture.save(path, compress_level=3)  # in half the time, a tenth larger
    else:
        picture.savefig(path, dpi=110, metadata={"Software": None})

# ----------------------------------------------------------------------------------------------
# 1. Images: what was found on one, the labels of nine
# ----------------------------------------------------------------------------------------------

BAND = 26  # px above an image, for its title

def draw_found(image, boxes, title, side=640):
    """The image, its longer side `side` px, with its boxes, a text at each, and a title above.

    image: Pillow's, or pixels (H, W, 3) uint8. boxes: (class index, (x1, y1, x2, y2) in px of
    the image, text), the best first.
    """
    image = Image.fromarray(np.asarray(image))
    factor = side / max(image.size)
    width, height = (max(1, round(length * factor)) for length in image.size)
    sheet = Image.new("RGB", (max(width, side // 2), BAND + height), "white")
    sheet.paste(image.resize((width, height)), (0, BAND))
    draw = ImageDraw.Draw(sheet)
    draw.text((4, 3), legible(title), "black", TITLE)
    for k, box, text in reversed(boxes):  # the best last, on top
        x1, y1, x2, y2 = np.multiply(box, factor) + [0, BAND, 0, BAND]
        draw.rectangle((x1, y1, x2, y2), None, class_colour(k), 2)
        text = legible(text)
        left = min(x1, sheet.width - LABEL.getlength(text))
        corner = (left, max(BAND, y1 - 17))  # at the upper edge: inside the box
        if text:
            draw.rectangle(draw.textbbox(corner, text, LABEL), class_colour(k))
        draw.text(corner, text, "white", LABEL)
    return sheet

def draw_data(images, boxes, labels, titles, names, classification_names):
    """Nine images of a split, evenly spaced, with their labels; below, the boxes' colours.

    images: pixels (N, H, W, 3). boxes: of each image (n, 5), class, x1 y1 x2 y2 in px. labels:
    its class, below 0 for none. titles: a name for each, or none at all.
    """
    classes = class_names(classification_names)
    tiles = []
    present = set()
    for i in np.unique(np.linspace(0, len(images) - 1, 9).astype(int)):
        title = titles[i] if titles else f"image {i}"
        label = classes[labels[i]] if labels[i] >= 0 else "no class"
        of_image = [(int(k), box, "") for k, *box in boxes[i]]
        present |= {k for k, _, _ in of_image}
        tiles.append(draw_found(images[i], of_image, f"{title[:25]}: {label}", 400))
    width = tiles[0].width + 10
    height = tiles[0].height + 10
    below = math.ceil(len(tiles) / 3) * height
    rows = math.ceil(len(present) / 4)
    sheet = Image.new("RGB", (3 * width, below + 24 * rows), "white")
    for at, tile in enumerate(tiles):
        sheet.paste(tile, (at % 3 * width, at // 3 * height))
    draw = ImageDraw.Draw(sheet)
    shown = class_names(names)
    for at, k in enumerate(sorted(present)):
        corner = (at % 4 * sheet.width // 4 + 4, below + at // 4 * 24)
        draw.text(corner, f"■ {k} {shown[k]}", class_colour(k), TITLE)
    return sheet

# ----------------------------------------------------------------------------------------------
# 2. One run: its curves, and what its classifier took each class for
# ----------------------------------------------------------------------------------------------

CURVES = {"w": "Task weights w",
          "L": "Training losses L, unweighted",
          "G": "Share of the gradient that the trunk follows",
          "a": "Factor a of each gradient",
          "r": "Relative inverse training rates r"}

def smooth(line):
    """At each place the mean of the 11 values about it, of fewer towards the ends."""
    window = np.ones(min(11, len(line)))
    count = np.convolve(np.ones(len(line)), window, "same")
    return np.convolve(line, window, "same") / count

def logged(rows, tasks):
    """{key of CURVES: {task: a value a step}} of what is in the log and moves."""
    curves = {}
    for key in CURVES:
        present = [task for task in tasks if f"{key}/{task}" in rows[0]]
        lines = {task: np.array([row[f"{key}/{task}"] for row in rows]) for task in present}
        if any(np.ptp(line) > 0 for line in lines.values()):
            curves[key] = lines
    if "G" in curves:
        factors = curves.get("a", {})
        followed = {task: G * factors.get(task, 1) for task, G in curves["G"].items()}
        total = sum(followed.values()) + 1e-30
        curves["G"] = {task: line / total for task, line in followed.items()}
    return curves

def draw_confusion(ax, confusion, names):
    """Images by class (row) and guess (column); above 24 classes no numbers, fewer names."""
    confusion = np.array(confusion)
    count = len(confusion)
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)  # of the class's images
    palest = 1.6 * share.max()  # of a scale so long that black numbers are legible
    ax.imshow(share, "Blues", vmin=0, vmax=palest, aspect="auto")
    size = np.clip(130 / count, 5, 9)  # points
    if count <= 24:
        for (k, guess), images in np.ndenumerate(confusion):
            ax.text(guess, k, images, ha="center", va="center", fontsize=size)
    step = math.ceil(count / 24)
    ticks = range(0, count, step)
    shown = class_names(names, 16)[::step]
    ax.set_xticks(ticks, shown, fontsize=size, rotation=90 if count > 3 else 0)
    ax.set_yticks(ticks, shown, fontsize=size)
    ax.set(title="Validation images by class", xlabel="predicted", ylabel="class")
    ax.grid(False)

@styled
def draw_run(rows, tasks, title, classification_names):
    """The curves of one run over its steps, its scores, and its confusion matrix.

    rows: those of metrics.jsonl, the last with `val`. What does not move has no panel.
    """
    curves = logged(rows, tasks)
    steps = [row["step"] for row in rows]
    val = {row["step"]: row["val"] for row in rows if "val" in row}
    fig, axes = panels(len(curves) + 1 + ("cls" in tasks), 4, 3.2)
    scores = axes[len(curves)]
    for ax, (key, lines) in zip(axes, curves.items()):
        for task, line in lines.items():
            line = line if key == "w" else smooth(line)
            ax.plot(steps, line, c=colour_of(task), label=TASKS.get(task, task))
        ax.set(title=CURVES[key], xlabel="step", ylim=(0, None))
        ax.legend()
    for metric in SCORES:
        line = np.array([x[metric] for x in val.values()], float)  # NaN: no labels
        if np.isfinite(line).any():
            scores.plot(val.keys(), line, "o-", ms=4, c=colour_of(metric), label=metric)
            scores.legend()
    scores.set(title="Validation", xlabel="step", xlim=(0, steps[-1] + 1), ylim=(0, 1))
    if "cls" in tasks:
        draw_confusion(axes[-1], rows[-1]["val"]["confusion"], classification_names)
    fig.suptitle(f"{legible(title)} (training curves, w aside: means of 11 steps)")
    return fig

# ----------------------------------------------------------------------------------------------
# 3. Many runs: the plane of differences, sweeps, the mechanism, step times
# ----------------------------------------------------------------------------------------------

REACH = np.array([0.3, 0.1])  # of either score: what loses more stands at the plane's edge
LEVEL = 0.02  # a loss within it is small

def place_names(ax, names):
    """Writes each (x, y, text, colour) near its point, where it covers the least."""
    ax.figure.draw_without_rendering()  # from here on all has its place in px
    frame = ax.get_window_extent()
    paths = [part.get_path() for part in ax.lines]
    for part in ax.collections:
        paths += part.get_paths()
    paths = [ax.transData.transform_path(path) for path in paths]
    points = ax.transData.transform([name[:2] for name in names])
    taken = [Bbox.from_extents(*point - 6, *point + 6) for point in points]
    taken += [part.get_window_extent() for part in [ax.get_legend()] if part]
    for point, (*xy, text, colour) in zip(points, names):
        leader = {"arrowstyle": "-", "color": colour, "shrinkB": 6}
        name = ax.annotate(text, xy, (0, 0), textcoords="offset points", color=colour,
                           ha="center", va="center", arrowprops=leader)
        half = Text.get_window_extent(name).size / 2
        options = []
        for far, *turn in itertools.product(range(6, 120, 9), (1, -1, 0), (1, -1, 0)):
            centre = point + (half + far) * turn
            box = Bbox.from_extents(*centre - half, *centre + half)
            covered = box.count_overlaps(taken)
            covered += sum(path.intersects_bbox(box, filled=False) for path in paths)
            cut = sum(not frame.contains(*corner) for corner in (box.min, box.max))
            options.append((far + 50 * covered + 500 * cut, centre, box))
        _, centre, box = min(options, key=lambda option: option[0])
        taken.append(box)
        name.xyann = (centre - point) * 72 / ax.figure.dpi  # points

def weight_of(label):
    """x where a label stands for the fixed weights (1, x), else 0."""
    found = re.fullmatch(r"fixed:initial_weights=1,([\d.e-]+)", label)
    return float(found[1]) if found else float(label == "equal")

def name_of(label):
    """A label as a picture shows it: cap 0.5, gradnorm alpha=3, fixed weights as (1, x)."""
    if ":" in label and weight_of(label):
        return f"(1, {weight_of(label):g})"
    mode, *settings = label.split(":")
    if len(settings) > 1:  # of several the values alone
        settings = [setting.partition("=")[2] for setting in settings]
    settings = [setting.removeprefix(f"{mode}=") for setting in settings]
    return legible(f"{mode} {', '.join(settings)}".strip())

def find_pairs(paired):
    """{label: its rows versus `detect` and versus `classify`}, where it has both."""
    rows = {(row["mode"], row["versus"], row["metric"]): row for row in paired}
    pairs = {}
    for label, _, _ in rows:
        pair = [rows.get((label, single, metric)) for metric, single in SCORES.items()]
        if all(pair):
            pairs[label] = pair
    return pairs

def mark_edge(ax, at):
    """Ends the view as it is, and marks what lies left of it or below; what to name there."""
    low, high = np.transpose([ax.get_xlim(), ax.get_ylim()])
    ax.autoscale(False)
    names = []
    for side, marker in enumerate("<v"):
        beyond = {label: xy for label, xy in at.items() if np.argmin(xy) == side}
        places = [np.clip(xy, low, high) for xy in beyond.values()]
        for label, place in zip(beyond, places):
            ax.plot(*place, marker, c=colour_of(label), ms=8, clip_on=False)
        task = ("detection", "classification")[side]
        lines = [f"{name_of(label)}: {task} {xy[side]:+.2f}" for label, xy in beyond.items()]
        if lines:
            names.append((*np.mean(places, 0), "\n".join(lines), "0.3"))
    return names

@styled
def draw_plane(results):
    """What each joint mode loses or gains against the single tasks, with its 95 % intervals.

    Zoomed to the modes that lose little of both; the others are named at the edge. Open: a mode
    with settings of its own. A line joins the fixed weights (1, x) in the order of x.
    """
    fig, (ax,) = panels(1, 8, 5.6)
    pairs = find_pairs(results["paired"])
    at = {label: [row["delta"] for row in pair] for label, pair in pairs.items()}
    inside = [label for label in at if (at[label] >= -REACH).all()]
    names = [(0, 0, "alone", "black")]
    ax.plot(0, 0, "*", c="gold", mec="black", ms=16)
    for label in inside:
        x_half, y_half = (np.ptp(row["ci95"] or [0]) / 2 for row in pairs[label])
        colour = colour_of(label)
        face = "white" if ":" in label else colour
        ax.errorbar(*at[label], y_half, x_half, "o", c=colour, mfc=face, capsize=3)
        names.append((*at[label], name_of(label), colour))
    ax.margins(0.1)
    names += mark_edge(ax, {label: at[label] for label in at if label not in inside})
    curve = sorted((weight_of(label), *at[label]) for label in at if weight_of(label))
    if len(curve) > 1:
        _, x, y = zip(*curve)
        ax.plot(x, y, ":", c=COLOURS["fixed"], label="fixed weights (1, x)")
    ax.autoscale(False)
    if any(":" in label for label in inside):
        ax.plot([], [], "o", c="0.3", mfc="white", label="open: not the shipped setting")
    ax.fill_between([-LEVEL, 1], -LEVEL, 1, color="0.93",
                    label=f"at most {LEVEL:g} lost on either")
    ax.legend(loc="lower left")
    title = "Trained together minus trained alone, with 95 % intervals over seeds"
    if not at:
        title = "Nothing to show: no mode was compared with detect and with classify."
    ax.set(title=title, xlabel="Detection: mAP50-95, minus that of detect alone",
           ylabel="Classification: balanced accuracy, minus that of classify alone")
    place_names(ax, names)
    return fig

@styled
def draw_sweep(results):
    """Both scores over the swept value: a line a mode through its means, a dot a seed.

    A mode that does not read the swept key has one score at all values; broken: a mode with
    settings of its own.
    """
    ticks = list(results["sweep"]["values"])
    fig, axes = panels(2, 4.2, 3.6)
    for ax, metric in zip(axes, SCORES):
        lines = {}
        for cell in results["cells"]:
            line = lines.setdefault(cell["mode"], {})
            values = [cell["value"]] if cell["value"] else ticks
            q = results["modes"][cell["label"]].get(metric)
            if q:
                line |= {ticks.index(value): q for value in values}
        for mode, line in lines.items():
            colour = colour_of(mode)
            means = [q["mean"] for q in line.values()]
            style = "--" if ":" in mode else "-"
            ax.plot(line.keys(), means, style, c=colour, label=name_of(mode))
            for x, q in line.items():
                ax.plot([x] * len(q["per_seed"]), q["per_seed"], ".", c=colour)
        ax.set_xticks(range(len(ticks)), map(legible, ticks))
        ax.set(title=metric, xlabel=results["sweep"]["key"])
    fig.legend(*ax.get_legend_handles_labels(), loc="outside right upper")
    return fig

@styled
def draw_trajectories(results):
    """Over training, at W: cosine of the tasks' gradients, detection's share of them; weights.

    Lines are medians over seeds, bands their range; broken: a mode with settings of its own.
    """
    modes = results["trajectories"]
    titles = ["Cosine of the tasks' gradients at W", "Detection's share of the gradient at W"]
    if any("w_det" in quantities for quantities in modes.values()):
        titles.append("GradNorm's weights")
    fig, axes = panels(len(titles), 4.2, 3.6)
    for label, quantities in modes.items():
        for key, ends in quantities.items():
            kind, _, task = key.partition("_")
            of_task = kind == "w"
            colour = colour_of(task if of_task else label)
            name = TASKS[task] if of_task else name_of(label)
            style = "--" if ":" in label else "-"
            ax = axes[("cosine", "share", "w").index(kind)]
            percent = np.linspace(0, 100, len(ends["median"]))
            ax.plot(percent, ends["median"], style, c=colour, label=name)
            ax.fill_between(percent, ends["min"], ends["max"], color=colour, alpha=0.05, lw=0)
    for ax, title in zip(axes, titles):
        ax.set(title=title, xlabel="% of training")
    axes[0].axhline(0, c="black", lw=1)
    axes[1].set_ylim(0, 1)
    if len(axes) > 2:
        handles, texts = axes[2].get_legend_handles_labels()
        once = {}  # each task, however many modes: the first
        for text, handle in zip(texts, handles):
            once.setdefault(text, handle)
        axes[2].legend(once.values(), once.keys())
    fig.legend(*axes[1].get_legend_handles_labels(), loc="outside right upper")
    return fig

@styled
def draw_bench(results):
    """Median time of each variant's step over that of a plain joint step."""
    ratios = {name.removesuffix("/fixed"): q["median"] for name, q in results["ratios"].items()}
    fig, (ax,) = panels(1, 7.4, 1 + 0.3 * len(ratios))
    names = [legible(name) for name in ratios]
    colours = [colour_of(name) for name in ratios]
    bars = ax.barh(names, ratios.values(), color=colours)
    ax.bar_label(bars, fmt="%.2f", padding=3)
    ax.axvline(1, c="black", lw=1)
    ax.grid(False)
    ax.invert_yaxis()  # the first on top
    ax.set_title("Time of a step over that of a plain joint step")
    return fig
