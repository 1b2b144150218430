"""Training: the config of an experiment, the trainer, its checkpoints."""
