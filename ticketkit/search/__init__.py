"""The search for tickets: `imp` is the algorithm, `train` the one training loop, `rewind` where each round starts from."""
