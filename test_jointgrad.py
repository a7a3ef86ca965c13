"""Tests. What is expected is closed form, hand work, a slow version, a library; no past run."""

import colorsys
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
import struct
import subprocess
import sys
import textwrap
import threading
import zlib
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given, settings, strategies as st
from matplotlib.text import Text
from PIL import Image, ImageDraw
from torch import nn

import jointgrad as jg
from data import bench, figures, joint, predict, study

torch.set_num_threads(1)
SHIPPED = jg.ROOT / "config.yaml"
LINUX = sys.platform.startswith("linux")
CPU = torch.device("cpu")
TINY = {  # no default: a key that is left out somewhere shows
    "device": "cpu", "epochs": 3, "eval_interval": 2, "warmup": 0.2,
    "train_images": 16, "val_images": 8, "batch_size": 8,
    "width_multiple": 0.03125, "dual_width_multiple": 0.0625,
    "alpha": 0.7, "gradnorm_lr": 0.05, "w_min": 0.004, "cap": 0.3,
    "iou_thres": 0.5, "conf_thres": 0.002, "anchor_thres": 3.5}
ANCHORS = torch.tensor([  # px, no two alike, none square
    [[4.0, 9], [11, 6], [8, 14]],
    [[16, 11], [13, 25], [27, 18]],
    [[22, 40], [45, 26], [50, 58]]])
CANVAS = (8, 12), (4, 6), (2, 3)  # h, w of P3, P4, P5 on 64 x 96 px: no map is square
cases = pytest.mark.parametrize
near = pytest.approx
close = torch.testing.assert_close
allclose = np.testing.assert_allclose
array_equal = np.testing.assert_array_equal
on_linux = pytest.mark.skipif(not LINUX, reason="needs limits or names as Linux has them")
double = partial(torch.tensor, dtype=torch.float64)

def table(text):
    """The rows of a text; two spaces or more part their columns."""
    return [re.split("  +", row) for row in text.strip().splitlines()]

def options(**given):
    return [f"--{key}={value}" for key, value in (TINY | given).items()]

def tiny(**given):
    return jg.load_config(SHIPPED, TINY | given)

def python(*words, **given):
    """A program that has ended: its returncode, stdout and stderr."""
    words = sys.executable, *map(str, words)
    return subprocess.run(words, capture_output=True, text=True, timeout=200, **given)

def same(x, y):
    """To the bit, also tensors within lists and mappings."""
    if isinstance(x, torch.Tensor):
        return torch.equal(x, y)
    if isinstance(x, dict):
        return same([*x], [*y]) and same([*x.values()], [*y.values()])
    if isinstance(x, (list, tuple)):
        return len(x) == len(y) and all(map(same, x, y))
    return x == y

def joint_set(labels=(0, 1, 2), boxes=None):
    """A split of grey images, 64 x 96 px, with three classes of boxes and three of images."""
    pixels = np.full((len(labels), 64, 96, 3), 114, np.uint8)
    boxes = boxes or [np.array([[0, 0.5, 0.5, 0.2, 0.4]])] * len(labels)
    return jg.JointSet(pixels, boxes, list(labels), ["a", "b", "c"], ["x", "y", "z"])

def trained(watch=lambda run: None, **given):
    """A run after its last epoch; `watch` is called with it before the first."""
    config = tiny(**given)
    data = jg.load_data(config)
    run = jg.Run(config, data[0], CPU)
    watch(run)
    for _ in jg.train(run, *data):
        pass
    return run

# ----------------------------------------------------------------------------------------------
# 1. Twins: each fast form beside a slow one, or worked by hand
# ----------------------------------------------------------------------------------------------

def balancer(w, **given):
    return jg.GradNorm(w, **{"dtype": torch.float64} | given)

def test_one_update_of_gradnorm_by_hand():
    """w = 1, L~ = (1/2, 1, 3/2), G = n = (2, 1, 1), alpha 1: targets (2/3, 4/3, 2), so signs
    (+, -, -); Adam's first step is lr: (.975, 1.025, 1.025); what is above 0.1 sums to 2.7."""
    b = balancer([1, 1, 1], alpha=1, lr=0.025, w_min=0.1, L0=[2, 1, 2])
    w = b.update([1, 1, 3], [2, 1, 1])
    expected = 0.1 + double([0.875, 0.925, 0.925]) * 2.7 / 2.725
    close(w, expected, rtol=1e-7, atol=0)  # Adam's eps of 1e-8

def published(w, steps, alpha, lr):
    """Weights after each step of GradNorm as published: autograd, the target a constant."""
    w = w.clone().requires_grad_()
    adam = torch.optim.Adam([w], lr)
    L0 = steps[0, 0]
    rows = []
    for L, n in steps:
        G = w * n
        r = (L / L0) / (L / L0).mean()
        target = G.mean() * r**alpha
        adam.zero_grad()
        (G - target.detach()).abs().sum().backward()
        adam.step()
        w.data *= len(w) / w.data.sum()
        rows.append(w.data.clone())
    return rows

@cases("T", [1, 2, 3, 5])
@cases("alpha", [1.5, -0.7])
def test_weights_follow_the_published_recipe(T, alpha):
    """w_min = 0: 30 steps equal w <- Adam(w), w <- w T / sum(w)."""
    torch.manual_seed(T)
    steps = 0.5 + torch.rand(30, 2, T).double()
    w = 1.5 - torch.arange(T).double() / 5
    b = balancer(w.tolist(), alpha=alpha, lr=0.01, w_min=0)
    rows = [b.update(L, n) for L, n in steps]
    close(rows, published(w, steps, alpha, 0.01), rtol=1e-9, atol=0)  # float64

@cases("T", [2, 5])
def test_weights_sum_to_T_above_the_floor_after_every_update(T):
    """Norms of 1 to 10,000, as in the paper's toy: without a floor w goes negative."""
    b = balancer([0.01, 5, 1, 1, 1][:T], w_min=0.05, lr=0.1)
    n = 10 ** torch.linspace(0, 4, T)
    rows = torch.stack([b.update(torch.ones(T), n) for _ in range(60)])
    assert rows.sum(1).tolist() == near([T] * 60)
    assert rows.min().item() == near(0.05, abs=1e-9)  # the 1e-12 in clamp

@cases("name", ["L", "n"])
@cases("value", [0, math.inf, math.nan])
def test_gradnorm_passes_over_a_batch_whose_loss_or_norm_cannot_be_used(name, value):
    """w stands, and the next update is as if that batch had not been: no momentum's step."""
    usable = {"L": [2, 4], "n": [1, 3]}
    b = balancer([1.5, 0.5])
    b.update(**usable)
    other = copy.deepcopy(b)
    assert torch.equal(b.update(**usable | {name: [1, value]}), other.w)
    assert torch.equal(b.update(**usable), other.update(**usable))

def test_L0_waits_for_each_tasks_first_finite_positive_loss():
    b = balancer([1, 1])
    for second in (0, math.inf, math.nan, 4, 5):
        b.update([2, second], [1, 1])
    assert b.L0.tolist() == [2, 4]

@cases("L, said", [
    ([1, -0.5], r"losses \[1.0, -0.5\]: one is below 0"),
    ([1], r"shape \(2,\), one value a task; found \(1,\)")])
def test_gradnorm_refuses_what_has_no_training_rate(L, said):
    with pytest.raises(ValueError, match=said):
        balancer([1, 1]).update(L, [1, 1])

def test_gradnorm_takes_losses_of_any_dtype():
    assert jg.GradNorm([1, 1]).update(double([1, 2]), [3, 1]).dtype == torch.float32

def test_uncertainty_leaves_the_gradient_of_its_objective():
    """Of sum exp(-s_i) L_i + s_i, by autograd."""
    L = torch.tensor([3, 0.4])
    b = jg.Uncertainty([1, 0.2])
    b.update(L, None)
    s = b.s.detach().requires_grad_()
    (torch.exp(-s) * L + s).sum().backward()
    close(b.s.grad, s.grad)  # float32

def test_uncertainty_moves_by_a_step_of_the_networks_optimizer():
    """AdamW's first step is lr times the gradient's sign, without decay; w = exp(-s)."""
    run = jg.Run(tiny(mode="uncertainty", lr=0.03, warmup=0), joint_set(), CPU)
    L = jg.train_step(run, random_batch(), 0.0)["L"]
    close(run.w, torch.exp(0.03 * torch.sign(1 - L)))  # float32

SURGERIES = jg.SURGERIES | {"cap": partial(jg.cap, share=0.25)}

BY_HAND = table("""
pcgrad  4  1    -1  1.25   2      a_j = 1 - g1_g2 / |g_j|^2
pcgrad  4  1    1   1      1      no conflict
imtl    4  1    -1  0.333  0.667  as 1 / |g_i|, whatever the angle
mgda    4  1    -1  0.286  0.714  (1 + 1) / (4 + 1 + 2)
mgda    4  1.5  2   0      1      the shortest lies beyond g_2
cap     4  1    0   1      0.5    0.25 of a norm of 2
cap     4  0.01  0  1      1      it only ever reduces
cap     0  0     0  1      1      no gradient: nothing to cap""")

@cases("rule, g1_g1, g2_g2, g1_g2, a1, a2, why", BY_HAND)
def test_surgery_of_two_tasks_by_hand(rule, g1_g1, g2_g2, g1_g2, a1, a2, why):
    gram = double([[float(g1_g1), float(g1_g2)], [float(g1_g2), float(g2_g2)]])
    a = SURGERIES[rule](gram)
    assert a.tolist() == near([float(a1), float(a2)], abs=1e-3)  # three digits

def gradients(seed, T=3):
    """Gradients (T, 5) of T tasks, of different lengths."""
    torch.manual_seed(seed)
    return torch.randn(T, 5).double() * torch.arange(1, T + 1)[:, None]

@cases("seed", range(4))
def test_pcgrad_equals_the_papers_projections_of_whole_vectors(seed):
    """Each g_i, in turn, less its part along every original g_j that it now conflicts with."""
    g = gradients(seed)
    expected = 0
    for i in range(3):
        left = g[i]
        for j in range(3):
            if j != i and left @ g[j] < 0:
                left = left - (left @ g[j]) / (g[j] @ g[j]) * g[j]
        expected += left
    close(jg.pcgrad(g @ g.T) @ g, expected)  # float64

@cases("seed", range(3))
def test_imtl_has_the_same_projection_on_every_task(seed):
    """IMTL-G's own definition: d u_1 = d u_2 = d u_3 of the unit vectors u, and sum a = 1."""
    g = gradients(seed)
    a = jg.imtl(g @ g.T)
    projections = (F.normalize(g) @ (a @ g)).tolist()
    assert projections == near([projections[0]] * 3, rel=1e-3)  # the ridge, at small angles
    assert a.sum().item() == near(1)

@cases("seed", range(3))
def test_mgda_finds_the_shortest_convex_combination(seed):
    """No point of a fine grid on the simplex is shorter by more than 3 %: Frank-Wolfe nears the
    optimum as 1 / steps."""
    g = gradients(seed)
    a = jg.mgda(g @ g.T)
    counts = torch.cartesian_prod(*[torch.arange(51)] * 3)
    grid = counts[counts.sum(1) == 50] / 50
    assert a.min() >= 0
    assert a.sum().item() == near(1)
    assert (a @ g).norm() <= 1.03 * (grid.double() @ g).norm(dim=1).min()

@cases("rule", ["imtl", "cap"])
def test_direction_does_not_change_when_the_second_loss_grows_tenfold(rule):
    """A weight's would: these two know no scale of a loss (cap: where it binds, as here)."""
    def direction(g):
        return F.normalize(SURGERIES[rule](g @ g.T) @ g, dim=0)
    g = gradients(1, 2)
    tenfold = g * double([[1], [10]])
    close(direction(tenfold), direction(g), rtol=1e-4, atol=1e-6)  # imtl's ridge

@cases("rule", SURGERIES)
def test_shares_are_ones_where_a_task_has_no_gradient(rule):
    for gram in ([[0, 0], [0, 3]], [[3, 0], [0, 0]]):
        assert jg.shares(double(gram), SURGERIES[rule]).tolist() == [1, 1]

def test_similarities_are_means_over_pairs_of_tasks():
    """Of the gradients behind the products: cosine, and 2ab / (a^2 + b^2) of their norms."""
    g = gradients(2)
    cosine = 0
    magnitude = 0
    for a, b in itertools.combinations(g, 2):
        cosine += F.cosine_similarity(a, b, 0) / 3
        magnitude += 2 * a.norm() * b.norm() / (a @ a + b @ b) / 3
    close(jg.similarities(g @ g.T), (cosine, magnitude))  # float64

def test_fit_anchors_finds_separated_clusters_in_order_of_area():
    """Nine tight clusters, wide and tall: the optimum of k-means is their means."""
    rng = np.random.default_rng(0)
    points = np.sort(ANCHORS.numpy().reshape(9, 1, 2), 0) + rng.uniform(-1, 1, (9, 30, 2))
    fitted = jg.fit_anchors(rng.permutation(points.reshape(270, 2)))
    allclose(fitted.reshape(9, 2), points.mean(1))  # float64, added in another order

def overlap(a, b):
    """IoU of two boxes x1 y1 x2 y2, number by number."""
    width = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0, min(a[3], b[3]) - max(a[1], b[1]))
    both = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
    return width * height / (both - width * height)

def slow_boxes(raw, config):
    """How many candidates, and what one uncapped greedy loop over all scores keeps of them."""
    (logits,) = jg.flatten_levels(raw)
    boxes = jg.cxcywh_to_xyxy(jg.decode(logits, *jg.prediction_grid(raw, ANCHORS)))
    scores = logits[:, 4:5].sigmoid() * logits[:, 5:].sigmoid()
    candidates = (scores > config.conf_thres).nonzero().tolist()
    kept = []
    for row, k in sorted(candidates, key=lambda at: -scores[tuple(at)]):
        x = boxes[row].tolist()
        if all(k != other[5] or overlap(x, other) <= config.iou_thres for other in kept):
            kept.append([*x, scores[row, k].item(), k])
    return len(candidates), kept[:config.max_det]

@cases("iou_thres, max_det", [(0.2, 20), (0.2, 300), (0.97, 2000)])
def test_find_boxes_equals_an_uncapped_greedy_loop(iou_thres, max_det):
    """Noise on 64 x 96 px, with three classes: 1,134 scores, whose boxes overlap."""
    torch.manual_seed(0)
    raw = [torch.randn(1, 24, h, w) for h, w in CANVAS]
    config = tiny(max_det=max_det, iou_thres=iou_thres)
    (found,) = jg.find_boxes(raw, ANCHORS, config)
    candidates, slow = slow_boxes(raw, config)
    assert candidates == 1134
    allclose(found, slow, atol=1e-4)  # float32 of 96 px

@cases("width, parameters", [(0.25, 1_872_157), (0.50, 7_235_389)])
def test_detection_network_has_yolov5s_number_of_parameters(width, parameters):
    """YOLOv5n and YOLOv5s v6 at 80 classes, as Ultralytics' model summary prints them."""
    network = jg.Network(tiny(mode="detect", width_multiple=width), 80, 0, ANCHORS)
    assert sum(p.numel() for p in network.parameters()) == parameters

def random_targets(seed, n, images, classes=3):
    rng = np.random.default_rng(seed)
    whole = rng.integers(0, [images, classes], (n, 2))
    centre = rng.uniform(0, 1, (n, 2))
    size = rng.uniform(0.03, 0.7, (n, 2))
    return torch.tensor(np.column_stack([whole, centre, size])).float()

def random_batch():
    """Four images with nine boxes and a class each."""
    torch.manual_seed(0)
    labels = torch.tensor([0, 1, 2, 1])
    return jg.Batch(torch.rand(4, 3, 64, 96), random_targets(0, 9, 4), labels)

def test_W_is_the_last_convolution_of_the_trunk():
    trunk = jg.Trunk(0.03125, 0.33)
    order = []
    for module in trunk.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, *_: order.append(module))
    trunk(torch.zeros(2, 3, 32, 32))
    assert order[-1].weight is trunk.W

def test_the_networks_own_forward_makes_no_graph():
    """To train by it would train the heads alone, for the graph is cut at P3."""
    outputs = jg.Network(tiny(), 3, 3, ANCHORS)(random_batch().images)
    assert not outputs["cls"].requires_grad

def test_1x1_convolution_equals_torchs():
    conv = jg.Conv1x1(8, 6, 1)
    x = torch.randn(2, 8, 3, 5)
    close(conv(x), F.conv2d(x, conv.weight, conv.bias))  # float32

def slow_match(targets, shapes, thres):
    """(target, level, anchor, x, y) of each pair: alike within thres; cells of the box's own row
    or column whose centre lies nearer than one cell to the box's."""
    found = []
    for (t, row), (level, (h, w)) in itertools.product(enumerate(targets), enumerate(shapes)):
        x, y = (row[2:4] * torch.tensor([w, h])).tolist()
        size = row[4:] * torch.tensor([w, h]) * jg.STRIDES[level]
        for a, i, j in itertools.product(range(3), range(w), range(h)):
            anchor = ANCHORS[level, a]
            beside = j == int(y) and abs(x - i - 0.5) < 1
            above = i == int(x) and abs(y - j - 0.5) < 1
            if (beside or above) and max(*(size / anchor), *(anchor / size)) < thres:
                found.append([t, level, a, i, j])
    return sorted(found)

@cases("shapes", [CANVAS, ((12, 4), (6, 2), (3, 1))], ids=["wide", "tall"])
def test_match_targets_equals_a_slow_loop(shapes):
    targets = random_targets(1, 30, 5)
    match = jg.match_targets(targets, shapes, ANCHORS, 3.0)
    columns = torch.column_stack([match.target, match.level, match.anchor, match.cell])
    assert sorted(columns.tolist()) == slow_match(targets, shapes, 3.0)

def slow_ciou(a, b):
    """IoU - d^2 / c^2 - alpha v of boxes cx cy w h (4,), float64 (arXiv 1911.08287)."""
    (ax, ay, aw, ah), (bx, by, bw, bh) = a, b
    corners = jg.cxcywh_to_xyxy(torch.stack([a, b]))
    iou = overlap(*corners)
    x1, y1 = corners[:, :2].amin(0)
    x2, y2 = corners[:, 2:].amax(0)
    distance = (ax - bx)**2 + (ay - by)**2
    diagonal = (x2 - x1)**2 + (y2 - y1)**2
    v = 4 / math.pi**2 * (torch.atan(bw / bh) - torch.atan(aw / ah))**2
    alpha = v.item() / (1 - iou.item() + v.item())  # a number: a constant to the gradient
    return iou - distance / diagonal - alpha * v

def slow_detection_loss(raw, batch, config):
    """The loss of a canvas of 64 x 96 px by loops over levels and pairs, in float64."""
    box = obj = cls = 0
    pairs = slow_match(batch.targets, CANVAS, config.anchor_thres)
    for level, balance in enumerate((4, 1, 0.4)):
        x = raw[level].double().unflatten(1, (3, -1))  # (B, 3, 5 + C, h, w)
        goal = torch.zeros_like(x[:, :, 4])
        of_level = [pair for pair in pairs if pair[1] == level]
        for t, _, a, i, j in of_level:
            b, k = batch.targets[t, :2].int().tolist()
            row = x[b, a, :, j, i]
            s = 2 * row[:4].sigmoid()
            centre = (s[:2] - 0.5 + double([i, j])) * jg.STRIDES[level]
            found = torch.cat([centre, s[2:]**2 * ANCHORS[level, a]])
            ciou = slow_ciou(found, batch.targets[t, 2:] * double([96, 64, 96, 64]))
            goal[b, a, j, i] = max(goal[b, a, j, i].item(), ciou.item())
            one_hot = F.one_hot(torch.tensor(k), len(row) - 5).double()
            box += (1 - ciou) / len(of_level)
            cls += F.binary_cross_entropy_with_logits(row[5:], one_hot) / len(of_level)
        obj += balance * F.binary_cross_entropy_with_logits(x[:, :, 4], goal)
    classes = x.shape[2] - 5
    loss = config.box_gain * box + config.obj_gain * (64 / 640)**2 * obj
    return loss + config.cls_gain * classes / 80 * cls * (classes > 1)

@cases("classes, boxes, times", [(3, 40, 3), (1, 12, 3), (2, 1, 1), (3, 0, 1)])
def test_detection_loss_and_its_gradient_equal_a_slow_loop(classes, boxes, times):
    """The IoU as objectness target is a constant, the largest of a crowded cell."""
    torch.manual_seed(boxes)
    config = tiny(box_gain=0.7, obj_gain=30, cls_gain=11, det_loss_times_batch=times > 1)
    raw = [torch.randn(3, 3 * (5 + classes), h, w).requires_grad_() for h, w in CANVAS]
    targets = random_targets(boxes, boxes, 3, classes)
    batch = jg.Batch(torch.zeros(3, 3, 64, 96), targets, None)
    loss = jg.DetectionLoss(ANCHORS, classes, config)(raw, batch)
    slow = times * slow_detection_loss(raw, batch, config)
    assert loss.item() == near(slow.item(), rel=1e-5)  # float32 sums of 300 terms
    gradient = torch.autograd.grad(loss, raw)
    close(gradient, torch.autograd.grad(slow, raw), rtol=1e-4, atol=1e-5)  # ciou's 1e-7

@cases("class_balance, weights", [(True, [2, 2 / 3, 1]), (False, [1.0, 1, 1])])
def test_classification_loss_equals_weighted_cross_entropy(class_balance, weights):
    """Of the images with a class; balanced, w = N / (C n_c), of counts 1, 3, 2."""
    labels = torch.tensor([1, 0, 1, 2, 1, 2, jg.NO_LABEL])
    config = tiny(class_balance=class_balance, mode="classify")
    network = jg.Network(config, 3, 3, ANCHORS)
    loss = jg.make_losses(network, joint_set(labels.tolist()), config)["cls"]
    logits = torch.randn(7, 3)
    expected = F.cross_entropy(logits[:6], labels[:6], torch.tensor(weights))
    close(loss(logits, jg.Batch(None, None, labels)), expected)  # float32

def test_classification_loss_of_images_without_a_class_is_0_and_so_is_its_gradient():
    logits = torch.randn(2, 3).requires_grad_()
    batch = jg.Batch(None, None, torch.tensor([jg.NO_LABEL] * 2))
    loss = jg.classification_loss(logits, batch, torch.ones(3))
    loss.backward()
    assert loss == 0 and not logits.grad.any()

class SmallTrunk(nn.Sequential):
    def __init__(self):
        norm = nn.BatchNorm2d(5)
        super().__init__(nn.Conv2d(3, 5, 3, 2), norm, nn.SiLU(), nn.Conv2d(5, 4, 3))
        self.W = self[3].weight

def small_case(T, detach=False):
    """A joint network of T tasks, their losses and a batch; each task on another scale."""
    torch.manual_seed(T)
    heads = {}
    losses = {}
    for k in range(T):
        heads[f"t{k}"] = nn.Sequential(nn.Conv2d(4, 3, 3), nn.Flatten(), nn.Linear(45, 2))
        losses[f"t{k}"] = lambda y, batch, k=k: 10.0**k * (y - k).square().mean()
    part = jg.JointNet(SmallTrunk(), heads, detach).double()
    return part, losses, jg.Batch(torch.randn(4, 3, 16, 20).double(), None, None)

def losses_of_one_graph(part, losses, batch):
    """Losses (T,) without a cut; to a detached head P3 is a constant."""
    P3 = part.trunk(batch.images)
    L = []
    for task, head in part.heads.items():
        read = P3.detach() if part.detach and L else P3
        L.append(losses[task](head(read), batch))
    return torch.stack(L)

@cases("w, surgery, detach", [
    ([1.0], None, False),
    ([1.0, 0.01], None, False),
    ([0.1, 1.0, 1.4, 1.5], None, False),
    ([0.5, 3.0], None, True),
    ([1.0, 0.1], "pcgrad", False),
    ([0.3, 1.7, 1.0], "imtl", False),
    ([1.0, 0.2, 0.1], "mgda", False),
    ([1.0, 1.0], "cap", False)], ids=str)
def test_backward_equals_one_graph(w, surgery, detach):
    """The trunk's gradient is that of sum a_i w_i L_i, a = surgery(gram) or 1, the heads' that of
    sum w_i L_i."""
    surgery = SURGERIES.get(surgery)
    part, losses, batch = small_case(len(w), detach)
    w = double(w)
    L = losses_of_one_graph(part, losses, batch)
    signals = jg.backward(part, batch, losses, w, surgery=surgery)
    a = surgery(signals.gram) if surgery else 1
    trunk = [*part.trunk.parameters()]
    heads = [*part.heads.parameters()]
    of_trunk = torch.autograd.grad((a * w * L).sum(), trunk, retain_graph=True)
    of_heads = torch.autograd.grad((w * L).sum(), heads)
    close([p.grad for p in trunk], [*of_trunk])  # float64
    close([p.grad for p in heads], [*of_heads])

def test_backward_tells_norms_and_products_at_W():
    """n_i = ||grad_W L_i||, whatever w; gram: of the gradients of w_i L_i; both by autograd."""
    part, losses, batch = small_case(3)
    w = double([1e-6, 2.0, 1.0])
    grad_W = []
    for L_i in losses_of_one_graph(part, losses, batch):
        (grad,) = torch.autograd.grad(L_i, part.trunk.W, retain_graph=True)
        grad_W.append(grad.flatten())
    g = torch.stack(grad_W)
    signals = jg.backward(part, batch, losses, w)
    close(signals.n, g.norm(dim=1))  # float64
    close(signals.gram, w[:, None] * g @ g.T * w, rtol=1e-7, atol=0)

@cases("optimizer, reference", [
    ("sgd", partial(torch.optim.SGD, momentum=0.937, nesterov=True)),
    ("adamw", partial(torch.optim.AdamW, betas=(0.9, 0.99)))])
def test_train_step_equals_the_librarys_optimizer_on_a_plain_network(optimizer, reference):
    """Decay on kernels alone, one norm to clip, a linear rise, then 0.01 + 0.99 (1 + cos) / 2."""
    config = tiny(mode="detect", optimizer=optimizer, lr=0.002, weight_decay=0.1, grad_clip=0.5)
    run = jg.Run(config, joint_set(), CPU)
    batch = random_batch()
    (part,) = copy.deepcopy(run.network.parts)
    kernels = [p for p in part.parameters() if p.ndim > 1]
    others = [p for p in part.parameters() if p.ndim == 1]
    plain = reference([{"params": kernels, "weight_decay": 0.1}])
    plain.add_param_group({"params": others, "weight_decay": 0})
    for progress, rate in ((0.1, 0.5), (0.2, 1), (0.6, 0.505), (1.0, 0.01)):
        for group in plain.param_groups:
            group["lr"] = 0.002 * rate
        jg.train_step(run, batch, progress)
        plain.zero_grad()
        run.losses["det"](part.heads["det"](part.trunk(batch.images)), batch).backward()
        assert nn.utils.clip_grad_norm_(part.parameters(), 0.5) > 0.5
        plain.step()
    for p, q in zip(part.parameters(), run.network.parameters(), strict=True):
        close(q, p, rtol=0, atol=5e-5)  # lr / 40: Adam divides a small gradient by its size

def test_parameters_and_gradients_start_at_64_bytes():
    """Without it CUDA's kernels fail on the views of a long vector."""
    network = jg.Run(tiny(), joint_set(), CPU).network
    assert {x.data_ptr() % 64 for p in network.parameters() for x in (p, p.grad)} == {0}

TRUTH = [np.array([  # x1 y1 x2 y2 px, score, class
    [10, 20, 40, 30, 1, 0],
    [60, 10, 70, 50, 1, 0],
    [0.0, 0, 9, 9, 1, 2]])]
FOUND = [np.array([
    [10, 20, 31.6, 30, 0.9, 0],  # IoU 0.72 with the first
    [5, 60, 25, 95, 0.8, 0],  # nothing
    [60, 10, 70, 50, 0.7, 0]])]  # the second

def test_average_precision_of_a_hand_computed_case():
    """Up to IoU 0.7 precision is 1 at 51 of 101 recalls, to 1/2, then 2/3; from 0.75 on 1/3."""
    ap = jg.average_precision(TRUTH, FOUND, 3, 300)
    expected = [(51 + 50 * 2 / 3) / 101] * 5 + [51 / 3 / 101] * 5
    assert ap[:, 0].tolist() == near(expected)  # ratios of whole numbers

@cases("found", [FOUND, [np.zeros((0, 6))]], ids=["found", "nothing"])
def test_average_precision_is_nan_without_boxes_and_0_without_finds(found):
    ap = jg.average_precision(TRUTH, found, 3, 300)
    array_equal(ap[:, 1:], [[math.nan, 0]] * 10)

def test_average_precision_counts_max_det_finds():
    """Of two the second is missed: precision 1 at 51 of 101 recalls, then 0."""
    assert jg.average_precision(TRUTH, FOUND, 3, 2)[0, 0] == near(51 / 101)

def answers(raw, anchors=ANCHORS):
    """A detection head that always gives these maps."""
    head = nn.Identity()
    head.anchors = anchors
    head.forward = lambda P3: raw
    return head

def knowing_network():
    """A network that finds the box of each of four images, and always says y; and the images.

    Logits of 0 are a cell's centre, here (28, 44) px, and the anchor's size, 11 x 6 px.
    """
    raw = [torch.full((4, 24, h, w), -12.0) for h, w in CANVAS]
    boxes = []
    for i in range(4):
        of_anchor = raw[0][i, 8:16, 5, 3]  # (8,), a view
        of_anchor[:4] = 0
        of_anchor[[4, 5 + i % 3]] = 9
        boxes.append(np.array([[i % 3, 28 / 96, 44 / 64, 11 / 96, 6 / 64]]))
    network = jg.Network(tiny(dropout=0.5), 3, 3, ANCHORS)
    heads = network.parts[0].heads
    heads["det"] = answers(raw)
    heads["cls"].linear.weight.data.zero_()
    heads["cls"].linear.bias.data = torch.tensor([0.0, 1, 0])
    return network, joint_set([0, 1, 1, jg.NO_LABEL], boxes)

def test_evaluate_scores_a_perfect_detector_one_and_a_constant_class_at_chance():
    """Of x, y, y and no class y is right in 2/3; balanced over x and y in 1/2."""
    val = jg.evaluate(*knowing_network(), tiny())
    assert [val[metric] for metric in jg.METRICS] == near([1, 1, 2 / 3, 1 / 2])
    assert val["confusion"] == [[0, 1, 0], [0, 2, 0], [0, 0, 0]]  # a row for each class
    assert val["per_class"]["AP50"] == near({"a": 1, "b": 1, "c": 1})
    assert val["per_class"]["accuracy"] == near({"x": 0, "y": 1, "z": math.nan}, nan_ok=True)

def outward(network):
    """What training goes on from: parameters, the random stream, each module's mode."""
    modes = [module.training for module in network.modules()]
    return copy.deepcopy([*network.parameters()]), torch.get_rng_state(), modes

@cases("training", [True, False])
def test_evaluate_leaves_network_and_random_stream_alone(training):
    network, data = knowing_network()
    network.train(training)
    before = outward(network), copy.deepcopy(network.state_dict())
    jg.evaluate(network, data, tiny())
    assert same((outward(network), network.state_dict()), before)

def test_estimated_statistics_are_plain_means_over_the_next_epochs_batches():
    """Of the stem, which reads images alone."""
    data = jg.load_data(tiny())[0]
    run = jg.Run(tiny(scale=0.2), data, CPU)
    jg.estimate_statistics(run, data)
    conv, norm, _ = run.network.parts[0].trunk[0]
    batches = [conv(batch.images) for batch in jg.epoch_batches(run, data)]
    close(norm.running_mean, sum(x.mean((0, 2, 3)) for x in batches) / 2)  # float32
    close(norm.running_var, sum(x.var((0, 2, 3)) for x in batches) / 2)

def test_estimating_statistics_leaves_parameters_random_stream_and_mode_alone():
    run = jg.Run(tiny(dropout=0.5, scale=0.2), joint_set(), CPU)
    before = outward(run.network)
    jg.estimate_statistics(run, joint_set())
    assert same(outward(run.network), before)

def test_what_is_evaluated_does_not_depend_on_batchnorms_momentum():
    """The statistics of training lag behind the weights; a score must not tell of that."""
    def hasten(run):
        for module in run.network.modules():
            module.momentum = 0.9
    slow = trained(epochs=1)
    fast = trained(hasten, epochs=1)
    assert same(slow.network.state_dict(), fast.network.state_dict())
    assert str(slow.rows[-1]["val"]) == str(fast.rows[-1]["val"])  # NaN is not NaN

# ----------------------------------------------------------------------------------------------
# 2. Data: the built-in set, batches, folders of files
# ----------------------------------------------------------------------------------------------

def frame(seed=0, split="train", i=0, imgsz=64, dominance=1.0):
    return jg.synthetic_sample(seed, split, i, imgsz, dominance)

def test_a_larger_set_begins_with_the_smaller_one():
    """Else runs of different sizes could not be compared."""
    few, many = (jg.load_data(tiny(train_images=n))[0] for n in (4, 9))
    assert np.array_equal(few.pixels, many.pixels[:4])
    assert few.labels == many.labels[:4]

@cases("other", [{"seed": 1}, {"split": "val"}, {"i": 1}])
def test_another_seed_split_or_index_is_another_frame(other):
    assert not np.array_equal(frame()[0], frame(**other)[0])

@pytest.fixture(scope="module")
def frames():
    """Of a hundred frames: pixels, and the corners (n, 4) of their jets in px."""
    found = []
    for i in range(100):
        pixels, rows, _ = frame(5, i=i)
        found.append((pixels, 64 * jg.cxcywh_to_xyxy(torch.tensor(rows[:, 1:]))))
    return found

def test_a_frame_holds_one_to_three_jets_that_do_not_overlap(frames):
    assert {len(corners) for _, corners in frames} == {1, 2, 3}
    for _, corners in frames:
        for a, b in itertools.combinations(corners.tolist(), 2):
            assert overlap(a, b) < 1e-4  # float32

def test_jets_touch_all_sides_of_their_boxes(frames):
    """A displaced box would cap mAP50-95; 2 px is the plume's fade."""
    for pixels, corners in frames:
        y, x = np.nonzero(np.ptp(pixels.astype(int), axis=2) > 25)  # coloured
        allclose([x.min(), y.min()], corners[:, :2].amin(0), atol=2)
        allclose([x.max() + 1, y.max() + 1], corners[:, 2:].amax(0), atol=2)

@cases("c", [0.0, 0.3, 1.0])
def test_best_possible_accuracy_is_0_970_at_every_dominance(c, monkeypatch):
    """Along (sqrt(1-c), sqrt(c)) the cue is N(v - 1, 1/4^2), so 1 - 4/3 Phi(-2) are right."""
    seen = []  # of each frame: the grains of tissue and speckle, the sector's half-angle
    def speckle(rng, shape, s, a=1):
        seen.append(s)
        return np.ones(shape)
    def place_jets(rng, apex, radius, half_angle):
        seen.append(half_angle)
        return np.zeros((0, 4))
    monkeypatch.setattr(jg, "speckle", speckle)
    monkeypatch.setattr(jg, "place_jets", place_jets)
    views = [frame(i=i, dominance=c)[2] for i in range(1000)]
    _, grain, half_angle = np.reshape(seen, (1000, 3)).T
    g = (half_angle - 0.62) / 0.13  # half-angle 0.62 + 0.13 g
    t = np.log(grain / 0.9) / np.log(1.4)  # grain 0.9 1.4^t
    along = math.sqrt(1 - c) * g + math.sqrt(c) * t
    assert (along - views + 1).std() == near(0.25, abs=0.02)  # 3 deviations of 1,000 draws
    right = np.digitize(along, [-0.5, 0.5]) == views
    assert right.mean() == near(0.970, abs=0.017)  # as above

def test_hsv_to_rgb_equals_pythons():
    hues = np.linspace(0, 1, 25)
    values = np.linspace(0.1, 1, 25)
    expected = [colorsys.hsv_to_rgb(h, 0.85, v) for h, v in zip(hues, values)]
    allclose(jg.hsv_to_rgb(hues, 0.85, values), expected)  # float64

def patch_and_box(seed=0, **given):
    """A white patch at x 16-36, y 8-20 of grey 96 x 48 px, augmented: as it is seen, and its box,
    in px; None where it is gone."""
    image = torch.full((1, 3, 48, 96), jg.GREY)
    image[:, :, 8:20, 16:36] = 1
    whole = torch.tensor([96, 48, 96, 48])
    box = torch.tensor([26, 14, 20, 12]) / whole
    batch = jg.Batch(image, torch.tensor([[0, 1, *box]]), torch.tensor([0]))
    batch = jg.augment(batch, tiny(**given), torch.Generator().manual_seed(seed))
    boxes = jg.cxcywh_to_xyxy(batch.targets[:, 2:]) * whole
    places = (batch.images[0, 0] > 0.72).nonzero().flip(1)  # (n, 2) x, y; half way to the grey
    seen = [*places.amin(0).tolist(), *(places.amax(0) + 1).tolist()] if len(places) else None
    return seen, boxes[0].tolist() if len(boxes) else None

@cases("flip_x, flip_y, wanted", [
    (1, 0, [60, 8, 80, 20]),  # 96 - 36 = 60
    (0, 1, [16, 28, 36, 40]),
    (0, 0, [16, 8, 36, 20])])
def test_a_flip_moves_patch_and_box_alike(flip_x, flip_y, wanted):
    seen, box = patch_and_box(flip_x=flip_x, flip_y=flip_y)
    assert seen == wanted
    assert box == near(wanted, abs=1e-4)  # float32 of 96 px

def test_zoom_and_shift_move_patch_and_box_alike_until_it_is_out_of_view():
    kept = []
    for seed in range(20):
        seen, box = patch_and_box(seed, flip_x=0.5, flip_y=0.5, scale=0.3, shift=0.4)
        kept.append(box is not None)
        if box:
            assert seen == near(box, abs=1)  # its edge is blurred
    assert 0.5 < np.mean(kept) < 1

def order(count=16, epoch=0, world=1, rank=0, **given):
    return [x.tolist() for x in jg.epoch_order(count, tiny(**given), epoch, world, rank)]

def test_each_epoch_is_another_shuffle_that_the_seed_repeats():
    first = sum(order(), [])
    assert sorted(first) == [*range(16)]
    assert order() == order() != order(epoch=1)
    assert order() != order(seed=5)

def test_ranks_share_the_images():
    halves = [sum(order(world=2, rank=rank), []) for rank in (0, 1)]
    assert [len(half) for half in halves] == [8, 8]
    assert sorted(sum(halves, [])) == [*range(16)]

@cases("given, sizes", [
    ({"count": 17}, [8, 8]),  # BatchNorm cannot train on one image
    ({"count": 17, "batch_size": 9, "world": 2, "rank": 1}, [9])])  # 9 each: one of them twice
def test_a_last_image_alone_is_left_out(given, sizes):
    assert [len(indices) for indices in order(**given)] == sizes

BOX = "0 0.5 0.5 0.25 0.5"
BOTH = BOX + "\n0 1 0\n"  # a box, and class 1 of three
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8))

def picture(size=(32, 32), colour=(120, 120, 120), mode="RGB"):
    return Image.new(mode, size, colour)

def encoded(image, suffix, **more):
    buffer = io.BytesIO()
    image.save(buffer, Image.registered_extensions()[f".{suffix}"], **more)
    return buffer.getvalue()

def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, Image.Image):
        content.save(path)
    elif content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)

def make_set(folder, items, held=None, **spec):
    """A joint set of {file name: (image or bytes, label text)}; None for a file not written."""
    held = held or {"v.png": (picture(), BOTH)}
    for split, files in (("train", items), ("val", held)):
        for name, (image, text) in files.items():
            write(folder / "images" / split / name, image)
            write((folder / "labels" / split / name).with_suffix(".txt"), text)
    base = {"path": ".", "train": "images/train", "val": "images/val", "test": "", "nc": 3,
            "names": ["a", "b", "c"], "classification_names": ["x", "y", "z"]} | spec
    path = folder / "data.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in base.items() if v is not ...}))
    return path

def two(image=None, text=BOTH, name="b.png"):
    image = picture() if image is None else image
    return {"a.png": (picture(), BOX + "\n1 0 0\n"), name: (image, text)}

def load(path, imgsz=32, tasks=("det", "cls"), cache_mb=1024.0):
    return joint.read_joint(path, imgsz, tasks, cache_mb, path.parent)

def read_label(folder, text, num_classes=3, num_labels=3, **spec):
    """What a label file says: boxes (n, 5) and the image's class."""
    hot = [1] + [0] * (num_labels - 1)
    first = picture(), f"{BOX}\n{' '.join(map(str, hot))}\n"
    names = {
        "nc": ...,
        "names": list("abcdefgh"[:num_classes]),
        "classification_names": list("stuvwxyz"[:num_labels])}
    items = {"a.png": first, "b.png": (picture(), text)}
    path = make_set(folder, items, {"v.png": first}, **names, **spec)
    train, _ = load(path)
    return train.boxes[1], train.labels[1]

def told(split):
    return "\n".join(split.notes)

LABELS = table(r"""
0 .5 .5 .25 .5                           3  0 .5 .5 .25 .5   None
0 1 0                                    3  -                1
2                                        3  -                2
-                                        3  -                None
2 .25 .25 .75 .25 .5 1.0                 3  2 .5 .625 .5 .75  None  a triangle's bounding box
0 .2 .2 .4 .4 .2 .2                      3  0 .3 .3 .2 .2    None
0 .5 .5 .25 .5                           5  0 .5 .5 .25 .5   None   as long as a one-hot row
0 0 1 0 0                                5  -                2
0 0 0 0 0 0 1                            7  -                6      as long as a triangle
0 .5 .5 1.000001 .2                      3  0 .5 .5 1 .2     None   rounded by another tool
0 .9 .5 .4 .2                            3  0 .85 .5 .3 .2   None   0.7 to 1.1, cut to 0.7 to 1
0 .5 .5 0 .2                             3  -                None   no size
0 .5 .5 .2 1e-50                         3  -                None   none in float32
0 .5 .5 .25 .5\r0 1 0\r                  3  0 .5 .5 .25 .5   1
\t0 .5 .5 .25 .5\t\r\n\n\t0 \x201 0 \n   3  0 .5 .5 .25 .5   1
\ufeff0 .5 .5 .25 .5\n0 1 0              3  0 .5 .5 .25 .5   1""")

@cases("row", LABELS, ids=[row[0] for row in LABELS])
def test_rows_are_boxes_polygons_or_the_class(tmp_path, row):
    """What a label file holds, with how many image classes, its box, its class."""
    text, num_labels, box, label, *_ = row
    content = text.strip("-").encode().decode("unicode_escape")
    boxes, found = read_label(tmp_path, content, num_labels=int(num_labels))
    expected = np.array(box.strip("-").split(), float).reshape(-1, 5)
    allclose(boxes, expected, atol=2e-6)  # the 1.000001
    assert str(found) == label

TOKENS = "0 1 2 0.5 1.0 -1 nan inf 1e400 1e-50 x 1_0 ٣ 0,5 -0.0 0x1 \x1c \u2028 \0".split(" ")
ROW = st.lists(st.sampled_from(TOKENS), max_size=8).map(" ".join)

@settings(max_examples=60, deadline=None)
@given(
    st.lists(ROW, max_size=6).map("\n".join) | st.text(max_size=60),
    st.integers(1, 8),
    st.sampled_from([2, 3, 5, 7]),
    st.sampled_from([..., ["1", "2"], ["1", "3"]]))
def test_any_text_gives_boxes_or_a_line_that_says_where(
        tmp_path_factory, text, classes, labels, points):
    folder = tmp_path_factory.mktemp("set")
    try:
        boxes, label = read_label(folder, text, classes, labels, kpt_shape=points)
    except joint.DataError as error:
        for line in str(error).splitlines():
            assert re.search(r"b\.txt(:[1-9]\d*)?: .|^… and ", line)
        return
    assert boxes.shape[1] == 5
    assert np.isfinite(boxes).all()
    assert (boxes[:, 3:] > 0).all()
    assert set(boxes[:, 0]) <= set(range(classes))
    assert 0 <= boxes[:, 1:].min(initial=0) <= boxes[:, 1:].max(initial=0) <= 1
    assert label in (None, *range(labels))

@cases("row, shape", [
    (BOX + " .4 .4 .6 .6", [2, 2]),
    (BOX + " .4 .4 2 .6 .6 0", [2, 3]),
    (BOX, [2, 3])])
def test_with_kpt_shape_a_row_is_its_box(tmp_path, row, shape):
    """Read as a polygon it would be a box about its points and the box's own numbers."""
    boxes, _ = read_label(tmp_path, row, kpt_shape=shape)
    allclose(boxes, [[0, 0.5, 0.5, 0.25, 0.5]])

@cases("row, shapes", [
    (BOX + " .4 .4 .6 .6", ["[2, 2]"]),
    (BOX + " .4 .4 1 0 0 0", ["[2, 3]"]),
    ("0 .1 .1 .9 .1 .9 .9 .1 .9", []),  # a square polygon
    (BOX, [])])
def test_rows_that_look_like_keypoints_are_told(tmp_path, row, shapes):
    """All rows of the set are of one length, and their points lie in the box before them."""
    item = picture(), row + "\n1\n"
    items = {"a.png": item, "b.png": item}
    train, _ = load(make_set(tmp_path, items, {"v.png": item}))
    assert re.findall("add kpt_shape: (.*)", told(train)) == shapes

@cases("table", [
    "file,class\na.png,z\nb.png,y\n",
    "a,z\nb,y",
    "\ufeffimages/train/a.png;z\r\ntrain/b;y\r\n",
    "name\tclass\nimages\\train\\a.png\tz\n\nb.jpg\ty\n",
    '"a.png","z"\n"b.png", y\n',
    "sep=;\r\nFile, or stem;Class\r\na;z\r\nb;y\r\n",
    "file, z, y, x\na, 1, 0, 0\nb.png, 0, 1, 0\n",
    "file;y;z\na;False;TRUE\nb;True;False",
    "file,class,by\na,z,me\nb,y,\n"])
def test_every_form_of_a_set_is_read(tmp_path, table):
    """Classes in a table, where a row may say the same; names as a mapping; train as a list of
    list files, in which ./ is relative to the list, all else to the set, and of folders."""
    path = make_set(
        tmp_path, two() | {"a.png": (picture(), BOX)}, classes="classes.csv",
        names={2: "c", 0: "a", 1: "b"}, train=["l.txt", "images/more", "images/k.txt"])
    write(tmp_path / "l.txt", "./images/train/a.png\n\nimages\\train\\b.png\r\n")
    write(tmp_path / "images/k.txt", "./train/d.png\n")
    write(tmp_path / "images/train/d.png", picture())
    write(tmp_path / "images/more/odd.jpg/c.PNG", picture())
    write(tmp_path / "classes.csv", table)
    train, val = load(path)
    assert [p.name for p in train.paths] == ["c.PNG", "a.png", "b.png", "d.png"]
    assert train.labels == [None, 2, 1, None]
    assert val.labels == [1]
    assert train.names == ["a", "b", "c"]

@cases("rows", ["s.png,y\ns,z\nt.png,x", "s,z\nt.png,x\ns.png.jpg,y"])
def test_a_table_means_the_whole_name_before_the_stem(tmp_path, rows):
    """`t.png` is no file, but t.png.jpg's stem; `s.png` too, and `s` that of s.gif."""
    names = ["s.gif", "s.png.jpg", "t.png.jpg"]
    items = dict.fromkeys(names, (picture(), BOX))
    path = make_set(tmp_path, items, classes="classes.csv")
    write(tmp_path / "classes.csv", rows)
    train, _ = load(path)
    assert [p.name for p in train.paths] == names
    assert train.labels == [2, 1, 0]

@cases("name, content", [
    ("classes.csv", "v,y\n"),
    ("images/val/u.png", picture()),
    ("labels/train/b.txt", "1 .5 .5 .2 .2"),
    ("labels/val/v.txt", "1 .5 .5 .2 .2"),
    ("images/train/b.png", picture((320, 320)))])
def test_fingerprint_changes_with_a_label_a_name_or_a_size_and_nothing_else(
        tmp_path, name, content):
    """A finished run is taken as done where settings and fingerprint are the same."""
    path = make_set(tmp_path, two(text=BOX), {"v.png": (picture(), BOX)}, classes="classes.csv")
    write(tmp_path / "classes.csv", "v,x\n")
    before, again = (load(path)[0].fingerprint for _ in range(2))
    write(tmp_path / name, content)
    assert load(path)[0].fingerprint != before == again

@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, on what it skips
@cases("suffix", ["jpg", "png", "tif"])
def test_damaged_images_are_read_or_named_a_line_each(tmp_path, suffix):
    """Pillow raises many types on damaged bytes; all must come out as one."""
    rng = np.random.default_rng(0)
    exif = NOISE.getexif()
    exif[0x0112] = 6
    exif[0x010E] = "text"
    whole = np.frombuffer(encoded(NOISE, suffix, exif=exif), np.uint8)
    files = {}
    for k in range(80):
        raw = whole.copy()
        raw[rng.integers(0, min(len(raw), 300), 4)] = rng.integers(0, 256, 4)
        cut = raw[:rng.integers(1, len(raw) + 1)]
        files[f"{k}.{suffix}"] = cut.tobytes(), BOTH
    named = rf"(.*/\d+\.{suffix}: not a readable image .*; replace it\n){{10}}… and \d+ more"
    with pytest.raises(joint.DataError, match=f"^{named}$"):
        load(make_set(tmp_path, files))

GREY_114 = picture((1, 1), (114, 114, 114))

@cases("image, suffix, wanted", [
    (picture(colour=77, mode="L"), "png", 77),
    (picture(colour=1, mode="1"), "png", 255),
    (picture(colour=(10, 20, 30, 255), mode="RGBA"), "avif", (10, 20, 30)),
    (picture(colour=(10, 20, 30)).quantize(), "gif", (10, 20, 30)),
    (picture(colour=(255, 0, 0, 0), mode="CMYK"), "tif", (0, 255, 255)),
    (GREY_114, "jfif", 114),
    (GREY_114.resize((2000, 2)), "jfif", 114),
    (Image.fromarray(np.full((9, 9), 257 * 128, np.uint16)), "png", 128)])
def test_every_kind_and_size_of_image_becomes_8_bit_rgb(tmp_path, image, suffix, wanted):
    """16-bit grey is divided by 257, not clipped; what is padded is grey, 114."""
    train, _ = load(make_set(tmp_path, two(image, name=f"b.{suffix}")))
    assert train.pixels.shape[1:3] == (32, 32)
    assert np.abs(train.pixels[1].astype(int) - wanted).max() <= 12  # JPEG's, CMYK's rounding

def png16(pixels):
    """A PNG of 16-bit grey (H, W) or colour (H, W, 3): Pillow writes none of the second."""
    height, width, *channels = pixels.shape
    kind = 2 if channels else 0
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    content = b"\x89PNG\r\n\x1a\n"
    for name, body in (
            (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)),
            (b"IDAT", zlib.compress(rows)),
            (b"IEND", b"")):
        check = zlib.crc32(name + body)
        content += struct.pack(">I", len(body)) + name + body + struct.pack(">I", check)
    return content

GREYS = np.arange(1024).reshape(32, 32) * 4  # 12 bits: 0 to 4092
COLOURS = np.stack([GREYS, GREYS[::-1], GREYS.T], 2)
SIGNED = Image.fromarray((GREYS - 2000).astype(np.int32))

@cases("name, content, pixels, low", [
    ("b.png", png16(GREYS), GREYS, 0),
    ("b.png", png16(COLOURS), COLOURS, 0),
    ("b.ppm", b"P6 32 32 65535\n" + COLOURS.astype(">u2").tobytes(), COLOURS, 0),
    ("b.tif", encoded(SIGNED, "tif"), GREYS, -2000)], ids=["grey", "colour", "PPM", "signed"])
def test_more_than_8_bits_are_scaled_by_the_sets_range(tmp_path, name, content, pixels, low):
    """The darkest and the brightest of both splits become 0 and 255, also where a file is read
    alone: of the 0 to 8000 in the set, 0 to 4092 are 131 levels."""
    bright = png16(np.full((32, 32), 8000 + low))
    path = make_set(tmp_path, two(content, name=name), {"v.png": (bright, BOTH)})
    train, val = load(path)
    assert train.levels == val.levels == (low, low + 8000)
    wanted = (pixels * 255 // 8000).reshape(32, 32, -1) + np.zeros(3)
    array_equal(train.pixels[1], wanted)
    alone = joint.read_image(train.paths[1], train.levels)
    array_equal(alone, wanted)
    assert f"levels {low} and {low + 8000} become 0 and 255" in told(train)

def test_letterbox_keeps_the_aspect_and_boxes_on_the_object(tmp_path):
    """300 x 100 at 64 px is 64 x 21, 5 px below the top of a canvas of 64 x 32 px."""
    image = picture((300, 100), (0, 0, 0))
    ImageDraw.Draw(image).rectangle([30, 20, 89, 59], fill="red")
    item = image, "0 0.2 0.4 0.2 0.4\n1"
    path = make_set(tmp_path, {"a.png": item, "b.png": item}, {"v.png": item})
    train, _ = load(path, imgsz=64)
    assert train.pixels.shape[1:3] == (32, 64)
    edges = [6.4, 9.2, 19.2, 17.6]
    box = jg.cxcywh_to_xyxy(torch.tensor(train.boxes[1][0, 1:])).numpy() * [64, 32, 64, 32]
    allclose(box, edges, atol=1e-4)  # float32 of 64 px
    y, x = np.nonzero(np.ptp(train.pixels[1], axis=2) > 100)  # red
    seen = [x.min(), y.min(), x.max() + 1, y.max() + 1]
    allclose(seen, edges, atol=1)  # resampling blurs the edge
    assert (train.pixels[1][:3, :3] == 114).all()

@cases("name", ["x.dcm", "x.heic", "x"])
def test_files_of_another_kind_are_counted(tmp_path, name):
    train, _ = load(make_set(tmp_path, two() | {name: (b"DICM", BOX)}))
    kind = Path(name).suffix or "without suffix"
    assert f"1 files of a kind not read (1 {kind}); labels are there for 1" in told(train)

def test_a_folder_that_a_link_leads_to_is_read_once(tmp_path):
    """By the path without links, where it has one; a link may form a loop."""
    write(tmp_path / "pool/c.png", picture())
    path = make_set(tmp_path, two())
    for name, target in (("pool", "../../pool"), ("again", "../train"), ("loop", "loop")):
        (tmp_path / "images/train" / name).symlink_to(target)
    train, _ = load(path)
    assert [p.name for p in train.paths] == ["a.png", "b.png", "c.png"]
    found, _ = joint.find_images(tmp_path)
    assert [p.parent.name for p in found] == ["train", "train", "val", "pool"]

def test_a_line_that_is_repeated_counts_as_often(tmp_path):
    path = make_set(tmp_path, two(), train="l.txt")
    write(tmp_path / "l.txt", "images/train/a.png\n" + "images/train/b.png\n" * 3)
    train, _ = load(path)
    assert train.labels == [0, 1, 1, 1]
    assert (train.pixels[3] == train.pixels[1]).all()
    assert "2 images are listed again" in told(train)

def test_labels_without_an_image_are_told(tmp_path):
    path = make_set(tmp_path, two())
    write(tmp_path / "labels/train/ghost.txt", BOX)
    write(tmp_path / "labels/train/classes.txt", "a")
    write(tmp_path / "labels/val/._v.txt", b"\xff")
    assert "1 label files without an image are not read: train/ghost.txt" in told(load(path)[0])

def test_corners_in_place_of_a_middle_and_a_size_are_told(tmp_path):
    corners = picture(), "0 .7 .7 .9 .9\n1\n"
    path = make_set(tmp_path, dict.fromkeys(("a.png", "b.png"), corners))
    train, _ = load(path)
    assert "2 of 3 boxes reach outside" in told(train)

def test_a_class_that_a_split_lacks_is_told(tmp_path):
    item = picture(), BOX + "\n1\n"
    train, _ = load(make_set(tmp_path, {"a.png": item, "b.png": item}, {"v.png": item}))
    assert "train: no box of 2 of the 3 classes: b, c" in told(train)
    assert "val: no image class of 2 of the 3 classes: x, z" in told(train)

@cases("suffix", ["gif", "tif", "webp"])
def test_further_frames_are_told(tmp_path, suffix):
    frames = [picture(colour=(k, 0, 0)) for k in (90, 180)]
    content = encoded(picture(), suffix, save_all=True, append_images=frames)
    train, _ = load(make_set(tmp_path, two(content, name=f"b.{suffix}")))
    assert f"1 images hold several frames (b.{suffix}: 3)" in told(train)

@cases("name", [".ipynb_checkpoints/a.png", "@eaDir/a.png/T.jpg", "._a.png"])
@cases("train", ["images/train", "l.txt"])
def test_hidden_and_system_folders_are_no_data(tmp_path, name, train):
    path = make_set(tmp_path, two() | {name: (picture(), None)}, train=train)
    lines = [f"images/train/{x}" for x in ("a.png", "b.png", name)]
    write(tmp_path / "l.txt", "\n".join(lines))
    train, _ = load(path)
    assert len(train.paths) == 2
    assert "hidden" in told(train)

@cases("image, label", [
    ("b.png", "b.TXT"),
    ("B.png", "b.txt"),
    ("ka\u0308fer.png", "k\u00e4fer.txt")])
def test_a_label_that_differs_in_case_or_unicode_form_is_read(tmp_path, image, label):
    path = make_set(tmp_path, two(name=image, text=None))
    write(tmp_path / "labels/train" / label, BOTH)
    train, _ = load(path)
    assert sorted(train.labels) == [0, 1]

def test_a_label_that_is_another_images_is_not_taken(tmp_path):
    train, _ = load(make_set(tmp_path, two() | {"A.png": (picture(), None)}))
    assert train.labels == [None, 0, 1]
    assert "A.txt: no such label file" in told(train)

def test_an_export_of_roboflow_is_read(tmp_path):
    """As YOLOv5 does, without the ../ where nothing is there; no test part is a note."""
    path = make_set(tmp_path, two(), train="../images/train", path=..., test="../images/test",
                    classes="c.csv")
    write(tmp_path / "c.csv", "a,x\nsome,y\n")  # of the test part
    train, _ = load(path)
    assert train.labels == [0, 1]
    assert re.search("test: '../images/test' cannot be read .*no test", told(train))

@on_linux
def test_bytes_in_names_are_read_and_shown_escaped(tmp_path):
    """A folder's name in GBK, an image's in Latin-1, with a line break."""
    folder = tmp_path / os.fsdecode("数据".encode("gbk"))
    items = two(name=os.fsdecode(b"\xe4\n.png"), text=None)
    train, _ = load(make_set(folder, items), cache_mb=0)
    assert "\\udce4\\n.txt: no such label file" in told(train)
    with pytest.raises(joint.DataError, match=r"^\S+\\udcca\S+/c: not a readable image .*$"):
        joint.read_image(folder / "c")

@on_linux
def test_one_huge_image_at_a_time_is_in_memory(tmp_path):
    """Four of 25 million pixels: 100 MB each in Pillow, and once more to turn it upright."""
    image = picture((5000, 5000))
    exif = image.getexif()
    exif[0x0112] = 6
    content = encoded(image, "png", exif=exif, compress_level=1)
    path = make_set(tmp_path, {f"{k}.png": (content, BOTH) for k in range(4)})
    code = f"""if True:
        import pathlib
        from data import joint
        joint.read_joint(pathlib.Path({str(path)!r}), 32, (), 1, pathlib.Path("."))
        print(pathlib.Path("/proc/self/status").read_text())"""
    peak = re.search(r"VmHWM:\s+(\d+)", python("-c", code, cwd=jg.ROOT).stdout)
    assert int(peak[1]) < 400 * 1024  # kB

# ----------------------------------------------------------------------------------------------
# 3. Bad input, through `main`: exit 2, a line for each fault, nothing written
# ----------------------------------------------------------------------------------------------

FILES = ["best.pt", "config.yaml", "figure.png", "last.pt", "metrics.jsonl", "results.json"]

def start(out, *words, **given):
    return jg.main([*map(str, words), "--out", str(out), *options(**given)])

@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of a finished run of each mode."""
    base = tmp_path_factory.mktemp("runs")
    for mode in jg.MODES:
        assert start(base / mode, "--mode", mode) == 0
    return {mode: base / mode for mode in jg.MODES}

@pytest.fixture
def mistake(tmp_path, monkeypatch, capsys):
    """A command with a mistake -> the lines it ends with, at exit 2. It changes no file."""
    def files():
        return {x: x.read_bytes() for x in Path().rglob("*") if x.is_file()}
    def lines_of(arguments):
        before = files()
        code = jg.main(shlex.split(arguments))
        lines = capsys.readouterr().err.splitlines()
        assert code == 2
        assert files() == before
        for line in lines:
            assert line.startswith("error: ")
            assert len(line) < 900
        return lines
    monkeypatch.chdir(tmp_path)
    return lines_of

@pytest.fixture
def begun(mistake, runs):
    """The same beside run/, a run of `fixed`; lost/, it without checkpoints; a set; a file."""
    shutil.copytree(runs["fixed"], "run")
    shutil.copytree(runs["fixed"], "lost", ignore=shutil.ignore_patterns("*.pt"))
    make_set(Path("set"), two())
    write(Path("mine"), "")
    return mistake

VALUES = """\
mode: no
mode: Gradnorm
mode: !!python/object/apply:os.system ['touch ran']
seed: 2.5
seed: -1
epochs: no
epochs: .inf
lr: .nan
lr: yes
lr: [1]
lr: {a: 1}
lr:
imgsz: 65
class_balance: 2
betas: [0.9, 1.0]
betas: 0.9
initial_weights: [1, 0]
initial_weights: 1,2,3
anchors: [[1, 2]]
anchors: other
optimizer: adam
data: [1]"""

@cases("text", VALUES.splitlines())
def test_a_value_is_told_with_what_is_expected(mistake, text):
    Path("c.yaml").write_text(text)
    (line,) = mistake("--config c.yaml")
    assert re.match(f"error: c.yaml: {text.partition(':')[0]}: found .*, expected ", line)

@cases("content, said", [
    (b"- 1", "expected lines of 'key: value'"),
    (b"epoch: 3", "unknown key epoch; did you mean epochs"),
    (b"lr: " + b"[" * 1200, "YAML"),
    (b"lr: \xff", "YAML"),
    (b"lr: 0x" + b"f" * 5000, "lr: found"),
    (b"? [a]\n: 1", "YAML|unknown key")])
def test_a_config_file_that_cannot_be_read_is_named(mistake, content, said):
    Path("c.yaml").write_bytes(content)
    (line,) = mistake("--config c.yaml")
    assert re.search(f"c.yaml: .*({said})", line)

OPTIONS = table(r"""
--batch 4                             --batch: no such option; did you mean batch_size
--img 1                               did you mean imgsz
--conf 0.4                            --conf: no such option
--lr                                  --lr: expected one argument
--lr fast                             lr: found 'fast', expected 1e-8
--epochs=                             epochs: found ''
--device gpu                          device: found 'gpu'
--device cuda:99                      --device cuda:99: .*has none
--mode compare                        --mode: invalid choice
--mode reproduce --seed 1             reproduce: takes no setting
--config no.yaml                      no\.yaml: .*No such
--config .                            directory
--data no/such.yaml                   no/such\.yaml: cannot be read
--mode predict                        predict: needs --checkpoint
--source x                            of --mode predict alone
--out mine                            --out mine: not empty
--out run                             run: not empty.*--resume run
--mode reproduce --out run            --out run: not empty
--resume no                           no: no run there
--resume run/last.pt                  last.pt: a file; .*--resume run
--resume lost                         lost: finished .*last.pt is gone
--resume run --lr 0.001               takes no option but .*schedule: --init its last.pt
--resume run --mode equal             takes no option but
--resume run --data set/data.yaml     other images or labels than set/data
--init run/last.pt --width_multiple 0.25 --train_images 2  no detector of .* \(.*its width.*""")

@cases("arguments, said", OPTIONS)
def test_an_option_that_cannot_be_is_told(begun, arguments, said):
    (line,) = begun(arguments)
    assert re.search(said, line)

class Shell:
    """Unpickles into a shell command, which would leave a file named ran."""
    def __reduce__(self):
        return os.system, ("touch ran",)

@cases("content, said", [
    ({jg.SCHEMA: True, "network": Shell()}, "holds Python objects.*README"),
    ({jg.SCHEMA: True}, "has no 'config'|no detector"),
    (torch.ones(3), "no run's .pt")], ids=["code", "hollow", "tensor"])
@cases("use", ["--resume run", "--init run/last.pt --train_images 2 --val_images 2"])
def test_a_foreign_checkpoint_runs_no_code(begun, use, content, said):
    torch.save(content, "run/last.pt")
    (line,) = begun(use)
    assert re.search(said, line)

@cases("change", [{"width_multiple": 0.0625}, {"epochs": 9}])
def test_a_run_goes_on_by_its_own_config_alone(begun, change):
    Path("run/config.yaml").write_text(yaml.safe_dump(TINY | {"mode": "fixed"} | change))
    (line,) = begun("--resume run")
    assert re.search(r"last\.pt: does not fit", line)

def test_a_folder_belongs_to_one_process(begun):
    with jg.held(Path("run")):
        (line,) = begun("--resume run")
    assert "run: another process works there" in line

@on_linux
def test_a_path_that_is_not_utf8_is_a_line(mistake):
    (line,) = mistake(f"--data {os.fsdecode(b'a')}\udcff.yaml")
    assert "'a\\udcff.yaml': not UTF-8" in line

def test_a_terminal_of_few_letters_shows_the_others_escaped(monkeypatch):
    """cp1252: where a console of Windows writes into a file."""
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(written, encoding="cp1252"))
    assert jg.main(["--data", "图.yaml"]) == 2
    assert rb"\u56fe.yaml: cannot be read" in written.getvalue()

def test_settings_are_read_in_the_forms_that_people_type(tmp_path):
    """YAML 1.1 reads 1e-3 as text and `no` as False; a whole number is a fine float."""
    (tmp_path / "c.yaml").write_text("lr: 1e-3\nscale: 0\ndata: no")
    given = {"seed": "7", "initial_weights": "1,2", "anchors": str(ANCHORS.tolist())}
    config = jg.load_config(tmp_path / "c.yaml", given)
    assert (config.lr, config.scale, config.data, config.seed) == (0.001, 0, "no", 7)
    assert config.initial_weights == (1, 2)
    assert np.array_equal(config.anchors, ANCHORS)

def number(text):
    base, _, power = text.partition("^")
    return float(base) ** int(power or 1)

RANGES = [(key, *map(number, found[0])) for key, comment in jg.key_comments().items()
          if (found := re.findall(r"([\d.e^-]+) to ([\d.e^-]+\d)", comment))]

@cases("key, low, high", RANGES)
def test_the_range_in_config_yaml_is_configs(key, low, high):
    """Both ends are taken, and nothing beyond: also a pair's, where each has it."""
    shipped = jg.read_yaml(SHIPPED)[key]
    def take(x):
        text = str(int(x)) if x == int(x) else str(x)
        value = [text] * 2 if isinstance(shipped, list) else text
        return jg.load_config(SHIPPED, {key: value})
    take(low)
    take(high)
    for outside in (low - max(1e-9, abs(low) / 100), high * 1.01):
        with pytest.raises(jg.UserError, match=f"{key}: found .*, expected .* to "):
            take(outside)

def test_every_key_has_a_field_and_its_line_in_help(capsys):
    comments = jg.key_comments()
    assert list(comments) == list(jg.Config.__dataclass_fields__)
    with pytest.raises(SystemExit, match="0"):
        jg.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for key, comment in comments.items():
        assert f"--{key} " in shown and " ".join(comment.split()) in shown

def put(name, content):
    """A maker, as the next two: puts what a case needs into a folder."""
    return lambda folder: write(folder / name, content)

def link(name, target):
    return lambda folder: (folder / name).symlink_to(target)

def joint_folder(items=None, **spec):
    return lambda folder: make_set(folder / "set", items or two(), **spec)

def pair(text):
    return dict.fromkeys(("a.png", "b.png"), (picture(), text))

def bmp(side):
    """A bitmap that claims to have sides of so many px, and holds 32 x 32."""
    raw = bytearray(encoded(picture(), "bmp"))
    raw[18:26] = side.to_bytes(4, "little") * 2
    return bytes(raw)

SPECS = table(r"""
names: {0: a, 2: c}                 names: expected
names: abc                          names: expected
names:                              names: expected
names: [a, a, c]                    names: a name is given twice
nc: 4                               nc: expected 3
path: [x]                           path: expected a path, found
classification_names: []            classification_names: expected
kpt_shape: 4                        kpt_shape: expected
kpt_shape: [4, 5]                   kpt_shape: expected
path: no_set                        path: 'no_set' cannot be read .*; .*set holds 
path: "\0"                          path: .* cannot be read
path: "\ud800"                      path: .* cannot be read
train: images/trian                 train: 'images/trian' cannot be read .*images holds train
train: http://h/x.zip               train: .*cannot be read
train: [images/train, 1]            train: .*cannot be read
classes: no.csv                     classes: 'no.csv' cannot be read
train: labels                       train: 
train: []                           train: 
train: ../images                    train: .*outside""")
ROWS = table(r"""
3 .5 .5 .1 .1         expected a box class that is a whole number from 0, the first of names, to 2
-1 .5 .5 .1 .1        expected a box class that is a whole number from 0, the first of names, to 2
0.5 .5 .5 .1 .1       expected a box class that is a whole number from 0, the first of names, to 2
0 320 240 50 60       from 0 to 1, not pixels
0 .5 .5 -.1 .1        from 0 to 1, not pixels
0 .5 .5 .1 .1 .2 2    from 0 to 1, not pixels
0 .5 .5 .1            expected a box .*polygon .*kpt_shape.*one-hot of 3 or an index
0.8 0.1 0.1           expected a box .*polygon .*kpt_shape.*one-hot of 3 or an index
0 0 0 1 1             neither a box.* nor one-hot
cat .5 .5 .1 .1       expected numbers
0 nan .5 .1 .1        expected numbers
0 ٣ .5 .1 .1          expected numbers""")
TABLES = table(r"""
a.png,x\nb.png,w              csv:2: 'b.png', 'w': .*one of the classes x, y, z
a.png,x\nc.png,y              csv:2: 'c.png', 'y': 0 images.*mend the name
b.png                         csv:1: 
a.png,x\n\ndeep/b.png,y       csv:3: .*0 images
k.dcm,y                       csv:1: 'k.dcm', 'y': .*of a kind not read: convert
file,first,second\nb,y,z      csv:2: 'b', 'y,z': a second class
b,0,1,0                       csv:1: 'b', '0,1,0': expected one of the classes
/up/a.png,x                   csv:1: .*0 images.*give the name alone
x,a.png                       csv:1: .*0 images.*file into the first column
a.png,q                       csv:1: 'a.png', 'q': expected one of the classes
file,x,y,z\nb,0,1,1           csv:2: 'b', '0,1,1': expected one 1
file,class\nb,y\ntrain/b,z    csv:3: .*another class stands above
b,x                           b\.txt: its class row and the table differ""")
SETS = []
for spec, said in SPECS:
    SETS.append((said, joint_folder(**yaml.safe_load(spec)), put("images/o.png", "")))
for row, said in ROWS:
    SETS.append((f"b.txt:3: .*{said}", joint_folder(two(text=f"{BOX}\n\n{row}\n"))))
for rows, said in TABLES:
    items = two() | {"k.dcm": (b"", None)}
    SETS.append((said, joint_folder(items, classes="c.csv"),
                 put("set/c.csv", rows.replace(r"\n", "\n"))))
for line in ("../images/s.png: outside", "/etc/hostname: outside",
             "images/train/no.png: No such file", "images/train: not a file"):
    SETS.append((f"train: .*{line}", joint_folder(train="l.txt"),
                 put("set/l.txt", f"images/train/a.png\n{line.partition(':')[0]}"),
                 put("images/s.png", "")))
for name, content in (
        ("b.png", b""),
        ("b.bmp", bmp(9800)),  # too large
        ("b.jpg", encoded(NOISE, "jpg")[:1200]),
        ("b.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"),
        ("b.tif", encoded(Image.new("F", (8, 8)), "tif"))):  # pixels without a range
    SETS.append((f"{name}: not a readable image", joint_folder(two(content, name=name))))
for raw in (BOX.encode("utf-16"), b"\x00\x01\x02", b"\xff\xd8\xff\xe0"):
    SETS.append((r"b.txt: .*(UTF-8|binary)", joint_folder(two(text=raw))))
unlabelled = joint_folder(two(text=None))
SETS += [
    ("expected path, train, val", put("set/data.yaml", "")),
    ("expected path, train, val", put("set/data.yaml", "- a")),
    ("YAML", put("set/data.yaml", "names: [1")),
    ("UTF-8", put("set/data.yaml", b"\xff")),
    ("larger than 1 MB", put("set/data.yaml", "#" * 2**20 + "#")),  # it may be a stranger's
    ("data.yaml: cannot be read .*counts from .*set holds data.yml", put("set/data.yml", "")),
    ("binary", joint_folder(train="l.txt"), put("set/l.txt", "a\0b")),
    ("not UTF-8", joint_folder(classes="c.csv"), put("set/c.csv", b"b,y\xff")),
    ("b.txt: cannot be read", unlabelled, put("set/labels/train/b.txt/x", "")),
    ("b.txt: cannot be read", unlabelled, link("set/labels/train/b.txt", "b.txt")),
    ("b.txt: absent; b.TXT and b.Txt are near", unlabelled,
     put("set/labels/train/b.TXT", ""), put("set/labels/train/b.Txt", "")),
    ("labels/t: cannot be read", joint_folder(val="images/t"), put("set/images/t/v.png", ""),
     link("set/labels/t", "t")),
    ("train/link: outside .*link", joint_folder(), put("else/x.png", ""),
     link("set/images/train/link", "../../../else")),
    ("s.png: outside .*link", joint_folder(), put("secret.png", ""),
     link("set/images/train/s.png", "../../../secret.png")),
    ("l.png: a link to nothing", joint_folder(), link("set/images/train/l.png", "l.png")),
    ("a.png: shares .*a.txt with a.jpg; rename", joint_folder(), put("set/images/train/a.jpg", "")),
    ("train: no box, as in .*train/a.txt", joint_folder(pair("1"))),
    ("train: no image class .*--mode detect", joint_folder(pair(BOX))),
    ("train: one image; expected two", joint_folder({"b.png": (picture(), BOTH)}))]

@cases("said, makers", [(said, makers) for said, *makers in SETS], ids=[x[0] for x in SETS])
def test_a_fault_of_a_set_is_a_line(mistake, said, makers):
    for make in makers:
        make(Path())
    (line,) = mistake("--data set/data.yaml --imgsz 32")
    assert re.search(said, line)

def test_faults_are_a_line_each_up_to_ten(mistake):
    items = {f"{k:02}.png": (picture(), "0 9 9 9 9") for k in range(14)}
    make_set(Path("set"), items)
    *lines, last = mistake("--data set/data.yaml --imgsz 32")
    assert len(lines) == 10
    assert re.search(r"… and \d more", last)

# ----------------------------------------------------------------------------------------------
# 4. The contract: files, results.json, log, header
# ----------------------------------------------------------------------------------------------

def results_of(out):
    return json.loads((out / "results.json").read_text())

def log_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]

def state_of(checkpoint):
    return torch.load(checkpoint, weights_only=True)

def tasks_of(mode):
    return {"detect": ["det"], "classify": ["cls"]}.get(mode, ["det", "cls"])

ALONE = "detect", "classify", "dual", "detach"  # one task trains a trunk
KEYS = """schema mode seed data config environment code dataset steps parameters flops_per_image
    weights loss val interference time peak_rss_mb"""
INNER_KEYS = {
    "environment": "torch python device os processor cpu threads processes",
    "code": "sha256 commit",
    "parameters": "total trunk det cls",
    "weights": "initial final change",
    "loss": "mean final",
    "time": "start_s train_s train_cpu_s eval_s step_ms images_per_s"}

@cases("mode", jg.MODES)
def test_run_leaves_its_files(runs, mode):
    assert sorted(os.listdir(runs[mode])) == FILES

@cases("mode", jg.MODES)
def test_results_have_the_keys_that_scripts_rely_on(runs, mode):
    results = results_of(runs[mode])
    assert results.keys() == set(KEYS.split())
    for key, inner in INNER_KEYS.items():
        assert results[key].keys() == set(inner.split())
    assert (results["schema"], results["mode"]) == ("jointgrad/3", mode)

@cases("mode", jg.MODES)
def test_log_has_a_row_a_step_with_the_modes_columns(runs, mode):
    letters = ["L", "w"]
    columns = {"step", "epoch", "loss", "grad_norm"}
    if mode not in ALONE:
        letters.append("G")
        columns |= {"cosine", "similarity"}
    if mode in jg.SURGERIES:
        letters.append("a")
    if mode == "gradnorm":
        letters.append("r")
    columns |= {f"{letter}/{task}" for letter in letters for task in tasks_of(mode)}
    rows = log_of(runs[mode])
    assert [row["step"] for row in rows] == [*range(6)]
    assert all(row.keys() - {"time", "val"} == columns for row in rows)

@cases("mode", jg.MODES)
def test_validation_has_a_tasks_metrics_where_it_is_trained(runs, mode):
    val = results_of(runs[mode])["val"]
    for metric, task in zip(jg.METRICS, ("det", "det", "cls", "cls")):
        assert (val[metric] is not None) == (task in tasks_of(mode))

@cases("mode", jg.MODES)
def test_interference_is_of_what_the_trunk_follows(runs, mode):
    """gradient_share: of a_i G_i, a = 1 without surgery; null where the tasks share no trunk."""
    found = results_of(runs[mode])["interference"]
    if mode in ALONE:
        assert found is None
        return
    rows = log_of(runs[mode])
    det, cls = ([row[f"G/{t}"] * row.get(f"a/{t}", 1) for row in rows] for t in ("det", "cls"))
    share = np.mean(np.divide(det, np.add(det, cls)))
    assert found["gradient_share"] == near({"det": share, "cls": 1 - share})
    assert found["cosine_mean"] == near(np.mean([row["cosine"] for row in rows]))

@cases("mode, initial", [("fixed", [1, 0.01]), ("gradnorm", [1, 0.01]), ("equal", [1, 1])])
def test_a_run_begins_with_its_modes_weights(runs, mode, initial):
    first = log_of(runs[mode])[0]
    assert [first["w/det"], first["w/cls"]] == near(initial)
    assert results_of(runs[mode])["weights"]["initial"] == initial

def test_the_loss_is_the_weighted_sum(runs):
    for row in log_of(runs["gradnorm"]):
        total = row["w/det"] * row["L/det"] + row["w/cls"] * row["L/cls"]
        assert row["loss"] == near(total)

def test_every_second_epoch_and_the_last_are_evaluated(runs):
    rows = log_of(runs["equal"])
    assert [row["epoch"] for row in rows if "val" in row] == [1, 2]
    assert rows[-1]["val"] == results_of(runs["equal"])["val"]

@cases("mode", ["equal", "classify", "dual"])
def test_best_is_by_both_tasks_scores_the_later_of_equals(runs, mode):
    scores = [(row["val"]["mAP50-95"] or 0) + (row["val"]["balanced_accuracy"] or 0)
              for row in log_of(runs[mode]) if "val" in row]
    best = 2 if scores[0] > scores[1] else 3
    assert state_of(runs[mode] / "best.pt")["epoch"] == best

def test_zero_epochs_draw_and_count_the_data_and_end(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert jg.main(options(epochs=0)) == 0
    files = sorted(os.listdir("runs/data-synthetic-s0"))
    assert files == ["config.yaml", "labels.png", "metrics.jsonl"]
    train = jg.load_data(tiny())[0]
    count = train.labels.count(2)
    assert re.search(rf"class A4C +\| {count} ", capsys.readouterr().out)

def test_default_folders_are_numbered(tmp_path, monkeypatch):
    """Nothing is ever written over."""
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        jg.main(options(epochs=0))
    names = sorted(os.listdir("runs"))
    assert names == ["data-synthetic-s0", "data-synthetic-s0-2", "data-synthetic-s0-3"]

@cases("given, said", [
    ({"anchor_thres": 1}, r"(\d+) of \1 boxes match no anchor at imgsz 64"),
    ({"max_det": 1}, r"\d+ images have more than max_det \(1\) boxes"),
    ({"batch_size": 99}, "batch_size 99: ")])
def test_what_cannot_be_learnt_is_a_warning(tmp_path, capsys, given, said):
    assert start(tmp_path / "out", epochs=0, **given) == 0
    assert re.search(f"(?m)^warning: {said}", capsys.readouterr().err)

def test_results_are_there_although_the_picture_fails(tmp_path, monkeypatch, capsys):
    """As for names that a math parser cannot take."""
    write(tmp_path / "data/figures.py", "save = print\ndef draw_run(*values):\n    1 / 0\n")
    shutil.copy(SHIPPED, tmp_path)
    monkeypatch.setattr(jg, "ROOT", tmp_path)
    assert start(tmp_path / "out", epochs=1) == 0
    assert results_of(tmp_path / "out")["steps"] == 2
    assert "warning: figure.png is not drawn (ZeroDivisionError" in capsys.readouterr().err

@cases("given", [{}, {"grad_clip": 0.05}, {"optimizer": "sgd", "grad_clip": 0.05}], ids=str)
def test_detach_leaves_the_detector_as_detect_trains_it(given):
    """To the bit, also where a norm over both tasks would scale the detector's step."""
    alone = trained(mode="detect", **given).network.state_dict()
    beside = trained(mode="detach", **given).network.state_dict()
    assert all(torch.equal(x, beside[key]) for key, x in alone.items())

def test_progressive_training_begins_on_smaller_images():
    """Of 3 epochs round(0.5 x 3) = 2 at 0.25 of 128 px: as dual's classifier sees them."""
    sizes = []
    def watch(run):
        stem = run.network.parts[1].trunk[0]
        stem.register_forward_pre_hook(lambda module, x: sizes.append(len(x[0][0, 0])))
    trained(watch, mode="dual", progressive_share=0.5, progressive_scale=0.25, imgsz=128,
            eval_interval=9, train_images=8, val_images=2)
    assert sizes[:3] == [32, 32, 128]

def test_duals_networks_share_nothing():
    parts = jg.Run(tiny(mode="dual"), joint_set(), CPU).network.parts
    det, cls = ({x.data_ptr() for x in part.state_dict().values()} for part in parts)
    assert not det & cls

def test_a_warm_start_takes_a_yolov5s_tensors_in_order(runs, tmp_path):
    """They have other names, and anchors in strides."""
    before = state_of(runs["detect"] / "best.pt")["network"]
    anchors = "parts.0.heads.det.anchors"
    plain = {str(k): x for k, (key, x) in enumerate(before.items()) if key != anchors}
    plain["24.anchors"] = before[anchors] / torch.tensor(jg.STRIDES).view(3, 1, 1)
    torch.save(plain, tmp_path / "yolo.pt")
    run = jg.Run(tiny(mode="equal", seed=1), jg.load_data(tiny(seed=1))[0], CPU)
    assert "tensors, left none" in jg.warm_start(run, tmp_path / "yolo.pt")
    after = run.network.state_dict()
    assert same({key: after[key] for key in before}, before)

def test_a_warm_start_leaves_the_last_convolutions_of_other_classes(runs):
    run = jg.Run(tiny(mode="equal"), joint_set(), CPU)
    told = jg.warm_start(run, runs["detect"] / "best.pt")
    assert len(re.findall(r"heads\.det\.detect\.\d\.(weight|bias)", told)) == 6

def test_a_short_run_learns():
    """Geometry tells the view (dominance 0): chance is 1/3, and an untrained detector finds
    nothing."""
    val = trained(mode="equal", dominance=0, epochs=6, train_images=128, val_images=64,
                  width_multiple=0.0625, eval_interval=6).rows[-1]["val"]
    assert val["balanced_accuracy"] > 0.6
    assert val["mAP50"] > 0.1

# ----------------------------------------------------------------------------------------------
# 5. Repeats: same twice, resumed, alone, in a thread, in bfloat16, on two processes
# ----------------------------------------------------------------------------------------------

def timeless(rows):
    return [{key: value for key, value in row.items() if key != "time"} for row in rows]

def outcome(out):
    """All that must not differ between two runs: log, results, checkpoints, picture."""
    results = results_of(out)
    for key in ("time", "environment", "peak_rss_mb"):
        del results[key]
    states = [state_of(out / name) for name in ("last.pt", "best.pt")]
    for state in states:
        state["rows"] = timeless(state["rows"])
    return timeless(log_of(out)), results, states, (out / "figure.png").read_bytes()

def test_a_runs_config_repeats_it_to_the_bit(runs, tmp_path):
    config = runs["gradnorm"] / "config.yaml"
    assert jg.main(["--config", str(config), "--out", str(tmp_path / "out")]) == 0
    assert same(outcome(runs["gradnorm"]), outcome(tmp_path / "out"))

def interrupt(out, **given):
    """The folder of a run that was killed after an epoch, in the middle of a row of its log."""
    config = tiny(**given)
    data = jg.load_data(config)
    run = jg.Run(config, data[0], CPU)
    out.mkdir(exist_ok=True)
    (out / "config.yaml").write_text(yaml.safe_dump(jg.clean(vars(config))))
    next(jg.train(run, *data))
    jg.save_epoch(run, data[0], out)
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "epoch": 1, "time": {"train_s": 1}')

def resume(out, *words):
    return jg.main(["--resume", str(out), *words])

@cases("mode", ["gradnorm", "dual", "uncertainty"])
def test_resumed_run_equals_the_uninterrupted_one(runs, tmp_path, capsys, mode):
    interrupt(tmp_path, mode=mode)
    assert resume(tmp_path, "--device", "cpu") == 0
    assert same(outcome(runs[mode]), outcome(tmp_path))
    assert "resumed after epoch 1 of 3\n" in capsys.readouterr().out

def test_a_run_whose_data_moved_goes_on_to_the_same_result(tmp_path):
    given = {"data": str(make_set(tmp_path / "old", two())), "batch_size": 2, "imgsz": 32}
    whole = tmp_path / "whole"
    half = tmp_path / "half"
    assert start(whole, **given) == 0
    interrupt(half, **given)
    (tmp_path / "old").rename(tmp_path / "new")
    assert resume(half, "--data", str(tmp_path / "new/data.yaml"), "--cache_mb", "0") == 0
    assert timeless(log_of(whole)) == timeless(log_of(half))

@pytest.fixture
def failure(tmp_path, capsys):
    """Resumes a folder -> the line that it fails with, at exit 1; its last checkpoint stands."""
    def line_of():
        before = (tmp_path / "last.pt").read_bytes()
        assert resume(tmp_path) == 1
        assert (tmp_path / "last.pt").read_bytes() == before
        assert not list(tmp_path.glob("*.part"))
        (line,) = capsys.readouterr().err.splitlines()
        return line
    return line_of

def test_a_loss_that_is_not_finite_is_one_line_that_names_step_and_weights(tmp_path, failure):
    interrupt(tmp_path)
    state = state_of(tmp_path / "last.pt")
    next(iter(state["network"].values())).fill_(math.nan)
    torch.save(state, tmp_path / "last.pt")
    said = r"error: step 2: L/det, .*not finite \(w/det = .*, w/cls = .*\)"
    assert re.match(said, failure())

@on_linux
def test_a_full_disk_is_one_line(tmp_path, failure):
    """A limit of 100 kB a file, where a checkpoint has 300 kB."""
    import resource
    interrupt(tmp_path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    line = failure()
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert re.match("error: .*File too large", line)

@cases("during, said", [
    ("load_data", "nothing was begun"),
    ("augment", "go on by --resume ")])
def test_ctrl_c_says_how_to_go_on(tmp_path, monkeypatch, capsys, during, said):
    def interrupted(*values):
        raise KeyboardInterrupt
    monkeypatch.setattr(jg, during, interrupted)
    assert start(tmp_path / "out") == 130
    assert f"interrupted; {said}" in capsys.readouterr().err

@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A folder that holds jointgrad.py and config.yaml alone; runs a command in it."""
    folder = tmp_path_factory.mktemp("alone")
    for path in (jg.__file__, SHIPPED):
        shutil.copy(path, folder)
    return partial(python, cwd=folder)

def test_the_file_alone_trains_and_says_that_it_draws_no_picture(alone):
    done = alone("jointgrad.py", "--out", "out", *options(epochs=1))
    assert "no figure.png: data/figures.py, which draws it, is not there" in done.stdout
    assert "written to out/: best.pt, config.yaml, last.pt, metrics.jsonl, res" in done.stdout

def test_the_file_alone_says_that_it_reads_no_folders(alone):
    done = alone("jointgrad.py", "--data", "x.yaml")
    assert done.returncode == 2
    assert re.fullmatch("error: --data x.yaml: data/joint.py, .*copy it there.*\n", done.stderr)

REPORTED = """\
final_weight_det 0.0 True
final_weight_cls 4.0 True
weight_change_det -1.0 True
weight_change_cls 3.99 True
mean_loss 2.4624 True
parameters 1224 True
train_seconds 0.25 None"""  # by machine

def test_the_file_alone_reproduces_every_number_of_the_report(alone, tmp_path):
    """Its ten seeds are here three in turn, to either side of the report's mean loss."""
    code = """if True:
        import functools, sys, jointgrad as jg
        run = functools.cache(jg.smoke_test)
        jg.smoke_test = lambda seed, rule: run(seed % 3, rule)
        sys.exit(jg.main(["--mode", "reproduce", "--out", sys.argv[1]]))"""
    assert alone("-c", code, tmp_path / "out").returncode == 0
    checks = results_of(tmp_path / "out")["checks"]
    lines = [f"{check['name']} {check['reported']} {check['ok']}" for check in checks]
    assert lines == REPORTED.splitlines()

def test_numbers_that_are_not_the_reports_are_refused():
    assert not any(check["ok"] for check in jg.check_smoke({name: [9] for name in jg.REPORTED}))

def test_the_reports_weights_stand_for_nine_steps_and_then_sum_to_4():
    """w / mean(w) T sums to T^2."""
    w = jg.smoke_test(0, "report")["w"]
    assert w[:10].tolist() == [[1, near(0.01)]] * 10
    assert w[10:].sum(1).tolist() == near([4] * 41)

def test_under_gradnorm_both_tasks_of_the_smoke_test_are_trained():
    run = jg.smoke_test(0, "gradnorm")
    assert run["w"][1:].sum(1).tolist() == near([2] * 50)
    assert run["w"][-1].min() > 0.1

def test_import_from_a_folder_above_beside_a_strangers_package_named_data(tmp_path):
    shutil.copytree(jg.ROOT / "data", tmp_path / "project/data")
    for path in (jg.__file__, SHIPPED):
        shutil.copy(path, tmp_path / "project")
    write(tmp_path / "data/__init__.py", "")
    code = "import data, sys; from project import jointgrad as jg; jg.main(sys.argv[1:])"
    python("-c", code, "--out", "out", *options(epochs=1), cwd=tmp_path)
    assert sorted(os.listdir(tmp_path / "out")) == FILES

def test_main_runs_in_a_thread(tmp_path):
    """Where signals cannot be set, as in a notebook's worker."""
    codes = []
    thread = threading.Thread(target=lambda: codes.append(start(tmp_path / "out", epochs=1)))
    thread.start()
    thread.join()
    assert codes == [0]

def test_bf16_on_the_cpu_stays_near_float32():
    run = trained(mode="gradnorm", epochs=2, amp="bf16")
    plain = trained(mode="gradnorm", epochs=2)
    first = run.rows[0]["L/det"]
    assert first != plain.rows[0]["L/det"]
    assert first == near(plain.rows[0]["L/det"], rel=0.02)  # it has 8 bits
    assert run.w.sum().item() == near(2)

def rank_work(rank, folder):
    """Saves w over five steps, alone, then beside another rank on the same data and on others."""
    torch.set_num_threads(1)
    config = tiny(mode="gradnorm", dropout=0)
    data, _ = jg.load_data(config)
    def steps(first):
        run = jg.Run(config, data, CPU)
        batch = data.batch(range(first, first + 8))
        logs = [jg.train_step(run, batch, 0.5) for _ in range(5)]
        return [torch.cat([log["w"], log["r"]]).tolist() for log in logs]  # r: of the mean losses
    alone = steps(0)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    torch.save([alone, steps(0), steps(8 * rank)], Path(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()

distributed = pytest.mark.skipif(not torch.distributed.is_available(), reason="no distributed")

@distributed
def test_weights_agree_on_all_ranks_and_with_one_process(tmp_path):
    """Norms are taken of the mean gradient, so ranks with other data get the same weights; on the
    same data two ranks are one process, up to rounding (1e-4: four Adam steps)."""
    torch.multiprocessing.spawn(rank_work, (str(tmp_path),), nprocs=2)
    (alone, equal, apart), other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert other[1:] == [equal, apart]
    assert equal != apart
    assert np.allclose(equal, alone, atol=1e-4)

@pytest.fixture(scope="module")
def of_two_processes(tmp_path_factory):
    """The folder of one run that torchrun started on two processes: 32 images, 2 x 8 a step."""
    out = tmp_path_factory.mktemp("two") / "out"
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    python(*launch, jg.__file__, "--out", out, *options(train_images=32))
    return out

@distributed
def test_two_processes_train_one_run(of_two_processes):
    results = results_of(of_two_processes)
    assert results["steps"] == len(log_of(of_two_processes)) == 6
    assert results["environment"]["processes"] == 2
    assert sorted(os.listdir(of_two_processes)) == FILES

@distributed
def test_a_run_of_two_processes_is_not_resumed_by_one(of_two_processes, capsys):
    assert resume(of_two_processes) == 2
    assert "trained by 2 processes, now 1" in capsys.readouterr().err

def readme_code(name):
    """The indented block of README.md that follows <!-- name -->."""
    text = (jg.ROOT / "README.md").read_text(encoding="utf-8")
    block = text.partition(f"<!-- {name} -->")[2].lstrip("\n")
    return textwrap.dedent(re.match(r"(?:(?:    .*)?\n)+", block)[0])

def strangers_network():
    """What README's loops name, of a network that jointgrad does not know."""
    torch.manual_seed(0)
    shared = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8))
    heads = nn.ModuleList([nn.Linear(8, 1), nn.Linear(8, 1)])
    everything = [*shared.parameters(), *heads.parameters()]
    features = shared(torch.randn(16, 4))
    losses = [head(features - k).square().mean() * 100**k for k, head in enumerate(heads)]
    return {"torch": torch, "GradNorm": jg.GradNorm, "cap": jg.cap, "losses": losses,
            "W": shared[2].weight, "optimizer": torch.optim.SGD(everything, lr=0.01),
            "shared": [*shared.parameters()], "heads": [*heads.parameters()]}

def test_readmes_gradnorm_runs_as_printed_and_moves_the_weights():
    """The larger gradient's weight falls: of equal rates at the first step r is 1."""
    names = strangers_network()
    exec(readme_code("gradnorm"), names)
    w = names["balancer"].w.tolist()
    assert w[1] < 1 < w[0] and sum(w) == near(2)

def test_readmes_cap_runs_as_printed_and_leaves_the_capped_sum():
    """grad(L_1) + min(1, 0.25 |g_1| / |g_2|) grad(L_2) in what is shared, plain in heads."""
    names = strangers_network()
    rows = []
    for L in names["losses"]:
        grads = torch.autograd.grad(L, names["shared"], retain_graph=True)
        rows.append(torch.cat([grad.flatten() for grad in grads]))
    at_W = [torch.autograd.grad(L, names["W"], retain_graph=True)[0] for L in names["losses"]]
    a = min(1, 0.25 * (at_W[0].norm() / at_W[1].norm()).item())
    exec(readme_code("cap"), names)
    left = torch.cat([p.grad.flatten() for p in names["shared"]])
    close(left, rows[0] + a * rows[1])  # float32
    assert all(p.grad.abs().sum() > 0 for p in names["heads"])

THIRD = {  # the change of README's second exercise: a text that stands once, what goes before it
    "))\n\n    @property\n    def weights": ', "num"',
    "\n        return (1.0,) * len": " + (1.0,)",
    "        if dual:\n": """\
        if "num" in config.tasks:
            heads["num"] = ClassificationHead(trunk.c_out, 3, config.dropout)
""",
    "    return losses\n": """\
    if "num" in config.tasks:
        losses["num"] = lambda logits, batch: F.cross_entropy(logits.float(), torch.bincount(
            batch.targets[:, 0].long(), minlength=len(logits)).clamp(1, 3) - 1)
""",
    "    found = []\n    guess = []\n": "    counted = []\n",
    "    network.train(was_training)\n": """\
        if "num" in outputs:
            counted += (outputs["num"].argmax(1) + 1).tolist()
""",
    "    return metrics | {": """\
    if counted:
        metrics["num_accuracy"] = float(np.equal(counted, [len(b) for b in data.boxes]).mean())
"""}

@cases("mode", ["gradnorm", "pcgrad", "imtl", "mgda", "cap"])
def test_a_third_task_needs_the_changes_that_readme_names_and_no_other(tmp_path, mode):
    """The number of jets: balancer, surgeries, log and tables take it by themselves."""
    changed = Path(jg.__file__).read_text(encoding="utf-8")
    for place, text in THIRD.items():
        assert changed.count(place) == 1, place
        changed = changed.replace(place, text + place)
    write(tmp_path / "jointgrad.py", changed)
    shutil.copy(SHIPPED, tmp_path)
    words = "--mode", mode, "--out", "out", *options(epochs=1)
    done = python("jointgrad.py", *words, cwd=tmp_path)
    assert "| num_accuracy " in done.stdout, done.stderr
    row = log_of(tmp_path / "out")[-1]
    assert min(row["L/num"], row["w/num"], row["G/num"]) > 0

# ----------------------------------------------------------------------------------------------
# 6. Pictures and predictions
# ----------------------------------------------------------------------------------------------

ODD = ["$\\frac$", "{}", "a\nb", "白血球", "\udcff", "", "x" * 200]  # names that people give
GREY = np.full((20, 30, 3), 114, np.uint8)

def drawn_run(tasks, classes=ODD, **columns):
    """The figure of a log of three steps, with these columns."""
    rows = [{"step": 0}, {"step": 1}, {"step": 2}]
    for key, line in columns.items():
        for row, value in zip(rows, line):
            row[key.replace("_", "/")] = value
    rows[2]["val"] = {"mAP50-95": 0.5, "balanced_accuracy": None,
                      "confusion": np.eye(len(classes), dtype=int)}
    return figures.draw_run(rows, tasks, classes[0], classes)

def drawn_plane(deltas):
    """The plane of rows (label, less detect, less classify), intervals 0.02 wide; its axes."""
    paired = []
    for label, *pair in deltas:
        for (metric, single), delta in zip(figures.SCORES.items(), map(float, pair)):
            row = {"mode": label, "versus": single, "metric": metric}
            paired.append(row | {"delta": delta, "ci95": [delta - 0.01, delta + 0.01]})
    (ax,) = figures.draw_plane({"paired": paired}).axes
    return ax

@cases("draw", [
    lambda: figures.draw_found(GREY, [(0, (1, 1, 9, 9), ODD[0])], ODD[3]),
    lambda: figures.draw_data([GREY], [[[6, 1, 1, 9, 9]]], [3], ODD[:1], ODD, ODD),
    lambda: drawn_run(("cls",), L_cls=[1, 2, 3]),
    lambda: drawn_plane((name, -0.1, 0.1) for name in ODD).figure])
def test_a_picture_takes_any_name_and_is_the_same_twice(tmp_path, draw):
    """Names with dollars, braces, line breaks, bytes, of no glyph, of no or of 200 letters."""
    figures.save(draw(), tmp_path / "a.png")
    figures.save(draw(), tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()

def test_a_class_name_that_the_font_lacks_is_its_index():
    shown = figures.class_names(ODD)
    assert shown == ["$\\frac$", "{}", "2", "3", "4", "5", "x" * 25]

def test_curves_are_means_over_what_is_there():
    """Of the 11 values about a place; at the ends 6, without padding."""
    line = figures.smooth(np.arange(20.0))
    assert [line[0], line[9], line[19]] == near([2.5, 9, 16.5])

def test_what_does_not_move_has_no_panel():
    fig = drawn_run(("det",), L_det=[1, 2, 3], w_det=[1, 1, 1])
    titles = [ax.get_title() for ax in fig.axes]
    assert titles == ["Training losses L, unweighted", "Validation"]

def test_shares_are_of_the_gradients_that_the_trunk_follows():
    """a G is 3 and 0.5 x 4, then 1 and 0.25 x 4."""
    row = {"G/det": 3, "G/cls": 4, "a/det": 1, "a/cls": 0.5}
    rows = [row, row | {"G/det": 1, "a/cls": 0.25}]
    curves = figures.logged(rows, ("det", "cls"))
    assert curves["G"]["det"] == near([0.6, 0.5])

@cases("count, numbers", [(24, 24**2), (25, 0), (1000, 0)])
def test_a_confusion_matrix_of_many_classes_has_no_numbers_and_few_names(count, numbers):
    *_, ax = drawn_run(("cls",), list("n" * count)).axes
    assert len(ax.texts) == numbers
    assert len(ax.get_xticks()) <= 24

PLANE = table("""
fixed:initial_weights=1,0.5  -0.09   0.003
equal                        -0.134  0.002
fixed:initial_weights=1,0.2  -0.031  -0.007
fixed:initial_weights=1,0.1  -0.03   -0.15
gradnorm                     -0.069  0.002
gradnorm:alpha=3             -0.07   0
pcgrad                       -0.136  0.003
dual                         -0.001  -0.005
fixed                        0.007   -0.55
uncertainty                  -0.37   0.01""")

def test_the_plane_is_zoomed_and_names_at_its_edge_what_lies_beyond():
    ax = drawn_plane(PLANE)
    assert ax.get_xlim()[0] > -0.2
    assert ax.get_ylim()[0] > -0.1
    texts = {text.get_text() for text in ax.texts}
    below = "(1, 0.1): classification -0.15\nfixed: classification -0.55"
    assert {below, "uncertainty: detection -0.37"} < texts

def test_names_on_the_plane_do_not_overlap():
    ax = drawn_plane(PLANE)
    ax.figure.draw_without_rendering()
    boxes = list(map(Text.get_window_extent, ax.texts))
    assert len(boxes) == len(PLANE)  # two share a text at the edge; one more: each task alone
    assert all(box.count_overlaps(boxes) == 1 for box in boxes)  # with itself

def test_the_curve_of_fixed_weights_goes_by_their_order():
    curve, *_ = drawn_plane(PLANE).get_legend_handles_labels()[0]
    assert list(curve.get_xdata()) == [-0.03, -0.031, -0.09, -0.134]  # 0.1 to 0.5, equal: 1

def test_a_plane_without_single_tasks_says_so():
    assert "no mode was compared with detect" in drawn_plane([]).get_title()

def predictions(out, *words):
    """What predictions.json holds after the program ran with these words."""
    assert predict.main([*map(str, words), f"--out={out}", "--predict_conf=0"]) == 0
    return json.loads((out / "predictions.json").read_text())

@on_linux
def test_images_of_every_odd_name_are_drawn_and_a_bad_one_is_told(runs, tmp_path, capsys):
    """Spaces, accents, dashes, line breaks, 200 letters, bad bytes; in a linked folder too."""
    names = {
        "-x.PNG": "-x.png",
        "a b.png": "a_b.png",
        "link/a b.png": "2-a_b.png",
        "n" * 200 + ".png": "n" * 50 + ".png",
        "schön 图.png": "schön_图.png",
        "x\ny.png": "x_y.png",
        os.fsdecode(b"\xff.png"): "_.png"}
    source = tmp_path / "in"
    source.mkdir()
    (source / "link").symlink_to(tmp_path)
    for name in names:
        Image.fromarray(GREY).save(source / name, "PNG")
    (source / "y.png").write_bytes(b"x")
    images = predictions(tmp_path / "out", runs["gradnorm"] / "best.pt", source)["images"]
    for image, name in zip(images, names, strict=True):
        assert image["image"] == str(source / name).encode(errors="replace").decode()
        assert image["picture"] == names[name] in os.listdir(tmp_path / "out")
        assert image["boxes"]
    assert "y.png: not a readable image" in capsys.readouterr().err

def test_the_val_split_is_scored_as_in_training(runs, tmp_path):
    found = predictions(tmp_path / "out", runs["gradnorm"] / "last.pt")
    assert found["metrics"] == results_of(runs["gradnorm"])["val"]
    assert len(found["images"]) == 8

def two_boxes():
    """A detector that finds two of class 2 about (20, 12) px on a canvas of 64 x 32 px."""
    raw = [torch.full((1, 27, h, 2 * h), -12.0) for h in (4, 2, 1)]
    cell = raw[0].view(3, 9, 4, 8)[:, :, 1, 2]  # (3 anchors, 9), a view
    cell[:2, :4] = 0  # the middle of the cell, the anchor's size
    cell[0, [4, 7]] = 9
    cell[1, [4, 7]] = 8
    return answers(raw, torch.tensor([[[16.0, 8], [16, 6], [1, 1]]] * 3))

@pytest.fixture
def knowing(runs):
    predictor = predict.Predictor(runs["gradnorm"] / "best.pt")
    predictor.network.parts[0].heads["det"] = two_boxes()
    return predictor

def test_a_planted_box_is_where_it_is_in_a_file_an_image_or_pixels(knowing, tmp_path):
    """160 x 60 px are 64 x 24 from y = 4 of the canvas: x 12 to 28 is 30 to 70, y 8 to 16 is 10
    to 30. The file holds 60 x 160 px, and EXIF's order to turn them."""
    pixels = np.random.default_rng(0).integers(0, 255, (60, 160, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(pixels)).save(tmp_path / "x.png", exif=exif)
    found = knowing(tmp_path / "x.png")
    (box,) = found["boxes"]
    assert box["box_xyxy"] == near([30, 10, 70, 30], abs=1e-3)  # float32 of 160 px
    assert box["name"] == knowing.names[2]
    with Image.open(tmp_path / "x.png") as opened:
        assert knowing(opened) == found
    assert knowing(pixels) == found

@cases("settings, count", [
    ({}, 1),
    ({"predict_iou": 0.8}, 2),
    ({"predict_conf": 0.9999}, 0)])
def test_boxes_pass_predict_conf_and_predict_iou(knowing, settings, count):
    """Their overlap is 0.75, the best score sigmoid(9)^2 = 0.99975."""
    knowing.config = replace(knowing.config, **settings)
    found = knowing(np.zeros((60, 160, 3), np.uint8))
    assert len(found["boxes"]) == count

def test_pixels_of_more_than_8_bits_are_scaled_by_the_checkpoints_range(knowing):
    knowing.levels = (0.0, 2550.0)
    board = np.indices((32, 64)).sum(0) % 2
    assert knowing(np.uint16(board * 1000)) == knowing(np.uint8(board * 100))

@cases("words, said", [
    ("", "which network"),
    ("no.pt", "no.pt: no run's .pt"),
    (".", "a folder; expected the best.pt of a run"),
    ("best.pt none.png", "none.png: no such file or folder"),
    ("best.pt a.png b.png", "b.png: one argument too many"),
    ("best.pt --out .", "not empty"),
    ("best.pt --epochs 3", "--epochs: the checkpoint has its own")])
def test_a_mistake_is_a_line_and_exit_code_2(runs, monkeypatch, capsys, words, said):
    monkeypatch.chdir(runs["gradnorm"])
    assert predict.main(words.split()) == 2
    assert said in capsys.readouterr().err.splitlines()[-1]

def test_mode_predict_starts_this_program(runs, tmp_path, capfd):
    Image.fromarray(GREY).save(tmp_path / "a.png")
    best = runs["gradnorm"] / "best.pt"
    words = ["--mode=predict", f"--checkpoint={best}", f"--source={tmp_path}/a.png"]
    assert jg.main([*words, f"--out={tmp_path}/out"]) == 0
    assert "1 picture(s) and predictions.json written" in capfd.readouterr().out

# ----------------------------------------------------------------------------------------------
# 7. The study: labels, statistics, verdicts, comparisons
# ----------------------------------------------------------------------------------------------

def test_two_sweeps_are_the_product_and_a_mode_that_does_not_read_them_stands_once():
    labels = study.make_labels(["equal", "gradnorm"], ["alpha=1,2", "gradnorm_lr=3"])
    assert labels == ["equal",
                      "gradnorm:alpha=1:gradnorm_lr=3",
                      "gradnorm:alpha=2:gradnorm_lr=3"]

def test_a_swept_value_with_a_comma_stands_in_brackets():
    labels = study.make_labels(["fixed"], ["initial_weights=[1,0.1],[1,2]"])
    assert labels == ["fixed:initial_weights=1,0.1", "fixed:initial_weights=1,2"]

def test_a_mode_with_settings_of_its_own_is_a_line_of_its_own_over_a_sweep():
    found = study.place_of("fixed:initial_weights=1,0.2:dominance=0", ["dominance"])
    assert (found["mode"], found["value"]) == ("fixed:initial_weights=1,0.2", "0")
    found = study.place_of("cap:cap=0.5", ["cap"])
    assert (found["mode"], found["value"]) == ("cap", "0.5")

def test_a_label_is_paired_at_the_same_value_of_what_all_modes_read():
    """lr is read by all modes, cap by one."""
    labels = ["detect", "detect:lr=0.1", "detect:lr=0.2"]
    assert study.partner(labels, "detect", "cap:cap=1:lr=0.2") == "detect:lr=0.2"

def test_an_interval_is_students():
    """(1, 2, 3): mean 2, s 1; t of two degrees of freedom is 4.303."""
    half = 4.303 / 3**0.5
    found = study.interval(np.array([1.0, 2, 3]))
    assert found["ci95"] == near([2 - half, 2 + half])

@cases("negative, p", [(0, 2), (2, 158)])
def test_p_is_the_share_of_sign_patterns_as_far_from_zero(negative, p):
    """Of 12 equal sizes 1 + 12 + 66 patterns have at most two of one sign, on either side."""
    d = np.ones(12)
    d[:negative] = -1
    assert study.sign_flip_p(d) == p / 4096

WEIGHT = "fixed:initial_weights=1,0.2"

def family(at_chance=()):
    """The contrasts of labels whose scores are level + noise: 12 seeds that agree."""
    noise = np.linspace(-0.01, 0.01, 12)
    levels = {"equal": 0.4, "gradnorm": 0.45, "detach": 0.3, WEIGHT: 0.46, "cap": 0.47,
              "dual": 0.49}
    table = {"detect": {"mAP50-95": 0.5 + noise},
             "classify": {"balanced_accuracy": 0.9 + noise}}
    for label, level in levels.items():
        metrics = ("mAP50-95", "balanced_accuracy", "delta_m")
        table[label] = dict.fromkeys(metrics, level + noise**3)
    return study.contrasts(table, at_chance)

def test_the_contrasts_of_delta_m_are_fixed():
    """But for dual's rival: the shared trunk of the best mean."""
    pairs = [(row["mode"], row["versus"]) for row in family() if row["metric"] == "delta_m"]
    assert pairs == [
        ("gradnorm", "equal"),
        ("cap", "equal"), ("cap", "gradnorm"), ("cap", WEIGHT),
        ("dual", "cap")]

@cases("mode, versus, verdict", [
    ("detach", "detect", "same detector"),
    ("detach", "classify", "at chance"),
    ("cap", WEIGHT, "at chance")])
def test_zero_or_chance_by_construction_has_no_p(mode, versus, verdict):
    rows = family(at_chance=["detach", WEIGHT])
    (row,) = [row for row in rows if (row["mode"], row["versus"]) == (mode, versus)]
    assert (row["p"], row["p_holm"], row["verdict"]) == (None, None, verdict)

def test_holm_multiplies_the_least_p_by_the_number_of_tests():
    """Six joint labels on two tasks and five of delta_m, but for detach's detector."""
    assert family()[0]["p_holm"] == (6 * 2 + 5 - 1) * 2 / 4096

VERDICTS = table("""
-0.1   0.01   0.01  mAP50-95  lower
0.1    0.01   0.01  mAP50-95  higher
-0.01  0.005  0.01  mAP50-95  lower, within 0.02
0      0.01   0.05  mAP50-95  level
0      0.03   0.05  mAP50-95  undecided
1      0.9    0.01  delta_m   higher, within 2""")

@cases("delta, half, p_holm, metric, verdict", VERDICTS)
def test_each_verdict(delta, half, p_holm, metric, verdict):
    ends = [float(delta) - float(half), float(delta) + float(half)]
    row = {"delta": float(delta), "ci95": ends, "p_holm": float(p_holm), "metric": metric}
    assert study.verdict(row) == verdict

STEP = {"L/det": 1, "L/cls": 2, "G/det": 3, "G/cls": 2, "a/cls": 0.5, "cosine": -0.25}

def made(mode, score):
    """A run of 20 steps: half of its scores after 10. Val holds two of three classes."""
    val = dict.fromkeys(jg.METRICS, score) | {"confusion": [[3, 0, 0], [0, 3, 0], [0, 0, 0]]}
    rows = [STEP | {"step": k} for k in range(20)]
    rows[9]["val"] = dict.fromkeys(jg.METRICS, score / 2)
    rows[19]["val"] = val
    single = mode in ("detect", "classify")
    shared = {"cosine_mean": -0.25, "gradient_share": {"det": 0.75}}
    return {"mode": mode, "val": val, "rows": rows, "steps": 20,
            "interference": None if single else shared,
            "weights": {"final": [1, 1]},
            "time": {"train_cpu_s": 0.02, "train_s": 1, "start_s": 1, "eval_s": 1},
            "parameters": {"total": 1}, "flops_per_image": 1,
            "dataset": {"fingerprint": "x"},
            "code": {"sha256": "1"},
            "environment": {"processor": "p"}}

def measured(rows=slice(None)):
    """Of `cap`: 10 % above detect, 20 % above classify."""
    run = made("cap", 0.6)
    run["rows"] = run["rows"][rows]
    singles = {"detect": made("detect", 0.6 / 1.1), "classify": made("classify", 0.5)}
    return study.measure(run, singles)

def test_delta_m_is_the_mean_gain_over_the_single_tasks():
    assert measured()["delta_m"] == near(15)

def test_steps_to_90_are_to_90_percent_of_the_single_task():
    assert measured()["steps_to_90 mAP50-95"] == 20

def test_one_evaluation_has_no_course():
    assert not set(study.STABILITY) & set(measured(rows=slice(10, 20)))

def test_the_share_of_a_trunk_is_of_what_it_follows():
    """a G is (3, 0.5 * 2) at every step: 3 / 4."""
    runs = {("cap", 0): made("cap", 0.5)}
    found = study.trajectories(runs, study.Plan(["cap"], [0], {}, []))
    allclose(found["cap"]["share_det"]["median"], [0.75] * 101)

@cases("score, found", [(0.53, ["cap"]), (0.55, [])])
def test_at_chance_is_below_a_tenth_of_the_way_to_the_single_task(score, found):
    """Two classes in val: chance is 0.5; classify has 0.9."""
    runs = {("cap", 0): made("cap", score), ("classify", 0): made("classify", 0.9)}
    plan = study.Plan(["cap", "classify"], [0], {}, [])
    assert study.unlearnt(runs, study.quantities(runs, plan), plan) == found

CLAIMS = table("""
gain m a b        at_least  10   reproduced here
gain m a b        at_least  20   undecided here
value m a         at_most   1.1  not reproduced here
difference m a b  at_most   0.3  reproduced here
value m b         at_most   0    undecided here""")  # the last does not vary

@cases("measure, side, limit, verdict", CLAIMS)
def test_a_claim_is_judged_by_the_whole_interval(measure, side, limit, verdict):
    """a is 1.2 times b to 1 %: its interval lies in, across or beside a range."""
    scores = {"a": {"m": np.array([1.19, 1.20, 1.21])}, "b": {"m": np.ones(3)}}
    claim = {"id": "x", "claim": "", "reported": "", "measure": measure.split(), side: limit}
    (row,) = study.judge([claim], scores)
    assert row["verdict"] == verdict

def test_every_claim_of_the_report_can_be_judged():
    runs = {(mode, 0): made(mode, 0.5) for mode in study.MODES}
    table = study.quantities(runs, study.Plan(study.MODES, [0], {}, []))
    claims = jg.read_yaml(jg.ROOT / "data" / "reported.yaml")["claims"]
    assert len(study.judge(claims, table)) == len(claims) == 10

@cases("seeds, most", [(7, 3), (8, 6), (9, 12), (10, 25)])
def test_the_report_says_how_many_contrasts_the_seeds_can_decide(seeds, most):
    results = {"seeds": [*range(seeds)], "paired": [],
               "at_chance": ["c"], "made_by": {},
               "modes": {x: {"delta_m": {"mean": gain}}
                         for x, gain in zip("abc", (None, -2.0, 3.0))}}
    assert f"at most {most} contrasts" in study.notes(results)
    assert "Largest delta_m: b, -2.000 %" in study.notes(results)

CELLS = "--modes", "detect", "cap", "--seeds", "0", "1"

def compare(*words, cells=CELLS, **given):
    return study.main(["compare", *cells, *map(str, words), *options(**given)])

@pytest.fixture
def finished(tmp_path, monkeypatch):
    """The default folder of a comparison, with the four runs in it, by hand."""
    monkeypatch.chdir(tmp_path)
    config = jg.clean(asdict(tiny()))
    out = tmp_path / "runs" / "compare-synthetic"
    for cell in study.make_cells(study.Plan(["detect", "cap"], [0, 1], config, []), out):
        cell.folder.mkdir(parents=True)
        run = made(cell.label, 0.5)
        lines = [json.dumps(row) for row in run.pop("rows")]
        (cell.folder / "metrics.jsonl").write_text("\n".join(lines))
        jg.write_json(cell.folder / "results.json", run)
        jg.write_json(cell.folder / "config.yaml", cell.config)
    return out

def test_what_is_finished_is_not_run_again(finished, capsys):
    assert compare() == 0
    assert "0 of 4 runs are left" in capsys.readouterr().err

def test_another_comparison_goes_into_the_next_folder(finished):
    compare()
    compare("--print", lr=0.5)
    assert (finished.parent / "compare-synthetic-2").is_dir()

def test_another_comparison_is_never_overwritten(finished, capsys):
    compare()
    assert compare("--out", finished, lr=0.5) == 2
    assert "holds another comparison" in capsys.readouterr().err

def test_two_processes_do_not_share_a_folder(finished, capsys):
    with jg.held(finished):
        assert compare() == 2
    assert "another process" in capsys.readouterr().err

def test_runs_of_other_data_are_refused(finished):
    path = finished / "runs" / "cap-s1" / "results.json"
    jg.write_json(path, made("cap", 0.5) | {"dataset": {"fingerprint": "y"}})
    assert compare() == 2

def test_runs_of_several_kinds_of_code_are_told(finished, capsys):
    path = finished / "runs" / "cap-s1" / "results.json"
    jg.write_json(path, made("cap", 0.5) | {"code": {"sha256": "2"}})
    compare()
    assert "made by 2 kinds of code" in capsys.readouterr().out

def test_what_is_begun_is_resumed(finished, capsys):
    (finished / "runs" / "cap-s1" / "results.json").unlink()
    compare("--print")
    assert capsys.readouterr().out.endswith("--resume runs/compare-synthetic/runs/cap-s1\n")

def test_a_run_that_fails_is_told_with_its_reason(tmp_path):
    code = "import sys; sys.exit('error: no room')"
    with pytest.raises(RuntimeError, match=f"{tmp_path}: no room"):
        study.finish(tmp_path, [sys.executable, "-c", code])

def test_without_a_terminal_each_run_is_a_line(finished, capsys):
    nothing = [sys.executable, "-c", ""]
    left = {folder: nothing for folder in (finished / "runs").glob("detect-*")}
    study.finish_all(left, jobs=1)
    first, _ = capsys.readouterr().err.splitlines()
    assert re.search(r": \d+ s, 0.500 / 0.500; 1 of 2, about \d min left$", first)

@cases("fault", [("--data", "no.yaml"), ("--seeds", 1, 1), ("--modes", "x")])
def test_a_fault_is_all_that_is_told_before_a_folder_is_made(tmp_path, capsys, fault):
    assert compare("--out", tmp_path / "out", *fault) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "out").exists()

@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """The folder of a comparison whose printed command another program has run."""
    out = tmp_path_factory.mktemp("study") / "out"
    cells = "--modes", "detect", "--seeds", "0"
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("sys.stdout.writelines", lines.extend)
        compare("--out", out, "--print", cells=cells)
    subprocess.run(lines, shell=True, check=True, capture_output=True, timeout=100)
    assert compare("--out", out, cells=cells) == 0
    return out

def test_a_printed_command_is_a_run_of_the_comparison(printed):
    assert [*results_of(printed)["modes"]] == ["detect"]

@cases("moved, code", [(0, 0), (0.5, 1)])
def test_check_repeats_a_comparison_and_ends_with_1_where_a_mean_left_its_interval(
        printed, tmp_path, moved, code):
    recorded = results_of(printed)
    recorded["modes"]["detect"]["mAP50"]["per_seed"][0] += moved
    jg.write_json(tmp_path / "results.json", recorded)
    shutil.copytree(printed / "runs", tmp_path / "again" / "runs")
    words = "check", tmp_path / "results.json", "--out", tmp_path / "again"
    assert study.main([*map(str, words)]) == code

# ----------------------------------------------------------------------------------------------
# 8. Programs on data and times: export, the blood smears, bench
# ----------------------------------------------------------------------------------------------

def program(monkeypatch, name, *words):
    """The exit code of data/<name>.py, run as a command."""
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    with pytest.raises(SystemExit, match=r"^\d+$") as ended:
        runpy.run_path(str(jg.ROOT / "data" / f"{name}.py"), run_name="__main__")
    return ended.value.code

@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder of the built-in set, written as files once."""
    folder = tmp_path_factory.mktemp("exported") / "set"
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert program(monkeypatch, "synthetic", folder, *options()) == 0
    return folder

@cases("cache_mb", [2048, 0])  # in memory, or from a mapped file
def test_an_exported_set_has_the_pixels_classes_and_names_of_the_built_in_one(
        exported, tmp_path, cache_mb):
    """PNG loses nothing."""
    config = tiny(data=f"{exported}/data.yaml", cache_mb=cache_mb)
    for back, made in zip(jg.load_data(config, tmp_path), jg.load_data(tiny())):
        assert isinstance(back.pixels, np.memmap) == (cache_mb == 0)
        assert np.array_equal(back.pixels, made.pixels)
        assert back.labels == made.labels
        assert back.names == made.names
        assert back.classification_names == made.classification_names
        assert back.notes == []

def test_an_exported_set_has_the_boxes_of_the_built_in_one(exported, tmp_path):
    """Label files have six decimals."""
    sets = jg.load_data(tiny(data=f"{exported}/data.yaml"), tmp_path)
    for back, made in zip(sets, jg.load_data(tiny())):
        for a, b in zip(back.boxes, made.boxes):
            assert np.allclose(a, np.unique(b, axis=0), atol=2e-6)  # the reader sorts

def blood_smear(folder, box):
    """One image of 640 x 480 px as the set's two sources have it, with the text of its box."""
    for name in ("b/BCCD/Annotations", "b/BCCD/JPEGImages", "w"):
        (folder / name).mkdir(parents=True)
    (folder / "b/BCCD/Annotations/BloodImage_00001.xml").write_text(f"<x>{box}</x>")
    Image.new("RGB", (640, 480)).save(folder / "b/BCCD/JPEGImages/BloodImage_00001.jpg")
    (folder / "w/labels.csv").write_text(',Image,Category\n,1,"NEUTROPHIL, NEUTROPHIL"\n')
    (folder / "split.txt").write_text("train BloodImage_00001\n")

def voc(name, *corners):
    sides = zip(("xmin", "ymin", "xmax", "ymax"), corners)
    inner = "".join(f"<{side}>{px}</{side}>" for side, px in sides)
    return f"<object><name>{name}</name><bndbox>{inner}</bndbox></object>"

def test_bccd_makes_a_joint_set(tmp_path, monkeypatch):
    """64 / 640 to 192 / 640 across, 120 / 480 to 480 / 480 down; a box of no size is left out."""
    monkeypatch.chdir(tmp_path)
    blood_smear(tmp_path, voc("WBC", 64, 120, 192, 480) + voc("RBC", 5, 5, 5, 5))
    assert program(monkeypatch, *"bccd b w --out set --split split.txt".split()) == 0
    assert Image.open("set/images/train/BloodImage_00001.jpg").size == (320, 240)
    text = Path("set/labels/train/BloodImage_00001.txt").read_text()
    assert text == "1 0.200000 0.625000 0.200000 0.750000\n\n0 0 0 1\n"

@pytest.fixture(scope="module")
def benched(tmp_path_factory):
    """The folder that `bench` leaves, of one round on a tiny network."""
    out = tmp_path_factory.mktemp("bench") / "out"
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert program(monkeypatch, "bench", "--rounds", 1, "--out", out, *options()) == 0
    return out

def test_bench_leaves_numbers_a_table_and_a_picture(benched):
    names = {path.name for path in benched.iterdir()}
    assert names == {"results.json", "bench.md", "figure.png"}
    assert results_of(benched)["mode"] == "bench"

def test_bench_times_every_remedy_and_its_ratio_to_a_plain_step(benched):
    results = results_of(benched)
    remedies = {"fixed", "gradnorm", "dual", "uncertainty", "pcgrad", "imtl", "mgda", "cap"}
    for column in ("step_ms", "images_per_s", "inference_images_per_s", "flops_per_image"):
        assert results[column].keys() == remedies | {"textbook"}
    for name, ratio in results["ratios"].items():
        assert name.endswith("/fixed") and 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
    assert results["ratios"]["fixed/fixed"]["median"] == 1

def test_benchs_own_backward_passes_leave_the_gradient_of_the_weighted_sum(benched):
    """So that what is timed is a joint step: float32, in trunk and heads."""
    checks = results_of(benched)["checks"]
    assert checks.keys() == {"fixed", "textbook"}
    for found in checks.values():
        assert max(found["error"]) < 1e-4

@cases("T", [2, 3])
@cases("aggregator, apart", [
    ("PCGrad", 1e-9),  # float64
    ("IMTLG", 1e-4),  # ours adds a ridge
    ("MGDA", 1e-2)])  # both iterate, of three tasks
def test_surgery_sums_to_torchjds_gradient_of_the_same_name(aggregator, T, apart):
    pytest.importorskip("torchjd")
    assert bench.aggregation_difference(aggregator, T) < apart
