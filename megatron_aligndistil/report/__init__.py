"""What a run leaves for its reader: tables, charts, reports."""
