"""nanochat: the model, its training stages and the chat; readable alone, runs without infra."""
