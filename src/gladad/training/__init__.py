"""The one training loop of long trainings: checkpoints, optimisers and trackers."""
