"""jointgrad: does a classifier's gradient hurt the detector that shares its trunk?

And which remedy works at what cost: GradNorm, or two independent networks? One network learns
object detection and image-level classification together, under fixed weights, equal weights and
GradNorm, beside single-task references and two networks; `--mode compare` judges them over seeds.

    python jointgrad.py --mode gradnorm     # built-in synthetic data, half a minute on one CPU core

GradNorm (Chen et al., ICML 2018) as `GradNorm.update` computes it, in the paper's letters:

    n_i = ||grad_W L_i||             G_i = w_i n_i = ||grad_W w_i L_i||      G_bar = mean(G)
    L_tilde_i = L_i / L_i(0)         r_i = L_tilde_i / mean(L_tilde)      target_i = G_bar r_i^alpha
    L_grad = sum |G_i - target_i|    dL_grad/dw_i = sign(G_i - target_i) n_i    w <- Adam(dL_grad)
    w <- w T / sum(w), with a floor: w <- w_min + (w - w_min) (T - T w_min) / sum(w - w_min)

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
- GradNorm: the weights keep a floor w_min (as published they go negative on the paper's own toy).
- GradNorm: a step on which a task has no labels leaves the weights' gradient at zero.
- YOLOv5: BatchNorm momentum 0.1, AdamW, class gain 1.0 (config.yaml): for runs of some 100 steps.
- YOLOv5: of several objectness targets for one cell the largest counts, whatever their order.
- YOLOv5: non-maximum suppression looks at the 512 best candidates of an image.
- COCO: average precision counts max_det (300) detections an image, not 100.

Sources: Chen, Badrinarayanan, Lee, Rabinovich, arXiv 1711.02257 (GradNorm); Jocher et al.,
YOLOv5 v6 (design only); Zheng et al., arXiv 1911.08287 (CIoU); Hu et al., arXiv 1709.01507 (SE);
Woo et al., arXiv 1807.06521 (CBAM).
"""
from __future__ import annotations

import argparse
import contextlib
import ctypes
import difflib
import gc
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
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Iterator, NamedTuple, get_type_hints

# Idle OpenMP threads that spin make a step up to 20 times slower on a shared machine. Read once,
# when torch loads; the third is what torch asks for to be deterministic on CUDA.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import yaml  # noqa: E402
from PIL import Image, ImageDraw, ImageFont, ImageOps  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.optim.adam import adam  # noqa: E402
from tqdm import tqdm  # noqa: E402

# --------------------------------------------------------------------------------------------------
# 1. Config: config.yaml and --set -> one frozen, checked Config
# --------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent
MODES = ("detect", "classify", "fixed", "equal", "gradnorm", "dual")
In = Annotated  # a type, then its range, or its choices
# What PyYAML raises on hostile text, beside its own errors.
YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError)

class UserError(ValueError):
    """A mistake in the user's input: what was found, where, what was expected, how to mend it."""

@dataclass(frozen=True)
class Config:
    """Every setting with type and range; values and meaning stand in config.yaml alone."""

    mode: In[(str, *MODES)]
    data: str
    seed: In[int, 0, 2**31]
    device: In[str, "auto", "cpu", "cuda", "mps"]
    threads: In[int, 1, 256]
    amp: In[str, "none", "bf16"]
    imgsz: In[int, 32, 4096]
    dominance: In[float, 0, 1]
    train_images: In[int, 2, 10**6]
    val_images: In[int, 2, 10**6]
    cache_mb: In[float, 0, 1e6]
    workers: In[int, 0, 64]
    flip_x: In[float, 0, 1]
    flip_y: In[float, 0, 1]
    scale: In[float, 0, 0.9]
    shift: In[float, 0, 0.5]
    anchors: object
    anchor_thres: In[float, 1, 100]
    width_multiple: In[float, 0.03125, 4]
    depth_multiple: In[float, 0.1, 4]
    dual_width_multiple: In[float, 0.03125, 4]
    batchnorm_momentum: In[float, 0.001, 1]
    dropout: In[float, 0, 0.9]
    box_gain: In[float, 0, 100]
    obj_gain: In[float, 0, 100]
    cls_gain: In[float, 0, 100]
    det_loss_times_batch: bool
    class_balance: bool
    initial_weights: In[tuple, 1e-6, 1e6]
    alpha: In[float, -10, 10]
    gradnorm_lr: In[float, 1e-6, 1]
    w_min: In[float, 0, 0.5]
    epochs: In[int, 1, 10**6]
    batch_size: In[int, 2, 4096]
    lr: In[float, 1e-8, 1]
    dual_lr: In[float, 1e-8, 1]
    betas: In[tuple, 0, 0.9999]
    weight_decay: In[float, 0, 1]
    warmup: In[float, 0, 1]
    grad_clip: In[float, 1e-3, 1e6]
    progressive_share: In[float, 0, 1]
    progressive_scale: In[float, 0.1, 1]
    eval_interval: In[int, 1, 10**6]
    conf_thres: In[float, 0, 1]
    iou_thres: In[float, 0, 1]
    max_det: In[int, 1, 512]
    predict_conf: In[float, 0, 1]

    @property
    def tasks(self) -> tuple[str, ...]:
        return {"detect": ("det",), "classify": ("cls",)}.get(self.mode, ("det", "cls"))

    @property
    def weights(self) -> tuple[float, ...]:
        """The loss weights at step 0, one for each of `tasks`."""
        given = self.mode in ("fixed", "gradnorm")
        return self.initial_weights if given else (1.0,) * len(self.tasks)

def read_text(path: Path, limit: int = 64) -> str:
    """The text of a UTF-8 file of at most `limit` MB; UserError where it is none."""
    try:
        with path.open("rb") as file:
            raw = file.read(limit * 2**20 + 1)  # no more: a device file has no end
        if len(raw) > limit * 2**20:
            raise UserError(f"{path}: larger than {limit} MB; expected a short text file")
        text = raw.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save as UTF-8") from error
    if "\0" in text:
        raise UserError(f"{path}: holds zero bytes; expected UTF-8 text")
    return text

def read_yaml(path: Path) -> Any:
    """A YAML file's content by safe_load; UserError if absent, malformed, huge or an alias bomb."""
    text = read_text(path, limit=1)
    try:
        if text.count("[") + text.count("{") > 1000:
            raise ValueError("over 1000 brackets; write the values out")
        if sum(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text)) > 20:
            raise ValueError("over 20 aliases; write the values out")
        return yaml.safe_load(text)
    except YAML_ERRORS as error:
        mark = getattr(error, "problem_mark", None)
        reason = getattr(error, "problem", None) or " ".join(str(error).split())[:80]
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: not plain YAML ({reason})") from error

def _coerce(key: str, value: Any, hint: Any) -> Any:
    """The value by its meaning, not by YAML's guess: "1e-3" is a number, 2.5 is no int."""
    kind, limits = getattr(hint, "__origin__", hint), getattr(hint, "__metadata__", ())

    def number(x: Any) -> float | int:
        x = math.nan if isinstance(x, bool) else float(x)
        if not limits[0] <= x <= limits[1] or kind is int and x % 1:  # also if NaN
            raise ValueError
        return int(x) if kind is int else x

    with contextlib.suppress(ValueError, TypeError, LookupError, OverflowError):
        if kind is str and isinstance(value, str) and "\0" not in value:  # no path has zero bytes
            if value in limits or not limits:
                return value
        if kind is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if kind is tuple:
            first, second = value.split(",") if isinstance(value, str) else value
            return number(first), number(second)
        if kind in (int, float):
            return number(value)
        boxes = np.ones((3, 3, 2)) if value == "auto" else np.asarray(value, float)
        if kind is object and boxes.shape == (3, 3, 2) and ((boxes > 0) & (boxes < 1e6)).all():
            return value
    span = f" from {limits[0]:g} to {limits[1]:g}" if kind in (int, float, tuple) else ""
    words = {str: " | ".join(limits if kind is str else ()) or "text", bool: "true or false",
             object: "auto, or 3 levels of 3 [width, height] in px", int: "a whole number",
             float: "a number", tuple: "two numbers"}
    with contextlib.suppress(ValueError):  # an int of thousands of digits has no text
        value = repr(value)[:80]
    shown = value if isinstance(value, str) else "a huge number"
    raise UserError(f"config key {key}: found {shown}, expected {words[kind]}{span}")

def make_config(values: Any, where: str = "config") -> Config:
    """A checked Config from a mapping of exactly its keys; UserError names key, value and range."""
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected lines of 'key: value', found {type(values).__name__}")
    hints = get_type_hints(Config, include_extras=True)
    for key in (key for key in values if key not in hints):
        near = difflib.get_close_matches(str(key), hints, n=1, cutoff=0.6)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"{where}: unknown key {str(key)[:60]!r}{hint}")
    for key in (key for key in hints if key not in values):
        raise UserError(f"{where}: missing key {key!r}; start from the shipped config.yaml")
    config = Config(**{key: _coerce(key, values[key], hint) for key, hint in hints.items()})
    if config.imgsz % 32:
        raise UserError(f"config key imgsz: found {config.imgsz}, expected a multiple of 32")
    return config

def override(config: Config, settings: list[str], **fields: Any) -> Config:
    """The config with `key=value` texts and those fields that are not None."""
    values = asdict(config)
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text}: expected key=value, as in --set epochs=3")
        try:
            values |= {key.strip(): yaml.safe_load(value)}
        except YAML_ERRORS as error:
            raise UserError(f"--set {text[:80]}: the value is not plain YAML") from error
    return make_config(values | {k: v for k, v in fields.items() if v is not None}, "--set")

def load_config(path: Path, settings: list[str] = (), **fields: Any) -> Config:
    """The Config of a YAML file laid over the shipped one, then `override`."""
    values, given = read_yaml(ROOT / "config.yaml"), read_yaml(path)
    config = make_config(values | given if isinstance(given, dict) else given, str(path))
    return override(config, settings, **fields)

# --------------------------------------------------------------------------------------------------
# 2. Synthetic data: (seed, split, i) -> one echocardiogram-like frame, its jets and its view
# --------------------------------------------------------------------------------------------------

JETS = {"AR": 5, "MR": 230, "PR": 55, "TR": 160}  # leaking valve: hue of its Doppler, degrees
VIEWS = ("PSAX", "PLAX", "A4C")

def speckle(rng: np.random.Generator, shape: tuple[int, int], s: float, a: float = 1) -> np.ndarray:
    """Speckle amplitude (H, W), mean 1: complex noise under a Gaussian, a*s px across, s down."""
    noise = rng.standard_normal((2, *shape))  # (2, H, W): real and imaginary part
    fy, fx = np.fft.fftfreq(shape[0])[:, None], np.fft.fftfreq(shape[1])
    H = np.exp(-2 * np.pi**2 * (a * s * fx)**2) * np.exp(-2 * np.pi**2 * (s * fy)**2)
    amplitude = np.abs(np.fft.ifft2(np.fft.fft2(noise[0] + 1j * noise[1]) * H))
    return amplitude / amplitude.mean()

def hsv_to_rgb(h: np.ndarray, s: float, v: np.ndarray) -> np.ndarray:
    """RGB (..., 3) in [0, 1] of a hue in degrees, a saturation and a value."""
    k = (np.array([5.0, 3.0, 1.0]) + h[..., None] / 60) % 6
    return v[..., None] * (1 - s * np.clip(np.minimum(k, 4 - k), 0, 1))

def place_jets(rng: np.random.Generator, apex: np.ndarray, radius: float,
               angle: float) -> np.ndarray:
    """One to three boxes (n, 4), cx cy w h in fractions, apart, in a sector of that half-angle."""
    size = rng.uniform((0.14, 0.18), (0.30, 0.38), (300, 2))
    centre = rng.uniform(0.1, 0.95, (300, 2))
    size[200:] = 0.14, 0.18  # so that the narrowest sector too has room for one
    corners = centre[:, None] + np.array([[-1, -1], [1, -1], [-1, 1], [1, 1]]) * size[:, None] / 2
    x, y = (corners - apex).transpose(2, 0, 1)  # (300, 4)
    inside = (np.hypot(x, y) < radius) & (np.abs(np.arctan2(x, y)) < angle)  # 0 = straight down
    inside &= (np.abs(corners - 0.5) < 0.5).all(2)  # a wide sector reaches beyond the frame
    boxes, wanted = [], rng.integers(1, 4)
    for box in np.concatenate([centre, size], 1)[inside.all(1)]:  # (m, 4) cx cy w h
        if all((np.abs(box - b)[:2] > (box + b)[2:] / 2).any() for b in boxes):
            boxes.append(box)
        if len(boxes) == wanted:
            break
    return np.array(boxes).reshape(-1, 4)  # (0, 4) if none fits

def paint_jet(rng: np.random.Generator, image: np.ndarray, box: np.ndarray, hue: float) -> None:
    """Paints a Doppler plume that touches all sides of `box` (cx cy w h) into `image` (H, W, 3)."""
    size = len(image)
    x1, y1 = np.floor((box[:2] - box[2:] / 2) * size).astype(int)  # px, outwards: no side is cut
    x2, y2 = np.ceil((box[:2] + box[2:] / 2) * size).astype(int)
    x, y = (np.arange(x1, x2) + 0.5)[None] / size, (np.arange(y1, y2) + 0.5)[:, None] / size
    q = 2 * (y - box[1]) / box[3] * rng.choice([-1, 1])  # (h, 1): -1 to 1, down or up the box
    u = 2 * (x - box[0]) / box[2] * math.sqrt(5 / 6)  # widest at q = 2/3, where it meets the sides
    width = np.sqrt(np.clip((q + 1) / 2, 0, 1) * np.clip(3 * (1 - q), 0, 1))
    core = np.clip(1 - np.abs(u) / np.maximum(width, 1e-6), 0, 1)
    tex = speckle(rng, core.shape, 0.9 * size / 64)
    colour = hsv_to_rgb((hue + 15 * (tex - 1)) % 360, 0.85, np.clip(0.30 + 0.5 * core * tex, 0, 1))
    alpha = 0.9 * (np.abs(u) < width)[..., None]
    image[y1:y2, x1:x2] += alpha * (colour - image[y1:y2, x1:x2])

def synthetic_sample(seed: int, split: str, i: int, imgsz: int, c: float) -> tuple:
    """Frame i: pixels (H, W, 3) uint8, jets (n, 5) class cx cy w h in [0, 1], view 0 to 2.

    A pure function of its arguments. The dominance c moves the view's cue from the sector's angle
    (g) to the speckle's grain (t); as their variances add up, the best accuracy is always 0.970.
    """
    rng = np.random.default_rng([seed, ("train", "val").index(split), i])
    view, px = int(rng.integers(3)), imgsz / 64
    g, t = np.sqrt([1 - c, c]) * (view - 1) + 0.25 * rng.standard_normal(2)
    apex = np.array([0.5, -0.02]) + rng.uniform((-0.04, -0.03), (0.04, 0.03))
    radius, half_angle = rng.uniform(0.92, 1.04), 0.62 + 0.13 * g  # fractions of the frame, radians
    x = (np.arange(imgsz) + 0.5) / imgsz  # (W,), pixel centres
    y = x[:, None]  # (H, 1)
    across, down = np.abs(x - apex[0]), y - apex[1]
    sector = (0.05**2 < across**2 + down**2) & (across**2 + down**2 < radius**2)  # (H, W)
    sector &= across < math.tan(half_angle) * down
    tissue = 0.16 + 0.10 * np.clip(speckle(rng, (imgsz, imgsz), 7 * px) - 0.6, 0, 2)
    for _ in range(rng.integers(1, 3)):  # dark chambers
        centre, axes = rng.uniform((0.3, 0.3), (0.7, 0.8)), rng.uniform(0.06, 0.16, 2)
        tissue[((x - centre[0]) / axes[0])**2 + ((y - centre[1]) / axes[1])**2 < 1] *= 0.25
    grain = speckle(rng, (imgsz, imgsz), 0.9 * px * 1.4**t, 1.6)  # wider than deep, like ultrasound
    luminance = tissue * grain * rng.uniform(0.8, 1.2) * (1 - 0.25 * y)  # sound weakens with depth
    image = np.repeat(luminance[..., None], 3, axis=2)
    boxes = place_jets(rng, apex, radius, half_angle)
    classes = rng.integers(0, len(JETS), len(boxes))
    for box, k in zip(boxes, classes):
        paint_jet(rng, image, box, list(JETS.values())[k])
    image = (image + rng.normal(0, 0.01, (imgsz, imgsz, 1))) * sector[..., None]
    root = np.sqrt(np.clip(image, 0, 1))
    pixels = np.round(255 * root * np.sqrt(root)).astype(np.uint8)  # to the power 0.75
    return pixels, np.column_stack([classes, boxes]).astype(np.float32), view

# --------------------------------------------------------------------------------------------------
# 3. Joint data: a YOLO folder with an image class -> checked arrays -> batches
# --------------------------------------------------------------------------------------------------

FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM", "JPEG2000")  # none of them runs code
SUFFIXES = ".bmp .gif .jp2 .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split()
NO_LABEL = -100  # an image without a class; cross_entropy's ignore_index

class Batch(NamedTuple):
    """images (B, 3, H, W), targets (N, 6) image index, class, cx cy w h in [0, 1], labels (B,)."""

    images: Tensor
    targets: Tensor
    labels: Tensor

@dataclass
class JointSet(torch.utils.data.Dataset):
    """One split: boxes and classes in memory; pixels too (uint8) where they fit, else read anew."""

    boxes: list[np.ndarray]  # of each image (n, 5): class, cx cy w h in fractions of the canvas
    labels: list[int]  # NO_LABEL where an image has none
    names: list[str]
    classification_names: list[str]
    canvas: tuple[int, int]  # H, W in px
    pixels: np.ndarray | None = None  # (N, H, W, 3)
    paths: list[Path] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> Batch:
        """A batch of uint8 images in channels_last order."""
        pixels = (self.pixels[indices] if self.pixels is not None else  # (B, H, W, 3) uint8
                  np.stack([letterbox(read_image(self.paths[i]), self.canvas) for i in indices]))
        rows = [np.insert(self.boxes[i], 0, b, axis=1) for b, i in enumerate(indices)]  # (n, 6)
        targets = torch.from_numpy(np.concatenate(rows).astype(np.float32))
        labels = torch.tensor([self.labels[i] for i in indices])
        return Batch(torch.from_numpy(pixels).permute(0, 3, 1, 2), targets, labels)

    def truth(self, i: int) -> np.ndarray:
        """The boxes of image i (n, 5): class, x1 y1 x2 y2 in px of the canvas."""
        corners = cxcywh_to_xyxy(torch.from_numpy(self.boxes[i][:, 1:])).numpy()  # fractions
        return np.column_stack([self.boxes[i][:, 0], corners * (self.canvas[::-1] * 2)])  # W H W H

    def box_sizes(self) -> np.ndarray:
        """Width and height in px of all boxes (N, 2); canvas is H, W but sizes are w, h."""
        return np.concatenate([boxes[:, 3:] for boxes in self.boxes]) * self.canvas[::-1]

def parse_row(fields: list[float], num_classes: int, num_labels: int) -> int | list[float] | None:
    """What a label row says: an image class (int), a box [class, cx, cy, w, h], None for no size.

    A one-hot row of `num_labels` values is the class even where it is as long as a box or polygon
    row: read as a box it would have no size. Raises ValueError with what was expected.
    """
    if num_labels and sorted(fields) == [0] * (num_labels - 1) + [1]:
        return fields.index(1)
    if len(fields) == 1 and fields[0] in range(num_labels):
        return int(fields[0])
    hot = num_labels and len(fields) == 5 and set(fields) == {0, 1}  # no box has a corner as centre
    if hot or len(fields) < 5 or len(fields) % 2 == 0:
        label = (f"an image class (one-hot of {num_labels} or an index)" if num_labels else
                 "name the image classes as classification_names in data.yaml")
        raise ValueError(f"expected a box (class xc yc w h), polygon (class x1 y1 …), or {label}")
    if fields[0] not in range(num_classes):
        raise ValueError(f"expected a box class that is a whole number from 0 to {num_classes - 1}")
    if not all(-1e-3 <= v <= 1.001 for v in fields[1:]):  # beyond 0 and 1: the file's rounding
        raise ValueError("expected fractions of width and height from 0 to 1, not pixels")
    if len(fields) > 5:
        (x1, x2), (y1, y2) = ((min(v), max(v)) for v in (fields[1::2], fields[2::2]))
        fields = [fields[0], (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]
    return fields if min(fields[3:]) > 0 else None

def parse_labels(text: str, where: str, num_classes: int, num_labels: int) -> tuple:
    """Boxes (n, 5), image class or NO_LABEL, errors and warnings, each with file and line."""
    boxes, labels, errors, notes = [], [], [], []
    for at, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            # float() also reads the digits of other scripts; a label file is ASCII.
            fields = [float(v) if v.isascii() else math.nan for v in line.split()]
            if not all(map(math.isfinite, fields)):
                raise ValueError("could not")
            row = parse_row(fields, num_classes, num_labels)
        except ValueError as error:
            reason = "expected numbers, spaces between" if "could not" in str(error) else error
            errors.append(f"{where}:{at}: {line.strip()[:60]!r}: {reason}")
            continue
        if row is None:
            notes.append(f"{where}:{at}: a box of no size is skipped")
        elif isinstance(row, int) and labels:
            errors.append(f"{where}:{at}: a second image class; delete the wrong row")
        else:
            (labels if isinstance(row, int) else boxes).append(row)
    boxes = np.array(boxes, np.float32).reshape(-1, 5)
    low = (boxes[:, 1:3] - boxes[:, 3:] / 2).clip(0, 1)  # (n, 2) x1 y1
    high = (boxes[:, 1:3] + boxes[:, 3:] / 2).clip(0, 1)  # (n, 2) x2 y2
    inside = np.concatenate([boxes[:, :1], (low + high) / 2, high - low], 1)
    if np.abs(inside - boxes).max(initial=0) > 1e-3:  # below that: the file's rounding
        notes.append(f"{where}: a box that reaches outside the image is cut at its border")
    kept = np.unique(inside[(inside[:, 3:] > 0).all(1)], axis=0)  # sorts the rows, by class first
    if len(kept) < len(inside):
        notes.append(f"{where}: a box that is repeated, or of no size as float32, is skipped")
    if num_labels and not labels and not errors:
        notes.append(f"{where}: no image class: left out of the classification task")
    return kept, labels[0] if labels else NO_LABEL, errors, notes

def read_label_file(path: Path, num_classes: int, num_labels: int) -> tuple:
    """`parse_labels` of a file; without a file, an image without objects, with a warning."""
    nothing = np.zeros((0, 5), np.float32), NO_LABEL
    try:
        return parse_labels(read_text(path), str(path), num_classes, num_labels)
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return *nothing, [], [f"{path}: no such label file: an image without objects and class"]
        return *nothing, [str(error)], []

@contextlib.contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """The image, its pixels not yet read; whatever Pillow raises on a bad one is a UserError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)  # last set, first asked
            with Image.open(path, formats=FORMATS) as image:
                if image.mode == "F":
                    raise UserError(f"{path}: floating-point pixels have no range; save as 8 or "
                                    "16 bit")
                yield image
    except UserError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        limit = f"{Image.MAX_IMAGE_PIXELS:,}"
        raise UserError(f"{path}: more than {limit} pixels; cut it into tiles") from error
    except (OSError, ValueError, SyntaxError, MemoryError, TypeError, LookupError) as error:
        raise UserError(f"{path}: not a readable image ({str(error)[:60]}); replace it") from error

def image_size(path: Path) -> tuple[int, int]:
    """Width and height in px as shown (after EXIF rotation), from the header alone."""
    with open_image(path) as image:
        if image.format == "TIFF":
            image.load()  # turns most of them by itself; only then is their size certain
        # EXIF tag 0x0112 is the orientation; with 5 to 8 width and height change places.
        return image.size[::-1] if image.getexif().get(0x0112) in (5, 6, 7, 8) else image.size

def to_rgb(image: Image.Image) -> Image.Image:
    """The image as 8-bit RGB, upright; grey, palette, RGBA, CMYK and 16-bit grey are converted."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):  # 16 bit: Pillow's convert would clip at 255, not scale
        levels = np.asarray(upright).astype(np.int64).clip(0, 65535) // 257  # 65535 / 257 = 255
        upright = Image.fromarray(levels.astype(np.uint8))
    return upright.convert("RGB")

def read_image(path: Path) -> Image.Image:
    with open_image(path) as image:
        image.load()
        return to_rgb(image)

def collect(read: Any, items: list) -> tuple[list, list[str]]:
    """read(item) of the items, and the message of each on which it raised UserError."""
    found, errors = [], []
    for item in items:
        try:
            found.append(read(item))
        except UserError as error:
            errors.append(str(error))
    return found, errors

def first_ten(lines: list[str]) -> list[str]:
    return lines[:10] + [f"… and {len(lines) - 10} more"] * (len(lines) > 10)

def raise_all(errors: list[str]) -> None:
    """One UserError with a line for each fault, up to ten; nothing where there is none."""
    if errors:
        raise UserError("\n".join(first_ten(errors)))

def canvas_size(sizes: list[tuple[int, int]], imgsz: int) -> tuple[int, int]:
    """Least height and width, multiples of 32, that hold all images at a longest side of imgsz."""
    scaled = np.array([np.multiply(size, imgsz / max(size)) for size in sizes]).round().max(0)
    width, height = (math.ceil(max(1, v) / 32) * 32 for v in scaled)
    return height, width

def fit(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int, int, int]:
    """left, top, width, height in px of an image of size (w, h), centred on a canvas (H, W)."""
    scale = min(canvas[1] / size[0], canvas[0] / size[1])
    w, h = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    return (canvas[1] - w) // 2, (canvas[0] - h) // 2, w, h

def letterbox(image: Image.Image, canvas: tuple[int, int]) -> np.ndarray:
    """Pixels (H, W, 3) uint8 of an RGB image on a grey canvas, its aspect kept."""
    left, top, w, h = fit(image.size, canvas)
    sheet = Image.new("RGB", canvas[::-1], (114, 114, 114))  # Pillow wants W, H; 114 as in YOLOv5
    sheet.paste(image.resize((w, h), Image.Resampling.BILINEAR), (left, top))
    return np.asarray(sheet)

def class_names(spec: dict, key: str, where: Path) -> list[str]:
    """Class names from a list or a mapping of 0, 1, … to names."""
    names = spec.get(key)
    if isinstance(names, dict):
        names = [names.get(i) for i in range(len(names))]  # None in a gap
    if not isinstance(names, list) or not names or not all(type(n) in (str, int) for n in names):
        raise UserError(f"{where}: {key}: expected a list of names or a mapping 0: name, 1: name, "
                        "… without a gap; put yes, no, true and false in quotes")
    if len(set(map(str, names))) < len(names):
        raise UserError(f"{where}: {key}: a name is given twice; rename one")
    return list(map(str, names))

def find_images(entry: Any, root: Path, where: str) -> tuple[list[Path], list[str]]:
    """Image files of a split (a folder, a .txt list, or a list of these), sorted, and errors."""
    files, errors = [], []
    for part in entry if isinstance(entry, list) else [entry]:
        path = root / str(part)
        if not isinstance(part, str) or "://" in part or "\0" in part or not os.path.exists(path):
            errors.append(f"{where}: {str(part)[:80]!r} is no folder or list below {root}")
        elif path.is_dir():
            found = [Path(folder) / n for folder, _, names in os.walk(path) for n in names]
            files += [f for f in found if f.suffix.lower() in SUFFIXES and f.name[0] != "."]
        else:
            try:
                lines = [line.strip() for line in read_text(path).split("\n") if line.strip()]
                files += [(path.parent if line[:2] == "./" else root) / line for line in lines]
            except UserError as error:
                errors.append(f"{error}; expected a list, one image path a line")
    for file in files:
        try:
            if not file.resolve(strict=True).is_relative_to(root.resolve()):
                errors.append(f"{file}: lies outside the set {root}; copy it in, or set `path`")
            elif not file.is_file() or "images" not in file.parts:
                errors.append(f"{file}: expected an image file below a folder named images")
        except (OSError, RuntimeError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "a loop of links"
            errors.append(f"{file}: cannot be read ({reason})")
    if not files and not errors:
        errors = [f"{where}: no image in {entry}; expected {' '.join(SUFFIXES)}"]
    return sorted(set(files)), errors

def label_path(image: Path) -> Path:
    """images/<split>/x.jpg -> labels/<split>/x.txt, at the last folder named images."""
    parts = list(image.parts)
    parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts).with_suffix(".txt")

def read_split(spec: dict, split: str, root: Path, where: Path) -> tuple[JointSet, list, list[str]]:
    """A split without its pixels, the image sizes (w, h), and errors."""
    names, labels = class_names(spec, "names", where), []
    if "classification_names" in spec:
        labels = class_names(spec, "classification_names", where)
    files, errors = find_images(spec.get(split), root, f"{where}: {split}")
    files, owner = [] if errors else files, {}
    data = JointSet([], [], names, labels, (0, 0), paths=files)
    for file in files:
        first = owner.setdefault(label_path(file), file)  # x.jpg and x.png both mean x.txt
        if first != file:
            errors.append(f"{file}: shares its label file with {first.name}; rename one")
        boxes, label, found, notes = read_label_file(label_path(file), len(names), len(labels))
        errors += found
        data.warnings += notes
        data.boxes.append(boxes)
        data.labels.append(label)
    sizes, unreadable = collect(image_size, files)
    return data, sizes, unreadable + errors

def load_joint(path: Path, config: Config) -> tuple[JointSet, JointSet]:
    """The train and val splits, labels and image headers checked; up to ten faults in an error."""
    spec = read_yaml(path)
    if not isinstance(spec, dict) or not isinstance(spec.get("path", "."), str):
        raise UserError(f"{path}: expected keys path, train, val, names, classification_names")
    root = path.parent / spec.get("path", ".")
    (train, *_), (val, *_) = splits = [read_split(spec, s, root, path) for s in ("train", "val")]
    if not (errors := [error for _, _, found in splits for error in found]):
        if str(spec.get("nc", len(train.names))) != str(len(train.names)):
            errors.append(f"{path}: nc is {spec['nc']} but names has {len(train.names)} entries")
        if not any(label_path(file).exists() for file in train.paths):
            errors.append(f"{path}: train: no label file; expected {label_path(train.paths[0])}")
        elif "cls" in config.tasks and not train.classification_names:
            errors.append(f"{path}: no classification_names: add them, or --set mode=detect")
        elif "cls" in config.tasks and set(train.labels) <= {NO_LABEL}:
            errors.append(f"{path}: train: no image class in any label file; add one a file")
        if "det" in config.tasks and not any(map(len, train.boxes)):
            errors.append(f"{path}: train: no box in any label file; --set mode=classify")
        if len(train) < 2:
            errors.append(f"{path}: train: expected two images at least (BatchNorm needs a batch)")
    raise_all(errors)
    for task, what, there in (("det", "box", any(map(len, val.boxes))),
                              ("cls", "image class", set(val.labels) - {NO_LABEL})):
        if task in config.tasks and not there:
            train.warnings.insert(0, f"{path}: val: no {what} in any label file: it has no score")
    if set(train.paths) & set(val.paths):
        train.warnings.insert(0, f"{path}: train and val share images: no test on new ones")
    canvas = canvas_size(splits[0][1] + splits[1][1], config.imgsz)
    for data, sizes, _ in splits:
        data.canvas = canvas
        # In place: fractions of the image become fractions of the canvas.
        for boxes, (left, top, w, h) in zip(data.boxes, [fit(size, canvas) for size in sizes]):
            boxes[:, 1:] = (boxes[:, 1:] * [w, h, w, h] + [left, top, 0, 0]) / (canvas[::-1] * 2)
        if len(data) * math.prod(canvas) * 3 <= config.cache_mb * 2**19:  # each split half
            pixels, errors = collect(lambda f: letterbox(read_image(f), canvas), data.paths)
            raise_all(errors)
            data.pixels = np.stack(pixels)
    return train, val

def load_data(config: Config) -> tuple[JointSet, JointSet]:
    """The train and val splits that `config.data` names."""
    if config.data != "synthetic":
        return load_joint(Path(config.data), config)
    splits, canvas = [], (config.imgsz, config.imgsz)
    for split, count in (("train", config.train_images), ("val", config.val_images)):
        samples = [synthetic_sample(config.seed, split, i, config.imgsz, config.dominance)
                   for i in range(count)]
        pixels, boxes, labels = map(list, zip(*samples))
        splits.append(JointSet(boxes, labels, list(JETS), list(VIEWS), canvas, np.stack(pixels)))
    return tuple(splits)

def batches(data: JointSet, config: Config, epoch: int | None, world: int = 1,
            rank: int = 0) -> torch.utils.data.DataLoader:
    """Loads uint8 batches by (seed, epoch), shared among ranks; epoch None: in order, unshared."""
    sampler, size = torch.utils.data.SequentialSampler(data), 64
    if epoch is not None:
        sampler = torch.utils.data.DistributedSampler(data, world, rank, seed=config.seed)
        sampler.set_epoch(epoch)  # else every epoch repeats the order of the first
        size = config.batch_size
    lone = epoch is not None and len(sampler) % size == 1  # BatchNorm cannot train on one image
    order = torch.utils.data.BatchSampler(sampler, size, drop_last=lone)
    # With a generator of its own: a loader else draws from the global one that dropout draws from.
    return torch.utils.data.DataLoader(data, batch_sampler=order, collate_fn=Batch._make,
                                       num_workers=config.workers if data.pixels is None else 0,
                                       generator=torch.Generator().manual_seed(0))

def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device, its images as float32 in [0, 1]."""
    images, targets, labels = (tensor.to(device, non_blocking=True) for tensor in batch)
    return Batch(images.float().div_(255), targets, labels)  # only here: uint8 is a quarter to move

def augment(batch: Batch, config: Config, rng: torch.Generator) -> Batch:
    """Random flips, zoom and shift; boxes of which less than a fifth stays in view are dropped."""
    images, targets, labels = batch[0], batch[1].clone(), batch[2]  # cloned: flips write in place
    u = torch.rand(len(images), 5, generator=rng).to(images.device)  # (B, 5), alike on every device
    owner = targets[:, 0].long()  # (N,) image of each box
    for axis, (share, dim) in enumerate(((config.flip_x, 3), (config.flip_y, 2))):
        flipped = u[:, axis] < share
        images = torch.where(flipped[:, None, None, None], images.flip(dim), images)
        centre = targets[:, 2 + axis]
        targets[:, 2 + axis] = torch.where(flipped[owner], 1 - centre, centre)
    if config.scale == config.shift == 0:  # spares a resampling that would change nothing
        return Batch(images, targets, labels)
    zoom, shift = 1 + config.scale * (2 * u[:, 2:3] - 1), config.shift * (2 * u[:, 3:] - 1)
    theta = torch.zeros(len(images), 2, 3, device=images.device)  # output position -> its source
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / zoom[:, 0]  # zoomed in, the source is smaller
    theta[:, :, 2] = -2 * shift / zoom  # 2: affine_grid counts from -1 to 1
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    images = F.grid_sample(images - 0.447, grid, align_corners=False) + 0.447  # outside: grey
    centre = (targets[:, 2:4] - 0.5) * zoom[owner] + 0.5 + shift[owner]  # (N, 2), inverse of theta
    size = targets[:, 4:] * zoom[owner]
    low, high = (centre - size / 2).clamp(0, 1), (centre + size / 2).clamp(0, 1)
    targets = torch.cat([targets[:, :2], (low + high) / 2, high - low], 1)
    return Batch(images, targets[(high - low).prod(1) > 0.2 * size.prod(1)], labels)

# --------------------------------------------------------------------------------------------------
# 4. Boxes: overlap, anchors, raw maps -> boxes, non-maximum suppression
# --------------------------------------------------------------------------------------------------

STRIDES = (8, 16, 32)  # px between neighbouring cells of P3, P4, P5

def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    centre, half = boxes[..., :2], boxes[..., 2:] / 2  # (..., 2) each
    return torch.cat([centre - half, centre + half], -1)

def box_iou(a_xyxy: np.ndarray, b_xyxy: np.ndarray) -> np.ndarray:
    """Intersection over union (N, M) of all pairs of boxes (N, 4) and (M, 4)."""
    (ax1, ay1, ax2, ay2), (bx1, by1, bx2, by2) = a_xyxy.T[:, :, None], b_xyxy.T  # (N, 1), (M,)
    width, height = (np.minimum(ax2, bx2) - np.maximum(ax1, bx1),
                     np.minimum(ay2, by2) - np.maximum(ay1, by1))  # (N, M)
    overlap = np.maximum(width, 0) * np.maximum(height, 0)  # sides below 0: boxes apart
    return overlap / ((ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - overlap + 1e-7)

def ciou(a_cxcywh: Tensor, b_cxcywh: Tensor) -> Tensor:
    """Complete IoU (K,) of pairs of boxes (K, 4): IoU - distance^2 / diagonal^2 - alpha v."""
    a, b = cxcywh_to_xyxy(a_cxcywh), cxcywh_to_xyxy(b_cxcywh)  # (K, 4) x1 y1 x2 y2
    overlap = (torch.minimum(a[:, 2:], b[:, 2:])
               - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    iou = overlap / (a_cxcywh[:, 2:].prod(1) + b_cxcywh[:, 2:].prod(1) - overlap + 1e-7)
    hull = torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])  # (K, 2) w h
    distance = (a_cxcywh[:, :2] - b_cxcywh[:, :2]).square().sum(1)  # (K,), squared
    angle_a = torch.atan(a_cxcywh[:, 2] / a_cxcywh[:, 3])
    angle_b = torch.atan(b_cxcywh[:, 2] / b_cxcywh[:, 3])
    v = 4 / math.pi**2 * (angle_a - angle_b).square()
    alpha = (v / (1 - iou + v + 1e-7)).detach()  # CIoU's trade-off: a constant to the gradient
    return iou - distance / (hull.square().sum(1) + 1e-7) - alpha * v

def fit_anchors(sizes: np.ndarray) -> np.ndarray:
    """Anchors (3 levels, 3, 2) px, smallest first: k-means of box sizes (n, 2) px."""
    # From quantiles of the area, not random boxes: no seed, and every size has a centre nearby.
    sizes = sizes[np.argsort(sizes.prod(1), kind="stable")]  # stable: equal areas keep their order
    centres = sizes[np.linspace(0, len(sizes) - 1, 19).astype(int)[1::2]]  # (9, 2) px
    for _ in range(50):
        nearest = ((sizes[:, None] - centres)**2).sum(2).argmin(1)
        centres = np.array([sizes[nearest == k].mean(0) if (nearest == k).any() else centres[k]
                            for k in range(9)])  # a centre without boxes stays where it is
    return centres[np.argsort(centres.prod(1), kind="stable")].clip(min=2).reshape(3, 3, 2)

def flatten_levels(raw: list[Tensor]) -> Tensor:
    """Predictions (B, A, 5 + C) of maps (B, 3 (5 + C), h, w): by level, row, cell, then anchor."""
    return torch.cat([x.permute(0, 2, 3, 1).reshape(len(x), x.shape[2] * x.shape[3] * 3, -1)
                      for x in raw], 1)  # a map's channels are 3 anchors of 5 + C, in that order

def prediction_grid(raw: list[Tensor], anchors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Cell (A, 2) as x, y, anchor (A, 2) px, stride (A, 1) px of each row of `flatten_levels`."""
    cells, sizes, strides = [], [], []
    for level, level_anchors, stride in zip(raw, anchors, STRIDES):
        y, x, anchor = torch.ones(*level.shape[2:], 3, device=level.device).nonzero(as_tuple=True)
        cells.append(torch.stack([x, y], 1))  # (3 h w, 2)
        sizes.append(level_anchors[anchor])  # (3 h w, 2) px
        strides.append(torch.full_like(x, stride)[:, None])  # (3 h w, 1) px
    return torch.cat(cells), torch.cat(sizes), torch.cat(strides)

def decode(logits: Tensor, cell: Tensor, anchor: Tensor, stride: Tensor | int) -> Tensor:
    """Boxes (..., 4) px: xy = (2 sigmoid - 0.5 + cell) stride, wh = (2 sigmoid)^2 anchor."""
    p = 2 * logits[..., :4].sigmoid()  # 0 to 2: xy reach half a cell beyond, wh 4 anchors
    return torch.cat([(p[..., :2] - 0.5 + cell) * stride, p[..., 2:].square() * anchor], -1)

def suppress(boxes_xyxy: np.ndarray, classes: np.ndarray, iou_thres: float) -> np.ndarray:
    """Which boxes (n, 4), best first, stay (n,): no kept one of their class overlaps them more."""
    keep = np.ones(len(classes), bool)
    for k in np.unique(classes):  # class by class: small matrices stay in the processor's cache
        at = np.flatnonzero(classes == k)
        apart = box_iou(boxes_xyxy[at], boxes_xyxy[at]) <= iou_thres  # (m, m)
        kept = np.ones(len(at), bool)
        for i in range(len(at)):
            if kept[i]:
                kept[i + 1:] &= apart[i, i + 1:]
        keep[at] = kept
    return keep

def find_boxes(raw: list[Tensor], anchors: Tensor, config: Config) -> list[np.ndarray]:
    """Detections of each image: (n, 6) x1 y1 x2 y2 px, score, class; best first, max_det."""
    logits, found = flatten_levels(raw), []
    boxes = cxcywh_to_xyxy(decode(logits, *prediction_grid(raw, anchors)))  # (B, A, 4) px
    num_classes = logits.shape[2] - 5
    scores = (logits[..., 4:5].sigmoid() * logits[..., 5:].sigmoid()).flatten(1)  # (B, A C)
    # Departs from YOLOv5 (30,000 candidates): because few images hold hundreds of objects.
    scores, order = scores.topk(min(512, scores.shape[1]), dim=1)  # (B, 512) each, or fewer
    for boxes_i, scores_i, order_i in zip(*(x.cpu().numpy() for x in (boxes, scores, order))):
        valid = scores_i > config.conf_thres
        row, classes = order_i[valid] // num_classes, order_i[valid] % num_classes  # of (A, C)
        rows = np.column_stack([boxes_i[row], scores_i[valid], classes.astype(np.float32)])
        found.append(rows[suppress(rows[:, :4], classes, config.iou_thres)][:config.max_det])
    return found

# --------------------------------------------------------------------------------------------------
# 5. Model: images -> P3, raw detection maps, class logits
# --------------------------------------------------------------------------------------------------

def join(*maps: Tensor) -> Tensor:
    """Maps (B, c_i, h, w) one after the other along their channels."""
    # The slices that cat hands back are in another memory order, on which the backward of SiLU and
    # BatchNorm is up to ten times slower than a copy. Only here: a hook costs some 10 us.
    for x in maps:
        if x.requires_grad and x.is_contiguous(memory_format=torch.channels_last):
            x.register_hook(partial(Tensor.contiguous, memory_format=torch.channels_last))
    return torch.cat(maps, 1)

class Conv(nn.Sequential):
    """Convolution, BatchNorm, SiLU."""

    def __init__(self, c_in: int, c_out: int, kernel: int = 1, stride: int = 1,
                 padding: int | None = None):
        padding = kernel // 2 if padding is None else padding
        super().__init__(nn.Conv2d(c_in, c_out, kernel, stride, padding, bias=False),
                         nn.BatchNorm2d(c_out, eps=1e-3), nn.SiLU())  # in place costs a copy

class Bottleneck(nn.Module):
    """A 1x1 and a 3x3 convolution, around them a shortcut if wanted."""

    def __init__(self, c: int, shortcut: bool):
        super().__init__()
        self.cv1, self.cv2, self.shortcut = Conv(c, c), Conv(c, c, 3), shortcut

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x)) if self.shortcut else self.cv2(self.cv1(x))

class C3(nn.Module):
    """Two 1x1 branches of half the channels, one through n bottlenecks, joined by a third 1x1."""

    def __init__(self, c_in: int, c_out: int, n: int = 1, shortcut: bool = True):
        super().__init__()
        half = c_out // 2
        self.cv1, self.cv2, self.cv3 = Conv(c_in, half), Conv(c_in, half), Conv(c_out, c_out)
        self.m = nn.Sequential(*(Bottleneck(half, shortcut) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(join(self.m(self.cv1(x)), self.cv2(x)))

class SPPF(nn.Module):
    """Spatial pyramid pooling: the map beside its 5, 9, 13 px maxima, by three pools in a row."""

    def __init__(self, c: int):
        super().__init__()
        self.cv1, self.cv2, self.pool = Conv(c, c // 2), Conv(2 * c, c), nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.cv1(x)]
        for _ in range(3):
            maps.append(self.pool(maps[-1]))  # 5 px, then 5 + 4, then 5 + 4 + 4
        return self.cv2(join(*maps))

def channels(c: int, width_multiple: float) -> int:
    return math.ceil(c * width_multiple / 8) * 8  # multiples of 8, as in YOLOv5

def repeats(n: int, depth_multiple: float) -> int:
    return max(1, round(n * depth_multiple))

class Trunk(nn.Sequential):
    """Stem to P3: images (B, 3, H, W) -> (B, c_out, H/8, W/8); what a network's tasks share."""

    def __init__(self, width_multiple: float, depth_multiple: float):
        c1, c2, c3 = (channels(c, width_multiple) for c in (64, 128, 256))
        super().__init__(Conv(3, c1, 6, 2, 2), Conv(c1, c2, 3, 2),  # H/2, then H/4
                         C3(c2, c2, repeats(3, depth_multiple)), Conv(c2, c3, 3, 2),  # H/8
                         C3(c3, c3, repeats(6, depth_multiple)))
        self.c_out = c3

    @property
    def W(self) -> nn.Parameter:
        """The kernel of the last convolution, where GradNorm takes its norms."""
        return self[-1].cv3[0].weight  # (c_out, c_out, 1, 1)

class SqueezeExcite(nn.Module):
    """Scales each channel by what all channels' pooled values (B, c, 1, 1) say (1709.01507)."""

    def __init__(self, c: int, pools: tuple = (torch.mean,)):
        super().__init__()
        squeezed, self.pools = max(4, c // 4), pools
        self.mlp = nn.Sequential(nn.Conv2d(c, squeezed, 1), nn.ReLU(), nn.Conv2d(squeezed, c, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * sum(self.mlp(pool(x, (2, 3), True)) for pool in self.pools).sigmoid()

class CBAM(nn.Module):
    """Channel attention by mean and maximum, then spatial attention (arXiv 1807.06521)."""

    def __init__(self, c: int):
        super().__init__()
        self.channel = SqueezeExcite(c, (torch.mean, torch.amax))
        self.spatial = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.channel(x)
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)  # (B, 2, h, w)
        return x * self.spatial(pooled).sigmoid()

class AttentionTrunk(Trunk):
    """The trunk of dual's classification network: SE after the first C3, CBAM after the second."""

    def __init__(self, width_multiple: float, depth_multiple: float):
        super().__init__(width_multiple, depth_multiple)
        self.insert(3, SqueezeExcite(self[2].cv3[0].out_channels))
        self.append(CBAM(self.c_out))

    @property
    def W(self) -> nn.Parameter:
        raise UserError("mode dual shares no trunk: W, GradNorm and cosines do not exist there")

class DetectionHead(nn.Module):
    """P3 -> raw maps (B, 3 (5 + C), h, w) of P3, P4, P5: rest of the backbone, PANet, Detect."""

    def __init__(self, num_classes: int, anchors: np.ndarray, width_multiple: float,
                 depth_multiple: float):
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
        for conv, stride in zip(self.detect, STRIDES):  # prior: 8 objects in a 640 px image
            bias = conv.bias.data.view(3, -1)  # (3, 5 + C), a view: the sums below reach conv.bias
            bias[:, 4] += math.log(8 / (640 / stride)**2)
            bias[:, 5:] += math.log(0.6 / (num_classes - 0.99999))  # not 1: C may be 1

    def forward(self, P3: Tensor) -> list[Tensor]:
        P4 = self.p4(P3)  # (B, c4, H/16, W/16)
        lateral5 = self.lateral5(self.p5(P4))  # (B, c4, H/32, W/32)
        up5 = F.interpolate(lateral5, scale_factor=2.0)
        lateral4 = self.lateral4(self.up4(join(up5, P4)))  # (B, c3, H/16, W/16)
        out3 = self.up3(join(F.interpolate(lateral4, scale_factor=2.0), P3))  # c3, H/8
        out4 = self.out4(join(self.down3(out3), lateral4))  # c4, H/16
        out5 = self.out5(join(self.down4(out4), lateral5))  # c5, H/32
        return [conv(x) for conv, x in zip(self.detect, (out3, out4, out5))]

class MeanPool(nn.Module):
    """Maps (B, c, h, w) -> their means (B, c)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum((2, 3)) / x[0, 0].numel()  # mean's backward divides maps, this one vectors

class ClassificationHead(nn.Sequential):
    """P3 -> class logits (B, C): 1x1 convolution, global average pool, dropout, linear."""

    def __init__(self, c_in: int, num_labels: int, dropout: float):
        super().__init__(Conv(c_in, 2 * c_in), MeanPool(), nn.Dropout(dropout),
                         nn.Linear(2 * c_in, num_labels))

class JointNet(nn.Module):
    """A trunk and the heads of one task or more, cut at P3."""

    def __init__(self, trunk: Trunk, heads: dict[str, nn.Module]):
        super().__init__()
        self.trunk, self.heads = trunk, nn.ModuleDict(heads)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor], dict[str, Any]]:
        """P3, the leaf that each head reads in its place, and each task's raw output."""
        P3 = self.trunk(images)
        cuts = [P3.detach().requires_grad_(P3.requires_grad) for _ in self.heads]  # no_grad: False
        return P3, cuts, {task: head(x) for (task, head), x in zip(self.heads.items(), cuts)}

class Network(nn.Module):
    """One JointNet, or for `dual` one a task: images (B, 3, H, W) -> {task: raw output}."""

    def __init__(self, config: Config, num_classes: int, num_labels: int, anchors: np.ndarray):
        super().__init__()
        width, depth, dual = config.width_multiple, config.depth_multiple, config.mode == "dual"
        trunk, heads = Trunk(width, depth), {}
        cls_trunk = AttentionTrunk(config.dual_width_multiple, depth) if dual else trunk
        if "det" in config.tasks:
            heads["det"] = DetectionHead(num_classes, anchors, width, depth)
        if "cls" in config.tasks:
            heads["cls"] = ClassificationHead(cls_trunk.c_out, num_labels, config.dropout)
        self.parts = nn.ModuleList(
            [JointNet(trunk, {"det": heads["det"]}), JointNet(cls_trunk, {"cls": heads["cls"]})]
            if dual else [JointNet(trunk, heads)])
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                # Departs from YOLOv5 (0.03): because its statistics lag hundreds of steps behind.
                module.momentum = config.batchnorm_momentum

    def forward(self, images: Tensor) -> dict[str, Any]:
        return {task: out for part in self.parts for task, out in part(images)[2].items()}

    def parameter_counts(self) -> dict[str, int]:
        """Parameters of the trunk and of each task; a whole network of one's own is its task's."""
        counts = dict.fromkeys(("total", "trunk", "det", "cls"), 0)
        for part in self.parts:
            for name, module in (("trunk", part.trunk), *part.heads.items()):
                owner = next(iter(part.heads)) if len(self.parts) > 1 else name
                counts[owner] += sum(p.numel() for p in module.parameters())
        return counts | {"total": sum(counts.values())}

# --------------------------------------------------------------------------------------------------
# 6. Losses: raw outputs and a batch -> one scalar a task
# --------------------------------------------------------------------------------------------------

class Match(NamedTuple):
    """K pairs of a target and a prediction; all (K,) but cell (K, 2)."""

    target: Tensor  # row of targets
    level: Tensor
    anchor: Tensor  # index within the level
    cell: Tensor  # x, y
    index: Tensor  # row of flatten_levels

def match_targets(targets: Tensor, shapes: list[tuple[int, int]], anchors: Tensor,
                  anchor_thres: float) -> Match:
    """Pairs each target (N, 6) with anchors of like size, in its cell and its two neighbours.

    On every level; shapes: (h, w) of each level; anchors: (3, 3, 2) px.
    """
    device = targets.device
    sizes = torch.tensor([(w, h) for h, w in shapes], device=device)  # (L, 2)
    centre = targets[None, :, 2:4] * sizes[:, None]  # (L, N, 2) in cells
    wh = targets[:, 4:6] * sizes[0] * STRIDES[0]  # (N, 2) px
    ratio = wh / anchors[:, :, None]  # (L, 3, N, 2)
    alike = torch.maximum(ratio, 1 / ratio).amax(-1) < anchor_thres  # (L, 3, N)
    rest = sizes[:, None] - centre  # (L, N, 2), counted from the far side
    below = ((centre % 1 < 0.5) & (centre > 1)).permute(2, 0, 1)  # (2, L, N): left, upper is near
    above = ((rest % 1 < 0.5) & (rest > 1)).permute(2, 0, 1)  # right, lower is near
    near = torch.cat([torch.ones_like(below[:1]), below, above])  # (5, L, N)
    offsets = torch.tensor([[0, 0], [0.5, 0], [0, 0.5], [-0.5, 0], [0, -0.5]], device=device)
    o, level, anchor, target = (near[:, :, None] & alike).nonzero(as_tuple=True)  # of (5, L, 3, N)
    cell = (centre[level, target] - offsets[o]).long()
    cell = torch.minimum(cell.clamp(min=0), sizes[level] - 1)  # a centre may lie on the border
    counts = sizes.prod(1) * 3  # (L,) rows of each level
    index = (cell[:, 1] * sizes[level, 0] + cell[:, 0]) * 3 + anchor
    return Match(target, level, anchor, cell, index + (counts.cumsum(0) - counts)[level])

class DetectionLoss:
    """YOLOv5's loss of raw maps: 1 - CIoU of the matches, objectness towards CIoU, class."""

    def __init__(self, anchors: Tensor, num_classes: int, config: Config):
        self.anchors, self.config = anchors, config
        self.obj_gain = config.obj_gain * (config.imgsz / 640)**2  # YOLOv5's gains hold at 640 px
        self.cls_gain = config.cls_gain * num_classes / 80  # and for COCO's 80 classes

    def __call__(self, raw: list[Tensor], batch: Batch) -> Tensor:
        predictions, targets = flatten_levels(raw), batch.targets  # (B, A, 5 + C)
        shapes = [tuple(x.shape[2:]) for x in raw]
        match = match_targets(targets, shapes, self.anchors, self.config.anchor_thres)
        image = targets[match.target, 0].long()
        p = predictions[image, match.index]  # (K, 5 + C)
        found = decode(p, match.cell, self.anchors[match.level, match.anchor],
                       8 * 2**match.level[:, None])  # (K, 4) px; stride (K, 1)
        size = targets.new_tensor([shapes[0][1], shapes[0][0]] * 2) * STRIDES[0]  # W H W H px
        iou = ciou(found, targets[match.target, 2:] * size)
        counts = iou.new_zeros(3).index_add(0, match.level, torch.ones_like(iou))
        share = 1 / counts[match.level]  # sums over matches become means of levels, added up
        # Departs from YOLOv5 (the last match of a cell counts): because amax knows no order.
        goal = iou.new_zeros(predictions.shape[:2].numel()).scatter_reduce(  # (B A,)
            0, image * predictions.shape[1] + match.index, iou.detach().clamp(min=0), "amax")
        obj = F.binary_cross_entropy_with_logits(
            predictions[..., 4], goal.view_as(predictions[..., 4]), reduction="none").mean(0)
        obj = obj.split([h * w * 3 for h, w in shapes])  # a mean each: P3 has most of the cells
        loss = (self.config.box_gain * ((1 - iou) * share).sum()
                + self.obj_gain * sum(b * o.mean() for b, o in zip((4.0, 1.0, 0.4), obj)))
        if p.shape[1] > 6:  # with one class, objectness says it all
            one_hot = F.one_hot(targets[match.target, 1].long(), p.shape[1] - 5).to(p)
            cls = F.binary_cross_entropy_with_logits(p[:, 5:], one_hot, reduction="none").mean(1)
            loss = loss + self.cls_gain * (cls * share).sum()
        return loss * len(batch.images) if self.config.det_loss_times_batch else loss

class ClassificationLoss:
    """Cross-entropy, weighted mean over the images that have a class; 0 where none has."""

    def __init__(self, class_weights: Tensor):
        self.class_weights = class_weights

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        total = F.cross_entropy(logits, batch.labels, self.class_weights.to(logits),
                                ignore_index=NO_LABEL, reduction="sum")  # a mean over none is NaN
        known = batch.labels != NO_LABEL  # -100 is no index: hence the clamp, then the mask
        return total / (self.class_weights[batch.labels.clamp(min=0)] * known).sum().clamp(min=1e-9)

def make_losses(network: Network, train_set: JointSet, config: Config) -> dict[str, Any]:
    """The loss of each task; class_balance weighs class k by N / (C n_k), mean 1 if all occur."""
    losses = {}
    if "det" in config.tasks:
        anchors = network.parts[0].heads["det"].anchors
        losses["det"] = DetectionLoss(anchors, len(train_set.names), config)
    if "cls" in config.tasks:
        labels = [k for k in train_set.labels if k != NO_LABEL]
        counts = np.bincount(labels, minlength=len(train_set.classification_names)).clip(1)
        weights = len(labels) / (len(counts) * counts) if config.class_balance else counts**0.0
        losses["cls"] = ClassificationLoss(network.parts[0].trunk.W.new_tensor(weights))
    return losses

# --------------------------------------------------------------------------------------------------
# 7. Balancer: (losses, gradient norms at W) -> task weights
# --------------------------------------------------------------------------------------------------

class GradNorm:
    """Task weights w (T,) by Chen et al., ICML 2018; knows no network.

    Each step: train on sum(w_i L_i) with the present `w`, then call `update(L, n)` for the next.
    From the first update on sum(w) = T. `L0`: the losses that progress is measured against, by
    default the first positive ones.
    """

    def __init__(self, initial_weights: Any, alpha: float = 1.5, lr: float = 0.025,
                 w_min: float = 0.0, L0: Any = None, device: torch.device | str = "cpu",
                 dtype: torch.dtype = torch.float32):
        self.w = torch.tensor(initial_weights, dtype=dtype, device=device)
        self.L0 = torch.zeros_like(self.w) if L0 is None else torch.as_tensor(L0).to(self.w)
        self.r, self.alpha, self.w_min = torch.ones_like(self.w), alpha, w_min
        self.m, self.v = torch.zeros_like(self.w), torch.zeros_like(self.w)  # Adam's two moments
        self.steps = torch.zeros((), device=device)
        # The function, not the class, whose bookkeeping costs three times the step of T numbers.
        self.adam = partial(adam, fused=True, amsgrad=False, beta1=0.9, beta2=0.999, lr=lr,
                            weight_decay=0, eps=1e-8, maximize=False)

    @torch.no_grad()
    def update(self, L: Tensor, n: Tensor) -> Tensor:
        """The next w (T,), from losses L (T,) and the norms n (T,) at W of their own gradients."""
        T = len(self.w)
        self.L0 = torch.where(self.L0 > 0, self.L0, L)
        G = self.w * n  # (T,), of the step just made; G to L_grad: GradNorm, section 3.1
        G_bar = G.mean()
        L_tilde = L / self.L0.clamp(min=1e-12)  # (T,)
        r = L_tilde / L_tilde.mean().clamp(min=1e-12)  # (T,), of mean 1
        target = G_bar * r**self.alpha  # (T,), a constant: L_grad is not differentiated through it
        dL_grad_dw = torch.sign(G - target) * n  # of L_grad = sum |G - target|, eq. 2
        # Departs from the paper (all tasks have labels): because without labels nothing is known.
        labelled = (L * n > 0).all()  # without labels L or n is 0
        dL_grad_dw = torch.where(labelled, dL_grad_dw, 0.0)
        self.adam([self.w], [dL_grad_dw], [self.m], [self.v], [], [self.steps])  # all in place
        # Departs from the paper (w <- w T / sum(w)): because w goes negative there.
        above = (self.w - self.w_min).clamp(min=1e-12)
        w = self.w_min + above * (T - T * self.w_min) / above.sum()
        self.w.copy_(w)
        self.r = r
        return w  # of its own memory: the next update must not change a logged w

    def state_dict(self) -> dict:
        return {key: getattr(self, key).clone() for key in ("w", "L0", "m", "v", "steps")}

    def load_state_dict(self, state: dict) -> None:
        for key, value in self.state_dict().items():
            setattr(self, key, value.copy_(state[key]))  # a missing or misshapen one is an error

# --------------------------------------------------------------------------------------------------
# 8. Step: one batch -> gradients of sum(w_i L_i), and each task's gradient at W and P3
# --------------------------------------------------------------------------------------------------

class Signals(NamedTuple):
    """What a backward pass tells; None where one task, or another way to step, leaves it out."""

    L: Tensor  # losses (T,)
    n: Tensor | None = None  # norms (T,) at W of the unweighted losses' gradients
    gram_P3: Tensor | None = None  # inner products (T, T) of w_i L_i's gradients at P3, this rank's
    gram_W: Tensor | None = None  # and at W, of their mean over ranks

def mean_over_ranks(x: Tensor) -> Tensor:
    """x, averaged over the processes of a distributed run; unchanged in a run of one process."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(x)
        x /= torch.distributed.get_world_size()
    return x

def similarities(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and 2ab / (a^2 + b^2), means over pairs (...,), of inner products (..., T, T)."""
    T, squares = gram.shape[-1], gram.diagonal(dim1=-2, dim2=-1)
    ab = (squares[..., None] * squares[..., None, :]).sqrt()  # (..., T, T)
    cosine = gram / ab.clamp(min=1e-30)
    similarity = 2 * ab / (squares[..., None] + squares[..., None, :]).clamp(min=1e-30)
    above = torch.stack([cosine, similarity]).triu(1)  # each pair once
    return (above.sum((-2, -1)) / (T * (T - 1) / 2)).unbind()

def backward(part: nn.Module, batch: Batch, losses: dict, w: Tensor,
             autocast: Any = contextlib.nullcontext()) -> Signals:
    """Leaves the gradient of sum(w_i L_i) in the parameters' .grad; returns what it saw on the way.

    The graph is cut at P3, one leaf a head: each weighted loss goes back to its own leaf, where its
    gradient g_i is read; the sum goes on through the trunk. The gradient at W takes g_i through the
    last layer alone.
    """
    with autocast:  # of the forward pass alone: the products below need their digits
        P3, cuts, outputs = part(batch.images)  # P3, each cut: (B, c_out, H/8, W/8)
        L = torch.stack([losses[task](to_float(output), batch) for task, output in outputs.items()])
    (w * L).sum().backward()  # heads and w: in the order of the tasks
    L, g = mean_over_ranks(L.detach()), [cut.grad for cut in cuts]
    if len(g) == 1:
        P3.backward(g[0])
        return Signals(L)
    W = getattr(part, "module", part).trunk.W  # .module: inside DistributedDataParallel
    grad_W = [torch.autograd.grad(P3, W, g_i, retain_graph=True)[0].reshape(-1) for g_i in g]
    P3.backward(sum(g[1:], g[0]))  # the trunk's backward is linear: one pass does for all tasks
    grad_W = mean_over_ranks(torch.stack(grad_W))  # before the norm: w is the same on all ranks
    # Flat in channels_last order, where that needs no copy.
    grad_P3 = torch.stack([g_i.permute(0, 2, 3, 1).reshape(-1) for g_i in g]).to(L)  # (T, B h w c)
    gram_P3, gram_W = grad_P3 @ grad_P3.T, grad_W @ grad_W.T  # (T, T) each
    return Signals(L, gram_W.diagonal().sqrt() / w, gram_P3, gram_W)  # g_i carries w_i, n does not

def to_float(output: Any) -> Any:
    """A head's output out of bfloat16, so that losses keep their digits under autocast."""
    if isinstance(output, list):
        return [to_float(x) for x in output]
    return output.float() if output.dtype == torch.bfloat16 else output

# --------------------------------------------------------------------------------------------------
# 9. Metrics: network, data -> average precision, accuracy
# --------------------------------------------------------------------------------------------------

METRICS = ("mAP50", "mAP50-95", "accuracy", "balanced_accuracy")
IOU_THRESHOLDS = np.linspace(0.5, 0.95, 10)  # COCO's

def coco_set(rows: np.ndarray, num_images: int, num_classes: int) -> Any:
    """pycocotools' COCO of rows (n, 7): image, x, y, w, h px, score, class."""
    from pycocotools.coco import COCO
    coco, (image, label) = COCO(), rows[:, [0, 6]].astype(int).T.tolist()
    coco.dataset = {  # as by loadRes, in half the time; no id is 0, which means "no match"
        "images": [{"id": i} for i in range(num_images)],
        "categories": [{"id": c} for c in range(num_classes)],
        "annotations": [{"id": k, "image_id": i, "category_id": c, "bbox": xywh, "score": score,
                         "area": xywh[2] * xywh[3], "iscrowd": 0} for k, i, c, (*xywh, score)
                        in zip(itertools.count(1), image, label, rows[:, 1:6].tolist())]}
    coco.createIndex()
    return coco

def average_precision(truth: list[np.ndarray], found: list[np.ndarray], num_classes: int,
                      max_det: int, thresholds: np.ndarray) -> np.ndarray:
    """COCO average precision (thresholds, classes); NaN for a class without boxes.

    For each image, truth: (n, 5) class, x1 y1 x2 y2 px; found: (n, 6) x1 y1 x2 y2, score, class.
    """
    from pycocotools.cocoeval import COCOeval
    objects = [np.column_stack([np.full(len(t), i), t[:, 1:3], t[:, 3:] - t[:, 1:3],  # x y w h
                                np.ones(len(t)), t[:, 0]]) for i, t in enumerate(truth)]
    rows = [np.column_stack([np.full(len(d), i), d[:, :2], d[:, 2:4] - d[:, :2], d[:, 4:]])
            for i, d in enumerate(found)]
    objects, rows = np.concatenate(objects), np.concatenate(rows)  # (n, 7), see coco_set
    if not len(rows) or not len(objects):
        have = np.isin(np.arange(num_classes), objects[:, 6])
        return np.where(have, 0.0, np.nan)[None].repeat(len(thresholds), 0)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        run = COCOeval(*(coco_set(x, len(truth), num_classes) for x in (objects, rows)), "bbox")
        run.params.iouThrs, run.params.areaRng = thresholds, [[0, 1e10]]  # px^2: any size
        run.params.areaRngLbl = ["all"]
        run.params.maxDets = [max_det]  # Departs from COCO (100): because YOLOv5 counts 300.
        run.evaluate()
        run.accumulate()
    precision = run.eval["precision"][:, :, :, 0, 0]  # (thresholds, recalls, classes), -1: no box
    return np.where(precision[:, 0] < 0, np.nan, precision.mean(1))  # (thresholds, C)

def accuracies(truth: np.ndarray, guess: np.ndarray, num_labels: int) -> tuple:
    """Accuracy, balanced accuracy (mean of the classes that occur), each class's own (C,)."""
    right = np.bincount(truth[truth == guess], minlength=num_labels)
    counts = np.bincount(truth, minlength=num_labels)
    per_class = np.where(counts > 0, right / counts.clip(1), np.nan)
    return float(np.mean(truth == guess)), float(np.nanmean(per_class)), per_class

@torch.no_grad()
def evaluate(network: Network, data: JointSet, config: Config,
             thresholds: np.ndarray) -> dict[str, Any]:
    """Metrics of a split: mAP50, mAP50-95 (None but with ten thresholds), accuracies, per_class."""
    device, was_training = next(network.parameters()).device, network.training
    network.eval()
    found, guess = [], []
    for batch in batches(data, config, None):  # in order, so that guess i belongs to image i
        outputs = network(to_device(batch, device).images)
        if "det" in outputs:
            found += find_boxes(outputs["det"], network.parts[0].heads["det"].anchors, config)
        if "cls" in outputs:
            guess += outputs["cls"].argmax(1).tolist()
    network.train(was_training)
    metrics = dict.fromkeys(METRICS) | {"per_class": {}}
    if found:
        truth = [data.truth(i) for i in range(len(data))]
        ap = average_precision(truth, found, len(data.names), config.max_det, thresholds)
        have = ~np.isnan(ap[0])  # a class without boxes does not count as 0
        if have.any():
            metrics["mAP50"] = float(ap[0, have].mean())
            metrics["mAP50-95"] = float(ap[:, have].mean()) if len(ap) == 10 else None
        metrics["per_class"]["AP50"] = dict(zip(data.names, ap[0].tolist()))
    labels, guess = np.array(data.labels), np.array(guess)
    known = labels != NO_LABEL
    if len(guess) and known.any():
        metrics["accuracy"], metrics["balanced_accuracy"], per_class = accuracies(
            labels[known], guess[known], len(data.classification_names))
        metrics["per_class"]["accuracy"] = dict(zip(data.classification_names, per_class.tolist()))
    return metrics

# --------------------------------------------------------------------------------------------------
# 10. Training: config, data -> a trained network, epoch by epoch
# --------------------------------------------------------------------------------------------------

class NonFinite(ArithmeticError):
    """A loss or gradient became infinite or NaN; names the task, the step and the weights."""

class Run:
    """Everything that the rest of a run depends on; `state_dict` is all a checkpoint needs."""

    def __init__(self, config: Config, train_set: JointSet, device: torch.device):
        torch.manual_seed(config.seed)  # before the network draws its weights
        anchors = np.ones((3, 3, 2)) if config.anchors == "auto" else np.array(config.anchors)
        if config.anchors == "auto" and "det" in config.tasks:
            anchors = fit_anchors(train_set.box_sizes())
        self.config, self.device, self.epoch, self.best = config, device, 0, -1.0
        num_labels = len(train_set.classification_names)
        self.network = Network(config, len(train_set.names), num_labels, anchors)
        self.network.to(device, memory_format=torch.channels_last)
        self.losses = make_losses(self.network, train_set, config)  # after .to(): it keeps anchors
        self.modules, self.world, self.rank = list(self.network.parts), 1, 0
        if torch.distributed.is_initialized():
            self.world = torch.distributed.get_world_size()
            self.rank = torch.distributed.get_rank()
            self.modules = [nn.parallel.DistributedDataParallel(part) for part in self.modules]
        self.optimizers = []
        for part, lr in zip(self.network.parts, (config.lr, config.dual_lr)):
            # Weight decay on kernels alone, not on biases and BatchNorm, as in YOLOv5.
            groups = [{"params": [p for p in part.parameters() if (p.ndim > 1) == kernels],
                       "weight_decay": config.weight_decay * kernels, "peak": lr}
                      for kernels in (True, False)]
            self.optimizers.append(torch.optim.AdamW(groups, betas=config.betas, fused=True))
        # float32's range: needs no scaler.
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.amp == "bf16")
        self.w = torch.tensor(config.weights, device=device)
        self.balancer = GradNorm(config.weights, config.alpha, config.gradnorm_lr, config.w_min,
                                 device=device) if config.mode == "gradnorm" else None

    def state_dict(self) -> dict:
        return {"epoch": self.epoch, "best": self.best, "w": self.w,
                "network": self.network.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "balancer": self.balancer and self.balancer.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.epoch, self.best, self.w = state["epoch"], state["best"], state["w"].to(self.device)
        self.network.load_state_dict(state["network"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        if self.balancer:
            self.balancer.load_state_dict(state["balancer"])

def learning_rate(progress: float, warmup: float) -> float:
    """Share of the peak rate at `progress` in [0, 1]: a linear rise, then a cosine to 1 %."""
    if progress < warmup:
        return progress / warmup
    return 0.01 + 0.99 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup + 1e-9))) / 2

def train_step(run: Run, batch: Batch, progress: float, backward=backward) -> dict[str, Tensor]:
    """One step of every network, then of the balancer; what the log needs, still as tensors."""
    signals, grad_norms = [], []
    weights = run.w.split(len(run.w) // len(run.modules))  # dual: (1,) each, else (T,)
    for module, optimizer, w in zip(run.modules, run.optimizers, weights):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate(progress, run.config.warmup)
        optimizer.zero_grad()
        signals.append(backward(module, batch, run.losses, w, run.autocast))
        grad_norms.append(nn.utils.clip_grad_norm_(module.parameters(), run.config.grad_clip))
        optimizer.step()
    L, s = torch.cat([s.L for s in signals]), signals[0]
    log = {"L": L, "w": run.w, "grad_norm": torch.stack(grad_norms).max()}  # before clipping
    if s.gram_W is not None:
        log |= {"n": s.n, "gram_P3": s.gram_P3, "gram_W": s.gram_W}
    if run.balancer:
        run.w = run.balancer.update(L, s.n)  # after the log has this step's w
        log["r"] = run.balancer.r
    return log

def log_rows(steps: list[dict[str, Tensor]], tasks: tuple[str, ...]) -> list[dict[str, float]]:
    """What `train_step` returned, as one row of numbers a step; derived all at once."""
    table = {key: torch.stack([step[key] for step in steps]) for key in steps[0]}  # (steps, ...)
    if "n" in table:
        table["G"] = table["w"] * table["n"]
        table["cosine"], table["similarity"] = similarities(table["gram_P3"])
        table["cosine_W"], _ = similarities(table["gram_W"])
    table["loss"], columns = (table["w"] * table["L"]).sum(1), {}
    for key, values in table.items():
        if values.ndim == 1:
            columns[key] = values
        elif values.ndim == 2 and key != "n":  # n is G / w
            columns |= {f"{key}/{task}": x for task, x in zip(tasks, values.T)}
    return [dict(zip(columns, row)) for row in torch.stack(list(columns.values()), 1).tolist()]

def train_epoch(run: Run, train_set: JointSet, bar: tqdm) -> list[dict[str, Any]]:
    """One pass over the training split; one row a step. NonFinite before anything is saved."""
    config, started, cpu = run.config, time.perf_counter(), time.process_time()
    # Both streams are functions of (seed, epoch, rank): a resumed run needs no saved random state.
    torch.manual_seed(config.seed * 100_003 + run.epoch * 64 + run.rank)  # dropout
    rng = torch.Generator().manual_seed(config.seed * 100_019 + run.epoch * 64 + run.rank)
    loader, steps = batches(train_set, config, run.epoch, run.world, run.rank), []
    small = config.mode == "dual" and run.epoch < round(config.progressive_share * config.epochs)
    size = [max(32, round(s * config.progressive_scale / 32) * 32) for s in train_set.canvas]
    images_seen = 0
    for k, batch in enumerate(loader):
        batch = augment(to_device(batch, run.device), config, rng)
        images = batch.images
        if small:  # targets are fractions: they hold at any size
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        batch = batch._replace(images=images.contiguous(memory_format=torch.channels_last))
        steps.append(train_step(run, batch, (run.epoch + k / len(loader)) / config.epochs))
        images_seen += len(images) * run.world
        bar.update()
    # The log waits for a GPU only here, once an epoch.
    rows = [{"step": run.epoch * len(loader) + k, "epoch": run.epoch} | row
            for k, row in enumerate(log_rows(steps, config.tasks))]
    for row in rows:
        if bad := [key for key, value in row.items() if not math.isfinite(value)]:
            w = ", ".join(f"{key} = {value:.4g}" for key, value in row.items() if key[:2] == "w/")
            raise NonFinite(f"step {row['step']}: {', '.join(bad)} not finite ({w}); lower lr")
    rows[-1]["time"] = {"train_s": time.perf_counter() - started, "images": images_seen,
                        "train_cpu_s": time.process_time() - cpu}
    return rows

def train(run: Run, train_set: JointSet, val_set: JointSet) -> Iterator[list[dict[str, Any]]]:
    """Trains to the last epoch; yields each epoch's rows, the last with metrics if one was due."""
    config, steps = run.config, len(batches(train_set, run.config, 0, run.world, run.rank))
    if not steps:
        raise UserError("train: fewer than two images a process; add images or use fewer")
    with tqdm(total=config.epochs * steps, initial=run.epoch * steps, unit="step", leave=False,
              desc=config.mode, disable=run.rank > 0 or None) as bar:
        while run.epoch < config.epochs:
            rows = train_epoch(run, train_set, bar)
            run.epoch += 1  # before the yield: a checkpoint counts whole epochs
            last, started = run.epoch == config.epochs, time.perf_counter()
            if run.rank == 0 and (last or run.epoch % config.eval_interval == 0):
                thresholds = IOU_THRESHOLDS if last else IOU_THRESHOLDS[:1]
                rows[-1]["val"] = val = evaluate(run.network, val_set, config, thresholds)
                rows[-1]["time"]["eval_s"] = time.perf_counter() - started
                bar.set_postfix({k: f"{v:.3f}" for k, v in val.items() if isinstance(v, float)})
            yield rows

def peak_rss_mb() -> float:
    unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit

def flops_per_image(network: nn.Module, canvas: tuple[int, int]) -> int:
    """Operations of one forward pass (a multiply-add counts as two), by torch's counter."""
    from torch.utils.flop_counter import FlopCounterMode
    was_training, device = network.training, next(network.parameters()).device
    network.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, *canvas, device=device))
    network.train(was_training)
    return counter.get_total_flops()

def environment(device: torch.device, world: int = 1) -> dict[str, Any]:
    """What a result depends on beside the code and the config: versions, device, threads."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"torch": torch.__version__, "python": platform.python_version(), "device": name,
            "os": platform.system(), "cpu": platform.machine(), "processes": world,
            "threads": torch.get_num_threads()}

def interference(rows: list[dict], tasks: tuple[str, ...]) -> dict[str, Any] | None:
    """Means over all steps of what the tasks' gradients do to each other; None if apart."""
    if "cosine" not in rows[0]:
        return None
    G = np.array([[row[f"G/{task}"] for task in tasks] for row in rows])  # (steps, T)
    shares = (G / G.sum(1, keepdims=True).clip(1e-30)).mean(0)  # (T,), each step counting alike
    return {"cosine_mean": float(np.mean([row["cosine"] for row in rows])),
            "magnitude_similarity": float(np.mean([row["similarity"] for row in rows])),
            "conflict_share": float(np.mean([row["cosine"] < 0 for row in rows])),
            "cosine_W_mean": float(np.mean([row["cosine_W"] for row in rows])),
            "gradient_share": dict(zip(tasks, shares.tolist()))}

def summarise(run: Run, rows: list[dict], canvas: tuple[int, int]) -> dict[str, Any]:
    """The flat contract of results.json, from a finished run and all rows of its log."""
    config, times = run.config, [row["time"] for row in rows if "time" in row]
    total = {key: sum(t.get(key, 0) for t in times)  # eval_s is not in every epoch
             for key in ("train_s", "train_cpu_s", "eval_s", "images")}
    first, final, losses = list(config.weights), run.w.tolist(), [row["loss"] for row in rows]
    return {
        "schema": "jointgrad/1", "mode": config.mode, "seed": config.seed, "data": config.data,
        "config": asdict(config), "environment": environment(run.device, run.world),
        "parameters": run.network.parameter_counts(),
        "flops_per_image": flops_per_image(run.network, canvas), "steps": len(rows),
        "weights": {"initial": first, "final": final,
                    "change": [b - a for a, b in zip(first, final)]},
        "loss": {"mean": float(np.mean(losses)),
                 "final": float(np.mean(losses[-len(rows) // config.epochs:]))},
        "val": rows[-1]["val"], "interference": interference(rows, config.tasks),
        "time": {key: total[key] for key in ("train_s", "train_cpu_s", "eval_s")}
        | {"step_ms": 1000 * total["train_s"] / len(rows),
           "images_per_s": total["images"] / total["train_s"]},
        "peak_rss_mb": peak_rss_mb()}

def load_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint of this program, read without running any code in it."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if dict(state)["format"] != "jointgrad/1":  # a bare tensor is no mapping
            raise ValueError
        return state
    except Exception as error:  # on foreign bytes torch.load raises a dozen types, all alike
        raise UserError(f"{path}: not a checkpoint of jointgrad ({type(error).__name__}); give a "
                        "run's best.pt or last.pt") from error

class Predictor:
    """A trained network: `Predictor("best.pt")("image.jpg")` -> its boxes and its image class."""

    def __init__(self, path: str | Path, device: str = "cpu"):
        state = load_checkpoint(Path(path))
        try:
            self.config = make_config(state["config"], str(path))
            self.names, self.classification_names = state["names"], state["classification_names"]
            num_labels = len(self.classification_names)
            self.network = Network(self.config, len(self.names), num_labels, np.ones((3, 3, 2)))
            self.network.load_state_dict(state["run"]["network"])  # brings the anchors too
        except (RuntimeError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: its tensors do not fit its config: it is damaged") from error
        self.device = torch.device(device)
        self.network.to(self.device).eval()

    @torch.no_grad()
    def __call__(self, image: str | Path | Image.Image, least: float = 0.0) -> dict[str, Any]:
        """boxes [{name, score >= least, box_xyxy px}], classification {name, probs} or None."""
        image = to_rgb(image) if isinstance(image, Image.Image) else read_image(Path(image))
        canvas = canvas_size([image.size], self.config.imgsz)  # its own: training's may be larger
        left, top, w, h = fit(image.size, canvas)
        pixels = torch.tensor(letterbox(image, canvas), device=self.device)
        outputs = self.network(pixels.permute(2, 0, 1)[None].float() / 255)  # (1, 3, H, W)
        found = {"boxes": [], "classification": None}
        if "det" in outputs:
            anchors = self.network.parts[0].heads["det"].anchors
            rows = find_boxes(outputs["det"], anchors, self.config)[0]
            rows[:, :4] = (rows[:, :4] - [left, top] * 2) * (image.size * 2) / ([w, h] * 2)
            rows[:, :4] = rows[:, :4].clip(0, image.size * 2)  # px of the image as given
            found["boxes"] = [{"name": self.names[int(row[5])], "score": float(row[4]),
                               "box_xyxy": row[:4].tolist()} for row in rows if row[4] >= least]
        if "cls" in outputs:
            probs = dict(zip(self.classification_names, outputs["cls"][0].softmax(0).tolist()))
            found["classification"] = {"name": max(probs, key=probs.get), "probs": probs}
        return found

# --------------------------------------------------------------------------------------------------
# 11. Experiments: many runs -> statistics, verdicts, times
# --------------------------------------------------------------------------------------------------

SINGLE = {"mAP50-95": "detect", "balanced_accuracy": "classify"}  # metric: single-task reference

def t_quantile(df: int) -> float:
    """97.5 % quantile of Student's t: with x = sqrt(df) tan(a), its density is cos(a)^(df - 1)."""
    angle = np.linspace(0, np.pi / 2, 200_001)  # x from 0 to infinity
    mass = np.cumsum(np.cos(angle)**(df - 1))  # of x > 0: its top 5 % are 2.5 % of all
    return math.sqrt(df) * math.tan(angle[np.searchsorted(mass, 0.95 * mass[-1])])

def interval(values: Any) -> dict[str, Any]:
    """Mean, 95 % t interval (None of one value) and the values of one quantity over seeds."""
    x, ci95 = np.asarray(values, float), None
    if len(x) > 1:
        half = t_quantile(len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))
        ci95 = [x.mean() - half, x.mean() + half]
    return {"mean": float(x.mean()), "ci95": ci95, "per_seed": x.tolist()}

def sign_flip_p(differences: Any) -> float:
    """Exact two-sided p: share of the 2^n sign patterns whose mean is as far from 0 as seen."""
    d = np.asarray(differences, float)
    signs = np.array(list(itertools.product((1, -1), repeat=len(d))))  # (2^n, n)
    return float(np.mean(np.abs(signs @ d) >= abs(d.sum()) - 1e-12 * np.abs(d).sum()))

def run_cell(config: Config, folder: Path, changed: float) -> dict[str, Any]:
    """results.json of one run in its own process; taken up where it stands, never done twice.

    But from the start if data or code have changed (`changed`: when) since it began.
    """
    wanted = json.loads(json.dumps(asdict(config)))  # lists for tuples, as in the file
    done, started = folder / "results.json", folder / "config.yaml"
    fresh = started.exists() and started.stat().st_mtime > changed and read_yaml(started) == wanted
    if not (fresh and done.exists() and json.loads(done.read_text())["config"] == wanted):
        settings = [f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in wanted.items()]
        choice = ["--out", str(folder), "--set", *settings]
        if fresh:
            choice = ["--resume", str(folder)]
        child = subprocess.run([sys.executable, __file__, *choice], capture_output=True, text=True)
        if child.returncode:
            raise RuntimeError(f"{folder}: {child.stderr.strip() or child.returncode}")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    curve = [(row["step"] + 1, row["val"]) for row in rows if "val" in row]
    return json.loads(done.read_text()) | {"curve": curve}

def run_grid(cells: dict[tuple, Config], out: Path, jobs: int, changed: float) -> dict[tuple, dict]:
    """Runs every cell ((label, seed) -> config), `jobs` at a time; the results in that order."""
    folders = [out / f"{label}-s{seed}".replace(" ", "-").replace("/", "_")
               for label, seed in cells]
    with ThreadPoolExecutor(jobs) as pool:  # one that fails cancels the rest
        results = pool.map(partial(run_cell, changed=changed), cells.values(), folders)
        return dict(zip(cells, tqdm(results, total=len(cells), unit="run", disable=None)))

def quantities(results: dict[tuple, dict], labels: list[str], seeds: list[int]) -> dict[str, dict]:
    """The numbers over seeds of each mode, or mode at a value: {label: {metric: [...]}}.

    steps_to_90: first evaluated step at 90 % of fixed's final score; NaN if never reached.
    delta_m: mean over tasks of (mode - single) / single of mAP50-95 and balanced accuracy, in %;
    positive is better than single task. mean_rank: of the joint modes in the same two, 1 = best.
    """
    table = {}
    for label in labels:
        runs = [results[label, seed] for seed in seeds]
        row = {m: [r["val"][m] for r in runs] for m in METRICS if runs[0]["val"][m] is not None}
        for task, m in (("det", "mAP50"), ("cls", "balanced_accuracy")):
            if m in row and "fixed" in labels:
                goals = [0.9 * results["fixed", seed]["val"][m] for seed in seeds]
                row[f"steps_to_90_{task}"] = [
                    next((step for step, val in r["curve"] if (val[m] or 0) >= goal), math.nan)
                    for r, goal in zip(runs, goals)]
        row |= {"parameters": [r["parameters"]["total"] for r in runs],
                "step_ms": [r["time"]["step_ms"] for r in runs],
                "step_cpu_ms": [1000 * r["time"]["train_cpu_s"] / r["steps"] for r in runs]}
        row |= {key: [r[key] for r in runs] for key in ("flops_per_image", "peak_rss_mb")}
        if seen := [r["interference"] for r in runs if r.get("interference")]:
            row |= {key: [x[key] for x in seen] for key in seen[0] if key != "gradient_share"}
            row["gradient_share_det"] = [x["gradient_share"]["det"] for x in seen]
        table[label] = row
    joint = [m for m in labels if all(key in table[m] for key in SINGLE)]
    alone = np.array([table[m][key] for key, m in SINGLE.items() if key in table.get(m, {})])
    if joint and len(alone) == 2 and alone.all():  # a score of 0 has no percentage
        scores = np.array([[table[m][key] for key in SINGLE] for m in joint])  # (modes, 2, seeds)
        ranks = 1 + (scores[None] > scores[:, None]).sum(1)  # (modes, 2, seeds), 1 = best
        for mode, gain, rank in zip(joint, 100 * (scores / alone - 1).mean(1), ranks.mean(1)):
            table[mode] |= {"delta_m": gain.tolist(), "mean_rank": rank.tolist()}
    return table

def paired(table: dict[str, dict[str, list]]) -> list[dict[str, Any]]:
    """Differences seed by seed against fixed, equal and single task, with interval and exact p."""
    rows = []
    for metric in METRICS:
        single = "detect" if metric.startswith("mAP") else "classify"
        for mode, versus in itertools.product(table, ("fixed", "equal", single)):
            mirrored = mode in (versus, single) or (mode, versus) == ("fixed", "equal")
            if not mirrored and metric in table[mode] and metric in table.get(versus, {}):
                d = np.subtract(table[mode][metric], table[versus][metric])
                rows.append({"mode": mode, "versus": versus, "metric": metric,
                             "delta": float(d.mean()), "ci95": interval(d)["ci95"],
                             "p": sign_flip_p(d)})
    return rows

def judge(claims: list[dict], table: dict[str, dict[str, list]]) -> list[dict[str, Any]]:
    """A verdict on each claim: does the 95 % interval lie inside, outside or across its range?"""
    rows = []
    for claim in claims:
        kind, metric, mode, versus = (*claim["measure"], None)[:4]  # see data/reported.yaml
        x, base = table.get(mode, {}).get(metric), table.get(versus, {}).get(metric)
        if x is None or versus and base is None:
            continue
        x = np.divide(x, base) if versus else np.asarray(x, float)
        measured = interval(100 * (x - 1) if kind == "gain" else x)
        low, high = claim.get("at_least", -math.inf), claim.get("at_most", math.inf)
        start, end = measured["ci95"] or [-math.inf, math.inf]  # one seed alone decides nothing
        verdict = ("holds" if low <= start and end <= high else
                   "does not hold" if end < low or start > high else "not decided by these data")
        said = {key: claim.get(key, "") for key in ("id", "claim", "reported", "unit", "measure")}
        job = "reproduce" if mode.startswith("smoke") else "compare"
        rows.append(said | {"measured": measured["mean"], "ci95": measured["ci95"],
                            "verdict": verdict, "command": f"python jointgrad.py --mode {job}"})
    return rows

def report_rule(w: Tensor, g: Tensor, G0_bar: Tensor, r: Tensor, alpha: float) -> Tensor:
    """The report's update of w (2,), as it is: g does not depend on w, and w sums to T^2 = 4."""
    w = w * G0_bar * r**alpha / (g + 1e-8)
    return w / w.mean() * len(w)

def smoke_test(seed: int, rule: str) -> dict[str, Any]:
    """The report's smoke test (cross-entropy and BCE on noise), under its rule or GradNorm."""
    torch.manual_seed(seed)
    trunk = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten())
    heads = nn.ModuleList([nn.Linear(32, 4), nn.Linear(32, 4)])
    parameters, W = [*trunk.parameters(), *heads.parameters()], trunk[0].weight
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)
    balancer = GradNorm([1.0, 0.01], w_min=1e-3)
    w, L0, log, ratios, started = balancer.w.clone(), None, [], [], time.perf_counter()

    def forward() -> tuple[list[Tensor], Tensor]:
        features = trunk(torch.randn(8, 3, 64, 64))
        out = [head(features) for head in heads]
        one_hot = F.one_hot(torch.randint(4, (8,)), 4).float()
        return out, torch.stack([F.cross_entropy(out[0], torch.randint(4, (8,))),
                                 F.binary_cross_entropy_with_logits(out[1], one_hot)])

    def norms(losses: Tensor, at: list[Tensor]) -> Tensor:
        return torch.stack([torch.autograd.grad(L_i, x, retain_graph=True)[0].norm()
                            for L_i, x in zip(losses, at)])

    for step in range(1, 51):  # 5 epochs of 10 batches
        out, losses = forward()
        L = losses.detach()
        if rule == "report" and step >= 10:
            g = norms(losses, out)  # (2,), at the heads' outputs, not at W
            L0, G0_bar = (L, g.mean()) if L0 is None else (L0, G0_bar)
            w = report_rule(w, g, G0_bar, L / L0 / (L / L0).mean(), 1.5)
            ratios.append(g[0] / g[1])
        n = norms(losses, [W, W]) if rule == "gradnorm" else None
        loss = (w * losses).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log.append(torch.cat([w, loss.detach()[None]]))
        w = balancer.update(L, n) if rule == "gradnorm" else w
    log, seconds = torch.stack(log).numpy(), time.perf_counter() - started  # (50, 3)
    G = w * norms(forward()[1], [W, W])  # whose gradient the trunk would follow from here on
    return {"w": np.vstack([log[:, :2], w.tolist()]), "loss": log[:, 2], "seconds": seconds,
            "parameters": sum(p.numel() for p in parameters), "share_det": float(G[0] / G.sum()),
            "ratio": float(np.mean(ratios)) if ratios else None}

def smoke_quantities(seeds: range, rules: tuple[str, ...] = ("report", "gradnorm")) -> tuple:
    """What the smoke test gives under each rule, over seeds: numbers for `judge`, and the runs."""
    runs = {rule: [smoke_test(seed, rule) for seed in seeds] for rule in rules}
    table = {}
    for rule, of_rule in runs.items():
        epochs = np.array([run["loss"].reshape(5, 10).mean(1) for run in of_rule])  # (seeds, 5)
        det, cls = np.array([run["w"][-1] for run in of_rule]).T  # (seeds,) each
        table[f"smoke_{rule}"] = {
            "final_weight_det": det, "final_weight_cls": cls, "weight_change_det": det - 1.0,
            "weight_change_cls": cls - 0.01, "mean_loss": epochs.mean(1),
            "loss_change": 100 * (epochs[:, -1] / epochs[:, 0] - 1)}
        for name, key in (("train_seconds", "seconds"), ("parameters", "parameters"),
                          ("share_det", "share_det"), ("gradient_ratio", "ratio")):
            if of_rule[0][key] is not None:
                table[f"smoke_{rule}"][name] = [run[key] for run in of_rule]
    return table, runs

def check_smoke(reported: dict, table: dict[str, list]) -> list[dict[str, Any]]:
    """Each number of the report beside what the seeds give; `spread`: within their range."""
    checks = []
    for name, entry in reported.items():
        x, tolerance, value = np.array(table[name], float), entry["tolerance"], entry["value"]
        ok = (None if tolerance == "machine" else bool(x.min() <= value <= x.max())
              if tolerance == "spread" else bool(np.all(np.abs(x - value) <= tolerance)))
        checks.append({"name": name, "reported": value, "measured": float(x.mean()),
                       "range": [x.min(), x.max()], "tolerance": tolerance, "ok": ok})
    return checks

def plain_losses(part: nn.Module, batch: Batch, losses: dict, autocast: Any) -> Tensor:
    """Losses (T,) on one graph, not cut at P3."""
    with autocast:
        P3 = part.trunk(batch.images)
        return torch.stack([losses[task](to_float(head(P3)), batch)
                            for task, head in part.heads.items()])

def plain_backward(part: nn.Module, batch: Batch, losses: dict, w: Tensor,
                   autocast: Any = contextlib.nullcontext()) -> Signals:
    """A joint step as everyone writes it, blind to the gradients: the base of `bench`."""
    L = plain_losses(part, batch, losses, autocast)
    (w * L).sum().backward()
    return Signals(L.detach())

def textbook_backward(part: nn.Module, batch: Batch, losses: dict, w: Tensor,
                      autocast: Any = contextlib.nullcontext()) -> Signals:
    """GradNorm as most repositories write it: L_grad is a graph, differentiated a second time."""
    w, L = w.clone().requires_grad_(), plain_losses(part, batch, losses, autocast)
    G = torch.stack([torch.autograd.grad(w_i * L_i, part.trunk.W, retain_graph=True,
                                         create_graph=True)[0].norm() for w_i, L_i in zip(w, L)])
    target = (G.mean() * (L / L.mean())**1.5).detach()  # L, not L_tilde: only its cost matters
    torch.autograd.grad((G - target).abs().sum(), w, retain_graph=True)  # not used, but timed
    (w.detach() * L).sum().backward()
    return Signals(L.detach(), (G / w).detach())

def make_variant(name: str, config: Config, data: JointSet, device: torch.device,
                 tasks: int) -> tuple[partial, Network, Tensor]:
    """One training step of a variant on one batch, its network of its own, the batch's images."""
    mode = "gradnorm" if name in ("textbook", "nchw") else name
    run = Run(replace(config, mode=mode), data, device)
    part = run.network.parts[0]
    for k in range(2, tasks):  # more classification heads on P3
        part.heads[f"cls{k}"] = ClassificationHead(part.trunk.c_out, len(VIEWS), config.dropout)
        run.losses[f"cls{k}"] = run.losses["cls"]
        run.optimizers[0].add_param_group({"params": part.heads[f"cls{k}"].parameters(),
                                           "peak": config.lr})
    if tasks > 2:
        run.w = torch.ones(tasks, device=device)
        run.balancer = run.balancer and GradNorm(run.w.tolist(), device=device)
    layout = torch.contiguous_format if name == "nchw" else torch.channels_last
    run.network.to(device, memory_format=layout)
    batch = to_device(data.__getitems__(list(range(config.batch_size))), device)
    batch = batch._replace(images=batch.images.contiguous(memory_format=layout))
    how = {"fixed": plain_backward, "textbook": textbook_backward}.get(name, backward)
    return partial(train_step, run, batch, 0.5, how), run.network, batch.images

def time_interleaved(steps: list, rounds: int, device: torch.device, bar: tqdm) -> np.ndarray:
    """Seconds (rounds, steps, 2) wall and CPU; steps in turns, so that drift hits all alike."""
    times = np.zeros((rounds + 2, len(steps), 2))
    for of_round in times:  # (steps, 2), a view that `spent` fills
        for step, spent in zip(steps, of_round):
            for _ in range(2):  # the second counts: as in training, it follows one of its own kind
                wall, cpu = time.perf_counter(), time.process_time()
                step()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)  # a step returns before the GPU is done
                spent[:] = time.perf_counter() - wall, time.process_time() - cpu
        bar.update()
    return times[2:]  # without two rounds of warm-up

def bench_case(config: Config, device: torch.device, rounds: int, bar: tqdm, names: tuple[str, ...],
               tasks: int = 2) -> dict[str, Any]:
    """Step times, throughput and ratios (of CPU time on a CPU, else wall) of some variants."""
    data, _ = load_data(replace(config, data="synthetic", val_images=2,
                                train_images=config.batch_size))
    made = {name: make_variant(name, config, data, device, tasks) for name in names}
    times = time_interleaved([step for step, _, _ in made.values()], rounds, device, bar)
    wall, cpu = (dict(zip(names, times[:, :, k].T)) for k in (0, 1))  # name -> (rounds,)
    forwards = [partial(network.eval(), images) for _, network, images in made.values()]
    with torch.no_grad():
        forward = time_interleaved(forwards, 5, device, bar)[:, :, 0].T  # (variants, 5) wall

    def spread(x: np.ndarray, scale: float = 1.0) -> dict[str, float]:
        return {"median": scale * np.median(x), "min": scale * x.min(), "max": scale * x.max()}

    fair = cpu if device.type == "cpu" else wall  # CPU time leaves out what neighbours take
    pairs = [(name, "fixed") for name in ("gradnorm", "textbook", "dual", "detect", "classify")]
    pairs += [("textbook", "gradnorm"), ("nchw", "gradnorm")]
    return {"step_ms": {name: spread(x, 1000) for name, x in wall.items()},
            "cpu_ms": {name: spread(x, 1000) for name, x in cpu.items()},
            "images_per_s": {a: config.batch_size / np.median(x) for a, x in wall.items()},
            "inference_images_per_s": {a: config.batch_size / np.median(x)
                                       for a, x in zip(names, forward)},
            "flops_per_image": {a: flops_per_image(m[1], data.canvas) for a, m in made.items()},
            "ratios": {f"{a}/{b}": spread(fair[a] / fair[b])  # in a round drift cancels
                       for a, b in pairs if a in names and b in names}}

def bench(config: Config, device: torch.device, rounds: int = 100) -> dict[str, Any]:
    """All variants at the default size and at width 0.25, 128 px; growth."""
    names = ("detect", "classify", "fixed", "gradnorm", "textbook", "dual", "nchw")
    large = replace(config, width_multiple=0.25, dual_width_multiple=0.25, imgsz=128)
    growth = [("tasks", t, config, t) for t in (2, 4, 8)]
    for key, values in (("imgsz", (64, 128, 256)), ("batch_size", (8, 16, 32, 64))):
        growth += [(key, v, replace(config, **{key: v}), 2) for v in values]
    with tqdm(unit="round", desc="bench", disable=None, leave=False) as bar:
        result = bench_case(config, device, 3 * rounds, bar, names)  # small steps: more noise
        result["width_0.25_128px"] = bench_case(large, device, rounds, bar, names)
        result["growth"] = []
        for key, value, case, tasks in growth:
            got = bench_case(case, device, max(5, rounds // 5), bar, ("fixed", "gradnorm"), tasks)
            result["growth"].append({
                "key": key, "value": value, "step_ms": got["step_ms"]["gradnorm"]["median"],
                "images_per_s": got["images_per_s"]["gradnorm"],
                "gradnorm/fixed": got["ratios"]["gradnorm/fixed"]["median"]})
    return result | {"schema": "jointgrad/1", "mode": "bench", "config": asdict(config),
                     "environment": environment(device), "peak_rss_mb": peak_rss_mb()}

# --------------------------------------------------------------------------------------------------
# 12. Report: results -> files, tables, figures
# --------------------------------------------------------------------------------------------------

COLOURS = {"det": "#1f77b4", "cls": "#d62728"}
TASK_NAMES = {"det": "detection", "cls": "classification"}

def clean(value: Any) -> Any:
    """The value as JSON wants it: tuples and arrays as lists, NaN as None."""
    if isinstance(value, dict):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [clean(v) for v in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value

def write_atomic(path: Path, content: Any) -> None:
    """Writes text, bytes, or an object by torch: the file is the old or the new, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")  # same folder: there a rename is atomic
    if not isinstance(content, (str, bytes)):
        buffer = io.BytesIO()  # torch's own writer hides the reason of a failure
        torch.save(content, buffer)
        content = buffer.getvalue()
    try:
        with part.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())  # else a power cut may leave the new name on an empty file
        part.replace(path)
    except OSError as error:
        reason = f"{error.strerror}; the last good file is kept"
        raise OSError(error.errno, reason, str(path)) from error
    finally:
        part.unlink(missing_ok=True)

def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(clean(value), indent=1, allow_nan=False) + "\n")

def cell(x: Any) -> str:
    """A table's cell: text as it is, a number to three digits, an interval's mean and ends."""
    if isinstance(x, dict):
        lost = sum(v is None or v != v for v in x.get("per_seed", ()))  # a goal never reached
        if lost:
            return f"n/a in {lost} of {len(x['per_seed'])}"
        low, high = x["ci95"] or (0, 0)
        return cell(x["mean"]) + (f" [{cell(low)}, {cell(high)}]" if low != high else "")
    if isinstance(x, (list, tuple)):
        return " / ".join(map(cell, x))
    if x is None or x != x:
        return "n/a"
    if isinstance(x, (str, bool)):
        return str(x)
    whole = x == int(x) and (isinstance(x, int) or abs(x) > 9)
    digits = 0 if whole or abs(x) >= 1000 else 1 if abs(x) >= 10 else 3
    return f"{round(x, digits) + 0.0:,.{digits}f}"  # + 0.0: no minus before zero

def markdown(header: list[str], rows: list[list[Any]]) -> str:
    """An aligned Markdown table."""
    cells = [header] + [[cell(x) for x in row] for row in rows]
    widths = [max(len(row[k]) for row in cells) for k in range(len(header))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths)) + " |" for row in cells]
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]]) + "\n"

def panels(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure and its axes (rows, columns), without pyplot; matplotlib loads for figures alone."""
    from matplotlib import figure, rcParams
    rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False,
                     "axes.grid": True, "grid.alpha": 0.3, "legend.frameon": False})
    fig = figure.Figure(size)
    return fig, fig.subplots(rows, columns, squeeze=False)

def save_figure(fig: Any, path: Path) -> None:
    """Writes the figure as PNG, the same bytes for the same data."""
    buffer = io.BytesIO()
    fig.tight_layout()
    fig.savefig(buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    write_atomic(path, buffer.getvalue())

def label_axis(ax: Any, title: str, xlabel: str = "", ylim: tuple = (None, None)) -> None:
    """Names a panel, limits it, and shows a legend where its lines have labels."""
    ax.set_title(title, fontsize=9)
    ax.set(xlabel=xlabel, ylim=ylim)
    if ax.get_legend_handles_labels()[0]:
        ax.legend()

def annotate(image: Image.Image, found: dict[str, Any], names: list[str]) -> Image.Image:
    """The picture with its boxes and its class, enlarged to about 320 px where it is smaller."""
    zoom = max(1, round(320 / max(image.size)))
    sheet = image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)
    import matplotlib  # for a font that has more than ASCII
    size = max(14, max(sheet.size) // 50)
    font = ImageFont.truetype(f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)
    draw = ImageDraw.Draw(sheet)
    palette = ("#ff5c5c", "#5cb3ff", "#7dff5c", "#ffd75c", "#e05cff", "#5cffe4")
    title = (found["classification"] or {"name": ""})["name"]
    notes = [((4, 4), title, "white")] if title else []
    for box in found["boxes"]:
        colour = palette[names.index(box["name"]) % len(palette)]
        x1, y1, x2, y2 = (v * zoom for v in box["box_xyxy"])
        draw.rectangle((x1, y1, x2, y2), outline=colour, width=max(2, size // 8))
        score = f" {box['score']:.2f}" if "score" in box else ""
        notes.append(((x1, max(0, y1 - size - 2)), box["name"] + score, colour))
    for spot, text, colour in notes[::-1]:  # the best last, on top
        draw.rectangle(draw.textbbox(spot, text, font=font), fill="black")
        draw.text(spot, text, fill=colour, font=font)
    return sheet

def draw_curves(axes: Any, rows: list[dict]) -> None:
    """Weights, losses, gradient shares (means of 11 steps) and validation metrics of one run."""
    steps, tasks = [row["step"] for row in rows], [t for t in COLOURS if f"L/{t}" in rows[0]]

    def line(ax: Any, task: str, values: list[float]) -> None:
        smooth = np.convolve(np.pad(values, 5, "edge"), np.ones(11) / 11, "valid")
        ax.plot(steps, smooth, color=COLOURS[task], label=TASK_NAMES[task])

    shared = "cosine" in rows[0]
    total = [max(sum(row[f"G/{u}"] for u in tasks), 1e-30) for row in rows if shared]
    for task in tasks:
        w, L, G = ([row.get(f"{key}/{task}") for row in rows] for key in "wLG")
        axes[0].plot(steps, w, color=COLOURS[task], label=TASK_NAMES[task])
        axes[1].plot(steps, L, color=COLOURS[task], alpha=0.2)
        line(axes[1], task, L)
        if shared:
            line(axes[2], task, np.divide(G, total))
    if not shared:
        axes[2].text(0.1, 0.5, "no trunk is shared in this mode")
    curve = [(row["step"] + 1, row["val"]) for row in rows if "val" in row]
    for metric, task in (("mAP50", "det"), ("accuracy", "cls")):
        if task in tasks and curve[-1][1][metric] is not None:
            axes[3].plot(*zip(*[(s, v[metric]) for s, v in curve]), "o-", color=COLOURS[task],
                         label=f"{metric} {curve[-1][1][metric]:.3f}")
    label_axis(axes[0], "Task weights w", "step")
    label_axis(axes[1], "Training losses L, unweighted\n(mean of 11 steps)", "step")
    label_axis(axes[2], "Share of w n, the norm of a weighted\ngradient at W (mean of 11 steps)",
               "step", (0, 1))
    label_axis(axes[3], "Validation", "step", (0, 1.02))

def draw_run(rows: list[dict], title: str, data: JointSet, predictor: Predictor,
             path: Path) -> None:
    """The figure of one run: its curves, and four validation images, truth above prediction."""
    fig, axes = panels(3, 4, (13, 9.5))
    draw_curves(axes[0], rows)
    for i, column in enumerate(axes[1:].T):  # column: (2,), truth above prediction
        i %= len(data)  # a split may hold fewer than four
        image = Image.fromarray(data.__getitems__([i]).images[0].permute(1, 2, 0).numpy())
        truth = {"boxes": [{"name": data.names[int(k)], "box_xyxy": box}
                           for k, *box in data.truth(i).tolist()], "classification": None}
        if data.classification_names and data.labels[i] != NO_LABEL:
            truth["classification"] = {"name": data.classification_names[data.labels[i]]}
        found = predictor(image, predictor.config.predict_conf)
        for ax, word, what in zip(column, ("truth", "predicted"), (truth, found)):
            ax.imshow(annotate(image, what, data.names))
            ax.set_title(word)
            ax.axis("off")
    fig.suptitle(title, parse_math=False)
    save_figure(fig, path)

def draw_compare(results: dict[str, Any], path: Path) -> None:
    """A panel for each metric: seeds as dots, mean and 95 % interval of each mode and value."""
    shown = {"mAP50": "Detection: mAP50", "mAP50-95": "Detection: mAP50-95",
             "balanced_accuracy": "Classification: balanced accuracy",
             "delta_m": "Change against single task, %\n(mean of both tasks, up is better)"}
    key = results["sweep"].partition("=")[0]
    shown |= {} if key else {"step_cpu_ms": "CPU time of a step, ms"}
    have = [m for m in shown if any(m in q for q in results["modes"].values())]
    columns = len(have) // 2 + 1  # two rows; the last panel holds the legend
    fig, axes = panels(2, columns, (3.2 * columns, 6.2))
    for ax, metric in zip(axes.flat, have):
        lines = {}  # mode -> {value, or the mode itself where no key is swept: quantity}
        for label, q in results["modes"].items():
            mode, _, setting = label.partition(" ")
            if metric in q:
                lines.setdefault(mode, {})[setting.partition("=")[2] or mode] = q[metric]
        ticks = list(dict.fromkeys(tick for line in lines.values() for tick in line))
        for mode, line in lines.items():
            aside = 0.08 * (MODES.index(mode) - 2.5) * bool(key and len(lines) > 1)  # side by side
            x = [ticks.index(tick) + aside for tick in line]
            mean = np.array([q["mean"] for q in line.values()])
            ends = np.array([q["ci95"] or [q["mean"]] * 2 for q in line.values()])
            ax.errorbar(x, mean, np.abs(ends.T - mean), capsize=3, marker="o", label=mode,
                        color=f"C{MODES.index(mode)}")
            ax.plot(x, [q["per_seed"] for q in line.values()], ".", color="0.6", ms=4, zorder=3)
        if metric in METRICS:  # an interval may pass 0 or 1, a score cannot
            low, high = ax.get_ylim()
            ax.set_ylim(max(low, -0.01), min(high, 1.01))
        ax.set_xticks(range(len(ticks)), ticks, rotation=40, ha="right")
        ax.set_title(shown[metric], fontsize=9)
        ax.set_xlabel(key)
    for ax in axes.flat[len(have):]:
        ax.axis("off")
    lines = {x: h for ax in axes.flat for h, x in zip(*ax.get_legend_handles_labels())}
    axes.flat[-1].legend(lines.values(), lines.keys(), loc="center", title=(
        f"grey dots: {len(results['seeds'])} seeds\nbars: mean, 95 % t interval"))
    save_figure(fig, path)

def draw_smoke(runs: dict[str, list], _: dict[str, Any], path: Path) -> None:
    """The smoke test's weights under the report's rule and under GradNorm, and the total loss."""
    fig, axes = panels(1, 3, (12, 3.4))
    titles = {"report": "The report's rule: w sums to 4,\ndetection falls to 0",
              "gradnorm": "GradNorm: w sums to 2,\nboth tasks keep a weight"}
    for ax, (rule, title) in zip(axes[0], titles.items()):
        for k, task in enumerate(COLOURS):
            w = np.stack([run["w"][:, k] for run in runs[rule]], 1)  # (steps, seeds)
            ax.plot(w, color=COLOURS[task], alpha=0.5)[0].set_label(f"w, {TASK_NAMES[task]}")
        label_axis(ax, title, "step", (-0.1, 4.1))
        axes[0, 2].plot(np.mean([run["loss"] for run in runs[rule]], 0), label=rule)
    label_axis(axes[0, 2], "Total loss, mean over seeds\n(it follows sum(w): no measure)", "step")
    save_figure(fig, path)

def draw_bench(results: dict[str, Any], path: Path) -> None:
    """Ratios of step times at two sizes; throughput over tasks, image size and batch."""
    fig, axes = panels(1, 4, (14, 3.2))
    for k, part in enumerate((results, results["width_0.25_128px"])):
        x = np.arange(len(part["ratios"])) + 0.4 * k
        axes[0, 0].bar(x, [q["median"] for q in part["ratios"].values()], 0.38)
        axes[0, 0].set_xticks(x - 0.2, part["ratios"], rotation=40, ha="right")
    axes[0, 0].axhline(1, color="0.3", lw=0.8)
    label_axis(axes[0, 0], "Ratio of step times, median\n(orange: at width 0.25 and 128 px)")
    for ax, key in zip(axes[0, 1:], ("tasks", "imgsz", "batch_size")):
        rows = [row for row in results["growth"] if row["key"] == key]
        ax.plot([str(row["value"]) for row in rows], [row["images_per_s"] for row in rows], "o-",
                clip_on=False)
        label_axis(ax, "gradnorm: images/s", "imgsz, px" if key == "imgsz" else key, (0, None))
    save_figure(fig, path)

def report_run(results: dict[str, Any]) -> str:
    """The closing table of one training run."""
    val, weights, times = results["val"], results["weights"], results["time"]
    rows = [[m, val[m]] for m in METRICS if val[m] is not None]
    for kind, each in val["per_class"].items():
        rows += [[f"{kind} {name}", v] for name, v in each.items()]
    rows += [["weights, first", weights["initial"]], ["weights, final", weights["final"]],
             ["loss, mean / last epoch", list(results["loss"].values())]]
    rows += [[key, list(v.values()) if isinstance(v, dict) else v]
             for key, v in (results["interference"] or {}).items()]
    rows += [["parameters", results["parameters"]["total"]],
             ["start-up / training / evaluation, s",
              [times[key] for key in ("start_s", "train_s", "eval_s")]],
             ["step, ms", times["step_ms"]]]
    return markdown([f"{results['mode']}, seed {results['seed']}", "value"], rows)

def report_compare(results: dict[str, Any]) -> str:
    """Markdown tables: modes with intervals, their cost and gradients, paired, claims."""
    text = f"n = {len(results['seeds'])} seeds; mean [95 % interval]\n"
    have = list(dict.fromkeys(key for q in results["modes"].values() for key in q))
    price = [key for key in have if key in ("parameters", "step_ms", "step_cpu_ms",
                                            "flops_per_image", "peak_rss_mb")]
    gradients = [key for key in have if "cosine" in key or key.startswith("gradient")
                 or key in ("conflict_share", "magnitude_similarity")]
    scores = [key for key in have if key not in price + gradients]
    for columns in filter(None, (scores, price, gradients)):
        rows = [[mode, *(q.get(c) for c in columns)] for mode, q in results["modes"].items()]
        text += "\n" + markdown(["mode", *columns], rows)
    if results["paired"]:
        rows = [[r["mode"], r["versus"], r["metric"], {"mean": r["delta"], "ci95": r["ci95"]},
                 r["p"]] for r in results["paired"]]
        text += "\nPaired over seeds\n\n" + markdown(
            ["mode", "versus", "metric", "difference [95 %]", "p"], rows)
    if results["claims"]:
        text += "\nClaims of the report\n\n" + report_claims(results["claims"])
    return text

def report_claims(claims: list[dict[str, Any]]) -> str:
    """The Markdown table of the report's claims, measured values and verdicts."""
    rows = [[c["id"], c["claim"], c["reported"],
             "+" * (c["unit"] == "%" and c["measured"] > 0)  # a change
             + cell({"mean": c["measured"], "ci95": c["ci95"]}) + f" {c['unit']}".rstrip(),
             c["verdict"]] for c in claims]
    return markdown(["id", "claim", "reported", "measured [95 %]", "verdict"], rows)

def report_smoke(results: dict[str, Any]) -> str:
    """The smoke test's numbers beside the report's, and in words why that rule collapses."""
    word = {True: "yes", False: "NO", None: "machine"}
    ratio = cell(results["gradient_ratio"]["mean"])
    rows = [[c["name"], str(c["reported"]), c["measured"], " to ".join(map(cell, c["range"])),
             word[c["ok"]], results["rules"]["smoke_gradnorm"][c["name"]]]
            for c in results["checks"]]
    return markdown(["number", "reported", "measured", "range over seeds", "ok",
                     "under GradNorm"], rows) + f"""
Why the report's rule collapses: its norms are those of the unweighted losses, so the weights never
feed back, and every update multiplies w_det / w_cls by (g_cls / g_det) (r_det / r_cls)^alpha. The
ratio of output gradients g_det / g_cls, mean cross-entropy over mean BCE, is {ratio} here whatever
the tasks' difficulty, and it compounds. Dividing by the mean and multiplying by T makes the weights
sum to T^2 = 4, all of which ends on classification, while the detector is no longer trained.

""" + report_claims(results["claims"])

def report_bench(results: dict[str, Any]) -> str:
    """Markdown tables of step times and ratios at both sizes, and of growth."""
    text, spread = "", ("median", "min", "max")
    throughput = ("images_per_s", "inference_images_per_s", "flops_per_image")
    for title, part in (("Default size", results),
                        ("Width 0.25, 128 px", results["width_0.25_128px"])):
        rows = [[name, *(t[k] for k in spread), part["cpu_ms"][name]["median"],
                 *(part[key][name] for key in throughput)] for name, t in part["step_ms"].items()]
        text += f"{title}\n\n" + markdown(
            ["variant", "step ms, median", "min", "max", "CPU ms", *throughput], rows)
        rows = [[name, *(r[k] for k in spread)] for name, r in part["ratios"].items()]
        text += "\n" + markdown(["ratio", *spread], rows) + "\n"
    rows = [[g[k] for k in ("key", "value", "step_ms", "images_per_s", "gradnorm/fixed")]
            for g in results["growth"]]
    return text + markdown(["grows", "value", "gradnorm step ms", "images/s", "gradnorm/fixed"],
                           rows)

# --------------------------------------------------------------------------------------------------
# 13. Command line: arguments -> one of the jobs above, files under --out, an exit code
# --------------------------------------------------------------------------------------------------

JOBS = ("compare", "reproduce", "bench", "predict", "check")  # what --mode does beside training

def pick_device(name: str) -> torch.device:
    """The device asked for; auto: the first there is of cuda, mps, cpu. UserError if absent."""
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
            "cpu": True}
    name = next(key for key, there in have.items() if there) if name == "auto" else name
    if not have[name]:
        raise UserError(f"--device {name}: this machine or this torch has none; use --device cpu")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)

def warn(splits: tuple[JointSet, ...]) -> None:
    """Prints the first ten warnings about a data set."""
    for line in first_ten([line for split in splits for line in split.warnings]):
        print(f"warning: {line}", file=sys.stderr)

def take_folder(out: Path, option: str = "--out", sign: str | None = None) -> None:
    """UserError unless `out` is new, empty, or has a file named `sign` of an earlier such job."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{option} {out}: is a file; give a folder")
    earlier = sign and any(out.glob(sign + "*"))  # also half written
    if out.exists() and any(out.iterdir()) and not earlier:
        raise UserError(f"{option} {out}: not empty, and no earlier result; give a new folder")

def start_files(run: Run, out: Path, resume: bool) -> list[dict]:
    """Makes the folder fit for `run`; returns the rows of its log that belong to saved epochs."""
    log, settings, rows = out / "metrics.jsonl", clean(asdict(run.config)), []
    if resume and (out / "last.pt").exists():
        state, free = load_checkpoint(out / "last.pt"), ("device", "threads", "workers", "cache_mb")
        try:
            if settings | {key: state["config"][key] for key in free} != state["config"]:
                raise ValueError("other settings: the optimizers' and w would stay the old ones")
            run.load_state_dict(state["run"])
            lines = log.read_text().splitlines(keepends=True)  # the last may be cut short
            rows = [json.loads(line) for line in lines if line.endswith("\n")]
            rows = [row for row in rows if row["epoch"] < run.epoch]  # it may be ahead of last.pt
            if len({row["epoch"] for row in rows}) < run.epoch:
                raise ValueError("the log is behind last.pt")
        except (RuntimeError, LookupError, TypeError, AttributeError, ValueError, OSError) as error:
            raise UserError(f"{out / 'last.pt'}: does not fit this config or metrics.jsonl; resume "
                            "it with its own settings") from error
    if run.rank == 0:
        for name in () if rows else ("last.pt", "best.pt", "results.json", "figure.png"):
            (out / name).unlink(missing_ok=True)
        write_atomic(log, "".join(json.dumps(row) + "\n" for row in rows))
        write_atomic(out / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
    return rows

def save_epoch(run: Run, rows: list[dict], train_set: JointSet, out: Path) -> None:
    """Adds an epoch to the log, replaces last.pt, and best.pt if validation was never as good."""
    with (out / "metrics.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    val = rows[-1].get("val", {})
    scores = [val[key] for key in ("mAP50", "balanced_accuracy") if val.get(key) is not None]
    score = float(np.mean(scores)) if scores else run.best  # without one: the last epoch's
    better, run.best = not scores and "val" in rows[-1] or score > run.best, max(score, run.best)
    settings = clean(asdict(run.config))
    state = {"format": "jointgrad/1", "config": settings, "names": train_set.names,
             "classification_names": train_set.classification_names, "run": run.state_dict()}
    for name in ["best.pt"] * better + ["last.pt"]:  # last.pt last: it says where to resume
        write_atomic(out / name, state)

def data_name(config: Config) -> str:
    return "synthetic" if config.data == "synthetic" else Path(config.data).resolve().parent.name

def run_training(config: Config, out: Path, resume: bool) -> None:
    """Trains, saving log and checkpoint each epoch; then results.json, figure and closing table."""
    device, started = pick_device(config.device), time.perf_counter()
    train_set, val_set = load_data(config)
    run = Run(config, train_set, device)
    rows, start_s = start_files(run, out, resume), time.perf_counter() - started
    if run.rank == 0:
        warn((train_set, val_set))
        print(f"jointgrad {config.mode}: torch {torch.__version__}, {device}, {config.threads} "
              f"thread(s), seed {config.seed}, {config.data}: {len(train_set)} train and "
              f"{len(val_set)} val images of {train_set.canvas[1]} x {train_set.canvas[0]} px")
    for new in train(run, train_set, val_set):
        if run.rank == 0:
            rows += clean(new)
            save_epoch(run, rows[-len(new):], train_set, out)
    if run.rank == 0:
        title = f"{config.mode} on {data_name(config)} data, seed {config.seed}"
        draw_run(rows, title, val_set, Predictor(out / "last.pt"), out / "figure.png")
        results = clean(summarise(run, rows, train_set.canvas))
        results["time"] |= {"start_s": start_s, "process_cpu_s": time.process_time()}
        write_json(out / "results.json", results)
        print(f"{report_run(results)}\nwritten to {out}/: {', '.join(sorted(os.listdir(out)))}")

def publish(results: dict[str, Any], report: Any, draw: Any, out: Path) -> dict[str, Any]:
    """Writes results.json, report and figure, prints the report; the results as JSON has them."""
    results = clean({"schema": "jointgrad/1"} | results)
    write_json(out / "results.json", results)
    write_atomic(out / f"{results['mode']}.md", report(results))
    print(report(results))
    draw(results, out / "figure.png")
    return results

def sweep_cells(config: Config, spec: str, modes: tuple[str, ...]) -> dict[str, Config]:
    """Each mode at each value of a swept key, {"mode key=value": config}; without one, by mode."""
    if not spec:
        return {mode: replace(config, mode=mode) for mode in modes}
    key, _, text = spec.partition("=")
    try:
        if not (values := yaml.safe_load(f"[{text}]")):
            raise ValueError
    except YAML_ERRORS as error:
        raise UserError(f"--sweep {spec[:80]}: expected key=v1,v2, as in alpha=0,1.5") from error
    owners = {"gradnorm": ("alpha", "gradnorm_lr", "w_min", "initial_weights"),
              "fixed": ("initial_weights",), "none": ("mode", "seed"),
              "dual": ("dual_lr", "dual_width_multiple", "progressive_share", "progressive_scale")}
    users = [mode for mode, keys in owners.items() if key in keys] or modes
    if not set(users) & set(modes):
        raise UserError(f"--sweep {key}: changes nothing here; it is read by: {', '.join(users)}")
    return {f"{mode} {key}={str(value).replace(' ', '')}": make_config(
        asdict(config) | {key: value, "mode": mode}, "--sweep")
        for value in values for mode in modes}

def last_change(config: Config, splits: tuple[JointSet, ...]) -> float:
    """When code or data last changed, in seconds; folders too, as they tell of deleted files."""
    images = [image for split in splits for image in split.paths]
    files = [file for image in images for file in (image, label_path(image))]
    paths = {Path(__file__), Path(config.data), *files, *(file.parent for file in files)}
    return max(path.stat().st_mtime for path in paths if path.exists())

def run_compare(config: Config, seeds: list[int], out: Path, jobs: int, spec: str = "",
                modes: tuple[str, ...] = MODES) -> dict[str, Any]:
    """Modes (at the values of a key) over the seeds, with statistics and verdicts; the results."""
    labels = sweep_cells(config, spec, modes)
    cells = {(label, seed): replace(of_label, seed=seed)
             for seed in seeds for label, of_label in labels.items()}
    splits = load_data(config)
    warn(splits)  # faults in the data are told once, before the first run
    grid = run_grid(cells, out / "runs", jobs, last_change(config, splits))
    table = quantities(grid, list(labels), seeds)
    known = table if spec else table | smoke_quantities(range(10), ("report",))[0]
    return publish({
        "mode": "sweep" if spec else "compare", "sweep": spec, "seeds": seeds,
        "config": asdict(config), "paired": paired(table),
        "modes": {mode: {key: interval(v) for key, v in q.items()} for mode, q in table.items()},
        "claims": judge(read_yaml(ROOT / "data" / "reported.yaml")["claims"], known),
        "environment": environment(pick_device(config.device))}, report_compare, draw_compare, out)

def check_rows(recorded: dict[str, dict], measured: dict[str, dict]) -> list[list]:
    """Mode, metric, recorded, measured; OUTSIDE where a mean left its recorded interval."""
    rows = []
    for mode, metric in itertools.product(recorded, METRICS):
        if metric in recorded[mode]:
            q, mean = recorded[mode][metric], measured[mode][metric]["mean"]
            low, high = q["ci95"] or [q["mean"]] * 2
            verdict = "ok" if low - 1e-9 <= mean <= high + 1e-9 else "OUTSIDE"
            rows.append([mode, metric, q, mean, verdict])
    return rows

def run_check(path: Path, out: Path, jobs: int) -> int:
    """Repeats a recorded comparison; 1 where the mean of a metric leaves its recorded interval."""
    try:
        recorded = json.loads(path.read_text())
        config, seeds = make_config(recorded["config"], str(path)), recorded["seeds"]
        spec = recorded["sweep"] or ""
        modes = tuple(dict.fromkeys(label.partition(" ")[0] for label in recorded["modes"]))
        if list(sweep_cells(config, spec, modes)) != list(recorded["modes"]):
            raise ValueError("its modes do not fit its sweep")
        check_rows(recorded["modes"], recorded["modes"])  # is it whole?
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: expected the results.json of a comparison ({error})") from error
    measured = run_compare(config, seeds, out, jobs, spec, modes)["modes"]
    rows = check_rows(recorded["modes"], measured)
    print(markdown(["mode", "metric", "recorded", "measured", "verdict"], rows))
    return int(any(row[-1] == "OUTSIDE" for row in rows))

def run_reproduce(out: Path) -> int:
    """The report's smoke test over ten seeds; 1 unless every number of the report is met."""
    reported = read_yaml(ROOT / "data" / "reported.yaml")
    table, runs = smoke_quantities(range(10))
    rules = {rule: {key: interval(v) for key, v in q.items()} for rule, q in table.items()}
    checks = check_smoke(reported["smoke_test"], table["smoke_report"])
    publish({"mode": "reproduce", "checks": checks, "rules": rules,
             "gradient_ratio": rules["smoke_report"]["gradient_ratio"],
             "claims": judge(reported["claims"], table)},
            report_smoke, partial(draw_smoke, runs), out)
    return int(any(check["ok"] is False for check in checks))

def predict_items(args: argparse.Namespace, predictor: Predictor) -> tuple[list, dict | None]:
    """(name, function that reads it) of each image to predict; the metrics of a labelled split."""
    if args.source:
        source = Path(args.source)
        files = [source] if source.is_file() else sorted(
            p for p in source.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not files:
            raise UserError(f"--source {source}: no image here; expected {' '.join(SUFFIXES)}")
        return [(str(file), partial(read_image, file)) for file in files], None
    _, data = load_data(predictor.config)
    learnt = predictor.names, predictor.classification_names
    if (data.names, data.classification_names) != learnt:
        raise UserError(f"--data {predictor.config.data}: not the classes {args.checkpoint} learnt")
    metrics = evaluate(predictor.network, data, predictor.config, IOU_THRESHOLDS)
    if data.paths:
        return [(str(file), partial(read_image, file)) for file in data.paths], metrics
    return [(f"val-{i}", partial(Image.fromarray, p)) for i, p in enumerate(data.pixels)], metrics

def run_predict(args: argparse.Namespace, out: Path) -> None:
    """Annotated pictures and predictions.json, of an image, a folder, or a set's val split."""
    if not args.checkpoint:
        raise UserError("--mode predict: needs --checkpoint runs/<name>/best.pt")
    predictor = Predictor(args.checkpoint, str(pick_device(args.device or "auto")))
    predictor.config = override(predictor.config, args.set, data=args.data)
    items, metrics = predict_items(args, predictor)
    results = {"schema": "jointgrad/1", "mode": "predict", "metrics": metrics, "images": []}
    out.mkdir(parents=True, exist_ok=True)
    for old in out.glob("[0-9]*.png"):
        old.unlink()
    for k, (name, read) in enumerate(tqdm(items, unit="image", disable=None, leave=False)):
        try:
            image = read()
        except UserError as error:
            if len(items) == 1:
                raise
            print(f"warning: {error}; skipped", file=sys.stderr)
            continue
        found = predictor(image, predictor.config.predict_conf)
        picture = f"{k:05d}.png"  # never a name from a file
        annotate(image, found, predictor.names).save(out / picture)
        results["images"].append({"image": name, "picture": picture} | found)
    write_json(out / "predictions.json", results)
    if metrics:
        print(markdown(["metric", "value"], [[m, metrics[m]] for m in METRICS]))
    print(f"{len(results['images'])} picture(s) and predictions.json written to {out}/")

def export(config: Config, folder: Path) -> None:
    """The synthetic set as files in the joint format, for any other trainer."""
    take_folder(folder, "--export")
    splits = load_data(replace(config, data="synthetic"))
    for split, data in zip(("train", "val"), splits):
        for i, (pixels, boxes, label) in enumerate(zip(data.pixels, data.boxes, data.labels)):
            image = folder / "images" / split / f"{i:05d}.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(image)
            rows = ["%d %.6f %.6f %.6f %.6f" % tuple(row) for row in boxes.tolist()]
            rows += ["", " ".join(str(int(k == label)) for k in range(len(VIEWS))), ""]
            write_atomic(label_path(image), "\n".join(rows))
    spec = {"path": ".", "train": "images/train", "val": "images/val", "nc": len(JETS),
            "names": list(JETS), "classification_names": list(VIEWS)}
    write_atomic(folder / "data.yaml", yaml.safe_dump(spec, sort_keys=False))
    print(f"{config.train_images} train and {config.val_images} val images written to {folder}/")

def report_data(config: Config) -> None:
    """Counts of a data set by split and class, its canvas and anchors; faults end it before."""
    splits = load_data(replace(config, cache_mb=0))
    files = tqdm([file for split in splits for file in split.paths], unit="image", disable=None)
    raise_all(collect(lambda file: read_image(file).size, files)[1])  # one at a time in memory
    warn(splits)
    train = splits[0]
    labels = {name: k for k, name in enumerate(train.classification_names)} | {"none": NO_LABEL}
    kinds = [np.concatenate(split.boxes)[:, 0].tolist() for split in splits]  # a class each box
    rows = [["images", *map(len, splits)]]
    rows += [[f"box {name}", *(b.count(k) for b in kinds)] for k, name in enumerate(train.names)]
    rows += [[f"class {name}", *(s.labels.count(k) for s in splits)] for name, k in labels.items()]
    print(markdown(["", "train", "val"], rows) + f"canvas {train.canvas[1]} x {train.canvas[0]} px")
    if kinds[0]:
        print("anchors, px:", np.round(fit_anchors(train.box_sizes())).astype(int).tolist())

def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line's options; argparse itself answers --help and misspelt options."""
    parser = argparse.ArgumentParser("jointgrad.py", description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--mode", choices=MODES + JOBS, help="what to do (default: the config's mode)")
    add("--data", help="synthetic, or the data.yaml of a joint YOLO set")
    add("--config", type=Path, default=ROOT / "config.yaml", help="settings laid over config.yaml")
    add("--seed", type=int, help="seed of one run")
    add("--seeds", type=int, nargs="+", help="of compare and --sweep (default: 0 to 5)")
    add("--device", choices=("auto", "cpu", "cuda", "mps"), help="where to compute")
    add("--out", type=Path, help="folder of the results (default: runs/<mode>-<data>-s<seed>)")
    add("--resume", type=Path, metavar="DIR", help="go on with an interrupted run")
    add("--set", nargs="+", default=[], action="extend", metavar="KEY=VALUE",
        help="override keys of the config")
    add("--sweep", default="", metavar="KEY=V1,V2",
        help="run --mode (compare: all modes) at each value of a key")
    add("--export", type=Path, metavar="DIR", help="write the synthetic set in the joint format")
    add("--check", type=Path, metavar="FILE", help="repeat a recorded comparison; 1 if it moved")
    add("--jobs", type=int, default=os.cpu_count(), help="runs side by side (default: one a core)")
    add("--checkpoint", type=Path, help="predict: a run's best.pt or last.pt")
    add("--source", help="predict: an image or a folder, in place of the data's val split")
    return parser.parse_args(argv)

def output_folder(args: argparse.Namespace, config: Config, job: str) -> Path:
    """--out, or a name below runs/; UserError if something else lies there."""
    parts = [job, data_name(config)] + [f"s{config.seed}"] * (job in MODES)
    if args.check or args.checkpoint:  # named after what is repeated, or looked with
        name = (args.check or args.checkpoint).resolve().parent.name
        parts = ["check" if args.check else job, name]
    elif args.sweep:
        parts = [job, args.sweep.partition("=")[0], data_name(config)]
    out = args.out or Path("runs") / "-".join(parts)
    signs = {"compare": "runs", "sweep": "runs", "predict": "predictions.json",
             "reproduce": "reproduce.md", "bench": "bench.md"}
    if job != "check" and not args.export:
        take_folder(out, sign=signs.get(job, "metrics.jsonl"))
    if args.check and (out / "results.json").exists():
        raise UserError(f"--out {out}: a finished comparison, which would be read, not repeated; "
                        "give a new folder")
    return out

def prepare(args: argparse.Namespace) -> tuple[Config, Path]:
    """Config and output folder from the arguments; sets threads and determinism."""
    if args.resume and args.out:
        raise UserError("--out: not read here; --resume writes into the folder that it resumes")
    if args.resume and not (args.resume / "config.yaml").is_file():
        raise UserError(f"--resume {args.resume}: no config.yaml; expected a run's folder")
    config = load_config(args.resume / "config.yaml" if args.resume else args.config, args.set,
                         mode=args.mode if args.mode in MODES else None, data=args.data,
                         seed=args.seed, device=args.device)
    torch.set_num_threads(config.threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads such memory
    job = "sweep" if args.sweep else "compare" if args.check else args.mode or config.mode
    for flag, jobs in (("seeds", ("compare", "sweep")), ("checkpoint", ("predict",)),
                       ("source", ("predict",)), ("resume", MODES)):
        if getattr(args, flag) is not None and (job not in jobs or args.check):
            raise UserError(f"--{flag}: not read here; it goes with --mode {' or '.join(jobs)}")
    seeds = args.seeds = args.seeds or [*range(6)]
    if len(seeds) > 12 or len(set(seeds)) < len(seeds) or min(seeds) < 0 or args.jobs < 1:
        raise UserError("--seeds, --jobs: expected at most 12 different seeds from 0 up, 1 job")
    return config, args.resume or output_folder(args, config, job)

def dispatch(args: argparse.Namespace) -> int | None:
    """Does what the arguments ask for; the exit code, None for 0."""
    config, out = prepare(args)
    if args.export:
        export(config, args.export)
    elif args.check:
        return run_check(args.check, out, args.jobs)
    elif args.sweep or args.mode == "compare":
        modes = MODES if args.mode == "compare" else (config.mode,)
        run_compare(config, args.seeds, out, args.jobs, args.sweep, modes)
    elif args.mode == "reproduce":
        return run_reproduce(out)
    elif args.mode == "bench":
        publish(bench(config, pick_device(config.device)), report_bench, draw_bench, out)
    elif args.mode == "predict":
        run_predict(args, out)
    elif args.mode == "check":
        report_data(config)
    else:
        run_training(config, out, bool(args.resume))

def main(argv: list[str] | None = None) -> int:
    """Runs the command line: 0 done, 1 failed, 2 a mistake in the input, 130 interrupted."""
    args = parse_args(argv)
    gc.freeze()  # torch's half a million objects: else each sweep for garbage visits them
    gc.set_threshold(100_000)  # and an evaluation's short-lived boxes cause fewer sweeps
    with contextlib.suppress(AttributeError, OSError):  # glibc alone has it
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD: the next step reuses memory
            ctypes.CDLL(None).mallopt(option, 2**30)
    try:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            torch.distributed.init_process_group()  # gloo for tensors on the CPU, NCCL on CUDA
        return dispatch(args) or 0
    except UserError as error:
        text = str(error).rpartition("UserError: ")[2]  # a worker of the data wraps it in its own
        print("\n".join(f"error: {line}" for line in text.splitlines()), file=sys.stderr)
        return 2
    except (NonFinite, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; whole epochs are saved: a training run goes on with --resume and "
              "its folder, a comparison with the same command", file=sys.stderr)
        return 130
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

if __name__ == "__main__":
    sys.exit(main())
