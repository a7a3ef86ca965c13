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
import functools
import hashlib
import itertools
import math
import os
import re
import tempfile
import unicodedata
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml
from PIL import Image, ImageOps
from tqdm import tqdm

# None of these formats runs code.
FORMATS = ("JPEG", "PNG", "BMP", "DIB", "TIFF", "WEBP", "GIF", "PPM", "JPEG2000", "AVIF")
SUFFIXES = (".apng .avif .bmp .dib .gif .j2c .j2k .jfif .jp2 .jpc .jpe .jpeg .jpf .jpg .jpx "
            ".pbm .pgm .png .pnm .ppm .tif .tiff .webp").split()
SYSTEM = ("@eadir", "@__thumb", "@recycle", "@recently-snapshot", "@tmp", "#recycle",
          "#snapshot", "~snapshot", "$recycle.bin", "__macosx", "__pycache__", "lost+found",
          "system volume information")
GREY = 114  # of the padding, as YOLOv5's
# Tags of TIFF and EXIF: bits of a sample, 0: 0 is white, how to turn it, 2: colours lie apart.
BITS = 258
WHITE = 262
ORIENTATION = 274
PLANES = 284
SIXTEEN_BITS = (0.0, 65535.0)
OTHER_ORDER = {"B": "L", "L": "B", "N": "B"}  # big, little and native (little) endian
THREADS = 8
HUGE = 2**24  # px: of images above that one at a time is decoded


class DataError(ValueError):
    """What is wrong with a set or an image: a line for each fault."""

    def __init__(self, *faults):
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

def printable(text):
    """A text on one line of at most 850 characters: names of files hold anything."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return shown if len(shown) <= 850 else f"{shown[:550]} … {shown[-290:]}"


def fold(name):
    """What names share that differ in case or Unicode form alone (ä, or a and two dots)."""
    return unicodedata.normalize("NFC", name).casefold()


def is_image(name):
    """Has a path or text the suffix of an image?"""
    return Path(name).suffix.lower() in SUFFIXES


def is_hidden(name):
    return name.startswith(".") or name.lower() in SYSTEM


def why_not(path):
    """Why a path cannot be read: absent, too long, not permitted."""
    try:
        os.stat(path)
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    return "not a file"


def read_text(path, limit=64):
    """The text of a UTF-8 file of at most `limit` MB; DataError where it is none."""
    try:
        if not os.path.isfile(path):  # but a folder, or a pipe, which has no end
            raise OSError(0, why_not(path))
        with path.open("rb") as file:
            raw = file.read(limit * 2**20 + 1)
        text = raw.decode("utf-8-sig")
    except (OSError, ValueError) as error:  # not permitted; bytes that are not UTF-8
        reason = getattr(error, "strerror", None) or "not UTF-8 text; save it as UTF-8"
        raise DataError(f"{path}: cannot be read ({reason})") from error
    if len(raw) > limit * 2**20 or "\0" in text:
        raise DataError(f"{path}: larger than {limit} MB or binary; expected a short text file")
    return text


def read_yaml(path):
    """Lists, mappings and texts of a YAML file: a scalar stays text, no object is made."""
    text = read_text(path, limit=1)  # it may be a stranger's: no endless file, no binary one
    try:
        return yaml.load(text, yaml.BaseLoader)
    except (ValueError, LookupError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"{path}: cannot be read as YAML ({reason})") from error


def parse_row(fields, num_classes, num_labels, num_points):
    """What a label row says: an image class (int) or a box [class, cx, cy, w, h].

    A one-hot row of `num_labels` values is the class even where it is as long as a box or
    polygon: read as a box it would have no size. `num_points` values of keypoints may follow a
    box; 0: a longer row is a polygon. Raises ValueError with what was expected.
    """
    if num_labels and sorted(fields) == [0] * (num_labels - 1) + [1]:
        return fields.index(1)
    if len(fields) == 1 and fields[0] in range(num_labels):
        return int(fields[0])
    if num_labels and len(fields) == 5 and set(fields) == {0, 1}:
        raise ValueError("neither a box, which has no corner as its middle, nor one-hot")
    is_polygon = not num_points and len(fields) > 5 and len(fields) % 2 == 1
    if not is_polygon and len(fields) not in (5, 5 + num_points):
        raise ValueError(f"{len(fields)} values; expected a box (5: class xc yc w h), polygon "
                         f"(class x1 y1 …; not where keypoints are), box and keypoints "
                         f"({num_points} values by kpt_shape in data.yaml), or image class "
                         f"(one-hot of {num_labels} or an index; classification_names in "
                         "data.yaml)")
    if fields[0] not in range(num_classes):
        raise ValueError("expected a box class that is a whole number from 0, the first of "
                         f"names, to {num_classes - 1}")
    values = fields[1:] if is_polygon else fields[1:5]
    if not all(-1e-3 <= v <= 1.001 for v in values):  # beyond 0 and 1: the file's rounding
        raise ValueError("expected fractions of the image from 0 to 1, not pixels; keypoints "
                         "need kpt_shape in data.yaml")
    if not is_polygon:
        return fields[:5]
    corners = np.reshape(values, (-1, 2))
    low = corners.min(0)
    high = corners.max(0)
    return [fields[0], *(low + high) / 2, *high - low]


def parse_numbers(line):
    """The numbers of a label row; ValueError with what was expected."""
    fields = [math.nan]
    with contextlib.suppress(ValueError):
        fields = [float(v) for v in line.split()]
    if not line.isascii() or not all(map(math.isfinite, fields)):  # float() reads more scripts
        raise ValueError("expected numbers such as 0.5, spaces between")
    return fields


def keypoint_shapes(fields):
    """Each kpt_shape by which the rest of a row lies in the box of its first four values."""
    shapes = []
    half = np.divide(fields[3:5], 2) + 1e-3  # and the file's rounding
    for width in (3, 2):
        if (len(fields) - 5) % width == 0:
            points = np.reshape(fields[5:], (-1, width))[:, :2]
            near = np.abs(points - fields[1:3]) <= half
            absent = points == 0  # a point that is not seen
            if (near | absent).all():
                shapes.append((len(points), width))
    return shapes


def split_rows(lines, is_file):
    """The fields of each line, by the delimiter by which most first fields name a file.

    `is_file` says whether a text names one.
    """
    if re.match('"?sep=', "".join(lines[:1])):  # Excel's first line
        lines = ["", *lines[1:]]
    readings = []
    for delimiter in ",;\t|":
        rows = []
        for line in lines:  # one by one: a stray quote spoils its own alone
            fields = next(csv.reader([line[:99999]], delimiter=delimiter), [])
            row = [field.strip() for field in fields]
            while row and not row[-1]:
                row.pop()
            rows.append(row)
        readings.append(rows)
    return max(readings, key=lambda rows: sum(
        1 for row in rows if row[1:] and is_file(row[0])))


def take_header(rows, is_file, classes):
    """The classes that a table's columns stand for; a header is taken out of its rows.

    rows: {number of the line: its fields}; `is_file` says whether a text names a file.
    """
    for at, (name, *values) in list(rows.items())[:1]:
        if not is_file(name) and not is_image(name):
            is_one_hot = len(values) > 1 and set(values) <= set(classes)
            is_row = "".join(values[:1]) in classes or any(map(is_image, values))
            if is_one_hot or not is_row:
                del rows[at]
            return values if is_one_hot else []
    return []


def class_of_row(values, columns, classes):
    """The class that a table's row names, or marks in its one-hot columns; ValueError."""
    if columns:
        words = {"true": "1", "false": "0"}
        marks = [words.get(v.lower(), v.removesuffix(".0")) for v in values]
        if sorted(marks) != ["0"] * (len(columns) - 1) + ["1"]:
            raise ValueError("expected one 1, and 0 for each other class of the header")
        return columns[marks.index("1")]
    if "".join(values[:1]) not in classes:
        raise ValueError(f"expected one of the classes {', '.join(classes)[:200]}, or a header "
                         "of one-hot columns")
    if set(values[1:]) & set(classes):
        raise ValueError("a second class stands in the row; expected one")
    return values[0]


# ----------------------------------------------------------------------------------------------
# 2. Images
# ----------------------------------------------------------------------------------------------

def read_image(source, levels=None):
    """A file, an image of Pillow's or pixels as 8-bit RGB, upright; DataError for what is none.

    Pixels are (H, W) or (H, W, 3), uint8 or uint16. `levels` of more than 8 bits become 0 and
    255; None: the image's own, see `stretch`.
    """
    name = str(source)[:200]
    remedy = "replace it"
    try:
        if isinstance(source, np.ndarray):
            name = f"array of {source.dtype}"
            remedy = "expected uint8 (H, W, 3), RGB"
            pixels = to_8_bit(source, levels) if source.dtype == np.uint16 else source
            source = Image.fromarray(pixels)  # TypeError for other kinds and shapes
        if isinstance(source, Image.Image):
            return to_rgb(source, levels)
        with open_image(source) as image:
            return to_rgb(image, levels)
    except Exception as error:  # Pillow raises some ten types on damaged bytes
        raise DataError(f"{name}: not a readable image ({str(error)[:60]}); "
                        f"{remedy}") from error


def open_image(path):
    """An image file, of which the header is read; ValueError where it is too large."""
    image = Image.open(path, formats=FORMATS)
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        image.close()
        raise ValueError(f"over {Image.MAX_IMAGE_PIXELS:,} pixels")
    return image


def to_rgb(image, levels):
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


def deep_pixels(image):
    """Pixels (H, W) or (H, W, 3) of an image of more than 8 bits, None of all others."""
    tags = getattr(image, "tag_v2", {})  # a TIFF's
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        return 65535 - grey if tags.get(WHITE) == 0 else grey
    tiles = getattr(image, "tile", [])
    if not tiles:  # already decoded
        return None
    args = tiles[0].args
    rawmode = args[0] if isinstance(args, tuple) and args else args
    if tiles[0].codec_name.startswith("ppm") and rawmode == "RGB" and args[1] > 255:
        return ppm_colour(image)
    if re.fullmatch("(RGB|RGBA|RGBX|LA);16[BLN]", str(rawmode)) and tags.get(PLANES) != 2:
        return both_bytes(image, rawmode)
    if max(tags.get(BITS, [8])) > 8:
        raise ValueError("a layout of 16 bits that is not read; save as PNG")
    return None


def ppm_colour(image):
    """Pixels (H, W, 3) of a PPM of more than 8 bits, read as grey of three times the width."""
    width, height = image.size
    twin = Image.open(image.fp, formats=FORMATS)
    twin._mode = "I"
    twin._size = (3 * width, height)
    twin.tile = [tile._replace(extents=(0, 0, *twin.size)) for tile in twin.tile]
    return np.asarray(twin).reshape(height, width, 3)


def both_bytes(image, rawmode):
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


def stretch(low, high):
    """What becomes 0 and 255: all 16 bits, where at least half of them or one level is used."""
    is_wide = low >= 0 and high <= 65535 and high - low >= 32768
    return SIXTEEN_BITS if is_wide or low == high else (float(low), float(high))


def to_8_bit(deep, levels):
    """Pixels of more than 8 bits as uint8 of the same shape; None: by their own range."""
    low, high = map(int, levels or stretch(int(deep.min()), int(deep.max())))
    pixels = np.empty(deep.shape, np.uint8)
    for row, wide in zip(pixels, deep):  # a copy of a row is small, one of a large image is not
        row[:] = (wide.astype(np.int64).clip(low, high) - low) * 255 // (high - low)
    return pixels


def count_frames(image):
    """Frames of a file, at most 1,000; a second picture in a JPEG is a preview."""
    count = 1
    with contextlib.suppress(Exception):  # the end, or a frame of a kind not known
        while count < 1000 and image.format != "MPO":
            image.seek(count)
            count += 1
    image.seek(0)
    return count


def is_huge(path):
    with contextlib.suppress(Exception), open_image(path) as image:
        return image.width * image.height > HUGE
    return False  # unreadable: told where its pixels are read


def look_at(path):
    """Frames of an image; levels of more than 8 bits: least, of 1 %, of 99 %, greatest."""
    with contextlib.suppress(Exception), open_image(path) as image:
        frames = count_frames(image)
        deep = deep_pixels(image)
        if deep is None:
            return frames, []
        return frames, [deep.min(), *np.percentile(deep[::4, ::4], (1, 99)), deep.max()]
    return 1, []


def in_threads(job, what, files, *more):
    """What a job gives for each file, and value of `more`.

    Pillow decodes outside Python's lock. Huge images follow, one at a time: each thread keeps
    the memory that it once took.
    """
    def start(file, *values):
        return None if is_huge(file) else (job(file, *values),)

    with ThreadPoolExecutor(THREADS) as pool:
        results = pool.map(start, files, *more)  # Ctrl-C cancels those that have not begun
        bar = tqdm(results, what, len(files), delay=1, leave=False, disable=None)
        done = list(bar)
    return [one[0] if one else job(*given) for one, *given in zip(done, files, *more)]


def letterbox(image, square):
    """Pastes an RGB image into the middle of a square (S, S, 3): int left, top, w, h in px."""
    imgsz = len(square)
    w, h = (max(1, round(side * imgsz / max(image.size))) for side in image.size)
    left, top = (imgsz - w) // 2, (imgsz - h) // 2
    square[:] = GREY
    square[top:top + h, left:left + w] = image.resize((w, h), Image.Resampling.BILINEAR)
    return left, top, w, h


def margins(imgsz, w, h):
    """Px to cut off a square at left and top, to leave w and h in multiples of 32 px."""
    return tuple((imgsz - math.ceil(side / 32) * 32) // 2 for side in (w, h))


def to_canvas(image, imgsz):
    """The pixels (H, W, 3) of one image on a canvas of its own; where on it: see letterbox."""
    square = np.empty((imgsz, imgsz, 3), np.uint8)
    left, top, w, h = letterbox(image, square)
    x, y = margins(imgsz, w, h)
    return square[y:imgsz - y, x:imgsz - x], (left - x, top - y, w, h)


# ----------------------------------------------------------------------------------------------
# 3. Files
# ----------------------------------------------------------------------------------------------

def is_within(path, top):
    """Whether a path leads, through all links, to a place in a folder or to the folder."""
    real = Path(os.path.realpath(path))
    return top == real or top in real.parents


def lies_near(path, top):
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


def list_names(folder):
    """What a folder holds, by folded names; DataError where that may not be known."""
    paths = defaultdict(list)
    try:
        for name in os.listdir(folder):
            paths[fold(name)].append(folder / name)
    except (FileNotFoundError, NotADirectoryError):
        pass  # nothing there
    except OSError as error:
        raise DataError(f"{folder}: cannot be read ({error.strerror})") from error
    return paths


def label_path(image):
    """images/<split>/x.jpg -> labels/<split>/x.txt, at the last folder named images."""
    parts = list(image.parts)
    parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts).with_suffix(".txt")


def list_files(folder, top):
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
                known = is_folder or is_image(path)
                if is_hidden(path.name):
                    hidden += [path.name] if known else []
                elif is_folder:  # those that links lead to last: a file has its own path first
                    queue.insert(len(queue) if path.is_symlink() else 0, path)
                else:
                    (images if known else others).append(path)
    if hidden:
        names = ", ".join(dict.fromkeys(hidden))
        notes.append(f"{folder}: hidden or a system's, left out: {names[:200]}")
    if others:
        stems = {path.with_suffix("") for path in images}
        notes.append(describe_others(folder, others, stems))
    return sorted(images), others, notes


def describe_others(folder, others, stems):
    """A note on files that are no images by their suffix; stems: of the images beside them."""
    kinds = Counter(path.suffix.lower() or "without suffix" for path in others).most_common(5)
    told = ", ".join(f"{count} {kind}" for kind, count in kinds)
    labels = [path for path in others if "images" in path.parts
              and path.with_suffix("") not in stems and os.path.exists(label_path(path))]
    there = f"; labels are there for {len(labels)}: convert them" if labels else ""
    return f"{folder}: {len(others)} files of a kind not read ({told}){there}"


def find_images(folder):
    """Every image below a folder, sorted, and notes on what was left out."""
    images, _, notes = list_files(folder, Path(os.path.realpath(folder)))
    return images, notes


def finder(files):
    """A function: a name or path -> the files that it means, by the whole, else by its stem."""
    table = defaultdict(list)
    for file in files:
        path = Path(unicodedata.normalize("NFC", str(file)))
        for last in (path.name, f"{path.stem}.*"):
            table[last].append((path.parent.parts, file))

    def find(text):
        path = Path(text.replace("\\", "/"))
        folders = path.parent.parts
        stem = path.stem if is_image(path) else path.name
        for last in (path.name, f"{path.name}.*", f"{stem}.*"):
            found = [file for parts, file in table[last]
                     if parts[len(parts) - len(folders):] == folders]
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

    def __init__(self, path):
        self.path = path
        self.faults = []
        self.notes = []
        self.odd = []
        self.is_whole = True  # or a table may name images of a test part that is not there
        self.unread = []  # files that are no images by their suffix
        self.owners = {}  # of each label file its image
        self.listing = functools.cache(list_names)
        self.longer = 0  # rows of more than a box, and what kpt_shape each may have
        self.shapes = Counter()
        self.cut = Counter()  # of boxes: does it reach outside?
        self.spec = self.read_spec()
        self.root = path.parent
        self.root = self.locate("path", self.spec.get("path") or ".")
        self.top = Path(os.path.realpath(self.root))
        self.names = self.class_names("names", 1)
        self.labels = []
        if "classification_names" in self.spec:
            self.labels = self.class_names("classification_names", 2)
        count = str(len(self.names))
        if self.spec.get("nc", count) != count:
            raise DataError(f"{path}: nc: expected {count}, as there are names")
        self.points = self.count_points()

    def note(self, text):
        self.notes.append(f"{self.path}: {text}")

    def fault(self, text):
        self.faults.append(f"{self.path}: {text}")

    def raise_faults(self):
        faults = list(dict.fromkeys(self.faults))
        if len(faults) > 10:
            faults[10:] = [f"… and {len(faults) - 10} more"]
        if faults:
            raise DataError(*faults)

    def read_spec(self):
        """What data.yaml says."""
        if not os.path.isfile(self.path):
            counts = "" if self.path.is_absolute() else f"; it counts from {os.getcwd()}"
            near = lies_near(self.path / "data.yaml", Path(Path.cwd().anchor))
            raise DataError(f"{self.path}: cannot be read ({why_not(self.path)}){counts}{near}")
        spec = read_yaml(self.path)
        if isinstance(spec, dict):
            return spec
        raise DataError(f"{self.path}: expected path, train, val, names, classification_names")

    def class_names(self, key, least):
        """Class names from a list or a mapping of 0, 1, … to names."""
        names = self.spec.get(key)
        if isinstance(names, dict):
            names = [names.get(str(i)) for i in range(len(names))]  # None in a gap
        is_list = isinstance(names, list) and all(isinstance(name, str) for name in names)
        if not is_list or len(names) < least:
            raise DataError(f"{self.path}: {key}: expected a list of names, or 0: name, 1: "
                            f"name; at least {least}")
        # JSON's escapes are halves of a letter: pairs are joined, a lone half is a mark.
        whole = [name.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
                 for name in names]
        names = [unicodedata.normalize("NFC", name) for name in whole]
        if len(set(names)) < len(names):
            raise DataError(f"{self.path}: {key}: a name is given twice; rename one")
        return names

    def count_points(self):
        """How many values of keypoints follow a box, by kpt_shape."""
        shape = self.spec.get("kpt_shape")
        if not shape:
            return 0
        if isinstance(shape, str):
            shape = re.findall(r"[\w.]+", shape)
        for number in range(1, 1000):
            for width in (2, 3):
                if shape == [str(number), str(width)]:
                    self.note("kpt_shape: keypoints are not read, boxes are")
                    return number * width
        raise DataError(f"{self.path}: kpt_shape: expected [number of points, 2 or 3]")

    def spellings(self, path):
        """The path alone where it is there, else those that differ in case or Unicode form."""
        if os.path.lexists(path) or path == path.parent:
            return [path]
        folders = self.spellings(path.parent)
        return [near for folder in folders for near in self.listing(folder)[fold(path.name)]]

    def look_up(self, folder, text):
        """The path below a folder that a text means, or, where none is there, that it says."""
        slashed = text.replace("\\", "/")
        for name in (text, slashed, slashed.removeprefix("../")):  # the last as YOLOv5 does
            with contextlib.suppress(DataError):
                found = self.spellings(folder / name)
                if len(found) == 1:
                    return found[0]
        return folder / text

    def locate(self, key, text):
        """The file or folder that a key of data.yaml names; DataError."""
        if not isinstance(text, str) or not text:
            found = ("empty or missing; expected path, train, val, names, "
                     f"classification_names; there are {', '.join(self.spec)[:200]}")
            if text:
                found = f"expected a path, found {str(text)[:200]}"
            raise DataError(f"{self.path}: {key}: {found}")
        path = self.look_up(self.root, text)
        if not os.path.exists(path):
            near = lies_near(path, Path(os.path.realpath(self.root)))
            raise DataError(f"{self.path}: {key}: {text[:200]!r} cannot be read "
                            f"({why_not(path)}); it counts from {self.root}{near}")
        return path

    def find_images(self, split):
        """Image files of a split (a folder, a .txt list, or a list of these), sorted.

        One that is listed again stands there again: it is seen as often in training.
        """
        files = []
        entry = self.spec.get(split)
        for part in entry if isinstance(entry, list) else [entry]:
            path = self.locate(split, part)
            if os.path.isdir(path):
                images, others, notes = list_files(path, self.top)
                files += images
                self.unread += others
                self.notes += notes
            else:
                files += self.read_list(path)
        distinct = sorted(set(files))
        if len(distinct) < len(files):
            self.note(f"{split}: {len(files) - len(distinct)} images are listed again: each "
                      "counts as often as it is listed")
        for file in distinct:
            if not is_within(file, self.top):
                self.fault(f"{split}: {file}: outside {self.root}, by its path or a link; copy "
                           "it in, mend the line, or set path")
            elif os.path.islink(file) and not os.path.isfile(file):
                self.fault(f"{split}: {file}: a link to nothing; fetch its file, or delete it")
            elif not os.path.isfile(file):
                near = lies_near(file, self.top) if len(self.faults) < 10 else ""
                self.fault(f"{split}: {file}: {why_not(file)}; mend the line, or set "
                           f"path{near}")
            elif "images" not in file.parts:
                self.fault(f"{split}: {file}: expected below a folder named images, so that "
                           "its label file lies below one named labels; move it")
        if not files:
            kinds = " ".join(SUFFIXES)
            told = "".join(f"; {note}" for note in self.notes)
            self.fault(f"{split}: no image; expected {kinds}{told}")
        return sorted(files)

    def read_list(self, path):
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

    def find_test(self):
        """Images of `test`, which a table may name too; none, and a note, where it is wrong."""
        try:
            files = self.find_images("test") if self.spec.get("test") else []
            self.raise_faults()
            return files
        except DataError as error:
            first, *_ = str(error).splitlines()
            self.notes.append(f"{first} (training needs no test)")
            self.faults.clear()
            self.is_whole = False
            return []

    def read_table(self, files):
        """{image: index of its class} by `classes: FILE`, a table of files and class names."""
        if "classes" not in self.spec:
            return {}
        if not self.labels:
            raise DataError(f"{self.path}: classes: needs classification_names beside it")
        path = self.locate("classes", self.spec["classes"])
        find = finder(files)
        find_unread = finder(self.unread)
        lines = unicodedata.normalize("NFC", read_text(path)).splitlines()
        rows = {at: row for at, row in enumerate(split_rows(lines, find), 1) if row}
        columns = take_header(rows, find, self.labels)
        if not columns and any(row[2:] for row in rows.values()):
            self.notes.append(f"{path}: columns after the second are not read")
        classes = {}
        for at, row in rows.items():
            name = row[0]
            where = f"{path}:{at}: {name[:60]!r}, {','.join(row[1:])[:60]!r}"
            images = find(name)
            remedy = "mend the name, delete the row, or give its images as test"
            if images:
                remedy = "give its folder too"
            elif find_unread(name):
                remedy = "its file is there, of a kind not read: convert it"
            elif len(find(re.split(r"[/\\]", name)[-1])) == 1:
                remedy = "give the name alone: it is not in this folder"
            elif any(is_image(value) and find(value) for value in row[1:]):
                remedy = "put the file into the first column, the class into the second"
            said = f"{len(images)} images are named so; expected one; {remedy}"
            if not images and not self.is_whole:
                self.odd.append(f"{where}: {said}")
                continue
            try:
                if len(images) != 1:
                    raise ValueError(said)
                label = class_of_row(row[1:], columns, self.labels)
                if classes.setdefault(images[0], label) != label:
                    raise ValueError("another class stands above; delete one")
            except ValueError as error:
                self.faults.append(f"{where}: {error}")
        return {image: self.labels.index(label) for image, label in classes.items()}

    def parse_labels(self, text, where):
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
                if len(fields) > 5:
                    self.longer += 1
                    self.shapes.update(keypoint_shapes(fields))
            elif labels:
                self.faults.append(f"{where}:{at}: a second image class; delete the wrong row")
            else:
                labels.append(row)
        boxes = np.array(boxes, np.float32).reshape(-1, 5)
        low = (boxes[:, 1:3] - boxes[:, 3:] / 2).clip(0, 1)  # (n, 2) x1 y1
        high = (boxes[:, 1:3] + boxes[:, 3:] / 2).clip(0, 1)  # (n, 2) x2 y2
        inside = np.concatenate([boxes[:, :1], (low + high) / 2, high - low], 1)
        cut = np.abs(inside - boxes).max(1, initial=0) > 1e-3  # below that: the file's rounding
        self.cut.update(cut.tolist())
        if cut.any():
            self.odd.append(f"{where}: a box that reaches outside the image is cut")
        kept = np.unique(inside[(inside[:, 3:] > 0).all(1)], axis=0)  # sorts the rows
        if len(kept) < len(inside):
            self.odd.append(f"{where}: a box that is repeated, or of no size, is skipped")
        return kept, labels[0] if labels else None

    def read_label(self, file, names):
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

    def read_labels(self, files, table, names):
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
            known = table.get(file, label)
            if label not in (None, known):
                self.faults.append(f"{path}: its class row and the table differ; mend one")
            labels.append(known)
            boxes.append(rows)
            if self.labels and known is None:
                self.odd.append(f"{path}: no image class: left out of the classification task")
            seen = f"{file.name} {file.stat().st_size} {known} {text}\n"
            digest.update(seen.encode(errors="surrogateescape"))  # a name may be no UTF-8
        return Split(np.empty(0), boxes, labels, self.names, self.labels, files, self.notes,
                     digest.hexdigest()[:16], None)

    def note_orphans(self):
        """A note on label files, beside those that were read, for which there is no image."""
        orphans = []
        folders = {path.parent: file.parent for path, file in self.owners.items()}
        for labels, images in folders.items():
            with contextlib.suppress(DataError):  # a folder that may be entered, not listed
                of_images = itertools.chain(*self.listing(images).values())
                stems = {fold(path.stem) for path in of_images} | {"classes"}
                for path in itertools.chain(*self.listing(labels).values()):
                    is_label = path.suffix == ".txt" and not is_hidden(path.name)
                    if is_label and path not in self.owners and fold(path.stem) not in stems:
                        orphans.append(f"{path.parent.name}/{path.name}")
        if orphans:
            self.note(f"{len(orphans)} label files without an image are not read: "
                      f"{', '.join(sorted(orphans))[:200]}")

    def check(self, train, val, tasks):
        """A task without anything to learn is a fault.

        A task or class without anything to score is a note, and what looks like another format.
        """
        for task, what, remedy, names, classes in (
                ("det", "box", "--mode classify", self.names,
                 lambda split: np.concatenate(split.boxes)[:, 0]),
                ("cls", "image class (a row each or a table, and classification_names)",
                 "--mode detect", self.labels,
                 lambda split: [k for k in split.labels if k is not None])):
            if task not in tasks:
                continue
            learnt = {int(k) for k in classes(train)}
            scored = {int(k) for k in classes(val)}
            if not learnt:
                first = label_path(train.paths[0])
                near = "" if os.path.exists(first) else lies_near(first, self.top)
                self.fault(f"train: no {what}, as in {first}; add them, or use {remedy}{near}")
            if not scored:
                self.note(f"val: no {what}: it has no score")
            for split, found in (("train", learnt), ("val", scored)):
                absent = [name for k, name in enumerate(names) if k not in found]
                if found and absent:
                    self.note(f"{split}: no {what.partition(' (')[0]} of {len(absent)} of the "
                              f"{len(names)} classes: {', '.join(absent)[:200]}")
        if len(train.paths) < 2:
            self.fault("train: one image; expected two or more")
        if set(map(os.path.realpath, train.paths)) & set(map(os.path.realpath, val.paths)):
            self.note("train and val share images: no test on new ones")
        if "det" in tasks and self.cut[True] > self.cut.total() / 4:
            self.note(f"{self.cut[True]} of {self.cut.total()} boxes reach outside the image: "
                      "are the rows class xc yc w h, the middle first, not corners?")
        for (number, width), count in self.shapes.most_common(1):
            if not self.points and count > 0.9 * self.longer:  # a point may lie outside its box
                self.note("rows read as polygons are of one length, with points in the box of "
                          "their first values: if they are keypoints, add kpt_shape: "
                          f"[{number}, {width}]")

    def find_levels(self, files):
        """Which levels of more than 8 bits become 0 and 255; notes on the images."""
        seen = in_threads(look_at, "looking at images", files)
        frames = [(count, path.name) for path, (count, _) in zip(files, seen) if count > 1]
        if frames:
            most, name = max(frames)
            self.note(f"{len(frames)} images hold several frames ({name}: {most}): the first "
                      "of each is read")
        levels = np.array([levels for _, levels in seen if levels])
        if not len(levels):
            return None
        low, high = stretch(levels[:, 0].min(), levels[:, 3].max())
        used = np.ceil((levels[:, 2] - levels[:, 1]) * 255 / (high - low)) + 1
        if used.min() < 64 or (low, high) != SIXTEEN_BITS:
            self.note(f"{len(levels)} images have more than 8 bits: levels {low:.0f} and "
                      f"{high:.0f} become 0 and 255; 98 % of an image's pixels use "
                      f"{used.min():.0f} to {used.max():.0f} of the 256")
        return low, high

    def read_pixels(self, files, levels, pixels):
        """Decodes images into squares (N, S, S, 3); gives each `letterbox` (N, 4)."""
        def read(path, square):
            try:
                return letterbox(read_image(path, levels), square)
            except DataError as error:
                return error

        squares = dict(zip(files, pixels))  # one that is listed again is decoded once
        seen = in_threads(read, "reading images", list(squares), squares.values())
        fits = dict(zip(squares, seen))
        self.faults += [str(fit) for fit in seen if isinstance(fit, DataError)]
        self.raise_faults()
        for file, square in zip(files, pixels):
            square[:] = squares[file]
        return np.array([fits[file] for file in files])


def new_pixels(shape, cache_mb, folder):
    """An array of uint8; above `cache_mb` MB mapped from a file that goes with the process."""
    size = math.prod(shape)
    if size <= cache_mb * 2**20:
        return np.empty(shape, np.uint8)
    with tempfile.TemporaryFile(dir=folder) as file:  # mapped, it stays
        if hasattr(os, "posix_fallocate"):  # a full disk: an error now, no crash later
            os.posix_fallocate(file.fileno(), 0, size)
        return np.memmap(file, np.uint8, "w+", shape=shape)


def read_joint(path, imgsz, tasks, cache_mb, folder):
    """The train and val splits of a data.yaml, checked and decoded, on one canvas.

    `tasks`: those of "det" and "cls" that must find something to learn. Images of over
    `cache_mb` MB a split are kept in a mapped file of `folder`. DataError, with a line for each
    of the first ten faults, unless all is in order.
    """
    reader = JointFolder(path)
    files = [reader.find_images(split) for split in ("train", "val")]
    reader.raise_faults()
    test = reader.find_test()
    every = sorted({*files[0], *files[1], *test})  # splits may share images
    table = reader.read_table(every)
    names = set(map(label_path, every))
    splits = [reader.read_labels(paths, table, names) for paths in files]
    reader.raise_faults()
    reader.check(*splits, tasks)
    reader.note_orphans()
    reader.raise_faults()
    levels = reader.find_levels(sorted({*files[0], *files[1]}))
    squares = [new_pixels((len(paths), imgsz, imgsz, 3), cache_mb, folder) for paths in files]
    fits = [reader.read_pixels(paths, levels, pixels) for paths, pixels in zip(files, squares)]
    left, top = margins(imgsz, *np.concatenate(fits)[:, 2:].max(0))
    W = imgsz - 2 * left
    H = imgsz - 2 * top
    fingerprint = "".join(split.fingerprint for split in splits)
    notes = [printable(note) for note in dict.fromkeys(reader.notes + reader.odd)]
    done = []
    for split, pixels, places in zip(splits, squares, fits):
        for boxes, (x, y, w, h) in zip(split.boxes, places):  # to fractions of the canvas
            px = boxes[:, 1:] * [w, h, w, h] + [x - left, y - top, 0, 0]
            boxes[:, 1:] = px / [W, H, W, H]
        pixels = pixels[:, top:top + H, left:left + W]
        done.append(split._replace(
            pixels=pixels, notes=notes, fingerprint=fingerprint, levels=levels))
    return done
