"""jointgrad: does a classifier's gradient hurt the detector that shares its trunk?

And which remedy works, at what cost: GradNorm, two networks, or another of the `MODES`?

    python jointgrad.py --mode gradnorm    # one run on built-in data, a minute on one CPU core
    python data/study.py compare           # many runs: every mode over seeds, a verdict each

GradNorm (Chen et al., ICML 2018) as `GradNorm.update` computes it, in the paper's letters:

    n_i = ||grad_W L_i||             G_i = w_i n_i = ||grad_W w_i L_i||      G_bar = mean(G)
    L_tilde_i = L_i / L_i(0)         r_i = L_tilde_i / mean(L_tilde)
    target_i = G_bar r_i^alpha       L_grad = sum |G_i - target_i|
    dL_grad/dw_i = sign(G_i - target_i) n_i        w <- Adam(dL_grad)
    w <- w T / sum(w), floored: w <- w_min + v (T - T w_min) / sum(v), v = max(w - w_min, 0)

A balancer (GradNorm, Uncertainty) sets the weights w of the losses. A surgery (PCGrad, IMTL,
MGDA, cap) sets how much of each task's gradient g_i the trunk follows, sum a_i g_i. It reads
one matrix, gram = grad_W grad_W^T, the inner products of the tasks' weighted gradients at W.
Where two gradients are at right angles, and here they nearly are, every published surgery is
a_i ~ |g_i|^-p, so eleven names are three: p = 0 PCGrad, the plain sum; p = 1 IMTL, Nash-MTL,
Aligned-MTL; p = 2 MGDA, CAGrad. The cap is none of them: it asks whose gradient comes first.

    code       paper    meaning
    T          T        number of tasks
    w          w_i      task weights (T,)
    L, L0      L_i      losses (T,), their first values
    L_tilde    L~_i     L / L0: the inverse training rate (small = trained fast)
    r          r_i      relative inverse training rate
    n, G       -, G_W   gradient norms at W of L_i and of w_i L_i
    W          W        kernel of the last convolution of the shared trunk
    alpha      alpha    strength of the pull towards equal training rates
    a          -        share of each task's gradient that the trunk follows (T,)
    P3, P4, P5          feature maps of stride 8, 16, 32 px

Departures, marked where a line of the code makes them:
- GradNorm: the weights keep a floor w_min (as published they go negative on the paper's toy).
- GradNorm: where an L_i or n_i is 0 (no image of the batch has a class), w stays as it is.
- PCGrad: the tasks are taken in order, not at random. Surgeries read the gradients at W alone.
- Uncertainty: sum exp(-s_i) L_i + s_i for every task; the paper has 2 exp(-s) for a class.
- YOLOv5: AdamW, a cosine schedule, class gain 1.0 (config.yaml), anchors by k-means alone, no
  mosaic, colour jitter, nominal batch of 64 or weight average: for short runs.
- YOLOv5: BatchNorm's statistics are estimated anew for each evaluation, on training images.
- YOLOv5: of several objectness targets for one cell the largest counts, whatever their order.
- COCO: average precision counts max_det (300) detections an image, not 100 of a class.

Sources: arXiv 1711.02257 (GradNorm), 1705.07115 (uncertainty: Kendall et al.), 2001.06782
(PCGrad: Yu et al.), 1810.04650 (MGDA: Sener, Koltun), IMTL (Liu et al., ICLR 2021), 2203.06801
(MetaBalance: He et al.), 1911.08287 (CIoU: Zheng et al.), 1709.01507 (SE: Hu et al.), 1807.06521
(CBAM: Woo et al.); Jocher et al., YOLOv5 v6 (design only).
"""
import argparse
import contextlib
import difflib
import hashlib
import importlib.util
import io
import itertools
import math
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads: no traceback

# Idle OpenMP threads that spin make a step up to 20 times slower on a shared machine. Read
# once, when torch loads; the third is what torch asks for to be deterministic on CUDA.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import msgspec  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import yaml  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from tqdm import tqdm  # noqa: E402

# ----------------------------------------------------------------------------------------------
# 1. Config: keys and values -> one frozen, checked Config
# ----------------------------------------------------------------------------------------------

ROOT = Path(__file__).resolve().parent
SHIPPED = ROOT / "config.yaml"
SCHEMA = "jointgrad/3"
MODES = ("detect", "classify",  # one task alone
         "fixed", "equal", "gradnorm", "dual",  # the report's weights, (1, 1), its two remedies
         "uncertainty", "pcgrad", "imtl", "mgda", "cap", "detach")  # other remedies, one trunk

class UserError(ValueError):
    """A mistake in the user's input: what was found, where, what was expected, the remedy."""

Side = Annotated[float, msgspec.Meta(ge=0.1, le=1e6)]  # px
Size = tuple[Side, Side]  # width, height

@dataclass(frozen=True)
class Config:
    """Every setting with its type; values, ranges and meaning stand in config.yaml alone."""
    mode: Literal[MODES]
    data: str
    init: str
    seed: int
    device: Annotated[str, msgspec.Meta(pattern=r"^(auto|cpu|mps|cuda|(cuda:)?\d+)$")]
    threads: int
    amp: Literal["none", "bf16"]
    initial_weights: tuple[float, float]
    alpha: float
    gradnorm_lr: float
    w_min: float
    cap: float
    imgsz: Annotated[int, msgspec.Meta(multiple_of=32)]
    cache_mb: float
    flip_x: float
    flip_y: float
    scale: float
    shift: float
    anchors: Literal["auto"] | tuple[(tuple[Size, Size, Size],) * 3]
    anchor_thres: float
    conf_thres: float
    iou_thres: float
    max_det: int
    width_multiple: float
    depth_multiple: float
    dual_width_multiple: float
    dropout: float
    box_gain: float
    obj_gain: float
    cls_gain: float
    det_loss_times_batch: bool
    class_balance: bool
    epochs: int
    batch_size: int
    optimizer: Literal["adamw", "sgd"]
    lr: float
    dual_lr: float
    betas: tuple[float, float]
    momentum: float
    weight_decay: float
    warmup: float
    grad_clip: float
    progressive_share: float
    progressive_scale: float
    eval_interval: int
    dominance: float
    train_images: int
    val_images: int
    predict_conf: float
    predict_iou: float

    @property
    def tasks(self):
        return {"detect": ("det",), "classify": ("cls",)}.get(self.mode, ("det", "cls"))

    @property
    def weights(self):
        """The loss weights at step 0, one for each of `tasks`."""
        if self.mode in ("fixed", "gradnorm"):
            return self.initial_weights
        return (1.0,) * len(self.tasks)

# ----------------------------------------------------------------------------------------------
# 2. Balancers: losses, norms at W -> task weights w; surgeries: products at W -> shares a
# ----------------------------------------------------------------------------------------------

class GradNorm:
    """Task weights w (T,) by Chen et al., ICML 2018; knows no network.

    Each step: train on sum(w_i L_i) with the present `w`, then `update(L, n)` gives the next.
    `w` starts as given; each update makes it sum to T. `L0`: the losses that progress is
    measured against, by default the first that are finite and positive.
    """
    def __init__(self, initial_weights, alpha=1.5, lr=0.025, w_min=0.001, L0=0.0, device="cpu",
                 dtype=torch.float32):
        self.w = torch.tensor(initial_weights, dtype=dtype, device=device)
        self.r = torch.ones_like(self.w)
        self.L0 = torch.zeros_like(self.w).copy_(torch.as_tensor(L0))  # (T,), 0: not seen yet
        self.alpha = alpha
        self.w_min = w_min
        self.adam = torch.optim.Adam([self.w], lr=lr, fused=True)

    @torch.no_grad()
    def update(self, L, n):
        """The next w (T,), from losses L (T,) and the norms n (T,) at W of their own gradients.

        Where a loss or a norm is 0 or not finite, w stays as it is. ValueError for other shapes
        and for a loss below 0, of which no training rate can be taken.
        """
        L = torch.as_tensor(L).to(self.w)
        n = torch.as_tensor(n).to(self.w)
        if not L.shape == n.shape == self.w.shape:
            raise ValueError(f"expected L and n of shape {tuple(self.w.shape)}, one value a "
                             f"task; found {tuple(L.shape)} and {tuple(n.shape)}")
        if (L < 0).any():
            raise ValueError(f"losses {L.tolist()}: one is below 0, so L / L(0) is no training "
                             "rate; expected losses with a lower bound of 0")
        usable = (L > 0) & L.isfinite()
        self.L0 = torch.where((self.L0 == 0) & usable, L, self.L0)
        # Departs from the paper (all batches have labels): without L or n w has no target.
        if not (usable & (n > 0) & n.square().isfinite()).all():  # Adam squares n
            return self.w.clone()
        T = len(self.w)
        G = self.w * n  # (T,), of the step just made; G to r: GradNorm, section 3.1
        G_bar = G.mean()
        L_tilde = L / self.L0  # (T,)
        self.r = L_tilde / L_tilde.mean()  # (T,), of mean 1
        target = G_bar * self.r**self.alpha  # (T,), eq. 1; a constant to the gradient
        self.w.grad = torch.sign(G - target) * n  # of L_grad = sum |G - target|, eq. 2
        self.adam.step()  # w, in place
        # Departs from the paper (w <- w T / sum(w)): because Adam can take w below 0.
        above = (self.w - self.w_min).clamp(min=1e-12)
        self.w.copy_(self.w_min + above * (T - T * self.w_min) / above.sum())
        return self.w.clone()  # of its own memory: the next update must not change a logged w

    def state_dict(self):
        return {"w": self.w.clone(), "L0": self.L0.clone(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state):
        self.w.copy_(state["w"])
        self.L0.copy_(state["L0"])
        self.adam.load_state_dict(state["adam"])

class Uncertainty(nn.Module):
    """Task weights w_i = exp(-s_i), where s minimises sum exp(-s_i) L_i + s_i (1705.07115).

    `update` leaves the gradient of s (T,); the network's own optimizer takes the step.
    """
    def __init__(self, initial_weights, device="cpu"):
        super().__init__()
        self.s = nn.Parameter(-torch.tensor(initial_weights, device=device).log())

    @property
    def w(self):
        return torch.exp(-self.s.detach())

    def update(self, L, n):
        self.s.grad = 1 - self.w * L  # of exp(-s_i) L_i + s_i; n: not read

# The surgeries: gram (T, T) -> a (T,). The trunk follows sum a_i g_i; a head keeps its own g_i.
# gram[i, j] is the inner product of g_i and g_j, so its diagonal holds the squared norms.

def pcgrad(gram):
    """Each g_i less its projection on every g_j that it conflicts with, summed (2001.06782).

    Of two tasks a_j = 1 - min(g_1 g_2, 0) / |g_j|^2: without a conflict the plain sum.
    """
    mix = torch.eye(len(gram)).to(gram)  # row i: what is left of g_i, as shares of every g
    # Departs from the paper (an order drawn at random): so that two runs agree.
    for i, j in itertools.permutations(range(len(gram)), 2):
        conflict = (mix[i] @ gram[j]).clamp(max=0)
        mix[i, j] -= conflict / gram[j, j]
    return mix.sum(0)

def imtl(gram):
    """sum a_i g_i has the same projection on every g_i / |g_i|, sum a_i = 1 (IMTL-G, Liu 2021).

    Of two tasks a_i ~ 1 / |g_i|.
    """
    norms = gram.diagonal().sqrt()  # (T,)
    cosines = gram / (norms[:, None] * norms)  # (T, T)
    ridge = 1e-6 * torch.eye(len(gram)).to(gram)  # for gradients that are opposite or parallel
    of_unit = torch.linalg.solve(cosines + ridge, torch.ones_like(norms))  # (T,)
    a = of_unit / norms
    return a / a.sum()

def mgda(gram):
    """The convex combination sum a_i g_i of least norm (1810.04650, algorithm 2: Frank-Wolfe).

    Of two tasks one step is exact: a_1 = clip((|g_2|^2 - g_1 g_2) / |g_1 - g_2|^2, 0, 1).
    """
    T = len(gram)
    a = gram.new_full((T,), 1 / T)
    for _ in range(1 if T == 2 else 100):
        products = gram @ a  # (T,), of each g_i with the present combination
        i = products.argmin()  # towards g_i the norm falls most steeply
        norm = a @ products  # squared
        apart = norm + gram[i, i] - 2 * products[i]  # squared distance to g_i
        step = ((norm - products[i]) / apart.clamp(min=1e-30)).clamp(0, 1)
        a = a + step * (F.one_hot(i, T) - a)
    return a

def cap(gram, share):
    """No other task moves the trunk more than `share` times as much as the first one does.

    a_1 = 1, a_i = min(1, share |g_1| / |g_i|): it only ever reduces (2203.06801, strategy A).
    """
    norms = gram.diagonal().sqrt()  # (T,)
    a = (share * norms[0] / norms).nan_to_num(1).clamp(max=1)  # 0 / 0: nothing to cap
    a[0] = 1
    return a

SURGERIES = {"pcgrad": pcgrad, "imtl": imtl, "mgda": mgda, "cap": cap}

# ----------------------------------------------------------------------------------------------
# 3. Batches: one split in memory, seed -> shuffled, augmented batches
# ----------------------------------------------------------------------------------------------

NO_LABEL = -100  # an image without a class; cross_entropy's ignore_index
GREY = 114 / 255  # around an image, as in YOLOv5

class Batch(NamedTuple):
    """images (B, 3, H, W), targets (N, 6) image, class, cx cy w h in [0, 1], labels (B,)."""
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
    levels: tuple[float, float] | None = None  # that pixels of more than 8 bits were scaled by

    def __len__(self):
        return len(self.labels)

    @property
    def canvas(self):
        return self.pixels.shape[1:3]  # H, W in px

    def batch(self, indices, device="cpu"):
        """The images of these indices as float32 in [0, 1], in channels_last order."""
        indices = np.asarray(indices)
        rows = [np.insert(self.boxes[i], 0, b, axis=1) for b, i in enumerate(indices)]  # (n, 6)
        targets = torch.from_numpy(np.concatenate(rows).astype(np.float32)).to(device)
        labels = torch.tensor([self.labels[i] for i in indices], device=device)
        pixels = torch.from_numpy(self.pixels[indices]).to(device)  # uint8: a quarter to move
        return Batch(pixels.permute(0, 3, 1, 2).float().div_(255), targets, labels)

    def boxes_xyxy(self, i):
        """The boxes of image i (n, 4) in px of the canvas."""
        centre = self.boxes[i][:, 1:3]
        half = self.boxes[i][:, 3:] / 2
        return np.column_stack([centre - half, centre + half]) * (self.canvas[::-1] * 2)

def stream(purpose, *where):
    """A random stream for each purpose, seed, epoch, rank: resuming needs no state of it."""
    key = [("order", "augment", "dropout").index(purpose), *where]
    (seed,) = np.random.SeedSequence(key).generate_state(1, np.uint64).tolist()
    return torch.Generator().manual_seed(seed)

def epoch_order(count, config, epoch, world=1, rank=0):
    """The batches of an epoch as image indices, shuffled, one rank's share."""
    order = torch.randperm(count, generator=stream("order", config.seed, epoch, 0))
    # All ranks shuffle alike and take turns, round and round, so that their shares are equal.
    order = order.repeat(world)[rank::world][:math.ceil(count / world)]
    # One image is poor for BatchNorm and, where P5 is one cell, an error: a last one goes.
    return [indices for indices in order.split(config.batch_size) if len(indices) > 1]

def flip(batch, u, config):
    """Left-right where u[:, 0] < flip_x, up-down where u[:, 1] < flip_y; u (B, 2) in [0, 1)."""
    images = batch.images
    targets = batch.targets.clone()  # written in place
    owner = targets[:, 0].long()  # (N,) image of each box
    for axis, probability in enumerate((config.flip_x, config.flip_y)):
        flipped = u[:, axis] < probability
        images = torch.where(flipped[:, None, None, None], images.flip(3 - axis), images)
        centre = targets[:, 2 + axis]
        targets[:, 2 + axis] = torch.where(flipped[owner], 1 - centre, centre)
    return Batch(images, targets, batch.labels)

def move(batch, u, config):
    """Random zoom and shift by u (B, 3) in [0, 1); boxes less than a fifth in view go."""
    images, targets, labels = batch
    owner = targets[:, 0].long()  # (N,) image of each box
    signed = 2 * u - 1  # (B, 3) in -1 to 1: zoom, x, y
    zoom = 1 + config.scale * signed[:, :1]  # (B, 1)
    shift = config.shift * signed[:, 1:]  # (B, 2)
    theta = torch.zeros(len(images), 2, 3, device=images.device)  # output position -> source
    theta[:, 0, 0] = 1 / zoom[:, 0]  # zoomed in, the source is smaller
    theta[:, 1, 1] = 1 / zoom[:, 0]
    theta[:, :, 2] = -2 * shift / zoom  # 2: affine_grid counts from -1 to 1
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    images = F.grid_sample(images - GREY, grid, align_corners=False) + GREY  # beyond it: grey
    centre = (targets[:, 2:4] - 0.5) * zoom[owner] + 0.5 + shift[owner]  # theta, inverted
    size = targets[:, 4:] * zoom[owner]
    low = (centre - size / 2).clamp(0, 1)
    high = (centre + size / 2).clamp(0, 1)
    in_view = (high - low).prod(1) > 0.2 * size.prod(1)  # YOLOv5: a tenth
    targets = torch.cat([targets[:, :2], (low + high) / 2, high - low], 1)
    return Batch(images, targets[in_view], labels)

def augment(batch, config, rng):
    """Random flips, zoom and shift, as the config has them."""
    u = torch.rand(len(batch.images), 5, generator=rng).to(batch.images.device)  # any device's
    batch = flip(batch, u[:, :2], config)
    if config.scale == config.shift == 0:  # spares a resampling that would change nothing
        return batch
    return move(batch, u[:, 2:], config)

# ----------------------------------------------------------------------------------------------
# 4. Boxes: overlap, anchors, raw maps -> boxes, non-maximum suppression
# ----------------------------------------------------------------------------------------------

STRIDES = (8, 16, 32)  # px between neighbouring cells of P3, P4, P5

def cxcywh_to_xyxy(boxes):
    centre = boxes[..., :2]
    half = boxes[..., 2:] / 2
    return torch.cat([centre - half, centre + half], -1)

def box_iou(a_xyxy, b_xyxy):
    """Intersection over union (N, M) of all pairs of boxes (N, 4) and (M, 4)."""
    a = a_xyxy[:, None]  # (N, 1, 4)
    b = b_xyxy[None]  # (1, M, 4)
    sides = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])  # (N, M, 2)
    overlap = sides.clip(0).prod(-1)  # sides below 0: boxes apart
    area = (a[..., 2:] - a[..., :2]).prod(-1) + (b[..., 2:] - b[..., :2]).prod(-1)  # of both
    return overlap / (area - overlap + 1e-7)

def ciou(a_cxcywh, b_cxcywh):
    """Complete IoU (K,) of pairs (K, 4): IoU - distance^2 / diagonal^2 - trade_off v."""
    a = cxcywh_to_xyxy(a_cxcywh)  # (K, 4) x1 y1 x2 y2
    b = cxcywh_to_xyxy(b_cxcywh)
    sides = torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])  # (K, 2)
    overlap = sides.clamp(min=0).prod(1)
    iou = overlap / (a_cxcywh[:, 2:].prod(1) + b_cxcywh[:, 2:].prod(1) - overlap + 1e-7)
    hull = torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])  # (K, 2) w h
    distance = (a_cxcywh[:, :2] - b_cxcywh[:, :2]).square().sum(1)  # (K,), squared
    angle_a = torch.atan(a_cxcywh[:, 2] / a_cxcywh[:, 3])
    angle_b = torch.atan(b_cxcywh[:, 2] / b_cxcywh[:, 3])
    v = 4 / math.pi**2 * (angle_a - angle_b).square()
    trade_off = (v / (1 - iou + v + 1e-7)).detach()  # the paper's alpha: has no gradient
    return iou - distance / (hull.square().sum(1) + 1e-7) - trade_off * v

def fit_anchors(sizes):
    """Anchors (3 levels, 3, 2) px, smallest first: k-means of box sizes (n, 2) px."""
    # From quantiles of the area, not random boxes: no seed, and every size has a centre nearby.
    sizes = sizes[np.argsort(sizes.prod(1), kind="stable")]  # equal areas keep their order
    centres = sizes[np.linspace(0, len(sizes) - 1, 19).astype(int)[1::2]]  # (9, 2) px
    for _ in range(50):
        owner = ((sizes[:, None] - centres)**2).sum(2).argmin(1)  # (n,), the nearest centre
        for k in range(9):
            members = sizes[owner == k]
            if len(members):  # a centre without boxes stays where it is
                centres[k] = members.mean(0)
    return centres[np.argsort(centres.prod(1), kind="stable")].clip(min=2).reshape(3, 3, 2)

def flatten_levels(raw):
    """Predictions (B, A, 5 + C) of maps (B, 3 (5 + C), h, w): by level, row, cell, anchor."""
    flat = []
    for level in raw:
        B, _, h, w = level.shape
        flat.append(level.permute(0, 2, 3, 1).reshape(B, h * w * 3, -1))  # a map has 3 (5 + C)
    return torch.cat(flat, 1)

def prediction_grid(raw, anchors):
    """Cell (A, 2) as x, y, anchor (A, 2) px, stride (A, 1) px of each prediction."""
    of_level = []
    for level, level_anchors, stride in zip(raw, anchors, STRIDES):
        places = torch.ones(*level.shape[2:], 3, device=level.device)  # (h, w, 3)
        y, x, anchor = places.nonzero(as_tuple=True)  # (3 h w,) each
        cell = torch.stack([x, y], 1)
        of_level.append((cell, level_anchors[anchor], torch.full_like(x, stride)[:, None]))
    return [torch.cat(levels) for levels in zip(*of_level)]

def decode(logits, cell, anchor, stride):
    """cx cy w h (..., 4) px: xy = (2 sigmoid - .5 + cell) stride, wh = (2 sigmoid)^2 anchor."""
    p = 2 * logits[..., :4].sigmoid()  # 0 to 2: xy reach half a cell beyond, wh 4 anchors
    return torch.cat([(p[..., :2] - 0.5 + cell) * stride, p[..., 2:].square() * anchor], -1)

def suppress(boxes_xyxy, iou_thres, max_det):
    """Indices (<= max_det) of boxes (n, 4), best first, that no kept one overlaps more."""
    kept = []
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

def find_boxes(raw, anchors, config):
    """Detections of each image: (n, 6) x1 y1 x2 y2 px, score, class; best first, max_det."""
    logits = flatten_levels(raw)  # (B, A, 5 + C)
    num_classes = logits.shape[2] - 5
    boxes = cxcywh_to_xyxy(decode(logits, *prediction_grid(raw, anchors)))  # (B, A, 4) px
    scores = (logits[..., 4:5].sigmoid() * logits[..., 5:].sigmoid()).flatten(1)  # (B, A C)
    found = []
    for boxes_i, scores_i in zip(boxes, scores):
        candidates = (scores_i > config.conf_thres).nonzero()[:, 0]
        most = min(30_000, len(candidates))  # as many as YOLOv5
        best, order = scores_i[candidates].topk(most)
        place = candidates[order]  # of A C
        classes = place % num_classes
        rows = torch.column_stack([boxes_i[place // num_classes], best, classes]).cpu().numpy()
        apart = rows[:, :4] + 1e6 * rows[:, 5:].astype(float)  # px: classes never overlap
        found.append(rows[suppress(apart, config.iou_thres, config.max_det)])
    return found

# ----------------------------------------------------------------------------------------------
# 5. Model: images -> P3, raw detection maps, class logits
# ----------------------------------------------------------------------------------------------

class Conv1x1(nn.Conv2d):
    """A 1x1 convolution of stride 1 as a matrix product: a step then takes 0.86 of the time."""
    def forward(self, x):
        places = x.permute(0, 2, 3, 1)  # (B, h, w, c_in): a view of channels_last order
        return F.linear(places, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)

class Conv(nn.Sequential):
    """Convolution, BatchNorm, SiLU."""
    def __init__(self, c_in, c_out, kernel=1, stride=1):
        kind = Conv1x1 if kernel == 1 else nn.Conv2d
        super().__init__(kind(c_in, c_out, kernel, stride, (kernel - 1) // 2, bias=False),
                         nn.BatchNorm2d(c_out, eps=1e-3), nn.SiLU())  # in place costs a copy

class Bottleneck(nn.Module):
    """A 1x1 and a 3x3 convolution, around them a shortcut if wanted."""
    def __init__(self, c, shortcut):
        super().__init__()
        self.cv1 = Conv(c, c)
        self.cv2 = Conv(c, c, 3)
        self.shortcut = shortcut

    def forward(self, x):
        y = self.cv2(self.cv1(x))
        return x + y if self.shortcut else y

class C3(nn.Module):
    """Two 1x1 branches of half the channels, one through n bottlenecks, joined by a third."""
    def __init__(self, c_in, c_out, n=1, shortcut=True):
        super().__init__()
        half = c_out // 2
        self.cv1 = Conv(c_in, half)
        self.cv2 = Conv(c_in, half)
        self.cv3 = Conv(c_out, c_out)
        self.m = nn.Sequential(*(Bottleneck(half, shortcut) for _ in range(n)))

    def forward(self, x):
        return self.cv3(torch.cat([self.m(self.cv1(x)), self.cv2(x)], 1))

class SPPF(nn.Module):
    """Spatial pyramid pooling: the map beside its 5, 9, 13 cell maxima, by pools in a row."""
    def __init__(self, c):
        super().__init__()
        self.cv1 = Conv(c, c // 2)
        self.cv2 = Conv(2 * c, c)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x):
        maps = [self.cv1(x)]
        for _ in range(3):
            maps.append(self.pool(maps[-1]))  # 5 cells, then 5 + 4, then 5 + 4 + 4
        return self.cv2(torch.cat(maps, 1))

def channels(c, width_multiple):
    return math.ceil(c * width_multiple / 8) * 8  # multiples of 8, as in YOLOv5

def repeats(n, depth_multiple):
    return max(1, round(n * depth_multiple))

class Trunk(nn.Sequential):
    """Stem to P3: images (B, 3, H, W) -> (B, c_out, H/8, W/8); what a network's tasks share."""
    def __init__(self, width_multiple, depth_multiple):
        c1, c2, c3 = (channels(c, width_multiple) for c in (64, 128, 256))
        super().__init__(
            Conv(3, c1, 6, 2),  # H/2
            Conv(c1, c2, 3, 2),  # H/4
            C3(c2, c2, repeats(3, depth_multiple)),
            Conv(c2, c3, 3, 2),  # H/8
            C3(c3, c3, repeats(6, depth_multiple)))
        self.c_out = c3

    @property
    def W(self):
        """The kernel of the last convolution, where the tasks' gradients are compared."""
        return self[-1].cv3[0].weight  # (c_out, c_out, 1, 1)

class SqueezeExcite(nn.Module):
    """Scales each channel by all channels' pooled values (1709.01507; by 4, there by 16)."""
    def __init__(self, c, pools=(torch.mean,)):
        super().__init__()
        few = max(4, c // 4)
        self.pools = pools
        self.mlp = nn.Sequential(nn.Conv2d(c, few, 1), nn.ReLU(), nn.Conv2d(few, c, 1))

    def forward(self, x):
        return x * sum(self.mlp(pool(x, (2, 3), keepdim=True)) for pool in self.pools).sigmoid()

class CBAM(nn.Module):
    """Channel attention by mean and maximum, then spatial attention (arXiv 1807.06521)."""
    def __init__(self, c):
        super().__init__()
        self.channel = SqueezeExcite(c, (torch.mean, torch.amax))
        self.spatial = nn.Conv2d(2, 1, 7, padding=3, bias=False)

    def forward(self, x):
        x = self.channel(x)
        pooled = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * self.spatial(pooled).sigmoid()

def add_attention(trunk):
    """Puts SE after the first C3, CBAM after the second, for dual's classification network."""
    trunk.insert(3, SqueezeExcite(trunk[2].cv3[0].out_channels))
    return trunk.append(CBAM(trunk.c_out))  # no W: this trunk is not shared

class DetectionHead(nn.Module):
    """P3 -> raw maps (B, 3 (5 + C), h, w) of P3 to P5: rest of the backbone, PANet, Detect."""
    def __init__(self, num_classes, anchors, width_multiple, depth_multiple):
        super().__init__()
        c3, c4, c5 = (channels(c, width_multiple) for c in (256, 512, 1024))
        n = repeats(3, depth_multiple)
        self.p4 = nn.Sequential(Conv(c3, c4, 3, 2), C3(c4, c4, repeats(9, depth_multiple)))
        self.p5 = nn.Sequential(Conv(c4, c5, 3, 2), C3(c5, c5, n), SPPF(c5))
        self.lateral5 = Conv(c5, c4)
        self.up4 = C3(2 * c4, c4, n, shortcut=False)
        self.lateral4 = Conv(c4, c3)
        self.up3 = C3(2 * c3, c3, n, shortcut=False)
        self.down3 = Conv(c3, c3, 3, 2)
        self.out4 = C3(2 * c3, c4, n, shortcut=False)
        self.down4 = Conv(c4, c4, 3, 2)
        self.out5 = C3(2 * c4, c5, n, shortcut=False)
        c_out = 3 * (5 + num_classes)
        self.detect = nn.ModuleList(nn.Conv2d(c, c_out, 1) for c in (c3, c4, c5))
        self.register_buffer("anchors", torch.as_tensor(anchors, dtype=torch.float32))  # px
        for conv, stride in zip(self.detect, STRIDES):  # prior: 8 objects in a 640 px image
            bias = conv.bias.data.view(3, -1)  # (3, 5 + C), a view: the sums reach conv.bias
            bias[:, 4] += math.log(8 / (640 / stride)**2)
            bias[:, 5:] += math.log(0.6 / (num_classes - 0.99999))  # not 1: C may be 1

    def forward(self, P3):
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
    def __init__(self, c_in, num_labels, dropout):
        super().__init__()
        self.conv = Conv(c_in, 2 * c_in)
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(2 * c_in, num_labels)

    def forward(self, P3):
        return self.linear(self.dropout(self.conv(P3).mean((2, 3))))

class JointNet(nn.Module):
    """A trunk and the heads of one task or more, cut at P3."""
    def __init__(self, trunk, heads, detach=False):
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ModuleDict(heads)
        self.detach = detach  # only the first head's gradient enters the trunk

    def forward(self, images):
        """P3, the leaf that each head reads in its place, and each task's raw output."""
        P3 = self.trunk(images)
        cuts = [P3.detach().requires_grad_(P3.requires_grad) for _ in self.heads]
        outputs = {task: head(cut) for (task, head), cut in zip(self.heads.items(), cuts)}
        return P3, cuts, outputs

class Network(nn.Module):
    """One JointNet, or for `dual` one a task."""
    def __init__(self, config, num_classes, num_labels, anchors):
        super().__init__()
        width = config.width_multiple
        depth = config.depth_multiple
        dual = config.mode == "dual"
        trunk = Trunk(width, depth)
        cls_trunk = add_attention(Trunk(config.dual_width_multiple, depth)) if dual else trunk
        heads = {}
        if "det" in config.tasks:
            heads["det"] = DetectionHead(num_classes, anchors, width, depth)
        if "cls" in config.tasks:
            heads["cls"] = ClassificationHead(cls_trunk.c_out, num_labels, config.dropout)
        if dual:
            parts = [JointNet(trunk, {"det": heads["det"]}),
                     JointNet(cls_trunk, {"cls": heads["cls"]})]
        else:
            parts = [JointNet(trunk, heads, config.mode == "detach")]
        self.parts = nn.ModuleList(parts)

    @property
    def anchors(self):
        """(3 levels, 3, 2) px, of a network that detects."""
        return self.parts[0].heads["det"].anchors

    @torch.no_grad()  # `backward` trains the parts: here gradients would end at the cut
    def forward(self, images):
        """Raw output of each task for images (B, 3, H, W), to evaluate: without a graph."""
        outputs = {}
        for part in self.parts:
            outputs |= part(images)[2]
        return outputs

# ----------------------------------------------------------------------------------------------
# 6. Losses: raw outputs and a batch -> one scalar a task
# ----------------------------------------------------------------------------------------------

class Match(NamedTuple):
    """K pairs of a target and a prediction; all (K,) but cell (K, 2)."""
    target: Tensor  # row of targets
    level: Tensor
    anchor: Tensor  # index within the level
    cell: Tensor  # x, y
    index: Tensor  # row of flatten_levels

def match_targets(targets, shapes, anchors, anchor_thres):
    """Pairs each target (N, 6) with anchors of like size, in its cell and its two neighbours.

    shapes: (h, w) of the three levels; anchors: (3 levels, 3, 2) px.
    """
    device = targets.device
    sizes = torch.tensor([(w, h) for h, w in shapes], device=device)  # (levels, 2)
    centre = targets[None, :, 2:4] * sizes[:, None]  # (levels, N, 2) in cells
    wh = targets[:, 4:6] * sizes[0] * STRIDES[0]  # (N, 2) px
    ratio = wh / anchors[:, :, None]  # (levels, 3, N, 2)
    alike = torch.maximum(ratio, 1 / ratio).amax(-1) < anchor_thres  # (levels, 3, N)
    # A neighbour counts where its side is less than half a cell away, and not the map's border.
    to_side = torch.cat([centre, sizes[:, None] - centre], 2)  # (levels, N, 4) from x1 y1 x2 y2
    near = ((to_side % 1 < 0.5) & (to_side > 1)).permute(2, 0, 1)  # (4, levels, N)
    near = torch.cat([torch.ones_like(near[:1]), near])  # (5, levels, N), the own cell first
    offsets = torch.tensor([[0, 0], [0.5, 0], [0, 0.5], [-0.5, 0], [0, -0.5]], device=device)
    pairs = near[:, :, None] & alike  # (5 offsets, levels, 3 anchors, N)
    offset, level, anchor, target = pairs.nonzero(as_tuple=True)  # (K,) each
    cell = (centre[level, target] - offsets[offset]).long()
    cell = torch.minimum(cell, sizes[level] - 1)  # a centre on the far border
    counts = sizes.prod(1) * 3  # (levels,) rows of each
    start = counts.cumsum(0) - counts
    in_level = (cell[:, 1] * sizes[level, 0] + cell[:, 0]) * 3 + anchor
    return Match(target, level, anchor, cell, in_level + start[level])

cross_entropies = partial(F.binary_cross_entropy_with_logits, reduction="none")

class DetectionLoss:
    """YOLOv5's loss of raw maps: 1 - CIoU of the matches, objectness towards CIoU, class."""
    def __init__(self, anchors, num_classes, config):
        self.anchors = anchors
        self.config = config
        # YOLOv5's gains hold at 640 px and for COCO's 80 classes.
        self.obj_gain = config.obj_gain * (config.imgsz / 640)**2
        self.cls_gain = config.cls_gain * num_classes / 80

    def __call__(self, raw, batch):
        predictions = flatten_levels(raw).float()  # (B, A, 5 + C)
        targets = batch.targets
        shapes = [tuple(level.shape[2:]) for level in raw]
        match = match_targets(targets, shapes, self.anchors, self.config.anchor_thres)
        image = targets[match.target, 0].long()
        matched = predictions[image, match.index]  # (K, 5 + C)
        predicted = decode(matched, match.cell, self.anchors[match.level, match.anchor],
                           8 * 2**match.level[:, None])  # (K, 4) px; stride (K, 1)
        size = targets.new_tensor([shapes[0][1], shapes[0][0]] * 2) * STRIDES[0]  # W H W H px
        iou = ciou(predicted, targets[match.target, 2:] * size)
        # 1 / matches of its level: a sum of shares is the sum of the three levels' means.
        share = 1 / match.level.bincount(minlength=3)[match.level]  # (K,)
        box = ((1 - iou) * share).sum()
        obj = self.objectness(predictions[..., 4], image, match.index, iou, shapes)
        loss = self.config.box_gain * box + self.obj_gain * obj
        num_classes = matched.shape[1] - 5
        if num_classes > 1:  # with one class, objectness says it all
            one_hot = F.one_hot(targets[match.target, 1].long(), num_classes).to(matched)
            cls = cross_entropies(matched[:, 5:], one_hot).mean(1)  # (K,)
            loss = loss + self.cls_gain * (cls * share).sum()
        return loss * len(batch.images) if self.config.det_loss_times_batch else loss

    def objectness(self, logits, image, index, iou, shapes):
        """Cross-entropy of logits (B, A) towards the CIoU of the matches (K,), else to 0."""
        B, A = logits.shape
        # Departs from YOLOv5 (the last match of a cell counts): because amax knows no order.
        goal = iou.new_zeros(B * A).scatter_reduce(
            0, image * A + index, iou.detach().clamp(min=0), "amax")
        of_row = cross_entropies(logits, goal.view(B, A)).mean(0)  # (A,)
        levels = of_row.split([h * w * 3 for h, w in shapes])
        # A mean each, with YOLOv5's weights: P3 has most of the cells.
        return sum(weight * level.mean() for weight, level in zip((4.0, 1.0, 0.4), levels))

def classification_loss(logits, batch, class_weights):
    """Cross-entropy, weighted mean over the images that have a class; 0 where none has."""
    total = F.cross_entropy(logits.float(), batch.labels, class_weights, ignore_index=NO_LABEL,
                            reduction="sum")  # a mean over none is NaN
    known = batch.labels != NO_LABEL  # -100 is no index: hence the clamp, then the mask
    return total / (class_weights[batch.labels.clamp(min=0)] * known).sum().clamp(min=1e-9)

def make_losses(network, train_set, config):
    """The loss of each task: raw output, batch -> scalar."""
    losses = {}
    if "det" in config.tasks:
        losses["det"] = DetectionLoss(network.anchors, len(train_set.names), config)
    if "cls" in config.tasks:
        C = len(train_set.classification_names)
        weights = np.ones(C)
        if config.class_balance:  # N / (C n_k): a mean of 1 over the images
            labels = [k for k in train_set.labels if k != NO_LABEL]
            weights = len(labels) / (C * np.bincount(labels, minlength=C).clip(1))
        device = next(network.parameters()).device
        weights = torch.tensor(weights, dtype=torch.float32, device=device)  # (C,)
        losses["cls"] = partial(classification_loss, class_weights=weights)
    return losses

# ----------------------------------------------------------------------------------------------
# 7. Step: one batch -> each task's gradient at W, and the gradients of sum(w_i L_i)
# ----------------------------------------------------------------------------------------------

class Signals(NamedTuple):
    """What a backward pass tells; all but L are None unless two tasks train the trunk."""
    L: Tensor  # losses (T,)
    n: Tensor | None = None  # norms (T,) at W of the unweighted losses' gradients
    gram: Tensor | None = None  # inner products (T, T) at W of the gradients of w_i L_i
    a: Tensor | None = None  # share (T,) of each that the trunk follows; None without a surgery

def mean_over_ranks(x):
    """Averages x, in place, over the processes of a distributed run; one process: as it is."""
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(x)
        x /= torch.distributed.get_world_size()
    return x

def similarities(gram):
    """Cosine and magnitude similarity 2ab / (a^2 + b^2) of gram (..., T, T): pairs' means."""
    T = gram.shape[-1]
    aa = gram.diagonal(dim1=-2, dim2=-1)[..., None]  # (..., T, 1), squared norms
    bb = aa.mT  # (..., 1, T)
    ab = (aa * bb).sqrt()  # (..., T, T)
    cosine = gram / ab.clamp(min=1e-30)
    similarity = 2 * ab / (aa + bb).clamp(min=1e-30)
    above = torch.stack([cosine, similarity]).triu(1)  # each pair once
    return (above.sum((-2, -1)) / (T * (T - 1) / 2)).unbind()

def shares(gram, surgery):
    """The surgery's a (T,); ones where a task has no gradient, or none that is finite."""
    a = surgery(gram)
    usable = (gram.diagonal() > 0).all() & a.isfinite().all()
    return torch.where(usable, a, torch.ones_like(a))

def backward(part, batch, losses, w, autocast=contextlib.nullcontext(), surgery=None):
    """Leaves the gradient of sum(w_i L_i) in the parameters' .grad; returns what it saw.

    With a surgery the trunk follows sum a_i g_i, g_i the gradient of w_i L_i at P3.
    """
    # 1. The graph is cut at P3: each weighted loss goes back to a leaf of its own, its g_i.
    with autocast:  # of the forward pass alone: the products below need their digits
        P3, cuts, outputs = part(batch.images)  # P3, each cut: (B, c_out, H/8, W/8)
        L = torch.stack([losses[task](output, batch) for task, output in outputs.items()])
    (w * L).sum().backward()  # heads and w: in the order of the tasks
    L = mean_over_ranks(L.detach())
    g = [cut.grad for cut in cuts]
    if len(g) == 1 or part.detach:
        P3.backward(g[0])  # of one task, or of detection alone: the first head
        return Signals(L)
    # 2. Each g_i goes through the trunk's last layer alone: grad_W w_i L_i.
    W = part.trunk.W
    grad_W = [torch.autograd.grad(P3, W, g_i, retain_graph=True)[0].reshape(-1) for g_i in g]
    grad_W = mean_over_ranks(torch.stack(grad_W))  # before the norm: w is the same on all ranks
    # 3. One matrix holds their norms G_i and all their angles.
    gram = grad_W @ grad_W.T  # (T, T)
    n = gram.diagonal().sqrt() / w  # (T,): g_i carries w_i, n does not
    # 4. A surgery reads it, and says how much of each the trunk follows.
    a = None
    if surgery:
        a = shares(gram, surgery)
        g = [a_i * g_i for a_i, g_i in zip(a, g)]
    # 5. The trunk's backward is linear: one pass of the sum does for all tasks.
    P3.backward(sum(g[1:], g[0]))
    return Signals(L, n, gram, a)

# ----------------------------------------------------------------------------------------------
# 8. Metrics: network, data -> average precision, accuracy
# ----------------------------------------------------------------------------------------------

METRICS = ("mAP50", "mAP50-95", "accuracy", "balanced_accuracy")

def coco_rows(boxes):
    """COCO's rows (n, 7) image, x, y, w, h px, score, class of boxes (n, 6) an image.

    Each box: x1 y1 x2 y2 px, score, class.
    """
    rows = np.concatenate([np.insert(found, 0, i, axis=1) for i, found in enumerate(boxes)])
    rows[:, 3:5] -= rows[:, 1:3]  # x2, y2 -> w, h
    return rows

def average_precision(truth, found, num_classes, max_det):
    """COCO average precision (10, classes) at IoU 0.5, 0.55, … 0.95; NaN: no box of a class.

    truth, found: for each image (n, 6) x1 y1 x2 y2 px, score, class; the truth's score: unread.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval
    true_rows = coco_rows(truth)
    found_rows = coco_rows(found)
    if not len(true_rows) or not len(found_rows):  # pycocotools takes no empty list
        have = np.isin(np.arange(num_classes), true_rows[:, 6])
        return np.where(have, 0.0, np.nan)[None].repeat(10, 0)
    coco = COCO()
    coco.dataset = {"images": [{"id": i} for i in range(len(truth))],
                    "categories": [{"id": k} for k in range(num_classes)], "annotations": []}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its progress
        coco.createIndex()
        scorer = COCOeval(coco.loadRes(true_rows), coco.loadRes(found_rows), "bbox")
        scorer.params.areaRng = [[0, 1e10]]  # px^2: any size
        scorer.params.maxDets = [max_det]  # Departs from COCO (100): because YOLOv5 counts 300.
        scorer.evaluate()
        scorer.accumulate()
    precision = scorer.eval["precision"][:, :, :, 0, 0]  # (10, recalls, classes), -1: no box
    return np.where(precision[:, 0] < 0, np.nan, precision.mean(1))  # (10, C)

def detection_scores(found, data, max_det):
    """mAP50 and mAP50-95 of a split, where it has a box; AP50 of each class."""
    truth = [np.column_stack([data.boxes_xyxy(i), boxes[:, [0, 0]]])
             for i, boxes in enumerate(data.boxes)]
    ap = average_precision(truth, found, len(data.names), max_det)
    scores = {}
    have = ~np.isnan(ap[0])
    if have.any():
        scores["mAP50"] = float(ap[0, have].mean())
        scores["mAP50-95"] = float(ap[:, have].mean())
    return scores, dict(zip(data.names, ap[0].tolist()))

def classification_scores(guess, data):
    """Both accuracies of a split, where it has a class, and confusion (C, C); recall of each.

    guess: a class an image. The confusion has a row a class, a column a guess.
    """
    C = len(data.classification_names)
    labels = np.array(data.labels)
    places = (labels * C + guess)[labels != NO_LABEL]  # row * C + column of each image
    confusion = np.bincount(places, minlength=C * C).reshape(C, C)
    count = confusion.sum(1)  # (C,)
    right = confusion.diagonal()
    recall = np.where(count > 0, right / count.clip(1), np.nan)
    scores = {"confusion": confusion.tolist()}
    if count.any():
        scores["accuracy"] = float(right.sum() / count.sum())
        scores["balanced_accuracy"] = float(np.nanmean(recall))
    return scores, dict(zip(data.classification_names, recall.tolist()))

@torch.no_grad()
def evaluate(network, data, config):
    """METRICS of a split, None without labels; per_class; confusion (C, C), class by guess."""
    device = next(network.parameters()).device
    was_training = network.training
    network.eval()
    numbers = math.prod(data.canvas) // 16 * (5 + len(data.names))  # about an image's raw maps
    at_once = min(4 * config.batch_size, max(1, 2**26 // numbers))  # bounds the memory
    found = []
    guess = []
    for indices in torch.arange(len(data)).split(at_once):  # in order
        outputs = network(data.batch(indices, device).images)
        if "det" in outputs:
            found += find_boxes(outputs["det"], network.anchors, config)
        if "cls" in outputs:
            guess += outputs["cls"].argmax(1).tolist()
    network.train(was_training)
    metrics = dict.fromkeys(METRICS)
    per_class = {}
    if found:
        scores, per_class["AP50"] = detection_scores(found, data, config.max_det)
        metrics |= scores
    if guess:
        scores, per_class["accuracy"] = classification_scores(guess, data)
        metrics |= scores
    return metrics | {"per_class": per_class}

# ----------------------------------------------------------------------------------------------
# 9. Training: config, data -> a trained network, epoch by epoch
# ----------------------------------------------------------------------------------------------

def long_vector(members):
    """One vector that holds all of `members`, which become views of it, and so their gradients.

    An optimizer then has one tensor to work on, not a hundred: a default step is 6 % shorter.
    """
    starts = [0, *itertools.accumulate(math.ceil(p.numel() / 64) * 64 for p in members)]
    vector = nn.Parameter(members[0].new_zeros(starts[-1]))
    vector.grad = torch.zeros_like(vector)
    for p, start in zip(members, starts):  # each at 256 bytes, as CUDA's kernels need
        view = vector.detach().as_strided(p.shape, p.stride(), start)  # p's own strides
        p.data = view.copy_(p.data)
        p.grad = vector.grad.as_strided(p.shape, p.stride(), start)
    return vector

def make_optimizer(parameters, config, lr):
    """AdamW or SGD at the peak rate lr, weight decay on kernels alone, as in YOLOv5."""
    kernels = [p for p in parameters if p.ndim > 1]
    others = [p for p in parameters if p.ndim <= 1]
    groups = [{"params": [long_vector(kernels)], "weight_decay": config.weight_decay},
              {"params": [long_vector(others)], "weight_decay": 0.0}]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr, config.momentum, nesterov=True, fused=True)
    return torch.optim.AdamW(groups, lr, config.betas, fused=True)

def make_optimizers(network, config):
    """One a network; a detached head has its own, so that it does not clip the detector."""
    owners = network.parts
    rates = config.lr, config.dual_lr
    if config.mode == "detach":
        (part,) = network.parts
        owners = nn.ModuleList([part.trunk, part.heads["det"]]), part.heads["cls"]
        rates = config.lr, config.lr
    return [make_optimizer([*owner.parameters()], config, lr)
            for owner, lr in zip(owners, rates)]

def choose_anchors(train_set, config):
    """Anchors (3 levels, 3, 2) px: the config's, or fitted to the training boxes."""
    if config.anchors != "auto":
        return np.array(config.anchors)
    if "det" not in config.tasks:
        return np.ones((3, 3, 2))
    sizes = np.concatenate([boxes[:, 3:] for boxes in train_set.boxes])  # fractions
    return fit_anchors(sizes * train_set.canvas[::-1])  # w, h; the canvas is H, W

def learning_rate(progress, warmup):
    """Share of the peak rate at `progress` in [0, 1]: a linear rise, then a cosine to 1 %."""
    if progress < warmup:
        return progress / warmup
    done = (progress - warmup) / (1 - warmup + 1e-9)  # 1e-9: warmup may be 1
    return 0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2

class Run:
    """Everything that the rest of a run depends on."""
    def __init__(self, config, train_set, device):
        torch.manual_seed(config.seed)  # before the network draws its weights
        self.config = config
        self.device = device
        self.epoch = 0
        self.rows = []  # of the log, one a step
        num_labels = len(train_set.classification_names)
        anchors = choose_anchors(train_set, config)
        self.network = Network(config, len(train_set.names), num_labels, anchors)
        self.network.to(device, memory_format=torch.channels_last)
        self.losses = make_losses(self.network, train_set, config)  # after .to(): the anchors
        self.optimizers = make_optimizers(self.network, config)
        self.world = 1
        self.rank = 0
        if torch.distributed.is_initialized():
            self.world = torch.distributed.get_world_size()
            self.rank = torch.distributed.get_rank()
        bf16 = config.amp == "bf16"
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
        self.w = torch.tensor(config.weights, device=device)
        self.balancer = None
        if config.mode == "gradnorm":
            self.balancer = GradNorm(config.weights, config.alpha, config.gradnorm_lr,
                                     config.w_min, device=device)
        if config.mode == "uncertainty":
            self.balancer = Uncertainty(config.weights, device)
            s = {"params": [self.balancer.s], "weight_decay": 0.0}
            self.optimizers[0].add_param_group(s)
        self.surgery = SURGERIES.get(config.mode)
        if config.mode == "cap":
            self.surgery = partial(cap, share=config.cap)

def train_step(run, batch, progress, backward=backward):  # data/bench.py times others
    """One step of every network and of the balancer; what the log needs, still as tensors."""
    rate = learning_rate(progress, run.config.warmup)
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = optimizer.defaults["lr"] * rate  # the default stays at the peak
        optimizer.zero_grad(set_to_none=False)
    weights = run.w.split([len(part.heads) for part in run.network.parts])
    signals = [backward(part, batch, run.losses, w, run.autocast, run.surgery)
               for part, w in zip(run.network.parts, weights)]
    L = torch.cat([signal.L for signal in signals])
    shared = signals[0]  # the trunk's: dual shares none
    log = {"L": L, "w": run.w}
    if shared.gram is not None:
        log |= {"G": run.w * shared.n, "gram": shared.gram}
    if shared.a is not None:
        log["a"] = shared.a
    if run.balancer:
        run.balancer.update(L, shared.n)
    grad_norms = []
    for optimizer in run.optimizers:
        owned = [p for group in optimizer.param_groups for p in group["params"]]
        for p in owned:  # each rank had other images; all began alike, and so stay alike
            mean_over_ranks(p.grad)
        grad_norms.append(nn.utils.clip_grad_norm_(owned, run.config.grad_clip))
        optimizer.step()
    log["grad_norm"] = torch.stack(grad_norms).max()  # before clipping
    if run.balancer:
        run.w = run.balancer.w.clone()  # the next step's
    if run.config.mode == "gradnorm":
        log["r"] = run.balancer.r
    return log

def log_rows(steps, tasks):
    """What `train_step` returned, a row of numbers a step: one wait for the GPU, not many."""
    table = {key: torch.stack([step[key] for step in steps]) for key in steps[0]}
    if "gram" in table:
        table["cosine"], table["similarity"] = similarities(table.pop("gram"))
    table["loss"] = (table["w"] * table["L"]).sum(1)
    columns = {}
    for key, values in table.items():
        if values.ndim == 1:  # (steps,)
            columns[key] = values
        else:  # (steps, T)
            columns |= {f"{key}/{task}": of_task for task, of_task in zip(tasks, values.T)}
    return [dict(zip(columns, row)) for row in torch.stack(list(columns.values()), 1).tolist()]

def check_finite(rows):
    """FloatingPointError with step, quantities and w of the first row that is not finite."""
    for row in rows:
        bad = [key for key, value in row.items() if not math.isfinite(value)]
        if bad:
            w = [f"{key} = {value:.4g}" for key, value in row.items() if key.startswith("w/")]
            raise FloatingPointError(f"step {row['step']}: {', '.join(bad)} not finite "
                                     f"({', '.join(w)}); lower lr")

def smaller(images, scale):
    """The images at about `scale` of their size, sides in multiples of 32 px."""
    size = [max(32, round(side * scale / 32) * 32) for side in images.shape[2:]]
    images = F.interpolate(images, size, mode="bilinear", antialias=True)
    return images.contiguous(memory_format=torch.channels_last)

def epoch_batches(run, train_set):
    """The rank's batches of the next epoch, shuffled and augmented, in channels_last order."""
    config = run.config
    rng = stream("augment", config.seed, run.epoch, run.rank)
    for indices in epoch_order(len(train_set), config, run.epoch, run.world, run.rank):
        batch = augment(train_set.batch(indices, run.device), config, rng)
        images = batch.images.contiguous(memory_format=torch.channels_last)
        yield batch._replace(images=images)

@torch.no_grad()
def estimate_statistics(run, train_set):
    """Sets BatchNorm's running statistics to those of the next epoch's first 512 images.

    As training leaves them they lag behind the weights: at epoch 9 of 54 the detector scores
    0.02 with them, 0.31 with these. No step of training reads them. The images are augmented,
    as those that trained the weights: without, a zoomed and shifted set scores 0.03 lower.
    """
    network = run.network
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    network.eval()  # no dropout, which would draw from the training's random stream
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over the batches
        norm.train()
    batches = math.ceil(512 / run.config.batch_size)
    for batch in itertools.islice(epoch_batches(run, train_set), batches):
        network(batch.images)
    for norm in norms:
        norm.momentum = 0.1  # torch's own: forgotten by the next estimate
    network.train()

def train_epoch(run, train_set, count, bar):
    """One pass over the training split: `count` rows, one a step, or FloatingPointError."""
    config = run.config
    started = time.perf_counter()
    cpu = time.process_time()
    # Dropout draws from torch's own stream.
    torch.manual_seed(stream("dropout", config.seed, run.epoch, run.rank).initial_seed())
    first_epochs = round(config.progressive_share * config.epochs)
    small = config.mode == "dual" and run.epoch < first_epochs
    steps = []
    for k, batch in enumerate(epoch_batches(run, train_set)):
        if small:  # targets are fractions: they hold at any size
            batch = batch._replace(images=smaller(batch.images, config.progressive_scale))
        steps.append(train_step(run, batch, (run.epoch + k / count) / config.epochs))
        bar.update()
    rows = [{"step": run.epoch * count + k, "epoch": run.epoch} | row
            for k, row in enumerate(log_rows(steps, config.tasks))]
    check_finite(rows)
    rows[-1]["time"] = {"train_s": time.perf_counter() - started,
                        "train_cpu_s": time.process_time() - cpu}
    return rows

def train(run, train_set, val_set):
    """Trains to the last epoch; yields after each: its rows in run.rows, metrics where due."""
    config = run.config
    steps = len(epoch_order(len(train_set), config, 0, run.world, run.rank))
    if not steps:
        raise UserError("train: fewer than two images a process; use fewer processes")
    quiet = True if run.rank > 0 else None  # None: a bar where there is a terminal
    with tqdm(total=config.epochs * steps, initial=run.epoch * steps, unit="step", leave=False,
              desc=config.mode, disable=quiet) as bar:
        while run.epoch < config.epochs:
            rows = train_epoch(run, train_set, steps, bar)
            run.epoch += 1  # before the yield: a checkpoint counts whole epochs
            run.rows += rows
            due = run.epoch % config.eval_interval == 0 or run.epoch == config.epochs
            if due and run.rank == 0:
                started = time.perf_counter()
                estimate_statistics(run, train_set)
                rows[-1]["val"] = evaluate(run.network, val_set, config)
                rows[-1]["time"]["eval_s"] = time.perf_counter() - started
            yield

# ----------------------------------------------------------------------------------------------
# 10. Built-in data: (seed, split, i) -> one echocardiogram-like frame, its jets and its view
# ----------------------------------------------------------------------------------------------

JETS = {"AR": 5, "MR": 230, "PR": 55, "TR": 160}  # leaking valve: hue of its Doppler, degrees
VIEWS = ("PSAX", "PLAX", "A4C")

def speckle(rng, shape, s, aspect=1):
    """Speckle (H, W) of mean 1: amplitude of blurred complex noise.

    The blur is a Gaussian of s px down the image, aspect * s across.
    """
    noise = rng.standard_normal((2, *shape))  # (2, H, W): real and imaginary part
    fy = np.fft.fftfreq(shape[0])[:, None]
    fx = np.fft.fftfreq(shape[1])
    blur = np.exp(-2 * np.pi**2 * (aspect * s * fx)**2) * np.exp(-2 * np.pi**2 * (s * fy)**2)
    amplitude = np.abs(np.fft.ifft2(np.fft.fft2(noise[0] + 1j * noise[1]) * blur))
    return amplitude / amplitude.mean()

def hsv_to_rgb(hue, saturation, value):
    """RGB (..., 3) in [0, 1] of hue in turns, saturation and value in [0, 1]."""
    sector = (np.array([5, 3, 1]) + 6 * hue[..., None]) % 6  # of red, green, blue
    ramp = np.clip(np.minimum(sector, 4 - sector), 0, 1)
    return value[..., None] * (1 - saturation * ramp)

def place_jets(rng, apex, radius, angle):
    """Up to three boxes (n, 4), cx cy w h in fractions, apart; angle: half of the sector's."""
    size = rng.uniform((0.14, 0.18), (0.30, 0.38), (300, 2))
    centre = rng.uniform(0.1, 0.95, (300, 2))
    size[200:] = 0.14, 0.18  # so that the narrowest sector too has room for one
    signs = np.array([[-1, -1], [1, -1], [-1, 1], [1, 1]])
    corners = centre[:, None] + signs * size[:, None] / 2  # (300, 4, 2)
    x, y = (corners - apex).transpose(2, 0, 1)  # (300, 4)
    inside = (np.hypot(x, y) < radius) & (np.abs(np.arctan2(x, y)) < angle)  # 0 = straight down
    inside &= (np.abs(corners - 0.5) < 0.5).all(2)  # a wide sector reaches beyond the frame
    wanted = rng.integers(1, 4)
    boxes = []
    for box in np.concatenate([centre, size], 1)[inside.all(1)]:  # (m, 4) cx cy w h
        if all((np.abs(box - b)[:2] > (box + b)[2:] / 2).any() for b in boxes):
            boxes.append(box)
        if len(boxes) == wanted:
            break
    return np.array(boxes).reshape(-1, 4)  # (0, 4) if none fits

def paint_jet(rng, image, box, hue):
    """Paints a Doppler plume that touches all sides of `box` (cx cy w h) into (H, W, 3)."""
    size = len(image)
    x1, y1 = np.floor((box[:2] - box[2:] / 2) * size).astype(int)  # px, outwards
    x2, y2 = np.ceil((box[:2] + box[2:] / 2) * size).astype(int)
    x = (np.arange(x1, x2) + 0.5)[None] / size  # (1, w)
    y = (np.arange(y1, y2) + 0.5)[:, None] / size  # (h, 1)
    q = 2 * (y - box[1]) / box[3] * rng.choice([-1, 1])  # (h, 1): -1 to 1, down or up the box
    u = 2 * (x - box[0]) / box[2] * math.sqrt(5 / 6)  # widest at q = 2/3: there at the sides
    width = np.sqrt(np.clip((q + 1) / 2, 0, 1) * np.clip(3 * (1 - q), 0, 1))
    core = np.clip(1 - np.abs(u) / np.maximum(width, 1e-6), 0, 1)  # (h, w)
    texture = speckle(rng, core.shape, 0.9 * size / 64)
    hues = (hue + 15 * (texture - 1)) % 360 / 360
    colour = hsv_to_rgb(hues, 0.85, np.clip(0.30 + 0.5 * core * texture, 0, 1))  # (h, w, 3)
    opacity = 0.9 * (np.abs(u) < width)[..., None]
    image[y1:y2, x1:x2] += opacity * (colour - image[y1:y2, x1:x2])

def synthetic_sample(seed, split, i, imgsz, c):
    """Frame i: pixels (H, W, 3) uint8, jets (n, 5) class cx cy w h in [0, 1], view 0 to 2.

    A pure function of its arguments. The dominance c moves the view's cue from the sector's
    angle (g) to the speckle's grain (t); their variances add up: the best accuracy is 0.970.
    """
    rng = np.random.default_rng([seed, ("train", "val").index(split), i])
    view = int(rng.integers(3))
    px = imgsz / 64
    g, t = np.sqrt([1 - c, c]) * (view - 1) + 0.25 * rng.standard_normal(2)
    apex = np.array([0.5, -0.02]) + rng.uniform((-0.04, -0.03), (0.04, 0.03))
    radius = rng.uniform(0.92, 1.04)  # fractions of the frame
    half_angle = 0.62 + 0.13 * g  # radians
    x = (np.arange(imgsz) + 0.5) / imgsz  # (W,), pixel centres
    y = x[:, None]  # (H, 1)
    across = np.abs(x - apex[0])
    down = y - apex[1]
    squared = across**2 + down**2  # (H, W), distance from the apex
    sector = (0.05**2 < squared) & (squared < radius**2)
    sector &= across < math.tan(half_angle) * down
    tissue = 0.16 + 0.10 * np.clip(speckle(rng, (imgsz, imgsz), 7 * px) - 0.6, 0, 2)
    for _ in range(rng.integers(1, 3)):  # dark chambers
        centre = rng.uniform((0.3, 0.3), (0.7, 0.8))
        axes = rng.uniform(0.06, 0.16, 2)
        tissue[((x - centre[0]) / axes[0])**2 + ((y - centre[1]) / axes[1])**2 < 1] *= 0.25
    grain = speckle(rng, (imgsz, imgsz), 0.9 * px * 1.4**t, 1.6)  # wider than deep
    luminance = tissue * grain * rng.uniform(0.8, 1.2) * (1 - 0.25 * y)  # weaker with depth
    image = np.repeat(luminance[..., None], 3, axis=2)
    boxes = place_jets(rng, apex, radius, half_angle)
    classes = rng.integers(0, len(JETS), len(boxes))
    for box, k in zip(boxes, classes):
        paint_jet(rng, image, box, list(JETS.values())[k])
    image = (image + rng.normal(0, 0.01, (imgsz, imgsz, 1))) * sector[..., None]
    pixels = np.round(255 * np.clip(image, 0, 1)**0.75).astype(np.uint8)
    return pixels, np.column_stack([classes, boxes]).astype(np.float32), view

def synthetic_split(config, split, count):
    samples = [synthetic_sample(config.seed, split, i, config.imgsz, config.dominance)
               for i in range(count)]
    pixels, boxes, labels = map(list, zip(*samples))
    return JointSet(np.stack(pixels), boxes, labels, list(JETS), list(VIEWS))

def room(name):
    """The module data/<name>.py beside this file, whatever else is named data, or None."""
    path = ROOT / "data" / f"{name}.py"
    if not path.exists():
        return None
    spec = importlib.util.spec_from_file_location(f"jointgrad_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

def load_data(config, folder=Path(".")):
    """The train and val splits that config.data names; folder: for what memory cannot hold."""
    if config.data == "synthetic":
        return (synthetic_split(config, "train", config.train_images),
                synthetic_split(config, "val", config.val_images))
    joint = room("joint")  # other people's files are read there alone
    if joint is None:
        raise UserError(f"--data {config.data}: data/joint.py, which reads it, is not beside "
                        "jointgrad.py; copy it there, or use --data synthetic")
    try:
        splits = joint.read_joint(
            Path(config.data), config.imgsz, config.tasks, config.cache_mb, folder)
    except joint.DataError as error:
        raise UserError(str(error)) from error
    sets = []
    for split in splits:
        labels = [NO_LABEL if label is None else label for label in split.labels]
        sets.append(JointSet(**split._asdict() | {"labels": labels}))
    return tuple(sets)

# ----------------------------------------------------------------------------------------------
# 11. The report's smoke test: its rule, beside GradNorm, on noise
# ----------------------------------------------------------------------------------------------

RULES = ("report", "gradnorm")
REPORTED = {  # value, tolerance; spread: within what the seeds give; machine: not judged
    "final_weight_det": (0.000, 0.0005),
    "final_weight_cls": (4.000, 0.0005),
    "weight_change_det": (-1.000, 0.0005),
    "weight_change_cls": (3.990, 0.0005),
    "mean_loss": (2.4624, "spread"),
    "parameters": (1224, 0),
    "train_seconds": (0.25, "machine")}

class ReportRule:
    """The report's update of w, as it is: g does not depend on w, and w sums to T^2 = 4.

    The report prints no formula: this is the rule of its project's public test script. For the
    first nine steps w stands; L0 and G0_bar are those of the first update.
    """
    def __init__(self, initial_weights, alpha=1.5):
        self.w = torch.tensor(initial_weights)
        self.alpha = alpha
        self.step = 0

    def update(self, L, g):
        """g (2,): norms of the gradients of L (2,) at the heads' outputs, not at W."""
        self.step += 1
        if self.step < 10:
            return
        if self.step == 10:
            self.L0 = L
            self.G0_bar = g.mean()
        L_tilde = L / self.L0
        r = L_tilde / L_tilde.mean()
        w = self.w * self.G0_bar * r**self.alpha / (g + 1e-8)
        self.w = w / w.mean() * len(w)

def smoke_test(seed, rule):
    """The report's smoke test (cross-entropy and BCE on noise) under one of RULES."""
    torch.manual_seed(seed)
    trunk = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
                          nn.AdaptiveAvgPool2d(1), nn.Flatten())
    heads = nn.ModuleList([nn.Linear(32, 4), nn.Linear(32, 4)])
    parameters = [*trunk.parameters(), *heads.parameters()]
    W = trunk[0].weight
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)
    balancer = ReportRule([1.0, 0.01]) if rule == "report" else GradNorm([1.0, 0.01])
    weights = [balancer.w.clone()]
    totals = []
    started = time.perf_counter()
    for _ in range(50):  # 5 epochs of 10 batches
        features = trunk(torch.randn(8, 3, 64, 64))
        outputs = [head(features) for head in heads]
        one_hot = F.one_hot(torch.randint(4, (8,)), 4).float()
        L = torch.stack([F.cross_entropy(outputs[0], torch.randint(4, (8,))),
                         F.binary_cross_entropy_with_logits(outputs[1], one_hot)])
        at = outputs if rule == "report" else [W, W]
        norms = torch.stack([torch.autograd.grad(L_i, x, retain_graph=True)[0].norm()
                             for L_i, x in zip(L, at)])
        loss = (weights[-1] * L).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        balancer.update(L.detach(), norms)
        weights.append(balancer.w.clone())
        totals.append(loss.item())
    seconds = time.perf_counter() - started
    w = torch.stack(weights).numpy()  # (51, 2)
    change = w[-1] - w[0]
    return {"w": w, "final_weight_det": w[-1, 0], "final_weight_cls": w[-1, 1],
            "weight_change_det": change[0], "weight_change_cls": change[1],
            "mean_loss": np.mean(totals), "parameters": sum(p.numel() for p in parameters),
            "train_seconds": seconds}

def check_smoke(measured):
    """Each number of the report beside what the seeds give."""
    checks = []
    for name, (value, tolerance) in REPORTED.items():
        x = np.array(measured[name], float)
        if tolerance == "machine":
            ok = None
        elif tolerance == "spread":
            ok = bool(x.min() <= value <= x.max())
        else:
            ok = bool(np.all(np.abs(x - value) <= tolerance))
        checks.append({"name": name, "reported": value, "measured": x.mean(),
                       "range": [x.min(), x.max()], "tolerance": tolerance, "ok": ok})
    return checks

# ----------------------------------------------------------------------------------------------
# 12. Files: config files, checkpoints, results, tables
# ----------------------------------------------------------------------------------------------

def read_yaml(path):
    """Lists, mappings and texts of a YAML file: scalars stay text, nothing is constructed."""
    try:
        return yaml.load(path.read_text(encoding="utf-8-sig"), yaml.BaseLoader)
    except (OSError, ValueError, LookupError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: cannot be read as YAML ({reason})") from error

def key_comments():
    """What config.yaml says of each key: its range, and its line in --help and in an error."""
    text = SHIPPED.read_text(encoding="utf-8")
    return dict(re.findall(r"^(\w+):(?:.*? # (.*))?", text, re.MULTILINE))

def did_you_mean(word, words):
    """"; did you mean …?" with the likeliest of the words, or nothing."""
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""

def convert_value(value, hint, comment, where):
    """A value, as text or as it is, in a type and a comment's range; "1e-3" is a number."""
    try:
        if isinstance(value, str) and "," in value and hint is not str:  # 1,0.1 or [1, 0.1]
            value = yaml.load(value if value[0] == "[" else f"[{value}]", yaml.BaseLoader)
        value = msgspec.convert(value, hint, strict=False)  # 2.5 is no int, true no float
        bounds = re.search(r"(-?\d[\d.e-]*) to (\d[\d.e]*)", comment)
        if bounds:
            low, high = map(float, bounds.groups())
            if not all(low <= x <= high for x in np.ravel(value)):
                raise ValueError
        return value
    except (msgspec.ValidationError, ValueError, yaml.YAMLError) as error:
        found = str(value)[:60]
        raise UserError(f"{where}: found {found!r}, expected {comment}") from error

def make_config(values, where):
    """A checked Config from a mapping of exactly its keys."""
    hints = Config.__annotations__
    for key in values:
        if key not in hints:
            hint = did_you_mean(str(key), hints)
            raise UserError(f"{where}: unknown key {str(key)[:60]}{hint}")
    comments = key_comments()
    checked = {}
    for key, hint in hints.items():
        comment = comments.get(key, "a line for it in config.yaml")
        checked[key] = convert_value(values.get(key), hint, comment, f"{where}: {key}")
    return Config(**checked)

def load_config(path, settings):
    """The shipped config.yaml, over it a YAML file's and then a command line's settings."""
    given = read_yaml(path)
    if not isinstance(given, dict):
        raise UserError(f"{path}: expected lines of 'key: value'")
    config = make_config(read_yaml(SHIPPED) | given, str(path))
    return make_config(asdict(config) | settings, "command line")

def to_json(value):
    """One line of JSON: tuples and arrays are lists, NaN is null."""
    return msgspec.json.encode(value, enc_hook=lambda x: x.tolist())

def clean(value):  # as it comes back from JSON or YAML
    return msgspec.json.decode(to_json(value))

def write_atomic(path, content):
    """Writes a file by way of a second one: it is the old or the new, never half."""
    begun = path.with_name(f"{path.name}.part")  # same folder: there a rename is atomic
    try:
        begun.write_bytes(content.encode() if isinstance(content, str) else content)
        begun.replace(path)
    finally:
        begun.unlink(missing_ok=True)

def write_json(path, value):
    write_atomic(path, msgspec.json.format(to_json(value), indent=1) + b"\n")

def cell_text(x):
    """A table's cell: text as it is, a number to three digits, an interval's mean and ends."""
    if isinstance(x, dict):
        low, high = x["ci95"] or (0, 0)
        ends = f" [{cell_text(low)}, {cell_text(high)}]" if low != high else ""
        return cell_text(x["mean"]) + ends
    if isinstance(x, (list, tuple)):
        return " / ".join(map(cell_text, x))
    if x is None or x != x:
        return "n/a"
    if isinstance(x, (str, bool)):
        return str(x)
    if abs(x) >= 1000 or isinstance(x, int):
        return f"{x:,.0f}"
    digits = 1 if abs(x) >= 10 else 3
    return f"{round(x, digits) + 0.0:.{digits}f}"  # + 0.0: no minus before zero

def markdown(header, rows):
    """An aligned Markdown table."""
    texts = [header] + [[cell_text(x) for x in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*texts)]
    texts.insert(1, ["-" * width for width in widths])
    table = ""
    for row in texts:
        padded = [text.ljust(width) for text, width in zip(row, widths)]
        table += f"| {' | '.join(padded)} |\n"
    return table

@contextlib.contextmanager
def held(folder):
    """The folder, for this process alone; the system frees it however the process ends."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield folder
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    except BlockingIOError as error:
        raise UserError(f"{folder}: another process works there; wait for it, or give another "
                        "--out") from error
    finally:
        os.close(handle)

def first_free(name):
    """runs/<name>, or the first of -2, -3, … that this process is the one to make."""
    Path("runs").mkdir(exist_ok=True)  # a broken link of that name ends here
    for k in itertools.count(1):
        folder = Path("runs", name if k == 1 else f"{name}-{k}")
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            return folder

@contextlib.contextmanager
def new_folder(out, name):
    """An empty folder for this process alone, `out` or below runs/; gone if it stays empty.

    UserError where it holds anything, OSError where nothing can be written: before any work.
    """
    if out and out.is_file():
        raise UserError(f"--out {out}: not empty: a file; give a new folder")
    if out:
        out.mkdir(parents=True, exist_ok=True)
    with held(out or first_free(name)) as folder:
        if any(folder.iterdir()):
            raise UserError(f"--out {folder}: not empty; give a new folder, or go on with a "
                            f"run by --resume {folder}")
        try:
            with tempfile.TemporaryFile(dir=folder):  # may it be written?
                pass
            yield folder
        finally:
            if not any(folder.iterdir()):
                folder.rmdir()  # so that the corrected run is not the second

def load_checkpoint(path, *keys):
    """The mapping in a file of torch's, read without running its code; it must have `keys`."""
    if path.is_dir():
        raise UserError(f"{path}: a folder; expected the best.pt of a run")
    try:
        state = dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # on foreign bytes torch.load raises a dozen types, all alike
        reason = getattr(error, "strerror", None) or type(error).__name__
        if "weights_only" in str(error):
            reason = ("it holds Python objects, as YOLOv5's own best.pt does; the line that "
                      "writes its tensors stands in data/README.md")
        raise UserError(f"{path}: no run's .pt, or damaged: {reason}") from error
    for key in keys:
        if key not in state:
            raise UserError(f"{path}: has no {key!r}; expected the best.pt or last.pt of a run "
                            f"of {SCHEMA}")
    return state

def is_best(rows):
    """Was the last epoch evaluated, and none better, by mAP50-95 + balanced accuracy?"""
    judged = [row["val"] for row in rows if "val" in row]
    scores = [sum(val[key] or 0 for key in ("mAP50-95", "balanced_accuracy")) for val in judged]
    return "val" in rows[-1] and scores[-1] == max(scores)

def save_epoch(run, train_set, out):
    """Adds an epoch to the log, replaces last.pt, and best.pt if no validation was better."""
    rows = [row for row in run.rows if row["epoch"] == run.epoch - 1]
    with (out / "metrics.jsonl").open("ab") as file:
        file.writelines(to_json(row) + b"\n" for row in rows)
    state = {SCHEMA: True, "config": clean(asdict(run.config)), "names": train_set.names,
             "classification_names": train_set.classification_names, "levels": train_set.levels,
             "fingerprint": train_set.fingerprint, "epoch": run.epoch, "rows": run.rows,
             "w": run.w, "network": run.network.state_dict(), "processes": run.world,
             "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
             "balancer": run.balancer and run.balancer.state_dict()}
    buffer = io.BytesIO()  # torch's own writer hides the reason of a failure
    torch.save(state, buffer)
    if is_best(run.rows):
        write_atomic(out / "best.pt", buffer.getvalue())
    write_atomic(out / "last.pt", buffer.getvalue())  # last: it says where to resume

# What --resume may change: laid over two configs, it makes them alike in these keys.
FREE = dict.fromkeys(("device", "threads", "cache_mb", "data"))

def restore(run, last, fingerprint):
    """Puts a begun run back to where its last.pt stands, and says so; UserError if not."""
    state = load_checkpoint(last, SCHEMA, "config", "network", "processes")
    if state["config"] | FREE != clean(asdict(run.config)) | FREE:
        raise UserError(f"{last}: does not fit the config.yaml beside it; use the run's own")
    if state["fingerprint"] != fingerprint:
        raise UserError(f"{last}: trained on other images or labels than {run.config.data}")
    if state["processes"] != run.world:
        raise UserError(f"{last}: trained by {state['processes']} processes, now {run.world}: "
                        "another batch; go on with torchrun --nproc-per-node "
                        f"{state['processes']}")
    run.epoch = state["epoch"]
    run.rows = state["rows"]
    run.w = state["w"].to(run.device)
    run.network.load_state_dict(state["network"])
    for optimizer, saved in zip(run.optimizers, state["optimizers"]):
        optimizer.load_state_dict(saved)
    if run.balancer:
        run.balancer.load_state_dict(state["balancer"])
    return f"resumed after epoch {run.epoch} of {run.config.epochs}"

def saved_detector(path):
    """A file's detector, tensors in YOLOv5's order, and its anchors (3, 3, 2) px or None."""
    saved = load_checkpoint(path)
    unit = torch.tensor(STRIDES).view(3, 1, 1)  # px: YOLOv5 keeps anchors in cells
    if {SCHEMA, "network"} <= saved.keys():
        of_detector = "parts.0.trunk.", "parts.0.heads.det."
        saved = {key: x for key, x in saved["network"].items() if key.startswith(of_detector)}
        unit = 1
    saved = {str(key): x for key, x in saved.items()}
    if any("dfl" in key for key in saved):
        raise UserError(f"init {path}: the head of a v5u, v8 or 11 detector, without anchors; "
                        "expected a YOLOv5's")
    kept = [key for key in saved if key.endswith(("anchors", "anchor_grid"))]
    anchors = [saved.pop(key) for key in kept]
    # YOLOv5's P6 models have four levels, older ones another shape.
    fits = [x * unit for x in anchors if getattr(x, "shape", None) == (3, 3, 2)]
    return saved, fits[0] if fits else None

def warm_start(run, path):
    """Lays a saved detector's tensors over a new run's, in order, where shapes agree.

    path: a checkpoint of this program, or a YOLOv5's plain state_dict: its modules stand in the
    same order. Returns what was taken; UserError where the trunk or the depth is another.
    """
    saved, anchors = saved_detector(path)
    own = run.network.state_dict()
    slots = [key for key in own if key.startswith(("parts.0.trunk.", "parts.0.heads.det."))
             and not key.endswith("anchors")]
    taken = {key: x for key, x in zip(slots, saved.values())
             if getattr(x, "shape", None) == own[key].shape}
    left = [key for key in slots if key not in taken]  # as of another number of classes
    detects = "det" in run.config.tasks
    other_depth = detects and len(saved) != len(slots)
    other_width = any("trunk" in key for key in left)
    if other_depth or other_width:
        inputs = [x.shape[1] for x in saved.values() if getattr(x, "ndim", 0) == 4]
        width = f"{max(inputs, default=0) / 2048:g}"  # SPPF joins 2048 channels at width 1
        raise UserError(f"init {path}: no detector of this width_multiple and depth_multiple "
                        f"({len(saved)} tensors of {len(slots)}; its width_multiple: {width})")
    run.network.load_state_dict(own | taken)
    if anchors is not None and detects and run.config.anchors == "auto":
        run.network.anchors.copy_(anchors)
    return f"init {path}: took {len(taken)} of the detector's tensors, left {left or 'none'}"

def describe(run, train_set, val_set):
    """What a data set holds: images, boxes and classes of each split, canvas, anchors."""
    detects = "det" in run.config.tasks
    found = {"fingerprint": train_set.fingerprint, "canvas": train_set.canvas,
             "anchors": run.network.anchors.tolist() if detects else None}
    for split, data in (("train", train_set), ("val", val_set)):
        boxes = np.concatenate(data.boxes)[:, 0].tolist()
        counts = {"images": len(data), "images without class": data.labels.count(NO_LABEL)}
        counts |= {f"box {name}": boxes.count(k) for k, name in enumerate(data.names)}
        counts |= {f"class {name}": data.labels.count(k)
                   for k, name in enumerate(data.classification_names)}
        found[split] = counts
    return found

def unlearnable(run, train_set, val_set):
    """A note where boxes cannot be learnt: no anchor is of their size, or they are too many."""
    if "det" not in run.config.tasks:
        return []
    notes = []
    boxes = torch.from_numpy(np.concatenate(train_set.boxes)).float()  # (n, 5)
    shapes = [tuple(side // stride for side in train_set.canvas) for stride in STRIDES]
    targets = F.pad(boxes, (1, 0))  # (n, 6); of which image does not matter
    anchors = run.network.anchors.cpu()
    match = match_targets(targets, shapes, anchors, run.config.anchor_thres)
    lost = len(boxes) - len(match.target.unique())
    if lost:
        notes.append(f"{lost} of {len(boxes)} boxes match no anchor at imgsz "
                     f"{run.config.imgsz}: they are not learnt; raise imgsz, or anchor_thres")
    images = train_set.boxes + val_set.boxes
    crowded = sum(len(boxes) > run.config.max_det for boxes in images)
    if crowded:
        notes.append(f"{crowded} images have more than max_det ({run.config.max_det}) boxes: "
                     "not all can be found; raise max_det")
    return notes

def cost(network, canvas):
    """Parameters of trunk and tasks (dual shares none), FLOPs an image (multiply-add: two)."""
    from torch.utils.flop_counter import FlopCounterMode
    def size(module):
        return sum(p.numel() for p in module.parameters())
    counts = {"total": size(network), "trunk": 0, "det": 0, "cls": 0}
    dual = len(network.parts) == 2
    for part in network.parts:
        for task, head in part.heads.items():
            counts[task] = size(part if dual else head)
        if not dual:
            counts["trunk"] = size(part.trunk)
    network.eval()
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, *canvas, device=next(network.parameters()).device))
    return {"parameters": counts, "flops_per_image": counter.get_total_flops()}

def from_proc(file, key):
    """The text under a key of a file in /proc, where Linux keeps it; None elsewhere."""
    with contextlib.suppress(OSError, IndexError):  # no such file, no such line in it
        return re.findall(rf"{key}\s*:\s*(.+)", Path("/proc", file).read_text())[0]

def peak_rss_mb():
    """The most memory that this process has held, in MB; None where /proc does not tell."""
    peak = from_proc("self/status", "VmHWM")  # as in 391232 kB
    return peak and int(peak.split()[0]) / 2**10

def environment(device):
    """What a result depends on beside the code and the config: versions, device, threads."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"torch": str(torch.__version__), "python": platform.python_version(),
            "os": platform.system(), "device": name,
            "processor": from_proc("cpuinfo", "model name") or platform.processor(),
            "cpu": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads(),
            "processes": int(os.environ.get("WORLD_SIZE", 1))}

def code_version():
    """Which code made a result: a hash of this file, and the git commit where there is one."""
    commit = None
    with contextlib.suppress(OSError):  # no git
        git = subprocess.run(["git", "-C", ROOT, "rev-parse", "--verify", "HEAD"],
                             capture_output=True, text=True)
        commit = git.stdout.strip() or None
    sources = [Path(__file__), *ROOT.glob("data/joint.py")]  # it decides what files mean
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return {"sha256": digest[:16], "commit": commit}

def measure_interference(column, tasks):
    """Means over training at W; gradient_share: of a_i G_i, what the trunk follows."""
    if "cosine" not in column:
        return None  # the tasks train no trunk together
    followed = np.array([column[f"G/{task}"] * column.get(f"a/{task}", 1) for task in tasks])
    share = (followed / followed.sum(0).clip(1e-30)).mean(1)  # (T,) of (T, steps)
    return {"cosine_mean": column["cosine"].mean(),
            "conflict_share": (column["cosine"] < 0).mean(),
            "magnitude_similarity": column["similarity"].mean(),
            "gradient_share": dict(zip(tasks, share))}

def summarise(run, dataset, start_s):
    """The quantities of results.json, from a finished run."""
    config = run.config
    rows = run.rows
    total = {key: sum(row.get("time", {}).get(key, 0) for row in rows)
             for key in ("train_s", "train_cpu_s", "eval_s")}
    column = {key: np.array([row[key] for row in rows]) for key in rows[0]
              if key not in ("time", "val")}
    images = config.epochs * dataset["train"]["images"]
    last_epoch = column["epoch"] == config.epochs - 1
    final = run.w.tolist()
    return {
        "schema": SCHEMA, "mode": config.mode, "seed": config.seed, "data": config.data,
        "config": asdict(config), "environment": environment(run.device),
        "code": code_version(), "dataset": dataset, "steps": len(rows),
        **cost(run.network, dataset["canvas"]),
        "weights": {"initial": config.weights, "final": final,
                    "change": np.subtract(final, config.weights)},
        "loss": {"mean": column["loss"].mean(), "final": column["loss"][last_epoch].mean()},
        "val": rows[-1]["val"], "interference": measure_interference(column, config.tasks),
        "time": total | {"start_s": start_s, "step_ms": 1000 * total["train_s"] / len(rows),
                         "images_per_s": images / total["train_s"]},
        "peak_rss_mb": peak_rss_mb()}

def draw(path, kind, *values):
    """A picture by data/figures.py; one that cannot be drawn is a warning: results stand."""
    try:
        figures = room("figures")
        if figures is None:
            print(f"no {path.name}: data/figures.py, which draws it, is not there")
            return
        figures.save(getattr(figures, kind)(*values), path)
    except Exception as error:  # of a drawing library: any type
        reason = " ".join(str(error).split())[:200]
        print(f"warning: {path.name} is not drawn ({type(error).__name__}: {reason})",
              file=sys.stderr)

# ----------------------------------------------------------------------------------------------
# 13. Command line: arguments -> one run, its files under --out, an exit code
# ----------------------------------------------------------------------------------------------

def option_parser(description):
    """A parser with --config, --out and an option for every key of config.yaml but `mode`.

    What a program adds to it stands above these in its --help.
    """
    parser = argparse.ArgumentParser(
        usage="%(prog)s [--option value …]", description=description, allow_abbrev=False,
        exit_on_error=False)
    files = parser.add_argument_group("files")
    files.add_argument("--config", type=Path, default=SHIPPED,
                       help="a YAML file of settings, laid over the shipped config.yaml")
    files.add_argument("--out", type=Path, help="a new folder for the results [below runs/]")
    keys = parser.add_argument_group("settings, as in config.yaml")
    try:
        shipped = read_yaml(SHIPPED)
    except UserError as error:  # told here: there is no parser yet
        sys.exit(f"error: {error}")
    for key, comment in key_comments().items():
        if key != "mode":  # it has more choices, and stands first
            value = re.sub("[][' ]", "", str(shipped.get(key)))
            keys.add_argument(f"--{key}", help=f"{comment} [{value}]".replace("%", "%%"))
    return parser

def run_program(parser, job, argv=None):
    """job(options, settings) -> 0 done, 1 failed, 2 a mistake in the input, 130 interrupted."""
    with contextlib.suppress(ValueError):  # in a thread, where signals are not set
        signal.signal(signal.SIGINT, signal.default_int_handler)  # from now on Ctrl-C is told
    warnings.simplefilter("ignore")  # a bad image is an error, a missing glyph a little box
    for output in (sys.stdout, sys.stderr):
        if hasattr(output, "reconfigure"):  # names that it cannot show are shown escaped
            output.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        args, settings = parse(parser, sys.argv[1:] if argv is None else argv)
        return job(args, settings) or 0
    except (UserError, argparse.ArgumentError) as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2
    except (ArithmeticError, RuntimeError, OSError, MemoryError) as error:
        print("error:", *str(error).splitlines()[:1], file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print("interrupted;", *(error.args or ["start it again"]), file=sys.stderr)
        return 130

def parse(parser, argv):
    """Options, and those of them that are settings; --batch-size is --batch_size."""
    words = [re.sub(r"^--[\w-]+", lambda name: "--" + name[0][2:].replace("-", "_"), word)
             for word in argv]
    for word in words:
        if word != word.encode(errors="replace").decode():
            raise UserError(f"{word!r}: not UTF-8; rename it, or name a link to it (ln -s)")
    args, unknown = parser.parse_known_args(words)
    if unknown:
        hint = did_you_mean(unknown[0].lstrip("-").partition("=")[0], vars(args))
        is_option = hint or unknown[0].startswith("-")
        what = f"no such option{hint}" if is_option else "one argument too many"
        raise UserError(f"{unknown[0]}: {what}; --help lists all")
    given = {key: getattr(args, key) for key in key_comments() if key != "mode"}
    return args, {key: value for key, value in given.items() if value is not None}

def pick_device(name):
    """The device asked for; auto: this machine's accelerator or cpu. UserError if absent."""
    found = torch.accelerator.current_accelerator()  # cuda, mps, or None
    index = int(os.environ.get("LOCAL_RANK", 0))
    kind = name
    if name == "auto":
        kind = found.type if found else "cpu"
    if name[-1].isdigit():  # 0 and cuda:0 are the first GPU
        kind = "cuda"
        index = int(name.rpartition(":")[2])
    if kind == "cpu":
        return torch.device(kind)
    if not found or kind != found.type or index >= torch.accelerator.device_count():
        raise UserError(f"--device {name}: this machine or torch has none; use --device cpu")
    return torch.device(kind, index)

def start_torch(config):
    """Deterministic algorithms, threads, and a process group where torchrun started several."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads it
    torch.set_num_threads(config.threads)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        device = pick_device(config.device)  # not what is there: a GPU may stay unused
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")

def epoch_line(run):
    """The last epoch: each task's mean loss, and w or a surgery's a; the metrics if any."""
    rows = [row for row in run.rows if row["epoch"] == run.epoch - 1]
    told = {key: np.mean([row[key] for row in rows]) for key in rows[0]
            if key.startswith(("L/", "a/" if run.surgery else "w/"))}
    told |= {key: x for key, x in rows[-1].get("val", {}).items() if isinstance(x, float)}
    texts = [f"{key} {x:.3f}" for key, x in told.items()]
    return f"epoch {run.epoch}/{run.config.epochs}: {', '.join(texts)}"

def print_header(run, dataset, notes):
    """What is about to be computed, where, on which data; and what is odd about them."""
    config = run.config
    images = dataset["train"]["images"]
    if config.batch_size > images:
        notes.append(f"batch_size {config.batch_size}: one step an epoch, of {images} images; "
                     "lower it")
    for note in notes[:10]:
        print(f"warning: {note}", file=sys.stderr)
    if len(notes) > 10:
        print(f"warning: {len(notes)} warnings in all", file=sys.stderr)
    print(f"jointgrad {config.mode}: torch {torch.__version__}, {run.device}, "
          f"{config.threads} thread(s), seed {config.seed}, {config.data}\n")
    counts = [[name, count, dataset["val"][name]] for name, count in dataset["train"].items()]
    print(markdown(["", "train", "val"], counts))
    H, W = dataset["canvas"]
    print(f"canvas {W} x {H} px")
    if dataset["anchors"]:
        print(f"anchors, px: {np.round(dataset['anchors']).astype(int).tolist()}")

def print_results(results):
    rows = [[key, x] for key, x in results["val"].items() if isinstance(x, float)]
    for group in ("weights", "loss", "time"):
        rows += [[f"{group} {key}", x] for key, x in results[group].items()]
    print(markdown([f"{results['mode']}, seed {results['seed']}", "value"], rows))

def run_training(config, resume, out):
    """Trains, saving log and checkpoints each epoch; then results.json, the table, a figure."""
    device = pick_device(config.device)
    started = time.perf_counter()
    train_set, val_set = load_data(config, out)
    run = Run(config, train_set, device)
    told = ""
    if resume and (out / "last.pt").exists():
        told = restore(run, out / "last.pt", train_set.fingerprint)
    elif config.init:
        told = warm_start(run, Path(config.init))
    dataset = describe(run, train_set, val_set)
    start_s = time.perf_counter() - started
    if run.rank == 0:
        settings = yaml.safe_dump(clean(asdict(config)), sort_keys=False)
        write_atomic(out / "metrics.jsonl", b"".join(to_json(row) + b"\n" for row in run.rows))
        write_atomic(out / "config.yaml", settings)  # second: a folder with both is a run's
        print_header(run, dataset, train_set.notes + unlearnable(run, train_set, val_set))
        print(f"{told}\n")
    for _ in train(run, train_set, val_set):
        if run.rank == 0:
            save_epoch(run, train_set, out)
            tqdm.write(epoch_line(run), sys.stderr)  # above the progress bar
    if run.rank > 0:
        return
    if config.epochs == 0:
        rows = [np.column_stack([boxes[:, 0], train_set.boxes_xyxy(i)])  # (n, 5) class, px
                for i, boxes in enumerate(train_set.boxes)]
        titles = [path.stem for path in train_set.paths]
        draw(out / "labels.png", "draw_data", train_set.pixels, rows, train_set.labels, titles,
             train_set.names, train_set.classification_names)
    else:
        results = clean(summarise(run, dataset, start_s))
        write_json(out / "results.json", results)
        print_results(results)
        draw(out / "figure.png", "draw_run", run.rows, config.tasks,
             f"{config.mode}, seed {config.seed}", train_set.classification_names)
    print(f"written to {out}/: {', '.join(sorted(os.listdir(out)))}")

def start_training(args, settings):
    """A new run in a folder of its own, or what is left of the one in --resume."""
    if args.resume:
        check_resume(args, settings)
        config = load_config(args.resume / "config.yaml", settings)
        folder = held(args.resume)
    else:
        mode = {"mode": args.mode} if args.mode else {}
        config = load_config(args.config, settings | mode)
        data = Path(config.data)
        kind = config.mode if config.epochs else "data"
        folder = new_folder(args.out, f"{kind}-{data.parent.name or data.stem}-s{config.seed}")
    if int(os.environ.get("RANK", 0)) > 0:  # of several processes the first alone writes:
        folder = contextlib.nullcontext(args.resume or Path("."))  # the others enter no folder
    start_torch(config)
    with folder as out:
        try:
            run_training(config, bool(args.resume), out)
        except KeyboardInterrupt:
            if (out / "metrics.jsonl").exists():
                raise KeyboardInterrupt(f"go on by --resume {out}")
            raise KeyboardInterrupt("nothing was begun")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

def check_resume(args, settings):
    """UserError where a folder cannot be gone on with, or by these options."""
    out = args.resume
    if args.config != SHIPPED or args.out or args.mode or settings.keys() - FREE:
        raise UserError(f"--resume: takes no option but {', '.join(FREE)}; the others stand in "
                        "its config.yaml. More epochs, another schedule: --init its last.pt")
    if out.is_file():
        raise UserError(f"--resume {out}: a file; give the run's folder, --resume {out.parent}")
    if not (out / "metrics.jsonl").exists():
        raise UserError(f"--resume {out}: no run there (no metrics.jsonl); start a new one")
    if (out / "results.json").exists() and not (out / "last.pt").exists():
        raise UserError(f"--resume {out}: finished (results.json), and its last.pt is gone: "
                        "nothing to go on with; start a new run")

def run_reproduce(args):
    """The report's smoke test over ten seeds; 1 unless every number of the report is met."""
    torch.set_num_threads(1)
    with new_folder(args.out, "reproduce") as out:
        measured = {}
        for rule in RULES:
            runs = []
            for seed in range(10):
                runs.append(smoke_test(seed, rule))
                print(f"{rule}, seed {seed}: w {runs[-1]['w'][-1].round(3).tolist()}, "
                      f"{runs[-1]['train_seconds']:.2f} s", file=sys.stderr)
            measured[f"smoke_{rule}"] = {name: [run[name] for run in runs] for name in runs[0]}
        checks = check_smoke(measured["smoke_report"])
        results = {"schema": SCHEMA, "mode": "reproduce", "checks": checks,
                   "quantities": measured, "code": code_version(),
                   "environment": environment(torch.device("cpu"))}
        write_json(out / "results.json", results)
        table = [[*check.values(), np.mean(measured["smoke_gradnorm"][check["name"]])]
                 for check in checks]
        print(markdown([*checks[0], "under GradNorm"], table))
        print(f"written to {out}/: {', '.join(sorted(os.listdir(out)))}")
    return int(any(check["ok"] is False for check in checks))

def start_predict(args, settings):
    """Hands over to data/predict.py, a program of its own; its exit code."""
    if not args.checkpoint or args.config != SHIPPED:
        raise UserError("--mode predict: needs --checkpoint best.pt, and takes no --config")
    program = ROOT / "data" / "predict.py"
    if not program.exists():
        raise UserError("--mode predict: data/predict.py, which does it, is not there")
    words = [sys.executable, program, args.checkpoint]
    if args.source:
        words.append(args.source)
    given = settings | {"out": args.out}
    words += [f"--{key}={value}" for key, value in given.items() if value]
    return subprocess.call(words)

def job(args, settings):
    """What the options ask for: predictions, the smoke test, or a training run."""
    if args.mode == "predict":
        return start_predict(args, settings)
    if args.checkpoint or args.source:
        raise UserError("--checkpoint, --source: of --mode predict alone; to train, --init")
    if args.mode != "reproduce":
        return start_training(args, settings)
    if args.config != SHIPPED or settings or args.resume:
        raise UserError("--mode reproduce: takes no setting but --out")
    return run_reproduce(args)

def main(argv=None):
    """Runs the command line; the exit code."""
    parser = option_parser(__doc__.partition("\n\n    python")[0])
    add = parser.add_argument
    add("--mode", choices=(*MODES, "reproduce", "predict"),
        help=f"{key_comments().get('mode')} | reproduce (the report's smoke test) | predict"
             f" [{read_yaml(SHIPPED).get('mode')}]")
    add("--resume", type=Path, metavar="DIR", help="go on with the interrupted run there")
    add("--checkpoint", type=Path, help="predict: a run's best.pt or last.pt")
    add("--source", type=Path, help="predict: an image or a folder, in place of the val split")
    return run_program(parser, job, argv)

if __name__ == "__main__":
    sys.exit(main())
