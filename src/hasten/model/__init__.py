"""What a model is: its architecture, its weights, its tokenizer. Imports numpy, never torch."""
