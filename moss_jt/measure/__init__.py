"""What a machine and a model reach: limits, benchmarks, perplexity, doctor."""
