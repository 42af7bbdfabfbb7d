"""Numbers in fewer bits (report §3.3): so far, how weights are stored for speaking."""
