"""Trains the bundled model: a small Llama on ten megabytes of books, on a GPU in a minute or two, or on a CPU.

With so little text a model of this size memorises it, so everything here is against overfitting: dropout, weight decay,
tokenizations that differ from epoch to epoch (BPE-dropout, Provilkov et al. 2020), cuts that differ from epoch to epoch,
and optionally an ensemble of larger models as teachers (`--teachers`), whose mean prediction is learnt instead of the
one token that came next (Hinton et al. 2015). Choices are made by the validation text, never by the held-out text.
"""

import argparse
import json
import math
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from texts import split_books
from train_tokenizer import CONTEXT, save, train_tokenizer

BOS = 0
WARMUP_STEPS = 100
VALID_BATCH = 16


def build_model(args: argparse.Namespace) -> LlamaForCausalLM:
    """A Llama of the given size. Both outputs into the residual stream start at zero, so that depth costs no stability."""
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.hidden_size // args.heads,
        max_position_embeddings=CONTEXT,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        attention_dropout=args.attention_dropout,
        bos_token_id=BOS,
        eos_token_id=BOS,
        pad_token_id=None,
        use_cache=False,
    )
    model = LlamaForCausalLM(config)
    dropped = [model.model.embed_tokens]
    for layer in model.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            nn.init.zeros_(linear.weight)
            dropped.append(linear)
    # Hooks rather than modules: the names of the weights stay Llama's.
    for module in dropped:
        module.register_forward_hook(lambda m, _, out: F.dropout(out, args.dropout, m.training))
    return model


def encode_epoch(tokenizer: Tokenizer, passages: list[list[str]]) -> tuple[np.ndarray, np.ndarray]:
    """All passages as one stream of tokens, BOS after each, and where each paragraph starts in it."""
    flat = [text for passage in passages for text in passage]
    ids = [np.asarray(e.ids) for e in tokenizer.encode_batch_fast(flat, add_special_tokens=False)]
    last = np.cumsum([len(passage) for passage in passages]) - 1
    for i in last:
        ids[i] = np.append(ids[i], BOS)
    starts = np.cumsum([0] + [len(x) for x in ids[:-1]])
    return np.concatenate(ids), starts


def cut_blocks(stream: np.ndarray, starts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[N, CONTEXT + 1] blocks in random order. Each is BOS and then text from the start of a paragraph, as at inference;
    it begins where the one before ended, or up to a paragraph and a sixteenth of a block earlier."""
    blocks = []
    begin = int(starts[rng.integers(np.searchsorted(starts, CONTEXT))])
    while begin + CONTEXT <= len(stream):
        blocks.append(np.concatenate([[BOS], stream[begin : begin + CONTEXT]]))
        limit = begin + CONTEXT - int(rng.integers(CONTEXT // 16))
        paragraph = int(starts[np.searchsorted(starts, limit, side="right") - 1])
        begin = paragraph if paragraph > begin else limit
    return np.stack(blocks)[rng.permutation(len(blocks))]


def batches(tokenizer: Tokenizer, train: list[str], args: argparse.Namespace) -> Iterator[Tensor]:
    """Endless [B, CONTEXT + 1] batches, every epoch tokenized, cut and shuffled anew (the next one in the background)."""
    rng = np.random.default_rng(args.seed)
    passages = [re.split(r"(?<=\n\n)", passage) for passage in train]
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.model.dropout = args.bpe_dropout or None
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(encode_epoch, tokenizer, passages)
        while True:
            encoded = coming.result()
            coming = pool.submit(encode_epoch, tokenizer, passages)
            blocks = cut_blocks(*encoded, rng)
            for i in range(0, len(blocks) - args.batch_size + 1, args.batch_size):
                yield torch.from_numpy(blocks[i : i + args.batch_size])


@torch.no_grad()
def evaluate(model: nn.Module, tokenizer: Tokenizer, text: str, device: str) -> tuple[float, float]:
    """(bits per byte, perplexity per token): every token of the text once, in windows of CONTEXT - 1 tokens after BOS."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    count = len(ids)
    ids += [BOS] * (-count % (CONTEXT - 1))
    targets = torch.tensor(ids, device=device).view(-1, CONTEXT - 1)
    inputs = F.pad(targets, (1, 0), value=BOS)
    nats = torch.cat(
        [
            F.cross_entropy(model(x).logits[:, :-1].float().transpose(1, 2), y, reduction="none")
            for x, y in zip(inputs.split(VALID_BATCH), targets.split(VALID_BATCH), strict=True)
        ]
    ).flatten()[:count]
    total = nats.double().sum().item()
    return total / math.log(2) / len(text.encode()), math.exp(total / count)


def optimizers(model: nn.Module, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024) for the matrices of the layers, AdamW for embeddings and norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": [model.model.embed_tokens.weight], "weight_decay": args.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    muon = torch.optim.Muon(matrices, lr=args.lr, weight_decay=args.weight_decay, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))]


def learning_rate(step: int, steps: int, decay_share: float) -> float:
    """Of the peak: linear warm-up, constant, linear decay to zero over the last decay_share (warm-up, stable, decay)."""
    return min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / (decay_share * steps))


def loss_of(model: nn.Module, teachers: list[nn.Module], batch: Tensor) -> Tensor:
    """Cross-entropy against the next token, or against the teachers' mean distribution."""
    logits = model(batch[:, :-1]).logits.float().flatten(0, 1)  # [B * T, V]
    if not teachers:
        return F.cross_entropy(logits, batch[:, 1:].flatten())
    with torch.no_grad():
        probabilities = torch.stack([t(batch[:, :-1]).logits.float().softmax(-1) for t in teachers]).mean(0)
    return F.cross_entropy(logits, probabilities.flatten(0, 1))


def train(model: nn.Module, teachers: list[nn.Module], tokenizer: Tokenizer, args: argparse.Namespace) -> list[dict]:
    """Trains in place; returns the curve, one entry an epoch: step, train loss (nats a token), valid bits per byte."""
    split = split_books(args.data)
    valid = "\n\n".join(split.valid)
    stream, _ = encode_epoch(tokenizer, [[p] for p in split.train])
    steps_an_epoch = len(stream) // (args.batch_size * CONTEXT)
    steps = args.max_steps or args.epochs * steps_an_epoch
    use_gpu = args.device == "cuda"
    autocast = torch.autocast(args.device, torch.bfloat16, enabled=use_gpu)
    compiled_loss = torch.compile(loss_of, disable=not use_gpu)
    opts = optimizers(model, args)
    for group in (g for o in opts for g in o.param_groups):
        group["peak"] = group["lr"]
    curve, started, losses = [], time.perf_counter(), []
    for step, batch in zip(range(steps), batches(tokenizer, split.train, args), strict=False):
        for group in (g for o in opts for g in o.param_groups):
            group["lr"] = group["peak"] * learning_rate(step, steps, args.decay_share)
        model.train()
        with autocast:
            loss = compiled_loss(model, teachers, batch.to(args.device, non_blocking=True))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        losses.append(loss.detach())
        if step + 1 == steps or (step + 1) % steps_an_epoch == 0:
            model.eval()
            bits, perplexity = evaluate(model, tokenizer, valid, args.device)
            entry = {
                "step": step + 1,
                "tokens": (step + 1) * args.batch_size * CONTEXT,
                "seconds": round(time.perf_counter() - started, 1),
                "train_loss": torch.stack(losses).mean().item(),
                "valid_bits_per_byte": bits,
                "valid_perplexity": perplexity,
            }
            curve.append(entry)
            losses.clear()
            print(json.dumps(entry), flush=True)
    return curve


def save_model(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> LlamaForCausalLM:
    """Writes a Hugging Face folder in bf16; returns the model as rounded, in fp32."""
    model = model.to(torch.bfloat16)
    model.config.use_cache = True
    model.config.dtype = torch.bfloat16
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=BOS, do_sample=True, temperature=0.8)
    model.save_pretrained(folder)
    save(tokenizer, folder)
    return model.float().eval()


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with classic-books/ and tinyshakespeare/")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--teachers", type=Path, nargs="*", default=[], help="folders of trained models to learn from")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--intermediate-size", type=int, default=768)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--attention-dropout", type=float, default=0.0)
    parser.add_argument("--bpe-dropout", type=float, default=0.0)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--max-steps", type=int, help="instead of epochs, for a quick try")
    parser.add_argument("--batch-size", type=int, default=32, help=f"blocks of {CONTEXT} tokens")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--decay-share", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    torch.manual_seed(args.seed)
    split = split_books(args.data)
    tokenizer = train_tokenizer(split.train, args.vocab_size)
    model = build_model(args).to(args.device)
    teachers = [LlamaForCausalLM.from_pretrained(t, dtype=torch.bfloat16).to(args.device).eval() for t in args.teachers]
    curve = train(model, teachers, tokenizer, args)
    model = save_model(model, tokenizer, args.output)
    names = ("valid", "heldout")
    final = {n: evaluate(model, tokenizer, "\n\n".join(getattr(split, n)), args.device) for n in names}
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "teachers"}
    log = {"settings": settings, "parameters": model.num_parameters(), "curve": curve, "bf16": final}
    (args.output / "training.json").write_text(json.dumps(log, indent=1) + "\n")
    print(json.dumps({"parameters": log["parameters"], "bits_per_byte_and_perplexity": final}))
    return log


if __name__ == "__main__":
    main()
