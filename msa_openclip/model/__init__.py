"""The dual encoder: multi-scale towers, MSCMAT's learned maps, and checkpoints of the released code."""
