"""Reading and writing models: Hugging Face folders, GGUF files and Megatron-Core distributed checkpoints."""
