"""Figures, tables and the HTML page of a report, drawn from result files only."""
