"""Makes the joint blood smear set from its two public sources (see README.md in this folder).

Boxes come from BCCD's Pascal VOC files, the image's class from wbc-classification's labels.csv:
    python data/bccd.py BCCD_Dataset wbc-classification --out data/bccd
"""
import argparse
import csv
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

from PIL import Image

HERE = Path(__file__).resolve().parent
BOXES = ["RBC", "WBC", "Platelets"]
TYPES = ["EOSINOPHIL", "LYMPHOCYTE", "MONOCYTE", "NEUTROPHIL"]
SIZE = (320, 240)  # half of BCCD's 640 x 480
DATA_YAML = f"""# Joint blood smear set: cell boxes, and one white cell type per image.
path: .  # the folder of this file
train: images/train
val: images/val
nc: 3
names: [{", ".join(BOXES)}]
classification_names: [{", ".join(TYPES)}]
"""


def read_split(path: Path) -> list[tuple[str, str]]:
    """(split, stem) of every image that goes in, from lines such as `train BloodImage_00001`."""
    rows = [tuple(line.split()) for line in path.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        known = len(row) == 2 and row[0] in ("train", "val")
        if not known or not row[1].split("_")[-1].isdigit():
            raise ValueError(f"{path}: expected `train NAME_NUMBER` or `val …`, found {row}")
    return rows


def read_types(folder: Path) -> dict[int, set[str]]:
    """The white cell types of every image number; some commits keep labels.csv in _inputs."""
    moved = folder / "_inputs" / "labels.csv"
    path = moved if moved.exists() else folder / "labels.csv"
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file, restval="")
        if not {"Image", "Category"} <= set(rows.fieldnames or []):
            raise ValueError(f"{path}: expected the columns Image and Category")
        return {int(r["Image"]): set(r["Category"].replace(" ", "").split(",")) for r in rows}


def box_rows(path: Path, width: int, height: int) -> list[str]:
    """`class xc yc w h` as fractions of the image, in the file's order, empty boxes left out."""
    try:
        boxes = []
        for found in ET.parse(path).getroot().findall("object"):
            box = found.find("bndbox")
            corners = [float(box.findtext(side)) for side in ("xmin", "ymin", "xmax", "ymax")]
            boxes.append((found.findtext("name"), *corners))
    except (ET.ParseError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a Pascal VOC file ({error})") from None
    rows = []
    for name, x1, y1, x2, y2 in boxes:
        if name not in BOXES:
            raise ValueError(f"{path}: expected one of {BOXES}, found {name!r}")
        if x2 > x1 and y2 > y1:
            centre = f"{(x1 + x2) / 2 / width:.6f} {(y1 + y2) / 2 / height:.6f}"
            size = f"{(x2 - x1) / width:.6f} {(y2 - y1) / height:.6f}"
            rows.append(f"{BOXES.index(name)} {centre} {size}")
    return rows


def type_row(types: set[str], stem: str) -> str:
    if len(types) != 1 or not types <= set(TYPES):
        raise ValueError(f"labels.csv: {stem}: expected one of {TYPES}, found {sorted(types)}")
    return " ".join(str(int(name in types)) for name in TYPES)


def convert(bccd: Path, wbc: Path, out: Path, split_file: Path) -> int:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: exists already; remove it or give another --out")
    split = read_split(split_file)
    types = read_types(wbc)
    labels = {}
    for _, stem in split:  # every label first, so that a fault leaves nothing half written
        with Image.open(bccd / f"BCCD/JPEGImages/{stem}.jpg") as image:
            rows = box_rows(bccd / f"BCCD/Annotations/{stem}.xml", *image.size)
        rows += ["", type_row(types.get(int(stem.split("_")[-1]), set()), stem)]
        labels[stem] = "\n".join(rows) + "\n"
    for part, stem in split:
        for kind in ("images", "labels"):
            (out / kind / part).mkdir(parents=True, exist_ok=True)
        with Image.open(bccd / f"BCCD/JPEGImages/{stem}.jpg") as image:
            small = image.convert("RGB").resize(SIZE, Image.Resampling.LANCZOS)
        small.save(out / f"images/{part}/{stem}.jpg", quality=85)
        label_file = out / f"labels/{part}/{stem}.txt"
        label_file.write_text(labels[stem], encoding="utf-8", newline="\n")
    (out / "data.yaml").write_text(DATA_YAML, encoding="utf-8")
    return len(split)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("bccd", type=Path, help="checkout of github.com/Shenggan/BCCD_Dataset")
    add("wbc", type=Path, help="checkout of github.com/dhruvp/wbc-classification")
    add("--out", type=Path, default=HERE / "bccd", help="folder to make")
    add("--split", type=Path, default=HERE / "bccd_split.txt", help="images to use")
    args = parser.parse_args(argv)
    try:
        print(f"{convert(args.bccd, args.wbc, args.out, args.split)} images in {args.out}")
        return 0
    except (OSError, ValueError) as error:
        lost = isinstance(error, FileNotFoundError) and f"{error.filename}: no such file"
        print(lost or " ".join(str(error).split()), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
