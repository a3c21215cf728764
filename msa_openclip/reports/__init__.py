"""Reports of runs and evaluations: tables, HTML pages, model cards, plots."""
