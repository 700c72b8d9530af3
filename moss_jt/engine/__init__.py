"""From tokens to tokens: the model's mathematics, the key/value cache, sampling, drafts, generation."""
