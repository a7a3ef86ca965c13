"""study: many runs of jointgrad.py -> statistics over seeds, differences and claims judged.

    python data/study.py compare --jobs 2       # the card's eight modes over seeds 0 to 5
    python data/study.py compare --modes detect classify cap:cap=0.5 fixed:initial_weights=1,0.2
    python data/study.py compare --modes detect classify gradnorm --sweep alpha=1.5,3
    python data/study.py compare --print | xargs -P 8 -d '\\n' -n 1 sh -c   # its runs elsewhere
    python data/study.py check data/results/compare/results.json --seeds 200    # repeats a part

A label is a mode as config.yaml has it, or MODE:key=value. Fixed before looking: what is judged
(mAP50-95, balanced accuracy, and `delta_m`, their mean gain over the single tasks in %), and
the family of differences, `contrasts`. `compare --help` and `check --help` list the options.
"""
import argparse
import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads: no traceback
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import jointgrad as jg  # noqa: E402
import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

# --------------------------------------------------------------------------------------------------
# 1. Labels: modes and values of their keys -> what a comparison runs
# --------------------------------------------------------------------------------------------------

MODES = ["detect", "classify", "fixed", "equal", "gradnorm", "dual", "detach", "cap"]
OWN = {  # keys that one mode or two read; every other key is read by all
    "fixed": ("initial_weights",),
    "gradnorm": ("initial_weights", "alpha", "gradnorm_lr", "w_min"),
    "cap": ("cap",),
    "dual": ("dual_lr", "dual_width_multiple", "progressive_share", "progressive_scale")}

def mode_of(label):
    return label.partition(":")[0]

def owners(key):
    """The modes that alone read a key; none where all do."""
    return [mode for mode, keys in OWN.items() if key in keys]

def reads(mode, key):
    return mode in (owners(key) or jg.MODES)

def settings_of(label):
    """What a label MODE:key=value:… sets, as text; UserError."""
    mode, *pairs = label.split(":")
    if mode not in jg.MODES:
        raise jg.UserError(f"--modes {label[:60]}: no such mode; expected all, or some of "
                           f"{', '.join(jg.MODES)}, with or without :key=value")
    settings = {"mode": mode}
    for pair in pairs:
        key, _, value = pair.partition("=")
        if not value or key in ("seed", "data", *settings) or not reads(mode, key):
            raise jg.UserError(f"{label[:60]}: found {pair[:60]!r}, expected key=value of a "
                               f"key that {mode} reads")
        settings[key] = value
    return settings

def common(label):
    """The settings of a label that every mode would read."""
    settings = settings_of(label)
    return {key: settings[key] for key in settings if key != "mode" and not owners(key)}

def partner(labels, mode, label):
    """The label of a mode as shipped, at the same common settings; None if it is not there."""
    wanted = {"mode": mode} | common(label)
    return next((x for x in labels if settings_of(x) == wanted), None)

def make_labels(modes, sweeps):
    """Each label at each value of the swept keys that its mode reads; UserError."""
    labels = []
    for mode in modes:
        labels += jg.MODES if mode == "all" else [mode]
    for sweep in sweeps:
        key, _, text = sweep.partition("=")
        values = [x.strip("[] ") for x in re.findall(r"\[.*?\]|[^,]+", text)]  # [1,0.1] is one
        swept = {label: [f"{label}:{key}={x}" for x in values]
                 for label in labels if reads(mode_of(label), key)}
        if not values or not swept:
            raise jg.UserError(f"--sweep {sweep[:60]}: expected key=v1,v2 of a key that "
                               "--modes read; a value that has a comma as [1,0.1]")
        labels = [x for label in labels for x in swept.get(label, [label])]
    return labels

def place_of(label, swept):
    """Where a label stands in the picture of a sweep: its line and the value on the axis."""
    mode, *parts = label.split(":")
    at = [part for part in parts if part.partition("=")[0] in swept]
    line = ":".join([mode, *(part for part in parts if part not in at)])
    value = ", ".join(part.partition("=")[2] for part in at) or None
    return {"mode": line, "value": value, "label": label}

# --------------------------------------------------------------------------------------------------
# 2. Cells: a label and a seed -> one process of jointgrad.py in a folder of its own
# --------------------------------------------------------------------------------------------------

class Plan(NamedTuple):
    """A comparison: what is run, not where nor how many at a time."""
    labels: list[str]
    seeds: list[int]
    config: dict  # as JSON has it; a label's settings and the seed are laid over it
    swept: list[str]  # keys

class Cell(NamedTuple):
    label: str
    seed: int
    config: dict
    command: list[str]
    folder: Path

def make_cell(plan, label, seed, out):
    given = settings_of(label) | {"seed": str(seed)}
    init = (plan.config | given)["init"]
    if init:
        given["init"] = init.replace("{seed}", str(seed))  # each seed's own detector
    config = jg.clean(asdict(jg.make_config(plan.config | given, label)))
    folder = out / "runs" / re.sub(r"[^\w.,=-]", "-", f"{label}-s{seed}")
    command = [sys.executable, str(jg.ROOT / "jointgrad.py"),
               "--config", str(out / "config.yaml"), "--out", str(folder)]
    command += [f"--{key}={x}" for key, x in given.items()]
    return Cell(label, seed, config, command, folder)

def make_cells(plan, out):
    """Every cell, seed by seed, all checked before any runs; UserError."""
    if len(plan.seeds) > 12 or len(set(plan.seeds)) < len(plan.seeds):
        raise jg.UserError(f"--seeds: expected at most 12, each once; found {plan.seeds}")
    if not plan.config["epochs"]:
        raise jg.UserError("--epochs 0: a comparison needs 1 or more")
    cells = [make_cell(plan, label, seed, out)
             for seed, label in itertools.product(plan.seeds, plan.labels)]
    if len({jg.to_json(cell.config) for cell in cells}) < len(cells):
        raise jg.UserError(f"--modes {' '.join(plan.labels)}: two are the same run; give one")
    return cells

def read_json(path):
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise jg.UserError(f"{path}: cannot be read as JSON ({error})") from error

def unfinished(cell):
    """The command that finishes a cell; None if it is done: nothing runs twice."""
    begun = cell.folder / "config.yaml"
    if not begun.exists():
        return cell.command
    if jg.clean(asdict(jg.load_config(begun, {}))) != cell.config:
        raise jg.UserError(f"{cell.folder}: another run; give a new --out, or delete it")
    if (cell.folder / "results.json").exists():
        return None
    return [*cell.command[:2], "--resume", str(cell.folder)]

def finish(folder, command):
    """Carries out what is left of a run: its warnings; an error of its kind if it fails."""
    child = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    lines = child.stderr.splitlines()
    if child.returncode:
        kind = jg.UserError if child.returncode == 2 else RuntimeError
        errors = [line[7:] for line in lines if line.startswith("error: ")]
        errors = errors or [f"exit code {child.returncode}"]
        raise kind("\n".join(f"{folder}: {error}" for error in errors))
    return {line for line in lines if line.startswith("warning: ")}

def finish_all(left, jobs):
    """Carries out commands side by side; without a terminal a line on stderr for each."""
    counter = itertools.count(1)
    started = time.monotonic()
    told = set()

    def finish_one(folder):
        begun = time.monotonic()
        warnings = finish(folder, left[folder]) - told
        told.update(warnings)  # a set of data is read by every run, and told of once
        now = time.monotonic()
        done = next(counter)
        minutes = (now - started) / done * (len(left) - done) / 60
        val = read_json(folder / "results.json")["val"]
        scores = jg.cell_text([val[metric] for metric in SINGLES])
        for line in warnings:
            say(line)
        if not sys.stderr.isatty():
            say(f"{folder.name}: {now - begun:.0f} s, {scores}; {done} of {len(left)}, "
                f"about {minutes:.0f} min left")

    with ThreadPoolExecutor(max(1, jobs)) as pool:  # one that fails cancels those not begun
        done = pool.map(finish_one, left)
        list(tqdm(done, total=len(left), unit="run", disable=None))  # None: if no terminal

def say(line):
    tqdm.write(line, sys.stderr)

def read_run(folder):
    """The results of a finished run, with its log as `rows`."""
    lines = (folder / "metrics.jsonl").read_bytes().splitlines()
    return read_json(folder / "results.json") | {"rows": [json.loads(line) for line in lines]}

# --------------------------------------------------------------------------------------------------
# 3. Quantities: runs -> numbers over seeds
# --------------------------------------------------------------------------------------------------

SINGLES = {"mAP50-95": "detect", "balanced_accuracy": "classify"}  # judged: its single task
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
         2.201)  # of 1 to 11 degrees of freedom

def course(run, singles):
    """How a run got there, by its evaluations; nothing of one alone, which cannot vary."""
    rows = [row for row in run["rows"] if "val" in row]
    q = {}
    for metric, single in SINGLES.items():
        if run["val"][metric] is None or len(rows) < 2:
            continue
        score = np.array([row["val"][metric] for row in rows])
        q[f"largest_fall {metric}"] = max(0.0, -np.diff(score).min())
        if singles[single]:  # never reached: the last evaluation, a lower bound
            reached = score >= 0.9 * singles[single]["val"][metric]
            first = reached.argmax() if reached.any() else -1
            q[f"steps_to_90 {metric}"] = rows[first]["step"] + 1
    return q

def columns(run):
    """The log, a value a step under each key."""
    keys = [key for key in run["rows"][0] if key not in ("time", "val")]
    return {key: np.array([row[key] for row in run["rows"]]) for key in keys}

def sharing(run):
    """What two tasks do to the trunk that they share; nothing where there is none."""
    if not run["interference"]:
        return {}
    q = dict(run["interference"])
    q["gradient_share_det"] = q.pop("gradient_share")["det"]
    q["w_det"], q["w_cls"] = run["weights"]["final"]
    log = columns(run)
    L = np.stack([log["L/det"], log["L/cls"]])  # (2, steps)
    first = (L > 0).argmax(1)  # (2,): L0 is the first positive loss, as GradNorm's
    L_tilde = L / L[[0, 1], first][:, None]
    r_det, r_cls = L_tilde / L_tilde.mean(0)
    q["r_gap"] = np.median(np.abs(r_det - r_cls)[len(r_det) * 3 // 4:])  # of the last quarter
    return q

def measure(run, singles):
    """The numbers of one run, some beside the single tasks' runs under the same seed."""
    val = run["val"]
    spent = run["time"]
    q = {metric: val[metric] for metric in jg.METRICS if val[metric] is not None}
    gains = [100 * (np.divide(val[metric], singles[single]["val"][metric]) - 1)
             for metric, single in SINGLES.items() if metric in q and singles[single]]
    if len(gains) == 2:
        q["delta_m"] = np.mean(gains)
    return q | course(run, singles) | sharing(run) | {
        "parameters": run["parameters"]["total"],
        "flops_per_image": run["flops_per_image"],
        "step_cpu_ms": 1000 * spent["train_cpu_s"] / run["steps"],
        "run_s": spent["start_s"] + spent["train_s"] + spent["eval_s"]}

def quantities(runs, plan):
    """{label: {quantity: a value a seed}}."""
    table = {}
    for label in plan.labels:
        at = {single: partner(plan.labels, single, label) for single in SINGLES.values()}
        measured = []
        for seed in plan.seeds:
            singles = {single: runs.get((at[single], seed)) for single in at}
            measured.append(measure(runs[label, seed], singles))
        keys = dict.fromkeys(key for q in measured for key in q)
        table[label] = {key: np.array([q.get(key, np.nan) for q in measured]) for key in keys}
    return table

def half_width(x, count):
    """Half of the 95 % t interval of a mean of `count` values that vary as x does; 0 of one."""
    return T_975[len(x) - 2] * x.std(ddof=1) / count**0.5 if len(x) > 1 else 0.0

def interval(x):
    """Mean, 95 % interval (None of one value) and the values of one quantity over seeds."""
    half = half_width(x, len(x))
    ci95 = [x.mean() - half, x.mean() + half] if len(x) > 1 else None
    return {"mean": x.mean(), "ci95": ci95, "per_seed": x}

def smooth(x):
    """101 points over training, each the mean of the steps around it."""
    half = len(x) // 202
    centres = np.linspace(0, len(x) - 1, 101).astype(int)
    return np.array([x[max(0, k - half):k + half + 1].mean() for k in centres])

def curves(run):
    """Over the training of a shared trunk: cosine, detection's share of a G, GradNorm's w."""
    log = columns(run)
    det = log["G/det"] * log.get("a/det", 1)
    cls = log["G/cls"] * log.get("a/cls", 1)
    found = {"cosine": log["cosine"], "share_det": det / (det + cls).clip(1e-30)}
    if run["mode"] == "gradnorm":
        found |= {"w_det": log["w/det"], "w_cls": log["w/cls"]}
    return {key: smooth(x) for key, x in found.items()}

def spread(x):
    """Min, median and max over the first axis."""
    return dict(zip(("min", "median", "max"), np.quantile(x, (0, 0.5, 1), 0)))

def trajectories(runs, plan):
    """{label: {quantity: its min, median and max over seeds at 101 points}}."""
    labels = plan.labels
    if plan.swept or len(labels) > 16:  # more lines than a picture can tell apart
        labels = [label for label in labels if ":" not in label]
    found = {}
    for label in labels:
        of_seeds = [runs[label, seed] for seed in plan.seeds]
        if of_seeds[0]["interference"]:
            lines = list(map(curves, of_seeds))
            found[label] = {key: spread([x[key] for x in lines]) for key in lines[0]}
    return found

# --------------------------------------------------------------------------------------------------
# 4. Verdicts: quantities over seeds -> contrasts and the report's claims
# --------------------------------------------------------------------------------------------------

LEVEL = 0.02  # of a score, and 2 % of a gain: a difference that is wholly within it is small

def unlearnt(runs, table, plan):
    """Labels whose classifier is at chance: less than a tenth of the way to that of classify.

    By means alone, and at no price: such a contrast has the least p there is, so that in Holm's
    order the verdicts of the others are the same with it and without.
    """
    found = []
    for label in plan.labels:
        single = partner(plan.labels, "classify", label)
        if single and "balanced_accuracy" in table[label]:
            confusion = runs[label, plan.seeds[0]]["val"]["confusion"]  # (C, C), class by guess
            chance = 1 / sum(map(any, confusion))  # of the classes that val holds
            learnt = table[label]["balanced_accuracy"].mean() - chance
            if learnt < 0.1 * (table[single]["balanced_accuracy"].mean() - chance):
                found.append(label)
    return found

def rivals(label, table):
    """What a label is compared with on delta_m: fixed before looking, but for dual's rival."""
    mode = mode_of(label)
    joint = [x for x in table if "delta_m" in table[x] and common(x) == common(label)]
    if mode == "dual":  # the shared trunk that is best here: picked so, it is favoured
        trunks = [x for x in joint if mode_of(x) != "dual"]
        return sorted(trunks, key=lambda x: table[x]["delta_m"].mean())[-1:]
    found = []
    if mode in ("gradnorm", "cap"):
        found.append(partner(table, "equal", label))
    if mode == "cap":  # every gradnorm, and every fixed weight but the report's
        found += [x for x in joint if x.startswith(("gradnorm", "fixed:initial_weights"))]
    return found

def sign_flip_p(d):
    """Exact two-sided p: share of the 2^n sign patterns whose mean is as far from 0 as seen."""
    signs = np.array(list(itertools.product((1, -1), repeat=len(d))))  # (2^n, n)
    return np.mean(np.abs(signs @ d) >= abs(d.sum()) - 1e-12 * np.abs(d).sum())

def decidable(n):
    """How many contrasts n seeds can decide: each of k with p = 2 / 2^n, k p <= 0.05 (Holm)."""
    return 2**n // 40

def contrast(table, label, versus, metric, at_chance):
    """A difference over seeds; without a p where it is zero or chance by construction."""
    d = table[label][metric] - table[versus][metric]
    row = {"mode": label, "versus": versus, "metric": metric, "delta": d.mean(),
           "ci95": interval(d)["ci95"], "p": None, "p_holm": None, "verdict": "undecided"}
    if metric == "mAP50-95" and mode_of(label) == "detach":
        row["verdict"] = "same detector"  # to the bit
    elif metric != "mAP50-95" and {label, versus} & {*at_chance}:
        row["verdict"] = "at chance"
    elif np.isfinite(d).all():  # of a score of 0 there is no gain in %
        row["p"] = sign_flip_p(d)
    return row

def verdict(row):
    """lower or higher where decided, level where the whole interval is small, or undecided."""
    level = 100 * LEVEL if row["metric"] == "delta_m" else LEVEL
    low, high = row["ci95"] or (-np.inf, np.inf)
    small = -level <= low and high <= level
    if row["p_holm"] >= 0.05:
        return "level" if small else "undecided"
    side = "lower" if row["delta"] < 0 else "higher"
    return f"{side}, within {level:g}" if small else side

def contrasts(table, at_chance):
    """The family: joint labels against single tasks, and `rivals`; Holm's p and verdicts."""
    rows = []
    for label in table:
        if mode_of(label) in SINGLES.values():
            continue
        pairs = [(partner(table, single, label), metric) for metric, single in SINGLES.items()]
        pairs += [(rival, "delta_m") for rival in rivals(label, table)]
        for versus, metric in pairs:
            if versus and metric in table[label]:
                rows.append(contrast(table, label, versus, metric, at_chance))
    tested = sorted((row for row in rows if row["p"] is not None), key=lambda row: row["p"])
    p_holm = 0.0
    for rank, row in enumerate(tested):  # step-down, from the least
        p_holm = max(p_holm, min(1.0, (len(tested) - rank) * row["p"]))
        row["p_holm"] = p_holm
        row["verdict"] = verdict(row)
    return rows

def judge(claims, table):
    """Is the 95 % interval inside, outside or across the range in which a claim is true?"""
    rows = []
    for claim in claims:
        kind, quantity, *labels = claim["measure"]  # see data/reported.yaml
        if any(quantity not in table.get(label, {}) for label in labels):
            continue
        x, *base = (table[label][quantity] for label in labels)
        if kind == "difference":
            x = x - base[0]
        if kind == "gain":
            x = 100 * (x / base[0] - 1)
        row = {key: claim[key] for key in ("id", "claim", "reported")}
        row["measured"] = x.mean()
        row["ci95"] = interval(x)["ci95"]
        row["verdict"] = "undecided here"
        start, end = row["ci95"] or (-np.inf, np.inf)
        low = float(claim.get("at_least", -np.inf))
        high = float(claim.get("at_most", np.inf))
        if low < start < end < high:  # what does not vary from seed to seed decides nothing
            row["verdict"] = "reproduced here"
        if start < end and (end < low or high < start):
            row["verdict"] = "not reproduced here"
        rows.append(row)
    return rows

# --------------------------------------------------------------------------------------------------
# 5. Report: results -> Markdown
# --------------------------------------------------------------------------------------------------

MAIN = ("mode", "mAP50", "mAP50-95", "balanced accuracy", "detection minus detect",
        "classification minus classify", "delta_m, %", "step CPU time / equal", "FLOPs an image")
INTERFERENCE = ("cosine_mean", "conflict_share", "magnitude_similarity", "gradient_share_det",
                "w_det", "w_cls", "r_gap")
STABILITY = ("steps_to_90 mAP50-95", "steps_to_90 balanced_accuracy",
             "largest_fall mAP50-95", "largest_fall balanced_accuracy")

LEGEND = """Means over seeds [95 % interval]. Lower, higher: decided, Holm's p is below 0.05.
Level: not decided, and the whole interval lies within 0.02 (delta_m: 2 %); "within 0.02" says
so of a decided one. Undecided: neither. The detector of dual is that of detect but for its first
weights: its difference is noise. Its rival on delta_m is the shared trunk whose mean is best
here, which favours the rival.
"""

def estimate(row, key):
    return jg.cell_text({"mean": row[key], "ci95": row["ci95"]})

def main_table(results):
    """Scores, what joint training does to either task, mean gain, price."""
    gaps = {(row["mode"], row["metric"]): f"{estimate(row, 'delta')} {row['verdict']}"
            for row in results["paired"]}
    plain = results["modes"].get("equal", {"step_cpu_ms": {"mean": np.nan}})
    rows = []
    for label, q in results["modes"].items():
        mean = {key: x["mean"] for key, x in q.items()}
        price = mean["step_cpu_ms"] / plain["step_cpu_ms"]["mean"]
        rows.append([label, *(mean.get(metric) for metric in ("mAP50", *SINGLES)),
                     *(gaps.get((label, metric)) for metric in SINGLES),
                     q.get("delta_m"), price, mean["flops_per_image"]])
    return MAIN, rows

def quantity_table(results, keys):
    """The quantities of the labels that have any of them."""
    rows = [[label, *map(q.get, keys)]
            for label, q in results["modes"].items() if q.keys() & keys]
    return ["mode", *keys], rows

def paired_table(results):
    rows = []
    for row in results["paired"]:
        p = ["n/a" if row[key] is None else f"{row[key]:.4f}" for key in ("p", "p_holm")]
        rows.append([row["mode"], row["versus"], row["metric"], estimate(row, "delta"), *p,
                     row["verdict"]])
    return ["mode", "versus", "metric", "difference", "p", "p, Holm", "verdict"], rows

def seed_table(results, metric):
    rows = [[label, *q[metric]["per_seed"]]
            for label, q in results["modes"].items() if metric in q]
    return [metric, *(f"seed {seed}" for seed in results["seeds"])], rows

def claim_table(results):
    rows = [[row["id"], row["claim"], row["reported"], estimate(row, "measured"),
             row["verdict"]] for row in results["claims"]]
    return ["id", "the report claims", "its number", "measured", "verdict"], rows

def notes(results):
    """What a reader of the tables must know, a sentence a line."""
    n = len(results["seeds"])
    tested = sum(row["p"] is not None for row in results["paired"])
    lines = [f"{n} seed{'s' * (n > 1)}: the least p is 2 / 2^{n}, so at most {decidable(n)} "
             f"contrasts of a family can be decided (Holm, 0.05); this one has {tested}."]
    if results["at_chance"]:
        lines.append("At chance, so without a verdict on classification and delta_m: "
                     f"{', '.join(results['at_chance'])}.")
    gains = {label: q["delta_m"]["mean"] for label, q in results["modes"].items()
             if "delta_m" in q and label not in results["at_chance"]
             and q["delta_m"]["mean"] is not None}  # over a single task's score of 0
    if gains:
        best = max(gains, key=gains.get)
        lines.append(f"Largest delta_m: {best}, {jg.cell_text(gains[best])} %; better than "
                     "another only where a row below says so.")
    if not SINGLES.keys() <= {row["metric"] for row in results["paired"]}:
        lines.append("The plane of differences is empty: it needs detect and classify.")
    for kind, found in results["made_by"].items():
        if len(found) > 1:
            lines.append(f"The runs were made by {len(found)} kinds of {kind}.")
    return "\n".join(lines) + "\n"

def report(results):
    """Markdown: the short answer, what limits it, then all that it rests on."""
    tables = [paired_table(results), quantity_table(results, INTERFERENCE),
              quantity_table(results, STABILITY), claim_table(results)]
    tables += [seed_table(results, metric) for metric in SINGLES]
    parts = [f"    {results['command']}\n", LEGEND,
             jg.markdown(*main_table(results)), notes(results)]
    parts += [jg.markdown(header, rows) for header, rows in tables if rows]
    return "\n".join(parts)

# --------------------------------------------------------------------------------------------------
# 6. Command line: compare, check
# --------------------------------------------------------------------------------------------------

def pick_folder(plan, out, name):
    """Where a comparison was begun, or is to be: `out`, or runs/<name>, -2, -3, …; UserError."""
    def taken(folder):
        begun = folder / "compare.json"
        if begun.exists():
            return read_json(begun) != jg.clean(plan._asdict())
        return folder.is_file() or any(x.name != "runs" for x in folder.glob("*"))

    numbered = (Path("runs", f"{name}-{k}".removesuffix("-1")) for k in itertools.count(1))
    out = out or next(folder for folder in numbered if not taken(folder))
    if taken(out):
        raise jg.UserError(f"--out {out}: holds another comparison, or other files; repeat the "
                           "command that began it, or give a new folder (what a copy of runs/ "
                           "there holds is not run again)")
    return out

def carry_out(plan, out, args, about):
    """Finishes the cells, of which `about` is said, and evaluates them; or prints what is left."""
    cells = make_cells(plan, out)
    left = {cell.folder: unfinished(cell) for cell in cells}
    left = {folder: command for folder, command in left.items() if command}
    begun = out.is_dir() and any(out.iterdir())
    with jg.held(out) if begun else jg.new_folder(out, ""):
        if not begun:  # a fault of the data is told before anything is written
            joint = max(cells, key=lambda cell: mode_of(cell.label) not in SINGLES.values())
            jg.load_data(jg.make_config(joint.config, joint.label), out)
        jg.write_json(out / "compare.json", plan._asdict())
        jg.write_json(out / "config.yaml", plan.config)  # JSON is YAML
        if args.print:
            return sys.stdout.writelines(f"{shlex.join(x)}\n" for x in left.values())
        say(f"{about}\n{len(left)} of {len(cells)} runs are left, {args.jobs} side by side")
        try:
            finish_all(left, args.jobs)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"the same command with --out {out} goes on")
        return publish(out, evaluate(plan, cells))

def evaluate(plan, cells):
    """The results of a comparison whose cells are all finished."""
    runs = {(cell.label, cell.seed): read_run(cell.folder) for cell in cells}
    if len({run["dataset"]["fingerprint"] for run in runs.values()}) > 1:
        raise jg.UserError("compare: its runs read different data; give a new --out")
    made_by = {"code": sorted({run["code"]["sha256"] for run in runs.values()}),
               "processor": sorted({run["environment"]["processor"] for run in runs.values()})}
    claims = []
    if plan.config["initial_weights"] == [1, 0.01]:  # the report's
        claims = jg.read_yaml(jg.ROOT / "data" / "reported.yaml")["claims"]
    with np.errstate(divide="ignore", invalid="ignore"):  # there is no gain in % over 0
        table = quantities(runs, plan)
        at_chance = unlearnt(runs, table, plan)
        paired = contrasts(table, at_chance)
        claims = judge(claims, table)
    places = [place_of(label, plan.swept) for label in plan.labels]
    values = dict.fromkeys(place["value"] for place in places if place["value"])
    sweep = {"key": ", ".join(plan.swept), "values": [*values]} if plan.swept else None
    return plan._asdict() | {
        "environment": next(iter(runs.values()))["environment"], "made_by": made_by,
        "sweep": sweep, "cells": places, "at_chance": at_chance,
        "modes": {label: {key: interval(x) for key, x in q.items()}
                  for label, q in table.items()},
        "paired": paired, "claims": claims, "trajectories": trajectories(runs, plan)}

def publish(out, results):
    """Writes results.json, the report, then the pictures; the results as JSON has them."""
    command = shlex.join(["python", *sys.argv]).encode(errors="replace").decode()
    results = jg.clean({"schema": jg.SCHEMA, "mode": "compare", "command": command} | results)
    jg.write_json(out / "results.json", results)
    jg.write_atomic(out / "compare.md", report(results))
    kind = "draw_sweep" if results["sweep"] else "draw_plane"
    jg.draw(out / "figure.png", kind, results)
    if results["trajectories"]:
        jg.draw(out / "trajectories.png", "draw_trajectories", results)
    print(f"{report(results)}\nwritten to {out}/: {', '.join(sorted(os.listdir(out)))}")
    return results

def compare(args, settings):
    """Modes over seeds: paired statistics, claims, tables, pictures; repeated, it goes on."""
    if "seed" in settings:
        raise jg.UserError("--seed: a comparison takes --seeds")
    config = jg.clean(asdict(jg.load_config(args.config, settings)))
    swept = [sweep.partition("=")[0] for sweep in args.sweep]
    plan = Plan(make_labels(args.modes, args.sweep), args.seeds, config, swept)
    n = len(args.seeds)
    about = f"--seeds: {n} can decide at most {decidable(n)} contrasts; all show a direction"
    data = Path(config["data"])
    name = f"compare-{data.parent.name or data.stem}"
    carry_out(plan, pick_folder(plan, args.out, name), args, about)

def part_of(recorded, args, settings):
    """The plan of a recorded comparison, of the asked labels and seeds alone; UserError."""
    if args.config != jg.ROOT / "config.yaml" or settings.keys() - jg.FREE:
        raise jg.UserError(f"check: takes no setting but {', '.join(jg.FREE)}; the others "
                           "stand in the recorded file")
    labels = args.modes or recorded["labels"]
    seeds = args.seeds or recorded["seeds"]
    if not {*labels, *seeds} <= {*recorded["labels"], *recorded["seeds"]}:
        raise jg.UserError(f"{args.file}: has --modes {' '.join(recorded['labels'])} and "
                           f"--seeds {' '.join(map(str, recorded['seeds']))}")
    return Plan(labels, seeds, recorded["config"] | settings, recorded["swept"])

def compare_means(recorded, measured):
    """Each mean beside the recorded one of the same seeds: ok within t s / sqrt(seeds).

    s is the spread over all recorded seeds: of all of them this is the recorded 95 % interval.
    """
    places = [recorded["seeds"].index(seed) for seed in measured["seeds"]]
    rows = []
    for label, metric in itertools.product(measured["labels"], jg.METRICS):
        if metric in recorded["modes"][label]:
            x = np.array(recorded["modes"][label][metric]["per_seed"], float)
            half = half_width(x, len(places))
            mean = x[places].mean()
            now = measured["modes"][label].get(metric, {"mean": np.nan})["mean"]
            ok = abs(now - mean) <= half + 1e-9
            rows.append([label, metric, {"mean": mean, "ci95": [mean - half, mean + half]}, now,
                         "ok" if ok else "OUTSIDE"])
    return rows

def check(args, settings):
    """Repeats a recorded comparison or a part of it; 1 if a mean left its interval."""
    recorded = read_json(args.file)
    kind = {"schema": jg.SCHEMA, "mode": "compare"}
    if not isinstance(recorded, dict) or recorded | kind != recorded:
        raise jg.UserError(f"{args.file}: expected the results.json of a comparison, "
                           f"{jg.SCHEMA}; what earlier code recorded cannot be repeated")
    plan = part_of(recorded, args, settings)
    took = sum(recorded["modes"][label]["run_s"]["mean"] for label in plan.labels)
    minutes = took * len(plan.seeds) / max(1, args.jobs) / 60
    about = f"about {minutes:.0f} min, by their recorded time"
    out = args.out or jg.first_free(f"check-{args.file.resolve().parent.name}")
    measured = carry_out(plan, pick_folder(plan, out, ""), args, about)
    rows = compare_means(recorded, measured)
    print(jg.markdown(["mode", "metric", "recorded", "now", "verdict"], rows))
    return int(any("OUTSIDE" in row for row in rows))

def make_parser(name, command):
    """The options of a command, its own before the settings."""
    parser = jg.option_parser(command.__doc__)
    parser.prog = f"study.py {name}"
    add = parser.add_argument
    add("--modes", nargs="+", metavar="LABEL",
        help=f"all, or some of {', '.join(jg.MODES)}; with values as in cap:cap=0.5 "
             f"[{' '.join(MODES)}; check: those recorded]")
    add("--seeds", nargs="+", type=int,
        help="at most 12, each once [0 to 5; check: those recorded]")
    add("--jobs", type=int, default=os.cpu_count(), help="runs side by side [one a core]")
    if command == check:
        add("file", nargs="?", type=Path, default="results.json", help="of a comparison")
        parser.set_defaults(print=False)
        return parser
    parser.set_defaults(modes=MODES, seeds=[*range(6)])
    add("--sweep", action="append", default=[], metavar="KEY=V1,V2",
        help="each label at every value of a key that its mode reads; given twice: the product")
    add("--print", action="store_true", help="write the commands of unfinished runs instead")
    return parser

def main(argv=None):
    """Runs the command that the first word names; the exit code."""
    commands = {"compare": compare, "check": check}
    name, *words = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(__doc__)
        return 0
    if name not in commands:
        print(f"error: {name}: expected compare or check; see --help", file=sys.stderr)
        return 2
    return jg.run_program(make_parser(name, commands[name]), commands[name], words)

if __name__ == "__main__":
    sys.exit(main())
