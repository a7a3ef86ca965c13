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

def export(args: Any, settings: dict[str, Any]) -> None:
    """The train and val splits below `args.folder`, which must be new or empty."""
    folder = jg.new_folder(args.folder, "")
    config = jg.load_config(args.config, settings | {"data": "synthetic"})
    rows = ["image,class"]
    for split, data in zip(("train", "val"), jg.load_data(config)):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for i, (pixels, boxes, label) in enumerate(zip(data.pixels, data.boxes, data.labels)):
            Image.fromarray(pixels).save(folder / f"images/{split}/{i:05d}.png")
            lines = ["%d %.6f %.6f %.6f %.6f\n" % tuple(row) for row in boxes.tolist()]
            (folder / f"labels/{split}/{i:05d}.txt").write_text("".join(lines))
            rows.append(f"{split}/{i:05d}.png,{data.classification_names[label]}")
    # Absolute: YOLOv5 takes a relative path from its own folder, ultralytics from where one stands.
    spec = {"path": str(folder.resolve()), "train": "images/train", "val": "images/val",
            "nc": len(data.names), "names": data.names,
            "classification_names": data.classification_names, "classes": "classes.csv"}
    (folder / "classes.csv").write_text("\n".join(rows) + "\n")
    (folder / "data.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    print(f"{len(rows) - 1} images, labels, classes.csv and data.yaml written to {folder}/")

if __name__ == "__main__":
    parser = jg.option_parser(__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="a new folder")
    sys.exit(jg.run_program(parser, export))
