"""Folders of Hugging Face transformers: config.json, safetensors, the tokenizer's files."""
