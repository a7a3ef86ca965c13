"""study: many runs of jointgrad.py -> statistics over seeds, verdicts on claims, times of a step.

    python data/study.py compare --jobs 2      # every mode, seeds 0 to 5; or --sweep alpha=0,1.5
    python data/study.py compare --print | xargs -P 8 -d '\\n' -n 1 sh -c    # its runs elsewhere
    python data/study.py check data/results/compare/results.json    # repeats it; 1 if a mean moved
    python data/study.py bench --imgsz 128 --width_multiple 0.25    # one size a call

Fixed before looking: what is judged (mAP50-95, balanced accuracy) and the family of `contrasts`.
"""
import copy
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
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads: no traceback
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import jointgrad as jg  # noqa: E402  (before torch: it sets what torch reads when it loads)
import numpy as np  # noqa: E402
import torch  # noqa: E402
from data import figures  # noqa: E402
from tqdm import tqdm  # noqa: E402

# --------------------------------------------------------------------------------------------------
# 1. Grid of runs: modes, values of a swept key, seeds -> one process a cell
# --------------------------------------------------------------------------------------------------

TUNED = 0.2  # classification's weight in mode `tuned`: the best of data/results/weights
MODES = ("detect", "classify", "fixed", "equal", "tuned", "detach", "gradnorm", "dual")
OWN = {"fixed": ("initial_weights",),  # keys that one mode or two read; all read the others
       "gradnorm": ("initial_weights", "alpha", "gradnorm_lr", "w_min"),
       "dual": ("dual_lr", "dual_width_multiple", "progressive_share", "progressive_scale")}
Label = tuple[str, str | None, str | None]  # mode, and a swept key with its value, 0.5 or 1,0.1

def name_of(label: Label) -> str:
    return "{} {}={}".format(*label) if label[1] else label[0]

def make_labels(modes: list[str], sweep: str) -> list[Label]:
    """Each mode at each value; a mode that does not read the swept key has one label, without."""
    key, _, text = sweep.partition("=")
    at = [(key, x.strip("[] ")) for x in re.findall(r"\[.*?\]|[^,]+", text)]  # [1,0.1] is one value
    readers = [mode for mode, keys in OWN.items() if key in keys] or modes
    if sweep and (not at or key in ("mode", "seed", "data") or not set(readers) & set(modes)):
        raise jg.UserError(f"--sweep {sweep[:40]}: expected key=v1,v2 of a key that --modes read")
    return [(m, *x) for m in modes for x in (at if at and m in readers else [(None, None)])]

def make_cells(args: Any, settings: dict[str, Any], out: Path) -> dict[tuple[Label, int], tuple]:
    """Config as JSON has it, command and folder of each label and seed; all checked before any."""
    if "seed" in settings or len(args.seeds) > 12 or len(set(args.seeds)) < len(args.seeds):
        raise jg.UserError("--seeds: expected at most 12, each once, and no --seed")
    cells = {}
    for seed, label in itertools.product(args.seeds, make_labels(args.modes, args.sweep)):
        mode, key, value = label
        given = settings | {"mode": mode, "seed": seed} | ({key: value} if key else {})
        if mode == "tuned":
            given |= {"mode": "fixed", "initial_weights": f"1,{args.tuned:g}"}
        config = jg.clean(asdict(jg.load_config(args.config, given)))
        if not config["epochs"]:
            raise jg.UserError("compare: needs --epochs of 1 or more")
        own = {"init": config["init"].replace("{seed}", f"{seed}")}  # each seed's own detector
        folder = out / "runs" / re.sub(r"[^\w.,=-]", "-", f"{name_of(label)}-s{seed}")
        command = [sys.executable, str(jg.ROOT / "jointgrad.py"), "--config", str(args.config),
                   *(f"--{k}={x}" for k, x in (given | own).items()), "--out", str(folder)]
        cells[label, seed] = config | own, command, folder
    return cells

def unfinished(config: dict, command: list[str], folder: Path, data: str) -> list[str] | None:
    """The command that finishes a cell on these data; None if it is done: nothing runs twice."""
    begun, done = folder / "config.yaml", folder / "results.json"
    if not begun.exists():
        return command
    same = jg.clean(asdict(jg.load_config(begun, {}))) == config
    if same and not done.exists():
        return [*command[:2], "--resume", str(folder)]
    if same and json.loads(done.read_bytes())["dataset"]["fingerprint"] == data:
        return None
    raise jg.UserError(f"{folder}: another run, or other data; give a new --out, or delete it")

def finish(folder: Path, command: list[str] | None) -> dict[str, Any]:
    """The results of the run in a folder, with its log as `rows`, after what is left of it."""
    if command:
        child = subprocess.run(command, capture_output=True, text=True)
        if child.returncode:
            reason = child.stderr.strip().rpartition("\n")[2].removeprefix("error: ")
            kind = jg.UserError if child.returncode == 2 else RuntimeError
            raise kind(f"{folder}: {reason or child.returncode}")
    rows = [json.loads(x) for x in (folder / "metrics.jsonl").read_bytes().splitlines()]  # UTF-8
    results = json.loads((folder / "results.json").read_bytes())
    if len(rows) != results["steps"]:
        raise RuntimeError(f"{folder}: two processes wrote it at once; delete it")
    return results | {"rows": rows}

# --------------------------------------------------------------------------------------------------
# 2. Statistics: results over seeds -> quantities, intervals, contrasts with a verdict
# --------------------------------------------------------------------------------------------------

JUDGED = (("det", "mAP50-95", "detect"), ("cls", "balanced_accuracy", "classify"))  # task, metric
LEVEL = 0.02  # a difference whose whole interval is within it counts as none
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201)  # df 1 to 11

def partner(labels: Any, mode: str, label: Label) -> Label | None:
    """The label of another mode at the same value, or its only one; None if there is none."""
    return next((x for x in ((mode, *label[1:]), (mode, None, None)) if x in labels), None)

def measure(run: dict[str, Any], others: dict[str, dict]) -> dict[str, float]:
    """The numbers of one run, some beside `others`: other modes' runs under the same seed."""
    rows, val = run["rows"], run["val"]
    q = {metric: val[metric] for metric in jg.METRICS if val[metric] is not None}
    for task, metric, _ in JUDGED:
        if metric in q:
            at, score = np.array([(x["step"] + 1, x["val"][metric]) for x in rows if "val" in x]).T
            if others["fixed"]:  # at the last evaluation, where it is never reached: a lower bound
                reached = score >= 0.9 * others["fixed"]["val"][metric]
                q[f"steps_to_90_{task}"] = at[reached.argmax() if reached.any() else -1]
            q[f"largest_fall_{task}"] = max([0.0, *-np.diff(score)])
    if {"L/det", "L/cls"} <= rows[0].keys():
        L = np.array([[row["L/det"], row["L/cls"]] for row in rows])  # (steps, 2)
        L_tilde = L / L[(L > 0).argmax(0), [0, 1]]  # L0 as GradNorm's: the first positive ones
        r = (L_tilde / L_tilde.mean(1, keepdims=True))[len(L) * 3 // 4:]  # (steps / 4, 2)
        q["r_gap"] = np.median(np.abs(r[:, 0] - r[:, 1]))
        q |= dict(zip(("r_det", "r_cls", "w_det", "w_cls"),
                      [*np.median(r, 0), *run["weights"]["final"]]))
    if all(metric in q and others[mode] for _, metric, mode in JUDGED):  # mean gain in %
        q["delta_m"] = 100 * np.mean([np.divide(q[metric], others[mode]["val"][metric]) - 1
                                      for _, metric, mode in JUDGED])
    if seen := dict(run["interference"] or {}):
        q |= {"gradient_share_det": seen.pop("gradient_share")["det"]} | seen
    return q | {"parameters": run["parameters"]["total"], "step_ms": run["time"]["step_ms"],
                "step_cpu_ms": 1000 * run["time"]["train_cpu_s"] / run["steps"],
                "flops_per_image": run["flops_per_image"],
                "peak_rss_mb": run["peak_rss_mb"] or np.nan}  # None on Windows

def quantities(runs: dict[tuple[Label, int], dict], seeds: list[int]) -> dict[Label, dict]:
    """{label: {quantity: a value a seed}}; stray: distance from the mean, of 3 seeds or more."""
    table, labels = {}, dict.fromkeys(label for label, _ in runs)
    for label in labels:
        at = {mode: partner(labels, mode, label) for mode in ("detect", "classify", "fixed")}
        measured = [measure(runs[label, seed], {m: runs.get((x, seed)) for m, x in at.items()})
                    for seed in seeds]
        table[label] = q = {key: np.array([x[key] for x in measured]) for key in measured[0]}
        q |= {f"stray_{task}": np.abs(q[metric] - q[metric].mean())
              for task, metric, _ in JUDGED if metric in q and len(seeds) > 2}
    return table

def interval(x: np.ndarray) -> dict[str, Any]:
    """Mean, 95 % t interval (None of one value) and the values of one quantity over seeds."""
    half = T_975[len(x) - 2] * x.std(ddof=1) / len(x)**0.5 if len(x) > 1 else 0.0
    ci95 = [x.mean() - half, x.mean() + half] if len(x) > 1 else None
    return {"mean": x.mean(), "ci95": ci95, "per_seed": x}

def sign_flip_p(d: np.ndarray) -> float:
    """Exact two-sided p: share of the 2^n sign patterns whose mean is as far from 0 as seen."""
    signs = np.array(list(itertools.product((1, -1), repeat=len(d))))  # (2^n, n)
    return np.mean(np.abs(signs @ d) >= abs(d.sum()) - 1e-12 * np.abs(d).sum())

def contrasts(table: dict[Label, dict]) -> list[dict[str, Any]]:
    """The family: joint modes against the single tasks, gradnorm against equal and tuned too."""
    rows, p_holm = [], 0.0
    for label, (_, metric, single) in itertools.product(table, JUDGED):
        for versus in [single] + ["equal", "tuned"] * (label[0] == "gradnorm"):
            other = partner(table, versus, label)
            if other not in (None, label) and metric in table[label]:
                d = table[label][metric] - table[other][metric]
                rows.append(dict(zip(("mode", "key", "value"), label)) | {
                    "versus": versus, "metric": metric, "delta": d.mean(),
                    "ci95": interval(d)["ci95"], "p": sign_flip_p(d)})
    for rank, row in enumerate(sorted(rows, key=lambda row: row["p"])):
        p_holm = max(p_holm, min(1.0, (len(rows) - rank) * row["p"]))  # step-down, from the least
        low, high = row["ci95"] or (-np.inf, np.inf)
        row |= {"p_holm": p_holm, "verdict": "level" if -LEVEL <= low and high <= LEVEL else
                "undecided" if p_holm >= 0.05 else "lower" if row["delta"] < 0 else "higher"}
    return rows

def spread(x: Any) -> dict[str, Any]:
    return dict(zip(("min", "median", "max"), np.quantile(x, (0, 0.5, 1), 0)))

def trajectories(runs: dict[tuple[Label, int], dict]) -> dict[str, Any]:
    """Over training, spread over seeds of GradNorm's weights and of detection's share of G."""
    logs = [run["rows"] for (label, _), run in runs.items() if label == ("gradnorm", None, None)]
    logs = [[rows[k] for k in np.linspace(0, len(rows) - 1, 101).astype(int)] for rows in logs]
    of = {"w_det": lambda row: row["w/det"], "w_cls": lambda row: row["w/cls"],
          "share_det": lambda row: row["G/det"] / max(row["G/det"] + row["G/cls"], 1e-30)}
    return {k: spread([[f(row) for row in rows] for rows in logs]) for k, f in of.items() if logs}

# --------------------------------------------------------------------------------------------------
# 3. Claims: data/reported.yaml and quantities over seeds -> a verdict each
# --------------------------------------------------------------------------------------------------

def judge(claims: list[dict[str, Any]], table: dict[str, dict]) -> list[dict[str, Any]]:
    """Does the 95 % interval lie inside, outside or across the range in which a claim is true?"""
    rows = []
    for claim in claims:
        kind, metric, mode, versus = (*claim["measure"], None)[:4]  # see data/reported.yaml
        if metric not in table.get(mode, {}) or versus and metric not in table.get(versus, {}):
            continue
        x, base = (np.asarray(table[m][metric], float) if m else 1.0 for m in (mode, versus))
        x = {"difference": x - base, "gain": 100 * (x / base - 1)}.get(kind, x / base)
        band = 100 * LEVEL if kind == "gain" else -1.0  # in %; of a score, as LEVEL itself
        low, high = float(claim.get("at_least", -np.inf)), float(claim.get("at_most", np.inf))
        measured = interval(x)
        start, end = measured["ci95"] or (-np.inf, np.inf)  # one seed alone decides nothing
        # No difference refutes a claim, unless its range holds the band: then it asks for level.
        level = -band <= start and end <= band and not low <= -band <= band <= high
        verdict = ("refuted: level" if level else "holds" if low < start and end < high else
                   "does not hold" if end < low or start > high else "not decided by these data")
        rows.append({key: claim[key] for key in ("id", "claim", "reported")} | {
            "measured": measured["mean"], "ci95": measured["ci95"], "verdict": verdict})
    return rows

# --------------------------------------------------------------------------------------------------
# 4. Bench: training steps of several kinds, by turns in one process -> times, ratios
# --------------------------------------------------------------------------------------------------

def one_graph(part: Any, batch: Any, losses: dict, w: Any, autocast: Any, textbook=False) -> Any:
    """The backward pass of a joint step as everyone writes it, or with the textbook's GradNorm."""
    with autocast:
        P3 = part.trunk(batch.images)
        L = torch.stack([losses[task](head(P3), batch) for task, head in part.heads.items()])
    if textbook:  # L_grad is a graph, differentiated a second time; w stays: its Adam is no cost
        v = w.clone().requires_grad_()
        G = torch.stack([torch.autograd.grad(v_i * L_i, part.trunk.W, create_graph=True)[0].norm()
                         for v_i, L_i in zip(v, L)])
        target = (G.mean() * (L / L.mean())**1.5).detach()  # L, not L_tilde: only its cost matters
        torch.autograd.grad((G - target).abs().sum(), v, retain_graph=True)
    (w * L).sum().backward()
    return jg.Signals(L.detach())

WAYS = {"fixed": ("fixed", one_graph), "gradnorm": ("gradnorm", jg.backward),
        "textbook": ("fixed", partial(one_graph, textbook=True)), "dual": ("dual", jg.backward)}

def time_interleaved(steps: list[Any], rounds: int, device: Any) -> np.ndarray:
    """Seconds (2, steps, rounds), wall and CPU; steps by turns, so that drift hits all alike."""
    times = np.zeros((max(1, rounds) + 2, len(steps), 2))
    for of_round in tqdm(times, unit="round", disable=None, leave=False):
        for step, spent in zip(steps, of_round):  # a view: `spent` fills `times`
            for _ in range(2):  # the second counts: as in training, it follows one of its own kind
                wall, cpu = time.perf_counter(), time.process_time()
                step()
                getattr(torch, device.type).synchronize()  # a step returns before a GPU is done
                spent[:] = time.perf_counter() - wall, time.process_time() - cpu
    return times[2:].T  # without two rounds of warm-up

def time_variants(args: Any, config: jg.Config) -> dict[str, Any]:
    """Times, throughput and ratios to a plain joint step; of installed peers too with --peers."""
    torch.set_num_threads(config.threads)
    device, B, checks = jg.pick_device(config.device), config.batch_size, {}
    data, _ = jg.load_data(replace(config, train_images=B, val_images=2))
    batch = data.batch(np.arange(B) % len(data), device)
    runs = {a: jg.Run(replace(config, mode=mode), data, device)
            for a, (mode, _) in WAYS.items() if args.tasks == 2 or a != "dual"}
    for run in runs.values():
        run.w, part = torch.ones(args.tasks, device=device), run.network.parts[0]
        run.balancer = run.balancer and jg.GradNorm(run.w.tolist(), device=device)
        for task in (f"cls{k}" for k in range(2, args.tasks)):  # more classifiers on P3
            part.heads[task], run.losses[task] = copy.deepcopy(part.heads["cls"]), run.losses["cls"]
        run.optimizers[0] = jg.make_optimizer(part, config, config.lr)  # of the added heads, too
    steps = {a: partial(jg.train_step, run, batch, 0.5, WAYS[a][1]) for a, run in runs.items()}
    if args.peers:
        import peers  # beside this file; needs packages that nothing else needs
        for name, version, step, found in peers.peer_variants(config, device):
            steps[f"{name} {version}"], checks[f"{name} {version}"] = step, found
        sys.stdout.writelines(f"{line}\n" for line in peers.missing())
    wall, cpu = time_interleaved(list(steps.values()), args.rounds, device)  # (steps, rounds) each
    forwards = [partial(torch.no_grad()(run.network.eval()), batch.images) for run in runs.values()]
    forward = time_interleaved(forwards, 20, device)[0]
    fair = cpu if device.type == "cpu" else wall  # CPU time leaves out what neighbours take
    return {"mode": "bench", "config": asdict(config), "rounds": args.rounds, "tasks": args.tasks,
            "step_ms": {name: spread(1000 * x) for name, x in zip(steps, wall)},
            "ratios": {f"{name}/fixed": spread(x / fair[0]) for name, x in zip(steps, fair)},
            "images_per_s": dict(zip(steps, B / np.median(wall, 1))),
            "inference_images_per_s": dict(zip(runs, B / np.median(forward, 1))),
            "flops_per_image": {name: jg.cost(run.network, data.canvas)["flops_per_image"]
                                for name, run in runs.items() if args.tasks == 2},
            "peers": checks, "environment": jg.environment(device)}

# --------------------------------------------------------------------------------------------------
# 5. Tables: results -> Markdown
# --------------------------------------------------------------------------------------------------

TABLES = ("mAP50 mAP50-95 accuracy balanced_accuracy delta_m",
          "steps_to_90_det steps_to_90_cls largest_fall_det largest_fall_cls stray_det stray_cls",
          "parameters step_ms step_cpu_ms flops_per_image peak_rss_mb",
          "cosine_mean conflict_share magnitude_similarity gradient_share_det w_det w_cls r_gap")

def listed(rows: list[dict[str, Any]]) -> str:
    """A Markdown table with a column for each key that holds anything."""
    keys = [key for key in (rows or [{}])[0] if any(row[key] is not None for row in rows)]
    return jg.markdown(keys, [[row[key] for key in keys] for row in rows]) if keys else ""

def gaps(results: dict[str, Any]) -> str:
    """A line a swept value: each mode's mean less the single tasks', detection / classification."""
    rows, key = {}, results["sweep"].partition("=")[0] or "less the single tasks"
    modes = dict.fromkeys(row["mode"] for row in results["paired"])
    for row in results["paired"]:
        if row["versus"] in ("detect", "classify"):
            line = rows.setdefault(row["value"], {key: row["value"] or "-"} | modes)
            line[row["mode"]] = line[row["mode"]] or [None, None]
            line[row["mode"]][row["versus"] == "classify"] = row["delta"]
    return listed(list(rows.values()))

def report_compare(results: dict[str, Any]) -> str:
    """Markdown tables: gaps, quantities by mode, contrasts, claims."""
    text = f"{len(results['seeds'])} seeds, {results['seeds']}; mean [95 % interval]\n"
    least = min(1.0, len(results["paired"]) * 2 / 2**len(results["seeds"]))  # where all agree
    few = f"So few seeds decide level only: least p_holm possible {least:.3f}.\n"
    text += few if least >= 0.05 else ""
    text += f"\n{gaps(results)}" if results["sweep"] and results["paired"] else ""
    for columns in TABLES:
        text += "\n" + listed([{"mode": mode} | {key: q.get(key) for key in columns.split()}
                               for mode, q in results["modes"].items()])
    for key, rows in (("delta", results["paired"]), ("measured", results["claims"])):
        rows = [row | {key: {"mean": row[key], "ci95": row["ci95"]}, "ci95": None}
                | {p: f"{row[p]:.4f}" for p in ("p", "p_holm") if p in row} for row in rows]
        text += f"\n{listed(rows)}" if rows else ""
    gains = {a: q["delta_m"]["mean"] for a, q in results["modes"].items() if "delta_m" in q}
    gains = {a: gain for a, gain in gains.items() if gain is not None}  # it is, over a score of 0
    if gains:
        text += "\nBest delta_m, mean gain over the single tasks: {}, {:+.1f} %.".format(
            *max(gains.items(), key=lambda item: item[1]))
    open_rows = [f"{name_of((row['mode'], row['key'], row['value']))} - {row['versus']} "
                 f"({row['metric']})" for row in results["paired"] if row["verdict"] == "undecided"]
    return f"{text}\nUndecided: {', '.join(open_rows) or 'none'}.\n"

def report_bench(results: dict[str, Any]) -> str:
    """A Markdown table of each variant's times and throughput, and what was checked of peers."""
    keys = ("images_per_s", "inference_images_per_s", "flops_per_image")
    rows = [{"variant": a, "step_ms": list(x.values()),
             "over fixed": list(results["ratios"][f"{a}/fixed"].values())}
            | {key: results[key].get(a) for key in keys} for a, x in results["step_ms"].items()]
    found = [{"peer; trunk / heads": name} | check for name, check in results["peers"].items()]
    text = f"{results['rounds']} rounds: least / median / largest; over fixed: CPU time (GPU: wall)"
    return f"{text}\n\n{listed(rows)}" + (
        f"\n{listed(found)}" if found else "")

# --------------------------------------------------------------------------------------------------
# 6. Command line: compare, check, bench
# --------------------------------------------------------------------------------------------------

def publish(out: Path, results: dict[str, Any], report: Any, **draws: Any) -> dict[str, Any]:
    """Writes results.json, the report and the figures; the results as JSON has them."""
    results = jg.clean({"schema": "jointgrad/2", "command": shlex.join(sys.argv)} | results)
    text = f"    python {results['command']}\n\n{report(results)}"
    jg.write_json(out / "results.json", results)
    jg.write_atomic(out / f"{results['mode']}.md", text)
    for name, draw in draws.items():
        figures.save(draw(results), out / f"{name}.png")
    print(f"{text}\nwritten to {out}/: {', '.join(sorted(os.listdir(out)))}")
    return results

def compare(args: Any, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Runs what is unfinished, or prints it; then judges all that lies there."""
    config = jg.load_config(args.config, settings)
    swept = dict.fromkeys(x for mode, key, _ in make_labels(args.modes, args.sweep) if key
                          for x in (mode, key))  # a sweep is named after its modes and its key
    name = Path(config.data).parent.name or Path(config.data).stem
    out = args.out or Path("runs", "-".join([*(swept or ["compare"]), name]))
    if args.peers or args.file or (out / "metrics.jsonl").exists() or out.is_file():
        raise jg.UserError(f"compare: no --peers or file, and an --out that is no run's; now {out}")
    cells = make_cells(args, settings, out)
    out.mkdir(parents=True, exist_ok=True)
    most = max((jg.Config(**c) for c, *_ in cells.values()), key=lambda c: len(c.tasks))
    data, _ = jg.load_data(most, out)  # faults are told here, of any task
    sys.stderr.writelines(f"warning: {note}\n" for note in data.notes[:10])
    commands = [unfinished(*cell, data.fingerprint) for cell in cells.values()]
    del data, _  # the runs read them themselves
    if args.print:
        return sys.stdout.writelines(f"{shlex.join(command)}\n" for command in commands if command)
    with ThreadPoolExecutor(max(1, args.jobs)) as pool:  # one that fails cancels those not begun
        done = pool.map(finish, (folder for _, _, folder in cells.values()), commands)
        runs = dict(zip(cells, tqdm(done, total=len(cells), unit="run", disable=None)))
    with np.errstate(divide="ignore", invalid="ignore"):  # of a score of 0 nothing is a percentage
        table, smoke = quantities(runs, args.seeds), jg.ROOT / "data/results/reproduce/results.json"
        known = json.loads(smoke.read_bytes()).get("quantities", {}) if smoke.exists() else {}
        named = {name_of(label): q for label, q in table.items()}
        claims = jg.read_yaml(jg.ROOT / "data/reported.yaml")["claims"]
        same = config.data == "synthetic" and config.initial_weights == (1, 0.01)  # the report's
        claims = judge(claims, known | named) if same else []
    results = {"mode": "compare", "seeds": args.seeds, "sweep": args.sweep, "tuned": args.tuned,
               "config": asdict(config), "environment": next(iter(runs.values()))["environment"],
               "modes": {a: {key: interval(x) for key, x in q.items()} for a, q in named.items()},
               "labels": list(table), "paired": contrasts(table), "claims": claims,
               "level": LEVEL, "trajectories": trajectories(runs)}
    draws = {"figure": figures.draw_sweep if args.sweep else figures.draw_plane}
    draws |= {"weights": figures.draw_weights} if results["trajectories"] else {}
    return publish(out, results, report_compare, **draws)

def check(args: Any, settings: dict[str, Any]) -> bool:
    """Repeats a recorded comparison, or goes on with that; False if a mean left its interval."""
    asked = args.config, args.modes, args.seeds, args.sweep, args.tuned
    if settings or asked != (jg.ROOT / "config.yaml", MODES, [*range(6)], "", TUNED):
        raise jg.UserError("check: takes --out and --jobs alone; the rest is in the recorded file")
    try:
        recorded = json.loads(args.file.read_bytes())
        args.seeds, args.sweep, args.tuned = (recorded[k] for k in ("seeds", "sweep", "tuned"))
        args.modes, old = list(dict.fromkeys(x[0] for x in recorded["labels"])), recorded["modes"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise jg.UserError(f"{args.file}: expected the results.json of a comparison") from error
    if not args.out or not (args.out / "runs").is_dir() or (args.out / "results.json").exists():
        args.out = jg.new_folder(args.out, f"check-{args.file.resolve().parent.name}")
    args.config, args.print, args.file, rows = args.out / "config.yaml", False, None, []
    jg.write_json(args.config, recorded["config"])  # JSON is YAML
    measured = compare(args, {})["modes"]
    for mode, metric in itertools.product(measured, jg.METRICS):
        if metric in old[mode]:
            q, mean = old[mode][metric], measured[mode].get(metric, {}).get("mean", np.nan)
            low, high = q["ci95"] or [q["mean"]] * 2
            rows.append({"mode": mode, "metric": metric, "recorded": q, "measured": mean,
                         "verdict": "ok" if low - 1e-9 <= mean <= high + 1e-9 else "OUTSIDE"})
    print(f"{listed(rows)}\nwritten to {args.out}/")
    return all(row["verdict"] == "ok" for row in rows)

def bench(args: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Times the steps; a mistake is told before a folder is made."""
    if args.file or args.sweep or args.print or args.peers and args.tasks != 2:
        raise jg.UserError("bench: takes no file, --sweep or --print, and --peers of 2 --tasks")
    config, out = jg.load_config(args.config, settings), jg.new_folder(args.out, "bench")
    return publish(out, time_variants(args, config), report_bench, figure=figures.draw_bench)

def main() -> int:
    """The job that the first argument names; the exit code."""
    jobs = {"compare": compare, "check": check, "bench": bench}
    parser = jg.option_parser(__doc__.partition("\n")[0])
    add = parser.add_argument
    add("job", choices=jobs)
    add("file", nargs="?", type=Path, help="check: the results.json of a comparison")
    add("--modes", nargs="+", choices=MODES, default=MODES, metavar="MODE", help=", ".join(MODES))
    add("--seeds", nargs="+", type=int, default=[*range(6)], help="at most 12 (default: 0 to 5)")
    add("--sweep", default="", metavar="KEY=V1,V2", help="each mode at each value of a key")
    add("--tuned", type=float, default=TUNED, metavar="W", help=f"weight of tuned, now {TUNED}")
    add("--jobs", type=int, default=os.cpu_count(), help="runs side by side (default: one a core)")
    add("--print", action="store_true", help="write the commands of unfinished runs instead")
    add("--rounds", type=int, default=100, help="bench: how often each step is timed")
    add("--tasks", type=int, default=2, choices=(2, 3, 4, 8, 16), help="bench: losses on one trunk")
    add("--peers", action="store_true", help="bench: the steps of other packages too")
    return jg.run_program(parser, lambda args, given: int(jobs[args.job](args, given) is False))

if __name__ == "__main__":
    sys.exit(main())
