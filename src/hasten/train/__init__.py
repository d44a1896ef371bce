"""Training, on Transformers' Trainer: fine-tuning, from scratch, distillation, gradual pruning, recovery."""
