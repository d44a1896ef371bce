"""Trains a Llama of 20-60M parameters on ten megabytes of books: minutes on a GPU, as the base that compression is
tried on. The same code path as a recipe's Finetune(fresh=True): hasten.train.

The text is held out as in examples/demo (texts.py there), whose tokenizer code is used too; heldout.txt and
calibration.txt (the training text) are written beside the model. With so little text a model of this size learns it by
heart: dropout, weight decay and a limit of epochs are against that, chosen by the validation text.
"""

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad
from transformers import GenerationConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "demo"))
from llama import BOS, small_llama
from texts import split_books
from train_tokenizer import save as save_tokenizer
from train_tokenizer import train_tokenizer

from hasten.steps import Training
from hasten.train.data import Sequences
from hasten.train.dropout import dropped
from hasten.train.trainer import Around, Trained, fit, sequences_needed

PROBE_STEPS = 30  # timed, after as many to warm up


def build_model(args: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(args.seed)
    return small_llama(args, 1024).to(args.device)


def encode(tokenizer: object, passages: list[str]) -> np.ndarray:
    """All passages as one row of tokens, BOS before each and behind the last."""
    ids = [np.asarray(encoded.ids, np.int32) for encoded in tokenizer.encode_batch_fast(passages)]
    return np.concatenate([*ids, [np.int32(BOS)]])


def train(stream: Tensor, args: argparse.Namespace, seconds: float) -> tuple[LlamaForCausalLM, Trained, int]:
    """The trained model, what came of it, and its steps: as many as `seconds` allow, `epochs` at most."""
    a_step = args.batch_size * args.sequence_len
    steps = args.steps or max(1, args.epochs * len(stream) // a_step)
    if not args.steps:
        started = time.monotonic()
        _run(stream, args, PROBE_STEPS)
        probe = _run(stream, args, PROBE_STEPS)[1]
        left = seconds - (time.monotonic() - started)
        a_second = probe.tokens / probe.seconds
        steps = min(steps, max(PROBE_STEPS, int(left * a_second / a_step)))
    return (*_run(stream, args, steps), steps)


def _run(stream: Tensor, args: argparse.Namespace, steps: int) -> tuple[LlamaForCausalLM, Trained]:
    training = Training(
        steps=steps,
        batch_size=args.batch_size,
        sequence_len=args.sequence_len,
        learning_rate=args.lr,
        warmup=min(0.5, 100 / steps),
        schedule="linear",
        weight_decay=args.weight_decay,
        seed=args.seed,
        logs=args.logs,
    )
    model = build_model(args)
    sequences = Sequences(stream, args.sequence_len, sequences_needed(training), args.seed, BOS)

    def tell(part: float, what: str) -> None:
        if int(part * 20) != int((part - 1 / steps) * 20):
            print(f"{part:4.0%} {what}", flush=True)

    with tempfile.TemporaryDirectory() as work, dropped(_additions(model), args.dropout):
        trained = fit(model, sequences, training, Around(Path(work), tell=tell, compile=args.compile, saves=0))
    return model, trained


def _additions(model: LlamaForCausalLM) -> list[torch.nn.Module]:
    """The modules whose outputs are, or are added to, the residual stream."""
    layers = model.model.layers
    added = [module for layer in layers for module in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    return [model.model.embed_tokens, *added]


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, tokenizer: object, text: str, length: int) -> float:
    """Every token once, in windows of `length` tokens that start with BOS."""
    device = next(model.parameters()).device
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    count = len(ids)
    targets = torch.tensor(ids + [BOS] * (-count % (length - 1)), device=device).view(-1, length - 1)
    nats = torch.cat(
        [
            cross_entropy(model(pad(y, (1, 0), value=BOS)).logits[:, :-1].float().transpose(1, 2), y, reduction="none")
            for y in targets.split(16)
        ]
    )
    return nats.flatten()[:count].double().sum().item() / math.log(2) / len(text.encode())


def write(model: LlamaForCausalLM, tokenizer: object, folder: Path) -> LlamaForCausalLM:
    """Writes a Hugging Face folder in bf16; returns the model as rounded, in float32."""
    model = model.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=BOS, do_sample=True, temperature=0.8)
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)
    return model.float().eval()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="folder with classic-books/ and tinyshakespeare/")
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--minutes", type=float, default=3.0, help="for all of it, the tokenizer too")
    parser.add_argument("--epochs", type=int, default=20, help="at most")
    parser.add_argument("--steps", type=int, help="instead of minutes and epochs")
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--intermediate-size", type=int, default=1536)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--sequence-len", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--weight-decay", type=float, default=1.0)
    parser.add_argument("--dropout", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true", help="with torch.compile: worth it for long trainings")
    parser.add_argument("--logs", help="folder for TensorBoard")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    started = time.monotonic()
    args = parse_args()
    if args.device == "cuda":
        torch.set_float32_matmul_precision("high")
    split = split_books(args.text)
    tokenizer = train_tokenizer(split.train, args.vocab_size)
    stream = torch.from_numpy(encode(tokenizer, split.train)).to(args.device)
    spent = time.monotonic() - started
    print(f"{len(stream):,} tokens of training text, {spent:.0f} s so far", flush=True)
    model, trained, steps = train(stream, args, 60 * args.minutes - spent - 5)
    model = write(model, tokenizer, args.output)
    (args.output / "heldout.txt").write_text("\n\n".join(split.heldout), encoding="utf-8")
    (args.output / "calibration.txt").write_text("\n\n".join(split.train), encoding="utf-8")
    found = {
        "parameters": model.num_parameters(),
        "steps": steps,
        "epochs": round(steps * args.batch_size * args.sequence_len / len(stream), 2),
        **trained.facts(),
        **{
            f"{name}_bits_per_byte": round(
                bits_per_byte(model, tokenizer, "\n\n".join(getattr(split, name)), args.sequence_len), 4
            )
            for name in ("valid", "heldout")
        },
        "all_seconds": round(time.monotonic() - started, 1),
    }
    settings = {key: value for key, value in vars(args).items() if key not in ("text", "output", "logs")}
    (args.output / "training.json").write_text(json.dumps({"settings": settings, **found}, indent=1) + "\n")
    print(json.dumps({key: value for key, value in found.items() if key != "loss"}))


if __name__ == "__main__":
    main()
