"""Finds boxes and image classes by a trained network: a picture an image, predictions.json.

    python data/predict.py runs/gradnorm-synthetic-s0/best.pt images/   # or an image
    python data/predict.py runs/gradnorm-synthetic-s0/best.pt           # the val split

In Python: `from data.predict import Predictor`, then `Predictor("best.pt")("image.jpg")`.
"""
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads: no traceback
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jointgrad as jg  # noqa: E402  (before torch: it sets what torch reads when it loads)
import numpy as np  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

figures = jg.room("figures")  # whatever else is named data
joint = jg.room("joint")

# What a trained network can still be told; all other settings are its checkpoint's.
SETTINGS = """data seed device threads imgsz cache_mb conf_thres iou_thres max_det batch_size
    dominance train_images val_images predict_conf predict_iou""".split()

class Predictor:
    """A trained network: `Predictor("best.pt")("image.jpg")` -> its boxes and its image class."""

    def __init__(self, path, **settings):
        state = jg.load_checkpoint(Path(path), jg.SCHEMA, "config", "network")
        self.config = jg.make_config(state["config"] | settings, str(path))
        self.names = state["names"]
        self.classification_names = state["classification_names"]
        self.levels = state["levels"]  # that images of more than 8 bits were scaled by
        self.network = jg.Network(self.config, len(self.names), len(self.classification_names),
                                  np.ones((3, 3, 2)))  # anchors: the checkpoint brings them
        self.network.load_state_dict(state["network"])
        self.network.eval()

    def __call__(self, image):
        """boxes [{name, score, box_xyxy px}], best first, classification {name, probs} or None.

        image: a file, an image of Pillow's, or pixels (H, W, 3), RGB; else DataError, a
        ValueError. Boxes of score > predict_conf; of a class's that overlap by more than
        predict_iou the best.
        """
        image = joint.read_image(image, self.levels)
        pixels, (left, top, w, h) = joint.to_canvas(image, self.config.imgsz)
        device = next(self.network.parameters()).device
        images = torch.tensor(pixels, device=device)[None]  # (1, H, W, 3)
        images = images.permute(0, 3, 1, 2) / 255
        outputs = self.network(images)
        found = {"boxes": [], "classification": None}
        if "det" in outputs:
            config = replace(self.config, conf_thres=self.config.predict_conf,
                             iou_thres=self.config.predict_iou)
            anchors = self.network.parts[0].heads["det"].anchors
            (rows,) = jg.find_boxes(outputs["det"], anchors, config)
            unit = np.divide(image.size, (w, h))  # px of the image in one of the canvas
            for *box, score, k in rows.tolist():
                corners = (np.reshape(box, (2, 2)) - (left, top)) * unit
                edges = corners.clip(0, image.size).flatten().tolist()
                found["boxes"].append({"name": self.names[int(k)], "score": score,
                                       "box_xyxy": edges})
        if "cls" in outputs:
            probs = outputs["cls"][0].softmax(0).tolist()
            name = self.classification_names[np.argmax(probs)]
            probs = dict(zip(self.classification_names, probs))
            found["classification"] = {"name": name, "probs": probs}
        return found

def draw(predictor, image, found, path):
    """The picture of an image with what was found on it."""
    shown = figures.class_names(predictor.names)
    boxes = []
    for box in found["boxes"]:
        k = predictor.names.index(box["name"])
        boxes.append((k, box["box_xyxy"], f"{shown[k]} {box['score']:.2f}"))
    title = ""
    if found["classification"]:
        probs = [*found["classification"]["probs"].values()]
        shown = figures.class_names(predictor.classification_names)
        title = f"{shown[np.argmax(probs)]} {max(probs):.2f}"
    figures.save(figures.draw_found(image, boxes, title), path)

def score_val(predictor, out):
    """The images of the val split, and the network's metrics on it."""
    _, data = jg.load_data(predictor.config, out)
    learnt = predictor.names + predictor.classification_names
    if data.names + data.classification_names != learnt:
        raise jg.UserError(f"--data {predictor.config.data}: other classes than the "
                           "checkpoint's")
    metrics = jg.evaluate(predictor.network, data, predictor.config)
    print(jg.markdown(["metric", "value"], [[key, metrics[key]] for key in jg.METRICS]))
    return data.paths or list(data.pixels), metrics

def predict(predictor, source, out):
    """Pictures and predictions.json in `out`; a file that is no image is a warning."""
    items = [source]
    metrics = None
    if not source:
        items, metrics = score_val(predictor, out)
    elif source.is_dir():
        anywhere = Path(source.resolve().anchor)  # a link in it may lead out of it
        items, _, notes = joint.list_files(source, anywhere)
        sys.stderr.writelines(f"warning: {note}\n" for note in notes)
    images = []
    for k, item in enumerate(tqdm(items, unit="image", disable=None, leave=False)):
        name = item if isinstance(item, Path) else Path(f"val-{k}")
        picture = re.sub(r"[^\w.-]", "_", name.stem)[:50] + ".png"  # no newline, no long name
        while (out / picture).exists():
            picture = f"{k}-{picture}"
        try:
            image = joint.read_image(item, predictor.levels)
        except joint.DataError as error:
            tqdm.write(f"warning: {error}; skipped", sys.stderr)
            continue
        frames, deep = joint.look_at(item) if isinstance(item, Path) else (1, [])
        if frames > 1:
            tqdm.write(f"warning: {name}: several frames: the first is read", sys.stderr)
        if deep and not predictor.levels and not images:
            tqdm.write(f"warning: {name}: more than 8 bits, unlike what this network learnt "
                       "from: each such image is scaled by its own range", sys.stderr)
        found = predictor(image)
        try:
            draw(predictor, image, found, out / picture)
        except Exception as error:  # of a drawing library: any type
            tqdm.write(f"warning: {picture} is not drawn ({error})", sys.stderr)
        told = str(name).encode(errors="replace").decode()  # it may be no UTF-8
        images.append({"image": told, "picture": picture} | found)
    if not images:
        raise jg.UserError(f"{source}: no readable image there")
    jg.write_json(out / "predictions.json", {"schema": jg.SCHEMA, "mode": "predict",
                                             "metrics": metrics, "images": images})
    print(f"{len(images)} picture(s) and predictions.json written to {out}/")

def job(args, settings):
    """Predicts into a new folder; a mistake is told before it is made."""
    if not args.checkpoint:
        raise jg.UserError("which network? Expected a run's best.pt, then an image or a folder")
    if args.source and not args.source.exists():
        raise jg.UserError(f"{args.source}: no such file or folder; expected an image, or a "
                           "folder of images")
    unused = [*settings.keys() - SETTINGS]
    if unused or args.config != jg.ROOT / "config.yaml":
        raise jg.UserError(f"--{', --'.join(unused) or 'config'}: the checkpoint has its own; "
                           f"expected --out, --{', --'.join(SETTINGS)}")
    predictor = Predictor(args.checkpoint, **settings)
    jg.start_torch(predictor.config)
    predictor.network.to(jg.pick_device(predictor.config.device))
    with jg.new_folder(args.out, f"predict-{args.checkpoint.resolve().parent.name}") as out:
        predict(predictor, args.source, out)

def main(argv=None):
    """Runs the command line; the exit code."""
    parser = jg.option_parser(__doc__.partition("\n")[0])
    parser.usage = "python data/predict.py CHECKPOINT [SOURCE] [--option value …]"
    parser.add_argument("checkpoint", nargs="?", type=Path, help="a run's best.pt or last.pt")
    parser.add_argument("source", nargs="?", type=Path,
                        help="an image, or a folder of images; without it: the run's val split")
    return jg.run_program(parser, job, argv)

if __name__ == "__main__":
    sys.exit(main())
