"""Files that cannot be trusted, safetensors files, and tensors of which a process has a part."""
