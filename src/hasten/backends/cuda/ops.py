"""Launches of the small kernels of kernels/ops.py."""

import torch
import triton

from hasten.backends.base import DRAW_GROUP
from hasten.backends.cuda.device import Device
from hasten.backends.cuda.kernels import ops as kernels
from hasten.backends.cuda.kernels.sampling import race

FP8_DTYPE = torch.float8_e4m3fn
_LARGEST = {None: 0, FP8_DTYPE: 448, torch.int8: 127}


class Ops:
    """Embedding, norms, activation and argmax on one device. layer_norm: LayerNorm rather than RMSNorm."""

    def __init__(self, device: Device, layer_norm: bool, eps: float) -> None:
        self.device = device
        self._layer_norm = layer_norm
        self._eps = eps

    def embed(
        self,
        table: torch.Tensor,
        position_table: torch.Tensor | None,
        tokens: torch.Tensor,
        sources: torch.Tensor,
        sampled: torch.Tensor,
        positions: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """[T, H] embeddings of int32 tokens [T], or of sampled[sources[t]] where sources[t] >= 0."""
        width = table.shape[1]
        out = torch.empty((len(tokens), width), dtype=table.dtype, device=table.device)
        block = min(1024, triton.next_power_of_2(width))
        self.device.launch(
            kernels.embed, (len(tokens), -(-width // block)),
            table, table if position_table is None else position_table, tokens, sources, sampled, positions, out,
            width, scale, LEARNED=position_table is not None, B=block,
        )  # fmt: skip
        return out

    def add_norm(
        self,
        x: torch.Tensor,
        delta: torch.Tensor | None,
        post: "NormWeights | None",
        pre: "NormWeights | None",
        scale: float = 1.0,
        eight: torch.dtype | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """(x + scale * post(delta), its norm by `pre`, scales of the norm's rows where it is made in 8 bits)."""
        rows, width = x.shape
        added = x if delta is None else torch.empty_like(x)
        out = added
        scales = None
        if pre is not None:
            out = torch.empty_like(x, dtype=eight or x.dtype)
            scales = torch.empty(rows, dtype=torch.float32, device=x.device) if eight else None
        self._launch(x, delta, added, out, scales, post, pre, width, scale, self._layer_norm)
        return added, out, scales

    def norm_in_place(self, x: torch.Tensor, weight: torch.Tensor) -> None:
        """RMS norm of each row of x [T, N], which may be columns of something wider."""
        self._launch(x, None, x, x, None, None, NormWeights(weight, None), x.shape[1], 1.0, False)

    def _launch(
        self,
        x: torch.Tensor,
        delta: torch.Tensor | None,
        added: torch.Tensor,
        out: torch.Tensor,
        scales: torch.Tensor | None,
        post: "NormWeights | None",
        pre: "NormWeights | None",
        width: int,
        scale: float,
        layer_norm: bool,
    ) -> None:
        post_weight, post_bias = _tensors(post, x)
        pre_weight, pre_bias = _tensors(pre, x)
        block = triton.next_power_of_2(width)
        self.device.launch(
            kernels.add_norm, (len(x),),
            x, x if delta is None else delta, added, out, x if scales is None else scales, post_weight, post_bias,
            pre_weight, pre_bias, width, x.stride(0), out.stride(0), self._eps, scale, ADD=delta is not None,
            POST=post is not None, PRE=pre is not None, LAYER=layer_norm,
            LARGEST=_LARGEST[None if scales is None else out.dtype], B=block,
            num_warps=4 if block <= 2048 else 8,
        )  # fmt: skip

    def activate(self, x: torch.Tensor, activation: int, gated: bool) -> torch.Tensor:
        """activation(x [T, N]), or with gated activation(x[:, : N / 2]) * x[:, N / 2 :]."""
        return self._activate(x, activation, gated, None)[0]

    def activate_eight(
        self, x: torch.Tensor, activation: int, gated: bool, eight: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same in 8 bits, e4m3 or int8, and scales float32 [T]."""
        out, scales = self._activate(x, activation, gated, eight)
        assert scales is not None
        return out, scales

    def quantize_rows(self, x: torch.Tensor, eight: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, N] in 8 bits, and scales float32 [T]."""
        return self.activate_eight(x, 0, False, eight)

    def _activate(
        self, x: torch.Tensor, activation: int, gated: bool, eight: torch.dtype | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        rows, width = x.shape
        width = width // 2 if gated else width
        out = torch.empty((rows, width), dtype=eight or x.dtype, device=x.device)
        scales = torch.empty(rows, dtype=torch.float32, device=x.device) if eight else None
        block = triton.next_power_of_2(width) if eight else min(2048, triton.next_power_of_2(width))
        self.device.launch(
            kernels.activate_rows, (rows, -(-width // block)),
            x, out, _or(scales, x), width, GATED=gated, ACT=activation, LARGEST=_LARGEST[eight], B=block,
            num_warps=4 if block <= 2048 else 8 if block <= 4096 else 16,
        )  # fmt: skip
        return out, scales

    def argmax(self, logits: torch.Tensor, sampled: torch.Tensor) -> None:
        """sampled[r] = lowest id of the largest of logits [R, V] float32; -1 where one is NaN."""
        rows, vocab = logits.shape
        block = 1024
        rounds = 1 if rows <= 8 else 8
        pieces = -(-vocab // (block * rounds))
        best = torch.empty((rows, pieces), dtype=torch.float32, device=logits.device)
        ids = torch.empty((rows, pieces), dtype=torch.int32, device=logits.device)
        self.device.launch(
            kernels.argmax, (rows, pieces),
            logits, sampled, best, ids, self.device.counters, vocab, PIECES=pieces, B=block, ROUNDS=rounds,
        )  # fmt: skip

    def race(
        self, logits: torch.Tensor, sampled: torch.Tensor, numbers: torch.Tensor, least: torch.Tensor | None
    ) -> None:
        """Draw an id for some rows of logits [R, V] into `sampled`, where argmax has put their best. numbers, least:
        see kernels.sampling.race."""
        entries, vocab = numbers.shape[1], logits.shape[1]
        block = 64
        rounds = 1 if entries <= 8 else 8
        pieces = -(-vocab // (DRAW_GROUP * block * rounds))
        best = torch.empty((entries, pieces), dtype=torch.float64, device=logits.device)
        groups = torch.empty((entries, pieces), dtype=torch.int32, device=logits.device)
        self.device.launch(
            race, (entries, pieces),
            logits, sampled, numbers, numbers if least is None else least, best, groups, self.device.counters, vocab,
            entries, PIECES=pieces, B=block, ROUNDS=rounds, FILTERED=least is not None,
        )  # fmt: skip


class NormWeights:
    """A norm's float32 weight and, for layer norm, bias."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight = weight
        self.bias = bias


def _or(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    return other if tensor is None else tensor


def _tensors(norm: NormWeights | None, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if norm is None:
        return other, other
    return norm.weight, other if norm.bias is None else norm.bias
