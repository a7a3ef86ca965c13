"""Reads a joint set: a YOLO folder with an image class, checked line by line, decoded once.

`jointgrad.py --data SET/data.yaml` calls `read_joint`. The format, for owners of such data:

    images/<split>/x.jpg    labels/<split>/x.txt    data.yaml
    data.yaml   path, train, val (folders, .txt lists of images, or lists of these), names,
                classification_names (lists, or 0: name, 1: name, ...); classes: a table, if wanted
    x.txt       rows `class xc yc w h`, or polygons `class x1 y1 x2 y2 x3 y3 ...`, in fractions of
                the image; no row: no objects; one row with the image's class, one-hot or an index,
                unless it stands in the table
    the table   rows of a file (stem, name or path) and a class name; a header is understood
"""
import csv
import hashlib
import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jointgrad as jg  # the program that runs, or a module of that name
import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM", "JPEG2000")  # none of them runs code
SUFFIXES = ".bmp .gif .jp2 .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split()


def read_text(path: Path, limit: int = 64) -> str:
    """The text of a UTF-8 file of at most `limit` MB; UserError where it is none."""
    try:
        if path.exists() and not path.is_file():
            raise OSError(0, "no file: a folder, or a pipe")
        with path.open("rb") as file:
            raw = file.read(limit * 2**20 + 1)  # no more: a device file has no end
        text = raw.decode("utf-8-sig")
    except (OSError, ValueError) as error:  # absent, a folder; bytes that are not UTF-8
        reason = getattr(error, "strerror", None) or "not UTF-8 text; save it as UTF-8"
        raise jg.UserError(f"{path}: cannot be read ({reason})") from error
    if len(raw) > limit * 2**20 or "\0" in text:
        raise jg.UserError(f"{path}: larger than {limit} MB or binary; expected a short text file")
    return text


def parse_row(line: str, num_classes: int, num_labels: int) -> int | list[float]:
    """What a label row says: an image class (int) or a box [class, cx, cy, w, h].

    A one-hot row of `num_labels` values is the class even where it is as long as a box or polygon
    row: read as a box it would have no size. Raises ValueError with what was expected.
    """
    try:
        fields = [float(v) for v in line.split()]
        if not line.isascii() or not all(map(math.isfinite, fields)):  # float() reads more scripts
            raise ValueError
    except ValueError as error:
        raise ValueError("expected numbers, spaces between") from error
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
    return fields


def read_image(source: Any) -> Image.Image:
    """A file, pixels (H, W, 3) or an image of Pillow's as 8-bit RGB; UserError for what is none."""
    try:
        if isinstance(source, np.ndarray):
            source = Image.fromarray(source)  # uint8; TypeError for other kinds and shapes
        if isinstance(source, Image.Image):
            return to_rgb(source)
        with Image.open(source, formats=FORMATS) as image:
            if image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(f"over {Image.MAX_IMAGE_PIXELS:,} pixels")
            return to_rgb(image)
    except (OSError, ValueError, SyntaxError, MemoryError, TypeError, LookupError, AttributeError,
            ArithmeticError, Image.DecompressionBombError) as error:
        name, remedy = ((f"array of {source.dtype}", "expected uint8 (H, W, 3), RGB")
                        if isinstance(source, np.ndarray) else (str(source)[:200], "replace it"))
        raise jg.UserError(f"{name}: not a readable image ({str(error)[:60]}); {remedy}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """The image as 8-bit RGB, upright; grey, palette, RGBA, CMYK and 16-bit grey are converted."""
    upright = ImageOps.exif_transpose(image)
    if upright.mode == "F":
        raise ValueError("floating-point pixels have no range; save as 8 or 16 bit")
    if upright.mode.startswith("I"):  # 16 bit: Pillow's convert would clip at 255, not scale
        levels = np.asarray(upright).astype(np.int64).clip(0, 65535) // 257  # 65535 / 257 = 255
        upright = Image.fromarray(levels.astype(np.uint8))
    return upright.convert("RGB")


def letterbox(image: Image.Image, square: np.ndarray) -> tuple[int, int, int, int]:
    """Pastes an RGB image into the middle of a square (S, S, 3), aspect kept: left, top, w, h."""
    imgsz = len(square)
    w, h = (max(1, round(side * imgsz / max(image.size))) for side in image.size)
    left, top = (imgsz - w) // 2, (imgsz - h) // 2
    square[:] = jg.GREY
    square[top:top + h, left:left + w] = image.resize((w, h), Image.Resampling.BILINEAR)
    return left, top, w, h


def margins(imgsz: int, w: int, h: int) -> tuple[int, int]:
    """Px to cut off a square's sides, left and top, that leave w and h, in multiples of 32 px."""
    return tuple((imgsz - math.ceil(side / 32) * 32) // 2 for side in (w, h))


def to_canvas(image: Image.Image, imgsz: int) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """The pixels (H, W, 3) of one image on a canvas of its own, and where on it: see letterbox."""
    square = np.empty((imgsz, imgsz, 3), np.uint8)
    left, top, w, h = letterbox(image, square)
    x, y = margins(imgsz, w, h)
    return square[y:imgsz - y, x:imgsz - x], (left - x, top - y, w, h)


def label_path(image: Path) -> Path:
    """images/<split>/x.jpg -> labels/<split>/x.txt, at the last folder named images."""
    parts = list(image.parts)
    parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts).with_suffix(".txt")


class JointFolder:
    """Reads the set of a data.yaml. `faults` end the run, ten at once; `notes` are warnings."""

    def __init__(self, path: Path):
        self.path, self.faults, self.notes, self.owner = path, [], [], {}
        read_text(path, limit=1)  # it may be a stranger's: no endless file, no binary one
        self.spec = jg.read_yaml(path)
        root = self.spec.get("path", ".") if isinstance(self.spec, dict) else None
        if not isinstance(root, str):
            raise jg.UserError(f"{path}: expected path, train, val, names, classification_names")
        if "\0" in root:
            raise jg.UserError(f"{path}: path: {root[:60]!r} cannot be read")
        self.root = path.parent / root
        self.names, self.labels = self.class_names("names"), []
        if "classification_names" in self.spec:
            self.labels = self.class_names("classification_names")
        if len(self.labels) == 1:
            raise jg.UserError(f"{path}: classification_names: one class leaves nothing to learn; "
                               "expected two or more")
        if self.spec.get("nc", str(len(self.names))) != str(len(self.names)):
            raise jg.UserError(f"{path}: nc: expected {len(self.names)}, as there are names")

    def raise_faults(self) -> None:
        if self.faults:
            more = [f"… and {len(self.faults) - 10} more"] * (len(self.faults) > 10)
            raise jg.UserError("\n".join(self.faults[:10] + more))

    def class_names(self, key: str) -> list[str]:
        """Class names from a list or a mapping of 0, 1, … to names."""
        names = self.spec.get(key)
        if isinstance(names, dict):
            names = [names.get(str(i)) for i in range(len(names))]  # None in a gap
        if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
            raise jg.UserError(f"{self.path}: {key}: expected a list of names or 0: name, 1: name")
        if len(set(names)) < len(names):
            raise jg.UserError(f"{self.path}: {key}: a name is given twice; rename one")
        return names

    def find_images(self, split: str) -> list[Path]:
        """Image files of a split (a folder, a .txt list, or a list of these), sorted."""
        entry, files, root = self.spec.get(split), [], Path(os.path.realpath(self.root))
        if not entry:
            raise jg.UserError(f"{self.path}: {split}: missing; expected a folder or a list below "
                               f"{self.root}")
        for part in entry if isinstance(entry, list) else [entry]:
            path = self.root / str(part)
            if path.is_dir():
                files += [f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES
                          and f.name[0] != "." and not f.is_dir()]
            else:
                lines = [line.strip() for line in read_text(path).split("\n") if line.strip()]
                files += [(path.parent if line[:2] == "./" else self.root) / line for line in lines]
        for file in files:
            real = Path(os.path.realpath(file))  # absent, or a loop of links: no file
            if not real.is_file() or root not in real.parents or "images" not in file.parts:
                self.faults.append(f"{file}: expected an image file below {self.root} and a folder "
                                   "named images, no link out of it; copy it in, or set path")
        if not files:
            self.faults.append(f"{self.path}: {split}: no image; expected {' '.join(SUFFIXES)}")
        return sorted(set(files))

    def read_table(self, files: list[Path]) -> dict[Path, int]:
        """Image classes by `classes: FILE`, a table of file (stem, name or path) and class name."""
        if "classes" not in self.spec:
            return {}
        if not self.labels:
            raise jg.UserError(f"{self.path}: classes: needs classification_names beside it")
        ends, classes, path = {}, {}, self.root / str(self.spec["classes"])
        for file in files:
            parts = file.with_suffix("").parts
            for k in range(len(parts)):  # ("val", "x") -> the images that end so
                ends.setdefault(parts[k:], []).append(file)
        lines = read_text(path).splitlines()
        delimiter = max(",;\t", key="".join(lines[:1]).count)
        try:  # line by line: a stray quote spoils its own alone
            rows = [next(csv.reader([line], delimiter=delimiter), []) for line in lines]
        except csv.Error as error:
            raise jg.UserError(f"{path}: expected rows of a file and a class ({error})") from error
        for at, row in enumerate(rows, 1):
            name, label, *_ = (field.strip() for field in [*row, "", ""])
            file = Path(name.replace("\\", "/"))
            file = file.with_suffix("") if file.suffix.lower() in SUFFIXES else file
            images = ends.get(file.parts, [])
            if not name + label or at == 1 and not images and label not in self.labels:
                continue  # an empty line, or a header
            where = f"{path}:{at}: {name[:60]!r}, {label[:60]!r}"
            if len(images) != 1:
                remedy = "give its folder too" if images else "mend the name, or delete the row"
                self.faults.append(f"{where}: {len(images)} images of the set are named so; "
                                   f"expected one; {remedy}")
            elif label not in self.labels:
                known = ", ".join(self.labels)[:200]
                self.faults.append(f"{where}: expected one of the classes {known}")
            elif classes.setdefault(images[0], label) != label:
                self.faults.append(f"{where}: another class stands above; delete one")
        return {image: self.labels.index(label) for image, label in classes.items()}

    def parse_labels(self, text: str, where: str) -> tuple[np.ndarray, int]:
        """Boxes (n, 5) and image class, or jg.NO_LABEL, of a label file's text."""
        boxes, labels = [], []
        for at, line in enumerate(text.splitlines(), 1):
            try:
                row = parse_row(line, len(self.names), len(self.labels)) if line.strip() else []
            except ValueError as error:
                self.faults.append(f"{where}:{at}: {line.strip()[:60]!r}: {error}")
                continue
            if isinstance(row, int) and labels:
                self.faults.append(f"{where}:{at}: a second image class; delete the wrong row")
            elif row != []:
                (labels if isinstance(row, int) else boxes).append(row)
        boxes = np.array(boxes, np.float32).reshape(-1, 5)
        low = (boxes[:, 1:3] - boxes[:, 3:] / 2).clip(0, 1)  # (n, 2) x1 y1
        high = (boxes[:, 1:3] + boxes[:, 3:] / 2).clip(0, 1)  # (n, 2) x2 y2
        inside = np.concatenate([boxes[:, :1], (low + high) / 2, high - low], 1)
        if np.abs(inside - boxes).max(initial=0) > 1e-3:  # below that: the file's rounding
            self.notes.append(f"{where}: a box that reaches outside the image is cut at its border")
        kept = np.unique(inside[(inside[:, 3:] > 0).all(1)], axis=0)  # sorts the rows
        if len(kept) < len(inside):
            self.notes.append(f"{where}: a box that is repeated, or of no size, is skipped")
        return kept, labels[0] if labels else jg.NO_LABEL

    def read_labels(self, files: list[Path], table: dict[Path, int]) -> jg.JointSet:
        """A split without its pixels: boxes and class of each image, and a fingerprint of all."""
        boxes, labels = [], []
        digest = hashlib.sha256(repr((self.names, self.labels)).encode())
        for file in files:
            path = label_path(file)
            if self.owner.setdefault(path, file) != file:  # x.jpg and x.png both mean x.txt
                self.faults.append(f"{file}: shares {path} with {self.owner[path].name}; "
                                   "rename one")
            there = os.path.lexists(path)
            text = read_text(path) if there else ""
            if not there:
                self.notes.append(f"{path}: no such label file: no objects")
            rows, label = self.parse_labels(text, str(path))
            if table.get(file, label) != label != jg.NO_LABEL:
                self.faults.append(f"{path}: its class row and the table differ; mend one")
            labels.append(table.get(file, label))
            boxes.append(rows)
            if self.labels and labels[-1] == jg.NO_LABEL:
                self.notes.append(f"{path}: no image class: left out of the classification task")
            seen = f"{file.name} {file.stat().st_size} {labels[-1]} {text}\n"
            digest.update(seen.encode(errors="surrogateescape"))  # a name may be no UTF-8
        return jg.JointSet(np.empty(0), boxes, labels, self.names, self.labels, files, self.notes,
                           digest.hexdigest()[:16])

    def check(self, train: jg.JointSet, val: jg.JointSet, tasks: tuple[str, ...]) -> None:
        """A task without anything to learn is a fault, one without anything to score a note."""
        for task, what, remedy, count in (
                ("det", "box", "--mode classify", lambda s: sum(map(len, s.boxes))),
                ("cls", "image class (a row each or a table, and classification_names)",
                 "--mode detect", lambda s: sum(k != jg.NO_LABEL for k in s.labels))):
            if task in tasks and not count(train):
                self.faults.append(f"{self.path}: train: no {what}, as in "
                                   f"{label_path(train.paths[0])}; add them, or use {remedy}")
            if task in tasks and not count(val):
                self.notes.insert(0, f"{self.path}: val: no {what}: it has no score")
        if len(train) < 2:
            self.faults.append(f"{self.path}: train: one image; expected two at least (BatchNorm)")
        if set(train.paths) & set(val.paths):
            self.notes.insert(0, f"{self.path}: train and val share images: no test on new ones")

    def read_pixels(self, data: jg.JointSet, config: jg.Config, folder: Path) -> np.ndarray:
        """Decodes a split's images into squares (N, S, S, 3); returns their `letterbox` (N, 4)."""
        shape, file = (len(data), config.imgsz, config.imgsz, 3), folder / f"{os.getpid()}.npy"
        if math.prod(shape) <= config.cache_mb * 2**20:
            data.pixels = np.empty(shape, np.uint8)
        else:  # a file, mapped
            data.pixels = np.lib.format.open_memmap(file, "w+", np.uint8, shape)
            with file.open("r+b") as handle:
                file.unlink()  # open, it stays; whatever ends the process, it goes
                if hasattr(os, "posix_fallocate"):  # a full disk: an error now, no crash later
                    os.posix_fallocate(handle.fileno(), 0, os.fstat(handle.fileno()).st_size)

        def read(i: int) -> tuple[int, int, int, int] | jg.UserError:
            try:
                return letterbox(read_image(data.paths[i]), data.pixels[i])
            except jg.UserError as error:
                return error

        with ThreadPoolExecutor() as pool:  # Pillow decodes outside Python's lock
            fits = list(tqdm(pool.map(read, range(len(data.paths))), "reading images",
                             len(data.paths), delay=1, leave=False, disable=None))
        self.faults += [str(x) for x in fits if isinstance(x, jg.UserError)]
        self.raise_faults()
        return np.array(fits)


def read_joint(path: Path, config: jg.Config, folder: Path) -> list[jg.JointSet]:
    """The train and val splits of a data.yaml, checked and decoded, on one canvas.

    Images of over config.cache_mb MB a split are kept in a mapped file of `folder`.
    UserError, with a line for each of the first ten faults, unless all is in order.
    """
    reader = JointFolder(path)
    files = {split: reader.find_images(split) for split in ("train", "val", "test")
             if reader.spec.get(split) or split != "test"}
    reader.raise_faults()
    table = reader.read_table(sorted(set(sum(files.values(), []))))  # splits may share images
    splits = [reader.read_labels(files[split], table) for split in ("train", "val")]
    reader.check(*splits, config.tasks)
    reader.raise_faults()
    fits = [reader.read_pixels(split, config, folder) for split in splits]
    left, top = margins(config.imgsz, *np.concatenate(fits)[:, 2:].max(0))
    W, H = config.imgsz - 2 * left, config.imgsz - 2 * top
    fingerprint = "".join(data.fingerprint for data in splits)
    for data, of_split in zip(splits, fits):
        data.fingerprint = fingerprint
        data.pixels = data.pixels[:, top:top + H, left:left + W]
        for boxes, (x, y, w, h) in zip(data.boxes, of_split):  # fractions of the canvas, in place
            boxes[:, 1:] = (boxes[:, 1:] * [w, h, w, h] + [x - left, y - top, 0, 0]) / [W, H, W, H]
    return splits
