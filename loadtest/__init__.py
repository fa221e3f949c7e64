"""Black-box load: what a client sees, counted from when it meant to ask."""
