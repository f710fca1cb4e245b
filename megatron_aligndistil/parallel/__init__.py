"""Process groups, seeds, collectives and the pipeline schedule: everything that knows about ranks."""
