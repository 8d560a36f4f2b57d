"""The parts of ``gpu_check.py``: time budget, carried wheels, facts about the machine, measurements, and tables."""
