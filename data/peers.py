"""Other packages' balancers on jointgrad's network, batch and losses: a step to time, and a check.

    pip install "torchjd[quadprog_projector]" gradnorm-pytorch; pip install --no-deps LibMTL
    python data/study.py bench --peers --imgsz 128 --width_multiple 0.25

A step is `jg.train_step` with one graph, not cut at P3, and the package's backward pass: clipping
and the optimizer are the same, so that only the balancing differs. torchjd and LibMTL balance the
gradients of the whole trunk, jointgrad and gradnorm-pytorch those at W, its last convolution.

The check: how far is the gradient left in `.grad` from sum(w_i grad L_i), and does the slower
task's weight go up? Which task is slower is certain: L0 is set so that r = 1.98 for the task with
the larger gradient and 0.02 for the other. Then its r^1.5 G_bar is 2.8 G_bar and above G, which is
at most 2 G_bar: up is right; with the exponent's sign reversed, or without r, it goes down.
"""
import importlib
import sys
from dataclasses import replace
from functools import partial
from importlib import metadata, util
from typing import Any

import jointgrad as jg
import numpy as np
import torch

ALPHA = 1.5  # of both GradNorms
W0 = (0.5, 1.5)  # their first weights; unequal, so that the check sees where one is left out

# A maker gives balance(P3, losses), which fills .grad and returns the weights it used, and
# weights(), those of the next step. Its docstring is the note beside its numbers.

def torchjd(aggregator: str, run: jg.Run, L0: Any) -> tuple[Any, Any]:
    """Balances the whole trunk's gradients and turns them on purpose where they conflict: the sum
    is not its aim. Heads get grad L_i, without a weight. Knows neither L0 nor the next step's w."""
    from torchjd import aggregation, autojac
    trunk, aggregate = run.network.parts[0].trunk, getattr(aggregation, aggregator)()
    def balance(P3: Any, L: list[Any]) -> Any:
        # One task after the other: 1.2 of a plain step; the default, both at once, 1.5 on a CPU.
        autojac.mtl_backward(L, features=P3, parallel_chunk_size=1)
        return autojac.jac_to_grad(trunk.parameters(), aggregate)
    return balance, lambda: None

def libmtl(gather: Any, run: jg.Run, L0: Any) -> tuple[Any, Any]:
    """Balances the whole trunk's gradients; heads get grad L_i, without a weight. Its trainer puts
    the losses into one tensor, so that the backward pass for each task goes through every head."""
    for name in ("LibMTL", "LibMTL.weighting"):  # not run: they import torchvision and scipy
        sys.modules.setdefault(name, util.module_from_spec(util.find_spec(name)))
    model = importlib.import_module("LibMTL.weighting.GradNorm").GradNorm()
    # It flattens gradients by `view`, which channels_last kernels do not allow.
    part = run.network.parts[0].to(memory_format=torch.contiguous_format)
    run.optimizers = [jg.make_optimizer(part, run.config, run.config.lr)]
    views = [p.grad.detach() for p in part.trunk.parameters()]
    model.get_share_params = part.trunk.parameters
    model.zero_grad_share_params = partial(part.trunk.zero_grad, set_to_none=False)
    # As from its trainer's second epoch on, when it begins to balance; L0: the first's mean losses.
    model.task_num, model.device, model.rep_grad, model.epoch = len(L0), L0.device, False, 1
    model.train_loss_buffer = L0.cpu().numpy()[:, None]  # (T, epochs)
    model.init_param()
    model.loss_scale.data = torch.tensor(W0, device=L0.device).log()  # w = T softmax(loss_scale)
    run.optimizers[0].add_param_group({"params": [model.loss_scale], "weight_decay": 0.0,
                                       "peak": run.config.lr, "detached": True})
    def balance(P3: Any, L: list[Any]) -> Any:
        used = torch.tensor(model.backward(gather(L), alpha=ALPHA))
        for p, view in zip(part.trunk.parameters(), views):  # .grad's memory is new: back to ours
            view.copy_(p.grad)
            p.grad = view.detach()
        return used
    return balance, lambda: len(L0) * model.loss_scale.detach().softmax(0)

def gradnorm_pytorch(run: jg.Run, L0: Any) -> tuple[Any, Any]:
    """Balances at W; differentiates L_grad with respect to the network, too, into its .grad."""
    from gradnorm_pytorch import GradNormLossWeighter
    weighter = GradNormLossWeighter(
        loss_weights=torch.tensor(W0), restoring_force_alpha=ALPHA,
        grad_norm_parameters=run.network.parts[0].trunk.W).to(L0.device)
    weighter.initial_losses.copy_(L0)
    weighter.initted.fill_(True)
    def balance(P3: Any, L: list[Any]) -> Any:
        used = weighter.loss_weights.clone()
        weighter.backward(L)
        return used
    return balance, lambda: weighter.loss_weights

PEERS = (  # name, maker, what pip installs, modules that come with it
    ("torchjd PCGrad", partial(torchjd, "PCGrad"), "torchjd", "torchjd"),
    ("torchjd UPGrad", partial(torchjd, "UPGrad"), '"torchjd[quadprog_projector]"',
     "torchjd quadprog"),
    ("LibMTL GradNorm", partial(libmtl, torch.stack), "--no-deps LibMTL", "LibMTL"),
    ("LibMTL GradNorm, list of losses", partial(libmtl, list), "--no-deps LibMTL", "LibMTL"),
    ("gradnorm-pytorch", partial(gradnorm_pytorch), "gradnorm-pytorch", "gradnorm_pytorch"))

def missing() -> list[str]:
    return [f"{name}: not installed; pip install {package}" for name, _, package, modules in PEERS
            if not all(map(util.find_spec, modules.split()))]

def forward(part: Any, batch: Any, losses: dict, autocast: Any) -> tuple[Any, list[Any]]:
    with autocast:
        P3 = part.trunk(batch.images)
        return P3, [losses[task](head(P3), batch) for task, head in part.heads.items()]

def backward(balance: Any, part: Any, batch: Any, losses: dict, w: Any, autocast: Any) -> Any:
    P3, L = forward(part, batch, losses, autocast)
    balance(P3, L)
    return jg.Signals(torch.stack(L).detach())

def flat(tensors: Any) -> Any:
    return torch.cat([x.flatten() for x in tensors])

def check(make: Any, run: jg.Run, batch: Any) -> tuple[Any, dict[str, Any]]:
    """The peer's `balance`, and what its first step does: errors in the trunk and in the heads."""
    part = run.network.parts[0]
    params = list(part.parameters())  # the trunk's, then the heads'
    P3, L = forward(part, batch, run.losses, run.autocast)
    J = torch.stack([flat(torch.autograd.grad(L_i, params, retain_graph=True,
                                              materialize_grads=True)) for L_i in L])  # (T, P)
    slow, L0 = J.norm(dim=1).argmax(), 10 * torch.stack(L).detach()
    L0[slow] /= 100
    balance, weights = make(run, L0)
    run.optimizers[0].zero_grad(set_to_none=False)
    w, sizes = balance(P3, L).to(J), [len(flat(x.parameters())) for x in (part.trunk, part.heads)]
    left, found = flat(p.grad for p in params).split(sizes), {"w": w.tolist()}
    run.optimizers[0].step()  # moves LibMTL's weights
    for key, want in (("error", w @ J), ("error_to_plain_sum", J.sum(0))):
        found[key] = [((x - y).norm() / y.norm()).item() for x, y in zip(left, want.split(sizes))]
    moved = 0.0 if weights() is None else (weights() - w)[slow]
    found["weight_of_slower_task"] = "up" if moved > 0 else "down" if moved < 0 else None
    return balance, found | {"note": " ".join(make.func.__doc__.split())}

def peer_variants(config: jg.Config, device: Any) -> list[tuple[str, str, Any, dict[str, Any]]]:
    """(name, version, step, check) of each peer that is installed; `step()` is a training step."""
    data, _ = jg.load_data(replace(config, train_images=config.batch_size, val_images=2))
    batch, variants = data.batch(np.arange(config.batch_size) % len(data), device), []
    for name, make, _, modules in PEERS:
        if all(map(util.find_spec, modules.split())):
            run = jg.Run(replace(config, mode="equal"), data, device)  # GradNorm's network
            balance, found = check(make, run, batch)
            step = partial(jg.train_step, run, batch, 0.5, partial(backward, balance))
            variants.append((name, metadata.version(modules.split()[0]), step, found))
    return variants
