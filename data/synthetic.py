"""Writes jointgrad's built-in set as files in the joint format, for any other trainer.

    python data/synthetic.py DIR                       # the defaults of config.yaml
    python data/synthetic.py DIR --imgsz 128 --seed 3 --dominance 0.5

Images and YOLO label files as a detector's tools want them; the image classes in classes.csv.
"""
import signal
import sys
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads: no traceback
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jointgrad as jg  # noqa: E402
import yaml  # noqa: E402
from PIL import Image  # noqa: E402

def write_split(folder: Path, split: str, data: jg.JointSet) -> list[str]:
    """Writes the images and label files of a split; the rows of its images for classes.csv."""
    for kind in ("images", "labels"):
        (folder / kind / split).mkdir(parents=True)
    rows = []
    for i, (pixels, boxes) in enumerate(zip(data.pixels, data.boxes)):
        name = f"{split}/{i:05d}"
        Image.fromarray(pixels).save(folder / f"images/{name}.png")
        lines = ["%d %.6f %.6f %.6f %.6f\n" % tuple(row) for row in boxes.tolist()]
        (folder / f"labels/{name}.txt").write_text("".join(lines))
        rows.append(f"{name}.png,{data.classification_names[data.labels[i]]}\n")
    return rows

def export(args: Any, settings: dict[str, Any]) -> None:
    """The train and val splits below `args.folder`, which must be new or empty."""
    if not args.folder:
        raise jg.UserError("which folder? Expected a new one")
    config = jg.load_config(args.config, settings | {"data": "synthetic"})
    with jg.new_folder(args.folder, "") as folder:
        train_set, val_set = jg.load_data(config)
        rows = write_split(folder, "train", train_set) + write_split(folder, "val", val_set)
        (folder / "classes.csv").write_text("image,class\n" + "".join(rows))
        # Absolute: a relative one YOLOv5 takes from its folder, ultralytics from the caller's.
        spec = {"path": str(folder.resolve()), "train": "images/train", "val": "images/val",
                "nc": len(train_set.names), "names": train_set.names,
                "classification_names": train_set.classification_names,
                "classes": "classes.csv"}
        (folder / "data.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    print(f"{len(rows)} images, labels, classes.csv and data.yaml written to {folder}/")

if __name__ == "__main__":
    parser = jg.option_parser(__doc__.partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, help="a new folder")
    sys.exit(jg.run_program(parser, export))
