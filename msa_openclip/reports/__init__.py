"""What people read of a run or an evaluation: tables, pages, cards, plots."""
