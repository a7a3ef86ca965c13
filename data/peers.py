"""What other packages' balancers cost and do on jointgrad's network, batch and losses.

    pip install torchjd[quadprog_projector] gradnorm-pytorch; pip install --no-deps LibMTL
    python data/study.py bench --peers --imgsz 128 --width_multiple 0.25

Each step is `jg.train_step` with one graph, not cut at P3, and the package's backward pass: clipping
and the optimizer's step are the same, so that only the balancing differs. What is unlike GradNorm
at W, the last shared layer: LibMTL and torchjd take the gradients of the whole trunk.

The check beside each time: the gradient left in `.grad` against sum(w_i grad L_i), and whether the
slower task's weight goes up. Which task is slower is certain, because L0 is set so that r = 1.98
for the task with the larger gradient, 0.02 for the other: r^1.5 G_bar is then above its G whatever
that is (G <= 2 G_bar), while the exponent's sign reversed, or no r at all, moves its weight down.
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

ALPHA = 1.5  # torchjd has none
W0 = (0.5, 1.5)  # the weights before the first step; not equal: a weight left out must be seen

def forward(part: Any, batch: Any, losses: dict, autocast: Any) -> tuple[Any, list[Any]]:
    """P3 and each task's loss, all in one graph."""
    with autocast:
        P3 = part.trunk(batch.images)
        return P3, [losses[task](head(P3), batch) for task, head in part.heads.items()]

class TorchJD:
    note = ("gradients of the whole trunk; their direction is changed on purpose where they "
            "conflict, so the error to the plain sum is no fault; heads get their own loss, "
            "unweighted; knows no L0")
    w = None  # of the next step: none is kept from step to step

    def __init__(self, aggregator: str, run: jg.Run, L0: Any):
        from torchjd import aggregation, autojac
        self.autojac, self.aggregator = autojac, getattr(aggregation, aggregator)()

    def backward(self, part: Any, batch: Any, losses: dict, _: Any, autocast: Any) -> jg.Signals:
        P3, L = forward(part, batch, losses, autocast)
        self.autojac.mtl_backward(L, features=P3)
        self.used = self.autojac.jac_to_grad(part.trunk.parameters(), self.aggregator)
        return jg.Signals(torch.stack(L).detach())

class LibMTL:
    note = ("gradients of the whole trunk, one pass for each task; heads get their own loss, "
            "unweighted; L0 is the mean over the first epoch, here set")

    def __init__(self, run: jg.Run, L0: Any):
        for name in ("LibMTL", "LibMTL.weighting"):  # not run: they import torchvision and scipy
            sys.modules.setdefault(name, util.module_from_spec(util.find_spec(name)))
        self.model = model = importlib.import_module("LibMTL.weighting.GradNorm").GradNorm()
        part, model.task_num, model.device, model.rep_grad = run.network.parts[0], 2, L0.device, False
        # It flattens gradients by `view`: kernels, and so the optimizer's vectors, in its order.
        part.to(memory_format=torch.contiguous_format)
        run.optimizers = [jg.make_optimizer(part, run.config, run.config.lr)]
        self.views = [p.grad.detach() for p in part.trunk.parameters()]
        model.get_share_params = part.trunk.parameters
        model.zero_grad_share_params = partial(part.trunk.zero_grad, set_to_none=False)
        model.epoch, model.train_loss_buffer = 1, L0.cpu().numpy()[:, None]  # (T, epochs)
        model.init_param()
        model.loss_scale.data = torch.tensor(W0, device=L0.device).log()  # w = T softmax(loss_scale)
        run.optimizers[0].add_param_group({"params": [model.loss_scale], "weight_decay": 0.0,
                                           "peak": run.config.lr, "alone": True})

    @property
    def w(self) -> Any:
        return 2 * self.model.loss_scale.detach().softmax(0)

    def backward(self, part: Any, batch: Any, losses: dict, _: Any, autocast: Any) -> jg.Signals:
        L = torch.stack(forward(part, batch, losses, autocast)[1])
        self.used = torch.tensor(self.model.backward(L, alpha=ALPHA))
        for p, view in zip(part.trunk.parameters(), self.views):
            view.copy_(p.grad)  # it left the gradient in new memory: back to the optimizer's vectors
            p.grad = view.detach()
        return jg.Signals(L.detach())

class GradNormPytorch:
    note = "differentiates L_grad with respect to the network too, and adds that to .grad"

    def __init__(self, run: jg.Run, L0: Any):
        from gradnorm_pytorch import GradNormLossWeighter
        self.weighter = GradNormLossWeighter(
            loss_weights=torch.tensor(W0, device=L0.device), restoring_force_alpha=ALPHA,
            grad_norm_parameters=run.network.parts[0].trunk.W).to(L0.device)
        self.weighter.initial_losses.copy_(L0)
        self.weighter.initted.fill_(True)

    @property
    def w(self) -> Any:
        return self.weighter.loss_weights.clone()

    def backward(self, part: Any, batch: Any, losses: dict, _: Any, autocast: Any) -> jg.Signals:
        L, self.used = torch.stack(forward(part, batch, losses, autocast)[1]), self.w
        self.weighter.backward(L)
        return jg.Signals(L.detach())

PEERS = (  # name, what makes it, what pip installs, the modules that this needs
    ("torchjd PCGrad", partial(TorchJD, "PCGrad"), "torchjd", ("torchjd",)),
    ("torchjd UPGrad", partial(TorchJD, "UPGrad"), "torchjd[quadprog_projector]",
     ("torchjd", "qpsolvers", "quadprog")),
    ("LibMTL GradNorm", LibMTL, "--no-deps LibMTL", ("LibMTL",)),
    ("gradnorm-pytorch", GradNormPytorch, "gradnorm-pytorch",
     ("gradnorm_pytorch", "accelerate", "beartype", "einops")))

def installed(modules: tuple[str, ...]) -> bool:
    return all(util.find_spec(module) for module in modules)

def missing() -> list[str]:
    """A line for each peer that is not installed."""
    return [f"{name}: not installed; pip install {package}"
            for name, _, package, modules in PEERS if not installed(modules)]

def gradients(run: jg.Run, batch: Any) -> tuple[Any, Any]:
    """Losses (T,) and the gradient (T, P) of each in the trunk's parameters, then in the heads'."""
    part = run.network.parts[0]
    torch.manual_seed(0)  # the same dropout as in `check`
    _, L = forward(part, batch, run.losses, run.autocast)
    rows = [torch.autograd.grad(L_i, list(part.parameters()), retain_graph=True,
                                materialize_grads=True) for L_i in L]
    return torch.stack(L).detach(), torch.stack([torch.cat([g.flatten() for g in x]) for x in rows])

def check(peer: Any, run: jg.Run, batch: Any, J: Any, slow: int) -> dict[str, Any]:
    """Errors of the gradient that one backward pass leaves, and where it moves `slow`'s weight."""
    part, optimizer = run.network.parts[0], run.optimizers[0]
    torch.manual_seed(0)
    optimizer.zero_grad(set_to_none=False)
    peer.backward(part, batch, run.losses, run.w, run.autocast)
    left, split = torch.cat([p.grad.flatten() for p in part.parameters()]), [
        sum(p.numel() for p in x.parameters()) for x in (part.trunk, part.heads)]
    optimizer.step()  # LibMTL's weights move here
    used, found = peer.used.to(J), {"w": peer.used.tolist(), "note": peer.note}
    for name, want in (("error", used @ J), ("error_to_plain_sum", J.sum(0))):
        for where, x, y in zip(("trunk", "heads"), left.split(split), want.split(split)):
            found[f"{name}_{where}"] = ((x - y).norm() / y.norm()).item()
    moved = (peer.w - used)[slow] if peer.w is not None else 0
    return found | {"weight_of_slower_task": "up" if moved > 0 else "down" if moved < 0 else None}

def peer_variants(config: jg.Config, device: Any) -> list[tuple[str, str, Any, dict[str, Any]]]:
    """(name, version, step, check) of each peer that is installed; `step()` is a training step."""
    B, variants = config.batch_size, []
    data, _ = jg.load_data(replace(config, train_images=B, val_images=2))
    batch = data.batch(np.arange(B) % len(data), device)
    for name, make, package, modules in PEERS:
        if installed(modules):
            run = jg.Run(replace(config, mode="equal"), data, device)  # GradNorm's network
            L, J = gradients(run, batch)
            slow = int(J.norm(dim=1).argmax())
            L0 = L * 10
            L0[slow] = L[slow] / 10
            peer = make(run, L0)
            found = check(peer, run, batch, J, slow)
            version = metadata.version(package.split()[-1].partition("[")[0])
            step = partial(jg.train_step, run, batch, 0.5, peer.backward)
            variants.append((name, version, step, found))
    return variants
