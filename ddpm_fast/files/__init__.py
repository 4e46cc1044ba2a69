"""Files that are complete or absent, and that are read without executing anything: tensors, models, checkpoints."""
