"""The engine that runs Qwen2.5-VL and Qwen3-VL through transformers, and its tiny checkpoints."""
