"""The paper's experiments: a module for each figure, beside the directions that it is expected to show."""
