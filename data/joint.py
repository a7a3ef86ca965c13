"""Reads a joint set: a YOLO folder with an image class, checked line by line, decoded once.

`read_joint` gives the arrays of a data.yaml's two splits. The format, for owners of such data:

    images/<split>/x.jpg    labels/<split>/x.txt    data.yaml
    data.yaml   path, train, val (folders, .txt lists of images, or lists of these), names,
                classification_names (lists, or 0: name, 1: name, ...); classes: a table, if
                wanted; kpt_shape: [points, 2 or 3], where keypoints follow each box
    x.txt       rows `class xc yc w h`, or polygons `class x1 y1 x2 y2 x3 y3 ...`, in
                fractions of the image; no row: no objects; one row with the image's class,
                one-hot or an index, unless it stands in the table
    the table   rows of a file (stem, name or path) and a class name, a header is understood;
                or a header of class names, and rows of a file, a 1 and 0s

What is there is read, or told: an error ends the reading, a note does not.
"""
import contextlib
import csv
import difflib
import hashlib
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml
from PIL import Image, ImageOps
from tqdm import tqdm

# None of these formats runs code.
FORMATS = ("JPEG", "PNG", "BMP", "DIB", "TIFF", "WEBP", "GIF", "PPM", "JPEG2000", "AVIF")
SUFFIXES = (".apng .avif .bmp .dib .gif .j2c .j2k .jfif .jp2 .jpc .jpe .jpeg .jpf .jpg .jpx "
            ".pbm .pgm .png .pnm .ppm .tif .tiff .webp").split()
SYSTEM = ("@eaDir", "@__thumb", "@Recycle", "@tmp", "#recycle", "#snapshot", "$RECYCLE.BIN",
          "__MACOSX", "__pycache__", "lost+found", "System Volume Information")
GREY = 114  # of the padding, as YOLOv5's
# Tags of TIFF and EXIF: bits of a sample, how to turn it upright, 2: colours lie apart.
BITS = 258
ORIENTATION = 274
PLANES = 284
SIXTEEN_BITS = (0.0, 65535.0)
OTHER_ORDER = {"B": "L", "L": "B", "N": "B"}  # big, little and native (little) endian
THREADS = 8
HUGE = 2**24  # px: of images above that one at a time is decoded


class DataError(ValueError):
    """What is wrong with a set or an image: a line for each fault."""

    def __init__(self, *faults: str):
        super().__init__("\n".join(map(printable, faults)))


class Split(NamedTuple):
    """One split: pixels, boxes and classes of all images, and what was odd about them."""
    pixels: np.ndarray  # (N, H, W, 3) uint8, in memory or mapped from a file
    boxes: list[np.ndarray]  # of each image (n, 5) float32: class, cx cy w h in fractions of it
    labels: list[int | None]  # None: the image has no class
    names: list[str]
    classification_names: list[str]
    paths: list[Path]
    notes: list[str]
    fingerprint: str  # alike for alike files
    levels: tuple[float, float] | None  # of more than 8 bits, what became 0 and 255


# ----------------------------------------------------------------------------------------------
# 1. Texts
# ----------------------------------------------------------------------------------------------

def printable(text: str) -> str:
    """A text on one line of at most 850 characters: names of files hold anything."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return shown if len(shown) <= 850 else f"{shown[:550]} … {shown[-290:]}"


def fold(name: str) -> str:
    """What names share that differ in case or Unicode form alone (ä, or a and two dots)."""
    return unicodedata.normalize("NFC", name).casefold()


def is_hidden(name: str) -> bool:
    return name.startswith(".") or name in SYSTEM


def why_not(path: Path) -> str:
    """Why a path cannot be read: absent, too long, not permitted."""
    try:
        os.stat(path)
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    return "not a file"


def read_text(path: Path, limit: int = 64) -> str:
    """The text of a UTF-8 file of at most `limit` MB; DataError where it is none."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError(0, "no file: a folder, or a pipe")
        with path.open("rb") as file:
            raw = file.read(limit * 2**20 + 1)  # no more: a device file has no end
        text = raw.decode("utf-8-sig")
    except (OSError, ValueError) as error:  # absent, a folder; bytes that are not UTF-8
        reason = getattr(error, "strerror", None) or "not UTF-8 text; save it as UTF-8"
        raise DataError(f"{path}: cannot be read ({reason})") from error
    if len(raw) > limit * 2**20 or "\0" in text:
        raise DataError(f"{path}: larger than {limit} MB or binary; expected a short text file")
    return text


def read_yaml(path: Path) -> Any:
    """Lists, mappings and texts of a YAML file: a scalar stays text, no object is made."""
    text = read_text(path, limit=1)  # it may be a stranger's: no endless file, no binary one
    try:
        return yaml.load(text, yaml.BaseLoader)
    except (ValueError, LookupError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"{path}: cannot be read as YAML ({reason})") from error


def parse_row(fields: list[float], num_classes: int, num_labels: int,
              num_points: int = 0) -> int | list[float]:
    """What a label row says: an image class (int) or a box [class, cx, cy, w, h].

    A one-hot row of `num_labels` values is the class even where it is as long as a box or
    polygon: read as a box it would have no size. `num_points` values of keypoints may follow a
    box; 0: a longer row is a polygon. Raises ValueError with what was expected.
    """
    if num_labels and sorted(fields) == [0] * (num_labels - 1) + [1]:
        return fields.index(1)
    if len(fields) == 1 and fields[0] in range(num_labels):
        return int(fields[0])
    # No box has a corner as its centre.
    is_soft = num_labels and len(fields) == 5 and set(fields) == {0, 1}
    is_polygon = not num_points and len(fields) > 5 and len(fields) % 2 == 1
    if is_soft or not is_polygon and len(fields) not in (5, 5 + num_points):
        longer = "polygon (class x1 y1 …), keypoints (kpt_shape in data.yaml)"
        if num_points:
            longer = f"a box and {num_points} values of keypoints, as kpt_shape says"
        label = "name the image classes as classification_names in data.yaml"
        if num_labels:
            label = f"an image class (one-hot of {num_labels} or an index)"
        raise ValueError(f"expected a box (class xc yc w h), {longer}, or {label}")
    if fields[0] not in range(num_classes):
        last = num_classes - 1
        raise ValueError(f"expected a box class that is a whole number from 0 to {last}")
    values = fields[1:] if is_polygon else fields[1:5]
    if not all(-1e-3 <= v <= 1.001 for v in values):  # beyond 0 and 1: the file's rounding
        hint = "; keypoints need kpt_shape in data.yaml" if is_polygon else ""
        raise ValueError(f"expected fractions of the image from 0 to 1, not pixels{hint}")
    if not is_polygon:
        return fields[:5]
    x1, x2 = min(values[::2]), max(values[::2])
    y1, y2 = min(values[1::2]), max(values[1::2])
    return [fields[0], (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]


def parse_numbers(line: str) -> list[float]:
    """The numbers of a label row; ValueError with what was expected."""
    try:
        fields = [float(v) for v in line.split()]
    except ValueError:
        fields = [math.nan]
    if not line.isascii() or not all(map(math.isfinite, fields)):  # float() reads more scripts
        raise ValueError("expected numbers, spaces between")
    return fields


def keypoint_shapes(fields: list[float]) -> set[tuple[int, int]]:
    """Each kpt_shape by which the rest of a row lies in the box of its first four values."""
    shapes = set()
    centre = np.array(fields[1:3])
    half = np.array(fields[3:5]) / 2 + 1e-3  # and the file's rounding
    for width in (2, 3):
        if len(fields) > 5 and (len(fields) - 5) % width == 0:
            points = np.reshape(fields[5:], (-1, width))[:, :2]
            near = np.abs(points - centre) <= half
            absent = points == 0  # a point that is not seen
            if (near | absent).all():
                shapes.add((len(points), width))
    return shapes


def split_rows(lines: list[str], is_file: Callable[[str], Any]) -> list[list[str]]:
    """The fields of each line, by the delimiter by which most first fields name a file."""
    delimiters = ",;\t|"
    declared = re.match(r'"?sep=([,;\t|])"?;*\s*$', "".join(lines[:1]))  # Excel's first line
    if declared:
        delimiters = declared[1]
        lines = ["", *lines[1:]]
    readings = []
    for delimiter in delimiters:  # line by line: a stray quote spoils its own alone
        rows = [next(csv.reader([line], delimiter=delimiter), []) for line in lines]
        readings.append([[field.strip() for field in row] for row in rows])

    def fit(rows: list[list[str]]) -> tuple[int, int]:
        named = sum(1 for row in rows if row and is_file(row[0]))
        return named, sum(len(row) > 1 for row in rows)

    return max(readings, key=fit)


def take_header(rows: dict[int, list[str]], is_file: Callable[[str], Any],
                classes: list[str]) -> list[str]:
    """The classes that a table's columns stand for; a header is taken out of its rows."""
    for at, (name, *values) in list(rows.items())[:1]:
        if not is_file(name):
            named = [value for value in values if value]
            is_one_hot = len(named) > 1 and set(named) <= set(classes)
            if is_one_hot or "".join(named[:1]) not in classes:
                del rows[at]
            return named if is_one_hot else []
    return []


def class_of_row(values: list[str], columns: list[str], classes: Any) -> str:
    """The class that a table's row names, or marks in its one-hot columns; ValueError."""
    if columns:
        marks = [value.lower() for value in values[:len(columns)]]
        hot = [name for name, mark in zip(columns, marks) if mark in ("1", "1.0", "true")]
        cold = [mark for mark in marks if mark in ("0", "0.0", "false")]
        if len(hot) != 1 or len(cold) != len(columns) - 1:
            raise ValueError("expected one 1, and 0 for each other class of the header")
        return hot[0]
    if values[0] not in classes:
        known = ", ".join(classes)[:200]
        raise ValueError(f"expected one of the classes {known}, or a header of one-hot columns")
    if set(values[1:]) & set(classes):
        raise ValueError("a second class stands in the row; expected one")
    return values[0]


# ----------------------------------------------------------------------------------------------
# 2. Images
# ----------------------------------------------------------------------------------------------

def read_image(source: Any, levels: tuple[float, float] | None = None) -> Image.Image:
    """A file, an image of Pillow's or pixels as 8-bit RGB, upright; DataError for what is none.

    Pixels are (H, W) or (H, W, 3), uint8 or uint16. `levels` of more than 8 bits become 0 and
    255; None: the image's own, see `stretch`.
    """
    try:
        if isinstance(source, np.ndarray):
            pixels = to_8_bit(source, levels) if source.dtype == np.uint16 else source
            source = Image.fromarray(pixels)  # TypeError for other kinds and shapes
        if isinstance(source, Image.Image):
            return to_rgb(source, levels)
        with open_image(source) as image:
            return to_rgb(image, levels)
    except Exception as error:  # Pillow raises some ten types on damaged bytes
        raise unreadable(source, error) from error


def unreadable(source: Any, error: Exception) -> DataError:
    """What is said of a file, image or array that cannot be read."""
    name = str(source)[:200]
    remedy = "replace it"
    if isinstance(source, np.ndarray):
        name = f"array of {source.dtype}"
        remedy = "expected uint8 (H, W, 3), RGB"
    return DataError(f"{name}: not a readable image ({str(error)[:60]}); {remedy}")


def open_image(path: Path) -> Image.Image:
    """An image file, of which the header is read; ValueError where it is too large."""
    image = Image.open(path, formats=FORMATS)
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        image.close()
        raise ValueError(f"over {Image.MAX_IMAGE_PIXELS:,} pixels")
    return image


def to_rgb(image: Image.Image, levels: tuple[float, float] | None) -> Image.Image:
    """The image as 8-bit RGB, upright; grey, palette, RGBA, CMYK and 16 bit are converted."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no range; save as 8 or 16 bit")
    deep = deep_pixels(image)
    image.load()
    orientation = image.getexif().get(ORIENTATION, 1)
    if deep is not None:
        image = Image.fromarray(to_8_bit(deep, levels))
        image.getexif()[ORIENTATION] = orientation
    if orientation != 1:  # else it would be copied
        image = ImageOps.exif_transpose(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def deep_pixels(image: Image.Image) -> np.ndarray | None:
    """Pixels (H, W) or (H, W, 3) of an image of more than 8 bits, None of all others."""
    if image.mode.startswith("I"):
        return np.asarray(image)
    tiles = getattr(image, "tile", [])
    if not tiles:  # already decoded
        return None
    args = tiles[0].args
    rawmode = args[0] if isinstance(args, tuple) and args else args
    if tiles[0].codec_name.startswith("ppm") and rawmode == "RGB" and args[1] > 255:
        return ppm_colour(image)
    tags = getattr(image, "tag_v2", {})  # a TIFF's
    if re.fullmatch("(RGB|RGBA|RGBX|LA);16[BLN]", str(rawmode)) and tags.get(PLANES) != 2:
        return both_bytes(image, rawmode)
    if max(tags.get(BITS, [8])) > 8:
        raise ValueError("a layout of 16 bits that is not read; save as PNG")
    return None


def ppm_colour(image: Image.Image) -> np.ndarray:
    """Pixels (H, W, 3) of a PPM of more than 8 bits, read as grey of three times the width."""
    width, height = image.size
    twin = Image.open(image.fp, formats=FORMATS)
    twin._mode = "I"
    twin._size = (3 * width, height)
    twin.tile = [tile._replace(extents=(0, 0, *twin.size)) for tile in twin.tile]
    return np.asarray(twin).reshape(height, width, 3)


def both_bytes(image: Image.Image, rawmode: str) -> np.ndarray:
    """Pixels (H, W, 3), or grey (H, W), of 16-bit colour, or of grey and alpha.

    Pillow gives the high bytes alone; told the other order of bytes, it gives the low ones.
    """
    other = rawmode[:-1] + OTHER_ORDER[rawmode[-1]]
    if rawmode == "LA;16B":  # has none; its four bytes: grey's high and low, alpha's
        other = "RGBA"
    twin = Image.open(image.fp, formats=FORMATS)
    for k, tile in enumerate(twin.tile):
        args = other if isinstance(tile.args, str) else (other, *tile.args[1:])
        twin.tile[k] = tile._replace(args=args)
    low = np.asarray(twin)[..., :3]
    high = np.asarray(image)[..., :3]
    if rawmode == "LA;16B":
        low = low[..., 1]
        high = high[..., 0]
    return high.astype(np.uint16) * 256 + low


def stretch(low: float, high: float) -> tuple[float, float]:
    """What becomes 0 and 255: all 16 bits, where at least half of them or one level is used."""
    is_wide = low >= 0 and high <= 65535 and high - low >= 32768
    return SIXTEEN_BITS if is_wide or low == high else (float(low), float(high))


def to_8_bit(deep: np.ndarray, levels: tuple[float, float] | None) -> np.ndarray:
    """Pixels of more than 8 bits as uint8 of the same shape; None: by their own range."""
    low, high = map(int, levels or stretch(int(deep.min()), int(deep.max())))
    pixels = np.empty(deep.shape, np.uint8)
    for row, wide in zip(pixels, deep):  # a copy of a row is small, one of a large image is not
        row[:] = (wide.astype(np.int64).clip(low, high) - low) * 255 // (high - low)
    return pixels


def count_frames(image: Image.Image) -> int:
    """Frames of a file, at most 1,000 of a TIFF; a second picture in a JPEG is a preview."""
    if image.format != "TIFF":
        return 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    count = 1
    with contextlib.suppress(Exception):  # the end, or a frame of a kind not known
        while count < 1000:  # Pillow's n_frames takes the square of their number
            image.seek(count)
            count += 1
    image.seek(0)
    return count


def is_huge(path: Path) -> bool:
    with contextlib.suppress(Exception), open_image(path) as image:
        return image.width * image.height > HUGE
    return False  # unreadable: told where its pixels are read


def look_at(path: Path) -> tuple[int, list[float]]:
    """Frames of an image; levels of more than 8 bits: least, of 1 %, of 99 %, greatest."""
    with contextlib.suppress(Exception), open_image(path) as image:
        frames = count_frames(image)
        deep = deep_pixels(image)
        if deep is None:
            return frames, []
        return frames, [deep.min(), *np.percentile(deep[::4, ::4], (1, 99)), deep.max()]
    return 1, []


def letterbox(image: Image.Image, square: np.ndarray) -> tuple[int, int, int, int]:
    """Pastes an RGB image into the middle of a square (S, S, 3): left, top, w, h in px."""
    imgsz = len(square)
    w, h = (max(1, round(side * imgsz / max(image.size))) for side in image.size)
    left, top = (imgsz - w) // 2, (imgsz - h) // 2
    square[:] = GREY
    square[top:top + h, left:left + w] = image.resize((w, h), Image.Resampling.BILINEAR)
    return left, top, w, h


def margins(imgsz: int, w: int, h: int) -> tuple[int, int]:
    """Px to cut off a square at left and top, to leave w and h in multiples of 32 px."""
    return tuple((imgsz - math.ceil(side / 32) * 32) // 2 for side in (w, h))


def to_canvas(image: Image.Image, imgsz: int) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """The pixels (H, W, 3) of one image on a canvas of its own; where on it: see letterbox."""
    square = np.empty((imgsz, imgsz, 3), np.uint8)
    left, top, w, h = letterbox(image, square)
    x, y = margins(imgsz, w, h)
    return square[y:imgsz - y, x:imgsz - x], (left - x, top - y, w, h)


# ----------------------------------------------------------------------------------------------
# 3. Files
# ----------------------------------------------------------------------------------------------

def is_within(path: Path, top: Path) -> bool:
    """Whether a path leads, through all links, to a place in a folder or to the folder."""
    real = Path(os.path.realpath(path))
    return top == real or top in real.parents


def lies_near(path: Path, top: Path) -> str:
    """What the nearest folder that is there holds, below `top`: names like the path's."""
    wanted = path.name
    while not os.path.isdir(path):
        wanted = path.name[:100]
        path = path.parent
    if not is_within(path, top):
        path = top
    with contextlib.suppress(OSError):
        names = sorted(os.listdir(path))[:2000]
        near = difflib.get_close_matches(wanted, names, n=5, cutoff=0)
        return f"; {path} holds {', '.join(near)[:200] or 'nothing'}"
    return ""


def label_path(image: Path) -> Path:
    """images/<split>/x.jpg -> labels/<split>/x.txt, at the last folder named images."""
    parts = list(image.parts)
    parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts).with_suffix(".txt")


def list_files(folder: Path, top: Path) -> tuple[list[Path], list[Path], list[str]]:
    """Images below a folder and below those that links lead to, files of other kinds, notes.

    A link that leaves `top` (a real path) stands among the images: whoever reads it refuses it.
    """
    images = []
    others = []
    hidden = []
    notes = []
    seen = set()
    queue = [folder]
    while queue:
        here = queue.pop(0)
        real = os.path.realpath(here)
        if not is_within(here, top):
            images.append(here)
        elif real not in seen:  # a link may lead to a folder that was read
            seen.add(real)
            try:
                names = os.listdir(here)
            except OSError as error:
                notes.append(f"{here}: cannot be read ({error.strerror}): left out")
                continue
            for path in sorted(here / name for name in names):
                is_folder = os.path.isdir(path)
                known = is_folder or path.suffix.lower() in SUFFIXES
                if is_hidden(path.name):
                    hidden += [path] if known else []
                elif is_folder:  # those that links lead to last: a file has its own path first
                    queue.insert(len(queue) if path.is_symlink() else 0, path)
                else:
                    (images if known else others).append(path)
    if hidden:
        names = ", ".join(dict.fromkeys(path.name for path in hidden))
        notes.append(f"{folder}: hidden or a system's, left out: {names[:200]}")
    if others:
        notes.append(describe_others(folder, others))
    return sorted(images), others, notes


def describe_others(folder: Path, others: list[Path]) -> str:
    """A note on files that are no images by their suffix."""
    kinds = Counter(path.suffix.lower() or "without suffix" for path in others).most_common(5)
    told = ", ".join(f"{count} {kind}" for kind, count in kinds)
    labels = [path for path in others if "images" in path.parts
              and path.suffix.lower() != ".txt" and os.path.exists(label_path(path))]
    there = f"; labels are there for {len(labels)}: convert them" if labels else ""
    return f"{folder}: {len(others)} files of a kind not read ({told}){there}"


def find_images(folder: Path) -> tuple[list[Path], list[str]]:
    """Every image below a folder, sorted, and notes on what was left out."""
    images, _, notes = list_files(folder, Path(os.path.realpath(folder)))
    return images, notes


def finder(files: list[Path]) -> Callable[[str], list[Path]]:
    """Gives the files that a name or path means, by the whole of it, else by its stem."""
    table = {}
    for file in files:
        *folders, name = Path(unicodedata.normalize("NFC", str(file))).parts
        for last in (name, Path(name).stem + ".*"):
            for k in range(len(folders) + 1):  # ("val", "x.*") -> the files that end so
                table.setdefault((*folders[k:], last), []).append(file)

    def find(text: str) -> list[Path]:
        path = Path(text.replace("\\", "/"))
        stem = path.stem if path.suffix.lower() in SUFFIXES else path.name
        for last in (path.name, f"{path.name}.*", f"{stem}.*"):
            found = table.get((*path.parts[:-1], last), [])
            if found:
                break
        return found

    return find


# ----------------------------------------------------------------------------------------------
# 4. The set
# ----------------------------------------------------------------------------------------------

class JointFolder:
    """Reads the set of a data.yaml. `faults` end it, ten at once; `notes` do not.

    `notes` are on the set, `odd` on single files.
    """

    def __init__(self, path: Path):
        self.path = path
        self.faults = []
        self.notes = []
        self.odd = []
        self.unread = []  # files that are no images by their suffix
        self.owners = {}  # of each label file its image
        self.listings = {}  # see listing
        self.huge = set()  # images that are not decoded beside each other
        self.shapes = {(number, width) for number in range(1, 1000) for width in (2, 3)}
        self.spec = self.read_spec()
        self.root = path.parent
        self.root = self.locate("path", self.spec.get("path", "."))
        self.top = Path(os.path.realpath(self.root))
        self.names = self.class_names("names")
        self.labels = []
        if "classification_names" in self.spec:
            self.labels = self.class_names("classification_names")
        if len(self.labels) == 1:
            raise DataError(f"{path}: classification_names: one class leaves nothing to learn; "
                            "expected two or more")
        if self.spec.get("nc", str(len(self.names))) != str(len(self.names)):
            raise DataError(f"{path}: nc: expected {len(self.names)}, as there are names")
        self.points = self.count_points()

    def raise_faults(self) -> None:
        faults = list(dict.fromkeys(self.faults))
        if len(faults) > 10:
            faults[10:] = [f"… and {len(faults) - 10} more"]
        if faults:
            raise DataError(*faults)

    def read_spec(self) -> dict[str, Any]:
        """What data.yaml says."""
        if not os.path.isfile(self.path):
            counts = "" if self.path.is_absolute() else f"; it counts from {os.getcwd()}"
            near = lies_near(self.path / "data.yaml", Path(Path.cwd().anchor))
            raise DataError(f"{self.path}: cannot be read ({why_not(self.path)}){counts}{near}")
        spec = read_yaml(self.path)
        if isinstance(spec, dict) and isinstance(spec.get("path", "."), str):
            return spec
        raise DataError(f"{self.path}: expected path, train, val, names, classification_names")

    def class_names(self, key: str) -> list[str]:
        """Class names from a list or a mapping of 0, 1, … to names."""
        names = self.spec.get(key)
        if isinstance(names, dict):
            names = [names.get(str(i)) for i in range(len(names))]  # None in a gap
        is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if not is_list or not names:
            raise DataError(f"{self.path}: {key}: expected a list of names or 0: name, 1: name")
        if len(set(names)) < len(names):
            raise DataError(f"{self.path}: {key}: a name is given twice; rename one")
        return names

    def count_points(self) -> int:
        """How many values of keypoints follow a box, by kpt_shape."""
        shape = self.spec.get("kpt_shape")
        if not shape:
            return 0
        for number, width in self.shapes:
            if shape == [str(number), str(width)]:
                self.notes.append(f"{self.path}: kpt_shape: keypoints are not read, boxes are")
                return number * width
        raise DataError(f"{self.path}: kpt_shape: expected [number of points, 2 or 3]")

    def listing(self, folder: Path) -> dict[str, list[Path]]:
        """What a folder holds, by folded names; DataError where that may not be known."""
        if folder not in self.listings:
            paths = self.listings[folder] = {}
            try:
                for name in os.listdir(folder):
                    paths.setdefault(fold(name), []).append(folder / name)
            except (FileNotFoundError, NotADirectoryError):
                pass  # nothing there
            except OSError as error:
                raise DataError(f"{folder}: cannot be read ({error.strerror})") from error
        return self.listings[folder]

    def spellings(self, path: Path) -> list[Path]:
        """The path alone where it is there, else those that differ in case or Unicode form."""
        if os.path.lexists(path) or path == path.parent:
            return [path]
        found = []
        for folder in self.spellings(path.parent):
            found += self.listing(folder).get(fold(path.name), [])
        return found

    def look_up(self, folder: Path, text: str) -> Path:
        """The path below a folder that a text means, or, where none is there, that it says."""
        slashed = text.replace("\\", "/")
        for name in (text, slashed, slashed.removeprefix("../")):  # the last as YOLOv5 does
            with contextlib.suppress(DataError):
                found = self.spellings(folder / name)
                if len(found) == 1:
                    return found[0]
        return folder / text

    def locate(self, key: str, text: str) -> Path:
        """The file or folder that a key of data.yaml names; DataError."""
        path = self.look_up(self.root, text)
        if not os.path.exists(path):
            near = lies_near(path, Path(os.path.realpath(self.root)))
            raise DataError(f"{self.path}: {key}: {text[:200]!r} cannot be read "
                            f"({why_not(path)}); it counts from {self.root}{near}")
        return path

    def find_images(self, split: str) -> list[Path]:
        """Image files of a split (a folder, a .txt list, or a list of these), sorted.

        One that is listed again stands there again: it is seen as often in training.
        """
        files = []
        entry = self.spec.get(split)
        if not entry:
            raise DataError(f"{self.path}: {split}: missing; expected a folder or a list")
        for part in entry if isinstance(entry, list) else [entry]:
            path = self.locate(split, str(part))
            if os.path.isdir(path):
                images, others, notes = list_files(path, self.top)
                files += images
                self.unread += others
                self.notes += notes
            else:
                files += self.read_list(path)
        distinct = sorted(set(files))
        if len(distinct) < len(files):
            self.notes.append(f"{self.path}: {split}: {len(files) - len(distinct)} images are "
                              "listed again: each counts as often as it is listed")
        for file in distinct:
            is_file = is_within(file, self.top) and os.path.isfile(file)
            if not is_file or "images" not in file.parts:
                near = lies_near(file, self.top) if len(self.faults) < 10 else ""
                self.faults.append(f"{self.path}: {split}: {file}: expected an image file "
                                   f"below {self.root} and a folder named images, no link out "
                                   f"of it; copy it in, or set path{near}")
        if not files:
            kinds = " ".join(SUFFIXES)
            told = "".join(f"; {note}" for note in self.notes)
            self.faults.append(f"{self.path}: {split}: no image; expected {kinds}{told}")
        return sorted(files)

    def read_list(self, path: Path) -> list[Path]:
        """The images that a text file lists; ./ counts from the file, all else from the set."""
        files = []
        hidden = 0
        for line in filter(None, map(str.strip, read_text(path).split("\n"))):
            file = self.look_up(path.parent if line[:2] == "./" else self.root, line)
            below = Path(os.path.relpath(file, self.root)).parts
            if any(is_hidden(part) for part in below if part != ".."):
                hidden += 1
            else:
                files.append(file)
        if hidden:
            self.notes.append(f"{path}: {hidden} hidden or a system's files are left out")
        return files

    def find_test(self) -> list[Path] | None:
        """Images of `test`, which a table may name too; None, and a note, where it is wrong."""
        try:
            files = self.find_images("test") if self.spec.get("test") else []
        except DataError as error:
            self.faults.append(str(error))
        if not self.faults:
            return files
        self.notes.append(f"{self.faults[0]} (training needs no test)")
        self.faults.clear()
        return None

    def read_table(self, files: list[Path], is_whole: bool) -> dict[Path, int]:
        """Image classes by `classes: FILE`, a table of files and class names.

        `files` is the whole set, unless its test part is not there.
        """
        if "classes" not in self.spec:
            return {}
        if not self.labels:
            raise DataError(f"{self.path}: classes: needs classification_names beside it")
        path = self.locate("classes", str(self.spec["classes"]))
        known = [unicodedata.normalize("NFC", name) for name in self.labels]
        find = finder(files)
        find_unread = finder(self.unread)
        lines = unicodedata.normalize("NFC", read_text(path)).splitlines()
        try:
            rows = split_rows(lines, find)
        except csv.Error as error:
            raise DataError(f"{path}: expected rows of a file and a class ({error})") from error
        rows = {at: row for at, row in enumerate(rows, 1) if any(row)}
        columns = take_header(rows, find, known)
        if not columns and any(any(row[2:]) for row in rows.values()):
            self.notes.append(f"{path}: columns after the second are not read")
        classes = {}
        for at, row in rows.items():
            name = row[0]
            where = f"{path}:{at}: {name[:60]!r}, {','.join(row[1:])[:60]!r}"
            images = find(name)
            if len(images) == 1:
                try:
                    label = class_of_row([*row[1:], ""], columns, known)
                    if classes.setdefault(images[0], label) != label:
                        raise ValueError("another class stands above; delete one")
                except ValueError as error:
                    self.faults.append(f"{where}: {error}")
                continue
            remedy = "mend the name, or delete the row"
            if find_unread(name):
                remedy = "its file is there, of a kind not read: convert it"
            if images:
                remedy = "give its folder too"
            said = f"{where}: {len(images)} images are named so; expected one; {remedy}"
            (self.faults if images or is_whole else self.odd).append(said)
        return {image: known.index(label) for image, label in classes.items()}

    def parse_labels(self, text: str, where: str) -> tuple[np.ndarray, int | None]:
        """Boxes (n, 5) and image class, or None, of a label file's text."""
        boxes = []
        labels = []
        for at, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            try:
                fields = parse_numbers(line)
                row = parse_row(fields, len(self.names), len(self.labels), self.points)
            except ValueError as error:
                self.faults.append(f"{where}:{at}: {line.strip()[:60]!r}: {error}")
                continue
            if isinstance(row, list):
                boxes.append(row)
                if self.shapes:
                    self.shapes &= keypoint_shapes(fields)
            elif labels:
                self.faults.append(f"{where}:{at}: a second image class; delete the wrong row")
            else:
                labels.append(row)
        boxes = np.array(boxes, np.float32).reshape(-1, 5)
        low = (boxes[:, 1:3] - boxes[:, 3:] / 2).clip(0, 1)  # (n, 2) x1 y1
        high = (boxes[:, 1:3] + boxes[:, 3:] / 2).clip(0, 1)  # (n, 2) x2 y2
        inside = np.concatenate([boxes[:, :1], (low + high) / 2, high - low], 1)
        if np.abs(inside - boxes).max(initial=0) > 1e-3:  # below that: the file's rounding
            self.odd.append(f"{where}: a box that reaches outside the image is cut")
        kept = np.unique(inside[(inside[:, 3:] > 0).all(1)], axis=0)  # sorts the rows
        if len(kept) < len(inside):
            self.odd.append(f"{where}: a box that is repeated, or of no size, is skipped")
        return kept, labels[0] if labels else None

    def read_label(self, file: Path, names: set[Path]) -> tuple[Path, str]:
        """The label file of an image and its text; it may differ in case or Unicode form.

        `names`: those that the images of the set ask for: none of them is another image's.
        """
        path = label_path(file)
        text = ""
        try:
            found = [near for near in self.spellings(path) if near == path or near not in names]
            if not found:
                self.odd.append(f"{path}: no such label file: no objects")
            elif len(found) > 1:
                near = " and ".join(sorted(other.name for other in found))
                raise DataError(f"{path}: absent; {near} are near; rename the right one")
            else:
                path = found[0]
                text = read_text(path)
        except DataError as error:
            self.faults.append(str(error))
        return path, text

    def read_labels(self, files: list[Path], table: dict[Path, int], names: set[Path]) -> Split:
        """A split without pixels: boxes and class of each image, and a fingerprint of all."""
        boxes = []
        labels = []
        declared = self.names, self.labels, *([self.points] if self.points else [])
        digest = hashlib.sha256(repr(declared).encode())
        for file in files:
            path, text = self.read_label(file, names)
            if self.owners.setdefault(path, file) != file:  # x.jpg and x.png both mean x.txt
                self.faults.append(f"{file}: shares {path} with {self.owners[path].name}; "
                                   "rename one")
            rows, label = self.parse_labels(text, str(path))
            if label is not None and table.get(file, label) != label:
                self.faults.append(f"{path}: its class row and the table differ; mend one")
            labels.append(table.get(file, label))
            boxes.append(rows)
            if self.labels and labels[-1] is None:
                self.odd.append(f"{path}: no image class: left out of the classification task")
            seen = f"{file.name} {file.stat().st_size} {labels[-1]} {text}\n"
            digest.update(seen.encode(errors="surrogateescape"))  # a name may be no UTF-8
        return Split(np.empty(0), boxes, labels, self.names, self.labels, files, self.notes,
                     digest.hexdigest()[:16], None)

    def check(self, train: Split, val: Split, tasks: tuple[str, ...]) -> None:
        """A task without anything to learn is a fault, one without anything to score a note."""
        for task, what, remedy, count in (
                ("det", "box", "--mode classify", lambda s: sum(map(len, s.boxes))),
                ("cls", "image class (a row each or a table, and classification_names)",
                 "--mode detect", lambda s: sum(k is not None for k in s.labels))):
            if task in tasks and not count(train):
                self.faults.append(f"{self.path}: train: no {what}, as in "
                                   f"{label_path(train.paths[0])}; add them, or use {remedy}")
            if task in tasks and not count(val):
                self.notes.append(f"{self.path}: val: no {what}: it has no score")
        if len(train.paths) < 2:
            self.faults.append(f"{self.path}: train: one image; expected two or more")
        if set(map(os.path.realpath, train.paths)) & set(map(os.path.realpath, val.paths)):
            self.notes.append(f"{self.path}: train and val share images: no test on new ones")
        if not self.points and len(self.shapes) in (1, 2):  # of 1,998 where there is no box
            number, width = min(self.shapes)
            self.notes.append(f"{self.path}: read as polygons, but all rows are of one length, "
                              "with points in the box of their first values: if they are "
                              f"keypoints, add kpt_shape: [{number}, {width}]")

    def in_threads(self, job: Callable, paths: list[Path], what: str) -> list:
        """What a job gives for each path; Pillow decodes outside Python's lock.

        All huge images are one thread's: each thread keeps the memory that it once took.
        """
        with ThreadPoolExecutor(THREADS) as pool, ThreadPoolExecutor(1) as alone:
            jobs = [(alone if path in self.huge else pool).submit(job, path) for path in paths]
            try:
                bar = tqdm(jobs, what, delay=1, leave=False, disable=None)
                return [job.result() for job in bar]
            finally:
                for job in jobs:  # at Ctrl-C, those that have not begun
                    job.cancel()

    def find_levels(self, files: list[Path]) -> tuple[float, float] | None:
        """Which levels of more than 8 bits become 0 and 255; notes on the images."""
        huge = self.in_threads(is_huge, files, "looking at images")
        self.huge = {path for path, alone in zip(files, huge) if alone}
        seen = self.in_threads(look_at, files, "looking at images")
        frames = {path: count for path, (count, _) in zip(files, seen) if count > 1}
        if frames:
            path = max(frames, key=frames.get)
            self.notes.append(f"{self.path}: {len(frames)} images hold several frames "
                              f"({path.name}: {frames[path]}): the first of each is read")
        levels = np.array([levels for _, levels in seen if levels])
        if not len(levels):
            return None
        low, high = stretch(levels[:, 0].min(), levels[:, 3].max())
        likely = levels[:, 2].max() - levels[:, 1].min()
        used = math.ceil(likely * 255 / (high - low)) + 1
        if used < 128 or (low, high) != SIXTEEN_BITS:
            self.notes.append(f"{self.path}: pixels of more than 8 bits: levels {low:g} and "
                              f"{high:g} become 0 and 255; 98 % of them use {used} of 256")
        return low, high

    def read_pixels(self, split: Split, pixels: np.ndarray) -> np.ndarray:
        """Decodes a split's images into squares (N, S, S, 3); gives each `letterbox` (N, 4)."""
        places = {}
        for i, path in enumerate(split.paths):
            places.setdefault(path, []).append(i)

        def read(path: Path) -> tuple[int, int, int, int] | DataError:
            first, *again = places[path]
            try:
                with open_image(path) as image:
                    fit = letterbox(to_rgb(image, split.levels), pixels[first])
            except Exception as error:
                return unreadable(path, error)
            pixels[again] = pixels[first]
            return fit

        fits = dict(zip(places, self.in_threads(read, list(places), "reading images")))
        self.faults += [str(fit) for fit in fits.values() if isinstance(fit, DataError)]
        self.raise_faults()
        return np.array([fits[path] for path in split.paths])


def new_pixels(shape: tuple[int, ...], cache_mb: float, folder: Path) -> np.ndarray:
    """An array of uint8; above `cache_mb` MB mapped from a file that goes with the process."""
    if math.prod(shape) <= cache_mb * 2**20:
        return np.empty(shape, np.uint8)
    file = folder / f"{os.getpid()}.npy"
    pixels = np.lib.format.open_memmap(file, "w+", np.uint8, shape)
    with file.open("r+b") as handle:
        file.unlink()  # open, it stays; whatever ends the process, it goes
        if hasattr(os, "posix_fallocate"):  # a full disk: an error now, no crash later
            os.posix_fallocate(handle.fileno(), 0, os.fstat(handle.fileno()).st_size)
    return pixels


def read_joint(path: Path, imgsz: int, tasks: tuple[str, ...], cache_mb: float, folder: Path
               ) -> list[Split]:
    """The train and val splits of a data.yaml, checked and decoded, on one canvas.

    `tasks`: those of "det" and "cls" that must find something to learn. Images of over
    `cache_mb` MB a split are kept in a mapped file of `folder`. DataError, with a line for each
    of the first ten faults, unless all is in order.
    """
    reader = JointFolder(path)
    files = [reader.find_images(split) for split in ("train", "val")]
    reader.raise_faults()
    test = reader.find_test()
    every = sorted({*files[0], *files[1], *(test or [])})  # splits may share images
    table = reader.read_table(every, test is not None)
    names = set(map(label_path, every))
    splits = [reader.read_labels(paths, table, names) for paths in files]
    reader.raise_faults()
    reader.check(*splits, tasks)
    reader.raise_faults()
    levels = reader.find_levels(sorted({*files[0], *files[1]}))
    fingerprint = "".join(split.fingerprint for split in splits)
    fits = []
    for k, split in enumerate(splits):
        pixels = new_pixels((len(split.paths), imgsz, imgsz, 3), cache_mb, folder)
        splits[k] = split._replace(pixels=pixels, fingerprint=fingerprint, levels=levels)
        fits.append(reader.read_pixels(splits[k], pixels))
    left, top = margins(imgsz, *np.concatenate(fits)[:, 2:].max(0))
    W = imgsz - 2 * left
    H = imgsz - 2 * top
    notes = [printable(note) for note in dict.fromkeys(reader.notes + reader.odd)]
    for k, split in enumerate(splits):
        for boxes, (x, y, w, h) in zip(split.boxes, fits[k]):  # to fractions of the canvas
            px = boxes[:, 1:] * [w, h, w, h] + [x - left, y - top, 0, 0]
            boxes[:, 1:] = px / [W, H, W, H]
        pixels = split.pixels[:, top:top + H, left:left + W]
        splits[k] = split._replace(pixels=pixels, notes=notes)
    return splits
