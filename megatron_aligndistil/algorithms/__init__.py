"""The table of algorithms: each names its data, its frozen roles, and how statistics become a loss."""
