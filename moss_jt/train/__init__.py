"""Fine-tuning: adapters (LoRA) and whole small models, on weights that may stream."""
