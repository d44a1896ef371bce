"""Trains the bundled model: a small Llama on ten megabytes of books; minutes on a GPU, many hours on a CPU.

With so little text a model of this size memorises it, so much here is against overfitting: dropout, strong weight
decay, blocks cut at other places every epoch. Choices were made by the validation text, never by the held-out text.
"""

import argparse
import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from llama import BOS, small_llama
from texts import Split, split_books
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, dropout, pad
from train_tokenizer import CONTEXT, save, train_tokenizer
from transformers import GenerationConfig, LlamaForCausalLM

WARMUP_STEPS = 100
VALID_BATCH = 16


def build_model(args: argparse.Namespace) -> LlamaForCausalLM:
    """The model, with dropout where it adds to the residual stream."""
    model = small_llama(args, CONTEXT)
    model.config.use_cache = False
    added = [linear for layer in model.model.layers for linear in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    # Hooks rather than modules: the names of the weights stay Llama's.
    for module in (model.model.embed_tokens, *added):
        module.register_forward_hook(lambda m, _, out: dropout(out, args.dropout, m.training))
    return model


def encode(tokenizer: Tokenizer, passages: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """All passages as one stream of tokens, BOS after each, and where each paragraph starts in it."""
    split = [re.split(r"(?<=\n\n)", passage) for passage in passages]
    flat = [paragraph for paragraphs in split for paragraph in paragraphs]
    ids = [np.asarray(e.ids) for e in tokenizer.encode_batch_fast(flat, add_special_tokens=False)]
    for i in np.cumsum([len(paragraphs) for paragraphs in split]) - 1:
        ids[i] = np.append(ids[i], BOS)
    starts = np.cumsum([0] + [len(x) for x in ids[:-1]])
    return np.concatenate(ids), starts


def cut_blocks(stream: np.ndarray, starts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[N, CONTEXT + 1] blocks in random order. Each is BOS, then text from the start of a paragraph, as at inference.
    It begins where the one before ended, or up to a paragraph and a sixteenth of a block earlier."""
    blocks = []
    begin = int(starts[rng.integers(np.searchsorted(starts, CONTEXT))])
    while begin + CONTEXT <= len(stream):
        blocks.append(np.concatenate([[BOS], stream[begin : begin + CONTEXT]]))
        limit = begin + CONTEXT - int(rng.integers(CONTEXT // 16))
        paragraph = int(starts[np.searchsorted(starts, limit, side="right") - 1])
        begin = paragraph if paragraph > begin else limit
    return np.stack(blocks)[rng.permutation(len(blocks))]


def batches(stream: np.ndarray, starts: np.ndarray, args: argparse.Namespace) -> Iterator[Tensor]:
    """Endless [B, CONTEXT + 1] batches, cut and shuffled anew every epoch."""
    rng = np.random.default_rng(args.seed)
    while True:
        blocks = cut_blocks(stream, starts, rng)
        for i in range(0, len(blocks) - args.batch_size + 1, args.batch_size):
            yield torch.from_numpy(blocks[i : i + args.batch_size])


@torch.no_grad()
def evaluate(model: nn.Module, tokenizer: Tokenizer, text: str, device: str) -> tuple[float, float]:
    """(bits per byte, perplexity per token): every token once, in windows of CONTEXT - 1 tokens after BOS."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    count = len(ids)
    ids += [BOS] * (-count % (CONTEXT - 1))
    targets = torch.tensor(ids, device=device).view(-1, CONTEXT - 1)
    inputs = pad(targets, (1, 0), value=BOS)
    nats = torch.cat(
        [
            cross_entropy(model(x).logits[:, :-1].float().transpose(1, 2), y, reduction="none")
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
    """Share of the peak: linear warm-up, constant, linear decay to zero over the last decay_share of the steps."""
    return min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / (decay_share * steps))


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    logits = model(batch[:, :-1]).logits.float()  # [B, T, V]
    return cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def train(model: nn.Module, tokenizer: Tokenizer, split: Split, args: argparse.Namespace) -> list[dict[str, float]]:
    """Trains in place; returns the curve, an entry an epoch (training loss in nats a token)."""
    valid = "\n\n".join(split.valid)
    stream, starts = encode(tokenizer, split.train)
    steps_an_epoch = len(stream) // (args.batch_size * CONTEXT)
    steps = args.max_steps or args.epochs * steps_an_epoch
    on_gpu = args.device == "cuda"
    compiled_loss = torch.compile(loss_of, disable=not on_gpu)
    opts = optimizers(model, args)
    curve, losses, started = [], [], time.perf_counter()
    for step, batch in zip(range(steps), batches(stream, starts, args), strict=False):
        for group in (g for opt in opts for g in opt.param_groups):
            group["lr"] = args.lr * learning_rate(step, steps, args.decay_share)
        model.train()
        with torch.autocast(args.device, torch.bfloat16, enabled=on_gpu):
            loss = compiled_loss(model, batch.to(args.device))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad()
        losses.append(loss.detach())
        if step + 1 == steps or (step + 1) % steps_an_epoch == 0:
            bits, perplexity = evaluate(model.eval(), tokenizer, valid, args.device)
            entry = {"step": step + 1, "tokens": (step + 1) * args.batch_size * CONTEXT}
            entry |= {
                "seconds": round(time.perf_counter() - started, 1),
                "train_loss": torch.stack(losses).mean().item(),
            }
            curve.append(entry | {"valid_bits_per_byte": bits, "valid_perplexity": perplexity})
            losses.clear()
            print(json.dumps(curve[-1]), flush=True)
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


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with classic-books/ and tinyshakespeare/")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--log", type=Path, default=Path("training.json"), help="file for settings, curve and results")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--intermediate-size", type=int, default=768)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--epochs", type=int, default=32)
    parser.add_argument("--max-steps", type=int, help="instead of epochs, for a quick try")
    parser.add_argument("--batch-size", type=int, default=32, help=f"blocks of {CONTEXT} tokens")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--weight-decay", type=float, default=1.0)
    parser.add_argument("--decay-share", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(args.seed)
    split = split_books(args.data)
    tokenizer = train_tokenizer(split.train, args.vocab_size)
    model = build_model(args).to(args.device)
    curve = train(model, tokenizer, split, args)
    model = save_model(model, tokenizer, args.output)
    final = {}
    for name in ("valid", "heldout"):
        bits, perplexity = evaluate(model, tokenizer, "\n\n".join(getattr(split, name)), args.device)
        final[name] = {"bits_per_byte": bits, "perplexity": perplexity}
    settings = {k: v for k, v in vars(args).items() if k not in ("data", "output", "log")}
    log = {"settings": settings, "parameters": model.num_parameters(), "curve": curve, "saved_in_bf16": final}
    args.log.write_text(json.dumps(log, indent=1) + "\n")
    print(json.dumps(final))


if __name__ == "__main__":
    main()
