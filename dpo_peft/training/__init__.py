"""What happens over a run: optimizer steps, callbacks, evaluation, metrics, checkpoints."""
