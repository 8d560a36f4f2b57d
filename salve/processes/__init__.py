"""The processes of a run: ranks that train together, the GPUs they use, and Lightning's Trainer on each."""
