# SPDX-License-Identifier: MIT
"""The processes of a run: the ranks of a training, the GPUs that they use, and Lightning's Trainer on each rank."""
