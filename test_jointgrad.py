"""Tests of jointgrad, section by section; the banners are the module's own.

Expected values come from closed form, hand work, an independent slow version or a library.
"""
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shutil
import signal
import socket
import string
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import jointgrad as jg

torch.set_num_threads(1)

SMALL = ["width_multiple=0.125", "depth_multiple=0.33", "dual_width_multiple=0.125", "dropout=0",
         "imgsz=64", "train_images=6", "val_images=5"]
ANCHORS = torch.tensor([[[4., 9], [11, 6], [8, 14]], [[16, 11], [13, 25], [27, 18]],
                        [[22, 40], [45, 26], [50, 58]]])  # px, no two alike, none square


def make(*overrides):
    return jg.load_config(jg.ROOT / "config.yaml", [*SMALL, *overrides])


def random_targets(rng, n, images, classes=3):
    """Targets (n, 6), wide and tall boxes, some at the image's border."""
    owner, kind = rng.integers(0, images, n), rng.integers(0, classes, n)
    centre, size = rng.uniform(0, 1, (n, 2)), rng.uniform(0.03, 0.7, (n, 2))
    return torch.tensor(np.column_stack([owner, kind, centre, size]), dtype=torch.float32)


def random_raw(seed, images=3, classes=3, shapes=((8, 12), (4, 6), (2, 3))):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(images, 3 * (5 + classes), h, w, generator=g) for h, w in shapes]


SHIPPED = jg.ROOT / "config.yaml"
BCCD = Path(jg.__file__).parent.parent / "shared" / "data" / "bccd" / "data.yaml"
TINY = ("epochs=3", "train_images=32", "val_images=16", "batch_size=8", "width_multiple=0.03125",
        "dual_width_multiple=0.03125", "device=cpu")
LINUX = sys.platform.startswith("linux")


def shipped() -> dict:
    """The shipped settings as a mapping."""
    return yaml.safe_load(SHIPPED.read_text(encoding="utf-8"))


def tiny(*overrides, **fields) -> jg.Config:
    """The shipped config at the smallest size, on the CPU."""
    return jg.load_config(SHIPPED, [*TINY, *overrides], **fields)


def write_config(folder: Path, content: str | bytes) -> Path:
    path = folder / "c.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# --------------------------------------------------------------------------------------------------
# 1. Config: config.yaml and --set -> one frozen, checked Config
# --------------------------------------------------------------------------------------------------


def test_exponent_without_a_dot_is_a_number(tmp_path):
    """YAML 1.1 reads 1e-3 as text; a learning rate of that form must still be 0.001."""
    assert yaml.safe_load("1e-3") == "1e-3"
    assert jg.load_config(write_config(tmp_path, "lr: 1e-3")).lr == 0.001


@pytest.mark.parametrize("text, key", [
    ("mode: no", "mode"), ("data: no", "data"), ("seed: 2.5", "seed"), ("epochs: no", "epochs"),
    ("epochs: .inf", "epochs"), ("lr: .nan", "lr"), ("lr: yes", "lr"), ("lr: [1]", "lr"),
    ("lr: {a: 1}", "lr"), ("lr:", "lr"), ("epochs: 0", "epochs"), ("flip_x: 1.01", "flip_x"),
    ("imgsz: 65", "imgsz"), ("imgsz: 0", "imgsz"), ("class_balance: 1", "class_balance"),
    ("betas: [0.9]", "betas"), ("betas: [0.9, 1.0]", "betas"), ("betas: 0.9", "betas"),
    ("betas: [0.9, yes]", "betas"), ("anchors: [[1, 2]]", "anchors"), ("anchors: other", "anchors"),
    ("mode: Gradnorm", "mode"), ("seed: -1", "seed"), ("data: 3", "data"), ("amp: fp16", "amp"),
    ("max_det: 513", "max_det"),
    ("anchors: [[[1, 2], [1, 2], [1, 2]], [[1, 2], [1, 2], [1, 2]], [[1, 2], [1, 2], [1, 0]]]",
     "anchors"),
    ("anchors: [[[1, 2], [1, 2], [1, 2]], [[1, 2], [1, 2], [1, 2]], [[1, 2], [1, 2], [1, .inf]]]",
     "anchors"),
])
def test_wrong_value_is_an_error_that_names_its_key(tmp_path, text, key):
    """A value of another type or out of range must not slip through YAML's guesses."""
    with pytest.raises(jg.UserError, match=f"config key {key}: found .*expected"):
        jg.load_config(write_config(tmp_path, text))


@pytest.mark.parametrize("text", ["0x" + "f" * 5000, "-0x" + "f" * 5000])
def test_huge_whole_number_is_a_user_error(tmp_path, text):
    """Python cannot print a whole number of 5000 hex digits; the message must not try."""
    for key in ("seed", "lr", "anchors", "class_balance", "mode"):
        with pytest.raises(jg.UserError, match=key):
            jg.load_config(write_config(tmp_path, f"{key}: {text}"))


def test_unknown_key_names_the_nearest():
    with pytest.raises(jg.UserError, match="unknown key 'epoch'; did you mean 'epochs'"):
        jg.make_config(shipped() | {"epoch": 3})


def test_missing_key_is_named():
    values = shipped()
    del values["warmup"]
    with pytest.raises(jg.UserError, match="missing key 'warmup'"):
        jg.make_config(values)


@pytest.mark.parametrize("values", [None, [], "mode", 3])
def test_config_that_is_no_mapping_is_an_error(values):
    with pytest.raises(jg.UserError, match="expected lines of 'key: value'"):
        jg.make_config(values)


def test_set_takes_numbers_lists_and_words():
    """The forms that people type: numbers, YAML lists, comma pairs, words, nested anchors."""
    boxes = [[[1, 2], [3, 4], [5, 6]]] * 3
    config = jg.load_config(SHIPPED, ["epochs=7", "lr=1e-3", "betas=0.8,0.9", "mode = fixed",
                                      "initial_weights=[1, 2]", "class_balance=true",
                                      f"anchors={boxes}"])
    assert (config.epochs, config.lr, config.mode) == (7, 0.001, "fixed")
    assert config.betas == (0.8, 0.9) and config.initial_weights == (1.0, 2.0)
    assert config.class_balance is True and np.array_equal(config.anchors, boxes)
    assert type(config.epochs) is int and type(config.lr) is float


@pytest.mark.parametrize("text, match", [
    ("epochs", "expected key=value"), ("epochs=[", "not plain YAML"), ("=3", "unknown key"),
    ("epochs=", "config key epochs"), ("epoch=3", "did you mean 'epochs'"),
    ("epochs=2020-99-99", "epochs"), ("epochs=!!bool x", "epochs"), ("epochs=!!int ''", "epochs"),
    ("epochs=!!python/object/apply:os.getcwd []", "not plain YAML"),
    pytest.param("epochs=" + "[" * 1200, "epochs", id="deep"),
    pytest.param("epochs=" + "9" * 5000, "epochs", id="long"),
])
def test_bad_set_is_a_user_error(text, match):
    """Whatever stands behind --set, the answer is one line and never a traceback."""
    with pytest.raises(jg.UserError, match=match):
        jg.load_config(SHIPPED, [text])


def test_fields_of_the_command_line_win_over_set_and_none_is_no_value():
    config = jg.load_config(SHIPPED, ["seed=3", "mode=fixed"], seed=4, mode=None)
    assert (config.seed, config.mode) == (4, "fixed")


BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi"))


@pytest.mark.parametrize("content, match", [
    (BOMB, "aliases"), ("# " + "x" * 2**20, "larger than 1 MB"),
    ("lr: 1\n".encode("utf-16"), "not UTF-8"), (b"lr: \xff\n", "not UTF-8"),
    ("lr: [1", "not plain YAML"), ("a: b: c", ":1: not plain YAML"), ("lr: \0", "zero bytes"),
    ("lr: \x01", "^[^\n]*not plain YAML[^\n]*$"),
    ("", "key: value"), ("- 1", "key: value"), ("? [a]\n: 1", "YAML|unknown"),
    pytest.param("lr: " + "[" * 1200, "1000 brackets", id="deep"),
    ("seed: 2020-99-99", "not plain YAML"), ("seed: !!bool x", "not plain YAML"),
    ("seed: !!int ''", "not plain YAML"), ("seed: !!timestamp x", "not plain YAML"),
], ids=str)
def test_hostile_yaml_is_a_user_error(tmp_path, content, match):
    with pytest.raises(jg.UserError, match=match):
        jg.load_config(write_config(tmp_path, content))


def test_python_tags_run_nothing(tmp_path):
    """A config may come from elsewhere: it must not be able to run code."""
    marker = tmp_path / "ran"
    text = f"mode: !!python/object/apply:os.system ['touch {marker}']"
    with pytest.raises(jg.UserError, match="c.yaml:1: not plain YAML"):
        jg.load_config(write_config(tmp_path, text))
    assert not marker.exists()


def test_absent_config_and_folder_are_user_errors(tmp_path):
    for path in (tmp_path / "no.yaml", tmp_path):
        with pytest.raises(jg.UserError, match="cannot be read"):
            jg.load_config(path)


def test_every_setting_stands_in_config_yaml_with_a_comment():
    """config.yaml alone gives values and their meaning: no field without a line and a comment."""
    lines = [x for x in SHIPPED.read_text(encoding="utf-8").splitlines() if re.match(r"\w+:", x)]
    assert all(re.search(r"\S +# \S", line) for line in lines)
    assert [line.split(":")[0] for line in lines] == list(jg.Config.__dataclass_fields__)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from([10**400, -10**4000, "1e-3", "nan", "auto", "gradnorm", "0.9,0.99", "²"]),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=3), x, max_size=2),
    max_leaves=6)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(list(jg.Config.__dataclass_fields__)) | st.text(max_size=6),
                       VALUES, max_size=2))
def test_any_mapping_gives_a_config_or_a_user_error(values):
    """No value, however odd, may end in another exception."""
    try:
        config = jg.make_config(shipped() | values)
    except jg.UserError:
        return
    assert isinstance(config, jg.Config)


# --------------------------------------------------------------------------------------------------
# 2. Synthetic data: (seed, split, i) -> one echocardiogram-like frame, its jets and its view
# --------------------------------------------------------------------------------------------------


def test_sample_depends_on_seed_split_and_index_alone():
    """Else a larger set would be another set, and runs of different sizes could not be compared."""
    few, many = (jg.load_data(tiny(f"train_images={n}"))[0] for n in (4, 9))
    assert np.array_equal(few.pixels, many.pixels[:4]) and few.labels == many.labels[:4]
    assert all(np.array_equal(a, b) for a, b in zip(few.boxes, many.boxes))
    frames = [jg.synthetic_sample(s, split, i, 64, 1.0)[0]
              for s, split, i in ((0, "train", 0), (1, "train", 0), (0, "val", 0), (0, "train", 1))]
    assert np.array_equal(frames[0], few.pixels[0])
    assert all(not np.array_equal(a, b) for k, a in enumerate(frames) for b in frames[:k])


def test_jets_are_one_to_three_inside_the_image_and_apart():
    counts = set()
    for i in range(120):
        _, boxes, view = jg.synthetic_sample(5, "train", i, 64, 0.5)
        low, high = boxes[:, 1:3] - boxes[:, 3:] / 2, boxes[:, 1:3] + boxes[:, 3:] / 2
        counts.add(len(boxes))
        assert view in range(3) and set(boxes[:, 0]) <= {0, 1, 2, 3}
        assert low.min() >= 0 and high.max() <= 1
        for a in range(len(boxes)):
            for b in range(a):
                overlap = np.minimum(high[a], high[b]) - np.maximum(low[a], low[b])
                assert overlap.min() <= 1e-6  # float32
    assert counts == {1, 2, 3}


def test_jet_touches_the_sides_of_its_box():
    """A looser or displaced box would cap mAP50-95; 2 px is the plume's fade."""
    seen = 0
    for i in range(60):
        pixels, boxes, _ = jg.synthetic_sample(2, "val", i, 64, 0.0)
        if len(boxes) > 1:
            continue
        seen += 1
        chroma = np.ptp(pixels.astype(int), axis=2)
        y, x = np.nonzero(chroma > 25)
        cx, cy, w, h = boxes[0, 1:] * 64
        extent = x.min(), y.min(), x.max() + 1, y.max() + 1
        wanted = cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2
        assert np.abs(np.subtract(extent, wanted)).max() <= 2
    assert seen > 5


@pytest.mark.parametrize("c", [0.0, 0.3, 1.0])
def test_best_possible_accuracy_is_0_970_at_every_dominance(c):
    """Along (sqrt(1-c), sqrt(c)) the cue is N(v-1, 1/4): an end view errs with Phi(-2), the middle
    one with twice that, so the mean is 1 - 4/3 Phi(-2). 0.001 is 3 deviations of 300,000 draws."""
    rng = np.random.default_rng(0)
    view = rng.integers(3, size=300_000)
    g, t = np.sqrt([[1 - c], [c]]) * (view - 1) + 0.25 * rng.standard_normal((2, len(view)))
    guess = np.digitize(math.sqrt(1 - c) * g + math.sqrt(c) * t, [-0.5, 0.5])
    closed = 1 - 4 / 3 * 0.5 * math.erfc(2 / math.sqrt(2))
    assert closed == pytest.approx(0.970, abs=5e-4)
    assert np.mean(guess == view) == pytest.approx(closed, abs=1e-3)


def test_dominance_moves_the_cue_from_the_angle_to_the_grain():
    """At 0 the sector's area rises with the view; at 1 the speckle's correlation does instead."""
    rises = {}
    for c in (0.0, 1.0):
        area, grain = [[], [], []], [[], [], []]
        for i in range(120):
            pixels, _, view = jg.synthetic_sample(0, "train", i, 64, c)
            image = pixels.min(2).astype(float)
            area[view].append((image > 0).mean())
            a, b = image[:-1], image[1:]
            inside = (a > 0) & (b > 0)
            grain[view].append(np.corrcoef(a[inside], b[inside])[0, 1])
        for name, groups in (("area", area), ("grain", grain)):
            spread = np.mean([np.std(g) for g in groups])
            rises[c, name] = (np.mean(groups[2]) - np.mean(groups[0])) / spread
    assert rises[0.0, "area"] > 1.5 and rises[1.0, "grain"] > 1.5
    assert abs(rises[1.0, "area"]) < 0.7 and abs(rises[0.0, "grain"]) < 0.7


# --------------------------------------------------------------------------------------------------
# 3. Joint data: a YOLO folder with an image class -> checked arrays -> batches
# --------------------------------------------------------------------------------------------------

BOX = "0 0.5 0.5 0.25 0.5"


def labels_of(text: str, num_classes: int = 3, num_labels: int = 3):
    return jg.parse_labels(text, "f.txt", num_classes, num_labels)


def picture(size=(40, 40), colour=(120, 120, 120), mode="RGB") -> Image.Image:
    return Image.new(mode, size, colour)


def make_set(folder: Path, items: dict, held: dict | None = None, **spec) -> Path:
    """A joint set of {file name: (image, label text)}; None for a file that is not written."""
    held = held or {"v.png": (picture(), BOX + "\n0 1 0\n")}
    for split, files in (("train", items), ("val", held)):
        for name, (image, text) in files.items():
            file = folder / "images" / split / name
            label = (folder / "labels" / split / name).with_suffix(".txt")
            for path, content in ((file, image), (label, text)):
                path.parent.mkdir(parents=True, exist_ok=True)
                if isinstance(content, Image.Image):
                    content.save(path)
                elif content is not None:
                    path.write_bytes(content.encode() if isinstance(content, str) else content)
    base = {"path": ".", "train": "images/train", "val": "images/val", "nc": 3,
            "names": ["a", "b", "c"], "classification_names": ["x", "y", "z"]} | spec
    path = folder / "data.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in base.items() if v is not ...}))
    return path


def two(image=None, text=BOX + "\n0 1 0\n", name="b.png") -> dict:
    """A training split of one sound image and one under test."""
    return {"a.png": (picture(), BOX + "\n1 0 0\n"), name: (image or picture(), text)}


def load(path: Path, *overrides):
    return jg.load_joint(path, tiny("imgsz=64", *overrides))


def fault(path: Path, match: str, *overrides) -> str:
    with pytest.raises(jg.UserError, match=match) as caught:
        load(path, *overrides)
    return str(caught.value)


@pytest.mark.parametrize("fields, num_classes, num_labels, wanted", [
    ([0, 0.5, 0.5, 0.25, 0.5], 3, 3, [0, 0.5, 0.5, 0.25, 0.5]),
    ([2, 0.25, 0.25, 0.75, 0.25, 0.5, 1.0], 3, 3, [2, 0.5, 0.625, 0.5, 0.75]),
    ([0, 1, 0], 3, 3, 1), ([2], 3, 3, 2), ([0], 3, 3, 0), ([0, 0, 1, 0, 0], 3, 5, 2),
    ([1, 0, 0, 0, 0], 3, 5, 0), ([0, 0.5, 0.5, 0.25, 0.5], 3, 5, [0, 0.5, 0.5, 0.25, 0.5]),
    ([0, 0, 0, 0, 0, 0, 1], 3, 7, 6),
    ([0, 0, 0, 1, 0, 1, 1], 3, 7, [0, 0.5, 0.5, 1, 1]),
    ([0, 0.5, 0.5, 0.0, 0.5], 3, 3, None), ([0, 0.2, 0.2, 0.4, 0.4, 0.2, 0.2], 3, 3,
                                            [0, pytest.approx(0.3), pytest.approx(0.3),
                                             pytest.approx(0.2), pytest.approx(0.2)]),
    ([0, 0.2, 0.2, 0.2, 0.4, 0.2, 0.3], 3, 3, None),
])
def test_row_is_box_polygon_or_class(fields, num_classes, num_labels, wanted):
    """By hand; with 5 or 7 classes a one-hot row is as long as a box or a triangle."""
    assert jg.parse_row(fields, num_classes, num_labels) == wanted


@pytest.mark.parametrize("row, match", [
    ("3 .5 .5 .1 .1", "box class .*from 0 to 2"),
    ("-1 .5 .5 .1 .1", "box class"), ("0.5 .5 .5 .1 .1", "box class"),
    ("0 320 240 50 60", "from 0 to 1"), ("0 .5 .5 -.1 .1", "from 0 to 1"),
    ("0 .5 .5 .1", "expected a box"), ("0 .5 .5 .1 .1 .2", "expected a box"),
    ("0 .1 .1 .2 .2 .3 .3 .4", "expected a box"), ("cat .5 .5 .1 .1", "expected numbers"),
    ("0,0.5,0.5,0.1,0.1", "expected numbers"), ("0 nan .5 .1 .1", "expected"),
    ("0 inf .5 .1 .1", "expected"), ("0.8 0.1 0.1", "one-hot"),
    ("1 1 0", "one-hot"), ("0 0 0", "one-hot"), ("3", "an index"),
    ("-1", "an index"), ("1.5", "an index"), ("0 1", "expected a box"),
    ("0 0 1 0", "expected a box"), ("0 0 0 0 1", "one-hot of 3"), ("0 0 0 1 1", "one-hot of 3"),
])
def test_bad_row_is_an_error_with_file_and_line(row, match):
    """The row's number counts blank lines, so that an editor finds it."""
    boxes, label, errors, _ = labels_of(f"{BOX}\n\n{row}\n")
    assert len(errors) == 1 and errors[0].startswith("f.txt:3: ") and "\n" not in errors[0]
    assert re.search(match, errors[0]) and len(boxes) == 1


def test_second_image_class_is_an_error_and_the_first_row_may_be_the_class():
    assert labels_of(f"0 0 1\n\n{BOX}\n")[1:3] == (2, [])
    errors = labels_of(f"0 0 1\n{BOX}\n0 0 1\n1 0 0\n")[2]
    assert len(errors) == 2 and re.search("f.txt:3: .*second image class", errors[0])


def test_class_row_without_image_classes_is_an_error():
    assert re.search("expected a box", labels_of("1\n", 3, 0)[2][0])


def test_zero_size_and_outside_boxes_are_mended_with_a_warning():
    """x 0.9 +- 0.2 is cut to 0.7 ... 1, that is centre 0.85, width 0.3."""
    boxes, _, errors, warnings = labels_of("0 .5 .5 0 .2\n1 .9 .5 .4 .2\n0 1 0")
    assert errors == [] and np.allclose(boxes, [[1, 0.85, 0.5, 0.3, 0.2]], atol=1e-6)
    assert re.search("f.txt:1: a box of no size", warnings[0])
    assert re.search("f.txt: .*outside", warnings[1]) and len(warnings) == 2


def test_a_fraction_rounded_beyond_1_is_no_error():
    """Other tools write 1.000001; 1.01 is a mistake."""
    boxes, _, errors, _ = labels_of("0 .5 .5 1.000001 .2\n0 1 0")
    assert errors == [] and np.allclose(boxes, [[0, 0.5, 0.5, 1, 0.2]], atol=2e-6)
    assert labels_of("0 .5 .5 1.01 .2\n0 1 0")[2]


@pytest.mark.parametrize("size", ["1e-50", "1e-30", "1e-9"])
def test_box_that_vanishes_in_float32_is_not_kept(size):
    """A kept box of width 0 gives infinite anchor ratios and a division by zero in the IoU."""
    boxes = labels_of(f"0 .5 .5 {size} .2\n0 1 0")[0]
    assert (boxes[:, 3:] > 0).all()


TOKENS = st.sampled_from(["0", "1", "2", "0.5", "1.0", "0.25", "-1", "nan", "inf", "1e400", "1e-50",
                          "x", "1_0", "٣", "0,5", "-0.0", "1e-9", "0x1", "\x1c", "\u2028", "\0"])
ROWS = st.lists(st.lists(TOKENS, max_size=8).map(" ".join), max_size=6)
LABELS = ROWS.map("\n".join) | st.text(max_size=60) | st.text(string.digits + " .\n\r-e",
                                                              max_size=60)


@settings(max_examples=250, deadline=None)
@given(LABELS, st.integers(1, 8), st.sampled_from([0, 1, 2, 3, 5, 7]))
def test_any_text_gives_boxes_in_the_image_or_errors_with_a_line_number(text, classes, labels):
    boxes, label, errors, warnings = labels_of(text, classes, labels)
    assert boxes.shape[1] == 5 and boxes.dtype == np.float32 and np.isfinite(boxes).all()
    assert set(boxes[:, 0]) <= set(range(classes)) and ((boxes >= 0) & (boxes[:, 3:4] <= 1)).all()
    assert boxes[:, 1:].max(initial=0) <= 1 and label in (jg.NO_LABEL, *range(labels))
    assert all(re.match(r"f\.txt:[1-9]\d*: [^\n]*\Z", error) for error in errors)
    assert all(warning.startswith("f.txt:") for warning in warnings)


@pytest.mark.parametrize("raw", [
    f"{BOX}\r0 1 0\r".encode(), f"{BOX}\r\n\r\n0 1 0\r\n".encode(),
    b"\xef\xbb\xbf" + f"{BOX}\n0 1 0".encode(), f"  {BOX}\t\n\t0  1 0 \n\n".encode(),
], ids=["CR", "CRLF", "BOM", "blanks"])
def test_line_ends_and_marks_of_other_systems_are_read(tmp_path, raw):
    path = tmp_path / "f.txt"
    path.write_bytes(raw)
    boxes, label, errors, warnings = jg.read_label_file(path, 3, 3)
    assert np.allclose(boxes,
                       [[0, 0.5, 0.5, 0.25, 0.5]]) and (label, errors, warnings) == (1, [], [])


@pytest.mark.parametrize("raw", [f"{BOX}\n".encode("utf-16"), b"\x00\x01\x02", b"\xff\xd8\xff\xe0",
                                 f"{BOX}\n".encode("utf-16-le")])
def test_label_file_that_is_not_utf8_is_one_error(tmp_path, raw):
    path = tmp_path / "f.txt"
    path.write_bytes(raw)
    _, _, errors, _ = jg.read_label_file(path, 3, 3)
    assert len(errors) == 1 and re.search(r"f\.txt: .*UTF-8 text", errors[0])


def test_empty_missing_and_unreadable_label_files(tmp_path):
    """An image without objects is legal; a folder in the file's place is not."""
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "folder.txt").mkdir()
    for name, match in (("empty.txt", "no image class"), ("no.txt", "no such label file")):
        boxes, label, errors, warnings = jg.read_label_file(tmp_path / name, 3, 3)
        assert boxes.shape == (0, 5) and label == jg.NO_LABEL and errors == []
        assert len(warnings) == 1 and re.search(match, warnings[0])
    errors = jg.read_label_file(tmp_path / "folder.txt", 3, 3)[2]
    assert len(errors) == 1 and re.search("cannot be read", errors[0])


def test_missing_class_and_missing_file_leave_the_image_in_the_set(tmp_path):
    train, _ = load(make_set(tmp_path, {**two(text=BOX), "c.png": (picture(), None)}))
    assert train.labels == [0, jg.NO_LABEL, jg.NO_LABEL] and [len(b)
                                                              for b in train.boxes] == [1, 1, 0]
    assert [re.search(r"(\w)\.txt: no", w)[1] for w in train.warnings] == ["b", "c"]


def test_names_as_list_or_mapping(tmp_path):
    path = make_set(tmp_path, two(), names={2: "c", 0: "a", 1: "b"}, nc=...)
    assert load(path)[0].names == ["a", "b", "c"]


@pytest.mark.parametrize("spec, match", [
    ({"names": {0: "a", 2: "c"}}, "names: .*gap"), ({"names": []}, "names: expected"),
    ({"names": "abc"}, "names: expected a list"), ({"names": ...}, "names: expected a list"),
    ({"names": ["a", "a", "c"]}, "given twice"), ({"names": [True, "b", "c"]}, "yes, no|yes/no"),
    ({"names": [["a"], "b"]}, "names: expected"), ({"nc": 4}, "nc is 4 but names has 3"),
    ({"classification_names": ...}, "classification_names|expected a box"),
    ({"classification_names": None}, "classification_names: expected"),
    ({"train": "http://host/x.zip"}, "train: 'http://host/x.zip' is no folder"),
    ({"train": ...}, "train: .*folder"), ({"val": 5}, "val: .*folder"),
    ({"path": 3}, "expected .*path"), ({"path": None}, "expected .*path"),
    ({"train": "nowhere"}, "'nowhere' is no folder"), ({"train": [1, "images/train"]}, "'1' is no"),
    ({"train": "a" * 300}, "no folder|too long"), ({"train": "\0"}, "is no folder"),
    ({"path": "\0"}, "path|folder"), ({"path": "a" * 300}, "path|folder"),
    ({"train": "data.yaml"}, "expected|cannot be read"), ({"train": "labels"}, "no image in"),
    ({"train": "../out"}, "lies outside the"), ({"train": "/"}, "outside|expected|no "),
][:-1])
def test_bad_data_yaml_is_one_user_error(tmp_path, spec, match):
    root = tmp_path / "set"
    outside = tmp_path / "out" / "images"
    outside.mkdir(parents=True)
    picture().save(outside / "o.png")
    fault(make_set(root, two(), **spec), match)


@pytest.mark.parametrize("content", ["", "3", "- a", "just words"])
def test_data_yaml_that_is_no_mapping_is_a_user_error(tmp_path, content):
    path = tmp_path / "data.yaml"
    path.write_text(content)
    fault(path, "expected .*keys path, train, val")


def test_train_may_be_a_list_file_or_a_list_of_folders(tmp_path):
    """As YOLO allows: ./ is relative to the list file, all else to the set."""
    path = make_set(tmp_path, two(), train=["list.txt", "images/more", "images/train/sub/l.txt"])
    (tmp_path / "images/more").mkdir()
    (tmp_path / "images/train/sub").mkdir()
    picture().save(tmp_path / "images/more/c.png")
    picture().save(tmp_path / "images/train/sub/d.png")
    (tmp_path / "list.txt").write_text("./images/train/a.png\n\nimages/train/b.png\r\n")
    (tmp_path / "images/train/sub/l.txt").write_text("./d.png\n")
    assert [p.name
            for p in load(path, "mode=detect")[0].paths] == ["c.png", "a.png", "b.png", "d.png"]


@pytest.mark.parametrize("line, match", [
    ("../secret.png", "outside|cannot be read"), ("/etc/hostname", "outside"),
    ("images/train/no.png", "cannot be read"), ("images/train/x.jpg", "expected an image file"),
    ("a\0b", "zero bytes"), ("b" * 300 + ".png", "cannot be read"),
    ("labels/train/a.txt", "expected an image file"),
])
def test_bad_line_of_a_list_file_is_a_user_error(tmp_path, line, match):
    path = make_set(tmp_path / "set", two(), train="list.txt")
    picture().save(tmp_path / "secret.png")
    (tmp_path / "set/images/train/x.jpg").mkdir()
    (tmp_path / "set/list.txt").write_text(f"images/train/a.png\n{line}\n")
    fault(path, match)


def test_link_out_of_the_set_and_link_loop_are_errors(tmp_path):
    """A set from elsewhere must not make the program read files beside it."""
    path = make_set(tmp_path / "set", two())
    picture().save(tmp_path / "secret.png")
    (tmp_path / "set/images/train/s.png").symlink_to(tmp_path / "secret.png")
    (tmp_path / "set/images/train/l.png").symlink_to("l.png")
    text = fault(path, "s.png: lies outside")
    assert re.search("l.png: ", text)


def test_label_file_that_is_a_loop_of_links_is_an_error(tmp_path):
    """Only a file that is not there means an image without objects."""
    loop = tmp_path / "loop.txt"
    loop.symlink_to(loop)
    assert re.search("loop.txt: cannot be read", jg.read_label_file(loop, 3, 3)[2][0])


@pytest.mark.skipif(not LINUX, reason="needs /dev/zero")
def test_text_without_an_end_is_an_error():
    with pytest.raises(jg.UserError, match="/dev/zero: larger than 1 MB"):
        jg.read_yaml(Path("/dev/zero"))


def test_folder_named_like_an_image_is_walked_not_read(tmp_path):
    path = make_set(tmp_path, two())
    (tmp_path / "images/train/odd.jpg").mkdir()
    assert len(load(path)[0]) == 2


def test_two_images_with_one_label_file_are_an_error(tmp_path):
    fault(make_set(tmp_path, {**two(), "a.jpg": (picture(), BOX)}),
          "shares its label file with a.jpg")


def png_header(w: int, h: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""
    chunk = lambda kind, data: (struct.pack(">I", len(data)) + kind + data  # noqa: E731
                                + struct.pack(">I", zlib.crc32(kind + data)))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("raw, match", [
    (b"", "b.png: not a readable image"),
    (b"hello", "b.png: not a readable image"),
    (png_header(30000, 30000), "b.png: more than [0-9,]+ pixels"),
    (png_header(10000, 9500), "b.png: more than [0-9,]+ pixels"),
    (png_header(0, 0), "b.png: not a readable image"),
    (png_header(40, 40), "b.png: not a readable"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "b.png: not a readable image"),
], ids=["empty", "text", "bomb", "half-bomb", "no-size", "cut", "postscript"])
def test_bad_image_is_a_user_error_that_names_it(tmp_path, raw, match):
    path = make_set(tmp_path, two())
    (tmp_path / "images/train/b.png").write_bytes(raw)
    fault(path, match)


@pytest.mark.parametrize("suffix",
                         [".jpg", ".png", ".gif", ".tif", ".webp", ".bmp", ".ppm", ".jp2"])
def test_damaged_image_gives_a_user_error_or_an_image(tmp_path, suffix):
    """Pillow raises many types on damaged bytes; all must come out as one."""
    rng, file = np.random.default_rng(0), tmp_path / f"x{suffix}"
    noise = Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8))
    exif = noise.getexif()
    exif[0x0112], exif[0x010E] = 6, "text"
    noise.save(file, **({"exif": exif} if suffix in (".jpg", ".png", ".webp", ".tif") else {}))
    whole = np.frombuffer(file.read_bytes(), np.uint8)
    for _ in range(120):
        raw = whole.copy()
        raw[rng.integers(0, min(len(raw), 300), 4)] = rng.integers(0, 256, 4)
        file.write_bytes(raw[: rng.integers(1, len(raw) + 1)].tobytes())
        for read in (jg.image_size, jg.read_image):
            try:
                read(file)
            except jg.UserError as error:
                assert "\n" not in str(error)


@pytest.mark.parametrize("size, wanted", [((1, 1), (64, 64)), ((2000, 2), (64, 32)),
                                          ((2, 2000), (32, 64))])
def test_extreme_sizes_are_read(tmp_path, size, wanted):
    """Canvas (w, h): the long side 64 px, the short one padded up to 32."""
    item = picture(size), BOX + "\n0 1 0\n"
    train, _ = load(make_set(tmp_path, {"a.png": item, "b.png": item}, {"v.png": item}))
    assert train.canvas[::-1] == wanted and train.pixels.shape == (2, *wanted[::-1], 3)


@pytest.mark.parametrize("image, suffix, wanted", [
    (Image.new("L", (8, 8), 77), ".png", (77, 77, 77)),
    (Image.new("RGBA", (8, 8), (10, 20, 30, 255)), ".png", (10, 20, 30)),
    (Image.new("RGB", (8, 8), (10, 20, 30)).convert("P", palette=Image.Palette.ADAPTIVE), ".gif",
     (10, 20, 30)),
    (Image.new("CMYK", (8, 8), (255, 0, 0, 0)), ".tif", (0, 255, 255)),
    (Image.new("LA", (8, 8), (50, 255)), ".png", (50, 50, 50)), (Image.new("1", (8, 8), 1), ".png",
                                                               (255, 255, 255)),
    (Image.fromarray(np.full((8, 8), 65535, np.uint16)), ".png", (255, 255, 255)),
    (Image.fromarray(np.full((8, 8), 32896, np.uint16)), ".tif", (128, 128, 128)),
    (Image.fromarray(np.full((8, 8), 0, np.uint16)), ".png", (0, 0, 0)),
], ids=["grey", "RGBA", "palette", "CMYK", "LA", "bilevel", "white16", "middle16", "black16"])
def test_every_kind_of_pixel_becomes_8_bit_rgb(tmp_path, image, suffix, wanted):
    """16-bit grey is divided by 257: 65535 -> 255, 32896 = 128 * 257 -> 128, not clipped."""
    file = tmp_path / f"x{suffix}"
    image.save(file)
    pixels = np.asarray(jg.read_image(file))
    assert pixels.shape == (8, 8, 3) and np.abs(pixels.reshape(-1, 3) - np.array(wanted)).max() <= 2


def test_float_tiff_is_a_user_error(tmp_path):
    """Floating-point pixels may mean 0-1, 0-255 or Hounsfield units: no guess."""
    path = make_set(tmp_path, two())
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "images/train/f.tif")
    fault(path, "f.tif: floating-point pixels")
    with pytest.raises(jg.UserError, match="f.tif: floating-point pixels"):
        jg.read_image(tmp_path / "images/train/f.tif")


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
@pytest.mark.parametrize("kind", ["RGB", "I;16"])
def test_exif_rotation_turns_size_and_pixels_alike(tmp_path, suffix, kind):
    """Orientation 6: a quarter turn, so 30x20 stored is 20x30 shown; boxes refer to that."""
    if kind == "I;16" and suffix == ".jpg":
        pytest.skip("JPEG holds no 16-bit grey")
    file, image = tmp_path / f"x{suffix}", Image.new(kind, (30, 20))
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(file, exif=exif)
    shown = (20, 30)
    if kind == "I;16" and suffix == ".tif":
        shown = (30, 20)  # Pillow does not turn these; header and pixels must still agree
    assert jg.image_size(file) == shown and jg.read_image(file).size == shown


def test_many_faults_are_reported_at_once_up_to_ten(tmp_path):
    """Who has 14 wrong files does not want to start the program 14 times."""
    train = {f"{k:02d}.png": (picture(), "0 9 9 9 9\n0 1 0") for k in range(14)}
    path = make_set(tmp_path, train)
    (tmp_path / "images/train/00.png").write_bytes(b"text")
    lines = fault(path, "00.txt:1: ").splitlines()
    assert len(lines) == 11 and lines[10] == "… and 5 more"
    assert re.search("00.png: not a readable image", "\n".join(lines))


@pytest.mark.parametrize("mode, rows, match", [("detect", "0 1 0", "no box in any label file"),
                                               ("classify", BOX, "no image class in any label"),
                                               ("gradnorm", "0 1 0", "no box"),
                                               ("dual", BOX, "no image class")])
def test_task_without_any_label_is_an_error(tmp_path, mode, rows, match):
    train = {name: (picture(), rows) for name in ("a.png", "b.png")}
    fault(make_set(tmp_path, train), match, f"mode={mode}")


def test_single_training_image_is_an_error(tmp_path):
    fault(make_set(tmp_path, {"a.png": (picture(), BOX + "\n0 1 0")}), "expected two")


def test_shared_images_of_train_and_val_are_a_warning(tmp_path):
    assert load(make_set(tmp_path / "apart", two()))[0].warnings == []
    train, _ = load(make_set(tmp_path / "same", two(), **{"train": ["images/train", "images/val"]}))
    assert re.search("train and val share images", train.warnings[0])


@pytest.mark.parametrize("size, canvas, box", [
    ((300, 100), (32, 64), (0.2, (0.4 * 21 + 5) / 32, 0.2, 0.4 * 21 / 32)),
    ((100, 300), (64, 32), ((0.4 * 21 + 5) / 32, 0.2, 0.4 * 21 / 32, 0.2)),
], ids=["wide", "tall"])
def test_letterbox_keeps_the_aspect_and_boxes_stay_on_the_object(tmp_path, size, canvas, box):
    """300x100 at 64 px is 64x21, centred on a 64x32 canvas 5 px from its top; a rectangle over
    0.1-0.3 of the long and 0.2-0.6 of the short side shows any swap of width and height."""
    wide = size[0] > size[1]
    image = picture(size, (0, 0, 0))
    corners = [(30, 20), (89, 59)] if wide else [(20, 30), (59, 89)]
    ImageDraw.Draw(image).rectangle([*corners[0], *corners[1]], fill=(255, 0, 0))
    row = "0 0.2 0.4 0.2 0.4" if wide else "0 0.4 0.2 0.4 0.2"
    item = image, row + "\n0 1 0"
    train, _ = load(make_set(tmp_path, {"a.png": item, "b.png": item}, {"v.png": item}))
    assert train.canvas == canvas and train.boxes[0][0, 1:] == pytest.approx(box, abs=1e-6)
    red = (train.pixels[0][..., 0] > 128) & (train.pixels[0][..., 1] < 60)
    y, x = np.nonzero(red)
    cx, cy, w, h = np.array(box) * [*canvas[::-1], *canvas[::-1]]
    assert (x.min(), x.max() + 1) == pytest.approx((cx - w / 2, cx + w / 2), abs=1)
    assert (y.min(), y.max() + 1) == pytest.approx((cy - h / 2, cy + h / 2), abs=1)
    grey = train.pixels[0][:3] if wide else train.pixels[0][:, :3]
    assert (grey == 114).all()


def test_truth_is_in_px_of_a_canvas_that_is_not_square():
    """A canvas 64 high and 128 wide: x 0.4 to 0.6 is 51.2 to 76.8 px, y 0 to 0.5 is 0 to 32."""
    data = jg.JointSet([np.array([[1, 0.5, 0.25, 0.2, 0.5]])], [0], ["a", "b"], ["c"], (64, 128))
    np.testing.assert_allclose(data.truth(0), [[1, 51.2, 0, 76.8, 32]], atol=1e-9)  # float64


def patch_batch() -> jg.Batch:
    """Two grey images 48x96 with a white patch at x 16-36, y 8-20."""
    images = torch.full((2, 3, 48, 96), 0.447)
    images[:, :, 8:20, 16:36] = 1
    rows = [[k, 1, 26 / 96, 14 / 48, 20 / 96, 12 / 48] for k in range(2)]
    return jg.Batch(images, torch.tensor(rows), torch.tensor([0, 1]))


def extents(image: torch.Tensor) -> list[float]:
    """x1 y1 x2 y2 of the white patch, px; 0.72 is half way to the grey."""
    y, x = (image[0] > 0.72).nonzero(as_tuple=True)
    return [x.min().item(), y.min().item(), x.max().item() + 1, y.max().item() + 1]


@pytest.mark.parametrize("setting, wanted", [
    (("flip_x=1", "flip_y=0"), [60, 8, 80, 20]), (("flip_x=0", "flip_y=1"), [16, 28, 36, 40]),
    (("flip_x=1", "flip_y=1"), [60, 28, 80, 40]), (("flip_x=0", "flip_y=0"), [16, 8, 36, 20])])
def test_flip_moves_patch_and_box_alike(setting, wanted):
    """x1 = 96 - 36 = 60 and so on."""
    images, targets, labels = jg.augment(patch_batch(), tiny(*setting), torch.Generator())
    boxes = jg.cxcywh_to_xyxy(targets[:, 2:]) * torch.tensor([96, 48, 96, 48])
    for image, box in zip(images, boxes):
        assert extents(image) == wanted and box.tolist() == pytest.approx(wanted, abs=1e-4)
    assert labels.tolist() == [0, 1] and targets[:, :2].tolist() == [[0, 1], [1, 1]]


@pytest.mark.parametrize("seed", range(6))
def test_zoom_and_shift_move_patch_and_box_alike(seed):
    """1 px: the patch's edge is interpolated."""
    config = tiny("flip_x=0.5", "flip_y=0.5", "scale=0.3", "shift=0.1")
    rng = torch.Generator().manual_seed(seed)
    images, targets, _ = jg.augment(patch_batch(), config, rng)
    boxes = jg.cxcywh_to_xyxy(targets[:, 2:]) * torch.tensor([96, 48, 96, 48])
    assert len(targets) == 2
    for k, box in zip(targets[:, 0].long(), boxes):
        assert extents(images[k]) == pytest.approx(box.tolist(), abs=1)


def test_box_that_leaves_the_view_is_dropped():
    """A patch at the border, moved out by half the image in most draws."""
    config, kept = tiny("flip_x=0", "scale=0", "shift=0.5"), []
    for seed in range(20):
        batch = patch_batch()
        images, targets, _ = jg.augment(batch, config, torch.Generator().manual_seed(seed))
        seen = (images[:, 0] > 0.72).flatten(1).sum(1) / 240  # of 20 x 12 px
        kept += [(k in targets[:, 0], seen[k].item()) for k in range(2)]
        assert targets[:, 2:].min() >= 0 and targets[:, 2:].max() <= 1 if len(targets) else True
    assert all(share < 0.3 for have, share in kept if not have)
    assert all(share > 0.1 for have, share in kept if have)
    assert {have for have, _ in kept} == {True, False}


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("set") / "synthetic"
    jg.export(tiny(), folder)
    return folder / "data.yaml"


def test_exported_set_reads_back_as_the_synthetic_one(exported):
    """PNG loses nothing, and labels have six decimals: 1e-6."""
    for back, made in zip(jg.load_joint(exported, tiny()), jg.load_data(tiny())):
        assert np.array_equal(back.pixels, made.pixels) and back.labels == made.labels
        assert (back.names, back.classification_names) == (made.names, made.classification_names)
        assert back.canvas == made.canvas and back.warnings == []
        for a, b in zip(back.boxes, made.boxes):
            assert np.allclose(a, np.unique(b, axis=0), atol=2e-6)  # the reader sorts


def test_export_into_a_full_folder_is_an_error(exported):
    with pytest.raises(jg.UserError, match="empty"):
        jg.export(tiny(), exported.parent)


def test_cached_and_uncached_batches_are_identical(exported):
    """Memory and worker processes are a matter of speed, never of the result."""
    runs = []
    for cache, workers in ((2048, 0), (0, 0), (0, 1)):
        config = tiny(f"cache_mb={cache}", f"workers={workers}")
        train, val = jg.load_joint(exported, config)
        assert (train.pixels is None) == (cache == 0)
        runs.append([*jg.batches(train, config, 1), *jg.batches(val, config, None)])
    assert len(runs[0]) == 5
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_epochs_are_shuffled_anew_and_ranks_share_the_images():
    train, _ = jg.load_data(tiny())
    order = lambda *a: [x for b in jg.batches(train, tiny(), *a) for x in  # noqa: E731
                        b.images.float().mean((1, 2, 3)).tolist()]
    assert order(0) != order(1) and sorted(order(0)) == sorted(order(1)) and order(0) == order(0)
    halves = order(0, 2, 0), order(0, 2, 1)
    assert sorted(halves[0] + halves[1]) == sorted(order(0)) and len(halves[0]) == 16


def test_last_batch_of_one_image_is_left_out():
    """BatchNorm cannot train on one image."""
    train, _ = jg.load_data(tiny("train_images=17"))
    assert [len(b.images) for b in jg.batches(train, tiny(), 0)] == [8, 8]


@pytest.mark.skipif(not BCCD.exists(), reason="the real set is not part of the repository")
def test_real_set_has_its_known_counts():
    """Counted with grep in the label files."""
    train, val = jg.load_joint(BCCD, tiny("cache_mb=0", "imgsz=160"))
    assert (len(train), len(val), train.canvas) == (205, 69, (128, 160))
    boxes = np.concatenate(train.boxes)
    assert (boxes[:, 0] == train.names.index("RBC")).sum() == 2273
    assert val.labels.count(val.classification_names.index("MONOCYTE")) == 4


# The converter data/bccd.py, on a made-up miniature of its two sources.

spec = importlib.util.spec_from_file_location("bccd", Path(jg.__file__).parent / "data" / "bccd.py")
bccd = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bccd)

OBJECT = (
    "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax>"
    "<ymax>{}</ymax></bndbox>"
    "</object>")


@pytest.fixture
def args(tmp_path):
    images, notes, wbc = (tmp_path / p for p in ("b/BCCD/JPEGImages", "b/BCCD/Annotations", "w"))
    for folder in (images, notes, wbc):
        folder.mkdir(parents=True)
    for i in range(4):  # 3 is in the sources, not in the list
        Image.new("RGB", (640, 480), (40 * i, 90, 120)).save(images / f"BloodImage_0000{i}.jpg")
        boxes = [("WBC", 68, 315, 286, 480), ("RBC", 5, 5, 5, 5), ("Platelets", 346, 361, 446, 454)]
        (notes / f"BloodImage_0000{i}.xml").write_text(
            f"<annotation>{''.join(OBJECT.format(*b) for b in boxes[:3 if i < 2 else 0])}</annotation>"
        )
    (wbc / "labels.csv"
     ).write_text(',Image,Category\n,0,MONOCYTE\n,1,"NEUTROPHIL, NEUTROPHIL"\n,2,EOSINOPHIL\n,3,\n')
    names = [f"{split} BloodImage_0000{i}" for i, split in enumerate(("train", "train", "val"))]
    (tmp_path / "split.txt").write_text("\n".join(names) + "\n")
    return [
        str(tmp_path / "b"),
        str(wbc), "--out",
        str(tmp_path / "set"), "--split",
        str(tmp_path / "split.txt")
    ]


def test_bccd_makes_a_joint_set(args, tmp_path):
    assert bccd.main(args) == 0
    out = tmp_path / "set"
    text = (out / "labels/train/BloodImage_00001.txt").read_text()
    assert text == ("1 0.276562 0.828125 0.340625 0.343750\n"
                    "2 0.618750 0.848958 0.156250 0.193750\n\n0 0 0 1\n")
    assert (out / "labels/val/BloodImage_00002.txt").read_text() == "\n1 0 0 0\n"
    assert Image.open(out / "images/val/BloodImage_00002.jpg").size == (320, 240)
    train, val = jg.load_joint(out / "data.yaml",
                               jg.load_config(jg.ROOT / "config.yaml", ["imgsz=64"]))
    assert (train.labels, val.labels) == ([2, 3], [0]) and list(map(
        len, train.boxes + val.boxes)) == [2, 2, 0]
    assert train.names == bccd.BOXES and val.classification_names == bccd.TYPES


@pytest.mark.parametrize("lost", [
    "b/BCCD/JPEGImages/BloodImage_00002.jpg", "b/BCCD/Annotations/BloodImage_00000.xml",
    "w/labels.csv", "split.txt"
])
def test_bccd_names_a_missing_file(args, tmp_path, capsys, lost):
    (tmp_path / lost).unlink()
    assert bccd.main(args) == 2 and not (tmp_path / "set").exists()
    assert capsys.readouterr().err == f"{tmp_path / lost}: no such file\n"


def test_bccd_list():
    rows = bccd.read_split(bccd.HERE / "bccd_split.txt")
    assert [sum(s == part for s, _ in rows)
            for part in ("train", "val")] == [205, 69] and len(set(rows)) == 274


# --------------------------------------------------------------------------------------------------
# 4. Boxes: overlap, anchors, raw maps -> boxes, non-maximum suppression
# --------------------------------------------------------------------------------------------------


def test_box_iou_of_hand_computed_pairs():
    """Wide a, tall b: 2 x 1 shared of 8 + 10 - 2; touching and apart give 0; rows are a's."""
    a = np.array([[0., 0, 4, 2], [0, 0, 2, 2]])
    b = np.array([[2., 1, 4, 6], [0, 0, 4, 2], [4, 0, 5, 2]])
    expected = [[2 / 16, 1, 0], [0, 0.5, 0]]
    np.testing.assert_allclose(jg.box_iou(a, b), expected, atol=1e-6)  # 1e-7 in the divisor


def scalar_ciou(a, b, alpha=None):
    """IoU - d^2 / c^2 - alpha v of two boxes cx cy w h (arXiv 1911.08287), in plain floats."""
    (ax, ay, aw, ah), (bx, by, bw, bh) = a, b
    ix = max(0, min(ax + aw / 2, bx + bw / 2) - max(ax - aw / 2, bx - bw / 2))
    iy = max(0, min(ay + ah / 2, by + bh / 2) - max(ay - ah / 2, by - bh / 2))
    iou = ix * iy / (aw * ah + bw * bh - ix * iy)
    cx = max(ax + aw / 2, bx + bw / 2) - min(ax - aw / 2, bx - bw / 2)
    cy = max(ay + ah / 2, by + bh / 2) - min(ay - ah / 2, by - bh / 2)
    v = 4 / math.pi**2 * (math.atan(bw / bh) - math.atan(aw / ah)) ** 2
    alpha = (v / (1 - iou + v) if v else 0) if alpha is None else alpha
    return iou - ((ax - bx) ** 2 + (ay - by) ** 2) / (cx**2 + cy**2) - alpha * v


def test_ciou_of_identical_boxes_is_one():
    box = torch.tensor([[5., 7, 3, 9]])
    assert jg.ciou(box, box).item() == pytest.approx(1, abs=1e-6)  # 1e-7 in the divisors


def test_ciou_of_same_shape_is_iou_less_distance():
    """4 x 2 boxes 2 px apart along x: IoU 4/12, d^2 = 4, hull 6 x 2: c^2 = 40, v = 0."""
    a, b = torch.tensor([[0., 0, 4, 2]]), torch.tensor([[2., 0, 4, 2]])
    assert jg.ciou(a, b).item() == pytest.approx(1 / 3 - 4 / 40, abs=1e-6)  # float32


def test_ciou_equals_a_scalar_version():
    rng = np.random.default_rng(0)
    a, b = rng.uniform((0, 0, 1, 1), (6, 3, 9, 4), (2, 300, 4))
    expected = torch.tensor([scalar_ciou(x, y) for x, y in zip(a, b)])
    # float64; the 1e-7 that keep the divisors from zero are felt at 1e-7 / 1
    torch.testing.assert_close(jg.ciou(torch.tensor(a), torch.tensor(b)), expected, atol=1e-6,
                               rtol=0)


def test_ciou_treats_alpha_as_a_constant():
    """The paper's gradient keeps alpha fixed: central differences with alpha frozen."""
    a, b = [5.0, 6.0, 7.0, 3.0], [6.0, 5.5, 4.0, 8.0]
    v = 4 / math.pi**2 * (math.atan(b[2] / b[3]) - math.atan(a[2] / a[3])) ** 2
    h = 1e-5
    iou = scalar_ciou(a, b, 0) + 1.25 / (7**2 + 8**2)  # d^2 over the hull's diagonal^2
    alpha = v / (1 - iou + v)
    x = torch.tensor([a], dtype=torch.float64, requires_grad=True)
    jg.ciou(x, torch.tensor([b], dtype=torch.float64)).sum().backward()
    for k in range(4):
        up, down = ([*a[:k], a[k] + s * h, *a[k + 1:]] for s in (1, -1))
        slope = (scalar_ciou(up, b, alpha) - scalar_ciou(down, b, alpha)) / (2 * h)
        # differences are exact to h^2 = 1e-10, the 1e-7 in the divisors to about 1e-8
        assert x.grad[0, k].item() == pytest.approx(slope, abs=1e-7)


def test_decode_by_hand():
    """xy = (2 s - 0.5 + cell) stride, wh = (2 s)^2 anchor; s = 1/2 at 0, 3/4 at log 3."""
    logits = torch.tensor([[0., 0, 0, 0, 9], [math.log(3), 0, math.log(3), 0, 9]])
    cell, anchor = torch.tensor([[3, 1], [3, 1]]), torch.tensor([[10., 20], [10, 20]])
    expected = torch.tensor([[28., 12, 10, 20], [32, 12, 22.5, 20]])
    torch.testing.assert_close(jg.decode(logits, cell, anchor, 8), expected)  # float32


@pytest.mark.parametrize("seed", range(25))
def test_suppress_equals_the_greedy_loop(seed):
    """Keep a box unless a kept one of its class, before it, overlaps it more than 0.4."""
    rng = np.random.default_rng(seed)
    n = int(rng.integers(0, 120))
    low = rng.uniform(0, 60, (n, 2))
    boxes = np.concatenate([low, low + rng.uniform(5, 40, (n, 2))], 1)
    classes = rng.integers(0, 3, n)
    kept = []
    for i, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        clear = True
        for j in kept:
            u1, v1, u2, v2 = boxes[j].tolist()
            shared = max(0, min(x2, u2) - max(x1, u1)) * max(0, min(y2, v2) - max(y1, v1))
            total = (x2 - x1) * (y2 - y1) + (u2 - u1) * (v2 - v1) - shared
            clear &= not (classes[i] == classes[j] and shared / total > 0.4)
        kept += [i] if clear else []
    assert np.flatnonzero(jg.suppress(boxes, classes, 0.4)).tolist() == kept


def test_fit_anchors_finds_separated_clusters_in_order_of_area():
    """Nine tight clusters, wide and tall: the optimum of k-means is their means."""
    rng = np.random.default_rng(0)
    centres = np.array([[6, 12], [20, 8], [10, 30], [45, 12], [22, 44], [70, 25], [40, 75],
                        [110, 50], [90, 130]], float)  # by area: 72, 160, 300, 540, 968, ...
    points = centres[:, None] + rng.uniform(-1, 1, (9, 30, 2))
    shuffled = rng.permutation(points.reshape(-1, 2))
    fitted = jg.fit_anchors(shuffled)
    assert fitted.shape == (3, 3, 2)
    # the same 30 numbers averaged in another order: float64 rounding
    np.testing.assert_allclose(fitted.reshape(9, 2), points.mean(1), rtol=1e-12)


def test_flatten_levels_and_prediction_grid_agree_on_the_order():
    """Each channel holds the name of its level, cell, anchor; grids are not square."""
    shapes, raw = ((4, 6), (2, 3), (1, 2)), []
    for level, (h, w) in enumerate(shapes):
        x = torch.zeros(1, 3 * 7, h, w)
        for a, row, col in itertools.product(range(3), range(h), range(w)):
            name = torch.tensor([level, a, row, col, 0, 0, 0])
            x[0, 7 * a:7 * a + 7, row, col] = name.float()
        raw.append(x)
    rows = jg.flatten_levels(raw)[0].long()
    cell, anchor, stride = jg.prediction_grid(raw, ANCHORS)
    assert torch.equal(cell, rows[:, [3, 2]])  # x, y
    assert torch.equal(anchor, ANCHORS[rows[:, 0], rows[:, 1]])
    assert torch.equal(stride[:, 0], torch.tensor([8, 16, 32])[rows[:, 0]])


def test_find_boxes_puts_a_planted_box_where_decode_says():
    """P4, cell x 5 y 2, anchor (13, 25), s = 1/2: centre (88, 40), corners +- half of it."""
    raw = [torch.full((2, 3 * 7, h, w), -20.0) for h, w in ((8, 12), (4, 6), (2, 3))]
    raw[1][1, 7:14, 2, 5] = torch.tensor([0, 0, 0, 0, 20.0, -20, 20])
    none, found = jg.find_boxes(raw, ANCHORS, make())
    assert len(none) == 0
    expected = torch.tensor([[81.5, 27.5, 94.5, 52.5, 1, 1]])
    np.testing.assert_allclose(found, expected, atol=1e-5)  # float32 at about 100


@pytest.mark.parametrize("max_det", [100, 300])
def test_find_boxes_returns_max_det_best_first(max_det):
    """400 confident boxes of 4 x 4 px on a grid of 8 px never overlap; the best are kept."""
    raw = [torch.full((1, 18, n, n), -20.0) for n in (20, 10, 5)]
    scores = torch.randperm(400, generator=torch.Generator().manual_seed(0)) / 100 + 1.0
    raw[0][0, 0:4], raw[0][0, 5] = 0.0, 20.0
    raw[0][0, 4] = scores.view(20, 20)
    (found,) = jg.find_boxes(raw, torch.full((3, 3, 2), 4.0), make(f"max_det={max_det}"))
    best = scores.sort(descending=True)[0][:max_det].sigmoid()
    np.testing.assert_allclose(found[:, 4], best, atol=1e-6)  # sigmoid(20) = 1 - 2e-9


# --------------------------------------------------------------------------------------------------
# 5. Model: images -> P3, raw detection maps, class logits
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width, parameters", [(0.25, 1_872_157), (0.50, 7_235_389)])
def test_detection_network_has_yolov5s_number_of_parameters(width, parameters):
    """YOLOv5n and YOLOv5s v6 at 80 classes, as Ultralytics' model summary prints them."""
    config = make("mode=detect", f"width_multiple={width}")
    network = jg.Network(config, 80, 0, np.ones((3, 3, 2)))
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert network.parameter_counts()["total"] == parameters


def test_raw_maps_have_strides_8_16_32_on_an_image_that_is_not_square():
    network = jg.Network(make(), 4, 3, ANCHORS.numpy())
    outputs = network(torch.rand(2, 3, 64, 96))
    shapes = [tuple(x.shape) for x in outputs["det"]]
    assert shapes == [(2, 27, 8, 12), (2, 27, 4, 6), (2, 27, 2, 3)]
    assert outputs["cls"].shape == (2, 3)
    assert network.parts[0](torch.rand(2, 3, 64, 96))[0].shape[2:] == (8, 12)


def joint_case(*overrides, images=4):
    """A network, its losses and a batch of random images with random boxes and labels."""
    torch.manual_seed(0)
    config = make(*overrides)
    data = jg.JointSet([], [0, 1, 2], ["a", "b", "c"], ["x", "y", "z"], (64, 96))
    network = jg.Network(config, 3, 3, ANCHORS.numpy())
    losses = jg.make_losses(network, data, config)
    batch = jg.Batch(torch.rand(images, 3, 64, 96), random_targets(np.random.default_rng(0), 9, 4),
                     torch.tensor([0, 1, 2, 1][:images]))
    return network, losses, batch


@pytest.mark.parametrize("mode", ["equal", "dual"])
def test_gradients_reach_every_activation_in_the_memory_order_of_its_input(mode):
    """Slices hand back gradients of another order, slow to work on."""
    order, seen = torch.channels_last, []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.silu_backward.default:
                gradient, x = args
                uniform = gradient.stride()[1:] == (1, 0, 0)  # a mean's: one value a channel
                seen.append(uniform or gradient.stride() == x.stride())
            return func(*args, **(kwargs or {}))

    network, losses, batch = joint_case(f"mode={mode}")
    network.to(memory_format=order)
    batch = batch._replace(images=batch.images.contiguous(memory_format=order))
    with Watch():
        for part in network.parts:
            jg.backward(part, batch, losses, torch.ones(len(part.heads)))
    activations = sum(isinstance(module, nn.SiLU) for module in network.modules())
    again = 2 if mode == "equal" else 0  # the gradient at W, of each task
    assert seen == [True] * (activations + again)


def test_autocast_covers_the_forward_pass_and_leaves_the_signals_their_digits():
    """Convolutions give bfloat16, losses and inner products float32."""
    network, losses, batch = joint_case()
    part, seen = network.parts[0], []
    part.trunk[0][0].register_forward_hook(lambda module, x, y: seen.append(y.dtype))
    autocast = torch.autocast("cpu", torch.bfloat16)
    for how in (jg.backward, jg.plain_backward, jg.textbook_backward):
        signals = how(part, batch, losses, torch.tensor([1.0, 0.5]), autocast)
        assert {x.dtype for x in signals if x is not None} == {torch.float32}
    assert seen == [torch.bfloat16] * 3


def test_mean_pool_is_the_mean_over_the_map():
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    torch.testing.assert_close(jg.MeanPool()(x), x.mean((2, 3)), rtol=1e-12, atol=1e-15)  # float64


def test_both_tasks_reach_exactly_the_trunk():
    """dL_det reaches trunk and detection head, dL_cls trunk and classification head."""
    network, losses, batch = joint_case()
    part, reached = network.parts[0], {}
    names, parameters = zip(*part.named_parameters())
    P3 = part.trunk(batch.images)
    for task, head in part.heads.items():
        L = losses[task](head(P3), batch)
        g = torch.autograd.grad(L, parameters, retain_graph=True, allow_unused=True)
        reached[task] = {name for name, g_k in zip(names, g) if g_k is not None and g_k.any()}
    assert reached["det"] & reached["cls"] == {n for n in names if n.startswith("trunk.")}
    assert reached["det"] - reached["cls"] == {n for n in names if n.startswith("heads.det.")}
    assert reached["cls"] - reached["det"] == {n for n in names if n.startswith("heads.cls.")}


def test_the_cut_stops_every_gradient_from_the_heads():
    """Each head reads a leaf of its own: without `backward` nothing flows into the trunk."""
    network, losses, batch = joint_case()
    P3, cuts, outputs = network.parts[0](batch.images)
    assert all(cut.is_leaf and torch.equal(cut, P3) for cut in cuts) and P3.requires_grad
    losses["cls"](outputs["cls"], batch).backward()
    assert cuts[0].grad is None and cuts[1].grad.any()
    assert all(p.grad is None for p in network.parts[0].trunk.parameters())


def test_W_is_the_last_convolution_of_the_trunk():
    network, _, _ = joint_case()
    order = []
    for m in network.parts[0].trunk.modules():
        if isinstance(m, nn.Conv2d):
            m.register_forward_hook(lambda m, *_: order.append(m))
    network.parts[0].trunk(torch.rand(2, 3, 64, 64))
    assert order[-1].weight is network.parts[0].trunk.W


def test_dual_networks_share_no_storage_and_have_both_attentions():
    network = jg.Network(make("mode=dual"), 3, 3, ANCHORS.numpy())
    det, cls = network.parts
    pointers = [{t.data_ptr() for t in itertools.chain(part.parameters(), part.buffers())}
                for part in (det, cls)]
    assert not pointers[0] & pointers[1]
    kinds = [{type(m) for m in part.modules()} for part in (det, cls)]
    assert {jg.SqueezeExcite, jg.CBAM} <= kinds[1] and not {jg.SqueezeExcite, jg.CBAM} & kinds[0]
    assert network.parameter_counts()["trunk"] == 0


def test_asking_dual_for_a_shared_W_is_an_error():
    network = jg.Network(make("mode=dual"), 3, 3, np.ones((3, 3, 2)))
    with pytest.raises(jg.UserError, match="dual shares no trunk"):
        network.parts[1].trunk.W


def test_squeeze_excite_equals_its_formula():
    """x sigmoid(W2 relu(W1 mean(x))), one scale for each channel (arXiv 1709.01507)."""
    torch.manual_seed(0)
    module, x = jg.SqueezeExcite(8), torch.randn(2, 8, 3, 5)
    first, _, second = module.mlp
    hidden = (x.mean((2, 3)) @ first.weight[:, :, 0, 0].T + first.bias).relu()
    scale = (hidden @ second.weight[:, :, 0, 0].T + second.bias).sigmoid()
    torch.testing.assert_close(module(x), x * scale[:, :, None, None])  # float32


def test_cbam_equals_its_formula():
    """Channels by sigmoid(mlp(mean) + mlp(max)), then places by a 7x7 kernel over mean and max."""
    torch.manual_seed(0)
    module, x = jg.CBAM(8), torch.randn(2, 8, 3, 5)
    mlp = module.channel.mlp
    y = x * (mlp(F.adaptive_avg_pool2d(x, 1)) + mlp(F.adaptive_max_pool2d(x, 1))).sigmoid()
    pooled = torch.stack([y.mean(1), y.max(1).values], 1)
    torch.testing.assert_close(module(x), y * module.spatial(pooled).sigmoid())  # float32


# --------------------------------------------------------------------------------------------------
# 6. Losses: raw outputs and a batch -> one scalar a task
# --------------------------------------------------------------------------------------------------


def slow_match(targets, shapes, anchors, thres):
    """YOLOv5's rule by loops: (target, level, anchor, x, y) of each pair, sorted."""
    found = []
    for t, (_, _, cx, cy, bw, bh) in enumerate(targets.tolist()):
        for level, (h, w) in enumerate(shapes):
            stride = (8, 16, 32)[level]
            x, y = np.float32(cx) * np.float32(w), np.float32(cy) * np.float32(h)  # as torch
            cells = [(int(x), int(y))]
            cells += [(int(x) - 1, int(y))] if x % 1 < 0.5 and x > 1 else []
            cells += [(int(x), int(y) - 1)] if y % 1 < 0.5 and y > 1 else []
            cells += [(int(x) + 1, int(y))] if (w - x) % 1 < 0.5 and w - x > 1 else []
            cells += [(int(x), int(y) + 1)] if (h - y) % 1 < 0.5 and h - y > 1 else []
            for a in range(3):
                aw, ah = anchors[level, a].tolist()
                rw, rh = bw * w * stride / aw, bh * h * stride / ah
                if max(rw, 1 / rw, rh, 1 / rh) < thres:
                    found += [(t, level, a, min(i, w - 1), min(j, h - 1)) for i, j in cells]
    return sorted(found)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("shapes", [((8, 12), (4, 6), (2, 3)), ((12, 4), (6, 2), (3, 1))])
def test_match_targets_equals_a_slow_loop(seed, shapes):
    targets = random_targets(np.random.default_rng(seed), 40, 5)
    match = jg.match_targets(targets, list(shapes), ANCHORS, 3.0)
    columns = (match.target, match.level, match.anchor, match.cell[:, 0], match.cell[:, 1])
    assert sorted(zip(*(c.tolist() for c in columns))) == slow_match(targets, shapes, ANCHORS, 3)
    raw = [torch.zeros(1, 24, h, w) for h, w in shapes]
    cell, anchor, _ = jg.prediction_grid(raw, ANCHORS)
    assert torch.equal(cell[match.index], match.cell)
    assert torch.equal(anchor[match.index], ANCHORS[match.level, match.anchor])


def test_match_targets_takes_the_cell_and_its_two_nearest_by_hand():
    """Centre x 3.25, y 2.75 cells on P3: cells (3, 2), left (2, 2) and below (3, 3)."""
    targets = torch.tensor([[0, 0, 3.25 / 12, 2.75 / 8, 4 / 96, 9 / 64]])
    match = jg.match_targets(targets, [(8, 12), (4, 6), (2, 3)], ANCHORS, 1.01)
    assert sorted(match.cell.tolist()) == [[2, 2], [3, 2], [3, 3]]
    assert match.level.tolist() == match.anchor.tolist() == [0, 0, 0]


def bce(x, y):
    return -(y * F.logsigmoid(x) + (1 - y) * F.logsigmoid(-x))


def slow_detection_loss(raw, batch, anchors, classes, config):
    """The loss by loops over pairs and levels, in float64, straight from the raw maps."""
    shapes = [tuple(x.shape[2:]) for x in raw]
    H, W = shapes[0][0] * 8, shapes[0][1] * 8
    pairs = slow_match(batch.targets, shapes, anchors, config.anchor_thres)
    box = obj = cls = 0.0
    for level, x in enumerate(raw):
        stride, ious, entropies, goals = (8, 16, 32)[level], [], [], {}
        for t, _, a, i, j in (p for p in pairs if p[1] == level):
            b, k, cx, cy, bw, bh = batch.targets[t].double().tolist()
            q = x[int(b), a * (5 + classes):(a + 1) * (5 + classes), j, i].double()
            s = 1 / (1 + torch.exp(-q[:4]))
            aw, ah = anchors[level, a].tolist()
            px, py = (2 * s[0] - 0.5 + i) * stride, (2 * s[1] - 0.5 + j) * stride
            pw, ph = (2 * s[2]) ** 2 * aw, (2 * s[3]) ** 2 * ah
            tx, ty, tw, th = cx * W, cy * H, bw * W, bh * H
            low = lambda u, v: u if u < v else v  # noqa: E731
            high = lambda u, v: u if u > v else v  # noqa: E731
            right, left = (px + pw / 2, tx + tw / 2), (px - pw / 2, tx - tw / 2)
            floor, roof = (py + ph / 2, ty + th / 2), (py - ph / 2, ty - th / 2)
            ix, iy = low(*right) - high(*left), low(*floor) - high(*roof)
            shared = ix * iy if ix > 0 and iy > 0 else 0.0
            iou = shared / (pw * ph + tw * th - shared)
            hull = (high(*right) - low(*left)) ** 2 + (high(*floor) - low(*roof)) ** 2
            v = 4 / math.pi**2 * (torch.atan(pw / ph) - math.atan(tw / th)) ** 2
            alpha = (v / (1 - iou + v)).detach()
            full = iou - ((px - tx) ** 2 + (py - ty) ** 2) / hull - alpha * v
            ious.append(full)
            cell = (int(b), a, j, i)
            goals[cell] = max(goals.get(cell, 0.0), full.item())
            entropies += [bce(q[5 + c], float(c == int(k))) for c in range(classes)]
        if ious:
            box += sum(1 - u for u in ious) / len(ious)
            cls += sum(entropies) / len(entropies)
        goal = torch.zeros(len(x), 3, *shapes[level], dtype=torch.float64)
        for cell, value in goals.items():
            goal[cell] = value
        o = x.view(len(x), 3, 5 + classes, *shapes[level])[:, :, 4].double()
        obj += (4.0, 1.0, 0.4)[level] * bce(o, goal).mean()
    obj_gain = config.obj_gain * (config.imgsz / 640) ** 2
    loss = config.box_gain * box + obj_gain * obj
    loss = loss + config.cls_gain * classes / 80 * cls * (classes > 1)
    return loss * len(batch.images) if config.det_loss_times_batch else loss


@pytest.mark.parametrize("seed, classes, n", [(0, 3, 12), (1, 3, 30), (2, 1, 12), (3, 2, 1)])
def test_detection_loss_and_its_gradient_equal_a_slow_loop(seed, classes, n):
    config = make("box_gain=0.7", "obj_gain=30", "cls_gain=11")  # all three parts count
    targets = random_targets(np.random.default_rng(seed), n, 3, classes)
    batch = jg.Batch(torch.zeros(3, 3, 64, 96), targets, torch.zeros(3))
    raw = [x.requires_grad_() for x in random_raw(seed, classes=classes)]
    loss = jg.DetectionLoss(ANCHORS, classes, config)(raw, batch)
    slow = slow_detection_loss(raw, batch, ANCHORS, classes, config)
    assert loss.item() == pytest.approx(slow.item(), rel=1e-5)  # float32 sums of 300 terms
    for x, y in zip(torch.autograd.grad(loss, raw), torch.autograd.grad(slow, raw)):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)  # float32; ciou's 1e-7


def test_detection_loss_does_not_depend_on_the_order_of_targets():
    """Crowded cells have several IoUs as objectness target; the largest counts."""
    rng = np.random.default_rng(4)
    targets = random_targets(rng, 150, 3)
    loss, raw = jg.DetectionLoss(ANCHORS, 3, make()), random_raw(4)
    shapes = [tuple(x.shape[2:]) for x in raw]
    match = jg.match_targets(targets, shapes, ANCHORS, 4.0)
    keys = torch.stack([targets[match.target, 0].long(), match.index])
    assert keys.unique(dim=1).shape[1] < keys.shape[1]  # else the test says nothing
    values = [loss(raw, jg.Batch(torch.zeros(3, 3, 64, 96), targets[rng.permutation(150)],
                                 None)).item() for _ in range(6)]
    assert values == pytest.approx([values[0]] * 6, rel=2e-6)  # float32 sums reordered


def test_detection_loss_without_boxes_is_objectness_against_zero():
    """No pair: box and class parts are 0, and each objectness logit is pushed down."""
    config, raw = make(), [x.requires_grad_() for x in random_raw(5)]
    batch = jg.Batch(torch.zeros(3, 3, 64, 96), torch.zeros(0, 6), None)
    loss = jg.DetectionLoss(ANCHORS, 3, config)(raw, batch)
    o = [x.view(3, 3, 8, *x.shape[2:])[:, :, 4] for x in raw]
    expected = sum(b * F.softplus(x).mean() for b, x in zip((4, 1, 0.4), o))
    expected = 3 * config.obj_gain * (64 / 640) ** 2 * expected.item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)  # float32
    loss.backward()
    for x in raw:
        g = x.grad.view(3, 3, 8, *x.shape[2:])
        assert (g[:, :, 4] > 0).all() and not g[:, :, :4].any() and not g[:, :, 5:].any()


def test_objectness_target_carries_no_gradient():
    """With box and class gains 0 the loss moves objectness alone: the CIoU is a constant."""
    raw = [x.requires_grad_() for x in random_raw(6)]
    batch = jg.Batch(torch.zeros(3, 3, 64, 96), random_targets(np.random.default_rng(6), 9, 3), 0)
    jg.DetectionLoss(ANCHORS, 3, make("box_gain=0", "cls_gain=0"))(raw, batch).backward()
    for x in raw:
        g = x.grad.view(3, 3, 8, *x.shape[2:])
        assert g[:, :, 4].any() and not g[:, :, :4].any()


@pytest.mark.parametrize("images", [1, 5])
def test_det_loss_times_batch_multiplies_by_the_number_of_images(images):
    targets = random_targets(np.random.default_rng(7), 6, images)
    batch, raw = jg.Batch(torch.zeros(images, 3, 64, 96), targets, None), random_raw(7, images)
    times, mean = (jg.DetectionLoss(ANCHORS, 3, make(f"det_loss_times_batch={v}"))(raw, batch)
                   for v in ("true", "false"))
    assert times.item() == pytest.approx(images * mean.item(), rel=1e-6)  # float32


def test_classification_loss_equals_weighted_cross_entropy():
    """The library's mean: sum w_y (-log p_y) / sum w_y, over images with a label."""
    torch.manual_seed(0)
    logits, weights = torch.randn(8, 3), torch.tensor([0.5, 2.0, 1.2])
    labels = torch.tensor([0, 2, jg.NO_LABEL, 1, 1, jg.NO_LABEL, 0, 2])
    loss = jg.ClassificationLoss(weights)(logits, jg.Batch(None, None, labels))
    known = labels >= 0
    expected = F.cross_entropy(logits[known], labels[known], weights)
    torch.testing.assert_close(loss, expected)  # float32


def test_classification_loss_without_a_label_is_zero_with_zero_gradient():
    logits = torch.randn(4, 3, requires_grad=True)
    labels = torch.full((4,), jg.NO_LABEL)
    loss = jg.ClassificationLoss(torch.ones(3))(logits, jg.Batch(None, None, labels))
    loss.backward()
    assert loss.item() == 0 and not logits.grad.any()


def test_class_balance_weighs_by_inverse_frequency_with_mean_one():
    """N / (C n_c) of counts 1, 3, 2: 2, 2/3, 1; summed over the six images: 6."""
    config = make("class_balance=true")
    data = jg.JointSet([], [1, 0, 1, 2, 1, 2, jg.NO_LABEL], ["a"], ["x", "y", "z"], (64, 64))
    losses = jg.make_losses(jg.Network(config, 1, 3, ANCHORS.numpy()), data, config)
    expected = torch.tensor([2, 2 / 3, 1])
    torch.testing.assert_close(losses["cls"].class_weights, expected)  # float32


# --------------------------------------------------------------------------------------------------
# 7. Balancer: (losses, gradient norms at W) -> task weights
# --------------------------------------------------------------------------------------------------


def balancer(w, **settings):
    return jg.GradNorm(w, **({"alpha": 1.5, "dtype": torch.float64} | settings))


def double(*x):
    return torch.tensor(x, dtype=torch.float64)


def published(w, steps, alpha, lr):
    """Weights after each step of GradNorm as published, Adam and all, in numpy."""
    w, m, v, rows, L0 = np.array(w, float), 0.0, 0.0, [], steps[0][0]
    for t, (L, n) in enumerate(steps, 1):
        r = (L / L0) / np.mean(L / L0)
        g = np.sign(w * n - np.mean(w * n) * r**alpha) * n
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        w = w - lr * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        w = w * len(w) / w.sum()
        rows.append(w)
    return np.array(rows)


def test_one_update_by_hand():
    """w = 1, L~ = (1/2, 1, 3/2), G = n = (2, 1, 1), alpha 1: targets (2/3, 4/3, 2).

    Signs (+, -, -); Adam's first step is lr: (.975, 1.025, 1.025), times 3 / 3.025.
    """
    b = balancer([1, 1, 1], alpha=1, lr=0.025, L0=[2.0, 1, 2])
    w = b.update(double(1, 1, 3), double(2, 1, 1))
    expected = double(0.975, 1.025, 1.025) * 3 / 3.025
    torch.testing.assert_close(w, expected, rtol=1e-7, atol=0)  # Adam's eps of 1e-8
    # Adam's first moment after one step is (1 - beta1) gradient; float64
    torch.testing.assert_close(b.m, 0.1 * double(2, -1, -1), rtol=1e-12, atol=0)
    assert b.r.tolist() == [0.5, 1, 1.5]


@pytest.mark.parametrize("T", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("alpha", [0.12, 1.5, -0.7])
def test_weights_follow_the_published_recipe(T, alpha):
    """w_min = 0: 30 steps equal w <- Adam(w), w <- w T / sum(w) written out in numpy."""
    rng = np.random.default_rng(T)
    steps = [(rng.uniform(0.2, 3, T), rng.uniform(0.5, 2, T)) for _ in range(30)]
    initial = rng.uniform(0.5, 1.5, T)
    b = balancer(initial, alpha=alpha, lr=0.01)
    rows = np.array([b.update(*map(torch.tensor, s)).tolist() for s in steps])
    # float64; a sign that both compute from sums in another order could differ only at a tie
    np.testing.assert_allclose(rows, published(initial, steps, alpha, 0.01), rtol=1e-9)


@pytest.mark.parametrize("T", [1, 2, 3, 4, 5])
def test_sum_is_T_and_the_floor_holds_after_every_update(T):
    rng = np.random.default_rng(T)
    b = balancer(rng.uniform(0.01, 5, T), w_min=0.05, lr=0.1)
    for _ in range(60):
        w = b.update(torch.tensor(rng.uniform(0.1, 3, T)),
                     torch.tensor(10 ** rng.uniform(-2, 2, T)))
        assert w.sum().item() == pytest.approx(T, rel=1e-12)  # float64
        assert (w >= 0.05 - 1e-15).all()


def test_the_floor_binds_where_the_published_recipe_goes_negative():
    """A task of 10,000 times the gradient loses weight at every step: the paper's toy."""
    L, n = np.ones(2), np.array([1e4, 1.0])
    assert published([1, 1], [(L, n)] * 80, 0.12, 0.025).min() < 0
    b = balancer([1.0, 1.0], alpha=0.12, lr=0.025, w_min=0.02)
    for _ in range(80):
        w = b.update(torch.tensor(L), torch.tensor(n))
    torch.testing.assert_close(w, double(0.02, 1.98), rtol=0, atol=1e-9)  # the 1e-12 in clamp


def test_the_slower_task_gains_weight():
    """Equal norms, L~ = (1, 1/2): alpha > 0 raises w_0, alpha < 0 raises w_1."""
    for alpha, sign in ((1.5, 1), (-1.5, -1)):
        w = balancer([1, 1], alpha=alpha, L0=[1.0, 1.0]).update(double(1, 0.5), double(1, 1))
        assert sign * (w[0] - w[1]) > 0.04  # 2 lr = 0.05


def test_alpha_zero_equalises_the_gradient_norms():
    """Fixed n: w_i n_i all equal and sum(w) = T give w = T (1/n) / sum(1/n)."""
    n = double(1, 4, 10)
    b = balancer([1, 1, 1], alpha=0, lr=1e-3)
    for _ in range(4000):
        w = b.update(double(3, 2, 1), n)
    expected = 3 / n / (1 / n).sum()
    torch.testing.assert_close(w, expected, rtol=0, atol=0.02)  # sign steps of lr keep jittering


def test_the_gradient_is_autograds_with_the_target_constant():
    """d/dw sum|w_i n_i - const|, const = mean(w n) r^alpha."""
    rng = np.random.default_rng(0)
    differs = 0
    for _ in range(20):
        w0, L, n = (torch.tensor(rng.uniform(0.2, 2, 4)) for _ in range(3))
        b = balancer(w0.tolist(), L0=[1.0] * 4)
        b.update(L, n)
        grads = []
        for constant in (True, False):
            w = w0.clone().requires_grad_()
            target = (w * n).mean() * (L / L.mean()) ** 1.5
            target = target.detach() if constant else target
            (w * n - target).abs().sum().backward()
            grads.append(w.grad)
        # As above: (1 - beta1) gradient; float64
        torch.testing.assert_close(b.m, 0.1 * grads[0], rtol=1e-12, atol=0)
        differs += not torch.allclose(grads[1], grads[0])
    assert differs > 10  # a target that is not constant would show


def test_permuting_the_tasks_permutes_the_weights():
    rng = np.random.default_rng(0)
    order = [2, 0, 3, 1]
    w0, L, n = rng.uniform(0.3, 2, 4), *rng.uniform(0.3, 2, (2, 20, 4))
    a, b = balancer(w0, w_min=0.01), balancer(w0[order], w_min=0.01)
    for L_t, n_t in zip(torch.tensor(L), torch.tensor(n)):
        wa, wb = a.update(L_t, n_t), b.update(L_t[order], n_t[order])
    torch.testing.assert_close(wb, wa[order], rtol=1e-10, atol=0)  # float64, sums reordered


def test_a_saved_state_continues_identically():
    rng = np.random.default_rng(0)
    steps = [tuple(torch.tensor(rng.uniform(0.3, 2, (2, 3)))) for _ in range(20)]
    a, file = balancer([1, 0.01, 2], w_min=0.01), io.BytesIO()
    for s in steps[:10]:
        a.update(*s)
    torch.save(a.state_dict(), file)
    file.seek(0)
    b = balancer([9, 9, 9], w_min=0.01)
    b.load_state_dict(torch.load(file, weights_only=True))
    for s in steps[10:]:
        assert torch.equal(a.update(*s), b.update(*s))


@pytest.mark.parametrize("key", ["w", "L0", "m", "v", "steps"])
def test_a_state_without_one_of_its_parts_is_an_error(key):
    a = balancer([1, 2])
    state = a.state_dict()
    del state[key]
    with pytest.raises(KeyError, match=key):
        a.load_state_dict(state)


def test_L0_is_the_first_losses_and_stays():
    b = balancer([1, 1])
    b.update(double(3, 5), double(1, 1))
    b.update(double(2, 1), double(1, 1))
    assert b.L0.tolist() == [3, 5]


def test_the_first_update_without_L0_has_r_equal_to_one():
    """L~ = 1 for all: the target is mean(G), whatever the losses' scale and alpha."""
    w = balancer([1, 1]).update(double(1000, 0.01), double(1, 2))
    assert w[0] > w[1]


def test_a_loss_that_is_not_a_number_does_not_reach_the_weights():
    b = balancer([1.0, 1.0])
    assert torch.isfinite(b.update(double(math.nan, 1.0), double(math.nan, 1.0))).all()


@pytest.mark.parametrize("L, n", [((2, 0), (1, 0)), ((2, 4), (1, 0))])
def test_an_unlabelled_task_leaves_the_gradient_at_zero(L, n):
    """n_1 = 0, and L_1 too, at first: no gradient, no NaN, and L0_1 waits for a first loss."""
    b = balancer([1.5, 0.5], w_min=0.01)
    w = b.update(double(*L), double(*n))
    assert b.m.tolist() == [0, 0]
    torch.testing.assert_close(w, double(1.5, 0.5), rtol=1e-12, atol=0)  # float64
    w = b.update(double(1, 4), double(1, 1))
    assert b.L0.tolist() == [2, 4] and w.isfinite().all() and w.sum().item() == pytest.approx(2)


SIGMAS = {2: (1.0, 100.0), 10: tuple(100 ** (k / 9) for k in range(10))}


def toy_problem(seed, sigmas, gradnorm, steps, lr=1e-3):
    """The paper's toy: f_i(x) = sigma_i tanh((B + eps_i) x); sum L_i(end) / L_i(0), weights."""
    torch.manual_seed(seed)
    B = 10 * torch.randn(100, 250)
    maps = [B + 3.5 * torch.randn(100, 250) for _ in sigmas]
    layers = [layer for k in range(4) for layer in (nn.Linear(100 if k else 250, 100), nn.ReLU())]
    trunk, heads = nn.Sequential(*layers), nn.ModuleList(nn.Linear(100, 100) for _ in sigmas)
    optimizer = torch.optim.Adam([*trunk.parameters(), *heads.parameters()], lr=lr)
    b = jg.GradNorm([1.0] * len(sigmas), alpha=0.12, w_min=1e-3)

    def losses(n):
        x = torch.randn(n, 250)
        P = trunk(x)
        return [(head(P) - sigma * torch.tanh(x @ m.T)).square().mean()
                for head, sigma, m in zip(heads, sigmas, maps)]

    with torch.no_grad():
        first = torch.stack(losses(2000))
    for _ in range(steps):
        L = losses(100)
        w = b.w.clone()
        if gradnorm:
            n = torch.stack([torch.autograd.grad(L_i, trunk[-2].weight, retain_graph=True)[0].norm()
                             for L_i in L])
        optimizer.zero_grad()
        (w * torch.stack(L)).sum().backward()
        optimizer.step()
        if gradnorm:
            b.update(torch.stack(L).detach(), n)
    with torch.no_grad():
        return (torch.stack(losses(2000)) / first).sum().item(), b.w


@pytest.mark.parametrize("T, steps", [(2, 1000), (10, 200)])
def test_gradnorm_beats_equal_weights_on_the_papers_toy_problem(T, steps):
    """Fresh data, three seeds, Adam 1e-3: equal weights let sigma = 100 own the trunk."""
    runs = {rule: [toy_problem(seed, SIGMAS[T], rule, steps) for seed in range(3)]
            for rule in (False, True)}
    equal, gradnorm = (np.array([total for total, _ in runs[rule]]) for rule in (False, True))
    print(f"T = {T}: equal {equal}, GradNorm {gradnorm}, w {runs[True][0][1].tolist()}")
    assert gradnorm.mean() < equal.mean()
    assert (gradnorm < equal).all()  # no seed against it
    assert (gradnorm < T).all()  # T: where both start
    for _, w in runs[True]:
        assert w[0] > 1 > w[-1]  # the small sigma gains, the large one loses


# --------------------------------------------------------------------------------------------------
# 8. Step: one batch -> gradients of sum(w_i L_i), and each task's gradient at W and P3
# --------------------------------------------------------------------------------------------------


class Last(nn.Module):
    """A trunk of float64 whose last convolution is W."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 5, 3, 2), nn.BatchNorm2d(5), nn.SiLU(),
                                  nn.Conv2d(5, 4, 3), nn.BatchNorm2d(4), nn.SiLU())

    @property
    def W(self):
        return self.body[3].weight

    def forward(self, x):
        return self.body(x)


def double_part(T):
    """A joint network, T losses and a batch, float64 throughout; each task another scale."""
    torch.manual_seed(T)
    heads = {f"t{k}": nn.Sequential(nn.Conv2d(4, 3, 3), nn.Tanh(), nn.Flatten(),
                                    nn.LazyLinear(2)) for k in range(T)}
    part = jg.JointNet(Last(), heads).double()
    batch = jg.Batch(torch.randn(4, 3, 16, 20, dtype=torch.float64), None, None)
    part(batch.images)
    losses = {f"t{k}": (lambda y, b, k=k: 10.0**k * (y - k).square().mean()) for k in range(T)}
    return part, losses, batch


def gradients(part, how, batch, losses, w):
    part.zero_grad()
    signals = how(part, batch, losses, w)
    return signals, torch.cat([p.grad.reshape(-1) for p in part.parameters()])


def direct(part, losses, batch):
    """Each task's gradient at W and at P3 by a full autograd.grad of the unweighted loss."""
    P3 = part.trunk(batch.images)
    L = [losses[task](head(P3), batch) for task, head in part.heads.items()]
    at = [torch.autograd.grad(L_i, (part.trunk.W, P3), retain_graph=True) for L_i in L]
    return torch.stack(L).detach(), *([a[k].reshape(-1) for a in at] for k in (0, 1))


def pairs_mean(function, vectors):
    return np.mean([function(a, b) for a, b in itertools.combinations(vectors, 2)])


def cosine(a, b):
    return (a @ b / (a.norm() * b.norm())).item()


def magnitude(a, b):
    return (2 * a.norm() * b.norm() / (a @ a + b @ b)).item()


@pytest.mark.parametrize("w", [(1.0,), (1.0, 0.01), (0.3, 1.7), (1e-6, 2.0), (0.5, 1.2, 1.3)])
def test_backward_leaves_the_gradient_of_the_weighted_sum(w):
    """The cut at P3 changes no parameter's gradient: that of sum(w_i L_i), one graph."""
    part, losses, batch = double_part(len(w))
    weights = torch.tensor(w, dtype=torch.float64)
    signals, cut = gradients(part, jg.backward, batch, losses, weights)
    other, plain = gradients(part, jg.plain_backward, batch, losses, weights)
    assert (cut - plain).norm() <= 1e-12 * plain.norm()  # float64, a few hundred roundings
    torch.testing.assert_close(signals.L, other.L, rtol=1e-12, atol=0)  # same


@pytest.mark.parametrize("w", [(1.0, 0.01), (1e-6, 2.0), (0.5, 1.2, 1.3)])
def test_signals_are_those_of_the_unweighted_losses(w):
    """n_i = ||dL_i/dW|| and the cosines are free of w; the similarity is of w_i dL_i/dP3."""
    part, losses, batch = double_part(len(w))
    signals, _ = gradients(part, jg.backward, batch, losses, double(*w))
    L, at_W, at_P3 = direct(part, losses, batch)
    weighted = [w_i * g for w_i, g in zip(w, at_P3)]
    n = torch.stack([g.norm() for g in at_W])
    torch.testing.assert_close(signals.n, n, rtol=1e-10, atol=0)  # float64 sums
    at_cut, similarity = jg.similarities(signals.gram_P3)
    assert jg.similarities(signals.gram_W)[0].item() == pytest.approx(pairs_mean(cosine, at_W),
                                                                      abs=1e-10)
    # P3's gradients are compared in float32
    assert at_cut.item() == pytest.approx(pairs_mean(cosine, at_P3), abs=1e-5)
    assert similarity.item() == pytest.approx(pairs_mean(magnitude, weighted), rel=1e-5)


def test_a_single_task_has_no_signals_but_its_loss():
    part, losses, batch = double_part(1)
    signals, _ = gradients(part, jg.backward, batch, losses, double(0.5))
    assert signals[1:] == (None, None, None)


@pytest.mark.parametrize("w", [(1.0, 1.0), (1.0, 2.0**-7), (2.0**-9, 2.0)])
def test_backward_of_the_real_network_equals_the_plain_step(w):
    """Float64 but for the heads' .float(); powers of two as weights scale float32 exactly."""
    network, losses, batch = joint_case()
    part = network.double().parts[0]
    batch = batch._replace(images=batch.images.double())
    w = torch.tensor(w)
    signals, cut = gradients(part, jg.backward, batch, losses, w)
    _, plain = gradients(part, jg.plain_backward, batch, losses, w)
    assert (cut - plain).norm() <= 1e-10 * plain.norm()  # float64 sums
    _, at_W, at_P3 = direct(part, losses, batch)
    n = torch.stack([g.norm() for g in at_W])
    torch.testing.assert_close(signals.n, n, rtol=1e-10, atol=0)  # float64 sums
    # P3's gradients are compared in float32
    at_cut, similarity = jg.similarities(signals.gram_P3)
    assert at_cut.item() == pytest.approx(cosine(*at_P3), abs=1e-5)
    weighted = [w_i * g for w_i, g in zip(w, at_P3)]
    assert similarity.item() == pytest.approx(magnitude(*weighted), rel=1e-4)


# --------------------------------------------------------------------------------------------------
# 9. Metrics: network, data -> average precision, accuracy
# --------------------------------------------------------------------------------------------------

GRID = np.array([[10.0, 20, 40, 30], [60, 10, 70, 50], [5, 60, 25, 95]])  # x1 y1 x2 y2, apart


def rows(boxes, scores, classes):
    return np.column_stack([boxes, scores, np.full(len(boxes), classes)])


def test_perfect_detections_have_average_precision_one_and_an_absent_class_has_none():
    truth = [np.column_stack([[0, 2, 0], GRID]), np.zeros((0, 5))]
    found = [rows(GRID, [0.9, 0.8, 0.7], [0, 2, 0]), np.zeros((0, 6))]
    ap = jg.average_precision(truth, found, 3, 300, np.array([0.5, 0.95]))
    np.testing.assert_allclose(ap[:, [0, 2]], 1, rtol=1e-12)  # ratios of whole numbers
    assert np.isnan(ap[:, 1]).all() and ap.shape == (2, 3)


def test_average_precision_of_a_hand_computed_case():
    """True, false, true of two boxes: precision 1 to recall 1/2, then 2/3; 101 recalls."""
    truth = [np.column_stack([[0, 0], GRID[:2]])]
    found = [rows(GRID[[0, 2, 1]], [0.9, 0.8, 0.7], 0)]
    ap = jg.average_precision(truth, found, 1, 300, np.array([0.5]))
    assert ap[0, 0] == pytest.approx((51 + 50 * 2 / 3) / 101, rel=1e-12)  # ratios


def test_average_precision_honours_its_thresholds():
    """A box of 30 x 10 px against one of 21 x 10 px inside it: IoU 0.7."""
    truth, found = [np.array([[0, 10.0, 20, 40, 30]])], [np.array([[10.0, 20, 31, 30, 0.9, 0]])]
    ap = jg.average_precision(truth, found, 1, 300, np.array([0.5, 0.65, 0.75]))
    assert ap[:, 0].tolist() == pytest.approx([1, 1, 0], rel=1e-12)  # ratios


@pytest.mark.parametrize("max_det, recalls", [(300, 101), (100, 67)])
def test_average_precision_counts_max_det_detections(max_det, recalls):
    """150 perfect boxes: of 100 counted, recall stops at 2/3, which 67 of 101 recalls reach."""
    x, y = np.meshgrid(np.arange(15) * 20.0, np.arange(10) * 20.0)
    low = np.column_stack([x.ravel(), y.ravel()])
    boxes = np.concatenate([low, low + [12, 7]], 1)
    truth = [np.column_stack([np.zeros(150), boxes])]
    found = [rows(boxes, np.linspace(0.9, 0.1, 150), 0)]
    ap = jg.average_precision(truth, found, 1, max_det, np.array([0.5]))
    assert ap[0, 0] == pytest.approx(recalls / 101, rel=1e-12)  # ratios of whole numbers


def test_no_detection_at_all_scores_zero_only_where_there_are_boxes():
    ap = jg.average_precision([np.column_stack([[1], GRID[:1]])], [np.zeros((0, 6))], 2, 300,
                              np.array([0.5]))
    assert np.isnan(ap[0, 0]) and ap[0, 1] == 0


def test_accuracies_by_hand():
    """Truth 0001, guess 0011: 3/4; classes 2/3, 1, none; balanced (2/3 + 1) / 2."""
    accuracy, balanced, each = jg.accuracies(np.array([0, 0, 0, 1]), np.array([0, 0, 1, 1]), 3)
    assert accuracy == 0.75 and balanced == pytest.approx(5 / 6)
    np.testing.assert_allclose(each, [2 / 3, 1, np.nan])


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_restores_the_mode_and_draws_no_random_number(training):
    """Else evaluating would change the training that follows it."""
    config = make("dropout=0.5")
    _, val_set = jg.load_data(config)
    network = jg.Network(config, 4, 3, ANCHORS.numpy()).train(training)
    before, state = torch.get_rng_state(), {k: v.clone() for k, v in network.state_dict().items()}
    first = jg.evaluate(network, val_set, config, np.linspace(0.5, 0.95, 10))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(m.training == training for m in network.modules())
    assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
    assert jg.evaluate(network, val_set, config, np.linspace(0.5, 0.95, 10)) == first


# --------------------------------------------------------------------------------------------------
# 10. Training: config, data -> a trained network, epoch by epoch
# --------------------------------------------------------------------------------------------------

FILES = ("config.yaml", "metrics.jsonl", "results.json", "figure.png", "last.pt", "best.pt")


def run_main(out: Path, *overrides, more=()) -> int:
    return jg.main(["--out", str(out), *more, "--set", *TINY, *overrides])


def failed(capsys, code: int, match: str) -> None:
    """One `error:` line on stderr that matches, and the exit code."""
    result, lines = code, [x for x in capsys.readouterr().err.splitlines() if "warning" not in x]
    assert result and len(lines) == 1 and re.search("^error: .*" + match, lines[0]), lines


def outcome(out: Path) -> tuple:
    """All that must not differ between two runs: log, results, checkpoints."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    results = json.loads((out / "results.json").read_text())
    for row in rows:
        row.pop("time", None)
    for key in ("time", "environment", "peak_rss_mb"):
        del results[key]
    return rows, results


def assert_same(a: Path, b: Path) -> None:
    assert outcome(a) == outcome(b)
    for name in ("last.pt", "best.pt"):
        x, y = (jg.load_checkpoint(out / name) for out in (a, b))
        assert same(x, y), name


def same(x, y) -> bool:
    if isinstance(x, torch.Tensor):
        return torch.equal(x, y)
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(same(x[k], y[k]) for k in x)
    if isinstance(x, (list, tuple)):
        return len(x) == len(y) and all(map(same, x, y))
    return x == y


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Path]:
    """A finished tiny run of every mode."""
    base = tmp_path_factory.mktemp("runs")
    for mode in jg.MODES:
        assert run_main(base / mode, more=["--mode", mode]) == 0
    return {mode: base / mode for mode in jg.MODES}


@pytest.mark.parametrize("mode", jg.MODES)
def test_run_writes_the_contract(runs, mode):
    """DESIGN section 5: files and keys that scripts rely on."""
    assert sorted(p.name for p in runs[mode].iterdir()) == sorted(FILES)
    results = json.loads((runs[mode] / "results.json").read_text())
    assert set(results) >= {"schema", "mode", "seed", "data", "config", "environment", "parameters",
                            "flops_per_image", "weights", "loss", "val", "interference", "time",
                            "peak_rss_mb"}
    assert results["mode"] == mode and results["config"]["mode"] == mode
    assert set(results["parameters"]) == {"total", "trunk", "det", "cls"}
    assert set(results["weights"]) == {"initial", "final", "change"}
    assert set(results["loss"]) == {"mean", "final"}
    assert set(
        results["val"]) == {"mAP50", "mAP50-95", "accuracy", "balanced_accuracy", "per_class"}
    assert set(results["time"]) >= {"train_s", "step_ms", "images_per_s"}
    assert (results["interference"] is None) == (mode in ("detect", "classify", "dual"))
    if results["interference"]:
        assert set(results["interference"]) >= {"cosine_mean", "conflict_share",
                                                "magnitude_similarity"}
    assert (results["val"]["mAP50"] is None) == (mode == "classify")
    assert (results["val"]["accuracy"] is None) == (mode == "detect")
    rows = outcome(runs[mode])[0]
    assert [r["step"] for r in rows] == list(range(12)) and results["steps"] == 12
    assert [r["epoch"] for r in rows if "val" in r] == [1, 2]  # every second, and the last
    config = yaml.safe_load((runs[mode] / "config.yaml").read_text())
    assert config == results["config"] and jg.make_config(config).mode == mode
    weights = results["weights"]["initial"]
    assert weights == ([1.0, 0.01] if mode in ("fixed", "gradnorm") else [1.0] * len(weights))
    assert any(abs(c) > 1e-6 for c in results["weights"]["change"]) == (mode == "gradnorm")


@pytest.mark.parametrize("mode", ["gradnorm", "dual"])
def test_two_runs_give_the_same_numbers(runs, tmp_path, mode):
    assert run_main(tmp_path, more=["--mode", mode]) == 0
    assert_same(runs[mode], tmp_path)


def test_seed_changes_the_numbers(runs, tmp_path):
    assert run_main(tmp_path, more=["--mode", "gradnorm", "--seed", "1"]) == 0
    assert outcome(runs["gradnorm"])[0][0]["L/det"] != outcome(tmp_path)[0][0]["L/det"]


@pytest.mark.parametrize("interval", [1, 3])
def test_evaluation_does_not_touch_training(runs, tmp_path, interval):
    """An evaluation that drew random numbers or moved BatchNorm would change what follows it."""
    assert run_main(tmp_path, f"eval_interval={interval}", more=["--mode", "gradnorm"]) == 0
    a, b = (jg.load_checkpoint(out / "last.pt")["run"] for out in (runs["gradnorm"], tmp_path))
    del a["best"], b["best"]
    assert same(a, b)


def interrupt(out: Path, config: jg.Config, epochs: int) -> jg.Run:
    """The folder of a run that ended after some epochs."""
    data = jg.load_data(config)
    run = jg.Run(config, data[0], torch.device("cpu"))
    jg.write_atomic(out / "config.yaml", yaml.safe_dump(jg.clean(jg.asdict(config))))
    for _, rows in zip(range(epochs), jg.train(run, *data)):
        jg.save_epoch(run, jg.clean(rows), data[0], out)
    return run


@pytest.mark.parametrize("mode", ["gradnorm", "dual"])
@pytest.mark.parametrize("cut", ["clean", "half a row", "row that ends in a brace"])
def test_resumed_run_equals_the_uninterrupted_one(runs, tmp_path, mode, cut):
    """A log may end in the middle of a row, also just after an inner brace."""
    interrupt(tmp_path, tiny(mode=mode), 1)
    tail = {"clean": "", "half a row": '{"step": 4, "ep',
            "row that ends in a brace": '{"step": 4, "epoch": 1, "time": {"train_s": 1}'}[cut]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(tail)
    assert jg.main(["--resume", str(tmp_path)]) == 0
    assert_same(runs[mode], tmp_path)


def test_resume_of_a_finished_run_changes_nothing(runs, tmp_path):
    for name in FILES:
        (tmp_path / name).write_bytes((runs["fixed"] / name).read_bytes())
    assert jg.main(["--resume", str(tmp_path)]) == 0
    assert_same(runs["fixed"], tmp_path)
    assert jg.main(["--resume", str(tmp_path), "--set", "workers=1"]) == 0  # changes no number


def start(*arguments) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, jg.__file__, *map(str, arguments)],
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_killed_run_resumes_to_the_same_result(tmp_path):
    """SIGKILL leaves no time to tidy up; what is on disk must be enough, wherever it struck."""
    settings_of_run = ["epochs=8", "train_images=32"]
    assert run_main(tmp_path / "whole", *settings_of_run) == 0
    out, rng, kills = tmp_path / "killed", random.Random(0), 0
    arguments, log = ["--out", out, "--set", *TINY, *settings_of_run], out / "metrics.jsonl"
    rows = lambda: log.read_bytes().count(b"\n") if log.exists() else 0  # noqa: E731
    while kills < 2:
        before, process = rows(), start(*arguments)
        deadline = time.time() + 40
        while process.poll() is None and rows() <= before and time.time() < deadline:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        kills += 1
        arguments = ["--resume", out]
    assert jg.main(["--resume", str(out)]) == 0
    assert_same(tmp_path / "whole", out)
    assert not list(out.glob("*.part"))


def test_poisoned_parameter_ends_the_run_with_its_step(tmp_path, capsys):
    """NaN must stop training before it is saved: last.pt stays as it was."""
    run = interrupt(tmp_path, tiny(), 1)
    state = jg.load_checkpoint(tmp_path / "last.pt")
    next(iter(state["run"]["network"].values())).fill_(math.nan)
    jg.write_atomic(tmp_path / "last.pt", state)
    before = (tmp_path / "last.pt").read_bytes()
    capsys.readouterr()
    code = jg.main(["--resume", str(tmp_path)])
    failed(capsys, code, "step 4: L/det, .*not finite")
    assert code == 1 and (tmp_path / "last.pt").read_bytes() == before
    next(run.network.parameters()).data.fill_(math.nan)
    with pytest.raises(jg.NonFinite, match="step 4: "):
        next(jg.train(run, *jg.load_data(tiny())))


class Bomb:
    """Unpickles into a shell command."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def foreign(folder: Path, kind: str) -> Path:
    path, marker = folder / "x.pt", folder / "ran"
    if kind == "pickle bomb":
        path.write_bytes(pickle.dumps(Bomb(marker)))
    elif kind == "torch bomb":
        torch.save({"format": "jointgrad/1", "run": Bomb(marker)}, path)
    elif kind in ("garbage", "empty"):
        path.write_bytes(b"garbage" * 99 if kind == "garbage" else b"")
    elif kind == "folder":
        path.mkdir()
    elif kind != "absent":
        torch.save({"foreign": {"model": torch.ones(3)}, "tensor": torch.ones(3),
                    "hollow": {"format": "jointgrad/1", "run": {}},
                    "no run": {"format": "jointgrad/1", "run": None, "config": shipped(),
                               "names": ["a"], "classification_names": ["b"]}}[kind], path)
    return path


KINDS = ("pickle bomb", "torch bomb", "garbage", "empty", "folder", "absent", "foreign", "tensor",
         "hollow", "no run")


@pytest.mark.parametrize("kind", KINDS)
def test_foreign_checkpoint_is_one_line_and_runs_no_code(tmp_path, capsys, kind):
    path = foreign(tmp_path, kind)
    code = jg.main(["--mode", "predict", "--checkpoint", str(path), "--out", str(tmp_path / "out")])
    failed(capsys, code, r"x\.pt: ")
    assert code == 2 and not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [k for k in KINDS if k not in ("absent", "folder")])
def test_resume_from_a_foreign_checkpoint_is_one_line(runs, tmp_path, capsys, kind):
    path = foreign(tmp_path, kind)
    path.rename(tmp_path / "last.pt")
    for name in ("config.yaml", "metrics.jsonl"):
        (tmp_path / name).write_bytes((runs["fixed"] / name).read_bytes())
    capsys.readouterr()
    failed(capsys, jg.main(["--resume", str(tmp_path)]), r"last\.pt: ")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("setting", ["width_multiple=0.0625", "lr=0.001", "mode=gradnorm",
                                     "epochs=1", "epochs=9"])
def test_resume_with_other_settings_is_one_line(runs, tmp_path, capsys, setting):
    """last.pt brings its own optimizers and w: results.json would name settings never used."""
    for name in ("config.yaml", "metrics.jsonl", "last.pt"):
        (tmp_path / name).write_bytes((runs["fixed"] / name).read_bytes())
    capsys.readouterr()
    code = jg.main(["--resume", str(tmp_path), "--set", setting])
    failed(capsys, code, r"last\.pt: does not fit")
    assert code == 2


@pytest.mark.parametrize("log", [None, "", "garbage\n", "[1]\n", "\xff\n"])
def test_resume_with_a_damaged_log_is_one_line(runs, tmp_path, capsys, log):
    for name in ("config.yaml", "last.pt"):
        (tmp_path / name).write_bytes((runs["fixed"] / name).read_bytes())
    if log is not None:
        (tmp_path / "metrics.jsonl").write_bytes(log.encode("latin-1"))
    capsys.readouterr()
    code = jg.main(["--resume", str(tmp_path)])
    failed(capsys, code, r"last\.pt: does not fit .*metrics\.jsonl")
    assert code == 2 and (tmp_path / "last.pt").exists()


def test_bf16_on_the_cpu_stays_finite(tmp_path):
    assert run_main(tmp_path, "amp=bf16", "epochs=2", more=["--mode", "gradnorm"]) == 0
    rows, results = outcome(tmp_path)
    assert all(math.isfinite(v) for row in rows for v in row.values() if isinstance(v, float))
    assert results["weights"]["final"] == pytest.approx(rows[-1] and results["weights"]["final"])
    assert sum(results["weights"]["final"]) == pytest.approx(2, abs=1e-4)


def test_predictor_gives_boxes_inside_the_image_and_probabilities(runs):
    """Boxes come back from the canvas in px of the image, whatever its aspect."""
    for mode in ("gradnorm", "dual", "detect", "classify"):
        predictor = jg.Predictor(runs[mode] / "best.pt")
        for size in ((300, 100), (17, 90), (1, 1)):
            found = predictor(picture(size, (90, 30, 10)))
            boxes = np.array([b["box_xyxy"] for b in found["boxes"]]).reshape(-1, 4)
            assert (boxes >= 0).all() and (boxes <= np.array(size * 2)).all()
            assert (boxes[:, 2:] >= boxes[:, :2]).all() and {b["name"]
                                                             for b in found["boxes"]} <= set(
                                                                 jg.JETS)
            scores = [b["score"] for b in found["boxes"]]
            assert scores == sorted(scores, reverse=True)
            least = float(np.median(scores)) if scores else 0.5
            shown = predictor(picture(size, (90, 30, 10)), least)["boxes"]
            assert shown == [b for b in found["boxes"] if b["score"] >= least]
            if mode == "detect":
                assert found["classification"] is None
            else:
                probs = found["classification"]["probs"]
                assert sum(probs.values()) == pytest.approx(1) and set(probs) == set(jg.VIEWS)
                assert probs[found["classification"]["name"]] == max(probs.values())
            assert (mode != "classify") or not found["boxes"]


RANKS = '''
import os, sys
import torch
import jointgrad as jg


def steps(run, data, first):
    batch = jg.to_device(data.__getitems__(list(range(first, first + 8))), torch.device("cpu"))
    out = []
    for _ in range(4):
        jg.train_step(run, batch, 0.5)
        out.append(run.w.tolist())
    return out


def work(rank, config, port, folder):
    torch.set_num_threads(1)
    data, _ = jg.load_data(config)
    alone = steps(jg.Run(config, data, torch.device("cpu")), data, 0) if rank == 0 else None
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    same = steps(jg.Run(config, data, torch.device("cpu")), data, 0)
    apart = steps(jg.Run(config, data, torch.device("cpu")), data, 8 * rank)
    torch.save({"alone": alone, "same": same, "apart": apart}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    config = jg.load_config(jg.ROOT / "config.yaml", sys.argv[3:])
    torch.multiprocessing.spawn(work, (config, int(sys.argv[1]), sys.argv[2]), nprocs=2)
'''


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_weights_agree_on_all_ranks_and_with_one_process(tmp_path):
    """Norms are taken of the mean gradient, so ranks with other data get the same weights; on the
    same data two ranks are one process, up to rounding (1e-4: four Adam steps)."""
    (tmp_path / "ranks.py").write_text(RANKS)
    environment = os.environ | {"PYTHONPATH": str(jg.ROOT)}
    subprocess.run([sys.executable, tmp_path / "ranks.py", str(free_port()), tmp_path, *TINY,
                    "train_images=16", "val_images=2", "dropout=0"], check=True, env=environment,
                   timeout=80, capture_output=True)
    a, b = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert a["same"] == b["same"] and a["apart"] == b["apart"] and a["same"] != a["apart"]
    assert np.allclose(a["same"], a["alone"], atol=1e-4)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_processes_train_one_run(tmp_path):
    """torchrun: one results.json, half the steps (32 images over 2 x 8 a step, 3 epochs)."""
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
                    "--master-port", str(free_port()), jg.__file__, "--out", tmp_path / "out",
                    "--set", *TINY], check=True, capture_output=True, timeout=80)
    rows, results = outcome(tmp_path / "out")
    assert results["steps"] == len(rows) == 6 and sorted(
        p.name for p in (tmp_path / "out").iterdir()) == sorted(FILES)
    whole = json.loads((tmp_path / "out" / "results.json").read_text())
    assert whole["environment"]["processes"] == 2
    images = whole["time"]["images_per_s"] * whole["time"]["train_s"]
    assert images == pytest.approx(3 * 32)  # 3 epochs, of both ranks


def test_training_set_that_leaves_a_rank_without_a_batch_is_a_user_error():
    config = tiny("train_images=2")
    run = jg.Run(config, (data := jg.load_data(config))[0], torch.device("cpu"))
    run.world = 2  # one image each
    with pytest.raises(jg.UserError, match="fewer than two images a process"):
        next(jg.train(run, *data))


def test_weight_decay_falls_on_kernels_alone():
    """Biases and BatchNorm are (c,), kernels (c_out, c_in, k, k) and (c_out, c_in)."""
    run = jg.Run(make("mode=dual", "weight_decay=0.25"), jg.load_data(make())[0],
                 torch.device("cpu"))
    for part, optimizer in zip(run.network.parts, run.optimizers):
        decay = {p: group["weight_decay"] for group in optimizer.param_groups
                 for p in group["params"]}
        assert set(decay) == set(part.parameters())
        assert all(decay[p] == (0.25 if p.ndim > 1 else 0) for p in decay)


def test_log_rows_by_hand():
    """w L sums to the loss, w n to G; gram [[4, 2], [2, 9]]: cosine 2/6, similarity 2 6 / 13."""
    gram = torch.tensor([[4.0, 2], [2, 9]])
    step = {"L": torch.tensor([3.0, 4]), "w": torch.tensor([0.5, 1.5]), "gram_P3": gram,
            "gram_W": gram * 0, "n": torch.tensor([2.0, 4]), "grad_norm": torch.tensor(7.0)}
    first, second = jg.log_rows([step, step | {"w": torch.tensor([2.0, 0])}], ("det", "cls"))
    assert first == pytest.approx({
        "L/det": 3, "L/cls": 4, "w/det": 0.5, "w/cls": 1.5, "grad_norm": 7, "G/det": 1, "G/cls": 6,
        "cosine": 1 / 3, "similarity": 12 / 13, "cosine_W": 0, "loss": 7.5})
    assert (second["loss"], second["G/det"], second["G/cls"]) == (6, 4, 0)


def snippets() -> list[str]:
    """The code blocks of the README's section on use from Python."""
    text = (jg.ROOT / "README.md").read_text(encoding="utf-8")
    section = text.split("### From Python")[1].split("\n## ")[0]
    return [m[0].replace("\n    ", "\n").strip() for m in re.finditer(r"(?:\n    .+)+", section)]


def test_readme_predictor_runs_as_printed(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    Path("runs/gradnorm-synthetic-s0").symlink_to(runs["gradnorm"])
    picture().save("image.png")
    exec(snippets()[0], {})
    assert re.search(f"^({'|'.join(jg.VIEWS)}) \\[", capsys.readouterr().out)


def test_readme_gradnorm_runs_as_printed_on_another_network():
    """Three regressions of other scales on one trunk: the weights move, their sum is T."""
    torch.manual_seed(0)
    trunk, heads, T = nn.Linear(8, 8), nn.ModuleList(nn.Linear(8, 1) for _ in range(3)), 3
    optimizer = torch.optim.SGD([*trunk.parameters(), *heads.parameters()], lr=1e-3)
    x, scope = torch.randn(32, 8), {"jointgrad": jg, "torch": torch, "T": T, "W": trunk.weight,
                                    "optimizer": optimizer}
    make_balancer, *step = snippets()[1].split("\n")
    exec(make_balancer, scope)
    for _ in range(20):
        scope["losses"] = [((head(trunk(x)) - 10**k)**2).mean() for k, head in enumerate(heads)]
        exec("\n".join(step), scope)
    w = scope["balancer"].w
    assert w.sum().item() == pytest.approx(T, abs=1e-5) and w[0] > 1 > w[2]


# --------------------------------------------------------------------------------------------------
# 11. Experiments: many runs -> statistics, verdicts, times
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("df, table", [(1, 12.706), (2, 4.303), (5, 2.571), (11, 2.201)])
def test_t_quantile_equals_the_table(df, table):
    """Tables round to 5e-4; one grid step of the angle is pi / 400,000 times 1 + t^2 / df."""
    step = math.pi / 400_000 * (1 + table**2 / df) * math.sqrt(df)
    assert jg.t_quantile(df) == pytest.approx(table, abs=5e-4 + 2 * step)


def test_interval_by_hand():
    """1, 2, 3: mean 2, standard deviation 1, half-width 4.303 / sqrt 3."""
    q = jg.interval([1, 2, 3])
    half = 4.303 / math.sqrt(3)
    assert q["mean"] == 2 and q["per_seed"] == [1, 2, 3]
    assert q["ci95"] == pytest.approx([2 - half, 2 + half], abs=1e-3)  # the table's rounding
    assert jg.interval([5])["ci95"] is None


@pytest.mark.parametrize("differences, p", [
    ([1, 2, 3, 4, 5, 6], 2 / 64),  # only all + and all - are as far out
    ([0.1] * 6, 2 / 64),
    ([7], 1),
    ([0, 0, 0], 1),
    ([1, -1], 1),
    ([3, 1], 2 / 4),  # sums 4, 2, -2, -4
    ([5, 4, -1], 4 / 8),  # |sum| 8 of 10, 8, 2, 0, twice each
])
def test_sign_flip_p_in_closed_form(differences, p):
    assert jg.sign_flip_p(differences) == p


def test_judge_gives_each_verdict():
    """mode a is 1.2 times b to +-1 %: its interval lies in, beside or across a range."""
    table = {"a": {"m": [1.19, 1.20, 1.21, 1.20]}, "b": {"m": [1.0, 1.0, 1.0, 1.0]}}
    cases = [(["gain", "m", "a", "b"], {"at_least": 10}, "holds", 20),
             (["gain", "m", "b", "a"], {"at_least": 10}, "does not hold", -16.7),
             (["ratio", "m", "a", "b"], {"at_least": 1.2}, "not decided by these data", 1.2),
             (["value", "m", "a"], {"at_most": 1.1}, "does not hold", 1.2),
             (["value", "m", "a"], {"at_least": 1.1, "at_most": 1.3}, "holds", 1.2),
             (["value", "m", "absent"], {"at_least": 0}, None, None)]
    claims = [{"id": str(k), "claim": "", "reported": "", "measure": m} | limits
              for k, (m, limits, _, _) in enumerate(cases)]
    verdicts = jg.judge(claims, table)
    assert [v["verdict"] for v in verdicts] == [c[2] for c in cases[:-1]]
    assert [v["measured"] for v in verdicts] == pytest.approx([c[3] for c in cases[:-1]], abs=0.05)


def test_one_seed_decides_nothing():
    claims = [{"id": "x", "claim": "", "reported": "", "measure": ["value", "m", "a"],
               "at_least": 0}]
    assert jg.judge(claims, {"a": {"m": [5.0]}})[0]["verdict"] == "not decided by these data"


def result(mAP, accuracy):
    val = {"mAP50": mAP, "mAP50-95": mAP, "accuracy": accuracy, "balanced_accuracy": accuracy}
    return {"val": val, "parameters": {"total": 1}, "flops_per_image": 1, "steps": 20,
            "time": {"step_ms": 1.0, "train_cpu_s": 0.02}, "peak_rss_mb": 1.0,
            "curve": [(10, val | {"mAP50": 0.1}), (20, val)]}


def test_delta_m_is_positive_where_a_mode_beats_the_single_tasks():
    """+10 % and +20 % give +15; -20 % and 0 give -10; steps_to_90 is the first step there."""
    results = {("detect", 0): result(0.5, None), ("classify", 0): result(None, 0.5),
               ("fixed", 0): result(0.55, 0.6), ("equal", 0): result(0.4, 0.5)}
    table = jg.quantities(results, ["detect", "classify", "fixed", "equal"], [0])
    assert table["fixed"]["delta_m"] == pytest.approx([15])
    assert table["equal"]["delta_m"] == pytest.approx([-10])
    assert table["fixed"]["mean_rank"] == [1] and table["equal"]["mean_rank"] == [2]
    assert table["fixed"]["steps_to_90_det"] == [20] and np.isnan(table["equal"]["steps_to_90_det"])
    assert "delta_m" not in table["detect"] and "accuracy" not in table["detect"]
    results["detect", 0] = result(0, None)  # as after an epoch: no percentage of nothing
    assert "delta_m" not in jg.quantities(results, list(table), [0])["fixed"]
    boxless = {key: result(None, 0.5) for key in results}  # a val split without boxes
    assert "delta_m" not in jg.quantities(boxless, list(table), [0])["fixed"]


def test_paired_differences_are_mode_less_versus():
    table = {"detect": {"mAP50": [0.5, 0.6]}, "fixed": {"mAP50": [0.6, 0.8]}}
    row = next(r for r in jg.paired(table) if (r["mode"], r["versus"]) == ("fixed", "detect"))
    assert row["delta"] == pytest.approx(0.15) and row["p"] == 0.5


def compare(out: Path, *more) -> int:
    """The command on a set so small that only its course matters, not its result."""
    return jg.main(["--out", str(out), "--set", *TINY[1:], "epochs=1", *more])


def test_compare_writes_its_tables(tmp_path):
    """One seed: six runs, no interval."""
    assert compare(tmp_path, "--mode", "compare", "--seeds", "0") == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["modes"]) == list(jg.MODES) and results["seeds"] == [0]
    assert {c["id"] for c in results["claims"]} >= {"S1", "P1", "G1", "D1"}
    assert "| gradnorm " in (tmp_path / "compare.md").read_text()
    assert len(list(tmp_path.glob("runs/*/results.json"))) == 6
    assert [row[-1] for row in jg.check_rows(results["modes"], results["modes"])] == ["ok"] * 20


def test_check_misses_a_mean_outside_its_interval_alone():
    """Of 0.5 [0.4, 0.6] a mean of 0.6 is in, 0.61 is out; one seed's 0.3 is met exactly or not."""
    recorded = {"fixed": {"mAP50": {"mean": 0.5, "ci95": [0.4, 0.6]},
                          "accuracy": {"mean": 0.3, "ci95": None}, "step_ms": {"mean": 1}}}
    for mAP50, accuracy, verdicts in ((0.6, 0.3, ["ok", "ok"]), (0.61, 0.3, ["OUTSIDE", "ok"]),
                                      (0.4, 0.31, ["ok", "OUTSIDE"])):
        measured = {"fixed": {"mAP50": {"mean": mAP50}, "accuracy": {"mean": accuracy}}}
        assert [row[-1] for row in jg.check_rows(recorded, measured)] == verdicts


def test_sweep_has_a_row_for_each_value_and_repeats_no_finished_run(tmp_path):
    """Values reach the runs as they are, lists too; without single-task runs there is no delta."""
    sweep = ("--mode", "fixed", "--sweep", "initial_weights=[1, 0.5],[1, 2]", "--seeds", "3")
    assert compare(tmp_path, *sweep) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["modes"]) == ["fixed initial_weights=[1,0.5]",
                                      "fixed initial_weights=[1,2]"]
    configs = [json.loads(f.read_text())["config"] for f in tmp_path.glob("runs/*/results.json")]
    assert sorted(c["initial_weights"] for c in configs) == [[1, 0.5], [1, 2]]
    assert all(c["seed"] == 3 for c in configs) and not results["paired"]
    assert (tmp_path / "figure.png").stat().st_size > 0
    made = {f: f.stat().st_mtime_ns for f in tmp_path.glob("runs/*/results.json")}
    assert compare(tmp_path, *sweep) == 0
    assert len(made) == 2 and made == {f: f.stat().st_mtime_ns for f in made}


def test_check_repeats_the_runs_and_never_reads_them_again(tmp_path, capsys):
    """--check on a comparison's own folder would compare it with itself."""
    sweep = ("--mode", "fixed", "--sweep", "epochs=1", "--seeds", "3")
    assert compare(tmp_path / "a", *sweep) == 0
    recorded = tmp_path / "a" / "results.json"
    failed(capsys, jg.main(["--check", str(recorded), "--out", str(tmp_path / "a")]), "new folder")
    assert jg.main(["--check", str(recorded), "--out", str(tmp_path / "b")]) == 0
    assert len(list(tmp_path.glob("b/runs/*/results.json"))) == 1


def test_a_run_is_repeated_where_its_data_changed_since(tmp_path):
    """Corrected labels and the old results beside each other would be a wrong comparison."""
    config, folder = tiny("epochs=1", mode="fixed"), tmp_path / "cell"

    def made(changed):
        jg.run_cell(config, folder, changed)
        return (folder / "results.json").stat().st_mtime_ns

    first = made(0)
    assert made(0) == first and made(time.time() + 60) > first


def test_every_change_of_a_set_counts(tmp_path):
    """An edited data.yaml, label or image, and a deleted label."""
    path = make_set(tmp_path, two())
    config = tiny(data=str(path))
    splits = jg.load_data(config)
    before, later = jg.last_change(config, splits), time.time() + 60
    for file in (path, tmp_path / "labels/train/a.txt", tmp_path / "images/val/v.png"):
        then = file.stat().st_mtime
        os.utime(file, (later, later))
        assert jg.last_change(config, splits) == pytest.approx(later)
        os.utime(file, (then, then))
    assert jg.last_change(config, splits) == before
    (tmp_path / "labels/train/a.txt").unlink()
    assert jg.last_change(config, splits) >= before
    os.utime(tmp_path / "labels/train", (later, later))  # what a deletion does, beyond the clock
    assert jg.last_change(config, splits) == pytest.approx(later)


def test_the_reports_rule_ends_at_0_and_4_and_sums_to_T_squared():
    """w / mean(w) T has the sum T^2 = 4; output norms of CE and BCE stand as 2 sqrt 3.

    At logits 0, per image: ||p - y|| = sqrt(3)/2 against ||(sigmoid - y)|| / 4 = 1/4.
    """
    run = jg.smoke_test(0, "report")
    assert run["w"][:9].tolist() == [[1.0, pytest.approx(0.01)]] * 9  # the first 9 steps
    np.testing.assert_allclose(run["w"][9:].sum(1), 4, rtol=1e-6)  # float32
    np.testing.assert_allclose(run["w"][-1], [0, 4], atol=5e-4)  # printed to 3 digits
    assert run["parameters"] == 1224
    assert run["ratio"] == pytest.approx(2 * math.sqrt(3), rel=0.1)  # logits are not quite 0


def test_gradnorm_on_the_smoke_test_keeps_both_tasks():
    """From the first update on the sum is T = 2, and no weight falls to the floor."""
    run = jg.smoke_test(0, "gradnorm")
    np.testing.assert_allclose(run["w"][1:].sum(1), 2, rtol=1e-6)  # float32
    assert run["w"][-1].min() > 0.01


def smoke_checks():
    """{name: ok} of what one seed of the smoke test gives beside the report's numbers."""
    reported = jg.read_yaml(jg.ROOT / "data" / "reported.yaml")["smoke_test"]
    del reported["mean_loss"]  # lies within the range of ten seeds, not of one
    run = jg.smoke_test(0, "report")
    (det, cls), table = run["w"][-1], {"parameters": [run["parameters"]]}
    table |= {"final_weight_det": [det], "final_weight_cls": [cls], "weight_change_det": [det - 1],
              "weight_change_cls": [cls - 0.01], "train_seconds": [run["seconds"]]}
    return {c["name"]: c["ok"] for c in jg.check_smoke(reported, table)}


def test_check_smoke_holds_for_the_reports_rule():
    checks = smoke_checks()
    assert checks.pop("train_seconds") is None and all(checks.values())


@pytest.mark.parametrize("rule", [
    lambda w, g, G0, r, alpha: (v := w * G0 * r**alpha / g) / v.sum() * 2,  # mean -> sum
    lambda w, g, G0, r, alpha: (v := w * G0 / (w * g)) / v.mean() * 2,  # norms weighted
    lambda w, g, G0, r, alpha: (v := w * g) / v.mean() * 2,  # upside down
], ids=["sum", "feedback", "inverse"])
def test_check_smoke_fails_under_another_rule(rule, monkeypatch):
    monkeypatch.setattr(jg, "report_rule", rule)
    assert smoke_checks()["final_weight_cls"] is False


def test_check_smoke_asks_that_a_spread_holds_the_reported_value():
    reported = {"loss": {"value": 2.0, "tolerance": "spread"}}
    verdicts = [jg.check_smoke(reported, {"loss": x})[0]["ok"] for x in ([1.9, 2.1], [2.1, 2.3])]
    assert verdicts == [True, False]


# --------------------------------------------------------------------------------------------------
# 12. Report: results -> files, tables, figures
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [{"f": lambda: 0}, {"f": open}, "\udc80"])
def test_failed_write_leaves_the_old_file_and_no_part(tmp_path, content):
    """A full disk in the middle of a save must not cost the checkpoint that was there."""
    path = tmp_path / "x.pt"
    jg.write_atomic(path, "old")
    if isinstance(content, dict) and content["f"] is open:
        jg.write_atomic(path, "old")
        content = {"f": (k for k in range(3))}  # a generator cannot be pickled
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError, UnicodeEncodeError),
                       match="pickle|lambda|surrogates"):
        jg.write_atomic(path, content)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.parametrize("value, text", [
    (0.12345, "0.123"), (-0.0001, "0.000"), (12.345, "12.3"), (1234.5, "1,234"), (3, "3"),
    (None, "n/a"), (math.nan, "n/a"), ((1, 0.5), "1 / 0.500"),
    ({"mean": 0.5, "ci95": [0.4, 0.6], "per_seed": [0.4, 0.6]}, "0.500 [0.400, 0.600]"),
    ({"mean": 2.0, "ci95": None}, "2.000"),
    ({"mean": None, "ci95": [None, None], "per_seed": [1, None, 3]}, "n/a in 1 of 3")])
def test_a_tables_cell(value, text):
    """Three digits, no minus before zero, and a mean that misses a seed is none."""
    assert jg.cell(value) == text


def test_json_holds_no_nan(tmp_path):
    """NaN is no JSON; other languages' readers refuse it."""
    jg.write_json(tmp_path / "x.json",
                  {"a": np.float32("nan"), "b": (np.int64(3), math.inf), 1: [True]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": [3, None], "1": [True]}


@pytest.mark.skipif(not LINUX, reason="file size limits are set the Linux way")
def test_a_full_disk_is_one_line_and_leaves_no_half_file(tmp_path):
    """A limit of 100 kB a file stands in for a full disk: a checkpoint does not fit."""
    import resource
    command = [sys.executable, jg.__file__, "--out", str(tmp_path / "run"), "--set", *TINY]
    child = subprocess.run(
        command, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    errors = [line for line in child.stderr.splitlines() if line.startswith("error:")]
    assert child.returncode == 1 and len(errors) == 1 and "last good file is kept" in errors[0]
    assert "Traceback" not in child.stderr and re.search(r"(best|last)\.pt", errors[0])
    assert not list((tmp_path / "run").glob("*.part"))


@pytest.mark.parametrize("threads, batch_size", [(1, 128), (2, 128)])
def test_two_runs_agree_at_any_thread_count_and_batch(tmp_path, threads, batch_size):
    """Sums keep one order at a given thread count; at batch 128 many targets share a cell."""
    logs = []
    for name in "ab":
        run_out = tmp_path / name
        jg_args = ["--out", str(run_out), "--set", f"threads={threads}", f"batch_size={batch_size}",
                   "epochs=2", "train_images=128", "val_images=4", "width_multiple=0.0625"]
        command = [sys.executable, jg.__file__, *jg_args]
        child = subprocess.run(command, capture_output=True, text=True)
        assert child.returncode == 0, child.stderr
        rows = [json.loads(line) for line in (run_out / "metrics.jsonl").read_text().splitlines()]
        logs.append([{k: v for k, v in row.items() if k != "time"} for row in rows])
    assert logs[0] == logs[1]


# --------------------------------------------------------------------------------------------------
# 13. Command line: arguments -> one of the jobs above, files under --out, an exit code
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("setting, match", [
    ("epochs=0", "config key epochs: found 0"), ("epoch=3", "did you mean 'epochs'"),
    ("lr", "expected key=value"), ("data=no/such.yaml", "no/such.yaml: cannot be read"),
    ("epochs=2020-99-99", "epochs"), ("data=/etc", "cannot be read")])
def test_bad_setting_is_one_line_and_writes_nothing(tmp_path, capsys, setting, match):
    code = run_main(tmp_path / "out", setting)
    failed(capsys, code, match)
    assert code == 2 and not (tmp_path / "out").exists()


def test_bad_setting_of_a_real_process_is_one_line(tmp_path):
    process = start("--out", tmp_path / "out", "--set", "lr=fast")
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 2 and error.count("\n") == 1 and not (tmp_path / "out").exists()
    assert error.startswith("error: config key lr: found 'fast', expected a number from")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_absent_gpu_is_a_user_error(tmp_path, capsys):
    code = run_main(tmp_path / "out", more=["--device", "cuda"])
    if code == 0:  # --set device=cpu of TINY
        code = jg.main(["--out", str(tmp_path / "gpu"), "--device", "cuda"])
    failed(capsys, code, "([Cc]uda|CUDA|GPU)")
    assert code == 2 and not (tmp_path / "gpu").exists()


@pytest.mark.parametrize("arguments, match", [
    (["--resume", "no/such"], "no config.yaml"), (["--mode", "predict"], "needs --checkpoint"),
    (["--sweep", "lr=1", "--seeds", "1", "1"], "--seeds.*: expected"),
    (["--check", "no.json"], "no.json: expected"),
    (["--config", "no.yaml"], "no.yaml: cannot be read"),
    (["--mode", "dual", "--sweep", "alpha=0,1"], "--sweep alpha: .*read by: gradnorm"),
    (["--mode", "equal", "--sweep", "initial_weights=[1,1]"], "read by: gradnorm, fixed"),
    (["--sweep", "seed=0,1"], "--sweep seed: changes nothing"),
    (["--seeds", "1"], "--seeds: not read here"), (["--source", "x"], "--source: not read here"),
    (["--checkpoint", "x.pt"], "--checkpoint: not read here"),
    (["--resume", "set", "--out", "x"], "--out: not read here"),
    (["--sweep", "alpha=[0"], "expected key=v1,v2"), (["--sweep", "alpha="], "expected key=v1,v2"),
    (["--set", r'data="a\0b"'], "config key data: found 'a")])
def test_bad_arguments_are_one_line(tmp_path, capsys, monkeypatch, arguments, match):
    monkeypatch.chdir(tmp_path)
    code = jg.main(arguments)
    failed(capsys, code, match)
    assert code == 2 and not list(tmp_path.iterdir())


def test_out_that_is_a_file_is_an_error(tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    failed(capsys, run_main(tmp_path / "out"), "is a file")
    assert (tmp_path / "out").read_text() == "mine"


def test_faults_of_a_set_are_lines_of_their_own(tmp_path, capsys):
    path = make_set(tmp_path / "set", two(text="0 9 9 9 9\nx"))
    code = run_main(tmp_path / "out", more=["--data", str(path)])
    lines = capsys.readouterr().err.splitlines()
    assert code == 2 and len(lines) == 2 and all(x.startswith("error: ") for x in lines)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_cut_image_found_only_while_training_is_one_line(tmp_path, capsys, workers):
    """The header is sound, so the check passes; the pixels are read in a step, or in a worker."""
    noise = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    path = make_set(tmp_path / "set", two(Image.fromarray(noise), name="b.jpg"))
    file = tmp_path / "set/images/train/b.jpg"
    file.write_bytes(file.read_bytes()[:1200])
    jg.image_size(file)
    code = run_main(tmp_path / "out", "cache_mb=0", f"workers={workers}",
                    more=["--data", str(path)])
    failed(capsys, code, "b.jpg: not a readable image")
    assert code == 2


def test_check_of_a_set_without_image_classes_tells_how(tmp_path, capsys):
    """--mode check leaves no room for another --mode."""
    item = picture(), BOX + "\n"
    path = make_set(tmp_path, {"a.png": item, "b.png": item}, {"v.png": item},
                    classification_names=...)
    command = ["--mode", "check", "--data", str(path)]
    failed(capsys, jg.main(command), "no classification_names: .*--set mode=detect")
    assert jg.main([*command, "--set", "mode=detect"]) == 0


def test_check_prints_counts(exported, capsys):
    assert jg.main(["--mode", "check", "--data", str(exported), "--set", *TINY]) == 0
    printed = capsys.readouterr().out
    train, val = jg.load_data(tiny())
    count = lambda name: [int(v) for v in re.search(  # noqa: E731
        rf"\| {name} +\| +(\d+) +\| +(\d+) +\|", printed).groups()]
    assert count("images") == [32, 16] and count("class none") == [0, 0]
    for k, name in enumerate(jg.JETS):
        assert count(f"box {name}") == [int((np.concatenate(s.boxes)[:, 0] == k).sum())
                                        for s in (train, val)]
    for k, name in enumerate(jg.VIEWS):
        assert count(f"class {name}") == [s.labels.count(k) for s in (train, val)]


def test_exported_set_in_an_oddly_named_folder_is_trained_by_a_child(exported, tmp_path):
    """𠮷 is two escapes in JSON and one in YAML; $_$ is no formula."""
    folder = tmp_path / "$_$ 𠮷"
    shutil.copytree(exported.parent, folder)
    config = tiny("epochs=1", mode="fixed", data=str(folder / exported.name))
    result = jg.run_cell(config, tmp_path / "cell", 0)
    assert result["data"] == config.data and result["steps"] == 4


def test_predict_writes_a_picture_for_every_odd_name(runs, tmp_path, capsys):
    """Names are other people's: spaces, accents, dashes, line breaks, 200 letters, bad bytes."""
    source, out = tmp_path / "in", tmp_path / "out"
    names = ["a b.png", "schön 图.png", "-x.PNG", "n" * 200 + ".png", "sub/a b.png", ".dot.png"]
    names += ["a\nb.png", os.fsdecode(b"\xff.png")] if LINUX else []
    for k, name in enumerate(names):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        picture((50 + k, 30)).save(source / name, format="PNG")
    (source / "notes.txt").write_text("not an image")
    arguments = ["--mode", "predict", "--checkpoint", str(runs["gradnorm"] / "best.pt"),
                 "--source", str(source), "--out", str(out), "--device", "cpu"]
    assert jg.main(arguments) == 0
    images = json.loads((out / "predictions.json").read_text())["images"]
    assert sorted(str(source / i["image"]) for i in images) == sorted(
        str(source / name) for name in names)
    assert len({i["picture"] for i in images}) == len(names)
    for i in images:
        assert Image.open(out / i["picture"]).width >= 50
        assert set(i) == {"image", "picture", "boxes", "classification"}


def test_predict_on_a_bad_source_is_one_line(runs, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "bad.png").write_bytes(b"x")
    for source, match in (("in", "no image"), ("none.png", "no image here"),
                          ("bad.png", "not a readable image")):
        capsys.readouterr()
        code = jg.main(["--mode", "predict", "--checkpoint", str(runs["fixed"] / "best.pt"),
                        "--source", str(tmp_path / source), "--out", str(tmp_path / "out")])
        failed(capsys, code, match)
        assert code == 2


def test_predict_on_the_val_split_repeats_the_runs_metrics(runs, tmp_path):
    """last.pt is what results.json speaks of."""
    code = jg.main(["--mode", "predict", "--checkpoint", str(runs["gradnorm"] / "last.pt"),
                    "--out", str(tmp_path), "--device", "cpu"])
    results = json.loads((tmp_path / "predictions.json").read_text())
    assert code == 0 and len(results["images"]) == 16
    assert results["metrics"] == outcome(runs["gradnorm"])[1]["val"]


@pytest.mark.parametrize("job", [[], ["--mode", "predict", "--checkpoint", "best.pt"],
                                 ["--mode", "compare"], ["--mode", "bench"],
                                 ["--mode", "reproduce"]], ids=lambda job: " ".join(job[1:2]))
def test_a_folder_with_other_files_is_left_alone(tmp_path, capsys, job):
    """--out . in a checkout would replace config.yaml; --out of photos, the photos."""
    for name in ("config.yaml", "00000.png", "best.pt"):
        (tmp_path / name).write_text("mine")
    code = jg.main([*job, "--out", str(tmp_path)])
    failed(capsys, code, "not empty, and no earlier result")
    assert code == 2 and [f.read_text() for f in tmp_path.iterdir()] == ["mine"] * 3


def test_predict_again_keeps_no_old_picture_reads_set_and_skips_a_bad_image(runs, tmp_path, capsys):
    """predict_conf of the command line counts, not the run's; a bad file costs itself only."""
    (tmp_path / "in").mkdir()
    for name in ("a", "b"):
        picture((50, 30)).save(tmp_path / f"in/{name}.png")
    shown = []
    for conf in (0, 1):
        assert jg.main(["--mode", "predict", "--checkpoint", str(runs["fixed"] / "best.pt"),
                        "--source", str(tmp_path / "in"), "--out", str(tmp_path / "out"),
                        "--set", f"predict_conf={conf}"]) == 0
        images = json.loads((tmp_path / "out/predictions.json").read_text())["images"]
        shown.append([len(image["boxes"]) for image in images])
        (tmp_path / "in/a.png").write_bytes(b"x")
    assert min(shown[0]) > 0 and len(shown[0]) == 2 and shown[1] == [0]
    assert re.search("warning: .*a.png: not a readable image.*skipped", capsys.readouterr().err)
    assert [f.name for f in (tmp_path / "out").glob("*.png")] == ["00001.png"]


def test_predictor_reads_an_opened_image_as_it_reads_the_file(runs, tmp_path):
    """16-bit grey and EXIF rotation too."""
    levels = np.random.default_rng(0).integers(0, 65536, (40, 60)).astype(np.uint16)
    image = Image.fromarray(levels)
    exif = image.getexif()
    exif[0x0112] = 6
    image.save(tmp_path / "x.png", exif=exif)
    predictor = jg.Predictor(runs["gradnorm"] / "best.pt")
    with Image.open(tmp_path / "x.png") as opened:
        assert predictor(opened) == predictor(tmp_path / "x.png")


@pytest.mark.parametrize("cache_mb", [0, 2048])
def test_every_cut_image_is_named_by_mode_check_and_where_images_are_cached(tmp_path, capsys,
                                                                            cache_mb):
    """Their headers are sound: only reading the pixels tells."""
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    path = make_set(tmp_path, {name: (noise, BOX + "\n0 1 0\n") for name in ("a.jpg", "b.jpg")})
    for file in tmp_path.glob("images/train/*"):
        file.write_bytes(file.read_bytes()[:1200])
        jg.image_size(file)
    assert jg.main(["--mode", "check", "--data", str(path), "--set", f"cache_mb={cache_mb}"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert [re.search("train/(.).jpg: not a readable image", e)[1] for e in errors] == ["a", "b"]
    if cache_mb:
        fault(path, "a.jpg: not a readable image(.|\\n)*b.jpg")


def test_val_without_labels_is_a_warning_and_the_run_still_has_a_best_pt(tmp_path, capsys):
    path = make_set(tmp_path, two(), {"v.png": (picture(), None)})
    assert run_main(tmp_path / "out", "epochs=1", "batch_size=2", more=["--data", str(path)]) == 0
    err = capsys.readouterr().err
    assert "val: no box in any" in err and "val: no image class in any" in err
    assert (tmp_path / "out/best.pt").exists()


def test_no_label_file_at_all_says_where_one_is_looked_for(tmp_path):
    path = make_set(tmp_path, {name: (picture(), None) for name in ("a.png", "b.png")})
    fault(path, "train: no label file; expected .*labels/train/a.txt")
