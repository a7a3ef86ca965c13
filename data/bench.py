"""bench: times a training step of every remedy, and of other packages on the same network.

    python data/bench.py --rounds 300
    python data/bench.py --peers --imgsz 128 --width_multiple 0.25

Other packages: pip install torchjd gradnorm-pytorch; pip install --no-deps LibMTL

Every step is `jg.train_step`, some with another backward pass: batch, losses, clipping and
optimizer are the same, so that only the balancing differs. torchjd and LibMTL balance the
gradients of the whole trunk, jointgrad and gradnorm-pytorch those at W, its last convolution.
"""
import copy
import importlib
import shlex
import signal
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from importlib import metadata, util
from pathlib import Path
from unittest import mock

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C while torch loads: no traceback
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jointgrad as jg  # noqa: E402  (before torch: it sets what torch reads when it loads)
import numpy as np  # noqa: E402
import torch  # noqa: E402
from tqdm import tqdm  # noqa: E402

# ----------------------------------------------------------------------------------------------
# 1. Backward passes that are not jointgrad's: as everyone writes it, and other packages'
# ----------------------------------------------------------------------------------------------

# A maker gives balance(P3, losses), which fills .grad and returns the weights that it used; and
# weights(), those of the next step, if it knows. Its docstring is the note beside its numbers.

ALPHA = 1.5  # of every GradNorm here

def first_weights(L0):
    """0.5 to 1.5, of mean 1: unequal, so that a check sees where one is left out."""
    return torch.linspace(0.5, 1.5, len(L0)).to(L0)

def plain(run, L0):
    """The sum of w_i L_i."""
    def balance(P3, L):
        (run.w * torch.stack(L)).sum().backward()
        return run.w
    return balance, None

def textbook(run, L0):
    """GradNorm by double backward, of its cost alone: L0 is 1, and no Adam moves w."""
    W = run.network.parts[0].trunk.W
    def balance(P3, L):
        L = torch.stack(L)
        w = run.w.clone().requires_grad_()
        norms = []
        for w_i, L_i in zip(w, L):
            (grad_W,) = torch.autograd.grad(w_i * L_i, W, create_graph=True)
            norms.append(grad_W.norm())
        G = torch.stack(norms)  # (T,)
        target = (G.mean() * (L / L.mean())**ALPHA).detach()
        torch.autograd.grad((G - target).abs().sum(), w, retain_graph=True)
        (run.w * L).sum().backward()
        return run.w
    return balance, None

def torchjd(run, L0, aggregator):
    """Balances the whole trunk's gradients and turns them on purpose where they conflict: the
    sum is not its aim. Heads get grad L_i, without a weight. Knows no L0, no next w."""
    from torchjd import aggregation, autojac
    trunk = run.network.parts[0].trunk
    aggregate = getattr(aggregation, aggregator)()
    def balance(P3, L):
        # One task after the other: 1.2 of a plain step; the default, both at once, 1.5.
        autojac.mtl_backward(L, features=P3, parallel_chunk_size=1)
        return autojac.jac_to_grad(trunk.parameters(), aggregate)
    return balance, None

def libmtl(run, L0, gather):
    """Balances the whole trunk's gradients; heads get grad L_i, without a weight. Its trainer
    stacks the losses: then the backward pass of each task goes through every head."""
    for name in ("LibMTL", "LibMTL.weighting"):  # not run: they import torchvision and scipy
        sys.modules.setdefault(name, util.module_from_spec(util.find_spec(name)))
    model = importlib.import_module("LibMTL.weighting.GradNorm").GradNorm()
    # It flattens gradients by `view`, which channels_last kernels do not allow.
    part = run.network.parts[0].to(memory_format=torch.contiguous_format)
    run.optimizers = [jg.make_optimizer([*part.parameters()], run.config, run.config.lr)]
    trunk = part.trunk
    views = [p.grad.detach() for p in trunk.parameters()]
    # As from its trainer's second epoch on, when it begins to balance; L0: the first's mean.
    vars(model).update(
        epoch=1, task_num=len(L0), device=L0.device, rep_grad=False,
        train_loss_buffer=L0.cpu().numpy()[:, None],  # (T, epochs)
        get_share_params=trunk.parameters,
        zero_grad_share_params=partial(trunk.zero_grad, set_to_none=False))
    model.init_param()
    model.loss_scale.data = first_weights(L0).log()  # w = T softmax(loss_scale)
    adam = torch.optim.Adam([model.loss_scale], run.config.lr)
    def balance(P3, L):
        adam.zero_grad()
        used = model.backward(gather(L), alpha=ALPHA)
        adam.step()
        for p, view in zip(trunk.parameters(), views):  # .grad's memory is new: back to ours
            view.copy_(p.grad)
            p.grad = view.detach()
        return torch.tensor(used)
    return balance, lambda: len(L0) * model.loss_scale.softmax(0)

def gradnorm_pytorch(run, L0):
    """Balances at W; differentiates L_grad with respect to the network, too, into its .grad."""
    from gradnorm_pytorch import GradNormLossWeighter
    W = run.network.parts[0].trunk.W
    weighter = GradNormLossWeighter(
        loss_weights=first_weights(L0), restoring_force_alpha=ALPHA, grad_norm_parameters=W)
    weighter.to(L0.device)
    weighter.initial_losses.copy_(L0)
    weighter.initted.fill_(True)
    def balance(P3, L):
        used = weighter.loss_weights.clone()
        weighter.backward(L)
        return used
    return balance, lambda: weighter.loss_weights

# A step's name: the mode of its run and, where its backward pass is another, maker and options.
STEPS = {"fixed": ("fixed", plain), "textbook": ("fixed", textbook)}
STEPS |= {mode: (mode,) for mode in (
    "gradnorm", "dual", "uncertainty", "pcgrad", "imtl", "mgda", "cap")}
SAME = {"PCGrad": "pcgrad", "IMTLG": "imtl", "MGDA": "mgda"}  # torchjd's aggregator: our mode
PEERS = {f"torchjd {aggregator}": (torchjd, aggregator) for aggregator in SAME}
PEERS |= {  # package, and what of it: maker, options
    "LibMTL GradNorm": (libmtl, torch.stack),
    "LibMTL GradNorm, list of losses": (libmtl, list),
    "gradnorm_pytorch": (gradnorm_pytorch,)}

def peer_steps():
    """Steps of those of PEERS that are installed, with their versions; tells the others."""
    steps = {}
    for name, maker in PEERS.items():
        package = name.split()[0]
        if util.find_spec(package):
            steps[f"{name} {metadata.version(package)}"] = "equal", *maker
        else:
            print(f"{name}: not installed; data/bench.py begins with how to install it")
    return steps

# ----------------------------------------------------------------------------------------------
# 2. Checks: does a backward pass compute what its name says, and the same as jointgrad?
# ----------------------------------------------------------------------------------------------

def aggregation_difference(aggregator, T):
    """Largest distance of torchjd's sum(a_i g_i) from jointgrad's, over the longest of the g_i.

    Of 20 draws of T gradients: in 4 dimensions, so that they conflict, and of unlike lengths.
    """
    from torchjd import aggregation
    rng = np.random.default_rng(0)
    aggregate = getattr(aggregation, aggregator)()
    distances = []
    for _ in range(20):
        lengths = 10 ** rng.standard_normal((T, 1))
        g = torch.from_numpy(lengths * rng.standard_normal((T, 4)))
        with mock.patch("torch.randperm", torch.arange):  # PCGrad's order of tasks: ours
            theirs = aggregate(g)
        ours = jg.SURGERIES[SAME[aggregator]](g @ g.T) @ g
        distances.append((ours - theirs).norm() / g.norm(dim=1).max())
    return max(distances).item()

def flat(tensors):
    return torch.cat([x.flatten() for x in tensors])

def forward(run, batch):
    """P3 and the list of losses of one graph, not cut at P3."""
    part = run.network.parts[0]
    with run.autocast:
        P3 = part.trunk(batch.images)
        L = [run.losses[task](head(P3), batch) for task, head in part.heads.items()]
    return P3, L

def check(run, batch, make, *given):
    """The balance of a maker, and what its first step does.

    error: of the gradient left in the trunk and in the heads, against sum(w_i grad L_i).
    slower_task: does its weight go up? Which is slower is certain: L0 is set so that r is 1.98
    (of T tasks about T) for the one with the largest gradient and 0.02 for the other. Then its
    r^1.5 G_bar is 2.8 G_bar, and G at most 2 G_bar: up is right; with alpha's sign reversed or
    without r it falls.
    from_ours: `aggregation_difference` of 2 and of 3 tasks.
    """
    part = run.network.parts[0]
    modules = part.trunk, part.heads
    P3, L = forward(run, batch)
    grad = partial(torch.autograd.grad, retain_graph=True, materialize_grads=True)
    J = [torch.stack([flat(grad(L_i, [*module.parameters()])) for L_i in L])
         for module in modules]  # of each module (T, P)
    slower = J[0].norm(dim=1).argmax()
    L0 = 10 * torch.stack(L).detach()
    L0[slower] /= 100
    balance, weights = make(run, L0, *given)
    run.optimizers[0].zero_grad(set_to_none=False)
    w = balance(P3, L).to(L0)
    errors = []
    for module, J_module in zip(modules, J):
        wanted = w @ J_module
        left = flat(p.grad for p in module.parameters())
        errors.append(((left - wanted).norm() / wanted.norm()).item())
    found = {"w": w.tolist(), "error": errors, "slower_task": None, "from_ours": None}
    if weights:
        found["slower_task"] = "up" if weights()[slower] > w[slower] else "down"
    if make is torchjd:
        found["from_ours"] = [aggregation_difference(*given, T) for T in (2, 3)]
    return balance, found | {"note": " ".join(make.__doc__.split())}

# ----------------------------------------------------------------------------------------------
# 3. Times: steps by turns -> medians, ratios
# ----------------------------------------------------------------------------------------------

def add_classifiers(run, tasks):
    """Puts copies of the classification head on P3 until `tasks` losses reach the trunk."""
    part = run.network.parts[0]
    for task in (f"cls{k}" for k in range(2, tasks)):
        part.heads[task] = copy.deepcopy(part.heads["cls"])
        run.losses[task] = run.losses["cls"]
    run.w = torch.ones(tasks, device=run.device)
    if run.balancer:
        run.balancer = jg.GradNorm(run.w.tolist(), device=run.device)
    run.optimizers = [jg.make_optimizer([*part.parameters()], run.config, run.config.lr)]

def whole_graph(run, balance, part, batch, *_):
    """A backward pass for `jg.train_step`."""
    P3, L = forward(run, batch)
    balance(P3, L)
    return jg.Signals(torch.stack(L).detach())

def clocks():
    return np.array([time.perf_counter(), time.process_time()])  # wall, CPU: s

def time_interleaved(steps, rounds, device):
    """Seconds (2, steps, rounds), wall and CPU; by turns, so that drift hits all alike."""
    times = np.zeros((rounds + 2, len(steps), 2))
    for of_round in tqdm(times, unit="round", disable=None, leave=False):
        for step, spent in zip(steps, of_round):  # a view: `spent` fills `times`
            for _ in range(2):  # the second counts: as in training, it follows one of its kind
                started = clocks()
                step()
                getattr(torch, device.type).synchronize()  # it returns before a GPU is done
                spent[:] = clocks() - started
    return times[2:].T  # without two rounds of warm-up

def spread(x):
    return {"min": x.min(), "median": np.median(x), "max": x.max()}

def measure(config, wanted, tasks, rounds):
    """Times, throughput, ratios to a plain joint step and checks of the `wanted` steps."""
    torch.set_num_threads(config.threads)
    device = jg.pick_device(config.device)
    B = config.batch_size
    data, _ = jg.load_data(replace(config, train_images=B, val_images=2))
    batch = data.batch(np.arange(B) % len(data), device)
    networks = []
    steps = {}
    checks = {}
    for name, (mode, *maker) in wanted.items():
        if tasks > 2 and mode in ("dual", "uncertainty"):
            continue
        run = jg.Run(replace(config, mode=mode), data, device)
        if tasks > 2:
            add_classifiers(run, tasks)
        backward = jg.backward
        if maker:
            balance, checks[name] = check(run, batch, *maker)
            backward = partial(whole_graph, run, balance)
        networks.append(run.network)
        steps[name] = partial(jg.train_step, run, batch, 0.5, backward)
    wall, cpu = time_interleaved(steps.values(), rounds, device)  # (steps, rounds) each
    fair = cpu if device.type == "cpu" else wall  # CPU time leaves out what neighbours take
    forwards = [partial(network.eval(), batch.images) for network in networks]
    forward_s = time_interleaved(forwards, min(rounds, 20), device)[0]
    return {"step_ms": {name: spread(1000 * x) for name, x in zip(steps, wall)},
            "ratios": {f"{name}/fixed": spread(x / fair[0]) for name, x in zip(steps, fair)},
            "images_per_s": dict(zip(steps, B / np.median(wall, 1))),
            "inference_images_per_s": dict(zip(steps, B / np.median(forward_s, 1))),
            "flops_per_image": {name: jg.cost(network, data.canvas)["flops_per_image"]
                                for name, network in zip(steps, networks)},
            "checks": checks, "environment": jg.environment(device), "code": jg.code_version()}

# ----------------------------------------------------------------------------------------------
# 4. Command line: options -> results.json, bench.md, figure.png
# ----------------------------------------------------------------------------------------------

def table(rows):
    return jg.markdown([*rows[0]], [[*row.values()] for row in rows])

def report(results):
    """Markdown tables: times and throughput of each kind of step, and what was checked."""
    rows = []
    for name, times in results["step_ms"].items():
        ratios = results["ratios"][f"{name}/fixed"]
        row = {"step": name, "step_ms": [*times.values()], "over fixed": [*ratios.values()]}
        for column in ("images_per_s", "inference_images_per_s", "flops_per_image"):
            row[column] = results[column][name]
        rows.append(row)
    checks = [{"trunk / heads": name} | found for name, found in results["checks"].items()]
    return (f"{results['rounds']} rounds: least / median / largest; over fixed: CPU time "
            f"(GPU: wall)\n\n{table(rows)}\n{table(checks)}")

def bench(args, settings):
    """Times what the options ask for; a mistake is told before a folder is made."""
    if args.rounds < 1:
        raise jg.UserError(f"--rounds {args.rounds}: expected 1 or more")
    config = jg.load_config(args.config, settings)
    with jg.new_folder(args.out, "bench") as out:
        wanted = STEPS | (peer_steps() if args.peers else {})
        command = shlex.join(sys.argv).encode(errors="replace").decode()  # it may be no UTF-8
        results = {"schema": jg.SCHEMA, "mode": "bench", "command": command,
                   "config": asdict(config), "rounds": args.rounds, "tasks": args.tasks}
        results = jg.clean(results | measure(config, wanted, args.tasks, args.rounds))
        text = f"    python {results['command']}\n\n{report(results)}"
        jg.write_json(out / "results.json", results)
        jg.write_atomic(out / "bench.md", text)
        jg.draw(out / "figure.png", "draw_bench", results)
    print(f"{text}\nwritten to {out}/: bench.md, figure.png, results.json")

if __name__ == "__main__":
    parser = jg.option_parser(__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--rounds", type=int, default=100, help="how often each step is timed")
    add("--tasks", type=int, default=2, choices=(2, 3, 4, 8, 16), help="losses on one trunk")
    add("--peers", action="store_true", help="the steps of other packages too")
    sys.exit(jg.run_program(parser, bench))
