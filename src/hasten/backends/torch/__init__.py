"""Models as Transformers' modules in torch, from every folder that hasten reads; slow to start, easy to change."""
