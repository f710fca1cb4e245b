"""Data: from rows on disk or on the hub to the micro-batches of a rank."""
