"""jointgrad: does a classifier's gradient hurt the detector that shares its trunk, and which remedy works at what cost?

One network learns object detection and image-level classification together. This file trains it under fixed weights,
equal weights and GradNorm, beside single-task references and two independent networks, and compares them over seeds:

    python jointgrad.py --mode gradnorm            # built-in synthetic data, under a minute on one CPU core

GradNorm (Chen et al., ICML 2018) as `GradNorm.update` computes it, in the paper's letters:

    n_i = ||grad_W L_i||                  G_i = w_i n_i = ||grad_W w_i L_i||        G_bar = mean(G)
    L_tilde_i = L_i / L_i(0)              r_i = L_tilde_i / mean(L_tilde)           target_i = G_bar r_i^alpha
    L_grad = sum |G_i - target_i|         dL_grad/dw_i = sign(G_i - target_i) n_i   w <- w T / sum(w)

    code       paper    meaning
    T          T        number of tasks
    w          w_i      task weights (T,)
    L, L0      L_i      losses (T,), their first values
    L_tilde    L~_i     L / L0: the inverse training rate (small = trained fast)
    r          r_i      relative inverse training rate
    n, G       G_W      gradient norms at W of L_i and of w_i L_i
    W          W        kernel of the last convolution of the shared trunk
    alpha      alpha    strength of the pull towards equal training rates
    P3, P4, P5          feature maps of stride 8, 16, 32 px

Departures, each marked where it stands:
- GradNorm: the weights keep a floor w_min (as published they go negative on the paper's own toy problem).
- GradNorm: a step on which a task has no labels leaves the weights' gradient at zero.
- YOLOv5: BatchNorm momentum 0.1, AdamW, class gain 1.0, no weight average: for runs of a few hundred steps.
- YOLOv5: duplicate objectness targets take the largest IoU, so that the result does not depend on the order of writing.
- YOLOv5: non-maximum suppression looks at the 512 best candidates of an image.
- COCO: average precision counts max_det (300) detections an image, not 100.

Sources: Chen, Badrinarayanan, Lee, Rabinovich, arXiv 1711.02257 (GradNorm); Jocher et al., YOLOv5 v6 (design only);
Zheng et al., arXiv 1911.08287 (CIoU); Hu et al., arXiv 1709.01507 (SE); Woo et al., arXiv 1807.06521 (CBAM).
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import io
import itertools
import json
import math
import os
import platform
import resource
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Iterator, NamedTuple, get_type_hints

# Idle OpenMP threads that spin make a step up to 20 times slower on a shared machine; read once, when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what torch asks for to be deterministic on CUDA

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import yaml  # noqa: E402
from PIL import Image, ImageDraw, ImageFont, ImageOps  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

ROOT = Path(__file__).resolve().parent
TASKS = {"detect": ("det",), "classify": ("cls",)}  # every other mode learns both
MODES = ("detect", "classify", "fixed", "equal", "gradnorm", "dual")

# ----------------------------------------------------------------------------------------------------------------------
# 1. Config: config.yaml and --set -> one frozen, checked Config
# ----------------------------------------------------------------------------------------------------------------------


class UserError(ValueError):
    """A mistake in the user's input, told in one line: what was found, where, what was expected, how to mend it."""


@dataclass(frozen=True)
class Config:
    """Every setting, typed and with its range or choices; the values and their meaning stand in config.yaml alone."""

    mode: Annotated[str, *MODES]
    data: str
    seed: Annotated[int, 0, 2**31]
    device: Annotated[str, "auto", "cpu", "cuda", "mps"]
    threads: Annotated[int, 1, 256]
    amp: Annotated[str, "none", "bf16"]
    imgsz: Annotated[int, 32, 4096]
    dominance: Annotated[float, 0, 1]
    train_images: Annotated[int, 2, 10**6]
    val_images: Annotated[int, 2, 10**6]
    cache_mb: Annotated[float, 0, 1e6]
    workers: Annotated[int, 0, 64]
    flip_x: Annotated[float, 0, 1]
    flip_y: Annotated[float, 0, 1]
    scale: Annotated[float, 0, 0.9]
    shift: Annotated[float, 0, 0.5]
    anchors: object
    anchor_thres: Annotated[float, 1, 100]
    width_multiple: Annotated[float, 0.03125, 4]
    depth_multiple: Annotated[float, 0.1, 4]
    dual_width_multiple: Annotated[float, 0.03125, 4]
    batchnorm_momentum: Annotated[float, 0.001, 1]
    dropout: Annotated[float, 0, 0.9]
    box_gain: Annotated[float, 0, 100]
    obj_gain: Annotated[float, 0, 100]
    cls_gain: Annotated[float, 0, 100]
    det_loss_times_batch: bool
    class_balance: bool
    initial_weights: Annotated[tuple, 1e-6, 1e6]
    alpha: Annotated[float, -10, 10]
    gradnorm_lr: Annotated[float, 1e-6, 1]
    w_min: Annotated[float, 0, 0.5]
    epochs: Annotated[int, 1, 10**6]
    batch_size: Annotated[int, 2, 4096]
    lr: Annotated[float, 1e-8, 1]
    dual_lr: Annotated[float, 1e-8, 1]
    betas: Annotated[tuple, 0, 0.9999]
    weight_decay: Annotated[float, 0, 1]
    warmup: Annotated[float, 0, 1]
    grad_clip: Annotated[float, 1e-3, 1e6]
    progressive_share: Annotated[float, 0, 1]
    progressive_scale: Annotated[float, 0.1, 1]
    eval_interval: Annotated[int, 1, 10**6]
    conf_thres: Annotated[float, 0, 1]
    iou_thres: Annotated[float, 0, 1]
    max_det: Annotated[int, 1, 1000]
    predict_conf: Annotated[float, 0, 1]

    @property
    def tasks(self) -> tuple[str, ...]:
        return TASKS.get(self.mode, ("det", "cls"))

    @property
    def weights(self) -> tuple[float, ...]:
        """The loss weights at step 0, one for each of `tasks`."""
        return self.initial_weights if self.mode in ("fixed", "gradnorm") else (1.0,) * len(self.tasks)


def read_yaml(path: Path) -> Any:
    """The content of a YAML file by safe_load; UserError for a file that is absent, malformed, huge or an alias bomb."""
    try:
        if path.stat().st_size > 2**20:
            raise UserError(f"{path}: larger than 1 MB, expected a short YAML file of settings")
        text = path.read_text(encoding="utf-8-sig")
        if sum(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)) > 20:
            raise UserError(f"{path}: more than 20 YAML aliases; write the values out")
        return yaml.safe_load(text)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); give the path of a YAML file") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        mark = getattr(error, "problem_mark", None)
        raise UserError(f"{path}{f':{mark.line + 1}' if mark else ''}: not plain YAML "
                        f"({getattr(error, 'problem', None) or type(error).__name__})") from error


def _number(value: Any, kind: type) -> float | int:
    """`value` as `kind` by what it means, not by YAML's guess: `1e-3` is a number, `no` and `2.5` are no int."""
    if isinstance(value, bool):
        raise ValueError
    number = float(value)
    if not math.isfinite(number) or kind is int and number != int(number):
        raise ValueError
    return int(value) if kind is int and isinstance(value, (int, str)) and str(value).isdigit() else kind(number)


def _coerce(key: str, value: Any, hint: Any) -> Any:
    kind, limits = getattr(hint, "__origin__", hint), getattr(hint, "__metadata__", ())
    if kind is str:
        expected = " | ".join(limits) or "text"
        if isinstance(value, str) and (value in limits or not limits):
            return value
    elif kind is bool:
        expected = "true or false"
        if str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
    elif key == "anchors":
        expected = "auto, or 3 levels of 3 [width, height] in px"
        with contextlib.suppress(ValueError, TypeError):
            if value == "auto" or np.asarray(value, float).shape == (3, 3, 2) and np.min(value) > 0:
                return value
    else:
        low, high = limits
        expected = f"{'two numbers' if kind is tuple else 'a whole number' if kind is int else 'a number'}" \
                   f" from {low:g} to {high:g}"
        with contextlib.suppress(ValueError, TypeError, OverflowError):
            parts = value.split(",") if kind is tuple and isinstance(value, str) else value
            numbers = tuple(_number(v, float if kind is tuple else kind) for v in (parts if kind is tuple else [parts]))
            if len(numbers) == (2 if kind is tuple else 1) and all(low <= v <= high for v in numbers):
                return numbers if kind is tuple else numbers[0]
    raise UserError(f"config key {key}: found {str(value)[:80]!r}, expected {expected}")


def make_config(values: Any, where: str = "config") -> Config:
    """A checked Config from a mapping that holds exactly its keys; UserError names the key, the value and the range."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected lines of 'key: value', found {type(values).__name__}")
    hints = get_type_hints(Config, include_extras=True)
    for key in values:
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.4)
            raise UserError(f"{where}: unknown key {str(key)[:60]!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    missing = [key for key in hints if key not in values]
    if missing:
        raise UserError(f"{where}: missing key {missing[0]!r}; start from the shipped config.yaml")
    config = Config(**{key: _coerce(key, values[key], hint) for key, hint in hints.items()})
    if config.imgsz % 32:
        raise UserError(f"config key imgsz: found {config.imgsz}, expected a multiple of 32 (the stride of P5)")
    return config


def load_config(path: Path, overrides: list[str] = (), **fields: Any) -> Config:
    """The Config of a YAML file, laid over the shipped one, with `key=value` overrides and then `fields` that are set."""
    values = read_yaml(ROOT / "config.yaml")
    given = read_yaml(path)
    make_config(values | given if isinstance(given, dict) else given, str(path))
    values |= given
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text}: expected key=value, as in --set epochs=3")
        try:
            values |= {key.strip(): yaml.safe_load(value)}
        except yaml.YAMLError as error:
            raise UserError(f"--set {text[:80]}: the value is not plain YAML") from error
    return make_config(values | {key: value for key, value in fields.items() if value is not None}, "--set")


# ----------------------------------------------------------------------------------------------------------------------
# 2. Synthetic data: (seed, split, i) -> one echocardiogram-like frame, its jets and its view
# ----------------------------------------------------------------------------------------------------------------------

JETS = {"AR": 5, "MR": 230, "PR": 55, "TR": 160}  # valve whose leak a jet shows: hue of its colour Doppler, degrees
VIEWS = ("PSAX", "PLAX", "A4C")


def speckle(rng: np.random.Generator, shape: tuple[int, int], s: float, a: float = 1) -> np.ndarray:
    """Speckle amplitude (H, W), mean 1: complex white noise under a Gaussian, a*s px across, s down."""
    noise = rng.standard_normal((2, *shape))
    fx, fy = np.fft.fftfreq(shape[1])[None], np.fft.fftfreq(shape[0])[:, None]
    H = np.exp(-2 * np.pi**2 * ((a * s * fx) ** 2 + (s * fy) ** 2))
    amplitude = np.abs(np.fft.ifft2(np.fft.fft2(noise[0] + 1j * noise[1]) * H))
    return amplitude / amplitude.mean()


def hsv_to_rgb(h: np.ndarray, s: float, v: np.ndarray) -> np.ndarray:
    """RGB (..., 3) in [0, 1] of a hue in degrees, a saturation and a value."""
    k = (np.array([5.0, 3.0, 1.0]) + h[..., None] / 60) % 6
    return v[..., None] * (1 - s * np.clip(np.minimum(k, 4 - k), 0, 1))


def place_jets(rng: np.random.Generator, apex: np.ndarray, radius: float, angle: float) -> np.ndarray:
    """One to three boxes (n, 4), cx cy w h in fractions, apart and inside the sector of that half-angle."""
    size, centre = rng.uniform((0.14, 0.18), (0.30, 0.38), (300, 2)), rng.uniform(0.1, 0.95, (300, 2))
    size[200:] = 0.14, 0.18  # so that the narrowest sector too has room for one
    corners = centre[:, None] + np.array([[-1, -1], [1, -1], [-1, 1], [1, 1]]) * size[:, None] / 2
    x, y = (corners - apex).transpose(2, 0, 1)  # (300, 4)
    inside = (np.hypot(x, y) < radius) & (np.abs(np.arctan2(x, y)) < angle) & (corners < 1).all(2)
    boxes, wanted = [], rng.integers(1, 4)
    for box in np.concatenate([centre, size], 1)[inside.all(1)]:
        if all((np.abs(box - b)[:2] > (box + b)[2:] / 2).any() for b in boxes):
            boxes.append(box)
        if len(boxes) == wanted:
            break
    return np.array(boxes).reshape(-1, 4)


def paint_jet(rng: np.random.Generator, image: np.ndarray, box: np.ndarray, hue: float) -> None:
    """Paints one Doppler plume that touches all sides of `box` (cx cy w h, fractions) into (H, W, 3)."""
    size = len(image)
    low, high = np.floor((box[:2] - box[2:] / 2) * size), np.ceil((box[:2] + box[2:] / 2) * size)
    (x1, y1), (x2, y2) = low.astype(int), high.astype(int)
    x, y = (np.arange(x1, x2) + 0.5)[None] / size, (np.arange(y1, y2) + 0.5)[:, None] / size
    q = 2 * (y - box[1]) / box[3] * rng.choice([-1, 1])
    u = 2 * (x - box[0]) / box[2] * math.sqrt(5 / 6)  # widest at q = 2/3, where it reaches the sides
    width = np.sqrt(np.clip((q + 1) / 2, 0, 1) * np.clip(3 * (1 - q), 0, 1))
    core = np.clip(1 - np.abs(u) / np.maximum(width, 1e-6), 0, 1)
    tex = speckle(rng, core.shape, 0.9 * size / 64)
    colour = hsv_to_rgb((hue + 15 * (tex - 1)) % 360, 0.85, np.clip(0.30 + 0.5 * core * tex, 0, 1))
    alpha = 0.9 * (np.abs(u) < width)[..., None]
    image[y1:y2, x1:x2] += alpha * (colour - image[y1:y2, x1:x2])


def synthetic_sample(seed: int, split: str, i: int, imgsz: int, c: float) -> tuple[np.ndarray, np.ndarray, int]:
    """Frame i: pixels (H, W, 3) uint8, jets (n, 5) class cx cy w h in [0, 1], view 0 to 2.

    A pure function of its arguments. The dominance c moves the view's cue from the sector's angle (g) to the grain of
    the speckle (t); since the two variances add up to one, the best possible accuracy is 0.970 at every c.
    """
    rng = np.random.default_rng([seed, ("train", "val").index(split), i])
    view = int(rng.integers(3))
    g, t = np.sqrt([1 - c, c]) * (view - 1) + 0.25 * rng.standard_normal(2)
    apex = np.array([0.5, -0.02]) + rng.uniform((-0.04, -0.03), (0.04, 0.03))
    radius, half_angle = rng.uniform(0.92, 1.04), 0.62 + 0.13 * g
    x, y = np.meshgrid(*[(np.arange(imgsz) + 0.5) / imgsz] * 2)
    distance, angle = np.hypot(x - apex[0], y - apex[1]), np.arctan2(x - apex[0], y - apex[1])
    sector = (distance > 0.05) & (distance < radius) & (np.abs(angle) < half_angle)
    px = imgsz / 64
    tissue = 0.16 + 0.10 * np.clip(speckle(rng, (imgsz, imgsz), 7 * px) - 0.6, 0, 2)
    for _ in range(rng.integers(1, 3)):  # dark chambers
        centre, axes = rng.uniform((0.3, 0.3), (0.7, 0.8)), rng.uniform(0.06, 0.16, 2)
        tissue[((x - centre[0]) / axes[0]) ** 2 + ((y - centre[1]) / axes[1]) ** 2 < 1] *= 0.25
    grain = speckle(rng, (imgsz, imgsz), 0.9 * px * 1.4**t, 1.6)
    luminance = tissue * grain * rng.uniform(0.8, 1.2) * (1 - 0.25 * y)
    image = np.repeat(luminance[..., None], 3, axis=2)
    boxes = place_jets(rng, apex, radius, half_angle)
    classes = rng.integers(0, len(JETS), len(boxes))
    for box, k in zip(boxes, classes):
        paint_jet(rng, image, box, list(JETS.values())[k])
    image = (image + rng.normal(0, 0.01, (imgsz, imgsz, 1))) * sector[..., None]
    pixels = np.round(255 * np.clip(image, 0, 1) ** 0.75).astype(np.uint8)
    return pixels, np.column_stack([classes, boxes]).astype(np.float32), view


# ----------------------------------------------------------------------------------------------------------------------
# 3. Joint data: a YOLO folder with an image class -> checked arrays -> batches
# ----------------------------------------------------------------------------------------------------------------------

FORMATS = ("JPEG", "MPO", "PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM", "JPEG2000")  # raster formats; none runs a program
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm", ".jp2"}
NO_LABEL = -100  # an image without a class; cross_entropy's ignore_index


class Batch(NamedTuple):
    """images (B, 3, H, W), targets (N, 6) image index, class, cx, cy, w, h in [0, 1], labels (B,)."""

    images: Tensor
    targets: Tensor
    labels: Tensor


def parse_row(fields: list[float], num_classes: int, num_labels: int) -> int | list[float] | None:
    """What one label row says: an image class (int), a box [class, cx, cy, w, h], or None for a box of no size.

    A row that is one-hot over `num_labels` values is the class even where it is as long as a box or polygon row: such a
    row has no size, so it is no box. Raises ValueError with what was expected.
    """
    if num_labels and (len(fields) == num_labels or len(fields) == 1):
        if len(fields) == num_labels and sorted(fields) == [0] * (num_labels - 1) + [1]:
            return fields.index(1)
        if len(fields) == 1 and fields[0] in range(num_labels):
            return int(fields[0])
        if len(fields) < 5:
            raise ValueError(f"no image class: expected one-hot of {num_labels} values, or an index below {num_labels}")
    if len(fields) < 5 or len(fields) > 5 and (len(fields) < 7 or len(fields) % 2 == 0):
        kinds = f", or an image class (one-hot of {num_labels} values or an index)" if num_labels else ""
        raise ValueError(f"{len(fields)} values: expected a box (class xc yc w h), a polygon (class x1 y1 x2 y2 x3 y3 …)"
                         + kinds)
    if fields[0] not in range(num_classes):
        raise ValueError(f"box class {fields[0]:g}: expected a whole number from 0 to {num_classes - 1}")
    if not all(0 <= v <= 1 for v in fields[1:]):
        raise ValueError("expected fractions of the image's width and height, from 0 to 1 (divide pixels by the size)")
    if len(fields) > 5:
        xs, ys = fields[1::2], fields[2::2]
        fields = [fields[0], (min(xs) + max(xs)) / 2, (min(ys) + max(ys)) / 2, max(xs) - min(xs), max(ys) - min(ys)]
    return fields if fields[3] > 0 and fields[4] > 0 else None


def parse_labels(text: str, where: str, num_classes: int, num_labels: int) -> tuple[np.ndarray, int, list, list]:
    """Boxes (n, 5), image class or NO_LABEL, errors and warnings (each one line with file and line number)."""
    boxes, labels, errors, warnings = [], [], [], []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            fields = [float(v) for v in line.split()]
            if not all(map(math.isfinite, fields)):
                raise ValueError("expected finite numbers")
            row = parse_row(fields, num_classes, num_labels)
        except ValueError as error:
            reason = "expected numbers with spaces between them" if "could not" in str(error) else error
            errors.append(f"{where}:{number}: {line.strip()[:60]!r}: {reason}")
            continue
        if isinstance(row, int):
            labels.append(row)
            if len(labels) == 2:
                errors.append(f"{where}:{number}: a second image class: expected one row; delete the wrong one")
        elif row is None:
            warnings.append(f"{where}:{number}: a box of no size is skipped")
        else:
            boxes.append(row)
    boxes = np.array(boxes, np.float32).reshape(-1, 5)
    corners = np.concatenate([boxes[:, 1:3] - boxes[:, 3:] / 2, boxes[:, 1:3] + boxes[:, 3:] / 2], 1)
    if (np.abs(corners - corners.clip(0, 1)) > 1e-3).any():
        warnings.append(f"{where}: boxes that reach outside the image are cut at its border")
    corners = corners.clip(0, 1)
    boxes[:, 1:] = np.concatenate([corners[:, :2] + corners[:, 2:], 2 * (corners[:, 2:] - corners[:, :2])], 1) / 2
    return np.unique(boxes, axis=0), labels[0] if labels else NO_LABEL, errors, warnings


def read_label_file(path: Path, num_classes: int, num_labels: int) -> tuple[np.ndarray, int, list, list]:
    """`parse_labels` of a file; an absent file means an image without objects, which is said in a warning."""
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
        if "\0" in text:
            raise UnicodeDecodeError("utf-8", raw, raw.index(0), 1, "zero byte")
    except FileNotFoundError:
        return np.zeros((0, 5), np.float32), NO_LABEL, [], [f"{path}: no such label file: an image without objects"]
    except UnicodeDecodeError as error:
        return np.zeros((0, 5), np.float32), NO_LABEL, [f"{path}: not UTF-8 text (byte {error.start}): save as UTF-8"], []
    except OSError as error:
        return np.zeros((0, 5), np.float32), NO_LABEL, [f"{path}: cannot be read ({error.strerror})"], []
    boxes, label, errors, warnings = parse_labels(text, str(path), num_classes, num_labels)
    if num_labels and label == NO_LABEL and not errors:
        warnings.append(f"{path}: no image class: left out of the classification task")
    return boxes, label, errors, warnings


@contextlib.contextmanager
def image_errors(path: Path) -> Iterator[None]:
    """Turns whatever Pillow raises on a bad image into a UserError that names the file."""
    import warnings
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{path}: more than {Image.MAX_IMAGE_PIXELS:,} pixels; cut it into tiles") from error
    except (OSError, ValueError, SyntaxError, MemoryError, EOFError, TypeError, IndexError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not a readable image ({str(error)[:80]}); expected one of {', '.join(FORMATS)}") from error


def image_size(path: Path) -> tuple[int, int]:
    """Width and height as shown (after EXIF rotation), from the header alone."""
    with image_errors(path), Image.open(path, formats=FORMATS) as image:
        if image.mode == "F":
            raise UserError(f"{path}: floating-point pixels have no known range; save it as 8 or 16 bit")
        return image.size[::-1] if image.getexif().get(0x0112) in (5, 6, 7, 8) else image.size


def read_image(path: Path) -> Image.Image:
    """The image as 8-bit RGB, upright; grey, palette, RGBA, CMYK and 16-bit grey are converted."""
    with image_errors(path), Image.open(path, formats=FORMATS) as image:
        image.load()
        if image.mode.startswith("I"):  # 16-bit grey: Pillow's convert would clip at 255 instead of scaling
            image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
        return ImageOps.exif_transpose(image).convert("RGB")


def canvas_size(sizes: list[tuple[int, int]], imgsz: int) -> tuple[int, int]:
    """Least height and width, multiples of 32, that hold all images scaled to a longest side of imgsz."""
    scaled = [(max(1, round(w * imgsz / max(w, h))), max(1, round(h * imgsz / max(w, h)))) for w, h in sizes]
    return tuple(math.ceil(max(s[k] for s in scaled) / 32) * 32 for k in (1, 0))


def fit(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int, int, int]:
    """left, top, width, height in px of an image of `size` (w, h) centred on the canvas (H, W), aspect kept."""
    scale = min(canvas[1] / size[0], canvas[0] / size[1])
    w, h = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    return (canvas[1] - w) // 2, (canvas[0] - h) // 2, w, h


def letterbox(image: Image.Image, canvas: tuple[int, int]) -> np.ndarray:
    """Pixels (H, W, 3) uint8 of an RGB image on a grey canvas."""
    left, top, w, h = fit(image.size, canvas)
    sheet = Image.new("RGB", canvas[::-1], (114, 114, 114))
    sheet.paste(image.resize((w, h), Image.Resampling.BILINEAR), (left, top))
    return np.asarray(sheet)


class JointSet(torch.utils.data.Dataset):
    """One split: boxes and image classes in memory, pixels too (uint8) where they fit, else read on the fly."""

    def __init__(self, boxes: list[np.ndarray], labels: list[int], names: list[str], classification_names: list[str],
                 canvas: tuple[int, int], pixels: np.ndarray | None = None, paths: list[Path] = ()):
        self.boxes, self.labels, self.names, self.classification_names = boxes, labels, names, classification_names
        self.canvas, self.pixels, self.paths, self.warnings = canvas, pixels, paths, []

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> Batch:
        """A batch of uint8 images in channels_last order."""
        pixels = (self.pixels[indices] if self.pixels is not None
                  else np.stack([letterbox(read_image(self.paths[i]), self.canvas) for i in indices]))
        rows = [np.column_stack([np.full(len(self.boxes[i]), b), self.boxes[i]]) for b, i in enumerate(indices)]
        targets = torch.from_numpy(np.concatenate(rows).astype(np.float32))
        labels = torch.tensor([self.labels[i] for i in indices])
        return Batch(torch.from_numpy(pixels).permute(0, 3, 1, 2), targets, labels)  # (B, 3, H, W)

    def cache(self, megabytes: float) -> None:
        """Decodes every image once if the set fits into `megabytes`."""
        if len(self) * math.prod(self.canvas) * 3 <= megabytes * 2**20:
            self.pixels = np.stack([letterbox(read_image(path), self.canvas) for path in self.paths])


def _names(spec: dict, key: str, where: Path) -> list[str]:
    """Class names from a list or a mapping of 0, 1, … to names."""
    names = spec.get(key)
    if isinstance(names, dict):
        if sorted(names, key=str) != sorted(range(len(names)), key=str):
            raise UserError(f"{where}: {key}: expected the numbers 0 to {len(names) - 1} without a gap")
        names = [names[i] for i in range(len(names))]
    if not isinstance(names, list) or not names or not all(isinstance(n, (str, int)) for n in names):
        raise UserError(f"{where}: {key}: expected a list of names, or a mapping 0: name, 1: name, …")
    if any(isinstance(n, bool) for n in names) or len(set(map(str, names))) < len(names):
        raise UserError(f"{where}: {key}: a name is given twice, or is a bare yes/no/true/false; put it in quotes")
    return list(map(str, names))


def find_images(entry: Any, root: Path, where: str) -> tuple[list[Path], list[str]]:
    """Image files of a split (a folder, a .txt list, or a list of these), sorted, and errors."""
    if not isinstance(entry, (str, list)) or not entry:
        return [], [f"{where}: expected a folder or a .txt list below {root}, found {entry!r}"]
    files, errors = [], []
    for part in entry if isinstance(entry, list) else [entry]:
        path = root / str(part)
        if not isinstance(part, str) or "://" in part or "\0" in part or not path.exists():
            errors.append(f"{where}: {str(part)[:80]!r} is no folder or file below {root}")
        elif path.is_dir():
            found = [Path(folder) / name for folder, _, names in os.walk(path) for name in sorted(names)]
            files += [f for f in found if f.suffix.lower() in SUFFIXES and not f.name.startswith(".")]
        else:
            try:
                lines = path.read_text(encoding="utf-8-sig").splitlines()
            except (OSError, UnicodeDecodeError):
                errors.append(f"{where}: {part!r}: expected a text file with one image path a line")
                continue
            files += [(path.parent if line.startswith("./") else root) / line.strip() for line in lines if line.strip()]
    for file in files:
        try:
            if not file.resolve(strict=True).is_relative_to(root.resolve()):
                errors.append(f"{file}: lies outside the data set {root}; copy it in, or set `path` in data.yaml")
            elif not file.is_file() or "images" not in file.parts:
                errors.append(f"{file}: expected an image file below a folder named images")
        except (OSError, RuntimeError) as error:
            errors.append(f"{file}: cannot be read ({getattr(error, 'strerror', None) or 'a loop of links'})")
    return sorted(set(files)), errors


def label_path(image: Path) -> Path:
    """images/<split>/x.jpg -> labels/<split>/x.txt, at the last folder named images."""
    parts = list(image.parts)
    parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts).with_suffix(".txt")


def read_split(spec: dict, split: str, root: Path, where: Path) -> tuple[JointSet, list, list[str]]:
    """A split without its pixels, the image sizes (w, h), and errors."""
    names = _names(spec, "names", where)
    classification_names = _names(spec, "classification_names", where) if "classification_names" in spec else []
    files, errors = find_images(spec.get(split), root, f"{where}: {split}")
    if not files and not errors:
        errors = [f"{where}: {split}: no image in {root / str(spec[split])}; expected {' '.join(sorted(SUFFIXES))}"]
    data, sizes = JointSet([], [], names, classification_names, (0, 0), None, []), []
    seen = {}
    for file in files if not errors else []:
        label_file = label_path(file)
        if seen.setdefault(label_file, file) != file:
            errors.append(f"{file}: shares its label file with {seen[label_file].name}; rename one")
        boxes, label, found, warnings = read_label_file(label_file, len(names), len(classification_names))
        errors += found
        data.warnings += warnings
        try:
            sizes.append(image_size(file))
        except UserError as error:
            errors.append(str(error))
        data.boxes.append(boxes)
        data.labels.append(label)
        data.paths.append(file)
    return data, sizes, errors


def load_joint(path: Path, config: Config) -> tuple[JointSet, JointSet]:
    """The train and val splits of a joint set, every label row and image header checked; all faults in one UserError."""
    spec = read_yaml(path)
    if not isinstance(spec, dict):
        raise UserError(f"{path}: expected the keys path, train, val, names, classification_names")
    if not isinstance(spec.get("path", "."), str):
        raise UserError(f"{path}: path: expected a folder, found {spec['path']!r}")
    root = path.parent / spec.get("path", ".")
    splits = [read_split(spec, split, root, path) for split in ("train", "val")]
    errors = [error for _, _, found in splits for error in found]
    train, val = (data for data, _, _ in splits)
    if spec.get("nc", len(train.names)) != len(train.names):
        errors.insert(0, f"{path}: nc is {spec['nc']} but names has {len(train.names)} entries")
    if "cls" in config.tasks and not train.classification_names:
        errors.insert(0, f"{path}: no classification_names: add the image classes, or use --mode detect")
    for task, have in (("cls", any(k != NO_LABEL for k in train.labels)), ("det", any(map(len, train.boxes)))):
        if not errors and task in config.tasks and not have:
            errors.append(f"{path}: train: no {'image class' if task == 'cls' else 'box'} in any label file")
    if not errors and len(train) < 2:
        errors.append(f"{path}: train: one image: expected two at least (BatchNorm needs a batch)")
    if errors:
        more = [f"… and {len(errors) - 10} more"] if len(errors) > 10 else []
        raise UserError("\n".join(errors[:10] + more))
    if set(train.paths) & set(val.paths):
        train.warnings.insert(0, f"{path}: train and val share images: the metrics say nothing about new ones")
    for data, sizes, _ in splits:
        data.canvas = canvas_size(splits[0][1] + splits[1][1], config.imgsz)
        placed = [fit(size, data.canvas) for size in sizes]
        for boxes, (left, top, w, h) in zip(data.boxes, placed):
            boxes[:, 1:] = (boxes[:, 1:] * [w, h, w, h] + [left, top, 0, 0]) / (data.canvas[::-1] * 2)
        data.cache(config.cache_mb / 2)
    return train, val


def load_data(config: Config) -> tuple[JointSet, JointSet]:
    """The train and val splits that `config.data` names."""
    if config.data != "synthetic":
        return load_joint(Path(config.data), config)
    splits = []
    for split, count in (("train", config.train_images), ("val", config.val_images)):
        samples = [synthetic_sample(config.seed, split, i, config.imgsz, config.dominance) for i in range(count)]
        pixels, boxes, labels = map(list, zip(*samples))
        splits.append(JointSet(boxes, labels, list(JETS), list(VIEWS), (config.imgsz,) * 2, np.stack(pixels)))
    return tuple(splits)


def whole(batch: Batch) -> Batch:
    return batch


def batches(data: JointSet, config: Config, epoch: int | None, world: int = 1, rank: int = 0) -> Any:
    """A DataLoader of uint8 batches: shuffled by (seed, epoch) and shared out among ranks, or in order if epoch is None."""
    sampler = torch.utils.data.SequentialSampler(data)
    if epoch is not None:
        sampler = torch.utils.data.DistributedSampler(data, world, rank, shuffle=True, seed=config.seed)
        sampler.set_epoch(epoch)
    size = config.batch_size if epoch is not None else 64
    lone = epoch is not None and len(sampler) % size == 1  # BatchNorm cannot train on one image
    order = torch.utils.data.BatchSampler(sampler, size, drop_last=lone)
    # A private generator: a loader otherwise draws from the global one, and so would change the training's dropout.
    return torch.utils.data.DataLoader(data, batch_sampler=order, collate_fn=whole,
                                       num_workers=0 if data.pixels is not None else config.workers,
                                       generator=torch.Generator().manual_seed(0))


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device, its images as float32 in [0, 1]."""
    images, targets, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
    return Batch(images.float().div_(255), targets, labels)


def augment(batch: Batch, config: Config, rng: torch.Generator) -> Batch:
    """The batch under random flips, zoom and shift; boxes of which less than a fifth stays in view are dropped."""
    images, targets, labels = batch
    u = torch.rand(len(images), 5, generator=rng).to(images.device)
    for axis, (share, dim) in enumerate(((config.flip_x, 3), (config.flip_y, 2))):
        flipped = u[:, axis] < share
        images = torch.where(flipped[:, None, None, None], images.flip(dim), images)
        centre = targets[:, 2 + axis]
        mirrored = torch.where(flipped[targets[:, 0].long()], 1 - centre, centre)
        targets = targets.index_copy(1, torch.tensor([2 + axis], device=targets.device), mirrored[:, None])
    if config.scale == config.shift == 0:
        return Batch(images, targets, labels)
    zoom, shift = 1 + config.scale * (2 * u[:, 2:3] - 1), config.shift * (2 * u[:, 3:] - 1)
    theta = torch.zeros(len(images), 2, 3, device=images.device)  # maps an output position to its source
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / zoom[:, 0]
    theta[:, :, 2] = -2 * shift / zoom
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    images = F.grid_sample(images - 0.447, grid, align_corners=False) + 0.447  # the canvas's grey outside
    owner = targets[:, 0].long()
    centre, size = (targets[:, 2:4] - 0.5) * zoom[owner] + 0.5 + shift[owner], targets[:, 4:] * zoom[owner]
    low, high = (centre - size / 2).clamp(0, 1), (centre + size / 2).clamp(0, 1)
    boxes = torch.cat([targets[:, :2], (low + high) / 2, high - low], 1)
    return Batch(images, boxes[(high - low).prod(1) > 0.2 * size.prod(1)], labels)


# ----------------------------------------------------------------------------------------------------------------------
# 4. Boxes: overlap, anchors, raw maps -> boxes, non-maximum suppression
# ----------------------------------------------------------------------------------------------------------------------

STRIDES = (8, 16, 32)  # px between neighbouring cells of P3, P4, P5


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)


def box_iou(a_xyxy: Tensor, b_xyxy: Tensor) -> Tensor:
    """Intersection over union (N, M) of all pairs of boxes (N, 4) and (M, 4)."""
    ax1, ay1, ax2, ay2 = a_xyxy[:, :, None].unbind(1)  # each (N, 1)
    bx1, by1, bx2, by2 = b_xyxy.unbind(1)
    overlap = ((torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
               * (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0))
    return overlap / ((ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - overlap + 1e-7)


def ciou(a_cxcywh: Tensor, b_cxcywh: Tensor) -> Tensor:
    """Complete IoU (K,) of boxes (K, 4) in pairs: IoU - centre distance^2 / diagonal^2 - alpha v (arXiv 1911.08287)."""
    a, b = cxcywh_to_xyxy(a_cxcywh), cxcywh_to_xyxy(b_cxcywh)
    overlap = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    iou = overlap / (a_cxcywh[:, 2:].prod(1) + b_cxcywh[:, 2:].prod(1) - overlap + 1e-7)
    diagonal = (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])).square().sum(1) + 1e-7
    distance = (a_cxcywh[:, :2] - b_cxcywh[:, :2]).square().sum(1)
    angle_a, angle_b = torch.atan(a_cxcywh[:, 2] / a_cxcywh[:, 3]), torch.atan(b_cxcywh[:, 2] / b_cxcywh[:, 3])
    v = 4 / math.pi**2 * (angle_a - angle_b).square()
    alpha = (v / (1 - iou + v + 1e-7)).detach()
    return iou - distance / diagonal - alpha * v


def fit_anchors(sizes: np.ndarray) -> np.ndarray:
    """Anchors (3 levels, 3, 2) in px, smallest first: k-means of box sizes (n, 2) px, started at quantiles of the area."""
    sizes = sizes[np.argsort(sizes.prod(1), kind="stable")]
    centres = sizes[np.linspace(0, len(sizes) - 1, 19).astype(int)[1::2]]
    for _ in range(50):
        nearest = ((sizes[:, None] - centres) ** 2).sum(2).argmin(1)
        centres = np.array([sizes[nearest == k].mean(0) if (nearest == k).any() else centres[k] for k in range(9)])
    return centres[np.argsort(centres.prod(1), kind="stable")].clip(min=2).reshape(3, 3, 2)


def flatten_levels(raw: list[Tensor]) -> Tensor:
    """Predictions (B, A, 5 + C) from maps (B, 3 (5 + C), h, w): level by level, row by row, cell by cell, anchor last."""
    return torch.cat([x.permute(0, 2, 3, 1).reshape(len(x), x.shape[2] * x.shape[3] * 3, -1) for x in raw], 1)


def prediction_grid(raw: list[Tensor], anchors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cell (A, 2) as x, y, anchor (A, 2) px and stride (A, 1) px of each row that `flatten_levels` makes."""
    cells, sizes, strides = [], [], []
    for x, level, stride in zip(raw, anchors, STRIDES):
        h, w = x.shape[2:]
        y, x = torch.meshgrid(torch.arange(h, device=x.device), torch.arange(w, device=x.device), indexing="ij")
        cells.append(torch.stack([x, y], -1)[:, :, None].expand(h, w, 3, 2).reshape(-1, 2))
        sizes.append(level.expand(h, w, 3, 2).reshape(-1, 2))
        strides.append(torch.full((h * w * 3, 1), stride, device=x.device))
    return torch.cat(cells), torch.cat(sizes), torch.cat(strides)


def decode(logits: Tensor, cell: Tensor, anchor: Tensor, stride: Tensor | int) -> Tensor:
    """Boxes (..., 4) cx cy w h in px: xy = (2 sigmoid - 0.5 + cell) stride, wh = (2 sigmoid)^2 anchor."""
    p = 2 * logits[..., :4].sigmoid()
    return torch.cat([(p[..., :2] - 0.5 + cell) * stride, p[..., 2:].square() * anchor], -1)


def suppress(boxes_xyxy: Tensor, classes: Tensor, iou_thres: float) -> Tensor:
    """Which boxes greedy non-maximum suppression keeps, (n,) bool; boxes (n, 4) in falling order of score.

    A box stays if no kept box of its class before it overlaps it more than iou_thres. Repeating
    that for all boxes at once settles, after n rounds at most, on what the greedy loop keeps.
    """
    over = (box_iou(boxes_xyxy, boxes_xyxy) > iou_thres) & (classes[:, None] == classes)
    over = over.triu(1)  # (n, n): row i suppresses column j > i
    keep = torch.ones_like(classes, dtype=torch.bool)
    while True:
        kept = ~(over & keep[:, None]).any(0)
        if torch.equal(kept, keep):
            return keep
        keep = kept


def find_boxes(raw: list[Tensor], anchors: Tensor, config: Config) -> list[Tensor]:
    """Detections of each image: (n, 6) x1 y1 x2 y2 in px, score, class; best first, at most max_det."""
    logits = flatten_levels(raw)
    boxes = cxcywh_to_xyxy(decode(logits, *prediction_grid(raw, anchors)))
    num_classes = logits.shape[2] - 5
    scores = (logits[..., 4:5].sigmoid() * logits[..., 5:].sigmoid()).flatten(1)  # (B, A C)
    # Departs from YOLOv5 (30,000 candidates): because few images hold hundreds of objects.
    scores, order = scores.topk(min(512, scores.shape[1]), dim=1)
    found = []
    for image_boxes, image_scores, image_order in zip(boxes, scores, order):
        valid = image_scores > config.conf_thres
        rows, classes = image_order[valid] // num_classes, image_order[valid] % num_classes
        keep = suppress(image_boxes[rows], classes, config.iou_thres)
        rows = torch.cat([image_boxes[rows], image_scores[valid][:, None], classes[:, None]], 1)
        found.append(rows[keep][: config.max_det])
    return found


# ----------------------------------------------------------------------------------------------------------------------
# 5. Model: images -> P3, raw detection maps, class logits
# ----------------------------------------------------------------------------------------------------------------------


class Conv(nn.Sequential):
    """Convolution, BatchNorm, SiLU."""

    def __init__(self, c_in: int, c_out: int, kernel: int = 1, stride: int = 1, padding: int | None = None):
        padding = kernel // 2 if padding is None else padding
        super().__init__(nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False),
                         nn.BatchNorm2d(c_out, eps=1e-3), nn.SiLU(inplace=True))


class Bottleneck(nn.Module):
    def __init__(self, c: int, shortcut: bool):
        super().__init__()
        self.cv1, self.cv2, self.shortcut = Conv(c, c), Conv(c, c, 3), shortcut

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x)) if self.shortcut else self.cv2(self.cv1(x))


class C3(nn.Module):
    """Two 1x1 branches of half the channels, one of them through n bottlenecks, joined by a third 1x1 convolution."""

    def __init__(self, c_in: int, c_out: int, n: int = 1, shortcut: bool = True):
        super().__init__()
        self.cv1, self.cv2, self.cv3 = Conv(c_in, c_out // 2), Conv(c_in, c_out // 2), Conv(c_out, c_out)
        self.m = nn.Sequential(*(Bottleneck(c_out // 2, shortcut) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat([self.m(self.cv1(x)), self.cv2(x)], 1))


class SPPF(nn.Module):
    """Spatial pyramid pooling: the map beside its 5, 9 and 13 px maxima, by three 5 px pools in a row."""

    def __init__(self, c: int):
        super().__init__()
        self.cv1, self.cv2, self.pool = Conv(c, c // 2), Conv(2 * c, c), nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.cv1(x)]
        for _ in range(3):
            maps.append(self.pool(maps[-1]))
        return self.cv2(torch.cat(maps, 1))


def channels(c: int, width_multiple: float) -> int:
    return math.ceil(c * width_multiple / 8) * 8


def repeats(n: int, depth_multiple: float) -> int:
    return max(1, round(n * depth_multiple))


class Trunk(nn.Sequential):
    """Stem to P3: images (B, 3, H, W) -> P3 (B, c_out, H/8, W/8); in a joint network the part that both tasks share."""

    def __init__(self, width_multiple: float, depth_multiple: float):
        c1, c2, c3 = (channels(c, width_multiple) for c in (64, 128, 256))
        super().__init__(Conv(3, c1, 6, 2, 2), Conv(c1, c2, 3, 2), C3(c2, c2, repeats(3, depth_multiple)),
                         Conv(c2, c3, 3, 2), C3(c3, c3, repeats(6, depth_multiple)))
        self.c_out = c3

    @property
    def W(self) -> nn.Parameter:
        """The kernel of the last convolution, where GradNorm takes its norms."""
        return self[-1].cv3[0].weight


class SqueezeExcite(nn.Module):
    """Scales each channel by what all channels' means say (arXiv 1709.01507)."""

    def __init__(self, c: int, pools: tuple = (F.adaptive_avg_pool2d,)):
        super().__init__()
        self.pools = pools
        self.mlp = nn.Sequential(nn.Conv2d(c, max(4, c // 4), 1), nn.ReLU(), nn.Conv2d(max(4, c // 4), c, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * sum(self.mlp(pool(x, 1)) for pool in self.pools).sigmoid()


class CBAM(nn.Module):
    """Channel attention by mean and maximum, then spatial attention by a 7x7 convolution (arXiv 1807.06521)."""

    def __init__(self, c: int):
        super().__init__()
        self.channel = SqueezeExcite(c, (F.adaptive_avg_pool2d, F.adaptive_max_pool2d))
        self.spatial = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.channel(x)
        return x * self.spatial(torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)).sigmoid()


class AttentionTrunk(Trunk):
    """The trunk of dual's classification network: SE after the first C3, CBAM before the second, same P3."""

    def __init__(self, width_multiple: float, depth_multiple: float):
        super().__init__(width_multiple, depth_multiple)
        self.insert(3, SqueezeExcite(self[2].cv3[0].out_channels))
        self.insert(5, CBAM(self.c_out))


class DetectionHead(nn.Module):
    """P3 -> raw maps of P3, P4, P5, each (B, 3 (5 + C), h, w): the rest of the backbone, PANet neck, Detect."""

    def __init__(self, num_classes: int, anchors: np.ndarray, width_multiple: float, depth_multiple: float):
        super().__init__()
        c3, c4, c5 = (channels(c, width_multiple) for c in (256, 512, 1024))
        n = partial(repeats, depth_multiple=depth_multiple)
        self.p4 = nn.Sequential(Conv(c3, c4, 3, 2), C3(c4, c4, n(9)))
        self.p5 = nn.Sequential(Conv(c4, c5, 3, 2), C3(c5, c5, n(3)), SPPF(c5))
        self.lateral5, self.up4 = Conv(c5, c4), C3(2 * c4, c4, n(3), shortcut=False)
        self.lateral4, self.up3 = Conv(c4, c3), C3(2 * c3, c3, n(3), shortcut=False)
        self.down3, self.out4 = Conv(c3, c3, 3, 2), C3(2 * c3, c4, n(3), shortcut=False)
        self.down4, self.out5 = Conv(c4, c4, 3, 2), C3(2 * c4, c5, n(3), shortcut=False)
        self.detect = nn.ModuleList(nn.Conv2d(c, 3 * (5 + num_classes), 1) for c in (c3, c4, c5))
        self.register_buffer("anchors", torch.as_tensor(anchors, dtype=torch.float32))  # px
        for conv, stride in zip(self.detect, STRIDES):  # prior: 8 objects in a 640 px image, classes equally likely
            bias = conv.bias.data.view(3, -1)
            bias[:, 4] += math.log(8 / (640 / stride) ** 2)
            bias[:, 5:] += math.log(0.6 / (num_classes - 0.99999))

    def forward(self, P3: Tensor) -> list[Tensor]:
        P4 = self.p4(P3)
        lateral5 = self.lateral5(self.p5(P4))
        lateral4 = self.lateral4(self.up4(torch.cat([F.interpolate(lateral5, scale_factor=2.0), P4], 1)))
        out3 = self.up3(torch.cat([F.interpolate(lateral4, scale_factor=2.0), P3], 1))
        out4 = self.out4(torch.cat([self.down3(out3), lateral4], 1))
        out5 = self.out5(torch.cat([self.down4(out4), lateral5], 1))
        return [conv(x).float() for conv, x in zip(self.detect, (out3, out4, out5))]


class ClassificationHead(nn.Sequential):
    """P3 -> class logits (B, C): 1x1 convolution, global average pool, dropout, linear."""

    def __init__(self, c_in: int, num_classes: int, dropout: float):
        super().__init__(Conv(c_in, 2 * c_in), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout),
                         nn.Linear(2 * c_in, num_classes))

    def forward(self, P3: Tensor) -> Tensor:
        return super().forward(P3).float()


class JointNet(nn.Module):
    """A trunk and the heads of one task or more, cut at P3."""

    def __init__(self, trunk: Trunk, heads: dict[str, nn.Module]):
        super().__init__()
        self.trunk, self.heads = trunk, nn.ModuleDict(heads)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """P3, the leaf copy of it that the heads read, and each task's raw output."""
        P3 = self.trunk(images)
        cut = P3.detach().requires_grad_(P3.requires_grad)
        return P3, cut, {task: head(cut) for task, head in self.heads.items()}


class Network(nn.Module):
    """One joint network, or for `dual` one network for each task: images (B, 3, H, W) -> {task: raw output}."""

    def __init__(self, config: Config, num_classes: int, num_labels: int, anchors: np.ndarray):
        super().__init__()
        dual = config.mode == "dual"
        trunk = Trunk(config.width_multiple, config.depth_multiple)
        cls_trunk = AttentionTrunk(config.dual_width_multiple, config.depth_multiple) if dual else trunk
        heads = {}
        if "det" in config.tasks:
            heads["det"] = DetectionHead(num_classes, anchors, config.width_multiple, config.depth_multiple)
        if "cls" in config.tasks:
            heads["cls"] = ClassificationHead(cls_trunk.c_out, num_labels, config.dropout)
        self.parts = nn.ModuleList([JointNet(trunk, {"det": heads["det"]}), JointNet(cls_trunk, {"cls": heads["cls"]})]
                                   if dual else [JointNet(trunk, heads)])
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = config.batchnorm_momentum

    def forward(self, images: Tensor) -> dict[str, Any]:
        return {task: output for part in self.parts for task, output in part(images)[2].items()}

    def parameter_counts(self) -> dict[str, int]:
        """Parameters of the shared trunk and of each task; a network of one's own counts for its task."""
        counts = {"total": 0, "trunk": 0, "det": 0, "cls": 0}
        for part in self.parts:
            sizes = {"trunk": part.trunk} | dict(part.heads.items())
            for name, module in sizes.items():
                owner = next(iter(part.heads)) if len(self.parts) > 1 else name
                counts[owner] += sum(p.numel() for p in module.parameters())
        return counts | {"total": sum(counts.values())}


# ----------------------------------------------------------------------------------------------------------------------
# 6. Losses: raw outputs and a batch -> one scalar a task
# ----------------------------------------------------------------------------------------------------------------------


class Match(NamedTuple):
    """K pairs of a target and a prediction; all (K,) but cell (K, 2)."""

    target: Tensor  # row of targets
    level: Tensor
    anchor: Tensor  # index within the level
    cell: Tensor  # x, y
    index: Tensor  # row of flatten_levels


def match_targets(targets: Tensor, shapes: list[tuple[int, int]], anchors: Tensor, anchor_thres: float) -> Match:
    """Pairs each target (N, 6) with the anchors of like size, in its cell and the two nearest neighbours, on every level.

    shapes: (h, w) of each level; anchors: (3, 3, 2) px.
    """
    device = targets.device
    sizes = torch.tensor([(w, h) for h, w in shapes], device=device)  # (L, 2)
    centre = targets[None, :, 2:4] * sizes[:, None]  # (L, N, 2) in cells
    wh = targets[:, 4:6] * sizes[0] * STRIDES[0]  # (N, 2) px
    ratio = wh / anchors[:, :, None]  # (L, 3, N, 2)
    alike = torch.maximum(ratio, 1 / ratio).amax(-1) < anchor_thres
    below = ((centre % 1 < 0.5) & (centre > 1)).permute(2, 0, 1)  # (2, L, N): nearer to the left, upper neighbour
    rest = sizes[:, None] - centre
    above = ((rest % 1 < 0.5) & (rest > 1)).permute(2, 0, 1)
    near = torch.cat([torch.ones_like(below[:1]), below, above])  # (5, L, N)
    offsets = torch.tensor([[0, 0], [0.5, 0], [0, 0.5], [-0.5, 0], [0, -0.5]], device=device)
    o, level, anchor, target = (near[:, :, None] & alike).nonzero(as_tuple=True)
    cell = (centre[level, target] - offsets[o]).long()
    cell = torch.minimum(cell.clamp(min=0), sizes[level] - 1)
    counts = sizes.prod(1) * 3
    index = (counts.cumsum(0) - counts)[level] + (cell[:, 1] * sizes[level, 0] + cell[:, 0]) * 3 + anchor
    return Match(target, level, anchor, cell, index)


class DetectionLoss:
    """YOLOv5's loss: CIoU of the matched boxes, objectness with the CIoU as target, class; raw maps, batch -> scalar."""

    def __init__(self, anchors: Tensor, num_classes: int, config: Config):
        self.anchors, self.config = anchors, config
        self.obj_gain = config.obj_gain * (config.imgsz / 640) ** 2
        self.cls_gain = config.cls_gain * num_classes / 80

    def __call__(self, raw: list[Tensor], batch: Batch) -> Tensor:
        predictions, targets = flatten_levels(raw), batch.targets  # (B, A, 5 + C)
        shapes = [tuple(x.shape[2:]) for x in raw]
        match = match_targets(targets, shapes, self.anchors, self.config.anchor_thres)
        image, class_, stride = targets[match.target, 0].long(), targets[match.target, 1].long(), 8 * 2**match.level
        p = predictions[image, match.index]  # (K, 5 + C)
        boxes = decode(p, match.cell, self.anchors[match.level, match.anchor], stride[:, None])
        size = targets.new_tensor([shapes[0][1], shapes[0][0]] * 2) * STRIDES[0]
        iou = ciou(boxes, targets[match.target, 2:] * size)
        share = 1 / torch.zeros(3, device=p.device).index_add(0, match.level, torch.ones_like(iou))[match.level]
        box = ((1 - iou) * share).sum()  # the mean of each level, summed over levels
        # Departs from YOLOv5 (the last of several matches is written): because amax does not depend on their order.
        goal = torch.zeros(predictions.shape[:2].numel(), device=p.device).scatter_reduce(
            0, image * predictions.shape[1] + match.index, iou.detach().clamp(min=0), "amax").view(len(predictions), -1)
        obj = F.binary_cross_entropy_with_logits(predictions[..., 4], goal, reduction="none").mean(0)  # (A,)
        counts = [h * w * 3 for h, w in shapes]
        obj = sum(b * level.mean() for b, level in zip((4.0, 1.0, 0.4), obj.split(counts)))
        cls = p.new_zeros(())
        if p.shape[1] > 6:  # with one class, objectness says it all
            one_hot = F.one_hot(class_, p.shape[1] - 5).to(p)
            cls = (F.binary_cross_entropy_with_logits(p[:, 5:], one_hot, reduction="none").mean(1) * share).sum()
        loss = self.config.box_gain * box + self.obj_gain * obj + self.cls_gain * cls
        return loss * len(batch.images) if self.config.det_loss_times_batch else loss


class ClassificationLoss:
    """Cross-entropy of the image class, weighted mean over the images that have one; 0 where none has."""

    def __init__(self, class_weights: Tensor):
        self.class_weights = class_weights

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        total = F.cross_entropy(logits, batch.labels, self.class_weights, ignore_index=NO_LABEL, reduction="sum")
        weight = self.class_weights[batch.labels.clamp(min=0)] * (batch.labels != NO_LABEL)
        return total / weight.sum().clamp(min=1e-9)


def make_losses(network: Network, train_set: JointSet, config: Config) -> dict[str, Any]:
    """The loss of each task; class_balance weighs classes by N / (C n_c), so that the weights' mean over images is 1."""
    losses = {}
    for part in network.parts:
        if "det" in part.heads:
            losses["det"] = DetectionLoss(part.heads["det"].anchors, len(train_set.names), config)
        if "cls" in part.heads:
            labels = np.array([k for k in train_set.labels if k != NO_LABEL])
            counts = np.bincount(labels, minlength=len(train_set.classification_names))
            weights = len(labels) / (len(counts) * counts.clip(1)) if config.class_balance else np.ones(len(counts))
            losses["cls"] = ClassificationLoss(torch.tensor(weights, dtype=torch.float32, device=part.trunk.W.device))
    return losses


# ----------------------------------------------------------------------------------------------------------------------
# 7. Balancer: (losses, gradient norms at W) -> task weights
# ----------------------------------------------------------------------------------------------------------------------


class GradNorm:
    """Task weights w (T,) by Chen et al., ICML 2018; knows no network.

    Each step: train on sum(w_i L_i) with the present `w`, then call `update(L, n)` for the next one. From the first
    update on sum(w) = T. `L0` are the losses to measure progress against: by default the first positive ones.
    """

    def __init__(self, initial_weights: Any, alpha: float = 1.5, lr: float = 0.025, w_min: float = 0.0,
                 L0: Any = None, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32):
        self.w = torch.tensor(initial_weights, dtype=dtype, device=device)
        self.L0 = torch.zeros_like(self.w) if L0 is None else torch.tensor(L0, dtype=dtype, device=device)
        self.alpha, self.w_min = alpha, w_min
        self.optimizer = torch.optim.Adam([self.w], lr=lr)

    @torch.no_grad()
    def update(self, L: Tensor, n: Tensor) -> Tensor:
        """The next weights (T,), from the losses L (T,) and the norms n (T,) of their unweighted gradients at W."""
        T = len(self.w)
        self.L0 = torch.where(self.L0 > 0, self.L0, L)
        L_tilde = L / self.L0
        r = L_tilde / L_tilde.mean()
        G = self.w * n
        target = G.mean() * r**self.alpha  # a constant: L_grad is not differentiated through it
        dL_grad_dw = torch.sign(G - target) * n
        # Departs from the paper (all tasks have labels): because a task without labels says nothing about balance.
        self.w.grad = torch.where(((L > 0) & (n > 0)).all(), dL_grad_dw, torch.zeros_like(n))
        self.optimizer.step()
        # Departs from the paper (w <- w T / sum(w)): because that goes negative; w_min = 0 gives it for positive w.
        above = (self.w - self.w_min).clamp(min=1e-12)
        self.w.copy_(self.w_min + above * (T - T * self.w_min) / above.sum())
        return self.w.clone()

    def state_dict(self) -> dict:
        return {"w": self.w.clone(), "L0": self.L0, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.w.copy_(state["w"])
        self.L0 = state["L0"].to(self.w)
        self.optimizer.load_state_dict(state["optimizer"])


# ----------------------------------------------------------------------------------------------------------------------
# 8. Step: one batch -> gradients of sum(w_i L_i), and each task's gradient at W and P3
# ----------------------------------------------------------------------------------------------------------------------


class Signals(NamedTuple):
    """What one backward pass tells: losses L (T,), norms n (T,) at W; of two tasks the cosine at P3 and at W, and the
    magnitude similarity 2ab / (a^2 + b^2) at P3. None where a network has one task."""

    L: Tensor
    n: Tensor | None
    cosine: Tensor | None
    cosine_W: Tensor | None
    similarity: Tensor | None


def mean_over_ranks(x: Tensor) -> Tensor:
    """x, averaged over the processes of a distributed run; unchanged in a run of one process."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(x)
        x /= torch.distributed.get_world_size()
    return x


def similarities(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cosine and magnitude similarity over all pairs of gradients, from their inner products (T, T)."""
    i, j = torch.triu_indices(len(gram), len(gram), 1)
    a, b = gram.diagonal()[i].sqrt(), gram.diagonal()[j].sqrt()
    return (gram[i, j] / (a * b).clamp(min=1e-30)).mean(), (2 * a * b / (a * a + b * b).clamp(min=1e-30)).mean()


def backward(part: nn.Module, batch: Batch, losses: dict, w: Tensor) -> Signals:
    """Leaves the gradient of sum(w_i L_i) in the parameters' .grad, and returns what it saw on the way.

    The graph is cut at P3: each weighted loss goes back to the cut alone, there is its gradient g_i read; the sum then
    goes on through the trunk. The gradient at W is a product of g_i with the trunk's last layer only.
    """
    P3, cut, outputs = part(batch.images)
    L, g = [], []
    for w_i, (task, output) in zip(w, outputs.items()):
        L_i = losses[task](output, batch)
        (w_i * L_i).backward()
        L.append(L_i.detach())
        g.append(cut.grad)
        cut.grad = None
    W = getattr(part, "module", part).trunk.W
    if len(g) == 1:
        P3.backward(g[0])
        return Signals(mean_over_ranks(torch.stack(L)), None, None, None, None)
    grad_W = [torch.autograd.grad(P3, W, g_i, retain_graph=True)[0].reshape(-1) for g_i in g]
    P3.backward(sum(g[1:], g[0]))
    grad_W = mean_over_ranks(torch.stack(grad_W))  # (T, |W|), before the norm: so w is the same on all ranks
    at_P3 = torch.stack([g_i.float().reshape(-1) for g_i in g])  # (T, |P3|)
    cosine, similarity = similarities(at_P3 @ at_P3.T)
    cosine_W, _ = similarities(grad_W @ grad_W.T)
    n = torch.linalg.vector_norm(grad_W, dim=1) / w
    return Signals(mean_over_ranks(torch.stack(L)), n, cosine, cosine_W, similarity)


# ----------------------------------------------------------------------------------------------------------------------
# 9. Metrics: network, data -> average precision, accuracy
# ----------------------------------------------------------------------------------------------------------------------


def average_precision(truth: list[np.ndarray], found: list[np.ndarray], num_classes: int, max_det: int,
                      thresholds: np.ndarray) -> np.ndarray:
    """COCO average precision (thresholds, classes); NaN for a class without boxes.

    truth: (n, 5) class and x1 y1 x2 y2 px of each image; found: (n, 6) x1 y1 x2 y2 px, score, class.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    annotations = [{"id": k, "image_id": i, "category_id": int(c), "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
                   for k, (i, (c, x1, y1, x2, y2)) in enumerate(((i, row) for i, rows in enumerate(truth)
                                                                for row in rows.tolist()), 1)]
    rows = np.concatenate([np.column_stack([np.full(len(d), i), d[:, :2], d[:, 2:4] - d[:, :2], d[:, 4:]])
                           for i, d in enumerate(found)])  # (n, 7) image, x, y, w, h, score, class
    if not len(rows) or not annotations:
        have = np.isin(np.arange(num_classes), [a["category_id"] for a in annotations])
        return np.where(have, 0.0, np.nan)[None].repeat(len(thresholds), 0)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        coco = COCO()
        coco.dataset = {"images": [{"id": i} for i in range(len(truth))], "annotations": annotations,
                        "categories": [{"id": c} for c in range(num_classes)]}
        coco.createIndex()
        run = COCOeval(coco, coco.loadRes(rows), "bbox")
        run.params.iouThrs, run.params.areaRng, run.params.areaRngLbl = thresholds, [[0, 1e10]], ["all"]
        run.params.maxDets = [max_det]  # Departs from COCO (100): because YOLOv5 counts 300.
        run.evaluate()
        run.accumulate()
    precision = run.eval["precision"][:, :, :, 0, 0]  # (thresholds, recalls, classes), -1 where a class has no box
    return np.where(precision[:, 0] < 0, np.nan, precision.mean(1))


def accuracies(truth: np.ndarray, guess: np.ndarray, num_labels: int) -> tuple[float, float, np.ndarray]:
    """Accuracy, balanced accuracy (mean of the classes that occur), and each class's own; images (N,) with a class."""
    right = np.bincount(truth[truth == guess], minlength=num_labels)
    with np.errstate(invalid="ignore"):
        per_class = right / np.bincount(truth, minlength=num_labels)
    return float(np.mean(truth == guess)), float(np.nanmean(per_class)), per_class


@torch.no_grad()
def evaluate(network: Network, data: JointSet, config: Config, thresholds: np.ndarray) -> dict[str, Any]:
    """Metrics of a split: mAP50, mAP50-95 (None unless ten thresholds), accuracy, balanced_accuracy, per_class."""
    device, was_training = next(network.parameters()).device, network.training
    network.eval()
    truth, found, labels, guess = [], [], [], []
    for batch in batches(data, config, None):
        labels.append(batch.labels.numpy())
        batch = to_device(batch, device)
        outputs = network(batch.images)
        if "det" in outputs:
            anchors = next(part.heads["det"].anchors for part in network.parts if "det" in part.heads)
            found += [rows.cpu().numpy() for rows in find_boxes(outputs["det"], anchors, config)]
        if "cls" in outputs:
            guess.append(outputs["cls"].argmax(1).cpu().numpy())
    network.train(was_training)
    metrics = dict.fromkeys(("mAP50", "mAP50-95", "accuracy", "balanced_accuracy"))
    metrics["per_class"] = {}
    if found:
        scale = np.array(data.canvas[::-1] * 2)
        truth = [np.column_stack([b[:, 0], cxcywh_to_xyxy(torch.from_numpy(b[:, 1:])).numpy() * scale])
                 for b in data.boxes]
        ap = average_precision(truth, found, len(data.names), config.max_det, thresholds)
        with contextlib.suppress(RuntimeWarning), np.errstate(invalid="ignore"):
            metrics["mAP50"] = float(np.nanmean(ap[0]))
            metrics["mAP50-95"] = float(np.nanmean(ap)) if len(ap) == 10 else None
        metrics["per_class"]["AP50"] = dict(zip(data.names, ap[0].tolist()))
    if guess:
        labels, guess = np.concatenate(labels), np.concatenate(guess)
        known = labels != NO_LABEL
        if known.any():
            metrics["accuracy"], metrics["balanced_accuracy"], per_class = accuracies(
                labels[known], guess[known], len(data.classification_names))
            metrics["per_class"]["accuracy"] = dict(zip(data.classification_names, per_class.tolist()))
    return metrics


# ----------------------------------------------------------------------------------------------------
# 10. Training: config, data -> a trained network, epoch by epoch
# ----------------------------------------------------------------------------------------------------


class NonFinite(ArithmeticError):
    """A loss or gradient became infinite or NaN; says which task, at which step, under which weights."""


class Run:
    """Everything that the rest of a training run depends on; `state_dict` is all that a checkpoint needs."""

    def __init__(self, config: Config, train_set: JointSet, device: torch.device):
        torch.manual_seed(config.seed)
        wh = [b[:, 3:] * train_set.canvas[::-1] for b in train_set.boxes]
        anchors = (fit_anchors(np.concatenate(wh)) if config.anchors == "auto" and "det" in config.tasks
                   else np.array(config.anchors if config.anchors != "auto" else np.ones((3, 3, 2))))
        self.config, self.device, self.epoch, self.best = config, device, 0, -1.0
        self.network = Network(config, len(train_set.names), len(train_set.classification_names), anchors)
        self.network.to(device, memory_format=torch.channels_last)
        self.losses = make_losses(self.network, train_set, config)
        self.modules = list(self.network.parts)
        self.world, self.rank = 1, 0
        if torch.distributed.is_initialized():
            self.world, self.rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
            self.modules = [nn.parallel.DistributedDataParallel(part) for part in self.modules]
        self.optimizers = [make_optimizer(part, lr, config) for part, lr
                           in zip(self.network.parts, (config.lr, config.dual_lr))]
        self.w = torch.tensor(config.weights, device=device)
        self.balancer = GradNorm(config.weights, config.alpha, config.gradnorm_lr, config.w_min,
                                 device=device) if config.mode == "gradnorm" else None

    def state_dict(self) -> dict:
        return {"epoch": self.epoch, "best": self.best, "w": self.w, "network": self.network.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "balancer": self.balancer and self.balancer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.epoch, self.best, self.w = state["epoch"], state["best"], state["w"].to(self.device)
        self.network.load_state_dict(state["network"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        if self.balancer:
            self.balancer.load_state_dict(state["balancer"])


def make_optimizer(part: nn.Module, lr: float, config: Config) -> torch.optim.Optimizer:
    """AdamW with weight decay on kernels alone, not on biases and BatchNorm, as YOLOv5 groups them."""
    kernels = [p for p in part.parameters() if p.ndim > 1]
    others = [p for p in part.parameters() if p.ndim <= 1]
    groups = [{"params": kernels, "weight_decay": config.weight_decay, "peak": lr},
              {"params": others, "weight_decay": 0.0, "peak": lr}]
    return torch.optim.AdamW(groups, lr=lr, betas=config.betas, fused=True)


def learning_rate(progress: float, warmup: float) -> float:
    """Share of the peak rate at `progress` in [0, 1] of the run: a linear rise, then a cosine to 1 %."""
    if progress < warmup:
        return progress / warmup
    return 0.01 + 0.99 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2


def train_step(run: Run, batch: Batch, progress: float, backward=backward) -> dict[str, Tensor]:
    """One step of every network and of the balancer; returns what the log keeps, as tensors (no wait for a GPU)."""
    signals, grad_norms = [], []
    for module, optimizer, w in zip(run.modules, run.optimizers, run.w.split(len(run.w) // len(run.modules))):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate(progress, run.config.warmup)
        optimizer.zero_grad()
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.config.amp == "bf16"):
            signals.append(backward(module, batch, run.losses, w))
        grad_norms.append(nn.utils.clip_grad_norm_(module.parameters(), run.config.grad_clip))
        optimizer.step()
    tasks, s = run.config.tasks, signals[0]
    L, G = torch.cat([s.L for s in signals]), None if s.n is None else run.w * s.n
    log = {f"L/{task}": v for task, v in zip(tasks, L)} | {f"w/{task}": v for task, v in zip(tasks, run.w)}
    log |= {"grad_norm": torch.stack(grad_norms).max(), "loss": (run.w * L).sum()}
    if G is not None:
        log |= {f"G/{task}": v for task, v in zip(tasks, G)}
        log |= {"cosine": s.cosine, "cosine_W": s.cosine_W, "similarity": s.similarity}
    if run.balancer:
        run.w = run.balancer.update(L, s.n)
    return log


def train_epoch(run: Run, train_set: JointSet, bar: tqdm) -> list[dict[str, float]]:
    """One pass over the training split; one row a step. Raises NonFinite before anything is saved."""
    config, started, cpu = run.config, time.perf_counter(), time.process_time()
    torch.manual_seed(config.seed * 100_003 + run.epoch * 64 + run.rank)  # dropout: a function of (seed, epoch)
    rng = torch.Generator().manual_seed(config.seed * 100_019 + run.epoch * 64 + run.rank)
    loader, rows = batches(train_set, config, run.epoch, run.world, run.rank), []
    small = config.mode == "dual" and run.epoch < round(config.progressive_share * config.epochs)
    for k, batch in enumerate(loader):
        batch = augment(to_device(batch, run.device), config, rng)
        if small:
            size = [max(32, round(s * config.progressive_scale / 32) * 32) for s in train_set.canvas]
            batch = batch._replace(images=F.interpolate(batch.images, size, mode="bilinear", antialias=True))
        batch = batch._replace(images=batch.images.contiguous(memory_format=torch.channels_last))
        rows.append(train_step(run, batch, (run.epoch + k / len(loader)) / config.epochs))
        bar.update()
    table = torch.stack([torch.stack(list(row.values())) for row in rows]).tolist()  # the epoch's one wait for a GPU
    rows = [{"step": run.epoch * len(loader) + k, "epoch": run.epoch} | dict(zip(rows[0], values))
            for k, values in enumerate(table)]
    for row in rows:
        bad = [key for key, value in row.items() if not math.isfinite(value)]
        if bad:
            w = {key: value for key, value in row.items() if key.startswith("w/")}
            raise NonFinite(f"step {row['step']}: {', '.join(bad)} is not finite (weights {w}); try a lower lr")
    rows[-1]["time"] = {"train_s": time.perf_counter() - started, "train_cpu_s": time.process_time() - cpu,
                        "images": len(loader.dataset)}
    return rows


def train(run: Run, train_set: JointSet, val_set: JointSet) -> Iterator[list[dict[str, Any]]]:
    """Trains to the last epoch; yields each epoch's rows, the last with val metrics where an evaluation was due."""
    config = run.config
    steps = len(batches(train_set, config, 0, run.world, run.rank))
    with tqdm(total=config.epochs * steps, initial=run.epoch * steps, unit="step", desc=config.mode,
              disable=run.rank > 0 or None, leave=False) as bar:
        while run.epoch < config.epochs:
            rows = train_epoch(run, train_set, bar)
            run.epoch += 1
            last, started = run.epoch == config.epochs, time.perf_counter()
            if run.rank == 0 and (last or run.epoch % config.eval_interval == 0):
                thresholds = np.linspace(0.5, 0.95, 10) if last else np.array([0.5])
                rows[-1]["val"] = evaluate(run.network, val_set, config, thresholds)
                rows[-1]["time"]["eval_s"] = time.perf_counter() - started
                bar.set_postfix({k: f"{v:.3f}" for k, v in rows[-1]["val"].items() if isinstance(v, float)})
            yield rows


def peak_rss_mb() -> float:
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def flops_per_image(network: nn.Module, canvas: tuple[int, int]) -> int:
    """Floating-point operations of one forward pass (a multiply-add counts as two), by torch's counter."""
    from torch.utils.flop_counter import FlopCounterMode
    network.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, *canvas, device=next(network.parameters()).device))
    network.train()
    return counter.get_total_flops()


def environment(device: torch.device, world: int = 1) -> dict[str, Any]:
    return {"torch": torch.__version__, "python": platform.python_version(), "os": platform.system(),
            "cpu": platform.machine(), "device": torch.cuda.get_device_name(device) if device.type == "cuda"
            else device.type, "threads": torch.get_num_threads(), "processes": world}


def summarise(run: Run, rows: list[dict], canvas: tuple[int, int]) -> dict[str, Any]:
    """The flat contract of results.json, from a finished run and all rows of its log."""
    config, tasks = run.config, run.config.tasks
    times = [row["time"] for row in rows if "time" in row]
    train_s, cpu_s = (sum(t[key] for t in times) for key in ("train_s", "train_cpu_s"))
    mean = lambda key, part=rows: float(np.mean([row[key] for row in part]))  # noqa: E731
    weights = {"initial": list(config.weights), "final": run.w.tolist()}
    weights["change"] = [b - a for a, b in zip(weights["initial"], weights["final"])]
    interference = None
    if "cosine" in rows[0]:
        shares = np.mean([[row[f"G/{t}"] / sum(row[f"G/{u}"] for u in tasks) for t in tasks]
                          for row in rows if any(row[f"G/{u}"] for u in tasks)], axis=0)
        interference = {
            "cosine_mean": mean("cosine"), "conflict_share": float(np.mean([r["cosine"] < 0 for r in rows])),
            "magnitude_similarity": mean("similarity"), "cosine_W_mean": mean("cosine_W"),
            "gradient_share": dict(zip(tasks, shares.tolist()))}
    return {
        "schema": "jointgrad/1", "mode": config.mode, "seed": config.seed, "data": config.data,
        "config": dataclasses.asdict(config), "environment": environment(run.device, run.world),
        "parameters": run.network.parameter_counts(), "flops_per_image": flops_per_image(run.network, canvas),
        "steps": len(rows), "weights": weights,
        "loss": {"mean": mean("loss"), "final": mean("loss", [r for r in rows if r["epoch"] == rows[-1]["epoch"]])},
        "val": rows[-1]["val"], "interference": interference,
        "time": {"train_s": train_s, "train_cpu_s": cpu_s, "eval_s": sum(t.get("eval_s", 0) for t in times),
                 "step_ms": 1000 * train_s / len(rows), "images_per_s": sum(t["images"] for t in times) / train_s},
        "peak_rss_mb": peak_rss_mb()}


class Predictor:
    """A trained network from a checkpoint: `Predictor("best.pt")("image.jpg")` -> its boxes and image class."""

    def __init__(self, path: str | Path, device: str = "cpu"):
        state = load_checkpoint(Path(path))
        self.config, self.names = make_config(state["config"], str(path)), state["names"]
        self.classification_names, self.device = state["classification_names"], torch.device(device)
        self.network = Network(self.config, len(self.names), len(self.classification_names), np.ones((3, 3, 2)))
        try:
            self.network.load_state_dict(state["run"]["network"])
        except (RuntimeError, KeyError, TypeError) as error:
            raise UserError(f"{path}: its tensors do not fit its own config; it is damaged") from error
        self.network.to(self.device).eval()

    @torch.no_grad()
    def __call__(self, image: str | Path | Image.Image) -> dict[str, Any]:
        """boxes [{name, score, box_xyxy in px of the image}], best first; classification {name, probs} or None."""
        image = image if isinstance(image, Image.Image) else read_image(Path(image))
        canvas = canvas_size([image.size], self.config.imgsz)
        left, top, w, h = fit(image.size, canvas)
        pixels = torch.from_numpy(letterbox(image, canvas).copy()).permute(2, 0, 1)[None]  # (1, 3, H, W)
        outputs = self.network(pixels.to(self.device).float() / 255)
        found = {"boxes": [], "classification": None}
        if "det" in outputs:
            anchors = self.network.parts[0].heads["det"].anchors
            for x1, y1, x2, y2, score, k in find_boxes(outputs["det"], anchors, self.config)[0].tolist():
                box = [(x - o) * s / z for x, o, s, z in zip((x1, y1, x2, y2), (left, top) * 2, image.size * 2, (w, h) * 2)]
                box = [min(max(v, 0.0), s) for v, s in zip(box, image.size * 2)]
                found["boxes"].append({"name": self.names[int(k)], "score": score, "box_xyxy": box})
        if "cls" in outputs:
            probs = outputs["cls"][0].softmax(0).tolist()
            found["classification"] = {"name": self.classification_names[int(np.argmax(probs))],
                                       "probs": dict(zip(self.classification_names, probs))}
        return found


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint of this program, read without running any code in it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such checkpoint; train first, then give runs/<name>/best.pt") from error
    except Exception as error:  # torch.load raises a dozen types on foreign bytes; all mean the same to the user
        raise UserError(f"{path}: not a checkpoint of jointgrad ({type(error).__name__})") from error
    if not isinstance(state, dict) or state.get("format") != "jointgrad/1" or "run" not in state:
        raise UserError(f"{path}: not a checkpoint of jointgrad (expected format jointgrad/1)")
    return state


# ----------------------------------------------------------------------------------------------------
# 11. Experiments: many runs -> statistics, verdicts, times
# ----------------------------------------------------------------------------------------------------

METRICS = ("mAP50", "mAP50-95", "accuracy", "balanced_accuracy")


def t_quantile(df: int) -> float:
    """97.5 % quantile of Student's t: with x = sqrt(df) tan(a) its density is cos(a)^(df - 1), on (0, pi/2)."""
    angle = np.linspace(0, np.pi / 2, 200_001)
    mass = np.cumsum(np.cos(angle) ** (df - 1))
    return math.sqrt(df) * math.tan(angle[np.searchsorted(mass, 0.95 * mass[-1])])


def interval(values: Any) -> dict[str, Any]:
    """Mean, 95 % t interval (None of one value) and the values of one quantity over seeds."""
    x = np.asarray(values, float)
    half = t_quantile(len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x)) if len(x) > 1 else math.nan
    ci95 = [x.mean() - half, x.mean() + half] if len(x) > 1 else None
    return {"mean": float(x.mean()), "ci95": ci95, "per_seed": x.tolist()}


def sign_flip_p(differences: Any) -> float:
    """Exact two-sided p: share of the 2^n sign patterns whose mean is at least as far from 0 as the one seen."""
    d = np.asarray(differences, float)
    signs = np.array(list(itertools.product((1, -1), repeat=len(d))))
    return float(np.mean(np.abs(signs @ d) >= abs(d.sum()) - 1e-12 * np.abs(d).sum()))


def run_cell(config: Config, folder: Path) -> dict[str, Any]:
    """results.json of one training run in a process of its own; taken up where it stands, never done twice."""
    wanted = json.loads(json.dumps(dataclasses.asdict(config)))
    done = folder / "results.json"
    if not done.exists() or json.loads(done.read_text())["config"] != wanted:
        started = folder / "config.yaml"
        choice = ["--out", str(folder), "--set", *(f"{k}={json.dumps(v)}" for k, v in wanted.items())]
        if started.exists() and read_yaml(started) == wanted:
            choice = ["--resume", str(folder)]
        child = subprocess.run([sys.executable, __file__, *choice], capture_output=True, text=True)
        if child.returncode:
            raise RuntimeError(f"{folder}: {child.stderr.strip() or child.returncode}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return json.loads(done.read_text()) | {"curve": [(r["step"] + 1, r["val"]) for r in rows if "val" in r]}


def run_grid(cells: dict[tuple, Config], out: Path, jobs: int) -> dict[tuple, dict]:
    """Runs every cell (name parts -> config), `jobs` at a time; the results in the order of the cells."""
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(cells), unit="run", disable=None) as bar:
        futures = {}
        for key, config in cells.items():
            futures[key] = pool.submit(run_cell, config, out / "-".join(map(str, key)))
            futures[key].add_done_callback(lambda _: bar.update())
        try:
            return {key: future.result() for key, future in futures.items()}
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def steps_to(curve: list, metric: str, target: float) -> float:
    """First evaluated step at which a metric reaches the target; NaN if it never does."""
    return next((step for step, val in curve if (val[metric] or 0) >= target), math.nan)


def quantities(results: dict[tuple, dict], modes: list[str], seeds: list[int]) -> dict[str, dict[str, list]]:
    """Each mode's numbers over seeds {mode: {metric: [...]}}; delta_m in %, positive = better than single task."""
    table = {}
    for mode in modes:
        runs = [results[mode, seed] for seed in seeds]
        columns = {m: [r["val"][m] for r in runs] for m in METRICS}
        columns |= {"parameters": [r["parameters"]["total"] for r in runs],
                    "flops_per_image": [r["flops_per_image"] for r in runs],
                    "step_ms": [r["time"]["step_ms"] for r in runs], "peak_rss_mb": [r["peak_rss_mb"] for r in runs]}
        for task, metric in (("det", "mAP50"), ("cls", "balanced_accuracy")):
            if "fixed" in modes:
                columns[f"steps_to_90_{task}"] = [
                    steps_to(results[mode, s]["curve"], metric, 0.9 * results["fixed", s]["val"][metric]) for s in seeds]
        table[mode] = {k: v for k, v in columns.items() if v[0] is not None}
    pair = {"mAP50-95": "detect", "balanced_accuracy": "classify"}
    for mode in modes:
        if all(m in table[mode] and single in table for m, single in pair.items()):
            gains = [np.divide(table[mode][m], table[single][m]) - 1 for m, single in pair.items()]
            table[mode]["delta_m"] = (100 * np.mean(gains, axis=0)).tolist()
    joint = [mode for mode in modes if "delta_m" in table[mode]]
    for mode in joint:
        ranks = [[1 + sum(table[o][m][k] > table[mode][m][k] for o in joint) for m in pair] for k in range(len(seeds))]
        table[mode]["mean_rank"] = np.mean(ranks, axis=1).tolist()
    return table


def paired(table: dict[str, dict[str, list]]) -> list[dict[str, Any]]:
    """Differences seed by seed against fixed, equal and the single-task reference, with interval and exact p."""
    rows = []
    for metric in METRICS:
        single = "detect" if metric.startswith("mAP") else "classify"
        for mode, versus in itertools.product(table, ("fixed", "equal", single)):
            if mode == versus or metric not in table[mode] or metric not in table.get(versus, {}):
                continue
            d = np.subtract(table[mode][metric], table[versus][metric])
            rows.append({"mode": mode, "versus": versus, "metric": metric, "delta": float(d.mean()),
                         "ci95": interval(d)["ci95"], "p": sign_flip_p(d)})
    return rows


def judge(claims: list[dict], table: dict[str, dict[str, list]]) -> list[dict[str, Any]]:
    """A verdict on each claim: where the 95 % interval of what it speaks of lies beside the range that it states.

    `measure` is [kind, metric, mode, versus]; kind is value, ratio (mode / versus), or gain (in % of versus).
    """
    rows = []
    for claim in claims:
        kind, metric, mode, versus = (*claim["measure"], None)[:4]
        a, b = table.get(mode, {}).get(metric), table.get(versus, {}).get(metric)
        if a is None or versus and b is None:
            continue
        x = np.asarray(a, float) if kind == "value" else np.divide(a, b)
        x = 100 * (x - 1) if kind == "gain" else x
        measured = interval(x)
        low, high = claim.get("at_least", -math.inf), claim.get("at_most", math.inf)
        ends = measured["ci95"] or [-math.inf, math.inf]
        verdict = "not decided by these data"
        if low <= ends[0] and ends[1] <= high:
            verdict = "holds"
        elif ends[1] < low or ends[0] > high:
            verdict = "does not hold"
        rows.append({"id": claim["id"], "claim": claim["claim"], "reported": claim["reported"],
                     "measured": measured["mean"], "ci95": measured["ci95"], "unit": claim.get("unit", ""),
                     "verdict": verdict, "measure": claim["measure"]})
    return rows


def report_rule(w: Tensor, g: Tensor, G0_bar: Tensor, r: Tensor, alpha: float) -> Tensor:
    """The report's update of the weights (2,), kept as it is: g does not depend on w, and w sums to T^2 = 4."""
    w = w * G0_bar * r**alpha / (g + 1e-8)
    return w / w.mean() * len(w)


def smoke_test(seed: int, rule: str) -> dict[str, Any]:
    """The report's smoke test (DET: cross-entropy, CLS: BCE, both on noise), under its own rule or under GradNorm."""
    torch.manual_seed(seed)
    trunk = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
                          nn.Flatten())
    heads = nn.ModuleList([nn.Linear(32, 4), nn.Linear(32, 4)])
    parameters = [*trunk.parameters(), *heads.parameters()]
    optimizer, W = torch.optim.Adam(parameters, lr=1e-3), trunk[0].weight
    w, balancer, L0, log = torch.tensor([1.0, 0.01]), GradNorm([1.0, 0.01], w_min=0.001), None, []
    started = time.perf_counter()
    for step in range(1, 51):  # 5 epochs of 10 batches
        features = trunk(torch.randn(8, 3, 64, 64))
        out = [head(features) for head in heads]
        target = torch.randint(4, (8,)), F.one_hot(torch.randint(4, (8,)), 4).float()
        losses = F.cross_entropy(out[0], target[0]), F.binary_cross_entropy_with_logits(out[1], target[1])
        L, g, n = torch.stack(losses).detach(), w * math.nan, None
        if rule == "report" and step >= 10:
            g = torch.stack([torch.autograd.grad(L_i, o, retain_graph=True)[0].norm() for L_i, o in zip(losses, out)])
            L0, G0_bar = (L, g.mean()) if L0 is None else (L0, G0_bar)
            r = L / L0 / (L / L0).mean()
            w = report_rule(w, g, G0_bar, r, 1.5)
        if rule == "gradnorm" or step == 50:
            n = torch.stack([torch.autograd.grad(L_i, W, retain_graph=True)[0].norm() for L_i in losses])
        loss = w[0] * losses[0] + w[1] * losses[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log.append((*w.tolist(), loss.item(), *g.tolist()))
        if rule == "gradnorm":
            w = balancer.update(L, n)
    seconds, log = time.perf_counter() - started, np.array(log)
    share = (w * n / (w * n).sum()).tolist()[0]
    return {"w": np.vstack([log[:, :2], w.tolist()]), "loss": log[:, 2], "seconds": seconds,
            "ratio": float(np.nanmean(log[:, 3] / log[:, 4])) if rule == "report" else None,
            "parameters": sum(p.numel() for p in parameters), "share_det": share}


def smoke_quantities(seeds: range) -> tuple[dict[str, dict[str, list]], dict[str, list]]:
    """What the smoke test gives under both rules, over seeds: numbers for `judge`, and the runs themselves."""
    runs = {rule: [smoke_test(seed, rule) for seed in seeds] for rule in ("report", "gradnorm")}
    table = {}
    for rule, of_rule in runs.items():
        epochs = np.array([r["loss"].reshape(5, 10).mean(1) for r in of_rule])
        final = np.array([r["w"][-1] for r in of_rule])
        table[f"smoke_{rule}"] = {
            "final_weight_det": final[:, 0], "final_weight_cls": final[:, 1], "weight_change_det": final[:, 0] - 1.0,
            "weight_change_cls": final[:, 1] - 0.01, "mean_loss": [r["loss"].mean() for r in of_rule],
            "parameters": [r["parameters"] for r in of_rule], "train_seconds": [r["seconds"] for r in of_rule],
            "share_det": [r["share_det"] for r in of_rule], "loss_change": 100 * (epochs[:, -1] / epochs[:, 0] - 1)}
    table["smoke_report"]["gradient_ratio"] = [r["ratio"] for r in runs["report"]]
    return {rule: {k: np.asarray(v, float).tolist() for k, v in q.items()} for rule, q in table.items()}, runs


def check_smoke(reported: dict, table: dict[str, list]) -> list[dict[str, Any]]:
    """Each number that the report prints beside what the seeds give; `spread` asks that it lie within their range."""
    checks = []
    for name, entry in reported.items():
        x, ok = np.array(table[name]), None
        if entry["tolerance"] == "spread":
            ok = bool(x.min() <= entry["value"] <= x.max())
        elif entry["tolerance"] != "machine":
            ok = bool(np.all(np.abs(x - entry["value"]) <= entry["tolerance"]))
        checks.append({"name": name, "reported": entry["value"], "measured": interval(x)["mean"],
                       "range": [x.min(), x.max()], "tolerance": entry["tolerance"], "ok": ok})
    return checks


def plain_backward(part: nn.Module, batch: Batch, losses: dict, w: Tensor) -> Signals:
    """A joint step as everyone writes it, without looking at gradients: the base that `bench` compares with."""
    P3 = part.trunk(batch.images)
    L = [losses[task](head(P3), batch) for task, head in part.heads.items()]
    sum(w_i * L_i for w_i, L_i in zip(w, L)).backward()
    return Signals(torch.stack(L).detach(), None, None, None, None)


def textbook_backward(part: nn.Module, batch: Batch, losses: dict, w: Tensor) -> Signals:
    """GradNorm as most repositories write it: L_grad is built as a graph and differentiated a second time."""
    w = w.clone().requires_grad_()
    P3 = part.trunk(batch.images)
    L = [losses[task](head(P3), batch) for task, head in part.heads.items()]
    G = torch.stack([torch.autograd.grad(w_i * L_i, part.trunk.W, retain_graph=True, create_graph=True)[0].norm()
                     for w_i, L_i in zip(w, L)])
    r = torch.stack(L).detach() / torch.stack(L).detach().mean()
    (dw,) = torch.autograd.grad((G - (G.mean() * r**1.5).detach()).abs().sum(), w, retain_graph=True)
    sum(w_i * L_i for w_i, L_i in zip(w.detach(), L)).backward()
    assert dw.shape == w.shape
    return Signals(torch.stack(L).detach(), (G / w).detach(), None, None, None)


def make_variant(name: str, config: Config, data: JointSet, device: torch.device, tasks: int = 2) -> Any:
    """A function that does one training step of a bench variant on a fixed batch, each with a network of its own."""
    mode = {"textbook": "gradnorm", "nchw": "gradnorm"}.get(name, name)
    run = Run(dataclasses.replace(config, mode=mode), data, device)
    how = {"fixed": plain_backward, "textbook": textbook_backward}.get(name, backward)
    for k in range(2, tasks):
        head = ClassificationHead(run.network.parts[0].trunk.c_out, len(data.classification_names), config.dropout)
        run.network.parts[0].heads[f"cls{k}"] = head.to(device, memory_format=torch.channels_last)
        run.losses[f"cls{k}"] = run.losses["cls"]
    run.w = torch.ones(tasks, device=device) if tasks > 2 else run.w
    if run.balancer:
        run.balancer = GradNorm(run.w.tolist(), config.alpha, config.gradnorm_lr, config.w_min, device=device)
    layout = torch.contiguous_format if name == "nchw" else torch.channels_last
    run.network.to(memory_format=layout)
    batch = to_device(data.__getitems__(list(range(config.batch_size))), device)
    batch = batch._replace(images=batch.images.contiguous(memory_format=layout))

    def step() -> None:
        train_step(run, batch, 0.5, how)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    step.run, step.images = run, batch.images
    return step


def time_interleaved(steps: dict[str, Any], rounds: int, bar: tqdm) -> dict[str, dict[str, np.ndarray]]:
    """Seconds of each step in each round, CPU and wall, all variants taking turns so that drift hits all alike."""
    times = {name: {"cpu": [], "wall": []} for name in steps}
    for k in range(-2, rounds):  # two rounds of warm-up
        for name, step in steps.items():
            wall, cpu = time.perf_counter(), time.process_time()
            step()
            if k >= 0:
                times[name]["cpu"].append(time.process_time() - cpu)
                times[name]["wall"].append(time.perf_counter() - wall)
        bar.update()
    return {name: {key: np.array(v) for key, v in t.items()} for name, t in times.items()}


def spread(x: np.ndarray) -> dict[str, float]:
    return {"median": float(np.median(x)), "min": float(x.min()), "max": float(x.max())}


def bench_case(config: Config, device: torch.device, rounds: int, bar: tqdm, names: tuple[str, ...],
               tasks: int = 2) -> dict[str, Any]:
    """Step times, throughput and ratios to `fixed` of some variants at one size; CPU time on a CPU, else wall time."""
    data, _ = load_data(dataclasses.replace(config, data="synthetic", train_images=config.batch_size, val_images=2))
    steps = {name: make_variant(name, config, data, device, tasks) for name in names}
    clock = "cpu" if device.type == "cpu" else "wall"
    times = time_interleaved(steps, rounds, bar)
    ratio = lambda a, b: spread(times[a][clock] / times[b][clock])  # noqa: E731
    pairs = [(a, b) for a, b in (("gradnorm", "fixed"), ("textbook", "fixed"), ("dual", "fixed"),
                                 ("textbook", "gradnorm"), ("nchw", "gradnorm")) if a in steps and b in steps]
    return {"step_ms": {a: {k: 1000 * v for k, v in spread(t["wall"]).items()} for a, t in times.items()},
            "cpu_ms": {a: {k: 1000 * v for k, v in spread(t["cpu"]).items()} for a, t in times.items()},
            "images_per_s": {a: config.batch_size / float(np.median(t["wall"])) for a, t in times.items()},
            "ratios": {f"{a}/{b}": ratio(a, b) for a, b in pairs},
            "inference_images_per_s": {a: infer(step) for a, step in steps.items() if a in MODES},
            "flops_per_image": {a: flops_per_image(step.run.network, data.canvas) for a, step in steps.items()}}


@torch.no_grad()
def infer(step: Any) -> float:
    """Images a second of the forward pass, median of five."""
    network, seconds = step.run.network.eval(), []
    for _ in range(5):
        started = time.perf_counter()
        network(step.images)
        seconds.append(time.perf_counter() - started)
    network.train()
    return len(step.images) / float(np.median(seconds))


def bench(config: Config, device: torch.device, rounds: int = 30) -> dict[str, Any]:
    """All variants at the default size and at width 0.25, 128 px; then growth with tasks, image size and batch."""
    all_names = ("detect", "classify", "fixed", "gradnorm", "textbook", "dual", "nchw")
    large = dataclasses.replace(config, width_multiple=0.25, dual_width_multiple=0.25, imgsz=128)
    growth = [("tasks", t, config, t) for t in (2, 4, 8)]
    growth += [("imgsz", s, dataclasses.replace(config, imgsz=s), 2) for s in (64, 128, 256)]
    growth += [("batch_size", b, dataclasses.replace(config, batch_size=b), 2) for b in (8, 16, 32, 64)]
    few = max(5, rounds // 3)
    with tqdm(total=2 * (rounds + 2) + len(growth) * (few + 2), unit="round", desc="bench", disable=None) as bar:
        result = bench_case(config, device, rounds, bar, all_names)
        result["width_0.25_128px"] = bench_case(large, device, rounds, bar, all_names)
        result["growth"] = []
        for key, value, case, tasks in growth:
            got = bench_case(case, device, few, bar, ("fixed", "gradnorm"), tasks)
            result["growth"].append({"key": key, "value": value, "step_ms": got["step_ms"]["gradnorm"]["median"],
                                     "images_per_s": got["images_per_s"]["gradnorm"],
                                     "gradnorm/fixed": got["ratios"]["gradnorm/fixed"]["median"]})
    return result | {"schema": "jointgrad/1", "mode": "bench", "environment": environment(device),
                     "peak_rss_mb": peak_rss_mb(), "config": dataclasses.asdict(config)}


# ----------------------------------------------------------------------------------------------------
# 12. Report: results -> files, tables, figures
# ----------------------------------------------------------------------------------------------------

COLOURS = {"det": "#1f77b4", "cls": "#d62728"}


def clean(value: Any) -> Any:
    """The value with tuples as lists, NumPy numbers as Python's and NaN as None, as JSON wants them."""
    if isinstance(value, dict):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [clean(v) for v in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_atomic(path: Path, content: Any) -> None:
    """Writes text, or saves any other object by torch, so that the file is the old or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with part.open("wb") as file:
            if isinstance(content, str):
                file.write(content.encode())
            else:
                torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(clean(value), indent=1, allow_nan=False) + "\n")


def number(x: Any, digits: int = 3) -> str:
    if x is None or isinstance(x, float) and math.isnan(x):
        return "n/a"
    return f"{x:,.{digits}f}" if isinstance(x, float) and abs(x) < 1e5 else f"{x:,.0f}" if isinstance(x, (int, float)) else str(x)


def with_ci(q: dict[str, Any], digits: int = 3) -> str:
    if q["ci95"] is None:
        return number(q["mean"], digits)
    return f"{number(q['mean'], digits)} [{number(q['ci95'][0], digits)}, {number(q['ci95'][1], digits)}]"


def markdown(header: list[str], rows: list[list[Any]]) -> str:
    """An aligned Markdown table."""
    cells = [header] + [[str(c) for c in row] for row in rows]
    widths = [max(len(row[k]) for row in cells) for k in range(len(header))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]) + "\n"


def pyplot() -> Any:
    """matplotlib without a window, loaded only when a figure is drawn."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                         "grid.alpha": 0.3, "savefig.dpi": 110, "legend.frameon": False})
    return plt


def save_figure(fig: Any, path: Path) -> None:
    with io.BytesIO() as buffer:
        fig.savefig(buffer, format="png", bbox_inches="tight", metadata={"Software": None})
        part = path.with_name(path.name + ".part")
        part.write_bytes(buffer.getvalue())
        part.replace(path)
    pyplot().close(fig)


def annotate(image: Image.Image, found: dict[str, Any], names: list[str], title: str) -> Image.Image:
    """The picture with its boxes and a title, enlarged to at least 320 px."""
    zoom = max(1, round(320 / max(image.size)))
    sheet = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    palette = ("#ff5c5c", "#5cb3ff", "#7dff5c", "#ffd75c", "#e05cff", "#5cffe4")
    for box in found["boxes"]:
        colour = palette[names.index(box["name"]) % len(palette)]
        x1, y1, x2, y2 = (v * zoom for v in box["box_xyxy"])
        draw.rectangle((x1, y1, x2, y2), outline=colour, width=2)
        text = f"{box['name']} {box['score']:.2f}" if "score" in box else box["name"]
        spot = draw.textbbox((x1, max(0, y1 - 14)), text, font=font)
        draw.rectangle(spot, fill="black")
        draw.text((x1, max(0, y1 - 14)), text, fill=colour, font=font)
    if title:
        draw.rectangle(draw.textbbox((4, 4), title, font=font), fill="black")
        draw.text((4, 4), title, fill="white", font=font)
    return sheet


def truth_of(data: JointSet, i: int) -> dict[str, Any]:
    """The labels of image i of a set, in the form that a Predictor returns them; px of the set's canvas."""
    corners = cxcywh_to_xyxy(torch.from_numpy(data.boxes[i][:, 1:])).numpy() * (data.canvas[::-1] * 2)
    boxes = [{"name": data.names[int(k)], "box_xyxy": c.tolist()} for k, c in zip(data.boxes[i][:, 0], corners)]
    known = data.classification_names and data.labels[i] != NO_LABEL
    return {"boxes": boxes, "classification": {"name": data.classification_names[data.labels[i]]} if known else None}


def draw_run(rows: list[dict], results: dict, val_set: JointSet, predictor: Predictor, path: Path) -> None:
    """The figure of one run: weights, losses, gradient shares, validation metrics, and four images, truth beside guess."""
    plt = pyplot()
    fig, axes = plt.subplots(3, 4, figsize=(13, 9.5))
    tasks = [t for t in ("det", "cls") if f"L/{t}" in rows[0]]
    steps = [r["step"] for r in rows]
    for task in tasks:
        name = {"det": "detection", "cls": "classification"}[task]
        axes[0, 0].plot(steps, [r[f"w/{task}"] for r in rows], color=COLOURS[task], label=name)
        L = np.array([r[f"L/{task}"] for r in rows])
        smooth = np.convolve(np.pad(L, 5, "edge"), np.ones(11) / 11, "valid")
        axes[0, 1].plot(steps, L, color=COLOURS[task], alpha=0.2)
        axes[0, 1].plot(steps, smooth, color=COLOURS[task], label=name)
        if f"G/{task}" in rows[0]:
            share = [r[f"G/{task}"] / max(sum(r[f"G/{u}"] for u in tasks), 1e-30) for r in rows]
            axes[0, 2].plot(steps, np.convolve(np.pad(share, 5, "edge"), np.ones(11) / 11, "valid"),
                            color=COLOURS[task], label=name)
    if "cosine" not in rows[0]:
        axes[0, 2].text(0.5, 0.5, "no shared trunk in this mode", ha="center", transform=axes[0, 2].transAxes)
    else:
        axes[0, 2].set_ylim(0, 1)
    curve = [(r["step"] + 1, r["val"]) for r in rows if "val" in r]
    for metric, colour in (("mAP50", COLOURS["det"]), ("accuracy", COLOURS["cls"])):
        if curve[-1][1][metric] is not None:
            axes[0, 3].plot([s for s, _ in curve], [v[metric] for _, v in curve], "o-", color=colour,
                            label=f"{metric} {curve[-1][1][metric]:.3f}")
    axes[0, 3].set_ylim(0, 1.02)
    titles = ("Task weights w", "Training losses L (unweighted)", "Share of the gradient at W, w n", "Validation")
    for ax, title in zip(axes[0], titles):
        ax.set_title(title)
        ax.set_xlabel("step")
        if ax.get_legend_handles_labels()[0]:
            ax.legend()
    for k, (top, bottom) in enumerate(axes[1:].T):
        image = Image.fromarray(val_set.__getitems__([k % len(val_set)]).images[0].permute(1, 2, 0).numpy())
        found, truth = predictor(image), truth_of(val_set, k % len(val_set))
        found["boxes"] = [b for b in found["boxes"] if b["score"] >= predictor.config.predict_conf]
        for ax, what, word in ((top, truth, "truth"), (bottom, found, "predicted")):
            ax.imshow(annotate(image, what, val_set.names, ""))
            ax.set_title(word + (f": {what['classification']['name']}" if what["classification"] else ""))
            ax.axis("off")
    fig.suptitle(f"{results['mode']} on {Path(results['data']).parent.name or 'synthetic'} data, seed {results['seed']}")
    fig.tight_layout()
    save_figure(fig, path)


def draw_compare(results: dict[str, Any], path: Path) -> None:
    """One panel a metric: every seed a dot, mean and 95 % interval beside it, the modes from left to right."""
    plt = pyplot()
    fig, axes = plt.subplots(1, 5, figsize=(15, 3.4))
    panels = (("mAP50", "Detection: mAP50"), ("mAP50-95", "Detection: mAP50-95"),
              ("balanced_accuracy", "Classification: balanced accuracy"),
              ("delta_m", "Average change against\nsingle task, % (up is better)"), ("step_ms", "Step time, ms"))
    for ax, (metric, title) in zip(axes, panels):
        have = [m for m in results["modes"] if metric in results["modes"][m]]
        for x, mode in enumerate(have):
            q = results["modes"][mode][metric]
            ax.plot([x + 0.12] * len(q["per_seed"]), q["per_seed"], ".", color="0.6", ms=5)
            ends = q["ci95"] or [q["mean"]] * 2
            ax.errorbar(x - 0.1, q["mean"], [[q["mean"] - ends[0]], [ends[1] - q["mean"]]], fmt="o", capsize=3,
                        color="#d62728" if mode == "gradnorm" else "#1f77b4")
        ax.set_xticks(range(len(have)), have, rotation=40, ha="right")
        ax.set_title(title, fontsize=9)
    fig.tight_layout()
    save_figure(fig, path)


def draw_smoke(runs: dict[str, list], path: Path) -> None:
    """The weights of the report's smoke test under its own rule and under GradNorm, all seeds, and the total loss."""
    plt = pyplot()
    fig, axes = plt.subplots(1, 3, figsize=(12, 3.4))
    for ax, (rule, title) in zip(axes, (("report", "The report's rule: w sums to 4,\ndetection falls to 0"),
                                        ("gradnorm", "GradNorm as published: w sums to 2,\nboth tasks keep a weight"))):
        for task, k in (("det", 0), ("cls", 1)):
            for i, run in enumerate(runs[rule]):
                ax.plot(run["w"][:, k], color=COLOURS[task], alpha=0.5, label=f"w {task}" if i == 0 else None)
        ax.set_title(title)
        ax.set_xlabel("step")
        ax.set_ylim(-0.1, 4.1)
        ax.legend()
    for rule, colour in (("report", "#d62728"), ("gradnorm", "#1f77b4")):
        axes[2].plot(np.mean([r["loss"] for r in runs[rule]], 0), color=colour, label=rule)
    axes[2].set_title("Total loss, mean over seeds:\nit follows the sum of the weights")
    axes[2].set_xlabel("step")
    axes[2].legend()
    fig.tight_layout()
    save_figure(fig, path)


def draw_sweep(results: dict[str, Any], path: Path) -> None:
    """Metrics over the values of one key, a line for each mode, with intervals over seeds."""
    plt = pyplot()
    metrics = [m for m in METRICS if any(m in row for row in results["rows"])]
    fig, axes = plt.subplots(1, len(metrics), figsize=(4 * len(metrics), 3.2), squeeze=False)
    for ax, metric in zip(axes[0], metrics):
        for mode in dict.fromkeys(row["mode"] for row in results["rows"]):
            rows = [row for row in results["rows"] if row["mode"] == mode and metric in row]
            if rows:
                mean = np.array([row[metric]["mean"] for row in rows])
                ends = np.array([row[metric]["ci95"] or [m, m] for row, m in zip(rows, mean)])
                ax.errorbar(range(len(rows)), mean, np.abs(ends.T - mean), marker="o", capsize=3, label=mode)
        values = list(dict.fromkeys(str(row["value"]) for row in results["rows"]))
        ax.set_xticks(range(len(values)), values)
        ax.set_xlabel(results["key"])
        ax.set_title(metric)
        ax.legend()
    fig.tight_layout()
    save_figure(fig, path)


def draw_bench(results: dict[str, Any], path: Path) -> None:
    """Ratios to the plain joint step at two sizes, and how throughput grows with tasks, image size and batch."""
    plt = pyplot()
    fig, axes = plt.subplots(1, 4, figsize=(14, 3.2))
    for k, (label, part) in enumerate((("default", results), ("width 0.25, 128 px", results["width_0.25_128px"]))):
        names = list(part["ratios"])
        axes[0].bar(np.arange(len(names)) + 0.4 * k, [part["ratios"][n]["median"] for n in names], 0.38, label=label)
        axes[0].set_xticks(np.arange(len(names)) + 0.2, names, rotation=40, ha="right")
    axes[0].axhline(1, color="0.3", lw=0.8)
    axes[0].set_title("Ratio of step times, median")
    axes[0].legend()
    for ax, key in zip(axes[1:], ("tasks", "imgsz", "batch_size")):
        rows = [r for r in results["growth"] if r["key"] == key]
        ax.plot([str(r["value"]) for r in rows], [r["images_per_s"] for r in rows], "o-")
        ax.set_title("gradnorm: images/s")
        ax.set_xlabel(key)
        ax.set_ylim(0)
    fig.tight_layout()
    save_figure(fig, path)


def report_run(results: dict[str, Any]) -> str:
    """The closing table of one training run."""
    val, rows = results["val"], []
    rows += [[m, number(val[m])] for m in METRICS if val[m] is not None]
    rows += [[f"{kind} {name}", number(v)] for kind, each in val["per_class"].items() for name, v in each.items()]
    rows += [["weights, first", " / ".join(number(w) for w in results["weights"]["initial"])],
             ["weights, final", " / ".join(number(w) for w in results["weights"]["final"])],
             ["loss, mean / last epoch", f"{number(results['loss']['mean'])} / {number(results['loss']['final'])}"]]
    for key, value in (results["interference"] or {"gradients on a shared trunk": None}).items():
        rows.append([key, " / ".join(map(number, value.values())) if isinstance(value, dict) else number(value)])
    rows += [["parameters", number(results["parameters"]["total"])],
             ["training", f"{results['time']['train_s']:.1f} s, {results['time']['step_ms']:.1f} ms a step"]]
    return markdown([f"{results['mode']}, seed {results['seed']}", "value"], rows)


def report_compare(results: dict[str, Any]) -> str:
    """Three Markdown tables: modes with intervals, paired differences, claims with verdicts."""
    columns = [*METRICS, "delta_m", "mean_rank", "steps_to_90_det", "steps_to_90_cls", "step_ms", "parameters",
               "flops_per_image", "peak_rss_mb"]
    rows = [[mode, *(with_ci(q[c], 1 if c in ("delta_m", "step_ms", "mean_rank") else 3 if c in METRICS else 0)
                     if c in q else "n/a" for c in columns)] for mode, q in results["modes"].items()]
    text = f"n = {len(results['seeds'])} seeds; mean [95 % interval]\n\n" + markdown(["mode", *columns], rows)
    rows = [[r["mode"], r["versus"], r["metric"], f"{r['delta']:+.3f}",
             with_ci({"mean": r["delta"], "ci95": r["ci95"]}).partition(" ")[2], f"{r['p']:.4f}"] for r in results["paired"]]
    text += "\nPaired over seeds\n\n" + markdown(["mode", "versus", "metric", "difference", "95 %", "p"], rows)
    return text + "\nClaims of the report\n\n" + report_claims(results["claims"])


def report_claims(claims: list[dict[str, Any]]) -> str:
    rows = [[c["id"], c["claim"], c["reported"], with_ci({"mean": c["measured"], "ci95": c["ci95"]}, 2) + f" {c['unit']}",
             c["verdict"]] for c in claims]
    return markdown(["id", "claim", "reported", "measured, 95 %", "verdict"], rows)


def report_bench(results: dict[str, Any]) -> str:
    text = ""
    for title, part in (("default size", results), ("width 0.25, 128 px", results["width_0.25_128px"])):
        rows = [[name, *(number(part["step_ms"][name][k], 1) for k in ("median", "min", "max")),
                 number(part["cpu_ms"][name]["median"], 1), number(part["images_per_s"][name], 0),
                 number(part["inference_images_per_s"].get(name), 0), number(part["flops_per_image"][name])]
                for name in part["step_ms"]]
        text += f"{title}\n\n" + markdown(["variant", "step ms, median", "min", "max", "CPU ms", "train images/s",
                                           "inference images/s", "FLOPs an image"], rows)
        text += "\n" + markdown(["ratio", "median", "min", "max"],
                                [[n, *(number(r[k]) for k in ("median", "min", "max"))] for n, r in part["ratios"].items()]) + "\n"
    rows = [[g["key"], g["value"], number(g["step_ms"], 1), number(g["images_per_s"], 0), number(g["gradnorm/fixed"])]
            for g in results["growth"]]
    return text + markdown(["grows", "value", "gradnorm step ms", "images/s", "gradnorm/fixed"], rows)


# ----------------------------------------------------------------------------------------------------
# 13. Command line: arguments -> one of the jobs above, files under --out, an exit code
# ----------------------------------------------------------------------------------------------------


def pick_device(name: str) -> torch.device:
    """The device asked for; `auto` takes the first there is of cuda, mps, cpu. A device that is absent is an error."""
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(key for key, there in have.items() if there)
    if not have[name]:
        raise UserError(f"--device {name}: this machine or this torch build has none; use --device cpu")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)


def warn(data: tuple[JointSet, ...]) -> None:
    lines = [line for split in data for line in split.warnings]
    for line in lines[:10] + ([f"… and {len(lines) - 10} more"] if len(lines) > 10 else []):
        print(f"warning: {line}", file=sys.stderr)


def run_training(config: Config, out: Path, resume: bool) -> int:
    """Trains, writing the log and checkpoints of every epoch, then results.json, the figure and the closing table."""
    device = pick_device(config.device)
    train_set, val_set = load_data(config)
    run, rows, log = Run(config, train_set, device), [], out / "metrics.jsonl"
    if resume and (out / "last.pt").exists():
        run.load_state_dict(load_checkpoint(out / "last.pt")["run"])
        rows = [json.loads(line) for line in log.read_text().splitlines() if line.endswith("}")]
        rows = [row for row in rows if row["epoch"] < run.epoch]  # later ones belong to an epoch cut short
    if run.rank == 0:
        warn((train_set, val_set))
        print(f"jointgrad {config.mode}: torch {torch.__version__}, {device}, {config.threads} thread(s), seed "
              f"{config.seed}, {config.data}: {len(train_set)} train, {len(val_set)} val, {train_set.canvas} px")
        write_atomic(out / "config.yaml", yaml.safe_dump(clean(dataclasses.asdict(config)), sort_keys=False))
        write_atomic(log, "".join(json.dumps(row) + "\n" for row in rows))
        if not resume:
            for name in ("last.pt", "best.pt", "results.json", "figure.png"):
                (out / name).unlink(missing_ok=True)
    for new in train(run, train_set, val_set):
        if run.rank == 0:
            rows += clean(new)
            save_epoch(run, rows[-len(new):], train_set, out)
    if run.rank == 0:
        results = clean(summarise(run, rows, train_set.canvas))
        draw_run(rows, results, val_set, Predictor(out / "last.pt"), out / "figure.png")
        write_json(out / "results.json", results)
        print(report_run(results) + f"\nwritten to {out}/: results.json, figure.png, metrics.jsonl, last.pt, best.pt")
    return 0


def save_epoch(run: Run, new: list[dict], train_set: JointSet, out: Path) -> None:
    """Adds an epoch to the log, then replaces last.pt, and best.pt where validation has never been as good."""
    with (out / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in new))
    score = np.mean([v for key in ("mAP50", "balanced_accuracy") if (v := new[-1].get("val", {}).get(key)) is not None]
                    or [-1.0])
    better, run.best = score > run.best, max(run.best, float(score))
    state = {"format": "jointgrad/1", "config": clean(dataclasses.asdict(run.config)), "names": train_set.names,
             "classification_names": train_set.classification_names, "run": run.state_dict()}
    for name in ["best.pt"] * int(better) + ["last.pt"]:
        write_atomic(out / name, state)


def run_compare(config: Config, seeds: list[int], out: Path, jobs: int) -> dict[str, Any]:
    cells = {(mode, seed): dataclasses.replace(config, mode=mode, seed=seed) for seed in seeds for mode in MODES}
    load_data(config)  # faults in the data are told once, before the first run
    table = quantities(run_grid(cells, out / "runs", jobs), list(MODES), seeds)
    smoke, _ = smoke_quantities(range(10))
    claims = judge(read_yaml(ROOT / "data" / "reported.yaml")["claims"], table | smoke)
    results = {"schema": "jointgrad/1", "mode": "compare", "seeds": seeds, "config": dataclasses.asdict(config),
               "environment": environment(pick_device(config.device)),
               "modes": {mode: {k: interval(v) for k, v in q.items()} for mode, q in table.items()},
               "paired": paired(table), "claims": claims, "delta_m": "mean over tasks of (mode - single) / single in %, "
               "of mAP50-95 and balanced accuracy; positive is better than single task"}
    write_json(out / "results.json", results)
    results = clean(results)
    write_atomic(out / "compare.md", report_compare(results))
    draw_compare(results, out / "figure.png")
    print(report_compare(results))
    return results


def run_check(path: Path, out: Path, jobs: int) -> int:
    """Repeats a recorded comparison; 1 where a mean of a metric leaves its recorded interval."""
    try:
        recorded = json.loads(path.read_text())
        config = make_config(recorded["config"], str(path))
        wanted = {(m, k): q[k] for m, q in recorded["modes"].items() for k in METRICS if k in q}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: expected the results.json of a comparison ({error})") from error
    measured = run_compare(config, recorded["seeds"], out, jobs)["modes"]
    rows, bad = [], 0
    for (mode, metric), q in wanted.items():
        mean, ends = measured[mode][metric]["mean"], q["ci95"] or [q["mean"]] * 2
        ok = ends[0] - 1e-9 <= mean <= ends[1] + 1e-9
        bad += not ok
        rows.append([mode, metric, with_ci(q), number(mean), "ok" if ok else "OUTSIDE"])
    print(markdown(["mode", "metric", "recorded", "measured", ""], rows))
    return int(bad > 0)


def run_reproduce(out: Path) -> int:
    reported = read_yaml(ROOT / "data" / "reported.yaml")
    table, runs = smoke_quantities(range(10))
    checks = check_smoke(reported["smoke_test"], table["smoke_report"])
    claims = judge(reported["claims"], table)
    results = {"schema": "jointgrad/1", "mode": "reproduce", "checks": checks, "claims": claims,
               "gradient_ratio": interval(table["smoke_report"]["gradient_ratio"]),
               "rules": {rule: {k: interval(v) for k, v in q.items()} for rule, q in table.items()}}
    write_json(out / "results.json", results)
    draw_smoke(runs, out / "figure.png")
    results = clean(results)
    side = {c["name"]: results["rules"]["smoke_gradnorm"][c["name"]] for c in results["checks"]}
    print(markdown(["number", "reported", "measured", "range over 10 seeds", "ok", "under GradNorm as published"],
                   [[c["name"], c["reported"], number(c["measured"]), " to ".join(map(number, c["range"])),
                     {True: "yes", False: "NO", None: "machine"}[c["ok"]], with_ci(side[c["name"]])]
                    for c in results["checks"]]))
    print("Why the report's rule collapses: its norms are those of the unweighted losses, so the weights never feed\n"
          "back and every update multiplies w_det / w_cls by g_cls / g_det. That ratio of output gradients, mean\n"
          f"cross-entropy over mean BCE, is {number(results['gradient_ratio']['mean'], 2)} here whatever the tasks' "
          "difficulty, and it compounds. Dividing by the mean and multiplying by T\nmakes the weights sum to T^2 = 4, "
          "so all of it ends on classification and the detector is no longer trained.\n")
    print(report_claims(claims))
    return int(any(c["ok"] is False for c in checks))


def run_sweep(config: Config, spec: str, modes: tuple[str, ...], seeds: list[int], out: Path, jobs: int) -> None:
    key, _, text = spec.partition("=")
    try:
        values = yaml.safe_load(f"[{text}]")
        cells = {(key, str(v).replace("/", "_").replace(" ", ""), mode, seed):
                 make_config(dataclasses.asdict(config) | {key: v, "mode": mode, "seed": seed}, "--sweep")
                 for v in values for mode in modes for seed in seeds}
    except yaml.YAMLError as error:
        raise UserError(f"--sweep {spec[:80]}: expected key=v1,v2,… as in alpha=0,1.5") from error
    runs = list(run_grid(cells, out / "runs", jobs).values())
    rows = []
    for k, (value, mode) in enumerate(itertools.product(values, modes)):
        group = runs[k * len(seeds):(k + 1) * len(seeds)]
        rows.append({"value": value, "mode": mode} | {
            m: interval([r["val"][m] for r in group]) for m in METRICS if group[0]["val"][m] is not None} | {
            m: interval([r["interference"][m] for r in group]) for m in ("cosine_mean", "cosine_W_mean", "conflict_share",
                                                                       "magnitude_similarity") if group[0]["interference"]} | (
            {"share_det": interval([r["interference"]["gradient_share"]["det"] for r in group])} if group[0]["interference"] else {}))
    results = clean({"schema": "jointgrad/1", "mode": "sweep", "key": key, "seeds": seeds,
                     "config": dataclasses.asdict(config), "rows": rows})
    write_json(out / "results.json", results)
    columns = [c for c in (*METRICS, "cosine_mean", "cosine_W_mean", "magnitude_similarity", "share_det")
               if any(c in row for row in results["rows"])]
    text = markdown([key, "mode", *columns], [[row["value"], row["mode"], *(with_ci(row[c]) if c in row else "n/a" for c in columns)]
                                              for row in results["rows"]])
    write_atomic(out / "sweep.md", text)
    draw_sweep(results, out / "figure.png")
    print(text)


def run_predict(args: argparse.Namespace, out: Path) -> None:
    """Annotated pictures and predictions.json, for a picture, a folder, or the val split (then with metrics)."""
    predictor = Predictor(args.checkpoint, str(pick_device(args.device or "auto")))
    results, data = {"schema": "jointgrad/1", "mode": "predict"}, None
    if args.source:
        source = Path(args.source)
        files = sorted(p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES) if source.is_dir() else [source]
        if not files:
            raise UserError(f"--source {source}: no image in this folder; expected {' '.join(sorted(SUFFIXES))}")
        items = [(str(f.relative_to(source) if source.is_dir() else f.name), partial(read_image, f)) for f in files]
    else:
        config = dataclasses.replace(predictor.config, data=args.data or predictor.config.data)
        _, data = load_data(config)
        if data.names != predictor.names or data.classification_names != predictor.classification_names:
            raise UserError(f"--data {config.data}: its classes are not those that {args.checkpoint} was trained on")
        results["metrics"] = evaluate(predictor.network, data, config, np.linspace(0.5, 0.95, 10))
        items = [(data.paths[i].name if data.paths else f"{i:05d}.png",
                  partial(read_image, data.paths[i]) if data.paths else partial(Image.fromarray, data.pixels[i]))
                 for i in range(len(data))]
    results["images"] = []
    for k, (name, read) in enumerate(tqdm(items, unit="image", disable=None, leave=False)):
        image = read()
        found = predictor(image)
        found["boxes"] = [b for b in found["boxes"] if b["score"] >= predictor.config.predict_conf]
        title = found["classification"]["name"] if found["classification"] else ""
        picture = out / f"{k:05d}-{Path(name).stem[:60]}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        annotate(image, found, predictor.names, title).save(picture)
        results["images"].append({"image": name, "picture": picture.name} | found)
    write_json(out / "predictions.json", results)
    if data:
        print(markdown(["metric", "value"], [[m, number(results["metrics"][m])] for m in METRICS]))
    print(f"{len(items)} pictures and predictions.json written to {out}/")


def export(config: Config, folder: Path) -> None:
    """The synthetic set as files in the joint format, so that any other trainer can be run on the same images."""
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"--export {folder}: not empty; give a new folder")
    for split, data in zip(("train", "val"), load_data(dataclasses.replace(config, data="synthetic"))):
        for i, (pixels, boxes, label) in enumerate(zip(data.pixels, data.boxes, data.labels)):
            image = folder / "images" / split / f"{i:05d}.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(image)
            rows = ["%d %.6f %.6f %.6f %.6f" % tuple(row) for row in boxes.tolist()]
            write_atomic(label_path(image), "\n".join([*rows, "", " ".join(str(int(k == label)) for k in range(3)), ""]))
    spec = {"path": ".", "train": "images/train", "val": "images/val", "nc": len(JETS), "names": list(JETS),
            "classification_names": list(VIEWS)}
    write_atomic(folder / "data.yaml", yaml.safe_dump(spec, sort_keys=False))
    print(f"{config.train_images} train and {config.val_images} val images written to {folder}/")


def report_data(config: Config) -> None:
    """Counts per split and class of a data set; its faults end the program before."""
    splits = load_data(dataclasses.replace(config, cache_mb=0))
    warn(splits)
    columns = [(len(s), *np.bincount(np.concatenate(s.boxes)[:, 0].astype(int), minlength=len(s.names)),
                *[s.labels.count(k) for k in range(len(s.classification_names))], s.labels.count(NO_LABEL)) for s in splits]
    names = ["images", *(f"box {n}" for n in splits[0].names), *(f"class {n}" for n in splits[0].classification_names),
             "no image class"]
    print(markdown(["", "train", "val"], [list(row) for row in zip(names, *columns)]))
    if any(len(b) for b in splits[0].boxes):
        sizes = np.concatenate([b[:, 3:] * splits[0].canvas[::-1] for b in splits[0].boxes])
        print(f"canvas {splits[0].canvas} px; anchors, px:\n{np.round(fit_anchors(sizes)).astype(int).tolist()}")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="jointgrad.py", description="Joint detection and classification: does one "
                                     "task's gradient hurt the other, and which remedy works at what cost?")
    extra = ("compare", "reproduce", "bench", "predict", "check")
    parser.add_argument("--mode", choices=MODES + extra, help="what to do (default: config.yaml's mode)")
    parser.add_argument("--data", help="synthetic, or the data.yaml of a joint YOLO set")
    parser.add_argument("--config", type=Path, default=ROOT / "config.yaml", help="YAML file laid over config.yaml")
    parser.add_argument("--seed", type=int, help="seed of one run")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="seeds of compare and --sweep (default: 0 to 5)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), help="where to compute")
    parser.add_argument("--out", type=Path, help="folder of the results (default: runs/<mode>-<data>-s<seed>)")
    parser.add_argument("--resume", type=Path, metavar="DIR", help="go on with an interrupted run")
    parser.add_argument("--set", nargs="+", default=[], action="extend", metavar="KEY=VALUE", help="override config keys")
    parser.add_argument("--sweep", metavar="KEY=V1,V2", help="run --mode (compare: all modes) at several values of a key")
    parser.add_argument("--export", type=Path, metavar="DIR", help="write the synthetic set in the joint format and stop")
    parser.add_argument("--check", type=Path, metavar="FILE", help="repeat a recorded comparison; 1 if a mean has moved")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side (default: one a core)")
    parser.add_argument("--checkpoint", type=Path, help="predict: a run's best.pt or last.pt")
    parser.add_argument("--source", help="predict: an image or a folder, in place of the data's val split")
    return parser.parse_args(argv)


def dispatch(args: argparse.Namespace) -> int:
    """Does what the arguments ask for; the exit code."""
    if args.resume and not (args.resume / "config.yaml").is_file():
        raise UserError(f"--resume {args.resume}: no config.yaml there; expected the folder of an interrupted run")
    mode = args.mode if args.mode in MODES else None
    config = load_config(args.resume / "config.yaml" if args.resume else args.config, args.set,
                         mode=mode, data=args.data, seed=args.seed, device=args.device)
    torch.set_num_threads(config.threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    seeds = args.seeds or list(range(6))
    if len(set(seeds)) > 12 or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UserError("--seeds: expected at most 12 different numbers from 0 up (2^12 sign patterns)")
    name = "sweep" if args.sweep else "compare" if args.check else args.mode or config.mode
    data = "synthetic" if config.data == "synthetic" else Path(config.data).resolve().parent.name
    out = args.resume or args.out or Path("runs") / "-".join([name, data] + [f"s{config.seed}"] * (name in MODES))
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: is a file; give a folder")
    if args.export:
        export(config, args.export)
    elif args.check:
        return run_check(args.check, out, args.jobs)
    elif args.sweep:
        run_sweep(config, args.sweep, MODES if args.mode == "compare" else (config.mode,), seeds, out, args.jobs)
    elif args.mode == "compare":
        run_compare(config, seeds, out, args.jobs)
    elif args.mode == "reproduce":
        return run_reproduce(out)
    elif args.mode == "bench":
        results = clean(bench(config, pick_device(config.device)))
        write_json(out / "results.json", results)
        write_atomic(out / "bench.md", report_bench(results))
        draw_bench(results, out / "figure.png")
        print(report_bench(results))
    elif args.mode == "predict":
        if not args.checkpoint:
            raise UserError("--mode predict: needs --checkpoint runs/<name>/best.pt")
        run_predict(args, out)
    elif args.mode == "check":
        report_data(config)
    else:
        return run_training(config, out, bool(args.resume))
    return 0


def main(argv: list[str] | None = None) -> int:
    """Runs the command line: 0 done, 1 failed, 2 a mistake in the input, 130 interrupted."""
    args = parse_args(argv)
    try:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            torch.distributed.init_process_group("nccl" if torch.cuda.is_available() and args.device != "cpu" else "gloo")
        return dispatch(args)
    except UserError as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2
    except (NonFinite, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the last whole epoch is saved: go on with --resume DIR", file=sys.stderr)
        return 130
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
