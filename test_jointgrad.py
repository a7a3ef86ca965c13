"""Tests. What is expected is closed form, hand work, a slow version, a library; no past run."""

import copy
import io
import itertools
import json
import math
import os
import pickle
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageDraw
from torch import nn

import jointgrad as jg
from data import figures, study
from data.joint import read_image

torch.set_num_threads(1)
SHIPPED = jg.ROOT / "config.yaml"
LINUX = sys.platform.startswith("linux")
TINY = {"epochs": 3, "train_images": 16, "val_images": 8, "batch_size": 8, "device": "cpu",
        "width_multiple": 0.03125, "dual_width_multiple": 0.0625, "eval_interval": 2, "alpha": 0.7,
        "gradnorm_lr": 0.05, "w_min": 0.004, "warmup": 0.2, "iou_thres": 0.5, "conf_thres": 0.002,
        "anchor_thres": 3.5, "batchnorm_momentum": 0.07}  # no default: a key left out shows
ANCHORS = torch.tensor([[[4., 9], [11, 6], [8, 14]], [[16, 11], [13, 25], [27, 18]],
                        [[22, 40], [45, 26], [50, 58]]])  # px, no two alike, none square
CANVAS = (8, 12), (4, 6), (2, 3)  # h, w of P3, P4, P5 on 64 x 96 px: no map is square

def options(**given) -> list[str]:
    return [f"--{key}={value}" for key, value in (TINY | given).items()]

def tiny(**given) -> jg.Config:
    return jg.load_config(SHIPPED, TINY | given)

double = partial(torch.tensor, dtype=torch.float64)
CPU = torch.device("cpu")

def same(x, y) -> bool:
    """To the bit, also tensors within lists and mappings."""
    if isinstance(x, torch.Tensor):
        return torch.equal(x, y)
    if isinstance(x, dict):
        x, y = [*x, *x.values()], [*y, *y.values()]
    return len(x) == len(y) and all(map(same, x, y)) if isinstance(x, (list, tuple)) else x == y

def joint_set(labels=(0, 1, 2), boxes=None) -> jg.JointSet:
    """A split of grey images, 64 x 96 px, with three classes of boxes and three of images."""
    boxes = boxes or [np.zeros((0, 5), np.float32)] * len(labels)
    pixels = np.full((len(labels), 64, 96, 3), 114, np.uint8)
    return jg.JointSet(pixels, boxes, list(labels), ["a", "b", "c"], ["x", "y", "z"])

# --------------------------------------------------------------------------------------------------
# 1. Twins: each fast form beside a slow one, or worked by hand

def balancer(w, **given) -> jg.GradNorm:
    return jg.GradNorm(w, **({"alpha": 1.5, "dtype": torch.float64} | given))

def published(w, steps, alpha, lr):
    """Weights after each step of GradNorm as published: autograd, its target constant, and Adam."""
    w, m, v, rows, L0 = torch.tensor(w), 0, 0, [], steps[0][0]
    for t, (L, n) in enumerate(steps, 1):
        w.requires_grad_()
        target = (w * n).mean().detach() * ((L / L0) / (L / L0).mean())**alpha
        (g,) = torch.autograd.grad((w * n - target).abs().sum(), w)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w = w.detach() - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        w = w * len(w) / w.sum()
        rows.append(w)
    return torch.stack(rows)

def test_one_update_by_hand():
    """w = 1, L~ = (1/2, 1, 3/2), G = n = (2, 1, 1), alpha 1: targets (2/3, 4/3, 2), so signs
    (+, -, -); Adam's first step is lr: (.975, 1.025, 1.025), times 3 / 3.025."""
    b = balancer([1, 1, 1], alpha=1, lr=0.025, L0=[2.0, 1, 2])
    w = b.update(double([1, 1, 3]), double([2, 1, 1]))
    expected = double([0.975, 1.025, 1.025]) * 3 / 3.025
    torch.testing.assert_close(w, expected, rtol=1e-7, atol=0)  # Adam's eps of 1e-8
    assert b.w.grad.tolist() == [2, -1, -1] and b.r.tolist() == [0.5, 1, 1.5]

@pytest.mark.parametrize("T, alpha", itertools.product(range(1, 6), (0.12, 1.5, -0.7)))
def test_weights_follow_the_published_recipe(T, alpha):
    """w_min = 0: 30 steps equal w <- Adam(w), w <- w T / sum(w) written out."""
    rng = np.random.default_rng(T)
    steps = [(torch.tensor(rng.uniform(0.2, 3, T)), torch.tensor(rng.uniform(0.5, 2, T)))
             for _ in range(30)]
    b, initial = balancer(1.5 - np.arange(T) / 5, alpha=alpha, lr=0.01), 1.5 - np.arange(T) / 5
    rows = torch.stack([b.update(*step) for step in steps])
    torch.testing.assert_close(rows, published(initial, steps, alpha, 0.01), rtol=1e-9, atol=0)

@pytest.mark.parametrize("T", [1, 2, 3, 4, 5])
def test_sum_is_T_and_the_floor_holds_after_every_update(T):
    """Gradients of 1 to 10,000 in size, as in the paper's toy: without a floor w goes negative."""
    b, lowest = balancer(np.linspace(0.01, 5, T), w_min=0.05, lr=0.1), []
    for _ in range(60):
        w = b.update(torch.ones(T).double(), 10 ** torch.linspace(0, 4, T).double())
        assert w.sum().item() == pytest.approx(T, rel=1e-12)  # float64
        lowest.append(w.min().item())
    assert min(lowest) == pytest.approx(0.05 if T > 1 else 1, abs=1e-9)  # the 1e-12 in clamp

@pytest.mark.parametrize("L, n", [([2, 0], [1, 0]), ([2, 4], [1, 0])])
def test_an_unlabelled_task_leaves_the_weights_as_they_are(L, n):
    """n_1 = 0, and L_1 too, at first: no gradient, no NaN, and L0_1 waits for a first loss."""
    b = balancer([1.5, 0.5], w_min=0.01)
    w = b.update(double(L), double(n))
    assert b.w.grad.tolist() == [0, 0] and w.tolist() == pytest.approx([1.5, 0.5])
    moved = b.update(double([1, 4]), double([1, 1])).tolist()
    assert b.L0.tolist() == [2, 4] and sum(moved) == pytest.approx(2) and moved != [1.5, 0.5]
    assert b.update(double(L), double(n)).tolist() == pytest.approx(moved)  # no momentum's step

def scalar_ciou(a, b):
    """IoU - d^2 / c^2 - alpha v of two boxes cx cy w h (arXiv 1911.08287), number by number."""
    (ax, ay, aw, ah), (bx, by, bw, bh) = a, b
    ix = max(0, min(ax + aw / 2, bx + bw / 2) - max(ax - aw / 2, bx - bw / 2))
    iy = max(0, min(ay + ah / 2, by + bh / 2) - max(ay - ah / 2, by - bh / 2))
    iou = ix * iy / (aw * ah + bw * bh - ix * iy)
    cx = max(ax + aw / 2, bx + bw / 2) - min(ax - aw / 2, bx - bw / 2)
    cy = max(ay + ah / 2, by + bh / 2) - min(ay - ah / 2, by - bh / 2)
    angle = torch.atan(torch.as_tensor(aw / ah, dtype=torch.float64))
    v = 4 / math.pi**2 * (math.atan(bw / bh) - angle)**2
    alpha = (v / (1 - iou + v)).item() if v else 0  # a number: a constant to the gradient
    return iou - ((ax - bx)**2 + (ay - by)**2) / (cx**2 + cy**2) - alpha * v

def test_fit_anchors_finds_separated_clusters_in_order_of_area():
    """Nine tight clusters, wide and tall: the optimum of k-means is their means."""
    rng = np.random.default_rng(0)
    centres = np.array([[6, 12], [20, 8], [10, 30], [45, 12], [22, 44], [70, 25], [40, 75],
                        [110, 50], [90, 130]], float)  # by area: 72, 160, 300, 540, 968, ...
    points = centres[:, None] + rng.uniform(-1, 1, (9, 30, 2))
    fitted = jg.fit_anchors(rng.permutation(points.reshape(-1, 2)))
    # the same 30 numbers averaged in another order: float64 rounding
    np.testing.assert_allclose(fitted.reshape(9, 2), points.mean(1), rtol=1e-12)

def greedy(boxes, iou_thres):
    """What a plain loop keeps of boxes, best first: all that no kept one overlaps more."""
    kept = np.zeros(0, int)
    for i, (x1, y1, x2, y2) in enumerate(boxes):
        u1, v1, u2, v2 = boxes[kept].T
        shared = (np.clip(np.minimum(x2, u2) - np.maximum(x1, u1), 0, None)
                  * np.clip(np.minimum(y2, v2) - np.maximum(y1, v1), 0, None))
        total = (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - shared
        kept = np.append(kept, [i] * bool((shared <= iou_thres * total).all())).astype(int)
    return kept

def made_maps(targets, images, classes, shapes, rng=None):
    """Raw maps where each pair of `match_targets` decodes to its target; with an rng: about so."""
    raw = [torch.full((images, 3, 5 + classes, h, w), -12.0) for h, w in shapes]
    match, size = jg.match_targets(targets, list(shapes), ANCHORS, 4.0), np.array(shapes[0]) * 8
    for t, level, anchor, (x, y) in zip(*(m.tolist() for m in match[:4])):
        image, kind, *box = targets[t].tolist()
        (cx, cy, w, h), stride = np.array(box) * [*size[::-1], *size[::-1]], 8 * 2**level  # px
        p = [cx / stride - x + 0.5, cy / stride - y + 0.5,
             *np.sqrt([w, h] / ANCHORS[level, anchor].numpy())]
        logits = torch.logit(torch.tensor(p) / 2, 1e-5).float()
        one = raw[level][int(image), anchor, :, y, x]  # (5 + classes,), a view
        one[:4], one[4:], one[[4, 5 + int(kind)]] = logits, -12.0, 9.0
        if rng:
            one[:4] += torch.tensor(rng.normal(0, 0.15, 4))
            one[4:] = torch.tensor(rng.uniform(-4, 4, 1 + classes))
    return [x.flatten(1, 2) for x in raw]

def slow_boxes(raw, classes, config):
    """Boxes of one image: every candidate decoded in numpy, one uncapped greedy loop a class."""
    candidates = []
    for x, anchors, stride in zip(raw, ANCHORS.double().numpy(), (8, 16, 32)):
        s = 1 / (1 + np.exp(-x[0].double().numpy().reshape(3, 5 + classes, *x.shape[2:])))
        for a, row, col in zip(*np.nonzero(s[:, 4] > config.conf_thres)):
            centre = (2 * s[a, :2, row, col] - 0.5 + [col, row]) * stride
            half = (2 * s[a, 2:4, row, col])**2 * anchors[a] / 2
            candidates += [[*centre - half, *centre + half, s[a, 4, row, col] * of_class, k]
                           for k, of_class in enumerate(s[a, 5:, row, col])]
    rows = np.array([c for c in candidates if c[4] > config.conf_thres])
    rows, kept = rows[np.argsort(-rows[:, 4])], []
    for k in range(classes):
        of_class = rows[rows[:, 5] == k]
        kept += of_class[greedy(of_class[:, :4], config.iou_thres)].tolist()
    return np.array(sorted(kept, key=lambda row: -row[4]))[:config.max_det], len(rows)

@pytest.mark.parametrize("objects, classes, max_det", [(25, 1, 300), (100, 2, 60), (200, 3, 300)])
def test_find_boxes_equals_an_uncapped_greedy_loop(objects, classes, max_det):
    """Made maps at 320 px; an object has some 15 candidates, each with a score for every class."""
    rng, shapes = np.random.default_rng(objects), ((40, 40), (20, 20), (10, 10))
    targets = np.column_stack([np.zeros(objects), rng.integers(0, classes, objects),
                               rng.uniform(0.05, 0.95, (objects, 2)),
                               rng.uniform(0.02, 0.15, (objects, 2))])
    raw = made_maps(torch.tensor(targets).float(), 1, classes, shapes, rng)
    config = tiny(max_det=max_det, imgsz=320)
    (found,), (slow, candidates) = jg.find_boxes(raw, ANCHORS, config), slow_boxes(raw, classes,
                                                                                   config)
    assert candidates > 8 * objects and len(found) == len(slow) > min(objects / 2, 59)
    np.testing.assert_allclose(found, slow, atol=1e-4)  # float32 of 320 px
    assert (np.diff(found[:, 4]) <= 0).all()

@pytest.mark.parametrize("width, parameters", [(0.25, 1_872_157), (0.50, 7_235_389)])
def test_detection_network_has_yolov5s_number_of_parameters(width, parameters):
    """YOLOv5n and YOLOv5s v6 at 80 classes, as Ultralytics' model summary prints them."""
    network = jg.Network(tiny(mode="detect", width_multiple=width), 80, 0, np.ones((3, 3, 2)))
    assert sum(p.numel() for p in network.parameters()) == parameters

def random_targets(rng, n, images, classes=3):
    owner, kind = rng.integers(0, images, n), rng.integers(0, classes, n)
    centre, size = rng.uniform(0, 1, (n, 2)), rng.uniform(0.03, 0.7, (n, 2))
    return torch.tensor(np.column_stack([owner, kind, centre, size]), dtype=torch.float32)

def joint_case(**given):
    """A network, its losses and a batch of four random images with boxes and labels."""
    torch.manual_seed(0)
    config = tiny(dropout=0, **given)
    network = jg.Network(config, 3, 3, ANCHORS.numpy())
    targets = random_targets(np.random.default_rng(0), 9, 4)
    batch = jg.Batch(torch.rand(4, 3, 64, 96), targets, torch.tensor([0, 1, 2, 1]))
    return network, jg.make_losses(network, joint_set(), config), batch

def test_raw_maps_have_strides_8_16_32_and_W_is_the_last_convolution_of_the_trunk():
    network, _, batch = joint_case()
    part, order = network.parts[0], []
    for module in part.trunk.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, *_: order.append(module))
    P3, cuts, outputs = part(batch.images)
    assert [tuple(x.shape) for x in outputs["det"]] == [(4, 24, h, w) for h, w in CANVAS]
    assert outputs["cls"].shape == (4, 3) and P3.shape[2:] == CANVAS[0]
    assert all(cut.is_leaf and torch.equal(cut, P3) for cut in cuts)
    assert order[-1].weight is part.trunk.W
    assert {m.momentum for m in network.modules() if isinstance(m, nn.BatchNorm2d)} == {0.07}

def test_1x1_convolution_squeeze_excite_and_cbam_equal_their_formulas():
    """SE: x sigmoid(W2 relu(W1 mean(x))). CBAM: by mean and max, first of channels, then places."""
    torch.manual_seed(0)
    se, cbam, x = jg.SqueezeExcite(8), jg.CBAM(8), torch.randn(2, 8, 3, 5)
    conv = jg.Conv1x1(8, 6, 1)
    torch.testing.assert_close(conv(x), F.conv2d(x, conv.weight, conv.bias))  # float32
    first, _, second = se.mlp
    hidden = (x.mean((2, 3)) @ first.weight[:, :, 0, 0].T + first.bias).relu()
    scale = (hidden @ second.weight[:, :, 0, 0].T + second.bias).sigmoid()
    torch.testing.assert_close(se(x), x * scale[:, :, None, None])  # float32
    mlp = cbam.channel.mlp
    y = x * (mlp(F.adaptive_avg_pool2d(x, 1)) + mlp(F.adaptive_max_pool2d(x, 1))).sigmoid()
    pooled = torch.stack([y.mean(1), y.max(1).values], 1)
    torch.testing.assert_close(cbam(x), y * cbam.spatial(pooled).sigmoid())  # float32

def slow_match(targets, shapes, anchors, thres):
    """YOLOv5's rule by loops: (target, level, anchor, x, y) of each pair, sorted."""
    found = []
    for t, (_, _, cx, cy, bw, bh) in enumerate(targets.tolist()):
        for level, (h, w) in enumerate(shapes):
            x, y = np.float32(cx) * np.float32(w), np.float32(cy) * np.float32(h)  # as torch
            cells = [(int(x), int(y))]
            cells += [(int(x) - 1, int(y))] if x % 1 < 0.5 and x > 1 else []
            cells += [(int(x), int(y) - 1)] if y % 1 < 0.5 and y > 1 else []
            cells += [(int(x) + 1, int(y))] if (w - x) % 1 < 0.5 and w - x > 1 else []
            cells += [(int(x), int(y) + 1)] if (h - y) % 1 < 0.5 and h - y > 1 else []
            for a, (aw, ah) in enumerate(anchors[level].tolist()):
                rw, rh = bw * w * 8 * 2**level / aw, bh * h * 8 * 2**level / ah
                if max(rw, 1 / rw, rh, 1 / rh) < thres:
                    found += [(t, level, a, min(i, w - 1), min(j, h - 1)) for i, j in cells]
    return sorted(found)

@pytest.mark.parametrize("seed, shapes", itertools.product(
    range(6), (CANVAS, ((12, 4), (6, 2), (3, 1)))))
def test_match_targets_equals_a_slow_loop(seed, shapes):
    targets = random_targets(np.random.default_rng(seed), 40, 5)
    match = jg.match_targets(targets, list(shapes), ANCHORS, 3.0)
    columns = (match.target, match.level, match.anchor, match.cell[:, 0], match.cell[:, 1])
    assert sorted(zip(*(c.tolist() for c in columns))) == slow_match(targets, shapes, ANCHORS, 3)
    cell, anchor, _ = jg.prediction_grid([torch.zeros(1, 24, h, w) for h, w in shapes], ANCHORS)
    assert torch.equal(cell[match.index], match.cell)
    assert torch.equal(anchor[match.index], ANCHORS[match.level, match.anchor])

def slow_detection_loss(raw, batch, anchors, classes, config):
    """The loss by loops over pairs and levels, in float64, straight from the raw maps."""
    shapes = [tuple(x.shape[2:]) for x in raw]
    H, W = shapes[0][0] * 8, shapes[0][1] * 8
    pairs = slow_match(batch.targets, shapes, anchors, config.anchor_thres)
    box = obj = cls = 0.0
    for level, x in enumerate(raw):
        stride, ious, entropies = (8, 16, 32)[level], [], []
        x = x.view(len(x), 3, 5 + classes, *shapes[level]).double()
        goal = torch.zeros_like(x[:, :, 4])
        for t, _, a, i, j in (p for p in pairs if p[1] == level):
            b, k, cx, cy, bw, bh = batch.targets[t].double().tolist()
            q, (aw, ah) = x[int(b), a, :, j, i], anchors[level, a].tolist()
            s = 1 / (1 + torch.exp(-q[:4]))
            found = ((2 * s[0] - 0.5 + i) * stride, (2 * s[1] - 0.5 + j) * stride,
                     (2 * s[2])**2 * aw, (2 * s[3])**2 * ah)
            ious.append(scalar_ciou(found, (cx * W, cy * H, bw * W, bh * H)))
            goal[int(b), a, j, i] = max(goal[int(b), a, j, i].item(), ious[-1].item())
            one_hot = torch.eye(classes, dtype=torch.float64)[int(k)]
            entropies.append(F.binary_cross_entropy_with_logits(q[5:], one_hot))
        if ious:
            box += sum(1 - u for u in ious) / len(ious)
            cls += sum(entropies) / len(entropies)
        obj += (4.0, 1.0, 0.4)[level] * F.binary_cross_entropy_with_logits(x[:, :, 4], goal)
    loss = config.box_gain * box + config.obj_gain * (config.imgsz / 640)**2 * obj
    loss = loss + config.cls_gain * classes / 80 * cls * (classes > 1)
    return loss * len(batch.images) if config.det_loss_times_batch else loss

@pytest.mark.parametrize("seed, classes, n, times_batch", [
    (0, 3, 12, True), (1, 3, 40, True), (2, 1, 12, True), (3, 2, 1, False), (4, 3, 0, False)])
def test_detection_loss_and_its_gradient_equal_a_slow_loop(seed, classes, n, times_batch):
    """The IoU as objectness target is a constant, the largest of a crowded cell; n may be 0."""
    torch.manual_seed(seed)
    config = tiny(box_gain=0.7, obj_gain=30, cls_gain=11, det_loss_times_batch=times_batch)
    raw = [torch.randn(3, 3 * (5 + classes), h, w).requires_grad_() for h, w in CANVAS]
    targets = random_targets(np.random.default_rng(seed), n, 3, classes)
    batch = jg.Batch(torch.zeros(3, 3, 64, 96), targets, None)
    loss = jg.DetectionLoss(ANCHORS, classes, config)(raw, batch)
    slow = slow_detection_loss(raw, batch, ANCHORS, classes, config)
    assert loss.item() == pytest.approx(slow.item(), rel=1e-5)  # float32 sums of 300 terms
    for x, y in zip(torch.autograd.grad(loss, raw), torch.autograd.grad(slow, raw)):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)  # float32; ciou's 1e-7

@pytest.mark.parametrize("class_balance, weights", [(True, [2, 2 / 3, 1]), (False, [1.0, 1, 1])])
def test_classification_loss_equals_weighted_cross_entropy(class_balance, weights):
    """Of images with a class; of none: 0. Balanced, w = N / (C n_c), of counts 1, 3, 2."""
    labels, config = torch.tensor([1, 0, 1, 2, 1, 2, -100]), tiny(class_balance=class_balance)
    network = jg.Network(config, 3, 3, ANCHORS.numpy())
    loss = jg.make_losses(network, joint_set(labels.tolist()), config)["cls"]
    logits = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    expected = F.cross_entropy(logits[:6], labels[:6], torch.tensor(weights))
    torch.testing.assert_close(loss(logits, jg.Batch(None, None, labels)), expected)  # float32
    none = loss(logits, jg.Batch(None, None, torch.full((7,), jg.NO_LABEL)))
    assert none.item() == 0 and not torch.autograd.grad(none, logits)[0].any()

class Last(nn.Sequential):
    W = property(lambda self: self[3].weight)

def small_case(T):
    """A joint network of T tasks, their losses and a batch; each task on another scale."""
    torch.manual_seed(T)
    trunk = Last(nn.Conv2d(3, 5, 3, 2), nn.BatchNorm2d(5), nn.SiLU(), nn.Conv2d(5, 4, 3), nn.SiLU())
    heads = {f"t{k}": nn.Sequential(nn.Conv2d(4, 3, 3), nn.Tanh(), nn.Flatten(),
                                    nn.Linear(3 * 3 * 5, 2)) for k in range(T)}
    losses = {f"t{k}": (lambda y, b, k=k: 10.0**k * (y - k).square().mean()) for k in range(T)}
    return jg.JointNet(trunk, heads), losses, jg.Batch(torch.randn(4, 3, 16, 20), None, None)

@pytest.mark.parametrize("mode, w", [
    *((None, w) for w in ((1.0,), (1.0, 0.01), (0.3, 1.7), (1e-6, 2.0), (0.5, 1.2, 1.3),
                          (0.1, 1.0, 1.4, 1.5))),
    ("equal", (1.0, 1.0)), ("equal", (1e-3, 2.0)), ("detach", (0.5, 3.0)), ("fixed", (1.0, 0.01))],
    ids=str)
def test_backward_equals_one_graph_of_the_weighted_sum(mode, w):
    """n_i = ||dL_i/dW||, whatever w; `detach`: P3 is a constant to cls. Float64, small or real."""
    network, losses, batch = joint_case(mode=mode) if mode else small_case(len(w))
    part, rtol = (network.parts[0], 1e-6) if mode else (network, 1e-10)  # cross-entropy: float32
    batch, w = batch._replace(images=batch.images.double()), double(w)
    parameters = list(part.double().parameters())
    P3 = part.trunk(batch.images)
    L = torch.stack([losses[task](head(P3.detach() if part.detach and k else P3), batch)
                     for k, (task, head) in enumerate(part.heads.items())])
    direct = torch.cat([g.flatten() for g in torch.autograd.grad(
        (w * L).sum(), parameters, retain_graph=True)])
    signals = jg.backward(part, batch, losses, w)
    cut = torch.cat([p.grad.flatten() for p in parameters])
    assert (cut - direct).norm() <= rtol * direct.norm()
    torch.testing.assert_close(signals.L, L.detach().to(signals.L), rtol=rtol, atol=0)
    if len(w) == 1 or part.detach:
        assert signals[1:] == (None, None)
        return
    at_W, at_P3 = ([torch.autograd.grad(L_i, at, retain_graph=True)[0].flatten() for L_i in L]
                   for at in (part.trunk.W, P3))
    torch.testing.assert_close(signals.n, torch.stack([g.norm() for g in at_W]), rtol=rtol, atol=0)
    weighted = [w_i * g for w_i, g in zip(w, at_P3)]  # w changes the similarity, not the cosine
    expected = [[F.cosine_similarity(a, b, 0) for a, b in itertools.combinations(at_P3, 2)],
                [2 * a.norm() * b.norm() / (a @ a + b @ b)
                 for a, b in itertools.combinations(weighted, 2)]]
    (row,) = jg.log_rows([{"w": w, "L": signals.L, "gram": signals.gram}], tuple(losses))
    found = double([row["cosine"], row["similarity"]])
    torch.testing.assert_close(found, double(expected).mean(1), rtol=rtol, atol=rtol)

@pytest.mark.parametrize("optimizer, reference", [
    ("sgd", partial(torch.optim.SGD, momentum=0.7, nesterov=True)),
    ("adamw", partial(torch.optim.AdamW, betas=(0.8, 0.9)))])
def test_train_step_equals_the_librarys_optimizer_on_a_plain_network(optimizer, reference):
    """Decay on kernels alone, one norm to clip, a linear rise, then 0.01 + 0.99 (1 + cos) / 2."""
    config = tiny(mode="detect", optimizer=optimizer, lr=0.002, weight_decay=0.1, grad_clip=0.5,
                  betas="0.8,0.9", momentum=0.7, warmup=0.1)
    data = joint_set(boxes=[np.array([[0, 0.5, 0.5, 0.2, 0.4]])] * 3)
    run, batch = jg.Run(config, data, CPU), joint_case()[2]
    (part,) = copy.deepcopy(run.network.parts)
    plain = reference([{"params": [p for p in part.parameters() if (p.ndim > 1) == kernels],
                        "weight_decay": 0.1 * kernels} for kernels in (True, False)])
    for progress, rate in ((0.05, 0.5), (0.1, 1), (0.55, 0.505), (1.0, 0.01)):
        for group in plain.param_groups:
            group["lr"] = 0.002 * rate
        log = jg.train_step(run, batch, progress)
        plain.zero_grad()
        run.losses["det"](part.heads["det"](part.trunk(batch.images)), batch).backward()
        norm = nn.utils.clip_grad_norm_(part.parameters(), 0.5)
        plain.step()
        assert log["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-3) and norm > 0.5
    for p, q in zip(part.parameters(), run.network.parameters(), strict=True):
        torch.testing.assert_close(q, p, rtol=0, atol=1e-5)  # float32 in another order
        assert q.data_ptr() % 64 == q.grad.data_ptr() % 64 == 0  # without it CUDA's kernels fail

def test_average_precision_of_a_hand_computed_case():
    """Found: IoU 0.72 with the first of two boxes, nothing, the second. Up to IoU 0.7 precision is
    1 at 51 of 101 recalls, to 1/2, then 2/3; from 0.75 on 1/3, then 0. Class 1 has no box."""
    truth = [np.array([[0, 10.0, 20, 40, 30], [0, 60, 10, 70, 50], [2, 0, 0, 9, 9]])]
    found = [np.array([[10, 20, 31.6, 30, 0.9, 0], [5, 60, 25, 95, 0.8, 0],
                       [60, 10, 70, 50, 0.7, 0]])]
    ap = jg.average_precision(truth, found, 3, 300)
    expected = [(51 + 50 * 2 / 3) / 101] * 5 + [51 / 3 / 101] * 5
    np.testing.assert_allclose(ap[:, 0], expected, rtol=1e-12)  # ratios of whole numbers
    for empty in (ap, jg.average_precision(truth, [np.zeros((0, 6))], 3, 300)):
        assert np.isnan(empty[:, 1]).all() and (empty[:, 2] == 0).all() and empty.shape == (10, 3)
    assert jg.average_precision(truth, found, 3, max_det=2)[0, 0] == pytest.approx(51 / 101)

def answers(raw) -> nn.Module:
    """A detection head that knows the truth: maps made beforehand, in the order of the images."""
    head = nn.Identity()
    head.anchors, head.forward = ANCHORS, lambda P3: raw
    return head

@pytest.mark.parametrize("training", [True, False])
def test_evaluate_scores_a_perfect_detector_one_and_touches_nothing(training):
    """A class layer of bias alone always says y: of x, y, y and no class 2/3, balanced 1/2."""
    targets = random_targets(np.random.default_rng(1), 12, 4)
    targets[:, 2:4] = 0.25 + targets[:, 2:4] / 2  # inside
    targets[:, 4:] = 0.1 + targets[:, 4:] / 3
    boxes = [targets[targets[:, 0] == i][:, 1:].numpy() for i in range(4)]
    data, config = joint_set([0, 1, 1, jg.NO_LABEL], boxes), tiny(dropout=0.5)
    network = jg.Network(config, 3, 3, ANCHORS.numpy()).train(training)
    heads = network.parts[0].heads
    heads["det"] = answers(made_maps(targets, 4, 3, CANVAS)).train(training)
    heads["cls"].linear.weight.data.zero_()
    heads["cls"].linear.bias.data = torch.tensor([0.0, 1, 0])
    before, state = torch.get_rng_state(), copy.deepcopy(network.state_dict())
    val = jg.evaluate(network, data, config)
    assert [val[m] for m in jg.METRICS] == pytest.approx([1, 1, 2 / 3, 1 / 2])  # of whole numbers
    assert val["confusion"] == [[0, 1, 0], [0, 2, 0], [0, 0, 0]]  # a row for each class
    assert val["per_class"]["AP50"] == pytest.approx({"a": 1, "b": 1, "c": 1})
    assert str(val["per_class"]["accuracy"]) == "{'x': 0.0, 'y': 1.0, 'z': nan}"
    assert torch.equal(torch.get_rng_state(), before) and same(network.state_dict(), state)
    assert all(module.training == training for module in network.modules())

# --------------------------------------------------------------------------------------------------
# 2. Data: the synthetic set, joint folders, batches

def test_sample_depends_on_seed_split_and_index_alone():
    """Else a larger set would be another set, and runs of different sizes could not be compared."""
    few, many = (jg.load_data(tiny(train_images=n))[0] for n in (4, 9))
    assert same([few.labels, *map(torch.tensor, (few.pixels, *few.boxes))], [
        many.labels[:4], *map(torch.tensor, (many.pixels[:4], *many.boxes[:4]))])
    frames = [jg.synthetic_sample(*at, 64, 1.0)[0].tobytes()
              for at in ((0, "train", 0), (1, "train", 0), (0, "val", 0), (0, "train", 1))]
    assert frames[0] == few.pixels[0].tobytes() and len(set(frames)) == 4

@pytest.mark.parametrize("c", [0.0, 1.0])
def test_frames_hold_one_to_three_jets_in_their_boxes_and_the_views_cue(c):
    """A displaced box would cap mAP50-95; 2 px is the plume's fade. The sector's area rises with
    the view at c = 0, the speckle's correlation at c = 1."""
    seen = []
    for i in range(100):
        pixels, boxes, view = jg.synthetic_sample(5, "train", i, 64, c)
        low, high = boxes[:, 1:3] - boxes[:, 3:] / 2, boxes[:, 1:3] + boxes[:, 3:] / 2
        assert set(boxes[:, 0]) <= {0, 1, 2, 3} and low.min() >= 0 and high.max() <= 1
        for a, b in itertools.combinations(range(len(boxes)), 2):
            overlap = np.minimum(high[a], high[b]) - np.maximum(low[a], low[b])
            assert overlap.min() <= 1e-6  # float32
        y, x = np.nonzero(np.ptp(pixels.astype(int), axis=2) > 25)  # coloured
        extent = [x.min(), y.min(), x.max() + 1, y.max() + 1]
        assert np.abs(np.subtract(extent, 64 * np.append(low.min(0), high.max(0)))).max() <= 2
        a, b = pixels.min(2)[:-1].astype(float), pixels.min(2)[1:]
        inside = (a > 0) & (b > 0)
        seen.append((len(boxes), view, inside.mean(), np.corrcoef(a[inside], b[inside])[0, 1]))
    counts, views, area, grain = np.array(seen).T
    assert set(counts) == {1, 2, 3} == set(views + 1)
    by_area, by_grain = np.corrcoef([views, area, grain])[0, 1:]
    assert (by_area > 0.6, by_grain > 0.6) == (c == 0, c == 1)
    assert min(abs(by_area), abs(by_grain)) < 0.3  # 3 deviations of 100 frames

@pytest.mark.parametrize("c", [0.0, 0.3, 1.0])
def test_best_possible_accuracy_is_0_970_at_every_dominance(c, monkeypatch):
    """Along (sqrt(1-c), sqrt(c)) the cue is N(v - 1, 1/4²), so 1 - 4/3 Phi(-2) are right; across,
    views are alike. g and t as the frame takes them: half-angle 0.62 + 0.13 g, grain 0.9 1.4^t."""
    seen = []  # of each frame: the tissue's grain, the speckle's, the sector's half-angle
    def speckle(rng, shape, s, a=1):
        seen.append(s)
        return np.ones(shape)
    def place_jets(rng, apex, radius, half_angle):
        seen.append(half_angle)
        return np.zeros((0, 4))
    monkeypatch.setattr(jg, "speckle", speckle)
    monkeypatch.setattr(jg, "place_jets", place_jets)
    view = np.array([jg.synthetic_sample(0, "train", i, 16, c)[2] for i in range(3000)])
    _, s, half_angle = np.reshape(seen, (-1, 3)).T
    g, t = (half_angle - 0.62) / 0.13, np.log(s / 0.9 * 64 / 16) / np.log(1.4)
    along = math.sqrt(1 - c) * g + math.sqrt(c) * t
    right = np.digitize(along, [-0.5, 0.5]) == view
    assert right.mean() == pytest.approx(0.970, abs=0.01)  # 3 deviations of 3,000 draws
    across = math.sqrt(c) * g - math.sqrt(1 - c) * t
    assert abs(np.corrcoef(across, view)[0, 1]) < 0.06  # as above
    assert (along - view + 1).std() == pytest.approx(0.25, abs=0.01)  # as above

BOX = "0 0.5 0.5 0.25 0.5"
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8))

def picture(size=(32, 32), colour=(120, 120, 120), mode="RGB") -> Image.Image:
    return Image.new(mode, size, colour)

def encoded(image: Image.Image, suffix: str, **more) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, Image.registered_extensions()[f".{suffix}"], **more)
    return buffer.getvalue()

def write(path: Path, content: Image.Image | str | bytes | None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Image.Image):
        content.save(path)
    elif content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)

def make_set(folder: Path, items: dict, held: dict | None = None, **spec) -> Path:
    """A joint set of {file name: (image or bytes, label text)}; None for a file not written."""
    held = held or {"v.png": (picture(), BOX + "\n0 1 0\n")}
    for split, files in (("train", items), ("val", held)):
        for name, (image, text) in files.items():
            write(folder / "images" / split / name, image)
            write((folder / "labels" / split / name).with_suffix(".txt"), text)
    base = {"path": ".", "train": "images/train", "val": "images/val", "test": "", "nc": 3,
            "names": ["a", "b", "c"], "classification_names": ["x", "y", "z"]} | spec
    path = folder / "data.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in base.items() if v is not ...}))
    return path

def two(image=None, text: str | bytes | None = BOX + "\n0 1 0\n", name="b.png") -> dict:
    return {"a.png": (picture(), BOX + "\n1 0 0\n"),
            name: (picture() if image is None else image, text)}

def load(path: Path, **given) -> tuple[jg.JointSet, jg.JointSet]:
    return jg.load_data(tiny(data=str(path), **{"imgsz": 32} | given), path.parent)

def read_label(folder: Path, text: str | bytes | None, num_classes=3, num_labels=3) -> tuple:
    """What a label file says: boxes (n, 5) and the image's class."""
    first = f"{BOX}\n{' '.join(['1'] + ['0'] * (num_labels - 1))}\n"
    path = make_set(folder, {"a.png": (picture(), first), "b.png": (picture(), text)},
                    {"v.png": (picture(), first)}, nc=..., names=list("abcdefgh"[:num_classes]),
                    classification_names=list("stuvwxyz"[:num_labels]))
    train, _ = load(path)
    return train.boxes[1], train.labels[1]

@pytest.mark.parametrize("text, num_labels, box, label", [
    (BOX, 3, BOX, None), ("0 1 0", 3, "", 1), ("2", 3, "", 2), ("0", 3, "", 0), ("", 3, "", None),
    ("2 .25 .25 .75 .25 .5 1.0", 3, "2 .5 .625 .5 .75", None),  # a triangle's bounding box
    ("0 .2 .2 .4 .4 .2 .2", 3, "0 .3 .3 .2 .2", None), (BOX, 5, BOX, None),
    ("0 0 1 0 0", 5, "", 2), ("1 0 0 0 0", 5, "", 0), ("0 0 0 0 0 0 1", 7, "", 6),
    ("0 .5 .5 1.000001 .2", 3, "0 .5 .5 1 .2", None),  # rounded by another tool
    ("0 .9 .5 .4 .2", 3, "0 .85 .5 .3 .2", None),  # 0.7 to 1.1 is cut to 0.7 to 1
    ("0 .5 .5 0 .2", 3, "", None), ("0 .5 .5 .2 1e-50", 3, "", None),  # no size, in float32
    ("0 .2 .2 .2 .4 .2 .3", 3, "", None), (f"{BOX}\r0 1 0\r".encode(), 3, BOX, 1),
    (f"  {BOX}\t\r\n\r\n\t0  1 0 \n\n".encode(), 3, BOX, 1),
    (b"\xef\xbb\xbf" + f"{BOX}\n0 1 0".encode(), 3, BOX, 1)], ids=str)
def test_rows_are_boxes_polygons_or_the_class(tmp_path, text, num_labels, box, label):
    """With 5 or 7 classes a one-hot row is as long as a box or a triangle; any line end is read."""
    boxes, found = read_label(tmp_path, text, num_labels=num_labels)
    expected = np.array(box.split(), float).reshape(-1, 5)
    np.testing.assert_allclose(boxes, expected, atol=2e-6)  # the 1.000001
    assert found == (jg.NO_LABEL if label is None else label)

TOKENS = "0 1 2 0.5 1.0 -1 nan inf 1e400 1e-50 x 1_0 ٣ 0,5 -0.0 0x1 \x1c \u2028 \0".split(" ")
ROW = st.lists(st.sampled_from(TOKENS), max_size=8).map(" ".join)

@settings(max_examples=60, deadline=None)
@given(st.lists(ROW, max_size=6).map("\n".join) | st.text(max_size=60), st.integers(1, 8),
       st.sampled_from([2, 3, 5, 7]))
def test_any_text_gives_boxes_or_a_line_that_says_where(tmp_path_factory, text, classes, labels):
    try:
        boxes, label = read_label(tmp_path_factory.mktemp("set"), text, classes, labels)
    except jg.UserError as error:
        lines = str(error).splitlines()
        assert lines and all(re.search(r"b\.txt(:[1-9]\d*)?: .|^… and ", x) for x in lines)
        return
    assert boxes.shape[1] == 5 and np.isfinite(boxes).all() and (boxes[:, 3:] > 0).all()
    assert set(boxes[:, 0]) <= set(range(classes)) and label in (jg.NO_LABEL, *range(labels))
    assert boxes.min(initial=0) >= 0 and boxes[:, 1:].max(initial=0) <= 1

@pytest.mark.parametrize("table", [
    "file,class\na.png,z\nb.png,y\n", "a,z\nb,y", "\ufeffimages/train/a.png;z\r\ntrain/b;y\r\n",
    "name\tclass\nimages\\train\\a.png\tz\n\nb.jpg\ty\n", '"a.png","z"\n"b.png", y\n'],
    ids=["header", "stems", "folders", "tabs", "quotes"])
def test_every_form_of_a_set_is_read(tmp_path, table):
    """Classes in a table, where a row may say the same; names as a mapping; train as a list of
    list files, in which ./ is relative to the list, all else to the set, and of folders."""
    path = make_set(tmp_path, two() | {"a.png": (picture(), BOX)}, classes="classes.csv",
                    names={2: "c", 0: "a", 1: "b"}, train=["l.txt", "images/more", "images/k.txt"])
    for name, text in (("l.txt", "./images/train/a.png\n\nimages/train/b.png\r\n"),
                       ("images/k.txt", "./train/d.png\n"), ("images/train/d.png", picture()),
                       ("images/more/odd.jpg/c.PNG", picture()), ("classes.csv", table)):
        write(tmp_path / name, text)
    train, val = load(path)
    assert [p.name for p in train.paths] == ["c.PNG", "a.png", "b.png", "d.png"]
    assert (train.labels, val.labels) == ([jg.NO_LABEL, 2, 1, jg.NO_LABEL], [1])
    assert train.names == ["a", "b", "c"]

def test_fingerprint_changes_with_a_label_a_name_or_a_size_and_with_nothing_else(tmp_path):
    """A finished run is taken as done where settings and fingerprint are the same."""
    def fingerprint(table="v,x\n", name="w.png", train=BOX, val=BOX, size=(32, 32)) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        path = make_set(folder, two(picture(size), train), {
            "v.png": (picture(), val), name: (picture(), BOX)}, classes="classes.csv")
        (folder / "classes.csv").write_text(table)
        return load(path)[0].fingerprint
    changes = ({"table": "v,y\n"}, {"name": "u.png"}, {"train": "1 .5 .5 .2 .2"},
               {"val": "1 .5 .5 .2 .2"}, {"size": (320, 320)})
    others = {fingerprint(**change) for change in changes}
    assert fingerprint() == fingerprint() not in others and len(others) == len(changes)

@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on what it skips
@pytest.mark.parametrize("suffix", "jpg png gif tif webp bmp ppm jp2".split())
def test_damaged_images_are_read_or_named_a_line_each(tmp_path, suffix):
    """Pillow raises many types on damaged bytes; all must come out as one."""
    rng, exif, files = np.random.default_rng(0), NOISE.getexif(), {}
    exif[0x0112], exif[0x010E] = 6, "text"
    more = {"exif": exif} if suffix in ("jpg", "png", "webp", "tif") else {}
    whole = np.frombuffer(encoded(NOISE, suffix, **more), np.uint8)
    for k in range(80):
        raw = whole.copy()
        raw[rng.integers(0, min(len(raw), 300), 4)] = rng.integers(0, 256, 4)
        files[f"{k}.{suffix}"] = raw[: rng.integers(1, len(raw) + 1)].tobytes(), BOX + "\n0 1 0\n"
    named = rf"(.*/\d+\.{suffix}: not a readable image .*; replace it\n){{10}}… and \d+ more"
    with pytest.raises(jg.UserError, match=f"^{named}$"):
        load(make_set(tmp_path, files))

@pytest.mark.parametrize("image, suffix, wanted", [
    (picture(colour=77, mode="L"), ".png", 77), (picture(colour=1, mode="1"), ".png", 255),
    (picture(colour=(10, 20, 30, 255), mode="RGBA"), ".png", (10, 20, 30)),
    (picture(colour=(50, 255), mode="LA"), ".png", 50),
    (picture(colour=(10, 20, 30)).convert("P", palette=Image.Palette.ADAPTIVE), ".gif",
     (10, 20, 30)), (picture(colour=(255, 0, 0, 0), mode="CMYK"), ".tif", (0, 255, 255)),
    *((Image.fromarray(np.full((9, 9), 257 * x, np.uint16)), ".png", x) for x in (0, 128, 255)),
    *((picture(size, (114, 114, 114)), ".png", 114) for size in ((1, 1), (2000, 2), (2, 2000)))])
def test_every_kind_and_size_of_image_becomes_8_bit_rgb(tmp_path, image, suffix, wanted):
    """16-bit grey is divided by 257, not clipped; what is padded is grey, 114."""
    train, _ = load(make_set(tmp_path, two(image, name=f"b{suffix}")))
    assert train.canvas == (32, 32)
    assert np.abs(train.pixels[1].astype(int) - wanted).max() <= 12  # JPEG's and CMYK's rounding

@pytest.mark.parametrize("size, canvas, edges, row", [
    ((300, 100), (32, 64), [6.4, 9.2, 19.2, 17.6], "0 0.2 0.4 0.2 0.4"),
    ((100, 300), (64, 32), [9.2, 6.4, 17.6, 19.2], "0 0.4 0.2 0.4 0.2")], ids=["wide", "tall"])
def test_letterbox_keeps_the_aspect_and_boxes_on_the_object(tmp_path, size, canvas, edges, row):
    """300x100 at 64 px is 64x21, 5 px below the top of a 64x32 canvas; a swap of w and h shows."""
    image, corners = picture(size, (0, 0, 0)), [30, 20, 89, 59]
    ImageDraw.Draw(image).rectangle(corners if size[0] > size[1] else [20, 30, 59, 89], fill="red")
    train, _ = load(make_set(tmp_path, two(image, row) | {"a.png": (image, row + "\n1")}, {
        "v.png": (image, row)}), imgsz=64)
    assert train.canvas == canvas
    np.testing.assert_allclose(train.truth(0), [[0, *edges]], atol=1e-4)  # float32 of 64 px
    y, x = np.nonzero(np.ptp(train.pixels[0], axis=2) > 100)  # red
    seen = [x.min(), y.min(), x.max() + 1, y.max() + 1]
    assert seen == pytest.approx(edges, abs=1)  # resampling blurs the edge
    anchors = jg.Run(tiny(), train, CPU).network.parts[0].heads["det"].anchors
    w_h = np.subtract(edges[2:], edges[:2])
    np.testing.assert_allclose(anchors.reshape(9, 2), [w_h] * 9, rtol=1e-5)  # float32
    assert (train.pixels[0][:3, :3] == 114).all()

def augmented(seed: int, **given) -> tuple:
    """Two grey images 48x96 with a white patch at x 16-36, y 8-20, augmented; its box, px, or none;
    the patch as it is seen, px, 0.72 being half way to the grey; its share of 20 x 12 px."""
    images = torch.full((2, 3, 48, 96), 0.447)
    images[:, :, 8:20, 16:36] = 1
    targets = torch.tensor([[k, 1, 26 / 96, 14 / 48, 20 / 96, 12 / 48] for k in range(2)])
    images, targets, _ = jg.augment(jg.Batch(images, targets, torch.tensor([0, 1])), tiny(**given),
                                    torch.Generator().manual_seed(seed))
    for k, image in enumerate(images):
        boxes = jg.cxcywh_to_xyxy(targets[targets[:, 0] == k, 2:]) * torch.tensor([96, 48, 96, 48])
        y, x = (image[0] > 0.72).nonzero(as_tuple=True)
        seen = len(x) and [x.min().item(), y.min().item(), x.max().item() + 1, y.max().item() + 1]
        yield boxes[0].tolist() if len(boxes) else None, seen, len(x) / 240

@pytest.mark.parametrize("flip_x, flip_y, scale, shift, wanted", [
    (1, 0, 0, 0, [60, 8, 80, 20]), (0, 1, 0, 0, [16, 28, 36, 40]), (1, 1, 0, 0, [60, 28, 80, 40]),
    (0, 0, 0, 0, [16, 8, 36, 20]), (0.5, 0.5, 0.3, 0.4, None)])
def test_augment_moves_patch_and_box_alike(flip_x, flip_y, scale, shift, wanted):
    """x1 = 96 - 36 = 60 and so on. A box of which less than a fifth is left is dropped."""
    kept, given = set(), {"flip_x": flip_x, "flip_y": flip_y, "scale": scale, "shift": shift}
    for seed in range(30 if scale else 1):
        for box, seen, share in augmented(seed, **given):
            kept.add(box is not None)
            assert share > 0.1 if box else share < 0.4  # of a patch zoomed by 0.7 to 1.3
            if box:  # 1 px: its edge is blurred
                assert seen == pytest.approx(box, abs=1 if scale else 1e-4)
                assert wanted in (None, seen)
    assert kept == ({True, False} if scale else {True})

def test_epochs_are_shuffled_anew_ranks_share_the_images_and_one_alone_is_left_out():
    """BatchNorm cannot train on one image; 17 over two ranks are 9 each, one of them twice."""
    order = lambda *where: torch.cat(jg.epoch_order(*where)).tolist()  # noqa: E731
    first, again, second = (order(16, tiny(), epoch) for epoch in (0, 0, 1))
    assert first == again != second and sorted(first) == sorted(second) == [*range(16)]
    assert first != order(16, tiny(seed=5), 0)
    keys = itertools.product(("order", "augment", "dropout"), *[(0, 1)] * 3)  # seed, epoch, rank
    assert len({jg.stream(*key).initial_seed() for key in keys}) == 24
    halves = [order(16, tiny(), 0, 2, rank) for rank in (0, 1)]
    assert sorted(sum(halves, [])) == [*range(16)] and len(halves[0]) == 8
    assert [len(b) for b in jg.epoch_order(17, tiny(), 0)] == [8, 8]
    assert [len(b) for b in jg.epoch_order(17, tiny(batch_size=9), 0, 2, 1)] == [9]

def program(monkeypatch, name: str, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    with pytest.raises(SystemExit, match=r"^\d+$") as ended:
        runpy.run_path(str(jg.ROOT / "data" / f"{name}.py"), run_name="__main__")
    return ended.value.code

@pytest.mark.parametrize("cache_mb", [2048, 0])
def test_exported_set_reads_back_as_the_synthetic_one(tmp_path, monkeypatch, cache_mb):
    """In memory or from a mapped file. PNG loses nothing, and labels have six decimals: 1e-6."""
    assert program(monkeypatch, "synthetic", tmp_path / "set", *options()) == 0
    splits = load(tmp_path / "set/data.yaml", imgsz=64, cache_mb=cache_mb)
    for back, made in zip(splits, jg.load_data(tiny())):
        assert isinstance(back.pixels, np.memmap) == (cache_mb == 0)
        assert np.array_equal(back.pixels, made.pixels) and back.labels == made.labels
        assert (back.names, back.classification_names) == (made.names, made.classification_names)
        assert back.canvas == made.canvas and back.notes == []
        for a, b in zip(back.boxes, made.boxes):
            assert np.allclose(a, np.unique(b, axis=0), atol=2e-6)  # the reader sorts
    for file in tmp_path.glob("set/labels/*/*.txt"):  # all that other loaders take: class, box
        assert re.fullmatch(r"([0-3]( [01]\.\d{6}){4}\n)+", file.read_text())
    assert not LINUX or not list(tmp_path.rglob("*.npy"))  # it goes with the process
    assert program(monkeypatch, "synthetic", tmp_path / "set", *options()) == 2  # not over it

def test_bccd_makes_a_joint_set(tmp_path, monkeypatch):
    """One image of 640 x 480 px, as its two sources have it; a box of no size is left out."""
    monkeypatch.chdir(tmp_path)
    box = ("<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax>"
           "<ymax>{}</ymax></bndbox></object>")
    xml = "<x>" + box.format("WBC", 64, 120, 192, 480) + box.format("RBC", 5, 5, 5, 5) + "</x>"
    for name, content in (("b/BCCD/Annotations/BloodImage_00001.xml", xml),
                          ("b/BCCD/JPEGImages/BloodImage_00001.jpg", picture((640, 480))),
                          ("w/labels.csv", ',Image,Category\n,1,"NEUTROPHIL, NEUTROPHIL"\n'),
                          ("split.txt", "train BloodImage_00001\n")):
        write(tmp_path / name, content)
    assert program(monkeypatch, *"bccd b w --out set --split split.txt".split()) == 0
    assert Image.open("set/images/train/BloodImage_00001.jpg").size == (320, 240)
    text = Path("set/labels/train/BloodImage_00001.txt").read_text()
    assert text == "1 0.200000 0.625000 0.200000 0.750000\n\n0 0 0 1\n"

# --------------------------------------------------------------------------------------------------
# 3. Bad input: one table, driven through `main`: exit 2, a line for each fault, nothing written

FILES = ["best.pt", "config.yaml", "figure.png", "last.pt", "metrics.jsonl", "results.json"]

def start(out: Path, *words, **given) -> int:
    return jg.main([*map(str, words), "--out", str(out), *options(**given)])

@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("runs")
    for mode in jg.MODES:
        assert start(base / mode, "--mode", mode) == 0
    return {mode: base / mode for mode in jg.MODES}

def put(name: str, content: str | bytes):
    """A maker, as the next three: puts what a case needs into a folder, or takes it from `runs`."""
    return lambda folder, runs: write(folder / name, content)

def link(name: str, target: str):
    return lambda folder, runs: (folder / name).symlink_to(target)

def joint(items: dict | None = None, held: dict | None = None, **spec):
    return lambda folder, runs: make_set(folder / "set", items or two(), held, **spec)

def begun(folder: Path, runs: dict) -> None:
    shutil.copytree(runs["fixed"], folder / "run")

def bmp(side: int) -> bytes:
    """A bitmap that claims to have sides of so many px, and holds 32 x 32."""
    raw = bytearray(encoded(picture(), "bmp"))
    raw[18:26] = side.to_bytes(4, "little") * 2
    return bytes(raw)

class Shell:
    """Unpickles into a shell command, which would leave a file named ran."""
    def __reduce__(self):
        return os.system, ("touch ran",)

def saved(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()

BIG, BOXES = "0x" + "f" * 5000, "[[1, 2], [1, 2], [1, 2]]"  # too many digits for Python to print
CONFIGS = [  # the file of --config, and what is said of it
    *((text, f"^error: c.yaml: {text.partition(':')[0]}: found .*expected") for text in (
        "mode: no", "seed: 2.5", "seed: -1", "epochs: no", "epochs: .inf", "epochs: -1", "lr: .nan",
        "lr: yes", "lr: [1]", "lr: {a: 1}", "lr:", "flip_x: 1.01", "imgsz: 65", "class_balance: 2",
        "betas: [0.9, 1.0]", "betas: 0.9", "betas: [0.9, yes]", "initial_weights: [1, 0]",
        "initial_weights: 1,2,3", "anchors: [[1, 2]]", "anchors: other",
        f"anchors: [{BOXES}, {BOXES}]", f"anchors: [{BOXES}, {BOXES}, [[1, 2], [1, 2], [1, 0]]]",
        "mode: Gradnorm", "max_det: 30001", "optimizer: adam", "data: [1]", f"lr: {BIG}",
        f"anchors: {BIG}", "mode: !!python/object/apply:os.system ['touch ran']")),
    ("epoch: 3", "unknown key epoch; did you mean epochs"), ("? [a]\n: 1", "YAML|unknown key"),
    *((text, "key: value") for text in ("", "- 1", "just words")),
    *((text, r"c\.yaml: .*YAML") for text in (
        "lr: [1", "a: b: c", "lr: \x01", "lr: \0", "lr: " + "[" * 1200, b"lr: \xff\n",
        "lr: 1\n".encode("utf-16")))]
PREDICT = "--mode predict --checkpoint run/last.pt"
OPTIONS = [  # arguments, what is said of them, makers
    ("--batch 4", "--batch: no such option; did you mean batch_size"), ("--config .", "directory"),
    ("--mode reproduce --seed 1", "reproduce takes no setting"), ("--epochs=", "epochs: found ''"),
    (f"{PREDICT} --depth_multiple 1", "predict no .*depth", begun), ("--weights x.pt", "mean init"),
    (f"{PREDICT} --data no", "no: cannot be read", begun), ("--device gpu", "device: found 'gpu'"),
    ("--data no/such.yaml", r"no/such\.yaml: cannot be read"), ("--img 1", "mean imgsz"),
    ("--config no.yaml", r"no\.yaml: .*No such"), ("--lr fast", "lr: found 'fast', expected 1e-8"),
    ("--mode compare", "--mode: invalid choice"), ("--resume no", r"no/config\.yaml: .*No such"),
    ("--conf 0.4", "--conf: no such option"), ("--lr", "--lr: expected one argument"),
    ("--epochs 2.5", "epochs: found '2.5'"),
    *((given, "needs --checkpoint.*other modes take neither") for given in (
        "--source x", "--checkpoint x.pt", "--mode predict", "--mode predict --source x")),
    ("--out mine", "--out mine: not empty", put("mine", "a file")),
    *((f"{x} --out .", "--out .*: not empty", put("a", "b")) for x in ("", "--mode reproduce")),
    *((f"{more} --out run", "run: not empty.*--resume run", begun) for more in ("", PREDICT)),
    (f"{PREDICT} --source none.png", "--source none.png: no readable image", begun),
    (f"{PREDICT} --source bad.png", "bad.png: no readable image", begun, put("bad.png", "x")),
    (f"{PREDICT} --data set/data.yaml", "other classes than", begun, joint()),
    *((f"--init run/last.pt --train_images 2 --val_images 2 --width_multiple {more}",
       "init run/last.pt: no detector of this width_multiple and depth_multiple", begun)
      for more in ("0.25", "0.03125 --depth_multiple 1")),
    *((f"--resume run {more}", "takes no option but .*schedule: --init its last.pt", begun)
      for more in ("--lr 0.001", "--mode equal", "--out x", "--epochs 99")),
    ("--resume run --data set/data.yaml", "other images or labels than set/data", begun, joint()),
    *((f"--resume run # {change}", r"last\.pt: does not fit", begun, put(
        "run/config.yaml", yaml.safe_dump(TINY | {"mode": "fixed"} | change))) for change in (
            {"width_multiple": 0.0625}, {"mode": "gradnorm"}, {"epochs": 9}))]
OPTIONS += [(f"study {words}", said) for words, said in (("compare --peers", "no --peers"),
    ("compare --seeds 1 1", "--seeds: expected"), ("compare --seed 1", "--seeds: expected"),
    ("compare --sweep seed=0,1", "--sweep seed=0,1: expected"), ("bench --round 3", "mean rounds"),
    ("compare --sweep alpha=", "--sweep alpha=: expected"), ("check no.json", "no.json: expected"),
    ("compare --modes dual --sweep alpha=0,1", "a key that --modes read"), ("bench x", "no file"),
    ("compare --sweep alpha=x,1", "alpha: found 'x'"), ("compare --modes no", "--modes: invalid"))]
OPTIONS += [] if torch.cuda.is_available() else [
    (f"--device {name}", f"--device {name}: .*has none") for name in ("cuda", "0", "cuda:1")]
FOREIGN = {"pickle": pickle.dumps(Shell()), "empty": b"", "garbage": b"garbage" * 99,
           "torch": saved({"jointgrad/2": True, "network": Shell()}),
           "tensor": saved(torch.ones(3)), "other": saved({"model": torch.ones(3)}),
           "hollow": saved({"jointgrad/2": True})}
SPECS = {  # what is said of keys of data.yaml
    "names: expected": [{"names": x} for x in ({0: "a", 2: "c"}, [], "abc", ..., [["a"], "b"])],
    "names: a name is given twice": [{"names": ["a", "a", "c"]}],
    "nc: expected 3": [{"nc": 4}, {"nc": None}], "expected path, train": [{"path": ["x"]}],
    "classification_names: expected": [{"classification_names": []}],
    "cannot be read": [{"path": "\0"}, {"path": "no"}, {"train": "\0"}, {"train": "http://h/x.zip"},
                       {"val": 5}, {"train": ["images/train", 1]}, {"classes": "no.csv"}],
    "too long": [{"path": "a" * 300}, {"train": "a" * 300}],
    "train: ": [{"train": "labels"}, {"train": []}, {"train": ...}],
    "expected an image file below": [{"train": "../images"}]}
FAULTS = {  # what is said of the third line of a label file
    "expected a box class that is a whole number from 0 to 2": [
        "3 .5 .5 .1 .1", "-1 .5 .5 .1 .1", "0.5 .5 .5 .1 .1"],
    "from 0 to 1, not pixels": ["0 320 240 50 60", "0 .5 .5 -.1 .1", "0 .5 .5 1.01 .1"],
    "expected a box .*polygon .*one-hot of 3 or an index": [
        "0 .5 .5 .1", "0 .5 .5 .1 .1 .2", "0 .1 .1 .2 .2 .3 .3 .4", "0.8 0.1 0.1", "1 1 0", "0 0 0",
        "3", "-1", "1.5", "0 1", "0 0 1 0", "0 0 0 0 1", "0 0 0 1 1"],
    "expected numbers": ["cat .5 .5 .1 .1", "0,0.5,0.5,0.1,0.1", "0 nan .5 .1 .1", "0 inf .5 .1 .1",
                         "0 ٣ .5 .1 .1"]}
CUT, PAIR = encoded(NOISE, "jpg")[:1200], ("a.png", "b.png")  # its header is sound
UNREADABLE = [  # name and bytes of an image
    ("b.png", b""), ("b.bmp", bmp(30000)), ("b.bmp", bmp(9800)), ("b.bmp", bmp(0)),  # too large
    ("b.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), ("b.jpg", CUT),
    ("b.tif", encoded(Image.new("F", (8, 8)), "tif"))]  # pixels without a range
TABLES = [  # classes.csv, and what is said of it
    ("a.png,x\nb.png,w\n", r"classes\.csv:2: 'b.png', 'w': .*one of the classes x, y, z"),
    ("a.png,x\nc.png,y\n", r"classes\.csv:2: 'c.png', 'y': 0 images"),
    ("a.png,x\n\ndeep/b.png,y\n", r"classes\.csv:3: .*0 images"), ("b.png\n", r"csv:1: "),
    ("file,class\nb,y\ntrain/b,z\n", r"classes\.csv:3: .*another class stands above"),
    ("b,x\n", r"b\.txt: its class row and the table differ"), (b"b,y\xff\n", "not UTF-8")]
SETS = [  # what is said of a set, makers
    *(([rf"b\.txt:3: .*{said}"], joint(two(text=f"{BOX}\n\n{row}\n")))
      for said, rows in FAULTS.items() for row in rows),
    *(([said], joint(**spec), put("images/o.png", ""))
      for said, specs in SPECS.items() for spec in specs),
    *(([f"{re.escape(line)}: expected an image file below"], joint(train="list.txt"),
       put("images/secret.png", b""), put("set/list.txt", f"images/train/a.png\n{line}\n"))
      for line in ("../images/secret.png", "/etc/hostname", "images/train/no.png", "images/train",
                   "labels/train/a.txt")),
    (["binary"], joint(train="list.txt"), put("set/list.txt", "a\0b")),
    *(([rf"{name}: not a readable image"], joint(two(content, name=name)))
      for name, content in UNREADABLE),
    *(([said], joint(classes="classes.csv"), put("set/classes.csv", table))
      for table, said in TABLES), *((["expected path, train, val"], put("set/data.yaml", text))
      for text in ("", "3", "- a", "words")),
    (["YAML"], put("set/data.yaml", "names: [1")), (["UTF-8"], put("set/data.yaml", b"\xff")),
    (["larger than 1 MB"], put("set/data.yaml", "#" * 2**20 + "#")),  # it may be a stranger's
    *(([r"b\.txt: .*(UTF-8|binary)"], joint(two(text=raw))) for raw in (
        BOX.encode("utf-16"), b"\x00\x01\x02", b"\xff\xd8\xff\xe0", BOX.encode("utf-16-le"))),
    ([r"b\.txt: cannot be read"], joint(two(text=None)), put("set/labels/train/b.txt/x", "")),
    ([r"b\.txt: cannot be read"], joint(two(text=None)), link("set/labels/train/b.txt", "b.txt")),
    ([r"[ls]\.png: .*no link out of it"] * 2, joint(),
     put("secret.png", b""), link("set/images/train/s.png", "../../../secret.png"),
     link("set/images/train/l.png", "l.png")),
    ([rf"a\.{x}: shares .*a\.txt with a\.jpg; rename" for x in ("png", "x")], joint(val="v"),
     *(put(f"set/images/train/a.{x}", "") for x in ("jpg", "x")), put("set/v", "images/train/a.x")),
    ([r"b\.txt:1: '0 9 9 9 9': ", r"b\.txt:2: 'x': "], joint(two(text="0 9 9 9 9\nx"))),
    ([rf"{k:02}\.txt:1: " for k in range(10)] + [r"… and \d more"],
     joint({f"{k:02}.png": (picture(), "0 9 9 9 9") for k in range(14)})),
    (["train: no box, as in .*labels/train/a.txt"], joint(dict.fromkeys(PAIR, (picture(), "1")))),
    (["train: no image class .*--mode detect"], joint(dict.fromkeys(PAIR, (picture(), BOX)))),
    (["train: no image class .*classification_names"],
     joint(dict.fromkeys(PAIR, (picture(), BOX)), {"v.png": (picture(), BOX)},
           classification_names=...)),
    (["train: one image; expected two"], joint({"a.png": (picture(), BOX + "\n1")}))]
BAD = [("--config c.yaml", [said], [put("c.yaml", text)]) for text, said in CONFIGS]
BAD += [(arguments, [said], makers) for arguments, said, *makers in OPTIONS]
BAD += [(use, [r"last\.pt: "], [begun, put("run/last.pt", content)])
        for content in FOREIGN.values() for use in (
            PREDICT, "--resume run", "--init run/last.pt --train_images 2 --val_images 2")]
BAD += [("--data set/data.yaml --imgsz 32", said, makers) for said, *makers in SETS]

@pytest.mark.parametrize("arguments, expected, makers", BAD, ids=[
    f"{arguments} {expected[0][:30]}" for arguments, expected, _ in BAD])
def test_a_mistake_is_a_line_that_names_it_and_exit_2_and_nothing_is_written(
        tmp_path, monkeypatch, capsys, runs, arguments, expected, makers):
    """A line for each fault, with what was found and expected; never a traceback."""
    monkeypatch.chdir(tmp_path)
    for make in makers:
        make(tmp_path, runs)
    contents = lambda: {f: f.is_file() and f.read_bytes()  # noqa: E731
                        for f in tmp_path.rglob("*") if f.name != "runs"}
    before = contents()
    words = shlex.split(arguments, comments=True)
    code = program(monkeypatch, *words) if words[0] == "study" else jg.main(words)
    lines = [x for x in capsys.readouterr().err.splitlines() if not x.startswith("warning: ")]
    assert code == 2 - ("too long" in expected) and len(lines) == len(expected), lines
    for line, said in zip(lines, expected):
        assert line.startswith("error: ") and re.search(said, line) and len(line) < 900, line
    assert contents() == before

def test_settings_are_read_in_the_forms_that_people_type(tmp_path):
    """YAML 1.1 reads 1e-3 as text and `no` as False; a whole number is a fine float."""
    (tmp_path / "c.yaml").write_text("lr: 1e-3\nscale: 0\nbetas: [0.8, 0.9]\ndata: no\nseed: 3\n")
    config = jg.load_config(tmp_path / "c.yaml", {
        "seed": "7", "initial_weights": "1,2", "anchors": str(ANCHORS.tolist())})
    assert (config.lr, config.scale, config.data, config.seed) == (0.001, 0, "no", 7)
    assert (config.initial_weights, config.betas) == ((1, 2), (0.8, 0.9))
    assert torch.equal(jg.Run(config, joint_set(), CPU).losses["det"].anchors, ANCHORS)

# --------------------------------------------------------------------------------------------------
# 4. The contract: files, results.json, header, pictures, predictions

def results_of(out: Path) -> dict:
    return json.loads((out / "results.json").read_text())

def log_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

def state_of(checkpoint: Path) -> dict:
    return torch.load(checkpoint, weights_only=True)

def test_every_key_has_a_comment_a_field_and_its_line_in_help(capsys):
    comments = jg.key_comments()
    assert list(comments) == list(jg.Config.__dataclass_fields__)
    with pytest.raises(SystemExit, match="0"):
        jg.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for key, comment in comments.items():
        assert f"--{key} " in shown and " ".join(comment.split()) in shown, key

@pytest.mark.parametrize("mode", jg.MODES)
def test_run_writes_the_contract(runs, mode):
    """DESIGN section 5: files and keys that scripts rely on."""
    out, results, rows = runs[mode], results_of(runs[mode]), log_of(runs[mode])
    tasks = {"detect": ["det"], "classify": ["cls"]}.get(mode, ["det", "cls"])
    shared = mode in ("fixed", "equal", "gradnorm")  # a trunk that both tasks train
    assert sorted(p.name for p in out.iterdir()) == FILES
    assert yaml.safe_load((out / "config.yaml").read_text()) == results["config"]
    assert {key: set(x) if isinstance(x, dict) else x for key, x in results.items() if key not in (
        "config", "environment", "dataset", "flops_per_image", "peak_rss_mb")} == {
        "schema": "jointgrad/2", "mode": mode, "seed": 0, "data": "synthetic", "steps": 6,
        "parameters": {"total", "trunk", "det", "cls"}, "weights": {"initial", "final", "change"},
        "loss": {"mean", "final"}, "interference": {
            "cosine_mean", "conflict_share", "magnitude_similarity", "gradient_share"
        } if shared else None, "val": {*jg.METRICS, "per_class", *["confusion"] * ("cls" in tasks)},
        "time": {"start_s", "train_s", "train_cpu_s", "eval_s", "step_ms", "images_per_s"}}
    for metric, task in zip(jg.METRICS, ("det", "det", "cls", "cls")):
        assert (results["val"][metric] is None) == (task not in tasks)
    assert results["peak_rss_mb"] > 50  # torch alone
    total, *each = (results["parameters"][key] for key in ("total", "trunk", "det", "cls"))
    assert total == sum(each)  # dual: each network is its task's
    assert [x > 0 for x in each] == [mode != "dual", "det" in tasks, "cls" in tasks]
    if shared:
        share = np.mean([row["G/det"] / (row["G/det"] + row["G/cls"]) for row in rows])
        assert results["interference"]["gradient_share"]["det"] == pytest.approx(share)
    given, final = [1.0] * len(tasks), results["weights"]["final"]
    given = [1.0, 0.01] if mode in ("fixed", "gradnorm") else given
    change = pytest.approx(np.subtract(final, given))
    assert results["weights"] == {"initial": given, "final": final, "change": change}
    keys = {f"{key}/{task}" for task in tasks for key in (
        "L", "w", *["G"] * shared, *["r"] * (mode == "gradnorm"))}
    keys |= {"step", "epoch", "loss", "grad_norm", *["cosine", "similarity"] * shared}
    for row in rows:
        assert row.keys() - {"time", "val"} == keys
        assert row["loss"] == pytest.approx(sum(row[f"w/{t}"] * row[f"L/{t}"] for t in tasks))
    assert [rows[0][f"w/{task}"] for task in tasks] == pytest.approx(given)  # float32
    if mode == "gradnorm":  # nothing but the balancer moves w: replayed from the log
        L, w, G = (double([[row[f"{key}/{t}"] for t in tasks] for row in rows]) for key in "LwG")
        b = balancer(given, alpha=0.7, lr=0.05, w_min=0.004)
        replayed = torch.stack([b.update(*step) for step in zip(L, G / w)])
        torch.testing.assert_close(replayed[:-1], w[1:], rtol=1e-4, atol=0)  # float32
    assert [row["step"] for row in rows] == [*range(6)] and rows[-1]["val"] == results["val"]
    assert [row["epoch"] for row in rows if "val" in row] == [1, 2]  # every second, and the last
    scores = [sum(row["val"][m] or 0 for m in jg.METRICS[1::2]) for row in rows if "val" in row]
    assert state_of(out / "best.pt")["epoch"] == 3 - (scores[0] > scores[1])  # of 2 and 3
    losses = [row["loss"] for row in rows]
    assert results["loss"] == pytest.approx({"mean": np.mean(losses), "final": np.mean(losses[4:])})

def test_zero_epochs_print_and_draw_the_data_and_end(tmp_path, monkeypatch, capsys):
    """Default folders are numbered: nothing is ever overwritten."""
    monkeypatch.chdir(tmp_path)
    for out in (Path("runs/data-synthetic-s0"), Path("runs/data-synthetic-s0-2")):
        assert jg.main(["--mode", "fixed", *options(epochs=0)]) == 0
        printed = capsys.readouterr().out
        assert str(out) in printed.splitlines()[-1]
        assert {*os.listdir(out)} == {"config.yaml", "metrics.jsonl", "labels.png"}
    told = {name: [int(a), int(b)] for name, a, b in re.findall(
        r"\| ([\w ]+?) +\| +(\d+) +\| +(\d+) +\|", printed)}  # of train, of val
    for k, data in enumerate(jg.load_data(tiny())):
        kinds = np.concatenate(data.boxes)[:, 0].tolist()
        assert [told[f"box {name}"][k] for name in jg.JETS] == [*map(kinds.count, range(4))]
        assert [told[f"class {x}"][k] for x in jg.VIEWS] == [*map(data.labels.count, range(3))]
    anchors = jg.Run(tiny(), jg.load_data(tiny())[0], CPU).losses["det"].anchors.round().int()
    assert f"64 x 64 px; anchors, px: {anchors.tolist()}" in printed
    gains = [tiny().box_gain, tiny().obj_gain / 100, tiny().cls_gain * 4 / 80]  # (64 / 640)^2
    assert "loss: 8 x ({:.3g} box + {:.3g} objectness + {:.3g} class)".format(*gains) in printed

def test_what_is_odd_about_a_set_is_a_warning_and_the_run_has_all_its_files(tmp_path, capsys):
    """A validation split without labels, one in the training split, in a folder of an odd name."""
    items = two(text=f"{BOX}\n{BOX}") | {"c.png": (picture(), "0 .5 .5 0 .2\n1 .9 .5 .4 .2\n0")}
    path = make_set(tmp_path / "$_$ 𠮷", items, {"v.png": (picture(), None)},
                    train=["images/train", "images/val"])
    assert start(tmp_path / "out", "--data", path, epochs=1, imgsz=32) == 0
    said = capsys.readouterr().err
    for note in ("val: no box", "val: no image class", "train and val share images",
                 "v.txt: no such label file", "v.txt: no image class", "b.txt: no image class",
                 "b.txt: a box that is repeated", "c.txt: .*of no size", "c.txt: .*outside",
                 "batch_size 8: an epoch is one step of 4 images"):
        assert re.search(f"(?m)^warning: .*{note}", said)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == FILES

def predict(out: Path, checkpoint: Path, *options) -> dict:
    assert jg.main(["--mode", "predict", "--checkpoint", str(checkpoint), "--out", str(out),
                    "--device", "cpu", *map(str, options)]) == 0
    return json.loads((out / "predictions.json").read_text())

def test_predict_draws_images_of_every_odd_name_and_skips_a_bad_one(runs, tmp_path, capsys):
    """Names are other people's: spaces, accents, dashes, line breaks, 200 letters, bad bytes."""
    source, out = tmp_path / "in", tmp_path / "out"
    names = {"a b.png": "a_b.png", "schön 图.png": "schön_图.png", "-x.PNG": "-x.png",
             "n" * 200 + ".png": "n" * 50 + ".png", "sub/a b.png": "5-a_b.png"}
    names |= {"x\ny.png": "x_y.png", os.fsdecode(b"\xff.png"): "_.png"} if LINUX else {}
    for k, name in enumerate(names):
        write(source / name, picture((50 + k, 30)))
    (source / "bad.png").write_bytes(b"x")
    images = predict(out, runs["gradnorm"] / "best.pt", "--source", source,
                     "--predict_conf", 0)["images"]
    told = [str(source / n).encode(errors="replace").decode() for n in names]  # JSON is UTF-8
    assert {image["image"]: image["picture"] for image in images} == dict(zip(told, names.values()))
    for image in images:
        assert Image.open(out / image["picture"]).width >= 50 and image["boxes"]
    assert figures.drawable(["RBC", "白血球"]) == ["RBC", "1"]  # the font has no such letters
    assert re.search("warning: .*bad.png: not a readable image.*skipped", capsys.readouterr().err)
    found = predict(tmp_path / "val", runs["gradnorm"] / "last.pt")  # the val split, with metrics
    assert found["metrics"] == results_of(runs["gradnorm"])["val"] and len(found["images"]) == 8

def test_predictor_puts_a_planted_box_where_it_is_in_a_file_an_image_or_pixels(runs, tmp_path):
    """160 x 60 px are 64 x 24, from y = 4 of a canvas: 16 x 8 px about (24, 12) are 40 x 20 about
    (60, 20). The file holds 60 x 160 px of 16-bit grey and EXIF's order to turn them."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 65536, (160, 60), np.uint16))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "x.png", exif=exif)
    predictor = jg.Predictor(runs["equal"] / "best.pt")
    target = torch.tensor([[0, 2, 24 / 64, 12 / 32, 16 / 64, 8 / 32]])
    raw = made_maps(target, 1, 4, ((4, 8), (2, 4), (1, 2)))
    predictor.network.parts[0].heads["det"] = answers(raw)
    found = predictor(tmp_path / "x.png")
    (box,), answer = found["boxes"], found["classification"]
    assert box["name"] == list(jg.JETS)[2]
    assert box["box_xyxy"] == pytest.approx([40, 10, 80, 30], abs=1e-3)  # float32 of 160 px
    assert answer["name"] == max(answer["probs"], key=answer["probs"].get) in jg.VIEWS
    with Image.open(tmp_path / "x.png") as opened:
        assert predictor(opened) == found
    pixels = np.array(read_image(tmp_path / "x.png"))  # (60, 160, 3)
    assert predictor(pixels) == found
    predictor.config = tiny(predict_conf=0.9999)  # the planted score is sigmoid(9)^2 = 0.99975
    assert predictor(pixels)["boxes"] == []
    with pytest.raises(jg.UserError, match="array of float32: not a readable image"):
        predictor(np.float32(pixels))

def test_without_the_module_resource_as_on_windows_the_peak_of_memory_is_none(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    assert jg.cost(joint_case()[0], (64, 96))["peak_rss_mb"] is None

@pytest.mark.skipif(not LINUX, reason="needs signals")
def test_ctrl_c_while_torch_loads_is_no_traceback():
    """Python tells of each module that it has loaded; then, torch's own are under way."""
    child = subprocess.Popen([sys.executable, "-X", "importtime", jg.__file__, "--help"],
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert any("torch." in line for line in child.stderr)
    child.send_signal(signal.SIGINT)
    assert "Traceback" not in child.stderr.read() and child.wait() == -signal.SIGINT

def trained(watch=lambda run: None, **given) -> jg.Run:
    config = tiny(**given)
    data = jg.load_data(config)
    run = jg.Run(config, data[0], CPU)
    watch(run)
    for _ in jg.train(run, *data):
        pass
    return run

@pytest.mark.parametrize("optimizer, grad_clip", [("adamw", 10), ("adamw", 0.05), ("sgd", 0.05)])
def test_detach_leaves_the_detector_as_detect_trains_it(optimizer, grad_clip):
    """To the bit, also where clipping by a norm over both tasks would scale the detector's step."""
    alone, beside = (trained(mode=mode, optimizer=optimizer, grad_clip=grad_clip)
                     for mode in ("detect", "detach"))
    state = beside.network.state_dict()
    assert all(torch.equal(x, state[key]) for key, x in alone.network.state_dict().items())

@pytest.mark.parametrize("form", ["of a run", "of YOLOv5", "of other classes"])
def test_a_warm_start_takes_a_detectors_tensors_in_order(runs, tmp_path, capsys, form):
    """At lr 1e-8 parameters stay as `init` put them. YOLOv5: other names, anchors in strides."""
    init, given = runs["detect"] / "best.pt", {"mode": "equal", "seed": 1, "epochs": 1, "lr": 1e-8}
    before, anchors = state_of(init)["network"], "parts.0.heads.det.anchors"
    if form != "of a run":
        plain = {f"model.{k}.x": x for k, (key, x) in enumerate(before.items()) if key != anchors}
        plain["model.24.anchors"] = before[anchors] / torch.tensor([8, 16, 32]).view(3, 1, 1)
        torch.save(plain, init := tmp_path / "yolo.pt")
    data = make_set(tmp_path / "set", two()) if form == "of other classes" else "synthetic"
    assert start(tmp_path / "out", "--init", init, "--data", data, **given) == 0
    left = list(before)[-6:] if form == "of other classes" else []  # the three last convolutions
    assert start(tmp_path / "no", "--init", runs["classify"] / "best.pt", **given) == 2  # no head
    taken = len(before) - 1 - len(left)  # without the anchors
    told = f"init {init}: took {taken} of the detector's tensors, left {left or 'none'}\n"
    assert told in capsys.readouterr().out
    after = state_of(tmp_path / "out/last.pt")["network"]
    for key, x in before.items():
        if key not in left and not re.search("running|tracked", key):  # BatchNorm goes on
            torch.testing.assert_close(after[key], x, rtol=0, atol=1e-6)  # steps of 1e-8, float32

# --------------------------------------------------------------------------------------------------
# 5. Repeats: same twice, killed and resumed, in bfloat16, on two processes

def timeless(rows: list[dict]) -> list[dict]:
    return [{key: value for key, value in row.items() if key != "time"} for row in rows]

def outcome(out: Path) -> tuple:
    """All that must not differ between two runs: log, results, checkpoints, picture."""
    results, states = results_of(out), [state_of(out / name) for name in ("last.pt", "best.pt")]
    for key in ("time", "environment", "peak_rss_mb"):
        del results[key]
    states = [state | {"rows": timeless(state["rows"])} for state in states]
    return timeless(log_of(out)), results, states, (out / "figure.png").read_bytes()

def test_two_runs_agree_on_two_threads_with_crowded_cells():
    """Sums keep one order at a given thread count; of 64 images many targets share a cell."""
    size = {"epochs": 1, "batch_size": 64, "train_images": 64, "val_images": 2, "imgsz": 32}
    torch.set_num_threads(2)
    a, b = (trained(mode="gradnorm", **size) for _ in range(2))
    torch.set_num_threads(1)
    assert str(timeless(a.rows)) == str(timeless(b.rows))  # NaN is not NaN
    assert same(a.network.state_dict(), b.network.state_dict())

def interrupt(out: Path, config: jg.Config) -> None:
    """The folder of a run that ended after an epoch, in the middle of a row of its log."""
    out.mkdir(exist_ok=True)
    data = jg.load_data(config)
    run = jg.Run(config, data[0], CPU)
    (out / "config.yaml").write_text(yaml.safe_dump(json.loads(json.dumps(vars(config)))))
    next(jg.train(run, *data))
    jg.save_epoch(run, data[0], out)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "epoch": 1, "time": {"train_s": 1}')

@pytest.mark.parametrize("mode, finished", [("gradnorm", False), ("dual", False), ("fixed", True)])
def test_resumed_run_equals_the_uninterrupted_one(runs, tmp_path, capsys, mode, finished):
    """last.pt holds the rows of the log. Where no terminal shows a bar, each epoch is a line."""
    if finished:
        shutil.copytree(runs[mode], tmp_path, dirs_exist_ok=True)
        (tmp_path / "metrics.jsonl").unlink()
    else:
        interrupt(tmp_path, tiny(mode=mode))
        assert [row["step"] for row in state_of(tmp_path / "last.pt")["rows"]] == [0, 1]
    assert jg.main(["--resume", str(tmp_path), "--device", "cpu"]) == 0
    assert same(outcome(runs[mode]), outcome(tmp_path))
    said, done = capsys.readouterr(), 3 if finished else 1
    assert f"{'train,' if finished else 'resumed'} after epoch {done} of 3\n" in said.out
    told = re.findall(r"(?m)^epoch (\d)/3: L/det (.*?), .*w/cls .*, mAP50 .*, accuracy ", said.err)
    L = {k: [row["L/det"] for row in log_of(tmp_path) if row["epoch"] == k] for k in range(done, 3)}
    assert told == [(f"{k + 1}", f"{np.mean(x):.3f}") for k, x in L.items()]

def test_a_run_whose_data_moved_goes_on_to_the_same_result(tmp_path):
    given = {"data": str(make_set(tmp_path / "old", two())), "batch_size": 2, "imgsz": 32}
    whole, half = tmp_path / "whole", tmp_path / "half"
    assert start(whole, **given) == 0
    interrupt(half, tiny(**given))
    (tmp_path / "old").rename(tmp_path / "new")
    moved = ["--data", str(tmp_path / "new/data.yaml"), "--cache_mb", "0"]
    assert jg.main(["--resume", str(half), *moved]) == 0
    assert timeless(log_of(whole)) == timeless(log_of(half))
    assert same(*(state_of(out / "last.pt")["network"] for out in (whole, half)))

def test_a_runs_config_repeats_it_to_the_bit_also_where_it_is_killed_and_resumed(tmp_path):
    """SIGKILL leaves no time to tidy up; what is on disk must be enough, wherever it struck."""
    assert start(tmp_path / "whole", epochs=6) == 0
    out, log = tmp_path / "killed", tmp_path / "killed/metrics.jsonl"
    arguments = ["--config", tmp_path / "whole/config.yaml", "--out", out]
    rows = lambda: log.read_bytes().count(b"\n") if log.exists() else 0  # noqa: E731
    for later in (0, 0.1):  # s after a row
        before = rows()
        child = subprocess.Popen([sys.executable, jg.__file__, *map(str, arguments)],
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while child.poll() is None and rows() <= before:
            time.sleep(0.005)
        time.sleep(later)
        child.kill()
        child.wait()
        arguments = ["--resume", out]
    assert jg.main(["--resume", str(out)]) == 0
    assert same(outcome(tmp_path / "whole"), outcome(out)) and not list(out.glob("*.part"))

@pytest.mark.parametrize("harm, said", [
    ("NaN", r"step 2: L/det, .*not finite \(w/det = .*, w/cls = .*\)"),
    *[("full disk", "File too large")] * LINUX])
def test_failure_is_one_line_and_leaves_the_last_checkpoint(tmp_path, capsys, harm, said):
    """A poisoned parameter; a limit of 100 kB a file, where a checkpoint has 300 kB."""
    import resource
    interrupt(tmp_path, tiny())
    state, limit = state_of(tmp_path / "last.pt"), resource.getrlimit(resource.RLIMIT_FSIZE)
    if harm == "NaN":
        next(iter(state["network"].values())).fill_(math.nan)
        torch.save(state, tmp_path / "last.pt")
    before = (tmp_path / "last.pt").read_bytes()
    if harm == "full disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    code = jg.main(["--resume", str(tmp_path)])
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 1 and re.match(f"error: .*{said}", line)
    assert (tmp_path / "last.pt").read_bytes() == before and not list(tmp_path.glob("*.part"))

def test_bf16_on_the_cpu_stays_finite_and_near_float32():
    run, plain = (trained(mode="gradnorm", epochs=2, amp=amp) for amp in ("bf16", "none"))
    rows = timeless(run.rows)
    assert all(math.isfinite(v) for row in rows for v in row.values() if isinstance(v, float))
    assert rows != timeless(plain.rows) and sum(run.w.tolist()) == pytest.approx(2, abs=1e-4)
    assert rows[0]["L/det"] == pytest.approx(plain.rows[0]["L/det"], rel=0.02)  # it has 8 bits

@pytest.mark.parametrize("share, small", [(0.5, 2), (0.0, 0)])
def test_dual_shares_nothing_and_its_classifier_may_begin_on_smaller_images(share, small):
    """Of 3 epochs round(0.5 x 3) = 2 at 0.25 of 128 px: seen by the first convolution."""
    def watch(run):
        det, cls = ({x.data_ptr() for x in part.state_dict().values()}
                    for part in run.network.parts)
        assert not det & cls and run.network.parts[1].trunk.c_out == 16  # 256 x 0.0625
        run.network.parts[1].trunk[0].register_forward_pre_hook(
            lambda module, x: sizes.append(x[0].shape[2:]) if module.training else None)
    sizes = []
    trained(watch, mode="dual", progressive_share=share, progressive_scale=0.25, imgsz=128)
    assert sizes == [(32, 32)] * 2 * small + [(128, 128)] * 2 * (3 - small)

def rank_work(rank: int, folder: str) -> None:
    """Saves w over five steps, alone, then beside another rank on the same data and on others."""
    torch.set_num_threads(1)
    config = tiny(mode="gradnorm", dropout=0)
    data, _ = jg.load_data(config)
    def steps(first: int) -> list:
        run, batch = jg.Run(config, data, CPU), data.batch(range(first, first + 8))
        logs = [jg.train_step(run, batch, 0.5) for _ in range(5)]
        return [torch.cat([log["w"], log["r"]]).tolist() for log in logs]  # r: of the mean losses
    alone = steps(0)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    torch.save([alone, steps(0), steps(8 * rank)], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()

@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_weights_agree_on_all_ranks_and_with_one_process(tmp_path):
    """Norms are taken of the mean gradient, so ranks with other data get the same weights; on the
    same data two ranks are one process, up to rounding (1e-4: four Adam steps)."""
    torch.multiprocessing.spawn(rank_work, (str(tmp_path),), nprocs=2)
    (alone, equal, apart), other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert other[1:] == [equal, apart] and equal != apart
    assert np.allclose(equal, alone, atol=1e-4)

@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_train_one_run(tmp_path):
    """torchrun: one results.json, half the steps (32 images over 2 x 8 a step, 3 epochs)."""
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc-per-node", "2", jg.__file__, "--out", str(tmp_path / "out"),
                    *options(train_images=32)], check=True, timeout=100, capture_output=True)
    results = results_of(tmp_path / "out")
    assert results["steps"] == len(log_of(tmp_path / "out")) == 6
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == FILES
    images = results["time"]["images_per_s"] * results["time"]["train_s"]
    assert images == pytest.approx(3 * 32) and results["environment"]["processes"] == 2

THIRD = {  # the change of README's third exercise: a text that stands once, what goes before it
    "))\n\n    @property\n    def weights": ', "num"',
    " if given else": " + (1.0,)",
    "        self.parts =": """\
        if "num" in config.tasks:
            heads["num"] = ClassificationHead(trunk.c_out, 3, config.dropout)
""",
    "    return losses\n": """\
    if "num" in config.tasks:
        losses["num"] = lambda logits, batch: F.cross_entropy(logits.float(), torch.bincount(
            batch.targets[:, 0].long(), minlength=len(logits)).clamp(1, 3) - 1)
""",
    "    found, guess =": "    counted = []\n",
    "    network.train(was": """\
        if "num" in outputs:
            counted += (outputs["num"].argmax(1) + 1).tolist()
""",
    "    return metrics |": """\
    if counted:
        metrics["num_accuracy"] = float(np.equal(counted, [len(b) for b in data.boxes]).mean())
"""}

def test_a_third_task_needs_the_changes_that_readme_names_and_no_other(tmp_path):
    """The number of jets: balancer, log and tables take it by themselves."""
    changed, out = (jg.ROOT / "jointgrad.py").read_text(encoding="utf-8"), tmp_path / "out"
    for place, text in THIRD.items():
        assert changed.count(place) == 1, place
        changed = changed.replace(place, text + place)
    (tmp_path / "jointgrad.py").write_text(changed, encoding="utf-8")
    shutil.copy(SHIPPED, tmp_path)
    shutil.copytree(SHIPPED.parent / "data", tmp_path / "data")
    done = subprocess.run([sys.executable, tmp_path / "jointgrad.py", "--out", out,
                           *options(epochs=1)], check=True, capture_output=True, text=True)
    row, results = log_of(out)[-1], results_of(out)
    assert min(row["L/num"], row["w/num"], row["G/num"]) > 0
    assert sum(results["weights"]["final"]) == pytest.approx(3)
    assert results["val"]["num_accuracy"] <= 1 and "| num_accuracy " in done.stdout

# --------------------------------------------------------------------------------------------------
# 6. The report's smoke test and the study: its numbers, statistics, claims, comparisons, bench

@pytest.fixture(scope="module")
def smoke_runs() -> dict[str, list[dict]]:
    """Runs under every rule; three seeds of the report's, to either side of its mean loss."""
    seeds = {"report": (0, 1, 2), "gradnorm": (0,), "plain": (0,), "textbook": (0,)}
    return {rule: [jg.smoke_test(seed, rule) for seed in seeds[rule]] for rule in jg.RULES}

def test_smoke_reproduces_every_number_of_the_report(smoke_runs, tmp_path, monkeypatch):
    """The command's ten seeds, here three in turn: each check holds, exit 0."""
    monkeypatch.setattr(jg, "smoke_test", lambda seed, rule: smoke_runs[rule][
        seed % len(smoke_runs[rule])])
    assert jg.main(["--mode", "reproduce", "--out", str(tmp_path / "out")]) == 0
    results = results_of(tmp_path / "out")
    assert {c["name"]: (c["reported"], c["ok"]) for c in results["checks"]} == {
        "final_weight_det": (0, True), "final_weight_cls": (4, True), "mean_loss": (2.4624, True),
        "weight_change_det": (-1, True), "weight_change_cls": (3.99, True),
        "parameters": (1224, True), "train_seconds": (0.25, None)}  # the last: by machine
    assert set(results["quantities"]) == {f"smoke_{rule}" for rule in jg.RULES}
    reported = jg.read_yaml(jg.ROOT / "data" / "reported.yaml")["smoke_test"]
    assert not any(c["ok"] for c in jg.check_smoke(reported, {name: [1e6] for name in reported}))

def test_smoke_weights_stand_for_nine_steps_and_then_sum_to_4_under_gradnorm_to_2(smoke_runs):
    """w / mean(w) T sums to T^2 = 4; at logits 0 the output norms of an image's cross-entropy and
    BCE stand as ||p - y|| = sqrt(3) / 2 to ||sigmoid - y|| / 4 = 1 / 4."""
    for run in smoke_runs["report"]:
        assert run["w"][:9].tolist() == [[1.0, pytest.approx(0.01)]] * 9
        np.testing.assert_allclose(run["w"][9:].sum(1), 4, rtol=1e-6)  # float32
        assert run["gradient_ratio"] == pytest.approx(2 * math.sqrt(3), rel=0.15)  # logits not 0
        assert run["share_det"] < 1e-3  # the detector is no longer trained
    (run,) = smoke_runs["gradnorm"]
    np.testing.assert_allclose(run["w"][1:].sum(1), 2, rtol=1e-6)  # float32
    assert run["w"][-1].min() > 0.1 and 0.1 < run["share_det"] < 0.9  # both tasks are trained

def test_contrasts_have_holms_p_and_each_verdict():
    """p = 2 / 4096 where 12 seeds agree, 158 / 4096 where 10 do: by Holm times 4, times 2."""
    noise, signs = np.linspace(-0.01, 0.01, 12), np.array([-1] * 2 + [1] * 10)
    scores = {"detect": (0.5 + noise, 0), "classify": (0, 0.9 - noise),
              "equal": (0.4 + noise**3, 0.9 - 1.01 * noise),  # lower, level
              "dual": (0.5 + noise + 0.03 * signs, 0.95 + noise**2)}  # undecided, higher
    table = {(mode, None, None): {key: x for key, x in zip(("mAP50-95", "balanced_accuracy"), of)
                                  if np.ndim(x)} for mode, of in scores.items()}
    rows = study.contrasts(table)
    p, q = 2 / 4096, 158 / 4096
    assert [(row["mode"], row["versus"], row["verdict"], row["p"], row["p_holm"]) for row in rows
            ] == [("equal", "detect", "lower", p, 4 * p), ("equal", "classify", "level", 1, 1),
            ("dual", "detect", "undecided", q, 2 * q), ("dual", "classify", "higher", p, 4 * p)]
    assert rows[0]["delta"] == pytest.approx(-0.1)
    modes = {"detect": {}} | {mode: {"delta_m": {"mean": x, "ci95": None}}
                              for mode, x in (("equal", -9.0), ("dual", 2.0), ("x", None))}
    report = study.report_compare({"seeds": [], "modes": modes, "paired": rows, "claims": [],
                                   "sweep": "alpha=0,1"})
    assert re.search(r"\| alpha \| equal +\| dual +\|\n.*\n\| - +\| -0.100 / 0.000 \| ", report)
    assert report.endswith("Best delta_m, mean gain over the single tasks: dual, +2.0 %.\n"
                           "Undecided: dual - detect (mAP50-95).\n")
    assert rows[0]["ci95"] == pytest.approx(-0.1 + np.array([-1, 1]) * 2.201 / 12**0.5 * np.std(
        noise**3 - noise, ddof=1))  # t of tables, 11 degrees of freedom
    swept = {(mode, "lr", lr): {"mAP50-95": np.array(x)} for mode, lr, x in (
        ("detect", "1", [9, 9, 9]), ("detect", "2", [1, 1, 1]), ("equal", "2", [2, 3, 4]))}
    assert [row["ci95"] for row in study.contrasts(swept)] == [
        pytest.approx([2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5])]  # at the same lr, 2 degrees
    assert study.interval(np.array([5.0]))["ci95"] is None and study.listed([]) == ""
    rows = study.contrasts({("gradnorm", None, None): table["equal", None, None]} | table)
    assert [row["versus"] for row in rows if row["mode"] == "gradnorm"] == [
        "detect", "equal", "classify", "equal"]

@pytest.mark.parametrize("measure, limits, verdict, measured", [
    (["gain", "m", "a", "b"], {"at_least": "10"}, "holds", 20),
    (["ratio", "m", "a", "b"], {"at_least": 1.2}, "not decided by these data", 1.2),
    (["value", "m", "a"], {"at_most": 1.1}, "does not hold", 1.2),
    (["value", "m", "a"], {"at_least": 1.1, "at_most": 1.3}, "holds", 1.2),
    (["gain", "m", "c", "b"], {"at_most": 0}, "refuted: level", 0),
    (["gain", "m", "c", "b"], {"at_least": -2}, "holds", 0),
    (["difference", "m", "c", "b"], {"at_most": 0}, "not decided by these data", 0),
    (["difference", "m", "b", "b"], {"at_most": 0}, "not decided by these data", 0),
    (["value", "m", "once"], {"at_least": 0}, "not decided by these data", 5)])
def test_judge_gives_each_verdict(measure, limits, verdict, measured):
    """a is 1.2 times b to +-1 %, c is b: the interval lies in, beside or across a range."""
    table = {"a": {"m": [1.19, 1.20, 1.21, 1.20]}, "b": {"m": [1.0] * 4},
             "c": {"m": [1.001, 1.0, 0.999, 1.0]}, "once": {"m": [5.0]}}
    claim = {"id": "x", "claim": "", "reported": "", "measure": measure} | limits
    (row,) = study.judge([claim, claim | {"measure": ["value", "m", "absent"]}], table)
    assert row["verdict"] == verdict and row["measured"] == pytest.approx(measured, abs=0.05)

def test_quantities_by_hand():
    """+10 % and +20 % give delta_m 15; 90 % of fixed's score is reached at the last evaluation."""
    def run(mAP, accuracy):
        val = dict(zip(jg.METRICS, (mAP, mAP, accuracy, accuracy)))
        first = {key: x and x / 2 for key, x in val.items()}
        return {"val": val, "parameters": {"total": 1}, "flops_per_image": 1, "steps": 20,
                "time": {"step_ms": 1.0, "train_cpu_s": 0.02}, "peak_rss_mb": 1.0,
                "interference": None, "weights": {"final": [1, 1]},
                "rows": [{"step": 9, "val": first}, {"step": 19, "val": val}]}
    runs = {"detect": run(0.5, None), "classify": run(None, 0.5), "fixed": run(0.55, 0.6)}
    table = study.quantities({((mode, None, None), 0): x for mode, x in runs.items()}, [0])
    detect, _, fixed = table.values()
    assert fixed["delta_m"] == pytest.approx([15]) and fixed["largest_fall_det"] == [0]
    assert detect["steps_to_90_det"] == fixed["steps_to_90_cls"] == [20]
    assert not {"delta_m", "accuracy"} & set(detect)

def compare(monkeypatch, out: Path, *words) -> int:
    """The command on a set so small that only its course matters, not its result."""
    return program(monkeypatch, "study", *words, "--out", out, *options(epochs=1))

@pytest.mark.skipif(not shutil.which("xargs"), reason="needs xargs")
def test_compare_prints_its_runs_for_xargs_and_then_only_evaluates(tmp_path, monkeypatch, capsys):
    """Four cells, two at a time; what is finished is neither printed nor run again."""
    cells = "compare", "--modes", "detect", "equal", "--seeds", "0", "1"
    assert compare(monkeypatch, tmp_path, *cells, "--print") == 0
    commands = capsys.readouterr().out
    assert commands.count("\n") == 4 and not (tmp_path / "results.json").exists()
    subprocess.run(["xargs", "-P", "2", "-d", "\n", "-n", "1", "sh", "-c"], input=commands,
                   text=True, check=True, capture_output=True, timeout=200)
    assert compare(monkeypatch, tmp_path, *cells, "--print") == 0
    assert capsys.readouterr().out == ""
    made = {f: f.stat().st_mtime_ns for f in tmp_path.glob("runs/*/*")}
    assert compare(monkeypatch, tmp_path, *cells) == 0
    assert len(made) == 24 and made == {f: f.stat().st_mtime_ns for f in tmp_path.glob("runs/*/*")}
    results = results_of(tmp_path)
    results["seeds"], results["labels"] = [1], [["detect", None, None]]  # one cell, to repeat it
    for moved, q in enumerate(results["modes"]["detect"][m] for m in ("mAP50-95", "mAP50")):
        x = q["per_seed"][1]
        q |= {"mean": x + 0.5, "ci95": None if moved else [x - 1, x + 1]}
    jg.write_json(tmp_path / "recorded.json", results)
    assert program(monkeypatch, "study", "check", tmp_path / "recorded.json",
                   "--out", tmp_path / "again") == 1  # of two metrics one is moved
    said = capsys.readouterr().out
    assert (said.count("OUTSIDE"), len(re.findall(r"\| ok +\|", said))) == (1, 1)
    assert compare(monkeypatch, tmp_path, *cells, "--print", "--lr", "0.5") == 2
    cell = tmp_path / "runs/equal-s1/results.json"
    jg.write_json(cell, json.loads(cell.read_text()) | {"dataset": {"fingerprint": "other"}})
    assert compare(monkeypatch, tmp_path, *cells, "--print") == 2
    assert capsys.readouterr().err.count("another run, or other data") == 2
    data = make_set(tmp_path / "set", two(), {"v.png": (picture(), "0 1 0\n")})  # no box: no score
    own = "--modes", "detect", "--seeds", "0", "--sweep", "lr=0.1", "--data", data
    assert compare(monkeypatch, tmp_path / "own", "compare", *own) == 0
    assert results["claims"] and results_of(tmp_path / "own")["claims"] == []  # the report's set
    monkeypatch.chdir(tmp_path)
    sweep = "--modes", "tuned", "fixed", "--seeds", "3", "--sweep", "initial_weights=[1,0.1],[1,2]"
    assert program(monkeypatch, "study", "compare", *sweep, "--print", *options(epochs=1)) == 0
    said = capsys.readouterr().out
    assert re.findall("mode=.*?weights=([^ ]*)", said) == [f"1,{study.TUNED}", "1,0.1", "1,2"]
    assert said.count("--out runs/fixed-initial_weights-synthetic/runs/") == 3

def test_bench_times_every_variant_and_its_ratio_to_a_plain_step(tmp_path, monkeypatch):
    assert compare(monkeypatch, tmp_path / "out", "bench", "--rounds", "2") == 0
    results = results_of(tmp_path / "out")
    assert list(results["step_ms"]) == ["fixed", "gradnorm", "textbook", "dual"]
    assert {"gradnorm/fixed", "textbook/fixed", "dual/fixed"} <= set(results["ratios"])
    assert all(x > 0 for x in results["images_per_s"].values())
