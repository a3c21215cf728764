"""What every HTML page shares: layout, style sheet, macros, and plots; pages load nothing from elsewhere."""
