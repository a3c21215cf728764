"""Generated aerial scenes with captions that are true of them."""
