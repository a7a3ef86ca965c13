"""jointgrad: does a classifier's gradient hurt the detector that shares its trunk?

And which remedy works at what cost: GradNorm, two networks, or one of the other `MODES`?

    python jointgrad.py --mode gradnorm     # one run, on built-in data, a minute on one CPU core
    python data/study.py compare            # many runs: every mode over seeds, with a verdict each

GradNorm (Chen et al., ICML 2018) as `GradNorm.update` computes it, in the paper's letters:

    n_i = ||grad_W L_i||             G_i = w_i n_i = ||grad_W w_i L_i||      G_bar = mean(G)
    L_tilde_i = L_i / L_i(0)         r_i = L_tilde_i / mean(L_tilde)      target_i = G_bar r_i^alpha
    L_grad = sum |G_i - target_i|    dL_grad/dw_i = sign(G_i - target_i) n_i    w <- Adam(dL_grad)
    w <- w T / sum(w), with a floor: w <- w_min + a (T - T w_min) / sum(a), a = max(w - w_min, 0)

    code       paper    meaning
    T          T        number of tasks
    w          w_i      task weights (T,)
    L, L0      L_i      losses (T,), their first values
    L_tilde    L~_i     L / L0: the inverse training rate (small = trained fast)
    r          r_i      relative inverse training rate
    n, G       -, G_W   gradient norms at W of L_i and of w_i L_i
    W          W        kernel of the last convolution of the shared trunk
    alpha      alpha    strength of the pull towards equal training rates
    P3, P4, P5          feature maps of stride 8, 16, 32 px

Departures, marked where a line of the code makes them:
- GradNorm: the weights keep a floor w_min (as published they go negative on the paper's own toy).
- GradNorm: where an L_i or n_i is 0 (no image of the batch has a class), w is only rescaled.
- YOLOv5: BatchNorm momentum 0.1, AdamW, a cosine schedule, class gain 1.0 (config.yaml), anchors by
  k-means alone, no mosaic, colour jitter, nominal batch of 64 or weight average: for short runs.
- YOLOv5: of several objectness targets for one cell the largest counts, whatever their order.
- COCO: average precision counts max_det (300) detections an image, not 100 of a class.

Sources: arXiv 1711.02257 (GradNorm), 1911.08287 (CIoU: Zheng et al.), 1709.01507 (SE: Hu et al.),
1807.06521 (CBAM: Woo et al.); Jocher et al., YOLOv5 v6 (design only).
"""
from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import itertools
import math
import os
import platform
import re
import signal
import sys
import time
import warnings
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Callable, Iterator, Literal, NamedTuple, get_type_hints

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads: no traceback

# Idle OpenMP threads that spin make a step up to 20 times slower on a shared machine. Read once,
# when torch loads; the third is what torch asks for to be deterministic on CUDA.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import msgspec  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import yaml  # noqa: E402
from matplotlib.colors import hsv_to_rgb  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

# --------------------------------------------------------------------------------------------------
# 1. Config: keys and values -> one frozen, checked Config
# --------------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent
MODES = ("detect", "classify",  # single-task references
         "fixed", "equal", "detach", "gradnorm",  # a shared trunk; equal, detach: weights (1, 1)
         "dual")  # two networks

class UserError(ValueError):
    """A mistake in the user's input: what was found, where, what was expected, how to mend it."""

def within(kind: type, low: float, high: float, **more: Any) -> Any:
    return Annotated[kind, msgspec.Meta(ge=low, le=high, **more)]

Real, Whole = partial(within, float), partial(within, int)
Size = tuple[Real(0.1, 1e6), Real(0.1, 1e6)]  # width, height in px

@dataclass(frozen=True)
class Config:
    """Every setting with its type and range; values and meaning stand in config.yaml alone."""
    mode: Literal[MODES]
    data: str
    init: str
    seed: Whole(0, 2**31)
    device: Annotated[str, msgspec.Meta(pattern=r"^(auto|cpu|mps|cuda|(cuda:)?\d+)$")]
    threads: Whole(1, 256)
    amp: Literal["none", "bf16"]
    initial_weights: tuple[Real(1e-6, 1e6), Real(1e-6, 1e6)]
    alpha: Real(-10, 10)
    gradnorm_lr: Real(1e-6, 1)
    w_min: Real(0, 0.5)
    imgsz: Whole(32, 4096, multiple_of=32)
    cache_mb: Real(0, 1e6)
    flip_x: Real(0, 1)
    flip_y: Real(0, 1)
    scale: Real(0, 0.9)
    shift: Real(0, 0.5)
    anchors: Literal["auto"] | tuple[(tuple[Size, Size, Size],) * 3]
    anchor_thres: Real(1, 100)
    conf_thres: Real(0, 1)
    iou_thres: Real(0, 1)
    max_det: Whole(1, 30_000)
    width_multiple: Real(0.03125, 4)
    depth_multiple: Real(0.1, 4)
    dual_width_multiple: Real(0.03125, 4)
    batchnorm_momentum: Real(0.001, 1)
    dropout: Real(0, 0.9)
    box_gain: Real(0, 100)
    obj_gain: Real(0, 100)
    cls_gain: Real(0, 100)
    det_loss_times_batch: bool
    class_balance: bool
    epochs: Whole(0, 10**6)
    batch_size: Whole(2, 4096)
    optimizer: Literal["adamw", "sgd"]
    lr: Real(1e-8, 1)
    dual_lr: Real(1e-8, 1)
    betas: tuple[Real(0, 0.9999), Real(0, 0.9999)]
    momentum: Real(0, 0.9999)
    weight_decay: Real(0, 1)
    warmup: Real(0, 1)
    grad_clip: Real(1e-3, 1e6)
    progressive_share: Real(0, 1)
    progressive_scale: Real(0.1, 1)
    eval_interval: Whole(1, 10**6)
    dominance: Real(0, 1)
    train_images: Whole(2, 10**6)
    val_images: Whole(2, 10**6)
    predict_conf: Real(0, 1)

    @property
    def tasks(self) -> tuple[str, ...]:
        return {"detect": ("det",), "classify": ("cls",)}.get(self.mode, ("det", "cls"))

    @property
    def weights(self) -> tuple[float, ...]:
        """The loss weights at step 0, one for each of `tasks`."""
        given = self.mode in ("fixed", "gradnorm")
        return self.initial_weights if given else (1.0,) * len(self.tasks)

# --------------------------------------------------------------------------------------------------
# 2. Balancer: (losses, their L0, gradient norms at W) -> task weights
# --------------------------------------------------------------------------------------------------

class GradNorm:
    """Task weights w (T,) by Chen et al., ICML 2018; knows no network.

    Each step: train on sum(w_i L_i) with the present `w`, then call `update(L, n)` for the next.
    `w` starts as given; each update makes it sum to T. `L0`: the losses that progress is measured
    against, by default the first positive ones.
    """
    def __init__(self, initial_weights: Any, alpha: float = 1.5, lr: float = 0.025,
                 w_min: float = 0.0, L0: Any = None, device: torch.device | str = "cpu",
                 dtype: torch.dtype = torch.float32):
        self.w = torch.tensor(initial_weights, dtype=dtype, device=device)
        self.L0 = torch.zeros_like(self.w) if L0 is None else torch.as_tensor(L0).to(self.w)
        self.r, self.alpha, self.w_min = torch.ones_like(self.w), alpha, w_min
        self.adam = torch.optim.Adam([self.w], lr=lr, fused=True)

    @torch.no_grad()
    def update(self, L: Tensor, n: Tensor) -> Tensor:
        """The next w (T,), from losses L (T,) and the norms n (T,) at W of their own gradients."""
        T = len(self.w)
        self.L0 = torch.where(self.L0 > 0, self.L0, L)
        G = self.w * n  # (T,), of the step just made; G to r: GradNorm, section 3.1
        G_bar = G.mean()
        L_tilde = L / self.L0.clamp(min=1e-12)  # (T,)
        r = L_tilde / L_tilde.mean().clamp(min=1e-12)  # (T,), of mean 1
        target = G_bar * r**self.alpha  # (T,), eq. 1; a constant, not differentiated through
        dL_grad_dw = torch.sign(G - target) * n  # of L_grad = sum |G - target|, eq. 2
        # Departs from the paper (every batch has labels): because at L or n = 0 w has no target.
        labelled, before = (L * n > 0).all(), self.w.clone()
        self.w.grad = torch.where(labelled, dL_grad_dw, 0.0)
        self.adam.step()  # w, in place
        # Departs from the paper (w <- w T / sum(w)): because Adam can take w below 0.
        above = (torch.where(labelled, self.w, before) - self.w_min).clamp(min=1e-12)
        w = self.w_min + above * (T - T * self.w_min) / above.sum()
        self.w.copy_(w)
        self.r = r
        return w  # of its own memory: the next update must not change a logged w

    def state_dict(self) -> dict:
        return {"w": self.w.clone(), "L0": self.L0.clone(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.w.copy_(state["w"])
        self.L0.copy_(state["L0"])
        self.adam.load_state_dict(state["adam"])

# --------------------------------------------------------------------------------------------------
# 3. Batches: one split in memory, seed -> shuffled, augmented batches
# --------------------------------------------------------------------------------------------------

NO_LABEL = -100  # an image without a class; cross_entropy's ignore_index
GREY = 114  # of 255: around an image, as in YOLOv5

class Batch(NamedTuple):
    """images (B, 3, H, W), targets (N, 6) image index, class, cx cy w h in [0, 1], labels (B,)."""
    images: Tensor
    targets: Tensor
    labels: Tensor

@dataclass
class JointSet:
    """One split, decoded once: pixels, boxes and classes of all images."""
    pixels: np.ndarray  # (N, H, W, 3) uint8, in memory or mapped from a file
    boxes: list[np.ndarray]  # of each image (n, 5): class, cx cy w h in fractions of the canvas
    labels: list[int]  # NO_LABEL where an image has none
    names: list[str]
    classification_names: list[str]
    paths: list[Path] = field(default_factory=list)  # where the images came from files
    notes: list[str] = field(default_factory=list)  # what was odd about them, yet no error
    fingerprint: str = "synthetic"  # alike for alike files

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def canvas(self) -> tuple[int, int]:
        return self.pixels.shape[1:3]  # H, W in px

    def batch(self, indices: Any, device: torch.device | str = "cpu") -> Batch:
        """The images of these indices as float32 in [0, 1], in channels_last order."""
        indices = np.asarray(indices)
        rows = [np.insert(self.boxes[i], 0, b, axis=1) for b, i in enumerate(indices)]  # (n, 6)
        targets = torch.from_numpy(np.concatenate(rows).astype(np.float32)).to(device)
        labels = torch.tensor([self.labels[i] for i in indices], device=device)
        pixels = torch.from_numpy(self.pixels[indices]).to(device)  # uint8: a quarter to move
        return Batch(pixels.permute(0, 3, 1, 2).float().div_(255), targets, labels)

    def truth(self, i: int) -> np.ndarray:
        """The boxes of image i (n, 5): class, x1 y1 x2 y2 in px of the canvas."""
        centre, half = self.boxes[i][:, 1:3], self.boxes[i][:, 3:] / 2  # (n, 2) fractions
        px = self.canvas[::-1]  # W, H
        return np.column_stack([self.boxes[i][:, 0], (centre - half) * px, (centre + half) * px])

def stream(purpose: Literal["order", "augment", "dropout"], *where: int) -> torch.Generator:
    """A random stream for each purpose and (seed, epoch, rank): a resumed run needs no state."""
    key = ("order", "augment", "dropout").index(purpose), *where
    (seed,) = np.random.SeedSequence(key).generate_state(1, np.uint64).tolist()
    return torch.Generator().manual_seed(seed)

def epoch_order(count: int, config: Config, epoch: int, world=1, rank=0) -> list[Tensor]:
    """The batches of an epoch as image indices, shuffled, one rank's share."""
    order = torch.randperm(count, generator=stream("order", config.seed, epoch, 0))  # of all ranks
    order = order.repeat(world)[rank::world][:math.ceil(count / world)]  # equal shares
    # One image is poor for BatchNorm and, where P5 is one cell, an error: a last one is left out.
    return [indices for indices in order.split(config.batch_size) if len(indices) > 1]

def augment(batch: Batch, config: Config, rng: torch.Generator) -> Batch:
    """Random flips, zoom and shift; boxes less than a fifth in view (YOLOv5: a tenth) go."""
    images, targets, labels = batch
    targets = targets.clone()  # flips write in place
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
    images = F.grid_sample(images - GREY / 255, grid, align_corners=False) + GREY / 255  # outside
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

def decode(logits: Tensor, cell: Tensor, anchor: Tensor, stride: Tensor) -> Tensor:
    """cx cy w h (..., 4) px: xy = (2 sigmoid - 0.5 + cell) stride, wh = (2 sigmoid)^2 anchor."""
    p = 2 * logits[..., :4].sigmoid()  # 0 to 2: xy reach half a cell beyond, wh 4 anchors
    return torch.cat([(p[..., :2] - 0.5 + cell) * stride, p[..., 2:].square() * anchor], -1)

def suppress(boxes_xyxy: np.ndarray, iou_thres: float, max_det: int) -> list[int]:
    """Indices (<= max_det) of boxes (n, 4), best first, that no kept one overlaps > iou_thres."""
    kept: list[int] = []
    for start in range(0, len(boxes_xyxy), 256):  # in blocks: thousands make no n x n matrix
        block = boxes_xyxy[start:start + 256]  # (m, 4)
        free = (box_iou(block, boxes_xyxy[kept]) <= iou_thres).all(1)  # (m,)
        apart = box_iou(block, block) <= iou_thres  # (m, m)
        for i in range(len(block)):
            if free[i]:
                free[i + 1:] &= apart[i, i + 1:]
        kept += (start + free.nonzero()[0]).tolist()
        if len(kept) >= max_det:
            break
    return kept[:max_det]

def find_boxes(raw: list[Tensor], anchors: Tensor, config: Config) -> list[np.ndarray]:
    """Detections of each image: (n, 6) x1 y1 x2 y2 px, score, class; best first, max_det."""
    logits, found = flatten_levels(raw), []
    boxes = cxcywh_to_xyxy(decode(logits, *prediction_grid(raw, anchors)))  # (B, A, 4) px
    num_classes = logits.shape[2] - 5
    scores = (logits[..., 4:5].sigmoid() * logits[..., 5:].sigmoid()).flatten(1)  # (B, A C)
    for boxes_i, scores_i in zip(boxes, scores):
        at = (scores_i > config.conf_thres).nonzero()[:, 0]
        best, order = scores_i[at].topk(min(30_000, len(at)))  # as many candidates as YOLOv5
        row, classes = at[order] // num_classes, at[order] % num_classes  # of (A, C)
        rows = torch.column_stack([boxes_i[row], best, classes]).cpu().numpy()
        apart = rows[:, :4] + 1e6 * rows[:, 5:].astype(float)  # px: classes never overlap
        found.append(rows[suppress(apart, config.iou_thres, config.max_det)])
    return found

# --------------------------------------------------------------------------------------------------
# 5. Model: images -> P3, raw detection maps, class logits
# --------------------------------------------------------------------------------------------------

class Conv1x1(nn.Conv2d):
    """A 1x1 convolution of stride 1 as one matrix product: a step then takes 0.86 of the time."""
    def forward(self, x: Tensor) -> Tensor:
        places = x.permute(0, 2, 3, 1)  # (B, h, w, c_in): a view of channels_last order
        return F.linear(places, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)

class Conv(nn.Sequential):
    """Convolution, BatchNorm, SiLU."""
    def __init__(self, c_in: int, c_out: int, kernel: int = 1, stride: int = 1):
        kind = Conv1x1 if kernel == 1 else nn.Conv2d
        super().__init__(kind(c_in, c_out, kernel, stride, (kernel - 1) // 2, bias=False),
                         nn.BatchNorm2d(c_out, eps=1e-3), nn.SiLU())  # in place would cost a copy

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
        return self.cv3(torch.cat([self.m(self.cv1(x)), self.cv2(x)], 1))

class SPPF(nn.Module):
    """Spatial pyramid pooling: the map beside its 5, 9, 13 cell maxima, by three pools in a row."""
    def __init__(self, c: int):
        super().__init__()
        self.cv1, self.cv2, self.pool = Conv(c, c // 2), Conv(2 * c, c), nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        maps = [self.cv1(x)]
        for _ in range(3):
            maps.append(self.pool(maps[-1]))  # 5 cells, then 5 + 4, then 5 + 4 + 4
        return self.cv2(torch.cat(maps, 1))

def channels(c: int, width_multiple: float) -> int:
    return math.ceil(c * width_multiple / 8) * 8  # multiples of 8, as in YOLOv5

def repeats(n: int, depth_multiple: float) -> int:
    return max(1, round(n * depth_multiple))

class Trunk(nn.Sequential):
    """Stem to P3: images (B, 3, H, W) -> (B, c_out, H/8, W/8); what a network's tasks share."""
    def __init__(self, width_multiple: float, depth_multiple: float):
        c1, c2, c3 = (channels(c, width_multiple) for c in (64, 128, 256))
        super().__init__(Conv(3, c1, 6, 2), Conv(c1, c2, 3, 2),  # H/2, then H/4
                         C3(c2, c2, repeats(3, depth_multiple)), Conv(c2, c3, 3, 2),  # H/8
                         C3(c3, c3, repeats(6, depth_multiple)))
        self.c_out = c3

    @property
    def W(self) -> nn.Parameter:
        """The kernel of the last convolution, where GradNorm takes its norms."""
        return self[-1].cv3[0].weight  # (c_out, c_out, 1, 1)

class SqueezeExcite(nn.Module):
    """Scales each channel by all channels' pooled values (1709.01507; reduction 4, there 16)."""
    def __init__(self, c: int, pools: tuple = (torch.mean,)):
        super().__init__()
        squeezed, self.pools = max(4, c // 4), pools
        self.mlp = nn.Sequential(nn.Conv2d(c, squeezed, 1), nn.ReLU(), nn.Conv2d(squeezed, c, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * sum(self.mlp(pool(x, (2, 3), keepdim=True)) for pool in self.pools).sigmoid()

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

def add_attention(trunk: Trunk) -> Trunk:
    """Puts SE after the first C3, CBAM after the second, for dual's classification network."""
    trunk.insert(3, SqueezeExcite(trunk[2].cv3[0].out_channels))
    return trunk.append(CBAM(trunk.c_out))  # no W: this trunk is not shared

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
        lateral4 = self.lateral4(self.up4(torch.cat([up5, P4], 1)))  # (B, c3, H/16, W/16)
        up4 = F.interpolate(lateral4, scale_factor=2.0)
        out3 = self.up3(torch.cat([up4, P3], 1))  # (B, c3, H/8, W/8)
        out4 = self.out4(torch.cat([self.down3(out3), lateral4], 1))  # (B, c4, H/16, W/16)
        out5 = self.out5(torch.cat([self.down4(out4), lateral5], 1))  # (B, c5, H/32, W/32)
        return [conv(x) for conv, x in zip(self.detect, (out3, out4, out5))]

class ClassificationHead(nn.Module):
    """P3 -> class logits (B, C): 1x1 convolution, global average pool, dropout, linear."""
    def __init__(self, c_in: int, num_labels: int, dropout: float):
        super().__init__()
        self.conv, self.dropout = Conv(c_in, 2 * c_in), nn.Dropout(dropout)
        self.linear = nn.Linear(2 * c_in, num_labels)

    def forward(self, P3: Tensor) -> Tensor:
        return self.linear(self.dropout(self.conv(P3).mean((2, 3))))

class JointNet(nn.Module):
    """A trunk and the heads of one task or more, cut at P3."""
    def __init__(self, trunk: Trunk, heads: dict[str, nn.Module], detach: bool = False):
        super().__init__()
        self.trunk, self.heads, self.detach = trunk, nn.ModuleDict(heads), detach

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor], dict[str, Any]]:
        """P3, the leaf that each head reads in its place, and each task's raw output."""
        P3 = self.trunk(images)
        cuts = [P3.detach().requires_grad_(P3.requires_grad) for _ in self.heads]  # no_grad: False
        return P3, cuts, {task: head(cut) for (task, head), cut in zip(self.heads.items(), cuts)}

class Network(nn.Module):
    """One JointNet, or for `dual` one a task: images (B, 3, H, W) -> {task: raw output}."""
    def __init__(self, config: Config, num_classes: int, num_labels: int, anchors: np.ndarray):
        super().__init__()
        width, depth, dual = config.width_multiple, config.depth_multiple, config.mode == "dual"
        trunk, heads = Trunk(width, depth), {}
        cls_trunk = add_attention(Trunk(config.dual_width_multiple, depth)) if dual else trunk
        if "det" in config.tasks:
            heads["det"] = DetectionHead(num_classes, anchors, width, depth)
        if "cls" in config.tasks:
            heads["cls"] = ClassificationHead(cls_trunk.c_out, num_labels, config.dropout)
        self.parts = nn.ModuleList(
            [JointNet(trunk, {"det": heads["det"]}), JointNet(cls_trunk, {"cls": heads["cls"]})]
            if dual else [JointNet(trunk, heads, config.mode == "detach")])
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                # Departs from YOLOv5 (0.03): because its statistics lag behind in a short run.
                module.momentum = config.batchnorm_momentum

    def forward(self, images: Tensor) -> dict[str, Any]:  # to evaluate; gradients end at the cut
        return {task: out for part in self.parts for task, out in part(images)[2].items()}

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

    On every level (L = 3 here, not losses); shapes: (h, w) of each; anchors: (3, 3, 2) px.
    """
    device = targets.device
    sizes = torch.tensor([(w, h) for h, w in shapes], device=device)  # (L, 2)
    centre = targets[None, :, 2:4] * sizes[:, None]  # (L, N, 2) in cells
    wh = targets[:, 4:6] * sizes[0] * STRIDES[0]  # (N, 2) px
    ratio = wh / anchors[:, :, None]  # (L, 3, N, 2)
    alike = torch.maximum(ratio, 1 / ratio).amax(-1) < anchor_thres  # (L, 3, N)
    from_far = sizes[:, None] - centre  # (L, N, 2), counted from the far side
    near_low = ((centre % 1 < 0.5) & (centre > 1)).permute(2, 0, 1)  # (2, L, N): left, upper
    near_high = ((from_far % 1 < 0.5) & (from_far > 1)).permute(2, 0, 1)  # right, lower
    near = torch.cat([torch.ones_like(near_low[:1]), near_low, near_high])  # (5, L, N)
    offsets = torch.tensor([[0, 0], [0.5, 0], [0, 0.5], [-0.5, 0], [0, -0.5]], device=device)
    o, level, anchor, target = (near[:, :, None] & alike).nonzero(as_tuple=True)  # of (5, L, 3, N)
    cell = torch.minimum((centre[level, target] - offsets[o]).long(), sizes[level] - 1)  # border
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
        predictions, targets = flatten_levels(raw).float(), batch.targets  # (B, A, 5 + C)
        shapes = [tuple(x.shape[2:]) for x in raw]
        match = match_targets(targets, shapes, self.anchors, self.config.anchor_thres)
        image = targets[match.target, 0].long()
        p = predictions[image, match.index]  # (K, 5 + C)
        predicted = decode(p, match.cell, self.anchors[match.level, match.anchor],
                           8 * 2**match.level[:, None])  # (K, 4) px; stride (K, 1)
        size = targets.new_tensor([shapes[0][1], shapes[0][0]] * 2) * STRIDES[0]  # W H W H px
        iou = ciou(predicted, targets[match.target, 2:] * size)
        counts = iou.new_zeros(3).index_add(0, match.level, torch.ones_like(iou))
        share = 1 / counts[match.level]  # 1 / matches of its level: a mean a level, summed
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

def classification_loss(logits: Tensor, batch: Batch, class_weights: Tensor) -> Tensor:
    """Cross-entropy, weighted mean over the images that have a class; 0 where none has."""
    total = F.cross_entropy(logits.float(), batch.labels, class_weights, ignore_index=NO_LABEL,
                            reduction="sum")  # a mean over none is NaN
    known = batch.labels != NO_LABEL  # -100 is no index: hence the clamp, then the mask
    return total / (class_weights[batch.labels.clamp(min=0)] * known).sum().clamp(min=1e-9)

def make_losses(network: Network, train_set: JointSet, config: Config) -> dict[str, Any]:
    """The loss of each task; class_balance weighs class k by N / (C n_k): a mean of 1 per image."""
    losses = {}
    if "det" in config.tasks:
        anchors = network.parts[0].heads["det"].anchors
        losses["det"] = DetectionLoss(anchors, len(train_set.names), config)
    if "cls" in config.tasks:
        labels = [k for k in train_set.labels if k != NO_LABEL]
        counts = np.bincount(labels, minlength=len(train_set.classification_names)).clip(1)
        balanced = len(labels) / (len(counts) * counts)  # (C,)
        weights = balanced if config.class_balance else np.ones(len(counts))
        losses["cls"] = partial(classification_loss, class_weights=torch.tensor(
            weights, dtype=torch.float32, device=next(network.parameters()).device))
    return losses

# --------------------------------------------------------------------------------------------------
# 7. Step: one batch -> gradients of sum(w_i L_i), and each task's own at W and P3
# --------------------------------------------------------------------------------------------------

class Signals(NamedTuple):
    """What a backward pass tells; n and gram are None unless two tasks train the trunk."""
    L: Tensor  # losses (T,)
    n: Tensor | None = None  # norms (T,) at W of the unweighted losses' gradients
    gram: Tensor | None = None  # inner products (T, T) of w_i L_i's gradients at P3, this rank's

def mean_over_ranks(x: Tensor) -> Tensor:
    """x, averaged over the processes of a distributed run; unchanged in a run of one process."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(x)
        x /= torch.distributed.get_world_size()
    return x

def similarities(gram: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine, magnitude similarity 2ab / (a^2 + b^2): pair means (...,) of products (..., T, T)."""
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
    gradient g_i is read; the sum (`detach`: g_det alone) goes on through the trunk. The gradient
    at W takes g_i through the last layer alone.
    """
    with autocast:  # of the forward pass alone: the products below need their digits
        P3, cuts, outputs = part(batch.images)  # P3, each cut: (B, c_out, H/8, W/8)
        L = torch.stack([losses[task](output, batch) for task, output in outputs.items()])
    (w * L).sum().backward()  # heads and w: in the order of the tasks
    L, g = mean_over_ranks(L.detach()), [cut.grad for cut in cuts]
    part = getattr(part, "module", part)  # .module: inside DistributedDataParallel
    if len(g) == 1 or part.detach:
        P3.backward(g[0])  # of one task, or of detection alone: the first head
        return Signals(L)
    W = part.trunk.W
    grad_W = [torch.autograd.grad(P3, W, g_i, retain_graph=True)[0].reshape(-1) for g_i in g]
    P3.backward(sum(g[1:], g[0]))  # the trunk's backward is linear: one pass does for all tasks
    grad_W = mean_over_ranks(torch.stack(grad_W))  # before the norm: w is the same on all ranks
    # Flat in channels_last order, where that needs no copy.
    grad_P3 = torch.stack([g_i.permute(0, 2, 3, 1).reshape(-1) for g_i in g]).to(L)  # (T, B h w c)
    return Signals(L, grad_W.norm(dim=1) / w, grad_P3 @ grad_P3.T)  # g_i carries w_i, n does not

# --------------------------------------------------------------------------------------------------
# 8. Metrics: network, data -> average precision, accuracy
# --------------------------------------------------------------------------------------------------

METRICS = ("mAP50", "mAP50-95", "accuracy", "balanced_accuracy")

def average_precision(truth: list[np.ndarray], found: list[np.ndarray], num_classes: int,
                      max_det: int) -> np.ndarray:
    """COCO average precision (10, classes), at IoU 0.5, 0.55, … 0.95; NaN: a class without boxes.

    For each image, truth: (n, 5) class, x1 y1 x2 y2 px; found: (n, 6) x1 y1 x2 y2, score, class.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    objects = [{"image_id": i, "category_id": int(k), "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": (x2 - x1) * (y2 - y1), "iscrowd": 0}
               for i, rows in enumerate(truth) for k, x1, y1, x2, y2 in rows.tolist()]
    rows = np.concatenate([  # (n, 7): image, x, y, w, h px, score, class
        np.column_stack([np.full(len(d), i), d[:, :2], d[:, 2:4] - d[:, :2], d[:, 4:]])
        for i, d in enumerate(found)])
    if not len(rows) or not objects:  # pycocotools takes no empty list
        have = np.isin(np.arange(num_classes), [o["category_id"] for o in objects])
        return np.where(have, 0.0, np.nan)[None].repeat(10, 0)
    coco = COCO()
    coco.dataset = {"images": [{"id": i} for i in range(len(truth))],
                    "categories": [{"id": k} for k in range(num_classes)],
                    "annotations": [o | {"id": k} for k, o in enumerate(objects, 1)]}  # 0: no match
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        coco.createIndex()
        run = COCOeval(coco, coco.loadRes(rows), "bbox")
        run.params.areaRng, run.params.areaRngLbl = [[0, 1e10]], ["all"]  # px^2: any size
        run.params.maxDets = [max_det]  # Departs from COCO (100): because YOLOv5 counts 300.
        run.evaluate()
        run.accumulate()
    precision = run.eval["precision"][:, :, :, 0, 0]  # (10, recalls, classes), -1: no box
    return np.where(precision[:, 0] < 0, np.nan, precision.mean(1))  # (10, C)

@torch.no_grad()
def evaluate(network: Network, data: JointSet, config: Config) -> dict[str, Any]:
    """METRICS of a split, None without labels; per_class; confusion (C, C), class by guess."""
    device, was_training = next(network.parameters()).device, network.training
    network.eval()
    found, guess = [], []
    for indices in torch.arange(len(data)).split(4 * config.batch_size):  # in order
        outputs = network(data.batch(indices, device).images)
        if "det" in outputs:
            found += find_boxes(outputs["det"], network.parts[0].heads["det"].anchors, config)
        if "cls" in outputs:
            guess += outputs["cls"].argmax(1).tolist()
    network.train(was_training)
    metrics, per_class = dict.fromkeys(METRICS), {}
    if found:
        truth = [data.truth(i) for i in range(len(data))]
        ap = average_precision(truth, found, len(data.names), config.max_det)
        if (have := ~np.isnan(ap[0])).any():  # else the split has no box
            metrics |= {"mAP50": float(ap[0, have].mean()), "mAP50-95": float(ap[:, have].mean())}
        per_class["AP50"] = dict(zip(data.names, ap[0].tolist()))
    if guess:
        C, labels = len(data.classification_names), np.array(data.labels)
        cells = (labels * C + guess)[labels != NO_LABEL]  # row * C + column of each image
        confusion = np.bincount(cells, minlength=C * C).reshape(C, C)
        count, right = confusion.sum(1), confusion.diagonal()  # (C,) each
        recall = [float(hit / of) if of else math.nan for hit, of in zip(right, count)]
        if count.any():  # else the split has no class
            metrics |= {"accuracy": float(right.sum() / count.sum()),
                        "balanced_accuracy": float(np.nanmean(recall))}
        metrics["confusion"] = confusion.tolist()
        per_class["accuracy"] = dict(zip(data.classification_names, recall))
    return metrics | {"per_class": per_class}

# --------------------------------------------------------------------------------------------------
# 9. Training: config, data -> a trained network, epoch by epoch
# --------------------------------------------------------------------------------------------------

def make_optimizer(part: JointNet, config: Config, lr: float) -> torch.optim.Optimizer:
    """AdamW or SGD, weight decay on kernels alone, as in YOLOv5.

    Parameters and gradients move into a few long vectors: a default step is 6 % shorter. A head
    behind `detach` has vectors of its own, so that its gradient does not clip the detector's.
    """
    groups = []
    for kernels, detached in itertools.product((True, False), repeat=2):
        members = [p for name, p in part.named_parameters() if (p.ndim > 1) == kernels
                   and (part.detach and name.startswith("heads.cls")) == detached]
        if members:
            starts = [0, *itertools.accumulate(-(-p.numel() // 64) * 64 for p in members)]
            vector = nn.Parameter(members[0].new_zeros(starts[-1]))
            vector.grad = torch.zeros_like(vector)
            for p, at in zip(members, starts):  # each at 256 bytes, as CUDA's kernels need
                view = vector.detach().as_strided(p.shape, p.stride(), at)  # p's own strides
                p.data = view.copy_(p.data)
                p.grad = vector.grad.as_strided(p.shape, p.stride(), at)
            groups.append({"params": [vector], "weight_decay": config.weight_decay * kernels,
                           "peak": lr, "detached": detached})
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum, nesterov=True, fused=True)
    return torch.optim.AdamW(groups, betas=config.betas, fused=True)

def learning_rate(progress: float, warmup: float) -> float:
    """Share of the peak rate at `progress` in [0, 1]: a linear rise, then a cosine to 1 %."""
    if progress < warmup:
        return progress / warmup
    done = (progress - warmup) / (1 - warmup + 1e-9)  # 1e-9: warmup may be 1
    return 0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2

class Run:
    """Everything that the rest of a run depends on."""
    def __init__(self, config: Config, train_set: JointSet, device: torch.device):
        torch.manual_seed(config.seed)  # before the network draws its weights
        anchors = np.ones((3, 3, 2)) if config.anchors == "auto" else np.array(config.anchors)
        if config.anchors == "auto" and "det" in config.tasks:
            sizes = np.concatenate([boxes[:, 3:] for boxes in train_set.boxes])  # fractions
            anchors = fit_anchors(sizes * train_set.canvas[::-1])  # w, h; the canvas is H, W
        self.config, self.device, self.epoch, self.rows = config, device, 0, []
        num_labels = len(train_set.classification_names)
        self.network = Network(config, len(train_set.names), num_labels, anchors)
        self.network.to(device, memory_format=torch.channels_last)
        self.losses = make_losses(self.network, train_set, config)  # after .to(): it keeps anchors
        self.optimizers = [make_optimizer(part, config, lr) for part, lr in
                           zip(self.network.parts, (config.lr, config.dual_lr))]
        self.modules, self.world, self.rank = list(self.network.parts), 1, 0
        if torch.distributed.is_initialized():
            self.world = torch.distributed.get_world_size()
            self.rank = torch.distributed.get_rank()
            self.modules = [nn.parallel.DistributedDataParallel(part) for part in self.modules]
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.amp == "bf16")
        self.w = torch.tensor(config.weights, device=device)
        self.balancer = GradNorm(config.weights, config.alpha, config.gradnorm_lr, config.w_min,
                                 device=device) if config.mode == "gradnorm" else None

def train_step(run: Run, batch: Batch, progress: float,
               backward: Callable = backward) -> dict[str, Tensor]:  # data/study.py times others
    """One step of every network, then of the balancer; what the log needs, still as tensors."""
    signals, grad_norms = [], []
    weights = run.w.split([len(part.heads) for part in run.network.parts])  # dual: (1,) each
    for module, optimizer, w in zip(run.modules, run.optimizers, weights):
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate(progress, run.config.warmup)
        optimizer.zero_grad(set_to_none=False)
        signals.append(backward(module, batch, run.losses, w, run.autocast))
        clipped = [group["params"][0] for group in optimizer.param_groups
                   if not group["detached"]]
        grad_norms.append(nn.utils.clip_grad_norm_(clipped, run.config.grad_clip))
        optimizer.step()
    L, s = torch.cat([s.L for s in signals]), signals[0]
    log = {"L": L, "w": run.w, "grad_norm": torch.stack(grad_norms).max()}  # before clipping
    if s.gram is not None:
        log |= {"G": run.w * s.n, "gram": s.gram}
    if run.balancer:
        run.w = run.balancer.update(L, s.n)  # after the log has this step's w
        log["r"] = run.balancer.r
    return log

def log_rows(steps: list[dict[str, Tensor]], tasks: tuple[str, ...]) -> list[dict[str, float]]:
    """What `train_step` returned, a row of numbers a step; one wait for the GPU, not one a step."""
    table = {key: torch.stack([step[key] for step in steps]) for key in steps[0]}  # (steps, ...)
    if "gram" in table:
        table["cosine"], table["similarity"] = similarities(table.pop("gram"))
    table["loss"] = (table["w"] * table["L"]).sum(1)
    columns = {}
    for key, values in table.items():
        columns |= ({key: values} if values.ndim == 1 else  # (steps,), or (steps, T)
                    {f"{key}/{task}": x for task, x in zip(tasks, values.T)})
    return [dict(zip(columns, row)) for row in torch.stack(list(columns.values()), 1).tolist()]

def train_epoch(run: Run, train_set: JointSet, bar: tqdm) -> list[dict[str, Any]]:
    """One pass over the training split; one row a step, all finite or FloatingPointError."""
    config, started, cpu = run.config, time.perf_counter(), time.process_time()
    where = config.seed, run.epoch, run.rank
    torch.manual_seed(stream("dropout", *where).initial_seed())  # dropout draws from torch's own
    rng = stream("augment", *where)
    order, steps = epoch_order(len(train_set), config, run.epoch, run.world, run.rank), []
    small = config.mode == "dual" and run.epoch < round(config.progressive_share * config.epochs)
    size = [max(32, round(s * config.progressive_scale / 32) * 32) for s in train_set.canvas]
    for k, indices in enumerate(order):
        batch = augment(train_set.batch(indices, run.device), config, rng)
        images = batch.images
        if small:  # targets are fractions: they hold at any size
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        batch = batch._replace(images=images.contiguous(memory_format=torch.channels_last))
        steps.append(train_step(run, batch, (run.epoch + k / len(order)) / config.epochs))
        bar.update()
    rows = [{"step": run.epoch * len(order) + k, "epoch": run.epoch} | row
            for k, row in enumerate(log_rows(steps, config.tasks))]
    for row in rows:
        if bad := [key for key, value in row.items() if not math.isfinite(value)]:
            w = ", ".join(f"{key} = {value:.4g}" for key, value in row.items() if key[:2] == "w/")
            told = f"step {row['step']}: {', '.join(bad)} not finite ({w}); lower lr"
            raise FloatingPointError(told)
    rows[-1]["time"] = {"train_s": time.perf_counter() - started,
                        "train_cpu_s": time.process_time() - cpu}
    return rows

def train(run: Run, train_set: JointSet, val_set: JointSet) -> Iterator[None]:
    """Trains to the last epoch; yields after each: its rows in run.rows, metrics where due."""
    config = run.config
    steps = len(epoch_order(len(train_set), config, 0, run.world, run.rank))
    if not steps:
        raise UserError("train: fewer than two images a process; add images or use fewer processes")
    with tqdm(total=config.epochs * steps, initial=run.epoch * steps, unit="step", leave=False,
              desc=config.mode, disable=run.rank > 0 or None) as bar:  # None: if no terminal
        while run.epoch < config.epochs:
            rows = train_epoch(run, train_set, bar)
            run.epoch += 1  # before the yield: a checkpoint counts whole epochs
            run.rows += rows
            due, started = run.epoch % config.eval_interval == 0, time.perf_counter()
            if run.rank == 0 and (due or run.epoch == config.epochs):
                rows[-1]["val"] = evaluate(run.network, val_set, config)
                rows[-1]["time"]["eval_s"] = time.perf_counter() - started
            yield

# --------------------------------------------------------------------------------------------------
# 10. Synthetic data: (seed, split, i) -> one echocardiogram-like frame, its jets and its view
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

def place_jets(rng: np.random.Generator, apex: np.ndarray, radius: float,
               angle: float) -> np.ndarray:
    """Up to three boxes (n, 4), cx cy w h in fractions, apart, in a sector of that half-angle."""
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
    hue, value = (hue + 15 * (tex - 1)) % 360 / 360, np.clip(0.30 + 0.5 * core * tex, 0, 1)
    colour = hsv_to_rgb(np.stack([hue, np.full_like(hue, 0.85), value], -1))  # (h, w, 3)
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
    pixels = np.round(255 * np.clip(image, 0, 1)**0.75).astype(np.uint8)
    return pixels, np.column_stack([classes, boxes]).astype(np.float32), view

def load_synthetic(config: Config) -> tuple[JointSet, JointSet]:
    """The built-in train and val splits."""
    splits = []
    for split, count in (("train", config.train_images), ("val", config.val_images)):
        samples = [synthetic_sample(config.seed, split, i, config.imgsz, config.dominance)
                   for i in range(count)]
        pixels, boxes, labels = map(list, zip(*samples))
        splits.append(JointSet(np.stack(pixels), boxes, labels, list(JETS), list(VIEWS)))
    return tuple(splits)

def load_data(config: Config, folder: Path = Path(".")) -> tuple[JointSet, JointSet]:
    """The train and val splits that `config.data` names; `folder`: for what memory cannot hold."""
    if config.data == "synthetic":
        return load_synthetic(config)
    from data.joint import read_joint  # other people's files are read there alone
    return read_joint(Path(config.data), config, folder)

# --------------------------------------------------------------------------------------------------
# 11. The report's smoke test: its rule, beside GradNorm, on noise
# --------------------------------------------------------------------------------------------------

RULES = ("report", "gradnorm", "plain", "textbook")  # the last two for their times alone

def report_rule(w: Tensor, g: Tensor, G0_bar: Tensor, r: Tensor, alpha: float) -> Tensor:
    """The report's update of w (2,), as it is: g does not depend on w, and w sums to T^2 = 4."""
    w = w * G0_bar * r**alpha / (g + 1e-8)
    return w / w.mean() * len(w)

def smoke_test(seed: int, rule: str) -> dict[str, Any]:
    """The report's smoke test (cross-entropy and BCE on noise) under one of RULES."""
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

    def norms(losses: Tensor, at: list[Tensor], **graph: bool) -> Tensor:
        return torch.stack([torch.autograd.grad(L_i, x, retain_graph=True, **graph)[0].norm()
                            for L_i, x in zip(losses, at)])

    for step in range(1, 51):  # 5 epochs of 10 batches
        out, losses = forward()
        L = losses.detach()
        if rule == "report" and step >= 10:
            g = norms(losses, out)  # (2,), at the heads' outputs, not at W
            L0, G0_bar = (L, g.mean()) if L0 is None else (L0, G0_bar)
            w = report_rule(w, g, G0_bar, L / L0 / (L / L0).mean(), 1.5)
            ratios.append(float(g[0] / g[1]))
        if rule == "textbook":  # L_grad as a graph, differentiated a second time
            v = w.clone().requires_grad_()
            G = norms(v * losses, [W, W], create_graph=True)
            torch.autograd.grad((G - G.mean().detach()).abs().sum(), v, retain_graph=True)
        n = norms(losses, [W, W]) if rule == "gradnorm" else None
        loss = (w * losses).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        log.append(torch.cat([w, loss.detach()[None]]))
        w = balancer.update(L, n) if rule == "gradnorm" else w
    log, seconds = torch.stack(log).numpy(), time.perf_counter() - started  # (50, 3)
    epochs = log[:, 2].reshape(5, 10).mean(1)  # mean loss of each
    G = w * norms(forward()[1], [W, W])  # whose gradient the trunk would follow from here on
    return {"w": np.vstack([log[:, :2], w.tolist()]), "loss": log[:, 2],
            "final_weight_det": float(w[0]), "final_weight_cls": float(w[1]),
            "weight_change_det": float(w[0]) - 1.0, "weight_change_cls": float(w[1]) - 0.01,
            "mean_loss": float(epochs.mean()),
            "loss_change": float(100 * (epochs[-1] / epochs[0] - 1)),  # %, last against first
            "parameters": sum(p.numel() for p in parameters), "train_seconds": seconds,
            "share_det": float(G[0] / G.sum()),
            "gradient_ratio": float(np.mean(ratios or [np.nan]))}

def check_smoke(reported: dict, measured: dict[str, list]) -> list[dict[str, Any]]:
    """Each number of the report beside what the seeds give; `spread`: within their range."""
    checks = []
    for name, entry in reported.items():
        x, tolerance, value = np.array(measured[name], float), entry["tolerance"], entry["value"]
        ok = (None if tolerance == "machine" else
              bool(x.min() <= float(value) <= x.max()) if tolerance == "spread" else
              bool(np.all(np.abs(x - float(value)) <= float(tolerance))))
        checks.append({"name": name, "reported": float(value), "measured": float(x.mean()),
                       "range": [x.min(), x.max()], "tolerance": tolerance, "ok": ok})
    return checks

# --------------------------------------------------------------------------------------------------
# 12. Files: config files, checkpoints, results, tables
# --------------------------------------------------------------------------------------------------

def read_yaml(path: Path) -> Any:
    """Lists, mappings and texts of a YAML file: all scalars stay text, nothing is constructed."""
    try:
        return yaml.load(path.read_text(encoding="utf-8-sig"), yaml.BaseLoader)
    except (OSError, ValueError, LookupError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())[:120]})")

def key_comments() -> dict[str, str]:
    """What config.yaml says of each key: its range, also in an error, and its line in --help."""
    text = (ROOT / "config.yaml").read_text(encoding="utf-8")
    return dict(re.findall(r"^(\w+):.*?  +# (.*)$", text, re.MULTILINE))

def nearest(word: str, words: Any) -> str:
    """"; did you mean …?" with the likeliest of the words, or nothing."""
    word = {"weights": "init", "conf": "predict_conf", "project": "out"}.get(word, word)  # YOLOv5's
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""

def make_config(values: Any, where: str) -> Config:
    """A checked Config from a mapping of exactly its keys, values as text or as they are."""
    hints, checked = get_type_hints(Config, include_extras=True), {}
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected lines of 'key: value'")
    for key in (key for key in values if key not in hints):
        raise UserError(f"{where}: unknown key {str(key)[:60]}{nearest(str(key), hints)}")
    for key, hint in hints.items():
        value = values.get(key)
        try:
            if isinstance(value, str) and "," in value and hint is not str:  # 1,0.1 or [1, 0.1]
                value = yaml.load(value if value[0] == "[" else f"[{value}]", yaml.BaseLoader)
            checked[key] = msgspec.convert(value, hint, strict=False)  # "1e-3" is a number,
        except (msgspec.ValidationError, yaml.YAMLError) as error:  # 2.5 no int, true no float
            raise UserError(f"{where}: {key}: found {str(value)[:60]!r}, expected "
                            f"{key_comments()[key]}") from error
    return Config(**checked)

def load_config(path: Path, settings: dict[str, Any]) -> Config:
    """The shipped config.yaml, with a YAML file's and then a command line's settings over it."""
    shipped, given = read_yaml(ROOT / "config.yaml"), read_yaml(path)
    config = make_config(shipped | given if isinstance(given, dict) else given, str(path))
    return make_config(asdict(config) | settings, "command line")

def to_json(value: Any) -> bytes:
    """One line of JSON: tuples and arrays are lists, NaN is null."""
    return msgspec.json.encode(value, enc_hook=lambda x: x.tolist())

def clean(value: Any) -> Any:  # as it comes back from JSON or YAML
    return msgspec.json.decode(to_json(value))

def write_atomic(path: Path, content: str | bytes) -> None:
    """Writes a file by way of a second one: it is the old or the new, never half."""
    part = path.with_name(path.name + ".part")  # same folder: there a rename is atomic
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)

def write_json(path: Path, value: Any) -> None:
    write_atomic(path, msgspec.json.format(to_json(value), indent=1) + b"\n")

def cell(x: Any) -> str:
    """A table's cell: text as it is, a number to three digits, an interval's mean and ends."""
    if isinstance(x, dict):
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

def load_checkpoint(path: Path, *keys: str) -> dict[str, Any]:
    """The mapping in a file of torch's, read without running code of it; it must have `keys`."""
    try:
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
        return state | {key: state[key] for key in keys}
    except Exception as error:  # on foreign bytes torch.load raises a dozen types, all alike
        raise UserError(f"{path}: no run's .pt; init also takes tensors ({type(error).__name__})")

def save_epoch(run: Run, train_set: JointSet, out: Path) -> None:
    """Adds an epoch to the log, replaces last.pt, and best.pt if validation was never better."""
    with (out / "metrics.jsonl").open("ab") as file:
        file.writelines(to_json(row) + b"\n" for row in run.rows if row["epoch"] == run.epoch - 1)
    scores = [sum(row["val"][key] or 0 for key in ("mAP50-95", "balanced_accuracy"))
              for row in run.rows if "val" in row]
    best = "val" in run.rows[-1] and scores[-1] == max(scores)
    buffer = io.BytesIO()  # torch's own writer hides the reason of a failure
    torch.save({"jointgrad/2": True, "config": clean(asdict(run.config)),
                "names": train_set.names, "classification_names": train_set.classification_names,
                "fingerprint": train_set.fingerprint, "epoch": run.epoch, "rows": run.rows,
                "w": run.w, "network": run.network.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
                "balancer": run.balancer and run.balancer.state_dict()}, buffer)
    for name in ["best.pt"] * best + ["last.pt"]:  # last.pt last: it says where to resume
        write_atomic(out / name, buffer.getvalue())

FREE = dict.fromkeys(("device", "threads", "cache_mb", "data"))  # that --resume may change

def restore(run: Run, last: Path, fingerprint: str) -> str:
    """Puts a begun run back to where its last.pt stands, and says so; UserError if it cannot."""
    state = load_checkpoint(last, "jointgrad/2", "config", "network")
    if state["config"] | FREE != clean(asdict(run.config)) | FREE:
        raise UserError(f"{last}: does not fit the config.yaml beside it; use the run's own")
    if state.get("fingerprint") != fingerprint:
        raise UserError(f"{last}: trained on other images or labels than {run.config.data}")
    run.epoch, run.rows, run.w = state["epoch"], state["rows"], state["w"].to(run.device)
    run.network.load_state_dict(state["network"])
    for optimizer, saved in zip(run.optimizers, state["optimizers"]):
        optimizer.load_state_dict(saved)
    if run.balancer:
        run.balancer.load_state_dict(state["balancer"])
    begun = "resumed" if run.epoch < run.config.epochs else "finished: nothing left to train,"
    return f"{begun} after epoch {run.epoch} of {run.config.epochs}"

def warm_start(run: Run, path: Path) -> str:
    """Lays a saved detector's tensors over a new run's, in order, where shapes agree.

    path: a checkpoint of this program, or a YOLOv5's plain state_dict: its modules stand in the
    same order. Returns what was taken; UserError where the trunk or the depth is another.
    """
    detector = "parts.0.trunk.", "parts.0.heads.det."  # where a state_dict keeps it, in order
    saved, own, unit = load_checkpoint(path), run.network.state_dict(), torch.tensor(STRIDES)
    if {"jointgrad/2", "network"} <= saved.keys():  # its anchors are in px, YOLOv5's in cells
        saved, unit = saved["network"], torch.ones(3)
        saved = {key: x for key, x in saved.items() if key.startswith(detector)}
    anchors = [saved.pop(key) for key in list(saved) if key.endswith(("anchors", "anchor_grid"))]
    slots = [key for key in own if key.startswith(detector) and not key.endswith("anchors")]
    taken = {key: x for key, x in zip(slots, saved.values())
             if getattr(x, "shape", None) == own[key].shape}
    left = [key for key in slots if key not in taken]  # as of another number of classes
    if len(saved) != len(slots) and "det" in run.config.tasks or any("trunk" in x for x in left):
        raise UserError(f"init {path}: no detector of this width_multiple and depth_multiple; give "
                        "a run's best.pt, or a YOLOv5's plain state_dict")
    run.network.load_state_dict(own | taken)
    if anchors and "det" in run.config.tasks and run.config.anchors == "auto":
        run.network.parts[0].heads["det"].anchors.copy_(anchors[0] * unit.view(3, 1, 1))
    return f"init {path}: took {len(taken)} of the detector's tensors, left {left or 'none'}"

class Predictor:
    """A trained network: `Predictor("best.pt")("image.jpg")` -> its boxes and its image class."""
    def __init__(self, path: str | Path, **settings: Any):
        state = load_checkpoint(Path(path), "jointgrad/2", "config", "network")
        self.config = make_config(state["config"] | settings, str(path))
        self.names, self.classification_names = state["names"], state["classification_names"]
        num_labels = len(self.classification_names)
        self.network = Network(self.config, len(self.names), num_labels, np.ones((3, 3, 2)))
        self.network.load_state_dict(state["network"])  # brings the anchors too
        self.network.eval()

    @torch.no_grad()
    def __call__(self, image: Any) -> dict[str, Any]:
        """boxes [{name, score > predict_conf, box_xyxy px}], classification {name, probs} or None.

        image: a file, an image opened by Pillow, or its pixels (H, W, 3), RGB, uint8.
        """
        from data.joint import read_image, to_canvas
        image = read_image(image)
        (pixels, (left, top, w, h)), size = to_canvas(image, self.config.imgsz), image.size
        device = next(self.network.parameters()).device
        images = torch.tensor(pixels, device=device).permute(2, 0, 1)[None] / 255
        outputs, found = self.network(images), {"boxes": [], "classification": None}
        if "det" in outputs:
            anchors = self.network.parts[0].heads["det"].anchors
            rows = find_boxes(outputs["det"], anchors, self.config)[0]
            for *box, score, k in rows[rows[:, 4] > self.config.predict_conf].tolist():
                edges = (np.array(box) - [left, top] * 2) * (size * 2) / ([w, h] * 2)
                found["boxes"].append({"name": self.names[int(k)], "score": score,
                                       "box_xyxy": edges.clip(0, size * 2).tolist()})
        if "cls" in outputs:
            probs = dict(zip(self.classification_names, outputs["cls"][0].softmax(0).tolist()))
            found["classification"] = {"name": max(probs, key=probs.get), "probs": probs}
        return found

def describe(run: Run, train_set: JointSet, val_set: JointSet) -> dict[str, Any]:
    """What a data set holds: images, boxes and classes of each split, canvas, anchors."""
    heads = run.network.parts[0].heads
    found = {"fingerprint": train_set.fingerprint, "canvas": train_set.canvas,
             "anchors": heads["det"].anchors.tolist() if "det" in heads else None}
    for split, data in (("train", train_set), ("val", val_set)):
        boxes = np.concatenate(data.boxes)[:, 0].tolist()
        found[split] = {"images": len(data), "images without class": data.labels.count(NO_LABEL)}
        found[split] |= {f"box {name}": boxes.count(k) for k, name in enumerate(data.names)}
        found[split] |= {f"class {name}": data.labels.count(k)
                         for k, name in enumerate(data.classification_names)}
    return found

def cost(network: Network, canvas: tuple[int, int]) -> dict[str, Any]:
    """Parameters of trunk and tasks (dual shares none), FLOPs (a multiply-add is two), memory."""
    from torch.utils.flop_counter import FlopCounterMode
    counts = dict.fromkeys(("total", "trunk", "det", "cls"), 0)
    for part in network.parts:
        for name, module in (("trunk", part.trunk), *part.heads.items()):
            owner = next(iter(part.heads)) if len(network.parts) > 1 else name
            counts[owner] = counts.get(owner, 0) + sum(p.numel() for p in module.parameters())
    network.eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, *canvas, device=next(network.parameters()).device))
    peak = None  # on Windows, which has no `resource`
    with contextlib.suppress(ImportError):
        import resource
        unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, kilobytes elsewhere
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
    return {"parameters": counts | {"total": sum(counts.values())},
            "flops_per_image": counter.get_total_flops(), "peak_rss_mb": peak}

def environment(device: torch.device) -> dict[str, Any]:
    """What a result depends on beside the code and the config: versions, device, threads."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"torch": str(torch.__version__), "python": platform.python_version(), "device": name,
            "os": platform.system(), "cpu": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(), "processes": int(os.environ.get("WORLD_SIZE", 1))}

def summarise(run: Run, dataset: dict[str, Any], start_s: float) -> dict[str, Any]:
    """The quantities of results.json, from a finished run."""
    config, rows, first, final = run.config, run.rows, list(run.config.weights), run.w.tolist()
    total = {key: sum(row.get("time", {}).get(key, 0) for row in rows)
             for key in ("train_s", "train_cpu_s", "eval_s")}
    column = {key: np.array([row[key] for row in rows]) for key in rows[0]
              if key not in ("time", "val")}
    interference = None  # where the tasks share no trunk
    if "cosine" in column:
        G = np.array([column[f"G/{task}"] for task in config.tasks])  # (T, steps)
        share = (G / G.sum(0).clip(1e-30)).mean(1)
        interference = {"cosine_mean": column["cosine"].mean(),
                        "conflict_share": (column["cosine"] < 0).mean(),
                        "magnitude_similarity": column["similarity"].mean(),
                        "gradient_share": dict(zip(config.tasks, share))}
    return {
        "schema": "jointgrad/2", "mode": config.mode, "seed": config.seed, "data": config.data,
        "config": asdict(config), "environment": environment(run.device), "dataset": dataset,
        "steps": len(rows), **cost(run.network, dataset["canvas"]),
        "weights": {"initial": first, "final": final, "change": np.subtract(final, first)},
        "loss": {"mean": column["loss"].mean(),
                 "final": column["loss"][-len(rows) // config.epochs:].mean()},
        "val": rows[-1]["val"], "interference": interference,
        "time": total | {"start_s": start_s, "step_ms": 1000 * total["train_s"] / len(rows),
                         "images_per_s": config.epochs * dataset["train"]["images"]
                         / total["train_s"]}}

# --------------------------------------------------------------------------------------------------
# 13. Command line: arguments -> one run, its files under --out, an exit code
# --------------------------------------------------------------------------------------------------

def option_parser(description: str) -> argparse.ArgumentParser:
    """A parser with --config, --out and an option for every key of config.yaml but `mode`."""
    parser = argparse.ArgumentParser(usage="%(prog)s [--option value …]", description=description,
                                     allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", type=Path, default=ROOT / "config.yaml",
                        help="a YAML file of settings, laid over the shipped config.yaml")
    parser.add_argument("--out", type=Path, help="a new folder for the results; else below runs/")
    shipped = {k: re.sub("[][' ]", "", f"{x}") for k, x in read_yaml(ROOT / "config.yaml").items()}
    for key, comment in list(key_comments().items())[1:]:  # mode, the first, has more choices
        parser.add_argument(f"--{key}", help=f"{comment} [{shipped[key]}]".replace("%", "%%"))
    return parser

def run_program(parser: argparse.ArgumentParser, job: Callable,
                argv: list[str] | None = None) -> int:
    """job(options, settings) -> 0 done, 1 failed, 2 a mistake in the input, 130 interrupted."""
    argv = [re.sub(r"^--[\w-]+", lambda name: "--" + name[0][2:].replace("-", "_"), word)
            for word in (sys.argv[1:] if argv is None else argv)]  # --batch-size is --batch_size
    signal.signal(signal.SIGINT, signal.default_int_handler)  # from now on Ctrl-C is told
    warnings.simplefilter("ignore")  # a bad image is an error, a missing glyph a little box
    try:
        args, unknown = parser.parse_known_args(argv)
        if unknown:
            hint = nearest(unknown[0].lstrip("-").partition("=")[0], list(vars(args)))
            raise UserError(f"{unknown[0]}: no such option{hint}; --help lists all")
        given = {key: getattr(args, key) for key in key_comments() if key != "mode"}
        return job(args, {key: value for key, value in given.items() if value is not None}) or 0
    except (UserError, argparse.ArgumentError) as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2
    except (ArithmeticError, RuntimeError, OSError, MemoryError) as error:
        print("error:", *str(error).splitlines()[:1], file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; go on by --resume DIR, or compare by the same command", file=sys.stderr)
        return 130

def new_folder(out: Path | None, name: str) -> Path:
    """An empty folder, made now: `out`, or the first free of runs/<name>, -2, -3, …"""
    numbered = (Path("runs", name + f"-{k}" * (k > 1)) for k in itertools.count(1))
    out = out or next(path for path in numbered if not path.exists())
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: not empty; give a new folder, or go on by --resume {out}")
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "probe", b"")  # may it be written? Told before anything is computed
    (out / "probe").unlink()
    return out

def pick_device(name: str) -> torch.device:
    """The device asked for; auto: the first there is of cuda, mps, cpu. UserError if absent."""
    kind, index = name, int(os.environ.get("LOCAL_RANK", 0))
    if name[-1].isdigit():  # 0 and cuda:0 are the first GPU
        kind, index = "cuda", int(name.rpartition(":")[2])
    have = {"cuda": torch.cuda.device_count(), "mps": torch.backends.mps.is_available(), "cpu": 1}
    kind = next(key for key in have if have[key]) if kind == "auto" else kind
    if not have[kind] or kind == "cuda" and index >= have["cuda"]:
        raise UserError(f"--device {name}: this machine or torch has none; use --device cpu")
    return torch.device(kind, index if kind == "cuda" else None)

def run_training(config: Config, resume: bool, out: Path) -> None:
    """Trains, saving log and checkpoint each epoch; then results.json, figure and closing table."""
    from data import figures  # now: a missing module is told before the training
    device, started = pick_device(config.device), time.perf_counter()
    train_set, val_set = load_data(config, out)
    run = Run(config, train_set, device)
    begun = resume and (out / "last.pt").exists()
    told = (restore(run, out / "last.pt", train_set.fingerprint) if begun else
            warm_start(run, Path(config.init)) if config.init else "")
    dataset, start_s = describe(run, train_set, val_set), time.perf_counter() - started
    if run.rank == 0:
        write_atomic(out / "config.yaml", yaml.safe_dump(clean(asdict(config)), sort_keys=False))
        write_atomic(out / "metrics.jsonl", b"".join(to_json(row) + b"\n" for row in run.rows))
        print_header(run, dataset, train_set.notes, told)
    for _ in train(run, train_set, val_set):
        if run.rank == 0:
            save_epoch(run, train_set, out)
            tqdm.write(epoch_line(run), sys.stderr)  # above the progress bar
    if run.rank > 0:
        return
    if config.epochs == 0:
        figures.save(figures.draw_data(train_set), out / "labels.png")
    else:
        figures.save(figures.draw_run(run, val_set), out / "figure.png")
        results = clean(summarise(run, dataset, start_s))
        write_json(out / "results.json", results)
        shown = [[key, x] for key, x in results["val"].items() if isinstance(x, float)] + [
            [f"{part} {key}", x] for part in ("weights", "loss", "time")
            for key, x in results[part].items()]
        print(markdown([f"{config.mode}, seed {config.seed}", "value"], shown))
    print(f"written to {out}/: {', '.join(sorted(os.listdir(out)))}")

def epoch_line(run: Run) -> str:
    """The last epoch: mean loss and weight of each task, and the metrics if there are any."""
    rows = [row for row in run.rows if row["epoch"] == run.epoch - 1]
    told = {key: np.mean([row[key] for row in rows]) for key in rows[0] if key[:2] in ("L/", "w/")}
    told |= {key: x for key, x in rows[-1].get("val", {}).items() if isinstance(x, float)}
    return f"epoch {run.epoch}/{run.config.epochs}: " + ", ".join(
        f"{key} {x:.3f}" for key, x in told.items())

def print_header(run: Run, dataset: dict[str, Any], notes: list[str], told: str) -> None:
    """What is about to be computed, where, on which data; and what was odd about them."""
    config, images = run.config, dataset["train"]["images"]
    notes = notes[:10] + [f"{len(notes)} warnings in all"] * (len(notes) > 10)
    if config.batch_size > images:
        notes.append(f"batch_size {config.batch_size}: an epoch is one step of {images} images")
    sys.stderr.writelines(f"warning: {note}\n" for note in notes)
    print(f"jointgrad {config.mode}: torch {torch.__version__}, {run.device}, "
          f"{config.threads} thread(s), seed {config.seed}, {config.data}\n")
    print(markdown(["", "train", "val"], [[name, count, dataset["val"][name]]
                                          for name, count in dataset["train"].items()]))
    print(f"canvas {dataset['canvas'][1]} x {dataset['canvas'][0]} px; anchors, px: "
          f"{dataset['anchors'] and np.round(dataset['anchors']).astype(int).tolist()}")
    if "det" in config.tasks:
        loss, size = run.losses["det"], min(config.batch_size, images)
        print(f"detection loss: {size**config.det_loss_times_batch} x ({config.box_gain:.3g} box + "
              f"{loss.obj_gain:.3g} objectness + {loss.cls_gain:.3g} class)")
    print(told + "\n")

def run_reproduce(out: Path) -> int:
    """The report's smoke test over ten seeds; 1 unless every number of the report is met."""
    runs = {rule: [smoke_test(seed, rule) for seed in range(10)] for rule in RULES}
    measured = {f"smoke_{rule}": {name: [run[name] for run in of_rule] for name in of_rule[0]}
                for rule, of_rule in runs.items()}
    reported = read_yaml(ROOT / "data" / "reported.yaml")["smoke_test"]
    checks = check_smoke(reported, measured["smoke_report"])
    write_json(out / "results.json", {"schema": "jointgrad/2", "mode": "reproduce",
                                      "checks": checks, "quantities": measured})
    print(markdown(["number", "reported", "measured", "range over seeds", "ok", "under GradNorm"], [
        [c["name"], str(c["reported"]), c["measured"], " to ".join(map(cell, c["range"])),
         c["ok"], np.mean(measured["smoke_gradnorm"][c["name"]])] for c in checks]))
    print(markdown(["50 steps", "median s"], [[rule, np.median(q["train_seconds"])]
                                              for rule, q in measured.items()]))
    print(f"written to {out}/: {', '.join(sorted(os.listdir(out)))}")
    return int(any(check["ok"] is False for check in checks))

def run_predict(args: argparse.Namespace, settings: dict[str, Any], out: Path) -> None:
    """Pictures, predictions.json: each image padded alone; a val split's metrics on its canvas."""
    predictor, metrics, images = Predictor(args.checkpoint, **settings), None, []
    torch.set_num_threads(predictor.config.threads)
    predictor.network.to(pick_device(predictor.config.device))
    if args.source:
        items = sorted(p for p in args.source.rglob("*") if p.is_file()) or [args.source]
    else:
        _, data = load_data(predictor.config, out)
        learnt = predictor.names, predictor.classification_names
        if (data.names, data.classification_names) != learnt:
            raise UserError(f"--data {predictor.config.data}: other classes than the checkpoint's")
        metrics = evaluate(predictor.network, data, predictor.config)
        items = data.paths or list(data.pixels)
        print(markdown(["metric", "value"], [[m, metrics[m]] for m in METRICS]))
    from data import figures, joint
    for k, item in enumerate(tqdm(items, unit="image", disable=None, leave=False)):
        name = item if isinstance(item, Path) else Path(f"val-{k}")
        picture = re.sub(r"[^\w.-]", "_", name.stem)[:50] + ".png"  # no newline, no long name
        while (out / picture).exists():
            picture = f"{k}-{picture}"
        try:
            item = joint.read_image(item)
        except UserError as error:
            print(f"warning: {error}; skipped", file=sys.stderr)
            continue
        images.append({"image": str(name).encode(errors="replace").decode(),  # it may be no UTF-8
                       "picture": picture} | predictor(item))
        figures.save(figures.draw_found(item, images[-1], predictor), out / picture)
    if not images:
        raise UserError(f"--source {args.source}: no readable image there")
    write_json(out / "predictions.json", {"schema": "jointgrad/2", "mode": "predict",
                                          "metrics": metrics, "images": images})
    print(f"{len(images)} picture(s) and predictions.json written to {out}/")

def job(args: argparse.Namespace, settings: dict[str, Any]) -> int | None:
    """What the options ask for: a training run, the smoke test, or predictions."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads such memory
    if (args.mode == "predict") != bool(args.checkpoint) or args.source and not args.checkpoint:
        raise UserError("predict needs --checkpoint; other modes take neither it nor --source")
    laid, size = args.config != ROOT / "config.yaml", any("_multiple" in key for key in settings)
    if args.mode == "reproduce" and (laid or settings) or args.mode == "predict" and (laid or size):
        raise UserError("--mode reproduce takes no setting; predict no --config, width or depth")
    if args.resume and (laid or args.out or args.mode or settings.keys() - FREE):
        raise UserError(f"--resume: takes no option but {', '.join(FREE)}; the others stand in its "
                        "config.yaml. More epochs, another schedule: --init its last.pt (detector)")
    torch.set_num_threads(1)
    if args.mode == "reproduce":
        return run_reproduce(new_folder(args.out, "reproduce"))
    if args.mode == "predict":
        name = f"predict-{args.checkpoint.resolve().parent.name}"
        work = partial(run_predict, args, settings)
    else:
        config = load_config(args.resume / "config.yaml" if args.resume else args.config,
                             settings | ({"mode": args.mode} if args.mode else {}))
        torch.set_num_threads(config.threads)
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            device = pick_device(config.device)  # not what is there: a GPU may stay unused
            torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
        data, kind = Path(config.data), config.mode if config.epochs else "data"
        name = f"{kind}-{data.parent.name or data.stem}-s{config.seed}"
        work = partial(run_training, config, bool(args.resume))
    first = int(os.environ.get("RANK", 0)) == 0  # of several processes; the others leave nothing
    out = args.resume or (new_folder(args.out, name) if first else Path("."))
    try:
        work(out)
    except Exception:
        if not any(out.iterdir()):
            out.rmdir()  # so that the corrected run is not the second
        raise
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

def main(argv: list[str] | None = None) -> int:
    """Runs the command line; the exit code."""
    parser = option_parser(__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--mode", choices=(*MODES, "reproduce", "predict"),
        help=f"{key_comments()['mode']} | reproduce (the report's smoke test) | predict (pictures)")
    add("--resume", type=Path, metavar="DIR", help="go on with the interrupted run in this folder")
    add("--checkpoint", type=Path, help="predict: a run's best.pt or last.pt")
    add("--source", type=Path, help="predict: an image or a folder, in place of the val split")
    return run_program(parser, job, argv)

if __name__ == "__main__":
    sys.modules["jointgrad"] = sys.modules["__main__"]  # for data/joint.py: one module, not two
    sys.exit(main())
