"""Models on disk: configuration, the model folder's format, sizes, tokenizer, where model folders live."""
