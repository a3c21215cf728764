"""The demo: a map and a list over an index, in a browser on this machine."""
