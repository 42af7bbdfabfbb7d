"""Training (report §4.2): schedule, optimiser, the loop, checkpoints that survive anything."""
