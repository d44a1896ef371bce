"""Quantize, block by block: which matrix of a block takes which format by which method."""

from concurrent.futures import ThreadPoolExecutor

from hasten.compress import rtn
from hasten.compress.blocks import Block, Inputs
from hasten.compress.stage import Context, change_block
from hasten.compress.tensors import to_weight
from hasten.hardware import usable_threads
from hasten.steps import Quantize


@change_block.register
def _(step: Quantize, block: Block, inputs: Inputs, context: Context) -> None:
    roles = [role for role in block.linears if context.plan.steps.get(block.name(role)) == step]
    with ThreadPoolExecutor(usable_threads()) as pool:
        for role in roles:
            name = block.name(role)
            dense = to_weight(block.linears[role].weight, "fp32")
            block.store(role, rtn.quantize(name, dense, context.plan.formats[name], pool))
