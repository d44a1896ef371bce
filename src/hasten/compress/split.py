"""SplitExperts, block by block: neurons into experts, and the router that chooses among them."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from hasten.compress import experts
from hasten.compress.blocks import Block, Inputs
from hasten.compress.stage import Context, change_block
from hasten.compress.statistics import rows_of
from hasten.steps import SplitExperts

_ROWS = 1 << 14  # tokens that neurons are watched on
_CHUNK = 1 << 11


@change_block.register
@torch.no_grad()
def _(step: SplitExperts, block: Block, inputs: Inputs, context: Context) -> None:
    seed = context.recipe.calibration.seed + block.index
    x, hidden = (rows_of(block, inputs, role, _ROWS).float() for role in ("up", "down"))
    order = experts.neuron_order(labels(step, block, hidden, seed)).to(x.device)
    for role in ("gate", "up"):
        if role in block.linears:
            linear = block.linears[role]
            linear.weight.data = linear.weight.data[order]
            if linear.bias is not None:
                linear.bias.data = linear.bias.data[order]
    down = block.linears["down"].weight
    down.data = down.data[:, order].contiguous()
    hidden, columns = hidden[:, order], down.float()
    norms = torch.cat([experts.expert_norms(part, columns, step.experts) for part in torch.split(hidden, _CHUNK)])
    router = nn.Linear(x.shape[1], step.experts, bias=False, device="meta")
    trained = experts.train_router(x, norms, seed)
    router.weight = nn.Parameter(trained.to(down.dtype), requires_grad=False)
    mask = experts.active_mask(x @ trained.T, step.active, hidden.shape[1])
    context.lost(block.name("experts"), _lost(hidden, mask, columns))
    layer = replace(block.layer, experts=step.experts, active_experts=step.active)
    block.reshape(layer, {**block.linears, "router": router})


def labels(step: SplitExperts, block: Block, hidden: Tensor, seed: int) -> Tensor:
    """The expert [I] of each neuron, given what reaches `down` [T, I]."""
    neurons = hidden.shape[1]
    if step.method == "random":
        return experts.random(neurons, step.experts, seed)
    if step.method == "kmeans":
        first = block.linears["gate" if "gate" in block.linears else "up"]
        return experts.kmeans(first.weight, step.experts, seed)
    seen = experts.CoActivation.empty(neurons, hidden.device)
    down = block.linears["down"].weight.float()
    for part in torch.split(hidden, _CHUNK):
        seen.add(experts.contributions(part, down))
    return experts.spectral(seen.graph(), step.experts, seed)


def _lost(hidden: Tensor, mask: Tensor, down: Tensor) -> float:
    """Share of the squared outputs that is lost where only masked neurons run."""
    lost = total = 0.0
    for part, kept in zip(torch.split(hidden, _CHUNK), torch.split(mask, _CHUNK), strict=True):
        lost += float(((part * ~kept) @ down.T).square().sum())
        total += float((part @ down.T).square().sum())
    return lost / max(total, 1e-30)
